package release

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/m3o/m3o"
	"github.com/m3o/m3o/store"
)

func openStore(t testing.TB, dir string) *store.Store {
	t.Helper()
	s, err := store.Open(context.Background(), store.Config{Dir: dir})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := s.Close(); err != nil {
			t.Error(err)
		}
	})
	return s
}

func openLedger(t testing.TB, st *store.Store) *Ledger {
	t.Helper()
	l, err := Open(t.Context(), st, nil)
	if err != nil {
		t.Fatal(err)
	}
	return l
}

// ledger is a fresh ledger with one app, hello.
func ledger(t testing.TB) *Ledger {
	t.Helper()
	l := openLedger(t, openStore(t, t.TempDir()))
	createApp(t, l, "hello")
	return l
}

func createApp(t testing.TB, l *Ledger, name string) {
	t.Helper()
	if _, err := l.CreateApp(t.Context(), m3o.App{Name: name, Owner: "ada"}); err != nil {
		t.Fatal(err)
	}
}

func wantKind(t testing.TB, err error, want m3o.Kind) {
	t.Helper()
	if err == nil || m3o.KindOf(err) != want {
		t.Errorf("error is %v (%v), want kind %v", err, m3o.KindOf(err), want)
	}
}

func begin(t testing.TB, l *Ledger, app string) Deploy {
	t.Helper()
	d, err := l.BeginDeploy(t.Context(), Deploy{App: app, Reason: "git push", User: "ada"})
	if err != nil {
		t.Fatal(err)
	}
	return d
}

func appendRelease(t testing.TB, l *Ledger, app string) m3o.Release {
	t.Helper()
	r, err := l.AppendRelease(t.Context(), m3o.Release{App: app, Image: "sha256:00"})
	if err != nil {
		t.Fatal(err)
	}
	return r
}

func advance(t testing.TB, l *Ledger, id string, events ...Event) Deploy {
	t.Helper()
	var d Deploy
	for _, e := range events {
		var err error
		if d, err = l.Advance(t.Context(), id, e, nil); err != nil {
			t.Fatal(err)
		}
	}
	return d
}

// deploy takes a new release of app all the way to live.
func deploy(t testing.TB, l *Ledger, app string) m3o.Release {
	t.Helper()
	d := begin(t, l, app)
	r := appendRelease(t, l, app)
	if _, err := l.Advance(t.Context(), d.ID, Start, func(d *Deploy) { d.Release = r.Version }); err != nil {
		t.Fatal(err)
	}
	advance(t, l, d.ID, Switch, Confirm)
	return r
}

func TestApps(t *testing.T) {
	l := openLedger(t, openStore(t, t.TempDir()))
	ctx := t.Context()
	for _, name := range []string{"shop", "hello", "api-2"} {
		createApp(t, l, name)
	}
	_, err := l.CreateApp(ctx, m3o.App{Name: "hello", Owner: "eve"})
	wantKind(t, err, m3o.Conflict)
	_, err = l.CreateApp(ctx, m3o.App{Name: "Bad"})
	wantKind(t, err, m3o.Invalid)
	apps, err := l.Apps(ctx)
	var names []string
	for _, a := range apps {
		names = append(names, a.Name)
	}
	if d := cmp.Diff([]string{"api-2", "hello", "shop"}, names); d != "" || err != nil {
		t.Errorf("Apps: %v (-want +got):\n%s", err, d)
	}
	app, err := l.App(ctx, "hello")
	if err != nil || app.Owner != "ada" || app.Created.IsZero() {
		t.Errorf("App = %+v, %v", app, err)
	}
	for _, name := range []string{"nobody", "", "a/b", "../x", "\xff"} {
		_, err = l.App(ctx, name)
		wantKind(t, err, m3o.NotFound)
		wantKind(t, l.DestroyApp(ctx, name), m3o.NotFound)
		_, err = l.Live(ctx, name)
		wantKind(t, err, m3o.NotFound)
		_, err = l.AppendRelease(ctx, m3o.Release{App: name})
		wantKind(t, err, m3o.NotFound)
		_, err = l.StartBuild(ctx, m3o.Build{App: name})
		wantKind(t, err, m3o.NotFound)
		_, err = l.BeginDeploy(ctx, Deploy{App: name})
		wantKind(t, err, m3o.NotFound)
		_, err = l.Release(ctx, name, 1)
		wantKind(t, err, m3o.NotFound)
	}
}

func TestAppDestroyedStartsAgainAtV1(t *testing.T) {
	l := ledger(t)
	ctx := t.Context()
	createApp(t, l, "hello-2") // shares a prefix, must keep everything
	deploy(t, l, "hello-2")
	deploy(t, l, "hello")
	deploy(t, l, "hello")
	b, err := l.StartBuild(ctx, m3o.Build{App: "hello"})
	if err != nil {
		t.Fatal(err)
	}
	d := begin(t, l, "hello")
	wantKind(t, l.DestroyApp(ctx, "hello"), m3o.Conflict)
	advance(t, l, d.ID, Fail)
	if err := l.DestroyApp(ctx, "hello"); err != nil {
		t.Fatal(err)
	}
	_, err = l.App(ctx, "hello")
	wantKind(t, err, m3o.NotFound)
	_, err = l.Release(ctx, "hello", 1)
	wantKind(t, err, m3o.NotFound)
	_, err = l.Build(ctx, "hello", b.Number)
	wantKind(t, err, m3o.NotFound)
	_, err = l.Deploy(ctx, d.ID)
	wantKind(t, err, m3o.NotFound)
	createApp(t, l, "hello")
	_, err = l.Live(ctx, "hello")
	wantKind(t, err, m3o.NotFound)
	if r := deploy(t, l, "hello"); r.Version != 1 {
		t.Errorf("first release of the new app is v%d", r.Version)
	}
	if r, err := l.Live(ctx, "hello-2"); err != nil || r.Version != 1 {
		t.Errorf("the other app has %v, %v", r, err)
	}
	checkIndex(t, l)
}

func TestBuilds(t *testing.T) {
	l := ledger(t)
	ctx := t.Context()
	for i := range 3 {
		b, err := l.StartBuild(ctx, m3o.Build{App: "hello", Commit: fmt.Sprint("c", i+1), Status: m3o.BuildFailed})
		if err != nil || b.Number != i+1 || b.Status != m3o.BuildRunning || b.Started.IsZero() {
			t.Fatalf("StartBuild = %+v, %v", b, err)
		}
	}
	b, err := l.Build(ctx, "hello", 2)
	if err != nil {
		t.Fatal(err)
	}
	b.Status, b.Image = m3o.BuildSucceeded, "sha256:11"
	if err := l.EndBuild(ctx, b); err != nil {
		t.Fatal(err)
	}
	b.Status = m3o.BuildFailed
	wantKind(t, l.EndBuild(ctx, b), m3o.Conflict)
	wantKind(t, l.EndBuild(ctx, m3o.Build{App: "hello", Number: 1, Status: m3o.BuildRunning}), m3o.Invalid)
	wantKind(t, l.EndBuild(ctx, m3o.Build{App: "hello", Number: 9, Status: m3o.BuildFailed}), m3o.NotFound)
	got, err := l.Build(ctx, "hello", 2)
	if err != nil || got.Status != m3o.BuildSucceeded || got.Image != "sha256:11" || got.Finished.IsZero() {
		t.Errorf("Build = %+v, %v", got, err)
	}
	for limit, want := range map[int][]int{0: {3, 2, 1}, 1: {3}, 2: {3, 2}, 9: {3, 2, 1}} {
		list, err := l.Builds(ctx, "hello", limit)
		var n []int
		for _, b := range list {
			n = append(n, b.Number)
		}
		if err != nil || !slices.Equal(n, want) {
			t.Errorf("Builds limit %d = %v, %v, want %v", limit, n, err, want)
		}
	}
	running, err := l.RunningBuilds(ctx)
	if err != nil || len(running) != 2 {
		t.Errorf("RunningBuilds = %v, %v, want two", running, err)
	}
}

func TestForgottenBuildsLeaveTheirNumbers(t *testing.T) {
	l := ledger(t)
	ctx := t.Context()
	for n := range 6 {
		b, err := l.StartBuild(ctx, m3o.Build{App: "hello"})
		if err == nil && n != 1 { // build 2 still runs
			b.Status = m3o.BuildFailed
			err = l.EndBuild(ctx, b)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	gone, err := l.ForgetBuilds(ctx, "hello", 2, []int{3})
	if err != nil || !slices.Equal(gone, []int{1, 4}) {
		t.Errorf("ForgetBuilds = %v, %v, want builds 1 and 4", gone, err)
	}
	for limit, want := range map[int]string{0: "6 5 3 2", 3: "6 5 3", 5: "6 5 3 2"} {
		bs, err := l.Builds(ctx, "hello", limit)
		var got []string
		for _, b := range bs {
			got = append(got, fmt.Sprint(b.Number))
		}
		if err != nil || strings.Join(got, " ") != want {
			t.Errorf("Builds(%d) = %v, %v, want %s", limit, got, err, want)
		}
	}
	if gone, err := l.ForgetBuilds(ctx, "hello", 0, nil); err != nil || !slices.Equal(gone, []int{3, 5}) {
		t.Errorf("ForgetBuilds = %v, %v, want builds 3 and 5", gone, err)
	}
	if b, err := l.StartBuild(ctx, m3o.Build{App: "hello"}); err != nil || b.Number != 7 {
		t.Errorf("StartBuild = %d, %v, want 7", b.Number, err)
	}
}

func TestConcurrentReleasesHaveNoGaps(t *testing.T) {
	st := openStore(t, t.TempDir())
	// Two ledgers: numbers are right by compare-and-set, not by our own lock.
	ledgers := []*Ledger{openLedger(t, st), openLedger(t, st)}
	createApp(t, ledgers[0], "hello")
	const n = 24
	var wg sync.WaitGroup
	got := make(chan int, n)
	for i := range n {
		wg.Go(func() {
			r, err := ledgers[i%2].AppendRelease(t.Context(), m3o.Release{App: "hello", Commit: fmt.Sprint(i)})
			if err != nil {
				t.Error(err)
			}
			got <- r.Version
		})
	}
	wg.Wait()
	close(got)
	versions := slices.Sorted(func(yield func(int) bool) {
		for v := range got {
			if !yield(v) {
				return
			}
		}
	})
	for i, v := range versions {
		if v != i+1 {
			t.Fatalf("versions are %v", versions)
		}
	}
	if list, err := openLedger(t, st).Releases(t.Context(), "hello", 0); err != nil || len(list) != n || list[0].Version != n {
		t.Errorf("Releases gives %d, %v", len(list), err)
	}
}

func TestLiveFollowsTheDeploys(t *testing.T) {
	l := ledger(t)
	ctx := t.Context()
	live := func() int {
		t.Helper()
		r, err := l.Live(ctx, "hello")
		if m3o.KindOf(err) == m3o.NotFound {
			return 0
		}
		if err != nil {
			t.Fatal(err)
		}
		return r.Version
	}
	if live() != 0 {
		t.Error("an app without deploys is live")
	}
	deploy(t, l, "hello")
	if live() != 1 {
		t.Errorf("live is v%d, want v1", live())
	}
	// A deploy that fails after its switch leaves the old release live.
	d := begin(t, l, "hello")
	if d.Previous != 1 {
		t.Errorf("Previous = %d, want 1", d.Previous)
	}
	r := appendRelease(t, l, "hello")
	status := func(v int, want ReleaseState) {
		t.Helper()
		if got, err := l.ReleaseStatus(ctx, "hello", v); err != nil || got != want {
			t.Errorf("v%d is %s, %v, want %s", v, got, err, want)
		}
	}
	status(2, ReleasePending)
	if _, err := l.Advance(ctx, d.ID, Start, func(d *Deploy) { d.Release = r.Version }); err != nil {
		t.Fatal(err)
	}
	status(2, ReleasePending)
	advance(t, l, d.ID, Switch)
	if live() != 1 {
		t.Errorf("while switching live is v%d, want v1", live())
	}
	if _, err := l.Advance(ctx, d.ID, Fail, func(d *Deploy) { d.Error = "git did not move the ref" }); err != nil {
		t.Fatal(err)
	}
	if live() != 1 {
		t.Errorf("after a failure live is v%d, want v1", live())
	}
	status(1, ReleaseLive)
	status(2, ReleaseFailed)
	deploy(t, l, "hello")
	if live() != 3 {
		t.Errorf("live is v%d, want v3", live())
	}
	status(1, ReleaseKept)
	_, err := l.ReleaseStatus(ctx, "hello", 4)
	wantKind(t, err, m3o.NotFound)
	checkIndex(t, l)
}

// The deploy that goes live last serves, also when it began first.
func TestLiveIsWhatWentLiveLast(t *testing.T) {
	l := ledger(t)
	first, second := begin(t, l, "hello"), begin(t, l, "hello")
	for _, d := range []Deploy{second, first} {
		r := appendRelease(t, l, "hello")
		if _, err := l.Advance(t.Context(), d.ID, Start, func(d *Deploy) { d.Release = r.Version }); err != nil {
			t.Fatal(err)
		}
		advance(t, l, d.ID, Switch, Confirm)
	}
	if r, err := l.Live(t.Context(), "hello"); err != nil || r.Version != 2 {
		t.Errorf("live is v%d, %v, want v2", r.Version, err)
	}
	checkIndex(t, l)
}

func TestKeptIsWhatARollbackOffers(t *testing.T) {
	l := ledger(t)
	for range 13 {
		deploy(t, l, "hello")
	}
	kept := func() []int {
		t.Helper()
		list, err := l.Kept(t.Context(), "hello")
		if err != nil {
			t.Fatal(err)
		}
		var v []int
		for _, r := range list {
			v = append(v, r.Version)
		}
		return v
	}
	if got, want := kept(), []int{13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3}; !slices.Equal(got, want) {
		t.Errorf("Kept = %v, want %v", got, want)
	}
	if s, err := l.ReleaseStatus(t.Context(), "hello", 2); err != nil || s != ReleaseRetired {
		t.Errorf("v2 is %s, %v", s, err)
	}
	// An old release that is live again is kept however old it is.
	d := begin(t, l, "hello")
	if _, err := l.Advance(t.Context(), d.ID, Start, func(d *Deploy) { d.Release = 1 }); err != nil {
		t.Fatal(err)
	}
	advance(t, l, d.ID, Switch, Confirm)
	if got, want := kept(), []int{13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 1}; !slices.Equal(got, want) {
		t.Errorf("Kept = %v, want %v", got, want)
	}
	checkIndex(t, l)
}

// checkIndex proves the index equal to what the records say.
func checkIndex(t testing.TB, l *Ledger) {
	t.Helper()
	want, err := l.recompute(t.Context(), "")
	if err != nil {
		t.Fatal(err)
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	for app, got := range l.index {
		w := want[app]
		if w == nil {
			w = newDerived()
		}
		if d := cmp.Diff(w, got, cmp.AllowUnexported(derived{})); d != "" {
			t.Errorf("index of %s (-records +index):\n%s", app, d)
		}
	}
}

func TestIndexEqualsRecomputation(t *testing.T) {
	dir := t.TempDir()
	l := openLedger(t, openStore(t, dir))
	apps := []string{"a", "b", "c"}
	for _, a := range apps {
		createApp(t, l, a)
	}
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	events := []Event{Build, Command, Start, Switch, Confirm, Fail}
	var wg sync.WaitGroup
	for w := range 4 {
		wg.Go(func() {
			rnd := rand.New(rand.NewPCG(seed, uint64(w)))
			for range 60 {
				app := apps[rnd.IntN(len(apps))]
				var err error
				switch rnd.IntN(6) {
				case 0:
					_, err = l.BeginDeploy(t.Context(), Deploy{App: app})
				case 1:
					_, err = l.AppendRelease(t.Context(), m3o.Release{App: app})
				case 2:
					_, err = l.StartBuild(t.Context(), m3o.Build{App: app})
				default:
					list, lerr := l.Deploys(t.Context(), app, 3)
					if lerr != nil || len(list) == 0 {
						err = lerr
						break
					}
					v := 1 + rnd.IntN(5)
					_, err = l.Advance(t.Context(), list[rnd.IntN(len(list))].ID, events[rnd.IntN(len(events))], func(d *Deploy) { d.Release = v })
				}
				if err != nil && m3o.KindOf(err) != m3o.Conflict {
					t.Error(err)
				}
				if rnd.IntN(20) == 0 {
					l.forget(app) // as after a write that went unanswered
				}
			}
		})
	}
	wg.Wait()
	for _, a := range apps {
		if _, err := l.derived(t.Context(), a); err != nil {
			t.Error(err)
		}
	}
	checkIndex(t, l)
}

func TestOutOfOrderErrorsAreWorded(t *testing.T) {
	l := ledger(t)
	d := begin(t, l, "hello")
	_, err := l.Advance(t.Context(), d.ID, Confirm, nil)
	var e *m3o.Error
	if !errors.As(err, &e) || e.Msg != "deploy hello.1 is queued: it cannot confirm" {
		t.Errorf("error is %v", err)
	}
	for _, id := range []string{"", "hello", "hello.", "hello.0", "hello.01", "hello.-1", "hello.2", "x/y.1", "hello.1.1"} {
		_, err := l.Deploy(t.Context(), id)
		wantKind(t, err, m3o.NotFound)
		_, err = l.Advance(t.Context(), id, Build, nil)
		wantKind(t, err, m3o.NotFound)
	}
}

func BenchmarkAppendRelease(b *testing.B) {
	l := ledger(b)
	for b.Loop() {
		appendRelease(b, l, "hello")
	}
}

func BenchmarkLive(b *testing.B) {
	l := ledger(b)
	deploy(b, l, "hello")
	for b.Loop() {
		if _, err := l.Live(b.Context(), "hello"); err != nil {
			b.Fatal(err)
		}
	}
}
