//go:build linux

package oci

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/m3o/m3o"
	"github.com/m3o/m3o/internal/need"
	"github.com/m3o/m3o/runtime"
)

func sum(b []byte) string {
	s := sha256.Sum256(b)
	return "sha256:" + hex.EncodeToString(s[:])
}

type entry struct {
	tar.Header
	text string
}

func tarOf(t testing.TB, entries ...entry) []byte {
	t.Helper()
	var b bytes.Buffer
	tw := tar.NewWriter(&b)
	for _, e := range entries {
		e.Size = int64(len(e.text))
		if e.Mode == 0 {
			e.Mode = 0o644
		}
		if err := tw.WriteHeader(&e.Header); err != nil {
			t.Fatal(err)
		}
		if _, err := tw.Write([]byte(e.text)); err != nil {
			t.Fatal(err)
		}
	}
	if err := tw.Close(); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

func file(name, text string) entry {
	return entry{tar.Header{Name: name, Typeflag: tar.TypeReg}, text}
}

// store is a layer store with the blobs given.
func store(t *testing.T, blobs ...[]byte) *layers {
	t.Helper()
	need.Root(t)
	dir := t.TempDir()
	images := filepath.Join(dir, "images")
	if err := os.MkdirAll(filepath.Join(images, "blobs", "sha256"), 0o755); err != nil {
		t.Fatal(err)
	}
	for _, b := range blobs {
		if err := os.WriteFile(filepath.Join(images, "blobs", "sha256", strings.TrimPrefix(sum(b), "sha256:")), b, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	l, err := openLayers(filepath.Join(dir, "layers"), images, "this boot")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(l.syncing.Wait)
	return l
}

func TestLayersAreUnpackedOnceAndShared(t *testing.T) {
	plain := tarOf(t, file("a", "one"), file("d/.wh.gone", ""), entry{tar.Header{Name: "dev/sda", Typeflag: tar.TypeBlock}, ""})
	var zipped bytes.Buffer
	zw := gzip.NewWriter(&zipped)
	top := tarOf(t, file("b", "two"))
	if _, err := zw.Write(top); err != nil {
		t.Fatal(err)
	}
	if err := zw.Close(); err != nil {
		t.Fatal(err)
	}
	l := store(t, plain, zipped.Bytes())
	im := runtime.Image{Layers: []runtime.Layer{{Digest: sum(plain), DiffID: sum(plain)}, {Digest: sum(zipped.Bytes()), DiffID: sum(top)}}}
	results := make(chan error, 4)
	for range 4 {
		go func() {
			_, err := l.lower(t.Context(), im)
			results <- err
		}()
	}
	for range 4 {
		if err := <-results; err != nil {
			t.Fatal(err)
		}
	}
	lower, err := l.lower(t.Context(), im)
	if err != nil {
		t.Fatal(err)
	}
	dirs := strings.Split(lower, ":")
	if len(dirs) != 3 || filepath.Base(dirs[0]) != skeletonName {
		t.Fatalf("lower directories %q, want the skeleton and two", dirs)
	}
	for path, want := range map[string]string{filepath.Join(dirs[2], "a"): "one", filepath.Join(dirs[1], "b"): "two"} {
		if b, err := os.ReadFile(path); err != nil || string(b) != want {
			t.Errorf("%s = %q, %v, want %q", path, b, err, want)
		}
	}
	var st unix.Stat_t
	if err := unix.Lstat(filepath.Join(dirs[2], "d", "gone"), &st); err != nil || st.Mode&unix.S_IFMT != unix.S_IFCHR || st.Rdev != 0 {
		t.Errorf("the whiteout is %o %d, %v, want a character device 0/0", st.Mode, st.Rdev, err)
	}
	if _, err := os.Lstat(filepath.Join(dirs[2], "dev", "sda")); err == nil {
		t.Error("a device node was unpacked")
	}
	if err := l.prune(map[string]bool{layerName(sum(plain)): true}); err != nil {
		t.Fatal(err)
	}
	if !exists(dirs[2]) || exists(dirs[1]) || !exists(dirs[0]) {
		t.Errorf("prune left %v", dirs)
	}
}

func TestDamagedLayerLeavesNothing(t *testing.T) {
	good := tarOf(t, file("a", strings.Repeat("x", 100_000)))
	cut := good[:50_000]
	garbage := []byte("this is not a tar file")
	l := store(t, good, cut, garbage)
	for name, ly := range map[string]runtime.Layer{
		"wrong diff id": {Digest: sum(good), DiffID: sum(garbage)},
		"cut short":     {Digest: sum(cut), DiffID: sum(cut)},
		"garbage":       {Digest: sum(garbage), DiffID: sum(good)},
	} {
		if _, err := l.lower(t.Context(), runtime.Image{Layers: []runtime.Layer{ly}}); m3o.KindOf(err) != m3o.Invalid {
			t.Errorf("%s: %v, want Invalid", name, err)
		}
	}
	if _, err := l.lower(t.Context(), runtime.Image{Layers: []runtime.Layer{{Digest: sum([]byte("absent")), DiffID: sum(good)}}}); m3o.KindOf(err) != m3o.NotFound {
		t.Errorf("a missing blob: %v, want NotFound", err)
	}
	blob, err := runtime.BlobPath(l.images, sum(good))
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(blob, append(good[:len(good)-1:len(good)-1], 1), 0o644); err != nil { // padding damaged
		t.Fatal(err)
	}
	if _, err := l.lower(t.Context(), runtime.Image{Layers: []runtime.Layer{{Digest: sum(good), DiffID: sum(good)}}}); m3o.KindOf(err) != m3o.Invalid {
		t.Errorf("a damaged blob: %v, want Invalid", err)
	}
	es, err := os.ReadDir(l.dir)
	if err != nil || len(es) != 1 {
		t.Errorf("left %v, %v, want the skeleton alone", es, err)
	}
}

func TestHostileLayerStaysInside(t *testing.T) {
	for name, es := range map[string][]entry{
		"dots":      {file("../../escape", "x")},
		"symlink":   {{tar.Header{Name: "d", Typeflag: tar.TypeSymlink, Linkname: "/"}, ""}, file("d/tmp/m3o-escape", "x")},
		"dots link": {{tar.Header{Name: "d", Typeflag: tar.TypeSymlink, Linkname: "../../.."}, ""}, file("d/escape", "x")},
		"hard link": {{tar.Header{Name: "p", Typeflag: tar.TypeLink, Linkname: "../../images"}, ""}},
	} {
		b := tarOf(t, es...)
		l := store(t, b)
		root := filepath.Dir(l.dir)
		_, err := l.lower(t.Context(), runtime.Image{Layers: []runtime.Layer{{Digest: sum(b), DiffID: sum(b)}}})
		for _, p := range []string{filepath.Join(root, "escape"), filepath.Join(filepath.Dir(root), "escape"), "/tmp/m3o-escape"} {
			if exists(p) {
				t.Errorf("%s: %s was written (%v)", name, p, err)
			}
		}
	}
}

func TestLayersOfAnEarlierBootThatWereNotSyncedAreUnpackedAgain(t *testing.T) {
	b := tarOf(t, file("a", "one"))
	l := store(t, b)
	im := runtime.Image{Layers: []runtime.Layer{{Digest: sum(b), DiffID: sum(b)}}}
	if _, err := l.lower(t.Context(), im); err != nil {
		t.Fatal(err)
	}
	l.syncing.Wait()
	dir := filepath.Join(l.dir, layerName(sum(b)))
	if exists(dir + unsynced) {
		t.Error("a synced layer is still marked")
	}
	for _, boot := range []string{"this boot", "another"} {
		kept := boot == "this boot"
		if err := os.WriteFile(dir+unsynced, []byte("this boot"), 0o600); err != nil {
			t.Fatal(err)
		}
		if _, err := openLayers(l.dir, l.images, boot); err != nil {
			t.Fatal(err)
		}
		if exists(dir) != kept {
			t.Errorf("in %s an unsynced layer is kept: %v", boot, !kept)
		}
	}
}

func TestAddressesAreNotReusedAtOnce(t *testing.T) {
	dir := t.TempDir()
	subnet := netip.MustParsePrefix("198.18.0.0/28")
	a, err := newAddresses(subnet, dir)
	if err != nil {
		t.Fatal(err)
	}
	seen := map[netip.Addr]bool{}
	for range 14 {
		ip, err := a.take()
		if err != nil {
			t.Fatal(err)
		}
		if seen[ip] || !subnet.Contains(ip) || ip == netip.MustParseAddr("198.18.0.0") || ip == netip.MustParseAddr("198.18.0.15") {
			t.Errorf("took %s", ip)
		}
		seen[ip] = true
		a.free(ip)
	}
	if ip, err := a.take(); m3o.KindOf(err) != m3o.Unavailable {
		t.Errorf("took %s, %v within a minute of its use, want Unavailable", ip, err)
	}
	for ip := range a.freed {
		a.freed[ip] = time.Now().Add(-2 * notAgain)
	}
	if _, err := a.take(); err != nil {
		t.Errorf("take after a minute = %v", err)
	}
	// Another driver goes on where this one may have been.
	big := netip.MustParsePrefix("198.18.0.0/16")
	dir = t.TempDir()
	first, err := newAddresses(big, dir)
	if err != nil {
		t.Fatal(err)
	}
	used := map[netip.Addr]bool{}
	for range 300 {
		ip, err := first.take()
		if err != nil {
			t.Fatal(err)
		}
		used[ip] = true
	}
	second, err := newAddresses(big, dir)
	if err != nil {
		t.Fatal(err)
	}
	if ip, err := second.take(); err != nil || used[ip] {
		t.Errorf("the next driver took %s, %v, used a moment ago", ip, err)
	}
}

func TestUsersKeepTheirIDs(t *testing.T) {
	dir := t.TempDir()
	u, err := newUsers(100000, dir)
	if err != nil {
		t.Fatal(err)
	}
	for i, app := range []string{"a", "b", "a", "c"} {
		if got, err := u.id(app); err != nil || got != []int{100000, 100001, 100000, 100002}[i] {
			t.Errorf("id(%s) = %d, %v", app, got, err)
		}
	}
	again, err := newUsers(100000, dir)
	if err != nil {
		t.Fatal(err)
	}
	if got, err := again.id("c"); err != nil || got != 100002 {
		t.Errorf("after reopening id(c) = %d, %v, want 100002", got, err)
	}
}

func TestConfigReportsEveryFault(t *testing.T) {
	c := Config{Name: "Too-Long-Name", Dir: "state", Run: "/run/a:b", Subnet: netip.MustParsePrefix("169.254.0.0/16")}
	err := c.Validate()
	for _, want := range []string{`"Too-Long-Name"`, `"state" is not absolute`, `"/run/a:b"`, "overlaps 169.254.0.0/16", "runc"} {
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("Validate = %v, lacks %s", err, want)
		}
	}
}

func TestGatewaysAreOutOfTheWay(t *testing.T) {
	if got := GatewayOf("m3o"); got != netip.MustParseAddr("169.254.1.1") {
		t.Errorf("gateway of m3o is %s", got)
	}
	seen := map[netip.Addr]string{}
	for _, n := range []string{"m3o", "m3otest", "m3otwo", "a", "b", "staging"} {
		g := GatewayOf(n)
		if b := g.As4(); !linkLocal.Contains(g) || b[2] == 169 || b[3] == 0 || b[3] == 255 || seen[g] != "" {
			t.Errorf("gateway of %s is %s, that of %q too", n, g, seen[g])
		}
		seen[g] = n
	}
}

func TestEnvironment(t *testing.T) {
	b := bundle{id: "x", image: runtime.Image{Env: []string{"PATH=/image", "A=1"}},
		w: runtime.Workload{Port: 8080, CPUMillis: 250, MemoryBytes: 1000 << 20, Env: []string{"A=2", "GOMEMLIMIT=7", "M3O_INSTANCE=mine", "broken"}}}
	got := b.environ([]string{"B=3"})
	slices.Sort(got)
	want := []string{"A=2", "B=3", "GOMAXPROCS=1", "GOMEMLIMIT=7", "HOME=/tmp", "M3O_INSTANCE=x", "PATH=/image", "PORT=8080"}
	if !slices.Equal(got, want) {
		t.Errorf("environ = %q, want %q", got, want)
	}
}

func TestFindCgroups(t *testing.T) {
	write := func(lines ...string) string {
		p := filepath.Join(t.TempDir(), "mountinfo")
		if err := os.WriteFile(p, []byte(strings.Join(lines, "\n")+"\n"), 0o600); err != nil {
			t.Fatal(err)
		}
		return p
	}
	v2, err := findCgroups("m3o", write("30 23 0:26 / /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw"))
	if err != nil || !v2.unified() || v2.memory("i") != "/sys/fs/cgroup/m3o/i" {
		t.Errorf("v2: %+v, %v", v2, err)
	}
	v1, err := findCgroups("m3o", write("30 23 0:26 / /sys/fs/cgroup rw - tmpfs tmpfs rw",
		"31 30 0:27 / /sys/fs/cgroup/memory rw shared:5 - cgroup cgroup rw,memory", "short",
		"32 30 0:28 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw"))
	if err != nil || v1.unified() || v1.memory("i") != "/sys/fs/cgroup/memory/m3o/i" || !v1.has("memory") || v1.has("cpu") {
		t.Errorf("v1: %+v, %v", v1, err)
	}
	if _, err := findCgroups("m3o", write("30 23 0:26 / / rw - ext4 /dev/vda rw")); err == nil {
		t.Error("no cgroups at all were found fit")
	}
}

func TestTooOld(t *testing.T) {
	for v, want := range map[string]bool{"1.1.5+ds1": true, "1.1.15": true, "1.2.7": true, "1.2.8": false, "1.3.2": true, "1.3.3": false,
		"1.4.0": false, "1.5.2": false, "0.1.1": true, "2.0.0": false, "unknown": false} {
		if got := tooOld(v); got != want {
			t.Errorf("tooOld(%s) = %v", v, got)
		}
	}
}

// FuzzLayer: no tar file, whatever is in it, writes outside its directory.
func FuzzLayer(f *testing.F) {
	f.Add(tarOf(f, file("a/b", "x"), file("../c", "y"), entry{tar.Header{Name: "l", Typeflag: tar.TypeSymlink, Linkname: "/"}, ""}, file("l/d", "z")))
	f.Add([]byte{0x1f, 0x8b, 8})
	f.Add([]byte{0x28, 0xb5, 0x2f, 0xfd})
	f.Fuzz(func(t *testing.T, b []byte) {
		if os.Geteuid() != 0 {
			t.Skip("whiteouts are device nodes")
		}
		root := t.TempDir()
		dir := filepath.Join(root, "in")
		if err := os.Mkdir(dir, 0o755); err != nil {
			t.Fatal(err)
		}
		_ = apply(context.Background(), bytes.NewReader(b), dir, runtime.Layer{Digest: sum(b), DiffID: sum(b)})
		es, err := os.ReadDir(root)
		if err != nil || len(es) != 1 {
			t.Errorf("outside the directory there are %v, %v", es, err)
		}
	})
}
