package build

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/m3o/m3o"
	"github.com/m3o/m3o/internal/need"
)

// One Builder serves all tests of the package: making the toolchain layer and
// starting buildkitd take seconds.
var shared struct {
	once sync.Once
	dir  string
	b    *Builder
	err  error
	stop func() error
}

func TestMain(m *testing.M) {
	if dir := os.Getenv(orphanDir); dir != "" {
		beKilled(dir) // see TestOrphanOfAKilledDaemonIsEnded
	}
	code := m.Run()
	if shared.stop != nil {
		if err := shared.stop(); err != nil {
			fmt.Fprintln(os.Stderr, "stop builder:", err)
			code = 1
		}
	}
	if shared.dir != "" {
		if err := os.RemoveAll(shared.dir); err != nil {
			fmt.Fprintln(os.Stderr, err)
			code = 1
		}
	}
	os.Exit(code)
}

func testConfig(t testing.TB, dir string) Config {
	t.Helper()
	need.Root(t)
	cfg := Config{Dir: dir, Buildkitd: need.Bin(t, "buildkitd"), Runc: need.Bin(t, "runc")}
	for name, p := range map[string]*string{"GOPROXY": &cfg.GoProxy, "GOSUMDB": &cfg.GoSumDB, "GOPRIVATE": &cfg.GoPrivate} {
		out, err := exec.Command("go", "env", name).Output()
		if err != nil {
			t.Fatal(err)
		}
		*p = strings.TrimSpace(string(out))
	}
	if os.Getenv("M3O_TEST_LOG") != "" {
		cfg.Log = slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: slog.LevelDebug}))
	}
	return cfg
}

// start runs a Builder; stop ends it and waits.
func start(ctx context.Context, cfg Config) (b *Builder, stop func() error, err error) {
	b, err = Open(ctx, cfg)
	if err != nil {
		return nil, nil, err
	}
	rctx, cancel := context.WithCancel(context.WithoutCancel(ctx))
	done := make(chan error, 1)
	go func() { done <- b.Run(rctx) }()
	stop = func() error { cancel(); return <-done }
	wctx, wcancel := context.WithTimeout(ctx, 2*time.Minute)
	defer wcancel()
	if err := b.Ready(wctx); err != nil {
		return nil, nil, errors.Join(err, errors.Unwrap(err), stop())
	}
	// Builds give way to everything else, and other packages' tests run beside
	// these: without this a busy machine makes minutes of seconds.
	if b.cgroup != nil {
		for _, root := range b.cgroup.roots {
			dir := filepath.Join(root, b.cgroup.name)
			for _, f := range []string{"cpu.shares", "cpu.weight"} {
				if _, err := os.Stat(filepath.Join(dir, f)); err == nil {
					_ = set(dir, f, "4096")
				}
			}
		}
	}
	return b, stop, nil
}

func builder(t testing.TB) *Builder {
	t.Helper()
	cfg := testConfig(t, "")
	shared.once.Do(func() {
		if shared.dir, shared.err = os.MkdirTemp("", "m3o-build-"); shared.err != nil {
			return
		}
		cfg.Dir = shared.dir
		shared.b, shared.stop, shared.err = start(context.Background(), cfg)
	})
	if shared.err != nil {
		t.Fatal(shared.err)
	}
	return shared.b
}

// repo makes a bare repository of files and returns the source of its one commit.
func repo(t testing.TB, files map[string]string) m3o.Source {
	t.Helper()
	return newRepo(t).commit(files)
}

func newRepo(t testing.TB) *testRepo {
	t.Helper()
	r := &testRepo{t: t, work: t.TempDir(), bare: filepath.Join(t.TempDir(), "app.git")}
	r.git("init", "-q", "-b", "main")
	return r
}

type testRepo struct {
	t          testing.TB
	work, bare string
}

func (r *testRepo) git(args ...string) string {
	r.t.Helper()
	cmd := exec.Command("git", args...)
	cmd.Dir = r.work
	cmd.Env = append(os.Environ(), "GIT_CONFIG_GLOBAL=/dev/null", "GIT_CONFIG_NOSYSTEM=1",
		"GIT_AUTHOR_NAME=A", "GIT_AUTHOR_EMAIL=a@example.com", "GIT_COMMITTER_NAME=A", "GIT_COMMITTER_EMAIL=a@example.com",
		"GIT_AUTHOR_DATE=2026-01-02T03:04:05Z", "GIT_COMMITTER_DATE=2026-01-02T03:04:05Z")
	out, err := cmd.CombinedOutput()
	if err != nil {
		r.t.Fatalf("git %v: %v\n%s", args, err, out)
	}
	return strings.TrimSpace(string(out))
}

func (r *testRepo) commit(files map[string]string) m3o.Source {
	r.t.Helper()
	for name, text := range files {
		p := filepath.Join(r.work, name)
		if err := os.MkdirAll(filepath.Dir(p), 0o755); err != nil {
			r.t.Fatal(err)
		}
		if err := os.WriteFile(p, []byte(text), 0o644); err != nil {
			r.t.Fatal(err)
		}
	}
	r.git("add", "-A")
	r.git("commit", "-q", "--allow-empty", "-m", "change")
	if _, err := os.Stat(r.bare); err != nil {
		r.git("clone", "-q", "--bare", ".", r.bare)
	} else {
		r.git("push", "-q", r.bare, "HEAD:main")
	}
	return m3o.Source{App: "app", Repo: r.bare, Commit: r.git("rev-parse", "HEAD")}
}

// push plans and builds a commit.
func push(ctx context.Context, t testing.TB, b *Builder, src m3o.Source) (Result, string, error) {
	t.Helper()
	return build(ctx, t, b, src, func(*Request) {})
}

var hello = map[string]string{
	"go.mod": "module example.com/hello\n\ngo 1.26\n",
	"main.go": `package main

import (
	"fmt"
	"net/http"
	"os"
)

func main() {
	http.HandleFunc("/", func(w http.ResponseWriter, r *http.Request) { fmt.Fprintln(w, "hello") })
	fmt.Println(http.ListenAndServe(":"+os.Getenv("PORT"), nil))
}
`,
}
