package router

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
)

// gate counts connections by client address and refuses too many.
type gate struct {
	perIP int

	mu    sync.Mutex // guards count
	count map[string]int
	total int
	// behind says that connections come through proxies that tell whom for.
	behind *behind
}

func newGate(l *limits) *gate { return &gate{perIP: l.ConnsPerIP, count: map[string]int{}} }

// behind is how the PROXY protocol is read.
type behind struct {
	trusted func(ip string) bool
	limit   time.Duration
}

// open is how many connections there are.
func (g *gate) open() int {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.total
}

// gateConn gives its place back when closed.
type gateConn struct {
	*net.TCPConn
	once sync.Once
	back func()
}

func (c *gateConn) Close() error {
	c.once.Do(c.back)
	return c.TCPConn.Close()
}

// enter takes a place for c; nil when there is none, c is then closed.
// Connections that are not TCP are not counted.
func (g *gate) enter(c net.Conn) net.Conn {
	tc, ok := c.(*net.TCPConn)
	if !ok {
		return c
	}
	ip, _, _ := net.SplitHostPort(c.RemoteAddr().String())
	back := g.take(ip)
	if back == nil {
		_ = c.Close()
		return nil
	}
	gc := &gateConn{TCPConn: tc, back: back}
	if g.behind != nil {
		return &proxied{Conn: gc, limit: g.behind.limit}
	}
	return gc
}

// take takes a place for an address and says how to give it back; nil when
// there is none.
func (g *gate) take(ip string) (back func()) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.behind != nil && !g.behind.trusted(ip) || g.behind == nil && g.count[ip] >= g.perIP {
		return nil
	}
	g.count[ip]++
	g.total++
	return func() {
		g.mu.Lock()
		defer g.mu.Unlock()
		g.total--
		if g.count[ip]--; g.count[ip] == 0 {
			delete(g.count, ip)
		}
	}
}

// plainListener guards what it accepts.
type plainListener struct {
	net.Listener
	gate *gate
	lim  *limits
}

// Accept implements net.Listener.
func (l *plainListener) Accept() (net.Conn, error) {
	for {
		c, err := l.Listener.Accept()
		if err != nil {
			return nil, err
		}
		if c = l.gate.enter(c); c != nil {
			return newGuard(c, l.lim), nil
		}
	}
}

// maxHandshakes is how many TLS handshakes run at once; more wait in the
// kernel's queue.
const maxHandshakes = 1024

// tlsListener does the handshakes itself, so that what is inside TLS can be
// guarded: net/http sees no *tls.Conn, which is why it is not asked for HTTP/2.
type tlsListener struct {
	net.Listener
	gate  *gate
	lim   *limits
	cfg   *tls.Config
	log   *slog.Logger
	h2    func(net.Conn) // serves a connection where HTTP/2 was agreed on
	ready chan net.Conn
	done  chan struct{}
	once  sync.Once
	ended atomic.Bool // takes no more connections, but finishes what it has
}

// end takes no more connections; those that were taken come out of Accept.
func (l *tlsListener) end() {
	l.ended.Store(true)
	_ = l.Listener.Close()
}

func newTLSListener(ln net.Listener, g *gate, lim *limits, cfg *tls.Config, log *slog.Logger) *tlsListener {
	return &tlsListener{Listener: ln, gate: g, lim: lim, cfg: cfg, log: log, ready: make(chan net.Conn), done: make(chan struct{})}
}

// Accept implements net.Listener.
func (l *tlsListener) Accept() (net.Conn, error) {
	select {
	case c := <-l.ready:
		return c, nil
	case <-l.done:
		return nil, net.ErrClosed
	}
}

// Close implements net.Listener.
func (l *tlsListener) Close() error {
	l.once.Do(func() { close(l.done) })
	return l.Listener.Close()
}

// run accepts until the listener is closed, and returns when every handshake
// has ended.
func (l *tlsListener) run() error {
	ctx, cancel := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	defer wg.Wait()
	defer cancel()
	slots := make(chan struct{}, maxHandshakes)
	pause := 5 * time.Millisecond
	for {
		c, err := l.Listener.Accept()
		if err != nil {
			if l.ended.Load() {
				wg.Wait()
				return nil
			}
			select {
			case <-l.done:
				return nil
			default:
			}
			// Out of file descriptors, most likely: give some time to come back, as net/http does.
			if ne, ok := errors.AsType[net.Error](err); ok && (ne.Timeout() || errors.Is(err, syscall.EMFILE) || errors.Is(err, syscall.ENFILE)) {
				select {
				case <-time.After(pause):
				case <-l.done:
					return nil
				}
				pause = min(2*pause, time.Second)
				continue
			}
			return fmt.Errorf("accept: %w", err)
		}
		pause = 5 * time.Millisecond
		if c = l.gate.enter(c); c == nil {
			continue
		}
		select {
		case slots <- struct{}{}:
		case <-l.done:
			_ = c.Close()
			return nil
		}
		wg.Go(func() {
			defer func() { <-slots }()
			l.handshake(ctx, c)
		})
	}
}

func (l *tlsListener) handshake(ctx context.Context, raw net.Conn) {
	ctx, cancel := context.WithTimeout(ctx, l.lim.HeaderRead)
	defer cancel()
	tc := tls.Server(raw, l.cfg)
	if err := tc.HandshakeContext(ctx); err != nil {
		if re, ok := errors.AsType[tls.RecordHeaderError](err); ok && re.Conn != nil && looksLikeHTTP(re.RecordHeader) {
			_ = re.Conn.SetWriteDeadline(time.Now().Add(time.Second))
			_, _ = io.WriteString(re.Conn, "HTTP/1.0 400 Bad Request\r\nContent-Type: text/plain\r\n\r\nthis port speaks HTTPS: use https://\n")
		}
		l.log.Debug("tls handshake", "err", err)
		_ = raw.Close()
		return
	}
	if tc.ConnectionState().NegotiatedProtocol == alpnProto {
		_ = tc.Close() // the handshake was all the CA wanted to see
		return
	}
	g := newGuard(tc, l.lim)
	c := &tlsGuardConn{guardConn: g, tls: tc}
	if tc.ConnectionState().NegotiatedProtocol == "h2" {
		g.calm = newCalm(l.lim.Header)
		l.h2(c)
		return
	}
	g.frame.noH2 = true
	select {
	case l.ready <- c:
	case <-l.done:
		_ = c.Close()
	}
}

func looksLikeHTTP(h [5]byte) bool {
	switch string(h[:]) {
	case "GET /", "HEAD ", "POST ", "PUT /", "OPTIO", "DELET", "PATCH", "PRI *":
		return true
	}
	return false
}
