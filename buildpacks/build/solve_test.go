package build

import (
	"archive/tar"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/m3o/m3o"
	"github.com/m3o/m3o/buildpacks"
	"github.com/m3o/m3o/buildpacks/golang"
	"github.com/m3o/m3o/buildpacks/source"
	"github.com/m3o/m3o/internal/need"
	"github.com/opencontainers/go-digest"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/tonistiigi/fsutil"
)

func ok(t testing.TB, out string, err error) {
	t.Helper()
	if err != nil {
		t.Fatalf("%v (hint %q, cause %v)\n%s", err, m3o.HintOf(err), errors.Unwrap(err), out)
	}
}

func blob(t testing.TB, b *Builder, d digest.Digest, v any) {
	t.Helper()
	j, err := content.ReadBlob(t.Context(), b.images, v1.Descriptor{Digest: d})
	if err == nil {
		err = json.Unmarshal(j, v)
	}
	if err != nil {
		t.Fatal(err)
	}
}

// unpack extracts the files of an image, checking what a layer may hold.
func unpack(t testing.TB, b *Builder, image string) (string, v1.Image) {
	t.Helper()
	dir := t.TempDir()
	var m v1.Manifest
	var img v1.Image
	blob(t, b, digest.Digest(image), &m)
	blob(t, b, m.Config.Digest, &img)
	for i, l := range m.Layers {
		if l.MediaType != v1.MediaTypeImageLayer || img.RootFS.DiffIDs[i] != l.Digest {
			t.Errorf("layer %d: %+v, diff id %s", i, l, img.RootFS.DiffIDs[i])
		}
		f, err := os.Open(filepath.Join(b.Images(), "blobs/sha256", l.Digest.Encoded()))
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		for tr := tar.NewReader(f); ; {
			h, err := tr.Next()
			if errors.Is(err, io.EOF) {
				break
			}
			if err != nil {
				t.Fatal(err)
			}
			if !h.ModTime.Equal(epoch) || h.Uid != 0 || h.Gid != 0 {
				t.Errorf("%s: %v %d:%d", h.Name, h.ModTime, h.Uid, h.Gid)
			}
			p := filepath.Join(dir, h.Name)
			if h.Typeflag == tar.TypeDir {
				err = os.MkdirAll(p, 0o755)
			} else {
				var data []byte
				if data, err = io.ReadAll(tr); err == nil {
					err = os.WriteFile(p, data, h.FileInfo().Mode())
				}
			}
			if err != nil {
				t.Fatal(err)
			}
		}
	}
	return dir, img
}

func TestHelloRunsFromItsImage(t *testing.T) {
	b := builder(t)
	src := repo(t, hello)
	res, out, err := push(t.Context(), t, b, src)
	ok(t, out, err)
	for _, want := range []string{"-----> Go app detected\n", "-----> Using go1.", "-----> Building .\n"} {
		if !strings.Contains(out, want) {
			t.Errorf("output lacks %q:\n%s", want, out)
		}
	}
	var m v1.Manifest
	blob(t, b, digest.Digest(res.Image), &m)
	if m.Annotations[v1.AnnotationRevision] != src.Commit {
		t.Errorf("annotations %v, want the commit %s", m.Annotations, src.Commit)
	}
	dir, img := unpack(t, b, res.Image)
	if len(img.Config.Cmd) != 1 || img.Config.Cmd[0] != "/app/hello" || img.Config.User != "65532:65532" || img.Config.WorkingDir != "/app" {
		t.Errorf("config %+v", img.Config)
	}
	if ca, err := os.ReadFile(filepath.Join(dir, caFile)); err != nil || !bytes.Contains(ca, []byte("BEGIN CERTIFICATE")) {
		t.Errorf("CA roots: %d bytes, %v", len(ca), err)
	}
	if z, err := os.Stat(filepath.Join(dir, zoneFile)); err != nil || z.Size() < 100e3 {
		t.Errorf("time zones: %v, %v", z, err)
	}
	if got := get(t, filepath.Join(dir, "app/hello")); got != "hello\n" {
		t.Errorf("answer %q", got)
	}
	if res.Size < 1e6 || res.Took <= 0 || len(res.Steps) < 3 {
		t.Errorf("result %+v", res)
	}
}

// get starts a binary on a free port and returns what it answers.
func get(t testing.TB, bin string) string {
	t.Helper()
	addrs, err := need.Addrs(1)
	if err != nil {
		t.Fatal(err)
	}
	_, port, _ := net.SplitHostPort(addrs[0])
	cmd := exec.Command(bin)
	cmd.Env = []string{"PORT=" + port}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() { _ = cmd.Process.Kill(); _ = cmd.Wait() }()
	var body []byte
	eventually(t, "an answer", func() bool {
		resp, err := http.Get("http://127.0.0.1:" + port)
		if err != nil {
			return false
		}
		defer resp.Body.Close()
		body, err = io.ReadAll(resp.Body)
		return err == nil
	})
	return string(body)
}

func eventually(t testing.TB, what string, f func() bool) {
	t.Helper()
	deadline := time.Now().Add(2 * time.Minute)
	for !f() {
		if time.Now().After(deadline) {
			t.Fatalf("no %s after two minutes", what)
		}
		select {
		case <-t.Context().Done():
			t.Fatal(t.Context().Err())
		case <-time.After(5 * time.Millisecond):
		}
	}
}

func TestSameTreeSameDigest(t *testing.T) {
	b := builder(t)
	src := repo(t, hello)
	one, out, err := push(t.Context(), t, b, src)
	ok(t, out, err)
	two, out, err := push(t.Context(), t, b, src)
	ok(t, out, err)
	if !strings.Contains(out, "Nothing changed") {
		t.Errorf("the second build was not taken from the cache:\n%s", out)
	}
	src.App = "another"
	three, out, err := build(t.Context(), t, b, src, func(r *Request) { r.NoCache = true })
	ok(t, out, err)
	if strings.Contains(out, "Nothing changed") {
		t.Errorf("NoCache took the cache:\n%s", out)
	}
	if one.Image != two.Image || one.Image != three.Image {
		t.Errorf("digests %s, %s, %s", one.Image, two.Image, three.Image)
	}
}

func TestOneLineChange(t *testing.T) {
	b := builder(t)
	r := newRepo(t)
	one, out, err := push(t.Context(), t, b, r.commit(hello))
	ok(t, out, err)
	two, out, err := push(t.Context(), t, b, r.commit(map[string]string{"main.go": strings.Replace(hello["main.go"], "\"hello\"", "\"hallo\"", 1)}))
	ok(t, out, err)
	if one.Image == two.Image {
		t.Fatal("a change of equal length was not built")
	}
	dir, _ := unpack(t, b, two.Image)
	if got := get(t, filepath.Join(dir, "app/hello")); got != "hallo\n" {
		t.Errorf("answer %q", got)
	}
}

// build is push with a say in the request.
func build(ctx context.Context, t testing.TB, b *Builder, src m3o.Source, change func(*Request)) (Result, string, error) {
	t.Helper()
	tree, err := source.Open(ctx, src, nil)
	if err != nil {
		t.Fatal(err)
	}
	defer tree.Close()
	files, err := buildpacks.ReadFiles(tree)
	if err != nil {
		return Result{}, "", err
	}
	plan, err := golang.Plan(ctx, tree, files)
	if err == nil {
		err = files.Apply(plan)
	}
	if err != nil && !errors.Is(err, golang.ErrNotGo) { // change may have another plan
		return Result{}, "", err
	}
	var out bytes.Buffer
	req := Request{App: src.App, Plan: plan, Tree: tree, Out: &out, Commit: src.Commit}
	change(&req)
	res, err := b.Build(ctx, req)
	return res, out.String(), err
}

func sample(t testing.TB, name string) m3o.Source {
	t.Helper()
	r := newRepo(t)
	if err := os.CopyFS(r.work, os.DirFS(filepath.Join(need.RepoRoot(t), "testdata/apps", name))); err != nil {
		t.Fatal(err)
	}
	src := r.commit(nil)
	src.App = name
	return src
}

func TestGRPCAppWithModules(t *testing.T) {
	need.Registry(t)
	b := builder(t)
	res, out, err := push(t.Context(), t, b, sample(t, "hello-grpc"))
	ok(t, out, err)
	// The module cache is shared: the next app downloads nothing.
	r := newRepo(t)
	if err := os.CopyFS(r.work, os.DirFS(filepath.Join(need.RepoRoot(t), "testdata/apps/hello-grpc"))); err != nil {
		t.Fatal(err)
	}
	src := r.commit(map[string]string{"more.go": "package main\n\nfunc init() { println(1) }\n"})
	src.App = "other"
	two, out, err := push(t.Context(), t, b, src)
	ok(t, out, err)
	if strings.Contains(out, "downloading") || two.Image == res.Image {
		t.Errorf("image %s, before %s\n%s", two.Image, res.Image, out)
	}
}

func TestSeveralTargetsAndABuildRoot(t *testing.T) {
	b := builder(t)
	res, out, err := push(t.Context(), t, b, repo(t, map[string]string{
		"m3o.yaml":              "build:\n  dir: svc/a\n",
		"svc/a/go.mod":          "module example.com/a\n\ngo 1.26\n\nrequire example.com/lib v0.0.0\n\nreplace example.com/lib => ../lib\n",
		"svc/a/cmd/web/main.go": "package main\n\nimport \"example.com/lib\"\n\nfunc main() { println(lib.X) }\n",
		"svc/a/cmd/w/main.go":   "package main\n\nfunc main() {}\n",
		"svc/lib/go.mod":        "module example.com/lib\n\ngo 1.26\n",
		"svc/lib/lib.go":        "package lib\n\nconst X = 1\n",
		"Procfile":              "web: web\nworker: w\n",
	}))
	ok(t, out, err)
	dir, _ := unpack(t, b, res.Image)
	for _, name := range []string{"web", "w"} {
		if fi, err := os.Stat(filepath.Join(dir, "app", name)); err != nil || fi.Mode().Perm() != 0o755 {
			t.Errorf("%s: %v, %v", name, fi, err)
		}
	}
}

func TestFaultsOfTheSource(t *testing.T) {
	b := builder(t)
	need.Registry(t)
	main := "package main\n\nfunc main() {}\n"
	for name, c := range map[string]struct {
		files     map[string]string
		msg, hint string
	}{
		"does not compile": {map[string]string{"go.mod": "module x\n\ngo 1.26\n", "main.go": "package main\n\nfunc main() {\n\tundefinedThing()\n}\n"},
			"./main.go:4:2: undefined: undefinedThing", "fix it"},
		"syntax error": {map[string]string{"go.mod": "module x\n\ngo 1.26\n", "main.go": "package main\n\nfunc main() {\n"},
			"./main.go:4:1: syntax error", "fix it"},
		"module not required": {map[string]string{"go.mod": "module x\n\ngo 1.26\n", "main.go": "package main\n\nimport _ \"example.com/nope\"\n\nfunc main() {}\n"},
			"main.go:3:8: no required module provides package example.com/nope", "go mod tidy"},
		"own package not committed": {map[string]string{"go.mod": "module example.com/x\n\ngo 1.26\n", "main.go": "package main\n\nimport _ \"example.com/x/internal/y\"\n\nfunc main() {}\n"},
			"main.go:3:8: ", "committed too"},
		"no go.sum": {map[string]string{"go.mod": "module x\n\ngo 1.26\n\nrequire golang.org/x/sync v0.24.0\n", "main.go": "package main\n\nimport _ \"golang.org/x/sync/errgroup\"\n\nfunc main() {}\n"},
			"main.go:3:8: missing go.sum entry", "go mod tidy"},
		"wrong go.sum": {map[string]string{"go.mod": "module x\n\ngo 1.26\n\nrequire golang.org/x/sync v0.24.0\n", "main.go": "package main\n\nimport _ \"golang.org/x/sync/errgroup\"\n\nfunc main() {}\n",
			"go.sum": "golang.org/x/sync v0.24.0 h1:AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA=\ngolang.org/x/sync v0.24.0/go.mod h1:AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA=\n"},
			"", "go.sum"},
		"no such version": {map[string]string{"go.mod": "module x\n\ngo 1.26\n\nrequire golang.org/x/sync v0.9999.0\n", "main.go": "package main\n\nimport _ \"golang.org/x/sync/errgroup\"\n\nfunc main() {}\n",
			"go.sum": "golang.org/x/sync v0.9999.0 h1:AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA=\ngolang.org/x/sync v0.9999.0/go.mod h1:AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA=\n"},
			"golang.org/x/sync@v0.9999.0: reading ", "the module proxy does not have that version"},
		"cgo below": {map[string]string{"go.mod": "module example.com/x\n\ngo 1.26\n", "main.go": "package main\n\nimport _ \"example.com/x/c\"\n\nfunc main() {}\n", "c/c.go": "package c\n\nimport \"C\"\n"},
			"", "cgo"},
		"too new a Go": {map[string]string{"go.mod": "module x\n\ngo 1.99\n", "main.go": main},
			"go.mod asks for go1.99, and the newest Go release is go1.", "lower the go line"},
	} {
		t.Run(name, func(t *testing.T) {
			res, out, err := push(t.Context(), t, b, repo(t, c.files))
			if m3o.KindOf(err) != m3o.Invalid || !strings.Contains(err.Error(), c.msg) || !strings.Contains(m3o.HintOf(err), c.hint) || strings.Contains(err.Error(), "\n") {
				t.Errorf("Build = %+v, %v (%v, hint %q), want %s (hint …%s…)\n%s", res, err, m3o.KindOf(err), m3o.HintOf(err), c.msg, c.hint, out)
			}
			if c.msg != "" && strings.HasPrefix(c.msg, "./") && !strings.Contains(out, "       "+c.msg) {
				t.Errorf("the compiler's line is not in the output:\n%s", out)
			}
			if name == "does not compile" && !slices.ContainsFunc(res.Steps, func(s Step) bool { return s.Name == stepBuild && s.Took > 0 }) {
				t.Errorf("steps %+v of the failed build", res.Steps)
			}
		})
	}
}

func TestSampleThatDoesNotCompile(t *testing.T) {
	_, out, err := push(t.Context(), t, builder(t), sample(t, "broken-compile"))
	if m3o.KindOf(err) != m3o.Invalid || !strings.Contains(err.Error(), "main.go:") {
		t.Errorf("Build = %v\n%s", err, out)
	}
}

// slow takes the compiler a long time: one huge function, different each time.
func slow() map[string]string {
	var f strings.Builder
	fmt.Fprintf(&f, "package main\n\nfunc main() {\n\ta, b := %d, 1\n", time.Now().UnixNano())
	for range 60_000 {
		f.WriteString("\ta = a*3 + b\n\tb ^= a >> 1\n\tif a > b {\n\t\tb += a\n\t}\n")
	}
	f.WriteString("\tprintln(a, b)\n}\n")
	return map[string]string{"go.mod": "module example.com/slow\n\ngo 1.26\n", "main.go": f.String()}
}

// compiling reports whether a step of b runs.
func compiling(b *Builder) bool {
	for _, pid := range b.cgroup.pids() {
		if c, err := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", pid)); err == nil && bytes.Contains(c, []byte("pkg/tool/")) {
			return true
		}
	}
	return false
}

func TestCancelStopsTheStep(t *testing.T) {
	b := builder(t)
	src := repo(t, slow())
	ctx, cancel := context.WithCancelCause(t.Context())
	defer cancel(nil)
	type end struct {
		out string
		err error
	}
	done := make(chan end, 1)
	go func() {
		_, out, err := push(ctx, t, b, src)
		done <- end{out, err}
	}()
	eventually(t, "compiler", func() bool { return compiling(b) })
	gone := errors.New("the pusher has gone")
	cancel(gone)
	if e := <-done; !errors.Is(e.err, gone) {
		t.Errorf("Build = %v, want %v", e.err, gone)
	}
	eventually(t, "end of the compiler", func() bool { return !compiling(b) })
	_, out, err := push(t.Context(), t, b, repo(t, hello))
	ok(t, out, err)
}

func TestTooLongABuildSaysSo(t *testing.T) {
	b := builder(t)
	long := b.cfg.Timeout
	b.cfg.Timeout = time.Second
	defer func() { b.cfg.Timeout = long }()
	_, out, err := push(t.Context(), t, b, repo(t, slow()))
	if m3o.KindOf(err) != m3o.Invalid || err.Error() != "the build was ended: it took longer than 1s" || !strings.Contains(m3o.HintOf(err), "--build-timeout") {
		t.Errorf("Build = %v\n%s", err, out)
	}
}

func TestBuildkitdKilledMidBuild(t *testing.T) {
	b := builder(t)
	src := repo(t, slow())
	errs := make(chan error, 1)
	go func() {
		_, _, err := push(t.Context(), t, b, src)
		errs <- err
	}()
	eventually(t, "compiler", func() bool { return compiling(b) })
	kill9(t, b)
	if err := <-errs; m3o.KindOf(err) != m3o.Unavailable || err.Error() != "the builder stopped; push again" {
		t.Errorf("Build = %v", err)
	}
	// The supervisor starts another one, and nothing of the old one goes on.
	_, out, err := push(t.Context(), t, b, repo(t, hello))
	ok(t, out, err)
	if compiling(b) {
		t.Error("the old build still runs")
	}
}

// generation counts the BuildKits that have ended.
func (b *Builder) generation() int {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.gen
}

func kill9(t testing.TB, b *Builder) {
	t.Helper()
	var rec pidRecord
	j, err := os.ReadFile(b.pidfile())
	if err == nil {
		err = json.Unmarshal(j, &rec)
	}
	if err != nil {
		t.Fatal(err)
	}
	p, err := os.FindProcess(rec.Pid)
	if err == nil {
		err = p.Kill()
	}
	if err != nil {
		t.Fatal(err)
	}
}

// brokenTree has one file that ends in an error while it is sent.
type brokenTree struct{ *source.Tree }

func (b brokenTree) FS() fsutil.FS { return brokenFS{b.Tree.FS()} }

type brokenFS struct{ fsutil.FS }

func (b brokenFS) Open(string) (io.ReadCloser, error) {
	return io.NopCloser(io.MultiReader(strings.NewReader("pack"), errReader{})), nil
}

type errReader struct{}

func (errReader) Read([]byte) (int, error) { return 0, errors.New("bad object") }

func TestUnreadableSourceFailsTheBuild(t *testing.T) {
	src := repo(t, map[string]string{"go.mod": hello["go.mod"], "main.go": hello["main.go"] + "// unreadable\n"})
	src.App = "unreadable"
	_, out, err := build(t.Context(), t, builder(t), src, func(r *Request) { r.Tree = brokenTree{r.Tree.(*source.Tree)} })
	if err == nil || !strings.Contains(err.Error(), "read source: bad object") {
		t.Errorf("Build = %v\n%s", err, out)
	}
}

func TestSecretsReachTheStepOnly(t *testing.T) {
	b := builder(t)
	// An app with secrets has caches of its own, so it had better be small.
	src := repo(t, map[string]string{"go.mod": hello["go.mod"], "main.go": "package main\n\nfunc main() {}\n"})
	src.App = "secretive"
	_, out, err := build(t.Context(), t, b, src, func(r *Request) {
		r.NoCache = true
		r.Secrets = map[string]m3o.Secret{"GOFLAGS": "-no-such-flag"}
	})
	if err == nil || !strings.Contains(out, "no-such-flag") { // the go command complains of it
		t.Errorf("the step did not get its secret: Build = %v\n%s", err, out)
	}
	const password = "s3cr3t-of-the-test"
	_, out, err = build(t.Context(), t, b, src, func(r *Request) {
		r.NoCache = true
		r.Secrets = map[string]m3o.Secret{"netrc": "machine example.com login a password " + password, "TOKEN": password}
	})
	ok(t, out, err)
	for _, dir := range []string{b.dir("buildkit"), b.Images()} {
		if found, err := exec.Command("grep", "-rlF", "--binary-files=text", password, dir).Output(); err == nil {
			t.Errorf("the secret is in %s", found)
		}
	}
}

func TestPruneKeepsWhatIsKept(t *testing.T) {
	b := builder(t)
	var images []string
	for i := range 3 {
		files := map[string]string{"go.mod": hello["go.mod"], "main.go": fmt.Sprintf("package main\n\nfunc main() { println(%d) }\n", i)}
		res, out, err := push(t.Context(), t, b, repo(t, files))
		ok(t, out, err)
		images = append(images, res.Image)
	}
	layers := func(image string) (out []digest.Digest) {
		var m v1.Manifest
		blob(t, b, digest.Digest(image), &m)
		for _, l := range m.Layers {
			out = append(out, l.Digest)
		}
		return append(out, digest.Digest(image), m.Config.Digest)
	}
	kept, dropped := layers(images[0]), layers(images[1])
	if err := b.Prune(t.Context(), images[:1]); err != nil {
		t.Fatal(err)
	}
	there := func(d digest.Digest) bool {
		ok, err := content.Exists(t.Context(), b.images, v1.Descriptor{Digest: d})
		if err != nil {
			t.Fatal(err)
		}
		return ok
	}
	if !there(dropped[1]) {
		t.Error("an image built a moment ago was removed")
	}
	// An hour later: images[2] is being written again, so that its blobs are pinned.
	pinned, err := b.pin(func() (v1.Descriptor, error) { return v1.Descriptor{Digest: layers(images[2])[1]}, nil })
	if err != nil {
		t.Fatal(err)
	}
	if err := b.prune(t.Context(), append(images[:1:1], "sha256:"+strings.Repeat("0", 64)), time.Now().Add(time.Minute)); err != nil {
		t.Fatal(err)
	}
	for _, d := range kept {
		if !there(d) {
			t.Errorf("blob %s of a kept image is gone", d)
		}
	}
	if there(digest.Digest(images[1])) || there(dropped[1]) {
		t.Error("an image nobody keeps is there")
	}
	if !there(pinned.Digest) {
		t.Error("a blob being written was removed")
	}
	b.unpin(pinned)
	ix, err := b.readIndex()
	if err != nil || len(ix) != 1 || ix[0].Digest.String() != images[0] {
		t.Errorf("index %+v, %v", ix, err)
	}
	if err := b.Prune(t.Context(), []string{"latest"}); m3o.KindOf(err) != m3o.Invalid {
		t.Errorf("Prune of no digest = %v", err)
	}
	// What was removed can be built again.
	res, out, err := push(t.Context(), t, b, repo(t, map[string]string{"go.mod": hello["go.mod"], "main.go": "package main\n\nfunc main() { println(1) }\n"}))
	ok(t, out, err)
	for _, d := range layers(res.Image) {
		if !there(d) {
			t.Errorf("blob %s is missing", d)
		}
	}
}

func TestExternalBuildKit(t *testing.T) {
	b := builder(t)
	cfg := testConfig(t, t.TempDir())
	cfg.Addr = "unix://" + b.socket()
	other, stop, err := start(t.Context(), cfg)
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := stop(); err != nil {
			t.Error(err)
		}
	}()
	res, out, err := push(t.Context(), t, other, repo(t, hello))
	ok(t, out, err)
	if _, err := os.Stat(filepath.Join(other.Images(), "blobs/sha256", digest.Digest(res.Image).Encoded())); err != nil {
		t.Error(err)
	}
}
