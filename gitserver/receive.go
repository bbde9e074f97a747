package gitserver

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/m3o/m3o"
)

// A push is one git receive-pack with the conversation of its hooks.
//
//	client ──ssh──▶ feed (reads the header) ──▶ receive-pack ──▶ client
//	                                              │ pre-receive: 3 ▶ policy, objects, Deploy; ◀ 4 text, ◀ 5 verdict
//	                                              │ moves the refs
//	                                              │ post-receive: 6 ▶ Done; ◀ 7 text
type push struct {
	*session
	policy
	dir    string // the repository
	ctx    context.Context
	cancel context.CancelCauseFunc

	state  atomic.Int32 // undecided → accepted | aborted; who changes it decides
	header chan headerResult
	known  *headerResult // what was read from header; see peek
	git    *child
	ours   [5]*os.File // ends of the hook pipes, by descriptor-3
	tap    tap
	timer  *time.Timer // for Limits.Receive; stopped by the hook

	// Set by converse, read after it has ended.
	called bool        // pre-receive was
	kill   *time.Timer // ends a git that hangs after it was told to go on
}

type headerResult struct {
	header
	err error
}

const (
	undecided int32 = iota
	accepted
	aborted
)

var (
	errStuck = errors.New("the client stopped reading")
	errSlow  = &m3o.Error{Kind: m3o.Invalid, Msg: "the push took too long to arrive", Hint: "push less at a time: git push m3o <older commit>:refs/heads/parts"}
)

// receive serves git push.
func (x *session) receive(ctx context.Context, app string) int {
	branch, err := x.s.cfg.Apps.Access(ctx, x.user, app, true)
	if err != nil {
		return x.refuse("push to "+app, err)
	}
	p := &push{session: x, policy: policy{app: app, branch: branch, lim: x.s.lim}, header: make(chan headerResult, 1)}
	p.ctx, p.cancel = context.WithCancelCause(ctx)
	defer p.cancel(nil)
	if err := x.s.share(p.ctx, p); err != nil {
		return x.refuse("push to "+app, err)
	}
	clean := false
	defer func() { x.s.unshare(p, clean) }()
	if p.dir, err = x.s.ensureRepo(ctx, app, branch); err != nil {
		return x.refuse("push to "+app, err)
	}
	if err := p.start(); err != nil {
		return x.refuse("start git receive-pack", err)
	}
	code := p.run()
	clean = code == 0
	return code
}

func (p *push) start() error {
	var theirs []*os.File
	for i := range p.ours {
		r, w, err := os.Pipe()
		if err != nil {
			for _, f := range append(theirs, p.ours[:i]...) {
				_ = f.Close()
			}
			return fmt.Errorf("make pipe: %w", err)
		}
		if i == 0 || i == 3 { // descriptors 3 and 6 speak to us
			p.ours[i], theirs = r, append(theirs, w)
		} else {
			p.ours[i], theirs = w, append(theirs, r)
		}
	}
	args := []string{}
	for _, c := range []string{
		"receive.fsckObjects=true",
		// As GitLab does: faults of old gits that harm nobody and that many a
		// long history has.
		"receive.fsck.badTimezone=ignore", "receive.fsck.missingSpaceBeforeDate=ignore", "receive.fsck.zeroPaddedFilemode=ignore",
		fmt.Sprintf("receive.maxInputSize=%d", p.lim.Pack),
		"receive.advertisePushOptions=true", "receive.advertiseAtomic=true",
		"receive.shallowUpdate=true",
		"receive.autogc=false", "receive.denyDeleteCurrent=ignore", "receive.denyCurrentBranch=ignore",
	} {
		args = append(args, "-c", c)
	}
	var err error
	p.git, err = p.s.startGit(p.dir, p.gitProtocol(), theirs, append(args, "receive-pack", ".")...)
	if err != nil {
		for _, f := range p.ours {
			_ = f.Close()
		}
	}
	return err
}

// run sees the push through and returns git's exit code.
func (p *push) run() int {
	p.timer = time.AfterFunc(p.lim.Receive, func() { p.cancel(errSlow) })
	defer p.timer.Stop()
	p.ch.work.Go(p.feed)
	p.git.pump(p.sess, p.stderr, &p.tap)
	talk := make(chan struct{})
	go func() {
		defer close(talk)
		p.converse()
	}()
	select {
	case <-p.git.exited:
	case <-p.ctx.Done():
		// Once accepted, git moves the refs with or without a client.
		if p.state.CompareAndSwap(undecided, aborted) || p.state.Load() == aborted {
			p.git.stop(killGrace)
		}
		<-p.git.exited
	}
	// An orphan of a killed git may hold the other ends a moment longer.
	_ = p.ours[0].SetReadDeadline(time.Now().Add(killGrace))
	_ = p.ours[3].SetReadDeadline(time.Now().Add(killGrace))
	<-talk
	if p.kill != nil {
		p.kill.Stop()
	}
	p.settle(p.git)
	if !p.called {
		p.explain()
		p.checkBypass()
	}
	return p.git.exitCode()
}

// feed gives git what the client sends, after a look at its header.
func (p *push) feed() {
	h, err := readHeader(p.sess, p.git.in)
	p.header <- headerResult{h, err}
	if err != nil {
		_ = p.git.in.Close() // git ends; what it says, and explain, tell why
		_, _ = io.Copy(io.Discard, p.sess)
		return
	}
	p.git.feed(p.sess)
}

// converse talks with the hooks, until git has ended or has nothing to say.
func (p *push) converse() {
	defer func() {
		for _, f := range p.ours {
			_ = f.Close()
		}
	}()
	call, err := readPreReceive(p.ours[0])
	if err != nil {
		if !errors.Is(err, io.EOF) && !errors.Is(err, os.ErrDeadlineExceeded) && p.ctx.Err() == nil {
			p.s.log.Error("read pre-receive hook", "app", p.app, "user", p.user, "err", err)
		}
		return
	}
	p.called = true
	p.timer.Stop()
	// A forged end makes the hook say more than was read: it must neither block
	// nor die of it, or the pusher would not learn why.
	drained := make(chan struct{})
	go func() {
		defer close(drained)
		_, _ = io.Copy(io.Discard, p.ours[0])
	}()
	defer func() { _ = p.ours[0].Close(); <-drained }()
	defer func() { <-p.git.exited }()
	h := <-p.header // git has read it, so it is there
	p.known = &h

	out := &lineWriter{w: p.ours[1], pipe: p.ours[1], stall: p.lim.Stalled, stalled: func() { p.cancel(errStuck) }}
	decided := make(chan decision, 1)
	go func() { decided <- p.decide(p.ctx, h, call, out) }()
	var d decision
	select {
	case d = <-decided:
		if d.accept {
			d.accept = p.state.CompareAndSwap(undecided, accepted)
		}
		if !d.accept && p.ctx.Err() != nil {
			p.last(out)
		}
		_ = out.Close()
		p.kill = time.AfterFunc(2*p.lim.Finish, func() { p.git.signal(syscall.SIGKILL) })
		p.verdict(d.accept)
	case <-p.ctx.Done():
		// git is told at once; the deploy stops in its own time.
		p.state.CompareAndSwap(undecided, aborted)
		p.last(out)
		_ = out.Close()
		p.verdict(false)
		d = <-decided
		d.accept = false
	}
	if !d.accept {
		p.done(d, false, io.Discard)
		return
	}
	p.farewell(h.header, d)
}

// last tells the pusher, if there still is one, why its push was stopped.
func (p *push) last(out *lineWriter) {
	out.hurry(time.Second)
	if why := context.Cause(p.ctx); !errors.Is(why, errGone) && !errors.Is(why, errStuck) {
		tell(out, why)
	}
}

func (p *push) verdict(accept bool) {
	code := "1\n"
	if accept {
		code = "0\n"
	}
	_, _ = io.WriteString(p.ours[2], code)
	_ = p.ours[2].Close()
}

// farewell ends an accepted push: what moved is known from the post-receive
// hook or, when git ended without calling it, from the ref itself.
func (p *push) farewell(h header, d decision) {
	moved, err := readPostReceive(p.ours[3])
	if err == nil {
		out := &lineWriter{w: p.ours[4], pipe: p.ours[4], stall: p.lim.Stalled}
		defer out.Close() //nolint:errcheck // the pusher may be gone
		p.done(d, slices.Contains(moved, d.update), mute{out})
		p.note(mute{out}, h, moved)
		return
	}
	<-p.git.exited
	if d.deployment == nil {
		return
	}
	tip, err := Tip(context.WithoutCancel(p.ctx), p.dir, p.deployRef())
	if err != nil {
		p.s.log.Error("read branch after push", "app", p.app, "err", err)
	}
	// git's own words end at the pusher's terminal with this prefix.
	out := &lineWriter{w: p.stderr, prefix: "remote: "}
	defer out.Close() //nolint:errcheck // the pusher may be gone
	p.done(d, err == nil && tip == d.update.new, mute{out})
}

// mute keeps the loss of the pusher from what can no longer be stopped.
type mute struct{ *lineWriter }

func (m mute) Write(b []byte) (int, error) {
	_, _ = m.lineWriter.Write(b)
	return len(b), nil
}

// done closes the deployment, if there is one.
func (p *push) done(d decision, moved bool, out io.Writer) {
	if d.deployment == nil {
		return
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(p.ctx), p.lim.Finish)
	defer cancel()
	defer p.s.recovered("deployment", func() { tell(out, errInternal) })
	if err := d.deployment.Done(ctx, moved, out); err != nil {
		p.s.log.Error("finish deployment", "app", p.app, "user", p.user, "moved", moved, "err", err)
		tell(out, err)
	}
}

// note says what became of the refs that do not deploy.
func (p *push) note(out io.Writer, h header, moved []update) {
	for _, u := range moved {
		short, isBranch := strings.CutPrefix(u.ref, "refs/heads/")
		short = strings.TrimPrefix(short, "refs/tags/")
		switch {
		case u.new == "":
		case u.ref == p.deployRef():
			if slices.Contains(h.options, optNoDeploy) {
				_, _ = fmt.Fprintf(out, "-----> Pushed %s without a deploy, as -o %s asks\n", short, optNoDeploy)
			}
		case isBranch:
			_, _ = fmt.Fprintf(out, "-----> Pushed %s; only %s deploys. To deploy it: git push m3o %s:%s\n", short, p.branch, short, p.branch)
		default:
			_, _ = fmt.Fprintf(out, "-----> Pushed tag %s; only %s deploys. To deploy it: git push m3o %s^{}:refs/heads/%s\n", short, p.branch, short, p.branch)
		}
	}
}

// A decision is what pre-receive is answered. deployment may be set although
// the push is refused: it is then closed as not moved.
type decision struct {
	accept     bool
	update     update // that deploys
	deployment Deployment
}

// decide checks the push and deploys it. A refusal was told to out.
func (p *push) decide(ctx context.Context, h headerResult, call hookCall, out *lineWriter) (d decision) {
	defer p.s.recovered("push", func() { tell(out, errInternal); d = decision{} })
	d, err := p.deployIfSound(ctx, h, call, out)
	if err != nil {
		if ctx.Err() != nil {
			return decision{} // last tells
		}
		if m3o.KindOf(err) == m3o.Internal {
			p.s.log.Error("push", "app", p.app, "user", p.user, "err", err)
		}
		tell(out, err)
		return decision{}
	}
	return d
}

func (p *push) deployIfSound(ctx context.Context, h headerResult, call hookCall, out io.Writer) (decision, error) {
	if h.err != nil {
		return decision{}, h.err
	}
	if err := p.check(h.header); err != nil {
		return decision{}, err
	}
	if !slices.Equal(h.updates, call.updates) {
		return decision{}, fmt.Errorf("git speaks of other refs (%v) than the client (%v)", call.updates, h.updates)
	}
	u, ok := p.deploy(h.header)
	if !ok {
		return decision{accept: true}, nil
	}
	if err := p.foresee(ctx, h.header, u, call); err != nil {
		return decision{}, err
	}
	src := m3o.Source{
		App: p.app, Repo: p.dir, Ref: u.ref, Old: u.old, Commit: u.new,
		User: p.user, Via: "git push", Options: slices.Clone(h.options),
	}
	if call.quarantine != "" {
		src.Quarantine = p.objects(call.quarantine)
	}
	dep, err := p.s.cfg.Apps.Deploy(ctx, src, out)
	if err != nil {
		return decision{}, err
	}
	if dep == nil {
		return decision{}, errors.New("deploy returned neither a deployment nor an error")
	}
	return decision{accept: true, update: u, deployment: dep}, nil
}

func (p *push) objects(quarantine string) string { return p.dir + "/objects/" + quarantine }
