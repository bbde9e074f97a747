package protobuf

import (
	"io/fs"
	"strings"
	"testing"
	"testing/fstest"

	"github.com/m3o/m3o"
	"github.com/rogpeppe/go-internal/txtar"
	"google.golang.org/protobuf/types/descriptorpb"
)

// tree is a file system of a txtar text.
func tree(text string) fstest.MapFS {
	t := fstest.MapFS{}
	for _, f := range txtar.Parse([]byte(text)).Files {
		t[f.Name] = &fstest.MapFile{Data: f.Data}
	}
	return t
}

func compileTree(t testing.TB, fsys fs.FS, dir string) (*Result, error) {
	t.Helper()
	s, err := Find(fsys, dir)
	if err != nil {
		return nil, err
	}
	return Compile(t.Context(), s)
}

func mustCompile(t testing.TB, fsys fs.FS, dir string) *Result {
	t.Helper()
	r, err := compileTree(t, fsys, dir)
	if err != nil {
		t.Fatal(err)
	}
	return r
}

// setOf compiles one text; without a file header it is a.proto.
func setOf(t testing.TB, text string) *descriptorpb.FileDescriptorSet {
	t.Helper()
	if !strings.HasPrefix(text, "-- ") {
		text = "-- a.proto --\n" + text
	}
	return mustCompile(t, tree(text), ".").Set
}

// wantInvalid checks that err is of kind Invalid and says each of the words.
func wantInvalid(t testing.TB, err error, words ...string) {
	t.Helper()
	if err == nil {
		t.Fatalf("no error, want one with %q", words)
	}
	if k := m3o.KindOf(err); k != m3o.Invalid {
		t.Errorf("kind %v, want %v: %v", k, m3o.Invalid, err)
	}
	all := err.Error() + "\n" + m3o.HintOf(err)
	for _, w := range words {
		if !strings.Contains(all, w) {
			t.Errorf("the error does not say %q:\n%s", w, all)
		}
	}
}

func names(s Sources) string {
	var all []string
	for _, f := range s.Files {
		all = append(all, f.Name+"="+f.Path)
	}
	return strings.Join(all, " ")
}
