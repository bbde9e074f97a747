package runtime

import (
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	goruntime "runtime"
	"strings"

	"github.com/m3o/m3o"
)

// An Image is what a driver needs to know of an OCI image.
type Image struct {
	Layers  []Layer  // bottom first
	Args    []string // entrypoint and command
	Env     []string
	WorkDir string // absolute
}

// A Layer is one changeset of an image.
type Layer struct {
	Digest    string // of the blob, "sha256:…"
	DiffID    string // of the uncompressed tar, "sha256:…"
	MediaType string
	Size      int64
}

const maxDocument = 4 << 20 // of a manifest, index or config: what registries accept

var digestForm = regexp.MustCompile(`^sha256:[0-9a-f]{64}$`)

// BlobPath is where the blob of a digest is in an OCI image layout; it is
// Invalid when digest is not "sha256:" and 64 hex digits.
func BlobPath(layout, digest string) (string, error) {
	if !digestForm.MatchString(digest) {
		return "", m3o.Errorf(m3o.Invalid, "%q is not an image digest", digest)
	}
	return filepath.Join(layout, "blobs", "sha256", strings.TrimPrefix(digest, "sha256:")), nil
}

// ReadImage reads the manifest and config of an image from an OCI image layout
// directory and verifies their digests. An index stands for its image for this
// machine. It is NotFound when a blob is missing, Invalid when one is not what
// it should be. Layers are not opened. See
// https://github.com/opencontainers/image-spec/blob/v1.1.1/manifest.md.
func ReadImage(layout, digest string) (Image, error) {
	raw, err := readDocument(layout, digest)
	if err != nil {
		return Image{}, err
	}
	m, err := parseManifest(raw)
	if err != nil {
		return Image{}, err
	}
	if m.child != "" {
		if raw, err = readDocument(layout, m.child); err != nil {
			return Image{}, err
		}
		if m, err = parseManifest(raw); err != nil {
			return Image{}, err
		}
		if m.child != "" {
			return Image{}, m3o.Errorf(m3o.Invalid, "image %s is an index of indexes", digest)
		}
	}
	if raw, err = readDocument(layout, m.config); err != nil {
		return Image{}, err
	}
	return parseConfig(raw, m.layers)
}

func readDocument(layout, digest string) ([]byte, error) {
	path, err := BlobPath(layout, digest)
	if err != nil {
		return nil, err
	}
	f, err := os.Open(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, &m3o.Error{Kind: m3o.NotFound, Msg: fmt.Sprintf("no image %s in the image store", digest),
			Hint: "deploy the app again to rebuild it", Err: err}
	} else if err != nil {
		return nil, fmt.Errorf("open image: %w", err)
	}
	defer f.Close() //nolint:errcheck // read only
	b, err := io.ReadAll(io.LimitReader(f, maxDocument+1))
	if err != nil {
		return nil, fmt.Errorf("read image: %w", err)
	}
	if len(b) > maxDocument {
		return nil, m3o.Errorf(m3o.Invalid, "image document %s is larger than %d bytes", digest, maxDocument)
	}
	if sum := sha256.Sum256(b); "sha256:"+hex.EncodeToString(sum[:]) != digest {
		return nil, m3o.Errorf(m3o.Invalid, "image document %s is damaged: its content has another digest", digest)
	}
	return b, nil
}

type manifest struct {
	config string
	layers []Layer
	child  string // set for an index: the manifest for this machine
}

func parseManifest(b []byte) (manifest, error) {
	type descriptor struct {
		MediaType string `json:"mediaType"`
		Digest    string `json:"digest"`
		Size      int64  `json:"size"`
		Platform  *struct {
			OS   string `json:"os"`
			Arch string `json:"architecture"`
		} `json:"platform"`
	}
	var doc struct {
		Config    *descriptor  `json:"config"`
		Layers    []descriptor `json:"layers"`
		Manifests []descriptor `json:"manifests"`
	}
	if err := json.Unmarshal(b, &doc); err != nil {
		return manifest{}, m3o.Errorf(m3o.Invalid, "image manifest: %w", err)
	}
	if doc.Config == nil {
		for _, d := range doc.Manifests {
			// Attestations sit in the index with platform unknown/unknown.
			if d.Platform == nil || d.Platform.OS == "linux" && d.Platform.Arch == goruntime.GOARCH {
				return manifest{child: d.Digest}, nil
			}
		}
		return manifest{}, m3o.Errorf(m3o.Invalid, "the image has no manifest for linux/%s", goruntime.GOARCH)
	}
	m := manifest{config: doc.Config.Digest}
	for _, l := range doc.Layers {
		m.layers = append(m.layers, Layer{Digest: l.Digest, MediaType: l.MediaType, Size: l.Size})
	}
	return m, nil
}

func parseConfig(b []byte, layers []Layer) (Image, error) {
	var doc struct {
		Config struct {
			Env        []string `json:"Env"`
			Entrypoint []string `json:"Entrypoint"`
			Cmd        []string `json:"Cmd"`
			WorkingDir string   `json:"WorkingDir"`
		} `json:"config"`
		RootFS struct {
			DiffIDs []string `json:"diff_ids"`
		} `json:"rootfs"`
	}
	if err := json.Unmarshal(b, &doc); err != nil {
		return Image{}, m3o.Errorf(m3o.Invalid, "image config: %w", err)
	}
	if len(doc.RootFS.DiffIDs) != len(layers) {
		return Image{}, m3o.Errorf(m3o.Invalid, "the image has %d layers but its config lists %d", len(layers), len(doc.RootFS.DiffIDs))
	}
	for i, id := range doc.RootFS.DiffIDs {
		if !digestForm.MatchString(id) || !digestForm.MatchString(layers[i].Digest) {
			return Image{}, m3o.Errorf(m3o.Invalid, "layer %d of the image has no proper digest", i+1)
		}
		layers[i].DiffID = id
	}
	im := Image{Layers: layers, Env: doc.Config.Env, WorkDir: doc.Config.WorkingDir}
	im.Args = append(im.Args, doc.Config.Entrypoint...)
	im.Args = append(im.Args, doc.Config.Cmd...)
	if !filepath.IsAbs(im.WorkDir) {
		im.WorkDir = "/"
	}
	return im, nil
}
