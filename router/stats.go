package router

import (
	"slices"
	"strings"
	"sync"
	"time"
)

// latencyBounds are the upper bounds of a series' buckets; what is slower is
// counted in one more.
var latencyBounds = [...]time.Duration{
	500 * time.Microsecond, time.Millisecond, 2500 * time.Microsecond, 5 * time.Millisecond, 10 * time.Millisecond, 25 * time.Millisecond,
	50 * time.Millisecond, 100 * time.Millisecond, 250 * time.Millisecond, 500 * time.Millisecond, time.Second, 2500 * time.Millisecond,
	5 * time.Second, 10 * time.Second, 30 * time.Second,
}

// LatencyBounds are the upper bounds of Series.Buckets but the last, which has none.
func LatencyBounds() []time.Duration { return slices.Clone(latencyBounds[:]) }

const (
	latencyBuckets = len(latencyBounds) + 1
	// maxSeries bounds what one app's callers can make the router count apart;
	// what is beyond goes to one series of the release.
	maxSeries = 500
	// windowMinutes is how far back a window may reach.
	windowMinutes = 15
	// samplesKept is how many failed, and how many slow, requests of an app are kept.
	samplesKept = 50
	// slowAfter is what makes a request a slow one; streams are meant to be long.
	slowAfter = time.Second
)

// A SeriesKey is what requests are counted apart by.
type SeriesKey struct {
	Release  int    `json:"release"`
	RPC      string `json:"rpc,omitempty"` // "/package.Service/Method", "" for plain HTTP, "other" beyond the bound
	Method   string `json:"method"`        // of HTTP
	Protocol string `json:"protocol"`
	Status   int    `json:"status"`         // of HTTP
	Code     int    `json:"code,omitempty"` // gRPC status of a call
	Caller   string `json:"caller,omitempty"`
}

// A Series counts the requests of one key.
type Series struct {
	SeriesKey
	Count   int64         `json:"count"`
	Failed  int64         `json:"failed"` // on the serving side: 5xx, broken off, and the gRPC codes that mean the same
	Sum     time.Duration `json:"sum"`    // of all durations, nanoseconds
	Buckets []int64       `json:"buckets"`
}

// Quantile estimates the duration that a share p of requests stayed below, by
// interpolation within its bucket; 0 without requests.
func Quantile(buckets []int64, p float64) time.Duration {
	var total int64
	for _, n := range buckets {
		total += n
	}
	if total == 0 {
		return 0
	}
	rank := p * float64(total)
	var below float64
	for i, n := range buckets {
		if below+float64(n) < rank || n == 0 {
			below += float64(n)
			continue
		}
		if i >= len(latencyBounds) {
			return latencyBounds[len(latencyBounds)-1]
		}
		lo := time.Duration(0)
		if i > 0 {
			lo = latencyBounds[i-1]
		}
		return lo + time.Duration((rank-below)/float64(n)*float64(latencyBounds[i]-lo))
	}
	return latencyBounds[len(latencyBounds)-1]
}

// counts is a series while it is counted.
type counts struct {
	mu      sync.Mutex // guards what follows
	count   int64
	failed  int64
	sum     time.Duration
	buckets [latencyBuckets]int64
	minutes [windowMinutes]minute
}

// minute is what was counted in one minute of time.
type minute struct {
	at      int64 // minutes since 1970
	failed  uint32
	sum     time.Duration
	buckets [latencyBuckets]uint32
}

// stats are the requests of one app.
type stats struct {
	mu     sync.RWMutex // guards series
	series map[SeriesKey]*counts

	smu          sync.Mutex // guards what follows
	failed, slow []Record   // rings, the oldest at next
	fnext, snext int
}

func (s *stats) add(r *Record) {
	k := SeriesKey{Release: r.Release, RPC: r.RPC, Method: r.Method, Protocol: r.Protocol, Status: r.Status, Code: r.Code, Caller: r.Caller}
	if len(k.Method) > 10 {
		k.Method = "other"
	}
	c := s.of(k)
	b := bucketOf(r.Took)
	now := r.Time.Add(r.Took).Unix() / 60
	bad := r.Failed()
	c.mu.Lock()
	c.count++
	c.sum += r.Took
	c.buckets[b]++
	m := &c.minutes[now%windowMinutes]
	if m.at != now {
		*m = minute{at: now}
	}
	m.sum += r.Took
	m.buckets[b]++
	if bad {
		c.failed++
		m.failed++
	}
	c.mu.Unlock()
	if bad {
		s.sample(&s.failed, &s.fnext, r)
	} else if r.Took >= slowAfter && r.Protocol != protoWebSocket && r.Status != statusGone {
		s.sample(&s.slow, &s.snext, r)
	}
}

func bucketOf(d time.Duration) int {
	for i, b := range latencyBounds {
		if d <= b {
			return i
		}
	}
	return len(latencyBounds)
}

// of finds the counts of a key, or makes them while there are not too many.
func (s *stats) of(k SeriesKey) *counts {
	s.mu.RLock()
	c := s.series[k]
	s.mu.RUnlock()
	if c != nil {
		return c
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.series == nil {
		s.series = map[SeriesKey]*counts{}
	}
	if c = s.series[k]; c != nil {
		return c
	}
	if len(s.series) >= maxSeries {
		k = SeriesKey{Release: k.Release, RPC: "other", Protocol: k.Protocol}
		if c = s.series[k]; c != nil {
			return c
		}
	}
	c = &counts{}
	// The strings may be parts of a request's buffer.
	k.RPC, k.Method, k.Caller = strings.Clone(k.RPC), strings.Clone(k.Method), strings.Clone(k.Caller)
	s.series[k] = c
	return c
}

func (s *stats) sample(ring *[]Record, next *int, r *Record) {
	s.smu.Lock()
	defer s.smu.Unlock()
	if len(*ring) < samplesKept {
		*ring = append(*ring, *r)
		return
	}
	(*ring)[*next] = *r
	*next = (*next + 1) % samplesKept
}

// samples are the newest failed and slow requests, newest first.
func (s *stats) samples() (failed, slow []Record) {
	s.smu.Lock()
	defer s.smu.Unlock()
	newest := func(a, b Record) int { return b.Time.Compare(a.Time) }
	failed, slow = slices.Clone(s.failed), slices.Clone(s.slow)
	slices.SortFunc(failed, newest)
	slices.SortFunc(slow, newest)
	return failed, slow
}

// read gives every series as it was counted in the last window, rounded up to
// whole minutes, or since the router started when window is 0. Series with
// nothing in the window are left out.
func (s *stats) read(window time.Duration, now time.Time) []Series {
	s.mu.RLock()
	all := make(map[SeriesKey]*counts, len(s.series))
	for k, c := range s.series {
		all[k] = c
	}
	s.mu.RUnlock()
	since := now.Add(-window).Unix()/60 + 1
	if window > 0 {
		since = min(since, now.Unix()/60)
	}
	var out []Series
	for k, c := range all {
		x := Series{SeriesKey: k, Buckets: make([]int64, latencyBuckets)}
		c.mu.Lock()
		if window <= 0 {
			x.Count, x.Failed, x.Sum = c.count, c.failed, c.sum
			copy(x.Buckets, c.buckets[:])
		} else {
			for i := range c.minutes {
				m := &c.minutes[i]
				if m.at < since {
					continue
				}
				x.Failed += int64(m.failed)
				x.Sum += m.sum
				for j, n := range m.buckets {
					x.Buckets[j] += int64(n)
					x.Count += int64(n)
				}
			}
		}
		c.mu.Unlock()
		if x.Count > 0 {
			out = append(out, x)
		}
	}
	slices.SortFunc(out, func(a, b Series) int { return int(b.Count - a.Count) })
	return out
}

// tidy drops the series of releases that served does not have once half of the
// bound is taken, so that years of deploys do not fill it.
func (s *stats) tidy(served map[int]int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.series) < maxSeries/2 {
		return
	}
	for k := range s.series {
		if served[k.Release] == 0 {
			delete(s.series, k)
		}
	}
}

// Stats are an app's requests as one router saw them.
type Stats struct {
	Series []Series `json:"series"` // the most frequent first
	Failed []Record `json:"failed"` // the newest that went wrong, newest first
	Slow   []Record `json:"slow"`   // the newest that took over a second
}

// Requests is what is known of app's requests: counted over the last window,
// at most 15 minutes, or since this process started when it is 0.
func (rt *Router) Requests(app string, window time.Duration) Stats {
	l := rt.live.Load()
	if l == nil || l.apps.get(app) == nil {
		return Stats{}
	}
	s := &l.apps.get(app).app.stats
	st := Stats{Series: s.read(window, time.Now())}
	st.Failed, st.Slow = s.samples()
	return st
}
