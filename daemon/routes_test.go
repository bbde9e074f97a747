package daemon

import (
	"context"
	"errors"
	"log/slog"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/m3o/m3o"
	"github.com/m3o/m3o/router"
)

// puts records the tables a router was given; fail makes it refuse.
type puts struct {
	mu     sync.Mutex
	tables []router.Table
	fail   bool
}

func (p *puts) put(_ context.Context, t router.Table) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.fail {
		return errors.New("router away")
	}
	p.tables = append(p.tables, t)
	return nil
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
	r := newRoutes("localhost", "unix:/api", p.put, slog.New(slog.DiscardHandler))
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
