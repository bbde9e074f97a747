package build

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"strings"

	"github.com/google/nftables"
	"github.com/google/nftables/binaryutil"
	"github.com/google/nftables/expr"
	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

// A network is where BuildKit and its steps live: a network namespace of
// their own, joined to the host by one veth pair. From there the world is
// reached by masquerade; the host's own addresses, the apps and link-local
// addresses are not, but for the host's DNS servers. Nothing reaches in.
//
// The namespace has no name: it is the buildkitd process's and ends with its
// last process, and the veth with it. What can outlive a killed daemon is the
// nftables table, which the next one replaces.
//
// net.ipv4.ip_forward is switched on if it is off, and stays on: apps need it
// too and outlive the daemon. IPv6 is not routed.
type network struct {
	link    string       // host end of the pair
	table   string       // nftables table
	subnet  netip.Prefix // of the pair; host is the first address, builds the second
	blocked []netip.Prefix
	dns     resolvers
}

var linkLocal = netip.MustParsePrefix("169.254.0.0/16")

func (n *network) host() netip.Addr  { return n.subnet.Masked().Addr().Next() }
func (n *network) build() netip.Addr { return n.host().Next() }

// resolvers says which DNS servers builds use.
type resolvers struct {
	servers []netip.Addr // for the builds' resolv.conf
	relayTo netip.Addr   // the host's loopback resolver, when servers is the relay on host()
}

// findResolvers reads the host's resolv.conf. A loopback resolver cannot be
// reached from another namespace: systemd-resolved's list of upstream servers
// is used then, and for any other one the daemon relays DNS messages.
func findResolvers(files ...string) resolvers {
	var r resolvers
	for _, f := range files {
		b, err := os.ReadFile(f)
		if err != nil {
			continue
		}
		for _, a := range nameservers(b) {
			switch {
			case a.IsLoopback() && !r.relayTo.IsValid():
				r.relayTo = a
			case !a.IsLoopback() && a.Is4():
				r.servers = append(r.servers, a)
			}
		}
		if len(r.servers) > 0 {
			r.relayTo = netip.Addr{}
			return r
		}
	}
	return r
}

func nameservers(b []byte) []netip.Addr {
	var out []netip.Addr
	for line := range strings.Lines(string(b)) {
		f := strings.Fields(line)
		if len(f) < 2 || f[0] != "nameserver" {
			continue
		}
		if a, err := netip.ParseAddr(f[1]); err == nil {
			out = append(out, a.Unmap().WithZone(""))
		}
	}
	return out
}

// check reports whether this machine can hold such a network.
func (n *network) check() error {
	if os.Geteuid() != 0 {
		return errors.New("not root")
	}
	c, err := nftables.New()
	if err != nil {
		return fmt.Errorf("open nftables: %w", err)
	}
	if _, err := c.ListTables(); err != nil {
		return fmt.Errorf("read nftables: %w", err)
	}
	return nil
}

// up makes the firewall and forwarding; the pair comes with each buildkitd.
func (n *network) up() error {
	if err := n.down(); err != nil {
		return err
	}
	const forward = "/proc/sys/net/ipv4/ip_forward"
	b, err := os.ReadFile(forward)
	if err != nil {
		return fmt.Errorf("read ip_forward: %w", err)
	}
	if strings.TrimSpace(string(b)) != "1" {
		if err := os.WriteFile(forward, []byte("1"), 0); err != nil {
			return fmt.Errorf("set ip_forward: %w", err)
		}
	}
	c, err := nftables.New()
	if err != nil {
		return fmt.Errorf("open nftables: %w", err)
	}
	n.rules(c)
	if err := c.Flush(); err != nil {
		return fmt.Errorf("write nftables table %s: %w", n.table, err)
	}
	return nil
}

// down removes the table and a pair left behind. What is not there is no error.
func (n *network) down() error {
	c, err := nftables.New()
	if err != nil {
		return fmt.Errorf("open nftables: %w", err)
	}
	ts, err := c.ListTablesOfFamily(nftables.TableFamilyINet)
	if err != nil {
		return fmt.Errorf("read nftables: %w", err)
	}
	for _, t := range ts {
		if t.Name == n.table {
			c.DelTable(t)
			if err := c.Flush(); err != nil && !errors.Is(err, unix.ENOENT) {
				return fmt.Errorf("remove nftables table %s: %w", n.table, err)
			}
		}
	}
	if l, err := netlink.LinkByName(n.link); err == nil {
		if err := netlink.LinkDel(l); err != nil && !errors.Is(err, unix.ENODEV) {
			return fmt.Errorf("remove %s: %w", n.link, err)
		}
	}
	return nil
}

// join gives a process in a fresh network namespace its end of the pair.
func (n *network) join(pid int) error {
	if l, err := netlink.LinkByName(n.link); err == nil {
		_ = netlink.LinkDel(l) // of a buildkitd that died: its namespace may linger for a moment
	}
	ns, err := netns.GetFromPid(pid)
	if err != nil {
		return fmt.Errorf("open network namespace: %w", err)
	}
	defer ns.Close() //nolint:errcheck // a descriptor
	mtu := uplinkMTU()
	pair := &netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: n.link, MTU: mtu}, PeerName: "eth0", PeerMTU: uint32(mtu), PeerNamespace: netlink.NsFd(ns)}
	if err := netlink.LinkAdd(pair); err != nil {
		return fmt.Errorf("make %s: %w", n.link, err)
	}
	host, err := netlink.LinkByName(n.link)
	if err != nil {
		return fmt.Errorf("find %s: %w", n.link, err)
	}
	if err := address(netlink.AddrAdd, host, netip.PrefixFrom(n.host(), n.subnet.Bits())); err != nil {
		return fmt.Errorf("configure %s: %w", n.link, err)
	}
	if err := netlink.LinkSetUp(host); err != nil {
		return fmt.Errorf("configure %s: %w", n.link, err)
	}
	h, err := netlink.NewHandleAt(ns)
	if err != nil {
		return fmt.Errorf("enter network namespace: %w", err)
	}
	defer h.Close()
	lo, err := h.LinkByName("lo")
	if err != nil {
		return fmt.Errorf("find lo: %w", err)
	}
	inner, err := h.LinkByName("eth0")
	if err != nil {
		return fmt.Errorf("find eth0: %w", err)
	}
	if err := address(h.AddrAdd, inner, netip.PrefixFrom(n.build(), n.subnet.Bits())); err != nil {
		return fmt.Errorf("configure eth0: %w", err)
	}
	for _, l := range []netlink.Link{lo, inner} {
		if err := h.LinkSetUp(l); err != nil {
			return fmt.Errorf("configure %s: %w", l.Attrs().Name, err)
		}
	}
	if err := h.RouteAdd(&netlink.Route{LinkIndex: inner.Attrs().Index, Gw: n.host().AsSlice()}); err != nil {
		return fmt.Errorf("add default route: %w", err)
	}
	return nil
}

func address(add func(netlink.Link, *netlink.Addr) error, l netlink.Link, p netip.Prefix) error {
	return add(l, &netlink.Addr{IPNet: &net.IPNet{IP: p.Addr().AsSlice(), Mask: net.CIDRMask(p.Bits(), 32)}})
}

// uplinkMTU is the MTU of the link with the default route: a larger one
// inside would lose packets wherever path MTU discovery is filtered.
func uplinkMTU() int {
	const ethernet = 1500
	rs, err := netlink.RouteList(nil, netlink.FAMILY_V4)
	if err != nil {
		return ethernet
	}
	for _, r := range rs {
		if r.Dst != nil && r.Dst.IP != nil && !r.Dst.IP.IsUnspecified() || r.LinkIndex == 0 {
			continue
		}
		if l, err := netlink.LinkByIndex(r.LinkIndex); err == nil && l.Attrs().MTU > 0 {
			return l.Attrs().MTU
		}
	}
	return ethernet
}

// rules writes the table. Chains accept by default and drop what builds must
// not do, so that they change nothing for anyone else's packets.
func (n *network) rules(c *nftables.Conn) {
	t := c.AddTable(&nftables.Table{Family: nftables.TableFamilyINet, Name: n.table})
	chain := func(name string, typ nftables.ChainType, hook *nftables.ChainHook, prio *nftables.ChainPriority) func(...[]expr.Any) {
		ch := c.AddChain(&nftables.Chain{Name: name, Table: t, Type: typ, Hooknum: hook, Priority: prio})
		return func(parts ...[]expr.Any) {
			var all []expr.Any
			for _, p := range parts {
				all = append(all, p...)
			}
			c.AddRule(&nftables.Rule{Table: t, Chain: ch, Exprs: all})
		}
	}
	in, out := link(expr.MetaKeyIIFNAME, n.link), link(expr.MetaKeyOIFNAME, n.link)
	accept := []expr.Any{&expr.Verdict{Kind: expr.VerdictAccept}}
	drop := []expr.Any{&expr.Verdict{Kind: expr.VerdictDrop}}

	input := chain("input", nftables.ChainTypeFilter, nftables.ChainHookInput, nftables.ChainPriorityFilter)
	forward := chain("forward", nftables.ChainTypeFilter, nftables.ChainHookForward, nftables.ChainPriorityFilter)
	for _, s := range n.servers() {
		for _, proto := range []byte{unix.IPPROTO_UDP, unix.IPPROTO_TCP} {
			// A DNS server may be an address of the host, or a link-local one in a cloud.
			input(in, destination(netip.PrefixFrom(s, 32)), port(proto, 53), accept)
			forward(in, destination(netip.PrefixFrom(s, 32)), port(proto, 53), accept)
		}
	}
	input(in, drop)
	forward(in, family(unix.NFPROTO_IPV6), drop)
	for _, p := range append([]netip.Prefix{linkLocal}, n.blocked...) {
		forward(in, destination(p), drop)
	}
	forward(out, answers(), accept)
	forward(out, drop)

	post := chain("postrouting", nftables.ChainTypeNAT, nftables.ChainHookPostrouting, nftables.ChainPriorityNATSource)
	post(family(unix.NFPROTO_IPV4), from(n.subnet), []expr.Any{&expr.Masq{}})
}

func (n *network) servers() []netip.Addr {
	if n.dns.relayTo.IsValid() {
		return []netip.Addr{n.host()}
	}
	return n.dns.servers
}

func link(key expr.MetaKey, name string) []expr.Any {
	return []expr.Any{
		&expr.Meta{Key: key, Register: 1},
		&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: append([]byte(name), 0)},
	}
}

func family(f byte) []expr.Any {
	return []expr.Any{
		&expr.Meta{Key: expr.MetaKeyNFPROTO, Register: 1},
		&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: []byte{f}},
	}
}

// The offsets of the addresses in an IPv4 header.
func from(p netip.Prefix) []expr.Any        { return addr(12, p) }
func destination(p netip.Prefix) []expr.Any { return append(family(unix.NFPROTO_IPV4), addr(16, p)...) }

func addr(offset uint32, p netip.Prefix) []expr.Any {
	return []expr.Any{
		&expr.Payload{DestRegister: 1, Base: expr.PayloadBaseNetworkHeader, Offset: offset, Len: 4},
		&expr.Bitwise{SourceRegister: 1, DestRegister: 1, Len: 4, Mask: net.CIDRMask(p.Bits(), 32), Xor: make([]byte, 4)},
		&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: p.Masked().Addr().AsSlice()},
	}
}

func port(proto byte, n uint16) []expr.Any {
	return []expr.Any{
		&expr.Meta{Key: expr.MetaKeyL4PROTO, Register: 1},
		&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: []byte{proto}},
		&expr.Payload{DestRegister: 1, Base: expr.PayloadBaseTransportHeader, Offset: 2, Len: 2},
		&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: binaryutil.BigEndian.PutUint16(n)},
	}
}

func answers() []expr.Any {
	return []expr.Any{
		&expr.Ct{Register: 1, Key: expr.CtKeySTATE},
		&expr.Bitwise{SourceRegister: 1, DestRegister: 1, Len: 4,
			Mask: binaryutil.NativeEndian.PutUint32(expr.CtStateBitESTABLISHED | expr.CtStateBitRELATED), Xor: make([]byte, 4)},
		&expr.Cmp{Op: expr.CmpOpNeq, Register: 1, Data: make([]byte, 4)},
	}
}
