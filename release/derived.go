package release

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"

	"github.com/m3o/m3o"
	"github.com/m3o/m3o/store"
)

// derived is what follows from the records of one app. It is a cache: dropping
// it and calling recompute gives the same.
type derived struct {
	builds, releases, deploys int // the highest numbers, 0 for none

	live    int       // version that serves, 0 for none
	liveRev store.Rev // of the deploy that made it so: the order of going live, whatever the clock says

	went map[int]bool   // versions that were live once
	held map[int]bool   // versions that were built while the app was locked
	pub  map[int]bool   // held versions whose image has been made live since
	open map[string]int // unfinished deploys by ID, with their version or 0
}

func newDerived() *derived {
	return &derived{went: map[int]bool{}, held: map[int]bool{}, pub: map[int]bool{}, open: map[string]int{}}
}

func (x *derived) clone() *derived {
	c := *x
	c.went, c.held, c.pub, c.open = maps.Clone(x.went), maps.Clone(x.held), maps.Clone(x.pub), maps.Clone(x.open)
	return &c
}

// see takes in the state of a deploy as written at rev. The order in which
// different deploys are seen does not matter; that of one deploy's states does.
func (x *derived) see(d Deploy, rev store.Rev) {
	delete(x.open, d.ID)
	switch {
	case d.Status == Live:
		x.went[d.Release] = true
		if rev > x.liveRev {
			x.live, x.liveRev = d.Release, rev
		}
		if d.Publish > 0 {
			x.pub[d.Publish] = true
		}
	case d.Status == Held:
		x.held[d.Release] = true
	case !d.Status.Ended():
		x.open[d.ID] = d.Release
	}
}

// pending reports whether a deploy may yet make version live. A deploy learns
// its version a moment after the release is written: meanwhile it is the newest.
func (x *derived) pending(version int) bool {
	for _, v := range x.open {
		if v == version || v == 0 && version == x.releases {
			return true
		}
	}
	return false
}

// kept is the versions a rollback offers, newest first.
func (x *derived) kept() []int {
	others := 0
	return slices.DeleteFunc(slices.SortedFunc(maps.Keys(x.went), func(a, b int) int { return b - a }), func(v int) bool {
		if v == x.live {
			return false
		}
		others++
		return others > keep
	})
}

// publishable is the held versions that may still be published, newest first.
func (x *derived) publishable() []int {
	list := slices.SortedFunc(maps.Keys(x.held), func(a, b int) int { return b - a })
	list = slices.DeleteFunc(list, func(v int) bool { return x.pub[v] })
	return list[:min(len(list), keep)]
}

// derived gives a copy of what follows from the records of app.
func (l *Ledger) derived(ctx context.Context, app string) (*derived, error) {
	l.mu.Lock()
	x, gen := l.index[app], l.gen
	if x != nil {
		x = x.clone()
	}
	l.mu.Unlock()
	if x != nil {
		return x, nil
	}
	if m3o.CheckName(app) != nil {
		return newDerived(), nil
	}
	found, err := l.recompute(ctx, app)
	if err != nil {
		return nil, err
	}
	x = found[app]
	if x == nil {
		return newDerived(), nil // not cached: anybody can ask for any name
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.gen == gen {
		l.index[app] = x.clone()
	}
	return x, nil
}

// change brings the index up to date after a write. An app that is not in the
// index is read again when it is next asked for.
func (l *Ledger) change(app string, f func(*derived)) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.gen++
	if x := l.index[app]; x != nil {
		f(x)
	}
}

// forget drops what is known of app, when a write may or may not have happened.
func (l *Ledger) forget(app string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.gen++
	delete(l.index, app)
}

// recompute derives everything from the records of app, or of all apps when it
// is "".
func (l *Ledger) recompute(ctx context.Context, app string) (map[string]*derived, error) {
	prefix := ""
	if app != "" {
		prefix = app + "/"
	}
	all := map[string]*derived{}
	of := func(key string) (*derived, int, error) {
		name, num, _ := strings.Cut(key, "/")
		n, err := strconv.Atoi(num)
		if err != nil {
			return nil, 0, fmt.Errorf("record %q has no number", key)
		}
		if all[name] == nil {
			all[name] = newDerived()
		}
		return all[name], n, nil
	}
	builds, err := l.builds.List(ctx, prefix)
	if err != nil {
		return nil, err
	}
	for _, e := range builds {
		x, n, err := of(e.Key)
		if err != nil {
			return nil, err
		}
		x.builds = max(x.builds, n)
	}
	releases, err := l.releases.List(ctx, prefix)
	if err != nil {
		return nil, err
	}
	for _, e := range releases {
		x, n, err := of(e.Key)
		if err != nil {
			return nil, err
		}
		x.releases = max(x.releases, n)
	}
	deploys, err := l.deploys.List(ctx, prefix)
	if err != nil {
		return nil, err
	}
	for _, e := range deploys {
		x, n, err := of(e.Key)
		if err != nil {
			return nil, err
		}
		x.deploys = max(x.deploys, n)
		x.see(e.Value, e.Rev)
	}
	return all, nil
}
