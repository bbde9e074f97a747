package gateway

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"strconv"
	"strings"

	"google.golang.org/grpc/codes"
)

// stream is one gRPC call with a single request message.
type stream struct {
	res *http.Response
	max int
}

// open calls path with msg. Errors before any answer are problems.
func open(ctx context.Context, up http.RoundTripper, path, host string, md http.Header, msg []byte, most int) (*stream, error) {
	body := make([]byte, 5, 5+len(msg))
	binary.BigEndian.PutUint32(body[1:], uint32(len(msg)))
	body = append(body, msg...)
	md["Content-Type"] = []string{"application/grpc"}
	md["Te"] = []string{"trailers"}
	if _, ok := md["User-Agent"]; !ok {
		md["User-Agent"] = []string{"m3o-gateway"}
	}
	req := (&http.Request{
		Method: http.MethodPost, URL: &url.URL{Scheme: "http", Host: host, Path: path}, Host: host, Header: md,
		Proto: "HTTP/2.0", ProtoMajor: 2, ContentLength: int64(len(body)), Body: io.NopCloser(bytes.NewReader(body)),
		GetBody: func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(body)), nil },
	}).WithContext(ctx)
	res, err := up.RoundTrip(req)
	if err != nil {
		if ctx.Err() != nil {
			return nil, ctx.Err()
		}
		return nil, unreachable(err)
	}
	s := &stream{res: res, max: most}
	if err := s.begin(); err != nil {
		s.close()
		return nil, err
	}
	return s, nil
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

// next is the next message; io.EOF after the last, when end has the status.
func (s *stream) next() ([]byte, error) {
	var head [5]byte
	if _, err := io.ReadFull(s.res.Body, head[:]); err != nil {
		if errors.Is(err, io.EOF) {
			return nil, io.EOF
		}
		return nil, brokeOff(err)
	}
	if head[0] != 0 {
		// No encoding was offered, so none may be used.
		return nil, &problem{http: http.StatusBadGateway, grpc: codes.Internal, detail: "the app sent a compressed message though none was asked for"}
	}
	n := binary.BigEndian.Uint32(head[1:])
	if uint64(n) > uint64(s.max) {
		return nil, &problem{http: http.StatusBadGateway, grpc: codes.ResourceExhausted, detail: fmt.Sprintf("the app's answer of %d bytes is larger than %d", n, s.max)}
	}
	// What the prefix says is only believed as the bytes come.
	var buf bytes.Buffer
	buf.Grow(int(min(n, 64<<10)))
	if m, err := io.CopyN(&buf, s.res.Body, int64(n)); err != nil {
		if errors.Is(err, io.EOF) {
			err = fmt.Errorf("a message ended after %d of %d bytes", m, n)
		}
		return nil, brokeOff(err)
	}
	return buf.Bytes(), nil
}

func brokeOff(err error) error {
	if p, ok := unreachable(err).(*problem); ok && p.detail != "the app cannot be reached" {
		return p // the way to the app says what happened
	}
	return &problem{http: http.StatusBadGateway, grpc: codes.Unavailable, detail: "the app broke off its answer", err: err}
}

// end is the status of a call whose messages have been read: nil for OK.
func (s *stream) end() error {
	t := s.res.Trailer
	v := t.Get("Grpc-Status")
	if v == "" { // an answer without messages carries it in the head
		t = s.res.Header
		v = t.Get("Grpc-Status")
	}
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
	p := &problem{http: httpStatus(code), grpc: code, detail: decodeMessage(t.Get("Grpc-Message"))}
	if p.detail == "" {
		p.detail = code.String()
	}
	return p
}

// only is the message of a unary call.
func (s *stream) only() ([]byte, error) {
	msg, err := s.next()
	if errors.Is(err, io.EOF) {
		if err := s.end(); err != nil {
			return nil, err
		}
		return nil, &problem{http: http.StatusBadGateway, grpc: codes.Internal, detail: "the app ended without an answer"}
	} else if err != nil {
		return nil, err
	}
	if _, err := s.next(); err == nil {
		return nil, &problem{http: http.StatusBadGateway, grpc: codes.Internal, detail: "the app sent two answers to one call"}
	} else if !errors.Is(err, io.EOF) {
		return nil, err
	}
	return msg, s.end()
}

// copyMetadata passes the app's leading metadata on as headers.
func (s *stream) copyMetadata(h http.Header) { copyMetadata(h, s.res.Header, "") }

// copyTrailers passes trailing metadata on, as Connect does: Trailer-Foo.
func (s *stream) copyTrailers(h http.Header) { copyMetadata(h, s.res.Trailer, "Trailer-") }

func copyMetadata(to, from http.Header, prefix string) {
	for k, vs := range from {
		switch k {
		case "Content-Type", "Content-Length", "Content-Encoding", "Date", "Trailer", "Connection", "Keep-Alive", "Proxy-Connection", "Transfer-Encoding", "Upgrade":
			continue
		}
		if !strings.HasPrefix(k, "Grpc-") {
			to[prefix+k] = vs
		}
	}
}
