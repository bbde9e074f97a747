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
			// A record may say that it was ready when the machine went down: this
			// is another launch, which has to show it.
			if in.record.Ready {
				r.write(in, func(rec *record) { rec.Ready = false })
			}
			h, err = r.launch(ctx, in)
		}
		if ctx.Err() != nil && !stopping(in) {
			closeHandle(h)
			return
		}
		var exit Exit
		if h != nil {
			var ended, calm bool
			exit, ended, calm, err = r.watch(ctx, in, h)
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
		rest := pause(crashes)
		crashes++
		r.change(in, func() {
			in.handle, in.Phase, in.Exit, in.OOM = nil, m3o.Exited, exit.Code, exit.OOM
			in.At, in.Addr = exit.At, ""
			in.why, in.crashes, in.next, in.record.Last = err, crashes, time.Now().Add(rest), exit
		})
		r.log.Warn("instance exited", "instance", in.ID, "exit", exit.Code, "oom", exit.OOM, "err", err)
		select {
		case <-ctx.Done():
			return
		case <-in.stop:
			continue
		case <-time.After(rest):
		}
		r.change(in, func() {
			in.Phase, in.At, in.Exit, in.OOM, in.next = m3o.Starting, time.Now(), 0, false, time.Time{}
			in.Restarts++
		})
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
	was := in.At
	f()
	if in.At.Before(was) { // the clock was set back: order counts more
		in.At = was
	}
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

// watch follows a launched instance until it ends by itself or is ended
// because it lives no more (why says so), is told to go, or ctx ends. calm is
// whether it was well for long.
func (r *Reconciler) watch(ctx context.Context, in *instance, h Handle) (exit Exit, ended, calm bool, why error) {
	r.mu.Lock()
	was := in.record.Ready // an instance found running keeps its phase until probes say otherwise
	w := in.record.Workload
	r.mu.Unlock()
	if was { // it may have ended since
		if exit, err := h.Wait(expired); err == nil {
			return exit, true, false, nil
		}
	}
	r.change(in, func() {
		in.handle, in.Addr, in.why = h, h.Addr(), nil
		if was {
			in.Phase, in.At = m3o.Ready, time.Now()
		}
	})
	outer := ctx
	ctx, cancel := context.WithCancel(ctx)
	var all sync.WaitGroup
	defer all.Wait()
	defer cancel()
	dead := make(chan error, 1)
	all.Go(func() { r.probe(ctx, in, w, h.Addr(), was) })
	if c := w.Health.Liveness; c.Kind != "" && h.Addr() != "" {
		all.Go(func() { r.live(ctx, in, c, h.Addr(), dead) })
	}
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
		return Exit{}, false, false, nil
	case <-in.stop:
		return Exit{}, false, false, nil
	case why := <-dead:
		r.becomes(in, m3o.Unhealthy, why)
		r.log.Warn("instance is restarted", "instance", in.ID, "err", why)
		exit := r.terminate(outer, in, h)
		return exit, outer.Err() == nil, false, why
	case res := <-done:
		if res.err != nil {
			if ctx.Err() != nil {
				return Exit{}, false, false, nil
			}
			r.log.Error("cannot wait for an instance", "instance", in.ID, "err", res.err)
			res.exit = Exit{Code: -1, At: time.Now()}
		}
		r.mu.Lock()
		calm = in.Phase == m3o.Ready && time.Since(in.At) > settled
		r.mu.Unlock()
		return res.exit, true, calm, nil
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

// killed bounds how long the end of an instance may take after SIGKILL.
const killed = 10 * time.Second

// end takes an instance that was told to go out of the world. It stays listed
// until nothing of it is left.
func (r *Reconciler) end(ctx context.Context, in *instance, h Handle) {
	r.change(in, func() { in.Phase, in.At = m3o.Draining, time.Now() })
	exit := Exit{At: time.Now()}
	if h != nil {
		if r.drain != nil && h.Addr() != "" {
			r.mu.Lock()
			now := in.Instance
			r.mu.Unlock()
			r.drain(ctx, now)
		}
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
	r.change(in, func() { in.handle, in.Phase, in.At = nil, m3o.Draining, exit.At })
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
	r.look() // who must not meet it can come now
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
