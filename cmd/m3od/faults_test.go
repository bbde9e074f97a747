package main

import (
	"bytes"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/m3o/m3o/internal/need"
)

// Twenty deploys and twenty rollbacks while requests go on, unary and as
// streams: none may fail, and the figures are printed.
func TestDeploysAndRollbacksLoseNoRequest(t *testing.T) {
	b := theBox(t)
	p := b.user(t, "dora")
	dir := p.clone(t, "hello-http", "loop")
	setVersion(t, p, dir, "0")
	if out, err := p.push(dir); err != nil {
		t.Fatalf("push: %v\n%s", err, out)
	}
	unary := startProbe(t, b, "loop", "/")
	streams := startProbe(t, b, "loop", "/stream?count=20")
	seen := map[string]bool{}
	for i := 1; i <= 20; i++ {
		setVersion(t, p, dir, strconv.Itoa(i))
		if out, err := p.push(dir); err != nil {
			t.Fatalf("push %d: %v\n%s", i, err, out)
		}
		_, body := b.get(t, "loop", "/")
		seen[strings.TrimSpace(body)] = true
		if strings.TrimSpace(body) != strconv.Itoa(i) {
			t.Errorf("right after push %d the app answers %q", i, body)
		}
		if out, err := p.try(dir, "m3o", "rollback"); err != nil {
			t.Fatalf("rollback %d: %v\n%s", i, err, out)
		}
		if _, body = b.get(t, "loop", "/"); strings.TrimSpace(body) == strconv.Itoa(i) {
			t.Errorf("right after rollback %d the app still answers %q", i, body)
		}
	}
	n, bad := unary.stop()
	sn, sbad := streams.stop()
	t.Logf("20 deploys, 20 rollbacks: %d of %d requests and %d of %d streams failed", bad, n, sbad, sn)
	if bad+sbad != 0 {
		t.Errorf("failed requests: %s; failed streams: %s", unary.first, streams.first)
	}
	if n < 100 || sn < 5 || len(seen) != 20 {
		t.Errorf("the loop was too thin to prove anything: %d requests, %d streams, %d versions seen", n, sn, len(seen))
	}
	p.must(t, dir, "m3o", "destroy", "--confirm", "loop")
}

// The daemon dies at each step of a deploy. The app answers throughout; after
// the restart the deploy is failed or finished, the branch and the live
// release agree, and what runs is what the ledger says.
func TestKilledDaemonFinishesOrFailsTheDeploy(t *testing.T) {
	b := theBox(t)
	p := b.user(t, "kim")
	dir := p.clone(t, "hello-http", "phoenix")
	// With a release command, so that there is a step "releasing".
	for name, text := range map[string]string{
		"Procfile":            "web: hello-http\nrelease: migrate\n",
		"cmd/migrate/main.go": "package main\n\nfunc main() { println(\"migrated\") }\n",
	} {
		if err := os.MkdirAll(filepath.Dir(filepath.Join(dir, name)), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	setVersion(t, p, dir, "alive")
	if out, err := p.push(dir); err != nil {
		t.Fatalf("push: %v\n%s", err, out)
	}
	live := "alive"
	for i, step := range []string{"queued", "building", "releasing", "starting", "switching", "live"} {
		t.Run(step, func(t *testing.T) {
			if err := b.stop(); err != nil {
				t.Fatal(err)
			}
			if err := b.start(crashStep + "=" + step); err != nil {
				t.Fatalf("%v\n%s", err, b.log.tail(3000))
			}
			probe := startProbe(t, b, "phoenix", "/")
			tip := remoteTip(t, p, dir)
			next := fmt.Sprintf("after-%d", i)
			setVersion(t, p, dir, next)
			out, err := p.push(dir)
			if err == nil && step != "live" {
				b.kill()
				t.Errorf("the push succeeded, so the daemon did not die:\n%s", out)
			}
			select {
			case <-b.done:
			case <-time.After(patience):
				b.kill()
				t.Errorf("the push ended without the daemon's death: %v\n%s", err, out)
			}
			if err := b.start(); err != nil {
				t.Fatalf("restart: %v\n%s", err, b.log.tail(3000))
			}
			if n, bad := probe.stop(); bad != 0 {
				t.Errorf("%d of %d requests failed: %s", bad, n, probe.first)
			}
			now := remoteTip(t, p, dir)
			if now != tip { // the branch moved, so the release has to be live
				live = next
			}
			if _, body := b.get(t, "phoenix", "/"); strings.TrimSpace(body) != live {
				t.Errorf("the branch is at %s, yet the app answers %q, want %q", now, body, live)
			}
			rels := p.must(t, dir, "m3o", "releases")
			if n := strings.Count(rels, " live "); n != 1 {
				t.Errorf("%d releases are live:\n%s", n, rels)
			}
			if bs := p.must(t, dir, "m3o", "builds"); strings.Contains(bs, "running") {
				t.Errorf("a build still runs in the records:\n%s", bs)
			}
			b.checkNothingExtra(t, "phoenix", 1)
			// What the crash interrupted can simply be done again.
			setVersion(t, p, dir, next+"-again")
			if out, err := p.push(dir); err != nil {
				t.Fatalf("push after the crash: %v\n%s", err, out)
			}
			live = next + "-again"
		})
	}
	p.must(t, dir, "m3o", "destroy", "--confirm", "phoenix")
}

func remoteTip(t *testing.T, p *person, dir string) string {
	t.Helper()
	tip, _, _ := strings.Cut(p.must(t, dir, "git", "ls-remote", "m3o", "refs/heads/main"), "\t")
	return tip
}

// checkNothingExtra compares what runs for an app with what should: n
// instances, each with one shim, one veth pair and its cgroups, and no mount
// outside the instances' own namespaces.
func (b *box) checkNothingExtra(t *testing.T, app string, n int) {
	t.Helper()
	what := func() string {
		shims := b.pids("m3o-shim", "-id "+app+"-")
		all := b.pids("m3o-shim")
		links, _ := filepath.Glob("/sys/class/net/" + boxName + "-*")
		var groups []string
		for _, dir := range []string{"/sys/fs/cgroup/memory/", "/sys/fs/cgroup/"} {
			g, _ := filepath.Glob(dir + boxName + "/" + app + "-*")
			for _, p := range g {
				if !strings.HasSuffix(p, ".shim") {
					groups = append(groups, p)
				}
			}
		}
		mounts := 0
		m, _ := os.ReadFile("/proc/mounts")
		for l := range strings.Lines(string(m)) {
			if strings.Contains(l, b.data+"/runtime") {
				mounts++
			}
		}
		return fmt.Sprintf("%d instances, %d cgroups, %d devices for %d instances of all apps, %d mounts", len(shims), len(groups), len(links), len(all), mounts)
	}
	var got, want string
	ok := false
	for deadline := time.Now().Add(patience); !ok && time.Now().Before(deadline); <-time.After(50 * time.Millisecond) {
		got = what()
		all := len(b.pids("m3o-shim"))
		want = fmt.Sprintf("%d instances, %d cgroups, %d devices for %d instances of all apps, %d mounts", n, n, all, all, 0)
		ok = got == want
	}
	if !ok {
		t.Errorf("of %s there are %s, want %s", app, got, want)
	}
	if quarantines, _ := filepath.Glob(filepath.Join(b.data, "repos", app+".git", "objects", "tmp_objdir*")); len(quarantines) > 0 {
		t.Errorf("quarantines left: %v", quarantines)
	}
	if locks, _ := filepath.Glob(filepath.Join(b.data, "repos", app+".git", "refs", "heads", "*.lock")); len(locks) > 0 {
		t.Errorf("ref locks left: %v", locks)
	}
}

// A pusher who presses Ctrl-C cancels the build and leaves nothing behind.
func TestCtrlCCancelsThePush(t *testing.T) {
	b := theBox(t)
	p := b.user(t, "carl")
	dir := p.clone(t, "hello-http", "impatient")
	if out, err := p.push(dir); err != nil {
		t.Fatalf("push: %v\n%s", err, out)
	}
	for _, mark := range []string{"-----> ", "Releasing", "Starting"} {
		t.Run(mark, func(t *testing.T) {
			setVersion(t, p, dir, "never "+mark)
			// A slow start gives the signal time to arrive in the phase meant.
			tip := remoteTip(t, p, dir)
			cmd := p.command(dir, "git", "push", "m3o", "main")
			cmd.Stderr = &signalOn{mark: mark, hit: func() { _ = syscall.Kill(-cmd.Process.Pid, syscall.SIGINT) }}
			err := cmd.Run()
			now := remoteTip(t, p, dir)
			if err == nil && now == tip {
				t.Error("git says the push worked, but the branch did not move")
			}
			eventually(t, "the deploy ended", func() bool {
				return !strings.Contains(p.must(t, dir, "m3o", "builds"), "running")
			})
			want := 200
			if code, body := b.get(t, "impatient", "/"); code != want {
				t.Errorf("the app answers %d %q", code, body)
			}
			b.checkNothingExtra(t, "impatient", 1)
			setVersion(t, p, dir, "again "+mark)
			if out, err := p.push(dir); err != nil {
				t.Fatalf("push after Ctrl-C: %v\n%s", err, out)
			}
		})
	}
	p.must(t, dir, "m3o", "destroy", "--confirm", "impatient")
}

// signalOn calls hit once, when what is written contains mark.
type signalOn struct {
	mark string
	hit  func()
	buf  bytes.Buffer
	did  bool
}

func (s *signalOn) Write(p []byte) (int, error) {
	s.buf.Write(p)
	if !s.did && strings.Contains(s.buf.String(), s.mark) {
		s.did = true
		s.hit()
	}
	return len(p), nil
}

func TestNewestOfTwoPushesWins(t *testing.T) {
	b := theBox(t)
	p := b.user(t, "twin")
	dir := p.clone(t, "hello-http", "race")
	setVersion(t, p, dir, "base")
	if out, err := p.push(dir); err != nil {
		t.Fatalf("push: %v\n%s", err, out)
	}
	second := filepath.Join(t.TempDir(), "race2")
	p.must(t, "", "git", "clone", "-q", "ssh://m3o@"+b.sshHost()+"/race", second)
	p.must(t, second, "git", "remote", "rename", "origin", "m3o")
	setVersion(t, p, dir, "older")
	setVersion(t, p, second, "newer")
	type result struct {
		out string
		err error
	}
	newer := make(chan result, 1)
	cmd := p.command(dir, "git", "push", "m3o", "main")
	buf := &signalOn{mark: "-----> ", hit: func() {
		go func() {
			out, err := p.push(second)
			newer <- result{out, err}
		}()
	}}
	cmd.Stderr = buf
	olderErr := cmd.Run()
	if !buf.did {
		t.Fatalf("the older push ended before the newer one began: %v\n%s", olderErr, buf.buf.String())
	}
	n := <-newer
	_, body := b.get(t, "race", "/")
	switch strings.TrimSpace(body) {
	case "newer":
		if olderErr == nil || !strings.Contains(buf.buf.String(), "superseded by a newer push") {
			t.Errorf("the older push: %v\n%s", olderErr, buf.buf.String())
		}
		if n.err != nil {
			t.Errorf("the newer push: %v\n%s", n.err, n.out)
		}
	case "older": // it had begun to switch before the newer one came
		if olderErr != nil || n.err == nil {
			t.Errorf("older: %v, newer: %v\n%s", olderErr, n.err, n.out)
		}
	default:
		t.Errorf("the app answers %q", body)
	}
	p.must(t, dir, "m3o", "destroy", "--confirm", "race")
}

// pids of processes of this box whose command line contains all of words.
func (b *box) pids(words ...string) []int {
	dirs, _ := filepath.Glob("/proc/[0-9]*")
	var out []int
next:
	for _, d := range dirs {
		cl, err := os.ReadFile(filepath.Join(d, "cmdline"))
		if err != nil {
			continue
		}
		line := string(bytes.ReplaceAll(cl, []byte{0}, []byte{' '}))
		for _, w := range append([]string{b.data}, words...) {
			if !strings.Contains(line, w) {
				continue next
			}
		}
		if pid, err := strconv.Atoi(filepath.Base(d)); err == nil {
			out = append(out, pid)
		}
	}
	return out
}

func TestKilledBuildkitdFailsThePushAndComesBack(t *testing.T) {
	b := theBox(t)
	p := b.user(t, "bill")
	dir := p.clone(t, "hello-http", "phx-build")
	if out, err := p.push(dir); err != nil {
		t.Fatalf("push: %v\n%s", err, out)
	}
	setVersion(t, p, dir, "unlucky")
	tip := remoteTip(t, p, dir)
	cmd := p.command(dir, "git", "push", "m3o", "main")
	buf := &signalOn{mark: "-----> ", hit: func() {
		for _, pid := range b.pids("buildkitd") {
			_ = syscall.Kill(pid, syscall.SIGKILL)
		}
	}}
	cmd.Stderr = buf
	err := cmd.Run()
	if err != nil {
		if got := remoteTip(t, p, dir); got != tip {
			t.Errorf("the branch moved although the push failed:\n%s", buf.buf.String())
		}
		if !regexp.MustCompile(`remote:  !     .*builder`).MatchString(buf.buf.String()) {
			t.Errorf("the push does not say what happened to the builder:\n%s", buf.buf.String())
		}
	}
	setVersion(t, p, dir, "lucky")
	eventually(t, "a push works again", func() bool {
		out, err := p.push(dir)
		if err != nil {
			t.Log(out)
		}
		return err == nil
	})
	if _, body := b.get(t, "phx-build", "/"); strings.TrimSpace(body) != "lucky" {
		t.Errorf("the app answers %q, want lucky", body)
	}
	p.must(t, dir, "m3o", "destroy", "--confirm", "phx-build")
}

func TestKilledRouterIsStartedAgain(t *testing.T) {
	b := theBox(t)
	p := b.user(t, "rita")
	dir := p.clone(t, "hello-http", "phx-router")
	if out, err := p.push(dir); err != nil {
		t.Fatalf("push: %v\n%s", err, out)
	}
	old := b.pids("router", "--data")
	if len(old) != 1 {
		t.Fatalf("router processes: %v", old)
	}
	if err := syscall.Kill(old[0], syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	c := b.client(t)
	eventually(t, "the app answers again", func() bool { return ask(c, b.url("phx-router", "/")) == nil })
	setVersion(t, p, dir, "two")
	if out, err := p.push(dir); err != nil {
		t.Errorf("push after the router died: %v\n%s", err, out)
	}
	p.must(t, dir, "m3o", "destroy", "--confirm", "phx-router")
}

func TestKilledShimAndInstanceAreReplaced(t *testing.T) {
	b := theBox(t)
	p := b.user(t, "shim")
	dir := p.clone(t, "hello-http", "phx-shim")
	if out, err := p.push(dir); err != nil {
		t.Fatalf("push: %v\n%s", err, out)
	}
	c := b.client(t)
	for _, what := range []string{"shim", "instance"} {
		t.Run(what, func(t *testing.T) {
			if what == "shim" {
				pids := b.pids("m3o-shim", "phx-shim")
				if len(pids) != 1 {
					t.Fatalf("shims: %v", pids)
				}
				if err := syscall.Kill(pids[0], syscall.SIGKILL); err != nil {
					t.Fatal(err)
				}
			} else if res, err := c.Get(b.url("phx-shim", "/crash")); err == nil {
				_, _ = io.Copy(io.Discard, res.Body)
				_ = res.Body.Close()
			}
			eventually(t, "another instance answers", func() bool {
				out := p.must(t, dir, "m3o", "ps")
				return strings.Contains(out, "ready") && ask(c, b.url("phx-shim", "/")) == nil
			})
			b.checkNothingExtra(t, "phx-shim", 1)
		})
	}
	p.must(t, dir, "m3o", "destroy", "--confirm", "phx-shim")
}

// Apps and router go on while the daemon is away; what needs it says so.
func TestAppsAnswerWhileTheDaemonIsAway(t *testing.T) {
	b := theBox(t)
	p := b.user(t, "away")
	dir := p.clone(t, "hello-http", "lonely")
	if out, err := p.push(dir); err != nil {
		t.Fatalf("push: %v\n%s", err, out)
	}
	b.kill()
	if code, body := b.get(t, "lonely", "/"); code != http.StatusOK {
		t.Errorf("the app answers %d %q without the daemon", code, body)
	}
	if out, err := p.try(dir, "m3o", "apps"); err == nil || !strings.Contains(out, "daemon") {
		t.Errorf("m3o apps without the daemon: %v\n%s", err, out)
	}
	if err := b.start(); err != nil {
		t.Fatal(err)
	}
	if out := p.must(t, dir, "m3o", "ps"); !strings.Contains(out, "ready") {
		t.Errorf("ps after the restart: %s", out)
	}
	p.must(t, dir, "m3o", "destroy", "--confirm", "lonely")
}

func TestPortAlreadyTakenIsSaid(t *testing.T) {
	b := theBox(t)
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	other, err := need.Addrs(1)
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct{ env, want string }{
		{"M3O_SSH=" + b.ssh, "another program listens on " + b.ssh},
		{"M3O_SSH=" + other[0], "state directory|already|in use"}, // same data directory
	} {
		cmd := exec.Command(exe)
		cmd.Env = append(append([]string(nil), b.env...), c.env)
		out := &lockedBuffer{}
		cmd.Stdout, cmd.Stderr = out, out
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		timer := time.AfterFunc(time.Minute, func() { _ = cmd.Process.Kill() })
		err := cmd.Wait()
		timer.Stop()
		if err == nil || !regexp.MustCompile(`m3od: error: .*(`+c.want+`)`).MatchString(out.String()) || !strings.Contains(out.String(), "m3od: hint: ") {
			t.Errorf("%s: %v\n%s", c.env, err, out.String())
		}
	}
	if !b.running() {
		t.Error("the first daemon was disturbed")
	}
}

// A full disk fails a push with these words, hurts no running app, and a push
// works again as soon as there is room.
func TestFullDiskIsSaidAndSurvived(t *testing.T) {
	b := theBox(t)
	p := b.user(t, "fred")
	dir := p.clone(t, "hello-http", "full")
	setVersion(t, p, dir, "before")
	if out, err := p.push(dir); err != nil {
		t.Fatalf("push: %v\n%s", err, out)
	}
	setVersion(t, p, dir, "after")
	tip := remoteTip(t, p, dir)
	b.leaveRoom(t, 256<<10)
	t.Cleanup(func() { b.leaveRoom(t, -1) })
	out, err := p.push(dir)
	if err == nil || !regexp.MustCompile(`(?i)disk( is)? full|no space left`).MatchString(out) {
		t.Errorf("push onto a full disk: %v\n%s", err, out)
	}
	if code, body := b.get(t, "full", "/"); code != http.StatusOK || strings.TrimSpace(body) != "before" {
		t.Errorf("the app answers %d %q", code, body)
	}
	b.leaveRoom(t, -1)
	if got := remoteTip(t, p, dir); got != tip {
		t.Errorf("the branch moved from %s to %s", tip, got)
	}
	eventually(t, "a push works again", func() bool {
		out, err := p.push(dir)
		if err != nil {
			t.Log(out)
		}
		return err == nil
	})
	if _, body := b.get(t, "full", "/"); strings.TrimSpace(body) != "after" {
		t.Errorf("the app answers %q, want after", body)
	}
	p.must(t, dir, "m3o", "destroy", "--confirm", "full")
}

// leaveRoom leaves so many bytes free in the box's file system, -1 for all of
// it. The file system shrinks: a large file in it would take memory that the
// machine may not have.
func (b *box) leaveRoom(t *testing.T, bytes int64) {
	t.Helper()
	size := boxSize
	if bytes >= 0 {
		var st syscall.Statfs_t
		if err := syscall.Statfs(b.dir, &st); err != nil {
			t.Fatal(err)
		}
		size = strconv.FormatInt(int64(st.Blocks-st.Bfree)*st.Bsize+bytes, 10)
	}
	if err := syscall.Mount("tmpfs", b.dir, "tmpfs", syscall.MS_REMOUNT, "size="+size); err != nil {
		t.Fatalf("resize the file system to %s: %v", size, err)
	}
}

// Whatever part dies in whatever phase of a push: the app answers (through the
// router, once there is one), the branch and the live release agree, nothing is
// left over, and the next push works.
func TestEnginesKilledInEachPhaseOfAPush(t *testing.T) {
	b := theBox(t)
	p := b.user(t, "erin")
	dir := p.clone(t, "hello-http", "engines")
	setVersion(t, p, dir, "start")
	if out, err := p.push(dir); err != nil {
		t.Fatalf("push: %v\n%s", err, out)
	}
	live := "start"
	c := b.client(t)
	for _, victim := range []string{"router", "buildkitd", "shim"} {
		for _, mark := range []string{"app detected", "Building", "Releasing", "Starting"} {
			t.Run(victim+" at "+mark, func(t *testing.T) {
				words := map[string][]string{"router": {"router", "--data"}, "buildkitd": {"buildkitd", "--config"}, "shim": {"m3o-shim", "-id engines-"}}[victim]
				tip := remoteTip(t, p, dir)
				next := victim + " " + mark
				setVersion(t, p, dir, next)
				cmd := p.command(dir, "git", "push", "m3o", "main")
				said := &signalOn{mark: mark, hit: func() {
					for _, pid := range b.pids(words...) {
						_ = syscall.Kill(pid, syscall.SIGKILL)
					}
				}}
				cmd.Stderr = said
				err := cmd.Run()
				if now := remoteTip(t, p, dir); now != tip {
					live = next
					if err != nil {
						t.Errorf("git says the push failed, yet the branch moved:\n%s", said.buf.String())
					}
				} else if err == nil {
					t.Errorf("git says the push worked, yet the branch did not move:\n%s", said.buf.String())
				} else if !strings.Contains(said.buf.String(), "remote:  !     ") {
					t.Errorf("the push does not say what went wrong:\n%s", said.buf.String())
				}
				eventually(t, "the app answers "+live, func() bool {
					res, err := c.Get(b.url("engines", "/"))
					if err != nil {
						return false
					}
					defer res.Body.Close()
					body, err := io.ReadAll(res.Body)
					return err == nil && res.StatusCode == http.StatusOK && strings.TrimSpace(string(body)) == live
				})
				b.checkNothingExtra(t, "engines", 1)
			})
		}
	}
	setVersion(t, p, dir, "end")
	eventually(t, "a push works again", func() bool { _, err := p.push(dir); return err == nil })
	p.must(t, dir, "m3o", "destroy", "--confirm", "engines")
}
