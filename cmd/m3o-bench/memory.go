//go:build linux

package main

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"os/exec"
	"syscall"
	"time"
)

// instances is how many further apps are started.
const instances = 10

// A footprint is what the processes of a box keep resident, by what they are.
type footprint struct {
	daemon, router, buildkit, shims, apps memory
	nshims, napps                         int
}

func (f footprint) platform() memory { return f.daemon.plus(f.router).plus(f.buildkit) }

// footprint measures once.
func (b *box) footprint() (footprint, error) {
	p, err := b.parts()
	if err != nil {
		return footprint{}, err
	}
	f := footprint{nshims: len(p.shims), napps: len(p.apps)}
	for _, part := range []struct {
		to *memory
		ps []process
	}{{&f.daemon, p.daemon}, {&f.router, p.router}, {&f.buildkit, p.buildkit}, {&f.shims, p.shims}, {&f.apps, p.apps}} {
		m, err := memoryOf(part.ps...)
		if err != nil {
			return f, err
		}
		*part.to = m
	}
	if len(p.daemon) != 1 || len(p.router) != 1 || len(p.buildkit) == 0 {
		return f, fmt.Errorf("found %d daemons, %d routers, %d buildkitds", len(p.daemon), len(p.router), len(p.buildkit))
	}
	return f, nil
}

// idle waits until the platform's memory has come to rest and returns it: for
// three seconds it moves by less than one percent, or 20 seconds have passed.
func (b *bench) idle(ctx context.Context) (footprint, error) {
	var f footprint
	var calm int
	var before int64
	deadline := time.Now().Add(20 * time.Second)
	err := until(ctx, time.Second, time.Minute, "memory to be readable", func() (bool, error) {
		var err error
		if f, err = b.box.footprint(); err != nil {
			return false, err
		}
		now := f.platform().pss
		if moved := now - before; moved > now/100 || moved < -now/100 {
			calm = 0
		} else {
			calm++
		}
		before = now
		return calm == 3 || time.Now().After(deadline), nil
	})
	return f, err
}

// collected is how long after the last work a Go program has given back what
// it no longer uses: the collector runs every two minutes at the least.
const collected = 150 * time.Second

// restart gives daemon and buildkitd a fresh heap; router and apps go on.
func (b *bench) restart(ctx context.Context) error {
	if err := b.box.stop(); err != nil {
		return err
	}
	return b.box.start(ctx)
}

// memory measures the platform when idle, and what each further app adds.
func (b *bench) memory(ctx context.Context, sec *section) error {
	fresh, err := b.idle(ctx)
	if err != nil {
		return err
	}
	var apps []string
	var c *checkout
	for n := range instances {
		app := fmt.Sprintf("bench-mem-%d", n)
		if c, err = b.newCheckout(ctx, samples[0], app); err != nil {
			return err
		}
		if n == 0 {
			b.say("the first push builds the standard library")
		}
		if _, err := c.measurePush(ctx, c.want); err != nil {
			return err
		}
		apps = append(apps, app)
	}
	if err := b.settle(ctx, instances); err != nil {
		return err
	}
	used, err := b.idle(ctx)
	if err != nil {
		return err
	}
	b.say("waiting %s for the collectors", collected)
	select {
	case <-time.After(collected):
	case <-ctx.Done():
		return context.Cause(ctx)
	}
	rested, err := b.idle(ctx)
	if err != nil {
		return err
	}
	// Compared are two daemons that have done nothing but start: what ten
	// builds leave on a heap is not what an instance costs.
	if err := b.restart(ctx); err != nil {
		return err
	}
	with, err := b.idle(ctx)
	if err != nil {
		return err
	}
	if with.nshims != instances || with.napps < instances {
		return fmt.Errorf("%d shims and %d processes of apps run, want %d of each", with.nshims, with.napps, instances)
	}
	if _, _, err := c.hostBuild(ctx, nil); err != nil {
		return err
	}
	bare, err := b.bareMemory(ctx, c.binary(), instances)
	if err != nil {
		return err
	}
	if err := b.destroy(ctx, apps...); err != nil {
		return err
	}
	if err := b.restart(ctx); err != nil {
		return err
	}
	without, err := b.idle(ctx)
	if err != nil {
		return err
	}
	growth := with.platform().pss - without.platform().pss
	each := (growth + with.shims.pss) / instances
	sec.add(row{What: "daemon, router and buildkitd, idle, just started", Budget: "≤ 150 MB", Measured: mb(fresh.platform().pss) + " PSS, " + mb(fresh.platform().rss) + " RSS",
		Reference: "–", Ratio: fmt.Sprintf("%.2f× of 150", float64(fresh.platform().pss)/(150<<20)), Met: verdict(fresh.platform().pss <= 150<<20)})
	sec.add(row{What: fmt.Sprintf("the same %s after %d pushes, with %d apps", collected, instances, instances), Budget: "≤ 150 MB", Measured: mb(rested.platform().pss) + " PSS, " + mb(rested.platform().rss) + " RSS",
		Reference: "–", Ratio: fmt.Sprintf("%.2f× of 150", float64(rested.platform().pss)/(150<<20)), Met: verdict(rested.platform().pss <= 150<<20)})
	sec.add(row{What: "each further idle instance, beyond the app", Budget: "≤ 3 MB", Measured: mb(each), Reference: "the app as a bare process " + mb(bare.pss/instances),
		Ratio: fmt.Sprintf("%.2f×", float64(each)/float64(bare.pss/instances)), Met: verdict(each <= 3<<20)})
	t := table{title: "Who keeps what, PSS (anonymous part; RSS)", head: []string{"process", "just started", fmt.Sprintf("after %d pushes, %d apps", instances, instances), fmt.Sprintf("%s later", collected), fmt.Sprintf("restarted, %d apps", instances), "restarted, no app"}}
	for _, l := range []struct {
		what string
		of   func(footprint) memory
	}{
		{"m3od", func(f footprint) memory { return f.daemon }},
		{"m3od router", func(f footprint) memory { return f.router }},
		{"buildkitd", func(f footprint) memory { return f.buildkit }},
		{"**together**", footprint.platform},
		{"shims", func(f footprint) memory { return f.shims }},
		{"apps", func(f footprint) memory { return f.apps }},
	} {
		cells := []string{l.what}
		for _, f := range []footprint{fresh, used, rested, with, without} {
			m := l.of(f)
			cells = append(cells, fmt.Sprintf("%s (%s; %s)", mb(m.pss), mb(m.anon), mb(m.rss)))
		}
		t.add(cells...)
	}
	t.add(fmt.Sprintf("the app as %d bare processes", instances), "", "", "", fmt.Sprintf("%s (%s; %s)", mb(bare.pss), mb(bare.anon), mb(bare.rss)), "")
	sec.tables = append(sec.tables, t)
	sec.note(fmt.Sprintf("From /proc/PID/smaps_rollup, once it has come to rest. An instance's cost is that of its shim (%s PSS each) and of what daemon, router and buildkitd "+
		"keep more (%s each) with %d apps than with none, both right after a restart of the daemon; the router is not restarted, so its share includes what serving them left. "+
		"Memory of the kernel, for namespaces and links, is not in it. The design's outside reference is not measurable here: Micro v3's server, 83 MB PSS when idle.",
		mb(with.shims.pss/instances), mb(growth/instances), instances))
	return nil
}

// A bareServer is a sample's binary as a plain process on the host.
type bareServer struct {
	cmd  *exec.Cmd
	took time.Duration // from its start to its first answer
}

func (s *bareServer) stop() {
	_ = s.cmd.Process.Signal(syscall.SIGKILL)
	_ = s.cmd.Wait()
}

// startBare starts hello-http's binary and waits for its first answer.
func (b *bench) startBare(ctx context.Context, binary string) (*bareServer, error) {
	addr, err := freeAddr(ctx)
	if err != nil {
		return nil, err
	}
	s := &bareServer{cmd: exec.Command(binary)}
	s.cmd.Env = []string{"PORT=" + port(addr)}
	s.cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	client := &http.Client{Timeout: time.Second, Transport: &http.Transport{DisableKeepAlives: true}}
	began := time.Now()
	if err := s.cmd.Start(); err != nil {
		return nil, err
	}
	err = until(ctx, 2*time.Millisecond, 10*time.Second, "the bare binary to answer", func() (bool, error) {
		res, err := client.Get("http://" + addr + "/")
		if err != nil {
			return false, err
		}
		s.took = time.Since(began)
		return true, res.Body.Close()
	})
	if err != nil {
		s.stop()
		return nil, err
	}
	return s, nil
}

// bareMemory is what n bare processes of a binary keep together.
func (b *bench) bareMemory(ctx context.Context, binary string, n int) (sum memory, err error) {
	var ps []process
	for range n {
		s, err := b.startBare(ctx, binary)
		if err != nil {
			return sum, err
		}
		defer s.stop()
		ps = append(ps, process{pid: s.cmd.Process.Pid})
	}
	if sum, err = memoryOf(ps...); err == nil && sum.pss == 0 {
		err = errors.New("the bare processes have no memory of their own")
	}
	return sum, err
}
