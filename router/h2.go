package router

import (
	"context"
	"errors"
	"io"
	"net"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"time"

	"golang.org/x/net/http2"

	"github.com/m3o/m3o"
	"github.com/m3o/m3o/internal/h2client"
)

// newH2 is the HTTP/2 client of one endpoint: it multiplexes over as few
// connections as the app's stream limit allows.
func newH2(e *endpoint, lim *limits) *h2client.Client {
	return h2client.New(h2client.Config{
		Dial:      func(ctx context.Context) (net.Conn, error) { return e.dial(ctx, lim.Dial) },
		MaxHeader: lim.Header, IdleTimeout: lim.Idle, WriteTimeout: lim.BodyIdle,
	})
}

// deadlineSlack is how much later than the app the router enforces a call's
// deadline.
const deadlineSlack = 250 * time.Millisecond

// errCut ends a call whose release is gone.
var errCut = errors.New("the release was replaced")

// relayH2 relays over HTTP/2: gRPC, and whatever else an h2c app serves. It
// must not use httputil.ReverseProxy, which hangs when the app's trailers come
// before the client has closed its body (golang/go#80085).
func (q *request) relayH2() {
	r, w := q.r, q.w
	grpc := isGRPC(r)
	parent := r.Context()
	if d, ok := grpcTimeout(r.Header.Get("Grpc-Timeout")); grpc && ok {
		// The app's own answer to a deadline is better than ours: leave it a moment.
		var stop context.CancelFunc
		parent, stop = context.WithTimeout(parent, d+deadlineSlack)
		defer stop()
	}
	ctx, cancel := context.WithCancelCause(parent)
	var res *http.Response
	defer func() {
		// Closing the answer waits for the goroutine that sends the request's
		// body, which may wait for the client (golang/go#48908): cancel first.
		cancel(nil)
		if res != nil {
			_ = res.Body.Close()
		}
	}()
	if r.ContentLength != 0 {
		q.duplex()
	}
	q.claim(r.Header)
	out := (&http.Request{
		Method: r.Method, Host: r.Host, Header: outHeader(r.Header), Trailer: r.Trailer,
		URL:   &url.URL{Scheme: "http", Path: r.URL.Path, RawPath: r.URL.RawPath, RawQuery: r.URL.RawQuery},
		Proto: "HTTP/2.0", ProtoMajor: 2, ContentLength: r.ContentLength,
	}).WithContext(ctx)
	for {
		q.call.onCut(func() { cancel(errCut) })
		out.URL.Host = q.call.ep.urlHost()
		if r.ContentLength != 0 {
			out.Body = q.body
		}
		var err error
		res, err = q.call.ep.h2.RoundTrip(out)
		if err == nil {
			break
		}
		if isDial(err) && q.next(err) {
			continue
		}
		q.failH2(ctx, err)
		return
	}
	h := w.Header()
	for k, v := range res.Header {
		h[k] = v
	}
	for _, k := range [...]string{"Connection", "Keep-Alive", "Proxy-Connection", "Transfer-Encoding", "Upgrade"} {
		delete(h, k)
	}
	for _, k := range [...]string{"Content-Type", "Date"} {
		if _, ok := h[k]; !ok {
			h[k] = nil
		}
	}
	if len(res.Trailer) > 0 && r.ProtoMajor == 1 {
		delete(h, "Content-Length") // HTTP/1.1 has trailers only after chunks
		for k := range res.Trailer {
			h["Trailer"] = append(h["Trailer"], k)
		}
	}
	w.WriteHeader(res.StatusCode)
	flush := func() {}
	// A flush before the end of an answer without a body would make an empty
	// DATA frame of it, which gRPC clients refuse (golang/go#56317).
	if f, ok := w.(http.Flusher); ok && res.ContentLength < 0 {
		more, _ := res.Body.(interface{ Ready() bool })
		flush = func() {
			if more == nil || !more.Ready() { // else what follows goes along
				f.Flush()
			}
		}
	}
	flush()
	buf := buffers.Get().(*[]byte)
	defer buffers.Put(buf)
	for {
		n, err := res.Body.Read(*buf)
		if n > 0 {
			if _, werr := w.Write((*buf)[:n]); werr != nil {
				return // the client is gone
			}
			flush()
		}
		if errors.Is(err, io.EOF) {
			break
		}
		if err == nil {
			continue
		}
		if !grpc || q.clientGone() {
			if q.call.isCut() && strings.HasPrefix(h.Get("Content-Type"), "text/event-stream") {
				return
			}
			q.brokeOff(err)
		}
		// gRPC has a place to say what happened.
		code, msg := q.grpcFailure(ctx, err)
		q.failed("stream broke off", err)
		h[http.TrailerPrefix+"Grpc-Status"] = []string{strconv.Itoa(code)}
		h[http.TrailerPrefix+"Grpc-Message"] = []string{encodeGRPCMessage(msg)}
		return
	}
	for k, v := range res.Trailer {
		h[http.TrailerPrefix+k] = v
	}
}

// urlHost is what the :authority falls back to and connections are pooled by;
// a socket's path is no host.
func (e *endpoint) urlHost() string {
	if e.network == "unix" {
		return "unix"
	}
	return e.address
}

// outHeader is the client's header as HTTP/2 passes it on.
func outHeader(in http.Header) http.Header {
	out := make(http.Header, len(in)+4)
	named := connectionNames(in["Connection"])
	for k, v := range in {
		switch k {
		case "Connection", "Keep-Alive", "Proxy-Connection", "Proxy-Authorization", "Transfer-Encoding", "Upgrade", "Http2-Settings", "Expect", "Content-Length", "Host":
			continue
		case "Te": // all HTTP/2 allows, and what gRPC servers insist on
			if strings.Contains(strings.ToLower(strings.Join(v, ",")), "trailers") {
				out[k] = []string{"trailers"}
			}
			continue
		}
		if named != nil && contains(named, k) {
			continue
		}
		out[k] = v
	}
	if _, ok := out["User-Agent"]; !ok {
		out["User-Agent"] = nil // or net/http would add its own
	}
	return out
}

// failH2 answers a request whose answer has not begun.
func (q *request) failH2(ctx context.Context, err error) {
	if q.clientGone() {
		panic(http.ErrAbortHandler) // nobody listens
	}
	if isDial(err) {
		q.deny(err)
		return
	}
	code, msg := q.grpcFailure(ctx, err)
	q.failed("request failed", err)
	p := problem{code: http.StatusBadGateway, grpc: code, app: q.host.App, msg: msg}
	switch code {
	case grpcDeadline:
		p.code = http.StatusGatewayTimeout
	case grpcUnavailable:
		if q.call.isCut() {
			p.code = http.StatusServiceUnavailable
		}
	}
	p.write(q.w, q.r)
}

// grpcFailure names a transport failure in gRPC's words, after the table
// "HTTP2 errors" of the gRPC over HTTP/2 spec.
func (q *request) grpcFailure(ctx context.Context, err error) (int, string) {
	if errors.Is(context.Cause(ctx), errCut) || errors.Is(err, h2client.ErrCut) {
		return grpcUnavailable, "app " + q.host.App + " was replaced while it worked on this call"
	}
	if errors.Is(ctx.Err(), context.DeadlineExceeded) {
		return grpcDeadline, "deadline exceeded"
	}
	var se http2.StreamError
	if errors.As(err, &se) {
		msg := "app " + q.host.App + " reset the stream: " + se.Code.String()
		switch se.Code {
		case http2.ErrCodeCancel:
			// How a gRPC server ends a call whose deadline has passed.
			if dl, ok := ctx.Deadline(); ok && time.Until(dl) < deadlineSlack+50*time.Millisecond {
				return grpcDeadline, "deadline exceeded"
			}
			return grpcCancelled, msg
		case http2.ErrCodeRefusedStream:
			return grpcUnavailable, msg
		case http2.ErrCodeEnhanceYourCalm:
			return grpcExhausted, msg
		case http2.ErrCodeInadequateSecurity:
			return grpcDenied, msg
		}
		return grpcInternal, msg
	}
	return grpcUnavailable, "app " + q.host.App + " broke off"
}

// grpcTimeout parses a grpc-timeout header: at most eight digits and a unit.
func grpcTimeout(s string) (time.Duration, bool) {
	if len(s) < 2 || len(s) > 9 {
		return 0, false
	}
	n, err := strconv.ParseUint(s[:len(s)-1], 10, 32)
	if err != nil {
		return 0, false
	}
	var unit time.Duration
	switch s[len(s)-1] {
	case 'H':
		unit = time.Hour
	case 'M':
		unit = time.Minute
	case 'S':
		unit = time.Second
	case 'm':
		unit = time.Millisecond
	case 'u':
		unit = time.Microsecond
	case 'n':
		unit = time.Nanosecond
	default:
		return 0, false
	}
	if time.Duration(n) > maxTimeout/unit {
		return maxTimeout, true
	}
	return time.Duration(n) * unit, true
}

const maxTimeout = 365 * 24 * time.Hour

// gatewayWay is the http.RoundTripper a Gateway gets: HTTP/2 to the endpoints
// of one request's app, counted in flight until the request ends.
type gatewayWay struct{ q *request }

// cutContext ends with the client's request, and is cut with the endpoint.
type cutContext struct {
	context.Context
	cut <-chan struct{}
}

// Cut is what package h2client asks for.
func (c cutContext) Cut() <-chan struct{} { return c.cut }

// RoundTrip sends out to an endpoint, to another one when the first cannot be
// dialled and out.GetBody is there. Its errors are of kind Unavailable.
func (g gatewayWay) RoundTrip(out *http.Request) (*http.Response, error) {
	q := g.q
	ctx, cancel := out.Context(), func() {}
	upgraded := upgradeTo(q.r) != ""
	if out.ContentLength < 0 && q.body != nil && q.r.ProtoMajor == 1 {
		q.rec.body = q.body // sent as it comes
	}
	if q.traced != nil && q.traced.sent.IsZero() {
		q.traced.sent = time.Now()
	}
	for {
		var with context.Context = cutContext{ctx, q.call.ep.cut}
		if upgraded {
			// No server waits for a connection that was taken over: it is cut apart from the others.
			cctx, cut := context.WithCancelCause(ctx)
			with, cancel = cctx, func() { cut(nil) }
			q.call.upgrade(func() { cut(errCut) })
		}
		res, err := q.call.ep.h2.RoundTrip(out.WithContext(with))
		if err == nil {
			q.noteCall(out.URL.Path, res.Header)
			res.Body = &wayBody{ReadCloser: res.Body, q: q, ctx: with, cancel: cancel, res: res}
			return res, nil
		}
		if isDial(err) && out.GetBody != nil && q.next(err) {
			if body, berr := out.GetBody(); berr == nil {
				cancel()
				out.Body = body
				continue
			}
		}
		err = q.wayError(with, err)
		cancel()
		return nil, err
	}
}

func (q *request) wayError(ctx context.Context, err error) error {
	switch cause := context.Cause(ctx); {
	case errors.Is(cause, errCut):
		err = cause // what it was before would look like the caller's own doing
	case cause != nil:
		return cause // the caller's own doing
	}
	q.failed("call failed", err)
	if isDial(err) {
		return q.unreachable(err)
	}
	_, msg := q.grpcFailure(ctx, err)
	return &m3o.Error{Kind: m3o.Unavailable, Msg: msg, Hint: "m3o logs -a " + q.host.App, Err: err}
}

// wayBody gives errors a kind.
type wayBody struct {
	io.ReadCloser
	q      *request
	ctx    context.Context
	cancel func()
	res    *http.Response
}

func (b *wayBody) Read(p []byte) (int, error) {
	n, err := b.ReadCloser.Read(p)
	if errors.Is(err, io.EOF) {
		b.q.noteEnd(b.res.Trailer)
	}
	if err != nil && !errors.Is(err, io.EOF) {
		err = b.q.wayError(b.ctx, err)
	}
	return n, err
}

func (b *wayBody) Close() error {
	b.cancel()
	return b.ReadCloser.Close()
}
