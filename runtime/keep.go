package runtime

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/m3o/m3o"
)

// keep is the life of one instance, until it was told to go and is gone or ctx
// ends:
//
//	starting → ready ⇄ unhealthy      two good answers, three bad ones
//	any of them → exited → starting   it ended by itself; after a pause
//	any → draining → exited           it was told to go, or runs once and ended
func (r *Reconciler) keep(ctx context.Context, in *instance) {
	h, err := r.host.Attach(ctx, in.ID, in.record.Workload)
	if err != nil {
		// Launch begins by removing whatever there is.
		r.log.Warn("cannot attach to an instance, starting it anew", "instance", in.ID, "err", err)
		h = nil
	}
	for crashes := 0; ; {
		once := in.record.Workload.Once
		switch {
		case h != nil || stopping(in):
		case once && in.found:
			r.finish(ctx, in, Exit{Code: -1, At: time.Now()}) // nobody knows how far it came
			return
		default:
			h, err = r.launch(ctx, in)
		}
		if ctx.Err() != nil && !stopping(in) {
			closeHandle(h)
			return
		}
		var exit Exit
		if h != nil {
			var ended, calm bool
			exit, ended, calm = r.watch(ctx, in, h)
			if calm {
				crashes = 0
			}
			if !ended { // told to go, or we are
				if stopping(in) {
					r.end(ctx, in, h)
				}
				closeHandle(h)
				return
			}
			closeHandle(h)
			h = nil
		} else if !stopping(in) {
			r.log.Warn("cannot launch an instance", "instance", in.ID, "err", err)
			exit = Exit{Code: -1, At: time.Now()}
		}
		if stopping(in) {
			r.end(ctx, in, nil)
			return
		}
		if once {
			r.finish(ctx, in, exit)
			return
		}
		r.change(in, func() {
			in.handle, in.Phase, in.Exit, in.OOM = nil, m3o.Exited, exit.Code, exit.OOM
			in.At, in.Addr = exit.At, ""
			in.why = err
		})
		r.log.Warn("instance exited", "instance", in.ID, "exit", exit.Code, "oom", exit.OOM)
		select {
		case <-ctx.Done():
			return
		case <-in.stop:
			continue
		case <-time.After(pause(crashes)):
		}
		crashes++
		r.change(in, func() { in.Phase, in.At, in.Exit, in.OOM = m3o.Starting, time.Now(), 0, false; in.Restarts++ })
		r.write(in, func(rec *record) { rec.Restarts++; rec.Ready = false })
	}
}

func closeHandle(h Handle) {
	if h != nil {
		_ = h.Close() // releases a descriptor; the instance is not affected
	}
}

func stopping(in *instance) bool {
	select {
	case <-in.stop:
		return true
	default:
		return false
	}
}

// change alters an instance and tells the watchers.
func (r *Reconciler) change(in *instance, f func()) {
	// The hub's order is the order of the changes: both under one lock.
	r.mu.Lock()
	defer r.mu.Unlock()
	f()
	r.hub.publish(in.Instance)
}

func (r *Reconciler) write(in *instance, f func(*record)) {
	r.mu.Lock()
	f(&in.record)
	rec := in.record
	r.mu.Unlock()
	if err := r.records.putInstance(rec); err != nil {
		// Only the count of restarts and a hint at health are lost.
		r.log.Warn("cannot update an instance's record", "instance", in.ID, "err", err)
	}
}

func (r *Reconciler) launch(ctx context.Context, in *instance) (Handle, error) {
	var waiting sync.WaitGroup
	defer waiting.Wait()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	waiting.Go(func() {
		select {
		case <-in.stop:
			cancel()
		case <-ctx.Done():
		}
	})
	select {
	case r.slots <- struct{}{}:
		defer func() { <-r.slots }()
	case <-ctx.Done():
		return nil, ctx.Err()
	}
	h, err := r.host.Launch(ctx, in.ID, in.record.Workload)
	if err != nil {
		return nil, fmt.Errorf("launch: %w", err)
	}
	return h, nil
}

// expired is a context that has ended, to ask without waiting.
var expired = func() context.Context {
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	return ctx
}()

// watch follows a launched instance until it ends by itself, is told to go, or
// ctx ends. calm is whether it was well for long.
func (r *Reconciler) watch(ctx context.Context, in *instance, h Handle) (exit Exit, ended, calm bool) {
	r.mu.Lock()
	was := in.record.Ready // an instance found running keeps its phase until probes say otherwise
	w := in.record.Workload
	r.mu.Unlock()
	if was { // it may have ended since
		if exit, err := h.Wait(expired); err == nil {
			return exit, true, false
		}
	}
	r.change(in, func() {
		in.handle, in.Addr, in.why = h, h.Addr(), nil
		if was {
			in.Phase, in.At = m3o.Ready, time.Now()
		}
	})
	ctx, cancel := context.WithCancel(ctx)
	var all sync.WaitGroup
	defer all.Wait()
	defer cancel()
	all.Go(func() { r.probe(ctx, in, w, h.Addr(), was) })
	type result struct {
		exit Exit
		err  error
	}
	done := make(chan result, 1)
	all.Go(func() {
		e, err := h.Wait(ctx)
		done <- result{e, err}
	})
	select {
	case <-ctx.Done():
		return Exit{}, false, false
	case <-in.stop:
		return Exit{}, false, false
	case res := <-done:
		if res.err != nil {
			if ctx.Err() != nil {
				return Exit{}, false, false
			}
			r.log.Error("cannot wait for an instance", "instance", in.ID, "err", res.err)
			res.exit = Exit{Code: -1, At: time.Now()}
		}
		r.mu.Lock()
		calm = in.Phase == m3o.Ready && time.Since(in.At) > settled
		r.mu.Unlock()
		return res.exit, true, calm
	}
}

// The rhythm of the health probes.
const (
	goodAnswers = 2 // one can come from a process about to crash
	badAnswers  = 3
	firstLook   = 5 * time.Millisecond // after launch; doubles while nothing answers
	slowLook    = 500 * time.Millisecond
	secondLook  = 25 * time.Millisecond // after the first good answer
	steadyLook  = 5 * time.Second
	workerUp    = time.Second // a worker is ready when it has not exited by then
)

// probe turns answers into phases until ctx ends.
func (r *Reconciler) probe(ctx context.Context, in *instance, w Workload, addr string, ready bool) {
	if addr == "" {
		if !ready && sleep(ctx, workerUp) {
			r.becomes(in, m3o.Ready, nil)
		}
		return
	}
	health := w.Health
	good, bad := 0, 0
	for wait := firstLook; sleep(ctx, wait); {
		proto, err := r.ask(ctx, addr, health)
		if ctx.Err() != nil {
			return
		}
		if err == nil {
			good, bad = good+1, 0
			if good >= goodAnswers && !ready {
				ready = true
				r.becomes(in, m3o.Ready, nil)
			}
			if wait = secondLook; ready {
				wait = steadyLook
			}
			if proto == TCP && health.Kind == "" && ready {
				// It accepts but answers none of our questions: asking them
				// every time would only fill its log.
				health.Kind = "tcp"
			}
			continue
		}
		good, bad = 0, bad+1
		switch {
		case ready && bad >= badAnswers:
			ready = false
			r.becomes(in, m3o.Unhealthy, err)
		default:
			r.mu.Lock()
			in.why = err
			r.mu.Unlock()
		}
		wait = min(max(wait, firstLook)*3/2, slowLook)
		if ready {
			wait = slowLook
		}
	}
}

func sleep(ctx context.Context, d time.Duration) bool {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-ctx.Done():
		return false
	case <-t.C:
		return true
	}
}

func (r *Reconciler) becomes(in *instance, p m3o.Phase, why error) {
	r.change(in, func() { in.Phase, in.At, in.why = p, time.Now(), why })
	r.log.Info("instance is "+string(p), "instance", in.ID, "app", in.App, "release", in.Release)
	r.write(in, func(rec *record) { rec.Ready = p == m3o.Ready })
}

// killed bounds how long the end of an instance may take after SIGKILL.
const killed = 10 * time.Second

// end takes an instance that was told to go out of the world. It stays listed
// until nothing of it is left.
func (r *Reconciler) end(ctx context.Context, in *instance, h Handle) {
	r.change(in, func() { in.Phase, in.At = m3o.Draining, time.Now() })
	exit := Exit{At: time.Now()}
	if h != nil {
		exit = r.terminate(ctx, in, h)
	}
	r.remove(ctx, in, exit)
}

// finish takes an instance that runs once and has ended out of the world. It
// is wanted no more before it is gone, or the next driver would start another.
func (r *Reconciler) finish(ctx context.Context, in *instance, exit Exit) {
	for n := 0; ; n++ {
		err := r.forget(in.ref())
		if err == nil {
			break
		}
		r.log.Error("cannot forget what ran once, trying again", "instance", in.ID, "err", err)
		if !sleep(ctx, pause(n)) {
			return
		}
	}
	r.change(in, func() { in.handle, in.Phase, in.At = nil, m3o.Draining, time.Now() })
	r.remove(ctx, in, exit)
}

// remove removes all an ended instance had, then the instance.
func (r *Reconciler) remove(ctx context.Context, in *instance, exit Exit) {
	for n := 0; ; n++ {
		if ctx.Err() != nil {
			return // the next driver removes it: its Ref is not wanted
		}
		err := r.host.Remove(ctx, in.ID)
		if err == nil {
			err = r.records.remove("instances", in.ID)
		}
		if err == nil {
			break
		}
		r.log.Error("cannot remove an instance, trying again", "instance", in.ID, "err", err)
		if !sleep(ctx, pause(n)) {
			return
		}
	}
	r.change(in, func() {
		in.handle, in.Phase, in.Exit, in.OOM, in.At = nil, m3o.Exited, exit.Code, exit.OOM, exit.At
		delete(r.have, in.ID)
		close(r.gone)
		r.gone = make(chan struct{})
	})
	r.log.Info("instance stopped", "instance", in.ID, "exit", exit.Code)
}

// terminate asks the instance to end and makes it end after its grace period.
func (r *Reconciler) terminate(ctx context.Context, in *instance, h Handle) Exit {
	for _, step := range []struct {
		kill   bool
		within time.Duration
	}{{false, in.record.Workload.grace()}, {true, killed}} {
		if err := h.Signal(step.kill); err != nil {
			r.log.Warn("cannot signal an instance", "instance", in.ID, "err", err)
		}
		wctx, cancel := context.WithTimeout(ctx, step.within)
		exit, err := h.Wait(wctx)
		cancel()
		if err == nil {
			return exit
		}
		if ctx.Err() != nil || !errors.Is(err, context.DeadlineExceeded) {
			break
		}
	}
	return Exit{Code: 128 + 9, Signal: 9, At: time.Now()} // Remove sees to it
}
