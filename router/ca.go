package router

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/m3o/m3o"
	"github.com/m3o/m3o/internal/atomicfile"
)

const (
	caLife   = 10 * 365 * 24 * time.Hour
	leafLife = 30 * 24 * time.Hour // renewed after two thirds
	clockOff = time.Hour           // how far behind a client's clock may be
)

// NewCA makes the internal certificate authority of domain in dir, files
// ca.crt and ca.key (mode 0600), unless it is there already. Its root is
// constrained to domain and the names under it: trusting it on a laptop, even
// with its key stolen, lets nobody pose as any other site. One that is there
// for another domain is a Conflict.
func NewCA(dir, domain string) error {
	if !validHost(domain) {
		return m3o.Errorf(m3o.Invalid, "domain %q is not a lower-case host name", domain)
	}
	if ca, err := LoadCA(dir); err == nil {
		if !slices.Equal(ca.cert.PermittedDNSDomains, []string{domain}) {
			return &m3o.Error{Kind: m3o.Conflict, Msg: fmt.Sprintf("the CA in %s is for %s, not %s", dir, strings.Join(ca.cert.PermittedDNSDomains, ", "), domain),
				Hint: "move ca.crt and ca.key away to make a new one; who trusts the old one must trust the new one"}
		}
		return nil
	} else if !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return fmt.Errorf("make CA: %w", err)
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return fmt.Errorf("make CA: %w", err)
	}
	serial, err := newSerial()
	if err != nil {
		return fmt.Errorf("make CA: %w", err)
	}
	now := time.Now()
	all4, all6 := net.CIDRMask(0, 32), net.CIDRMask(0, 128)
	tmpl := &x509.Certificate{
		SerialNumber: serial, Subject: pkix.Name{CommonName: "m3o CA for " + domain, Organization: []string{"m3o"}},
		NotBefore: now.Add(-clockOff), NotAfter: now.Add(caLife),
		IsCA: true, BasicConstraintsValid: true, MaxPathLenZero: true,
		KeyUsage:                    x509.KeyUsageCertSign | x509.KeyUsageCRLSign,
		PermittedDNSDomains:         []string{domain},
		PermittedDNSDomainsCritical: true,
		ExcludedIPRanges:            []*net.IPNet{{IP: net.IPv4zero.To4(), Mask: all4}, {IP: net.IPv6zero, Mask: all6}},
	}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, tmpl, &key.PublicKey, key)
	if err != nil {
		return fmt.Errorf("make CA: %w", err)
	}
	kder, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return fmt.Errorf("make CA: %w", err)
	}
	// The certificate comes last: LoadCA looks for it first.
	if err := atomicfile.Write(filepath.Join(dir, "ca.key"), pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: kder}), 0o600); err != nil {
		return fmt.Errorf("make CA: %w", err)
	}
	if err := atomicfile.Write(filepath.Join(dir, "ca.crt"), pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}), 0o644); err != nil {
		return fmt.Errorf("make CA: %w", err)
	}
	return nil
}

func newSerial() (*big.Int, error) {
	return rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 127))
}

// A CA signs leaf certificates. It is safe for concurrent use.
type CA struct {
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
}

// LoadCA reads what NewCA made; its error matches fs.ErrNotExist where there is none.
func LoadCA(dir string) (*CA, error) {
	load := func(name, typ string) ([]byte, error) {
		b, err := os.ReadFile(filepath.Join(dir, name))
		if err != nil {
			return nil, fmt.Errorf("load CA: %w", err)
		}
		block, _ := pem.Decode(b)
		if block == nil || block.Type != typ {
			return nil, fmt.Errorf("load CA: %s holds no %s", filepath.Join(dir, name), strings.ToLower(typ))
		}
		return block.Bytes, nil
	}
	der, err := load("ca.crt", "CERTIFICATE")
	if err != nil {
		return nil, err
	}
	kder, err := load("ca.key", "PRIVATE KEY")
	if err != nil {
		return nil, err
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		return nil, fmt.Errorf("load CA: %w", err)
	}
	k, err := x509.ParsePKCS8PrivateKey(kder)
	if err != nil {
		return nil, errors.New("load CA: ca.key is malformed") // the cause might quote the key
	}
	key, ok := k.(*ecdsa.PrivateKey)
	if !ok || !key.PublicKey.Equal(cert.PublicKey) {
		return nil, errors.New("load CA: ca.key is not the key of ca.crt")
	}
	return &CA{cert, key}, nil
}

// Leaf makes a server certificate for exactly name, valid for thirty days and
// no longer than the CA. Names the CA is not constrained to are Invalid.
func (ca *CA) Leaf(name string) (*tls.Certificate, error) {
	if !validHost(name) || !slices.ContainsFunc(ca.cert.PermittedDNSDomains, func(d string) bool {
		return name == d || strings.HasSuffix(name, "."+d)
	}) {
		return nil, m3o.Errorf(m3o.Invalid, "the internal CA signs nothing for %q", name)
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, fmt.Errorf("sign %s: %w", name, err)
	}
	serial, err := newSerial()
	if err != nil {
		return nil, fmt.Errorf("sign %s: %w", name, err)
	}
	now := time.Now()
	end := now.Add(leafLife)
	if end.After(ca.cert.NotAfter) {
		end = ca.cert.NotAfter
	}
	tmpl := &x509.Certificate{
		SerialNumber: serial, Subject: pkix.Name{CommonName: name[:min(len(name), 64)]}, DNSNames: []string{name},
		NotBefore: now.Add(-clockOff), NotAfter: end,
		KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
		BasicConstraintsValid: true,
	}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, ca.cert, &key.PublicKey, ca.key)
	if err != nil {
		return nil, fmt.Errorf("sign %s: %w", name, err)
	}
	leaf, err := x509.ParseCertificate(der)
	if err != nil {
		return nil, fmt.Errorf("sign %s: %w", name, err)
	}
	return &tls.Certificate{Certificate: [][]byte{der, ca.cert.Raw}, PrivateKey: key, Leaf: leaf}, nil
}

func renewAt(leaf *x509.Certificate) time.Time {
	return leaf.NotBefore.Add(leaf.NotAfter.Sub(leaf.NotBefore) * 2 / 3)
}
