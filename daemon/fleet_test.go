package daemon

import (
	"context"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"os/signal"
	"path/filepath"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/m3o/m3o"
	"github.com/m3o/m3o/internal/need"
	"github.com/m3o/m3o/router"
)

// TestMain makes the test binary be m3od router, which the daemon starts by
// its own executable's name.
func TestMain(m *testing.M) {
	if len(os.Args) > 1 && os.Args[1] == "router" {
		ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
		cfg, err := ParseConfig(os.Args[2:], func(string) string { return "" }, nil)
		if err == nil {
			err = RunRouter(ctx, cfg, os.Getenv("M3O_TEST_VERSION"), slog.New(slog.NewTextHandler(os.Stderr, nil)))
		}
		stop()
		if err != nil {
			_, _ = io.WriteString(os.Stderr, err.Error()+"\n")
			os.Exit(1)
		}
		os.Exit(0)
	}
	os.Exit(m.Run())
}

// daemonWithRouter is as much of a daemon as starts a router and gives it a table.
func daemonWithRouter(t *testing.T, dir, version string, httpAddr, httpsAddr string) *Daemon {
	t.Helper()
	t.Setenv("M3O_TEST_VERSION", version)
	cfg := Config{Data: dir, HTTP: httpAddr, HTTPS: httpsAddr, Handover: 2 * time.Second}
	if err := cfg.Validate(); err != nil {
		t.Fatal(err)
	}
	d := &Daemon{cfg: cfg, version: version, log: slog.New(slog.DiscardHandler), routerDied: make(chan struct{}, 1)}
	for _, sub := range []string{"run", "router"} {
		if err := os.MkdirAll(d.cfg.path(sub), 0o700); err != nil {
			t.Fatal(err)
		}
	}
	if err := router.NewCA(cfg.path("ca"), cfg.Domain); err != nil {
		t.Fatal(err)
	}
	d.router = router.Client{Socket: d.controlSocket()}
	d.fleet = &fleet{Client: d.router, log: d.log, whole: func() router.Table { return d.routes.table() }}
	d.routes = newRoutes(cfg.Domain, "unix:/nowhere", d.fleet, d.log)
	if err := d.startRouter(t.Context()); err != nil {
		b, _ := os.ReadFile(d.cfg.path("router", "router.log"))
		t.Fatalf("%v\n%s", err, b)
	}
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
		defer cancel()
		if err := d.stopRouter(ctx); err != nil {
			t.Error(err)
		}
	})
	return d
}

// fleetPlace is a directory for routers, short as it holds sockets, and the two
// addresses that they hand to each other.
func fleetPlace(t *testing.T) (dir string, addrs []string) {
	t.Helper()
	dir, err := os.MkdirTemp("", "m3o-fleet-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	if addrs, err = need.Addrs(2); err != nil {
		t.Fatal(err)
	}
	return dir, addrs
}

// The daemon asked a retiring router and the one that serves within the same
// two seconds. When the first hung, it took the second for gone, removed its
// socket and could not start for its ports.
func TestDaemonFindsItsRouterBesideOneThatHangs(t *testing.T) {
	dir, addrs := fleetPlace(t)
	before, err := daemonWithRouter(t, dir, "one", addrs[0], addrs[1]).router.Status(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	hangs, err := net.Listen("unix", filepath.Join(dir, "run", "router-1.sock"))
	if err != nil {
		t.Fatal(err)
	}
	defer hangs.Close() //nolint:errcheck // nobody was answered
	d := daemonWithRouter(t, dir, "one", addrs[0], addrs[1])
	if st, err := d.router.Status(t.Context()); err != nil || st.PID != before.PID {
		t.Errorf("router %d, %v, want %d still", st.PID, err, before.PID)
	}
	if n := len(d.fleet.retiring()); n != 0 {
		t.Errorf("%d routers retire, want none", n)
	}
}

func TestNewDaemonBringsANewRouterAndNoRequestFails(t *testing.T) {
	dir, addrs := fleetPlace(t)
	httpAddr, httpsAddr := addrs[0], addrs[1]
	app := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { _, _ = io.WriteString(w, "hi") }))
	t.Cleanup(app.Close)

	first := daemonWithRouter(t, dir, "one", httpAddr, httpsAddr)
	serve := func(d *Daemon, release int) {
		t.Helper()
		ctx, cancel := context.WithCancel(context.Background())
		var wg sync.WaitGroup
		wg.Go(func() { _ = d.routes.run(ctx) })
		t.Cleanup(func() { cancel(); wg.Wait() })
		d.routes.open()
		in := ready("hello", release, "a", app.Listener.Addr().String(), time.Now())
		if err := d.routes.point(t.Context(), "hello", release, []m3o.Instance{in}); err != nil {
			t.Fatal(err)
		}
	}
	serve(first, 1)

	ctx, cancel := context.WithCancel(t.Context())
	var wg sync.WaitGroup
	var ok atomic.Int64
	for _, keep := range []bool{true, false} {
		c := &http.Client{Transport: &http.Transport{DisableKeepAlives: !keep}}
		wg.Go(func() {
			for ctx.Err() == nil {
				req, err := http.NewRequest("GET", "http://"+httpAddr+"/", nil)
				if err != nil {
					t.Error(err)
					return
				}
				req.Host = "hello.localhost"
				res, err := c.Do(req)
				if err != nil {
					t.Errorf("keep-alive %v: %v", keep, err)
					return
				}
				b, err := io.ReadAll(res.Body)
				_ = res.Body.Close()
				if err != nil || res.StatusCode != 200 || string(b) != "hi" {
					t.Errorf("keep-alive %v: %s %q %v", keep, res.Status, b, err)
					return
				}
				ok.Add(1)
			}
		})
	}
	await := func(what string, cond func() bool) {
		t.Helper()
		for end := time.Now().Add(2 * time.Minute); !cond(); <-time.After(5 * time.Millisecond) {
			if time.Now().After(end) || t.Failed() {
				t.Fatalf("waited in vain: %s", what)
			}
		}
	}
	more := func() { t.Helper(); n := ok.Load(); await("requests", func() bool { return ok.Load() > n+50 }) }
	more()
	before, err := first.router.Status(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	// The same version finds its router; another brings its own.
	same := daemonWithRouter(t, dir, "one", httpAddr, httpsAddr)
	if st, err := same.router.Status(t.Context()); err != nil || st.PID != before.PID {
		t.Errorf("a daemon of the same version: router %d, %v, want %d", st.PID, err, before.PID)
	}
	second := daemonWithRouter(t, dir, "two", httpAddr, httpsAddr)
	after, err := second.router.Status(t.Context())
	if err != nil || after.PID == before.PID || after.Table != before.Table {
		t.Fatalf("after the upgrade: %+v, %v; before %+v", after, err, before)
	}
	if n := len(second.fleet.retiring()); n != 1 {
		t.Errorf("%d routers retire, want 1", n)
	}
	more()
	serve(second, 2) // the old router follows the table as well
	more()
	await("the old router to end", func() bool { return syscall.Kill(before.PID, 0) != nil })
	more()
	serveAgain := second.routes.point(t.Context(), "hello", 2, nil)
	if n := len(second.fleet.retiring()); serveAgain != nil || n > 1 {
		t.Errorf("a deploy after the old router ended: %v, %d retiring", serveAgain, n)
	}
	cancel()
	wg.Wait()
}
