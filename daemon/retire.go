package daemon

import (
	"context"
	"maps"
	"slices"
	"time"

	"github.com/m3o/m3o"
	"github.com/m3o/m3o/runtime"
)

// discard stops what has been started of a release that will not be live, or
// is no more.
func (d *Daemon) discard(ctx context.Context, rel m3o.Release) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), time.Minute)
	defer cancel()
	for _, name := range slices.Sorted(maps.Keys(rel.Processes)) {
		d.stop(ctx, ref(rel, name))
	}
	d.routes.forget(rel.App, rel.Version)
}

// The pauses before another try to stop what could not be stopped.
const (
	stopAgain     = 200 * time.Millisecond
	stopAgainMost = time.Minute
)

// stop stops what nobody wants. Where that fails it is tried again in the
// background: until the next start of the daemon nobody else would.
func (d *Daemon) stop(ctx context.Context, r runtime.Ref) {
	err := d.driver.Stop(ctx, r)
	if err == nil || d.bgCtx.Err() != nil {
		return
	}
	failed := ctx.Err() == nil // else it only takes longer than ctx lasts
	if failed {
		d.log.Error("stop instances", "app", r.App, "release", r.Release, "err", err)
		d.warn(r.App, "%s of v%d cannot be stopped, which is tried again: %s", r.Process, r.Release, firstLine(userMessage(err)))
	}
	gone := d.leaving.begin(r.App, r.Release) // a request that wakes the release waits
	d.background(func(ctx context.Context) {
		defer gone()
		for wait := stopAgain; ; wait = min(2*wait, stopAgainMost) {
			pause(ctx, wait)
			if ctx.Err() != nil {
				return
			}
			if err := d.driver.Stop(ctx, r); err != nil {
				continue
			}
			if failed {
				d.tell(r.App, "%s of v%d is stopped after all", r.Process, r.Release)
			}
			return
		}
	})
}

// takeBack leads the router back to the previous release and stops rel.
func (d *Daemon) takeBack(ctx context.Context, rel m3o.Release, previous int) {
	if err := d.routes.point(ctx, rel.App, previous, nil); err != nil {
		d.log.Error("lead the router back", "app", rel.App, "release", previous, "err", err)
	}
	d.drain(ctx, rel.App, rel.Version)
	d.discard(ctx, rel)
	d.giveBack(ctx, rel.App, previous)
}

// drain waits until the router has no request of a release in flight, at most
// the configured time.
func (d *Daemon) drain(ctx context.Context, app string, version int) {
	ctx, cancel := context.WithTimeout(ctx, d.cfg.Drain)
	defer cancel()
	res, err := d.fleet.Drain(ctx, app, version)
	if err != nil && ctx.Err() == nil {
		d.log.Warn("drain", "app", app, "release", version, "err", err)
	}
	if res.Cut > 0 {
		d.log.Info("requests cut after the drain time", "app", app, "release", version, "requests", res.Cut)
	}
}

// retire drains and stops a release that is live no more, in the background:
// the pusher need not wait for somebody's open stream.
func (d *Daemon) retire(app string, version int) {
	if version == 0 {
		return
	}
	gone := d.leaving.begin(app, version)
	d.background(func(ctx context.Context) {
		defer gone()
		rel, err := d.ledger.Release(ctx, app, version)
		if err != nil {
			d.log.Error("retire release", "app", app, "release", version, "err", err)
			return
		}
		d.drain(ctx, app, version)
		if ctx.Err() != nil {
			return // the next start of the daemon stops what is not live
		}
		d.discard(ctx, rel)
		d.prune(ctx)
	})
}
