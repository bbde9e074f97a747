package daemon

import (
	"cmp"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/m3o/m3o"
	"github.com/m3o/m3o/discovery"
	"github.com/m3o/m3o/runtime/oci"
)

// isolation is what the driver of containers needs: cgroups, firewall, subnet.
func (e exam) isolation(ctx context.Context, f *findings) {
	cfg := e.cfg
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
	if b, err := e.read("/proc/sys/net/ipv4/ip_forward"); err == nil && strings.TrimSpace(string(b)) != "1" {
		f.add(CheckWarn, "isolation", "m3od turns it on when it starts; if something turns it off again: sysctl -w net.ipv4.ip_forward=1", "IP forwarding is off: apps reach nothing outside")
	}
	for _, p := range e.installations() {
		if p.config.Name == cfg.Name && p.data != cfg.Data {
			f.add(CheckFail, "isolation", "give one of the two another --name and --subnet", "%s, whose data is in %s, is called %s too: each takes the other's apps, devices and firewall for its own", p.name(), p.data, cfg.Name)
		}
	}
}

// An occupant is a process that has something m3o wants, or is m3o's.
type occupant struct {
	pid    int
	comm   string
	data   string // of an m3od: its state directory
	config Config
}

func (p occupant) name() string { return fmt.Sprintf("%s (process %d)", p.comm, p.pid) }

// processAt reads what /proc tells of a process.
func (e exam) processAt(dir string) occupant {
	p := occupant{comm: "another program"}
	p.pid, _ = strconv.Atoi(filepath.Base(dir))
	if b, err := e.read(filepath.Join(dir, "comm")); err == nil {
		p.comm = strings.TrimSpace(string(b))
	}
	exe, err := os.Readlink(filepath.Join(dir, "exe"))
	if err != nil || !strings.HasPrefix(filepath.Base(exe), "m3od") {
		return p
	}
	cmdline, _ := e.read(filepath.Join(dir, "cmdline"))
	environ, _ := e.read(filepath.Join(dir, "environ"))
	args := strings.Split(strings.TrimRight(string(cmdline), "\x00"), "\x00")[1:]
	if len(args) > 0 && args[0] == "doctor" {
		return p
	}
	if len(args) > 0 && args[0] == "router" {
		args = args[1:]
	}
	cfg, err := ParseConfig(args, func(key string) string {
		for kv := range strings.SplitSeq(string(environ), "\x00") {
			if k, v, _ := strings.Cut(kv, "="); k == key {
				return v
			}
		}
		return ""
	}, nil)
	if err == nil {
		p.data, p.config = cfg.Data, cfg
	}
	return p
}

// installations are the processes of m3od that run on this host, routers too.
// One in a container with a network of its own is on another host.
func (e exam) installations() []occupant {
	ours, _ := os.Readlink("/proc/self/ns/net")
	dirs, _ := filepath.Glob("/proc/[0-9]*")
	var all []occupant
	for _, dir := range dirs {
		if theirs, err := os.Readlink(filepath.Join(dir, "ns", "net")); err != nil || theirs != ours {
			continue
		}
		if p := e.processAt(dir); p.data != "" {
			all = append(all, p)
		}
	}
	return all
}

// A wanted address is one that m3o listens on.
type wanted struct{ what, network, addr string }

func (e exam) addresses() []wanted {
	c := e.cfg
	all := []wanted{{"http", "tcp", c.HTTP}, {"https", "tcp", c.HTTPS}, {"ssh", "tcp", c.SSH}}
	if c.HTTP3 {
		all = append(all, wanted{"http3", "udp", c.HTTPS})
	}
	if c.Metrics != "" {
		all = append(all, wanted{"metrics", "tcp", c.Metrics})
	}
	if c.Runtime == "oci" {
		at := func(port uint16) string { return netip.AddrPortFrom(oci.GatewayOf(c.Name), port).String() }
		all = append(all, wanted{namesUDP, "udp", at(discovery.DNSPort)}, wanted{"names", "tcp", at(discovery.DNSPort)}, wanted{"internal", "tcp", at(oci.InternalPort)})
	}
	return all
}

// ports says who has the addresses that m3o needs, unless it is m3o.
func (e exam) ports(ctx context.Context, f *findings) {
	for _, w := range e.addresses() {
		err := tryListen(ctx, w.network, w.addr)
		if err == nil {
			f.add(CheckOK, "ports", "", "%s: %s is free", w.what, w.addr)
			continue
		}
		perr := portError(w.what, w.addr, err)
		msg, hint := perr.Error(), m3o.HintOf(perr)
		if errors.Is(err, syscall.EADDRINUSE) {
			who := e.listeners(w.network, w.addr)
			if slices.ContainsFunc(who, func(p occupant) bool { return p.data == e.cfg.Data }) {
				f.add(CheckOK, "ports", "", "%s: m3o listens on %s", w.what, w.addr)
				continue
			}
			if len(who) > 0 {
				name := who[0].name()
				if who[0].data != "" {
					name += ", an installation of m3o whose data is in " + who[0].data + ","
				}
				msg = strings.Replace(msg, "another program", name, 1)
			}
		}
		if errors.Is(err, syscall.EADDRNOTAVAIL) {
			hint = "ip addr shows the addresses of this machine; choose one of them, or :PORT for all, with --" + w.what
		}
		f.add(CheckFail, "ports", cmp.Or(hint, "ip addr and ss -ltnp show what is there; choose another address with --"+w.what), "%s", msg)
	}
}

// tryListen listens for a moment, also on an address that m3od will bring.
func tryListen(ctx context.Context, network, addr string) error {
	var lc net.ListenConfig
	if ap, err := netip.ParseAddrPort(addr); err == nil && ap.Addr().IsLinkLocalUnicast() {
		lc.Control = func(_, _ string, c syscall.RawConn) error {
			var serr error
			err := c.Control(func(fd uintptr) { serr = unix.SetsockoptInt(int(fd), unix.IPPROTO_IP, unix.IP_FREEBIND, 1) })
			return errors.Join(err, serr)
		}
	}
	if network == "udp" {
		pc, err := lc.ListenPacket(ctx, network, addr)
		if err != nil {
			return err
		}
		return pc.Close()
	}
	ln, err := lc.Listen(ctx, network, addr)
	if err != nil {
		return err
	}
	return ln.Close()
}

// listeners are the processes that are in the way of addr, as far as /proc
// tells: one that listens on every address is, too.
func (e exam) listeners(network, addr string) []occupant {
	host, port, err := net.SplitHostPort(addr)
	if err != nil {
		return nil
	}
	n, _ := strconv.Atoi(port)
	ours, every := "", true
	if a, err := netip.ParseAddr(host); err == nil && !a.IsUnspecified() && a.Is4() {
		b := a.As4()
		ours, every = strings.ToUpper(hex.EncodeToString(binary.NativeEndian.AppendUint32(nil, binary.BigEndian.Uint32(b[:])))), false
	}
	inodes := map[string]bool{}
	for _, file := range []string{"/proc/self/net/" + network, "/proc/self/net/" + network + "6"} {
		b, err := e.read(file)
		if err != nil {
			continue
		}
		for line := range strings.Lines(string(b)) {
			w := strings.Fields(line) // sl local remote st tx:rx tr:tm retr uid timeout inode
			if len(w) < 10 || w[3] != map[string]string{"tcp": "0A", "udp": "07"}[network] {
				continue
			}
			ip, p, _ := strings.Cut(w[1], ":")
			if p == fmt.Sprintf("%04X", n) && (every || strings.HasSuffix(ip, ours) || strings.Trim(ip, "0") == "") {
				inodes["socket:["+w[9]+"]"] = true
			}
		}
	}
	if len(inodes) == 0 {
		return nil
	}
	var all []occupant
	fds, _ := filepath.Glob("/proc/[0-9]*/fd/*")
	for _, fd := range fds {
		if l, err := os.Readlink(fd); err == nil && inodes[l] {
			all = append(all, e.processAt(filepath.Dir(filepath.Dir(fd))))
		}
	}
	return all
}

// names checks that the apps' host names lead here.
func (e exam) names(ctx context.Context, f *findings) {
	cfg := e.cfg
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
	for _, n := range []struct{ host, record, breaks string }{
		{"api." + cfg.Domain, "*." + cfg.Domain, "m3o login and commands over SSH do not work"},
		{"m3o-doctor-any-app." + cfg.Domain, "*." + cfg.Domain, "new apps cannot be reached"},
		{cfg.Domain, cfg.Domain, "git push does not find the server"},
	} {
		ips, err := cfg.resolver().LookupHost(ctx, n.host)
		if d, ok := errors.AsType[*net.DNSError](err); ok && !d.IsNotFound {
			servers := strings.Join(cfg.resolvers(), ", ")
			f.add(CheckFail, "dns", "dig @SERVER "+n.host+" shows what is wrong; name others with --dns-servers or in /etc/resolv.conf", "the name servers (%s) do not answer, so nothing outside is found: %v", cmp.Or(servers, "of /etc/resolv.conf"), err)
			return
		}
		loops := slices.ContainsFunc(ips, func(ip string) bool { a, err := netip.ParseAddr(ip); return err == nil && a.IsLoopback() })
		switch {
		case err != nil:
			f.add(CheckFail, "dns", fmt.Sprintf("make a record %s that leads to this machine", n.record), "%s has no address, so %s: %v", n.host, n.breaks, err)
		case loops:
			f.add(CheckFail, "dns", "point the record "+n.record+" to the public address, and take the name out of /etc/hosts", "%s leads to %s, which is each computer itself: others get nowhere", n.host, strings.Join(ips, ", "))
		case !slices.ContainsFunc(ips, func(ip string) bool { return mine[ip] }):
			f.add(CheckWarn, "dns", "right behind a load balancer or NAT; else point "+n.record+" here", "%s leads to %s, which is no address of this machine", n.host, strings.Join(ips, ", "))
		default:
			f.add(CheckOK, "dns", "", "%s leads here", n.host)
		}
	}
}

// Certificates are renewed a month before their end, those of our own CA ten
// days; one with less left than this was not.
const soon = 5 * 24 * time.Hour

// https calls the API as clients do: by the address that its name leads to.
func (e exam) https(ctx context.Context, f *findings) {
	cfg := e.cfg
	if !slices.ContainsFunc(e.installations(), func(p occupant) bool { return p.data == cfg.Data }) {
		return // nothing of ours runs
	}
	host, port, err := net.SplitHostPort(cfg.HTTPS)
	if err != nil {
		return // Validate refuses it
	}
	name := "api." + cfg.Domain
	if !cfg.Local() {
		ips, err := cfg.resolver().LookupHost(ctx, name)
		if err != nil || len(ips) == 0 {
			return // told by names
		}
		host = ips[0]
	}
	e.call(ctx, f, name, net.JoinHostPort(host, port))
}

// call makes a TLS connection for name to addr and judges what it is shown.
func (e exam) call(ctx context.Context, f *findings, name, addr string) {
	roots, err := x509.SystemCertPool()
	if err != nil {
		roots = x509.NewCertPool()
	}
	if pem, err := os.ReadFile(e.cfg.path("ca", "ca.crt")); err == nil {
		roots.AppendCertsFromPEM(pem)
	}
	ctx, cancel := context.WithTimeout(ctx, 3*time.Second)
	defer cancel()
	var leaf *x509.Certificate
	var bad error
	d := tls.Dialer{Config: &tls.Config{ServerName: name, InsecureSkipVerify: true, // judged here, so that an expired one is told as that
		VerifyConnection: func(cs tls.ConnectionState) error {
			leaf = cs.PeerCertificates[0]
			between := x509.NewCertPool()
			for _, c := range cs.PeerCertificates[1:] {
				between.AddCert(c)
			}
			_, bad = leaf.Verify(x509.VerifyOptions{DNSName: name, Roots: roots, Intermediates: between, CurrentTime: e.now()})
			return nil
		}}}
	conn, err := d.DialContext(ctx, "tcp", addr)
	if err != nil {
		hint := "open the port in the firewall before the server (cloud console, ufw allow 443/tcp); behind a NAT that does not lead back inside, try from elsewhere: curl -v https://" + name
		f.add(CheckWarn, "https", hint, "https://%s cannot be reached at %s from the server itself: %v", name, addr, err)
		return
	}
	_ = conn.Close()
	left := leaf.NotAfter.Sub(e.now())
	renew := "the log of the daemon says why it was not renewed (journalctl -u m3od); with --acme-email the CA must reach port 80 or 443"
	switch {
	case left <= 0:
		f.add(CheckFail, "https", renew, "the certificate of %s ended on %s: nobody can connect", name, leaf.NotAfter.UTC().Format(time.DateOnly))
	case bad != nil:
		f.add(CheckFail, "https", "if another server answers there, point the name here; else "+renew, "what answers at %s shows a certificate that does not hold for %s: %v", addr, name, bad)
	case left < soon:
		f.add(CheckWarn, "https", renew, "the certificate of %s ends on %s and has not been renewed", name, leaf.NotAfter.UTC().Format(time.DateOnly))
	default:
		f.add(CheckOK, "https", "", "https://%s answers, with a certificate until %s", name, leaf.NotAfter.UTC().Format(time.DateOnly))
	}
}
