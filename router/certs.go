package router

import (
	"context"
	"crypto/sha256"
	"crypto/tls"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/m3o/m3o"
	"github.com/m3o/m3o/internal/atomicfile"
)

const (
	// alpnProto is what a CA speaks that checks a host by tls-alpn-01 (RFC 8737).
	alpnProto = "acme-tls/1"
	// challengePath is where a CA looks that checks a host by http-01 (RFC 8555 §8.3).
	challengePath = "/.well-known/acme-challenge/"
	// strangers is how many certificates are kept for names that no host has.
	strangers = 1024
	// maxWanted bounds the names whose certificates are waited for.
	maxWanted   = 1024
	maxCertSize = 256 << 10
	maxCerts    = 50_000
)

// A Cert is a certificate that the daemon got or was given.
type Cert struct {
	ID     string `json:"id"` // unique; another one of that ID takes its place
	Chain  []byte `json:"chain"`
	Key    []byte `json:"key"`
	Staple []byte `json:"staple,omitempty"`
	Own    bool   `json:"own,omitempty"` // preferred to one that is not
}

// A Challenge is how to answer a CA that asks whether a host is ours.
type Challenge struct {
	Host    string `json:"host"`
	Token   string `json:"token,omitempty"` // http-01
	KeyAuth string `json:"key_auth,omitempty"`
	ALPN    *Cert  `json:"alpn,omitempty"` // tls-alpn-01
}

// installed is a Cert ready to serve.
type installed struct {
	hash  string
	own   bool
	cert  *tls.Certificate
	names []string
}

// certs holds the certificates that were installed, and makes those of the
// internal CA on demand.
type certs struct {
	ca  *CA
	rt  *Router
	dir string

	mu         sync.RWMutex                // guards what follows
	names      map[string]*tls.Certificate // of the internal CA
	byID       map[string]installed
	ids        map[string][]string         // of byID, by name
	byName     map[string]*tls.Certificate // the best of byID
	challenges map[string]challenge
	wanted     map[string]chan struct{} // closed when there is one
	asked      []string                 // of wanted, not yet told
	told       chan struct{}            // closed and replaced when asked grows
}

type challenge struct {
	token, keyAuth string
	alpn           *tls.Certificate
}

func openCerts(rt *Router, ca *CA) (*certs, error) {
	c := &certs{ca: ca, rt: rt, dir: rt.cfg.Certs, names: map[string]*tls.Certificate{}, byID: map[string]installed{}, ids: map[string][]string{}, byName: map[string]*tls.Certificate{},
		challenges: map[string]challenge{}, wanted: map[string]chan struct{}{}, told: make(chan struct{})}
	if c.dir == "" {
		return c, nil
	}
	if err := os.MkdirAll(c.dir, 0o700); err != nil {
		return nil, fmt.Errorf("make directory of certificates: %w", err)
	}
	files, err := os.ReadDir(c.dir)
	if err != nil {
		return nil, fmt.Errorf("read certificates: %w", err)
	}
	for _, f := range files {
		if !strings.HasSuffix(f.Name(), ".json") {
			continue
		}
		b, err := os.ReadFile(filepath.Join(c.dir, f.Name()))
		var cert Cert
		if err == nil {
			err = strict(b, &cert)
		}
		if err == nil {
			err = c.install(cert, hashOf(b))
		}
		if err != nil {
			rt.log.Warn("certificate left out", "file", f.Name(), "err", err)
		}
	}
	return c, nil
}

func hashOf(b []byte) string { h := sha256.Sum256(b); return hex.EncodeToString(h[:8]) }

func (c *certs) path(id string) string { return filepath.Join(c.dir, hashOf([]byte(id))+".json") }

// parse makes a Cert ready.
func (c Cert) parse() (*tls.Certificate, error) {
	cert, err := tls.X509KeyPair(c.Chain, c.Key)
	if err != nil {
		return nil, m3o.Errorf(m3o.Invalid, "certificate %q does not fit its key or is malformed", c.ID)
	}
	if cert.OCSPStaple = c.Staple; len(c.Staple) == 0 {
		cert.OCSPStaple = nil
	}
	return &cert, nil
}

// put keeps and serves cert.
func (c *certs) put(cert Cert) error {
	b, err := json.Marshal(cert)
	if err != nil {
		return fmt.Errorf("encode certificate: %w", err)
	}
	if cert.ID == "" || len(b) > maxCertSize {
		return m3o.Errorf(m3o.Invalid, "certificate %q has no id or is too large", cert.ID)
	}
	if _, err := cert.parse(); err != nil {
		return err
	}
	if c.dir != "" {
		if err := atomicfile.Write(c.path(cert.ID), b, 0o600); err != nil {
			return fmt.Errorf("keep certificate: %w", err)
		}
	}
	return c.install(cert, hashOf(b))
}

func (c *certs) install(cert Cert, hash string) error {
	tc, err := cert.parse()
	if err != nil {
		return err
	}
	in := installed{hash: hash, own: cert.Own, cert: tc, names: tc.Leaf.DNSNames}
	c.mu.Lock()
	defer c.mu.Unlock()
	if len(c.byID) >= maxCerts {
		return m3o.Errorf(m3o.Unavailable, "there are %d certificates, no more are kept", maxCerts)
	}
	c.drop(cert.ID)
	c.byID[cert.ID] = in
	for _, n := range in.names {
		c.ids[n] = append(c.ids[n], cert.ID)
		c.choose(n)
	}
	for n, ch := range c.wanted {
		if c.lookup(n) != nil {
			close(ch)
			delete(c.wanted, n)
		}
	}
	return nil
}

func (c *certs) remove(id string) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if _, ok := c.byID[id]; !ok {
		return nil
	}
	if c.dir != "" {
		if err := os.Remove(c.path(id)); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("remove certificate: %w", err)
		}
	}
	c.drop(id)
	return nil
}

// drop forgets a certificate. mu is held.
func (c *certs) drop(id string) {
	names := c.byID[id].names
	delete(c.byID, id)
	for _, n := range names {
		c.ids[n] = slices.DeleteFunc(c.ids[n], func(o string) bool { return o == id })
		c.choose(n)
	}
}

// choose finds the best certificate of a name again: one of the owner's before
// an issued one, then the one that lasts longest. mu is held.
func (c *certs) choose(name string) {
	var best installed
	for _, id := range c.ids[name] {
		in := c.byID[id]
		if best.cert == nil || in.own && !best.own || in.own == best.own && in.cert.Leaf.NotAfter.After(best.cert.Leaf.NotAfter) {
			best = in
		}
	}
	if best.cert == nil {
		delete(c.byName, name)
		delete(c.ids, name)
		return
	}
	c.byName[name] = best.cert
}

// lookup is the installed certificate of name or of its wildcard. mu is held.
func (c *certs) lookup(name string) *tls.Certificate {
	if cert := c.byName[name]; cert != nil {
		return cert
	}
	if i := strings.IndexByte(name, '.'); i > 0 {
		return c.byName["*"+name[i:]]
	}
	return nil
}

func (c *certs) has(name string) bool {
	c.mu.RLock()
	defer c.mu.RUnlock()
	return c.lookup(name) != nil
}

// get is a tls.Config's GetCertificate. It serves the names of the table and,
// so that a mistyped one gets a page and not a browser's warning, those one
// label under the domain; no name at all gets the domain's. What was installed
// comes first. Then, with OnDemand, the daemon is asked for one and given a
// moment; and the internal CA signs for the names it may.
func (c *certs) get(hello *tls.ClientHelloInfo) (*tls.Certificate, error) {
	l := c.rt.live.Load()
	name := hostOf(hello.ServerName)
	if slices.Contains(hello.SupportedProtos, alpnProto) {
		c.mu.RLock()
		defer c.mu.RUnlock()
		if ch := c.challenges[name]; ch.alpn != nil {
			return ch.alpn, nil
		}
		return nil, fmt.Errorf("no challenge for %q", name)
	}
	if l == nil {
		return nil, errors.New("no table yet")
	}
	if name == "" {
		name = l.domain
	}
	c.mu.RLock()
	cert, own := c.lookup(name), c.names[name]
	c.mu.RUnlock()
	if cert != nil {
		return cert, nil
	}
	known := l.find(name) != nil
	if known && c.rt.cfg.OnDemand {
		if cert := c.want(hello.Context(), name); cert != nil {
			return cert, nil
		}
	}
	if own != nil && time.Now().Before(renewAt(own.Leaf)) {
		return own, nil
	}
	label, under := strings.CutSuffix(name, "."+l.domain)
	if !known && name != l.domain && (!under || strings.Contains(label, ".")) {
		return nil, fmt.Errorf("no host %q", name)
	}
	cert, err := c.ca.Leaf(name)
	if err != nil {
		return nil, err
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if len(c.names) >= l.hosts.n+strangers {
		c.names = map[string]*tls.Certificate{} // strangers are cheap to make again
	}
	c.names[name] = cert
	return cert, nil
}

// want tells the daemon that name needs a certificate, and waits for it.
func (c *certs) want(ctx context.Context, name string) *tls.Certificate {
	c.mu.Lock()
	if cert := c.lookup(name); cert != nil {
		c.mu.Unlock()
		return cert
	}
	ch := c.wanted[name]
	if ch == nil {
		if len(c.wanted) >= maxWanted {
			c.mu.Unlock()
			return nil
		}
		ch = make(chan struct{})
		c.wanted[name] = ch
		c.asked = append(c.asked, name)
		close(c.told)
		c.told = make(chan struct{})
	}
	c.mu.Unlock()
	t := time.NewTimer(c.rt.limits.CertWait)
	defer t.Stop()
	select {
	case <-ch:
		c.mu.RLock()
		defer c.mu.RUnlock()
		return c.lookup(name)
	case <-t.C:
	case <-ctx.Done():
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.wanted[name] == ch {
		delete(c.wanted, name) // the next handshake asks again
	}
	return nil
}

// take gives the names that certificates are wanted for, once there are any.
func (c *certs) take(ctx context.Context) []string {
	for {
		c.mu.Lock()
		names, told := c.asked, c.told
		c.asked = nil
		c.mu.Unlock()
		if len(names) > 0 {
			return names
		}
		select {
		case <-told:
		case <-ctx.Done():
			return nil
		}
	}
}

// forget drops the certificates the internal CA made for hosts the table lost.
func (c *certs) forget(removed []string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, name := range removed {
		delete(c.names, name)
	}
}

// present answers a CA's questions about a host from now on, or no more.
func (c *certs) present(ch Challenge) error {
	next := challenge{token: ch.Token, keyAuth: ch.KeyAuth}
	if ch.ALPN != nil {
		var err error
		if next.alpn, err = ch.ALPN.parse(); err != nil {
			return err
		}
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if next == (challenge{}) {
		delete(c.challenges, ch.Host)
		return nil
	}
	if len(c.challenges) >= maxWanted {
		return m3o.Errorf(m3o.Unavailable, "too many challenges at once")
	}
	c.challenges[ch.Host] = next
	return nil
}

// answerChallenge answers http-01; false when the request is none of ours: an
// app may look after certificates of its own.
func (rt *Router) answerChallenge(w http.ResponseWriter, r *http.Request, host string) bool {
	if rt.certs == nil || r.Method != http.MethodGet {
		return false
	}
	rt.certs.mu.RLock()
	ch := rt.certs.challenges[host]
	rt.certs.mu.RUnlock()
	if ch.token == "" || r.URL.Path != challengePath+ch.token {
		return false
	}
	w.Header().Set("Content-Type", "text/plain")
	_, _ = io.WriteString(w, ch.keyAuth) // the CA asks again
	return true
}

// wantedWait bounds one question for what is wanted, so that a daemon that
// went away is noticed.
const wantedWait = 30 * time.Second

// certControl adds what the daemon does with certificates.
func (rt *Router) certControl(handle func(string, func(*http.Request) (any, error))) {
	body := func(r *http.Request, v any) error {
		b, err := io.ReadAll(io.LimitReader(r.Body, 2*maxCertSize))
		if err != nil {
			return fmt.Errorf("read certificate: %w", err)
		}
		if rt.certs == nil {
			return m3o.Errorf(m3o.Invalid, "this router has no HTTPS listener")
		}
		if strict(b, v) != nil {
			return m3o.Errorf(m3o.Invalid, "malformed certificate") // the cause might quote a key
		}
		return nil
	}
	handle("PUT /cert", func(r *http.Request) (any, error) {
		var c Cert
		if err := body(r, &c); err != nil {
			return nil, err
		}
		return struct{}{}, rt.certs.put(c)
	})
	handle("DELETE /cert", func(r *http.Request) (any, error) {
		if rt.certs == nil {
			return struct{}{}, nil
		}
		return struct{}{}, rt.certs.remove(r.URL.Query().Get("id"))
	})
	handle("GET /certs", func(*http.Request) (any, error) {
		out := map[string]string{}
		if rt.certs != nil {
			rt.certs.mu.RLock()
			defer rt.certs.mu.RUnlock()
			for id, in := range rt.certs.byID {
				out[id] = in.hash
			}
		}
		return out, nil
	})
	handle("PUT /challenge", func(r *http.Request) (any, error) {
		var c Challenge
		if err := body(r, &c); err != nil {
			return nil, err
		}
		return struct{}{}, rt.certs.present(c)
	})
	handle("GET /certs/wanted", func(r *http.Request) (any, error) {
		ctx, cancel := context.WithTimeout(r.Context(), wantedWait)
		defer cancel()
		if rt.certs == nil {
			<-ctx.Done()
			return []string{}, nil
		}
		return rt.certs.take(ctx), nil
	})
}

// InstallCert has the router keep and serve a certificate.
func (c Client) InstallCert(ctx context.Context, cert Cert) error {
	b, err := json.Marshal(cert)
	if err != nil {
		return fmt.Errorf("encode certificate: %w", err)
	}
	return c.do(ctx, http.MethodPut, "/cert", b, nil)
}

// RemoveCert has the router forget the certificate with that ID, if it has it.
func (c Client) RemoveCert(ctx context.Context, id string) error {
	return c.do(ctx, http.MethodDelete, "/cert?id="+url.QueryEscape(id), nil, nil)
}

// Certs are the certificates the router has: a hash of each by ID.
func (c Client) Certs(ctx context.Context) (map[string]string, error) {
	var out map[string]string
	err := c.do(ctx, http.MethodGet, "/certs", nil, &out)
	return out, err
}

// Challenge has the router answer a CA's questions about ch.Host; one without
// an answer in it ends that.
func (c Client) Challenge(ctx context.Context, ch Challenge) error {
	b, err := json.Marshal(ch)
	if err != nil {
		return fmt.Errorf("encode challenge: %w", err)
	}
	return c.do(ctx, http.MethodPut, "/challenge", b, nil)
}

// Wanted waits until hosts of the table are asked for that have no
// certificate, and names them; after half a minute it names none.
func (c Client) Wanted(ctx context.Context) ([]string, error) {
	var out []string
	err := c.do(ctx, http.MethodGet, "/certs/wanted", nil, &out)
	return out, err
}
