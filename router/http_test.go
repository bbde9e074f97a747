package router

import (
	"bufio"
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptrace"
	"net/textproto"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/net/websocket"
)

// echo is an app that says what it was asked.
func echo(w http.ResponseWriter, r *http.Request) {
	switch {
	case r.URL.Path == "/big":
		w.Header().Set("Content-Length", fmt.Sprint(1<<20))
		_, _ = w.Write(bytes.Repeat([]byte("m3o!"), 1<<18))
	case r.URL.Path == "/sum":
		h := sha256.New()
		n, err := io.Copy(h, r.Body)
		if err != nil {
			panic(http.ErrAbortHandler)
		}
		fmt.Fprintf(w, "%d %x %v", n, h.Sum(nil), r.Trailer.Get("X-After"))
	case r.URL.Path == "/trailer":
		w.Header().Set("Trailer", "X-Declared")
		_, _ = io.WriteString(w, "body")
		w.Header().Set("X-Declared", "one")
		w.Header().Set(http.TrailerPrefix+"X-Late", "two")
	case r.URL.Path == "/nocontent":
		w.WriteHeader(http.StatusNoContent)
	case r.URL.Path == "/notmodified":
		w.Header().Set("Etag", `"x"`)
		w.WriteHeader(http.StatusNotModified)
	case r.URL.Path == "/refuse":
		w.WriteHeader(http.StatusRequestEntityTooLarge)
		_, _ = io.WriteString(w, "too large")
	case r.URL.Path == "/hints":
		w.Header().Set("Link", "</a.css>; rel=preload")
		w.WriteHeader(http.StatusEarlyHints)
		_, _ = io.WriteString(w, "hinted")
	default:
		b, err := io.ReadAll(r.Body)
		if err != nil {
			panic(http.ErrAbortHandler)
		}
		w.Header().Set("X-Method", r.Method)
		h := r.Header.Clone()
		h["Host"] = []string{r.Host}
		w.Header()["X-Twice"] = []string{"1", "2"}
		_ = json.NewEncoder(w).Encode(map[string]any{"method": r.Method, "uri": r.RequestURI, "header": h, "body": string(b)})
	}
}

type echoed struct {
	Method, URI, Body string
	Header            http.Header
}

func TestRelay(t *testing.T) {
	addr, _ := backend(t, http.HandlerFunc(echo))
	f := start(t)
	f.put(t, appHost("one", 1, HTTP1, addr), appHost("two", 1, H2C, addr))
	for _, host := range []string{"one.localhost", "two.localhost"} {
		f.ways(t, func(t *testing.T, c *http.Client, scheme string) {
			base := scheme + "://" + host
			t.Run(host, func(t *testing.T) {
				req := request1(t, "POST", base+"/a%2Fb/;x?q=1;2&%zz", strings.NewReader("hello"))
				req.Header.Set("X-Forwarded-For", "6.6.6.6")
				req.Header.Set("X-Forwarded-Proto", "gopher")
				req.Header.Set("X-Forwarded-Port", "1")
				req.Header.Set("Forwarded", "for=6.6.6.6")
				req.Header.Set("X-Real-Ip", "6.6.6.6")
				req.Header.Set("X-M3o-User", "admin")
				res, body := do(t, c, req)
				var e echoed
				if err := json.Unmarshal([]byte(body), &e); err != nil || res.StatusCode != 200 {
					t.Fatalf("%s: %v in %q", res.Status, err, body)
				}
				if e.Method != "POST" || e.Body != "hello" || e.URI != "/a%2Fb/;x?q=1;2&%zz" {
					t.Errorf("the app got %s %s %q", e.Method, e.URI, e.Body)
				}
				if got := res.Header["X-Twice"]; len(got) != 2 {
					t.Errorf("X-Twice = %q, want both", got)
				}
				for k, want := range map[string]string{"X-Forwarded-For": "127.0.0.1", "X-Forwarded-Proto": scheme, "X-Forwarded-Host": host, "Host": host,
					"Forwarded": "", "X-Real-Ip": "", "X-Forwarded-Port": "", "X-M3o-User": ""} {
					if got := strings.Join(e.Header[k], ", "); got != want {
						t.Errorf("the app got %s: %q, want %q", k, got, want)
					}
				}
				if len(e.Header.Get("X-Request-Id")) != 32 {
					t.Errorf("X-Request-Id = %q", e.Header.Get("X-Request-Id"))
				}
			})
			t.Run(host+" keeps a request id", func(t *testing.T) {
				req := request1(t, "GET", base+"/", nil)
				req.Header.Set("X-Request-Id", "mine")
				_, body := do(t, c, req)
				var e echoed
				if err := json.Unmarshal([]byte(body), &e); err != nil || e.Header.Get("X-Request-Id") != "mine" {
					t.Errorf("%v %q", err, body)
				}
			})
			t.Run(host+" HEAD and empty answers", func(t *testing.T) {
				for range 3 { // a body where none may be would upset the next request
					for path, want := range map[string]int{"/big": 200, "/nocontent": 204, "/notmodified": 304} {
						method := "GET"
						if path == "/big" {
							method = "HEAD"
						}
						res, body := do(t, c, request1(t, method, base+path, nil))
						if res.StatusCode != want || body != "" {
							t.Errorf("%s %s = %d %q", method, path, res.StatusCode, body)
						}
						if path == "/big" && res.ContentLength != 1<<20 {
							t.Errorf("HEAD says %d bytes", res.ContentLength)
						}
					}
				}
			})
			t.Run(host+" big bodies", func(t *testing.T) {
				big := bytes.Repeat([]byte("m3o!"), 1<<18)
				for _, body := range []io.Reader{bytes.NewReader(big), io.MultiReader(bytes.NewReader(big))} { // the second of unknown length
					_, got := do(t, c, request1(t, "POST", base+"/sum", body))
					if want := fmt.Sprintf("%d %x ", len(big), sha256.Sum256(big)); got != want {
						t.Errorf("the app got %s, want %s", got, want)
					}
				}
				if _, got := do(t, c, request1(t, "GET", base+"/big", nil)); got != string(big) {
					t.Errorf("got %d bytes back", len(got))
				}
			})
			t.Run(host+" trailers", func(t *testing.T) {
				res, body := do(t, c, request1(t, "GET", base+"/trailer", nil))
				if body != "body" || res.Trailer.Get("X-Declared") != "one" || res.Trailer.Get("X-Late") != "two" {
					t.Errorf("body %q, trailers %v", body, res.Trailer)
				}
				req := request1(t, "POST", base+"/sum", io.MultiReader(strings.NewReader("x")))
				req.Trailer = http.Header{"X-After": {"late"}}
				if _, got := do(t, c, req); !strings.HasSuffix(got, " late") {
					t.Errorf("the app got %q", got)
				}
			})
		})
	}
}

func TestEarlyHintsPass(t *testing.T) {
	addr, _ := backend(t, http.HandlerFunc(echo))
	f := start(t)
	f.put(t, appHost("one", 1, HTTP1, addr))
	var link string
	ctx := httptrace.WithClientTrace(t.Context(), &httptrace.ClientTrace{Got1xxResponse: func(_ int, h textproto.MIMEHeader) error {
		link = h.Get("Link")
		return nil
	}})
	if _, body := do(t, f.web(t, false), request1(t, "GET", "http://one.localhost/hints", nil).WithContext(ctx)); body != "hinted" || link == "" {
		t.Errorf("body %q, Link %q", body, link)
	}
}

func TestExpectContinue(t *testing.T) {
	addr, _ := backend(t, http.HandlerFunc(echo))
	f := start(t)
	f.put(t, appHost("one", 1, HTTP1, addr))
	c := f.web(t, false)
	big := strings.Repeat("x", 1<<20)
	req := request1(t, "POST", "http://one.localhost/sum", strings.NewReader(big))
	req.Header.Set("Expect", "100-continue")
	if res, body := do(t, c, req); res.StatusCode != 200 || !strings.HasPrefix(body, "1048576 ") {
		t.Errorf("%s %q", res.Status, body)
	}
	read := &counter{r: strings.NewReader(big)}
	req = request1(t, "POST", "http://one.localhost/refuse", read)
	req.ContentLength = int64(len(big))
	req.Header.Set("Expect", "100-continue")
	if res, body := do(t, c, req); res.StatusCode != 413 || body != "too large" {
		t.Errorf("%s %q", res.Status, body)
	}
	if n := read.n.Load(); n != 0 {
		t.Errorf("%d bytes of the body were sent though the app refused it", n)
	}
}

type counter struct {
	r io.Reader
	n atomic.Int64
}

func (c *counter) Read(p []byte) (int, error) {
	n, err := c.r.Read(p)
	c.n.Add(int64(n))
	return n, err
}

func TestEarlyAnswerToABigBodyArrives(t *testing.T) {
	addr := liar(t, func(c net.Conn, _ string) {
		_, _ = io.WriteString(c, "HTTP/1.1 413 No\r\nContent-Length: 4\r\n\r\nno!\n")
		_, _ = io.Copy(io.Discard, c) // reads on, as a polite server does
	})
	f := start(t)
	f.put(t, appHost("one", 1, HTTP1, addr))
	f.ways(t, func(t *testing.T, c *http.Client, scheme string) {
		pr, pw := io.Pipe() // a body that does not end
		t.Cleanup(func() { _ = pw.Close() })
		if res, body := do(t, c, request1(t, "POST", scheme+"://one.localhost/", pr)); res.StatusCode != 413 || body != "no!\n" {
			t.Errorf("%s %q", res.Status, body)
		}
	})
}

func TestEventStreamIsFlushed(t *testing.T) {
	next := make(chan string)
	addr, _ := backend(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Type", "text/event-stream")
		w.(http.Flusher).Flush()
		for s := range next {
			fmt.Fprintf(w, "data: %s\n\n", s)
			w.(http.Flusher).Flush()
			if s == "last" {
				return
			}
		}
	}))
	f := start(t)
	f.put(t, appHost("one", 1, HTTP1, addr), appHost("two", 1, H2C, addr))
	f.ways(t, func(t *testing.T, c *http.Client, scheme string) {
		for _, host := range []string{"one", "two"} {
			res, err := c.Do(request1(t, "GET", scheme+"://"+host+".localhost/", nil)) // returns before the first event
			if err != nil {
				t.Fatal(err)
			}
			br := bufio.NewReader(res.Body)
			for _, s := range []string{"first", "second", "last"} {
				next <- s
				if line, err := br.ReadString('\n'); err != nil || line != "data: "+s+"\n" {
					t.Fatalf("%q, %v", line, err)
				}
				if _, err := br.ReadString('\n'); err != nil {
					t.Fatal(err)
				}
			}
			if _, err := br.ReadString('\n'); !errors.Is(err, io.EOF) {
				t.Errorf("the end is %v", err)
			}
			_ = res.Body.Close()
		}
	})
}

func TestClientGoneCancelsTheApp(t *testing.T) {
	gone := make(chan struct{}, 1)
	began := make(chan struct{}, 1)
	addr, _ := backend(t, http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
		began <- struct{}{}
		<-r.Context().Done()
		gone <- struct{}{}
	}))
	f := start(t)
	f.put(t, appHost("one", 1, HTTP1, addr), appHost("two", 1, H2C, addr))
	f.ways(t, func(t *testing.T, c *http.Client, scheme string) {
		for _, host := range []string{"one", "two"} {
			ctx, cancel := context.WithCancel(t.Context())
			done := make(chan error, 1)
			go func() {
				_, err := c.Do(request1(t, "GET", scheme+"://"+host+".localhost/", nil).WithContext(ctx))
				done <- err
			}()
			<-began
			cancel()
			<-gone
			if err := <-done; err == nil {
				t.Error("the request succeeded")
			}
		}
	})
}

func TestWebSocket(t *testing.T) {
	addr, _ := backend(t, websocket.Handler(func(ws *websocket.Conn) {
		for {
			var s string
			if err := websocket.Message.Receive(ws, &s); err != nil {
				return
			}
			if err := websocket.Message.Send(ws, "re: "+s); err != nil {
				return
			}
		}
	}))
	f := start(t)
	f.put(t, appHost("one", 1, HTTP1, addr), appHost("two", 1, H2C, addr))
	for _, host := range []string{"one.localhost", "two.localhost"} {
		for range 2 {
			ws := f.websocket(t, host)
			for _, s := range []string{"hello", strings.Repeat("x", 70_000), ""} {
				if err := websocket.Message.Send(ws, s); err != nil {
					t.Fatal(err)
				}
				var got string
				if err := websocket.Message.Receive(ws, &got); err != nil || got != "re: "+s {
					t.Fatalf("%.20q, %v", got, err)
				}
			}
			_ = ws.Close()
		}
	}
	wait(t, "the tunnels to end", func() bool { return inFlight(t, f, "one") == 0 && inFlight(t, f, "two") == 0 })
}

func (f *fixture) websocket(t testing.TB, host string) *websocket.Conn {
	t.Helper()
	cfg, err := websocket.NewConfig("ws://"+host+"/", "http://"+host)
	if err != nil {
		t.Fatal(err)
	}
	c, _ := raw(t, f.http)
	ws, err := websocket.NewClient(cfg, c)
	if err != nil {
		t.Fatal(err)
	}
	return ws
}

func inFlight(t testing.TB, f *fixture, app string) int64 {
	t.Helper()
	s, err := f.client.Status(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	return s.Apps[app].InFlight
}

func TestRefusedUpgradeIsAnOrdinaryAnswer(t *testing.T) {
	addr, _ := backend(t, http.HandlerFunc(echo))
	f := start(t)
	f.put(t, appHost("one", 1, HTTP1, addr))
	c, br := raw(t, f.http)
	for range 2 {
		send(t, c, "GET / HTTP/1.1\r\nHost: one.localhost\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n")
		res, err := http.ReadResponse(br, nil)
		if err != nil {
			t.Fatal(err)
		}
		if b, err := io.ReadAll(res.Body); res.StatusCode != 200 || err != nil || !strings.Contains(string(b), `"method":"GET"`) {
			t.Errorf("%s %q %v", res.Status, b, err)
		}
	}
}

func TestAnswersOfTheRouterItself(t *testing.T) {
	dead := listen(t)
	_ = dead.Close()
	f := start(t)
	c := f.web(t, false)
	get := func(url, accept string) (int, string) {
		req := request1(t, "GET", url, nil)
		req.Header.Set("Accept", accept)
		res, body := do(t, c, req)
		return res.StatusCode, body
	}
	if code, body := get("http://x.localhost/", ""); code != 503 || !strings.Contains(body, "m3od") {
		t.Errorf("without a table: %d %q", code, body)
	}
	f.put(t, appHost("asleep", 3, HTTP1), appHost("down", 1, HTTP1, dead.Addr().String()), appHost("rpc", 1, GRPC, "127.0.0.1:1"),
		Host{Name: "api.localhost", Kind: KindAPI, Endpoints: []string{"unix:/nowhere/m3od.sock"}})
	for _, tc := range []struct {
		url, accept string
		code        int
		want        string
	}{
		{"http://nope.localhost/", "", 404, "m3o create nope"},
		{"http://nope.localhost/", "text/html", 404, "<code>git push m3o main releases it; m3o create nope"},
		{"http://example.com/", "", 404, "example.com"},
		{"http://asleep.localhost/", "", 503, "no running instance"},
		{"http://asleep.localhost/", "application/json", 503, `{"id":"asleep","code":503,"detail":"app asleep has no running instance (m3o ps -a asleep; m3o logs -a asleep)","status":"Service Unavailable"}`},
		{"http://down.localhost/", "", 502, "cannot be reached"},
		{"http://rpc.localhost/", "", 501, "gRPC only"},
		{"http://api.localhost/m3o.v1.Apps/List", "", 503, "the daemon is not running; apps go on"},
		{"http://api.localhost/", "application/json", 503, "the daemon is not running; apps go on"},
		{"http://api.localhost/nope/call", "", 404, `"nope"`},
		{"http://api.localhost/down/call", "", 415, "down.localhost"},
	} {
		code, body := get(tc.url, tc.accept)
		if code != tc.code || !strings.Contains(body, tc.want) {
			t.Errorf("GET %s (%s) = %d %q, want %d with %q", tc.url, tc.accept, code, body, tc.code, tc.want)
		}
	}
	s, err := f.client.Status(t.Context())
	if err != nil || s.Apps["down"].Failures != 1 || s.Apps["down"].Requests != 2 || s.Version != "test" || s.Hosts != 4 || s.PID == 0 {
		t.Errorf("status %+v, %v", s, err)
	}
}

func TestRedirectToHTTPS(t *testing.T) {
	addr, _ := backend(t, http.HandlerFunc(echo))
	f := start(t, func(c *Config) { c.Plain = PlainRedirect })
	f.put(t, appHost("one", 1, HTTP1, addr))
	res, _ := do(t, f.web(t, false), request1(t, "POST", "http://one.localhost/a?b=c", strings.NewReader("x")))
	_, port, _ := net.SplitHostPort(f.https)
	if want := "https://one.localhost:" + port + "/a?b=c"; res.StatusCode != 308 || res.Header.Get("Location") != want {
		t.Errorf("%s to %s, want %s", res.Status, res.Header.Get("Location"), want)
	}
	auto := &Router{cfg: Config{HTTPS: listen(t)}}
	for domain, want := range map[string]bool{"localhost": false, "dev.localhost": false, "example.org": true} {
		if got := auto.redirects(&live{domain: domain}, "one."+domain); got != want {
			t.Errorf("redirects on %s: %v", domain, got)
		}
	}
}

func TestDeadEndpointIsPassedOver(t *testing.T) {
	dead := listen(t)
	_ = dead.Close()
	addr, _ := backend(t, http.HandlerFunc(echo))
	f := start(t)
	f.put(t, appHost("one", 1, HTTP1, dead.Addr().String(), addr), appHost("two", 1, H2C, dead.Addr().String(), addr))
	for _, host := range []string{"one", "two"} {
		for _, body := range []string{"", "short", strings.Repeat("long", 10_000)} {
			for range 5 {
				res, got := do(t, f.web(t, false), request1(t, "POST", "http://"+host+".localhost/", strings.NewReader(body)))
				if res.StatusCode != 200 || !strings.Contains(got, `"body":"`+body+`"`) {
					t.Fatalf("%s: %s %.100q", host, res.Status, got)
				}
			}
		}
	}
}

func TestLoadIsBalanced(t *testing.T) {
	f := start(t)
	var hits [2]atomic.Int64
	hold := make(chan struct{})
	var addrs []string
	for i := range hits {
		a, _ := backend(t, http.HandlerFunc(func(http.ResponseWriter, *http.Request) { hits[i].Add(1); <-hold }))
		addrs = append(addrs, a)
	}
	f.put(t, appHost("one", 1, HTTP1, addrs...))
	c := f.web(t, false)
	var wg sync.WaitGroup
	for i := range 10 {
		wg.Go(func() { do(t, c, request1(t, "GET", "http://one.localhost/", nil)) })
		wait(t, "the request to arrive", func() bool { return hits[0].Load()+hits[1].Load() == int64(i+1) })
	}
	if a, b := hits[0].Load(), hits[1].Load(); a != 5 || b != 5 {
		t.Errorf("%d and %d requests, want 5 each: the less loaded of two gets the next", a, b)
	}
	close(hold)
	wg.Wait()
}

func TestDaemonAPIOverAUnixSocket(t *testing.T) {
	sock := t.TempDir() + "/api.sock"
	ln, err := net.Listen("unix", sock)
	if err != nil {
		t.Fatal(err)
	}
	srv := &http.Server{Handler: http.HandlerFunc(echo), Protocols: new(http.Protocols), ReadHeaderTimeout: time.Minute}
	srv.Protocols.SetHTTP1(true)
	srv.Protocols.SetUnencryptedHTTP2(true)
	go func() { _ = srv.Serve(ln) }()
	t.Cleanup(func() { _ = srv.Close() })
	f := start(t)
	for _, proto := range []string{HTTP1, H2C} {
		f.put(t, Host{Name: "api.localhost", Kind: KindAPI, Protocol: proto, Endpoints: []string{"unix:" + sock}})
		f.ways(t, func(t *testing.T, c *http.Client, scheme string) {
			for _, path := range []string{"/m3o.v1.Apps/List", "/-/health", "/"} {
				if res, body := do(t, c, request1(t, "POST", scheme+"://api.localhost"+path, strings.NewReader("{}"))); res.StatusCode != 200 || !strings.Contains(body, `"uri":"`+path+`"`) {
					t.Errorf("%s %s: %s %q", proto, path, res.Status, body)
				}
			}
		})
	}
}
