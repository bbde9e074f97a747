package daemon

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"

	"github.com/m3o/m3o"
	"github.com/m3o/m3o/buildpacks"
	"github.com/m3o/m3o/buildpacks/build"
	"github.com/m3o/m3o/buildpacks/dockerfile"
	"github.com/m3o/m3o/buildpacks/golang"
	"github.com/m3o/m3o/buildpacks/source"
	"github.com/m3o/m3o/config"
)

// plan reads the tree's own files, once a deploy, and asks the buildpack they
// or the tree call for. What the files say of running the image goes into the
// plan here, for every builder alike.
func (d *Daemon) plan(ctx context.Context, tree *source.Tree) (*buildpacks.Plan, error) {
	files, err := buildpacks.ReadFiles(tree)
	if err != nil {
		return nil, err
	}
	if _, err := declaredSchedules(files); err != nil {
		return nil, err // before it is built
	}
	plan, err := planBy(ctx, tree, files)
	if err != nil {
		return nil, err
	}
	return plan, files.Apply(plan)
}

// planBy picks the builder: the one m3o.yaml names; else Go, if the tree looks
// like it and Go alone can build it; else the Dockerfile, if there is one.
func planBy(ctx context.Context, tree *source.Tree, files buildpacks.Files) (*buildpacks.Plan, error) {
	b := files.Manifest.Build
	docker := dockerfile.Detect(tree, b.Dir)
	switch {
	case b.Builder == "dockerfile", b.Builder == "" && b.Dockerfile != "":
		return dockerfile.Plan(ctx, tree, files)
	case b.Builder == "" && docker && !golang.Detect(tree, b.Dir):
		return dockerfile.Plan(ctx, tree, files)
	}
	plan, err := golang.Plan(ctx, tree, files)
	if b.Builder != "" || !docker {
		return plan, err
	}
	if errors.Is(err, golang.ErrNotGo) {
		why := err.Error()
		if plan, err = dockerfile.Plan(ctx, tree, files); err == nil {
			plan.Notes = append(plan.Notes, "Using the Dockerfile: "+why)
		}
		return plan, err
	}
	if err == nil {
		plan.Notes = append(plan.Notes, "There is a Dockerfile too; with build.builder: dockerfile in m3o.yaml it is used")
	}
	return plan, err
}

// buildSecrets are the config vars that a plan's build reads.
func (d *Daemon) buildSecrets(ctx context.Context, app string, plan *buildpacks.Plan) (map[string]m3o.Secret, error) {
	if len(plan.Secrets) == 0 {
		return nil, nil
	}
	rev, err := d.config.Current(ctx, app)
	if err != nil {
		return nil, err
	}
	env, err := d.config.Env(ctx, app, rev.Number)
	if err != nil {
		return nil, err
	}
	out := map[string]m3o.Secret{}
	for _, name := range plan.Secrets {
		i := slices.IndexFunc(env, func(e string) bool { return strings.HasPrefix(e, name+"=") })
		if i < 0 {
			return nil, &m3o.Error{Kind: m3o.Invalid, Msg: fmt.Sprintf("%s: build.secrets names %s, which the app's config does not have", buildpacks.ManifestName, name),
				Hint: fmt.Sprintf("m3o config:set %s=… -a %s", name, app)}
		}
		out[name] = m3o.Secret(strings.TrimPrefix(env[i], name+"="))
	}
	return out, nil
}

// registries is the app's config var with the passwords of registries, "" without one.
func (d *Daemon) registries(ctx context.Context, app string) (m3o.Secret, error) {
	rev, err := d.config.Current(ctx, app)
	if err != nil {
		return "", err
	}
	env, err := d.config.Env(ctx, app, rev.Number)
	if err != nil {
		return "", err
	}
	for _, e := range env {
		if v, ok := strings.CutPrefix(e, build.RegistryVar+"="); ok {
			return m3o.Secret(v), nil
		}
	}
	return "", nil
}

// askedEnv sees to the config vars that app.json asks for: a secret it wants
// made is made, and one that is required and has no value refuses the deploy.
func (d *Daemon) askedEnv(ctx context.Context, app, user string, plan *buildpacks.Plan) error {
	asked := plan.Files.App.Env
	if len(asked) == 0 {
		return nil
	}
	rev, err := d.config.Current(ctx, app)
	if err != nil {
		return err
	}
	var made []config.Var
	for _, name := range slices.Sorted(maps.Keys(asked)) {
		e := asked[name]
		if e.Value != "" || slices.ContainsFunc(rev.Vars, func(v config.Var) bool { return v.Name == name }) {
			continue
		}
		switch {
		case e.Generate:
			made = append(made, config.Var{Name: name, Value: m3o.Secret(rand.Text() + rand.Text()), Secret: true})
		case e.Required:
			about := ""
			if e.Description != "" {
				about = " (" + e.Description + ")"
			}
			return &m3o.Error{Kind: m3o.Invalid, Msg: fmt.Sprintf("%s:%d: the app needs %s%s, and its config does not have it", buildpacks.AppJSONName, e.Line, name, about),
				Hint: fmt.Sprintf("m3o config:set %s=… -a %s", name, app)}
		}
	}
	if len(made) == 0 {
		return nil
	}
	_, err = d.config.Change(ctx, app, user, made, nil)
	return err
}
