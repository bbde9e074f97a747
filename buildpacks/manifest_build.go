package buildpacks

import (
	"path"
	"regexp"
	"strings"

	"gopkg.in/yaml.v3"
)

// BuildKeys are what m3o.yaml says below "build".
type BuildKeys struct {
	Builder    string            // "go", "dockerfile", "" to find out
	Dir        string            // clean slash path inside the tree, "" for the root
	Main       string            // "." or "./cmd/server", "" to find out
	Binaries   []string          // further main packages, as Main
	Tags       []string          // Go build tags
	LDFlags    string            // for the Go linker, beside -s -w
	Flags      []string          // GOFLAGS
	Experiment []string          // GOEXPERIMENT
	Test       bool              // go test ./... must pass
	Vet        bool              // go vet ./... must pass
	Advisories bool              // a push tells known faults of modules
	Files      []string          // of the tree, that go into the image
	Private    []string          // GOPRIVATE: module path patterns
	Secrets    []string          // config vars the build may read
	Dockerfile string            // clean slash path inside Dir, "" for none named
	Target     string            // stage of the Dockerfile
	Args       map[string]string // of the Dockerfile
	Images     map[string]string // of FROM lines, by the OCI layout in the tree that stands for each
}

func buildKeys() []key[Manifest] {
	type B = BuildKeys
	return []key[Manifest]{
		group("build", "How the image is made.", func(m *Manifest) *B { return &m.Build }, []key[B]{
			choice("builder", "What builds: `go` or `dockerfile`. Without it, Go where there is a go.mod and no `build.dockerfile`, else the Dockerfile.", []string{"go", "dockerfile"},
				func(b *B) *string { return &b.Builder }),
			cleaned(text("dir", "The folder to build, relative to the root: where `go.mod` or the Dockerfile is. Default: the root.", inTree, func(b *B) *string { return &b.Dir }),
				func(b *B) { b.Dir = cleanDir(b.Dir) }),
			cleaned(text("main", "The main package that becomes the web process, such as `./cmd/server`.", inModule, func(b *B) *string { return &b.Main }),
				func(b *B) { b.Main = cleanPackage(b.Main) }),
			cleaned(texts("binaries", "Further main packages to put into the image, for `m3o run`, beside those that processes run.", inModule, func(b *B) *[]string { return &b.Binaries }),
				func(b *B) {
					for i := range b.Binaries {
						b.Binaries[i] = cleanPackage(b.Binaries[i])
					}
				}),
			texts("tags", "Go build tags.", matching(regexp.MustCompile(`[A-Za-z_][A-Za-z0-9_.]*`), "is not a build tag", "write one name an item, such as - netgo"), func(b *B) *[]string { return &b.Tags }),
			text("ldflags", "Flags for the Go linker, beside `-s -w`. `$VERSION`, `$COMMIT` and `$TIME` stand for the first 12 digits of the commit, the commit, and its time.", oneLine, func(b *B) *string { return &b.LDFlags }),
			texts("flags", "`GOFLAGS`: flags for every go command, such as `-tags=x`.", goFlag, func(b *B) *[]string { return &b.Flags }),
			texts("experiment", "`GOEXPERIMENT`: experiments of the Go toolchain.", matching(regexp.MustCompile(`[a-z0-9]+`), "is not an experiment", "write one name an item, such as - jsonv2"), func(b *B) *[]string { return &b.Experiment }),
			flag("test", "`go test ./...` has to pass before the image is released.", func(b *B) *bool { return &b.Test }),
			flag("vet", "`go vet ./...` has to pass before the image is released.", func(b *B) *bool { return &b.Vet }),
			flag("advisories", "The push lists what the Go vulnerability database knows of the modules in the image. It stops nothing.", func(b *B) *bool { return &b.Advisories }),
			texts("files", "Files and folders of the tree that go into the image below `/app`, relative to `build.dir`; `*` matches within a folder. `templates`, `static` and `migrations/*.sql`, for example.", inFiles, func(b *B) *[]string { return &b.Files }),
			texts("private", "`GOPRIVATE`: patterns of module paths that are fetched from their own servers, with the config vars that `build.secrets` names.", matching(regexp.MustCompile(`[A-Za-z0-9*?\[\].~_/-]+`), "is not a pattern of module paths", "write one pattern an item, such as - git.example.com/*"), func(b *B) *[]string { return &b.Private }),
			texts("secrets", "Config vars that the build may read, as secrets: they reach no layer, log or argument list. `NETRC` becomes the file of that name; a Dockerfile mounts them by `RUN --mount=type=secret,id=NAME`.", matching(regexp.MustCompile(`[A-Za-z_][A-Za-z0-9_]*`), "is not the name of a config var", "write one name an item, such as - NETRC"), func(b *B) *[]string { return &b.Secrets }),
			cleaned(text("dockerfile", "Build this Dockerfile instead of Go, relative to `build.dir`.", inTree, func(b *B) *string { return &b.Dockerfile }),
				func(b *B) { b.Dockerfile = path.Clean(b.Dockerfile) }),
			text("target", "The stage of the Dockerfile to build. Default: the last.", matching(regexp.MustCompile(`[A-Za-z0-9._-]+`), "is not the name of a stage", "write the name that follows AS in a FROM line"), func(b *B) *string { return &b.Target }),
			table("args", "Values of the Dockerfile's `ARG` lines. They are recorded: a secret belongs into `build.secrets`.", matching(regexp.MustCompile(`[A-Za-z_][A-Za-z0-9_]*`), "is not the name of an ARG", "use letters, digits and _"), func(b *B) *map[string]string { return &b.Args }),
			cleaned(table("images", "Images that FROM lines name, each with the folder of the repository that holds it as an OCI layout, relative to the root. No registry is asked for them.", matching(regexp.MustCompile(`[a-z0-9][a-z0-9._/:-]*`), "is not the name of an image", "write it as in the FROM line, such as alpine:3.22"), func(b *B) *map[string]string { return &b.Images }),
				func(b *B) {
					for k, v := range b.Images {
						b.Images[k] = path.Clean(v)
					}
				}),
		}),
	}
}

// cleaned is a key whose value is put into its one form once it is read.
func cleaned[T any](k key[T], clean func(*T)) key[T] {
	read := k.read
	k.read = func(f *fields, at string, n *yaml.Node, into *T) {
		if read(f, at, n, into); f.err == nil {
			clean(into)
		}
	}
	return k
}

func leadsOut(v string) bool {
	p := path.Clean(v)
	return path.IsAbs(p) || p == ".." || strings.HasPrefix(p, "../")
}

func inTree(v string) (string, string) {
	if leadsOut(v) {
		return "leads out of the tree", "write a path relative to the root of the repository"
	}
	return "", ""
}

func inModule(v string) (string, string) {
	if leadsOut(v) {
		return "leads out of the module", "write a folder of the module, such as ./cmd/server"
	}
	return "", ""
}

func inFiles(v string) (string, string) {
	if _, err := path.Match(v, "x"); err != nil {
		return "is not a pattern", "* and ? match within a folder; [ has to be closed"
	}
	if p := path.Clean(v); leadsOut(v) || p == ".git" || strings.HasPrefix(p, ".git/") {
		return "leads out of the tree", "name files and folders of the repository, such as - templates"
	}
	return "", ""
}

func oneLine(v string) (string, string) {
	if strings.ContainsAny(v, "\x00\r\n") {
		return "is more than one line", "write all flags in one line"
	}
	return "", ""
}

// Flags that would move the output, or run a program of the repository's
// choice around compilers whose results all apps share.
var refusedFlag = regexp.MustCompile(`^--?(?:o|C|exec|toolexec|overlay|modfile|modcacherw|pkgdir|n|x|json|compiler|buildvcs|mod=mod|work)(?:=.*)?$`)

func goFlag(v string) (string, string) {
	switch {
	case !strings.HasPrefix(v, "-") || strings.ContainsAny(v, " \t\r\n\x00"):
		return "is not a flag", "write one flag an item, such as - -race=false"
	case refusedFlag.MatchString(v):
		return "is not possible in a build here", "remove it; a Dockerfile can do what it does"
	}
	return "", ""
}

func cleanDir(v string) string {
	if p := path.Clean(v); p != "." {
		return p
	}
	return ""
}

func cleanPackage(v string) string {
	if p := path.Clean(v); p != "." {
		return "./" + p
	}
	return "."
}
