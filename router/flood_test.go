package router

import (
	"bytes"
	"io"
	"net"
	"net/http"
	"sync/atomic"
	"testing"

	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"
)

// h2raw is an HTTP/2 connection without TLS that a test misuses.
func h2raw(t testing.TB, addr string) (net.Conn, *http2.Framer) {
	t.Helper()
	c, _ := raw(t, addr)
	if _, err := io.WriteString(c, http2.ClientPreface); err != nil {
		t.Fatal(err)
	}
	fr := http2.NewFramer(c, c)
	if err := fr.WriteSettings(); err != nil {
		t.Fatal(err)
	}
	return c, fr
}

func h2head(t testing.TB, host string) []byte {
	t.Helper()
	var b bytes.Buffer
	enc := hpack.NewEncoder(&b)
	for _, f := range []hpack.HeaderField{{Name: ":method", Value: "GET"}, {Name: ":scheme", Value: "http"}, {Name: ":path", Value: "/"}, {Name: ":authority", Value: host}} {
		if err := enc.WriteField(f); err != nil {
			t.Fatal(err)
		}
	}
	return b.Bytes()
}

// Streams that are opened and reset at once (CVE-2023-44487) neither pile up
// here nor at the app, and cost nobody else a request.
func TestRapidResetCostsNobodyElseARequest(t *testing.T) {
	var now, most atomic.Int64
	web, _ := backend(t, http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/fine" {
			return
		}
		n := now.Add(1)
		defer now.Add(-1)
		for {
			if m := most.Load(); n <= m || most.CompareAndSwap(m, n) {
				break
			}
		}
		<-r.Context().Done()
	}))
	const streams = 20
	f := start(t, func(c *Config) { c.Limits.Streams = streams })
	f.put(t, appHost("h1", 1, HTTP1, web), appHost("h2", 1, H2C, web))
	for _, host := range []string{"h1", "h2"} {
		c, fr := h2raw(t, f.http)
		go func() { _, _ = io.Copy(io.Discard, c) }()
		head := h2head(t, host+".localhost")
		refused := false
		for id := uint32(1); id < 2*5_000; id += 2 {
			if err := fr.WriteHeaders(http2.HeadersFrameParam{StreamID: id, BlockFragment: head, EndStream: true, EndHeaders: true}); err != nil {
				refused = true // the connection was closed on it, which is as good
				break
			}
			if err := fr.WriteRSTStream(id, http2.ErrCodeCancel); err != nil {
				refused = true
				break
			}
			if id%1001 == 0 {
				if res, b := do(t, f.web(t, true), request1(t, "GET", "https://"+host+".localhost/fine", nil)); res.StatusCode != 200 {
					t.Errorf("%s: another client got %s %s", host, res.Status, b)
				}
			}
		}
		t.Logf("%s: connection closed: %v, at most %d requests at once", host, refused, most.Load())
		if most.Load() > 2*streams {
			t.Errorf("%s: the app had %d requests at once", host, most.Load())
		}
		wait(t, "the app and the router to be idle", func() bool { return now.Load() == 0 && inFlight(t, f, host) == 0 })
		if res, _ := do(t, f.web(t, true), request1(t, "GET", "https://"+host+".localhost/fine", nil)); res.StatusCode != 200 {
			t.Errorf("%s afterwards: %s", host, res.Status)
		}
	}
}
