package discovery

import (
	"context"
	"log/slog"
	"net"
	"net/netip"
	"path/filepath"
	"slices"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	"github.com/miekg/dns"
)

func addr(s string) netip.Addr { return netip.MustParseAddr(s) }

var sample = Peers{
	Peers: []Peer{{"web-1", "web", addr("198.18.0.1"), true}, {"api-1", "api", addr("198.18.0.3"), true}, {"api-2", "api", addr("198.18.0.2"), true},
		{"api-3", "api", addr("198.18.0.4"), false}, {"pr", "pr-7--web", addr("198.18.0.5"), true}},
	Links: map[string][]string{"web": {"api"}},
}

func TestDirectory(t *testing.T) {
	var d Directory
	if _, ok := d.At(addr("198.18.0.1")); ok || d.May("web", "web") || d.Ready("web") != nil {
		t.Error("an empty directory knows somebody")
	}
	file := filepath.Join(t.TempDir(), "peers")
	if p, err := Load(file); err != nil || len(p.Peers) != 0 {
		t.Errorf("no file: %v, %v", p, err)
	}
	if err := sample.Save(file); err != nil {
		t.Fatal(err)
	}
	p, err := Load(file)
	if diff := cmp.Diff(sample, p, cmpopts.EquateComparable(netip.Addr{})); err != nil || diff != "" {
		t.Fatalf("read back: %v\n%s", err, diff)
	}
	d.Set(p)
	if x, ok := d.At(addr("198.18.0.2")); !ok || x.ID != "api-2" {
		t.Errorf("198.18.0.2 is %v", x)
	}
	for _, c := range []struct {
		from, to string
		want     bool
	}{{"web", "api", true}, {"api", "web", false}, {"api", "api", true}, {"", "", false}, {"pr-7--web", "api", true}, {"web", "pr-7--api", false}, {"pr-7--web", "web", false}} {
		if got := d.May(c.from, c.to); got != c.want {
			t.Errorf("%q to %q: %v", c.from, c.to, got)
		}
	}
	if got, want := d.Ready("api"), []netip.Addr{addr("198.18.0.2"), addr("198.18.0.3")}; !slices.Equal(got, want) {
		t.Errorf("ready: %v, want %v", got, want)
	}
	// Who has just begun does not make anybody less ready, but for those that are gone.
	d.Set(d.Complete(Peers{Partial: true, Peers: []Peer{{"api-1", "api", addr("198.18.0.3"), false}, {"api-9", "api", addr("198.18.0.2"), false}}}))
	if got, want := d.Ready("api"), []netip.Addr{addr("198.18.0.3")}; !slices.Equal(got, want) {
		t.Errorf("ready after a restart: %v, want %v", got, want)
	}
	if err := (Peers{Peers: []Peer{{ID: "x", App: "a"}}}).Validate(); err == nil {
		t.Error("a peer without an address passed")
	}
}

// recorder is a dns.ResponseWriter that keeps the answer.
type recorder struct {
	dns.ResponseWriter
	from netip.Addr
	got  *dns.Msg
}

func (r *recorder) WriteMsg(m *dns.Msg) error { r.got = m; return nil }
func (r *recorder) RemoteAddr() net.Addr {
	return net.UDPAddrFromAddrPort(netip.AddrPortFrom(r.from, 1234))
}

func testNames() *Names {
	d := new(Directory)
	d.Set(sample)
	return &Names{Gateway: addr("169.254.1.1"), Peers: d, Log: slog.New(slog.DiscardHandler), slots: make(chan struct{}, 1)}
}

func TestNamesAreToldToWhoMayKnow(t *testing.T) {
	n := testNames()
	for _, c := range []struct {
		from, name string
		typ        uint16
		rcode      int
		want       []string
	}{
		{"198.18.0.1", "api.internal.", dns.TypeA, dns.RcodeSuccess, []string{"169.254.1.1"}},
		{"198.18.0.1", "API.Internal.", dns.TypeA, dns.RcodeSuccess, []string{"169.254.1.1"}},
		{"198.18.0.1", "api.internal.", dns.TypeAAAA, dns.RcodeSuccess, nil},
		{"198.18.0.3", "web.internal.", dns.TypeA, dns.RcodeSuccess, []string{"169.254.1.1"}}, // the router says that it may not
		{"198.18.0.1", "api.instances.internal.", dns.TypeA, dns.RcodeSuccess, []string{"198.18.0.2", "198.18.0.3"}},
		{"198.18.0.3", "web.instances.internal.", dns.TypeA, dns.RcodeNameError, nil},
		{"198.18.0.5", "api.instances.internal.", dns.TypeA, dns.RcodeSuccess, []string{"198.18.0.2", "198.18.0.3"}}, // a preview
		{"198.18.0.5", "web.instances.internal.", dns.TypeA, dns.RcodeNameError, nil},
		{"198.18.0.1", "web.instances.internal.", dns.TypeA, dns.RcodeSuccess, []string{"198.18.0.1"}},
		{"198.18.0.1", "internal.", dns.TypeA, dns.RcodeNameError, nil},
		{"198.18.0.1", "instances.internal.", dns.TypeA, dns.RcodeNameError, nil},
		{"198.18.0.1", ".instances.internal.", dns.TypeA, dns.RcodeNameError, nil},
		{"198.18.0.1", "x.api.internal.", dns.TypeA, dns.RcodeNameError, nil},
		{"198.18.9.9", "api.internal.", dns.TypeA, dns.RcodeNameError, nil},
		{"198.18.0.1", "example.org.", dns.TypeA, dns.RcodeServerFailure, nil}, // nobody to ask
	} {
		r := recorder{from: addr(c.from)}
		q := new(dns.Msg)
		q.Id, q.Question = 7, []dns.Question{{Name: c.name, Qtype: c.typ, Qclass: dns.ClassINET}}
		n.ServeDNS(&r, q)
		var got []string
		for _, rr := range r.got.Answer {
			got = append(got, rr.(*dns.A).A.String())
		}
		if r.got.Rcode != c.rcode || !slices.Equal(got, c.want) {
			t.Errorf("%s asks for %s %s: %s %v, want %s %v", c.from, c.name, dns.TypeToString[c.typ], dns.RcodeToString[r.got.Rcode], got, dns.RcodeToString[c.rcode], c.want)
		}
	}
}

func TestNamesAnswerOnBothSockets(t *testing.T) {
	n := testNames()
	var err error
	if n.UDP, err = net.ListenPacket("udp4", "127.0.0.1:0"); err != nil {
		t.Fatal(err)
	}
	if n.TCP, err = net.Listen("tcp4", "127.0.0.1:0"); err != nil {
		t.Fatal(err)
	}
	n.Peers.Set(Peers{Peers: []Peer{{"x", "web", addr("127.0.0.1"), true}}})
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- n.Run(ctx) }()
	for network, at := range map[string]string{"udp": n.UDP.LocalAddr().String(), "tcp": n.TCP.Addr().String()} {
		m, _, err := (&dns.Client{Net: network}).Exchange(new(dns.Msg).SetQuestion("web.internal.", dns.TypeA), at)
		if err != nil || len(m.Answer) != 1 {
			t.Errorf("%s: %v, %v", network, m, err)
		}
	}
	cancel()
	if err := <-done; err != nil {
		t.Errorf("Run = %v", err)
	}
}

// FuzzNames: every question that parses gets an answer to it.
func FuzzNames(f *testing.F) {
	for _, name := range []string{"hello.instances.internal.", "hello.internal.", "internal.", ".", "a.b."} {
		b, err := new(dns.Msg).SetQuestion(name, dns.TypeA).Pack()
		if err != nil {
			f.Fatal(err)
		}
		f.Add(b)
	}
	f.Add(make([]byte, 12))
	n := testNames()
	f.Fuzz(func(t *testing.T, b []byte) {
		q := new(dns.Msg)
		if q.Unpack(b) != nil {
			return
		}
		r := recorder{from: addr("198.18.0.1")}
		n.ServeDNS(&r, q)
		if r.got == nil || r.got.Id != q.Id {
			t.Fatalf("the answer to %v is %v", q, r.got)
		}
	})
}
