package daemon

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/m3o/m3o"
	"github.com/m3o/m3o/events"
	"github.com/m3o/m3o/release"
	"github.com/m3o/m3o/store"
)

// eventLog and positions are the bus's places in the store.
type (
	eventLog  struct{ *store.Log }
	position  struct{ Seq uint64 }
	positions struct{ b *store.Bucket[position] }
)

var (
	_ events.Log       = eventLog{}
	_ events.Positions = positions{}
)

const (
	eventBytes = 64 << 20
	eventAge   = 7 * 24 * time.Hour
)

func openBus(ctx context.Context, d *Daemon) (*events.Bus, error) {
	l, err := d.store.Log(ctx, "events", store.LogOptions{MaxBytes: eventBytes, MaxAge: eventAge})
	if err != nil {
		return nil, err
	}
	b, err := store.NewBucket[position](ctx, d.store, "event-positions")
	if err != nil {
		return nil, err
	}
	return events.New(eventLog{l}, positions{b}, d.log), nil
}

func (l eventLog) Follow(ctx context.Context, from uint64, each func(uint64, []byte) error) error {
	for r, err := range l.Read(ctx, "", from, true) {
		if err != nil {
			return err
		}
		if err := each(r.Seq, r.Data); err != nil {
			return err
		}
	}
	return nil
}

func (l eventLog) Last(ctx context.Context) (uint64, error) {
	seq := uint64(0)
	for r, err := range l.Tail(ctx, "", 1, false) {
		if err != nil {
			return 0, err
		}
		seq = r.Seq
	}
	return seq, nil
}

func (p positions) Position(ctx context.Context, consumer string) (uint64, bool, error) {
	v, _, err := p.b.Get(ctx, consumer)
	if m3o.KindOf(err) == m3o.NotFound {
		return 0, false, nil
	}
	return v.Seq, err == nil, err
}

func (p positions) SetPosition(ctx context.Context, consumer string, seq uint64) error {
	_, err := p.b.Put(ctx, consumer, position{seq})
	return err
}

// happened publishes an event. What it tells of has happened, so that it
// cannot be told is logged and changes nothing.
func (d *Daemon) happened(ctx context.Context, kind string, a appEvent) {
	if d.bus == nil {
		return
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), 5*time.Second)
	defer cancel()
	a.URL = d.url(a.App)
	data, err := json.Marshal(a)
	if err == nil {
		err = d.bus.Publish(ctx, events.Event{Type: kind, App: a.App, Data: data})
	}
	if err != nil {
		d.log.Error("tell what happened", "app", a.App, "err", err)
	}
}

// deployHappened tells how far a deploy has come. rel may be the zero Release.
func (d *Daemon) deployHappened(ctx context.Context, kind string, dep release.Deploy, rel m3o.Release) {
	a := appEvent{App: dep.App, Build: dep.Build, Commit: dep.Source.Commit, Reason: dep.Reason, User: dep.User, Error: dep.Error}
	a.Branch = strings.TrimPrefix(dep.Source.Ref, "refs/heads/")
	if rel.Version > 0 {
		a.Release, a.Commit, a.Message = rel.Name(), rel.Commit, rel.Message
	} else if dep.Build > 0 {
		if b, err := d.ledger.Build(ctx, dep.App, dep.Build); err == nil {
			a.Message = b.Message
		}
	}
	d.happened(ctx, kind, a)
}

// liveKind is deployRecovered when the deploy before this one failed, else deployLive.
func (d *Daemon) liveKind(ctx context.Context, dep release.Deploy) string {
	last, err := d.ledger.Deploys(ctx, dep.App, 2)
	if err == nil && len(last) == 2 && last[0].ID == dep.ID && last[1].Status == release.Failed && last[1].Error != errSuperseded.Msg {
		return deployRecovered
	}
	return deployLive
}

// failedWorthTelling leaves out what its own pusher replaced or cancelled.
func failedWorthTelling(err error) bool {
	return !errors.Is(err, errSuperseded) && !errors.Is(err, context.Canceled)
}

// settledTime is how long an app must run after a crash to be well again.
const settledTime = 30 * time.Second

// crashes follows the instances of live releases and finds those that ended
// though nobody told them to. An app is told of once, until it has been well
// for a while: one that crashes again and again would be told of for ever.
type crashes struct {
	phase map[string]m3o.Phase // by instance
	down  map[string]m3o.Instance
	ready map[string]time.Time // since when an app that was down is ready again
}

func newCrashes() *crashes {
	return &crashes{phase: map[string]m3o.Phase{}, down: map[string]m3o.Instance{}, ready: map[string]time.Time{}}
}

// see takes in a change of an instance and reports whether it is a crash to
// tell of. Instances are followed from before their release is live, so that
// it is known how they were when it became so.
func (c *crashes) see(in m3o.Instance, live bool, now time.Time) bool {
	old, known := c.phase[in.ID]
	c.phase[in.ID] = in.Phase
	switch {
	case !live && in.Phase == m3o.Exited:
		delete(c.phase, in.ID) // of a deploy, which tells itself
	case !live:
	case in.Phase == m3o.Exited && old == m3o.Draining:
		delete(c.phase, in.ID) // it was told to go
	case in.Phase == m3o.Exited && known && old != m3o.Exited:
		delete(c.ready, in.App)
		_, told := c.down[in.App]
		c.down[in.App] = in
		return !told
	case in.Phase == m3o.Ready:
		if was, ok := c.down[in.App]; ok && was.Process == in.Process {
			if _, ok := c.ready[in.App]; !ok {
				c.ready[in.App] = now
			}
		}
	}
	return false
}

// well is the apps that have recovered by now, each given once, with the
// instance that had crashed.
func (c *crashes) well(now time.Time) []m3o.Instance {
	var out []m3o.Instance
	for app, since := range c.ready {
		if now.Sub(since) >= settledTime {
			out = append(out, c.down[app])
			delete(c.ready, app)
			delete(c.down, app)
		}
	}
	return out
}

// gone forgets an app whose release was replaced: the new one starts afresh.
func (c *crashes) gone(app string) {
	delete(c.down, app)
	delete(c.ready, app)
}

// watchCrashes tells of crashes and recoveries until ctx ends.
func (d *Daemon) watchCrashes(ctx context.Context) error {
	changes := make(chan m3o.Instance)
	done := make(chan struct{})
	go func() {
		defer close(done)
		for ctx.Err() == nil {
			for in, err := range d.driver.Events(ctx) {
				if err != nil {
					break
				}
				select {
				case changes <- in:
				case <-ctx.Done():
				}
			}
			pause(ctx, time.Second)
		}
	}()
	defer func() { <-done }()
	c := newCrashes()
	tick := time.NewTicker(settledTime / 3)
	defer tick.Stop()
	releases := map[string]int{} // of the apps that are down
	for {
		select {
		case <-ctx.Done():
			return nil
		case now := <-tick.C:
			for _, in := range c.well(now) {
				d.happened(ctx, appRecovered, appEvent{App: in.App, Release: m3o.Release{Version: in.Release}.Name(), Process: in.Process})
			}
		case in := <-changes:
			if in.ID == "" {
				continue
			}
			live, err := d.ledger.Live(ctx, in.App)
			_, serves := live.Processes[in.Process] // a one-off command is of no process type
			serves = serves && err == nil && live.Version == in.Release
			if serves && releases[in.App] != live.Version {
				c.gone(in.App)
				releases[in.App] = live.Version
			}
			if c.see(in, serves, time.Now()) {
				d.log.Info("app crashed", "app", in.App, "release", in.Release, "instance", in.ID, "err", fmt.Errorf("exit %d", in.Exit))
				d.happened(ctx, appCrashed, appEvent{App: in.App, Release: live.Name(), Commit: live.Commit, Message: live.Message,
					Process: in.Process, Instance: in.ID, Exit: in.Exit, OOM: in.OOM})
			}
		}
	}
}
