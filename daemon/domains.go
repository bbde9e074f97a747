package daemon

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strings"
	"time"

	"github.com/m3o/m3o"
	"github.com/m3o/m3o/store"
)

// domain is the record of one host that is somebody's own. It stays a while
// after its app lost it: whose DNS still points here must not find another
// user's app there.
type domain struct {
	Name     string
	App      string // "" once it was removed
	Owner    string // of the app
	User     string // who added it
	Redirect string // where requests are sent on to, "" to serve the app
	Created  time.Time
	Freed    time.Time // when it was removed
}

const (
	// freedFor is how long a removed domain is kept for its owner.
	freedFor   = 7 * 24 * time.Hour
	maxDomains = 100 // of one app
)

// hosting keeps domains and what operators set apps to.
type hosting struct {
	domains *store.Bucket[domain]
	modes   *store.Bucket[modeRecord]
}

// modeRecord is a mode at rest.
type modeRecord struct{ Maintenance, Paused bool }

func openHosting(ctx context.Context, st *store.Store) (h hosting, err error) {
	if h.domains, err = store.NewBucket[domain](ctx, st, "domains"); err != nil {
		return h, fmt.Errorf("open domains: %w", err)
	}
	if h.modes, err = store.NewBucket[modeRecord](ctx, st, "modes"); err != nil {
		return h, fmt.Errorf("open modes: %w", err)
	}
	return h, nil
}

// checkDomain is name in lower case, if an app may be served at it.
func checkDomain(name, platform string) (string, error) {
	name = strings.ToLower(strings.TrimSuffix(name, "."))
	bad := func(why, hint string) error {
		return &m3o.Error{Kind: m3o.Invalid, Msg: fmt.Sprintf("domain %q %s", name, why), Hint: hint}
	}
	bare := strings.TrimPrefix(name, "*.")
	if _, err := netip.ParseAddr(bare); err == nil {
		return "", bad("is an address", "name a domain such as shop.example.com")
	}
	for _, c := range bare {
		if c > 0x7e {
			return "", bad("is not ASCII", "give it as DNS has it, with xn--")
		}
	}
	labels := strings.Split(bare, ".")
	if len(bare) > 253 || len(labels) < 2 {
		return "", bad("is no domain name", "name one such as shop.example.com")
	}
	for _, l := range labels {
		if l == "" || len(l) > 63 || l[0] == '-' || l[len(l)-1] == '-' || strings.Trim(l, "abcdefghijklmnopqrstuvwxyz0123456789-_") != "" {
			return "", bad("is no domain name", "name one such as shop.example.com")
		}
	}
	if bare == platform || strings.HasSuffix(bare, "."+platform) {
		return "", bad("is the platform's own", "apps are served at <app>."+platform+" by their name: m3o create")
	}
	return name, nil
}

// overlaps says that one of two domains has the other's names under it.
func overlaps(a, b string) bool {
	a, b = strings.TrimPrefix(a, "*."), strings.TrimPrefix(b, "*.")
	return a == b || strings.HasSuffix(a, "."+b) || strings.HasSuffix(b, "."+a)
}

// mayClaim says whether an app of owner may be served at name, given the
// domains there are. An admin may split a domain between owners.
func mayClaim(all []domain, name, app, owner string, admin bool, now time.Time) error {
	taken := func(msg, hint string) error { return &m3o.Error{Kind: m3o.Conflict, Msg: msg, Hint: hint} }
	n := 0
	for _, d := range all {
		freed := d.App == ""
		if freed && now.Sub(d.Freed) > freedFor {
			continue
		}
		switch {
		case d.App == app && d.Name == name:
			return taken(app+" is served at "+name+" already", "m3o domains -a "+app)
		case d.Name == name && !freed:
			return taken(name+" belongs to another app", "remove it there first: m3o domains:remove "+name)
		case overlaps(d.Name, name) && d.Owner != owner && !admin:
			return taken(name+" overlaps a domain of another owner", "have that owner or an admin add it")
		case d.App == app:
			n++
		}
	}
	if n >= maxDomains {
		return taken(fmt.Sprintf("%s has %d domains, the most an app may have", app, n), "m3o domains:remove")
	}
	return nil
}

func (d *Daemon) allDomains(ctx context.Context) ([]domain, error) {
	entries, err := d.hosting.domains.List(ctx, "")
	if err != nil {
		return nil, fmt.Errorf("list domains: %w", err)
	}
	out := make([]domain, len(entries))
	for i, e := range entries {
		out[i] = e.Value
	}
	return out, nil
}

func (d *Daemon) domainsOf(ctx context.Context, app string) ([]domain, error) {
	all, err := d.allDomains(ctx)
	return slices.DeleteFunc(all, func(x domain) bool { return x.App != app }), err
}

// addDomains claims names for app; all of them or none.
func (d *Daemon) addDomains(ctx context.Context, app m3o.App, user string, admin bool, want []domain) error {
	d.domainsMu.Lock() // the rules look at all domains
	defer d.domainsMu.Unlock()
	all, err := d.allDomains(ctx)
	if err != nil {
		return err
	}
	now := time.Now().UTC()
	for i := range want {
		if err := mayClaim(all, want[i].Name, app.Name, app.Owner, admin, now); err != nil {
			return err
		}
		want[i].App, want[i].Owner, want[i].User, want[i].Created = app.Name, app.Owner, user, now
		if r := want[i].Redirect; r != "" && !slices.ContainsFunc(append(all, want...), func(x domain) bool { return x.App == app.Name && x.Name == r && x.Redirect == "" }) {
			return &m3o.Error{Kind: m3o.Invalid, Msg: fmt.Sprintf("%s cannot redirect to %s, which is no domain of %s", want[i].Name, r, app.Name), Hint: "m3o domains:add " + r + " -a " + app.Name}
		}
	}
	for _, w := range want {
		if _, err := d.hosting.domains.Put(ctx, w.Name, w); err != nil {
			return fmt.Errorf("keep domain: %w", err)
		}
	}
	if err := d.routeDomains(ctx, app.Name); err != nil {
		return err
	}
	for _, w := range want {
		d.wantCertificate(ctx, w.Name)
	}
	d.log.Info("domain added", "app", app.Name, "user", user, "host", want[0].Name)
	return nil
}

// removeDomain takes a domain from app.
func (d *Daemon) removeDomain(ctx context.Context, app, name string) (domain, error) {
	d.domainsMu.Lock()
	defer d.domainsMu.Unlock()
	x, rev, err := d.hosting.domains.Get(ctx, name)
	if m3o.KindOf(err) == m3o.NotFound || err == nil && x.App != app {
		return x, &m3o.Error{Kind: m3o.NotFound, Msg: app + " is not served at " + name, Hint: "m3o domains -a " + app}
	} else if err != nil {
		return x, fmt.Errorf("read domain: %w", err)
	}
	gone := x
	gone.App, gone.Freed = "", time.Now().UTC()
	if _, err := d.hosting.domains.Update(ctx, name, gone, rev); err != nil {
		return x, fmt.Errorf("remove domain: %w", err)
	}
	if d.certs != nil {
		d.certs.Forget(name)
	}
	return x, d.routeDomains(ctx, app)
}

// dropHosting forgets what an app that is gone had.
func (d *Daemon) dropHosting(ctx context.Context, app string) error {
	mine, err := d.domainsOf(ctx, app)
	if err != nil {
		return err
	}
	for _, x := range mine {
		if _, rerr := d.removeDomain(ctx, app, x.Name); rerr != nil {
			err = errors.Join(err, rerr)
		}
	}
	if merr := d.hosting.modes.Delete(ctx, app, 0); merr != nil && m3o.KindOf(merr) != m3o.NotFound {
		err = errors.Join(err, merr)
	}
	return err
}

// routeDomains tells the router's table which hosts app has.
func (d *Daemon) routeDomains(ctx context.Context, app string) error {
	mine, err := d.domainsOf(ctx, app)
	if err != nil {
		return err
	}
	d.routes.setHosts(app, aliases(mine))
	return nil
}

func aliases(ds []domain) []alias {
	out := make([]alias, len(ds))
	for i, x := range ds {
		out[i] = alias{x.Name, x.Redirect}
	}
	return out
}

// loadHosting gives a starting daemon's table what is kept of all apps.
func (d *Daemon) loadHosting(ctx context.Context) error {
	all, err := d.allDomains(ctx)
	if err != nil {
		return err
	}
	byApp := map[string][]domain{}
	for _, x := range all {
		if x.App != "" {
			byApp[x.App] = append(byApp[x.App], x)
		}
	}
	for app, ds := range byApp {
		d.routes.setHosts(app, aliases(ds))
	}
	modes, err := d.hosting.modes.List(ctx, "")
	if err != nil {
		return fmt.Errorf("list modes: %w", err)
	}
	for _, m := range modes {
		d.routes.loadMode(m.Key, mode{m.Value.Maintenance, m.Value.Paused})
	}
	return nil
}

// resolver asks the configured name servers, the system's when there are none.
func (c *Config) resolver() *net.Resolver {
	servers := c.resolvers()
	if len(servers) == 0 {
		return net.DefaultResolver
	}
	return &net.Resolver{PreferGo: true, Dial: func(ctx context.Context, network, _ string) (net.Conn, error) {
		var err error
		for _, s := range servers {
			var c net.Conn
			if c, err = (&net.Dialer{Timeout: 3 * time.Second}).DialContext(ctx, network, s); err == nil {
				return c, nil
			}
		}
		return nil, err
	}}
}

// addresses are what a domain of an app should lead to; none on localhost,
// where nothing is looked up.
func (d *Daemon) addresses(ctx context.Context) []string {
	if d.cfg.Local() {
		return nil
	}
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	found, err := d.cfg.resolver().LookupHost(ctx, "api."+d.cfg.Domain)
	if err != nil {
		d.log.Warn("look up own domain", "host", "api."+d.cfg.Domain, "err", err)
	}
	slices.Sort(found)
	return found
}

// lookup says whether name leads to one of want: ok, missing, elsewhere, or
// unchecked when want is not known.
func (d *Daemon) lookup(ctx context.Context, name string, want []string) (state string, found []string) {
	if len(want) == 0 {
		return "unchecked", nil
	}
	if rest, wild := strings.CutPrefix(name, "*."); wild {
		name = "m3o-check." + rest
	}
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	found, err := d.cfg.resolver().LookupHost(ctx, name)
	if err != nil || len(found) == 0 {
		return "missing", nil
	}
	slices.Sort(found)
	if slices.ContainsFunc(found, func(a string) bool { return slices.Contains(want, a) }) {
		return "ok", found
	}
	return "elsewhere", found
}
