package runtime

import (
	"context"
	"errors"
	"fmt"
	"testing"
	"testing/synctest"
	"time"

	"github.com/m3o/m3o"
)

// A replacement never leaves fewer ready instances than wanted, nor runs more
// than a quarter above that, and it ends.
func TestReplacementKeepsTheWantedNumberReady(t *testing.T) {
	for _, replicas := range []int{1, 2, 5, 9} {
		t.Run(fmt.Sprint(replicas), func(t *testing.T) {
			w := want{Workload{Ref: web, Revision: 2}, replicas}
			wants := map[Ref]want{web: w}
			have := map[string]*instance{}
			made := 0
			add := func(rev int, p m3o.Phase) {
				made++
				in := newInstance(record{ID: fmt.Sprintf("i%d", made), Workload: Workload{Ref: web, Revision: rev}})
				in.Phase = p
				have[in.ID] = in
			}
			for range replicas {
				add(1, m3o.Ready)
			}
			most := replicas + max(1, replicas/4)
			for step := 0; ; step++ {
				stop, start := plan(wants, have)
				for _, id := range stop {
					delete(have, id)
				}
				for range start {
					add(2, m3o.Starting)
				}
				ready, starting := 0, 0
				var next *instance
				for _, in := range have {
					if in.Phase == m3o.Ready {
						ready++
					} else {
						starting++
						next = in
					}
				}
				if ready < replicas || ready+starting > most {
					t.Fatalf("step %d: %d ready and %d starting of %d", step, ready, starting, replicas)
				}
				if len(stop) == 0 && len(start) == 0 && next == nil {
					break
				}
				if next != nil {
					next.Phase = m3o.Ready
				}
				if step > 10*replicas {
					t.Fatal("it does not end")
				}
			}
			for _, in := range have {
				if in.Revision != 2 {
					t.Errorf("%s of revision %d is left", in.ID, in.Revision)
				}
			}
		})
	}
}

// With a volume the new instance comes when the old one is gone, not before.
func TestWorkloadsWithMountsNeverRunTwice(t *testing.T) {
	w := Workload{Ref: web, Revision: 2, Mounts: []Mount{{"/srv/data", "/data"}}}
	wants := map[Ref]want{web: {w, 1}}
	old := newInstance(record{ID: "old", Workload: Workload{Ref: web, Revision: 1}})
	old.Phase = m3o.Ready
	have := map[string]*instance{"old": old}
	stop, start := plan(wants, have)
	if len(stop) != 1 || len(start) != 0 {
		t.Fatalf("plan = %v, %v, want the old one stopped and nothing started", stop, start)
	}
	old.stopped = true
	if stop, start = plan(wants, have); len(stop) != 0 || len(start) != 0 {
		t.Fatalf("plan = %v, %v while it is ending, want nothing", stop, start)
	}
	delete(have, "old")
	if stop, start = plan(wants, have); len(stop) != 0 || len(start) != 1 {
		t.Fatalf("plan = %v, %v when it is gone, want a start", stop, start)
	}
}

// A restart of an app stood still for up to five seconds after each instance it
// had replaced, and one with a volume was down as long.
func TestReplacementGoesOnAtOnce(t *testing.T) {
	for name, c := range map[string]struct {
		replicas int
		mounts   []Mount
	}{"one by one": {4, nil}, "with a volume": {1, []Mount{{"/srv/data", "/data"}}}} {
		t.Run(name, func(t *testing.T) {
			inBubble(t, func(t *testing.T, r *Reconciler, p *puppet) {
				w := Workload{Ref: web, Port: 8080, Mounts: c.mounts}
				if err := r.Start(t.Context(), w, c.replicas); err != nil {
					t.Fatal(err)
				}
				time.Sleep(time.Second)
				w.Revision++
				began := time.Now()
				if err := r.Start(t.Context(), w, c.replicas); err != nil {
					t.Fatal(err)
				}
				if _, err := WaitReplaced(t.Context(), bare{r}, web, w.Revision, c.replicas); err != nil {
					t.Fatal(err)
				}
				if took := time.Since(began); took >= time.Second {
					t.Errorf("it took %v", took)
				}
			})
		})
	}
}

func TestLivenessFailuresRestartTheInstance(t *testing.T) {
	inBubble(t, func(t *testing.T, r *Reconciler, p *puppet) {
		w := Workload{Ref: web, Port: 8080, Health: m3o.Health{Liveness: m3o.Check{Kind: "http", Period: time.Second, Failures: 2}}}
		if err := r.Start(t.Context(), w, 1); err != nil {
			t.Fatal(err)
		}
		time.Sleep(10 * time.Second)
		synctest.Wait()
		if in := r.Instances()[0]; in.Phase != m3o.Ready || in.Restarts != 0 {
			t.Fatalf("while it lives it is %s after %d restarts", in.Phase, in.Restarts)
		}
		p.mu.Lock()
		p.sick = errors.New("GET /livez answered 500")
		p.mu.Unlock()
		time.Sleep(2*time.Second + 50*time.Millisecond)
		synctest.Wait()
		rep, err := r.Explain(r.Instances()[0].ID)
		if err != nil || rep.Why == nil || rep.Why.Error() != "its liveness check failed 2 times: GET /livez answered 500" {
			t.Errorf("Explain says %v, %v", rep.Why, err)
		}
		p.mu.Lock()
		p.sick = nil
		p.mu.Unlock()
		time.Sleep(5 * time.Second)
		synctest.Wait()
		if in := r.Instances()[0]; in.Phase != m3o.Ready || in.Restarts != 1 {
			t.Errorf("it is %s after %d restarts, want ready after 1", in.Phase, in.Restarts)
		}
	})
}

func TestServerThatSaysItIsNotWellIsOutAtOnce(t *testing.T) {
	inBubble(t, func(t *testing.T, r *Reconciler, p *puppet) {
		p.told = make(chan struct{})
		if err := r.Start(t.Context(), Workload{Ref: web, Port: 8080, Health: m3o.Health{Period: time.Hour}}, 1); err != nil {
			t.Fatal(err)
		}
		time.Sleep(time.Second)
		synctest.Wait()
		p.says(fmt.Errorf("gRPC health check answered NOT_SERVING: %w", errNotServing))
		p.told <- struct{}{}
		synctest.Wait()
		if got := phase(t, r); got != m3o.Unhealthy {
			t.Errorf("it is %s, want unhealthy", got)
		}
		close(p.told)
	})
}

func TestDrainComesBeforeTheRequestToEnd(t *testing.T) {
	inBubble(t, func(t *testing.T, r *Reconciler, p *puppet) {
		drained := make(chan m3o.Instance, 1)
		r.OnDrain(func(_ context.Context, in m3o.Instance) { time.Sleep(time.Minute); drained <- in })
		if err := r.Start(t.Context(), Workload{Ref: web, Port: 8080}, 1); err != nil {
			t.Fatal(err)
		}
		time.Sleep(time.Second)
		began := time.Now()
		if err := r.Stop(t.Context(), web); err != nil {
			t.Fatal(err)
		}
		if in := <-drained; in.Phase != m3o.Draining || in.Addr == "" || time.Since(began) < time.Minute {
			t.Errorf("drained %+v after %v", in, time.Since(began))
		}
	})
}

// Who compares two changes by their time must not lose one when the clock was
// set back, or forward and back, between them.
func TestChangesStayInOrderWhenTheClockJumps(t *testing.T) {
	inBubble(t, func(t *testing.T, r *Reconciler, p *puppet) {
		ctx, cancel := context.WithCancel(t.Context())
		seen := make(chan []m3o.Instance, 1)
		listed := make(chan struct{})
		go func() {
			var all []m3o.Instance
			for in, err := range r.Events(ctx) {
				switch {
				case err != nil:
					t.Error(err)
				case in.ID == "":
					close(listed)
				default:
					all = append(all, in)
				}
			}
			seen <- all
		}()
		<-listed
		if err := r.Start(t.Context(), Workload{Ref: web, Port: 8080}, 1); err != nil {
			t.Fatal(err)
		}
		time.Sleep(time.Second)
		for _, jump := range []time.Duration{-time.Hour, time.Hour, -time.Hour} {
			p.exit <- Exit{Code: 1, At: time.Now().Add(jump).Round(0)}
			time.Sleep(5 * time.Second)
			synctest.Wait()
			if got := phase(t, r); got != m3o.Ready {
				t.Errorf("after a jump of %v it is %s", jump, got)
			}
		}
		cancel()
		all := <-seen
		for i := 1; i < len(all); i++ {
			if all[i].At.Before(all[i-1].At) {
				t.Errorf("%s at %v follows %s at %v", all[i].Phase, all[i].At, all[i-1].Phase, all[i-1].At)
			}
		}
	})
}

// An instance that once crashed and is on its way out when its app is started
// again is no failure of the start.
func TestWaitReadyForgivesTheEndOfWhatWasToldToGo(t *testing.T) {
	inBubble(t, func(t *testing.T, r *Reconciler, p *puppet) {
		w := Workload{Ref: web, Port: 8080}
		if err := r.Start(t.Context(), w, 1); err != nil {
			t.Fatal(err)
		}
		time.Sleep(time.Second)
		p.exit <- Exit{Code: 1, At: time.Now()}
		time.Sleep(time.Second)
		r.drain = func(context.Context, m3o.Instance) { time.Sleep(time.Second) }
		for _, n := range []int{0, 1} {
			if err := r.Start(t.Context(), w, n); err != nil {
				t.Fatal(err)
			}
			synctest.Wait()
		}
		if ins, err := WaitReady(t.Context(), bare{r}, web, 1, nil); err != nil || ins[0].Restarts != 0 {
			t.Errorf("WaitReady = %v, %v", ins, err)
		}
	})
}

// An instance that had crashed before it was waited for, and lies in its pause
// between two restarts when it is, made the wait fail at once.
func TestWaitReadyForgivesCrashesBeforeIt(t *testing.T) {
	inBubble(t, func(t *testing.T, r *Reconciler, p *puppet) {
		if err := r.Start(t.Context(), Workload{Ref: web, Port: 8080}, 1); err != nil {
			t.Fatal(err)
		}
		for range 3 {
			time.Sleep(5 * time.Second)
			p.exit <- Exit{Code: 1, At: time.Now()}
			synctest.Wait()
		}
		if got := phase(t, r); got != m3o.Exited {
			t.Fatalf("it is %s, want it in its pause", got)
		}
		if ins, err := WaitReady(t.Context(), bare{r}, web, 1, nil); err != nil || ins[0].Restarts != 3 {
			t.Errorf("WaitReady = %v, %v, want it ready after its third restart", ins, err)
		}
	})
}
