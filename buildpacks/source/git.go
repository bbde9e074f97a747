package source

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"

	"github.com/go-git/go-billy/v5"
	"github.com/go-git/go-billy/v5/osfs"
	"github.com/go-git/go-git/v5/plumbing"
	"github.com/go-git/go-git/v5/plumbing/cache"
	"github.com/go-git/go-git/v5/plumbing/filemode"
	"github.com/go-git/go-git/v5/plumbing/object"
	"github.com/go-git/go-git/v5/storage/filesystem"
	"github.com/m3o/m3o"
)

// Open reads the tree of src.Commit, looking for objects in src.Quarantine
// first and then in src.Repo. c may be nil; one Cache shared by all pushes
// makes the listing cost what changed. The error is Invalid for a tree beyond
// the limits and NotFound for a commit that is not there. The caller closes
// the Tree before it removes the quarantine.
func Open(ctx context.Context, src m3o.Source, c *Cache) (*Tree, error) {
	if !plumbing.IsHash(src.Commit) {
		return nil, m3o.Errorf(m3o.Invalid, "%q is not a commit hash", src.Commit)
	}
	if c == nil {
		c = &Cache{}
	}
	st, err := openStores(src)
	if err != nil {
		return nil, err
	}
	// All listing happens here, on one goroutine: go-git's storage is not safe
	// for concurrent reads once it keeps packs open.
	defer st.close()
	co, err := st.commit(plumbing.NewHash(src.Commit))
	if err != nil {
		return nil, err
	}
	t := &Tree{commit: commit{
		hash:    src.Commit,
		subject: subject(co.Message),
		message: co.Message[:min(len(co.Message), maxMessage)],
		author:  fmt.Sprintf("%s <%s>", co.Author.Name, co.Author.Email),
		when:    co.Committer.When,
	}}
	root := co.TreeHash
	if src.Tree != "" {
		root = plumbing.NewHash(src.Tree)
	}
	hashes := map[string]plumbing.Hash{".": root}
	t.dirs, err = walk(ctx, func(p string, _ int) ([]entry, error) {
		l, ok := c.get(hashes[p])
		if !ok {
			var err error
			if l, err = st.list(p, hashes[p]); err != nil {
				return nil, err
			}
			c.put(hashes[p], l)
		}
		for _, e := range l.entries {
			if e.mode.IsDir() {
				hashes[path.Join(p, e.name)] = e.hash
			}
		}
		for _, s := range l.submodules {
			t.submodules = append(t.submodules, path.Join(p, s))
		}
		return l.entries, nil
	})
	if err != nil {
		return nil, err
	}
	t.blobs = newCatFile(src)
	return t, nil
}

// maxMessage is what is kept of a commit's message.
const maxMessage = 64 << 10

func subject(msg string) string {
	s, _, _ := strings.Cut(strings.TrimSpace(msg), "\n")
	return strings.TrimSpace(s)
}

// stores is the quarantine, if there is one, then the repository. go-git's own
// alternates are not used: they open the other store anew for each object.
type stores struct{ ordered []*filesystem.ObjectStorage }

func openStores(src m3o.Source) (*stores, error) {
	var s stores
	for _, objects := range objectDirs(src) {
		if fi, err := os.Stat(objects); err != nil || !fi.IsDir() {
			s.close()
			return nil, m3o.Errorf(m3o.NotFound, "no git objects at %s", objects)
		}
		s.ordered = append(s.ordered, &filesystem.NewStorageWithOptions(
			objectsFS{osfs.New(objects, osfs.WithBoundOS())},
			cache.NewObjectLRU(8*cache.MiByte),
			filesystem.Options{KeepDescriptors: true}).ObjectStorage)
	}
	return &s, nil
}

// objectDirs lists the object directories in the order they are read.
func objectDirs(src m3o.Source) []string {
	repo := filepath.Join(src.Repo, "objects")
	if src.Quarantine == "" {
		return []string{repo}
	}
	return []string{src.Quarantine, repo}
}

func (s *stores) close() {
	for _, o := range s.ordered {
		_ = o.Close()
	}
}

func (s *stores) object(t plumbing.ObjectType, h plumbing.Hash) (plumbing.EncodedObject, error) {
	for _, o := range s.ordered {
		obj, err := o.EncodedObject(t, h)
		if err == nil || !errors.Is(err, plumbing.ErrObjectNotFound) {
			return obj, err
		}
	}
	return nil, plumbing.ErrObjectNotFound
}

func (s *stores) size(h plumbing.Hash) (int64, error) {
	for _, o := range s.ordered {
		n, err := o.EncodedObjectSize(h)
		if err == nil || !errors.Is(err, plumbing.ErrObjectNotFound) {
			return n, err
		}
	}
	return 0, plumbing.ErrObjectNotFound
}

func (s *stores) commit(h plumbing.Hash) (*object.Commit, error) {
	obj, err := s.object(plumbing.CommitObject, h)
	if errors.Is(err, plumbing.ErrObjectNotFound) {
		return nil, &m3o.Error{Kind: m3o.NotFound, Msg: fmt.Sprintf("no commit %s", h), Err: err}
	}
	if err != nil {
		return nil, fmt.Errorf("read commit %s: %w", h, err)
	}
	var c object.Commit
	if err := c.Decode(obj); err != nil {
		return nil, fmt.Errorf("read commit %s: %w", h, err)
	}
	return &c, nil
}

// list reads one directory. Entries come sorted by name, bytewise, which is
// the order fsutil wants; git's own order sorts "a" after "a.b" if a is a directory.
func (s *stores) list(dir string, h plumbing.Hash) (listing, error) {
	obj, err := s.object(plumbing.TreeObject, h)
	if err != nil {
		return listing{}, fmt.Errorf("read tree of %s: %w", dir, err)
	}
	return parseTree(dir, obj, s.size)
}

func parseTree(dir string, obj plumbing.EncodedObject, size func(plumbing.Hash) (int64, error)) (listing, error) {
	var l listing
	var t object.Tree
	if err := t.Decode(obj); err != nil {
		return l, fmt.Errorf("read tree of %s: %w", dir, err)
	}
	for _, te := range t.Entries {
		if err := checkName(dir, te.Name); err != nil {
			return l, err
		}
		e := entry{name: te.Name, hash: te.Hash, mtime: mtime(te.Hash)}
		switch te.Mode {
		case filemode.Submodule:
			l.submodules = append(l.submodules, te.Name)
			continue
		case filemode.Dir:
			e.mode, e.mtime = fs.ModeDir|0o755, 1_000_000_000*1e9
		case filemode.Symlink:
			e.mode = fs.ModeSymlink | 0o777
		case filemode.Executable:
			e.mode = 0o755
		default:
			e.mode = 0o644
		}
		if !e.mode.IsDir() {
			n, err := size(te.Hash)
			if err != nil {
				return l, fmt.Errorf("read size of %s: %w", path.Join(dir, te.Name), err)
			}
			e.size = n
		}
		l.entries = append(l.entries, e)
	}
	slices.SortFunc(l.entries, func(a, b entry) int { return strings.Compare(a.name, b.name) })
	for i := 1; i < len(l.entries); i++ {
		if l.entries[i].name == l.entries[i-1].name {
			return l, m3o.Errorf(m3o.Invalid, "the tree has %s twice", path.Join(dir, l.entries[i].name))
		}
	}
	return l, nil
}

// mtime derives a time from the content's hash: BuildKit compares size, mode
// and mtime to decide what to ask for, so equal content must have an equal
// time in every commit and different content a different one. Directories get
// a constant: their time says nothing and would be sent again for every change
// below them. The result lies between 2001 and 2017.
func mtime(h plumbing.Hash) int64 {
	sec := int64(1_000_000_000) + int64(binary.BigEndian.Uint32(h[:4])%500_000_000)
	return sec*1e9 + int64(binary.BigEndian.Uint32(h[4:8])%1_000_000_000)
}

// objectsFS shows an object directory as the objects folder of a repository,
// which is how go-git wants it; a quarantine has no repository around it.
type objectsFS struct{ billy.Filesystem }

func (o objectsFS) at(p string) string {
	if rest, ok := strings.CutPrefix(filepath.ToSlash(p), "objects"); ok {
		return strings.TrimPrefix(rest, "/")
	}
	return filepath.Join("no-such-folder", p)
}

func (o objectsFS) Open(p string) (billy.File, error) { return o.Filesystem.Open(o.at(p)) }
func (o objectsFS) OpenFile(p string, flag int, perm os.FileMode) (billy.File, error) {
	return o.Filesystem.OpenFile(o.at(p), flag, perm)
}
func (o objectsFS) Stat(p string) (os.FileInfo, error)      { return o.Filesystem.Stat(o.at(p)) }
func (o objectsFS) Lstat(p string) (os.FileInfo, error)     { return o.Filesystem.Lstat(o.at(p)) }
func (o objectsFS) ReadDir(p string) ([]os.FileInfo, error) { return o.Filesystem.ReadDir(o.at(p)) }
