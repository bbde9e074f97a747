package store

import (
	"fmt"
	"strings"
	"unicode/utf8"

	"github.com/m3o/m3o"
)

// maxKey bounds a key as encoded: it travels in the engine's protocol line.
const maxKey = 2048

// encodeKey turns a key into a NATS subject: '/' becomes the token separator,
// so that the engine itself can filter by leading segments, and whatever NATS
// or its key-value convention does not allow in a token becomes =XX. An empty
// segment, which NATS cannot have, is a lone "=".
func encodeKey(key string) (string, error) {
	if key == "" || !utf8.ValidString(key) {
		return "", &m3o.Error{Kind: m3o.Invalid, Msg: fmt.Sprintf("key %q is empty or not UTF-8", key)}
	}
	enc := encodeSegments(key)
	if len(enc) > maxKey {
		return "", &m3o.Error{Kind: m3o.Invalid, Msg: fmt.Sprintf("key of %d bytes is too long", len(key))}
	}
	return enc, nil
}

func encodeSegments(key string) string {
	const hex = "0123456789ABCDEF"
	var b strings.Builder
	b.Grow(len(key) + 8)
	start := true // of a segment
	for i := range len(key) {
		switch c := key[i]; {
		case c == '/':
			if start {
				b.WriteByte('=')
			}
			b.WriteByte('.')
			start = true
			continue
		case c >= 'a' && c <= 'z', c >= 'A' && c <= 'Z', c >= '0' && c <= '9', c == '-', c == '_':
			b.WriteByte(c)
		default:
			b.Write([]byte{'=', hex[c>>4], hex[c&15]})
		}
		start = false
	}
	if start {
		b.WriteByte('=')
	}
	return b.String()
}

// decodeKey is the inverse of encodeKey. Subjects we did not write are errors.
func decodeKey(subject string) (string, error) {
	bad := fmt.Errorf("%q is not an encoded key", subject)
	var b strings.Builder
	for i, seg := range strings.Split(subject, ".") {
		if i > 0 {
			b.WriteByte('/')
		}
		if seg == "=" {
			continue
		}
		if seg == "" {
			return "", bad
		}
		for j := 0; j < len(seg); j++ {
			if seg[j] != '=' {
				b.WriteByte(seg[j])
				continue
			}
			if j+2 >= len(seg) {
				return "", bad
			}
			hi, lo := unhex(seg[j+1]), unhex(seg[j+2])
			if hi < 0 || lo < 0 {
				return "", bad
			}
			b.WriteByte(byte(hi<<4 | lo))
			j += 2
		}
	}
	key := b.String()
	if key == "" || !utf8.ValidString(key) || encodeSegments(key) != subject {
		return "", bad // one key, one subject
	}
	return key, nil
}

func unhex(c byte) int {
	switch {
	case c >= '0' && c <= '9':
		return int(c - '0')
	case c >= 'A' && c <= 'F':
		return int(c-'A') + 10
	}
	return -1
}

// prefixFilter is the narrowest subject filter that holds every key beginning
// with prefix: its whole segments. The rest is for the reader to check.
func prefixFilter(prefix string) string {
	i := strings.LastIndexByte(prefix, '/')
	if i < 0 {
		return ">"
	}
	return encodeSegments(prefix[:i]) + ".>"
}
