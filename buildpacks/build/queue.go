package build

import (
	"context"
	"slices"
	"sync"
)

// A queue lets a number of builds run at once and is fair to users: when one
// ends, the next is the oldest of the user who has the fewest running and,
// among equals, was served longest ago. Somebody who pushes ten apps does not
// keep others waiting for ten builds.
type queue struct {
	mu      sync.Mutex // guards the rest
	free    int
	served  int
	running map[string]int // by user
	last    map[string]int // by user: the value of served when their last build began
	waiting []*ticket
	idle    chan struct{} // gets a value when the last that runs ends; nil for nobody
}

type ticket struct {
	user string
	turn chan struct{} // closed when the build may begin
}

// enter waits for a turn. waited is called once, before waiting, with how many
// wait already or run. The turn ends when done is called.
func (q *queue) enter(ctx context.Context, user string, waited func(ahead int)) (done func(), err error) {
	t := &ticket{user: user, turn: make(chan struct{})}
	q.mu.Lock()
	ahead := len(q.waiting)
	for _, n := range q.running {
		ahead += n
	}
	q.waiting = append(q.waiting, t)
	q.next()
	q.mu.Unlock()
	select {
	case <-t.turn:
	default:
		waited(ahead)
		select {
		case <-t.turn:
		case <-ctx.Done():
			q.mu.Lock()
			defer q.mu.Unlock()
			if i := slices.Index(q.waiting, t); i >= 0 {
				q.waiting = slices.Delete(q.waiting, i, i+1)
				return nil, context.Cause(ctx)
			}
			// Its turn came at the same moment.
			q.leave(user)
			return nil, context.Cause(ctx)
		}
	}
	return sync.OnceFunc(func() {
		q.mu.Lock()
		defer q.mu.Unlock()
		q.leave(user)
	}), nil
}

// busy reports whether any build runs.
func (q *queue) busy() bool {
	q.mu.Lock()
	defer q.mu.Unlock()
	return len(q.running) > 0
}

// leave gives a turn back. Called with mu held.
func (q *queue) leave(user string) {
	q.free++
	if q.running[user]--; q.running[user] == 0 {
		delete(q.running, user)
	}
	q.next()
	if len(q.running) == 0 {
		select {
		case q.idle <- struct{}{}:
		default:
		}
	}
}

// next gives free turns to those whose they are. Called with mu held.
func (q *queue) next() {
	if q.running == nil {
		q.running, q.last = map[string]int{}, map[string]int{}
	}
	for q.free > 0 && len(q.waiting) > 0 {
		best := 0
		for i, t := range q.waiting {
			b := q.waiting[best]
			if r, s := q.running[t.user], q.running[b.user]; r < s || r == s && q.last[t.user] < q.last[b.user] {
				best = i
			}
		}
		t := q.waiting[best]
		q.waiting = slices.Delete(q.waiting, best, best+1)
		q.free--
		q.served++
		q.running[t.user]++
		q.last[t.user] = q.served
		close(t.turn)
	}
}
