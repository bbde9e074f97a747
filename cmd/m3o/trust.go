package main

import (
	"context"
	"crypto/sha1" //nolint:gosec // how the macOS keychain names certificates
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"encoding/base64"
	"encoding/hex"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	goruntime "runtime"
	"slices"
	"strings"

	m3ov1 "github.com/m3o/m3o/api/m3o/v1"
	"github.com/m3o/m3o/internal/atomicfile"
)

// fingerprint is the SHA-256 of a certificate, written as m3od writes it at
// its first start so that the two can be compared at a glance.
func fingerprint(cert *x509.Certificate) string {
	sum := sha256.Sum256(cert.Raw)
	return printSum(sum[:])
}

func printSum(sum []byte) string { return "SHA256:" + strings.ToUpper(hex.EncodeToString(sum)) }

// parseFingerprint reads a SHA-256 in hex, with or without colons as openssl
// prints them, or in base64 as ssh does, after an optional "SHA256:".
func parseFingerprint(s string) (string, error) {
	t := strings.TrimSpace(s)
	if len(t) > 7 && strings.EqualFold(t[:7], "sha256:") {
		t = t[7:]
	}
	b, err := hex.DecodeString(strings.ReplaceAll(t, ":", ""))
	if err != nil || len(b) != sha256.Size {
		b, err = base64.RawStdEncoding.DecodeString(strings.TrimRight(t, "="))
	}
	if err != nil || len(b) != sha256.Size {
		return "", misuse(quoted(s)+" is no SHA-256 fingerprint", "m3od prints it at its first start: SHA256: and 64 hex digits")
	}
	return printSum(b), nil
}

// parseCA reads the one certificate of a PEM file, which must be a CA's.
func parseCA(data []byte) (*x509.Certificate, error) {
	block, _ := pem.Decode(data)
	if block == nil || block.Type != "CERTIFICATE" {
		return nil, errors.New("it holds no PEM certificate")
	}
	cert, err := x509.ParseCertificate(block.Bytes)
	if err != nil {
		return nil, err
	}
	if !cert.IsCA {
		return nil, errors.New("its certificate is not a CA's")
	}
	return cert, nil
}

func readCA(path string) (string, error) {
	data, err := readSmall(path)
	if err != nil {
		return "", err
	}
	cert, err := parseCA(data)
	if err != nil {
		return "", fail(fmt.Sprintf("%s is no CA certificate: %v", path, err), "")
	}
	return toPEM(cert), nil
}

func toPEM(cert *x509.Certificate) string {
	return string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: cert.Raw}))
}

func storedPrint(ca string) string {
	cert, err := parseCA([]byte(ca))
	if err != nil {
		return "unreadable"
	}
	return fingerprint(cert)
}

// shownCA fetches the CA that a server says is its own and checks that the
// certificate it shows is signed by it. Nothing secret is sent, since nobody
// vouches for the answer yet: the user must compare the fingerprint.
func shownCA(ctx context.Context, u *url.URL) (*x509.Certificate, error) {
	var shown []*x509.Certificate
	cl := clientWith(target{url: u}, &tls.Config{
		MinVersion:         tls.VersionTLS12,
		InsecureSkipVerify: true, //nolint:gosec // the chain is checked below, the CA by the user
		VerifyConnection: func(s tls.ConnectionState) error {
			shown = s.PeerCertificates
			return nil
		},
	})
	info, err := ask(ctx, cl.server.Info, &m3ov1.InfoRequest{})
	if err != nil {
		return nil, err
	}
	if info.GetCa() == "" {
		return nil, fail(fmt.Sprintf("the certificate of %s is signed by a CA that this computer does not know, and the server names none", u.Hostname()),
			"--ca FILE names the CA's certificate")
	}
	ca, err := parseCA([]byte(info.GetCa()))
	if err != nil {
		return nil, fail("the CA that the server names cannot be read: "+err.Error(), "")
	}
	opts := x509.VerifyOptions{DNSName: u.Hostname(), Roots: x509.NewCertPool(), Intermediates: x509.NewCertPool()}
	opts.Roots.AddCert(ca)
	for _, c := range shown[min(1, len(shown)):] {
		opts.Intermediates.AddCert(c)
	}
	if len(shown) == 0 {
		return nil, fail("the server shows no certificate", "")
	}
	if _, err := shown[0].Verify(opts); err != nil {
		return nil, fail(fmt.Sprintf("the certificate of %s is not signed by the CA that the server names: %v", u.Host, err),
			"somebody may be in between; ask who runs the server")
	}
	return ca, nil
}

func runTrust(ctx context.Context, c *call) error {
	cl, err := c.connect()
	if err != nil {
		return err
	}
	pemCA := cl.ca
	if !c.has("uninstall") || pemCA == "" {
		info, err := ask(ctx, cl.server.Info, &m3ov1.InfoRequest{})
		if err != nil {
			return err
		}
		if info.GetCa() == "" {
			c.say("the certificates of %s are public: there is nothing to trust", cl.url.Host)
			return nil
		}
		if cl.ca != "" && storedPrint(info.GetCa()) != storedPrint(cl.ca) {
			return fail("the server names another CA than the one trusted at login", "m3o login "+cl.url.String())
		}
		pemCA = info.GetCa()
	}
	ca, err := parseCA([]byte(pemCA))
	if err != nil {
		return fail("the CA of the server cannot be read: "+err.Error(), "")
	}
	if c.has("print") {
		c.print("%s", toPEM(ca))
		return nil
	}
	sum := fingerprint(ca)
	id := strings.ToLower(strings.TrimPrefix(sum, "SHA256:"))[:12]
	inst := &installer{call: c, cert: ca, file: "m3o-" + id + ".crt", nick: "m3o " + id}
	if c.has("uninstall") {
		inst.uninstall(ctx)
	} else {
		c.say("CA of %s, %s", cl.url.Host, sum)
		if names := ca.PermittedDNSDomains; len(names) > 0 && ca.PermittedDNSDomainsCritical {
			c.say("it can speak only for %s and the names below", strings.Join(names, ", "))
		} else if ok, err := c.unlimited(ctx, cl.url.Host); err != nil || !ok {
			return err
		}
		inst.install(ctx)
	}
	if c.has("json") {
		if err := c.json(trustResult{Fingerprint: sum, Done: inst.done, Left: inst.left}); err != nil {
			return err
		}
	} else {
		for _, d := range inst.done {
			c.print("%s\n", d)
		}
	}
	for _, l := range inst.left {
		c.hint("%s", l)
	}
	if inst.failed {
		return fail("not everything was done", "")
	}
	if len(inst.done) > 0 && !c.has("uninstall") {
		c.undo("m3o trust --uninstall")
	}
	return nil
}

// unlimited asks before a CA that could speak for any site gets the trust of
// the whole computer.
func (c *call) unlimited(ctx context.Context, host string) (bool, error) {
	if c.has("yes") {
		return true, nil
	}
	c.say("It is not limited to some names: whoever runs %s could pass for any site to this computer.", host)
	if !c.inTerminal {
		return false, misuse("this CA could speak for any site, and there is no terminal to ask on", "--yes installs it all the same")
	}
	ok, err := c.confirm(ctx, "Install it all the same?")
	if err == nil && !ok {
		err = fail("not installed", "")
	}
	return ok, err
}

type trustResult struct {
	Fingerprint string   `json:"fingerprint"`
	Done        []string `json:"done"`
	Left        []string `json:"left"` // commands for the user to run
}

// An installer puts a CA into the stores of this computer, or takes it out,
// and notes in plain words what it did and what it could not do.
type installer struct {
	*call
	cert       *x509.Certificate
	file, nick string
	done, left []string
	failed     bool
}

// A linuxStore is where a distribution keeps its own CAs.
type linuxStore struct {
	dir    string
	update []string
}

func linuxStores() []linuxStore {
	return []linuxStore{
		{"/usr/local/share/ca-certificates", []string{"update-ca-certificates"}},           // Debian, Ubuntu, Alpine
		{"/etc/pki/ca-trust/source/anchors", []string{"update-ca-trust", "extract"}},       // Fedora, RHEL
		{"/etc/ca-certificates/trust-source/anchors", []string{"trust", "extract-compat"}}, // Arch
		{"/usr/share/pki/trust/anchors", []string{"update-ca-certificates"}},               // SUSE
	}
}

func (in *installer) install(ctx context.Context) {
	switch goruntime.GOOS {
	case "linux":
		in.linux(ctx, true)
	case "darwin":
		in.left = append(in.left, "m3o trust --print > "+in.file+" && sudo security add-trusted-cert -d -r trustRoot -k /Library/Keychains/System.keychain "+in.file)
	case "windows":
		in.left = append(in.left, "m3o trust --print > "+in.file+" && certutil -addstore -user Root "+in.file)
	}
	if goruntime.GOOS != "windows" { // certutil is another program there
		in.nss(ctx, true)
	}
}

func (in *installer) uninstall(ctx context.Context) {
	switch goruntime.GOOS {
	case "linux":
		in.linux(ctx, false)
	case "darwin":
		in.left = append(in.left, "sudo security delete-certificate -Z "+sha1Hex(in.cert)+" /Library/Keychains/System.keychain")
	case "windows":
		in.left = append(in.left, "certutil -delstore -user Root "+in.cert.SerialNumber.Text(16))
	}
	if goruntime.GOOS != "windows" {
		in.nss(ctx, false)
	}
}

// linux writes to or removes from the distribution's store, which needs root.
func (in *installer) linux(ctx context.Context, add bool) {
	stores := linuxStores()
	i := slices.IndexFunc(stores, func(s linuxStore) bool {
		fi, err := os.Stat(filepath.Join(in.root, s.dir))
		return err == nil && fi.IsDir()
	})
	if i < 0 {
		in.left = append(in.left, "this system's store of CAs is not one that m3o knows; m3o trust --print writes the certificate")
		return
	}
	st := stores[i]
	path := filepath.Join(in.root, st.dir, in.file)
	_, err := os.Stat(path)
	switch {
	case !add && errors.Is(err, fs.ErrNotExist):
		in.done = append(in.done, "nothing to remove from "+st.dir)
		return
	case in.uid != 0 && add:
		in.left = append(in.left, fmt.Sprintf("m3o trust --print | sudo tee %s > /dev/null && sudo %s", path, strings.Join(st.update, " ")))
		return
	case in.uid != 0:
		in.left = append(in.left, fmt.Sprintf("sudo rm %s && sudo %s", path, strings.Join(st.update, " ")))
		return
	case add:
		err = atomicfile.Write(path, []byte(toPEM(in.cert)), 0o644)
	default:
		err = os.Remove(path)
	}
	if err != nil {
		in.fault(err)
		return
	}
	did := "wrote " + path
	if !add {
		did = "removed " + path
	}
	in.done = append(in.done, did)
	in.command(ctx, st.update[0], st.update[1:]...)
}

// command runs a program and notes it.
func (in *installer) command(ctx context.Context, name string, args ...string) {
	out, err := exec.CommandContext(ctx, name, args...).CombinedOutput()
	line := strings.Join(append([]string{name}, args...), " ")
	if err != nil {
		in.fault(fmt.Errorf("%s: %w: %s", line, err, plain(strings.TrimSpace(string(out)))))
		return
	}
	in.done = append(in.done, "ran "+line)
}

func (in *installer) fault(err error) {
	in.failed = true
	in.say("m3o: error: %s", tidy(err.Error()))
}

// nss handles the stores of Chromium and Firefox, which do not read the
// system's. They are the user's own, so no root is needed.
func (in *installer) nss(ctx context.Context, add bool) {
	certutil, err := exec.LookPath("certutil")
	if err != nil {
		if add {
			in.left = append(in.left, "browsers keep their own list: install certutil (libnss3-tools or nss-tools) and run m3o trust again")
		}
		return
	}
	home, err := in.home()
	if err != nil {
		in.fault(err)
		return
	}
	chromium := filepath.Join(home, ".pki", "nssdb")
	dbs := []string{chromium}
	for _, pattern := range []string{".mozilla/firefox/*/cert9.db", "snap/firefox/common/.mozilla/firefox/*/cert9.db", "Library/Application Support/Firefox/Profiles/*/cert9.db"} {
		found, _ := filepath.Glob(filepath.Join(home, pattern)) // the only error is a bad pattern
		for _, f := range found {
			dbs = append(dbs, filepath.Dir(f))
		}
	}
	for _, db := range dbs {
		_, err := os.Stat(filepath.Join(db, "cert9.db"))
		missing := errors.Is(err, fs.ErrNotExist)
		name := "sql:" + db
		switch {
		case !add && missing:
		case !add:
			if exec.CommandContext(ctx, certutil, "-L", "-d", name, "-n", in.nick).Run() == nil {
				in.command(ctx, certutil, "-D", "-d", name, "-n", in.nick)
			}
		default:
			if missing { // made as Chromium makes it at its first start
				if err := os.MkdirAll(db, 0o700); err != nil {
					in.fault(err)
					continue
				}
				in.command(ctx, certutil, "-N", "--empty-password", "-d", name)
			}
			in.nssAdd(ctx, certutil, name)
		}
	}
}

func (in *installer) nssAdd(ctx context.Context, certutil, db string) {
	f, err := os.CreateTemp("", "m3o-*.crt")
	if err != nil {
		in.fault(err)
		return
	}
	defer os.Remove(f.Name()) //nolint:errcheck // a temporary file
	_, err = f.WriteString(toPEM(in.cert))
	if err := errors.Join(err, f.Close()); err != nil {
		in.fault(err)
		return
	}
	in.command(ctx, certutil, "-A", "-d", db, "-t", "C,,", "-n", in.nick, "-i", f.Name())
}

// sha1Hex is how the macOS keychain names a certificate.
func sha1Hex(cert *x509.Certificate) string {
	return fmt.Sprintf("%X", sha1.Sum(cert.Raw)) //nolint:gosec // a name, not a protection
}
