// Package release is the ledger: which apps there are, what was built, what
// was released, how each deploy went and which moves it may make next. Releases
// are append-only; what is live is derived from the deploys and can be
// recomputed at any time.
//
// Every change is in the store before the method returns, so that after a
// crash UnfinishedDeploys says exactly how far each deploy may have come.
//
// It does not know how to build, run or route anything.
package release

import (
	"context"
	"errors"
	"fmt"
	"hash/fnv"
	"log/slog"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/m3o/m3o"
	"github.com/m3o/m3o/store"
)

// A Ledger is the record of all apps. It is safe for concurrent use; one
// process at a time may have a ledger open on a store.
type Ledger struct {
	log        *slog.Logger
	apps       *store.Bucket[m3o.App]
	builds     *store.Bucket[m3o.Build]
	releases   *store.Bucket[m3o.Release]
	deploys    *store.Bucket[Deploy]
	formations *store.Bucket[Formation]

	mu    sync.Mutex // guards index and gen
	index map[string]*derived
	gen   uint64 // grows with every write, so that a slow reader does not cache what is past

	locks [64]sync.Mutex // see lock
}

// Open reads the ledger in st and derives what is live.
func Open(ctx context.Context, st *store.Store, log *slog.Logger) (*Ledger, error) {
	if log == nil {
		log = slog.New(slog.DiscardHandler)
	}
	l := &Ledger{log: log}
	var err error
	if l.apps, err = store.NewBucket[m3o.App](ctx, st, "apps"); err != nil {
		return nil, fmt.Errorf("open ledger: %w", err)
	}
	if l.builds, err = store.NewBucket[m3o.Build](ctx, st, "builds"); err != nil {
		return nil, fmt.Errorf("open ledger: %w", err)
	}
	if l.releases, err = store.NewBucket[m3o.Release](ctx, st, "releases"); err != nil {
		return nil, fmt.Errorf("open ledger: %w", err)
	}
	if l.deploys, err = store.NewBucket[Deploy](ctx, st, "deploys"); err != nil {
		return nil, fmt.Errorf("open ledger: %w", err)
	}
	if l.formations, err = store.NewBucket[Formation](ctx, st, "formations"); err != nil {
		return nil, fmt.Errorf("open ledger: %w", err)
	}
	if l.index, err = l.recompute(ctx, ""); err != nil {
		return nil, fmt.Errorf("open ledger: %w", err)
	}
	return l, nil
}

// lock is the lock of an app's name, shared with a few other names. Whoever
// writes to the app holds it, so that nothing is added behind DestroyApp's back
// and the index sees the writes in their order. It is held across store calls,
// which is its purpose; nobody takes a second one.
func (l *Ledger) lock(app string) *sync.Mutex {
	h := fnv.New32a()
	_, _ = h.Write([]byte(app))
	return &l.locks[h.Sum32()%uint32(len(l.locks))]
}

// key orders the numbered records of an app by number.
func key(app string, n int) string { return fmt.Sprintf("%s/%010d", app, n) }

func noApp(name string, err error) error {
	return &m3o.Error{Kind: m3o.NotFound, Msg: "no app called " + name, Hint: "m3o apps", Err: err}
}

// CreateApp adds an app. Conflict when the name is taken, Invalid when
// m3o.CheckAppName refuses it; one with a Parent is named by m3o.PreviewName.
// Created is now unless it is set.
func (l *Ledger) CreateApp(ctx context.Context, app m3o.App) (m3o.App, error) {
	check := m3o.CheckAppName
	if app.Parent != "" {
		check = m3o.CheckName
	}
	if err := check(app.Name); err != nil {
		return m3o.App{}, err
	}
	if app.Created.IsZero() {
		app.Created = now()
	}
	lock := l.lock(app.Name)
	lock.Lock()
	defer lock.Unlock()
	_, err := l.apps.Create(ctx, app.Name, app)
	if m3o.KindOf(err) == m3o.Conflict {
		return m3o.App{}, &m3o.Error{Kind: m3o.Conflict, Msg: fmt.Sprintf("the name %s is taken", app.Name),
			Hint: "choose another name", Err: err}
	}
	if err != nil {
		return m3o.App{}, fmt.Errorf("create app %s: %w", app.Name, err)
	}
	return app, nil
}

// App is the app called name, or NotFound.
func (l *Ledger) App(ctx context.Context, name string) (m3o.App, error) {
	if m3o.CheckName(name) != nil {
		return m3o.App{}, noApp(name, nil) // nor can there be one
	}
	app, _, err := l.apps.Get(ctx, name)
	if m3o.KindOf(err) == m3o.NotFound {
		return m3o.App{}, noApp(name, err)
	}
	return app, err
}

// Apps is all apps in the order of their names.
func (l *Ledger) Apps(ctx context.Context) ([]m3o.App, error) {
	entries, err := l.apps.List(ctx, "")
	if err != nil {
		return nil, fmt.Errorf("list apps: %w", err)
	}
	apps := make([]m3o.App, len(entries))
	for i, e := range entries {
		apps[i] = e.Value
	}
	return apps, nil
}

// DestroyApp removes an app with its deploys, releases and builds. The app's
// own record goes last, so a destroy that was cut off can be repeated; an app
// made later with that name starts at v1. Conflict while a deploy is under way.
func (l *Ledger) DestroyApp(ctx context.Context, name string) error {
	lock := l.lock(name)
	lock.Lock()
	defer lock.Unlock()
	if _, err := l.App(ctx, name); err != nil {
		return err
	}
	x, err := l.derived(ctx, name)
	if err != nil {
		return err
	}
	if len(x.open) > 0 {
		return &m3o.Error{Kind: m3o.Conflict, Msg: fmt.Sprintf("a deploy of %s is under way", name),
			Hint: "wait for it to end, or cancel it"}
	}
	defer l.forget(name) // also when it is cut short: what is left is read again
	// Deploys first: without them nothing is live, whatever else is left.
	if err := errors.Join(
		removeAll(ctx, l.deploys, name),
		removeAll(ctx, l.releases, name),
		removeAll(ctx, l.builds, name),
		l.formations.Delete(ctx, name, 0),
	); err != nil {
		return fmt.Errorf("destroy app %s: %w", name, err)
	}
	if err := l.apps.Delete(ctx, name, 0); err != nil {
		return fmt.Errorf("destroy app %s: %w", name, err)
	}
	l.log.Info("app destroyed", "app", name)
	return nil
}

func removeAll[T any](ctx context.Context, b *store.Bucket[T], app string) error {
	entries, err := b.List(ctx, app+"/")
	if err != nil {
		return err
	}
	for _, e := range entries {
		if err := b.Delete(ctx, e.Key, 0); err != nil {
			return err
		}
	}
	return nil
}

// StartBuild records that a build has begun: it gives the build the app's next
// number, status running and, unless set, the time.
func (l *Ledger) StartBuild(ctx context.Context, b m3o.Build) (m3o.Build, error) {
	b.Status = m3o.BuildRunning
	if b.Started.IsZero() {
		b.Started = now()
	}
	err := l.add(ctx, b.App, func(x *derived) *int { return &x.builds }, func(n int) error {
		b.Number = n
		_, err := l.builds.Create(ctx, key(b.App, n), b)
		return err
	})
	if err != nil {
		return m3o.Build{}, fmt.Errorf("start build of %s: %w", b.App, err)
	}
	return b, nil
}

// EndBuild records how a build ended: status succeeded, failed or cancelled.
// A build ends once; Conflict after that. Finished is now unless it is set.
func (l *Ledger) EndBuild(ctx context.Context, b m3o.Build) error {
	switch b.Status {
	case m3o.BuildSucceeded, m3o.BuildFailed, m3o.BuildCancelled:
	default:
		return &m3o.Error{Kind: m3o.Invalid, Msg: fmt.Sprintf("a build cannot end as %q", b.Status)}
	}
	was, rev, err := l.build(ctx, b.App, b.Number)
	if err != nil {
		return err
	}
	if was.Status != m3o.BuildRunning {
		return &m3o.Error{Kind: m3o.Conflict, Msg: fmt.Sprintf("build %d of %s has ended: %s", b.Number, b.App, was.Status)}
	}
	b.Started = was.Started
	if b.Finished.IsZero() {
		b.Finished = now()
	}
	if _, err := l.builds.Update(ctx, key(b.App, b.Number), b, rev); err != nil {
		return fmt.Errorf("end build %d of %s: %w", b.Number, b.App, err)
	}
	return nil
}

// Build is the build of app with number n, or NotFound.
func (l *Ledger) Build(ctx context.Context, app string, n int) (m3o.Build, error) {
	b, _, err := l.build(ctx, app, n)
	return b, err
}

func (l *Ledger) build(ctx context.Context, app string, n int) (m3o.Build, store.Rev, error) {
	b, rev, err := get(ctx, l.builds, app, n)
	if m3o.KindOf(err) == m3o.NotFound {
		err = &m3o.Error{Kind: m3o.NotFound, Msg: fmt.Sprintf("%s has no build %d", app, n), Hint: "m3o builds", Err: err}
	}
	return b, rev, err
}

// Builds is the newest builds of app, newest first, all when limit is 0 or less.
func (l *Ledger) Builds(ctx context.Context, app string, limit int) ([]m3o.Build, error) {
	x, err := l.derived(ctx, app)
	if err != nil {
		return nil, err
	}
	return newest(ctx, l.builds, app, x.builds, limit)
}

// RunningBuilds is the builds that have not ended: after a start of the daemon,
// those that a crash cut off.
func (l *Ledger) RunningBuilds(ctx context.Context) ([]m3o.Build, error) {
	entries, err := l.builds.List(ctx, "")
	if err != nil {
		return nil, fmt.Errorf("list builds: %w", err)
	}
	var running []m3o.Build
	for _, e := range entries {
		if e.Value.Status == m3o.BuildRunning {
			running = append(running, e.Value)
		}
	}
	return running, nil
}

// ForgetBuilds removes the records of an app's builds but for the newest keep,
// those that have not ended, and those that needed names, and returns the
// numbers of what it removed. Numbers are not given out again.
func (l *Ledger) ForgetBuilds(ctx context.Context, app string, keep int, needed []int) ([]int, error) {
	entries, err := l.builds.List(ctx, app+"/")
	if err != nil {
		return nil, fmt.Errorf("list builds of %s: %w", app, err)
	}
	var gone []int
	for _, e := range entries[:max(0, len(entries)-max(keep, 1))] { // oldest first; the newest holds the number
		if e.Value.Status == m3o.BuildRunning || slices.Contains(needed, e.Value.Number) {
			continue
		}
		if err := l.builds.Delete(ctx, e.Key, 0); err != nil {
			return gone, fmt.Errorf("forget build %d of %s: %w", e.Value.Number, app, err)
		}
		gone = append(gone, e.Value.Number)
	}
	return gone, nil
}

// AppendRelease writes a release for ever and gives it the app's next version.
// Versions have no gaps. Created is now unless it is set.
func (l *Ledger) AppendRelease(ctx context.Context, r m3o.Release) (m3o.Release, error) {
	if r.Created.IsZero() {
		r.Created = now()
	}
	err := l.add(ctx, r.App, func(x *derived) *int { return &x.releases }, func(n int) error {
		r.Version = n
		_, err := l.releases.Create(ctx, key(r.App, n), r)
		return err
	})
	if err != nil {
		return m3o.Release{}, fmt.Errorf("append release of %s: %w", r.App, err)
	}
	return r, nil
}

// Release is version v of app, or NotFound.
func (l *Ledger) Release(ctx context.Context, app string, v int) (m3o.Release, error) {
	r, _, err := get(ctx, l.releases, app, v)
	if m3o.KindOf(err) == m3o.NotFound {
		err = &m3o.Error{Kind: m3o.NotFound, Msg: fmt.Sprintf("%s has no release v%d", app, v), Hint: "m3o releases", Err: err}
	}
	return r, err
}

// Releases is the newest releases of app, newest first, all when limit is 0 or less.
func (l *Ledger) Releases(ctx context.Context, app string, limit int) ([]m3o.Release, error) {
	x, err := l.derived(ctx, app)
	if err != nil {
		return nil, err
	}
	return newest(ctx, l.releases, app, x.releases, limit)
}

func get[T any](ctx context.Context, b *store.Bucket[T], app string, n int) (T, store.Rev, error) {
	if m3o.CheckName(app) != nil || n < 1 {
		var zero T
		return zero, 0, m3o.Errorf(m3o.NotFound, "no number %d of %s", n, app)
	}
	return b.Get(ctx, key(app, n))
}

// newest reads backwards from the last number, so that its cost is that of
// what it returns, not that of all there is.
func newest[T any](ctx context.Context, b *store.Bucket[T], app string, last, limit int) ([]T, error) {
	if limit <= 0 || limit >= last {
		if last == 0 {
			return nil, nil
		}
		entries, err := b.List(ctx, app+"/")
		if err != nil {
			return nil, err
		}
		all := make([]T, len(entries))
		for i, e := range entries {
			all[len(all)-1-i] = e.Value
		}
		return all, nil
	}
	list := make([]T, 0, limit)
	for n := last; n > 0 && len(list) < limit; n-- {
		v, _, err := b.Get(ctx, key(app, n))
		if m3o.KindOf(err) == m3o.NotFound {
			continue // forgotten: see ForgetBuilds
		}
		if err != nil {
			return nil, err
		}
		list = append(list, v)
	}
	return list, nil
}

// add creates the next numbered record of an app. create must make a record
// that is not there yet, and say Conflict when it is: then another took the
// number, and the next is tried, so numbers have neither gaps nor doubles.
func (l *Ledger) add(ctx context.Context, app string, last func(*derived) *int, create func(n int) error) error {
	lock := l.lock(app)
	lock.Lock()
	defer lock.Unlock()
	if _, err := l.App(ctx, app); err != nil {
		return err
	}
	x, err := l.derived(ctx, app)
	if err != nil {
		return err
	}
	for n := *last(x) + 1; ; n++ {
		err := create(n)
		if m3o.KindOf(err) == m3o.Conflict {
			continue
		}
		if err != nil {
			l.forget(app) // it may be written all the same
			return err
		}
		l.change(app, func(x *derived) { *last(x) = max(*last(x), n) })
		return nil
	}
}

func now() time.Time { return time.Now().UTC() }

// deployID and parseDeployID: hello.12 is the twelfth deploy of hello. App
// names have no dot.
func deployID(app string, n int) string { return fmt.Sprintf("%s.%d", app, n) }

func parseDeployID(id string) (app string, n int, ok bool) {
	app, num, ok := strings.Cut(id, ".")
	if !ok || m3o.CheckName(app) != nil {
		return "", 0, false
	}
	if _, err := fmt.Sscanf(num, "%d", &n); err != nil || deployID(app, n) != id || n < 1 {
		return "", 0, false
	}
	return app, n, true
}

// Live is the release that serves: the one of the deploy that went live last.
// NotFound when none ever did.
func (l *Ledger) Live(ctx context.Context, app string) (m3o.Release, error) {
	x, err := l.derived(ctx, app)
	if err != nil {
		return m3o.Release{}, err
	}
	if x.live == 0 {
		if _, err := l.App(ctx, app); err != nil {
			return m3o.Release{}, err
		}
		return m3o.Release{}, &m3o.Error{Kind: m3o.NotFound, Msg: app + " has no live release", Hint: "git push m3o main"}
	}
	return l.Release(ctx, app, x.live)
}

// keep is how many releases beside the live one a rollback offers.
const keep = 10

// A ReleaseState says what a release is to its app now.
type ReleaseState string

// The states of a release.
const (
	ReleasePending ReleaseState = "pending" // a deploy of it is under way
	ReleaseLive    ReleaseState = "live"
	ReleaseKept    ReleaseState = "kept"    // was live; a rollback offers it
	ReleaseRetired ReleaseState = "retired" // was live; too old for a rollback
	ReleaseFailed  ReleaseState = "failed"  // never went live
	ReleaseHeld    ReleaseState = "held"    // built while the app was locked; can be published
	// ReleasePublished was held until a later release made its image live.
	ReleasePublished ReleaseState = "published"
)

// ReleaseStatus says what version of app is to it now; NotFound when there is
// no such release.
func (l *Ledger) ReleaseStatus(ctx context.Context, app string, version int) (ReleaseState, error) {
	x, err := l.derived(ctx, app)
	if err != nil {
		return "", err
	}
	if version < 1 || version > x.releases {
		_, err := l.Release(ctx, app, version) // words the error
		return "", err
	}
	switch {
	case version == x.live:
		return ReleaseLive, nil
	case slices.Contains(x.kept(), version):
		return ReleaseKept, nil
	case x.went[version]:
		return ReleaseRetired, nil
	case x.pub[version]:
		return ReleasePublished, nil
	case slices.Contains(x.publishable(), version):
		return ReleaseHeld, nil
	case x.held[version]:
		return ReleaseRetired, nil // too old to be published
	case x.pending(version):
		return ReleasePending, nil
	}
	return ReleaseFailed, nil
}

// Held is the releases that were built while the app was locked and can still
// be published, newest first, ten at most. Whoever removes images must not
// remove theirs.
func (l *Ledger) Held(ctx context.Context, app string) ([]m3o.Release, error) {
	x, err := l.derived(ctx, app)
	if err != nil {
		return nil, err
	}
	return l.all(ctx, app, x.publishable())
}

// Kept is the releases a rollback offers, newest first: the live one and the
// newest ten others that were live once. Whoever removes images must not remove
// theirs.
func (l *Ledger) Kept(ctx context.Context, app string) ([]m3o.Release, error) {
	x, err := l.derived(ctx, app)
	if err != nil {
		return nil, err
	}
	return l.all(ctx, app, x.kept())
}

func (l *Ledger) all(ctx context.Context, app string, versions []int) ([]m3o.Release, error) {
	var list []m3o.Release
	for _, v := range versions {
		r, err := l.Release(ctx, app, v)
		if err != nil {
			return nil, err
		}
		list = append(list, r)
	}
	return list, nil
}

// ChangeApp edits an app's record; change may be called more than once, and
// its error ends it with nothing written. Name, Owner and Created stay.
func (l *Ledger) ChangeApp(ctx context.Context, name string, change func(*m3o.App) error) (m3o.App, error) {
	lock := l.lock(name)
	lock.Lock()
	defer lock.Unlock()
	if _, err := l.App(ctx, name); err != nil {
		return m3o.App{}, err
	}
	for {
		was, rev, err := l.apps.Get(ctx, name)
		if m3o.KindOf(err) == m3o.NotFound {
			return m3o.App{}, noApp(name, err)
		} else if err != nil {
			return m3o.App{}, err
		}
		app := was
		if err := change(&app); err != nil {
			return was, err
		}
		app.Name, app.Owner, app.Created = was.Name, was.Owner, was.Created
		if _, err = l.apps.Update(ctx, name, app, rev); m3o.KindOf(err) == m3o.Conflict {
			continue // another process changed it
		} else if err != nil {
			return was, fmt.Errorf("change app %s: %w", name, err)
		}
		return app, nil
	}
}
