package daemon

import (
	"context"
	"fmt"

	"github.com/m3o/m3o"
	"github.com/m3o/m3o/buildpacks/source"
)

// outdated says why a build of src now would differ from the live release
// although its source is the same, "" when it would not.
func (d *Daemon) outdated(ctx context.Context, src m3o.Source) (string, error) {
	rel, err := d.ledger.Live(ctx, src.App)
	if m3o.KindOf(err) == m3o.NotFound {
		return "it was never deployed", nil
	} else if err != nil {
		return "", err
	}
	if rel.Commit != src.Commit {
		return "the branch has a newer commit", nil
	}
	bld, err := d.ledger.Build(ctx, src.App, rel.Build)
	if err != nil {
		return "", err
	}
	tree, err := source.Open(ctx, src, &d.trees)
	if err != nil {
		return "", err
	}
	defer tree.Close() //nolint:errcheck // only read
	plan, err := d.plan(ctx, tree)
	if err != nil {
		return "", err
	}
	if plan.Builder != "go" {
		return "", nil // its base images have tags that only its own registry can follow
	}
	now, err := d.builder.Current(ctx, plan.Toolchain)
	if err != nil {
		return "", err
	}
	switch {
	case bld.Toolchain == "":
		return "it was built before toolchains were recorded", nil
	case bld.Toolchain != now.Toolchain:
		return fmt.Sprintf("%s instead of %s", now.Toolchain, bld.Toolchain), nil
	case bld.Base != now.Base:
		return "the base image changed (CA roots or time zones)", nil
	}
	return "", nil
}
