package daemon

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"io"
	"log"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/letsencrypt/pebble/v2/ca"
	"github.com/letsencrypt/pebble/v2/db"
	"github.com/letsencrypt/pebble/v2/va"
	"github.com/letsencrypt/pebble/v2/wfe"
	"github.com/miekg/dns"

	"github.com/m3o/m3o"
	"github.com/m3o/m3o/certs"
	"github.com/m3o/m3o/config"
	"github.com/m3o/m3o/router"
	"github.com/m3o/m3o/store"
)

// zone is a name server: 127.0.0.1 for every name, and TXT records that can be
// set by DNS UPDATE.
type zone struct {
	addr string
	mu   sync.Mutex
	txt  map[string][]string
}

func startZone(t *testing.T) *zone {
	t.Helper()
	// One port for both: whoever has UDP of one that is free for TCP is not in the way of the next.
	z := &zone{txt: map[string][]string{}}
	var ln net.Listener
	var pc net.PacketConn
	for range 20 {
		var err error
		if ln, err = net.Listen("tcp", "127.0.0.1:0"); err != nil {
			t.Fatal(err)
		}
		z.addr = ln.Addr().String()
		if pc, err = net.ListenPacket("udp", z.addr); err == nil {
			break
		}
		_ = ln.Close()
	}
	if pc == nil {
		t.Fatal("no port is free for both TCP and UDP")
	}
	for _, s := range []*dns.Server{{Listener: ln, Handler: z}, {PacketConn: pc, Handler: z}} {
		s.TsigSecret = map[string]string{"m3o.": "c2VjcmV0"}
		s.MsgAcceptFunc = func(dns.Header) dns.MsgAcceptAction { return dns.MsgAccept }
		go func() { _ = s.ActivateAndServe() }()
		t.Cleanup(func() { _ = s.Shutdown() })
	}
	return z
}

func (z *zone) ServeDNS(w dns.ResponseWriter, q *dns.Msg) {
	z.mu.Lock()
	defer z.mu.Unlock()
	r := new(dns.Msg)
	r.SetReply(q)
	r.Authoritative = true
	if q.Opcode == dns.OpcodeUpdate {
		if q.IsTsig() == nil || w.TsigStatus() != nil {
			r.Rcode = dns.RcodeRefused
		} else {
			for _, rr := range q.Ns {
				if t, ok := rr.(*dns.TXT); ok && rr.Header().Class == dns.ClassINET {
					z.txt[strings.ToLower(t.Hdr.Name)] = append(z.txt[strings.ToLower(t.Hdr.Name)], t.Txt[0])
				} else {
					delete(z.txt, strings.ToLower(rr.Header().Name))
				}
			}
		}
		_ = w.WriteMsg(r)
		return
	}
	soa := &dns.SOA{Hdr: dns.RR_Header{Name: "example.test.", Rrtype: dns.TypeSOA, Class: dns.ClassINET}, Ns: "ns.example.test.", Mbox: "h.example.test.", Serial: 1, Refresh: 60, Retry: 60, Expire: 60, Minttl: 1}
	for _, x := range q.Question {
		n := strings.ToLower(x.Name)
		h := dns.RR_Header{Name: x.Name, Rrtype: x.Qtype, Class: dns.ClassINET}
		switch x.Qtype {
		case dns.TypeA:
			r.Answer = append(r.Answer, &dns.A{Hdr: h, A: []byte{127, 0, 0, 1}})
		case dns.TypeSOA:
			if n == "example.test." {
				r.Answer = append(r.Answer, soa)
			}
		case dns.TypeTXT:
			for _, v := range z.txt[n] {
				r.Answer = append(r.Answer, &dns.TXT{Hdr: h, Txt: []string{v}})
			}
		}
	}
	if len(r.Answer) == 0 {
		r.Ns = append(r.Ns, soa)
	}
	_ = w.WriteMsg(r)
}

// authority is Pebble, in this process.
type authority struct {
	dir   string // URL
	roots *x509.CertPool
	away  atomic.Bool
	asked atomic.Int64 // for something, which takes a POST
}

// startAuthority makes one that answers OCSP as well if it should.
func startAuthority(t *testing.T, dnsServer string, httpPort, tlsPort int, withOCSP bool) *authority {
	t.Helper()
	t.Setenv("PEBBLE_VA_NOSLEEP", "1")
	logger := log.New(io.Discard, "", 0)
	mem := db.NewMemoryStore()
	responder, algorithm := "", "ecdsa"
	var issuer atomic.Pointer[ca.CAImpl] // set before there is a certificate to ask of
	if withOCSP {
		srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { answerOCSP(w, r, issuer.Load()) }))
		t.Cleanup(srv.Close)
		responder, algorithm = srv.URL, "rsa" // Pebble gives out no other key
	}
	c := ca.New(logger, mem, responder, algorithm, 0, 1, map[string]ca.Profile{"default": {Description: "default"}})
	issuer.Store(c)
	v := va.New(logger, httpPort, tlsPort, false, dnsServer, mem)
	front := wfe.New(logger, mem, v, c, []string{"pebble.letsencrypt.org"}, false, false, 1, 1)
	h := front.Handler()
	a := &authority{roots: x509.NewCertPool()}
	srv := httptest.NewTLSServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Method == http.MethodPost { // when to renew is asked by GET, at any time after
			a.asked.Add(1)
		}
		if a.away.Load() {
			http.Error(w, "down", http.StatusServiceUnavailable)
			return
		}
		h.ServeHTTP(w, r)
	}))
	srv.Config.ErrorLog = logger
	t.Cleanup(srv.Close)
	a.dir = srv.URL + wfe.DirectoryPath
	a.roots.AddCert(srv.Certificate())
	return a
}

// edge is a daemon's part that cares for hosts and certificates, with a router.
type edge struct {
	*Daemon
	http, https string
	ca          *authority
}

func startEdge(t *testing.T, challenges []string, dnsFile func(z *zone) string) *edge {
	t.Helper()
	return startEdgeOf(t, challenges, dnsFile, false)
}

func startEdgeOf(t *testing.T, challenges []string, dnsFile func(z *zone) string, withOCSP bool) *edge {
	t.Helper()
	listen := func(network, addr string) net.Listener {
		ln, err := net.Listen(network, addr)
		if err != nil {
			t.Fatal(err)
		}
		return ln
	}
	dir := t.TempDir()
	logger := slog.New(slog.DiscardHandler)
	plain, secure, control := listen("tcp", "127.0.0.1:0"), listen("tcp", "127.0.0.1:0"), listen("unix", filepath.Join(dir, "c.sock"))
	z := startZone(t)
	port := func(ln net.Listener) int { return ln.Addr().(*net.TCPAddr).Port }
	e := &edge{http: plain.Addr().String(), https: secure.Addr().String(), ca: startAuthority(t, z.addr, port(plain), port(secure), withOCSP)}
	cfg := Config{Data: dir, Domain: "example.test", ACMECA: e.ca.dir, DNSServers: z.addr}
	if dnsFile != nil {
		cfg.ACMEDNS = dnsFile(z)
	}
	if err := router.NewCA(filepath.Join(dir, "ca"), cfg.Domain); err != nil {
		t.Fatal(err)
	}
	rt, err := router.New(router.Config{HTTP: plain, HTTPS: secure, Control: control, State: filepath.Join(dir, "table.json"), CA: filepath.Join(dir, "ca"),
		Certs: filepath.Join(dir, "certs"), OnDemand: true, Log: logger, Limits: router.Limits{CertWait: time.Minute, HeaderRead: 2 * time.Minute}}) // a handshake waits for its certificate
	if err != nil {
		t.Fatal(err)
	}
	st, err := store.Open(t.Context(), store.Config{Dir: filepath.Join(dir, "store"), Log: logger})
	if err != nil {
		t.Fatal(err)
	}
	d := &Daemon{cfg: cfg, log: logger, store: st, router: router.Client{Socket: control.Addr().String()}}
	e.Daemon = d
	if d.config, err = config.Open(t.Context(), st, [32]byte{1}, logger); err != nil {
		t.Fatal(err)
	}
	if d.hosting, err = openHosting(t.Context(), st); err != nil {
		t.Fatal(err)
	}
	if d.ownCerts, err = store.NewBucket[ownCert](t.Context(), st, "own-certs"); err != nil {
		t.Fatal(err)
	}
	if challenges != nil || dnsFile != nil {
		cc, err := d.certsConfig()
		if err != nil {
			t.Fatal(err)
		}
		cc.Roots, cc.Challenges = e.ca.roots, challenges
		if d.certs, err = certs.New(t.Context(), cc); err != nil {
			t.Fatal(err)
		}
	}
	d.routes = newRoutes(cfg.Domain, "unix:/nowhere", d.router, logger)
	d.routes.open()
	ctx, cancel := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	wg.Go(func() { _ = d.routes.run(ctx) })
	wg.Go(func() { _ = d.runCerts(ctx) })
	rctx, rcancel := context.WithCancel(context.Background())
	var rg sync.WaitGroup
	rg.Go(func() { _ = rt.Run(rctx) })
	t.Cleanup(func() {
		cancel()
		wg.Wait()
		rcancel()
		rg.Wait()
		if err := st.Close(); err != nil {
			t.Error(err)
		}
	})
	return e
}

// serve makes app live with a domain of its own.
func (e *edge) serve(t *testing.T, app string, domains ...string) {
	t.Helper()
	srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { _, _ = io.WriteString(w, app+" at "+r.Host) }))
	t.Cleanup(srv.Close)
	addr := srv.Listener.Addr().String()
	if err := e.routes.point(t.Context(), app, 1, []m3o.Instance{ready(app, 1, app, addr, time.Now())}); err != nil {
		t.Fatal(err)
	}
	for _, n := range domains {
		if err := e.addDomains(t.Context(), m3o.App{Name: app, Owner: "ada"}, "ada", false, []domain{{Name: n}}); err != nil {
			t.Fatal(err)
		}
	}
}

// leaf is the certificate that name is served with.
func (e *edge) leaf(name string) (*x509.Certificate, error) {
	c, err := tls.DialWithDialer(&net.Dialer{Timeout: 90 * time.Second}, "tcp", e.https, &tls.Config{ServerName: name, InsecureSkipVerify: true})
	if err != nil {
		return nil, err
	}
	defer c.Close() //nolint:errcheck // a test
	return c.ConnectionState().PeerCertificates[0], nil
}

func (e *edge) wantIssued(t *testing.T, name string, names ...string) *x509.Certificate {
	t.Helper()
	var got *x509.Certificate
	for end := time.Now().Add(2 * time.Minute); ; <-time.After(20 * time.Millisecond) {
		var err error
		if got, err = e.leaf(name); err == nil && strings.HasPrefix(got.Issuer.CommonName, "Pebble") {
			break
		}
		if time.Now().After(end) {
			t.Fatalf("%s is served with %v, %v", name, got, err)
		}
	}
	if !slices.Equal(got.DNSNames, names) {
		t.Errorf("%s is served with a certificate for %v, want %v", name, got.DNSNames, names)
	}
	return got
}

func TestCertificateByHTTPAndItsRenewal(t *testing.T) {
	e := startEdge(t, []string{"http-01"}, nil)
	e.serve(t, "shop", "shop.test")
	first := e.wantIssued(t, "shop.test", "shop.test")
	if st, ok := e.certs.State("shop.test"); !ok || st.Expires.IsZero() || st.Err != "" {
		t.Errorf("state %+v, %v", st, ok)
	}
	// With a certificate there, plain HTTP leads to it.
	res, err := (&http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return (&net.Dialer{}).DialContext(ctx, "tcp", e.http)
	}, DisableKeepAlives: true}).RoundTrip(httptest.NewRequest("GET", "http://shop.test/a", nil))
	if err != nil || res.StatusCode != 308 || !strings.HasPrefix(res.Header.Get("Location"), "https://shop.test") {
		t.Errorf("plain HTTP: %v, %v", res, err)
	}
	if err := e.certs.Renew(t.Context(), "shop.test"); err != nil {
		t.Fatal(err)
	}
	second := e.wantIssued(t, "shop.test", "shop.test")
	if second.SerialNumber.Cmp(first.SerialNumber) == 0 {
		t.Error("the renewed certificate is not served")
	}
	// The CA is away: what is there goes on, and the state says why it is old.
	e.ca.away.Store(true)
	ctx, cancel := context.WithTimeout(t.Context(), 3*time.Second)
	defer cancel()
	if err := e.certs.Renew(ctx, "shop.test"); m3o.KindOf(err) != m3o.Unavailable {
		t.Errorf("renewal without a CA: %v", err)
	}
	if got := e.wantIssued(t, "shop.test", "shop.test"); got.SerialNumber.Cmp(second.SerialNumber) != 0 {
		t.Error("another certificate is served though no CA is there")
	}
	if st, _ := e.certs.State("shop.test"); st.Err == "" || st.Expires.IsZero() {
		t.Errorf("state %+v does not tell of the failure", st)
	}
	e.ca.away.Store(false)
	if err := e.certs.Renew(t.Context(), "shop.test"); err != nil {
		t.Fatalf("renewal after the CA came back: %v", err)
	}
	if got := e.wantIssued(t, "shop.test", "shop.test"); got.SerialNumber.Cmp(second.SerialNumber) == 0 {
		t.Error("the renewed certificate is not served")
	}
}

func TestCertificateOnDemandByALPN(t *testing.T) {
	e := startEdge(t, []string{"tls-alpn-01"}, nil)
	e.serve(t, "hello")
	// The handshake itself waits for it.
	got, err := e.leaf("hello.example.test")
	if err != nil || !slices.Equal(got.DNSNames, []string{"hello.example.test"}) || !strings.HasPrefix(got.Issuer.CommonName, "Pebble") {
		t.Fatalf("first handshake: %v, %v", got, err)
	}
	// Names nobody serves cost no request to the CA.
	before := e.ca.asked.Load()
	for _, name := range []string{"stranger.test", "deep.hello.example.test"} {
		if c, err := e.leaf(name); err == nil {
			t.Errorf("%s got a certificate of %s", name, c.Issuer.CommonName)
		}
	}
	if c, err := e.leaf("mistyped.example.test"); err != nil || strings.HasPrefix(c.Issuer.CommonName, "Pebble") {
		t.Errorf("a mistyped app: %v, %v", c, err)
	}
	if n := e.ca.asked.Load() - before; n != 0 {
		t.Errorf("the CA was asked %d times for names nobody serves", n)
	}
}

func TestWildcardCertificateByDNS(t *testing.T) {
	e := startEdge(t, nil, func(z *zone) string {
		f := filepath.Join(t.TempDir(), "dns.yaml")
		if err := os.WriteFile(f, []byte("provider: rfc2136\nserver: "+z.addr+"\nkey: m3o\nsecret: c2VjcmV0\n"), 0o600); err != nil {
			t.Fatal(err)
		}
		return f
	})
	e.serve(t, "one")
	e.serve(t, "two")
	a, b := e.wantIssued(t, "one.example.test", "*.example.test"), e.wantIssued(t, "two.example.test", "*.example.test")
	if a.SerialNumber.Cmp(b.SerialNumber) != 0 {
		t.Error("two apps have two wildcard certificates")
	}
}
