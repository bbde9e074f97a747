package main

import (
	"bytes"
	"context"
	"encoding/json"
	"os"
	"path/filepath"
	goruntime "runtime"
	"strings"
	"testing"
	"time"

	m3ov1 "github.com/m3o/m3o/api/m3o/v1"

	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"
)

func TestCreateAddsTheGitRemote(t *testing.T) {
	p := newPlatform(t)
	l := newLaptop(t).ci(p)
	l.do("create", "outside").want(t, 0, []string{"outside\n", "https://outside.localhost"}, []string{"m3o: hint: in your repository: m3o git:remote -a outside"})

	l.repo()
	l.do("create", "hello").want(t, 0, []string{"hello\n", "ssh://m3o@git.localhost:2222/hello"}, []string{"added the git remote m3o", "m3o: hint: git push m3o main\n"})
	if got := l.gitDo("remote", "get-url", "m3o"); got != "ssh://m3o@git.localhost:2222/hello" {
		t.Errorf("remote %s", got)
	}
	// Another app leaves the remote alone and says how to change it.
	l.do("apps", "create").want(t, 0, []string{"calm-river\n"}, []string{"the git remote m3o stays at ssh://m3o@git.localhost:2222/hello", "m3o git:remote -a calm-river"})
	l.do("git:remote", "-a", "calm-river").want(t, 0, nil, []string{"set the git remote m3o", "m3o: undo: git remote set-url m3o ssh://m3o@git.localhost:2222/hello"})
	if got := l.gitDo("remote", "get-url", "m3o"); got != "ssh://m3o@git.localhost:2222/calm-river" {
		t.Errorf("remote %s", got)
	}
	l.do("git", "remote", "-a", "hello", "-r", "staging").want(t, 0, nil, []string{"added the git remote staging", "git push staging main"})
	l.gitDo("checkout", "-q", "-b", "feature")
	l.do("create", "-b", "trunk", "-r", "third", "third").want(t, 0, nil, []string{"git push third HEAD:trunk"})
	l.do("create", "fourth", "--no-remote")
	l.m3o("git:remote").want(t, 2, nil, []string{"which app"})
	l.m3o("git:remote", "-a", "nope").want(t, 1, nil, []string{"m3o: error: no app called nope\n", "m3o: hint: m3o apps\n"})
	l.m3o("create", "hello").want(t, 1, nil, []string{"there is an app called hello already"})
	// The server's word, made to fit the house style; its own kind of misuse.
	l.m3o("create", "Bad_Name").want(t, 2, nil, []string{"m3o: error: app name \"Bad_Name\" has the character '_'\n", "m3o: hint: use a-z, 0-9 and single hyphens\n"})

	var got m3ov1.CreateAppResponse
	if err := protojson.Unmarshal([]byte(l.do("create", "json", "--json", "--no-remote").out), &got); err != nil || got.GetApp().GetName() != "json" {
		t.Errorf("JSON: %v %v", &got, err)
	}
}

// A git URL is an argument of git: a hostile server's must not reach it.
func TestHostileGitURLIsRefused(t *testing.T) {
	p := newPlatform(t)
	l := newLaptop(t).ci(p)
	l.repo()
	for i, bad := range []string{"--upload-pack=touch x", "ext::sh -c id", "ssh://-oProxyCommand=id/hello", "https://example.com/hello", ""} {
		p.hello().GitUrl = bad
		p.apps[i].Name = "bad" + string(rune('a'+i))
		l.m3o("git:remote", "-a", p.apps[i].Name).want(t, 1, nil, []string{"the server answered with a git URL that is none"})
	}
	if got := l.gitDo("remote"); got != "" {
		t.Errorf("remotes %q", got)
	}
}

func TestTheAppComesFromFlagRemoteOrVariable(t *testing.T) {
	p := newPlatform(t)
	p.hello()
	p.host("byvar", "ada", "")
	p.host("byflag", "ada", "")
	p.host("staging", "ada", "")
	l := newLaptop(t).ci(p)
	l.vars["M3O_APP"] = "byvar"
	name := func(args ...string) string {
		t.Helper()
		var got m3ov1.GetAppResponse
		o := l.do(append([]string{"info", "--json"}, args...)...)
		if err := protojson.Unmarshal([]byte(o.out), &got); err != nil {
			t.Fatal(err)
		}
		return got.GetApp().GetName()
	}
	if got := name(); got != "byvar" {
		t.Errorf("outside a repository: %s", got)
	}
	l.repo()
	l.gitDo("remote", "add", "m3o", "ssh://m3o@git.localhost:2222/hello")
	l.gitDo("remote", "add", "prod", "m3o@git.localhost:staging")
	l.gitDo("remote", "add", "origin", "https://example.com/x/y.git")
	for _, tc := range []struct{ args, want string }{
		{"", "hello"}, {"-a byflag", "byflag"}, {"--app=byflag", "byflag"}, {"-abyflag", "byflag"}, {"byflag", "byflag"}, {"-r prod", "staging"}, {"-r prod -a byflag", "byflag"},
	} {
		if got := name(strings.Fields(tc.args)...); got != tc.want {
			t.Errorf("info %s is %s, want %s", tc.args, got, tc.want)
		}
	}
	l.m3o("info", "-r", "nope").want(t, 2, nil, []string{"no git remote called nope here"})
	l.m3o("info", "-r", "origin").want(t, 2, nil, []string{"is no git remote of an app: it does not begin with ssh://", "m3o git:remote -a APP -r origin"})
	l.m3o("info", "-r", "--x").want(t, 2, nil, []string{`"--x" is no name of a git remote`})
	sub := filepath.Join(l.dir, "deep", "er")
	if err := os.MkdirAll(sub, 0o755); err != nil {
		t.Fatal(err)
	}
	l.dir = sub
	if got := name(); got != "hello" {
		t.Errorf("in a folder below: %s", got)
	}
}

// In a checkout of one installation a command must not reach the app of the
// same name on another, though that one is current.
func TestCommandsGoToTheServerOfTheRemote(t *testing.T) {
	p, q, l := newPlatform(t), newPlatform(t), newLaptop(t)
	l.keyFile("id_ed25519", "")
	for _, s := range []*platform{p, q} {
		s.hello()
		l.do("login", s.url, "--code", "first-start", "--ca-fingerprint", fingerprint(s.ca.cert))
	}
	st := stored(t, l)
	st.Servers[p.url].GitHost = "git.p.example:22"
	if err := l.system(nil, nil).saveSettings(st); err != nil {
		t.Fatal(err)
	}
	l.repo()
	l.gitDo("remote", "add", "m3o", "ssh://m3o@git.p.example/hello")
	l.do("destroy", "--confirm", "hello")
	if len(p.apps) != 0 || len(q.apps) != 1 {
		t.Errorf("apps left: %d on the remote's server, %d on the current one; want 0 and 1", len(p.apps), len(q.apps))
	}
}

func TestDestroyAsksForTheName(t *testing.T) {
	for _, tc := range []struct {
		name   string
		args   string
		typing bool
		in     string
		exit   int
		stderr string
	}{
		{"no terminal", "destroy -a hello", false, "hello\n", 2, "m3o: hint: m3o destroy -a hello --confirm hello"},
		{"other name confirmed", "destroy -a hello --confirm helo", false, "", 2, "nothing was destroyed"},
		{"other name typed", "destroy -a hello", true, "helo\n", 1, "not confirmed: nothing was destroyed"},
		{"yes is not the name", "kill hello", true, "y\n", 1, "not confirmed"},
		{"end of input", "destroy hello", true, "", 1, "not confirmed"},
		{"typed", "apps destroy hello", true, "hello\n", 0, "Type the name of the app to go on"},
		{"confirmed", "destroy --app hello --confirm=hello", false, "", 0, ""},
		{"kill", "kill hello --confirm hello", false, "", 0, ""},
		{"not there", "destroy nope --confirm nope", false, "", 1, "no app called nope"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			p := newPlatform(t)
			p.hello()
			l := newLaptop(t).ci(p)
			l.typing, l.in = tc.typing, tc.in
			l.m3o(strings.Fields(tc.args)...).want(t, tc.exit, nil, []string{tc.stderr})
			if gone := len(p.apps) == 0; gone != (tc.exit == 0) {
				t.Errorf("destroyed: %v", gone)
			}
		})
	}
}

func TestTables(t *testing.T) {
	p := newPlatform(t)
	l := newLaptop(t).ci(p)
	l.do("apps").want(t, 0, nil, []string{"no apps yet", "m3o: hint: m3o create"})
	p.hello()
	p.host("a-long-name", "ada", "")
	l.watched = true
	l.vars["NO_COLOR"] = "1"
	for _, tc := range []struct{ args, want string }{
		{"apps", "APP          STATUS      RELEASE  INSTANCES  RELEASED       URL\n" +
			"hello        running     v2       2          2 minutes ago  https://hello.localhost\n" +
			"a-long-name  no release           0                         https://a-long-name.localhost\n"},
		{"releases -a hello", "RELEASE  STATUS  COMMIT   BY   WHEN           WHAT\n" +
			"v2       live    2222222  ada  2 minutes ago  git push: second line\n" +
			"v1       kept    1111111  ada  2 minutes ago  git push: first\n"},
		{"releases -n 1 -a hello", "RELEASE  STATUS  COMMIT   BY   WHEN           WHAT\n" +
			"v2       live    2222222  ada  2 minutes ago  git push: second line\n"},
		{"releases:info -a hello v1", "Release  v1\nStatus   kept\nReason   git push\nCommit   1111111111111111111111111111111111111111\nMessage  first\nBy       ada\nCreated  2 minutes ago\nBuild    0\nConfig   revision 1\n"},
		{"builds -a hello", "BUILD  STATUS     COMMIT   BY   WHEN           TOOK    WHAT\n" +
			"2      succeeded  2222222  ada  3 minutes ago  2.1s    second\n" +
			"1      failed              ada  5 minutes ago  300 ms  main.go:7: undefined: greet\n"},
		{"ps hello", "PROCESS  INSTANCE     RELEASE  PHASE     CPU  MEMORY        RESTARTS  SINCE\n" +
			"web      hello-web-1  v2       ready     13%  40 MB/512 MB  0         2 minutes ago\n" +
			"web      hello-web-2  v2       crashing                     4         3 hours ago\n" +
			"\nhello-web-2: exited with code 3, 4 times in a row\n  panic: no database\n"},
		{"config -a hello", "NAME      VALUE\nGREETING  Hello\nAPI_KEY   (secret)\n"},
		{"info hello", "App        hello\nURL        https://hello.localhost\nGit        ssh://m3o@git.localhost:2222/hello\nStatus     running\nRelease    v2\nCommit     2222222\n" +
			"Instances  2 ready\nBranch     main\nOwner      ada\nCreated    2 days ago\nReleased   2 minutes ago\n"},
	} {
		if got := l.do(strings.Fields(tc.args)...).out; got != tc.want {
			t.Errorf("m3o %s\n%s\nwant\n%s", tc.args, got, tc.want)
		}
	}
	if got, want := l.do("status").out, l.do("apps").out; got != want {
		t.Errorf("status without an app is not apps: %s", got)
	}
	if got, want := l.do("status", "hello").out, l.do("ps", "hello").out; got != want {
		t.Errorf("status of an app is not ps: %s", got)
	}
	// Colour only on a terminal and without NO_COLOR; times for machines elsewhere.
	delete(l.vars, "NO_COLOR")
	if got := l.do("apps").out; !strings.Contains(got, "\x1b[32mrunning\x1b[0m     v2 ") {
		t.Errorf("no colour, or columns broken by it: %q", got)
	}
	l.watched = false
	if got := l.do("apps").out; strings.Contains(got, "\x1b") || !strings.Contains(got, "2026-05-04T11:58:00Z") {
		t.Errorf("piped: %q", got)
	}
}

func TestJSONHasTheNamesOfTheContract(t *testing.T) {
	p := newPlatform(t)
	p.hello()
	l := newLaptop(t).ci(p)
	for args, msg := range map[string]proto.Message{
		"apps": &m3ov1.ListAppsResponse{}, "info": &m3ov1.GetAppResponse{}, "releases": &m3ov1.ListReleasesResponse{},
		"builds": &m3ov1.ListBuildsResponse{}, "config": &m3ov1.ListConfigResponse{}, "ps": &m3ov1.ListInstancesResponse{},
		"whoami": &m3ov1.WhoamiResponse{}, "keys": &m3ov1.ListKeysResponse{}, "rollback": &m3ov1.RollbackResponse{},
		"config:set X=y": &m3ov1.SetConfigResponse{}, "config:unset X": &m3ov1.UnsetConfigResponse{}, "config:get GREETING": &m3ov1.Var{},
		"destroy --confirm hello": &m3ov1.DestroyAppResponse{},
	} {
		if strings.HasPrefix(args, "destroy") {
			defer func() {
				o := l.do("destroy", "--confirm", "hello", "-a", "hello", "--json")
				if o.out != "{}\n" {
					t.Errorf("destroy --json: %s", o.out)
				}
			}()
			continue
		}
		l.vars["M3O_APP"] = "hello"
		o := l.do(append(strings.Fields(args), "--json")...)
		if err := protojson.Unmarshal([]byte(o.out), msg); err != nil {
			t.Errorf("%s --json: %v\n%s", args, err, o.out)
		}
		if !json.Valid([]byte(o.out)) || strings.Contains(o.out, "gitUrl") {
			t.Errorf("%s --json: %s", args, o.out)
		}
	}
	l.do("info", "-a", "hello", "--json").want(t, 0, []string{`"git_url": "ssh://m3o@git.localhost:2222/hello"`, `"created": "2026-05-02T12:00:00Z"`}, nil)
	l.do("open", "--json").want(t, 0, []string{`"url": "https://hello.localhost"`}, nil)
}

func TestRollbackPrintsTheUndo(t *testing.T) {
	p := newPlatform(t)
	p.hello()
	l := newLaptop(t).ci(p)
	l.do("rollback", "v1", "-a", "hello").want(t, 0, []string{"released v3 in 240 ms: rollback to v1\n"}, []string{"m3o: undo: m3o rollback v2 -a hello\n"})
	l.do("releases:rollback", "-a", "hello").want(t, 0, []string{"released v4"}, []string{"m3o: undo: m3o rollback v3 -a hello\n"})
	l.m3o("rollback", "99", "-a", "hello").want(t, 1, nil, []string{"m3o: error: hello has no release v99", "m3o: hint: m3o releases -a hello"})
}

func TestLogs(t *testing.T) {
	p := newPlatform(t)
	p.hello()
	l := newLaptop(t).ci(p)
	if got, want := l.do("logs", "hello").out, "2026-05-04T11:59:00Z m3o: released v1\n"+
		"2026-05-04T11:59:30Z app[web.hello-web-1]: serving \x1b[31mred\x1b[0m\n"+
		"2026-05-04T11:59:40Z app[worker.hello-worker-1]: bad \x1b]0;owned\x07\x1b[2Jthing\n"; got != want {
		t.Errorf("piped logs are not what the app wrote:\n%q\nwant\n%q", got, want)
	}
	l.do("logs", "-n", "1", "-a", "hello").want(t, 0, []string{"worker"}, nil)
	if got := l.do("logs", "-p", "web", "hello").out; strings.Count(got, "\n") != 1 || !strings.Contains(got, "web") {
		t.Errorf("logs of web: %q", got)
	}
	for row := range strings.Lines(l.do("logs", "hello", "--json").out) {
		if err := protojson.Unmarshal([]byte(row), &m3ov1.LogsResponse{}); err != nil {
			t.Errorf("JSON line %q: %v", row, err)
		}
	}
	// On a terminal an app may colour its lines and nothing else.
	l.watched = true
	got := l.do("logs", "hello").out
	if strings.Contains(got, "\x1b]") || strings.Contains(got, "\x1b[2J") || strings.Contains(got, "\x07") || !strings.Contains(got, "\x1b[31mred") {
		t.Errorf("terminal: %q", got)
	}
	l.vars["NO_COLOR"] = "1"
	if got := l.do("logs", "hello").out; strings.Contains(got, "\x1b") {
		t.Errorf("NO_COLOR: %q", got)
	}
	l.m3o("logs", "nope").want(t, 1, nil, []string{"no app called nope", "m3o: hint: m3o apps"})
}

func TestCtrlCEndsAFollowedStreamWell(t *testing.T) {
	p := newPlatform(t)
	p.hello()
	l := newLaptop(t).ci(p)
	for _, line := range []string{"logs -f hello", "builds:output -f -a hello"} {
		ctx, cancel := context.WithCancel(t.Context())
		var out, errw bytes.Buffer
		done := make(chan int, 1)
		go func() { done <- run(ctx, strings.Fields(line), l.system(&out, &errw)) }()
		select {
		case <-p.reached:
		case code := <-done:
			t.Fatalf("%s ended by itself with %d: %s", line, code, errw.String())
		}
		cancel()
		if code := <-done; code != 0 || errw.Len() > 0 {
			t.Errorf("%s: exit %d, %s", line, code, errw.String())
		}
	}
}

func TestBuildOutput(t *testing.T) {
	p := newPlatform(t)
	p.hello()
	l := newLaptop(t).ci(p)
	if got, want := l.do("builds:output", "-a", "hello").out, "-----> Building\n       go build\x1b]0;title\x07\ndone"; got != want {
		t.Errorf("piped: %q, want %q", got, want)
	}
	l.watched = true
	if got, want := l.do("builds", "output", "1", "-f", "-a", "hello").out, "-----> Building\n       go build\ndone\n"; got != want {
		t.Errorf("terminal: %q, want %q", got, want)
	}
	l.m3o("builds:output", "9", "-a", "hello").want(t, 1, nil, []string{"no build 9", "m3o: hint: m3o builds"})
}

func TestOpenStartsTheBrowser(t *testing.T) {
	if goruntime.GOOS != "linux" {
		t.Skip("xdg-open is Linux's")
	}
	p := newPlatform(t)
	p.hello()
	l := newLaptop(t).ci(p)
	bin, seen := t.TempDir(), filepath.Join(t.TempDir(), "seen")
	if err := os.WriteFile(filepath.Join(bin, "xdg-open"), []byte("#!/bin/sh\necho \"$1\" >> "+seen+"\n"), 0o755); err != nil {
		t.Fatal(err)
	}
	t.Setenv("PATH", bin+":"+os.Getenv("PATH"))
	l.do("open", "hello").want(t, 0, []string{"https://hello.localhost\n"}, nil)
	l.watched = true
	l.do("open", "hello", "--print")
	if _, err := os.Stat(seen); err == nil {
		t.Error("a browser was started though nobody watches, or only the URL was asked for")
	}
	l.do("open", "hello")
	if got, err := os.ReadFile(seen); err != nil || string(got) != "https://hello.localhost\n" {
		t.Errorf("browser got %q, %v", got, err)
	}
	p.apps[0].Url = "file:///etc/passwd"
	l.m3o("open", "hello").want(t, 1, nil, []string{"hello has no URL to open"})
}

func TestKeysAndUsers(t *testing.T) {
	p := newPlatform(t)
	l := newLaptop(t).ci(p)
	l.do("keys").want(t, 0, nil, []string{"no keys", "m3o: hint: m3o keys:add"})
	l.m3o("keys:add").want(t, 2, nil, []string{"no public key in ~/.ssh"})
	k := l.keyFile("id_ed25519", "")
	l.keyFile("other", "")
	ssh := filepath.Join(l.vars["HOME"], ".ssh")
	l.do("keys:add").want(t, 0, []string{"added SHA256:", " for ada"}, []string{"m3o: undo: m3o keys:remove SHA256:"})
	l.do("keys").want(t, 0, []string{"ssh-ed25519  test@laptop", "never"}, nil)
	// A private key must not leave the computer.
	l.m3o("keys:add", filepath.Join(ssh, "id_ed25519")).want(t, 2, nil, []string{"is a private key: it stays on this computer"})
	l.m3o("keys:add", filepath.Join(ssh, "none.pub")).want(t, 1, nil, []string{"no such file"})
	l.in = "nonsense"
	l.m3o("keys", "add", "-").want(t, 2, nil, []string{"stdin holds no public SSH key"})
	pub, err := os.ReadFile(filepath.Join(ssh, "other.pub"))
	if err != nil {
		t.Fatal(err)
	}
	l.in = string(pub) + string(pub)
	l.m3o("keys", "add", "-").want(t, 2, nil, []string{"more than one key"})
	l.in = string(pub)
	l.do("keys", "add", "-", "--user", "grace").want(t, 0, []string{" for grace"}, nil)
	l.m3o("keys:remove", "test@laptop").want(t, 2, nil, []string{`2 keys are called "test@laptop"`})
	l.m3o("keys:remove", "nobody").want(t, 1, nil, []string{`no key called "nobody"`})
	l.do("keys:remove", (&key{public: k}).fingerprint()).want(t, 0, []string{"removed SHA256:"}, []string{"m3o: undo: m3o keys:add"})
	l.do("keys:remove", "test@laptop").want(t, 0, []string{"removed SHA256:"}, nil)
	l.do("users:create", "linus", "--admin").want(t, 0, []string{"made linus"}, []string{"m3o keys:add FILE --user linus"})
	l.do("users", "create", "ken", "--key", filepath.Join(ssh, "other.pub"))
	if !p.users["linus"] || p.users["ken"] || p.keys[0].GetUser() != "ken" {
		t.Errorf("users %v, keys %v", p.users, p.keys)
	}
}

func TestAgo(t *testing.T) {
	for d, want := range map[time.Duration]string{
		0: "just now", time.Second: "just now", 2 * time.Second: "2 seconds ago", time.Minute: "1 minute ago", 119 * time.Minute: "1 hour ago",
		50 * time.Hour: "2 days ago", 45 * 24 * time.Hour: "1 month ago", 800 * 24 * time.Hour: "2 years ago", -90 * time.Second: "in 1 minute",
	} {
		if got := ago(now.Add(-d), now); got != want {
			t.Errorf("ago(%v) = %q, want %q", d, got, want)
		}
	}
}

func TestQuote(t *testing.T) {
	for in, want := range map[string]string{"a=b": "a=b", "": "''", "a b": "'a b'", "it's": `'it'\''s'`, "$(id)": "'$(id)'", "é": "'é'"} {
		if got := quote(in); got != want {
			t.Errorf("quote(%q) = %s, want %s", in, got, want)
		}
	}
}
