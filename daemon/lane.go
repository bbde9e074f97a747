package daemon

import (
	"context"
	"sync"

	"github.com/m3o/m3o"
)

// errSuperseded ends a push that a newer push of the same app replaces.
var errSuperseded = &m3o.Error{Kind: m3o.Conflict, Msg: "superseded by a newer push to this app",
	Hint: "the newer push goes on; fetch it with git fetch m3o when it is done"}

// A lane orders the pushes of one app: one builds, and the newest wins. A
// newer push cancels the one that runs, unless that has begun to switch, and
// the one that waits. The zero lane is ready to use.
type lane struct {
	mu      sync.Mutex // guards what follows
	current *turn
	waiting *turn
}

// A turn is one push's hold on its lane.
type turn struct {
	lane     *lane
	cancel   context.CancelCauseFunc
	final    bool          // may no longer be cancelled
	released bool          // done is closed
	done     chan struct{} // closed when the turn ends
}

// enter waits for the caller's turn. The context it returns ends with cause
// errSuperseded when a newer push comes. waited is called once, before
// waiting, if another push has to end first. leave must be called.
func (l *lane) enter(ctx context.Context, waited func()) (context.Context, *turn, error) {
	ctx, cancel := context.WithCancelCause(ctx)
	me := &turn{lane: l, cancel: cancel, done: make(chan struct{})}
	for told := false; ; {
		l.mu.Lock()
		// Superseded and woken at once: the newer push must not find us in its way.
		if err := context.Cause(ctx); err != nil {
			if l.waiting == me {
				l.waiting = nil
			}
			l.mu.Unlock()
			cancel(nil)
			return nil, nil, err
		}
		if l.waiting != nil && l.waiting != me && !told {
			l.waiting.cancel(errSuperseded)
		}
		if l.current == nil {
			l.current = me
			if l.waiting == me {
				l.waiting = nil
			}
			l.mu.Unlock()
			return ctx, me, nil
		}
		if !told {
			l.waiting = me
			if !l.current.final {
				l.current.cancel(errSuperseded)
			}
		}
		busy := l.current.done
		l.mu.Unlock()
		if !told && waited != nil {
			waited()
		}
		told = true
		select {
		case <-busy:
		case <-ctx.Done():
		}
	}
}

// commit makes the turn final: from here on no newer push cancels it. It
// fails when one already has.
func (t *turn) commit(ctx context.Context) error {
	t.lane.mu.Lock()
	defer t.lane.mu.Unlock()
	if err := context.Cause(ctx); err != nil {
		return err
	}
	t.final = true
	return nil
}

// leave gives the lane to the next push. Calling it again does nothing.
func (t *turn) leave() {
	t.lane.mu.Lock()
	defer t.lane.mu.Unlock()
	if t.released {
		return
	}
	t.released = true
	if t.lane.current == t {
		t.lane.current = nil
	}
	t.cancel(nil)
	close(t.done)
}

// lanes holds a lane and a release lock for each app.
type lanes struct {
	mu    sync.Mutex // guards apps
	apps  map[string]*lane
	locks map[string]chan struct{}
}

func (ls *lanes) lane(app string) *lane {
	ls.mu.Lock()
	defer ls.mu.Unlock()
	if ls.apps == nil {
		ls.apps = map[string]*lane{}
	}
	l := ls.apps[app]
	if l == nil {
		l = &lane{}
		ls.apps[app] = l
	}
	return l
}

// lock waits for the app's release lock: whoever changes what runs holds it,
// from the new release's number until it is live or gone. A build does not
// hold it, so a rollback need not wait for one.
func (ls *lanes) lock(ctx context.Context, app string) (unlock func(), err error) {
	ls.mu.Lock()
	if ls.locks == nil {
		ls.locks = map[string]chan struct{}{}
	}
	c := ls.locks[app]
	if c == nil {
		c = make(chan struct{}, 1)
		ls.locks[app] = c
	}
	ls.mu.Unlock()
	select {
	case c <- struct{}{}:
		return sync.OnceFunc(func() { <-c }), nil
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	}
}

// cancel ends the push that has the lane, with cause. It fails with Conflict
// when none has, or it has begun to switch.
func (l *lane) cancel(cause error) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	switch {
	case l.current == nil:
		return &m3o.Error{Kind: m3o.Conflict, Msg: "nothing is being deployed"}
	case l.current.final:
		return &m3o.Error{Kind: m3o.Conflict, Msg: "the build has ended and its release is going live", Hint: "m3o rollback takes it back"}
	}
	l.current.cancel(cause)
	return nil
}
