package router

import (
	"fmt"
	"net/http"
	"testing"
)

// saying answers with its release.
func saying(t *testing.T, release int) string {
	t.Helper()
	up, _ := backend(t, http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { fmt.Fprintf(w, "v%d", release) }))
	return up
}

func canaryHost(t *testing.T, percent float64, sticky string) Host {
	h := appHost("hello", 12, HTTP1, saying(t, 12))
	h.Canary = &Canary{Release: 13, Endpoints: []string{saying(t, 13)}, Percent: percent, Sticky: sticky}
	return h
}

func TestCanaryTakesItsShare(t *testing.T) {
	f := start(t)
	f.put(t, canaryHost(t, 25, ""))
	c := f.web(t, true)
	seen := map[string]int{}
	for range 800 {
		_, body := do(t, c, request1(t, "GET", "https://hello.localhost/", nil))
		seen[body]++
	}
	// Of 800 coins at 25 % fewer than 120 or more than 280 come up in fewer than one of 10^10 runs.
	if n := seen["v13"]; n < 120 || n > 280 || n+seen["v12"] != 800 {
		t.Errorf("%v", seen)
	}
	st := f.rt.Requests("hello", 0)
	if n := sum(st.Series, func(s Series) bool { return s.Release == 13 }); n != int64(seen["v13"]) {
		t.Errorf("%d requests of v13 counted, %d answered", n, seen["v13"])
	}
}

func TestCanarySticksByCookie(t *testing.T) {
	f := start(t)
	h := canaryHost(t, 50, "cookie")
	f.put(t, h)
	c := f.web(t, true)
	for range 20 {
		res, body := do(t, c, request1(t, "GET", "https://hello.localhost/", nil))
		cookies := res.Cookies()
		if len(cookies) != 1 || cookies[0].Value != body || !cookies[0].HttpOnly || !cookies[0].Secure {
			t.Fatalf("%s with cookies %v", body, cookies)
		}
		for range 5 {
			req := request1(t, "GET", "https://hello.localhost/", nil)
			req.AddCookie(cookies[0])
			if res, again := do(t, c, req); again != body || len(res.Cookies()) != 0 {
				t.Fatalf("was given %s, then %s and %v", body, again, res.Cookies())
			}
		}
	}
	h.Canary.Percent = 0
	f.put(t, h)
	req := request1(t, "GET", "https://hello.localhost/", nil)
	req.AddCookie(&http.Cookie{Name: canaryCookie, Value: "v11"})
	if res, body := do(t, c, req); body != "v12" || len(res.Cookies()) != 1 {
		t.Errorf("the cookie of a canary that is over leads to %s, %v", body, res.Cookies())
	}
}

func TestCanarySticksByHeader(t *testing.T) {
	f := start(t)
	f.put(t, canaryHost(t, 50, "header:X-Tenant"))
	c := f.web(t, true)
	of := map[string]string{}
	for i := range 300 {
		tenant := fmt.Sprintf("tenant-%d", i%30)
		req := request1(t, "GET", "https://hello.localhost/", nil)
		req.Header.Set("X-Tenant", tenant)
		_, body := do(t, c, req)
		if was := of[tenant]; was != "" && was != body {
			t.Fatalf("%s got %s, then %s", tenant, was, body)
		}
		of[tenant] = body
	}
	seen := map[string]int{}
	for _, v := range of {
		seen[v]++
	}
	if seen["v12"] == 0 || seen["v13"] == 0 {
		t.Errorf("all tenants got the same: %v", seen)
	}
}

func TestCanaryWithoutInstancesTakesNothing(t *testing.T) {
	f := start(t)
	h := canaryHost(t, 100, "")
	h.Canary.Endpoints = nil
	f.put(t, h)
	if _, body := do(t, f.web(t, true), request1(t, "GET", "https://hello.localhost/", nil)); body != "v12" {
		t.Errorf("got %s", body)
	}
}

func TestCanaryThatEndsLosesNoRequest(t *testing.T) {
	f := start(t)
	with := canaryHost(t, 100, "")
	without := with
	without.Canary = nil
	f.put(t, with)
	c := f.web(t, true)
	for i := range 50 {
		h := with
		if i%2 == 1 {
			h = without
		}
		f.put(t, h)
		res, body := do(t, c, request1(t, "GET", "https://hello.localhost/", nil))
		if want := []string{"v13", "v12"}[i%2]; res.StatusCode != 200 || body != want {
			t.Fatalf("%d %s, want %s", res.StatusCode, body, want)
		}
	}
}
