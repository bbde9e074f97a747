//go:build linux

package oci_test

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/m3o/m3o/discovery"
	"github.com/m3o/m3o/internal/need"
	"github.com/m3o/m3o/runtime/oci"
	"github.com/m3o/m3o/runtime/runtimetest"
)

// TestMain runs the tests in a network namespace of their own, so that nothing
// touches the machine's network and what they leave can be counted. It runs
// itself again there, and as the daemon that tests kill.
func TestMain(m *testing.M) {
	switch {
	case os.Getenv("M3O_OCI_DAEMON") != "":
		daemon()
	case os.Getenv("M3O_OCI_INTERNET") != "":
		theInternet()
	case os.Geteuid() == 0 && os.Getenv("M3O_OCI_NETNS") == "":
		cmd := exec.Command("/proc/self/exe", os.Args[1:]...)
		cmd.Args[0] = os.Args[0]
		cmd.Env = append(os.Environ(), "M3O_OCI_NETNS=1")
		cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
		cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNET}
		err := cmd.Run()
		if e, ok := errors.AsType[*exec.ExitError](err); ok {
			os.Exit(e.ExitCode())
		} else if err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	var err error
	if scratch, err = os.MkdirTemp("", "m3o-oci-test-"); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	code := m.Run()
	_ = os.RemoveAll(scratch)
	os.Exit(code)
}

// A rig is one driver's Config and what its tests need.
type rig struct {
	cfg   oci.Config
	image string
}

// shim builds m3o-shim once, into a directory that TestMain removes.
func shim(t testing.TB) string {
	t.Helper()
	build.Do(func() {
		built = filepath.Join(scratch, "m3o-shim")
		if err := os.Rename(runtimetest.Build(t, "github.com/m3o/m3o/cmd/m3o-shim"), built); err != nil {
			t.Fatal(err)
		}
	})
	return built
}

var (
	build          sync.Once
	scratch, built string
)

func newRig(t testing.TB) rig {
	t.Helper()
	need.Root(t)
	dir := t.TempDir()
	if strings.ContainsAny(dir, ":,\\") {
		t.Fatalf("temporary directory %s cannot be used for overlays", dir)
	}
	if err := os.Chmod(filepath.Dir(dir), 0o711); err != nil { // as m3od's own directories are
		t.Fatal(err)
	}
	runDir, err := os.MkdirTemp("/run", "m3o-test-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(runDir) })
	images := filepath.Join(dir, "images")
	r := rig{image: runtimetest.ServerImage(t, images), cfg: oci.Config{
		Name: "m3ot" + cmp.Or(os.Getenv("M3O_TEST_SLOT"), "0"), Dir: filepath.Join(dir, "state"), Run: runDir, Images: images,
		Runc: need.Bin(t, "runc"), Shim: shim(t), Subnet: netip.MustParsePrefix("198.18.0.0/16"),
		Log: testLog(t),
	}}
	return r
}

func testLog(t testing.TB) *slog.Logger {
	if !testing.Verbose() {
		return nil
	}
	return slog.New(slog.NewTextHandler(t.Output(), &slog.HandlerOptions{Level: slog.LevelDebug}))
}

// serve opens the driver and serves it until the function it returns is called.
func (r rig) serve(t testing.TB) (d *oci.Driver, end func()) {
	t.Helper()
	d, err := oci.Open(t.Context(), r.cfg)
	if err != nil {
		t.Fatal(err)
	}
	peers := new(discovery.Directory)
	d.OnJoin(func(context.Context) { peers.Set(d.Peers()) })
	directories.Store(d, peers)
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- d.Serve(ctx) }()
	ended := false
	return d, func() {
		t.Helper()
		if ended {
			return
		}
		ended = true
		cancel()
		if err := <-done; err != nil {
			t.Errorf("Serve = %v", err)
		}
	}
}

// directories are what the drivers that serve has started are told apart by.
var directories sync.Map // of *discovery.Directory by *oci.Driver

// resolve serves names to the instances of d, as the router does, and returns
// what makes it know who is there now.
func resolve(t testing.TB, d *oci.Driver, upstreams ...string) (refresh func()) {
	t.Helper()
	peers, _ := directories.Load(d)
	n := &discovery.Names{Gateway: d.Gateway(), Upstreams: upstreams, Peers: peers.(*discovery.Directory), Log: slog.New(slog.DiscardHandler)}
	at := netip.AddrPortFrom(d.Gateway(), discovery.DNSPort).String()
	var err error
	if n.UDP, err = net.ListenPacket("udp4", at); err != nil {
		t.Fatal(err)
	}
	if n.TCP, err = net.Listen("tcp4", at); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- n.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("names: %v", err)
		}
	})
	return func() { n.Peers.Set(d.Peers()) }
}

func mustPrefix(s string) netip.Prefix { return netip.MustParsePrefix(s) }

func shutdown(t testing.TB, d *oci.Driver) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	if err := d.Shutdown(ctx); err != nil {
		t.Errorf("Shutdown = %v", err)
	}
}

// leftovers lists what is on the machine of this rig's instances: bundles,
// records, runc's state, mounts, cgroups, devices and processes.
func (r rig) leftovers(t testing.TB) []string {
	t.Helper()
	var left []string
	for _, dir := range []string{"bundles", "instances"} {
		left = append(left, list(t, filepath.Join(r.cfg.Dir, dir))...)
	}
	left = append(left, list(t, r.cfg.Run)...)
	b, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		t.Fatal(err)
	}
	for l := range strings.Lines(string(b)) {
		f := strings.Fields(l)
		if strings.HasPrefix(f[4], r.cfg.Dir) && f[4] != filepath.Join(r.cfg.Dir, "logs") {
			left = append(left, "mount "+f[4])
		}
		if _, fs, _ := strings.Cut(l, " - "); strings.HasPrefix(fs, "cgroup") {
			for _, e := range list(t, filepath.Join(f[4], r.cfg.Name)) {
				if fi, err := os.Stat(e); err == nil && fi.IsDir() {
					left = append(left, "cgroup "+e)
				}
			}
		}
	}
	ifs, err := net.Interfaces()
	if err != nil {
		t.Fatal(err)
	}
	for _, i := range ifs {
		if strings.HasPrefix(i.Name, r.cfg.Name+"-") {
			left = append(left, "device "+i.Name)
		}
	}
	return append(left, r.processes(t)...)
}

func list(t testing.TB, dir string) []string {
	t.Helper()
	es, err := os.ReadDir(dir)
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		t.Fatal(err)
	}
	var out []string
	for _, e := range es {
		out = append(out, filepath.Join(dir, e.Name()))
	}
	return out
}

// processes are the shims, runcs and apps of this rig.
func (r rig) processes(t testing.TB) []string {
	t.Helper()
	var out []string
	for _, p := range list(t, "/proc") {
		cmd, err := os.ReadFile(filepath.Join(p, "cmdline"))
		if err != nil {
			continue
		}
		if dead(p) {
			continue
		}
		line := strings.ReplaceAll(string(cmd), "\x00", " ")
		group, _ := os.ReadFile(filepath.Join(p, "cgroup"))
		if strings.Contains(line, r.cfg.Dir) && !strings.Contains(line, ".test") || strings.Contains(string(group), ":/"+r.cfg.Name+"/") {
			out = append(out, "process "+filepath.Base(p)+" "+line)
		}
	}
	return out
}

// dead is whether a process is a zombie of somebody else's: what a killed
// daemon leaves, the machine's init reaps in its own time.
func dead(proc string) bool {
	b, _ := os.ReadFile(filepath.Join(proc, "stat"))
	_, rest, _ := strings.Cut(string(b), ") ")
	f := strings.Fields(rest)
	return len(f) > 1 && f[0] == "Z" && f[1] != strconv.Itoa(os.Getpid())
}
