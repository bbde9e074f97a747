package router

import (
	"context"
	"encoding/json"
	"fmt"
	"iter"
	"net/http"
	"net/url"
	"sync"
	"time"

	"github.com/m3o/m3o"
)

// The bounds of waiting for an app that has no instance.
const (
	maxWaiting = 1000 // requests of one app; more are turned away
	maxWait    = 65 * time.Second
)

// A waiting is the requests of one app that wait for its next instance.
type waiting struct {
	n    int           // how many
	ask  bool          // the daemon has to start one
	done chan struct{} // closed by fail
	err  error         // why none comes; set before done is closed
}

// A lobby holds the requests for apps that have no instance now but will:
// those asleep, which the daemon wakes when it is asked, and those whose only
// instance is being replaced. The zero lobby is ready to use.
type lobby struct {
	mu      sync.Mutex // guards what follows
	apps    map[string]*waiting
	changed chan struct{} // closed, and made anew, when there is more to ask for
}

// enter counts a request in; leave counts it out.
func (l *lobby) enter(app string, ask bool) (*waiting, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	w := l.apps[app]
	if w == nil {
		if l.apps == nil {
			l.apps = map[string]*waiting{}
		}
		w = &waiting{done: make(chan struct{})}
		l.apps[app] = w
	}
	if w.n >= maxWaiting {
		return nil, &m3o.Error{Kind: m3o.Unavailable, Msg: fmt.Sprintf("app %s is starting and %d requests wait for it already", app, w.n), Hint: "try again in a moment"}
	}
	w.n++
	if ask {
		l.want(w)
	}
	return w, nil
}

// ask asks for an instance if nobody has yet.
func (l *lobby) ask(w *waiting) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.want(w)
}

// want is ask for who holds mu.
func (l *lobby) want(w *waiting) {
	if w.ask {
		return
	}
	w.ask = true
	if l.changed != nil { // wakes those who follow asks
		close(l.changed)
		l.changed = nil
	}
}

func (l *lobby) leave(app string, w *waiting) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if w.n--; w.n == 0 && l.apps[app] == w {
		delete(l.apps, app)
	}
}

// fail ends the waiting of all requests of an app. Those to come ask anew.
func (l *lobby) fail(app string, err error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if w := l.apps[app]; w != nil {
		w.err = err
		close(w.done)
		delete(l.apps, app)
	}
}

// asks gives the apps to be woken that are not in seen, which it brings up to
// date, and a channel that is closed when there may be more.
func (l *lobby) asks(seen map[*waiting]bool) (apps []string, more <-chan struct{}) {
	l.mu.Lock()
	defer l.mu.Unlock()
	now := map[*waiting]bool{}
	for app, w := range l.apps {
		if !w.ask {
			continue
		}
		now[w] = true
		if !seen[w] {
			seen[w] = true
			apps = append(apps, app)
		}
	}
	for w := range seen {
		if !now[w] {
			delete(seen, w)
		}
	}
	if l.changed == nil {
		l.changed = make(chan struct{})
	}
	return apps, l.changed
}

// wait holds the request until its app has an instance.
func (q *request) wait() error {
	app, key := q.host.App, q.host.wakes()
	w, err := q.rt.lobby.enter(key, q.host.Asleep)
	if err != nil {
		return err
	}
	defer q.rt.lobby.leave(key, w)
	late := time.NewTimer(maxWait)
	defer late.Stop()
	for {
		changed := q.host.app.next() // before the row is read again, or a change between would be missed
		h := q.lookup()
		switch {
		case h == nil:
			return &m3o.Error{Kind: m3o.NotFound, Msg: "app " + app + " was removed"}
		case len(h.pool) > 0 || !h.waits():
			q.host = h
			return nil
		case h.app != q.host.app: // it was removed and made again
			q.host = h
			continue
		case h.Asleep: // it may have been held when the request came
			q.rt.lobby.ask(w)
		}
		select {
		case <-changed:
		case <-w.done:
			return w.err
		case <-late.C:
			return &m3o.Error{Kind: m3o.Unavailable, Msg: fmt.Sprintf("app %s did not start within %v", app, maxWait), Hint: "m3o ps -a " + app + "; m3o logs -a " + app}
		case <-q.r.Context().Done():
			return q.r.Context().Err()
		}
	}
}

// wakes is what the daemon is asked to start for the host: the app or, at a
// release's own host, "app@12".
func (h *Host) wakes() string {
	if h.Kind == KindRelease {
		return fmt.Sprintf("%s@%d", h.App, h.Release)
	}
	return h.App
}

// waits says that requests wait while the host has no endpoint.
func (h *Host) waits() bool { return h.Asleep || h.Hold }

// serveAsks writes a line of JSON for each app that has to be woken.
func (rt *Router) serveAsks(w http.ResponseWriter, r *http.Request) {
	w.Header().Set("Content-Type", "application/x-ndjson")
	rc := http.NewResponseController(w)
	enc := json.NewEncoder(w)
	seen := map[*waiting]bool{}
	for {
		apps, more := rt.lobby.asks(seen)
		for _, app := range apps {
			if enc.Encode(app) != nil {
				return
			}
		}
		if rc.Flush() != nil {
			return
		}
		select {
		case <-r.Context().Done():
			return
		case <-more:
		}
	}
}

// FailWake answers the requests that wait for app with err.
func (rt *Router) FailWake(app string, err error) { rt.lobby.fail(app, err) }

// Asks yields an app each time a request has come for it while it is asleep,
// until ctx ends: once for all requests that wait together; "app@12" for the
// host of release 12 alone. The table with the endpoints is the answer, or
// FailWake of the same name. An error is the last thing it
// yields.
func (c Client) Asks(ctx context.Context) iter.Seq2[string, error] {
	return func(yield func(string, error) bool) {
		res, err := c.ask(ctx, http.MethodGet, "/asks", nil)
		if err != nil {
			yield("", err)
			return
		}
		defer res.Body.Close() //nolint:errcheck // read to the end or given up
		dec := json.NewDecoder(res.Body)
		for {
			var app string
			if err := dec.Decode(&app); err != nil {
				if ctx.Err() == nil {
					yield("", m3o.Errorf(m3o.Unavailable, "the router ended: %w", err))
				}
				return
			}
			if !yield(app, nil) {
				return
			}
		}
	}
}

// FailWake says why an app that was asked for does not start, see Router.FailWake.
func (c Client) FailWake(ctx context.Context, app string, why error) error {
	b, err := json.Marshal(failure{m3o.Unavailable, why.Error(), m3o.HintOf(why)})
	if err != nil {
		return fmt.Errorf("encode failure: %w", err)
	}
	return c.do(ctx, http.MethodPost, "/wake?"+url.Values{"app": {app}}.Encode(), b, nil)
}
