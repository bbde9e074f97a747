// Package golang detects Go modules and plans their build: which toolchain,
// which main packages, which process runs which binary. It reads the tree
// only; package build runs the plan.
package golang

import (
	"cmp"
	"context"
	"fmt"
	"io/fs"
	"path"
	"slices"
	"strings"

	"github.com/m3o/m3o"
	"github.com/m3o/m3o/buildpacks"
)

// Detect reports whether dir of the tree looks like Go: it has a go.mod, a
// go.work, or Go files in it or in a folder of cmd. Plan says what is missing.
func Detect(tree fs.FS, dir string) bool {
	if dir == "" {
		dir = "."
	}
	if exists(tree, path.Join(dir, "go.mod")) || exists(tree, path.Join(dir, "go.work")) || hasGo(tree, dir) {
		return true
	}
	return slices.ContainsFunc(subdirs(tree, path.Join(dir, "cmd")), func(d string) bool { return hasGo(tree, d) })
}

// Plan decides what to build and run, by go.mod and what files says.
//
// The main packages considered are the module's root, the folders up to three
// levels below cmd, those that go.mod names by "// +heroku install", and
// build.main of m3o.yaml; if there is none of these, the folders of the root.
// A Procfile decides which of them are built: its commands name binaries as
// "server", "./server" or "bin/server". Without a Procfile the web process is
// build.main; or the only main package; or ./cmd/web, ./cmd/server, the only
// ./cmd/NAME/server, or the root's, the first that exists.
//
// Processes start with one replica each. Errors are of kind Invalid and say
// what to write.
func Plan(ctx context.Context, tree fs.FS, files buildpacks.Files) (*buildpacks.Plan, error) {
	man := files.Manifest.Build
	p := planner{ctx: ctx, tree: tree, man: man, dir: cmp.Or(man.Dir, ".")}
	mod, err := p.readMod()
	if err != nil {
		return nil, err
	}
	p.mod = mod
	p.plan = &buildpacks.Plan{
		Builder:   "go",
		Toolchain: mod.toolchain,
		Dir:       p.dir,
		Processes: map[string]m3o.Process{},
		Vendor:    mod.vendor,
	}
	if exists(tree, path.Join(p.dir, "go.work")) || exists(tree, "go.work") {
		p.note("go.work is ignored: the module in %s is built by itself", p.dir)
	}
	if err := p.findMains(); err != nil {
		return nil, err
	}
	if files.HasProcfile {
		err = p.byProcfile(files.Procfile)
	} else {
		err = p.choose()
	}
	if err != nil {
		return nil, err
	}
	return p.plan, nil
}

type planner struct {
	ctx   context.Context
	tree  fs.FS
	man   buildpacks.BuildKeys
	dir   string // of the module in the tree, "." or slash path
	mod   goModule
	mains []mainPkg
	plan  *buildpacks.Plan
}

// A mainPkg is a folder of the module that holds package main.
type mainPkg struct {
	rel  string // "." or "cmd/web", below the module's root
	name string // of the binary
}

func (m mainPkg) pkg() string {
	if m.rel == "." {
		return "."
	}
	return "./" + m.rel
}

func (p *planner) note(format string, args ...any) {
	p.plan.Notes = append(p.plan.Notes, fmt.Sprintf(format, args...))
}

// target adds m to what is built, once, and returns the path of its binary.
func (p *planner) target(m mainPkg) string {
	t := buildpacks.Target{Name: m.name, Package: m.pkg(), Path: path.Join(buildpacks.AppDir, m.name)}
	if !slices.Contains(p.plan.Targets, t) {
		p.plan.Targets = append(p.plan.Targets, t)
	}
	return t.Path
}

func (p *planner) web(m mainPkg) {
	p.plan.Processes["web"] = m3o.Process{Command: []string{p.target(m)}, Replicas: 1, Port: buildpacks.Port}
	var rest []string
	for _, o := range p.mains {
		if o != m {
			rest = append(rest, o.pkg())
		}
	}
	if len(rest) > 0 && p.man.Main == "" {
		p.note("Running %s as web; a Procfile would run %s too", m.pkg(), list(rest))
	}
}

// choose picks the web process of a tree without a Procfile.
func (p *planner) choose() error {
	if p.man.Main != "" {
		i := slices.IndexFunc(p.mains, func(m mainPkg) bool { return m.pkg() == p.man.Main })
		p.web(p.mains[i]) // findMains has refused a build.main that is none
		return nil
	}
	if len(p.mains) == 1 {
		p.web(p.mains[0])
		return nil
	}
	var nested []mainPkg
	for _, m := range p.mains {
		if ok, _ := path.Match("cmd/*/server", m.rel); ok {
			nested = append(nested, m)
		}
	}
	for _, rel := range []string{"cmd/web", "cmd/server", "cmd/*/server", "."} {
		if rel == "cmd/*/server" && len(nested) == 1 {
			p.web(nested[0])
			return nil
		}
		if i := slices.IndexFunc(p.mains, func(m mainPkg) bool { return m.rel == rel }); i >= 0 {
			p.web(p.mains[i])
			return nil
		}
	}
	var pkgs []string
	for _, m := range p.mains {
		pkgs = append(pkgs, m.pkg())
	}
	return &m3o.Error{Kind: m3o.Invalid,
		Msg:  fmt.Sprintf("there are %d main packages and nothing says which one serves: %s", len(p.mains), list(pkgs)),
		Hint: fmt.Sprintf("commit a file called Procfile with the line:\nweb: ./%s", p.mains[0].name)}
}

func (p *planner) byProcfile(lines []buildpacks.ProcessLine) error {
	if len(lines) == 0 {
		return &m3o.Error{Kind: m3o.Invalid, Msg: "Procfile:1: the file names no process",
			Hint: fmt.Sprintf("write for example: web: ./%s", p.mains[0].name)}
	}
	for _, l := range lines {
		m, err := p.binary(l)
		if err != nil {
			return err
		}
		argv := append([]string{p.target(m)}, l.Command[1:]...)
		switch l.Name {
		case "release":
			p.plan.Release = argv
		case "web":
			p.plan.Processes["web"] = m3o.Process{Command: argv, Replicas: 1, Port: buildpacks.Port}
		default:
			p.plan.Processes[l.Name] = m3o.Process{Command: argv, Replicas: 1}
		}
	}
	if len(p.plan.Processes) == 0 {
		return &m3o.Error{Kind: m3o.Invalid, Msg: "Procfile:1: there is a release command but no process to run",
			Hint: fmt.Sprintf("add for example: web: ./%s", p.mains[0].name)}
	}
	if _, ok := p.plan.Processes["web"]; !ok {
		p.note("The Procfile has no web process: the app will answer no requests")
	}
	return nil
}

// binary finds the main package a Procfile line runs.
func (p *planner) binary(l buildpacks.ProcessLine) (mainPkg, error) {
	name := l.Command[0]
	for _, prefix := range []string{"./", buildpacks.AppDir + "/", "bin/"} {
		name = strings.TrimPrefix(name, prefix)
	}
	var names []string
	var found []mainPkg
	for _, m := range p.mains {
		if m.name == name {
			found = append(found, m)
		}
		names = append(names, m.name)
	}
	switch len(found) {
	case 0:
	case 1:
		return found[0], nil
	default:
		return mainPkg{}, &m3o.Error{Kind: m3o.Invalid, Msg: fmt.Sprintf("Procfile:%d: %s and %s both build a binary called %q", l.Line, found[0].pkg(), found[1].pkg(), name),
			Hint: "rename one of the folders"}
	}
	return mainPkg{}, &m3o.Error{Kind: m3o.Invalid,
		Msg:  fmt.Sprintf("Procfile:%d: no main package builds a binary called %q; there is %s", l.Line, name, list(names)),
		Hint: fmt.Sprintf("write for example: %s: ./%s", l.Name, names[0])}
}

// list joins a few names, and counts the rest.
func list(names []string) string {
	const most = 8
	if len(names) > most {
		return fmt.Sprintf("%s and %d more", strings.Join(names[:most], ", "), len(names)-most)
	}
	return strings.Join(names, ", ")
}
