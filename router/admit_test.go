package router

import (
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	testpb "google.golang.org/grpc/interop/grpc_testing"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	"github.com/m3o/m3o"
)

func keyHash(secret string) string {
	h := sha256.Sum256([]byte(secret))
	return hex.EncodeToString(h[:])
}

// showing answers with what an app sees of the caller.
func showing(w http.ResponseWriter, r *http.Request) {
	fmt.Fprintf(w, "caller=%s authorization=%s", r.Header.Get("X-M3o-Caller"), r.Header.Get("Authorization"))
}

// apiThatVerifies is the daemon's side of VerifyPath: it knows some tokens.
func apiThatVerifies(t *testing.T, users map[string]string) (Host, *atomic.Int64) {
	t.Helper()
	asked := new(atomic.Int64)
	up, _ := backend(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		var q VerifyRequest
		if r.URL.Path != VerifyPath || json.NewDecoder(r.Body).Decode(&q) != nil {
			w.WriteHeader(http.StatusNotFound)
			return
		}
		asked.Add(1)
		_ = json.NewEncoder(w).Encode(Verdict{users[q.App+" "+q.Token]})
	}))
	return Host{Name: "api.localhost", Kind: KindAPI, App: "api", Protocol: H2C, Endpoints: []string{up}}, asked
}

func TestPrivateAppLetsInOnlyCallers(t *testing.T) {
	f := start(t)
	api, asked := apiThatVerifies(t, map[string]string{"hello m3o_ada": "ada"})
	up, _ := backend(t, http.HandlerFunc(showing))
	h := appHost("hello", 1, HTTP1, up)
	h.Policy = &Policy{Private: true, Keys: []APIKey{
		{Hash: keyHash("m3ok_good"), ID: "k1"},
		{Hash: keyHash("m3ok_old"), ID: "k2", Expires: time.Now().Add(-time.Second).Unix()},
		{Hash: keyHash("m3ok_some"), ID: "k3", Scopes: []string{"/some/*"}},
	}}
	f.put(t, api, h)
	f.ways(t, func(t *testing.T, c *http.Client, scheme string) {
		for _, tc := range []struct {
			name, path, header, value string
			code                      int
			body                      string
		}{
			{"nothing shown", "/", "", "", 401, "is private"},
			{"a key", "/", "Authorization", "Bearer m3ok_good", 200, "caller=key:k1 authorization="},
			{"a key in its own header", "/", "X-Api-Key", "m3ok_good", 200, "caller=key:k1 authorization="},
			{"an expired key", "/", "Authorization", "Bearer m3ok_old", 401, "expired"},
			{"a wrong key", "/", "Authorization", "Bearer m3ok_bad", 401, "not valid"},
			{"a key for another path", "/other", "Authorization", "Bearer m3ok_some", 403, "not for this"},
			{"a key for this path", "/some/thing", "Authorization", "Bearer m3ok_some", 200, "caller=key:k3"},
			{"a key for this path by a detour", "/some/../other", "Authorization", "Bearer m3ok_some", 403, "not for this"},
			{"a user", "/", "Authorization", "bearer m3o_ada", 200, "caller=user:ada authorization="},
			{"basic", "/", "Authorization", "Basic YWRhOmFkYQ==", 401, "is private"},
			{"a claim", "/", "X-M3o-Caller", "user:root", 401, "is private"},
		} {
			req := request1(t, "GET", scheme+"://hello.localhost"+tc.path, nil)
			req.URL.Opaque = "//hello.localhost" + tc.path
			if tc.header != "" {
				req.Header.Set(tc.header, tc.value)
			}
			res, body := do(t, c, req)
			if res.StatusCode != tc.code || !strings.Contains(body, tc.body) {
				t.Errorf("%s: %d %q, want %d with %q", tc.name, res.StatusCode, body, tc.code, tc.body)
			}
			if tc.code == 401 && res.Header.Get("WWW-Authenticate") == "" {
				t.Errorf("%s: no WWW-Authenticate", tc.name)
			}
			if tc.value != "" && strings.Contains(body, tc.value) {
				t.Errorf("%s: the answer holds what was shown", tc.name)
			}
		}
	})
	if n := asked.Load(); n > 60 {
		t.Errorf("the daemon was asked %d times", n)
	}
}

func TestPublicAppGetsItsCallersOwnCredentials(t *testing.T) {
	f := start(t)
	up, _ := backend(t, http.HandlerFunc(showing))
	h := appHost("hello", 1, HTTP1, up)
	h.Policy = &Policy{Keys: []APIKey{{Hash: keyHash("m3ok_good"), ID: "k1"}}}
	f.put(t, h)
	req := request1(t, "GET", "https://hello.localhost/", nil)
	req.Header.Set("Authorization", "Bearer of-the-app")
	if _, body := do(t, f.web(t, true), req); body != "caller= authorization=Bearer of-the-app" {
		t.Errorf("got %q", body)
	}
}

func TestPrivateAppIsClosedWhileTheDaemonIsAway(t *testing.T) {
	f := start(t)
	up, _ := backend(t, http.HandlerFunc(showing))
	h := appHost("hello", 1, HTTP1, up)
	h.Policy = &Policy{Private: true, Keys: []APIKey{{Hash: keyHash("m3ok_good"), ID: "k1"}}}
	gone := listen(t)
	api := Host{Name: "api.localhost", Kind: KindAPI, App: "api", Protocol: H2C, Endpoints: []string{gone.Addr().String()}}
	_ = gone.Close()
	f.put(t, api, h)
	for token, want := range map[string]int{"m3o_ada": 503, "m3ok_good": 200, "": 401} {
		req := request1(t, "GET", "https://hello.localhost/", nil)
		if token != "" {
			req.Header.Set("Authorization", "Bearer "+token)
		}
		if res, body := do(t, f.web(t, true), req); res.StatusCode != want {
			t.Errorf("%q: %d %s, want %d", token, res.StatusCode, body, want)
		}
	}
}

func TestVerifyPathIsNotServedOutside(t *testing.T) {
	f := start(t)
	api, asked := apiThatVerifies(t, nil)
	f.put(t, api)
	req := request1(t, "POST", "https://api.localhost"+VerifyPath, strings.NewReader(`{"app":"hello","token":"x"}`))
	if res, _ := do(t, f.web(t, false), req); res.StatusCode != http.StatusNotFound || asked.Load() != 0 {
		t.Errorf("%d, and the daemon was asked %d times", res.StatusCode, asked.Load())
	}
}

func TestPrivateGRPCAppRefusesInGRPC(t *testing.T) {
	f := start(t)
	up, _ := grpcBackend(t, "one")
	h := appHost("greeter", 1, GRPC, up)
	h.Policy = &Policy{Private: true, Keys: []APIKey{{Hash: keyHash("m3ok_good"), ID: "k1", Scopes: []string{"/grpc.testing.TestService/UnaryCall"}}},
		Rules: []AccessRule{{Path: "/grpc.testing.TestService/EmptyCall", Access: AllowNobody}}}
	f.put(t, h)
	c := f.dial(t, "greeter.localhost")
	if _, err := c.UnaryCall(t.Context(), &testpb.SimpleRequest{}); status.Code(err) != codes.Unauthenticated {
		t.Errorf("without a key: %v", err)
	}
	ctx := metadata.AppendToOutgoingContext(t.Context(), "authorization", "Bearer m3ok_good")
	if _, err := c.UnaryCall(ctx, &testpb.SimpleRequest{}); err != nil {
		t.Errorf("with a key: %v", err)
	}
	if _, err := c.EmptyCall(ctx, &testpb.Empty{}); status.Code(err) != codes.PermissionDenied {
		t.Errorf("a method nobody may call: %v", err)
	}
}

// methods is a Gateway whose paths below /v1/ are methods of one service.
type methods struct{}

func (methods) Match(*http.Request, *m3o.API) bool { return true }
func (methods) ServeApp(w http.ResponseWriter, _ *http.Request, _ *m3o.API, _ http.RoundTripper) {
	_, _ = io.WriteString(w, "served")
}
func (m methods) ServePath(w http.ResponseWriter, r *http.Request, api *m3o.API, _ string, up http.RoundTripper) {
	m.ServeApp(w, r, api, up)
}
func (methods) FindMethod(_ *http.Request, _ *m3o.API, path string, _ bool) string {
	if rest, ok := strings.CutPrefix("/"+strings.TrimPrefix(path, "/"), "/v1/"); ok {
		return "/shop.Shop/" + rest
	}
	return ""
}

func TestRulesOfMethodsHoldOnEveryPathToThem(t *testing.T) {
	f := start(t, func(c *Config) { c.Gateway = methods{} })
	up, _ := grpcBackend(t, "one")
	h := appHost("shop", 1, GRPC, up)
	h.Policy = &Policy{Rules: []AccessRule{{Path: "/shop.Shop/Buy", Access: AllowNobody}, {Path: "/v1/Look", Access: AllowPrivate}}}
	f.put(t, h, Host{Name: "api.localhost", Kind: KindAPI, App: "api", Protocol: H2C})
	for url, want := range map[string]int{
		"https://shop.localhost/v1/Buy":           403,
		"https://shop.localhost/v1/Sell":          200,
		"https://shop.localhost/v1/Look":          401, // a rule for the path makes it stricter
		"https://api.localhost/shop/v1/Buy":       403,
		"https://api.localhost/shop/v1/Sell":      200,
		"https://shop.localhost/shop.Shop/Buy":    403,
		"https://shop.localhost/x/../v1/Look?a=b": 401,
	} {
		if res, body := do(t, f.web(t, true), request1(t, "POST", url, nil)); res.StatusCode != want {
			t.Errorf("%s: %d %s, want %d", url, res.StatusCode, strings.TrimSpace(body), want)
		}
	}
}

func TestLimitRefusesWhatIsTooMuch(t *testing.T) {
	f := start(t)
	up, _ := backend(t, http.HandlerFunc(showing))
	h := appHost("hello", 1, HTTP1, up)
	h.Policy = &Policy{
		Keys:   []APIKey{{Hash: keyHash("m3ok_a"), ID: "a"}, {Hash: keyHash("m3ok_b"), ID: "b", Limits: []RateLimit{{Per: PerKey, Requests: 1, Seconds: 3600}}}},
		Limits: []RateLimit{{Per: PerKey, Path: "/dear/*", Requests: 3, Seconds: 3600}},
	}
	f.put(t, h)
	c := f.web(t, true)
	ask := func(path, key string) (int, string) {
		req := request1(t, "GET", "https://hello.localhost"+path, nil)
		if key != "" {
			req.Header.Set("Authorization", "Bearer "+key)
		}
		res, _ := do(t, c, req)
		return res.StatusCode, res.Header.Get("Retry-After")
	}
	for i, want := range []int{200, 200, 200, 429} {
		code, after := ask("/dear/one", "m3ok_a")
		if code != want || (code == 429) != (after != "") {
			t.Errorf("request %d: %d, retry after %q, want %d", i, code, after, want)
		}
	}
	if code, _ := ask("/cheap", "m3ok_a"); code != 200 {
		t.Errorf("a path without a limit: %d", code)
	}
	if code, _ := ask("/dear/one", ""); code != 200 {
		t.Errorf("another caller: %d", code)
	}
	for i, want := range []int{200, 429} {
		if code, _ := ask("/cheap", "m3ok_b"); code != want {
			t.Errorf("the key's own limit, request %d: %d, want %d", i, code, want)
		}
	}
}

// The limit of an app that was destroyed held for the next one of its name.
func TestAppThatIsMadeAgainHasUsedNothingOfItsLimits(t *testing.T) {
	f := start(t)
	up, _ := backend(t, http.HandlerFunc(showing))
	h := appHost("hello", 1, HTTP1, up)
	h.Policy = &Policy{Limits: []RateLimit{{Per: PerAddress, Requests: 1, Seconds: 3600}, {Per: PerApp, Requests: 1, Seconds: 3600, Quota: true}}}
	for _, wants := range [][]int{{200, 429}, {200, 429}} {
		f.put(t, h)
		c := f.web(t, true)
		for i, want := range wants {
			if res, _ := do(t, c, request1(t, "GET", "https://hello.localhost/", nil)); res.StatusCode != want {
				t.Errorf("request %d: %d, want %d", i, res.StatusCode, want)
			}
		}
		f.put(t) // destroyed
	}
}

func TestLimiter(t *testing.T) {
	m := newLimiter()
	now := time.Unix(1_000_000, 0)
	id := limitID{app: "hello", limit: RateLimit{Per: PerApp, Requests: 10, Seconds: 10}}
	for i := range 10 {
		if _, ok := m.take(id, now); !ok {
			t.Fatalf("request %d of a burst of 10 was refused", i)
		}
	}
	wait, ok := m.take(id, now)
	if ok || wait != time.Second {
		t.Fatalf("the eleventh: %v, wait %v, want a second", ok, wait)
	}
	if _, ok := m.take(id, now.Add(time.Second)); !ok {
		t.Fatal("refused after the wait")
	}
	if _, ok := m.take(id, now.Add(time.Second)); ok {
		t.Fatal("a second one came through")
	}
}

func TestQuotaOutlivesTheRouter(t *testing.T) {
	now := time.Date(2026, 11, 25, 13, 30, 0, 0, time.UTC)
	id := limitID{app: "hello", scope: "k1", subject: "key:k1", limit: RateLimit{Per: PerKey, Requests: 2, Seconds: 3600, Quota: true}}
	file := filepath.Join(t.TempDir(), "quotas")
	m := newLimiter()
	for range 2 {
		if _, ok := m.take(id, now); !ok {
			t.Fatal("refused within the quota")
		}
	}
	if err := m.save(file, now); err != nil {
		t.Fatal(err)
	}
	m = newLimiter()
	if err := m.load(file); err != nil {
		t.Fatal(err)
	}
	if wait, ok := m.take(id, now); ok || wait != 30*time.Minute {
		t.Fatalf("%v, wait %v, want half an hour to the next window", ok, wait)
	}
	if _, ok := m.take(id, now.Add(30*time.Minute)); !ok {
		t.Fatal("refused in the next window")
	}
	if err := newLimiter().load(filepath.Join(t.TempDir(), "none")); err != nil {
		t.Errorf("no file: %v", err)
	}
}

func TestPolicyFaultsAreAllTold(t *testing.T) {
	p := Policy{Rules: []AccessRule{{Path: "admin", Access: "maybe"}, {Path: "/a*b", Access: AllowPublic}},
		Keys:   []APIKey{{Hash: "xyz", ID: "k"}},
		Limits: []RateLimit{{Per: "moon", Requests: 0, Seconds: 1}}}
	err := p.Validate()
	if err == nil {
		t.Fatal("no error")
	}
	for _, want := range []string{`"admin"`, `"maybe"`, `"/a*b"`, `"k"`, `"moon"`, "0 requests"} {
		if !strings.Contains(err.Error(), want) {
			t.Errorf("%q does not tell of %s", err, want)
		}
	}
}

func FuzzCleanPath(f *testing.F) {
	for _, s := range []string{"/", "/a/../b", "//x", "/%2e%2e/x", "", "a", "/a/./b/", "/..", "/a//"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		c := cleanPath(s)
		if !strings.HasPrefix(c, "/") || cleanPath(c) != c {
			t.Errorf("cleanPath(%q) = %q, and again %q", s, c, cleanPath(c))
		}
		if slices.Contains(strings.Split(c, "/"), "..") {
			t.Errorf("cleanPath(%q) = %q", s, c)
		}
	})
}
