//go:build linux

package main

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"slices"
	"strings"
	"syscall"
	"time"
	"unicode/utf8"
)

// durations are the samples of one figure, in the order measured.
type durations []time.Duration

func (d *durations) add(t time.Duration) { *d = append(*d, t) }

// last is the newest sample; there has to be one.
func (d durations) last() time.Duration { return d[len(d)-1] }

// median is the middle sample, or the mean of the two in the middle; 0 of none.
func (d durations) median() time.Duration {
	if len(d) == 0 {
		return 0
	}
	s := slices.Sorted(slices.Values(d))
	return (s[(len(s)-1)/2] + s[len(s)/2]) / 2
}

// span is the range that the samples lie in, in seconds.
func (d durations) span() string {
	return fmt.Sprintf("%.3f–%.3f", slices.Min(d).Seconds(), slices.Max(d).Seconds())
}

// text is the median and the range it comes from.
func (d durations) text() string {
	switch len(d) {
	case 0:
		return "–"
	case 1:
		return secs(d[0])
	}
	return secs(d.median()) + " (" + d.span() + ")"
}

// secs prints a duration in seconds to the millisecond, or ten of them when long.
func secs(d time.Duration) string {
	if d.Abs() >= 10*time.Second {
		return fmt.Sprintf("%.1f s", d.Seconds())
	}
	return fmt.Sprintf("%.3f s", d.Seconds())
}

// quotient is a ratio, as durations can hold it: one second is 1.
func quotient(a, b time.Duration) time.Duration {
	return time.Duration(float64(time.Second) * a.Seconds() / b.Seconds())
}

// times prints a quotient.
func times(q time.Duration) string { return fmt.Sprintf("%.2f×", q.Seconds()) }

// mb prints bytes as MB of 2^20, as the budgets count them.
func mb(n int64) string { return fmt.Sprintf("%.1f MB", float64(n)/(1<<20)) }

// verdict words whether a budget is met.
func verdict(met bool) string {
	if met {
		return "within"
	}
	return "**over**"
}

// usages are the CPU times of several pushes.
type usages struct{ daemon, router, build durations }

func (us *usages) add(u usage) {
	us.daemon.add(u.daemon)
	us.router.add(u.router)
	us.build.add(u.build)
}

// rows adds the medians to a breakdown.
func (us *usages) rows(t *table) {
	t.add("CPU of m3od and git", secs(us.daemon.median()), us.daemon.span())
	t.add("CPU of the router", secs(us.router.median()), us.router.span())
	t.add("CPU of buildkitd and the build", secs(us.build.median()), us.build.span())
}

// A row is one line of the summary.
type row struct {
	What, Budget, Measured, Reference, Ratio, Met string
}

// A table is a detail: the first line of cells is its head.
type table struct {
	title string
	head  []string
	cells [][]string
}

func (t *table) add(cells ...string) { t.cells = append(t.cells, cells) }

// A section is what one measurement found.
type section struct {
	title  string
	rows   []row
	tables []table
	notes  []string
}

func (s *section) add(r row)        { s.rows = append(s.rows, r) }
func (s *section) note(text string) { s.notes = append(s.notes, text) }

// A breakdown collects the spans of several pushes by name.
type breakdown struct {
	order []string
	took  map[string]*durations
}

func (b *breakdown) add(ss []span) {
	if b.took == nil {
		b.took = map[string]*durations{}
	}
	for _, s := range ss {
		d := b.took[s.what]
		if d == nil {
			d = &durations{}
			b.took[s.what] = d
			b.order = append(b.order, s.what)
		}
		d.add(s.took)
	}
}

// table shows each span's median; they follow each other, so they add up to
// the push, as nearly as medians do.
func (b *breakdown) table(title string) table {
	t := table{title: title, head: []string{"part", "median", "remark"}}
	for _, what := range b.order {
		d := *b.took[what]
		t.add(what, secs(d.median()), d.span())
	}
	return t
}

// A report is what a run found, and on which machine.
type report struct {
	machine  []string
	began    time.Time
	load     string // before
	loadEnd  string
	took     time.Duration
	rounds   int
	sections []*section
}

func newReport(ctx context.Context, rounds int) (*report, error) {
	r := &report{rounds: rounds, began: time.Now()}
	cpu, err := os.ReadFile("/proc/cpuinfo")
	if err != nil {
		return nil, err
	}
	mem, err := os.ReadFile("/proc/meminfo")
	if err != nil {
		return nil, err
	}
	model, cores := "unknown CPU", 0
	for l := range strings.Lines(string(cpu)) {
		k, v, _ := strings.Cut(l, ":")
		switch strings.TrimSpace(k) {
		case "model name":
			model = strings.TrimSpace(v)
		case "processor":
			cores++
		}
	}
	var total int64
	for l := range strings.Lines(string(mem)) {
		if _, err := fmt.Sscanf(l, "MemTotal: %d kB", &total); err == nil {
			break
		}
	}
	var u syscall.Utsname
	if err := syscall.Uname(&u); err != nil {
		return nil, fmt.Errorf("uname: %w", err)
	}
	r.machine = []string{fmt.Sprintf("%s, %d cores, %.0f GB", model, cores, float64(total)/(1<<20)), "Linux " + utsString(u.Release[:])}
	for _, args := range [][]string{{"go", "version"}, {"git", "--version"}, {"ssh", "-V"}} {
		out, err := exec.CommandContext(ctx, args[0], args[1:]...).CombinedOutput()
		if err != nil {
			return nil, fmt.Errorf("%s: %w", strings.Join(args, " "), err)
		}
		v, _, _ := strings.Cut(strings.TrimSpace(string(out)), "\n")
		r.machine = append(r.machine, v)
	}
	r.load, err = loadAverage()
	return r, err
}

func utsString[T int8 | uint8](field []T) string {
	var b strings.Builder
	for _, c := range field {
		if c == 0 {
			break
		}
		b.WriteByte(byte(c))
	}
	return b.String()
}

func loadAverage() (string, error) {
	b, err := os.ReadFile("/proc/loadavg")
	if err != nil {
		return "", err
	}
	f := strings.Fields(string(b))
	return strings.Join(f[:min(3, len(f))], " "), nil
}

// finish notes when the run ended.
func (r *report) finish() {
	r.took = time.Since(r.began)
	if l, err := loadAverage(); err == nil {
		r.loadEnd = l
	}
}

// String is the report in Markdown, its tables aligned for a terminal too.
func (r *report) String() string {
	var b strings.Builder
	b.WriteString("# Benchmarks\n\nWritten by `make bench` (cmd/m3o-bench); the figures are of one machine and one run. Do not edit.\n\n")
	fmt.Fprintf(&b, "%s. %s, %d rounds, %s. Load average before %s, after %s.\n\n", strings.Join(r.machine, "; "),
		r.began.UTC().Format("2006-01-02 15:04 UTC"), r.rounds, r.took.Round(time.Second), r.load, r.loadEnd)
	b.WriteString(`## How to read this

- A figure is the median of the rounds, with the smallest and the largest in brackets.
- Every reference is measured in the same run and in turns with m3o, each round another one first; a ratio is the median
  of the rounds' ratios. On a machine that does other things too, trust ratios and CPU, not the clock.
- "Over" is a finding, not a failed test: budgets are those of a quiet machine.

`)
	sum := table{head: []string{"what", "budget", "m3o", "reference", "ratio", ""}}
	for _, s := range r.sections {
		for _, w := range s.rows {
			sum.add(w.What, w.Budget, w.Measured, w.Reference, w.Ratio, w.Met)
		}
	}
	b.WriteString("## Budgets\n\n" + sum.String())
	for _, s := range r.sections {
		fmt.Fprintf(&b, "\n## %s\n", s.title)
		for _, n := range s.notes {
			b.WriteString("\n" + n + "\n")
		}
		for _, t := range s.tables {
			fmt.Fprintf(&b, "\n%s\n\n%s", t.title, t.String())
		}
	}
	return b.String()
}

// String is the table in Markdown with its columns padded to one width.
func (t table) String() string {
	width := make([]int, len(t.head))
	lines := append([][]string{t.head}, t.cells...)
	for _, l := range lines {
		for i, c := range l {
			width[i] = max(width[i], utf8.RuneCountInString(c), 3)
		}
	}
	var b strings.Builder
	for n, l := range lines {
		for i, w := range width {
			c := ""
			if i < len(l) {
				c = l[i]
			}
			fmt.Fprintf(&b, "| %s%s ", c, strings.Repeat(" ", w-utf8.RuneCountInString(c)))
		}
		b.WriteString("|\n")
		if n == 0 {
			for _, w := range width {
				b.WriteString("| " + strings.Repeat("-", w) + " ")
			}
			b.WriteString("|\n")
		}
	}
	return b.String()
}
