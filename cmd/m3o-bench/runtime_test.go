//go:build linux

package main

import (
	"testing"

	"github.com/google/go-cmp/cmp"
)

func TestMetricsOfGoBenchmarks(t *testing.T) {
	got := parseMetrics("goos: linux\nBenchmarkFlood-2   \t 3\t 5 ns/op\t 431000 lines/s\nBenchmarkNeighbour/cpu/beside-2 \t600\t1 ns/op\t 12.5 p99-µs\nBenchmarkBroken-2\nok\n")
	want := metrics{"Flood ns/op": 5, "Flood lines/s": 431000, "Neighbour/cpu/beside ns/op": 1, "Neighbour/cpu/beside p99-µs": 12.5}
	if d := cmp.Diff(want, got); d != "" {
		t.Error(d)
	}
}

func FuzzMetrics(f *testing.F) {
	f.Add("BenchmarkFlood-2 3 5 ns/op 431000 lines/s")
	f.Fuzz(func(_ *testing.T, out string) { parseMetrics(out) })
}
