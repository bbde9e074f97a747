package build

import (
	"archive/tar"
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"slices"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/opencontainers/go-digest"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"
)

// Compare lists what two images of the store differ in: files by name, then
// config and annotations. It is empty if they are the same.
func (b *Builder) Compare(ctx context.Context, one, other string) ([]string, error) {
	if one == other {
		return nil, nil
	}
	m1, i1, err := b.readImage(ctx, digest.Digest(one))
	if err != nil {
		return nil, err
	}
	m2, i2, err := b.readImage(ctx, digest.Digest(other))
	if err != nil {
		return nil, err
	}
	var out []string
	f1, err := b.files(ctx, m1.Layers, m2.Layers)
	if err != nil {
		return nil, err
	}
	f2, err := b.files(ctx, m2.Layers, m1.Layers)
	if err != nil {
		return nil, err
	}
	names := maps.Clone(f1)
	maps.Copy(names, f2)
	for _, n := range slices.Sorted(maps.Keys(names)) {
		switch a, c := f1[n], f2[n]; {
		case a == "":
			out = append(out, "/"+n+": only in the rebuilt image")
		case c == "":
			out = append(out, "/"+n+": only in the release's image")
		case a != c:
			out = append(out, "/"+n+": differs")
		}
	}
	if fmt.Sprint(i1.Config) != fmt.Sprint(i2.Config) {
		out = append(out, "image config: differs")
	}
	if !maps.Equal(m1.Annotations, m2.Annotations) {
		out = append(out, "annotations: differ")
	}
	if len(out) == 0 {
		out = append(out, "the order or form of the layers differs")
	}
	return out, nil
}

// files are the entries of those layers that are not in but, each with a text
// that is equal where they are.
func (b *Builder) files(ctx context.Context, layers, but []v1.Descriptor) (map[string]string, error) {
	out := map[string]string{}
	for _, l := range layers {
		if slices.ContainsFunc(but, func(o v1.Descriptor) bool { return o.Digest == l.Digest }) || l.MediaType != v1.MediaTypeImageLayer {
			continue
		}
		if err := b.entries(ctx, l, out); err != nil {
			return nil, fmt.Errorf("read layer %s: %w", l.Digest, err)
		}
	}
	return out, nil
}

func (b *Builder) entries(ctx context.Context, l v1.Descriptor, out map[string]string) error {
	ra, err := b.images.ReaderAt(ctx, l)
	if err != nil {
		return err
	}
	defer ra.Close() //nolint:errcheck // read only
	for tr := tar.NewReader(content.NewReader(ra)); ; {
		h, err := tr.Next()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
		d, err := digest.FromReader(tr)
		if err != nil {
			return err
		}
		out[h.Name] = fmt.Sprintf("%c %o %d:%d %d %s %s", h.Typeflag, h.Mode, h.Uid, h.Gid, h.ModTime.Unix(), h.Linkname, d)
	}
}
