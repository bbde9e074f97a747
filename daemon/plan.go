package daemon

import (
	"context"

	"github.com/m3o/m3o/buildpacks"
	"github.com/m3o/m3o/buildpacks/golang"
	"github.com/m3o/m3o/buildpacks/source"
)

// plan reads the tree's own files, once a deploy, and asks the buildpack they
// or the tree call for. What the files say of running the image goes into the
// plan here, for every builder alike.
func (d *Daemon) plan(ctx context.Context, tree *source.Tree) (*buildpacks.Plan, error) {
	files, err := buildpacks.ReadFiles(tree)
	if err != nil {
		return nil, err
	}
	plan, err := golang.Plan(ctx, tree, files)
	if err != nil {
		return nil, err
	}
	return plan, files.Apply(plan)
}
