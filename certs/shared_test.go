package certs

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/base64"
	"encoding/pem"
	"io"
	"math/big"
	"net/http"
	"net/http/httptest"
	"net/url"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/caddyserver/certmagic"
	"golang.org/x/crypto/ocsp"
)

// taken is a Server that tells what it is to serve.
type taken chan Certificate

func (s taken) Install(_ context.Context, c Certificate) error   { s <- c; return nil }
func (s taken) Present(context.Context, string, Challenge) error { return nil }

// An authority issues certificates that name its OCSP responder.
type authority struct {
	url   string
	cert  *x509.Certificate
	key   *ecdsa.PrivateKey
	asked atomic.Int64
}

func newAuthority(t *testing.T) *authority {
	t.Helper()
	a := &authority{}
	var err error
	if a.key, err = ecdsa.GenerateKey(elliptic.P256(), rand.Reader); err != nil {
		t.Fatal(err)
	}
	tmpl := &x509.Certificate{SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "test CA"}, IsCA: true, BasicConstraintsValid: true,
		KeyUsage: x509.KeyUsageCertSign, NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(365 * 24 * time.Hour)}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, tmpl, a.key.Public(), a.key)
	if err != nil {
		t.Fatal(err)
	}
	if a.cert, err = x509.ParseCertificate(der); err != nil {
		t.Fatal(err)
	}
	srv := httptest.NewServer(a)
	t.Cleanup(srv.Close)
	a.url = srv.URL
	return a
}

// ServeHTTP says of every certificate that it is good.
func (a *authority) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	a.asked.Add(1)
	raw, err := io.ReadAll(r.Body)
	if r.Method == http.MethodGet {
		var path string
		if path, err = url.PathUnescape(strings.TrimPrefix(r.URL.EscapedPath(), "/")); err == nil {
			raw, err = base64.StdEncoding.DecodeString(path)
		}
	}
	var q *ocsp.Request
	if err == nil {
		q, err = ocsp.ParseRequest(raw)
	}
	var b []byte
	if err == nil {
		b, err = ocsp.CreateResponse(a.cert, a.cert, ocsp.Response{Status: ocsp.Good, SerialNumber: q.SerialNumber,
			ThisUpdate: time.Now().Add(-time.Hour), NextUpdate: time.Now().Add(24 * time.Hour)}, a.key)
	}
	if err != nil {
		http.Error(w, err.Error(), http.StatusBadRequest)
		return
	}
	_, _ = w.Write(b)
}

// issue is a certificate and its key in PEM.
func (a *authority) issue(t *testing.T, name string) (chain, key []byte) {
	t.Helper()
	k, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	tmpl := &x509.Certificate{SerialNumber: big.NewInt(7), DNSNames: []string{name}, OCSPServer: []string{a.url},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(90 * 24 * time.Hour)}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, a.cert, k.Public(), a.key)
	if err != nil {
		t.Fatal(err)
	}
	kb, err := x509.MarshalPKCS8PrivateKey(k)
	if err != nil {
		t.Fatal(err)
	}
	chain = append(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}), pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: a.cert.Raw})...)
	return chain, pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: kb})
}

// Every daemon serves the certificate that one of them got, and its OCSP
// response, without asking the CA or the responder again.
func TestTwoDaemonsServeOneCertificateAndItsOCSPResponse(t *testing.T) {
	ctx := t.Context()
	a := newAuthority(t)
	chain, key := a.issue(t, "a.test")
	cfg := testConfig(t)
	cfg.CA = "http://127.0.0.1:1/directory" // there is nobody: what is asked for would fail
	var got [2]Certificate
	for i := range got {
		served := make(taken, 10)
		cfg.Server = served
		m, err := New(ctx, cfg)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(m.cache.Stop)
		if i == 0 { // it is the one that got it
			issuer := m.magic.Issuers[0].IssuerKey()
			for k, v := range map[string][]byte{certmagic.StorageKeys.SiteCert(issuer, "a.test"): chain, certmagic.StorageKeys.SitePrivateKey(issuer, "a.test"): key,
				certmagic.StorageKeys.SiteMeta(issuer, "a.test"): []byte(`{"sans":["a.test"]}`)} {
				if err := m.storage.Store(ctx, k, v); err != nil {
					t.Fatal(err)
				}
			}
		}
		if err := m.Want(ctx, "a.test"); err != nil {
			t.Fatal(err)
		}
		got[i] = <-served
		if s, ok := m.State("a.test"); !ok || s.Issued.IsZero() || s.Err != "" {
			t.Errorf("daemon %d: state %+v", i, s)
		}
	}
	one, two := got[0], got[1]
	if one.ID != "acme a.test" || !bytes.Equal(one.Chain, chain) || !bytes.Equal(two.Chain, chain) || one.Key != two.Key {
		t.Error("the two serve other certificates")
	}
	if res, err := ocsp.ParseResponse(one.Staple, a.cert); err != nil || res.Status != ocsp.Good || res.SerialNumber.Int64() != 7 {
		t.Errorf("OCSP response %v, %v", res, err)
	}
	if !bytes.Equal(one.Staple, two.Staple) || a.asked.Load() != 1 {
		t.Errorf("the responder was asked %d times, want once for both", a.asked.Load())
	}
}
