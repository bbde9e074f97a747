package build

import (
	"encoding/json"
	"log/slog"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/plugins/content/local"
	"github.com/m3o/m3o"
	"github.com/opencontainers/go-digest"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"
)

// imageStore is a Builder that can do nothing but keep images.
func imageStore(t *testing.T) *Builder {
	t.Helper()
	b := &Builder{cfg: Config{Dir: t.TempDir()}, log: slog.New(slog.DiscardHandler), pins: map[digest.Digest]int{}}
	if err := os.MkdirAll(b.Images(), 0o755); err != nil {
		t.Fatal(err)
	}
	var err error
	if b.images, err = local.NewStore(b.Images()); err != nil {
		t.Fatal(err)
	}
	if err := b.initLayout(); err != nil {
		t.Fatal(err)
	}
	return b
}

func TestAttachmentLivesAsLongAsItsImage(t *testing.T) {
	b := imageStore(t)
	image := func(name string) string {
		t.Helper()
		d, err := putImage(t.Context(), b.images, platform(), v1.ImageConfig{Cmd: []string{name}}, nil)
		if err == nil {
			err = b.enlist(d, "app")
		}
		if err != nil {
			t.Fatal(err)
		}
		return d.Digest.String()
	}
	one, two := image("one"), image("two")
	const typ = "application/x-test"
	for _, a := range []struct{ image, text string }{{one, "old"}, {one, "of one"}, {two, "of two"}} {
		if err := b.Attach(t.Context(), a.image, Attachment{Type: typ, MediaType: typ, Data: []byte(a.text)}); err != nil {
			t.Fatal(err)
		}
	}
	attached := func(image, want string) {
		t.Helper()
		got, err := b.Attached(t.Context(), image, typ)
		if want == "" {
			if m3o.KindOf(err) != m3o.NotFound {
				t.Errorf("attached to %s: %q, %v, want nothing", image, got, err)
			}
		} else if err != nil || string(got) != want {
			t.Errorf("attached to %s: %q, %v, want %q", image, got, err, want)
		}
	}
	attached(one, "of one")
	attached(two, "of two")
	// As the tools of registries read it.
	ix, err := b.readIndex()
	if err != nil || len(ix) != 4 || ix[3].ArtifactType != typ {
		t.Fatalf("index %+v, %v", ix, err)
	}
	var m v1.Manifest
	raw, err := os.ReadFile(filepath.Join(b.Images(), "blobs/sha256", ix[3].Digest.Encoded()))
	if err != nil || json.Unmarshal(raw, &m) != nil || m.Subject == nil || m.Subject.Digest.String() != two || m.ArtifactType != typ {
		t.Errorf("artifact %s, %v", raw, err)
	}
	if err := b.prune(t.Context(), []string{one}, time.Now().Add(time.Minute)); err != nil {
		t.Fatal(err)
	}
	attached(one, "of one")
	attached(two, "")
	for text, want := range map[string]bool{"of one": true, "of two": false, "old": false} {
		if ok, err := content.Exists(t.Context(), b.images, v1.Descriptor{Digest: digest.FromString(text)}); err != nil || ok != want {
			t.Errorf("the blob %q: there %t, %v; want %t", text, ok, err, want)
		}
	}
	if err := b.Attach(t.Context(), two, Attachment{Type: typ}); err == nil {
		t.Error("something was attached to an image that is not there")
	}
	if err := b.Attach(t.Context(), "latest", Attachment{Type: typ}); m3o.KindOf(err) != m3o.Invalid {
		t.Errorf("Attach to no digest = %v", err)
	}
}
