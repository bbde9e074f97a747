package router

import (
	"context"
	"fmt"
	"math/rand/v2"
	"net"
	"sync"
	"sync/atomic"
	"time"

	"github.com/m3o/m3o"
	"github.com/m3o/m3o/internal/h2client"
)

// host is one row of the table with the objects behind it.
type host struct {
	Host
	app  *app
	pool []*endpoint
	// grpc and h2 say how to speak to the endpoints.
	grpc, h2 bool
	api      *m3o.API  // for the gateway
	policy   *compiled // nil: everybody may everything
	canary   *host     // nil for none
	own      *own      // nil for what is not a release's own host
	sum      digest
}

// app counts over all releases, and outlives every table.
type app struct {
	requests, failures, inflight atomic.Int64
	stats                        stats
	held                         atomic.Int64 // requests that wait while it is paused
	rows                         map[int]int  // how many rows each of its releases has; guarded by Router.mu
	owns                         map[int]*own // of the releases that have a host of their own; guarded by Router.mu

	mu      sync.Mutex    // guards changed
	changed chan struct{} // closed when one of its rows changes; nil while nobody waits
}

// own counts the requests for a release's own host, over all tables that have it.
type own struct{ requests, inflight atomic.Int64 }

// next is closed when a row of the app changes.
func (a *app) next() <-chan struct{} {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.changed == nil {
		a.changed = make(chan struct{})
	}
	return a.changed
}

func (a *app) tell() {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.changed != nil {
		close(a.changed)
		a.changed = nil
	}
}

// releaseID names what is drained together.
type releaseID struct {
	app string
	n   int
}

// endpoint is one address of one release. It lives as long as a table has it
// or a request is in flight on it.
type endpoint struct {
	id               releaseID
	addr             string // as in the table
	network, address string // for net.Dial
	refs             int    // rows that have it; guarded by Router.mu
	inflight         atomic.Int64
	// retired is set after the table without this endpoint is live. Whoever
	// wants the endpoint first counts itself in and then looks at retired, so
	// either it backs off or Drain sees it: no request slips between.
	retired atomic.Bool
	awaited atomic.Bool  // idle has been made
	failed  atomic.Int64 // unix nanoseconds of the last dial that failed
	outlier outlier
	h1      h1pool
	h2      *h2client.Client

	mu      sync.Mutex    // guards calls, cutting, idle
	calls   call          // sentinel of the ring of calls in flight
	cutting bool          // Drain's deadline passed: newcomers are cut as well
	cut     chan struct{} // closed then; never changes itself
	idle    chan struct{}
}

func newEndpoint(id releaseID, addr string, lim *limits) *endpoint {
	e := &endpoint{id: id, addr: addr, cut: make(chan struct{})}
	// The table was validated: a bad address cannot reach here, and would only fail to dial.
	e.network, e.address, _ = splitEndpoint(addr)
	e.calls.next, e.calls.prev = &e.calls, &e.calls
	e.h1.ep = e
	e.h2 = newH2(e, lim)
	return e
}

// call is one request in flight on an endpoint.
type call struct {
	next, prev *call
	ep         *endpoint
	// cut ends the call politely. It must not block and may run more than
	// once; set it with onCut.
	cut    func()
	wasCut bool // guarded by ep.mu
	// upgraded says that the client's connection was taken over. Guarded by ep.mu.
	upgraded bool
}

// add puts c on e's ring unless e is retired, which it reports.
func (e *endpoint) add(c *call) bool {
	e.inflight.Add(1)
	if e.retired.Load() {
		e.leave()
		return false
	}
	e.mu.Lock()
	c.ep, c.cut, c.wasCut, c.upgraded = e, nil, e.cutting, false
	c.prev, c.next = e.calls.prev, &e.calls
	c.prev.next, e.calls.prev = c, c
	e.mu.Unlock()
	return true
}

func (c *call) done() {
	e := c.ep
	e.mu.Lock()
	c.prev.next, c.next.prev = c.next, c.prev
	c.cut = nil
	e.mu.Unlock()
	e.leave()
}

func (e *endpoint) leave() {
	if e.inflight.Add(-1) == 0 && e.awaited.Load() {
		e.mu.Lock()
		if e.idle != nil {
			close(e.idle)
			e.idle = nil
		}
		e.mu.Unlock()
	}
}

// onCut says what ends the call politely, and does it when the cut came first.
func (c *call) onCut(f func()) {
	c.ep.mu.Lock()
	c.cut = f
	cut := c.wasCut
	c.ep.mu.Unlock()
	if cut {
		f()
	}
}

// upgrade is onCut for a call that has taken over the client's connection.
func (c *call) upgrade(cut func()) {
	c.ep.mu.Lock()
	c.upgraded = true
	c.ep.mu.Unlock()
	c.onCut(cut)
}

// isCut says that the call was ended because its release is gone.
func (c *call) isCut() bool {
	c.ep.mu.Lock()
	defer c.ep.mu.Unlock()
	return c.wasCut
}

// cutAll ends every call in flight politely, and every one to come, and says
// how many it ended.
func (e *endpoint) cutAll() int { return e.cutSome(func(*call) bool { return true }, true) }

// cutUpgrades ends what http.Server.Shutdown neither closes nor waits for.
func (e *endpoint) cutUpgrades() int {
	return e.cutSome(func(c *call) bool { return c.upgraded }, false)
}

func (e *endpoint) cutSome(which func(*call) bool, cutting bool) int {
	var fs []func()
	n := 0
	e.mu.Lock()
	if cutting && !e.cutting {
		e.cutting = true
		defer close(e.cut) // after each call knows that it was cut
	}
	for c := e.calls.next; c != &e.calls; c = c.next {
		if c.wasCut || !which(c) {
			continue
		}
		c.wasCut = true
		n++
		if c.cut != nil {
			fs = append(fs, c.cut)
		}
	}
	e.mu.Unlock()
	for _, f := range fs {
		f()
	}
	return n
}

// retire takes e out of use: what is idle closes now, what is in flight goes on.
func (e *endpoint) retire() {
	e.retired.Store(true)
	e.closeIdle()
}

func (e *endpoint) closeIdle() {
	e.h1.closeIdle()
	e.h2.CloseIdleConnections()
}

// waitIdle waits until nothing is in flight on the endpoint, which is retired
// or the router's that ends.
func (e *endpoint) waitIdle(ctx context.Context) error {
	for {
		e.mu.Lock()
		if e.inflight.Load() == 0 {
			e.mu.Unlock()
			return nil
		}
		if e.idle == nil {
			e.idle = make(chan struct{})
			e.awaited.Store(true)
		}
		idle := e.idle
		e.mu.Unlock()
		// leave looks at idle after it has counted down, this looks at the
		// count after idle is there: one of the two sees the other.
		if e.inflight.Load() == 0 {
			return nil
		}
		select {
		case <-idle:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

func (e *endpoint) dial(ctx context.Context, timeout time.Duration) (net.Conn, error) {
	d := net.Dialer{Timeout: timeout}
	c, err := d.DialContext(ctx, e.network, e.address)
	if err != nil {
		if ctx.Err() == nil {
			e.failed.Store(time.Now().UnixNano())
		}
		return nil, &dialError{err}
	}
	if e.failed.Load() != 0 {
		e.failed.Store(0)
	}
	return c, nil
}

// dialError is a failure before the app can have seen anything: always safe to
// try elsewhere.
type dialError struct{ err error }

func (e *dialError) Error() string { return e.err.Error() }
func (e *dialError) Unwrap() error { return e.err }

// avoidFor is how long an endpoint whose dial failed is the last choice.
const avoidFor = time.Second

// resting says that e should be chosen only when there is no other.
func (e *endpoint) resting(now int64) bool {
	f := e.failed.Load()
	return f != 0 && now-f < int64(avoidFor) || e.outlier.ejected(now)
}

// suspect says that resting has to be asked; it is cheaper.
func (e *endpoint) suspect() bool { return e.failed.Load()|e.outlier.until.Load() != 0 }

// pick chooses the less loaded of two endpoints at random, not in tried, or
// when both are resting the least loaded of all.
func (h *host) pick(tried []*endpoint) *endpoint {
	switch n := len(h.pool); {
	case n == 0:
		return nil
	case n == 1:
		if len(tried) > 0 {
			return nil
		}
		return h.pool[0]
	case len(tried) == 0:
		i := rand.IntN(n)
		j := rand.IntN(n - 1)
		if j >= i {
			j++
		}
		best := h.better(h.pool[i], h.pool[j])
		if !best.suspect() || !best.resting(time.Now().UnixNano()) {
			return best
		}
	}
	var best *endpoint
	for _, e := range h.pool {
		if used(tried, e) {
			continue
		}
		if best == nil || h.better(e, best) == e {
			best = e
		}
	}
	return best
}

func (h *host) better(a, b *endpoint) *endpoint {
	if a.suspect() || b.suspect() {
		now := time.Now().UnixNano()
		if ra, rb := a.resting(now), b.resting(now); ra != rb {
			if ra {
				return b
			}
			return a
		}
	}
	if b.inflight.Load() < a.inflight.Load() {
		return b
	}
	return a
}

func used(tried []*endpoint, e *endpoint) bool {
	for _, t := range tried {
		if t == e {
			return true
		}
	}
	return false
}

// errNoEndpoint says the app has nothing ready.
func errNoEndpoint(h *host) error {
	if h.Kind == KindAPI {
		return &m3o.Error{Kind: m3o.Unavailable, Msg: "the daemon is not running; apps go on", Hint: "start m3od, then try again"}
	}
	if h.Kind == KindRelease {
		return &m3o.Error{Kind: m3o.Unavailable, Msg: fmt.Sprintf("v%d of %s is kept but does not run", h.Release, h.App),
			Hint: fmt.Sprintf("m3o rollback v%d -a %s makes it live", h.Release, h.App)}
	}
	if h.Release == 0 {
		return &m3o.Error{Kind: m3o.Unavailable, Msg: "app " + h.App + " has no release yet", Hint: "git push m3o main"}
	}
	return &m3o.Error{Kind: m3o.Unavailable, Msg: "app " + h.App + " has no running instance", Hint: "m3o ps -a " + h.App + "; m3o logs -a " + h.App}
}
