//go:build linux

package oci

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/m3o/m3o"
	"github.com/m3o/m3o/runtime"
)

// containers is the driver as the reconciler's host.
type containers Driver

var _ runtime.Host = (*containers)(nil)

func (c *containers) driver() *Driver { return (*Driver)(c) }

// Check is runtime.Host's.
func (c *containers) Check(_ context.Context, w runtime.Workload) error {
	im, err := runtime.ReadImage(c.cfg.Images, w.Image)
	if err != nil {
		return err
	}
	if len(w.Args) == 0 && len(im.Args) == 0 {
		return m3o.Errorf(m3o.Invalid, "process type %s has no command, and neither has its image", w.Process)
	}
	return nil
}

// Launch is runtime.Host's.
func (c *containers) Launch(ctx context.Context, id string, w runtime.Workload) (runtime.Handle, error) {
	d := c.driver()
	log, err := d.logs.Path(w.Ref, id)
	if err != nil {
		return nil, err
	}
	h, err := d.launch(ctx, id, w, launch{log: log})
	if err != nil {
		return nil, err // never a nil *handle as a Handle
	}
	return h, nil
}

// A launch is what differs between an instance and a one-off.
type launch struct {
	log     string      // where the output goes, or
	stdio   [3]*os.File // what it is connected to, or
	console string      // the socket its terminal, of that size, is sent to
	size    [2]uint16
	env     []string // beyond the workload's
}

// createTime bounds the making of a container, which takes some 50 ms.
const createTime = 30 * time.Second

func (d *Driver) launch(ctx context.Context, id string, w runtime.Workload, l launch) (_ *handle, err error) {
	if err := d.clear(ctx, id); err != nil {
		return nil, fmt.Errorf("remove what was left: %w", err)
	}
	im, err := runtime.ReadImage(d.cfg.Images, w.Image)
	if err != nil {
		return nil, err
	}
	d.layers.inUse.RLock()
	defer d.layers.inUse.RUnlock()
	lower, err := d.layers.lower(ctx, im)
	if err != nil {
		return nil, err
	}
	uid, err := d.users.id(w.App)
	if err != nil {
		return nil, err
	}
	// From here on there is something to remove, whatever goes wrong, even
	// if ctx is what goes wrong.
	var h *handle
	defer func() {
		if err == nil {
			return
		}
		cctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), createTime)
		defer cancel()
		err = errors.Join(err, d.clear(cctx, id))
		if h != nil {
			_ = h.Close()
		}
	}()
	dir := d.bundle(id)
	if err := os.Mkdir(dir, 0o711); err != nil {
		return nil, fmt.Errorf("make bundle: %w", err)
	}
	ip, err := d.addresses.take()
	if err != nil {
		return nil, err
	}
	if err := os.WriteFile(filepath.Join(dir, "address"), []byte(ip.String()), 0o600); err != nil {
		d.addresses.free(ip)
		return nil, fmt.Errorf("write bundle: %w", err)
	}
	b := bundle{dir: dir, id: id, w: w, image: im, args: firstOf(w.Args, im.Args), env: l.env, uid: uid, root: d.root,
		addr: ip, gateway: d.net.gateway, cgroup: d.cgroups.path(id), swap: d.swap, terminal: l.console != "", size: l.size}
	if err := b.write(); err != nil {
		return nil, err
	}
	if len(w.Mounts) > 0 {
		if lower, err = mountPoints(dir, w.Mounts, uid, lower); err != nil {
			return nil, err
		}
	}
	shim, pid, err := d.spawn(ctx, id, lower, l)
	if err != nil {
		return nil, err
	}
	h, err = newHandle(d, id, w, shim, pid)
	if err != nil {
		return nil, err
	}
	if err := d.net.add(id, pid, ip); err != nil {
		return nil, fmt.Errorf("set up network: %w", err)
	}
	if err := d.links.join(id, w.App, ip); err != nil {
		return nil, err
	}
	d.joined(ctx)
	if err := d.runc(ctx, id, "start", id); err != nil {
		return nil, err
	}
	if err := os.WriteFile(filepath.Join(dir, "started"), nil, 0o600); err != nil {
		return nil, fmt.Errorf("write bundle: %w", err)
	}
	return h, nil
}

func firstOf(all ...[]string) []string {
	for _, a := range all {
		if len(a) > 0 {
			return a
		}
	}
	return nil
}

// spawn starts a shim and waits until it has had the container created.
func (d *Driver) spawn(ctx context.Context, id, lower string, l launch) (shim, pid int, err error) {
	born, others, err := d.cgroups.shim(id)
	if err != nil {
		return 0, 0, err
	}
	dir := d.bundle(id)
	// Locked before the shim exists and handed to it: there is no moment at
	// which it lives and does not hold the lock.
	lock, err := os.OpenFile(filepath.Join(dir, "lock"), os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return 0, 0, fmt.Errorf("make lock: %w", err)
	}
	defer lock.Close() //nolint:errcheck // the shim has it
	if err := unix.Flock(int(lock.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		return 0, 0, fmt.Errorf("take lock: %w", err)
	}
	errs, err := os.OpenFile(filepath.Join(dir, "shim.log"), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		return 0, 0, fmt.Errorf("make shim log: %w", err)
	}
	defer errs.Close() //nolint:errcheck // the shim has it
	ready, w, err := os.Pipe()
	if err != nil {
		return 0, 0, fmt.Errorf("make pipe: %w", err)
	}
	defer ready.Close() //nolint:errcheck // read only
	first := ""
	if born == "" {
		first, others = others[0], others[1:]
	}
	cmd := exec.Command(d.cfg.Shim, "-runc", d.cfg.Runc, "-root", d.cfg.Run, "-bundle", dir, "-id", id, "-lower", lower,
		"-cgroup", first, "-cgroups", strings.Join(others, ":"), "-memory", d.cgroups.memory(id), "-log", l.log, "-console", l.console)
	cmd.Env = cleanEnv
	cmd.Dir = "/"
	cmd.Stderr = errs
	cmd.ExtraFiles = []*os.File{w, lock}
	if l.log == "" && l.console == "" {
		cmd.ExtraFiles = append(cmd.ExtraFiles, l.stdio[:]...)
	}
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true} // no terminal's signals
	if born != "" {
		group, err := os.Open(born)
		if err != nil {
			return 0, 0, fmt.Errorf("open cgroup: %w", err)
		}
		defer group.Close() //nolint:errcheck // the shim is in it
		cmd.SysProcAttr.UseCgroupFD, cmd.SysProcAttr.CgroupFD = true, int(group.Fd())
	}
	err = cmd.Start()
	_ = w.Close()
	if err != nil {
		return 0, 0, fmt.Errorf("start shim: %w", err)
	}
	child := cmd.Process.Pid
	_ = cmd.Process.Release() // its handle reaps it
	defer func() {
		if err != nil {
			_ = unix.Kill(child, unix.SIGKILL)
			reap(child)
		}
	}()
	if err := ready.SetReadDeadline(time.Now().Add(createTime)); err != nil {
		return 0, 0, fmt.Errorf("wait for shim: %w", err)
	}
	defer context.AfterFunc(ctx, func() { _ = ready.SetReadDeadline(time.Now()) })()
	line, rerr := bufio.NewReader(ready).ReadString('\n')
	what, rest, _ := strings.Cut(strings.TrimSpace(line), " ")
	switch {
	case ctx.Err() != nil:
		return 0, 0, ctx.Err()
	case what == "error":
		return 0, 0, errors.New(rest)
	case errors.Is(rerr, os.ErrDeadlineExceeded):
		return 0, 0, fmt.Errorf("the container was not created within %v", createTime)
	case what != "ok":
		return 0, 0, fmt.Errorf("the shim ended before the container was created")
	}
	if pid, err = strconv.Atoi(rest); err != nil {
		return 0, 0, fmt.Errorf("the shim answered %q", line)
	}
	return child, pid, nil
}

// cleanEnv is all that shims and runc get of our environment: GOMAXPROCS and
// GOMEMLIMIT, meant for the daemon, make runc several times slower.
var cleanEnv = []string{"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"}

// reap takes the exit status of a shim that has ended, or is about to, if it
// is our child: it would stay a zombie.
func reap(pid int) {
	for range 100 {
		if got, err := unix.Wait4(pid, nil, unix.WNOHANG, nil); got == pid || err != nil && !errors.Is(err, unix.EINTR) {
			return
		}
		time.Sleep(time.Millisecond)
	}
}

// reapEnded does so for the shim of a bundle whose lock is free.
func (d *Driver) reapEnded(id string) {
	if pid, err := readPid(filepath.Join(d.bundle(id), "shim.pid")); err == nil {
		reap(pid)
	}
}

// runc runs a command of it.
func (d *Driver) runc(ctx context.Context, id string, args ...string) error {
	log := filepath.Join(d.bundle(id), "runc.log")
	cmd := exec.CommandContext(ctx, d.cfg.Runc, append([]string{"--root", d.cfg.Run, "--log", log}, args...)...)
	cmd.Env = cleanEnv
	cmd.Dir = "/"
	// runc's children may keep an output pipe open.
	cmd.WaitDelay = time.Second
	out, err := cmd.CombinedOutput()
	if err == nil {
		return nil
	}
	if ctx.Err() != nil {
		return ctx.Err()
	}
	if b, rerr := os.ReadFile(log); rerr == nil && len(bytes.TrimSpace(b)) > 0 {
		out = b
	}
	lines := strings.Split(strings.TrimSpace(string(out)), "\n")
	return fmt.Errorf("runc %s: %w: %s", args[0], err, lines[len(lines)-1])
}

func (d *Driver) bundle(id string) string { return filepath.Join(d.cfg.Dir, "bundles", id) }

func (d *Driver) address(id string) (netip.Addr, error) {
	b, err := os.ReadFile(filepath.Join(d.bundle(id), "address"))
	if err != nil {
		return netip.Addr{}, err
	}
	return netip.ParseAddr(string(b))
}

// clear ends an instance if it runs and removes all it has, whatever state it
// is in. Every step may be repeated; the bundle, by which we know of it, goes last.
func (d *Driver) clear(ctx context.Context, id string) error {
	dir := d.bundle(id)
	if err := d.killShim(ctx, id); err != nil {
		return err
	}
	if err := d.cgroups.kill(ctx, id); err != nil {
		return err
	}
	if exists(filepath.Join(d.cfg.Run, id)) {
		// runc may find its own state incomplete; then there is nothing it
		// could remove that the steps below do not.
		if err := d.runc(ctx, id, "delete", "--force", id); err != nil {
			d.log.Debug("runc cannot delete", "instance", id, "err", err)
		}
		if err := os.RemoveAll(filepath.Join(d.cfg.Run, id)); err != nil {
			return fmt.Errorf("remove runc state: %w", err)
		}
	}
	if err := d.net.remove(id); err != nil {
		return err
	}
	if err := d.cgroups.remove(id); err != nil {
		return err
	}
	if err := d.links.leave(id); err != nil {
		return err
	}
	if ip, err := d.address(id); err == nil {
		d.addresses.free(ip)
	}
	if err := os.RemoveAll(dir); err != nil {
		return fmt.Errorf("remove bundle: %w", err)
	}
	return nil
}

// killShim ends the shim of a bundle and returns when its lock is free.
func (d *Driver) killShim(ctx context.Context, id string) error {
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	for wait := time.Millisecond; ; wait = min(2*wait, 100*time.Millisecond) {
		held, err := d.held(id)
		if err != nil {
			return err
		}
		if !held {
			d.reapEnded(id)
			return nil
		}
		if pid, err := readPid(filepath.Join(d.bundle(id), "shim.pid")); err == nil {
			_ = unix.Kill(pid, unix.SIGKILL)
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("the shim of %s does not die", id)
		case <-time.After(wait):
		}
	}
}

// held is whether a shim holds the bundle's lock.
func (d *Driver) held(id string) (bool, error) {
	f, err := os.Open(filepath.Join(d.bundle(id), "lock"))
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil
	} else if err != nil {
		return false, fmt.Errorf("open lock: %w", err)
	}
	defer f.Close() //nolint:errcheck // also unlocks it
	err = unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
	if errors.Is(err, unix.EWOULDBLOCK) {
		return true, nil
	} else if err != nil {
		return false, fmt.Errorf("try lock: %w", err)
	}
	return false, nil
}

func readPid(path string) (int, error) {
	b, err := os.ReadFile(path)
	if err != nil {
		return 0, err
	}
	pid, err := strconv.Atoi(strings.TrimSpace(string(b)))
	if err == nil && pid <= 1 {
		err = fmt.Errorf("%d is no process of ours", pid)
	}
	return pid, err
}

// Attach is runtime.Host's.
func (c *containers) Attach(_ context.Context, id string, w runtime.Workload) (runtime.Handle, error) {
	d := c.driver()
	held, err := d.held(id)
	if err != nil {
		return nil, err
	}
	if !held {
		d.reapEnded(id)
		if e, err := readExit(d.bundle(id)); err == nil {
			return endedHandle(d, id, w, e), nil
		}
		return nil, nil
	}
	if !exists(filepath.Join(d.bundle(id), "started")) {
		return nil, nil // whoever was launching it is gone; Launch does it again
	}
	shim, err := readPid(filepath.Join(d.bundle(id), "shim.pid"))
	if err != nil {
		return nil, fmt.Errorf("attach: %w", err)
	}
	pid, err := readPid(filepath.Join(d.bundle(id), "pid"))
	if err != nil {
		return nil, fmt.Errorf("attach: %w", err)
	}
	h, err := newHandle(d, id, w, shim, pid)
	if err != nil {
		return nil, err
	}
	return h, nil
}

// Remove is runtime.Host's.
func (c *containers) Remove(ctx context.Context, id string) error { return c.driver().clear(ctx, id) }
