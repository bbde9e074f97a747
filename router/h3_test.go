package router

import (
	"context"
	"crypto/tls"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/quic-go/quic-go"
	"github.com/quic-go/quic-go/http3"
	testpb "google.golang.org/grpc/interop/grpc_testing"
)

// withH3 gives the router a UDP socket, on the port of HTTPS.
func withH3(t testing.TB) option {
	return func(c *Config) {
		pc, err := net.ListenPacket("udp", c.HTTPS.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = pc.Close() })
		c.HTTP3 = pc
	}
}

// h3 is an HTTP/3 client of the router.
func (f *fixture) h3(t testing.TB) *http.Client {
	t.Helper()
	tr := &http3.Transport{TLSClientConfig: &tls.Config{RootCAs: f.roots}, DisableCompression: true,
		Dial: func(ctx context.Context, _ string, cfg *tls.Config, qc *quic.Config) (*quic.Conn, error) {
			return quic.DialAddr(ctx, f.https, cfg, qc)
		}}
	t.Cleanup(func() { _ = tr.Close() })
	return &http.Client{Transport: tr, CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }}
}

func TestHTTP3(t *testing.T) {
	web, _ := backend(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		switch r.URL.Path {
		case "/big":
			_, _ = io.WriteString(w, strings.Repeat("x", 1<<20))
		case "/dies":
			w.Header().Set("Content-Length", "10")
			_, _ = io.WriteString(w, "half")
		default:
			b, _ := io.ReadAll(r.Body)
			_, _ = fmt.Fprintf(w, "%s %s %s %d", r.Method, r.Header.Get("X-Forwarded-Proto"), r.Header.Get("X-Forwarded-For"), len(b))
		}
	}))
	rpc, _ := grpcBackend(t, "v1")
	f := start(t, withGateway, withH3(t))
	host := appHost("rpc", 1, GRPC, rpc)
	host.Descriptors = testSchema(t)
	private := appHost("private", 1, HTTP1, web)
	private.Policy = &Policy{Private: true}
	f.put(t, appHost("web", 1, HTTP1, web), appHost("h2", 1, H2C, web), host, private)
	c := f.h3(t)
	post := func(path, contentType, body string) *http.Request {
		req := request1(t, "POST", "https://rpc.localhost"+testService+path, strings.NewReader(body))
		req.Header.Set("Content-Type", contentType)
		return req
	}
	for _, tc := range []struct {
		name string
		req  *http.Request
		code int
		want string
	}{
		{"GET", request1(t, "GET", "https://web.localhost/", nil), 200, "GET https 127.0.0.1 0"},
		{"POST", request1(t, "POST", "https://web.localhost/", strings.NewReader(strings.Repeat("x", 100_000))), 200, "POST https 127.0.0.1 100000"},
		{"POST to an HTTP/2 app", request1(t, "POST", "https://h2.localhost/", strings.NewReader(strings.Repeat("x", 100_000))), 200, "POST https 127.0.0.1 100000"},
		{"an app nobody knows", request1(t, "GET", "https://nope.localhost/", nil), 404, "nope"},
		{"a private app", request1(t, "GET", "https://private.localhost/", nil), 401, "private"},
		{"JSON", post("UnaryCall", "application/json", `{"responseSize":3}`), 200, `"body":"AAAA"`},
		{"broken JSON", post("UnaryCall", "application/json", `{"responseSize":`), 400, ""},
		{"Connect", post("UnaryCall", "application/connect+json", ""), 200, `"error"`},
		{"Connect stream", post("StreamingOutputCall", "application/connect+proto", string(message(t, &testpb.StreamingOutputCallRequest{}))), 200, "\x02\x00\x00\x00\x02{}"},
		{"gRPC-Web", post("UnaryCall", "application/grpc-web+proto", string(message(t, &testpb.SimpleRequest{}))), 200, "grpc-status: 0"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			res, body := do(t, c, tc.req)
			if res.StatusCode != tc.code || res.ProtoMajor != 3 || !strings.Contains(strings.ReplaceAll(body, `": "`, `":"`), tc.want) {
				t.Errorf("%s %s %q, want %d with %q", res.Proto, res.Status, body, tc.code, tc.want)
			}
		})
	}
	t.Run("gRPC", func(t *testing.T) {
		res, _ := do(t, c, post("UnaryCall", "application/grpc", string(message(t, &testpb.SimpleRequest{}))))
		if res.StatusCode != 200 || res.Trailer.Get("Grpc-Status") != "0" {
			t.Errorf("%s, trailers %v", res.Status, res.Trailer)
		}
	})
	t.Run("a large answer", func(t *testing.T) {
		if _, body := do(t, c, request1(t, "GET", "https://web.localhost/big", nil)); len(body) != 1<<20 {
			t.Errorf("%d bytes", len(body))
		}
	})
	t.Run("an app that breaks off", func(t *testing.T) {
		res, err := c.Do(request1(t, "GET", "https://web.localhost/dies", nil))
		if err == nil {
			_, err = io.ReadAll(res.Body)
		}
		if err == nil {
			t.Error("half an answer looks whole")
		}
	})
	t.Run("a head too large", func(t *testing.T) {
		req := request1(t, "GET", "https://web.localhost/", nil)
		req.Header.Set("X-Large", strings.Repeat("x", 70_000))
		if res, err := c.Do(req); err == nil && res.StatusCode != 431 {
			t.Errorf("it was answered %s", res.Status)
		}
	})
	t.Run("the others tell of it", func(t *testing.T) {
		_, port, _ := net.SplitHostPort(f.https)
		for _, h2 := range []bool{false, true} {
			res, _ := do(t, f.web(t, h2), request1(t, "GET", "https://web.localhost/", nil))
			if got := res.Header.Get("Alt-Svc"); got != `h3=":`+port+`"; ma=3600` {
				t.Errorf("%s: Alt-Svc %q", res.Proto, got)
			}
		}
		if res, _ := do(t, f.web(t, false), request1(t, "GET", "http://web.localhost/", nil)); res.Header["Alt-Svc"] != nil {
			t.Error("told without TLS")
		}
	})
	wait(t, "nothing in flight", func() bool { return inFlight(t, f, "web") == 0 && inFlight(t, f, "rpc") == 0 })
}

func TestHTTP3BodyThatStandsStillIsGivenUp(t *testing.T) {
	web, _ := backend(t, http.HandlerFunc(echo))
	f := start(t, withH3(t), func(c *Config) { c.Limits.BodyIdle = 300 * time.Millisecond })
	f.put(t, appHost("web", 1, HTTP1, web))
	pr, pw := io.Pipe()
	t.Cleanup(func() { _ = pw.Close() })
	res, err := f.h3(t).Do(request1(t, "POST", "https://web.localhost/", pr))
	if err == nil && res.StatusCode < 400 {
		t.Errorf("it was answered %s", res.Status)
	}
	wait(t, "nothing in flight", func() bool { return inFlight(t, f, "web") == 0 })
}

// A client that does not read is given up. Its stream ended as if the answer
// were complete, when the last frame it had room for was.
func TestHTTP3AnswerThatTheClientDoesNotReadDoesNotLookWhole(t *testing.T) {
	web, _ := backend(t, http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		for range 100 {
			_, _ = w.Write(make([]byte, 64<<10))
		}
	}))
	f := start(t, withH3(t), func(c *Config) { c.Limits.BodyIdle = 100 * time.Millisecond })
	f.put(t, appHost("web", 1, HTTP1, web))
	c := f.h3(t)
	for range 5 {
		res, err := c.Do(request1(t, "GET", "https://web.localhost/", nil))
		if err != nil {
			continue // no room for the head
		}
		wait(t, "the router to give up", func() bool { return inFlight(t, f, "web") == 0 })
		if b, err := io.ReadAll(res.Body); err == nil {
			t.Errorf("%d bytes look like the answer", len(b))
		}
		_ = res.Body.Close()
	}
}

func TestHTTP3ConnectionsOfOneAddressAreCounted(t *testing.T) {
	web, _ := backend(t, http.HandlerFunc(func(http.ResponseWriter, *http.Request) {}))
	f := start(t, withH3(t), func(c *Config) { c.Limits.ConnsPerIP = 1 })
	f.put(t, appHost("web", 1, HTTP1, web))
	get := func(c *http.Client) error {
		res, err := c.Do(request1(t, "GET", "https://web.localhost/", nil))
		if err == nil {
			_ = res.Body.Close()
		}
		return err
	}
	if err := get(f.h3(t)); err != nil {
		t.Fatal(err)
	}
	if err := get(f.h3(t)); err == nil {
		t.Error("a second connection was let in")
	}
}

// A connection ends with its router; the next one is its successor's.
func TestHTTP3ComesBackAfterAnUpgradeOfTheRouter(t *testing.T) {
	web, _ := backend(t, http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { _, _ = io.WriteString(w, "ok") }))
	f := start(t, withH3(t))
	f.put(t, appHost("web", 1, HTTP1, web))
	c := f.h3(t)
	if _, body := do(t, c, request1(t, "GET", "https://web.localhost/", nil)); body != "ok" {
		t.Fatalf("%q", body)
	}
	g := f.successor(t)
	if g.rt.cfg.HTTP3 == nil {
		t.Fatal("the UDP socket was not handed over")
	}
	if err := f.client.Retire(t.Context(), time.Second); err != nil {
		t.Fatal(err)
	}
	wait(t, "an answer of the successor", func() bool {
		res, err := c.Do(request1(t, "GET", "https://web.localhost/", nil))
		if err != nil {
			return false // the connection that ended
		}
		_ = res.Body.Close()
		return g.rt.Status().Apps["web"].Requests > 0
	})
}
