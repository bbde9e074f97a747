package buildpacks

import (
	"bytes"
	"errors"
	"fmt"
	"regexp"
	"strconv"
	"strings"
	"unicode"
	"unicode/utf8"

	"github.com/m3o/m3o"
)

// A ProcessLine is one line of a Procfile.
type ProcessLine struct {
	Name    string   // process type: web, worker, release …
	Command []string // argv, never empty
	Line    int      // counted from 1
}

const maxProcfile = 64 << 10

// processName keeps process types usable as part of an instance's host name.
var processName = regexp.MustCompile(`^[a-z][a-z0-9-]{0,29}$`)

// ParseProcfile reads a Procfile: one "type: command" a line; empty lines and
// lines beginning with # are skipped. It is strict: conflict marks, duplicate
// types, bad names and empty commands are errors of kind Invalid that begin
// with "Procfile:LINE" and say what to write.
//
// A command is split into words as a shell would, with single quotes, double
// quotes and backslashes, but no shell ever runs it: the image has none.
// $PORT and ${PORT} outside single quotes become 8080, the port every instance
// listens on. Any other variable is an error, because nothing would replace
// it: the program reads its settings from its environment. So are pipes,
// redirections, && and the other things only a shell can do.
func ParseProcfile(b []byte) ([]ProcessLine, error) {
	if len(b) > maxProcfile {
		return nil, bad(ProcfileName, 1, "the file is larger than 64 KB", "keep only \"type: command\" lines in it")
	}
	b = bytes.TrimPrefix(b, []byte("\xef\xbb\xbf"))
	var out []ProcessLine
	seen := map[string]int{}
	n := 0
	for line := range strings.SplitSeq(string(b), "\n") {
		n++
		line = strings.TrimSpace(line)
		if line == "" || line[0] == '#' {
			continue
		}
		p, err := parseProcess(line, n)
		if err != nil {
			return nil, err
		}
		if at, ok := seen[p.Name]; ok {
			return nil, bad(ProcfileName, n, fmt.Sprintf("%q is there already, in line %d", p.Name, at), "give each process type one line")
		}
		seen[p.Name] = n
		out = append(out, p)
	}
	return out, nil
}

func parseProcess(line string, n int) (ProcessLine, error) {
	for _, mark := range []string{"<<<<<<<", "=======", ">>>>>>>", "|||||||"} {
		if strings.HasPrefix(line, mark) {
			return ProcessLine{}, bad(ProcfileName, n, "a merge conflict is not resolved", "edit the file, remove the "+mark+" marks and commit")
		}
	}
	if i := strings.IndexFunc(line, func(r rune) bool { return r != '\t' && unicode.IsControl(r) || r == utf8.RuneError }); i >= 0 {
		return ProcessLine{}, bad(ProcfileName, n, fmt.Sprintf("the line has an unprintable character after %q", line[:i]), "save the file as plain UTF-8 text")
	}
	name, command, ok := strings.Cut(line, ":")
	if !ok {
		return ProcessLine{}, bad(ProcfileName, n, fmt.Sprintf("%q is not \"type: command\"", short(line)), "write for example: web: ./server")
	}
	name = strings.TrimSpace(name)
	if !processName.MatchString(name) {
		return ProcessLine{}, bad(ProcfileName, n, fmt.Sprintf("%q is not a process type", short(name)),
			"use 1 to 30 of a-z, 0-9 and hyphens, beginning with a letter, such as web or worker")
	}
	if strings.HasPrefix(name, "run-") {
		return ProcessLine{}, bad(ProcfileName, n, fmt.Sprintf("%q is the name of a one-off command: m3o run makes such", short(name)),
			"call it something that does not begin with run-")
	}
	argv, err := splitCommand(command, n)
	if err != nil {
		return ProcessLine{}, err
	}
	if len(argv) == 0 {
		return ProcessLine{}, bad(ProcfileName, n, fmt.Sprintf("%s has no command", name), "write for example: "+name+": ./server")
	}
	return ProcessLine{Name: name, Command: argv, Line: n}, nil
}

// splitter reads a command word by word. Each state function handles what it
// stands on and names the next state; nil ends.
type splitter struct {
	in   string
	pos  int
	line int
	word strings.Builder
	open bool // a word has begun, maybe empty as in ''
	argv []string
	err  error
}

type state func(*splitter) state

func splitCommand(in string, line int) ([]string, error) {
	s := &splitter{in: in, line: line}
	for st := state(unquoted); st != nil; {
		st = st(s)
	}
	if s.err != nil {
		return nil, s.err
	}
	// A shell prefix that means "no further process", which is so here anyway.
	if len(s.argv) > 1 && s.argv[0] == "exec" {
		s.argv = s.argv[1:]
	}
	if len(s.argv) > 0 && assignment.MatchString(s.argv[0]) {
		name, _, _ := strings.Cut(s.argv[0], "=")
		return nil, bad(ProcfileName, line, fmt.Sprintf("%s= before the command needs a shell, and the image has none", name),
			"set it as config of the app")
	}
	return s.argv, nil
}

var assignment = regexp.MustCompile(`^[A-Za-z_][A-Za-z0-9_]*=`)

func (s *splitter) fail(what, fix string) state {
	s.err = bad(ProcfileName, s.line, what, fix)
	return nil
}

func (s *splitter) take(c byte) { s.word.WriteByte(c); s.open = true; s.pos++ }

func (s *splitter) end() {
	if s.open {
		s.argv = append(s.argv, s.word.String())
		s.word.Reset()
		s.open = false
	}
}

func unquoted(s *splitter) state {
	if s.pos == len(s.in) {
		s.end()
		return nil
	}
	switch c := s.in[s.pos]; c {
	case ' ', '\t':
		s.end()
		s.pos++
	case '\'':
		s.open = true
		s.pos++
		return single
	case '"':
		s.open = true
		s.pos++
		return double
	case '\\':
		if s.pos+1 == len(s.in) {
			return s.fail("the command ends with a backslash", "write the command in one line")
		}
		s.pos++
		s.take(s.in[s.pos])
	case '$':
		return s.variable(unquoted)
	case '|', '&', ';', '<', '>', '(', ')', '`':
		return s.fail(fmt.Sprintf("%q needs a shell, and the image has none", c), "name one program and its arguments; quote the character if you mean it as it is")
	case '#':
		if !s.open {
			s.pos = len(s.in)
			return unquoted
		}
		s.take(c)
	default:
		s.take(c)
	}
	return unquoted
}

func single(s *splitter) state {
	i := strings.IndexByte(s.in[s.pos:], '\'')
	if i < 0 {
		return s.fail("a single quote is not closed", "add the closing '")
	}
	s.word.WriteString(s.in[s.pos : s.pos+i])
	s.pos += i + 1
	return unquoted
}

func double(s *splitter) state {
	if s.pos == len(s.in) {
		return s.fail("a double quote is not closed", "add the closing \"")
	}
	switch c := s.in[s.pos]; c {
	case '"':
		s.pos++
		return unquoted
	case '\\':
		if s.pos+1 < len(s.in) && strings.IndexByte("\\\"$`", s.in[s.pos+1]) >= 0 {
			s.pos++
		}
		s.take(s.in[s.pos])
	case '$':
		return s.variable(double)
	case '`':
		return s.fail("'`' needs a shell, and the image has none", "name one program and its arguments")
	default:
		s.take(c)
	}
	return double
}

var variable = regexp.MustCompile(`^\$(?:([A-Za-z_][A-Za-z0-9_]*)|\{([A-Za-z_][A-Za-z0-9_]*)\})`)

// variable stands on a $.
func (s *splitter) variable(back state) state {
	m := variable.FindStringSubmatch(s.in[s.pos:])
	if m == nil {
		if s.pos+1 < len(s.in) && strings.IndexByte("({", s.in[s.pos+1]) >= 0 {
			return s.fail("$"+s.in[s.pos+1:s.pos+2]+" needs a shell, and the image has none", "only $PORT is replaced in a Procfile")
		}
		s.take('$')
		return back
	}
	if name := m[1] + m[2]; name != "PORT" {
		return s.fail(fmt.Sprintf("$%s is not replaced: no shell runs the command", name),
			fmt.Sprintf("read %s from the environment in the program, or write '$%s' in single quotes to pass it as it is", name, name))
	}
	s.word.WriteString(strconv.Itoa(Port))
	s.open = true
	s.pos += len(m[0])
	return back
}

func bad(file string, line int, what, fix string) error {
	return &m3o.Error{Kind: m3o.Invalid, Msg: fmt.Sprintf("%s:%d: %s", file, line, what), Hint: fix}
}

// inFile is an error of a Procfile line as one of another file.
func inFile(err error, file string) error {
	e, ok := errors.AsType[*m3o.Error](err)
	if !ok {
		return err
	}
	return &m3o.Error{Kind: e.Kind, Msg: file + strings.TrimPrefix(e.Msg, ProcfileName), Hint: strings.ReplaceAll(e.Hint, "a "+ProcfileName, file)}
}

// short keeps a quoted piece of the user's file fit for one line.
func short(s string) string {
	if r := []rune(s); len(r) > 60 {
		return string(r[:60]) + "…"
	}
	return s
}
