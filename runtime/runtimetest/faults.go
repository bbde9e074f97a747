package runtimetest

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/m3o/m3o"
	"github.com/m3o/m3o/runtime"
)

// Faults are what can be done to an installation of a driver. What it has
// nothing to be done to, it leaves out.
type Faults struct {
	// Kill ends, as kill -9 does, what an instance consists of, by name.
	Kill map[string]func(t *testing.T, in m3o.Instance)
	// Launch makes every launch fail at a step, by name, until mend is called.
	// The reason, if there is one, is what the error has to tell.
	Launch map[string]func(t *testing.T) (reason string, mend func())
	// FullDisk takes all room for logs away, until room is called. It is called
	// before there are instances.
	FullDisk func(t *testing.T) (room func())
	// Reboot restarts the machine: all processes and devices are gone and what
	// is on disk stays. It opens the driver again.
	Reboot func(t *testing.T) runtime.Driver
}

// each does something with every entry of one of the maps, in order.
func each[T any](f *fixture, all map[string]T, do func(name string, one T)) {
	if len(all) == 0 {
		f.Log("the driver has nothing that this could be done to")
	}
	for _, name := range slices.Sorted(maps.Keys(all)) {
		do(name, all[name])
	}
}

// empty stops r, which has nothing left then.
func (f *fixture) empty(after string, r runtime.Ref) {
	f.Helper()
	f.stop(r)
	if left := f.list(); len(left) != 0 {
		f.Errorf("after %s and Stop there are %v", after, left)
	}
	f.clean()
}

// anew replaces w, which does not get there, by what does.
func (f *fixture) anew(after string, w runtime.Workload) {
	f.Helper()
	w.Args, w.Revision = []string{"/server", "serve"}, w.Revision+1
	f.start(w, 1)
	ins, err := runtime.WaitReplaced(f.ctx, f.Driver, w.Ref, w.Revision, 1)
	if err != nil {
		f.Fatalf("after %s: %v", after, err)
	}
	f.get(ins[0], "/")
	f.empty(after, w.Ref)
}

// starting starts what never gets ready, and waits until it runs.
func (f *fixture) starting() (runtime.Workload, m3o.Instance) {
	f.Helper()
	w := f.workload("mute")
	f.start(w, 1)
	return w, f.until("running", func(in m3o.Instance) bool { return in.Phase == m3o.Starting && in.Addr != "" })
}

// stopping begins to stop what takes its time to end, and waits until it is
// told to. The result gives what Stop returns.
func (f *fixture) stopping(grace time.Duration) (w runtime.Workload, in m3o.Instance, stopped <-chan error, giveUp func()) {
	f.Helper()
	w = f.workload("stubborn")
	w.Grace = grace
	f.ready(w, 1)
	ctx, cancel := context.WithCancel(f.ctx)
	done := make(chan error, 1)
	go func() { done <- f.Driver.Stop(ctx, w.Ref) }()
	in = f.until("draining", func(in m3o.Instance) bool { return in.Phase == m3o.Draining })
	return w, in, done, cancel
}

func killedStarting(f *fixture) {
	each(f, f.Faults.Kill, func(victim string, kill func(*testing.T, m3o.Instance)) {
		w, in := f.starting()
		kill(f.T, in)
		f.until("another start", func(e m3o.Instance) bool { return e.Restarts > 0 && e.Phase == m3o.Starting && e.Addr != "" })
		f.anew("the death of the "+victim+" at start", w)
	})
}

func killedReady(f *fixture) {
	each(f, f.Faults.Kill, func(victim string, kill func(*testing.T, m3o.Instance)) {
		w := f.workload("serve")
		in := f.ready(w, 2)[0]
		kill(f.T, in)
		back := f.until("ready again", func(e m3o.Instance) bool { return e.ID == in.ID && e.Phase == m3o.Ready && e.Restarts > 0 })
		f.get(back, "/")
		if now := f.list(); len(now) != 2 {
			f.Errorf("after the death of the %s there are %v, want two", victim, now)
		}
		f.empty("the death of the "+victim, w.Ref)
	})
}

// killedDraining: whoever kills what is being stopped only helps.
func killedDraining(f *fixture) {
	each(f, f.Faults.Kill, func(victim string, kill func(*testing.T, m3o.Instance)) {
		w, in, stopped, giveUp := f.stopping(time.Hour)
		defer giveUp()
		kill(f.T, in)
		if err := <-stopped; err != nil {
			f.Errorf("Stop, after the death of the %s, = %v", victim, err)
		}
		f.empty("the death of the "+victim, w.Ref)
	})
}

// reopenedAnyTime: a driver takes over from the one before it, wherever that was.
func reopenedAnyTime(f *fixture) {
	w, _ := f.starting()
	f.Driver = f.Reopen(f.T)
	f.anew("reopening at start", w)

	w, _, stopped, giveUp := f.stopping(200 * time.Millisecond)
	f.Driver = f.Reopen(f.T)
	giveUp() // who asked for it is gone, too
	<-stopped
	f.empty("reopening while it drains", w.Ref)

	w = f.workload("exit", "3")
	f.start(w, 1)
	f.until("a pause", func(in m3o.Instance) bool { return in.Phase == m3o.Exited && in.Restarts > 0 })
	f.Driver = f.Reopen(f.T)
	f.anew("reopening in a pause", w)
}

func launchFails(f *fixture) {
	w := f.workload("serve")
	f.ready(w, 1)
	f.stop(w.Ref)
	each(f, f.Faults.Launch, func(step string, fail func(*testing.T) (string, func())) {
		reason, mend := fail(f.T)
		f.start(w, 1)
		_, err := runtime.WaitReady(f.ctx, f.Driver, w.Ref, 1, nil)
		if m3o.KindOf(err) != m3o.Invalid || !strings.Contains(err.Error(), "web could not be started: ") || !strings.Contains(err.Error(), reason) {
			f.Errorf("failing at %s: WaitReady = %v, want it told: %s", step, err, reason)
		}
		mend()
		// It is tried again, unasked.
		in := f.until("ready after all", func(in m3o.Instance) bool { return in.Phase == m3o.Ready })
		f.get(in, "/")
		f.empty("failing at "+step, w.Ref)

		_, mend = fail(f.T)
		f.start(w, 2)
		f.until("a failure", func(in m3o.Instance) bool { return in.Phase == m3o.Exited })
		f.empty("failing at "+step+", still", w.Ref)
		mend()
	})
}

// diskFull: log lines are lost, and nothing else.
func diskFull(f *fixture) {
	if f.Faults.FullDisk == nil {
		f.Log("the driver has no disk")
		return
	}
	room := f.Faults.FullDisk(f.T)
	w := f.workload("serve")
	in := f.ready(w, 1)[0]
	f.get(in, fmt.Sprintf("/print?n=%d", 100_000)) // a few MB; blocks for ever if nobody reads the pipe
	f.get(in, "/")
	room()
	f.get(in, "/print?n=1")
	f.stop(w.Ref)
	last := ""
	for ln, err := range f.Driver.Logs(f.ctx, w.Ref, 1, false) {
		if err != nil {
			f.Fatal(err)
		}
		last = ln.Text
	}
	if last != "asked to end" {
		f.Errorf("once there is room the log ends with %q", last)
	}
}

func rebooted(f *fixture) {
	if f.Faults.Reboot == nil {
		f.Log("the driver keeps nothing")
		return
	}
	web, worker := f.workload("serve"), f.workload("mute")
	worker.Process, worker.Port = "worker", 0
	f.ready(web, 2)
	f.ready(worker, 1)
	f.Driver = f.Faults.Reboot(f.T)
	for _, want := range []struct {
		runtime.Workload
		n int
	}{{web, 2}, {worker, 1}} {
		ins, err := runtime.WaitReady(f.ctx, f.Driver, want.Ref, want.n, nil)
		if err != nil {
			f.Fatalf("after the restart of the machine: %v", err)
		}
		for _, in := range ins {
			if in.Addr != "" {
				f.get(in, "/") // at once: ready is ready
			}
		}
	}
	f.stop(worker.Ref)
	f.empty("a restart of the machine", web.Ref)
}
