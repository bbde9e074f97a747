package daemon

import (
	"bytes"
	"crypto/tls"
	"crypto/x509"
	"encoding/base64"
	"io"
	"net"
	"net/http"
	"net/url"
	"strings"
	"testing"
	"time"

	"github.com/letsencrypt/pebble/v2/ca"
	"golang.org/x/crypto/ocsp"
)

// answerOCSP says of every certificate that it is good.
func answerOCSP(w http.ResponseWriter, r *http.Request, c *ca.CAImpl) {
	var raw []byte
	var err error
	if r.Method == http.MethodGet {
		var path string
		if path, err = url.PathUnescape(strings.TrimPrefix(r.URL.EscapedPath(), "/")); err == nil {
			raw, err = base64.StdEncoding.DecodeString(path)
		}
	} else {
		raw, err = io.ReadAll(r.Body)
	}
	if err != nil {
		http.Error(w, err.Error(), http.StatusBadRequest)
		return
	}
	q, err := ocsp.ParseRequest(raw)
	if err != nil {
		http.Error(w, err.Error(), http.StatusBadRequest)
		return
	}
	issuer, err := x509.ParseCertificate(c.GetIntermediateCert(0).DER)
	if err != nil {
		http.Error(w, err.Error(), http.StatusInternalServerError)
		return
	}
	b, err := ocsp.CreateResponse(issuer, issuer, ocsp.Response{Status: ocsp.Good, SerialNumber: q.SerialNumber,
		ThisUpdate: time.Now().Add(-time.Hour), NextUpdate: time.Now().Add(24 * time.Hour)}, c.GetIntermediateKey(0))
	if err != nil {
		http.Error(w, err.Error(), http.StatusInternalServerError)
		return
	}
	w.Header().Set("Content-Type", "application/ocsp-response")
	_, _ = w.Write(b)
}

// A certificate that names an OCSP responder is served with its response as
// soon as it has been issued, and so is the one that follows it.
func TestIssuedCertificateIsServedWithItsOCSPResponse(t *testing.T) {
	e := startEdgeOf(t, []string{"http-01"}, nil, true)
	e.serve(t, "shop", "shop.test")
	stapled := func(serial *x509.Certificate) (state tls.ConnectionState, res *ocsp.Response) {
		t.Helper()
		for end := time.Now().Add(2 * time.Minute); ; <-time.After(20 * time.Millisecond) {
			c, err := tls.DialWithDialer(&net.Dialer{Timeout: 90 * time.Second}, "tcp", e.https, &tls.Config{ServerName: "shop.test", InsecureSkipVerify: true})
			if err == nil {
				state = c.ConnectionState()
				_ = c.Close()
				if len(state.OCSPResponse) > 0 && (serial == nil || state.PeerCertificates[0].SerialNumber.Cmp(serial.SerialNumber) != 0) {
					break
				}
			}
			if time.Now().After(end) {
				t.Fatalf("no handshake with an OCSP response: %v", err)
			}
		}
		res, err := ocsp.ParseResponseForCert(state.OCSPResponse, state.PeerCertificates[0], state.PeerCertificates[1])
		if err != nil {
			t.Fatal(err)
		}
		return state, res
	}
	first, res := stapled(nil)
	if res.Status != ocsp.Good || res.SerialNumber.Cmp(first.PeerCertificates[0].SerialNumber) != 0 {
		t.Errorf("status %d of %v, want good of %v", res.Status, res.SerialNumber, first.PeerCertificates[0].SerialNumber)
	}
	if err := e.certs.Renew(t.Context(), "shop.test"); err != nil {
		t.Fatal(err)
	}
	second, _ := stapled(first.PeerCertificates[0])
	// What a new router is given is the newest, too.
	e.certs.InstallAll(t.Context())
	again, _ := stapled(nil)
	if !bytes.Equal(again.PeerCertificates[0].Raw, second.PeerCertificates[0].Raw) {
		t.Error("an older certificate came back")
	}
}
