package router

import (
	"bufio"
	"context"
	"crypto/tls"
	"io"
	"net"
	"net/http"
	"strings"
	"testing"
	"time"

	"golang.org/x/net/websocket"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	testpb "google.golang.org/grpc/interop/grpc_testing"
	"google.golang.org/grpc/status"
)

// open is a service whose server streams stay open after the first message.
type open struct {
	service
	end <-chan struct{}
}

func (s open) StreamingOutputCall(_ *testpb.StreamingOutputCallRequest, out grpc.ServerStreamingServer[testpb.StreamingOutputCallResponse]) error {
	if err := out.Send(&testpb.StreamingOutputCallResponse{Payload: payload(1)}); err != nil {
		return err
	}
	select {
	case <-s.end:
	case <-out.Context().Done():
	}
	return nil
}

// dialTLS is dial at the router's TLS port.
func (f *fixture) dialTLS(t testing.TB, host string) testpb.TestServiceClient {
	t.Helper()
	cc, err := grpc.NewClient("passthrough:///"+host, grpc.WithTransportCredentials(credentials.NewTLS(&tls.Config{RootCAs: f.roots, ServerName: host})),
		grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) {
			var d net.Dialer
			return d.DialContext(ctx, "tcp", f.https)
		}))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = cc.Close() })
	return testpb.NewTestServiceClient(cc)
}

// What is open when its release is gone ends in its protocol's own words, on
// every way in: no client sees a reset.
func TestDrainEndsEveryStreamInItsOwnWords(t *testing.T) {
	end := make(chan struct{})
	t.Cleanup(func() { close(end) })
	web, _ := backend(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/ws" {
			websocket.Handler(func(ws *websocket.Conn) { _, _ = io.Copy(ws, ws) }).ServeHTTP(w, r)
			return
		}
		w.Header().Set("Content-Type", "text/event-stream")
		_, _ = io.WriteString(w, "data: x\n\n")
		w.(http.Flusher).Flush()
		select {
		case <-end:
		case <-r.Context().Done():
		}
	}))
	ln := listen(t)
	srv := grpc.NewServer()
	testpb.RegisterTestServiceServer(srv, open{service{name: "v1"}, end})
	served := make(chan struct{})
	go func() { defer close(served); _ = srv.Serve(ln) }()
	t.Cleanup(func() { srv.Stop(); <-served })
	f := start(t, withGateway)
	schema := testSchema(t)
	hosts := func(n int) []Host {
		rpc := appHost("rpc", n, GRPC, ln.Addr().String())
		rpc.Descriptors = schema
		return []Host{rpc, appHost("web", n, HTTP1, web), appHost("h2", n, H2C, web)}
	}
	f.put(t, hosts(1)...)

	type ending struct {
		what  string
		check func(t *testing.T)
	}
	var endings []ending
	later := func(what string, check func(t *testing.T)) { endings = append(endings, ending{what, check}) }

	for name, c := range map[string]testpb.TestServiceClient{"h2c": f.dial(t, "rpc.localhost"), "TLS": f.dialTLS(t, "rpc.localhost")} {
		quiet, err := c.FullDuplexCall(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		in := &testpb.StreamingOutputCallRequest{Payload: payload(1)}
		if err := quiet.Send(in); err != nil {
			t.Fatal(err)
		}
		if _, err := quiet.Recv(); err != nil {
			t.Fatal(err)
		}
		busy, err := c.StreamingInputCall(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		sent := make(chan struct{})
		go func() {
			defer close(sent)
			for busy.Send(&testpb.StreamingInputCallRequest{Payload: payload(1000)}) == nil { // until it is told
			}
		}()
		later("gRPC, "+name+", quiet client", func(t *testing.T) {
			if _, err := quiet.Recv(); status.Code(err) != codes.Unavailable || !strings.Contains(err.Error(), "replaced") {
				t.Error(err)
			}
		})
		later("gRPC, "+name+", busy client", func(t *testing.T) {
			<-sent
			if err := busy.RecvMsg(new(testpb.StreamingInputCallResponse)); status.Code(err) != codes.Unavailable || !strings.Contains(err.Error(), "replaced") {
				t.Error(err)
			}
		})
	}
	for _, way := range []struct {
		name, scheme string
		h2           bool
	}{{"h1", "http", false}, {"h2c", "http", true}, {"h1 over TLS", "https", false}, {"h2", "https", true}} {
		c := f.web(t, way.h2)
		stream := func(what, method, url string, body []byte, header map[string]string, want string) {
			t.Helper()
			req := request1(t, method, way.scheme+"://"+url, strings.NewReader(string(body)))
			for k, v := range header {
				req.Header.Set(k, v)
			}
			res, err := c.Do(req)
			if err != nil {
				t.Fatal(err)
			}
			br := bufio.NewReader(res.Body)
			if _, err := br.Peek(1); err != nil { // the stream is open
				t.Fatal(err)
			}
			later(what+", "+way.name, func(t *testing.T) {
				b, err := io.ReadAll(br)
				_ = res.Body.Close()
				if err != nil || !strings.Contains(string(b), want) {
					t.Errorf("%q, %v; want %q", b, err, want)
				}
			})
		}
		stream("event stream of an HTTP/1.1 app", "GET", "web.localhost/", nil, nil, "data: x\n\n")
		stream("event stream of an HTTP/2 app", "GET", "h2.localhost/", nil, nil, "data: x\n\n")
		call := "rpc.localhost" + testService + "StreamingOutputCall"
		in := message(t, &testpb.StreamingOutputCallRequest{})
		stream("Connect", "POST", call, in, map[string]string{"Content-Type": "application/connect+proto"}, `"code":"unavailable"`)
		stream("gRPC-Web", "POST", call, in, map[string]string{"Content-Type": "application/grpc-web+proto"}, "grpc-status: 14\r\n")
		stream("lines of JSON", "POST", call, []byte("{}"), map[string]string{"Content-Type": "application/json"}, `{"error":`)
		stream("events of JSON", "POST", call, []byte("{}"), map[string]string{"Content-Type": "application/json", "Accept": "text/event-stream"}, "event: error\n")
	}
	for _, way := range []struct{ name, host, path, hello string }{
		{"WebSocket", "web.localhost", "/ws", "hi"}, {"WebSocket of the gateway", "rpc.localhost", testService + "FullDuplexCall", `{"payload":{"body":"aGk="}}`},
	} {
		for _, secure := range []bool{false, true} {
			addr := f.http
			if secure {
				addr = f.https
			}
			nc, _ := raw(t, addr)
			name := way.name
			if secure {
				name += ", TLS"
				nc = tls.Client(nc, &tls.Config{RootCAs: f.roots, ServerName: way.host})
			}
			cfg, err := websocket.NewConfig("ws://"+way.host+way.path, "http://"+way.host)
			if err != nil {
				t.Fatal(err)
			}
			ws, err := websocket.NewClient(cfg, nc)
			if err != nil {
				t.Fatal(err)
			}
			var got string
			if err := websocket.Message.Send(ws, way.hello); err != nil {
				t.Fatal(err)
			}
			if err := websocket.Message.Receive(ws, &got); err != nil {
				t.Fatal(err)
			}
			later(name, func(t *testing.T) {
				b, err := io.ReadAll(nc)
				if len(b) < 4 || b[0] != 0x88 {
					t.Fatalf("%x, %v, want a close frame", b, err)
				}
				if code := int(b[2])<<8 | int(b[3]); code != 1001 && code != 1012 && code != 1013 {
					t.Errorf("close %d %q, want one that says to come again", code, b[4:])
				}
			})
		}
	}
	f.put(t, hosts(2)...)
	for _, app := range []string{"rpc", "web", "h2"} {
		ctx, cancel := context.WithTimeout(t.Context(), time.Millisecond)
		if d, err := f.client.Drain(ctx, app, 1); err != nil || d.Cut != d.Waited || d.Cut == 0 {
			t.Errorf("drain %s: %+v, %v", app, d, err)
		}
		cancel()
	}
	for _, e := range endings {
		t.Run(e.what, e.check)
	}
}
