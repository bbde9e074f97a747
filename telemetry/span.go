package telemetry

import (
	"encoding/hex"
	"math/rand/v2"
	"time"

	commonpb "go.opentelemetry.io/proto/otlp/common/v1"
	tracepb "go.opentelemetry.io/proto/otlp/trace/v1"
)

// TraceID and SpanID are W3C's. The zero one is none.
type (
	TraceID [16]byte
	SpanID  [8]byte
)

// NewTraceID makes one. Ids tell traces apart; nothing is guarded by their
// being secret.
func NewTraceID() (t TraceID) {
	a, b := NewSpanID(), NewSpanID()
	copy(t[:], a[:])
	copy(t[8:], b[:])
	return t
}

// NewSpanID makes one.
func NewSpanID() (s SpanID) {
	n := rand.Uint64() | 1 //nolint:gosec // see NewTraceID
	for i := range s {
		s[i] = byte(n >> (8 * i))
	}
	return s
}

// ParseParent reads a valid W3C traceparent.
func ParseParent(tp string) (t TraceID, s SpanID, sampled bool) {
	if len(tp) < 55 {
		return t, s, false
	}
	_, _ = hex.Decode(t[:], []byte(tp[3:35]))
	_, _ = hex.Decode(s[:], []byte(tp[36:52]))
	var flags [1]byte
	_, _ = hex.Decode(flags[:], []byte(tp[53:55]))
	return t, s, flags[0]&1 == 1
}

// Parent is the W3C traceparent for what a sampled span calls.
func Parent(t TraceID, s SpanID) string {
	var b [55]byte
	copy(b[:], "00-")
	hex.Encode(b[3:], t[:])
	b[35] = '-'
	hex.Encode(b[36:], s[:])
	copy(b[52:], "-01")
	return string(b[:])
}

// Kind is what a span is to others.
type Kind int32

// The kinds of spans.
const (
	Internal = Kind(tracepb.Span_SPAN_KIND_INTERNAL)
	Server   = Kind(tracepb.Span_SPAN_KIND_SERVER)
	Client   = Kind(tracepb.Span_SPAN_KIND_CLIENT)
)

// A Span is one that has ended.
type Span struct {
	Trace      TraceID
	ID, Parent SpanID
	Name       string
	Kind       Kind
	Begin, End time.Time
	Attrs      []Attr
	Failed     bool
	Why        string // when it failed; no secrets
}

// An Attr is one attribute: a string, or a number.
type Attr struct {
	key, text string
	n         int64
	number    bool
}

// String is a text.
func String(key, v string) Attr { return Attr{key: key, text: v} }

// Int is a number.
func Int(key string, v int) Attr { return Attr{key: key, n: int64(v), number: true} }

func attributes(as []Attr) []*commonpb.KeyValue {
	out := make([]*commonpb.KeyValue, 0, len(as))
	for _, a := range as {
		v := &commonpb.AnyValue{Value: &commonpb.AnyValue_StringValue{StringValue: a.text}}
		switch {
		case a.number:
			v = &commonpb.AnyValue{Value: &commonpb.AnyValue_IntValue{IntValue: a.n}}
		case a.text == "":
			continue // nothing to tell
		}
		out = append(out, &commonpb.KeyValue{Key: a.key, Value: v})
	}
	return out
}

func (s *Span) encode() *tracepb.Span {
	out := &tracepb.Span{TraceId: s.Trace[:], SpanId: s.ID[:], Name: s.Name, Kind: tracepb.Span_SpanKind(s.Kind),
		StartTimeUnixNano: uint64(s.Begin.UnixNano()), EndTimeUnixNano: uint64(max(s.End.UnixNano(), s.Begin.UnixNano())), Attributes: attributes(s.Attrs)}
	if s.Parent != (SpanID{}) {
		out.ParentSpanId = s.Parent[:]
	}
	if s.Failed {
		out.Status = &tracepb.Status{Code: tracepb.Status_STATUS_CODE_ERROR, Message: s.Why}
	}
	return out
}
