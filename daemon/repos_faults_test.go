package daemon

import (
	"fmt"
	"io"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/m3o/m3o"
	m3ov1 "github.com/m3o/m3o/api/m3o/v1"
	"github.com/m3o/m3o/webhook"
	"github.com/m3o/m3o/webhook/forgetest"
)

func (s *shop) problem() string {
	s.t.Helper()
	c, err := s.d.repos.of(s.t.Context(), "app")
	if err != nil {
		s.t.Fatal(err)
	}
	return c.Problem
}

// built is how often a commit was built.
func (s *shop) built(commit string) int {
	n := 0
	for _, c := range s.b.commits() {
		if c == "app "+commit {
			n++
		}
	}
	return n
}

func (s *shop) main(message string) (commit string, e forgetest.Event) {
	s.t.Helper()
	before, after := s.push(message, "refs/heads/main")
	return after, forgetest.Event{Ref: "refs/heads/main", Before: before, After: after, Message: message}
}

func TestEmptyRepositoryDeploysItsFirstPush(t *testing.T) {
	s := newShop(t)
	s.connect(nil)
	if s.live("app") != "" || s.problem() != "" {
		t.Errorf("%q is live, problem %q", s.live("app"), s.problem())
	}
	first, e := s.main("first")
	s.tell(e)
	s.idle()
	if s.live("app") != first {
		t.Errorf("%q is live: %s", s.live("app"), s.note())
	}
}

// A forge that hangs, then is down, is asked again later; deploys that do not
// need it are not held up, and nothing is built twice.
func TestSlowForgeIsAskedAgainAndHoldsNothingUp(t *testing.T) {
	s := newShop(t)
	s.main("first")
	s.connect(nil)
	patience := func(d time.Duration) {
		s.d.repos.mu.Lock()
		defer s.d.repos.mu.Unlock()
		s.d.repos.patience = d
	}
	patience(200 * time.Millisecond)
	end := s.f.Hang()
	defer end()
	second, e := s.main("second")
	s.tell(e)
	s.until("a first try", func() bool { return strings.Contains(s.note(), "tried again later: "+s.f.Host) })
	if !strings.Contains(s.note(), "did not answer within 200ms") {
		t.Errorf("while it hangs: %q", s.note())
	}
	app, err := s.d.ledger.App(t.Context(), "app")
	if err != nil {
		t.Fatal(err)
	}
	src, err := s.d.tipSource(t.Context(), app, "main", "ada", "rebuild")
	if err != nil {
		t.Fatal(err)
	}
	if rel, err := s.d.deployCommit(t.Context(), src, io.Discard); err != nil || rel.Version != 2 {
		t.Errorf("a rebuild while the forge hangs: %s, %v", rel.Name(), err)
	}
	s.f.GitDown(1)
	patience(30 * time.Second)
	end()
	s.until("problem", func() bool { return s.problem() != "" })
	if !strings.Contains(s.problem(), "it is tried again") {
		t.Errorf("problem %q", s.problem())
	}
	s.idle()
	if s.live("app") != second || s.built(second) != 1 || s.problem() != "" {
		t.Errorf("afterwards %q is live, built %d times, problem %q: %s", s.live("app"), s.built(second), s.problem(), s.note())
	}
}

func TestRepositoryMadePrivate(t *testing.T) {
	s := newShop(t)
	s.f.Private(s.repo, false)
	s.main("first")
	s.connect(func(r *m3ov1.ConnectRepoRequest) { r.Token = "" })
	s.f.Private(s.repo, true)
	second, e := s.main("second")
	s.tell(e)
	s.idle()
	if p := s.problem(); !strings.Contains(p, "is private or does not exist") || !strings.Contains(p, "m3o repo:connect with --token-stdin") || !strings.HasPrefix(s.note(), "failed ") {
		t.Errorf("made private: problem %q, %q", p, s.note())
	}
	// With a credential it goes on from where it is.
	s.connect(nil)
	if s.live("app") != second || s.built(second) != 1 || s.problem() != "" {
		t.Errorf("with a token %q is live, built %d times, problem %q: %s", s.live("app"), s.built(second), s.problem(), s.note())
	}
}

func TestRevokedTokenSaysWhatToDo(t *testing.T) {
	s := newShop(t)
	s.main("first")
	s.connect(nil)
	s.f.Revoke()
	second, e := s.main("second")
	s.tell(e)
	s.idle()
	if p := s.problem(); !strings.Contains(p, "refuses the credential") || !strings.Contains(p, "m3o repo:connect with a new one") || s.built(second) != 0 {
		t.Errorf("problem %q, built %d times", p, s.built(second))
	}
}

func TestDeployBranchDeletedAndForced(t *testing.T) {
	s := newShop(t)
	first, _ := s.main("first")
	s.connect(nil)
	second, e := s.main("second")
	s.tell(e)
	s.idle()
	s.f.Delete(t, s.repo, "refs/heads/main")
	s.tell(forgetest.Event{Ref: "refs/heads/main", Before: second, After: strings.Repeat("0", 40)})
	s.idle()
	if s.live("app") != second || !strings.Contains(s.problem(), "main was deleted at the forge") || !strings.Contains(s.note(), "main was deleted") {
		t.Errorf("deleted: %q is live, problem %q, %q", s.live("app"), s.problem(), s.note())
	}
	// It comes back with another history.
	s.git("reset", "-q", "--hard", first)
	other, e := s.main("other")
	s.tell(e)
	s.idle()
	if s.live("app") != other || s.problem() != "" {
		t.Errorf("pushed again: %q is live, problem %q: %s", s.live("app"), s.problem(), s.note())
	}
	s.git("reset", "-q", "--hard", first)
	forced, e := s.main("forced")
	s.tell(e)
	s.idle()
	if s.live("app") != forced || s.built(forced) != 1 {
		t.Errorf("forced: %q is live, built %d times: %s", s.live("app"), s.built(forced), s.note())
	}
	// The deliveries of what is no more come late and again.
	s.tell(forgetest.Event{Ref: "refs/heads/main", Before: first, After: other, Message: "other"})
	s.idle()
	if s.live("app") != forced || s.built(other) != 1 || !strings.Contains(s.note(), "was overtaken") {
		t.Errorf("late: %q is live, the old one was built %d times: %s", s.live("app"), s.built(other), s.note())
	}
}

func TestPushOfTenThousandFiles(t *testing.T) {
	s := newShop(t)
	s.main("first")
	s.connect(nil)
	second, e := s.main("second")
	for i := range 10_000 {
		e.Paths = append(e.Paths, fmt.Sprintf("a/folder/with/many/files/%05d.go", i))
	}
	s.tell(e)
	s.idle()
	if s.live("app") != second {
		t.Errorf("%q is live: %s", s.live("app"), s.note())
	}
}

// A delivery whose provider, event or body is not what the hook is for changes nothing.
func TestDeliveriesOfAnotherForge(t *testing.T) {
	s := newShop(t)
	first, _ := s.main("first")
	s.connect(nil)
	_, e := s.main("second")
	e.Repo = s.repo
	for _, as := range []string{"gitlab", "gitea", "bitbucket"} {
		if code, text := forgetest.SendAs(t, s.hooks.Client(), s.hook(), as, "x-"+as, e); code != 401 {
			t.Errorf("%s's delivery at GitHub's address: %d %s, want 401", as, code, text)
		}
	}
	h := s.hook()
	h.URL = strings.Replace(h.URL, "/hooks/github/", "/hooks/gitlab/", 1)
	if code, text := forgetest.SendAs(t, s.hooks.Client(), h, "gitlab", "y", e); code != 401 {
		t.Errorf("the address of another forge: %d %s, want 401", code, text)
	}
	if s.live("app") != first {
		t.Errorf("%q is live", s.live("app"))
	}
	if err := s.d.repos.queue.Replay(t.Context(), s.hookID(), "nosuch"); m3o.KindOf(err) != m3o.NotFound {
		t.Errorf("replay of what is not kept: %v", err)
	}
	if l := s.d.repos.queue.List(s.hookID(), 10); len(l) != 1 || l[0].State != webhook.Done {
		t.Errorf("deliveries %+v, want the one of connecting", l)
	}
}

// TestCommitToldOfWhileItsDeployEndsIsNotBuiltAgain: a delivery that came just
// as the deploy of its commit ended saw it neither as being built nor as live.
func TestCommitToldOfWhileItsDeployEndsIsNotBuiltAgain(t *testing.T) {
	s := newShop(t)
	_, commit := s.push("first", "refs/heads/main")
	s.connect(nil)
	r, ref := s.d.repos, "refs/heads/main"
	if _, err := r.refs.Put(t.Context(), attemptKey("app", ref), attempt{Ref: ref, Commit: commit, State: "building"}); err != nil {
		t.Fatal(err)
	}
	turn := r.turn("app")
	var why string
	var wg sync.WaitGroup
	r.mu.Lock() // stops it where it looks whether a deploy is under way
	wg.Go(func() {
		var err error
		if why, err = r.tried(t.Context(), "app", ref, commit, webhook.Delivery{Tries: 1}); err != nil {
			t.Error(err)
		}
	})
	for range 100 { // long enough for what it does before
		if _, _, err := r.refs.Get(t.Context(), attemptKey("app", ref)); err != nil {
			t.Error(err)
		}
	}
	if err := r.endAttempt(t.Context(), "app", attempt{Ref: ref, Commit: commit, State: "live"}); err != nil {
		t.Error(err)
	}
	delete(r.turns, "app")
	r.mu.Unlock()
	wg.Wait()
	turn.cancel(nil)
	if why == "" {
		t.Error("it would be built again")
	}
}
