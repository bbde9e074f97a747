package runtime

import (
	"cmp"
	"context"
	"crypto/rand"
	"fmt"
	"iter"
	"log/slog"
	"maps"
	"net/netip"
	goruntime "runtime"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/m3o/m3o"
)

// A Host runs single instances for a Reconciler: it is what differs between
// the drivers built on one. Its methods are safe for concurrent use, at most
// one of them at a time for an instance.
type Host interface {
	// Check reports why w can never run here, as an *m3o.Error.
	Check(ctx context.Context, w Workload) error
	// Launch starts the instance, first removing whatever is left of an
	// earlier launch of it. It leaves nothing behind when it fails.
	Launch(ctx context.Context, instance string, w Workload) (Handle, error)
	// Attach finds an instance that a driver before this one launched; nil
	// when it does not run and left no exit status.
	Attach(ctx context.Context, instance string, w Workload) (Handle, error)
	// Remove ends the instance if it runs and removes all it had, save its
	// log. It may be repeated.
	Remove(ctx context.Context, instance string) error
}

// A Handle is one launch of an instance. Its methods are safe for concurrent use.
type Handle interface {
	Addr() string // "ip:port", "" for a worker
	// Wait returns how it ended, once it has and its log is complete, or ctx's
	// error; when it has ended already, never the latter.
	Wait(ctx context.Context) (Exit, error)
	// Signal asks it to end, or with kill makes it end; nil when it has.
	Signal(kill bool) error
	// Listening gives the TCP addresses its processes listen on.
	Listening() ([]netip.AddrPort, error)
	// Close forgets the handle; the instance goes on.
	Close() error
}

// A Reconciler implements Start, Stop and Events of a Driver on a Host. Each
// instance has a keeper, a goroutine that alone launches, watches and removes
// it; the reconciler only decides which instances there should be.
type Reconciler struct {
	host        Host
	log         *slog.Logger
	records     records
	hub         hub
	wake        chan struct{}                                                   // what is wanted may differ from what is
	slots       chan struct{}                                                   // bounds launches at once: more only slow each other down
	ask         func(context.Context, string, m3o.Health) (Protocol, error)     // Probe, save in tests of time
	watchHealth func(ctx context.Context, addr, service string) <-chan struct{} // WatchHealth, save in tests of time
	running     sync.Mutex                                                      // held by Run and StopAll
	writing     sync.Mutex                                                      // serialises changes of wants with their records
	drain       func(context.Context, m3o.Instance)                             // see OnDrain; may be nil

	mu    sync.Mutex // guards below
	wants map[Ref]want
	have  map[string]*instance
	gone  chan struct{} // closed, and made anew, whenever an instance goes
}

// instance is one entry of Reconciler.have.
type instance struct {
	stop  chan struct{} // closed when it shall go
	found bool          // a driver before this one made it

	// Guarded by Reconciler.mu.
	stopped bool // stop is closed
	m3o.Instance
	record record
	handle Handle
	why    error // the last failure to launch or to answer a probe

	crashes int       // exits by itself in a row
	next    time.Time // when it is started again
}

// NewReconciler reads the records in dir, where it keeps them; "" keeps none.
// Log may be nil.
func NewReconciler(dir string, host Host, log *slog.Logger) (*Reconciler, error) {
	if log == nil {
		log = slog.New(slog.DiscardHandler)
	}
	r := &Reconciler{host: host, log: log, records: records{dir}, ask: Probe, watchHealth: watchHealth,
		wake: make(chan struct{}, 1), gone: make(chan struct{}), have: map[string]*instance{},
		slots: make(chan struct{}, max(4, 2*goruntime.NumCPU()))}
	wants, have, err := r.records.open()
	if err != nil {
		return nil, err
	}
	r.wants = wants
	for id, rec := range have {
		r.have[id] = newInstance(rec)
		r.have[id].found = true
	}
	return r, nil
}

func newInstance(rec record) *instance {
	w := rec.Workload
	return &instance{record: rec, stop: make(chan struct{}), Instance: m3o.Instance{App: w.App, Process: w.Process,
		Release: w.Release, ID: rec.ID, Phase: m3o.Starting, Restarts: rec.Restarts, Revision: w.Revision, At: time.Now()}}
}

// OnDrain has f called for an instance that was told to go, after Events say
// that it is Draining and before it is asked to end: f returns when nobody
// uses it any more. Call it before Run.
func (r *Reconciler) OnDrain(f func(context.Context, m3o.Instance)) { r.drain = f }

func (in *instance) ref() Ref { return in.record.Workload.Ref }

// Start is Driver.Start.
func (r *Reconciler) Start(ctx context.Context, w Workload, replicas int) error {
	if err := w.Validate(); err != nil {
		return err
	}
	if replicas < 0 || replicas > 1000 {
		return m3o.Errorf(m3o.Invalid, "%d instances of %s are not between 0 and 1000", replicas, w.Ref)
	}
	if replicas > 0 {
		if err := r.host.Check(ctx, w); err != nil {
			return fmt.Errorf("check %s: %w", w.Ref, err)
		}
	}
	r.writing.Lock()
	defer r.writing.Unlock()
	if err := r.records.putWant(want{w, replicas}); err != nil {
		return err
	}
	r.mu.Lock()
	r.wants[w.Ref] = want{w, replicas}
	r.mu.Unlock()
	r.look()
	return nil
}

// Stop is Driver.Stop.
func (r *Reconciler) Stop(ctx context.Context, ref Ref) error {
	if err := r.forget(ref); err != nil {
		return err
	}
	r.look()
	return r.awaitGone(ctx, func(in *instance) bool { return in.ref() == ref })
}

func (r *Reconciler) forget(ref Ref) error {
	r.writing.Lock()
	defer r.writing.Unlock()
	if err := r.records.remove("want", ref.file()); err != nil {
		return err
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	delete(r.wants, ref)
	return nil
}

func (r *Reconciler) awaitGone(ctx context.Context, match func(*instance) bool) error {
	for {
		r.mu.Lock()
		left := 0
		for _, in := range r.have {
			if match(in) {
				left++
			}
		}
		gone := r.gone
		r.mu.Unlock()
		if left == 0 {
			return nil
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("wait for %d instances to end: %w", left, ctx.Err())
		case <-gone:
		}
	}
}

// Events is Driver.Events.
func (r *Reconciler) Events(ctx context.Context) iter.Seq2[m3o.Instance, error] {
	return func(yield func(m3o.Instance, error) bool) {
		r.mu.Lock() // changes are published under it: none falls between the two
		now := r.instances()
		w := r.hub.subscribe()
		r.mu.Unlock()
		defer r.hub.unsubscribe(w)
		w.each(ctx, now, yield)
	}
}

// Instances are all instances now, in the order of their IDs.
func (r *Reconciler) Instances() []m3o.Instance {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.instances()
}

func (r *Reconciler) instances() []m3o.Instance {
	var all []m3o.Instance
	for _, id := range slices.Sorted(maps.Keys(r.have)) {
		all = append(all, r.have[id].Instance)
	}
	return all
}

// Images are the images of all that runs or should.
func (r *Reconciler) Images() []string {
	r.mu.Lock()
	defer r.mu.Unlock()
	set := map[string]bool{}
	for _, w := range r.wants {
		set[w.Workload.Image] = true
	}
	for _, in := range r.have {
		set[in.record.Workload.Image] = true
	}
	return slices.Sorted(maps.Keys(set))
}

// Workload is what an instance runs, and its handle while it runs; it is
// NotFound when there is no such instance, Unavailable when it does not run.
func (r *Reconciler) Workload(id string) (Workload, Handle, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	in := r.have[id]
	switch {
	case in == nil:
		return Workload{}, nil, &m3o.Error{Kind: m3o.NotFound, Msg: fmt.Sprintf("no instance called %s", id), Hint: "m3o ps"}
	case in.handle == nil:
		return Workload{}, nil, m3o.Errorf(m3o.Unavailable, "instance %s is not running now", id)
	}
	return in.record.Workload, in.handle, nil
}

func (r *Reconciler) look() {
	select {
	case r.wake <- struct{}{}:
	default:
	}
}

// retry is how often what is wanted is compared with what is, unasked: a step
// that met a full disk, say, is tried again then.
const retry = 5 * time.Second

// Run keeps what runs equal to what is wanted until ctx ends; the instances
// then go on by themselves if the host lets them. It may be run again.
func (r *Reconciler) Run(ctx context.Context) error { return r.run(ctx, false) }

// StopAll stops every instance and returns when all are gone. What is wanted
// is remembered: the next Run starts it again. It is a Conflict while Run runs.
func (r *Reconciler) StopAll(ctx context.Context) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	done := make(chan error, 1)
	go func() {
		done <- r.run(ctx, true)
		cancel()
	}()
	err := r.awaitGone(ctx, func(*instance) bool { return true })
	cancel()
	if rerr := <-done; rerr != nil {
		return rerr
	}
	return err
}

func (r *Reconciler) run(ctx context.Context, nothing bool) error {
	if !r.running.TryLock() {
		return m3o.Errorf(m3o.Conflict, "the driver is running already")
	}
	defer r.running.Unlock()
	var keepers sync.WaitGroup
	defer keepers.Wait()
	kept := map[*instance]bool{}
	tick := time.NewTicker(retry)
	defer tick.Stop()
	for {
		r.mu.Lock()
		for in := range kept {
			if r.have[in.ID] != in {
				delete(kept, in)
			}
		}
		wants := r.wants
		if nothing {
			wants = nil
		}
		stop, start := plan(wants, r.have)
		for _, id := range stop {
			in := r.have[id]
			in.stopped = true
			close(in.stop)
			r.look() // one that goes makes room for another
		}
		var unkept []*instance
		for _, in := range r.have {
			if !kept[in] {
				unkept = append(unkept, in)
			}
		}
		r.mu.Unlock()
		for _, w := range start {
			in, err := r.create(w)
			if err != nil {
				r.log.Error("cannot record an instance", "app", w.App, "release", w.Release, "err", err)
				break // the next tick tries again
			}
			unkept = append(unkept, in)
		}
		for _, in := range unkept {
			kept[in] = true
			keepers.Go(func() { r.keep(ctx, in) })
		}
		select {
		case <-ctx.Done():
			return nil
		case <-r.wake:
		case <-tick.C:
		}
	}
}

// plan says which instances to stop and which workloads to start one more
// instance of.
func plan(wants map[Ref]want, have map[string]*instance) (stop []string, start []Workload) {
	by := map[Ref][]*instance{}
	leaving := map[Ref]bool{} // an instance of another revision is still on its way out
	for _, in := range have {
		if !in.stopped {
			by[in.ref()] = append(by[in.ref()], in)
		} else if in.Revision != wants[in.ref()].Workload.Revision {
			leaving[in.ref()] = true
		}
	}
	for ref, ins := range by {
		w := wants[ref]
		stop = append(stop, surplus(w, ins)...)
		if len(w.Workload.Mounts) > 0 {
			leaving[ref] = leaving[ref] || slices.ContainsFunc(ins, func(in *instance) bool { return in.Revision != w.Workload.Revision })
		}
	}
	for _, ref := range slices.SortedFunc(maps.Keys(wants), Ref.compare) {
		w := wants[ref]
		current := 0
		for _, in := range by[ref] {
			if in.Revision == w.Workload.Revision {
				current++
			}
		}
		missing := w.Replicas - current
		if old := len(by[ref]) - current; old > 0 {
			// A replacement: a quarter more than wanted at a time.
			missing = min(missing, w.Replicas+max(1, w.Replicas/4)-len(by[ref]))
		}
		if len(w.Workload.Mounts) > 0 && leaving[ref] {
			continue // its files are still in use
		}
		for range missing {
			start = append(start, w.Workload)
		}
	}
	return stop, start
}

// surplus are the instances of one workload that shall go: of too many, those
// that serve least, then the newest. Those of an older revision go as far as
// ready ones of the new are there in their stead, or at once where the two
// must not meet.
func surplus(w want, ins []*instance) (stop []string) {
	var current, old []*instance
	ready := 0
	for _, in := range ins {
		switch {
		case in.Revision != w.Workload.Revision:
			old = append(old, in)
		default:
			current = append(current, in)
			if in.Phase == m3o.Ready {
				ready++
			}
		}
	}
	least := func(a, b *instance) int {
		return cmp.Or(cmp.Compare(rank(a.Phase), rank(b.Phase)), b.At.Compare(a.At), cmp.Compare(a.ID, b.ID))
	}
	take := func(from []*instance, n int) {
		slices.SortFunc(from, least)
		for _, in := range from[:min(max(n, 0), len(from))] {
			stop = append(stop, in.ID)
		}
	}
	take(current, len(current)-w.Replicas)
	if len(w.Workload.Mounts) > 0 {
		take(old, len(old))
	} else {
		take(old, len(old)-max(0, w.Replicas-ready))
	}
	return stop
}

func rank(p m3o.Phase) int {
	return slices.Index([]m3o.Phase{m3o.Draining, m3o.Exited, m3o.Unhealthy, m3o.Starting, m3o.Ready}, p)
}

// create records a new instance; its keeper launches it.
func (r *Reconciler) create(w Workload) (*instance, error) {
	in := newInstance(record{ID: NewID(w.Ref), Workload: w})
	if err := r.records.putInstance(in.record); err != nil {
		return nil, err
	}
	r.change(in, func() { r.have[in.ID] = in })
	return in, nil
}

// NewID makes up the ID of an instance: readable, unique, and a host name
// label (RFC 1123, at most 63 characters, no upper case). Its last six
// characters are random.
func NewID(r Ref) string {
	id := strings.ToLower(strings.ReplaceAll(fmt.Sprintf("%s-%s-v%d", r.App, r.Process, r.Release), "_", "-"))
	return strings.TrimRight(id[:min(len(id), 56)], "-") + "-" + strings.ToLower(rand.Text()[:6])
}
