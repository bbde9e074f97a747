package router

import (
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"testing"
	"time"

	"golang.org/x/net/http2"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	testpb "google.golang.org/grpc/interop/grpc_testing"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
)

func payload(n int) *testpb.Payload { return &testpb.Payload{Body: make([]byte, n)} }

func TestGRPC(t *testing.T) {
	addr, _ := grpcBackend(t, "v1")
	f := start(t)
	f.put(t, appHost("rpc", 1, GRPC, addr), appHost("mixed", 1, H2C, addr))
	for _, host := range []string{"rpc.localhost", "mixed.localhost"} {
		t.Run(host, func(t *testing.T) {
			ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
			defer cancel()
			c := f.dial(t, host)
			for _, n := range []int{0, 10, 300_000} {
				var head, trail metadata.MD
				ctx := metadata.AppendToOutgoingContext(ctx, "x-echo", "there and back")
				r, err := c.UnaryCall(ctx, &testpb.SimpleRequest{ResponseSize: int32(n), Payload: payload(n)}, grpc.Header(&head), grpc.Trailer(&trail))
				if err != nil || len(r.Payload.Body) != n || r.Username != "v1" {
					t.Fatalf("unary %d: %v", n, err)
				}
				if fmt.Sprint(head.Get("x-echo"), trail.Get("x-echo-bin")) != "[there and back] [there and back]" {
					t.Errorf("metadata %v, trailers %v", head, trail)
				}
			}
			_, err := c.UnaryCall(ctx, &testpb.SimpleRequest{ResponseStatus: &testpb.EchoStatus{Code: 9, Message: "ünusual\n%"}})
			if st := status.Convert(err); st.Code() != 9 || st.Message() != "ünusual\n%" {
				t.Errorf("status %v", err)
			}
			if _, err := c.UnimplementedCall(ctx, &testpb.Empty{}); status.Code(err) != codes.Unimplemented {
				t.Errorf("unimplemented: %v", err)
			}

			var params []*testpb.ResponseParameters
			for _, n := range []int{1, 100_000, 0, 7} {
				params = append(params, &testpb.ResponseParameters{Size: int32(n)})
			}
			down, err := c.StreamingOutputCall(ctx, &testpb.StreamingOutputCallRequest{ResponseParameters: params})
			if err != nil {
				t.Fatal(err)
			}
			for _, p := range params {
				if m, err := down.Recv(); err != nil || len(m.Payload.Body) != int(p.Size) {
					t.Fatalf("server stream: %v", err)
				}
			}
			if _, err := down.Recv(); err != io.EOF {
				t.Errorf("server stream ended with %v", err)
			}

			up, err := c.StreamingInputCall(ctx)
			if err != nil {
				t.Fatal(err)
			}
			for range 20 {
				if err := up.Send(&testpb.StreamingInputCallRequest{Payload: payload(10_000)}); err != nil {
					t.Fatal(err)
				}
			}
			if m, err := up.CloseAndRecv(); err != nil || m.AggregatedPayloadSize != 200_000 {
				t.Errorf("client stream: %v, %v", m, err)
			}

			both, err := c.FullDuplexCall(ctx)
			if err != nil {
				t.Fatal(err)
			}
			for i := range 50 {
				if err := both.Send(&testpb.StreamingOutputCallRequest{Payload: payload(i)}); err != nil {
					t.Fatal(err)
				}
				if m, err := both.Recv(); err != nil || len(m.Payload.GetBody()) != i {
					t.Fatalf("both ways: %v", err)
				}
			}
			_ = both.CloseSend()
			if _, err := both.Recv(); err != io.EOF {
				t.Errorf("both ways ended with %v", err)
			}
		})
	}
	wait(t, "nothing in flight", func() bool { return inFlight(t, f, "rpc") == 0 })
}

// httputil.ReverseProxy hangs here for ever: golang/go#80085.
func TestStatusBeforeTheClientClosesItsSideDoesNotHang(t *testing.T) {
	addr, _ := grpcBackend(t, "v1")
	f := start(t)
	f.put(t, appHost("rpc", 1, GRPC, addr))
	c := f.dial(t, "rpc.localhost")
	for i := range 20 {
		ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
		both, err := c.FullDuplexCall(ctx)
		if err != nil {
			t.Fatal(err)
		}
		if i%2 == 1 { // with and without an answer first
			if err := both.Send(&testpb.StreamingOutputCallRequest{Payload: payload(5)}); err != nil {
				t.Fatal(err)
			}
			if _, err := both.Recv(); err != nil {
				t.Fatal(err)
			}
		}
		if err := both.Send(&testpb.StreamingOutputCallRequest{ResponseStatus: &testpb.EchoStatus{Code: 10, Message: "enough"}}); err != nil {
			t.Fatal(err)
		}
		if _, err := both.Recv(); status.Code(err) != codes.Aborted {
			t.Fatalf("%v, want the app's ABORTED", err)
		}
		cancel()
	}
	wait(t, "nothing in flight", func() bool { return inFlight(t, f, "rpc") == 0 })
}

func TestGRPCCancelReachesTheApp(t *testing.T) {
	addr, srv := grpcBackend(t, "v1")
	f := start(t)
	f.put(t, appHost("rpc", 1, GRPC, addr))
	ctx, cancel := context.WithCancel(t.Context())
	both, err := f.dial(t, "rpc.localhost").FullDuplexCall(ctx)
	if err != nil {
		t.Fatal(err)
	}
	if err := both.Send(&testpb.StreamingOutputCallRequest{Payload: payload(1)}); err != nil {
		t.Fatal(err)
	}
	if _, err := both.Recv(); err != nil {
		t.Fatal(err)
	}
	cancel()
	wait(t, "nothing in flight", func() bool { return inFlight(t, f, "rpc") == 0 })
	srv.GracefulStop() // returns only when the app's handler has
}

func TestGRPCFailuresAreTrailers(t *testing.T) {
	dead := listen(t)
	_ = dead.Close()
	silent := liarH2(t, func(fr *http2.Framer, id uint32) {})
	reset := liarH2(t, func(fr *http2.Framer, id uint32) { _ = fr.WriteRSTStream(id, http2.ErrCodeEnhanceYourCalm) })
	bye := liarH2(t, nil)
	web, _ := backend(t, http.HandlerFunc(echo))
	f := start(t)
	f.put(t, appHost("down", 1, GRPC, dead.Addr().String()), appHost("asleep", 1, GRPC), appHost("silent", 1, GRPC, silent),
		appHost("reset", 1, GRPC, reset), appHost("bye", 1, GRPC, bye), appHost("web", 1, HTTP1, web))
	for _, tc := range []struct {
		host string
		code codes.Code
		msg  string
	}{
		{"down.localhost", codes.Unavailable, "cannot be reached"},
		{"asleep.localhost", codes.Unavailable, "no running instance"},
		{"nope.localhost", codes.Unimplemented, `no app called "nope"`},
		{"silent.localhost", codes.DeadlineExceeded, ""},
		{"reset.localhost", codes.ResourceExhausted, "reset the stream"},
		{"bye.localhost", codes.Unavailable, "broke off"},
		{"web.localhost", codes.Unimplemented, "does not speak gRPC"},
	} {
		ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
		if tc.code == codes.DeadlineExceeded {
			ctx, cancel = context.WithTimeout(t.Context(), 100*time.Millisecond)
		}
		_, err := f.dial(t, tc.host).UnaryCall(ctx, &testpb.SimpleRequest{})
		cancel()
		if st := status.Convert(err); st.Code() != tc.code || !strings.Contains(st.Message(), tc.msg) {
			t.Errorf("%s: %v, want %v with %q", tc.host, err, tc.code, tc.msg)
		}
	}
}

// The client's own deadline hides the router's: ask without one of its own.
func TestGRPCTimeoutIsEnforced(t *testing.T) {
	silent := liarH2(t, func(*http2.Framer, uint32) {})
	f := start(t)
	f.put(t, appHost("silent", 1, GRPC, silent))
	req := request1(t, "POST", "http://silent.localhost/a.B/C", strings.NewReader("\x00\x00\x00\x00\x00"))
	req.Header.Set("Content-Type", "application/grpc")
	req.Header.Set("Grpc-Timeout", "20m")
	if res, _ := do(t, f.web(t, true), req); res.Header.Get("Grpc-Status") != "4" {
		t.Errorf("grpc-status %q, want 4: deadline exceeded", res.Header.Get("Grpc-Status"))
	}
}

// liarH2 speaks just enough HTTP/2 to take requests, and answers each by
// script; nil closes the connection instead.
func liarH2(t *testing.T, script func(fr *http2.Framer, id uint32)) string {
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
				speakH2(c, script)
			}()
		}
	}()
	return ln.Addr().String()
}

func speakH2(c net.Conn, script func(fr *http2.Framer, id uint32)) {
	if _, err := io.ReadFull(c, make([]byte, len(http2.ClientPreface))); err != nil {
		return
	}
	fr := http2.NewFramer(c, c)
	_ = fr.WriteSettings()
	for {
		f, err := fr.ReadFrame()
		if err != nil {
			return
		}
		switch f := f.(type) {
		case *http2.SettingsFrame:
			if !f.IsAck() {
				_ = fr.WriteSettingsAck()
			}
		case *http2.PingFrame:
			if !f.IsAck() {
				_ = fr.WritePing(true, f.Data)
			}
		case *http2.HeadersFrame:
			if script == nil {
				return
			}
			script(fr, f.StreamID)
		}
	}
}

func FuzzGRPCTimeout(f *testing.F) {
	for _, s := range []string{"1S", "99999999H", "0n", "", "S", "-1S", "123456789S", "5x"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		if d, ok := grpcTimeout(s); ok && (d < 0 || d > maxTimeout) {
			t.Errorf("%q = %v", s, d)
		}
	})
}
