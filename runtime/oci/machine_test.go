//go:build linux

package oci_test

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/nftables"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/m3o/m3o"
	"github.com/m3o/m3o/runtime"
	"github.com/m3o/m3o/runtime/oci"
)

// reboot takes from a rig whose daemon is gone what a restart of the machine
// takes: every process, mount, cgroup and device, the firewall, and /run.
func (r rig) reboot(t *testing.T) {
	t.Helper()
	for deadline := time.Now().Add(10 * time.Second); len(r.processes(t)) > 0; {
		if time.Now().After(deadline) {
			t.Fatalf("they do not die: %v", r.processes(t))
		}
		for _, p := range r.processes(t) {
			var pid int
			if _, err := fmt.Sscanf(p, "process %d ", &pid); err == nil {
				_ = unix.Kill(pid, unix.SIGKILL)
				_, _ = unix.Wait4(pid, nil, unix.WNOHANG, nil) // a shim is a child of this test
			}
		}
		<-time.After(5 * time.Millisecond)
	}
	for _, e := range list(t, r.cfg.Run) {
		if err := os.RemoveAll(e); err != nil {
			t.Fatal(err)
		}
	}
	for _, l := range r.leftovers(t) {
		if name, ok := strings.CutPrefix(l, "device "); ok {
			if link, err := netlink.LinkByName(name); err == nil {
				if err := netlink.LinkDel(link); err != nil {
					t.Fatal(err)
				}
			}
		}
		if dir, ok := strings.CutPrefix(l, "cgroup "); ok {
			for os.Remove(dir) != nil {
				if _, err := os.Stat(dir); err != nil {
					break
				}
				<-time.After(time.Millisecond) // until the kernel has noticed the last death
			}
		}
	}
	c, err := nftables.New()
	if err != nil {
		t.Fatal(err)
	}
	tables, err := c.ListTables()
	if err != nil {
		t.Fatal(err)
	}
	for _, tb := range tables {
		if tb.Name == r.cfg.Name {
			c.DelTable(tb)
		}
	}
	if err := c.Flush(); err != nil {
		t.Fatal(err)
	}
}

func TestRestartOfTheMachineBringsEveryAppBack(t *testing.T) {
	r := newRig(t)
	d, end := r.serve(t)
	web, worker := r.workload("serve"), r.workload("mute")
	worker.Process, worker.Port = "worker", 0
	other := r.workload("serve")
	other.App = "other"
	want := map[runtime.Ref]int{web.Ref: 3, worker.Ref: 1, other.Ref: 1}
	for _, w := range []runtime.Workload{web, worker, other} {
		ready(t, d, w, want[w.Ref])
	}
	end()
	r.reboot(t)
	d = up(t, r)
	for ref, n := range want {
		ins, err := runtime.WaitReady(t.Context(), d, ref, n, nil)
		if err != nil {
			t.Errorf("%s: %v", ref, err)
		}
		for _, in := range ins {
			if in.Addr != "" {
				get(t, in, "/") // at once: ready is ready
			}
		}
	}
	for ref := range want {
		if err := d.Stop(t.Context(), ref); err != nil {
			t.Fatal(err)
		}
	}
	if left := r.leftovers(t); len(left) > 0 {
		t.Errorf("left:\n%s", strings.Join(left, "\n"))
	}
}

// A shim needs no daemon: what is logged and how it ends are kept however long
// that is away.
func TestShimKeepsLogAndExitWithoutADaemon(t *testing.T) {
	r := newRig(t)
	d, end := r.serve(t)
	in := ready(t, d, r.workload("serve"), 1)[0]
	end()
	const n = 20_000
	get(t, in, fmt.Sprintf("/print?n=%d", n))
	get(t, in, "/exit?code=6")
	exit := filepath.Join(r.cfg.Dir, "bundles", in.ID, "exit.json")
	for deadline := time.Now().Add(20 * time.Second); ; <-time.After(5 * time.Millisecond) {
		if _, err := os.Stat(exit); err == nil {
			break
		} else if time.Now().After(deadline) {
			t.Fatal(err)
		}
	}
	d = up(t, r)
	if exited, _ := restarted(t, d, in); exited.Exit != 6 {
		t.Errorf("exited %+v, want code 6", exited)
	}
	lines := 0
	for ln, err := range d.Logs(t.Context(), r.workload().Ref, 2*n, false) {
		if err != nil {
			t.Fatal(err)
		}
		if strings.HasPrefix(ln.Text, "line ") {
			lines++
		}
	}
	if lines != n {
		t.Errorf("%d lines are kept, want %d", lines, n)
	}
}

// A shim whose daemon was away for an hour: what its app printed meanwhile takes
// no more room than the limit, and the next daemon finds what runs running, and
// starts again what ended, once.
func TestShimsAloneForAnHourAreTakenOver(t *testing.T) {
	r := newRig(t)
	d, end := r.serve(t)
	ins := ready(t, d, r.workload("serve"), 2)
	talks, ends := ins[0], ins[1]
	end()
	const n = 500_000
	for range 3 { // some 60 MB
		get(t, talks, fmt.Sprintf("/print?n=%d", n))
	}
	get(t, ends, "/exit?code=5")
	exit := filepath.Join(r.cfg.Dir, "bundles", ends.ID, "exit.json")
	var b []byte
	for deadline := time.Now().Add(20 * time.Second); ; <-time.After(5 * time.Millisecond) {
		var err error
		if b, err = os.ReadFile(exit); err == nil {
			break
		} else if time.Now().After(deadline) {
			t.Fatal(err)
		}
	}
	// An hour passes.
	var e struct {
		Code, Signal int
		OOM          bool
		At           time.Time
	}
	if err := json.Unmarshal(b, &e); err != nil {
		t.Fatal(err)
	}
	ended := e.At.Add(-time.Hour)
	e.At = ended
	b, err := json.Marshal(e)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(exit, b, 0o600); err != nil {
		t.Fatal(err)
	}
	logs, err := filepath.Glob(filepath.Join(r.cfg.Dir, "logs", "*"))
	if err != nil || len(logs) == 0 {
		t.Fatalf("logs %v, %v", logs, err)
	}
	size := int64(0)
	for _, l := range logs {
		fi, err := os.Stat(l)
		if err != nil {
			t.Fatal(err)
		}
		size += fi.Size()
		if err := os.Chtimes(l, ended, ended); err != nil {
			t.Fatal(err)
		}
	}
	if size > 32<<20 {
		t.Errorf("the logs have %d bytes, want at most about 30 MB", size)
	}
	d = up(t, r)
	exited, back := restarted(t, d, ends)
	if exited.Exit != 5 || back.Restarts != 1 {
		t.Errorf("it exited as %+v and is back as %+v, want code 5 and one restart", exited, back)
	}
	for _, in := range d.Instances() {
		if in.ID == talks.ID && (in.Restarts != 0 || in.Phase != m3o.Ready || in.Addr != talks.Addr) {
			t.Errorf("what ran all the time is now %+v", in)
		}
	}
	get(t, talks, "/")
	last := ""
	for ln, err := range d.Logs(t.Context(), r.workload().Ref, 100, false) {
		if err != nil {
			t.Fatal(err)
		}
		if ln.Instance == talks.ID {
			last = ln.Text
		}
	}
	if want := fmt.Sprintf("line %d", n-1); last != want {
		t.Errorf("its log ends with %q, want %q", last, want)
	}
	if err := d.Stop(t.Context(), r.workload().Ref); err != nil {
		t.Fatal(err)
	}
	if left := r.leftovers(t); len(left) > 0 {
		t.Errorf("left:\n%s", strings.Join(left, "\n"))
	}
}

// What a volume holds stays when its instance goes, is the app's alone to
// write, and the limit of open files is the workload's.
func TestVolumeOutlivesItsInstance(t *testing.T) {
	r := newRig(t)
	d := up(t, r)
	dir := filepath.Join(filepath.Dir(r.cfg.Dir), "volume")
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	w := r.workload("serve")
	w.Files, w.Mounts = 512, []runtime.Mount{{Source: dir, Target: "/data"}}
	in := ready(t, d, w, 1)[0]
	limits, err := os.ReadFile(fmt.Sprintf("/proc/%d/limits", pidOf(t, r, in.ID, "pid")))
	if err != nil || !strings.Contains(string(limits), "Max open files            512") {
		t.Errorf("limits, %v:\n%s", err, limits)
	}
	root := fmt.Sprintf("/proc/%d/root", pidOf(t, r, in.ID, "pid"))
	if err := os.WriteFile(filepath.Join(root, "data", "note"), []byte("kept"), 0o600); err != nil {
		t.Fatal(err)
	}
	var st unix.Stat_t
	if err := unix.Stat(dir, &st); err != nil || st.Uid < 100_000 {
		t.Errorf("the volume belongs to %d, %v, want the app's own user", st.Uid, err)
	}
	w.Revision++
	if err := d.Start(t.Context(), w, 1); err != nil {
		t.Fatal(err)
	}
	next, err := runtime.WaitReplaced(t.Context(), d, w.Ref, w.Revision, 1)
	if err != nil || next[0].ID == in.ID {
		t.Fatalf("WaitReplaced = %v, %v", next, err)
	}
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/root/data/note", pidOf(t, r, next[0].ID, "pid")))
	if err != nil || string(b) != "kept" {
		t.Errorf("the next instance finds %q, %v", b, err)
	}
	for _, target := range []string{"/", "/etc", "/proc/x", "/tmp", "data", "/data/", "/a:b"} {
		w.Mounts[0].Target = target
		if err := d.Start(t.Context(), w, 1); m3o.KindOf(err) != m3o.Invalid {
			t.Errorf("a volume at %q: %v, want Invalid", target, err)
		}
	}
}

// soak starts n instances of ten apps at once, asks each, stops them all and
// expects nothing to be left.
func soak(t testing.TB, r rig, d *oci.Driver, n int) (start, stop time.Duration) {
	t.Helper()
	const apps = 10
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Minute)
	defer cancel()
	var ws []runtime.Workload
	began := time.Now()
	for i := range apps {
		w := r.workload("serve")
		w.App, w.Health.Timeout = fmt.Sprintf("soak%d", i), 5*time.Minute
		ws = append(ws, w)
		if err := d.Start(ctx, w, n/apps); err != nil {
			t.Fatal(err)
		}
	}
	for _, w := range ws {
		if _, err := runtime.WaitReady(ctx, d, w.Ref, n/apps, nil); err != nil {
			t.Fatal(err)
		}
	}
	start = time.Since(began)
	began = time.Now()
	done := make(chan error, apps)
	for _, w := range ws {
		go func() { done <- d.Stop(ctx, w.Ref) }()
	}
	for range apps {
		if err := <-done; err != nil {
			t.Error(err)
		}
	}
	stop = time.Since(began)
	if left := r.leftovers(t); len(left) > 0 {
		t.Errorf("left:\n%s", strings.Join(left, "\n"))
	}
	return start, stop
}

func TestManyInstancesOfManyAppsLeaveNothing(t *testing.T) {
	r := newRig(t)
	soak(t, r, up(t, r), 20)
}

// BenchmarkSoak starts and stops 200 instances. Run it with -benchtime 1x.
func BenchmarkSoak(b *testing.B) {
	r := newRig(b)
	d, end := r.serve(b)
	defer func() {
		end()
		shutdown(b, d)
	}()
	var start, stop time.Duration
	for b.Loop() {
		s, e := soak(b, r, d, 200)
		start, stop = start+s, stop+e
	}
	b.ReportMetric(ms(start)/float64(b.N), "start200-ms")
	b.ReportMetric(ms(stop)/float64(b.N), "stop200-ms")
}
