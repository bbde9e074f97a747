package cron

import (
	"context"
	"errors"
	"log/slog"
	"sync"
	"time"
)

// A Table keeps the schedules. It must be safe for concurrent use.
type Table interface {
	// Jobs is all schedules.
	Jobs(ctx context.Context) ([]Job, error)

	// Claim writes that j's firings up to due.Upto have been dealt with. false
	// means that j was changed or removed since Jobs gave it, or that another
	// daemon claimed them: then nothing is run, and the job is looked at again.
	// The claim comes before the run, so that a firing runs at most once
	// whatever crashes.
	Claim(ctx context.Context, j Job, due Due) (bool, error)
}

// A Run is one execution of a job.
type Run struct {
	Job    string
	At     time.Time // the firing, or when it was asked for
	Late   bool      // it makes up for a downtime
	Missed int       // firings that are left out since the run before
	Manual bool
}

// Work does the runs. It must be safe for concurrent use.
type Work interface {
	// Do runs r to its end. ctx ends with cause ErrReplaced when a newer run
	// takes its place, and otherwise with the Runner.
	Do(ctx context.Context, r Run)

	// Skip is told of a run that is left out, and why.
	Skip(ctx context.Context, r Run, why string)
}

// ErrReplaced ends the context of a run that a newer one replaces.
var ErrReplaced = errors.New("replaced by a newer run")

// Why a run is left out.
const (
	WhyMissed  = "missed while m3o was down"
	WhyOverlap = "the run before it had not ended"
	WhyQueued  = "another run waited already"
)

// look is the longest the Runner sleeps: clocks are set, laptops sleep, and a
// timer knows neither.
const look = time.Minute

// A Runner starts the jobs of a table when they are due. Make it with New.
type Runner struct {
	table Table
	work  Work
	log   *slog.Logger
	wake  chan struct{} // holds one token when the table may have changed

	mu   sync.Mutex // guards jobs and ctx
	jobs map[string]*lane
	ctx  context.Context //nolint:containedctx // of Run, for runs that Trigger starts; nil before and after
	wg   sync.WaitGroup
}

// A lane holds the runs of one job.
type lane struct {
	cancel  context.CancelCauseFunc // of the one that goes on
	done    chan struct{}           // closed when it has ended
	waiting bool                    // another waits for that
}

// New makes a Runner; nothing is run before Run is called.
func New(table Table, work Work, log *slog.Logger) *Runner {
	if log == nil {
		log = slog.New(slog.DiscardHandler)
	}
	return &Runner{table: table, work: work, log: log, wake: make(chan struct{}, 1), jobs: map[string]*lane{}}
}

// Wake makes the Runner read the table now.
func (r *Runner) Wake() {
	select {
	case r.wake <- struct{}{}:
	default:
	}
}

// Run starts what is due until ctx ends, and returns when all runs have ended.
func (r *Runner) Run(ctx context.Context) error {
	r.mu.Lock()
	r.ctx = ctx
	r.mu.Unlock()
	defer func() {
		r.mu.Lock()
		r.ctx = nil
		r.mu.Unlock()
		r.wg.Wait()
	}()
	timer := time.NewTimer(0)
	defer timer.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-timer.C:
		case <-r.wake:
		}
		timer.Reset(r.tick(ctx))
	}
}

// tick starts what is due now and says when to look again.
func (r *Runner) tick(ctx context.Context) time.Duration {
	jobs, err := r.table.Jobs(ctx)
	if err != nil {
		if ctx.Err() == nil {
			r.log.Error("read schedules", "err", err)
		}
		return look
	}
	now := time.Now().UTC()
	pause := look
	for _, j := range jobs {
		due, next := Plan(j, now)
		if !due.Upto.IsZero() {
			ok, err := r.table.Claim(ctx, j, due)
			switch {
			case err != nil:
				r.log.Error("claim a run", "schedule", j.ID, "err", err)
				continue // tried again at the next look
			case !ok:
				pause = 0
				continue
			}
			run := Run{Job: j.ID, At: due.Run, Late: due.Late, Missed: due.Missed}
			if due.Run.IsZero() {
				run.At = due.Upto
				r.work.Skip(ctx, run, WhyMissed)
			} else {
				r.begin(ctx, j, run)
			}
		}
		if !next.IsZero() {
			pause = min(pause, max(next.Sub(now), 0))
		}
	}
	return pause
}

// Trigger runs a job now, whatever its times, under its overlap policy. false
// when the Runner does not run.
func (r *Runner) Trigger(j Job) bool {
	r.mu.Lock()
	ctx := r.ctx
	if ctx != nil {
		r.wg.Add(1) // Run waits for us too: what begin starts must not come after it has ended
	}
	r.mu.Unlock()
	if ctx == nil {
		return false
	}
	defer r.wg.Done()
	r.begin(ctx, j, Run{Job: j.ID, At: time.Now().UTC(), Manual: true})
	return true
}

// Cancel stops the run of a job that goes on, if one does, as when the job is removed.
func (r *Runner) Cancel(id string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if l := r.jobs[id]; l != nil {
		l.cancel(context.Canceled)
	}
}

// begin starts a run, or deals with it as the job's overlap policy says. It
// does not wait for a run.
func (r *Runner) begin(ctx context.Context, j Job, run Run) {
	r.mu.Lock()
	l := r.jobs[j.ID]
	why := ""
	switch {
	case l == nil:
		r.start(ctx, run)
	case j.Overlap == Queue || j.Overlap == Replace:
		if l.waiting {
			why = WhyQueued
			break
		}
		l.waiting = true
		if j.Overlap == Replace {
			l.cancel(ErrReplaced)
		}
		r.wg.Go(func() {
			select {
			case <-l.done:
			case <-ctx.Done():
				return
			}
			r.mu.Lock()
			defer r.mu.Unlock()
			r.start(ctx, run)
		})
	default:
		why = WhyOverlap
	}
	r.mu.Unlock()
	if why != "" {
		r.work.Skip(ctx, run, why)
	}
}

// start runs it. The caller holds mu, and the job has no run that goes on.
func (r *Runner) start(ctx context.Context, run Run) {
	ctx, cancel := context.WithCancelCause(ctx)
	l := &lane{cancel: cancel, done: make(chan struct{})}
	r.jobs[run.Job] = l
	r.wg.Go(func() {
		defer func() {
			cancel(nil)
			r.mu.Lock()
			// One that waits takes the lane over as it is: nobody slips in between.
			if !l.waiting {
				delete(r.jobs, run.Job)
			}
			r.mu.Unlock()
			close(l.done)
		}()
		r.work.Do(ctx, run)
	})
}
