package daemon

import (
	"archive/tar"
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"iter"
	"log/slog"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"connectrpc.com/connect"

	"github.com/m3o/m3o"
	m3ov1 "github.com/m3o/m3o/api/m3o/v1"
	"github.com/m3o/m3o/buildpacks/build"
	"github.com/m3o/m3o/gitserver"
	"github.com/m3o/m3o/internal/need"
	"github.com/m3o/m3o/router"
	"github.com/m3o/m3o/runtime"
	"github.com/m3o/m3o/runtime/memory"
	"github.com/m3o/m3o/runtime/runtimetest"
)

// pretend is a builder that makes no image: what is tested is what leads to a
// build and what follows it.
type pretend struct {
	builder            // for what no deploy of these tests calls
	mu      sync.Mutex // guards built
	built   []build.Request
	now     build.Basis // what a build uses
	next    string      // the base that a fetched toolchain has
	sbom    string
	onward  func(ctx context.Context, r build.Request) error // decides how a build ends; nil: well
	prune   func(keep []string) error                        // is told what Prune is to keep; nil: nothing
}

func (p *pretend) Build(ctx context.Context, r build.Request) (build.Result, error) {
	p.mu.Lock()
	p.built = append(p.built, r)
	p.mu.Unlock()
	if p.onward != nil {
		if err := p.onward(ctx, r); err != nil {
			return build.Result{}, err
		}
	}
	return build.Result{Image: "sha256:" + r.Commit + strings.Repeat("0", 24), Basis: p.now}, nil
}
func (p *pretend) Import(context.Context, string, io.Reader) (build.Result, error) {
	return build.Result{}, errors.New("no images here")
}
func (p *pretend) SBOM(context.Context, string) ([]byte, error) {
	return []byte(cmp.Or(p.sbom, "{}")), nil
}
func (p *pretend) Attach(context.Context, string, build.Attachment) error { return nil }
func (p *pretend) Current(context.Context, string) (build.Basis, error)   { return p.now, nil }
func (p *pretend) Fetch(_ context.Context, version string, _ func(string, ...any)) error {
	p.now = build.Basis{Toolchain: version, Base: p.next}
	return nil
}
func (p *pretend) Run(ctx context.Context) error { <-ctx.Done(); return nil }
func (p *pretend) Ready(context.Context) error   { return nil }
func (p *pretend) Prune(_ context.Context, keep []string) error {
	if p.prune != nil {
		return p.prune(keep)
	}
	return nil
}
func (p *pretend) Images() string { return "" }

// commits are what was built, app and commit.
func (p *pretend) commits() []string {
	p.mu.Lock()
	defer p.mu.Unlock()
	var out []string
	for _, r := range p.built {
		out = append(out, r.App+" "+r.Commit)
	}
	return out
}

// memoryDriver is a driver whose calls fail when a test wants it.
type memoryDriver struct {
	*runtimetest.Faulty
	innerDriver
}

// Logs is in both alike.
func (d memoryDriver) Logs(ctx context.Context, r runtime.Ref, lines int, follow bool) iter.Seq2[runtime.Line, error] {
	return d.Faulty.Logs(ctx, r, lines, follow)
}

// innerDriver is one deeper than Faulty, whose methods come first.
type innerDriver struct{ *memory.Driver }

func (innerDriver) Prune(context.Context, []string) error { return nil }

// A works is a daemon whose builds make nothing and whose apps are functions,
// behind a router, all in this process. It has ada and her app.
type works struct {
	t      *testing.T
	cfg    Config
	d      *Daemon
	b      *pretend
	mem    *memory.Driver
	faulty *runtimetest.Faulty // what the daemon takes for its driver
	url    string              // of the router
	client *http.Client
	end    func() // ends the daemon; apps and router go on

	mu      sync.Mutex // guards program
	program memory.Program
}

func newWorks(t *testing.T, change func(*Config)) *works {
	t.Helper()
	need.Program(t, "git")
	dir, err := os.MkdirTemp("", "m3o-works-") // short: it holds sockets
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	w := &works{t: t, b: &pretend{}, program: serveApp, client: &http.Client{Transport: &http.Transport{}}, cfg: Config{Data: dir, HTTP: "127.0.0.1:0", HTTPS: "127.0.0.1:0", SSH: "127.0.0.1:0", Bin: t.TempDir(), Drain: time.Second}}
	if change != nil {
		change(&w.cfg)
	}
	if err := w.cfg.Validate(); err != nil {
		t.Fatal(err)
	}
	w.mem, err = memory.Open(memory.Config{Dir: t.TempDir(), Program: func(ctx context.Context, p memory.Process) int {
		w.mu.Lock()
		program := w.program
		w.mu.Unlock()
		return program(ctx, p)
	}})
	if err != nil {
		t.Fatal(err)
	}
	w.faulty = &runtimetest.Faulty{Driver: w.mem}
	w.open()
	t.Cleanup(func() {
		w.end()
		ctx, stop := context.WithTimeout(context.Background(), time.Minute)
		defer stop()
		if err := w.mem.Shutdown(ctx); err != nil {
			t.Error(err)
		}
	})
	if _, err := w.d.auth.CreateUser(t.Context(), "ada", false); err != nil {
		t.Fatal(err)
	}
	if _, err := w.d.createApp(t.Context(), m3o.App{Name: "app", Owner: "ada"}); err != nil {
		t.Fatal(err)
	}
	return w
}

// serveApp is an app that answers what its release is called, and ends with
// status 3 at /crash, or at /crash?v2 if it is v2.
func serveApp(ctx context.Context, p memory.Process) int {
	if p.Port == 0 {
		<-ctx.Done()
		return 0
	}
	ln, err := p.Listen("tcp", ":"+p.Env("PORT"))
	if err != nil {
		return 1
	}
	crashed := make(chan struct{})
	crash := sync.OnceFunc(func() { close(crashed) })
	srv := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if name := r.URL.RawQuery; r.URL.Path == "/crash" && (name == "" || name == p.Env("M3O_RELEASE")) {
			crash()
		}
		_, _ = io.WriteString(w, p.Env("M3O_RELEASE"))
	})}
	done := make(chan struct{})
	go func() { defer close(done); _ = srv.Serve(ln) }()
	code := 0
	select {
	case <-ctx.Done():
	case <-p.Killed:
	case <-crashed:
		code = 3
	}
	_ = srv.Close()
	<-done
	return code
}

// crashApp is an app that ends at once.
func crashApp(_ context.Context, p memory.Process) int {
	_, _ = io.WriteString(p.Err, "cannot read the config\n")
	return 4
}

// run has what is started from now on run another program.
func (w *works) run(p memory.Program) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.program = p
}

// open starts the daemon and, if there is none, a router, as m3od does.
func (w *works) open() {
	w.t.Helper()
	log := slog.New(slog.DiscardHandler)
	d, err := New(w.t.Context(), w.cfg, "test", log)
	if err != nil {
		w.t.Fatal(err)
	}
	w.d = d
	d.driver, d.builder = memoryDriver{w.faulty, innerDriver{w.mem}}, w.b
	d.driver.OnDrain(d.drainInstance)
	if w.url == "" {
		w.route()
	}
	if d.git, err = gitserver.New(gitserver.Config{Listener: d.ssh, HostKey: d.hostKey, Repos: d.cfg.path("repos"), Users: d.auth, Apps: pushes{d}, Log: log}); err != nil {
		w.t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	for _, run := range []func(context.Context) error{d.routes.run, d.driver.Serve, func(ctx context.Context) error { return d.routes.follow(ctx, d.driver) },
		d.followAsks, d.watchCrashes, d.repos.run} {
		wg.Go(func() {
			if err := run(ctx); err != nil && ctx.Err() == nil {
				w.t.Error(err)
			}
		})
	}
	if err := d.recover(ctx); err != nil {
		w.t.Fatal(err)
	}
	d.settle(ctx)
	d.repos.start()
	w.end = sync.OnceFunc(func() {
		d.bgCancel()
		d.bg.Wait()
		cancel()
		wg.Wait()
		if err := errors.Join(d.auth.Close(), d.store.Close(), d.ssh.Close(), d.api.Close()); err != nil {
			w.t.Error(err)
		}
	})
}

// route starts a router for as long as the test lasts.
func (w *works) route() {
	w.t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		w.t.Fatal(err)
	}
	w.url = "http://" + ln.Addr().String()
	control, err := net.Listen("unix", w.d.controlSocket())
	if err != nil {
		w.t.Fatal(err)
	}
	rt, err := router.New(router.Config{HTTP: ln, Control: control, State: w.cfg.path("router", "table.json"), Version: "test"})
	if err != nil {
		w.t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- rt.Run(ctx) }()
	w.t.Cleanup(func() {
		w.client.CloseIdleConnections()
		cancel()
		if err := <-done; err != nil {
			w.t.Error(err)
		}
	})
}

// commit makes a commit of the plain web app and of files beside it.
func (w *works) commit(files map[string]string) (repo, commit string) {
	w.t.Helper()
	repo, err := w.d.repo(w.t.Context(), "app")
	if err != nil {
		w.t.Fatal(err)
	}
	all := map[string]string{}
	for _, name := range []string{"go.mod", "main.go"} {
		b, err := os.ReadFile(filepath.Join(need.RepoRoot(w.t), "testdata", "apps", "hello-http", name))
		if err != nil {
			w.t.Fatal(err)
		}
		all[name] = string(b)
	}
	all["NOTE"] = fmt.Sprint(len(w.b.commits())) // no two images are the same
	for name, text := range files {
		all[name] = text
	}
	var b bytes.Buffer
	tw := tar.NewWriter(&b)
	for name, text := range all {
		if err := errors.Join(tw.WriteHeader(&tar.Header{Name: name, Mode: 0o644, Size: int64(len(text))}), func() error { _, err := io.WriteString(tw, text); return err }()); err != nil {
			w.t.Fatal(err)
		}
	}
	if err := tw.Close(); err != nil {
		w.t.Fatal(err)
	}
	commit, err = gitserver.CommitTar(w.t.Context(), repo, gitserver.UploadRefs+commit+fmt.Sprint(len(w.b.commits())), "ada", "a change", &b)
	if err != nil {
		w.t.Fatal(err)
	}
	return repo, commit
}

// try deploys the plain web app and files beside it, and gives what the pusher
// reads.
func (w *works) try(files map[string]string) (m3o.Release, string, error) {
	w.t.Helper()
	repo, commit := w.commit(files)
	var out bytes.Buffer
	rel, err := w.d.deployCommit(w.t.Context(), m3o.Source{App: "app", Repo: repo, Commit: commit, User: "ada", Via: "m3o deploy"}, &out)
	return rel, out.String(), err
}

// deploy is try that has to succeed.
func (w *works) deploy(files map[string]string) m3o.Release {
	w.t.Helper()
	rel, out, err := w.try(files)
	if err != nil {
		w.t.Fatalf("deploy: %v (%v)\n%s", err, m3o.HintOf(err), out)
	}
	return rel
}

// get asks the app through the router.
func (w *works) get(path string) (status int, body string, err error) {
	req, err := http.NewRequest("GET", w.url+path, nil)
	if err != nil {
		return 0, "", err
	}
	req.Host = "app.localhost"
	res, err := w.client.Do(req)
	if err != nil {
		return 0, "", err
	}
	defer res.Body.Close() //nolint:errcheck // read whole
	b, err := io.ReadAll(res.Body)
	return res.StatusCode, string(b), err
}

// answers expects the release that serves to be called name.
func (w *works) answers(name string) {
	w.t.Helper()
	if status, body, err := w.get("/"); status != 200 || body != name || err != nil {
		w.t.Errorf("the app answers %d %q, %v, want %s", status, body, err, name)
	}
}

// load asks the app all the time until what it returns is called, and fails
// the test for every request that fails.
func (w *works) load() (stop func()) {
	ctx, cancel := context.WithCancel(w.t.Context())
	var wg sync.WaitGroup
	for range 4 {
		wg.Go(func() {
			for ctx.Err() == nil {
				if status, body, err := w.get("/"); status != 200 || err != nil {
					w.t.Errorf("under load: %d %q, %v", status, body, err)
					return
				}
			}
		})
	}
	return func() { cancel(); wg.Wait() }
}

// until waits for what other goroutines bring about.
func (w *works) until(what string, cond func() bool) {
	w.t.Helper()
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	for deadline := time.Now().Add(2 * time.Minute); !cond(); <-tick.C {
		if time.Now().After(deadline) {
			w.t.Fatalf("no %s within two minutes; there are %v\n%s", what, w.mem.Instances(), w.told())
		}
	}
}

// only waits until nothing runs but what is named, as in "web v1".
func (w *works) only(want ...string) {
	w.t.Helper()
	w.until("end of all but "+strings.Join(want, ", "), func() bool {
		var got []string
		for _, in := range w.mem.Instances() {
			got = append(got, fmt.Sprintf("%s v%d", in.Process, in.Release))
		}
		slices.Sort(got)
		return slices.Equal(got, want)
	})
}

// liveRelease is what is live by the ledger.
func (w *works) liveRelease() m3o.Release {
	w.t.Helper()
	rel, err := w.d.ledger.Live(w.t.Context(), "app")
	if err != nil {
		w.t.Fatal(err)
	}
	return rel
}

// told is what the platform has written into the app's log.
func (w *works) told() string {
	var b strings.Builder
	for ln, err := range w.d.logs.files.Read(context.Background(), runtime.Ref{App: "app"}, 1000, false) {
		if err != nil {
			w.t.Error(err)
			break
		}
		b.WriteString(ln.Text + "\n")
	}
	return b.String()
}

// scale sets how many instances of web are wanted.
func (w *works) scale(n int32) error {
	_, err := scaleAPI{w.d}.Set(w.t.Context(), connect.NewRequest(&m3ov1.SetScaleRequest{App: "app", Changes: []*m3ov1.ScaleChange{{Process: webProcess, Replicas: &n}}}))
	return err
}
