// Package golang detects Go modules and plans their build: which toolchain,
// which main packages, which process runs which binary. It reads the tree
// only; package build runs the plan.
package golang

import (
	"cmp"
	"context"
	"errors"
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
// ./cmd/NAME/server, or the root's, the first that exists; beside it
// ./cmd/worker, if there is one, runs as worker.
//
// In a folder with go.work and no go.mod the whole workspace is built;
// elsewhere a go.work above that uses the module applies, as for the go command.
//
// Processes start with one replica each. Errors are of kind Invalid and say
// what to write.
func Plan(ctx context.Context, tree fs.FS, files buildpacks.Files) (*buildpacks.Plan, error) {
	man := files.Manifest.Build
	p := planner{ctx: ctx, tree: tree, man: man, dir: cmp.Or(man.Dir, ".")}
	p.plan = &buildpacks.Plan{
		Builder:   "go",
		Dir:       p.dir,
		Processes: map[string]m3o.Process{},
		Go:        buildpacks.Go{Tags: man.Tags, LDFlags: man.LDFlags, Flags: man.Flags, Experiment: man.Experiment, Test: man.Test, Vet: man.Vet},
		Copy:      man.Files,
		Private:   man.Private,
		Secrets:   man.Secrets,
	}
	if err := p.readModules(); err != nil {
		return nil, err
	}
	if err := p.findMains(); err != nil {
		return nil, err
	}
	decide := p.choose
	if files.HasProcfile {
		decide = func() error { return p.byProcfile(files.Procfile) }
	}
	if err := errors.Join(decide(), p.extra(files.Commands())); err != nil {
		if e, ok := errors.AsType[*m3o.Error](err); ok {
			return nil, e
		}
		return nil, err
	}
	p.plan.Go.LDFlags = strings.TrimSpace(p.stamp() + " " + man.LDFlags)
	return p.plan, nil
}

type planner struct {
	ctx     context.Context
	tree    fs.FS
	man     buildpacks.BuildKeys
	dir     string // what is built, in the tree, "." or slash path
	work    workspace
	modules []goModule // one, or those of the workspace
	mains   []mainPkg
	plan    *buildpacks.Plan
}

// A mainPkg is a folder of a module that holds package main.
type mainPkg struct {
	rel  string // "." or "cmd/web", below what is built
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

// extra builds what further commands of the tree's files run, and what
// build.binaries names.
func (p *planner) extra(cmds []buildpacks.Command) error {
	for _, c := range cmds {
		m, err := p.binary(c.Where, "", c.Argv[0])
		if err != nil {
			return err
		}
		p.target(m)
	}
	for _, pkg := range p.man.Binaries {
		i := slices.IndexFunc(p.mains, func(m mainPkg) bool { return m.pkg() == pkg })
		if i < 0 {
			return &m3o.Error{Kind: m3o.Invalid, Msg: fmt.Sprintf("m3o.yaml: build.binaries has %s, which is not a main package", pkg),
				Hint: "name folders whose Go files begin with: package main"}
		}
		p.target(p.mains[i])
	}
	var names []string
	for _, t := range p.plan.Targets {
		if slices.Contains(names, t.Name) {
			return &m3o.Error{Kind: m3o.Invalid, Msg: fmt.Sprintf("two main packages build a binary called %q", t.Name), Hint: "rename the folder of one of them"}
		}
		names = append(names, t.Name)
	}
	return nil
}

// web has m run as web and, if it is there, ./cmd/worker as worker.
func (p *planner) web(m mainPkg) {
	p.plan.Processes["web"] = m3o.Process{Command: []string{p.target(m)}, Replicas: 1, Port: buildpacks.Port}
	var rest []string
	for _, o := range p.mains {
		switch {
		case o == m:
		case o.rel == "cmd/worker" && p.man.Main == "":
			p.plan.Processes["worker"] = m3o.Process{Command: []string{p.target(o)}, Replicas: 1}
			p.note("Running ./cmd/worker as worker")
		default:
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
		m, err := p.binary(fmt.Sprintf("Procfile:%d", l.Line), l.Name+": ", l.Command[0])
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

// binary finds the main package that a command runs. Errors name where the
// command is; as stands before it in an example.
func (p *planner) binary(where, as, name string) (mainPkg, error) {
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
		return mainPkg{}, &m3o.Error{Kind: m3o.Invalid, Msg: fmt.Sprintf("%s: %s and %s both build a binary called %q", where, found[0].pkg(), found[1].pkg(), name),
			Hint: "rename one of the folders"}
	}
	return mainPkg{}, &m3o.Error{Kind: m3o.Invalid,
		Msg:  fmt.Sprintf("%s: no main package builds a binary called %q; there is %s", where, name, list(names)),
		Hint: fmt.Sprintf("write for example: %s./%s", as, names[0])}
}

// list joins a few names, and counts the rest.
func list(names []string) string {
	const most = 8
	if len(names) > most {
		return fmt.Sprintf("%s and %d more", strings.Join(names[:most], ", "), len(names)-most)
	}
	return strings.Join(names, ", ")
}
