//go:build linux

package oci

import (
	"cmp"
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/m3o/m3o"
	"github.com/m3o/m3o/internal/pty"
	"github.com/m3o/m3o/runtime"
)

const (
	// oneOffGrace is how long a one-off may take to end when its caller left.
	oneOffGrace = 10 * time.Second
	// lastOutput is how long the output of an ended command is waited for: a
	// process it left behind may hold the pipe.
	lastOutput = 2 * time.Second
)

// Exec is runtime.Driver's. The command has the instance's user, limits and
// environment. When ctx ends it is killed.
func (d *Driver) Exec(ctx context.Context, instance string, c runtime.Cmd) (int, error) {
	w, _, err := d.Workload(instance)
	if err != nil {
		return -1, err
	}
	if len(c.Args) == 0 {
		return -1, m3o.Errorf(m3o.Invalid, "there is no command to run")
	}
	dir, err := os.MkdirTemp(d.bundle(instance), "exec-")
	if err != nil {
		return -1, fmt.Errorf("exec: %w", err)
	}
	defer os.RemoveAll(dir) //nolint:errcheck // goes with the bundle at the latest
	size := firstSize(ctx, c)
	if err := d.writeProcess(dir, instance, w, c, size); err != nil {
		return -1, err
	}
	pidFile := filepath.Join(dir, "pid")
	log := filepath.Join(dir, "log")
	cmd := exec.CommandContext(ctx, d.cfg.Runc, "--root", d.cfg.Run, "--log", log,
		"exec", "--process", filepath.Join(dir, "process.json"), "--pid-file", pidFile, instance)
	cmd.Env, cmd.Dir = cleanEnv, "/"
	cmd.WaitDelay = lastOutput
	cmd.Cancel = func() error { // runc then ends by itself
		if pid, err := readPid(pidFile); err == nil && inCgroup(pid, instance) {
			return unix.Kill(pid, unix.SIGKILL)
		}
		return cmd.Process.Kill()
	}
	finish := func() {}
	if c.Resize != nil {
		if finish, err = connectTerminal(cmd, c, size); err != nil {
			return -1, err
		}
	} else {
		stdin, err := feed(c.In)
		if err != nil {
			return -1, err
		}
		defer stdin.Close() //nolint:errcheck // read by the command
		cmd.Stdin, cmd.Stdout, cmd.Stderr = stdin, c.Out, c.Err
	}
	running, ended := context.WithCancel(ctx)
	defer ended()
	stop := c.PassSignals(func(sig syscall.Signal) error {
		pid, err := awaitPid(running, pidFile)
		if err != nil || !inCgroup(pid, instance) {
			return err // it has ended
		}
		return unix.Kill(pid, sig)
	})
	err = cmd.Run()
	ended()
	stop()
	finish()
	if ctx.Err() != nil {
		return -1, ctx.Err()
	}
	if b, rerr := os.ReadFile(log); rerr == nil && strings.Contains(string(b), "exec failed") {
		return -1, &m3o.Error{Kind: m3o.Invalid, Msg: fmt.Sprintf("cannot run %s in %s", c.Args[0], instance),
			Hint: "the image may hold nothing but the app: it needs no shell", Err: errors.New(strings.TrimSpace(string(b)))}
	}
	if e, ok := errors.AsType[*exec.ExitError](err); ok {
		return e.ExitCode(), nil
	}
	if err != nil && !errors.Is(err, exec.ErrWaitDelay) {
		return -1, fmt.Errorf("exec: %w", err)
	}
	return 0, nil
}

// awaitPid reads the process id of a command, which runc may write only when
// the command has begun to talk: a signal that comes then must not be lost.
func awaitPid(running context.Context, path string) (int, error) {
	for {
		pid, err := readPid(path)
		if err == nil {
			return pid, nil
		}
		select {
		case <-running.Done():
			return 0, err
		case <-time.After(time.Millisecond):
		}
	}
}

func (d *Driver) writeProcess(dir, instance string, w runtime.Workload, c runtime.Cmd, size [2]uint16) error {
	im, err := runtime.ReadImage(d.cfg.Images, w.Image)
	if err != nil && m3o.KindOf(err) != m3o.NotFound { // its blobs may be pruned while it runs
		return err
	}
	uid, err := d.users.id(w.App)
	if err != nil {
		return err
	}
	p := bundle{id: instance, w: w, image: im, uid: uid}.process(c.Args, c.Env)
	if c.Resize != nil {
		p.Terminal, p.ConsoleSize = true, consoleSize(size)
	}
	b, err := json.Marshal(p)
	if err != nil {
		return fmt.Errorf("encode process: %w", err)
	}
	if err := os.WriteFile(filepath.Join(dir, "process.json"), b, 0o600); err != nil {
		return fmt.Errorf("exec: %w", err)
	}
	return nil
}

// feed gives the reading end of a pipe that r is copied to. A read of r that
// is pending when the command has ended stays pending: nobody can interrupt it.
func feed(r io.Reader) (*os.File, error) {
	if r == nil {
		return os.Open(os.DevNull)
	}
	pr, pw, err := os.Pipe()
	if err != nil {
		return nil, fmt.Errorf("make pipe: %w", err)
	}
	go func() {
		_, _ = io.Copy(pw, r) // EPIPE when the command has ended
		_ = pw.Close()
	}()
	return pr, nil
}

// connectTerminal gives cmd a terminal whose other end c is connected to.
// finish, called when cmd has ended, waits for the last output.
func connectTerminal(cmd *exec.Cmd, c runtime.Cmd, size [2]uint16) (finish func(), err error) {
	master, slave, err := pty.Open()
	if err != nil {
		return nil, err
	}
	cmd.Stdin, cmd.Stdout, cmd.Stderr = slave, slave, slave
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true, Setctty: true}
	pty.Resize(master, size[0], size[1])
	done := attach(master, c)
	return func() {
		_ = slave.Close()
		done()
	}, nil
}

// sizeWait is how long the first size is waited for.
const sizeWait = time.Second

// firstSize is the size a command's terminal begins with: it could ask for it
// before a change of size reaches it.
func firstSize(ctx context.Context, c runtime.Cmd) (size [2]uint16) {
	if c.Resize == nil {
		return size
	}
	select {
	case size = <-c.Resize:
	case <-ctx.Done():
	case <-time.After(sizeWait):
	}
	return size
}

func consoleSize(s [2]uint16) *specs.Box { return &specs.Box{Width: uint(s[0]), Height: uint(s[1])} }

// attach connects c to a terminal's master. The function it returns waits for
// the last output, which has ended when the last process left the terminal,
// and closes it.
func attach(master *os.File, c runtime.Cmd) (finish func()) {
	var all sync.WaitGroup
	end := make(chan struct{})
	all.Go(func() {
		for {
			select {
			case s, ok := <-c.Resize:
				if !ok {
					return
				}
				pty.Resize(master, s[0], s[1])
			case <-end:
				return
			}
		}
	})
	out := make(chan struct{})
	all.Go(func() {
		defer close(out)
		w := c.Out
		if w == nil {
			w = io.Discard
		}
		_, _ = io.Copy(w, master) // EIO is how a terminal says the end
	})
	if c.In != nil {
		go func() { _, _ = io.Copy(master, c.In) }() // see feed
	}
	return func() {
		close(end)
		select {
		case <-out:
		case <-time.After(lastOutput):
		}
		_ = master.Close()
		all.Wait()
	}
}

// notRun is how runc says that it cannot execute a program.
var notRun = regexp.MustCompile(`exec: \\?"[^"]*": (executable file not found|stat .*: no such file|is a directory|permission denied)`)

// Run is runtime.Driver's. When ctx ends the command has a short grace period.
func (d *Driver) Run(ctx context.Context, w runtime.Workload, c runtime.Cmd) (exit int, err error) {
	if err := w.Validate(); err != nil {
		return -1, err
	}
	w.Args = firstOf(c.Args, w.Args)
	if err := (*containers)(d).Check(ctx, w); err != nil {
		return -1, err
	}
	id := runtime.NewID(runtime.Ref{App: w.App, Process: "run", Release: w.Release})
	l := launch{env: c.Env, size: firstSize(ctx, c)}
	var ends oneOff
	if c.Resize != nil {
		l.console, err = ends.listen(filepath.Join(d.cfg.Run, ".tty-"+rand.Text()))
	} else {
		l.stdio, err = ends.pipes(c)
	}
	if err != nil {
		return -1, err
	}
	h, err := d.launch(ctx, id, w, l)
	for _, f := range l.stdio {
		if f != nil {
			_ = f.Close() // the shim has it
		}
	}
	if err != nil {
		ends.abandon()
		if notRun.MatchString(err.Error()) {
			return -1, &m3o.Error{Kind: m3o.Invalid, Msg: fmt.Sprintf("cannot run %s: there is no such program in the image", w.Args[0]),
				Hint: "the image may hold nothing but the app: it needs no shell", Err: err}
		}
		return -1, fmt.Errorf("launch: %w", err)
	}
	defer func() {
		cctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), createTime)
		defer cancel()
		err = errors.Join(err, h.Close(), d.clear(cctx, id))
	}()
	finish, err := ends.start(c)
	if err != nil {
		return -1, errors.Join(err, h.Signal(true))
	}
	defer c.PassSignals(h.send)()
	e, err := h.Wait(ctx)
	if err != nil {
		e = d.end(h, cmp.Or(w.Grace, oneOffGrace))
	}
	finish()
	if err != nil {
		return -1, err
	}
	if e.OOM && c.Err != nil {
		_, _ = fmt.Fprintf(c.Err, "m3o: the command ran out of memory: it may use %d MB\n", cmp.Or(w.MemoryBytes, runtime.DefaultMemoryBytes)>>20)
	}
	return e.Code, nil
}

// end ends a one-off whose caller left.
func (d *Driver) end(h *handle, grace time.Duration) runtime.Exit {
	for _, kill := range []bool{false, true} {
		if err := h.Signal(kill); err != nil {
			d.log.Warn("cannot signal a one-off", "instance", h.id, "err", err)
		}
		ctx, cancel := context.WithTimeout(context.Background(), grace)
		e, err := h.Wait(ctx)
		cancel()
		if err == nil {
			return e
		}
	}
	return runtime.Exit{Code: 128 + int(unix.SIGKILL)}
}

// oneOff holds our ends of what a one-off command is connected to.
type oneOff struct {
	readers  [2]*os.File
	listener *net.UnixListener
}

func (o *oneOff) pipes(c runtime.Cmd) (stdio [3]*os.File, err error) {
	for i := range o.readers {
		if o.readers[i], stdio[i+1], err = os.Pipe(); err != nil {
			return stdio, fmt.Errorf("make pipe: %w", err)
		}
	}
	stdio[0], err = feed(c.In)
	return stdio, err
}

func (o *oneOff) listen(path string) (string, error) {
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		return "", fmt.Errorf("listen for terminal: %w", err)
	}
	o.listener = l
	return path, nil
}

func (o *oneOff) abandon() {
	for _, r := range o.readers {
		if r != nil {
			_ = r.Close()
		}
	}
	if o.listener != nil {
		_ = o.listener.Close()
	}
}

// start copies output until finish, called when the command has ended, has
// waited for the last of it.
func (o *oneOff) start(c runtime.Cmd) (finish func(), err error) {
	if o.listener != nil {
		defer o.abandon()
		master, err := o.terminal()
		if err != nil {
			return nil, err
		}
		return attach(master, c), nil
	}
	var all sync.WaitGroup
	for i, w := range []io.Writer{c.Out, c.Err} {
		if w == nil {
			w = io.Discard
		}
		all.Go(func() {
			_, _ = io.Copy(w, o.readers[i])
			_, _ = io.Copy(io.Discard, o.readers[i]) // w failed; the command must not block
		})
	}
	return func() {
		for _, r := range o.readers {
			_ = r.SetReadDeadline(time.Now().Add(lastOutput))
		}
		all.Wait()
		o.abandon()
	}, nil
}

// terminal receives the master runc sent: an SCM_RIGHTS message, see
// https://github.com/opencontainers/runc/blob/main/docs/terminals.md.
func (o *oneOff) terminal() (*os.File, error) {
	if err := o.listener.SetDeadline(time.Now().Add(createTime)); err != nil {
		return nil, fmt.Errorf("receive terminal: %w", err)
	}
	conn, err := o.listener.AcceptUnix()
	if err != nil {
		return nil, fmt.Errorf("receive terminal: %w", err)
	}
	defer conn.Close() //nolint:errcheck // read from only
	name, oob := make([]byte, 4096), make([]byte, unix.CmsgSpace(4))
	_, n, _, _, err := conn.ReadMsgUnix(name, oob)
	if err != nil {
		return nil, fmt.Errorf("receive terminal: %w", err)
	}
	msgs, err := unix.ParseSocketControlMessage(oob[:n])
	if err != nil || len(msgs) != 1 {
		return nil, fmt.Errorf("receive terminal: %d messages: %w", len(msgs), err)
	}
	fds, err := unix.ParseUnixRights(&msgs[0])
	if err != nil || len(fds) != 1 {
		return nil, fmt.Errorf("receive terminal: %d descriptors: %w", len(fds), err)
	}
	if err := unix.SetNonblock(fds[0], true); err != nil {
		return nil, fmt.Errorf("receive terminal: %w", err)
	}
	return os.NewFile(uintptr(fds[0]), "terminal"), nil
}
