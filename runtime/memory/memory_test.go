package memory_test

import (
	"context"
	"errors"
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
	cfg.Dir = t.TempDir()
	d, err := memory.Open(cfg)
	if err != nil {
		t.Fatal(err)
	}
	return d
}

func TestDriver(t *testing.T) {
	runtimetest.Suite(t, func(t *testing.T) runtimetest.Rig {
		t.Parallel()
		d := open(t, memory.Config{Program: server})
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
