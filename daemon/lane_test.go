package daemon

import (
	"context"
	"errors"
	"testing"
	"testing/synctest"
)

func TestNewestPushWins(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var l lane
		first, t1, err := l.enter(t.Context(), nil)
		if err != nil {
			t.Fatal(err)
		}
		results := make(chan error, 2)
		enter := func(entered chan<- *turn) {
			_, tn, err := l.enter(t.Context(), nil)
			if err == nil {
				entered <- tn
			}
			results <- err
		}
		second, third := make(chan *turn, 1), make(chan *turn, 1)
		go enter(second)
		synctest.Wait()
		if !errors.Is(context.Cause(first), errSuperseded) {
			t.Errorf("first push: cause %v, want superseded", context.Cause(first))
		}
		go enter(third)
		synctest.Wait()
		if err := <-results; !errors.Is(err, errSuperseded) {
			t.Errorf("second push: %v, want superseded", err)
		}
		t1.leave()
		synctest.Wait()
		if err := <-results; err != nil {
			t.Fatalf("third push: %v", err)
		}
		(<-third).leave()
		if len(second) != 0 {
			t.Error("the second push got its turn")
		}
	})
}

func TestNewerPushWaitsForOneThatSwitches(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var l lane
		ctx, t1, err := l.enter(t.Context(), nil)
		if err != nil {
			t.Fatal(err)
		}
		if err := t1.commit(ctx); err != nil {
			t.Fatal(err)
		}
		told, entered := 0, make(chan *turn)
		go func() {
			_, tn, _ := l.enter(t.Context(), func() { told++ })
			entered <- tn
		}()
		synctest.Wait()
		if ctx.Err() != nil {
			t.Error("a push that switches was cancelled")
		}
		t1.leave()
		t1.leave()
		(<-entered).leave()
		if told != 1 {
			t.Errorf("told %d times that it waits, want 1", told)
		}
	})
}

func TestSupersededPushCannotCommit(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var l lane
		ctx, t1, _ := l.enter(t.Context(), nil)
		entered := make(chan *turn)
		go func() {
			_, tn, _ := l.enter(t.Context(), nil)
			entered <- tn
		}()
		synctest.Wait()
		if err := t1.commit(ctx); !errors.Is(err, errSuperseded) {
			t.Errorf("commit = %v, want superseded", err)
		}
		t1.leave()
		(<-entered).leave()
	})
}

func TestReleaseLockIsPerApp(t *testing.T) {
	var ls lanes
	un, err := ls.lock(t.Context(), "a")
	if err != nil {
		t.Fatal(err)
	}
	if un2, err := ls.lock(t.Context(), "b"); err != nil {
		t.Errorf("lock of another app: %v", err)
	} else {
		un2()
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := ls.lock(ctx, "a"); !errors.Is(err, context.Canceled) {
		t.Errorf("second lock = %v, want cancelled", err)
	}
	un()
	un()
	un3, err := ls.lock(t.Context(), "a")
	if err != nil {
		t.Fatal(err)
	}
	un3()
}
