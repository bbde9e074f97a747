package cron

import "time"

// Overlap says what happens when a run is due while the one before it goes on.
type Overlap string

// The overlap policies; "" is Skip.
const (
	Skip    Overlap = "skip"    // the new run is left out
	Queue   Overlap = "queue"   // it starts when the running one ends; one waits at most
	Replace Overlap = "replace" // the running one is stopped first
)

// Missed says what happens after a downtime that a schedule fell into.
type Missed string

// The policies for missed runs; "" is Once.
const (
	Once  Missed = "once" // one run makes up for all that were missed
	Never Missed = "skip" // they are left out
)

const (
	// grace is how late a run may begin without counting as missed.
	grace = time.Minute
	// lookBack bounds how far back missed runs are counted.
	lookBack = 7 * 24 * time.Hour
)

// A Job is one schedule as the table keeps it.
type Job struct {
	ID      string // unique; its jitter follows from it
	Spec    Spec
	Jitter  time.Duration // see Jitter
	Overlap Overlap
	Missed  Missed
	Paused  bool
	Decided time.Time // firings up to here have been dealt with; begins as the time it was made
}

// A Due is what has become of a job's firings up to now.
type Due struct {
	Run    time.Time // the firing to run now, zero for none
	Late   bool      // it makes up for a downtime
	Missed int       // firings that are left out, the run not counted
	Upto   time.Time // what to write into Decided; zero when nothing fired
}

// Plan decides about the firings of j after Decided and up to now, and says
// when the next one starts, jitter included. It is pure: the same Job and time
// give the same answer.
func Plan(j Job, now time.Time) (due Due, next time.Time) {
	jitter := Jitter(j.ID, j.Jitter)
	from := j.Decided
	if old := now.Add(-lookBack); from.Before(old) {
		from = old
	}
	if j.Paused {
		// Time passes for a paused schedule too: what fell into the pause is not
		// missed. Its Decided is set when it is resumed.
		return Due{}, time.Time{}
	}
	fired := 0
	var last time.Time
	t := j.Spec.Next(from)
	for ; !t.IsZero() && !t.Add(jitter).After(now); t = j.Spec.Next(t) {
		fired++
		last = t
	}
	if !t.IsZero() {
		next = t.Add(jitter)
	}
	if fired == 0 {
		return Due{}, next
	}
	due.Upto = last
	late := now.Sub(last.Add(jitter)) > grace
	if late && j.Missed == Never {
		due.Missed = fired
		return due, next
	}
	due.Run, due.Late, due.Missed = last, late, fired-1
	return due, next
}
