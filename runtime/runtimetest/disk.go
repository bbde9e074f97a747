package runtimetest

import (
	"os/exec"
	"testing"

	"github.com/m3o/m3o/internal/need"
)

// FullDisk puts a disk that is as good as full in the place of what is in dir,
// for as long as the test lasts; room makes it larger.
func FullDisk(t *testing.T, dir string) (room func()) {
	t.Helper()
	need.Root(t)
	run := func(args ...string) {
		t.Helper()
		if out, err := exec.Command(args[0], args[1:]...).CombinedOutput(); err != nil {
			t.Fatalf("%v: %v\n%s", args, err, out)
		}
	}
	run("mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", dir)
	t.Cleanup(func() { run("umount", "--lazy", dir) })
	return func() { run("mount", "-o", "remount,size=64m", dir) }
}
