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
)

// An app may answer what it has not read to its end: a refusal, or a JSON
// decoder that stops at the closing brace. The router's process used to die of
// it over HTTP/1.1 ("invalid concurrent Body.Read call"), or the client's next
// request on the connection was lost.
func TestAnswerBeforeTheBodysEndCostsNoOtherRequest(t *testing.T) {
	early, _ := backend(t, http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { _, _ = io.WriteString(w, "early") }))
	f := start(t)
	f.put(t, appHost("h1", 1, HTTP1, early), appHost("h2", 1, H2C, early))
	f.ways(t, func(t *testing.T, c *http.Client, scheme string) {
		for _, host := range []string{"h1", "h2"} {
			for _, size := range []int{1, 9_000, 50_000, 400_000} {
				for range 15 {
					// Without a length: it goes on while it is answered.
					body := io.MultiReader(strings.NewReader(strings.Repeat("x", size)))
					if res, b := do(t, c, request1(t, "POST", scheme+"://"+host+".localhost/", body)); res.StatusCode != 200 || b != "early" {
						t.Fatalf("%s, %d bytes: %s %q", host, size, res.Status, b)
					}
				}
			}
		}
	})
}

// What is left of a body must not be read as a request.
func TestRestOfABodyNobodyReadIsNoRequest(t *testing.T) {
	early := liar(t, func(c net.Conn, _ string) { _, _ = io.WriteString(c, "HTTP/1.1 413 No\r\nContent-Length: 2\r\n\r\nno") })
	silent := liar(t, func(net.Conn, string) {})
	h2, _ := backend(t, http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { _, _ = io.WriteString(w, "ok") }))
	f := start(t)
	f.put(t, appHost("early", 1, HTTP1, early), appHost("silent", 1, HTTP1, silent), appHost("h2", 1, H2C, h2))
	for host, want := range map[string]string{"early": "413", "silent": "502", "h2": "200"} {
		c, br := raw(t, f.http)
		send(t, c, "POST / HTTP/1.1\r\nHost: %s.localhost\r\nContent-Length: 100000\r\n\r\n0123456789", host)
		head, err := br.ReadString('\n')
		if err != nil || !strings.Contains(head, want) {
			t.Fatalf("%s: %q, %v", host, head, err)
		}
		_, _ = fmt.Fprint(c, "GET /smuggled HTTP/1.1\r\nHost: h2.localhost\r\n\r\n") // may be too late
		rest, _ := io.ReadAll(br)
		if s := string(rest); strings.Contains(s, "HTTP/1.1 ") || !strings.Contains(s, "Connection: close\r\n") {
			t.Errorf("%s: the rest of the body was answered too: %q", host, s)
		}
	}
}

func TestAppThatEndsDuringAnUploadIsNotTheClientsFault(t *testing.T) {
	dies := liar(t, func(net.Conn, string) {})
	hangs, _ := backend(t, http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) { _, _ = io.Copy(io.Discard, r.Body) }))
	crashes, _ := backend(t, http.HandlerFunc(func(http.ResponseWriter, *http.Request) { panic(http.ErrAbortHandler) }))
	f := start(t)
	release := 1
	hosts := func() []Host {
		return []Host{appHost("dies", release, HTTP1, dies), appHost("crashes", release, H2C, crashes), appHost("h1", release, HTTP1, hangs), appHost("h2", release, H2C, hangs)}
	}
	f.put(t, hosts()...)
	f.ways(t, func(t *testing.T, c *http.Client, scheme string) {
		upload := func(host string) (*http.Response, string) {
			pr, pw := io.Pipe() // a client that has not sent all
			t.Cleanup(func() { _ = pw.Close() })
			go func() { _, _ = pw.Write([]byte("part")) }()
			return do(t, c, request1(t, "POST", scheme+"://"+host+".localhost/", pr))
		}
		for _, host := range []string{"dies", "crashes"} {
			if res, b := upload(host); res.StatusCode != 502 {
				t.Errorf("%s: %s %q, want 502", host, res.Status, b)
			}
		}
		for _, host := range []string{"h1", "h2"} {
			type answer struct {
				code int
				body string
			}
			got := make(chan answer, 1)
			go func() {
				res, b := upload(host)
				got <- answer{res.StatusCode, b}
			}()
			wait(t, "the upload", func() bool { return inFlight(t, f, host) == 1 })
			old := release
			release++
			f.put(t, hosts()...)
			now, cancel := context.WithTimeout(t.Context(), time.Nanosecond)
			if d, err := f.rt.Drain(now, host, old); err != nil || d.Cut != 1 {
				t.Errorf("drain %s: %+v, %v", host, d, err)
			}
			cancel()
			if a := <-got; a.code != 503 || !strings.Contains(a.body, "replaced") {
				t.Errorf("%s was replaced: %+v, want 503", host, a)
			}
		}
	})
}
