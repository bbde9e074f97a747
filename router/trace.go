package router

import (
	"strings"
	"time"

	"github.com/m3o/m3o/telemetry"
)

// traced is what is known of a request whose spans are sent: the router's own,
// that of the gateway where it answers, and that of the call to the instance,
// which is the parent of what the app makes of it.
type traced struct {
	trace                  telemetry.TraceID
	parent, server, client telemetry.SpanID
	gateway                time.Time // when the gateway began, zero when it was not asked
	sent                   time.Time // when an instance was asked
}

// follow decides whether the request's spans are sent. That a client has a
// trace of its own counts only for those who are trusted: anybody could have
// every request traced.
func (q *request) follow() {
	t := q.rt.cfg.Traces
	if t == nil {
		return
	}
	id, parent, sampled := telemetry.ParseParent(q.origin.trace)
	if !t.Sampled(id) && (!sampled || !q.inside && !q.rt.trusts(peerIP(q.r.RemoteAddr))) {
		return
	}
	x := &traced{trace: id, server: telemetry.NewSpanID(), client: telemetry.NewSpanID()}
	if !q.origin.newTrace {
		x.parent = parent
	}
	q.origin.trace = telemetry.Parent(id, x.client)
	q.traced = x
}

func peerIP(remote string) string {
	if i := strings.LastIndexByte(remote, ':'); i >= 0 {
		return strings.Trim(remote[:i], "[]")
	}
	return remote
}

// spans sends what became of the request.
func (q *request) spans(x *Record) {
	t := q.traced
	end := x.Time.Add(x.Took)
	name := strings.TrimPrefix(x.RPC, "/")
	attrs := []telemetry.Attr{telemetry.String("m3o.app", x.App), telemetry.Int("m3o.release", x.Release), telemetry.String("m3o.protocol", x.Protocol)}
	if name == "" {
		name = x.Method
	} else {
		attrs = append(attrs, telemetry.String("rpc.system", "grpc"), telemetry.String("rpc.method", name), telemetry.Int("rpc.grpc.status_code", x.Code))
	}
	failed, why := x.Failed(), x.Err
	span := func(id, parent telemetry.SpanID, name string, kind telemetry.Kind, begin time.Time, more ...telemetry.Attr) telemetry.Span {
		return telemetry.Span{Trace: t.trace, ID: id, Parent: parent, Name: name, Kind: kind, Begin: begin, End: end, Attrs: append(more, attrs...), Failed: failed, Why: why}
	}
	all := []telemetry.Span{span(t.server, t.parent, name, telemetry.Server, x.Time, telemetry.String("http.request.method", x.Method), telemetry.String("url.path", x.Path),
		telemetry.String("server.address", x.Host), telemetry.Int("http.response.status_code", x.Status), telemetry.String("client.address", x.Remote),
		telemetry.String("m3o.caller", x.Caller), telemetry.String("m3o.request_id", x.ID))}
	above := t.server
	if !t.gateway.IsZero() {
		above = telemetry.NewSpanID()
		all = append(all, span(above, t.server, "gateway", telemetry.Internal, t.gateway))
	}
	if !t.sent.IsZero() && x.Endpoint != "" {
		all = append(all, span(t.client, above, name, telemetry.Client, t.sent, telemetry.String("server.address", x.Endpoint)))
	}
	q.rt.cfg.Traces.Add(all...)
}
