package daemon

import (
	"errors"
	"testing"
	"time"

	"github.com/m3o/m3o"
	"github.com/m3o/m3o/router"
	"github.com/m3o/m3o/runtime"
)

func TestScalerGoesUpAtOnceAndDownSlowly(t *testing.T) {
	rule := m3o.Scaling{Min: 1, Max: 10, Concurrency: 50}
	now := time.Unix(1_800_000_000, 0)
	const calm = 3 * time.Minute
	s, have := &scaler{calm: calm}, 1
	step := func(inFlight float64) int {
		now = now.Add(decideEvery)
		have, _ = s.plan(now, rule, have, demand{instances: have, inFlight: inFlight})
		return have
	}
	for i, c := range []struct {
		inFlight float64
		want     int
	}{
		{10, 1}, {54, 1}, // within the slack
		{120, 2}, {120, 3}, // at most twice as many a step
		{1000, 6}, {1000, 10}, {5000, 10},
		{480, 10}, {0, 10}, {0, 10},
	} {
		if got := step(c.inFlight); got != c.want {
			t.Fatalf("step %d: %v requests in flight make %d, want %d", i, c.inFlight, got, c.want)
		}
	}
	quiet := time.Duration(0)
	for have == 10 {
		step(60)
		if quiet += decideEvery; quiet > 2*calm {
			t.Fatal("it never goes down")
		}
	}
	if quiet < calm-2*decideEvery || have != 2 {
		t.Errorf("after %v of little load there are %d, want 2 after about %v", quiet, have, calm)
	}
	// A load that swings does not make the number swing.
	changes, was := 0, have
	for i := range 200 {
		if step(float64(40 + 110*(i%2))); have != was {
			changes, was = changes+1, have
		}
	}
	if changes > 2 {
		t.Errorf("a swinging load changed the number %d times", changes)
	}
}

func TestScalerFollowsCPUAndBounds(t *testing.T) {
	now := time.Unix(1_800_000_000, 0)
	for _, c := range []struct {
		rule m3o.Scaling
		have int
		l    demand
		want int
	}{
		{m3o.Scaling{Min: 1, Max: 9, CPU: 50}, 2, demand{instances: 2, cpu: 90}, 4},
		{m3o.Scaling{Min: 1, Max: 3, CPU: 50}, 2, demand{instances: 2, cpu: 90}, 3},
		{m3o.Scaling{Min: 1, Max: 9, CPU: 50, Concurrency: 10}, 2, demand{instances: 2, cpu: 10, inFlight: 35}, 4},
		{m3o.Scaling{Min: 3, Max: 9, CPU: 50}, 1, demand{}, 3},
		{m3o.Scaling{Min: 1, Max: 2, CPU: 50}, 7, demand{instances: 7, cpu: 100}, 2},
		{m3o.Scaling{Min: 1, Max: 9, CPU: 50}, 2, demand{}, 2}, // nothing measured yet
	} {
		if got, _ := (&scaler{calm: time.Minute}).plan(now, c.rule, c.have, c.l); got != c.want {
			t.Errorf("%+v with %+v from %d: %d, want %d", c.rule, c.l, c.have, got, c.want)
		}
	}
}

func TestIdlerCountsFromTheLastUse(t *testing.T) {
	now := time.Unix(1_800_000_000, 0)
	var i idler
	for n, c := range []struct {
		after time.Duration
		st    router.AppStatus
		want  time.Duration
	}{
		{time.Second, router.AppStatus{Requests: 7}, 0}, // first seen
		{time.Minute, router.AppStatus{Requests: 7}, time.Minute},
		{time.Minute, router.AppStatus{Requests: 7}, 2 * time.Minute},
		{time.Minute, router.AppStatus{Requests: 8}, 0},
		{time.Hour, router.AppStatus{Requests: 8, InFlight: 1}, 0}, // an open stream is use
		{time.Second, router.AppStatus{Requests: 8}, time.Second},
		{time.Second, router.AppStatus{}, 0}, // the router was started anew
		{time.Second, router.AppStatus{}, time.Second},
	} {
		now = now.Add(c.after)
		if got := i.see(now, c.st); got != c.want {
			t.Errorf("step %d: idle for %v, want %v", n, got, c.want)
		}
	}
}

func TestCPUIsToldOfTheTimeBetweenTwoLooks(t *testing.T) {
	var u usages
	now := time.Unix(1_800_000_000, 0)
	at := func(after, cpu time.Duration) float64 {
		return u.see("i", runtime.Usage{At: now.Add(after), CPU: cpu}).cpu
	}
	if got := at(0, time.Minute); got != 0 {
		t.Errorf("first look: %v", got)
	}
	if got := at(4*time.Second, time.Minute+time.Second); got != 25 {
		t.Errorf("a second in four: %v%%", got)
	}
	if got := at(4*time.Second+10*time.Millisecond, time.Minute+time.Second+10*time.Millisecond); got != 25 {
		t.Errorf("too short a time must change nothing: %v%%", got)
	}
	if got := at(8*time.Second, time.Second); got != 0 { // it was launched again
		t.Errorf("after a restart: %v%%", got)
	}
}

func TestWhyWordsSayWhatIsWrong(t *testing.T) {
	ended := time.Now()
	for _, c := range []struct {
		in   m3o.Instance
		rep  runtime.Report
		want string
	}{
		{m3o.Instance{Phase: m3o.Ready}, runtime.Report{Last: runtime.Exit{Code: 3, At: ended}, Crashes: 4}, ""},
		{m3o.Instance{Phase: m3o.Starting}, runtime.Report{}, ""},
		{m3o.Instance{Phase: m3o.Starting}, runtime.Report{Why: errors.New("connection refused")}, "connection refused"},
		{m3o.Instance{Phase: m3o.Exited}, runtime.Report{Last: runtime.Exit{Code: 3, At: ended}, Crashes: 1}, "exited with code 3"},
		{m3o.Instance{Phase: m3o.Exited}, runtime.Report{Last: runtime.Exit{Code: 137, Signal: 9, OOM: true, At: ended}, Crashes: 5}, "ran out of memory, 5 times in a row"},
		{m3o.Instance{Phase: m3o.Exited}, runtime.Report{Last: runtime.Exit{Code: 139, Signal: 11, At: ended}, Crashes: 2}, "was ended by signal 11, 2 times in a row"},
	} {
		if got := whyWords(c.in, c.rep); got != c.want {
			t.Errorf("%s %+v: %q, want %q", c.in.Phase, c.rep.Last, got, c.want)
		}
	}
}

func TestCheckWordsNameWhatIsChecked(t *testing.T) {
	for want, c := range map[string]struct {
		h m3o.Health
		t traits
	}{
		"HTTP":              {m3o.Health{}, traits{Protocol: "http1"}},
		"gRPC":              {m3o.Health{}, traits{Protocol: "grpc"}},
		"TCP":               {m3o.Health{Kind: "tcp"}, traits{Protocol: "http1"}},
		"gRPC shop.v1.Shop": {m3o.Health{Kind: "grpc", Service: "shop.v1.Shop"}, traits{Protocol: "grpc"}},
		"HTTP /ready":       {m3o.Health{Kind: "http", Path: "/ready"}, traits{}},
		"HTTP / every 10s, out after 3 failures; restarted after 5 failures of HTTP /livez": {m3o.Health{Kind: "http", Period: 10 * time.Second,
			Liveness: m3o.Check{Kind: "http", Path: "/livez", Failures: 5}}, traits{}},
	} {
		if got := checkWords(c.h, c.t); got != want {
			t.Errorf("%+v: %q, want %q", c.h, got, want)
		}
	}
}
