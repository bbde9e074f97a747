// Package dockerfile plans the build of a tree by its Dockerfile. It reads the
// tree only; package build runs the plan.
package dockerfile

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"path"
	"slices"

	"github.com/m3o/m3o"
	"github.com/m3o/m3o/buildpacks"
)

// Name is the file that is built unless m3o.yaml names another.
const Name = "Dockerfile"

// Detect reports whether the folder to build has a Dockerfile.
func Detect(tree fs.FS, dir string) bool {
	fi, err := fs.Stat(tree, path.Join(dir, Name))
	return err == nil && fi.Mode().IsRegular()
}

// Plan reads what files says of the Dockerfile. Without a Procfile the image's
// own command is the web process; with one its commands are run as they are,
// in the place of the image's.
func Plan(_ context.Context, tree fs.FS, files buildpacks.Files) (*buildpacks.Plan, error) {
	b := files.Manifest.Build
	file := path.Join(b.Dir, cmp.Or(b.Dockerfile, Name))
	if _, err := buildpacks.ReadSmall(tree, file); errors.Is(err, fs.ErrNotExist) {
		return nil, &m3o.Error{Kind: m3o.Invalid, Msg: "there is no " + file + " in the repository",
			Hint: "commit it, or correct build.dir and build.dockerfile in " + buildpacks.ManifestName}
	} else if err != nil {
		return nil, err
	}
	plan := &buildpacks.Plan{
		Builder:   "dockerfile",
		Dir:       cmp.Or(b.Dir, "."),
		Processes: map[string]m3o.Process{},
		Docker:    buildpacks.Docker{File: file, Target: b.Target, Args: b.Args, Images: b.Images},
		Secrets:   b.Secrets,
	}
	for _, k := range []struct {
		name string
		set  bool
	}{{"main", b.Main != ""}, {"tags", len(b.Tags) > 0}, {"ldflags", b.LDFlags != ""}, {"flags", len(b.Flags) > 0}, {"experiment", len(b.Experiment) > 0},
		{"test", b.Test}, {"vet", b.Vet}, {"files", len(b.Files) > 0}, {"private", len(b.Private) > 0}, {"binaries", len(b.Binaries) > 0}} {
		if k.set {
			return nil, &m3o.Error{Kind: m3o.Invalid, Msg: fmt.Sprintf("%s: build.%s is for Go, but %s is what is built", buildpacks.ManifestName, k.name, file),
				Hint: "do it in the Dockerfile and remove the key, or set build.builder to go"}
		}
	}
	if !files.HasProcfile {
		plan.Processes["web"] = m3o.Process{Replicas: 1, Port: buildpacks.Port}
		return plan, nil
	}
	for _, l := range files.Procfile {
		switch l.Name {
		case "release":
			plan.Release = l.Command
		case "web":
			plan.Processes["web"] = m3o.Process{Command: l.Command, Replicas: 1, Port: buildpacks.Port}
		default:
			plan.Processes[l.Name] = m3o.Process{Command: l.Command, Replicas: 1}
		}
	}
	if len(plan.Processes) == 0 {
		return nil, &m3o.Error{Kind: m3o.Invalid, Msg: "Procfile:1: the file names no process to run", Hint: "add for example: web: ./server"}
	}
	if !slices.ContainsFunc(files.Procfile, func(l buildpacks.ProcessLine) bool { return l.Name == "web" }) {
		plan.Notes = append(plan.Notes, "The Procfile has no web process: the app will answer no requests")
	}
	return plan, nil
}
