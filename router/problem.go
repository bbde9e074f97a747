package router

import (
	"encoding/binary"
	"encoding/json"
	"fmt"
	"html"
	"mime"
	"net/http"
	"strings"

	"github.com/m3o/m3o"
)

// The gRPC status codes the router itself answers with.
const (
	grpcCancelled       = 1
	grpcUnknown         = 2
	grpcInvalid         = 3
	grpcDeadline        = 4
	grpcDenied          = 7
	grpcExhausted       = 8
	grpcUnimplemented   = 12
	grpcInternal        = 13
	grpcUnavailable     = 14
	grpcDataLoss        = 15
	grpcUnauthenticated = 16
)

// problem is an answer the router gives in an app's stead.
type problem struct {
	code   int // HTTP
	grpc   int
	app    string
	msg    string
	hint   string
	header http.Header // set beside the body
}

// problemOf turns an error of ours into an answer.
func problemOf(err error, app string) problem {
	p := problem{code: http.StatusBadGateway, grpc: grpcUnavailable, app: app, msg: err.Error(), hint: m3o.HintOf(err)}
	switch m3o.KindOf(err) {
	case m3o.Unavailable:
		p.code = http.StatusServiceUnavailable
	case m3o.Invalid:
		p.code, p.grpc = http.StatusBadRequest, grpcInvalid
	case m3o.NotFound:
		p.code, p.grpc = http.StatusNotFound, grpcUnimplemented
	}
	return p
}

func isGRPC(r *http.Request) bool {
	ct := r.Header["Content-Type"]
	if len(ct) == 0 || !strings.HasPrefix(ct[0], "application/grpc") {
		return false
	}
	rest := ct[0][len("application/grpc"):]
	return rest == "" || rest[0] == '+' || rest[0] == ';'
}

func wantsJSON(r *http.Request) bool {
	for _, k := range []string{"Accept", "Content-Type"} {
		for v := range strings.SplitSeq(r.Header.Get(k), ",") {
			t, _, err := mime.ParseMediaType(v)
			if err == nil && (t == "application/json" || strings.HasSuffix(t, "+json") || t == "application/x-ndjson") {
				return true
			}
		}
	}
	return false
}

// connectCodes names the codes above as the Connect protocol does,
// https://connectrpc.com/docs/protocol#error-codes.
var connectCodes = map[int]string{
	grpcCancelled: "canceled", grpcInvalid: "invalid_argument", grpcDeadline: "deadline_exceeded", grpcDenied: "permission_denied",
	grpcExhausted: "resource_exhausted", grpcUnimplemented: "unimplemented", grpcInternal: "internal", grpcUnavailable: "unavailable",
	grpcUnauthenticated: "unauthenticated",
}

// connect is the answer to a client of the Connect protocol: an error object,
// and for a stream that object as its last message.
func (p problem) connect(r *http.Request, text string) (contentType string, code int, body []byte) {
	// Two plain fields cannot fail to marshal.
	object, _ := json.Marshal(struct {
		Code    string `json:"code"`
		Message string `json:"message"`
	}{connectCodes[p.grpc], text})
	ct := r.Header.Get("Content-Type")
	if !strings.HasPrefix(ct, "application/connect+") {
		return "application/json", p.code, object
	}
	end := append(append([]byte(`{"error":`), object...), '}')
	const endOfStream = 2
	body = binary.BigEndian.AppendUint32([]byte{endOfStream}, uint32(len(end)))
	return ct, http.StatusOK, append(body, end...)
}

func isConnect(r *http.Request) bool {
	return r.Header.Get("Connect-Protocol-Version") != "" || strings.HasPrefix(r.Header.Get("Content-Type"), "application/connect+")
}

// write answers in the form the client asked in: trailers for gRPC, an error
// object for Connect, the four-field object for JSON, a page for a browser,
// else plain text.
func (p problem) write(w http.ResponseWriter, r *http.Request) {
	h := w.Header()
	clear(h)
	for k, v := range p.header {
		h[k] = v
	}
	id := r.Header.Get("X-Request-Id")
	if id != "" {
		h["X-Request-Id"] = []string{id}
	}
	text := p.msg
	if p.hint != "" {
		text += " (" + p.hint + ")"
	}
	if isGRPC(r) {
		h["Content-Type"] = []string{"application/grpc"}
		h["Grpc-Status"] = []string{fmt.Sprint(p.grpc)}
		h["Grpc-Message"] = []string{encodeGRPCMessage(text)}
		w.WriteHeader(http.StatusOK)
		return
	}
	h["X-Content-Type-Options"] = []string{"nosniff"}
	h["Cache-Control"] = []string{"no-store"}
	if p.code == http.StatusServiceUnavailable {
		h["Retry-After"] = []string{"1"}
	}
	code := p.code
	var body []byte
	switch {
	case isConnect(r):
		var ct string
		ct, code, body = p.connect(r, text)
		h["Content-Type"] = []string{ct}
	case wantsJSON(r):
		h["Content-Type"] = []string{"application/json"}
		id := p.app
		if id == "" {
			id = "m3o"
		}
		// Four plain fields cannot fail to marshal.
		body, _ = json.Marshal(struct {
			ID     string `json:"id"`
			Code   int    `json:"code"`
			Detail string `json:"detail"`
			Status string `json:"status"`
		}{id, p.code, text, http.StatusText(p.code)})
	case strings.Contains(r.Header.Get("Accept"), "text/html"):
		h["Content-Type"] = []string{"text/html; charset=utf-8"}
		body = fmt.Appendf(nil, page, p.code, html.EscapeString(http.StatusText(p.code)), html.EscapeString(p.msg), html.EscapeString(p.hint), html.EscapeString(id))
	default:
		h["Content-Type"] = []string{"text/plain; charset=utf-8"}
		body = []byte(p.msg)
		if p.hint != "" {
			body = append(append(body, '\n'), p.hint...)
		}
	}
	if !isConnect(r) {
		body = append(body, '\n')
	}
	h["Content-Length"] = []string{fmt.Sprint(len(body))}
	w.WriteHeader(code)
	if r.Method != http.MethodHead {
		_, _ = w.Write(body) // the client is gone: nobody left to tell
	}
}

const page = `<!doctype html>
<meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>%[1]d %[2]s</title>
<style>body{font:16px/1.5 system-ui,sans-serif;max-width:36em;margin:12vh auto;padding:0 1em}code{background:#8881;padding:.1em .4em}</style>
<h1>%[1]d %[2]s</h1>
<p>%[3]s</p>
<p><code>%[4]s</code></p>
<p><small>request %[5]s</small></p>`

// encodeGRPCMessage percent-encodes as the gRPC over HTTP/2 spec says.
func encodeGRPCMessage(s string) string {
	var b strings.Builder
	for i := range len(s) {
		if c := s[i]; c >= ' ' && c <= '~' && c != '%' {
			b.WriteByte(c)
		} else {
			fmt.Fprintf(&b, "%%%02X", c)
		}
	}
	return b.String()
}
