package router

import (
	"context"
	"io"
	"net/http"
	"net/netip"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	tracepb "go.opentelemetry.io/proto/otlp/trace/v1"

	"github.com/m3o/m3o/telemetry"
	"github.com/m3o/m3o/telemetry/collector"
)

// withTraces has a router's spans sent to a collector. flush sends what there is.
func withTraces(t testing.TB, sample float64) (c *collector.Collector, opt option, flush func()) {
	t.Helper()
	c = collector.New(t)
	s, err := telemetry.New(telemetry.Config{Endpoint: c.URL, Service: "m3o-router", Sample: sample})
	if err != nil {
		t.Fatal(err)
	}
	return c, func(cfg *Config) { cfg.Traces = s }, func() {
		ctx, cancel := context.WithCancel(context.Background())
		cancel()
		if err := s.Run(ctx); err != nil {
			t.Error(err)
		}
	}
}

func TestSpansOfARequestLeadToTheInstance(t *testing.T) {
	var mu sync.Mutex
	got := map[string]string{}
	app, _ := backend(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		mu.Lock()
		got[r.URL.Path] = r.Header.Get("Traceparent")
		mu.Unlock()
		if r.URL.Path == "/broken" {
			w.WriteHeader(500)
		}
	}))
	c, traces, flush := withTraces(t, 1)
	f := start(t, traces)
	f.put(t, appHost("web", 3, HTTP1, app), appHost("empty", 1, HTTP1))
	const secret = "s3cr3t"
	for _, path := range []string{"/ok", "/broken", "/joined"} {
		req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, "http://web.localhost"+path+"?token="+secret, nil)
		if err != nil {
			t.Fatal(err)
		}
		req.Header.Set("Authorization", "Bearer "+secret)
		req.Header.Set("Cookie", "a="+secret)
		if path == "/joined" {
			req.Header.Set("Traceparent", "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-00")
		}
		res, err := f.web(t, false).Do(req)
		if err != nil {
			t.Fatal(err)
		}
		_ = res.Body.Close()
	}
	res, err := f.web(t, false).Get("http://empty.localhost/none")
	if err != nil {
		t.Fatal(err)
	}
	_ = res.Body.Close()
	wait(t, "the requests to be recorded", func() bool { return f.rt.Status().Apps["web"].InFlight+f.rt.Status().Apps["empty"].InFlight == 0 })
	flush()
	byPath := map[string]collector.Span{}
	for _, s := range c.Spans("") {
		if s.Kind == tracepb.Span_SPAN_KIND_SERVER {
			byPath[s.Attrs["url.path"]] = s
		}
	}
	for path, status := range map[string]string{"/ok": "200", "/broken": "500", "/joined": "200", "/none": "503"} {
		s, ok := byPath[path]
		if !ok {
			t.Errorf("%s has no span", path)
			continue
		}
		if s.Name != "GET" || s.Service != "m3o-router" || s.Attrs["http.response.status_code"] != status || s.Failed != (status[0] == '5') {
			t.Errorf("%s: %+v", path, s)
		}
		all := c.Spans(s.Trace)
		if path == "/none" {
			if len(all) != 1 {
				t.Errorf("nobody was asked, but there are %d spans", len(all))
			}
			continue
		}
		if len(all) != 2 || all[1].Parent != s.ID || all[1].Kind != tracepb.Span_SPAN_KIND_CLIENT || all[1].Attrs["server.address"] != app || all[1].Attrs["m3o.app"] != "web" || all[1].Attrs["m3o.release"] != "3" {
			t.Errorf("%s: %+v", path, all)
			continue
		}
		if want := "00-" + s.Trace + "-" + all[1].ID + "-01"; got[path] != want {
			t.Errorf("%s: the app was given %s, want %s", path, got[path], want)
		}
	}
	if s := byPath["/joined"]; s.Trace != "0af7651916cd43dd8448eb211c80319c" || s.Parent != "b7ad6b7169203331" {
		t.Errorf("a caller's trace was not joined: %+v", s)
	}
	if c.Holds(secret) {
		t.Error("a secret was sent")
	}
}

func TestWhoIsNotTrustedHasNoRequestTraced(t *testing.T) {
	app, _ := backend(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { _, _ = io.WriteString(w, r.Header.Get("Traceparent")) }))
	const tp = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
	for _, trusted := range []bool{false, true} {
		c, traces, flush := withTraces(t, 0)
		f := start(t, traces, func(c *Config) {
			if trusted {
				c.TrustedProxies = []netip.Prefix{netip.MustParsePrefix("127.0.0.1/32")}
			}
		})
		f.put(t, appHost("web", 1, HTTP1, app))
		req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, "http://web.localhost/", nil)
		if err != nil {
			t.Fatal(err)
		}
		req.Header.Set("Traceparent", tp)
		res, err := f.web(t, false).Do(req)
		if err != nil {
			t.Fatal(err)
		}
		b, _ := io.ReadAll(res.Body)
		_ = res.Body.Close()
		wait(t, "the request to be recorded", func() bool { return f.rt.Status().Apps["web"].InFlight == 0 })
		flush()
		if n := len(c.Spans("")); (n > 0) != trusted {
			t.Errorf("trusted %v: %d spans", trusted, n)
		}
		if passed := string(b) == tp; passed == trusted {
			t.Errorf("trusted %v: the app was given %s", trusted, b)
		}
	}
}

// BenchmarkTraces is the processor time of a request by how many are traced.
func BenchmarkTraces(b *testing.B) {
	app, _ := backend(b, http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { _, _ = io.WriteString(w, strings.Repeat("x", 200)) }))
	for name, sample := range map[string]float64{"off": -1, "1%": 0.01, "all": 1} {
		b.Run(name, func(b *testing.B) {
			opt := func(*Config) {}
			if sample >= 0 {
				_, opt, _ = withTraces(b, sample)
			}
			f := start(b, opt)
			f.put(b, appHost("web", 1, HTTP1, app))
			var cfg Config
			opt(&cfg)
			if s := cfg.Traces; s != nil {
				ctx, cancel := context.WithCancel(context.Background())
				done := make(chan error, 1)
				go func() { done <- s.Run(ctx) }()
				defer func() { cancel(); <-done }()
			}
			c := f.web(b, false)
			began := cpu(b)
			for b.Loop() {
				res, err := c.Get("http://web.localhost/")
				if err != nil {
					b.Fatal(err)
				}
				_, _ = io.Copy(io.Discard, res.Body)
				_ = res.Body.Close()
			}
			b.ReportMetric(float64((cpu(b)-began).Nanoseconds())/float64(b.N), "cpu-ns/op")
		})
	}
}

func cpu(t testing.TB) time.Duration {
	t.Helper()
	var u syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &u); err != nil {
		t.Fatal(err)
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}
