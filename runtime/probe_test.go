package runtime

import (
	"context"
	"errors"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/health"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/status"

	"github.com/m3o/m3o"
	"github.com/m3o/m3o/internal/need"
)

func listen(t *testing.T) net.Listener {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = ln.Close() })
	return ln
}

// grpcServer is a real one; register may be nil.
func grpcServer(t *testing.T, register func(*grpc.Server), opts ...grpc.ServerOption) string {
	t.Helper()
	ln := listen(t)
	s := grpc.NewServer(opts...)
	if register != nil {
		register(s)
	}
	go func() { _ = s.Serve(ln) }()
	t.Cleanup(s.Stop)
	return ln.Addr().String()
}

func healthSays(st healthpb.HealthCheckResponse_ServingStatus) func(*grpc.Server) {
	return func(s *grpc.Server) {
		h := health.NewServer()
		h.SetServingStatus("", st)
		healthpb.RegisterHealthServer(s, h)
	}
}

func httpServer(t *testing.T, h2 bool, h http.HandlerFunc) string {
	t.Helper()
	s := httptest.NewUnstartedServer(h)
	s.Config.Protocols = new(http.Protocols)
	s.Config.Protocols.SetUnencryptedHTTP2(h2)
	s.Config.Protocols.SetHTTP1(!h2)
	s.Start()
	t.Cleanup(s.Close)
	return s.Listener.Addr().String()
}

func TestProbe(t *testing.T) {
	guarded := grpc.UnaryInterceptor(func(context.Context, any, *grpc.UnaryServerInfo, grpc.UnaryHandler) (any, error) {
		return nil, status.Error(codes.Unauthenticated, "who are you")
	})
	answer := func(code int) http.HandlerFunc {
		return func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(code) }
	}
	nobody := need.Nobody(t)
	silent := listen(t) // accepts, in the kernel, and says nothing
	rude := listen(t)
	go func() {
		for {
			c, err := rude.Accept()
			if err != nil {
				return
			}
			_, _ = io.WriteString(c, "220 mail.example ESMTP\r\n")
			_ = c.Close()
		}
	}()
	for _, tc := range []struct {
		name, addr string
		health     m3o.Health
		want       Protocol
		err        string
	}{
		{"gRPC serving", grpcServer(t, healthSays(healthpb.HealthCheckResponse_SERVING)), m3o.Health{Kind: "grpc"}, GRPC, ""},
		{"gRPC serving, detected", grpcServer(t, healthSays(healthpb.HealthCheckResponse_SERVING)), m3o.Health{}, GRPC, ""},
		{"gRPC not serving", grpcServer(t, healthSays(healthpb.HealthCheckResponse_NOT_SERVING)), m3o.Health{Kind: "grpc"}, GRPC, "NOT_SERVING"},
		{"gRPC not serving, detected", grpcServer(t, healthSays(healthpb.HealthCheckResponse_NOT_SERVING)), m3o.Health{}, GRPC, "NOT_SERVING"},
		{"gRPC without health", grpcServer(t, nil), m3o.Health{Kind: "grpc"}, GRPC, "does not serve grpc.health.v1"},
		{"gRPC without health, detected", grpcServer(t, nil), m3o.Health{}, GRPC, ""},
		{"gRPC behind a guard", grpcServer(t, healthSays(healthpb.HealthCheckResponse_SERVING), guarded), m3o.Health{Kind: "grpc"}, GRPC, "lets nobody call"},
		{"gRPC behind a guard, detected", grpcServer(t, healthSays(healthpb.HealthCheckResponse_SERVING), guarded), m3o.Health{}, GRPC, ""},
		{"HTTP/1.1 asked for gRPC", httpServer(t, false, answer(200)), m3o.Health{Kind: "grpc"}, "", "does not speak gRPC"},
		{"HTTP/2 asked for gRPC", httpServer(t, true, answer(404)), m3o.Health{Kind: "grpc"}, H2C, "did not answer the gRPC health check"},
		{"HTTP/1.1", httpServer(t, false, answer(204)), m3o.Health{Kind: "http", Path: "/healthz"}, HTTP1, ""},
		{"HTTP redirect", httpServer(t, false, answer(301)), m3o.Health{Kind: "http"}, HTTP1, ""},
		{"HTTP 404", httpServer(t, false, answer(404)), m3o.Health{Kind: "http", Path: "/healthz"}, HTTP1, "GET /healthz answered 404"},
		{"HTTP path elsewhere", httpServer(t, false, answer(200)), m3o.Health{Kind: "http", Path: "http://example.org/"}, HTTP1, "is not a path"},
		{"HTTP/1.1, detected", httpServer(t, false, answer(500)), m3o.Health{}, HTTP1, ""},
		{"HTTP/2, detected", httpServer(t, true, answer(500)), m3o.Health{}, H2C, ""},
		{"TCP", silent.Addr().String(), m3o.Health{Kind: "tcp"}, TCP, ""},
		{"silent, detected", silent.Addr().String(), m3o.Health{}, TCP, ""},
		{"another protocol, detected", rude.Addr().String(), m3o.Health{}, TCP, ""},
		{"nobody", nobody, m3o.Health{}, "", "connection refused"},
		{"nobody for gRPC", nobody, m3o.Health{Kind: "grpc"}, "", "connection refused"},
		{"unknown kind", nobody, m3o.Health{Kind: "icmp"}, "", "is not grpc, http, tcp"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			t.Parallel()
			if tc.addr != silent.Addr().String() { // all others answer, however busy the machine is
				tc.health.Answer = time.Minute
			}
			got, err := Probe(t.Context(), tc.addr, tc.health)
			if tc.err == "" && err != nil || tc.err != "" && (err == nil || !strings.Contains(err.Error(), tc.err)) {
				t.Errorf("Probe = %q, %v, want error %q", got, err, tc.err)
			}
			if got != tc.want {
				t.Errorf("Probe = %q, want %q", got, tc.want)
			}
		})
	}
}

// FuzzServingStatus: whatever a server answers is read or refused.
func FuzzServingStatus(f *testing.F) {
	for _, s := range []string{"\x00\x00\x00\x00\x02\x08\x01", "\x00\x00\x00\x00\x00", "\x01\x00\x00\x00\x02\x08\x01",
		"\x00\x00\x00\x00\x05\x12\x01x\x08\x02", "\x00\x00\x00\x00\x01\xff", "\x00\xff\xff\xff\xff"} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		if n, err := servingStatus(b); err != nil && n != 0 {
			t.Errorf("servingStatus(%x) = %d, %v", b, n, err)
		}
	})
}

// A packet lost on the way to a device that has just come up held the start of
// an instance up for the second that TCP waits before it sends another.
func TestLostFirstPacketDoesNotCostASecond(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		began, tries := time.Now(), 0
		lost := func(ctx context.Context) (net.Conn, error) {
			if tries++; tries <= 2 {
				<-ctx.Done()
				return nil, ctx.Err()
			}
			c, _ := net.Pipe()
			return c, nil
		}
		c, err := redial(t.Context(), lost)
		if err != nil || time.Since(began) != 3*firstDial {
			t.Fatalf("after %d tries and %v: %v", tries, time.Since(began), err)
		}
		_ = c.Close()
		// Who answers that nobody listens is believed, who does not answer is waited for.
		refused := errors.New("refused")
		tries = 0
		if _, err := redial(t.Context(), func(context.Context) (net.Conn, error) { tries++; return nil, refused }); err != refused || tries != 1 {
			t.Errorf("refused: %v after %d tries", err, tries)
		}
		ctx, cancel := context.WithTimeout(t.Context(), probeTimeout)
		defer cancel()
		began = time.Now()
		if _, err := redial(ctx, func(ctx context.Context) (net.Conn, error) { <-ctx.Done(); return nil, ctx.Err() }); !errors.Is(err, context.DeadlineExceeded) || time.Since(began) != probeTimeout {
			t.Errorf("no answer: %v after %v", err, time.Since(began))
		}
	})
}
