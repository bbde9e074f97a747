package build

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/m3o/m3o"
)

// probe is the one program of an image without a base: it writes what it got.
const probe = `package main

import (
	"fmt"
	"os"
)

func main() {
	if os.Args[1] == "fail" {
		fmt.Println("the last stage is built")
		os.Exit(1)
	}
	secret, err := os.ReadFile("/run/secrets/TOKEN")
	if err == nil {
		err = os.WriteFile("/out.txt", fmt.Appendf(nil, "%s, %d of secret", os.Getenv("EDITION"), len(secret)), 0o644)
	}
	if err != nil {
		fmt.Println(err)
		os.Exit(1)
	}
}
`

func TestDockerfileTakesTargetArgsAndSecrets(t *testing.T) {
	b := builder(t)
	r := newRepo(t)
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "probe.go"), []byte(probe), 0o600); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command("go", "build", "-o", filepath.Join(r.work, "probe"), "probe.go")
	cmd.Dir, cmd.Env = dir, append(os.Environ(), "CGO_ENABLED=0", "GOFLAGS=", "GOWORK=off")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	const token = "t0ken-of-the-dockerfile"
	src := r.commit(map[string]string{
		"Dockerfile": "FROM scratch AS tools\nCOPY probe /probe\n\nFROM tools AS wanted\nARG EDITION=none\nRUN --mount=type=secret,id=TOKEN,required=true [\"/probe\", \"write\"]\n\n" +
			"FROM tools\nRUN [\"/probe\", \"fail\"]\n",
		"m3o.yaml": "build:\n  target: wanted\n  args: {EDITION: gold}\n  secrets: [TOKEN]\n",
	})
	res, out, err := docker(t, b, src, func(r *Request) { r.Secrets = map[string]m3o.Secret{"TOKEN": token} })
	ok(t, out, err)
	into := t.TempDir()
	untar(t, b, res.Image, into)
	if got, err := os.ReadFile(filepath.Join(into, "out.txt")); err != nil || string(got) != "gold, 23 of secret" {
		t.Errorf("the step wrote %q, %v\n%s", got, err, out)
	}
	for _, where := range []string{b.dir("buildkit"), b.Images()} {
		if found, err := exec.Command("grep", "-rlF", "--binary-files=text", token, where).Output(); err == nil {
			t.Errorf("the secret is in %s", found)
		}
	}
	_, out, err = docker(t, b, src, func(r *Request) { r.NoCache = true })
	if m3o.KindOf(err) != m3o.Invalid || !strings.Contains(err.Error(), "TOKEN") {
		t.Errorf("without the secret: %v\n%s", err, out)
	}
	_, out, err = docker(t, b, r.commit(map[string]string{"m3o.yaml": "build:\n  secrets: [TOKEN]\n"}), func(r *Request) { r.Secrets = map[string]m3o.Secret{"TOKEN": token} })
	if m3o.KindOf(err) != m3o.Invalid || !strings.Contains(err.Error(), "the last stage is built") {
		t.Errorf("without a target: %v\n%s", err, out)
	}
}

func TestFlagsAndExperimentsReachTheCompiler(t *testing.T) {
	b := builder(t)
	src := repo(t, map[string]string{
		"go.mod": hello["go.mod"], "main.go": "package main\n\nfunc main() { println(experiment, flagged) }\n",
		"off.go":   "//go:build !goexperiment.jsonv2\n\npackage main\n\nconst experiment = \"no experiment\"\n",
		"on.go":    "//go:build goexperiment.jsonv2\n\npackage main\n\nconst experiment = \"experiment\"\n",
		"no.go":    "//go:build !flagged\n\npackage main\n\nconst flagged = \"no flag\"\n",
		"yes.go":   "//go:build flagged\n\npackage main\n\nconst flagged = \"flag\"\n",
		"m3o.yaml": "build:\n  experiment: [jsonv2]\n  flags: [-tags=flagged]\n",
	})
	res, out, err := push(t.Context(), t, b, src)
	ok(t, out, err)
	dir, _ := unpack(t, b, res.Image)
	if said, err := exec.Command(filepath.Join(dir, "app/hello")).CombinedOutput(); err != nil || string(said) != "experiment flag\n" {
		t.Errorf("the app says %q, %v", said, err)
	}
}

// Two machines: nothing is shared but the commit, the Go version and the host's CA certificates.
func TestSameTreeSameDigestOfTwoBuilders(t *testing.T) {
	src := repo(t, map[string]string{
		"go.mod": hello["go.mod"], "main.go": "package main\n\nvar version string\n\nfunc main() { println(version) }\n",
		"static/a.txt": "a\n", "static/run.sh": "#!/bin/sh\n",
		"m3o.yaml": "build:\n  files: [static]\n  ldflags: -X main.version=$VERSION\n",
	})
	one, out, err := push(t.Context(), t, builder(t), src)
	ok(t, out, err)
	dir, err := os.MkdirTemp("", "m3o-second-")
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(dir)
	b, stop, err := start(t.Context(), testConfig(t, dir))
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := stop(); err != nil {
			t.Error(err)
		}
	}()
	src.App = "called-otherwise"
	two, out, err := push(t.Context(), t, b, src)
	ok(t, out, err)
	if one.Image != two.Image {
		t.Errorf("images %s and %s of one tree", one.Image, two.Image)
	}
}
