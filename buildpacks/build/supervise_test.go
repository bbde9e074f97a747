package build

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	goruntime "runtime"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/nftables"
	"github.com/m3o/m3o"
	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
)

// orphanDir, in the environment, makes the test binary a daemon that is killed.
const orphanDir = "M3O_TEST_ORPHAN_DIR"

func beKilled(dir string) {
	b, _, err := start(context.Background(), Config{Dir: dir, Buildkitd: os.Getenv("BUILDKITD"), Runc: os.Getenv("RUNC")})
	if err != nil {
		fmt.Println(err)
		os.Exit(1)
	}
	fmt.Println("ready", b.Images())
	select {}
}

func TestOrphanOfAKilledDaemonIsEnded(t *testing.T) {
	dir, err := os.MkdirTemp("", "m3o-orphan-")
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(dir)
	cfg := testConfig(t, dir)
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), orphanDir+"="+dir, "BUILDKITD="+cfg.Buildkitd, "RUNC="+cfg.Runc)
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	buf := make([]byte, 512)
	n, _ := out.Read(buf)
	if !strings.HasPrefix(string(buf[:n]), "ready") {
		t.Fatalf("daemon says %q", buf[:n])
	}
	// Another one must not take the directory while the first lives.
	if b, err := Open(t.Context(), cfg); m3o.KindOf(err) != m3o.Conflict {
		t.Errorf("second Open = %v, %v, want a conflict", b, err)
	}
	_ = cmd.Process.Kill()
	_ = cmd.Wait()
	var rec pidRecord
	j, err := os.ReadFile(filepath.Join(dir, "buildkit/buildkitd.pid"))
	if err == nil {
		err = json.Unmarshal(j, &rec)
	}
	if err != nil {
		t.Fatal(err)
	}
	if s, err := startTime(rec.Pid); err != nil || s != rec.Start {
		t.Fatalf("the orphan is gone already: %v", err)
	}
	b, stop, err := start(t.Context(), cfg)
	if err != nil {
		t.Fatal(err)
	}
	if s, err := startTime(rec.Pid); err == nil && s == rec.Start {
		t.Error("the orphan still runs")
	}
	if err := stop(); err != nil {
		t.Error(err)
	}
	nothingLeft(t, b)
}

func TestRunLeavesNothing(t *testing.T) {
	dir, err := os.MkdirTemp("", "m3o-leaves-")
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(dir)
	b, stop, err := start(t.Context(), testConfig(t, dir))
	if err != nil {
		t.Fatal(err)
	}
	gen := b.generation()
	kill9(t, b) // and again after a crash
	eventually(t, "restart", func() bool { return b.diedSince(gen) && b.Ready(t.Context()) == nil })
	if err := stop(); err != nil {
		t.Error(err)
	}
	nothingLeft(t, b)
}

func nothingLeft(t *testing.T, b *Builder) {
	t.Helper()
	if pids := b.cgroup.pids(); len(pids) > 0 {
		t.Errorf("processes %v are left", pids)
	}
	for _, root := range b.cgroup.roots {
		if _, err := os.Stat(filepath.Join(root, b.cgroup.name)); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("cgroup in %s is left: %v", root, err)
		}
	}
	if l, err := netlink.LinkByName(b.network.link); err == nil {
		t.Errorf("link %s is left", l.Attrs().Name)
	}
	c, err := nftables.New()
	if err != nil {
		t.Fatal(err)
	}
	ts, err := c.ListTables()
	if err != nil {
		t.Fatal(err)
	}
	for _, tb := range ts {
		if tb.Name == b.network.table {
			t.Errorf("table %s is left", tb.Name)
		}
	}
	mounts, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil || strings.Contains(string(mounts), b.cfg.Dir) {
		t.Errorf("mounts are left (%v)", err)
	}
}

// inBuilds dials from where builds are.
func inBuilds(t *testing.T, b *Builder, addr string) error {
	t.Helper()
	var rec pidRecord
	j, err := os.ReadFile(b.pidfile())
	if err == nil {
		err = json.Unmarshal(j, &rec)
	}
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan error, 1)
	go func() {
		// The thread ends with the goroutine: it is never unlocked.
		goruntime.LockOSThread()
		ns, err := netns.GetFromPid(rec.Pid)
		if err == nil {
			defer ns.Close()
			err = netns.Set(ns)
		}
		if err != nil {
			done <- fmt.Errorf("enter: %w", err)
			return
		}
		d := net.Dialer{Timeout: time.Second}
		c, err := d.Dial("tcp", addr)
		if err == nil {
			_ = c.Close()
		}
		done <- err
	}()
	return <-done
}

// A listener on every address of the host, and one "in the world": a
// namespace behind the host, reached by a route as the world is.
func TestBuildsReachTheWorldButNotTheHost(t *testing.T) {
	b := builder(t)
	l, err := net.Listen("tcp", ":0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	port := l.Addr().(*net.TCPAddr).Port
	addrs, err := net.InterfaceAddrs()
	if err != nil {
		t.Fatal(err)
	}
	tried := 0
	for _, a := range addrs {
		p, err := netip.ParsePrefix(a.String())
		if err != nil || p.Addr().IsLoopback() || !p.Addr().Is4() {
			continue
		}
		tried++
		if err := inBuilds(t, b, netip.AddrPortFrom(p.Addr(), uint16(port)).String()); err == nil {
			t.Errorf("builds reach the host at %s", p.Addr())
		}
	}
	if tried == 0 {
		t.Error("the host has no address to try")
	}
	_, world, _ := net.SplitHostPort(newWorld(t, "203.0.113.9", "198.18.77.9", "169.254.169.254").Addr().String())
	eventually(t, "way into the world", func() bool { return inBuilds(t, b, net.JoinHostPort("203.0.113.9", world)) == nil })
	for _, addr := range []string{"198.18.77.9", "169.254.169.254"} {
		if err := inBuilds(t, b, net.JoinHostPort(addr, world)); err == nil || !isTimeout(err) {
			t.Errorf("dial %s = %v, want silence", addr, err)
		}
	}
	// And nothing reaches in.
	if c, err := net.DialTimeout("tcp", net.JoinHostPort(b.network.build().String(), "1"), time.Second); err == nil || !isTimeout(err) {
		t.Errorf("dial into the builds = %v, %v, want silence", c, err)
	}
}

func isTimeout(err error) bool {
	ne, ok := errors.AsType[net.Error](err)
	return ok && ne.Timeout()
}

// newWorld makes a namespace with a listener on each address.
func newWorld(t *testing.T, addrs ...string) net.Listener {
	t.Helper()
	hold := exec.Command("sleep", "600")
	hold.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNET, Pdeathsig: 0}
	if err := hold.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = hold.Process.Kill(); _ = hold.Wait() })
	ns, err := netns.GetFromPid(hold.Process.Pid)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = ns.Close() })
	name := fmt.Sprintf("m3ot%d", os.Getpid()%100000)
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	must(netlink.LinkAdd(&netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: name}, PeerName: "eth0", PeerNamespace: netlink.NsFd(ns)}))
	t.Cleanup(func() {
		if l, err := netlink.LinkByName(name); err == nil {
			_ = netlink.LinkDel(l)
		}
	})
	host, err := netlink.LinkByName(name)
	must(err)
	add := func(h *netlink.Handle, l netlink.Link, cidr string) {
		t.Helper()
		a, err := netlink.ParseAddr(cidr)
		must(err)
		must(h.AddrAdd(l, a))
	}
	here, err := netlink.NewHandle()
	must(err)
	defer here.Close()
	there, err := netlink.NewHandleAt(ns)
	must(err)
	defer there.Close()
	inner, err := there.LinkByName("eth0")
	must(err)
	add(here, host, "198.51.100.1/30")
	add(there, inner, "198.51.100.2/30")
	must(here.LinkSetUp(host))
	must(there.LinkSetUp(inner))
	lo, err := there.LinkByName("lo")
	must(err)
	must(there.LinkSetUp(lo))
	must(there.RouteAdd(&netlink.Route{LinkIndex: inner.Attrs().Index, Gw: net.ParseIP("198.51.100.1")}))
	for _, a := range addrs {
		add(there, lo, a+"/32")
		_, dst, err := net.ParseCIDR(a + "/32")
		must(err)
		must(here.RouteAdd(&netlink.Route{LinkIndex: host.Attrs().Index, Dst: dst, Gw: net.ParseIP("198.51.100.2")}))
	}
	type opened struct {
		l   net.Listener
		err error
	}
	got := make(chan opened, 1)
	go func() {
		goruntime.LockOSThread() // ends with the thread
		if err := netns.Set(ns); err != nil {
			got <- opened{nil, err}
			return
		}
		l, err := net.Listen("tcp", ":0")
		got <- opened{l, err}
	}()
	o := <-got
	must(o.err)
	t.Cleanup(func() { _ = o.l.Close() })
	return o.l
}

// A state directory on a disk too small for what BuildKit unpacks.
func TestDiskFullIsSaidSo(t *testing.T) {
	cfg := testConfig(t, "")
	dir, err := os.MkdirTemp("", "m3o-full-")
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(dir)
	for _, size := range []string{"150m", "330m"} { // the toolchain layer does not fit; it fits, unpacked it does not
		if err := syscall.Mount("tmpfs", dir, "tmpfs", 0, "size="+size); err != nil {
			t.Fatal(err)
		}
		func() {
			defer func() {
				if err := syscall.Unmount(dir, 0); err != nil {
					t.Error(err)
				}
			}()
			cfg.Dir = dir
			b, stop, err := start(t.Context(), cfg)
			if err != nil {
				t.Fatal(err)
			}
			defer func() {
				if err := stop(); err != nil {
					t.Error(err)
				}
			}()
			_, out, err := push(t.Context(), t, b, repo(t, hello))
			if m3o.KindOf(err) != m3o.Unavailable || err.Error() != "the disk of the build machine is full" {
				t.Errorf("%s: Build = %v (%v)\n%s", size, err, errors.Unwrap(err), out)
			}
		}()
	}
}
