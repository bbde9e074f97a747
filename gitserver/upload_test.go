package gitserver

import (
	"archive/tar"
	"bytes"
	"io"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/m3o/m3o"
)

func tarOf(t testing.TB, entries ...tar.Header) *bytes.Buffer {
	t.Helper()
	var b bytes.Buffer
	tw := tar.NewWriter(&b)
	for _, h := range entries {
		text := "text of " + h.Name
		if h.Typeflag == tar.TypeReg {
			h.Size = int64(len(text))
		}
		if err := tw.WriteHeader(&h); err != nil {
			t.Fatal(err)
		}
		if h.Typeflag == tar.TypeReg {
			if _, err := io.WriteString(tw, text); err != nil {
				t.Fatal(err)
			}
		}
	}
	if err := tw.Close(); err != nil {
		t.Fatal(err)
	}
	return &b
}

func TestTarBecomesACommit(t *testing.T) {
	repo := filepath.Join(t.TempDir(), "app.git")
	if err := InitRepo(t.Context(), repo); err != nil {
		t.Fatal(err)
	}
	odd := "a \"b\"\nc"
	commit, err := CommitTar(t.Context(), repo, UploadRefs+"1", "ada <x>", "subject\n\nbody", tarOf(t,
		tar.Header{Typeflag: tar.TypeDir, Name: "dir/"}, tar.Header{Typeflag: tar.TypeReg, Name: "./dir/run", Mode: 0o755},
		tar.Header{Typeflag: tar.TypeReg, Name: odd, Mode: 0o600}, tar.Header{Typeflag: tar.TypeSymlink, Name: "link", Linkname: "dir/run"}))
	if err != nil {
		t.Fatal(err)
	}
	out, err := runGit(t.Context(), repo, nil, "", "ls-tree", "-r", "-z", "--format=%(objectmode) %(path)", commit)
	if err != nil || out != "100644 \"a \\\"b\\\"\\nc\"\x00100755 dir/run\x00120000 link\x00" {
		t.Errorf("tree %q, %v", out, err)
	}
	if out, err := runGit(t.Context(), repo, nil, "", "cat-file", "blob", commit+":dir/run"); err != nil || out != "text of ./dir/run" {
		t.Errorf("content %q, %v", out, err)
	}
	if got, err := Resolve(t.Context(), repo, commit[:12]); err != nil || got != commit {
		t.Errorf("Resolve = %s, %v", got, err)
	}
	for _, name := range []string{"", "nothing", "--all", "HEAD~1", "a..b", "x:y", "@{u}"} {
		if _, err := Resolve(t.Context(), repo, name); m3o.KindOf(err) != m3o.NotFound {
			t.Errorf("Resolve(%q) = %v", name, err)
		}
	}
	for name, r := range map[string]io.Reader{
		"nothing":   tarOf(t),
		"no tar":    strings.NewReader(strings.Repeat("x", 2000)),
		"leads out": tarOf(t, tar.Header{Typeflag: tar.TypeReg, Name: "../x"}),
		"absolute":  tarOf(t, tar.Header{Typeflag: tar.TypeReg, Name: "/etc/x"}),
		"git's own": tarOf(t, tar.Header{Typeflag: tar.TypeReg, Name: "sub/.GIT/config"}),
		"device":    tarOf(t, tar.Header{Typeflag: tar.TypeChar, Name: "null"}),
		"cut off":   bytes.NewReader(tarOf(t, tar.Header{Typeflag: tar.TypeReg, Name: "x"}).Bytes()[:520]),
	} {
		if c, err := CommitTar(t.Context(), repo, UploadRefs+"2", "ada", "x", r); m3o.KindOf(err) != m3o.Invalid {
			t.Errorf("%s: commit %q, %v", name, c, err)
		}
		if tip, err := Tip(t.Context(), repo, UploadRefs+"2"); err != nil || tip != "" {
			t.Errorf("%s left the ref at %s, %v", name, tip, err)
		}
	}
	for i := range 8 {
		if _, err := CommitTar(t.Context(), repo, UploadRefs+"n"+string(rune('a'+i)), "ada", "x", tarOf(t, tar.Header{Typeflag: tar.TypeReg, Name: string(rune('a' + i))})); err != nil {
			t.Fatal(err)
		}
	}
	if err := KeepUploads(t.Context(), repo, map[string]bool{commit: true}); err != nil {
		t.Fatal(err)
	}
	refs, err := runGit(t.Context(), repo, nil, "", "for-each-ref", UploadRefs)
	if n := strings.Count(refs, "\n"); err != nil || n < 5 || n > 6 || !strings.Contains(refs, commit) {
		t.Errorf("%d uploads are kept, %v:\n%s", n, err, refs)
	}
}

func FuzzUploadedTar(f *testing.F) {
	f.Add(tarOf(f, tar.Header{Typeflag: tar.TypeReg, Name: "a/b", Mode: 0o755}, tar.Header{Typeflag: tar.TypeSymlink, Name: "l", Linkname: "a"}).Bytes())
	f.Fuzz(func(t *testing.T, b []byte) {
		var out strings.Builder
		if err := fastImport(&out, UploadRefs+"1", "a\nb", "m", time.Unix(0, 0), bytes.NewReader(b)); err == nil && !strings.HasSuffix(out.String(), "\ndone\n") {
			t.Errorf("the stream does not end with done: %q", out.String())
		}
	})
}
