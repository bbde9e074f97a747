//go:build linux

package oci

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"

	"github.com/google/nftables"
	"github.com/google/nftables/binaryutil"
	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"
)

// firewall writes our nftables table anew, in one transaction: there is no
// moment without it. In nft's words, for name m3o:
//
//	table inet m3o {
//	  set pairs { type ipv4_addr . ipv4_addr }   # who may talk to whom: links
//	  chain prerouting {
//	    type nat hook prerouting priority dstnat
//	    iifname "m3o-*" ip daddr 169.254.1.1 tcp dport 80 dnat ip to 169.254.1.1:4080
//	  }
//	  chain input {
//	    type filter hook input priority filter
//	    iifname "m3o-*" ct state established,related accept
//	    iifname "m3o-*" ip daddr 169.254.1.1 udp dport 53 accept
//	    iifname "m3o-*" ip daddr 169.254.1.1 tcp dport 53 accept
//	    iifname "m3o-*" ip daddr 169.254.1.1 tcp dport 4080 ct status dnat accept
//	    iifname "m3o-*" drop
//	    iifname != "lo" ip daddr 169.254.1.1 drop        # neighbours of the host
//	  }
//	  chain forward {
//	    type filter hook forward priority filter
//	    iifname "m3o-*" meta nfproto != ipv4 drop
//	    iifname "m3o-*" ip saddr != 198.18.0.0/16 drop
//	    iifname "m3o-*" ip daddr 169.254.0.0/16 drop     # metadata services
//	    iifname "m3o-*" ip daddr <denied> drop
//	    oifname "m3o-*" ip saddr <denied> drop
//	    iifname "m3o-*" oifname "m3o-*" ct state established,related accept
//	    iifname "m3o-*" oifname "m3o-*" ip saddr . ip daddr @pairs accept
//	    oifname "m3o-*" ct state established,related accept
//	    oifname "m3o-*" drop
//	    iifname "m3o-*" oifname != <uplink> drop         # when one is set
//	  }
//	  chain postrouting {
//	    type nat hook postrouting priority srcnat
//	    oifname != "m3o-*" ip saddr 198.18.0.0/16 masquerade
//	  }
//	}
//
// Accepting here does not overrule another table's drop; see Check.
func (n *network) firewall() error {
	c, err := nftables.New()
	if err != nil {
		return fmt.Errorf("open nftables: %w", err)
	}
	t := n.nftTable()
	c.AddTable(t) // deleting one that is not there would fail
	c.DelTable(t)
	c.AddTable(t)
	pairs := n.pairSet()
	pairs.Table = t
	if err := c.AddSet(pairs, elements(n.pairs)); err != nil {
		return fmt.Errorf("add set: %w", err)
	}
	chain := func(name string, hook *nftables.ChainHook, typ nftables.ChainType, prio *nftables.ChainPriority) func(...[]expr.Any) {
		ch := c.AddChain(&nftables.Chain{Name: name, Table: t, Type: typ, Hooknum: hook, Priority: prio})
		return func(parts ...[]expr.Any) {
			c.AddRule(&nftables.Rule{Table: t, Chain: ch, Exprs: slices.Concat(parts...)})
		}
	}
	from, to := n.ours(expr.MetaKeyIIFNAME, expr.CmpOpEq), n.ours(expr.MetaKeyOIFNAME, expr.CmpOpEq)

	pre := chain("prerouting", nftables.ChainHookPrerouting, nftables.ChainTypeNAT, nftables.ChainPriorityNATDest)
	gateway := netip.PrefixFrom(n.gateway, 32)
	pre(from, address(daddr, expr.CmpOpEq, gateway), port(unix.IPPROTO_TCP, 80), []expr.Any{
		&expr.Immediate{Register: 1, Data: n.gateway.AsSlice()},
		&expr.Immediate{Register: 2, Data: binaryutil.BigEndian.PutUint16(InternalPort)},
		&expr.NAT{Type: expr.NATTypeDestNAT, Family: unix.NFPROTO_IPV4, RegAddrMin: 1, RegProtoMin: 2},
	})

	input := chain("input", nftables.ChainHookInput, nftables.ChainTypeFilter, nftables.ChainPriorityFilter)
	input(from, established, accept)
	for _, proto := range []byte{unix.IPPROTO_UDP, unix.IPPROTO_TCP} {
		input(from, address(daddr, expr.CmpOpEq, gateway), port(proto, 53), accept)
	}
	input(from, address(daddr, expr.CmpOpEq, gateway), port(unix.IPPROTO_TCP, InternalPort), translated, accept)
	input(from, drop)
	input([]expr.Any{&expr.Meta{Key: expr.MetaKeyIIFNAME, Register: 1}, &expr.Cmp{Op: expr.CmpOpNeq, Register: 1, Data: ifname("lo")}},
		address(daddr, expr.CmpOpEq, gateway), drop)

	forward := chain("forward", nftables.ChainHookForward, nftables.ChainTypeFilter, nftables.ChainPriorityFilter)
	forward(from, protocol(expr.CmpOpNeq), drop)
	forward(from, address(saddr, expr.CmpOpNeq, n.subnet), drop)
	forward(from, address(daddr, expr.CmpOpEq, linkLocal), drop)
	for _, p := range n.deny {
		forward(from, address(daddr, expr.CmpOpEq, p), drop)
		forward(to, address(saddr, expr.CmpOpEq, p), drop)
	}
	forward(from, to, established, accept)
	forward(from, to, []expr.Any{
		&expr.Payload{DestRegister: 1, Base: expr.PayloadBaseNetworkHeader, Offset: saddr, Len: 4},
		&expr.Payload{DestRegister: 9, Base: expr.PayloadBaseNetworkHeader, Offset: daddr, Len: 4},
		&expr.Lookup{SourceRegister: 1, SetName: pairs.Name, SetID: pairs.ID},
	}, accept)
	forward(to, established, accept)
	forward(to, drop)
	outside := n.ours(expr.MetaKeyOIFNAME, expr.CmpOpNeq)
	if n.uplink != "" {
		forward(from, []expr.Any{&expr.Meta{Key: expr.MetaKeyOIFNAME, Register: 1}, &expr.Cmp{Op: expr.CmpOpNeq, Register: 1, Data: ifname(n.uplink)}}, drop)
	}

	post := chain("postrouting", nftables.ChainHookPostrouting, nftables.ChainTypeNAT, nftables.ChainPriorityNATSource)
	post(outside, address(saddr, expr.CmpOpEq, n.subnet), []expr.Any{&expr.Masq{}})
	if err := c.Flush(); err != nil {
		return fmt.Errorf("write firewall: %w", err)
	}
	return nil
}

func (n *network) nftTable() *nftables.Table {
	return &nftables.Table{Family: nftables.TableFamilyINet, Name: n.table}
}

func (n *network) removeFirewall() error {
	c, err := nftables.New()
	if err != nil {
		return fmt.Errorf("open nftables: %w", err)
	}
	c.DelTable(n.nftTable())
	if err := c.Flush(); err != nil && !errors.Is(err, unix.ENOENT) {
		return fmt.Errorf("remove firewall: %w", err)
	}
	return nil
}

// ours matches the devices of instances, by the beginning of their names.
func (n *network) ours(key expr.MetaKey, op expr.CmpOp) []expr.Any {
	return []expr.Any{&expr.Meta{Key: key, Register: 1}, &expr.Cmp{Op: op, Register: 1, Data: []byte(n.prefix)}}
}

// ifname is a whole device name as rules compare it.
func ifname(name string) []byte {
	b := make([]byte, unix.IFNAMSIZ)
	copy(b, name)
	return b
}

// InternalPort is where the gateway's port 80 leads to. Port 80 itself could
// not be listened on beside a program that listens there on every address,
// which may be the router.
const InternalPort = 4080

// Offsets in the IPv4 header.
const (
	saddr = 12
	daddr = 16
)

func protocol(op expr.CmpOp) []expr.Any {
	return []expr.Any{&expr.Meta{Key: expr.MetaKeyNFPROTO, Register: 1}, &expr.Cmp{Op: op, Register: 1, Data: []byte{unix.NFPROTO_IPV4}}}
}

// address matches IPv4 packets by one of their addresses.
func address(offset uint32, op expr.CmpOp, p netip.Prefix) []expr.Any {
	return append(protocol(expr.CmpOpEq),
		&expr.Payload{DestRegister: 1, Base: expr.PayloadBaseNetworkHeader, Offset: offset, Len: 4},
		&expr.Bitwise{SourceRegister: 1, DestRegister: 1, Len: 4, Mask: ipNet(p).Mask, Xor: make([]byte, 4)},
		&expr.Cmp{Op: op, Register: 1, Data: p.Masked().Addr().AsSlice()})
}

func port(proto byte, to uint16) []expr.Any {
	return []expr.Any{
		&expr.Meta{Key: expr.MetaKeyL4PROTO, Register: 1},
		&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: []byte{proto}},
		&expr.Payload{DestRegister: 1, Base: expr.PayloadBaseTransportHeader, Offset: 2, Len: 2},
		&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: binaryutil.BigEndian.PutUint16(to)},
	}
}

var (
	accept = []expr.Any{&expr.Verdict{Kind: expr.VerdictAccept}}
	drop   = []expr.Any{&expr.Verdict{Kind: expr.VerdictDrop}}

	established = []expr.Any{
		&expr.Ct{Key: expr.CtKeySTATE, Register: 1},
		&expr.Bitwise{SourceRegister: 1, DestRegister: 1, Len: 4, Xor: make([]byte, 4),
			Mask: binaryutil.NativeEndian.PutUint32(expr.CtStateBitESTABLISHED | expr.CtStateBitRELATED)},
		&expr.Cmp{Op: expr.CmpOpNeq, Register: 1, Data: make([]byte, 4)},
	}
	// translated matches connections that a dnat rule has changed (IPS_DST_NAT).
	translated = []expr.Any{
		&expr.Ct{Key: expr.CtKeySTATUS, Register: 1},
		&expr.Bitwise{SourceRegister: 1, DestRegister: 1, Len: 4, Xor: make([]byte, 4), Mask: binaryutil.NativeEndian.PutUint32(1 << 5)},
		&expr.Cmp{Op: expr.CmpOpNeq, Register: 1, Data: make([]byte, 4)},
	}
)
