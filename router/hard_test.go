package router

import (
	"bufio"
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/m3o/m3o"
)

func TestAppThatLies(t *testing.T) {
	hang := make(chan struct{})
	t.Cleanup(func() { close(hang) })
	for name, tc := range map[string]struct {
		answer string
		hangs  bool   // after answer; else it closes
		code   int    // 0: the client is cut off in the middle
		want   string // of the body
	}{
		"closes at once":         {"", false, 502, "without an answer"},
		"garbage":                {"\x00\x01\x02 garbage\r\n\r\n", false, 502, "not valid HTTP"},
		"TLS alert":              {"\x15\x03\x01\x00\x02\x02\x0a\n", false, 502, "not valid HTTP"},
		"half a head":            {"HTTP/1.1 200 OK\r\nX-A: b\r\n", false, 502, "broke off"},
		"never answers":          {"", true, 504, "did not answer"},
		"never ends its head":    {"HTTP/1.1 200 OK\r\nX-A: b\r\n", true, 504, "did not answer"},
		"head too large":         {"HTTP/1.1 200 OK\r\nX-A: " + strings.Repeat("b", 70_000) + "\r\n\r\n", false, 502, "larger than the limit"},
		"too many small headers": {"HTTP/1.1 200 OK\r\n" + strings.Repeat("X: y\r\n", 20_000) + "\r\n", false, 502, "larger than the limit"},
		"CL and TE":              {"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", false, 502, "both Content-Length"},
		"two CLs":                {"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\nhello", false, 502, "two Content-Lengths"},
		"negative CL":            {"HTTP/1.1 200 OK\r\nContent-Length: -1\r\n\r\n", false, 502, "bad Content-Length"},
		"odd TE":                 {"HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip, chunked\r\n\r\n", false, 502, "Transfer-Encoding"},
		"space before colon":     {"HTTP/1.1 200 OK\r\nX : y\r\n\r\n", false, 502, "bad header name"},
		"folded":                 {"HTTP/1.1 200 OK\r\nX: y\r\n z\r\n\r\n", false, 502, "not valid HTTP"},
		"1xx without end":        {strings.Repeat("HTTP/1.1 102 Wait\r\n\r\n", 50), true, 502, "too many interim"},
		"upgrade unasked":        {"HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\n\r\n", true, 502, "upgrade"},
		"short body":             {"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nhello", false, 0, ""},
		"dies in a chunk":        {"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhel", false, 0, ""},
		"dies between chunks":    {"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n", false, 0, ""},
		"bad chunk":              {"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\nhello\r\n0\r\n\r\n", false, 0, ""},
		"HTTP/1.0 until close":   {"HTTP/1.0 200 OK\r\n\r\nhello", false, 200, "hello"},
		"more than CL":           {"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello, world", true, 200, "hello"},
		"body on 204":            {"HTTP/1.1 204 No\r\nContent-Length: 5\r\n\r\nhello", true, 204, ""},
		"hidden framing":         {"HTTP/1.1 200 OK\r\nConnection: content-length, close\r\nContent-Length: 5\r\n\r\nhello", true, 200, "hello"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			addr := liar(t, func(c net.Conn, _ string) {
				_, _ = io.WriteString(c, tc.answer)
				if tc.hangs {
					<-hang
				}
			})
			f := start(t, func(c *Config) {
				if tc.code == 504 {
					c.Limits.ResponseHead = 200 * time.Millisecond
				}
			})
			f.put(t, appHost("one", 1, HTTP1, addr))
			for _, h2 := range []bool{false, true} {
				for range 2 {
					res, err := f.web(t, h2).Do(request1(t, "GET", "https://one.localhost/", nil))
					if err != nil && tc.code == 0 {
						continue // cut off so early that not even the head was out
					}
					if err != nil {
						t.Fatal(err)
					}
					b, err := io.ReadAll(res.Body)
					_ = res.Body.Close()
					if tc.code == 0 {
						if err == nil {
							t.Errorf("a broken answer looks whole: %s %q", res.Status, b)
						}
						continue
					}
					if err != nil || res.StatusCode != tc.code || !strings.Contains(string(b), tc.want) {
						t.Errorf("%s %q, %v; want %d with %q", res.Status, b, err, tc.code, tc.want)
					}
				}
			}
			wait(t, "nothing in flight", func() bool { return inFlight(t, f, "one") == 0 })
		})
	}
}

// What net/http would take and two parties may read differently. Each request
// is sent alone; none of the refused ones may reach the app.
func TestAmbiguousRequestsAreRefused(t *testing.T) {
	var hits atomic.Int64
	addr, _ := backend(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		_, err := io.Copy(io.Discard, r.Body)
		if err == nil {
			hits.Add(1)
		}
	}))
	f := start(t)
	f.put(t, appHost("one", 1, HTTP1, addr))
	const host = "Host: one.localhost\r\n"
	for name, tc := range map[string]struct {
		req  string
		code int
	}{
		"plain":                     {"GET / HTTP/1.1\r\n" + host + "\r\n", 200},
		"absolute":                  {"GET http://one.localhost/ HTTP/1.1\r\n" + host + "\r\n", 200},
		"body":                      {"POST / HTTP/1.1\r\n" + host + "Content-Length: 2\r\n\r\nhi", 200},
		"chunks":                    {"POST / HTTP/1.1\r\n" + host + "Transfer-Encoding: chunked\r\n\r\n2;x=y\r\nhi\r\n0\r\nX-T: v\r\n\r\n", 200},
		"CL and TE":                 {"POST / HTTP/1.1\r\n" + host + "Content-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 400},
		"TE and CL":                 {"POST / HTTP/1.1\r\n" + host + "Transfer-Encoding: chunked\r\nContent-Length: 2\r\n\r\n0\r\n\r\n", 400},
		"CL twice, same":            {"POST / HTTP/1.1\r\n" + host + "Content-Length: 2\r\nContent-Length: 2\r\n\r\nhi", 400},
		"CL list":                   {"POST / HTTP/1.1\r\n" + host + "Content-Length: 2, 2\r\n\r\nhi", 400},
		"CL with a sign":            {"POST / HTTP/1.1\r\n" + host + "Content-Length: +2\r\n\r\nhi", 400},
		"CL in hex":                 {"POST / HTTP/1.1\r\n" + host + "Content-Length: 0x2\r\n\r\nhi", 400},
		"TE twice":                  {"POST / HTTP/1.1\r\n" + host + "Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 400},
		"TE identity":               {"POST / HTTP/1.1\r\n" + host + "Transfer-Encoding: identity\r\n\r\n", 400},
		"TE gzip, chunked":          {"POST / HTTP/1.1\r\n" + host + "Transfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n", 400},
		"TE xchunked":               {"POST / HTTP/1.1\r\n" + host + "Transfer-Encoding: xchunked\r\n\r\n0\r\n\r\n", 400},
		"TE in HTTP/1.0":            {"POST / HTTP/1.0\r\n" + host + "Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 400},
		"bare LF":                   {"GET / HTTP/1.1\r\n" + host + "X: y\n\r\n", 400},
		"bare LF everywhere":        {"GET / HTTP/1.1\nHost: one.localhost\n\n", 400},
		"bare CR":                   {"GET / HTTP/1.1\r\n" + host + "X: y\rZ: w\r\n\r\n", 400},
		"NUL":                       {"GET / HTTP/1.1\r\n" + host + "X: y\x00\r\n\r\n", 400},
		"folded":                    {"GET / HTTP/1.1\r\n" + host + "X: y\r\n Content-Length: 2\r\n\r\n", 400},
		"space before colon":        {"POST / HTTP/1.1\r\n" + host + "Content-Length : 2\r\n\r\nhi", 400},
		"no name":                   {"GET / HTTP/1.1\r\n" + host + ": x\r\n\r\n", 400},
		"no colon":                  {"GET / HTTP/1.1\r\n" + host + "nonsense\r\n\r\n", 400},
		"no Host":                   {"GET / HTTP/1.1\r\n\r\n", 400},
		"two Hosts":                 {"GET / HTTP/1.1\r\n" + host + host + "\r\n", 400},
		"target of another host":    {"GET http://two.localhost/ HTTP/1.1\r\n" + host + "\r\n", 400},
		"bad chunk size":            {"POST / HTTP/1.1\r\n" + host + "Transfer-Encoding: chunked\r\n\r\n-2\r\nhi\r\n0\r\n\r\n", 400},
		"chunk size with LF":        {"POST / HTTP/1.1\r\n" + host + "Transfer-Encoding: chunked\r\n\r\n2\nhi\r\n0\r\n\r\n", 400},
		"chunk longer than it says": {"POST / HTTP/1.1\r\n" + host + "Transfer-Encoding: chunked\r\n\r\n2\r\nhiho\r\n0\r\n\r\n", 400},
		"CL in a trailer":           {"POST / HTTP/1.1\r\n" + host + "Transfer-Encoding: chunked\r\n\r\n0\r\nContent-Length: 5\r\n\r\n", 400},
		"HTTP/2 in disguise":        {"GET / HTTP/2.0\r\n" + host + "\r\n", 400},
		"HTTP/0.1":                  {"GET / HTTP/0.1\r\n" + host + "\r\n", 400},
		"CONNECT":                   {"CONNECT one.localhost:443 HTTP/1.1\r\n" + host + "\r\n", 405},
	} {
		for _, piecemeal := range []bool{false, true} {
			before := hits.Load()
			c, br := raw(t, f.http)
			if piecemeal {
				for i := range len(tc.req) {
					if _, err := c.Write([]byte{tc.req[i]}); err != nil {
						break // refused already
					}
				}
			} else {
				send(t, c, "%s", tc.req)
			}
			res, err := http.ReadResponse(br, nil)
			if err != nil {
				t.Errorf("%s: %v", name, err)
				continue
			}
			if _, err := io.Copy(io.Discard, res.Body); err != nil && tc.code == 200 {
				t.Errorf("%s: %v", name, err)
			}
			if res.StatusCode != tc.code {
				t.Errorf("%s (piecemeal %v): %s, want %d", name, piecemeal, res.Status, tc.code)
			}
			if reached := hits.Load() > before; reached != (tc.code == 200) {
				t.Errorf("%s (piecemeal %v): reached the app: %v", name, piecemeal, reached)
			}
			_ = c.Close()
		}
	}
}

func TestPipelinedRequestsKeepInStep(t *testing.T) {
	addr, _ := backend(t, http.HandlerFunc(echo))
	f := start(t)
	f.put(t, appHost("one", 1, HTTP1, addr))
	c, br := raw(t, f.http)
	var all strings.Builder
	for range 5 {
		all.WriteString("POST /sum HTTP/1.1\r\nHost: one.localhost\r\nContent-Length: 5\r\n\r\nGET /")
		all.WriteString("POST /sum HTTP/1.1\r\nHost: one.localhost\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nGET /\r\n0\r\n\r\n")
	}
	send(t, c, "%s", all.String())
	for range 10 {
		res, err := http.ReadResponse(br, nil)
		if err != nil {
			t.Fatal(err)
		}
		if b, err := io.ReadAll(res.Body); err != nil || !strings.HasPrefix(string(b), "5 ") {
			t.Fatalf("%q, %v", b, err)
		}
	}
}

func TestSlowClientsAreCutOff(t *testing.T) {
	addr, _ := backend(t, http.HandlerFunc(echo))
	f := start(t, func(c *Config) {
		c.Limits.HeaderRead, c.Limits.BodyIdle, c.Limits.BodyRate = 100*time.Millisecond, 200*time.Millisecond, 1_000_000
	})
	f.put(t, appHost("one", 1, HTTP1, addr))
	ends := func(what string, c net.Conn) {
		if _, err := io.Copy(io.Discard, c); err != nil && !errors.Is(err, net.ErrClosed) && errors.Is(err, os.ErrDeadlineExceeded) {
			t.Errorf("%s: the connection is still open", what)
		}
	}
	c, _ := raw(t, f.http)
	ends("says nothing", c)
	c, _ = raw(t, f.https)
	ends("says nothing to TLS", c)
	c, _ = raw(t, f.http)
	send(t, c, "GET / HTTP/1.1\r\nHost: one.loc")
	ends("half a head", c)
	c, _ = raw(t, f.http)
	send(t, c, "POST /sum HTTP/1.1\r\nHost: one.localhost\r\nContent-Length: 100000\r\n\r\nhalf a body")
	ends("half a body", c)
	c, _ = raw(t, f.http)
	send(t, c, "POST /sum HTTP/1.1\r\nHost: one.localhost\r\nContent-Length: 100000\r\n\r\n")
	go func(c net.Conn) { // one byte now and then: never idle, always too slow
		for {
			if _, err := c.Write([]byte("x")); err != nil {
				return
			}
			<-time.After(20 * time.Millisecond)
		}
	}(c)
	ends("a trickle", c)
	wait(t, "nothing in flight", func() bool { return inFlight(t, f, "one") == 0 })

	big, _ := backend(t, http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		b := make([]byte, 1<<20)
		for {
			if _, err := w.Write(b); err != nil {
				return
			}
		}
	}))
	f.put(t, appHost("one", 2, HTTP1, big))
	served := f.rt.Status().Apps["one"].Requests
	c, _ = raw(t, f.http)
	send(t, c, "GET / HTTP/1.1\r\nHost: one.localhost\r\n\r\n")
	wait(t, "the request", func() bool { return f.rt.Status().Apps["one"].Requests >= served+1 })
	wait(t, "the reader that does not read to be cut off", func() bool { return inFlight(t, f, "one") == 0 })
}

func TestTooManyConnectionsOfOneAddress(t *testing.T) {
	f := start(t, func(c *Config) { c.Limits.ConnsPerIP = 3 })
	ok := func(c net.Conn, br *bufio.Reader) bool {
		if _, err := io.WriteString(c, "GET / HTTP/1.1\r\nHost: x\r\n\r\n"); err != nil {
			return false
		}
		res, err := http.ReadResponse(br, nil)
		if err != nil {
			return false
		}
		_, err = io.Copy(io.Discard, res.Body)
		return err == nil
	}
	var conns []net.Conn
	for range 3 {
		c, br := raw(t, f.http)
		if !ok(c, br) {
			t.Fatal("a connection within the limit was refused")
		}
		conns = append(conns, c)
	}
	if c, br := raw(t, f.http); ok(c, br) {
		t.Error("a fourth connection was served")
	}
	_ = conns[0].Close()
	wait(t, "a place", func() bool { c, br := raw(t, f.http); return ok(c, br) })
}

// The app closes idle connections; requests come just then. GETs are sent
// again, POSTs reach the app at most once and never hang.
func TestIdleCloseRace(t *testing.T) {
	var posts atomic.Int64
	srv := httptest.NewUnstartedServer(http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
		if r.Method == "POST" {
			posts.Add(1)
		}
	}))
	srv.Config.IdleTimeout = 2 * time.Millisecond
	srv.Start()
	t.Cleanup(srv.Close)
	f := start(t)
	f.put(t, appHost("one", 1, HTTP1, srv.Listener.Addr().String()))
	c := f.web(t, false)
	const n = 300
	ok, bad := 0, 0
	for i := range n {
		if res, _ := do(t, c, request1(t, "GET", "http://one.localhost/", nil)); res.StatusCode != 200 {
			t.Errorf("GET: %s", res.Status)
		}
		<-time.After(2*time.Millisecond - 300*time.Microsecond + time.Duration(i%20)*30*time.Microsecond)
		switch res, body := do(t, c, request1(t, "POST", "http://one.localhost/", strings.NewReader("once"))); res.StatusCode {
		case 200:
			ok++
		case 502:
			bad++
		default:
			t.Errorf("POST: %s %q", res.Status, body)
		}
	}
	if got := posts.Load(); got < int64(ok) || got > n {
		t.Errorf("%d POSTs reached the app, %d were answered, %d were sent", got, ok, n)
	}
	t.Logf("%d POSTs, %d fell into the gap", n, bad)
}

// Idle for longer than peekAfter: the closed connection is noticed, nothing fails.
func TestConnectionClosedLongAgoIsNotUsed(t *testing.T) {
	closed := make(chan struct{}, 100)
	srv := httptest.NewUnstartedServer(http.HandlerFunc(func(http.ResponseWriter, *http.Request) {}))
	srv.Config.IdleTimeout = time.Millisecond
	srv.Config.ConnState = func(_ net.Conn, s http.ConnState) {
		if s == http.StateClosed {
			closed <- struct{}{}
		}
	}
	srv.Start()
	t.Cleanup(srv.Close)
	f := start(t)
	f.put(t, appHost("one", 1, HTTP1, srv.Listener.Addr().String()))
	c := f.web(t, false)
	for range 20 {
		if res, body := do(t, c, request1(t, "POST", "http://one.localhost/", strings.NewReader("x"))); res.StatusCode != 200 {
			t.Errorf("%s %q", res.Status, body)
		}
		<-closed
	}
}

func TestTLS(t *testing.T) {
	addr, _ := backend(t, http.HandlerFunc(echo))
	f := start(t)
	f.put(t, appHost("one", 1, HTTP1, addr), appHost("two", 1, HTTP1, addr))
	dial := func(name string) (*tls.Conn, error) {
		return tls.Dial("tcp", f.https, &tls.Config{ServerName: name, RootCAs: f.roots, NextProtos: []string{"http/1.1"}})
	}
	for _, name := range []string{"one.localhost", "two.localhost", "localhost", "mistyped.localhost"} {
		c, err := dial(name)
		if err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		if got := c.ConnectionState().PeerCertificates[0].DNSNames; !reflect.DeepEqual(got, []string{name}) {
			t.Errorf("%s: certificate for %v: browsers refuse wildcards there", name, got)
		}
		_ = c.Close()
	}
	for _, name := range []string{"example.com", "a.b.localhost", "evil.com.localhost.example"} {
		if c, err := dial(name); err == nil {
			_ = c.Close()
			t.Errorf("%s got a certificate", name)
		}
	}
	// The host of another connection.
	c, err := dial("one.localhost")
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close() //nolint:errcheck // a test
	br := bufio.NewReader(c)
	for host, want := range map[string]int{"two.localhost": 421, "one.localhost": 200, "ONE.localhost.:443": 200} {
		send(t, c, "GET / HTTP/1.1\r\nHost: %s\r\n\r\n", host)
		res, err := http.ReadResponse(br, nil)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := io.Copy(io.Discard, res.Body); err != nil || res.StatusCode != want {
			t.Errorf("Host %s on a connection for one.localhost: %s, %v, want %d", host, res.Status, err, want)
		}
	}
	p, pbr := raw(t, f.https)
	send(t, p, "GET / HTTP/1.1\r\nHost: one.localhost\r\n\r\n")
	if res, err := http.ReadResponse(pbr, nil); err != nil || res.StatusCode != 400 {
		t.Errorf("plain HTTP to the TLS port: %v, %v", res, err)
	}
}

func TestCA(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "ca")
	if _, err := LoadCA(dir); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("no CA: %v", err)
	}
	for range 2 {
		if err := NewCA(dir, "localhost"); err != nil {
			t.Fatal(err)
		}
	}
	if err := NewCA(dir, "example.org"); m3o.KindOf(err) != m3o.Conflict {
		t.Errorf("a CA for another domain: %v", err)
	}
	if fi, err := os.Stat(filepath.Join(dir, "ca.key")); err != nil || fi.Mode().Perm() != 0o600 {
		t.Errorf("ca.key: %v, %v", fi.Mode(), err)
	}
	ca, err := LoadCA(dir)
	if err != nil {
		t.Fatal(err)
	}
	b, err := os.ReadFile(filepath.Join(dir, "ca.crt"))
	if err != nil {
		t.Fatal(err)
	}
	block, _ := pem.Decode(b)
	root, err := x509.ParseCertificate(block.Bytes)
	if err != nil {
		t.Fatal(err)
	}
	pool := x509.NewCertPool()
	pool.AddCert(root)
	leaf, err := ca.Leaf("a.localhost")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := leaf.Leaf.Verify(x509.VerifyOptions{Roots: pool, DNSName: "a.localhost"}); err != nil {
		t.Error(err)
	}
	if _, err := leaf.Leaf.Verify(x509.VerifyOptions{Roots: pool, DNSName: "b.localhost"}); err == nil {
		t.Error("a leaf is good for another name")
	}
	for _, name := range []string{"example.com", "localhost.example.com", "xlocalhost", "*.localhost", "", "A.localhost"} {
		if _, err := ca.Leaf(name); m3o.KindOf(err) != m3o.Invalid {
			t.Errorf("Leaf(%q) = %v", name, err)
		}
	}
	// What a thief of the key would do: sign for a real site all the same.
	forged := *ca
	c := *ca.cert
	c.PermittedDNSDomains = []string{"example.com"}
	forged.cert = &c
	evil, err := forged.Leaf("www.example.com")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := evil.Leaf.Verify(x509.VerifyOptions{Roots: pool, DNSName: "www.example.com"}); err == nil {
		t.Error("the root's name constraint does not hold")
	}
}

func TestNewRefusesHTTPSWithoutACA(t *testing.T) {
	if _, err := New(Config{HTTPS: listen(t), State: filepath.Join(t.TempDir(), "t"), CA: t.TempDir()}); err == nil {
		t.Error("New succeeded")
	}
}

func FuzzReadHead(f *testing.F) {
	for _, s := range []string{
		"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello", "HTTP/1.0 404\r\n\r\n", "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nTrailer: X\r\n\r\n",
		"HTTP/1.1 101 S\r\nConnection: Upgrade, X-A\r\nUpgrade: websocket\r\nX-A: b\r\n\r\n", "HTTP/1.1 200 OK\nA: b\n\n", "HTTP/1.1 200\r\n: x\r\n\r\n",
		"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nContent-Length: 5\r\n\r\n", "HTTP/1.1 200 OK\r\nX:\x00\r\n\r\n", "\r\n", "HTTP/1.1 999 x\r\nContent-Length:\r\n\r\n",
	} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		h := http.Header{}
		var head respHead
		br := bufio.NewReaderSize(bytes.NewReader(b), 16)
		if err := readHead(br, 4096, h, &head); err != nil {
			return
		}
		if head.status < 100 || head.status > 999 || head.chunked && head.length >= 0 {
			t.Fatalf("%+v", head)
		}
		// What we take, net/http takes, and frames the same way.
		res, err := http.ReadResponse(bufio.NewReader(bytes.NewReader(b)), &http.Request{Method: "GET"})
		if err != nil {
			t.Fatalf("net/http refuses what we take: %v in %q", err, b)
		}
		if res.StatusCode != head.status {
			t.Errorf("status %d, net/http says %d", head.status, res.StatusCode)
		}
		if bodyless := head.status < 200 || head.status == 204 || head.status == 304; !bodyless {
			if want := len(res.TransferEncoding) > 0; want != head.chunked {
				t.Errorf("chunked %v, net/http says %v", head.chunked, want)
			}
			if !head.chunked && res.ContentLength != head.length {
				t.Errorf("length %d, net/http says %d", head.length, res.ContentLength)
			}
		}
	})
}

// Whatever framing lets through, net/http must end each request at the same byte.
func FuzzFraming(f *testing.F) {
	for _, s := range []string{
		"GET / HTTP/1.1\r\nHost: a\r\n\r\nGET / HTTP/1.1\r\nHost: a\r\n\r\n",
		"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 3\r\n\r\nabcGET / HTTP/1.1\r\nHost: a\r\n\r\n",
		"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n3;e\r\nabc\r\n0\r\nT: v\r\n\r\nGET / HTTP/1.1\r\nHost: a\r\n\r\n",
		"POST / HTTP/1.0\r\nContent-Length: 1\r\n\r\nx", "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
	} {
		f.Add([]byte(s), 7)
	}
	f.Fuzz(func(t *testing.T, b []byte, step int) {
		fr := framing{limit: 4096}
		step = max(1, step&0xff)
		done := 0 // bytes that net/http would have seen
		ends := map[int]bool{}
		for i := 0; i < len(b); i++ { // byte by byte, to see where requests end
			one := fr
			one.part = bytes.Clone(fr.part)
			if _, err := one.feed(b[i : i+1]); err != nil {
				break
			}
			fr = one
			done = i + 1
			if fr.state == requestLine && len(fr.part) == 0 {
				ends[done] = true
			}
		}
		if fr.state == opaque {
			return
		}
		var again framing
		again.limit = 4096
		good := 0
		for good < len(b) {
			n, err := again.feed(b[good:min(len(b), good+step)])
			good += n
			if err != nil {
				break
			}
		}
		if good > done {
			t.Fatalf("in steps of %d %d bytes pass, one by one %d", step, good, done)
		}
		src := bytes.NewReader(b[:done])
		br := bufio.NewReader(src)
		for {
			req, err := http.ReadRequest(br)
			if err != nil {
				return
			}
			if _, err := io.Copy(io.Discard, req.Body); err != nil {
				return
			}
			if at := done - src.Len() - br.Buffered(); !ends[at] {
				t.Fatalf("net/http ends a request at %d of %q, framing does not", at, b[:done])
			}
		}
	})
}

func FuzzFrames(f *testing.F) {
	f.Add([]byte{0x81, 2, 'h', 'i', 0x88, 0}, 1)
	f.Add([]byte{0x82, 126, 0, 3, 1, 2, 3, 0x82, 127, 0, 0, 0, 0, 0, 0, 0, 1, 9, 0x81, 0x81, 1, 2, 3, 4, 5}, 3)
	f.Fuzz(func(t *testing.T, b []byte, step int) {
		var whole, parts frames
		whole.advance(b)
		step = max(1, step&0xff)
		for rest := b; len(rest) > 0; {
			n := min(step, len(rest))
			parts.advance(rest[:n])
			rest = rest[n:]
		}
		if whole.left != parts.left || whole.have != parts.have {
			t.Errorf("%+v in one, %+v in parts", whole, parts)
		}
	})
}

func BenchmarkRelay(b *testing.B) {
	addr, _ := backend(b, http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		_, _ = w.Write(make([]byte, 200))
	}))
	f := start(b)
	if _, err := f.client.Put(context.Background(), table(appHost("h1", 1, HTTP1, addr), appHost("h2", 1, H2C, addr))); err != nil {
		b.Fatal(err)
	}
	for _, host := range []string{"h1", "h2"} {
		b.Run(host, func(b *testing.B) {
			b.ReportAllocs()
			c, br := raw(b, f.http)
			_ = c.SetDeadline(time.Time{})
			for b.Loop() {
				send(b, c, "GET / HTTP/1.1\r\nHost: %s.localhost\r\n\r\n", host)
				res, err := http.ReadResponse(br, nil)
				if err != nil {
					b.Fatal(err)
				}
				if _, err := io.Copy(io.Discard, res.Body); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}
