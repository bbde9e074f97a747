package daemon

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/m3o/m3o"
	"github.com/m3o/m3o/router"
)

// puts records the tables a router was given; fail makes it refuse.
type puts struct {
	mu      sync.Mutex
	tables  []router.Table // as they became
	changes []router.Change
	fail    bool
}

func (p *puts) Put(_ context.Context, t router.Table) (string, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.fail {
		return "", errors.New("router away")
	}
	p.tables = append(p.tables, t)
	return router.TableHash(t), nil
}

func (p *puts) Apply(_ context.Context, c router.Change) (string, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	last := router.Table{}
	if n := len(p.tables); n > 0 {
		last = p.tables[n-1]
	}
	switch {
	case p.fail:
		return "", errors.New("router away")
	case router.TableHash(last) != c.Base:
		return "", &m3o.Error{Kind: m3o.Conflict, Msg: "another table"}
	}
	p.changes = append(p.changes, c)
	next := router.Table{Domain: last.Domain, Hosts: slices.Clone(c.Set)}
	for _, h := range last.Hosts {
		if !slices.Contains(c.Remove, h.Name) && !slices.ContainsFunc(c.Set, func(s router.Host) bool { return s.Name == h.Name }) {
			next.Hosts = append(next.Hosts, h)
		}
	}
	p.tables = append(p.tables, next)
	return router.TableHash(next), nil
}

func (p *puts) last() (router.Table, int) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if len(p.tables) == 0 {
		return router.Table{}, 0
	}
	return p.tables[len(p.tables)-1], len(p.tables)
}

func endpoints(t router.Table, host string) []string {
	for _, h := range t.Hosts {
		if h.Name == host {
			return h.Endpoints
		}
	}
	return nil
}

func ready(app string, release int, id, addr string, at time.Time) m3o.Instance {
	return m3o.Instance{App: app, Process: webProcess, Release: release, ID: id, Addr: addr, Phase: m3o.Ready, At: at}
}

func startRoutes(t *testing.T, p *puts) *routes {
	r := newRoutes("localhost", "unix:/api", p, slog.New(slog.DiscardHandler))
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error)
	go func() { done <- r.run(ctx) }()
	t.Cleanup(func() { cancel(); <-done })
	return r
}

// A daemon that has just started knows its apps before their instances: the
// router, which serves its last good table, must not be given less.
func TestRestartedDaemonDoesNotEmptyTheTable(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := &puts{}
		r := startRoutes(t, p)
		r.setLive("hello", 3)
		r.refresh()
		synctest.Wait()
		if _, n := p.last(); n != 0 {
			t.Fatalf("%d tables were sent before the instances are known", n)
		}
		r.know([]m3o.Instance{ready("hello", 3, "a", "198.18.0.1:8080", time.Now())})
		r.open()
		synctest.Wait()
		got, _ := p.last()
		if want := []string{"198.18.0.1:8080"}; !slices.Equal(endpoints(got, "hello.localhost"), want) {
			t.Errorf("first table %+v, want endpoints %v", got, want)
		}
	})
}

func TestPointReturnsOnceTheRouterHasTheTable(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := &puts{fail: true}
		r := startRoutes(t, p)
		r.open()
		pointed := make(chan error, 1)
		go func() {
			pointed <- r.point(t.Context(), "hello", 1, []m3o.Instance{ready("hello", 1, "a", "198.18.0.1:8080", time.Now())})
		}()
		time.Sleep(time.Second) // fake time: the loop tries again and again
		if len(pointed) != 0 {
			t.Fatal("point returned although the router refuses")
		}
		p.mu.Lock()
		p.fail = false
		p.mu.Unlock()
		if err := <-pointed; err != nil {
			t.Fatal(err)
		}
		if got, _ := p.last(); len(endpoints(got, "hello.localhost")) != 1 {
			t.Errorf("table %+v has no endpoint of hello", got)
		}
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		p.mu.Lock()
		p.fail = true
		p.mu.Unlock()
		if err := r.point(ctx, "hello", 2, nil); m3o.KindOf(err) != m3o.Unavailable {
			t.Errorf("point with a dead router = %v, want unavailable", err)
		}
	})
}

func TestLateEventDoesNotUndoANewerOne(t *testing.T) {
	r := newRoutes("localhost", "unix:/api", nil, nil)
	now := time.Now()
	r.know([]m3o.Instance{ready("hello", 1, "a", "198.18.0.1:8080", now)})
	late := ready("hello", 1, "a", "", now.Add(-time.Second))
	late.Phase = m3o.Starting
	r.know([]m3o.Instance{late})
	if got := r.list("hello"); len(got) != 1 || got[0].Phase != m3o.Ready {
		t.Errorf("instances %+v, want one ready", got)
	}
	gone := ready("hello", 1, "a", "", now.Add(time.Second))
	gone.Phase = m3o.Draining
	r.know([]m3o.Instance{gone})
	gone.Phase, gone.At = m3o.Exited, now.Add(2*time.Second)
	r.know([]m3o.Instance{gone})
	if got := r.list(""); len(got) != 0 {
		t.Errorf("an instance that was told to go is still listed: %+v", got)
	}
}

// A command that waits for instances to be ready tells of them when all are. One
// may have ended by then, and used to be listed, and sent requests, for ever.
func TestInstanceThatHasEndedIsNotReadyAgain(t *testing.T) {
	r := newRoutes("localhost", "unix:/api", nil, nil)
	now := time.Now()
	was := ready("hello", 1, "a", "198.18.0.1:8080", now)
	r.know([]m3o.Instance{was})
	in := was
	for i, p := range []m3o.Phase{m3o.Draining, m3o.Exited} {
		in.Phase, in.At = p, now.Add(time.Duration(i+1)*time.Second)
		r.know([]m3o.Instance{in})
	}
	r.know([]m3o.Instance{was})
	if got := r.list("hello"); len(got) != 0 {
		t.Errorf("an instance that has ended is back: %+v", got)
	}
}

// The host of a release that is not live leads nowhere until a request has
// woken the release, and again once that has been stopped or is crashing.
func TestHostOfAKeptReleaseLeadsToItOnlyWhileItIsWoken(t *testing.T) {
	r := newRoutes("localhost", "unix:/api", nil, nil)
	now := time.Now()
	r.setLive("hello", 2)
	r.setTraits("hello", 1, traits{Protocol: router.H2C})
	r.setKept("hello", []int{2, 1})
	old := ready("hello", 1, "a", "198.18.0.1:8080", now)
	r.know([]m3o.Instance{old, ready("hello", 2, "b", "198.18.0.2:8080", now)})
	want := func(when, eps string, asleep bool) {
		t.Helper()
		tab := r.table()
		if err := tab.Validate(); err != nil {
			t.Errorf("%s: %v", when, err)
		}
		for _, h := range tab.Hosts {
			if h.Name == "v1--hello.localhost" && (strings.Join(h.Endpoints, " ") != eps || h.Asleep != asleep || h.Protocol != router.H2C) {
				t.Errorf("%s: %+v", when, h)
			}
			if h.Name == "hello.localhost" && (strings.Join(h.Endpoints, " ") != "198.18.0.2:8080" || h.Asleep) {
				t.Errorf("%s the app is at %+v", when, h)
			}
		}
	}
	want("while it drains", "", true)
	if !r.wakeOne("hello", 1, []m3o.Instance{old}) || r.wakeOne("hello", 1, []m3o.Instance{old}) {
		t.Error("a release is woken once")
	}
	want("woken", "198.18.0.1:8080", false)
	crashed := old
	crashed.Phase, crashed.At = m3o.Exited, now.Add(time.Second)
	r.know([]m3o.Instance{crashed})
	want("crashed", "", true)
	r.forget("hello", 1)
	want("stopped", "", true)
	r.restOne("hello", 1)
	r.setCanary(canceled(t), "hello", canary{Version: 1, Percent: 5}) //nolint:errcheck // nobody takes the table
	r.know([]m3o.Instance{ready("hello", 1, "c", "198.18.0.3:8080", now)})
	want("as the canary", "198.18.0.3:8080", false)
}

func canceled(t *testing.T) context.Context {
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	return ctx
}

func TestOnlyWhatChangedIsSent(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := &puts{}
		r := startRoutes(t, p)
		now := time.Now()
		for i, app := range []string{"one", "two", "three"} {
			r.setLive(app, 1)
			r.know([]m3o.Instance{ready(app, 1, app, fmt.Sprintf("198.18.0.%d:8080", i+1), now)})
		}
		r.open()
		synctest.Wait()
		r.setKept("two", []int{2, 1})
		r.setHosts("two", []alias{{name: "two.example"}, {"www.two.example", "two.example"}})
		if err := r.point(t.Context(), "two", 2, []m3o.Instance{ready("two", 2, "b", "198.18.0.9:8080", now)}); err != nil {
			t.Fatal(err)
		}
		names := map[string]bool{}
		for _, c := range p.changes {
			for _, h := range c.Set {
				names[h.Name] = true
			}
		}
		if want := map[string]bool{"two.localhost": true, "two.example": true, "www.two.example": true, "v1--two.localhost": true, "v2--two.localhost": true}; !maps.Equal(names, want) {
			t.Errorf("sent %v, want %v", names, want)
		}
		got, _ := p.last()
		for host, want := range map[string]string{"two.localhost": "198.18.0.9:8080", "two.example": "198.18.0.9:8080", "v2--two.localhost": "198.18.0.9:8080", "v1--two.localhost": "", "one.localhost": "198.18.0.1:8080"} {
			if eps := strings.Join(endpoints(got, host), " "); eps != want {
				t.Errorf("%s leads to %q, want %q", host, eps, want)
			}
		}
		if router.TableHash(got) != router.TableHash(r.table()) {
			t.Error("the changes did not lead to the table that should be served")
		}
		if err := got.Validate(); err != nil {
			t.Error(err)
		}
		// A router that lost its table gets all of it.
		p.mu.Lock()
		p.tables = nil
		p.mu.Unlock()
		if err := r.point(t.Context(), "one", 0, nil); err != nil {
			t.Fatal(err)
		}
		if got, _ := p.last(); router.TableHash(got) != router.TableHash(r.table()) {
			t.Errorf("a router that lost its table has %+v", got)
		}
	})
}

// A list of instances that was made before one got ready, and taken in after,
// left the app without any.
func TestOldListTakesNoReadyInstanceBack(t *testing.T) {
	r := newRoutes("localhost", "unix:/nowhere", &puts{}, slog.New(slog.DiscardHandler))
	at := time.Now()
	one, two := ready("hello", 1, "one", "127.0.0.1:1", at), ready("hello", 1, "two", "127.0.0.1:2", at)
	r.know([]m3o.Instance{one, two})
	was, fresh := one, ready("hello", 1, "three", "127.0.0.1:3", at)
	was.Phase, was.At = m3o.Starting, at.Add(-time.Second)
	r.mu.Lock()
	changed := r.seed(map[string]m3o.Instance{"one": was, "three": fresh})
	r.mu.Unlock()
	if got := r.list("hello"); !slices.Equal(got, []m3o.Instance{one, fresh}) {
		t.Errorf("there are %+v, want one, which is ready, and three", got)
	}
	slices.SortFunc(changed, func(a, b news) int { return strings.Compare(a.old.ID, b.old.ID) })
	if !slices.Equal(changed, []news{{now: fresh}, {old: two}}) {
		t.Errorf("told is %+v, want that three is new and two is gone", changed)
	}
}

// TestCtrlCDoesNotWaitForARouterThatHasEnded: with --stop-apps the router ends
// first, and each instance then waited the whole drain time for its answer.
func TestCtrlCDoesNotWaitForARouterThatHasEnded(t *testing.T) {
	d := &Daemon{cfg: Config{Drain: time.Hour}}
	d.stopping.Store(true)
	d.drainInstance(t.Context(), m3o.Instance{App: "app", Process: webProcess, Phase: m3o.Draining})
}
