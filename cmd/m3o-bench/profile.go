//go:build linux

package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"runtime/pprof"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"
)

// profiled lets the process be told to profile itself into file: USR1 begins,
// USR2 ends. The func returned waits until nobody listens any more.
func profiled(file string) (func() error, error) {
	sig := make(chan os.Signal, 4)
	done := make(chan error, 1)
	signal.Notify(sig, syscall.SIGUSR1, syscall.SIGUSR2)
	go func() {
		var f *os.File
		var err error
		for s := range sig {
			switch {
			case s == syscall.SIGUSR1 && f == nil:
				if f, err = os.Create(file + ".part"); err == nil {
					err = pprof.StartCPUProfile(f)
				}
			case s == syscall.SIGUSR2 && f != nil:
				pprof.StopCPUProfile()
				err = errors.Join(f.Close(), os.Rename(file+".part", file))
				f = nil
			}
			if err != nil {
				break
			}
		}
		done <- err
	}()
	return func() error {
		signal.Stop(sig)
		close(sig)
		return <-done
	}, nil
}

// A group is what functions of a profile are counted as.
type group struct {
	name  string
	parts []string // of the function names
}

// groups are asked in order, for each frame from the innermost outwards: the
// first that knows the frame gets the sample.
var groups = []group{
	{"kernel: read, write, poll", []string{"syscall.", "internal/runtime/syscall.", "runtime.netpoll", "runtime.futex", "runtime.epoll"}},
	{"garbage collection and allocation", []string{"runtime.gcBgMarkWorker", "runtime.mallocgc", "runtime.bgsweep", "runtime.gcAssist", "runtime.bgscavenge", "runtime.gcStart", "runtime.growslice", "runtime.newobject"}},
	{"goroutine switches and timers", []string{"runtime.schedule", "runtime.findRunnable", "runtime.park_m", "runtime.goready", "runtime.mcall", "runtime.newproc", "runtime.semacquire", "runtime.semrelease", "runtime.chansend", "runtime.chanrecv", "runtime.selectgo", "runtime.wakep", "runtime.ready", "internal/poll.runtime_pollSetDeadline", "runtime.(*timer", "runtime.sysmon", "runtime.mstart"}},
	{"TLS", []string{"crypto/"}},
	{"HTTP/2 to the apps", []string{"m3o/internal/h2client."}},
	{"gateway: messages and metadata", []string{"m3o/gateway."}},
	{"router: guard against smuggling and slow clients", []string{"m3o/router.(*guardConn)", "m3o/router.(*framing)"}},
	{"router: statistics and records", []string{"m3o/router.(*stats)", "m3o/router.(*request).record", "m3o/router.(*tails)"}},
	{"router: the rest", []string{"m3o/router."}},
	{"net/http's HTTP/2 server", []string{"net/http.(*http2", "net/http.http2", "net/http/internal/http2", "golang.org/x/net/http2", "vendor/golang.org/x/net/http2"}},
	{"net/http's server", []string{"net/http.", "net/textproto."}},
}

// profileOf loads p once more with its profiler on, and tells what share of the
// CPU each group took.
func (b *bench) profileOf(ctx context.Context, p *proxied, l load) ([][]string, error) {
	_ = os.Remove(p.profile)
	if err := p.cmd.Process.Signal(syscall.SIGUSR1); err != nil {
		return nil, err
	}
	for range 3 { // of a hundred samples a second
		if _, err := patient(ctx, p, l); err != nil {
			return nil, err
		}
	}
	if err := p.cmd.Process.Signal(syscall.SIGUSR2); err != nil {
		return nil, err
	}
	if err := until(ctx, 20*time.Millisecond, 10*time.Second, "the profile", func() (bool, error) {
		_, err := os.Stat(p.profile)
		return err == nil, nil
	}); err != nil {
		return nil, err
	}
	out, err := exec.CommandContext(ctx, "go", "tool", "pprof", "-traces", p.profile).Output()
	if err != nil {
		return nil, fmt.Errorf("pprof: %w", err)
	}
	return shares(string(out)), nil
}

// shares reads the samples that pprof -traces prints: blocks between lines of
// dashes, a value and the innermost function, then its callers.
func shares(traces string) [][]string {
	sum := map[string]time.Duration{}
	var all time.Duration
	blocks := strings.Split(traces, "-----------+-------------------------------------------------------\n")
	for _, b := range blocks[min(1, len(blocks)):] {
		var took time.Duration
		var frames []string
		for line := range strings.Lines(b) {
			f := strings.Fields(line)
			if len(f) == 0 {
				continue
			}
			if d, err := time.ParseDuration(f[0]); err == nil && len(f) > 1 {
				took, f = d, f[1:]
			}
			frames = append(frames, f[0])
		}
		if took == 0 {
			continue
		}
		all += took
		sum[groupOf(frames)] += took
	}
	var names []string
	for n := range sum {
		names = append(names, n)
	}
	slices.SortFunc(names, func(a, b string) int { return cmp.Or(cmp.Compare(sum[b], sum[a]), strings.Compare(a, b)) })
	var out [][]string
	for _, n := range names {
		out = append(out, []string{n, strconv.FormatFloat(100*sum[n].Seconds()/all.Seconds(), 'f', 0, 64) + " %"})
	}
	return out
}

func groupOf(frames []string) string {
	for _, f := range frames {
		for _, g := range groups {
			for _, p := range g.parts {
				if strings.Contains(f, p) {
					return g.name
				}
			}
		}
	}
	return "other"
}
