//go:build linux

package oci

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/m3o/m3o/runtime"
)

// A handle is a shim and the container's first process, by descriptors: a
// number could come to mean another process.
type handle struct {
	d        *Driver
	id       string
	addr     string
	pid      int      // the container's init
	init     *os.File // pidfd of it
	shim     *os.File // pidfd
	shimPid  int
	ended    chan struct{} // closed once exit is known
	exit     runtime.Exit
	watching sync.WaitGroup
	once     sync.Once
}

func newHandle(d *Driver, id string, w runtime.Workload, shim, pid int) (*handle, error) {
	h := &handle{d: d, id: id, pid: pid, shimPid: shim, ended: make(chan struct{})}
	h.setAddr(w)
	var err error
	if h.shim, err = pidfd(shim); err != nil {
		return nil, fmt.Errorf("open shim: %w", err)
	}
	// The init may have ended and been reaped by the shim meanwhile; then
	// there is nothing to signal.
	if h.init, err = pidfd(pid); err != nil && !errors.Is(err, unix.ESRCH) {
		return nil, errors.Join(fmt.Errorf("open container: %w", err), h.shim.Close())
	}
	if h.init != nil && !inCgroup(pid, id) {
		_ = h.init.Close()
		h.init = nil
	}
	h.watching.Go(h.watch)
	return h, nil
}

func endedHandle(d *Driver, id string, w runtime.Workload, e runtime.Exit) *handle {
	h := &handle{d: d, id: id, exit: e, ended: make(chan struct{})}
	h.setAddr(w)
	close(h.ended)
	return h
}

func (h *handle) setAddr(w runtime.Workload) {
	if ip, err := h.d.address(h.id); err == nil && w.Port != 0 {
		h.addr = netip.AddrPortFrom(ip, uint16(w.Port)).String()
	}
}

// inCgroup guards against a process id that was given to another process.
func inCgroup(pid int, id string) bool {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/cgroup", pid))
	return err == nil && strings.Contains(string(b), "/"+id+"\n")
}

// pidfd opens a process so that its end can be awaited without a thread.
func pidfd(pid int) (*os.File, error) {
	fd, err := unix.PidfdOpen(pid, unix.PIDFD_NONBLOCK)
	if err != nil {
		return nil, err
	}
	return os.NewFile(uintptr(fd), "pidfd"), nil
}

// watch waits for the shim to end, which it does when all is written.
func (h *handle) watch() {
	rc, err := h.shim.SyscallConn()
	if err != nil {
		return // closed already
	}
	err = rc.Read(func(fd uintptr) bool {
		p := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}
		n, err := unix.Poll(p, 0)
		return n > 0 || err != nil && !errors.Is(err, unix.EINTR)
	})
	if err != nil {
		return // closed: nobody waits any more
	}
	_, _ = unix.Wait4(h.shimPid, nil, unix.WNOHANG, nil) // a child of ours would stay a zombie; others fail
	h.exit, err = readExit(h.d.bundle(h.id))
	if err != nil {
		// The shim was killed. The app would die at its next line; it must
		// not be there when it is said to have exited.
		ctx, cancel := context.WithTimeout(context.Background(), createTime)
		defer cancel()
		if err := h.d.cgroups.kill(ctx, h.id); err != nil {
			h.d.log.Error("cannot end an instance that lost its shim", "instance", h.id, "err", err)
		}
		h.exit = runtime.Exit{Code: 128 + int(unix.SIGKILL), Signal: int(unix.SIGKILL), At: time.Now()}
	}
	close(h.ended)
}

func readExit(dir string) (runtime.Exit, error) {
	b, err := os.ReadFile(filepath.Join(dir, "exit.json"))
	if err != nil {
		return runtime.Exit{}, err
	}
	var e runtime.Exit
	if err := json.Unmarshal(b, &e); err != nil {
		return runtime.Exit{}, fmt.Errorf("exit status: %w", err)
	}
	return e, nil
}

func (h *handle) Addr() string { return h.addr }

func (h *handle) Wait(ctx context.Context) (runtime.Exit, error) {
	select {
	case <-h.ended:
		return h.exit, nil
	default:
	}
	select {
	case <-h.ended:
		return h.exit, nil
	case <-ctx.Done():
		return runtime.Exit{}, ctx.Err()
	}
}

// Signal sends SIGTERM to the container's first process, or kills that: its
// PID namespace goes with it. A program that is process 1 and has no handler
// for SIGTERM does not see it.
func (h *handle) Signal(kill bool) error {
	if kill {
		return h.send(unix.SIGKILL)
	}
	return h.send(unix.SIGTERM)
}

func (h *handle) send(sig unix.Signal) error {
	if h.init == nil {
		return nil
	}
	rc, err := h.init.SyscallConn()
	if err != nil {
		return fmt.Errorf("signal: %w", err)
	}
	var serr error
	if err := rc.Control(func(fd uintptr) { serr = unix.PidfdSendSignal(int(fd), sig, nil, 0) }); err != nil {
		return fmt.Errorf("signal: %w", err)
	}
	if serr != nil && !errors.Is(serr, unix.ESRCH) {
		return fmt.Errorf("signal: %w", serr)
	}
	return nil
}

func (h *handle) Listening() ([]netip.AddrPort, error) {
	var all []netip.AddrPort
	for _, name := range []string{"tcp", "tcp6"} {
		f, err := os.Open(fmt.Sprintf("/proc/%d/net/%s", h.pid, name))
		if err != nil {
			return all, fmt.Errorf("list sockets: %w", err)
		}
		some, err := runtime.ReadListeners(f, nil)
		_ = f.Close()
		if err != nil {
			return all, err
		}
		all = append(all, some...)
	}
	return all, nil
}

func (h *handle) Close() error {
	h.once.Do(func() {
		if h.shim != nil {
			_ = h.shim.Close()
		}
		if h.init != nil {
			_ = h.init.Close()
		}
	})
	h.watching.Wait()
	return nil
}
