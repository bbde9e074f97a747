package router

import (
	"net/http"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"
)

// A Record is one request as it ended: what access logs, statistics and
// followers of an app's requests get. It holds no header, body or query, which
// may hold secrets.
type Record struct {
	Time     time.Time     `json:"time"` // when it began
	Took     time.Duration `json:"took"` // nanoseconds, to the last byte
	App      string        `json:"app"`
	Release  int           `json:"release"`
	Endpoint string        `json:"endpoint,omitempty"` // that answered, "" when none was asked
	Host     string        `json:"host"`
	Method   string        `json:"method"`
	Path     string        `json:"path"` // without the query
	Protocol string        `json:"protocol"`
	RPC      string        `json:"rpc,omitempty"`  // "/package.Service/Method" of a call, "" for plain HTTP
	Status   int           `json:"status"`         // HTTP status; 499 when the client left before there was one
	Code     int           `json:"code,omitempty"` // gRPC status of a call
	Out      int64         `json:"out"`            // bytes of the answer's body
	Remote   string        `json:"remote"`         // address of the client, without its port
	Caller   string        `json:"caller,omitempty"`
	ID       string        `json:"id"`            // request id, which the app was given too
	Broken   bool          `json:"broken"`        // the answer broke off
	Err      string        `json:"err,omitempty"` // why the router answered in the app's stead
}

// The protocols of a Record.
const (
	protoHTTP      = "http"
	protoWebSocket = "websocket"
	protoGRPC      = "grpc"
	protoGRPCWeb   = "grpc-web"
	protoConnect   = "connect"
	protoJSON      = "json" // JSON or a form for a gRPC app
)

// statusGone is nginx's status for a client that left before the answer.
const statusGone = 499

// Failed says that the request went wrong on the serving side.
func (r *Record) Failed() bool {
	if r.Broken || r.Status >= 500 {
		return true
	}
	switch r.Code {
	case grpcUnknown, grpcDeadline, grpcInternal, grpcUnavailable, grpcDataLoss:
		return true
	}
	return false
}

// recorder notes what the client is answered. It is the http.ResponseWriter of
// a request on its way through the router.
type recorder struct {
	http.ResponseWriter
	status int
	out    int64
	last   bool        // the connection ends with this answer
	body   *clientBody // of an HTTP/1.1 request that is read beside the answer
	call   rpcNote
	cookie string // to set on the answer, "" for none
	altSvc string // to set on the answer, "" for none
	clock  *clock
}

type rpcNote struct {
	method, protocol string
	code             int
	known            bool
}

// WriteHeader implements http.ResponseWriter.
func (c *recorder) WriteHeader(status int) {
	if c.status == 0 && (status >= 200 || status == http.StatusSwitchingProtocols) {
		c.begin(status)
	}
	c.ResponseWriter.WriteHeader(status)
}

// clock is the Date of answers, written once a second: net/http would write it
// for each.
type clock struct{ today atomic.Pointer[date] }

type date struct {
	second int64
	value  []string
}

func (c *clock) date() []string {
	t := time.Now()
	d := c.today.Load()
	if d == nil || d.second != t.Unix() {
		d = &date{t.Unix(), []string{t.UTC().Format(http.TimeFormat)}}
		c.today.Store(d)
	}
	return d.value
}

// begin is called before the head of the final answer goes out.
func (c *recorder) begin(status int) {
	c.status = status
	switch {
	case c.body != nil && !c.body.allRead.Load():
		lastAnswer(c.ResponseWriter)
	case c.last && status != http.StatusSwitchingProtocols:
		c.Header()["Connection"] = []string{"close"}
	}
	if h := c.Header(); status >= 200 {
		if _, ok := h["Date"]; !ok {
			h["Date"] = c.clock.date()
		}
	}
	if c.altSvc != "" && c.Header()["Alt-Svc"] == nil {
		c.Header()["Alt-Svc"] = []string{c.altSvc}
	}
	if c.cookie != "" {
		h := c.Header()
		h["Set-Cookie"] = append(h["Set-Cookie"], c.cookie)
	}
}

// Write implements http.ResponseWriter.
func (c *recorder) Write(p []byte) (int, error) {
	if c.status == 0 {
		c.begin(http.StatusOK)
	}
	n, err := c.ResponseWriter.Write(p)
	c.out += int64(n)
	return n, err
}

// Flush implements http.Flusher.
func (c *recorder) Flush() {
	if c.status == 0 {
		c.begin(http.StatusOK)
	}
	if f, ok := c.ResponseWriter.(http.Flusher); ok {
		f.Flush()
	}
}

// Unwrap lets http.ResponseController reach the connection.
func (c *recorder) Unwrap() http.ResponseWriter { return c.ResponseWriter }

// noteCall notes which method a Gateway has called for the request, and how it
// went when the answer is nothing but trailers.
func (q *request) noteCall(method string, head http.Header) {
	c := &q.rec.call
	*c = rpcNote{method: method, protocol: protoJSON, code: grpcUnknown, known: true}
	switch ct := q.r.Header.Get("Content-Type"); {
	case strings.HasPrefix(ct, "application/grpc-web"):
		c.protocol = protoGRPCWeb
	case isConnect(q.r):
		c.protocol = protoConnect
	}
	q.noteEnd(head)
}

// noteEnd notes how a Gateway's call ended.
func (q *request) noteEnd(trailer http.Header) {
	if n, ok := statusOf(trailer, "Grpc-Status"); ok {
		q.rec.call.code = n
		if n == grpcUnimplemented {
			q.rec.call.method = "" // or anybody could make up methods
		}
	}
}

func statusOf(h http.Header, key string) (int, bool) {
	if v := h[key]; len(v) > 0 {
		n, err := strconv.Atoi(v[0])
		return n, err == nil
	}
	return 0, false
}

// record makes the Record of a request that has ended and hands it on. It runs
// while the handler's panic, if there is one, is on its way.
func (q *request) record(began time.Time, broken bool) {
	r, rec := q.r, &q.rec
	x := Record{Time: began, Took: time.Since(began), App: q.host.App, Release: q.host.Release, Host: q.key, Method: r.Method,
		Path: r.URL.Path, Status: rec.status, Out: rec.out, Remote: q.origin.ip, Caller: q.caller, ID: q.origin.id, Broken: broken, Err: q.why}
	if q.byApp || q.inside {
		x.Host = hostOf(r.Host)
	}
	if q.call.ep != nil {
		x.Endpoint, x.Release = q.call.ep.addr, q.call.ep.id.n
	}
	if broken && q.clientGone() {
		x.Broken = false // the client's own doing
	}
	if x.Status == 0 {
		x.Status = http.StatusBadGateway
		if r.Context().Err() != nil {
			x.Status = statusGone
		}
	}
	x.Protocol, x.RPC, x.Code = q.protocol()
	if len(x.Path) > 256 {
		x.Path = x.Path[:256]
	}
	q.judge(&x)
	q.host.app.stats.add(&x)
	q.rt.tails.send(&x)
	if q.traced != nil {
		q.spans(&x)
	}
}

// protocol says in which protocol a request was made, for which method and how
// the call ended.
func (q *request) protocol() (protocol, rpc string, code int) {
	c := q.rec.call
	switch {
	case c.known:
		return c.protocol, c.method, c.code
	case isGRPC(q.r):
		protocol, code = protoGRPC, grpcUnknown // unless the answer says
		for _, k := range [...]string{"Grpc-Status", http.TrailerPrefix + "Grpc-Status"} {
			if n, ok := statusOf(q.rec.Header(), k); ok {
				code = n
			}
		}
		if q.rec.status == 0 && q.r.Context().Err() != nil {
			code = grpcCancelled
		}
		if code != grpcUnimplemented { // or anybody could make up methods
			rpc = q.r.URL.Path
		}
		return protocol, rpc, code
	case q.rec.status == http.StatusSwitchingProtocols && strings.EqualFold(q.r.Header.Get("Upgrade"), "websocket"):
		return protoWebSocket, "", 0
	}
	return protoHTTP, "", 0
}

// tails are those who follow requests as they end. Sending never waits: who is
// too slow misses some and is told how many.
type tails struct {
	n    atomic.Int32 // so that nobody listening costs one load
	mu   sync.Mutex   // guards subs
	subs map[*tail]struct{}
}

type tail struct {
	app     string // "" for all
	rate    int    // of a second; 0 for no bound
	c       chan Record
	dropped atomic.Int64

	second int64 // guarded by tails.mu, as what follows: the second that sent is of
	sent   int
}

// due says whether s may be told of one more request now. tails.mu is held.
func (s *tail) due(r *Record) bool {
	if s.rate <= 0 {
		return true
	}
	if now := r.Time.Add(r.Took).Unix(); now != s.second {
		s.second, s.sent = now, 0
	}
	s.sent++
	return s.sent <= s.rate
}

func (t *tails) send(r *Record) {
	if t.n.Load() == 0 {
		return
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	for s := range t.subs {
		if s.app != "" && s.app != r.App {
			continue
		}
		if !s.due(r) {
			s.dropped.Add(1)
			continue
		}
		select {
		case s.c <- *r:
		default:
			s.dropped.Add(1)
		}
	}
}

// follow subscribes to an app's requests, "" for all, until stop is called.
func (t *tails) follow(app string, rate int) (s *tail, stop func()) {
	s = &tail{app: app, rate: rate, c: make(chan Record, 512)}
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.subs == nil {
		t.subs = map[*tail]struct{}{}
	}
	t.subs[s] = struct{}{}
	t.n.Add(1)
	return s, func() {
		t.mu.Lock()
		defer t.mu.Unlock()
		if _, ok := t.subs[s]; ok {
			delete(t.subs, s)
			t.n.Add(-1)
		}
	}
}
