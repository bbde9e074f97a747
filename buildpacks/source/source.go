// Package source reads the tree of one commit straight from a git object
// store, with no checkout: as an io/fs.FS for whoever plans a build and as an
// fsutil.FS for BuildKit, which then asks for changed files only. The objects
// of a push are read from their quarantine first. The package knows nothing
// of languages, builds or releases.
package source

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"path"
	"slices"
	"strings"
	"time"

	"github.com/m3o/m3o"
)

// The limits on a tree. A push beyond them is refused before anything is built.
const (
	MaxFiles = 50_000  // entries, directories included
	MaxBytes = 4 << 30 // sum of the file sizes
	maxDepth = 250     // directories below each other; also keeps paths far below PATH_MAX
)

// A Tree is the file tree of one commit, or of a directory on disk. It lists
// everything when it is opened and reads contents on demand. Its methods are
// safe for concurrent use. Submodules are not part of it.
type Tree struct {
	dirs       map[string][]entry // by slash path, "." the root; sorted by name
	submodules []string
	blobs      blobs
	commit     commit
}

var (
	_ fs.ReadFileFS = (*Tree)(nil)
	_ fs.ReadDirFS  = (*Tree)(nil)
	_ fs.StatFS     = (*Tree)(nil)
	_ fs.ReadLinkFS = (*Tree)(nil)
)

type commit struct {
	hash, subject, message, author string
	when                           time.Time
}

// An entry is one name in a directory. It is immutable: listings are shared
// by all trees through a Cache.
type entry struct {
	name  string
	mode  fs.FileMode
	hash  [20]byte
	size  int64
	mtime int64 // ns since 1970
}

// blobs reads contents. Implementations are safe for concurrent use.
type blobs interface {
	open(name string, e entry) (io.ReadCloser, error)
	Close() error
}

// Close frees what reading needs. Files still open must not be read any more.
func (t *Tree) Close() error { return t.blobs.Close() }

// Commit is the commit's hash in hex, "" for a directory.
func (t *Tree) Commit() string { return t.commit.hash }

// Subject is the first line of the commit's message, "" for a directory.
func (t *Tree) Subject() string { return t.commit.subject }

// Message is the commit's whole message, of a very long one the beginning.
func (t *Tree) Message() string { return t.commit.message }

// Author is who wrote the commit, as "Name <address>", "" for a directory.
func (t *Tree) Author() string { return t.commit.author }

// Time is when the commit was made, the zero time for a directory.
func (t *Tree) Time() time.Time { return t.commit.when }

// Submodules lists the paths where the tree refers to a commit of another
// repository. They hold nothing here.
func (t *Tree) Submodules() []string { return slices.Clone(t.submodules) }

// Len is the number of entries, directories included.
func (t *Tree) Len() int {
	n := 0
	for _, es := range t.dirs {
		n += len(es)
	}
	return n
}

// lookup finds the entry of a valid slash path without following a symlink at its end.
func (t *Tree) lookup(name string) (entry, bool) {
	if name == "." {
		return entry{name: ".", mode: fs.ModeDir | 0o755}, true
	}
	es := t.dirs[path.Dir(name)]
	i, ok := slices.BinarySearchFunc(es, path.Base(name), func(e entry, s string) int { return strings.Compare(e.name, s) })
	if !ok {
		return entry{}, false
	}
	return es[i], true
}

// resolve follows symlinks of any path element, inside the tree only.
func (t *Tree) resolve(op, name string) (string, entry, error) {
	fail := func(err error) (string, entry, error) {
		return "", entry{}, &fs.PathError{Op: op, Path: name, Err: err}
	}
	if !fs.ValidPath(name) {
		return fail(fs.ErrInvalid)
	}
	at, rest := ".", name
	for hops := 0; rest != "" && rest != "."; {
		first, more, _ := strings.Cut(rest, "/")
		p := path.Join(at, first)
		e, ok := t.lookup(p)
		if !ok {
			return fail(fs.ErrNotExist)
		}
		if e.mode&fs.ModeSymlink == 0 {
			at, rest = p, more
			continue
		}
		if hops++; hops > 40 {
			return fail(errors.New("too many symbolic links"))
		}
		link, err := t.readlink(p, e)
		if err != nil {
			return fail(err)
		}
		full := path.Join(at, link, more)
		if path.IsAbs(link) || !fs.ValidPath(full) {
			// Outside the tree there is nothing, whatever the machine has there.
			return fail(fs.ErrNotExist)
		}
		at, rest = ".", full
	}
	e, ok := t.lookup(at)
	if !ok {
		return fail(fs.ErrNotExist)
	}
	return at, e, nil
}

func (t *Tree) readlink(name string, e entry) (string, error) {
	const maxLink = 4096 // PATH_MAX: longer ones cannot exist on disk
	if e.size > maxLink {
		return "", fmt.Errorf("symbolic link target is %d bytes", e.size)
	}
	r, err := t.blobs.open(name, e)
	if err != nil {
		return "", err
	}
	defer r.Close() //nolint:errcheck // read only
	b, err := io.ReadAll(io.LimitReader(r, maxLink))
	return string(b), err
}

// Open implements fs.FS. Symlinks are followed inside the tree; one that leads
// out of it does not exist.
func (t *Tree) Open(name string) (fs.File, error) {
	p, e, err := t.resolve("open", name)
	if err != nil {
		return nil, err
	}
	fi := info{e, path.Base(name)}
	if e.mode.IsDir() {
		return &dir{info: fi, path: name, rest: t.list(p)}, nil
	}
	r, err := t.blobs.open(p, e)
	if err != nil {
		return nil, &fs.PathError{Op: "open", Path: name, Err: err}
	}
	return &file{info: fi, ReadCloser: r}, nil
}

// ReadFile implements fs.ReadFileFS.
func (t *Tree) ReadFile(name string) ([]byte, error) {
	p, e, err := t.resolve("read", name)
	if err != nil {
		return nil, err
	}
	if e.mode.IsDir() {
		return nil, &fs.PathError{Op: "read", Path: name, Err: errors.New("is a directory")}
	}
	r, err := t.blobs.open(p, e)
	if err != nil {
		return nil, &fs.PathError{Op: "read", Path: name, Err: err}
	}
	defer r.Close() //nolint:errcheck // read only
	b := make([]byte, e.size)
	if _, err := io.ReadFull(r, b); err != nil {
		return nil, &fs.PathError{Op: "read", Path: name, Err: err}
	}
	return b, nil
}

// ReadDir implements fs.ReadDirFS.
func (t *Tree) ReadDir(name string) ([]fs.DirEntry, error) {
	p, e, err := t.resolve("readdir", name)
	if err != nil {
		return nil, err
	}
	if !e.mode.IsDir() {
		return nil, &fs.PathError{Op: "readdir", Path: name, Err: errors.New("not a directory")}
	}
	return t.list(p), nil
}

func (t *Tree) list(p string) []fs.DirEntry {
	es := t.dirs[p]
	out := make([]fs.DirEntry, len(es))
	for i, e := range es {
		out[i] = fs.FileInfoToDirEntry(info{e, e.name})
	}
	return out
}

// Stat implements fs.StatFS.
func (t *Tree) Stat(name string) (fs.FileInfo, error) {
	_, e, err := t.resolve("stat", name)
	if err != nil {
		return nil, err
	}
	return info{e, path.Base(name)}, nil
}

// Lstat implements fs.ReadLinkFS.
func (t *Tree) Lstat(name string) (fs.FileInfo, error) {
	_, e, err := t.last("lstat", name)
	if err != nil {
		return nil, err
	}
	return info{e, path.Base(name)}, nil
}

// ReadLink implements fs.ReadLinkFS.
func (t *Tree) ReadLink(name string) (string, error) {
	p, e, err := t.last("readlink", name)
	if err != nil {
		return "", err
	}
	if e.mode&fs.ModeSymlink == 0 {
		return "", &fs.PathError{Op: "readlink", Path: name, Err: fs.ErrInvalid}
	}
	return t.readlink(p, e)
}

// last resolves all but the last element of name.
func (t *Tree) last(op, name string) (string, entry, error) {
	if !fs.ValidPath(name) {
		return "", entry{}, &fs.PathError{Op: op, Path: name, Err: fs.ErrInvalid}
	}
	p, _, err := t.resolve(op, path.Dir(name))
	if err != nil {
		return "", entry{}, err
	}
	p = path.Join(p, path.Base(name))
	e, ok := t.lookup(p)
	if !ok {
		return "", entry{}, &fs.PathError{Op: op, Path: name, Err: fs.ErrNotExist}
	}
	return p, e, nil
}

type info struct {
	e    entry
	name string
}

func (i info) Name() string       { return i.name }
func (i info) Size() int64        { return i.e.size }
func (i info) Mode() fs.FileMode  { return i.e.mode }
func (i info) ModTime() time.Time { return time.Unix(0, i.e.mtime) }
func (i info) IsDir() bool        { return i.e.mode.IsDir() }
func (i info) Sys() any           { return nil }

type file struct {
	info
	io.ReadCloser
}

func (f *file) Stat() (fs.FileInfo, error) { return f.info, nil }

type dir struct {
	info
	path string
	rest []fs.DirEntry
}

func (d *dir) Stat() (fs.FileInfo, error) { return d.info, nil }
func (d *dir) Close() error               { return nil }
func (d *dir) Read([]byte) (int, error) {
	return 0, &fs.PathError{Op: "read", Path: d.path, Err: errors.New("is a directory")}
}

func (d *dir) ReadDir(n int) ([]fs.DirEntry, error) {
	if n <= 0 || n >= len(d.rest) {
		out := d.rest
		d.rest = nil
		if n > 0 && len(out) == 0 {
			return nil, io.EOF
		}
		return out, nil
	}
	out := d.rest[:n]
	d.rest = d.rest[n:]
	return out, nil
}

// A quota counts entries and bytes against the limits while a tree is listed.
type quota struct {
	files int
	bytes int64
}

func (q *quota) add(es []entry) error {
	q.files += len(es)
	for _, e := range es {
		q.bytes += e.size
	}
	switch {
	case q.files > MaxFiles:
		return &m3o.Error{Kind: m3o.Invalid, Msg: fmt.Sprintf("the tree has more than %d files", MaxFiles),
			Hint: "remove what the build does not need, such as vendored assets or test data"}
	case q.bytes > MaxBytes:
		return &m3o.Error{Kind: m3o.Invalid, Msg: fmt.Sprintf("the files of the tree are larger than %d GB together", MaxBytes>>30),
			Hint: "keep large files out of the repository"}
	}
	return nil
}

func checkName(dir, name string) error {
	if name == "" || name == "." || name == ".." || strings.ContainsAny(name, "/\x00") {
		return m3o.Errorf(m3o.Invalid, "the tree has a file called %q in %s", name, dir)
	}
	return nil
}

// walk calls each for every directory, parents first.
func walk(ctx context.Context, list func(p string, depth int) ([]entry, error)) (map[string][]entry, error) {
	dirs := map[string][]entry{}
	var q quota
	var visit func(p string, depth int) error
	visit = func(p string, depth int) error {
		if err := ctx.Err(); err != nil {
			return err
		}
		if depth > maxDepth {
			return m3o.Errorf(m3o.Invalid, "the tree has more than %d directories inside each other", maxDepth)
		}
		es, err := list(p, depth)
		if err != nil {
			return err
		}
		if err := q.add(es); err != nil {
			return err
		}
		dirs[p] = es
		for _, e := range es {
			if e.mode.IsDir() {
				if err := visit(path.Join(p, e.name), depth+1); err != nil {
					return err
				}
			}
		}
		return nil
	}
	return dirs, visit(".", 0)
}
