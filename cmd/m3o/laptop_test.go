package main

import (
	"bufio"
	"bytes"
	"context"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/crypto/ssh"
	"golang.org/x/crypto/ssh/agent"

	"github.com/m3o/m3o/internal/need"
)

// A laptop is where commands run: a home, a working directory, an environment.
type laptop struct {
	t       testing.TB
	vars    map[string]string
	dir     string
	in      string // what is typed or piped
	typing  bool   // stdin is a terminal
	watched bool   // stdout is one
	root    string
	uid     int
}

func newLaptop(t testing.TB) *laptop {
	t.Helper()
	home := t.TempDir()
	return &laptop{t: t, dir: t.TempDir(), uid: 1000, vars: map[string]string{"HOME": home, "XDG_CONFIG_HOME": filepath.Join(home, "xdg")}}
}

// outcome is what one command did.
type outcome struct {
	exit     int
	out, err string
}

func (l *laptop) system(out, errw io.Writer) *system {
	in := bufio.NewReader(strings.NewReader(l.in))
	return &system{in: in, out: out, err: errw, env: func(k string) string { return l.vars[k] }, dir: l.dir,
		root: l.root, uid: l.uid, now: func() time.Time { return now }, inTerminal: l.typing, outTerminal: l.watched, tab: time.Minute,
		secret: func(context.Context) (string, error) {
			s, err := in.ReadString('\n')
			if s == "" {
				return "", err
			}
			return strings.TrimSuffix(s, "\n"), nil
		}}
}

func (l *laptop) m3o(args ...string) outcome {
	l.t.Helper()
	var out, errw bytes.Buffer
	exit := run(l.t.Context(), args, l.system(&out, &errw))
	return outcome{exit, out.String(), errw.String()}
}

// do runs a command that must do.
func (l *laptop) do(args ...string) outcome {
	l.t.Helper()
	o := l.m3o(args...)
	if o.exit != 0 {
		l.t.Fatalf("m3o %s: exit %d\n%s%s", strings.Join(args, " "), o.exit, o.out, o.err)
	}
	return o
}

// want fails unless the outcome has this exit status and texts.
func (o outcome) want(t testing.TB, exit int, stdout, stderr []string) {
	t.Helper()
	if o.exit != exit {
		t.Errorf("exit %d, want %d", o.exit, exit)
	}
	for _, s := range stdout {
		if !strings.Contains(o.out, s) {
			t.Errorf("stdout lacks %q", s)
		}
	}
	for _, s := range stderr {
		if !strings.Contains(o.err, s) {
			t.Errorf("stderr lacks %q", s)
		}
	}
	if t.Failed() {
		t.Logf("stdout: %s\nstderr: %s", o.out, o.err)
	}
}

// ci makes the laptop one that needs no login.
func (l *laptop) ci(p *platform) *laptop {
	l.t.Helper()
	ca := filepath.Join(l.t.TempDir(), "ca.pem")
	if err := os.WriteFile(ca, []byte(p.ca.pem()), 0o600); err != nil {
		l.t.Fatal(err)
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	p.users["ada"], p.tokens["ci"] = true, "ada"
	l.vars["M3O_URL"], l.vars["M3O_TOKEN"], l.vars["M3O_CA_FILE"] = p.url, "ci", ca
	return l
}

// keyFile makes a new private key in the laptop's ~/.ssh, as people do.
func (l *laptop) keyFile(name, passphrase string) ssh.PublicKey {
	l.t.Helper()
	dir := filepath.Join(l.vars["HOME"], ".ssh")
	if err := os.MkdirAll(dir, 0o700); err != nil {
		l.t.Fatal(err)
	}
	// One round (-a) of key derivation: the usual sixteen take seconds under -race.
	cmd := exec.Command(need.Program(l.t, "ssh-keygen"), "-q", "-t", "ed25519", "-a", "1", "-N", passphrase, "-C", "test@laptop", "-f", filepath.Join(dir, name))
	if out, err := cmd.CombinedOutput(); err != nil {
		l.t.Fatalf("ssh-keygen: %v\n%s", err, out)
	}
	line, err := os.ReadFile(filepath.Join(dir, name+".pub"))
	if err != nil {
		l.t.Fatal(err)
	}
	pub, _, _, _, err := ssh.ParseAuthorizedKey(line)
	if err != nil {
		l.t.Fatal(err)
	}
	return pub
}

// agent serves an SSH agent with these private keys on a socket.
func (l *laptop) agent(keys ...any) {
	l.t.Helper()
	ring := agent.NewKeyring()
	for _, k := range keys {
		if err := ring.Add(agent.AddedKey{PrivateKey: k, Comment: "from the agent"}); err != nil {
			l.t.Fatal(err)
		}
	}
	// A short path: a socket's may have 108 bytes.
	dir, err := os.MkdirTemp("", "m3o")
	if err != nil {
		l.t.Fatal(err)
	}
	sock := filepath.Join(dir, "agent")
	ln, err := net.Listen("unix", sock)
	if err != nil {
		l.t.Fatal(err)
	}
	var wg sync.WaitGroup
	wg.Go(func() {
		for {
			conn, err := ln.Accept()
			if err != nil {
				return
			}
			wg.Go(func() {
				defer conn.Close()               //nolint:errcheck // the client has gone
				_ = agent.ServeAgent(ring, conn) // ends with io.EOF
			})
		}
	})
	l.t.Cleanup(func() {
		_ = ln.Close()
		wg.Wait()
		_ = os.RemoveAll(dir)
	})
	l.vars["SSH_AUTH_SOCK"] = sock
}

// repo makes the working directory a git repository on branch main.
func (l *laptop) repo() {
	l.t.Helper()
	need.Program(l.t, "git")
	l.gitDo("init", "-q", "-b", "main")
}

func (l *laptop) gitDo(args ...string) string {
	l.t.Helper()
	cmd := exec.Command("git", args...)
	cmd.Dir = l.dir
	out, err := cmd.CombinedOutput()
	if err != nil {
		l.t.Fatalf("git %s: %v\n%s", strings.Join(args, " "), err, out)
	}
	return strings.TrimSpace(string(out))
}
