package gateway

import (
	"bufio"
	"bytes"
	"encoding/base64"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"strings"
	"testing"

	"golang.org/x/net/websocket"
	"google.golang.org/protobuf/types/dynamicpb"

	"github.com/m3o/m3o"
)

func TestGRPCWebText(t *testing.T) {
	base := front(t, Config{})
	msg := "\x0a\x03Ada"
	frame := string(appendFrame(nil, 0, []byte(msg)))
	// Chunks of base64, each padded: clients encode what they have.
	body := base64.StdEncoding.EncodeToString([]byte(frame[:4])) + base64.StdEncoding.EncodeToString([]byte(frame[4:]))
	res, got := request{path: "/app/shop.v1.Helloworld/Call", body: body, header: http.Header{"Content-Type": {"application/grpc-web-text"}}}.do(t, base)
	plain, err := io.ReadAll(&base64Reader{src: strings.NewReader(got)})
	if err != nil || res.Header.Get("Content-Type") != "application/grpc-web-text+proto" {
		t.Fatalf("%v %v %q", err, res.Header, got)
	}
	if want := frame + "\x80\x00\x00\x00\x19grpc-status: 0\r\ncost: 7\r\n"; string(plain) != want {
		t.Errorf("got %q, want %q", plain, want)
	}
}

func TestWebSocket(t *testing.T) {
	base := front(t, Config{})
	dial := func(path, origin string, protocols ...string) (*websocket.Conn, error) {
		cfg, err := websocket.NewConfig("ws"+strings.TrimPrefix(base, "http")+path, origin)
		if err != nil {
			t.Fatal(err)
		}
		cfg.Protocol = protocols
		return websocket.DialConfig(cfg)
	}
	ws, err := dial("/app/shop.v1.Helloworld/Chat", base, "m3o.json", "m3o.bearer.dA")
	if err != nil {
		t.Fatal(err)
	}
	defer ws.Close() //nolint:errcheck // a test
	for i := range 3 {
		want := fmt.Sprintf(`{"count":%d}`, i+1)
		if err := websocket.Message.Send(ws, want); err != nil {
			t.Fatal(err)
		}
		var got string
		if err := websocket.Message.Receive(ws, &got); err != nil || strings.ReplaceAll(got, " ", "") != want {
			t.Fatalf("got %q %v, want %q", got, err, want)
		}
	}
	_ = websocket.Message.Send(ws, "")
	var got string
	if err := websocket.Message.Receive(ws, &got); !errors.Is(err, io.EOF) {
		t.Errorf("after the end: %q %v", got, err)
	}
	if _, err := dial("/app/shop.v1.Helloworld/Chat", "https://evil.example"); err == nil {
		t.Error("a page of another site may open a socket")
	}
}

func TestWebSocketCloses(t *testing.T) {
	base := front(t, Config{MaxMessage: 1000})
	masked := func(first byte, data string) string {
		b := []byte{first}
		if len(data) < 126 {
			b = append(b, 0x80|byte(len(data)))
		} else {
			b = binary.BigEndian.AppendUint16(append(b, 0x80|126), uint16(len(data)))
		}
		return string(append(b, 0, 0, 0, 0)) + data
	}
	for name, tc := range map[string]struct {
		path, send string
		code       uint16
		reason     string
	}{
		"the app's error":    {"Stream", masked(0x81, `{"name":"gone","count":1}`), 4005, "gone"},
		"bad JSON":           {"Chat", masked(0x81, `{"count":"x"}`), 4003, "count"},
		"strict":             {"Chat", masked(0x81, `{"nope":1}`), 4003, "nope"},
		"binary":             {"Chat", masked(0x82, `x`), wsNotText, "JSON"},
		"not UTF-8":          {"Chat", masked(0x81, "\xff"), wsNotUTF8, "UTF-8"},
		"no mask":            {"Chat", "\x81\x00", wsProtocol, "mask"},
		"reserved bits":      {"Chat", masked(0xf1, ""), wsProtocol, "unknown"},
		"too large":          {"Chat", masked(0x81, strings.Repeat("x", 2000)), wsTooBig, "large"},
		"lone continuation":  {"Chat", masked(0x80, "x"), wsProtocol, "order"},
		"close":              {"Chat", masked(0x88, "\x03\xe8"), wsOK, ""},
		"fragments and ping": {"Stream", masked(0x01, `{"name":`) + masked(0x89, "p") + masked(0x80, `"part"}`), 4005, "part"},
	} {
		t.Run(name, func(t *testing.T) {
			c, err := net.Dial("tcp", strings.TrimPrefix(base, "http://"))
			if err != nil {
				t.Fatal(err)
			}
			defer c.Close() //nolint:errcheck // a test
			base := "/app"
			if name == "strict" {
				base = "/strict"
			}
			_, _ = io.WriteString(c, "GET "+base+"/shop.v1.Helloworld/"+tc.path+" HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\n"+tc.send)
			br := bufio.NewReader(c)
			res, err := http.ReadResponse(br, nil)
			if err != nil || res.StatusCode != 101 {
				t.Fatal(err, res)
			}
			for {
				var h [2]byte
				if _, err := io.ReadFull(br, h[:]); err != nil {
					t.Fatal("no close: ", err)
				}
				data := make([]byte, h[1])
				if _, err := io.ReadFull(br, data); err != nil {
					t.Fatal(err)
				}
				if h[0] != 0x80|wsClose {
					continue
				}
				if code := binary.BigEndian.Uint16(data); code != tc.code || !strings.Contains(string(data[2:]), tc.reason) {
					t.Errorf("closed with %d %q, want %d %q", code, data[2:], tc.code, tc.reason)
				}
				return
			}
		})
	}
}

func TestCORS(t *testing.T) {
	addr, fds := app(t, false)
	g, up, file := New(Config{}), h2c(t, addr), writeSet(t, fds)
	for _, tc := range []struct {
		origins        []string
		origin, method string
		code           int
		allow          string
	}{
		{nil, "https://a.example", "OPTIONS", 403, ""},
		{nil, "https://a.example", "POST", 200, ""},
		{[]string{"https://a.example"}, "https://a.example", "OPTIONS", 204, "https://a.example"},
		{[]string{"https://a.example"}, "https://a.example", "POST", 200, "https://a.example"},
		{[]string{"https://a.example"}, "https://a.example.evil", "OPTIONS", 403, ""},
		{[]string{"https://*.a.example"}, "https://x.a.example", "OPTIONS", 204, "https://x.a.example"},
		{[]string{"https://*.a.example"}, "https://a.example", "OPTIONS", 403, ""},
		{[]string{"*"}, "https://b.example", "POST", 200, "*"},
	} {
		w := httptest.NewRecorder()
		r, _ := http.NewRequestWithContext(t.Context(), tc.method, "http://x/shop.v1.Helloworld/Call", strings.NewReader("{}"))
		r.URL.Scheme, r.URL.Host = "", ""
		r.Header.Set("Content-Type", "application/json")
		r.Header.Set("Origin", tc.origin)
		if tc.method == "OPTIONS" {
			r.Header.Set("Access-Control-Request-Method", "POST")
			r.Header.Set("Access-Control-Request-Headers", "content-type")
		}
		a := m3o.API{App: "helloworld", Schema: file, Origins: tc.origins}
		g.ServeApp(w, r, &a, up)
		if w.Code != tc.code || w.Header().Get("Access-Control-Allow-Origin") != tc.allow {
			t.Errorf("%v: %d %v", tc, w.Code, w.Header())
		}
		if tc.allow == "*" && w.Header().Get("Access-Control-Allow-Credentials") != "" {
			t.Error("any site may send credentials")
		}
		if tc.code == 200 && tc.allow != "" && !strings.Contains(w.Header().Get("Access-Control-Expose-Headers"), "Trailer-Cost") {
			t.Errorf("exposed: %q", w.Header().Get("Access-Control-Expose-Headers"))
		}
	}
}

func FuzzFrames(f *testing.F) {
	f.Add([]byte("\x00\x00\x00\x00\x02{}"), true)
	f.Add([]byte("\x01\x00\x00\x00\x00"), false)
	f.Add([]byte("\x00\xff\xff\xff\xff"), false)
	f.Add([]byte("\x00\x00\x00"), true)
	f.Fuzz(func(t *testing.T, b []byte, turn bool) {
		body := &requestBody{src: bytes.NewReader(b), most: 100, zip: "gzip"}
		if turn {
			body.turn = func(_ byte, msg []byte) ([]byte, error) { return appendFrame(nil, 0, msg), nil }
		}
		out, err := io.ReadAll(body)
		if (err == nil) != (body.fault() == nil) {
			t.Errorf("%q: %v, fault %v", b, err, body.fault())
		}
		if err == nil && !turn && !bytes.Equal(out, b) {
			t.Errorf("%q became %q", b, out)
		}
		// What was let through is whole frames.
		var tr tracker
		if err == nil {
			if _ = tr.pass(out, nil); !tr.whole() {
				t.Errorf("%q ends within a frame", out)
			}
		}
	})
}

func FuzzBase64(f *testing.F) {
	for _, s := range []string{"", "AAAA", "AA==AA==", "A", "!!!!", "AA=", "AAAA\r\nAAAA"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		if _, err := io.ReadAll(&base64Reader{src: strings.NewReader(s)}); err != nil {
			if p, ok := errors.AsType[*problem](err); !ok || p.http != 400 {
				t.Errorf("%q: %v", s, err)
			}
		}
	})
}

func FuzzSocket(f *testing.F) {
	f.Add([]byte("\x81\x80\x00\x00\x00\x00"))
	f.Add([]byte("\x01\x81\x00\x00\x00\x00a\x80\x81\x00\x00\x00\x00b"))
	f.Add([]byte("\x81\xff\xff\xff\xff\xff\xff\xff\xff\xff"))
	f.Fuzz(func(t *testing.T, b []byte) {
		a, c := net.Pipe()
		go func() { _, _ = io.Copy(io.Discard, a) }()
		s := &socket{conn: c, br: bufio.NewReader(bytes.NewReader(b)), most: 100}
		for {
			_, msg, err := s.message()
			if err != nil {
				break
			}
			if len(msg) > 200 {
				t.Errorf("a message of %d bytes", len(msg))
			}
		}
		_ = c.Close()
		_ = a.Close()
	})
}

func FuzzTemplate(f *testing.F) {
	fds, _ := compileShop(f)
	s, err := compile(fds, false)
	if err != nil {
		f.Fatal(err)
	}
	m := s.methods["/shop.v1.Helloworld/Call"]
	for _, v := range []string{"/v1/{name}", "/v1/{name=shelves/*/books/*}:publish", "/**", "/v1/{item.name=**}", "/{", "/v1/*/x", "", "/a:b"} {
		f.Add(v, "/v1/shelves/1/books/2:publish")
	}
	f.Fuzz(func(t *testing.T, template, path string) {
		b := &binding{m: m, template: template}
		if !b.parse() || !b.fits() {
			return
		}
		vals, ok := b.match(strings.Split(strings.TrimPrefix(path, "/"), "/"))
		if ok && len(vals) != len(b.vars) {
			t.Errorf("%q matches %q with %d of %d", template, path, len(vals), len(b.vars))
		}
		_ = b.openPath()
		for i, v := range b.vars {
			if ok {
				_ = set1(dynamicpb.NewMessage(m.desc.Input()), v.field, vals[i], m.types, true)
			}
		}
	})
}

func FuzzConnectQuery(f *testing.F) {
	for _, q := range []string{"connect=v1&encoding=json&message={}", "encoding=proto&base64=1&message=CgNBZGE&compression=gzip", "message=%zz", "encoding=json&message=&base64=1"} {
		f.Add(q)
	}
	g := New(Config{})
	f.Fuzz(func(t *testing.T, q string) {
		r := &http.Request{Method: "GET", Header: http.Header{}}
		r.URL = &url.URL{RawQuery: q}
		c := &unaryCall{g: g, r: r}
		if _, err := c.fromQuery(); err != nil {
			if p, ok := errors.AsType[*problem](err); !ok || p.http/100 != 4 {
				t.Errorf("%q: %v", q, err)
			}
		}
	})
}
