package telemetry_test

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/m3o/m3o/telemetry"
	"github.com/m3o/m3o/telemetry/collector"
)

func sender(t *testing.T, cfg telemetry.Config) (s *telemetry.Sender, end func()) {
	t.Helper()
	s, err := telemetry.New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- s.Run(ctx) }()
	return s, func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("Run = %v", err)
		}
	}
}

func TestSpansArriveWhole(t *testing.T) {
	c := collector.New(t)
	c.Refuse(1) // it is asked again
	s, end := sender(t, telemetry.Config{Endpoint: c.URL + "/", Service: "m3o-test", Version: "v9", Sample: 1, Headers: telemetry.ParseHeaders("authorization=Bearer%20abc, x-b = c")})
	begin := time.Unix(1_700_000_000, 5)
	tid, sid := telemetry.NewTraceID(), telemetry.NewSpanID()
	s.Add(telemetry.Span{Trace: tid, ID: sid, Name: "a", Kind: telemetry.Server, Begin: begin, End: begin.Add(time.Second), Failed: true, Why: "it broke",
		Attrs: []telemetry.Attr{telemetry.String("k", "v"), telemetry.Int("n", 0), telemetry.String("empty", "")}},
		telemetry.Span{Trace: tid, ID: telemetry.NewSpanID(), Parent: sid, Name: "b", Kind: telemetry.Client, Begin: begin, End: begin.Add(-time.Second)})
	for i := range 1000 {
		s.Add(telemetry.Span{Trace: tid, ID: telemetry.NewSpanID(), Name: fmt.Sprint(i)})
	}
	end()
	all := c.Spans(fmt.Sprintf("%x", tid))
	if len(all) != 1002 || s.Dropped() != 0 {
		t.Fatalf("%d spans came, %d were dropped", len(all), s.Dropped())
	}
	a, b := all[0], all[1]
	if a.Name != "a" || a.Service != "m3o-test" || !a.Failed || a.Raw.Status.Message != "it broke" || a.Parent != "" || a.Raw.StartTimeUnixNano != uint64(begin.UnixNano()) || a.Raw.EndTimeUnixNano-a.Raw.StartTimeUnixNano != 1e9 ||
		fmt.Sprint(a.Attrs) != "map[k:v n:0]" {
		t.Errorf("a: %+v", a)
	}
	if b.Parent != a.ID || b.Failed || b.Raw.EndTimeUnixNano != b.Raw.StartTimeUnixNano {
		t.Errorf("b: %+v", b)
	}
	for _, h := range c.Headers() {
		if h.Get("Authorization") != "Bearer abc" || h.Get("X-B") != "c" {
			t.Errorf("headers: %v", h)
		}
	}
}

func TestCollectorThatIsAwayCostsSpansAlone(t *testing.T) {
	c := collector.New(t)
	c.Refuse(1 << 30)
	s, end := sender(t, telemetry.Config{Endpoint: c.URL, Sample: 1})
	for range 10_000 {
		s.Add(telemetry.Span{Name: "x"}) // never waits
	}
	end()
	if s.Dropped() < 4000 || len(c.Spans("")) != 0 {
		t.Errorf("%d dropped, %d came", s.Dropped(), len(c.Spans("")))
	}
}

func TestSampling(t *testing.T) {
	for _, c := range []struct {
		sample    float64
		low, high int
	}{{0, 0, 0}, {0.01, 40, 180}, {1, 10_000, 10_000}} {
		s, err := telemetry.New(telemetry.Config{Endpoint: "http://127.0.0.1:4318", Sample: c.sample})
		if err != nil {
			t.Fatal(err)
		}
		n := 0
		for range 10_000 {
			if s.Sampled(telemetry.NewTraceID()) {
				n++
			}
		}
		if n < c.low || n > c.high {
			t.Errorf("a sample of %v takes %d of 10000", c.sample, n)
		}
	}
	for _, bad := range []telemetry.Config{{Endpoint: "collector:4318"}, {Endpoint: "grpc://c"}, {Endpoint: "http://c", Sample: 1.1}, {}} {
		if _, err := telemetry.New(bad); err == nil {
			t.Errorf("%+v passed", bad)
		}
	}
}

func TestParents(t *testing.T) {
	const tp = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
	tid, sid, sampled := telemetry.ParseParent(tp)
	if !sampled || telemetry.Parent(tid, sid) != tp {
		t.Errorf("%s became %s, %v", tp, telemetry.Parent(tid, sid), sampled)
	}
	if _, _, sampled := telemetry.ParseParent(tp[:54] + "0"); sampled {
		t.Error("flag 00 is sampled")
	}
	if tid, _, _ := telemetry.ParseParent("short"); tid != (telemetry.TraceID{}) {
		t.Error("a short one has an id")
	}
}

func TestMetricsAsPrometheusHasThem(t *testing.T) {
	c := collector.New(t)
	s, end := sender(t, telemetry.Config{Endpoint: c.URL})
	defer end()
	err := s.Metrics(t.Context(), time.Unix(5, 0), []telemetry.Family{
		{Name: "up", Kind: "gauge", Help: "h", Samples: []telemetry.Sample{{"up", 1, []string{"app", "a"}}, {"up", 0, []string{"app", "b"}}}},
		{Name: "n_total", Kind: "counter", Samples: []telemetry.Sample{{"n_total", 7, nil}}},
		{Name: "empty", Kind: "counter"},
		{Name: "took", Kind: "histogram", Samples: []telemetry.Sample{{"took_bucket", 1, []string{"app", "a", "le", "0.1"}}, {"took_bucket", 4, []string{"app", "a", "le", "1"}},
			{"took_bucket", 5, []string{"app", "a", "le", "+Inf"}}, {"took_sum", 9.5, []string{"app", "a"}}, {"took_count", 5, []string{"app", "a"}}}},
	})
	if err != nil {
		t.Fatal(err)
	}
	if g := c.Metric("up").GetGauge(); len(g.GetDataPoints()) != 2 || g.DataPoints[0].GetAsDouble() != 1 || g.DataPoints[0].TimeUnixNano != 5e9 {
		t.Errorf("up: %v", g)
	}
	if n := c.Metric("n_total").GetSum(); !n.GetIsMonotonic() || n.DataPoints[0].GetAsDouble() != 7 {
		t.Errorf("n_total: %v", n)
	}
	if c.Metric("empty") != nil {
		t.Error("a family without samples was sent")
	}
	h := c.Metric("took").GetHistogram().GetDataPoints()
	if len(h) != 1 || !slices.Equal(h[0].BucketCounts, []uint64{1, 3, 1}) || !slices.Equal(h[0].ExplicitBounds, []float64{0.1, 1}) || h[0].GetSum() != 9.5 || h[0].Count != 5 || len(h[0].Attributes) != 1 {
		t.Errorf("took: %v", h)
	}
}

// FuzzParseHeaders: whatever is in the variable, no name is empty and no name
// has a separator in it.
func FuzzParseHeaders(f *testing.F) {
	f.Add("a=b,c=d%20e")
	f.Add("=,=x,a")
	f.Fuzz(func(t *testing.T, s string) {
		for k := range telemetry.ParseHeaders(s) {
			if k == "" || strings.ContainsAny(k, ",=") {
				t.Errorf("%q has the name %q", s, k)
			}
		}
	})
}
