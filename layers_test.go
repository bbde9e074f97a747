package m3o

import (
	"encoding/json"
	"errors"
	"io"
	"os/exec"
	"strings"
	"testing"
)

const module = "github.com/m3o/m3o"

// layer orders the packages; a package imports only packages of a lower layer
// and, below a driver's folder, its parent. ARCHITECTURE.md shows the table.
var layer = map[string]int{
	"": 0, "internal": 0,
	"api": 1, "store": 1, "events": 1, "telemetry": 1,
	"auth": 2, "config": 2, "certs": 2, "release": 2, "discovery": 2,
	"gitserver": 3, "webhook": 3, "buildpacks": 3, "runtime": 3, "router": 3, "gateway": 3, "web": 3,
	"daemon": 4,
	"cmd":    5,
}

// owners name the only packages that may import a heavy dependency, so that
// its types stop there.
var owners = map[string][]string{
	"github.com/nats-io/":                {"store", "events"},
	"github.com/moby/buildkit":           {"buildpacks/build"},
	"github.com/tonistiigi/fsutil":       {"buildpacks/build", "buildpacks/source"},
	"github.com/containerd/":             {"buildpacks/build", "runtime/oci"},
	"github.com/vishvananda/":            {"runtime/oci", "buildpacks/build"},
	"github.com/google/nftables":         {"runtime/oci", "buildpacks/build"},
	"github.com/miekg/dns":               {"discovery", "certs"},
	"github.com/caddyserver/certmagic":   {"certs"},
	"github.com/mholt/acmez":             {"certs"},
	"github.com/libdns/":                 {"certs"},
	"go.uber.org/zap":                    {"certs"},
	"github.com/gliderlabs/ssh":          {"gitserver"},
	"github.com/go-git/":                 {"buildpacks/source", "gitserver"},
	"github.com/opencontainers/":         {"buildpacks/build", "runtime/oci"},
	"github.com/moby/profiles":           {"runtime/oci"},
	"github.com/bufbuild/protocompile":   {"buildpacks/protobuf", "gateway"},
	"github.com/google/go-github":        {"webhook"},
	"github.com/xanzy/go-gitlab":         {"webhook"},
	"github.com/robfig/cron":             {"events/cron"},
	"google.golang.org/grpc":             {"runtime", "gateway", "router", "buildpacks/build"},
	"go.opentelemetry.io/":               {"telemetry"},
	"github.com/quic-go/":                {"router"},
	"google.golang.org/grpc/reflection/": {"gateway", "runtime"},
}

func TestLayers(t *testing.T) {
	out, err := exec.Command("go", "list", "-json=ImportPath,Imports,TestImports,XTestImports", module+"/...").Output()
	if err != nil {
		t.Fatal(err)
	}
	dec := json.NewDecoder(strings.NewReader(string(out)))
	for {
		var p struct {
			ImportPath                         string
			Imports, TestImports, XTestImports []string
		}
		if err := dec.Decode(&p); errors.Is(err, io.EOF) {
			break
		} else if err != nil {
			t.Fatal(err)
		}
		from := rel(p.ImportPath)
		if from == "testdata" || strings.HasPrefix(from, "testdata/") || strings.HasPrefix(from, "tools") {
			continue
		}
		if _, ok := layer[top(from)]; !ok {
			t.Errorf("%s is in no layer: add its folder to the table in layers_test.go and ARCHITECTURE.md", p.ImportPath)
		}
		for _, imp := range p.Imports {
			if to, ok := strings.CutPrefix(imp, module); ok {
				to = strings.TrimPrefix(to, "/")
				if why := forbidden(from, to); why != "" {
					t.Errorf("%s imports %s: %s", p.ImportPath, imp, why)
				}
				continue
			}
			for dep, who := range owners {
				if strings.HasPrefix(imp, dep) && !owned(from, who) {
					t.Errorf("%s imports %s, which only %v may", p.ImportPath, imp, who)
				}
			}
		}
	}
}

func rel(path string) string { return strings.TrimPrefix(strings.TrimPrefix(path, module), "/") }

func top(p string) string { t, _, _ := strings.Cut(p, "/"); return t }

func owned(from string, who []string) bool {
	for _, w := range who {
		if from == w || strings.HasPrefix(from, w+"/") {
			return true
		}
	}
	return strings.HasPrefix(from, "cmd/m3o-bench")
}

func forbidden(from, to string) string {
	lf, lt := layer[top(from)], layer[top(to)]
	switch {
	case from == "cmd/m3o" && to != "" && top(to) != "api" && top(to) != "internal":
		return "the CLI knows only api"
	case from == "cmd/m3o-shim" && to != "":
		return "the shim stays tiny: it imports nothing of the project"
	case top(from) == top(to):
		// A driver imports its parent; a suite package may too; cousins never.
		if to == top(to) || strings.HasPrefix(from, to+"/") || (top(from) == "cmd" && strings.HasPrefix(to, from+"/")) {
			return ""
		}
		if top(from) == "internal" || top(from) == "api" {
			return ""
		}
		return "cousins do not import each other; daemon passes the real thing in"
	case lf == 0 && top(from) != "internal" && lt == 0:
		return "package m3o imports nothing"
	case lt > lf:
		return "it is in a higher layer"
	case lt == lf && lt != 0:
		return "siblings do not import each other; declare the methods you call and let daemon pass them in"
	}
	return ""
}
