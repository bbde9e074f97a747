package runtimetest

import (
	"context"
	"fmt"
	"iter"
	"slices"
	"sync"

	"github.com/m3o/m3o"
	"github.com/m3o/m3o/runtime"
)

// A Faulty is a driver of which calls fail, hang or half succeed as a test
// orders, one after the other, and whose events break off or come late. What
// is not ordered is left to the Driver. It is safe for concurrent use.
type Faulty struct {
	runtime.Driver

	mu      sync.Mutex // guards below
	orders  map[string][]Fault
	calls   []string
	streams []*stream
}

var _ runtime.Driver = (*Faulty)(nil)

// A Fault is what becomes of one call.
type Fault struct {
	Hang <-chan struct{} // if not nil, it waits until this is closed or its context ends
	Err  error           // then it returns this; nil: what the driver returns
	Done bool            // it has been carried out all the same
}

// stream is somebody's following of events.
type stream struct {
	cut  context.CancelCauseFunc
	hold <-chan struct{} // events wait until it is closed; nil: they do not
}

// Order has the next calls of a method ("Start", "Stop", "Run" or "Exec") meet
// with faults, one each, after those that were ordered before.
func (f *Faulty) Order(method string, faults ...Fault) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.orders == nil {
		f.orders = map[string][]Fault{}
	}
	f.orders[method] = append(f.orders[method], faults...)
}

// Calls are the calls of the methods that Order knows so far, in order, as in
// "Start hello/web v3 1": a Start's last word is how many were wanted.
func (f *Faulty) Calls() []string {
	f.mu.Lock()
	defer f.mu.Unlock()
	return slices.Clone(f.calls)
}

// Break tells everyone who follows events that he is too far behind.
func (f *Faulty) Break() {
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, s := range f.streams {
		s.cut(errBehind)
	}
}

var errBehind = &m3o.Error{Kind: m3o.Unavailable, Msg: "fell behind, because a test wants it"}

// Late holds events back from those who follow them now, not from who begins
// later, until release is called.
func (f *Faulty) Late() (release func()) {
	hold := make(chan struct{})
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, s := range f.streams {
		s.hold = hold
	}
	return sync.OnceFunc(func() { close(hold) })
}

// call makes one call of a method as was ordered.
func (f *Faulty) call(ctx context.Context, method, about string, do func() error) error {
	f.mu.Lock()
	f.calls = append(f.calls, method+" "+about)
	var fault Fault
	if left := f.orders[method]; len(left) > 0 {
		fault, f.orders[method] = left[0], left[1:]
	}
	f.mu.Unlock()
	if fault.Hang != nil {
		select {
		case <-fault.Hang:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	if fault.Err != nil && !fault.Done {
		return fault.Err
	}
	if err := do(); fault.Err == nil || err != nil {
		return err
	}
	return fault.Err
}

// Start is runtime.Driver's.
func (f *Faulty) Start(ctx context.Context, w runtime.Workload, replicas int) error {
	return f.call(ctx, "Start", fmt.Sprint(w.Ref, replicas), func() error { return f.Driver.Start(ctx, w, replicas) })
}

// Stop is runtime.Driver's.
func (f *Faulty) Stop(ctx context.Context, r runtime.Ref) error {
	return f.call(ctx, "Stop", r.String(), func() error { return f.Driver.Stop(ctx, r) })
}

// Run is runtime.Driver's.
func (f *Faulty) Run(ctx context.Context, w runtime.Workload, c runtime.Cmd) (exit int, err error) {
	err = f.call(ctx, "Run", w.Ref.String(), func() (err error) { exit, err = f.Driver.Run(ctx, w, c); return err })
	if err != nil {
		exit = -1
	}
	return exit, err
}

// Exec is runtime.Driver's.
func (f *Faulty) Exec(ctx context.Context, instance string, c runtime.Cmd) (exit int, err error) {
	err = f.call(ctx, "Exec", instance, func() (err error) { exit, err = f.Driver.Exec(ctx, instance, c); return err })
	if err != nil {
		exit = -1
	}
	return exit, err
}

// Events is runtime.Driver's.
func (f *Faulty) Events(ctx context.Context) iter.Seq2[m3o.Instance, error] {
	return func(yield func(m3o.Instance, error) bool) {
		ctx, cut := context.WithCancelCause(ctx)
		defer cut(nil)
		s := &stream{cut: cut}
		f.mu.Lock()
		f.streams = append(f.streams, s)
		f.mu.Unlock()
		defer func() {
			f.mu.Lock()
			defer f.mu.Unlock()
			f.streams = slices.DeleteFunc(f.streams, func(o *stream) bool { return o == s })
		}()
		for in, err := range f.Driver.Events(ctx) {
			f.mu.Lock()
			hold := s.hold
			f.mu.Unlock()
			if hold != nil {
				select {
				case <-hold:
				case <-ctx.Done():
				}
			}
			if context.Cause(ctx) == error(errBehind) {
				break // what comes after the break is lost
			}
			if !yield(in, err) {
				return
			}
		}
		if context.Cause(ctx) == error(errBehind) {
			yield(m3o.Instance{}, errBehind)
		}
	}
}
