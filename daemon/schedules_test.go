package daemon

import (
	"log/slog"
	"strings"
	"testing"
	"time"

	"github.com/m3o/m3o"
	"github.com/m3o/m3o/buildpacks"
	"github.com/m3o/m3o/events/cron"
	"github.com/m3o/m3o/store"
)

func timetable(t *testing.T) *schedules {
	t.Helper()
	st, err := store.Open(t.Context(), store.Config{Dir: t.TempDir()})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = st.Close() })
	s, err := openSchedules(t.Context(), &Daemon{store: st, log: slog.New(slog.DiscardHandler)})
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func TestOneOfManyDaemonsClaimsAFiring(t *testing.T) {
	s := timetable(t)
	if _, err := s.add(t.Context(), schedule{App: "hello", Cron: "@hourly", Action: doRebuild}); err != nil {
		t.Fatal(err)
	}
	jobs, err := s.Jobs(t.Context())
	if err != nil || len(jobs) != 1 {
		t.Fatalf("jobs = %v, %v", jobs, err)
	}
	due := cron.Due{Run: time.Now().Add(time.Hour), Upto: time.Now().Add(time.Hour)}
	won := 0
	results := make(chan bool)
	for range 8 {
		go func() {
			ok, err := s.Claim(t.Context(), jobs[0], due)
			if err != nil {
				t.Error(err)
			}
			results <- ok
		}()
	}
	for range 8 {
		if <-results {
			won++
		}
	}
	if won != 1 {
		t.Errorf("%d of 8 claimed it", won)
	}
	// Paused or removed since it was read: nobody does.
	jobs, _ = s.Jobs(t.Context())
	if _, err := s.change(t.Context(), "hello", "rebuild", func(r *schedule) error { r.Paused = true; return nil }); err != nil {
		t.Fatal(err)
	}
	if ok, err := s.Claim(t.Context(), jobs[0], due); ok || err != nil {
		t.Errorf("a paused one is claimed: %t, %v", ok, err)
	}
	if err := s.removeApp(t.Context(), "hello"); err != nil {
		t.Fatal(err)
	}
	if ok, err := s.Claim(t.Context(), jobs[0], due); ok || err != nil {
		t.Errorf("a removed one is claimed: %t, %v", ok, err)
	}
}

func TestRunThatACrashCutOffIsLost(t *testing.T) {
	s := timetable(t)
	rec, err := s.add(t.Context(), schedule{App: "hello", Cron: "@hourly", Action: doRun, Args: []string{"/app/x"}})
	if err != nil {
		t.Fatal(err)
	}
	if _, _, err := s.open(t.Context(), cron.Run{Job: rec.key(), At: time.Now()}); err != nil {
		t.Fatal(err)
	}
	if err := s.settle(t.Context()); err != nil {
		t.Fatal(err)
	}
	runs, err := s.history(t.Context(), "hello", "x", 10)
	if err != nil || len(runs) != 1 || runs[0].Status != runLost || runs[0].Ended.IsZero() {
		t.Errorf("history = %+v, %v", runs, err)
	}
}

func TestHistoryIsBounded(t *testing.T) {
	s := timetable(t)
	rec, err := s.add(t.Context(), schedule{App: "hello", Cron: "@hourly", Action: doRebuild})
	if err != nil {
		t.Fatal(err)
	}
	for range keepRuns + 5 {
		s.Skip(t.Context(), cron.Run{Job: rec.key(), At: time.Now(), Missed: 2}, cron.WhyMissed)
	}
	runs, err := s.history(t.Context(), "hello", "", 1000)
	if err != nil || len(runs) != keepRuns {
		t.Fatalf("%d runs are kept, %v", len(runs), err)
	}
	if r := runs[0]; r.Number != keepRuns+5 || r.Status != runMissed || r.Missed != 2 {
		t.Errorf("the newest is %+v", r)
	}
}

func TestDeclaredSchedulesFollowTheRelease(t *testing.T) {
	s := timetable(t)
	ctx := t.Context()
	names := func() string {
		all, err := s.list(ctx, "hello")
		if err != nil {
			t.Fatal(err)
		}
		var out []string
		for _, r := range all {
			n := r.Name + "=" + r.Cron
			if r.Paused {
				n += " paused"
			}
			out = append(out, n)
		}
		return strings.Join(out, ", ")
	}
	follow := func(all ...m3o.Schedule) {
		t.Helper()
		if err := s.follow(ctx, m3o.Release{App: "hello", User: "ada", Schedules: all}); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := s.add(ctx, schedule{App: "hello", Name: "mine", Cron: "@daily", Action: doRebuild}); err != nil {
		t.Fatal(err)
	}
	a := m3o.Schedule{Name: "a", Cron: "@hourly", Action: doRun, Args: []string{"/app/a"}}
	b := m3o.Schedule{Name: "b", Cron: "0 4 * * *", Action: doRebuild}
	mine := m3o.Schedule{Name: "mine", Cron: "@weekly", Action: doRebuild}
	follow(a, b, mine)
	if got, want := names(), "a=@hourly, b=0 4 * * *, mine=@daily"; got != want {
		t.Errorf("got %s, want %s", got, want)
	}
	if _, err := s.change(ctx, "hello", "a", func(r *schedule) error { r.Paused = true; return nil }); err != nil {
		t.Fatal(err)
	}
	a.Cron = "30 * * * *"
	follow(a)
	if got, want := names(), "a=30 * * * * paused, mine=@daily"; got != want {
		t.Errorf("got %s, want %s", got, want)
	}
	follow()
	if got, want := names(), "mine=@daily"; got != want {
		t.Errorf("got %s, want %s", got, want)
	}
}

func TestDeclaredSchedulesAreCheckedBeforeTheBuild(t *testing.T) {
	files := buildpacks.Files{Manifest: buildpacks.Manifest{Schedules: []m3o.Schedule{{Name: "x", Cron: "0 0 30 2 *", Action: doRebuild}}}}
	if _, err := declaredSchedules(files); err == nil || !strings.HasPrefix(err.Error(), "m3o.yaml: schedules.x: ") || !strings.Contains(err.Error(), "never fires") {
		t.Errorf("error = %v", err)
	}
	files = buildpacks.Files{App: buildpacks.AppJSON{Cron: []buildpacks.CronJob{
		{Schedule: "@daily", Command: []string{"bin/report", "-v"}, Line: 3}, {Schedule: "@hourly", Command: []string{"report"}, Line: 4}}}}
	all, err := declaredSchedules(files)
	if err != nil || len(all) != 2 || all[0].Name != "report" || all[1].Name != "report-2" {
		t.Fatalf("declared = %+v, %v", all, err)
	}
	inImage(&buildpacks.Plan{Builder: "go"}, all)
	if all[0].Args[0] != "/app/report" || all[1].Args[0] != "/app/report" {
		t.Errorf("commands are %q and %q", all[0].Args, all[1].Args)
	}
}

func TestLastBytesAreWholeLines(t *testing.T) {
	l := &lastBytes{max: 10}
	for _, s := range []string{"first line\n", "second\n", "third\n"} {
		if _, err := l.Write([]byte(s)); err != nil {
			t.Fatal(err)
		}
	}
	if got, want := l.String(), "…\nthird\n"; got != want {
		t.Errorf("kept %q, want %q", got, want)
	}
}
