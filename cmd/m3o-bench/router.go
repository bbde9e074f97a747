//go:build linux

package main

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"
)

// A kind is one kind of requests that the proxies are compared by.
type kind struct {
	what   string
	budget float64 // times nginx; 0 for none
	load   load
}

// order is an order of about 1 KB, as a client of the shop sends it.
var order = func() string {
	var b strings.Builder
	b.WriteString(`{"id":"ord-2026-000123","customer":"9007199254","state":"STATE_PAID","shipTo":{"name":"Ada Lovelace","street":"12 St James's Square","city":"London","zip":"SW1Y 4JH","country":"GB"},"items":[`)
	for i := range 6 {
		if i > 0 {
			b.WriteByte(',')
		}
		fmt.Fprintf(&b, `{"sku":"SKU-%05d","title":"A thing of some length, number %d","quantity":%d,"cents":"%d","options":[1,2,300]}`, 4711+i, i, 1+i, 1999*(i+1))
	}
	b.WriteString(`],"labels":{"channel":"web","campaign":"spring"},"total":419.79,"gift":true,"token":"c2VjcmV0LXRva2Vu"}`)
	return b.String()
}()

// proxies measures the router beside other proxies, in turns, in front of the
// same apps.
func (b *bench) proxies(ctx context.Context, sec *section) (err error) {
	for _, tool := range []string{"nginx", "wrk", "h2load"} {
		if _, err := exec.LookPath(tool); err != nil {
			return fmt.Errorf("%w: apt-get install nginx wrk nghttp2-client", err)
		}
	}
	dir := filepath.Join(b.dir, "proxies")
	if err := errors.Join(os.MkdirAll(dir, 0o755), os.Chmod(b.dir, 0o755)); err != nil { //nolint:gosec // nginx's worker reads there
		return err
	}
	if err := selfSigned(dir); err != nil {
		return err
	}
	addrs, err := freeAddrs(ctx, 4)
	if err != nil {
		return err
	}
	up := backends{http: addrs[0], https: addrs[1], rpc: addrs[2], closer: addrs[3]}
	var all []*proxied
	defer func() {
		for _, p := range all {
			p.stop()
		}
	}()
	start := func(p *proxied, serr error) *proxied {
		if p != nil && serr == nil {
			all = append(all, p)
		}
		err = errors.Join(err, serr)
		return p
	}
	direct := start(b.spawn(ctx, "direct", "upstream", "M3O_BENCH_DIR="+dir, "M3O_BENCH_HTTP="+up.http, "M3O_BENCH_HTTPS="+up.https, "M3O_BENCH_GRPC="+up.rpc))
	start(b.spawn(ctx, "closer", "closer", "M3O_BENCH_HTTP="+up.closer))
	if err != nil {
		return err
	}
	direct.http, direct.https, direct.rpc = up.http, "localhost:"+port(up.https), up.rpc
	if err := errors.Join(direct.await(ctx), awaitPort(ctx, up.closer)); err != nil {
		return err
	}
	server, gate, shopErr := b.shop(ctx, dir, &up)
	if shopErr != nil {
		b.say("JSON → gRPC is left out: %v", shopErr)
		sec.note("JSON → gRPC was not measured: tools/grpcgateway could not be built here.")
	} else {
		all = append(all, server, gate)
	}
	few := start(b.router(ctx, dir, "router", up, 10))
	ng := start(b.nginx(ctx, dir, up))
	cd := start(b.caddy(ctx, dir, up))
	if err != nil {
		return err
	}
	ps := []*proxied{direct, few, ng}
	if cd != nil {
		ps = append(ps, cd)
	} else {
		sec.note("Caddy is not installed here and its column is missing; `apt-get install caddy`.")
	}
	sec.note("CPU is that of the proxy's processes for each request, and the ratio what counts: requests a second depend on what else the machine does. " +
		"The app behind all is the same Go program; \"direct\" is that app without a proxy, with TLS of its own. nginx is the distribution's with one worker, keep-alive to the app and no access log; " +
		"Caddy is the distribution's, with as many idle connections. Loads are wrk, h2load and for gRPC streams grpc-go; each lasts a second, and the run with the median CPU of three is told.")
	if err := b.requests(ctx, sec, dir, ps, few, ng); err != nil {
		return err
	}
	if shopErr == nil {
		if err := b.transcoding(ctx, sec, few, gate); err != nil {
			return err
		}
	}
	for _, m := range []struct {
		what    string
		measure func() error
	}{
		{"100,000 hosts", func() error { return b.hosts(ctx, dir, few, up, sec) }},
		{"memory of idle connections", func() error { return b.idleConnections(ps[1:], sec) }},
		{"connections that the app closes", func() error { return b.idleClose(ctx, ps[1:], sec) }},
	} {
		if !b.match.MatchString(m.what) {
			continue
		}
		b.say("router: %s", m.what)
		if err := m.measure(); err != nil {
			return err
		}
	}
	return nil
}

// requests compares proxies by kind of request.
func (b *bench) requests(ctx context.Context, sec *section, dir string, ps []*proxied, ours, ref *proxied) error {
	empty := filepath.Join(dir, "empty") // a gRPC message without fields
	if err := os.WriteFile(empty, make([]byte, 5), 0o600); err != nil {
		return err
	}
	var kinds []kind
	for _, proto := range []struct {
		name   string
		budget float64
		load   func(path string, conns int) load
	}{
		{"HTTP/1.1", 2.2, func(path string, n int) load {
			return func(ctx context.Context, p *proxied, d time.Duration) (loaded, error) {
				return wrk(ctx, "http://"+p.http+path, d, n)
			}
		}},
		{"HTTP/1.1 with TLS", 2, func(path string, n int) load {
			return func(ctx context.Context, p *proxied, d time.Duration) (loaded, error) {
				return wrk(ctx, "https://"+p.https+path, d, n)
			}
		}},
		{"HTTP/2 with TLS", 0, func(path string, n int) load {
			return func(ctx context.Context, p *proxied, d time.Duration) (loaded, error) {
				return h2load(ctx, "https://"+p.https+path, d, n, 1)
			}
		}},
	} {
		kinds = append(kinds,
			kind{proto.name + ", 200 B, 64 connections", proto.budget, proto.load("/", 64)},
			kind{proto.name + ", 200 B, 1 connection", 0, proto.load("/", 1)},
			kind{proto.name + ", 1 MB, 64 connections", 0, proto.load("/big", 64)},
			kind{proto.name + ", 1 MB, 1 connection", 0, proto.load("/big", 1)})
	}
	unary := func(conns, streams int) load {
		return func(ctx context.Context, p *proxied, d time.Duration) (loaded, error) {
			return h2load(ctx, "http://"+p.rpc+"/grpc.testing.TestService/EmptyCall", d, conns, streams, "--data="+empty,
				"-H", ":authority: rpc.localhost", "-H", "content-type: application/grpc", "-H", "te: trailers")
		}
	}
	kinds = append(kinds,
		kind{"gRPC unary, 8 × 16 streams", 2, unary(8, 16)},
		kind{"gRPC unary, 64 × 1 stream", 0, unary(64, 1)},
		kind{"gRPC unary, 1 × 1 stream", 0, unary(1, 1)},
		kind{"gRPC, 64 streams there and back, 100 B", 0, pingPong},
		kind{"gRPC, 16 streams back, 1 KB", 0, downStream})
	t := table{title: "Requests", head: []string{"what", "proxy", "requests/s", "p50", "p99", "CPU/request", "× nginx"}}
	for _, k := range kinds {
		if !b.match.MatchString(k.what) {
			continue
		}
		b.say("router: %s", k.what)
		ls, err := b.turns(ctx, ps, k.load)
		if err != nil {
			return fmt.Errorf("%s: %w", k.what, err)
		}
		var mine, refs loaded
		for i, p := range ps {
			switch p {
			case ours:
				mine = ls[i]
			case ref:
				refs = ls[i]
			}
		}
		for i, p := range ps {
			l := ls[i]
			cpu, times := micros(l.cpu), fmt.Sprintf("%.2f×", l.cpu.Seconds()/refs.cpu.Seconds())
			if i == 0 {
				cpu, times = "–", "–" // the app itself
			}
			t.add(k.what, p.name, fmt.Sprintf("%.0f", l.rate), micros(l.p50), micros(l.p99), cpu, times)
		}
		if k.budget == 0 {
			continue
		}
		if err := b.against(ctx, sec, "router: "+k.what, fmt.Sprintf("%.1f×", k.budget), k.budget, k.load, ours, mine, ref.name, refs); err != nil {
			return err
		}
	}
	sec.tables = append(sec.tables, t)
	return nil
}

// against tells a budget that is a ratio of CPU, and where the time goes.
func (b *bench) against(ctx context.Context, sec *section, what, budget string, most float64, l load, p *proxied, mine loaded, name string, ref loaded) error {
	ratio := mine.cpu.Seconds() / ref.cpu.Seconds()
	sec.add(row{What: what + ", CPU a request", Budget: budget, Measured: micros(mine.cpu), Reference: name + " " + micros(ref.cpu),
		Ratio: fmt.Sprintf("%.2f×", ratio), Met: verdict(ratio <= most)})
	parts, err := b.profileOf(ctx, p, l)
	if err != nil {
		return fmt.Errorf("profile of %s: %w", what, err)
	}
	sec.tables = append(sec.tables, table{title: "Where the time goes: " + strings.TrimPrefix(what, "router: "), head: []string{"part", "of the router's CPU"}, cells: parts})
	return nil
}

// transcoding compares the gateway with a compiled grpc-gateway.
func (b *bench) transcoding(ctx context.Context, sec *section, ours, gate *proxied) error {
	t := table{title: "JSON → gRPC over HTTP/1.1, 64 connections", head: []string{"message", "gateway", "requests/s", "p50", "p99", "CPU/request", "× grpc-gateway"}}
	for _, m := range []struct {
		what, method, body string
		budget             float64
	}{{"small", "Hello", `{"name":"Ada"}`, 0.6}, {"1 KB", "Place", order, 0.35}} {
		if !b.match.MatchString("JSON → gRPC, " + m.what) {
			continue
		}
		b.say("router: JSON → gRPC, %s", m.what)
		script := filepath.Join(b.dir, "proxies", m.method+".lua")
		lua := fmt.Sprintf("wrk.method = \"POST\"\nwrk.body = [[%s]]\nwrk.headers[\"Content-Type\"] = \"application/json\"\nwrk.headers[\"Host\"] = \"shop.localhost\"\n", m.body)
		if err := os.WriteFile(script, []byte(lua), 0o600); err != nil {
			return err
		}
		l := func(ctx context.Context, p *proxied, d time.Duration) (loaded, error) {
			return wrk(ctx, "http://"+p.http+"/bench.v1.Shop/"+m.method, d, 64, "-s", script)
		}
		ps := []*proxied{ours, gate}
		ls, err := b.turns(ctx, ps, l)
		if err != nil {
			return fmt.Errorf("JSON → gRPC: %w", err)
		}
		for i, p := range ps {
			t.add(m.what, p.name, fmt.Sprintf("%.0f", ls[i].rate), micros(ls[i].p50), micros(ls[i].p99), micros(ls[i].cpu), fmt.Sprintf("%.2f×", ls[i].cpu.Seconds()/ls[1].cpu.Seconds()))
		}
		if err := b.against(ctx, sec, "router: JSON → gRPC, "+m.what+" message", fmt.Sprintf("%.2f×", m.budget), m.budget, l, ours, ls[0], gate.name, ls[1]); err != nil {
			return err
		}
	}
	sec.tables = append(sec.tables, t)
	return nil
}

// hosts compares a table of 100,000 hosts with one of ten.
func (b *bench) hosts(ctx context.Context, dir string, few *proxied, up backends, sec *section) error {
	many, err := b.router(ctx, dir, "many", up, 100_000)
	if err != nil {
		return err
	}
	defer many.stop()
	ls, err := b.turns(ctx, []*proxied{many, few}, func(ctx context.Context, p *proxied, d time.Duration) (loaded, error) {
		return wrk(ctx, "http://"+p.http+"/", d, 64)
	})
	if err != nil {
		return err
	}
	m, f := ls[0], ls[1]
	ratio := m.cpu.Seconds() / f.cpu.Seconds()
	sec.add(row{What: "router: 100,000 hosts against 10, CPU a request", Budget: "1.1×", Measured: micros(m.cpu), Reference: "10 hosts " + micros(f.cpu),
		Ratio: fmt.Sprintf("%.2f×", ratio), Met: verdict(ratio <= 1.1)})
	return nil
}

// idleConnections tells what clients that do nothing cost.
func (b *bench) idleConnections(ps []*proxied, sec *section) error {
	const n = 1000
	t := table{title: "Memory of an idle connection that has made one request", head: []string{"proxy", "plain", "with TLS"}}
	var ours, ref [2]float64
	for _, p := range ps {
		var each [2]float64
		for i, secure := range []bool{false, true} {
			grown, err := grows(p, n, secure)
			if err != nil {
				return fmt.Errorf("idle connections to %s: %w", p.name, err)
			}
			each[i] = float64(grown) / n / 1024
		}
		t.add(p.name, fmt.Sprintf("%.1f kB", each[0]), fmt.Sprintf("%.1f kB", each[1]))
		switch p.name {
		case "router":
			ours = each
		case "nginx":
			ref = each
		}
	}
	sec.tables = append(sec.tables, t)
	sec.add(row{What: "router: memory of an idle TLS connection", Measured: fmt.Sprintf("%.1f kB", ours[1]), Reference: fmt.Sprintf("nginx %.1f kB", ref[1]), Ratio: fmt.Sprintf("%.2f×", ours[1]/ref[1])})
	return nil
}

// grows is by how much a proxy's memory grows with n connections.
func grows(p *proxied, n int, secure bool) (int64, error) {
	rss := func() (int64, error) {
		ps, err := processes()
		if err != nil {
			return 0, err
		}
		var mine []process
		for _, x := range ps {
			if x.pid == p.cmd.Process.Pid || x.parent == p.cmd.Process.Pid {
				mine = append(mine, x)
			}
		}
		m, err := memoryOf(mine...)
		return m.rss, err
	}
	before, err := rss()
	if err != nil {
		return 0, err
	}
	var conns []net.Conn
	defer func() {
		for _, c := range conns {
			_ = c.Close()
		}
	}()
	buf := make([]byte, 4096)
	for range n {
		var c net.Conn
		var err error
		host := "127.0.0.1"
		if secure {
			host = "localhost"
			c, err = tls.Dial("tcp", p.https, &tls.Config{ServerName: host, InsecureSkipVerify: true}) //nolint:gosec // a benchmark on loopback
		} else {
			c, err = net.Dial("tcp", p.http)
		}
		if err != nil {
			return 0, err
		}
		conns = append(conns, c)
		if _, err := fmt.Fprintf(c, "GET / HTTP/1.1\r\nHost: %s\r\n\r\n", host); err != nil {
			return 0, err
		}
		_ = c.SetReadDeadline(time.Now().Add(10 * time.Second))
		if _, err := c.Read(buf); err != nil {
			return 0, err
		}
	}
	after, err := rss()
	return after - before, err
}

// idleClose counts how often a POST meets a connection that the app has just closed.
func (b *bench) idleClose(ctx context.Context, ps []*proxied, sec *section) error {
	t := table{title: "POSTs to an app that closes each connection after 0–9 ms of idling, sent every 0–9 ms by 32 clients", head: []string{"proxy", "sent", "answered 502", "share"}}
	for _, p := range ps {
		addr, host := p.closer, "localhost"
		if p.name == "router" {
			addr, host = p.http, "closer.localhost"
		}
		bad, sent, err := raceToClose(ctx, addr, host)
		if err != nil {
			return fmt.Errorf("idle-close race, %s: %w", p.name, err)
		}
		share := 100 * float64(bad) / float64(sent)
		t.add(p.name, fmt.Sprint(sent), fmt.Sprint(bad), fmt.Sprintf("%.2f %%", share))
		if p.name == "router" {
			sec.add(row{What: "router: POSTs answered 502 by the idle-close race", Budget: "≤ 0.1 %", Measured: fmt.Sprintf("%.2f %%", share), Reference: fmt.Sprintf("of %d", sent), Met: verdict(share <= 0.1)})
		}
	}
	sec.tables = append(sec.tables, t)
	return nil
}
