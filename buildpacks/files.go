package buildpacks

import (
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/m3o/m3o"
)

// Files are the three files by which a tree says how to build and run it, read
// once a deploy and the same for every builder.
type Files struct {
	Manifest    Manifest
	Procfile    []ProcessLine // nil without the file
	App         AppJSON
	HasProcfile bool // the tree has one, if only an empty one
}

// ReadFiles reads them from the root of tree. Those that are not there are zero.
func ReadFiles(tree fs.FS) (Files, error) {
	var f Files
	err := errors.Join(
		readFile(tree, ManifestName, func(b []byte) (err error) { f.Manifest, err = ParseManifest(ManifestName, b); return err }),
		readFile(tree, ProcfileName, func(b []byte) (err error) { f.Procfile, err = ParseProcfile(b); f.HasProcfile = true; return err }),
		readFile(tree, AppJSONName, func(b []byte) (err error) { f.App, err = ParseAppJSON(b); return err }),
	)
	if e, ok := errors.AsType[*m3o.Error](err); ok {
		return f, e // the first; its hint is for it alone
	}
	return f, err
}

func readFile(tree fs.FS, name string, parse func([]byte) error) error {
	b, err := ReadSmall(tree, name)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	return parse(b)
}

const maxSmall = 1 << 20

// ReadSmall reads a file that a person wrote, at most 1 MB of it.
func ReadSmall(tree fs.FS, name string) ([]byte, error) {
	fi, err := fs.Stat(tree, name)
	if err != nil {
		return nil, err
	}
	if fi.IsDir() {
		return nil, m3o.Errorf(m3o.Invalid, "%s is a folder, not a file", name)
	}
	if fi.Size() > maxSmall {
		return nil, m3o.Errorf(m3o.Invalid, "%s is larger than 1 MB", name)
	}
	return fs.ReadFile(tree, name)
}

// A Command is one that a file asks for besides the Procfile's.
type Command struct {
	Where string // "app.json:12"
	Argv  []string
}

// Commands are those whose program has to be in the image although no process
// type runs it.
func (f Files) Commands() []Command {
	var out []Command
	if len(f.App.Postdeploy) > 0 {
		out = append(out, Command{AppJSONName, f.App.Postdeploy})
	}
	for _, s := range f.Manifest.Schedules {
		if s.Action == "run" {
			out = append(out, Command{ManifestName + ": schedules." + s.Name, s.Args})
		}
	}
	for _, c := range f.App.Cron {
		out = append(out, Command{fmt.Sprintf("%s:%d", AppJSONName, c.Line), c.Command})
	}
	return out
}

// Apply puts into a builder's plan what the files say of how to run the image.
// m3o.yaml goes before app.json.
func (f Files) Apply(p *Plan) error {
	p.Files = f
	p.Health = f.Manifest.Health
	if p.Health.Kind == "" {
		p.Health = f.App.health(p.Health)
	}
	unknown := func(where, name string) error {
		return &m3o.Error{Kind: m3o.Invalid, Msg: fmt.Sprintf("%s names %s, which is no process type of the app", where, name),
			Hint: "the process types are " + strings.Join(slices.Sorted(maps.Keys(p.Processes)), ", ") + "; a Procfile adds more"}
	}
	for _, name := range slices.Sorted(maps.Keys(f.App.Formation)) {
		q := f.App.Formation[name].Quantity - 1
		proc, ok := p.Processes[name]
		if !ok {
			return unknown(AppJSONName+": formation", name)
		}
		if q >= 0 {
			proc.Replicas = q
			p.Processes[name] = proc
		}
	}
	if err := f.Manifest.Run.apply(p, func(name string) error { return unknown(ManifestName+": processes", name) }); err != nil {
		return err
	}
	for name, e := range f.App.Env {
		if e.Value == "" {
			continue
		}
		if p.Env == nil {
			p.Env = map[string]string{}
		}
		if _, ok := p.Env[name]; !ok {
			p.Env[name] = e.Value
		}
	}
	if len(f.App.Cron) > 0 {
		p.Notes = append(p.Notes, AppJSONName+": cron is not taken over by itself; m3o schedules:add runs the commands")
	}
	if len(f.App.Postdeploy) > 0 {
		p.Notes = append(p.Notes, AppJSONName+": scripts.postdeploy is not run by itself; a release line in the Procfile is")
	}
	for _, k := range f.App.Unused {
		p.Notes = append(p.Notes, AppJSONName+": "+k+" has no effect here")
	}
	return nil
}

// health is the check of the web process in m3o's terms.
func (a AppJSON) health(h m3o.Health) m3o.Health {
	for _, c := range a.Checks["web"] {
		if l := &h.Liveness; c.Type == "liveness" && l.Kind == "" && (c.Path != "" || c.Listening) {
			l.Kind, l.Path, l.Failures = "http", c.Path, c.Attempts
			if c.Path == "" {
				l.Kind = "tcp"
			}
			l.Period, l.Answer = time.Duration(c.Wait)*time.Second, time.Duration(c.Timeout)*time.Second
		}
	}
	for _, c := range a.Checks["web"] {
		switch {
		case c.Type == "liveness":
			continue
		case c.Path != "":
			h.Kind, h.Path = "http", c.Path
		case c.Listening:
			h.Kind = "tcp"
		default:
			continue
		}
		if tries := max(c.Attempts, 1) * (c.Wait + c.Timeout); tries > 0 && h.Timeout == 0 {
			h.Timeout = time.Duration(c.InitialDelay+tries) * time.Second
		}
		return h
	}
	return h
}
