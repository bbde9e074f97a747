package main

import (
	"bufio"
	"bytes"
	"cmp"
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/m3o/m3o/daemon"
	"github.com/m3o/m3o/internal/need"
	"github.com/m3o/m3o/release"
)

// asDaemon makes the test binary be m3od: what is tested is then the real
// command, race detector included.
const asDaemon = "M3O_TEST_AS_DAEMON"

// asVersion is the version that such a daemon, and its router, say they are.
const asVersion = "M3O_TEST_VERSION"

// crashStep names the step of a deploy after which the daemon kills itself.
const crashStep = "M3O_TEST_CRASH_AFTER"

func crashAfter(step string) func(*daemon.Daemon) {
	return func(d *daemon.Daemon) {
		d.OnStep(func(_ string, s release.Status) {
			if string(s) == step {
				_ = syscall.Kill(os.Getpid(), syscall.SIGKILL)
			}
		})
	}
}

func TestMain(m *testing.M) {
	if os.Getenv(asDaemon) != "" {
		version = cmp.Or(os.Getenv(asVersion), version)
		ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
		code := run(ctx, os.Args[1:], os.Getenv, os.Stdout, os.Stderr, crashAfter(os.Getenv(crashStep)))
		stop()
		os.Exit(code)
	}
	code := m.Run()
	if shared != nil {
		if err := shared.shutdown(); err != nil {
			fmt.Fprintln(os.Stderr, "stop the shared installation:", err)
			code = 1
		}
	}
	os.Exit(code)
}

// slot sets this run apart from others on this host at the same time: 0 to 9,
// from M3O_TEST_SLOT.
func slot() int {
	n, _ := strconv.Atoi(os.Getenv("M3O_TEST_SLOT"))
	return min(max(n, 0), 9)
}

// boxName tells the shared installation's devices, cgroups and firewall from others' on this host.
var boxName = fmt.Sprintf("m3oe2e%d", slot())

// A box is one installation of m3o with its own state and ports, used the way
// a person does: by its commands, git and HTTP.
type box struct {
	dir   string // everything is in here
	data  string
	bin   string
	env   []string // for the daemon
	https string   // host:port of the router
	http  string
	ssh   string
	api   string

	exe     string // the daemon's binary; "" is this test's own
	metrics string // host:port

	extra []string // variables the daemon was started with beside env
	cmd   *exec.Cmd
	out   *lockedBuffer // stdout of the daemon
	log   *lockedBuffer // stderr of the daemon
	done  chan struct{} // closed when cmd has ended
	code  string        // one-time code of the first start
	print string        // CA fingerprint
}

var (
	shared     *box
	sharedOnce sync.Once
)

// theBox is the installation that the tests of this package share: what is
// slow, compiling the standard library inside a build, is done once.
func theBox(t *testing.T) *box {
	t.Helper()
	need.Root(t)
	need.Program(t, "git")
	need.Program(t, "ssh")
	need.Program(t, "curl")
	bin := filepath.Dir(need.Bin(t, "buildkitd"))
	need.Bin(t, "runc")
	need.Bin(t, "m3o-shim")
	need.Bin(t, "m3o")
	need.Registry(t)
	sharedOnce.Do(func() {
		b, err := newBox(bin)
		if err != nil {
			t.Error(err)
			return
		}
		if err := b.start(); err != nil {
			t.Errorf("start: %v\n%s", err, b.log)
			_ = b.shutdown()
			return
		}
		if _, err := b.admin(); err != nil {
			t.Errorf("sign in the admin: %v", err)
			_ = b.shutdown()
			return
		}
		shared = b
	})
	if shared == nil {
		t.Fatal("the shared installation did not start")
	}
	if !shared.running() {
		t.Fatalf("the shared daemon is down; its log ends:\n%s", shared.log.tail(4000))
	}
	t.Cleanup(func() { shared.handBack(t) })
	return shared
}

// handBack makes the installation whole after a test that failed half-way,
// with the daemon down or started in a special way: one failure must not
// bring all others down. A daemon that ended unnoticed fails the test that
// leaves it so.
func (b *box) handBack(t *testing.T) {
	t.Helper()
	up := b.running()
	if up && (!t.Failed() || len(b.extra) == 0) {
		return
	}
	if up {
		b.kill()
	} else if !t.Failed() {
		t.Errorf("the test left the shared daemon down; its log ends:\n%s", b.log.tail(4000))
	}
	if err := b.start(); err != nil {
		t.Errorf("the shared daemon does not come back, so that all tests after this one fail: %v\n%s", err, b.log.tail(4000))
	}
}

// boxSize bounds the file system of a box.
const boxSize = "8g"

func newBox(bin string) (*box, error) {
	dir, err := os.MkdirTemp("", "m3o-e2e-")
	if err != nil {
		return nil, err
	}
	// A file system of its own, so that a test can fill it.
	if err := syscall.Mount("tmpfs", dir, "tmpfs", 0, "mode=0755,size="+boxSize); err != nil {
		return nil, fmt.Errorf("mount tmpfs: %w", err)
	}
	b := &box{dir: dir, data: filepath.Join(dir, "data"), bin: bin, out: &lockedBuffer{}, log: &lockedBuffer{}}
	// For whoever runs these tests often: M3O_TEST_BUILD names a directory
	// that keeps the builder's caches from one run to the next.
	if keep := os.Getenv("M3O_TEST_BUILD"); keep != "" {
		if err := errors.Join(os.MkdirAll(keep, 0o700), os.MkdirAll(b.data, 0o700), os.Symlink(keep, filepath.Join(b.data, "build"))); err != nil {
			return nil, err
		}
	}
	ports, err := need.Addrs(4)
	if err != nil {
		return nil, err
	}
	b.http, b.https, b.ssh, b.metrics = ports[0], ports[1], ports[2], ports[3]
	_, port, _ := net.SplitHostPort(b.https)
	b.api = "https://api.localhost:" + port
	b.env = []string{asDaemon + "=1", "PATH=" + os.Getenv("PATH"), "HOME=" + dir,
		"M3O_DATA=" + b.data, "M3O_BIN=" + bin, "M3O_HTTP=" + b.http, "M3O_HTTPS=" + b.https, "M3O_SSH=" + b.ssh,
		"M3O_METRICS=" + b.metrics, "M3O_NAME=" + boxName, fmt.Sprintf("M3O_SUBNET=198.18.%d.0/21", 128+8*slot()), "M3O_LOG_LEVEL=debug", "M3O_DRAIN=10s", "M3O_SCALE_DOWN=9s",
		"M3O_NOTIFY_PRIVATE=true", "M3O_FORGE_CA=" + filepath.Join(dir, "forge.crt"), "M3O_GO_VULN_DB=file://" + filepath.Join(dir, "vulndb")}
	for _, k := range []string{"GOPROXY", "GOSUMDB", "GONOSUMDB", "GOPRIVATE", "GOFLAGS", "SSL_CERT_FILE", "SSL_CERT_DIR"} {
		if v, err := exec.Command("go", "env", k).Output(); err == nil && len(bytes.TrimSpace(v)) > 0 && strings.HasPrefix(k, "GO") && k != "GOFLAGS" {
			b.env = append(b.env, k+"="+strings.TrimSpace(string(v)))
		} else if v := os.Getenv(k); v != "" && k != "GOFLAGS" {
			b.env = append(b.env, k+"="+v)
		}
	}
	return b, nil
}

// start starts the daemon and waits for its ready line.
func (b *box) start(extra ...string) error {
	exe, err := os.Executable()
	if err != nil {
		return err
	}
	if b.exe != "" {
		exe = b.exe
	}
	b.cmd = exec.Command(exe)
	b.extra = extra
	b.cmd.Env = append(append([]string(nil), b.env...), extra...)
	b.cmd.Stderr = b.log
	b.cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	pr, pw, err := os.Pipe()
	if err != nil {
		return err
	}
	b.cmd.Stdout = pw
	if err := b.cmd.Start(); err != nil {
		return err
	}
	_ = pw.Close()
	b.done = make(chan struct{})
	ready := make(chan struct{})
	go func() {
		defer pr.Close()
		isReady := false
		sc := bufio.NewScanner(pr)
		for sc.Scan() {
			fmt.Fprintln(b.out, sc.Text())
			if strings.HasPrefix(sc.Text(), "ready ") && !isReady {
				isReady = true
				close(ready)
			}
		}
	}()
	go func() { _ = b.cmd.Wait(); close(b.done) }()
	select {
	case <-ready:
	case <-b.done:
		return errors.New("the daemon ended before it was ready")
	case <-time.After(2 * time.Minute):
		return errors.New("no ready line within two minutes")
	}
	if m := regexp.MustCompile(`--code (\S+)`).FindStringSubmatch(b.out.String()); m != nil {
		b.code = m[1]
	}
	if m := regexp.MustCompile(`--ca-fingerprint (\S+)`).FindStringSubmatch(b.out.String()); m != nil {
		b.print = m[1]
	}
	return nil
}

func (b *box) running() bool {
	select {
	case <-b.done:
		return false
	default:
		return b.cmd != nil
	}
}

// kill ends the daemon as a crash would and waits until it is gone.
func (b *box) kill() {
	_ = b.cmd.Process.Kill()
	<-b.done
}

// stop ends the daemon as a service manager would.
func (b *box) stop() error {
	if err := b.cmd.Process.Signal(syscall.SIGTERM); err != nil && !errors.Is(err, os.ErrProcessDone) {
		return err
	}
	select {
	case <-b.done:
	case <-time.After(time.Minute):
		_ = b.cmd.Process.Signal(syscall.SIGQUIT)
		<-b.done
		return fmt.Errorf("the daemon did not stop within a minute:\n%s", b.log.tail(20000))
	}
	if c := b.cmd.ProcessState.ExitCode(); c != 0 {
		return fmt.Errorf("the daemon exited with %d:\n%s", c, b.log.tail(4000))
	}
	return nil
}

// shutdown stops the daemon, the router and every app, and removes the state.
func (b *box) shutdown() error {
	var errs []error
	if b.cmd != nil && b.running() {
		errs = append(errs, b.stop())
	}
	// Once more with --stop-apps: that is what takes apps and network away.
	if b.cmd != nil {
		if err := b.start("M3O_STOP_APPS=true"); err != nil {
			errs = append(errs, err)
		} else {
			errs = append(errs, b.stop())
		}
	}
	if os.Getenv("M3O_KEEP") == "" {
		errs = append(errs, b.checkMounts(), syscall.Unmount(b.dir, 0), os.Remove(b.dir))
	} else {
		fmt.Fprintln(os.Stderr, "kept", b.dir)
	}
	return errors.Join(errs...)
}

// checkMounts reports mounts and processes that are left below the box.
func (b *box) checkMounts() error {
	m, err := os.ReadFile("/proc/mounts")
	if err != nil {
		return err
	}
	var left []string
	for l := range strings.Lines(string(m)) {
		if strings.Contains(l, b.dir+"/") {
			left = append(left, strings.TrimSpace(l))
		}
	}
	if pids := b.pids(); len(pids) > 0 {
		left = append(left, fmt.Sprintf("processes %v", pids))
	}
	if len(left) > 0 {
		return fmt.Errorf("left behind: %s", strings.Join(left, "; "))
	}
	return nil
}

// A person has a key, a home and is signed in.
type person struct {
	b    *box
	name string
	home string
	key  string
}

func (b *box) newPerson(name string) (*person, error) {
	p := &person{b: b, name: name, home: filepath.Join(b.dir, "home-"+name)}
	p.key = filepath.Join(p.home, ".ssh", "id_ed25519")
	if _, err := os.Stat(p.key); err == nil {
		return p, nil
	}
	if err := os.MkdirAll(filepath.Dir(p.key), 0o700); err != nil {
		return nil, err
	}
	if out, err := exec.Command("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", name, "-f", p.key).CombinedOutput(); err != nil {
		return nil, fmt.Errorf("ssh-keygen: %w: %s", err, out)
	}
	return p, nil
}

// admin is the first user, signed in with the one-time code.
func (b *box) admin() (*person, error) {
	p, err := b.newPerson("admin")
	if err != nil {
		return nil, err
	}
	if b != shared && b.code == "" {
		return p, nil
	}
	if _, err := os.Stat(filepath.Join(p.home, ".signed-in")); err == nil {
		return p, nil
	}
	cmd := p.command("", filepath.Join(b.bin, "m3o"), "login", b.api, "--code-stdin", "--ca-fingerprint", b.print)
	cmd.Stdin = strings.NewReader(b.code)
	if out, err := cmd.CombinedOutput(); err != nil {
		return nil, fmt.Errorf("m3o login: %w: %s", err, out)
	}
	return p, os.WriteFile(filepath.Join(p.home, ".signed-in"), nil, 0o600)
}

// user makes a user who may create apps, and signs them in.
func (b *box) user(t *testing.T, name string) *person {
	t.Helper()
	admin, err := b.admin()
	if err != nil {
		t.Fatal(err)
	}
	p, err := b.newPerson(name)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(filepath.Join(p.home, ".signed-in")); err == nil {
		return p
	}
	admin.must(t, "", "m3o", "users:create", name)
	pub, err := os.ReadFile(p.key + ".pub")
	if err != nil {
		t.Fatal(err)
	}
	admin.must(t, "", "m3o", "keys:add", "--user", name, string(bytes.TrimSpace(pub)))
	p.must(t, "", "m3o", "login", b.api, "--ca-fingerprint", b.print)
	if err := os.WriteFile(filepath.Join(p.home, ".signed-in"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	return p
}

func (p *person) env() []string {
	return []string{"PATH=" + p.b.bin + ":" + os.Getenv("PATH"), "HOME=" + p.home, "XDG_CONFIG_HOME=" + filepath.Join(p.home, ".config"),
		"GIT_CONFIG_NOSYSTEM=1", "GIT_AUTHOR_NAME=" + p.name, "GIT_AUTHOR_EMAIL=" + p.name + "@localhost",
		"GIT_COMMITTER_NAME=" + p.name, "GIT_COMMITTER_EMAIL=" + p.name + "@localhost", "GIT_TERMINAL_PROMPT=0",
		"CURL_CA_BUNDLE=" + filepath.Join(p.b.data, "ca", "ca.crt"), "NO_COLOR=1", "LC_ALL=C",
		"GIT_SSH_COMMAND=ssh -F /dev/null -i " + p.key + " -o IdentitiesOnly=yes -o StrictHostKeyChecking=accept-new -o UserKnownHostsFile=" + filepath.Join(p.home, "known_hosts")}
}

func (p *person) command(dir, name string, args ...string) *exec.Cmd {
	if name == "m3o" {
		name = filepath.Join(p.b.bin, "m3o")
	}
	cmd := exec.Command(name, args...)
	cmd.Dir, cmd.Env = dir, p.env()
	if dir == "" {
		cmd.Dir = p.home
	}
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	return cmd
}

// try runs a command and returns its output, both streams together. One that
// hangs ends by itself well before the whole run's time is over.
func (p *person) try(dir, name string, args ...string) (string, error) {
	cmd := p.command(dir, name, args...)
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	if err := cmd.Start(); err != nil {
		return "", err
	}
	hung := time.AfterFunc(10*time.Minute, func() { _ = syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL) })
	defer hung.Stop()
	err := cmd.Wait()
	return out.String(), err
}

// must is try for what has to work.
func (p *person) must(t *testing.T, dir, name string, args ...string) string {
	t.Helper()
	out, err := p.try(dir, name, args...)
	if err != nil {
		t.Fatalf("%s %s: %v\n%s\ndaemon's log ends:\n%s", name, strings.Join(args, " "), err, out, p.b.log.tail(3000))
	}
	return out
}

// clone makes a git repository of a sample app in the person's home, with the
// remote m3o for app. Both are gone after the test, which can fail before it
// destroys the app, and can be run again.
func (p *person) clone(t *testing.T, sample, app string) string {
	t.Helper()
	dir := filepath.Join(p.home, app)
	t.Cleanup(func() {
		_, _ = p.try("", "m3o", "destroy", app, "--confirm", app) // most have done so
		if err := os.RemoveAll(dir); err != nil {
			t.Error(err)
		}
	})
	if err := os.CopyFS(dir, os.DirFS(filepath.Join(need.RepoRoot(t), "testdata", "apps", sample))); err != nil {
		t.Fatal(err)
	}
	p.must(t, dir, "git", "init", "-q", "-b", "main")
	p.must(t, dir, "git", "remote", "add", "m3o", "ssh://m3o@"+p.b.sshHost()+"/"+app)
	p.commit(t, dir, "first")
	return dir
}

func (b *box) sshHost() string {
	_, port, _ := net.SplitHostPort(b.ssh)
	return net.JoinHostPort("localhost", port)
}

func (p *person) commit(t *testing.T, dir, msg string) string {
	t.Helper()
	p.must(t, dir, "git", "add", "-A")
	p.must(t, dir, "git", "commit", "-q", "--allow-empty", "-m", msg)
	return strings.TrimSpace(p.must(t, dir, "git", "rev-parse", "HEAD"))
}

// push pushes and returns what the pusher read.
func (p *person) push(dir string, opts ...string) (string, error) {
	return p.try(dir, "git", append(append([]string{"push"}, opts...), "m3o", "main")...)
}

// client reaches the router as a browser would, trusting only the CA.
func (b *box) client(t *testing.T) *http.Client {
	t.Helper()
	pem, err := os.ReadFile(filepath.Join(b.data, "ca", "ca.crt"))
	if err != nil {
		t.Fatal(err)
	}
	roots := x509.NewCertPool()
	if !roots.AppendCertsFromPEM(pem) {
		t.Fatal("no certificate in ca.crt")
	}
	tr := &http.Transport{TLSClientConfig: &tls.Config{RootCAs: roots}, ForceAttemptHTTP2: true, MaxIdleConnsPerHost: 16,
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return (&net.Dialer{}).DialContext(ctx, "tcp", b.https)
		}}
	t.Cleanup(tr.CloseIdleConnections)
	return &http.Client{Transport: tr, Timeout: 30 * time.Second}
}

func (b *box) url(app, path string) string {
	_, port, _ := net.SplitHostPort(b.https)
	return "https://" + app + ".localhost:" + port + path
}

// get asks an app and returns status and body.
func (b *box) get(t *testing.T, app, path string) (int, string) {
	t.Helper()
	res, err := b.client(t).Get(b.url(app, path))
	if err != nil {
		t.Fatalf("GET %s%s: %v", app, path, err)
	}
	defer res.Body.Close()
	body, err := io.ReadAll(res.Body)
	if err != nil {
		t.Fatalf("read %s%s: %v", app, path, err)
	}
	return res.StatusCode, string(body)
}

// lockedBuffer collects output that is read while it is written.
type lockedBuffer struct {
	mu  sync.Mutex // guards buf
	buf bytes.Buffer
}

func (l *lockedBuffer) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.buf.Write(p)
}

func (l *lockedBuffer) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.buf.String()
}

func (l *lockedBuffer) tail(n int) string {
	s := l.String()
	if len(s) > n {
		s = s[len(s)-n:]
	}
	return s
}

// patience is for what takes as long as the machine needs. Nothing waits so
// long that works, but what is waited for may be a whole build, and the first
// one of a new installation fetches a toolchain and compiles the standard
// library; it can be any test's, as they come in any order.
const patience = 5 * time.Minute

// eventually polls cond until it holds.
func eventually(t *testing.T, what string, cond func() bool) {
	t.Helper()
	tick := time.NewTicker(50 * time.Millisecond)
	defer tick.Stop()
	deadline := time.After(patience)
	for !cond() {
		select {
		case <-tick.C:
		case <-deadline:
			t.Fatalf("waited %v for: %s", patience, what)
		}
	}
}
