//go:build unix

package process

import (
	"archive/tar"
	"bufio"
	"compress/gzip"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"

	"github.com/m3o/m3o"
	"github.com/m3o/m3o/runtime"
)

// maxImage bounds what an image may unpack to: a compressed one can be a bomb.
const maxImage = 10 << 30

// unpacked is the directory an image is unpacked to, once.
func (d *Driver) unpacked(digest string, im runtime.Image) (string, error) {
	d.unpacking.Lock()
	defer d.unpacking.Unlock()
	dir := filepath.Join(d.cfg.Dir, "images", strings.TrimPrefix(digest, "sha256:"))
	if _, err := os.Stat(dir); err == nil {
		return dir, nil
	}
	tmp := dir + ".tmp"
	if err := errors.Join(os.RemoveAll(tmp), os.Mkdir(tmp, 0o700)); err != nil {
		return "", fmt.Errorf("unpack image: %w", err)
	}
	left := int64(maxImage)
	for _, l := range im.Layers {
		if err := d.layer(tmp, l, &left); err != nil {
			return "", errors.Join(fmt.Errorf("unpack image: %w", err), os.RemoveAll(tmp))
		}
	}
	if err := os.Rename(tmp, dir); err != nil {
		return "", fmt.Errorf("unpack image: %w", err)
	}
	return dir, nil
}

func (d *Driver) layer(dir string, l runtime.Layer, left *int64) error {
	p, err := runtime.BlobPath(d.cfg.Images, l.Digest)
	if err != nil {
		return err
	}
	f, err := os.Open(p)
	if errors.Is(err, fs.ErrNotExist) {
		return &m3o.Error{Kind: m3o.NotFound, Msg: fmt.Sprintf("layer %s is not in the image store", l.Digest),
			Hint: "deploy the app again to rebuild its image", Err: err}
	} else if err != nil {
		return err
	}
	defer f.Close() //nolint:errcheck // read only
	br := bufio.NewReader(f)
	var r io.Reader = br
	switch magic, _ := br.Peek(4); {
	case len(magic) > 1 && magic[0] == 0x1f && magic[1] == 0x8b:
		zr, err := gzip.NewReader(br)
		if err != nil {
			return m3o.Errorf(m3o.Invalid, "layer %s is damaged: %w", l.Digest, err)
		}
		r = zr
	case string(magic) == "\x28\xb5\x2f\xfd":
		return m3o.Errorf(m3o.Invalid, "layer %s is compressed with zstd, which the process driver does not read", l.Digest)
	}
	root, err := os.OpenRoot(dir)
	if err != nil {
		return err
	}
	defer root.Close() //nolint:errcheck // a descriptor
	sum := sha256.New()
	lim := &io.LimitedReader{R: r, N: *left}
	tee := io.TeeReader(lim, sum)
	if err := extract(root, tee); err != nil {
		return m3o.Errorf(m3o.Invalid, "layer %s cannot be unpacked: %w", l.Digest, err)
	}
	if _, err := io.Copy(io.Discard, tee); err != nil {
		return m3o.Errorf(m3o.Invalid, "layer %s is damaged: %w", l.Digest, err)
	}
	if *left = lim.N; *left <= 0 {
		return m3o.Errorf(m3o.Invalid, "the image unpacks to more than %d GB", maxImage>>30)
	}
	if "sha256:"+hex.EncodeToString(sum.Sum(nil)) != l.DiffID {
		return m3o.Errorf(m3o.Invalid, "layer %s is damaged: its content has another digest", l.Digest)
	}
	return nil
}

// extract applies a changeset to root, which nothing can lead out of: see
// os.Root. Whiteouts are those of
// https://github.com/opencontainers/image-spec/blob/v1.1.1/layer.md.
func extract(root *os.Root, r io.Reader) error {
	tr := tar.NewReader(r)
	made := map[string]bool{}
	for {
		h, err := tr.Next()
		if errors.Is(err, io.EOF) {
			return nil
		} else if err != nil {
			return err
		}
		name := strings.TrimPrefix(path.Clean("/"+h.Name), "/")
		if name == "" {
			continue
		}
		if err := entry(root, h, name, tr, made); err != nil {
			return fmt.Errorf("%s: %w", name, err)
		}
		made[name] = true
	}
}

func entry(root *os.Root, h *tar.Header, name string, r io.Reader, made map[string]bool) error {
	dir, base := path.Split(name)
	dir = path.Clean("./" + dir)
	if hidden, ok := strings.CutPrefix(base, ".wh."); ok {
		if base == ".wh..wh..opq" {
			return opaque(root, dir, made)
		}
		return root.RemoveAll(path.Join(dir, hidden))
	}
	if dir != "." {
		if err := root.MkdirAll(dir, 0o755); err != nil {
			return err
		}
	}
	if fi, err := root.Lstat(name); err == nil && !(fi.IsDir() && h.Typeflag == tar.TypeDir) {
		if err := root.RemoveAll(name); err != nil {
			return err
		}
	}
	mode := fs.FileMode(h.Mode) & 0o777
	switch h.Typeflag {
	case tar.TypeDir:
		if err := root.MkdirAll(name, 0o755); err != nil {
			return err
		}
		return root.Chmod(name, mode|0o700)
	case tar.TypeReg:
		f, err := root.OpenFile(name, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o600)
		if err != nil {
			return err
		}
		_, err = io.Copy(f, r)
		return errors.Join(err, f.Chmod(mode|0o400), f.Close())
	case tar.TypeSymlink:
		return root.Symlink(h.Linkname, name)
	case tar.TypeLink:
		return root.Link(strings.TrimPrefix(path.Clean("/"+h.Linkname), "/"), name)
	}
	return nil // devices and pipes take root, and no app needs them here
}

// opaque hides what lower layers have in dir.
func opaque(root *os.Root, dir string, made map[string]bool) error {
	d, err := root.Open(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	} else if err != nil {
		return err
	}
	names, err := d.Readdirnames(-1)
	if err = errors.Join(err, d.Close()); err != nil {
		return err
	}
	for _, n := range names {
		if p := path.Join(dir, n); !made[p] {
			if err := root.RemoveAll(p); err != nil {
				return err
			}
		}
	}
	return nil
}

// Prune removes the unpacked images but those of keep (manifest digests) and
// of what runs. It may be called at any time.
func (d *Driver) Prune(_ context.Context, keep []string) error {
	d.unpacking.Lock()
	defer d.unpacking.Unlock()
	keep = append(slices.Clone(keep), d.Images()...)
	es, err := os.ReadDir(filepath.Join(d.cfg.Dir, "images"))
	if err != nil {
		return fmt.Errorf("prune images: %w", err)
	}
	var errs []error
	for _, e := range es {
		if !slices.Contains(keep, "sha256:"+e.Name()) {
			errs = append(errs, os.RemoveAll(filepath.Join(d.cfg.Dir, "images", e.Name())))
		}
	}
	return errors.Join(errs...)
}
