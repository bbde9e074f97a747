package main

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
)

func TestPushBuildsReleasesAndServes(t *testing.T) {
	b := theBox(t)
	ada := b.user(t, "ada")
	dir := ada.clone(t, "hello-grpc", "hello")
	ada.must(t, dir, "m3o", "create", "hello")
	out, err := ada.push(dir)
	if err != nil {
		t.Fatalf("push: %v\n%s\n%s", err, out, b.log.tail(3000))
	}
	for _, want := range []string{`remote: -----> `, `remote:        Released v1 in [0-9.m]+s \(build [0-9.m]+s, start [0-9.m]+s\)`,
		`remote:        https://hello\.localhost:\d+`, `remote:        Access: public`, `\[new branch\]\s+main -> main`} {
		if !regexp.MustCompile(want).MatchString(out) {
			t.Errorf("the push does not say %s:\n%s", want, out)
		}
	}
	if strings.Contains(out, "\x1b") {
		t.Errorf("the push prints escape sequences: %q", out)
	}
	t.Run("JSON", func(t *testing.T) {
		got := ada.must(t, dir, "curl", "-sS", "--fail-with-body", "-H", "Content-Type: application/json", "-d", `{"name":"Ada"}`, b.url("hello", "/helloworld.Greeter/Hello"))
		if !strings.Contains(got, `Hello Ada`) {
			t.Errorf("JSON answer %q, want Hello Ada", got)
		}
	})
	t.Run("path form of the api host", func(t *testing.T) {
		got := ada.must(t, dir, "curl", "-sS", "--fail-with-body", "-d", `{"name":"Joe"}`, b.url("api", "/hello/greeter/hello"))
		if !strings.Contains(got, `Hello Joe`) {
			t.Errorf("answer %q, want Hello Joe", got)
		}
	})
	t.Run("gRPC", func(t *testing.T) {
		got := ada.must(t, dir, filepath.Join(b.bin, "tools", "askgrpc"), "-ca", filepath.Join(b.data, "ca", "ca.crt"), "-addr", b.https, "-host", "hello.localhost", "-method", "/helloworld.Greeter/Hello", "-name", "Grace")
		if !strings.Contains(got, "Hello Grace") {
			t.Errorf("gRPC answer %q, want Hello Grace", got)
		}
	})
	t.Run("records", func(t *testing.T) {
		for _, c := range []struct{ args, want string }{
			{"releases", `v1\s+live`},
			{"builds", `1\s+succeeded`},
			{"ps", `web.*ready`},
			{"apps", `hello.*running`},
			{"info", `https://hello\.localhost`},
			{"builds:output 1", `Released v1`},
		} {
			got := ada.must(t, dir, "m3o", strings.Fields(c.args)...)
			if !regexp.MustCompile(c.want).MatchString(got) {
				t.Errorf("m3o %s says %q, want %s", c.args, got, c.want)
			}
		}
	})
	t.Run("clone", func(t *testing.T) {
		copied := filepath.Join(t.TempDir(), "copy")
		ada.must(t, "", "git", "clone", "-q", "ssh://m3o@"+b.sshHost()+"/hello", copied)
		want := ada.must(t, dir, "git", "rev-parse", "HEAD")
		if got := ada.must(t, copied, "git", "rev-parse", "HEAD"); got != want {
			t.Errorf("the clone is at %q, want %q", got, want)
		}
	})
	t.Run("unchanged tree", func(t *testing.T) {
		ada.commit(t, dir, "nothing")
		if out, err := ada.push(dir); err != nil || !strings.Contains(out, "Released v2") {
			t.Errorf("push of an unchanged tree: %v\n%s", err, out)
		}
	})
	t.Run("destroy", func(t *testing.T) {
		if out, err := ada.try(dir, "m3o", "destroy", "--confirm", "hello"); err != nil {
			t.Fatalf("destroy: %v\n%s", err, out)
		}
		if code, body := b.get(t, "hello", "/"); code != 404 {
			t.Errorf("a destroyed app answers %d %q, want 404", code, body)
		}
		if out, err := ada.try(dir, "git", "ls-remote", "m3o"); err == nil {
			t.Errorf("a destroyed app's repository still answers: %s", out)
		}
	})
}

// setVersion sets what hello-http answers and commits it.
func setVersion(t *testing.T, p *person, dir, v string) {
	t.Helper()
	file := filepath.Join(dir, "main.go")
	src, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	re := regexp.MustCompile(`(?m)^const version = ".*"$`)
	if !re.Match(src) {
		t.Fatalf("no version const in %s", file)
	}
	if err := os.WriteFile(file, re.ReplaceAll(src, fmt.Appendf(nil, "const version = %q", v)), 0o644); err != nil {
		t.Fatal(err)
	}
	p.commit(t, dir, "version "+v)
}

// A broken push says why in its last lines, leaves the branch and the live
// release as they were, and the app answers meanwhile.
func TestBrokenPushChangesNothing(t *testing.T) {
	b := theBox(t)
	eve := b.user(t, "eve")
	dir := eve.clone(t, "hello-http", "steady")
	setVersion(t, eve, dir, "one")
	if out, err := eve.push(dir); err != nil {
		t.Fatalf("first push: %v\n%s", err, out)
	}
	before := eve.must(t, dir, "git", "ls-remote", "m3o")
	probe := startProbe(t, b, "steady", "/")
	for _, c := range []struct{ sample, want string }{
		{"broken-compile", `undefined|syntax error|cannot use|declared and not used`},
		{"broken-panic", `panic`},
		{"broken-exit", `exited with 1|exit code 1|exited with code 1`},
		{"broken-port", `9999`},
		{"broken-health", `NOT_SERVING|not serving`},
		{"no-main", `main package|package main`},
	} {
		t.Run(c.sample, func(t *testing.T) {
			eve.must(t, dir, "git", "rm", "-rq", ".")
			if err := os.CopyFS(dir, os.DirFS(filepath.Join("..", "..", "testdata", "apps", c.sample))); err != nil {
				t.Fatal(err)
			}
			// These two would be waited for the whole minute.
			slow := map[string]string{"broken-health": "grpc: true", "broken-port": "tcp: true"}
			if check, ok := slow[c.sample]; ok {
				if err := os.WriteFile(filepath.Join(dir, "m3o.yaml"), []byte("health:\n  "+check+"\n  timeout: 5s\n"), 0o644); err != nil {
					t.Fatal(err)
				}
			}
			eve.commit(t, dir, c.sample)
			brokenPush(t, eve, dir, c.want, before)
			if c.sample == "broken-compile" {
				if got := eve.must(t, dir, "m3o", "builds:info"); !regexp.MustCompile(`(?s)failed.*go build +[0-9.]+ *m?s`).MatchString(got) {
					t.Errorf("builds:info of the failed build says:\n%s", got)
				}
			}
			eve.must(t, dir, "git", "reset", "-q", "--hard", "HEAD~1")
		})
	}
	for _, c := range []struct{ name, file, content, want string }{
		{"no go.mod", "go.mod", "", `go\.mod`},
		{"Procfile with merge-conflict marks", "Procfile", "web: app\n<<<<<<< HEAD\nworker: a\n=======\nworker: b\n>>>>>>> other\n", `Procfile:2`},
		{"unknown key in m3o.yaml", "m3o.yaml", "biuld:\n  dir: x\n", `m3o\.yaml:1`},
	} {
		t.Run(c.name, func(t *testing.T) {
			f := filepath.Join(dir, c.file)
			if c.content == "" {
				eve.must(t, dir, "git", "rm", "-q", c.file)
			} else if err := os.WriteFile(f, []byte(c.content), 0o644); err != nil {
				t.Fatal(err)
			}
			eve.commit(t, dir, c.name)
			brokenPush(t, eve, dir, c.want, before)
			eve.must(t, dir, "git", "reset", "-q", "--hard", "HEAD~1")
		})
	}
	if n, bad := probe.stop(); bad != 0 {
		t.Errorf("%d of %d probes failed during the broken pushes: %s", bad, n, probe.first)
	} else {
		t.Logf("%d probes answered, 0 failed", n)
	}
	if code, body := b.get(t, "steady", "/"); code != 200 || !strings.Contains(body, "one") {
		t.Errorf("the app answers %d %q, want version one", code, body)
	}
}

func brokenPush(t *testing.T, p *person, dir, want, refs string) {
	t.Helper()
	out, err := p.push(dir)
	if _, failed := err.(*exec.ExitError); !failed { //nolint:errorlint // exec.Cmd returns it bare
		t.Fatalf("the push did not fail: %v\n%s", err, out)
	}
	if !regexp.MustCompile(want).MatchString(out) {
		t.Errorf("the push does not say %s:\n%s", want, out)
	}
	if !regexp.MustCompile(`(?m)^remote:  !     .+`).MatchString(out) {
		t.Errorf("the push has no line that begins with an exclamation mark:\n%s", out)
	}
	if !strings.Contains(out, "[remote rejected] main -> main") {
		t.Errorf("git does not report the refusal:\n%s", out)
	}
	if got := p.must(t, dir, "git", "ls-remote", "m3o"); got != refs {
		t.Errorf("refs moved:\n%s\nwant\n%s", got, refs)
	}
}

func TestWhoMayNotIsRefused(t *testing.T) {
	b := theBox(t)
	owner, other := b.user(t, "owner"), b.user(t, "other")
	dir := owner.clone(t, "hello-http", "mine")
	owner.must(t, dir, "m3o", "create", "mine")
	foreign := other.clone(t, "hello-http", "mine")
	if out, err := other.push(foreign); err == nil || !strings.Contains(out, "no app called mine") {
		t.Errorf("push to another user's app: %v\n%s", err, out)
	}
	stranger, err := b.newPerson("stranger")
	if err != nil {
		t.Fatal(err)
	}
	if out, err := stranger.try("", "git", "ls-remote", "ssh://m3o@"+b.sshHost()+"/mine"); err == nil || !strings.Contains(out, "Permission denied") {
		t.Errorf("unknown key: %v\n%s", err, out)
	}
	if out, err := other.try("", "m3o", "info", "-a", "mine"); err == nil || strings.Contains(out, "owner") {
		t.Errorf("another user's app is shown: %v\n%s", err, out)
	}
	if out, err := owner.try(dir, "git", "push", "m3o", "main:feature"); err != nil || !strings.Contains(out, "only main deploys") {
		t.Errorf("push of another branch: %v\n%s", err, out)
	}
	out := owner.must(t, "", "ssh", append(strings.Fields(strings.TrimPrefix(sshCommand(owner), "ssh ")), "-p", portOf(b.ssh), "m3o@localhost", "apps")...)
	if !strings.Contains(out, "mine") {
		t.Errorf("apps over ssh says %q", out)
	}
	owner.must(t, dir, "m3o", "destroy", "--confirm", "mine")
}

func sshCommand(p *person) string {
	for _, e := range p.env() {
		if v, ok := strings.CutPrefix(e, "GIT_SSH_COMMAND="); ok {
			return v
		}
	}
	return ""
}

func portOf(addr string) string { return addr[strings.LastIndexByte(addr, ':')+1:] }

func TestConfigChangeMakesARelease(t *testing.T) {
	b := theBox(t)
	p := b.user(t, "conny")
	dir := p.clone(t, "hello-http", "settings")
	p.must(t, dir, "m3o", "create", "settings")
	p.must(t, dir, "m3o", "config:set", "GREETING=hi", "--no-restart")
	if out, err := p.push(dir); err != nil {
		t.Fatalf("push: %v\n%s", err, out)
	}
	if _, body := b.get(t, "settings", "/env?name=GREETING"); !strings.Contains(body, "hi") {
		t.Errorf("GREETING is %q, want hi", body)
	}
	p.must(t, dir, "m3o", "config:set", "GREETING=hello")
	if _, body := b.get(t, "settings", "/env?name=GREETING"); !strings.Contains(body, "hello") {
		t.Errorf("GREETING is %q after config:set, want hello", body)
	}
	out := p.must(t, dir, "m3o", "releases")
	if !regexp.MustCompile(`v2\s+live.*config set GREETING`).MatchString(out) {
		t.Errorf("releases say:\n%s", out)
	}
	out = p.must(t, dir, "m3o", "rollback")
	if !strings.Contains(out, "v3") {
		t.Errorf("rollback says %q", out)
	}
	if _, body := b.get(t, "settings", "/env?name=GREETING"); !strings.Contains(body, "hi") {
		t.Errorf("GREETING is %q after the rollback, want hi", body)
	}
	p.must(t, dir, "m3o", "destroy", "--confirm", "settings")
}
