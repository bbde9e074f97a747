package daemon

import (
	"context"
	"fmt"
	"io"
	"slices"
	"strings"
	"time"

	"github.com/m3o/m3o"
	"github.com/m3o/m3o/buildpacks"
	"github.com/m3o/m3o/buildpacks/source"
	"github.com/m3o/m3o/gitserver"
	"github.com/m3o/m3o/release"
)

// notWanted says why a push or a delivery of src should not be deployed, or
// "" when it should: its newest commit says [skip ci] or the like, or it
// changes no file that the app's paths name. What somebody asks for by name (a
// rebuild, a schedule, a deploy hook) is not asked about.
func (d *Daemon) notWanted(ctx context.Context, src m3o.Source) (string, error) {
	if slices.Contains(src.Options, "force-rebuild") {
		return "", nil
	}
	tree, err := source.Open(ctx, src, &d.trees)
	if err != nil {
		return "", err
	}
	defer tree.Close() //nolint:errcheck // only read
	if mark := release.SkipMark(tree.Message()); mark != "" {
		return "the commit says " + mark, nil
	}
	app, err := d.ledger.App(ctx, src.App)
	if err != nil {
		return "", err
	}
	patterns := app.Paths
	if len(patterns) == 0 {
		patterns = d.declaredPaths(ctx, src)
	}
	if len(patterns) == 0 || src.Old == "" {
		return "", nil
	}
	if _, err := d.ledger.Live(ctx, src.App); m3o.KindOf(err) == m3o.NotFound {
		return "", nil // nothing runs yet that could stay as it is
	} else if err != nil {
		return "", err
	}
	changed, err := gitserver.Changed(ctx, src)
	if err != nil {
		// After a forced push the old commit may be gone: to deploy is the safe answer.
		d.log.Warn("find changed files", "app", src.App, "err", err)
		return "", nil
	}
	if _, ok := release.Touches(patterns, changed); ok {
		return "", nil
	}
	return fmt.Sprintf("none of the %d changed files is in the paths %s", len(changed), strings.Join(patterns, " ")), nil
}

// declaredPaths is what the tree's own m3o.yaml says of paths. A fault of the
// file is for the build to tell.
func (d *Daemon) declaredPaths(ctx context.Context, src m3o.Source) []string {
	tree, err := source.Open(ctx, d.filesOf(ctx, src), &d.trees)
	if err != nil {
		return nil
	}
	defer tree.Close() //nolint:errcheck // only read
	files, err := buildpacks.ReadFiles(tree)
	if err != nil {
		return nil
	}
	return files.Manifest.Paths
}

// skipped is a push that is accepted and deploys nothing.
type skipped struct{ why string }

var _ gitserver.Deployment = skipped{}

func (s skipped) Done(_ context.Context, moved bool, w io.Writer) error {
	if moved {
		out := output{w}
		out.step("Not deployed: %s", s.why)
		out.line("To deploy it all the same: m3o rebuild")
	}
	return nil
}

// hold ends a deploy of a locked app once git has moved the branch: what was
// built becomes a release that is not live.
func (l *deployment) hold(ctx context.Context, w io.Writer) error {
	d := l.d
	rel, err := d.ledger.AppendRelease(ctx, l.rel)
	if err != nil {
		return d.failDeploy(ctx, l.dep.ID, err)
	}
	if _, err := d.advance(ctx, l.dep.ID, release.Hold, func(p *release.Deploy) { p.Release = rel.Version }); err != nil {
		return err
	}
	l.rel = rel
	d.deployHappened(ctx, deployHeld, l.dep, rel)
	d.log.Info("release held", "app", rel.App, "release", rel.Version, "user", rel.User)
	out := output{&tee{pusher: w, log: l.log}}
	out.line("Built %s in %s; it is not live", rel.Name(), seconds(time.Since(l.began)))
	out.warn("%s", lockWords(rel.App, l.lock))
	out.warn("m3o publish %s makes it live; m3o unlock lets the next push go live", rel.Name())
	return nil
}

// lockWords says who locked an app, since when and why.
func lockWords(app string, l m3o.Lock) string {
	s := fmt.Sprintf("%s is locked by %s since %s", app, l.User, l.At.UTC().Format("2006-01-02 15:04 MST"))
	if l.Reason != "" {
		s += ": " + l.Reason
	}
	return s
}

// publish makes a held release's image and processes live as a new release
// with the app's current config. version 0 is the newest held one.
func (d *Daemon) publish(ctx context.Context, app, user string, version int) (rel m3o.Release, from int, err error) {
	unlock, err := d.lanes.lock(ctx, app)
	if err != nil {
		return rel, 0, err
	}
	defer unlock()
	held, err := d.ledger.Held(ctx, app)
	if err != nil {
		return rel, 0, err
	}
	i := slices.IndexFunc(held, func(r m3o.Release) bool { return version == 0 || r.Version == version })
	if i < 0 {
		return rel, 0, d.notHeld(ctx, app, version)
	}
	if live, err := d.ledger.Live(ctx, app); err == nil {
		from = live.Version
	} else if m3o.KindOf(err) != m3o.NotFound {
		return rel, 0, err
	}
	target := held[i]
	rev, err := d.config.Current(ctx, app)
	if err != nil {
		return rel, 0, err
	}
	target.Config, target.Reason, target.User = rev.Number, "publish "+target.Name(), user
	rel, err = d.republish(ctx, target, held[i].Version)
	return rel, from, err
}

// notHeld says why a release cannot be published, and what can be done instead.
func (d *Daemon) notHeld(ctx context.Context, app string, version int) error {
	if version == 0 {
		return &m3o.Error{Kind: m3o.NotFound, Msg: app + " has no release that is held back", Hint: "m3o lock holds back what is pushed from then on"}
	}
	status, err := d.ledger.ReleaseStatus(ctx, app, version)
	if err != nil {
		return err
	}
	e := &m3o.Error{Kind: m3o.Invalid, Msg: fmt.Sprintf("v%d of %s is %s, not held", version, app, status), Hint: "m3o releases -a " + app}
	if status == release.ReleaseKept {
		e.Hint = fmt.Sprintf("m3o rollback v%d -a %s", version, app)
	}
	return e
}
