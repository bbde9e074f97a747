package daemon

import (
	"context"
	"fmt"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"syscall"
	"time"

	"github.com/m3o/m3o"
	"github.com/m3o/m3o/router"
)

// fleet is the router and, for a while after an upgrade, those before it that
// let what they have in flight end. They follow the table, too: what they have
// in flight may be a connection that sends more requests.
type fleet struct {
	router.Client
	whole func() router.Table // the table that should be served
	log   *slog.Logger

	mu  sync.Mutex // guards old
	old []router.Client
}

var _ tables = (*fleet)(nil)

// followTime bounds what a deploy waits for an old router.
const followTime = 2 * time.Second

func (f *fleet) retiring() []router.Client {
	f.mu.Lock()
	defer f.mu.Unlock()
	return slices.Clone(f.old)
}

func (f *fleet) add(c router.Client) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.old = append(f.old, c)
}

// drop forgets a router that is gone, with its socket.
func (f *fleet) drop(c router.Client) {
	f.mu.Lock()
	f.old = slices.DeleteFunc(f.old, func(o router.Client) bool { return o == c })
	f.mu.Unlock()
	_ = os.Remove(c.Socket) // its listener does not
}

// Put implements tables.
func (f *fleet) Put(ctx context.Context, t router.Table) (string, error) {
	hash, err := f.Client.Put(ctx, t)
	if err == nil {
		f.follow(ctx, func(ctx context.Context, c router.Client) error { _, err := c.Put(ctx, t); return err })
	}
	return hash, err
}

// Apply implements tables.
func (f *fleet) Apply(ctx context.Context, ch router.Change) (string, error) {
	hash, err := f.Client.Apply(ctx, ch)
	if err == nil {
		f.follow(ctx, func(ctx context.Context, c router.Client) error {
			_, err := c.Apply(ctx, ch)
			if m3o.KindOf(err) == m3o.Conflict {
				_, err = c.Put(ctx, f.whole())
			}
			return err
		})
	}
	return hash, err
}

// follow has the old routers take a table. One that cannot, because it does
// not know what is in it, must not serve on.
func (f *fleet) follow(ctx context.Context, give func(context.Context, router.Client) error) {
	ctx, cancel := context.WithTimeout(ctx, followTime)
	defer cancel()
	for _, c := range f.retiring() {
		switch err := give(ctx, c); m3o.KindOf(err) {
		case m3o.Unavailable:
			f.drop(c)
		case m3o.Invalid:
			f.log.Warn("a router of the version before does not take the table; it ends", "err", err)
			f.end(ctx, c)
			f.drop(c)
		}
	}
}

// end asks a router to stop now, which lets it say goodbye.
func (f *fleet) end(ctx context.Context, c router.Client) {
	if st, err := c.Status(ctx); err == nil {
		_ = syscall.Kill(st.PID, syscall.SIGTERM) // it was there a moment ago
	}
}

// Drain waits for an old release's requests in every router.
func (f *fleet) Drain(ctx context.Context, app string, release int) (router.Drained, error) {
	d, err := f.Client.Drain(ctx, app, release)
	for _, c := range f.retiring() {
		more, oerr := c.Drain(ctx, app, release)
		if oerr == nil {
			d.Waited, d.Cut = d.Waited+more.Waited, d.Cut+more.Cut
		}
	}
	return d, err
}

// routerVersion is what a router is told apart by: its binary, and the
// settings that it has from its start.
func routerVersion(cfg Config, version string) string {
	return fmt.Sprintf("%s http=%s https=%s acme=%t proxies=%s proxy-protocol=%t http3=%t inside=%s/%s otlp=%s@%s", version, cfg.HTTP, cfg.HTTPS, cfg.ACME(), cfg.TrustedProxies, cfg.ProxyProtocol, cfg.HTTP3, cfg.Runtime, cfg.Name, cfg.OTLPEndpoint, cfg.OTLPSample)
}

// upgradeRouter has a new router take over from the one that runs, on the same
// sockets. When that fails the old one goes on.
func (d *Daemon) upgradeRouter(ctx context.Context, st router.Status) error {
	files, err := d.fleet.Listeners(ctx)
	if err != nil {
		// One from before there was a hand-over, or one that is stuck.
		d.log.Warn("the router that runs hands nothing over and is replaced", "err", err)
		if err := d.stopRouter(ctx); err != nil {
			return err
		}
		return d.spawnRouter(ctx, nil)
	}
	defer func() {
		for _, f := range files {
			_ = f.Close()
		}
	}()
	old := router.Client{Socket: d.cfg.path("run", fmt.Sprintf("router-%d.sock", st.PID))}
	if err := os.Rename(d.controlSocket(), old.Socket); err != nil {
		return fmt.Errorf("set the old router's socket aside: %w", err)
	}
	d.log.Info("router of another version found running; a new one takes over", "pid", st.PID)
	if err := d.spawnRouter(ctx, files); err != nil {
		d.log.Error("the new router does not start; the old one goes on", "err", err)
		return os.Rename(old.Socket, d.controlSocket())
	}
	if err := old.Retire(ctx, d.cfg.Handover); err != nil {
		if _, serr := old.Status(ctx); serr == nil {
			return err
		}
		d.log.Warn("the old router ended when it was told to go", "err", err) // the new one serves
	}
	d.fleet.add(old)
	return nil
}

// findRetiring takes up the routers that an earlier daemon retired.
func (d *Daemon) findRetiring(ctx context.Context) {
	socks, err := filepath.Glob(d.cfg.path("run", "router-*.sock"))
	if err != nil {
		return // the pattern is a constant
	}
	for _, s := range socks {
		c := router.Client{Socket: s}
		sctx, cancel := context.WithTimeout(ctx, followTime)
		if _, err := c.Status(sctx); err == nil && c.Retire(sctx, d.cfg.Handover) == nil {
			d.fleet.add(c)
		} else {
			d.fleet.drop(c)
		}
		cancel()
	}
}

// handed is the listener that an old router handed over for addr, nil when it
// has another port.
func handed(files map[string]*os.File, what, addr string) *os.File {
	f := files[what]
	if f == nil {
		return nil
	}
	var at string
	if ln, err := net.FileListener(f); err == nil {
		at = ln.Addr().String()
		_ = ln.Close() // a copy, to be asked
	} else if pc, err := net.FilePacketConn(f); err == nil {
		at = pc.LocalAddr().String()
		_ = pc.Close()
	}
	_, have, _ := net.SplitHostPort(at)
	if _, want, _ := net.SplitHostPort(addr); have == "" || have != want && want != "0" {
		return nil
	}
	return f
}
