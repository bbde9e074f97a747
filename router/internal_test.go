package router

import (
	"context"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"strings"
	"sync"
	"testing"

	"github.com/miekg/dns"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	testpb "google.golang.org/grpc/interop/grpc_testing"
	"google.golang.org/grpc/status"

	"github.com/m3o/m3o/discovery"
)

// withInside gives a router an inside whose instances are addresses of the
// loopback network.
func withInside(t testing.TB, c *Config) {
	t.Helper()
	udp, err := net.ListenPacket("udp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = udp.Close() })
	c.Inside = &Inside{HTTP: listen(t), Names: &discovery.Names{UDP: udp, TCP: listen(t), Gateway: netip.MustParseAddr("127.0.0.1"), Log: slog.New(slog.DiscardHandler)}}
}

var insidePeers = discovery.Peers{
	Peers: []discovery.Peer{
		{ID: "web-1", App: "web", Addr: netip.MustParseAddr("127.0.1.1"), Ready: true},
		{ID: "other-1", App: "other", Addr: netip.MustParseAddr("127.0.1.2"), Ready: true},
	},
	Links: map[string][]string{"web": {"shop", "rpc", "gone", "shut"}},
}

// from is a dialer of the instance with that address, to whatever name.
func (f *fixture) from(ip string) func(ctx context.Context, _, _ string) (net.Conn, error) {
	at := f.rt.cfg.Inside.HTTP.Addr().String()
	return func(ctx context.Context, _, _ string) (net.Conn, error) {
		d := net.Dialer{LocalAddr: &net.TCPAddr{IP: net.ParseIP(ip)}}
		return d.DialContext(ctx, "tcp", at)
	}
}

func (f *fixture) insideWeb(t testing.TB, ip string, h2 bool) *http.Client {
	tr := &http.Transport{DialContext: f.from(ip), Protocols: new(http.Protocols)}
	tr.Protocols.SetHTTP1(!h2)
	tr.Protocols.SetUnencryptedHTTP2(h2)
	t.Cleanup(tr.CloseIdleConnections)
	return &http.Client{Transport: tr}
}

func (f *fixture) insideGRPC(t testing.TB, ip, app string) testpb.TestServiceClient {
	t.Helper()
	cc, err := grpc.NewClient("passthrough:///"+app+".internal:80", grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) { return f.from(ip)(ctx, "", "") }))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = cc.Close() })
	return testpb.NewTestServiceClient(cc)
}

func TestAppsCallEachOtherByRule(t *testing.T) {
	var mu sync.Mutex
	seen := map[string]http.Header{}
	shop, _ := backend(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		mu.Lock()
		seen[r.URL.Path] = r.Header.Clone()
		mu.Unlock()
		_, _ = io.WriteString(w, r.Host)
	}))
	f := start(t, func(c *Config) {
		withInside(t, c)
		c.TrustedProxies = []netip.Prefix{netip.MustParsePrefix("127.0.0.0/8")} // an instance is none, wherever it is
	})
	private, shut := appHost("shop", 1, HTTP1, shop), appHost("shut", 1, HTTP1, shop)
	private.Policy = &Policy{Private: true}
	shut.Policy = &Policy{Rules: []AccessRule{{Path: "*", Access: AllowNobody}}}
	f.put(t, private, shut)
	if err := f.client.PutPeers(t.Context(), insidePeers); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		what, from, host string
		h2               bool
		status           int
		body             string
	}{
		{"linked", "127.0.1.1", "shop.internal", false, 200, "shop.internal"},
		{"linked, with a port", "127.0.1.1", "shop.internal:80", false, 200, "shop.internal:80"},
		{"linked, HTTP/2", "127.0.1.1", "shop.internal", true, 200, "shop.internal"},
		{"not linked", "127.0.1.2", "shop.internal", false, 403, "app other may not call shop\nm3o links:add other -a shop allows it\n"},
		{"not linked, not there", "127.0.1.2", "nope.internal", false, 403, "app other may not call nope\nm3o links:add other -a nope allows it\n"},
		{"linked, not there", "127.0.1.1", "gone.internal", false, 404, "no app called \"gone\" has been released here\ngit push m3o main releases it\n"},
		{"closed to everybody", "127.0.1.1", "shut.internal", false, 403, "app shut does not allow this to anybody\nm3o access -a shut\n"},
		{"nobody's address", "127.0.1.3", "shop.internal", false, 403, "nobody is known at 127.0.1.3\nonly instances of apps call here\n"},
		{"the published host", "127.0.1.1", "shop.localhost", false, 404, "nothing is served at \"shop.localhost\" here\napps are at http://<app>.internal\n"},
		{"the API", "127.0.1.1", "internal", false, 404, "nothing is served at \"internal\" here\napps are at http://<app>.internal\n"},
		{"a deeper name", "127.0.1.1", "x.shop.internal", false, 404, "nothing is served at \"x.shop.internal\" here\napps are at http://<app>.internal\n"},
	} {
		path := "/" + strings.ReplaceAll(c.what, " ", "-")
		req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, "http://"+c.host+path, nil)
		if err != nil {
			t.Fatal(err)
		}
		// What an app says of itself counts for nothing, its words to another app do.
		for k, v := range map[string]string{"X-M3o-Caller": "app:admin", "X-M3o-Caller-Instance": "x", "X-Forwarded-For": "10.0.0.1", "X-Forwarded-Proto": "https",
			"Authorization": "Bearer for-shop", "Traceparent": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"} {
			req.Header.Set(k, v)
		}
		res, err := f.insideWeb(t, c.from, c.h2).Do(req)
		if err != nil {
			t.Errorf("%s: %v", c.what, err)
			continue
		}
		body, _ := io.ReadAll(res.Body)
		_ = res.Body.Close()
		if res.StatusCode != c.status || string(body) != c.body {
			t.Errorf("%s: %d %q, want %d %q", c.what, res.StatusCode, body, c.status, c.body)
		}
		mu.Lock()
		h := seen[path]
		mu.Unlock()
		if c.status != 200 {
			if h != nil {
				t.Errorf("%s: the app was asked all the same", c.what)
			}
			continue
		}
		for k, want := range map[string]string{"X-M3o-Caller": "app:web", "X-M3o-Caller-Instance": "web-1", "X-Forwarded-For": "127.0.1.1", "X-Forwarded-Proto": "http", "Authorization": "Bearer for-shop"} {
			if got := h[k]; len(got) != 1 || got[0] != want {
				t.Errorf("%s: %s is %q, want %q", c.what, k, got, want)
			}
		}
		if tp := h.Get("Traceparent"); !strings.HasPrefix(tp, "00-0af7651916cd43dd8448eb211c80319c-") {
			t.Errorf("%s: another trace: %s", c.what, tp)
		}
	}
	// From outside nobody gets an identity, nor to the inside.
	res, err := f.web(t, false).Get("http://shop.internal/")
	if err != nil {
		t.Fatal(err)
	}
	_ = res.Body.Close()
	if res.StatusCode != 404 {
		t.Errorf("shop.internal from outside: %s", res.Status)
	}
	// A link that goes is felt by connections that stay.
	c := f.insideWeb(t, "127.0.1.1", true)
	for _, want := range []int{200, 403} {
		res, err := c.Get("http://shop.internal/again")
		if err != nil {
			t.Fatal(err)
		}
		_ = res.Body.Close()
		if res.StatusCode != want {
			t.Errorf("%s, want %d", res.Status, want)
		}
		if err := f.client.PutPeers(t.Context(), discovery.Peers{Peers: insidePeers.Peers}); err != nil {
			t.Fatal(err)
		}
	}
}

func TestGRPCBetweenAppsIsBalancedWokenAndRefusedInItsOwnWords(t *testing.T) {
	one, _ := grpcBackend(t, "one")
	two, _ := grpcBackend(t, "two")
	f := start(t, func(c *Config) { withInside(t, c) })
	asleep := appHost("rpc", 1, GRPC)
	asleep.Asleep = true
	f.put(t, asleep)
	if err := f.client.PutPeers(t.Context(), insidePeers); err != nil {
		t.Fatal(err)
	}
	_, err := f.insideGRPC(t, "127.0.1.2", "rpc").UnaryCall(t.Context(), &testpb.SimpleRequest{})
	if s := status.Convert(err); s.Code() != codes.PermissionDenied || !strings.Contains(s.Message(), "m3o links:add other -a rpc") {
		t.Errorf("without a link: %v", err)
	}
	// The first call wakes the app.
	woken := make(chan error, 1)
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	go func() {
		for app := range f.client.Asks(ctx) {
			if app == "rpc" {
				_, err := f.client.Put(ctx, table(appHost("rpc", 1, GRPC, one, two)))
				woken <- err
				return
			}
		}
	}()
	rpc := f.insideGRPC(t, "127.0.1.1", "rpc")
	by := map[string]int{}
	for range 40 {
		res, err := rpc.UnaryCall(t.Context(), &testpb.SimpleRequest{})
		if err != nil {
			t.Fatal(err)
		}
		by[res.Username]++
	}
	if err := <-woken; err != nil {
		t.Fatal(err)
	}
	if len(by) != 2 {
		t.Errorf("40 calls over one connection went to %v, want both instances", by)
	}
}

func TestInsideIsHandedOverAndSurvivesARestart(t *testing.T) {
	shop, _ := backend(t, http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { _, _ = io.WriteString(w, "shop") }))
	f := start(t, func(c *Config) { withInside(t, c) })
	f.put(t, appHost("shop", 1, HTTP1, shop))
	if err := f.client.PutPeers(t.Context(), insidePeers); err != nil {
		t.Fatal(err)
	}
	at := f.rt.cfg.Inside.Names.UDP.LocalAddr().String()
	check := func(when string, c *http.Client) {
		t.Helper()
		res, err := c.Get("http://shop.internal/")
		if err != nil {
			t.Fatalf("%s: %v", when, err)
		}
		_ = res.Body.Close()
		if res.StatusCode != 200 {
			t.Errorf("%s: %s", when, res.Status)
		}
		d := dns.Client{Dialer: &net.Dialer{LocalAddr: &net.UDPAddr{IP: net.IPv4(127, 0, 1, 1)}}}
		m, _, err := d.Exchange(new(dns.Msg).SetQuestion("shop.internal.", dns.TypeA), at)
		if err != nil || len(m.Answer) != 1 {
			t.Errorf("%s: the name: %v, %v", when, m, err)
		}
	}
	open := f.insideWeb(t, "127.0.1.1", false)
	check("before", open)
	// The next router knows who is where from the file of this one.
	next := f.successor(t)
	if err := f.client.Retire(t.Context(), 0); err != nil {
		t.Fatal(err)
	}
	wait(t, "the old router to end", func() bool { _, err := f.client.Status(t.Context()); return err != nil })
	check("after, by a new connection", next.insideWeb(t, "127.0.1.1", true))
	check("after, by the client of before", open)
}
