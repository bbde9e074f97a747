package build

import (
	"errors"
	"strings"
	"testing"

	"github.com/m3o/m3o"
)

func TestExplainExit(t *testing.T) {
	for name, c := range map[string]struct {
		code      uint32
		said      string
		kind      m3o.Kind
		msg, hint string
	}{
		"compile errors": {1, "go: downloading x v1\n# x\n./a.go:1:2: first\n./b.go:3:4: last\n./b.go:9:9: too many errors", m3o.Invalid, "./b.go:3:4: last", "fix it"},
		"context lines":  {1, "# x\n./a.go:1:2: cannot use a\n    have (int)\n    want (string)", m3o.Invalid, "./a.go:1:2: cannot use a", "fix it"},
		"go's own":       {1, "go: downloading x v1\ngo: updates to go.mod needed; to update it:\n\tgo mod tidy", m3o.Invalid, "go: updates to go.mod needed; to update it:", "go mod tidy"},
		"the linker":     {1, "# x\nlink: main.f: relocation target y not defined", m3o.Invalid, "link: main.f: relocation target y not defined", "fix it"},
		"silent":         {2, "", m3o.Invalid, "go build ended with exit code 2 and said nothing", ""},
		"disk full":      {1, "write /x: no space left on device\n./a.go:1:2: x", m3o.Unavailable, "the disk of the build machine is full", "free space"},
		"proxy down":     {1, `main.go:3:8: a.b/c@v1: Get "https://p/a.b/c/@v/v1.zip": dial tcp: lookup p: no such host`, m3o.Unavailable, `main.go:3:8: a.b/c@v1: Get "https://p/a.b/c/@v/v1.zip": dial tcp: lookup p: no such host`, "push again"},
		"EOF in code":    {1, "./a.go:1:2: syntax error: unexpected EOF", m3o.Invalid, "./a.go:1:2: syntax error: unexpected EOF", "fix it"},
	} {
		err := explainExit(stepBuild, c.code, strings.Split(c.said, "\n"), errors.New("exit"))
		if m3o.KindOf(err) != c.kind || err.Error() != c.msg || !strings.Contains(m3o.HintOf(err), c.hint) {
			t.Errorf("%s: %v, %q, hint %q; want %v, %q, hint …%s…", name, m3o.KindOf(err), err, m3o.HintOf(err), c.kind, c.msg, c.hint)
		}
	}
}

func TestOutputKeepsTheGrammar(t *testing.T) {
	var w strings.Builder
	o := &output{w: &w}
	o.step("Using %s", "go1.26.8")
	o.tool(stepBuild, []byte("one\r\n\x1b[31mtw"))
	o.tool(stepBuild, []byte("o\x1b[0m\x07\n\tthree"))
	o.flush()
	if got, want := w.String(), "-----> Using go1.26.8\n       one\n       two\n           three\n"; got != want {
		t.Errorf("wrote %q, want %q", got, want)
	}
	if got := strings.Join(o.said(stepBuild), "|"); got != "one|two|    three" {
		t.Errorf("said %q", got)
	}
}

type brokenPipe struct{ n int }

func (b *brokenPipe) Write([]byte) (int, error) { b.n++; return 0, errors.New("gone") }

func TestOutputToAGonePusher(t *testing.T) {
	w := &brokenPipe{}
	o := &output{w: w}
	for range 3 {
		o.tool(stepBuild, []byte("line\n"))
	}
	if w.n != 1 || len(o.said(stepBuild)) != 3 {
		t.Errorf("wrote %d times, kept %d lines", w.n, len(o.said(stepBuild)))
	}
}

func FuzzPlain(f *testing.F) {
	for _, s := range []string{"a\x1b[31mb", "\x1b[", "\x1b", "\xff\x00\u009b31m", strings.Repeat("é", 5000)} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		p := plain(s)
		for _, r := range p {
			if r < ' ' || r >= 0x7f && r < 0xa0 {
				t.Errorf("%q holds %q", p, r)
			}
		}
		if len([]rune(p)) > 4*maxLine+1 {
			t.Errorf("%d characters", len(p))
		}
	})
}
