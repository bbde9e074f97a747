package protobuf

import (
	"os"
	"os/exec"
	"strings"
	"testing"
)

// Modules that this repository's build downloads anyway: their .proto files and
// generated code are other people's work, made by several versions of protoc
// and of the plugins, and up to date.
func TestRealModulesAreFresh(t *testing.T) {
	for _, tt := range []struct {
		module          string
		files, services int // at least
	}{
		{"connectrpc.com/connect", 4, 3},
		{"google.golang.org/grpc", 7, 3},
		{"github.com/containerd/containerd/api", 40, 18},
	} {
		out, err := exec.CommandContext(t.Context(), "go", "mod", "download", "-json", tt.module).Output()
		if err != nil {
			t.Fatalf("%s: %v", tt.module, err)
		}
		_, dir, _ := strings.Cut(string(out), `"Dir": "`)
		dir, _, _ = strings.Cut(dir, `"`)
		fsys := os.DirFS(dir)
		r := mustCompile(t, fsys, ".")
		if len(r.Sources.Files) < tt.files || len(r.Services) < tt.services {
			t.Errorf("%s: %d files, %d services", tt.module, len(r.Sources.Files), len(r.Services))
		}
		if len(r.Stale) != 0 {
			t.Errorf("%s: stale:\n%s", tt.module, stales(r.Stale))
		}
		if g := plan(t, r); len(g.Runs) != 0 || len(g.Remove) != 0 {
			t.Errorf("%s: %+v", tt.module, g)
		}
		if c := Breaking(r.Set, r.Set, WireJSON); len(c) != 0 {
			t.Errorf("%s against itself: %v", tt.module, c)
		}
	}
}
