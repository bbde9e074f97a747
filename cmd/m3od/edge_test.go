package main

import (
	"io"
	"net/http"
	"strings"
	"sync"
	"testing"
)

// An upgrade of m3od brings a new router, which takes the sockets over.
func TestUpgradeTakesOverTheRouterAndFailsNoRequest(t *testing.T) {
	b := theBox(t)
	p := b.user(t, "uma")
	dir := p.clone(t, "hello-http", "upgraded")
	if out, err := p.push(dir); err != nil {
		t.Fatalf("push: %v\n%s", err, out)
	}
	unary := startProbe(t, b, "upgraded", "/")
	streams := startProbe(t, b, "upgraded", "/stream?count=20")
	for _, env := range [][]string{{asVersion + "=next", "M3O_HANDOVER=3s"}, {"M3O_HANDOVER=3s"}} { // and back
		old := b.pids("router", "--data")
		b.kill()
		if err := b.start(env...); err != nil {
			t.Fatal(err)
		}
		eventually(t, "the old router is gone and another one there", func() bool {
			now := b.pids("router", "--data")
			return len(now) == 1 && now[0] != old[0]
		})
	}
	n, bad := unary.stop()
	sn, sbad := streams.stop()
	t.Logf("two upgrades: %d of %d requests and %d of %d streams failed", bad, n, sbad, sn)
	if bad+sbad != 0 || n < 50 || sn < 5 {
		t.Errorf("%d of %d requests failed: %s; %d of %d streams: %s", bad, n, unary.first, sbad, sn, streams.first)
	}
	setVersion(t, p, dir, "after")
	if out, err := p.push(dir); err != nil {
		t.Errorf("push after the upgrades: %v\n%s", err, out)
	}
	if _, body := b.get(t, "upgraded", "/"); strings.TrimSpace(body) != "after" {
		t.Errorf("the app answers %q, want after", body)
	}
	p.must(t, dir, "m3o", "destroy", "--confirm", "upgraded")
}

func TestHostsOfAnApp(t *testing.T) {
	b := theBox(t)
	p, other := b.user(t, "dom"), b.user(t, "nico")
	dir := p.clone(t, "hello-http", "hosted")
	setVersion(t, p, dir, "one")
	if out, err := p.push(dir); err != nil {
		t.Fatalf("push: %v\n%s", err, out)
	}
	p.must(t, dir, "m3o", "domains:add", "hosted.test", "--www")
	get := func(host string) (int, string, string) {
		t.Helper()
		req, err := http.NewRequestWithContext(t.Context(), "GET", b.url("hosted", "/"), nil)
		if err != nil {
			t.Fatal(err)
		}
		req.URL.Scheme, req.URL.Host, req.Host = "http", b.http, host
		res, err := (&http.Transport{DisableKeepAlives: true}).RoundTrip(req)
		if err != nil {
			t.Fatal(err)
		}
		defer res.Body.Close() //nolint:errcheck // a test
		body, err := io.ReadAll(res.Body)
		if err != nil {
			t.Fatal(err)
		}
		return res.StatusCode, strings.TrimSpace(string(body)), res.Header.Get("Location")
	}
	eventually(t, "the app answers at its domain", func() bool { code, body, _ := get("hosted.test"); return code == 200 && body == "one" })
	if code, _, to := get("www.hosted.test"); code != 308 || !strings.HasPrefix(to, "http://hosted.test") {
		t.Errorf("www: %d to %q", code, to)
	}
	if out := p.must(t, dir, "m3o", "domains"); !strings.Contains(out, "www.hosted.test") || !strings.Contains(out, "→ hosted.test") {
		t.Errorf("domains:\n%s", out)
	}
	p.must(t, dir, "m3o", "domains:wait", "hosted.test", "--timeout", "20s")
	odir := other.clone(t, "hello-http", "thief")
	if out, err := other.push(odir); err != nil {
		t.Fatalf("push: %v\n%s", err, out)
	}
	if out, err := other.try(odir, "m3o", "domains:add", "shop.hosted.test"); err == nil || !strings.Contains(out, "another owner") {
		t.Errorf("another's domain: %v\n%s", err, out)
	}
	if out, err := other.try(odir, "m3o", "domains:remove", "hosted.test", "-a", "hosted"); err == nil {
		t.Errorf("a stranger removed a domain:\n%s", out)
	}

	// Every kept release has a host of its own.
	setVersion(t, p, dir, "two")
	if out, err := p.push(dir); err != nil {
		t.Fatalf("push: %v\n%s", err, out)
	}
	eventually(t, "the live release's own host", func() bool { code, body, _ := get("v2--hosted.localhost"); return code == 200 && body == "two" })
	shims := func() int { return len(b.pids("m3o-shim", "-id hosted-")) }
	eventually(t, "the old release has stopped", func() bool { return shims() == 1 })
	var first sync.WaitGroup
	for range 10 {
		first.Go(func() {
			if code, body, _ := get("v1--hosted.localhost"); code != 200 || body != "one" {
				t.Errorf("an old release's host: %d %q", code, body)
			}
		})
	}
	first.Wait()
	if n := shims(); n != 2 {
		t.Errorf("%d instances run after requests for v1, want one of each release", n)
	}
	if code, body, _ := get("hosted.test"); code != 200 || body != "two" {
		t.Errorf("after requests for v1 the app answers %d %q", code, body)
	}
	p.must(t, dir, "m3o", "releases:canary", "v1", "--percent", "0")
	if code, body, _ := get("v1--hosted.localhost"); code != 200 || body != "one" {
		t.Errorf("the canary's own host: %d %q", code, body)
	}
	p.must(t, dir, "m3o", "releases:abort")
	if code, body, _ := get("v1--hosted.localhost"); code != 200 || body != "one" {
		t.Errorf("the host of a release that was the canary: %d %q", code, body)
	}
	p.must(t, dir, "m3o", "ps:sleep", "--after", "1s")
	b.kill() // a new daemon stops what is not live; requests start it again
	if err := b.start(); err != nil {
		t.Fatal(err)
	}
	eventually(t, "everything sleeps", func() bool { return shims() == 0 })
	if code, body, _ := get("v1--hosted.localhost"); code != 200 || body != "one" {
		t.Errorf("an old release's host, again: %d %q", code, body)
	}
	eventually(t, "the old release is stopped when it is not used", func() bool { return shims() == 0 })
	if code, body, _ := get("v2--hosted.localhost"); code != 200 || body != "two" {
		t.Errorf("the live release's own host while it sleeps: %d %q", code, body)
	}
	p.must(t, dir, "m3o", "ps:sleep", "--never")
	p.must(t, dir, "m3o", "storage:create", "data")
	p.must(t, dir, "m3o", "storage:mount", "data", "/data")
	if code, body, _ := get("v1--hosted.localhost"); code != 503 || !strings.Contains(body, "web has a volume") {
		t.Errorf("an old release that may not run beside the live one: %d %q", code, body)
	}

	p.must(t, dir, "m3o", "maintenance:on")
	if code, body, _ := get("hosted.test"); code != 503 || !strings.Contains(body, "maintenance") {
		t.Errorf("in maintenance: %d %q", code, body)
	}
	p.must(t, dir, "m3o", "maintenance:off")
	p.must(t, dir, "m3o", "pause")
	held := make(chan struct{})
	go func() {
		defer close(held) // also when get ends the test
		if _, body, _ := get("hosted.test"); body != "two" {
			t.Errorf("a held request got %q", body)
		}
	}()
	p.must(t, dir, "m3o", "resume")
	<-held
	p.must(t, dir, "m3o", "domains:remove", "hosted.test")
	if code, _, _ := get("hosted.test"); code != 404 {
		eventually(t, "the domain is gone", func() bool { code, _, _ := get("hosted.test"); return code == 404 })
	}
	p.must(t, dir, "m3o", "destroy", "--confirm", "hosted")
	other.must(t, odir, "m3o", "destroy", "--confirm", "thief")
}
