package daemon

import (
	"cmp"
	"context"
	"fmt"
	"log/slog"
	"maps"
	"reflect"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/m3o/m3o"
	"github.com/m3o/m3o/router"
)

// traits is what a release showed when it first became ready.
type traits struct {
	Protocol    string   // as router.Host.Protocol
	HTTP        m3o.HTTP `json:"-"` // of the release, which knows it
	Descriptors string   // file of its FileDescriptorSet, "" when it has none
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
	router tables
	log    *slog.Logger
	told   func(old, now m3o.Instance)     // of a change that follow has taken in; old is zero for a new one, now for one that is gone unseen
	policy func(app string) *router.Policy // what app asks of its requests; nil for nothing

	mu        sync.Mutex // guards what follows
	canaries  map[string]canary
	live      map[string]int
	kept      map[string][]int        // releases a rollback offers, which have a host of their own
	woken     map[string]map[int]bool // those of them that a request has started
	hosts     map[string][]alias
	modes     map[string]mode
	rests     map[string]rest
	instances map[string]m3o.Instance
	byApp     map[string]map[string]bool // ids in instances
	gone      map[string]time.Time       // ids that were removed lately, and when
	traits    map[appVersion]traits
	dirty     map[string]bool // apps whose rows may differ from what was sent
	whole     bool            // the next table is sent whole
	held      bool            // nothing is sent yet: too little is known
	gen       uint64          // counts changes
	applied   uint64          // the newest gen the router has
	changed   chan struct{}   // closed and replaced when applied moves

	wake chan struct{} // holds one token when gen > applied
}

// tables is the router's side: router.Client is the real one.
type tables interface {
	Put(context.Context, router.Table) (hash string, err error)
	Apply(context.Context, router.Change) (hash string, err error)
}

// newsTime is more than news of an instance can be late.
const newsTime = 10 * time.Minute

// alias is one further host of an app.
type alias struct{ name, redirect string }

// mode is what an operator set an app to.
type mode struct{ maintenance, paused bool }

// setRest says that an app is asleep, or that its only instance is about to be
// replaced, and gives the generation of the table that says so.
func (r *routes) setRest(app string, z rest) uint64 {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.rests[app] == z {
		return 0
	}
	r.rests[app] = z
	return r.touch(app)
}

// rest is why an app has no instance for a while: requests wait then.
type rest struct{ asleep, hold bool }

func newRoutes(domain, api string, rt tables, log *slog.Logger) *routes {
	return &routes{domain: domain, api: api, router: rt, log: log, told: func(_, _ m3o.Instance) {},
		policy: func(string) *router.Policy { return nil }, canaries: map[string]canary{},
		live: map[string]int{}, kept: map[string][]int{}, woken: map[string]map[int]bool{}, hosts: map[string][]alias{}, modes: map[string]mode{}, rests: map[string]rest{},
		instances: map[string]m3o.Instance{}, byApp: map[string]map[string]bool{}, gone: map[string]time.Time{}, traits: map[appVersion]traits{},
		dirty: map[string]bool{}, whole: true, held: true, changed: make(chan struct{}), wake: make(chan struct{}, 1)}
}

// touch notes a change of an app, "" for all of them, and wakes the loop. The
// caller holds mu.
func (r *routes) touch(app string) uint64 {
	if app == "" {
		r.whole = true
	} else {
		r.dirty[app] = true
	}
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
	r.touch("")
}

// open lets the first table out. Until then the router serves its last good
// one: a daemon that has just started knows the apps before it knows which
// instances are ready.
func (r *routes) open() {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.held = false
	r.touch("")
}

// schemas are the files of descriptors that instances are called by.
func (r *routes) schemas() []string {
	r.mu.Lock()
	defer r.mu.Unlock()
	var files []string
	for _, t := range r.traits {
		if t.Descriptors != "" {
			files = append(files, t.Descriptors)
		}
	}
	return files
}

// setTraits remembers how a release is spoken to.
func (r *routes) setTraits(app string, version int, t traits) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.traits[appVersion{app, version}] = t
	r.touch(app)
}

// setKept says which releases of app have a host of their own.
func (r *routes) setKept(app string, versions []int) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for k := range r.traits {
		if len(versions) > 0 && k.app == app && k.version < slices.Min(versions) && k.version != r.live[app] {
			delete(r.traits, k)
		}
	}
	r.kept[app] = versions
	r.touch(app)
}

// setHosts says which hosts app has beside its own.
func (r *routes) setHosts(app string, hosts []alias) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.hosts[app] = hosts
	r.touch(app)
}

// destroy drops all that is known of an app but its instances.
func (r *routes) destroy(app string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	delete(r.live, app)
	delete(r.kept, app)
	delete(r.woken, app)
	delete(r.hosts, app)
	delete(r.modes, app)
	delete(r.canaries, app)
	delete(r.rests, app)
	r.touch(app)
}

// loadMode is setMode without waiting for the router, for a daemon that starts.
func (r *routes) loadMode(app string, m mode) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.modes[app] = m
	r.touch(app)
}

// has says that <label>.<domain> is a host of an app.
func (r *routes) has(label string) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.live[label] != 0 {
		return true
	}
	v, app, ok := strings.Cut(label, "--")
	return ok && slices.ContainsFunc(r.kept[app], func(n int) bool { return v == fmt.Sprintf("v%d", n) })
}

// setMode changes what an operator set app to, and returns once the router
// does it.
func (r *routes) setMode(ctx context.Context, app string, m mode) error {
	r.mu.Lock()
	r.modes[app] = m
	gen := r.touch(app)
	r.mu.Unlock()
	return r.wait(ctx, gen)
}

// repolicy has the router follow a change of app's policy.
func (r *routes) repolicy(ctx context.Context, app string) error {
	r.mu.Lock()
	gen := r.touch(app)
	r.mu.Unlock()
	return r.wait(ctx, gen)
}

// canary is a release that takes a part of an app's requests.
type canary struct {
	Version int     `json:"version"`
	Percent float64 `json:"percent"`
	Sticky  string  `json:"sticky,omitempty"`
}

// setCanary makes c the canary of app, the zero one for none, and returns once
// the router divides the requests so.
func (r *routes) setCanary(ctx context.Context, app string, c canary) error {
	r.mu.Lock()
	r.canaries[app] = c
	if c.Version == 0 {
		delete(r.canaries, app)
	}
	gen := r.touch(app)
	r.mu.Unlock()
	return r.wait(ctx, gen)
}

// adoptCanary is setCanary without waiting for the router, for a daemon that starts.
func (r *routes) adoptCanary(app string, c canary) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.canaries[app] = c
	r.touch(app)
}

// canaryOf is the canary of app, the zero one for none.
func (r *routes) canaryOf(app string) canary {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.canaries[app]
}

// endpoints are the ready web instances of a release. The caller holds mu.
func (r *routes) endpoints(app string, version int) []string {
	var eps []string
	for id := range r.byApp[app] {
		if in := r.instances[id]; in.Phase == m3o.Ready && in.Addr != "" && in.Process == webProcess && in.Release == version {
			eps = append(eps, in.Addr)
		}
	}
	slices.Sort(eps)
	return eps
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
	gen := r.touch(app)
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
	if _, ok := r.gone[in.ID]; ok {
		return false
	}
	old, known := r.instances[in.ID]
	if known && in.At.Before(old.At) {
		return false
	}
	if in.Phase == m3o.Exited && old.Phase == m3o.Draining {
		r.remove(old) // it was told to go, so it will not be seen again
		r.bury(in.ID)
		return true
	}
	r.insert(in)
	return !known || old.Phase != in.Phase || old.Addr != in.Addr
}

func (r *routes) insert(in m3o.Instance) {
	r.instances[in.ID] = in
	if r.byApp[in.App] == nil {
		r.byApp[in.App] = map[string]bool{}
	}
	r.byApp[in.App][in.ID] = true
}

func (r *routes) remove(in m3o.Instance) {
	delete(r.instances, in.ID)
	if delete(r.byApp[in.App], in.ID); len(r.byApp[in.App]) == 0 {
		delete(r.byApp, in.App)
	}
}

// bury has late news of an instance that is gone fall on deaf ears: who waited
// for it to be ready may tell of it after its end. The caller holds mu.
func (r *routes) bury(id string) {
	now := time.Now()
	maps.DeleteFunc(r.gone, func(_ string, at time.Time) bool { return now.Sub(at) > newsTime })
	r.gone[id] = now
}

// know takes in instances that the driver's events may not have told of yet.
func (r *routes) know(ins []m3o.Instance) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, in := range ins {
		r.merge(in)
		r.touch(in.App)
	}
}

// forget drops what is known of a release that is gone.
func (r *routes) forget(app string, version int) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for id := range r.byApp[app] {
		if in := r.instances[id]; in.Release == version && in.Phase == m3o.Exited {
			r.remove(in)
		}
	}
	if !slices.Contains(r.kept[app], version) { // else its host is spoken to as before
		delete(r.traits, appVersion{app, version})
	}
}

// rows are the rows of app that should be served now. The caller holds mu.
func (r *routes) rows(app string) []router.Host {
	version := r.live[app]
	if version == 0 {
		return nil
	}
	eps, policy := r.endpoints(app, version), r.policy(app)
	row := func(v int, eps []string) router.Host {
		tr, m := r.traits[appVersion{app, v}], r.modes[app]
		return router.Host{Kind: router.KindApp, App: app, Release: v, Endpoints: eps, Protocol: cmp.Or(tr.Protocol, router.HTTP1),
			Descriptors: tr.Descriptors, Origins: tr.HTTP.Origins, StrictJSON: tr.HTTP.Strict, Maintenance: m.maintenance, Paused: m.paused, Policy: policy}
	}
	z := r.rests[app]
	if z.asleep {
		eps = nil // what is still there is on its way out
	}
	main := row(version, eps)
	main.Name, main.Asleep, main.Hold = app+"."+r.domain, z.asleep, z.hold
	if c := r.canaries[app]; c.Version != 0 && c.Version != version {
		tr := r.traits[appVersion{app, c.Version}]
		main.Canary = &router.Canary{Release: c.Version, Endpoints: r.endpoints(app, c.Version), Protocol: cmp.Or(tr.Protocol, router.HTTP1),
			Descriptors: tr.Descriptors, Percent: c.Percent, Sticky: c.Sticky}
	}
	rows := []router.Host{main}
	for _, al := range r.hosts[app] {
		h := main
		if h.Name = al.name; al.redirect != "" {
			h = router.Host{Name: al.name, Kind: router.KindApp, App: app, Redirect: al.redirect}
		}
		rows = append(rows, h)
	}
	for _, v := range r.kept[app] {
		// An old release has endpoints here only once a request has woken it: a
		// row that kept them would keep its requests from draining.
		h := row(v, nil)
		switch {
		case v == version:
			h.Endpoints, h.Asleep, h.Hold = eps, z.asleep, z.hold
		case r.woken[app][v] || v == r.canaries[app].Version:
			h.Endpoints = r.endpoints(app, v)
			h.Asleep = len(h.Endpoints) == 0
		default:
			h.Asleep = true
		}
		h.Name, h.Kind = fmt.Sprintf("v%d--%s.%s", v, app, r.domain), router.KindRelease
		rows = append(rows, h)
	}
	return rows
}

// apiRow is the row of the daemon's own API.
func (r *routes) apiRow() router.Host {
	return router.Host{Name: "api." + r.domain, Kind: router.KindAPI, App: "api", Endpoints: []string{r.api}, Protocol: router.H2C}
}

// table is the table that should be served now.
func (r *routes) table() router.Table {
	r.mu.Lock()
	defer r.mu.Unlock()
	t := router.Table{Domain: r.domain, Hosts: []router.Host{r.apiRow()}}
	for app := range r.live {
		t.Hosts = append(t.Hosts, r.rows(app)...)
	}
	return t
}

// list gives the known instances of an app, "" for all, by process and id.
func (r *routes) list(app string) []m3o.Instance {
	r.mu.Lock()
	defer r.mu.Unlock()
	var out []m3o.Instance
	if app == "" {
		out = slices.Collect(maps.Values(r.instances))
	}
	for id := range r.byApp[app] {
		out = append(out, r.instances[id])
	}
	slices.SortFunc(out, func(a, b m3o.Instance) int {
		return cmp.Or(cmp.Compare(a.App, b.App), cmp.Compare(a.Process, b.Process), cmp.Compare(b.Release, a.Release), cmp.Compare(a.ID, b.ID))
	})
	return out
}

// sender brings the router to the newest table. It belongs to run alone.
type sender struct {
	*routes
	hash string                   // of what the router has
	sent map[string][]router.Host // by app; nil: the next table is sent whole
}

// send gives the router what has changed, and says which generation it has now.
func (s *sender) send(ctx context.Context) (uint64, error) {
	s.mu.Lock()
	if s.held {
		s.mu.Unlock()
		return 0, nil
	}
	gen, dirty := s.gen, s.dirty
	if s.whole || s.sent == nil {
		s.sent = map[string][]router.Host{}
		dirty = map[string]bool{}
		for app := range s.live {
			dirty[app] = true
		}
	}
	whole := len(s.sent) == 0
	ch := router.Change{Base: s.hash}
	rows := make(map[string][]router.Host, len(dirty))
	for app := range dirty {
		rows[app] = s.rows(app)
	}
	s.dirty, s.whole = map[string]bool{}, false
	s.mu.Unlock()

	if whole {
		t := router.Table{Domain: s.domain, Hosts: []router.Host{s.apiRow()}}
		for _, rs := range rows {
			t.Hosts = append(t.Hosts, rs...)
		}
		slices.SortFunc(t.Hosts, func(a, b router.Host) int { return cmp.Compare(a.Name, b.Name) })
		hash, err := s.router.Put(ctx, t)
		if err != nil {
			s.sent = nil
			return 0, err
		}
		s.hash = hash
	} else {
		for app := range dirty {
			set, remove := difference(s.sent[app], rows[app])
			ch.Set, ch.Remove = append(ch.Set, set...), append(ch.Remove, remove...)
		}
		// A host that went from one app to another is not removed.
		ch.Remove = slices.DeleteFunc(ch.Remove, func(name string) bool {
			return slices.ContainsFunc(ch.Set, func(h router.Host) bool { return h.Name == name })
		})
		if len(ch.Set)+len(ch.Remove) > 0 {
			hash, err := s.router.Apply(ctx, ch)
			if err != nil {
				s.sent = nil // whatever it is: the whole table mends it
				return 0, err
			}
			s.hash = hash
		}
	}
	for app, rs := range rows {
		if s.sent[app] = rs; rs == nil {
			delete(s.sent, app)
		}
	}
	return gen, nil
}

// difference is what makes new out of old.
func difference(old, new []router.Host) (set []router.Host, remove []string) {
	had := make(map[string]router.Host, len(old))
	for _, h := range old {
		had[h.Name] = h
	}
	for _, h := range new {
		if o, ok := had[h.Name]; !ok || !reflect.DeepEqual(o, h) {
			set = append(set, h)
		}
		delete(had, h.Name)
	}
	return set, slices.Collect(maps.Keys(had))
}

// run keeps the router at the newest table until ctx ends. A router that is
// away is tried again with growing pauses; it serves its last table meanwhile.
func (r *routes) run(ctx context.Context) error {
	s := &sender{routes: r}
	pause := time.Duration(0)
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-r.wake:
		}
		pctx, cancel := context.WithTimeout(ctx, 10*time.Second)
		gen, err := s.send(pctx)
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
		r.refresh()
		if m3o.KindOf(err) == m3o.Conflict {
			continue // another router than before: it gets the whole table
		}
		r.log.Warn("router did not take the table", "err", err)
		pause = min(max(2*pause, 50*time.Millisecond), 2*time.Second)
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(pause):
		}
	}
}

// setLive is point without waiting for the router, for a daemon that starts.
func (r *routes) setLive(app string, version int) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.live[app] = version
	r.touch(app)
}
