package daemon

import (
	"cmp"
	"context"
	"fmt"
	"time"

	"github.com/m3o/m3o"
	"github.com/m3o/m3o/release"
	"github.com/m3o/m3o/router"
	"github.com/m3o/m3o/runtime"
)

// An idler notices that an app is not used, from the router's counts alone:
// the requests it has begun and those in flight.
type idler struct {
	requests int64
	since    time.Time // when it was last seen in use
}

// see takes in the counts of now and says for how long the app has been idle.
func (i *idler) see(now time.Time, st router.AppStatus) time.Duration {
	if i.since.IsZero() || st.Requests != i.requests || st.InFlight > 0 {
		i.requests, i.since = st.Requests, now
	}
	return now.Sub(i.since)
}

// followAsks wakes the apps that requests have come for, until ctx ends.
func (d *Daemon) followAsks(ctx context.Context) error {
	for pause := time.Duration(0); ctx.Err() == nil; {
		for app, err := range d.router.Asks(ctx) {
			if err != nil {
				if ctx.Err() == nil {
					d.log.Debug("asks of the router broke off", "err", err)
				}
				break
			}
			pause = 0
			d.background(func(ctx context.Context) { d.wake(ctx, app) })
		}
		pause = min(max(2*pause, 10*time.Millisecond), time.Second)
		select {
		case <-ctx.Done():
		case <-time.After(pause):
		}
	}
	return nil
}

// wake starts a sleeping app or, for "app@12", a kept release of one, or tells
// the router why it does not start.
func (d *Daemon) wake(ctx context.Context, app string) {
	began, name := time.Now(), app // name: as it was asked for
	app, version := ownHost(name)
	var err error
	if version == 0 {
		err = d.wakeUp(ctx, app)
	} else {
		err = d.wakeRelease(ctx, app, version)
	}
	if err == nil {
		d.log.Info("app woken", "app", name, "took", time.Since(began).Round(time.Millisecond))
		return
	}
	d.log.Warn("app cannot be woken", "app", name, "err", err)
	why := &m3o.Error{Kind: m3o.Unavailable, Msg: "app " + app + " was asleep and does not start: " + firstLine(userMessage(err)),
		Hint: "m3o ps -a " + app + "; m3o logs -a " + app}
	if version != 0 {
		why.Msg = fmt.Sprintf("v%d of %s is kept but does not start: %s", version, app, firstLine(userMessage(err)))
		why.Hint = fmt.Sprintf("m3o logs -a %s; m3o rollback v%d -a %s makes it live", app, version, app)
	}
	fctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), 5*time.Second)
	defer cancel()
	if err := d.router.FailWake(fctx, name, why); err != nil {
		d.log.Warn("tell the router of a failed wake", "app", app, "err", err)
	}
}

func (d *Daemon) wakeUp(ctx context.Context, app string) error {
	unlock, err := d.lanes.lock(ctx, app)
	if err != nil {
		return err
	}
	defer unlock()
	f, err := d.ledger.Formation(ctx, app)
	if err != nil {
		return err
	}
	live, err := d.ledger.Live(ctx, app)
	if err != nil {
		return err
	}
	if !f.Asleep { // woken meanwhile: the table says so, or is about to
		d.routes.setRest(app, rest{})
		return nil
	}
	f.Asleep = false
	rel := f.Over(live, true)
	if replicas(rel.Processes[webProcess]) == 0 {
		return &m3o.Error{Kind: m3o.Unavailable, Msg: "no web instance is wanted", Hint: "m3o ps:start web -a " + app}
	}
	w, err := d.workload(ctx, rel, webProcess)
	if err != nil {
		return err
	}
	w.Health.Successes = cmp.Or(w.Health.Successes, 1) // it was well before
	if err := d.driver.Start(ctx, w, replicas(rel.Processes[webProcess])); err != nil {
		return err
	}
	ready, err := runtime.WaitReady(ctx, d.driver, ref(rel, webProcess), 1, nil)
	if err != nil {
		f.Asleep = true // it is: the next request tries again
		if lerr := d.launchAll(context.WithoutCancel(ctx), live, f, []string{webProcess}); lerr != nil {
			d.log.Error("stop an app that does not wake", "app", app, "err", lerr)
		}
		return err
	}
	// The requests that wait go first. A crash before the record is written
	// puts the app to sleep again, and the next request wakes it.
	d.routes.awake(app, ready)
	if _, err := d.ledger.Reform(ctx, app, "m3o", "woken by a request", func(f *release.Formation) error { f.Asleep = false; return nil }); err != nil {
		d.log.Error("record that an app is awake", "app", app, "err", err)
	}
	for name := range rel.Processes {
		if name == webProcess {
			continue
		}
		if err := d.launch(ctx, rel, name); err != nil {
			d.log.Error("start a process of a woken app", "app", app, "process", name, "err", err)
		}
	}
	return d.reshape(ctx, app)
}

// awake leads the requests that wait to the instances that are ready.
func (r *routes) awake(app string, ready []m3o.Instance) {
	r.mu.Lock()
	defer r.mu.Unlock()
	delete(r.rests, app)
	for _, in := range ready {
		r.merge(in)
	}
	r.touch(app)
}

// sleep stops an app that has been idle since it had had so many requests,
// unless it is in use after all.
func (d *Daemon) sleep(ctx context.Context, app string, after time.Duration, requests int64) error {
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	unlock, err := d.lanes.lock(ctx, app)
	if err != nil {
		return err
	}
	defer unlock()
	if d.runs.called(app) {
		return nil
	}
	st, err := d.router.Status(ctx)
	if err != nil {
		return err
	}
	if now := st.Apps[app]; now.Requests != requests || now.InFlight > 0 {
		return nil
	}
	live, err := d.ledger.Live(ctx, app)
	if err != nil {
		return err
	}
	f, err := d.ledger.Reform(ctx, app, "m3o", fmt.Sprintf("no request for %v", after), func(f *release.Formation) error { f.Asleep = true; return nil })
	if err != nil {
		return err
	}
	// From here on requests wait in the router; those that slipped in before
	// are drained from the instances.
	if gen := d.routes.setRest(app, rest{asleep: true}); gen > 0 {
		if err := d.routes.wait(ctx, gen); err != nil {
			return err
		}
	}
	names, _ := types(live, "")
	if err := d.launchAll(ctx, live, f, names); err != nil {
		return err
	}
	d.log.Info("app sleeps", "app", app, "after", after)
	return d.reshape(ctx, app)
}
