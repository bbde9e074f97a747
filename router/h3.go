package router

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"sync"
	"time"

	"github.com/quic-go/quic-go"
	"github.com/quic-go/quic-go/http3"
)

// HTTP/3 is one more way to the same handler: hosts, access, limits and
// statistics are those of the other protocols. It is off unless it is given a
// socket. A QUIC connection belongs to the process that has its keys, so none
// outlives the router: a retired one closes them at once, and the clients come
// back, to its successor or by TCP.
type h3Server struct {
	*http3.Server
	tr   *quic.Transport
	gate *gate
	cfg  *quic.Config
}

func (rt *Router) newH3(pc net.PacketConn, g *gate) *h3Server {
	s := &h3Server{Server: &http3.Server{Handler: idleBounds{rt}, MaxHeaderBytes: rt.limits.Header, IdleTimeout: rt.limits.Idle},
		tr: &quic.Transport{Conn: pc}, gate: g,
		cfg: &quic.Config{MaxIncomingStreams: int64(rt.limits.Streams), HandshakeIdleTimeout: rt.limits.HeaderRead, MaxIdleTimeout: rt.limits.Idle, Allow0RTT: false}}
	return s
}

// run serves until the server is closed.
func (s *h3Server) run(cfg *tls.Config) error {
	ln, err := s.tr.Listen(http3.ConfigureTLSConfig(cfg), s.cfg)
	if err != nil {
		return fmt.Errorf("listen: %w", err)
	}
	var wg sync.WaitGroup
	defer wg.Wait()
	for {
		c, err := ln.Accept(context.Background())
		if errors.Is(err, quic.ErrServerClosed) || errors.Is(err, quic.ErrTransportClosed) || errors.Is(err, net.ErrClosed) {
			return nil
		} else if err != nil {
			return fmt.Errorf("accept: %w", err)
		}
		ip, _, _ := net.SplitHostPort(c.RemoteAddr().String())
		back := s.gate.take(ip)
		if back == nil {
			_ = c.CloseWithError(quic.ApplicationErrorCode(http3.ErrCodeExcessiveLoad), "too many connections") // it is not let in
			continue
		}
		wg.Go(func() {
			defer back()
			_ = s.ServeQUICConn(c) // how a client's connection ends is its own matter
		})
	}
}

// end closes every connection and the socket.
func (s *h3Server) end() {
	_ = s.Close() // says so to the clients
	_ = s.tr.Close()
	_ = s.tr.Conn.Close()
}

// idleBounds does what guardConn does for the others: a body, either way, must
// not stand still.
type idleBounds struct{ rt *Router }

// ServeHTTP implements http.Handler.
func (h idleBounds) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	rc := http.NewResponseController(w)
	if r.Body != nil && r.Body != http.NoBody {
		r.Body = &idleBody{ReadCloser: r.Body, rc: rc, limit: h.rt.limits.BodyIdle}
	}
	iw := &idleWriter{ResponseWriter: w, rc: rc, limit: h.rt.limits.BodyIdle}
	h.rt.ServeHTTP(iw, r)
	if iw.failed {
		// Half an answer that ends where a frame does would look like a whole one.
		panic(http.ErrAbortHandler)
	}
}

type idleBody struct {
	io.ReadCloser
	rc    *http.ResponseController
	limit time.Duration
}

func (b *idleBody) Read(p []byte) (int, error) {
	_ = b.rc.SetReadDeadline(time.Now().Add(b.limit)) // its own ResponseWriter has it
	return b.ReadCloser.Read(p)
}

type idleWriter struct {
	http.ResponseWriter
	rc     *http.ResponseController
	limit  time.Duration
	failed bool
}

// Write implements http.ResponseWriter.
func (w *idleWriter) Write(p []byte) (int, error) {
	_ = w.rc.SetWriteDeadline(time.Now().Add(w.limit)) // as above
	n, err := w.ResponseWriter.Write(p)
	w.failed = w.failed || err != nil && !errors.Is(err, http.ErrBodyNotAllowed)
	return n, err
}

// Flush implements http.Flusher.
func (w *idleWriter) Flush() { _ = w.rc.Flush() } // a client that is gone is seen by the next Write

// Unwrap lets http.ResponseController reach the stream.
func (w *idleWriter) Unwrap() http.ResponseWriter { return w.ResponseWriter }

// altSvc is the header that tells clients of HTTP/3, "" when there is none.
func altSvc(pc net.PacketConn) string {
	if pc == nil {
		return ""
	}
	_, port, _ := net.SplitHostPort(pc.LocalAddr().String())
	return `h3=":` + port + `"; ma=3600`
}
