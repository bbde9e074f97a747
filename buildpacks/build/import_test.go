package build

import (
	"archive/tar"
	"bytes"
	"encoding/json"
	"log/slog"
	"os"
	"strings"
	"testing"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/plugins/content/local"
	containerdlog "github.com/containerd/log"
	"github.com/m3o/m3o"
	"github.com/m3o/m3o/buildpacks"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"
)

// storeOnly is a Builder that builds nothing.
func storeOnly(t testing.TB) *Builder {
	t.Helper()
	if err := containerdlog.SetLevel("error"); err != nil { // as Open does
		t.Fatal(err)
	}
	b := &Builder{cfg: Config{Dir: t.TempDir()}, log: slog.New(slog.DiscardHandler), pins: map[digest.Digest]int{}}
	var err error
	if err = os.MkdirAll(b.Images(), 0o700); err == nil {
		if b.images, err = local.NewStore(b.Images()); err == nil {
			err = b.initLayout()
		}
	}
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func tarFiles(t testing.TB, files map[string][]byte, order ...string) []byte {
	t.Helper()
	var buf bytes.Buffer
	tw := tar.NewWriter(&buf)
	for _, name := range order {
		if err := tw.WriteHeader(&tar.Header{Name: name, Typeflag: tar.TypeReg, Mode: 0o755, Size: int64(len(files[name]))}); err != nil {
			t.Fatal(err)
		}
		if _, err := tw.Write(files[name]); err != nil {
			t.Fatal(err)
		}
	}
	if err := tw.Close(); err != nil {
		t.Fatal(err)
	}
	return buf.Bytes()
}

// archive is an OCI archive of one layer, and change may spoil it.
func archive(t testing.TB, layer []byte, change func(files map[string][]byte)) []byte {
	t.Helper()
	files := map[string][]byte{}
	put := func(mediaType string, b []byte) v1.Descriptor {
		d := v1.Descriptor{MediaType: mediaType, Digest: digest.FromBytes(b), Size: int64(len(b))}
		files["blobs/sha256/"+d.Digest.Encoded()] = b
		return d
	}
	enc := func(v any) []byte {
		b, err := json.Marshal(v)
		if err != nil {
			t.Fatal(err)
		}
		return b
	}
	l := put(v1.MediaTypeImageLayer, layer)
	c := put(v1.MediaTypeImageConfig, enc(v1.Image{Platform: platform(), Config: v1.ImageConfig{Cmd: []string{"/app/x"}, ExposedPorts: map[string]struct{}{"9000/tcp": {}}},
		RootFS: v1.RootFS{Type: "layers", DiffIDs: []digest.Digest{l.Digest}}}))
	m := put(v1.MediaTypeImageManifest, enc(v1.Manifest{Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: v1.MediaTypeImageManifest, Config: c, Layers: []v1.Descriptor{l}}))
	files["index.json"] = enc(v1.Index{Manifests: []v1.Descriptor{m}})
	if change != nil {
		change(files)
	}
	names := []string{}
	for n := range files {
		names = append(names, n)
	}
	return tarFiles(t, files, names...)
}

func TestImportedImageAndItsBill(t *testing.T) {
	b := storeOnly(t)
	exe, err := os.ReadFile("/proc/self/exe") // a Go binary, if one that tells no modules
	if err != nil {
		t.Fatal(err)
	}
	files := map[string][]byte{"app/x": exe, "app/script": []byte("#!" + strings.Repeat("x", 2000)), "app/y": []byte("y")}
	res, err := b.Import(t.Context(), "app", bytes.NewReader(archive(t, tarFiles(t, files, "app/x", "app/script", "app/y"), nil)))
	if err != nil || res.Port != 9000 || res.Size < int64(len(exe)) {
		t.Fatalf("Import = %+v, %v", res, err)
	}
	doc, err := b.SBOM(t.Context(), res.Image)
	for _, want := range []string{digest.FromBytes(exe).Encoded(), `"specVersion": "1.6"`, `"pkg:golang/std@go1.`} {
		if err != nil || !strings.Contains(string(doc), want) {
			t.Errorf("the bill lacks %s: %v", want, err)
		}
	}
	if again, err := b.SBOM(t.Context(), res.Image); err != nil || !bytes.Equal(doc, again) {
		t.Errorf("the bill of one image differs: %v", err)
	}
	files["app/y"], files["app/z"] = []byte("Y"), []byte("z")
	other, err := b.Import(t.Context(), "app", bytes.NewReader(archive(t, tarFiles(t, files, "app/x", "app/y", "app/z"), nil)))
	if err != nil {
		t.Fatal(err)
	}
	got, err := b.Compare(t.Context(), res.Image, other.Image)
	if want := "/app/script: only in the release's image|/app/y: differs|/app/z: only in the rebuilt image"; err != nil || strings.Join(got, "|") != want {
		t.Errorf("Compare = %q, %v", got, err)
	}
	if got, err := b.Compare(t.Context(), res.Image, res.Image); err != nil || len(got) > 0 {
		t.Errorf("an image differs from itself: %q, %v", got, err)
	}
}

func TestBadArchivesAreRefused(t *testing.T) {
	layer := tarFiles(t, map[string][]byte{"x": nil}, "x")
	for name, change := range map[string]func(map[string][]byte){
		"no index":  func(f map[string][]byte) { delete(f, "index.json") },
		"bad index": func(f map[string][]byte) { f["index.json"] = []byte("{") },
		"no layer":  func(f map[string][]byte) { delete(f, "blobs/sha256/"+digest.FromBytes(layer).Encoded()) },
		"wrong digest": func(f map[string][]byte) {
			f["blobs/sha256/"+digest.FromBytes(layer).Encoded()] = []byte("else")
		},
		"odd name":    func(f map[string][]byte) { f["blobs/sha256/x"] = nil },
		"other place": func(f map[string][]byte) { f["index.json"] = []byte(`{"manifests":[{"digest":"sha256:../../x"}]}`) },
		"other machine": func(f map[string][]byte) {
			f["index.json"] = bytes.Replace(f["index.json"], []byte(`"size"`), []byte(`"platform":{"os":"plan9","architecture":"mips"},"size"`), 1)
		},
	} {
		b := storeOnly(t)
		if res, err := b.Import(t.Context(), "app", bytes.NewReader(archive(t, layer, change))); m3o.KindOf(err) != m3o.Invalid || m3o.HintOf(err) == "" {
			t.Errorf("%s: Import = %+v, %v", name, res, err)
		}
	}
	if _, err := storeOnly(t).Import(t.Context(), "app", strings.NewReader("no tar at all")); m3o.KindOf(err) != m3o.Invalid {
		t.Errorf("no tar: %v", err)
	}
}

func FuzzImport(f *testing.F) {
	f.Add(archive(f, tarFiles(f, map[string][]byte{"x": nil}, "x"), nil))
	f.Fuzz(func(t *testing.T, a []byte) {
		b := storeOnly(t)
		res, err := b.Import(t.Context(), "app", bytes.NewReader(a))
		if err != nil {
			return
		}
		if ok, err := content.Exists(t.Context(), b.images, v1.Descriptor{Digest: digest.Digest(res.Image)}); err != nil || !ok {
			t.Errorf("the image %s is not there", res.Image)
		}
	})
}

func TestCoversAndStamps(t *testing.T) {
	for _, c := range []struct {
		pattern, name string
		want          bool
	}{
		{"static", "static/a/b", true}, {"static", "statics", false}, {"migrations/*.sql", "migrations/1.sql", true}, {"migrations/*.sql", "migrations/x/1.sql", false},
		{"*.html", "a.html", true}, {".", "x/y", true}, {"./a/", "a/b", true}, {"a/b", "a", false},
	} {
		if got := covers(c.pattern, c.name); got != c.want {
			t.Errorf("covers(%q, %q) = %v", c.pattern, c.name, got)
		}
	}
	for flags, want := range map[string]bool{"": true, "-X main.a=-extld": true, "-X=a.b=c -s -w": true, "-extld ./x": false, "-X a=b -linkmode external": false, "-X": true} {
		if got := onlySymbols(flags); got != want {
			t.Errorf("onlySymbols(%q) = %v", flags, got)
		}
	}
	for in, want := range map[string]string{"alpine": "docker.io/library/alpine:latest", "a/b:1": "docker.io/a/b:1", "example.com/x": "example.com/x:latest", "localhost/x:2": "localhost/x:2"} {
		if got := familiar(in); got != want {
			t.Errorf("familiar(%q) = %q", in, got)
		}
	}
	if _, _, err := FromImage("a b"); m3o.KindOf(err) != m3o.Invalid {
		t.Errorf("FromImage with a space: %v", err)
	}
	tree, plan, err := FromImage("example.com/x:1")
	if err != nil || plan.Builder != "dockerfile" || tree.FS() == nil || plan.Processes["web"].Port != buildpacks.Port {
		t.Errorf("FromImage = %+v, %v", plan, err)
	}
}
