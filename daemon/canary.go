package daemon

import (
	"context"
	"fmt"
	"math"
	"strings"
	"time"

	"github.com/m3o/m3o"
	"github.com/m3o/m3o/router"
	"github.com/m3o/m3o/runtime"
	"github.com/m3o/m3o/store"
)

// A canary is a kept release that runs beside the live one and takes a part of
// its requests, until it is promoted, aborted, or another release goes live.
// Only its web process runs twice: two kinds of worker on one queue would not
// be a comparison.

func openCanaries(ctx context.Context, st *store.Store) (*store.Bucket[canary], error) {
	b, err := store.NewBucket[canary](ctx, st, "canaries")
	if err != nil {
		return nil, fmt.Errorf("open canaries: %w", err)
	}
	return b, nil
}

func checkCanary(c canary) error {
	if math.IsNaN(c.Percent) || c.Percent < 0 || c.Percent > 100 {
		return &m3o.Error{Kind: m3o.Invalid, Msg: fmt.Sprintf("%v is not a share from 0 to 100 percent", c.Percent), Hint: "m3o releases:canary v13 --percent 5"}
	}
	name, header := strings.CutPrefix(c.Sticky, "header:")
	if c.Sticky != "" && c.Sticky != "cookie" && (!header || !router.ValidHeaderName(name)) {
		return &m3o.Error{Kind: m3o.Invalid, Msg: fmt.Sprintf("a canary cannot stick by %q", c.Sticky), Hint: "--sticky cookie, or --sticky header:X-Tenant"}
	}
	return nil
}

// setCanary starts a release as the canary of app, or changes its share.
func (d *Daemon) setCanary(ctx context.Context, app string, c canary) error {
	if err := checkCanary(c); err != nil {
		return err
	}
	unlock, err := d.lanes.lock(ctx, app)
	if err != nil {
		return err
	}
	defer unlock()
	live, err := d.ledger.Live(ctx, app)
	if err != nil {
		return err
	}
	if c.Version == live.Version {
		return &m3o.Error{Kind: m3o.Invalid, Msg: fmt.Sprintf("v%d is live, it cannot be its own canary", c.Version), Hint: "m3o releases -a " + app}
	}
	now := d.routes.canaryOf(app)
	if now.Version == c.Version {
		return d.keepCanary(ctx, app, c)
	}
	rel, err := d.keptRelease(ctx, app, c.Version)
	if err != nil {
		return err
	}
	if _, ok := rel.Processes[webProcess]; !ok {
		return &m3o.Error{Kind: m3o.Invalid, Msg: rel.Name() + " has no web process, so there are no requests to take"}
	}
	if now.Version != 0 {
		if err := d.dropCanary(ctx, app); err != nil {
			return err
		}
	}
	// Written down before it is done: a crash in between leaves a canary that
	// the next start launches, and that can be aborted.
	if _, err := d.canaries.Put(ctx, app, c); err != nil {
		return fmt.Errorf("keep canary: %w", err)
	}
	if err := d.startCanary(ctx, rel); err != nil {
		d.discard(ctx, rel)
		dctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), 10*time.Second)
		defer cancel()
		if derr := d.canaries.Delete(dctx, app, 0); derr != nil {
			d.log.Error("forget canary", "app", app, "err", derr)
		}
		return err
	}
	d.log.Info("canary started", "app", app, "release", c.Version, "percent", c.Percent)
	return d.routes.setCanary(ctx, app, c)
}

// keptRelease is a release of app that can run without a build.
func (d *Daemon) keptRelease(ctx context.Context, app string, version int) (m3o.Release, error) {
	kept, err := d.ledger.Kept(ctx, app)
	if err != nil {
		return m3o.Release{}, err
	}
	for _, k := range kept {
		if k.Version == version {
			return k, nil
		}
	}
	return m3o.Release{}, &m3o.Error{Kind: m3o.NotFound, Msg: fmt.Sprintf("v%d of %s never went live or is no longer kept", version, app), Hint: "m3o releases -a " + app}
}

// startCanary runs rel's web process and waits until it is healthy.
func (d *Daemon) startCanary(ctx context.Context, rel m3o.Release) error {
	if err := d.launch(ctx, rel, webProcess); err != nil {
		return fmt.Errorf("start canary: %w", err)
	}
	ins, err := runtime.WaitReady(ctx, d.driver, ref(rel, webProcess), 1, nil)
	if err != nil {
		return err
	}
	t, err := d.examine(ctx, rel, ins[0])
	if err != nil {
		return err
	}
	d.routes.setTraits(rel.App, rel.Version, t)
	d.routes.know(ins)
	return nil
}

func (d *Daemon) keepCanary(ctx context.Context, app string, c canary) error {
	if _, err := d.canaries.Put(ctx, app, c); err != nil {
		return fmt.Errorf("keep canary: %w", err)
	}
	return d.routes.setCanary(ctx, app, c)
}

// abortCanary gives all requests back to the live release.
func (d *Daemon) abortCanary(ctx context.Context, app string) (int, error) {
	unlock, err := d.lanes.lock(ctx, app)
	if err != nil {
		return 0, err
	}
	defer unlock()
	c := d.routes.canaryOf(app)
	if c.Version == 0 {
		return 0, noCanary(app)
	}
	return c.Version, d.dropCanary(ctx, app)
}

func noCanary(app string) error {
	return &m3o.Error{Kind: m3o.NotFound, Msg: app + " has no canary", Hint: "m3o releases:canary v13 --percent 5 -a " + app}
}

// dropCanary ends the canary of app, if there is one. The caller holds the
// app's release lock.
func (d *Daemon) dropCanary(ctx context.Context, app string) error {
	c := d.routes.canaryOf(app)
	if c.Version == 0 {
		return nil
	}
	if err := d.canaries.Delete(ctx, app, 0); err != nil && m3o.KindOf(err) != m3o.NotFound {
		return fmt.Errorf("forget canary: %w", err)
	}
	if err := d.routes.setCanary(ctx, app, canary{}); err != nil {
		return err
	}
	d.retireCanary(app, c.Version)
	d.log.Info("canary ended", "app", app, "release", c.Version)
	return nil
}

// retireCanary drains and stops a canary in the background, unless it has
// become the canary again meanwhile.
func (d *Daemon) retireCanary(app string, version int) {
	gone := d.leaving.begin(app, version)
	d.background(func(ctx context.Context) {
		defer gone()
		rel, err := d.ledger.Release(ctx, app, version)
		if err != nil {
			d.log.Error("retire canary", "app", app, "release", version, "err", err)
			return
		}
		d.drain(ctx, app, version)
		unlock, err := d.lanes.lock(ctx, app)
		if err != nil {
			return // the next start of the daemon stops what is not live
		}
		defer unlock()
		if d.routes.canaryOf(app).Version != version && !d.routes.isWoken(app, version) {
			d.discard(ctx, rel)
		}
	})
}

// promoteCanary makes the canary's image and config a new live release.
func (d *Daemon) promoteCanary(ctx context.Context, app, user string) (rel m3o.Release, from int, err error) {
	unlock, err := d.lanes.lock(ctx, app)
	if err != nil {
		return rel, 0, err
	}
	defer unlock()
	c := d.routes.canaryOf(app)
	if c.Version == 0 {
		return rel, 0, noCanary(app)
	}
	live, err := d.ledger.Live(ctx, app)
	if err != nil {
		return rel, 0, err
	}
	target, err := d.keptRelease(ctx, app, c.Version)
	if err != nil {
		return rel, 0, err
	}
	target.Reason, target.User = "promote canary "+target.Name(), user
	rel, err = d.redeploy(ctx, target) // a release that goes live ends the canary
	return rel, live.Version, err
}

// recoverCanaries runs the canaries again after a start, and adds what they
// run to want.
func (d *Daemon) recoverCanaries(ctx context.Context, want map[runtime.Ref]bool) error {
	entries, err := d.canaries.List(ctx, "")
	if err != nil {
		return fmt.Errorf("read canaries: %w", err)
	}
	for _, e := range entries {
		rel, err := d.keptRelease(ctx, e.Key, e.Value.Version)
		live, lerr := d.ledger.Live(ctx, e.Key)
		if err != nil || lerr != nil || live.Version == rel.Version {
			if derr := d.canaries.Delete(ctx, e.Key, 0); derr != nil {
				return fmt.Errorf("forget canary: %w", derr)
			}
			continue
		}
		want[ref(rel, webProcess)] = true
		if err := d.launch(ctx, rel, webProcess); err != nil {
			d.log.Error("start canary", "app", e.Key, "release", rel.Version, "err", err)
		}
		d.background(func(ctx context.Context) { d.remember(ctx, rel) })
		d.routes.adoptCanary(e.Key, e.Value)
	}
	return nil
}
