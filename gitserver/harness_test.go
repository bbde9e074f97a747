package gitserver

import (
	"bytes"
	"context"
	"crypto/ed25519"
	"crypto/rand"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	gossh "golang.org/x/crypto/ssh"

	"github.com/m3o/m3o"
	"github.com/m3o/m3o/internal/need"
)

// users is Users in memory.
type users struct {
	mu   sync.Mutex
	keys map[string]string // wire → user

	panicFor string // user
}

func (u *users) UserByKey(_ context.Context, wire []byte) (string, string, error) {
	u.mu.Lock()
	defer u.mu.Unlock()
	name, ok := u.keys[string(wire)]
	if !ok {
		return "", "", m3o.Errorf(m3o.NotFound, "unknown key")
	}
	if name == u.panicFor {
		panic("in the user store")
	}
	key, err := gossh.ParsePublicKey(wire)
	if err != nil {
		return "", "", err
	}
	return name, gossh.FingerprintSHA256(key), nil
}

// apps is Apps as the daemon keeps it: a lock an app from Deploy to Done, the
// branch's old value checked under it, and a live commit that follows.
type apps struct {
	t      *testing.T
	deploy func(ctx context.Context, src m3o.Source, out io.Writer) error // nil: succeeds with a line

	mu    sync.Mutex
	locks map[string]chan struct{}
	log   []string          // "deploy <commit>", "done <moved>"
	live  map[string]string // app → commit
	srcs  []m3o.Source
	open  int // successful deploys without a Done
}

func (a *apps) Access(_ context.Context, user, app string, write bool) (string, error) {
	if app == "theirs" {
		return "", &m3o.Error{Kind: m3o.Denied, Msg: user + " may not use app theirs", Hint: "ask its owner"}
	}
	if app == "broken" {
		return "", errors.New("secret path /var/lib")
	}
	return "main", nil
}

func (a *apps) lock(ctx context.Context, app string) error {
	a.mu.Lock()
	l := a.locks[app]
	if l == nil {
		l = make(chan struct{}, 1)
		a.locks[app] = l
	}
	a.mu.Unlock()
	select {
	case l <- struct{}{}:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

func (a *apps) Deploy(ctx context.Context, src m3o.Source, out io.Writer) (_ Deployment, err error) {
	if err := a.lock(ctx, src.App); err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			<-a.locks[src.App]
		}
	}()
	tip, err := Tip(ctx, src.Repo, src.Ref)
	if err != nil {
		return nil, err
	}
	if tip != src.Old {
		return nil, &m3o.Error{Kind: m3o.Conflict, Msg: "main moved while you waited", Hint: "git pull"}
	}
	a.mu.Lock()
	a.log = append(a.log, "deploy "+src.Commit)
	a.srcs = append(a.srcs, src)
	f := a.deploy
	a.mu.Unlock()
	// The commit must be readable where the source says it is.
	env := []string{}
	if src.Quarantine != "" {
		env = append(env, "GIT_OBJECT_DIRECTORY="+src.Quarantine, "GIT_ALTERNATE_OBJECT_DIRECTORIES="+src.Repo+"/objects")
	}
	if _, err := runGit(ctx, src.Repo, env, "", "ls-tree", "-r", src.Commit); err != nil && ctx.Err() == nil {
		a.t.Errorf("read the tree of %s: %v", src.Commit, err)
	}
	_, _ = fmt.Fprintf(out, "-----> Building %.7s\n", src.Commit)
	if f != nil {
		if err := f(ctx, src, out); err != nil {
			return nil, err
		}
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	a.open++
	d := &deployment{a: a, src: src, before: a.live[src.App]}
	a.live[src.App] = src.Commit
	return d, nil
}

type deployment struct {
	a      *apps
	src    m3o.Source
	before string
	done   bool
}

func (d *deployment) Done(ctx context.Context, moved bool, out io.Writer) error {
	if err := ctx.Err(); err != nil {
		d.a.t.Errorf("Done was given an ended context: %v", err)
	}
	d.a.mu.Lock()
	defer d.a.mu.Unlock()
	if d.done {
		d.a.t.Errorf("Done was called twice for %s", d.src.Commit)
	}
	d.done = true
	d.a.open--
	d.a.log = append(d.a.log, fmt.Sprintf("done %v", moved))
	if !moved {
		d.a.live[d.src.App] = d.before
	}
	<-d.a.locks[d.src.App]
	if moved {
		_, _ = fmt.Fprintf(out, "       Released v%d in 0.1s\n", len(d.a.log))
	} else {
		_, _ = fmt.Fprintln(out, " !     Rolled back: git did not move the branch")
	}
	return nil
}

func (a *apps) events() string {
	a.mu.Lock()
	defer a.mu.Unlock()
	var words []string
	for _, l := range a.log {
		words = append(words, strings.TrimPrefix(l, "done "))
	}
	for i, w := range words {
		words[i], _, _ = strings.Cut(w, " ")
	}
	return strings.Join(words, " ")
}

// A site is a running server with its clients' files.
type site struct {
	t     *testing.T
	s     *Server
	users *users
	apps  *apps
	dir   string
	addr  string
	stop  func() // ends Run and waits
}

type siteConfig struct {
	limits   Limits
	commands Commands
	deploy   func(ctx context.Context, src m3o.Source, out io.Writer) error
}

func newSite(t *testing.T, sc siteConfig) *site {
	t.Helper()
	need.Program(t, "git")
	need.Program(t, "ssh")
	dir := t.TempDir()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	host, err := GenerateHostKey()
	if err != nil {
		t.Fatal(err)
	}
	site := &site{t: t, dir: dir, addr: ln.Addr().String(), users: &users{keys: map[string]string{}}}
	site.apps = &apps{t: t, deploy: sc.deploy, locks: map[string]chan struct{}{}, live: map[string]string{}}
	log := slog.New(slog.DiscardHandler)
	if testing.Verbose() {
		log = slog.New(slog.NewTextHandler(testLog{t}, &slog.HandlerOptions{Level: slog.LevelDebug}))
	}
	site.s, err = New(Config{
		Listener: ln, HostKey: host, Repos: filepath.Join(dir, "repos"),
		Users: site.users, Apps: site.apps, Commands: sc.commands, Limits: sc.limits, Log: log,
	})
	if err != nil {
		t.Fatal(err)
	}
	_, port, _ := net.SplitHostPort(site.addr)
	site.write("known_hosts", "[127.0.0.1]:"+port+" "+site.s.HostKey()+"\n")
	site.addKey("ada", "ada")
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- site.s.Run(ctx) }()
	var once sync.Once
	site.stop = func() {
		once.Do(func() {
			cancel()
			if err := <-ended; err != nil {
				t.Errorf("Run = %v", err)
			}
		})
	}
	t.Cleanup(func() {
		site.stop()
		site.checkClean()
	})
	return site
}

type testLog struct{ t *testing.T }

func (l testLog) Write(p []byte) (int, error) {
	l.t.Log(strings.TrimSpace(string(p)))
	return len(p), nil
}

// checkClean holds the promise that nothing of a push stays: no quarantine, no
// lock, no process, no deployment without its Done, and a live commit that is
// the branch's.
func (s *site) checkClean() {
	s.t.Helper()
	repos := s.s.cfg.Repos
	_ = filepath.WalkDir(repos, func(path string, d os.DirEntry, err error) error {
		name := filepath.Base(path)
		if strings.HasPrefix(name, "tmp_") || strings.HasSuffix(name, ".lock") || strings.HasPrefix(name, "shallow_") || strings.HasPrefix(name, ".init-") {
			s.t.Errorf("left behind: %s", path)
		}
		return nil
	})
	procs, _ := filepath.Glob("/proc/[0-9]*/cwd")
	for _, p := range procs {
		if cwd, err := os.Readlink(p); err == nil && strings.HasPrefix(cwd, repos) {
			cmd, _ := os.ReadFile(filepath.Dir(p) + "/cmdline")
			s.t.Errorf("process left behind: %s %q", p, cmd)
		}
	}
	s.apps.mu.Lock()
	defer s.apps.mu.Unlock()
	if s.apps.open != 0 {
		s.t.Errorf("%d deployments had no Done", s.apps.open)
	}
	for app, live := range s.apps.live {
		tip, err := Tip(context.Background(), s.s.repoDir(app), "refs/heads/main")
		if err != nil || tip != live {
			s.t.Errorf("app %s serves %q, its branch is %q, %v", app, live, tip, err)
		}
		if out, err := runGit(context.Background(), s.s.repoDir(app), nil, "", "fsck", "--strict"); err != nil {
			s.t.Errorf("fsck of %s: %v %s", app, err, out)
		}
	}
	s.s.mu.Lock()
	defer s.s.mu.Unlock()
	if len(s.s.perKey) != 0 || len(s.s.conns) != 0 || len(s.s.repos) != 0 {
		s.t.Errorf("the server still counts sessions %v, connections %d, repositories %v", s.s.perKey, len(s.s.conns), s.s.repos)
	}
}

func (s *site) write(name, text string) string {
	s.t.Helper()
	path := filepath.Join(s.dir, name)
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		s.t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		s.t.Fatal(err)
	}
	return path
}

// addKey makes a key file and, if user is not empty, gives it to that user.
func (s *site) addKey(name, user string) gossh.Signer {
	s.t.Helper()
	_, key, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		s.t.Fatal(err)
	}
	block, err := gossh.MarshalPrivateKey(key, name)
	if err != nil {
		s.t.Fatal(err)
	}
	s.write(name, string(pem.EncodeToMemory(block)))
	signer, err := gossh.NewSignerFromKey(key)
	if err != nil {
		s.t.Fatal(err)
	}
	s.write(name+".pub", string(gossh.MarshalAuthorizedKey(signer.PublicKey())))
	if user != "" {
		s.users.mu.Lock()
		s.users.keys[string(signer.PublicKey().Marshal())] = user
		s.users.mu.Unlock()
	}
	return signer
}

// sshArgs are the options of a client that knows nothing but the site.
func (s *site) sshArgs(keys ...string) []string {
	_, port, _ := net.SplitHostPort(s.addr)
	args := []string{"-F", "none", "-p", port, "-o", "IdentitiesOnly=yes", "-o", "IdentityAgent=none",
		"-o", "StrictHostKeyChecking=yes", "-o", "UserKnownHostsFile=" + filepath.Join(s.dir, "known_hosts")}
	for _, k := range keys {
		args = append(args, "-i", filepath.Join(s.dir, k))
	}
	return args
}

func (s *site) url(app string) string { return "m3o@127.0.0.1:" + app }

// env is the environment of a user's git.
func (s *site) env(key string) []string {
	return []string{
		"PATH=" + os.Getenv("PATH"), "HOME=" + s.dir, "GIT_CONFIG_NOSYSTEM=1", "LC_ALL=C", "GIT_TERMINAL_PROMPT=0",
		"GIT_AUTHOR_NAME=Ada", "GIT_AUTHOR_EMAIL=ada@example.org", "GIT_COMMITTER_NAME=Ada", "GIT_COMMITTER_EMAIL=ada@example.org",
		"GIT_AUTHOR_DATE=2026-01-02T03:04:05Z", "GIT_COMMITTER_DATE=2026-01-02T03:04:05Z",
		"GIT_SSH_COMMAND=ssh " + strings.Join(s.sshArgs(key), " "),
	}
}

// A clone is a user's working copy.
type clone struct {
	s   *site
	dir string
	key string
	env []string // more of it
}

// work makes an empty working copy whose remote m3o is app.
func (s *site) work(app string) *clone {
	s.t.Helper()
	dir, err := os.MkdirTemp(s.dir, "work-")
	if err != nil {
		s.t.Fatal(err)
	}
	c := &clone{s: s, dir: dir, key: "ada"}
	c.must("init", "-q", "-b", "main")
	c.must("remote", "add", "m3o", s.url(app))
	return c
}

func (c *clone) cmd(args ...string) *exec.Cmd {
	cmd := exec.Command("git", args...)
	cmd.Dir, cmd.Env = c.dir, append(c.s.env(c.key), c.env...)
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	cmd.WaitDelay = 20 * time.Second
	return cmd
}

// git runs git and returns both outputs and whether it succeeded.
func (c *clone) git(args ...string) (string, bool) {
	c.s.t.Helper()
	cmd := c.cmd(args...)
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	t := time.AfterFunc(3*time.Minute, func() { _ = syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL) })
	defer t.Stop()
	err := cmd.Run()
	if ee, ok := errors.AsType[*exec.ExitError](err); err != nil && (!ok || ee.ExitCode() < 0) {
		c.s.t.Errorf("git %v: %v", args, err)
	}
	return out.String(), err == nil
}

func (c *clone) must(args ...string) string {
	c.s.t.Helper()
	out, ok := c.git(args...)
	if !ok {
		c.s.t.Fatalf("git %v failed:\n%s", args, out)
	}
	return strings.TrimSpace(out)
}

// mustNot runs git, which must fail, and returns what it said.
func (c *clone) mustNot(args ...string) string {
	c.s.t.Helper()
	out, ok := c.git(args...)
	if ok {
		c.s.t.Fatalf("git %v succeeded:\n%s", args, out)
	}
	return out
}

// commit writes files (name, content, …) and commits them.
func (c *clone) commit(files ...string) string {
	c.s.t.Helper()
	for i := 0; i < len(files); i += 2 {
		path := filepath.Join(c.dir, files[i])
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			c.s.t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(files[i+1]), 0o644); err != nil {
			c.s.t.Fatal(err)
		}
	}
	c.must("add", "-A")
	c.must("commit", "-q", "--allow-empty", "-m", "change "+strings.Join(files, " ")[:min(20, len(strings.Join(files, " ")))])
	return c.must("rev-parse", "HEAD")
}

func (s *site) tip(app, ref string) string {
	s.t.Helper()
	tip, err := Tip(s.t.Context(), s.s.repoDir(app), ref)
	if err != nil {
		s.t.Fatal(err)
	}
	return tip
}

// eventually waits for a condition; it fails the test if it does not come.
func eventually(t *testing.T, what string, cond func() bool) {
	t.Helper()
	deadline := time.Now().Add(2 * time.Minute)
	for !cond() {
		if time.Now().After(deadline) {
			t.Fatalf("waited two minutes for: %s", what)
		}
		<-time.After(5 * time.Millisecond)
	}
}

func wants(t *testing.T, out string, parts ...string) {
	t.Helper()
	for _, p := range parts {
		if !strings.Contains(out, p) {
			t.Errorf("output lacks %q:\n%s", p, out)
		}
	}
}

func wantEvents(t *testing.T, s *site, want string) {
	t.Helper()
	if got := s.apps.events(); got != want {
		t.Errorf("events = %q, want %q", got, want)
	}
}
