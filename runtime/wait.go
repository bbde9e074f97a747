package runtime

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/m3o/m3o"
)

// A Report says what is known of an instance that is not ready.
type Report struct {
	Workload  Workload
	Addr      string           // its own, "" while it does not run
	Why       error            // the last failure to launch it, or its last bad answer
	Listening []netip.AddrPort // where its processes listen, while it runs
	Last      Exit             // how it last ended by itself; zero At: it never did
	Crashes   int              // how often it did in a row, without having been well for long between
	Next      time.Time        // when it is started again; zero unless it waits for that
}

// An Explainer is a Driver that can tell why an instance is not ready. Those
// built on a Reconciler are.
type Explainer interface {
	Explain(instance string) (Report, error)
}

// Explain is Explainer.Explain; it is NotFound when there is no such instance.
func (r *Reconciler) Explain(id string) (Report, error) {
	r.mu.Lock()
	in := r.have[id]
	if in == nil {
		r.mu.Unlock()
		return Report{}, m3o.Errorf(m3o.NotFound, "no instance called %s", id)
	}
	rep := Report{Workload: in.record.Workload, Why: in.why, Last: in.record.Last, Crashes: in.crashes, Next: in.next}
	h := in.handle
	r.mu.Unlock()
	if h != nil {
		rep.Addr = h.Addr()
		rep.Listening, _ = h.Listening() // it may be ending: then there is nothing to add
	}
	return rep, nil
}

// shownLines is how much of a failed instance's log an error carries.
const shownLines = 20

// askAgain is the pause before events that broke off are asked for again.
const askAgain = 20 * time.Millisecond

// WaitReady waits until n instances of r are ready and returns them, calling
// onChange (which may be nil) for each change meanwhile. It gives up when an
// instance ends a second time, so that one crash at start is forgiven, and when
// r's health time-out (60 s by default) has passed. It then returns an
// *m3o.Error of kind Invalid: its first line says what happened, in the words
// of someone who wants to fix the app, and the last lines the instance logged
// follow, indented, one a line. Events that break off are asked for again.
func WaitReady(ctx context.Context, d Driver, r Ref, n int, onChange func(m3o.Instance)) ([]m3o.Instance, error) {
	return waitReady(ctx, d, r, n, func(m3o.Instance) bool { return true }, onChange)
}

// WaitReplaced is WaitReady for instances of one revision of r's workload.
func WaitReplaced(ctx context.Context, d Driver, r Ref, revision, n int) ([]m3o.Instance, error) {
	return waitReady(ctx, d, r, n, func(in m3o.Instance) bool { return in.Revision == revision }, nil)
}

func waitReady(ctx context.Context, d Driver, r Ref, n int, counts func(m3o.Instance) bool, onChange func(m3o.Instance)) ([]m3o.Instance, error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	began := time.Now()
	late := time.NewTimer(DefaultReady)
	defer late.Stop()

	type event struct {
		in  m3o.Instance
		err error
	}
	events := make(chan event)
	done := make(chan struct{})
	go func() {
		defer close(done)
		for again := true; again; {
			again = false
			for in, err := range d.Events(ctx) {
				again = m3o.KindOf(err) == m3o.Unavailable
				select {
				case events <- event{in, err}:
				case <-ctx.Done():
					return
				}
			}
			again = again && sleep(ctx, askAgain)
		}
	}()
	defer func() { cancel(); <-done }()

	all := map[string]m3o.Instance{}
	before := map[string]int{} // restarts there were when an instance was first seen: those of another start
	timed, listed := false, false
	for {
		if ready := readyOf(all); listed && len(ready) >= n {
			return ready, nil
		}
		select {
		case <-ctx.Done():
			return nil, fmt.Errorf("wait for %s: %w", r, ctx.Err())
		case <-done:
			return nil, m3o.Errorf(m3o.Unavailable, "the driver ended while %s was starting", r)
		case <-late.C:
			return nil, tooLate(ctx, d, r, all, time.Since(began).Round(time.Second))
		case e := <-events:
			if m3o.KindOf(e.err) == m3o.Unavailable { // all there are come again
				clear(all)
				listed = false
				continue
			}
			if e.err != nil {
				return nil, fmt.Errorf("wait for %s: %w", r, e.err)
			}
			in := e.in
			listed = listed || in.ID == ""
			if in.App != r.App || in.Process != r.Process || in.Release != r.Release || in.ID == "" || !counts(in) {
				continue
			}
			if in.Phase == m3o.Exited && all[in.ID].Phase == m3o.Draining {
				delete(all, in.ID) // it was told to go
				continue
			}
			if _, seen := before[in.ID]; !seen {
				before[in.ID] = in.Restarts
			}
			all[in.ID] = in
			if listed && onChange != nil {
				onChange(in)
			}
			if rep, err := explain(d, in.ID); err == nil && !timed {
				timed = true
				late.Reset(time.Until(began.Add(cmp.Or(rep.Workload.Health.Timeout, DefaultReady))))
			}
			if in.Phase == m3o.Exited && in.Restarts > before[in.ID] {
				return nil, failed(ctx, d, r, in, exitWords(d, r, in))
			}
		}
	}
}

func readyOf(all map[string]m3o.Instance) (ready []m3o.Instance) {
	for _, id := range slices.Sorted(maps.Keys(all)) {
		if all[id].Phase == m3o.Ready {
			ready = append(ready, all[id])
		}
	}
	return ready
}

func explain(d Driver, id string) (Report, error) {
	if e, ok := d.(Explainer); ok {
		return e.Explain(id)
	}
	return Report{}, errors.New("the driver explains nothing")
}

// words are what happened and, where known, what to do about it.
type words struct{ what, hint string }

func failed(ctx context.Context, d Driver, r Ref, in m3o.Instance, w words) error {
	msg := w.what
	for _, ln := range lastOf(ctx, d, r, in.ID, shownLines) {
		msg += "\n  " + ln.Text
	}
	rep, _ := explain(d, in.ID)
	return &m3o.Error{Kind: m3o.Invalid, Msg: msg, Hint: w.hint, Err: rep.Why}
}

func exitWords(d Driver, r Ref, in m3o.Instance) words {
	rep, _ := explain(d, in.ID)
	limit := cmp.Or(rep.Workload.MemoryBytes, DefaultMemoryBytes)
	switch {
	case in.OOM:
		return words{fmt.Sprintf("%s ran out of memory: it may use %d MB", r.Process, limit>>20), "give it more memory, or make it use less"}
	case in.Exit == -1 && rep.Why != nil:
		why := rep.Why
		if e, ok := errors.AsType[*m3o.Error](why); ok {
			return words{fmt.Sprintf("%s could not be started: %s", r.Process, e.Msg), e.Hint}
		}
		return words{fmt.Sprintf("%s could not be started: %v", r.Process, why), ""}
	case in.Exit > 128 && in.Exit < 128+65:
		s := syscall.Signal(in.Exit - 128)
		if s == sigsys {
			return words{fmt.Sprintf("%s made a system call of another architecture, as a 32-bit program does, and was ended", r.Process), "build it for this machine's architecture"}
		}
		return words{fmt.Sprintf("%s was ended by signal %d (%v)", r.Process, in.Exit-128, s), ""}
	case in.Exit == 0:
		return words{fmt.Sprintf("%s exited at once, with code 0: a process type must keep running", r.Process), ""}
	}
	return words{fmt.Sprintf("%s exited with code %d", r.Process, in.Exit), ""}
}

// sigsys is SIGSYS, which only a foreign system call brings; other systems than Linux number it otherwise.
const sigsys = syscall.Signal(31)

// tooLate explains the instance that got least far.
func tooLate(ctx context.Context, d Driver, r Ref, all map[string]m3o.Instance, after time.Duration) error {
	for _, id := range slices.Sorted(maps.Keys(all)) {
		in := all[id]
		switch in.Phase {
		case m3o.Ready, m3o.Draining:
			continue
		case m3o.Exited:
			return failed(ctx, d, r, in, exitWords(d, r, in))
		}
		rep, err := explain(d, id)
		if err != nil {
			continue
		}
		return failed(ctx, d, r, in, slowWords(r, rep, after))
	}
	return m3o.Errorf(m3o.Unavailable, "no instance of %s was started within %v", r, after)
}

func slowWords(r Ref, rep Report, after time.Duration) words {
	port := rep.Workload.Port
	if a, err := netip.ParseAddrPort(rep.Addr); err == nil {
		port = int(a.Port()) // a driver without network namespaces picks another
	}
	var others []string
	local := false
	for _, l := range rep.Listening {
		switch {
		case int(l.Port()) == port && !l.Addr().IsLoopback():
			if rep.Why == nil {
				return words{fmt.Sprintf("%s did not become ready within %v", r.Process, after), ""}
			}
			return words{fmt.Sprintf("%s listens on port %d but its health check did not pass within %v: %v", r.Process, port, after, rep.Why), ""}
		case int(l.Port()) == port:
			local = true
		default:
			others = append(others, strconv.Itoa(int(l.Port())))
		}
	}
	slices.Sort(others)
	others = slices.Compact(others)
	switch {
	case local:
		return words{fmt.Sprintf("%s listens on port %d of the loopback address only, where no request can reach it", r.Process, port),
			fmt.Sprintf("listen on all addresses, as in :%d", port)}
	case len(others) > 0:
		return words{fmt.Sprintf("%s never listened on port %d; it listens on port %s", r.Process, port, strings.Join(others, ", ")),
			"listen on the port that the variable PORT gives"}
	}
	return words{fmt.Sprintf("%s never listened on port %d (waited %v)", r.Process, port, after),
		"listen on the port that the variable PORT gives"}
}
