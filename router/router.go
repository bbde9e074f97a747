// Package router is the data plane: it takes requests in from outside and
// relays each to an instance of the app its host name belongs to. It runs in a
// process of its own that outlives the daemon, serves from the last good table
// on disk while the daemon is away, swaps tables in one step and drains what
// the old one still has in flight. Apps are spoken to over HTTP/1.1, HTTP/2
// without TLS, and gRPC; WebSocket and other upgrades are joined through.
//
// It must not know how apps are built or run, nor what a protobuf message is:
// the daemon hands it tables over a unix socket (see Client), and what turns
// JSON into gRPC is handed in as a Gateway.
package router

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"maps"
	"net"
	"net/http"
	"net/netip"
	"os"
	"runtime/debug"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/m3o/m3o"
	"github.com/m3o/m3o/discovery"
	"github.com/m3o/m3o/internal/atomicfile"
	"github.com/m3o/m3o/telemetry"
)

// A Gateway answers requests that are not gRPC for apps that speak nothing
// else. It is safe for concurrent use. up carries HTTP/2 requests to the app:
// their URL needs only a path, their host is free to choose, and a request
// with GetBody is tried on another instance when the first cannot be reached;
// its errors are *m3o.Error of kind Unavailable. up is valid until the method
// returns.
type Gateway interface {
	// Match says whether r, sent to the app's own host, is for ServeApp; it is
	// asked only for GRPC hosts. Otherwise r is relayed as it is.
	Match(r *http.Request, api *m3o.API) bool
	// ServeApp answers r on the app's own host: its path names the method.
	ServeApp(w http.ResponseWriter, r *http.Request, api *m3o.API, up http.RoundTripper)
	// ServePath answers https://api.<domain>/<app>/<path>; path has no leading slash.
	ServePath(w http.ResponseWriter, r *http.Request, api *m3o.API, path string, up http.RoundTripper)
}

// Plain says what the HTTP listener does with requests for apps.
type Plain int

// PlainAuto serves on the domain localhost, which browsers treat as secure,
// and redirects elsewhere; without an HTTPS listener it serves.
const (
	PlainAuto Plain = iota
	PlainServe
	PlainRedirect
)

// Config is what New needs. Only State and one of HTTP and HTTPS must be set.
type Config struct {
	HTTP, HTTPS net.Listener      // either may be nil; Run closes them
	HTTP3       net.PacketConn    // for HTTP/3 beside HTTPS, of the same certificates; nil for none
	Control     net.Listener      // the daemon's unix socket; nil for none; Run closes it
	Inside      *Inside           // calls of apps to each other; nil for none
	Traces      *telemetry.Sender // takes requests' spans, and is run by whoever made it; nil for none
	State       string            // file of the last good table; its directory must exist
	CA          string            // directory of the internal CA (NewCA); needed with HTTPS
	Certs       string            // directory of installed certificates; "" keeps them in memory only
	OnDemand    bool              // a host without a certificate is told by Wanted before the internal CA signs for it
	Gateway     Gateway           // nil: JSON for gRPC apps is answered 501
	Plain       Plain
	Version     string // of this binary, for Status
	// TrustedProxies may say in X-Forwarded-For and X-Forwarded-Proto whom they
	// speak for. With ProxyProtocol every connection begins with a PROXY head,
	// and comes from one of them; without any, from anywhere.
	TrustedProxies []netip.Prefix
	ProxyProtocol  bool
	Log            *slog.Logger // nil discards
	Limits         Limits
}

// Limits bound what a client or an app may make the router hold. The zero
// value of a field means its default.
type Limits struct {
	Header          int           // bytes of a request's or an answer's head; 64 KB
	HeaderRead      time.Duration // for a request's head and the TLS handshake; 20 s
	Idle            time.Duration // of a client's connection between requests; 2 min
	BodyIdle        time.Duration // between two parts of a body, either way; 1 min
	BodyRate        int           // bytes a second a body of known length must keep up, after HeaderRead; 100
	ConnsPerIP      int           // open connections from one address; 2,000
	Streams         int           // concurrent HTTP/2 streams of a connection; 128
	Dial            time.Duration // to an endpoint; 3 s
	ResponseHead    time.Duration // from a sent request to the head of its answer; 10 min
	UpstreamIdle    time.Duration // of a connection to an app, shorter than what apps allow; 4 s
	IdlePerEndpoint int           // idle connections kept to an endpoint; 256
	Grace           time.Duration // for what is in flight when Run ends; 30 s
	Hold            time.Duration // of a request to a paused app; 30 s
	Held            int           // requests held for one paused app; 1,000
	CertWait        time.Duration // of a handshake for a certificate that is being issued; 10 s
}

type limits = Limits

func (l Limits) withDefaults() *limits {
	set := func(p *time.Duration, d time.Duration) {
		if *p <= 0 {
			*p = d
		}
	}
	num := func(p *int, d int) {
		if *p <= 0 {
			*p = d
		}
	}
	num(&l.Header, 64<<10)
	num(&l.BodyRate, 100)
	num(&l.ConnsPerIP, 2000)
	num(&l.Streams, 128)
	num(&l.IdlePerEndpoint, 256)
	num(&l.Held, 1000)
	set(&l.Hold, 30*time.Second)
	set(&l.CertWait, 10*time.Second)
	set(&l.HeaderRead, 20*time.Second)
	set(&l.Idle, 2*time.Minute)
	set(&l.BodyIdle, time.Minute)
	set(&l.Dial, 3*time.Second)
	set(&l.ResponseHead, 10*time.Minute)
	set(&l.UpstreamIdle, 4*time.Second)
	set(&l.Grace, 30*time.Second)
	return &l
}

// A Router serves one table at a time. It is an http.Handler too, for tests
// and for who brings their own listener.
type Router struct {
	cfg    Config
	limits *limits
	log    *slog.Logger
	certs  *certs

	altSvc string // header that tells of HTTP/3, "" without

	retireOnce sync.Once
	retire     chan retirement
	retiring   atomic.Bool
	started    time.Time
	live       atomic.Pointer[live]
	tails      tails
	clock      clock
	lobby      lobby

	verdicts verdicts
	limiter  *limiter
	peers    discovery.Directory
	peersMu  sync.Mutex // orders changes of peers with their file

	keep sync.Mutex // orders writes of the table's file and guards kept; taken before mu
	kept uint64     // number of the table in the file

	mu        sync.Mutex // guards what follows and the order of changes
	retired   map[releaseID][]*endpoint
	endpoints map[endpointID]*endpoint // those of the table
	apps      map[string]*app          // those of the table
	journal   journal
}

// Tune sets up the memory of a process that does nothing but route. What lives
// is small and what a request leaves behind is much, so collecting at every
// doubling would be collecting all the time: four times the little that lives
// is a few megabytes. GOGC in the environment goes before it.
func Tune() {
	if os.Getenv("GOGC") == "" {
		debug.SetGCPercent(400)
	}
}

// New checks cfg and loads the last good table, so that Run serves before the
// daemon is up. A table that cannot be read is no error: the router starts
// empty, logs it and waits for the daemon.
func New(cfg Config) (*Router, error) {
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	rt := &Router{retire: make(chan retirement, 1), cfg: cfg, limits: cfg.Limits.withDefaults(), log: cfg.Log, started: time.Now(),
		retired: map[releaseID][]*endpoint{}, endpoints: map[endpointID]*endpoint{}, apps: map[string]*app{}, limiter: newLimiter()}
	rt.altSvc = altSvc(cfg.HTTP3)
	if cfg.State == "" {
		return nil, m3o.Errorf(m3o.Invalid, "router needs a file for its table")
	}
	if err := rt.limiter.load(rt.quotaFile()); err != nil {
		rt.log.Warn("quotas start anew", "err", err)
	}
	if cfg.HTTPS != nil {
		ca, err := LoadCA(cfg.CA)
		if err != nil {
			return nil, err
		}
		if rt.certs, err = openCerts(rt, ca); err != nil {
			return nil, err
		}
	}
	if cfg.Control != nil && cfg.Control.Addr().Network() == "unix" {
		if err := os.Chmod(cfg.Control.Addr().String(), 0o600); err != nil {
			return nil, fmt.Errorf("close the control socket to others: %w", err)
		}
	}
	rt.openInside()
	t, seq, err := load(cfg.State)
	if errors.Is(err, fs.ErrNotExist) {
		return rt, nil
	}
	if err != nil {
		rt.log.Warn("last good table is unreadable, starting empty", "file", cfg.State, "err", err)
		return rt, nil
	}
	l, _, _ := rt.apply(nil, t.Domain, t.Hosts, nil)
	l.seq = seq
	rt.live.Store(l)
	return rt, nil
}

// quotaFile keeps what has been used of quotas, beside the table.
func (rt *Router) quotaFile() string { return rt.cfg.State + ".quotas" }

// saveQuotas keeps what has been used of quotas for the next router.
func (rt *Router) saveQuotas() {
	if err := rt.limiter.save(rt.quotaFile(), time.Now()); err != nil {
		rt.log.Warn("quotas are not kept", "err", err)
	}
}

// Put makes t the table: checked, on disk, then live in one step. After an
// error the old table stays. Requests in flight on endpoints that t lacks go
// on until they end or Drain ends them. It returns the table's hash.
func (rt *Router) Put(t Table) (string, error) {
	if err := t.Validate(); err != nil {
		return "", err
	}
	rt.keep.Lock()
	defer rt.keep.Unlock()
	rt.mu.Lock()
	defer rt.mu.Unlock()
	old := rt.live.Load()
	seq := uint64(0)
	set := t.Hosts
	var remove []string
	if old != nil {
		seq = old.seq + 1
		names := make(map[string]bool, len(t.Hosts))
		for i := range t.Hosts {
			names[t.Hosts[i].Name] = true
		}
		for h := range old.hosts.all() {
			if !names[h.Name] {
				remove = append(remove, h.Name)
			}
		}
		if old.domain == t.Domain {
			set = slices.DeleteFunc(slices.Clone(t.Hosts), func(h Host) bool {
				o := old.hosts.get(h.Name)
				return o != nil && o.sum == sumOf(&h)
			})
		}
	}
	b, err := encodeTable(t, seq)
	if err != nil {
		return "", err
	}
	if !rt.retiring.Load() { // else the file is the successor's
		if err := atomicfile.Write(rt.cfg.State, b, 0o600); err != nil {
			return "", fmt.Errorf("keep table: %w", err)
		}
		rt.kept = seq
		if err := rt.journal.clear(rt.cfg.State); err != nil {
			rt.log.Warn("journal stays", "err", err) // what is in it is older than the file
		}
	}
	return rt.swap(old, t.Domain, set, remove), nil
}

// Apply changes the table as Put does, at a cost that does not grow with it.
// A change of another table than the live one is a Conflict.
func (rt *Router) Apply(c Change) (string, error) {
	if err := c.Validate(); err != nil {
		return "", err
	}
	rt.mu.Lock()
	defer rt.mu.Unlock()
	old := rt.live.Load()
	if old == nil || old.sum.String() != c.Base {
		return "", &m3o.Error{Kind: m3o.Conflict, Msg: "the change is about another table than the router has", Hint: "hand over the whole table"}
	}
	if old.hosts.n+len(c.Set) > maxHosts {
		return "", m3o.Errorf(m3o.Invalid, "more than %d hosts", maxHosts)
	}
	if !rt.retiring.Load() {
		if err := rt.journal.add(rt.cfg.State, old.seq+1, c); err != nil {
			return "", err
		}
	}
	return rt.swap(old, old.domain, c.Set, c.Remove), nil
}

// swap makes what old becomes the live table and retires what it lost. rt.mu is held.
func (rt *Router) swap(old *live, domain string, set []Host, remove []string) string {
	l, gone, touched := rt.apply(old, domain, set, remove)
	rt.live.Store(l)
	for _, e := range gone {
		e.retire()
		rt.retired[e.id] = append(rt.retired[e.id], e)
	}
	for a := range touched {
		a.stats.tidy(a.rows)
		a.tell()
	}
	rt.forgetIdle()
	if rt.certs != nil {
		rt.certs.forget(remove)
	}
	return l.sum.String()
}

// forgetIdle drops retired endpoints with nothing in flight. rt.mu is held.
func (rt *Router) forgetIdle() {
	for id, es := range rt.retired {
		left := es[:0]
		for _, e := range es {
			if e.inflight.Load() > 0 {
				left = append(left, e)
			} else {
				e.closeIdle()
			}
		}
		if len(left) == 0 {
			delete(rt.retired, id)
		} else {
			rt.retired[id] = left
		}
	}
}

// Drained says how a drain went.
type Drained struct {
	Waited int `json:"waited"` // requests in flight when it began
	Cut    int `json:"cut"`    // of those still in flight at the deadline, ended politely
}

// Drain waits until no request is in flight on endpoints of that release which
// the table no longer has: all of them once another release is live, those
// taken away by a scale-down otherwise. When ctx ends at its deadline it ends
// the rest politely: gRPC with UNAVAILABLE, WebSocket with close 1001, event
// streams after what was sent, HTTP that has no answer yet with 503; an answer
// half sent is cut off. A cancelled ctx ends the wait and cuts nothing. It is
// repeatable, and done at once for a release nobody knows.
func (rt *Router) Drain(ctx context.Context, app string, release int) (Drained, error) {
	rt.mu.Lock()
	es := append([]*endpoint(nil), rt.retired[releaseID{app, release}]...)
	rt.mu.Unlock()
	var d Drained
	for _, e := range es {
		d.Waited += int(e.inflight.Load())
	}
	err := waitAll(ctx, es)
	if err != nil && !errors.Is(err, context.DeadlineExceeded) {
		return d, fmt.Errorf("drain v%d of %s: %w", release, app, err)
	}
	if err != nil {
		for _, e := range es {
			d.Cut += e.cutAll()
		}
		rest, cancel := context.WithTimeout(context.WithoutCancel(ctx), leaveTime)
		defer cancel()
		if err := waitAll(rest, es); err != nil {
			return d, m3o.Errorf(m3o.Unavailable, "requests of v%d of %s do not end", release, app)
		}
	}
	rt.mu.Lock()
	rt.forgetIdle()
	rt.mu.Unlock()
	return d, nil
}

// leaveTime is what cut requests have to say goodbye in.
const leaveTime = 5 * time.Second

func waitAll(ctx context.Context, es []*endpoint) error {
	for _, e := range es {
		if err := e.waitIdle(ctx); err != nil {
			return err
		}
	}
	return nil
}

// Status is what the router is doing.
type Status struct {
	PID     int                  `json:"pid"`
	Version string               `json:"version"`
	Started time.Time            `json:"started"`
	Domain  string               `json:"domain"` // of the table; "" before the first
	Table   string               `json:"table"`  // hash of the table; changes with it
	Hosts   int                  `json:"hosts"`
	Apps    map[string]AppStatus `json:"apps"`
}

// AppStatus counts an app's requests since the router started.
type AppStatus struct {
	Requests int64 `json:"requests"` // begun
	Failures int64 `json:"failures"` // answered or ended by the router in the app's stead
	InFlight int64 `json:"in_flight"`
	// Releases has the same of the hosts of single releases that were asked
	// for, but for Failures.
	Releases map[int]AppStatus `json:"releases,omitempty"`
}

// Status is safe to call at any time.
func (rt *Router) Status() Status {
	s := Status{PID: os.Getpid(), Version: rt.cfg.Version, Started: rt.started, Apps: map[string]AppStatus{}}
	l := rt.live.Load()
	if l == nil {
		return s
	}
	s.Domain, s.Table, s.Hosts = l.domain, l.sum.String(), l.hosts.n
	rt.mu.Lock()
	defer rt.mu.Unlock()
	for name, a := range rt.apps {
		if name != "" {
			st := AppStatus{Requests: a.requests.Load(), Failures: a.failures.Load(), InFlight: a.inflight.Load()}
			for n, o := range a.owns {
				if r := o.requests.Load(); r > 0 {
					if st.Releases == nil {
						st.Releases = map[int]AppStatus{}
					}
					st.Releases[n] = AppStatus{Requests: r, InFlight: o.inflight.Load()}
				}
			}
			s.Apps[name] = st
		}
	}
	return s
}

// Run serves until ctx ends, then stops taking connections, lets what is in
// flight end for up to Limits.Grace, WebSockets at once with close 1001, cuts
// the rest politely and returns when all has ended. Control stops first.
func (rt *Router) Run(ctx context.Context) error {
	srv := rt.server(rt)
	srvs := servers{srv}

	serve, fail := context.WithCancelCause(ctx)
	defer fail(nil)
	var wg sync.WaitGroup
	start := func(what string, f func() error) {
		wg.Go(func() {
			if err := f(); err != nil && !errors.Is(err, http.ErrServerClosed) && !errors.Is(err, net.ErrClosed) {
				fail(fmt.Errorf("%s: %w", what, err))
			}
		})
	}
	gate := newGate(rt.limits)
	if rt.cfg.ProxyProtocol {
		gate.behind = &behind{limit: rt.limits.HeaderRead, trusted: func(ip string) bool { return len(rt.cfg.TrustedProxies) == 0 || rt.trusts(ip) }}
	}
	inside := newGate(rt.limits)
	conns := func() int { return gate.open() + inside.open() }
	var lns []net.Listener
	var stopAccepting []func()
	if rt.cfg.HTTP != nil {
		ln := &plainListener{Listener: rt.cfg.HTTP, gate: gate, lim: rt.limits}
		lns = append(lns, ln)
		stopAccepting = append(stopAccepting, func() { _ = ln.Close() })
		start("serve http", func() error { return srv.Serve(ln) })
	}
	if rt.cfg.HTTPS != nil {
		ln := newTLSListener(rt.cfg.HTTPS, gate, rt.limits, &tls.Config{
			GetCertificate: rt.certs.get, NextProtos: []string{"h2", "http/1.1", alpnProto}, MinVersion: tls.VersionTLS12,
		}, rt.log)
		ln.h2 = srv.serveH2
		lns = append(lns, ln)
		stopAccepting = append(stopAccepting, ln.end)
		start("accept https", ln.run)
		start("serve https", func() error { return srv.Serve(ln) })
	}
	var h3 *h3Server
	if rt.cfg.HTTP3 != nil && rt.certs != nil {
		h3 = rt.newH3(rt.cfg.HTTP3, gate)
		stopAccepting = append(stopAccepting, h3.end)
		start("serve http/3", func() error { return h3.run(&tls.Config{GetCertificate: rt.certs.get, MinVersion: tls.VersionTLS13}) })
	}
	if in := rt.cfg.Inside; in != nil {
		ln := &plainListener{Listener: in.HTTP, gate: inside, lim: rt.limits}
		lns = append(lns, ln)
		s := rt.server(http.HandlerFunc(rt.serveInside))
		srvs = append(srvs, s)
		names, stopNames := context.WithCancel(serve)
		defer stopNames()
		stopAccepting = append(stopAccepting, func() { _ = ln.Close() }, stopNames)
		start("serve calls between apps", func() error { return s.Serve(ln) })
		start("serve names", func() error { return in.Names.Run(names) })
	}
	var control *http.Server
	if rt.cfg.Control != nil {
		control = rt.controlServer(serve)
		start("serve control", func() error { return control.Serve(rt.cfg.Control) })
	}
	wg.Go(func() { rt.housekeep(serve) })

	select {
	case <-serve.Done():
	case r := <-rt.retire:
		for _, f := range stopAccepting {
			f()
		}
		rt.linger(serve, r, srvs, conns)
		fail(errRetired)
	}
	cause := context.Cause(serve)
	if control != nil {
		// Its requests end with serve, and the one that retired an idle router
		// ended this one: it gets its answer first.
		last, cancel := context.WithTimeout(context.WithoutCancel(ctx), leaveTime)
		if control.Shutdown(last) != nil {
			_ = control.Close()
		}
		cancel()
	}
	rt.shutdown(ctx, srvs, lns)
	if h3 != nil {
		h3.end()
	}
	wg.Wait()
	rt.closeIdle()
	rt.saveQuotas()
	rt.mu.Lock()
	rt.journal.close()
	rt.mu.Unlock()
	if ctx.Err() != nil && errors.Is(cause, context.Cause(ctx)) || errors.Is(cause, errRetired) {
		return nil
	}
	return cause
}

func (rt *Router) shutdown(ctx context.Context, srv servers, lns []net.Listener) {
	for _, ln := range lns {
		_ = ln.Close() // Shutdown closes it again
	}
	rt.each(func(e *endpoint) { e.cutUpgrades() })
	ctx = context.WithoutCancel(ctx)
	grace, cancel := context.WithTimeout(ctx, rt.limits.Grace)
	defer cancel()
	if srv.Shutdown(grace) != nil {
		rt.each(func(e *endpoint) { e.cutAll() })
		rest, cancel := context.WithTimeout(ctx, leaveTime)
		defer cancel()
		if srv.Shutdown(rest) != nil {
			_ = srv.Close() // what is left has had its time
		}
	}
	// Hijacked connections are not the server's any more: wait for them.
	rest, cancel := context.WithTimeout(ctx, leaveTime)
	defer cancel()
	rt.each(func(e *endpoint) { _ = e.waitIdle(rest) })
}

// each calls f for every endpoint of the table and every retired one.
func (rt *Router) each(f func(*endpoint)) {
	rt.mu.Lock()
	all := slices.Collect(maps.Values(rt.endpoints))
	for _, es := range rt.retired {
		all = append(all, es...)
	}
	rt.mu.Unlock()
	for _, e := range all {
		f(e)
	}
}

func (rt *Router) closeIdle() { rt.each(func(e *endpoint) { e.closeIdle() }) }

// housekeep closes connections to apps that have been idle too long.
func (rt *Router) housekeep(ctx context.Context) {
	tick := time.NewTicker(rt.limits.UpstreamIdle)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
			rt.each(func(e *endpoint) { e.h1.prune(rt.limits.UpstreamIdle) })
			rt.compact()
			rt.saveQuotas()
		}
	}
}
