//go:build unix

package process_test

import (
	"archive/tar"
	"bufio"
	"bytes"
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
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
			Leftovers: func(t *testing.T) []string { return r.leftovers(t) },
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

// leftovers are records of processes and the processes themselves.
func (r rig) leftovers(t *testing.T) []string {
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
		if exe, err := os.Readlink(p); err == nil && strings.HasPrefix(exe, r.cfg.Dir) {
			left = append(left, p+" "+exe)
		}
	}
	return left
}

// TestMain makes the test binary be a daemon that a test kills.
func TestMain(m *testing.M) {
	if dir := os.Getenv("M3O_PROCESS_DAEMON"); dir != "" {
		if err := daemon(rig{process.Config{Dir: dir, Images: os.Getenv("M3O_PROCESS_IMAGES")}, os.Getenv("M3O_PROCESS_IMAGE")}); err != nil {
			fmt.Println(err)
			os.Exit(1)
		}
	}
	os.Exit(m.Run())
}

func (r rig) workload() runtime.Workload {
	return runtime.Workload{Ref: runtime.Ref{App: "hello", Process: "web", Release: 1}, Image: r.image, Args: []string{"/server", "serve"}, Port: 8080}
}

// daemon says "ready" when two instances are, and serves until it is killed.
func daemon(r rig) error {
	ctx := context.Background()
	d, err := process.Open(r.cfg)
	if err != nil {
		return err
	}
	served := make(chan error, 1)
	go func() { served <- d.Serve(ctx) }()
	if err := d.Start(ctx, r.workload(), 2); err != nil {
		return err
	}
	if _, err := runtime.WaitReady(ctx, d, r.workload().Ref, 2, nil); err != nil {
		return err
	}
	fmt.Println("ready")
	return <-served
}

// Nobody reads the output of what a killed daemon leaves, and nobody would end it.
func TestWhatAKilledDaemonLeavesIsEndedAndStartedAnew(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = append(os.Environ(), "M3O_PROCESS_DAEMON="+r.cfg.Dir, "M3O_PROCESS_IMAGES="+r.cfg.Images, "M3O_PROCESS_IMAGE="+r.image)
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	said, err := bufio.NewReader(out).ReadString('\n')
	if kerr := cmd.Process.Kill(); kerr != nil {
		t.Error(kerr)
	}
	_ = cmd.Wait() // it was killed
	if said != "ready\n" {
		t.Fatalf("the daemon says %q, %v", said, err)
	}
	before := r.leftovers(t)
	if len(before) != 4 { // two records, two processes
		t.Fatalf("the killed daemon leaves %q", before)
	}
	d, end := r.serve(t)
	defer func() { end() }()
	ins, err := runtime.WaitReady(t.Context(), d, r.workload().Ref, 2, nil)
	if err != nil {
		t.Fatal(err)
	}
	for _, in := range ins {
		if !slices.Contains(before, filepath.Join(r.cfg.Dir, "pids", in.ID)) {
			t.Errorf("%s was not there before", in.ID)
		}
	}
	for _, p := range r.leftovers(t) {
		if strings.HasPrefix(p, "/proc/") && slices.Contains(before, p) {
			t.Errorf("%s runs still", p)
		}
	}
	if err := d.Stop(t.Context(), r.workload().Ref); err != nil {
		t.Fatal(err)
	}
	if left := r.leftovers(t); len(left) > 0 {
		t.Errorf("left: %q", left)
	}
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
