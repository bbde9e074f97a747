package buildpacks

import (
	"fmt"
	"strings"
	"time"

	"github.com/m3o/m3o"
	"gopkg.in/yaml.v3"
)

// healthKeys say when an instance may get requests.
func healthKeys() []key[Manifest] {
	return []key[Manifest]{
		group("health", "When a new instance may get requests. Without it the platform finds out: gRPC health where served, else that the port answers.",
			func(m *Manifest) *m3o.Health { return &m.Health }, []key[m3o.Health]{
				yes("grpc", "Ask `grpc.health.v1`."),
				{"http", "Ask this path; any answer below 400 is healthy.", schema{"type": "string", "pattern": "^/[^ #]*$"},
					func(f *fields, at string, n *yaml.Node, h *m3o.Health) {
						kind(f, n, "http", h)
						h.Path = f.text(n)
						if !strings.HasPrefix(h.Path, "/") || strings.ContainsAny(h.Path, " \r\n\t#") {
							f.fail(n, fmt.Sprintf("%s %q is not a path", at, short(h.Path)), "write for example: http: /healthz")
						}
					}},
				yes("tcp", "It is enough that the port accepts connections."),
				duration("timeout", "How long a start may take; 60s without it.", time.Second, time.Hour, func(h *m3o.Health) *time.Duration { return &h.Timeout }),
			}),
	}
}

// yes is a kind of check that is asked for by "true".
func yes(name, doc string) key[m3o.Health] {
	return key[m3o.Health]{name, doc, schema{"const": true}, func(f *fields, at string, n *yaml.Node, h *m3o.Health) {
		kind(f, n, name, h)
		if n.Kind != yaml.ScalarNode || n.Value != "true" {
			f.fail(n, fmt.Sprintf("%s is %q", at, short(n.Value)), "write "+name+": true, or remove the key")
		}
	}}
}

func kind(f *fields, n *yaml.Node, name string, h *m3o.Health) {
	if h.Kind != "" {
		f.fail(n, "health has both "+h.Kind+" and "+name, "keep one of them")
	}
	h.Kind = name
}
