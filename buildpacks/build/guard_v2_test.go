package build

import (
	"context"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/m3o/m3o"
	"github.com/m3o/m3o/internal/need"
	"golang.org/x/sys/unix"
)

// A fakeV2 is a tree of files as cgroup v2 has it. Kernels that run these tests
// may have version 1.
type fakeV2 struct {
	*cgroup
	t *testing.T
}

func newFakeV2(t *testing.T) fakeV2 {
	t.Helper()
	c := fakeV2{&cgroup{name: "m3o-build-test", roots: []string{t.TempDir()}, v2: true}, t}
	if err := c.create(2<<30, 500); err != nil {
		t.Fatal(err)
	}
	return c
}

func (c fakeV2) path(elem ...string) string {
	return filepath.Join(append([]string{c.roots[0], c.name}, elem...)...)
}

func (c fakeV2) write(text string, elem ...string) {
	c.t.Helper()
	if err := os.MkdirAll(filepath.Dir(c.path(elem...)), 0o750); err != nil {
		c.t.Fatal(err)
	}
	if err := os.WriteFile(c.path(elem...), []byte(text), 0o600); err != nil {
		c.t.Fatal(err)
	}
}

// step starts n processes in a group, which forgets them as they end. It
// returns what waits for the end.
func (c fakeV2) step(name string, n int) (wait func()) {
	c.t.Helper()
	var ended, gone sync.WaitGroup
	c.t.Cleanup(gone.Wait) // after what the cleanups below do
	var pids []string
	for range n {
		cmd := exec.Command("sleep", "600")
		if err := cmd.Start(); err != nil {
			c.t.Fatal(err)
		}
		pids = append(pids, strconv.Itoa(cmd.Process.Pid))
		c.t.Cleanup(func() { _ = cmd.Process.Kill() })
		ended.Go(func() { _ = cmd.Wait() })
	}
	c.write(strings.Join(pids, "\n")+"\n", "steps", name, "cgroup.procs")
	gone.Go(func() {
		ended.Wait()
		_ = os.WriteFile(c.path("steps", name, "cgroup.procs"), nil, 0o600)
	})
	return gone.Wait
}

func TestCgroupV2IsLimited(t *testing.T) {
	c := newFakeV2(t)
	for file, want := range map[string]string{
		"memory.max": strconv.Itoa(2<<30 + daemonMemory), "steps/memory.max": strconv.Itoa(2 << 30), "steps/memory.swap.max": "0", "steps/pids.max": "500",
		"../cgroup.subtree_control": "+pids", "cgroup.subtree_control": "+pids", // the last of four writes
	} {
		if b, err := os.ReadFile(c.path(file)); err != nil || string(b) != want {
			t.Errorf("%s holds %q, %v, want %q", file, b, err, want)
		}
	}
	if fi, err := os.Stat(c.path("daemon")); err != nil || !fi.IsDir() {
		t.Errorf("no group for buildkitd: %v", err)
	}
}

func TestGuardEndsTheStepWithMostProcessesOfCgroupV2(t *testing.T) {
	c := newFakeV2(t)
	c.write("6\n", "steps", "pids.current")
	c.step("few", 2)
	wait := c.step("many/init", 4)
	g := &guard{cgroup: c.cgroup, dir: t.TempDir(), wrote: written, disk: 1 << 40, pids: 6}
	g.look(t.Context(), time.Now())
	wait()
	e := g.reason()
	if e == nil || e.Msg != pidsError(6).Msg || g.reason() != nil {
		t.Errorf("the reason is %v, and is told once", e)
	}
	if b, err := os.ReadFile(c.path("steps/many/init/pids.max")); err != nil || string(b) != "0" {
		t.Errorf("the step could start more: pids.max %q, %v", b, err)
	}
	got := c.running()
	if len(got) != 1 || len(got["m3o-build-test/steps/few"]) != 2 {
		t.Errorf("running: %v", got)
	}
	c.write("2\n", "steps", "pids.current")
	g.look(t.Context(), time.Now())
	if len(c.running()) != 1 || g.reason() != nil {
		t.Errorf("the modest step was ended: %v", c.running())
	}
	ctx, cancel := context.WithTimeout(t.Context(), killGrace)
	defer cancel()
	if err := c.kill(ctx); err != nil {
		t.Error(err)
	}
}

// On a disk that others filled the biggest writer among the steps is ended,
// though it is within its limit; small ones are not.
func TestGuardEndsTheBiggestWriterOfANearlyFullDisk(t *testing.T) {
	need.Root(t)
	dir := t.TempDir()
	if err := unix.Mount("tmpfs", dir, "tmpfs", 0, "size=8m"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = unix.Unmount(dir, unix.MNT_DETACH) })
	c := newFakeV2(t)
	wait := c.step("big", 1)
	c.step("small", 1)
	wrote := map[int]int64{c.running()["m3o-build-test/steps/big"][0]: 300 << 20, c.running()["m3o-build-test/steps/small"][0]: 1 << 20}
	g := &guard{cgroup: c.cgroup, dir: dir, disk: 1 << 40, wrote: func(pids []int, _ time.Time) int64 { return wrote[pids[0]] }}
	look := func() *m3o.Error {
		g.look(t.Context(), time.Now())
		return g.reason()
	}
	if e := look(); e != nil {
		t.Errorf("with an empty disk: %v", e)
	}
	if err := os.WriteFile(filepath.Join(dir, "of others"), make([]byte, 8<<20-200<<10), 0o600); err != nil {
		t.Fatal(err)
	}
	e := look()
	wait()
	if e == nil || e.Kind != m3o.Unavailable || !strings.Contains(e.Msg, "the disk of the build machine is nearly full, and it had written 300 MB") || !strings.Contains(e.Hint, "free space") {
		t.Errorf("with a full disk: %v", e)
	}
	if e := look(); e != nil || len(c.running()) != 1 {
		t.Errorf("the small writer: %v, running %v", e, c.running())
	}
}
