package forge_test

import (
	"crypto"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/m3o/m3o"
	"github.com/m3o/m3o/webhook"
	"github.com/m3o/m3o/webhook/forge"
	"github.com/m3o/m3o/webhook/forgetest"
)

// paths is where the stand-in serves the API of each forge.
var paths = map[webhook.Provider]string{webhook.GitHub: "/api/v3/", webhook.GitLab: "/api/v4/", webhook.Gitea: "/api/v1", webhook.Bitbucket: "/api/2.0/", webhook.BitbucketDC: "/rest/"}

// Each forge is told the same, by its own calls.
func TestForgesAreTold(t *testing.T) {
	f := forgetest.New(t)
	f.Repo(t, "org/app", true)
	states := map[webhook.Provider]string{webhook.GitHub: "success", webhook.GitLab: "success", webhook.Gitea: "success", webhook.Bitbucket: "SUCCESSFUL", webhook.BitbucketDC: "SUCCESSFUL"}
	pull := 0
	for p, path := range paths {
		t.Run(string(p), func(t *testing.T) {
			ctx := t.Context()
			pull++
			conf := forge.Config{Provider: p, Host: f.Host, API: "https://" + f.Host + path, Name: "org/app", Token: forgetest.Token, CAFile: f.CAFile}
			c, err := forge.New(conf)
			if err != nil {
				t.Fatal(err)
			}
			if r, err := c.Repo(ctx); err != nil || r != (forge.Repo{Name: "org/app", Branch: "main", Private: true}) {
				t.Errorf("repository %+v, %v", r, err)
			}
			commit := strings.Repeat("a", 39) + string("0123456789"[pull])
			for _, s := range []forge.State{forge.Pending, forge.Success} {
				if err := c.Status(ctx, commit, forge.Status{Context: "m3o/app", State: s, Description: strings.Repeat("é", 300), URL: "https://log"}); err != nil {
					t.Errorf("status %s: %v", s, err)
				}
			}
			if all := f.Statuses(commit); len(all) != 2 || all[1].State != states[p] || all[1].Context != "m3o/app" || all[1].URL != "https://log" {
				t.Errorf("statuses %+v", all)
			}
			id, err := c.Comment(ctx, pull, "", "first")
			if err != nil || id == "" {
				t.Fatalf("comment: %q %v", id, err)
			}
			if again, err := c.Comment(ctx, pull, id, "second"); err != nil || again != id {
				t.Errorf("the edit has the id %q, want %q: %v", again, id, err)
			}
			if all := f.Comments(pull); len(all) != 1 || all[0].Text != "second" {
				t.Errorf("comments %+v, want one that was edited", all)
			}
			if fresh, err := c.Comment(ctx, pull, "9999", "third"); err != nil || fresh == "9999" {
				t.Errorf("in place of a comment that was deleted: %q, %v", fresh, err)
			}
			dep, err := c.Deployment(ctx, "", forge.Deployment{Environment: "app", Commit: commit, Ref: "main", State: forge.Pending, Production: true})
			if err != nil {
				t.Errorf("deployment: %v", err)
			}
			if again, err := c.Deployment(ctx, dep, forge.Deployment{Environment: "app", Commit: commit, State: forge.Success}); err != nil || again != dep {
				t.Errorf("deployment %q, want %q: %v", again, dep, err)
			}
			hook, err := c.CreateHook(ctx, "https://api.localhost/hooks/x/y", "secret")
			if err != nil || len(f.Hooks()) != 1 || f.Hooks()[0].Secret != "secret" {
				t.Errorf("hook %q %v %v", hook, f.Hooks(), err)
			}
			key, err := c.CreateKey(ctx, "m3o app", "ssh-ed25519 AAAA")
			if err != nil || f.Keys() != 1 {
				t.Errorf("key %q, %d keys, %v", key, f.Keys(), err)
			}
			if err := c.DeleteHook(ctx, hook); err != nil {
				t.Error(err)
			}
			if err := c.DeleteKey(ctx, key); err != nil {
				t.Error(err)
			}
			if len(f.Hooks()) != 0 || f.Keys() != 0 {
				t.Errorf("%d hooks, %d keys are left", len(f.Hooks()), f.Keys())
			}
			f.Down(1)
			if err := c.Status(ctx, commit, forge.Status{State: forge.Success}); m3o.KindOf(err) != m3o.Unavailable {
				t.Errorf("a forge that is down: %v, want unavailable", err)
			}
			conf.Token = "revoked"
			bad, err := forge.New(conf)
			if err != nil {
				t.Fatal(err)
			}
			if err := bad.Status(ctx, commit, forge.Status{State: forge.Success}); m3o.KindOf(err) != m3o.Denied || strings.Contains(err.Error(), "revoked\"") {
				t.Errorf("a revoked token: %v, want denied", err)
			}
			conf.Token, conf.Name = forgetest.Token, "org/gone"
			gone, err := forge.New(conf)
			if err != nil {
				t.Fatal(err)
			}
			if _, err := gone.Repo(ctx); m3o.KindOf(err) != m3o.NotFound {
				t.Errorf("a repository that is not there: %v, want not found", err)
			}
		})
	}
}

func TestLimitsAreRespected(t *testing.T) {
	reset := time.Now().Add(90 * time.Second)
	for _, c := range []struct {
		name   string
		code   int
		header map[string]string
		low    time.Duration
		high   time.Duration
	}{
		{"Retry-After", 429, map[string]string{"Retry-After": "30"}, 29 * time.Second, 30 * time.Second},
		{"GitLab's", 429, map[string]string{"RateLimit-Remaining": "0", "RateLimit-Reset": itoa(reset.Unix())}, 80 * time.Second, 91 * time.Second},
		{"nothing said", 429, nil, 50 * time.Second, time.Minute},
		{"far too long", 503, map[string]string{"Retry-After": "999999"}, time.Hour, 2 * time.Hour},
		{"no limit", 500, nil, 0, 0},
	} {
		t.Run(c.name, func(t *testing.T) {
			srv := httptest.NewTLSServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
				for k, v := range c.header {
					w.Header().Set(k, v)
				}
				w.WriteHeader(c.code)
			}))
			defer srv.Close()
			ca := filepath.Join(t.TempDir(), "ca")
			if err := os.WriteFile(ca, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: srv.Certificate().Raw}), 0o600); err != nil {
				t.Fatal(err)
			}
			for _, p := range []webhook.Provider{webhook.Gitea, webhook.GitLab, webhook.GitHub} {
				f, err := forge.New(forge.Config{Provider: p, API: srv.URL, Name: "a/b", Token: "x", CAFile: ca})
				if err != nil {
					t.Fatal(err)
				}
				err = f.Status(t.Context(), strings.Repeat("a", 40), forge.Status{State: forge.Success})
				if m3o.KindOf(err) != m3o.Unavailable {
					t.Errorf("%s: %v, want unavailable", p, err)
				}
				if wait := forge.RetryAfter(err, time.Now()); wait < c.low || wait > c.high {
					t.Errorf("%s: waits %v, want %v to %v", p, wait, c.low, c.high)
				}
			}
		})
	}
}

func itoa(n int64) string { b, _ := json.Marshal(n); return string(b) }

// A GitHub App proves itself by a signed claim and gets a token for one
// repository, which it uses until shortly before it ends.
func TestGitHubApp(t *testing.T) {
	key, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	tokens := 0
	srv := httptest.NewTLSServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		bearer := strings.TrimPrefix(r.Header.Get("Authorization"), "Bearer ")
		switch {
		case strings.HasSuffix(r.URL.Path, "/installation"), strings.HasSuffix(r.URL.Path, "/access_tokens"):
			parts := strings.Split(bearer, ".")
			sig, _ := base64.RawURLEncoding.DecodeString(parts[len(parts)-1])
			sum := sha256.Sum256([]byte(strings.Join(parts[:len(parts)-1], ".")))
			if err := rsa.VerifyPKCS1v15(&key.PublicKey, crypto.SHA256, sum[:], sig); err != nil {
				http.Error(w, `{"message":"bad claim"}`, http.StatusUnauthorized)
				return
			}
			if r.Method == http.MethodPost {
				tokens++
				w.WriteHeader(http.StatusCreated)
				_ = json.NewEncoder(w).Encode(map[string]any{"token": "ghs_1", "expires_at": time.Now().Add(time.Hour)})
				return
			}
			_, _ = w.Write([]byte(`{"id":5}`))
		case bearer == "ghs_1":
			w.WriteHeader(http.StatusCreated)
			_, _ = w.Write([]byte(`{}`))
		default:
			http.Error(w, `{"message":"no"}`, http.StatusUnauthorized)
		}
	}))
	defer srv.Close()
	ca := filepath.Join(t.TempDir(), "ca")
	if err := os.WriteFile(ca, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: srv.Certificate().Raw}), 0o600); err != nil {
		t.Fatal(err)
	}
	text := pem.EncodeToMemory(&pem.Block{Type: "RSA PRIVATE KEY", Bytes: x509.MarshalPKCS1PrivateKey(key)})
	c, err := forge.New(forge.Config{Provider: webhook.GitHub, API: srv.URL, Name: "a/b", App: &forge.App{ID: 7, Key: m3o.Secret(text)}, CAFile: ca})
	if err != nil {
		t.Fatal(err)
	}
	for range 3 {
		if err := c.Status(t.Context(), strings.Repeat("a", 40), forge.Status{State: forge.Success}); err != nil {
			t.Fatal(err)
		}
	}
	if got, err := c.(forge.Tokener).Token(t.Context()); err != nil || got != "ghs_1" || tokens != 1 {
		t.Errorf("token %q after %d were asked for: %v", got.Reveal(), tokens, err)
	}
	if _, err := forge.New(forge.Config{Provider: webhook.GitHub, API: srv.URL, Name: "a/b", App: &forge.App{ID: 7, Key: "no key"}}); m3o.KindOf(err) != m3o.Invalid {
		t.Errorf("a key that is none: %v, want invalid", err)
	}
}
