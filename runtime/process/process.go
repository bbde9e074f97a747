//go:build unix

// Package process runs instances as plain processes of the daemon's own user,
// UNISOLATED: they see the host's files, network and processes, have no limits,
// and can do whatever the user who runs the daemon can. It is for developing on
// a machine without root, with apps one wrote oneself, and for nothing else.
//
// Each instance listens on a free loopback port, in PORT. The image's layers
// are unpacked to a directory and the program is run from there; what it names
// by an absolute path at run time is the host's, not the image's. Instances end
// with the driver.
package process

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"iter"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/m3o/m3o"
	"github.com/m3o/m3o/runtime"
)

// Config says where a Driver keeps things.
type Config struct {
	Dir    string       // state: records, unpacked images, logs
	Images string       // an OCI image layout directory, read only
	Log    *slog.Logger // nil discards
}

// A Driver is a runtime.Driver. Open it, Serve it.
type Driver struct {
	*runtime.Reconciler
	cfg  Config
	log  *slog.Logger
	logs runtime.Logs

	unpacking sync.Mutex // one image at a time
	mu        sync.Mutex // guards live
	live      map[string]*handle
}

var (
	_ runtime.Driver    = (*Driver)(nil)
	_ runtime.Explainer = (*Driver)(nil)
	_ runtime.Host      = (*processes)(nil)
)

// Open reads what an earlier driver recorded; Serve, which must follow, ends
// what it left running and starts it anew.
func Open(cfg Config) (*Driver, error) {
	if !filepath.IsAbs(cfg.Dir) || !filepath.IsAbs(cfg.Images) {
		return nil, m3o.Errorf(m3o.Invalid, "the directories %q and %q are not both absolute", cfg.Dir, cfg.Images)
	}
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	d := &Driver{cfg: cfg, log: cfg.Log, logs: runtime.Logs{Dir: filepath.Join(cfg.Dir, "logs")}, live: map[string]*handle{}}
	for _, dir := range []string{"images", "pids", "logs"} {
		if err := os.MkdirAll(filepath.Join(cfg.Dir, dir), 0o700); err != nil {
			return nil, fmt.Errorf("make directory: %w", err)
		}
	}
	cfg.Log.Warn("apps run unisolated, as the user of this daemon: use this for development only")
	var err error
	d.Reconciler, err = runtime.NewReconciler(cfg.Dir, (*processes)(d), cfg.Log)
	return d, err
}

// endWithin bounds the end of all instances when the driver ends.
const endWithin = 5 * time.Second

// Serve keeps what runs as wanted until ctx ends, then ends every instance:
// without a shim nobody would know of them. What is wanted stays recorded.
func (d *Driver) Serve(ctx context.Context) error {
	err := d.Reconciler.Run(ctx)
	d.mu.Lock()
	var all []*handle
	for _, h := range d.live {
		all = append(all, h)
	}
	d.mu.Unlock()
	for _, h := range all {
		err = errors.Join(err, h.Signal(false))
	}
	wctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), endWithin)
	defer cancel()
	for _, h := range all {
		if _, werr := h.Wait(wctx); werr != nil {
			err = errors.Join(err, h.Signal(true))
		}
		<-h.ended
	}
	return err
}

// Shutdown removes every instance. It must not be called while Serve runs.
func (d *Driver) Shutdown(ctx context.Context) error { return d.StopAll(ctx) }

// Logs is runtime.Driver's.
func (d *Driver) Logs(ctx context.Context, r runtime.Ref, lines int, follow bool) iter.Seq2[runtime.Line, error] {
	return d.logs.Read(ctx, r, lines, follow)
}

// Exec is runtime.Driver's: another process beside the instance's.
func (d *Driver) Exec(ctx context.Context, instance string, c runtime.Cmd) (int, error) {
	w, h, err := d.Workload(instance)
	if err != nil {
		return -1, err
	}
	if len(c.Args) == 0 {
		return -1, m3o.Errorf(m3o.Invalid, "there is no command to run")
	}
	_, port, _ := net.SplitHostPort(h.Addr())
	return d.command(ctx, instance, w, port, c)
}

// Run is runtime.Driver's.
func (d *Driver) Run(ctx context.Context, w runtime.Workload, c runtime.Cmd) (int, error) {
	if err := w.Validate(); err != nil {
		return -1, err
	}
	return d.command(ctx, runtime.NewID(runtime.Ref{App: w.App, Process: "run", Release: w.Release}), w, "", c)
}

// lastOutput is how long the output of an ended command is waited for.
const lastOutput = 2 * time.Second

func (d *Driver) command(ctx context.Context, id string, w runtime.Workload, port string, c runtime.Cmd) (int, error) {
	if c.Resize != nil {
		return -1, m3o.Errorf(m3o.Invalid, "unisolated processes get no terminal")
	}
	if len(c.Args) > 0 {
		w.Args = c.Args
	}
	w.Env = append(append([]string(nil), w.Env...), c.Env...)
	cmd, err := d.prepare(ctx, id, w, port)
	if err != nil {
		return -1, err
	}
	cmd.Stdin, cmd.Stdout, cmd.Stderr = c.In, c.Out, c.Err
	cmd.WaitDelay = lastOutput
	if err := cmd.Start(); err != nil {
		return -1, fmt.Errorf("run command: %w", err)
	}
	stop := c.PassSignals(func(sig syscall.Signal) error { return syscall.Kill(-cmd.Process.Pid, sig) })
	err = cmd.Wait()
	stop()
	if ctx.Err() != nil {
		return -1, ctx.Err()
	}
	if e, ok := errors.AsType[*exec.ExitError](err); ok {
		return exitOf(e.ProcessState).Code, nil
	}
	if err != nil && !errors.Is(err, exec.ErrWaitDelay) {
		return -1, fmt.Errorf("run command: %w", err)
	}
	return 0, nil
}

// prepare makes the command of a workload, in a process group of its own.
func (d *Driver) prepare(ctx context.Context, id string, w runtime.Workload, port string) (*exec.Cmd, error) {
	im, err := runtime.ReadImage(d.cfg.Images, w.Image)
	if err != nil {
		return nil, err
	}
	root, err := d.unpacked(w.Image, im)
	if err != nil {
		return nil, err
	}
	args := w.Args
	if len(args) == 0 {
		args = im.Args
	}
	if len(args) == 0 {
		return nil, m3o.Errorf(m3o.Invalid, "process type %s has no command, and neither has its image", w.Process)
	}
	path, err := find(root, im, args[0])
	if err != nil {
		return nil, err
	}
	cmd := exec.CommandContext(ctx, path, args[1:]...)
	cmd.Args[0] = args[0]
	cmd.Dir = filepath.Join(root, im.WorkDir)
	if _, err := os.Stat(cmd.Dir); err != nil {
		cmd.Dir = root
	}
	cmd.Env = append([]string{"PATH=" + os.Getenv("PATH"), "HOME=" + os.TempDir()}, im.Env...)
	cmd.Env = append(cmd.Env, w.Env...)
	cmd.Env = append(cmd.Env, "M3O_INSTANCE="+id)
	if port != "" {
		cmd.Env = append(cmd.Env, "PORT="+port)
	}
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	cmd.Cancel = func() error { return syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL) }
	return cmd, nil
}

// find resolves a command in the unpacked image: its program must be the
// image's, not one of the host that happens to have the same name.
func find(root string, im runtime.Image, name string) (string, error) {
	var tries []string
	switch {
	case filepath.IsAbs(name):
		tries = []string{name}
	case strings.Contains(name, "/"):
		tries = []string{filepath.Join(im.WorkDir, name)}
	default:
		for _, dir := range []string{"/usr/local/sbin", "/usr/local/bin", "/usr/sbin", "/usr/bin", "/sbin", "/bin", im.WorkDir} {
			tries = append(tries, filepath.Join(dir, name))
		}
	}
	for _, t := range tries {
		p := filepath.Join(root, filepath.Clean("/"+t))
		if fi, err := os.Stat(p); err == nil && fi.Mode().IsRegular() {
			return p, nil
		}
	}
	return "", m3o.Errorf(m3o.Invalid, "the image has no program %s", name)
}

func exitOf(s *os.ProcessState) runtime.Exit {
	e := runtime.Exit{Code: s.ExitCode(), At: time.Now()}
	if ws, ok := s.Sys().(syscall.WaitStatus); ok && ws.Signaled() {
		e.Signal = int(ws.Signal())
		e.Code = 128 + e.Signal
	}
	return e
}

// processes is the driver as the reconciler's host.
type processes Driver

func (p *processes) driver() *Driver { return (*Driver)(p) }

// Check is runtime.Host's.
func (p *processes) Check(_ context.Context, w runtime.Workload) error {
	im, err := runtime.ReadImage(p.cfg.Images, w.Image)
	if err != nil {
		return err
	}
	if len(w.Args) == 0 && len(im.Args) == 0 {
		return m3o.Errorf(m3o.Invalid, "process type %s has no command, and neither has its image", w.Process)
	}
	if len(w.Mounts) > 0 {
		return &m3o.Error{Kind: m3o.Invalid, Msg: "unisolated processes get no volumes", Hint: "m3od --runtime oci mounts them"}
	}
	return nil
}

// Launch is runtime.Host's.
func (p *processes) Launch(ctx context.Context, id string, w runtime.Workload) (runtime.Handle, error) {
	d := p.driver()
	if err := p.Remove(ctx, id); err != nil {
		return nil, err
	}
	h := &handle{ended: make(chan struct{})}
	port := ""
	if w.Port != 0 {
		// Another process may take it before the app does; then the app
		// exits and gets another.
		ln, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			return nil, fmt.Errorf("find a port: %w", err)
		}
		h.addr = ln.Addr().String()
		_, port, _ = net.SplitHostPort(h.addr)
		if err := ln.Close(); err != nil {
			return nil, fmt.Errorf("find a port: %w", err)
		}
	}
	// Not ctx: the process outlives the launch.
	cmd, err := d.prepare(context.WithoutCancel(ctx), id, w, port)
	if err != nil {
		return nil, err
	}
	path, err := d.logs.Path(w.Ref, id)
	if err != nil {
		return nil, err
	}
	lw, err := runtime.NewLogWriter(path)
	if err != nil {
		return nil, err
	}
	if err := h.start(cmd, lw); err != nil {
		return nil, errors.Join(err, lw.Close())
	}
	d.mu.Lock()
	d.live[id] = h
	d.mu.Unlock()
	if err := os.WriteFile(d.pidFile(id), []byte(strconv.Itoa(cmd.Process.Pid)), 0o600); err != nil {
		return nil, errors.Join(fmt.Errorf("record process: %w", err), p.Remove(ctx, id))
	}
	return h, nil
}

func (d *Driver) pidFile(id string) string { return filepath.Join(d.cfg.Dir, "pids", id) }

// Attach is runtime.Host's. A process of an earlier driver has lost its log
// pipes; Launch ends it and starts another.
func (p *processes) Attach(_ context.Context, id string, _ runtime.Workload) (runtime.Handle, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if h := p.live[id]; h != nil {
		return h, nil
	}
	return nil, nil
}

// Remove is runtime.Host's.
func (p *processes) Remove(ctx context.Context, id string) error {
	d := p.driver()
	d.mu.Lock()
	h := d.live[id]
	d.mu.Unlock()
	if h != nil {
		if err := h.Signal(true); err != nil {
			return err
		}
		if _, err := h.Wait(ctx); err != nil {
			return err
		}
	} else if err := d.endStray(id); err != nil {
		return err
	}
	d.mu.Lock()
	delete(d.live, id)
	d.mu.Unlock()
	if err := os.Remove(d.pidFile(id)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("remove process record: %w", err)
	}
	return nil
}

// endStray kills the process group an earlier driver left. Its number may be
// another's by now, so it is only killed if its environment says it is ours,
// which takes /proc; elsewhere it is left, and told.
func (d *Driver) endStray(id string) error {
	b, err := os.ReadFile(d.pidFile(id))
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	} else if err != nil {
		return fmt.Errorf("read process record: %w", err)
	}
	pid, err := strconv.Atoi(string(b))
	if err != nil || pid <= 1 {
		return nil // cut short by a crash: it names nothing
	}
	env, err := os.ReadFile(fmt.Sprintf("/proc/%d/environ", pid))
	if err != nil {
		if _, perr := os.Stat("/proc/self/environ"); perr != nil {
			d.log.Warn("an instance of an earlier run may still be there", "instance", id, "pid", pid)
		}
		return nil
	}
	if bytes.Contains(env, []byte("M3O_INSTANCE="+id+"\x00")) {
		if err := syscall.Kill(-pid, syscall.SIGKILL); err != nil && !errors.Is(err, syscall.ESRCH) {
			return fmt.Errorf("end process: %w", err)
		}
	}
	return nil
}

// A handle is one process and its group.
type handle struct {
	addr  string
	cmd   *exec.Cmd
	ended chan struct{}
	exit  runtime.Exit
}

func (h *handle) start(cmd *exec.Cmd, lw *runtime.LogWriter) error {
	var readers []io.ReadCloser
	for _, get := range []func() (io.ReadCloser, error){cmd.StdoutPipe, cmd.StderrPipe} {
		r, err := get()
		if err != nil {
			return fmt.Errorf("make pipe: %w", err)
		}
		readers = append(readers, r)
	}
	if err := cmd.Start(); err != nil {
		return fmt.Errorf("start process: %w", err)
	}
	h.cmd = cmd
	var copies sync.WaitGroup
	for i, stream := range []byte{'o', 'e'} {
		copies.Go(func() { _ = lw.Copy(stream, readers[i]) })
	}
	go func() { // ends with the process; Wait waits for it
		copied := make(chan struct{})
		go func() { copies.Wait(); close(copied) }()
		state, _ := cmd.Process.Wait()
		select {
		case <-copied:
		case <-time.After(lastOutput): // a child it left holds the pipe
		}
		_ = syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL) // nothing of the group may stay
		for _, r := range readers {
			_ = r.Close()
		}
		<-copied
		_ = lw.Close()
		h.exit = runtime.Exit{Code: -1, At: time.Now()}
		if state != nil {
			h.exit = exitOf(state)
		}
		close(h.ended)
	}()
	return nil
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

func (h *handle) Signal(kill bool) error {
	sig := syscall.SIGTERM
	if kill {
		sig = syscall.SIGKILL
	}
	select {
	case <-h.ended:
		return nil
	default:
	}
	if err := syscall.Kill(-h.cmd.Process.Pid, sig); err != nil && !errors.Is(err, syscall.ESRCH) {
		return fmt.Errorf("signal: %w", err)
	}
	return nil
}

// Listening is known on Linux alone.
func (h *handle) Listening() ([]netip.AddrPort, error) {
	inodes := map[string]bool{}
	dir := fmt.Sprintf("/proc/%d/fd", h.cmd.Process.Pid)
	es, err := os.ReadDir(dir)
	if err != nil {
		return nil, fmt.Errorf("list sockets: %w", err)
	}
	for _, e := range es {
		if l, err := os.Readlink(filepath.Join(dir, e.Name())); err == nil {
			if n, ok := strings.CutPrefix(l, "socket:["); ok {
				inodes[strings.TrimSuffix(n, "]")] = true
			}
		}
	}
	var all []netip.AddrPort
	for _, name := range []string{"tcp", "tcp6"} {
		f, err := os.Open("/proc/net/" + name)
		if err != nil {
			return all, fmt.Errorf("list sockets: %w", err)
		}
		some, err := runtime.ReadListeners(f, inodes)
		_ = f.Close()
		if err != nil {
			return all, err
		}
		for _, a := range some {
			// Loopback is where these instances belong; see runtime.WaitReady.
			all = append(all, netip.AddrPortFrom(netip.IPv4Unspecified(), a.Port()))
		}
	}
	return all, nil
}

func (h *handle) Close() error { return nil }
