package release

import (
	"fmt"
	"path"
	"strings"

	"github.com/m3o/m3o"
)

// SkipMark is the words in a commit's message that ask for no deploy, as
// written there, or "" when there are none: [skip ci], [ci skip], [skip m3o],
// [m3o skip], [no ci] and [skip deploy], in any case, anywhere in the message.
func SkipMark(message string) string {
	const longest = 20 // of what stands between brackets
	for rest := message; ; {
		i := strings.IndexByte(rest, '[')
		if i < 0 {
			return ""
		}
		rest = rest[i+1:]
		j := strings.IndexByte(rest[:min(len(rest), longest)], ']')
		if j < 0 {
			continue
		}
		words := strings.Join(strings.FieldsFunc(strings.ToLower(rest[:j]), func(r rune) bool { return r == ' ' || r == '-' || r == '_' }), " ")
		switch words {
		case "skip ci", "ci skip", "no ci", "skip m3o", "m3o skip", "skip deploy", "deploy skip":
			return "[" + rest[:j] + "]"
		}
	}
}

const (
	maxPatterns = 100
	maxPattern  = 500
)

// CheckPaths says what is wrong with patterns for Touches.
func CheckPaths(patterns []string) error {
	if len(patterns) > maxPatterns {
		return m3o.Errorf(m3o.Invalid, "there are %d path patterns; the limit is %d", len(patterns), maxPatterns)
	}
	for _, p := range patterns {
		bad := func(why, hint string) error {
			return &m3o.Error{Kind: m3o.Invalid, Msg: fmt.Sprintf("path pattern %q %s", p, why), Hint: hint}
		}
		glob := strings.TrimPrefix(p, "!")
		switch {
		case strings.Trim(glob, "/") == "":
			return bad("is empty", "write for example svc/api/** or !docs/**")
		case len(p) > maxPattern:
			return m3o.Errorf(m3o.Invalid, "a path pattern is longer than %d bytes", maxPattern)
		case strings.HasPrefix(glob, "/"), strings.HasPrefix(glob, "./"):
			return bad("begins with a slash or dot", "patterns begin at the root of the repository: "+strings.TrimLeft(glob, "./"))
		case strings.Contains("/"+glob+"/", "/../"):
			return bad("leads out of the repository", "patterns begin at the root of the repository")
		}
		for part := range strings.SplitSeq(glob, "/") {
			if _, err := path.Match(part, ""); err != nil {
				return bad("does not parse", "use * for part of a name, ** for any folders, ? for one letter, [a-z] for one of several")
			}
		}
	}
	return nil
}

// Touches reports whether one of the changed files is for an app whose files
// are those of patterns, and which: it is "" when none is. Slash paths begin at
// the root of the repository. * and ? stay within one name, ** stands for any
// number of folders, a pattern that names a folder means all in it, and one
// that begins with ! takes away what those before it gave; if the first one
// does, it takes away from everything. No patterns: every file is.
func Touches(patterns, changed []string) (file string, ok bool) {
	for _, f := range changed {
		in := len(patterns) == 0 || strings.HasPrefix(patterns[0], "!")
		for _, p := range patterns {
			glob, not := strings.CutPrefix(p, "!")
			if in == not && within(strings.Split(strings.TrimSuffix(glob, "/"), "/"), strings.Split(f, "/")) {
				in = !not
			}
		}
		if in {
			return f, true
		}
	}
	return "", false
}

// within matches the parts of a pattern with those of a path, or of a folder
// above it.
func within(pat, name []string) bool {
	// Which parts of the pattern may come next; a path has few, and there is no
	// going back, so that ** many times over costs no more.
	next := map[int]bool{0: true}
	for i := 0; ; i++ {
		for k := 0; k < len(pat); k++ { // ** may stand for nothing
			if next[k] && pat[k] == "**" {
				next[k+1] = true
			}
		}
		if next[len(pat)] {
			return true // what is left of name is below the folder that matched
		}
		if i == len(name) {
			return false
		}
		then := map[int]bool{}
		for k := range next {
			if k == len(pat) {
				continue
			}
			if pat[k] == "**" {
				then[k] = true
			} else if ok, err := path.Match(pat[k], name[i]); ok && err == nil {
				then[k+1] = true
			}
		}
		next = then
	}
}
