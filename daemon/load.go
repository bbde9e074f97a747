package daemon

import (
	"context"
	"fmt"
	"math"
	"sync"
	"time"

	"github.com/m3o/m3o"
	"github.com/m3o/m3o/release"
	"github.com/m3o/m3o/router"
	"github.com/m3o/m3o/runtime"
)

// The rhythm of what follows load.
const (
	lookEvery   = time.Second     // counts of requests are looked at, while an app sleeps or scales by itself
	decideEvery = 5 * time.Second // numbers of instances are decided
	slack       = 0.1             // a load this near to what was asked for changes nothing
)

// usages keeps what instances used lately.
type usages struct {
	mu   sync.Mutex // guards last
	last map[string]sampled
}

type sampled struct {
	runtime.Usage
	cpu float64 // percent of one core between the last two looks
}

// see takes in a measurement and returns it with the CPU use since the last.
func (u *usages) see(id string, now runtime.Usage) sampled {
	u.mu.Lock()
	defer u.mu.Unlock()
	if u.last == nil {
		u.last = map[string]sampled{}
	}
	s := sampled{Usage: now}
	was, ok := u.last[id]
	if span := now.At.Sub(was.At); ok && now.CPU >= was.CPU && span > 0 {
		if span < time.Second/2 {
			return was // too short a time to tell anything
		}
		s.cpu = 100 * float64(now.CPU-was.CPU) / float64(span)
	}
	u.last[id] = s
	return s
}

func (u *usages) keep(known map[string]bool) {
	u.mu.Lock()
	defer u.mu.Unlock()
	for id := range u.last {
		if !known[id] {
			delete(u.last, id)
		}
	}
}

// measure samples every instance that runs.
func (d *Daemon) measure() {
	known := map[string]bool{}
	for _, in := range d.routes.list("") {
		if in.Phase == m3o.Exited {
			continue
		}
		if u, err := d.driver.Usage(in.ID); err == nil {
			d.usages.see(in.ID, u)
			known[in.ID] = true
		}
	}
	d.usages.keep(known)
}

// A scaler decides how many instances one process type should have.
type scaler struct {
	calm  time.Duration // the load must have been low for so long before instances go
	wants []want        // what was needed lately, oldest first
}

type want struct {
	at time.Time
	n  int
}

// demand is what was measured of a process type.
type demand struct {
	instances int     // that share the load
	inFlight  float64 // requests, on average
	cpu       float64 // percent of its limit an instance uses, on average
}

// plan says how many instances there should be when have are wanted now, and
// in words why. It goes up at once, at most to twice as many, and down only to
// what sufficed for all of s.calm.
func (s *scaler) plan(now time.Time, rule m3o.Scaling, have int, l demand) (n int, why string) {
	need := 0
	by := func(load, each float64, words string) {
		if each <= 0 {
			return
		}
		exact := load / each
		k := int(math.Ceil(exact - 1e-9))
		if have > 0 && math.Abs(exact-float64(have)) <= slack*float64(have) {
			k = have
		}
		if k > need {
			need, why = k, words
		}
	}
	by(l.inFlight, float64(rule.Concurrency), fmt.Sprintf("%.0f requests in flight", l.inFlight))
	by(float64(l.instances)*l.cpu, float64(rule.CPU), fmt.Sprintf("%.0f%% of the CPU used", l.cpu))
	need = min(max(need, rule.Min), rule.Max)
	s.wants = append(s.wants, want{now, need})
	for len(s.wants) > 1 && now.Sub(s.wants[0].at) > s.calm {
		s.wants = s.wants[1:]
	}
	switch {
	case have < rule.Min || have > rule.Max:
		return min(max(have, rule.Min), rule.Max), "the bounds"
	case need > have:
		return min(need, max(2*have, have+1)), why
	}
	most := 0
	for _, w := range s.wants {
		most = max(most, w.n)
	}
	if most < have && now.Sub(s.wants[0].at) >= s.calm-decideEvery {
		return most, fmt.Sprintf("little load for %v", s.calm)
	}
	return have, ""
}

// follows is what followLoad keeps of one app.
type follows struct {
	idle    idler
	scalers map[string]*scaler
	sum     float64 // of the requests in flight at each look
	looks   int
}

// followLoad puts idle apps to sleep and scales those that scale by
// themselves, until ctx ends.
func (d *Daemon) followLoad(ctx context.Context) error {
	t := time.NewTicker(lookEvery)
	defer t.Stop()
	apps := map[string]*follows{}
	var decided time.Time
	for {
		var now time.Time
		select {
		case <-ctx.Done():
			return nil
		case now = <-t.C:
		}
		decide := now.Sub(decided) >= decideEvery
		if decide {
			decided = now
			d.measure()
		}
		watched := map[string]shape{}
		for app, sh := range d.shapes.all() {
			if !sh.asleep && (sh.rel.Sleep > 0 || scales(sh.rel)) {
				watched[app] = sh
			}
		}
		for app := range apps {
			if _, ok := watched[app]; !ok {
				delete(apps, app)
			}
		}
		if len(watched) == 0 {
			continue
		}
		sctx, cancel := context.WithTimeout(ctx, 5*time.Second)
		st, err := d.router.Status(sctx)
		cancel()
		if err != nil {
			continue // it is being started again; nothing is decided blindly
		}
		for app, sh := range watched {
			a := apps[app]
			if a == nil {
				a = &follows{scalers: map[string]*scaler{}}
				apps[app] = a
			}
			d.look(app, sh, a, st.Apps[app], now, decide)
		}
	}
}

func scales(rel m3o.Release) bool {
	for _, p := range rel.Processes {
		if p.Scaling.On() {
			return true
		}
	}
	return false
}

func (d *Daemon) look(app string, sh shape, a *follows, st router.AppStatus, now time.Time, decide bool) {
	a.sum += float64(st.InFlight)
	a.looks++
	if _, web := sh.rel.Processes[webProcess]; web && sh.rel.Sleep > 0 && a.idle.see(now, st) >= sh.rel.Sleep && d.routes.canaryOf(app).Version == 0 {
		a.idle = idler{}
		after, requests := sh.rel.Sleep, st.Requests
		d.background(func(ctx context.Context) {
			if err := d.sleep(ctx, app, after, requests); err != nil {
				d.log.Error("put an app to sleep", "app", app, "err", err)
			}
		})
		return
	}
	if !decide {
		return
	}
	inFlight := a.sum / float64(a.looks)
	a.sum, a.looks = 0, 0
	for name, p := range sh.rel.Processes {
		if !p.Scaling.On() || p.Replicas == 0 {
			continue
		}
		if a.scalers[name] == nil {
			a.scalers[name] = &scaler{calm: d.cfg.ScaleDown}
		}
		l := d.demand(sh.rel, name)
		if name == webProcess {
			l.inFlight = inFlight
		}
		n, why := a.scalers[name].plan(now, p.Scaling, p.Replicas, l)
		if n == p.Replicas {
			continue
		}
		reason := fmt.Sprintf("autoscale %s=%d: %s", name, n, why)
		d.background(func(ctx context.Context) {
			if err := d.autoscale(ctx, app, name, reason, n); err != nil {
				d.log.Error("autoscale", "app", app, "process", name, "err", err)
			}
		})
	}
}

// demand measures the ready instances of a process type.
func (d *Daemon) demand(rel m3o.Release, process string) demand {
	var l demand
	d.usages.mu.Lock()
	defer d.usages.mu.Unlock()
	for _, in := range d.routes.list(rel.App) {
		if in.Process != process || in.Release != rel.Version || in.Phase != m3o.Ready {
			continue
		}
		u := d.usages.last[in.ID]
		l.instances++
		if limit := float64(u.CPULimit) / 1000; limit > 0 {
			l.cpu += u.cpu / limit
		} else {
			l.cpu += u.cpu
		}
	}
	if l.instances > 0 {
		l.cpu /= float64(l.instances)
	}
	return l
}

func (d *Daemon) autoscale(ctx context.Context, app, process, reason string, n int) error {
	_, err := d.reform(ctx, app, "m3o", reason, func(_ m3o.Release, f *release.Formation) ([]string, error) {
		if f.Asleep || f.Processes[process].Stopped {
			return nil, nil
		}
		s := f.Processes[process]
		d.tell(app, "%s", reason)
		s.Replicas = &n
		f.Processes[process] = s
		return []string{process}, nil
	})
	return err
}
