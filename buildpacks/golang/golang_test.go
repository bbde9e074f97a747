package golang

import (
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"testing/fstest"

	"github.com/google/go-cmp/cmp"
	"github.com/m3o/m3o"
	"github.com/m3o/m3o/buildpacks"
	"github.com/m3o/m3o/internal/need"
)

const (
	mod      = "module example.com/hello\n\ngo 1.26\n"
	mainFile = "package main\n\nfunc main() {}\n"
)

func tree(files map[string]string) fs.FS {
	m := fstest.MapFS{}
	for name, text := range files {
		m[name] = &fstest.MapFile{Data: []byte(text), Mode: 0o644}
	}
	return m
}

// with is the module line and more files.
func with(more map[string]string) fs.FS {
	all := map[string]string{"go.mod": mod}
	maps.Copy(all, more)
	return tree(all)
}

// plan does what the daemon does with a tree.
func plan(t *testing.T, tree fs.FS) (*buildpacks.Plan, error) {
	t.Helper()
	files, err := buildpacks.ReadFiles(tree)
	if err != nil {
		return nil, err
	}
	p, err := Plan(t.Context(), tree, files)
	if err == nil {
		err = files.Apply(p)
		p.Files = buildpacks.Files{}
	}
	return p, err
}

func web(cmd ...string) map[string]m3o.Process {
	return map[string]m3o.Process{"web": {Command: cmd, Replicas: 1, Port: 8080}}
}

func TestPlan(t *testing.T) {
	hello := buildpacks.Target{Name: "hello", Package: ".", Path: "/app/hello"}
	for name, c := range map[string]struct {
		tree fs.FS
		want buildpacks.Plan
	}{
		"main in the root": {with(map[string]string{"main.go": mainFile}),
			buildpacks.Plan{Targets: []buildpacks.Target{hello}, Processes: web("/app/hello")}},
		"the only one below cmd": {with(map[string]string{"hello.go": "package hello\n", "cmd/api/main.go": mainFile}),
			buildpacks.Plan{Targets: []buildpacks.Target{{Name: "api", Package: "./cmd/api", Path: "/app/api"}}, Processes: web("/app/api")}},
		"in any folder of the root": {with(map[string]string{"server/main.go": mainFile, "vendor/x/main.go": mainFile, "_old/main.go": mainFile}),
			buildpacks.Plan{Targets: []buildpacks.Target{{Name: "server", Package: "./server", Path: "/app/server"}}, Processes: web("/app/server")}},
		"cmd/web among several": {with(map[string]string{"cmd/web/main.go": mainFile, "cmd/tool/main.go": mainFile}),
			buildpacks.Plan{Targets: []buildpacks.Target{{Name: "web", Package: "./cmd/web", Path: "/app/web"}}, Processes: web("/app/web"),
				Notes: []string{"Running ./cmd/web as web; a Procfile would run ./cmd/tool too"}}},
		"cmd/NAME/server among several": {with(map[string]string{"cmd/hello/server/main.go": mainFile, "cmd/hello/client/main.go": mainFile}),
			buildpacks.Plan{Targets: []buildpacks.Target{{Name: "server", Package: "./cmd/hello/server", Path: "/app/server"}}, Processes: web("/app/server"),
				Notes: []string{"Running ./cmd/hello/server as web; a Procfile would run ./cmd/hello/client too"}}},
		"Procfile": {with(map[string]string{"main.go": mainFile, "cmd/w/main.go": mainFile, "cmd/unused/main.go": mainFile,
			"Procfile": "web: bin/hello -port $PORT\nworker: w --all\nrelease: ./hello migrate\n"}),
			buildpacks.Plan{Targets: []buildpacks.Target{hello, {Name: "w", Package: "./cmd/w", Path: "/app/w"}},
				Processes: map[string]m3o.Process{"web": {Command: []string{"/app/hello", "-port", "8080"}, Replicas: 1, Port: 8080}, "worker": {Command: []string{"/app/w", "--all"}, Replicas: 1}},
				Release:   []string{"/app/hello", "migrate"}}},
		"worker only": {with(map[string]string{"main.go": mainFile, "Procfile": "worker: hello"}),
			buildpacks.Plan{Targets: []buildpacks.Target{hello}, Processes: map[string]m3o.Process{"worker": {Command: []string{"/app/hello"}, Replicas: 1}},
				Notes: []string{"The Procfile has no web process: the app will answer no requests"}}},
		"m3o.yaml": {tree(map[string]string{"services/api/go.mod": mod, "services/api/srv/x/main.go": mainFile, "services/api/cmd/a/main.go": mainFile, "go.work": "go 1.26\n",
			"m3o.yaml": "build:\n  dir: services/api\n  main: srv/x\nhealth:\n  http: /ok\n"}),
			buildpacks.Plan{Dir: "services/api", Targets: []buildpacks.Target{{Name: "x", Package: "./srv/x", Path: "/app/x"}}, Processes: web("/app/x"),
				Health: m3o.Health{Kind: "http", Path: "/ok"}, Notes: []string{"go.work does not use services/api, which is built by itself"}}},
		"workspace": {tree(map[string]string{"go.work": "go 1.27\nuse (\n./api\n./lib\n./jobs\n)\n", "api/go.mod": "module example.com/api\n", "api/cmd/server/main.go": mainFile,
			"lib/go.mod": "module example.com/lib\n", "lib/lib.go": "package lib\n", "jobs/go.mod": "module example.com/jobs/v2\ngo 1.26\n", "jobs/main.go": mainFile, "Procfile": "web: server\nworker: jobs\n"}),
			buildpacks.Plan{Toolchain: "go1.27", Targets: []buildpacks.Target{{Name: "server", Package: "./api/cmd/server", Path: "/app/server"}, {Name: "jobs", Package: "./jobs", Path: "/app/jobs"}},
				Processes: map[string]m3o.Process{"web": {Command: []string{"/app/server"}, Replicas: 1, Port: 8080}, "worker": {Command: []string{"/app/jobs"}, Replicas: 1}},
				Go:        buildpacks.Go{Work: "go.work", Modules: []string{"api", "lib", "jobs"}}}},
		"module of a workspace": {tree(map[string]string{"go.work": "go 1.26\nuse ./api\nuse ./lib\n", "api/go.mod": mod, "api/main.go": mainFile, "lib/go.mod": "module example.com/lib\n", "m3o.yaml": "build: {dir: api}"}),
			buildpacks.Plan{Dir: "api", Targets: []buildpacks.Target{hello}, Processes: web("/app/hello"), Go: buildpacks.Go{Work: "go.work", Modules: []string{"api", "lib"}}}},
		"web and worker by name": {with(map[string]string{"cmd/web/main.go": mainFile, "cmd/worker/main.go": mainFile}),
			buildpacks.Plan{Targets: []buildpacks.Target{{Name: "web", Package: "./cmd/web", Path: "/app/web"}, {Name: "worker", Package: "./cmd/worker", Path: "/app/worker"}},
				Processes: map[string]m3o.Process{"web": {Command: []string{"/app/web"}, Replicas: 1, Port: 8080}, "worker": {Command: []string{"/app/worker"}, Replicas: 1}},
				Notes:     []string{"Running ./cmd/worker as worker"}}},
		"what m3o.yaml says of Go": {with(map[string]string{"main.go": "//go:build special\n\npackage main\n\nvar (\n\tversion = \"dev\"\n\tCommit string\n\tdate = now()\n)\n", "cmd/m/main.go": mainFile,
			"m3o.yaml": "build:\n  main: .\n  binaries: [cmd/m]\n  tags: [special]\n  ldflags: -X main.x=y\n  test: true\n  files: [static]\n  private: [example.com/*]\n  secrets: [NETRC]\n"}),
			buildpacks.Plan{Targets: []buildpacks.Target{hello, {Name: "m", Package: "./cmd/m", Path: "/app/m"}}, Processes: web("/app/hello"), Copy: []string{"static"},
				Private: []string{"example.com/*"}, Secrets: []string{"NETRC"},
				Go: buildpacks.Go{Tags: []string{"special"}, LDFlags: "-X main.version=$VERSION -X main.Commit=$COMMIT -X main.x=y", Test: true}}},
		"heroku directives": {tree(map[string]string{"go.mod": mod + "// +heroku install ./tools/... \n// +heroku goVersion go1.26.3\n", "tools/a/b/main.go": mainFile}),
			buildpacks.Plan{Toolchain: "go1.26.3", Targets: []buildpacks.Target{{Name: "b", Package: "./tools/a/b", Path: "/app/b"}}, Processes: web("/app/b")}},
		"major version, toolchain, vendor": {tree(map[string]string{"go.mod": "module example.com/hello/v2\ngo 1.25\ntoolchain go1.26.2\n", "main.go": mainFile, "vendor/modules.txt": ""}),
			buildpacks.Plan{Toolchain: "go1.26.2", Vendor: true, Targets: []buildpacks.Target{hello}, Processes: web("/app/hello")}},
		"build constraints": {with(map[string]string{"main.go": mainFile, "cmd/win/main.go": "//go:build windows\n\n" + mainFile, "cmd/tests/x_test.go": mainFile}),
			buildpacks.Plan{Targets: []buildpacks.Target{hello}, Processes: web("/app/hello")}},
		"cgo with another file in its place": {with(map[string]string{"main.go": mainFile, "c.go": "package main\n\nimport \"C\"\n", "n.go": "//go:build !cgo\n\npackage main\n"}),
			buildpacks.Plan{Targets: []buildpacks.Target{hello}, Processes: web("/app/hello")}},
		"replaced by a folder of the tree": {tree(map[string]string{"go.mod": mod + "replace example.com/x => ./x\n", "x/go.mod": "module example.com/x\n", "main.go": mainFile}),
			buildpacks.Plan{Targets: []buildpacks.Target{hello}, Processes: web("/app/hello")}},
		"a syntax error is left to the compiler": {with(map[string]string{"main.go": "package main\n\nimport (\n\nfunc main() {}\n"}),
			buildpacks.Plan{Targets: []buildpacks.Target{hello}, Processes: web("/app/hello")}},
	} {
		want := c.want
		want.Builder = "go"
		if want.Dir == "" {
			want.Dir = "."
		}
		if want.Toolchain == "" {
			want.Toolchain = "go1.26"
		}
		got, err := plan(t, c.tree)
		if err != nil {
			t.Errorf("%s: %v", name, err)
		} else if d := cmp.Diff(&want, got); d != "" {
			t.Errorf("%s: -want +got\n%s", name, d)
		}
	}
}

func TestBadTreesSayWhatToWrite(t *testing.T) {
	for name, c := range map[string]struct {
		tree      fs.FS
		msg, hint string
	}{
		"no go.mod":               {tree(map[string]string{"main.go": mainFile}), "no go.mod in the root of the repository", "go mod init"},
		"go.mod below":            {tree(map[string]string{"services/api/go.mod": mod}), "no go.mod in the root of the repository; there is one in services/api", "dir: services/api"},
		"empty workspace":         {tree(map[string]string{"go.work": "go 1.26\n", "a/go.mod": mod}), "go.work:1: the workspace uses no module", "go work use"},
		"workspace uses none":     {tree(map[string]string{"go.work": "go 1.26\nuse ./b\n", "a/go.mod": mod}), "go.work:2: uses ./b, which is not a module", "commit the module"},
		"broken go.work":          {tree(map[string]string{"go.work": "use (\n", "a/go.mod": mod}), "go.work:", "go work sync"},
		"build.binaries is none":  {with(map[string]string{"main.go": mainFile, "m3o.yaml": "build: {binaries: [./lib]}"}), "m3o.yaml: build.binaries has ./lib", "package main"},
		"cron without a program":  {with(map[string]string{"main.go": mainFile, "app.json": "{\"cron\": [\n{\"command\": \"report\", \"schedule\": \"@daily\"}]}"}), `app.json:2: no main package builds a binary called "report"`, "./hello"},
		"broken go.mod":           {tree(map[string]string{"go.mod": "module x\nrequire (\n", "main.go": mainFile}), "go.mod:", "go mod tidy"},
		"no module line":          {tree(map[string]string{"go.mod": "go 1.26\n", "main.go": mainFile}), "go.mod:1: no module line", "module example.com/hello"},
		"bad module path":         {tree(map[string]string{"go.mod": "module \"a b\"\n", "main.go": mainFile}), "go.mod:1: malformed import path", "module example.com/hello"},
		"replaced from outside":   {with(map[string]string{"go.mod": mod + "replace example.com/x => ../x\n", "main.go": mainFile}), "go.mod:4: replaces example.com/x by ../x", "relative path"},
		"replaced by an absolute": {with(map[string]string{"go.mod": mod + "replace example.com/x => /var/cache/go-mod/x\n", "main.go": mainFile}), "go.mod:4: replaces example.com/x by /var", "relative path"},
		"no main package":         {with(map[string]string{"lib.go": "package hello\n"}), "no main package", "package main"},
		"several mains":           {with(map[string]string{"cmd/a/main.go": mainFile, "cmd/b/main.go": mainFile}), "there are 2 main packages and nothing says which one serves: ./cmd/a, ./cmd/b", "web: ./a"},
		"Procfile, no such":       {with(map[string]string{"main.go": mainFile, "Procfile": "# x\nweb: server"}), `Procfile:2: no main package builds a binary called "server"; there is hello`, "web: ./hello"},
		"Procfile, release only":  {with(map[string]string{"main.go": mainFile, "Procfile": "release: hello"}), "Procfile:1: there is a release command but no process", "web: ./hello"},
		"empty Procfile":          {with(map[string]string{"main.go": mainFile, "Procfile": "\n"}), "Procfile:1: the file names no process", "web: ./hello"},
		"Procfile in conflict":    {with(map[string]string{"main.go": mainFile, "Procfile": "<<<<<<< HEAD\n"}), "Procfile:1: a merge conflict", "commit"},
		"same binary twice":       {with(map[string]string{"main.go": mainFile, "cmd/x/s/main.go": mainFile, "cmd/y/s/main.go": mainFile, "Procfile": "web: s\nw: hello"}), `Procfile:1: ./cmd/x/s and ./cmd/y/s both build a binary called "s"`, "rename"},
		"build.main is none":      {with(map[string]string{"main.go": mainFile, "m3o.yaml": "build: {main: ./lib}"}), "m3o.yaml: build.main ./lib is not a main package", "package main"},
		"bad m3o.yaml":            {with(map[string]string{"main.go": mainFile, "m3o.yaml": "x: 1"}), `m3o.yaml:1: unknown key "x"`, "did you mean"},
		"cgo":                     {with(map[string]string{"main.go": "package main\n\nimport \"C\"\n\nfunc main() {}\n"}), `main.go imports "C"`, "written in Go"},
		"cgo beside Go files":     {with(map[string]string{"main.go": mainFile, "c.go": "package main\n\nimport \"C\"\n"}), `c.go imports "C"`, "written in Go"},
		"go.mod is a folder":      {tree(map[string]string{"go.mod/x": "", "main.go": mainFile}), "go.mod is a folder", ""},
		"huge go.mod":             {tree(map[string]string{"go.mod": strings.Repeat("//\n", 1e6)}), "go.mod is larger than 1 MB", ""},
	} {
		p, err := plan(t, c.tree)
		if m3o.KindOf(err) != m3o.Invalid || !strings.HasPrefix(err.Error(), c.msg) || !strings.Contains(m3o.HintOf(err), c.hint) {
			t.Errorf("%s: Plan = %+v, %v (hint %q), want %s… (hint …%s…)", name, p, err, m3o.HintOf(err), c.msg, c.hint)
		}
	}
}

func TestDetect(t *testing.T) {
	for name, c := range map[string]struct {
		tree fs.FS
		want bool
	}{
		"go.mod":       {tree(map[string]string{"go.mod": mod}), true},
		"go.work":      {tree(map[string]string{"go.work": ""}), true},
		"Go file":      {tree(map[string]string{"main.go": mainFile}), true},
		"cmd":          {tree(map[string]string{"cmd/x/main.go": mainFile}), true},
		"package.json": {tree(map[string]string{"package.json": "{}"}), false},
		"nothing":      {tree(nil), false},
	} {
		if got := Detect(c.tree, ""); got != c.want {
			t.Errorf("%s: Detect = %v, want %v", name, got, c.want)
		}
	}
}

// The sample apps are what other tests push.
func TestSampleApps(t *testing.T) {
	dirs, err := filepath.Glob(filepath.Join(need.RepoRoot(t), "testdata/apps/*/go.mod"))
	if err != nil || len(dirs) == 0 {
		t.Fatalf("no sample apps: %v", err)
	}
	for _, d := range dirs {
		name := filepath.Base(filepath.Dir(d))
		_, err := plan(t, os.DirFS(filepath.Dir(d)))
		if bad := name == "no-main"; bad != (m3o.KindOf(err) == m3o.Invalid) || !bad && err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func FuzzGoMod(f *testing.F) {
	for _, s := range []string{mod, mod + "toolchain go1.26.3\n", "module x\nreplace a => ../b\n// +heroku install ./... ../..\n", "module \"\\x00\"\n", "go 99.9\nmodule v2\n"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		p, err := plan(t, tree(map[string]string{"go.mod": s, "main.go": mainFile, "cmd/a/main.go": mainFile}))
		if err != nil {
			if m3o.KindOf(err) != m3o.Invalid {
				t.Errorf("error %q is not the user's", err)
			}
			return
		}
		for _, tg := range p.Targets {
			if strings.ContainsAny(tg.Name, "/\x00") || tg.Name == "" || tg.Name == "." || tg.Name == ".." || strings.HasPrefix(tg.Package, "-") {
				t.Errorf("target %+v", tg)
			}
		}
	})
}
