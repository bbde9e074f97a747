package runtime

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/m3o/m3o"
)

// The rhythm of the health checks, where a workload does not say.
const (
	goodAnswers   = 2 // one can come from a process about to crash
	badAnswers    = 3
	firstLook     = 2 * time.Millisecond // after launch; grows while nothing answers
	slowLook      = 500 * time.Millisecond
	secondLook    = 25 * time.Millisecond // after the first good answer
	steadyLook    = 5 * time.Second
	livenessLook  = 10 * time.Second
	workerUp      = time.Second // a worker is ready when it has not exited by then
	watchAgain    = 30 * time.Second
	probeTimeout  = 3 * time.Second // of one answer
	livenessFails = 3
)

// probe turns answers into phases until ctx ends. A server that says by itself
// when its health changes (grpc.health.v1 Watch) is asked again at once then.
func (r *Reconciler) probe(ctx context.Context, in *instance, w Workload, addr string, ready bool) {
	if addr == "" {
		if !ready && sleep(ctx, workerUp) {
			r.becomes(in, m3o.Ready, nil)
		}
		return
	}
	h := w.Health
	need, enough := cmp.Or(h.Successes, goodAnswers), cmp.Or(h.Failures, badAnswers)
	good, bad := 0, 0
	watched := false
	var told <-chan struct{} // the server says that something changed
	defer func() {
		if told != nil {
			for range told { // until the watcher has ended
			}
		}
	}()
	hint := false
	for wait := firstLook; ; {
		select {
		case <-ctx.Done():
			return
		case <-time.After(wait):
			hint = false
		case _, ok := <-told:
			if !ok {
				told = nil // it does not watch
				continue
			}
			hint = true
		}
		proto, err := r.ask(ctx, addr, h)
		if ctx.Err() != nil {
			return
		}
		if err == nil {
			good, bad = good+1, 0
			if good >= need && !ready {
				ready = true
				r.becomes(in, m3o.Ready, nil)
			}
			if wait = secondLook; ready {
				wait = cmp.Or(h.Period, steadyLook)
				if !watched && proto == GRPC {
					watched = true
					told = r.watchHealth(ctx, addr, h.Service)
				}
			}
			if proto == TCP && h.Kind == "" && ready {
				// It accepts but answers none of our questions: asking them
				// every time would only fill its log.
				h.Kind = "tcp"
			}
			continue
		}
		good, bad = 0, bad+1
		switch {
		case ready && (bad >= enough || hint && errors.Is(err, errNotServing)):
			ready = false
			r.becomes(in, m3o.Unhealthy, err)
		default:
			r.mu.Lock()
			in.why = err
			r.mu.Unlock()
		}
		wait = min(max(wait, firstLook)*5/4, slowLook)
		if ready {
			wait = min(slowLook, cmp.Or(h.Period, slowLook))
		}
	}
}

// live asks whether an instance lives, and says on dead why not.
func (r *Reconciler) live(ctx context.Context, in *instance, c m3o.Check, addr string, dead chan<- error) {
	h := m3o.Health{Kind: c.Kind, Path: c.Path, Service: c.Service, Answer: c.Answer}
	bad := 0
	for sleep(ctx, cmp.Or(c.Period, livenessLook)) {
		r.mu.Lock()
		starting := in.Phase == m3o.Starting
		r.mu.Unlock()
		if starting {
			continue // that is the health check's to judge
		}
		_, err := r.ask(ctx, addr, h)
		switch {
		case ctx.Err() != nil:
			return
		case err == nil:
			bad = 0
			continue
		}
		if bad++; bad >= cmp.Or(c.Failures, livenessFails) {
			dead <- fmt.Errorf("its liveness check failed %d times: %w", bad, err)
			return
		}
	}
}

func (r *Reconciler) becomes(in *instance, p m3o.Phase, why error) {
	r.change(in, func() { in.Phase, in.At, in.why = p, time.Now(), why })
	r.look() // a replacement may go on
	r.log.Info("instance is "+string(p), "instance", in.ID, "app", in.App, "release", in.Release)
	r.write(in, func(rec *record) { rec.Ready = p == m3o.Ready })
}
