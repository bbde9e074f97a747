//go:build linux

package main

import (
	"cmp"
	"context"
	"fmt"
	"os/exec"
	"slices"
	"strconv"
	"strings"
)

// benchmarks runs Go benchmarks of the container driver, in the repository's
// own tests and with its binaries, and returns their metrics.
func (b *bench) benchmarks(ctx context.Context, which, times string) (metrics, error) {
	cmd := exec.CommandContext(ctx, "go", "test", "./runtime/oci", "-run", "^$", "-bench", which, "-benchtime", times, "-count", "1", "-timeout", "10m")
	cmd.Dir = b.root
	out, err := cmd.CombinedOutput()
	if err != nil {
		return nil, fmt.Errorf("go test -bench %s: %w: %s", which, err, out)
	}
	m := parseMetrics(string(out))
	if len(m) == 0 {
		return nil, fmt.Errorf("go test -bench %s measured nothing: %s", which, out)
	}
	return m, nil
}

// metrics are the figures of benchmarks, by name and unit: "Flood lines/s".
type metrics map[string]float64

// parseMetrics reads what go test -bench prints: the name with the number of
// CPUs, how often it ran, then pairs of a figure and its unit.
func parseMetrics(out string) metrics {
	m := metrics{}
	for l := range strings.Lines(out) {
		f := strings.Fields(l)
		name, ok := strings.CutPrefix(cmp.Or(append(f, "")...), "Benchmark")
		if !ok || len(f) < 4 {
			continue
		}
		if i := strings.LastIndexByte(name, '-'); i > 0 {
			name = name[:i]
		}
		for i := 2; i+1 < len(f); i += 2 {
			if v, err := strconv.ParseFloat(f[i], 64); err == nil {
				m[name+" "+f[i+1]] = v
			}
		}
	}
	return m
}

func (m metrics) ms(key string) string { return fmt.Sprintf("%.0f ms", m[key]) }

// oneInstance measures single instances, their log, and two hundred at once.
func (b *bench) oneInstance(ctx context.Context, sec *section) error {
	one, err := b.benchmarks(ctx, "^BenchmarkInstance$", "50x")
	if err != nil {
		return err
	}
	b.say("an instance answers after %s", one.ms("Instance first-p50-ms"))
	flood, err := b.benchmarks(ctx, "^BenchmarkFlood$", "3x")
	if err != nil {
		return err
	}
	many, err := b.benchmarks(ctx, "^BenchmarkSoak$", "1x")
	if err != nil {
		return err
	}
	sec.add(row{What: "start → first answer, one instance, median and p99 of 50", Measured: one.ms("Instance first-p50-ms") + ", " + one.ms("Instance first-p99-ms"),
		Reference: "containerd 81–102 ms, bare runc and shim 68–81 ms, medians"})
	sec.add(row{What: "start → ready (two good answers)", Measured: one.ms("Instance ready-p50-ms") + ", " + one.ms("Instance ready-p99-ms")})
	sec.add(row{What: "stop: SIGTERM → all of it gone", Measured: one.ms("Instance stop-p50-ms") + ", " + one.ms("Instance stop-p99-ms"),
		Reference: "containerd 43–54 ms, bare runc and shim 24–26 ms, medians"})
	sec.add(row{What: "lines a second from an app into its log", Budget: "≥ 100,000, none lost", Measured: fmt.Sprintf("%.0f", flood["Flood lines/s"]),
		Reference: "bare shim some 430,000", Met: verdict(flood["Flood lines/s"] >= 100_000)})
	sec.add(row{What: "200 instances of 10 apps: started and ready, stopped and gone", Budget: "nothing left",
		Measured:  fmt.Sprintf("%.1f s, %.1f s", many["Soak start200-ms"]/1000, many["Soak stop200-ms"]/1000),
		Reference: "bare shim, 40: 2.0 s, 0.75 s", Met: verdict(true)}) // the benchmark fails when something is left
	sec.note("By the benchmarks of runtime/oci, without git, router and daemon. The references were measured when the design was made, on another" +
		" day: containerd 1.6 and 2.4, and a prototype of the shim, on two busy cores; Docker is containerd with a daemon more.")
	return nil
}

// hogs are the things that an instance can take too much of.
var hogs = []struct{ kind, what string }{
	{"cpu", "eight threads that compute"}, {"memory", "memory until it is killed, again and again"}, {"fds", "files opened until there are no more"},
	{"tmp", "/tmp filled"}, {"fork", "processes made until it may not"}, {"log", "lines printed without end"},
}

// neighbours measures what an app feels of another one that takes all it gets.
func (b *bench) neighbours(ctx context.Context, sec *section) error {
	ratios, before, beside := map[string][]float64{}, map[string][]float64{}, map[string][]float64{}
	for range min(b.rounds, 3) {
		m, err := b.benchmarks(ctx, "^BenchmarkNeighbour$", "2000x")
		if err != nil {
			return err
		}
		for _, h := range hogs {
			p, q := m["Neighbour/"+h.kind+"/before p99-µs"], m["Neighbour/"+h.kind+"/beside p99-µs"]
			if p <= 0 || q <= 0 {
				return fmt.Errorf("nothing was measured of %s", h.kind)
			}
			before[h.kind], beside[h.kind], ratios[h.kind] = append(before[h.kind], p), append(beside[h.kind], q), append(ratios[h.kind], q/p)
			b.say("neighbours: %s: p99 %.1f ms, before %.1f ms", h.kind, q/1000, p/1000)
		}
	}
	for _, h := range hogs {
		sec.add(row{What: "p99 beside an app that takes " + h.kind, Budget: "≤ 2×", Measured: fmt.Sprintf("%.1f ms", middle(beside[h.kind])/1000),
			Reference: fmt.Sprintf("right before %.1f ms", middle(before[h.kind])/1000), Ratio: fmt.Sprintf("%.2f×", middle(ratios[h.kind])), Met: verdict(middle(ratios[h.kind]) <= 2)})
	}
	sec.note("An app is asked 200 times a second while another one on the machine takes all it can: " + hogList() + ". Its p99 is held against that of the ten seconds before. Medians of the rounds.")
	return nil
}

func hogList() string {
	var all []string
	for _, h := range hogs {
		all = append(all, h.kind+" is "+h.what)
	}
	return strings.Join(all, ", ")
}

// middle is the median of some figures.
func middle(all []float64) float64 {
	s := slices.Sorted(slices.Values(all))
	return s[len(s)/2]
}
