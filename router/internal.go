package router

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"strings"

	"github.com/m3o/m3o"
	"github.com/m3o/m3o/discovery"
)

// Inside is the router's side towards the instances: apps call each other
// there, at <app>.internal, and resolve names. Who calls is told by the address
// a call comes from, so what leads here must let nobody choose theirs.
type Inside struct {
	HTTP  net.Listener     // Run closes it
	Names *discovery.Names // its Peers become the router's; Run runs it
}

// callerInstanceHeader tells an app which instance calls, where an app does.
const callerInstanceHeader = "X-M3o-Caller-Instance"

// maxPeersBytes bounds what the daemon may hand over.
const maxPeersBytes = 64 << 20

func (rt *Router) peersFile() string { return rt.cfg.State + ".peers" }

// openInside takes up the peers an earlier router knew.
func (rt *Router) openInside() {
	if rt.cfg.Inside == nil {
		return
	}
	rt.cfg.Inside.Names.Peers = &rt.peers
	p, err := discovery.Load(rt.peersFile())
	if err != nil {
		rt.log.Warn("who is where is unreadable; the daemon tells it again", "err", err)
	}
	rt.peers.Set(p)
}

// PutPeers says who is where, and who may reach whom.
func (rt *Router) PutPeers(p discovery.Peers) error {
	if err := p.Validate(); err != nil {
		return err
	}
	rt.peersMu.Lock()
	defer rt.peersMu.Unlock()
	p = rt.peers.Complete(p)
	rt.peers.Set(p)
	if rt.retiring.Load() {
		return nil // the file is the successor's
	}
	return p.Save(rt.peersFile())
}

// PutPeers is Router.PutPeers.
func (c Client) PutPeers(ctx context.Context, p discovery.Peers) error {
	b, err := json.Marshal(p)
	if err != nil {
		return fmt.Errorf("encode peers: %w", err)
	}
	return c.do(ctx, http.MethodPut, "/peers", b, nil)
}

func (rt *Router) controlPeers(r *http.Request) (any, error) {
	var p discovery.Peers
	if err := json.NewDecoder(io.LimitReader(r.Body, maxPeersBytes)).Decode(&p); err != nil {
		return nil, m3o.Errorf(m3o.Invalid, "decode peers: %w", err)
	}
	return struct{}{}, rt.PutPeers(p)
}

// serveInside relays one call from an app to another. What the caller says of
// itself counts for nothing.
func (rt *Router) serveInside(w http.ResponseWriter, r *http.Request) {
	from := rt.originOf(r)
	r.Header["X-Request-Id"] = []string{from.id}
	at, _ := netip.ParseAddrPort(r.RemoteAddr)
	peer, known := rt.peers.At(at.Addr().Unmap())
	if !known {
		problem{code: http.StatusForbidden, grpc: grpcDenied, msg: "nobody is known at " + at.Addr().String(), hint: "only instances of apps call here"}.write(w, r)
		return
	}
	from.ip, from.proto = at.Addr().Unmap().String(), "http"
	from.caller, from.instance = "app:"+peer.App, peer.ID
	name := hostOf(r.Host)
	app, ok := strings.CutSuffix(name, "."+discovery.Zone)
	switch {
	case !ok || checkApp(app) != nil:
		problem{code: http.StatusNotFound, grpc: grpcUnimplemented, msg: fmt.Sprintf("nothing is served at %q here", shorten(name)), hint: "apps are at http://<app>." + discovery.Zone}.write(w, r)
		return
	case r.Method == http.MethodConnect:
		problem{code: http.StatusMethodNotAllowed, grpc: grpcUnimplemented, msg: "this is no proxy for CONNECT"}.write(w, r)
		return
	case !rt.peers.May(peer.App, app):
		// The same for an app that does not exist: who may not reach it is not told.
		problem{code: http.StatusForbidden, grpc: grpcDenied, app: app, msg: fmt.Sprintf("app %s may not call %s", peer.App, app),
			hint: fmt.Sprintf("m3o links:add %s -a %s allows it", m3o.ParentOf(peer.App), app)}.write(w, r)
		return
	}
	l := rt.live.Load()
	if l == nil {
		problem{code: http.StatusServiceUnavailable, grpc: grpcUnavailable, msg: "the router has no table yet", hint: "start m3od, then try again"}.write(w, r)
		return
	}
	key := app + "." + l.domain
	q := &request{rt: rt, w: w, r: r, key: key, host: l.find(key), origin: from, inside: true, caller: from.caller}
	if q.host == nil || q.host.App != app {
		problem{code: http.StatusNotFound, grpc: grpcUnimplemented, app: app, msg: fmt.Sprintf("no app called %q has been released here", app), hint: "git push m3o main releases it"}.write(w, r)
		return
	}
	if (q.host.Maintenance || q.host.Paused) && !q.await() {
		return // answered
	}
	q.relay("")
}

// shorten bounds a name that a client made up.
func shorten(name string) string { return name[:min(len(name), 253)] }
