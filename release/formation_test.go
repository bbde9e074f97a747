package release

import (
	"errors"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/m3o/m3o"
)

func ptr[T any](v T) *T { return &v }

func TestFormationLiesOverTheRelease(t *testing.T) {
	rel := m3o.Release{App: "hello", Sleep: time.Hour, Processes: map[string]m3o.Process{
		"web":    {Replicas: 1, Port: 8080, Limits: m3o.Limits{MemoryBytes: 1 << 28, CPUMillis: 500}},
		"worker": {Replicas: 2},
		"clock":  {Replicas: 1},
	}}
	f := Formation{Sleep: ptr(time.Duration(0)), Processes: map[string]Scale{
		"web":    {Replicas: ptr(7), Limits: m3o.Limits{MemoryBytes: 1 << 30}, Scaling: &m3o.Scaling{Min: 1, Max: 5, CPU: 70}},
		"worker": {Stopped: true, Replicas: ptr(4)},
		"gone":   {Replicas: ptr(3)}, // of another release
	}}
	want := map[string]m3o.Process{
		"web": {Replicas: 5, Port: 8080, Limits: m3o.Limits{MemoryBytes: 1 << 30, CPUMillis: 500},
			Scaling: m3o.Scaling{Min: 1, Max: 5, CPU: 70}},
		"worker": {},
		"clock":  {Replicas: 1},
	}
	got := f.Over(rel, false)
	if d := cmp.Diff(want, got.Processes); d != "" || got.Sleep != 0 {
		t.Errorf("sleep %v, processes (-want +got):\n%s", got.Sleep, d)
	}
	f.Volumes = map[string]Volume{"data": {Process: "web", Path: "/data"}, "old": {}}
	if got := f.Over(rel, false).Processes["web"]; got.Replicas != 1 || got.Scaling.On() {
		t.Errorf("with a volume it runs %+v", got)
	}
	f.Volumes = nil
	if rel.Processes["web"].Replicas != 1 {
		t.Error("the release itself was changed")
	}
	f.Asleep = true
	if got := f.Over(rel, false).Processes; got["web"].Replicas != 0 || got["clock"].Replicas != 0 {
		t.Errorf("asleep, it runs %v", got)
	}
	if got := f.Over(rel, true).Processes; got["web"].Replicas != 5 || got["worker"].Replicas != 0 {
		t.Errorf("to be woken, it runs %v", got)
	}
}

func TestFormationIsKeptAndGoesWithItsApp(t *testing.T) {
	l := ledger(t)
	if _, err := l.Reform(t.Context(), "nobody", "ada", "scale", func(*Formation) error { return nil }); m3o.KindOf(err) != m3o.NotFound {
		t.Fatalf("Reform without an app = %v", err)
	}
	for range 2 {
		if _, err := l.CreateApp(t.Context(), m3o.App{Name: "former"}); err != nil {
			t.Fatal(err)
		}
		if f, err := l.Formation(t.Context(), "former"); err != nil || len(f.Processes) != 0 {
			t.Fatalf("a new app has the formation %+v, %v", f, err)
		}
		set := func(n int) error {
			_, err := l.Reform(t.Context(), "former", "ada", "scale web", func(f *Formation) error {
				f.Processes["web"] = Scale{Replicas: &n}
				return nil
			})
			return err
		}
		if err := errors.Join(set(2), set(3)); err != nil {
			t.Fatal(err)
		}
		no := errors.New("no")
		if _, err := l.Reform(t.Context(), "former", "ada", "", func(f *Formation) error { clear(f.Processes); return no }); !errors.Is(err, no) {
			t.Errorf("a refused change = %v", err)
		}
		f, err := l.Formation(t.Context(), "former")
		if err != nil || *f.Processes["web"].Replicas != 3 || f.User != "ada" || f.Reason != "scale web" {
			t.Errorf("formation %+v, %v", f, err)
		}
		if err := l.DestroyApp(t.Context(), "former"); err != nil {
			t.Fatal(err)
		}
	}
}
