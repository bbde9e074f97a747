//go:build linux

package oci

import (
	"context"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"strings"

	"github.com/google/nftables"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// A Problem is something about the host that keeps instances from working as
// they should.
type Problem struct{ Msg, Hint string }

// Check looks at the host and reports what is wrong with it for a driver of
// this Name, Subnet, Runc and Shim; nil when nothing is. It changes nothing.
func Check(ctx context.Context, cfg Config) []Problem {
	var all []Problem
	add := func(hint, format string, args ...any) {
		all = append(all, Problem{fmt.Sprintf(format, args...), hint})
	}
	d := &Driver{cfg: cfg}
	var err error
	if d.cgroups, err = findCgroups(cfg.Name, "/proc/self/mountinfo"); err != nil {
		add("mount cgroup v2 at /sys/fs/cgroup, as every system with systemd does", "there are no cgroups: %v", err)
	}
	for _, name := range []string{"memory", "cpu", "pids"} {
		if err == nil && !d.cgroups.has(name) {
			add("enable it on the kernel command line, or delegate it to this service", "the cgroup controller %s is not available: its limits do not hold", name)
		}
	}
	if fs, err := os.ReadFile("/proc/filesystems"); err == nil && !strings.Contains(string(fs), "\toverlay\n") {
		add("modprobe overlay", "the kernel knows no overlay file system: no image can be mounted")
	}
	for what, path := range map[string]string{"runc": d.cfg.Runc, "m3o-shim": d.cfg.Shim} {
		if err := unix.Access(path, unix.X_OK); err != nil {
			add("install m3o again, or say where it is", "%s cannot be run from %s: %v", what, path, err)
		}
	}
	if out, err := exec.CommandContext(ctx, d.cfg.Runc, "--version").Output(); err == nil && strings.HasPrefix(string(out), "runc version ") {
		if v := strings.Fields(string(out))[2]; tooOld(v) {
			add("use the runc that comes with m3o", "runc %s has known ways out of a container (CVE-2025-31133, -52565, -52881); 1.2.8, 1.3.3 and 1.4.0 were the first without", v)
		}
	}
	nl, err := netlink.NewHandle(unix.NETLINK_ROUTE)
	if err != nil {
		add("", "the routes cannot be read: %v", err)
		return append(all, d.checkFirewalls()...)
	}
	defer nl.Close()
	d.net = &network{prefix: cfg.Name + "-", nl: nl}
	return append(append(all, d.checkFirewalls()...), d.checkSubnet()...)
}

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

// checkFirewalls finds other tables whose chains drop by default: what ours
// accepts they drop all the same. Docker and ufw are the usual ones.
func (d *Driver) checkFirewalls() []Problem {
	c, err := nftables.New()
	if err != nil {
		return []Problem{{fmt.Sprintf("the firewall cannot be read: %v", err), "modprobe nf_tables"}}
	}
	chains, err := c.ListChains()
	if err != nil {
		return []Problem{{fmt.Sprintf("the firewall cannot be read: %v", err), "modprobe nf_tables"}}
	}
	var all []Problem
	for _, ch := range chains {
		if ch.Table == nil || ch.Table.Name == d.cfg.Name || ch.Hooknum == nil || ch.Policy == nil || *ch.Policy != nftables.ChainPolicyDrop {
			continue
		}
		switch *ch.Hooknum {
		case *nftables.ChainHookForward:
			all = append(all, Problem{fmt.Sprintf("the chain %s of table %s drops what is forwarded: apps cannot reach the internet", ch.Name, ch.Table.Name),
				fmt.Sprintf("iptables -I FORWARD -i %s-+ -j ACCEPT && iptables -I FORWARD -o %s-+ -j ACCEPT", d.cfg.Name, d.cfg.Name)})
		case *nftables.ChainHookInput:
			all = append(all, Problem{fmt.Sprintf("the chain %s of table %s drops what comes in: apps may get no name service and answer nobody", ch.Name, ch.Table.Name),
				fmt.Sprintf("iptables -I INPUT -i %s-+ -j ACCEPT; m3o's own rules still close the host to apps", d.cfg.Name)})
		}
	}
	return all
}

// checkSubnet finds routes of others that overlap the instances' subnet.
func (d *Driver) checkSubnet() []Problem {
	routes, err := d.net.nl.RouteList(nil, unix.AF_INET)
	if err != nil {
		return []Problem{{fmt.Sprintf("the routes cannot be read: %v", err), ""}}
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
			if l, err := d.net.nl.LinkByIndex(r.LinkIndex); err != nil || strings.HasPrefix(l.Attrs().Name, d.net.prefix) {
				continue
			}
			all = append(all, Problem{fmt.Sprintf("the network %s of this host overlaps %s, where apps get their addresses", p, d.cfg.Subnet),
				"choose another with --subnet"})
		}
	}
	return all
}
