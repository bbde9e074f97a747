package daemon

import (
	"context"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"encoding/pem"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	m3ov1 "github.com/m3o/m3o/api/m3o/v1"
	"github.com/m3o/m3o/buildpacks/build"
	"github.com/m3o/m3o/webhook/forgetest"
)

// At every forge, told and telling in its own words: a push goes live and is
// told back, pull requests get a preview that follows them and ends with
// them, and one of a fork waits for approval.
func TestEveryForgeFromPushToComment(t *testing.T) {
	for _, as := range []string{"github", "gitlab", "gitea", "bitbucket", "bitbucket-dc"} {
		t.Run(as, func(t *testing.T) {
			t.Parallel()
			s := newShop(t)
			s.as = as
			_, first := s.push("first", "refs/heads/main")
			s.connect(nil)
			s.status(first, "success")
			if len(s.f.Hooks()) != 1 || s.live("app") != first {
				t.Fatalf("%d webhooks, %q is live: %s", len(s.f.Hooks()), s.live("app"), s.note())
			}
			before, second := s.push("second", "refs/heads/main")
			s.b.onward = func(context.Context, build.Request) error {
				s.status(second, "pending") // while it is built
				return nil
			}
			s.tell(forgetest.Event{Ref: "refs/heads/main", Before: before, After: second, Message: "second"})
			s.idle()
			s.status(second, "success")
			if all := s.f.Statuses(second); s.live("app") != second || all[0].Context != "m3o/app" || !strings.Contains(all[len(all)-1].URL, "/hooks/log/app/"+second) {
				t.Errorf("%q is live, statuses %+v: %s", s.live("app"), all, s.note())
			}
			s.b.onward = nil
			_, head := s.push("proposal", forgetest.PullRef(as, 7))
			s.tell(forgetest.Event{Pull: 7, Act: "opened", Head: head})
			s.idle()
			if s.live("pr-7--app") != head {
				t.Errorf("the preview has %q, want %q: %s", s.live("pr-7--app"), head, s.note())
			}
			_, head = s.push("better", forgetest.PullRef(as, 7))
			s.tell(forgetest.Event{Pull: 7, Act: "updated", Head: head})
			s.idle()
			if s.live("pr-7--app") != head {
				t.Errorf("the preview has %q, want %q: %s", s.live("pr-7--app"), head, s.note())
			}
			s.status(head, "success")
			s.until("one comment, edited", func() bool {
				c := s.f.Comments(7)
				return len(c) == 1 && c[0].Edits > 0 && strings.Contains(c[0].Text, head) && strings.Contains(c[0].Text, s.d.url("pr-7--app"))
			})
			s.tell(forgetest.Event{Pull: 7, Act: "closed", Head: head})
			s.idle()
			s.until("comment about the end", func() bool { c := s.f.Comments(7); return len(c) == 1 && strings.Contains(c[0].Text, "was removed") })
			if s.live("pr-7--app") != "" {
				t.Error("the preview is there after its pull request was closed")
			}

			_, foreign := s.push("foreign", forgetest.PullRef(as, 8))
			s.tell(forgetest.Event{Pull: 8, Act: "opened", Head: foreign, HeadRepo: "eve/theirs"})
			s.idle()
			if s.live("pr-8--app") != "" {
				t.Error("a fork's code runs before it was approved")
			}
			if as == "bitbucket" { // keeps the commits of forks to the fork
				if !strings.Contains(s.note(), "pull requests of forks get no previews") {
					t.Errorf("a fork's: %q", s.note())
				}
				return
			}
			s.status(foreign, "pending")
			if _, err := s.d.repos.approve(t.Context(), "app", "pr-8", foreign); err != nil {
				t.Fatal(err)
			}
			s.idle()
			if s.live("pr-8--app") != foreign {
				t.Errorf("approved, but %q is live: %s", s.live("pr-8--app"), s.note())
			}
			s.status(foreign, "success")
		})
	}
}

// A GitHub App fetches, makes the webhook and tells by tokens of an hour.
func TestGitHubAppFromPushToStatus(t *testing.T) {
	s := newShop(t)
	key, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	s.f.App(&key.PublicKey)
	_, first := s.push("first", "refs/heads/main")
	s.connect(func(r *m3ov1.ConnectRepoRequest) {
		r.Token, r.AppId = "", 7
		r.AppKey = string(pem.EncodeToMemory(&pem.Block{Type: "RSA PRIVATE KEY", Bytes: x509.MarshalPKCS1PrivateKey(key)}))
	})
	s.status(first, "success")
	before, second := s.push("second", "refs/heads/main")
	s.tell(forgetest.Event{Ref: "refs/heads/main", Before: before, After: second, Message: "second"})
	s.idle()
	s.status(second, "success")
	if len(s.f.Hooks()) != 1 || s.live("app") != second {
		t.Errorf("%d webhooks, %q is live: %s", len(s.f.Hooks()), s.live("app"), s.note())
	}
}

// What m3o.yaml says of paths holds for deliveries too, from the commit that is
// deployed on: a push that failed is made up for by the next one.
func TestPathsOfTheManifestHoldForDeliveries(t *testing.T) {
	s := newShop(t)
	write := func(name, text string) {
		t.Helper()
		p := filepath.Join(s.dir, name)
		if err := os.MkdirAll(filepath.Dir(p), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(p, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	write("m3o.yaml", "paths: [\"svc/**\", go.mod, m3o.yaml]\n")
	_, first := s.push("first", "refs/heads/main")
	s.connect(nil)
	step := func(file, text, message string) string {
		t.Helper()
		write(file, text)
		before, after := s.push(message, "refs/heads/main")
		s.tell(forgetest.Event{Ref: "refs/heads/main", Before: before, After: after, Message: message, Paths: []string{file}})
		s.idle()
		return after
	}
	docs := step("docs/a.md", "words", "docs")
	if s.live("app") != first || !strings.Contains(s.note(), "none of the 1 changed files is in the paths svc/** go.mod m3o.yaml") {
		t.Errorf("a push of docs: %q is live, %q", s.live("app"), s.note())
	}
	s.tell(forgetest.Event{Ref: "refs/heads/main", Before: first, After: docs, Message: "docs"})
	s.idle()
	if s.live("app") != first || !strings.Contains(s.note(), "none of the 1 changed files") {
		t.Errorf("the same again: %q is live, %q", s.live("app"), s.note())
	}
	skipped := step("svc/b.go", "package svc\n", "svc [skip m3o]")
	if s.live("app") != first || !strings.Contains(s.note(), "the commit says [skip m3o]") {
		t.Errorf("[skip m3o]: %q is live, %q", s.live("app"), s.note())
	}
	if now := step("docs/c.md", "words", "more docs"); s.live("app") != now {
		t.Errorf("after %s was skipped, its change to svc is not deployed by the next push: %q", skipped[:7], s.note())
	}

	// A pull request that changes nothing of the app gets no preview: others' previews call the live one.
	live := s.live("app")
	write("docs/d.md", "words")
	_, head := s.push("docs", "refs/pull/3/head")
	s.tell(forgetest.Event{Pull: 3, Act: "opened", Head: head})
	s.idle()
	if s.live("pr-3--app") != "" || !strings.Contains(s.note(), "none of the 1 changed files") {
		t.Errorf("a pull request of docs: %q is live, %q", s.live("pr-3--app"), s.note())
	}
	write("svc/e.go", "package svc\n")
	_, head = s.push("svc", "refs/pull/3/head")
	s.tell(forgetest.Event{Pull: 3, Act: "updated", Head: head})
	s.idle()
	if s.live("pr-3--app") != head || s.live("app") != live {
		t.Errorf("a pull request of svc: %q is live, %q", s.live("pr-3--app"), s.note())
	}
}

// In a folder of a repository of many, the folder's own m3o.yaml counts.
func TestPathsOfAFolderOfAMonorepo(t *testing.T) {
	s := newShop(t)
	if err := os.MkdirAll(filepath.Join(s.dir, "svc", "a"), 0o755); err != nil {
		t.Fatal(err)
	}
	for name, text := range map[string]string{"svc/a/m3o.yaml": "paths: [\"svc/a/**\"]\n", "svc/a/main.go": "package main\n\nfunc main() {}\n", "svc/a/go.mod": "module example.com/a\n\ngo 1.26\n"} {
		if err := os.WriteFile(filepath.Join(s.dir, name), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	_, first := s.push("first", "refs/heads/main")
	s.connect(inDir("svc/a"))
	if s.live("app") != first {
		t.Fatalf("%q is live: %s", s.live("app"), s.note())
	}
	for i, c := range []struct{ file, want string }{{"README.md", "none of the 1 changed files is in the paths svc/a/**"}, {"svc/a/more.go", "released"}} {
		if err := os.WriteFile(filepath.Join(s.dir, c.file), fmt.Appendf(nil, "package main // %d\n", i), 0o600); err != nil {
			t.Fatal(err)
		}
		before, after := s.push("x", "refs/heads/main")
		s.tell(forgetest.Event{Ref: "refs/heads/main", Before: before, After: after, Message: "x"})
		s.idle()
		if !strings.Contains(s.note(), c.want) {
			t.Errorf("%s: %q, want %q", c.file, s.note(), c.want)
		}
	}
}
