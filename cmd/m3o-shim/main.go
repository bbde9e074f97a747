//go:build linux

// Command m3o-shim looks after one container, and outlives the daemon that
// started it: it mounts the root file system, has the OCI runtime create the
// container, owns the pipes of its output and the log file they end in, and
// leaves the exit status behind. There is one shim an instance, and its memory
// follows the size of its binary, so it imports next to nothing, and nothing
// of the project: what it and runtime/oci agree on is written here.
//
//	fd 3    a pipe: "ok <pid of the container's init>\n" once created, else "error <text>\n"
//	fd 4    bundle/lock, flocked by who started us: the lock goes when we do
//	bundle/shim.pid    our pid, written first
//	bundle/pid         the container's init
//	bundle/exit.json   {"code":0,"signal":0,"oom":false,"at":"…"}, once it ended and its log is complete
//	bundle/shim.log    what could not be told to anybody else
//
// The daemon starts the container ("runc start") when its network is there.
// Killing the shim makes the container end at its next write, of SIGPIPE; who
// finds the lock free without exit.json kills what is left.
package main

import (
	"errors"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	goruntime "runtime"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

type options struct {
	runc, root, bundle, id string
	lower                  string // of the overlay that becomes bundle/rootfs
	cgroup                 string // directory to move to before anything else; "": we were born where we belong
	cgroups                string // directories to move to, colon separated, once the app has settled
	memory                 string // the container's memory cgroup directory
	log                    string // "": the container gets fds 5, 6 and 7 as they are
	console                string // socket to send the terminal to
}

const (
	readyFD = 3
	lockFD  = 4
	stdioFD = 5
)

func main() {
	var o options
	flag.StringVar(&o.runc, "runc", "", "the OCI runtime")
	flag.StringVar(&o.root, "root", "", "its state directory")
	flag.StringVar(&o.bundle, "bundle", "", "bundle directory")
	flag.StringVar(&o.id, "id", "", "container id")
	flag.StringVar(&o.lower, "lower", "", "overlay lower directories, top first")
	flag.StringVar(&o.cgroup, "cgroup", "", "cgroup directory to join at once")
	flag.StringVar(&o.cgroups, "cgroups", "", "cgroup directories to join later")
	flag.StringVar(&o.memory, "memory", "", "memory cgroup directory of the container")
	flag.StringVar(&o.log, "log", "", "log file")
	flag.StringVar(&o.console, "console", "", "console socket")
	flag.Parse()

	// The mount namespace made below belongs to this thread alone, and runc
	// must be started from it.
	goruntime.LockOSThread()
	// SIGTERM is for the container; a stray one must not lose its exit status.
	signal.Ignore(syscall.SIGTERM, syscall.SIGINT, syscall.SIGHUP, syscall.SIGPIPE)
	ready := os.NewFile(readyFD, "ready")
	for fd := readyFD; fd < stdioFD+3; fd++ {
		unix.CloseOnExec(fd)
	}
	if err := run(o, ready); err != nil {
		_, _ = fmt.Fprintf(ready, "error %s\n", strings.ReplaceAll(err.Error(), "\n", " "))
		fmt.Fprintln(os.Stderr, "m3o-shim:", err)
		os.Exit(1)
	}
}

func run(o options, ready *os.File) error {
	if err := os.WriteFile(filepath.Join(o.bundle, "shim.pid"), strconv.AppendInt(nil, int64(os.Getpid()), 10), 0o600); err != nil {
		return fmt.Errorf("write pid: %w", err)
	}
	// One group is enough to find us, and the runc we start, by.
	if err := join(o.cgroup); err != nil {
		return err
	}
	if err := unix.Prctl(unix.PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0); err != nil {
		return fmt.Errorf("become subreaper: %w", err)
	}
	status, err := reserveStatus(o.bundle)
	if err != nil {
		return err
	}
	if err := mountRoot(o); err != nil {
		return err
	}
	var logs *logger
	stdio := [3]*os.File{}
	if o.log != "" {
		if logs, err = openLog(o.log); err != nil {
			return err
		}
		if stdio, err = logs.pipes(); err != nil {
			return err
		}
	} else if o.console == "" {
		for i := range stdio {
			stdio[i] = os.NewFile(uintptr(stdioFD+i), "stdio")
		}
	}
	pid, err := create(o, stdio)
	for _, f := range stdio {
		if f != nil {
			_ = f.Close()
		}
	}
	if err != nil {
		return err
	}
	// From here on there is a container: whatever happens it is waited for.
	if _, err := fmt.Fprintf(ready, "ok %d\n", pid); err != nil {
		// Who started us is gone and will not start the container.
		_ = unix.Kill(pid, unix.SIGKILL)
	}
	_ = ready.Close()
	time.AfterFunc(settled, func() { joinAll(o.cgroups) })
	e := wait(pid)
	e.oom = oomKilled(o.memory)
	if logs != nil {
		logs.finish()
	}
	err = status.write(e)
	return errors.Join(err, remove(o))
}

// settled is when the app has certainly started. To move a process between
// cgroups the kernel stops every fork and exec of the machine for some 10 ms,
// and an app that starts does both.
const settled = time.Second

func joinAll(dirs string) {
	for dir := range strings.SplitSeq(dirs, ":") {
		if err := join(dir); err != nil {
			fmt.Fprintln(os.Stderr, "m3o-shim:", err) // we live on in the daemon's
		}
	}
}

// join moves the shim to a cgroup.
func join(dir string) error {
	if dir == "" {
		return nil
	}
	if err := os.WriteFile(filepath.Join(dir, "cgroup.procs"), strconv.AppendInt(nil, int64(os.Getpid()), 10), 0); err != nil {
		return fmt.Errorf("join cgroup: %w", err)
	}
	return nil
}

// mountRoot mounts the container's root, read-only, where nobody else sees it:
// when the shim and the container are gone, so is the mount, whatever killed them.
func mountRoot(o options) error {
	if err := unix.Unshare(unix.CLONE_NEWNS); err != nil {
		return fmt.Errorf("make mount namespace: %w", err)
	}
	// Slave, not private: an unmount on the host must reach this namespace,
	// or it would keep other people's file systems busy.
	if err := unix.Mount("", "/", "", unix.MS_SLAVE|unix.MS_REC, ""); err != nil {
		return fmt.Errorf("make mounts slaves: %w", err)
	}
	dir := filepath.Join(o.bundle, "rootfs")
	if err := os.Mkdir(dir, 0o755); err != nil && !errors.Is(err, os.ErrExist) {
		return fmt.Errorf("make root directory: %w", err)
	}
	if err := unix.Mount("overlay", dir, "overlay", unix.MS_RDONLY|unix.MS_NODEV|unix.MS_NOSUID, "lowerdir="+o.lower); err != nil {
		return fmt.Errorf("mount root file system: %w", err)
	}
	return nil
}

func create(o options, stdio [3]*os.File) (pid int, err error) {
	pidFile := filepath.Join(o.bundle, "pid")
	args := []string{"create", "--bundle", o.bundle, "--pid-file", pidFile}
	if o.console != "" {
		args = append(args, "--console-socket", o.console)
	}
	cmd := runc(o, append(args, o.id)...)
	// A nil *os.File in a non-nil interface is not a nil interface.
	if stdio[0] != nil {
		cmd.Stdin = stdio[0]
	}
	if stdio[1] != nil {
		cmd.Stdout, cmd.Stderr = stdio[1], stdio[2]
	}
	if err := cmd.Run(); err != nil {
		return 0, fmt.Errorf("runc create: %s", lastLog(o, err))
	}
	b, err := os.ReadFile(pidFile)
	if err != nil {
		return 0, fmt.Errorf("read pid: %w", err)
	}
	if pid, err = strconv.Atoi(strings.TrimSpace(string(b))); err != nil {
		return 0, fmt.Errorf("read pid: %w", err)
	}
	return pid, nil
}

func runc(o options, args ...string) *exec.Cmd {
	cmd := exec.Command(o.runc, append([]string{"--root", o.root, "--log", filepath.Join(o.bundle, "runc.log")}, args...)...)
	cmd.Dir = "/"
	// The daemon has made this environment for runc: nothing that tunes a Go
	// program (GOMAXPROCS and GOMEMLIMIT make runc several times slower).
	return cmd
}

// lastLog is what runc said last, else err.
func lastLog(o options, err error) string {
	b, _ := os.ReadFile(filepath.Join(o.bundle, "runc.log"))
	if s := strings.TrimSpace(string(b)); s != "" {
		return s[strings.LastIndexByte(s, '\n')+1:]
	}
	return err.Error()
}

type exit struct {
	code, signal int
	oom          bool
	at           time.Time
}

// wait reaps children until the container's init is one of them.
func wait(pid int) exit {
	for {
		var ws syscall.WaitStatus
		got, err := syscall.Wait4(-1, &ws, 0, nil)
		switch {
		case errors.Is(err, syscall.EINTR):
		case err != nil: // no child left: cannot be, but must not spin
			return exit{code: 255, at: time.Now()}
		case got == pid && ws.Signaled():
			return exit{code: 128 + int(ws.Signal()), signal: int(ws.Signal()), at: time.Now()}
		case got == pid:
			return exit{code: ws.ExitStatus(), at: time.Now()}
		}
	}
}

// oomKilled asks the memory cgroup whether the kernel killed anything in it:
// memory.oom_control (cgroup v1) and memory.events (v2) both have a line
// "oom_kill N".
func oomKilled(dir string) bool {
	for _, name := range []string{"memory.events", "memory.oom_control"} {
		if b, err := os.ReadFile(filepath.Join(dir, name)); err == nil {
			return oomKills(b)
		}
	}
	return false
}

func oomKills(b []byte) bool {
	for line := range strings.Lines(string(b)) {
		if n, ok := strings.CutPrefix(line, "oom_kill "); ok {
			return strings.TrimSpace(n) != "0"
		}
	}
	return false
}

// remove takes the ended container out of runc's state. Plain delete first:
// --force sleeps 100 ms.
func remove(o options) error {
	if runc(o, "delete", o.id).Run() == nil {
		return nil
	}
	if err := runc(o, "delete", "--force", o.id).Run(); err != nil {
		return fmt.Errorf("runc delete: %s", lastLog(o, err))
	}
	return nil
}

// A status is the file exit.json to be. Its blocks are allocated while there
// is room, so that a full disk cannot swallow an exit status. It is not synced:
// no container outlives what would lose it.
type status struct {
	bundle string
	f      *os.File
}

const statusSize = 256

func reserveStatus(bundle string) (*status, error) {
	f, err := os.OpenFile(filepath.Join(bundle, "exit.next"), os.O_CREATE|os.O_RDWR|os.O_TRUNC, 0o600)
	if err != nil {
		return nil, fmt.Errorf("reserve exit status: %w", err)
	}
	if _, err := f.Write([]byte(strings.Repeat(" ", statusSize))); err != nil {
		return nil, fmt.Errorf("reserve exit status: %w", err)
	}
	return &status{bundle, f}, nil
}

func (s *status) write(e exit) error {
	b := fmt.Appendf(nil, `{"code":%d,"signal":%d,"oom":%t,"at":%q}`, e.code, e.signal, e.oom, e.at.UTC().Format(time.RFC3339Nano))
	if _, err := s.f.WriteAt(b, 0); err != nil {
		return fmt.Errorf("write exit status: %w", err)
	}
	if err := os.Rename(s.f.Name(), filepath.Join(s.bundle, "exit.json")); err != nil {
		return fmt.Errorf("write exit status: %w", err)
	}
	return nil
}
