package router

import (
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"sync/atomic"
	"testing"
)

// One of several instances dies while it has a request on a new connection: a
// request that may be repeated is answered by another one, any other is not
// sent twice, and a request that kills whoever gets it costs no more than two.
func TestCrashOfOneInstanceLosesNoRepeatableRequest(t *testing.T) {
	f := start(t)
	var died atomic.Int64
	dies := func() string { return liar(t, func(net.Conn, string) { died.Add(1) }) }
	well, _ := backend(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		b, _ := io.ReadAll(r.Body)
		fmt.Fprintf(w, "well %s", b)
	}))
	f.put(t, appHost("half", 1, HTTP1, dies(), well), appHost("poison", 1, HTTP1, dies(), dies(), dies(), dies()))
	c := f.web(t, false)
	for died.Load() == 0 {
		if res, body := do(t, c, request1(t, "GET", "http://half.localhost/", nil)); res.StatusCode != 200 || body != "well " {
			t.Fatalf("GET answered %d %q", res.StatusCode, body)
		}
	}
	for range 40 {
		before := died.Load()
		res, body := do(t, c, request1(t, "POST", "http://half.localhost/", strings.NewReader("x")))
		if lost := died.Load() > before; lost != (res.StatusCode != 200) || !lost && body != "well x" {
			t.Fatalf("POST answered %d %q, and it reached the one that dies: %v", res.StatusCode, body, lost)
		}
	}
	before := died.Load()
	if res, _ := do(t, c, request1(t, "GET", "http://poison.localhost/", nil)); res.StatusCode != http.StatusBadGateway {
		t.Errorf("a request that kills every instance is answered %d", res.StatusCode)
	}
	if n := died.Load() - before; n != 2 {
		t.Errorf("it cost %d instances, want 2", n)
	}
}
