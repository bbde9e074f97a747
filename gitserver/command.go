package gitserver

import (
	"strings"

	"github.com/m3o/m3o"
)

// A verb is what a client asked to run.
type verb int

const (
	verbHello   verb = iota // no command, or true: is the key known?
	verbReceive             // git push
	verbUpload              // git fetch, git clone
	verbArchive             // git archive --remote
	verbLFS                 // git-lfs, before it pushes its files
	verbOther               // for Commands
)

// A command is a parsed request of a session.
type command struct {
	verb verb
	app  string   // of verbReceive and verbUpload
	args []string // of verbOther; at least one
}

const maxCommand = 64 << 10 // a config value may be that long

var gitVerbs = map[string]verb{
	"receive-pack":     verbReceive,
	"upload-pack":      verbUpload,
	"upload-archive":   verbArchive,
	"lfs-authenticate": verbLFS,
	"lfs-transfer":     verbLFS,
}

// parseCommand reads the command line a client sent. The library's own parser
// drops errors, so the raw line is parsed here.
func parseCommand(raw string) (command, error) {
	args, err := splitWords(raw)
	if err != nil {
		return command{}, err
	}
	if len(args) == 0 || len(args) == 1 && args[0] == "true" {
		return command{verb: verbHello}, nil
	}
	name, rest := args[0], args[1:]
	if name == "git" && len(rest) > 0 {
		name, rest = "git-"+rest[0], rest[1:]
	}
	sub, isGit := strings.CutPrefix(name, "git-")
	v, known := gitVerbs[sub]
	switch {
	case !isGit || !known:
		return command{verb: verbOther, args: args}, nil
	case v == verbArchive || v == verbLFS:
		return command{verb: v}, nil
	case len(rest) != 1:
		return command{}, m3o.Errorf(m3o.Invalid, "git %s takes one repository, not %d arguments", sub, len(rest))
	}
	app := strings.TrimSuffix(strings.Trim(rest[0], "/"), ".git")
	if err := m3o.CheckAppName(app); err != nil {
		return command{}, err
	}
	return command{verb: v, app: app}, nil
}

// splitWords splits a command line as a POSIX shell does, but knows only
// spaces, quotes and backslashes: nothing is expanded or run.
func splitWords(line string) ([]string, error) {
	bad := func(why string) ([]string, error) {
		return nil, &m3o.Error{Kind: m3o.Invalid, Msg: "the command " + why, Hint: "quote arguments as for a shell"}
	}
	if len(line) > maxCommand {
		return bad("is longer than 64 KB")
	}
	if strings.ContainsRune(line, 0) {
		return bad("holds a NUL byte")
	}
	var words []string
	var word strings.Builder
	inWord := false
	for i := 0; i < len(line); i++ {
		switch b := line[i]; b {
		case ' ', '\t':
			if inWord {
				words = append(words, word.String())
				word.Reset()
				inWord = false
			}
		case '\n', '\r':
			return bad("has a line break outside quotes")
		case '\'':
			end := strings.IndexByte(line[i+1:], '\'')
			if end < 0 {
				return bad("has a single quote that is not closed")
			}
			word.WriteString(line[i+1 : i+1+end])
			i += 1 + end
			inWord = true
		case '"':
			closed := false
			for i++; i < len(line); i++ {
				if line[i] == '"' {
					closed = true
					break
				}
				// Inside double quotes a backslash escapes only these.
				if line[i] == '\\' && i+1 < len(line) && strings.IndexByte("\"\\$`", line[i+1]) >= 0 {
					i++
				}
				word.WriteByte(line[i])
			}
			if !closed {
				return bad("has a double quote that is not closed")
			}
			inWord = true
		case '\\':
			if i++; i == len(line) {
				return bad("ends with a backslash")
			}
			word.WriteByte(line[i])
			inWord = true
		default:
			word.WriteByte(b)
			inWord = true
		}
	}
	if inWord {
		words = append(words, word.String())
	}
	return words, nil
}
