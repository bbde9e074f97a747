package main

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
	"testing"

	"github.com/m3o/m3o/internal/pty"
)

// tool is a command that an app brings along.
const tool = `package main

import (
	"crypto/sha256"
	"fmt"
	"io"
	"os"
	"os/signal"
	"strings"
	"syscall"
	"unsafe"
)

func size() string {
	var ws [4]uint16
	if _, _, e := syscall.Syscall(syscall.SYS_IOCTL, 0, syscall.TIOCGWINSZ, uintptr(unsafe.Pointer(&ws))); e != 0 {
		return "no terminal"
	}
	return fmt.Sprintf("%dx%d", ws[1], ws[0])
}

func main() {
	c := make(chan os.Signal, 8)
	signal.Notify(c, syscall.SIGINT, syscall.SIGTERM, syscall.SIGWINCH)
	if len(os.Args) < 2 {
		os.Args = append(os.Args, "wait")
	}
	switch os.Args[1] {
	case "echo":
		fmt.Println(strings.Join(os.Args[2:], "|"))
		fmt.Fprintln(os.Stderr, "done")
	case "fail":
		os.Exit(7)
	case "env":
		for _, k := range os.Args[2:] {
			fmt.Println(k + "=" + os.Getenv(k))
		}
	case "sum":
		h := sha256.New()
		n, _ := io.Copy(h, os.Stdin)
		fmt.Printf("%d %x\n", n, h.Sum(nil))
	case "wait":
		fmt.Println("waiting", size())
		for s := range c {
			if s == syscall.SIGWINCH {
				fmt.Println("now", size())
				continue
			}
			fmt.Println("got", s)
			os.Exit(3)
		}
	}
}
`

func TestOneOffCommands(t *testing.T) {
	b := theBox(t)
	p := b.user(t, "rita")
	dir := p.clone(t, "hello-http", "oneoff")
	for name, text := range map[string]string{"cmd/tool/main.go": tool, "Procfile": "web: hello-http\njob: tool\n"} {
		if err := os.MkdirAll(filepath.Dir(filepath.Join(dir, name)), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	p.commit(t, dir, "tool")
	if out, err := p.push(dir); err != nil && !strings.Contains(out, "Released") {
		t.Fatalf("push: %v\n%s", err, out)
	}
	p.must(t, dir, "m3o", "config:set", "COLOUR=blue")

	type result struct {
		out, err string
		code     int
	}
	do := func(stdin string, args ...string) result {
		t.Helper()
		cmd := p.command(dir, "m3o", args...)
		var out, errs bytes.Buffer
		cmd.Stdin, cmd.Stdout, cmd.Stderr = strings.NewReader(stdin), &out, &errs
		_ = cmd.Run()
		return result{out.String(), errs.String(), cmd.ProcessState.ExitCode()}
	}
	big := strings.Repeat("0123456789abcdef", 1<<17) // 2 MB
	sum := sha256.Sum256([]byte(big))
	for _, tc := range []struct {
		name, stdin string
		args        []string
		out, err    string
		code        int
	}{
		{"both outputs", "", []string{"run", "--", "tool", "echo", "a b", "-x"}, "a b|-x\n", "done\n", 0},
		{"flags after the command are its own", "", []string{"run", "tool", "echo", "-n", "--json"}, "-n|--json\n", "done\n", 0},
		{"exit code", "", []string{"run", "--", "tool", "fail"}, "", "", 7},
		{"config and variables", "", []string{"run", "-e", "A=1", "-e", "B=2=3", "--", "tool", "env", "COLOUR", "A", "B", "PORT"}, "COLOUR=blue\nA=1\nB=2=3\nPORT=\n", "", 0},
		{"input", big, []string{"run", "--", "tool", "sum"}, fmt.Sprintf("%d %s\n", len(big), hex.EncodeToString(sum[:])), "", 0},
		{"a process type", "", []string{"run", "-p", "job", "env", "M3O_APP"}, "M3O_APP=oneoff\n", "", 0},
		{"inside an instance", "x", []string{"ps:exec", "--", "tool", "sum"}, "1 " + fmt.Sprintf("%x", sha256.Sum256([]byte("x"))) + "\n", "", 0},
		{"exit code inside", "", []string{"ps:exec", "-p", "web", "--", "tool", "fail"}, "", "", 7},
	} {
		if got := do(tc.stdin, tc.args...); got != (result{tc.out, tc.err, tc.code}) {
			t.Errorf("%s: %+v, want %q %q %d", tc.name, got, tc.out, tc.err, tc.code)
		}
	}
	if got := do("", "run", "--", "no-such-thing"); got.code == 0 || !strings.Contains(got.err, "no-such-thing") {
		t.Errorf("a program that is not there: %+v", got)
	}
	if got := do("", "run", "-p", "nope"); got.code != 1 || !strings.Contains(got.err, "no process type nope") || !strings.Contains(got.err, "it has job, web") {
		t.Errorf("a process type that is not there: %+v", got)
	}
	instance := regexp.MustCompile(`oneoff-web-v\S+`).FindString(p.must(t, dir, "m3o", "ps"))
	if got := do("", "ps:exec", instance, "--", "tool", "env", "M3O_INSTANCE"); got.out != "M3O_INSTANCE="+instance+"\n" {
		t.Errorf("in %s: %+v", instance, got)
	}
	if out, err := b.user(t, "passer-by").try("", "m3o", "run", "-a", "oneoff", "--", "tool", "env", "COLOUR"); err == nil || !strings.Contains(out, "no app called oneoff") {
		t.Errorf("a stranger: %v %s", err, out)
	}

	t.Run("a signal reaches the command", func(t *testing.T) {
		cmd := p.command(dir, "m3o", "run", "--no-stdin", "--", "tool", "wait")
		out := &lockedBuffer{}
		cmd.Stdout, cmd.Stderr = out, out
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		eventually(t, "the command waits", func() bool { return strings.Contains(out.String(), "waiting no terminal\n") })
		if err := cmd.Process.Signal(syscall.SIGINT); err != nil {
			t.Fatal(err)
		}
		_ = cmd.Wait()
		if code := cmd.ProcessState.ExitCode(); code != 3 || !strings.HasSuffix(out.String(), "got interrupt\n") {
			t.Errorf("exit %d, %q", code, out)
		}
	})
	t.Run("a client that dies takes the command along", func(t *testing.T) {
		cmd := p.command(dir, "m3o", "run", "--no-stdin", "--", "tool", "wait")
		out := &lockedBuffer{}
		cmd.Stdout, cmd.Stderr = out, out
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		eventually(t, "the command waits", func() bool { return strings.Contains(out.String(), "waiting") })
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
		eventually(t, "its instance is gone", func() bool {
			left, err := filepath.Glob(filepath.Join(b.data, "runtime", "bundles", "oneoff-run-*"))
			return err == nil && len(left) == 0
		})
	})
	inTerminal := func(cmd *exec.Cmd) {
		t.Helper()
		master, slave, err := pty.Open()
		if err != nil {
			t.Fatal(err)
		}
		pty.Resize(master, 101, 31)
		out := &lockedBuffer{}
		copied := make(chan struct{})
		go func() {
			defer close(copied)
			buf := make([]byte, 4096)
			for {
				n, err := master.Read(buf)
				_, _ = out.Write(buf[:n])
				if err != nil {
					return
				}
			}
		}()
		cmd.Stdin, cmd.Stdout, cmd.Stderr = slave, slave, slave
		cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true, Setctty: true}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		_ = slave.Close()
		eventually(t, "the command has the terminal", func() bool { return strings.Contains(out.String(), "waiting 101x31\r\n") })
		pty.Resize(master, 90, 20)
		eventually(t, "the new size: "+out.String(), func() bool { return strings.Contains(out.String(), "now 90x20\r\n") })
		if _, err := master.Write([]byte{3}); err != nil { // Ctrl-C
			t.Fatal(err)
		}
		_ = cmd.Wait()
		<-copied
		_ = master.Close()
		if code := cmd.ProcessState.ExitCode(); code != 3 || !strings.Contains(out.String(), "got interrupt\r\n") {
			t.Errorf("exit %d, %q", code, out)
		}
	}
	t.Run("terminal", func(t *testing.T) { inTerminal(p.command(dir, "m3o", "run", "--", "tool", "wait")) })
	t.Run("terminal inside an instance", func(t *testing.T) { inTerminal(p.command(dir, "m3o", "ps:exec", "--", "tool", "wait")) })
	t.Run("terminal over ssh", func(t *testing.T) {
		_, port, _ := net.SplitHostPort(b.ssh)
		inTerminal(p.command(dir, "ssh", "-t", "-F", "/dev/null", "-i", p.key, "-o", "IdentitiesOnly=yes", "-o", "StrictHostKeyChecking=accept-new",
			"-o", "UserKnownHostsFile="+filepath.Join(p.home, "known_hosts"), "-p", port, "m3o@localhost", "run", "-a", "oneoff", "--", "tool", "wait"))
	})
	t.Run("detached", func(t *testing.T) {
		name := strings.TrimSpace(do("", "run:detached", "--", "tool", "wait").out)
		if !regexp.MustCompile(`^run-[a-z0-9]{6}$`).MatchString(name) {
			t.Fatalf("it is called %q", name)
		}
		eventually(t, "its log", func() bool { return strings.Contains(do("", "run:logs", name).out, "waiting") })
		b.kill()
		if err := b.start(); err != nil {
			t.Fatal(err)
		}
		if got := do("", "run:list"); !strings.Contains(got.out, name) {
			t.Errorf("after a crash of the daemon it is not listed: %+v", got)
		}
		if got := do("", "run:stop", name); got.code != 0 {
			t.Errorf("stop: %+v", got)
		}
		if got := do("", "run:logs", name); !strings.Contains(got.out, "got terminated") {
			t.Errorf("its log ends with %q", got.out)
		}
		name = strings.TrimSpace(do("", "run:detached", "-p", "job", "env", "M3O_APP").out)
		eventually(t, "a short one has ended", func() bool { return !strings.Contains(do("", "run:list").out, name) })
		if got := do("", "run:logs", name); !strings.Contains(got.out, "M3O_APP=oneoff") {
			t.Errorf("it logged %q", got.out)
		}
	})
	p.must(t, dir, "m3o", "destroy", "--confirm", "oneoff")
}
