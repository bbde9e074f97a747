package protobuf

import (
	"bytes"
	"fmt"
	"strings"
	"unicode/utf8"
)

// scanned is what one pass over a .proto file tells before it is parsed: its
// imports, and whether it is safe to hand to the parser.
type scanned struct {
	imports []importLine
	faults  []fault
}

type importLine struct {
	name      string
	line, col int
}

// A fault is a message at a place of a file.
type fault struct {
	path      string
	line, col int // from 1; 0 when the place is the whole file
	msg       string
}

func (f fault) String() string {
	if f.line == 0 {
		return f.path + ": " + f.msg
	}
	return fmt.Sprintf("%s:%d:%d: %s", f.path, f.line, f.col, f.msg)
}

// scan reads the tokens of a .proto file far enough to find import statements,
// bytes that are not UTF-8 and brackets nested too deeply. It accepts anything:
// what is wrong otherwise the parser says better.
func scan(path string, b []byte) scanned {
	var s scanned
	lx := lexer{b: bytes.TrimPrefix(b, []byte("\xef\xbb\xbf")), line: 1, col: 1}
	if at := invalidUTF8(lx.b); at >= 0 {
		line := 1 + bytes.Count(lx.b[:at], []byte{'\n'})
		col := 1 + utf8.RuneCount(lx.b[bytes.LastIndexByte(lx.b[:at], '\n')+1:at])
		s.faults = append(s.faults, fault{path, line, col, "the file is not UTF-8 text"})
		return s
	}
	depth := 0
	start := true // of a statement, where import may stand
	for {
		t := lx.next()
		switch {
		case t.kind == eof:
			return s
		case t.kind == word && t.text == "import" && start && depth == 0:
			n := lx.next()
			if n.kind == word && (n.text == "public" || n.text == "weak" || n.text == "option") {
				n = lx.next()
			}
			if n.kind != str {
				start = false
				continue
			}
			// Adjacent literals are one string, as in C.
			imp := importLine{name: n.text, line: n.line, col: n.col}
			end := lx.next()
			for end.kind == str {
				imp.name += end.text
				end = lx.next()
			}
			s.imports = append(s.imports, imp)
			start = end.kind == punct && end.text == ";"
			continue
		case t.kind == punct && strings.Contains("{[(<", t.text):
			if depth++; depth > maxDepth {
				s.faults = append(s.faults, fault{path, t.line, t.col, fmt.Sprintf("more than %d brackets are open here", maxDepth)})
				return s
			}
		case t.kind == punct && strings.Contains("}])>", t.text):
			depth = max(0, depth-1)
		}
		start = t.kind == punct && (t.text == ";" || t.text == "}")
	}
}

func invalidUTF8(b []byte) int {
	if utf8.Valid(b) {
		return -1
	}
	for i := 0; i < len(b); {
		r, n := utf8.DecodeRune(b[i:])
		if r == utf8.RuneError && n <= 1 {
			return i
		}
		i += n
	}
	return -1
}

type lexKind int

const (
	eof lexKind = iota
	word
	str
	punct
)

type lexeme struct {
	kind      lexKind
	text      string // of a string: without quotes and with escapes undone
	line, col int
}

// lexer splits a .proto file into words, strings and single other characters,
// and skips white space and comments. Columns count characters.
type lexer struct {
	b         []byte
	i         int
	line, col int
}

func (l *lexer) peek(n int) byte {
	if l.i+n < len(l.b) {
		return l.b[l.i+n]
	}
	return 0
}

func (l *lexer) step() {
	switch c := l.b[l.i]; {
	case c == '\n':
		l.line, l.col = l.line+1, 1
	case utf8.RuneStart(c):
		l.col++
	}
	l.i++
}

func (l *lexer) skip() {
	for l.i < len(l.b) {
		switch c := l.b[l.i]; {
		case c == ' ' || c == '\t' || c == '\r' || c == '\n' || c == '\v' || c == '\f':
			l.step()
		case c == '/' && l.peek(1) == '/':
			for l.i < len(l.b) && l.b[l.i] != '\n' {
				l.step()
			}
		case c == '/' && l.peek(1) == '*':
			l.step()
			l.step()
			for l.i < len(l.b) && (l.b[l.i] != '*' || l.peek(1) != '/') {
				l.step()
			}
			for range 2 {
				if l.i < len(l.b) {
					l.step()
				}
			}
		default:
			return
		}
	}
}

func wordByte(c byte) bool {
	return c == '_' || c == '.' || '0' <= c && c <= '9' || 'a' <= c && c <= 'z' || 'A' <= c && c <= 'Z' || c >= utf8.RuneSelf
}

func (l *lexer) next() lexeme {
	l.skip()
	t := lexeme{line: l.line, col: l.col}
	if l.i >= len(l.b) {
		return t
	}
	c := l.b[l.i]
	switch {
	case c == '"' || c == '\'':
		t.kind = str
		t.text = l.quoted(c)
	case wordByte(c):
		t.kind = word
		from := l.i
		for l.i < len(l.b) && wordByte(l.b[l.i]) {
			l.step()
		}
		t.text = string(l.b[from:l.i])
	default:
		t.kind = punct
		t.text = string(c)
		l.step()
	}
	return t
}

// quoted reads a string literal. Only the escapes that a path could hold are
// undone: an import that needs others finds no file and is reported.
func (l *lexer) quoted(quote byte) string {
	var sb strings.Builder
	l.step()
	for l.i < len(l.b) && l.b[l.i] != quote && l.b[l.i] != '\n' {
		if l.b[l.i] == '\\' && l.i+1 < len(l.b) {
			l.step()
		}
		sb.WriteByte(l.b[l.i])
		l.step()
	}
	if l.i < len(l.b) && l.b[l.i] == quote {
		l.step()
	}
	return sb.String()
}
