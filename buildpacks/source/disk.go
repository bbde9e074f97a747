package source

import (
	"context"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"strings"
)

// Dir is the tree of a directory on disk as it is now, without .git, sockets,
// devices and pipes, within the same limits. Times are those of the files.
func Dir(ctx context.Context, name string) (*Tree, error) {
	root, err := os.OpenRoot(name)
	if err != nil {
		return nil, fmt.Errorf("open source directory: %w", err)
	}
	t := &Tree{blobs: diskFiles{root}}
	rfs := root.FS()
	t.dirs, err = walk(ctx, func(p string, _ int) ([]entry, error) {
		des, err := fs.ReadDir(rfs, p)
		if err != nil {
			return nil, err
		}
		var es []entry
		for _, de := range des {
			if de.Name() == ".git" {
				continue
			}
			fi, err := de.Info()
			if err != nil {
				return nil, err
			}
			e := entry{name: de.Name(), size: fi.Size(), mtime: fi.ModTime().UnixNano()}
			switch {
			case fi.IsDir():
				e.mode, e.size = fs.ModeDir|0o755, 0
			case fi.Mode()&fs.ModeSymlink != 0:
				e.mode = fs.ModeSymlink | 0o777
			case fi.Mode().IsRegular() && fi.Mode()&0o111 != 0:
				e.mode = 0o755
			case fi.Mode().IsRegular():
				e.mode = 0o644
			default:
				continue
			}
			es = append(es, e)
		}
		return es, nil
	})
	if err != nil {
		_ = root.Close()
		return nil, fmt.Errorf("list %s: %w", name, err)
	}
	return t, nil
}

type diskFiles struct{ root *os.Root }

func (d diskFiles) open(name string, e entry) (io.ReadCloser, error) {
	if e.mode&fs.ModeSymlink != 0 {
		link, err := d.root.Readlink(name)
		if err != nil {
			return nil, err
		}
		return io.NopCloser(strings.NewReader(link)), nil
	}
	// The path's last element is no symlink: the listing said so, and os.Root
	// keeps a later change from leading out of the directory.
	return d.root.Open(path.Clean(name))
}

func (d diskFiles) Close() error { return d.root.Close() }
