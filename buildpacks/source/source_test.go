package source

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/fstest"

	"github.com/go-git/go-git/v5/plumbing"
	"github.com/m3o/m3o"
	"github.com/m3o/m3o/internal/need"
	"github.com/tonistiigi/fsutil"
	"github.com/tonistiigi/fsutil/types"
)

type repo struct {
	t          *testing.T
	work, bare string
}

func newRepo(t *testing.T) *repo {
	need.Program(t, "git")
	r := &repo{t: t, work: t.TempDir(), bare: filepath.Join(t.TempDir(), "with space", "app.git")}
	r.git("", "init", "-q", "-b", "main", ".")
	r.git("", "init", "-q", "--bare", r.bare)
	return r
}

func (r *repo) git(stdin string, args ...string) string {
	r.t.Helper()
	cmd := exec.Command("git", args...)
	cmd.Dir, cmd.Stdin = r.work, strings.NewReader(stdin)
	cmd.Env = append(os.Environ(), "GIT_CONFIG_GLOBAL=/dev/null", "GIT_CONFIG_NOSYSTEM=1",
		"GIT_AUTHOR_NAME=Ada", "GIT_AUTHOR_EMAIL=ada@example.com", "GIT_COMMITTER_NAME=Bob", "GIT_COMMITTER_EMAIL=bob@example.com",
		"GIT_AUTHOR_DATE=2026-01-02T03:04:05Z", "GIT_COMMITTER_DATE=2026-02-03T04:05:06Z")
	out, err := cmd.CombinedOutput()
	if err != nil {
		r.t.Fatalf("git %v: %v\n%s", args, err, out)
	}
	return strings.TrimSpace(string(out))
}

func (r *repo) write(name, text string) {
	r.t.Helper()
	p := filepath.Join(r.work, name)
	if err := os.MkdirAll(filepath.Dir(p), 0o755); err != nil {
		r.t.Fatal(err)
	}
	if err := os.WriteFile(p, []byte(text), 0o644); err != nil {
		r.t.Fatal(err)
	}
}

// push commits the work tree and puts it into the bare repository.
func (r *repo) push(msg string) m3o.Source {
	r.t.Helper()
	r.git("", "add", "-A")
	r.git("", "commit", "-q", "--allow-empty", "-m", msg)
	r.git("", "push", "-q", r.bare, "HEAD:refs/heads/main")
	return m3o.Source{App: "app", Repo: r.bare, Commit: r.git("", "rev-parse", "HEAD")}
}

func open(t *testing.T, src m3o.Source, c *Cache) *Tree {
	t.Helper()
	tree, err := Open(t.Context(), src, c)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := tree.Close(); err != nil {
			t.Error(err)
		}
	})
	return tree
}

func (r *repo) sample() m3o.Source {
	r.write("go.mod", "module x\n")
	r.write("a/b/deep.txt", "deep")
	r.write("a.txt", "a")    // git sorts a.txt before a/, fsutil wants a first
	r.write("a-b/x", "dash") // and a-b between them
	r.write("empty", "")
	r.write("run.sh", "#!/bin/sh\n")
	if err := os.Chmod(filepath.Join(r.work, "run.sh"), 0o755); err != nil {
		r.t.Fatal(err)
	}
	for link, to := range map[string]string{"link": "a/b/deep.txt", "out": "../../etc/passwd", "abs": "/etc/passwd", "dirlink": "a/b", "loop": "loop"} {
		if err := os.Symlink(to, filepath.Join(r.work, link)); err != nil {
			r.t.Fatal(err)
		}
	}
	return r.push("First line of it\n\nand a body")
}

func TestTreeIsAFileSystem(t *testing.T) {
	r := newRepo(t)
	r.write("go.mod", "module x\n")
	r.write("a/b/deep.txt", "deep")
	r.write("a.txt", "a")
	if err := os.Symlink("a/b/deep.txt", filepath.Join(r.work, "link")); err != nil {
		t.Fatal(err)
	}
	tree := open(t, r.push("x"), nil)
	if err := fstest.TestFS(tree, "go.mod", "a/b/deep.txt", "a.txt", "link"); err != nil {
		t.Error(err)
	}
	disk, err := Dir(t.Context(), r.work)
	if err != nil {
		t.Fatal(err)
	}
	defer disk.Close()
	if err := fstest.TestFS(disk, "go.mod", "a/b/deep.txt", "a.txt", "link"); err != nil {
		t.Error(err)
	}
	if _, err := disk.Stat(".git"); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("Stat .git = %v, want not there", err)
	}
}

func TestCommit(t *testing.T) {
	src := newRepo(t).sample()
	tree := open(t, src, nil)
	if got, want := tree.Subject(), "First line of it"; got != want {
		t.Errorf("Subject = %q, want %q", got, want)
	}
	if got, want := tree.Author(), "Ada <ada@example.com>"; got != want {
		t.Errorf("Author = %q, want %q", got, want)
	}
	if got, want := tree.Time().UTC().String(), "2026-02-03 04:05:06 +0000 UTC"; got != want {
		t.Errorf("Time = %s, want %s", got, want)
	}
	if tree.Commit() != src.Commit {
		t.Errorf("Commit = %s, want %s", tree.Commit(), src.Commit)
	}
}

func TestSymlinksStayInside(t *testing.T) {
	tree := open(t, newRepo(t).sample(), nil)
	for name, want := range map[string]string{"link": "deep", "dirlink/deep.txt": "deep"} {
		if b, err := tree.ReadFile(name); err != nil || string(b) != want {
			t.Errorf("ReadFile(%s) = %q, %v, want %q", name, b, err, want)
		}
	}
	for _, name := range []string{"out", "abs", "loop", "out/x", "empty/x", "../x", "/go.mod"} {
		if b, err := tree.ReadFile(name); err == nil {
			t.Errorf("ReadFile(%s) = %q, want an error", name, b)
		}
	}
}

// A push is read from its quarantine, and what it does not hold from the repository.
func TestReadsQuarantineFirst(t *testing.T) {
	r := newRepo(t)
	r.sample()
	r.write("new/file.go", "package new")
	r.git("", "add", "-A")
	r.git("", "commit", "-q", "-m", "second")
	src := m3o.Source{App: "app", Repo: r.bare, Commit: r.git("", "rev-parse", "HEAD")}
	if _, err := Open(t.Context(), src, nil); m3o.KindOf(err) != m3o.NotFound {
		t.Fatalf("Open without the quarantine = %v, want not found", err)
	}
	// Once as loose objects, once as a pack, as git keeps small and large pushes.
	for _, form := range []string{"unpack-objects", "index-pack"} {
		src.Quarantine = filepath.Join(r.bare, "objects", "tmp_objdir-incoming-"+form)
		if err := os.MkdirAll(filepath.Join(src.Quarantine, "pack"), 0o755); err != nil {
			t.Fatal(err)
		}
		args := "-q"
		if form == "index-pack" {
			args = "--stdin --fix-thin"
		}
		script := fmt.Sprintf("printf 'HEAD\\n^HEAD~\\n' | git pack-objects -q --revs --thin --stdout | GIT_DIR='%s' GIT_OBJECT_DIRECTORY='%s' GIT_ALTERNATE_OBJECT_DIRECTORIES='\"%s/objects\"' git %s %s",
			r.bare, src.Quarantine, r.bare, form, args)
		cmd := exec.Command("sh", "-c", script)
		cmd.Dir = r.work
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Fatalf("%v\n%s", err, out)
		}
		tree := open(t, src, nil)
		for name, want := range map[string]string{"new/file.go": "package new", "a/b/deep.txt": "deep", "empty": ""} {
			if b, err := tree.ReadFile(name); err != nil || string(b) != want {
				t.Errorf("%s: ReadFile(%s) = %q, %v, want %q", form, name, b, err, want)
			}
		}
	}
}

// stats walks as fsutil does.
func stats(t *testing.T, f fsutil.FS) []*types.Stat {
	t.Helper()
	var out []*types.Stat
	err := f.Walk(t.Context(), "/", func(p string, de fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		fi, err := de.Info()
		if err != nil {
			return err
		}
		out = append(out, fi.Sys().(*types.Stat))
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return out
}

func TestWalkOrderAndStats(t *testing.T) {
	tree := open(t, newRepo(t).sample(), nil)
	var paths []string
	var v fsutil.Validator
	for _, st := range stats(t, tree.FS()) {
		paths = append(paths, st.Path)
		if err := v.HandleChange(fsutil.ChangeKindAdd, st.Path, &fsutil.StatInfo{Stat: st}, nil); err != nil {
			t.Errorf("fsutil refuses the order: %v", err)
		}
		switch {
		case st.Path == "link" && (st.Linkname != "a/b/deep.txt" || st.Size != 0):
			t.Errorf("link: %v", st)
		case st.Path == "run.sh" && (st.Mode != 0o755 || st.Size != 10):
			t.Errorf("run.sh: %v", st)
		}
	}
	want := []string{"a", "a/b", "a/b/deep.txt", "a-b", "a-b/x", "a.txt", "abs", "dirlink", "empty", "go.mod", "link", "loop", "out", "run.sh"}
	slices.SortFunc(want, func(a, b string) int {
		return strings.Compare(strings.ReplaceAll(a, "/", "\x00"), strings.ReplaceAll(b, "/", "\x00"))
	})
	if !slices.Equal(paths, want) {
		t.Errorf("walked %v\n  want %v", paths, want)
	}
}

// Equal size and mode must not hide a change, and an unchanged file must not look changed.
func TestSameSizeEditIsSeen(t *testing.T) {
	r := newRepo(t)
	r.write("a.go", "one")
	r.write("b.go", "two")
	var c Cache
	before := stats(t, open(t, r.push("1"), &c).FS())
	r.write("a.go", "eno")
	after := stats(t, open(t, r.push("2"), &c).FS())
	if before[0].ModTime == after[0].ModTime {
		t.Error("a.go changed and kept its time")
	}
	if before[1].ModTime != after[1].ModTime {
		t.Error("b.go did not change and its time did")
	}
}

type pipe struct {
	ctx  context.Context
	r, w chan []byte
}

func (p *pipe) Context() context.Context { return p.ctx }
func (p *pipe) SendMsg(m any) error {
	b, err := m.(*types.Packet).MarshalVT()
	if err != nil {
		return err
	}
	select {
	case p.w <- b:
		return nil
	case <-p.ctx.Done():
		return p.ctx.Err()
	}
}
func (p *pipe) RecvMsg(m any) error {
	select {
	case b, ok := <-p.r:
		if !ok {
			return io.EOF
		}
		return m.(*types.Packet).UnmarshalVT(b)
	case <-p.ctx.Done():
		return p.ctx.Err()
	}
}

// send copies f to dest through fsutil's protocol and returns the first error of either end.
func send(t *testing.T, f fsutil.FS, dest string) error {
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	there, back := make(chan []byte, 64), make(chan []byte, 64)
	errs := make(chan error, 2)
	var wg sync.WaitGroup
	wg.Go(func() {
		err := fsutil.Send(ctx, &pipe{ctx, back, there}, f, nil)
		if err != nil {
			errs <- err
			cancel()
		}
		close(there)
	})
	wg.Go(func() {
		err := fsutil.Receive(ctx, &pipe{ctx, there, back}, dest, fsutil.ReceiveOpt{})
		if err != nil {
			errs <- err
			cancel()
		}
	})
	wg.Wait()
	close(errs)
	return <-errs
}

func TestSentTreeEqualsTheCommit(t *testing.T) {
	need.Root(t) // fsutil sets owners
	r := newRepo(t)
	r.sample()
	r.write("big.bin", strings.Repeat("0123456789abcdef", (maxInMemory+1<<20)/16)) // streamed, not through the batch
	src := r.push("big")
	dest := t.TempDir()
	if err := send(t, open(t, src, nil).FS(), dest); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command("diff", "-r", "--no-dereference", "--exclude=.git", r.work, dest)
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Errorf("differs from the commit: %v\n%s", err, out)
	}
	if fi, err := os.Stat(filepath.Join(dest, "run.sh")); err != nil || fi.Mode().Perm() != 0o755 {
		t.Errorf("run.sh: %v, %v", fi, err)
	}
}

// fsutil sends a file empty when Open fails; a build must not go on with that.
func TestUnreadableBlobIsNotEmpty(t *testing.T) {
	r := newRepo(t)
	r.write("main.go", "package main")
	src := r.push("x")
	tree := open(t, src, nil)
	h := r.git("", "rev-parse", "HEAD:main.go")
	if err := os.Remove(filepath.Join(r.bare, "objects", h[:2], h[2:])); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"main.go", "missing.go"} {
		f, err := tree.FS().Open(name)
		if err != nil {
			t.Fatalf("Open(%s) = %v, which fsutil would ignore", name, err)
		}
		if b, err := io.ReadAll(f); err == nil {
			t.Errorf("read %q of %s", b, name)
		}
		if err := f.Close(); err != nil {
			t.Error(err)
		}
	}
	if _, err := tree.ReadFile("main.go"); err == nil {
		t.Error("ReadFile of a missing blob succeeded")
	}
}

func TestSubmodulesAreSkippedAndReported(t *testing.T) {
	r := newRepo(t)
	r.write("go.mod", "module x\n")
	r.git("", "add", "-A")
	r.git("", "update-index", "--add", "--cacheinfo", "160000,"+strings.Repeat("1", 40)+",third/party")
	r.git("", "commit", "-q", "-m", "x")
	r.git("", "push", "-q", r.bare, "HEAD:refs/heads/main")
	var c Cache
	for range 2 { // the second time from the cache
		tree := open(t, m3o.Source{Repo: r.bare, Commit: r.git("", "rev-parse", "HEAD")}, &c)
		if got := tree.Submodules(); !slices.Equal(got, []string{"third/party"}) {
			t.Errorf("Submodules = %v", got)
		}
		if _, err := tree.Stat("third/party"); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("Stat = %v", err)
		}
	}
}

// Ten trees of ten entries each, nested, name 10^10 files in 12 objects.
func TestTreeBombIsRefused(t *testing.T) {
	r := newRepo(t)
	blob := r.git("x", "hash-object", "-w", "--stdin")
	line := "100644 blob " + blob
	for range 10 {
		var in strings.Builder
		for i := range 10 {
			fmt.Fprintf(&in, "%s\tf%d\n", line, i)
		}
		line = "040000 tree " + r.git(in.String(), "mktree")
	}
	root := strings.Fields(line)[2]
	commit := r.git("", "commit-tree", "-m", "bomb", root)
	_, err := Open(t.Context(), m3o.Source{Repo: filepath.Join(r.work, ".git"), Commit: commit}, nil)
	if m3o.KindOf(err) != m3o.Invalid || !strings.Contains(err.Error(), "more than 50000 files") {
		t.Errorf("Open = %v", err)
	}
}

func TestBadTreesAreRefused(t *testing.T) {
	r := newRepo(t)
	blob := r.git("x", "hash-object", "-w", "--stdin")
	raw := plumbing.NewHash(blob)
	for _, name := range []string{"..", ".", "a/b"} {
		in := "100644 " + name + "\x00" + string(raw[:])
		tree := r.git(in, "hash-object", "-t", "tree", "-w", "--literally", "--stdin")
		commit := r.git("", "commit-tree", "-m", "bad", tree)
		if _, err := Open(t.Context(), m3o.Source{Repo: filepath.Join(r.work, ".git"), Commit: commit}, nil); m3o.KindOf(err) != m3o.Invalid {
			t.Errorf("a tree with %q: %v, want an Invalid error", name, err)
		}
	}
	for _, commit := range []string{"", "main", "../../x", strings.Repeat("z", 40)} {
		if _, err := Open(t.Context(), m3o.Source{Repo: r.bare, Commit: commit}, nil); m3o.KindOf(err) != m3o.Invalid {
			t.Errorf("commit %q: %v, want an Invalid error", commit, err)
		}
	}
}

func TestConcurrentReads(t *testing.T) {
	r := newRepo(t)
	want := map[string][]byte{}
	for i := range 50 {
		name := fmt.Sprintf("f%02d", i)
		want[name] = bytes.Repeat([]byte(name), 1+i*997)
		r.write(name, string(want[name]))
	}
	src := r.push("x")
	r.git("", "-C", r.bare, "repack", "-adq") // one pack with deltas
	tree := open(t, src, nil)
	var wg sync.WaitGroup
	for range 8 {
		wg.Go(func() {
			for name, w := range want {
				if b, err := tree.ReadFile(name); err != nil || !bytes.Equal(b, w) {
					t.Errorf("%s: %d bytes, %v, want %d", name, len(b), err, len(w))
				}
			}
		})
	}
	wg.Wait()
}

func TestCacheIsBoundedAndRight(t *testing.T) {
	c := &Cache{max: 10}
	for i := range 100 {
		var h [20]byte
		h[0] = byte(i)
		c.put(h, listing{entries: make([]entry, 3)})
		if c.size > 10 {
			t.Fatalf("holds %d entries, want at most 10", c.size)
		}
	}
	if _, ok := c.get([20]byte{99}); !ok {
		t.Error("the newest is gone")
	}
	if _, ok := c.get([20]byte{1}); ok {
		t.Error("the oldest is there")
	}
}

func FuzzTreeObject(f *testing.F) {
	f.Add([]byte("100644 a\x0001234567890123456789"))
	f.Add([]byte("40000 ..\x0001234567890123456789"))
	f.Add([]byte("160000 sub\x0001234567890123456789120000 l\x0001234567890123456789"))
	f.Fuzz(func(t *testing.T, b []byte) {
		o := &plumbing.MemoryObject{}
		o.SetType(plumbing.TreeObject)
		if _, err := o.Write(b); err != nil {
			t.Fatal(err)
		}
		l, err := parseTree(".", o, func(plumbing.Hash) (int64, error) { return 1, nil })
		if err != nil {
			return
		}
		for i, e := range l.entries {
			if !fs.ValidPath(e.name) || strings.Contains(e.name, "/") || e.name == "." {
				t.Errorf("entry %q", e.name)
			}
			if i > 0 && l.entries[i-1].name >= e.name {
				t.Errorf("%q before %q", l.entries[i-1].name, e.name)
			}
		}
	})
}
