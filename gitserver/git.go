package gitserver

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	goruntime "runtime"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/m3o/m3o"
)

// gitConfig is given to every git by -c, which wins over a repository's own
// file: nothing in a repository may run a program, reach a network or start
// upkeep of its own.
var gitConfig = []string{
	"core.fsmonitor=false",
	"core.alternateRefsCommand=true", // the program true
	"protocol.allow=never",
	"gc.auto=0",
	"maintenance.auto=false",
	// Blobs above this are streamed, never held whole; with the bound on
	// threads this keeps git's need of memory well under Limits.Memory.
	"core.bigFileThreshold=32m",
	fmt.Sprintf("pack.threads=%d", min(4, goruntime.NumCPU())),
	// An accepted push survives a power cut: git syncs packs and refs of
	// itself, loose objects only if told. batch is one flush for all.
	"core.fsync=committed",
	"core.fsyncMethod=batch",
}

// gitEnv is the whole environment of a git: nothing of the daemon's but PATH.
func gitEnv(extra ...string) []string {
	path := os.Getenv("PATH")
	if path == "" {
		path = "/usr/local/bin:/usr/bin:/bin"
	}
	return append([]string{
		"PATH=" + path, "HOME=/nonexistent", "LC_ALL=C",
		"GIT_CONFIG_NOSYSTEM=1", "GIT_CONFIG_GLOBAL=/dev/null", "GIT_ATTR_NOSYSTEM=1", "GIT_TERMINAL_PROMPT=0",
	}, extra...)
}

func gitArgs(hooks string, args ...string) []string {
	all := make([]string, 0, 2*len(gitConfig)+2+len(args))
	for _, c := range gitConfig {
		all = append(all, "-c", c)
	}
	return append(append(all, "-c", "core.hooksPath="+hooks), args...)
}

func cutEnv(kv, key string) (string, bool) { return strings.CutPrefix(kv, key+"=") }

// runGit runs a git that needs no client, in repo, and returns its output.
// When it fails, the error holds what it wrote on stderr.
func runGit(ctx context.Context, repo string, env []string, in string, args ...string) (string, error) {
	cmd := exec.CommandContext(ctx, "git", gitArgs(os.DevNull, args...)...)
	cmd.Dir, cmd.Env = repo, append(gitEnv(env...), "GIT_DIR=.")
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	cmd.Cancel = func() error { return syscall.Kill(-cmd.Process.Pid, syscall.SIGTERM) }
	cmd.WaitDelay = 2 * time.Second
	if in != "" {
		cmd.Stdin = strings.NewReader(in)
	}
	out, err := cmd.Output()
	if err != nil {
		if e, ok := errors.AsType[*exec.ExitError](err); ok && len(e.Stderr) > 0 {
			err = fmt.Errorf("%w: %s", err, strings.TrimSpace(string(e.Stderr)))
		}
		return string(out), fmt.Errorf("git %s: %w", args[0], err)
	}
	return string(out), nil
}

// A child is a git that talks with a client. It gets no parent-death signal,
// which comes when the thread that started it ends, not the process. When the
// daemon dies its pipes close, on which git and the hooks end by themselves;
// the quarantine is swept at the next start.
type child struct {
	cmd    *exec.Cmd
	in     *os.File // what git reads
	out    *os.File // what git writes
	err    *os.File
	exited chan struct{}

	mu     sync.Mutex // held while reaping and while signalling
	reaped bool

	pumps sync.WaitGroup
	done  chan struct{} // closed when the pumps have ended
}

// startGit starts git with pipes in place of a client. extra become its file
// descriptors 3, 4 …; the child's ends of all pipes are closed here.
func (s *Server) startGit(repo string, env []string, extra []*os.File, args ...string) (*child, error) {
	var theirs []*os.File
	var ours []*os.File
	closeAll := func(fs []*os.File) {
		for _, f := range fs {
			_ = f.Close()
		}
	}
	defer func() { closeAll(theirs); closeAll(extra) }()
	pipe := func(weWrite bool) error {
		r, w, err := os.Pipe()
		if err != nil {
			return err
		}
		if weWrite {
			theirs, ours = append(theirs, r), append(ours, w)
		} else {
			theirs, ours = append(theirs, w), append(ours, r)
		}
		return nil
	}
	for _, weWrite := range []bool{true, false, false} {
		if err := pipe(weWrite); err != nil {
			closeAll(ours)
			return nil, fmt.Errorf("make pipe: %w", err)
		}
	}
	cmd := exec.Command(s.git, gitArgs(s.hooks, args...)...)
	cmd.Dir, cmd.Env = repo, gitEnv(env...)
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	cmd.Stdin, cmd.Stdout, cmd.Stderr = theirs[0], theirs[1], theirs[2]
	cmd.ExtraFiles = extra
	if err := cmd.Start(); err != nil {
		closeAll(ours)
		return nil, fmt.Errorf("start git: %w", err)
	}
	c := &child{cmd: cmd, in: ours[0], out: ours[1], err: ours[2], exited: make(chan struct{}), done: make(chan struct{})}
	// git has been fed nothing yet, so all it does and starts is under these.
	if err := limit(cmd.Process.Pid, s.lim); err != nil {
		s.log.Warn("limit git", "err", err)
	}
	c.pumps.Go(func() {
		c.reap()
		close(c.exited)
		// An orphan of a killed git may hold the pipes a moment longer.
		deadline := time.Now().Add(5 * time.Second)
		_ = c.out.SetReadDeadline(deadline)
		_ = c.err.SetReadDeadline(deadline)
		_ = c.in.Close()
	})
	return c, nil
}

// limit bounds a process and, by inheritance, each it starts. Output files and
// address space are left alone: git streams a zip bomb, so that only processor
// time stops it.
func limit(pid int, l Limits) error {
	cpu := uint64(max(1, l.CPU/time.Second))
	var errs []error
	for res, v := range map[int]unix.Rlimit{
		unix.RLIMIT_CPU:  {Cur: cpu, Max: cpu + 5},
		unix.RLIMIT_DATA: {Cur: uint64(l.Memory), Max: uint64(l.Memory)},
		unix.RLIMIT_CORE: {},
	} {
		if err := unix.Prlimit(pid, res, &v, nil); err != nil {
			errs = append(errs, fmt.Errorf("set limit %d: %w", res, err))
		}
	}
	return errors.Join(errs...)
}

// feed copies what the client sends to git until either ends. The rest of a
// client that git no longer listens to is dropped, so that it comes to read
// git's answer.
func (c *child) feed(r io.Reader) {
	_, _ = io.Copy(c.in, r)
	_ = c.in.Close()
	_, _ = io.Copy(io.Discard, r)
}

// pump starts copying git's output to the client, and what of it is readable
// to tap. Once the client is gone the output is dropped: git must not die of
// it between moving a ref and saying so.
func (c *child) pump(out, errOut io.Writer, tap *tap) {
	copyAll := func(dst io.Writer, src *os.File, seen func([]byte) (hold bool)) {
		buf := make([]byte, 64<<10)
		held := 0
		for {
			n, err := src.Read(buf[held:])
			hold := n > 0 && seen != nil && seen(buf[held:held+n]) && held+n < len(buf)
			if held += n; held > 0 && (!hold || err != nil) {
				if dst != nil {
					if _, werr := dst.Write(buf[:held]); werr != nil {
						dst = nil
					}
				}
				held = 0
			}
			if err != nil {
				return
			}
		}
	}
	var onOut, onErr func([]byte) bool
	if tap != nil {
		// The list of refs goes out in one piece: a client that gives up in
		// the middle of it makes ssh close the channel, and explain unheard.
		onOut, onErr = func(p []byte) bool { return !tap.stdout(p) }, tap.text
	}
	c.pumps.Go(func() { copyAll(out, c.out, onOut) })
	c.pumps.Go(func() { copyAll(errOut, c.err, onErr) })
	go func() { c.pumps.Wait(); _ = c.out.Close(); _ = c.err.Close(); close(c.done) }()
}

// delivered waits until git's output has reached the client, at most for the
// time given (0: without end).
func (c *child) delivered(within time.Duration) bool {
	if within == 0 {
		<-c.done
		return true
	}
	t := time.NewTimer(within)
	defer t.Stop()
	select {
	case <-c.done:
		return true
	case <-t.C:
		return false
	}
}

// stop ends git: it gets grace to end by itself, because its input has ended,
// then SIGTERM, then SIGKILL. git 2.39 leaves its quarantine behind when it
// dies of a signal.
func (c *child) stop(grace time.Duration) {
	_ = c.in.Close()
	wait := func(d time.Duration) bool {
		t := time.NewTimer(d)
		defer t.Stop()
		select {
		case <-c.exited:
			return true
		case <-t.C:
			return false
		}
	}
	if wait(grace) {
		return
	}
	c.signal(syscall.SIGTERM)
	if wait(killGrace) {
		return
	}
	c.signal(syscall.SIGKILL)
	<-c.exited
}

// signal reaches git and all it started.
func (c *child) signal(sig syscall.Signal) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if !c.reaped { // else the number may be another's by now
		_ = syscall.Kill(-c.cmd.Process.Pid, sig)
	}
}

func (c *child) reap() {
	for {
		// Wait without reaping, so that mu is not held while git runs.
		err := unix.Waitid(unix.P_PID, c.cmd.Process.Pid, nil, unix.WEXITED|unix.WNOWAIT, nil)
		if !errors.Is(err, unix.EINTR) {
			break
		}
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	_ = c.cmd.Wait() // its error is the exit code, read from ProcessState
	c.reaped = true
}

const killGrace = 2 * time.Second

// exitCode is git's exit code as a shell would give it. Only after exited.
func (c *child) exitCode() int {
	st := c.cmd.ProcessState
	if st == nil {
		return 1
	}
	if ws, ok := st.Sys().(syscall.WaitStatus); ok && ws.Signaled() {
		return 128 + int(ws.Signal())
	}
	return st.ExitCode()
}

// InitRepo makes an empty bare repository at the absolute path repo, whole or
// not at all. It is no error if there is one already.
func InitRepo(ctx context.Context, repo string) error {
	if !isAbsGit(repo) {
		return m3o.Errorf(m3o.Invalid, "repository %q is not an absolute path ending in .git", repo)
	}
	if _, err := os.Stat(repo); err == nil {
		return nil
	}
	return initRepo(ctx, repo)
}
