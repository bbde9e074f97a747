package build

import (
	"bytes"
	"fmt"
	"io"
	"strings"
	"sync"
	"unicode/utf8"
)

// output writes for the pusher in Heroku's grammar: an arrow begins a step,
// seven spaces go on with it. It keeps the last lines of what the tools said
// for the error. What is written is plain text: control characters, with
// which a terminal could be driven, are dropped. A writer that fails is not
// written to again; the build goes on.
type output struct {
	mu     sync.Mutex // guards the rest
	w      io.Writer
	broken bool
	tools  map[string]*toolOutput
}

const (
	maxLine  = 2000 // characters shown of one line
	maxLines = 500  // kept for the error
)

func (o *output) step(format string, args ...any) { o.put("-----> " + fmt.Sprintf(format, args...)) }
func (o *output) more(format string, args ...any) { o.put("       " + fmt.Sprintf(format, args...)) }

func (o *output) put(line string) {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.write(line)
}

func (o *output) write(line string) {
	if o.w == nil || o.broken {
		return
	}
	if _, err := io.WriteString(o.w, plain(line)+"\n"); err != nil {
		o.broken = true
	}
}

// A toolOutput is what one tool said.
type toolOutput struct {
	part  []byte   // of a line
	lines []string // the last ones
}

// labels tell the lines of tools that run beside the compiler from its own.
var labels = map[string]string{stepVet: "vet: ", stepTest: "test: "}

// tool takes a piece of what a tool wrote, not always whole lines.
func (o *output) tool(name string, b []byte) {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.tools == nil {
		o.tools = map[string]*toolOutput{}
	}
	t := o.tools[name]
	if t == nil {
		t = &toolOutput{}
		o.tools[name] = t
	}
	t.part = append(t.part, b...)
	for {
		i := bytes.IndexByte(t.part, '\n')
		if i < 0 {
			if len(t.part) < 64<<10 {
				return
			}
			i = len(t.part) - 1 // a tool that never ends a line
		}
		o.line(t, name, string(t.part[:i]))
		t.part = t.part[i+1:]
	}
}

// flush writes unfinished last lines.
func (o *output) flush() {
	o.mu.Lock()
	defer o.mu.Unlock()
	for name, t := range o.tools {
		if len(t.part) > 0 {
			o.line(t, name, string(t.part))
			t.part = nil
		}
	}
}

func (o *output) line(t *toolOutput, name, s string) {
	s = strings.TrimRight(plain(s), " ")
	t.lines = append(t.lines, s)
	if len(t.lines) > maxLines {
		t.lines = t.lines[len(t.lines)-maxLines:]
	}
	o.write("       " + labels[name] + s)
}

// said returns a tool's last lines.
func (o *output) said(name string) []string {
	o.mu.Lock()
	defer o.mu.Unlock()
	if t := o.tools[name]; t != nil {
		return t.lines
	}
	return nil
}

// plain drops control characters and escape sequences, and cuts long lines.
func plain(s string) string {
	var b strings.Builder
	n := 0
	for i := 0; i < len(s); {
		r, size := utf8.DecodeRuneInString(s[i:])
		i += size
		switch {
		case r == 0x1b:
			i += escape(s[i:])
			continue
		case r == '\t':
			b.WriteString("    ")
		case r < ' ' || r >= 0x7f && r < 0xa0 || r == utf8.RuneError && size == 1:
			continue
		default:
			b.WriteRune(r)
		}
		if n++; n == maxLine {
			b.WriteString("…")
			break
		}
	}
	return b.String()
}

// escape is the length of the rest of an escape sequence after ESC.
func escape(s string) int {
	if s == "" || s[0] != '[' {
		return 0
	}
	for i := 1; i < len(s); i++ {
		if s[i] >= 0x40 && s[i] <= 0x7e {
			return i + 1
		}
		if s[i] < ' ' {
			return i
		}
	}
	return len(s)
}
