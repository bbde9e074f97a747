package daemon

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/m3o/m3o"
	"github.com/m3o/m3o/certs"
	"github.com/m3o/m3o/config"
	"github.com/m3o/m3o/router"
	"github.com/m3o/m3o/store"
)

// ownCert is a certificate that a user brought.
type ownCert struct {
	ID      string
	App     string
	Names   []string
	Issuer  string
	Chain   []byte
	Key     config.Sealed
	User    string
	Created time.Time
	Expires time.Time
}

func (c ownCert) where() string { return "own certificate " + c.ID }

// serveCerts is the router as package certs sees it.
type serveCerts struct{ router router.Client }

var _ certs.Server = serveCerts{}

// Install implements certs.Server.
func (s serveCerts) Install(ctx context.Context, c certs.Certificate) error {
	return s.router.InstallCert(ctx, router.Cert{ID: c.ID, Chain: c.Chain, Key: []byte(c.Key.Reveal()), Staple: c.Staple})
}

// Present implements certs.Server.
func (s serveCerts) Present(ctx context.Context, host string, c certs.Challenge) error {
	ch := router.Challenge{Host: host, Token: c.Token, KeyAuth: c.KeyAuth}
	if c.ALPN != nil {
		ch.ALPN = &router.Cert{ID: "challenge", Chain: c.ALPN.Chain, Key: []byte(c.ALPN.Key.Reveal())}
	}
	return s.router.Challenge(ctx, ch)
}

// openCerts opens what gets certificates, if the configuration asks for it.
func (d *Daemon) openCerts(ctx context.Context) (err error) {
	if d.ownCerts, err = store.NewBucket[ownCert](ctx, d.store, "own-certs"); err != nil {
		return fmt.Errorf("open certificates: %w", err)
	}
	if !d.cfg.ACME() {
		return nil
	}
	cfg, err := d.certsConfig()
	if err != nil {
		return err
	}
	d.certs, err = certs.New(ctx, cfg)
	return err
}

func (d *Daemon) certsConfig() (cfg certs.Config, err error) {
	cfg = certs.Config{Store: d.store, Server: serveCerts{d.router}, CA: d.cfg.ACMECA, Email: d.cfg.ACMEEmail, Zone: d.cfg.Domain,
		Resolvers: d.cfg.resolvers(), Log: d.log,
		Seal: func(v m3o.Secret, where string) ([]byte, error) { return json.Marshal(d.config.Seal(v, where)) },
		Unseal: func(box []byte, where string) (m3o.Secret, error) {
			var s config.Sealed
			if err := json.Unmarshal(box, &s); err != nil {
				return "", fmt.Errorf("read sealed certificate: %w", err)
			}
			return d.config.Unseal(s, where)
		}}
	if d.cfg.ACMETrust != "" {
		if cfg.Roots, err = certs.ReadRoots(d.cfg.ACMETrust); err != nil {
			return cfg, err
		}
	}
	if d.cfg.ACMEDNS != "" {
		if cfg.DNS, err = certs.OpenDNS(d.cfg.ACMEDNS); err != nil {
			return cfg, err
		}
	}
	return cfg, nil
}

// certName is the certificate that host is served by, "" for none that can be
// asked for: a wildcard needs DNS, which we have for our own domain only.
func (d *Daemon) certName(host string) string {
	if rest, under := strings.CutSuffix(host, "."+d.cfg.Domain); under && d.cfg.ACMEDNS != "" && !strings.Contains(rest, ".") {
		return "*." + d.cfg.Domain
	}
	if strings.HasPrefix(host, "*.") {
		return ""
	}
	return host
}

// wantCertificate has a certificate asked for in the background.
func (d *Daemon) wantCertificate(ctx context.Context, host string) {
	if d.certs == nil {
		return
	}
	name := d.certName(host)
	if name == "" {
		return
	}
	if err := d.certs.Want(context.WithoutCancel(ctx), name); err != nil {
		d.log.Warn("want certificate", "host", name, "err", err)
	}
}

// serves says that host is one of ours, so that a certificate may be asked
// for: a CA counts what it issues, and anybody can send a name.
func (d *Daemon) serves(ctx context.Context, host string) bool {
	if label, under := strings.CutSuffix(host, "."+d.cfg.Domain); under {
		return label == "api" || d.routes.has(label)
	}
	x, _, err := d.hosting.domains.Get(ctx, host)
	return err == nil && x.App != ""
}

// runCerts asks for the certificates of hosts as they are needed, until ctx ends.
func (d *Daemon) runCerts(ctx context.Context) error {
	d.syncCerts(ctx)
	if d.certs == nil {
		<-ctx.Done()
		return nil
	}
	done := make(chan error, 1)
	go func() { done <- d.certs.Run(ctx) }()
	all, err := d.allDomains(ctx)
	if err != nil && ctx.Err() == nil {
		d.log.Error("certificates of domains", "err", err)
	}
	d.wantCertificate(ctx, "api."+d.cfg.Domain)
	for _, x := range all {
		if x.App != "" {
			d.wantCertificate(ctx, x.Name)
		}
	}
	for ctx.Err() == nil {
		names, err := d.router.Wanted(ctx)
		if err != nil {
			select {
			case <-ctx.Done():
			case <-time.After(time.Second):
			}
			continue
		}
		for _, n := range names {
			if d.serves(ctx, n) {
				d.wantCertificate(ctx, n)
			}
		}
	}
	return <-done
}

// syncCerts gives the router the certificates that it may lack, and takes away
// those that are nobody's.
func (d *Daemon) syncCerts(ctx context.Context) {
	has, err := d.router.Certs(ctx)
	if err != nil {
		return // it is asked again when it is back
	}
	own, err := d.ownCerts.List(ctx, "")
	if err != nil {
		d.log.Error("list certificates", "err", err)
		return
	}
	known := map[string]bool{}
	for _, e := range own {
		known["own "+e.Value.ID] = true
		if err := d.installOwn(ctx, e.Value); err != nil && ctx.Err() == nil {
			d.log.Error("serve certificate", "host", strings.Join(e.Value.Names, " "), "err", err)
		}
	}
	for id := range has {
		if strings.HasPrefix(id, "own ") && !known[id] {
			if err := d.router.RemoveCert(ctx, id); err != nil {
				d.log.Warn("remove certificate", "err", err)
			}
		}
	}
	if d.certs != nil {
		d.certs.InstallAll(ctx)
	}
}

func (d *Daemon) installOwn(ctx context.Context, c ownCert) error {
	key, err := d.config.Unseal(c.Key, c.where())
	if err != nil {
		return err
	}
	return d.router.InstallCert(ctx, router.Cert{ID: "own " + c.ID, Chain: c.Chain, Key: []byte(key.Reveal()), Own: true})
}

// addCert keeps and serves a certificate of the user's own. Unless an admin
// adds it, every name in it must be a domain of the app.
func (d *Daemon) addCert(ctx context.Context, app, user string, admin bool, chain []byte, key m3o.Secret) (ownCert, error) {
	leaf, err := certs.Pair(chain, key)
	if err != nil {
		return ownCert{}, &m3o.Error{Kind: m3o.Invalid, Msg: err.Error(), Hint: "give the certificate with its chain, and its key, in PEM"}
	}
	mine, err := d.domainsOf(ctx, app)
	if err != nil {
		return ownCert{}, err
	}
	for _, n := range leaf.DNSNames {
		ours := slices.ContainsFunc(mine, func(x domain) bool { return x.Name == n }) || n == app+"."+d.cfg.Domain
		if !ours && !admin {
			return ownCert{}, &m3o.Error{Kind: m3o.Denied, Msg: fmt.Sprintf("the certificate is for %s, which is no domain of %s", n, app), Hint: "m3o domains:add " + n + " -a " + app}
		}
	}
	sum := sha256.Sum256(leaf.Raw)
	c := ownCert{ID: hex.EncodeToString(sum[:8]), App: app, Names: leaf.DNSNames, Issuer: leaf.Issuer.CommonName, Chain: chain,
		User: user, Created: time.Now().UTC(), Expires: leaf.NotAfter}
	c.Key = d.config.Seal(key, c.where())
	if _, err := d.ownCerts.Put(ctx, c.ID, c); err != nil {
		return c, fmt.Errorf("keep certificate: %w", err)
	}
	return c, d.installOwn(ctx, c)
}

func (d *Daemon) certsOf(ctx context.Context, app string) ([]ownCert, error) {
	entries, err := d.ownCerts.List(ctx, "")
	if err != nil {
		return nil, fmt.Errorf("list certificates: %w", err)
	}
	var out []ownCert
	for _, e := range entries {
		if e.Value.App == app {
			out = append(out, e.Value)
		}
	}
	return out, nil
}

func (d *Daemon) removeCert(ctx context.Context, app, id string) (ownCert, error) {
	mine, err := d.certsOf(ctx, app)
	if err != nil {
		return ownCert{}, err
	}
	i := slices.IndexFunc(mine, func(c ownCert) bool { return len(id) >= 4 && strings.HasPrefix(c.ID, id) })
	if i < 0 {
		return ownCert{}, &m3o.Error{Kind: m3o.NotFound, Msg: fmt.Sprintf("%s has no certificate %q of its own", app, id), Hint: "m3o certs -a " + app}
	}
	if err := d.ownCerts.Delete(ctx, mine[i].ID, 0); err != nil {
		return mine[i], fmt.Errorf("remove certificate: %w", err)
	}
	return mine[i], d.router.RemoveCert(ctx, "own "+mine[i].ID)
}

// dropCerts removes an app's own certificates.
func (d *Daemon) dropCerts(ctx context.Context, app string) error {
	mine, err := d.certsOf(ctx, app)
	for _, c := range mine {
		_, rerr := d.removeCert(ctx, app, c.ID)
		err = errors.Join(err, rerr)
	}
	return err
}
