package router

import (
	"encoding/json"
	"errors"
	"fmt"
	"hash/maphash"
	"io/fs"
	"maps"
	"os"
	"sync"
	"time"

	"github.com/m3o/m3o/internal/atomicfile"
)

// limitID names one count: a limit of an app, or of one of its keys, and who
// it counts. A limit that is changed counts anew.
type limitID struct {
	app, scope string
	limit      RateLimit
	subject    string
}

const (
	limitShards = 32
	// maxCounts bounds the memory of a flood from many addresses; beyond it the
	// counts that have recovered are dropped, then any.
	maxCounts = 4_000 // of a shard
)

// limiter counts requests. Rates are kept as GCRA does (ITU-T I.371): one
// moment a subject, until which what it has used lasts.
type limiter struct {
	seed   maphash.Seed
	shards [limitShards]limitShard
}

type limitShard struct {
	mu     sync.Mutex // guards what follows
	rates  map[limitID]int64
	quotas map[limitID]quota
}

// quota is what has been used of a quota in one window.
type quota struct {
	Window int64 `json:"window"` // number of the window since 1970
	Used   int64 `json:"used"`
}

func newLimiter() *limiter { return &limiter{seed: maphash.MakeSeed()} }

func (m *limiter) shard(id limitID) *limitShard {
	return &m.shards[maphash.Comparable(m.seed, id)%limitShards]
}

// take counts one request, or says how long to wait for the next to be allowed.
func (m *limiter) take(id limitID, now time.Time) (wait time.Duration, ok bool) {
	s := m.shard(id)
	s.mu.Lock()
	defer s.mu.Unlock()
	if id.limit.Quota {
		w := now.Unix() / id.limit.Seconds
		q := s.quotas[id]
		if q.Window != w {
			q = quota{Window: w}
		}
		if q.Used >= id.limit.Requests {
			return time.Unix((w+1)*id.limit.Seconds, 0).Sub(now), false
		}
		q.Used++
		if s.quotas == nil {
			s.quotas = map[limitID]quota{}
		}
		s.quotas[id] = q
		return 0, true
	}
	window := id.limit.Seconds * int64(time.Second)
	each := max(1, window/id.limit.Requests)
	t := now.UnixNano()
	at := max(s.rates[id], t)
	if at+each-t > window {
		return time.Duration(at + each - t - window), false
	}
	if s.rates == nil {
		s.rates = map[limitID]int64{}
	}
	if len(s.rates) >= maxCounts {
		for k, v := range s.rates {
			if v <= t || len(s.rates) >= maxCounts {
				delete(s.rates, k)
			}
		}
	}
	s.rates[id] = at + each
	return 0, true
}

// forget drops the counts of an app that is gone: the next one of its name
// has not used anything.
func (m *limiter) forget(app string) {
	for i := range m.shards {
		s := &m.shards[i]
		s.mu.Lock()
		maps.DeleteFunc(s.rates, func(id limitID, _ int64) bool { return id.app == app })
		maps.DeleteFunc(s.quotas, func(id limitID, _ quota) bool { return id.app == app })
		s.mu.Unlock()
	}
}

// keptQuota is a quota as it is on disk.
type keptQuota struct {
	App     string    `json:"app"`
	Scope   string    `json:"scope,omitempty"`
	Limit   RateLimit `json:"limit"`
	Subject string    `json:"subject,omitempty"`
	quota
}

// save writes the quotas that still count, for load after a restart.
func (m *limiter) save(file string, now time.Time) error {
	var all []keptQuota
	for i := range m.shards {
		s := &m.shards[i]
		s.mu.Lock()
		for id, q := range s.quotas {
			if q.Window != now.Unix()/id.limit.Seconds {
				delete(s.quotas, id)
				continue
			}
			all = append(all, keptQuota{id.app, id.scope, id.limit, id.subject, q})
		}
		s.mu.Unlock()
	}
	if len(all) == 0 {
		if err := os.Remove(file); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("keep quotas: %w", err)
		}
		return nil
	}
	b, err := json.Marshal(all)
	if err != nil {
		return fmt.Errorf("keep quotas: %w", err)
	}
	if err := atomicfile.Write(file, b, 0o600); err != nil {
		return fmt.Errorf("keep quotas: %w", err)
	}
	return nil
}

// load reads what save wrote; no file is no error.
func (m *limiter) load(file string) error {
	b, err := os.ReadFile(file)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	var all []keptQuota
	if err == nil {
		err = json.Unmarshal(b, &all)
	}
	if err != nil {
		return fmt.Errorf("read quotas: %w", err)
	}
	for _, k := range all {
		id := limitID{k.App, k.Scope, k.Limit, k.Subject}
		s := m.shard(id)
		s.mu.Lock()
		if s.quotas == nil {
			s.quotas = map[limitID]quota{}
		}
		s.quotas[id] = k.quota
		s.mu.Unlock()
	}
	return nil
}
