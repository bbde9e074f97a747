package router_test

import (
	"context"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"google.golang.org/grpc"
	testpb "google.golang.org/grpc/interop/grpc_testing"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/reflection"
	"google.golang.org/protobuf/proto"

	"github.com/m3o/m3o/gateway"
	"github.com/m3o/m3o/router"
	"github.com/m3o/m3o/telemetry"
	"github.com/m3o/m3o/telemetry/collector"
)

// The daemon hands the one to the other: here it is seen that they fit.
var _ router.Gateway = (*gateway.Gateway)(nil)

type greeter struct {
	testpb.UnimplementedTestServiceServer
}

// traceparents are what greeter was called with.
var traceparents sync.Map

func (greeter) UnaryCall(ctx context.Context, in *testpb.SimpleRequest) (*testpb.SimpleResponse, error) {
	md, _ := metadata.FromIncomingContext(ctx)
	traceparents.Store(strings.Join(md.Get("traceparent"), " "), true)
	return &testpb.SimpleResponse{
		Username: strings.Join(append(md.Get("x-forwarded-for"), md.Get("x-forwarded-proto")...), " "),
		Payload:  in.Payload,
	}, nil
}

func TestJSONThroughRouterAndGateway(t *testing.T) {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	srv := grpc.NewServer()
	testpb.RegisterTestServiceServer(srv, greeter{})
	reflection.Register(srv)
	served := make(chan struct{})
	go func() { defer close(served); _ = srv.Serve(ln) }()
	t.Cleanup(func() { srv.Stop(); <-served })

	fds, err := gateway.Reflect(t.Context(), ln.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	b, err := proto.Marshal(fds)
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	schema := filepath.Join(dir, "schema.binpb")
	if err := os.WriteFile(schema, b, 0o600); err != nil {
		t.Fatal(err)
	}
	front, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	c := collector.New(t)
	traces, err := telemetry.New(telemetry.Config{Endpoint: c.URL, Sample: 1})
	if err != nil {
		t.Fatal(err)
	}
	rt, err := router.New(router.Config{Traces: traces, HTTP: front, State: filepath.Join(dir, "table"), Gateway: gateway.New(gateway.Config{})})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- rt.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
	dead := "127.0.0.1:1" // tried first half of the time, and passed over
	if _, err := rt.Put(router.Table{Domain: "localhost", Hosts: []router.Host{
		{Name: "shop.localhost", App: "shop", Release: 1, Protocol: router.GRPC, Endpoints: []string{dead, ln.Addr().String()}, Descriptors: schema},
		{Name: "gone.localhost", App: "gone", Release: 1, Protocol: router.GRPC, Endpoints: []string{dead}, Descriptors: schema},
		{Name: "api.localhost", Kind: router.KindAPI},
	}}); err != nil {
		t.Fatal(err)
	}
	for range 4 {
		for _, tc := range []struct {
			host, path string
			code       int
			want       string
		}{
			{"shop.localhost", "/grpc.testing.TestService/UnaryCall", 200, `"username":"127.0.0.1 http"`},
			{"shop.localhost", "/grpc.testing.TestService/UnaryCal", 404, "/grpc.testing.TestService/UnaryCall"},
			{"api.localhost", "/shop/TestService/unary-call", 200, `"body":"aGk="`},
			{"api.localhost", "/SHOP/unarycall", 200, `"body":"aGk="`},
			{"api.localhost", "/v1/shop/test_service/unaryCall", 404, "no method"},
			{"api.localhost", "/nope/call", 404, `no app called \"nope\"`},
			{"gone.localhost", "/grpc.testing.TestService/UnaryCall", 503, "app gone cannot be reached"},
		} {
			req, err := http.NewRequestWithContext(t.Context(), "POST", "http://"+front.Addr().String()+tc.path, strings.NewReader(`{"payload":{"body":"aGk="}}`))
			if err != nil {
				t.Fatal(err)
			}
			req.Host = tc.host
			req.Header.Set("Content-Type", "application/json")
			req.Header.Set("X-Forwarded-For", "6.6.6.6")
			res, err := http.DefaultClient.Do(req)
			if err != nil {
				t.Fatal(err)
			}
			b, err := io.ReadAll(res.Body)
			_ = res.Body.Close()
			if got := strings.ReplaceAll(string(b), `": "`, `":"`); err != nil || res.StatusCode != tc.code || !strings.Contains(got, tc.want) {
				t.Errorf("%s%s: %s %s, want %d with %s", tc.host, tc.path, res.Status, b, tc.code, tc.want)
			}
		}
	}
	var counted int64
	for _, s := range rt.Requests("shop", 0).Series {
		if s.RPC == "/grpc.testing.TestService/UnaryCall" && s.Protocol == "json" && s.Status == 200 && s.Code == 0 {
			counted += s.Count
		}
	}
	if counted != 12 {
		t.Errorf("%d calls counted by their method, want 12: %+v", counted, rt.Requests("shop", 0).Series)
	}
	if s := rt.Status(); s.Apps["shop"].InFlight != 0 || s.Apps["gone"].Failures == 0 {
		t.Errorf("%+v", s.Apps)
	}
	t.Run("the spans of a call lead through the gateway to the instance", func(t *testing.T) {
		ctx, cancel := context.WithCancel(context.Background())
		cancel()
		if err := traces.Run(ctx); err != nil { // sends what there is
			t.Fatal(err)
		}
		calls := 0
		for _, s := range c.Spans("") {
			if s.Attrs["url.path"] == "" || s.Attrs["m3o.app"] != "shop" || s.Attrs["http.response.status_code"] != "200" {
				continue
			}
			calls++
			all := c.Spans(s.Trace)
			if len(all) != 3 || all[1].Name != "gateway" || all[1].Parent != s.ID || all[2].Parent != all[1].ID || all[2].Name != "grpc.testing.TestService/UnaryCall" || s.Name != all[2].Name {
				t.Errorf("spans: %+v", all)
				continue
			}
			if _, ok := traceparents.Load("00-" + s.Trace + "-" + all[2].ID + "-01"); !ok {
				t.Errorf("the instance was not told of span %s", all[2].ID)
			}
		}
		if calls != 12 {
			t.Errorf("%d calls have spans, want 12", calls)
		}
	})
	t.Run("a rule for a method holds on every path to it", func(t *testing.T) {
		if _, err := rt.Put(router.Table{Domain: "localhost", Hosts: []router.Host{
			{Name: "shop.localhost", App: "shop", Release: 1, Protocol: router.GRPC, Endpoints: []string{ln.Addr().String()}, Descriptors: schema,
				Policy: &router.Policy{Rules: []router.AccessRule{{Path: "/grpc.testing.TestService/UnaryCall", Access: router.AllowNobody}}}},
			{Name: "api.localhost", Kind: router.KindAPI},
		}}); err != nil {
			t.Fatal(err)
		}
		for _, tc := range []struct{ host, path, contentType string }{
			{"shop.localhost", "/grpc.testing.TestService/UnaryCall", "application/json"},
			{"shop.localhost", "/grpc.testing.TestService/UnaryCall", "application/grpc-web+proto"},
			{"shop.localhost", "/grpc.testing.TestService/UnaryCall", "application/connect+json"},
			{"shop.localhost", "/TestService/unary-call", "application/json"},
			{"api.localhost", "/shop/TestService/unary-call", "application/json"},
			{"api.localhost", "/SHOP/unarycall", "application/json"},
		} {
			req, err := http.NewRequestWithContext(t.Context(), "POST", "http://"+front.Addr().String()+tc.path, strings.NewReader(`{}`))
			if err != nil {
				t.Fatal(err)
			}
			req.Host = tc.host
			req.Header.Set("Content-Type", tc.contentType)
			res, err := http.DefaultClient.Do(req)
			if err != nil {
				t.Fatal(err)
			}
			b, _ := io.ReadAll(res.Body)
			_ = res.Body.Close()
			if !strings.Contains(string(b), "does not allow this") {
				t.Errorf("%s%s as %s: %s %s", tc.host, tc.path, tc.contentType, res.Status, b)
			}
		}
	})
}
