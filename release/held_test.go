package release

import (
	"slices"
	"testing"

	"github.com/m3o/m3o"
)

// hold takes a deploy of a locked app to its end.
func hold(t testing.TB, l *Ledger, app string) m3o.Release {
	t.Helper()
	d := begin(t, l, app)
	advance(t, l, d.ID, Build)
	r := appendRelease(t, l, app)
	if _, err := l.Advance(t.Context(), d.ID, Hold, func(d *Deploy) { d.Release = r.Version }); err != nil {
		t.Fatal(err)
	}
	return r
}

func heldVersions(t testing.TB, l *Ledger, app string) []int {
	t.Helper()
	held, err := l.Held(t.Context(), app)
	if err != nil {
		t.Fatal(err)
	}
	var out []int
	for _, r := range held {
		out = append(out, r.Version)
	}
	return out
}

func state(t testing.TB, l *Ledger, app string, v int) ReleaseState {
	t.Helper()
	s, err := l.ReleaseStatus(t.Context(), app, v)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func TestHeldReleasesWaitToBePublished(t *testing.T) {
	l := ledger(t)
	live := deploy(t, l, "hello")
	one, two := hold(t, l, "hello"), hold(t, l, "hello")
	if got, want := heldVersions(t, l, "hello"), []int{two.Version, one.Version}; !slices.Equal(got, want) {
		t.Errorf("held are %v, want %v", got, want)
	}
	if got, err := l.Live(t.Context(), "hello"); err != nil || got.Version != live.Version {
		t.Errorf("live is %v, %v", got.Version, err)
	}
	if got := state(t, l, "hello", one.Version); got != ReleaseHeld {
		t.Errorf("it is %s", got)
	}
	if kept, err := l.Kept(t.Context(), "hello"); err != nil || len(kept) != 1 {
		t.Errorf("a rollback offers %v, %v", kept, err)
	}
	// Published: a later release has its image.
	d, err := l.BeginDeploy(t.Context(), Deploy{App: "hello", Publish: one.Version})
	if err != nil {
		t.Fatal(err)
	}
	r := appendRelease(t, l, "hello")
	for _, e := range []Event{Start, Switch, Confirm} {
		if _, err := l.Advance(t.Context(), d.ID, e, func(d *Deploy) { d.Release, d.Publish = r.Version, 0 }); err != nil {
			t.Fatal(err)
		}
	}
	if got := state(t, l, "hello", one.Version); got != ReleasePublished {
		t.Errorf("after publishing it is %s", got)
	}
	if got, want := heldVersions(t, l, "hello"), []int{two.Version}; !slices.Equal(got, want) {
		t.Errorf("held are %v, want %v", got, want)
	}
	checkIndex(t, l)
	for range keep {
		hold(t, l, "hello")
	}
	if got := heldVersions(t, l, "hello"); len(got) != keep || slices.Contains(got, two.Version) {
		t.Errorf("held are %v, want the newest %d", got, keep)
	}
	if got := state(t, l, "hello", two.Version); got != ReleaseRetired {
		t.Errorf("too old to be published it is %s", got)
	}
	checkIndex(t, l)
}

func TestHoldNeedsAReleaseAndABuild(t *testing.T) {
	l := ledger(t)
	d := begin(t, l, "hello")
	_, err := l.Advance(t.Context(), d.ID, Hold, nil)
	wantKind(t, err, m3o.Conflict)
	advance(t, l, d.ID, Build)
	if _, err := l.Advance(t.Context(), d.ID, Hold, nil); err == nil {
		t.Error("held without a release")
	}
}

func TestChangeApp(t *testing.T) {
	l := ledger(t)
	done := make(chan error)
	for range 8 {
		go func() {
			_, err := l.ChangeApp(t.Context(), "hello", func(a *m3o.App) error {
				a.Name, a.Owner = "other", "eve"
				a.Paths = append(a.Paths, "x")
				return nil
			})
			done <- err
		}()
	}
	for range 8 {
		if err := <-done; err != nil {
			t.Error(err)
		}
	}
	app, err := l.App(t.Context(), "hello")
	if err != nil || len(app.Paths) != 8 || app.Name != "hello" || app.Owner == "eve" {
		t.Errorf("app is %+v, %v", app, err)
	}
	_, err = l.ChangeApp(t.Context(), "nosuch", func(*m3o.App) error { return nil })
	wantKind(t, err, m3o.NotFound)
}
