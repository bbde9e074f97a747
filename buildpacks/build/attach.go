package build

import (
	"context"
	"fmt"
	"slices"
	"time"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/m3o/m3o"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"
)

// An Attachment is something about an image that travels with it: an OCI
// artifact whose subject is the image, as registries and their tools know
// them. The image's own digest does not change.
type Attachment struct {
	Type      string // artifact type
	MediaType string // of Data
	Data      []byte
}

// The index's annotations of an attachment: what it belongs to, and its type.
const (
	attachedTo = "io.m3o.subject"
	attachedAs = "io.m3o.type"
)

// Attach stores a for an image, in place of what was attached to it with the
// same type. It goes when Prune removes the image.
func (b *Builder) Attach(ctx context.Context, image string, a Attachment) error {
	d, err := digest.Parse(image)
	if err != nil {
		return m3o.Errorf(m3o.Invalid, "%q is not a digest", image)
	}
	b.store.Lock()
	defer b.store.Unlock()
	info, err := b.images.Info(ctx, d)
	if err != nil {
		return fmt.Errorf("attach to %s: %w", d, err)
	}
	m, err := b.putArtifact(ctx, v1.Descriptor{MediaType: v1.MediaTypeImageManifest, Digest: d, Size: info.Size}, a)
	if err != nil {
		return fmt.Errorf("attach to %s: %w", d, disk(err))
	}
	ms, err := b.readIndex()
	if err != nil {
		return err
	}
	ms = slices.DeleteFunc(ms, func(o v1.Descriptor) bool {
		return o.Annotations[attachedTo] == image && o.Annotations[attachedAs] == a.Type
	})
	m.ArtifactType = a.Type
	m.Annotations = map[string]string{builtAt: time.Now().UTC().Format(time.RFC3339), attachedTo: image, attachedAs: a.Type}
	return b.writeIndex(append(ms, m))
}

func (b *Builder) putArtifact(ctx context.Context, subject v1.Descriptor, a Attachment) (v1.Descriptor, error) {
	data, err := putBlob(ctx, b.images, a.MediaType, a.Data)
	if err != nil {
		return v1.Descriptor{}, err
	}
	empty := v1.DescriptorEmptyJSON
	if _, err := putBlob(ctx, b.images, empty.MediaType, empty.Data); err != nil {
		return v1.Descriptor{}, err
	}
	return putJSON(ctx, b.images, v1.MediaTypeImageManifest, v1.Manifest{
		Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: v1.MediaTypeImageManifest, ArtifactType: a.Type,
		Config: empty, Layers: []v1.Descriptor{data}, Subject: &subject,
	})
}

// Attached is what is attached to an image with that type; an error of kind
// NotFound when nothing is.
func (b *Builder) Attached(ctx context.Context, image, typ string) ([]byte, error) {
	b.store.Lock()
	defer b.store.Unlock()
	ms, err := b.readIndex()
	if err != nil {
		return nil, err
	}
	i := slices.IndexFunc(ms, func(m v1.Descriptor) bool {
		return m.Annotations[attachedTo] == image && m.Annotations[attachedAs] == typ
	})
	if i < 0 {
		return nil, m3o.Errorf(m3o.NotFound, "nothing of type %s is attached to %s", typ, image)
	}
	var m v1.Manifest
	if err := b.readJSON(ctx, ms[i].Digest, &m); err != nil {
		return nil, err
	}
	if len(m.Layers) != 1 {
		return nil, fmt.Errorf("read attachment %s: it has %d parts", ms[i].Digest, len(m.Layers))
	}
	return content.ReadBlob(ctx, b.images, m.Layers[0])
}
