package main

import (
	"bufio"
	"context"
	"crypto/tls"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/net/websocket"
)

// echo gives hello-http a WebSocket that sends back what comes, without a
// dependency: frames go back as they are, less their mask.
const echo = `package main

import (
	"crypto/sha1"
	"encoding/base64"
	"io"
	"net/http"
)

func echo(w http.ResponseWriter, r *http.Request) {
	c, brw, err := http.NewResponseController(w).Hijack()
	if err != nil {
		return
	}
	defer c.Close()
	sum := sha1.Sum([]byte(r.Header.Get("Sec-WebSocket-Key") + "258EAFA5-E914-47DA-95CA-C5AB0DC85B11"))
	_, _ = io.WriteString(c, "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Accept: "+base64.StdEncoding.EncodeToString(sum[:])+"\r\n\r\n")
	for {
		head := make([]byte, 6)
		if _, err := io.ReadFull(brw, head); err != nil {
			return
		}
		msg := make([]byte, head[1]&0x7f)
		if _, err := io.ReadFull(brw, msg); err != nil {
			return
		}
		for i := range msg {
			msg[i] ^= head[2+i%4]
		}
		if _, err := c.Write(append([]byte{head[0], byte(len(msg))}, msg...)); err != nil {
			return
		}
	}
}
`

// What is open while a deploy replaces the release ends by its own protocol's
// good-bye once the time to drain is over, on every way in, and never by a reset.
func TestDeployEndsOpenStreamsByTheirOwnGoodBye(t *testing.T) {
	b := theBox(t)
	p := b.user(t, "gaby")
	rpc, web := p.clone(t, "hello-grpc", "byerpc"), p.clone(t, "hello-http", "byeweb")
	main := filepath.Join(web, "main.go")
	src, err := os.ReadFile(main)
	if err != nil {
		t.Fatal(err)
	}
	with := strings.Replace(string(src), `mux.HandleFunc("GET /stream", stream)`, `mux.HandleFunc("GET /stream", stream); mux.HandleFunc("GET /echo", echo)`, 1)
	for name, text := range map[string]string{main: with, filepath.Join(web, "echo.go"): echo} {
		if err := os.WriteFile(name, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	setVersion(t, p, web, "one")
	for _, dir := range []string{rpc, web} {
		if out, err := p.push(dir); err != nil {
			t.Fatalf("push: %v\n%s", err, out)
		}
	}

	roots := b.client(t).Transport.(*http.Transport).TLSClientConfig.RootCAs
	client := func(secure, h2 bool) *http.Client {
		tr := &http.Transport{TLSClientConfig: &tls.Config{RootCAs: roots}, Protocols: new(http.Protocols),
			DialContext: func(ctx context.Context, n, _ string) (net.Conn, error) {
				addr := b.http
				if secure {
					addr = b.https
				}
				return (&net.Dialer{}).DialContext(ctx, n, addr)
			}}
		tr.Protocols.SetHTTP1(!h2)
		tr.Protocols.SetHTTP2(h2)
		tr.Protocols.SetUnencryptedHTTP2(h2)
		t.Cleanup(tr.CloseIdleConnections)
		return &http.Client{Transport: tr}
	}
	endings := map[string]func(t *testing.T){}
	open := func(what string, secure, h2 bool, app, path, body string, header map[string]string, ended func(res *http.Response, rest string) bool) {
		t.Helper()
		scheme, method := "http", "GET"
		if secure {
			scheme, what = "https", what+", TLS"
		}
		if h2 {
			what += ", HTTP/2"
		}
		if body != "" {
			method = "POST"
		}
		req, err := http.NewRequestWithContext(t.Context(), method, scheme+"://"+app+".localhost"+path, strings.NewReader(body))
		if err != nil {
			t.Fatal(err)
		}
		for k, v := range header {
			req.Header.Set(k, v)
		}
		res, err := client(secure, h2).Do(req)
		if err != nil {
			t.Fatalf("%s: %v", what, err)
		}
		br := bufio.NewReader(res.Body)
		if _, err := br.Peek(1); err != nil || res.StatusCode != 200 {
			t.Fatalf("%s: %s, %v", what, res.Status, err)
		}
		endings[what] = func(t *testing.T) {
			rest, err := io.ReadAll(br)
			_ = res.Body.Close()
			if tail := rest[max(0, len(rest)-300):]; err != nil || !ended(res, string(rest)) {
				t.Errorf("it ended with %q, %v; trailers %v", tail, err, res.Trailer)
			}
		}
	}
	has := func(s string) func(*http.Response, string) bool {
		return func(_ *http.Response, rest string) bool { return strings.Contains(rest, s) }
	}
	const watch = "/helloworld.Greeter/Watch"
	const binary = "\x00\x00\x00\x00\x04\x10\xa0\x8d\x06" // count: 100000
	const text = `{"count":100000}`
	for _, secure := range []bool{false, true} {
		open("gRPC", secure, true, "byerpc", watch, binary, map[string]string{"Content-Type": "application/grpc", "Te": "trailers"},
			func(res *http.Response, _ string) bool {
				return res.Trailer.Get("Grpc-Status") == "14" && strings.Contains(res.Trailer.Get("Grpc-Message"), "replaced")
			})
		for _, h2 := range []bool{false, true} {
			open("event stream", secure, h2, "byeweb", "/stream?count=100000", "", nil,
				func(_ *http.Response, rest string) bool { return strings.HasSuffix(rest, "\n\n") })
			open("Connect", secure, h2, "byerpc", watch, "\x00\x00\x00\x00\x10"+text, map[string]string{"Content-Type": "application/connect+json"}, has(`"code":"unavailable"`))
			open("gRPC-Web", secure, h2, "byerpc", watch, binary, map[string]string{"Content-Type": "application/grpc-web+proto"}, has("grpc-status: 14\r\n"))
			open("lines of JSON", secure, h2, "byerpc", watch, text, map[string]string{"Content-Type": "application/json"}, has(`{"error":`))
			open("events of JSON", secure, h2, "byerpc", watch, text, map[string]string{"Content-Type": "application/json", "Accept": "text/event-stream"}, has("event: error\n"))
		}
		for app, path := range map[string]string{"byeweb": "/echo", "byerpc": watch} {
			addr := b.http
			if secure {
				addr = b.https
			}
			c, err := net.Dial("tcp", addr)
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { _ = c.Close() })
			if secure {
				c = tls.Client(c, &tls.Config{RootCAs: roots, ServerName: app + ".localhost"})
			}
			cfg, err := websocket.NewConfig("ws://"+app+".localhost"+path, "http://"+app+".localhost")
			if err != nil {
				t.Fatal(err)
			}
			ws, err := websocket.NewClient(cfg, c)
			if err != nil {
				t.Fatalf("%s%s: %v", app, path, err)
			}
			var got string
			if err := websocket.Message.Send(ws, text); err != nil {
				t.Fatal(err)
			}
			if err := websocket.Message.Receive(ws, &got); err != nil {
				t.Fatal(err)
			}
			what := "WebSocket of " + app
			if secure {
				what += ", TLS"
			}
			endings[what] = func(t *testing.T) {
				for {
					head := make([]byte, 2)
					if _, err := io.ReadFull(c, head); err != nil {
						t.Fatalf("no close frame: %v", err)
					}
					msg := make([]byte, head[1]&0x7f) // none is long
					if _, err := io.ReadFull(c, msg); err != nil {
						t.Fatal(err)
					}
					if head[0] != 0x88 {
						continue
					}
					if len(msg) < 2 || msg[0] != 1001>>8 || msg[1] != 1001&0xff {
						t.Errorf("the close frame says %x, want 1001", msg)
					}
					return
				}
			}
		}
	}
	setVersion(t, p, web, "two")
	p.must(t, rpc, "git", "commit", "-q", "--allow-empty", "-m", "again")
	for _, dir := range []string{web, rpc} {
		if out, err := p.push(dir); err != nil {
			t.Fatalf("push: %v\n%s", err, out)
		}
	}
	for what, check := range endings {
		t.Run(what, check)
	}
	if _, body := b.get(t, "byeweb", "/"); strings.TrimSpace(body) != "two" {
		t.Errorf("the app answers %q", body)
	}
	for dir, app := range map[string]string{rpc: "byerpc", web: "byeweb"} {
		p.must(t, dir, "m3o", "destroy", "--confirm", app)
	}
}
