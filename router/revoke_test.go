package router

import (
	"crypto/sha256"
	"encoding/json"
	"net/http"
	"sync/atomic"
	"testing"
	"time"
)

// A key that is revoked is refused from the table on that lacks it, and a token
// once the verdict on it is a second old; nobody has to ask twice for that.
func TestRevokedKeyAndTokenAreRefused(t *testing.T) {
	f := start(t)
	var revoked atomic.Bool
	daemon, _ := backend(t, http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		user := "ada"
		if revoked.Load() {
			user = ""
		}
		_ = json.NewEncoder(w).Encode(Verdict{user})
	}))
	api := Host{Name: "api.localhost", Kind: KindAPI, App: "api", Protocol: H2C, Endpoints: []string{daemon}}
	up, _ := backend(t, http.HandlerFunc(showing))
	h := appHost("hello", 1, HTTP1, up)
	h.Policy = &Policy{Private: true, Keys: []APIKey{{Hash: keyHash("m3ok_good"), ID: "k1"}}}
	f.put(t, api, h)
	c := f.web(t, true)
	ask := func(secret string) int {
		t.Helper()
		req := request1(t, "GET", "https://hello.localhost/", nil)
		req.Header.Set("Authorization", "Bearer "+secret)
		res, _ := do(t, c, req)
		return res.StatusCode
	}
	for _, secret := range []string{"m3o_ada", "m3ok_good"} {
		if code := ask(secret); code != 200 {
			t.Errorf("%s: %d", secret, code)
		}
	}
	revoked.Store(true)
	h.Policy = &Policy{Private: true}
	f.put(t, api, h)
	if code := ask("m3ok_good"); code != 401 {
		t.Errorf("a revoked key: %d, want 401 from the next table on", code)
	}
	wait(t, "the revoked token is refused", func() bool { return ask("m3o_ada") == 401 })
}

func TestVerdictIsBelievedForASecondAtMost(t *testing.T) {
	if verdictFor > time.Second {
		t.Errorf("a verdict is believed for %v", verdictFor)
	}
	var v verdicts
	now := time.Unix(1_800_000_000, 0)
	k := verdictKey{"hello", sha256.Sum256([]byte("m3o_ada"))}
	v.put(k, verdict{"ada", now.Add(verdictFor)}, now)
	if got, ok := v.get(k, now.Add(verdictFor-time.Nanosecond)); !ok || got.user != "ada" {
		t.Errorf("within its time: %+v, %v", got, ok)
	}
	if got, ok := v.get(k, now.Add(verdictFor)); ok {
		t.Errorf("after it: %+v", got)
	}
	if _, ok := v.get(verdictKey{"other", k.token}, now); ok {
		t.Error("a verdict holds for another app")
	}
}
