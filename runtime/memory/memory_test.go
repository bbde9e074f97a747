package memory_test

import (
	"cmp"
	"context"
	"errors"
	"slices"
	"sync/atomic"
	"testing"

	"github.com/m3o/m3o"
	"github.com/m3o/m3o/runtime"
	"github.com/m3o/m3o/runtime/memory"
	"github.com/m3o/m3o/runtime/runtimetest"
	"github.com/m3o/m3o/runtime/runtimetest/program"
)

// server runs package program.
func server(ctx context.Context, p memory.Process) int {
	return program.Main(ctx, program.Process{Args: p.Args[1:], Env: p.Env, In: p.In, Out: p.Out, Err: p.Err, Listen: p.Listen, Killed: p.Killed})
}

// serve serves d until end is called.
func serve(t *testing.T, d *memory.Driver) (end func()) {
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- d.Serve(ctx) }()
	return func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("Serve = %v", err)
		}
	}
}

func open(t *testing.T, cfg memory.Config) *memory.Driver {
	t.Helper()
	cfg.Dir = cmp.Or(cfg.Dir, t.TempDir())
	d, err := memory.Open(cfg)
	if err != nil {
		t.Fatal(err)
	}
	return d
}

func TestDriver(t *testing.T) {
	runtimetest.Suite(t, func(t *testing.T) runtimetest.Rig {
		t.Parallel()
		var broken atomic.Bool
		cfg := memory.Config{Program: server, Dir: t.TempDir(), Fault: func(op string, _ runtime.Workload) error {
			if op == "launch" && broken.Load() {
				return errors.New("no room on the moon")
			}
			return nil
		}}
		d := open(t, cfg)
		end := serve(t, d)
		t.Cleanup(func() {
			end()
			if err := d.Shutdown(context.Background()); err != nil {
				t.Error(err)
			}
		})
		return runtimetest.Rig{Driver: d, Image: "sha256:any", Reopen: func(t *testing.T) runtime.Driver {
			end()
			end = serve(t, d)
			return d
		}, Faults: runtimetest.Faults{
			Kill: map[string]func(*testing.T, m3o.Instance){"instance": func(_ *testing.T, in m3o.Instance) { d.Kill(in.ID) }},
			Launch: map[string]func(*testing.T) (string, func()){"launch": func(*testing.T) (string, func()) {
				broken.Store(true)
				return "no room on the moon", func() { broken.Store(false) }
			}},
			FullDisk: func(t *testing.T) func() { return runtimetest.FullDisk(t, cfg.Dir) },
		}}
	})
}

func TestLaunchFaultIsToldAndRetried(t *testing.T) {
	broken := errors.New("no room")
	fail := true
	d := open(t, memory.Config{Program: server, Fault: func(op string, _ runtime.Workload) error {
		if op == "launch" && fail {
			return broken
		}
		return nil
	}})
	end := serve(t, d)
	defer end()
	w := runtime.Workload{Ref: runtime.Ref{App: "a", Process: "web", Release: 1}, Image: "x", Args: []string{"/server", "serve"}, Port: 8080}
	if err := d.Start(t.Context(), w, 1); err != nil {
		t.Fatal(err)
	}
	_, err := runtime.WaitReady(t.Context(), d, w.Ref, 1, nil)
	if want := "web could not be started: launch: no room"; m3o.KindOf(err) != m3o.Invalid || err.Error() != want {
		t.Errorf("WaitReady = %v, want %s", err, want)
	}
	if err := d.Stop(t.Context(), w.Ref); err != nil {
		t.Fatal(err)
	}
	fail = false
	if err := d.Start(t.Context(), w, 1); err != nil {
		t.Fatal(err)
	}
	if _, err := runtime.WaitReady(t.Context(), d, w.Ref, 1, nil); err != nil {
		t.Errorf("WaitReady after the fault = %v", err)
	}
	if err := d.Stop(t.Context(), w.Ref); err != nil {
		t.Fatal(err)
	}
}

// What breaks off between the start of an instance and its becoming ready
// failed the deploy that waited for it.
func TestEventsThatBreakOffDoNotFailAStart(t *testing.T) {
	mem := open(t, memory.Config{Program: server})
	defer serve(t, mem)()
	d := &runtimetest.Faulty{Driver: mem}
	w := runtime.Workload{Ref: runtime.Ref{App: "a", Process: "web", Release: 1}, Image: "x", Args: []string{"/server", "serve"}, Port: 8080}
	if err := d.Start(t.Context(), w, 2); err != nil {
		t.Fatal(err)
	}
	breaks := 0
	ins, err := runtime.WaitReady(t.Context(), d, w.Ref, 2, func(m3o.Instance) {
		if breaks++; breaks <= 2 {
			d.Break()
		}
	})
	if err != nil || len(ins) != 2 {
		t.Errorf("WaitReady = %v, %v", ins, err)
	}
	if err := d.Stop(t.Context(), w.Ref); err != nil {
		t.Fatal(err)
	}
}

// The nth call meets the nth fault, and nothing else does.
func TestFaultyDriver(t *testing.T) {
	mem := open(t, memory.Config{Program: server})
	defer serve(t, mem)()
	d := &runtimetest.Faulty{Driver: mem}
	lost, never := errors.New("lost"), make(chan struct{})
	d.Order("Start", runtimetest.Fault{Err: lost}, runtimetest.Fault{Err: lost, Done: true}, runtimetest.Fault{Hang: never})
	w := runtime.Workload{Ref: runtime.Ref{App: "a", Process: "web", Release: 1}, Image: "x", Args: []string{"/server", "serve"}, Port: 8080}
	for n := range 2 {
		if err := d.Start(t.Context(), w, 1); err != lost {
			t.Errorf("Start = %v, want lost", err)
		}
		if got := len(mem.Images()); got != n {
			t.Errorf("after Start %d there are %d workloads", n+1, got)
		}
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := d.Start(ctx, w, 1); !errors.Is(err, context.Canceled) {
		t.Errorf("a Start that hangs = %v", err)
	}
	if err := d.Stop(t.Context(), w.Ref); err != nil {
		t.Errorf("Stop = %v", err)
	}
	if got, want := d.Calls(), []string{"Start a/web v1 1", "Start a/web v1 1", "Start a/web v1 1", "Stop a/web v1"}; !slices.Equal(got, want) {
		t.Errorf("calls %q, want %q", got, want)
	}
}
