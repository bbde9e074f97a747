package main

import (
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
)

// ready counts the ready instances that m3o ps lists.
func (p *person) ready(t *testing.T, dir string) int {
	t.Helper()
	return len(regexp.MustCompile(`(?m)^web .* ready `).FindAllString(p.must(t, dir, "m3o", "ps"), -1))
}

// Whatever an operator does to the instances, and whatever happens to one of
// two of them or to the daemon, no request fails.
func TestScaleRestartCrashAndNewDaemonLoseNoRequest(t *testing.T) {
	b := theBox(t)
	p := b.user(t, "elle")
	dir := p.clone(t, "hello-http", "elastic")
	if out, err := p.push(dir); err != nil {
		t.Fatalf("push: %v\n%s", err, out)
	}
	unary := startProbe(t, b, "elastic", "/")
	slow := startProbe(t, b, "elastic", "/slow?ms=300")
	c := b.client(t)
	for _, step := range []struct {
		what string
		do   func() error
		want int // instances
	}{
		{"scale up", func() error { p.must(t, dir, "m3o", "ps:scale", "web=3"); return nil }, 3},
		{"restart", func() error { p.must(t, dir, "m3o", "ps:restart"); return nil }, 3},
		{"scale down", func() error { p.must(t, dir, "m3o", "scale", "web=2"); return nil }, 2},
		{"limits beyond the machine", func() error {
			if out, err := p.try(dir, "m3o", "ps:limits", "web", "--memory", "900GB"); err != nil || !strings.Contains(out, "warning: web: it may use 921600 MB of memory, and this machine has") {
				return fmt.Errorf("%w: %s", err, out)
			}
			return nil
		}, 2},
		{"other limits", func() error {
			p.must(t, dir, "m3o", "ps:limits", "web", "--memory", "200MB", "--cpu", "1.5")
			return nil
		}, 2},
		{"config change", func() error { p.must(t, dir, "m3o", "config:set", "COLOR=blue"); return nil }, 2},
		{"push", func() error { setVersion(t, p, dir, "two"); _, err := p.push(dir); return err }, 2},
		{"rollback", func() error { p.must(t, dir, "m3o", "rollback"); return nil }, 2},
		{"daemon killed and started", func() error { b.kill(); return b.start() }, 2},
		{"another daemon", func() error {
			if err := b.stop(); err != nil {
				return err
			}
			return b.startAs(t)
		}, 2},
	} {
		before, _ := unary.failed()
		if err := step.do(); err != nil {
			t.Fatalf("%s: %v", step.what, err)
		}
		eventually(t, step.what+" is done", func() bool { return p.ready(t, dir) == step.want })
		if bad, first := unary.failed(); bad > before {
			t.Errorf("%s: %d requests failed: %s", step.what, bad-before, first)
		}
	}
	// The one that asks for the crash fails; nobody else's request does.
	if _, bad := slow.stop(); bad > 0 {
		t.Errorf("%d slow requests failed: %s", bad, slow.first)
	}
	before, _ := unary.failed()
	if pids := b.pids("m3o-shim", "-id elastic-web"); len(pids) != 2 {
		t.Errorf("shims: %v", pids)
	} else if err := syscall.Kill(pids[0], syscall.SIGKILL); err != nil {
		t.Error(err)
	}
	eventually(t, "the crashed instance is back", func() bool {
		return regexp.MustCompile(`(?m)^web .* ready .* 1 `).MatchString(p.must(t, dir, "m3o", "ps"))
	})
	if bad, first := unary.failed(); bad > before {
		t.Errorf("crash of one of two: %d requests failed: %s", bad-before, first)
	}
	n, bad := unary.stop()
	t.Logf("%d of %d requests failed", bad, n)
	if out := p.must(t, dir, "m3o", "ps:scale"); !strings.Contains(out, "200 MB") || !strings.Contains(out, "1.5") || !strings.Contains(out, "2/2") {
		t.Errorf("the scale is lost:\n%s", out)
	}
	ps := p.must(t, dir, "m3o", "ps")
	if !regexp.MustCompile(`web +elastic-\S+ +v\d+ +ready +\d+% +[\d.]+ MB/200 MB`).MatchString(ps) {
		t.Errorf("ps shows no usage:\n%s", ps)
	}
	p.must(t, dir, "m3o", "ps:stop")
	eventually(t, "it is stopped", func() bool { return p.ready(t, dir) == 0 })
	if code, body := b.get(t, "elastic", "/"); code != http.StatusServiceUnavailable {
		t.Errorf("stopped, it answers %d %q", code, body)
	}
	p.must(t, dir, "m3o", "ps:start")
	eventually(t, "it answers again", func() bool { return ask(c, b.url("elastic", "/")) == nil })
	if out, err := p.try(dir, "m3o", "ps:scale", "wep=2"); err == nil || !strings.Contains(out, "no process type called wep") {
		t.Errorf("an unknown type: %v\n%s", err, out)
	}
	p.must(t, dir, "m3o", "destroy", "--confirm", "elastic")
}

// failed is how many requests have failed so far.
func (p *probe) failed() (bad int, first string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.bad, p.first
}

// startAs starts the daemon from another file, as after an upgrade.
func (b *box) startAs(t *testing.T) error {
	t.Helper()
	exe, err := os.ReadFile("/proc/self/exe")
	if err != nil {
		return err
	}
	next := filepath.Join(b.dir, "m3od-next")
	if err := os.WriteFile(next, exe, 0o755); err != nil {
		return err
	}
	b.exe = next
	defer func() { b.exe = "" }()
	return b.start()
}

// An app that nobody uses is stopped; requests that come then wait for it,
// also after a restart of the daemon.
func TestIdleAppSleepsAndRequestsWakeIt(t *testing.T) {
	b := theBox(t)
	p := b.user(t, "nina")
	dir := p.clone(t, "hello-http", "sleepy")
	if out, err := p.push(dir); err != nil {
		t.Fatalf("push: %v\n%s", err, out)
	}
	p.must(t, dir, "m3o", "ps:sleep", "--after", "1s")
	asleep := func() bool { return strings.Contains(p.must(t, dir, "m3o", "status"), "asleep") }
	gone := func() bool { return len(b.pids("m3o-shim", "-id sleepy-")) == 0 }
	eventually(t, "it sleeps", func() bool { return asleep() && gone() })
	c := b.client(t)
	var all sync.WaitGroup
	for range 20 {
		all.Go(func() {
			if err := ask(c, b.url("sleepy", "/")); err != nil {
				t.Errorf("a first request: %v", err)
			}
		})
	}
	all.Wait()
	if n := len(b.pids("m3o-shim", "-id sleepy-")); n != 1 {
		t.Errorf("%d instances were started for 20 requests", n)
	}
	eventually(t, "it sleeps again", func() bool { return asleep() && gone() })
	b.kill()
	if err := b.start(); err != nil {
		t.Fatal(err)
	}
	if !asleep() || !gone() {
		t.Error("the restart of the daemon woke it")
	}
	if err := ask(c, b.url("sleepy", "/")); err != nil {
		t.Errorf("after the restart: %v", err)
	}
	// A push wakes it.
	eventually(t, "it sleeps once more", func() bool { return asleep() && gone() })
	setVersion(t, p, dir, "morning")
	if out, err := p.push(dir); err != nil {
		t.Fatalf("push: %v\n%s", err, out)
	}
	if _, body := b.get(t, "sleepy", "/"); strings.TrimSpace(body) != "morning" {
		t.Errorf("after the push it answers %q", body)
	}
	eventually(t, "it sleeps a last time", func() bool { return asleep() && gone() })
	p.must(t, dir, "m3o", "ps:sleep", "--never")
	eventually(t, "it is awake for good", func() bool { return p.ready(t, dir) == 1 })
	p.must(t, dir, "m3o", "destroy", "--confirm", "sleepy")
}

// A volume outlives deploys, is never written to by two instances, and its
// requests wait while one instance takes the place of another.
func TestVolumeSurvivesRedeploys(t *testing.T) {
	b := theBox(t)
	p := b.user(t, "vera")
	dir := p.clone(t, "hello-volume", "jotter")
	if out, err := p.push(dir); err != nil {
		t.Fatalf("push: %v\n%s", err, out)
	}
	c := b.client(t)
	add := func(note string) {
		t.Helper()
		res, err := c.Post(b.url("jotter", "/?note="+note), "", nil)
		if err != nil {
			t.Fatal(err)
		}
		defer res.Body.Close()
		if body, _ := io.ReadAll(res.Body); res.StatusCode != http.StatusOK {
			t.Errorf("add %s: %d %s", note, res.StatusCode, body)
		}
	}
	p.must(t, dir, "m3o", "storage:create", "data")
	p.must(t, dir, "m3o", "storage:mount", "data", "/data")
	add("one")
	steady := startProbe(t, b, "jotter", "/")
	setVersion(t, p, dir, "2")
	out, err := p.push(dir)
	if err != nil {
		t.Fatalf("push: %v\n%s", err, out)
	}
	if !strings.Contains(out, "it has a volume") {
		t.Errorf("the push does not say that it stops the old instance first:\n%s", out)
	}
	add("two")
	p.must(t, dir, "m3o", "ps:restart")
	p.must(t, dir, "m3o", "config:set", "A=b")
	add("three")
	if n, bad := steady.stop(); bad > 0 {
		t.Errorf("%d of %d requests failed: %s", bad, n, steady.first)
	}
	if _, body := b.get(t, "jotter", "/"); !slices.Equal(strings.Fields(body), []string{"one", "two", "three"}) {
		t.Errorf("the notes are %q", body)
	}
	if out, err := p.try(dir, "m3o", "ps:scale", "web=2"); err == nil || !strings.Contains(out, "same files") {
		t.Errorf("two instances of one volume: %v\n%s", err, out)
	}
	// A release that does not start gives the volume back.
	file := filepath.Join(dir, "main.go")
	src, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(file, []byte(strings.Replace(string(src), "func main() {", "func main() {\n\tif true {\n\t\tos.Exit(7)\n\t}", 1)), 0o600); err != nil {
		t.Fatal(err)
	}
	p.commit(t, dir, "broken")
	if out, err := p.push(dir); err == nil || !strings.Contains(out, "exited with code 7") {
		t.Errorf("a broken push: %v\n%s", err, out)
	}
	eventually(t, "the old release has the volume again", func() bool {
		_, body := b.get(t, "jotter", "/")
		return slices.Equal(strings.Fields(body), []string{"one", "two", "three"})
	})
	if out, err := p.try(dir, "m3o", "storage:destroy", "data", "--confirm", "data"); err == nil {
		t.Errorf("a mounted volume was destroyed:\n%s", out)
	}
	if out := p.must(t, dir, "m3o", "storage"); !strings.Contains(out, "/data") {
		t.Errorf("storage: %s", out)
	}
	p.must(t, dir, "m3o", "storage:unmount", "data")
	p.must(t, dir, "m3o", "storage:destroy", "data", "--confirm", "data")
	if _, err := os.Stat(filepath.Join(b.data, "volumes", "jotter", "data")); err == nil {
		t.Error("the volume's directory is still there")
	}
	p.must(t, dir, "m3o", "destroy", "--confirm", "jotter")
}

// A release that was healthy and then crashes again and again is explained,
// and rolled back where m3o.yaml says so.
func TestCrashLoopIsExplainedAndRolledBack(t *testing.T) {
	b := theBox(t)
	p := b.user(t, "cora")
	dir := p.clone(t, "hello-http", "wobbly")
	if out, err := p.push(dir); err != nil {
		t.Fatalf("push: %v\n%s", err, out)
	}
	file := filepath.Join(dir, "main.go")
	good, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	bad := strings.Replace(string(good), "func main() {", `func main() {
	go func() {
		time.Sleep(time.Second)
		log.Print("no database")
		os.Exit(3)
	}()`, 1)
	if err := os.WriteFile(file, []byte(bad), 0o600); err != nil {
		t.Fatal(err)
	}
	p.commit(t, dir, "a time bomb")
	if out, err := p.push(dir); err != nil {
		t.Fatalf("push: %v\n%s", err, out)
	}
	var ps string
	eventually(t, "ps says that it crashes, and why", func() bool {
		ps = p.must(t, dir, "m3o", "ps")
		return strings.Contains(ps, "crashing") && strings.Contains(ps, "exited with code 3") && strings.Contains(ps, "no database")
	})
	if err := os.WriteFile(filepath.Join(dir, "m3o.yaml"), []byte("rollback: auto\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	setVersion(t, p, dir, "again") // commits all
	p.must(t, dir, "m3o", "rollback", "v1")
	if out, err := p.push(dir); err != nil {
		t.Fatalf("push: %v\n%s", err, out)
	}
	var rels string
	eventually(t, "it is rolled back", func() bool {
		rels = p.must(t, dir, "m3o", "releases")
		return strings.Contains(rels, "automatic rollback to v3") && strings.Contains(rels, "exited with code 3 3 times")
	})
	if out := p.must(t, dir, "m3o", "logs", "-n", "500", "-s", "m3o"); !strings.Contains(out, "automatic rollback to v3: web of v4 exited with code 3 3 times; rollback: auto is set") {
		t.Errorf("the app's log does not tell of the rollback:\n%s", out)
	}
	c := b.client(t)
	eventually(t, "it answers", func() bool { return ask(c, b.url("wobbly", "/")) == nil })
	p.must(t, dir, "m3o", "destroy", "--confirm", "wobbly")
}
