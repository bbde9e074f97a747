package gitserver

import (
	"bytes"
	"errors"
	"io"
	"os/exec"
	"slices"
	"strings"
	"testing"
	"unicode"
	"unicode/utf8"

	"github.com/m3o/m3o"
	"github.com/m3o/m3o/internal/need"
)

func TestParseCommand(t *testing.T) {
	for raw, want := range map[string]command{
		"":                                {verb: verbHello},
		"  true ":                         {verb: verbHello},
		"git-receive-pack 'hello'":        {verb: verbReceive, app: "hello"},
		"git-receive-pack '/hello.git'":   {verb: verbReceive, app: "hello"},
		"git receive-pack hello.git/":     {verb: verbReceive, app: "hello"},
		"git-upload-pack '/hello'":        {verb: verbUpload, app: "hello"},
		"git upload-pack \"hello\"":       {verb: verbUpload, app: "hello"},
		"git-upload-archive x":            {verb: verbArchive},
		"git-lfs-authenticate x download": {verb: verbLFS},
		"git-lfs-transfer x upload":       {verb: verbLFS},
		"git status":                      {verb: verbOther, args: []string{"git", "status"}},
		"config set A='b\nc' ''":          {verb: verbOther, args: []string{"config", "set", "A=b\nc", ""}},
		`a\ b "c\"d\e" f'g'h`:             {verb: verbOther, args: []string{"a b", `c"d\e`, "fgh"}},
		"a;b $(c) | d":                    {verb: verbOther, args: []string{"a;b", "$(c)", "|", "d"}},
	} {
		got, err := parseCommand(raw)
		if err != nil || got.verb != want.verb || got.app != want.app || !slices.Equal(got.args, want.args) {
			t.Errorf("parseCommand(%q) = %+v, %v, want %+v", raw, got, err, want)
		}
	}
	for _, raw := range []string{"'", `"a`, `a\`, "a\nb", "a\x00b", "git-receive-pack", "git-receive-pack a b", "git-receive-pack ''", "git-upload-pack ../x",
		"git-upload-pack 'a/b'", "git-receive-pack '-x'", "git-receive-pack Hello", "git-receive-pack hello.git.git", "git receive-pack --stateless-rpc",
		strings.Repeat("x", maxCommand+1)} {
		if got, err := parseCommand(raw); m3o.KindOf(err) != m3o.Invalid || err == nil {
			t.Errorf("parseCommand(%.40q) = %+v, %v, want Invalid", raw, got, err)
		}
	}
}

func FuzzParseCommand(f *testing.F) {
	for _, s := range []string{"", "true", "git-receive-pack 'hello.git'", "git upload-pack \"/x\"", `a\ b 'c' "d\"e"`, "'", "a\x00", "\\"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, raw string) {
		c, err := parseCommand(raw)
		if err != nil {
			return
		}
		switch c.verb {
		case verbReceive, verbUpload:
			if m3o.CheckAppName(c.app) != nil {
				t.Errorf("%q: app %q", raw, c.app)
			}
		case verbOther:
			if len(c.args) == 0 {
				t.Errorf("%q: no words", raw)
			}
			// Quoting the words again gives the same words.
			var quoted []string
			for _, a := range c.args {
				quoted = append(quoted, "'"+strings.ReplaceAll(a, "'", `'\''`)+"'")
			}
			line := strings.Join(quoted, " ")
			if len(line) > maxCommand {
				return
			}
			again, err := splitWords(line)
			if err != nil || !slices.Equal(again, c.args) {
				t.Errorf("%q: words %q, again %q, %v", raw, c.args, again, err)
			}
		}
	})
}

var refNames = []string{"refs/heads/main", "refs/heads/feature/x", "refs/tags/v1.2", "refs/heads/ü", "refs/heads/a.lock", "refs/heads/a.lock/b", "refs/heads/.a",
	"refs/heads/a..b", "refs/heads/a.", "refs/heads/a/", "/refs/heads/a", "refs//a", "refs/heads/@", "@", "refs/heads/a@{b", "refs/heads/a\\b", "refs/heads/a b",
	"refs/heads/a~", "refs/heads/a^", "refs/heads/a:", "refs/heads/a?", "refs/heads/a*", "refs/heads/a[", "refs/heads/a]", "refs/heads/\x7f", "refs/heads/a\tb", "main", "", "a/b"}

func FuzzCheckRefName(f *testing.F) {
	need.Program(f, "git")
	for _, n := range refNames {
		f.Add(n)
	}
	f.Fuzz(func(t *testing.T, name string) {
		if strings.ContainsRune(name, 0) || len(name) > 2000 {
			return
		}
		git := exec.Command("git", "check-ref-format", name).Run() == nil
		switch ours := checkRefName(name) == nil; {
		case ours && !git:
			t.Errorf("%q: we take it, git does not", name)
		case !ours && git:
			// Only what we refuse beyond git.
			long := slices.ContainsFunc(strings.Split(name, "/"), func(p string) bool { return len(p) > 250 })
			if utf8.ValidString(name) && !long && len(name) <= 1000 && !strings.HasPrefix(name, "refs/heads/-") && !strings.HasPrefix(name, "refs/tags/-") &&
				name != "refs/heads/HEAD" && name != "refs/tags/HEAD" {
				t.Errorf("%q: git takes it, we do not: %v", name, checkRefName(name))
			}
		}
	})
}

func FuzzReadHeader(f *testing.F) {
	id := strings.Repeat("ab", 20)
	f.Add([]byte(pkt(zeroID+" "+id+" refs/heads/main\x00report-status push-options atomic") + "0000" + pkt("no-deploy") + "0000PACK"))
	f.Add([]byte(pkt("shallow "+id+"\n") + pkt(id+" "+zeroID+" refs/heads/x\n") + "0000"))
	f.Add([]byte("0000"))
	f.Add([]byte("0004"))
	f.Add([]byte("fff1"))
	f.Fuzz(func(t *testing.T, in []byte) {
		r := bytes.NewReader(in)
		var passed bytes.Buffer
		h, err := readHeader(r, &passed)
		if !bytes.HasPrefix(in, passed.Bytes()) {
			t.Errorf("%q: git was given %q", in, passed.Bytes())
		}
		if err != nil {
			return
		}
		if passed.Len()+r.Len() != len(in) {
			t.Errorf("%q: %d bytes passed, %d left", in, passed.Len(), r.Len())
		}
		for _, u := range h.updates {
			if !isID(orZero(u.old)) || !isID(orZero(u.new)) || u.ref == "" {
				t.Errorf("%q: update %+v", in, u)
			}
		}
	})
}

func FuzzReadPreReceive(f *testing.F) {
	id := strings.Repeat("ab", 20)
	f.Add("quarantine /r/./objects/tmp_objdir-incoming-aB3dEf\nshallow \n" + zeroID + " " + id + " refs/heads/main\nend\n")
	f.Add("quarantine \nshallow /r/shallow_aB3dEf\n" + id + " " + zeroID + " refs/heads/a b\nend\nrest")
	f.Add("quarantine ../../etc\nshallow \nend\n")
	f.Add("")
	f.Fuzz(func(t *testing.T, in string) {
		c, err := readPreReceive(strings.NewReader(in))
		if err != nil {
			if in == "" && !errors.Is(err, io.EOF) {
				t.Errorf("nothing at all = %v, want EOF", err)
			}
			return
		}
		if strings.ContainsAny(c.quarantine+c.shallow, "/.\n ") {
			t.Errorf("%q: names %q %q", in, c.quarantine, c.shallow)
		}
		var b strings.Builder
		for _, u := range c.updates {
			b.WriteString(u.String() + "\n")
		}
		again, err := readPostReceive(strings.NewReader(b.String() + "end\n"))
		if err != nil || !slices.Equal(again, c.updates) {
			t.Errorf("%q: updates %v, again %v, %v", in, c.updates, again, err)
		}
	})
}

func TestScrub(t *testing.T) {
	for in, want := range map[string]string{
		"plain\ttext":                       "plain\ttext",
		"grüße 世界 🚀":                        "grüße 世界 🚀",
		"\x1b[1;31mred\x1b[0m":              "red",
		"\x1b]0;title\x07a\x1b]8;;u\x1b\\b": "ab",
		"\x1bPq#0\x1b\\a\x1b(Bb\x1b=c":      "abc",
		"\x1b]0;never ends":                 "0;never ends",
		"\x1b[":                             "",
		"a\x1b":                             "a",
		"a\x08\x00b\x7fc\u009b31md":         "abc31md",
		"\xff\x9b":                          "\ufffd\ufffd",
		"a\u202eb\u2066c":                   "abc",
	} {
		if got := scrub(in); got != want {
			t.Errorf("scrub(%q) = %q, want %q", in, got, want)
		}
	}
}

func FuzzScrub(f *testing.F) {
	for _, s := range []string{"a", "\x1b[31mx", "\x1b]0;x\x07", "\x1b\x1b[", "\u009b1m", "\xc2", "\x1bP\x1b\\", "\r\n"} {
		f.Add(s, 3)
	}
	f.Fuzz(func(t *testing.T, in string, at int) {
		var whole, parts bytes.Buffer
		w := &lineWriter{w: &whole}
		_, _ = w.Write([]byte(in))
		_ = w.Close()
		p := &lineWriter{w: &parts}
		at = min(max(at, 0), len(in))
		_, _ = p.Write([]byte(in[:at]))
		_, _ = p.Write([]byte(in[at:]))
		_ = p.Close()
		if whole.String() != parts.String() {
			t.Errorf("%q at once %q, cut at %d %q", in, whole.String(), at, parts.String())
		}
		if i := strings.IndexFunc(whole.String(), func(r rune) bool { return unicode.IsControl(r) && r != '\n' && r != '\t' || reorders(r) }); i >= 0 {
			t.Errorf("%q: control character left in %q", in, whole.String())
		}
		if !utf8.ValidString(whole.String()) {
			t.Errorf("%q: not UTF-8: %q", in, whole.String())
		}
	})
}

func FuzzTap(f *testing.F) {
	f.Add([]byte("0032version 1\n00000009\x02text0006\x01x0000"), 5)
	f.Add([]byte("0005\x02zzzz"), 2)
	f.Fuzz(func(t *testing.T, in []byte, at int) {
		at = min(max(at, 0), len(in))
		var a, b tap
		a.stdout(in)
		b.stdout(in[:at])
		b.stdout(in[at:])
		if a.String() != b.String() {
			t.Errorf("%q at once %q, cut at %d %q", in, a.String(), at, b.String())
		}
		if len(a.String()) > tapSize {
			t.Errorf("kept %d bytes", len(a.String()))
		}
	})
}
