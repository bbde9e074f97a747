package build

import (
	"errors"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/m3o/m3o"
	"github.com/m3o/m3o/buildpacks"
	"github.com/m3o/m3o/buildpacks/dockerfile"
	"github.com/m3o/m3o/buildpacks/source"
	"github.com/opencontainers/go-digest"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"
)

// tree is hello and more files.
func tree(more map[string]string) map[string]string {
	all := maps.Clone(hello)
	maps.Copy(all, more)
	return all
}

const testFile = "package main\n\nimport (\n\t\"os\"\n\t\"testing\"\n)\n\nfunc TestIt(t *testing.T) {\n\tif err := os.WriteFile(\"testdata.out\", nil, 0o600); err != nil {\n\t\tt.Fatal(err)\n\t}\n\tt.FAILS(\"two is not one\")\n}\n"

func TestGatesPassOrRefuse(t *testing.T) {
	b := builder(t)
	r := newRepo(t)
	// Tests have caches of their own, so the app had better be small.
	res, out, err := push(t.Context(), t, b, r.commit(map[string]string{"go.mod": hello["go.mod"], "main.go": "package main\n\nfunc main() {}\n",
		"m3o.yaml": "build:\n  test: true\n", "main_test.go": strings.ReplaceAll(testFile, "FAILS", "Log")}))
	ok(t, out, err)
	if !strings.Contains(out, "test: ok") {
		t.Errorf("the tests' output is not shown:\n%s", out)
	}
	if dir, _ := unpack(t, b, res.Image); exec.Command(filepath.Join(dir, "app/hello")).Run() != nil {
		t.Error("the image's binary does not run")
	}
	_, out, err = push(t.Context(), t, b, r.commit(map[string]string{"main_test.go": strings.ReplaceAll(testFile, "FAILS", "Error")}))
	if m3o.KindOf(err) != m3o.Invalid || !strings.Contains(err.Error(), "main_test.go:12: two is not one") || !strings.Contains(m3o.HintOf(err), "build.test") || !strings.Contains(out, "--- FAIL: TestIt") {
		t.Errorf("a failing test: %v (hint %q)\n%s", err, m3o.HintOf(err), out)
	}
	_, out, err = push(t.Context(), t, b, r.commit(map[string]string{"m3o.yaml": "build:\n  vet: true\n", "main_test.go": "package main\n", "main.go": "package main\n\nfunc main() {\n\tx := 1\n\tx = x\n}\n"}))
	if m3o.KindOf(err) != m3o.Invalid || !strings.Contains(err.Error(), "main.go:5:") || !strings.Contains(m3o.HintOf(err), "build.vet") {
		t.Errorf("what vet reports: %v (hint %q)\n%s", err, m3o.HintOf(err), out)
	}
}

func TestWorkspaceStampTagsAndFiles(t *testing.T) {
	b := builder(t)
	src := repo(t, map[string]string{
		"go.work":        "go 1.26\n\nuse (\n\t./api\n\t./lib\n)\n",
		"lib/go.mod":     "module example.com/lib\n\ngo 1.26\n",
		"lib/lib.go":     "package lib\n\nconst Text = \"from lib\"\n",
		"api/go.mod":     "module example.com/api\n\ngo 1.26\n",
		"api/special.go": "//go:build special\n\npackage main\n\nconst special = \"special\"\n",
		"api/main.go": `package main

import (
	"fmt"
	"net/http"
	"os"

	"example.com/lib"
)

var version, date string

func main() {
	http.HandleFunc("/", func(w http.ResponseWriter, r *http.Request) { fmt.Fprintln(w, lib.Text, special, version, date) })
	fmt.Println(http.ListenAndServe(":"+os.Getenv("PORT"), nil))
}
`,
		"api/static/a/b.txt": "b", "api/static/run.sh": "#!", "api/migrations/1.sql": "1", "api/migrations/x.txt": "no", "static/no": "no",
		"m3o.yaml": "build:\n  dir: api\n  tags: [special]\n  files: [static, \"migrations/*.sql\"]\n",
	})
	when := time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)
	res, out, err := build(t.Context(), t, b, src, func(r *Request) { r.Time = when })
	ok(t, out, err)
	dir, _ := unpack(t, b, res.Image)
	if got, want := get(t, filepath.Join(dir, "app/api")), "from lib special "+src.Commit[:12]+" 2026-01-02T03:04:05Z\n"; got != want {
		t.Errorf("answer %q, want %q", got, want)
	}
	for name, want := range map[string]bool{"static/a/b.txt": true, "static/run.sh": true, "migrations/1.sql": true, "migrations/x.txt": false, "static/no": false} {
		if _, err := os.Stat(filepath.Join(dir, "app", name)); (err == nil) != want {
			t.Errorf("%s is in the image: %v, want %v", name, err == nil, want)
		}
	}
	again, out, err := build(t.Context(), t, b, src, func(r *Request) { r.Time = when; r.NoCache = true })
	ok(t, out, err)
	if again.Image != res.Image {
		t.Errorf("images %s and %s of one tree", res.Image, again.Image)
	}
	_, out, err = push(t.Context(), t, b, repo(t, tree(map[string]string{"m3o.yaml": "build: {files: [templates]}"})))
	if m3o.KindOf(err) != m3o.Invalid || !strings.Contains(err.Error(), `build.files "templates" matches no file`) {
		t.Errorf("files that are not there: %v\n%s", err, out)
	}
}

func TestDockerfileFromScratch(t *testing.T) {
	b := builder(t)
	r := newRepo(t)
	src := r.commit(map[string]string{
		"svc/Dockerfile": "# syntax=docker/dockerfile:1\nFROM scratch AS first\nARG NAME\nCOPY . /data/\nFROM first\nCOPY one.txt /${NAME:-none}.txt\nENV A=b\nEXPOSE 9000\nWORKDIR /data\nUSER 7\nENTRYPOINT [\"/data/run\"]\nCMD [\"x\"]\n",
		"svc/one.txt":    "1", "svc/ignored.txt": "2", "svc/.dockerignore": "ignored.txt\n", "outside.txt": "3",
		"m3o.yaml": "build:\n  dir: svc\n  args: {NAME: two}\n",
	})
	res, out, err := docker(t, b, src)
	ok(t, out, err)
	dir := t.TempDir()
	untar(t, b, res.Image, dir)
	for name, want := range map[string]bool{"data/one.txt": true, "two.txt": true, "data/ignored.txt": false, "data/outside.txt": false} {
		if _, err := os.Stat(filepath.Join(dir, name)); (err == nil) != want {
			t.Errorf("%s is in the image: %v, want %v\n%s", name, err == nil, want, out)
		}
	}
	_, img, err := b.readImage(t.Context(), digest.Digest(res.Image))
	if err != nil || res.Port != 9000 || strings.Join(img.Config.Entrypoint, " ") != "/data/run" || img.Config.User != "7" || img.Config.WorkingDir != "/data" {
		t.Errorf("%v, port %d, config %+v", err, res.Port, img.Config)
	}
	again, out, err := docker(t, b, src, func(r *Request) { r.NoCache = true })
	ok(t, out, err)
	if again.Image != res.Image {
		t.Errorf("images %s and %s of one tree", res.Image, again.Image)
	}
	for text, want := range map[string]string{
		"FROM scratch\nFOO bar\n":        `Dockerfile:2: unknown instruction: FOO`,
		"FROM scratch\nCOPY nothing /\n": `Dockerfile:2: `,
		"":                               `Dockerfile: `,
		"FROM scratch\nRUN [\"/no\"]\n":  `Dockerfile:2: `,
	} {
		_, out, err := docker(t, b, r.commit(map[string]string{"svc/Dockerfile": text}))
		if m3o.KindOf(err) != m3o.Invalid || !strings.HasPrefix(err.Error(), "svc/"+want) || m3o.HintOf(err) == "" {
			t.Errorf("%q: %v (hint %q, cause %v), want svc/%s…\n%s", text, err, m3o.HintOf(err), errors.Unwrap(err), want, out)
		}
	}
	layout := r.work + "/base"
	if err := os.CopyFS(layout, os.DirFS(b.Images())); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(layout, "index.json"), []byte(`{"schemaVersion":2,"manifests":[{"mediaType":"`+v1.MediaTypeImageManifest+`","digest":"`+res.Image+`","size":1}]}`), 0o600); err != nil {
		t.Fatal(err)
	}
	res, out, err = docker(t, b, r.commit(map[string]string{"svc/Dockerfile": "FROM example.com/base:1\nCOPY one.txt /three.txt\n",
		"m3o.yaml": "build:\n  dir: svc\n  images:\n    example.com/base:1: base\n"}))
	ok(t, out, err)
	dir = t.TempDir()
	untar(t, b, res.Image, dir)
	for _, name := range []string{"two.txt", "three.txt"} {
		if _, err := os.Stat(filepath.Join(dir, name)); err != nil {
			t.Error(err)
		}
	}
}

// docker plans and builds a commit by its Dockerfile.
func docker(t *testing.T, b *Builder, src m3o.Source, change ...func(*Request)) (Result, string, error) {
	t.Helper()
	return build(t.Context(), t, b, src, func(r *Request) {
		files, err := buildpacks.ReadFiles(r.Tree.(*source.Tree))
		if err == nil {
			r.Plan, err = dockerfile.Plan(t.Context(), r.Tree.(*source.Tree), files)
		}
		if err != nil {
			t.Fatal(err)
		}
		for _, c := range change {
			c(r)
		}
	})
}

// untar extracts the files of an image, whoever's they are.
func untar(t *testing.T, b *Builder, image, dir string) {
	t.Helper()
	m, _, err := b.readImage(t.Context(), digest.Digest(image))
	if err != nil {
		t.Fatal(err)
	}
	for _, l := range m.Layers {
		if out, err := exec.Command("tar", "-xf", filepath.Join(b.Images(), "blobs/sha256", l.Digest.Encoded()), "-C", dir).CombinedOutput(); err != nil {
			t.Fatalf("tar: %v\n%s", err, out)
		}
	}
}
