//go:build linux

package oci

import (
	"archive/tar"
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"sync"

	"github.com/containerd/containerd/v2/pkg/archive"
	"github.com/containerd/containerd/v2/pkg/archive/compression"
	"github.com/opencontainers/go-digest"
	"golang.org/x/sys/unix"

	"github.com/m3o/m3o"
	"github.com/m3o/m3o/internal/atomicfile"
	"github.com/m3o/m3o/runtime"
)

// layers are the unpacked layers of images, a directory each, shared by every
// image that has them: the lower directories of overlay mounts. Nobody writes
// to one again.
type layers struct {
	dir, images string
	boot        string // this boot's id

	// inUse is held for reading by who is about to mount layers and for
	// writing by prune.
	inUse sync.RWMutex

	mu      sync.Mutex // guards busy
	busy    map[string]chan struct{}
	syncing sync.WaitGroup
}

// maxLayer bounds what one layer may unpack to: a compressed one can be a bomb.
const maxLayer = 10 << 30

// The directory name is half of the digest: overlay's options must fit a page.
// 128 bits leave a stranger no way to make a layer that passes for another.
func layerName(diffID string) string { return strings.TrimPrefix(diffID, "sha256:")[:32] }

const unsynced = ".unsynced" // beside a layer that a power cut could still damage

func openLayers(dir, images, boot string) (*layers, error) {
	l := &layers{dir: dir, images: images, boot: boot, busy: map[string]chan struct{}{}}
	if err := os.MkdirAll(dir, 0o711); err != nil {
		return nil, fmt.Errorf("make layer directory: %w", err)
	}
	es, err := os.ReadDir(dir)
	if err != nil {
		return nil, fmt.Errorf("list layers: %w", err)
	}
	for _, e := range es {
		path := filepath.Join(dir, e.Name())
		if strings.HasPrefix(e.Name(), ".") { // an unpacking or removal that a crash cut short
			if err := os.RemoveAll(path); err != nil {
				return nil, fmt.Errorf("remove unfinished layer: %w", err)
			}
		}
		if name, ok := strings.CutSuffix(path, unsynced); ok {
			if b, err := os.ReadFile(path); err == nil && string(b) == boot {
				continue
			}
			if err := errors.Join(os.RemoveAll(name), os.Remove(path)); err != nil {
				return nil, fmt.Errorf("remove unsynced layer: %w", err)
			}
		}
	}
	return l, l.skeleton()
}

const skeletonName = "skeleton-1" // count up when skeleton makes something else

// skeleton makes the top layer of every root file system: the mount points,
// which cannot be made in a read-only root, as plain directories and files
// whatever the image has there.
func (l *layers) skeleton() error {
	dir := filepath.Join(l.dir, skeletonName)
	if _, err := os.Stat(dir); err == nil {
		return nil
	}
	tmp, err := os.MkdirTemp(l.dir, ".skeleton-")
	if err != nil {
		return fmt.Errorf("make skeleton: %w", err)
	}
	for _, d := range []string{"dev", "etc", "proc", "sys", "tmp"} {
		p := filepath.Join(tmp, d)
		if err := errors.Join(os.Mkdir(p, 0o755), os.Chmod(p, 0o755)); err != nil { // whatever the umask
			return fmt.Errorf("make skeleton: %w", err)
		}
	}
	for _, f := range []string{"hosts", "hostname", "resolv.conf"} {
		if err := os.WriteFile(filepath.Join(tmp, "etc", f), nil, 0o644); err != nil {
			return fmt.Errorf("make skeleton: %w", err)
		}
	}
	err = errors.Join(
		os.Chmod(filepath.Join(tmp, "tmp"), fs.ModeSticky|0o777),
		os.Chmod(tmp, 0o755),
		os.Rename(tmp, dir))
	if err != nil && !errors.Is(err, fs.ErrExist) {
		return fmt.Errorf("make skeleton: %w", err)
	}
	return nil
}

// lower unpacks what is missing of an image and returns the overlay's lower
// directories, top first. The caller holds inUse for reading until mounted.
func (l *layers) lower(ctx context.Context, im runtime.Image) (string, error) {
	dirs := []string{filepath.Join(l.dir, skeletonName)}
	for i := len(im.Layers) - 1; i >= 0; i-- {
		dirs = append(dirs, filepath.Join(l.dir, layerName(im.Layers[i].DiffID)))
	}
	for _, ly := range im.Layers {
		if err := l.ensure(ctx, ly); err != nil {
			return "", err
		}
	}
	if len(im.Layers) == 0 {
		return "", m3o.Errorf(m3o.Invalid, "the image has no layers: there is nothing to run")
	}
	s := strings.Join(dirs, ":")
	if len(s) > 4000 {
		return "", m3o.Errorf(m3o.Invalid, "the image has %d layers, too many to mount", len(im.Layers))
	}
	return s, nil
}

// ensure unpacks a layer once, however many ask at once.
func (l *layers) ensure(ctx context.Context, ly runtime.Layer) error {
	name := layerName(ly.DiffID)
	for {
		if _, err := os.Stat(filepath.Join(l.dir, name)); err == nil {
			return nil
		}
		l.mu.Lock()
		other := l.busy[name]
		if other == nil {
			l.busy[name] = make(chan struct{})
		}
		l.mu.Unlock()
		if other != nil {
			select {
			case <-other:
				continue
			case <-ctx.Done():
				return ctx.Err()
			}
		}
		err := l.unpack(ctx, ly, name)
		l.mu.Lock()
		close(l.busy[name])
		delete(l.busy, name)
		l.mu.Unlock()
		return err
	}
}

func (l *layers) unpack(ctx context.Context, ly runtime.Layer, name string) (err error) {
	path, err := runtime.BlobPath(l.images, ly.Digest)
	if err != nil {
		return err
	}
	f, err := os.Open(path)
	if errors.Is(err, fs.ErrNotExist) {
		return &m3o.Error{Kind: m3o.NotFound, Msg: fmt.Sprintf("layer %s is not in the image store", ly.Digest),
			Hint: "deploy the app again to rebuild its image", Err: err}
	} else if err != nil {
		return fmt.Errorf("open layer: %w", err)
	}
	defer f.Close() //nolint:errcheck // read only
	tmp, err := os.MkdirTemp(l.dir, ".unpack-")
	if err != nil {
		return fmt.Errorf("unpack layer: %w", err)
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, os.RemoveAll(tmp))
		}
	}()
	if err := apply(ctx, f, tmp, ly); err != nil {
		return err
	}
	final := filepath.Join(l.dir, name)
	if err := atomicfile.Write(final+unsynced, []byte(l.boot), 0o600); err != nil {
		return fmt.Errorf("unpack layer: %w", err)
	}
	if err := errors.Join(os.Chmod(tmp, 0o755), os.Rename(tmp, final)); err != nil {
		return fmt.Errorf("unpack layer: %w", err)
	}
	// Syncing takes longer than all else; the mark stands for it until done.
	l.syncing.Go(func() {
		if syncfs(final) == nil {
			_ = os.Remove(final + unsynced)
		}
	})
	return nil
}

func syncfs(path string) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close() //nolint:errcheck // read only
	return unix.Syncfs(int(f.Fd()))
}

// apply unpacks a layer blob into dir as overlayfs wants it and verifies the
// digests of the blob and of what it unpacks to.
func apply(ctx context.Context, blob io.Reader, dir string, ly runtime.Layer) error {
	blobSum, diffSum := digest.Digest(ly.Digest).Verifier(), digest.Digest(ly.DiffID).Verifier()
	raw := io.TeeReader(blob, blobSum)
	dec, err := compression.DecompressStream(raw)
	if err != nil {
		return damaged(ly, err)
	}
	defer dec.Close() //nolint:errcheck // read to its end below
	left := &io.LimitedReader{R: dec, N: maxLayer}
	content := io.TeeReader(left, diffSum)
	_, err = archive.Apply(ctx, dir, content, archive.WithConvertWhiteout(archive.OverlayConvertWhiteout),
		archive.WithFilter(func(h *tar.Header) (bool, error) {
			// An app runs as a user of its own, whoever the image's files are
			// of: what their owner may read and run, it may. Nothing else is
			// ever mounted together with this.
			h.Mode |= h.Mode>>3&0o050 | h.Mode>>6&0o005
			// The mount ignores devices; do not even make them.
			return h.Typeflag != tar.TypeChar && h.Typeflag != tar.TypeBlock, nil
		}))
	if ctx.Err() != nil {
		return ctx.Err()
	}
	if err == nil {
		_, err = io.Copy(io.Discard, content) // padding after the tar counts
	}
	if left.N <= 0 {
		return m3o.Errorf(m3o.Invalid, "layer %s unpacks to more than %d GB", ly.Digest, maxLayer>>30)
	}
	if errors.Is(err, unix.ENOSPC) {
		return &m3o.Error{Kind: m3o.Unavailable, Msg: "the disk is full: an image could not be unpacked", Hint: "free some space and try again", Err: err}
	}
	if err != nil {
		return damaged(ly, err)
	}
	if _, err := io.Copy(io.Discard, raw); err != nil {
		return damaged(ly, err)
	}
	if !blobSum.Verified() || !diffSum.Verified() {
		return damaged(ly, errors.New("its content has another digest"))
	}
	return nil
}

func damaged(ly runtime.Layer, err error) error {
	return &m3o.Error{Kind: m3o.Invalid, Msg: fmt.Sprintf("layer %s is damaged: %v", ly.Digest, err),
		Hint: "deploy the app again to rebuild its image", Err: err}
}

// prune removes every layer but those named.
func (l *layers) prune(keep map[string]bool) error {
	l.inUse.Lock()
	defer l.inUse.Unlock()
	es, err := os.ReadDir(l.dir)
	if err != nil {
		return fmt.Errorf("list layers: %w", err)
	}
	for _, e := range es {
		if b, err := hex.DecodeString(e.Name()); err != nil || len(b) != 16 || keep[e.Name()] {
			continue
		}
		// Renamed first: half a layer must not pass for one.
		doomed := filepath.Join(l.dir, ".remove-"+e.Name())
		if err := os.Rename(filepath.Join(l.dir, e.Name()), doomed); err != nil {
			return fmt.Errorf("remove layer: %w", err)
		}
		if err := os.RemoveAll(doomed); err != nil {
			return fmt.Errorf("remove layer: %w", err)
		}
	}
	return nil
}
