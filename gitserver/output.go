package gitserver

import (
	"bytes"
	"errors"
	"io"
	"os"
	"strings"
	"sync"
	"time"
	"unicode"
	"unicode/utf8"
)

// maxLine is where a line without an end is broken, so that a build that
// writes no newline can neither grow our memory nor stay invisible.
const maxLine = 8 << 10

// scrub makes one line of foreign text safe for a terminal: escape sequences,
// control characters (tabs stay) and the characters that reverse the reading
// order are removed, bytes that are not UTF-8 become U+FFFD. A sequence that
// does not end on its line loses only its introducer, so that it cannot hide
// the text behind it.
func scrub(line string) string {
	clean := true
	for i := 0; i < len(line); i++ {
		if b := line[i]; b < 0x20 && b != '\t' || b >= 0x7f {
			clean = false
			break
		}
	}
	if clean {
		return line
	}
	var out strings.Builder
	for i := 0; i < len(line); {
		if line[i] == 0x1b {
			i += escapeLen(line[i:])
			continue
		}
		r, n := utf8.DecodeRuneInString(line[i:])
		switch {
		case r == '\t' || !unicode.IsControl(r) && !reorders(r):
			out.WriteRune(r) // an invalid byte decodes as U+FFFD
		}
		i += n
	}
	return out.String()
}

// reorders reports the bidirectional controls, with which text can be shown
// in another order than it is in.
func reorders(r rune) bool {
	return r == '\u200e' || r == '\u200f' || r == '\u061c' || r >= '\u202a' && r <= '\u202e' || r >= '\u2066' && r <= '\u2069'
}

// escapeLen is the length of the escape sequence (ECMA-48) s begins with.
func escapeLen(s string) int {
	if len(s) < 2 {
		return len(s)
	}
	in := func(b byte, lo, hi byte) bool { return b >= lo && b <= hi }
	switch s[1] {
	case '[': // control sequence: parameters, intermediates, final
		i := 2
		for i < len(s) && in(s[i], 0x20, 0x3f) {
			i++
		}
		if i < len(s) && in(s[i], 0x40, 0x7e) {
			return i + 1
		}
		return 2
	case ']', 'P', 'X', '^', '_': // a string, to BEL or ESC \
		for i := 2; i < len(s); i++ {
			if s[i] == 0x07 {
				return i + 1
			}
			if s[i] == 0x1b && i+1 < len(s) && s[i+1] == '\\' {
				return i + 2
			}
		}
		return 2
	}
	i := 1
	for i < len(s) && in(s[i], 0x20, 0x2f) {
		i++
	}
	if i < len(s) && in(s[i], 0x30, 0x7e) {
		return i + 1
	}
	return 1
}

// A lineWriter passes on whole scrubbed lines as they come. A carriage return
// ends a line too: it would let later text overwrite what was said before.
type lineWriter struct {
	mu     sync.Mutex
	w      io.Writer
	prefix string
	part   []byte // of the line not ended yet
	cr     bool   // the last byte was a carriage return
	err    error

	// For a pipe: a reader that takes nothing for stall makes writes fail and
	// is reported to stalled once.
	pipe    *os.File
	stall   time.Duration
	stalled func()
}

var errClosedOutput = errors.New("the pusher's output is closed")

// Write takes any bytes; it fails when the reader is gone.
func (l *lineWriter) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	var out bytes.Buffer
	for _, b := range p {
		switch {
		case b == '\n' && l.cr:
			l.cr = false
		case b == '\n' || b == '\r':
			l.cr = b == '\r'
			l.flush(&out)
		default:
			l.cr = false
			if l.part = append(l.part, b); len(l.part) >= maxLine {
				l.flush(&out)
			}
		}
	}
	if l.err == nil && out.Len() > 0 {
		l.err = l.send(out.Bytes())
	}
	if l.err != nil {
		return 0, l.err
	}
	return len(p), nil
}

func (l *lineWriter) flush(out *bytes.Buffer) {
	out.WriteString(l.prefix)
	out.WriteString(scrub(string(l.part)))
	out.WriteByte('\n')
	l.part = l.part[:0]
}

func (l *lineWriter) send(b []byte) error {
	if l.pipe != nil && l.stall > 0 {
		t := time.AfterFunc(l.stall, func() {
			_ = l.pipe.SetWriteDeadline(time.Now())
			if l.stalled != nil {
				l.stalled()
			}
		})
		defer t.Stop()
	}
	_, err := l.w.Write(b)
	return err
}

// endLine ends a line that was begun.
func (l *lineWriter) endLine() {
	l.mu.Lock()
	begun := len(l.part) > 0
	l.mu.Unlock()
	if begun {
		_, _ = l.Write([]byte("\n"))
	}
}

// hurry makes writes, also one under way, fail after d.
func (l *lineWriter) hurry(d time.Duration) {
	if l.pipe != nil {
		_ = l.pipe.SetWriteDeadline(time.Now().Add(d))
	}
}

// Close ends the last line and closes the pipe. Writes fail from then on.
func (l *lineWriter) Close() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.err == nil && len(l.part) > 0 {
		var out bytes.Buffer
		l.flush(&out)
		l.err = l.send(out.Bytes())
	}
	if errors.Is(l.err, errClosedOutput) {
		return nil
	}
	l.err = errClosedOutput
	if l.pipe != nil {
		return l.pipe.Close()
	}
	return nil
}

// A tap keeps the end of what git tells the pusher, to explain it afterwards.
type tap struct {
	mu   sync.Mutex
	seen []byte

	// Of the packet stream on stdout.
	head []byte // of a packet's length and band, up to 5 bytes
	left int    // bytes of the packet still to come
	band byte
	raw  bool // no longer packets

	flushed bool // the first flush packet, the end of the advertisement, has passed
}

const tapSize = 4 << 10

func (t *tap) text(p []byte) (hold bool) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.keep(p)
	return false
}

func (t *tap) keep(p []byte) {
	if t.seen = append(t.seen, p...); len(t.seen) > tapSize {
		t.seen = append(t.seen[:0], t.seen[len(t.seen)-tapSize:]...)
	}
}

// String is what was kept.
func (t *tap) String() string {
	t.mu.Lock()
	defer t.mu.Unlock()
	return string(t.seen)
}

// stdout keeps the text of band 2. A packet of the ref advertisement, which
// has no band, begins with a hex digit or "version" instead. It reports whether
// the advertisement has been seen whole.
func (t *tap) stdout(p []byte) (advertised bool) {
	t.mu.Lock()
	defer t.mu.Unlock()
	for len(p) > 0 && !t.raw {
		if t.left > 0 {
			n := min(t.left, len(p))
			if t.band == 2 {
				t.keep(p[:n])
			}
			t.left -= n
			p = p[n:]
			continue
		}
		t.head = append(t.head, p[0])
		p = p[1:]
		if len(t.head) < 4 {
			continue
		}
		n, ok := pktLen(t.head[:4])
		switch {
		case !ok:
			t.raw = true
		case n <= 4:
			t.flushed = true
			t.head = t.head[:0]
		case len(t.head) == 5:
			t.band, t.left = t.head[4], n-5
			t.head = t.head[:0]
		}
	}
	return t.flushed || t.raw
}
