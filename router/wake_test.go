package router

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strings"
	"sync"
	"testing"

	"google.golang.org/grpc/codes"
	testpb "google.golang.org/grpc/interop/grpc_testing"
	"google.golang.org/grpc/status"
)

func asleep(h Host) Host {
	h.Asleep, h.Endpoints = true, nil
	return h
}

// asked gives the apps the router asks for, from now until the test ends.
func (f *fixture) asked(t *testing.T) <-chan string {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	apps := make(chan string)
	done := make(chan struct{})
	go func() {
		defer close(done)
		for app, err := range f.client.Asks(ctx) {
			if err != nil {
				t.Errorf("Asks: %v", err)
				return
			}
			select {
			case apps <- app:
			case <-ctx.Done():
				return
			}
		}
	}()
	t.Cleanup(func() { cancel(); <-done })
	return apps
}

func TestFirstRequestsOfASleepingAppWaitForOneWake(t *testing.T) {
	f := start(t)
	addr, _ := backend(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		b, _ := io.ReadAll(r.Body)
		fmt.Fprintf(w, "awake, %s", b)
	}))
	host := appHost("nap", 1, HTTP1, addr)
	f.put(t, asleep(host))
	asks := f.asked(t)
	const n = 20
	var all sync.WaitGroup
	for i := range n {
		all.Go(func() {
			res, body := do(t, f.web(t, false), request1(t, "POST", "http://nap.localhost/", strings.NewReader(fmt.Sprint(i))))
			if res.StatusCode != 200 || body != fmt.Sprintf("awake, %d", i) {
				t.Errorf("request %d: %d %q", i, res.StatusCode, body)
			}
		})
	}
	if app := <-asks; app != "nap" {
		t.Errorf("asked for %q", app)
	}
	wait(t, "all requests wait", func() bool { return f.rt.Status().Apps["nap"].InFlight == n })
	f.put(t, asleep(host)) // another app's change must not wake them
	f.put(t, host)
	all.Wait()
	select {
	case app := <-asks:
		t.Errorf("asked again for %q", app)
	default:
	}
	if len(f.rt.lobby.apps) != 0 {
		t.Errorf("the lobby holds %v", f.rt.lobby.apps)
	}
}

// A release's own host waits for an instance of that release, whatever the app does.
func TestReleaseIsAskedForByItsOwnHost(t *testing.T) {
	f := start(t)
	addr, _ := backend(t, http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { _, _ = io.WriteString(w, "old") }))
	own := Host{Name: "v1--nap.localhost", Kind: KindRelease, App: "nap", Release: 1, Asleep: true}
	f.put(t, asleep(appHost("nap", 2, HTTP1, addr)), own)
	asks := f.asked(t)
	get := func() <-chan string {
		got := make(chan string, 1)
		go func() {
			res, body := do(t, f.web(t, false), request1(t, "GET", "http://v1--nap.localhost/", nil))
			got <- fmt.Sprint(res.StatusCode, " ", body)
		}()
		return got
	}
	failed := get()
	if app := <-asks; app != "nap@1" {
		t.Errorf("asked for %q", app)
	}
	if err := f.client.FailWake(t.Context(), "nap@1", errors.New("it broke")); err != nil {
		t.Fatal(err)
	}
	if got := <-failed; !strings.HasPrefix(got, "503 ") || !strings.Contains(got, "it broke") {
		t.Errorf("after a failed wake: %s", got)
	}
	served := get()
	if app := <-asks; app != "nap@1" {
		t.Errorf("asked for %q", app)
	}
	own.Asleep, own.Endpoints = false, []string{addr}
	f.put(t, asleep(appHost("nap", 2, HTTP1, addr)), own)
	if got := <-served; got != "200 old" {
		t.Errorf("once it runs: %s", got)
	}
	wait(t, "the requests of the release are counted apart", func() bool {
		st := f.rt.Status().Apps["nap"]
		return st.Requests == 2 && st.InFlight == 0 && st.Releases[1].Requests == 2 && st.Releases[1].InFlight == 0
	})
}

func TestAskIsRepeatedToADaemonThatCameBack(t *testing.T) {
	f := start(t)
	addr, _ := backend(t, http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {}))
	host := appHost("nap", 1, HTTP1, addr)
	f.put(t, asleep(host))
	answered := make(chan int, 1)
	go func() {
		res, _ := do(t, f.web(t, false), request1(t, "GET", "http://nap.localhost/", nil))
		answered <- res.StatusCode
	}()
	for range 2 {
		for app, err := range f.client.Asks(t.Context()) {
			if err != nil || app != "nap" {
				t.Fatalf("asked for %q, %v", app, err)
			}
			break // this daemon dies
		}
	}
	f.put(t, host)
	if code := <-answered; code != 200 {
		t.Errorf("answered %d", code)
	}
}

func TestFailedWakeIsAnsweredWithTheReason(t *testing.T) {
	f := start(t)
	f.put(t, asleep(appHost("nap", 1, HTTP1)), asleep(appHost("rpc", 1, GRPC)))
	asks := f.asked(t)
	told := make(chan struct{})
	go func() {
		defer close(told)
		for range 3 {
			if err := f.client.FailWake(t.Context(), <-asks, errors.New("web exited with code 3")); err != nil {
				t.Error(err)
			}
		}
	}()
	for range 2 { // a failure is not remembered: every wake is tried
		res, body := do(t, f.web(t, false), request1(t, "GET", "http://nap.localhost/", nil))
		if res.StatusCode != 503 || !strings.Contains(body, "web exited with code 3") {
			t.Errorf("answered %d %q", res.StatusCode, body)
		}
	}
	_, err := f.dial(t, "rpc.localhost").UnaryCall(t.Context(), &testpb.SimpleRequest{})
	if status.Code(err) != codes.Unavailable || !strings.Contains(err.Error(), "web exited with code 3") {
		t.Errorf("gRPC is told %v", err)
	}
	<-told
}

func TestGRPCCallWakesTheApp(t *testing.T) {
	f := start(t)
	addr, _ := grpcBackend(t, "one")
	host := appHost("rpc", 1, GRPC, addr)
	f.put(t, asleep(host))
	asks := f.asked(t)
	put := make(chan struct{})
	go func() {
		defer close(put)
		<-asks
		f.put(t, host)
	}()
	defer func() { <-put }()
	if _, err := f.dial(t, "rpc.localhost").UnaryCall(t.Context(), &testpb.SimpleRequest{}); err != nil {
		t.Error(err)
	}
}

func TestHeldRequestsGoToTheNextInstanceWithoutAsking(t *testing.T) {
	f := start(t)
	addr, _ := backend(t, http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {}))
	held := appHost("disk", 1, HTTP1)
	held.Hold = true
	f.put(t, held)
	asks := f.asked(t)
	answered := make(chan int, 1)
	go func() {
		res, _ := do(t, f.web(t, false), request1(t, "GET", "http://disk.localhost/", nil))
		answered <- res.StatusCode
	}()
	wait(t, "the request waits", func() bool { return f.rt.Status().Apps["disk"].InFlight == 1 })
	f.put(t, appHost("disk", 2, HTTP1, addr))
	if code := <-answered; code != 200 {
		t.Errorf("answered %d", code)
	}
	select {
	case app := <-asks:
		t.Errorf("asked for %q", app)
	default:
	}
}

func TestNoMoreThanAThousandRequestsWait(t *testing.T) {
	var l lobby
	var last *waiting
	for i := range maxWaiting {
		w, err := l.enter("nap", true)
		if err != nil {
			t.Fatalf("request %d: %v", i, err)
		}
		last = w
	}
	if _, err := l.enter("nap", true); err == nil {
		t.Error("one more was let in")
	}
	if _, err := l.enter("other", true); err != nil {
		t.Errorf("another app: %v", err)
	}
	l.leave("nap", last)
	if _, err := l.enter("nap", true); err != nil {
		t.Errorf("after one left: %v", err)
	}
}
