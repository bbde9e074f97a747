package main

import (
	"encoding/json"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/m3o/m3o/internal/need"
)

// Each sample is pushed as its author would, answers, and is built again to
// the same image from what is recorded.
func TestSampleRepositories(t *testing.T) {
	b := theBox(t)
	ada := b.user(t, "ada")
	whole := t // the apps stay until the last part
	for _, c := range []struct{ sample, path, want, says string }{
		{"pages", "/", "<h1>pages</h1>", "HTTP /healthz"},
		{"stamped", "/", "stamped premium gold COMMIT ", ""},
		{"vendored", "/", "vendored", ""},
		{"monorepo", "/", "monorepo", ""},
		{"workspace", "/", "workspace", "Starting worker"},
		{"heroku-style", "/", "heroku-style", "migrated"},
		{"chi-notes", "/notes/hello", `{"text":"chi-notes"}`, ""},
		{"echo-quotes", "/quotes", "Errors are values.", ""},
		{"gin-shortener", "/", "gin-shortener", ""},
	} {
		t.Run(c.sample, func(t *testing.T) {
			dir := ada.clone(whole, c.sample, c.sample)
			ada.must(t, dir, "m3o", "create", c.sample)
			out, err := ada.push(dir)
			if err != nil || !strings.Contains(out, c.says) {
				t.Fatalf("push: %v\n%s\n%s", err, out, b.log.tail(3000))
			}
			want := strings.ReplaceAll(c.want, "COMMIT", strings.TrimSpace(ada.must(t, dir, "git", "rev-parse", "HEAD"))[:12])
			if status, body := b.get(t, c.sample, c.path); status != 200 || !strings.Contains(body, want) {
				t.Errorf("%s answers %d %q, want %q", c.path, status, body, want)
			}
			if got := ada.must(t, dir, "m3o", "verify"); !strings.Contains(got, "bit-identical: sha256:") {
				t.Errorf("verify says %s", got)
			}
		})
	}
	t.Run("what is in the image", func(t *testing.T) {
		if status, body := b.get(t, "pages", "/static/style.css"); status != 200 || !strings.Contains(body, "sans-serif") {
			t.Errorf("style.css: %d %q", status, body)
		}
		if status, _ := b.get(t, "pages", "/migrations/README"); status != 404 {
			t.Errorf("a file that no pattern names is in the image: %d", status)
		}
		dir := filepath.Join(ada.home, "chi-notes")
		for args, want := range map[string]string{"sbom": `"pkg:golang/github.com/go-chi/chi/v5@v5.2.5"`, "sbom --provenance": `"https://slsa.dev/provenance/v1"`,
			"builds:info": `(?s)Builder +go.*go build`} {
			if got := ada.must(t, dir, "m3o", strings.Fields(args)...); !regexp.MustCompile(want).MatchString(got) {
				t.Errorf("m3o %s says %s, want %s", args, got, want)
			}
		}
	})
}

// Editors find the schema of m3o.yaml without signing in.
func TestSchemaIsServed(t *testing.T) {
	b := theBox(t)
	res, err := b.client(t).Get(b.api + schemaPath)
	if err != nil {
		t.Fatal(err)
	}
	defer res.Body.Close()
	var s struct {
		Properties map[string]any
	}
	if err := json.NewDecoder(res.Body).Decode(&s); err != nil || res.StatusCode != 200 || s.Properties["build"] == nil || res.Header.Get("Access-Control-Allow-Origin") != "*" {
		t.Errorf("%s: %v, %v, header %v", res.Status, s, err, res.Header)
	}
}

const schemaPath = "/-/m3o.schema.json"

// A Dockerfile, an archive and a folder become releases without a registry.
func TestDockerfileImageAndFolder(t *testing.T) {
	b := theBox(t)
	ada := b.user(t, "ada")
	dir := ada.clone(t, "dockerfile-scratch", "scratch")
	build := exec.Command("go", "build", "-o", filepath.Join(dir, "server"), ".")
	build.Dir = filepath.Join(need.RepoRoot(t), "testdata/apps/dockerfile-scratch/src")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	// What is built by a Dockerfile has an API all the same.
	const proto = "syntax = \"proto3\";\npackage scratch.v1;\nmessage Thing {}\nservice Things { rpc Get(Thing) returns (Thing); }\n"
	if err := os.WriteFile(filepath.Join(dir, "things.proto"), []byte(proto), 0o600); err != nil {
		t.Fatal(err)
	}
	ada.commit(t, dir, "binary")
	ada.must(t, dir, "m3o", "create", "scratch")
	if out, err := ada.push(dir); err != nil || !strings.Contains(out, "Protobuf: 1 file, 1 service, 1 method") {
		t.Fatalf("push: %v\n%s\n%s", err, out, b.log.tail(3000))
	}
	if got := ada.must(t, dir, "m3o", "releases:info", "--json"); !regexp.MustCompile(`"descriptors": *"sha256:`).MatchString(got) {
		t.Errorf("releases:info says %s", got)
	}
	if status, body := b.get(t, "scratch", "/"); status != 200 || !strings.Contains(body, "dockerfile-scratch a file of another owner") {
		t.Errorf("the Dockerfile's image answers %d %q", status, body)
	}
	t.Run("folder", func(t *testing.T) {
		// What is not committed goes along; what git ignores does not.
		for name, text := range map[string]string{"secret.txt": "not committed\n", ".gitignore": "ignored\n", "ignored": "x"} {
			if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o600); err != nil {
				t.Fatal(err)
			}
		}
		if out := ada.must(t, dir, "m3o", "deploy", "."); !strings.Contains(out, "Released v2") {
			t.Errorf("deploy says %s", out)
		}
		if _, body := b.get(t, "scratch", "/"); !strings.Contains(body, "not committed") {
			t.Errorf("answer %q", body)
		}
		if got := ada.must(t, dir, "m3o", "deploy", "--ref", "main"); !strings.Contains(got, "Released v3") {
			t.Errorf("deploy --ref says %s", got)
		}
		if out, err := ada.try(dir, "m3o", "deploy", "--ref", "nothing"); err == nil || !strings.Contains(out, `there is no "nothing"`) {
			t.Errorf("deploy of a ref that is not there: %v %s", err, out)
		}
	})
	t.Run("archive", func(t *testing.T) {
		layout := t.TempDir()
		images := filepath.Join(b.data, "build", "images")
		digest := regexp.MustCompile(`sha256:[0-9a-f]{64}`).FindString(ada.must(t, dir, "m3o", "builds:info", "1"))
		index := `{"schemaVersion":2,"manifests":[{"mediaType":"application/vnd.oci.image.manifest.v1+json","digest":"` + digest + `","size":1}]}`
		if err := os.WriteFile(filepath.Join(layout, "index.json"), []byte(index), 0o600); err != nil {
			t.Fatal(err)
		}
		archive := filepath.Join(ada.home, "app.tar")
		files := []string{"-cf", archive, "-C", layout, "index.json", "-C", images}
		for _, d := range append(regexp.MustCompile(`[0-9a-f]{64}`).FindAllString(readBlob(t, images, digest), -1), strings.TrimPrefix(digest, "sha256:")) {
			files = append(files, "blobs/sha256/"+d)
		}
		if out, err := exec.Command("tar", files...).CombinedOutput(); err != nil {
			t.Fatalf("tar: %v\n%s", err, out)
		}
		if out := ada.must(t, "", "m3o", "deploy", "-a", "scratch", "--image", archive); !strings.Contains(out, "Released v4") {
			t.Errorf("deploy --image says %s", out)
		}
		if status, body := b.get(t, "scratch", "/"); status != 200 || !strings.Contains(body, "a file of another owner") {
			t.Errorf("the archive's image answers %d %q", status, body)
		}
		if out, err := ada.try("", "m3o", "deploy", "-a", "scratch", "--image", filepath.Join(ada.home, ".config/m3o/config.json")); err == nil || !strings.Contains(out, "not an OCI image archive") {
			t.Errorf("deploy of a file that is no image: %v %s", err, out)
		}
		if out, err := ada.try("", "m3o", "verify", "-a", "scratch"); err == nil || !strings.Contains(out, "no source to build it from") {
			t.Errorf("verify of an image: %v %s", err, out)
		}
	})
}

func readBlob(t *testing.T, images, digest string) string {
	t.Helper()
	f, err := os.Open(filepath.Join(images, "blobs/sha256", strings.TrimPrefix(digest, "sha256:")))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	// The annotations name a commit, which has 40 digits, not 64.
	j, err := io.ReadAll(f)
	if err != nil {
		t.Fatal(err)
	}
	return string(j)
}

// A build is stopped from another terminal and nothing is changed.
func TestBuildIsCancelledFromElsewhere(t *testing.T) {
	b := theBox(t)
	ada := b.user(t, "ada")
	dir := ada.clone(t, "vendored", "slowly")
	// A const loop that the compiler takes long to unroll would be fragile: a
	// test that waits for the end is not.
	if err := os.WriteFile(filepath.Join(dir, "m3o.yaml"), []byte("build:\n  test: true\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, "main_test.go"), []byte("package main\n\nimport \"testing\"\n\nfunc TestFor(t *testing.T) { println(\"waiting\"); select {} }\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	ada.commit(t, dir, "slow")
	ada.must(t, dir, "m3o", "create", "slowly")
	type end struct {
		out string
		err error
	}
	done := make(chan end, 1)
	go func() {
		out, err := ada.push(dir)
		done <- end{out, err}
	}()
	eventually(t, "a build that runs", func() bool {
		out, _ := ada.try(dir, "m3o", "builds")
		return strings.Contains(out, "running")
	})
	if out := ada.must(t, dir, "m3o", "builds:cancel"); !strings.Contains(out, "cancelled") {
		t.Errorf("builds:cancel says %s", out)
	}
	if e := <-done; e.err == nil || !strings.Contains(e.out, "cancelled by ada; nothing was changed") {
		t.Errorf("the push ended with %v:\n%s", e.err, e.out)
	}
	eventually(t, "the record", func() bool {
		out, _ := ada.try(dir, "m3o", "builds")
		return strings.Contains(out, "cancelled")
	})
	if res, err := b.client(t).Get(b.url("slowly", "/")); err != nil || res.StatusCode == http.StatusOK {
		t.Errorf("the app answers: %v", err)
	} else {
		_ = res.Body.Close()
	}
}
