package router

import (
	"net/http"
	"time"
)

// await is asked when the app is in maintenance or paused: it answers the
// request and returns false, or returns true once the app takes it again,
// with the row of now.
func (q *request) await() bool {
	var deadline <-chan time.Time
	for {
		a := q.host.app
		changed := a.next() // before the row is read again, or a change between would be missed
		h := q.lookup()
		switch {
		case h == nil:
			q.rt.notFound(q.w, q.r, q.rt.live.Load(), q.key)
			return false
		case h.Maintenance:
			problem{code: http.StatusServiceUnavailable, grpc: grpcUnavailable, app: h.App, msg: "app " + h.App + " is down for maintenance",
				hint: "come back later; its owner ends it with m3o maintenance:off -a " + h.App}.write(q.w, q.r)
			return false
		case !h.Paused:
			q.host = h
			return true
		case h.app != a:
			q.host = h
			continue
		}
		if deadline == nil {
			if a.held.Add(1) > int64(q.rt.limits.Held) {
				a.held.Add(-1)
				q.paused("too many requests wait for it")
				return false
			}
			defer a.held.Add(-1)
			t := time.NewTimer(q.rt.limits.Hold)
			defer t.Stop()
			deadline = t.C
		}
		select {
		case <-changed:
		case <-q.r.Context().Done():
			panic(http.ErrAbortHandler) // nobody listens
		case <-deadline:
			q.paused("this request has waited as long as it may")
			return false
		}
	}
}

func (q *request) paused(why string) {
	q.host.app.failures.Add(1)
	problem{code: http.StatusServiceUnavailable, grpc: grpcUnavailable, app: q.host.App, msg: "app " + q.host.App + " is paused, and " + why,
		hint: "try again; its owner ends the pause with m3o resume -a " + q.host.App}.write(q.w, q.r)
}
