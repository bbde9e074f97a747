//go:build linux

package main

import (
	"bufio"
	"bytes"
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
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"syscall"
	"time"
)

// A box is one installation of m3o with its own state and ports, and the
// person who uses it.
type box struct {
	bin, dir, data string
	env            []string // of the daemon
	https, ssh     string   // host:port
	api            string   // URL

	cmd  *exec.Cmd
	done chan struct{} // closed when cmd has ended
	out  strings.Builder
	wg   sync.WaitGroup // reads the daemon's output into out

	home, key string
	client    *http.Client
}

// openBox starts a new installation and waits until it is ready.
func openBox(ctx context.Context, bin, dir string) (*box, error) {
	bin, err := filepath.Abs(bin)
	if err != nil {
		return nil, err
	}
	for _, name := range []string{"m3o", "m3od", "m3o-shim", "buildkitd", "runc"} {
		if _, err := os.Stat(filepath.Join(bin, name)); err != nil {
			return nil, fmt.Errorf("%w; make build makes it", err)
		}
	}
	b := &box{bin: bin, dir: dir, data: filepath.Join(dir, "data"), home: filepath.Join(dir, "home")}
	var plain string
	for _, a := range []*string{&plain, &b.https, &b.ssh} {
		if *a, err = freeAddr(ctx); err != nil {
			return nil, err
		}
	}
	b.api = "https://api.localhost:" + port(b.https)
	b.env = []string{"PATH=" + os.Getenv("PATH"), "HOME=" + dir, "M3O_DATA=" + b.data, "M3O_BIN=" + bin,
		"M3O_HTTP=" + plain, "M3O_HTTPS=" + b.https, "M3O_SSH=" + b.ssh}
	for _, k := range []string{"GOPROXY", "GOSUMDB", "GONOSUMDB", "GOPRIVATE"} {
		if v, err := exec.CommandContext(ctx, "go", "env", k).Output(); err == nil && len(bytes.TrimSpace(v)) > 0 {
			b.env = append(b.env, k+"="+string(bytes.TrimSpace(v)))
		}
	}
	for _, k := range []string{"SSL_CERT_FILE", "SSL_CERT_DIR", "M3O_LOG_LEVEL"} {
		if v := os.Getenv(k); v != "" {
			b.env = append(b.env, k+"="+v)
		}
	}
	if err := b.start(ctx); err != nil {
		return nil, errors.Join(err, b.close(context.WithoutCancel(ctx)))
	}
	return b, nil
}

// freeAddr is a loopback address on which nobody listens at the moment.
func freeAddr(ctx context.Context) (string, error) {
	ln, err := (&net.ListenConfig{}).Listen(ctx, "tcp", "127.0.0.1:0")
	if err != nil {
		return "", err
	}
	return ln.Addr().String(), ln.Close()
}

func freeAddrs(ctx context.Context, n int) ([]string, error) {
	addrs := make([]string, n)
	for i := range addrs {
		var err error
		if addrs[i], err = freeAddr(ctx); err != nil {
			return nil, err
		}
	}
	return addrs, nil
}

func port(addr string) string { return addr[strings.LastIndexByte(addr, ':')+1:] }

func (b *box) logFile() string { return filepath.Join(b.dir, "m3od.log") }

// start starts the daemon and waits until it says that it is ready.
func (b *box) start(ctx context.Context, extra ...string) error {
	logs, err := os.OpenFile(b.logFile(), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	defer logs.Close()
	r, w, err := os.Pipe()
	if err != nil {
		return err
	}
	cmd := exec.Command(filepath.Join(b.bin, "m3od"))
	cmd.Env, cmd.Dir, cmd.Stdout, cmd.Stderr = append(b.env[:len(b.env):len(b.env)], extra...), b.dir, w, logs
	// A group of its own, so that Ctrl-C reaches us alone and we stop it in order.
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	err = cmd.Start()
	_ = w.Close()
	if err != nil {
		_ = r.Close()
		return fmt.Errorf("start m3od: %w", err)
	}
	done, ready := make(chan struct{}), make(chan struct{})
	b.cmd, b.done = cmd, done
	b.out.Reset()
	b.wg.Go(func() {
		defer r.Close()
		isReady := false
		for sc := bufio.NewScanner(r); sc.Scan(); {
			if isReady {
				continue // nobody reads it, but the daemon must not block on it
			}
			b.out.WriteString(sc.Text() + "\n")
			if strings.HasPrefix(sc.Text(), "ready ") {
				isReady = true
				close(ready)
			}
		}
	})
	b.wg.Go(func() {
		_ = cmd.Wait()
		// What outlives the daemon should not hold its output; if it does, stop must not hang.
		_ = r.SetReadDeadline(time.Now().Add(time.Second))
		close(done)
	})
	select {
	case <-ready:
		return nil
	case <-done:
		return fmt.Errorf("m3od ended before it was ready; its log ends:\n%s", tail(b.logFile(), 2000))
	case <-time.After(2 * time.Minute):
		return fmt.Errorf("m3od was not ready within two minutes; its log ends:\n%s", tail(b.logFile(), 2000))
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// stop ends the daemon as a service manager would.
func (b *box) stop() error {
	if b.cmd == nil {
		return nil
	}
	if err := b.cmd.Process.Signal(syscall.SIGTERM); err != nil && !errors.Is(err, os.ErrProcessDone) {
		return err
	}
	select {
	case <-b.done:
	case <-time.After(time.Minute):
		_ = b.cmd.Process.Kill()
		<-b.done
		return fmt.Errorf("m3od did not stop within a minute; its log ends:\n%s", tail(b.logFile(), 2000))
	}
	b.wg.Wait()
	code := b.cmd.ProcessState.ExitCode()
	b.cmd = nil
	if code != 0 {
		return fmt.Errorf("m3od ended with %d; its log ends:\n%s", code, tail(b.logFile(), 2000))
	}
	return nil
}

// close stops everything that was started, apps included. The state stays.
func (b *box) close(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, 4*time.Minute)
	defer cancel()
	if b.client != nil {
		b.client.CloseIdleConnections()
	}
	err := b.stop()
	// Once more with this setting: it is what takes apps and network away.
	if serr := b.start(ctx, "M3O_STOP_APPS=true"); serr != nil {
		err = errors.Join(err, serr)
	}
	err = errors.Join(err, b.stop())
	// What is alive after that has lost its owner. Every command line of ours
	// names the state directory, which is this run's alone.
	ps, perr := processes()
	for _, p := range ps {
		if p.names(b.data) {
			err = errors.Join(err, fmt.Errorf("%s (%d) was still alive and was killed", p.program(), p.pid))
			_ = syscall.Kill(p.pid, syscall.SIGKILL)
		}
	}
	return errors.Join(err, perr, unmount(b.data))
}

// unmount takes away mounts left below dir, so that removing dir removes
// nothing else.
func unmount(dir string) error {
	m, err := os.ReadFile("/proc/self/mounts")
	if err != nil {
		return err
	}
	for l := range strings.Lines(string(m)) {
		if f := strings.Fields(l); len(f) > 1 && strings.HasPrefix(f[1], dir+"/") {
			err = errors.Join(err, fmt.Errorf("%s was still mounted", f[1]), syscall.Unmount(f[1], syscall.MNT_DETACH))
		}
	}
	return err
}

// makeKey makes the user's SSH key.
func (b *box) makeKey(ctx context.Context) error {
	b.key = filepath.Join(b.home, ".ssh", "id_ed25519")
	if err := os.MkdirAll(filepath.Dir(b.key), 0o700); err != nil {
		return err
	}
	_, err := b.run(ctx, b.home, "ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "bench", "-f", b.key)
	return err
}

// signIn makes the user a key and an admin, and an HTTP client that trusts
// the installation.
func (b *box) signIn(ctx context.Context) error {
	if err := b.makeKey(ctx); err != nil {
		return err
	}
	said := b.out.String()
	code := regexp.MustCompile(`--code (\S+)`).FindStringSubmatch(said)
	if code == nil {
		return fmt.Errorf("m3od printed no one-time code:\n%s", said)
	}
	args := []string{"login", b.api, "--code-stdin"}
	if m := regexp.MustCompile(`--ca-fingerprint (\S+)`).FindStringSubmatch(said); m != nil {
		args = append(args, "--ca-fingerprint", m[1])
	}
	cmd := b.command(ctx, b.home, b.m3o(), args...)
	cmd.Stdin = strings.NewReader(code[1])
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("m3o login: %w: %s", err, out)
	}
	pem, err := os.ReadFile(filepath.Join(b.data, "ca", "ca.crt"))
	if err != nil {
		return err
	}
	roots := x509.NewCertPool()
	if !roots.AppendCertsFromPEM(pem) {
		return errors.New("no certificate in ca.crt")
	}
	b.client = &http.Client{Timeout: 30 * time.Second, Transport: &http.Transport{ForceAttemptHTTP2: true,
		TLSClientConfig: &tls.Config{RootCAs: roots},
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return (&net.Dialer{}).DialContext(ctx, "tcp", b.https) // whatever the resolver makes of *.localhost
		}}}
	return nil
}

func (b *box) m3o() string { return filepath.Join(b.bin, "m3o") }

// sshOptions are the same for m3o and for OpenSSH: algorithms that both have,
// so that what is compared is not one's choice of them.
func (b *box) sshOptions() string {
	return "ssh -F /dev/null -i " + b.key + " -o IdentitiesOnly=yes -o IdentityAgent=none -o StrictHostKeyChecking=accept-new" +
		" -o UserKnownHostsFile=" + filepath.Join(b.home, "known_hosts") + " -o LogLevel=ERROR" +
		" -o KexAlgorithms=curve25519-sha256 -o Ciphers=aes128-gcm@openssh.com"
}

// command is a command of the user.
func (b *box) command(ctx context.Context, dir, name string, args ...string) *exec.Cmd {
	cmd := exec.CommandContext(ctx, name, args...)
	cmd.Dir = dir
	cmd.Env = []string{"PATH=" + b.bin + ":" + os.Getenv("PATH"), "HOME=" + b.home, "XDG_CONFIG_HOME=" + filepath.Join(b.home, ".config"),
		"GIT_CONFIG_NOSYSTEM=1", "GIT_AUTHOR_NAME=bench", "GIT_AUTHOR_EMAIL=bench@localhost", "GIT_COMMITTER_NAME=bench",
		"GIT_COMMITTER_EMAIL=bench@localhost", "GIT_TERMINAL_PROMPT=0", "NO_COLOR=1", "TERM=dumb", "LC_ALL=C", "GIT_SSH_COMMAND=" + b.sshOptions()}
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	cmd.Cancel = func() error { return syscall.Kill(-cmd.Process.Pid, syscall.SIGTERM) }
	cmd.WaitDelay = 10 * time.Second
	return cmd
}

// run runs a command of the user and returns its output, both streams together.
func (b *box) run(ctx context.Context, dir, name string, args ...string) (string, error) {
	out, err := b.command(ctx, dir, name, args...).CombinedOutput()
	if err != nil {
		return "", fmt.Errorf("%s %s: %w: %s", filepath.Base(name), strings.Join(args, " "), err, out)
	}
	return string(out), nil
}

// remote is the URL of an app's repository.
func (b *box) remote(app string) string {
	return "ssh://m3o@localhost:" + port(b.ssh) + "/" + app
}

// ask sends one request to an app: a GET when body is "", else JSON.
func (b *box) ask(ctx context.Context, app, path, body string) (string, error) {
	method := http.MethodGet
	if body != "" {
		method = http.MethodPost
	}
	req, err := http.NewRequestWithContext(ctx, method, "https://"+app+".localhost:"+port(b.https)+path, strings.NewReader(body))
	if err != nil {
		return "", err
	}
	if body != "" {
		req.Header.Set("Content-Type", "application/json")
	}
	res, err := b.client.Do(req)
	if err != nil {
		return "", err
	}
	defer res.Body.Close()
	answer, err := io.ReadAll(io.LimitReader(res.Body, 1<<20))
	if err == nil && res.StatusCode != http.StatusOK {
		err = fmt.Errorf("%s: %s", res.Status, answer)
	}
	return string(answer), err
}

// tail is the end of a file, or why it cannot be read.
func tail(file string, n int) string {
	b, err := os.ReadFile(file)
	if err != nil {
		return err.Error()
	}
	return string(b[max(0, len(b)-n):])
}

// until polls cond every few milliseconds until it holds; it gives up after max.
func until(ctx context.Context, every, max time.Duration, what string, cond func() (bool, error)) error {
	tick := time.NewTicker(every)
	defer tick.Stop()
	deadline := time.After(max)
	for {
		ok, err := cond()
		if ok {
			return nil
		}
		select {
		case <-tick.C:
		case <-deadline:
			return errors.Join(fmt.Errorf("waited %s for %s", max, what), err)
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
}
