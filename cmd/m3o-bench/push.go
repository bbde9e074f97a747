//go:build linux

package main

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"time"
)

// A sample is an app of testdata/apps whose answer tells its version.
type sample struct {
	name    string
	version *regexp.Regexp // the constant that one line of main.go sets
	path    string         // to ask
	body    string         // JSON, "" for a GET
}

var samples = []sample{
	{"hello-http", regexp.MustCompile(`(?m)^(const version = ").*(")$`), "/", ""},
	{"hello-grpc", regexp.MustCompile(`(?m)^(const greeting = ").*(")$`), "/helloworld.Greeter/Hello", `{"name":"Ada"}`},
}

// A checkout is one app under measurement: its repository, the same tree once
// more for go build on the host, and what it should answer.
type checkout struct {
	b    *bench
	s    sample
	app  string
	repo string // git work tree
	host string // the same files, no repository
	n    int    // versions made
	want string // what the newest version answers with
}

// newCheckout makes an app and its repository, with one commit.
func (b *bench) newCheckout(ctx context.Context, s sample, app string) (*checkout, error) {
	c := &checkout{b: b, s: s, app: app, repo: filepath.Join(b.dir, "work", app), host: filepath.Join(b.dir, "host", app)}
	for _, dir := range []string{c.repo, c.host} {
		if err := os.CopyFS(dir, os.DirFS(filepath.Join(b.root, "testdata", "apps", s.name))); err != nil {
			return nil, err
		}
	}
	for _, args := range [][]string{{"git", "init", "-q", "-b", "main"}, {"git", "remote", "add", "m3o", b.box.remote(app)},
		{b.box.m3o(), "create", app, "--no-remote"}} {
		if _, err := b.box.run(ctx, c.repo, args[0], args[1:]...); err != nil {
			return nil, err
		}
	}
	return c, c.nextVersion(ctx)
}

// nextVersion changes the one line, in both trees, and commits it.
func (c *checkout) nextVersion(ctx context.Context) error {
	c.n++
	c.want = fmt.Sprintf("bench %06d", c.n) // of one length, and none the beginning of another
	for _, dir := range []string{c.repo, c.host} {
		file := filepath.Join(dir, "main.go")
		src, err := os.ReadFile(file)
		if err != nil {
			return err
		}
		next := c.s.version.ReplaceAll(src, []byte("${1}"+c.want+"${2}"))
		if string(next) == string(src) {
			return fmt.Errorf("%s: no line %s to change", file, c.s.version)
		}
		if err := os.WriteFile(file, next, 0o644); err != nil {
			return err
		}
	}
	return c.commit(ctx)
}

func (c *checkout) commit(ctx context.Context) error {
	if _, err := c.b.box.run(ctx, c.repo, "git", "add", "-A"); err != nil {
		return err
	}
	_, err := c.b.box.run(ctx, c.repo, "git", "commit", "-q", "--allow-empty", "-m", c.want)
	return err
}

// binary is where hostBuild leaves what it built.
func (c *checkout) binary() string { return c.host + ".bin" }

// hostBuild is the reference of a push: go build of the same tree here, with
// the flags of the buildpack and a warm cache that nobody else uses. With a
// group, it runs in that, and has a cache and an output of its own there: what
// the other one has built of the same tree must not be found.
func (c *checkout) hostBuild(ctx context.Context, in *tame) (wall, cpu time.Duration, err error) {
	out, cache := c.binary(), "gocache"
	if in != nil {
		out, cache = out+"-tame", "gocache-tame"
	}
	args := []string{"go", "build", "-trimpath", "-buildvcs=false", "-ldflags", "-s -w", "-o", out, "."}
	if in != nil {
		args = in.argv(args...)
	}
	cmd := exec.CommandContext(ctx, args[0], args[1:]...)
	cmd.Dir = c.host
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0", "GOFLAGS=", "GOWORK=off", "GOCACHE="+filepath.Join(c.b.dir, cache))
	began := time.Now()
	said, err := cmd.CombinedOutput()
	wall = time.Since(began)
	if err != nil {
		return 0, 0, fmt.Errorf("go build of %s: %w: %s", c.s.name, err, said)
	}
	return wall, cmd.ProcessState.UserTime() + cmd.ProcessState.SystemTime(), nil
}

// pollEvery is how often an app is asked for a new version: each request takes
// CPU from the start that is waited for, so not as often as could be.
const pollEvery = 10 * time.Millisecond

// answers asks the app once and says whether it is the version wanted.
func (c *checkout) answers(ctx context.Context, want string) (bool, error) {
	got, err := c.b.box.ask(ctx, c.app, c.s.path, c.s.body)
	return strings.Contains(got, want), err
}

// A line is one that the pusher read, and when, counted from the push's start.
type line struct {
	at   time.Duration
	text string
}

// timeline notes when each line of git's output arrives.
type timeline struct {
	began time.Time
	seen  func(text string)

	mu    sync.Mutex // guards what follows
	rest  string
	lines []line
}

// Write takes what git prints. Lines end with a newline or, in progress
// meters, with a carriage return.
func (t *timeline) Write(p []byte) (int, error) {
	at := time.Since(t.began)
	t.mu.Lock()
	defer t.mu.Unlock()
	t.rest += string(p)
	for {
		i := strings.IndexAny(t.rest, "\r\n")
		if i < 0 {
			return len(p), nil
		}
		text := strings.TrimRight(t.rest[:i], " ")
		t.rest = t.rest[i+1:]
		if text != "" {
			t.lines = append(t.lines, line{at, text})
			t.seen(text)
		}
	}
}

// A span is a part of a push, from one step's line to the next one's.
type span struct {
	what string
	took time.Duration
}

var digits = regexp.MustCompile(`\d+`)

// spans cuts a push into what the pusher saw: the time up to the first line,
// each step, and from the release until git has ended. Numbers in a step's
// title are left out, so that the same step of two pushes has one name.
func spans(lines []line, end time.Duration) []span {
	var out []span
	last, what := time.Duration(0), "until the first line: ssh, pack, hook, tree"
	cut := func(at time.Duration, next string) {
		out = append(out, span{what, at - last})
		last, what = at, next
	}
	for _, l := range lines {
		text, remote := strings.CutPrefix(l.text, "remote:")
		if !remote {
			continue
		}
		text = strings.TrimSpace(text)
		if step, ok := strings.CutPrefix(text, "-----> "); ok {
			cut(l.at, "step: "+digits.ReplaceAllString(step, "N"))
		} else if strings.HasPrefix(text, "Released v") {
			cut(l.at, "after “Released”: until git push has ended")
		}
	}
	cut(end, "")
	return out
}

// A pushed is one measured push.
type pushed struct {
	wall   time.Duration // until git has ended
	answer time.Duration // until the app answered with the version wanted, 0 when not asked
	client time.Duration // CPU of git and ssh
	server usage         // CPU of the daemon, the router and the build
	lines  []line
}

// measurePush pushes the repository and, when want is not "", polls the app
// until it answers so. Polling begins when the new instance starts, so that it
// takes nothing from the build.
func (c *checkout) measurePush(ctx context.Context, want string, opts ...string) (pushed, error) {
	var p pushed
	b := c.b.box
	before, err := b.cpu()
	if err != nil {
		return p, err
	}
	starting := make(chan struct{})
	start := sync.OnceFunc(func() { close(starting) })
	cmd := b.command(ctx, c.repo, "git", append(append([]string{"push"}, opts...), "m3o", "main")...)
	t := &timeline{seen: func(text string) {
		if strings.Contains(text, "-----> Starting") {
			start()
		}
	}}
	cmd.Stderr, cmd.Stdout = t, t
	t.began = time.Now()
	if err := cmd.Start(); err != nil {
		return p, err
	}
	ended := make(chan error, 1)
	go func() {
		err := cmd.Wait()
		p.wall = time.Since(t.began)
		start()
		ended <- err
	}()
	var aerr error
	if want != "" {
		select {
		case <-starting:
		case <-ctx.Done():
		}
		aerr = until(ctx, pollEvery, time.Minute, c.app+" to answer "+want, func() (bool, error) {
			select {
			case err := <-ended: // a push that failed will not be answered
				ended <- err
				if err != nil {
					return true, nil
				}
			default:
			}
			ok, err := c.answers(ctx, want)
			p.answer = time.Since(t.began)
			return ok, err
		})
	}
	perr := <-ended
	p.lines = t.lines
	if perr != nil {
		var out strings.Builder
		for _, l := range t.lines {
			fmt.Fprintln(&out, l.text)
		}
		return p, fmt.Errorf("git push of %s: %w:\n%s", c.app, perr, out.String())
	}
	if aerr != nil {
		return p, aerr
	}
	p.client = cmd.ProcessState.UserTime() + cmd.ProcessState.SystemTime()
	after, err := b.cpu()
	p.server = after.minus(before)
	return p, err
}

// settle waits until the release before has drained and n instances run, so
// that what comes next is measured alone.
func (b *bench) settle(ctx context.Context, n int) error {
	return until(ctx, 20*time.Millisecond, time.Minute, fmt.Sprintf("%d instances", n), func() (bool, error) {
		p, err := b.box.parts()
		return err == nil && len(p.shims) == n, err
	})
}

// destroy removes an app and waits until nothing of it runs.
func (b *bench) destroy(ctx context.Context, apps ...string) error {
	for _, app := range apps {
		if _, err := b.box.run(ctx, b.dir, b.box.m3o(), "destroy", app, "--confirm", app); err != nil {
			return err
		}
	}
	return b.settle(ctx, 0)
}

// handshake is the time of a git command that moves nothing: connecting, the
// SSH handshake, and the list of refs.
func (b *bench) handshake(ctx context.Context, url string) (time.Duration, error) {
	began := time.Now()
	_, err := b.box.run(ctx, b.dir, "git", "ls-remote", "-q", url, "HEAD")
	return time.Since(began), err
}
