package router

import (
	"bytes"
	"crypto/tls"
	"errors"
	"net"
	"os"
	"strconv"
	"sync"
	"time"

	"golang.org/x/net/http/httpguts"
)

// guardConn stands between a client's connection and net/http. In HTTP/2 it ends
// floods: see calm. In HTTP/1.1 it
// follows the framing of the requests and refuses what net/http tolerates but
// two parties may read differently, which is what request smuggling lives on:
// Content-Length beside Transfer-Encoding, either one repeated, a
// Transfer-Encoding other than chunked, bare LF, folded lines, a Host that
// differs from an absolute target. It also bounds how slow a body and a
// reader may be, for which net/http has no means.
type guardConn struct {
	net.Conn
	lim   *limits
	frame framing
	calm  *calm // of HTTP/2, nil otherwise
	err   error // what Read returns from now on, once poison is out

	waited time.Duration // time spent waiting for the current body
	got    int64         // bytes of it

	mu      sync.Mutex    // guards what follows
	limit   time.Time     // the read deadline net/http set
	idle    time.Time     // of the read going on, zero for none
	set     time.Time     // the connection's own, which may be earlier: see read
	reading bool          // a read goes on
	looking bool          // net/http looks whether the client is still there: see look
	stop    chan struct{} // ends that; nil before the first time
	later   *time.Timer   // as stop
	pass    bool          // an upgrade: no HTTP any more

	wmu   sync.Mutex // guards armed
	armed time.Time  // when the write deadline was last moved
}

// tlsGuardConn tells net/http about TLS; the type alone makes it a TLS request.
type tlsGuardConn struct {
	*guardConn
	tls *tls.Conn
}

// ConnectionState makes net/http fill Request.TLS.
func (c *tlsGuardConn) ConnectionState() tls.ConnectionState { return c.tls.ConnectionState() }

func newGuard(c net.Conn, lim *limits) *guardConn {
	return &guardConn{Conn: c, lim: lim, frame: framing{limit: lim.Header}}
}

// poison takes the place of a head's first bad line: net/http answers it with
// 400 and closes the connection.
var poison = []byte("\x00\r\n\r\n")

// never is later than any time that matters.
var never = time.Unix(1<<40, 0)

var errSlowBody = errors.New("the body comes too slowly")

// Read implements net.Conn.
func (c *guardConn) Read(p []byte) (int, error) {
	if c.err != nil {
		return 0, c.err
	}
	c.mu.Lock()
	pass := c.pass
	c.mu.Unlock()
	if pass || len(p) == 0 {
		return c.read(p, time.Time{})
	}
	if c.frame.state == opaque {
		return c.readH2(p)
	}
	if len(p) == 1 && !c.frame.inBody() && !c.look() {
		return 0, os.ErrDeadlineExceeded
	}
	var n int
	var err error
	if c.frame.inBody() {
		n, err = c.readBody(p)
	} else {
		c.waited, c.got = 0, 0
		n, err = c.read(p, time.Time{})
	}
	before := len(c.frame.part)
	good, bad := c.frame.feed(p[:n])
	if c.frame.state == opaque {
		if c.calm == nil {
			c.calm = newCalm(c.lim.Header) // nothing is written before this
		}
		c.calm.skip -= before
		return c.follow(p[:n], err)
	}
	if bad == nil {
		return n, err
	}
	c.err = bad
	if c.frame.state == body || len(p)-good < len(poison) {
		if good > 0 {
			return good, nil // an error now would end what came before, too
		}
		return 0, bad
	}
	return good + copy(p[good:], poison), nil
}

func (c *guardConn) readH2(p []byte) (int, error) {
	n, err := c.read(p, time.Time{})
	return c.follow(p[:n], err)
}

// follow counts what was read of HTTP/2.
func (c *guardConn) follow(p []byte, err error) (int, error) {
	if c.calm.read(p) {
		return len(p), err
	}
	c.wmu.Lock()
	c.armed = never // the deadline is the good-bye's
	c.wmu.Unlock()
	c.calm.end(c.Conn)
	c.err = errFlood
	return 0, c.err
}

// lookAfter is how long a request may take before it matters that its client
// has left.
const lookAfter = 5 * time.Millisecond

// look stands before the read of one byte by which net/http notices, while it
// serves a request, that the client has left. Nearly all are served before that
// matters, and the read, which finds nothing and is interrupted, costs more
// than the waiting. It is false when the read was interrupted before it began.
func (c *guardConn) look() bool {
	c.mu.Lock()
	c.idle = time.Time{} // that of a body is over
	if c.due(time.Now()) {
		c.mu.Unlock()
		return false
	}
	if c.stop == nil {
		c.stop, c.later = make(chan struct{}, 1), time.NewTimer(lookAfter)
	} else {
		c.later.Reset(lookAfter)
	}
	c.looking = true
	c.mu.Unlock()
	select {
	case <-c.stop:
		c.later.Stop()
		return false
	case <-c.later.C:
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if !c.looking {
		<-c.stop // both came
		return false
	}
	c.looking = false
	return true
}

// read reads until the deadline net/http set, and no longer than idle. Both
// move on with each request; the connection's own deadline does not, which
// would cost more than the rest of the guard. It is let pass, and then set to
// what is wanted by now.
func (c *guardConn) read(p []byte, idle time.Time) (int, error) {
	c.mu.Lock()
	c.idle, c.reading = idle, true
	if want := c.until(); c.set.IsZero() && !want.IsZero() || !want.IsZero() && want.Before(c.set) {
		c.arm(want)
	}
	c.mu.Unlock()
	for {
		n, err := c.Conn.Read(p)
		c.mu.Lock()
		if n == 0 && errors.Is(err, os.ErrDeadlineExceeded) && !c.due(time.Now()) {
			c.arm(c.until())
			c.mu.Unlock()
			continue
		}
		c.reading = false
		c.mu.Unlock()
		return n, err
	}
}

// until is when a read has to end, zero for never. c.mu is held, as in what follows.
func (c *guardConn) until() time.Time {
	if c.limit.IsZero() || !c.idle.IsZero() && c.idle.Before(c.limit) {
		return c.idle
	}
	return c.limit
}

func (c *guardConn) due(now time.Time) bool {
	t := c.until()
	return !t.IsZero() && !now.Before(t)
}

func (c *guardConn) arm(t time.Time) {
	c.set = t
	_ = c.Conn.SetReadDeadline(t) // a connection that is closed says so when it is read
}

// readBody reads with a deadline of its own, no later than net/http's.
func (c *guardConn) readBody(p []byte) (int, error) {
	begin := time.Now()
	n, err := c.read(p, begin.Add(c.lim.BodyIdle))
	c.waited += time.Since(begin)
	c.got += int64(n)
	if err == nil && c.frame.left > 0 && !c.frame.chunked && c.waited > c.lim.HeaderRead &&
		c.got < int64(c.waited.Seconds()*float64(c.lim.BodyRate)) {
		err = errSlowBody
	}
	return n, err
}

// Write implements net.Conn: a client that does not read for BodyIdle is cut off.
func (c *guardConn) Write(p []byte) (int, error) {
	now := time.Now()
	c.wmu.Lock()
	if now.Sub(c.armed) > c.lim.BodyIdle/4 {
		c.armed = now
		_ = c.Conn.SetWriteDeadline(now.Add(c.lim.BodyIdle))
	}
	c.wmu.Unlock()
	if c.calm != nil {
		return c.calm.write(c.Conn, p)
	}
	return c.Conn.Write(p)
}

// SetReadDeadline implements net.Conn.
func (c *guardConn) SetReadDeadline(t time.Time) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.limit = t
	switch {
	case c.looking:
		if c.due(time.Now()) {
			c.looking = false
			c.stop <- struct{}{}
		}
	case c.reading:
		c.arm(c.until())
	}
	return nil
}

// SetWriteDeadline implements net.Conn.
func (c *guardConn) SetWriteDeadline(t time.Time) error {
	c.wmu.Lock()
	defer c.wmu.Unlock()
	c.armed = time.Time{}
	if !t.IsZero() {
		c.armed = never // Write leaves it alone
	}
	return c.Conn.SetWriteDeadline(t)
}

// SetDeadline implements net.Conn.
func (c *guardConn) SetDeadline(t time.Time) error {
	return errors.Join(c.SetReadDeadline(t), c.SetWriteDeadline(t))
}

// CloseWrite lets net/http end a refused request without a reset.
func (c *guardConn) CloseWrite() error {
	if cw, ok := c.Conn.(interface{ CloseWrite() error }); ok {
		return cw.CloseWrite()
	}
	return nil
}

// Upgraded ends the guarding: what follows is not HTTP. Package gateway calls it too.
func (c *guardConn) Upgraded() {
	c.mu.Lock()
	c.pass = true
	c.mu.Unlock()
}

type framingState int

const (
	firstLine framingState = iota // of the connection: may be the HTTP/2 preface
	requestLine
	headerLine
	body      // left bytes of it, or of a chunk
	chunkEnd  // the CRLF after a chunk
	chunkSize // the line before one
	trailerLine
	opaque // HTTP/2
)

// framing follows the requests on one connection. It agrees with net/http on
// where each ends, or refuses it.
type framing struct {
	limit   int // bytes of a line
	state   framingState
	left    int64
	chunked bool
	hasCL   bool
	old     bool   // HTTP/1.0
	want    string // the host of an absolute target
	part    []byte // the beginning of a line that is not all here
	noH2    bool   // the preface is refused: TLS settled on HTTP/1.1
}

// errFraming is why a request was refused.
type errFraming string

func (e errFraming) Error() string { return "malformed request: " + string(e) }

func (f *framing) inBody() bool { return f.state >= body && f.state <= trailerLine }

// feed follows b. When it refuses, good is how many bytes come before the
// refused line; the state is then body when the fault is within a body.
func (f *framing) feed(b []byte) (good int, bad error) {
	rest := b
	for len(rest) > 0 && f.state != opaque {
		good = len(b) - len(rest)
		if f.state == body {
			n := min(f.left, int64(len(rest)))
			rest = rest[n:]
			if f.left -= n; f.left == 0 {
				f.state = requestLine
				if f.chunked {
					f.state = chunkEnd
				}
			}
			continue
		}
		i := bytes.IndexByte(rest, '\n')
		if i < 0 {
			f.part = append(f.part, rest...)
			if len(f.part) > f.limit {
				return good, f.refuse("a line longer than the limit")
			}
			return len(b), nil
		}
		line := rest[:i+1]
		if len(f.part) > 0 {
			f.part = append(f.part, line...)
			line = f.part
		}
		if len(line) < 2 || line[len(line)-2] != '\r' {
			return good, f.refuse("a line that does not end in CRLF")
		}
		if err := f.line(line[:len(line)-2]); err != nil {
			return good, err
		}
		f.part = f.part[:0]
		rest = rest[i+1:]
	}
	return len(b), nil
}

func (f *framing) refuse(why string) error {
	if f.inBody() {
		f.state = body
	}
	return errFraming(why)
}

func (f *framing) line(l []byte) error {
	switch f.state {
	case firstLine, requestLine:
		if f.state == firstLine && string(l) == "PRI * HTTP/2.0" && !f.noH2 {
			f.state = opaque
			return nil
		}
		f.chunked, f.hasCL, f.left, f.want = false, false, 0, ""
		f.old = bytes.HasSuffix(l, []byte(" HTTP/1.0"))
		if !f.old && !bytes.HasSuffix(l, []byte(" HTTP/1.1")) {
			return f.refuse("a version other than HTTP/1.0 and HTTP/1.1")
		}
		if bytes.IndexByte(l, '\r') >= 0 {
			return f.refuse("a bare CR")
		}
		if _, target, ok := bytes.Cut(l, []byte(" ")); ok {
			f.want = absoluteHost(target)
		}
		f.state = headerLine
	case headerLine:
		if len(l) == 0 {
			switch {
			case f.chunked:
				f.state = chunkSize
			case f.left > 0:
				f.state = body
			default:
				f.state = requestLine
			}
			return nil
		}
		return f.header(l)
	case trailerLine:
		if len(l) == 0 {
			f.state = requestLine
			return nil
		}
		k, _, err := splitHeader(l)
		if err != nil || !httpguts.ValidTrailerHeader(k) {
			return f.refuse("a bad trailer")
		}
	case chunkEnd:
		if len(l) != 0 {
			return f.refuse("a chunk longer than its size")
		}
		f.state = chunkSize
	case chunkSize:
		size, ext, _ := bytes.Cut(l, []byte(";"))
		n, err := strconv.ParseUint(string(size), 16, 62)
		if err != nil || size[0] == '+' || bytes.IndexByte(ext, '\r') >= 0 {
			return f.refuse("a bad chunk size")
		}
		f.left, f.state = int64(n), body
		if n == 0 {
			f.state = trailerLine
		}
	}
	return nil
}

func (f *framing) header(l []byte) error {
	if l[0] == ' ' || l[0] == '\t' {
		return f.refuse("a folded header line")
	}
	i := bytes.IndexByte(l, ':')
	if i <= 0 {
		return f.refuse("a header line without a name")
	}
	// The common lines are looked at no closer than this: net/http checks the rest.
	switch last := l[i-1]; {
	case last == ' ' || last == '\t':
		return f.refuse("space before the colon")
	case bytes.IndexByte(l, '\r') >= 0 || bytes.IndexByte(l, 0) >= 0:
		return f.refuse("a control character in a header")
	}
	v := bytes.Trim(l[i+1:], " \t")
	switch i {
	case len("Content-Length"):
		if !bytes.EqualFold(l[:i], []byte("Content-Length")) {
			break
		}
		n, err := strconv.ParseUint(string(v), 10, 62)
		if err != nil || v[0] == '+' || f.hasCL || f.chunked {
			return f.refuse("a bad, repeated or contradicted Content-Length")
		}
		f.left, f.hasCL = int64(n), true
	case len("Transfer-Encoding"):
		if !bytes.EqualFold(l[:i], []byte("Transfer-Encoding")) {
			break
		}
		if !bytes.EqualFold(v, []byte("chunked")) || f.chunked || f.hasCL || f.old {
			return f.refuse("a bad, repeated or contradicted Transfer-Encoding")
		}
		f.chunked = true
	case len("Host"):
		if f.want != "" && bytes.EqualFold(l[:i], []byte("Host")) && !bytes.EqualFold(v, []byte(f.want)) {
			return f.refuse("a Host that differs from the target")
		}
	}
	return nil
}

// absoluteHost is the host of an absolute request target, "" for other forms.
func absoluteHost(target []byte) string {
	_, rest, ok := bytes.Cut(target, []byte("://"))
	if !ok || target[0] == '/' {
		return ""
	}
	if i := bytes.IndexAny(rest, "/? "); i >= 0 {
		rest = rest[:i]
	}
	return string(rest)
}
