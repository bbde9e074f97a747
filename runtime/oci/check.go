//go:build linux

package oci

import (
	"context"
	"fmt"
	"net/netip"
	"os/exec"
	"strings"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// A Problem is something about the host that keeps instances from working as
// they should.
type Problem struct{ Msg, Hint string }

// Check looks at the host and reports what is wrong with it for a driver of
// this Name, Subnet, Runc and Shim; nil when nothing is. It changes nothing and
// ends soon after ctx does.
func Check(ctx context.Context, cfg Config) []Problem {
	var all []Problem
	add := func(hint, format string, args ...any) {
		all = append(all, Problem{fmt.Sprintf(format, args...), hint})
	}
	d := &Driver{cfg: cfg}
	all = append(all, checkCgroups(cfg.Name, "/proc/self/mountinfo")...)
	for _, p := range []struct{ what, path string }{{"m3o-shim", d.cfg.Shim}, {"runc", d.cfg.Runc}} {
		if err := unix.Access(p.path, unix.X_OK); err != nil {
			add("install m3o again, or say where its programs are with --bin", "%s cannot be run from %s, so no app can start: %v", p.what, p.path, err)
		} else if p.what == "runc" {
			all = append(all, checkRunc(ctx, p.path)...)
		}
	}
	nl, err := netlink.NewHandle(unix.NETLINK_ROUTE)
	if err != nil {
		add("run this as root on Linux", "the routes cannot be read: %v", err)
		return append(all, d.checkFirewalls(ctx)...)
	}
	defer nl.Close()
	d.net = &network{prefix: cfg.Name + "-", nl: nl}
	return append(append(all, d.checkFirewalls(ctx)...), d.checkSubnet()...)
}

// checkCgroups finds the hierarchies and controllers that limits need.
func checkCgroups(name, mountinfo string) []Problem {
	c, err := findCgroups(name, mountinfo)
	if err != nil {
		return []Problem{{fmt.Sprintf("there are no cgroups, so no app can be limited: %v", err), "mount -t cgroup2 none /sys/fs/cgroup, as every system with systemd does"}}
	}
	var all []Problem
	for _, name := range []string{"memory", "cpu", "pids"} {
		if !c.has(name) {
			all = append(all, Problem{fmt.Sprintf("the cgroup controller %s is not available: its limits do not hold, and one app can take all", name),
				"boot with cgroup_enable=" + name + " on the kernel command line; in a container or service, have it delegated (Delegate=yes)"})
		}
	}
	return all
}

// checkRunc asks runc which it is.
func checkRunc(ctx context.Context, path string) []Problem {
	const hint = "use the runc that comes with m3o: install m3o again"
	ctx, cancel := context.WithTimeout(ctx, programTimeout)
	defer cancel()
	cmd := exec.CommandContext(ctx, path, "--version")
	cmd.WaitDelay = 100 * time.Millisecond // something it left may hold the pipe
	out, err := cmd.Output()
	switch {
	case ctx.Err() != nil:
		return []Problem{{fmt.Sprintf("runc (%s) does not say its version within %v, so no app can start", path, programTimeout), hint}}
	case err != nil:
		return []Problem{{fmt.Sprintf("runc (%s) does not run, so no app can start: %v", path, err), hint}}
	}
	v, ok := strings.CutPrefix(string(out), "runc version ")
	if !ok {
		return []Problem{{fmt.Sprintf("%s is no runc: it says nothing of its version", path), hint}}
	}
	if v, _, _ = strings.Cut(v, "\n"); tooOld(v) {
		return []Problem{{fmt.Sprintf("runc %s has known ways out of a container (CVE-2025-31133, -52565, -52881); 1.2.8, 1.3.3 and 1.4.0 were the first without", v), hint}}
	}
	return nil
}

// programTimeout is how long a program that is asked something may take.
const programTimeout = 3 * time.Second

// tooOld is whether a runc version lacks the fixes of November 2025.
func tooOld(version string) bool {
	var major, minor, patch int
	if n, _ := fmt.Sscanf(version, "%d.%d.%d", &major, &minor, &patch); n < 2 {
		return false // not upstream's numbering: nothing is known
	}
	switch {
	case major != 1:
		return major < 1
	case minor == 2:
		return patch < 8
	case minor == 3:
		return patch < 3
	}
	return minor < 2
}

// checkSubnet finds routes of others that overlap the instances' subnet.
func (d *Driver) checkSubnet() []Problem {
	routes, err := d.net.nl.RouteList(nil, unix.AF_INET)
	if err != nil {
		return []Problem{{fmt.Sprintf("the routes cannot be read: %v", err), "run this as root on Linux"}}
	}
	var all []Problem
	for _, r := range routes {
		if r.Dst == nil {
			continue
		}
		ip, ok := netip.AddrFromSlice(r.Dst.IP)
		bits, _ := r.Dst.Mask.Size()
		if !ok || bits == 0 || r.Type == unix.RTN_UNREACHABLE {
			continue
		}
		if p := netip.PrefixFrom(ip.Unmap(), bits); p.Overlaps(d.cfg.Subnet) {
			l, err := d.net.nl.LinkByIndex(r.LinkIndex)
			if err != nil || strings.HasPrefix(l.Attrs().Name, d.net.prefix) {
				continue
			}
			all = append(all, Problem{fmt.Sprintf("the network %s of this host (device %s) overlaps %s, where apps get their addresses: one of the two cannot be reached", p, l.Attrs().Name, d.cfg.Subnet),
				"choose a network that nothing here uses with --subnet, such as 10.213.0.0/16 (ip route shows those in use)"})
		}
	}
	return all
}
