package daemon

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/m3o/m3o"
	m3ov1 "github.com/m3o/m3o/api/m3o/v1"
	"github.com/m3o/m3o/auth"
	"github.com/m3o/m3o/buildpacks/build"
	"github.com/m3o/m3o/config"
	"github.com/m3o/m3o/internal/need"
	"github.com/m3o/m3o/webhook/forgetest"
)

// A shop is a works with a forge beside it.
type shop struct {
	*works
	f      *forgetest.Forge
	hooks  *httptest.Server
	dir    string // a member's clone
	repo   string
	as     string // which forge it is: "github" …
	secret string
	sent   int
}

func newShop(t *testing.T) *shop {
	t.Helper()
	f := forgetest.New(t)
	s := &shop{works: newWorks(t, func(c *Config) { c.ForgeCA = f.CAFile }), f: f, dir: t.TempDir(), repo: "org/app", as: "github"}
	s.hooks = httptest.NewServer(s.d.apiHandler())
	t.Cleanup(s.hooks.Close)
	s.f.Repo(t, s.repo, true)
	if err := os.CopyFS(s.dir, os.DirFS(filepath.Join(need.RepoRoot(t), "testdata", "apps", "hello-http"))); err != nil {
		t.Fatal(err)
	}
	s.git("init", "-q", "-b", "main")
	return s
}

func (s *shop) git(args ...string) string {
	s.t.Helper()
	cmd := exec.Command("git", args...)
	cmd.Dir = s.dir
	cmd.Env = append(os.Environ(), "GIT_CONFIG_NOSYSTEM=1", "GIT_CONFIG_GLOBAL=/dev/null", "GIT_AUTHOR_NAME=a", "GIT_AUTHOR_EMAIL=a@localhost", "GIT_COMMITTER_NAME=a", "GIT_COMMITTER_EMAIL=a@localhost")
	out, err := cmd.CombinedOutput()
	if err != nil {
		s.t.Fatalf("git %s: %v\n%s", strings.Join(args, " "), err, out)
	}
	return strings.TrimSpace(string(out))
}

// push commits something and puts it at a ref of the forge.
func (s *shop) push(message, ref string) (before, after string) {
	s.t.Helper()
	s.git("add", "-A")
	s.git("commit", "-q", "--allow-empty", "-m", message)
	return s.f.Push(s.t, s.dir, s.repo, ref)
}

// connect connects the app and waits for the first deploy.
func (s *shop) connect(change func(*m3ov1.ConnectRepoRequest)) *m3ov1.ConnectRepoResponse {
	s.t.Helper()
	req := &m3ov1.ConnectRepoRequest{App: "app", Repository: s.f.Host + "/" + s.repo, Forge: s.as, ApiUrl: s.f.API(s.as), Token: forgetest.Token}
	if change != nil {
		change(req)
	}
	ctx := context.WithValue(s.t.Context(), whoKey{}, auth.Who{User: "ada"})
	c, sec, err := reposAPI{s.d.repos}.plan(ctx, req)
	if err != nil {
		s.t.Fatal(err)
	}
	res, err := s.d.repos.connect(ctx, c, sec)
	if err != nil {
		s.t.Fatalf("connect: %v (%v)", err, m3o.HintOf(err))
	}
	s.secret = sec.hook.Reveal()
	s.idle()
	return res
}

func (s *shop) hook() forgetest.Hook {
	s.t.Helper()
	c, err := s.d.repos.of(s.t.Context(), "app")
	if err != nil {
		s.t.Fatal(err)
	}
	return forgetest.Hook{URL: s.hooks.URL + "/hooks/" + string(c.Provider) + "/" + c.Hook, Secret: s.secret}
}

func (s *shop) send(event string, body any) {
	s.t.Helper()
	s.sent++
	if code, text := s.f.Send(s.t, s.hooks.Client(), s.hook(), event, fmt.Sprint(s.sent), body); code != 202 {
		s.t.Fatalf("%s: %d %s", event, code, text)
	}
}

// tell sends an event as the forge does.
func (s *shop) tell(e forgetest.Event) {
	s.t.Helper()
	s.sent++
	e.Repo = s.repo
	if code, text := forgetest.SendAs(s.t, s.hooks.Client(), s.hook(), s.as, fmt.Sprint(s.sent), e); code != 202 {
		s.t.Fatalf("%+v: %d %s", e, code, text)
	}
}

// idle waits until all deliveries have been worked on.
func (s *shop) idle() {
	s.t.Helper()
	ctx, cancel := context.WithTimeout(s.t.Context(), 3*time.Minute)
	defer cancel()
	if err := s.d.repos.queue.Idle(ctx); err != nil {
		s.t.Fatalf("deliveries: %v: %+v", err, s.d.repos.queue.List(s.hookID(), 10))
	}
}

func (s *shop) hookID() string {
	c, _ := s.d.repos.of(s.t.Context(), "app")
	return c.Hook
}

// note is what came of the newest delivery.
func (s *shop) note() string {
	s.t.Helper()
	l := s.d.repos.queue.List(s.hookID(), 1)
	if len(l) == 0 {
		return ""
	}
	return string(l[0].State) + " " + l[0].Note
}

// until waits for what other goroutines bring about.
func (s *shop) until(what string, cond func() bool) {
	s.t.Helper()
	defer func() {
		if s.t.Failed() {
			s.t.Logf("the last delivery: %s", s.note())
		}
	}()
	s.works.until(what, cond)
}

func (s *shop) status(commit, state string) forgetest.Status {
	s.t.Helper()
	var last forgetest.Status
	state = forgetest.Word(s.as, state)
	s.until("status "+state, func() bool {
		if all := s.f.Statuses(commit); len(all) > 0 {
			last = all[len(all)-1]
		}
		return last.State == state
	})
	return last
}

func (s *shop) live(app string) string {
	rel, err := s.d.ledger.Live(s.t.Context(), app)
	if err != nil {
		return ""
	}
	return rel.Commit
}

func TestPushAtTheForgeGoesLiveAndIsToldBack(t *testing.T) {
	s := newShop(t)
	_, first := s.push("first", "refs/heads/main")
	s.connect(nil)
	if s.live("app") != first {
		t.Fatalf("after connecting %q is live, want %q: %s", s.live("app"), first, s.note())
	}
	s.status(first, "success")
	before, second := s.push("second", "refs/heads/main")
	s.f.Down(2)
	body := forgetest.PushEvent(s.repo, "refs/heads/main", before, second, "second")
	s.send("push", body)
	s.idle()
	if s.live("app") != second {
		t.Errorf("%q is live, want %q: %s", s.live("app"), second, s.note())
	}
	if st := s.status(second, "success"); st.Context != "m3o/app" || !strings.HasPrefix(st.Description, "v2 is live") || !strings.HasPrefix(st.URL, s.d.apiURL()+"/hooks/log/app/"+second) {
		t.Errorf("status %+v", st)
	}
	s.until("deployment", func() bool { return s.f.Deployments()["success"] == 2 })
	res, err := http.Get(s.hooks.URL + strings.TrimPrefix(s.d.repos.logURL("app", second), s.d.apiURL()))
	if err != nil {
		t.Fatal(err)
	}
	defer res.Body.Close()
	if log, err := io.ReadAll(res.Body); err != nil || !strings.Contains(string(log), "Released v2") {
		t.Errorf("the log is %q, %v", log, err)
	}
	for _, c := range []struct {
		name, note, event string
		body              any
	}{
		{"the same again", "ignored " + second[:7] + " is live already", "push", body},
		{"overtaken", "was overtaken", "push", forgetest.PushEvent(s.repo, "refs/heads/main", before, first, "x")},
		{"another branch", "topic does not deploy, main does", "push", forgetest.PushEvent(s.repo, "refs/heads/topic", before, second, "x")},
		{"a tag", "v1 is a tag", "push", forgetest.PushEvent(s.repo, "refs/tags/v1", before, second, "x")},
		{"the branch deleted", "main was deleted at the forge", "push", forgetest.PushEvent(s.repo, "refs/heads/main", second, strings.Repeat("0", 40), "")},
		{"another repository", "it is about eve/app, not org/app", "push", forgetest.PushEvent("eve/app", "refs/heads/main", before, second, "x")},
		{"ping", "the hook works", "ping", map[string]any{"zen": "x"}},
		{"unknown", "fork changes no code", "fork", map[string]any{}},
	} {
		s.send(c.event, c.body)
		s.idle()
		if !strings.Contains(s.note(), c.note) {
			t.Errorf("%s: %q, want %q", c.name, s.note(), c.note)
		}
	}
	before, skipped := s.push("words [skip ci]", "refs/heads/main")
	s.send("push", forgetest.PushEvent(s.repo, "refs/heads/main", before, skipped, "words [skip ci]"))
	s.idle()
	if !strings.Contains(s.note(), "the commit says [skip ci]") {
		t.Errorf("a commit to be skipped: %q", s.note())
	}
	if got := s.b.commits(); len(got) != 2 {
		t.Errorf("built %v, want two", got)
	}
}

func TestFailedPushIsToldAndNotBuiltAgain(t *testing.T) {
	s := newShop(t)
	s.push("first", "refs/heads/main")
	s.connect(nil)
	s.b.onward = func(context.Context, build.Request) error {
		return &m3o.Error{Kind: m3o.Invalid, Msg: "main.go:3: undefined: x"}
	}
	before, broken := s.push("broken", "refs/heads/main")
	body := forgetest.PushEvent(s.repo, "refs/heads/main", before, broken, "broken")
	s.send("push", body)
	s.idle()
	if st := s.status(broken, "failure"); st.Description != "main.go:3: undefined: x" {
		t.Errorf("status %+v", st)
	}
	s.send("push", body)
	s.idle()
	if !strings.Contains(s.note(), "failed before") || len(s.b.commits()) != 2 {
		t.Errorf("sent again: %q, built %v", s.note(), s.b.commits())
	}
	s.b.onward = nil
	l := s.d.repos.queue.List(s.hookID(), 1)
	if err := s.d.repos.queue.Replay(t.Context(), s.hookID(), l[0].ID); err != nil {
		t.Fatal(err)
	}
	s.idle()
	if s.live("app") != broken {
		t.Errorf("after a replay %q is live: %s", s.live("app"), s.note())
	}
}

// A newer push ends the build of an older one, and what is live is the newest.
func TestNewerPushSupersedes(t *testing.T) {
	s := newShop(t)
	s.push("first", "refs/heads/main")
	s.connect(nil)
	building := make(chan struct{}, 1)
	s.b.onward = func(ctx context.Context, r build.Request) error {
		building <- struct{}{}
		<-ctx.Done()
		return context.Cause(ctx)
	}
	before, old := s.push("old", "refs/heads/main")
	s.send("push", forgetest.PushEvent(s.repo, "refs/heads/main", before, old, "old"))
	<-building
	s.b.onward = nil
	before, newest := s.push("new", "refs/heads/main")
	s.send("push", forgetest.PushEvent(s.repo, "refs/heads/main", before, newest, "new"))
	s.idle()
	if s.live("app") != newest {
		t.Errorf("%q is live, want %q: %s", s.live("app"), newest, s.note())
	}
	if st := s.status(old, "failure"); st.Description != "Superseded by a newer push" {
		t.Errorf("the older push's status is %+v", st)
	}
	s.status(newest, "success")
}

func TestPullRequestGetsAPreview(t *testing.T) {
	s := newShop(t)
	_, first := s.push("first", "refs/heads/main")
	s.connect(func(r *m3ov1.ConnectRepoRequest) { r.Branches = true })
	for app, vars := range map[string][]config.Var{"app": {{Name: "OPEN", Value: "1"}, {Name: "HIDDEN", Value: "2", Secret: true}}, overlayOf("app"): {{Name: "ONLY", Value: "3", Secret: true}}} {
		if _, err := s.d.config.Change(t.Context(), app, "ada", vars, nil); err != nil {
			t.Fatal(err)
		}
	}
	_, head := s.push("proposal", "refs/pull/7/head")
	s.send("pull_request", forgetest.PullEvent(s.repo, "opened", 7, head, s.repo))
	s.idle()
	if s.live("pr-7--app") != head || s.live("app") != first {
		t.Fatalf("live are %q and %q: %s", s.live("pr-7--app"), s.live("app"), s.note())
	}
	rel, err := s.d.ledger.Live(t.Context(), "pr-7--app")
	if err != nil {
		t.Fatal(err)
	}
	env, err := s.d.config.Env(t.Context(), "pr-7--app", rel.Config)
	if err != nil || !slices.Equal(env, []string{"ONLY=3", "OPEN=1"}) {
		t.Errorf("the preview's variables are %q, %v", env, err)
	}
	if err := s.d.auth.Allow(t.Context(), auth.Who{User: "ada"}, auth.LogsRead, "pr-7--app"); err != nil {
		t.Errorf("a member may not see the preview: %v", err)
	}
	s.status(head, "success")
	_, head = s.push("better", "refs/pull/7/head")
	s.send("pull_request", forgetest.PullEvent(s.repo, "synchronize", 7, head, s.repo))
	s.idle()
	if s.live("pr-7--app") != head {
		t.Errorf("%q is live, want %q: %s", s.live("pr-7--app"), head, s.note())
	}
	s.until("one comment, edited", func() bool {
		c := s.f.Comments(7)
		return len(c) == 1 && c[0].Edits > 0 && strings.Contains(c[0].Text, head) && strings.Contains(c[0].Text, s.d.url("pr-7--app"))
	})
	before, topic := s.push("topic", "refs/heads/new/Login")
	s.send("push", forgetest.PushEvent(s.repo, "refs/heads/new/Login", strings.Repeat("0", 40), topic, "topic"))
	s.idle()
	name := m3o.PreviewName("new/Login", "app")
	if s.live(name) != topic || before != strings.Repeat("0", 40) {
		t.Errorf("%s: %q is live, want %q: %s", name, s.live(name), topic, s.note())
	}
	s.send("push", forgetest.PushEvent(s.repo, "refs/heads/new/Login", topic, strings.Repeat("0", 40), ""))
	s.send("pull_request", forgetest.PullEvent(s.repo, "closed", 7, head, s.repo))
	s.idle()
	for _, n := range []string{name, "pr-7--app"} {
		if _, err := s.d.ledger.App(t.Context(), n); m3o.KindOf(err) != m3o.NotFound {
			t.Errorf("%s is there after it was closed: %v", n, err)
		}
	}
	s.until("comment about the end", func() bool { c := s.f.Comments(7); return len(c) == 1 && strings.Contains(c[0].Text, "was removed") })
	if _, err := s.d.ledger.App(t.Context(), "app"); err != nil {
		t.Errorf("the app went with its preview: %v", err)
	}
	// One that nobody tells of ends by itself.
	_, head = s.push("forgotten", "refs/pull/9/head")
	s.send("pull_request", forgetest.PullEvent(s.repo, "opened", 9, head, s.repo))
	s.idle()
	if err := s.d.repos.expireAt(t.Context(), time.Now().Add(previewTTL-time.Hour)); err != nil || s.live("pr-9--app") != head {
		t.Errorf("before its time %q is live: %v", s.live("pr-9--app"), err)
	}
	if err := s.d.repos.expireAt(t.Context(), time.Now().Add(previewTTL+time.Hour)); err != nil || s.live("pr-9--app") != "" {
		t.Errorf("after its time %q is live: %v", s.live("pr-9--app"), err)
	}
}

func TestForkWaitsForApprovalOfExactlyItsCommit(t *testing.T) {
	s := newShop(t)
	s.push("first", "refs/heads/main")
	s.connect(nil)
	_, head := s.push("foreign", "refs/pull/8/head")
	s.send("pull_request", forgetest.PullEvent(s.repo, "opened", 8, head, "eve/app"))
	s.idle()
	if st := s.status(head, "pending"); !strings.Contains(st.Description, "approval") || s.live("pr-8--app") != "" {
		t.Errorf("status %+v, live %q", st, s.live("pr-8--app"))
	}
	if _, err := s.d.repos.approve(t.Context(), "app", "pr-8", strings.Repeat("f", 40)); m3o.KindOf(err) != m3o.Conflict {
		t.Errorf("another commit was approved: %v", err)
	}
	if _, err := s.d.repos.approve(t.Context(), "app", "8", head); err != nil {
		t.Fatal(err)
	}
	s.idle()
	if s.live("pr-8--app") != head {
		t.Errorf("approved, but %q is live: %s", s.live("pr-8--app"), s.note())
	}
	_, worse := s.push("worse", "refs/pull/8/head")
	s.send("pull_request", forgetest.PullEvent(s.repo, "synchronize", 8, worse, "eve/app"))
	s.idle()
	if s.live("pr-8--app") != head {
		t.Errorf("a commit that nobody approved is live: %q", s.live("pr-8--app"))
	}
	for _, c := range s.b.commits() {
		if strings.HasSuffix(c, worse) {
			t.Error("a commit that nobody approved was built")
		}
	}
}

// A thousand deliveries of thirty pushes at once: all are answered, nothing
// is built twice, in order, and the newest is live.
func TestBurstBuildsEachCommitAtMostOnce(t *testing.T) {
	s := newShop(t)
	s.push("first", "refs/heads/main")
	s.connect(nil)
	const n, pushes = 1000, 30
	var bodies [][]byte
	var commits []string
	for i := range pushes {
		before, after := s.push(fmt.Sprint(i), "refs/heads/main")
		b, err := json.Marshal(forgetest.PushEvent(s.repo, "refs/heads/main", before, after, "x"))
		if err != nil {
			t.Fatal(err)
		}
		bodies, commits = append(bodies, b), append(commits, after)
	}
	hook := s.hook()
	took := make([]time.Duration, n)
	var wg sync.WaitGroup
	for w := range 50 {
		wg.Go(func() {
			for i := w; i < n; i += 50 {
				began := time.Now()
				code, text, err := forgetest.Deliver(s.hooks.Client(), hook, "push", fmt.Sprintf("burst-%d", i), bodies[i*pushes/n])
				took[i] = time.Since(began)
				if err != nil || code != 202 {
					t.Errorf("delivery %d: %d %s %v", i, code, text, err)
				}
			}
		})
	}
	wg.Wait()
	slices.Sort(took)
	t.Logf("%d deliveries, 50 at once: answered in p50 %v, p99 %v, at most %v", n, took[n/2], took[n*99/100], took[n-1])
	// Asking the forge a thousand times takes a while.
	ctx, cancel := context.WithTimeout(t.Context(), 4*time.Minute)
	defer cancel()
	if err := s.d.repos.queue.Idle(ctx); err != nil {
		t.Fatal(err)
	}
	if s.live("app") != commits[pushes-1] {
		t.Errorf("%q is live, want the newest", s.live("app"))
	}
	last := -1
	for _, c := range s.b.commits()[1:] {
		i := slices.Index(commits, strings.TrimPrefix(c, "app "))
		if i <= last {
			t.Errorf("push %d was built after push %d", i, last)
		}
		last = i
	}
	t.Logf("%d builds", len(s.b.commits())-1)
}

func TestRevokedTokenAndRename(t *testing.T) {
	s := newShop(t)
	s.push("first", "refs/heads/main")
	s.connect(nil)
	s.f.Rename(t, s.repo, "org/better")
	s.repo = "org/better"
	before, after := s.push("second", "refs/heads/main")
	s.f.Moved("org/app", "org/better")
	s.send("push", forgetest.PushEvent(s.repo, "refs/heads/main", before, after, "x"))
	s.idle()
	if s.live("app") != after {
		t.Errorf("after a rename %q is live, want %q: %s", s.live("app"), after, s.note())
	}
	c, err := s.d.repos.of(t.Context(), "app")
	if err != nil || c.Name != "org/better" {
		t.Errorf("the connection is of %s: %v", c.Name, err)
	}
	s.f.Revoke()
	before, after = s.push("third", "refs/heads/main")
	s.send("push", forgetest.PushEvent(s.repo, "refs/heads/main", before, after, "x"))
	s.idle()
	c, err = s.d.repos.of(t.Context(), "app")
	if err != nil || !strings.Contains(c.Problem, "refuses the credential") || !strings.HasPrefix(s.note(), "failed ") {
		t.Errorf("after the token was revoked: problem %q, delivery %q, %v", c.Problem, s.note(), err)
	}
}

func TestNoSecretIsStoredOpen(t *testing.T) {
	s := newShop(t)
	s.push("first", "refs/heads/main")
	s.connect(func(r *m3ov1.ConnectRepoRequest) {
		r.DeployKey, r.Repository = true, "ssh://git@"+s.f.SSH+"/"+s.repo+".git"
	})
	c, err := s.d.repos.of(t.Context(), "app")
	if err != nil {
		t.Fatal(err)
	}
	b, err := json.Marshal(c)
	if err != nil || strings.Contains(string(b), forgetest.Token) || strings.Contains(string(b), "PRIVATE") || strings.Contains(string(b), "whsec_") {
		t.Errorf("the record holds a secret: %s %v", b, err)
	}
	if s.live("app") == "" {
		t.Errorf("by ssh nothing went live: %s", s.note())
	}
	if err := s.d.destroyApp(t.Context(), "app"); err != nil {
		t.Fatal(err)
	}
	if len(s.f.Hooks()) != 0 || s.f.Keys() != 0 {
		t.Errorf("%d hooks and %d keys stay at the forge", len(s.f.Hooks()), s.f.Keys())
	}
	if _, ok := s.d.repos.hook(t.Context(), c.Hook); ok {
		t.Error("the hook answers after the app was destroyed")
	}
}

func TestParseRepository(t *testing.T) {
	for _, c := range []struct{ in, host, name, address string }{
		{"github.com/org/repo", "github.com", "org/repo", ""},
		{"github.com/org/repo.git", "github.com", "org/repo", ""},
		{"https://GitLab.com/a/b/c.git", "gitlab.com", "a/b/c", "https://GitLab.com/a/b/c.git"},
		{"git@github.com:org/repo.git", "github.com", "org/repo", "ssh://git@github.com/org/repo.git"},
		{"ssh://git@git.example.com:7999/proj/repo.git", "git.example.com", "proj/repo", "ssh://git@git.example.com:7999/proj/repo.git"},
		{"https://bb.example.com/scm/PROJ/repo.git", "bb.example.com", "PROJ/repo", "https://bb.example.com/scm/PROJ/repo.git"},
		{"127.0.0.1:8443/org/app", "127.0.0.1:8443", "org/app", ""},
	} {
		host, name, address, err := parseRepository(c.in)
		if err != nil || host != c.host || name != c.name || address != c.address {
			t.Errorf("%s: %q %q %q %v, want %q %q %q", c.in, host, name, address, err, c.host, c.name, c.address)
		}
	}
	for _, in := range []string{"", "org/repo", "http://github.com/a/b", "github.com", "github.com/org", "https://u:p@github.com/a/b", "file:///etc/passwd", "-x@github.com:a/b", "github.com/a/../../b"} {
		if host, name, _, err := parseRepository(in); err == nil {
			t.Errorf("%q was taken for %s %s", in, host, name)
		}
	}
}

func TestLabelsOfBranches(t *testing.T) {
	for in, want := range map[string]string{"topic": "topic", "v12": "branch-v12", "pr-7": "branch-pr-7", "overlay-of-previews": "branch-overlay-of-previews", "v1x": "v1x", "v": "branch-v"} {
		if got := labelOf(in); got != want {
			t.Errorf("%s: %s, want %s", in, got, want)
		}
	}
	seen := map[string]string{}
	for _, label := range []string{"a/b", "a-b", "A-b", "a--b", "é", "-", strings.Repeat("x", 80), strings.Repeat("x", 81), "feature/" + strings.Repeat("y", 60)} {
		name := m3o.PreviewName(label, strings.Repeat("z", 40))
		if err := m3o.CheckName(name); err != nil || seen[name] != "" {
			t.Errorf("%q is %q, as is %q: %v", label, name, seen[name], err)
		}
		seen[name] = label
	}
}

func TestASupersededJobDoesNotHaveTheNewerCommitBuiltAgain(t *testing.T) {
	r := newShop(t).d.repos
	const ref = "refs/heads/main"
	if _, err := r.refs.Put(t.Context(), attemptKey("app", ref), attempt{Ref: ref, Commit: "newer", State: "building"}); err != nil {
		t.Fatal(err)
	}
	if err := r.endAttempt(t.Context(), "app", attempt{Ref: ref, Commit: "older", State: "superseded"}); err != nil {
		t.Fatal(err)
	}
	if is, _, err := r.refs.Get(t.Context(), attemptKey("app", ref)); err != nil || is.Commit != "newer" || is.State != "building" {
		t.Fatalf("the newer attempt became %+v, %v", is, err)
	}
	if err := r.endAttempt(t.Context(), "app", attempt{Ref: ref, Commit: "newer", State: "live"}); err != nil {
		t.Fatal(err)
	}
	if is, _, err := r.refs.Get(t.Context(), attemptKey("app", ref)); err != nil || is.State != "live" {
		t.Fatalf("its end was not recorded: %+v, %v", is, err)
	}
}

// inDir has a connection be of one folder.
func inDir(dir string) func(*m3ov1.ConnectRepoRequest) {
	return func(r *m3ov1.ConnectRepoRequest) { r.Dir = dir }
}
