// Package telemetry sends spans and metrics to an OpenTelemetry collector by
// OTLP/HTTP in protobuf. Spans are made by who knows them whole, at their end,
// and are queued: sending never waits, and what there is no room for is
// dropped and counted.
//
// It must not know what an app, a request or a deploy is.
package telemetry

import (
	"bytes"
	"compress/gzip"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"sync/atomic"
	"time"

	collectormetrics "go.opentelemetry.io/proto/otlp/collector/metrics/v1"
	collectortrace "go.opentelemetry.io/proto/otlp/collector/trace/v1"
	metricspb "go.opentelemetry.io/proto/otlp/metrics/v1"
	resourcepb "go.opentelemetry.io/proto/otlp/resource/v1"
	tracepb "go.opentelemetry.io/proto/otlp/trace/v1"
	"google.golang.org/protobuf/proto"

	"github.com/m3o/m3o"
)

// Config says where to send and as whom.
type Config struct {
	Endpoint string            // base URL: http://127.0.0.1:4318; /v1/traces and /v1/metrics are below it
	Headers  map[string]string // sent with everything; may hold secrets
	Sample   float64           // of traces that begin here, 0 to 1
	Service  string            // service.name
	Version  string            // service.version
	Log      *slog.Logger
}

const (
	maxQueue   = 4096 // spans
	maxBatch   = 512
	batchTime  = 2 * time.Second
	sendTime   = 10 * time.Second
	lastTime   = 3 * time.Second // for what is left when Run ends
	tries      = 3
	maxRefusal = 4 << 10
)

// Validate checks the endpoint and the sample.
func (c Config) Validate() error {
	u, err := url.Parse(c.Endpoint)
	if err != nil || u.Host == "" || u.Scheme != "http" && u.Scheme != "https" {
		return &m3o.Error{Kind: m3o.Invalid, Msg: fmt.Sprintf("%q is no http:// or https:// URL of an OTLP/HTTP collector", c.Endpoint), Hint: "such as http://127.0.0.1:4318"}
	}
	if c.Sample < 0 || c.Sample > 1 {
		return m3o.Errorf(m3o.Invalid, "a sample of %v is not between 0 and 1", c.Sample)
	}
	return nil
}

// ParseHeaders reads headers as OTEL_EXPORTER_OTLP_HEADERS has them: key=value,
// by commas, values percent-encoded.
func ParseHeaders(s string) map[string]string {
	h := map[string]string{}
	for kv := range strings.SplitSeq(s, ",") {
		k, v, ok := strings.Cut(kv, "=")
		if k = strings.TrimSpace(k); !ok || k == "" {
			continue
		}
		v = strings.TrimSpace(v)
		if d, err := url.PathUnescape(v); err == nil {
			v = d
		}
		h[k] = v
	}
	return h
}

// A Sender sends. Its methods are safe for concurrent use.
type Sender struct {
	cfg      Config
	resource *resourcepb.Resource
	queue    chan Span
	full     chan struct{} // gets a token when there is a batch
	dropped  atomic.Int64
	bound    uint64
	client   *http.Client
}

// New checks cfg. Nothing is sent before Run.
func New(cfg Config) (*Sender, error) {
	if err := cfg.Validate(); err != nil {
		return nil, err
	}
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	return &Sender{cfg: cfg, queue: make(chan Span, maxQueue), full: make(chan struct{}, 1), bound: uint64(cfg.Sample * (1 << 63)),
		client:   &http.Client{Timeout: sendTime, CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }},
		resource: &resourcepb.Resource{Attributes: attributes([]Attr{String("service.name", cfg.Service), String("service.version", cfg.Version)})}}, nil
}

// Sampled is whether a trace that begins here is to be sent. All who have the
// same Sample decide alike.
func (s *Sender) Sampled(t TraceID) bool {
	var n uint64
	for _, b := range t[8:] {
		n = n<<8 | uint64(b)
	}
	return n>>1 < s.bound
}

// Add queues spans that have ended.
func (s *Sender) Add(spans ...Span) {
	for _, sp := range spans {
		select {
		case s.queue <- sp:
		default:
			s.dropped.Add(1)
		}
	}
	if len(s.queue) >= maxBatch {
		select {
		case s.full <- struct{}{}:
		default:
		}
	}
}

// Run sends until ctx ends, and then what is left.
func (s *Sender) Run(ctx context.Context) error {
	tick := time.NewTicker(batchTime)
	defer tick.Stop()
	// What is being sent when ctx ends has as long as what is left.
	sending, cancel := context.WithCancel(context.WithoutCancel(ctx))
	defer cancel()
	defer context.AfterFunc(ctx, func() {
		select {
		case <-sending.Done():
		case <-time.After(lastTime):
			cancel()
		}
	})()
	for {
		select {
		case <-ctx.Done():
			for s.flush(sending) {
			}
			return nil
		case <-tick.C:
		case <-s.full:
		}
		for s.flush(sending) && len(s.queue) >= maxBatch {
		}
	}
}

// flush sends one batch; false when there was none, or it could not be sent.
func (s *Sender) flush(ctx context.Context) bool {
	var batch []*tracepb.Span
	for len(batch) < maxBatch {
		select {
		case sp := <-s.queue:
			batch = append(batch, sp.encode())
			continue
		default:
		}
		break
	}
	if len(batch) == 0 {
		return false
	}
	err := s.send(ctx, "/v1/traces", &collectortrace.ExportTraceServiceRequest{ResourceSpans: []*tracepb.ResourceSpans{{Resource: s.resource,
		ScopeSpans: []*tracepb.ScopeSpans{{Spans: batch}}}}})
	if err != nil {
		s.dropped.Add(int64(len(batch)))
		s.cfg.Log.Warn("spans are not taken", "spans", len(batch), "err", err)
	}
	return err == nil
}

// Dropped counts the spans that were not sent.
func (s *Sender) Dropped() int64 { return s.dropped.Load() }

// Metrics sends families as they are at a time.
func (s *Sender) Metrics(ctx context.Context, at time.Time, families []Family) error {
	return s.send(ctx, "/v1/metrics", &collectormetrics.ExportMetricsServiceRequest{ResourceMetrics: []*metricspb.ResourceMetrics{{Resource: s.resource,
		ScopeMetrics: []*metricspb.ScopeMetrics{{Metrics: encodeFamilies(at, families)}}}}})
}

// send posts m, again when the collector asks for it.
func (s *Sender) send(ctx context.Context, path string, m proto.Message) error {
	raw, err := proto.Marshal(m)
	if err != nil {
		return fmt.Errorf("encode: %w", err)
	}
	var body bytes.Buffer
	z := gzip.NewWriter(&body)
	_, _ = z.Write(raw) // into memory
	_ = z.Close()
	pause := 500 * time.Millisecond
	for try := 1; ; try++ {
		again, err := s.post(ctx, path, body.Bytes())
		if err == nil {
			return nil
		}
		if try == tries || again < 0 {
			return err
		}
		select {
		case <-ctx.Done():
			return errors.Join(err, ctx.Err())
		case <-time.After(max(again, time.Duration(float64(pause)*(0.5+rand.Float64())))): //nolint:gosec // spread, not secret
		}
		pause *= 2
	}
}

// post sends once. again is negative when that would be refused again.
func (s *Sender) post(ctx context.Context, path string, body []byte) (again time.Duration, err error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, strings.TrimSuffix(s.cfg.Endpoint, "/")+path, bytes.NewReader(body))
	if err != nil {
		return -1, fmt.Errorf("ask collector: %w", err)
	}
	for k, v := range s.cfg.Headers {
		req.Header.Set(k, v)
	}
	req.Header.Set("Content-Type", "application/x-protobuf")
	req.Header.Set("Content-Encoding", "gzip")
	res, err := s.client.Do(req)
	if err != nil {
		return 0, fmt.Errorf("ask collector: %w", err)
	}
	defer res.Body.Close() //nolint:errcheck // read to the end or given up
	_, _ = io.Copy(io.Discard, io.LimitReader(res.Body, maxRefusal))
	if res.StatusCode/100 == 2 {
		return 0, nil
	}
	err = fmt.Errorf("the collector answered %s", res.Status)
	switch res.StatusCode {
	case http.StatusTooManyRequests, http.StatusBadGateway, http.StatusServiceUnavailable, http.StatusGatewayTimeout:
		n, _ := strconv.Atoi(res.Header.Get("Retry-After"))
		return min(time.Duration(max(n, 0))*time.Second, sendTime), err
	}
	return -1, err
}
