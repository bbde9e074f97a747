//go:build unix

package process_test

import (
	"archive/tar"
	"bytes"
	"context"
	"os"
	"path/filepath"
	"strconv"
	"syscall"
	"testing"

	"github.com/m3o/m3o"
	"github.com/m3o/m3o/runtime"
	"github.com/m3o/m3o/runtime/process"
	"github.com/m3o/m3o/runtime/runtimetest"
)

type rig struct {
	cfg   process.Config
	image string
}

func newRig(t *testing.T) rig {
	t.Helper()
	dir := t.TempDir()
	r := rig{cfg: process.Config{Dir: filepath.Join(dir, "state"), Images: filepath.Join(dir, "images")}}
	r.image = runtimetest.ServerImage(t, r.cfg.Images)
	return r
}

func (r rig) serve(t *testing.T) (d *process.Driver, end func()) {
	t.Helper()
	d, err := process.Open(r.cfg)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- d.Serve(ctx) }()
	return d, func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("Serve = %v", err)
		}
	}
}

func TestDriver(t *testing.T) {
	runtimetest.Suite(t, func(t *testing.T) runtimetest.Rig {
		t.Parallel()
		r := newRig(t)
		d, end := r.serve(t)
		t.Cleanup(func() { end() })
		return runtimetest.Rig{Driver: d, Image: r.image,
			Reopen: func(t *testing.T) runtime.Driver {
				end()
				d, end = r.serve(t)
				return d
			},
			Leftovers: func(t *testing.T) []string {
				t.Helper()
				left, err := filepath.Glob(filepath.Join(r.cfg.Dir, "pids", "*"))
				if err != nil {
					t.Fatal(err)
				}
				// Its program is run from below Dir.
				procs, err := filepath.Glob("/proc/[0-9]*/exe")
				if err != nil {
					t.Fatal(err)
				}
				for _, p := range procs {
					if exe, err := os.Readlink(p); err == nil && len(exe) > len(r.cfg.Dir) && exe[:len(r.cfg.Dir)] == r.cfg.Dir {
						left = append(left, p+" "+exe)
					}
				}
				return left
			},
			Faults: runtimetest.Faults{
				Kill: map[string]func(*testing.T, m3o.Instance){"instance": func(t *testing.T, in m3o.Instance) {
					if err := syscall.Kill(r.pid(t, in.ID), syscall.SIGKILL); err != nil {
						t.Fatal(err)
					}
				}},
				Launch: map[string]func(*testing.T) (string, func()){"exec": func(t *testing.T) (string, func()) {
					programs, err := filepath.Glob(filepath.Join(r.cfg.Dir, "images", "*", "server"))
					if err != nil || len(programs) != 1 {
						t.Fatalf("programs %q, %v", programs, err)
					}
					mode := func(m os.FileMode) {
						if err := os.Chmod(programs[0], m); err != nil {
							t.Fatal(err)
						}
					}
					mode(0o600)
					return "permission denied", func() { mode(0o755) }
				}},
				FullDisk: func(t *testing.T) func() { return runtimetest.FullDisk(t, filepath.Join(r.cfg.Dir, "logs")) },
			}}
	})
}

// pid is the process of an instance.
func (r rig) pid(t *testing.T, id string) int {
	t.Helper()
	b, err := os.ReadFile(filepath.Join(r.cfg.Dir, "pids", id))
	if err != nil {
		t.Fatal(err)
	}
	pid, err := strconv.Atoi(string(b))
	if err != nil {
		t.Fatal(err)
	}
	return pid
}

// An image must not write outside the directory it is unpacked to.
func TestHostileLayersStayInside(t *testing.T) {
	entries := map[string][]tar.Header{
		"dots":          {{Name: "../../escape", Typeflag: tar.TypeReg, Mode: 0o644}},
		"symlink":       {{Name: "d", Linkname: "/", Typeflag: tar.TypeSymlink}, {Name: "d/tmp/escape", Typeflag: tar.TypeReg, Mode: 0o644}},
		"dots symlink":  {{Name: "d", Linkname: "../..", Typeflag: tar.TypeSymlink}, {Name: "d/escape", Typeflag: tar.TypeReg, Mode: 0o644}},
		"hard link":     {{Name: "p", Linkname: "../../images/index.json", Typeflag: tar.TypeLink}},
		"whiteout":      {{Name: "d", Linkname: "../../images", Typeflag: tar.TypeSymlink}, {Name: "d/.wh.index.json", Typeflag: tar.TypeReg}},
		"opaque parent": {{Name: "d", Linkname: "../../images", Typeflag: tar.TypeSymlink}, {Name: "d/.wh..wh..opq", Typeflag: tar.TypeReg}},
	}
	for name, hs := range entries {
		t.Run(name, func(t *testing.T) {
			r := newRig(t)
			var b bytes.Buffer
			tw := tar.NewWriter(&b)
			for _, h := range hs {
				if err := tw.WriteHeader(&h); err != nil {
					t.Fatal(err)
				}
			}
			if err := tw.Close(); err != nil {
				t.Fatal(err)
			}
			image := runtimetest.WriteRawImage(t, r.cfg.Images, []string{"/server"}, b.Bytes())
			before := tree(t, filepath.Dir(r.cfg.Dir), r.cfg.Dir)
			d, end := r.serve(t)
			defer end()
			_, err := d.Run(t.Context(), runtime.Workload{Ref: runtime.Ref{App: "a", Process: "p"}, Image: image}, runtime.Cmd{})
			if m3o.KindOf(err) != m3o.Invalid {
				t.Errorf("Run = %v, want Invalid", err)
			}
			if after := tree(t, filepath.Dir(r.cfg.Dir), r.cfg.Dir); after != before {
				t.Errorf("files outside changed from\n%s\nto\n%s", before, after)
			}
			if _, err := os.Stat("/tmp/escape"); err == nil {
				t.Error("the layer wrote to /tmp/escape")
			}
		})
	}
}

// tree lists all files below dir but not those below skip.
func tree(t *testing.T, dir, skip string) string {
	t.Helper()
	var out string
	err := filepath.WalkDir(dir, func(p string, e os.DirEntry, err error) error {
		if err != nil || p == skip {
			return filepath.SkipDir
		}
		out += p + "\n"
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return out
}

func TestDamagedLayerIsRefused(t *testing.T) {
	r := newRig(t)
	blobs, err := filepath.Glob(filepath.Join(r.cfg.Images, "blobs", "sha256", "*"))
	if err != nil {
		t.Fatal(err)
	}
	for _, b := range blobs { // the layer is the large one
		if fi, err := os.Stat(b); err == nil && fi.Size() > 1<<20 {
			if err := os.Truncate(b, fi.Size()-4096); err != nil {
				t.Fatal(err)
			}
		}
	}
	d, end := r.serve(t)
	defer end()
	_, err = d.Run(t.Context(), runtime.Workload{Ref: runtime.Ref{App: "a", Process: "p"}, Image: r.image}, runtime.Cmd{})
	if m3o.KindOf(err) != m3o.Invalid {
		t.Errorf("Run of a damaged image = %v, want Invalid", err)
	}
}
