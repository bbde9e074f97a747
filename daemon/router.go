package daemon

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"strconv"
	"syscall"
	"time"

	"github.com/m3o/m3o"
	"github.com/m3o/m3o/gateway"
	"github.com/m3o/m3o/router"
)

// The router process inherits its three listeners as these descriptors. The
// daemon binds them, so that a port that is taken is told by the daemon.
const (
	httpFD = iota + 3
	httpsFD
	controlFD
)

func (d *Daemon) controlSocket() string { return d.cfg.path("run", "router.sock") }

// RunRouter is the router's own process, m3od router: it serves from the last
// good table until ctx ends, whatever the daemon does.
func RunRouter(ctx context.Context, cfg Config, version string, log *slog.Logger) error {
	listener := func(fd uintptr, name string) (net.Listener, error) {
		f := os.NewFile(fd, name)
		defer f.Close() //nolint:errcheck // FileListener has its own copy
		ln, err := net.FileListener(f)
		if err != nil {
			return nil, &m3o.Error{Kind: m3o.Invalid, Msg: "m3od router is started by m3od, not by hand",
				Hint: "start m3od; it starts the router", Err: err}
		}
		return ln, nil
	}
	http, err := listener(httpFD, "http")
	if err != nil {
		return err
	}
	https, err := listener(httpsFD, "https")
	if err != nil {
		return err
	}
	control, err := listener(controlFD, "control")
	if err != nil {
		return err
	}
	r, err := router.New(router.Config{HTTP: http, HTTPS: https, Control: control, State: cfg.path("router", "table.json"),
		CA: cfg.path("ca"), Certs: cfg.path("router", "certs"), OnDemand: cfg.ACME(), Gateway: gateway.New(gateway.Config{Log: log}), Version: routerVersion(cfg, version), Log: log,
		TrustedProxies: cfg.trustedProxies(), ProxyProtocol: cfg.ProxyProtocol})
	if err != nil {
		return err
	}
	return r.Run(ctx)
}

// startRouter makes sure that a router runs: the one that outlived an earlier
// daemon, or a new one.
func (d *Daemon) startRouter(ctx context.Context) error {
	sctx, cancel := context.WithTimeout(ctx, 2*time.Second)
	defer cancel()
	d.findRetiring(sctx)
	if st, err := d.router.Status(sctx); err == nil {
		if st.Version != routerVersion(d.cfg, d.version) {
			return d.upgradeRouter(ctx, st)
		}
		d.log.Info("router found running", "pid", st.PID)
		return nil
	}
	return d.spawnRouter(ctx, nil)
}

// spawnRouter starts a router, on listeners that another one handed over or on
// new ones.
func (d *Daemon) spawnRouter(ctx context.Context, from map[string]*os.File) error {
	var files []*os.File
	defer func() {
		for _, f := range files {
			_ = f.Close()
		}
	}()
	bind := func(network, what, addr string) error {
		if f := handed(from, what, addr); f != nil {
			delete(from, what)
			files = append(files, f)
			return nil
		}
		ln, err := (&net.ListenConfig{}).Listen(ctx, network, addr)
		if err != nil {
			return portError(what, addr, err)
		}
		defer ln.Close() //nolint:errcheck // the file is a copy
		if ul, ok := ln.(*net.UnixListener); ok {
			ul.SetUnlinkOnClose(false)
		}
		f, err := ln.(interface{ File() (*os.File, error) }).File()
		if err != nil {
			return fmt.Errorf("pass on %s listener: %w", what, err)
		}
		files = append(files, f)
		return nil
	}
	// A socket file of a router that was killed is in the way; Status said nobody answers on it.
	if err := os.Remove(d.controlSocket()); err != nil && !errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("remove stale router socket: %w", err)
	}
	if err := errors.Join(bind("tcp", "http", d.cfg.HTTP), bind("tcp", "https", d.cfg.HTTPS)); err != nil {
		return err
	}
	if err := bind("unix", "control", d.controlSocket()); err != nil {
		return err
	}
	if err := os.Chmod(d.controlSocket(), 0o600); err != nil {
		return fmt.Errorf("protect router socket: %w", err)
	}
	logFile, err := os.OpenFile(d.cfg.path("router", "router.log"), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		return fmt.Errorf("open router log: %w", err)
	}
	defer logFile.Close() //nolint:errcheck // the child has its own copy
	exe, err := os.Executable()
	if err != nil {
		return fmt.Errorf("find own binary: %w", err)
	}
	args := []string{"router", "--data", d.cfg.Data, "--domain", d.cfg.Domain, "--log-level", d.cfg.LogLevel,
		"--http", d.cfg.HTTP, "--https", d.cfg.HTTPS, "--trusted-proxies", d.cfg.TrustedProxies, "--proxy-protocol=" + strconv.FormatBool(d.cfg.ProxyProtocol)}
	if d.cfg.ACME() {
		args = append(args, "--acme-email", d.cfg.ACMEEmail, "--acme-ca", d.cfg.ACMECA)
	}
	cmd := exec.Command(exe, args...)
	cmd.ExtraFiles, cmd.Stdout, cmd.Stderr = files, logFile, logFile
	// A session of its own: neither Ctrl-C in the daemon's terminal nor the
	// daemon's end reaches the router.
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	cmd.Dir = "/"
	if err := cmd.Start(); err != nil {
		return fmt.Errorf("start router: %w", err)
	}
	d.log.Info("router started", "pid", cmd.Process.Pid)
	died := make(chan struct{})
	// Nobody waits for this goroutine: the router is meant to outlive us.
	go func() {
		_ = cmd.Wait()
		close(died)
		select {
		case d.routerDied <- struct{}{}:
		default:
		}
	}()
	for {
		sctx, cancel := context.WithTimeout(ctx, time.Second)
		_, err := d.router.Status(sctx)
		cancel()
		if err == nil {
			return nil
		}
		select {
		case <-died:
			return &m3o.Error{Kind: m3o.Internal, Msg: "the router stopped right after its start", Hint: "see " + logFile.Name(), Err: err}
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(20 * time.Millisecond):
		}
	}
}

// portError says which of our ports is taken, and by what.
func portError(what, addr string, err error) error {
	switch {
	case errors.Is(err, syscall.EADDRINUSE):
		return &m3o.Error{Kind: m3o.Unavailable, Msg: fmt.Sprintf("%s: another program listens on %s", what, addr),
			Hint: fmt.Sprintf("stop it (ss -ltnp shows it) or choose another address with --%s", what), Err: err}
	case errors.Is(err, syscall.EACCES):
		return &m3o.Error{Kind: m3o.Unavailable, Msg: fmt.Sprintf("%s: no permission to listen on %s", what, addr),
			Hint: "ports below 1024 need root", Err: err}
	}
	return fmt.Errorf("%s: listen on %s: %w", what, addr, err)
}

// watchRouter starts a new router when the one that runs has gone.
func (d *Daemon) watchRouter(ctx context.Context) error {
	t := time.NewTicker(250 * time.Millisecond)
	defer t.Stop()
	misses := 0
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-t.C:
		case <-d.routerDied:
			misses++
		}
		c, err := net.DialTimeout("unix", d.controlSocket(), time.Second)
		if err == nil {
			_ = c.Close()
			misses = 0
			continue
		}
		if misses++; misses < 2 && !errors.Is(err, syscall.ECONNREFUSED) {
			continue
		}
		d.log.Error("the router is gone; starting another", "err", err)
		if err := d.spawnRouter(ctx, nil); err != nil {
			if ctx.Err() == nil {
				d.log.Error("start router", "err", err)
			}
			continue
		}
		misses = 0
		d.routes.refresh()
		d.syncCerts(ctx)
	}
}

// stopRouter ends the router and waits until it has gone.
func (d *Daemon) stopRouter(ctx context.Context) error {
	for _, c := range d.fleet.retiring() {
		d.fleet.end(ctx, c)
		d.fleet.drop(c)
	}
	st, err := d.router.Status(ctx)
	if err != nil {
		return nil // not running
	}
	if err := syscall.Kill(st.PID, syscall.SIGTERM); err != nil && !errors.Is(err, syscall.ESRCH) {
		return fmt.Errorf("stop router: %w", err)
	}
	for {
		if err := syscall.Kill(st.PID, 0); errors.Is(err, syscall.ESRCH) {
			return nil
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("stop router: %w", errors.Join(ctx.Err(), syscall.Kill(st.PID, syscall.SIGKILL)))
		case <-time.After(10 * time.Millisecond):
		}
	}
}
