//go:build linux

package oci_test

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/m3o/m3o/runtime"
)

// BenchmarkInstance measures, one instance at a time, Start to the first
// accepted connection and to ready, and Stop. Run it with -benchtime 20x.
func BenchmarkInstance(b *testing.B) {
	r := newRig(b)
	d, end := r.serve(b)
	defer func() {
		end()
		shutdown(b, d)
	}()
	w := r.workload("serve")
	// The first device of a network namespace takes the kernel a second to
	// wake up to: on a real host that is long past.
	err := d.Start(b.Context(), w, 1)
	if err == nil {
		_, err = runtime.WaitReady(b.Context(), d, w.Ref, 1, nil)
	}
	if err = errors.Join(err, d.Stop(b.Context(), w.Ref)); err != nil {
		b.Fatal(err)
	}
	var open, ready, stop []time.Duration
	lost := lostSYNs(b)
	for b.Loop() {
		began := time.Now()
		first := make(chan time.Duration, 1)
		ctx, cancel := context.WithCancel(b.Context())
		go func() {
			for in, err := range d.Events(ctx) {
				if err != nil || in.Addr == "" {
					continue
				}
				for ctx.Err() == nil {
					<-time.After(time.Millisecond) // it would take the CPU the start needs
					if c, err := net.DialTimeout("tcp", in.Addr, 30*time.Millisecond); err == nil {
						_ = c.Close()
						break
					}
				}
				break
			}
			first <- time.Since(began)
		}()
		if err := d.Start(b.Context(), w, 1); err != nil {
			b.Fatal(err)
		}
		if _, err := runtime.WaitReady(b.Context(), d, w.Ref, 1, nil); err != nil {
			b.Fatal(err)
		}
		ready = append(ready, time.Since(began))
		open = append(open, <-first)
		cancel()
		began = time.Now()
		if err := d.Stop(b.Context(), w.Ref); err != nil {
			b.Fatal(err)
		}
		stop = append(stop, time.Since(began))
	}
	b.ReportMetric(float64(lostSYNs(b)-lost), "lost-SYNs")
	for name, ds := range map[string][]time.Duration{"first": open, "ready": ready, "stop": stop} {
		slices.Sort(ds)
		b.ReportMetric(ms(ds[len(ds)/2]), name+"-p50-ms")
		b.ReportMetric(ms(ds[len(ds)*99/100]), name+"-p99-ms")
		b.ReportMetric(ms(ds[len(ds)-1]), name+"-max-ms")
	}
}

// lostSYNs is how many first packets of connections this network namespace has
// had to send again, each after a second.
func lostSYNs(t testing.TB) int {
	t.Helper()
	b, err := os.ReadFile("/proc/self/net/netstat")
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for l := range strings.Lines(string(b)) {
		f := strings.Fields(l)
		if i := slices.Index(names, "TCPSynRetrans"); i >= 0 && f[0] == names[0] {
			n, _ := strconv.Atoi(f[i])
			return n
		}
		names = f
	}
	t.Fatal("the kernel does not count them")
	return 0
}

func ms(d time.Duration) float64 { return float64(d) / 1e6 }

// BenchmarkForty starts 40 instances at once and stops them, and measures the
// memory of their shims.
func BenchmarkForty(b *testing.B) {
	r := newRig(b)
	d, end := r.serve(b)
	defer func() {
		end()
		shutdown(b, d)
	}()
	w := r.workload("serve")
	var start, stop time.Duration
	var pss float64
	for b.Loop() {
		began := time.Now()
		if err := d.Start(b.Context(), w, 40); err != nil {
			b.Fatal(err)
		}
		ins, err := runtime.WaitReady(b.Context(), d, w.Ref, 40, nil)
		if err != nil {
			b.Fatal(err)
		}
		start += time.Since(began)
		pss = 0
		for _, in := range ins {
			pss += shimPSS(b, r, in.ID)
		}
		pss /= 40
		began = time.Now()
		if err := d.Stop(b.Context(), w.Ref); err != nil {
			b.Fatal(err)
		}
		stop += time.Since(began)
		if left := r.leftovers(b); len(left) > 0 {
			b.Fatalf("left:\n%s", strings.Join(left, "\n"))
		}
	}
	b.ReportMetric(ms(start)/float64(b.N), "start40-ms")
	b.ReportMetric(ms(stop)/float64(b.N), "stop40-ms")
	b.ReportMetric(pss, "shim-PSS-kB")
}

func shimPSS(t testing.TB, r rig, id string) float64 {
	t.Helper()
	pid, err := os.ReadFile(filepath.Join(r.cfg.Dir, "bundles", id, "shim.pid"))
	if err != nil {
		t.Fatal(err)
	}
	b, err := os.ReadFile("/proc/" + string(pid) + "/smaps_rollup")
	if err != nil {
		t.Fatal(err)
	}
	for l := range strings.Lines(string(b)) {
		var kb float64
		if n, _ := fmt.Sscanf(l, "Pss: %f kB", &kb); n == 1 {
			return kb
		}
	}
	t.Fatal("no Pss line")
	return 0
}
