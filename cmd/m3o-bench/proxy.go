//go:build linux

package main

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"math/big"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"syscall"
	"time"

	"google.golang.org/grpc"
	testpb "google.golang.org/grpc/interop/grpc_testing"

	"github.com/m3o/m3o/gateway"
	"github.com/m3o/m3o/router"
)

// asProxy makes this program be one of the processes whose CPU is measured.
const asProxy = "M3O_BENCH_AS"

// actAs runs the process that asProxy names, and reports whether there was one.
func actAs(ctx context.Context) bool {
	var err error
	switch dir := os.Getenv("M3O_BENCH_DIR"); os.Getenv(asProxy) {
	case "":
		return false
	case "upstream":
		err = upstream(ctx)
	case "router":
		err = actAsRouter(ctx, dir)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "m3o-bench:", err)
		os.Exit(1)
	}
	return true
}

type emptyCalls struct {
	testpb.UnimplementedTestServiceServer
}

func (emptyCalls) EmptyCall(context.Context, *testpb.Empty) (*testpb.Empty, error) {
	return &testpb.Empty{}, nil
}

// upstream is the app behind every proxy: HTTP on one port, gRPC on another.
func upstream(ctx context.Context) error {
	small, big := bytes.Repeat([]byte("x"), 200), bytes.Repeat([]byte("x"), 1<<20)
	mux := http.NewServeMux()
	mux.HandleFunc("/", func(w http.ResponseWriter, _ *http.Request) { _, _ = w.Write(small) })
	mux.HandleFunc("/big", func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Length", strconv.Itoa(len(big)))
		_, _ = w.Write(big)
	})
	h, err := net.Listen("tcp", os.Getenv("M3O_BENCH_HTTP"))
	if err != nil {
		return err
	}
	g, err := net.Listen("tcp", os.Getenv("M3O_BENCH_GRPC"))
	if err != nil {
		return err
	}
	gs := grpc.NewServer()
	testpb.RegisterTestServiceServer(gs, emptyCalls{})
	hs := &http.Server{Handler: mux, ReadHeaderTimeout: time.Minute}
	done := make(chan error, 2)
	go func() { done <- hs.Serve(h) }()
	go func() { done <- gs.Serve(g) }()
	select {
	case err = <-done:
	case <-ctx.Done():
	}
	gs.Stop()
	return errors.Join(err, hs.Close())
}

// actAsRouter serves the table that is in dir.
func actAsRouter(ctx context.Context, dir string) error {
	cfg := router.Config{State: filepath.Join(dir, "table"), CA: filepath.Join(dir, "ca"), Gateway: gateway.New(gateway.Config{}), Plain: router.PlainServe}
	var err error
	if cfg.HTTP, err = net.Listen("tcp", os.Getenv("M3O_BENCH_HTTP")); err != nil {
		return err
	}
	if cfg.HTTPS, err = net.Listen("tcp", os.Getenv("M3O_BENCH_HTTPS")); err != nil {
		return err
	}
	if cfg.Control, err = net.Listen("unix", filepath.Join(dir, "control")); err != nil {
		return err
	}
	r, err := router.New(cfg)
	if err != nil {
		return err
	}
	return r.Run(ctx)
}

// A proxied is one proxy that runs, and how to reach it.
type proxied struct {
	name             string
	cmd              *exec.Cmd
	http, https, rpc string // host:port
}

// cpu is what the proxy and its children have used.
func (p *proxied) cpu() (time.Duration, error) {
	ps, err := processes()
	var sum time.Duration
	for _, x := range ps {
		if x.pid == p.cmd.Process.Pid || x.parent == p.cmd.Process.Pid {
			sum += x.cpu
		}
	}
	return sum, err
}

func (p *proxied) stop() {
	_ = p.cmd.Process.Signal(syscall.SIGTERM)
	_ = p.cmd.Wait()
}

func (b *bench) spawn(ctx context.Context, name, as string, env ...string) (*proxied, error) {
	exe, err := os.Executable()
	if err != nil {
		return nil, err
	}
	p := &proxied{name: name, cmd: exec.CommandContext(ctx, exe)}
	p.cmd.Env = append(append(os.Environ(), asProxy+"="+as), env...)
	p.cmd.Stderr = os.Stderr
	return p, p.cmd.Start()
}

// proxies measures the router beside nginx, in turns, in front of the same app.
func (b *bench) proxies(ctx context.Context, sec *section) error {
	for _, tool := range []string{"nginx", "wrk", "h2load"} {
		if _, err := exec.LookPath(tool); err != nil {
			return fmt.Errorf("%w: apt-get install nginx wrk nghttp2-client", err)
		}
	}
	dir := filepath.Join(b.dir, "proxies")
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return err
	}
	empty := filepath.Join(dir, "empty") // a gRPC message without fields
	if err := os.WriteFile(empty, make([]byte, 5), 0o600); err != nil {
		return err
	}
	addrs := make([]string, 5)
	for i := range addrs {
		var err error
		if addrs[i], err = freeAddr(ctx); err != nil {
			return err
		}
	}
	up, err := b.spawn(ctx, "upstream", "upstream", "M3O_BENCH_HTTP="+addrs[0], "M3O_BENCH_GRPC="+addrs[1])
	if err != nil {
		return err
	}
	defer up.stop()
	up.http = addrs[0]
	few, err := b.router(ctx, dir, "few", addrs[0], addrs[1], 10)
	if err != nil {
		return err
	}
	defer few.stop()
	ng, err := b.nginx(ctx, dir, addrs)
	if err != nil {
		return err
	}
	defer ng.stop()
	for _, p := range []*proxied{up, few, ng} {
		if err := awaitPort(ctx, p.http); err != nil {
			return fmt.Errorf("%s: %w", p.name, err)
		}
	}
	sec.note("CPU is that of the proxy's processes for each request, and the ratio what counts: requests a second depend on what else the machine does. " +
		"The app behind both is the same Go program. References: nginx of the distribution with one worker, keep-alive to the app, no access log.")
	t := table{title: "Requests", head: []string{"what", "proxy", "requests/s", "p50", "p99", "CPU/request"}}
	type kind struct {
		what   string
		budget float64 // times nginx
		load   func(context.Context, *proxied) (loaded, error)
	}
	for _, k := range []kind{
		{"HTTP/1.1, 200 B, 64 connections", 2.2, func(ctx context.Context, p *proxied) (loaded, error) { return wrk(ctx, "http://"+p.http+"/", 64) }},
		{"HTTP/1.1, 200 B, 1 connection", 0, func(ctx context.Context, p *proxied) (loaded, error) { return wrk(ctx, "http://"+p.http+"/", 1) }},
		{"HTTP/1.1 with TLS, 200 B, 64 connections", 2, func(ctx context.Context, p *proxied) (loaded, error) { return wrk(ctx, "https://"+p.https+"/", 64) }},
		{"HTTP/1.1, 1 MB, 16 connections", 0, func(ctx context.Context, p *proxied) (loaded, error) { return wrk(ctx, "http://"+p.http+"/big", 16) }},
		{"HTTP/2 with TLS, 200 B, 8 × 16 streams", 0, func(ctx context.Context, p *proxied) (loaded, error) {
			return h2load(ctx, "https://"+p.https+"/", 8, 16)
		}},
		{"gRPC unary, 8 × 16 streams", 2, func(ctx context.Context, p *proxied) (loaded, error) {
			return h2load(ctx, "http://"+p.rpc+"/grpc.testing.TestService/EmptyCall", 8, 16, "--data="+empty,
				"-H", ":authority: rpc.localhost", "-H", "content-type: application/grpc", "-H", "te: trailers")
		}},
	} {
		ours, ref, err := b.turns(ctx, few, ng, k.load)
		if err != nil {
			return fmt.Errorf("%s: %w", k.what, err)
		}
		for _, m := range []struct {
			name string
			l    loaded
		}{{"router", ours}, {"nginx", ref}} {
			t.add(k.what, m.name, fmt.Sprintf("%.0f", m.l.rate), m.l.p50, m.l.p99, micros(m.l.cpu))
		}
		ratio := ours.cpu.Seconds() / ref.cpu.Seconds()
		r := row{What: "router: " + k.what + ", CPU a request", Measured: micros(ours.cpu), Reference: "nginx " + micros(ref.cpu), Ratio: fmt.Sprintf("%.2f×", ratio)}
		if k.budget > 0 {
			r.Budget, r.Met = fmt.Sprintf("%.1f×", k.budget), verdict(ratio <= k.budget)
		}
		sec.add(r)
	}
	sec.tables = append(sec.tables, t)
	if err := b.hosts(ctx, dir, few, addrs, sec); err != nil {
		return err
	}
	return b.idleConnections(few, sec)
}

// hosts compares a table of 100,000 hosts with one of ten.
func (b *bench) hosts(ctx context.Context, dir string, few *proxied, addrs []string, sec *section) error {
	many, err := b.router(ctx, dir, "many", addrs[0], addrs[1], 100_000)
	if err != nil {
		return err
	}
	defer many.stop()
	load := func(ctx context.Context, p *proxied) (loaded, error) { return wrk(ctx, "http://"+p.http+"/", 64) }
	m, f, err := b.turns(ctx, many, few, load)
	if err != nil {
		return err
	}
	ratio := m.cpu.Seconds() / f.cpu.Seconds()
	sec.add(row{What: "router: 100,000 hosts against 10, CPU a request", Budget: "1.1×", Measured: micros(m.cpu), Reference: "10 hosts " + micros(f.cpu),
		Ratio: fmt.Sprintf("%.2f×", ratio), Met: verdict(ratio <= 1.1)})
	return nil
}

// idleConnections tells what a client that does nothing costs.
func (b *bench) idleConnections(p *proxied, sec *section) error {
	const n = 1000
	rss := func() (int64, error) {
		m, err := memoryOf(process{pid: p.cmd.Process.Pid})
		return m.rss, err
	}
	before, err := rss()
	if err != nil {
		return err
	}
	var conns []net.Conn
	defer func() {
		for _, c := range conns {
			_ = c.Close()
		}
	}()
	for range n {
		c, err := tls.Dial("tcp", p.https, &tls.Config{ServerName: "localhost", InsecureSkipVerify: true}) //nolint:gosec // a benchmark on loopback
		if err != nil {
			return err
		}
		conns = append(conns, c)
		if _, err := fmt.Fprintf(c, "GET / HTTP/1.1\r\nHost: localhost\r\n\r\n"); err != nil {
			return err
		}
		if _, err := c.Read(make([]byte, 4096)); err != nil {
			return err
		}
	}
	after, err := rss()
	if err != nil {
		return err
	}
	sec.add(row{What: "router: memory of an idle TLS connection", Measured: fmt.Sprintf("%.0f kB", float64(after-before)/n/1024), Reference: "–"})
	return nil
}

// router starts a router with so many hosts in its table.
func (b *bench) router(ctx context.Context, dir, name, httpUp, grpcUp string, hosts int) (*proxied, error) {
	d := filepath.Join(dir, name)
	if err := os.MkdirAll(d, 0o700); err != nil {
		return nil, err
	}
	if err := router.NewCA(filepath.Join(d, "ca"), "localhost"); err != nil {
		return nil, err
	}
	plain, err := freeAddr(ctx)
	if err != nil {
		return nil, err
	}
	secure, err := freeAddr(ctx)
	if err != nil {
		return nil, err
	}
	p, err := b.spawn(ctx, name, "router", "M3O_BENCH_DIR="+d, "M3O_BENCH_HTTP="+plain, "M3O_BENCH_HTTPS="+secure)
	if err != nil {
		return nil, err
	}
	p.http, p.https, p.rpc = plain, "localhost:"+port(secure), plain
	if err := awaitPort(ctx, plain); err != nil {
		p.stop()
		return nil, err
	}
	t := router.Table{Domain: "localhost", Hosts: []router.Host{
		{Name: "127.0.0.1", App: "web", Release: 1, Endpoints: []string{httpUp}},
		{Name: "localhost", App: "both", Release: 1, Endpoints: []string{httpUp}},
	}}
	for i := range hosts - len(t.Hosts) {
		t.Hosts = append(t.Hosts, router.Host{Name: fmt.Sprintf("a%d.localhost", i), App: fmt.Sprintf("a%d", i), Release: 1, Endpoints: []string{httpUp}})
	}
	// gRPC is asked at a name of its own, as the same host cannot speak both.
	t.Hosts = append(t.Hosts, router.Host{Name: "rpc.localhost", App: "rpc", Release: 1, Protocol: router.GRPC, Endpoints: []string{grpcUp}})
	if _, err := (router.Client{Socket: filepath.Join(d, "control")}).Put(ctx, t); err != nil {
		p.stop()
		return nil, err
	}
	return p, nil
}

// nginx starts nginx in front of the same app.
func (b *bench) nginx(ctx context.Context, dir string, addrs []string) (*proxied, error) {
	d := filepath.Join(dir, "nginx")
	if err := os.MkdirAll(d, 0o755); err != nil {
		return nil, err
	}
	if err := selfSigned(d); err != nil {
		return nil, err
	}
	conf := fmt.Sprintf(`daemon off; worker_processes 1; pid %[1]s/pid; error_log %[1]s/error.log; user root;
events { worker_connections 4096; }
http {
  access_log off; keepalive_requests 100000000; client_body_temp_path %[1]s/body; proxy_temp_path %[1]s/proxy; fastcgi_temp_path %[1]s/f; uwsgi_temp_path %[1]s/u; scgi_temp_path %[1]s/s;
  upstream app { server %[2]s; keepalive 256; keepalive_requests 100000000; }
  upstream rpc { server %[3]s; keepalive 64; keepalive_requests 100000000; }
  server { listen %[4]s; location / { proxy_pass http://app; proxy_http_version 1.1; proxy_set_header Connection ""; } }
  server { listen %[5]s ssl http2; ssl_certificate %[1]s/crt; ssl_certificate_key %[1]s/key; location / { proxy_pass http://app; proxy_http_version 1.1; proxy_set_header Connection ""; } }
  server { listen %[6]s http2; location / { grpc_pass grpc://rpc; } }
}
`, d, addrs[0], addrs[1], addrs[2], addrs[3], addrs[4])
	if err := os.WriteFile(filepath.Join(d, "conf"), []byte(conf), 0o600); err != nil {
		return nil, err
	}
	p := &proxied{name: "nginx", http: addrs[2], https: "localhost:" + port(addrs[3]), rpc: addrs[4], cmd: exec.CommandContext(ctx, "nginx", "-c", filepath.Join(d, "conf"), "-p", d)}
	p.cmd.Stderr = os.Stderr
	return p, p.cmd.Start()
}

// selfSigned makes a certificate like those of the router: P-256.
func selfSigned(dir string) error {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return err
	}
	tmpl := &x509.Certificate{SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "localhost"}, DNSNames: []string{"localhost"},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(24 * time.Hour)}
	crt, err := x509.CreateCertificate(rand.Reader, tmpl, tmpl, &key.PublicKey, key)
	if err != nil {
		return err
	}
	der, err := x509.MarshalECPrivateKey(key)
	if err != nil {
		return err
	}
	return errors.Join(
		os.WriteFile(filepath.Join(dir, "crt"), pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: crt}), 0o600),
		os.WriteFile(filepath.Join(dir, "key"), pem.EncodeToMemory(&pem.Block{Type: "EC PRIVATE KEY", Bytes: der}), 0o600))
}

// loaded is what one run of a load generator saw, and the proxy's CPU for each
// request.
type loaded struct {
	requests int
	rate     float64
	p50, p99 string
	cpu      time.Duration
}

// turns loads both by turns and gives the run with the median CPU of each.
func (b *bench) turns(ctx context.Context, x, y *proxied, load func(context.Context, *proxied) (loaded, error)) (lx, ly loaded, err error) {
	var xs, ys []loaded
	for range min(b.rounds, 3) {
		for _, p := range []*proxied{x, y} {
			before, err := p.cpu()
			if err != nil {
				return lx, ly, err
			}
			l, err := load(ctx, p)
			if err != nil {
				return lx, ly, fmt.Errorf("%s: %w", p.name, err)
			}
			after, err := p.cpu()
			if err != nil {
				return lx, ly, err
			}
			l.cpu = (after - before) / time.Duration(max(1, l.requests))
			if p == x {
				xs = append(xs, l)
			} else {
				ys = append(ys, l)
			}
		}
	}
	return middle(xs), middle(ys), nil
}

// middle is the run with the median CPU.
func middle(ls []loaded) loaded {
	for _, l := range ls {
		below, above := 0, 0
		for _, o := range ls {
			if o.cpu < l.cpu {
				below++
			} else if o.cpu > l.cpu {
				above++
			}
		}
		if below <= len(ls)/2 && above <= len(ls)/2 {
			return l
		}
	}
	return ls[0]
}

var (
	wrkCount = regexp.MustCompile(`(\d+) requests in`)
	wrkRate  = regexp.MustCompile(`Requests/sec:\s+([\d.]+)`)
	wrkP50   = regexp.MustCompile(`(?m)^\s+50%\s+(\S+)`)
	wrkP99   = regexp.MustCompile(`(?m)^\s+99%\s+(\S+)`)
	wrkBad   = regexp.MustCompile(`(?m)Non-2xx or 3xx responses: (\d+)|Socket errors: (.*)`)
	h2Count  = regexp.MustCompile(`requests: \d+ total, \d+ started, (\d+) done, (\d+) succeeded`)
	h2Rate   = regexp.MustCompile(`finished in \S+, ([\d.]+) req/s`)
	h2Time   = regexp.MustCompile(`time for request:\s+\S+\s+(\S+)\s+(\S+)`) // min, max, mean
)

func find(re *regexp.Regexp, s string) string {
	if m := re.FindStringSubmatch(s); m != nil {
		return m[1]
	}
	return ""
}

func wrk(ctx context.Context, url string, conns int) (loaded, error) {
	out, err := exec.CommandContext(ctx, "wrk", "-t1", "-c", strconv.Itoa(conns), "-d4s", "--latency", url).CombinedOutput()
	s := string(out)
	if err != nil {
		return loaded{}, fmt.Errorf("wrk: %w: %s", err, s)
	}
	if bad := wrkBad.FindString(s); bad != "" {
		return loaded{}, fmt.Errorf("wrk: %s", bad)
	}
	var l loaded
	l.requests, _ = strconv.Atoi(find(wrkCount, s))
	l.rate, _ = strconv.ParseFloat(find(wrkRate, s), 64)
	l.p50, l.p99 = find(wrkP50, s), find(wrkP99, s)
	if l.requests == 0 {
		return l, fmt.Errorf("wrk made no request: %s", s)
	}
	return l, nil
}

func h2load(ctx context.Context, url string, conns, streams int, more ...string) (loaded, error) {
	const n = 40_000
	args := append([]string{"-n", strconv.Itoa(n), "-c", strconv.Itoa(conns), "-m", strconv.Itoa(streams)}, more...)
	out, err := exec.CommandContext(ctx, "h2load", append(args, url)...).CombinedOutput()
	s := string(out)
	if err != nil {
		return loaded{}, fmt.Errorf("h2load: %w: %s", err, s)
	}
	m := h2Count.FindStringSubmatch(s)
	if m == nil || m[2] != strconv.Itoa(n) {
		return loaded{}, fmt.Errorf("h2load: not all of %d requests succeeded: %s", n, s)
	}
	l := loaded{requests: n}
	l.rate, _ = strconv.ParseFloat(find(h2Rate, s), 64)
	if t := h2Time.FindStringSubmatch(s); t != nil {
		l.p50, l.p99 = t[2]+" mean", t[1]+" max"
	}
	return l, nil
}

func micros(d time.Duration) string { return fmt.Sprintf("%.1f µs", float64(d)/1e3) }

func awaitPort(ctx context.Context, addr string) error {
	for {
		c, err := net.DialTimeout("tcp", addr, time.Second)
		if err == nil {
			return c.Close()
		}
		select {
		case <-ctx.Done():
			return err
		case <-time.After(20 * time.Millisecond):
		}
	}
}
