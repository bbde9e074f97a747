package gitserver

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/m3o/m3o"
)

// untilCancelled is a build that runs until its context ends.
type untilCancelled struct {
	building chan struct{}
	stopped  chan error
}

func newUntilCancelled() *untilCancelled {
	return &untilCancelled{building: make(chan struct{}, 8), stopped: make(chan error, 8)}
}

func (u *untilCancelled) deploy(ctx context.Context, _ m3o.Source, out io.Writer) error {
	_, _ = fmt.Fprintln(out, "-----> Building for ever")
	u.building <- struct{}{}
	<-ctx.Done()
	u.stopped <- context.Cause(ctx)
	return ctx.Err()
}

// background starts a push whose Ctrl-C is interrupt.
func (c *clone) background(args ...string) (interrupt func(), wait func() string) {
	c.s.t.Helper()
	cmd := c.cmd(args...)
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	if err := cmd.Start(); err != nil {
		c.s.t.Fatal(err)
	}
	ended := make(chan struct{})
	go func() { _ = cmd.Wait(); close(ended) }()
	c.s.t.Cleanup(func() {
		_ = syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL)
		<-ended
	})
	return func() { _ = syscall.Kill(-cmd.Process.Pid, syscall.SIGINT) }, func() string { <-ended; return out.String() }
}

// idle waits until no push is in the server.
func (s *site) idle() {
	s.t.Helper()
	eventually(s.t, "the server to be idle", func() bool {
		s.s.mu.Lock()
		defer s.s.mu.Unlock()
		return len(s.s.repos) == 0 && len(s.s.perKey) == 0
	})
}

func TestCtrlCInTheBuildStopsIt(t *testing.T) {
	t.Parallel()
	u := newUntilCancelled()
	s := newSite(t, siteConfig{deploy: u.deploy})
	c := s.work("hello")
	c.commit("a", "1")
	interrupt, wait := c.background("push", "m3o", "main")
	<-u.building
	interrupt()
	<-u.stopped
	wait()
	s.idle()
	s.checkDisk()
	wantEvents(t, s, "deploy")
	if n := countObjects(t, s, "hello"); n != 0 {
		t.Errorf("%d objects were kept", n)
	}
	// The lock is free: the next push builds.
	s.apps.mu.Lock()
	s.apps.deploy = nil
	s.apps.mu.Unlock()
	c.must("push", "m3o", "main")
}

// checkDisk looks for what a push must not leave, while the server still runs.
func (s *site) checkDisk() {
	s.t.Helper()
	for _, p := range []string{"objects/tmp_objdir-*", "shallow_*", "*.lock", "refs/heads/*.lock"} {
		if left, _ := filepath.Glob(filepath.Join(s.s.cfg.Repos, "*.git", p)); len(left) > 0 {
			s.t.Errorf("left behind: %v", left)
		}
	}
}

func TestCtrlCUnderControlMasterStopsTheBuild(t *testing.T) {
	t.Parallel()
	u := newUntilCancelled()
	s := newSite(t, siteConfig{deploy: u.deploy})
	c := s.work("hello")
	c.commit("a", "1")
	sock := filepath.Join(s.dir, "mux")
	master := exec.Command("ssh", append(s.sshArgs("ada"), "-M", "-S", sock, "-N", "m3o@127.0.0.1")...)
	master.Env = s.env("ada")
	master.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	if err := master.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() { _ = master.Process.Kill(); _ = master.Wait() }()
	eventually(t, "the ssh master", func() bool { _, err := os.Stat(sock); return err == nil })
	c.env = []string{"GIT_SSH_COMMAND=ssh -S " + sock + " " + strings.Join(s.sshArgs("ada"), " ")}
	interrupt, wait := c.background("push", "m3o", "main")
	<-u.building
	interrupt()
	if err := <-u.stopped; err != errGone {
		t.Errorf("the build ended with %v, want %v", err, errGone)
	}
	wait()
	s.idle()
	s.checkDisk()
	if err := master.Process.Signal(syscall.Signal(0)); err != nil {
		t.Errorf("the master connection is gone: %v", err)
	}
	// And the connection still serves.
	wants(t, c.must("ls-remote", "m3o"), "")
}

func TestCtrlCInMidPackLeavesNothing(t *testing.T) {
	t.Parallel()
	for _, how := range []string{"interrupt", "end of input"} {
		t.Run(how, func(t *testing.T) {
			s := newSite(t, siteConfig{})
			c := s.work("hello")
			var files []string
			for i := range 120 {
				files = append(files, fmt.Sprintf("f%d", i), randomText(uint64(i), 4<<10))
			}
			c.commit(files...)
			pause := "sleep 600"
			if how == "end of input" {
				pause = ":"
			}
			slow := s.write("slow.sh", "#!/bin/sh\n{ head -c 200000; "+pause+"; } | ssh \"$@\"\n")
			c.env = []string{"GIT_SSH_VARIANT=ssh", "GIT_SSH_COMMAND=sh " + slow + " " + strings.Join(s.sshArgs("ada"), " ")}
			interrupt, wait := c.background("push", "m3o", "main")
			if how == "interrupt" {
				eventually(t, "a half pack in quarantine", func() bool {
					half, _ := filepath.Glob(s.s.repoDir("hello") + "/objects/tmp_objdir-incoming-*/pack/tmp_pack_*")
					return len(half) > 0
				})
				interrupt()
			}
			wait()
			s.idle()
			s.checkDisk()
			wantEvents(t, s, "")
		})
	}
}

func TestADeployThatSucceedsAfterCtrlCIsUndone(t *testing.T) {
	t.Parallel()
	building := make(chan struct{})
	s := newSite(t, siteConfig{deploy: func(ctx context.Context, _ m3o.Source, _ io.Writer) error {
		close(building)
		<-ctx.Done()
		return nil // it had already switched
	}})
	c := s.work("hello")
	c.commit("a", "1")
	interrupt, wait := c.background("push", "m3o", "main")
	<-building
	interrupt()
	wait()
	s.idle()
	wantEvents(t, s, "deploy false")
}

// A client that goes away once git was told to go on does not undo the push.
func TestAClientLostAfterTheVerdictLeavesBranchAndReleaseAgreeing(t *testing.T) {
	t.Parallel()
	s := newSite(t, siteConfig{})
	c := s.work("hello")
	for i := range 6 {
		c.commit("a", fmt.Sprint(i))
		n := len(s.apps.log)
		interrupt, wait := c.background("push", "m3o", "main")
		eventually(t, "the deploy", func() bool {
			s.apps.mu.Lock()
			defer s.apps.mu.Unlock()
			return len(s.apps.log) > n
		})
		for range i { // each round a little later
			<-time.After(time.Millisecond)
		}
		interrupt()
		wait()
		s.idle()
		s.apps.mu.Lock()
		live, open := s.apps.live["hello"], s.apps.open
		s.apps.mu.Unlock()
		if tip := s.tip("hello", "refs/heads/main"); tip != live || open != 0 {
			t.Errorf("round %d: branch %q, live %q, %d without Done", i, tip, live, open)
		}
	}
}

func TestAKilledReceivePackUndoesTheDeploy(t *testing.T) {
	t.Parallel()
	s := newSite(t, siteConfig{})
	s.apps.deploy = func(context.Context, m3o.Source, io.Writer) error {
		killGit(t, s)
		return nil
	}
	c := s.work("hello")
	c.commit("a", "1")
	c.mustNot("push", "m3o", "main")
	s.idle()
	wantEvents(t, s, "deploy false")
}

// killGit kills the receive-pack of the site, and not its hook.
func killGit(t *testing.T, s *site) {
	t.Helper()
	s.s.mu.Lock()
	defer s.s.mu.Unlock()
	for _, r := range s.s.repos {
		for p := range r.pushes {
			if err := p.git.cmd.Process.Kill(); err != nil {
				t.Error(err)
			}
			<-p.git.exited
		}
	}
}

func TestStoppingTheServerRefusesRunningPushes(t *testing.T) {
	t.Parallel()
	u := newUntilCancelled()
	s := newSite(t, siteConfig{deploy: u.deploy})
	c := s.work("hello")
	c.commit("a", "1")
	_, wait := c.background("push", "m3o", "main")
	<-u.building
	s.stop()
	if err := <-u.stopped; err != error(errStopping) {
		t.Errorf("the build ended with %v, want %v", err, errStopping)
	}
	wants(t, wait(), "remote:  !     m3o is stopping; push again in a moment", "pre-receive hook declined")
}

func TestRemoveCancelsPushesAndDeletesTheRepository(t *testing.T) {
	t.Parallel()
	u := newUntilCancelled()
	s := newSite(t, siteConfig{deploy: u.deploy})
	c := s.work("hello")
	c.commit("a", "1")
	_, wait := c.background("push", "m3o", "main")
	<-u.building
	if err := s.s.Remove(t.Context(), "hello"); err != nil {
		t.Fatal(err)
	}
	wants(t, wait(), "the app was deleted while you pushed")
	if _, err := os.Stat(s.s.repoDir("hello")); !os.IsNotExist(err) {
		t.Errorf("the repository is still there: %v", err)
	}
	if err := s.s.Remove(t.Context(), "hello"); err != nil {
		t.Errorf("second Remove = %v", err)
	}
	if err := s.s.Remove(t.Context(), "../etc"); m3o.KindOf(err) != m3o.Invalid {
		t.Errorf("Remove of a bad name = %v", err)
	}
}

func TestMaintainPacksLooseObjectsAndYieldsToAPush(t *testing.T) {
	t.Parallel()
	s := newSite(t, siteConfig{})
	c := s.work("hello")
	c.commit("a", "1")
	c.must("push", "m3o", "main")
	s.idle()
	repo := s.s.repoDir("hello")
	// A commit of 1,200 files as loose objects.
	var stream strings.Builder
	stream.WriteString("commit refs/heads/large\ncommitter A <a@example.org> 0 +0000\ndata 0\n")
	for i := range 1200 {
		_, _ = fmt.Fprintf(&stream, "M 644 inline d%d/f%d\ndata %d\n%s\n", i%20, i, len(fmt.Sprint(i)), fmt.Sprint(i))
	}
	if _, err := runGit(t.Context(), repo, nil, stream.String(), "-c", "core.fsync=none", "-c", "fastimport.unpackLimit=100000", "fast-import", "--quiet"); err != nil {
		t.Fatal(err)
	}
	if loose, _ := filepath.Glob(repo + "/objects/??/*"); len(loose) < 1200 {
		t.Fatalf("%d loose objects, want more than 1200", len(loose))
	}
	if err := s.s.Maintain(t.Context(), "hello"); err != nil {
		t.Fatal(err)
	}
	loose, _ := filepath.Glob(repo + "/objects/??/*")
	if len(loose) != 0 {
		t.Errorf("%d loose objects are left", len(loose))
	}
	if err := s.s.Maintain(t.Context(), "absent"); m3o.KindOf(err) != m3o.NotFound {
		t.Errorf("Maintain of an absent app = %v", err)
	}

	// What has the repository alone is asked to yield by a push, which waits.
	asked := make(chan struct{})
	var once sync.Once
	release, err := s.s.exclude(t.Context(), "hello", func() { once.Do(func() { close(asked) }) })
	if err != nil {
		t.Fatal(err)
	}
	c.commit("a", "2")
	_, wait := c.background("push", "m3o", "main")
	<-asked
	release()
	wants(t, wait(), "Released")
}

func TestWhatACrashLeftIsSweptAtStart(t *testing.T) {
	t.Parallel()
	s := newSite(t, siteConfig{})
	c := s.work("hello")
	c.commit("a", "1")
	c.must("push", "m3o", "main")
	s.stop()
	repo := s.s.repoDir("hello")
	for _, f := range []string{"objects/tmp_objdir-incoming-abcdef/pack/tmp_pack_x", "objects/pack/tmp_idx_y", "refs/heads/a/b.lock", "refs/heads/main.lock",
		"HEAD.lock", "packed-refs.lock", "shallow.lock", "shallow_abcdef", "gc.pid", "../.init-123/HEAD", "../.removed-x.git/HEAD"} {
		path := filepath.Join(repo, f)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, nil, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	keep := filepath.Join(repo, "objects/pack/pack-1.keep")
	own := filepath.Join(repo, "objects/pack/pack-2.keep")
	_ = os.WriteFile(keep, []byte("receive-pack 12 on host\n"), 0o600)
	_ = os.WriteFile(own, []byte("by hand\n"), 0o600)
	if err := sweepAll(s.s.cfg.Repos); err != nil {
		t.Fatal(err)
	}
	left := []string{}
	_ = filepath.WalkDir(s.s.cfg.Repos, func(path string, d os.DirEntry, err error) error {
		if n := filepath.Base(path); strings.HasSuffix(n, ".lock") || strings.Contains(n, "tmp_") || strings.HasPrefix(n, "shallow") || n == "gc.pid" ||
			strings.HasPrefix(n, ".init") || strings.HasPrefix(n, ".removed") || strings.HasSuffix(n, ".keep") {
			left = append(left, n)
		}
		return nil
	})
	if len(left) != 1 || left[0] != "pack-2.keep" {
		t.Errorf("left: %v, want only the keep file made by hand", left)
	}
	_ = os.Remove(own)
}
