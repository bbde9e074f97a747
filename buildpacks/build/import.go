package build

import (
	"archive/tar"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"path"
	"strings"

	"github.com/m3o/m3o"
	"github.com/m3o/m3o/buildpacks"
	"github.com/opencontainers/go-digest"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/tonistiigi/fsutil"
)

const maxImage = 8 << 30 // bytes of an archive's blobs

// Import stores the image of an OCI archive: a tar of an OCI image layout, as
// docker save, buildx, skopeo, ko and podman write. Of an image for several
// platforms the one for this machine is taken. What is not what its digest
// says is refused. Prune must not run meanwhile.
func (b *Builder) Import(ctx context.Context, app string, r io.Reader) (Result, error) {
	var res Result
	fail := func(format string, args ...any) error {
		return &m3o.Error{Kind: m3o.Invalid, Msg: "the file is not an OCI image archive: " + fmt.Sprintf(format, args...),
			Hint: "make one by: docker save -o app.tar IMAGE, or: skopeo copy docker://IMAGE oci-archive:app.tar"}
	}
	var index v1.Index
	seen := false
	left := int64(maxImage)
	for tr := tar.NewReader(r); ; {
		h, err := tr.Next()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return res, fail("%v", err)
		}
		name := path.Clean(h.Name)
		hex, isBlob := strings.CutPrefix(name, "blobs/sha256/")
		switch {
		case h.Typeflag != tar.TypeReg:
		case name == v1.ImageIndexFile:
			j, err := readLimited(tr, maxDocument)
			if err == nil {
				err = json.Unmarshal(j, &index)
			}
			if err != nil {
				return res, fail("%s: %v", name, err)
			}
			seen = true
		case isBlob:
			d := digest.NewDigestFromEncoded(digest.SHA256, hex)
			if d.Validate() != nil {
				return res, fail("%.100q is not the name of a blob", name)
			}
			if left -= h.Size; left < 0 {
				return res, fail("it is larger than 8 GB")
			}
			if err := putStream(ctx, b.images, v1.Descriptor{Digest: d, Size: h.Size}, tr); err != nil {
				if derr := disk(err); derr != err {
					return res, derr
				}
				return res, fail("%v", err)
			}
		}
	}
	if !seen {
		return res, fail("there is no %s", v1.ImageIndexFile)
	}
	d, err := forHere(index.Manifests)
	if err != nil {
		return res, err
	}
	m, img, err := b.readImage(ctx, d)
	if err != nil {
		return res, fail("%v", err)
	}
	if img.OS != "" && (img.OS != platformO || img.Architecture != platform().Architecture) {
		return res, &m3o.Error{Kind: m3o.Invalid, Msg: fmt.Sprintf("the image is for %s/%s, but apps run on %s/%s here", img.OS, img.Architecture, platformO, platform().Architecture),
			Hint: "build it for this platform and try again"}
	}
	if len(m.Layers) != len(img.RootFS.DiffIDs) {
		return res, fail("the manifest has %d layers and the config %d", len(m.Layers), len(img.RootFS.DiffIDs))
	}
	for _, l := range m.Layers {
		if _, err := b.images.Info(ctx, l.Digest); err != nil {
			return res, fail("layer %s is missing", l.Digest)
		}
	}
	return res, b.adopt(ctx, Request{App: app, Plan: &buildpacks.Plan{}}, d.String(), &res)
}

// FromImage is a tree whose Dockerfile is the image of a registry, as it is,
// and the plan of it.
func FromImage(ref string) (Tree, *buildpacks.Plan, error) {
	if ref == "" || strings.ContainsAny(ref, " \t\r\n\\$\"'") || strings.HasPrefix(ref, "-") {
		return nil, nil, &m3o.Error{Kind: m3o.Invalid, Msg: fmt.Sprintf("%.100q is not the name of an image", ref), Hint: "write it as for docker pull, such as registry.example.com/team/app:1.2"}
	}
	return imageTree{memFS{"Dockerfile": []byte("FROM " + ref + "\n")}}, &buildpacks.Plan{Builder: "dockerfile", Dir: ".",
		Docker: buildpacks.Docker{File: "Dockerfile"}, Processes: ImageProcesses()}, nil
}

// ImageProcesses are those of an image that comes without a source: its own
// command as web.
func ImageProcesses() map[string]m3o.Process {
	return map[string]m3o.Process{"web": {Replicas: 1, Port: buildpacks.Port}}
}

type imageTree struct{ files memFS }

func (t imageTree) FS() fsutil.FS        { return t.files }
func (t imageTree) Submodules() []string { return nil }
