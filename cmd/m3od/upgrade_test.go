package main

import (
	"bytes"
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptrace"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
)

// rawCodec sends and takes messages as they are.
type rawCodec struct{}

func (rawCodec) Name() string { return "proto" }

func (rawCodec) Marshal(v any) ([]byte, error) { return *v.(*[]byte), nil }

func (rawCodec) Unmarshal(b []byte, v any) error {
	*v.(*[]byte) = bytes.Clone(b)
	return nil
}

// A caller speaks gRPC to an app over one connection.
type caller struct{ conn *grpc.ClientConn }

func (b *box) caller(t *testing.T, app string) caller {
	t.Helper()
	host := app + ".localhost"
	conn, err := grpc.NewClient("passthrough:///"+b.https, grpc.WithAuthority(host), grpc.WithDefaultCallOptions(grpc.ForceCodec(rawCodec{})),
		grpc.WithTransportCredentials(credentials.NewTLS(&tls.Config{RootCAs: b.client(t).Transport.(*http.Transport).TLSClientConfig.RootCAs, ServerName: host})))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close() })
	return caller{conn}
}

// hello calls once; nothing is tried again.
func (c caller) hello() error {
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	in, out := []byte("\x0a\x03Ada"), []byte(nil)
	if err := c.conn.Invoke(ctx, "/helloworld.Greeter/Hello", &in, &out); err != nil {
		return err
	}
	if !strings.Contains(string(out), "Hello Ada") {
		return fmt.Errorf("it answers %q", out)
	}
	return nil
}

// watch opens a stream of a message every 100 ms and counts what comes.
func (c caller) watch(ctx context.Context, got *atomic.Int64) (wait func() error, err error) {
	s, err := c.conn.NewStream(ctx, &grpc.StreamDesc{ServerStreams: true}, "/helloworld.Greeter/Watch")
	if err != nil {
		return nil, err
	}
	in := []byte("\x0a\x03Ada\x10\xa0\x8d\x06") // count 100000
	if err := errors.Join(s.SendMsg(&in), s.CloseSend()); err != nil {
		return nil, err
	}
	done := make(chan error, 1)
	go func() {
		for {
			var m []byte
			if err := s.RecvMsg(&m); err != nil {
				done <- err
				return
			}
			got.Add(1)
		}
	}()
	return func() error { return <-done }, nil
}

// posting calls an app by JSON over HTTP/1.1 or 2, which no client repeats by
// itself once a byte is sent, and counts the connections it took.
func (b *box) posting(c *http.Client, app string, h2 bool, conns *atomic.Int64) func() error {
	tr := c.Transport.(*http.Transport)
	tr.ForceAttemptHTTP2 = h2
	if !h2 {
		tr.TLSNextProto = map[string]func(string, *tls.Conn) http.RoundTripper{}
	}
	trace := &httptrace.ClientTrace{GotConn: func(i httptrace.GotConnInfo) {
		if !i.Reused {
			conns.Add(1)
		}
	}}
	url := b.url(app, "/helloworld.Greeter/Hello")
	return func() error {
		req, err := http.NewRequestWithContext(httptrace.WithClientTrace(context.Background(), trace), "POST", url, strings.NewReader(`{"name":"Ada"}`))
		if err != nil {
			return err
		}
		req.Header.Set("Content-Type", "application/json")
		res, err := c.Do(req)
		if err != nil {
			return err
		}
		defer res.Body.Close()
		var m struct{ Msg string }
		raw, err := io.ReadAll(res.Body)
		if err != nil || json.Unmarshal(raw, &m) != nil || m.Msg != "Hello Ada" || (res.ProtoMajor == 2) != h2 {
			return fmt.Errorf("%s %s: %s (%w)", res.Proto, res.Status, raw, err)
		}
		return nil
	}
}

// What is open when m3od becomes another version stays: calls of gRPC, a
// stream that began before, connections of HTTP/1.1 and 2 in use and idle.
func TestUpgradeFailsNoCallAndEndsNoStream(t *testing.T) {
	b := theBox(t)
	p := b.user(t, "ursula")
	dir := p.clone(t, "hello-grpc", "lasting")
	p.mustPush(t, dir, []string{"Released v1"})
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	var got, conns1, conns2, idle1, idle2 atomic.Int64
	quiet, busy, watcher := b.caller(t, "lasting"), b.caller(t, "lasting"), b.caller(t, "lasting")
	wait, err := watcher.watch(ctx, &got)
	if err != nil {
		t.Fatal(err)
	}
	var clients []*http.Client
	posting := func(h2 bool, conns *atomic.Int64) func() error {
		clients = append(clients, b.client(t))
		return b.posting(clients[len(clients)-1], "lasting", h2, conns)
	}
	idle := map[string]func() error{"HTTP/1.1": posting(false, &idle1), "HTTP/2": posting(true, &idle2), "gRPC": quiet.hello}
	for proto, ask := range idle {
		if err := ask(); err != nil {
			t.Fatalf("%s: %v", proto, err)
		}
	}
	probes := map[string]*probe{"gRPC": startAsking(t, busy.hello),
		"HTTP/1.1": startAsking(t, posting(false, &conns1)), "HTTP/2": startAsking(t, posting(true, &conns2))}
	eventually(t, "the stream has begun", func() bool { return got.Load() > 3 })

	old := b.pids("router", "--data")
	b.kill()
	if err := b.start(asVersion + "=next"); err != nil {
		t.Fatal(err)
	}
	eventually(t, "another router is there", func() bool { return len(b.pids("router", "--data")) == 2 })
	at := got.Load()
	eventually(t, "the stream goes on in the old one", func() bool { return got.Load() > at+10 })
	for proto, ask := range idle {
		if err := ask(); err != nil {
			t.Errorf("a connection of %s that was idle meanwhile: %v", proto, err)
		}
	}
	stop := func(probes map[string]*probe) {
		t.Helper()
		for proto, pr := range probes {
			n, bad := pr.stop()
			t.Logf("%s: %d of %d calls failed", proto, bad, n)
			if bad != 0 || n < 50 {
				t.Errorf("%s: %d of %d calls failed: %s", proto, bad, n, pr.first)
			}
		}
	}
	stop(probes)
	t.Logf("the stream got %d messages; connections of HTTP/1.1 %d and HTTP/2 %d, of those idle %d and %d", got.Load(), conns1.Load(), conns2.Load(), idle1.Load(), idle2.Load())
	for what, n := range map[string]int64{"HTTP/1.1": conns1.Load(), "HTTP/2": conns2.Load()} {
		if n > 2 {
			t.Errorf("the loop of %s took %d connections, want one for each router", what, n)
		}
	}
	if now := b.pids("router", "--data"); len(now) != 2 {
		t.Errorf("routers %v, want both: a stream is open", now)
	}
	cancel()
	if err := wait(); !strings.Contains(err.Error(), "canceled") {
		t.Errorf("the stream ended by %v", err)
	}
	for _, c := range clients {
		c.CloseIdleConnections()
	}
	_, _, _ = quiet.conn.Close(), busy.conn.Close(), watcher.conn.Close()

	// And back, with connections that the other one tells to go (GOAWAY).
	probes = map[string]*probe{"gRPC": startAsking(t, b.caller(t, "lasting").hello), "HTTP/1.1": startAsking(t, posting(false, &conns1)), "HTTP/2": startAsking(t, posting(true, &conns2))}
	b.kill()
	if err := b.start("M3O_HANDOVER=2s"); err != nil {
		t.Fatal(err)
	}
	eventually(t, "one router of the version there was is left", func() bool {
		now := b.pids("router", "--data")
		return len(now) == 1 && now[0] != old[0]
	})
	stop(probes)
	p.must(t, dir, "m3o", "destroy", "--confirm", "lasting")
}
