//go:build linux

package oci_test

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/m3o/m3o"
	"github.com/m3o/m3o/runtime"
)

// What an instance may take ends at its limits, and its neighbour answers all
// the while.
func TestHogsEndAtTheirLimits(t *testing.T) {
	r := newRig(t)
	d := up(t, r)
	neighbour := ready(t, d, r.workload("serve"), 1)[0]
	w := r.workload()
	w.App, w.Process = "greedy", "run"
	answers := func(after string) {
		t.Helper()
		if _, err := runtime.Probe(t.Context(), neighbour.Addr, m3o.Health{Kind: "http", Path: "/health"}); err != nil {
			t.Errorf("the neighbour after %s: %v", after, err)
		}
	}
	var fds int
	if _, err := fmt.Sscan(runOnce(t, d, w, "fds"), &fds); err != nil || fds < 100 || fds > 65536 {
		t.Errorf("it could open %d files, %v", fds, err)
	}
	answers("taking files")
	if got := runOnce(t, d, w, "fill"); !strings.Contains(got, "no space left on device") {
		t.Errorf("filling /tmp ended with %q", got)
	}
	answers("filling /tmp")
	// What is in /tmp counts as memory, so a small instance cannot have much of it.
	small := w
	small.MemoryBytes = 64 << 20
	var out, errOut bytes.Buffer
	code, err := d.Run(t.Context(), small, runtime.Cmd{Args: []string{"/server", "fill"}, Out: &out, Err: &errOut})
	if err != nil || code != 137 || !strings.Contains(out.String()+errOut.String(), "out of memory") {
		t.Errorf("filling /tmp with 64 MB of memory = %d, %v, %q %q", code, err, out.String(), errOut.String())
	}
	answers("running out of memory")
	w.Pids = 64
	if got := runOnce(t, d, w, "fork"); got != "true true\n" {
		t.Errorf("a fork bomb ended with %q", got)
	}
	answers("a fork bomb")
}

// An instance that floods its log, one that takes all the CPU and one that is
// killed for memory again and again: the neighbour answers every request and
// keeps its own log whole, the daemon starts, lists and stops as ever, and the
// log of the flood stays within its limit.
func TestHogsLeaveNeighbourAndDaemonAlone(t *testing.T) {
	r := newRig(t)
	d := up(t, r)
	neighbour := ready(t, d, r.workload("serve"), 1)[0]
	for _, kind := range []string{"log", "cpu", "memory"} {
		w := r.workload("hog", kind)
		w.App, w.MemoryBytes, w.CPUMillis, w.Health.Kind = kind+"hog", 64<<20, 1000, "tcp"
		if err := d.Start(t.Context(), w, 1); err != nil {
			t.Fatal(err)
		}
	}
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	for in, err := range d.Events(ctx) {
		if err != nil {
			t.Fatal(err)
		}
		if in.App == "memoryhog" && in.Phase == m3o.Exited {
			if !in.OOM {
				t.Errorf("the memory hog ended as %+v, want out of memory", in)
			}
			break
		}
	}
	const asked = 200
	for range asked {
		get(t, neighbour, "/print?n=1")
	}
	next := r.workload("serve")
	next.App = "newcomer"
	get(t, ready(t, d, next, 1)[0], "/")
	lines := 0
	for ln, err := range d.Logs(t.Context(), runtime.Ref{App: "hello"}, 10*asked, false) {
		if err != nil {
			t.Fatal(err)
		}
		if ln.Text == "line 0" {
			lines++
		}
	}
	if lines != asked {
		t.Errorf("%d lines of the neighbour are kept, want %d", lines, asked)
	}
	for _, app := range []string{"loghog", "cpuhog", "memoryhog", "newcomer"} {
		if err := d.Stop(t.Context(), runtime.Ref{App: app, Process: "web", Release: 1}); err != nil {
			t.Errorf("stop %s: %v", app, err)
		}
	}
	size := int64(0)
	logs, err := filepath.Glob(filepath.Join(r.cfg.Dir, "logs", "loghog*"))
	for _, l := range logs {
		if fi, err := os.Stat(l); err == nil {
			size += fi.Size()
		}
	}
	if err != nil || size == 0 || size > 32<<20 {
		t.Errorf("the flood left %d bytes of log, %v, want at most about 30 MB", size, err)
	}
	get(t, neighbour, "/")
}

// A log flood beyond the speed of any disk: every line arrives, in order.
func TestNoLineOfAFloodIsLost(t *testing.T) {
	const n = 400_000 // two rotations
	r := newRig(t)
	d := up(t, r)
	w := r.workload("print", fmt.Sprint(n))
	w.Process, w.Port = "worker", 0
	if err := d.Start(t.Context(), w, 1); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	next := 0
	for ln, err := range d.Logs(ctx, runtime.Ref{App: w.App}, 1_000_000, true) {
		if err != nil {
			t.Fatal(err)
		}
		if want := fmt.Sprintf("line %d", next); ln.Text != want {
			t.Fatalf("line %d is %q", next, ln.Text)
		}
		if next++; next == n {
			break
		}
	}
	if next != n {
		t.Fatalf("%d of %d lines arrived", next, n)
	}
	kept := 0
	for _, err := range d.Logs(t.Context(), runtime.Ref{App: w.App}, 10*n, false) {
		if err != nil {
			t.Fatal(err)
		}
		kept++
	}
	if kept != n {
		t.Errorf("%d of %d lines are kept, yet they are within the limit", kept, n)
	}
}

// BenchmarkFlood measures how many lines a second go from an instance into its log.
func BenchmarkFlood(b *testing.B) {
	const n = 200_000
	r := newRig(b)
	d, end := r.serve(b)
	defer func() {
		end()
		shutdown(b, d)
	}()
	w := r.workload("print", fmt.Sprint(n))
	w.Process, w.Port = "worker", 0
	var took time.Duration
	for b.Loop() {
		w.Release++
		if err := d.Start(b.Context(), w, 1); err != nil {
			b.Fatal(err)
		}
		var first, last time.Time
		for ln, err := range d.Logs(b.Context(), w.Ref, n, true) {
			if err != nil {
				b.Fatal(err)
			}
			if first.IsZero() {
				first = ln.Time
			}
			if last = ln.Time; ln.Text == fmt.Sprintf("line %d", n-1) {
				break
			}
		}
		took += last.Sub(first)
		if err := d.Stop(b.Context(), w.Ref); err != nil {
			b.Fatal(err)
		}
	}
	b.ReportMetric(float64(n)*float64(b.N)/took.Seconds(), "lines/s")
}

// BenchmarkNeighbour measures the answers of an instance beside one that takes
// all it can get of one thing, and right before it does. It asks 200 times a
// second, whatever the answers take: one client that asks as fast as it can
// would be a hog itself. Run it with -benchtime 1000x.
func BenchmarkNeighbour(b *testing.B) {
	r := newRig(b)
	d, end := r.serve(b)
	defer func() {
		end()
		shutdown(b, d)
	}()
	w := r.workload("serve")
	if err := d.Start(b.Context(), w, 1); err != nil {
		b.Fatal(err)
	}
	ins, err := runtime.WaitReady(b.Context(), d, w.Ref, 1, nil)
	if err != nil {
		b.Fatal(err)
	}
	client := &http.Client{}
	for _, kind := range []string{"cpu", "memory", "fds", "tmp", "fork", "log"} {
		h := r.workload("hog", kind)
		h.App, h.MemoryBytes, h.Pids = "greedy", 256<<20, 256
		h.Health = m3o.Health{Kind: "tcp"}
		measure := func(b *testing.B) {
			var took []time.Duration
			tick := time.NewTicker(5 * time.Millisecond)
			defer tick.Stop()
			for b.Loop() {
				<-tick.C
				began := time.Now()
				res, err := client.Get("http://" + ins[0].Addr + "/health")
				if err != nil {
					b.Fatal(err)
				}
				_, _ = io.Copy(io.Discard, res.Body)
				_ = res.Body.Close()
				took = append(took, time.Since(began))
			}
			slices.Sort(took)
			b.ReportMetric(float64(took[len(took)/2].Microseconds()), "p50-µs")
			b.ReportMetric(float64(took[len(took)*99/100].Microseconds()), "p99-µs")
		}
		b.Run(kind+"/before", measure)
		b.Run(kind+"/beside", func(b *testing.B) {
			if err := d.Start(b.Context(), h, 1); err != nil {
				b.Fatal(err)
			}
			measure(b)
			if err := d.Stop(b.Context(), h.Ref); err != nil {
				b.Fatal(err)
			}
		})
	}
}

func TestMissingProgramIsNamed(t *testing.T) {
	r := newRig(t)
	d := up(t, r)
	for _, args := range [][]string{{"no-such-thing"}, {"/no/such/thing"}} {
		_, err := d.Run(t.Context(), r.workload(), runtime.Cmd{Args: args})
		if m3o.KindOf(err) != m3o.Invalid || !strings.Contains(err.Error(), "cannot run "+args[0]) || m3o.HintOf(err) == "" {
			t.Errorf("Run(%q) = %v", args, err)
		}
	}
}
