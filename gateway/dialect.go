package gateway

import (
	"bytes"
	"encoding/base64"
	"io"
	"net/http"
	"slices"
	"strconv"
	"strings"

	"google.golang.org/grpc/codes"
)

// A dialect is a way to say a gRPC call over HTTP whose messages are framed as
// gRPC's are: gRPC-Web, its base64 form, and Connect's streams.
type dialect struct {
	connect bool
	text    bool // gRPC-Web in base64
	json    bool // messages are JSON
}

// dialectOf finds the dialect of a Content-Type; false when it is none, or has
// a codec other than protobuf and JSON.
func dialectOf(ct string) (d dialect, ok bool) {
	ct, _, _ = strings.Cut(ct, ";")
	ct = strings.ToLower(strings.TrimSpace(ct))
	var sub string
	switch {
	case strings.HasPrefix(ct, "application/grpc-web-text"):
		d.text, sub = true, ct[len("application/grpc-web-text"):]
	case strings.HasPrefix(ct, "application/grpc-web"):
		sub = ct[len("application/grpc-web"):]
	case strings.HasPrefix(ct, "application/connect+"):
		d.connect, sub = true, ct[len("application/connect"):]
	default:
		return d, false
	}
	switch sub {
	case "":
	case "+proto":
	case "+json":
		d.json = true
	default:
		return d, false
	}
	return d, true
}

func (d dialect) contentType() string {
	codec := "proto"
	if d.json {
		codec = "json"
	}
	switch {
	case d.connect:
		return "application/connect+" + codec
	case d.text:
		return "application/grpc-web-text+" + codec
	}
	return "application/grpc-web+" + codec
}

// headers of the encodings: of the message, and those the other side takes.
func (d dialect) encodingHeaders() (used, accepted string) {
	if d.connect {
		return "Connect-Content-Encoding", "Connect-Accept-Encoding"
	}
	return "Grpc-Encoding", "Grpc-Accept-Encoding"
}

// encodingOf is the encoding a header names, "" for identity.
func encodingOf(v string) string {
	if v = strings.ToLower(strings.TrimSpace(v)); v == "identity" {
		return ""
	}
	return v
}

func acceptsGzip(v string) bool {
	for part := range strings.SplitSeq(v, ",") {
		name, q, _ := strings.Cut(strings.TrimSpace(part), ";")
		if strings.EqualFold(strings.TrimSpace(name), "gzip") && !strings.Contains(q, "q=0") {
			return true
		}
	}
	return false
}

// call answers a call in dialect d.
type framedCall struct {
	dialect
	g     *Gateway
	w     http.ResponseWriter
	r     *http.Request
	m     *method // nil: bytes pass as they are
	begun bool    // the head of the answer is settled
	wrote bool    // and out
	track tracker // of what was sent
	zips  bool    // the client takes gzip
	// hold keeps the answer back while the client still sends: HTTP/1.1 has no
	// reading beside writing. net/http's way to allow it loses a byte of the
	// connection's next request now and then if another goroutine reads.
	hold *requestBody
	held []byte
}

// serveFramed answers a call in a framed dialect. m is nil when the app has no
// schema, which only JSON needs.
func (g *Gateway) serveFramed(w http.ResponseWriter, r *http.Request, d dialect, path string, m *method, up http.RoundTripper) {
	c := &framedCall{dialect: d, g: g, w: w, r: r, m: m}
	if err := c.relay(path, up); err != nil {
		c.finish(nil, err)
	}
}

// relay sends the client's messages to the app and the app's back. An error it
// returns was not yet told to the client.
func (c *framedCall) relay(path string, up http.RoundTripper) error {
	md, err := metadata(c.r.Header)
	if err != nil {
		return err
	}
	if err := setTimeout(md, c.r.Header); err != nil {
		return err
	}
	used, accepted := c.encodingHeaders()
	enc := encodingOf(c.r.Header.Get(used))
	c.zips = acceptsGzip(c.r.Header.Get(accepted))
	body := &requestBody{of: c.r, src: c.r.Body, most: c.g.max, zip: enc}
	// Where the client sends one message, all of it is read first: then another
	// instance can be tried, and HTTP/1.1 needs no reading while it is answered.
	streams := c.m == nil || c.m.desc.IsStreamingClient()
	if !streams {
		b, err := readBody(c.w, c.r, c.g.max+prefixLen)
		if err != nil {
			return err
		}
		body.src = bytes.NewReader(b)
	}
	if c.text {
		body.src = &base64Reader{src: body.src}
	}
	if c.json {
		if enc != "" && enc != "gzip" {
			return &problem{http: http.StatusUnsupportedMediaType, grpc: codes.Unimplemented, detail: "messages in encoding " + strconv.Quote(enc) + " are not understood: use gzip or identity"}
		}
		body.turn = c.toWire
	} else {
		delete(md, "Connect-Content-Encoding")
		delete(md, "Connect-Accept-Encoding")
		if enc != "" {
			md["Grpc-Encoding"] = []string{enc}
		}
		if v := c.r.Header[accepted]; v != nil {
			md["Grpc-Accept-Encoding"] = v
		}
	}
	if streams && c.r.ProtoMajor == 1 {
		c.hold = body
	}
	ctx, end := c.g.context(c.w, c.r, streams)
	length := int64(-1)
	if b, ok := body.src.(*bytes.Reader); ok && !c.json {
		length = b.Size()
	}
	s, err := open(ctx, up, outgoing{path: path, host: c.r.Host, md: md, body: body, length: length}, c.g.maxAnswer)
	defer end(s)
	if err == nil {
		err = s.begin()
	}
	if err != nil {
		return deadline(ctx, or(body.fault(), err))
	}
	if !s.trailersOnly() {
		c.begin(s)
	}
	err = c.messages(s)
	if fault := body.fault(); fault != nil {
		err = fault
	}
	if err != nil {
		err = deadline(ctx, err)
	} else {
		err = s.end()
	}
	c.finish(s, err)
	return nil
}

func or(a, b error) error {
	if a != nil {
		return a
	}
	return b
}

// toWire turns one JSON message of the client into a frame for the app.
func (c *framedCall) toWire(flags byte, msg []byte) ([]byte, error) {
	if flags&flagCompressed != 0 {
		var err error
		if msg, err = gunzip(msg, c.g.max); err != nil {
			return nil, unzipError(err, c.g.max)
		}
	}
	if len(msg) == 0 {
		return nil, invalid("%s: an empty message is no JSON", c.m.desc.Input().FullName())
	}
	out, err := c.m.in.toWire(make([]byte, prefixLen, prefixLen+len(msg)), msg)
	if err != nil {
		return nil, err
	}
	appendFrame(out[:0], 0, out[prefixLen:])
	return out, nil
}

// begin sends the head of the answer.
func (c *framedCall) begin(s *stream) {
	c.begun = true
	h := c.w.Header()
	h.Set("Content-Type", c.contentType())
	used, accepted := c.encodingHeaders()
	if s != nil {
		copyMetadata(h, s.res.Header, "")
		h.Set("Content-Type", c.contentType())
		if c.json {
			if c.zips {
				h.Set(used, "gzip")
			}
			h.Set(accepted, "gzip")
		} else {
			for from, to := range map[string]string{"Grpc-Encoding": used, "Grpc-Accept-Encoding": accepted} {
				if v := s.res.Header[from]; v != nil {
					h[to] = v
				}
			}
		}
	}
	if c.r.ProtoMajor == 1 {
		h.Set("X-Accel-Buffering", "no")
	}
	if s != nil && s.res.ContentLength < 0 {
		_ = c.write(nil, true) // what is wrong with w, the next write tells
	}
}

// write sends b, or keeps it while the client is not ready for it.
func (c *framedCall) write(b []byte, flush bool) error {
	if c.hold != nil && !c.hold.ended.Load() {
		if len(c.held)+len(b) > c.g.maxAnswer+c.g.max {
			return &problem{http: http.StatusBadGateway, grpc: codes.ResourceExhausted, detail: "the app answers before the client has sent all, which HTTP/1.1 cannot carry: use HTTP/2"}
		}
		c.held = append(c.held, b...)
		return nil
	}
	if !c.wrote {
		c.wrote = true
		c.w.WriteHeader(http.StatusOK)
	}
	if c.held != nil {
		b = append(c.held, b...)
		c.held, c.hold = nil, nil
	}
	if len(b) > 0 {
		if _, err := c.w.Write(b); err != nil {
			return err
		}
	}
	if flush {
		c.flush()
	}
	return nil
}

func (c *framedCall) flush() {
	_ = http.NewResponseController(c.w).Flush() // a client that is gone is seen by the next write
}

// messages passes the app's messages on.
func (c *framedCall) messages(s *stream) error {
	if c.json {
		for {
			msg, err := s.next()
			if err == io.EOF {
				return nil
			}
			if err != nil {
				return err
			}
			out, err := c.m.out.toJSON(nil, msg)
			if err != nil {
				return err
			}
			var flags byte
			if c.zips {
				out, flags = gz(out), flagCompressed
			}
			if err := c.send(appendFrame(nil, flags, out)); err != nil {
				return err
			}
		}
	}
	buf := buffers.Get().(*[]byte)
	defer buffers.Put(buf)
	for {
		n, err := s.res.Body.Read(*buf)
		if n > 0 {
			if err := c.track.pass((*buf)[:n], func(flags byte, n uint32) error { return s.checkFrame(flags, n) }); err != nil {
				return err
			}
			if err := c.send((*buf)[:n]); err != nil {
				return err
			}
		}
		switch {
		case err == io.EOF && !c.track.whole():
			return brokeOff(io.ErrUnexpectedEOF)
		case err == io.EOF:
			return nil
		case err != nil:
			return brokeOff(err)
		}
	}
}

// send writes b, which need not be whole frames, and flushes.
func (c *framedCall) send(b []byte) error {
	if c.text {
		b = base64.StdEncoding.AppendEncode(nil, b)
	}
	return c.write(b, true)
}

// finish says how the call ended: err, or well when it is nil. s is nil when
// the app was not reached.
func (c *framedCall) finish(s *stream, err error) {
	if !c.track.whole() {
		// Whatever came now would be taken for the rest of a message.
		panic(http.ErrAbortHandler)
	}
	var p *problem
	if err != nil {
		p = problemOf(err)
	}
	var trailer http.Header
	if s != nil {
		trailer = s.trailer()
	}
	only := s != nil && s.trailersOnly()
	if !c.begun {
		if c.connect && s == nil && p != nil && p.http == http.StatusUnsupportedMediaType && p.grpc != codes.Unimplemented {
			p.write(c.w, c.r, "")
			return
		}
		clear(c.w.Header())
		c.begin(nil)
	}
	var frame []byte
	if c.connect {
		frame = appendFrame(nil, flagEndStream, endStream(p, trailer, c.types()))
	} else {
		frame = appendFrame(nil, flagTrailers, webTrailers(p, trailer, only))
	}
	if c.text {
		frame = base64.StdEncoding.AppendEncode(nil, frame)
	}
	c.hold = nil              // whatever the client still sends, nobody reads
	_ = c.write(frame, false) // the client is gone: nobody left to tell
}

// webTrailers are the last frame of gRPC-Web: names in lower case.
func webTrailers(p *problem, trailer http.Header, only bool) []byte {
	var b []byte
	line := func(k, v string) {
		b = append(append(append(append(b, k...), ": "...), v...), "\r\n"...)
	}
	line("grpc-status", strconv.Itoa(int(p.code())))
	if p != nil {
		if p.detail != "" {
			line("grpc-message", encodeMessage(p.detail))
		}
		if p.status != nil {
			line("grpc-status-details-bin", base64.RawStdEncoding.EncodeToString(p.status))
		}
	}
	keys := make([]string, 0, len(trailer))
	for k := range trailer {
		if !hopByHop(k) && !strings.HasPrefix(k, "Grpc-") {
			keys = append(keys, k)
		}
	}
	slices.Sort(keys)
	for _, k := range keys {
		for _, v := range trailer[k] {
			line(strings.ToLower(k), v)
		}
	}
	return b
}

// base64Reader decodes gRPC-Web's text form: chunks of base64, each of which
// may be padded.
type base64Reader struct {
	src io.Reader
	in  []byte // fewer than four characters
	out []byte
	err error
	buf [4096]byte
}

func (b *base64Reader) Read(p []byte) (int, error) {
	for len(b.out) == 0 {
		if b.err != nil {
			return 0, b.err
		}
		n, err := b.src.Read(b.buf[:])
		for _, c := range b.buf[:n] {
			if c == '\r' || c == '\n' {
				continue
			}
			b.in = append(b.in, c)
			if len(b.in) < 4 {
				continue
			}
			var tmp [3]byte
			m, derr := base64.StdEncoding.Decode(tmp[:], b.in)
			if derr != nil {
				b.err = invalid("the body is not base64")
				break
			}
			b.out = append(b.out, tmp[:m]...)
			b.in = b.in[:0]
		}
		if b.err == nil && err != nil {
			if b.err = err; err == io.EOF && len(b.in) > 0 {
				b.err = invalid("the body is not base64")
			}
		}
	}
	n := copy(p, b.out)
	b.out = b.out[n:]
	return n, nil
}
