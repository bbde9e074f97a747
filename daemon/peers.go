package daemon

import (
	"context"
	"log/slog"
	"net/netip"
	"sync"
	"sync/atomic"
	"time"

	"github.com/m3o/m3o/discovery"
	"github.com/m3o/m3o/router"
)

// A networked driver gives instances addresses of their own, from which they
// reach this host at its Gateway.
type networked interface {
	linker
	Gateway() netip.Addr
	Peers() discovery.Peers
	OnJoin(func(context.Context)) // see oci.Driver
}

// peers keeps the router told of who is where, which is what it knows callers
// of <app>.internal by. Everything it tells can be asked of the driver again.
type peers struct {
	now     func() discovery.Peers // nil when instances have no network of their own
	router  *fleet
	log     *slog.Logger
	settled atomic.Bool   // who is ready is known
	mu      sync.Mutex    // orders what the router is told
	wake    chan struct{} // holds a token when there may be something to tell
}

func newPeers(rt *fleet, log *slog.Logger) *peers {
	return &peers{router: rt, log: log, wake: make(chan struct{}, 1)}
}

// connect has the driver's new instances known before their programs run.
func (p *peers) connect(d driver) {
	n, ok := d.(networked)
	if !ok {
		return
	}
	p.now = n.Peers
	n.OnJoin(p.tellSoon)
}

// joinTime is what the start of an instance waits for the router to know it.
const joinTime = time.Second

// tellSoon tells now if the router takes it, and else when it is back.
func (p *peers) tellSoon(ctx context.Context) {
	if p.now == nil {
		return
	}
	ctx, cancel := context.WithTimeout(ctx, joinTime)
	defer cancel()
	if err := p.tell(ctx); err != nil {
		p.changed()
	}
}

// changed says that there may be something to tell.
func (p *peers) changed() {
	select {
	case p.wake <- struct{}{}:
	default:
	}
}

// settle says that from now on the driver knows who is ready. Before, it has
// not asked yet those that outlived an earlier daemon.
func (p *peers) settle() {
	p.settled.Store(true)
	p.changed()
}

func (p *peers) tell(ctx context.Context) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	all := p.now()
	all.Partial = !p.settled.Load()
	return p.router.PutPeers(ctx, all)
}

// run tells the router of changes until ctx ends.
func (p *peers) run(ctx context.Context) error {
	pause := time.Duration(0)
	for p.now != nil {
		select {
		case <-ctx.Done():
			return nil
		case <-p.wake:
		}
		tctx, cancel := context.WithTimeout(ctx, 10*time.Second)
		err := p.tell(tctx)
		cancel()
		if err == nil || ctx.Err() != nil {
			pause = 0
			continue
		}
		p.log.Warn("router was not told who is where", "err", err)
		p.changed()
		pause = min(max(2*pause, 50*time.Millisecond), 2*time.Second)
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(pause):
		}
	}
	<-ctx.Done()
	return nil
}

// PutPeers tells every router.
func (f *fleet) PutPeers(ctx context.Context, p discovery.Peers) error {
	err := f.Client.PutPeers(ctx, p)
	if err == nil {
		f.follow(ctx, func(ctx context.Context, c router.Client) error { return c.PutPeers(ctx, p) })
	}
	return err
}
