package daemon

import (
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"sync"
	"syscall"

	"connectrpc.com/connect"

	"github.com/m3o/m3o"
	m3ov1 "github.com/m3o/m3o/api/m3o/v1"
	"github.com/m3o/m3o/runtime"
)

type runsAPI struct{ d *Daemon }

// Run serves one command. The permission was asked when the first message
// came; what the others say of an app counts for nothing.
func (a runsAPI) Run(ctx context.Context, s *connect.BidiStream[m3ov1.RunRequest, m3ov1.RunResponse]) error {
	first, err := s.Receive()
	if errors.Is(err, io.EOF) {
		return m3o.Errorf(m3o.Invalid, "no message says what to run")
	} else if err != nil {
		return err
	}
	run, label, err := a.prepare(ctx, first)
	if err != nil {
		return err
	}
	if err := s.Send(&m3ov1.RunResponse{Release: label}); err != nil {
		return err
	}
	out := &runOutput{s: s}
	in := newRunInput(first.Terminal)
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	// Nobody waits for this goroutine: it ends when the request does, which is
	// right after this handler returns.
	go func() {
		defer cancel() // a client that is gone wants nothing run; one that only has no more input stays
		in.take(first)
		for {
			m, err := s.Receive()
			if errors.Is(err, io.EOF) {
				in.end()
				<-ctx.Done()
				return
			}
			if err != nil {
				return
			}
			in.take(m)
		}
	}()
	defer in.close()
	cmd := runtime.Cmd{Args: first.Args, In: in.stdin, Out: out.to(false), Err: out.to(true), Signals: in.signals}
	if first.Terminal {
		cmd.Resize = in.sizes
	}
	code, err := run(ctx, cmd)
	if err != nil {
		return err
	}
	return out.send(&m3ov1.RunResponse{Ended: true, Exit: int32(code)})
}

// prepare finds where the command of a first message runs. The command is
// started by the function it returns.
func (a runsAPI) prepare(ctx context.Context, m *m3ov1.RunRequest) (run func(context.Context, runtime.Cmd) (int, error), release string, err error) {
	d := a.d
	if m.Inside {
		in, err := d.insideOf(m.App, m.Process, m.Instance)
		if err != nil {
			return nil, "", err
		}
		if len(m.Args) == 0 {
			return nil, "", &m3o.Error{Kind: m3o.Invalid, Msg: "there is no command to run", Hint: "m3o ps:exec -- COMMAND"}
		}
		var env []string
		for k, v := range m.Env {
			env = append(env, k+"="+v)
		}
		d.log.Info("command in an instance", "app", m.App, "instance", in.ID, "user", who(ctx).User)
		return func(ctx context.Context, c runtime.Cmd) (int, error) {
			c.Env = env
			return d.driver.Exec(ctx, in.ID, c)
		}, m3o.Release{Version: in.Release}.Name(), nil
	}
	w, err := d.oneOff(ctx, m.App, m.Process, m.Args, m.Env)
	if err != nil {
		return nil, "", err
	}
	end, err := d.runs.begin(w.App, w.Image, len(d.detached(m.App)))
	if err != nil {
		return nil, "", err
	}
	d.log.Info("one-off command", "app", m.App, "release", w.Release, "user", who(ctx).User)
	return func(ctx context.Context, c runtime.Cmd) (int, error) {
		defer end()
		c.Args = w.Args
		return d.driver.Run(ctx, w, c)
	}, m3o.Release{Version: w.Release}.Name(), nil
}

// insideOf chooses the instance for ps:exec: the named one, else a ready one
// of the process type, web if none is named.
func (d *Daemon) insideOf(app, process, id string) (m3o.Instance, error) {
	all := d.routes.list(app)
	if id != "" {
		i := slices.IndexFunc(all, func(in m3o.Instance) bool { return in.ID == id })
		if i < 0 { // another app's is none of theirs to know of
			return m3o.Instance{}, &m3o.Error{Kind: m3o.NotFound, Msg: fmt.Sprintf("%s has no instance %s", app, id), Hint: "m3o ps -a " + app}
		}
		return all[i], nil
	}
	for _, want := range []string{process, webProcess} {
		for _, in := range all {
			if want != "" && in.Process == want && in.Phase == m3o.Ready {
				return in, nil
			}
		}
		if process != "" {
			break
		}
	}
	if process == "" {
		for _, in := range all { // an app of workers only
			if in.Phase == m3o.Ready && !isRun(in.Process) {
				return in, nil
			}
		}
	}
	return m3o.Instance{}, &m3o.Error{Kind: m3o.Unavailable, Msg: fmt.Sprintf("no instance of %s is ready", strings.TrimSpace(app+" "+process)),
		Hint: "m3o ps -a " + app + "; m3o run starts a fresh one"}
}

// Detach is in run.proto.
func (a runsAPI) Detach(ctx context.Context, req *connect.Request[m3ov1.DetachRunRequest]) (*connect.Response[m3ov1.DetachRunResponse], error) {
	m := req.Msg
	w, err := a.d.oneOff(ctx, m.App, m.Process, m.Args, m.Env)
	if err != nil {
		return nil, err
	}
	if w, err = a.d.detach(ctx, w); err != nil {
		return nil, err
	}
	a.d.log.Info("detached command", "app", m.App, "release", w.Release, "run", w.Process, "user", who(ctx).User)
	return connect.NewResponse(&m3ov1.DetachRunResponse{Run: &m3ov1.DetachedRun{Name: w.Process,
		Release: m3o.Release{Version: w.Release}.Name(), Phase: string(m3o.Starting)}}), nil
}

// List is in run.proto.
func (a runsAPI) List(_ context.Context, req *connect.Request[m3ov1.ListRunsRequest]) (*connect.Response[m3ov1.ListRunsResponse], error) {
	res := &m3ov1.ListRunsResponse{}
	for _, in := range a.d.detached(req.Msg.App) {
		res.Runs = append(res.Runs, &m3ov1.DetachedRun{Name: in.Process, Release: m3o.Release{Version: in.Release}.Name(),
			Phase: string(in.Phase), Since: stamp(in.At), Instance: in.ID})
	}
	return connect.NewResponse(res), nil
}

// Stop is in run.proto.
func (a runsAPI) Stop(ctx context.Context, req *connect.Request[m3ov1.StopRunRequest]) (*connect.Response[m3ov1.StopRunResponse], error) {
	for _, in := range a.d.detached(req.Msg.App) {
		if in.Process == req.Msg.Name {
			if err := a.d.driver.Stop(ctx, refOf(in)); err != nil {
				return nil, err
			}
			return connect.NewResponse(&m3ov1.StopRunResponse{}), nil
		}
	}
	return nil, &m3o.Error{Kind: m3o.NotFound, Msg: fmt.Sprintf("no command %q of %s runs", req.Msg.Name, req.Msg.App), Hint: "m3o run:list -a " + req.Msg.App}
}

// runInput hands what a client's messages carry to a command.
type runInput struct {
	stdin   *io.PipeReader
	feed    *io.PipeWriter
	sizes   chan [2]uint16
	signals chan syscall.Signal
}

func newRunInput(terminal bool) *runInput {
	in := &runInput{signals: make(chan syscall.Signal, 8)}
	in.stdin, in.feed = io.Pipe()
	if terminal {
		in.sizes = make(chan [2]uint16, 8)
	}
	return in
}

// passable are the signals that a client may have sent: those a terminal or a
// service manager sends, and the two for users.
var passable = []syscall.Signal{syscall.SIGHUP, syscall.SIGINT, syscall.SIGQUIT, syscall.SIGUSR1, syscall.SIGUSR2, syscall.SIGTERM}

// take passes one message on. It waits while the command does not read.
func (in *runInput) take(m *m3ov1.RunRequest) {
	if m.Columns > 0 && m.Rows > 0 && in.sizes != nil {
		select {
		case in.sizes <- [2]uint16{uint16(min(m.Columns, 9999)), uint16(min(m.Rows, 9999))}:
		default: // nobody reads: it has ended, or has eight to read
		}
	}
	if sig := syscall.Signal(m.Signal); slices.Contains(passable, sig) {
		select {
		case in.signals <- sig:
		default:
		}
	}
	if len(m.Stdin) > 0 {
		_, _ = in.feed.Write(m.Stdin) // fails once the command has ended
	}
	if m.StdinEnd {
		in.end()
	}
}

// end tells the command that there is no more input.
func (in *runInput) end() { _ = in.feed.Close() }

// close lets go of who waits in take.
func (in *runInput) close() { _ = in.stdin.Close() }

// runOutput sends a command's two streams over one connection.
type runOutput struct {
	mu sync.Mutex // one message at a time
	s  *connect.BidiStream[m3ov1.RunRequest, m3ov1.RunResponse]
}

func (o *runOutput) send(m *m3ov1.RunResponse) error {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.s.Send(m)
}

func (o *runOutput) to(stderr bool) io.Writer { return runStream{o, stderr} }

type runStream struct {
	*runOutput
	stderr bool
}

func (w runStream) Write(p []byte) (int, error) {
	m := &m3ov1.RunResponse{Stdout: p}
	if w.stderr {
		m = &m3ov1.RunResponse{Stderr: p}
	}
	if err := w.send(m); err != nil {
		return 0, err
	}
	return len(p), nil
}
