package daemon

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/m3o/m3o"
	"github.com/m3o/m3o/discovery"
	"github.com/m3o/m3o/gateway"
	"github.com/m3o/m3o/router"
	"github.com/m3o/m3o/runtime/oci"
)

// The router process inherits its sockets as descriptors from firstFD on, named
// in the variable socketNames as systemd names those it passes on. The daemon
// binds them, so that a port that is taken is told by the daemon.
const (
	firstFD     = 3
	socketNames = "LISTEN_FDNAMES"
)

func (d *Daemon) controlSocket() string { return d.cfg.path("run", "router.sock") }

// RunRouter is the router's own process, m3od router: it serves from the last
// good table until ctx ends, whatever the daemon does.
func RunRouter(ctx context.Context, cfg Config, version string, log *slog.Logger) error {
	socks := map[string]net.Listener{}
	var names, h3 net.PacketConn
	for i, name := range strings.Split(os.Getenv(socketNames), ":") {
		f := os.NewFile(uintptr(firstFD+i), name)
		var err error
		switch name {
		case namesUDP:
			names, err = net.FilePacketConn(f)
		case "http3":
			h3, err = net.FilePacketConn(f)
		default:
			socks[name], err = net.FileListener(f)
		}
		_ = f.Close() // there is a copy of it
		if err != nil {
			return &m3o.Error{Kind: m3o.Invalid, Msg: "m3od router is started by m3od, not by hand",
				Hint: "start m3od; it starts the router", Err: err}
		}
	}
	var inside *router.Inside
	if names != nil {
		at, err := netip.ParseAddrPort(names.LocalAddr().String())
		if err != nil {
			return fmt.Errorf("find own address: %w", err)
		}
		inside = &router.Inside{HTTP: socks["internal"], Names: &discovery.Names{UDP: names, TCP: socks["names"], Gateway: at.Addr().Unmap(),
			Upstreams: discovery.HostServers("/etc/resolv.conf"), Log: log}}
	}
	traces, err := openTelemetry(cfg, "m3o-router", version, log)
	if err != nil {
		return err
	}
	r, err := router.New(router.Config{Traces: traces, HTTP: socks["http"], HTTPS: socks["https"], Control: socks["control"], Inside: inside, State: cfg.path("router", "table.json"),
		CA: cfg.path("ca"), Certs: cfg.path("router", "certs"), OnDemand: cfg.ACME(), Gateway: gateway.New(gateway.Config{Log: log}), Version: routerVersion(cfg, version), Log: log,
		TrustedProxies: cfg.trustedProxies(), ProxyProtocol: cfg.ProxyProtocol, HTTP3: h3})
	if err != nil {
		return err
	}
	router.Tune()
	if traces == nil {
		return r.Run(ctx)
	}
	sending, cancel := context.WithCancel(context.WithoutCancel(ctx))
	done := make(chan error, 1)
	go func() { done <- traces.Run(sending) }()
	err = r.Run(ctx)
	cancel() // after the last request, whose spans are sent, too
	return errors.Join(err, <-done)
}

// startRouter makes sure that a router runs: the one that outlived an earlier
// daemon, or a new one.
func (d *Daemon) startRouter(ctx context.Context) error {
	d.findRetiring(ctx)
	if st, err := d.runningRouter(ctx); err == nil {
		if st.Version != routerVersion(d.cfg, d.version) {
			return d.upgradeRouter(ctx, st)
		}
		d.log.Info("router found running", "pid", st.PID)
		return nil
	}
	return d.spawnRouter(ctx, nil)
}

// routerPatience is how long a router that is there may take to say so. Busy
// is not gone: its ports are taken, so that no other can be started.
const routerPatience = 30 * time.Second

// runningRouter asks the router that outlived an earlier daemon how it is. An
// error means that there is none, or one that is stuck.
func (d *Daemon) runningRouter(ctx context.Context) (st router.Status, err error) {
	ctx, cancel := context.WithTimeout(ctx, routerPatience)
	defer cancel()
	for {
		sctx, scancel := context.WithTimeout(ctx, 5*time.Second)
		st, err = d.router.Status(sctx)
		scancel()
		if err == nil || errors.Is(err, syscall.ECONNREFUSED) || errors.Is(err, fs.ErrNotExist) {
			return st, err
		}
		select {
		case <-ctx.Done():
			return st, err
		case <-time.After(20 * time.Millisecond):
		}
	}
}

// spawnRouter starts a router, on listeners that another one handed over or on
// new ones.
func (d *Daemon) spawnRouter(ctx context.Context, from map[string]*os.File) (err error) {
	var files []*os.File
	var names []string
	defer func() {
		for _, f := range files {
			_ = f.Close()
		}
	}()
	bind := func(network, what, addr string) error {
		f := handed(from, what, addr)
		if f != nil {
			delete(from, what)
		} else if f, err = bindFile(ctx, network, addr); err != nil {
			return portError(what, addr, err)
		}
		files, names = append(files, f), append(names, what)
		return nil
	}
	// A socket file of a router that was killed is in the way; Status said nobody answers on it.
	if err := os.Remove(d.controlSocket()); err != nil && !errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("remove stale router socket: %w", err)
	}
	if err := errors.Join(bind("tcp", "http", d.cfg.HTTP), bind("tcp", "https", d.cfg.HTTPS)); err != nil {
		return err
	}
	if d.cfg.HTTP3 {
		if err := bind("udp", "http3", d.cfg.HTTPS); err != nil {
			return err
		}
	}
	if err := bind("unix", "control", d.controlSocket()); err != nil {
		return err
	}
	if n, ok := d.driver.(networked); ok {
		at := func(port uint16) string { return netip.AddrPortFrom(n.Gateway(), port).String() }
		if err := errors.Join(bind("tcp", "internal", at(oci.InternalPort)), bind("tcp", "names", at(discovery.DNSPort)), bind("udp", namesUDP, at(discovery.DNSPort))); err != nil {
			return err
		}
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
		"--runtime", d.cfg.Runtime, "--name", d.cfg.Name, "--http", d.cfg.HTTP, "--https", d.cfg.HTTPS, "--trusted-proxies", d.cfg.TrustedProxies, "--proxy-protocol=" + strconv.FormatBool(d.cfg.ProxyProtocol), "--http3=" + strconv.FormatBool(d.cfg.HTTP3)}
	if d.cfg.OTLPEndpoint != "" {
		args = append(args, "--otlp-endpoint", d.cfg.OTLPEndpoint, "--otlp-sample", d.cfg.OTLPSample)
	}
	if d.cfg.ACME() {
		args = append(args, "--acme-email", d.cfg.ACMEEmail, "--acme-ca", d.cfg.ACMECA)
	}
	cmd := exec.Command(exe, args...)
	cmd.Env = append(os.Environ(), socketNames+"="+strings.Join(names, ":"))
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

// namesUDP is what the socket of the apps' name server is called, the one that
// is no listener.
const namesUDP = "names-udp"

// bindFile binds a socket for another process.
func bindFile(ctx context.Context, network, addr string) (*os.File, error) {
	var lc net.ListenConfig
	if network == "udp" {
		pc, err := lc.ListenPacket(ctx, network, addr)
		if err != nil {
			return nil, err
		}
		defer pc.Close() //nolint:errcheck // the file is a copy
		return pc.(*net.UDPConn).File()
	}
	ln, err := lc.Listen(ctx, network, addr)
	if err != nil {
		return nil, err
	}
	defer ln.Close() //nolint:errcheck // the file is a copy
	if ul, ok := ln.(*net.UnixListener); ok {
		ul.SetUnlinkOnClose(false)
	}
	return ln.(interface{ File() (*os.File, error) }).File()
}

// portError says which of our ports is taken, and by what.
func portError(what, addr string, err error) error {
	switch {
	case errors.Is(err, syscall.EADDRINUSE) && (what == "names" || what == namesUDP):
		return &m3o.Error{Kind: m3o.Unavailable, Msg: "the apps' name server cannot listen on " + addr + ": another program does",
			Hint: "a name server that listens on every address of this host is in the way: limit it to those it needs", Err: err}
	case errors.Is(err, syscall.EADDRINUSE) && what == "internal":
		return &m3o.Error{Kind: m3o.Unavailable, Msg: "calls between apps cannot come in at " + addr + ": another program listens there",
			Hint: "ss -ltnp shows it: give it another port", Err: err}
	case errors.Is(err, syscall.EADDRINUSE) && what == "http3":
		return &m3o.Error{Kind: m3o.Unavailable, Msg: "http3: another program has UDP on " + addr,
			Hint: "stop it (ss -lunp shows it), choose another address with --https, or leave --http3 out", Err: err}
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
		d.peers.changed()
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
