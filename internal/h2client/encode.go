package h2client

import (
	"encoding/binary"
	"net/http"
	"strconv"
	"strings"

	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"
)

type headerBuf []byte

func (b *headerBuf) Write(p []byte) (int, error) { *b = append(*b, p...); return len(p), nil }

func appendHead(b []byte, n int, t http2.FrameType, flags http2.Flags, id uint32) []byte {
	return binary.BigEndian.AppendUint32(append(b, byte(n>>16), byte(n>>8), byte(n), byte(t), byte(flags)), id)
}

func appendUint32(b []byte, v uint32) []byte { return binary.BigEndian.AppendUint32(b, v) }

func appendSetting(b []byte, id http2.SettingID, v uint32) []byte {
	return appendUint32(binary.BigEndian.AppendUint16(b, uint16(id)), v)
}

// writeHeader encodes the header of req. c.mu is held, as what was sent before
// decides how.
func (c *conn) writeHeader(req *http.Request) {
	c.encBuf = c.encBuf[:0]
	field := func(k, v string) { _ = c.enc.WriteField(hpack.HeaderField{Name: k, Value: v}) } // a slice takes everything
	field(":method", req.Method)
	field(":scheme", "http")
	field(":authority", req.Host)
	path := req.URL.Path
	if req.URL.RawQuery != "" || req.URL.RawPath != "" || !plainPath(path) {
		path = req.URL.RequestURI()
	}
	if req.Method == http.MethodPost && len(path) < 100 && req.URL.RawQuery == "" {
		field(":path", path) // a method's name, which comes again
	} else {
		c.literal(":path", path)
	}
	for k, vs := range req.Header {
		name, again := lower(k)
		for _, v := range vs {
			if again {
				field(name, v)
			} else {
				c.literal(name, v)
			}
		}
	}
	if req.ContentLength > 0 {
		c.literal("content-length", strconv.FormatInt(req.ContentLength, 10))
	}
	if len(req.Trailer) > 0 {
		names := make([]string, 0, len(req.Trailer))
		for k := range req.Trailer {
			names = append(names, strings.ToLower(k))
		}
		c.literal("trailer", strings.Join(names, ","))
	}
}

// literal writes a field that is not kept in the table: it would not come again.
func (c *conn) literal(k, v string) {
	b := append(c.encBuf, 0)
	b = append(appendLen(b, len(k)), k...)
	c.encBuf = append(appendLen(b, len(v)), v...)
}

// appendLen is RFC 7541 §5.1 with seven bits, for a string that is not compressed.
func appendLen(b []byte, n int) []byte {
	if n < 127 {
		return append(b, byte(n))
	}
	b = append(b, 127)
	for n -= 127; n >= 128; n >>= 7 {
		b = append(b, byte(n)|128)
	}
	return append(b, byte(n))
}

// appendHeaders appends what writeHeader encoded, as frames.
func (c *conn) appendHeaders(id uint32, end bool) {
	t, flags := http2.FrameHeaders, http2.Flags(0)
	if end {
		flags = http2.FlagHeadersEndStream
	}
	for rest := []byte(c.encBuf); ; {
		n := min(len(rest), c.most)
		if n == len(rest) {
			flags |= http2.FlagHeadersEndHeaders // the same bit for a continuation
		}
		c.pend = append(appendHead(c.pend, n, t, flags, id), rest[:n]...)
		if rest = rest[n:]; len(rest) == 0 {
			return
		}
		t, flags = http2.FrameContinuation, 0
	}
}

// plainPath says that a path needs no escapes.
func plainPath(p string) bool {
	if p == "" || p[0] != '/' {
		return false
	}
	for i := range len(p) {
		switch c := p[i]; {
		case c >= 'a' && c <= 'z', c >= 'A' && c <= 'Z', c >= '0' && c <= '9', c == '/', c == '.', c == '_', c == '-':
		default:
			return false
		}
	}
	return true
}
