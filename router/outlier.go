package router

import (
	"net/http"
	"sync/atomic"
	"time"
)

// How an endpoint that keeps failing is taken out of use for a while though
// its health check is content. The numbers are those of Envoy's outlier
// detection for consecutive gateway failures.
const (
	ejectAfter = 5                // failures in a row
	ejectFor   = 10 * time.Second // times how often it has happened
	ejectMost  = 5 * time.Minute
)

// outlier is the judgement of one endpoint.
type outlier struct {
	failures atomic.Int32 // in a row
	times    atomic.Int32 // ejections since the last long good time
	until    atomic.Int64 // unix nanoseconds; in use again from then on
}

func (o *outlier) ejected(now int64) bool {
	u := o.until.Load()
	return u != 0 && now < u
}

// note takes in how one request ended; it is true when that took the endpoint
// out of use. may says whether enough others are left.
func (o *outlier) note(bad bool, now time.Time, may func() bool) bool {
	if !bad {
		if o.failures.Load() != 0 {
			o.failures.Store(0)
		}
		if u := o.until.Load(); u != 0 && now.UnixNano()-u > int64(ejectMost) {
			o.until.Store(0)
			o.times.Store(0)
		}
		return false
	}
	if o.failures.Add(1) < ejectAfter || o.ejected(now.UnixNano()) || !may() {
		return false
	}
	o.failures.Store(0)
	n := time.Duration(o.times.Add(1))
	o.until.Store(now.Add(min(n*ejectFor, ejectMost)).UnixNano())
	return true
}

// judge counts how a request ended for the endpoint that served it.
func (q *request) judge(x *Record) {
	e := q.call.ep
	if e == nil || len(q.host.pool) < 2 || q.call.isCut() || x.Status == statusGone {
		return
	}
	bad := x.Broken || x.Code == grpcUnavailable ||
		x.Status == http.StatusBadGateway || x.Status == http.StatusServiceUnavailable || x.Status == http.StatusGatewayTimeout
	if !bad && e.outlier.failures.Load() == 0 && e.outlier.until.Load() == 0 {
		return
	}
	now := time.Now()
	if e.outlier.note(bad, now, func() bool { return q.host.inUse(now.UnixNano())*2 > len(q.host.pool) }) {
		q.rt.log.Warn("instance taken out of use for a while: it keeps failing", "app", q.host.App, "release", e.id.n, "endpoint", e.addr)
	}
}

// inUse counts the endpoints that are not ejected.
func (h *host) inUse(now int64) int {
	n := 0
	for _, e := range h.pool {
		if !e.outlier.ejected(now) {
			n++
		}
	}
	return n
}
