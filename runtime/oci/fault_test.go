//go:build linux

package oci_test

import (
	"context"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/m3o/m3o"
	"github.com/m3o/m3o/runtime"
	"github.com/m3o/m3o/runtime/oci"
)

func get(t *testing.T, in m3o.Instance, path string) string {
	t.Helper()
	c := http.Client{Timeout: 10 * time.Second, Transport: &http.Transport{DisableKeepAlives: true}}
	resp, err := c.Get("http://" + in.Addr + path)
	if err != nil {
		t.Fatalf("GET %s of %s: %v", path, in.ID, err)
	}
	defer resp.Body.Close() //nolint:errcheck // a test
	b, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

// up is a served driver that is shut down and leaves nothing.
func up(t *testing.T, r rig) *oci.Driver {
	t.Helper()
	d, end := r.serve(t)
	t.Cleanup(func() {
		end()
		shutdown(t, d)
		if left := r.leftovers(t); len(left) > 0 {
			t.Errorf("left after Shutdown:\n%s", strings.Join(left, "\n"))
		}
	})
	return d
}

func ready(t *testing.T, d *oci.Driver, w runtime.Workload, n int) []m3o.Instance {
	t.Helper()
	if err := d.Start(t.Context(), w, n); err != nil {
		t.Fatal(err)
	}
	ins, err := runtime.WaitReady(t.Context(), d, w.Ref, n, nil)
	if err != nil {
		t.Fatal(err)
	}
	return ins
}

// restarted waits until the instance is ready after another restart.
func restarted(t *testing.T, d *oci.Driver, after m3o.Instance) (exited, back m3o.Instance) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	for in, err := range d.Events(ctx) {
		if err != nil {
			t.Fatal(err)
		}
		if in.Phase == m3o.Exited {
			exited = in
		}
		if in.ID == after.ID && in.Phase == m3o.Ready && in.Restarts > after.Restarts {
			return exited, in
		}
	}
	t.Fatalf("%s was not restarted", after.ID)
	return
}

func pidOf(t *testing.T, r rig, id, name string) int {
	t.Helper()
	b, err := os.ReadFile(filepath.Join(r.cfg.Dir, "bundles", id, name))
	if err != nil {
		t.Fatal(err)
	}
	pid, err := strconv.Atoi(strings.TrimSpace(string(b)))
	if err != nil {
		t.Fatal(err)
	}
	return pid
}

func TestInstanceKilledIsRestarted(t *testing.T) {
	r := newRig(t)
	d := up(t, r)
	in := ready(t, d, r.workload("serve"), 1)[0]
	if err := unix.Kill(pidOf(t, r, in.ID, "pid"), unix.SIGKILL); err != nil {
		t.Fatal(err)
	}
	_, back := restarted(t, d, in)
	get(t, back, "/")
}

func TestShimKilledMeansInstanceIsRestarted(t *testing.T) {
	r := newRig(t)
	d := up(t, r)
	in := ready(t, d, r.workload("serve"), 1)[0]
	app := pidOf(t, r, in.ID, "pid")
	if err := unix.Kill(pidOf(t, r, in.ID, "shim.pid"), unix.SIGKILL); err != nil {
		t.Fatal(err)
	}
	_, back := restarted(t, d, in)
	get(t, back, "/")
	if now := pidOf(t, r, in.ID, "pid"); now == app {
		t.Errorf("process %d is still the instance", app)
	}
	if err := d.Stop(t.Context(), r.workload().Ref); err != nil {
		t.Fatal(err)
	}
	if left := r.leftovers(t); len(left) > 0 {
		t.Errorf("left:\n%s", strings.Join(left, "\n"))
	}
}

func TestInstancesServeWhileTheDaemonIsAway(t *testing.T) {
	r := newRig(t)
	if err := os.MkdirAll(r.cfg.Dir, 0o700); err != nil {
		t.Fatal(err)
	}
	w := r.workload("serve")
	cmd, said := r.child(t, orders{Workload: w, Replicas: 2})
	if s := said(); s != "ready" {
		t.Fatalf("the daemon says %q", s)
	}
	if err := cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	_ = cmd.Wait()
	pids := map[string]int{}
	for _, b := range list(t, filepath.Join(r.cfg.Dir, "bundles")) {
		pids[filepath.Base(b)] = pidOf(t, r, filepath.Base(b), "pid")
	}
	if len(pids) != 2 {
		t.Fatalf("instances %v, want 2", pids)
	}
	d := up(t, r)
	// The router must not lose them: they are ready from the first moment on.
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	found := map[string]bool{}
	for in, err := range d.Events(ctx) {
		if err != nil {
			t.Fatal(err)
		}
		if in.ID == "" {
			continue
		}
		if in.Phase == m3o.Ready {
			found[in.ID] = true
			if now := pidOf(t, r, in.ID, "pid"); now != pids[in.ID] || in.Restarts != 0 {
				t.Errorf("%s is process %d after %d restarts, want %d still", in.ID, now, in.Restarts, pids[in.ID])
			}
			get(t, in, "/")
		}
		if len(found) == 2 {
			break
		}
	}
}

func TestExitWhileTheDaemonIsAwayKeepsItsCode(t *testing.T) {
	r := newRig(t)
	d, end := r.serve(t)
	in := ready(t, d, r.workload("serve"), 1)[0]
	end()
	get(t, in, "/exit?code=5")
	exit := filepath.Join(r.cfg.Dir, "bundles", in.ID, "exit.json")
	for deadline := time.Now().Add(10 * time.Second); ; time.Sleep(5 * time.Millisecond) {
		if _, err := os.Stat(exit); err == nil {
			break
		} else if time.Now().After(deadline) {
			t.Fatal(err)
		}
	}
	d = up(t, r)
	exited, back := restarted(t, d, in)
	if exited.Exit != 5 || back.ID != in.ID {
		t.Errorf("exited %+v, want %s with code 5", exited, in.ID)
	}
}

func TestProgramThatIsNotThereIsTold(t *testing.T) {
	r := newRig(t)
	d := up(t, r)
	w := r.workload()
	w.Args = []string{"/nowhere/server"}
	if err := d.Start(t.Context(), w, 1); err != nil {
		t.Fatal(err)
	}
	_, err := runtime.WaitReady(t.Context(), d, w.Ref, 1, nil)
	if m3o.KindOf(err) != m3o.Invalid || !strings.Contains(err.Error(), "/nowhere/server") {
		t.Errorf("WaitReady = %v, want to read of /nowhere/server", err)
	}
	if err := d.Stop(t.Context(), w.Ref); err != nil {
		t.Fatal(err)
	}
}

func TestFullDiskLosesLogLinesButNeverTheApp(t *testing.T) {
	r := newRig(t)
	logs := filepath.Join(r.cfg.Dir, "logs")
	if err := os.MkdirAll(logs, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mount("tmpfs", logs, "tmpfs", 0, "size=64k"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = unix.Unmount(logs, unix.MNT_DETACH) })
	d := up(t, r)
	in := ready(t, d, r.workload("serve"), 1)[0]
	get(t, in, "/print?n=100000") // a few MB; blocks for ever if nobody reads the pipe
	get(t, in, "/")
	if err := unix.Mount("tmpfs", logs, "tmpfs", unix.MS_REMOUNT, "size=8m"); err != nil {
		t.Fatal(err)
	}
	get(t, in, "/print?n=1")
	if err := d.Stop(t.Context(), r.workload().Ref); err != nil {
		t.Fatal(err)
	}
	lost, last := 0, ""
	for ln, err := range d.Logs(t.Context(), r.workload().Ref, 1<<20, false) {
		if err != nil {
			t.Fatal(err)
		}
		var n int
		if _, err := fmt.Sscanf(ln.Text, "m3o: %d bytes of log lost", &n); err == nil {
			lost += n
		}
		last = ln.Text
	}
	if lost == 0 || last != "asked to end" {
		t.Errorf("the log tells of %d bytes lost and ends with %q, want some and %q", lost, last, "asked to end")
	}
}

func TestSecondDriverOfTheSameDirectoryOrNameIsRefused(t *testing.T) {
	r := newRig(t)
	up(t, r)
	ctx, cancel := context.WithTimeout(t.Context(), 200*time.Millisecond)
	defer cancel()
	if _, err := oci.Open(ctx, r.cfg); m3o.KindOf(err) != m3o.Conflict {
		t.Errorf("Open = %v, want Conflict", err)
	}
	other := newRig(t) // another directory, the same name
	ctx, cancel = context.WithTimeout(t.Context(), 200*time.Millisecond)
	defer cancel()
	if _, err := oci.Open(ctx, other.cfg); m3o.KindOf(err) != m3o.Conflict {
		t.Errorf("Open of another directory by the same name = %v, want Conflict", err)
	}
}

func TestTwoDriversOnOneHostDoNotMeet(t *testing.T) {
	a, b := newRig(t), newRig(t)
	b.cfg.Name, b.cfg.Subnet = "m3otwo", mustPrefix("198.19.0.0/16")
	da, db := up(t, a), up(t, b)
	ia, ib := ready(t, da, a.workload("serve"), 1)[0], ready(t, db, b.workload("serve"), 1)[0]
	get(t, ia, "/")
	get(t, ib, "/")
	if err := db.Stop(t.Context(), b.workload().Ref); err != nil {
		t.Fatal(err)
	}
	get(t, ia, "/")
}

// The shim writes the log and package runtime reads it: neither may lose a
// line when the file is rotated.
func TestLogIsWholeAcrossRotation(t *testing.T) {
	r := newRig(t)
	d := up(t, r)
	in := ready(t, d, r.workload("serve"), 1)[0]
	const n = 300_000 // 13 MB
	printed := make(chan struct{})
	go func() {
		defer close(printed)
		get(t, in, fmt.Sprintf("/print?n=%d", n))
	}()
	next := 0
	ctx, cancel := context.WithTimeout(t.Context(), 60*time.Second)
	defer cancel()
	for ln, err := range d.Logs(ctx, r.workload().Ref, 1<<30, true) {
		if err != nil {
			t.Fatal(err)
		}
		if !strings.HasPrefix(ln.Text, "line ") {
			continue
		}
		if ln.Text != fmt.Sprintf("line %d", next) {
			t.Fatalf("got %q, want line %d", ln.Text, next)
		}
		if next++; next == n {
			break
		}
	}
	if next != n {
		t.Errorf("got %d lines, want %d", next, n)
	}
	<-printed
	log, err := filepath.Glob(filepath.Join(r.cfg.Dir, "logs", "hello", "web.v1", "*"))
	if err != nil || len(log) != 2 {
		t.Errorf("log files %q, %v, want 2", log, err)
	}
}
