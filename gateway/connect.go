package gateway

import (
	"bytes"
	"encoding/base64"
	"encoding/json"
	"errors"
	"io"
	"net/http"
	"net/url"
	"strconv"
	"strings"

	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/types/dynamicpb"
	"google.golang.org/protobuf/types/known/anypb"
)

// isConnectUnary says that r is a unary call of the Connect protocol: a POST
// whose body is one message, or a GET with the message in its query. JSON
// counts only with the protocol's own header; without it, it is plain JSON.
func isConnectUnary(r *http.Request) bool {
	switch r.Method {
	case http.MethodGet:
		q := r.URL.RawQuery
		return strings.Contains(q, "connect=v1") || strings.Contains(q, "encoding=") && strings.Contains(q, "message=")
	case http.MethodPost:
		ct := mediaType(r.Header)
		return ct == "application/proto" || r.Header.Get("Connect-Protocol-Version") != "" && strings.HasPrefix(ct, "application/")
	}
	return false
}

// unaryCall is one unary call of Connect.
type unaryCall struct {
	g    *Gateway
	w    http.ResponseWriter
	r    *http.Request
	m    *method // nil when the app has no schema
	json bool
	enc  string // of the message
	msg  []byte
}

// serveUnary answers a unary call of Connect. find finds the method, which
// only JSON and GET need.
func (g *Gateway) serveUnary(w http.ResponseWriter, r *http.Request, path string, find func() (*method, error), up http.RoundTripper) {
	c := &unaryCall{g: g, w: w, r: r}
	if err := c.serve(path, find, up); err != nil {
		c.fail(problemOf(err), nil, nil)
	}
}

func (c *unaryCall) serve(path string, find func() (*method, error), up http.RoundTripper) error {
	if v := c.r.Header.Get("Connect-Protocol-Version"); v != "" && v != "1" {
		return invalid("connect-protocol-version %.20q is not understood: use 1", v)
	}
	codec := ""
	var err error
	if c.r.Method == http.MethodGet {
		codec, err = c.fromQuery()
	} else {
		codec, err = c.fromBody()
	}
	if err != nil {
		return err
	}
	switch codec {
	case "proto":
	case "json":
		c.json = true
	default:
		return &problem{http: http.StatusUnsupportedMediaType, grpc: codes.Unknown, detail: "messages in codec " + strconv.Quote(codec) + " are not understood: use proto or json", bare: true}
	}
	m, merr := find()
	if merr == nil {
		c.m, path = m, m.path
	}
	if c.json || c.r.Method == http.MethodGet {
		if merr != nil {
			return merr
		}
		if c.r.Method == http.MethodGet && !c.m.safe {
			return &problem{http: http.StatusMethodNotAllowed, grpc: codes.Unimplemented, detail: path + " may have side effects: use POST", bare: true}
		}
		if c.m.desc.IsStreamingClient() || c.m.desc.IsStreamingServer() {
			return &problem{http: http.StatusUnsupportedMediaType, grpc: codes.Unimplemented, detail: path + " is a stream: send application/connect+" + codec, bare: true}
		}
	}
	md, err := metadata(c.r.Header)
	if err != nil {
		return err
	}
	if err := setTimeout(md, c.r.Header); err != nil {
		return err
	}
	accept := strings.Join(c.r.Header["Accept-Encoding"], ",")
	zipped := c.enc != "" && !c.json
	if c.json {
		if c.msg, err = c.plain(); err != nil {
			return err
		}
		if c.msg, err = c.m.in.toWire(nil, c.msg); err != nil {
			return err
		}
	} else {
		if zipped {
			md["Grpc-Encoding"] = []string{c.enc}
		}
		if accept != "" {
			md["Grpc-Accept-Encoding"] = []string{accept}
		}
	}
	ctx, end := c.g.context(c.w, c.r, false)
	s, err := open(ctx, up, outgoing{path: path, host: c.r.Host, md: md, msg: c.msg, zipped: zipped}, c.g.maxAnswer)
	defer end(s)
	if err == nil {
		err = s.begin()
	}
	if err != nil {
		return c.unknown(deadline(ctx, err))
	}
	flags, reply, err := s.one()
	if err == nil && c.json {
		reply, err = c.m.out.toJSON(nil, reply)
	}
	if err != nil {
		c.fail(problemOf(c.unknown(deadline(ctx, err))), s.res.Header, s.trailer())
		return nil
	}
	h := c.w.Header()
	s.copyMetadata(h)
	s.copyTrailers(h)
	h.Set("Content-Type", "application/"+codec)
	switch {
	case c.json && acceptsGzip(accept) && len(reply) >= zipFrom:
		reply = gz(reply)
		h.Set("Content-Encoding", "gzip")
	case flags != 0:
		h.Set("Content-Encoding", encodingOf(s.res.Header.Get("Grpc-Encoding")))
	}
	h.Set("Accept-Encoding", "gzip")
	if c.r.Method == http.MethodGet {
		h.Add("Vary", "Accept-Encoding")
	}
	h.Set("Content-Length", strconv.Itoa(len(reply)))
	c.w.WriteHeader(http.StatusOK)
	_, _ = c.w.Write(reply) // the client is gone: nobody left to tell
	return nil
}

// unknown makes a 404 of an UNIMPLEMENTED that says there is no such method,
// rather than one that does nothing.
func (c *unaryCall) unknown(err error) error {
	if p, ok := errors.AsType[*problem](err); ok && p.grpc == codes.Unimplemented && c.m == nil {
		p.http, p.bare = http.StatusNotFound, true
	}
	return err
}

// zipFrom is the size from which compressing an answer pays.
const zipFrom = 1 << 10

func (c *unaryCall) fromBody() (codec string, err error) {
	if c.msg, err = readBody(c.w, c.r, c.g.max); err != nil {
		return "", err
	}
	c.enc = encodingOf(c.r.Header.Get("Content-Encoding"))
	ct := mediaType(c.r.Header)
	codec = strings.TrimPrefix(ct, "application/")
	if len(c.msg) == 0 {
		c.enc = "" // nothing is the same in every encoding
	}
	return codec, nil
}

func (c *unaryCall) fromQuery() (codec string, err error) {
	q, err := url.ParseQuery(c.r.URL.RawQuery)
	if err != nil {
		return "", invalid("the query is malformed")
	}
	if v := q.Get("connect"); v != "" && v != "v1" {
		return "", invalid("connect=%.20s is not understood: use v1", v)
	}
	if !q.Has("encoding") || !q.Has("message") {
		return "", invalid("a GET needs encoding and message in its query")
	}
	c.msg = []byte(q.Get("message"))
	if q.Get("base64") == "1" {
		if c.msg, err = base64Any(q.Get("message")); err != nil {
			return "", invalid("the message in the query is not base64")
		}
	}
	if len(c.msg) > c.g.max {
		return "", tooLarge(c.g.max)
	}
	c.enc = encodingOf(q.Get("compression"))
	return q.Get("encoding"), nil
}

// plain is the message without its compression.
func (c *unaryCall) plain() ([]byte, error) {
	switch c.enc {
	case "":
	case "gzip":
		out, err := gunzip(c.msg, c.g.max)
		if err != nil {
			return nil, unzipError(err, c.g.max)
		}
		return out, nil
	default:
		return nil, &problem{http: http.StatusUnsupportedMediaType, grpc: codes.Unimplemented, detail: "encoding " + strconv.Quote(c.enc) + " is not understood: use gzip or identity"}
	}
	if len(c.msg) == 0 && c.r.Method == http.MethodPost {
		return nil, invalid("the body is empty: send at least {}")
	}
	return c.msg, nil
}

func unzipError(err error, most int) error {
	if p := tooLarge(most); strings.Contains(err.Error(), errTooLarge.Error()) {
		return p
	}
	return invalid("a message is not gzip")
}

// fail answers with p.
func (c *unaryCall) fail(p *problem, head, trailer http.Header) {
	h := c.w.Header()
	clear(h)
	if head != nil {
		copyMetadata(h, head, "")
		if head.Get("Grpc-Status") == "" {
			copyMetadata(h, trailer, "Trailer-")
		}
	}
	if p.bare {
		if p.http == http.StatusUnsupportedMediaType {
			h.Set("Accept-Post", "application/json, application/proto, application/connect+json, application/connect+proto, application/grpc, application/grpc-web")
		}
		if p.http == http.StatusMethodNotAllowed {
			h.Set("Allow", http.MethodPost)
		}
	}
	var types *dynamicpb.Types
	if c.m != nil {
		types = c.m.types
	}
	body := connectError(p, types)
	h.Set("Content-Type", "application/json")
	h.Set("Content-Length", strconv.Itoa(len(body)))
	code := p.http
	if !p.bare {
		code = httpStatus(p.code())
	}
	c.w.WriteHeader(code)
	_, _ = c.w.Write(body) // the client is gone: nobody left to tell
}

// connectCodes names gRPC's codes as the Connect protocol does.
var connectCodes = [...]string{
	1: "canceled", 2: "unknown", 3: "invalid_argument", 4: "deadline_exceeded", 5: "not_found", 6: "already_exists", 7: "permission_denied",
	8: "resource_exhausted", 9: "failed_precondition", 10: "aborted", 11: "out_of_range", 12: "unimplemented", 13: "internal",
	14: "unavailable", 15: "data_loss", 16: "unauthenticated",
}

type connectDetail struct {
	Type  string          `json:"type"`
	Value string          `json:"value"`
	Debug json.RawMessage `json:"debug,omitempty"`
}

type connectFault struct {
	Code    string          `json:"code"`
	Message string          `json:"message,omitempty"`
	Details []connectDetail `json:"details,omitempty"`
}

func faultOf(p *problem, types *dynamicpb.Types) connectFault {
	f := connectFault{Code: "unknown", Message: p.detail}
	if n := int(p.code()); n > 0 && n < len(connectCodes) {
		f.Code = connectCodes[n]
	}
	for _, d := range p.details {
		f.Details = append(f.Details, connectDetail{
			Type:  d.TypeUrl[strings.LastIndexByte(d.TypeUrl, '/')+1:],
			Value: base64.RawStdEncoding.EncodeToString(d.Value),
			Debug: detailJSON(d, types),
		})
	}
	return f
}

// detailJSON is what an error detail says, nil when the schema does not know it.
func detailJSON(d *anypb.Any, types *dynamicpb.Types) json.RawMessage {
	if types == nil {
		return nil
	}
	mt, err := types.FindMessageByURL(d.TypeUrl)
	if err != nil {
		return nil
	}
	c := generic{desc: mt.Descriptor(), types: types}
	b, err := c.toJSON(nil, d.Value)
	if err != nil {
		return nil
	}
	return b
}

func connectError(p *problem, types *dynamicpb.Types) []byte {
	return marshal(faultOf(p, types))
}

// endStream is the last message of a Connect stream.
func endStream(p *problem, trailer http.Header, types *dynamicpb.Types) []byte {
	var end struct {
		Error    *connectFault       `json:"error,omitempty"`
		Metadata map[string][]string `json:"metadata,omitempty"`
	}
	if p != nil {
		f := faultOf(p, types)
		end.Error = &f
	}
	for k, vs := range trailer {
		if hopByHop(k) || strings.HasPrefix(k, "Grpc-") {
			continue
		}
		if end.Metadata == nil {
			end.Metadata = map[string][]string{}
		}
		end.Metadata[strings.ToLower(k)] = vs
	}
	return marshal(end)
}

// marshal is JSON of what cannot fail to be JSON, without HTML's escapes.
func marshal(v any) []byte {
	var buf bytes.Buffer
	enc := json.NewEncoder(&buf)
	enc.SetEscapeHTML(false)
	_ = enc.Encode(v) // strings and lists of them
	return bytes.TrimRight(buf.Bytes(), "\n")
}

func (c *framedCall) types() *dynamicpb.Types {
	if c.m == nil {
		return nil
	}
	return c.m.types
}

// readBody reads a whole body of at most most bytes.
func readBody(w http.ResponseWriter, r *http.Request, most int) ([]byte, error) {
	if r.ContentLength > int64(most) {
		spill(r, r.Body)
		return nil, tooLarge(most)
	}
	src := http.MaxBytesReader(w, r.Body, int64(most))
	if n := r.ContentLength; n >= 0 && n <= 64<<10 {
		b := make([]byte, n)
		if _, err := io.ReadFull(src, b); err != nil {
			return nil, bodyReadError(err, most)
		}
		return b, nil
	}
	b, err := io.ReadAll(src)
	if err != nil {
		if _, ok := errors.AsType[*http.MaxBytesError](err); ok {
			spill(r, r.Body)
		}
		return nil, bodyReadError(err, most)
	}
	return b, nil
}

// spillMost is what is read of a refused body for the sake of its sender.
const spillMost = 1 << 20

// spill reads off what a client may still be sending of a body that is refused.
// Over HTTP/1.1 a server that answers and closes at once resets the connection
// under it, and many clients then lose the answer.
func spill(r *http.Request, body io.Reader) {
	if r.ProtoMajor == 1 && r.Header.Get("Expect") == "" {
		_, _ = io.CopyN(io.Discard, body, spillMost)
	}
}
