// Package cron turns schedules into runs: it reads cron lines in a time zone,
// says when they fire, what was missed while nobody looked, and starts what is
// due, once for all daemons that share the schedules.
//
// It must not know what a run does, nor where schedules are kept: the caller
// gives it a Table and is called for each run.
package cron

import (
	"fmt"
	"hash/fnv"
	"strings"
	"time"

	robfig "github.com/robfig/cron/v3"

	"github.com/m3o/m3o"
)

// A Spec says when a schedule fires: a cron line in a time zone. Make it with
// Parse. It does not change.
type Spec struct {
	Line string // as written
	Zone string // IANA name, "UTC" when none was given

	sched  robfig.Schedule
	loc    *time.Location
	hourly bool          // the hour is "*": it follows elapsed time, not the clock on the wall
	every  time.Duration // of @every, which knows no clock; else 0
}

var parser = robfig.NewParser(robfig.Minute | robfig.Hour | robfig.Dom | robfig.Month | robfig.Dow | robfig.Descriptor)

const (
	maxLine = 200
	// samples is how many firings are looked at to find the shortest pause: a
	// day's worth of the densest line there is.
	samples = 1500
)

const lineHelp = "five fields: minute hour day month weekday, such as \"0 4 * * *\" or \"*/15 9-17 * * mon-fri\"; or @hourly, @daily, @weekly, @monthly, @every 90m"

// Parse reads a cron line of five fields, or @hourly, @daily, @midnight,
// @weekly, @monthly, @yearly, @annually or @every with a duration. zone is an
// IANA name, UTC when empty. A line that never fires is refused.
func Parse(line, zone string) (Spec, error) {
	s := Spec{Line: strings.Join(strings.Fields(line), " "), Zone: zone}
	bad := func(hint, format string, args ...any) (Spec, error) {
		return Spec{}, &m3o.Error{Kind: m3o.Invalid, Msg: fmt.Sprintf(format, args...), Hint: hint}
	}
	if len(line) > maxLine {
		return bad(lineHelp, "the cron line is longer than %d characters", maxLine)
	}
	if s.Zone == "" {
		s.Zone = "UTC"
	}
	var err error
	// "Local" would be the daemon's own zone, which is not the user's.
	if s.loc, err = time.LoadLocation(s.Zone); err != nil || s.Zone == "Local" {
		return bad("use a name of the IANA database, such as Europe/Berlin, America/New_York or UTC", "there is no time zone %q", zone)
	}
	fields := strings.Fields(line)
	switch {
	case len(fields) == 0:
		return bad(lineHelp, "the cron line is empty")
	case strings.Contains(line, "TZ="):
		return bad("--timezone names the zone", "the cron line %q has a time zone in it", line)
	case fields[0] == "@reboot":
		return bad("a process type of the Procfile runs with the app", "@reboot is no time")
	case fields[0][0] != '@' && len(fields) == 6:
		return bad("leave out the first field: a schedule fires at most once a minute", "the cron line %q has six fields; seconds are not taken", line)
	case fields[0][0] != '@' && len(fields) != 5:
		return bad(lineHelp, "the cron line %q has %d fields, not five", line, len(fields))
	}
	sched, err := parse(s.Line)
	if err != nil {
		return bad(lineHelp, "the cron line %q does not parse: %s", line, strings.TrimPrefix(err.Error(), "failed to "))
	}
	s.sched = sched
	switch x := sched.(type) {
	case robfig.ConstantDelaySchedule:
		s.every = x.Delay
		if s.every < time.Minute {
			return bad("@every 1m is the shortest", "a schedule fires at most once a minute")
		}
	case *robfig.SpecSchedule:
		s.hourly = fields[0] == "@hourly" || fields[0][0] != '@' && fields[1] == "*"
	}
	// The year is any: robfig looks five years ahead, so a leap day is found.
	if s.Next(time.Date(2001, 1, 1, 0, 0, 0, 0, s.loc)).IsZero() {
		return bad("the month has no such day", "the cron line %q never fires", line)
	}
	return s, nil
}

// parse is the parser without its panics, of which v3.0.1 has one for a time
// zone without a line.
func parse(line string) (_ robfig.Schedule, err error) {
	defer func() {
		if p := recover(); p != nil {
			err = fmt.Errorf("it is none")
		}
	}()
	return parser.Parse(line)
}

// Location is the time zone.
func (s Spec) Location() *time.Location { return s.loc }

// Next is the first time after t that the schedule fires, zero when there is
// none within five years.
//
// Where clocks are put forward, what falls into the skipped hour fires once,
// when the clocks have moved; where they are put back, what falls into the
// repeated hour fires once, the first time. A line for every hour ("*" in the
// hour's place) goes by elapsed time instead: it fires in both of the repeated
// hours and has no skipped one.
func (s Spec) Next(t time.Time) time.Time {
	if s.every > 0 {
		return t.Add(s.every).Truncate(time.Second)
	}
	t = t.In(s.loc)
	start, end := t.ZoneBounds()
	off := offset(t)
	wall := asUTC(t, off)
	if !s.hourly && !start.IsZero() {
		// What the clock showed already before it was put back has fired.
		if shown := asUTC(start, offset(start.Add(-1))).Add(-1); shown.After(wall) {
			wall = shown
		}
	}
	// Each turn crosses one change of the clocks; a zone has a few a year.
	for range 100 {
		next := s.sched.Next(wall)
		if next.IsZero() {
			return time.Time{}
		}
		at := next.Add(-off).In(s.loc)
		if end.IsZero() || at.Before(end) {
			return at
		}
		ended := asUTC(end, off) // what the clock would have shown
		off = offset(end)
		begins := asUTC(end, off) // what it shows instead
		if !s.hourly && next.Before(begins) {
			return end.In(s.loc) // it fell into the gap
		}
		wall = begins.Add(-1)
		if !s.hourly && ended.After(begins) {
			wall = ended.Add(-1)
		}
		_, end = end.In(s.loc).ZoneBounds()
	}
	return time.Time{}
}

// offset is how far the zone of t is ahead of UTC at t.
func offset(t time.Time) time.Duration {
	_, sec := t.Zone()
	return time.Duration(sec) * time.Second
}

// asUTC is what a clock with that offset shows at t, as if it were UTC.
func asUTC(t time.Time, off time.Duration) time.Time { return t.UTC().Add(off) }

// Shortest is the shortest pause between two firings.
func (s Spec) Shortest() time.Duration {
	if s.every > 0 {
		return s.every
	}
	// A year of plain clock time: changes of the clocks make pauses that the line does not mean.
	plain := s
	plain.loc = time.UTC
	at := plain.Next(time.Date(2001, 1, 1, 0, 0, 0, 0, time.UTC))
	least := time.Duration(1<<63 - 1)
	for range samples {
		next := plain.Next(at)
		if next.IsZero() {
			break
		}
		if least = min(least, next.Sub(at)); least <= time.Minute {
			break
		}
		at = next
	}
	return least
}

// Jitter is how long after its time a schedule starts: less than most, and
// always the same for the same id, so that many schedules for one time are
// spread and each stays where it is.
func Jitter(id string, most time.Duration) time.Duration {
	if most <= 0 {
		return 0
	}
	h := fnv.New64a()
	_, _ = h.Write([]byte(id))
	return (time.Duration(h.Sum64()>>1) % most).Truncate(time.Second)
}
