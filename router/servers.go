package router

import (
	"context"
	"errors"
	"log/slog"
	"net"
	"net/http"
	"sync"
	"time"

	"golang.org/x/net/http2"
)

//lint:file-ignore SA1019 its successor is net/http, which serves no guarded connection inside TLS

// server is net/http's with the router's limits. HTTP/2 inside TLS does not go
// through net/http, which would take no connection for it but a *tls.Conn: none
// that is guarded.
type server struct {
	*http.Server
	h2 *http2.Server

	mu    sync.Mutex // guards what follows
	conns map[net.Conn]struct{}
	empty chan struct{} // closed when there are none; nil while nobody waits
	ended bool
}

func (rt *Router) server(h http.Handler) *server {
	srv := &http.Server{
		Handler:           h,
		ReadHeaderTimeout: rt.limits.HeaderRead,
		IdleTimeout:       rt.limits.Idle,
		MaxHeaderBytes:    rt.limits.Header,
		Protocols:         new(http.Protocols),
		HTTP2: &http.HTTP2Config{
			MaxConcurrentStreams: rt.limits.Streams,
			// What nearly all clients send. A connection keeps a buffer of the largest frame it has seen.
			MaxReadFrameSize: 16 << 10,
			SendPingTimeout:  30 * time.Second,
			PingTimeout:      15 * time.Second,
		},
		// One line for every bad client would be a log flood.
		ErrorLog: slog.NewLogLogger(rt.log.Handler(), slog.LevelDebug),
	}
	srv.Protocols.SetHTTP1(true)
	srv.Protocols.SetUnencryptedHTTP2(true)
	s := &server{Server: srv, h2: &http2.Server{}, conns: map[net.Conn]struct{}{}}
	if err := http2.ConfigureServer(srv, s.h2); err != nil {
		panic(err) // it minds only a TLSConfig, and there is none
	}
	return s
}

// serveH2 serves a connection on which HTTP/2 was agreed on. It returns at once.
func (s *server) serveH2(c net.Conn) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.ended {
		_ = c.Close()
		return
	}
	s.conns[c] = struct{}{}
	go func() { // Shutdown and Close wait for it
		s.h2.ServeConn(c, &http2.ServeConnOpts{BaseConfig: s.Server, Handler: s.Handler})
		s.mu.Lock()
		defer s.mu.Unlock()
		delete(s.conns, c)
		if len(s.conns) == 0 && s.empty != nil {
			close(s.empty)
			s.empty = nil
		}
	}()
}

// none is closed when no connection of serveH2 is left.
func (s *server) none() <-chan struct{} {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.empty == nil {
		s.empty = make(chan struct{})
		if len(s.conns) == 0 {
			close(s.empty)
			defer func() { s.empty = nil }()
		}
	}
	return s.empty
}

// Shutdown is http.Server's, for all connections. It is repeatable.
func (s *server) Shutdown(ctx context.Context) error {
	s.mu.Lock()
	s.ended = true
	s.mu.Unlock()
	tick := time.NewTicker(100 * time.Millisecond)
	defer tick.Stop()
	for {
		// Again and again: a connection that had just begun has not heard of the first.
		if err := s.Server.Shutdown(ctx); ctx.Err() != nil {
			return err
		} // else it may say that a listener was closed before, which it was
		select {
		case <-s.none():
			return nil
		case <-ctx.Done():
			return ctx.Err()
		case <-tick.C:
		}
	}
}

// Close is http.Server's, and returns when the last connection has ended.
func (s *server) Close() error {
	s.mu.Lock()
	s.ended = true
	for c := range s.conns {
		_ = c.Close() // what was in flight has had its time
	}
	s.mu.Unlock()
	err := s.Server.Close()
	<-s.none()
	return err
}

// servers end together.
type servers []*server

// Shutdown is http.Server's, of all at once.
func (ss servers) Shutdown(ctx context.Context) error {
	errs := make([]error, len(ss))
	var wg sync.WaitGroup
	for i, s := range ss {
		wg.Go(func() { errs[i] = s.Shutdown(ctx) })
	}
	wg.Wait()
	return errors.Join(errs...)
}

// Close is http.Server's.
func (ss servers) Close() error {
	var errs []error
	for _, s := range ss {
		errs = append(errs, s.Close())
	}
	return errors.Join(errs...)
}
