package runtime

import (
	"context"
	"slices"
	"sync"

	"github.com/m3o/m3o"
)

// backlog is how many changes a watcher may be behind before it is cut off.
const backlog = 4096

// A hub tells any number of watchers about changes, in order.
type hub struct {
	mu       sync.Mutex // guards watchers
	watchers []*watcher
}

type watcher struct {
	changes chan m3o.Instance
	lost    chan struct{} // closed when changes was full
}

// publish hands a change to every watcher; it never blocks.
func (h *hub) publish(in m3o.Instance) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.watchers = slices.DeleteFunc(h.watchers, func(w *watcher) bool {
		select {
		case w.changes <- in:
			return false
		default:
			close(w.lost)
			return true
		}
	})
}

func (h *hub) subscribe() *watcher {
	w := &watcher{make(chan m3o.Instance, backlog), make(chan struct{})}
	h.mu.Lock()
	defer h.mu.Unlock()
	h.watchers = append(h.watchers, w)
	return w
}

func (h *hub) unsubscribe(w *watcher) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.watchers = slices.DeleteFunc(h.watchers, func(o *watcher) bool { return o == w })
}

// each yields the snapshot, the marker, then changes until ctx ends.
func (w *watcher) each(ctx context.Context, now []m3o.Instance, yield func(m3o.Instance, error) bool) {
	for _, in := range append(now, m3o.Instance{}) {
		if !yield(in, nil) {
			return
		}
	}
	for {
		select {
		case <-ctx.Done():
			return
		case in := <-w.changes:
			if !yield(in, nil) {
				return
			}
		case <-w.lost:
			yield(m3o.Instance{}, m3o.Errorf(m3o.Unavailable, "fell %d instance changes behind", backlog))
			return
		}
	}
}
