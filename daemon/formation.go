package daemon

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/m3o/m3o"
	"github.com/m3o/m3o/release"
	"github.com/m3o/m3o/runtime"
)

// A shape is an app as it runs: its live release under its formation.
type shape struct {
	rel    m3o.Release
	asleep bool
}

// shapes is what the loops that follow idle time and load look at: derived
// from the ledger, brought up to date by whoever changes it.
type shapes struct {
	mu   sync.Mutex // guards apps
	apps map[string]shape
}

func (s *shapes) all() map[string]shape {
	s.mu.Lock()
	defer s.mu.Unlock()
	return maps.Clone(s.apps)
}

func (s *shapes) get(app string) (shape, bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	sh, ok := s.apps[app]
	return sh, ok
}

func (s *shapes) set(app string, sh shape) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.apps == nil {
		s.apps = map[string]shape{}
	}
	s.apps[app] = sh
}

func (s *shapes) drop(app string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.apps, app)
}

// reshape brings what the loops and the router know of an app up to date.
func (d *Daemon) reshape(ctx context.Context, app string) error {
	rel, err := d.ledger.Live(ctx, app)
	if m3o.KindOf(err) == m3o.NotFound {
		d.shapes.drop(app)
		return nil
	} else if err != nil {
		return err
	}
	f, err := d.ledger.Formation(ctx, app)
	if err != nil {
		return err
	}
	over := f.Over(rel, true)
	if f.Sleep == nil && rel.Sleep == 0 {
		a, err := d.ledger.App(ctx, app)
		if err != nil {
			return err
		}
		over.Sleep = a.Sleep
	}
	d.shapes.set(app, shape{rel: over, asleep: f.Asleep})
	d.routes.setRest(app, rest{asleep: f.Asleep})
	return nil
}

// settled is called when a deploy has gone live and its app is awake.
func (d *Daemon) settled(ctx context.Context, rel m3o.Release, previous int) {
	f, err := d.ledger.Formation(ctx, rel.App)
	if err == nil && f.Asleep {
		_, err = d.ledger.Reform(ctx, rel.App, rel.User, "deploy "+rel.Name(), func(f *release.Formation) error { f.Asleep = false; return nil })
	}
	if err == nil {
		err = d.reshape(ctx, rel.App)
	}
	if err != nil {
		d.log.Error("note what runs", "app", rel.App, "release", rel.Version, "err", err)
	}
	d.guardTrial(rel, previous)
}

// types are the process types of rel that a request means, all for "".
func types(rel m3o.Release, process string) ([]string, error) {
	all := slices.Sorted(maps.Keys(rel.Processes))
	if process == "" {
		return all, nil
	}
	if !slices.Contains(all, process) {
		return nil, noType(rel.App, process, all)
	}
	return []string{process}, nil
}

func noType(app, process string, all []string) error {
	return &m3o.Error{Kind: m3o.NotFound, Msg: fmt.Sprintf("%s has no process type called %s", app, process),
		Hint: "it has " + strings.Join(all, ", ") + "; a Procfile adds more"}
}

// reform changes an app's formation and makes what runs follow it. changed
// gives the process types that the change is about. It returns when they run
// as wanted; if they do not get there, the change is taken back, unless only
// counts changed.
func (d *Daemon) reform(ctx context.Context, app, user, reason string, change func(live m3o.Release, f *release.Formation) (changed []string, err error)) (release.Formation, error) {
	// Once begun it ends by itself: a client that hangs up leaves nothing half-done.
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), 10*time.Minute)
	defer cancel()
	unlock, err := d.lanes.lock(ctx, app)
	if err != nil {
		return release.Formation{}, err
	}
	defer unlock()
	live, err := d.ledger.Live(ctx, app)
	if err != nil {
		return release.Formation{}, err
	}
	before, err := d.ledger.Formation(ctx, app)
	if err != nil {
		return before, err
	}
	var changed []string
	after, err := d.ledger.Reform(ctx, app, user, reason, func(f *release.Formation) error {
		changed, err = change(live, f)
		return err
	})
	if err != nil {
		return after, err
	}
	d.log.Info("formation changed", "app", app, "user", user, "reason", reason)
	if err = d.follow(ctx, live, after, changed); err != nil && !sameRevisions(before, after) {
		_, rerr := d.ledger.Reform(context.WithoutCancel(ctx), app, user, "taken back: "+reason, func(f *release.Formation) error { *f = before; return nil })
		if rerr == nil {
			rerr = d.launchAll(ctx, live, before, changed)
		}
		if rerr != nil {
			d.log.Error("take back a change of the formation", "app", app, "err", rerr)
		}
	}
	if serr := d.reshape(ctx, app); err == nil {
		err = serr
	}
	return after, err
}

func sameRevisions(a, b release.Formation) bool {
	for name, s := range b.Processes {
		if s.Revision != a.Processes[name].Revision {
			return false
		}
	}
	return true
}

// launchAll tells the driver how process types of the live release should run.
func (d *Daemon) launchAll(ctx context.Context, live m3o.Release, f release.Formation, names []string) error {
	rel := f.Over(live, false)
	for _, name := range names {
		if _, ok := rel.Processes[name]; !ok {
			continue // of another release
		}
		if err := d.launch(ctx, rel, name); err != nil {
			return fmt.Errorf("start %s: %w", name, err)
		}
	}
	return nil
}

// follow makes process types of the live release run as f says and waits
// until they do.
func (d *Daemon) follow(ctx context.Context, live m3o.Release, f release.Formation, names []string) error {
	rel := f.Over(live, false)
	for _, name := range names {
		if len(f.Mounts(name)) > 0 && name == webProcess {
			d.routes.setRest(live.App, rest{asleep: f.Asleep, hold: true})
		}
	}
	if err := d.launchAll(ctx, live, f, names); err != nil {
		return err
	}
	for _, name := range names {
		n := replicas(rel.Processes[name])
		if n == 0 {
			continue
		}
		ins, err := runtime.WaitReplaced(ctx, d.driver, ref(live, name), f.Processes[name].Revision, n)
		if err != nil {
			return err
		}
		d.routes.know(ins)
		if name == webProcess {
			if _, ok := d.knownTraits(live); !ok { // it was deployed with none running
				t, err := d.examine(ctx, live, ins[0])
				if err != nil {
					return err
				}
				d.routes.setTraits(live.App, live.Version, t)
			}
		}
	}
	return nil
}

// drainInstance is asked before an instance that was told to go is ended. It
// returns when the router sends it nothing more and what was sent has been
// answered, or after the drain time.
func (d *Daemon) drainInstance(ctx context.Context, in m3o.Instance) {
	if d.stopping.Load() {
		return // the router, which has ended before, would never answer
	}
	d.peers.tellSoon(ctx) // so that no name leads to it
	if in.Process != webProcess {
		return
	}
	ctx, cancel := context.WithTimeout(ctx, d.cfg.Drain)
	defer cancel()
	gen, serves := d.routes.without(in)
	if !serves {
		return
	}
	if err := d.routes.wait(ctx, gen); err != nil {
		d.log.Warn("drain instance", "instance", in.ID, "err", err)
		return
	}
	d.drain(ctx, in.App, in.Release)
}

// without notes that an instance is on its way out. serves is false when its
// release gets no requests anyhow.
func (r *routes) without(in m3o.Instance) (gen uint64, serves bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.live[in.App] != in.Release && r.canaries[in.App].Version != in.Release {
		return 0, false
	}
	r.merge(in)
	return r.touch(in.App), true
}
