package daemon

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/m3o/m3o"
	"github.com/m3o/m3o/runtime/oci"
)

// A Finding is what one check of the host or the installation found.
type Finding struct {
	Check string `json:"check"` // kernel, ports, disk …
	State string `json:"state"` // ok, warn or fail
	Msg   string `json:"msg"`
	Hint  string `json:"hint,omitempty"` // how to mend it; "" when ok
}

// The states of a finding. Warn: m3o works, but not as it should.
const (
	CheckOK   = "ok"
	CheckWarn = "warn"
	CheckFail = "fail"
)

// findings collects them.
type findings []Finding

func (f *findings) add(state, check, hint, format string, args ...any) {
	if state == CheckOK {
		hint = ""
	}
	*f = append(*f, Finding{check, state, fmt.Sprintf(format, args...), hint})
}

// Doctor examines the host that cfg's daemon runs on, or would. It changes
// nothing and needs no daemon, but root for most of what it asks.
func Doctor(ctx context.Context, cfg Config) []Finding { return examine(ctx, cfg, os.Getpid()) }

// examine is Doctor for a process that does not listen itself, or for 0.
func examine(ctx context.Context, cfg Config, self int) []Finding {
	var f findings
	f.kernel()
	f.programs(cfg)
	f.network(ctx, cfg)
	f.ports(ctx, cfg, self)
	f.disk(cfg)
	f.names(ctx, cfg)
	f.clock()
	return f
}

// minKernel is the first whose pidfds, overlayfs and cgroups m3o is tested with.
var minKernel = [2]int{5, 10}

func (f *findings) kernel() {
	if os.Geteuid() != 0 {
		f.add(CheckFail, "root", "sudo m3od doctor", "this runs without root: m3od needs it, and most checks too")
	}
	var u unix.Utsname
	if err := unix.Uname(&u); err == nil {
		rel := unix.ByteSliceToString(u.Release[:])
		var v [2]int
		if n, _ := fmt.Sscanf(rel, "%d.%d", &v[0], &v[1]); n == 2 && slices.Compare(v[:], minKernel[:]) < 0 {
			f.add(CheckFail, "kernel", "boot a newer kernel", "Linux %s is older than %d.%d", rel, minKernel[0], minKernel[1])
		} else {
			f.add(CheckOK, "kernel", "", "Linux %s", rel)
		}
	}
	if b, err := os.ReadFile("/proc/filesystems"); err == nil && !strings.Contains(string(b), "\toverlay\n") {
		f.add(CheckFail, "kernel", "modprobe overlay", "the kernel knows no overlay file system: no image can be mounted")
	}
	if _, err := os.Stat("/proc/sys/kernel/seccomp/actions_avail"); err != nil {
		f.add(CheckFail, "kernel", "boot a kernel with CONFIG_SECCOMP_FILTER", "the kernel has no seccomp filters")
	}
}

func (f *findings) programs(cfg Config) {
	if _, err := exec.LookPath("git"); err != nil {
		f.add(CheckFail, "programs", "apt install git", "git is not installed: pushes cannot be taken")
	}
	need := []string{"m3o"}
	if cfg.BuildkitAddr == "" {
		need = append(need, "buildkitd")
	}
	ok := true
	for _, name := range need {
		if err := unix.Access(filepath.Join(cfg.Bin, name), unix.X_OK); err != nil {
			ok = false
			f.add(CheckFail, "programs", "install m3o again, or say where its programs are with --bin", "%s cannot be run from %s: %v", name, cfg.Bin, err)
		}
	}
	if ok {
		f.add(CheckOK, "programs", "", "m3o's programs are in %s", cfg.Bin)
	}
}

// network is what the driver of containers needs: cgroups, firewall, subnet.
func (f *findings) network(ctx context.Context, cfg Config) {
	if cfg.Runtime != "oci" {
		f.add(CheckWarn, "isolation", "run with --runtime oci where others' code runs", "apps run as plain processes, without limits or isolation")
		return
	}
	probs := oci.Check(ctx, oci.Config{Name: cfg.Name, Runc: filepath.Join(cfg.Bin, "runc"), Shim: filepath.Join(cfg.Bin, "m3o-shim"), Subnet: netip.MustParsePrefix(cfg.Subnet)})
	for _, p := range probs {
		f.add(CheckFail, "isolation", p.Hint, "%s", p.Msg)
	}
	if len(probs) == 0 {
		f.add(CheckOK, "isolation", "", "cgroups, firewall and subnet %s", cfg.Subnet)
	}
	// m3od opens its own directory, not those above it.
	if why := oci.NoUserNamespace(filepath.Dir(cfg.Data)); why != "" {
		f.add(CheckWarn, "isolation", "apps run all the same; with it a way out of a container would lead to nobody", "apps have no user namespace: %s", why)
	}
	if b, err := os.ReadFile("/proc/sys/net/ipv4/ip_forward"); err == nil && strings.TrimSpace(string(b)) != "1" {
		f.add(CheckWarn, "isolation", "m3od turns it on when it starts; if something turns it off again: sysctl -w net.ipv4.ip_forward=1", "IP forwarding is off: apps reach nothing outside")
	}
}

// ports says who has the ports that m3o needs, unless it is m3o.
func (f *findings) ports(ctx context.Context, cfg Config, self int) {
	for _, p := range []struct{ what, addr string }{{"http", cfg.HTTP}, {"https", cfg.HTTPS}, {"ssh", cfg.SSH}} {
		ln, err := (&net.ListenConfig{}).Listen(ctx, "tcp", p.addr)
		if err == nil {
			_ = ln.Close()
			f.add(CheckOK, "ports", "", "%s: %s is free", p.what, p.addr)
			continue
		}
		if errors.Is(err, syscall.EADDRINUSE) && ours(p.addr, self) {
			f.add(CheckOK, "ports", "", "%s: m3o listens on %s", p.what, p.addr)
			continue
		}
		perr := portError(p.what, p.addr, err)
		f.add(CheckFail, "ports", m3o.HintOf(perr), "%s", perr.Error())
	}
}

// ours is whether an m3od other than process self listens at addr, as far as
// /proc tells.
func ours(addr string, self int) bool {
	_, port, err := net.SplitHostPort(addr)
	if err != nil {
		return false
	}
	n, _ := strconv.Atoi(port)
	inodes := map[string]bool{}
	for _, file := range []string{"/proc/net/tcp", "/proc/net/tcp6"} {
		b, err := os.ReadFile(file)
		if err != nil {
			continue
		}
		for line := range strings.Lines(string(b)) {
			w := strings.Fields(line) // sl local remote st tx:rx tr:tm retr uid timeout inode
			if len(w) > 9 && w[3] == "0A" && strings.HasSuffix(w[1], fmt.Sprintf(":%04X", n)) {
				inodes["socket:["+w[9]+"]"] = true
			}
		}
	}
	fds, _ := filepath.Glob("/proc/[0-9]*/fd/*")
	for _, fd := range fds {
		if l, err := os.Readlink(fd); err != nil || !inodes[l] || strings.HasPrefix(fd, fmt.Sprintf("/proc/%d/", self)) {
			continue
		}
		if exe, err := os.Readlink(filepath.Join(filepath.Dir(filepath.Dir(fd)), "exe")); err == nil && strings.HasPrefix(filepath.Base(exe), "m3od") {
			return true
		}
	}
	return false
}

// Free space below which builds, and above which nothing, is likely to fail.
const (
	lowDisk  = 1 << 30
	someDisk = 10 << 30
)

func (f *findings) disk(cfg Config) {
	dir := cfg.Data
	for {
		if _, err := os.Stat(dir); err == nil || dir == "/" {
			break
		}
		dir = filepath.Dir(dir)
	}
	var st unix.Statfs_t
	if err := unix.Statfs(dir, &st); err != nil {
		f.add(CheckFail, "disk", "", "the disk of %s cannot be asked: %v", cfg.Data, err)
		return
	}
	free := int64(st.Bavail) * st.Bsize
	hint := "m3o keeps the images of releases that a rollback offers: destroy apps that are not needed, or put --data on a larger disk"
	switch {
	case free < lowDisk:
		f.add(CheckFail, "disk", hint, "%d MB are free at %s: builds will fail", free>>20, dir)
	case free < someDisk:
		f.add(CheckWarn, "disk", hint, "%d MB are free at %s", free>>20, dir)
	default:
		f.add(CheckOK, "disk", "", "%d GB are free at %s", free>>30, dir)
	}
	if st.Files > 0 && st.Ffree < st.Files/50 {
		f.add(CheckFail, "disk", hint, "only %d of %d files more can be made at %s", st.Ffree, st.Files, dir)
	}
}

// names checks that the apps' host names lead here.
func (f *findings) names(ctx context.Context, cfg Config) {
	if cfg.Local() {
		f.add(CheckOK, "dns", "", "%s is for this machine alone", cfg.Domain)
		return
	}
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	mine := map[string]bool{}
	if as, err := net.InterfaceAddrs(); err == nil {
		for _, a := range as {
			if p, err := netip.ParsePrefix(a.String()); err == nil {
				mine[p.Addr().Unmap().String()] = true
			}
		}
	}
	for _, host := range []string{"api." + cfg.Domain, "m3o-doctor-any-app." + cfg.Domain} {
		ips, err := net.DefaultResolver.LookupHost(ctx, host)
		if err != nil {
			f.add(CheckFail, "dns", fmt.Sprintf("make a record *.%s that leads to this machine", cfg.Domain), "%s has no address: %v", host, err)
			continue
		}
		if !slices.ContainsFunc(ips, func(ip string) bool { return mine[ip] }) {
			f.add(CheckWarn, "dns", "right behind a load balancer or NAT; else point *."+cfg.Domain+" here", "%s leads to %s, which is no address of this machine", host, strings.Join(ips, ", "))
			continue
		}
		f.add(CheckOK, "dns", "", "%s leads here", host)
	}
}

// clock asks the kernel whether somebody keeps its clock right: certificates,
// tokens and schedules depend on it.
func (f *findings) clock() {
	const unsynchronised = 0x40 // STA_UNSYNC of adjtimex(2)
	var t unix.Timex
	if _, err := unix.Adjtimex(&t); err != nil {
		f.add(CheckWarn, "clock", "", "the clock cannot be asked: %v", err)
		return
	}
	if t.Status&unsynchronised != 0 {
		f.add(CheckWarn, "clock", "apt install systemd-timesyncd (or chrony)", "nothing keeps the clock right: certificates, tokens and schedules go by it")
		return
	}
	f.add(CheckOK, "clock", "", "the clock is kept right")
}

// doctor is Doctor, and what only the daemon that runs can tell.
func (d *Daemon) doctor(ctx context.Context) []Finding {
	f := findings(examine(ctx, d.cfg, 0))
	sctx, cancel := context.WithTimeout(ctx, 3*time.Second)
	defer cancel()
	if st, err := d.router.Status(sctx); err != nil {
		f.add(CheckFail, "router", "the daemon starts it again; "+d.cfg.path("router", "router.log")+" says why it ended", "the router does not answer: %v", err)
	} else {
		f.add(CheckOK, "router", "", "the router serves %d hosts since %s", st.Hosts, st.Started.UTC().Format(time.DateTime))
	}
	if err := d.builder.Ready(sctx); err != nil {
		f.add(CheckFail, "builder", "the daemon's log has the cause", "builds cannot be made: %v", err)
	} else {
		f.add(CheckOK, "builder", "", "the builder takes builds")
	}
	down := 0
	apps, err := d.ledger.Apps(ctx)
	if err != nil {
		f.add(CheckFail, "store", "the daemon's log has the cause", "the records cannot be read: %v", err)
	}
	for _, app := range apps {
		ready, crashed := false, false
		for _, in := range d.routes.list(app.Name) {
			ready = ready || in.Phase == m3o.Ready
			crashed = crashed || in.Phase == m3o.Exited || in.Phase == m3o.Unhealthy
		}
		if crashed && !ready {
			down++
			f.add(CheckWarn, "apps", "m3o logs -a "+app.Name, "no instance of %s is ready", app.Name)
		}
	}
	if down == 0 && err == nil {
		f.add(CheckOK, "apps", "", "%d apps, none down", len(apps))
	}
	for key, s := range d.drains.all() {
		if st := s.drain.Stats(); st.Err != "" {
			f.add(CheckWarn, "drains", "m3o drains -a "+strings.Split(key, "/")[0], "drain %s does not take lines: %s", key, st.Err)
		}
	}
	return f
}
