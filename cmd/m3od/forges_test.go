package main

import (
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/m3o/m3o/webhook/forgetest"
)

// tell delivers an event as x's forge does.
func (x *forged) tell(e forgetest.Event) {
	x.t.Helper()
	x.sent++
	e.Repo = x.repo
	if code, text := forgetest.SendAs(x.t, x.b.client(x.t), x.hook, x.as, fmt.Sprintf("%s-%d", x.app, x.sent), e); code != http.StatusAccepted {
		x.t.Fatalf("delivery of %+v: %d %s", e, code, text)
	}
}

// submodule puts another private repository of the forge into the clone, as
// a submodule at path that holds one file.
func (x *forged) submodule(path, name, file, text string) {
	x.t.Helper()
	x.f.Repo(x.t, name, true)
	sub := x.t.TempDir()
	put(x.t, sub, file, text)
	x.p.must(x.t, sub, "git", "init", "-q", "-b", "main")
	x.p.must(x.t, sub, "git", "add", "-A")
	x.p.must(x.t, sub, "git", "commit", "-q", "-m", "first")
	_, commit := x.f.Push(x.t, sub, name, "refs/heads/main")
	put(x.t, x.dir, ".gitmodules", fmt.Sprintf("[submodule %q]\n\tpath = %s\n\turl = https://%s/%s.git\n", path, path, x.f.Host, name))
	if err := os.Mkdir(filepath.Join(x.dir, path), 0o755); err != nil { // so that git add leaves it be
		x.t.Fatal(err)
	}
	x.p.must(x.t, x.dir, "git", "add", ".gitmodules")
	x.p.must(x.t, x.dir, "git", "update-index", "--add", "--cacheinfo", "160000,"+commit+","+path)
}

// From GitLab over https, with a submodule: a push builds, goes live and is
// told back, as are merge requests, one of a fork and branches.
func TestGitLabRepositoryWithASubmodule(t *testing.T) {
	x := connectTo(t, "gitlab", "labbed", "--branches")
	first := strings.TrimSpace(x.p.must(t, x.dir, "git", "rev-parse", "HEAD"))
	x.status(first, "success")

	x.submodule("words", "org/words", "words.go", "package words\n\nconst Text = \"from a submodule\"\n")
	x.p.edit(t, x.dir, "main.go", `const version = "version 1"`, `const version = words.Text`)
	x.p.edit(t, x.dir, "main.go", `	"time"`+"\n)", `	"time"`+"\n\n\t\"example.com/hello-http/words\"\n)")
	before, after := x.f.Push(t, x.dir, x.repo, "refs/heads/main")
	x.tell(forgetest.Event{Ref: "refs/heads/main", Before: before, After: after, Message: "words"})
	x.status(after, "success")
	if code, body := x.b.get(t, x.app, "/"); code != 200 || !strings.Contains(body, "from a submodule") {
		t.Errorf("the app answers %d %q", code, body)
	}
	if all := x.f.Statuses(after); len(all) == 0 || all[0].Context != "m3o/labbed" {
		t.Errorf("statuses %+v", all)
	}
	if d := x.f.Deployments(); d["success"] < 1 {
		t.Errorf("deployments %v", d)
	}

	x.p.must(t, x.dir, "git", "commit", "-q", "--allow-empty", "-m", "proposal")
	_, head := x.f.Push(t, x.dir, x.repo, forgetest.PullRef("gitlab", 7))
	x.tell(forgetest.Event{Pull: 7, Act: "opened", Head: head})
	x.status(head, "success")
	if code, body := x.b.get(t, "pr-7--labbed", "/"); code != 200 || !strings.Contains(body, "from a submodule") {
		t.Errorf("the merge request's preview answers %d %q", code, body)
	}
	x.p.edit(t, x.dir, "main.go", `words.Text`, `"improved " + words.Text`)
	_, head = x.f.Push(t, x.dir, x.repo, forgetest.PullRef("gitlab", 7))
	x.tell(forgetest.Event{Pull: 7, Act: "updated", Head: head})
	x.status(head, "success")
	eventually(t, "the improved version", func() bool { _, body := x.b.get(t, "pr-7--labbed", "/"); return strings.Contains(body, "improved") })
	eventually(t, "one note, edited", func() bool {
		c := x.f.Comments(7)
		return len(c) == 1 && c[0].Edits > 0 && strings.Contains(c[0].Text, head) && strings.Contains(c[0].Text, "https://pr-7--labbed.localhost")
	})
	x.tell(forgetest.Event{Pull: 7, Act: "closed", Head: head})
	eventually(t, "the preview to go", func() bool { code, _ := x.b.get(t, "pr-7--labbed", "/"); return code == 404 })

	_, foreign := x.f.Push(t, x.dir, x.repo, forgetest.PullRef("gitlab", 8))
	x.tell(forgetest.Event{Pull: 8, Act: "opened", Head: foreign, HeadRepo: "eve/labbed-fork"})
	eventually(t, "the fork to wait", func() bool {
		return strings.Contains(x.p.must(t, "", "m3o", "previews", "-a", x.app), "waits for approval")
	})
	if code, _ := x.b.get(t, "pr-8--labbed", "/"); code != 404 {
		t.Errorf("a fork's preview answers %d before it was approved", code)
	}
	x.p.must(t, "", "m3o", "repo:approve", "pr-8", foreign, "-a", x.app)
	eventually(t, "the fork to run", func() bool { code, _ := x.b.get(t, "pr-8--labbed", "/"); return code == 200 })

	_, topic := x.f.Push(t, x.dir, x.repo, "refs/heads/topic")
	x.tell(forgetest.Event{Ref: "refs/heads/topic", Before: strings.Repeat("0", 40), After: topic, Message: "topic"})
	eventually(t, "the branch at its own URL", func() bool { code, _ := x.b.get(t, "topic--labbed", "/"); return code == 200 })
	x.f.Delete(t, x.repo, "refs/heads/topic")
	x.tell(forgetest.Event{Ref: "refs/heads/topic", Before: topic, After: strings.Repeat("0", 40)})
	eventually(t, "the branch's URL to go", func() bool { code, _ := x.b.get(t, "topic--labbed", "/"); return code == 404 })
	if strings.Contains(x.b.log.String(), forgetest.Token) {
		t.Error("the token is in the daemon's log")
	}
}

// m3o run host/owner/name/folder@branch deploys a public repository.
func TestRunOfARemoteRepository(t *testing.T) {
	b := theBox(t)
	p := b.user(t, "micro")
	f := forgetest.New(t)
	if err := os.WriteFile(filepath.Join(b.dir, "forge.crt"), f.CA(), 0o600); err != nil {
		t.Fatal(err)
	}
	address := f.Repo(t, "org/services", false)
	dir := p.clone(t, "hello-http", "unused")
	p.must(t, dir, "sh", "-c", "mkdir -p greetings/hello-there && git mv go.mod main.go greetings/hello-there/ && git commit -q -m moved")
	f.Push(t, dir, "org/services", "refs/heads/next")
	out, err := p.try("", "m3o", "run", address+"/greetings/hello-there@next")
	if err != nil || !strings.Contains(out, "Released v1") || !strings.Contains(out, "https://hello-there.localhost") {
		t.Fatalf("m3o run: %v\n%s", err, out)
	}
	defer p.must(t, "", "m3o", "destroy", "--confirm", "hello-there", "-a", "hello-there")
	if code, body := b.get(t, "hello-there", "/"); code != 200 || !strings.Contains(body, "version 1") {
		t.Errorf("it answers %d %q", code, body)
	}
	// The same again takes what is there now.
	setVersion(t, p, filepath.Join(dir, "greetings", "hello-there"), "newer")
	f.Push(t, dir, "org/services", "refs/heads/next")
	p.must(t, "", "m3o", "run", address+"/greetings/hello-there@next")
	if _, body := b.get(t, "hello-there", "/"); !strings.Contains(body, "newer") {
		t.Errorf("run again, it answers %q", body)
	}
	for _, c := range []struct{ source, want string }{
		{address + "/greetings/hello-there@nosuch", "no branch or tag nosuch"},
		{address + "/greetings/nosuch@next", "nosuch"},
		{f.Host + "/org/nosuch", "check the address; a private repository is deployed by m3o repo:connect"},
	} {
		if out, err := p.try("", "m3o", "run", c.source, "-a", "never-made"); err == nil || !strings.Contains(out, c.want) || !strings.Contains(out, "m3o: hint: ") {
			t.Errorf("%s: %v\n%s\nwant %q and a hint", c.source, err, out, c.want)
		}
	}
}

// A branch that is pushed with -o preview runs beside the app at a URL of its
// own, calls the live app that its app is linked to, sleeps and wakes.
func TestPreviewOfABranchCallsLiveSiblings(t *testing.T) {
	b := theBox(t)
	p := b.user(t, "pia")
	front := p.clone(t, "hello-http", "shopfront")
	put(t, front, "cmd/ask/main.go", dialer)
	put(t, front, "Procfile", "web: hello-http\nrelease: ask shopfront\n")
	p.commit(t, front, "ask")
	back := p.clone(t, "hello-http", "stock")
	for _, dir := range []string{front, back} {
		if out, err := p.push(dir); err != nil {
			t.Fatalf("push: %v\n%s", err, out)
		}
	}
	p.must(t, back, "m3o", "links:add", "shopfront")
	p.must(t, front, "git", "checkout", "-q", "-b", "feature")
	setVersion(t, p, front, "feature")
	out := p.must(t, front, "git", "push", "m3o", "feature", "-o", "preview")
	if !strings.Contains(out, "https://feature--shopfront.localhost") || !strings.Contains(out, "Released v1") {
		t.Errorf("the push says\n%s", out)
	}
	if _, body := b.get(t, "feature--shopfront", "/"); !strings.Contains(body, "feature") {
		t.Errorf("the preview answers %q", body)
	}
	if _, body := b.get(t, "shopfront", "/"); !strings.Contains(body, "version 1") {
		t.Errorf("the app answers %q", body)
	}
	if got := strings.TrimSpace(p.must(t, "", "m3o", "run", "-a", "feature--shopfront", "--", "ask", "stock")); got != "200 OK" {
		t.Errorf("the preview calls its live sibling: %s", got)
	}
	if out := p.must(t, "", "m3o", "previews", "-a", "shopfront"); !regexp.MustCompile(`feature\s+live`).MatchString(out) {
		t.Errorf("m3o previews says\n%s", out)
	}
	p.must(t, "", "m3o", "ps:sleep", "--after", "1s", "-a", "feature--shopfront")
	eventually(t, "it sleeps", func() bool {
		return strings.Contains(p.must(t, "", "m3o", "info", "-a", "feature--shopfront"), "asleep")
	})
	if code, body := b.get(t, "feature--shopfront", "/"); code != 200 || !strings.Contains(body, "feature") {
		t.Errorf("woken, the preview answers %d %q", code, body)
	}
	p.must(t, "", "m3o", "previews:destroy", "feature", "-a", "shopfront")
	if code, _ := b.get(t, "feature--shopfront", "/"); code != 404 {
		t.Errorf("destroyed, the preview answers %d", code)
	}
	for _, app := range []string{"shopfront", "stock"} {
		p.must(t, "", "m3o", "destroy", "--confirm", app, "-a", app)
	}
}

// What a person gets wrong when connecting is answered with what to do.
func TestConnectingWrongly(t *testing.T) {
	b := theBox(t)
	p := b.user(t, "wrongly")
	f := forgetest.New(t)
	if err := os.WriteFile(filepath.Join(b.dir, "forge.crt"), f.CA(), 0o600); err != nil {
		t.Fatal(err)
	}
	address := f.Repo(t, "org/wrongly", true)
	p.must(t, "", "m3o", "create", "wrongly", "--no-remote")
	defer p.must(t, "", "m3o", "destroy", "--confirm", "wrongly", "-a", "wrongly")
	api := "https://" + f.Host + "/api/v3/"
	for _, c := range []struct {
		what  string
		stdin string
		args  []string
		want  string
	}{
		{"no forge", "", []string{address}, "which kind of forge is"},
		{"unknown forge", "", []string{address, "--forge", "sourceforge"}, `no forge is called "sourceforge"`},
		{"bad token", "wrong", []string{address, "--forge", "github", "--api-url", api, "--token-stdin"}, "the forge refuses the token"},
		{"no token", "", []string{address, "--forge", "github", "--api-url", api, "--token-stdin"}, "stdin has no token"},
		{"private, no credential", "", []string{address, "--forge", "github", "--api-url", api}, "is private or does not exist"},
		{"wrong forge", forgetest.Token, []string{address, "--forge", "gitlab", "--api-url", api, "--token-stdin"}, "not"},
		{"wrong API", forgetest.Token, []string{address, "--forge", "github", "--api-url", "https://127.0.0.1:1/", "--token-stdin"}, "127.0.0.1:1"},
		{"API by http", forgetest.Token, []string{address, "--forge", "github", "--api-url", "http://" + f.Host + "/", "--token-stdin"}, "https"},
		{"http", "", []string{"http://" + address}, "http:// is not fetched from"},
		{"no owner", "", []string{"github.com/only"}, "names no repository"},
		{"a local path", "", []string{"./repo"}, "names no repository"},
		{"password in it", "", []string{"https://u:sesame@github.com/a/b"}, "has a user in it"},
		{"folder outside", "", []string{address, "--forge", "github", "--dir", "../x"}, "no folder of the repository"},
		{"no such branch name", forgetest.Token, []string{address, "--forge", "github", "--api-url", api, "--token-stdin", "--branch", "a..b"}, "a..b"},
		{"half an App", "", []string{address, "--github-app", "7"}, "--app-key together"},
		{"App elsewhere", "", []string{address, "--forge", "gitlab", "--github-app", "7", "--app-key", filepath.Join(b.dir, "forge.crt")}, "a GitHub App is for GitHub"},
		{"App without a key", "", []string{address, "--forge", "github", "--github-app", "7", "--app-key", "/dev/null"}, "the private key of the GitHub App is empty"},
		{"no such repository", forgetest.Token, []string{f.Host + "/org/nosuch", "--forge", "github", "--api-url", api, "--token-stdin"}, "no such repository"},
	} {
		t.Run(c.what, func(t *testing.T) {
			cmd := p.command("", "m3o", append([]string{"repo:connect", "-a", "wrongly"}, c.args...)...)
			cmd.Stdin = strings.NewReader(c.stdin)
			out, err := cmd.CombinedOutput()
			if err == nil || !strings.Contains(string(out), c.want) || !strings.Contains(string(out), "m3o: hint: ") || strings.Contains(string(out), "sesame") {
				t.Errorf("%v\n%s\nwant %q and a hint", err, out, c.want)
			}
		})
	}
	if n := len(f.Hooks()); n != 0 {
		t.Errorf("%d webhooks were left at the forge", n)
	}
	for _, args := range [][]string{{"repo:info"}, {"repo:disconnect"}, {"repo:deliveries"}, {"repo:approve", "pr-1"}, {"previews:destroy", "pr-1"}} {
		if out, err := p.try("", "m3o", append(slices.Clone(args), "-a", "wrongly")...); err == nil || !strings.Contains(out, "m3o: hint: m3o ") {
			t.Errorf("%q without a connection: %v\n%s\nwant a hint", args, err, out)
		}
	}
}
