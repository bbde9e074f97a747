package protobuf

import (
	"bytes"
	"compress/gzip"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/fstest"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/descriptorpb"
	"google.golang.org/protobuf/types/pluginpb"
)

// tool is a plugin built from the module this repository pins it in.
func tool(t testing.TB, name string) string {
	t.Helper()
	p, err := filepath.Abs("../../bin/tools/" + name)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(p); err == nil {
		return p
	}
	pkg := map[string]string{genGo: "google.golang.org/protobuf/cmd/protoc-gen-go", genConnect: "connectrpc.com/connect/cmd/protoc-gen-connect-go", genGRPC: grpcPlugin}[name]
	toolsBuilt.Lock()
	defer toolsBuilt.Unlock()
	if p := toolsBuilt.paths[name]; p != "" {
		return p
	}
	p = filepath.Join(toolsDir, name)
	if out, err := exec.CommandContext(t.Context(), "go", "build", "-o", p, pkg).CombinedOutput(); err != nil {
		t.Fatalf("build %s: %v\n%s", name, err, out)
	}
	toolsBuilt.paths[name] = p
	return p
}

var (
	toolsDir   string
	toolsBuilt = struct {
		sync.Mutex
		paths map[string]string
	}{paths: map[string]string{}}
)

func TestMain(m *testing.M) {
	var err error
	if toolsDir, err = os.MkdirTemp("", "m3o-protobuf-"); err != nil {
		panic(err)
	}
	code := m.Run()
	if err := os.RemoveAll(toolsDir); err != nil {
		panic(err)
	}
	os.Exit(code)
}

// generate runs the plugins of a plan and writes what they make into fsys.
func generate(t testing.TB, r *Result, g Generate, fsys fstest.MapFS) []string {
	t.Helper()
	var written []string
	for _, run := range g.Runs {
		in, err := proto.Marshal(Request(r, run))
		if err != nil {
			t.Fatal(err)
		}
		cmd := exec.CommandContext(t.Context(), tool(t, run.Plugin.Name))
		cmd.Stdin = bytes.NewReader(in)
		out, err := cmd.Output()
		if err != nil {
			t.Fatalf("%s: %v", run.Plugin.Name, err)
		}
		resp := &pluginpb.CodeGeneratorResponse{}
		if err := proto.Unmarshal(out, resp); err != nil {
			t.Fatal(err)
		}
		if resp.Error != nil {
			t.Fatalf("%s: %s", run.Plugin.Name, resp.GetError())
		}
		for _, f := range resp.GetFile() {
			p := path.Join(run.Out, f.GetName())
			fsys[p] = &fstest.MapFile{Data: []byte(f.GetContent())}
			written = append(written, p)
		}
	}
	slices.Sort(written)
	return written
}

func plan(t testing.TB, r *Result) Generate {
	t.Helper()
	g, err := GoPlan(r)
	if err != nil {
		t.Fatal(err)
	}
	return g
}

func stales(list []Stale) string {
	var all []string
	for _, s := range list {
		all = append(all, s.String())
	}
	return strings.Join(all, "\n")
}

// edit returns a copy of the tree with one text replaced in one file.
func edit(t testing.TB, fsys fs.FS, name, old, now string) fstest.MapFS {
	t.Helper()
	c := fstest.MapFS{}
	err := fs.WalkDir(fsys, ".", func(p string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		b, err := fs.ReadFile(fsys, p)
		c[p] = &fstest.MapFile{Data: b}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	if name == "" {
		return c
	}
	b := c[name].Data
	if !bytes.Contains(b, []byte(old)) {
		t.Fatalf("%s has no %q", name, old)
	}
	c[name] = &fstest.MapFile{Data: bytes.Replace(b, []byte(old), []byte(now), 1)}
	return c
}

const helloApp = "../../testdata/apps/hello-grpc"

// The sample has code that protoc, protoc-gen-go and protoc-gen-go-grpc made.
func TestFreshGRPCCode(t *testing.T) {
	r := mustCompile(t, os.DirFS(helloApp), ".")
	if len(r.Stale) != 0 {
		t.Errorf("stale:\n%s", stales(r.Stale))
	}
	if g := plan(t, r); len(g.Runs) != 0 || len(g.Notes) != 0 {
		t.Errorf("%+v", g)
	}
}

func TestStaleGRPCCode(t *testing.T) {
	const name = "proto/helloworld.proto"
	for _, tt := range []struct{ name, old, now, want string }{
		{"comment", "// Call greets by name.", "// Call says hello.", ""},
		{"formatting", "string name = 1;", "string   name=1 ;", ""},
		{"another language's option", "package helloworld;", "package helloworld;\noption java_package = \"x\";", ""},
		{"field added", "string msg = 1;\n}", "string msg = 1;\n  string more = 2;\n}",
			"proto/helloworld.pb.go is older than proto/helloworld.proto: message Response changed"},
		{"method added", "rpc Call(Request) returns (Response);", "rpc Call(Request) returns (Response);\n  rpc Bye(Request) returns (Response);",
			"proto/helloworld.pb.go is older than proto/helloworld.proto: service Helloworld changed\n" +
				"proto/helloworld_grpc.pb.go is older than proto/helloworld.proto: /helloworld.Helloworld/Bye is new"},
		{"response streams", "rpc Hello(Request) returns (Response);", "rpc Hello(Request) returns (stream Response);",
			"proto/helloworld.pb.go is older than proto/helloworld.proto: service Greeter changed\n" +
				"proto/helloworld_grpc.pb.go is older than proto/helloworld.proto: /helloworld.Greeter/Hello streams otherwise"},
		{"request of another type", "rpc Hello(Request)", "rpc Hello(WatchRequest)",
			"proto/helloworld.pb.go is older than proto/helloworld.proto: service Greeter changed\n" +
				"proto/helloworld_grpc.pb.go is older than proto/helloworld.proto: /helloworld.Greeter/Hello takes WatchRequest, not Request"},
		{"service renamed", "service Greeter {", "service Welcomer {",
			"proto/helloworld.pb.go is older than proto/helloworld.proto: service Greeter is gone, service Welcomer is new\n" +
				"proto/helloworld_grpc.pb.go is older than proto/helloworld.proto: /helloworld.Greeter/Hello is gone, /helloworld.Greeter/Watch is gone, /helloworld.Welcomer/Hello is new and 1 more"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			r := mustCompile(t, edit(t, os.DirFS(helloApp), name, tt.old, tt.now), ".")
			if got := stales(r.Stale); got != tt.want {
				t.Errorf("got\n%s\nwant\n%s", got, tt.want)
			}
		})
	}
}

func TestRegeneratedCodeIsFresh(t *testing.T) {
	fsys := edit(t, os.DirFS(helloApp), "proto/helloworld.proto", "string msg = 1;\n}", "string msg = 1;\n  string more = 2;\n}")
	r := mustCompile(t, fsys, ".")
	g := plan(t, r)
	if len(g.Runs) != 1 || g.Runs[0].Plugin != (Plugin{genGo, "google.golang.org/protobuf/cmd/protoc-gen-go", "v1.36.12"}) {
		t.Fatalf("%+v", g.Runs)
	}
	if got := generate(t, r, g, fsys); !slices.Equal(got, []string{"proto/helloworld.pb.go"}) {
		t.Fatalf("wrote %v", got)
	}
	if r = mustCompile(t, fsys, "."); len(r.Stale) != 0 {
		t.Errorf("stale after generating:\n%s", stales(r.Stale))
	}
	if !bytes.Contains(fsys["proto/helloworld.pb.go"].Data, []byte("package helloworld\n")) {
		t.Error("the package was renamed")
	}
}

func TestMissingCode(t *testing.T) {
	fsys := edit(t, os.DirFS(helloApp), "", "", "")
	delete(fsys, "proto/helloworld.pb.go")
	delete(fsys, "proto/helloworld_grpc.pb.go")
	r := mustCompile(t, fsys, ".")
	want := "proto/helloworld.pb.go is missing: made from proto/helloworld.proto\nproto/helloworld_grpc.pb.go is missing: made from proto/helloworld.proto"
	if got := stales(r.Stale); got != want {
		t.Errorf("got\n%s\nwant\n%s", got, want)
	}
	g := plan(t, r)
	if len(g.Runs) != 2 || g.Runs[1].Plugin != (Plugin{genGRPC, grpcPlugin, "v1.6.2"}) || g.Runs[1].Out != "." {
		t.Errorf("%+v", g.Runs)
	}
	if got := generate(t, r, g, fsys); !slices.Equal(got, []string{"proto/helloworld.pb.go", "proto/helloworld_grpc.pb.go"}) {
		t.Errorf("wrote %v", got)
	}
	if r = mustCompile(t, fsys, "."); len(r.Stale) != 0 {
		t.Errorf("stale after generating:\n%s", stales(r.Stale))
	}
}

// The shop is shaped like a real set: five packages, a gateway's annotations,
// nested types, maps, oneofs, proto2 and an edition, Connect, no generated code.
func shop(t testing.TB) fstest.MapFS {
	t.Helper()
	return edit(t, os.DirFS("testdata/shop"), "", "", "")
}

func TestShopFromProtoAlone(t *testing.T) {
	fsys := shop(t)
	r := mustCompile(t, fsys, ".")
	if len(r.Services) != 5 || len(r.Notes) != 0 {
		t.Errorf("%d services, notes %q", len(r.Services), r.Notes)
	}
	g := plan(t, r)
	written := generate(t, r, g, fsys)
	want := []string{
		"gen/shop/cart/v1/cart.pb.go", "gen/shop/cart/v1/cartv1connect/cart.connect.go",
		"gen/shop/catalog/v1/catalog.pb.go", "gen/shop/catalog/v1/catalogv1connect/catalog.connect.go",
		"gen/shop/common/v1/money.pb.go", "gen/shop/common/v1/page.pb.go",
		"gen/shop/orders/v1/orders.pb.go", "gen/shop/orders/v1/ordersv1connect/orders.connect.go",
	}
	if !slices.Equal(written, want) {
		t.Errorf("wrote\n%s\nwant\n%s", strings.Join(written, "\n"), strings.Join(want, "\n"))
	}
	r = mustCompile(t, fsys, ".")
	if len(r.Stale) != 0 {
		t.Errorf("stale after generating:\n%s", stales(r.Stale))
	}
	for _, tt := range []struct{ file, old, now, want string }{
		{"proto/shop/catalog/v1/catalog.proto", "rpc GetProduct(", "rpc FetchProduct(", "gen/shop/catalog/v1/catalogv1connect/catalog.connect.go"},
		{"proto/shop/catalog/v1/catalog.proto", "returns (stream Product)", "returns (Product)", "streams otherwise"},
		{"proto/shop/orders/v1/orders.proto", "rpc PlaceOrder(PlaceOrderRequest)", "rpc PlaceOrder(GetOrderRequest)", "takes GetOrderRequest, not PlaceOrderRequest"},
		{"proto/shop/common/v1/money.proto", "int64 units = 2;", "sint64 units = 2;", "gen/shop/common/v1/money.pb.go is older than proto/shop/common/v1/money.proto: message Money changed"},
		{"proto/shop/catalog/v1/catalog.proto", `get: "/v1/products/{id}"`, `get: "/v2/products/{id}"`, "service CatalogService changed"},
	} {
		r := mustCompile(t, edit(t, fsys, tt.file, tt.old, tt.now), ".")
		if got := stales(r.Stale); !strings.Contains(got, tt.want) {
			t.Errorf("%s → %s:\n got %s\nwant %s", tt.old, tt.now, got, tt.want)
		}
	}
}

func TestShopCompiledByGo(t *testing.T) {
	if testing.Short() {
		t.Skip("builds a Go module")
	}
	fsys := shop(t)
	r := mustCompile(t, fsys, ".")
	generate(t, r, plan(t, r), fsys)
	// Inside this module, so that its go.mod says the versions.
	dir, err := os.MkdirTemp("testdata", "built-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := os.RemoveAll(dir); err != nil {
			t.Error(err)
		}
	})
	var overlay []string
	for p, f := range fsys {
		if !strings.HasSuffix(p, ".go") {
			continue
		}
		dst := filepath.Join(dir, p)
		if err := os.MkdirAll(filepath.Dir(dst), 0o755); err != nil {
			t.Fatal(err)
		}
		self := "github.com/m3o/m3o/buildpacks/protobuf/testdata/" + filepath.Base(dir) + "/"
		src := bytes.ReplaceAll(f.Data, []byte("example.com/shop/"), []byte(self))
		if err := os.WriteFile(dst, src, 0o644); err != nil {
			t.Fatal(err)
		}
		overlay = append(overlay, p)
	}
	if out, err := exec.CommandContext(t.Context(), "go", "vet", "./"+dir+"/cmd/...").CombinedOutput(); err != nil {
		t.Errorf("%v: %v\n%s", overlay, err, out)
	}
}

func TestBufGen(t *testing.T) {
	base := `
-- go.mod --
module example.com/app

require (
	connectrpc.com/connect v1.19.0
	google.golang.org/grpc v1.60.1
	google.golang.org/protobuf v1.35.0
)
-- proto/pet/v1/pet.proto --
syntax = "proto3";
package pet.v1;
GOPKG
message Pet { string name = 1; }
service Pets { rpc Get(Pet) returns (Pet); }
-- main.go --
package main

import (
	pets "IMPORT"
)

var _ = pets.USED{}
-- buf.yaml --
version: v2
modules: [{path: proto}]
-- buf.gen.yaml --
`
	const inside = `option go_package = "example.com/app/gen/pet/v1;petv1";`
	for _, tt := range []struct {
		name, gopkg, imp, gen string
		want                  string // name@version out parameter → files
		notes                 string
	}{
		{"v2, local names", inside, "example.com/app/gen/pet/v1", `version: v2
plugins:
  - local: protoc-gen-go
    out: gen
    opt: paths=source_relative
  - local: [go, tool, protoc-gen-go-grpc]
    out: gen
    opt: [paths=source_relative, require_unimplemented_servers=false]
`, "protoc-gen-go@v1.35.0 gen paths=source_relative → gen/pet/v1/pet.pb.go\n" +
			"protoc-gen-go-grpc@v1.3.0 gen paths=source_relative,require_unimplemented_servers=false → gen/pet/v1/pet_grpc.pb.go", ""},
		{"v1, hosted, module=", inside, "example.com/app/gen/pet/v1", `version: v1
plugins:
  - plugin: buf.example/protocolbuffers/go:v1.31.0
    out: .
    opt: module=example.com/app
  - plugin: buf.example/bufbuild/es
    out: web
`, "protoc-gen-go@v1.35.0 . module=example.com/app → gen/pet/v1/pet.pb.go",
			"buf.gen.yaml: buf.example/protocolbuffers/go:v1.31.0 is run as protoc-gen-go of the version in go.mod\nbuf.gen.yaml: buf.example/bufbuild/es is not run here: commit what it makes"},
		{"connect", inside, "example.com/app/gen/pet/v1/petv1connect", `version: v2
plugins:
  - {local: protoc-gen-go, out: gen, opt: paths=source_relative}
  - {remote: buf.example/connectrpc/go, out: gen, opt: paths=source_relative}
`, "protoc-gen-go@v1.35.0 gen paths=source_relative → gen/pet/v1/pet.pb.go\n" +
			"protoc-gen-connect-go@v1.19.0 gen paths=source_relative → gen/pet/v1/petv1connect/pet.connect.go", "run as protoc-gen-connect-go"},
		{"managed mode, v2", "", "example.com/app/gen/pet/v1", `version: v2
managed:
  enabled: true
  override:
    - file_option: go_package_prefix
      value: example.com/app/gen
    - {file_option: go_package_prefix, value: other, module: buf.example/googleapis/googleapis}
plugins:
  - {local: protoc-gen-go, out: gen, opt: paths=source_relative}
`, "protoc-gen-go@v1.35.0 gen paths=source_relative,Mpet/v1/pet.proto=example.com/app/gen/pet/v1;petv1 → gen/pet/v1/pet.pb.go", ""},
		{"managed mode, v1", `option go_package = "x/y";`, "example.com/app/gen/pet/v1", `version: v1
managed:
  enabled: true
  go_package_prefix: {default: example.com/app/gen, except: [buf.example/googleapis/googleapis]}
plugins:
  - {name: go, out: gen, opt: paths=source_relative}
`, "protoc-gen-go@v1.35.0 gen paths=source_relative,Mpet/v1/pet.proto=example.com/app/gen/pet/v1;petv1 → gen/pet/v1/pet.pb.go", ""},
		{"managed mode, switched off for the file", inside, "example.com/app/gen/pet/v1", `version: v2
managed:
  enabled: true
  disable: [{file_option: go_package, path: pet/v1}]
  override: [{file_option: go_package_prefix, value: elsewhere/x}]
plugins:
  - {local: protoc-gen-go, out: gen, opt: paths=source_relative}
`, "protoc-gen-go@v1.35.0 gen paths=source_relative → gen/pet/v1/pet.pb.go", ""},
		{"nothing imported", inside, "fmt", "version: v2\nplugins: [{local: protoc-gen-go, out: gen, opt: paths=source_relative}]\n", "", ""},
		{"no Go plugin named", inside, "example.com/app/gen/pet/v1", "version: v2\nplugins: [{local: protoc-gen-es, out: web}]\n",
			"protoc-gen-go@v1.35.0 . module=example.com/app,Mpet/v1/pet.proto=example.com/app/gen/pet/v1;petv1 → gen/pet/v1/pet.pb.go\n" +
				"protoc-gen-go-grpc@v1.3.0 . module=example.com/app,Mpet/v1/pet.proto=example.com/app/gen/pet/v1;petv1 → gen/pet/v1/pet_grpc.pb.go", "protoc-gen-es is not run here"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			used := "Pet"
			if strings.Contains(tt.want, genGRPC) {
				used = "UnimplementedPetsServer"
			}
			fsys := tree(strings.NewReplacer("GOPKG", tt.gopkg, "IMPORT", tt.imp, "USED", used).Replace(base) + tt.gen)
			r := mustCompile(t, fsys, ".")
			g := plan(t, r)
			var got []string
			for _, run := range g.Runs {
				var paths []string
				for _, s := range g.Stale {
					if s.Plugin == run.Plugin.Name {
						paths = append(paths, s.Path)
					}
				}
				got = append(got, fmt.Sprintf("%s@%s %s %s → %s", run.Plugin.Name, run.Plugin.Version, run.Out, run.Parameter, strings.Join(paths, " ")))
			}
			if s := strings.Join(got, "\n"); s != tt.want {
				t.Errorf("got\n%s\nwant\n%s", s, tt.want)
			}
			if notes := strings.Join(g.Notes, "\n"); !strings.Contains(notes, tt.notes) || tt.notes == "" && notes != "" {
				t.Errorf("notes %s", notes)
			}
			// What the plan promises is what the plugin does.
			for _, p := range generate(t, r, g, fsys) {
				if !slices.ContainsFunc(g.Stale, func(s Stale) bool { return s.Path == p }) {
					t.Errorf("the plugin wrote %s", p)
				}
			}
			if r := mustCompile(t, fsys, "."); len(r.Stale) != 0 {
				t.Errorf("stale after generating:\n%s", stales(r.Stale))
			}
		})
	}
}

// A module may require grpc-go and yet serve by Connect alone, as this one does.
func TestGRPCCodeIsMadeWhereItIsUsed(t *testing.T) {
	for use, want := range map[string]bool{
		"var _ petv1.PetsServer":                         true,
		"func f() { petv1.NewPetsClient(nil) }":          true,
		"func f() { petv1.RegisterPetsServer() }":        true,
		"type s struct{ petv1.UnimplementedPetsServer }": true,
		"var _ petv1.Pets_WatchServer":                   true,
		"var _ petv1.Pet":                                false,
		"var _ petv1connect.PetsClient; var _ petv1.Pet": false,
		"func f() { petv1connect.NewPetsClient() }":      false,
	} {
		fsys := tree("-- go.mod --\nmodule example.com/app\nrequire google.golang.org/grpc v1.85.0\nrequire google.golang.org/protobuf v1.36.12\n" +
			"-- pet.proto --\nsyntax = \"proto3\";\noption go_package = \"example.com/app/pet/v1;petv1\";\nmessage Pet {}\nservice Pets { rpc Get(Pet) returns (Pet); }\n" +
			"-- main.go --\npackage main\nimport (\n\t\"example.com/app/pet/v1\"\n\t\"example.com/app/pet/v1/petv1connect\"\n)\n" + use + "\n")
		r := mustCompile(t, fsys, ".")
		if got := strings.Contains(stales(r.Stale), "pet_grpc.pb.go is missing"); got != want {
			t.Errorf("%s: made %v, want %v\n%s", use, got, want, stales(r.Stale))
		}
	}
}

func TestPlacesWithoutBufGen(t *testing.T) {
	for _, tt := range []struct{ name, gopkg, proto, imp, want string }{
		{"in the module", `option go_package = "example.com/app/pb";`, "proto/x.proto", "example.com/app/pb", "pb/x.pb.go"},
		{"relative", `option go_package = "./pb";`, "proto/x.proto", "example.com/app/pb", "pb/x.pb.go"},
		{"relative without a dot", `option go_package = "gen/pb";`, "proto/x.proto", "example.com/app/gen/pb", "gen/pb/x.pb.go"},
		{"none: beside the .proto", ``, "proto/x.proto", "example.com/app/proto", "proto/x.pb.go"},
		{"another module's", `option go_package = "example.org/other/pb";`, "proto/x.proto", "example.org/other/pb", ""},
		{"with a package name", `option go_package = "example.com/app/pb/v1;petv1";`, "proto/x.proto", "example.com/app/pb/v1", "pb/v1/x.pb.go"},
		{"not imported", `option go_package = "example.com/app/pb";`, "proto/x.proto", "fmt", ""},
	} {
		t.Run(tt.name, func(t *testing.T) {
			fsys := tree("-- go.mod --\nmodule example.com/app\nrequire google.golang.org/protobuf v1.36.12\n-- " + tt.proto + " --\nsyntax = \"proto3\";\n" + tt.gopkg +
				"\nmessage X {}\n-- main.go --\npackage main\nimport _ \"" + tt.imp + "\"\n")
			r := mustCompile(t, fsys, ".")
			g := plan(t, r)
			if got := strings.Join(generate(t, r, g, fsys), " "); got != tt.want {
				t.Errorf("wrote %q, want %q", got, tt.want)
			}
			if r = mustCompile(t, fsys, "."); len(r.Stale) != 0 {
				t.Errorf("stale after generating:\n%s", stales(r.Stale))
			}
		})
	}
}

func TestGoPlanRefuses(t *testing.T) {
	const app = "-- proto/x.proto --\nsyntax = \"proto3\";\npackage x;\noption go_package = \"example.com/app/pb\";\nmessage X {}\nservice S { rpc M(X) returns (X); }\n-- main.go --\npackage main\nimport \"example.com/app/pb\"\nfunc main() { pb.NewSClient(nil) }\n-- go.mod --\nmodule example.com/app\n"
	for _, tt := range []struct {
		name, tree string
		words      []string
	}{
		{"no protobuf in go.mod", app, []string{"pb/x.pb.go has to be made by protoc-gen-go", "go get google.golang.org/protobuf"}},
		{"grpc too old", app + "require google.golang.org/protobuf v1.30.0\nrequire google.golang.org/grpc v1.20.0\n", []string{"google.golang.org/grpc v1.20.0", "v1.32.0 and later"}},
		{"copy in another folder", app + "require google.golang.org/protobuf v1.30.0\n-- pb/x.pb.go --\n// Code generated by protoc-gen-go. DO NOT EDIT.\n// source: x.proto\n\npackage pb\n\nconst file_x_proto_rawDesc = \"\" +\n\t\"\\n\\ax.proto\"\n-- old/x.pb.go --\n// Code generated by protoc-gen-go. DO NOT EDIT.\n// source: x.proto\n\npackage old\n\nconst file_x_proto_rawDesc = \"\" +\n\t\"\\n\\ax.proto\"\n", []string{"old/x.pb.go cannot be made again", "belongs into pb"}},
		{"name that a parameter cannot hold", strings.ReplaceAll(app, "proto/x.proto", "proto/x,y.proto") + "require google.golang.org/protobuf v1.30.0\n", []string{"proto/x,y.proto", "rename"}},
		{"package without a dot or slash", "-- x.proto --\nsyntax = \"proto3\";\nmessage X {}\n-- main.go --\npackage main\nimport _ \"app\"\n-- go.mod --\nmodule app\nrequire google.golang.org/protobuf v1.30.0\n", []string{"go_package", "x.proto"}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			fsys := tree(tt.tree)
			r := mustCompile(t, fsys, ".")
			_, err := GoPlan(r)
			wantInvalid(t, err, tt.words...)
		})
	}
	for _, mod := range []string{"", "require x v1\n", "module \x00", "module example.com/app\n)\n"} {
		fsys := tree(app)
		fsys["go.mod"].Data = []byte(mod)
		_, err := GoPlan(mustCompile(t, fsys, "."))
		wantInvalid(t, err)
	}
}

func TestMalformedBufGen(t *testing.T) {
	for gen, words := range map[string][]string{
		"plugins: 5\n": {"buf.gen.yaml:1"},
		"version: v2\nplugins: [{local: protoc-gen-go}]\n":                             {"protoc-gen-go has no out"},
		"version: v2\nplugins: [{local: protoc-gen-go, out: ../x}]\n":                  {`"../x" leads out`},
		"version: v2\nplugins: [{local: {a: b}, out: x}]\n":                            {"buf.gen.yaml:2: local is neither"},
		"version: v2\nplugins: [{local: protoc-gen-go, out: x, opt: {a: b}}]\n":        {"opt is neither"},
		"version: v2\nplugins: [{local: protoc-gen-go, out: x, opt: paths=sideways}]":  {"sideways"},
		"version: v2\nmanaged: {enabled: true, override: [5]}\n":                       {"override is not a list"},
		"version: v2\nplugins: [{local: protoc-gen-go, out: x, opt: [module=a, 'b']}]": {"module"},
	} {
		_, err := compileTree(t, tree("-- go.mod --\nmodule example.com/a\n-- x.proto --\nsyntax = \"proto3\";\noption go_package = \"example.com/a/x\";\n-- buf.gen.yaml --\n"+gen), ".")
		if strings.Contains(gen, "module=a") {
			if err != nil {
				t.Errorf("%q: %v", gen, err)
			}
			continue
		}
		wantInvalid(t, err, words...)
	}
}

func TestServiceCodeLeftOver(t *testing.T) {
	fsys := edit(t, os.DirFS(helloApp), "", "", "")
	src := string(fsys["proto/helloworld.proto"].Data)
	i, j := strings.Index(src, "// Helloworld is"), strings.Index(src, "message Request")
	fsys["proto/helloworld.proto"] = &fstest.MapFile{Data: []byte(src[:i] + src[j:])}
	g := plan(t, mustCompile(t, fsys, "."))
	if !slices.Equal(g.Remove, []string{"proto/helloworld_grpc.pb.go"}) {
		t.Errorf("%+v", g)
	}
	if got := stales(g.Stale); !strings.Contains(got, "proto/helloworld_grpc.pb.go is left over") {
		t.Error(got)
	}
}

// Other generators' messages are never overwritten.
func TestForeignGenerator(t *testing.T) {
	fsys := tree(`
-- go.mod --
module example.com/app
require google.golang.org/protobuf v1.36.12
-- pb/x.proto --
syntax = "proto3";
option go_package = "example.com/app/pb";
message X {}
-- pb/x.pb.go --
// Code generated by protoc-gen-gogo. DO NOT EDIT.
// source: pb/x.proto

package pb
-- main.go --
package main
import _ "example.com/app/pb"
`)
	g := plan(t, mustCompile(t, fsys, "."))
	if len(g.Runs) != 0 || len(g.Notes) != 1 || !strings.Contains(g.Notes[0], "protoc-gen-gogo") {
		t.Errorf("%+v", g)
	}
}

func TestRawDescriptorOfEveryAge(t *testing.T) {
	want := &descriptorpb.FileDescriptorProto{Name: proto.String("x.proto"), Package: proto.String("p"), MessageType: []*descriptorpb.DescriptorProto{{Name: proto.String("M")}}}
	raw, err := proto.Marshal(want)
	if err != nil {
		t.Fatal(err)
	}
	var zipped bytes.Buffer
	zw := gzip.NewWriter(&zipped)
	if _, err := zw.Write(raw); err != nil {
		t.Fatal(err)
	}
	if err := zw.Close(); err != nil {
		t.Fatal(err)
	}
	hex := func(b []byte) string {
		var s strings.Builder
		for i, c := range b {
			if i%16 == 0 {
				s.WriteString("\n\t")
			}
			fmt.Fprintf(&s, "0x%02x, ", c)
		}
		return s.String() + "\n"
	}
	var concat strings.Builder
	for _, l := range bytes.SplitAfter(raw, []byte("\n")) {
		fmt.Fprintf(&concat, " +\n\t%q", l)
	}
	const before, after = "package p\n\nimport \"fmt\"\n\ntype M struct{}\n\n", "\n\nfunc init() { fmt.Println(M{}) }\n"
	for name, decl := range map[string]string{
		"v1.36.5": "const file_x_proto_rawDesc = \"\"" + concat.String(),
		"v1.36.3": "var file_x_proto_rawDesc = string([]byte{" + hex(raw) + "})",
		"v1.20":   "var file_x_proto_rawDesc = []byte{" + hex(raw) + "}",
		"v1.3":    "var fileDescriptor_0123456789abcdef = []byte{\n\t// 99 bytes of a gzipped FileDescriptorProto" + hex(zipped.Bytes()) + "}",
		"v1.0":    "var fileDescriptor0 = []byte{" + hex(zipped.Bytes()) + "}",
	} {
		got, err := rawDescriptor([]byte(before + decl + after))
		if err != nil {
			t.Errorf("%s: %v", name, err)
		} else if !proto.Equal(got, want) {
			t.Errorf("%s: got %v", name, got)
		}
	}
}

func FuzzRawDescriptor(f *testing.F) {
	src, err := os.ReadFile(helloApp + "/proto/helloworld.pb.go")
	if err != nil {
		f.Fatal(err)
	}
	grpc, err := os.ReadFile(helloApp + "/proto/helloworld_grpc.pb.go")
	if err != nil {
		f.Fatal(err)
	}
	f.Add(src)
	f.Add(grpc)
	f.Add([]byte("const file_x_rawDesc = \"\" + \"\\n\\x01x\""))
	f.Add([]byte("var fileDescriptor_1 = []byte{0x1f, 0x8b, 1, 2}"))
	f.Add([]byte("var file_x_rawDesc = string([]byte{256})"))
	f.Add([]byte("var file_x_rawDesc = " + strings.Repeat("(", 100000)))
	f.Add([]byte("package p\nvar X = grpc.ServiceDesc{Methods: []grpc.MethodDesc{{}, 5}}\nconst AProcedure = \"/a/b\"\nvar y = connect.NewClient[A, B](c, u+AProcedure)"))
	f.Fuzz(func(t *testing.T, src []byte) {
		if fd, err := rawDescriptor(src); err == nil && fd == nil {
			t.Error("neither a descriptor nor an error")
		}
		for _, p := range []string{genGRPC, genConnect} {
			rpcs, err := rpcsOf(src, p)
			if err == nil {
				compareRPCs(rpcs, map[string]rpc{})
			}
		}
		sourceOf(src)
	})
}

func TestRequestHoldsWhatThePluginNeeds(t *testing.T) {
	r := mustCompile(t, shop(t), ".")
	req := Request(r, Run{Parameter: "x=y", Files: []string{"shop/cart/v1/cart.proto"}})
	var got []string
	for _, f := range req.ProtoFile {
		got = append(got, f.GetName())
	}
	want := []string{"shop/common/v1/money.proto", "shop/cart/v1/cart.proto"}
	if !slices.Equal(got, want) || req.GetParameter() != "x=y" || len(req.SourceFileDescriptors) != 1 {
		t.Errorf("got %v", got)
	}
	if len(req.ProtoFile[1].GetSourceCodeInfo().GetLocation()) == 0 {
		t.Error("the comments are lost")
	}
}
