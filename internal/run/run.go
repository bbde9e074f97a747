// Package run starts parts of a process in order, stops them in the opposite
// order, and waits for each. It knows nothing of what it runs.
package run

import (
	"context"
	"errors"
	"fmt"
)

type part struct {
	name string
	run  func(context.Context) error
}

// A Stack is a list of parts, each a function that serves until its context
// ends. The zero Stack is ready to use. It is not safe for concurrent use.
type Stack struct{ parts []part }

// Add puts a part on top: it starts after those added before it and stops
// before them, so what takes work in is added last.
func (s *Stack) Add(name string, run func(context.Context) error) {
	s.parts = append(s.parts, part{name, run})
}

type live struct {
	name   string
	cancel context.CancelFunc
	done   chan error
}

// Run starts every part and blocks until ctx ends or a part returns, then
// stops the others from the top down, waiting for each. It returns the errors
// of the parts, each wrapped with its name; a part that returns ctx's error or
// nil after being asked to stop has not failed.
func (s *Stack) Run(ctx context.Context) error {
	type end struct {
		i   int
		err error
	}
	ended := make(chan end, len(s.parts))
	running := make([]live, 0, len(s.parts))
	for i, p := range s.parts {
		// Each part has a context of its own: cancelling ctx must not stop all at once.
		pctx, cancel := context.WithCancel(context.WithoutCancel(ctx))
		l := live{p.name, cancel, make(chan error, 1)}
		running = append(running, l)
		go func() {
			err := p.run(pctx)
			l.done <- err
			ended <- end{i, err}
		}()
	}
	var errs []error
	select {
	case <-ctx.Done():
	case e := <-ended:
		if e.err == nil {
			e.err = errors.New("stopped by itself")
		}
		errs = append(errs, fmt.Errorf("%s: %w", s.parts[e.i].name, e.err))
		running[e.i].done = nil
	}
	for i := len(running) - 1; i >= 0; i-- {
		running[i].cancel()
		if running[i].done == nil {
			continue
		}
		if err := <-running[i].done; err != nil && !errors.Is(err, context.Canceled) {
			errs = append(errs, fmt.Errorf("%s: %w", running[i].name, err))
		}
	}
	return errors.Join(errs...)
}
