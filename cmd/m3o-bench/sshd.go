//go:build linux

package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"syscall"
	"time"
)

// An sshServer is OpenSSH on loopback with a configuration, host key and
// authorized key of this run: the reference of a push. The machine's own
// sshd and its settings are not touched.
type sshServer struct {
	b       *bench
	addr    string
	user    string
	repos   string
	cmd     *exec.Cmd
	done    chan struct{}
	madeDir bool // privilegeDir was not there
}

// privilegeDir is where Debian's sshd wants an empty directory for its
// unprivileged part; the service makes it, when there is one.
const privilegeDir = "/run/sshd"

func (b *bench) startSSHD(ctx context.Context) (*sshServer, error) {
	path, err := exec.LookPath("sshd")
	if err != nil {
		if path, err = exec.LookPath("/usr/sbin/sshd"); err != nil {
			return nil, fmt.Errorf("%w; make deps installs openssh-server", err)
		}
	}
	me, err := user.Current()
	if err != nil {
		return nil, err
	}
	dir := filepath.Join(b.dir, "sshd")
	s := &sshServer{b: b, user: me.Username, repos: filepath.Join(dir, "repos")}
	if err := os.MkdirAll(s.repos, 0o700); err != nil {
		return nil, err
	}
	if s.addr, err = freeAddr(ctx); err != nil {
		return nil, err
	}
	hostKey, authorized, config := filepath.Join(dir, "host_ed25519"), filepath.Join(dir, "authorized_keys"), filepath.Join(dir, "config")
	if _, err := b.box.run(ctx, dir, "ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", hostKey); err != nil {
		return nil, err
	}
	pub, err := os.ReadFile(b.box.key + ".pub")
	if err != nil {
		return nil, err
	}
	host, port, err := net.SplitHostPort(s.addr)
	if err != nil {
		return nil, err
	}
	text := fmt.Sprintf(`ListenAddress %s
Port %s
HostKey %s
AuthorizedKeysFile %s
PidFile none
StrictModes no
UsePAM no
PasswordAuthentication no
KbdInteractiveAuthentication no
PermitRootLogin prohibit-password
MaxStartups 100
`, host, port, hostKey, authorized)
	if err := errors.Join(os.WriteFile(authorized, pub, 0o600), os.WriteFile(config, []byte(text), 0o600)); err != nil {
		return nil, err
	}
	if os.Geteuid() == 0 {
		if err := os.Mkdir(privilegeDir, 0o755); err == nil {
			s.madeDir = true
		} else if !errors.Is(err, fs.ErrExist) {
			return nil, err
		}
	}
	logs, err := os.Create(filepath.Join(dir, "log"))
	if err != nil {
		return nil, err
	}
	defer logs.Close()
	s.cmd = exec.Command(path, "-D", "-e", "-f", config)
	s.cmd.Stderr = logs
	s.cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	if err := s.cmd.Start(); err != nil {
		return nil, err
	}
	s.done = make(chan struct{})
	go func() { _ = s.cmd.Wait(); close(s.done) }()
	err = until(ctx, 10*time.Millisecond, 10*time.Second, "sshd to listen", func() (bool, error) {
		select {
		case <-s.done:
			return true, nil // repository's git init tells what is wrong
		default:
		}
		c, err := (&net.Dialer{}).DialContext(ctx, "tcp", s.addr)
		if err != nil {
			return false, err
		}
		return true, c.Close()
	})
	if err == nil {
		_, err = s.repository(ctx, "first")
	}
	if err == nil {
		_, err = b.handshake(ctx, s.remote("first"))
	}
	if err != nil {
		err = fmt.Errorf("sshd: %w; its log ends:\n%s", err, tail(logs.Name(), 1000))
		s.stop()
		return nil, err
	}
	return s, nil
}

func (s *sshServer) stop() {
	_ = s.cmd.Process.Signal(syscall.SIGTERM)
	<-s.done
	if s.madeDir {
		_ = os.Remove(privilegeDir)
	}
}

// repository makes an empty repository that checks what it receives as m3o does.
func (s *sshServer) repository(ctx context.Context, name string) (url string, err error) {
	dir := filepath.Join(s.repos, name)
	for _, args := range [][]string{{"init", "-q", "--bare", "-b", "main", dir}, {"-C", dir, "config", "receive.fsckObjects", "true"},
		{"-C", dir, "config", "receive.autogc", "false"}} {
		if _, err := s.b.box.run(ctx, s.repos, "git", args...); err != nil {
			return "", err
		}
	}
	return s.remote(name), nil
}

func (s *sshServer) remote(name string) string {
	return "ssh://" + s.user + "@" + s.addr + filepath.Join(s.repos, name)
}

// cpu is what sshd and all it has served used. It waits until the last
// connection's process has ended: only then is it in the sum.
func (s *sshServer) cpu(ctx context.Context) (sum time.Duration, err error) {
	err = until(ctx, 5*time.Millisecond, 10*time.Second, "sshd to end its connections", func() (bool, error) {
		ps, err := processes()
		if err != nil {
			return false, err
		}
		for _, p := range ps {
			if p.parent == s.cmd.Process.Pid {
				return false, nil
			}
			if p.pid == s.cmd.Process.Pid {
				sum = p.cpu
			}
		}
		return true, nil
	})
	return sum, err
}
