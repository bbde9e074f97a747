package build

import (
	"archive/tar"
	"context"
	"debug/buildinfo"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"path"
	"runtime/debug"
	"slices"
	"strings"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/opencontainers/go-digest"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"
)

// The types of what is attached to every image.
const (
	SBOMType       = "application/vnd.cyclonedx+json"
	ProvenanceType = "application/vnd.in-toto+json"
)

// A program is a Go binary of an image.
type program struct {
	path   string
	digest digest.Digest
	info   *debug.BuildInfo
}

// SBOM is an image's bill of materials in CycloneDX 1.6, from what Go binaries
// say of themselves: the same image gives the same document. It lists the
// modules with the checksums of go.sum and the standard library, and which
// binary each is in. Programs that other compilers made are not seen.
func (b *Builder) SBOM(ctx context.Context, image string) ([]byte, error) {
	m, _, err := b.readImage(ctx, digest.Digest(image))
	if err != nil {
		return nil, err
	}
	var found []program
	for _, l := range m.Layers {
		if l.MediaType != v1.MediaTypeImageLayer {
			continue // compressed: not made here
		}
		ps, err := b.programs(ctx, l)
		if err != nil {
			return nil, fmt.Errorf("read layer %s: %w", l.Digest, err)
		}
		found = append(found, ps...)
	}
	return json.MarshalIndent(bom(image, found), "", "  ")
}

// programs finds the Go binaries of an uncompressed layer, read where they lie.
func (b *Builder) programs(ctx context.Context, l v1.Descriptor) ([]program, error) {
	ra, err := b.images.ReaderAt(ctx, l)
	if err != nil {
		return nil, err
	}
	defer ra.Close() //nolint:errcheck // read only
	at := &counted{r: content.NewReader(ra)}
	var out []program
	for tr := tar.NewReader(at); ; {
		h, err := tr.Next()
		if errors.Is(err, io.EOF) {
			return out, nil
		}
		if err != nil {
			return nil, err
		}
		if h.Typeflag != tar.TypeReg || h.Mode&0o111 == 0 || h.Size < 1<<10 {
			continue
		}
		info, err := buildinfo.Read(io.NewSectionReader(ra, at.n, h.Size))
		if err != nil {
			continue // no Go binary
		}
		d, err := digest.FromReader(tr)
		if err != nil {
			return nil, err
		}
		out = append(out, program{"/" + path.Clean(h.Name), d, info})
	}
}

// counted knows where in the stream its reader is.
type counted struct {
	r io.Reader
	n int64
}

func (c *counted) Read(p []byte) (int, error) {
	n, err := c.r.Read(p)
	c.n += int64(n)
	return n, err
}

// The parts of CycloneDX that are used. See https://cyclonedx.org/docs/1.6/json/.
type (
	cyclone struct {
		Format       string           `json:"bomFormat"`
		Spec         string           `json:"specVersion"`
		Version      int              `json:"version"`
		Metadata     cycloneMetadata  `json:"metadata"`
		Components   []cycloneItem    `json:"components"`
		Dependencies []cycloneDepends `json:"dependencies"`
	}
	cycloneMetadata struct {
		Component cycloneItem `json:"component"`
	}
	cycloneItem struct {
		Type       string        `json:"type"`
		Ref        string        `json:"bom-ref"`
		Name       string        `json:"name"`
		Version    string        `json:"version,omitempty"`
		PURL       string        `json:"purl,omitempty"`
		Hashes     []cycloneHash `json:"hashes,omitempty"`
		Properties []cycloneProp `json:"properties,omitempty"`
	}
	cycloneHash struct {
		Alg     string `json:"alg"`
		Content string `json:"content"`
	}
	cycloneProp struct {
		Name  string `json:"name"`
		Value string `json:"value"`
	}
	cycloneDepends struct {
		Ref string   `json:"ref"`
		On  []string `json:"dependsOn"`
	}
)

func bom(image string, programs []program) cyclone {
	doc := cyclone{Format: "CycloneDX", Spec: "1.6", Version: 1, Components: []cycloneItem{}, Dependencies: []cycloneDepends{},
		Metadata: cycloneMetadata{cycloneItem{Type: "container", Ref: image, Name: image}}}
	seen := map[string]bool{}
	add := func(it cycloneItem) string {
		if !seen[it.Ref] {
			seen[it.Ref] = true
			doc.Components = append(doc.Components, it)
		}
		return it.Ref
	}
	root := cycloneDepends{Ref: image, On: []string{}}
	for _, p := range programs {
		exe := add(cycloneItem{Type: "application", Ref: p.path, Name: p.path, Hashes: []cycloneHash{{"SHA-256", p.digest.Encoded()}},
			Properties: []cycloneProp{{"go:package", p.info.Path}}})
		root.On = append(root.On, exe)
		dep := cycloneDepends{Ref: exe, On: []string{add(cycloneItem{Type: "library", Ref: purl("std", p.info.GoVersion), Name: "std", Version: p.info.GoVersion, PURL: purl("std", p.info.GoVersion)})}}
		mods := append([]*debug.Module{&p.info.Main}, p.info.Deps...)
		for _, m := range mods {
			if m.Path == "" {
				continue
			}
			for m.Replace != nil {
				m = m.Replace
			}
			it := cycloneItem{Type: "library", Ref: purl(m.Path, m.Version), Name: m.Path, Version: m.Version, PURL: purl(m.Path, m.Version)}
			if m.Sum != "" {
				it.Properties = []cycloneProp{{"go:sum", m.Sum}}
			}
			dep.On = append(dep.On, add(it))
		}
		slices.Sort(dep.On)
		doc.Dependencies = append(doc.Dependencies, dep)
	}
	slices.SortFunc(doc.Components, func(a, b cycloneItem) int { return strings.Compare(a.Ref, b.Ref) })
	slices.Sort(root.On)
	doc.Dependencies = append([]cycloneDepends{root}, doc.Dependencies...)
	return doc
}

func purl(mod, version string) string {
	if version == "" || version == "(devel)" {
		return "pkg:golang/" + mod
	}
	return "pkg:golang/" + mod + "@" + version
}
