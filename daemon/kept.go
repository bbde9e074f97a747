package daemon

import (
	"cmp"
	"context"
	"fmt"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/m3o/m3o"
	"github.com/m3o/m3o/runtime"
)

// A kept release has a host of its own. A request for it starts one instance
// of its web process, which is stopped again when nobody has used it for a
// while. Nothing else of the release runs, and it does not become live.

// restAfter is after how long without a request a woken release is stopped,
// unless the app says how soon it sleeps.
const restAfter = 10 * time.Minute

// ownHost takes the name apart that the router asks by: "app", or "app@12" for
// the release's own host.
func ownHost(name string) (app string, version int) {
	app, n, ok := strings.Cut(name, "@")
	if !ok {
		return name, 0
	}
	version, err := strconv.Atoi(n)
	if err != nil || version < 1 {
		return name, 0 // no app's name: it is not found
	}
	return app, version
}

// leaving are the releases whose last requests end before they are stopped.
// The zero value is ready to use.
type leaving struct {
	mu   sync.Mutex // guards gone
	gone map[appVersion][]chan struct{}
}

// begin says that a release leaves until the result is called.
func (l *leaving) begin(app string, version int) (gone func()) {
	k, c := appVersion{app, version}, make(chan struct{})
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.gone == nil {
		l.gone = map[appVersion][]chan struct{}{}
	}
	l.gone[k] = append(l.gone[k], c)
	return func() {
		l.mu.Lock()
		defer l.mu.Unlock()
		close(c)
		left := l.gone[k][:0]
		for _, o := range l.gone[k] {
			if o != c {
				left = append(left, o)
			}
		}
		if l.gone[k] = left; len(left) == 0 {
			delete(l.gone, k)
		}
	}
}

// of is closed when one who stops the release is done; nil for none.
func (l *leaving) of(app string, version int) <-chan struct{} {
	l.mu.Lock()
	defer l.mu.Unlock()
	if cs := l.gone[appVersion{app, version}]; len(cs) > 0 {
		return cs[0]
	}
	return nil
}

// lockGone takes the app's release lock once nobody is about to stop what runs
// of the release.
func (d *Daemon) lockGone(ctx context.Context, app string, version int) (unlock func(), err error) {
	for {
		if unlock, err = d.lanes.lock(ctx, app); err != nil {
			return nil, err
		}
		gone := d.leaving.of(app, version)
		if gone == nil {
			return unlock, nil
		}
		unlock()
		select {
		case <-gone:
		case <-ctx.Done():
			return nil, context.Cause(ctx)
		}
	}
}

// wakeRelease starts what the host of one release of app leads to.
func (d *Daemon) wakeRelease(ctx context.Context, app string, version int) error {
	live, err := d.ledger.Live(ctx, app)
	if err != nil {
		return err
	}
	if live.Version == version {
		return d.wakeUp(ctx, app)
	}
	unlock, err := d.lockGone(ctx, app, version)
	if err != nil {
		return err
	}
	defer unlock()
	rel, err := d.keptRelease(ctx, app, version)
	if err != nil {
		return err
	}
	f, err := d.ledger.Formation(ctx, app)
	if err != nil {
		return err
	}
	rel = f.Over(rel, true)
	switch {
	case replicas(rel.Processes[webProcess]) == 0:
		return &m3o.Error{Kind: m3o.Unavailable, Msg: "no web instance is wanted"}
	case len(f.Mounts(webProcess)) > 0:
		return &m3o.Error{Kind: m3o.Unavailable, Msg: "web has a volume, which only the live release may use"}
	}
	w, err := d.workload(ctx, rel, webProcess)
	if err != nil {
		return err
	}
	w.Health.Successes = cmp.Or(w.Health.Successes, 1) // it was well before
	canary := d.routes.canaryOf(app).Version == version
	if !canary { // which runs already, or is about to
		if err := d.driver.Start(ctx, w, 1); err != nil {
			return err
		}
	}
	ready, err := runtime.WaitReady(ctx, d.driver, ref(rel, webProcess), 1, nil)
	if err != nil {
		if !canary {
			d.discard(ctx, rel)
		}
		return err
	}
	t, err := d.examine(ctx, rel, ready[0])
	if err != nil {
		if !canary {
			d.discard(ctx, rel)
		}
		return err
	}
	d.routes.setTraits(app, version, t)
	if canary {
		d.routes.know(ready)
		return nil
	}
	if d.routes.wakeOne(app, version, ready) {
		after := cmp.Or(rel.Sleep, restAfter)
		d.background(func(ctx context.Context) { d.followWoken(ctx, rel, after) })
	}
	return nil
}

// wakeOne leads the host of one release to the instances that are ready, and
// says whether it led nowhere before.
func (r *routes) wakeOne(app string, version int, ready []m3o.Instance) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	fresh := !r.woken[app][version]
	if r.woken[app] == nil {
		r.woken[app] = map[int]bool{}
	}
	r.woken[app][version] = true
	for _, in := range ready {
		r.merge(in)
	}
	r.touch(app)
	return fresh
}

// restOne takes wakeOne back, and gives the generation of the table that says so.
func (r *routes) restOne(app string, version int) uint64 {
	r.mu.Lock()
	defer r.mu.Unlock()
	if delete(r.woken[app], version); len(r.woken[app]) == 0 {
		delete(r.woken, app)
	}
	return r.touch(app)
}

// isWoken says that requests have started a release.
func (r *routes) isWoken(app string, version int) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.woken[app][version]
}

// offers says that a release has a host of its own.
func (r *routes) offers(app string, version int) bool {
	return r.has(fmt.Sprintf("v%d--%s", version, app))
}

// followWoken stops a woken release when it has been idle for so long or no
// rollback offers it any more.
func (d *Daemon) followWoken(ctx context.Context, rel m3o.Release, after time.Duration) {
	t := time.NewTicker(min(max(after/10, 100*time.Millisecond), 10*time.Second))
	defer t.Stop()
	var idle idler
	for {
		var now time.Time
		select {
		case <-ctx.Done():
			return // the next start of the daemon stops what is not live
		case now = <-t.C:
		}
		if !d.routes.isWoken(rel.App, rel.Version) {
			return // the app was destroyed
		}
		st, err := d.router.Status(ctx)
		if err != nil {
			continue // it is being started again; nothing is decided blindly
		}
		use := st.Apps[rel.App].Releases[rel.Version]
		if idle.see(now, use) < after && d.routes.offers(rel.App, rel.Version) {
			continue
		}
		done, err := d.restRelease(ctx, rel, use.Requests)
		if err != nil {
			d.log.Error("stop a kept release", "app", rel.App, "release", rel.Version, "err", err)
		}
		if done {
			return
		}
	}
}

// restRelease stops a woken release that has been idle since it had had so
// many requests, unless it is in use after all.
func (d *Daemon) restRelease(ctx context.Context, rel m3o.Release, requests int64) (done bool, err error) {
	unlock, err := d.lanes.lock(ctx, rel.App)
	if err != nil {
		return false, err
	}
	defer unlock()
	if !d.routes.isWoken(rel.App, rel.Version) {
		return true, nil
	}
	if d.routes.offers(rel.App, rel.Version) {
		st, err := d.router.Status(ctx)
		if err != nil {
			return false, err
		}
		if use := st.Apps[rel.App].Releases[rel.Version]; use.Requests != requests || use.InFlight > 0 {
			return false, nil
		}
	}
	gen := d.routes.restOne(rel.App, rel.Version)
	if d.routes.canaryOf(rel.App).Version == rel.Version {
		return true, nil // it runs for that
	}
	if err := d.routes.wait(ctx, gen); err != nil {
		return true, err
	}
	// Requests that slipped in before the table are let end.
	gone := d.leaving.begin(rel.App, rel.Version)
	d.background(func(ctx context.Context) {
		defer gone()
		d.drain(ctx, rel.App, rel.Version)
		d.discard(ctx, rel)
		d.log.Info("kept release stopped", "app", rel.App, "release", rel.Version)
	})
	return true, nil
}
