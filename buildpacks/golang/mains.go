package golang

import (
	"errors"
	"fmt"
	"go/build"
	"io"
	"io/fs"
	"path"
	"regexp"
	goruntime "runtime"
	"slices"
	"strings"

	"github.com/m3o/m3o"
	"github.com/m3o/m3o/buildpacks"
)

// maxDirs bounds how many folders are looked into for main packages.
const maxDirs = 500

// findMains fills p.mains, sorted by folder. At least one is there after a nil return.
func (p *planner) findMains() error {
	for _, m := range p.modules {
		if err := p.mainsOf(m); err != nil {
			return err
		}
	}
	if p.man.Main != "" && !slices.ContainsFunc(p.mains, func(m mainPkg) bool { return m.pkg() == p.man.Main }) {
		return &m3o.Error{Kind: m3o.Invalid, Msg: fmt.Sprintf("m3o.yaml: build.main %s is not a main package", p.man.Main),
			Hint: "name a folder whose Go files begin with: package main"}
	}
	if len(p.mains) > 0 {
		return nil
	}
	for _, m := range p.modules {
		if err := p.keepMains(m, p.children(m.rel)); err != nil {
			return err
		}
	}
	if len(p.mains) == 0 {
		return &m3o.Error{Kind: m3o.Invalid, Msg: "no main package: there is nothing to run", Err: ErrNotGo,
			Hint: "write package main with func main in the root or in ./cmd/web, or name its folder in m3o.yaml as build.main"}
	}
	return nil
}

// mainsOf looks where main packages of a module usually are.
func (p *planner) mainsOf(m goModule) error {
	var rels []string
	add := func(rel string) {
		if !slices.Contains(rels, rel) && len(rels) < maxDirs {
			rels = append(rels, rel)
		}
	}
	add(m.rel)
	p.below(path.Join(m.rel, "cmd"), 3, add)
	for _, pattern := range m.install {
		rel, all := strings.CutSuffix(path.Clean(pattern), "...")
		rel = path.Join(m.rel, rel)
		if !fs.ValidPath(rel) {
			continue // go install would not find it either; "nothing to build" says so later
		}
		add(rel)
		if all {
			p.below(rel, 4, add)
		}
	}
	for _, pkg := range append([]string{p.man.Main}, p.man.Binaries...) {
		if rel := path.Clean(pkg); pkg != "" && p.moduleOf(rel).rel == m.rel {
			add(rel)
		}
	}
	return p.keepMains(m, rels)
}

// moduleOf is the module a folder belongs to: the innermost that holds it.
func (p *planner) moduleOf(rel string) goModule {
	best := p.modules[0]
	for _, m := range p.modules {
		if _, below := strings.CutPrefix(rel+"/", m.rel+"/"); (below || m.rel == ".") && len(m.rel) >= len(best.rel) {
			best = m
		}
	}
	return best
}

func (p *planner) keepMains(m goModule, rels []string) error {
	for _, rel := range rels {
		if err := p.ctx.Err(); err != nil {
			return err
		}
		ok, err := p.isMain(rel)
		if err != nil {
			return err
		}
		if ok {
			p.mains = append(p.mains, mainPkg{rel: rel, name: binaryName(path.Join(m.path, within(m.rel, rel)))})
		}
	}
	return nil
}

// ErrNotGo is wrapped by the errors of Plan after which another way to build
// the tree may do, where there is one.
var ErrNotGo = errors.New("not for Go alone")

func within(dir, rel string) string {
	if rel == dir {
		return "."
	}
	return strings.TrimPrefix(rel, dir+"/")
}

var majorVersion = regexp.MustCompile(`^v[0-9]+$`)

// binaryName is what go build calls the binary of an import path.
func binaryName(importPath string) string {
	base := path.Base(importPath)
	if majorVersion.MatchString(base) && path.Dir(importPath) != "." {
		base = path.Base(path.Dir(importPath))
	}
	return base
}

// below calls add for the folders below rel that may hold packages of this module.
func (p *planner) below(rel string, depth int, add func(string)) {
	if depth == 0 {
		return
	}
	for _, d := range p.children(rel) {
		add(d)
		p.below(d, depth-1, add)
	}
}

// children lists the folders of rel as the go command sees them: not testdata,
// not vendor, nothing that begins with . or _, no other module.
func (p *planner) children(rel string) []string {
	var out []string
	for _, full := range subdirs(p.tree, path.Join(p.dir, rel)) {
		if !exists(p.tree, path.Join(full, "go.mod")) {
			out = append(out, path.Join(rel, path.Base(full)))
		}
	}
	return out
}

func subdirs(tree fs.FS, dir string) []string {
	des, err := fs.ReadDir(tree, dir)
	if err != nil {
		return nil
	}
	var out []string
	for _, de := range des {
		n := de.Name()
		if de.IsDir() && n != "testdata" && n != "vendor" && n[0] != '.' && n[0] != '_' {
			out = append(out, path.Join(dir, n))
		}
	}
	return out
}

func hasGo(tree fs.FS, dir string) bool {
	des, _ := fs.ReadDir(tree, dir)
	return slices.ContainsFunc(des, func(de fs.DirEntry) bool { return !de.IsDir() && strings.HasSuffix(de.Name(), ".go") })
}

// isMain asks go/build, which knows build constraints, whether the folder
// holds package main for the target. The error is about cgo.
func (p *planner) isMain(rel string) (bool, error) {
	dir := path.Join(p.dir, rel)
	if !hasGo(p.tree, dir) {
		return false, nil
	}
	pure := p.imported(dir, false)
	with := p.imported(dir, true)
	if with.isMain && len(with.cgo) > 0 && !slices.ContainsFunc(pure.files, func(f string) bool { return !slices.Contains(with.files, f) }) {
		// No file takes the place of the ones that import "C".
		return false, &m3o.Error{Kind: m3o.Invalid, Msg: fmt.Sprintf("%s imports \"C\", and Go builds here have no C compiler", path.Join(rel, with.cgo[0])), Err: ErrNotGo,
			Hint: "use a package written in Go, or guard the file by //go:build cgo beside one for !cgo; or commit a Dockerfile that has a C compiler and name it in m3o.yaml as build.dockerfile"}
	}
	return pure.isMain, nil
}

type imported struct {
	isMain     bool
	files, cgo []string
}

func (p *planner) imported(dir string, cgo bool) imported {
	c := build.Default
	c.GOOS, c.GOARCH, c.CgoEnabled = "linux", goruntime.GOARCH, cgo
	c.GOROOT, c.GOPATH, c.Dir = "", "", ""
	c.BuildTags = append(c.BuildTags, p.man.Tags...)
	c.JoinPath = path.Join
	c.IsAbsPath = path.IsAbs
	c.SplitPathList = func(string) []string { return nil }
	c.HasSubdir = func(string, string) (string, bool) { return "", false }
	at := func(name string) string { return path.Join(".", strings.TrimPrefix(name, "/")) }
	c.IsDir = func(name string) bool {
		fi, err := fs.Stat(p.tree, at(name))
		return err == nil && fi.IsDir()
	}
	c.ReadDir = func(name string) ([]fs.FileInfo, error) {
		des, err := fs.ReadDir(p.tree, at(name))
		if err != nil {
			return nil, err
		}
		var fis []fs.FileInfo
		for _, de := range des {
			fi, err := de.Info()
			if err != nil {
				return nil, err
			}
			fis = append(fis, fi)
		}
		return fis, nil
	}
	c.OpenFile = func(name string) (io.ReadCloser, error) { return p.tree.Open(at(name)) }
	pkg, err := c.ImportDir("/"+dir, 0)
	if _, none := errors.AsType[*build.NoGoError](err); none || pkg == nil {
		return imported{}
	}
	out := imported{isMain: pkg.Name == "main" && len(pkg.GoFiles)+len(pkg.CgoFiles) > 0, files: pkg.GoFiles, cgo: pkg.CgoFiles}
	if err != nil && !out.isMain {
		// A file go/build cannot read: if it means to be package main, the
		// compiler tells what is wrong with it better than "no main package".
		out.isMain = p.claimsMain(dir)
	}
	return out
}

var packageMain = regexp.MustCompile(`(?m)^package main\b`)

func (p *planner) claimsMain(dir string) bool {
	des, _ := fs.ReadDir(p.tree, dir)
	for _, de := range des {
		if n := de.Name(); strings.HasSuffix(n, ".go") && !strings.HasSuffix(n, "_test.go") {
			if b, err := buildpacks.ReadSmall(p.tree, path.Join(dir, n)); err == nil && packageMain.Match(b) {
				return true
			}
		}
	}
	return false
}
