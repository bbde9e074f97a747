package daemon

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/pem"
	"math/big"
	"strings"
	"testing"
	"time"

	"github.com/m3o/m3o"
)

func TestCheckDomain(t *testing.T) {
	for name, want := range map[string]string{
		"shop.example": "shop.example", "Shop.Example.": "shop.example", "*.shop.example": "*.shop.example", "_x.shop.example": "_x.shop.example",
		"": "", "localhost": "", "192.0.2.1": "", "::1": "", "a..b": "", "-a.example": "", "*.*.example": "", "shop.example:80": "", "shop/x.example": "",
		"café.example": "", "apps.test": "", "hello.apps.test": "", "v1--hello.apps.test": "", "*.apps.test": "", "myapps.test": "myapps.test",
		strings.Repeat("a", 64) + ".example": "", strings.Repeat("a.", 130) + "example": "",
	} {
		got, err := checkDomain(name, "apps.test")
		if got != want || (err == nil) != (want != "") {
			t.Errorf("checkDomain(%q) = %q, %v, want %q", name, got, err, want)
		}
		if err != nil && (m3o.KindOf(err) != m3o.Invalid || m3o.HintOf(err) == "") {
			t.Errorf("checkDomain(%q): %v is no Invalid error with a hint", name, err)
		}
	}
}

func TestNobodyTakesAnothersDomain(t *testing.T) {
	now := time.Now()
	all := []domain{
		{Name: "shop.example", App: "shop", Owner: "ada"},
		{Name: "gone.example", Owner: "ada", Freed: now.Add(-time.Hour)},
		{Name: "old.example", Owner: "ada", Freed: now.Add(-freedFor - time.Hour)},
		{Name: "deep.eve.example", App: "eve", Owner: "eve"},
	}
	for _, tc := range []struct {
		name, app, owner string
		admin, ok        bool
	}{
		{"new.example", "blog", "bob", false, true},
		{"shop.example", "shop", "ada", false, false},   // it has it already
		{"shop.example", "blog", "ada", false, false},   // another app, though the same owner
		{"shop.example", "blog", "root", true, false},   // an admin removes it first
		{"a.shop.example", "blog", "ada", false, true},  // one's own
		{"a.shop.example", "blog", "bob", false, false}, // under another's
		{"*.shop.example", "blog", "bob", false, false},
		{"*.shop.example", "blog", "ada", false, true},
		{"myshop.example", "blog", "bob", false, true},
		{"eve.example", "blog", "bob", false, false}, // above another's
		{"a.shop.example", "blog", "bob", true, true},
		{"gone.example", "blog", "bob", false, false}, // its DNS may still point here
		{"gone.example", "blog", "ada", false, true},
		{"old.example", "blog", "bob", false, true},
	} {
		err := mayClaim(all, tc.name, tc.app, tc.owner, tc.admin, now)
		if (err == nil) != tc.ok || err != nil && (m3o.KindOf(err) != m3o.Conflict || m3o.HintOf(err) == "") {
			t.Errorf("%s for %s of %s (admin %v): %v, want allowed %v", tc.name, tc.app, tc.owner, tc.admin, err, tc.ok)
		}
	}
}

func TestDomainMovesWithoutBeingServedTwice(t *testing.T) {
	e := startEdge(t, nil, nil)
	e.serve(t, "one", "shop.test")
	e.serve(t, "two")
	two := m3o.App{Name: "two", Owner: "ada"}
	if err := e.addDomains(t.Context(), two, "ada", false, []domain{{Name: "shop.test"}}); m3o.KindOf(err) != m3o.Conflict {
		t.Fatalf("a second app at one domain: %v", err)
	}
	if err := e.addDomains(t.Context(), two, "ada", false, []domain{{Name: "x.test", Redirect: "shop.test"}}); m3o.KindOf(err) != m3o.Invalid {
		t.Errorf("a redirect to another app's domain: %v", err)
	}
	if _, err := e.removeDomain(t.Context(), "two", "shop.test"); m3o.KindOf(err) != m3o.NotFound {
		t.Errorf("removing another app's domain: %v", err)
	}
	if _, err := e.removeDomain(t.Context(), "one", "shop.test"); err != nil {
		t.Fatal(err)
	}
	if err := e.addDomains(t.Context(), two, "ada", false, []domain{{Name: "shop.test"}, {Name: "www.shop.test", Redirect: "shop.test"}}); err != nil {
		t.Fatal(err)
	}
	hosts := map[string]string{}
	for _, h := range e.routes.table().Hosts {
		hosts[h.Name] = h.App + h.Redirect
	}
	if hosts["shop.test"] != "two" || hosts["www.shop.test"] != "twoshop.test" || hosts["x.test"] != "" {
		t.Errorf("hosts %v", hosts)
	}
	// A destroyed app leaves its domain to its owner.
	if err := e.dropHosting(t.Context(), "two"); err != nil {
		t.Fatal(err)
	}
	bob := m3o.App{Name: "bobs", Owner: "bob"}
	if err := e.addDomains(t.Context(), bob, "bob", false, []domain{{Name: "shop.test"}}); m3o.KindOf(err) != m3o.Conflict {
		t.Errorf("another owner takes a domain that was just freed: %v", err)
	}
}

func TestOwnCertificateMustFitItsKeyAndTheApp(t *testing.T) {
	e := startEdge(t, nil, nil)
	e.serve(t, "one", "shop.test")
	e.serve(t, "two", "bank.test")
	issue := func(name string, end time.Time) (chain []byte, key m3o.Secret) {
		t.Helper()
		k, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
		if err != nil {
			t.Fatal(err)
		}
		tmpl := &x509.Certificate{SerialNumber: big.NewInt(1), DNSNames: []string{name}, NotBefore: end.Add(-48 * time.Hour), NotAfter: end}
		der, err := x509.CreateCertificate(rand.Reader, tmpl, tmpl, k.Public(), k)
		if err != nil {
			t.Fatal(err)
		}
		kb, err := x509.MarshalPKCS8PrivateKey(k)
		if err != nil {
			t.Fatal(err)
		}
		return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}), m3o.Secret(pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: kb}))
	}
	end := time.Now().Add(24 * time.Hour)
	good, goodKey := issue("shop.test", end)
	_, otherKey := issue("shop.test", end)
	old, oldKey := issue("shop.test", time.Now().Add(-time.Hour))
	bank, bankKey := issue("bank.test", end)
	for _, tc := range []struct {
		what  string
		chain []byte
		key   m3o.Secret
		kind  m3o.Kind
		says  string
	}{
		{"no PEM", []byte("certificate"), goodKey, m3o.Invalid, "no certificate in PEM"},
		{"a key that is none", good, "key", m3o.Invalid, "no private key in PEM"},
		{"another's key", good, otherKey, m3o.Invalid, "not the certificate's"},
		{"an old one", old, oldKey, m3o.Invalid, "ended on"},
		{"another app's domain", bank, bankKey, m3o.Denied, "bank.test, which is no domain of one"},
	} {
		if _, err := e.addCert(t.Context(), "one", "ada", false, tc.chain, tc.key); m3o.KindOf(err) != tc.kind || !strings.Contains(err.Error(), tc.says) || m3o.HintOf(err) == "" {
			t.Errorf("%s: %v", tc.what, err)
		}
	}
	c, err := e.addCert(t.Context(), "one", "ada", false, good, goodKey)
	if err != nil {
		t.Fatal(err)
	}
	leaf, err := e.leaf("shop.test")
	if err != nil || !leaf.NotAfter.Equal(c.Expires) {
		t.Errorf("served with %v, %v, want the one that was brought", leaf, err)
	}
}
