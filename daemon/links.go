package daemon

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"connectrpc.com/connect"

	"github.com/m3o/m3o"
	m3ov1 "github.com/m3o/m3o/api/m3o/v1"
	"github.com/m3o/m3o/auth"
	"github.com/m3o/m3o/store"
)

// A link lets the instances of one app open connections to those of another.
type link struct {
	From, To string
	User     string // who added it
	Created  time.Time
}

func (l link) key() string { return l.To + "/" + l.From }

// A linker is a driver whose instances have networks of their own.
type linker interface {
	SetLinks(allowed map[string][]string) error
}

func openLinks(ctx context.Context, st *store.Store) (*store.Bucket[link], error) {
	return store.NewBucket[link](ctx, st, "links")
}

// allLinks are the links to and from app, "" for every one.
func (d *Daemon) allLinks(ctx context.Context, app string) ([]link, error) {
	entries, err := d.links.List(ctx, "")
	if err != nil {
		return nil, fmt.Errorf("list links: %w", err)
	}
	var all []link
	for _, e := range entries {
		if app == "" || e.Value.To == app || e.Value.From == app {
			all = append(all, e.Value)
		}
	}
	return all, nil
}

// applyLinks has the driver allow what the records say, and nothing else. Who
// enforces it lets a preview reach what its app may: see m3o.ParentOf.
func (d *Daemon) applyLinks(ctx context.Context) error {
	dr, ok := d.driver.(linker)
	if !ok {
		return nil // plain processes reach each other anyhow
	}
	d.linksMu.Lock() // so that an older list does not come after a newer one
	defer d.linksMu.Unlock()
	all, err := d.allLinks(ctx, "")
	if err != nil {
		return err
	}
	allowed := map[string][]string{}
	for _, l := range all {
		allowed[l.From] = append(allowed[l.From], l.To)
	}
	err = dr.SetLinks(allowed)
	if err == nil {
		d.peers.tellSoon(ctx) // a link is there once the router knows
	}
	return err
}

// unlinkApp removes every link to and from an app.
func (d *Daemon) unlinkApp(ctx context.Context, app string) error {
	all, err := d.allLinks(ctx, app)
	if err != nil {
		return err
	}
	for _, l := range all {
		if err := d.links.Delete(ctx, l.key(), 0); err != nil {
			return fmt.Errorf("remove link: %w", err)
		}
	}
	if len(all) == 0 {
		return nil
	}
	return d.applyLinks(ctx)
}

type linksAPI struct{ d *Daemon }

func wireLink(l link) *m3ov1.Link {
	return &m3ov1.Link{From: l.From, To: l.To, User: l.User, Created: stamp(l.Created)}
}

// Add is in links.proto.
func (a linksAPI) Add(ctx context.Context, req *connect.Request[m3ov1.AddLinkRequest]) (*connect.Response[m3ov1.AddLinkResponse], error) {
	d, m := a.d, req.Msg
	m.From = m3o.ParentOf(m.From) // whose links a preview has
	if m.From == "" || m.From == m.App {
		return nil, &m3o.Error{Kind: m3o.Invalid, Msg: "an app reaches its own instances anyhow: name another one", Hint: "m3o links:add OTHER -a " + m.App}
	}
	if err := d.auth.Allow(ctx, who(ctx), auth.AppsRead, m.From); err != nil {
		return nil, err
	}
	if _, err := d.ledger.App(ctx, m.From); err != nil {
		return nil, err
	}
	l := link{From: m.From, To: m.App, User: who(ctx).User, Created: time.Now().UTC()}
	if _, err := d.links.Create(ctx, l.key(), l); m3o.KindOf(err) == m3o.Conflict {
		return nil, &m3o.Error{Kind: m3o.Conflict, Msg: fmt.Sprintf("%s may reach %s already", m.From, m.App), Hint: "m3o links -a " + m.App, Err: err}
	} else if err != nil {
		return nil, fmt.Errorf("record link: %w", err)
	}
	if err := d.applyLinks(ctx); err != nil {
		return nil, errors.Join(err, d.links.Delete(context.WithoutCancel(ctx), l.key(), 0))
	}
	d.log.Info("link added", "app", m.App, "from", m.From, "user", l.User)
	d.tell(m.App, "instances of %s may reach those of this app: links:add by %s", m.From, l.User)
	return connect.NewResponse(&m3ov1.AddLinkResponse{Link: wireLink(l)}), nil
}

// List is in links.proto. A link is shown to who may see either end.
func (a linksAPI) List(ctx context.Context, req *connect.Request[m3ov1.ListLinksRequest]) (*connect.Response[m3ov1.ListLinksResponse], error) {
	all, err := a.d.allLinks(ctx, req.Msg.App)
	if err != nil {
		return nil, err
	}
	res := &m3ov1.ListLinksResponse{}
	for _, l := range all {
		res.Links = append(res.Links, wireLink(l))
	}
	return connect.NewResponse(res), nil
}

// Remove is in links.proto.
func (a linksAPI) Remove(ctx context.Context, req *connect.Request[m3ov1.RemoveLinkRequest]) (*connect.Response[m3ov1.RemoveLinkResponse], error) {
	d, m := a.d, req.Msg
	all, err := d.allLinks(ctx, m.App)
	if err != nil {
		return nil, err
	}
	if !slices.ContainsFunc(all, func(l link) bool { return l.From == m.From && l.To == m.App }) {
		return nil, &m3o.Error{Kind: m3o.NotFound, Msg: fmt.Sprintf("%q has no link to %s", m.From, m.App), Hint: "m3o links -a " + m.App}
	}
	if err := d.links.Delete(ctx, link{From: m.From, To: m.App}.key(), 0); err != nil {
		return nil, fmt.Errorf("remove link: %w", err)
	}
	if err := d.applyLinks(ctx); err != nil {
		return nil, err
	}
	d.log.Info("link removed", "app", m.App, "from", m.From, "user", who(ctx).User)
	return connect.NewResponse(&m3ov1.RemoveLinkResponse{}), nil
}
