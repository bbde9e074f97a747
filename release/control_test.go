package release

import (
	"strings"
	"testing"

	"github.com/m3o/m3o"
)

func TestSkipMark(t *testing.T) {
	for msg, want := range map[string]string{
		"docs: typo [skip ci]":                    "[skip ci]",
		"docs: typo\n\nLong text.\n\n[CI skip]\n": "[CI skip]",
		"[skip m3o] later":                        "[skip m3o]",
		"x [skip-ci]":                             "[skip-ci]",
		"x [no ci]":                               "[no ci]",
		"x [wip] [skip deploy]":                   "[skip deploy]",
		"x [[skip ci]]":                           "[skip ci]",
		"skip ci":                                 "",
		"x [skip]":                                "",
		"x [skip the ci]":                         "",
		"x [skip ci":                              "",
		"x [" + strings.Repeat(" ", 50) + "skip ci]": "",
		"": "",
	} {
		if got := SkipMark(msg); got != want {
			t.Errorf("SkipMark(%q) = %q, want %q", msg, got, want)
		}
	}
}

func TestTouches(t *testing.T) {
	for _, c := range []struct{ patterns, changed, want string }{
		{"", "a.go", "a.go"},
		{"", "", ""},
		{"svc/api/**", "svc/api/main.go", "svc/api/main.go"},
		{"svc/api", "svc/api/deep/main.go", "svc/api/deep/main.go"},
		{"svc/api/", "svc/api/main.go", "svc/api/main.go"},
		{"svc/api", "svc/apis/main.go svc/web/api", ""},
		{"svc/*/main.go", "svc/a/main.go", "svc/a/main.go"},
		{"svc/*/main.go", "svc/a/b/main.go", ""},
		{"*.go", "main.go", "main.go"},
		{"*.go", "lib/main.go", ""},
		{"**/*.go", "main.go", "main.go"},
		{"**/*.go", "a/b/c.go", "a/b/c.go"},
		{"**/testdata/**", "a/testdata/x", "a/testdata/x"},
		{"svc/a lib", "docs/x.md lib/y.go", "lib/y.go"},
		{"** !docs/** !*.md", "docs/x.md README.md", ""},
		{"** !docs/**", "docs/x.md main.go", "main.go"},
		{"!docs", "docs/x.md", ""},
		{"!docs", "main.go", "main.go"},
		{"!docs docs/api", "docs/api/x.proto", "docs/api/x.proto"},
		{"!docs docs/api", "docs/x.md", ""},
		{"go.mod svc/a/**", "go.mod", "go.mod"},
		{"**", "x", "x"},
		{"[a-c]?.go", "b1.go", "b1.go"},
		{"[a-c]?.go", "d1.go", ""},
		{"**/**/**/**/**/**/**/**/x", strings.Repeat("a/", 200) + "y", ""},
	} {
		got, ok := Touches(strings.Fields(c.patterns), strings.Fields(c.changed))
		if got != c.want || ok != (c.want != "") {
			t.Errorf("Touches(%q, %q) = %q, %t, want %q", c.patterns, c.changed, got, ok, c.want)
		}
	}
}

func TestCheckPaths(t *testing.T) {
	if err := CheckPaths([]string{"svc/**", "!docs", "*.go", "a/[xy]/?"}); err != nil {
		t.Error(err)
	}
	for _, p := range []string{"", "!", "/", "/etc", "./a", "../a", "a/../b", "a/[", "!/x", strings.Repeat("x", 501)} {
		if err := CheckPaths([]string{p}); m3o.KindOf(err) != m3o.Invalid {
			t.Errorf("CheckPaths(%q) = %v", p, err)
		}
	}
	if err := CheckPaths(make([]string, 101)); m3o.KindOf(err) != m3o.Invalid {
		t.Errorf("101 patterns: %v", err)
	}
}

func FuzzTouches(f *testing.F) {
	f.Add("svc/**\n!docs/*", "svc/a.go\ndocs/b")
	f.Fuzz(func(t *testing.T, patterns, changed string) {
		ps := strings.Split(patterns, "\n")
		if CheckPaths(ps) != nil {
			return
		}
		file, ok := Touches(ps, strings.Split(changed, "\n"))
		if ok && !strings.Contains(changed, file) {
			t.Fatalf("Touches(%q, %q) = %q", patterns, changed, file)
		}
	})
}
