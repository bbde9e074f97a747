package golang

import (
	"errors"
	"fmt"
	goversion "go/version"
	"io/fs"
	"path"
	"regexp"
	"strings"

	"github.com/m3o/m3o"
	"github.com/m3o/m3o/buildpacks"
	"golang.org/x/mod/modfile"
	"golang.org/x/mod/module"
)

// goModule is what a go.mod says, as far as a build is concerned.
type goModule struct {
	rel       string // its folder below what is built, "." or slash path
	path      string
	toolchain string   // oldest that will do, "go1.26" or "go1.26.3"
	install   []string // package patterns of "// +heroku install"
	vendor    bool
}

func exists(tree fs.FS, name string) bool {
	_, err := fs.Stat(tree, name)
	return err == nil
}

// readMod reads the go.mod of a folder of the tree.
func (p *planner) readMod(dir string) (goModule, error) {
	name := path.Join(dir, "go.mod")
	b, err := buildpacks.ReadSmall(p.tree, name)
	if errors.Is(err, fs.ErrNotExist) {
		return goModule{}, p.noMod()
	}
	if err != nil {
		return goModule{}, err
	}
	m, replaced, err := parseMod(name, b)
	if err != nil {
		return m, err
	}
	m.rel, _ = strings.CutPrefix(dir, p.dir+"/")
	if dir == p.dir {
		m.rel = "."
	}
	m.vendor = exists(p.tree, path.Join(dir, "vendor/modules.txt"))
	if m.vendor {
		return m, nil // with vendored packages replaced folders are not read
	}
	for _, r := range replaced {
		to := path.Join(dir, r.dir)
		if path.IsAbs(r.dir) || !fs.ValidPath(to) || !exists(p.tree, path.Join(to, "go.mod")) {
			return m, &m3o.Error{Kind: m3o.Invalid, Msg: fmt.Sprintf("%s:%d: replaces %s by %s, which is not a module in this repository", name, r.line, r.old, r.dir),
				Hint: "remove the replace line and require a published version, or commit the module and use a relative path"}
		}
	}
	return m, nil
}

// A replacement is a "replace old => dir" line.
type replacement struct {
	old, dir string
	line     int
}

// parseMod reads a go.mod; name is what errors call it.
func parseMod(name string, b []byte) (goModule, []replacement, error) {
	f, err := modfile.Parse(name, b, nil)
	if err != nil {
		// The parser names file and line itself; one fault is enough to go on with.
		first, _, _ := strings.Cut(err.Error(), "\n")
		return goModule{}, nil, &m3o.Error{Kind: m3o.Invalid, Msg: first, Hint: "run go mod tidy and commit go.mod and go.sum", Err: err}
	}
	if f.Module == nil {
		return goModule{}, nil, &m3o.Error{Kind: m3o.Invalid, Msg: name + ":1: no module line", Hint: "write for example: module example.com/hello"}
	}
	m := goModule{path: f.Module.Mod.Path, toolchain: "go1.16"} // what go takes a file without a go line for
	if err := module.CheckImportPath(m.path); err != nil {
		return m, nil, &m3o.Error{Kind: m3o.Invalid, Msg: fmt.Sprintf("%s:%d: %v", name, f.Module.Syntax.Start.Line, err), Hint: "write for example: module example.com/hello", Err: err}
	}
	atLeast := func(v string) {
		if goversion.IsValid(v) && goversion.Compare(v, m.toolchain) > 0 {
			m.toolchain = v
		}
	}
	if f.Go != nil {
		m.toolchain = "go" + f.Go.Version
	}
	if f.Toolchain != nil {
		v, _, _ := strings.Cut(f.Toolchain.Name, "-") // a vendor's suffix names no other language
		atLeast(v)
	}
	for line := range strings.SplitSeq(string(b), "\n") {
		d := heroku.FindStringSubmatch(strings.TrimSpace(line))
		switch {
		case d == nil:
		case d[1] == "install":
			m.install = append(m.install, strings.Fields(d[2])...)
		case d[1] == "goVersion":
			atLeast("go" + strings.TrimPrefix(strings.TrimSpace(d[2]), "go"))
		}
	}
	var rs []replacement
	for _, r := range f.Replace {
		if r.New.Version == "" {
			rs = append(rs, replacement{old: r.Old.Path, dir: r.New.Path, line: r.Syntax.Start.Line})
		}
	}
	return m, rs, nil
}

// heroku matches the directives of Heroku's Go buildpack that mean something here.
var heroku = regexp.MustCompile(`^//\s*\+heroku\s+(install|goVersion)\s+(.+)$`)

// noMod explains a missing go.mod by what is there instead.
func (p *planner) noMod() error {
	where := "the root of the repository"
	if p.dir != "." {
		where = p.dir
	}
	for _, d := range subdirs(p.tree, p.dir) {
		for _, at := range append([]string{d}, subdirs(p.tree, d)...) {
			if exists(p.tree, path.Join(at, "go.mod")) {
				return &m3o.Error{Kind: m3o.Invalid, Msg: fmt.Sprintf("no go.mod in %s; there is one in %s", where, at), Err: ErrNotGo,
					Hint: "commit a file called m3o.yaml with:\nbuild:\n  dir: " + at}
			}
		}
	}
	return &m3o.Error{Kind: m3o.Invalid, Msg: "no go.mod in " + where, Err: ErrNotGo,
		Hint: "run: go mod init example.com/hello && go mod tidy, and commit go.mod and go.sum"}
}
