package gitserver

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"sync"

	"github.com/gliderlabs/ssh"

	"github.com/m3o/m3o"
)

// A session is one command a client asked to run.
type session struct {
	s      *Server
	conn   *conn
	ch     *channel
	sess   ssh.Session
	stderr *syncWriter // of the client's ssh, which shows it as it is
	user   string
}

// A syncWriter lets several goroutines write; the library's must not.
type syncWriter struct {
	mu sync.Mutex
	w  io.Writer
}

func (s *syncWriter) Write(p []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.w.Write(p)
}

// newlines is for a client in a terminal, where a line feed alone is only half
// a line end.
type newlines struct{ w io.Writer }

func (n newlines) Write(p []byte) (int, error) {
	_, err := n.w.Write(bytes.ReplaceAll(p, []byte("\n"), []byte("\r\n")))
	return len(p), err
}

var errInternal = errors.New("internal") // any error without a Kind is told as internal

// tell writes err as the pusher reads it. What is Internal stays in the log.
func tell(w io.Writer, err error) {
	msg, hint := err.Error(), m3o.HintOf(err)
	if m3o.KindOf(err) == m3o.Internal {
		msg, hint = "internal error; see the daemon's log", ""
	} else if e, ok := errors.AsType[*m3o.Error](err); ok {
		msg = e.Msg
	}
	if l, ok := w.(interface{ endLine() }); ok {
		l.endLine()
	}
	_, _ = fmt.Fprintf(w, " !     %s\n", scrub(msg))
	if hint != "" {
		_, _ = fmt.Fprintf(w, " !     %s\n", scrub(hint))
	}
}

// refuse tells the client why, logs what it must not read, and returns the exit code.
func (x *session) refuse(doing string, err error) int {
	if m3o.KindOf(err) == m3o.Internal {
		x.s.log.Error(doing, "user", x.user, "err", err)
	}
	tell(x.stderr, err)
	return 1
}

// run runs the session's command and returns its exit code.
func (x *session) run(ctx context.Context) int {
	user, key, err := x.authenticated(ctx)
	if err != nil {
		if m3o.KindOf(err) == m3o.NotFound {
			err = &m3o.Error{Kind: m3o.Denied, Msg: "this key is no longer known here", Err: err}
		}
		return x.refuse("identify ssh key", err)
	}
	x.user = user
	if err := x.s.begin(key); err != nil {
		return x.refuse("start session", err)
	}
	defer x.s.finish(key)
	cmd, err := parseCommand(x.sess.RawCommand())
	if err != nil {
		return x.refuse("parse command", err)
	}
	switch cmd.verb {
	case verbHello:
		var out io.Writer = x.sess
		if x.ch.term != nil {
			out = newlines{x.sess}
		}
		_, _ = fmt.Fprintf(out, "Hello %s! Your key is known here. m3o gives no shell; deploy with: git push m3o main\n", scrub(user))
		return 0
	case verbReceive:
		return x.receive(ctx, cmd.app)
	case verbUpload:
		return x.upload(ctx, cmd.app)
	case verbArchive:
		return x.refuse("", &m3o.Error{Kind: m3o.Invalid, Msg: "git archive --remote is not supported", Hint: "clone the repository and archive that"})
	case verbLFS:
		return x.refuse("", &m3o.Error{Kind: m3o.Invalid, Msg: "Git LFS is not supported here",
			Hint: "push without it (GIT_LFS_SKIP_PUSH=1 git push …), or keep the files in git itself: git lfs migrate export"})
	}
	if x.s.cfg.Commands == nil {
		return x.refuse("", &m3o.Error{Kind: m3o.Invalid, Msg: fmt.Sprintf("%q is not available over ssh here", cmd.args[0]),
			Hint: "this address takes git push, git fetch and git clone"})
	}
	exit := x.s.cfg.Commands.Run(ctx, user, cmd.args, x.ch.term, x.sess, x.ch.raw, x.stderr)
	if exit < 0 || exit > 255 {
		exit = 1
	}
	return exit
}

// upload serves git fetch and git clone.
func (x *session) upload(ctx context.Context, app string) int {
	branch, err := x.s.cfg.Apps.Access(ctx, x.user, app, false)
	if err != nil {
		return x.refuse("fetch from "+app, err)
	}
	repo, err := x.s.ensureRepo(ctx, app, branch)
	if err != nil {
		return x.refuse("fetch from "+app, err)
	}
	args := []string{
		"-c", "uploadpack.allowFilter=true",
		// A client that neither sends nor reads for this long is gone.
		"upload-pack", "--strict", fmt.Sprintf("--timeout=%d", int(x.s.lim.Receive.Seconds())+1), ".",
	}
	c, err := x.s.startGit(repo, x.gitProtocol(), nil, args...)
	if err != nil {
		return x.refuse("start git upload-pack", err)
	}
	x.ch.work.Go(func() { c.feed(x.sess) })
	c.pump(x.sess, x.stderr, nil)
	select {
	case <-c.exited:
	case <-ctx.Done():
		c.stop(0)
	}
	x.settle(c)
	return c.exitCode()
}

// gitProtocol is the environment for the protocol version the client asked for.
func (x *session) gitProtocol() []string {
	for _, kv := range x.sess.Environ() {
		if v, ok := cutEnv(kv, "GIT_PROTOCOL"); ok && validProtocol(v) {
			return []string{"GIT_PROTOCOL=" + v}
		}
	}
	return nil
}

// settle waits for what git wrote to reach the client. One that does not read
// it for Limits.Stalled loses its connection: closing the channel would not
// free the writer, because that waits for the client's answer.
func (x *session) settle(c *child) {
	if !c.delivered(x.s.lim.Stalled) {
		x.s.log.Debug("ssh client stopped reading", "user", x.user)
		_ = x.conn.Close()
		c.delivered(0)
	}
}
