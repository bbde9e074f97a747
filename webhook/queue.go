package webhook

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"sync"
	"time"

	"github.com/m3o/m3o"
	"github.com/m3o/m3o/store"
)

// Limits of the queue. Retention is longer than GitHub's three days, for that
// long it sends a delivery again under its old id.
const (
	maxPending   = 5000 // deliveries that wait for work
	maxKept      = 20_000
	retention    = 4 * 24 * time.Hour
	maxBatch     = 64 // deliveries written at once
	maxBatchSize = 512 << 10
	maxTries     = 8
	workers      = 32 // a forge that does not answer holds some of them up for minutes
)

// A State says how far a delivery has come.
type State string

// The states of a delivery. Those after Working are ends.
const (
	Queued  State = "queued"
	Working State = "working"
	Done    State = "done"
	Ignored State = "ignored"
	Failed  State = "failed" // sent again, it is tried again
)

func (s State) ended() bool { return s == Done || s == Ignored || s == Failed }

// A Delivery is one event for one hook, and what came of it.
type Delivery struct {
	Hook     string // id of the hook
	ID       string // the forge's id
	Received time.Time
	State    State
	Note     string // what came of it, one line
	Tries    int
	Event    Event // without Changes and Pull where it was only listed
}

// A Result is how work on a delivery ended.
type Result struct {
	State State // Done or Ignored
	Note  string
}

// Work is done on each delivery: those of one hook one after the other, in
// the order they came. What takes long is returned as a function, which runs
// beside the work on the next ones; the delivery ends when it ends. An error
// of kind Unavailable or Internal is tried again later, others end the
// delivery as Failed. Work must be safe to repeat: a crash repeats it.
type Work func(ctx context.Context, d Delivery) (Result, func(context.Context) (Result, error), error)

// A Queue keeps deliveries on disk until they have been worked on, and knows
// those of the last days, so that none is worked on twice. It is safe for
// concurrent use.
type Queue struct {
	log     *slog.Logger
	bucket  *store.Bucket[batch]
	work    Work
	backoff func(try int) time.Duration

	in    chan *entry
	wake  chan struct{} // holds one token when dirty has something
	ready chan string   // hooks with work to do

	mu      sync.Mutex // guards what follows
	known   map[string]*item
	order   []*item // oldest first
	lanes   map[string]*hookLane
	dirty   map[string]bool // batches whose states are newer than on disk
	pending int
	next    uint64
	idle    chan struct{} // closed when nothing is pending; nil unless somebody waits
}

// batch is what one write to disk holds: a burst costs few of them.
type batch struct{ Deliveries []Delivery }

type item struct {
	Delivery        // Event is the whole one only while it is pending
	batch    string // key
	index    int
}

type entry struct {
	d    Delivery
	done chan error
}

// A hookLane is the pending deliveries of one hook.
type hookLane struct {
	items []*item
	busy  bool // a worker has it, or a timer will give it to one
}

func itemKey(hook, id string) string { return hook + "\x00" + id }

// OpenQueue reads what is kept in st. Deliveries that were not finished are
// worked on again once Run is called.
func OpenQueue(ctx context.Context, st *store.Store, work Work, log *slog.Logger) (*Queue, error) {
	q := &Queue{log: log, work: work, backoff: backoff, in: make(chan *entry), wake: make(chan struct{}, 1), ready: make(chan string, 2*maxPending),
		known: map[string]*item{}, lanes: map[string]*hookLane{}, dirty: map[string]bool{}}
	var err error
	if q.bucket, err = store.NewBucket[batch](ctx, st, "hook-deliveries"); err != nil {
		return nil, fmt.Errorf("open webhook queue: %w", err)
	}
	entries, err := q.bucket.List(ctx, "")
	if err != nil {
		return nil, fmt.Errorf("open webhook queue: %w", err)
	}
	for _, e := range entries {
		var n uint64
		if _, err := fmt.Sscanf(e.Key, "%d", &n); err == nil {
			q.next = max(q.next, n+1)
		}
		for i, d := range e.Value.Deliveries {
			it := &item{Delivery: d, batch: e.Key, index: i}
			q.order = append(q.order, it)
			q.known[itemKey(d.Hook, d.ID)] = it
			if d.State.ended() {
				it.Event = brief(d.Event)
				continue
			}
			q.pend(it)
		}
	}
	return q, nil
}

// backoff is 1 s, 4 s, 16 s … 10 min.
func backoff(try int) time.Duration {
	return min(time.Second<<(2*min(try, 10)), 10*time.Minute)
}

func brief(e Event) Event {
	e.Changes, e.Pull = nil, nil
	return e
}

// pend puts an item at the end of its hook's lane. The caller holds mu, or
// has q for itself.
func (q *Queue) pend(it *item) {
	l := q.lanes[it.Hook]
	if l == nil {
		l = &hookLane{}
		q.lanes[it.Hook] = l
	}
	l.items = append(l.items, it)
	q.pending++
	q.offer(it.Hook, l)
}

// offer lets a worker have the lane. The caller holds mu.
func (q *Queue) offer(hook string, l *hookLane) {
	if !l.busy && len(l.items) > 0 {
		l.busy = true
		q.ready <- hook // has room for every pending delivery
	}
}

// ErrDuplicate is what Add says of a delivery it has already.
var ErrDuplicate = &m3o.Error{Kind: m3o.Conflict, Msg: "this delivery was received before"}

// Add takes a delivery in; when it returns nil, the delivery is on disk and
// will be worked on. One that is known is ErrDuplicate, unless it had failed:
// then it is tried again. Unavailable when the queue or the disk is full.
func (q *Queue) Add(ctx context.Context, hook string, e Event) error {
	q.mu.Lock()
	if it := q.known[itemKey(hook, e.Delivery)]; it != nil && it.State != Failed {
		q.mu.Unlock()
		return ErrDuplicate
	}
	full := q.pending >= maxPending
	q.mu.Unlock()
	if full {
		return &m3o.Error{Kind: m3o.Unavailable, Msg: "too many deliveries wait", Hint: "send it again later"}
	}
	en := &entry{d: Delivery{Hook: hook, ID: e.Delivery, Received: time.Now().UTC(), State: Queued, Event: e}, done: make(chan error, 1)}
	select {
	case q.in <- en:
	case <-ctx.Done():
		return ctx.Err()
	}
	select {
	case err := <-en.done:
		return err
	case <-ctx.Done():
		return ctx.Err()
	}
}

// Run writes and works until ctx ends, then waits for the work under way.
func (q *Queue) Run(ctx context.Context) error {
	var wg sync.WaitGroup
	for range workers {
		wg.Go(func() {
			for {
				select {
				case <-ctx.Done():
					return
				case hook := <-q.ready:
					q.step(ctx, hook, &wg)
				}
			}
		})
	}
	sweep := time.NewTicker(time.Hour)
	defer sweep.Stop()
	q.sweep(ctx)
	for {
		select {
		case <-ctx.Done():
			wg.Wait()
			q.flush(context.WithoutCancel(ctx))
			return nil
		case first := <-q.in:
			q.write(ctx, first)
		case <-q.wake:
			q.flush(ctx)
		case <-sweep.C:
			q.sweep(ctx)
		}
	}
}

// write stores the delivery and those that wait behind it in one write: what
// is slow is the disk, and a burst must be answered within a second.
func (q *Queue) write(ctx context.Context, first *entry) {
	entries, size := []*entry{first}, first.d.size()
	for more := true; more && len(entries) < maxBatch && size < maxBatchSize; {
		select {
		case e := <-q.in:
			entries = append(entries, e)
			size += e.d.size()
		default:
			more = false
		}
	}
	var b batch
	var fresh []*entry
	seen := map[string]bool{}
	q.mu.Lock()
	key := fmt.Sprintf("%020d", q.next)
	q.next++
	for _, e := range entries {
		k := itemKey(e.d.Hook, e.d.ID)
		if it := q.known[k]; seen[k] || it != nil && it.State != Failed {
			e.done <- ErrDuplicate
			continue
		}
		seen[k] = true
		fresh = append(fresh, e)
		b.Deliveries = append(b.Deliveries, e.d)
	}
	q.mu.Unlock()
	if len(fresh) == 0 {
		return
	}
	_, err := q.bucket.Create(ctx, key, b)
	if err == nil {
		q.mu.Lock()
		for i, e := range fresh {
			it := &item{Delivery: e.d, batch: key, index: i}
			q.order = append(q.order, it)
			q.known[itemKey(e.d.Hook, e.d.ID)] = it
			q.pend(it)
		}
		q.mu.Unlock()
	} else {
		q.log.Error("store deliveries", "err", err)
	}
	for _, e := range fresh {
		e.done <- err
	}
}

func (d *Delivery) size() int {
	n := 500
	for _, c := range d.Event.Changes {
		n += len(c.Ref) + len(c.Message) + 200
		for _, p := range c.Paths {
			n += len(p) + 3
		}
	}
	return n
}

// step works on the first delivery of a lane.
func (q *Queue) step(ctx context.Context, hook string, wg *sync.WaitGroup) {
	q.mu.Lock()
	l := q.lanes[hook]
	it := l.items[0]
	it.State, it.Tries = Working, it.Tries+1
	d := it.Delivery
	q.mu.Unlock()
	res, long, err := q.work(ctx, d)
	if ctx.Err() != nil {
		return // what is not finished is worked on at the next start
	}
	if err != nil && q.again(err, it) {
		q.mu.Lock()
		it.State, it.Note = Queued, "tried again later: "+clip(err.Error(), maxText)
		q.mu.Unlock()
		q.log.Warn("delivery is tried again", "hook", hook, "delivery", it.ID, "err", errors.Join(err, errors.Unwrap(err)))
		wg.Go(func() {
			select {
			case <-ctx.Done():
			case <-time.After(q.backoff(d.Tries - 1)):
				q.mu.Lock()
				defer q.mu.Unlock()
				l.busy = false
				q.offer(hook, l)
			}
		})
		return
	}
	q.mu.Lock()
	l.items = l.items[1:]
	l.busy = false
	if len(l.items) == 0 {
		delete(q.lanes, hook)
	}
	q.offer(hook, l)
	q.mu.Unlock()
	if long == nil || err != nil {
		q.end(it, res, err)
		return
	}
	wg.Go(func() {
		res, err := long(ctx)
		if ctx.Err() != nil {
			return
		}
		if err == nil || !q.again(err, it) {
			q.end(it, res, err)
			return
		}
		q.mu.Lock()
		it.State, it.Note = Queued, "tried again later: "+clip(err.Error(), maxText)
		q.mu.Unlock()
		select {
		case <-ctx.Done():
		case <-time.After(q.backoff(d.Tries - 1)):
			q.mu.Lock()
			defer q.mu.Unlock()
			q.pending--
			q.pend(it)
		}
	})
}

// again says whether err may pass by itself.
func (q *Queue) again(err error, it *item) bool {
	k := m3o.KindOf(err)
	return it.Tries < maxTries && (k == m3o.Unavailable || k == m3o.Internal)
}

// end records what came of a delivery.
func (q *Queue) end(it *item, res Result, err error) {
	q.mu.Lock()
	defer q.mu.Unlock()
	it.State, it.Note = res.State, clip(res.Note, maxText)
	if err != nil {
		it.State, it.Note = Failed, clip(err.Error(), maxText)
	}
	it.Event = brief(it.Event)
	q.dirty[it.batch] = true
	if q.pending--; q.pending == 0 && q.idle != nil {
		close(q.idle)
		q.idle = nil
	}
	select {
	case q.wake <- struct{}{}:
	default:
	}
}

// Idle waits until no delivery is pending.
func (q *Queue) Idle(ctx context.Context) error {
	q.mu.Lock()
	if q.pending == 0 {
		q.mu.Unlock()
		return nil
	}
	if q.idle == nil {
		q.idle = make(chan struct{})
	}
	idle := q.idle
	q.mu.Unlock()
	select {
	case <-idle:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// flush writes the states that changed. One that a crash loses is only worked
// on again.
func (q *Queue) flush(ctx context.Context) {
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	q.mu.Lock()
	dirty := q.dirty
	q.dirty = map[string]bool{}
	q.mu.Unlock()
	for key := range dirty {
		b, rev, err := q.bucket.Get(ctx, key)
		if err != nil {
			if m3o.KindOf(err) != m3o.NotFound {
				q.log.Error("read deliveries", "err", err)
			}
			continue
		}
		q.mu.Lock()
		for _, it := range q.order {
			if it.batch == key && it.index < len(b.Deliveries) {
				d := &b.Deliveries[it.index]
				d.State, d.Note, d.Tries = it.State, it.Note, it.Tries
			}
		}
		q.mu.Unlock()
		if _, err := q.bucket.Update(ctx, key, b, rev); err != nil {
			q.log.Error("store state of deliveries", "err", err)
		}
	}
}

// sweep forgets deliveries that are old, whole batches at a time.
func (q *Queue) sweep(ctx context.Context) {
	cut := time.Now().Add(-retention)
	q.mu.Lock()
	gone := map[string]bool{}
	for i, it := range q.order {
		gone[it.batch] = it.State.ended() && (it.Received.Before(cut) || len(q.order)-i > maxKept) && (gone[it.batch] || it.index == 0)
	}
	q.order = slices.DeleteFunc(q.order, func(it *item) bool {
		if !gone[it.batch] {
			return false
		}
		if k := itemKey(it.Hook, it.ID); q.known[k] == it {
			delete(q.known, k)
		}
		return true
	})
	q.mu.Unlock()
	for key, yes := range gone {
		if !yes {
			continue
		}
		if err := q.bucket.Delete(ctx, key, 0); err != nil {
			q.log.Error("forget deliveries", "err", err)
		}
	}
}

// List is the newest n deliveries of a hook, newest first.
func (q *Queue) List(hook string, n int) []Delivery {
	q.mu.Lock()
	defer q.mu.Unlock()
	var out []Delivery
	for _, it := range slices.Backward(q.order) {
		if len(out) == n {
			break
		}
		if it.Hook == hook {
			d := it.Delivery
			d.Event = brief(d.Event)
			out = append(out, d)
		}
	}
	return out
}

// Replay works on a delivery once more, as if it had just come. NotFound when
// it is not kept, Conflict while it is pending.
func (q *Queue) Replay(ctx context.Context, hook, id string) error {
	q.mu.Lock()
	it := q.known[itemKey(hook, id)]
	q.mu.Unlock()
	if it == nil {
		return &m3o.Error{Kind: m3o.NotFound, Msg: "no delivery " + clip(id, 60) + " is kept", Hint: "m3o repo:deliveries lists them"}
	}
	b, _, err := q.bucket.Get(ctx, it.batch)
	if err != nil {
		return fmt.Errorf("read delivery: %w", err)
	}
	q.mu.Lock()
	defer q.mu.Unlock()
	if !it.State.ended() {
		return &m3o.Error{Kind: m3o.Conflict, Msg: "the delivery is being worked on", Hint: "m3o repo:deliveries shows when it has ended"}
	}
	if q.pending >= maxPending {
		return &m3o.Error{Kind: m3o.Unavailable, Msg: "too many deliveries wait", Hint: "try again later"}
	}
	it.Event, it.State, it.Tries, it.Note = b.Deliveries[it.index].Event, Queued, 0, "replayed"
	q.pend(it)
	return nil
}
