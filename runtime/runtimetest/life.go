package runtimetest

import (
	"slices"
	"time"

	"github.com/m3o/m3o"
	"github.com/m3o/m3o/runtime"
)

// replaced: another revision takes over without a moment in which fewer than
// wanted are ready.
func replaced(f *fixture) {
	w := f.workload("serve")
	before := f.ready(w, 2)
	ready := map[string]bool{}
	for _, in := range before {
		ready[in.ID] = true
	}
	listed := make(chan struct{})
	done := make(chan struct{})
	go func() {
		defer close(done)
		for in, err := range f.Driver.Events(f.ctx) {
			switch {
			case err != nil:
				return
			case in.ID == "":
				close(listed)
				continue
			}
			if ready[in.ID] = in.Phase == m3o.Ready; in.Phase == m3o.Exited {
				delete(ready, in.ID)
			}
			now, fresh := 0, 0
			for id, ok := range ready {
				if ok {
					now++
					if !slices.ContainsFunc(before, func(b m3o.Instance) bool { return b.ID == id }) {
						fresh++
					}
				}
			}
			if now < 2 {
				f.Errorf("only %d instances are ready after %s became %s", now, in.ID, in.Phase)
			}
			if fresh == 2 && len(ready) == 2 {
				return
			}
		}
	}()
	<-listed
	w.Revision++
	w.Env = append(w.Env, "GREETING=again")
	f.start(w, 2)
	<-done
	for _, in := range f.list() {
		if in.Revision != 1 {
			f.Errorf("%s still runs revision %d", in.ID, in.Revision)
		}
	}
	f.stop(w.Ref)
	f.clean()
}

// revived: an instance that says it does not live is restarted.
func revived(f *fixture) {
	w := f.workload("serve")
	w.Health.Kind = "tcp"
	w.Health.Liveness = m3o.Check{Kind: "http", Path: "/health", Period: 50 * time.Millisecond, Failures: 2}
	in := f.ready(w, 1)[0]
	f.get(in, "/sick")
	back := f.until("ready again", func(e m3o.Instance) bool { return e.Phase == m3o.Ready && e.Restarts > 0 })
	if back.ID != in.ID {
		f.Errorf("came back as %+v, want %s", back, in.ID)
	}
	f.get(back, "/")
}

// crashTold: what ps says of an instance that crashes again and again.
func crashTold(f *fixture) {
	f.start(f.workload("exit", "3"), 1)
	in := f.until("a second exit", func(e m3o.Instance) bool { return e.Phase == m3o.Exited && e.Restarts > 0 })
	x, ok := f.Driver.(runtime.Explainer)
	if !ok {
		return
	}
	rep, err := x.Explain(in.ID)
	if err != nil || rep.Last.Code != 3 || rep.Crashes < 2 {
		f.Errorf("Explain = %+v, %v, want an exit with 3, at least the second", rep, err)
	}
	f.stop(web)
}

// measured: what an instance uses is told where the driver can.
func measured(f *fixture) {
	m, ok := f.Driver.(runtime.Meter)
	if !ok {
		return
	}
	in := f.ready(f.workload("serve"), 1)[0]
	if _, err := m.Usage("hello-web-v3-nobody"); m3o.KindOf(err) != m3o.NotFound {
		f.Errorf("Usage of an unknown instance = %v, want NotFound", err)
	}
	u, err := m.Usage(in.ID)
	if m3o.KindOf(err) == m3o.Unavailable {
		f.Logf("not measured: %v", err)
		return
	}
	if err != nil || u.MemoryBytes < 100<<10 || u.MemoryBytes > 1<<30 || u.CPU < 0 || u.At.IsZero() {
		f.Errorf("Usage = %+v, %v", u, err)
	}
	if f.Limits && u.MemoryLimit != runtime.DefaultMemoryBytes {
		f.Errorf("the memory limit is %d", u.MemoryLimit)
	}
}
