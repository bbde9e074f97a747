package daemon

import (
	"context"
	"fmt"
	"strings"
	"time"

	"github.com/m3o/m3o"
)

// A release is on trial after it went live: when it crashes so often in that
// time, it is rolled back if its m3o.yaml says so.
const (
	trialTime    = 5 * time.Minute
	trialCrashes = 3
)

// guardTrial watches a release that has just gone live. One that is itself a
// rollback is not watched: two bad releases would replace each other for ever.
func (d *Daemon) guardTrial(rel m3o.Release, previous int) {
	left := trialTime - time.Since(rel.Created)
	if !rel.AutoRevert || previous == 0 || left <= 0 || isRollback(rel) {
		return
	}
	d.background(func(ctx context.Context) {
		ctx, cancel := context.WithTimeout(ctx, left)
		defer cancel()
		crash, ok := d.awaitCrashes(ctx, rel)
		if !ok {
			return
		}
		why := crashWords(crash)
		reason := fmt.Sprintf("automatic rollback to v%d: %s of %s %s %d times", previous, crash.Process, rel.Name(), why, trialCrashes)
		d.warn(rel.App, "%s; rollback: auto is set", reason)
		d.log.Warn("rolling back", "app", rel.App, "release", rel.Version, "reason", reason)
		if _, _, err := d.rollbackFrom(context.WithoutCancel(ctx), rel.App, "m3o", rel.Version, previous, reason); err != nil {
			d.warn(rel.App, "the automatic rollback to v%d failed: %s", previous, firstLine(userMessage(err)))
			d.log.Error("automatic rollback", "app", rel.App, "release", rel.Version, "err", err)
		}
	})
}

func isRollback(rel m3o.Release) bool {
	return strings.HasPrefix(rel.Reason, "rollback ") || strings.HasPrefix(rel.Reason, "automatic rollback ")
}

// awaitCrashes waits until instances of rel have exited by themselves
// trialCrashes times, and returns the last of them; false when ctx ended first.
// It goes by what an instance counts itself: news of a crash can be missed.
func (d *Daemon) awaitCrashes(ctx context.Context, rel m3o.Release) (m3o.Instance, bool) {
	before := map[string]int{}  // crashes of an instance when it was first listed
	crashes := map[string]int{} // since then
	for first := true; ctx.Err() == nil; first = false {
		going, listed := map[string]bool{}, false
		for in, err := range d.driver.Events(ctx) {
			if err != nil {
				break
			}
			switch {
			case in.ID == "":
				listed = true
				continue
			case in.Phase == m3o.Draining:
				going[in.ID] = true
			}
			if in.App != rel.App || in.Release != rel.Version || going[in.ID] {
				continue
			}
			n := in.Restarts
			if in.Phase == m3o.Exited {
				n++
			}
			if first && !listed {
				before[in.ID] = n
			}
			crashes[in.ID] = max(crashes[in.ID], n-before[in.ID])
			all := 0
			for _, n := range crashes {
				all += n
			}
			if all < trialCrashes {
				continue
			}
			if rep, err := d.driver.Explain(in.ID); err == nil && in.Phase != m3o.Exited { // it runs again
				in.Exit, in.OOM = rep.Last.Code, rep.Last.OOM
			}
			return in, true
		}
		pause(ctx, 100*time.Millisecond)
	}
	return m3o.Instance{}, false
}

// crashWords say how an instance ended.
func crashWords(in m3o.Instance) string {
	switch {
	case in.OOM:
		return "ran out of memory"
	case in.Exit == -1:
		return "could not be started"
	case in.Exit > 128 && in.Exit < 128+65:
		return fmt.Sprintf("was ended by signal %d", in.Exit-128)
	}
	return fmt.Sprintf("exited with code %d", in.Exit)
}
