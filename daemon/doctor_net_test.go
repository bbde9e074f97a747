package daemon

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"math/big"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/miekg/dns"
	"golang.org/x/sys/unix"

	"github.com/m3o/m3o/internal/need"
)

// alone runs the test once more, in a process with network and mounts of its
// own, and is true there.
func alone(t *testing.T) bool {
	t.Helper()
	need.Root(t)
	const there = "M3O_DOCTOR_ALONE"
	if os.Getenv(there) == t.Name() {
		if out, err := exec.Command(need.Program(t, "ip"), "link", "set", "lo", "up").CombinedOutput(); err != nil {
			t.Fatalf("ip link set lo up: %v: %s", err, out)
		}
		return true
	}
	cmd := exec.Command("/proc/self/exe", "-test.run=^"+t.Name()+"$", "-test.v")
	cmd.Env = append(os.Environ(), there+"="+t.Name())
	cmd.SysProcAttr = &syscall.SysProcAttr{Unshareflags: syscall.CLONE_NEWNET | syscall.CLONE_NEWNS}
	if out, err := cmd.CombinedOutput(); err != nil || !strings.Contains(string(out), "--- PASS: "+t.Name()) {
		t.Errorf("%v\n%s", err, out)
	}
	return false
}

func TestDoctorOfTheDisk(t *testing.T) {
	if !alone(t) {
		return
	}
	for _, c := range []struct {
		what, fs, options string
		flags             uintptr
		fill              func(dir string) error
		want              []string
	}{
		{"in memory", "tmpfs", "size=20g", 0, nil, []string{"warn disk: the file system of … is in memory: everything is gone when the server restarts … --data", "ok disk: 20 GB are free"}},
		{"full", "tmpfs", "size=4m", 0, func(dir string) error {
			err := os.WriteFile(filepath.Join(dir, "hog"), make([]byte, 8<<20), 0o600)
			if !errors.Is(err, syscall.ENOSPC) {
				return fmt.Errorf("want no space left: %w", err)
			}
			return nil
		}, []string{"fail disk: 0 MB are free at … builds will fail, and soon every change … destroy apps"}},
		{"nearly full", "tmpfs", "size=3g", 0, nil, []string{"warn disk: 3072 MB are free at … a few builds use that up … --build-cache"}},
		{"out of inodes", "tmpfs", "size=20g,nr_inodes=50", 0, func(dir string) error {
			for i := range 60 {
				if err := os.WriteFile(filepath.Join(dir, fmt.Sprint(i)), nil, 0o600); errors.Is(err, syscall.ENOSPC) {
					return nil
				}
			}
			return errors.New("there was room for 60 files")
		}, []string{"fail disk: only 0 of 50 files more can be made at … though space is free … du --inodes"}},
		{"read-only", "tmpfs", "size=20g", unix.MS_RDONLY, nil, []string{"fail disk: … cannot be written (mounted read-only): m3od does not start … remount,rw"}},
		{"noexec", "tmpfs", "size=20g", unix.MS_NOEXEC, nil, []string{"fail disk: programs cannot be run from … (mounted noexec): git's hooks, so every push … remount,exec"}},
		{"an overlay", "overlay", "", 0, nil, []string{"fail disk: the file system of … is an overlay: images cannot be mounted on one, so no app starts … --data"}},
	} {
		base := t.TempDir()
		dir := filepath.Join(base, "data")
		if c.fs == "overlay" {
			if err := unix.Mount("none", base, "tmpfs", 0, ""); err != nil { // the machine's own disk may be an overlay
				t.Fatal(err)
			}
			c.options = fmt.Sprintf("lowerdir=%[1]s/l,upperdir=%[1]s/u,workdir=%[1]s/w", base)
		}
		for _, d := range []string{"data", "l", "u", "w"} {
			if err := os.Mkdir(filepath.Join(base, d), 0o755); err != nil {
				t.Fatal(err)
			}
		}
		if err := unix.Mount("none", dir, c.fs, c.flags, c.options); err != nil {
			t.Fatalf("%s: mount: %v", c.what, err)
		}
		if c.fill != nil {
			if err := c.fill(dir); err != nil {
				t.Errorf("%s: %v", c.what, err)
			}
		}
		e := examOf(t, nil)
		e.cfg.Data = filepath.Join(dir, "not", "there", "yet")
		var f findings
		e.disk(t.Context(), &f)
		expect(t, c.what, f, c.want...)
		_ = unix.Unmount(dir, 0)
		_ = unix.Unmount(base, 0) // the namespace ends with the process anyway
	}
}

func TestDoctorOfThePorts(t *testing.T) {
	if !alone(t) {
		return
	}
	e := examOf(t, nil)
	e.cfg.HTTP, e.cfg.HTTPS, e.cfg.SSH, e.cfg.Metrics, e.cfg.HTTP3 = ":80", ":443", "127.0.0.1:2222", "127.0.0.1:9464", true
	look := func(what string, want ...string) {
		t.Helper()
		var f findings
		e.ports(t.Context(), &f)
		expect(t, what, f, want...)
	}
	listen := func(network, addr string) (end func(), file *os.File) {
		t.Helper()
		f, err := bindFile(t.Context(), network, addr)
		if err != nil {
			t.Fatal(err)
		}
		return func() { _ = f.Close() }, f
	}
	comm, err := os.ReadFile("/proc/self/comm")
	if err != nil {
		t.Fatal(err)
	}
	me := fmt.Sprintf("%s (process %d)", strings.TrimSpace(string(comm)), os.Getpid())
	look("all free", "ok ports: http: :80 is free", "ok ports: https", "ok ports: ssh", "ok ports: http3", "ok ports: metrics", "ok ports: names-udp: 169.254.1.1:53 is free", "ok ports: names: 169", "ok ports: internal: 169.254.1.1:4080 is free")
	for _, c := range []struct{ network, addr, want string }{
		{"tcp", "0.0.0.0:80", "fail ports: http: … " + me + " listens on :80 … --http"},
		{"tcp", "127.0.0.1:443", "fail ports: https: … " + me + " listens on :443 … --https"},
		{"udp", "0.0.0.0:443", "fail ports: http3: " + me + " has UDP on :443 … --https"},
		{"tcp", "[::]:2222", "fail ports: ssh: … " + me + " listens on 127.0.0.1:2222 … --ssh"},
		{"tcp", "127.0.0.1:9464", "fail ports: metrics: … " + me + " … --metrics"},
		{"udp", "0.0.0.0:53", "fail ports: the apps' name server cannot listen on 169.254.1.1:53: " + me + " does … limit it to those it needs"},
		{"tcp", "0.0.0.0:53", "fail ports: the apps' name server cannot listen on 169.254.1.1:53: " + me + " does"},
		{"tcp", "0.0.0.0:4080", "fail ports: calls between apps cannot come in at 169.254.1.1:4080: " + me + " listens there … another port"},
	} {
		end, _ := listen(c.network, c.addr)
		look(c.network+" "+c.addr, c.want)
		end()
	}
	// A name server that keeps to its own address is in nobody's way.
	end, _ := listen("udp", "127.0.0.1:53")
	look("a name server for this machine alone")
	end()
	e.cfg.SSH = "203.0.113.9:2222"
	look("an address of another machine", "fail ports: ssh: listen on 203.0.113.9:2222 … ip addr … --ssh")
	e.cfg.SSH = "127.0.0.1:2222"

	// Ours, and another installation's: a program called m3od with settings.
	cat, err := os.ReadFile(need.Program(t, "cat"))
	if err != nil {
		t.Fatal(err)
	}
	m3od := filepath.Join(t.TempDir(), "m3od")
	if err := os.WriteFile(m3od, cat, 0o755); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct{ data, port, alone string }{
		{e.cfg.Data, "ok ports: http: m3o listens on :80", ""},
		{"/srv/other", "fail ports: http: m3od (process … an installation of m3o whose data is in /srv/other, listens on :80", "fail isolation: m3od (process … whose data is in /srv/other, is called m3o too … --name"},
	} {
		end, sock := listen("tcp", "0.0.0.0:80")
		cmd := exec.Command(m3od)
		cmd.Env, cmd.ExtraFiles = []string{"M3O_DATA=" + c.data}, []*os.File{sock}
		in, err := cmd.StdinPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		end()
		look("m3od of "+c.data, c.port)
		var f findings
		e.isolation(t.Context(), &f)
		if got := lines(f); strings.Contains(got, "is called m3o too") != (c.alone != "") {
			t.Errorf("m3od of %s: %s", c.data, got)
		} else if c.alone != "" {
			expect(t, "m3od of "+c.data, f, c.alone)
		}
		_ = in.Close()
		if err := cmd.Wait(); err != nil {
			t.Error(err)
		}
	}
}

func TestDoctorOfTheNames(t *testing.T) {
	if !alone(t) {
		return
	}
	const here, there = "127.0.0.1", "198.51.100.7"
	pc, err := net.ListenPacket("udp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	var mu sync.Mutex             // guards what follows
	var answers map[string]string // by name; "*" for any below the domain
	code := dns.RcodeSuccess
	srv := &dns.Server{PacketConn: pc, Handler: dns.HandlerFunc(func(w dns.ResponseWriter, q *dns.Msg) {
		mu.Lock()
		defer mu.Unlock()
		m := new(dns.Msg).SetReply(q)
		m.Rcode = code
		name := strings.TrimSuffix(q.Question[0].Name, ".")
		ip := answers[name]
		if _, ok := answers[name]; !ok && strings.HasSuffix(name, ".apps.example.com") {
			ip = answers["*"]
		}
		switch {
		case code != dns.RcodeSuccess:
		case ip == "":
			m.Rcode = dns.RcodeNameError
		case q.Question[0].Qtype == dns.TypeA:
			m.Answer = []dns.RR{&dns.A{Hdr: dns.RR_Header{Name: q.Question[0].Name, Rrtype: dns.TypeA, Class: dns.ClassINET}, A: net.ParseIP(ip)}}
		}
		_ = w.WriteMsg(m)
	})}
	go func() { _ = srv.ActivateAndServe() }()
	defer srv.Shutdown() //nolint:errcheck // the process ends
	if out, err := exec.Command("ip", "addr", "add", "203.0.113.7/32", "dev", "lo").CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	const mine = "203.0.113.7"
	e := examOf(t, nil)
	for _, c := range []struct {
		what    string
		answers map[string]string
		code    int
		server  string
		want    []string
	}{
		{"all well", map[string]string{"*": mine, "apps.example.com": mine}, 0, "", nil},
		{"nothing", nil, 0, "", []string{"fail dns: api.apps.example.com has no address, so m3o login and commands over SSH do not work … make a record *.apps.example.com", "fail dns: m3o-doctor-any-app.apps.example.com has no address", "fail dns: apps.example.com has no address, so git push does not find the server … make a record apps.example.com"}},
		{"no wildcard", map[string]string{"api.apps.example.com": mine, "apps.example.com": mine}, 0, "", []string{"ok dns: api.apps", "fail dns: m3o-doctor-any-app.apps.example.com has no address, so new apps cannot be reached … make a record *.apps.example.com"}},
		{"another machine", map[string]string{"*": there, "apps.example.com": mine}, 0, "", []string{"warn dns: api.apps.example.com leads to 198.51.100.7, which is no address of this machine … load balancer or NAT", "ok dns: apps.example.com leads here"}},
		{"loopback", map[string]string{"*": here, "apps.example.com": mine}, 0, "", []string{"fail dns: api.apps.example.com leads to 127.0.0.1, which is each computer itself … /etc/hosts"}},
		{"a server that refuses", nil, dns.RcodeServerFailure, "", []string{"fail dns: the name servers (" + pc.LocalAddr().String() + ") do not answer, so nothing outside is found … --dns-servers"}},
		{"no server there", nil, 0, need.Nobody(t), []string{"fail dns: the name servers (127.0.0.1:… ) do not answer … --dns-servers"}},
	} {
		mu.Lock()
		answers, code = c.answers, c.code
		mu.Unlock()
		e.cfg.Domain, e.cfg.DNSServers = "apps.example.com", pc.LocalAddr().String()
		if c.server != "" {
			e.cfg.DNSServers = c.server
			c.want = []string{"fail dns: the name servers (" + c.server + ") do not answer … --dns-servers"}
		}
		var f findings
		e.names(t.Context(), &f)
		expect(t, c.what, f, c.want...)
	}
	e.cfg.Domain = "localhost"
	var f findings
	e.names(t.Context(), &f)
	expect(t, "localhost", f, "ok dns: localhost is for this machine alone")
}

func TestDoctorOfHTTPS(t *testing.T) {
	e := examOf(t, nil)
	keys := map[string]*ecdsa.PrivateKey{}
	for _, who := range []string{"leaf", "ca", "stranger"} {
		var err error
		if keys[who], err = ecdsa.GenerateKey(elliptic.P256(), rand.Reader); err != nil {
			t.Fatal(err)
		}
	}
	now := time.Now()
	made := func(name string, end time.Time, ca *x509.Certificate, by string) *x509.Certificate {
		t.Helper()
		c := &x509.Certificate{SerialNumber: big.NewInt(now.UnixNano()), NotBefore: now.Add(-100 * 24 * time.Hour), NotAfter: end, DNSNames: []string{name}}
		own := keys["leaf"]
		if ca == nil {
			c.IsCA, c.BasicConstraintsValid = true, true
			ca, own = c, keys[by]
		}
		der, err := x509.CreateCertificate(rand.Reader, c, ca, own.Public(), keys[by])
		if err != nil {
			t.Fatal(err)
		}
		c, err = x509.ParseCertificate(der)
		if err != nil {
			t.Fatal(err)
		}
		return c
	}
	ca := made("ca", now.Add(1000*time.Hour), nil, "ca")
	if err := errors.Join(os.MkdirAll(e.cfg.path("ca"), 0o700), os.WriteFile(e.cfg.path("ca", "ca.crt"), pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: ca.Raw}), 0o600)); err != nil {
		t.Fatal(err)
	}
	day := 24 * time.Hour
	for _, c := range []struct {
		what string
		leaf *x509.Certificate
		want string
	}{
		{"well", made("api.localhost", now.Add(20*day), ca, "ca"), "ok https: https://api.localhost answers, with a certificate until "},
		{"soon", made("api.localhost", now.Add(2*day), ca, "ca"), "warn https: the certificate of api.localhost ends on … and has not been renewed … journalctl"},
		{"ended", made("api.localhost", now.Add(-day), ca, "ca"), "fail https: the certificate of api.localhost ended on … nobody can connect … journalctl"},
		{"another's", made("www.example.com", now.Add(20*day), ca, "ca"), "fail https: what answers at 127.0.0.1:… shows a certificate that does not hold for api.localhost … point the name here"},
		{"of a CA nobody knows", made("api.localhost", now.Add(20*day), made("ca", now.Add(1000*time.Hour), nil, "stranger"), "stranger"), "fail https: what answers at … unknown authority"},
	} {
		ln, err := tls.Listen("tcp", "127.0.0.1:0", &tls.Config{Certificates: []tls.Certificate{{Certificate: [][]byte{c.leaf.Raw}, PrivateKey: keys["leaf"]}}})
		if err != nil {
			t.Fatal(err)
		}
		done := make(chan struct{})
		go func() {
			defer close(done)
			if conn, err := ln.Accept(); err == nil {
				_ = conn.(*tls.Conn).HandshakeContext(t.Context())
				_ = conn.Close()
			}
		}()
		var f findings
		e.call(t.Context(), &f, "api.localhost", ln.Addr().String())
		want := strings.Replace(c.want, "127.0.0.1:…", ln.Addr().String(), 1)
		expect(t, c.what, f, want)
		_ = ln.Close()
		<-done
	}
	var f findings
	addr := need.Nobody(t)
	e.call(t.Context(), &f, "api.localhost", addr)
	expect(t, "nobody", f, "warn https: https://api.localhost cannot be reached at "+addr+" from the server itself … ufw allow 443/tcp")
	// Where nothing of ours runs, nobody need answer.
	f = nil
	e.https(t.Context(), &f)
	if len(f) != 0 {
		t.Errorf("nothing runs: %v", f)
	}
}
