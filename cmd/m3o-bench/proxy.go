//go:build linux

package main

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"math/big"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
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
		err = upstream(ctx, dir)
	case "router":
		err = actAsRouter(ctx, dir)
	case "closer":
		err = closer(ctx)
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

// FullDuplexCall answers each message with its own payload.
func (emptyCalls) FullDuplexCall(s testpb.TestService_FullDuplexCallServer) error {
	for {
		in, err := s.Recv()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
		if err := s.Send(&testpb.StreamingOutputCallResponse{Payload: in.Payload}); err != nil {
			return err
		}
	}
}

// StreamingOutputCall sends messages of the sizes it was asked for.
func (emptyCalls) StreamingOutputCall(in *testpb.StreamingOutputCallRequest, s testpb.TestService_StreamingOutputCallServer) error {
	for _, p := range in.ResponseParameters {
		if err := s.Send(&testpb.StreamingOutputCallResponse{Payload: &testpb.Payload{Body: make([]byte, p.Size)}}); err != nil {
			return err
		}
	}
	return nil
}

// upstream is the app behind every proxy: HTTP on one port, the same with TLS
// on another, gRPC on a third.
func upstream(ctx context.Context, dir string) error {
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
	t, err := net.Listen("tcp", os.Getenv("M3O_BENCH_HTTPS"))
	if err != nil {
		return err
	}
	hs := &http.Server{Handler: mux, ReadHeaderTimeout: time.Minute}
	done := make(chan error, 3)
	go func() { done <- hs.Serve(h) }()
	go func() { done <- hs.ServeTLS(t, filepath.Join(dir, "crt"), filepath.Join(dir, "key")) }()
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
	stop, err := profiled(filepath.Join(dir, "profile"))
	if err != nil {
		return err
	}
	router.Tune()
	return errors.Join(r.Run(ctx), stop())
}

// A proxied is one proxy that runs, and how to reach it.
type proxied struct {
	name             string
	cmd              *exec.Cmd
	http, https, rpc string // host:port
	closer           string // the app that closes idle connections
	profile          string // where it writes a profile, "" for never
}

// await waits until p takes connections, and ends it when it does not.
func (p *proxied) await(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	err := awaitPort(ctx, p.http)
	if err != nil {
		p.stop()
		err = fmt.Errorf("%s: %w", p.name, err)
	}
	return err
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
	p := &proxied{name: name, cmd: exec.CommandContext(ctx, exe)} // itself, as something else
	p.cmd.Env = append(append(os.Environ(), asProxy+"="+as), env...)
	p.cmd.Stderr = os.Stderr
	return p, p.cmd.Start()
}

// backends are where the apps behind every proxy are.
type backends struct {
	http, https, rpc string
	shop, schema     string // of JSON → gRPC; "" when it cannot be built
	closer           string
}

// router starts a router with so many hosts in its table.
func (b *bench) router(ctx context.Context, dir, name string, up backends, hosts int) (*proxied, error) {
	d := filepath.Join(dir, name)
	if err := os.MkdirAll(d, 0o700); err != nil {
		return nil, err
	}
	if err := router.NewCA(filepath.Join(d, "ca"), "localhost"); err != nil {
		return nil, err
	}
	addrs, err := freeAddrs(ctx, 2)
	if err != nil {
		return nil, err
	}
	p, err := b.spawn(ctx, name, "router", "M3O_BENCH_DIR="+d, "M3O_BENCH_HTTP="+addrs[0], "M3O_BENCH_HTTPS="+addrs[1])
	if err != nil {
		return nil, err
	}
	p.http, p.https, p.rpc, p.profile = addrs[0], "localhost:"+port(addrs[1]), addrs[0], filepath.Join(d, "profile")
	if err := awaitPort(ctx, p.http); err != nil {
		p.stop()
		return nil, err
	}
	t := router.Table{Domain: "localhost", Hosts: []router.Host{
		{Name: "127.0.0.1", App: "web", Release: 1, Endpoints: []string{up.http}},
		{Name: "localhost", App: "both", Release: 1, Endpoints: []string{up.http}},
	}}
	for i := range hosts - len(t.Hosts) {
		t.Hosts = append(t.Hosts, router.Host{Name: fmt.Sprintf("a%d.localhost", i), App: fmt.Sprintf("a%d", i), Release: 1, Endpoints: []string{up.http}})
	}
	// gRPC is asked at a name of its own, as the same host cannot speak both.
	t.Hosts = append(t.Hosts, router.Host{Name: "rpc.localhost", App: "rpc", Release: 1, Protocol: router.GRPC, Endpoints: []string{up.rpc}},
		router.Host{Name: "closer.localhost", App: "closer", Release: 1, Endpoints: []string{up.closer}})
	if up.shop != "" {
		t.Hosts = append(t.Hosts, router.Host{Name: "shop.localhost", App: "shop", Release: 1, Protocol: router.GRPC, Endpoints: []string{up.shop}, Descriptors: up.schema})
	}
	if _, err := (router.Client{Socket: filepath.Join(d, "control")}).Put(ctx, t); err != nil {
		p.stop()
		return nil, err
	}
	return p, nil
}

// nginx starts nginx in front of the same apps.
func (b *bench) nginx(ctx context.Context, dir string, up backends) (*proxied, error) {
	d := filepath.Join(dir, "nginx")
	if err := os.MkdirAll(d, 0o755); err != nil {
		return nil, err
	}
	addrs, err := freeAddrs(ctx, 4)
	if err != nil {
		return nil, err
	}
	conf := fmt.Sprintf(`daemon off; worker_processes 1; pid %[1]s/pid; error_log %[1]s/error.log; user root;
events { worker_connections 8192; }
http {
  access_log off; keepalive_requests 100000000; client_body_temp_path %[1]s/body; proxy_temp_path %[1]s/proxy; fastcgi_temp_path %[1]s/f; uwsgi_temp_path %[1]s/u; scgi_temp_path %[1]s/s;
  proxy_http_version 1.1; proxy_set_header Connection ""; ssl_certificate %[2]s/crt; ssl_certificate_key %[2]s/key;
  upstream app { server %[3]s; keepalive 256; keepalive_requests 100000000; }
  upstream rpc { server %[4]s; keepalive 64; keepalive_requests 100000000; }
  upstream closer { server %[5]s; keepalive 256; keepalive_requests 100000000; }
  server { listen %[6]s; location / { proxy_pass http://app; } }
  server { listen %[7]s ssl http2; location / { proxy_pass http://app; } }
  server { listen %[8]s http2; location / { grpc_pass grpc://rpc; } }
  server { listen %[9]s; location / { proxy_pass http://closer; } }
}
`, d, dir, up.http, up.rpc, up.closer, addrs[0], addrs[1], addrs[2], addrs[3])
	if err := os.WriteFile(filepath.Join(d, "conf"), []byte(conf), 0o600); err != nil {
		return nil, err
	}
	p := &proxied{name: "nginx", http: addrs[0], https: "localhost:" + port(addrs[1]), rpc: addrs[2], closer: addrs[3],
		cmd: exec.CommandContext(ctx, "nginx", "-c", filepath.Join(d, "conf"), "-p", d)}
	p.cmd.Stderr = os.Stderr
	if err := p.cmd.Start(); err != nil {
		return nil, err
	}
	return p, p.await(ctx)
}

// caddy starts Caddy in front of the same apps; nil when it is not installed.
func (b *bench) caddy(ctx context.Context, dir string, up backends) (*proxied, error) {
	if _, err := exec.LookPath("caddy"); err != nil {
		return nil, nil
	}
	d := filepath.Join(dir, "caddy")
	if err := os.MkdirAll(d, 0o755); err != nil {
		return nil, err
	}
	addrs, err := freeAddrs(ctx, 4)
	if err != nil {
		return nil, err
	}
	to := func(addr string) string {
		return fmt.Sprintf("reverse_proxy %s {\n transport http {\n keepalive_idle_conns_per_host 256\n }\n }", addr)
	}
	conf := fmt.Sprintf(`{
 admin off
 auto_https off
 servers {
  protocols h1 h2 h2c
 }
}
http://:%[1]s {
 bind 127.0.0.1
 %[2]s
}
https://localhost:%[3]s {
 bind 127.0.0.1
 tls %[4]s/crt %[4]s/key
 %[2]s
}
http://:%[5]s {
 bind 127.0.0.1
 reverse_proxy h2c://%[6]s
}
http://:%[7]s {
 bind 127.0.0.1
 %[8]s
}
`, port(addrs[0]), to(up.http), port(addrs[1]), dir, port(addrs[2]), up.rpc, port(addrs[3]), to(up.closer))
	file := filepath.Join(d, "Caddyfile")
	if err := os.WriteFile(file, []byte(conf), 0o600); err != nil {
		return nil, err
	}
	p := &proxied{name: "Caddy", http: addrs[0], https: "localhost:" + port(addrs[1]), rpc: addrs[2], closer: addrs[3],
		cmd: exec.CommandContext(ctx, "caddy", "run", "--adapter", "caddyfile", "--config", file)}
	p.cmd.Env = append(os.Environ(), "HOME="+d, "XDG_DATA_HOME="+d, "XDG_CONFIG_HOME="+d)
	log, err := os.Create(filepath.Join(d, "log"))
	if err != nil {
		return nil, err
	}
	defer log.Close() //nolint:errcheck // Caddy has its own
	p.cmd.Stderr = log
	if err := p.cmd.Start(); err != nil {
		return nil, err
	}
	if err := p.await(ctx); err != nil {
		return nil, fmt.Errorf("%w: %s", err, tail(log.Name(), 2000))
	}
	return p, nil
}

// shop builds the compiled grpc-gateway, starts it and the gRPC server behind
// it, and writes that server's schema.
func (b *bench) shop(ctx context.Context, dir string, up *backends) (server, gate *proxied, err error) {
	exe := filepath.Join(dir, "grpcgateway")
	build := exec.CommandContext(ctx, "go", "build", "-o", exe, ".")
	build.Dir = filepath.Join(b.root, "tools", "grpcgateway")
	if out, err := build.CombinedOutput(); err != nil {
		return nil, nil, fmt.Errorf("build tools/grpcgateway: %w: %s", err, out)
	}
	schema := filepath.Join(dir, "shop.binpb")
	if out, err := exec.CommandContext(ctx, exe, "-schema", schema).CombinedOutput(); err != nil {
		return nil, nil, fmt.Errorf("write schema: %w: %s", err, out)
	}
	addrs, err := freeAddrs(ctx, 2)
	if err != nil {
		return nil, nil, err
	}
	server = &proxied{name: "shop", http: addrs[0], cmd: exec.CommandContext(ctx, exe, "-serve", addrs[0])}
	gate = &proxied{name: "grpc-gateway", http: addrs[1], cmd: exec.CommandContext(ctx, exe, "-gateway", addrs[1], "-to", addrs[0])}
	for _, p := range []*proxied{server, gate} {
		p.cmd.Stderr = os.Stderr
		if err := p.cmd.Start(); err != nil {
			return nil, nil, err
		}
		if err := p.await(ctx); err != nil {
			return nil, nil, err
		}
	}
	up.shop, up.schema = addrs[0], schema
	return server, gate, nil
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
