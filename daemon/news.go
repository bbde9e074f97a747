package daemon

import (
	"context"
	"time"

	"github.com/m3o/m3o"
	"github.com/m3o/m3o/runtime"
)

// news is a change of an instance.
type news struct{ old, now m3o.Instance }

// seed makes fresh, a list that may be a moment old, all the instances there
// are, and says what that changed. The caller holds mu.
func (r *routes) seed(fresh map[string]m3o.Instance) (all []news) {
	was := r.instances
	r.instances, r.byApp = map[string]m3o.Instance{}, map[string]map[string]bool{}
	for id, in := range fresh {
		old := was[id]
		if old.At.After(in.At) {
			in = old // what made it so is yet to come
		}
		r.insert(in)
		if old.Phase != in.Phase || old.Addr != in.Addr {
			all = append(all, news{old, in})
		}
	}
	for id, old := range was {
		if _, ok := fresh[id]; !ok {
			all = append(all, news{old: old})
		}
	}
	r.touch("")
	return all
}

// follow takes in the driver's events until ctx ends. What came about while
// they were broken off is told like the rest, but for the first time.
func (r *routes) follow(ctx context.Context, d runtime.Driver) error {
	for again := false; ctx.Err() == nil; again = true {
		fresh := map[string]m3o.Instance{}
		seeded := false
		for in, err := range d.Events(ctx) {
			if err != nil {
				if ctx.Err() == nil {
					r.log.Error("instance events broke off", "err", err)
				}
				break
			}
			r.mu.Lock()
			old := r.instances[in.ID]
			var tell []news
			switch {
			case in.ID == "": // all that exist have been told
				seeded = true
				if tell = r.seed(fresh); !again {
					tell = nil
				}
			case !seeded:
				fresh[in.ID] = in
			case r.merge(in):
				r.touch(in.App)
				tell = []news{{old, in}}
			}
			r.mu.Unlock()
			for _, n := range tell {
				r.told(n.old, n.now)
			}
		}
		select {
		case <-ctx.Done():
		case <-time.After(100 * time.Millisecond):
		}
	}
	return nil
}
