package main

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"connectrpc.com/connect"
	"google.golang.org/protobuf/types/known/timestamppb"

	m3ov1 "github.com/m3o/m3o/api/m3o/v1"
	"github.com/m3o/m3o/api/m3o/v1/m3ov1connect"
)

// hosting is the part of a platform that keeps domains and certificates, by
// the daemon's rules and in its words.
type hosting struct {
	m3ov1connect.UnimplementedDomainsHandler
	*platform
	domains map[string]*m3ov1.Domain // by name
	owner   map[string]string        // name to app
	checks  int
}

func (s *hosting) Add(_ context.Context, req *connect.Request[m3ov1.AddDomainRequest]) (*connect.Response[m3ov1.AddDomainResponse], error) {
	return handle(s.platform, req, func(m *m3ov1.AddDomainRequest) (*m3ov1.AddDomainResponse, error) {
		if _, err := s.app(req.Header(), m.GetApp()); err != nil {
			return nil, err
		}
		name := strings.ToLower(m.GetName())
		switch owner := s.owner[name]; {
		case strings.HasSuffix(name, ".localhost"):
			return nil, wrong(connect.CodeInvalidArgument, "apps are served at <app>.localhost by their name: m3o create", "domain %q is the platform's own", name)
		case m.GetWww() && (name[0] == '*' || m.GetRedirect() != ""):
			return nil, wrong(connect.CodeInvalidArgument, "add the two one by one", "www goes with a plain domain that serves the app")
		case owner == m.GetApp():
			return nil, wrong(connect.CodeAlreadyExists, "m3o domains -a "+m.GetApp(), "%s is served at %s already", m.GetApp(), name)
		case owner != "":
			return nil, wrong(connect.CodeAlreadyExists, "remove it there first: m3o domains:remove "+name, "%s belongs to another app", name)
		case strings.HasSuffix(name, ".taken.example"):
			return nil, wrong(connect.CodeAlreadyExists, "have that owner or an admin add it", "%s overlaps a domain of another owner", name)
		case m.GetRedirect() != "" && s.owner[m.GetRedirect()] != m.GetApp():
			return nil, wrong(connect.CodeInvalidArgument, "m3o domains:add "+m.GetRedirect()+" -a "+m.GetApp(), "%s cannot redirect to %s, which is no domain of %s", name, m.GetRedirect(), m.GetApp())
		}
		res := &m3ov1.AddDomainResponse{Host: m.GetApp() + ".localhost", Addresses: []string{"192.0.2.7", "2001:db8::7"}}
		add := func(name, redirect string) {
			d := &m3ov1.Domain{Name: name, Redirect: redirect, Certificate: "pending", Dns: "missing"}
			s.domains[name], s.owner[name] = d, m.GetApp()
			res.Domains = append(res.Domains, d)
		}
		add(name, m.GetRedirect())
		if m.GetWww() {
			add("www."+name, name)
		}
		return res, nil
	})
}

func (s *hosting) Remove(_ context.Context, req *connect.Request[m3ov1.RemoveDomainRequest]) (*connect.Response[m3ov1.RemoveDomainResponse], error) {
	return handle(s.platform, req, func(m *m3ov1.RemoveDomainRequest) (*m3ov1.RemoveDomainResponse, error) {
		d := s.domains[m.GetName()]
		if d == nil || s.owner[m.GetName()] != m.GetApp() {
			return nil, wrong(connect.CodeNotFound, "m3o domains -a "+m.GetApp(), "%s is not served at %s", m.GetApp(), m.GetName())
		}
		delete(s.domains, m.GetName())
		delete(s.owner, m.GetName())
		return &m3ov1.RemoveDomainResponse{Domain: d}, nil
	})
}

// Check finds the domain ready at the second look.
func (s *hosting) Check(_ context.Context, req *connect.Request[m3ov1.CheckDomainRequest]) (*connect.Response[m3ov1.CheckDomainResponse], error) {
	return handle(s.platform, req, func(m *m3ov1.CheckDomainRequest) (*m3ov1.CheckDomainResponse, error) {
		d := s.domains[m.GetName()]
		if d == nil {
			return nil, wrong(connect.CodeNotFound, "m3o domains:add "+m.GetName(), "%s is not served at %q", m.GetApp(), m.GetName())
		}
		if s.checks++; s.checks > 1 {
			d.Dns, d.Certificate, d.Expires = "ok", "issued", timestamppb.New(now.Add(24*time.Hour))
		}
		return &m3ov1.CheckDomainResponse{Domain: d}, nil
	})
}

type certsOfHosting struct {
	m3ov1connect.UnimplementedCertificatesHandler
	*platform
	owner map[string]string
}

func (s certsOfHosting) Add(_ context.Context, req *connect.Request[m3ov1.AddCertificateRequest]) (*connect.Response[m3ov1.AddCertificateResponse], error) {
	return handle(s.platform, req, func(m *m3ov1.AddCertificateRequest) (*m3ov1.AddCertificateResponse, error) {
		const both = "give the certificate with its chain, and its key, in PEM"
		pair, err := tls.X509KeyPair(m.GetChain(), m.GetKey())
		if err != nil {
			return nil, wrong(connect.CodeInvalidArgument, both, "the private key is not the certificate's")
		}
		if !time.Now().Before(pair.Leaf.NotAfter) {
			return nil, wrong(connect.CodeInvalidArgument, both, "the certificate ended on %s", pair.Leaf.NotAfter.Format(time.DateOnly))
		}
		for _, n := range pair.Leaf.DNSNames {
			if s.owner[n] != m.GetApp() {
				return nil, wrong(connect.CodePermissionDenied, "m3o domains:add "+n+" -a "+m.GetApp(), "the certificate is for %s, which is no domain of %s", n, m.GetApp())
			}
		}
		return &m3ov1.AddCertificateResponse{Certificate: &m3ov1.Certificate{Id: "0123456789abcdef", Names: pair.Leaf.DNSNames, Own: true, Expires: timestamppb.New(pair.Leaf.NotAfter)}}, nil
	})
}

func newHosting(t *testing.T) (*hosting, *laptop) {
	t.Helper()
	p := &platform{ca: newAuthority(t, true), nonces: map[string]string{}, tokens: map[string]string{}, users: map[string]bool{}}
	s := &hosting{platform: p, domains: map[string]*m3ov1.Domain{}, owner: map[string]string{"other.example": "other"}}
	mux := http.NewServeMux()
	mux.Handle("/", p.handler())
	mux.Handle(m3ov1connect.NewDomainsHandler(s))
	mux.Handle(m3ov1connect.NewCertificatesHandler(certsOfHosting{platform: p, owner: s.owner}))
	p.url = serveTLS(t, mux, p.ca.leaf(t, "api.localhost", time.Now().Add(time.Hour)))
	p.hello()
	return s, newLaptop(t).ci(p)
}

func TestDomainsAreAddedAwaitedAndRemoved(t *testing.T) {
	_, l := newHosting(t)
	l.do("domains:add", "Shop.example", "--www", "-a", "hello").want(t, 0, []string{"added shop.example\n", "added www.shop.example\n"},
		[]string{"set in DNS: shop.example CNAME hello.localhost", "at the top of a zone, its addresses: 192.0.2.7, 2001:db8::7",
			"m3o: hint: m3o domains:wait shop.example -a hello", "m3o: undo: m3o domains:remove shop.example -a hello"})
	l.do("domains:add", "*.shop.example", "-a", "hello").want(t, 0, []string{"added *.shop.example\n"}, nil)
	l.do("domains:add", "old.example", "--redirect-to", "shop.example", "-a", "hello").want(t, 0, []string{"added old.example\n"}, nil)
	l.do("domains:wait", "Shop.Example", "-a", "hello").want(t, 0, []string{"shop.example is served, certificate: issued until 2026-05-05\n"}, []string{"waiting for DNS: missing"})
	l.do("domains:remove", "old.example", "-a", "hello").want(t, 0, []string{"removed old.example\n"}, []string{"m3o: undo: m3o domains:add old.example --redirect-to shop.example -a hello"})

	for _, tc := range []struct {
		args string
		exit int
		says []string
	}{
		{"domains:add shop.example", 1, []string{"hello is served at shop.example already", "hint: m3o domains -a hello"}},
		{"domains:add other.example", 1, []string{"other.example belongs to another app", "hint: remove it there first: m3o domains:remove other.example"}},
		{"domains:add a.taken.example", 1, []string{"a.taken.example overlaps a domain of another owner", "hint: have that owner or an admin add it"}},
		{"domains:add *.taken.example", 1, []string{"overlaps a domain of another owner"}},
		{"domains:add thief.localhost", 2, []string{"is the platform's own", "hint: apps are served at <app>.localhost"}},
		{"domains:add *.new.example --www", 2, []string{"www goes with a plain domain", "hint: add the two one by one"}},
		{"domains:add new.example --www --redirect-to shop.example", 2, []string{"www goes with a plain domain"}},
		{"domains:add new.example --redirect-to other.example", 2, []string{"cannot redirect to other.example, which is no domain of hello", "hint: m3o domains:add other.example -a hello"}},
		{"domains:remove other.example", 1, []string{"hello is not served at other.example", "hint: m3o domains -a hello"}},
		{"domains:wait new.example", 1, []string{`hello is not served at "new.example"`, "hint: m3o domains:add new.example"}},
		{"domains:wait shop.example --timeout soon", 2, []string{`is no duration`, "hint: --timeout 5m"}},
		{"domains:add", 2, []string{"DOMAIN"}},
	} {
		o := l.m3o(append(strings.Fields(tc.args), "-a", "hello")...)
		o.want(t, tc.exit, nil, tc.says)
		if o.out != "" {
			t.Errorf("m3o %s prints %q though it was refused", tc.args, o.out)
		}
	}
}

func TestOwnCertificatesAreAddedOrRefused(t *testing.T) {
	_, l := newHosting(t)
	l.do("domains:add", "shop.example", "-a", "hello")
	ca := newAuthority(t, false)
	write := func(name string, c tls.Certificate) (crt, key string) {
		t.Helper()
		kb, err := x509.MarshalPKCS8PrivateKey(c.PrivateKey)
		if err != nil {
			t.Fatal(err)
		}
		crt, key = filepath.Join(l.dir, name+".crt"), filepath.Join(l.dir, name+".key")
		for file, b := range map[string]*pem.Block{crt: {Type: "CERTIFICATE", Bytes: c.Certificate[0]}, key: {Type: "PRIVATE KEY", Bytes: kb}} {
			if err := os.WriteFile(file, pem.EncodeToMemory(b), 0o600); err != nil {
				t.Fatal(err)
			}
		}
		return crt, key
	}
	end := time.Now().Add(24 * time.Hour)
	good, goodKey := write("good", ca.leaf(t, "shop.example", end))
	_, otherKey := write("second", ca.leaf(t, "shop.example", end))
	old, oldKey := write("old", ca.leaf(t, "shop.example", time.Now().Add(-time.Hour)))
	stranger, strangerKey := write("stranger", ca.leaf(t, "bank.example", end))
	bad := filepath.Join(l.dir, "bad.pem")
	if err := os.WriteFile(bad, []byte("-----BEGIN NOTHING-----\ns3cret\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	l.do("certs:add", good, goodKey, "-a", "hello").want(t, 0, []string{"serving shop.example until " + end.UTC().Format(time.DateOnly)}, []string{"m3o: undo: m3o certs:remove 0123456789abcdef -a hello"})
	for _, tc := range []struct {
		what, crt, key string
		exit           int
		says           []string
	}{
		{"no PEM", bad, goodKey, 2, []string{"does not begin with a PEM certificate", "hint: m3o certs:add CERT KEY, both PEM"}},
		{"a key that is no PEM", good, bad, 2, []string{"does not begin with a PEM key"}},
		{"the two swapped", goodKey, good, 2, []string{"does not begin with a PEM certificate"}},
		{"no file", filepath.Join(l.dir, "none"), goodKey, 2, []string{"no such file"}},
		{"another's key", good, otherKey, 2, []string{"the private key is not the certificate's", "hint: give the certificate with its chain"}},
		{"an old one", old, oldKey, 2, []string{"the certificate ended on "}},
		{"a stranger's name", stranger, strangerKey, 1, []string{"the certificate is for bank.example, which is no domain of hello", "hint: m3o domains:add bank.example -a hello"}},
	} {
		o := l.m3o("certs:add", tc.crt, tc.key, "-a", "hello")
		o.want(t, tc.exit, nil, tc.says)
		if o.out != "" || strings.Contains(o.err, "s3cret") {
			t.Errorf("%s: prints %q, %q", tc.what, o.out, o.err)
		}
	}
}
