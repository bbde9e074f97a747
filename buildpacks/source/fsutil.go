package source

import (
	"context"
	"errors"
	"io"
	"io/fs"
	"os"
	"path"
	"strings"

	"github.com/tonistiigi/fsutil"
	"github.com/tonistiigi/fsutil/types"
)

// FS is the tree as BuildKit wants it: parents before children, names of a
// directory in byte order, symlinks with their target, owner 0:0, and times
// that are equal where contents are. A file that cannot be read fails the
// transfer: fsutil would send it empty if Open reported that.
func (t *Tree) FS() fsutil.FS { return syncFS{t} }

type syncFS struct{ t *Tree }

// Walk implements fsutil.FS. target is "" or "/" for everything, else a path below which to stay.
func (s syncFS) Walk(ctx context.Context, target string, fn fs.WalkDirFunc) error {
	top := strings.Trim(path.Clean("/"+target), "/")
	if top == "" {
		return s.below(ctx, ".", fn)
	}
	e, ok := s.t.lookup(top)
	if !ok {
		return nil // as fsutil's own: what is not there is not walked
	}
	err := s.visit(ctx, top, e, fn)
	if errors.Is(err, fs.SkipDir) || errors.Is(err, fs.SkipAll) {
		return nil
	}
	return err
}

func (s syncFS) below(ctx context.Context, dir string, fn fs.WalkDirFunc) error {
	for _, e := range s.t.dirs[dir] {
		switch err := s.visit(ctx, path.Join(dir, e.name), e, fn); {
		case errors.Is(err, fs.SkipDir) && e.mode.IsDir():
		case errors.Is(err, fs.SkipDir):
			return nil // from a file: skip the rest of its directory
		case errors.Is(err, fs.SkipAll) && dir == ".":
			return nil
		case err != nil:
			return err
		}
	}
	return nil
}

func (s syncFS) visit(ctx context.Context, p string, e entry, fn fs.WalkDirFunc) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	st := &types.Stat{Path: p, Mode: uint32(e.mode), ModTime: e.mtime}
	switch {
	case e.mode&fs.ModeSymlink != 0:
		link, err := s.t.readlink(p, e)
		if err != nil {
			return &fs.PathError{Op: "readlink", Path: p, Err: err}
		}
		st.Linkname = link
	case !e.mode.IsDir():
		st.Size = e.size
	}
	if err := fn(p, statEntry{info{e, e.name}, st}, nil); err != nil {
		return err
	}
	if e.mode.IsDir() {
		return s.below(ctx, p, fn)
	}
	return nil
}

// Open implements fsutil.FS. Symlinks are not followed: BuildKit has them as symlinks.
func (s syncFS) Open(name string) (io.ReadCloser, error) {
	p := strings.Trim(path.Clean("/"+name), "/")
	e, ok := s.t.lookup(p)
	if !ok || e.mode.IsDir() {
		return broken{&os.PathError{Op: "open", Path: name, Err: fs.ErrNotExist}}, nil
	}
	r, err := s.t.blobs.open(p, e)
	if err != nil {
		return broken{&os.PathError{Op: "open", Path: name, Err: err}}, nil
	}
	return r, nil
}

// broken is a file whose first Read says why it cannot be read.
type broken struct{ err error }

func (b broken) Read([]byte) (int, error) { return 0, b.err }
func (b broken) Close() error             { return nil }

// statEntry is a directory entry whose Sys is the *types.Stat fsutil sends.
type statEntry struct {
	info
	stat *types.Stat
}

func (s statEntry) Type() fs.FileMode          { return s.e.mode.Type() }
func (s statEntry) Info() (fs.FileInfo, error) { return s, nil }
func (s statEntry) Sys() any                   { return s.stat }
