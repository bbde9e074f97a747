package runtimetest

import (
	"archive/tar"
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	goruntime "runtime"
	"slices"
	"sync"
	"testing"
)

// A File is one file of an image's layer.
type File struct {
	Data []byte
	Mode int64
}

// WriteImage writes an image into an OCI image layout directory, one
// uncompressed layer for each of layers, and returns its manifest's digest. The
// image has args as its entrypoint.
func WriteImage(t testing.TB, layout string, args []string, layers ...map[string]File) string {
	t.Helper()
	var raw [][]byte
	for _, files := range layers {
		raw = append(raw, Tar(t, files))
	}
	return WriteRawImage(t, layout, args, raw...)
}

// WriteRawImage is WriteImage with layers that are tar files already.
func WriteRawImage(t testing.TB, layout string, args []string, layers ...[]byte) string {
	t.Helper()
	type desc struct {
		MediaType string `json:"mediaType"`
		Digest    string `json:"digest"`
		Size      int    `json:"size"`
	}
	put := func(media string, b []byte) desc {
		t.Helper()
		sum := sha256.Sum256(b)
		name := hex.EncodeToString(sum[:])
		dir := filepath.Join(layout, "blobs", "sha256")
		if err := os.MkdirAll(dir, 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(dir, name), b, 0o644); err != nil {
			t.Fatal(err)
		}
		return desc{media, "sha256:" + name, len(b)}
	}
	asJSON := func(v any) []byte {
		t.Helper()
		b, err := json.Marshal(v)
		if err != nil {
			t.Fatal(err)
		}
		return b
	}
	var descs []desc
	var diffs []string
	for _, b := range layers {
		d := put("application/vnd.oci.image.layer.v1.tar", b)
		descs, diffs = append(descs, d), append(diffs, d.Digest)
	}
	config := put("application/vnd.oci.image.config.v1+json", asJSON(map[string]any{
		"architecture": goruntime.GOARCH, "os": "linux",
		"config": map[string]any{"Entrypoint": args, "Env": []string{"FROM_IMAGE=yes"}},
		"rootfs": map[string]any{"type": "layers", "diff_ids": diffs},
	}))
	m := put("application/vnd.oci.image.manifest.v1+json", asJSON(map[string]any{
		"schemaVersion": 2, "mediaType": "application/vnd.oci.image.manifest.v1+json", "config": config, "layers": descs,
	}))
	index := asJSON(map[string]any{"schemaVersion": 2, "manifests": []desc{m}})
	for name, b := range map[string][]byte{"index.json": index, "oci-layout": []byte(`{"imageLayoutVersion":"1.0.0"}`)} {
		if err := os.WriteFile(filepath.Join(layout, name), b, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	return m.Digest
}

// Tar makes a layer of files, in the order of their names.
func Tar(t testing.TB, files map[string]File) []byte {
	t.Helper()
	var b bytes.Buffer
	tw := tar.NewWriter(&b)
	for _, name := range slices.Sorted(maps.Keys(files)) {
		f := files[name]
		if err := tw.WriteHeader(&tar.Header{Name: name, Mode: f.Mode, Size: int64(len(f.Data)), Typeflag: tar.TypeReg}); err != nil {
			t.Fatal(err)
		}
		if _, err := tw.Write(f.Data); err != nil {
			t.Fatal(err)
		}
	}
	if err := tw.Close(); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

var server = sync.OnceValues(func() ([]byte, error) {
	dir, err := os.MkdirTemp("", "m3o-testserver-")
	if err != nil {
		return nil, err
	}
	defer os.RemoveAll(dir) //nolint:errcheck // a temporary directory
	out := filepath.Join(dir, "server")
	cmd := exec.Command("go", "build", "-trimpath", "-ldflags", "-s -w", "-o", out, "github.com/m3o/m3o/runtime/runtimetest/program/testserver")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0", "GOFLAGS=")
	if msg, err := cmd.CombinedOutput(); err != nil {
		return nil, fmt.Errorf("build test server: %w: %s", err, msg)
	}
	return os.ReadFile(out)
})

// ServerImage writes an image of package program, as /server, into layout.
func ServerImage(t testing.TB, layout string) string {
	t.Helper()
	b, err := server()
	if err != nil {
		t.Fatal(err)
	}
	return WriteImage(t, layout, []string{"/server"}, map[string]File{"server": {b, 0o755}})
}

// Build builds a command of the module into a directory of the test and
// returns its path. It is static.
func Build(t testing.TB, pkg string) string {
	t.Helper()
	out := filepath.Join(t.TempDir(), filepath.Base(pkg))
	cmd := exec.Command("go", "build", "-trimpath", "-ldflags", "-s -w", "-o", out, pkg)
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0", "GOFLAGS=")
	if msg, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("build %s: %v: %s", pkg, err, msg)
	}
	return out
}
