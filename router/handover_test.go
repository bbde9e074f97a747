package router

import (
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/net/websocket"
	testpb "google.golang.org/grpc/interop/grpc_testing"

	"github.com/m3o/m3o"
	"github.com/m3o/m3o/discovery"
)

// successor is a router on the sockets of f.
func (f *fixture) successor(t *testing.T) *fixture {
	t.Helper()
	files, err := f.client.Listeners(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	ln := func(name string) net.Listener {
		ln, err := net.FileListener(files[name])
		if err != nil {
			t.Fatal(err)
		}
		_ = files[name].Close()
		return ln
	}
	h, s := ln("http"), ln("https")
	var h3 net.PacketConn
	if files["http3"] != nil {
		if h3, err = net.FilePacketConn(files["http3"]); err != nil {
			t.Fatal(err)
		}
		_ = files["http3"].Close()
	}
	var inside *Inside
	if f.rt.cfg.Inside != nil {
		udp, err := net.FilePacketConn(files["names-udp"])
		if err != nil {
			t.Fatal(err)
		}
		_ = files["names-udp"].Close()
		old := f.rt.cfg.Inside.Names // which runs: not to be copied whole
		inside = &Inside{HTTP: ln("internal"), Names: &discovery.Names{UDP: udp, TCP: ln("names"), Gateway: old.Gateway, Upstreams: old.Upstreams, Peers: old.Peers, Log: old.Log}}
	}
	return start(t, func(c *Config) {
		c.Inside = inside
		_ = c.HTTP.Close()
		_ = c.HTTPS.Close()
		c.HTTP, c.HTTPS, c.HTTP3 = h, s, h3
		c.State, c.CA = f.state, filepath.Join(filepath.Dir(f.state), "ca")
	})
}

func TestUpgradeOfTheRouterFailsNoRequest(t *testing.T) {
	web, _ := backend(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Header.Get("Upgrade") != "" {
			websocket.Handler(func(ws *websocket.Conn) { _, _ = io.Copy(ws, ws) }).ServeHTTP(w, r)
			return
		}
		b, _ := io.ReadAll(r.Body)
		_, _ = fmt.Fprint(w, len(b))
	}))
	rpcAddr, _ := grpcBackend(t, "v1")
	f := start(t, func(c *Config) { c.Limits.Idle = time.Second })
	hosts := []Host{appHost("web", 1, HTTP1, web), appHost("rpc", 1, GRPC, rpcAddr)}
	f.put(t, hosts...)

	// A WebSocket that is open over the upgrade.
	wsConf, err := websocket.NewConfig("ws://web.localhost/", "http://web.localhost")
	if err != nil {
		t.Fatal(err)
	}
	wc, _ := raw(t, f.http)
	ws, err := websocket.NewClient(wsConf, wc)
	if err != nil {
		t.Fatal(err)
	}
	echoed := func(msg string) {
		t.Helper()
		var got string
		if err := websocket.Message.Send(ws, msg); err != nil {
			t.Fatal(err)
		}
		if err := websocket.Message.Receive(ws, &got); err != nil || got != msg {
			t.Fatalf("the WebSocket echoed %q, %v, want %q", got, err, msg)
		}
	}
	echoed("before")
	// So is a gRPC stream.
	stream, err := f.dial(t, "rpc.localhost").FullDuplexCall(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	ping := func() {
		t.Helper()
		if err := stream.Send(&testpb.StreamingOutputCallRequest{Payload: payload(1)}); err != nil {
			t.Fatal(err)
		}
		if _, err := stream.Recv(); err != nil {
			t.Fatal(err)
		}
	}
	ping()

	ctx, cancel := context.WithCancel(t.Context())
	var ok atomic.Int64
	var wg sync.WaitGroup
	for _, h2 := range []bool{false, true} {
		for _, scheme := range []string{"http", "https"} {
			c := f.web(t, h2)
			wg.Go(func() {
				for ctx.Err() == nil {
					res, err := c.Post(scheme+"://web.localhost/", "text/plain", strings.NewReader("hello"))
					if err != nil {
						t.Errorf("%s, HTTP/2 %v: %v", scheme, h2, err)
						return
					}
					b, err := io.ReadAll(res.Body)
					_ = res.Body.Close()
					if err != nil || res.StatusCode != 200 || string(b) != "5" {
						t.Errorf("%s, HTTP/2 %v: %s %q %v", scheme, h2, res.Status, b, err)
						return
					}
					ok.Add(1)
				}
			})
		}
	}
	rpc := f.dial(t, "rpc.localhost")
	wg.Go(func() {
		for ctx.Err() == nil {
			if _, err := rpc.UnaryCall(context.Background(), &testpb.SimpleRequest{}); err != nil {
				t.Errorf("gRPC: %v", err)
				return
			}
		}
	})
	some := func(what string) {
		t.Helper()
		n := ok.Load()
		wait(t, what, func() bool { return ok.Load() > n+50 || t.Failed() })
	}
	some("requests before")
	g := f.successor(t)
	some("requests with both")
	if err := f.client.Retire(t.Context(), time.Minute); err != nil {
		t.Fatal(err)
	}
	some("requests after")
	wait(t, "all requests at the new router", func() bool {
		before := g.rt.Status().Apps["web"].Requests
		n := ok.Load()
		some("requests")
		return g.rt.Status().Apps["web"].Requests-before >= ok.Load()-n-8 || t.Failed()
	})
	// What was open goes on in the old router, and ends by its own choice.
	echoed("after")
	ping()
	if _, err := f.client.Status(t.Context()); err != nil {
		t.Errorf("the old router's control socket is gone while it drains: %v", err)
	}
	// It still follows the table, for the requests it has.
	if err := stream.CloseSend(); err != nil {
		t.Fatal(err)
	}
	if _, err := stream.Recv(); err != io.EOF {
		t.Errorf("the stream ended with %v", err)
	}
	_ = ws.Close()
	wait(t, "the old router to end", func() bool {
		_, err := f.client.Status(t.Context())
		return m3o.KindOf(err) == m3o.Unavailable
	})
	some("requests at the end")
	cancel()
	wg.Wait()
	if err := f.stop(); err != nil {
		t.Errorf("the old router's Run = %v", err)
	}
}

func TestRetiredRouterCutsPolitelyAtItsDeadline(t *testing.T) {
	web, _ := backend(t, websocket.Handler(func(ws *websocket.Conn) { _, _ = io.Copy(ws, ws) }))
	f := start(t)
	f.put(t, appHost("web", 1, HTTP1, web))
	conf, err := websocket.NewConfig("ws://web.localhost/", "http://web.localhost")
	if err != nil {
		t.Fatal(err)
	}
	wc, br := raw(t, f.http)
	if _, err := websocket.NewClient(conf, wc); err != nil {
		t.Fatal(err)
	}
	if err := f.client.Retire(t.Context(), 10*time.Millisecond); err != nil {
		t.Fatal(err)
	}
	if b, err := io.ReadAll(br); err != nil || string(b) != "\x88\x02\x03\xe9" {
		t.Errorf("the WebSocket ended with %x, %v, want close 1001", b, err)
	}
}

// A router without clients is gone at once. It used to close the control
// connections before what was asked on them was answered. The daemon that had
// just brought its successor took that for a router that does not answer, and
// ended.
func TestRetiringAnIdleRouterIsAnswered(t *testing.T) {
	for range 20 {
		f := start(t)
		c := http.Client{Transport: &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			var d net.Dialer
			return d.DialContext(ctx, "unix", f.client.Socket)
		}}}
		res, err := c.Get("http://router/asks")
		if err != nil {
			t.Fatal(err)
		}
		if err := f.client.Retire(t.Context(), time.Second); err != nil {
			t.Fatal(err)
		}
		if _, err := io.ReadAll(res.Body); err != nil {
			t.Errorf("another answer on a control connection was cut: %v", err)
		}
		_ = res.Body.Close()
	}
}
