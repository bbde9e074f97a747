//go:build linux

package oci

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"strings"
	"time"

	"github.com/miekg/dns"

	"github.com/m3o/m3o"
)

// names is the instances' name server, on the gateway address. It knows
// <app>.instances.internal, the addresses of an app's ready instances, and
// tells them to who may talk to them: the app itself and those that are linked
// to it. Everything else it asks the host's own name servers.
type names struct {
	addr      netip.AddrPort
	upstreams []string // "ip:port"
	instances func() []m3o.Instance
	appAt     func(netip.Addr) string // whose address it is, "" for nobody's
	may       func(from, to string) bool
	log       *slog.Logger
	udp       net.PacketConn
	tcp       net.Listener
	slots     chan struct{} // bounds questions being forwarded
}

const (
	zone       = "internal."
	dnsPort    = 53
	dnsTimeout = 2 * time.Second
	dnsAtOnce  = 256
	nameTTL    = 5 // seconds
)

func openNames(n *names) (*names, error) {
	var err error
	n.slots = make(chan struct{}, dnsAtOnce)
	if n.udp, err = net.ListenPacket("udp4", n.addr.String()); err != nil {
		return nil, portTaken(n.addr, err)
	}
	if n.tcp, err = net.Listen("tcp4", n.addr.String()); err != nil {
		return nil, errors.Join(portTaken(n.addr, err), n.udp.Close())
	}
	return n, nil
}

func portTaken(at netip.AddrPort, err error) error {
	return &m3o.Error{Kind: m3o.Unavailable, Msg: fmt.Sprintf("the apps' name server cannot listen on %s: %v", at, err),
		Hint: "another name server may listen on every address of this host: limit it to those it needs", Err: err}
}

func (n *names) close() error { return errors.Join(n.udp.Close(), n.tcp.Close()) }

// run serves until ctx ends.
func (n *names) run(ctx context.Context) error {
	udp := &dns.Server{PacketConn: n.udp, Handler: n}
	tcp := &dns.Server{Listener: n.tcp, Handler: n, MaxTCPQueries: 64}
	done := make(chan error, 2)
	for _, s := range []*dns.Server{udp, tcp} {
		go func() { done <- s.ActivateAndServe() }()
	}
	var errs []error
	left := 2
	select {
	case <-ctx.Done():
	case err := <-done:
		left--
		errs = append(errs, fmt.Errorf("name server ended: %w", err))
	}
	// Closing ends both, whether or not they have begun; Shutdown, only those
	// that have.
	_ = n.close()
	for range left {
		<-done
	}
	return errors.Join(errs...)
}

// ServeDNS answers one question.
func (n *names) ServeDNS(w dns.ResponseWriter, q *dns.Msg) {
	if len(q.Question) != 1 || q.Opcode != dns.OpcodeQuery {
		n.reply(w, new(dns.Msg).SetRcode(q, dns.RcodeFormatError))
		return
	}
	name := strings.ToLower(q.Question[0].Name)
	if dns.IsSubDomain(zone, name) {
		m := n.local(q, name, remote(w))
		if w.RemoteAddr().Network() == "udp" {
			size := dns.MinMsgSize
			if o := q.IsEdns0(); o != nil {
				size = max(size, int(o.UDPSize()))
			}
			m.Truncate(size)
		}
		n.reply(w, m)
		return
	}
	select {
	case n.slots <- struct{}{}:
		defer func() { <-n.slots }()
	default:
		n.reply(w, new(dns.Msg).SetRcode(q, dns.RcodeServerFailure))
		return
	}
	n.reply(w, n.forward(q, w.RemoteAddr().Network()))
}

func (n *names) reply(w dns.ResponseWriter, m *dns.Msg) {
	if err := w.WriteMsg(m); err != nil {
		n.log.Debug("cannot answer a name query", "err", err)
	}
}

func remote(w dns.ResponseWriter) netip.Addr {
	a, err := netip.ParseAddrPort(w.RemoteAddr().String())
	if err != nil {
		return netip.Addr{}
	}
	return a.Addr().Unmap()
}

func (n *names) local(q *dns.Msg, name string, who netip.Addr) *dns.Msg {
	m := new(dns.Msg).SetReply(q)
	m.Authoritative = true
	app, ok := strings.CutSuffix(name, ".instances."+zone)
	if !ok || app == "" || !n.may(n.appAt(who), app) {
		m.Rcode = dns.RcodeNameError
		return m
	}
	if t := q.Question[0].Qtype; t != dns.TypeA && t != dns.TypeANY {
		return m // the name exists, with nothing of that type
	}
	for _, in := range n.instances() {
		ip, err := netip.ParseAddrPort(in.Addr)
		if in.App == app && in.Phase == m3o.Ready && err == nil {
			m.Answer = append(m.Answer, &dns.A{A: ip.Addr().AsSlice(),
				Hdr: dns.RR_Header{Name: q.Question[0].Name, Rrtype: dns.TypeA, Class: dns.ClassINET, Ttl: nameTTL}})
		}
	}
	return m
}

func (n *names) forward(q *dns.Msg, network string) *dns.Msg {
	c := &dns.Client{Net: network, Timeout: dnsTimeout, UDPSize: 4096}
	for _, up := range n.upstreams {
		m, _, err := c.Exchange(q, up)
		if err == nil {
			return m
		}
		n.log.Debug("name server did not answer", "err", err)
	}
	return new(dns.Msg).SetRcode(q, dns.RcodeServerFailure)
}

// hostServers are the name servers of a resolv.conf file.
func hostServers(file string) []string {
	c, err := dns.ClientConfigFromFile(file)
	if err != nil {
		return nil
	}
	var out []string
	for _, s := range c.Servers {
		out = append(out, net.JoinHostPort(s, c.Port))
	}
	return out
}
