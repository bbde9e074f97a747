package runtime

import (
	"context"
	"errors"
	"iter"
	"net/netip"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/m3o/m3o"
)

// puppet is a host of one instance that a test moves.
type puppet struct {
	mu       sync.Mutex
	answer   error         // of the probe
	asked    int           // probes so far
	launches int           // so far
	exit     chan Exit     // an exit by itself
	took     time.Duration // by a launch
	told     chan struct{} // the server says that its health changed; nil: it never does
	sick     error         // of the liveness check, the one by HTTP
}

func (p *puppet) Check(context.Context, Workload) error { return nil }
func (p *puppet) Launch(context.Context, string, Workload) (Handle, error) {
	time.Sleep(p.took)
	p.mu.Lock()
	defer p.mu.Unlock()
	p.launches++
	return &puppetHandle{p, make(chan struct{})}, nil
}
func (p *puppet) Attach(context.Context, string, Workload) (Handle, error) { return nil, nil }
func (p *puppet) Remove(context.Context, string) error                     { return nil }

func (p *puppet) says(err error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.answer = err
}

func (p *puppet) count() int {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.asked
}

type puppetHandle struct {
	p   *puppet
	end chan struct{}
}

func (h *puppetHandle) Addr() string { return "192.0.2.1:8080" }
func (h *puppetHandle) Wait(ctx context.Context) (Exit, error) {
	select {
	case <-h.end:
		return Exit{}, nil
	case e := <-h.p.exit:
		return e, nil
	case <-ctx.Done():
		return Exit{}, ctx.Err()
	}
}
func (h *puppetHandle) Signal(bool) error                    { close(h.end); return nil }
func (h *puppetHandle) Listening() ([]netip.AddrPort, error) { return nil, nil }
func (h *puppetHandle) Close() error                         { return nil }

// inBubble runs a reconciler on a puppet in a bubble of fake time.
func inBubble(t *testing.T, test func(t *testing.T, r *Reconciler, p *puppet)) {
	synctest.Test(t, func(t *testing.T) {
		p := &puppet{exit: make(chan Exit)}
		r, err := NewReconciler("", p, nil)
		if err != nil {
			t.Fatal(err)
		}
		r.ask = func(_ context.Context, _ string, h m3o.Health) (Protocol, error) {
			p.mu.Lock()
			defer p.mu.Unlock()
			if h.Kind == "http" {
				return HTTP1, p.sick
			}
			p.asked++
			return GRPC, p.answer
		}
		r.watchHealth = func(context.Context, string, string) <-chan struct{} { return p.told }
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error, 1)
		go func() { done <- r.Run(ctx) }()
		test(t, r, p)
		if err := r.Stop(t.Context(), web); err != nil {
			t.Error(err)
		}
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
}

var web = Ref{"hello", "web", 1}

func phase(t *testing.T, r *Reconciler) m3o.Phase {
	t.Helper()
	all := r.Instances()
	if len(all) != 1 {
		t.Fatalf("instances %v, want one", all)
	}
	return all[0].Phase
}

func TestReadyAfterTwoGoodUnhealthyAfterThreeBadAnswers(t *testing.T) {
	inBubble(t, func(t *testing.T, r *Reconciler, p *puppet) {
		p.says(errors.New("not yet"))
		if err := r.Start(t.Context(), Workload{Ref: web, Port: 8080}, 1); err != nil {
			t.Fatal(err)
		}
		sick := errors.New("sick")
		for i, step := range []struct {
			answer error
			times  int
			want   m3o.Phase
		}{
			{errors.New("not yet"), 100, m3o.Starting},
			{nil, 1, m3o.Starting},
			{nil, 1, m3o.Ready},
			{nil, 100, m3o.Ready},
			{sick, 2, m3o.Ready},
			{nil, 1, m3o.Ready}, // forgotten
			{sick, 2, m3o.Ready},
			{sick, 1, m3o.Unhealthy},
			{sick, 100, m3o.Unhealthy},
			{nil, 1, m3o.Unhealthy},
			{nil, 1, m3o.Ready},
		} {
			p.says(step.answer)
			for until := p.count() + step.times; p.count() < until; {
				time.Sleep(time.Millisecond)
				synctest.Wait()
			}
			if got := phase(t, r); got != step.want {
				t.Fatalf("step %d: %s, want %s", i, got, step.want)
			}
		}
		if p.launches != 1 {
			t.Errorf("%d launches, want 1", p.launches)
		}
	})
}

func TestCrashesAreFollowedByEverLongerPauses(t *testing.T) {
	inBubble(t, func(t *testing.T, r *Reconciler, p *puppet) {
		if err := r.Start(t.Context(), Workload{Ref: web, Port: 8080}, 1); err != nil {
			t.Fatal(err)
		}
		var pauses []time.Duration
		crash := func() {
			p.exit <- Exit{Code: 1, At: time.Now()}
			began := time.Now()
			synctest.Wait()
			if got := phase(t, r); got != m3o.Exited {
				t.Fatalf("after a crash it is %s", got)
			}
			for phase(t, r) == m3o.Exited {
				time.Sleep(time.Millisecond)
				synctest.Wait()
			}
			pauses = append(pauses, time.Since(began))
		}
		for range 12 {
			crash()
		}
		if !slices.IsSortedFunc(pauses[:8], func(a, b time.Duration) int { return int(a - b) }) || pauses[11] < 48*time.Second || pauses[11] > 72*time.Second {
			t.Errorf("pauses %v, want them to double to a minute", pauses)
		}
		time.Sleep(settled + time.Second) // well for long: forgiven
		synctest.Wait()
		crash()
		if p := pauses[12]; p > time.Second {
			t.Errorf("after a long good time the pause was %v", p)
		}
		if in := r.Instances()[0]; in.Restarts != 13 {
			t.Errorf("%d restarts, want 13", in.Restarts)
		}
	})
}

func TestStopDoesNotWaitForAPauseBetweenRestarts(t *testing.T) {
	inBubble(t, func(t *testing.T, r *Reconciler, p *puppet) {
		if err := r.Start(t.Context(), Workload{Ref: web, Port: 8080}, 1); err != nil {
			t.Fatal(err)
		}
		for range 10 {
			p.exit <- Exit{Code: 1, At: time.Now()}
		}
		synctest.Wait()
		began := time.Now()
		if err := r.Stop(t.Context(), web); err != nil {
			t.Fatal(err)
		}
		if took := time.Since(began); took > time.Second {
			t.Errorf("Stop took %v of a minute's pause", took)
		}
	})
}

func TestOnlyOneRunAtATime(t *testing.T) {
	inBubble(t, func(t *testing.T, r *Reconciler, _ *puppet) {
		synctest.Wait()
		if err := r.Run(t.Context()); m3o.KindOf(err) != m3o.Conflict {
			t.Errorf("a second Run = %v, want Conflict", err)
		}
		if err := r.StopAll(t.Context()); m3o.KindOf(err) != m3o.Conflict {
			t.Errorf("StopAll while running = %v, want Conflict", err)
		}
	})
}

func TestWaitReadyGivesUpAtTheHealthTimeOut(t *testing.T) {
	inBubble(t, func(t *testing.T, r *Reconciler, p *puppet) {
		p.says(errors.New("connection refused"))
		w := Workload{Ref: web, Port: 8080, Health: m3o.Health{Timeout: 7 * time.Second}}
		if err := r.Start(t.Context(), w, 1); err != nil {
			t.Fatal(err)
		}
		began := time.Now()
		_, err := WaitReady(t.Context(), bare{r}, web, 1, nil)
		if took := time.Since(began); took != 7*time.Second || m3o.KindOf(err) != m3o.Invalid || err.Error() != "web never listened on port 8080 (waited 7s)" {
			t.Errorf("after %v: %v", took, err)
		}
	})
}

// bare is a Reconciler as a Driver that logs and runs nothing.
type bare struct{ *Reconciler }

func (bare) Logs(context.Context, Ref, int, bool) iter.Seq2[Line, error] {
	return func(func(Line, error) bool) {}
}
func (bare) Exec(context.Context, string, Cmd) (int, error)  { return 0, nil }
func (bare) Run(context.Context, Workload, Cmd) (int, error) { return 0, nil }

func TestLostWhenItRanOnceItIsNotRunAgain(t *testing.T) {
	dir := t.TempDir()
	once := Workload{Ref: web, Port: 8080, Once: true}
	first, err := NewReconciler(dir, &puppet{}, nil)
	if err != nil {
		t.Fatal(err)
	}
	if err := first.Start(t.Context(), once, 1); err != nil {
		t.Fatal(err)
	}
	if _, err := first.create(once); err != nil { // and then the machine went down
		t.Fatal(err)
	}
	p := &puppet{}
	second, err := NewReconciler(dir, p, nil)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- second.Run(ctx) }()
	if err := second.awaitGone(t.Context(), func(*instance) bool { return true }); err != nil {
		t.Error(err)
	}
	cancel()
	if err := <-done; err != nil {
		t.Error(err)
	}
	if p.launches != 0 {
		t.Errorf("it was launched %d times", p.launches)
	}
	third, err := NewReconciler(dir, p, nil)
	if err != nil || len(third.wants)+len(third.have) != 0 {
		t.Errorf("still wanted: %v %v %v", third.wants, third.have, err)
	}
}

// After a restart of the machine nothing of an instance is left but its
// record, which says that it was ready.
func TestInstanceIsReadyAndRefusesConnectionsAfterAMachineRestart(t *testing.T) {
	dir := t.TempDir()
	synctest.Test(t, func(t *testing.T) {
		for _, refused := range []error{nil, errors.New("connection refused")} {
			r, err := NewReconciler(dir, &puppet{exit: make(chan Exit)}, nil)
			if err != nil {
				t.Fatal(err)
			}
			r.ask = func(context.Context, string, m3o.Health) (Protocol, error) { return HTTP1, refused }
			ctx, cancel := context.WithCancel(t.Context())
			done := make(chan error, 1)
			go func() { done <- r.Run(ctx) }()
			if err := r.Start(t.Context(), Workload{Ref: web, Port: 8080}, 1); err != nil {
				t.Fatal(err)
			}
			want := m3o.Starting
			if refused == nil {
				want = m3o.Ready
			}
			time.Sleep(time.Second)
			synctest.Wait()
			if got := phase(t, r); got != want {
				t.Errorf("its port says %v: it is %s, want %s", refused, got, want)
			}
			cancel()
			if err := <-done; err != nil {
				t.Error(err)
			}
		}
	})
}
