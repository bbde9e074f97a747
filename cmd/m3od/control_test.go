package main

import (
	"encoding/json"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"testing"

	standardwebhooks "github.com/standard-webhooks/standard-webhooks/libraries/go"
)

// heard collects what a verified webhook receiver is told.
type heard struct {
	mu     sync.Mutex
	secret string
	events []string // "deploy.live v1"
}

func (h *heard) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	body, err := io.ReadAll(r.Body)
	h.mu.Lock()
	defer h.mu.Unlock()
	wh, werr := standardwebhooks.NewWebhook(h.secret)
	if err != nil || werr != nil || wh.Verify(body, r.Header) != nil {
		h.events = append(h.events, "not verified")
		return
	}
	var e struct {
		Type string
		Data struct{ Release, Process string }
	}
	if err := json.Unmarshal(body, &e); err != nil {
		h.events = append(h.events, err.Error())
		return
	}
	h.events = append(h.events, strings.TrimSpace(e.Type+" "+e.Data.Release))
}

func (h *heard) has(event string) bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	for _, e := range h.events {
		if e == event {
			return true
		}
	}
	return false
}

func (h *heard) String() string {
	h.mu.Lock()
	defer h.mu.Unlock()
	return strings.Join(h.events, ", ")
}

// A hook deploys, and somebody's server hears of each deploy, failure and crash.
func TestHooksDeployAndNotificationsTell(t *testing.T) {
	b := theBox(t)
	p := b.user(t, "hooker")
	dir := p.clone(t, "hello-http", "told")
	defer p.must(t, dir, "m3o", "destroy", "--confirm", "told")
	h := &heard{}
	srv := httptest.NewServer(h)
	defer srv.Close()
	p.must(t, dir, "m3o", "create", "told", "--no-remote")
	out := p.must(t, dir, "m3o", "notify:add", srv.URL+"/m3o", "--events", "started,live,failed,recovered,crashed", "-a", "told")
	h.mu.Lock()
	h.secret = regexp.MustCompile(`(?m)^whsec_\S+$`).FindString(out)
	h.mu.Unlock()
	tells := func(event string) {
		t.Helper()
		eventually(t, event+" to be told", func() bool { return h.has(event) })
	}
	if out, err := p.push(dir); err != nil {
		t.Fatalf("push: %v\n%s", err, out)
	}
	tells("deploy.started")
	tells("deploy.live v1")

	// The newest commit again, by a call of the secret URL.
	out = p.must(t, dir, "m3o", "deploy-hooks:add", "cms", "-a", "told")
	hook := regexp.MustCompile(`(?m)^https://\S+/hooks/deploy/\S+$`).FindString(out)
	call := func(method, url string) (int, string) {
		t.Helper()
		req, err := http.NewRequestWithContext(t.Context(), method, url, nil)
		if err != nil {
			t.Fatal(err)
		}
		res, err := b.client(t).Do(req)
		if err != nil {
			t.Fatal(err)
		}
		defer res.Body.Close()
		body, _ := io.ReadAll(res.Body)
		return res.StatusCode, string(body)
	}
	if code, body := call("GET", hook); code != http.StatusMethodNotAllowed {
		t.Errorf("GET answers %d %s", code, body)
	}
	if code, body := call("POST", hook+"x"); code != http.StatusNotFound {
		t.Errorf("a wrong secret answers %d %s", code, body)
	}
	if code, body := call("POST", hook+"?branch=nosuch"); code != http.StatusUnprocessableEntity || !strings.Contains(body, "no branch nosuch") {
		t.Errorf("a branch that is not there answers %d %s", code, body)
	}
	if code, body := call("POST", hook); code != http.StatusAccepted || !strings.Contains(body, `"status":"building"`) {
		t.Errorf("POST answers %d %s", code, body)
	}
	tells("deploy.live v2")
	if out := p.must(t, dir, "m3o", "releases", "-a", "told"); !strings.Contains(out, "deploy hook cms") {
		t.Errorf("releases:\n%s", out)
	}

	// A failure, and the recovery from it.
	main := filepath.Join(dir, "main.go")
	good, err := os.ReadFile(main)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(main, append(good, "nonsense\n"...), 0o600); err != nil {
		t.Fatal(err)
	}
	p.commit(t, dir, "broken")
	if out, err := p.push(dir); err == nil {
		t.Fatalf("a broken push went through:\n%s", out)
	}
	tells("deploy.failed")
	if err := os.WriteFile(main, good, 0o600); err != nil {
		t.Fatal(err)
	}
	p.commit(t, dir, "mended")
	if out, err := p.push(dir); err != nil {
		t.Fatalf("push: %v\n%s", err, out)
	}
	tells("deploy.recovered v3")

	// A crash is told of once, however often it is repeated.
	_, _ = b.client(t).Get(b.url("told", "/crash"))
	tells("app.crashed v3")
	if h.has("not verified") {
		t.Errorf("heard %s", h)
	}
	if out := p.must(t, dir, "m3o", "notify:history", "-a", "told", "-n", "50"); strings.Count(out, "delivered") < 7 {
		t.Errorf("history:\n%s", out)
	}
	if log := b.log.String(); strings.Contains(log, h.secret) || strings.Contains(log, strings.TrimPrefix(hook, b.api+"/hooks/deploy/")) {
		t.Error("a secret is in the daemon's log")
	}
}
