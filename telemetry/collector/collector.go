// Package collector is an OTLP/HTTP collector for tests: it decodes what it is
// sent and keeps it.
package collector

import (
	"compress/gzip"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"sync"
	"testing"

	collectormetrics "go.opentelemetry.io/proto/otlp/collector/metrics/v1"
	collectortrace "go.opentelemetry.io/proto/otlp/collector/trace/v1"
	commonpb "go.opentelemetry.io/proto/otlp/common/v1"
	metricspb "go.opentelemetry.io/proto/otlp/metrics/v1"
	tracepb "go.opentelemetry.io/proto/otlp/trace/v1"
	"google.golang.org/protobuf/proto"
)

// A Span is one as it came, its attributes as texts.
type Span struct {
	Service, Name     string
	Trace, ID, Parent string
	Kind              tracepb.Span_SpanKind
	Attrs             map[string]string
	Failed            bool
	Raw               *tracepb.Span
}

// A Collector keeps what came. The zero Refuse refuses nothing.
type Collector struct {
	URL string

	mu      sync.Mutex // guards below
	spans   []Span
	metrics map[string]*metricspb.Metric
	heads   []http.Header
	bytes   []byte
	refuse  int
}

// New starts one that ends with the test.
func New(t testing.TB) *Collector {
	t.Helper()
	c := &Collector{metrics: map[string]*metricspb.Metric{}}
	srv := httptest.NewServer(c)
	t.Cleanup(srv.Close)
	c.URL = srv.URL
	return c
}

// Refuse answers the next n requests with 503.
func (c *Collector) Refuse(n int) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.refuse = n
}

// ServeHTTP implements http.Handler.
func (c *Collector) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.refuse > 0 {
		c.refuse--
		http.Error(w, "busy", http.StatusServiceUnavailable)
		return
	}
	if err := c.take(r); err != nil {
		http.Error(w, err.Error(), http.StatusBadRequest)
	}
}

func (c *Collector) take(r *http.Request) error {
	if ct := r.Header.Get("Content-Type"); ct != "application/x-protobuf" || r.Method != http.MethodPost {
		return fmt.Errorf("%s of %q", r.Method, ct)
	}
	z, err := gzip.NewReader(r.Body)
	if err != nil {
		return err
	}
	b, err := io.ReadAll(z)
	if err != nil {
		return err
	}
	c.heads, c.bytes = append(c.heads, r.Header), append(c.bytes, b...)
	switch r.URL.Path {
	case "/v1/traces":
		var m collectortrace.ExportTraceServiceRequest
		if err := proto.Unmarshal(b, &m); err != nil {
			return err
		}
		for _, rs := range m.ResourceSpans {
			service := texts(rs.Resource.Attributes)["service.name"]
			for _, ss := range rs.ScopeSpans {
				for _, s := range ss.Spans {
					c.spans = append(c.spans, Span{Service: service, Name: s.Name, Trace: fmt.Sprintf("%x", s.TraceId), ID: fmt.Sprintf("%x", s.SpanId),
						Parent: fmt.Sprintf("%x", s.ParentSpanId), Kind: s.Kind, Attrs: texts(s.Attributes), Failed: s.Status.GetCode() == tracepb.Status_STATUS_CODE_ERROR, Raw: s})
				}
			}
		}
	case "/v1/metrics":
		var m collectormetrics.ExportMetricsServiceRequest
		if err := proto.Unmarshal(b, &m); err != nil {
			return err
		}
		for _, rm := range m.ResourceMetrics {
			for _, sm := range rm.ScopeMetrics {
				for _, x := range sm.Metrics {
					c.metrics[x.Name] = x
				}
			}
		}
	default:
		return fmt.Errorf("nothing is at %s", r.URL.Path)
	}
	return nil
}

func texts(kvs []*commonpb.KeyValue) map[string]string {
	out := map[string]string{}
	for _, kv := range kvs {
		if v, ok := kv.Value.Value.(*commonpb.AnyValue_IntValue); ok {
			out[kv.Key] = fmt.Sprint(v.IntValue)
			continue
		}
		out[kv.Key] = kv.Value.GetStringValue()
	}
	return out
}

// Spans are those that came of a trace, "" for all.
func (c *Collector) Spans(trace string) []Span {
	c.mu.Lock()
	defer c.mu.Unlock()
	return slices.DeleteFunc(slices.Clone(c.spans), func(s Span) bool { return trace != "" && s.Trace != trace })
}

// Metric is one as it came last, nil when it did not.
func (c *Collector) Metric(name string) *metricspb.Metric {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.metrics[name]
}

// Headers are those of every request.
func (c *Collector) Headers() []http.Header {
	c.mu.Lock()
	defer c.mu.Unlock()
	return slices.Clone(c.heads)
}

// Holds is whether a text came, anywhere.
func (c *Collector) Holds(text string) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return strings.Contains(string(c.bytes), text)
}
