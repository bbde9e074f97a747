package cron

import (
	"strings"
	"testing"
	"time"

	"github.com/m3o/m3o"
)

func mustParse(t *testing.T, line, zone string) Spec {
	t.Helper()
	s, err := Parse(line, zone)
	if err != nil {
		t.Fatalf("Parse(%q, %q): %v", line, zone, err)
	}
	return s
}

// firings are all times from and to, as the wall clock with its offset shows them.
func firings(s Spec, from, to string) []string {
	at, _ := time.Parse(time.RFC3339, from)
	end, _ := time.Parse(time.RFC3339, to)
	var out []string
	for {
		at = s.Next(at)
		if at.IsZero() || at.After(end) || len(out) > 50 {
			return out
		}
		out = append(out, at.In(s.loc).Format("02 15:04 -07"))
	}
}

// Clocks in Berlin went from 02:00 to 03:00 on 29 March 2026 and go from 03:00
// back to 02:00 on 25 October 2026.
func TestNextOverClockChanges(t *testing.T) {
	const spring, springEnd = "2026-03-28T12:00:00Z", "2026-03-30T12:00:00Z"
	const autumn, autumnEnd = "2026-10-24T12:00:00Z", "2026-10-26T12:00:00Z"
	for _, c := range []struct {
		line, zone, from, to string
		want                 string
	}{
		{"30 2 * * *", "Europe/Berlin", spring, springEnd, "29 03:00 +02, 30 02:30 +02"},
		{"0,20,40 2 * * *", "Europe/Berlin", spring, springEnd, "29 03:00 +02, 30 02:00 +02, 30 02:20 +02, 30 02:40 +02"},
		{"0 3 * * *", "Europe/Berlin", spring, springEnd, "29 03:00 +02, 30 03:00 +02"},
		{"59 1 * * *", "Europe/Berlin", spring, springEnd, "29 01:59 +01, 30 01:59 +02"},
		{"30 2 29 3 *", "Europe/Berlin", spring, springEnd, "29 03:00 +02"},
		{"0 1-4 29 * *", "Europe/Berlin", spring, springEnd, "29 01:00 +01, 29 03:00 +02, 29 04:00 +02"},
		{"0 * * * *", "Europe/Berlin", "2026-03-29T00:00:00Z", "2026-03-29T02:30:00Z", "29 03:00 +02, 29 04:00 +02"},
		{"30 * * * *", "Europe/Berlin", "2026-03-29T00:00:00Z", "2026-03-29T02:40:00Z", "29 01:30 +01, 29 03:30 +02, 29 04:30 +02"},
		{"@daily", "Europe/Berlin", spring, springEnd, "29 00:00 +01, 30 00:00 +02"},

		{"30 2 * * *", "Europe/Berlin", autumn, autumnEnd, "25 02:30 +02, 26 02:30 +01"},
		{"0 2 * * *", "Europe/Berlin", autumn, autumnEnd, "25 02:00 +02, 26 02:00 +01"},
		{"0 3 * * *", "Europe/Berlin", autumn, autumnEnd, "25 03:00 +01, 26 03:00 +01"},
		{"*/30 2 25 * *", "Europe/Berlin", autumn, autumnEnd, "25 02:00 +02, 25 02:30 +02"},
		{"0 * * * *", "Europe/Berlin", "2026-10-24T23:30:00Z", "2026-10-25T02:30:00Z", "25 02:00 +02, 25 02:00 +01, 25 03:00 +01"},
		// Asked in the middle of the repeated hour: it has fired.
		{"30 2 * * *", "Europe/Berlin", "2026-10-25T01:10:00Z", autumnEnd, "26 02:30 +01"},

		// Midnight is skipped in Santiago (5 to 6 September 2026), half an hour on Lord Howe, a whole day in Apia.
		{"0 0 * * *", "America/Santiago", "2026-09-05T12:00:00Z", "2026-09-07T12:00:00Z", "06 01:00 -03, 07 00:00 -03"},
		{"15 2 * * *", "Australia/Lord_Howe", "2026-10-03T00:00:00Z", "2026-10-04T12:00:00Z", "04 02:30 +11"},
		{"0 12 * * *", "Pacific/Apia", "2011-12-29T12:00:00Z", "2012-01-01T00:00:00Z", "29 12:00 -10, 31 00:00 +14, 31 12:00 +14, 01 12:00 +14"},
		{"0 4 * * *", "", "2026-03-28T12:00:00Z", "2026-03-29T12:00:00Z", "29 04:00 +00"},
		{"@every 90m", "Europe/Berlin", "2026-03-29T00:00:00Z", "2026-03-29T03:00:00Z", "29 03:30 +02, 29 05:00 +02"},
		{"0 0 29 2 *", "UTC", "2025-01-01T00:00:00Z", "2029-01-01T00:00:00Z", "29 00:00 +00"},
	} {
		if got := strings.Join(firings(mustParse(t, c.line, c.zone), c.from, c.to), ", "); got != c.want {
			t.Errorf("%q in %s from %s:\n got %s\nwant %s", c.line, c.zone, c.from, got, c.want)
		}
	}
}

func TestParseRefuses(t *testing.T) {
	for _, c := range []struct{ line, zone, want string }{
		{"", "", "empty"},
		{"   ", "", "empty"},
		{"0 0 30 2 *", "", "never fires"},
		{"0 0 31 4,6 *", "", "never fires"},
		{"* * * * * *", "", "seconds"},
		{"* * * *", "", "4 fields"},
		{"61 * * * *", "", "does not parse"},
		{"x * * * *", "", "does not parse"},
		{"*/0 * * * *", "", "does not parse"},
		{"@every 1s", "", "once a minute"},
		{"@every -5m", "", "once a minute"},
		{"@every", "", "does not parse"},
		{"@reboot", "", "no time"},
		{"@sometimes", "", "does not parse"},
		{"TZ=Europe/Berlin 0 4 * * *", "", "time zone in it"},
		{"CRON_TZ=0", "", "time zone in it"},
		{"0 4 * * *", "Europe/Atlantis", "no time zone"},
		{"0 4 * * *", "Local", "no time zone"},
		{"0 4 * * *", "../../etc/passwd", "no time zone"},
		{strings.Repeat("1,", 200) + "1 * * * *", "", "longer"},
	} {
		_, err := Parse(c.line, c.zone)
		if m3o.KindOf(err) != m3o.Invalid || !strings.Contains(err.Error(), c.want) || m3o.HintOf(err) == "" {
			t.Errorf("Parse(%q, %q) = %v (hint %q), want an Invalid error with %q and a hint", c.line, c.zone, err, m3o.HintOf(err), c.want)
		}
	}
}

func TestShortest(t *testing.T) {
	for line, want := range map[string]time.Duration{
		"* * * * *":       time.Minute,
		"*/5 * * * *":     5 * time.Minute,
		"0,1 4 * * *":     time.Minute,
		"59 23 * * *":     24 * time.Hour,
		"0 4 * * *":       24 * time.Hour,
		"@hourly":         time.Hour,
		"@every 25m":      25 * time.Minute,
		"58,2 */1 1 1 *":  4 * time.Minute,
		"0 0 29 2 *":      1461 * 24 * time.Hour,
		"0 0 1 1 *":       365 * 24 * time.Hour,
		"0 0 * * mon,tue": 24 * time.Hour,
	} {
		if got := mustParse(t, line, "Europe/Berlin").Shortest(); got != want {
			t.Errorf("Shortest of %q = %s, want %s", line, got, want)
		}
	}
}

func TestJitterIsSpreadAndStays(t *testing.T) {
	seen := map[time.Duration]bool{}
	for _, id := range []string{"a", "b", "c", "d", "e", "f", "g", "h"} {
		j := Jitter(id, 10*time.Minute)
		if j < 0 || j >= 10*time.Minute || j != Jitter(id, 10*time.Minute) {
			t.Errorf("Jitter(%q) = %s", id, j)
		}
		seen[j] = true
	}
	if len(seen) < 6 {
		t.Errorf("8 ids have only %d different jitters", len(seen))
	}
	if got := Jitter("a", 0); got != 0 {
		t.Errorf("Jitter of none = %s", got)
	}
}

func TestPlanAfterAnOutage(t *testing.T) {
	at := func(s string) time.Time { v, _ := time.Parse(time.RFC3339, "2026-06-01T"+s+"Z"); return v }
	hourly := Job{ID: "x", Spec: mustParse(t, "0 * * * *", "UTC"), Decided: at("10:00:00")}
	for _, c := range []struct {
		name string
		job  func(*Job)
		now  string
		want Due
		next string
	}{
		{"nothing yet", nil, "10:59:59", Due{}, "11:00:00"},
		{"on time", nil, "11:00:00", Due{Run: at("11:00:00"), Upto: at("11:00:00")}, "12:00:00"},
		{"a little late", nil, "11:00:40", Due{Run: at("11:00:00"), Upto: at("11:00:00")}, "12:00:00"},
		{"three hours away, once", nil, "13:30:00", Due{Run: at("13:00:00"), Late: true, Missed: 2, Upto: at("13:00:00")}, "14:00:00"},
		{"three hours away, skip", func(j *Job) { j.Missed = Never }, "13:30:00", Due{Missed: 3, Upto: at("13:00:00")}, "14:00:00"},
		{"back just in time, skip", func(j *Job) { j.Missed = Never }, "13:00:10", Due{Run: at("13:00:00"), Missed: 2, Upto: at("13:00:00")}, "14:00:00"},
		{"paused", func(j *Job) { j.Paused = true }, "13:30:00", Due{}, ""},
	} {
		j := hourly
		if c.job != nil {
			c.job(&j)
		}
		due, next := Plan(j, at(c.now))
		if due.Run.Equal(c.want.Run) && due.Upto.Equal(c.want.Upto) {
			due.Run, due.Upto = c.want.Run, c.want.Upto // the zone differs
		}
		if due != c.want {
			t.Errorf("%s: due = %+v, want %+v", c.name, due, c.want)
		}
		if c.next == "" && !next.IsZero() || c.next != "" && !next.Equal(at(c.next)) {
			t.Errorf("%s: next = %v, want %s", c.name, next, c.next)
		}
	}
	// A year away costs a week's look.
	j := hourly
	j.Decided = j.Decided.AddDate(-1, 0, 0)
	if due, _ := Plan(j, at("13:30:00")); due.Missed != 7*24-1 {
		t.Errorf("after a year %d are missed, want a week's, %d", due.Missed, 7*24-1)
	}
}

func FuzzParse(f *testing.F) {
	for _, s := range []string{"0 4 * * *", "@every 90m", "*/5 1-3,5 * jan-mar mon", "TZ= 1", "0 0 29 2 *", "@daily"} {
		f.Add(s, "Europe/Berlin")
	}
	from := time.Date(2026, 3, 28, 0, 0, 0, 0, time.UTC)
	f.Fuzz(func(t *testing.T, line, zone string) {
		s, err := Parse(line, zone)
		if err != nil {
			if m3o.KindOf(err) != m3o.Invalid {
				t.Fatalf("Parse(%q, %q): %v", line, zone, err)
			}
			return
		}
		at := from
		for range 20 {
			next := s.Next(at)
			if next.IsZero() {
				break
			}
			if next.Sub(at) <= 0 {
				t.Fatalf("%q in %q: after %v comes %v", line, zone, at, next)
			}
			at = next
		}
	})
}
