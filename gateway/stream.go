package gateway

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"sync"
	"time"

	spb "google.golang.org/genproto/googleapis/rpc/status"
	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/proto"
)

var buffers = sync.Pool{New: func() any { b := make([]byte, 32<<10); return &b }}

// outgoing is a call to an app.
type outgoing struct {
	path, host string
	md         http.Header
	body       *requestBody // or
	framed     []byte       // or: one message behind room for its prefix
	msg        []byte       // or: one message
	zipped     bool         // msg is compressed as md says
	length     int64        // of body, -1 when unknown
}

// stream is one gRPC call under way.
type stream struct {
	res *http.Response
	max int
}

// open calls the app. Errors before any answer are problems.
func open(ctx context.Context, up http.RoundTripper, o outgoing, most int) (*stream, error) {
	md := o.md
	md["Content-Type"] = []string{"application/grpc"}
	md["Te"] = []string{"trailers"}
	if _, ok := md["User-Agent"]; !ok {
		md["User-Agent"] = []string{"m3o-gateway"}
	}
	req := &http.Request{
		Method: http.MethodPost, URL: &url.URL{Scheme: "http", Host: o.host, Path: o.path}, Host: o.host, Header: md,
		Proto: "HTTP/2.0", ProtoMajor: 2,
	}
	if o.body != nil {
		req.ContentLength, req.Body = o.length, o.body
		// Another instance may be tried as long as nothing was read.
		req.GetBody = func() (io.ReadCloser, error) {
			if o.body.read {
				return nil, errors.New("the body has been read")
			}
			return o.body, nil
		}
		if req.ContentLength == 0 {
			req.Body = http.NoBody
		}
	} else {
		var flags byte
		if o.zipped {
			flags = flagCompressed
		}
		body := o.framed
		if body == nil {
			body = append(make([]byte, prefixLen, prefixLen+len(o.msg)), o.msg...)
		}
		body[0] = flags
		binary.BigEndian.PutUint32(body[1:], uint32(len(body)-prefixLen))
		req.ContentLength = int64(len(body))
		req.GetBody = func() (io.ReadCloser, error) { return newBody(body), nil }
		req.Body = newBody(body)
	}
	res, err := up.RoundTrip(req.WithContext(ctx))
	if err != nil {
		if ctx.Err() != nil {
			return nil, ctx.Err()
		}
		return nil, unreachable(err)
	}
	return &stream{res: res, max: most}, nil
}

// begin refuses what is no gRPC answer.
func (s *stream) begin() error {
	if code := s.res.StatusCode; code != http.StatusOK {
		g := codeOfHTTP(code)
		p := &problem{http: http.StatusBadGateway, grpc: g, detail: fmt.Sprintf("the app answered HTTP %d, not gRPC", code)}
		if g != codes.Unknown && g != codes.Internal {
			p.http = httpStatus(g)
		}
		return p
	}
	ct := s.res.Header.Get("Content-Type")
	if ct != "application/grpc" && !strings.HasPrefix(ct, "application/grpc+") && !strings.HasPrefix(ct, "application/grpc;") {
		return &problem{http: http.StatusBadGateway, grpc: codes.Unknown, detail: fmt.Sprintf("the app answered %.80q, not gRPC", ct)}
	}
	return nil
}

func (s *stream) close() { _ = s.res.Body.Close() } // the answer is read or given up

// trailersOnly says that the head of the answer is its end too.
func (s *stream) trailersOnly() bool { return s.res.Header.Get("Grpc-Status") != "" }

// trailer is the trailing metadata, complete once the messages are read.
func (s *stream) trailer() http.Header {
	if s.trailersOnly() {
		return s.res.Header
	}
	return s.res.Trailer
}

// frame is the next message as it came; io.EOF after the last, when end has
// the status.
func (s *stream) frame() (flags byte, msg []byte, err error) {
	flags, msg, err = readFrame(s.res.Body, s.max)
	switch {
	case errors.Is(err, io.EOF):
		return 0, nil, io.EOF
	case errors.Is(err, errTooLarge):
		return 0, nil, &problem{http: http.StatusBadGateway, grpc: codes.ResourceExhausted, detail: fmt.Sprintf("the app's answer is larger than %d bytes", s.max)}
	case err != nil:
		return 0, nil, brokeOff(err)
	}
	return flags, msg, s.checkFrame(flags, uint32(len(msg)))
}

func (s *stream) checkFrame(flags byte, n uint32) error {
	switch {
	case flags&^flagCompressed != 0:
		return &problem{http: http.StatusBadGateway, grpc: codes.Internal, detail: fmt.Sprintf("the app sent a message with the unknown flags %d", flags)}
	case flags != 0 && encodingOf(s.res.Header.Get("Grpc-Encoding")) == "":
		return &problem{http: http.StatusBadGateway, grpc: codes.Internal, detail: "the app sent a compressed message though none was asked for"}
	case uint64(n) > uint64(s.max):
		return &problem{http: http.StatusBadGateway, grpc: codes.ResourceExhausted, detail: fmt.Sprintf("the app's answer is larger than %d bytes", s.max)}
	}
	return nil
}

// next is the next message, not compressed.
func (s *stream) next() ([]byte, error) {
	flags, msg, err := s.frame()
	if err != nil || flags == 0 {
		return msg, err
	}
	if enc := s.res.Header.Get("Grpc-Encoding"); enc != "gzip" {
		// No encoding was offered, so none may be used.
		return nil, &problem{http: http.StatusBadGateway, grpc: codes.Internal, detail: fmt.Sprintf("the app sent a message compressed by %.40q, which was not asked for", enc)}
	}
	if msg, err = gunzip(msg, s.max); err != nil {
		return nil, &problem{http: http.StatusBadGateway, grpc: codes.Internal, detail: "the app sent a compressed message that makes no sense", err: err}
	}
	return msg, nil
}

func brokeOff(err error) error {
	if p, ok := unreachable(err).(*problem); ok && p.detail != "the app cannot be reached" {
		return p // the way to the app says what happened
	}
	return &problem{http: http.StatusBadGateway, grpc: codes.Unavailable, detail: "the app broke off its answer", err: err}
}

// end is the status of a call whose messages have been read: nil for OK.
func (s *stream) end() error {
	t := s.trailer()
	v := t.Get("Grpc-Status")
	if v == "" {
		return &problem{http: http.StatusBadGateway, grpc: codes.Unknown, detail: "the app ended without a status"}
	}
	n, err := strconv.ParseUint(v, 10, 32)
	if err != nil {
		return &problem{http: http.StatusBadGateway, grpc: codes.Unknown, detail: fmt.Sprintf("the app ended with the status %.20q", v)}
	}
	if n == 0 {
		return nil
	}
	code := codes.Code(n)
	p := &problem{http: httpStatus(code), grpc: code, detail: decodeMessage(t.Get("Grpc-Message")), own: true}
	if b, err := base64Any(t.Get("Grpc-Status-Details-Bin")); err == nil && len(b) > 0 {
		var st spb.Status
		if proto.Unmarshal(b, &st) == nil {
			p.status, p.details = b, st.Details
		}
	}
	return p
}

// one is the message of a unary call as it came, and how the call ended.
func (s *stream) one() (flags byte, msg []byte, err error) {
	flags, msg, err = s.frame()
	if errors.Is(err, io.EOF) {
		if err := s.end(); err != nil {
			return 0, nil, err
		}
		return 0, nil, &problem{http: http.StatusBadGateway, grpc: codes.Unimplemented, detail: "the app ended without an answer"}
	} else if err != nil {
		return 0, nil, err
	}
	if _, _, err := s.frame(); err == nil {
		return 0, nil, &problem{http: http.StatusBadGateway, grpc: codes.Unimplemented, detail: "the app sent two answers to one call"}
	} else if !errors.Is(err, io.EOF) {
		return 0, nil, err
	}
	return flags, msg, s.end()
}

// only is the message of a unary call that offered no compression.
func (s *stream) only() ([]byte, error) {
	flags, msg, err := s.one()
	if err == nil && flags != 0 {
		return nil, &problem{http: http.StatusBadGateway, grpc: codes.Internal, detail: "the app sent a compressed message though none was asked for"}
	}
	return msg, err
}

// copyMetadata passes the app's leading metadata on as headers.
func (s *stream) copyMetadata(h http.Header) { copyMetadata(h, s.res.Header, "") }

// copyTrailers passes trailing metadata on, as Connect does: Trailer-Foo.
func (s *stream) copyTrailers(h http.Header) {
	if !s.trailersOnly() {
		copyMetadata(h, s.res.Trailer, "Trailer-")
	}
}

// hopByHop says that a header is about the connection or the body.
func hopByHop(k string) bool {
	switch k {
	case "Content-Type", "Content-Length", "Content-Encoding", "Date", "Trailer", "Connection", "Keep-Alive", "Proxy-Connection", "Transfer-Encoding", "Upgrade":
		return true
	}
	return false
}

func copyMetadata(to, from http.Header, prefix string) {
	for k, vs := range from {
		if !hopByHop(k) && !strings.HasPrefix(k, "Grpc-") {
			to[prefix+k] = vs
		}
	}
}

// longAgo is a deadline that has passed.
var longAgo = time.Unix(1, 0)

// context is the context of a call to the app: it ends with the client and at
// the deadline the client set. end, deferred, closes the answer in the order
// that does not wait for a client that has not closed its side: see relayH2 in
// package router.
func (g *Gateway) context(w http.ResponseWriter, r *http.Request, streams bool) (ctx context.Context, end func(*stream)) {
	parent, stop := r.Context(), func() {}
	if d, ok := timeout(r.Header); ok {
		parent, stop = context.WithTimeout(parent, d)
	}
	if !streams {
		// Closing the answer is all there is to end.
		return parent, func(s *stream) {
			if s != nil {
				s.close()
			}
			stop()
		}
	}
	ctx, cancel := context.WithCancel(parent)
	unhook := func() {}
	if r.ContentLength != 0 {
		rc := http.NewResponseController(w)
		ended := make(chan struct{})
		halt := context.AfterFunc(ctx, func() {
			defer close(ended)
			_ = rc.SetReadDeadline(longAgo)
		})
		unhook = func() {
			if !halt() {
				<-ended // w is gone when the handler is
			}
		}
	}
	return ctx, func(s *stream) {
		unhook()
		cancel()
		if s != nil {
			s.close()
		}
		stop()
	}
}
