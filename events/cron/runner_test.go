package cron

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"
)

// shared is a table for any number of runners, with revisions as the store has.
type shared struct {
	mu   sync.Mutex
	jobs map[string]Job
	down bool
}

func (s *shared) Jobs(context.Context) ([]Job, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.down {
		return nil, errors.New("down")
	}
	var out []Job
	for _, j := range s.jobs {
		out = append(out, j)
	}
	return out, nil
}

func (s *shared) Claim(_ context.Context, j Job, due Due) (bool, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	now, ok := s.jobs[j.ID]
	if !ok || !now.Decided.Equal(j.Decided) {
		return false, nil
	}
	now.Decided = due.Upto
	s.jobs[j.ID] = now
	return true, nil
}

// diary notes what is run and left out; each run takes as long as it says.
type diary struct {
	mu    sync.Mutex
	lines []string
	takes time.Duration
	zone  *time.Location
}

func (d *diary) note(format string, args ...any) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.lines = append(d.lines, fmt.Sprintf(format, args...))
}

func (d *diary) Do(ctx context.Context, r Run) {
	what := ""
	if r.Late {
		what += " late"
	}
	if r.Missed > 0 {
		what += fmt.Sprintf(" missed %d", r.Missed)
	}
	d.note("%s run %s%s", time.Now().In(d.zone).Format("02 15:04"), r.Job, what)
	select {
	case <-time.After(d.takes):
	case <-ctx.Done():
		d.note("%s end %s: %v", time.Now().In(d.zone).Format("02 15:04"), r.Job, context.Cause(ctx))
	}
}

func (d *diary) Skip(_ context.Context, r Run, why string) {
	d.note("%s skip %s missed %d: %s", time.Now().In(d.zone).Format("02 15:04"), r.Job, r.Missed, why)
}

func (d *diary) check(t *testing.T, want ...string) {
	t.Helper()
	d.mu.Lock()
	defer d.mu.Unlock()
	if !slices.Equal(d.lines, want) {
		t.Errorf("got  %q\nwant %q", d.lines, want)
	}
	d.lines = nil
}

func until(at string) {
	v, err := time.Parse(time.RFC3339, at)
	if err != nil {
		panic(err)
	}
	time.Sleep(time.Until(v))
	synctest.Wait()
}

// The test clock begins at 2000-01-01 UTC. Clocks in Berlin went forward on 26
// March 2000 and back on 29 October.
func TestRunnerOverClockChanges(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		berlin := mustParse(t, "30 2 * * *", "Europe/Berlin")
		until("2000-03-24T12:00:00Z")
		table := &shared{jobs: map[string]Job{"nightly": {ID: "nightly", Spec: berlin, Decided: time.Now()}}}
		d := &diary{zone: berlin.Location()}
		ctx, cancel := context.WithCancel(t.Context())
		var wg sync.WaitGroup
		wg.Go(func() { _ = New(table, d, nil).Run(ctx) })
		until("2000-03-27T12:00:00Z")
		d.check(t, "25 02:30 run nightly", "26 03:00 run nightly", "27 02:30 run nightly")
		cancel()
		wg.Wait()

		until("2000-10-28T12:00:00Z")
		table.jobs["nightly"] = Job{ID: "nightly", Spec: berlin, Decided: time.Now()}
		ctx, cancel = context.WithCancel(t.Context())
		wg.Go(func() { _ = New(table, d, nil).Run(ctx) })
		until("2000-10-30T12:00:00Z")
		d.check(t, "29 02:30 run nightly", "30 02:30 run nightly")
		cancel()
		wg.Wait()
	})
}

func TestRunnerAfterAThreeHourOutage(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		hourly := mustParse(t, "0 * * * *", "UTC")
		start := time.Now()
		table := &shared{jobs: map[string]Job{
			"a-once": {ID: "a-once", Spec: hourly, Decided: start},
			"b-skip": {ID: "b-skip", Spec: hourly, Missed: Never, Decided: start},
		}}
		d := &diary{zone: time.UTC}
		run := func() (stop func()) {
			ctx, cancel := context.WithCancel(t.Context())
			var wg sync.WaitGroup
			wg.Go(func() { _ = New(table, d, nil).Run(ctx) })
			return func() { cancel(); wg.Wait() }
		}
		stop := run()
		until("2000-01-01T01:10:00Z")
		stop()
		slices.Sort(d.lines)
		d.check(t, "01 01:00 run a-once", "01 01:00 run b-skip")
		until("2000-01-01T04:15:00Z") // down at 02:00, 03:00 and 04:00
		stop = run()
		synctest.Wait()
		slices.Sort(d.lines)
		d.check(t, "01 04:15 run a-once late missed 2", "01 04:15 skip b-skip missed 3: missed while m3o was down")
		until("2000-01-01T05:00:30Z")
		slices.Sort(d.lines)
		d.check(t, "01 05:00 run a-once", "01 05:00 run b-skip")
		stop()
	})
}

func TestOneRunOfManyDaemons(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		table := &shared{jobs: map[string]Job{"x": {ID: "x", Spec: mustParse(t, "*/10 * * * *", ""), Decided: time.Now()}}}
		d := &diary{zone: time.UTC}
		ctx, cancel := context.WithCancel(t.Context())
		var wg sync.WaitGroup
		for range 5 {
			wg.Go(func() { _ = New(table, d, nil).Run(ctx) })
		}
		until("2000-01-01T00:25:00Z")
		d.check(t, "01 00:10 run x", "01 00:20 run x")
		cancel()
		wg.Wait()
	})
}

func TestOverlap(t *testing.T) {
	for policy, want := range map[Overlap][]string{
		"":      {"01 00:10 run x", "01 00:20 skip x missed 0: the run before it had not ended", "01 00:30 skip x missed 0: the run before it had not ended", "01 00:40 run x", "01 00:44 end x: context canceled"},
		Queue:   {"01 00:10 run x", "01 00:30 skip x missed 0: another run waited already", "01 00:35 run x", "01 00:44 end x: context canceled"},
		Replace: {"01 00:10 run x", "01 00:20 end x: replaced by a newer run", "01 00:20 run x", "01 00:30 end x: replaced by a newer run", "01 00:30 run x", "01 00:40 end x: replaced by a newer run", "01 00:40 run x", "01 00:44 end x: context canceled"},
	} {
		t.Run(string(policy), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				table := &shared{jobs: map[string]Job{"x": {ID: "x", Spec: mustParse(t, "*/10 * * * *", ""), Overlap: policy, Decided: time.Now()}}}
				d := &diary{zone: time.UTC, takes: 25 * time.Minute}
				ctx, cancel := context.WithCancel(t.Context())
				var wg sync.WaitGroup
				wg.Go(func() { _ = New(table, d, nil).Run(ctx) })
				until("2000-01-01T00:44:00Z")
				cancel()
				wg.Wait()
				d.check(t, want...)
			})
		})
	}
}

func TestTriggerAndCancel(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		j := Job{ID: "x", Spec: mustParse(t, "@daily", ""), Decided: time.Now()}
		table := &shared{jobs: map[string]Job{"x": j}}
		d := &diary{zone: time.UTC, takes: time.Hour}
		r := New(table, d, nil)
		if r.Trigger(j) {
			t.Error("Trigger works before Run")
		}
		ctx, cancel := context.WithCancel(t.Context())
		var wg sync.WaitGroup
		wg.Go(func() { _ = r.Run(ctx) })
		synctest.Wait()
		if !r.Trigger(j) {
			t.Error("Trigger does not work")
		}
		synctest.Wait()
		r.Cancel("x")
		synctest.Wait()
		d.check(t, "01 00:00 run x", "01 00:00 end x: context canceled")
		cancel()
		wg.Wait()
		if r.Trigger(j) {
			t.Error("Trigger works after Run")
		}
	})
}

// A store that is away for a while delays runs and loses none.
func TestStoreAway(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		table := &shared{jobs: map[string]Job{"x": {ID: "x", Spec: mustParse(t, "0 * * * *", ""), Decided: time.Now()}}}
		d := &diary{zone: time.UTC}
		ctx, cancel := context.WithCancel(t.Context())
		var wg sync.WaitGroup
		wg.Go(func() { _ = New(table, d, nil).Run(ctx) })
		until("2000-01-01T00:30:00Z")
		table.mu.Lock()
		table.down = true
		table.mu.Unlock()
		until("2000-01-01T01:05:30Z")
		table.mu.Lock()
		table.down = false
		table.mu.Unlock()
		until("2000-01-01T01:07:00Z")
		d.check(t, "01 01:06 run x late")
		cancel()
		wg.Wait()
	})
}
