//go:build linux

package main

import (
	"context"
	"encoding/json"
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
// the flags of the buildpack and a warm cache that nobody else uses.
func (c *checkout) hostBuild(ctx context.Context) (wall, cpu time.Duration, err error) {
	cmd := exec.CommandContext(ctx, "go", "build", "-trimpath", "-ldflags", "-s -w", "-o", c.binary(), ".")
	cmd.Dir = c.host
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0", "GOFLAGS=", "GOWORK=off", "GOCACHE="+filepath.Join(c.b.dir, "gocache"))
	began := time.Now()
	out, err := cmd.CombinedOutput()
	wall = time.Since(began)
	if err != nil {
		return 0, 0, fmt.Errorf("go build of %s: %w: %s", c.s.name, err, out)
	}
	return wall, cmd.ProcessState.UserTime() + cmd.ProcessState.SystemTime(), nil
}

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
	server time.Duration // CPU of the daemon, the router and the build
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
		aerr = until(ctx, 2*time.Millisecond, time.Minute, c.app+" to answer "+want, func() (bool, error) {
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
	p.server = after - before
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

// change measures a one-line change of each sample against go build.
func (b *bench) change(ctx context.Context, sec *section) error {
	for _, s := range samples {
		if err := b.changeOf(ctx, s, sec); err != nil {
			return fmt.Errorf("%s: %w", s.name, err)
		}
	}
	sec.note("The clock runs from the start of `git push` until the new version answers over HTTPS, asked every 2 ms. The reference is " +
		"`CGO_ENABLED=0 go build -trimpath -ldflags \"-s -w\"` of the same tree on this machine with a warm cache of its own; it neither " +
		"transfers, nor packs an image, nor starts anything. Both change the same line of main.go, in turns, each round another one first.")
	sec.note("CPU of m3o is that of daemon, router, buildkitd and the build's processes; the app's own start is not in it.")
	return nil
}

func (b *bench) changeOf(ctx context.Context, s sample, sec *section) error {
	c, err := b.newCheckout(ctx, s, "bench-"+s.name)
	if err != nil {
		return err
	}
	// Both caches are filled by a first build, and warm after a second one.
	for range 2 {
		if _, _, err := c.hostBuild(ctx); err != nil {
			return err
		}
		if _, err := c.measurePush(ctx, c.want); err != nil {
			return err
		}
		if err := c.nextVersion(ctx); err != nil {
			return err
		}
	}
	var answer, wall, host, ratio, over, rest, shake, client, server, hostCPU durations
	var parts breakdown
	for round := range b.rounds {
		if err := b.settle(ctx, 1); err != nil {
			return err
		}
		build := func() error {
			w, cpu, err := c.hostBuild(ctx)
			host.add(w)
			hostCPU.add(cpu)
			return err
		}
		push := func() error {
			p, err := c.measurePush(ctx, c.want)
			answer.add(p.answer)
			wall.add(p.wall)
			client.add(p.client)
			server.add(p.server)
			parts.add(spans(p.lines, p.wall))
			return err
		}
		if err := inTurns(round, build, push); err != nil {
			return err
		}
		h, err := b.handshake(ctx, b.box.remote(c.app))
		if err != nil {
			return err
		}
		shake.add(h)
		a, g := answer.last(), host.last()
		ratio.add(quotient(a, g))
		over.add(a - g*3/2 - 500*time.Millisecond)
		rest.add(a - g)
		b.say("%s: answers after %s, go build %s", s.name, secs(a), secs(g))
		if err := c.nextVersion(ctx); err != nil {
			return err
		}
	}
	sec.add(row{What: s.name + ": one-line change, push → answers", Budget: "≤ 1.5× + 0.5 s", Measured: answer.text(),
		Reference: "go build " + host.text(), Ratio: times(ratio.median()) + ", " + secs(rest.median()) + " more", Met: verdict(over.median() <= 0)})
	t := parts.table(s.name + ": where the time goes")
	t.add("**new version answers**", secs(answer.median()), "counted from the start, as all below")
	t.add("git push has ended", secs(wall.median()), "")
	t.add("for comparison: `git ls-remote`", secs(shake.median()), "ssh connection, handshake and ref list only")
	t.add("CPU of git and ssh", secs(client.median()), "")
	t.add("CPU of m3o", secs(server.median()), fmt.Sprintf("`go build` alone: %s", secs(hostCPU.median())))
	sec.tables = append(sec.tables, t)
	return b.destroy(ctx, c.app)
}

// inTurns runs both, in each round another one first.
func inTurns(round int, a, b func() error) error {
	if round%2 == 1 {
		a, b = b, a
	}
	if err := a(); err != nil {
		return err
	}
	return b()
}

// unchanged measures pushes that build nothing new.
func (b *bench) unchanged(ctx context.Context, sec *section) error {
	c, err := b.newCheckout(ctx, samples[0], "bench-same")
	if err != nil {
		return err
	}
	for range 2 {
		if _, _, err := c.hostBuild(ctx); err != nil {
			return err
		}
		if _, err := c.measurePush(ctx, c.want); err != nil {
			return err
		}
		if err := c.commit(ctx); err != nil {
			return err
		}
	}
	var plain, forced, host, ratio, fratio durations
	var parts, fparts breakdown
	for round := range b.rounds {
		push := func(to, ratio *durations, parts *breakdown, opts ...string) func() error {
			return func() error {
				if err := b.settle(ctx, 1); err != nil {
					return err
				}
				h, _, err := c.hostBuild(ctx)
				if err != nil {
					return err
				}
				if err := c.commit(ctx); err != nil {
					return err
				}
				p, err := c.measurePush(ctx, "", opts...)
				if err != nil {
					return err
				}
				host.add(h)
				to.add(p.wall)
				ratio.add(quotient(p.wall, h))
				parts.add(spans(p.lines, p.wall))
				return nil
			}
		}
		if err := inTurns(round, push(&plain, &ratio, &parts), push(&forced, &fratio, &fparts, "-o", "force-rebuild")); err != nil {
			return err
		}
		b.say("unchanged: %s, with force-rebuild %s", secs(plain.last()), secs(forced.last()))
	}
	sec.add(row{What: "push of an empty commit", Budget: "≤ 1 s", Measured: plain.text(), Reference: "go build, nothing changed, " + host.text(),
		Ratio: times(ratio.median()), Met: verdict(plain.median() <= time.Second)})
	sec.add(row{What: "the same with `-o force-rebuild`", Budget: "≤ 1 s", Measured: forced.text(), Reference: "go build, nothing changed, " + host.text(),
		Ratio: times(fratio.median()), Met: verdict(forced.median() <= time.Second)})
	sec.tables = append(sec.tables, parts.table("Empty commit: where the time goes"), fparts.table("With force-rebuild: where the time goes"))
	sec.note("hello-http with a new, empty commit. The clock stops when `git push` has ended: by then the release is live and its new instance has answered.")
	return b.destroy(ctx, c.app)
}

// rollback measures m3o rollback.
func (b *bench) rollback(ctx context.Context, sec *section) error {
	c, err := b.newCheckout(ctx, samples[0], "bench-back")
	if err != nil {
		return err
	}
	var wants []string // of the two versions, the one that the next rollback leads to first
	for range 2 {
		if err := c.nextVersion(ctx); err != nil {
			return err
		}
		if _, err := c.measurePush(ctx, c.want); err != nil {
			return err
		}
		wants = append(wants, c.want)
	}
	if _, _, err := c.hostBuild(ctx); err != nil {
		return err
	}
	var answer, wall, api, bare, ratio, whoami durations
	for round := range b.rounds {
		if err := b.settle(ctx, 1); err != nil {
			return err
		}
		back := func() error {
			began := time.Now()
			cmd := b.box.command(ctx, b.dir, b.box.m3o(), "rollback", "--json", "-a", c.app)
			var out, errOut strings.Builder
			cmd.Stdout, cmd.Stderr = &out, &errOut
			if err := cmd.Start(); err != nil {
				return err
			}
			var werr error
			took := make(chan time.Duration, 1)
			go func() { werr = cmd.Wait(); took <- time.Since(began) }()
			aerr := until(ctx, 2*time.Millisecond, time.Minute, "the old version to answer", func() (bool, error) {
				return c.answers(ctx, wants[round%2])
			})
			answer.add(time.Since(began))
			wall.add(<-took)
			if werr != nil {
				return fmt.Errorf("m3o rollback: %w: %s", werr, errOut.String())
			}
			if aerr != nil {
				return aerr
			}
			millis, err := rollbackMillis([]byte(out.String()))
			api.add(millis)
			return err
		}
		start := func() error {
			t, err := b.firstAnswer(ctx, c.binary())
			bare.add(t)
			return err
		}
		if err := inTurns(round, back, start); err != nil {
			return err
		}
		ratio.add(quotient(answer.last(), bare.last()))
		began := time.Now()
		if _, err := b.box.run(ctx, b.dir, b.box.m3o(), "whoami"); err != nil {
			return err
		}
		whoami.add(time.Since(began))
		b.say("rollback: answers after %s, the API says %s", secs(answer.last()), secs(api.last()))
	}
	sec.add(row{What: "`m3o rollback` → old version answers", Budget: "≤ 0.3 s", Measured: answer.text(), Reference: "the bare binary's first answer " + bare.text(),
		Ratio: times(ratio.median()), Met: verdict(answer.median() <= 300*time.Millisecond)})
	t := table{title: "Where the time goes", head: []string{"what", "median", "remark"}}
	t.add("**old version answers**", secs(answer.median()), "asked every 2 ms from the start on")
	t.add("`m3o rollback` has ended", secs(wall.median()), "")
	t.add("the API's own figure", secs(api.median()), "new release, new container, health check, switch")
	t.add("for comparison: `m3o whoami`", secs(whoami.median()), "the CLI's start, TLS and one authenticated call")
	t.add("for comparison: the binary on the host", secs(bare.median()), "fork, listen, first HTTP answer")
	sec.tables = append(sec.tables, t)
	sec.note("Two versions of hello-http, rolled back and forth. Each rollback starts a new container of the old image; nothing is kept running for it.")
	return b.destroy(ctx, c.app)
}

// rollbackMillis reads the duration from the answer of the API, in which a
// 64-bit number is a string (protobuf's JSON mapping).
func rollbackMillis(b []byte) (time.Duration, error) {
	var res struct {
		Millis int64 `json:"millis,string"`
	}
	if err := json.Unmarshal(b, &res); err != nil {
		return 0, fmt.Errorf("read answer of m3o rollback: %w", err)
	}
	return time.Duration(res.Millis) * time.Millisecond, nil
}

// firstAnswer starts a web server as a plain process and waits until it answers.
func (b *bench) firstAnswer(ctx context.Context, binary string) (time.Duration, error) {
	s, err := b.startBare(ctx, binary)
	if err != nil {
		return 0, err
	}
	s.stop()
	return s.took, nil
}
