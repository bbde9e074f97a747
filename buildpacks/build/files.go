package build

import (
	"context"
	"fmt"
	"io/fs"
	"path"
	"slices"
	"strings"

	"github.com/m3o/m3o"
	"github.com/m3o/m3o/buildpacks"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"
)

// filesLayer writes the files of the tree that a plan wants in the image. They
// come straight from the tree: BuildKit would carry them there and back.
func (b *Builder) filesLayer(ctx context.Context, req Request) (v1.Descriptor, error) {
	files, err := chosen(ctx, req)
	if err != nil {
		return v1.Descriptor{}, err
	}
	l, err := newLayer(ctx, b.images, fmt.Sprintf("files-layer-%d", layerNumber.Add(1)))
	if err != nil {
		return v1.Descriptor{}, err
	}
	defer l.close()
	for _, f := range files {
		if err := l.add(req, f); err != nil {
			return v1.Descriptor{}, fmt.Errorf("write %s: %w", f.name, err)
		}
	}
	return b.pin(func() (v1.Descriptor, error) { return l.commit(ctx) })
}

// A treeFile is a file that goes into the image.
type treeFile struct {
	tree, name string // in the tree; in the image
	entry      fs.DirEntry
}

// chosen lists the files that a plan's patterns match, sorted by name.
func chosen(ctx context.Context, req Request) ([]treeFile, error) {
	used := make([]bool, len(req.Plan.Copy))
	var out []treeFile
	err := req.Tree.FS().Walk(ctx, "", func(p string, e fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		rel, below := relative(req.Plan.Dir, p)
		if e.IsDir() || !below {
			return nil
		}
		for i, pattern := range req.Plan.Copy {
			if covers(pattern, rel) {
				used[i] = true
				out = append(out, treeFile{tree: p, name: path.Join(strings.TrimPrefix(buildpacks.AppDir, "/"), rel), entry: e})
				return nil
			}
		}
		return nil
	})
	if err != nil {
		return nil, fmt.Errorf("read source: %w", err)
	}
	if i := slices.Index(used, false); i >= 0 {
		return nil, &m3o.Error{Kind: m3o.Invalid, Msg: fmt.Sprintf("%s: build.files %q matches no file of the repository", buildpacks.ManifestName, req.Plan.Copy[i]),
			Hint: "commit the files, correct the name, or remove the item"}
	}
	slices.SortFunc(out, func(a, b treeFile) int { return strings.Compare(a.name, b.name) })
	return out, nil
}

func relative(dir, p string) (string, bool) {
	if dir == "." || dir == "" {
		return p, true
	}
	return strings.CutPrefix(p, dir+"/")
}

// covers reports whether a pattern names a file or a folder it is in.
func covers(pattern, name string) bool {
	for pattern = path.Clean(pattern); name != "."; name = path.Dir(name) {
		if pattern == "." {
			return true
		}
		if ok, err := path.Match(pattern, name); err == nil && ok {
			return true
		}
	}
	return false
}

// add writes one file of the tree and the folders it is in.
func (l *layer) add(req Request, f treeFile) error {
	for i, c := range f.name {
		if c == '/' {
			if err := l.dir(f.name[:i], 0o755); err != nil {
				return err
			}
		}
	}
	fi, err := f.entry.Info()
	if err != nil {
		return err
	}
	if fi.Mode()&fs.ModeSymlink != 0 {
		return l.symlink(f.name, linkTarget(fi))
	}
	r, err := req.Tree.FS().Open(f.tree)
	if err != nil {
		return err
	}
	defer r.Close() //nolint:errcheck // read only
	return l.file(f.name, int64(0o644|fi.Mode().Perm()&0o111), fi.Size(), r)
}
