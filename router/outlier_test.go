package router

import (
	"io"
	"net/http"
	"sync/atomic"
	"testing"
	"time"
)

func TestAnInstanceThatKeepsFailingIsLeftAlone(t *testing.T) {
	f := start(t)
	var bad, good atomic.Int64
	sick, _ := backend(t, http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		bad.Add(1)
		w.WriteHeader(http.StatusServiceUnavailable)
	}))
	well, _ := backend(t, http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		good.Add(1)
		_, _ = io.WriteString(w, "hello")
	}))
	f.put(t, appHost("hello", 1, HTTP1, sick, well))
	c := f.web(t, false)
	for range 200 {
		do(t, c, request1(t, "GET", "https://hello.localhost/", nil))
	}
	if bad.Load() != ejectAfter {
		t.Errorf("the failing instance got %d of 200 requests, want %d", bad.Load(), ejectAfter)
	}
	if good.Load() != 200-ejectAfter {
		t.Errorf("the good one got %d", good.Load())
	}
}

func TestTheOnlyInstanceIsNeverTakenOut(t *testing.T) {
	f := start(t)
	up, _ := backend(t, http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(http.StatusServiceUnavailable) }))
	f.put(t, appHost("hello", 1, HTTP1, up))
	c := f.web(t, false)
	for range 3 * ejectAfter {
		if res, _ := do(t, c, request1(t, "GET", "https://hello.localhost/", nil)); res.Header.Get("Retry-After") != "" {
			t.Fatal("the router answered in the app's stead")
		}
	}
}

func TestEjectionGrowsAndIsForgotten(t *testing.T) {
	var o outlier
	now := time.Unix(1000, 0)
	yes, no := func() bool { return true }, func() bool { return false }
	fail := func(may func() bool) (out bool) {
		for range ejectAfter {
			out = o.note(true, now, may)
		}
		return out
	}
	if fail(no) {
		t.Fatal("ejected the last one in use")
	}
	if !o.note(true, now, yes) || !o.ejected(now.Add(ejectFor-1).UnixNano()) || o.ejected(now.Add(ejectFor).UnixNano()) {
		t.Fatalf("first ejection lasts until %d", o.until.Load())
	}
	now = now.Add(ejectFor)
	if !fail(yes) || !o.ejected(now.Add(2*ejectFor-1).UnixNano()) {
		t.Fatal("the second ejection is no longer than the first")
	}
	now = now.Add(2*ejectFor + ejectMost + time.Second)
	o.note(false, now, yes)
	if fail(yes); o.ejected(now.Add(ejectFor).UnixNano()) {
		t.Fatal("a long good time did not count")
	}
}
