// Package runtimetest holds what every runtime.Driver must do, as a test suite,
// and the image its instances run (package program). Only tests import it.
package runtimetest

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/m3o/m3o"
	"github.com/m3o/m3o/runtime"
)

// A Rig is one installation of a driver, opened and serving, of which the
// test's cleanup removes everything.
type Rig struct {
	Driver runtime.Driver
	Image  string // runs package program when called as /server
	// Reopen ends the driver as a restart of the daemon would and opens its
	// state again.
	Reopen func(t *testing.T) runtime.Driver
	// Leftovers lists what is left on the machine of instances that are gone.
	Leftovers func(t *testing.T) []string
	Limits    bool // memory limits are enforced
	OwnNet    bool // instances have a network namespace of their own
	Faults    Faults
}

// patience bounds what should take a moment.
const patience = 20 * time.Second

// Suite runs the tests that every driver passes. open makes a new Rig.
func Suite(t *testing.T, open func(t *testing.T) Rig) {
	tests := []struct {
		name string
		test func(*fixture)
	}{
		{"start makes an instance that answers", startAnswers},
		{"start again and scaling", scaling},
		{"stop is repeatable", stopRepeats},
		{"what cannot run is refused and not recorded", refused},
		{"a crash is followed by a restart", crashRestarts},
		{"another revision replaces the instances one by one", replaced},
		{"a failing liveness check restarts", revived},
		{"crashing again and again is told", crashTold},
		{"usage is told", measured},
		{"exit at start is told with code and log", exitAtStart},
		{"exit 0 at start is a failure too", exitZero},
		{"out of memory is told", outOfMemory},
		{"a health check that fails is told", neverHealthy},
		{"a port nobody listens on is told", neverListens},
		{"the wrong port is told", wrongPort},
		{"listening on loopback only is told", loopbackOnly},
		{"a gRPC server is ready by its health service", grpcReady},
		{"a worker has no address", worker},
		{"who ignores SIGTERM is killed after the grace period", stubborn},
		{"logs are in order and can be followed", logs},
		{"exec", execs},
		{"run", runs},
		{"a signal reaches a command", signals},
		{"what runs once goes when it has ended", onceGoes},
		{"events come to every watcher", events},
		{"instances are there after reopening", reopen},
		{"twenty come and go without trace", twenty},
		{"what is killed while it starts is started again", killedStarting},
		{"what is killed while it is ready is ready again", killedReady},
		{"what is killed while it ends has ended", killedDraining},
		{"reopening in any phase", reopenedAnyTime},
		{"a launch that fails is told and tried again", launchFails},
		{"a full disk takes log lines and nothing else", diskFull},
		{"a restart of the machine brings everything back", rebooted},
	}
	for _, tc := range tests {
		t.Run(tc.name, func(t *testing.T) {
			rig := open(t)
			ctx, cancel := context.WithTimeout(t.Context(), 2*patience)
			defer cancel()
			tc.test(&fixture{T: t, Rig: rig, ctx: ctx})
		})
	}
}

type fixture struct {
	*testing.T
	Rig
	ctx context.Context
}

var web = runtime.Ref{App: "hello", Process: "web", Release: 3}

// workload runs the program with args.
func (f *fixture) workload(args ...string) runtime.Workload {
	return runtime.Workload{Ref: web, Image: f.Image, Args: append([]string{"/server"}, args...), Port: 8080,
		Env: []string{"GREETING=hi there"}, Grace: 5 * time.Second, Health: m3o.Health{Timeout: patience}}
}

func (f *fixture) start(w runtime.Workload, n int) {
	f.Helper()
	if err := f.Driver.Start(f.ctx, w, n); err != nil {
		f.Fatalf("Start(%s, %d) = %v", w.Ref, n, err)
	}
}

func (f *fixture) ready(w runtime.Workload, n int) []m3o.Instance {
	f.Helper()
	f.start(w, n)
	ins, err := runtime.WaitReady(f.ctx, f.Driver, w.Ref, n, nil)
	if err != nil {
		f.Fatalf("WaitReady(%s, %d) = %v", w.Ref, n, err)
	}
	return ins
}

func (f *fixture) stop(r runtime.Ref) {
	f.Helper()
	if err := f.Driver.Stop(f.ctx, r); err != nil {
		f.Fatalf("Stop(%s) = %v", r, err)
	}
}

func (f *fixture) get(in m3o.Instance, path string) string {
	f.Helper()
	req, err := http.NewRequestWithContext(f.ctx, "GET", "http://"+in.Addr+path, nil)
	if err != nil {
		f.Fatal(err)
	}
	tr := &http.Transport{DisableKeepAlives: true}
	resp, err := (&http.Client{Transport: tr}).Do(req)
	if err != nil {
		f.Fatalf("GET %s of %s: %v", path, in.ID, err)
	}
	defer resp.Body.Close() //nolint:errcheck // a test
	b, err := io.ReadAll(resp.Body)
	if err != nil {
		f.Fatal(err)
	}
	return string(b)
}

// list is the instances now.
func (f *fixture) list() []m3o.Instance {
	f.Helper()
	var all []m3o.Instance
	for in, err := range f.Driver.Events(f.ctx) {
		if err != nil {
			f.Fatal(err)
		}
		if in.ID == "" {
			return all
		}
		all = append(all, in)
	}
	f.Fatal("Events ended before its marker")
	return nil
}

// until follows events, the present state included, until one matches.
func (f *fixture) until(what string, match func(m3o.Instance) bool) m3o.Instance {
	f.Helper()
	ctx, cancel := context.WithTimeout(f.ctx, patience)
	defer cancel()
	var seen []string
	for in, err := range f.Driver.Events(ctx) {
		if err != nil {
			f.Fatal(err)
		}
		seen = append(seen, fmt.Sprintf("%s %s exit %d restarts %d", in.ID, in.Phase, in.Exit, in.Restarts))
		if in.ID != "" && match(in) {
			return in
		}
	}
	f.Fatalf("no event %q; seen:\n%s", what, strings.Join(seen, "\n"))
	return m3o.Instance{}
}

// failure starts w and returns why it does not become ready.
func (f *fixture) failure(w runtime.Workload) *m3o.Error {
	f.Helper()
	f.start(w, 1)
	ins, err := runtime.WaitReady(f.ctx, f.Driver, w.Ref, 1, nil)
	e, ok := errors.AsType[*m3o.Error](err)
	if !ok || e.Kind != m3o.Invalid {
		f.Fatalf("WaitReady = %v, %v, want an Invalid error", ins, err)
	}
	f.stop(w.Ref)
	return e
}

func (f *fixture) contains(e *m3o.Error, parts ...string) {
	f.Helper()
	for _, p := range parts {
		if !strings.Contains(e.Msg, p) {
			f.Errorf("the message lacks %q:\n%s", p, e.Msg)
		}
	}
}
