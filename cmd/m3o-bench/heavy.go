//go:build linux

package main

import (
	"context"
	"fmt"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"sync"
	"time"
)

// A cold build and a heavy one: what m3o takes when nothing is cached, and what
// a build that keeps all CPUs busy costs the apps that run beside it.

// coldRounds is how often a cold build is measured: each takes most of a minute.
const coldRounds = 2

// cold measures the first push to a builder that has nothing, against go build
// with empty caches.
func (b *bench) cold(ctx context.Context, sec *section) error {
	var took, host, ratio durations
	var parts breakdown
	for round := range min(b.rounds, coldRounds) {
		c, err := b.newCheckout(ctx, samples[1], fmt.Sprintf("bench-cold-%d", round))
		if err != nil {
			return err
		}
		caches := filepath.Join(b.dir, "cold")
		hand := func() error {
			began := time.Now()
			// The module cache is made read only; the go command removes it.
			_, err := c.coldBuild(ctx, caches, "build", "-trimpath", "-buildvcs=false", "-ldflags", "-s -w", "-o", c.binary(), ".")
			host.add(time.Since(began))
			if _, cerr := c.coldBuild(ctx, caches, "clean", "-modcache"); err == nil {
				err = cerr
			}
			if rerr := os.RemoveAll(caches); err == nil {
				err = rerr
			}
			return err
		}
		push := func() error {
			if err := b.box.stop(); err != nil {
				return err
			}
			for _, dir := range []string{"buildkit", "toolchains"} {
				if err := os.RemoveAll(filepath.Join(b.box.data, "build", dir)); err != nil {
					return err
				}
			}
			if err := b.box.start(ctx); err != nil {
				return err
			}
			p, err := c.measurePush(ctx, c.want)
			took.add(p.answer)
			parts.add(spans(p.lines, p.wall))
			return err
		}
		if err := inTurns(round, hand, push); err != nil {
			return err
		}
		ratio.add(quotient(took.last(), host.last()))
		b.say("cold: answers after %s, go build %s", secs(took.last()), secs(host.last()))
		if err := b.destroy(ctx, c.app); err != nil {
			return err
		}
	}
	sec.add(row{What: "hello-grpc: first push, nothing cached, push → answers", Budget: "–", Measured: took.text(),
		Reference: "go build with empty caches " + host.text(), Ratio: times(ratio.median()), Met: "–"})
	sec.tables = append(sec.tables, parts.table("Cold: where the time goes"))
	sec.note("Before each push the daemon is stopped and its builder's caches and toolchains are removed. The push makes the toolchain's layer, fetches the modules and compiles " +
		"the standard library. By hand, the toolchain is there; the caches of modules and builds are empty.")
	return nil
}

// coldBuild runs the go command on the host with caches of its own in dir.
func (c *checkout) coldBuild(ctx context.Context, dir string, args ...string) (string, error) {
	cmd := exec.CommandContext(ctx, "go", args...)
	cmd.Dir = c.host
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0", "GOFLAGS=", "GOWORK=off", "GOCACHE="+filepath.Join(dir, "build"), "GOMODCACHE="+filepath.Join(dir, "mod"))
	out, err := cmd.CombinedOutput()
	if err != nil {
		return "", fmt.Errorf("go %s of %s: %w: %s", args[0], c.s.name, err, out)
	}
	return string(out), nil
}

// paces of the requests to the app beside a heavy build: at fixed times,
// whether the ones before were answered or not, as users come.
const (
	heavyPace  = 10 * time.Millisecond
	heavyAlone = 15 * time.Second // how long the app is asked without a build
)

// heavy measures the latency of a running app while a heavy build runs.
func (b *bench) heavy(ctx context.Context, sec *section) error {
	c, err := b.newCheckout(ctx, samples[0], "bench-calm")
	if err != nil {
		return err
	}
	if _, err := c.measurePush(ctx, c.want); err != nil {
		return err
	}
	var alone, beside, besideHost []time.Duration
	var failed int
	for round := range min(b.rounds, coldRounds) {
		n, err := c.load(ctx, func() error {
			select {
			case <-time.After(heavyAlone):
				return nil
			case <-ctx.Done():
				return context.Cause(ctx)
			}
		}, &alone)
		failed += n
		if err != nil {
			return err
		}
		// Flags of its own give an app caches of its own: all is compiled.
		h, err := b.newCheckout(ctx, samples[1], fmt.Sprintf("bench-heavy-%d", round))
		if err != nil {
			return err
		}
		if err := os.WriteFile(filepath.Join(h.repo, "m3o.yaml"), []byte("build:\n  flags: [-gcflags=all=-l]\n"), 0o644); err != nil {
			return err
		}
		if err := h.commit(ctx); err != nil {
			return err
		}
		push := func() error {
			n, err := c.load(ctx, func() error { _, err := h.measurePush(ctx, ""); return err }, &beside)
			failed += n
			return err
		}
		hand := func() error {
			caches := filepath.Join(b.dir, "heavy")
			n, err := c.load(ctx, func() error {
				_, err := h.coldBuild(ctx, caches, "build", "-gcflags=all=-l", "-o", h.binary(), ".")
				return err
			}, &besideHost)
			failed += n
			if _, cerr := h.coldBuild(ctx, caches, "clean", "-modcache"); err == nil {
				err = cerr
			}
			if rerr := os.RemoveAll(caches); err == nil {
				err = rerr
			}
			return err
		}
		if err := inTurns(round, push, hand); err != nil {
			return err
		}
		b.say("heavy: p99 %s alone, %s beside a push, %s beside go build", secs(p99(alone)), secs(p99(beside)), secs(p99(besideHost)))
		if _, err := b.box.run(ctx, b.dir, b.box.m3o(), "destroy", h.app, "--confirm", h.app); err != nil {
			return err
		}
		if err := b.settle(ctx, 1); err != nil {
			return err
		}
	}
	text := func(ds []time.Duration) string {
		return fmt.Sprintf("p99 %s, median %s", millis(p99(ds)), millis(durations(ds).median()))
	}
	sec.add(row{What: "requests to an app beside a heavy build", Budget: "–", Measured: text(beside), Reference: "without a build " + text(alone),
		Ratio: times(quotient(p99(beside), p99(alone))), Met: "–"})
	sec.add(row{What: "the same beside `go build` by hand", Budget: "–", Measured: text(besideHost), Reference: "without a build " + text(alone),
		Ratio: times(quotient(p99(besideHost), p99(alone))), Met: "–"})
	sec.note(fmt.Sprintf("A request every %s, at its time whether those before were answered or not, to hello-http over HTTPS; latency counts from when the request was due. "+
		"The build compiles hello-grpc, its modules and the standard library on all CPUs. %d of %d requests failed.", heavyPace, failed, len(alone)+len(beside)+len(besideHost)+failed))
	return b.destroy(ctx, c.app)
}

func millis(d time.Duration) string { return fmt.Sprintf("%.1f ms", float64(d.Microseconds())/1000) }

func p99(ds []time.Duration) time.Duration {
	s := slices.Sorted(slices.Values(ds))
	return s[len(s)*99/100]
}

// load asks the app at a steady pace while during runs and adds the latencies to took.
func (c *checkout) load(ctx context.Context, during func() error, took *[]time.Duration) (failed int, err error) {
	client := &http.Client{Timeout: 30 * time.Second, Transport: c.b.box.client.Transport}
	url := "https://" + c.app + ".localhost:" + port(c.b.box.https) + c.s.path
	done := make(chan error, 1)
	go func() { done <- during() }()
	var mu sync.Mutex // guards took and failed
	var wg sync.WaitGroup
	defer wg.Wait()
	due := time.Now()
	for {
		due = due.Add(heavyPace)
		select {
		case err := <-done:
			wg.Wait()
			return failed, err
		case <-time.After(time.Until(due)):
		}
		at := due
		wg.Go(func() {
			ok := false
			if req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil); err == nil {
				if res, err := client.Do(req); err == nil {
					ok = res.StatusCode == http.StatusOK && res.Body.Close() == nil
				}
			}
			late := time.Since(at)
			mu.Lock()
			defer mu.Unlock()
			if ok {
				*took = append(*took, late)
			} else {
				failed++
			}
		})
	}
}
