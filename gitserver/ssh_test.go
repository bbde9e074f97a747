package gitserver

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"os"
	"os/exec"
	"strings"
	"sync"
	"testing"

	gossh "golang.org/x/crypto/ssh"

	"github.com/m3o/m3o/internal/need"
)

// ssh runs ssh with the keys given; options come before the destination.
func (s *site) ssh(keys []string, options []string, command ...string) (string, int) {
	s.t.Helper()
	args := append(s.sshArgs(keys...), options...)
	cmd := exec.Command("ssh", append(append(args, "m3o@127.0.0.1"), command...)...)
	cmd.Env = s.env("ada")
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	_ = cmd.Run()
	return out.String(), cmd.ProcessState.ExitCode()
}

func TestHelloNamesTheUser(t *testing.T) {
	t.Parallel()
	s := newSite(t, siteConfig{})
	for _, command := range [][]string{nil, {"true"}} {
		out, code := s.ssh([]string{"ada"}, nil, command...)
		wants(t, out, "Hello ada!", "git push m3o main")
		if code != 0 {
			t.Errorf("exit code %d", code)
		}
	}
}

func TestAnUnknownKeyIsRefused(t *testing.T) {
	t.Parallel()
	s := newSite(t, siteConfig{})
	s.addKey("stranger", "")
	out, code := s.ssh([]string{"stranger"}, nil, "true")
	wants(t, out, "Permission denied (publickey")
	wants(t, out, "no key your SSH client offered is registered here:", "ssh-ed25519 SHA256:", "m3o keys:add")
	if n := strings.Count(out, "registered here"); n != 1 {
		t.Errorf("said %d times:\n%s", n, out)
	}
	if code != 255 {
		t.Errorf("exit code %d", code)
	}
	c := s.work("hello")
	c.commit("a", "1")
	c.key = "stranger"
	wants(t, c.mustNot("push", "m3o", "main"), "Permission denied (publickey", "m3o keys:add")
	wantEvents(t, s, "")
}

// The public half of a key can be offered by anyone; only the key that signed
// may say who the client is.
func TestOfferingAnothersPublicKeyGivesNothing(t *testing.T) {
	t.Parallel()
	s := newSite(t, siteConfig{})
	s.addKey("victim", "victim")
	s.addKey("mallory", "mallory")
	s.addKey("unknown", "")
	for _, f := range []string{"victim"} { // mallory has only the public half
		if err := os.Remove(s.dir + "/" + f); err != nil {
			t.Fatal(err)
		}
	}
	out, code := s.ssh([]string{"victim.pub", "unknown"}, nil, "true")
	if code != 255 || strings.Contains(out, "Hello") {
		t.Errorf("victim.pub and an unknown key: exit %d %q", code, out)
	}
	out, _ = s.ssh([]string{"victim.pub", "mallory"}, nil, "true")
	wants(t, out, "Hello mallory!")
	out, _ = s.ssh([]string{"unknown", "mallory"}, nil, "true")
	wants(t, out, "Hello mallory!")
	if strings.Contains(out, "registered") {
		t.Errorf("a key that was not the last is complained of:\n%s", out)
	}
}

func TestNothingButPublicKeysAuthenticates(t *testing.T) {
	t.Parallel()
	s := newSite(t, siteConfig{})
	for name, auth := range map[string][]gossh.AuthMethod{
		"none":     nil,
		"password": {gossh.Password("x")},
		"keyboard": {gossh.KeyboardInteractive(func(_, _ string, q []string, _ []bool) ([]string, error) { return make([]string, len(q)), nil })},
	} {
		_, err := gossh.Dial("tcp", s.addr, &gossh.ClientConfig{User: "ada", Auth: auth, HostKeyCallback: gossh.InsecureIgnoreHostKey()})
		if err == nil {
			t.Errorf("%s: let in", name)
		}
	}
}

func TestARevokedKeyLosesItsOpenConnection(t *testing.T) {
	t.Parallel()
	s := newSite(t, siteConfig{})
	client := s.dial("ada")
	run := func() string {
		sess, err := client.NewSession()
		if err != nil {
			t.Fatal(err)
		}
		out, _ := sess.CombinedOutput("true")
		return string(out)
	}
	wants(t, run(), "Hello ada!")
	s.users.mu.Lock()
	clear(s.users.keys)
	s.users.mu.Unlock()
	wants(t, run(), "this key is no longer known here")
}

func TestNoShellForwardingSubsystemOrEnvironment(t *testing.T) {
	t.Parallel()
	s := newSite(t, siteConfig{})
	out, _ := s.ssh([]string{"ada"}, []string{"-tt"}, "true")
	wants(t, out, "m3o gives no shell")
	out, code := s.ssh([]string{"ada"}, []string{"-W", s.addr})
	wants(t, out, "unsupported channel type")
	if code == 0 {
		t.Error("ssh -W succeeded")
	}
	out, code = s.ssh([]string{"ada"}, []string{"-o", "ExitOnForwardFailure=yes", "-R", "0:127.0.0.1:1"}, "true")
	if code == 0 {
		t.Errorf("ssh -R succeeded: %s", out)
	}
	out, code = s.ssh([]string{"ada"}, []string{"-s"}, "sftp")
	if code == 0 || !strings.Contains(out, "subsystem request failed") {
		t.Errorf("sftp: exit %d %q", code, out)
	}
	client := s.dial("ada")
	sess, err := client.NewSession()
	if err != nil {
		t.Fatal(err)
	}
	defer sess.Close() //nolint:errcheck // over
	for k, v := range map[string]string{"GIT_PROTOCOL": "version=2:evil", "GIT_DIR": "/", "LD_PRELOAD": "/x", "PATH": "/x"} {
		if sess.Setenv(k, v) == nil {
			t.Errorf("variable %s=%s was taken", k, v)
		}
	}
	if err := sess.Setenv("GIT_PROTOCOL", "version=2"); err != nil {
		t.Error(err)
	}
	if ok, err := sess.SendRequest("auth-agent-req@openssh.com", true, nil); ok || err != nil {
		t.Errorf("agent forwarding = %v, %v", ok, err)
	}
}

func TestTooManySessionsOfOneKey(t *testing.T) {
	t.Parallel()
	u := newUntilCancelled()
	s := newSite(t, siteConfig{deploy: u.deploy, limits: Limits{Sessions: 1}})
	c := s.work("hello")
	c.commit("a", "1")
	interrupt, wait := c.background("push", "m3o", "main")
	<-u.building
	wants(t, c.mustNot("fetch", "m3o"), " !     this key has 1 sessions open, which is the limit")
	s.addKey("bob", "bob")
	out, _ := s.ssh([]string{"bob"}, nil, "true")
	wants(t, out, "Hello bob!")
	interrupt()
	wait()
	s.idle()
	c.must("fetch", "m3o")
}

func TestManyChannelsOnOneConnectionAreRefused(t *testing.T) {
	t.Parallel()
	s := newSite(t, siteConfig{})
	client := s.dial("ada")
	for range maxChannels {
		if _, err := client.NewSession(); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := client.NewSession(); err == nil || !strings.Contains(err.Error(), "which is the limit") {
		t.Errorf("one more session: %v", err)
	}
}

func TestRefusals(t *testing.T) {
	t.Parallel()
	s := newSite(t, siteConfig{})
	for command, want := range map[string]string{
		"git-receive-pack 'theirs'":               "ada may not use app theirs",
		"git-upload-pack '/theirs.git'":           "ask its owner",
		"git-receive-pack 'broken'":               "internal error; see the daemon's log",
		"git-receive-pack '../../etc'":            "app name",
		"git-receive-pack 'a' 'b'":                "takes one repository",
		"git-receive-pack":                        "takes one repository",
		"git-upload-pack --upload-pack=x":         "app name",
		"git-receive-pack 'a":                     "single quote that is not closed",
		"git-lfs-authenticate 'hello.git' upload": "GIT_LFS_SKIP_PUSH=1",
		"git-upload-archive 'hello'":              "git archive --remote is not supported",
		"apps list":                               `"apps" is not available over ssh here`,
		"/bin/sh -c id":                           "git push, git fetch and git clone",
		"true; id":                                "not available over ssh",
	} {
		out, code := s.ssh([]string{"ada"}, nil, command)
		if code != 1 || !strings.Contains(out, want) || strings.Contains(out, "secret") {
			t.Errorf("%s: exit %d %q, want 1 and %q", command, code, out, want)
		}
	}
	entries, err := os.ReadDir(s.s.cfg.Repos)
	if err != nil || len(entries) != 1 {
		t.Errorf("refusals made files: %v %v", entries, err)
	}
}

type verbs struct {
	mu    sync.Mutex
	calls []string
}

func (v *verbs) Run(_ context.Context, user string, args []string, _ *Terminal, in io.Reader, out, errOut io.Writer) int {
	v.mu.Lock()
	v.calls = append(v.calls, fmt.Sprintf("%s %q", user, args))
	v.mu.Unlock()
	switch args[0] {
	case "panic":
		panic("in a verb")
	case "cat":
		_, _ = io.Copy(out, in)
		return 0
	}
	_, _ = fmt.Fprintln(out, "result")
	_, _ = fmt.Fprintln(errOut, "progress")
	return 7
}

func TestVerbsOverSSH(t *testing.T) {
	t.Parallel()
	v := &verbs{}
	s := newSite(t, siteConfig{commands: v})
	out, code := s.ssh([]string{"ada"}, nil, "config", "set", `'A=b c'`, `"$HOME"`)
	wants(t, out, "result", "progress")
	if code != 7 {
		t.Errorf("exit code %d, want 7", code)
	}
	if want := `ada ["config" "set" "A=b c" "$HOME"]`; v.calls[0] != want {
		t.Errorf("call = %s, want %s", v.calls[0], want)
	}
	cmd := exec.Command("ssh", append(s.sshArgs("ada"), "m3o@127.0.0.1", "cat")...)
	cmd.Stdin = strings.NewReader("through and back")
	if b, err := cmd.Output(); err != nil || string(b) != "through and back" {
		t.Errorf("cat = %q, %v", b, err)
	}
	out, code = s.ssh([]string{"ada"}, nil, "panic")
	wants(t, out, "internal error")
	if code != 1 {
		t.Errorf("exit code after a panic %d, want 1", code)
	}
	out, _ = s.ssh([]string{"ada"}, nil, "true")
	wants(t, out, "Hello ada!")
}

func TestAPanicWhileAuthenticatingEndsOnlyThatConnection(t *testing.T) {
	t.Parallel()
	s := newSite(t, siteConfig{})
	s.addKey("bob", "bob")
	s.users.mu.Lock()
	s.users.panicFor = "bob"
	s.users.mu.Unlock()
	if _, code := s.ssh([]string{"bob"}, nil, "true"); code != 255 {
		t.Errorf("exit code %d", code)
	}
	out, _ := s.ssh([]string{"ada"}, nil, "true")
	wants(t, out, "Hello ada!")
}

func TestASHA256RepositoryIsToldWhy(t *testing.T) {
	t.Parallel()
	s := newSite(t, siteConfig{})
	c := s.work("hello")
	if err := os.RemoveAll(c.dir + "/.git"); err != nil {
		t.Fatal(err)
	}
	c.must("init", "-q", "-b", "main", "--object-format=sha256")
	c.must("remote", "add", "m3o", s.url("hello"))
	c.commit("a", "1")
	wants(t, c.mustNot("push", "m3o", "main"), "SHA-256")
	wantEvents(t, s, "")
}

func TestLFSPushIsAnsweredWithAWayOut(t *testing.T) {
	t.Parallel()
	need.Program(t, "git-lfs")
	s := newSite(t, siteConfig{})
	c := s.work("hello")
	c.must("lfs", "install", "--local")
	c.must("lfs", "track", "*.bin")
	c.commit("x.bin", "large")
	wants(t, c.mustNot("push", "m3o", "main"), "Git LFS is not supported here")
	c.env = []string{"GIT_LFS_SKIP_PUSH=1"}
	c.must("push", "m3o", "main")
}

func TestNewReportsEveryFault(t *testing.T) {
	t.Parallel()
	_, err := New(Config{Repos: "relative", HostKey: []byte("x"), Limits: Limits{Pack: -1}})
	if err == nil {
		t.Fatal("New took an empty config")
	}
	wants(t, err.Error(), "no listener", "host key", "not an absolute path", "no users", "no apps", "a limit is negative")
}
