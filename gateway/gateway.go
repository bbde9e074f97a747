// Package gateway answers plain JSON for apps that speak only gRPC: it finds
// the method a path means, turns query, form or JSON into the request message,
// calls the app and turns the answer back. What the app's messages look like
// it knows from a FileDescriptorSet, which Reflect fetches from a running app.
//
// It must not know hosts, certificates, releases or where an app runs: it is
// given the app's name, the file of its schema and a way to it.
package gateway

import (
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

	"github.com/m3o/m3o"
)

// Config is what New needs; its zero value is usable.
type Config struct {
	MaxMessage int          // bytes of a message, either way, as JSON and on the wire; 16 MB
	Log        *slog.Logger // nil discards
}

// A Gateway is safe for concurrent use. Its ServeApp and ServePath answer one
// request each; they read schema files once and expect what a path holds never
// to change.
type Gateway struct {
	max     int
	log     *slog.Logger
	schemas schemas
}

// New makes a Gateway.
func New(cfg Config) *Gateway {
	g := &Gateway{max: cfg.MaxMessage, log: cfg.Log}
	if g.max <= 0 {
		g.max = 16 << 20
	}
	if g.log == nil {
		g.log = slog.New(slog.DiscardHandler)
	}
	return g
}

// Match says whether r, sent to the host of an app that speaks gRPC, is for
// ServeApp: all that is not gRPC itself. What the gateway does not speak yet
// (gRPC-Web, Connect's own streams) it answers with 415.
func (g *Gateway) Match(r *http.Request) bool {
	ct := r.Header.Get("Content-Type")
	return !strings.HasPrefix(ct, "application/grpc") || strings.HasPrefix(ct, "application/grpc-web")
}

// ServeApp answers a call at an app's own host, where the path is
// /package.Service/Method. POST sends JSON or a form; GET is for methods
// without side effects. schema is the file of the app's FileDescriptorSet, ""
// when it has none. up carries HTTP/2 to the app.
func (g *Gateway) ServeApp(w http.ResponseWriter, r *http.Request, app, schema string, up http.RoundTripper) {
	g.serve(w, r, app, schema, up, func(s *set) (*method, error) {
		m, err := s.byPath(app, r.URL.Path)
		if err != nil {
			return nil, err
		}
		if r.Method != http.MethodPost && (r.Method != http.MethodGet && r.Method != http.MethodHead || !m.safe) {
			return nil, &problem{http: http.StatusMethodNotAllowed, grpc: codes.Unimplemented, detail: r.Method + " does not call " + m.path + ": use POST"}
		}
		return m, nil
	})
}

// ServePath answers https://api.<domain>/<app>/<path>, where path names service
// and method as M3O did: any verb, any case, hyphens for word boundaries.
func (g *Gateway) ServePath(w http.ResponseWriter, r *http.Request, app, path, schema string, up http.RoundTripper) {
	g.serve(w, r, app, schema, up, func(s *set) (*method, error) { return s.resolve(app, path) })
}

func (g *Gateway) serve(w http.ResponseWriter, r *http.Request, app, file string, up http.RoundTripper, find func(*set) (*method, error)) {
	err := func() error {
		if file == "" {
			return &problem{http: http.StatusNotImplemented, grpc: codes.Unimplemented,
				detail: "app " + app + " has no schema, so JSON cannot be turned into its messages: register gRPC reflection in its server, then deploy again"}
		}
		s, err := g.schemas.load(file)
		if err != nil {
			g.log.Warn("schema is unreadable", "app", app, "file", file, "err", err)
			return &problem{http: http.StatusServiceUnavailable, grpc: codes.Unavailable, detail: "the schema of app " + app + " cannot be read; deploy it again"}
		}
		m, err := find(s)
		if err != nil {
			return err
		}
		if m.desc.IsStreamingClient() {
			return &problem{http: http.StatusNotImplemented, grpc: codes.Unimplemented,
				detail: m.path + " takes a stream of messages, which JSON over HTTP does not carry yet: call it with a gRPC client"}
		}
		return g.call(w, r, m, up)
	}()
	if err == nil || r.Context().Err() != nil {
		return
	}
	problemOf(err).write(w, r, app)
}

// call sends one message and answers with what comes back. An error it returns
// was not yet told to the client.
func (g *Gateway) call(w http.ResponseWriter, r *http.Request, m *method, up http.RoundTripper) error {
	msg, err := g.input(w, r, m)
	if err != nil {
		return err
	}
	md, err := metadata(r.Header)
	if err != nil {
		return err
	}
	ctx := r.Context()
	if d, ok := timeout(r.Header); ok {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, d)
		defer cancel()
	}
	s, err := open(ctx, up, m.path, r.Host, md, msg, g.max)
	if err != nil {
		return deadline(ctx, err)
	}
	defer s.close()
	h := w.Header()
	s.copyMetadata(h)
	if m.desc.IsStreamingServer() {
		return deadline(ctx, g.stream(w, r, m, s))
	}
	reply, err := s.only()
	if err != nil {
		clear(h)
		return deadline(ctx, err)
	}
	s.copyTrailers(h)
	body, err := m.out.toJSON(nil, reply)
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

// stream answers a server stream: newline-delimited JSON objects, each
// {"result":…} or at the end {"error":…}, or server-sent events for who
// accepts those. Every message is flushed.
func (g *Gateway) stream(w http.ResponseWriter, r *http.Request, m *method, s *stream) error {
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
			body, err = m.out.toJSON(nil, msg)
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
	return err
}

// timeout reads grpc-timeout, or connect-timeout-ms.
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
		out[k] = append(out[k], vs...)
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
