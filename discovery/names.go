package discovery

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
)

// Names is the instances' name server. It knows <app>.internal, where apps
// call each other, and <app>.instances.internal, the addresses of an app's
// ready instances, which it tells to who may reach them. Everything else it
// asks the host's own name servers. Who is nobody's instance is told nothing
// of ours.
type Names struct {
	UDP       net.PacketConn // Run closes both
	TCP       net.Listener
	Gateway   netip.Addr // what <app>.internal leads to
	Upstreams []string   // "ip:port"
	Peers     *Directory
	Log       *slog.Logger

	slots chan struct{} // bounds questions being forwarded
}

// DNSPort is where name servers listen.
const DNSPort = 53

const (
	zone       = Zone + "."
	dnsTimeout = 2 * time.Second
	dnsAtOnce  = 256
	nameTTL    = 5 // seconds
)

// Run serves until ctx ends.
func (n *Names) Run(ctx context.Context) error {
	n.slots = make(chan struct{}, dnsAtOnce)
	udp := &dns.Server{PacketConn: n.UDP, Handler: n}
	tcp := &dns.Server{Listener: n.TCP, Handler: n, MaxTCPQueries: 64}
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
	// What is being asked is answered first: who asked would wait for seconds
	// before they ask again. It fails for one that has not begun; closing ends
	// that, too.
	wait, cancel := context.WithTimeout(context.WithoutCancel(ctx), 2*dnsTimeout)
	defer cancel()
	_ = udp.ShutdownContext(wait)
	_ = tcp.ShutdownContext(wait)
	_ = n.UDP.Close()
	_ = n.TCP.Close()
	for range left {
		<-done
	}
	return errors.Join(errs...)
}

// ServeDNS answers one question.
func (n *Names) ServeDNS(w dns.ResponseWriter, q *dns.Msg) {
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

func (n *Names) reply(w dns.ResponseWriter, m *dns.Msg) {
	if err := w.WriteMsg(m); err != nil {
		n.Log.Debug("cannot answer a name query", "err", err)
	}
}

func remote(w dns.ResponseWriter) netip.Addr {
	a, err := netip.ParseAddrPort(w.RemoteAddr().String())
	if err != nil {
		return netip.Addr{}
	}
	return a.Addr().Unmap()
}

// local answers for our zone. <app>.internal leads to the gateway whatever app
// that is: who calls one that is not there, or that is closed to them, learns
// so from an answer that says what to do about it.
func (n *Names) local(q *dns.Msg, name string, who netip.Addr) *dns.Msg {
	m := new(dns.Msg).SetReply(q)
	m.Authoritative = true
	asker, known := n.Peers.At(who)
	label := strings.TrimSuffix(name, "."+zone)
	app, direct := strings.CutSuffix(label, ".instances")
	var addrs []netip.Addr
	switch {
	case !known || label == name || app == "":
		m.Rcode = dns.RcodeNameError
	case direct && n.Peers.May(asker.App, app):
		addrs = n.Peers.Ready(app)
	case !direct && !strings.Contains(label, ".") && label != "instances":
		addrs = []netip.Addr{n.Gateway}
	default:
		m.Rcode = dns.RcodeNameError
	}
	if t := q.Question[0].Qtype; t != dns.TypeA && t != dns.TypeANY {
		return m // the name exists, with nothing of that type
	}
	for _, a := range addrs {
		m.Answer = append(m.Answer, &dns.A{A: a.AsSlice(),
			Hdr: dns.RR_Header{Name: q.Question[0].Name, Rrtype: dns.TypeA, Class: dns.ClassINET, Ttl: nameTTL}})
	}
	return m
}

func (n *Names) forward(q *dns.Msg, network string) *dns.Msg {
	c := &dns.Client{Net: network, Timeout: dnsTimeout, UDPSize: 4096}
	for _, up := range n.Upstreams {
		m, _, err := c.Exchange(q, up)
		if err == nil {
			return m
		}
		n.Log.Debug("name server did not answer", "err", err)
	}
	return new(dns.Msg).SetRcode(q, dns.RcodeServerFailure)
}

// HostServers are the name servers of a resolv.conf file, "ip:port".
func HostServers(file string) []string {
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
