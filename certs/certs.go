// Package certs gets TLS certificates by ACME, keeps them in the store, where
// every daemon of an installation finds them, and renews them. What serves
// them is handed to New as a Server.
//
// It does not know what an app is, nor which names it should care for: the
// caller says that. A certificate's key is sealed before it is stored.
package certs

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"os"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/caddyserver/certmagic"
	"github.com/mholt/acmez/v3/acme"
	"go.uber.org/zap"

	"github.com/m3o/m3o"
	"github.com/m3o/m3o/store"
)

// A Server serves certificates and answers the challenges of a CA. Its
// methods are safe for concurrent use and repeatable, and return once what
// they ask for holds.
type Server interface {
	// Install serves c for the names in its leaf, in the stead of an older one
	// of that ID.
	Install(ctx context.Context, c Certificate) error
	// Present answers the CA's questions about host until the next Present of
	// that host; a zero Challenge ends that.
	Present(ctx context.Context, host string, c Challenge) error
}

// A Certificate is what a server needs to serve names.
type Certificate struct {
	ID     string     // unique; a renewed certificate has that of its predecessor
	Chain  []byte     // PEM, the leaf first
	Key    m3o.Secret // PEM
	Staple []byte     // OCSP response, nil for none
}

// A Challenge is how to answer a CA that wants to see a host is ours.
type Challenge struct {
	Token, KeyAuth string       // http-01: what GET /.well-known/acme-challenge/<Token> returns
	ALPN           *Certificate // tls-alpn-01: what is served to the protocol acme-tls/1
}

// Config is what New needs. CA, Email and DNS may be left out.
type Config struct {
	Store  *store.Store
	Seal   func(v m3o.Secret, where string) ([]byte, error)
	Unseal func(box []byte, where string) (m3o.Secret, error)
	Server Server
	CA     string         // ACME directory; Let's Encrypt when empty
	Email  string         // whom the CA may write to
	Roots  *x509.CertPool // what the CA's own certificate is checked by; nil: the system's
	DNS    DNS            // for dns-01; nil for none
	Zone   string         // names in it are proved by DNS, if there is one
	// Resolvers are asked whether a record of a dns-01 challenge has spread;
	// the system's when empty.
	Resolvers []string
	// Challenges are the kinds the Server answers; http-01 and tls-alpn-01 when empty.
	Challenges []string
	Log        *slog.Logger
}

// A Manager cares for certificates. It is safe for concurrent use.
type Manager struct {
	cfg     Config
	cache   *certmagic.Cache
	magic   *certmagic.Config
	storage *storage

	mu    sync.Mutex // guards names
	names map[string]*State
}

// State is how far the certificate of a name is.
type State struct {
	Issued  time.Time // zero: none yet
	Expires time.Time
	Issuer  string
	Err     string // why the newest attempt failed; "" when it did not
}

// New opens a Manager. Certificates are asked for once Run runs.
func New(ctx context.Context, cfg Config) (*Manager, error) {
	if cfg.CA == "" {
		cfg.CA = certmagic.LetsEncryptProductionCA
	}
	if len(cfg.Challenges) == 0 {
		cfg.Challenges = []string{acme.ChallengeTypeHTTP01, acme.ChallengeTypeTLSALPN01}
	}
	st, err := openStorage(ctx, cfg)
	if err != nil {
		return nil, err
	}
	m := &Manager{cfg: cfg, storage: st, names: map[string]*State{}}
	quiet := zap.NewNop() // what matters comes as an event
	m.cache = certmagic.NewCache(certmagic.CacheOptions{
		GetConfigForCert: func(certmagic.Certificate) (*certmagic.Config, error) { return m.magic, nil }, Logger: quiet})
	m.magic = certmagic.New(m.cache, certmagic.Config{Storage: st, Logger: quiet, OnEvent: m.event, DisableARI: true})
	m.magic.Issuers = []certmagic.Issuer{newIssuer(cfg, st)}
	return m, nil
}

// Run keeps certificates fresh until ctx ends.
func (m *Manager) Run(ctx context.Context) error {
	defer m.cache.Stop()
	// The cache renews by itself; what it does not tell of is a new OCSP staple.
	t := time.NewTicker(time.Hour)
	defer t.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-t.C:
			m.InstallAll(ctx)
		}
	}
}

// Want cares for name from now on, which may be a wildcard: a certificate that
// the store has is served at once, another is asked for in the background and
// again until there is one. It may be called for a name it cares for already.
func (m *Manager) Want(ctx context.Context, name string) error {
	m.mu.Lock()
	known := m.names[name] != nil
	if !known {
		m.names[name] = &State{}
	}
	m.mu.Unlock()
	if known {
		return nil
	}
	if err := m.magic.ManageAsync(ctx, []string{name}); err != nil {
		m.mu.Lock()
		delete(m.names, name)
		m.mu.Unlock()
		return fmt.Errorf("care for the certificate of %s: %w", name, err)
	}
	return m.installCached(ctx, name)
}

// Forget cares for name no more. Its certificate stays in the store.
func (m *Manager) Forget(name string) {
	m.mu.Lock()
	delete(m.names, name)
	m.mu.Unlock()
	m.cache.RemoveManaged([]certmagic.SubjectIssuer{{Subject: name}})
}

// Renew gets a new certificate for name now.
func (m *Manager) Renew(ctx context.Context, name string) error {
	if err := m.magic.RenewCertSync(ctx, name, true); err != nil {
		return &m3o.Error{Kind: m3o.Unavailable, Msg: "no certificate for " + name + ": " + reason(err), Hint: "the one there is stays in use", Err: err}
	}
	return nil
}

// State says how far the certificate of name is; false when nobody wants one.
func (m *Manager) State(name string) (State, bool) {
	m.mu.Lock()
	defer m.mu.Unlock()
	s := m.names[name]
	if s == nil {
		return State{}, false
	}
	return *s, true
}

// Names are the names cared for, sorted.
func (m *Manager) Names() []string {
	m.mu.Lock()
	defer m.mu.Unlock()
	var out []string
	for n := range m.names {
		out = append(out, n)
	}
	slices.Sort(out)
	return out
}

// InstallAll gives the server every certificate there is, for one that has
// just started.
func (m *Manager) InstallAll(ctx context.Context) {
	for _, n := range m.Names() {
		if err := m.installCached(ctx, n); err != nil && ctx.Err() == nil {
			m.cfg.Log.Warn("serve certificate", "host", n, "err", err)
		}
	}
}

func (m *Manager) installCached(ctx context.Context, name string) error {
	var best certmagic.Certificate // the newest: one that was renewed may still be there
	for _, c := range m.cache.AllMatchingCertificates(name) {
		if slices.Contains(c.Names, name) && c.Leaf != nil && (best.Leaf == nil || c.Leaf.NotBefore.After(best.Leaf.NotBefore)) {
			best = c
		}
	}
	if best.Leaf == nil {
		return nil
	}
	cert, err := encode(best.Certificate)
	if err != nil {
		return err
	}
	return m.install(ctx, name, cert)
}

func (m *Manager) install(ctx context.Context, name string, c Certificate) error {
	c.ID = "acme " + name
	if leaf, err := Leaf(c.Chain); err == nil {
		m.mu.Lock()
		if s := m.names[name]; s != nil {
			*s = State{Issued: leaf.NotBefore, Expires: leaf.NotAfter, Issuer: leaf.Issuer.CommonName}
		}
		m.mu.Unlock()
	}
	return m.cfg.Server.Install(ctx, c)
}

// event hears from certmagic.
func (m *Manager) event(ctx context.Context, event string, data map[string]any) error {
	name, _ := data["identifier"].(string)
	switch event {
	case "cert_failed":
		err, _ := data["error"].(error)
		m.cfg.Log.Warn("no certificate yet", "host", name, "err", err)
		m.mu.Lock()
		if s := m.names[name]; s != nil && err != nil {
			s.Err = reason(err)
		}
		m.mu.Unlock()
	case "cached_managed_cert": // found in the store, or issued, and stapled
		names, _ := data["sans"].([]string)
		for _, n := range names {
			if _, ok := m.State(n); !ok {
				continue
			}
			if err := m.installCached(context.WithoutCancel(ctx), n); err != nil {
				m.cfg.Log.Warn("serve certificate", "host", n, "err", err)
			}
		}
	case "cert_obtained":
		m.cfg.Log.Info("certificate issued", "host", name)
		read := func(key string) []byte {
			p, _ := data[key].(string)
			b, err := m.storage.Load(ctx, p)
			if err != nil {
				m.cfg.Log.Error("read new certificate", "host", name, "err", err)
			}
			return b
		}
		c := Certificate{Chain: read("certificate_path"), Key: m3o.Secret(read("private_key_path"))}
		if err := m.install(context.WithoutCancel(ctx), name, c); err != nil {
			m.cfg.Log.Warn("serve certificate", "host", name, "err", err)
		}
		m.staple(ctx, name)
	}
	return nil
}

// staple serves a certificate that has just been issued with its OCSP response,
// if its CA has a responder. It is served without meanwhile.
func (m *Manager) staple(ctx context.Context, name string) {
	if _, err := m.magic.CacheManagedCertificate(ctx, name); err != nil { // the cache asks for it, and tells event
		m.cfg.Log.Warn("staple certificate", "host", name, "err", err)
	}
}

// reason is the part of an ACME error that a user can act on.
func reason(err error) string {
	s := err.Error()
	for e := err; e != nil; e = errors.Unwrap(e) {
		s = e.Error()
	}
	if len(s) > 300 {
		s = s[:300]
	}
	return strings.ToValidUTF8(s, "")
}

// encode is c as PEM.
func encode(c tls.Certificate) (Certificate, error) {
	key, err := x509.MarshalPKCS8PrivateKey(c.PrivateKey)
	if err != nil {
		return Certificate{}, fmt.Errorf("encode key: %w", err)
	}
	out := Certificate{Key: m3o.Secret(pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: key})), Staple: c.OCSPStaple}
	for _, der := range c.Certificate {
		out.Chain = append(out.Chain, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})...)
	}
	return out, nil
}

// Leaf is the first certificate of a PEM chain.
func Leaf(chain []byte) (*x509.Certificate, error) {
	block, _ := pem.Decode(chain)
	if block == nil || block.Type != "CERTIFICATE" {
		return nil, m3o.Errorf(m3o.Invalid, "there is no certificate in PEM")
	}
	c, err := x509.ParseCertificate(block.Bytes)
	if err != nil {
		return nil, m3o.Errorf(m3o.Invalid, "the certificate is malformed: %v", err)
	}
	return c, nil
}

// client speaks to the CA.
func (c Config) client() *http.Client {
	t := &http.Transport{Proxy: http.ProxyFromEnvironment, TLSHandshakeTimeout: 20 * time.Second, ResponseHeaderTimeout: 30 * time.Second,
		TLSClientConfig: &tls.Config{RootCAs: c.Roots, MinVersion: tls.VersionTLS12}, MaxIdleConnsPerHost: 2, IdleConnTimeout: 30 * time.Second, ForceAttemptHTTP2: true}
	return &http.Client{Transport: t, Timeout: time.Minute}
}

// ReadRoots reads a file of PEM certificates to trust.
func ReadRoots(file string) (*x509.CertPool, error) {
	f, err := os.Open(file)
	if err != nil {
		return nil, fmt.Errorf("read trusted certificates: %w", err)
	}
	defer f.Close() //nolint:errcheck // read only
	b, err := io.ReadAll(io.LimitReader(f, 1<<20))
	if err != nil {
		return nil, fmt.Errorf("read trusted certificates: %w", err)
	}
	p := x509.NewCertPool()
	if !p.AppendCertsFromPEM(b) {
		return nil, m3o.Errorf(m3o.Invalid, "%s holds no certificate in PEM", file)
	}
	return p, nil
}
