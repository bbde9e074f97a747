// Package memory runs instances as functions inside this process, each with
// real listeners on an address of its own: a runtime.Driver for tests of who
// uses one, with the same life, health, restarts and logs as the others and
// without root, images or any isolation. A hook makes what a test wants fail.
package memory

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"iter"
	"log/slog"
	"math/rand/v2"
	"net"
	"net/netip"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/m3o/m3o"
	"github.com/m3o/m3o/runtime"
)

// A Process is what a Program runs in.
type Process struct {
	runtime.Workload
	Instance string
	Args     []string
	Env      func(string) string // "" when unset; the last of two values counts
	In       io.Reader
	Out, Err io.Writer
	// Listen is net.Listen, with no host meaning the instance's own address.
	// What it opened is closed when the program ends.
	Listen func(network, addr string) (net.Listener, error)
	Killed <-chan struct{} // closed instead of SIGKILL
}

// A Program is the app. It returns its exit code; ctx ends instead of SIGTERM.
// One that returns neither then nor when Killed is closed leaks.
type Program func(ctx context.Context, p Process) int

// Config says what a Driver runs.
type Config struct {
	Dir     string // logs, and nothing else
	Program Program
	// Fault, if not nil, is asked before an operation ("check", "launch",
	// "remove", "exec", "run") and makes it fail with the error it returns.
	Fault func(op string, w runtime.Workload) error
	Log   *slog.Logger // nil discards
}

// A Driver is a runtime.Driver. Its instances live as long as it does, also
// while it is not served.
type Driver struct {
	*runtime.Reconciler
	cfg  Config
	logs runtime.Logs

	mu   sync.Mutex // guards live
	live map[string]*handle
}

var (
	_ runtime.Driver    = (*Driver)(nil)
	_ runtime.Explainer = (*Driver)(nil)
	_ runtime.Host      = (*functions)(nil)
)

// Open makes a driver; Serve must follow.
func Open(cfg Config) (*Driver, error) {
	if cfg.Dir == "" || cfg.Program == nil {
		return nil, m3o.Errorf(m3o.Invalid, "a memory driver needs a directory and a program")
	}
	d := &Driver{cfg: cfg, logs: runtime.Logs{Dir: cfg.Dir}, live: map[string]*handle{}}
	var err error
	d.Reconciler, err = runtime.NewReconciler("", (*functions)(d), cfg.Log)
	return d, err
}

// Serve keeps what runs as wanted until ctx ends; it may be repeated.
func (d *Driver) Serve(ctx context.Context) error { return d.Reconciler.Run(ctx) }

// Shutdown stops every instance. It must not be called while Serve runs.
func (d *Driver) Shutdown(ctx context.Context) error { return d.StopAll(ctx) }

// Kill ends an instance by surprise, as a SIGKILL from elsewhere would.
func (d *Driver) Kill(instance string) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if h := d.live[instance]; h != nil {
		_ = h.Signal(true) // it never fails
	}
}

// Logs is runtime.Driver's.
func (d *Driver) Logs(ctx context.Context, r runtime.Ref, lines int, follow bool) iter.Seq2[runtime.Line, error] {
	return d.logs.Read(ctx, r, lines, follow)
}

func (d *Driver) fault(op string, w runtime.Workload) error {
	if d.cfg.Fault == nil {
		return nil
	}
	return d.cfg.Fault(op, w)
}

// Exec is runtime.Driver's.
func (d *Driver) Exec(ctx context.Context, instance string, c runtime.Cmd) (int, error) {
	w, _, err := d.Workload(instance)
	if err != nil {
		return -1, err
	}
	if err := d.fault("exec", w); err != nil {
		return -1, err
	}
	if len(c.Args) == 0 {
		return -1, m3o.Errorf(m3o.Invalid, "there is no command to run")
	}
	return d.command(ctx, instance, w, c)
}

// Run is runtime.Driver's.
func (d *Driver) Run(ctx context.Context, w runtime.Workload, c runtime.Cmd) (int, error) {
	if err := w.Validate(); err != nil {
		return -1, err
	}
	if err := d.fault("run", w); err != nil {
		return -1, err
	}
	return d.command(ctx, runtime.NewID(w.Ref), w, c)
}

func (d *Driver) command(ctx context.Context, id string, w runtime.Workload, c runtime.Cmd) (int, error) {
	if len(c.Args) > 0 {
		w.Args = c.Args
	}
	w.Env = append(append([]string(nil), w.Env...), c.Env...)
	h, err := newHandle(id, w)
	if err != nil {
		return -1, err
	}
	discard := func(w io.Writer) io.Writer {
		if w == nil {
			return io.Discard
		}
		return w
	}
	in := c.In
	if in == nil {
		in = strings.NewReader("")
	}
	h.start(d.cfg.Program, in, discard(c.Out), discard(c.Err), func() {})
	defer c.PassSignals(func(sig syscall.Signal) error { return h.Signal(sig == syscall.SIGKILL) })()
	e, err := h.Wait(ctx)
	if err != nil {
		_ = h.Signal(true)
		return -1, err
	}
	return e.Code, nil
}

// functions is the driver as the reconciler's host.
type functions Driver

// Check is runtime.Host's. Image says nothing here: any will do but none.
func (f *functions) Check(_ context.Context, w runtime.Workload) error {
	if err := (*Driver)(f).fault("check", w); err != nil {
		return err
	}
	if w.Image == "" {
		return m3o.Errorf(m3o.NotFound, "no image")
	}
	return nil
}

// Launch is runtime.Host's.
func (f *functions) Launch(ctx context.Context, id string, w runtime.Workload) (runtime.Handle, error) {
	d := (*Driver)(f)
	if err := d.fault("launch", w); err != nil {
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
	h, err := newHandle(id, w)
	if err != nil {
		return nil, errors.Join(err, lw.Close())
	}
	out, outW := io.Pipe()
	errs, errW := io.Pipe()
	var copies sync.WaitGroup
	copies.Go(func() { _ = lw.Copy('o', out) })
	copies.Go(func() { _ = lw.Copy('e', errs) })
	d.mu.Lock()
	d.live[id] = h
	d.mu.Unlock()
	h.start(d.cfg.Program, strings.NewReader(""), outW, errW, func() {
		_ = outW.Close()
		_ = errW.Close()
		copies.Wait()
		_ = lw.Close()
	})
	return h, nil
}

// Attach is runtime.Host's.
func (f *functions) Attach(_ context.Context, id string, _ runtime.Workload) (runtime.Handle, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if h := f.live[id]; h != nil {
		return h, nil
	}
	return nil, nil
}

// Remove is runtime.Host's.
func (f *functions) Remove(ctx context.Context, id string) error {
	f.mu.Lock()
	h := f.live[id]
	f.mu.Unlock()
	if h == nil {
		return nil
	}
	if err := (*Driver)(f).fault("remove", h.w); err != nil {
		return err
	}
	_ = h.Signal(true)
	if _, err := h.Wait(ctx); err != nil {
		return err
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	delete(f.live, id)
	return nil
}

// A handle is one running program.
type handle struct {
	id   string
	w    runtime.Workload
	ip   netip.Addr
	port int
	term context.Context
	stop context.CancelFunc
	kill func()
	dead chan struct{} // closed by kill

	mu        sync.Mutex // guards listeners
	listeners []net.Listener

	ended chan struct{}
	exit  runtime.Exit
}

func newHandle(id string, w runtime.Workload) (*handle, error) {
	h := &handle{id: id, w: w, port: w.Port, ended: make(chan struct{}), dead: make(chan struct{})}
	h.kill = sync.OnceFunc(func() { close(h.dead) })
	h.term, h.stop = context.WithCancel(context.Background())
	if w.Port == 0 {
		return h, nil
	}
	// An address of its own out of 127.0.0.0/8; a machine that has only
	// 127.0.0.1 gives a port of its own.
	h.ip = netip.AddrFrom4([4]byte{127, byte(1 + rand.N(254)), byte(rand.N(256)), byte(1 + rand.N(254))})
	ln, err := net.Listen("tcp", netip.AddrPortFrom(h.ip, uint16(w.Port)).String())
	if err != nil {
		h.ip = netip.AddrFrom4([4]byte{127, 0, 0, 1})
		if ln, err = net.Listen("tcp", "127.0.0.1:0"); err != nil {
			return nil, fmt.Errorf("find a port: %w", err)
		}
		h.port = ln.Addr().(*net.TCPAddr).Port
	}
	return h, ln.Close()
}

func (h *handle) start(p Program, in io.Reader, out, errs io.Writer, finish func()) {
	env := map[string]string{}
	for _, kv := range h.w.Env {
		k, v, _ := strings.Cut(kv, "=")
		env[k] = v
	}
	env["M3O_INSTANCE"] = h.id
	if h.port != 0 {
		env["PORT"] = strconv.Itoa(h.port)
	}
	go func() { // ends with the program; Wait waits for it
		code := p(h.term, Process{Workload: h.w, Instance: h.id, Args: h.w.Args, In: in, Out: out, Err: errs,
			Env: func(k string) string { return env[k] }, Listen: h.listen, Killed: h.dead})
		h.mu.Lock()
		for _, ln := range h.listeners {
			_ = ln.Close()
		}
		h.mu.Unlock()
		finish()
		h.exit = runtime.Exit{Code: code, At: time.Now()}
		select {
		case <-h.dead:
			h.exit.Code, h.exit.Signal = 128+int(syscall.SIGKILL), int(syscall.SIGKILL)
		default:
		}
		close(h.ended)
	}()
}

func (h *handle) listen(network, addr string) (net.Listener, error) {
	host, port, err := net.SplitHostPort(addr)
	if err != nil {
		return nil, err
	}
	ln, err := net.Listen(network, net.JoinHostPort(cmp.Or(host, h.ip.String()), port))
	if err != nil {
		return nil, err
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	h.listeners = append(h.listeners, ln)
	return ln, nil
}

func (h *handle) Addr() string {
	if h.port == 0 {
		return ""
	}
	return netip.AddrPortFrom(h.ip, uint16(h.port)).String()
}

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
	h.stop()
	if kill {
		h.kill()
	}
	return nil
}

func (h *handle) Listening() ([]netip.AddrPort, error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	var all []netip.AddrPort
	for _, ln := range h.listeners {
		if a, err := netip.ParseAddrPort(ln.Addr().String()); err == nil {
			// Only the address it was given is the world's; see slowWords.
			all = append(all, netip.AddrPortFrom(netip.IPv4Unspecified(), a.Port()))
		}
	}
	return all, nil
}

func (h *handle) Close() error { return nil }
