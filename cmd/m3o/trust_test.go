package main

import (
	"crypto/sha256"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	goruntime "runtime"
	"strings"
	"testing"
	"time"

	"github.com/m3o/m3o/internal/need"
)

// programs puts a folder of shell scripts in front of PATH; each writes its
// name and arguments to the returned file.
func programs(t *testing.T, names ...string) string {
	t.Helper()
	bin, seen := t.TempDir(), filepath.Join(t.TempDir(), "seen")
	for _, n := range names {
		script := "#!/bin/sh\necho \"$(basename \"$0\") $*\" >> " + seen + "\n"
		if err := os.WriteFile(filepath.Join(bin, n), []byte(script), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	t.Setenv("PATH", bin+":/usr/bin:/bin")
	return seen
}

func onLinux(t *testing.T) {
	t.Helper()
	if goruntime.GOOS != "linux" {
		t.Skip("the system store of Linux")
	}
}

func TestTrustPrintsTheCA(t *testing.T) {
	p := newPlatform(t)
	l := newLaptop(t).ci(p)
	if got := l.do("trust", "--print").out; got != p.ca.pem() {
		t.Errorf("printed %s", got)
	}
}

func TestTrustWithoutRootTellsTheCommand(t *testing.T) {
	onLinux(t)
	p := newPlatform(t)
	l := newLaptop(t).ci(p)
	l.root = t.TempDir()
	store := filepath.Join(l.root, "/usr/local/share/ca-certificates")
	if err := os.MkdirAll(store, 0o755); err != nil {
		t.Fatal(err)
	}
	seen := programs(t, "update-ca-certificates")
	l.do("trust").want(t, 0, nil, []string{"CA of api.localhost", fingerprint(p.ca.cert), "it can speak only for localhost",
		"m3o: hint: m3o trust --print | sudo tee " + store + "/m3o-", "sudo update-ca-certificates"})
	if es, _ := os.ReadDir(store); len(es) != 0 {
		t.Errorf("something was written: %v", es)
	}
	if _, err := os.Stat(seen); err == nil {
		t.Error("a program was run")
	}
}

func TestTrustAsRootInstallsAndUninstalls(t *testing.T) {
	onLinux(t)
	p := newPlatform(t)
	l := newLaptop(t).ci(p)
	l.root, l.uid = t.TempDir(), 0
	store := filepath.Join(l.root, "/etc/pki/ca-trust/source/anchors")
	if err := os.MkdirAll(store, 0o755); err != nil {
		t.Fatal(err)
	}
	seen := programs(t, "update-ca-trust", "certutil")
	o := l.do("trust", "--json")
	var got trustResult
	if err := json.Unmarshal([]byte(o.out), &got); err != nil || got.Fingerprint != fingerprint(p.ca.cert) || len(got.Done) < 3 {
		t.Errorf("JSON %s: %v", o.out, err)
	}
	es, err := os.ReadDir(store)
	if err != nil || len(es) != 1 {
		t.Fatalf("store has %v, %v", es, err)
	}
	data, err := os.ReadFile(filepath.Join(store, es[0].Name()))
	if err != nil || string(data) != p.ca.pem() {
		t.Errorf("installed %s, %v", data, err)
	}
	ran, err := os.ReadFile(seen)
	if err != nil || !strings.Contains(string(ran), "update-ca-trust extract\n") || !strings.Contains(string(ran), "certutil -A -d sql:"+filepath.Join(l.vars["HOME"], ".pki/nssdb")+" -t C,, -n m3o ") {
		t.Errorf("ran %s, %v", ran, err)
	}
	l.do("trust", "--uninstall").want(t, 0, []string{"removed " + store, "ran update-ca-trust extract"}, nil)
	if es, _ := os.ReadDir(store); len(es) != 0 {
		t.Errorf("left %v", es)
	}
	l.do("trust", "--uninstall").want(t, 0, []string{"nothing to remove from"}, nil)
}

// The real certutil and a real NSS database, as Chromium reads it.
func TestTrustInTheBrowsersStore(t *testing.T) {
	onLinux(t)
	certutil := need.Program(t, "certutil")
	p := newPlatform(t)
	l := newLaptop(t).ci(p)
	l.root = t.TempDir() // no system store
	l.do("trust").want(t, 0, []string{"ran " + certutil + " -A"}, []string{"m3o: undo: m3o trust --uninstall"})
	l.do("trust") // once more changes nothing
	l.do("trust", "--uninstall").want(t, 0, []string{"ran " + certutil + " -D"}, nil)
	l.do("trust", "--uninstall")
}

func TestTrustReportsWhatFailed(t *testing.T) {
	onLinux(t)
	p := newPlatform(t)
	l := newLaptop(t).ci(p)
	l.root, l.uid = t.TempDir(), 0
	if err := os.MkdirAll(filepath.Join(l.root, "/usr/local/share/ca-certificates"), 0o755); err != nil {
		t.Fatal(err)
	}
	t.Setenv("PATH", t.TempDir())
	l.m3o("trust").want(t, 1, []string{"wrote "}, []string{"m3o: error: update-ca-certificates: ", "not everything was done"})
}

// A CA that could speak for any site is not installed without a word.
func TestTrustOfAnUnlimitedCAIsAsked(t *testing.T) {
	onLinux(t)
	p := newPlatform(t)
	p.ca = newAuthority(t, false)
	p.url = serveTLS(t, p.handler(), p.ca.leaf(t, "api.localhost", time.Now().Add(time.Hour)))
	l := newLaptop(t).ci(p)
	l.root = t.TempDir()
	programs(t)
	l.m3o("trust").want(t, 2, nil, []string{"could speak for any site", "--yes"})
	l.typing, l.in = true, "n\n"
	l.m3o("trust").want(t, 1, nil, []string{"could pass for any site", "not installed"})
	l.in = "y\n"
	l.do("trust")
	l.typing = false
	l.do("trust", "-y")
}

func TestTrustOfPublicCertificates(t *testing.T) {
	p := newPlatform(t)
	l := newLaptop(t).ci(p)
	p.ca.cert = nil
	l.do("trust").want(t, 0, nil, []string{"are public: there is nothing to trust"})
}

func TestParseFingerprint(t *testing.T) {
	cert := newAuthority(t, true).cert
	want := fingerprint(cert)
	bare := strings.TrimPrefix(want, "SHA256:")
	if sum := sha256.Sum256(cert.Raw); bare != fmt.Sprintf("%X", sum) {
		t.Errorf("fingerprint %s, want the SHA-256 %X", want, sum)
	}
	raw, err := hex.DecodeString(bare)
	if err != nil {
		t.Fatal(err)
	}
	openssl := strings.ReplaceAll(fmt.Sprintf("% X", raw), " ", ":")
	for _, s := range []string{want, bare, strings.ToLower(want), openssl, " sha256:" + openssl + "\n", "SHA256:" + base64.RawStdEncoding.EncodeToString(raw)} {
		if got, err := parseFingerprint(s); err != nil || got != want {
			t.Errorf("%q is %q, %v", s, got, err)
		}
	}
	for _, s := range []string{"", "SHA256:", "AB", bare + "00", "zz" + bare[2:]} {
		if got, err := parseFingerprint(s); err == nil {
			t.Errorf("%q is %q", s, got)
		}
	}
}
