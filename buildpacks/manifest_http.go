package buildpacks

import (
	"regexp"

	"github.com/m3o/m3o"
)

var origin = regexp.MustCompile(`\*|https?://(\*\.)?[A-Za-z0-9.-]+(:[0-9]{1,5})?`)

// httpKeys say how the platform answers for an app that speaks gRPC.
func httpKeys() []key[Manifest] {
	return []key[Manifest]{
		group("http", "How the platform answers for an app that speaks gRPC. A plain HTTP app does all this itself.", func(m *Manifest) *m3o.HTTP { return &m.HTTP }, []key[m3o.HTTP]{
			texts("cors", "Sites whose pages may call the app from a browser (CORS): `https://app.example.com`, `https://*.example.com`, or `*` for all, then without cookies. None without the key; pages of the app's own host may always.",
				matching(origin, "is not an origin", "write for example: https://app.example.com"), func(h *m3o.HTTP) *[]string { return &h.Origins }),
			flag("strict_json", "Refuse JSON, forms and queries that name fields a message does not have. Without it they are ignored, so that an old release understands a new client.",
				func(h *m3o.HTTP) *bool { return &h.Strict }),
		}),
	}
}
