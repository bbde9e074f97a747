package router

import (
	"bufio"
	"context"
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/health"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	testpb "google.golang.org/grpc/interop/grpc_testing"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
)

// wait polls cond until it holds; nothing in a test depends on how long it takes.
func wait(t testing.TB, what string, cond func() bool) {
	t.Helper()
	for end := time.Now().Add(20 * time.Second); !cond(); {
		if time.Now().After(end) {
			t.Fatalf("waited in vain: %s", what)
		}
		<-time.After(time.Millisecond)
	}
}

func listen(t testing.TB) net.Listener {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = ln.Close() })
	return ln
}

// fixture is a running router.
type fixture struct {
	rt      *Router
	client  Client
	http    string // address
	https   string
	state   string
	roots   *x509.CertPool
	stop    func() error
	stopped atomic.Bool
}

type option func(*Config)

func start(t testing.TB, opts ...option) *fixture {
	t.Helper()
	dir := t.TempDir()
	if err := NewCA(filepath.Join(dir, "ca"), "localhost"); err != nil {
		t.Fatal(err)
	}
	crt, err := os.ReadFile(filepath.Join(dir, "ca", "ca.crt"))
	if err != nil {
		t.Fatal(err)
	}
	sock := filepath.Join(dir, "control.sock")
	control, err := net.Listen("unix", sock)
	if err != nil {
		t.Fatal(err)
	}
	cfg := Config{
		HTTP: listen(t), HTTPS: listen(t), Control: control,
		State: filepath.Join(dir, "table.json"), CA: filepath.Join(dir, "ca"), Version: "test",
		Limits: Limits{Grace: 5 * time.Second},
	}
	for _, o := range opts {
		o(&cfg)
	}
	rt, err := New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	f := &fixture{rt: rt, client: Client{sock}, http: cfg.HTTP.Addr().String(), https: cfg.HTTPS.Addr().String(), state: cfg.State, roots: x509.NewCertPool()}
	if !f.roots.AppendCertsFromPEM(crt) {
		t.Fatal("no certificate in ca.crt")
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- rt.Run(ctx) }()
	f.stop = func() error {
		if f.stopped.Swap(true) {
			return nil
		}
		cancel()
		return <-done
	}
	t.Cleanup(func() {
		if err := f.stop(); err != nil {
			t.Errorf("Run = %v", err)
		}
	})
	return f
}

// table is a table of apps on localhost.
func table(hosts ...Host) Table { return Table{Domain: "localhost", Hosts: hosts} }

func appHost(app string, release int, protocol string, endpoints ...string) Host {
	return Host{Name: app + ".localhost", App: app, Release: release, Protocol: protocol, Endpoints: endpoints}
}

func (f *fixture) put(t testing.TB, hosts ...Host) {
	t.Helper()
	if _, err := f.client.Put(t.Context(), table(hosts...)); err != nil {
		t.Fatal(err)
	}
}

// web is an HTTP client that sends every host to the router, over TLS for https.
func (f *fixture) web(t testing.TB, h2 bool) *http.Client {
	t.Helper()
	tr := &http.Transport{
		DialContext: func(ctx context.Context, n, addr string) (net.Conn, error) {
			to := f.http
			if strings.HasSuffix(addr, ":443") {
				to = f.https
			}
			var d net.Dialer
			return d.DialContext(ctx, n, to)
		},
		TLSClientConfig: &tls.Config{RootCAs: f.roots}, DisableCompression: true,
		Protocols: new(http.Protocols), ExpectContinueTimeout: 5 * time.Second,
	}
	if h2 {
		tr.Protocols.SetHTTP2(true)
		tr.Protocols.SetUnencryptedHTTP2(true)
	} else {
		tr.Protocols.SetHTTP1(true)
	}
	t.Cleanup(tr.CloseIdleConnections)
	return &http.Client{Transport: tr, CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }}
}

// ways are all the ways a client comes in.
func (f *fixture) ways(t *testing.T, test func(t *testing.T, c *http.Client, scheme string)) {
	for _, way := range []struct {
		name, scheme string
		h2           bool
	}{{"h1", "http", false}, {"h2c", "http", true}, {"h1 over TLS", "https", false}, {"h2", "https", true}} {
		t.Run(way.name, func(t *testing.T) { test(t, f.web(t, way.h2), way.scheme) })
	}
}

func do(t testing.TB, c *http.Client, req *http.Request) (*http.Response, string) {
	t.Helper()
	res, err := c.Do(req)
	if err != nil {
		t.Fatalf("%s %s: %v", req.Method, req.URL, err)
	}
	defer res.Body.Close() //nolint:errcheck // a test
	b, err := io.ReadAll(res.Body)
	if err != nil {
		t.Fatalf("%s %s: read body: %v", req.Method, req.URL, err)
	}
	return res, string(b)
}

func request1(t testing.TB, method, url string, body io.Reader) *http.Request {
	t.Helper()
	req, err := http.NewRequestWithContext(t.Context(), method, url, body)
	if err != nil {
		t.Fatal(err)
	}
	return req
}

// backend is an app that speaks HTTP/1.1 and h2c.
func backend(t testing.TB, h http.Handler) (addr string, srv *httptest.Server) {
	t.Helper()
	srv = httptest.NewUnstartedServer(h)
	srv.Config.Protocols = new(http.Protocols)
	srv.Config.Protocols.SetHTTP1(true)
	srv.Config.Protocols.SetUnencryptedHTTP2(true)
	srv.Start()
	t.Cleanup(srv.Close)
	return srv.Listener.Addr().String(), srv
}

// liar answers every connection with script, which gets the request's head.
func liar(t testing.TB, script func(c net.Conn, head string)) string {
	t.Helper()
	ln := listen(t)
	go func() {
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			go func() {
				defer c.Close() //nolint:errcheck // a test
				br := bufio.NewReader(c)
				var head strings.Builder
				for {
					line, err := br.ReadString('\n')
					if err != nil {
						return
					}
					head.WriteString(line)
					if line == "\r\n" {
						break
					}
				}
				script(c, head.String())
			}()
		}
	}()
	return ln.Addr().String()
}

// service is the interop test service, enough of it for every kind of stream.
type service struct {
	testpb.UnimplementedTestServiceServer
	name string
}

func (s service) UnaryCall(ctx context.Context, in *testpb.SimpleRequest) (*testpb.SimpleResponse, error) {
	if st := in.GetResponseStatus(); st != nil {
		return nil, status.Error(codes.Code(st.Code), st.Message)
	}
	md, _ := metadata.FromIncomingContext(ctx)
	if v := md.Get("x-echo"); v != nil {
		_ = grpc.SetHeader(ctx, metadata.Pairs("x-echo", v[0]))
		_ = grpc.SetTrailer(ctx, metadata.Pairs("x-echo-bin", v[0]))
	}
	return &testpb.SimpleResponse{Username: s.name, Payload: &testpb.Payload{Body: make([]byte, in.ResponseSize)}}, nil
}

func (s service) StreamingOutputCall(in *testpb.StreamingOutputCallRequest, out grpc.ServerStreamingServer[testpb.StreamingOutputCallResponse]) error {
	for _, p := range in.ResponseParameters {
		if err := out.Send(&testpb.StreamingOutputCallResponse{Payload: &testpb.Payload{Body: make([]byte, p.Size)}}); err != nil {
			return err
		}
	}
	return nil
}

func (s service) StreamingInputCall(in grpc.ClientStreamingServer[testpb.StreamingInputCallRequest, testpb.StreamingInputCallResponse]) error {
	n := 0
	for {
		m, err := in.Recv()
		if err == io.EOF {
			return in.SendAndClose(&testpb.StreamingInputCallResponse{AggregatedPayloadSize: int32(n)})
		} else if err != nil {
			return err
		}
		n += len(m.Payload.GetBody())
	}
}

func (s service) FullDuplexCall(both grpc.BidiStreamingServer[testpb.StreamingOutputCallRequest, testpb.StreamingOutputCallResponse]) error {
	for {
		m, err := both.Recv()
		if err == io.EOF {
			return nil
		} else if err != nil {
			return err
		}
		if st := m.GetResponseStatus(); st != nil {
			return status.Error(codes.Code(st.Code), st.Message) // before the client has closed its side
		}
		if err := both.Send(&testpb.StreamingOutputCallResponse{Payload: m.Payload}); err != nil {
			return err
		}
	}
}

// grpcBackend serves service; close it with the func for a hard end.
func grpcBackend(t testing.TB, name string, opts ...grpc.ServerOption) (string, *grpc.Server) {
	t.Helper()
	ln := listen(t)
	srv := grpc.NewServer(opts...)
	testpb.RegisterTestServiceServer(srv, service{name: name})
	healthpb.RegisterHealthServer(srv, health.NewServer())
	done := make(chan struct{})
	go func() { defer close(done); _ = srv.Serve(ln) }()
	t.Cleanup(func() { srv.Stop(); <-done })
	return ln.Addr().String(), srv
}

// dial connects a gRPC client to the router's plain port as host.
func (f *fixture) dial(t testing.TB, host string) testpb.TestServiceClient {
	t.Helper()
	cc, err := grpc.NewClient("passthrough:///"+host, grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) {
			var d net.Dialer
			return d.DialContext(ctx, "tcp", f.http)
		}))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = cc.Close() })
	return testpb.NewTestServiceClient(cc)
}

func raw(t testing.TB, addr string) (net.Conn, *bufio.Reader) {
	t.Helper()
	c, err := net.Dial("tcp", addr)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = c.Close() })
	_ = c.SetDeadline(time.Now().Add(20 * time.Second))
	return c, bufio.NewReader(c)
}

func send(t testing.TB, c net.Conn, format string, args ...any) {
	t.Helper()
	if _, err := fmt.Fprintf(c, format, args...); err != nil {
		t.Fatal(err)
	}
}
