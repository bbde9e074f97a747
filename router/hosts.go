package router

import (
	"hash/maphash"
	"iter"
	"maps"
	"strings"

	"github.com/m3o/m3o"
)

// live is a Table made ready to serve: immutable but for the counters in what
// it points to. Router.live swaps it whole; two that follow each other share
// what did not change.
type live struct {
	domain string
	seq    uint64 // counts the tables this state file has seen
	sum    digest
	hosts  hostMap
	apps   hostMap // by app: the host that api.<domain>/<app>/… means
	wild   int     // hosts that begin with "*."
}

// find is the row of a host name, its own or that of its wildcard.
func (l *live) find(name string) *host {
	if h := l.hosts.get(name); h != nil || l.wild == 0 {
		return h
	}
	if i := strings.IndexByte(name, '.'); i > 0 {
		return l.hosts.get("*" + name[i:])
	}
	return nil
}

// apiEndpoint is where the daemon's API is served, nil when the table has none.
func (rt *Router) apiEndpoint() *endpoint {
	l := rt.live.Load()
	if l == nil {
		return nil
	}
	if h := l.hosts.get("api." + l.domain); h != nil && h.Kind == KindAPI && len(h.pool) > 0 {
		return h.pool[0]
	}
	return nil
}

// isMain says that h is the host an app is known by.
func (l *live) isMain(h *host) bool { return h.Name == h.App+"."+l.domain }

// table is l as it was handed over, its hosts in no order.
func (l *live) tableOf() Table {
	t := Table{Domain: l.domain, Hosts: make([]Host, 0, l.hosts.n)}
	for h := range l.hosts.all() {
		t.Hosts = append(t.Hosts, h.Host)
	}
	return t
}

// shards is into how many maps a hostMap is divided: copying one for a change
// costs 400 entries of 100,000.
const shards = 256

var shardSeed = maphash.MakeSeed()

// hostMap is a map by name whose copies share what has not changed. The zero
// value is empty. It is immutable; an edit makes another one.
type hostMap struct {
	n      int
	shards *[shards]map[string]*host
}

func (m hostMap) get(name string) *host {
	if m.shards == nil {
		return nil
	}
	return m.shards[maphash.String(shardSeed, name)%shards][name]
}

func (m hostMap) all() iter.Seq[*host] {
	return func(yield func(*host) bool) {
		if m.shards == nil {
			return
		}
		for _, s := range m.shards {
			for _, h := range s {
				if !yield(h) {
					return
				}
			}
		}
	}
}

// hostEdit makes a hostMap out of another one.
type hostEdit struct {
	m     hostMap
	owned [shards]bool // made by this edit, so it may be written to
}

func editHosts(m hostMap) *hostEdit {
	e := &hostEdit{m: hostMap{n: m.n, shards: new([shards]map[string]*host)}}
	if m.shards != nil {
		*e.m.shards = *m.shards
	}
	return e
}

func (e *hostEdit) shard(name string) map[string]*host {
	i := maphash.String(shardSeed, name) % shards
	if !e.owned[i] {
		e.owned[i] = true
		if s := e.m.shards[i]; s == nil {
			e.m.shards[i] = map[string]*host{}
		} else {
			e.m.shards[i] = maps.Clone(s)
		}
	}
	return e.m.shards[i]
}

// put returns what it replaces, nil for nothing.
func (e *hostEdit) put(name string, h *host) *host {
	s := e.shard(name)
	old := s[name]
	if old == nil {
		e.m.n++
	}
	s[name] = h
	return old
}

func (e *hostEdit) remove(name string) *host {
	if e.m.get(name) == nil {
		return nil
	}
	s := e.shard(name)
	old := s[name]
	delete(s, name)
	e.m.n--
	return old
}

// endpointID tells endpoints apart: an address may be given to another release.
type endpointID struct {
	id   releaseID
	addr string
}

// newHost makes a row ready to serve, with the endpoints and the app that are
// known already. rt.mu is held.
func (rt *Router) newHost(row Host) *host {
	h := &host{Host: row, grpc: row.Protocol == GRPC, h2: row.Protocol == GRPC || row.Protocol == H2C, sum: sumOf(&row),
		api: &m3o.API{App: row.App, Release: row.Release, Schema: row.Descriptors, Origins: row.Origins, Strict: row.StrictJSON}}
	if h.app = rt.apps[row.App]; h.app == nil {
		h.app = &app{rows: map[int]int{}, owns: map[int]*own{}}
		rt.apps[row.App] = h.app
	}
	h.app.rows[row.Release]++
	if row.Kind == KindRelease {
		if h.own = h.app.owns[row.Release]; h.own == nil {
			h.own = &own{}
			h.app.owns[row.Release] = h.own
		}
	}
	h.policy = compilePolicy(row.Policy)
	h.pool = rt.pool(releaseID{row.App, row.Release}, row.Endpoints)
	if c := row.Canary; c != nil {
		h.app.rows[c.Release]++
		own := row
		own.Release, own.Endpoints, own.Protocol, own.Descriptors, own.Canary = c.Release, c.Endpoints, c.Protocol, c.Descriptors, nil
		h.canary = &host{Host: own, app: h.app, grpc: c.Protocol == GRPC, h2: c.Protocol == GRPC || c.Protocol == H2C, policy: h.policy,
			api: &m3o.API{App: row.App, Release: c.Release, Schema: c.Descriptors, Origins: row.Origins, Strict: row.StrictJSON}, pool: rt.pool(releaseID{row.App, c.Release}, c.Endpoints)}
	}
	return h
}

// pool is the endpoints of a release, each with one more row that has it.
// rt.mu is held.
func (rt *Router) pool(id releaseID, addrs []string) []*endpoint {
	var pool []*endpoint
	for _, addr := range addrs {
		k := endpointID{id, addr}
		e := rt.endpoints[k]
		if e == nil {
			e = newEndpoint(id, addr, rt.limits)
			rt.endpoints[k] = e
		}
		e.refs++
		pool = append(pool, e)
	}
	return pool
}

// drop forgets a row. It returns the endpoints that no row has any more.
// rt.mu is held.
func (rt *Router) drop(h *host) (gone []*endpoint) {
	if h.canary != nil {
		gone = rt.drop(h.canary)
	}
	if h.app.rows[h.Release]--; h.app.rows[h.Release] == 0 {
		delete(h.app.rows, h.Release)
		delete(h.app.owns, h.Release)
	}
	if len(h.app.rows) == 0 {
		delete(rt.apps, h.App)
		rt.limiter.forget(h.App)
	}
	for _, e := range h.pool {
		if e.refs--; e.refs == 0 {
			delete(rt.endpoints, endpointID{e.id, e.addr})
			gone = append(gone, e)
		}
	}
	return gone
}

// apply makes another live table out of old, which may be nil, and the
// endpoints that only old had. rt.mu is held, and the caller makes the result
// the live one.
func (rt *Router) apply(old *live, domain string, set []Host, remove []string) (next *live, gone []*endpoint, touched map[*app]bool) {
	next = &live{domain: domain, sum: sumOf(domain)}
	if old != nil {
		next.seq, next.hosts, next.apps, next.wild = old.seq+1, old.hosts, old.apps, old.wild
		next.sum = old.sum.sub(sumOf(old.domain)).add(next.sum)
	}
	hosts, apps := editHosts(next.hosts), editHosts(next.apps)
	touched = make(map[*app]bool, len(set)+len(remove))
	var dropped []*host
	forget := func(h *host) {
		dropped = append(dropped, h)
		touched[h.app] = true
		next.sum = next.sum.sub(h.sum)
		if apps.m.get(h.App) == h {
			apps.remove(h.App)
		}
		if h.Name[0] == '*' {
			next.wild--
		}
	}
	for _, name := range remove {
		if h := hosts.remove(name); h != nil {
			forget(h)
		}
	}
	for _, row := range set {
		h := rt.newHost(row) // before its predecessor goes, or their endpoints would
		touched[h.app] = true
		next.sum = next.sum.add(h.sum)
		if prev := hosts.put(h.Name, h); prev != nil {
			forget(prev)
		}
		if h.Name[0] == '*' {
			next.wild++
		}
		if h.Kind == KindAPI || h.Kind == KindRelease || h.Redirect != "" {
			continue
		}
		// An app's other hosts stand in for its own name only while that is missing.
		if next.isMain(h) || apps.m.get(h.App) == nil {
			apps.put(h.App, h)
		}
	}
	next.hosts, next.apps = hosts.m, apps.m
	for _, h := range dropped {
		gone = append(gone, rt.drop(h)...)
	}
	return next, gone, touched
}
