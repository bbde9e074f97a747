// Package gateway answers for apps that speak only gRPC what is not gRPC:
// gRPC-Web, Connect, plain JSON, forms and queries, REST routes, WebSockets. It
// finds the method a path means, carries the messages there and back, and hands
// out the app's interface: OpenAPI, a page, reflection, clients. What the app's
// messages look like it knows from a FileDescriptorSet, which Reflect fetches
// from a running app.
//
// It must not know hosts, certificates or where an app runs: it is given what
// an m3o.API says and a way to the app.
package gateway

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"mime"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/dynamicpb"

	"github.com/m3o/m3o"
)

// Config is what New needs; its zero value is usable.
type Config struct {
	MaxMessage int          // bytes of a client's message, as it is sent and not compressed; 16 MB
	MaxAnswer  int          // bytes of an app's message; MaxMessage when 0
	Log        *slog.Logger // nil discards
}

// A Gateway is safe for concurrent use. Its ServeApp and ServePath answer one
// request each; they read schema files once and expect what a path holds never
// to change.
type Gateway struct {
	max       int
	maxAnswer int
	log       *slog.Logger
	schemas   schemas
}

// New makes a Gateway.
func New(cfg Config) *Gateway {
	g := &Gateway{max: cfg.MaxMessage, maxAnswer: cfg.MaxAnswer, log: cfg.Log}
	if g.max <= 0 {
		g.max = 16 << 20
	}
	if g.maxAnswer <= 0 {
		g.maxAnswer = g.max
	}
	if g.log == nil {
		g.log = slog.New(slog.DiscardHandler)
	}
	return g
}

// Match says whether r, sent to the host of an app that speaks gRPC, is for
// ServeApp: all that is not gRPC itself, and reflection the app does not have.
func (g *Gateway) Match(r *http.Request, api *m3o.API) bool {
	ct := r.Header.Get("Content-Type")
	if !strings.HasPrefix(ct, "application/grpc") || strings.HasPrefix(ct, "application/grpc-web") {
		return true
	}
	return strings.HasPrefix(r.URL.Path, reflectionPrefix) && g.reflects(api, r.URL.Path)
}

// ServeApp answers at an app's own host, where the path is
// /package.Service/Method, a route the schema declares, or /-/… for the app's
// interface. up carries HTTP/2 to the app.
func (g *Gateway) ServeApp(w http.ResponseWriter, r *http.Request, api *m3o.API, up http.RoundTripper) {
	g.serve(w, r, &target{api: api, path: r.URL.Path, find: func(s *set) (*method, error) { return s.byPath(api.App, r.URL.Path) }}, up)
}

// ServePath answers https://api.<domain>/<app>/<path>, where path names service
// and method as M3O did: any verb, any case, hyphens for word boundaries.
func (g *Gateway) ServePath(w http.ResponseWriter, r *http.Request, api *m3o.API, path string, up http.RoundTripper) {
	g.serve(w, r, &target{api: api, path: "/" + path, any: true, find: func(s *set) (*method, error) { return s.resolve(api.App, path) }}, up)
}

// target is what a request asks for.
type target struct {
	api  *m3o.API
	path string
	any  bool // any verb calls any method
	find func(*set) (*method, error)
}

// schema is the app's compiled schema; the error is a problem.
func (g *Gateway) schema(api *m3o.API) (*set, error) {
	if api.Schema == "" {
		return nil, &problem{http: http.StatusNotImplemented, grpc: codes.Unimplemented,
			detail: "app " + api.App + " has no schema, so JSON cannot be turned into its messages: register gRPC reflection in its server, then deploy again"}
	}
	s, err := g.schemas.load(api.Schema, api.Strict)
	if err != nil {
		g.log.Warn("schema is unreadable", "app", api.App, "file", api.Schema, "err", err)
		return nil, &problem{http: http.StatusServiceUnavailable, grpc: codes.Unavailable, detail: "the schema of app " + api.App + " cannot be read; deploy it again"}
	}
	return s, nil
}

func (g *Gateway) method(t *target) (*method, error) {
	s, err := g.schema(t.api)
	if err != nil {
		return nil, err
	}
	return t.find(s)
}

// serve tells the protocols apart.
func (g *Gateway) serve(w http.ResponseWriter, r *http.Request, t *target, up http.RoundTripper) {
	if cw := allowOrigin(w, r, t.api); cw == nil {
		return // a preflight, answered
	} else if w = cw; !t.any {
		switch {
		case strings.HasPrefix(r.URL.Path, ownPrefix):
			g.serveOwn(w, r, t.api)
			return
		case strings.HasPrefix(r.URL.Path, reflectionPrefix) && g.reflects(t.api, r.URL.Path):
			g.serveReflection(w, r, t.api)
			return
		}
	}
	ct := r.Header.Get("Content-Type")
	d, framed := dialectOf(ct)
	var err error
	switch {
	case isWebSocket(r):
		err = g.serveWebSocket(w, r, t, up)
	case framed && r.Method == http.MethodPost:
		path := t.path
		var m *method
		// Protobuf needs no schema; with one, short names work for it too.
		if m, err = g.method(t); err == nil {
			path = m.path
		} else if d.json || t.any {
			c := &framedCall{dialect: d, g: g, w: w, r: r}
			c.finish(nil, err)
			return
		}
		g.serveFramed(w, r, d, path, m, up)
		return
	case isConnectUnary(r):
		path := t.path
		if t.any {
			if m, err := g.method(t); err == nil {
				path = m.path
			}
		}
		g.serveUnary(w, r, path, func() (*method, error) { return g.method(t) }, up)
		return
	default:
		err = g.plain(w, r, t, up)
	}
	if err == nil {
		return
	}
	p := problemOf(err)
	p.text = !t.any && !speaksJSON(r)
	p.write(w, r, t.api.App)
}

// speaksJSON says that a client expects errors as JSON: it sent JSON, a form
// or nothing, or accepts JSON.
func speaksJSON(r *http.Request) bool {
	if r.Header.Get("Connect-Protocol-Version") != "" {
		return false
	}
	ct := mediaType(r.Header)
	return r.Header.Get("Content-Type") == "" || ct == "application/json" || strings.HasSuffix(ct, "+json") || ct == "text/plain" || ct == "application/x-www-form-urlencoded" ||
		ct == "multipart/form-data" || strings.Contains(r.Header.Get("Accept"), "json")
}

// plain answers JSON, forms and queries without a protocol around them.
func (g *Gateway) plain(w http.ResponseWriter, r *http.Request, t *target, up http.RoundTripper) error {
	s, err := g.schema(t.api)
	if err != nil {
		return err
	}
	c := &plainCall{g: g, w: w, r: r}
	if c.m = s.methods[t.path]; c.m == nil && !t.any {
		// A route of the app's own choice goes before the names we understand.
		if c.b, c.vals, err = s.route(r.Method, r.URL.EscapedPath()); err != nil {
			return err
		}
	}
	if c.b != nil {
		c.m = c.b.m
	} else {
		if c.m == nil {
			if c.m, err = t.find(s); err != nil {
				return err
			}
		}
		if !t.any && r.Method != http.MethodPost && (r.Method != http.MethodGet && r.Method != http.MethodHead || !c.m.safe) {
			return &problem{http: http.StatusMethodNotAllowed, grpc: codes.Unimplemented, detail: r.Method + " does not call " + c.m.path + ": use POST"}
		}
	}
	if c.m.desc.IsStreamingClient() {
		return &problem{http: http.StatusNotImplemented, grpc: codes.Unimplemented,
			detail: c.m.path + " takes a stream of messages: open a WebSocket at this address, or call it with a client of gRPC or Connect"}
	}
	return c.call(up)
}

// plainCall is a call by plain HTTP.
type plainCall struct {
	g    *Gateway
	w    http.ResponseWriter
	r    *http.Request
	m    *method
	b    *binding // the route that was taken, nil for none
	vals []string // of its variables
}

// call sends one message and answers with what comes back. An error it returns
// was not yet told to the client.
func (c *plainCall) call(up http.RoundTripper) error {
	g, w, r, m := c.g, c.w, c.r, c.m
	var msg []byte
	var err error
	if c.b != nil {
		msg, err = c.b.input(g, w, r, c.vals)
	} else {
		msg, err = g.input(w, r, m)
	}
	if err != nil {
		return err
	}
	md, err := metadata(r.Header)
	if err != nil {
		return err
	}
	if err := setTimeout(md, r.Header); err != nil {
		return err
	}
	ctx, end := g.context(w, r, false)
	s, err := open(ctx, up, outgoing{path: m.path, host: r.Host, md: md, framed: msg}, g.maxAnswer)
	defer end(s)
	if err == nil {
		err = s.begin()
	}
	if err != nil {
		return deadline(ctx, err)
	}
	h := w.Header()
	s.copyMetadata(h)
	if m.desc.IsStreamingServer() {
		return deadline(ctx, withTypes(c.stream(s), m))
	}
	reply, err := s.only()
	if err != nil {
		clear(h)
		return deadline(ctx, withTypes(err, m))
	}
	s.copyTrailers(h)
	if c.raw(reply) {
		return nil
	}
	body, err := m.out.toJSON(make([]byte, 0, 2*len(reply)+64), reply)
	if err == nil {
		body, err = c.b.part(body)
	}
	if err != nil {
		clear(h)
		return err
	}
	h.Set("Content-Type", "application/json")
	h.Set("Content-Length", strconv.Itoa(len(body)))
	w.WriteHeader(http.StatusOK)
	if r.Method != http.MethodHead {
		_, _ = w.Write(body) // the client is gone: nobody left to tell
	}
	return nil
}

// raw answers with the bytes of a google.api.HttpBody; false when the answer
// is none.
func (c *plainCall) raw(reply []byte) bool {
	md := c.m.desc.Output()
	if c.b != nil && c.b.answer != "" {
		return false
	}
	if !isHTTPBody(md) {
		return false
	}
	msg := dynamicpb.NewMessage(md)
	if proto.Unmarshal(reply, msg) != nil {
		return false
	}
	ct := msg.Get(md.Fields().ByName("content_type")).String()
	body := msg.Get(md.Fields().ByName("data")).Bytes()
	h := c.w.Header()
	h.Set("Content-Type", cmp.Or(strings.ToValidUTF8(strings.NewReplacer("\r", "", "\n", "").Replace(ct), ""), "application/octet-stream"))
	h.Set("Content-Length", strconv.Itoa(len(body)))
	h.Set("X-Content-Type-Options", "nosniff")
	c.w.WriteHeader(http.StatusOK)
	if c.r.Method != http.MethodHead {
		_, _ = c.w.Write(body) // the client is gone: nobody left to tell
	}
	return true
}

// withTypes lets err tell its details by the schema of m.
func withTypes(err error, m *method) error {
	if p, ok := errors.AsType[*problem](err); ok {
		p.types = m.types
	}
	return err
}

// message is a body that is all there.
type message struct {
	bytes.Reader
	all []byte
}

func newBody(b []byte) io.ReadCloser {
	m := &message{all: b}
	m.Reset(b)
	return m
}

// Bytes lets who sends it take it without reading.
func (m *message) Bytes() []byte { return m.all }

func (m *message) Close() error { return nil }

// stream answers a server stream: newline-delimited JSON objects, each
// {"result":…} or at the end {"error":…}, or server-sent events for who
// accepts those. Every message is flushed.
func (c *plainCall) stream(s *stream) error {
	w, r, m := c.w, c.r, c.m
	h := w.Header()
	sse := strings.Contains(r.Header.Get("Accept"), "text/event-stream")
	begun := false
	begin := func() {
		begun = true
		h.Set("Content-Type", "application/x-ndjson")
		if sse {
			h.Set("Content-Type", "text/event-stream")
		}
		h.Set("Cache-Control", "no-store")
		h.Set("X-Accel-Buffering", "no")
		w.WriteHeader(http.StatusOK)
	}
	rc := http.NewResponseController(w)
	send := func(event, key string, body []byte) error {
		line := make([]byte, 0, len(body)+32)
		if sse {
			if event != "" {
				line = append(append(append(line, "event: "...), event...), '\n')
			}
			line = append(append(append(line, "data: "...), body...), "\n\n"...)
		} else {
			line = append(append(append(append(append(line, `{"`...), key...), `":`...), body...), "}\n"...)
		}
		if _, err := w.Write(line); err != nil {
			return err
		}
		return rc.Flush()
	}
	for {
		msg, err := s.next()
		if errors.Is(err, io.EOF) {
			if err = s.end(); err == nil {
				if !begun {
					begin()
				}
				return nil
			}
		}
		var body []byte
		if err == nil {
			if body, err = m.out.toJSON(nil, msg); err == nil {
				body, err = c.b.part(body)
			}
		}
		if err != nil {
			if !begun {
				clear(h)
				return err
			}
			_ = send("error", "error", problemOf(deadline(r.Context(), err)).json("")) // the client is gone
			return nil
		}
		if !begun {
			begin()
		}
		if err := send("", "result", body); err != nil {
			return nil // the client is gone
		}
	}
}

// clockSlack is how far the app's clock for a deadline may be ahead of ours.
const clockSlack = 50 * time.Millisecond

// deadline names a timeout by its name. The app counts down as well, and may
// reset the stream a moment before ctx ends.
func deadline(ctx context.Context, err error) error {
	if err == nil {
		return nil
	}
	dl, ok := ctx.Deadline()
	if p, broken := errors.AsType[*problem](err); broken && p.err == nil {
		ok = false // the app's own answer
	}
	if ok && time.Until(dl) < clockSlack || errors.Is(err, context.DeadlineExceeded) {
		return &problem{http: http.StatusGatewayTimeout, grpc: codes.DeadlineExceeded, detail: "the deadline of the call has passed"}
	}
	if errors.Is(err, context.Canceled) {
		return &problem{http: statusClientClosed, grpc: codes.Canceled, detail: "the caller cancelled the call"}
	}
	return err
}

// timeout is the time a client gives its call, by grpc-timeout or
// connect-timeout-ms.
func timeout(h http.Header) (time.Duration, bool) {
	const most = 365 * 24 * time.Hour
	digits, unit := h.Get("Connect-Timeout-Ms"), time.Millisecond
	if v := h.Get("Grpc-Timeout"); len(v) > 1 && len(v) <= 9 {
		units := map[byte]time.Duration{'H': time.Hour, 'M': time.Minute, 'S': time.Second, 'm': time.Millisecond, 'u': time.Microsecond, 'n': 1}
		digits, unit = v[:len(v)-1], units[v[len(v)-1]]
	}
	n, err := strconv.ParseUint(digits, 10, 40)
	if err != nil || unit == 0 {
		return 0, false
	}
	if time.Duration(n) > most/unit {
		return most, true
	}
	return time.Duration(n) * unit, true
}

// setTimeout tells the app the time that Connect's header gives.
func setTimeout(md, h http.Header) error {
	v := h.Get("Connect-Timeout-Ms")
	if v == "" {
		return nil
	}
	n, err := strconv.ParseUint(v, 10, 64)
	if err != nil || len(v) > 10 {
		return invalid("connect-timeout-ms %.20q is no number of at most ten digits", v)
	}
	unit := "m"
	if n > 99_999_999 { // all the digits gRPC has
		n, unit = n/1000, "S"
	}
	md["Grpc-Timeout"] = []string{strconv.FormatUint(n, 10) + unit}
	return nil
}

// metadata is what of the client's headers the app gets: all but those about
// the connection, the body and gRPC itself. Grpc-Metadata-Foo is passed as foo.
func metadata(in http.Header) (http.Header, error) {
	out := make(http.Header, len(in))
	var named []string
	for _, v := range in["Connection"] {
		for n := range strings.SplitSeq(v, ",") {
			named = append(named, http.CanonicalHeaderKey(strings.TrimSpace(n)))
		}
	}
	for k, vs := range in {
		switch k {
		case "Connection", "Keep-Alive", "Proxy-Connection", "Proxy-Authorization", "Transfer-Encoding", "Te", "Trailer", "Upgrade", "Expect", "Host",
			"Content-Type", "Content-Length", "Content-Encoding", "Accept", "Accept-Encoding", "Connect-Timeout-Ms", "Connect-Protocol-Version":
			continue
		}
		if slices.Contains(named, k) {
			continue
		}
		if strings.HasPrefix(k, "Grpc-") {
			name, ok := strings.CutPrefix(k, "Grpc-Metadata-")
			if !ok && k != "Grpc-Timeout" {
				continue
			}
			if ok {
				k = http.CanonicalHeaderKey(name)
			}
		}
		if strings.HasSuffix(k, "-Bin") {
			for _, v := range vs {
				if !validBin(v) {
					return nil, invalid("header %s is not base64, which metadata ending in -bin must be", k)
				}
			}
		}
		if old := out[k]; old != nil {
			vs = slices.Concat(old, vs)
		}
		out[k] = vs
	}
	return out, nil
}

// looksLikeJSON says that b begins as an object does.
func looksLikeJSON(b []byte) bool {
	for _, c := range b {
		switch c {
		case ' ', '\t', '\r', '\n':
			continue
		}
		return c == '{'
	}
	return false
}

// mediaType is the type of a Content-Type header, "" when there is none or it
// makes no sense.
func mediaType(h http.Header) string {
	switch t := h.Get("Content-Type"); t {
	case "", "application/json", "application/proto", "application/x-www-form-urlencoded", "text/plain":
		return t // nothing to parse
	}
	t, _, err := mime.ParseMediaType(h.Get("Content-Type"))
	if err != nil {
		return ""
	}
	return t
}

func invalid(format string, args ...any) error {
	return &problem{http: http.StatusBadRequest, grpc: codes.InvalidArgument, detail: fmt.Sprintf(format, args...)}
}

// unreachable turns an error of the way to the app into a problem.
func unreachable(err error) error {
	p := &problem{http: http.StatusServiceUnavailable, grpc: codes.Unavailable, detail: "the app cannot be reached", err: err}
	if e, ok := errors.AsType[*m3o.Error](err); ok {
		p.detail = e.Msg
		if e.Hint != "" {
			p.detail += " (" + e.Hint + ")"
		}
	}
	return p
}
