package daemon

import (
	"context"
	"fmt"

	"github.com/m3o/m3o"
	"github.com/m3o/m3o/gitserver"
	"github.com/m3o/m3o/release"
	"github.com/m3o/m3o/runtime"
)

// recover finishes or fails every deploy that a crash of the daemon cut
// short, then makes the driver run exactly the live releases. The git server
// must not serve yet.
func (d *Daemon) recover(ctx context.Context) error {
	if err := d.sweepUploads(); err != nil {
		return fmt.Errorf("remove old uploads: %w", err)
	}
	open, err := d.ledger.UnfinishedDeploys(ctx)
	if err != nil {
		return fmt.Errorf("read unfinished deploys: %w", err)
	}
	for _, dep := range open {
		if err := d.resume(ctx, dep); err != nil {
			return fmt.Errorf("finish deploy of %s: %w", dep.App, err)
		}
	}
	builds, err := d.ledger.RunningBuilds(ctx)
	if err != nil {
		return fmt.Errorf("read running builds: %w", err)
	}
	for _, b := range builds {
		_ = d.endBuild(ctx, b, errStopped) // it logs
	}
	return d.startLive(ctx)
}

// errStopped is why a build or deploy found unfinished has failed.
var errStopped = &m3o.Error{Kind: m3o.Unavailable, Msg: "the daemon stopped meanwhile", Hint: "push again"}

// resume decides one unfinished deploy. Only one that was switching can have
// moved the branch: then the release stays. One without a branch (a rollback,
// a config change) had its switch persisted before it was made, so it goes
// on. Whatever was before that has changed nothing a user could see: failed.
func (d *Daemon) resume(ctx context.Context, dep release.Deploy) error {
	event := release.Fail
	if dep.Status == release.Switching {
		if dep.Source.Ref == "" {
			event = release.Confirm
		} else {
			tip, err := gitserver.Tip(ctx, dep.Source.Repo, dep.Source.Ref)
			if err != nil {
				return err
			}
			if tip == dep.Source.Commit {
				event = release.Confirm
			}
		}
	}
	dep, err := d.ledger.Advance(ctx, dep.ID, event, func(p *release.Deploy) {
		if event == release.Fail {
			p.Error = errStopped.Msg
		}
	})
	if err != nil {
		return err
	}
	if event == release.Fail {
		d.deployHappened(ctx, deployFailed, dep, m3o.Release{})
	} else if rel, err := d.ledger.Release(ctx, dep.App, dep.Release); err == nil {
		d.deployHappened(ctx, d.liveKind(ctx, dep), dep, rel)
	}
	d.log.Info("deploy found unfinished", "app", dep.App, "release", dep.Release, "outcome", string(event))
	return nil
}

// startLive has the driver run the live release of every app and stops
// whatever else it runs.
func (d *Daemon) startLive(ctx context.Context) error {
	apps, err := d.ledger.Apps(ctx)
	if err != nil {
		return fmt.Errorf("read apps: %w", err)
	}
	want := map[runtime.Ref]bool{}
	for _, app := range apps {
		rel, err := d.ledger.Live(ctx, app.Name)
		if m3o.KindOf(err) == m3o.NotFound {
			continue
		} else if err != nil {
			return err
		}
		if rel, err = d.formed(ctx, rel, false); err != nil {
			return err
		}
		for name := range rel.Processes {
			want[ref(rel, name)] = true
			// One app that cannot start must not keep the others down.
			if err := d.launch(ctx, rel, name); err != nil {
				d.log.Error("start app", "app", app.Name, "release", rel.Version, "err", err)
			}
		}
		d.background(func(ctx context.Context) { d.remember(ctx, rel) })
		d.routes.setLive(app.Name, rel.Version)
		if err := d.reshape(ctx, app.Name); err != nil {
			return err
		}
		if kept, err := d.ledger.Kept(ctx, app.Name); err == nil && len(kept) > 1 {
			d.guardTrial(rel, kept[1].Version)
		}
		if err := d.schedules.follow(ctx, rel); err != nil {
			d.log.Error("follow the release's schedules", "app", app.Name, "err", err)
		}
		d.tellKept(ctx, app.Name)
	}
	if err := d.recoverCanaries(ctx, want); err != nil {
		return err
	}
	ectx, cancel := context.WithCancel(ctx)
	defer cancel()
	stale := map[runtime.Ref]bool{}
	for in, err := range d.driver.Events(ectx) {
		if err != nil {
			return fmt.Errorf("list instances: %w", err)
		}
		if in.ID == "" {
			break
		}
		r := runtime.Ref{App: in.App, Process: in.Process, Release: in.Release}
		if !want[r] && !isRun(r.Process) {
			stale[r] = true
		}
	}
	for r := range stale {
		gone := d.leaving.begin(r.App, r.Release)
		d.background(func(ctx context.Context) {
			defer gone()
			d.drain(ctx, r.App, r.Release)
			d.stop(ctx, r)
		})
	}
	return nil
}
