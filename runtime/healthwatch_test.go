package runtime

import (
	"bytes"
	"context"
	"net"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/health"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"

	"github.com/m3o/m3o"
)

// watchedServer serves gRPC on an address of its own; without hs, no health.
func watchedServer(t *testing.T, hs *health.Server) (addr string, srv *grpc.Server) {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	srv = grpc.NewServer()
	if hs != nil {
		healthpb.RegisterHealthServer(srv, hs)
	}
	done := make(chan error, 1)
	go func() { done <- srv.Serve(ln) }()
	t.Cleanup(func() { srv.Stop(); <-done })
	return ln.Addr().String(), srv
}

func TestWatchHealthTellsOfAChangeAndLetsTheServerStop(t *testing.T) {
	hs := health.NewServer()
	hs.SetServingStatus("shop.v1.Shop", healthpb.HealthCheckResponse_SERVING)
	addr, srv := watchedServer(t, hs)
	ctx, cancel := context.WithCancel(t.Context())
	told := watchHealth(ctx, addr, "shop.v1.Shop")
	h := m3o.Health{Kind: "grpc", Service: "shop.v1.Shop"}
	if p, err := Probe(ctx, addr, h); p != GRPC || err != nil {
		t.Fatalf("Probe = %q, %v", p, err)
	}
	// Until the stream is there a change is what is known at first.
	for waiting := true; waiting; {
		hs.SetServingStatus("shop.v1.Shop", healthpb.HealthCheckResponse_NOT_SERVING)
		select {
		case _, ok := <-told:
			if !ok {
				t.Fatal("the watch ended")
			}
			waiting = false
		case <-time.After(10 * time.Millisecond):
			hs.SetServingStatus("shop.v1.Shop", healthpb.HealthCheckResponse_SERVING)
		}
	}
	hs.SetServingStatus("shop.v1.Shop", healthpb.HealthCheckResponse_NOT_SERVING)
	if _, err := Probe(ctx, addr, h); err == nil {
		t.Error("Probe finds it serving")
	}
	if _, err := Probe(ctx, addr, m3o.Health{Kind: "grpc"}); err != nil {
		t.Errorf("the whole server: %v", err)
	}
	if _, err := Probe(ctx, addr, m3o.Health{Kind: "grpc", Service: "nobody.Knows"}); err == nil {
		t.Error("an unknown service is well")
	}
	stopped := make(chan struct{})
	go func() { srv.GracefulStop(); close(stopped) }()
	select {
	case <-stopped:
	case <-time.After(time.Minute):
		t.Error("our watch keeps the server from stopping")
	}
	cancel()
	for range told { // until it has ended
	}
}

func TestWatchHealthEndsWhereItIsNotServed(t *testing.T) {
	addr, _ := watchedServer(t, nil)
	for range watchHealth(t.Context(), addr, "") {
		t.Error("told of a change by a server without health")
	}
}

func FuzzServing(f *testing.F) {
	f.Add([]byte{0, 0, 0, 0, 2, 8, 1})
	f.Add([]byte{0, 0, 0, 0, 0})
	f.Add([]byte{1, 255, 255, 255, 255, 8})
	f.Fuzz(func(t *testing.T, b []byte) {
		n, err := readServing(bytes.NewReader(b))
		if err == nil && (len(b) < 5 || b[0] != 0) {
			t.Errorf("%x is read as status %d", b, n)
		}
	})
}
