package build

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"io/fs"
	"path"
	goruntime "runtime"
	"strings"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/m3o/m3o"
	"github.com/opencontainers/go-digest"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"
)

const maxDocument = 4 << 20 // of a manifest, index or config

// readImage reads a manifest of the image store and its config.
func (b *Builder) readImage(ctx context.Context, d digest.Digest) (m v1.Manifest, img v1.Image, err error) {
	if m, err = manifestFor(ctx, b.images, &d); err != nil {
		return m, img, err
	}
	j, err := content.ReadBlob(ctx, b.images, m.Config)
	if err == nil {
		err = json.Unmarshal(j, &img)
	}
	if err != nil {
		return m, img, fmt.Errorf("read image config: %w", err)
	}
	return m, img, nil
}

// manifestFor reads a manifest, or the one for this machine out of an index;
// d becomes its digest.
func manifestFor(ctx context.Context, cs content.Provider, d *digest.Digest) (v1.Manifest, error) {
	for range 3 {
		var doc struct {
			v1.Manifest
			Manifests []v1.Descriptor `json:"manifests"`
		}
		j, err := content.ReadBlob(ctx, cs, v1.Descriptor{Digest: *d})
		if err == nil && len(j) > maxDocument {
			err = m3o.Errorf(m3o.Invalid, "the manifest is larger than 4 MB")
		}
		if err == nil {
			err = json.Unmarshal(j, &doc)
		}
		if err != nil {
			return doc.Manifest, fmt.Errorf("read image %s: %w", *d, err)
		}
		if doc.Config.Digest != "" {
			return doc.Manifest, nil
		}
		next, err := forHere(doc.Manifests)
		if err != nil {
			return doc.Manifest, err
		}
		*d = next
	}
	return v1.Manifest{}, m3o.Errorf(m3o.Invalid, "the image is an index of indexes of indexes")
}

// forHere picks the image for this machine out of an index.
func forHere(ms []v1.Descriptor) (digest.Digest, error) {
	for _, m := range ms {
		if m.Digest.Validate() == nil && (m.Platform == nil || m.Platform.OS == platformO && m.Platform.Architecture == goruntime.GOARCH) {
			return m.Digest, nil
		}
	}
	return "", &m3o.Error{Kind: m3o.Invalid, Msg: fmt.Sprintf("the image has no variant for %s/%s", platformO, goruntime.GOARCH), Hint: "build it for this platform and try again"}
}

// layoutInTree copies the blobs of an OCI layout that is a folder of the tree
// into the toolchains' store, where BuildKit can fetch them by digest.
func (b *Builder) layoutInTree(ctx context.Context, req Request, dir string) (digest.Digest, content.Store, error) {
	fail := func(format string, args ...any) error {
		return &m3o.Error{Kind: m3o.Invalid, Msg: fmt.Sprintf("%s is not an OCI image layout: ", dir) + fmt.Sprintf(format, args...),
			Hint: "make one, for example by: skopeo copy docker://IMAGE oci:" + dir}
	}
	var index v1.Index
	cs := b.toolchains.store
	seen := false
	err := req.Tree.FS().Walk(ctx, dir, func(p string, e fs.DirEntry, err error) error {
		if err != nil || e.IsDir() {
			return err
		}
		rel, _ := relative(dir, p)
		hex, isBlob := strings.CutPrefix(rel, "blobs/sha256/")
		if !isBlob && rel != v1.ImageIndexFile {
			return nil
		}
		r, err := req.Tree.FS().Open(p)
		if err != nil {
			return err
		}
		defer r.Close() //nolint:errcheck // read only
		if !isBlob {
			seen = true
			j, err := readLimited(r, maxDocument)
			if err == nil {
				err = json.Unmarshal(j, &index)
			}
			if err != nil {
				return fail("%s: %v", path.Join(dir, rel), err)
			}
			return nil
		}
		d := digest.NewDigestFromEncoded(digest.SHA256, hex)
		if d.Validate() != nil {
			return fail("%s has no name of a blob", rel)
		}
		fi, err := e.Info()
		if err != nil {
			return err
		}
		return putStream(ctx, cs, v1.Descriptor{Digest: d, Size: fi.Size()}, r)
	})
	if err != nil {
		return "", nil, err
	}
	if !seen {
		return "", nil, fail("there is no %s", v1.ImageIndexFile)
	}
	d, err := forHere(index.Manifests)
	if err != nil {
		return "", nil, err
	}
	if _, err := manifestFor(ctx, cs, &d); err != nil {
		return "", nil, fail("%v", err)
	}
	return d, cs, nil
}

// putStream stores a blob and checks its digest.
func putStream(ctx context.Context, cs content.Store, d v1.Descriptor, r io.Reader) error {
	if ok, err := content.Exists(ctx, cs, d); err != nil || ok {
		return err
	}
	err := content.WriteBlob(ctx, cs, fmt.Sprintf("blob-%s-%d", d.Digest.Encoded(), layerNumber.Add(1)), r, d)
	if err != nil {
		return fmt.Errorf("write blob %s: %w", d.Digest, err)
	}
	return nil
}
