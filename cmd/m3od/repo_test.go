package main

import (
	"encoding/json"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/m3o/m3o/webhook/forgetest"
)

// A forged is an app of the shared installation that a repository at the
// stand-in for a forge deploys.
type forged struct {
	t    *testing.T
	b    *box
	f    *forgetest.Forge
	p    *person
	app  string
	as   string // which forge it is: "github", "gitlab" …
	repo string // owner/name
	dir  string // a member's clone
	hook forgetest.Hook
	sent int
}

// connectRepo is connectTo GitHub.
func connectRepo(t *testing.T, app string, flags ...string) *forged {
	t.Helper()
	return connectTo(t, "github", app, flags...)
}

// connectTo connects a new app to a new private repository at a forge whose
// main branch has hello-http in it.
func connectTo(t *testing.T, forge, app string, flags ...string) *forged {
	t.Helper()
	b := theBox(t)
	x := &forged{t: t, b: b, f: forgetest.New(t), p: b.user(t, "ada"), app: app, as: forge, repo: "org/" + app}
	if err := os.WriteFile(filepath.Join(b.dir, "forge.crt"), x.f.CA(), 0o600); err != nil {
		t.Fatal(err)
	}
	address := x.f.Repo(t, x.repo, true)
	x.dir = x.p.clone(t, "hello-http", app)
	x.f.Push(t, x.dir, x.repo, "refs/heads/main")
	x.p.must(t, "", "m3o", "create", app, "--no-remote")
	if slices.Contains(flags, "--deploy-key") {
		address = "ssh://git@" + x.f.SSH + "/" + x.repo + ".git"
	}
	args := append([]string{"repo:connect", address, "-a", app, "--token-stdin", "--forge", forge, "--api-url", x.f.API(forge)}, flags...)
	cmd := x.p.command("", "m3o", args...)
	cmd.Stdin = strings.NewReader(forgetest.Token + "\n")
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("m3o %s: %v\n%s\n%s", strings.Join(args, " "), err, out, b.log.tail(3000))
	}
	if strings.Contains(string(out), forgetest.Token) {
		t.Error("the token is printed")
	}
	t.Cleanup(func() { _, _ = x.p.try("", "m3o", "destroy", app, "--confirm", app) })
	hooks := x.f.Hooks()
	if len(hooks) != 1 {
		t.Fatalf("%d webhooks were made: %s", len(hooks), out)
	}
	x.hook = hooks[0]
	return x
}

// send delivers an event to the daemon through the router.
func (x *forged) send(event string, body any) {
	x.t.Helper()
	x.sent++
	if code, text := x.f.Send(x.t, x.b.client(x.t), x.hook, event, fmt.Sprintf("%s-%d", x.app, x.sent), body); code != http.StatusAccepted {
		x.t.Fatalf("delivery of %s: %d %s", event, code, text)
	}
}

// status waits until the last status of a commit is want.
func (x *forged) status(commit, want string) forgetest.Status {
	x.t.Helper()
	want = forgetest.Word(x.as, want)
	var last forgetest.Status
	defer func() {
		if x.t.Failed() {
			out, _ := x.p.try("", "m3o", "repo:deliveries", "-a", x.app)
			x.t.Logf("status of %s: %+v\n%s\n%s", commit, last, out, x.b.log.tail(4000))
		}
	}()
	eventually(x.t, "status "+want+" of "+commit, func() bool {
		all := x.f.Statuses(commit)
		if len(all) > 0 {
			last = all[len(all)-1]
		}
		return last.State == want
	})
	return last
}

// A push at the forge builds, goes live and is told back; a pull request gets
// a preview that follows it and goes with it.
func TestRepositoryDeploysAndReportsBack(t *testing.T) {
	x := connectRepo(t, "tied", "--deploy-key")
	first := strings.TrimSpace(x.p.must(t, x.dir, "git", "rev-parse", "HEAD"))
	x.status(first, "success")
	if x.f.Keys() != 1 {
		t.Errorf("%d deploy keys were made, want 1", x.f.Keys())
	}

	setVersion(t, x.p, x.dir, "two")
	before, after := x.f.Push(t, x.dir, x.repo, "refs/heads/main")
	x.f.Down(2) // the first two tries to tell the forge fail
	x.send("push", forgetest.PushEvent(x.repo, "refs/heads/main", before, after, "version two"))
	s := x.status(after, "success")
	if code, body := x.b.get(t, x.app, "/"); code != 200 || !strings.Contains(body, "two") {
		t.Errorf("the app answers %d %q, want version two", code, body)
	}
	if s.Context != "m3o/tied" || !strings.Contains(s.Description, "v2 is live") {
		t.Errorf("the status says %+v", s)
	}
	res, err := x.b.client(t).Get(s.URL)
	if err != nil {
		t.Fatal(err)
	}
	defer res.Body.Close()
	if res.StatusCode != 200 {
		t.Errorf("the log at %s: %d", s.URL, res.StatusCode)
	}
	if res, err := x.b.client(t).Get(s.URL[:len(s.URL)-1] + "x"); err != nil || res.StatusCode != 404 {
		t.Errorf("a log without its key: %v %v, want 404", res.StatusCode, err)
	} else {
		res.Body.Close()
	}
	if d := x.f.Deployments(); d["success"] < 1 {
		t.Errorf("deployments %v, want one that succeeded", d)
	}

	t.Run("the same push again builds nothing", func(t *testing.T) {
		builds := x.p.must(t, "", "m3o", "builds", "-a", x.app)
		x.send("push", forgetest.PushEvent(x.repo, "refs/heads/main", before, after, "version two"))
		eventually(t, "the delivery to end", func() bool {
			out := x.p.must(t, "", "m3o", "repo:deliveries", "-a", x.app, "-n", "1")
			return strings.Contains(out, "is live already")
		})
		if now := x.p.must(t, "", "m3o", "builds", "-a", x.app); strings.Count(now, "succeeded") != strings.Count(builds, "succeeded") {
			t.Errorf("there are more builds:\n%s", now)
		}
	})
	t.Run("skip ci", func(t *testing.T) {
		x.p.commit(t, x.dir, "words [skip ci]")
		before, after := x.f.Push(t, x.dir, x.repo, "refs/heads/main")
		x.send("push", forgetest.PushEvent(x.repo, "refs/heads/main", before, after, "words [skip ci]"))
		eventually(t, "the delivery to end", func() bool {
			return strings.Contains(x.p.must(t, "", "m3o", "repo:deliveries", "-a", x.app, "-n", "1"), "the commit says [skip ci]")
		})
	})
	t.Run("pull request", func(t *testing.T) {
		x.p.must(t, "", "m3o", "config:set", "-a", x.app, "OPEN=yes", "--no-restart")
		x.p.must(t, "", "m3o", "config:set", "-a", x.app, "HIDDEN=sesame", "--secret", "--no-restart")
		x.p.must(t, "", "m3o", "config:set", "-a", x.app, "ONLY=preview", "--preview")
		setVersion(t, x.p, x.dir, "proposed")
		_, head := x.f.Push(t, x.dir, x.repo, "refs/pull/7/head")
		x.send("pull_request", forgetest.PullEvent(x.repo, "opened", 7, head, x.repo))
		x.status(head, "success")
		if code, body := x.b.get(t, "pr-7--tied", "/"); code != 200 || !strings.Contains(body, "proposed") {
			t.Errorf("the preview answers %d %q, want the proposed version", code, body)
		}
		if code, body := x.b.get(t, x.app, "/"); code != 200 || !strings.Contains(body, "two") {
			t.Errorf("the app answers %d %q, want version two still", code, body)
		}
		vars := x.p.must(t, "", "m3o", "config", "-a", "pr-7--tied")
		if !strings.Contains(vars, "OPEN") || !strings.Contains(vars, "ONLY") || strings.Contains(vars, "HIDDEN") {
			t.Errorf("the preview's config is\n%s\nwant OPEN and ONLY, not HIDDEN", vars)
		}
		setVersion(t, x.p, x.dir, "improved")
		_, head = x.f.Push(t, x.dir, x.repo, "refs/pull/7/head")
		x.send("pull_request", forgetest.PullEvent(x.repo, "synchronize", 7, head, x.repo))
		x.status(head, "success")
		eventually(t, "the improved version", func() bool { _, body := x.b.get(t, "pr-7--tied", "/"); return strings.Contains(body, "improved") })
		eventually(t, "the comment about the improved version", func() bool {
			c := x.f.Comments(7)
			return len(c) == 1 && strings.Contains(c[0].Text, head) && strings.Contains(c[0].Text, "https://pr-7--tied.localhost") && c[0].Edits > 0
		})
		if out := x.p.must(t, "", "m3o", "previews", "-a", x.app); !regexp.MustCompile(`pr-7\s+live`).MatchString(out) {
			t.Errorf("m3o previews says\n%s", out)
		}
		x.send("pull_request", forgetest.PullEvent(x.repo, "closed", 7, head, x.repo))
		eventually(t, "the preview to go", func() bool { code, _ := x.b.get(t, "pr-7--tied", "/"); return code == 404 })
		eventually(t, "the comment to say so", func() bool {
			c := x.f.Comments(7)
			return len(c) == 1 && strings.Contains(c[0].Text, "was removed")
		})
	})
	t.Run("fork", func(t *testing.T) {
		setVersion(t, x.p, x.dir, "foreign")
		_, head := x.f.Push(t, x.dir, x.repo, "refs/pull/8/head")
		x.send("pull_request", forgetest.PullEvent(x.repo, "opened", 8, head, "eve/tied"))
		if s := x.status(head, "pending"); !strings.Contains(s.Description, "approval") {
			t.Errorf("the status of a fork's commit is %+v", s)
		}
		if code, _ := x.b.get(t, "pr-8--tied", "/"); code != 404 {
			t.Errorf("a fork's preview answers %d before it was approved", code)
		}
		if out, err := x.p.try("", "m3o", "repo:approve", "pr-8", strings.Repeat("a", 40), "-a", x.app); err == nil {
			t.Errorf("another commit was approved: %s", out)
		}
		x.p.must(t, "", "m3o", "repo:approve", "pr-8", head, "-a", x.app)
		x.status(head, "success")
		if code, body := x.b.get(t, "pr-8--tied", "/"); code != 200 || !strings.Contains(body, "foreign") {
			t.Errorf("the approved preview answers %d %q", code, body)
		}
		setVersion(t, x.p, x.dir, "worse")
		_, worse := x.f.Push(t, x.dir, x.repo, "refs/pull/8/head")
		x.send("pull_request", forgetest.PullEvent(x.repo, "synchronize", 8, worse, "eve/tied"))
		x.status(worse, "pending")
		if _, body := x.b.get(t, "pr-8--tied", "/"); strings.Contains(body, "worse") {
			t.Error("a fork's second commit went live by the first one's approval")
		}
	})
	t.Run("disconnect", func(t *testing.T) {
		x.p.must(t, "", "m3o", "repo:disconnect", "-a", x.app)
		if len(x.f.Hooks()) != 0 || x.f.Keys() != 0 {
			t.Errorf("%d webhooks and %d keys are left at the forge", len(x.f.Hooks()), x.f.Keys())
		}
		if code, _ := x.b.get(t, "pr-8--tied", "/"); code != 404 {
			t.Errorf("a preview answers %d after the repository was disconnected", code)
		}
		if code, _ := x.b.get(t, x.app, "/"); code != 200 {
			t.Errorf("the app answers %d after the repository was disconnected", code)
		}
	})
	if strings.Contains(x.b.log.String(), forgetest.Token) {
		t.Error("the token is in the daemon's log")
	}
}

// A thousand deliveries of thirty pushes: each is answered, only what is the
// newest when its turn comes is built, and the newest is what ends up live.
func TestBurstOfDeliveriesBuildsTheNewestOnce(t *testing.T) {
	x := connectRepo(t, "burst")
	x.status(strings.TrimSpace(x.p.must(t, x.dir, "git", "rev-parse", "HEAD")), "success")
	const n, commits = 1000, 30
	var bodies [][]byte
	last := ""
	for i := range commits {
		setVersion(t, x.p, x.dir, fmt.Sprintf("burst-%d", i))
		before, after := x.f.Push(t, x.dir, x.repo, "refs/heads/main")
		b, err := json.Marshal(forgetest.PushEvent(x.repo, "refs/heads/main", before, after, "burst"))
		if err != nil {
			t.Fatal(err)
		}
		bodies, last = append(bodies, b), after
	}
	client := x.b.client(t)
	rss := memory(x.b.cmd.Process.Pid)
	took := make([]time.Duration, n)
	var wg sync.WaitGroup
	for w := range 50 {
		wg.Go(func() {
			for i := w; i < n; i += 50 {
				began := time.Now()
				code, text, err := forgetest.Deliver(client, x.hook, "push", fmt.Sprintf("burst-%d", i), bodies[i*commits/n])
				took[i] = time.Since(began)
				if err != nil || code != http.StatusAccepted {
					t.Errorf("delivery %d: %d %s %v", i, code, text, err)
				}
			}
		})
	}
	wg.Wait()
	after := memory(x.b.cmd.Process.Pid)
	x.status(last, "success")
	eventually(t, "the newest to be live", func() bool {
		_, body := x.b.get(t, x.app, "/")
		return strings.Contains(body, fmt.Sprintf("burst-%d", commits-1))
	})
	slices.Sort(took)
	t.Logf("%d deliveries, 50 at once: answered in p50 %v, p99 %v, at most %v; the daemon's memory %d → %d MB", n, took[n/2], took[n*99/100], took[n-1], rss>>20, after>>20)
	var list struct{ Builds []struct{ Commit string } }
	if err := json.Unmarshal([]byte(x.p.must(t, "", "m3o", "builds", "-a", x.app, "-n", "1000", "--json")), &list); err != nil {
		t.Fatal(err)
	}
	seen := map[string]int{}
	for _, b := range list.Builds {
		seen[b.Commit]++
	}
	for commit, times := range seen {
		if times > 1 {
			t.Errorf("%s was built %d times", commit, times)
		}
	}
	if len(seen) == 0 || list.Builds[0].Commit != last {
		t.Errorf("the newest build is of %v, want %s", list.Builds, last)
	}
	t.Logf("%d builds for %d pushes", len(list.Builds), commits)
}

// memory is the resident memory of a process in bytes.
func memory(pid int) int64 {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/statm", pid))
	if err != nil {
		return 0
	}
	var size, resident int64
	_, _ = fmt.Sscan(string(b), &size, &resident)
	return resident * int64(os.Getpagesize())
}
