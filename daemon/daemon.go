// Package daemon is m3od: it wires the platform's parts together and owns what
// lies between them, above all the life of a push (deploy.go). It knows every
// part; no part knows it, and only cmd imports it.
package daemon

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"os"
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	"github.com/m3o/m3o"
	"github.com/m3o/m3o/auth"
	"github.com/m3o/m3o/buildpacks/source"
	"github.com/m3o/m3o/certs"
	"github.com/m3o/m3o/config"
	"github.com/m3o/m3o/events"
	"github.com/m3o/m3o/gitserver"
	"github.com/m3o/m3o/internal/run"
	"github.com/m3o/m3o/release"
	"github.com/m3o/m3o/router"
	"github.com/m3o/m3o/runtime"
	"github.com/m3o/m3o/store"
	"github.com/m3o/m3o/telemetry"
)

// A Daemon is one installation's control plane. Make it with New; Run serves.
type Daemon struct {
	cfg     Config
	version string
	log     *slog.Logger

	hostKey   []byte
	configKey [32]byte
	caPEM     []byte // the internal CA's certificate

	store    *store.Store
	auth     *auth.Auth
	config   *config.Config
	ledger   *release.Ledger
	driver   driver
	builder  builder
	git      *gitserver.Server
	router   router.Client
	fleet    *fleet // router and those that it took over from
	routes   *routes
	hosting  hosting
	access   *access
	canaries *store.Bucket[canary]
	certs    *certs.Manager // nil without ACME

	ownCerts  *store.Bucket[ownCert]
	domainsMu sync.Mutex // orders changes of domains
	trees     source.Cache
	lanes     lanes
	leaving   leaving
	shapes    shapes
	usages    usages
	repos     *repos

	schedules *schedules
	runs      runs
	logs      *appLogs
	drains    *drains
	links     *store.Bucket[link]
	linksMu   sync.Mutex // orders what the driver is told of links
	peers     *peers
	metrics   net.Listener      // nil where nobody wants them
	telemetry *telemetry.Sender // nil where nothing is sent
	traces    deployTraces
	uploads   uploads
	hooks     *deployHooks
	bus       *events.Bus
	notify    *notifications

	imagesMu sync.RWMutex // read: an image is made that no release names yet; write: images are removed
	pruned   pruned
	stopping atomic.Bool // the router has ended or is about to, and every app

	routerDied chan struct{} // gets a token when a router we started ends
	ssh        net.Listener
	api        net.Listener
	firstCode  m3o.Secret // the one-time code of a first start, "" afterwards

	onStep func(app string, s release.Status) // see OnStep

	bg       sync.WaitGroup // what background started
	bgCtx    context.Context
	bgCancel context.CancelFunc
}

// New opens everything a daemon needs, state and sockets first, and fails
// early with what to do. The daemon serves once Run is called.
func New(ctx context.Context, cfg Config, version string, log *slog.Logger) (_ *Daemon, err error) {
	d := &Daemon{cfg: cfg, version: version, log: log, routerDied: make(chan struct{}, 1)}
	d.bgCtx, d.bgCancel = context.WithCancel(context.WithoutCancel(ctx))
	if err := d.makeState(); err != nil {
		return nil, err
	}
	if d.ssh, err = (&net.ListenConfig{}).Listen(ctx, "tcp", cfg.SSH); err != nil {
		return nil, portError("ssh", cfg.SSH, err)
	}
	defer func() {
		if err != nil {
			_ = d.ssh.Close()
		}
	}()
	if d.store, err = store.Open(ctx, store.Config{Dir: cfg.path("store"), URL: cfg.Nats, Creds: cfg.NatsCred, Log: log}); err != nil {
		return nil, fmt.Errorf("open store: %w", err)
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, d.store.Close())
		}
	}()
	if d.auth, err = auth.Open(ctx, d.store, log); err != nil {
		return nil, fmt.Errorf("open auth: %w", err)
	}
	if d.config, err = config.Open(ctx, d.store, d.configKey, log); err != nil {
		return nil, fmt.Errorf("open config: %w", err)
	}
	if d.ledger, err = release.Open(ctx, d.store, log); err != nil {
		return nil, fmt.Errorf("open ledger: %w", err)
	}
	if d.hosting, err = openHosting(ctx, d.store); err != nil {
		return nil, err
	}
	if d.repos, err = openRepos(ctx, d); err != nil {
		return nil, fmt.Errorf("open repositories: %w", err)
	}
	if err := d.firstStart(ctx); err != nil {
		return nil, err
	}
	if d.schedules, err = openSchedules(ctx, d); err != nil {
		return nil, fmt.Errorf("open schedules: %w", err)
	}
	if d.hooks, err = openDeployHooks(ctx, d); err != nil {
		return nil, fmt.Errorf("open deploy hooks: %w", err)
	}
	if d.bus, err = openBus(ctx, d); err != nil {
		return nil, fmt.Errorf("open events: %w", err)
	}
	if d.notify, err = openNotifications(ctx, d); err != nil {
		return nil, fmt.Errorf("open notifications: %w", err)
	}
	d.router = router.Client{Socket: d.controlSocket()}
	d.fleet = &fleet{Client: d.router, log: log, whole: func() router.Table { return d.routes.table() }}
	d.peers = newPeers(d.fleet, log)
	d.routes = newRoutes(cfg.Domain, "unix:"+d.apiSocket(), d.fleet, log)
	if d.access, err = openAccess(ctx, d.store, cfg.DefaultAccess == "private", d.routes); err != nil {
		return nil, err
	}
	if d.canaries, err = openCanaries(ctx, d.store); err != nil {
		return nil, err
	}
	if err := d.openCerts(ctx); err != nil {
		return nil, err
	}
	d.logs = newAppLogs(cfg.path("logs"), log)
	d.routes.told = func(old, in m3o.Instance) {
		d.peers.changed()
		d.tellInstance(old, in)
	}
	if d.drains, err = openDrains(ctx, d); err != nil {
		return nil, fmt.Errorf("open drains: %w", err)
	}
	if d.links, err = openLinks(ctx, d.store); err != nil {
		return nil, fmt.Errorf("open links: %w", err)
	}
	if err := d.listenMetrics(ctx); err != nil {
		return nil, err
	}
	if d.telemetry, err = openTelemetry(cfg, "m3od", version, log); err != nil {
		return nil, err
	}
	d.traces.to = d.telemetry
	if err := os.Remove(d.apiSocket()); err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, fmt.Errorf("remove stale API socket: %w", err)
	}
	if d.api, err = (&net.ListenConfig{}).Listen(ctx, "unix", d.apiSocket()); err != nil {
		return nil, fmt.Errorf("listen for the API: %w", err)
	}
	if err := os.Chmod(d.apiSocket(), 0o600); err != nil {
		return nil, fmt.Errorf("protect API socket: %w", err)
	}
	return d, nil
}

func (d *Daemon) apiSocket() string { return d.cfg.path("run", "api.sock") }

// firstStart makes the one-time code while no admin has a key.
func (d *Daemon) firstStart(ctx context.Context) error {
	code, err := d.auth.BootstrapCode(ctx)
	switch m3o.KindOf(err) {
	case m3o.Conflict, m3o.Denied:
		return nil // there is an admin
	}
	if err != nil {
		return fmt.Errorf("make one-time admin code: %w", err)
	}
	d.firstCode = code
	return nil
}

// Run serves until ctx ends or a part fails. ready is called once, when pushes
// and requests are served. Apps and the router go on after it returns, unless
// the configuration says otherwise.
func (d *Daemon) Run(ctx context.Context, ready func(Ready)) error {
	if err := d.openEngines(ctx); err != nil {
		return errors.Join(err, d.store.Close())
	}
	if err := d.applyLinks(ctx); err != nil {
		return errors.Join(err, d.store.Close())
	}
	if err := d.startRouter(ctx); err != nil {
		return errors.Join(err, d.store.Close())
	}
	var err error
	d.git, err = gitserver.New(gitserver.Config{Listener: d.ssh, HostKey: d.hostKey, Repos: d.cfg.path("repos"),
		Users: d.auth, Apps: pushes{d}, Commands: d.commands(), Log: d.log})
	if err != nil {
		return errors.Join(err, d.store.Close())
	}
	var s run.Stack
	s.Add("store", d.store.Run)
	s.Add("auth", func(ctx context.Context) error {
		<-ctx.Done()
		return d.auth.Close()
	})
	s.Add("router watch", d.watchRouter)
	s.Add("routes", d.routes.run)
	s.Add("peers", d.peers.run)
	s.Add("certificates", d.runCerts)
	s.Add("runtime", d.driver.Serve)
	s.Add("instances", func(ctx context.Context) error { return d.routes.follow(ctx, d.driver) })
	s.Add("access log", d.accessLog)
	s.Add("drains", d.drains.run)
	s.Add("upkeep", d.upkeep)
	s.Add("sleepers", d.followAsks)
	s.Add("load", d.followLoad)
	s.Add("metrics", d.serveMetrics)
	s.Add("telemetry", d.runTelemetry)
	s.Add("builder", d.builder.Run)
	s.Add("background", func(ctx context.Context) error {
		<-ctx.Done()
		d.bgCancel()
		d.bg.Wait()
		return nil
	})
	s.Add("api", d.serveAPI)
	settled := make(chan struct{}) // closed when the live releases run
	s.Add("notifications", d.notify.run)
	s.Add("crashes", d.watchCrashes)
	s.Add("schedules", func(ctx context.Context) error {
		select {
		case <-settled:
			return d.schedules.run(ctx)
		case <-ctx.Done():
			return nil
		}
	})
	s.Add("repositories", d.repos.run)
	s.Add("git server", func(ctx context.Context) error {
		// Everything below runs by now: settle what a crash left, then take pushes.
		if err := d.recover(ctx); err != nil {
			return err
		}
		if err := d.loadHosting(ctx); err != nil {
			return err
		}
		apps := d.settle(ctx)
		close(settled)
		d.repos.start()
		go d.announce(ctx, apps, ready) // ends with ctx
		return d.git.Run(ctx)
	})
	err = s.Run(ctx)
	if d.cfg.StopApps {
		d.stopping.Store(true)
		sctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), time.Minute)
		defer cancel()
		err = errors.Join(err, d.stopRouter(sctx), d.driver.Shutdown(sctx))
	}
	return err
}

// Ready is what a daemon tells when it serves.
type Ready struct {
	API           string     // URL of the API
	Git           string     // host:port of the git server
	Code          m3o.Secret // the one-time admin code of a first start, "" afterwards
	CAFingerprint string     // of the internal CA
	Apps          int        // apps with a live release
}

// settle waits until every live app answers, a broken one not for long, and
// lets the router have the table.
func (d *Daemon) settle(ctx context.Context) int {
	wctx, cancel := context.WithTimeout(ctx, settleTime)
	defer cancel()
	n := d.awaitLive(wctx)
	d.routes.open()
	d.peers.settle()
	return n
}

// settleTime bounds how long a broken app can keep a starting daemon from
// serving the others.
const settleTime = 10 * time.Second

// announce calls ready when the builder takes builds, or after a while all the same.
func (d *Daemon) announce(ctx context.Context, apps int, ready func(Ready)) {
	wctx, cancel := context.WithTimeout(ctx, 20*time.Second)
	defer cancel()
	if err := d.builder.Ready(wctx); err != nil && ctx.Err() == nil {
		d.log.Error("builder is not ready", "err", err)
	}
	if ctx.Err() == nil {
		ready(Ready{API: d.apiURL(), Git: d.gitAddr(), Code: d.firstCode, CAFingerprint: d.caFingerprint(), Apps: apps})
	}
}

// awaitLive waits until the live release of every app has a ready instance,
// and counts the apps.
func (d *Daemon) awaitLive(ctx context.Context) int {
	apps, err := d.ledger.Apps(ctx)
	if err != nil {
		return 0
	}
	var wg sync.WaitGroup
	n := 0
	for _, a := range apps {
		rel, err := d.ledger.Live(ctx, a.Name)
		if err != nil {
			continue
		}
		n++
		if rel, err = d.formed(ctx, rel, false); err != nil {
			d.log.Error("read formation", "app", a.Name, "err", err)
			continue
		}
		if p, ok := rel.Processes[webProcess]; ok && replicas(p) > 0 {
			wg.Go(func() {
				ins, err := runtime.WaitReady(ctx, d.driver, ref(rel, webProcess), 1, nil)
				if err != nil {
					d.log.Error("app is not ready", "app", rel.App, "release", rel.Version, "err", err)
				}
				d.routes.know(ins)
			})
		}
	}
	wg.Wait()
	return n
}

// OnStep has f called after each step of a deploy is persisted and before it
// is done, for tests that end the process right there. Call it before Run.
func (d *Daemon) OnStep(f func(app string, s release.Status)) { d.onStep = f }

// background runs f until the daemon stops, which waits for it.
func (d *Daemon) background(f func(context.Context)) {
	d.bg.Go(func() { f(d.bgCtx) })
}

// url is where an app is published.
func (d *Daemon) url(app string) string { return "https://" + app + "." + d.cfg.Domain + d.httpsPort() }

func (d *Daemon) apiURL() string { return d.url("api") }

// httpsPort is ":8443", or "" for the standard port.
func (d *Daemon) httpsPort() string {
	_, port, err := net.SplitHostPort(d.cfg.HTTPS)
	if err != nil || port == "443" {
		return ""
	}
	return ":" + port
}

// gitAddr is the git server's host:port as a laptop reaches it.
func (d *Daemon) gitAddr() string {
	_, port, _ := net.SplitHostPort(d.ssh.Addr().String())
	host := d.cfg.Domain
	if d.cfg.Local() {
		host = "localhost" // *.localhost names do not resolve for ssh
	}
	return net.JoinHostPort(host, port)
}

func (d *Daemon) gitURL(app string) string { return "ssh://m3o@" + d.gitAddr() + "/" + app }

// httpsPortNumber is the port of the published URLs.
func (d *Daemon) httpsPortNumber() int {
	_, port, _ := net.SplitHostPort(d.cfg.HTTPS)
	n, _ := strconv.Atoi(port)
	return n
}

func (d *Daemon) subnet() netip.Prefix { return netip.MustParsePrefix(d.cfg.Subnet) }

// serveAPI serves the API on its socket, where the router reaches it.
func (d *Daemon) serveAPI(ctx context.Context) error {
	srv := &http.Server{Handler: d.apiHandler(), ReadHeaderTimeout: 10 * time.Second, Protocols: new(http.Protocols),
		ErrorLog: slog.NewLogLogger(d.log.Handler(), slog.LevelDebug)}
	srv.Protocols.SetHTTP1(true)
	srv.Protocols.SetUnencryptedHTTP2(true)
	// Streams such as followed logs end with the daemon, not with Shutdown's patience.
	sctx, cancel := context.WithCancel(context.WithoutCancel(ctx))
	srv.BaseContext = func(net.Listener) context.Context { return sctx }
	done := make(chan error, 1)
	go func() { done <- srv.Serve(d.api) }()
	select {
	case err := <-done:
		cancel()
		return err
	case <-ctx.Done():
	}
	cancel()
	// A one-off command has ten seconds to end.
	wctx, stop := context.WithTimeout(context.WithoutCancel(ctx), 15*time.Second)
	defer stop()
	err := srv.Shutdown(wctx)
	if serr := <-done; !errors.Is(serr, http.ErrServerClosed) {
		err = errors.Join(err, serr)
	}
	return err
}
