package router

import (
	"context"
	"errors"
	"log/slog"
	"net/http"
	"sync"
	"time"
)

// server is one of net/http's with the router's limits.
func (rt *Router) server(h http.Handler) *http.Server {
	srv := &http.Server{
		Handler:           h,
		ReadHeaderTimeout: rt.limits.HeaderRead,
		IdleTimeout:       rt.limits.Idle,
		MaxHeaderBytes:    rt.limits.Header,
		Protocols:         new(http.Protocols),
		HTTP2: &http.HTTP2Config{
			MaxConcurrentStreams: rt.limits.Streams,
			SendPingTimeout:      30 * time.Second,
			PingTimeout:          15 * time.Second,
			WriteByteTimeout:     rt.limits.BodyIdle,
		},
		// One line for every bad client would be a log flood.
		ErrorLog: slog.NewLogLogger(rt.log.Handler(), slog.LevelDebug),
	}
	srv.Protocols.SetHTTP1(true)
	srv.Protocols.SetHTTP2(true)
	srv.Protocols.SetUnencryptedHTTP2(true)
	return srv
}

// servers end together.
type servers []*http.Server

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
