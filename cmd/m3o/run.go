package main

import (
	"context"
	"errors"
	"io"
	"os"
	"os/signal"
	"regexp"
	"strings"
	"sync"
	"syscall"

	"connectrpc.com/connect"

	m3ov1 "github.com/m3o/m3o/api/m3o/v1"
)

func runCommands() []*command {
	env := flag{"env", "e", "NAME=VALUE", "one more variable for it; may be repeated"}
	process := flag{"process", "p", "TYPE", "run the command of this process type, with its limits; COMMAND follows it as arguments"}
	terminal := []flag{{"tty", "t", "", "give it a terminal also where m3o has half of one"},
		{"no-tty", "T", "", "give it none: stdout and stderr stay apart"},
		{"no-stdin", "", "", "do not send it this command's input"}}
	return []*command{
		{name: "run", group: "Running", args: "[--] COMMAND…", max: -1, app: true, rest: true, run: runRun,
			short: "Run a one-off command in a fresh instance of the live release",
			long: `It has the release's image and the app's config, but no port. In a terminal it gets one too, of the same size; elsewhere input
and both outputs are passed through as they are. The exit status is the command's. Ctrl-C reaches the command; the third one
gives up waiting for it. When this computer goes away, the command is ended.

COMMAND is not run by a shell: the image of a Go app has none.`,
			example: "m3o run -- migrate up\nm3o run -p worker\nm3o run -e DRY_RUN=1 -- cleanup --all < ids.txt",
			flags:   append([]flag{process, env}, terminal...)},
		{name: "run:detached", group: "Running", args: "[--] COMMAND…", max: -1, app: true, rest: true, run: runDetached,
			short:   "Start a one-off command and do not wait for it",
			long:    "It goes on when this computer or the daemon goes away, runs at most once, and logs as the process type that is printed.",
			example: "m3o run:detached -- reindex\nm3o run:logs -f run-x7k2q9",
			flags:   []flag{process, env}},
		{name: "run:list", aliases: []string{"runs"}, group: "Running", args: "[APP]", max: 1, app: true, appArg: true, run: runRuns, completes: "app",
			short: "List the detached commands that run"},
		{name: "run:logs", group: "Running", args: "NAME", min: 1, max: 1, app: true, run: runRunLogs,
			short: "Show what a detached command printed", flags: []flag{{"follow", "f", "", "go on until Ctrl-C"}, {"number", "n", "N", "how many lines (default 100)"}}},
		{name: "run:stop", group: "Running", args: "NAME", min: 1, max: 1, app: true, run: runRunStop,
			short: "End a detached command"},
		{name: "ps:exec", group: "Running", args: "[INSTANCE] -- COMMAND…", min: 1, max: -1, app: true, rest: true, run: runExec,
			short: "Run a command inside an instance that runs",
			long: `Without INSTANCE in one that is ready: of --process, else of web. It shares the instance's limits and ends with it. For all
else see m3o run.`,
			example: "m3o ps:exec -- env\nm3o ps:exec hello-web-v3-x7k2q9 -- /app/hello --check",
			flags:   append([]flag{{"process", "p", "TYPE", "in an instance of this process type"}, env}, terminal...)},
	}
}

// sourceLike is for what Micro runs: a module path with a host, or a directory.
var sourceLike = regexp.MustCompile(`^(https?://|[A-Za-z0-9-]+(\.[A-Za-z0-9-]+)+/)`)

func runRun(ctx context.Context, c *call) error {
	switch {
	case len(c.args) == 0 && !c.has("process"):
		return misuse("which command", "m3o run -- COMMAND, or m3o run -p TYPE")
	case !c.dashed && !c.has("process") && remoteSource(c.args[0]):
		return runRemote(ctx, c)
	case !c.dashed && !c.has("process") && sourceLike.MatchString(c.args[0]):
		return misuse(quoted(c.args[0])+" looks like a source, not like a command", "git push m3o main deploys one; m3o run -- "+quote(c.args[0])+" runs it as a command")
	}
	return c.remote(ctx, &m3ov1.RunRequest{Process: c.value("process"), Args: c.args})
}

func runExec(ctx context.Context, c *call) error {
	req := &m3ov1.RunRequest{Inside: true, Process: c.value("process"), Args: c.args}
	if !c.dashed && len(c.args) > 1 && c.args[1] == "--" {
		req.Instance, req.Args = c.args[0], c.args[2:]
	}
	if len(req.Args) == 0 {
		return misuse("which command", "m3o ps:exec -- COMMAND")
	}
	return c.remote(ctx, req)
}

// environment reads the --env flags.
func (c *call) environment() (map[string]string, error) {
	env := map[string]string{}
	for _, kv := range c.many["env"] {
		k, v, ok := strings.Cut(kv, "=")
		if !ok || k == "" {
			return nil, misuse(quoted(kv)+" is not NAME=VALUE", "")
		}
		env[k] = v
	}
	return env, nil
}

// patience is how many interrupts a command gets before the user's wish not to
// wait for it counts.
const patience = 3

// remote runs a command on the server as if it ran here.
func (c *call) remote(ctx context.Context, first *m3ov1.RunRequest) error {
	var err error
	if first.Env, err = c.environment(); err != nil {
		return err
	}
	app, cl, err := c.withApp(ctx)
	if err != nil {
		return err
	}
	first.App = app
	first.Terminal = c.inTerminal && c.outTerminal
	switch {
	case c.has("no-tty"):
		first.Terminal = false
	case c.has("tty") && !c.inTerminal && !c.outTerminal:
		return misuse("there is no terminal here to give to the command", "")
	case c.has("tty"):
		first.Terminal = true
	}
	if first.Terminal && c.has("json") {
		first.Terminal = false
	}
	// From here on an interrupt is the command's, not ours.
	signals := make(chan os.Signal, 8)
	signal.Notify(signals, os.Interrupt, syscall.SIGTERM, syscall.SIGHUP)
	defer signal.Stop(signals)
	ctx, cancel := context.WithCancel(context.WithoutCancel(ctx))
	defer cancel()
	r := &remoteRun{call: c, stream: cl.runs.Run(ctx)}
	return r.run(cl, first, signals, cancel)
}

// A remoteRun is a command that runs on the server.
type remoteRun struct {
	*call
	mu     sync.Mutex // one message at a time
	stream *connect.BidiStreamForClient[m3ov1.RunRequest, m3ov1.RunResponse]
}

func (r *remoteRun) send(m *m3ov1.RunRequest) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.stream.Send(m)
}

func (r *remoteRun) run(cl *client, first *m3ov1.RunRequest, signals <-chan os.Signal, giveUp func()) error {
	var resized <-chan os.Signal
	if first.Terminal {
		var stop func()
		resized, stop = r.screen.resized()
		defer stop()
		first.Columns, first.Rows = r.size()
	}
	// A failed send is told by Receive, with the reason.
	_ = r.send(first)
	started, err := r.stream.Receive()
	if err != nil {
		return reach(err, cl.target)
	}
	if first.Terminal {
		restore, err := r.screen.raw()
		if err != nil {
			return fail("cannot use this terminal: "+err.Error(), "m3o run --no-tty")
		}
		defer restore()
	} else if r.outTerminal {
		r.say("running in %s of %s", plain(started.GetRelease()), first.GetApp())
	}
	// These two end with the program at the latest: nobody can interrupt a read
	// of stdin.
	if r.has("no-stdin") {
		_ = r.send(&m3ov1.RunRequest{StdinEnd: true})
	} else {
		go r.sendInput()
	}
	end := make(chan struct{})
	defer close(end)
	go func() {
		for n := 0; ; {
			select {
			case <-end:
				return
			case <-resized:
				cols, rows := r.size()
				_ = r.send(&m3ov1.RunRequest{Columns: cols, Rows: rows})
			case sig := <-signals:
				if n++; n == patience {
					giveUp()
					return
				}
				if s, ok := sig.(syscall.Signal); ok {
					// A send may wait for a command that does not read its
					// input; the next interrupt must be heard all the same.
					go func() { _ = r.send(&m3ov1.RunRequest{Signal: int32(s)}) }()
				}
			}
		}
	}()
	for {
		m, err := r.stream.Receive()
		if err != nil {
			if connect.CodeOf(err) == connect.CodeCanceled {
				return fail("given up; the command is being ended", "")
			}
			if errors.Is(err, io.EOF) || connect.CodeOf(err) == connect.CodeUnavailable {
				return &failure{msg: "the connection to the server broke off, so the command is being ended", hint: "m3o run:detached outlives this computer", exit: 1, err: err}
			}
			return reach(err, cl.target)
		}
		for to, b := range map[io.Writer][]byte{r.out: m.GetStdout(), r.err: m.GetStderr()} {
			if len(b) == 0 {
				continue
			}
			if _, err := to.Write(b); err != nil {
				return fail("write output: "+err.Error(), "")
			}
		}
		if m.GetEnded() {
			if m.GetExit() == 0 {
				return nil
			}
			return exitStatus(m.GetExit() & 0xff)
		}
	}
}

// size is that of the terminal, as the API has it.
func (r *remoteRun) size() (columns, rows uint32) {
	c, n := r.screen.size()
	return uint32(max(c, 0)), uint32(max(n, 0))
}

func (r *remoteRun) sendInput() {
	buf := make([]byte, 32<<10)
	for {
		n, err := r.in.Read(buf)
		if n > 0 && r.send(&m3ov1.RunRequest{Stdin: buf[:n]}) != nil {
			return
		}
		if err != nil {
			_ = r.send(&m3ov1.RunRequest{StdinEnd: true})
			return
		}
	}
}

func runDetached(ctx context.Context, c *call) error {
	if len(c.args) == 0 && !c.has("process") {
		return misuse("which command", "m3o run:detached -- COMMAND, or m3o run:detached -p TYPE")
	}
	env, err := c.environment()
	if err != nil {
		return err
	}
	app, cl, err := c.withApp(ctx)
	if err != nil {
		return err
	}
	res, err := ask(ctx, cl.runs.Detach, &m3ov1.DetachRunRequest{App: app, Args: c.args, Process: c.value("process"), Env: env})
	if err != nil {
		return err
	}
	return c.result(res, func() {
		name := plain(res.GetRun().GetName())
		c.print("%s\n", name)
		c.say("started in %s of %s", plain(res.GetRun().GetRelease()), app)
		c.hint("m3o run:logs -f %s -a %s", name, app)
		c.undo("m3o run:stop %s -a %s", name, app)
	})
}

func runRuns(ctx context.Context, c *call) error {
	app, cl, err := c.withApp(ctx)
	if err != nil {
		return err
	}
	res, err := ask(ctx, cl.runs.List, &m3ov1.ListRunsRequest{App: app})
	if err != nil {
		return err
	}
	return c.result(res, func() {
		if len(res.GetRuns()) == 0 {
			c.say("%s runs no detached commands", app)
			return
		}
		var rows [][]string
		for _, r := range res.GetRuns() {
			rows = append(rows, []string{plain(r.GetName()), plain(r.GetRelease()), c.status(plain(r.GetPhase())), c.when(r.GetSince())})
		}
		c.table([]string{"NAME", "RELEASE", "PHASE", "SINCE"}, rows)
	})
}

func runRunStop(ctx context.Context, c *call) error {
	app, cl, err := c.withApp(ctx)
	if err != nil {
		return err
	}
	res, err := ask(ctx, cl.runs.Stop, &m3ov1.StopRunRequest{App: app, Name: c.args[0]})
	if err != nil {
		return err
	}
	return c.result(res, func() { c.say("%s has ended", c.args[0]) })
}

func runRunLogs(ctx context.Context, c *call) error {
	c.set["process"] = c.args[0]
	c.args = nil
	return runLogs(ctx, c)
}
