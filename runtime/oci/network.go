//go:build linux

package oci

import (
	"errors"
	"fmt"
	"hash/fnv"
	"net"
	"net/netip"
	"os"
	"strings"
	"time"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

// network gives each instance one end of a veth pair and a route to its
// address: no bridge, so that whatever one instance sends to another or to the
// host passes our firewall, whatever the host's settings of bridges are.
//
//	instance eth0 198.18.0.5/32 ── <name>-xxxxxx host
//	          default via gateway       198.18.0.5 dev <name>-xxxxxx src gateway
//
// The gateway address sits once on the loopback device: name service can
// listen there before there is any instance. Both ends know each other's
// hardware address, so nothing depends on the host's ARP settings.
type network struct {
	prefix  string // of the names of our veth devices
	subnet  netip.Prefix
	gateway netip.Addr
	uplink  string // "": any device that is not ours
	deny    []netip.Prefix
	table   string
	pairs   []pair // that the firewall begins with
	nl      *netlink.Handle
}

// linkLocal is where gateways are, and cloud metadata services.
var linkLocal = netip.MustParsePrefix("169.254.0.0/16")

// GatewayOf derives the gateway's address from the driver's name, so that two
// drivers on a host do not meet: 169.254.1.1 for the default name, one of
// 169.254.2.1 to 169.254.168.254 for any other.
func GatewayOf(name string) netip.Addr {
	if name == DefaultName {
		return netip.AddrFrom4([4]byte{169, 254, 1, 1})
	}
	h := fnv.New32a()
	_, _ = h.Write([]byte(name))
	n := h.Sum32()
	return netip.AddrFrom4([4]byte{169, 254, byte(2 + n%167), byte(1 + n>>8%254)})
}

func ipNet(p netip.Prefix) *net.IPNet {
	return &net.IPNet{IP: p.Addr().AsSlice(), Mask: net.CIDRMask(p.Bits(), p.Addr().BitLen())}
}

func host(a netip.Addr) *net.IPNet { return ipNet(netip.PrefixFrom(a, a.BitLen())) }

// hardware makes the hardware address of one end of an instance's pair. A
// fixed one also keeps udev from giving the device another.
func hardware(end byte, a netip.Addr) net.HardwareAddr {
	b := a.As4()
	return net.HardwareAddr{end, 0x3e, b[0], b[1], b[2], b[3]}
}

const (
	hostEnd     = 0x0a // both are locally administered unicast addresses
	instanceEnd = 0x0e
)

// device is the name of an instance's device on the host: IDs end in six
// random characters.
func (n *network) device(id string) string { return n.prefix + id[max(0, len(id)-6):] }

const forwarding = "/proc/sys/net/ipv4/ip_forward"

// setup makes what all instances share; it may be repeated. It tells whether
// it had to turn on IP forwarding, for the whole host.
func (n *network) setup() (turnedOn bool, err error) {
	if n.nl == nil {
		if n.nl, err = netlink.NewHandle(unix.NETLINK_ROUTE); err != nil {
			return false, fmt.Errorf("open netlink: %w", err)
		}
	}
	lo, err := n.nl.LinkByName("lo")
	if err != nil {
		return false, fmt.Errorf("find loopback: %w", err)
	}
	if err := n.nl.LinkSetUp(lo); err != nil {
		return false, fmt.Errorf("set loopback up: %w", err)
	}
	if err := n.nl.AddrReplace(lo, &netlink.Addr{IPNet: host(n.gateway), Scope: unix.RT_SCOPE_LINK}); err != nil {
		return false, fmt.Errorf("add %s to loopback: %w", n.gateway, err)
	}
	// The firewall comes before anything can be sent.
	if err := n.firewall(); err != nil {
		return false, err
	}
	if err := n.nl.RouteReplace(n.unreachable()); err != nil {
		return false, fmt.Errorf("add unreachable route: %w", err)
	}
	b, err := os.ReadFile(forwarding)
	if err != nil {
		return false, fmt.Errorf("read IP forwarding: %w", err)
	}
	if strings.TrimSpace(string(b)) == "1" {
		return false, nil
	}
	if err := os.WriteFile(forwarding, []byte("1"), 0); err != nil {
		return false, fmt.Errorf("turn on IP forwarding: %w", err)
	}
	return true, nil
}

// unreachable is the route that answers for every address of the subnet that
// no instance has: without it a packet for a stopped instance would follow the
// default route out of the machine.
func (n *network) unreachable() *netlink.Route {
	return &netlink.Route{Dst: ipNet(n.subnet.Masked()), Type: unix.RTN_UNREACHABLE}
}

const (
	settlePause = 200 * time.Microsecond
	settleTries = 1000
)

// add connects the network namespace of process pid, which runs nothing of the
// app's yet.
func (n *network) add(id string, pid int, ip netip.Addr) error {
	if err := n.remove(id); err != nil {
		return err
	}
	at := netlink.NewLinkAttrs()
	at.Name, at.HardwareAddr = n.device(id), hardware(hostEnd, ip)
	v := &netlink.Veth{LinkAttrs: at, PeerName: "eth0", PeerHardwareAddr: hardware(instanceEnd, ip), PeerNamespace: netlink.NsPid(pid)}
	if err := n.nl.LinkAdd(v); err != nil {
		return fmt.Errorf("add veth: %w", err)
	}
	if err := n.inside(pid, ip); err != nil {
		return err
	}
	// The host end has no use for IPv6; where that is off there is no file.
	_ = os.WriteFile("/proc/sys/net/ipv6/conf/"+at.Name+"/disable_ipv6", []byte("1"), 0)
	if err := n.nl.LinkSetUp(v); err != nil {
		return fmt.Errorf("set veth up: %w", err)
	}
	i := v.Attrs().Index
	if err := n.nl.NeighSet(neighbour(i, ip, hardware(instanceEnd, ip))); err != nil {
		return fmt.Errorf("add neighbour: %w", err)
	}
	if err := n.nl.RouteReplace(&netlink.Route{LinkIndex: i, Dst: host(ip), Scope: netlink.SCOPE_LINK, Src: n.gateway.AsSlice()}); err != nil {
		return fmt.Errorf("add route: %w", err)
	}
	return n.settle(i)
}

// settle waits until the kernel has taken note that both ends of a pair are
// up, which it does for both at once, beside what set them up. Until then it
// drops what the instance's end sends, and who has asked something asks again
// only after a second.
func (n *network) settle(link int) error {
	for range settleTries {
		l, err := n.nl.LinkByIndex(link)
		if err != nil {
			return fmt.Errorf("look at veth: %w", err)
		}
		if l.Attrs().OperState == netlink.OperUp {
			return nil
		}
		time.Sleep(settlePause)
	}
	return nil // it only costs somebody that second
}

func neighbour(link int, ip netip.Addr, hw net.HardwareAddr) *netlink.Neigh {
	return &netlink.Neigh{LinkIndex: link, Family: unix.AF_INET, State: netlink.NUD_PERMANENT, IP: ip.AsSlice(), HardwareAddr: hw}
}

// inside configures the instance's end.
func (n *network) inside(pid int, ip netip.Addr) error {
	ns, err := netns.GetFromPid(pid)
	if err != nil {
		return fmt.Errorf("open network namespace: %w", err)
	}
	defer ns.Close() //nolint:errcheck // a descriptor
	// Without the family it would want XFRM too, which some kernels lack.
	h, err := netlink.NewHandleAt(ns, unix.NETLINK_ROUTE)
	if err != nil {
		return fmt.Errorf("enter network namespace: %w", err)
	}
	defer h.Close()
	lo, err := h.LinkByName("lo")
	if err != nil {
		return fmt.Errorf("find loopback: %w", err)
	}
	eth, err := h.LinkByName("eth0")
	if err != nil {
		return fmt.Errorf("find eth0: %w", err)
	}
	i := eth.Attrs().Index
	for _, step := range []struct {
		what string
		do   func() error
	}{
		{"set loopback up", func() error { return h.LinkSetUp(lo) }},
		{"add address", func() error { return h.AddrAdd(eth, &netlink.Addr{IPNet: host(ip)}) }},
		{"set eth0 up", func() error { return h.LinkSetUp(eth) }},
		{"add neighbour", func() error { return h.NeighSet(neighbour(i, n.gateway, hardware(hostEnd, ip))) }},
		{"add gateway route", func() error {
			return h.RouteAdd(&netlink.Route{LinkIndex: i, Dst: host(n.gateway), Scope: netlink.SCOPE_LINK})
		}},
		{"add default route", func() error { return h.RouteAdd(&netlink.Route{LinkIndex: i, Gw: n.gateway.AsSlice()}) }},
	} {
		if err := step.do(); err != nil {
			return fmt.Errorf("%s in instance: %w", step.what, err)
		}
	}
	return nil
}

// remove takes an instance's device away; its routes go with it.
func (n *network) remove(id string) error { return n.removeDevice(n.device(id)) }

func (n *network) removeDevice(name string) error {
	l, err := n.nl.LinkByName(name)
	if err == nil {
		err = n.nl.LinkDel(l)
	}
	// ENODEV: the kernel took it with the instance's namespace meanwhile.
	if err == nil || errors.Is(err, unix.ENODEV) || errors.As(err, new(netlink.LinkNotFoundError)) {
		return nil
	}
	return fmt.Errorf("remove veth: %w", err)
}

// devices lists the host ends there are.
func (n *network) devices() ([]string, error) {
	all, err := n.nl.LinkList()
	if err != nil {
		return nil, fmt.Errorf("list devices: %w", err)
	}
	var out []string
	for _, l := range all {
		if strings.HasPrefix(l.Attrs().Name, n.prefix) {
			out = append(out, l.Attrs().Name)
		}
	}
	return out, nil
}

// teardown removes what setup made. IP forwarding stays: somebody else may
// have come to rely on it.
func (n *network) teardown() error {
	var errs []error
	if err := n.nl.RouteDel(n.unreachable()); err != nil && !errors.Is(err, unix.ESRCH) {
		errs = append(errs, fmt.Errorf("remove unreachable route: %w", err))
	}
	lo, err := n.nl.LinkByName("lo")
	if err == nil {
		err = n.nl.AddrDel(lo, &netlink.Addr{IPNet: host(n.gateway), Scope: unix.RT_SCOPE_LINK})
	}
	if err != nil && !errors.Is(err, unix.EADDRNOTAVAIL) {
		errs = append(errs, fmt.Errorf("remove %s from loopback: %w", n.gateway, err))
	}
	return errors.Join(append(errs, n.removeFirewall())...)
}
