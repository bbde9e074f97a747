package protobuf

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/m3o/m3o/internal/need"
)

const workspaceTree = `
-- go.work --
go 1.26
use (
	./api
	./lib
	./gen
	./other
)
-- api/go.mod --
module example.com/api
require google.golang.org/protobuf v1.36.0
require google.golang.org/grpc v1.70.0
-- api/main.go --
package main
import (
	"example.com/api/pb/own"
	"example.com/lib/use"
)
func main() { own.RegisterOwnServer(nil, nil); use.It() }
-- api/own.proto --
syntax = "proto3";
package own;
import "shared/shared.proto";
option go_package = "example.com/api/pb/own";
service Own { rpc Get(shared.Thing) returns (shared.Thing); }
-- lib/go.mod --
module example.com/lib
require google.golang.org/protobuf v1.36.5
-- lib/use/use.go --
package use
import "example.com/gen/root"
func It() { root.NewRootsClient(nil) }
-- lib/unused/unused.go --
package unused
import "example.com/lib/unused/pb"
-- lib/unused/unused.proto --
syntax = "proto3";
package unused;
option go_package = "example.com/lib/unused/pb";
message Unused {}
-- lib/proto/shared/shared.proto --
syntax = "proto3";
package shared;
option go_package = "example.com/lib/pb/shared";
message Thing {}
-- gen/go.mod --
module example.com/gen
-- proto/root.proto --
syntax = "proto3";
package root;
option go_package = "example.com/gen/root";
message Root {}
service Roots { rpc Get(Root) returns (Root); }

-- other/go.mod --
module example.com/other
-- other/other.go --
package other
import "example.com/other/pb"
-- other/other.proto --
syntax = "proto3";
package other;
option go_package = "example.com/other/pb";
message Other {}
`

var workspaceModules = []string{"api", "lib", "gen", "other"}

func planOfWorkspace(t *testing.T, text, dir string) (*Result, Generate, error) {
	t.Helper()
	s, err := FindInWorkspace(tree(text), dir, ".", workspaceModules)
	if err != nil {
		return nil, Generate{}, err
	}
	r, err := Compile(t.Context(), s)
	if err != nil {
		return nil, Generate{}, err
	}
	g, err := GoPlan(r)
	return r, g, err
}

// lines are the runs as "plugin version out: files".
func lines(g Generate) []string {
	var all []string
	for _, r := range g.Runs {
		all = append(all, r.Plugin.Name+" "+r.Plugin.Version+" "+r.Out+": "+strings.Join(r.Files, " "))
	}
	return all
}

func paths(g Generate) []string {
	var all []string
	for _, s := range g.Stale {
		all = append(all, s.Path)
	}
	return all
}

func TestPlanOfOneModuleOfAWorkspace(t *testing.T) {
	r, g, err := planOfWorkspace(t, workspaceTree, "api")
	if err != nil {
		t.Fatal(err)
	}
	// shared.proto is found as what own.proto imports and as a file of lib.
	want := []string{"api/pb/own/own.pb.go", "api/pb/own/own_grpc.pb.go", "gen/root/root.pb.go", "gen/root/root_grpc.pb.go", "lib/pb/shared/shared.pb.go"}
	if d := cmp.Diff(want, paths(g)); d != "" {
		t.Errorf("the files differ (-want +got):\n%s", d)
	}
	// The newest version that any module of the workspace requires.
	want = []string{"protoc-gen-go v1.36.5 api: own.proto", "protoc-gen-go v1.36.5 gen: root.proto", "protoc-gen-go v1.36.5 lib: shared/shared.proto",
		"protoc-gen-go-grpc v1.6.2 api: own.proto", "protoc-gen-go-grpc v1.6.2 gen: root.proto"}
	if d := cmp.Diff(want, lines(g)); d != "" {
		t.Errorf("the runs differ (-want +got):\n%s", d)
	}
	if got := names(r.Sources); got != "own.proto=api/own.proto root.proto=proto/root.proto shared/shared.proto=lib/proto/shared/shared.proto" {
		t.Errorf("files %s", got)
	}
	for _, f := range r.Set.GetFile() {
		if n := f.GetName(); strings.Contains(n, "other") || strings.Contains(n, "unused") {
			t.Errorf("%s is part of the API of api", n)
		}
	}
}

func TestPlanOfAWholeWorkspace(t *testing.T) {
	text := strings.Replace(workspaceTree, "-- proto/root.proto --", "-- root.proto --", 1) // the folder proto would be all there is
	_, g, err := planOfWorkspace(t, text, ".")
	if err != nil {
		t.Fatal(err)
	}
	want := []string{"api/pb/own/own.pb.go", "api/pb/own/own_grpc.pb.go", "gen/root/root.pb.go", "gen/root/root_grpc.pb.go", "lib/pb/shared/shared.pb.go", "lib/unused/pb/unused.pb.go", "other/pb/other.pb.go"}
	if d := cmp.Diff(want, paths(g)); d != "" {
		t.Errorf("the files differ (-want +got):\n%s", d)
	}
}

func TestModuleOfAWorkspaceThatNobodyRequires(t *testing.T) {
	text := strings.ReplaceAll(workspaceTree, "require google.golang.org/protobuf", "//")
	_, _, err := planOfWorkspace(t, text, "api")
	wantInvalid(t, err, "api/pb/own/own.pb.go has to be made by protoc-gen-go, but api/go.mod does not require", "cd api && go get google.golang.org/protobuf")
}

func TestOneNameInTwoModules(t *testing.T) {
	text := strings.Replace(workspaceTree, "-- lib/unused/unused.proto --", "-- lib/proto/own.proto --", 1)
	_, _, err := planOfWorkspace(t, text, "api")
	wantInvalid(t, err, "api/own.proto and lib/proto/own.proto are both \"own.proto\"", "move one")
}

// A buf.gen.yaml beside the modules says where code of what lies there goes.
func TestBufGenOfAWorkspace(t *testing.T) {
	text := workspaceTree +
		"-- buf.gen.yaml --\nversion: v2\nmanaged:\n  enabled: true\n  override:\n    - file_option: go_package\n      value: example.com/gen/root\nplugins:\n" +
		"  - local: protoc-gen-go\n    out: gen\n    opt: module=example.com/gen\n  - local: protoc-gen-go-grpc\n    out: gen\n    opt: [module=example.com/gen, require_unimplemented_servers=false]\n"
	text = strings.Replace(text, "option go_package = \"example.com/gen/root\";\n", "", 1)
	_, g, err := planOfWorkspace(t, text, "api")
	if err != nil {
		t.Fatal(err)
	}
	want := []string{"protoc-gen-go v1.36.5 api: own.proto", "protoc-gen-go v1.36.5 gen: root.proto", "protoc-gen-go v1.36.5 lib: shared/shared.proto",
		"protoc-gen-go-grpc v1.6.2 api: own.proto", "protoc-gen-go-grpc v1.6.2 gen: root.proto"}
	if d := cmp.Diff(want, lines(g)); d != "" {
		t.Errorf("the runs differ (-want +got):\n%s", d)
	}
	if p := g.Runs[4].Parameter; !strings.Contains(p, "require_unimplemented_servers=false") {
		t.Errorf("the parameter of root.proto is %q", p)
	}
}

func TestPlanOfTheWorkspaceSample(t *testing.T) {
	fsys := os.DirFS(filepath.Join(need.RepoRoot(t), "testdata/apps/proto-workspace"))
	for dir, services := range map[string]string{"stock": "rates.v1.Rates stock.v1.Stock", ".": "other.v1.Other rates.v1.Rates stock.v1.Stock"} {
		s, err := FindInWorkspace(fsys, dir, ".", []string{"contracts", "other", "stock"})
		if err != nil {
			t.Fatal(err)
		}
		r, err := Compile(t.Context(), s)
		if err != nil {
			t.Fatal(err)
		}
		g, err := GoPlan(r)
		if err != nil {
			t.Fatal(err)
		}
		want := []string{"contracts/gen/rates/v1/rates.pb.go", "contracts/gen/rates/v1/rates_grpc.pb.go", "contracts/money/v1/money.pb.go", "stock/gen/stock/v1/stock.pb.go", "stock/gen/stock/v1/stock_grpc.pb.go"}
		if d := cmp.Diff(want, paths(g)); d != "" {
			t.Errorf("%s: the files differ (-want +got):\n%s", dir, d)
		}
		var got []string
		for _, svc := range r.Services {
			got = append(got, svc.Name)
		}
		if strings.Join(got, " ") != services {
			t.Errorf("%s: services %v, want %s", dir, got, services)
		}
	}
}
