package main

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"strings"
	"time"
	"unicode/utf8"

	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"
)

// say writes a line for the person at the terminal: progress, questions, hints.
func (s *system) say(format string, args ...any) {
	_, _ = fmt.Fprintf(s.err, format+"\n", args...)
}

// undo tells how to take back what was just done.
func (c *call) undo(format string, args ...any) { c.say("m3o: undo: "+format, args...) }

// hint tells what to type next.
func (c *call) hint(format string, args ...any) { c.say("m3o: hint: "+format, args...) }

// print writes to stdout; run turns a failed write into an exit status.
func (c *call) print(format string, args ...any) { _, _ = fmt.Fprintf(c.out, format, args...) }

// result prints an answer: as JSON with the field names of m3o.proto when
// --json asks for it, else as human does.
func (c *call) result(msg proto.Message, human func()) error {
	if !c.has("json") {
		human()
		return nil
	}
	b, err := marshal(msg)
	if err != nil {
		return err
	}
	return c.json(json.RawMessage(b))
}

// json prints a value as indented JSON.
func (c *call) json(v any) error {
	b, err := json.MarshalIndent(v, "", "  ")
	if err != nil {
		return err
	}
	c.print("%s\n", b)
	return nil
}

// jsonLine prints one message of a stream as one line.
func (c *call) jsonLine(msg proto.Message) error {
	b, err := marshal(msg)
	if err != nil {
		return err
	}
	c.print("%s\n", b)
	return nil
}

// marshal is protojson on one line, without the random spaces that protojson
// puts in so that nobody relies on them.
func marshal(msg proto.Message) ([]byte, error) {
	b, err := protojson.MarshalOptions{UseProtoNames: true, EmitUnpopulated: true}.Marshal(msg)
	if err != nil {
		return nil, err
	}
	var out bytes.Buffer
	err = json.Compact(&out, b)
	return out.Bytes(), err
}

const (
	bold   = "1"
	red    = "31"
	green  = "32"
	yellow = "33"
)

// colours says whether stdout may be coloured, see no-color.org.
func (s *system) colours() bool {
	return s.outTerminal && s.env("NO_COLOR") == "" && s.env("TERM") != "dumb"
}

func (s *system) paint(colour, text string) string {
	if !s.colours() || text == "" {
		return text
	}
	return "\x1b[" + colour + "m" + text + "\x1b[0m"
}

// status colours a word that says how something is.
func (s *system) status(word string) string {
	switch word {
	case "running", "live", "ready", "succeeded", "ok", "delivered":
		return s.paint(green, word)
	case "failed", "down", "unhealthy", "exited", "crashing", "missed", "lost":
		return s.paint(red, word)
	case "deploying", "starting", "draining", "held", "locked", "paused", "pending":
		return s.paint(yellow, word)
	}
	return word
}

// table prints rows in columns under a heading. Cells may be painted.
func (c *call) table(head []string, rows [][]string) {
	width := make([]int, len(head))
	all := append([][]string{head}, rows...)
	for _, row := range all {
		for i, cell := range row {
			width[i] = max(width[i], cellWidth(cell))
		}
	}
	var b strings.Builder
	for n, row := range all {
		var line strings.Builder
		for i, cell := range row {
			pad := width[i] - cellWidth(cell)
			if n == 0 {
				cell = c.paint(bold, cell)
			}
			line.WriteString(cell)
			if i < len(row)-1 {
				line.WriteString(strings.Repeat(" ", pad+2))
			}
		}
		b.WriteString(strings.TrimRight(line.String(), " ") + "\n")
	}
	c.print("%s", b.String())
}

// fields prints name and value pairs, leaving out empty values.
func (c *call) fields(pairs ...string) {
	wide := 0
	for i := 0; i < len(pairs); i += 2 {
		if pairs[i+1] != "" {
			wide = max(wide, len(pairs[i]))
		}
	}
	for i := 0; i < len(pairs); i += 2 {
		if pairs[i+1] != "" {
			c.print("%s%s  %s\n", c.paint(bold, pairs[i]), strings.Repeat(" ", wide-len(pairs[i])), pairs[i+1])
		}
	}
}

// cellWidth counts what is seen of a painted cell.
func cellWidth(s string) int {
	n := 0
	for len(s) > 0 {
		if k := sgr(s); k > 0 {
			s = s[k:]
			continue
		}
		_, k := utf8.DecodeRuneInString(s)
		s = s[k:]
		n++
	}
	return n
}

// sgr is the length of the colour sequence that s begins with, 0 for none.
func sgr(s string) int {
	if !strings.HasPrefix(s, "\x1b[") {
		return 0
	}
	for i := 2; i < len(s) && i < 32; i++ {
		switch b := s[i]; {
		case b == 'm':
			return i + 1
		case (b < '0' || b > '9') && b != ';':
			return 0
		}
	}
	return 0
}

// escape is the length of the control sequence (CSI, or OSC up to its end)
// that s begins with, 0 for none; see ECMA-48.
func escape(s string) int {
	switch {
	case strings.HasPrefix(s, "\x1b["):
		for i := 2; i < len(s); i++ {
			if b := s[i]; b < 0x20 || b > 0x3f {
				if b >= 0x40 && b <= 0x7e {
					return i + 1
				}
				return 0
			}
		}
	case strings.HasPrefix(s, "\x1b]"):
		for i := 2; i < len(s); i++ {
			switch {
			case s[i] == 0x07:
				return i + 1
			case strings.HasPrefix(s[i:], "\x1b\\"):
				return i + 2
			case s[i] < 0x20:
				return 0
			}
		}
	}
	return 0
}

// plain drops every control character: text from elsewhere must not move the
// cursor, set the title or answer for the user. Line ends and tabs become spaces.
func plain(s string) string { return scrub(s, false) }

// text is one line from an app or a build as stdout may show it: as it is
// when nobody watches, else without control characters but colours.
func (s *system) text(line string) string {
	if !s.outTerminal {
		return line
	}
	clean := scrub(line, s.colours())
	if s.colours() && strings.Contains(clean, "\x1b") {
		clean += "\x1b[0m" // a colour does not leak into the next line
	}
	return clean
}

func scrub(s string, colours bool) string {
	var b strings.Builder
	for len(s) > 0 {
		if n := sgr(s); n > 0 {
			if colours {
				b.WriteString(s[:n])
			}
			s = s[n:]
			continue
		}
		if n := escape(s); n > 0 {
			s = s[n:]
			continue
		}
		r, n := utf8.DecodeRuneInString(s)
		s = s[n:]
		switch {
		case r == '\n' || r == '\t' || r == '\r':
			b.WriteByte(' ')
		case r < ' ' || r >= 0x7f && r < 0xa0 || r >= 0x202a && r <= 0x202e || r >= 0x2066 && r <= 0x2069:
			// C0, C1 and what turns the direction of writing
		default:
			b.WriteRune(r)
		}
	}
	return b.String()
}

// when is a time for a table: how long ago on a terminal, RFC 3339 elsewhere.
func (s *system) when(t *timestamppb.Timestamp) string {
	if !t.IsValid() || t.AsTime().IsZero() {
		return ""
	}
	if !s.outTerminal {
		return t.AsTime().UTC().Format(time.RFC3339)
	}
	return ago(t.AsTime(), s.now())
}

// ago is how people say the distance between two times.
func ago(t, now time.Time) string {
	d := now.Sub(t)
	if d.Abs() < 2*time.Second {
		return "just now"
	}
	if d < 0 {
		return "in " + rough(-d)
	}
	return rough(d) + " ago"
}

// rough is a duration in its largest whole unit.
func rough(d time.Duration) string {
	for _, u := range []struct {
		name string
		size time.Duration
	}{
		{"year", 365 * 24 * time.Hour}, {"month", 30 * 24 * time.Hour}, {"day", 24 * time.Hour},
		{"hour", time.Hour}, {"minute", time.Minute}, {"second", time.Second},
	} {
		switch n := int64(d / u.size); {
		case n == 1:
			return "1 " + u.name
		case n > 1:
			return fmt.Sprintf("%d %ss", n, u.name)
		}
	}
	return "0 seconds"
}

// short is a commit as git shortens it.
func short(commit string) string {
	if len(commit) > 7 {
		return commit[:7]
	}
	return commit
}

// quote makes a word safe to paste into a shell.
func quote(s string) string {
	safe := func(r rune) bool {
		return r >= 'a' && r <= 'z' || r >= 'A' && r <= 'Z' || r >= '0' && r <= '9' || strings.ContainsRune("_-+=:,./@%", r)
	}
	if s != "" && strings.IndexFunc(s, func(r rune) bool { return !safe(r) }) < 0 {
		return s
	}
	return "'" + strings.ReplaceAll(s, "'", `'\''`) + "'"
}

// ask reads a line typed at the terminal.
func (s *system) ask(ctx context.Context, question string) (string, error) {
	_, _ = fmt.Fprint(s.err, question+" ")
	line, err := await(ctx, func() (string, error) { return s.in.ReadString('\n') }, func() { s.say("") })
	if err != nil && (err != io.EOF || line == "") {
		return "", err
	}
	return strings.TrimSpace(line), nil
}

// confirm asks a question that only "y" or "yes" answers with yes.
func (s *system) confirm(ctx context.Context, question string) (bool, error) {
	a, err := s.ask(ctx, question+" [y/N]")
	if err == io.EOF {
		return false, nil
	}
	a = strings.ToLower(a)
	return a == "y" || a == "yes", err
}
