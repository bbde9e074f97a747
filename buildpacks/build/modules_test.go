package build

import (
	"archive/zip"
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"fmt"
	"io"
	"log"
	"math/big"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/m3o/m3o"
	"golang.org/x/mod/sumdb/dirhash"
)

// A moduleServer serves versions of one module as a module proxy does, out in
// the world that builds reach.
type moduleServer struct {
	t        *testing.T
	module   string
	zips     map[string][]byte // by version
	srv      *http.Server
	url      string
	password string // "" lets everybody in
	ca       string // PEM, with TLS
}

const worldAddr = "203.0.113.9"

func serveModule(t *testing.T, module, password string, versions ...string) *moduleServer {
	t.Helper()
	m := &moduleServer{t: t, module: module, password: password, zips: map[string][]byte{}}
	for _, v := range versions {
		m.zips[v] = m.zip(v)
	}
	l := newWorld(t, worldAddr)
	_, port, _ := net.SplitHostPort(l.Addr().String())
	m.url = "http://" + net.JoinHostPort(worldAddr, port)
	if password != "" {
		m.url = "https://" + net.JoinHostPort(worldAddr, port)
		var cert tls.Certificate
		cert, m.ca = serverCert(t)
		l = tls.NewListener(l, &tls.Config{Certificates: []tls.Certificate{cert}})
	}
	m.srv = &http.Server{Handler: m, ErrorLog: log.New(io.Discard, "", 0)}
	ended := make(chan struct{})
	go func() { defer close(ended); _ = m.srv.Serve(l) }()
	t.Cleanup(func() { _ = m.srv.Close(); <-ended })
	return m
}

func (m *moduleServer) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	if _, p, _ := r.BasicAuth(); p != m.password {
		http.Error(w, "who are you?", http.StatusUnauthorized)
		return
	}
	file, ok := strings.CutPrefix(r.URL.Path, "/"+m.module+"/@v/")
	v := strings.TrimSuffix(strings.TrimSuffix(strings.TrimSuffix(file, ".zip"), ".mod"), ".info")
	zip, there := m.zips[v]
	switch {
	case !ok || !there:
		http.NotFound(w, r)
	case strings.HasSuffix(file, ".zip"):
		_, _ = w.Write(zip)
	case strings.HasSuffix(file, ".mod"):
		_, _ = io.WriteString(w, m.mod())
	default:
		_, _ = fmt.Fprintf(w, `{"Version":%q,"Time":"2026-01-02T03:04:05Z"}`, v)
	}
}

func (m *moduleServer) mod() string { return "module " + m.module + "\n\ngo 1.26\n" }

func (m *moduleServer) zip(version string) []byte {
	m.t.Helper()
	var buf bytes.Buffer
	zw := zip.NewWriter(&buf)
	for name, text := range map[string]string{"go.mod": m.mod(), "remote.go": "package remote\n\nconst Text = \"remote " + version + "\"\n"} {
		w, err := zw.Create(m.module + "@" + version + "/" + name)
		if err == nil {
			_, err = io.WriteString(w, text)
		}
		if err != nil {
			m.t.Fatal(err)
		}
	}
	if err := zw.Close(); err != nil {
		m.t.Fatal(err)
	}
	return buf.Bytes()
}

// app is a program that needs a version of the module.
func (m *moduleServer) app(version string) map[string]string {
	m.t.Helper()
	file := filepath.Join(m.t.TempDir(), "module.zip")
	if err := os.WriteFile(file, m.zips[version], 0o600); err != nil {
		m.t.Fatal(err)
	}
	zipSum, err := dirhash.HashZip(file, dirhash.Hash1)
	if err != nil {
		m.t.Fatal(err)
	}
	modSum, err := dirhash.Hash1([]string{"go.mod"}, func(string) (io.ReadCloser, error) { return io.NopCloser(strings.NewReader(m.mod())), nil })
	if err != nil {
		m.t.Fatal(err)
	}
	return map[string]string{
		"go.mod":  "module example.com/app\n\ngo 1.26\n\nrequire " + m.module + " " + version + "\n",
		"go.sum":  m.module + " " + version + " " + zipSum + "\n" + m.module + " " + version + "/go.mod " + modSum + "\n",
		"main.go": "package main\n\nimport \"" + m.module + "\"\n\nfunc main() { println(remote.Text) }\n",
	}
}

func serverCert(t *testing.T) (tls.Certificate, string) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	c := &x509.Certificate{SerialNumber: big.NewInt(1), NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		IPAddresses: []net.IP{net.ParseIP(worldAddr)}, IsCA: true, BasicConstraintsValid: true}
	der, err := x509.CreateCertificate(rand.Reader, c, c, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}, string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}))
}

func TestProxyThatDiesLeavesWhatWasFetched(t *testing.T) {
	b := builder(t)
	m := serveModule(t, fmt.Sprintf("example.com/m%d/remote", time.Now().UnixNano()), "", "v1.0.0", "v1.1.0")
	was := b.cfg
	b.cfg.GoProxy, b.cfg.GoSumDB = m.url, "off"
	defer func() { b.cfg = was }()
	r := newRepo(t)
	_, out, err := push(t.Context(), t, b, r.commit(m.app("v1.0.0")))
	ok(t, out, err)
	if !strings.Contains(out, "       go: downloading "+m.module+" v1.0.0\n") { // nobody else's module: no other test has had it
		t.Errorf("no download is shown:\n%s", out)
	}
	_ = m.srv.Close()
	_, out, err = push(t.Context(), t, b, r.commit(map[string]string{"more.go": "package main\n\nfunc init() { println(1) }\n"}))
	ok(t, out, err)
	_, out, err = push(t.Context(), t, b, r.commit(m.app("v1.1.0")))
	if m3o.KindOf(err) != m3o.Unavailable || !strings.Contains(err.Error(), m.module+"@v1.1.0: ") || !strings.Contains(err.Error(), "connection refused") ||
		!strings.HasPrefix(m3o.HintOf(err), m.module+"@v1.1.0 is not in the cache") {
		t.Errorf("Build = %v (hint %q)\n%s", err, m3o.HintOf(err), out)
	}
}

func TestPrivateModuleBehindAPassword(t *testing.T) {
	b := builder(t)
	const password = "p4ssw0rd-of-the-module-server"
	m := serveModule(t, fmt.Sprintf("git.example.com/m%d/remote", time.Now().UnixNano()), password, "v1.0.0")
	files := m.app("v1.0.0")
	files["certs/server.pem"] = m.ca
	files["m3o.yaml"] = "build:\n  private: [git.example.com]\n  secrets: [GOPROXY, NETRC, SSL_CERT_DIR]\n"
	src := repo(t, files)
	src.App = "private"
	host := strings.TrimPrefix(m.url, "https://")
	secrets := map[string]m3o.Secret{"GOPROXY": m3o.Secret(m.url), "SSL_CERT_DIR": "/src/certs", "NETRC": m3o.Secret("machine " + host + " login ci password wrong\n")}
	with := func(r *Request) { r.Secrets = secrets }
	_, out, err := build(t.Context(), t, b, src, with)
	if m3o.KindOf(err) != m3o.Invalid || !strings.Contains(err.Error(), m.module+"@v1.0.0: ") || !strings.Contains(err.Error(), "401") || !strings.Contains(m3o.HintOf(err), "NETRC") {
		t.Errorf("with a wrong password: %v (hint %q)\n%s", err, m3o.HintOf(err), out)
	}
	secrets["NETRC"] = m3o.Secret("machine " + host + " login ci password " + password + "\n")
	stop, leaked := make(chan struct{}), make(chan []string, 1)
	go func() { leaked <- argvWith(b, password, stop) }()
	res, out, err := build(t.Context(), t, b, src, with)
	close(stop)
	if args := <-leaked; len(args) > 0 {
		t.Errorf("the password is in the arguments %q", args)
	}
	ok(t, out, err)
	if strings.Contains(out, password) {
		t.Errorf("the password is in the output:\n%s", out)
	}
	for _, dir := range []string{b.dir("buildkit"), b.Images()} {
		if found, err := exec.Command("grep", "-rlF", "--binary-files=text", password, dir).Output(); err == nil {
			t.Errorf("the password is in %s", found)
		}
	}
	dir, _ := unpack(t, b, res.Image)
	if said, err := exec.Command(filepath.Join(dir, "app/app")).CombinedOutput(); err != nil || string(said) != "remote v1.0.0\n" {
		t.Errorf("the app says %q, %v", said, err)
	}
	// Who only knows the module's name does not get it from anybody's cache.
	thief := repo(t, files)
	thief.App = "thief"
	_, out, err = build(t.Context(), t, b, thief, func(r *Request) {
		r.Secrets = map[string]m3o.Secret{"GOPROXY": m3o.Secret(m.url), "SSL_CERT_DIR": "/src/certs", "NETRC": "\n"}
	})
	if err == nil || !strings.Contains(err.Error(), "401") {
		t.Errorf("without the password: %v\n%s", err, out)
	}
}

// argvWith looks at the arguments of all processes of builds until stop is closed.
func argvWith(b *Builder, text string, stop <-chan struct{}) (found []string) {
	for {
		select {
		case <-stop:
			return found
		case <-time.After(10 * time.Millisecond):
		}
		for _, pid := range b.cgroup.pids() {
			if c, err := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", pid)); err == nil && bytes.Contains(c, []byte(text)) {
				found = append(found, string(c))
			}
		}
	}
}
