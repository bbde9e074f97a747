package certs

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"net/url"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/caddyserver/certmagic"
	"github.com/mholt/acmez/v3"
	"github.com/mholt/acmez/v3/acme"

	"github.com/m3o/m3o"
)

// issuer asks an ACME CA. certmagic has one of its own, but that one answers
// challenges on ports it opens itself, and ours belong to the router: it would
// take them while the router restarts.
type issuer struct {
	cfg     Config
	storage *storage
	client  *acme.Client
	dns     *certmagic.DNS01Solver // nil for none

	mu      sync.Mutex // guards account and its making
	account *acme.Account
}

var _ certmagic.Issuer = (*issuer)(nil)

func newIssuer(cfg Config, st *storage) *issuer {
	i := &issuer{cfg: cfg, storage: st, client: &acme.Client{Directory: cfg.CA, HTTPClient: cfg.client(), UserAgent: "m3o", PollTimeout: 2 * time.Minute}}
	if cfg.DNS != nil {
		i.dns = &certmagic.DNS01Solver{DNSManager: certmagic.DNSManager{DNSProvider: cfg.DNS, Resolvers: cfg.Resolvers}}
	}
	return i
}

// IssuerKey implements certmagic.Issuer.
func (i *issuer) IssuerKey() string {
	u, err := url.Parse(i.cfg.CA)
	if err != nil {
		return "acme"
	}
	return strings.Trim(strings.NewReplacer("/", "-", ":", "-").Replace(u.Host+u.Path), "-")
}

// Issue implements certmagic.Issuer.
func (i *issuer) Issue(ctx context.Context, csr *x509.CertificateRequest) (*certmagic.IssuedCertificate, error) {
	account, err := i.signUp(ctx)
	if err != nil {
		return nil, err
	}
	params, err := acmez.OrderParametersFromCSR(account, csr)
	if err != nil {
		return nil, fmt.Errorf("order certificate: %w", err)
	}
	c := acmez.Client{Client: i.client, ChallengeSolvers: map[string]acmez.Solver{}}
	inZone := i.dns != nil && !slices.ContainsFunc(csr.DNSNames, func(n string) bool {
		n = strings.TrimPrefix(n, "*.")
		return n != i.cfg.Zone && !strings.HasSuffix(n, "."+i.cfg.Zone)
	})
	if inZone {
		c.ChallengeSolvers[acme.ChallengeTypeDNS01] = i.dns
	} else {
		for _, kind := range i.cfg.Challenges {
			c.ChallengeSolvers[kind] = serverSolver{i.cfg.Server}
		}
	}
	chains, err := c.ObtainCertificate(ctx, params)
	if p, ok := errors.AsType[acme.Problem](err); ok && p.Type == acme.ProblemTypeAccountDoesNotExist {
		i.forget(ctx) // a CA that was set up anew: the next try signs up again
	}
	if err != nil {
		return nil, fmt.Errorf("get certificate from %s: %w", i.cfg.CA, err)
	}
	if len(chains) == 0 {
		return nil, fmt.Errorf("get certificate from %s: no chain", i.cfg.CA)
	}
	return &certmagic.IssuedCertificate{Certificate: chains[0].ChainPEM, Metadata: chains[0]}, nil
}

// saved is an account as stored.
type saved struct {
	Account acme.Account
	Key     []byte // PEM
}

func (i *issuer) accountKey() string { return "acme/" + i.IssuerKey() + "/account.json" }

// signUp gives the account all daemons share, making it the first time.
func (i *issuer) signUp(ctx context.Context) (acme.Account, error) {
	i.mu.Lock()
	defer i.mu.Unlock()
	if i.account != nil {
		return *i.account, nil
	}
	const name = "acme-account"
	if err := i.storage.Lock(ctx, name); err != nil {
		return acme.Account{}, err
	}
	defer func() {
		uctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), 10*time.Second)
		defer cancel()
		_ = i.storage.Unlock(uctx, name) // it expires
	}()
	b, err := i.storage.Load(ctx, i.accountKey())
	if err == nil {
		var s saved
		if err := json.Unmarshal(b, &s); err != nil {
			return acme.Account{}, fmt.Errorf("read ACME account: %w", err)
		}
		if s.Account.PrivateKey, err = certmagic.PEMDecodePrivateKey(s.Key); err != nil {
			return acme.Account{}, errors.New("read ACME account: its key is malformed") // the cause might quote it
		}
		i.account = &s.Account
		return s.Account, nil
	}
	if !errors.Is(err, fs.ErrNotExist) {
		return acme.Account{}, fmt.Errorf("read ACME account: %w", err)
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return acme.Account{}, fmt.Errorf("make ACME account: %w", err)
	}
	a := acme.Account{TermsOfServiceAgreed: true, PrivateKey: key}
	if i.cfg.Email != "" {
		a.Contact = []string{"mailto:" + i.cfg.Email}
	}
	if a, err = i.client.NewAccount(ctx, a); err != nil {
		return a, fmt.Errorf("sign up at %s: %w", i.cfg.CA, err)
	}
	if b, err = marshalAccount(a, key); err == nil {
		err = i.storage.Store(ctx, i.accountKey(), b)
	}
	if err != nil {
		return a, fmt.Errorf("keep ACME account: %w", err)
	}
	i.account = &a
	return a, nil
}

func marshalAccount(a acme.Account, key crypto.Signer) ([]byte, error) {
	p, err := certmagic.PEMEncodePrivateKey(key)
	if err != nil {
		return nil, err
	}
	return json.Marshal(saved{a, p})
}

func (i *issuer) forget(ctx context.Context) {
	i.mu.Lock()
	defer i.mu.Unlock()
	i.account = nil
	_ = i.storage.Delete(ctx, i.accountKey()) // or the next try fails the same way
}

// serverSolver has the Server answer http-01 and tls-alpn-01.
type serverSolver struct{ server Server }

var _ acmez.Solver = serverSolver{}

// Present implements acmez.Solver.
func (s serverSolver) Present(ctx context.Context, ch acme.Challenge) error {
	c := Challenge{Token: ch.Token, KeyAuth: ch.KeyAuthorization}
	if ch.Type == acme.ChallengeTypeTLSALPN01 {
		cert, err := acmez.TLSALPN01ChallengeCert(ch)
		if err != nil {
			return fmt.Errorf("make challenge certificate: %w", err)
		}
		pemCert, err := encode(*cert)
		if err != nil {
			return err
		}
		c = Challenge{ALPN: &pemCert}
	}
	return s.server.Present(ctx, ch.Identifier.Value, c)
}

// CleanUp implements acmez.Solver.
func (s serverSolver) CleanUp(ctx context.Context, ch acme.Challenge) error {
	return s.server.Present(ctx, ch.Identifier.Value, Challenge{})
}

// Pair checks that key belongs to the leaf of chain and that a server can use
// them, and returns the leaf.
func Pair(chain []byte, key m3o.Secret) (*x509.Certificate, error) {
	leaf, err := Leaf(chain)
	if err != nil {
		return nil, err
	}
	block, _ := pem.Decode([]byte(key.Reveal()))
	if block == nil {
		return nil, m3o.Errorf(m3o.Invalid, "there is no private key in PEM")
	}
	k, err := certmagic.PEMDecodePrivateKey([]byte(key.Reveal()))
	if err != nil {
		return nil, m3o.Errorf(m3o.Invalid, "the private key is malformed or encrypted")
	}
	pub, ok := leaf.PublicKey.(interface{ Equal(crypto.PublicKey) bool })
	if !ok || !pub.Equal(k.Public()) {
		return nil, m3o.Errorf(m3o.Invalid, "the private key is not the certificate's")
	}
	if len(leaf.DNSNames) == 0 {
		return nil, m3o.Errorf(m3o.Invalid, "the certificate names no host")
	}
	if !time.Now().Before(leaf.NotAfter) {
		return nil, m3o.Errorf(m3o.Invalid, "the certificate ended on %s", leaf.NotAfter.Format(time.DateOnly))
	}
	return leaf, nil
}
