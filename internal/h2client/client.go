// Package h2client is an HTTP/2 client without TLS for one address, made for a
// proxy: calls of many clients share few connections, whoever writes first
// writes for all who wait, and a caller is woken once for an answer that came
// in one piece. A gRPC call through it costs a third of what it costs through
// net/http's transport, whose goroutines hand each part over twice.
//
// It must not know what is called, or why.
package h2client

import (
	"context"
	"errors"
	"io"
	"net"
	"net/http"
	"sync"
	"time"

	"golang.org/x/net/http2"
)

// Config is what New needs. Only Dial must be set.
type Config struct {
	Dial func(context.Context) (net.Conn, error)
	// MaxHeader bounds the bytes of an answer's header, and of its trailer; 64 KB.
	MaxHeader int
	// IdleTimeout is how long a connection without a call is kept; 2 min.
	IdleTimeout time.Duration
	// PingAfter is the silence after which a connection with calls is asked
	// whether it lives, and has 15 s to answer; 5 min and a little. Servers of
	// gRPC take one that asks more often than every 5 min for an attack, and end
	// the connection with all its calls.
	PingAfter time.Duration
	// WriteTimeout is how long a connection may take nothing; 1 min.
	WriteTimeout time.Duration
}

// A Client is an http.RoundTripper for requests to one address; it is safe for
// concurrent use. What it differs in from net/http's: it looks at neither the
// scheme nor the host of a URL, adds no header, follows nothing, and does not
// check what it is given to send. A request's body is read by another
// goroutine unless it has a method Bytes, and is never closed.
type Client struct {
	cfg Config

	mu      sync.Mutex // guards what follows
	conns   []*conn
	dialing *dialing // nil when nobody dials
}

// dialing is one connection on its way, which all wait for who need one.
type dialing struct {
	done   chan struct{}
	cancel context.CancelFunc
	wait   int // how many wait; guarded by Client.mu
	c      *conn
	err    error
}

// New makes a Client; it dials when there is something to send.
func New(cfg Config) *Client {
	set := func(p *time.Duration, d time.Duration) {
		if *p <= 0 {
			*p = d
		}
	}
	if cfg.MaxHeader <= 0 {
		cfg.MaxHeader = 64 << 10
	}
	set(&cfg.IdleTimeout, 2*time.Minute)
	set(&cfg.PingAfter, 5*time.Minute+15*time.Second)
	set(&cfg.WriteTimeout, time.Minute)
	return &Client{cfg: cfg}
}

// errUnprocessed is a call the other side has said, or cannot have, not begun:
// it is always safe to send again.
var errUnprocessed = errors.New("the connection ended before the call was taken up")

// ErrCut ends a call by the second end of its context.
var ErrCut = errors.New("the call was cut")

// cuttable is a context with a second end besides Done. One channel can end
// many calls, which by contexts would take one and its registration for each.
type cuttable interface{ Cut() <-chan struct{} }

// buffered is a body that need not be read: it is all there.
type buffered interface{ Bytes() []byte }

// maxSends is how often a call is sent that was not begun.
const maxSends = 4

// RoundTrip sends req and gives the answer once its header is there. The
// answer's body ends with the request's context, and with ErrCut when that has
// a method Cut and the channel it returns is closed. A reset of the stream is an
// http2.StreamError.
func (cl *Client) RoundTrip(req *http.Request) (*http.Response, error) {
	ctx := req.Context()
	for n := 1; ; n++ {
		c, err := cl.get(ctx)
		if err != nil {
			return nil, err
		}
		s, err := c.start(ctx, req)
		if err == nil {
			var res *http.Response
			if res, err = s.response(req); err == nil {
				return res, nil
			}
			if s.streamed {
				n = maxSends // a body that may have been begun cannot be sent twice
			}
		}
		if n < maxSends && ctx.Err() == nil && unprocessed(err) {
			continue
		}
		return nil, err
	}
}

func unprocessed(err error) bool {
	if errors.Is(err, errUnprocessed) {
		return true
	}
	var se http2.StreamError
	return errors.As(err, &se) && se.Code == http2.ErrCodeRefusedStream
}

// get reserves a place for one call on a connection, dialling when there is none.
func (cl *Client) get(ctx context.Context) (*conn, error) {
	for dials := 0; ; dials++ {
		cl.mu.Lock()
		for _, c := range cl.conns {
			if c.reserve() {
				cl.mu.Unlock()
				return c, nil
			}
		}
		d := cl.dialing
		if d == nil {
			// The dial goes on when the one who began it gives up, for the others.
			dctx, cancel := context.WithCancel(context.WithoutCancel(ctx))
			d = &dialing{done: make(chan struct{}), cancel: cancel}
			cl.dialing = d
			go cl.dial(dctx, d)
		}
		d.wait++
		cl.mu.Unlock()
		select {
		case <-d.done:
		case <-ctx.Done():
			cl.mu.Lock()
			if d.wait--; d.wait == 0 {
				d.cancel()
				if cl.dialing == d {
					cl.dialing = nil // nobody else may wait for what was given up
				}
			}
			cl.mu.Unlock()
			return nil, ctx.Err()
		}
		if d.err != nil {
			return nil, d.err
		}
		if d.c.reserve() {
			return d.c, nil
		}
		if err := d.c.broken(); err != nil && dials >= maxSends {
			return nil, err
		}
	}
}

// dial ends with the dial: its owner is whoever waits for d.
func (cl *Client) dial(ctx context.Context, d *dialing) {
	defer d.cancel()
	nc, err := cl.cfg.Dial(ctx)
	if err == nil {
		d.c = newConn(cl, nc)
	}
	cl.mu.Lock()
	d.err = err
	if cl.dialing == d {
		cl.dialing = nil
	}
	if err == nil {
		cl.conns = append(cl.conns, d.c)
	}
	cl.mu.Unlock()
	close(d.done)
	if err == nil {
		d.c.run()
	}
}

// forget takes out a connection that takes no more calls.
func (cl *Client) forget(c *conn) {
	cl.mu.Lock()
	defer cl.mu.Unlock()
	for i, o := range cl.conns {
		if o == c {
			cl.conns = append(cl.conns[:i], cl.conns[i+1:]...)
			return
		}
	}
}

// CloseIdleConnections closes the connections that carry no call.
func (cl *Client) CloseIdleConnections() {
	cl.mu.Lock()
	conns := append([]*conn(nil), cl.conns...)
	cl.mu.Unlock()
	for _, c := range conns {
		c.closeIdle()
	}
}

// body is the body of an answer.
type body struct{ *stream }

// Read implements io.Reader.
func (b body) Read(p []byte) (int, error) { return b.read(p) }

// Ready says that a Read would not wait, so that who passes the answer on need
// not flush what there is.
func (b body) Ready() bool {
	b.c.mu.Lock()
	defer b.c.mu.Unlock()
	return b.unread() > 0 || b.done || b.closed
}

// Close ends the call if it has not ended, and implements io.Closer.
func (b body) Close() error {
	b.cancel(errClosed)
	return nil
}

var errClosed = errors.New("the answer was closed")

var _ io.ReadCloser = body{}
