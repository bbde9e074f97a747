package router

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"golang.org/x/net/websocket"
	"google.golang.org/grpc/codes"
	testpb "google.golang.org/grpc/interop/grpc_testing"
	"google.golang.org/grpc/status"

	"github.com/m3o/m3o"
)

// generation is one release of a gRPC app and of a web app.
type generation struct {
	rpc, web string
	close    func()
}

func newGeneration(t *testing.T, n int) generation {
	t.Helper()
	rpc, gs := grpcBackend(t, fmt.Sprint("v", n))
	web, hs := backend(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		b, _ := io.ReadAll(r.Body)
		if r.URL.Path == "/stream" {
			for range 5 {
				_, _ = io.WriteString(w, "part ")
				w.(http.Flusher).Flush()
				<-time.After(time.Millisecond)
			}
		}
		fmt.Fprintf(w, "v%d %d", n, len(b))
	}))
	// Hard ends: whatever is still in flight fails.
	return generation{rpc, web, func() { gs.Stop(); hs.CloseClientConnections(); hs.Close() }}
}

func TestTwentySwapsUnderLoadFailNothing(t *testing.T) {
	f := start(t)
	cur := newGeneration(t, 0)
	put := func(n int, g generation) {
		f.put(t, appHost("rpc", n, GRPC, g.rpc), appHost("web", n, HTTP1, g.web), appHost("h2", n, H2C, g.web))
	}
	put(0, cur)
	ctx, cancel := context.WithCancel(t.Context())
	var ok, failed atomic.Int64
	var wg sync.WaitGroup
	loop := func(what string, once func() error) {
		wg.Go(func() {
			for ctx.Err() == nil {
				if err := once(); err != nil {
					failed.Add(1)
					t.Errorf("%s: %v", what, err)
				} else {
					ok.Add(1)
				}
			}
		})
	}
	get := func(c *http.Client, method, url string, body string) func() error {
		return func() error {
			req, err := http.NewRequest(method, url, strings.NewReader(body))
			if err != nil {
				return err
			}
			res, err := c.Do(req)
			if err != nil {
				return err
			}
			defer res.Body.Close() //nolint:errcheck // a test
			b, err := io.ReadAll(res.Body)
			if err == nil && (res.StatusCode != 200 || !strings.HasSuffix(string(b), fmt.Sprint(" ", len(body)))) {
				err = fmt.Errorf("%s %q", res.Status, b)
			}
			return err
		}
	}
	h1, h2 := f.web(t, false), f.web(t, true)
	for _, host := range []string{"web", "h2"} {
		loop("GET", get(h1, "GET", "http://"+host+".localhost/", ""))
		loop("POST", get(h2, "POST", "https://"+host+".localhost/", "hello"))
		loop("stream", get(h1, "POST", "https://"+host+".localhost/stream", strings.Repeat("x", 50_000)))
	}
	rpc := f.dial(t, "rpc.localhost")
	loop("unary", func() error {
		_, err := rpc.UnaryCall(context.Background(), &testpb.SimpleRequest{ResponseSize: 10})
		return err
	})
	loop("bidi", func() error {
		s, err := rpc.FullDuplexCall(context.Background())
		if err != nil {
			return err
		}
		for i := range 10 {
			if err := s.Send(&testpb.StreamingOutputCallRequest{Payload: payload(i)}); err != nil {
				return err
			}
			if _, err := s.Recv(); err != nil {
				return err
			}
		}
		if err := s.CloseSend(); err != nil {
			return err
		}
		if _, err := s.Recv(); err != io.EOF {
			return err
		}
		return nil
	})
	const swaps = 20
	for n := 1; n <= swaps; n++ {
		before := ok.Load()
		wait(t, "some requests between swaps", func() bool { return ok.Load() >= before+20 || failed.Load() > 0 })
		next := newGeneration(t, n)
		put(n, next)
		for _, app := range []string{"rpc", "web", "h2"} {
			dctx, dcancel := context.WithTimeout(ctx, 20*time.Second)
			if d, err := f.client.Drain(dctx, app, n-1); err != nil || d.Cut != 0 {
				t.Errorf("drain %s v%d: %+v, %v", app, n-1, d, err)
			}
			dcancel()
		}
		cur.close() // only after Drain
		cur = next
	}
	cancel()
	wg.Wait()
	t.Logf("%d swaps, %d requests and streams, %d failed", swaps, ok.Load(), failed.Load())
}

// A request that loaded the old table must be seen by Drain, however unlucky
// the moment: many goroutines enter while the endpoint is retired.
func TestNoRequestSlipsPastDrain(t *testing.T) {
	lim := Limits{}.withDefaults()
	for range 300 {
		e := newEndpoint(releaseID{"a", 1}, "127.0.0.1:1", lim)
		var closed atomic.Bool // what the daemon does after Drain
		var wg sync.WaitGroup
		for range 8 {
			wg.Go(func() {
				for {
					var c call
					if !e.add(&c) {
						return
					}
					if closed.Load() {
						t.Error("a request is on an endpoint that Drain called idle")
					}
					c.done()
				}
			})
		}
		e.retire()
		if err := e.waitIdle(t.Context()); err != nil {
			t.Fatal(err)
		}
		closed.Store(true)
		wg.Wait()
	}
}

func TestDrainWaitsAndThenCutsPolitely(t *testing.T) {
	release := make(chan struct{})
	web, _ := backend(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		switch r.URL.Path {
		case "/ws":
			websocket.Handler(func(ws *websocket.Conn) { _, _ = io.Copy(ws, ws) }).ServeHTTP(w, r)
			return
		case "/sse":
			w.Header().Set("Content-Type", "text/event-stream")
			_, _ = io.WriteString(w, "data: x\n\n")
			w.(http.Flusher).Flush()
		case "/half":
			w.Header().Set("Content-Length", "100")
			_, _ = io.WriteString(w, "half")
			w.(http.Flusher).Flush()
		}
		select {
		case <-release:
		case <-r.Context().Done():
		}
	}))
	rpcAddr, _ := grpcBackend(t, "v1")
	f := start(t)
	f.put(t, appHost("web", 1, HTTP1, web), appHost("rpc", 1, GRPC, rpcAddr))
	c := f.web(t, false)

	stream, err := f.dial(t, "rpc.localhost").FullDuplexCall(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if err := stream.Send(&testpb.StreamingOutputCallRequest{Payload: payload(1)}); err != nil {
		t.Fatal(err)
	}
	if _, err := stream.Recv(); err != nil {
		t.Fatal(err)
	}
	cfg, err := websocket.NewConfig("ws://web.localhost/ws", "http://web.localhost")
	if err != nil {
		t.Fatal(err)
	}
	wc, wbr := raw(t, f.http)
	ws, err := websocket.NewClient(cfg, wc)
	if err != nil {
		t.Fatal(err)
	}
	if err := websocket.Message.Send(ws, "hi"); err != nil {
		t.Fatal(err)
	}
	var got string
	if err := websocket.Message.Receive(ws, &got); err != nil || got != "hi" {
		t.Fatal(got, err)
	}
	sse, err := c.Do(request1(t, "GET", "http://web.localhost/sse", nil))
	if err != nil {
		t.Fatal(err)
	}
	half, err := c.Do(request1(t, "GET", "http://web.localhost/half", nil))
	if err != nil {
		t.Fatal(err)
	}
	type answer struct {
		code int
		body string
		err  error
	}
	unanswered := make(chan answer, 1)
	go func() {
		res, err := c.Do(request1(t, "GET", "http://web.localhost/wait", nil))
		if err != nil {
			unanswered <- answer{err: err}
			return
		}
		b, err := io.ReadAll(res.Body)
		_ = res.Body.Close()
		unanswered <- answer{res.StatusCode, string(b), err}
	}()
	wait(t, "four requests and a stream in flight", func() bool { return inFlight(t, f, "web") == 4 && inFlight(t, f, "rpc") == 1 })

	// Still routed: nothing to drain. Then a wait that is called off: nothing is cut.
	if d, err := f.client.Drain(t.Context(), "web", 1); err != nil || d != (Drained{}) {
		t.Errorf("drain of the live release: %+v, %v", d, err)
	}
	f.put(t, appHost("web", 2, HTTP1), appHost("rpc", 2, GRPC))
	off, cancel := context.WithCancel(t.Context())
	calledOff := make(chan error, 1)
	go func() { _, err := f.client.Drain(off, "web", 1); calledOff <- err }()
	cancel()
	if err := <-calledOff; m3o.KindOf(err) != m3o.Unavailable {
		t.Errorf("a drain called off: %v", err)
	}
	if n := inFlight(t, f, "web"); n != 4 {
		t.Errorf("%d in flight after a drain called off, want 4", n)
	}

	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	if d, err := f.client.Drain(ctx, "web", 1); err != nil || d != (Drained{Waited: 4, Cut: 4}) {
		t.Errorf("drain web: %+v, %v", d, err)
	}
	if d, err := f.client.Drain(ctx, "rpc", 1); err != nil || d != (Drained{Waited: 1, Cut: 1}) {
		t.Errorf("drain rpc: %+v, %v", d, err)
	}
	if _, err := stream.Recv(); status.Code(err) != codes.Unavailable || !strings.Contains(err.Error(), "replaced") {
		t.Errorf("the gRPC stream ended with %v", err)
	}
	if b, err := io.ReadAll(wbr); err != nil || string(b) != "\x88\x02\x03\xe9" {
		t.Errorf("the WebSocket ended with %x, %v, want close 1001", b, err)
	}
	if b, err := io.ReadAll(sse.Body); err != nil || string(b) != "data: x\n\n" {
		t.Errorf("the event stream ended with %q, %v", b, err)
	}
	if b, err := io.ReadAll(half.Body); err == nil {
		t.Errorf("half an answer looks whole: %q", b)
	}
	if a := <-unanswered; a.err != nil || a.code != 503 || !strings.Contains(a.body, "replaced") {
		t.Errorf("the request without an answer got %+v", a)
	}
	close(release)
	if d, err := f.client.Drain(t.Context(), "web", 1); err != nil || d != (Drained{}) {
		t.Errorf("the second drain: %+v, %v", d, err)
	}
}

func TestScaleDownDrainsOneEndpointOfALiveRelease(t *testing.T) {
	hold := make(chan struct{})
	var at [2]atomic.Int64
	var addrs []string
	for i := range at {
		a, _ := backend(t, http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { at[i].Add(1); <-hold }))
		addrs = append(addrs, a)
	}
	f := start(t)
	f.put(t, appHost("web", 1, HTTP1, addrs...))
	c := f.web(t, false)
	var wg sync.WaitGroup
	for range 2 {
		wg.Go(func() {
			if res, _ := do(t, c, request1(t, "GET", "http://web.localhost/", nil)); res.StatusCode != 200 {
				t.Error(res.Status)
			}
		})
		wait(t, "the request", func() bool { return at[0].Load()+at[1].Load() > 0 })
	}
	wait(t, "one request each", func() bool { return at[0].Load() == 1 && at[1].Load() == 1 })
	f.put(t, appHost("web", 1, HTTP1, addrs[0]))
	drained := make(chan Drained, 1)
	go func() {
		d, err := f.client.Drain(t.Context(), "web", 1)
		if err != nil {
			t.Error(err)
		}
		drained <- d
	}()
	select {
	case d := <-drained:
		t.Errorf("drained at once: %+v", d)
	default:
	}
	close(hold)
	if d := <-drained; d.Waited > 1 || d.Cut != 0 {
		t.Errorf("%+v", d)
	}
	wg.Wait()
}

func TestLastGoodTableAfterRestart(t *testing.T) {
	addr, _ := backend(t, http.HandlerFunc(echo))
	f := start(t)
	want := table(appHost("one", 3, HTTP1, addr))
	f.put(t, want.Hosts...)
	if _, err := f.client.Put(t.Context(), Table{Domain: "UPPER", Hosts: []Host{{Name: "x y"}}}); m3o.KindOf(err) != m3o.Invalid ||
		!strings.Contains(err.Error(), "UPPER") || !strings.Contains(err.Error(), "x y") {
		t.Errorf("a bad table: %v", err)
	}
	if err := f.stop(); err != nil {
		t.Fatal(err)
	}
	g := start(t, func(c *Config) { c.State = f.state })
	if got := g.rt.live.Load().tableOf(); !reflect.DeepEqual(got, want) {
		t.Errorf("table %+v, want %+v", got, want)
	}
	if res, _ := do(t, g.web(t, false), request1(t, "GET", "https://one.localhost/", nil)); res.StatusCode != 200 {
		t.Error(res.Status)
	}
	if s, err := g.client.Status(t.Context()); err != nil || s.Table != TableHash(want) {
		t.Errorf("table hash %q, want %q (%v)", s.Table, TableHash(want), err)
	}
}

func TestCorruptTableStartsEmpty(t *testing.T) {
	for name, content := range map[string]string{"garbage": "\x00\xff", "empty": "", "cut off": `{"version":1,"domain":"local`, "newer": `{"version":2,"domain":"localhost","hosts":[]}`,
		"unknown key": `{"version":1,"domain":"localhost","hosts":[],"x":1}`, "more": `{"version":1,"domain":"localhost","hosts":[]}{}`, "a directory": ""} {
		t.Run(name, func(t *testing.T) {
			state := filepath.Join(t.TempDir(), "table")
			var err error
			if name == "a directory" {
				err = os.Mkdir(state, 0o700)
			} else {
				err = os.WriteFile(state, []byte(content), 0o600)
			}
			if err != nil {
				t.Fatal(err)
			}
			f := start(t, func(c *Config) { c.State = state })
			if res, _ := do(t, f.web(t, false), request1(t, "GET", "http://one.localhost/", nil)); res.StatusCode != 503 {
				t.Error(res.Status)
			}
			if name != "a directory" {
				f.put(t, appHost("one", 1, HTTP1))
			}
		})
	}
}

func TestUnwritableStateKeepsTheOldTable(t *testing.T) {
	addr, _ := backend(t, http.HandlerFunc(echo))
	f := start(t)
	f.put(t, appHost("one", 1, HTTP1, addr))
	f.rt.cfg.State = filepath.Join(t.TempDir(), "missing", "table")
	if _, err := f.client.Put(t.Context(), table()); err == nil {
		t.Error("Put succeeded though the table could not be kept")
	}
	if res, _ := do(t, f.web(t, false), request1(t, "GET", "http://one.localhost/", nil)); res.StatusCode != 200 {
		t.Error(res.Status)
	}
}

func TestRunEndsGracefully(t *testing.T) {
	began, release := make(chan struct{}, 1), make(chan struct{})
	addr, _ := backend(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Header.Get("Upgrade") != "" {
			websocket.Handler(func(ws *websocket.Conn) { _, _ = io.Copy(ws, ws) }).ServeHTTP(w, r)
			return
		}
		began <- struct{}{}
		<-release
		_, _ = io.WriteString(w, "whole")
	}))
	f := start(t)
	f.put(t, appHost("one", 1, HTTP1, addr))
	idle, idleBR := raw(t, f.http)
	send(t, idle, "GET / HTTP/1.1\r\nHost: nope.localhost\r\n\r\n")
	if res, err := http.ReadResponse(idleBR, nil); err != nil || res.StatusCode != 404 {
		t.Fatal(res, err)
	} else if _, err := io.Copy(io.Discard, res.Body); err != nil {
		t.Fatal(err)
	}
	cfg, err := websocket.NewConfig("ws://one.localhost/", "http://one.localhost")
	if err != nil {
		t.Fatal(err)
	}
	wc, wbr := raw(t, f.http)
	if _, err := websocket.NewClient(cfg, wc); err != nil {
		t.Fatal(err)
	}
	body := make(chan string, 1)
	go func() {
		_, b := do(t, f.web(t, true), request1(t, "GET", "https://one.localhost/", nil))
		body <- b
	}()
	<-began
	ended := make(chan error, 1)
	go func() { ended <- f.stop() }()
	if b, err := io.ReadAll(wbr); err != nil || string(b) != "\x88\x02\x03\xe9" {
		t.Errorf("the WebSocket ended with %x, %v, want close 1001", b, err)
	}
	if _, err := idleBR.ReadByte(); !errors.Is(err, io.EOF) {
		t.Errorf("the idle connection: %v", err)
	}
	if _, err := net.Dial("tcp", f.http); err == nil {
		t.Error("a connection was taken after the end")
	}
	close(release)
	if b := <-body; b != "whole" {
		t.Errorf("the request in flight got %q", b)
	}
	if err := <-ended; err != nil {
		t.Errorf("Run = %v", err)
	}
	if _, err := f.client.Status(t.Context()); m3o.KindOf(err) != m3o.Unavailable {
		t.Errorf("status of a router that is gone: %v", err)
	}
}

// The end of a router waited five seconds for calls that had ended meanwhile.
func TestEndOfTheLastCallOfALiveEndpointIsNoticed(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := newEndpoint(releaseID{"one", 1}, "127.0.0.1:1", Limits{}.withDefaults())
		var c call
		if !e.add(&c) {
			t.Fatal("the endpoint is retired")
		}
		done := make(chan error, 1)
		go func() { done <- e.waitIdle(t.Context()) }()
		synctest.Wait()
		c.done()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
}

func TestControlSocketIsPrivate(t *testing.T) {
	f := start(t)
	fi, err := os.Stat(f.client.Socket)
	if err != nil || fi.Mode().Perm() != 0o600 {
		t.Errorf("mode %v, %v", fi.Mode(), err)
	}
	c, err := net.Dial("unix", f.client.Socket)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close() //nolint:errcheck // a test
	send(t, c, "PUT /table HTTP/1.1\r\nHost: x\r\nContent-Length: 7\r\n\r\n{\"a\":1}")
	res, err := http.ReadResponse(bufio.NewReader(c), nil)
	if err != nil || res.StatusCode == 200 {
		t.Errorf("%v, %v", res, err)
	}
}
