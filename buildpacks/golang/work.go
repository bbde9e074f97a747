package golang

import (
	"errors"
	"fmt"
	goversion "go/version"
	"io/fs"
	"path"
	"strings"

	"github.com/m3o/m3o"
	"github.com/m3o/m3o/buildpacks"
	"golang.org/x/mod/modfile"
)

// A workspace is what a go.work says.
type workspace struct {
	file      string   // in the tree, "" for none
	dir       string   // of file
	uses      []string // folders of modules, in the tree
	toolchain string
}

// findWork looks for go.work from the build's folder upwards, as the go command does.
func (p *planner) findWork() error {
	for dir := p.dir; ; dir = path.Dir(dir) {
		file := path.Join(dir, "go.work")
		b, err := buildpacks.ReadSmall(p.tree, file)
		switch {
		case err == nil:
			p.work, err = parseWork(p.tree, file, b)
			return err
		case !errors.Is(err, fs.ErrNotExist):
			return err
		case dir == ".":
			return nil
		}
	}
}

func parseWork(tree fs.FS, file string, b []byte) (workspace, error) {
	f, err := modfile.ParseWork(file, b, nil)
	if err != nil {
		first, _, _ := strings.Cut(err.Error(), "\n")
		return workspace{}, &m3o.Error{Kind: m3o.Invalid, Msg: first, Hint: "run go work sync and commit go.work", Err: err}
	}
	w := workspace{file: file, dir: path.Dir(file), toolchain: "go1.18"}
	for _, u := range f.Use {
		dir := path.Join(w.dir, u.Path)
		if path.IsAbs(u.Path) || !fs.ValidPath(dir) || !exists(tree, path.Join(dir, "go.mod")) {
			return w, &m3o.Error{Kind: m3o.Invalid, Msg: fmt.Sprintf("%s:%d: uses %s, which is not a module in this repository", file, u.Syntax.Start.Line, u.Path),
				Hint: "remove the line, or commit the module"}
		}
		w.uses = append(w.uses, dir)
	}
	if f.Go != nil && goversion.IsValid("go"+f.Go.Version) {
		w.toolchain = "go" + f.Go.Version
	}
	if f.Toolchain != nil {
		if v, _, _ := strings.Cut(f.Toolchain.Name, "-"); goversion.IsValid(v) && goversion.Compare(v, w.toolchain) > 0 {
			w.toolchain = v
		}
	}
	return w, nil
}

// modules are what the build looks for main packages in: the module of the
// build's folder, or every one of the workspace when go.work is there instead.
func (p *planner) readModules() error {
	if err := p.findWork(); err != nil {
		return err
	}
	dirs := []string{p.dir}
	if p.work.dir == p.dir && p.work.file != "" && !exists(p.tree, path.Join(p.dir, "go.mod")) {
		if dirs = p.work.uses; len(dirs) == 0 {
			return &m3o.Error{Kind: m3o.Invalid, Msg: p.work.file + ":1: the workspace uses no module", Hint: "run go work use -r . and commit go.work"}
		}
	}
	for _, dir := range dirs {
		m, err := p.readMod(dir)
		if err != nil {
			return err
		}
		p.modules = append(p.modules, m)
		p.plan.Toolchain = later(p.plan.Toolchain, m.toolchain)
		p.plan.Vendor = p.plan.Vendor || m.vendor
	}
	for _, u := range p.work.uses {
		if u == dirs[0] || len(dirs) > 1 {
			p.plan.Go.Work, p.plan.Go.Modules = p.work.file, p.work.uses
		}
	}
	if p.plan.Go.Work == "" {
		if p.work.file != "" {
			p.note("%s does not use %s, which is built by itself", p.work.file, p.dir)
		}
		return nil
	}
	p.plan.Toolchain = later(p.plan.Toolchain, p.work.toolchain)
	p.plan.Vendor = exists(p.tree, path.Join(p.work.dir, "vendor/modules.txt"))
	return nil
}

func later(a, b string) string {
	if a == "" || goversion.Compare(b, a) > 0 {
		return b
	}
	return a
}
