//go:build linux

package oci_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/m3o/m3o"
	"github.com/m3o/m3o/internal/atomicfile"
	"github.com/m3o/m3o/runtime"
	"github.com/m3o/m3o/runtime/oci"
)

// orders are what the daemon that tests kill is told, in its environment.
type orders struct {
	Config   oci.Config
	Workload runtime.Workload
	Replicas int
	Stop     bool // stop it once it is ready
}

// daemon is this test binary as a daemon of its own: it does as ordered, says
// "ready" when the instances are and "stopped" when they are gone, and serves
// until it is killed.
func daemon() {
	die := func(err error) {
		if err != nil {
			fmt.Println("error", err)
			os.Exit(1)
		}
	}
	var o orders
	die(json.Unmarshal([]byte(os.Getenv("M3O_OCI_DAEMON")), &o))
	die(os.WriteFile(filepath.Join(o.Config.Dir, "..", "daemon.pid"), []byte(strconv.Itoa(os.Getpid())), 0o600))
	ctx := context.Background()
	d, err := oci.Open(ctx, o.Config)
	die(err)
	go func() { die(d.Serve(ctx)) }()
	die(d.Start(ctx, o.Workload, o.Replicas))
	_, err = runtime.WaitReady(ctx, d, o.Workload.Ref, o.Replicas, nil)
	die(err)
	fmt.Println("ready")
	if o.Stop {
		go func() {
			for in := range d.Events(ctx) {
				if in.Phase == m3o.Draining {
					fmt.Println("draining")
				}
			}
		}()
		die(d.Stop(ctx, o.Workload.Ref))
		fmt.Println("stopped")
	}
	select {}
}

// child starts the daemon and returns its command; said gives what it says.
func (r rig) child(t *testing.T, o orders) (cmd *exec.Cmd, said func() string) {
	t.Helper()
	o.Config = r.cfg
	o.Config.Log = nil
	b, err := json.Marshal(o)
	if err != nil {
		t.Fatal(err)
	}
	cmd = exec.Command("/proc/self/exe")
	cmd.Env = append(os.Environ(), "M3O_OCI_DAEMON="+string(b))
	cmd.Stderr = os.Stderr
	pr, pw, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	cmd.Stdout = pw
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	_ = pw.Close()
	t.Cleanup(func() { _ = pr.Close() })
	return cmd, func() string {
		t.Helper()
		if err := pr.SetReadDeadline(time.Now().Add(30 * time.Second)); err != nil {
			t.Fatal(err)
		}
		b := make([]byte, 4096)
		n, err := pr.Read(b)
		if err != nil && n == 0 {
			return "" // it was killed
		}
		return strings.TrimSpace(string(b[:n]))
	}
}

// wrap puts a script in runc's place. It may use $R for runc, $VERB for the
// command called, $DAEMON, $SHIM and $INSTANCE (known once created) for
// process ids; the phase file tells it to do something once.
func (r *rig) wrap(t *testing.T, script string) {
	t.Helper()
	dir := filepath.Dir(r.cfg.Dir)
	path := filepath.Join(dir, "runc")
	text := `#!/bin/sh
R=` + r.cfg.Runc + `
DIR=` + dir + `
VERB=; for a in "$@"; do case $a in create|start|delete|exec) VERB=$a; break;; esac; done
DAEMON=$(cat $DIR/daemon.pid 2>/dev/null); for ID in "$@"; do :; done
SHIM=$(cat $DIR/state/bundles/$ID/shim.pid); INSTANCE=$(cat $DIR/state/bundles/$ID/pid 2>/dev/null)
once() { rm "$DIR/phase-$1" 2>/dev/null; }
` + script + "\n"
	if err := atomicfile.Write(path, []byte(text), 0o755); err != nil {
		t.Fatal(err)
	}
	r.cfg.Runc = path
}

// breakable has runc be where fail puts a script in its place, for a driver
// that is open, until mend is called.
func (r *rig) breakable(t *testing.T) (fail func(t *testing.T, script string), mend func()) {
	t.Helper()
	whole := *r
	r.cfg.Runc = filepath.Join(filepath.Dir(r.cfg.Dir), "runc")
	mend = func() {
		next := r.cfg.Runc + "-next"
		if err := errors.Join(os.Symlink(whole.cfg.Runc, next), os.Rename(next, r.cfg.Runc)); err != nil {
			t.Fatal(err)
		}
	}
	mend()
	return func(t *testing.T, script string) {
		t.Helper()
		broken := whole
		broken.wrap(t, script)
	}, mend
}

func (r rig) phase(t *testing.T, name string) {
	t.Helper()
	if err := os.WriteFile(filepath.Join(filepath.Dir(r.cfg.Dir), "phase-"+name), nil, 0o600); err != nil {
		t.Fatal(err)
	}
}

// killer kills a victim before or after a runc command.
const killer = `
once $VERB-before-daemon && kill -9 $DAEMON
once $VERB-before-shim && kill -9 $SHIM
once $VERB-before-instance && kill -9 $INSTANCE
once $VERB-before-runc && kill -9 $$
once $VERB-during-runc && { "$R" "$@" & sleep 0.02; kill -9 $!; exit 137; }
"$R" "$@"; e=$?
INSTANCE=$(cat $DIR/state/bundles/$ID/pid 2>/dev/null)
once $VERB-after-instance && kill -9 $INSTANCE
once $VERB-after-daemon && kill -9 $DAEMON
once $VERB-after-shim && kill -9 $SHIM
once $VERB-after-runc && kill -9 $$
exit $e`

func (r rig) workload(args ...string) runtime.Workload {
	return runtime.Workload{Ref: runtime.Ref{App: "hello", Process: "web", Release: 1}, Image: r.image,
		Args: append([]string{"/server"}, args...), Port: 8080, Grace: 5 * time.Second}
}

// converges opens the driver after whatever happened, expects w to become
// ready and to leave nothing when stopped.
func (r rig) converges(t *testing.T, w runtime.Workload, n int) {
	t.Helper()
	d, end := r.serve(t)
	defer func() {
		end()
		shutdown(t, d)
		if left := r.leftovers(t); len(left) > 0 {
			t.Errorf("left:\n%s", strings.Join(left, "\n"))
		}
	}()
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	if err := d.Start(ctx, w, n); err != nil {
		t.Fatal(err)
	}
	ins, err := runtime.WaitReady(ctx, d, w.Ref, n, nil)
	if err != nil {
		t.Fatal(err)
	}
	seen := map[netip.AddrPort]bool{}
	for _, in := range ins {
		a := netip.MustParseAddrPort(in.Addr)
		if seen[a] {
			t.Errorf("two instances have the address %s", a)
		}
		seen[a] = true
		get(t, in, "/")
	}
	if have := d.Instances(); len(have) != n {
		t.Errorf("there are %d instances, want %d: %v", len(have), n, have)
	}
	if err := d.Stop(ctx, w.Ref); err != nil {
		t.Fatal(err)
	}
	if left := r.leftovers(t); len(left) > 0 {
		t.Errorf("left after Stop:\n%s", strings.Join(left, "\n"))
	}
}

func TestDaemonKilledInEachPhaseConverges(t *testing.T) {
	for _, phase := range []string{"create-before", "create-after", "start-before", "start-after", "delete-before", "delete-after"} {
		t.Run(phase, func(t *testing.T) {
			r := newRig(t)
			runc := r.cfg.Runc
			r.wrap(t, killer)
			if err := os.MkdirAll(r.cfg.Dir, 0o700); err != nil {
				t.Fatal(err)
			}
			r.phase(t, phase+"-daemon")
			w := r.workload("serve")
			cmd, _ := r.child(t, orders{Workload: w, Replicas: 1, Stop: strings.HasPrefix(phase, "delete")})
			err := cmd.Wait()
			if ws, ok := cmd.ProcessState.Sys().(syscall.WaitStatus); !ok || ws.Signal() != syscall.SIGKILL {
				t.Fatalf("the daemon ended with %v, want to be killed", err)
			}
			r.cfg.Runc = runc
			r.converges(t, w, 1)
		})
	}
}

// The daemon is killed after ever longer times, so that every step is hit in
// some run of the test, those no hook can reach too.
func TestDaemonKilledAtAnyTimeConverges(t *testing.T) {
	r := newRig(t)
	if err := os.MkdirAll(r.cfg.Dir, 0o700); err != nil {
		t.Fatal(err)
	}
	w := r.workload("serve")
	for i := range 12 {
		cmd, said := r.child(t, orders{Workload: w, Replicas: 2, Stop: true})
		kill := time.AfterFunc(time.Duration(i*i)*5*time.Millisecond, func() { _ = cmd.Process.Kill() })
		for s := said(); s != ""; s = said() {
			if strings.Contains(s, "stopped") {
				_ = cmd.Process.Kill()
			}
			if strings.Contains(s, "error") {
				t.Errorf("the daemon says %s", s)
			}
		}
		_ = cmd.Wait()
		kill.Stop()
	}
	r.converges(t, w, 2)
}

// Whichever process of an instance is killed, and when: another one is made,
// and nothing of the first is left.
func TestProcessKilledInEachPhaseIsReplaced(t *testing.T) {
	for victim, phases := range map[string][]string{
		"shim":     {"create-before", "create-after", "start-before", "start-after", "delete-before", "delete-after"},
		"instance": {"create-after", "start-before", "start-after"}, // before it there is none, and delete comes when it has ended
		"runc": {"create-before", "create-during", "create-after", "start-before", "start-during", "start-after",
			"delete-before", "delete-during", "delete-after"},
	} {
		for _, phase := range phases {
			t.Run(victim+" "+phase, func(t *testing.T) {
				r := newRig(t)
				r.wrap(t, killer)
				r.phase(t, phase+"-"+victim)
				r.converges(t, r.workload("serve"), 1)
				if left := list(t, filepath.Dir(r.cfg.Dir)); len(left) > 3 {
					t.Errorf("the phase was not reached: %q", left)
				}
			})
		}
	}
}

// An instance that takes its time to end is being stopped when its shim, or it
// itself, is killed: the stop ends at once, and as if nothing had happened.
func TestProcessKilledWhileItIsStoppedLeavesNothing(t *testing.T) {
	for _, victim := range []string{"shim.pid", "pid"} {
		t.Run(victim, func(t *testing.T) {
			r := newRig(t)
			d := up(t, r)
			w := r.workload("stubborn")
			w.Grace = time.Minute
			in := ready(t, d, w, 1)[0]
			done := make(chan error, 1)
			go func() { done <- d.Stop(t.Context(), w.Ref) }()
			ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
			defer cancel()
			for e, err := range d.Events(ctx) {
				if err != nil {
					t.Fatal(err)
				}
				if e.Phase == m3o.Draining {
					break
				}
			}
			if err := unix.Kill(pidOf(t, r, in.ID, victim), unix.SIGKILL); err != nil {
				t.Fatal(err)
			}
			select {
			case err := <-done:
				if err != nil {
					t.Error(err)
				}
			case <-ctx.Done():
				t.Error("the stop waits for the grace period")
			}
			if left := r.leftovers(t); len(left) > 0 {
				t.Errorf("left:\n%s", strings.Join(left, "\n"))
			}
		})
	}
}

// A daemon killed while it stops an instance is followed by one that goes on
// with it.
func TestDaemonKilledWhileItStopsGoesOnStopping(t *testing.T) {
	r := newRig(t)
	if err := os.MkdirAll(r.cfg.Dir, 0o700); err != nil {
		t.Fatal(err)
	}
	w := r.workload("stubborn")
	w.Grace = 2 * time.Second
	cmd, said := r.child(t, orders{Workload: w, Replicas: 1, Stop: true})
	for s := said(); !strings.Contains(s, "draining"); s = said() {
		if s == "" || strings.Contains(s, "error") {
			t.Fatalf("the daemon says %q", s)
		}
	}
	_ = cmd.Process.Kill()
	_ = cmd.Wait()
	d := up(t, r)
	if err := d.Stop(t.Context(), w.Ref); err != nil {
		t.Fatal(err)
	}
	if left := r.leftovers(t); len(left) > 0 {
		t.Errorf("left:\n%s", strings.Join(left, "\n"))
	}
}
