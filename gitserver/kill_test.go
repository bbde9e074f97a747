package gitserver

import (
	"bufio"
	"context"
	"encoding/hex"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/m3o/m3o"
)

const childEnv = "M3O_GITSERVER_TEST_CHILD"

// TestMain lets the test binary be a server of its own process, to be killed.
func TestMain(m *testing.M) {
	if os.Getenv(childEnv) != "" {
		if err := serveAsChild(os.Getenv(childEnv)); err != nil {
			fmt.Println(err)
			os.Exit(1)
		}
		return
	}
	os.Exit(m.Run())
}

// childUsers lets one key in; its Deploy never ends.
type childUsers struct{ wire string }

func (c childUsers) UserByKey(_ context.Context, wire []byte) (string, string, error) {
	if string(wire) != c.wire {
		return "", "", m3o.Errorf(m3o.NotFound, "unknown key")
	}
	return "ada", "SHA256:x", nil
}

func (childUsers) Access(context.Context, string, string, bool) (string, error) { return "main", nil }

func (childUsers) Deploy(ctx context.Context, _ m3o.Source, out io.Writer) (Deployment, error) {
	_, _ = fmt.Fprintln(out, "-----> Building for ever")
	<-ctx.Done()
	return nil, ctx.Err()
}

func serveAsChild(arg string) error {
	dir, key, _ := strings.Cut(arg, "|")
	wire, err := hex.DecodeString(key)
	if err != nil {
		return err
	}
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return err
	}
	host, err := GenerateHostKey()
	if err != nil {
		return err
	}
	who := childUsers{string(wire)}
	s, err := New(Config{Listener: ln, HostKey: host, Repos: dir, Users: who, Apps: who})
	if err != nil {
		return err
	}
	fmt.Println(ln.Addr(), s.HostKey())
	return s.Run(context.Background())
}

func TestAKilledDaemonLeavesNoProcessAndAfterItsNextStartNoQuarantine(t *testing.T) {
	t.Parallel()
	for _, phase := range []string{"build", "pack"} {
		t.Run(phase, func(t *testing.T) {
			// A site for its keys and files; its own server is not used.
			s := newSite(t, siteConfig{})
			signer := s.addKey("eve", "")
			repos := filepath.Join(s.dir, "killed")
			child := exec.Command(os.Args[0])
			child.Env = append(os.Environ(), childEnv+"="+repos+"|"+hex.EncodeToString(signer.PublicKey().Marshal()))
			stdout, err := child.StdoutPipe()
			if err != nil {
				t.Fatal(err)
			}
			if err := child.Start(); err != nil {
				t.Fatal(err)
			}
			defer func() { _ = child.Process.Kill(); _ = child.Wait() }()
			line, err := bufio.NewReader(stdout).ReadString('\n')
			if err != nil {
				t.Fatal(err)
			}
			addr, hostKey, _ := strings.Cut(strings.TrimSpace(line), " ")
			_, port, _ := net.SplitHostPort(addr)
			s.addr = addr
			s.write("known_hosts", "[127.0.0.1]:"+port+" "+hostKey+"\n")
			c := s.work("hello")
			c.key = "eve"
			var files []string
			for i := range 120 {
				files = append(files, fmt.Sprintf("f%d", i), randomText(uint64(i), 4<<10))
			}
			c.commit(files...)
			if phase == "pack" {
				slow := s.write("slow.sh", "#!/bin/sh\n{ head -c 200000; sleep 600; } | ssh \"$@\"\n")
				c.env = []string{"GIT_SSH_VARIANT=ssh", "GIT_SSH_COMMAND=sh " + slow + " " + strings.Join(s.sshArgs("eve"), " ")}
			}
			_, _ = c.background("push", "m3o", "main")
			eventually(t, "the push to reach its "+phase, func() bool {
				quarantine, _ := filepath.Glob(repos + "/hello.git/objects/tmp_objdir-incoming-*/pack/*")
				hook := running(repos, "pre-receive")
				return len(quarantine) > 0 && hook == (phase == "build")
			})
			if err := child.Process.Kill(); err != nil {
				t.Fatal(err)
			}
			eventually(t, "git to end by itself", func() bool { return !running(repos, "") })
			// git dies of the closed pipe and does not clean up then; the next start does.
			if err := sweepAll(repos); err != nil {
				t.Fatal(err)
			}
			if left, _ := filepath.Glob(repos + "/hello.git/objects/tmp_objdir-*"); len(left) > 0 {
				t.Errorf("left behind: %v", left)
			}
			if tip, err := Tip(t.Context(), repos+"/hello.git", "refs/heads/main"); tip != "" || err != nil {
				t.Errorf("main = %q, %v, want none", tip, err)
			}
		})
	}
}

// running reports whether a process with word in its command line works in dir.
func running(dir, word string) bool {
	procs, _ := filepath.Glob("/proc/[0-9]*/cwd")
	for _, p := range procs {
		if cwd, err := os.Readlink(p); err == nil && strings.HasPrefix(cwd, dir) {
			if cmd, _ := os.ReadFile(filepath.Dir(p) + "/cmdline"); strings.Contains(string(cmd), word) {
				return true
			}
		}
	}
	return false
}
