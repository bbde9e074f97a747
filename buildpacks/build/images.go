package build

import (
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	goruntime "runtime"
	"strings"
	"sync"
	"time"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/m3o/m3o"
	"github.com/m3o/m3o/internal/atomicfile"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"
)

// Who runs a binary that asks for no other user, and where the image keeps
// what Go programs look for.
const (
	nonroot   = "65532"
	caFile    = "etc/ssl/certs/ca-certificates.crt"
	zoneFile  = "usr/share/zoneinfo.zip"
	platformO = "linux"
)

func platform() v1.Platform { return v1.Platform{OS: platformO, Architecture: goruntime.GOARCH} }

// baseLayers are the layers that do not depend on an app.
type baseLayers struct {
	mu   sync.Mutex
	made map[[32]byte]v1.Descriptor // by content
	// settings is the last layer of the image steps run in, once it is made.
	settings v1.Descriptor
}

// runtimeLayer is what every image begins with: CA roots, time zones, the
// nonroot user, and the mount points a runtime wants.
func (b *Builder) runtimeLayer(ctx context.Context, cs content.Store, tc toolchain) (v1.Descriptor, error) {
	var ca []byte
	if b.cfg.CACerts != "" {
		var err error
		if ca, err = os.ReadFile(b.cfg.CACerts); err != nil {
			return v1.Descriptor{}, fmt.Errorf("read CA certificates: %w", err)
		}
	}
	zones, err := content.ReadBlob(ctx, b.toolchains.store, tc.ZoneInfo)
	if err != nil {
		return v1.Descriptor{}, fmt.Errorf("read time zones: %w", err)
	}
	key := sha256.Sum256(append(fmt.Appendf(nil, "%p %s ", cs, tc.ZoneInfo.Digest), ca...))
	b.base.mu.Lock()
	defer b.base.mu.Unlock()
	if d, ok := b.base.made[key]; ok {
		if ok, err := content.Exists(ctx, cs, d); err == nil && ok {
			return d, nil
		}
	}
	l, err := newLayer(ctx, cs, "runtime-layer")
	if err != nil {
		return v1.Descriptor{}, err
	}
	defer l.close()
	for _, d := range []string{"app", "dev", "etc", "etc/ssl", "etc/ssl/certs", "out", "proc", "src", "sys", "usr", "usr/share", "var", "var/cache", "var/cache/go-build", "var/cache/go-mod"} {
		if err := l.dir(d, 0o755); err != nil {
			return v1.Descriptor{}, err
		}
	}
	if err := l.dir("tmp", 0o1777); err != nil {
		return v1.Descriptor{}, err
	}
	for _, f := range []struct{ name, text string }{
		{"etc/group", "root:x:0:\nnonroot:x:" + nonroot + ":\n"},
		{"etc/hosts", ""}, // runtimes mount over these two
		{"etc/nsswitch.conf", "hosts: files dns\n"},
		{"etc/passwd", "root:x:0:0:root:/:/nologin\nnonroot:x:" + nonroot + ":" + nonroot + ":nonroot:/tmp:/nologin\n"},
		{"etc/resolv.conf", ""},
		{caFile, string(ca)},
		{zoneFile, string(zones)},
	} {
		if err := l.file(f.name, 0o644, int64(len(f.text)), strings.NewReader(f.text)); err != nil {
			return v1.Descriptor{}, err
		}
	}
	d, err := l.commit(ctx)
	if err != nil {
		return d, err
	}
	if b.base.made == nil {
		b.base.made = map[[32]byte]v1.Descriptor{}
	}
	b.base.made[key] = d
	return d, nil
}

// stepRoot is the image steps run in: the runtime layer, the toolchain, and
// what the go command reads of its user's settings.
func (b *Builder) stepRoot(ctx context.Context, tc toolchain) (v1.Descriptor, error) {
	base, err := b.runtimeLayer(ctx, b.toolchains.store, tc)
	if err != nil {
		return v1.Descriptor{}, err
	}
	settings, err := b.settingsLayer(ctx)
	if err != nil {
		return v1.Descriptor{}, err
	}
	return putImage(ctx, b.toolchains.store, platform(), v1.ImageConfig{}, nil, base, tc.Layer, settings)
}

// With this file below XDG_CONFIG_HOME the go command does not start itself
// once more, at every call, to count that it was called.
const (
	configHome    = "etc/go-config"
	telemetryFile = configHome + "/go/telemetry/mode"
)

func (b *Builder) settingsLayer(ctx context.Context) (v1.Descriptor, error) {
	b.base.mu.Lock()
	defer b.base.mu.Unlock()
	if b.base.settings.Digest != "" {
		return b.base.settings, nil
	}
	l, err := newLayer(ctx, b.toolchains.store, "settings-layer")
	if err != nil {
		return v1.Descriptor{}, err
	}
	defer l.close()
	for i, c := range telemetryFile {
		if c == '/' {
			if err := l.dir(telemetryFile[:i], 0o755); err != nil {
				return v1.Descriptor{}, err
			}
		}
	}
	const off = "off"
	if err := l.file(telemetryFile, 0o644, int64(len(off)), strings.NewReader(off)); err != nil {
		return v1.Descriptor{}, err
	}
	d, err := l.commit(ctx)
	if err == nil {
		b.base.settings = d
	}
	return d, err
}

// initLayout makes Images an OCI image layout.
func (b *Builder) initLayout() error {
	file := filepath.Join(b.Images(), v1.ImageLayoutFile)
	if _, err := os.Stat(file); err == nil {
		return nil
	}
	j, err := json.Marshal(v1.ImageLayout{Version: v1.ImageLayoutVersion})
	if err != nil {
		return err
	}
	if err := atomicfile.Write(file, j, 0o644); err != nil {
		return fmt.Errorf("make image layout: %w", err)
	}
	return b.writeIndex(nil)
}

func (b *Builder) indexFile() string { return filepath.Join(b.Images(), v1.ImageIndexFile) }

func (b *Builder) readIndex() ([]v1.Descriptor, error) {
	var ix v1.Index
	j, err := os.ReadFile(b.indexFile())
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err == nil {
		err = json.Unmarshal(j, &ix)
	}
	if err != nil {
		return nil, fmt.Errorf("read image index: %w", err)
	}
	return ix.Manifests, nil
}

func (b *Builder) writeIndex(ms []v1.Descriptor) error {
	if ms == nil {
		ms = []v1.Descriptor{}
	}
	j, err := json.Marshal(v1.Index{Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: v1.MediaTypeImageIndex, Manifests: ms})
	if err != nil {
		return err
	}
	if err := atomicfile.Write(b.indexFile(), j, 0o644); err != nil {
		return fmt.Errorf("write image index: %w", err)
	}
	return nil
}

// The index's annotation that says when an image was built last; Prune spares young ones.
const builtAt = "io.m3o.built"

// pin runs make, which leaves a blob in the image store, and keeps Prune from
// removing the blob until unpin. It may have been there before and be of no
// image any more.
func (b *Builder) pin(make func() (v1.Descriptor, error)) (v1.Descriptor, error) {
	b.store.Lock()
	defer b.store.Unlock()
	d, err := make()
	if err == nil {
		b.pins[d.Digest]++
	}
	return d, err
}

func (b *Builder) unpin(d v1.Descriptor) {
	b.store.Lock()
	defer b.store.Unlock()
	if b.pins[d.Digest]--; b.pins[d.Digest] <= 0 {
		delete(b.pins, d.Digest)
	}
}

// finish writes config and manifest over pinned layers and the image into the index.
func (b *Builder) finish(ctx context.Context, req Request, layers ...v1.Descriptor) (v1.Descriptor, error) {
	b.store.Lock()
	defer b.store.Unlock()
	m, err := putImage(ctx, b.images, platform(), imageConfig(req), annotations(req), layers...)
	if err != nil {
		return m, err
	}
	return m, b.enlist(m, req.App)
}

// enlist puts an image into the index, or marks it young again. Called with store held.
func (b *Builder) enlist(d v1.Descriptor, app string) error {
	ms, err := b.readIndex()
	if err != nil {
		return err
	}
	p := platform()
	d.Platform = &p
	d.Annotations = map[string]string{builtAt: time.Now().UTC().Format(time.RFC3339), "io.m3o.app": app}
	for i := range ms {
		if ms[i].Digest == d.Digest {
			ms[i] = d
			return b.writeIndex(ms)
		}
	}
	return b.writeIndex(append(ms, d))
}

// pruneGrace spares images that were built lately: their digest may not have
// reached who keeps the list yet.
const pruneGrace = time.Hour

// Prune removes every image that is neither in keep nor built within the last
// hour, and every blob that neither a remaining image needs nor one being
// written. A digest in keep that is not there is no error.
func (b *Builder) Prune(ctx context.Context, keep []string) error {
	return b.prune(ctx, keep, time.Now().Add(-pruneGrace))
}

func (b *Builder) prune(ctx context.Context, keep []string, youngAfter time.Time) error {
	b.store.Lock()
	defer b.store.Unlock()
	ms, err := b.readIndex()
	if err != nil {
		return err
	}
	wanted := map[digest.Digest]bool{}
	for _, k := range keep {
		d, err := digest.Parse(k)
		if err != nil {
			return m3o.Errorf(m3o.Invalid, "%q is not a digest", k)
		}
		wanted[d] = true
	}
	var left []v1.Descriptor
	for _, m := range ms {
		at, err := time.Parse(time.RFC3339, m.Annotations[builtAt])
		if m.Annotations[attachedTo] == "" && (wanted[m.Digest] || err == nil && at.After(youngAfter)) {
			left = append(left, m)
			wanted[m.Digest] = true
		}
	}
	for _, m := range ms {
		if to := m.Annotations[attachedTo]; to != "" && wanted[digest.Digest(to)] {
			left = append(left, m)
			wanted[m.Digest] = true
		}
	}
	reach := map[digest.Digest]bool{}
	for d := range b.pins {
		reach[d] = true
	}
	for d := range wanted {
		if err := b.reach(ctx, d, reach); err != nil {
			return err
		}
	}
	// The index first: an image in it is whole, whenever this stops.
	if len(left) != len(ms) {
		if err := b.writeIndex(left); err != nil {
			return err
		}
	}
	var gone []digest.Digest
	err = b.images.Walk(ctx, func(i content.Info) error {
		if !reach[i.Digest] {
			gone = append(gone, i.Digest)
		}
		return nil
	})
	if err != nil {
		return fmt.Errorf("list blobs: %w", err)
	}
	for _, d := range gone {
		if err := b.images.Delete(ctx, d); err != nil {
			return fmt.Errorf("remove blob %s: %w", d, err)
		}
	}
	b.log.Debug("images pruned", "kept", len(left), "blobs", len(gone))
	return nil
}

// reach marks the blobs of an image.
func (b *Builder) reach(ctx context.Context, d digest.Digest, marks map[digest.Digest]bool) error {
	var m v1.Manifest
	if err := b.readJSON(ctx, d, &m); err != nil {
		if ok, eerr := content.Exists(ctx, b.images, v1.Descriptor{Digest: d}); eerr == nil && !ok {
			return nil
		}
		// Better to keep too much than to remove what this cannot follow.
		return err
	}
	marks[d] = true
	marks[m.Config.Digest] = true
	for _, l := range m.Layers {
		marks[l.Digest] = true
	}
	return nil
}

func (b *Builder) readJSON(ctx context.Context, d digest.Digest, v any) error {
	j, err := content.ReadBlob(ctx, b.images, v1.Descriptor{Digest: d})
	if err == nil {
		err = json.Unmarshal(j, v)
	}
	if err != nil {
		return fmt.Errorf("read image %s: %w", d, err)
	}
	return nil
}
