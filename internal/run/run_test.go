package run

import (
	"context"
	"errors"
	"slices"
	"testing"
)

func TestStackStopsUpwards(t *testing.T) {
	var s Stack
	stopped := make(chan string, 3)
	started := make(chan struct{}, 3)
	for _, n := range []string{"store", "router", "git"} {
		s.Add(n, func(ctx context.Context) error {
			started <- struct{}{}
			<-ctx.Done()
			stopped <- n
			return ctx.Err()
		})
	}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error)
	go func() { done <- s.Run(ctx) }()
	for range 3 {
		<-started
	}
	cancel()
	if err := <-done; err != nil {
		t.Errorf("Run = %v, want nil", err)
	}
	close(stopped)
	var got []string
	for n := range stopped {
		got = append(got, n)
	}
	if want := []string{"git", "router", "store"}; !slices.Equal(got, want) {
		t.Errorf("stopped in order %v, want %v", got, want)
	}
}

func TestStackEndsWhenAPartFails(t *testing.T) {
	broken := errors.New("broken")
	var s Stack
	s.Add("ok", func(ctx context.Context) error { <-ctx.Done(); return nil })
	s.Add("bad", func(context.Context) error { return broken })
	err := s.Run(t.Context())
	if !errors.Is(err, broken) || err.Error() != "bad: broken" {
		t.Errorf("Run = %v, want bad: broken", err)
	}
}
