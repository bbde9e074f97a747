package daemon

import (
	"cmp"
	"context"
	"log/slog"
	"maps"
	"slices"
	"sync"
	"time"

	"github.com/m3o/m3o"
	"github.com/m3o/m3o/router"
	"github.com/m3o/m3o/runtime"
)

// traits is what a release showed when it first became ready.
type traits struct {
	Protocol    string // as router.Host.Protocol
	Descriptors string // file of its FileDescriptorSet, "" when it has none
}

type appVersion struct {
	app     string
	version int
}

// routes derives the router's table from which release of each app is live
// and which instances are ready, and keeps the router at it. Everything in it
// can be rebuilt from the ledger and the driver.
type routes struct {
	domain string
	api    string // endpoint of the daemon's API
	put    func(context.Context, router.Table) error
	log    *slog.Logger

	mu        sync.Mutex // guards what follows
	live      map[string]int
	instances map[string]m3o.Instance
	traits    map[appVersion]traits
	held      bool          // nothing is sent yet: too little is known
	gen       uint64        // counts changes
	applied   uint64        // the newest gen the router has
	changed   chan struct{} // closed and replaced when applied moves

	wake chan struct{} // holds one token when gen > applied
}

func newRoutes(domain, api string, put func(context.Context, router.Table) error, log *slog.Logger) *routes {
	return &routes{domain: domain, api: api, put: put, log: log,
		live: map[string]int{}, instances: map[string]m3o.Instance{}, traits: map[appVersion]traits{},
		held: true, changed: make(chan struct{}), wake: make(chan struct{}, 1)}
}

// touch notes a change and wakes the loop. The caller holds mu.
func (r *routes) touch() uint64 {
	r.gen++
	select {
	case r.wake <- struct{}{}:
	default:
	}
	return r.gen
}

// refresh makes the loop send the table again, to a router that has just started.
func (r *routes) refresh() {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.touch()
}

// open lets the first table out. Until then the router serves its last good
// one: a daemon that has just started knows the apps before it knows which
// instances are ready.
func (r *routes) open() {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.held = false
	r.touch()
}

// setTraits remembers how a release is spoken to.
func (r *routes) setTraits(app string, version int, t traits) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.traits[appVersion{app, version}] = t
	r.touch()
}

// point makes version the one that app's host leads to, 0 for none, and
// returns once the router serves it. ready are instances known to be ready,
// which the driver's events may not have told of yet.
func (r *routes) point(ctx context.Context, app string, version int, ready []m3o.Instance) error {
	r.mu.Lock()
	if version == 0 {
		delete(r.live, app)
	} else {
		r.live[app] = version
	}
	for _, in := range ready {
		r.merge(in)
	}
	gen := r.touch()
	r.mu.Unlock()
	return r.wait(ctx, gen)
}

func (r *routes) wait(ctx context.Context, gen uint64) error {
	for {
		r.mu.Lock()
		done, changed := r.applied >= gen, r.changed
		r.mu.Unlock()
		if done {
			return nil
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return &m3o.Error{Kind: m3o.Unavailable, Msg: "the router does not answer",
				Hint: "the daemon restarts it; its log says why it stopped", Err: context.Cause(ctx)}
		}
	}
}

// merge takes in what is newer than what is known. The caller holds mu.
func (r *routes) merge(in m3o.Instance) bool {
	old, known := r.instances[in.ID]
	if known && in.At.Before(old.At) {
		return false
	}
	if in.Phase == m3o.Exited && old.Phase == m3o.Draining {
		delete(r.instances, in.ID) // it was told to go, so it will not be seen again
		return true
	}
	r.instances[in.ID] = in
	return !known || old.Phase != in.Phase || old.Addr != in.Addr
}

// know takes in instances that the driver's events may not have told of yet.
func (r *routes) know(ins []m3o.Instance) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, in := range ins {
		r.merge(in)
	}
	r.touch()
}

// forget drops what is known of a release that is gone.
func (r *routes) forget(app string, version int) {
	r.mu.Lock()
	defer r.mu.Unlock()
	maps.DeleteFunc(r.instances, func(_ string, in m3o.Instance) bool {
		return in.App == app && in.Release == version && in.Phase == m3o.Exited
	})
	delete(r.traits, appVersion{app, version})
}

// table is the table that should be served now, and its generation; ok is
// false while it is held back.
func (r *routes) table() (t router.Table, gen uint64, ok bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.held {
		return t, 0, false
	}
	t = router.Table{Domain: r.domain, Hosts: []router.Host{{
		Name: "api." + r.domain, Kind: "api", App: "api", Endpoints: []string{r.api}, Protocol: "h2c"}}}
	byApp := map[appVersion][]string{}
	for _, in := range r.instances {
		if in.Phase == m3o.Ready && in.Addr != "" && in.Process == webProcess {
			k := appVersion{in.App, in.Release}
			byApp[k] = append(byApp[k], in.Addr)
		}
	}
	for app, version := range r.live {
		k := appVersion{app, version}
		eps := byApp[k]
		slices.Sort(eps)
		tr := r.traits[k]
		t.Hosts = append(t.Hosts, router.Host{Name: app + "." + r.domain, Kind: "app", App: app, Release: version,
			Endpoints: eps, Protocol: cmp.Or(tr.Protocol, "http1"), Descriptors: tr.Descriptors})
	}
	slices.SortFunc(t.Hosts, func(a, b router.Host) int { return cmp.Compare(a.Name, b.Name) })
	return t, r.gen, true
}

// list gives the known instances of an app, "" for all, by process and id.
func (r *routes) list(app string) []m3o.Instance {
	r.mu.Lock()
	defer r.mu.Unlock()
	var out []m3o.Instance
	for _, in := range r.instances {
		if app == "" || in.App == app {
			out = append(out, in)
		}
	}
	slices.SortFunc(out, func(a, b m3o.Instance) int {
		return cmp.Or(cmp.Compare(a.App, b.App), cmp.Compare(a.Process, b.Process), cmp.Compare(b.Release, a.Release), cmp.Compare(a.ID, b.ID))
	})
	return out
}

// run keeps the router at the newest table until ctx ends. A router that is
// away is tried again with growing pauses; it serves its last table meanwhile.
func (r *routes) run(ctx context.Context) error {
	pause := time.Duration(0)
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-r.wake:
		}
		t, gen, ok := r.table()
		if !ok {
			continue // open wakes us
		}
		pctx, cancel := context.WithTimeout(ctx, 10*time.Second)
		err := r.put(pctx, t)
		cancel()
		if err == nil {
			pause = 0
			r.mu.Lock()
			r.applied = max(r.applied, gen)
			close(r.changed)
			r.changed = make(chan struct{})
			r.mu.Unlock()
			continue
		}
		if ctx.Err() != nil {
			return nil
		}
		r.log.Warn("router did not take the table", "err", err)
		pause = min(max(2*pause, 50*time.Millisecond), 2*time.Second)
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(pause):
		}
		r.refresh()
	}
}

// follow takes in the driver's events until ctx ends.
func (r *routes) follow(ctx context.Context, d runtime.Driver) error {
	for ctx.Err() == nil {
		fresh := map[string]m3o.Instance{}
		seeded := false
		for in, err := range d.Events(ctx) {
			if err != nil {
				if ctx.Err() == nil {
					r.log.Error("instance events broke off", "err", err)
				}
				break
			}
			r.mu.Lock()
			switch {
			case in.ID == "": // all that exist have been told
				seeded = true
				r.instances = fresh
				r.touch()
			case !seeded:
				fresh[in.ID] = in
			case r.merge(in):
				r.touch()
			}
			r.mu.Unlock()
		}
		select {
		case <-ctx.Done():
		case <-time.After(100 * time.Millisecond):
		}
	}
	return nil
}

// setLive is point without waiting for the router, for a daemon that starts.
func (r *routes) setLive(app string, version int) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.live[app] = version
	r.touch()
}
