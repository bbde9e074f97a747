package router

import (
	"bufio"
	"bytes"
	"encoding/json"
	"fmt"
	"net/http"
	"net/netip"
	"strings"
	"testing"
)

// told is what an app learns of where a request came from.
func told(t *testing.T, f *fixture, prefix string, header http.Header) http.Header {
	t.Helper()
	c, br := raw(t, f.http)
	var h strings.Builder
	if err := header.Write(&h); err != nil {
		t.Fatal(err)
	}
	send(t, c, "%sGET / HTTP/1.1\r\nHost: one.localhost\r\n%s\r\n", prefix, h.String())
	res, err := http.ReadResponse(br, nil)
	if err != nil {
		t.Fatal(err)
	}
	defer res.Body.Close() //nolint:errcheck // a test
	var got http.Header
	if err := json.NewDecoder(res.Body).Decode(&got); err != nil {
		t.Fatalf("%s: %v", res.Status, err)
	}
	return got
}

func headers(t *testing.T) string {
	addr, _ := backend(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { _ = json.NewEncoder(w).Encode(r.Header) }))
	return addr
}

const goodTrace = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"

func TestForgedOriginIsReplaced(t *testing.T) {
	f := start(t)
	f.put(t, appHost("one", 1, HTTP1, headers(t)))
	got := told(t, f, "", http.Header{"X-Forwarded-For": {"6.6.6.6"}, "X-Forwarded-Proto": {"https"}, "X-Forwarded-Host": {"evil"}, "Forwarded": {"for=6.6.6.6"},
		"X-Real-Ip": {"6.6.6.6"}, "X-M3o-User": {"root"}, "X-Forwarded-User": {"root"}, "Traceparent": {"00-zz"}, "Tracestate": {"a=b"}})
	for k, want := range map[string]string{"X-Forwarded-For": "127.0.0.1", "X-Forwarded-Proto": "http", "X-Forwarded-Host": "one.localhost",
		"Forwarded": "", "X-Real-Ip": "", "X-M3o-User": "", "X-Forwarded-User": "", "Tracestate": ""} {
		if v := strings.Join(got[k], "|"); v != want {
			t.Errorf("%s = %q, want %q", k, v, want)
		}
	}
	if tp := got.Get("Traceparent"); !validTrace(tp) {
		t.Errorf("Traceparent %q was not made anew", tp)
	}
	if len(got.Get("X-Request-Id")) != 32 {
		t.Errorf("X-Request-Id %q", got.Get("X-Request-Id"))
	}
	got = told(t, f, "", http.Header{"Traceparent": {goodTrace}, "Tracestate": {"a=b"}, "X-Request-Id": {"mine-1"}})
	if got.Get("Traceparent") != goodTrace || got.Get("Tracestate") != "a=b" || got.Get("X-Request-Id") != "mine-1" {
		t.Errorf("a caller's own trace was not passed on: %v", got)
	}
	res, body := do(t, f.web(t, false), func() *http.Request {
		r := request1(t, "GET", "http://nope.localhost/", nil)
		r.Header.Set("Accept", "text/html")
		r.Header.Set("X-Request-Id", "mine-2")
		return r
	}())
	if res.Header.Get("X-Request-Id") != "mine-2" || !strings.Contains(body, "request mine-2") {
		t.Errorf("the router's own answer does not name the request: %v %q", res.Header, body)
	}
}

func TestTrustedProxySaysWhomItSpeaksFor(t *testing.T) {
	f := start(t, func(c *Config) {
		c.TrustedProxies = []netip.Prefix{netip.MustParsePrefix("127.0.0.0/8"), netip.MustParsePrefix("10.0.0.0/8")}
	})
	f.put(t, appHost("one", 1, HTTP1, headers(t)))
	for forwarded, want := range map[string]string{"": "127.0.0.1", "192.0.2.7": "192.0.2.7", "6.6.6.6, 192.0.2.7, 10.1.1.1": "192.0.2.7",
		"6.6.6.6, garbage, 10.1.1.1": "10.1.1.1", "10.1.1.1": "10.1.1.1", "::ffff:192.0.2.7": "192.0.2.7"} {
		got := told(t, f, "", http.Header{"X-Forwarded-For": {forwarded}, "X-Forwarded-Proto": {"https"}})
		if ip := got.Get("X-Forwarded-For"); ip != want || got.Get("X-Forwarded-Proto") != "https" {
			t.Errorf("%q makes %q %q, want %q https", forwarded, ip, got.Get("X-Forwarded-Proto"), want)
		}
	}
}

func v2(command, family byte, rest ...byte) string {
	return string(proxyV2Sig) + string([]byte{0x20 | command, family, 0, byte(len(rest))}) + string(rest)
}

func TestProxyProtocol(t *testing.T) {
	f := start(t, func(c *Config) {
		c.ProxyProtocol, c.TrustedProxies = true, []netip.Prefix{netip.MustParsePrefix("127.0.0.1/32")}
	})
	f.put(t, appHost("one", 1, HTTP1, headers(t)))
	for head, want := range map[string]string{
		"PROXY TCP4 192.0.2.1 192.0.2.2 5000 80\r\n":                     "192.0.2.1",
		"PROXY TCP6 2001:db8::1 2001:db8::2 5000 80\r\n":                 "2001:db8::1",
		"PROXY UNKNOWN\r\n":                                              "127.0.0.1",
		v2(1, 0x11, 192, 0, 2, 3, 192, 0, 2, 2, 0x10, 0, 0, 80):          "192.0.2.3",
		v2(1, 0x11, 192, 0, 2, 3, 192, 0, 2, 2, 0x10, 0, 0, 80, 4, 0, 0): "192.0.2.3", // with a TLV
		v2(0, 0): "127.0.0.1",
	} {
		if got := told(t, f, head, nil).Get("X-Forwarded-For"); got != want {
			t.Errorf("%q: the app learns %q, want %q", head, got, want)
		}
	}
	for _, head := range []string{"", "PROXY\r\n", "PROXY TCP4 1.1.1.1 2.2.2.2 80\r\n", "PROXY TCP4 ::1 ::1 1 1\r\n", "PROXY TCP4 1.1.1.1 2.2.2.2 99999 80\r\n",
		"PROXY TCP4 " + strings.Repeat("1", 200) + "\r\n", "PROXY UNKNOWN\n", v2(2, 0x11), v2(1, 0x11, 1, 2, 3)} {
		c, br := raw(t, f.http)
		send(t, c, "%sGET / HTTP/1.1\r\nHost: one.localhost\r\n\r\n", head)
		if res, err := http.ReadResponse(br, nil); err == nil && res.StatusCode != 400 {
			t.Errorf("%q was served: %s", head, res.Status)
		}
	}
}

func FuzzProxyHead(f *testing.F) {
	for _, s := range []string{"PROXY TCP4 192.0.2.1 192.0.2.2 5000 80\r\n", "PROXY UNKNOWN x\r\n", v2(1, 0x21, make([]byte, 36)...), v2(0, 0)} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		br := bufio.NewReaderSize(bytes.NewReader(append(b, "GET"...)), 1024)
		ap, err := readProxyHead(br)
		if err == nil && ap.IsValid() && !ap.Addr().IsValid() {
			t.Errorf("%q gives %v", b, ap)
		}
	})
}

func FuzzTrace(f *testing.F) {
	f.Add(goodTrace)
	f.Add("cc" + goodTrace[2:] + "-more")
	f.Fuzz(func(t *testing.T, s string) {
		var v, fl byte
		var id, parent string
		if !validTrace(s) {
			return
		}
		if n, err := fmt.Sscanf(strings.ReplaceAll(s[:55], "-", " "), "%02x %s %s %02x", &v, &id, &parent, &fl); n != 4 || err != nil || len(id) != 32 || len(parent) != 16 {
			t.Errorf("%q was taken: %v", s, err)
		}
	})
}
