package build

import (
	"archive/tar"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"io/fs"
	"time"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/tonistiigi/fsutil/types"
)

// epoch is the time of every file in a layer and of every image: equal input
// gives equal digests. It is not 1970, which some tools take for "unknown".
var epoch = time.Unix(1_000_000_000, 0).UTC()

// A layer is written as an uncompressed tar straight into a content store:
// compressing one costs ten times what writing it does, and it never leaves
// the machine in this form.
type layer struct {
	cs   content.Store
	ref  string
	w    content.Writer
	tw   *tar.Writer
	n    int64
	dirs map[string]bool
}

// newLayer begins a layer. ref names the unfinished write; two at once need two names.
func newLayer(ctx context.Context, cs content.Store, ref string) (*layer, error) {
	w, err := content.OpenWriter(ctx, cs, content.WithRef(ref), content.WithDescriptor(v1.Descriptor{MediaType: v1.MediaTypeImageLayer}))
	if err != nil {
		return nil, fmt.Errorf("write layer: %w", err)
	}
	// A write of that name left by a killed process is begun anew.
	if err := w.Truncate(0); err != nil {
		_ = w.Close()
		return nil, fmt.Errorf("write layer: %w", err)
	}
	l := &layer{cs: cs, ref: ref, w: w, dirs: map[string]bool{}}
	l.tw = tar.NewWriter(l)
	return l, nil
}

// Write takes the tar stream.
func (l *layer) Write(p []byte) (int, error) {
	n, err := l.w.Write(p)
	l.n += int64(n)
	return n, err
}

// dir adds a directory once. Parents come first, by the caller's order.
func (l *layer) dir(name string, mode int64) error {
	if l.dirs[name] {
		return nil
	}
	l.dirs[name] = true
	return l.tw.WriteHeader(&tar.Header{Typeflag: tar.TypeDir, Name: name + "/", Mode: mode, ModTime: epoch, Format: tar.FormatPAX})
}

func (l *layer) file(name string, mode, size int64, r io.Reader) error {
	h := &tar.Header{Typeflag: tar.TypeReg, Name: name, Mode: mode, Size: size, ModTime: epoch, Format: tar.FormatPAX}
	if err := l.tw.WriteHeader(h); err != nil {
		return err
	}
	_, err := io.Copy(l.tw, r)
	return err
}

func (l *layer) symlink(name, target string) error {
	return l.tw.WriteHeader(&tar.Header{Typeflag: tar.TypeSymlink, Name: name, Linkname: target, Mode: 0o777, ModTime: epoch, Format: tar.FormatPAX})
}

// linkTarget is where a symlink of a source tree leads.
func linkTarget(fi fs.FileInfo) string {
	if st, ok := fi.Sys().(*types.Stat); ok {
		return st.Linkname
	}
	return ""
}

// commit ends the layer. A layer with that content may exist already.
func (l *layer) commit(ctx context.Context) (v1.Descriptor, error) {
	if err := l.tw.Close(); err != nil {
		return v1.Descriptor{}, fmt.Errorf("write layer: %w", err)
	}
	d := v1.Descriptor{MediaType: v1.MediaTypeImageLayer, Digest: l.w.Digest(), Size: l.n}
	// The store would sync the copy to disk before it finds out that it has
	// one. Its Close syncs, too: what is empty takes no time.
	if ok, err := content.Exists(ctx, l.cs, d); err == nil && ok {
		_ = l.w.Truncate(0)
		l.close()
		return d, l.cs.Abort(ctx, l.ref)
	}
	if err := l.w.Commit(ctx, l.n, d.Digest); err != nil && !errdefs.IsAlreadyExists(err) {
		return v1.Descriptor{}, fmt.Errorf("write layer: %w", err)
	}
	return d, nil
}

// close frees an unfinished layer's descriptor; after commit it does nothing.
func (l *layer) close() { _ = l.w.Close() }

// putJSON stores v as a blob.
func putJSON(ctx context.Context, cs content.Store, mediaType string, v any) (v1.Descriptor, error) {
	b, err := json.Marshal(v)
	if err != nil {
		return v1.Descriptor{}, err
	}
	return putBlob(ctx, cs, mediaType, b)
}

func putBlob(ctx context.Context, cs content.Store, mediaType string, b []byte) (v1.Descriptor, error) {
	d := v1.Descriptor{MediaType: mediaType, Digest: digest.FromBytes(b), Size: int64(len(b))}
	if ok, err := content.Exists(ctx, cs, d); err != nil || ok {
		return d, err
	}
	w, err := content.OpenWriter(ctx, cs, content.WithRef("blob-"+d.Digest.Encoded()), content.WithDescriptor(d))
	if errdefs.IsAlreadyExists(err) {
		return d, nil
	}
	if err != nil {
		return d, fmt.Errorf("write blob: %w", err)
	}
	defer w.Close() //nolint:errcheck // committed or dropped
	if err := w.Truncate(0); err != nil {
		return d, fmt.Errorf("write blob: %w", err)
	}
	if _, err := w.Write(b); err != nil {
		return d, fmt.Errorf("write blob: %w", err)
	}
	if err := w.Commit(ctx, d.Size, d.Digest); err != nil && !errdefs.IsAlreadyExists(err) {
		return d, fmt.Errorf("write blob: %w", err)
	}
	return d, nil
}

// putImage stores an image's config and manifest over layers that are there already.
func putImage(ctx context.Context, cs content.Store, platform v1.Platform, config v1.ImageConfig, annotations map[string]string, layers ...v1.Descriptor) (v1.Descriptor, error) {
	img := v1.Image{Created: &epoch, Platform: platform, Config: config, RootFS: v1.RootFS{Type: "layers"}}
	for _, l := range layers {
		img.RootFS.DiffIDs = append(img.RootFS.DiffIDs, l.Digest) // uncompressed: one digest for both
	}
	c, err := putJSON(ctx, cs, v1.MediaTypeImageConfig, img)
	if err != nil {
		return v1.Descriptor{}, err
	}
	return putJSON(ctx, cs, v1.MediaTypeImageManifest, v1.Manifest{
		Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: v1.MediaTypeImageManifest,
		Config: c, Layers: layers, Annotations: annotations,
	})
}
