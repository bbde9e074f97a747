package build

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/containerd/containerd/v2/plugins/content/local"
)

// A build that changes nothing makes a layer that is there: nothing of the
// second is left, and the first is whole.
func TestLayerThatIsThereIsNotWrittenAgain(t *testing.T) {
	dir := t.TempDir()
	cs, err := local.NewStore(dir)
	if err != nil {
		t.Fatal(err)
	}
	var digests []string
	for range 2 {
		l, err := newLayer(t.Context(), cs, "layer")
		if err != nil {
			t.Fatal(err)
		}
		if err := l.file("app/hello", 0o755, 5, strings.NewReader("hello")); err != nil {
			t.Fatal(err)
		}
		d, err := l.commit(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		l.close()
		digests = append(digests, d.Digest.Encoded())
	}
	if digests[0] != digests[1] {
		t.Errorf("digests %v", digests)
	}
	if fi, err := os.Stat(filepath.Join(dir, "blobs/sha256", digests[0])); err != nil || fi.Size() == 0 {
		t.Errorf("the layer: %v, %v", fi, err)
	}
	if left, err := os.ReadDir(filepath.Join(dir, "ingest")); err != nil || len(left) != 0 {
		t.Errorf("left behind: %v, %v", left, err)
	}
}
