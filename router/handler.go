package router

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"strconv"
	"strings"
	"time"

	"github.com/m3o/m3o"
)

// request is one request on its way through the router.
type request struct {
	rt     *Router
	w      http.ResponseWriter
	r      *http.Request
	key    string // what host was found by: a host name, or an app when byApp
	byApp  bool
	host   *host
	origin origin
	call   call
	held   bool // call is counted on call.ep
	tried  []*endpoint
	rec    recorder    // what w is
	caller string      // who was let in, "" when nobody had to say
	inside bool        // an app calls, which a link lets in
	why    string      // why the router answered in the app's stead
	body   *clientBody // the client's body where another goroutine reads it, else nil
	traced *traced     // nil when nobody is sent its spans

	toCanary bool // host is the canary of the one that was found
}

// maxTries is to how many endpoints one request may be sent.
const maxTries = 3

// ServeHTTP relays one request.
func (rt *Router) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	name := hostOf(r.Host)
	from := rt.originOf(r)
	r.Header["X-Request-Id"] = []string{from.id} // for the answers of the router itself, too
	secure := from.proto == "https"
	if r.TLS != nil && r.TLS.ServerName != "" && hostOf(r.TLS.ServerName) != name {
		// A connection made for one host carries no other's requests: the
		// client must open its own.
		problem{code: http.StatusMisdirectedRequest, grpc: grpcUnavailable, msg: "this connection was opened for another host", hint: "open a new one"}.write(w, r)
		return
	}
	if strings.HasPrefix(r.URL.Path, challengePath) && rt.answerChallenge(w, r, name) {
		return
	}
	l := rt.live.Load()
	if l == nil {
		problem{code: http.StatusServiceUnavailable, grpc: grpcUnavailable, msg: "the router has no table yet", hint: "start m3od, then try again"}.write(w, r)
		return
	}
	q := &request{rt: rt, w: w, r: r, key: name, host: l.find(name), origin: from}
	if q.host == nil {
		rt.notFound(w, r, l, name)
		return
	}
	if r.Method == http.MethodConnect {
		problem{code: http.StatusMethodNotAllowed, grpc: grpcUnimplemented, msg: "this is no proxy for CONNECT"}.write(w, r)
		return
	}
	if q.host.Redirect != "" {
		rt.redirect(w, r, q.host.Redirect, secure || rt.redirects(l, q.host.Redirect))
		return
	}
	if !secure && rt.redirects(l, name) {
		rt.redirect(w, r, name, true)
		return
	}
	rest := ""
	if q.host.Kind == KindAPI && !daemonPath(r.URL.Path) {
		if rest = q.appPath(l); q.host == nil {
			return // answered
		}
	}
	if (q.host.Maintenance || q.host.Paused) && !q.await() {
		return // answered
	}
	q.relay(rest)
}

// relay counts the request, serves it and records how it went.
func (q *request) relay(rest string) {
	began, broken := time.Now(), true
	q.rec.ResponseWriter, q.rec.clock, q.w = q.w, &q.rt.clock, &q.rec
	q.rec.last = q.r.ProtoMajor == 1 && q.rt.retiring.Load()
	if q.rt.altSvc != "" && q.r.TLS != nil && q.r.ProtoMajor < 3 && !q.rt.retiring.Load() {
		q.rec.altSvc = q.rt.altSvc
	}
	a, own := q.host.app, q.host.own
	a.requests.Add(1)
	a.inflight.Add(1)
	if own != nil {
		own.requests.Add(1)
		own.inflight.Add(1)
	}
	q.follow()
	defer func() {
		q.record(began, broken)
		if q.rec.body != nil { // else nobody reads it but the handler
			q.rec.body.end()
		}
		if q.held {
			q.call.done()
		}
		a.inflight.Add(-1)
		if own != nil {
			own.inflight.Add(-1)
		}
	}()
	if q.admit(rest) {
		q.divide()
		if err := q.acquire(); err != nil {
			q.failed("no endpoint", err)
			problemOf(err, q.host.App).write(q.w, q.r)
		} else {
			if q.traced != nil {
				q.traced.sent = time.Now()
			}
			q.serve(rest)
		}
	}
	broken = false
}

func (q *request) serve(rest string) {
	h, r, gw := q.host, q.r, q.rt.cfg.Gateway
	grpc := isGRPC(r)
	switch up := upgradeTo(r); {
	case q.byApp && !h.grpc:
		problem{code: http.StatusUnsupportedMediaType, grpc: grpcUnimplemented, app: h.App, msg: "app " + h.App + " speaks HTTP, not gRPC",
			hint: "call it at its own host, " + h.Name}.write(q.w, r)
	case q.byApp && gw != nil:
		q.forGateway()
		gw.ServePath(q.w, r, h.api, rest, gatewayWay{q})
	case h.grpc && gw != nil && gw.Match(r, h.api):
		q.forGateway()
		gw.ServeApp(q.w, r, h.api, gatewayWay{q})
	case h.grpc && !grpc:
		problem{code: http.StatusNotImplemented, app: h.App, msg: "app " + h.App + " speaks gRPC only",
			hint: "call it with a gRPC client, or POST JSON to /package.Service/Method"}.write(q.w, r)
	case up != "":
		q.relayUpgrade(up)
	case h.h2:
		q.relayH2()
	case grpc && h.Kind != KindAPI:
		problem{code: http.StatusOK, grpc: grpcUnimplemented, app: h.App, msg: "app " + h.App + " does not speak gRPC"}.write(q.w, r)
	default:
		q.relayH1()
	}
}

// forGateway makes the request what a Gateway is to see.
func (q *request) forGateway() {
	q.claim(q.r.Header)
	if q.traced != nil {
		q.traced.gateway, q.traced.sent = q.traced.sent, time.Time{}
	}
	if q.r.ContentLength != 0 {
		q.r.Body = q.shareBody()
	}
}

// daemonPath says that a path of the API host is for the daemon itself.
func daemonPath(p string) bool {
	return p == "/" || strings.HasPrefix(p, "/m3o.v1.") || strings.HasPrefix(p, "/-/") || strings.HasPrefix(p, "/hooks/")
}

// appPath finds the app of api.<domain>/<app>/<rest>. M3O's /v1/<app>/… is
// taken for version v1 of the app, as there. q.host is nil when it answered.
func (q *request) appPath(l *live) (rest string) {
	q.byApp = true
	name, rest, _ := strings.Cut(strings.TrimPrefix(q.r.URL.Path, "/"), "/")
	key := strings.ToLower(name)
	h := l.apps.get(key)
	if h == nil && isVersion(key) && rest != "" {
		second, more, _ := strings.Cut(rest, "/")
		if h = l.apps.get(strings.ToLower(second)); h != nil {
			key, rest = strings.ToLower(second), key+"/"+more
		}
	}
	q.key, q.host = key, h
	if h == nil {
		if len(name) > 64 {
			name = name[:64]
		}
		problem{code: http.StatusNotFound, grpc: grpcUnimplemented, msg: fmt.Sprintf("there is no app called %q here", name),
			hint: "paths are /<app>/<service>/<method>; m3o apps lists the apps"}.write(q.w, q.r)
	}
	return rest
}

func isVersion(s string) bool {
	if len(s) < 2 || s[0] != 'v' {
		return false
	}
	_, err := strconv.ParseUint(s[1:], 10, 16)
	return err == nil
}

func (rt *Router) notFound(w http.ResponseWriter, r *http.Request, l *live, name string) {
	if len(name) > 253 {
		name = name[:253]
	}
	p := problem{code: http.StatusNotFound, grpc: grpcUnimplemented, msg: fmt.Sprintf("nothing is served at %q", name)}
	if app, ok := strings.CutSuffix(name, "."+l.domain); ok && m3o.CheckAppName(app) == nil {
		p.msg = fmt.Sprintf("no app called %q has been released here", app)
		p.hint = "git push m3o main releases it; m3o create " + app + " makes it first"
	}
	p.write(w, r)
}

// redirects says whether name is served over TLS only.
func (rt *Router) redirects(l *live, name string) bool {
	switch rt.cfg.Plain {
	case PlainServe:
		return false
	case PlainRedirect:
		return true
	}
	d := l.domain
	switch {
	case rt.cfg.HTTPS == nil || d == "localhost" || strings.HasSuffix(d, ".localhost"):
		return false
	case name == d || strings.HasSuffix(name, "."+d):
		return true
	}
	// A domain of the app's own: not before there is a certificate to go to.
	return rt.certs != nil && rt.certs.has(name)
}

// redirect sends the client to name, with the same path and query.
func (rt *Router) redirect(w http.ResponseWriter, r *http.Request, name string, secure bool) {
	scheme, ln, standard := "https", rt.cfg.HTTPS, "443"
	if !secure {
		scheme, ln, standard = "http", rt.cfg.HTTP, "80"
	}
	host := name
	if ln != nil {
		if _, port, err := net.SplitHostPort(ln.Addr().String()); err == nil && port != standard {
			host = net.JoinHostPort(name, port)
		}
	}
	if isGRPC(r) {
		problem{code: http.StatusPermanentRedirect, grpc: grpcUnavailable, msg: "this host is served at " + scheme + "://" + host + " only", hint: "dial " + host}.write(w, r)
		return
	}
	to := target(r)
	if to == "*" {
		to = "/"
	}
	w.Header()["Content-Type"] = nil
	w.Header()["Location"] = []string{scheme + "://" + host + to}
	w.WriteHeader(http.StatusPermanentRedirect)
}

// lookup finds the host again, in the table of now.
func (q *request) lookup() *host {
	l := q.rt.live.Load()
	h := l.find(q.key)
	if q.byApp {
		h = l.apps.get(q.key)
	}
	if h != nil && q.toCanary && h.canary != nil && len(h.canary.pool) > 0 {
		return h.canary
	}
	return h
}

// acquire counts the request in on an endpoint of its host.
func (q *request) acquire() error {
	for {
		e := q.host.pick(q.tried)
		if e == nil && q.tried == nil && len(q.host.pool) == 0 && q.host.waits() {
			if err := q.wait(); err != nil {
				return err
			}
			continue
		}
		if e == nil {
			return errNoEndpoint(q.host)
		}
		if e.add(&q.call) {
			q.held = true
			return nil
		}
		// e was retired since the host was looked up, so a newer table is live.
		h := q.lookup()
		if h == nil {
			return &m3o.Error{Kind: m3o.NotFound, Msg: "app " + q.host.App + " was removed"}
		}
		if q.tried != nil && (h.grpc != q.host.grpc || h.h2 != q.host.h2) {
			return errNoEndpoint(q.host) // the request is already in a form the new release does not speak
		}
		q.host = h
	}
}

// next moves the request to another endpoint after a dial failed with err;
// false when there is none or it has been tried enough.
func (q *request) next(err error) bool {
	q.rt.log.Debug("dial failed", "app", q.host.App, "release", q.host.Release, "err", err)
	if q.clientGone() {
		return false
	}
	q.tried = append(q.tried, q.call.ep)
	q.call.done()
	q.held = false
	return len(q.tried) < maxTries && q.acquire() == nil
}

// failed counts and logs a request the app did not get to answer.
func (q *request) failed(what string, err error) {
	if q.clientGone() && errors.Is(q.r.Context().Err(), context.Canceled) {
		return // the client's own choice
	}
	q.host.app.failures.Add(1)
	q.why = what
	q.rt.log.Debug(what, "app", q.host.App, "release", q.host.Release, "err", err)
}

// deny answers after every dial failed.
func (q *request) deny(err error) {
	if q.clientGone() {
		panic(http.ErrAbortHandler) // nobody listens
	}
	q.failed("cannot reach the app", err)
	p := problemOf(q.unreachable(err), q.host.App)
	if q.host.Kind != KindAPI {
		p.code = http.StatusBadGateway
	}
	p.write(q.w, q.r)
}

func (q *request) unreachable(err error) error {
	if q.host.Kind == KindAPI {
		return errNoEndpoint(q.host)
	}
	return &m3o.Error{Kind: m3o.Unavailable, Msg: "app " + q.host.App + " cannot be reached", Hint: "m3o ps -a " + q.host.App, Err: err}
}

// claim puts what the router knows of the origin into h, and takes out what
// the client claimed.
func (q *request) claim(h http.Header) {
	for k := range h {
		if k == "Forwarded" || k == "X-Real-Ip" || strings.HasPrefix(k, "X-Forwarded-") || strings.HasPrefix(k, "X-M3o-") {
			delete(h, k)
		}
	}
	h["X-Forwarded-For"] = []string{q.origin.ip}
	h["X-Forwarded-Proto"] = []string{q.origin.proto}
	h["X-Forwarded-Host"] = []string{q.origin.host}
	h["X-Request-Id"] = []string{q.origin.id}
	h["Traceparent"] = []string{q.origin.trace}
	if q.origin.newTrace {
		delete(h, "Tracestate")
	}
	if q.caller != "" {
		h[callerHeader] = []string{q.caller}
	}
	if q.origin.instance != "" {
		h[callerInstanceHeader] = []string{q.origin.instance}
	}
}

// callerHeader tells an app who was let in: "key:ID", "user:NAME" or, for a call
// of another app, "app:NAME". What a client sends of it is taken out.
const callerHeader = "X-M3o-Caller"
