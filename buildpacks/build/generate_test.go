package build

import (
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/m3o/m3o"
	"github.com/m3o/m3o/buildpacks"
	"github.com/m3o/m3o/buildpacks/golang"
	"github.com/m3o/m3o/buildpacks/protobuf"
	"github.com/m3o/m3o/buildpacks/source"
	"github.com/m3o/m3o/internal/need"
	"google.golang.org/protobuf/proto"
)

// generation is what a tree needs, as the daemon finds out.
func generation(t testing.TB, src m3o.Source) Generation {
	t.Helper()
	tree, err := source.Open(t.Context(), src, nil)
	if err != nil {
		t.Fatal(err)
	}
	defer tree.Close()
	files, err := buildpacks.ReadFiles(tree)
	if err != nil {
		t.Fatal(err)
	}
	plan, err := golang.Plan(t.Context(), tree, files)
	if err != nil {
		t.Fatal(err)
	}
	s, err := protobuf.FindInWorkspace(tree, plan.Dir, path.Dir(plan.Go.Work), plan.Go.Modules)
	if err != nil {
		t.Fatal(err)
	}
	r, err := protobuf.Compile(t.Context(), s)
	if err != nil {
		t.Fatal(err)
	}
	g, err := protobuf.GoPlan(r)
	if err != nil {
		t.Fatal(err)
	}
	out := Generation{Remove: g.Remove}
	for _, run := range g.Runs {
		b, err := proto.MarshalOptions{Deterministic: true}.Marshal(protobuf.Request(r, run))
		if err != nil {
			t.Fatal(err)
		}
		out.Runs = append(out.Runs, PluginRun{Plugin: Plugin(run.Plugin), Out: run.Out, Request: b})
	}
	return out
}

// cached tells of each step whether BuildKit had its result.
func cached(res Result) map[string]bool {
	m := map[string]bool{}
	for _, s := range res.Steps {
		m[s.Name] = s.Cached
	}
	return m
}

func TestGeneratedCodeIsMadeOnce(t *testing.T) {
	need.Registry(t)
	b := builder(t)
	r := newRepo(t)
	if err := os.CopyFS(r.work, os.DirFS(filepath.Join(need.RepoRoot(t), "testdata/apps/hello-grpc"))); err != nil {
		t.Fatal(err)
	}
	for _, f := range []string{"proto/helloworld.pb.go", "proto/helloworld_grpc.pb.go"} {
		if err := os.Remove(filepath.Join(r.work, f)); err != nil {
			t.Fatal(err)
		}
	}
	src := r.commit(nil)
	src.App = "generated"
	run := func(src m3o.Source) (Result, string) {
		t.Helper()
		g := generation(t, src)
		if len(g.Runs) != 2 {
			t.Fatalf("%d runs are planned, want 2", len(g.Runs))
		}
		res, out, err := build(t.Context(), t, b, src, func(r *Request) { r.Generate = g })
		ok(t, out, err)
		return res, out
	}
	one, out := run(src)
	// Another test may have had a plugin of this version built: said is what was built now.
	plugins := 0
	for _, s := range one.Steps {
		name, ok := strings.CutPrefix(s.Name, stepPlugin)
		if !ok {
			continue
		}
		plugins++
		want := "Building " + strings.Replace(name, "@", " ", 1) + ", once for all apps"
		if strings.Contains(out, want) == s.Cached {
			t.Errorf("step %s cached: %t, but the output is\n%s", s.Name, s.Cached, out)
		}
	}
	if plugins != 2 {
		t.Errorf("%d plugins are built, want 2: %+v", plugins, one.Steps)
	}
	// A change of Go code.
	src = r.commit(map[string]string{"more.go": "package main\n\nfunc init() { println(2) }\n"})
	src.App = "generated"
	two, out := run(src)
	if c := cached(two); !c[stepGenerate] || c[stepBuild] || one.Image == two.Image {
		t.Errorf("a change of Go code: steps %+v\n%s", two.Steps, out)
	}
	// A change of the .proto, in another app: the plugins are there.
	p, err := os.ReadFile(filepath.Join(r.work, "proto/helloworld.proto"))
	if err != nil {
		t.Fatal(err)
	}
	src = r.commit(map[string]string{"proto/helloworld.proto": string(p) + "\nmessage More { string x = 1; }\n",
		"more.go": "package main\n\nimport pb \"example.com/hello-grpc/proto\"\n\nvar _ = &pb.More{X: \"1\"}\n"})
	src.App = "another"
	three, out := run(src)
	if c := cached(three); c[stepGenerate] || !c[stepPlugin+"protoc-gen-go@"+protoVersion(three)] || strings.Contains(out, "once for all apps") {
		t.Errorf("a change of the .proto: steps %+v\n%s", three.Steps, out)
	}
}

// All modules of a workspace are built at once; code goes into two of them.
func TestWorkspaceWithoutGeneratedCode(t *testing.T) {
	need.Registry(t)
	b := builder(t)
	r := newRepo(t)
	if err := os.CopyFS(r.work, os.DirFS(filepath.Join(need.RepoRoot(t), "testdata/apps/proto-workspace"))); err != nil {
		t.Fatal(err)
	}
	if err := os.Remove(filepath.Join(r.work, "m3o.yaml")); err != nil { // it names one module
		t.Fatal(err)
	}
	src := r.commit(nil)
	src.App = "whole"
	g := generation(t, src)
	if len(g.Runs) != 4 {
		t.Fatalf("%d runs are planned, want 4", len(g.Runs))
	}
	res, out, err := build(t.Context(), t, b, src, func(r *Request) { r.Generate = g })
	ok(t, out, err)
	if res.Image == "" || cached(res)[stepBuild] {
		t.Errorf("result %+v\n%s", res, out)
	}
}

func protoVersion(res Result) string {
	i := slices.IndexFunc(res.Steps, func(s Step) bool { return strings.HasPrefix(s.Name, stepPlugin+"protoc-gen-go@") })
	if i < 0 {
		return ""
	}
	return strings.TrimPrefix(res.Steps[i].Name, stepPlugin+"protoc-gen-go@")
}

func TestPluginThatFailsIsNamed(t *testing.T) {
	need.Registry(t)
	b := builder(t)
	src := repo(t, hello)
	plugin := Plugin{Name: "protoc-gen-go", Package: "google.golang.org/protobuf/cmd/protoc-gen-go", Version: "v1.36.12"}
	for name, c := range map[string]struct {
		run       PluginRun
		msg, hint string
	}{
		"no request": {PluginRun{Plugin: plugin, Out: ".", Request: []byte("\xff\xff")}, "protoc-gen-go v1.36.12 failed: protoc-gen-go: ", "its output is above"},
		"no such version": {PluginRun{Plugin: Plugin{plugin.Name, plugin.Package, "v1.999.0"}, Out: "."},
			"google.golang.org/protobuf/cmd/protoc-gen-go@v1.999.0: ", "module proxy does not have that version"},
	} {
		t.Run(name, func(t *testing.T) {
			_, out, err := build(t.Context(), t, b, src, func(r *Request) { r.Generate = Generation{Runs: []PluginRun{c.run}} })
			if m3o.KindOf(err) != m3o.Invalid || !strings.Contains(err.Error(), c.msg) || !strings.Contains(m3o.HintOf(err), c.hint) {
				t.Errorf("Build = %v (hint %q), want %s (hint …%s…)\n%s", err, m3o.HintOf(err), c.msg, c.hint, out)
			}
		})
	}
	for _, r := range []PluginRun{
		{Plugin: Plugin{"sh", "example.com/sh", "v1.0.0"}, Out: "."},
		{Plugin: Plugin{plugin.Name, plugin.Package, "latest"}, Out: "."},
		{Plugin: Plugin{plugin.Name, "../x/protoc-gen-go", "v1.0.0"}, Out: "."},
		{Plugin: plugin, Out: "../x"},
	} {
		if _, _, err := build(t.Context(), t, b, src, func(q *Request) { q.Generate = Generation{Runs: []PluginRun{r}} }); err == nil {
			t.Errorf("%+v was built", r)
		}
	}
}
