//go:build linux

package oci_test

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/miekg/dns"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/m3o/m3o/runtime"
	"github.com/m3o/m3o/runtime/oci"
	"github.com/m3o/m3o/runtime/runtimetest/program"
)

// run runs the program once in a fresh instance and returns what it printed.
func runOnce(t *testing.T, d *oci.Driver, w runtime.Workload, args ...string) string {
	t.Helper()
	var out, errs bytes.Buffer
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	code, err := d.Run(ctx, w, runtime.Cmd{Args: append([]string{"/server"}, args...), Out: &out, Err: &errs})
	if code != 0 || err != nil {
		t.Fatalf("Run %v = %d, %v\n%s%s", args, code, err, out.String(), errs.String())
	}
	return out.String()
}

func look(t *testing.T, d *oci.Driver, w runtime.Workload) program.View {
	t.Helper()
	var v program.View
	if err := json.Unmarshal([]byte(runOnce(t, d, w, "look")), &v); err != nil {
		t.Fatal(err)
	}
	return v
}

func TestInstanceCannotReachBeyondItself(t *testing.T) {
	r := newRig(t)
	d := up(t, r)
	w := r.workload("serve")
	w.CPUMillis, w.MemoryBytes = 1500, 100<<20
	v := look(t, d, w)
	for what, c := range map[string]struct{ got, want any }{
		"user id":               {v.UID, 100000},
		"group id":              {v.GID, 100000},
		"capabilities":          {v.Caps, "0000000000000000 0000000000000000 0000000000000000"},
		"seccomp":               {v.Seccomp, "2"},
		"no new privileges":     {v.NoNewPrivs, "1"},
		"writing to /":          {v.RootWrite, "read-only file system"},
		"writing to /tmp":       {v.TmpWrite, "allowed"},
		"writing to cgroups":    {v.CgroupWrite == "allowed", false},
		"writing to /sys":       {v.SysWritable, "read-only file system"},
		"writing to /proc/sys":  {v.ProcWritable, "read-only file system"},
		"reading /proc/kcore":   {v.Kcore == "0 bytes" || v.Kcore == "no such file or directory", true},
		"user namespace":        {v.UIDMap, "0 165536 1, 100000 100000 1"},
		"visible processes":     {strings.Join(v.Processes, " "), "1"},
		"Go's memory limit":     {v.GoMemLimit, fmt.Sprint(100 << 20 / 10 * 9)},
		"Go's processors":       {v.GoMaxProcs, "2"},
		"name of the host seen": {strings.HasPrefix(v.Hostname, "hello-run-v1-"), true},
		"cgroups of the host":   {strings.Contains(v.CgroupRoot, r.cfg.Name), false},
	} {
		if c.got != c.want {
			t.Errorf("%s: %v, want %v", what, c.got, c.want)
		}
	}
	other := w
	other.App = "other"
	if v := look(t, d, other); v.UID != 100001 {
		t.Errorf("another app has the user id %d, want 100001", v.UID)
	}
	if v := look(t, d, w); v.UID != 100000 {
		t.Errorf("the first app's user id changed to %d", v.UID)
	}
	w.Pids = 40
	if got := runOnce(t, d, w, "fork"); got != "true true\n" {
		t.Errorf("a limit of 40 processes: %q, want a temporary refusal", got)
	}
}

func listenTCP(t *testing.T, addr string) string {
	t.Helper()
	ln, err := net.Listen("tcp", addr)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = ln.Close() })
	go func() {
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			_ = c.Close()
		}
	}()
	return ln.Addr().String()
}

func portOf(addr string) string {
	_, p, _ := net.SplitHostPort(addr)
	return p
}

func TestInstanceReachesNeitherHostNorOtherApps(t *testing.T) {
	r := newRig(t)
	d := up(t, r)
	in := ready(t, d, r.workload("serve"), 1)[0]
	gateway := d.Gateway().String()
	_ = resolve(t, d)
	listenTCP(t, fmt.Sprintf("%s:%d", gateway, oci.InternalPort))
	everywhere := portOf(listenTCP(t, "0.0.0.0:0"))
	uplink(t, "up0", "192.0.2.1/24")
	other := r.workload()
	other.App = "other"
	targets := map[string]string{
		// All that the host offers: names, and calls to other apps.
		gateway + ":53": "open",
		gateway + ":80": "open",
		fmt.Sprintf("%s:%d", gateway, oci.InternalPort): "timeout", // where they come in
		gateway + ":" + everywhere:                      "timeout",
		"192.0.2.1:" + everywhere:                       "timeout", // the host by another address
		"192.0.2.1:80":                                  "timeout",
		in.Addr:                                         "timeout", // another app
		netip.MustParseAddrPort(in.Addr).Addr().String() + ":53": "timeout",
	}
	args := []string{"dial"}
	for a := range targets {
		args = append(args, a)
	}
	for l := range strings.Lines(runOnce(t, d, other, args...)) {
		addr, got, _ := strings.Cut(strings.TrimSpace(l), " ")
		if got != targets[addr] {
			t.Errorf("from another app %s is %s, want %s", addr, got, targets[addr])
		}
	}
	// The test itself, being the host, can: the listeners are there.
	for _, a := range []string{in.Addr, "192.0.2.1:" + everywhere} {
		c, err := net.DialTimeout("tcp", a, 5*time.Second)
		if err != nil {
			t.Errorf("the host cannot reach %s: %v", a, err)
			continue
		}
		_ = c.Close()
	}
}

// uplink makes a device with an address and a default route by it.
func uplink(t *testing.T, name, addr string) netlink.Link {
	t.Helper()
	at := netlink.NewLinkAttrs()
	at.Name = name
	l := &netlink.Veth{LinkAttrs: at, PeerName: name + "p"}
	if err := netlink.LinkAdd(l); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = netlink.LinkDel(l) })
	a, err := netlink.ParseAddr(addr)
	if err != nil {
		t.Fatal(err)
	}
	if err := netlink.AddrAdd(l, a); err != nil {
		t.Fatal(err)
	}
	if err := netlink.LinkSetUp(l); err != nil {
		t.Fatal(err)
	}
	return l
}

// The "internet" is another network namespace: this test binary again, asleep.
func TestInstanceReachesTheInternetBehindTheHostsAddress(t *testing.T) {
	r := newRig(t)
	r.cfg.Deny = []netip.Prefix{mustPrefix("203.0.113.128/25")}
	d := up(t, r)
	l := uplink(t, "up0", "203.0.113.2/24")
	peer, err := netlink.LinkByName("up0p")
	if err != nil {
		t.Fatal(err)
	}
	internet := exec.Command("/proc/self/exe")
	internet.Env = append(os.Environ(), "M3O_OCI_INTERNET=1")
	internet.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNET, Pdeathsig: syscall.SIGKILL}
	in, err := internet.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := internet.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := internet.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = internet.Process.Kill()
		_ = internet.Wait()
	})
	if err := netlink.LinkSetNsPid(peer, internet.Process.Pid); err != nil {
		t.Fatal(err)
	}
	if _, err := in.Write([]byte("go\n")); err != nil {
		t.Fatal(err)
	}
	b := make([]byte, 100)
	if n, err := out.Read(b); err != nil || string(b[:n]) != "listening\n" {
		t.Fatalf("the internet says %q, %v", b[:n], err)
	}
	if err := netlink.RouteAdd(&netlink.Route{LinkIndex: l.Attrs().Index, Gw: net.IPv4(203, 0, 113, 1)}); err != nil {
		t.Fatal(err)
	}
	got := runOnce(t, d, r.workload(), "dial", "203.0.113.1:80", "169.254.169.254:80", "203.0.113.129:80")
	want := "203.0.113.1:80 open\n169.254.169.254:80 timeout\n203.0.113.129:80 timeout\n"
	if got != want {
		t.Errorf("dialling out:\n%swant\n%s", got, want)
	}
	n, err := out.Read(b)
	if line := string(b[:n]); err != nil || line != "from 203.0.113.2\n" {
		t.Errorf("the internet saw a connection %q, %v, want it from 203.0.113.2", line, err)
	}
	// What is for an instance that is gone must not leave the machine.
	c, err := net.DialTimeout("tcp", "198.18.7.7:80", 5*time.Second)
	if err == nil {
		_ = c.Close()
	}
	if err == nil || !strings.Contains(err.Error(), unix.EHOSTUNREACH.Error()) {
		t.Errorf("dialling an address nobody has: %v, want %v", err, unix.EHOSTUNREACH)
	}
}

// theInternet answers on port 80 of a few addresses and prints who connects.
func theInternet() {
	must := func(err error) {
		if err != nil {
			fmt.Println(err)
			os.Exit(1)
		}
	}
	_, err := os.Stdin.Read(make([]byte, 10))
	must(err)
	l, err := netlink.LinkByName("up0p")
	must(err)
	for _, s := range []string{"203.0.113.1/24", "203.0.113.129/32", "169.254.169.254/32"} {
		a, err := netlink.ParseAddr(s)
		must(err)
		must(netlink.AddrAdd(l, a))
	}
	must(netlink.LinkSetUp(l))
	ln, err := net.Listen("tcp", ":80")
	must(err)
	fmt.Println("listening")
	for {
		c, err := ln.Accept()
		must(err)
		a := netip.MustParseAddrPort(c.RemoteAddr().String())
		fmt.Println("from", a.Addr().Unmap())
		_ = c.Close()
	}
}

func TestNamesAreToldToWhoMayKnow(t *testing.T) {
	r := newRig(t)
	pc, err := net.ListenPacket("udp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	var asked sync.Map
	up0 := &dns.Server{PacketConn: pc, Handler: dns.HandlerFunc(func(w dns.ResponseWriter, q *dns.Msg) {
		asked.Store(q.Question[0].Name, true)
		m := new(dns.Msg).SetReply(q)
		if q.Question[0].Qtype == dns.TypeA {
			m.Answer = []dns.RR{&dns.A{Hdr: dns.RR_Header{Name: q.Question[0].Name, Rrtype: dns.TypeA, Class: dns.ClassINET, Ttl: 1}, A: net.IPv4(192, 0, 2, 7)}}
		}
		_ = w.WriteMsg(m)
	})}
	go func() { _ = up0.ActivateAndServe() }()
	t.Cleanup(func() { _ = pc.Close() })
	d := up(t, r)
	refresh := resolve(t, d, pc.LocalAddr().String())
	ins := ready(t, d, r.workload("serve"), 2)
	refresh()
	var out bytes.Buffer
	code, err := d.Exec(t.Context(), ins[0].ID, runtime.Cmd{Out: &out, Args: []string{"/server", "lookup", "example.org", "hello.instances.internal", "nobody.instances.internal", "other.internal"}})
	var own []string
	for _, in := range ins {
		own = append(own, netip.MustParseAddrPort(in.Addr).Addr().String())
	}
	slices.Sort(own)
	want := "example.org 192.0.2.7\nhello.instances.internal " + strings.Join(own, ",") + "\nnobody.instances.internal no such host\nother.internal " + d.Gateway().String() + "\n"
	if code != 0 || err != nil || out.String() != want {
		t.Errorf("lookup = %d, %v\n%swant\n%s", code, err, out.String(), want)
	}
	other := r.workload()
	other.App = "other"
	if got := runOnce(t, d, other, "lookup", "hello.instances.internal"); got != "hello.instances.internal no such host\n" {
		t.Errorf("another app is told %q", got)
	}
	asked.Range(func(k, _ any) bool {
		if strings.HasSuffix(k.(string), "internal.") {
			t.Errorf("the question for %s left the host", k)
		}
		return true
	})
}

func TestTerminal(t *testing.T) {
	r := newRig(t)
	d := up(t, r)
	in := ready(t, d, r.workload("serve"), 1)[0]
	cmd := func() (runtime.Cmd, *bytes.Buffer) {
		size := make(chan [2]uint16, 1)
		size <- [2]uint16{132, 43}
		var out bytes.Buffer
		return runtime.Cmd{Args: []string{"/server", "size"}, In: strings.NewReader("go\n"), Out: &out, Resize: size}, &out
	}
	c, out := cmd()
	if code, err := d.Exec(t.Context(), in.ID, c); code != 0 || err != nil || !strings.Contains(out.String(), "132x43") {
		t.Errorf("Exec = %d, %v, %q", code, err, out.String())
	}
	c, out = cmd()
	if code, err := d.Run(t.Context(), r.workload(), c); code != 0 || err != nil || !strings.Contains(out.String(), "132x43") {
		t.Errorf("Run = %d, %v, %q", code, err, out.String())
	}
}
