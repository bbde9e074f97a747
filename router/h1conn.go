package router

import (
	"bufio"
	"context"
	"net"
	"net/http"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
)

// The HTTP/1.1 client towards the apps. The handler's own goroutine writes the
// request and reads the response, which saves the four goroutine switches a
// request costs in http.Transport.

const (
	connBuffer = 8 << 10
	// peekAfter is the idle time after which a connection is looked at before
	// it is used again. Younger ones are almost never closed, and looking costs
	// a system call.
	peekAfter = 100 * time.Millisecond
)

// longAgo is a deadline in the past: it ends every pending Read and Write.
var longAgo = time.Unix(1, 0)

// h1conn is one connection to an endpoint, used by one request at a time.
type h1conn struct {
	c       net.Conn
	br      *bufio.Reader
	bw      *bufio.Writer
	wrote   int64 // bytes of the current request the kernel took
	last    time.Time
	age     time.Duration // how long it had been idle when it was taken
	reused  bool
	aborted atomic.Bool

	rset, wset time.Time // when the deadlines were last moved; zero for none
}

// Write is what bw flushes to.
func (c *h1conn) Write(p []byte) (int, error) {
	n, err := c.c.Write(p)
	c.wrote += int64(n)
	return n, err
}

// abort ends what the connection is doing. Any goroutine may call it; the
// connection is of no use afterwards.
func (c *h1conn) abort() {
	c.aborted.Store(true)
	_ = c.c.SetDeadline(longAgo)
}

// readBy sets the read deadline without undoing an abort.
func (c *h1conn) readBy(t time.Time) {
	_ = c.c.SetReadDeadline(t)
	if c.aborted.Load() {
		_ = c.c.SetDeadline(longAgo)
	}
}

func (c *h1conn) writeBy(t time.Time) {
	_ = c.c.SetWriteDeadline(t)
	if c.aborted.Load() {
		_ = c.c.SetDeadline(longAgo)
	}
}

// lazily moves a deadline of d from now on only when a quarter of it has gone
// by: moving it with every request costs more than that is worth.
func (c *h1conn) lazily(set *time.Time, by func(time.Time), d time.Duration) {
	if now := time.Now(); set.IsZero() || now.Sub(*set) > d/4 {
		*set = now
		by(now.Add(d))
	}
}

// noReadLimit takes the read deadline away.
func (c *h1conn) noReadLimit() {
	if !c.rset.IsZero() {
		c.rset = time.Time{}
		c.readBy(time.Time{})
	}
}

func (c *h1conn) close() { _ = c.c.Close() }

// alive peeks without blocking: an idle connection that is readable was closed
// by the app, or is out of step, and must not be used.
func (c *h1conn) alive() bool {
	if c.br.Buffered() > 0 {
		return false
	}
	sc, ok := c.c.(syscall.Conn)
	if !ok {
		return true
	}
	rc, err := sc.SyscallConn()
	if err != nil {
		return false
	}
	idle := false
	if err := rc.Read(func(fd uintptr) bool {
		var b [1]byte
		_, _, e := syscall.Recvfrom(int(fd), b[:], syscall.MSG_PEEK|syscall.MSG_DONTWAIT)
		idle = e == syscall.EAGAIN || e == syscall.EINTR
		return true
	}); err != nil {
		return false
	}
	return idle
}

// h1pool keeps the idle connections of one endpoint, the last used on top.
type h1pool struct {
	ep *endpoint

	mu     sync.Mutex // guards what follows
	idle   []*h1conn
	closed bool
	// short is the shortest time after which the app was seen to have closed an
	// idle connection, and seen when that was; 0 while it was not.
	short time.Duration
	seen  time.Time
}

// seenFor is how long it is believed that an app closes connections that early.
const seenFor = 10 * time.Minute

// closedAfter notes that the app has closed a connection idle for age.
func (p *h1pool) closedAfter(age time.Duration) {
	p.mu.Lock()
	defer p.mu.Unlock()
	now := time.Now()
	if p.short == 0 || age < p.short || now.Sub(p.seen) > seenFor {
		p.short = max(age, 1)
	}
	p.seen = now
}

// risky says that a connection idle for age may be closed by the app just now.
// The peek does not help there: the end may be on its way. p.mu is held.
func (p *h1pool) risky(age time.Duration) bool {
	return p.short > 0 && age > p.short/4 && time.Since(p.seen) <= seenFor
}

// get takes an idle connection or dials. careful is for requests that cannot be
// repeated: it asks for the peek however young the connection is, and for a new
// one where the app was seen to close connections as old.
func (p *h1pool) get(ctx context.Context, lim *limits, careful, fresh bool) (*h1conn, error) {
	for !fresh {
		p.mu.Lock()
		n := len(p.idle)
		if n == 0 {
			p.mu.Unlock()
			break
		}
		c := p.idle[n-1]
		c.age = time.Since(c.last)
		if careful && p.risky(c.age) {
			p.mu.Unlock() // those below are older; others may use them
			break
		}
		p.idle[n-1] = nil
		p.idle = p.idle[:n-1]
		p.mu.Unlock()
		if c.age < lim.UpstreamIdle {
			if !careful && c.age < peekAfter || c.alive() {
				c.reused, c.wrote = true, 0
				return c, nil
			}
			p.closedAfter(c.age)
		}
		c.close()
	}
	nc, err := p.ep.dial(ctx, lim.Dial)
	if err != nil {
		return nil, err
	}
	c := &h1conn{c: nc}
	c.br = bufio.NewReaderSize(nc, connBuffer)
	c.bw = bufio.NewWriterSize(c, connBuffer)
	return c, nil
}

// put keeps c for the next request, or closes it when there are enough or the
// endpoint is retired.
func (p *h1pool) put(c *h1conn, lim *limits) {
	c.last = time.Now()
	p.mu.Lock()
	if p.closed || p.ep.retired.Load() || len(p.idle) >= lim.IdlePerEndpoint {
		p.mu.Unlock()
		c.close()
		return
	}
	p.idle = append(p.idle, c)
	p.mu.Unlock()
}

// closeIdle closes what is idle; with the endpoint retired put keeps nothing.
func (p *h1pool) closeIdle() {
	p.mu.Lock()
	idle := p.idle
	p.idle = nil
	p.closed = p.ep.retired.Load()
	p.mu.Unlock()
	for _, c := range idle {
		c.close()
	}
}

// prune closes what has been idle longer than allowed: the oldest lie at the
// bottom and would otherwise stay for ever.
func (p *h1pool) prune(max time.Duration) {
	p.mu.Lock()
	n := 0
	for n < len(p.idle) && time.Since(p.idle[n].last) >= max {
		n++
	}
	old := append([]*h1conn(nil), p.idle[:n]...)
	p.idle = append(p.idle[:0], p.idle[n:]...)
	p.mu.Unlock()
	for _, c := range old {
		c.close()
	}
}

// origin is what the router tells an app about where a request came from. It
// replaces whatever the client said about itself.
type origin struct {
	ip, proto, host, id string
	caller              string // who was let in, "" for nobody
	instance            string // that calls, "" when it is no app's
	trace               string // W3C traceparent
	newTrace            bool   // it was made here: a tracestate of the client's belongs to another
}

// hop says that the client's header k is not passed on: because it is about
// the client's connection, is written anew, or would speak for the router.
func hop(k string) bool {
	switch k {
	case "Connection", "Keep-Alive", "Proxy-Connection", "Proxy-Authenticate", "Proxy-Authorization", "Te", "Trailer",
		"Transfer-Encoding", "Upgrade", "Content-Length", "Expect", "Http2-Settings", "Host",
		"Forwarded", "X-Real-Ip", "X-Request-Id", "Traceparent":
		return true
	}
	return strings.HasPrefix(k, "X-Forwarded-") || strings.HasPrefix(k, "X-M3o-")
}

// target is the request target as the client sent it: taking it apart and
// putting it together again would change odd but legal ones.
func target(r *http.Request) string {
	if t := r.RequestURI; t != "" && (t[0] == '/' || t == "*") {
		return t
	}
	return r.URL.RequestURI()
}

// writeHead writes the request line and headers. upgrade is the protocol to
// switch to, "" for none.
func (c *h1conn) writeHead(r *http.Request, o *origin, upgrade string, expect bool) {
	// bufio remembers the first error; Flush reports it.
	bw := c.bw
	line := func(k, v string) {
		_, _ = bw.WriteString(k)
		_, _ = bw.WriteString(": ")
		_, _ = bw.WriteString(v)
		_, _ = bw.WriteString("\r\n")
	}
	_, _ = bw.WriteString(r.Method)
	_ = bw.WriteByte(' ')
	_, _ = bw.WriteString(target(r))
	_, _ = bw.WriteString(" HTTP/1.1\r\n")
	line("Host", r.Host)
	named := connectionNames(r.Header["Connection"])
	for k, vs := range r.Header {
		if hop(k) || o.newTrace && k == "Tracestate" || named != nil && contains(named, k) {
			continue
		}
		for _, v := range vs {
			line(k, v)
		}
	}
	line("X-Forwarded-For", o.ip)
	line("X-Forwarded-Proto", o.proto)
	line("X-Forwarded-Host", o.host)
	line("X-Request-Id", o.id)
	if o.caller != "" {
		line(callerHeader, o.caller)
	}
	if o.instance != "" {
		line(callerInstanceHeader, o.instance)
	}
	line("Traceparent", o.trace)
	if upgrade != "" {
		line("Connection", "Upgrade")
		line("Upgrade", upgrade)
	}
	switch {
	case r.ContentLength > 0:
		line("Content-Length", strconv.FormatInt(r.ContentLength, 10))
	case r.ContentLength < 0:
		line("Transfer-Encoding", "chunked")
		if len(r.Trailer) > 0 {
			names := make([]string, 0, len(r.Trailer))
			for k := range r.Trailer {
				names = append(names, k)
			}
			line("Trailer", strings.Join(names, ", "))
		}
	case r.Method == http.MethodPost || r.Method == http.MethodPut || r.Method == http.MethodPatch:
		line("Content-Length", "0")
	}
	if expect {
		line("Expect", "100-continue")
	}
	_, _ = bw.WriteString("\r\n")
}

// connectionNames are the canonical names a Connection header lists beside the
// ones hop knows; nil when it lists none.
func connectionNames(vs []string) []string {
	var names []string
	for _, v := range vs {
		for n := range strings.SplitSeq(v, ",") {
			n = http.CanonicalHeaderKey(strings.TrimSpace(n))
			if n != "" && n != "Close" && !hop(n) {
				names = append(names, n)
			}
		}
	}
	return names
}

func contains(names []string, k string) bool {
	for _, n := range names {
		if n == k {
			return true
		}
	}
	return false
}
