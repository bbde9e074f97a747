package daemon

import (
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"strings"
	"time"

	"github.com/m3o/m3o"
	"github.com/m3o/m3o/gitserver"
	"github.com/m3o/m3o/release"
	"github.com/m3o/m3o/webhook"
	"github.com/m3o/m3o/webhook/forge"
)

// An attempt is the last commit of a ref that a deploy was tried with: one
// that ended is not built again because the forge tells of it again.
type attempt struct {
	Ref    string
	Commit string
	State  string // "building", "live", "failed", "skipped" …
	At     time.Time
	Note   string // why it was skipped
}

func attemptKey(app, ref string) string {
	sum := sha256.Sum256([]byte(ref)) // a ref can be longer than a key
	return app + "/" + hex.EncodeToString(sum[:12])
}

// A hookTurn orders the deploys of one app that deliveries cause: a newer one
// ends the one before it, waits until that has ended, and goes on.
type hookTurn struct {
	before *hookTurn
	cancel context.CancelCauseFunc
	ctx    context.Context //nolint:containedctx // it is what the newer turn ends
	done   chan struct{}
}

// turn takes the place of the app's newest deploy. It is called in the order
// of the deliveries.
func (r *repos) turn(app string) *hookTurn {
	t := &hookTurn{done: make(chan struct{})}
	t.ctx, t.cancel = context.WithCancelCause(context.Background())
	r.mu.Lock()
	defer r.mu.Unlock()
	if t.before = r.turns[app]; t.before != nil {
		t.before.cancel(errSuperseded)
	}
	r.turns[app] = t
	return t
}

func (r *repos) endTurn(app string, t *hookTurn) {
	close(t.done)
	t.cancel(nil)
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.turns[app] == t {
		delete(r.turns, app)
	}
}

// nothing ends a delivery that asks for no deploy.
func nothing(format string, args ...any) (webhook.Result, func(context.Context) (webhook.Result, error), error) {
	return webhook.Result{State: webhook.Ignored, Note: fmt.Sprintf(format, args...)}, nil, nil
}

type longWork = func(context.Context) (webhook.Result, error)

// work decides and does what one delivery asks. It is the queue's Work.
func (r *repos) work(ctx context.Context, d webhook.Delivery) (webhook.Result, longWork, error) {
	c, err := r.byHook(ctx, d.Hook)
	if m3o.KindOf(err) == m3o.NotFound {
		return nothing("the repository is connected no more")
	} else if err != nil {
		return webhook.Result{}, nil, err
	}
	if err := r.follow(ctx, &c, d.Event); err != nil {
		return webhook.Result{}, nil, err
	}
	var notes []string
	var longs []longWork
	for _, a := range webhook.Decide(d.Event, webhook.Rules{Repo: c.Name, Branch: c.Branch, Previews: c.Previews, Branches: c.Branches}) {
		var res webhook.Result
		var long longWork
		var err error
		switch a.Do {
		case webhook.Deploy:
			res, long, err = r.deploy(ctx, &c, d, a)
		case webhook.Preview:
			res, long, err = r.preview(ctx, &c, d, a)
		case webhook.Remove:
			res, long, err = r.remove(&c, a)
		default:
			res = webhook.Result{Note: a.Why}
			err = r.branchGone(ctx, &c, d)
		}
		if err != nil {
			if k := m3o.KindOf(err); k == m3o.Denied || k == m3o.NotFound {
				r.problem(ctx, c.App, problemWords(err))
			} else if k == m3o.Unavailable && d.Tries > 1 {
				r.problem(ctx, c.App, problemWords(err))
			}
			return res, nil, err
		}
		if long != nil {
			longs = append(longs, long)
		} else if res.Note != "" {
			notes = append(notes, res.Note)
		}
	}
	if len(longs) == 0 {
		return webhook.Result{State: webhook.Ignored, Note: strings.Join(notes, "; ")}, nil, nil
	}
	return webhook.Result{}, func(ctx context.Context) (webhook.Result, error) {
		var errs []error
		for _, long := range longs {
			res, err := long(ctx)
			if err != nil {
				errs = append(errs, err)
				continue
			}
			notes = append(notes, res.Note)
		}
		return webhook.Result{State: webhook.Done, Note: strings.Join(notes, "; ")}, errors.Join(errs...)
	}, nil
}

// branchGone notes when the branch that deploys is there no more. The app
// stays as it is.
func (r *repos) branchGone(ctx context.Context, c *connection, d webhook.Delivery) error {
	ref := "refs/heads/" + c.Branch
	for _, ch := range d.Event.Changes {
		if ch.Ref != ref || ch.After != "" {
			continue
		}
		rem, err := r.remote(ctx, c)
		if err != nil {
			return err
		}
		tip, err := r.ask(ctx, c, rem, ref, d)
		if err != nil {
			return err
		}
		if tip == "" {
			r.problem(ctx, c.App, fmt.Sprintf("%s was deleted at the forge, and what it deployed last goes on; push it again, or m3o repo:connect --branch with another", c.Branch))
		}
	}
	return nil
}

// problemWords is an error for somebody who looks at the app later.
func problemWords(err error) string {
	s := userMessage(err)
	if h := m3o.HintOf(err); h != "" {
		s += "; " + h
	}
	return s
}

// follow renames the connection after its repository: the hook is still the
// same, and the forge is asked whether the new name is the old repository's.
func (r *repos) follow(ctx context.Context, c *connection, e webhook.Event) error {
	if e.Repo == "" || strings.EqualFold(e.Repo, c.Name) || e.Kind == webhook.Other {
		return nil
	}
	f, err := r.forge(c)
	if err != nil {
		return err
	}
	now, err := f.Repo(ctx)
	if err != nil || !strings.EqualFold(now.Name, e.Repo) {
		return nil //nolint:nilerr // it is told as being about another repository
	}
	old := c.Name
	saved, rev, err := r.conns.Get(ctx, c.App)
	if err != nil {
		return err
	}
	saved.Name, saved.URL = now.Name, strings.Replace(saved.URL, old, now.Name, 1)
	if _, err := r.conns.Update(ctx, c.App, saved, rev); err != nil {
		return err
	}
	r.d.log.Info("repository renamed", "app", c.App, "from", old, "to", now.Name)
	*c = saved
	return nil
}

// An asked is what a ref was when the forge was asked.
type asked struct {
	tip string
	at  time.Time // before asking
}

// ask is what a ref of the forge is, at a time after the delivery came: for
// all deliveries of a burst that have come by then, one answer does.
func (r *repos) ask(ctx context.Context, c *connection, rem gitserver.Remote, ref string, d webhook.Delivery) (string, error) {
	key := attemptKey(c.App+"/"+c.Hook, ref)
	again := d.Tries > 1 || d.Note == "replayed"
	r.mu.Lock()
	known, ok := r.asked[key]
	patience := r.patience
	r.mu.Unlock()
	if ok && !again && d.Received.Before(known.at) {
		return known.tip, nil
	}
	now := asked{at: time.Now()}
	ctx, cancel := context.WithTimeoutCause(ctx, patience, &m3o.Error{Kind: m3o.Unavailable, Msg: fmt.Sprintf("%s did not answer within %s", c.Host, patience), Hint: "it is tried again"})
	defer cancel()
	tips, err := gitserver.RemoteTips(ctx, rem, ref)
	if err != nil {
		return "", err
	}
	now.tip = tips[ref]
	r.mu.Lock()
	defer r.mu.Unlock()
	if len(r.asked) > 1000 {
		clear(r.asked)
	}
	r.asked[key] = now
	return now.tip, nil
}

// tip asks the forge what a ref is now and says whether the event is still
// about it; note says why not.
func (r *repos) tip(ctx context.Context, c *connection, d webhook.Delivery, ref, commit, before string) (rem gitserver.Remote, tip, note string, err error) {
	if rem, err = r.remote(ctx, c); err != nil {
		return rem, "", "", err
	}
	if tip, err = r.ask(ctx, c, rem, ref, d); err != nil {
		return rem, "", "", err
	}
	short := strings.TrimPrefix(ref, "refs/heads/")
	switch {
	case tip == "":
		return rem, "", short + " is there no more", nil
	case strings.HasPrefix(tip, commit) && commit != "":
		return rem, tip, "", nil
	case before != "" && strings.HasPrefix(tip, before):
		// The forge told of the push before all of it knew.
		return rem, "", "", &m3o.Error{Kind: m3o.Unavailable, Msg: c.Host + " does not have the new commit at " + short + " yet", Hint: "it is tried again"}
	}
	return rem, "", fmt.Sprintf("%s was overtaken: %s is at %s", shortCommit(commit), short, shortCommit(tip)), nil
}

// deploy is for a push to the branch that deploys.
func (r *repos) deploy(ctx context.Context, c *connection, d webhook.Delivery, a webhook.Action) (webhook.Result, longWork, error) {
	rem, tip, note, err := r.tip(ctx, c, d, a.Ref, a.Commit, a.Before)
	if err != nil {
		return webhook.Result{}, nil, err
	}
	if note != "" {
		return nothing("%s", note)
	}
	app, err := r.d.ledger.App(ctx, c.App)
	if err != nil {
		return webhook.Result{}, nil, err
	}
	if why, err := r.tried(ctx, c.App, a.Ref, tip, d); why != "" || err != nil {
		return webhook.Result{State: webhook.Ignored, Note: why}, nil, err
	}
	repo, err := r.d.git.Fetch(ctx, c.App, app.DeployBranch(), rem, tip, a.Ref, gitserver.FetchLimits{})
	if err != nil {
		return webhook.Result{}, nil, err
	}
	r.problem(ctx, c.App, "")
	if d.Event.Name != connectEvent { // whoever connects a repository wants to see it run
		if why, err := r.unwanted(ctx, c, c.App, "refs/heads/"+app.DeployBranch(), repo, tip, attempt{Ref: a.Ref, Commit: tip}); why != "" || err != nil {
			return webhook.Result{State: webhook.Ignored, Note: why}, nil, err
		}
	}
	user := c.User
	job := &job{r: r, c: *c, app: c.App, ref: a.Ref, commit: tip, env: c.App, production: true, turn: r.turn(c.App)}
	job.report(ctx, forge.Pending, "Building", "")
	return webhook.Result{}, func(ctx context.Context) (webhook.Result, error) {
		return job.run(ctx, func(ctx context.Context) (m3o.Release, error) {
			ref := "refs/heads/" + app.DeployBranch()
			old, err := gitserver.Tip(ctx, repo, ref)
			if err != nil {
				return m3o.Release{}, err
			}
			return r.d.deployCommit(ctx, m3o.Source{App: c.App, Repo: repo, Ref: ref, Old: old, Commit: tip, User: user,
				Via: fmt.Sprintf("push to %s by %s", c.repository(), cmp.Or(d.Event.Sender, "somebody"))}, io.Discard)
		})
	}, nil
}

// tried says why a commit need not be built: it was, or is being built.
func (r *repos) tried(ctx context.Context, app, ref, commit string, d webhook.Delivery) (string, error) {
	// Asked first: a deploy records how it ended before its turn ends.
	r.mu.Lock()
	building := r.turns[app] != nil
	r.mu.Unlock()
	was, _, err := r.refs.Get(ctx, attemptKey(app, ref))
	if err != nil && m3o.KindOf(err) != m3o.NotFound {
		return "", err
	}
	replayed := d.Note == "replayed" || d.Tries > 1
	switch {
	case was.Commit != commit:
	case was.State == "live":
		if live, err := r.d.ledger.Live(ctx, app); err == nil && live.Commit == commit {
			return shortCommit(commit) + " is live already", nil
		}
	case was.State == "failed" && !replayed:
		return shortCommit(commit) + " failed before; m3o repo:deliveries --replay builds it again", nil
	case was.State == "skipped" && !replayed:
		return was.Note, nil
	case was.State == "building" && building:
		return shortCommit(commit) + " is being built already", nil
	}
	_, err = r.refs.Put(ctx, attemptKey(app, ref), attempt{Ref: ref, Commit: commit, State: "building", At: time.Now().UTC()})
	return "", err
}

// A job is one deploy that a delivery caused, and what is told of it.
type job struct {
	r          *repos
	c          connection
	app        string // that is deployed: the connection's or a preview of it
	ref        string
	commit     string
	env        string // name of the environment at the forge
	production bool
	pull       *webhook.PullRequest
	turn       *hookTurn
}

// endAttempt records how an attempt ended, unless a newer commit's attempt has
// taken its place: a job that was superseded ends after the one that
// superseded it has begun.
func (r *repos) endAttempt(ctx context.Context, app string, a attempt) error {
	was, rev, err := r.refs.Get(ctx, attemptKey(app, a.Ref))
	if err != nil || was.Commit != a.Commit {
		if m3o.KindOf(err) == m3o.NotFound {
			return nil // the app is gone
		}
		return err
	}
	if _, err = r.refs.Update(ctx, attemptKey(app, a.Ref), a, rev); m3o.KindOf(err) == m3o.Conflict {
		return nil
	}
	return err
}

// held says that rel was built while its app is locked.
func (r *repos) held(ctx context.Context, rel m3o.Release) bool {
	st, err := r.d.ledger.ReleaseStatus(ctx, rel.App, rel.Version)
	return err == nil && st == release.ReleaseHeld
}

// run does the deploy when it is its turn and tells how it went. An error
// means that it is tried again.
func (j *job) run(ctx context.Context, deploy func(context.Context) (m3o.Release, error)) (webhook.Result, error) {
	r := j.r
	defer r.endTurn(j.app, j.turn)
	// The turn's context ends by a newer turn, ours also with the daemon.
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	stop := context.AfterFunc(j.turn.ctx, func() { cancel(context.Cause(j.turn.ctx)) })
	defer stop()
	if b := j.turn.before; b != nil {
		<-b.done
		j.turn.before = nil
	}
	began := time.Now()
	rel, err := m3o.Release{}, context.Cause(ctx)
	if err == nil {
		rel, err = deploy(ctx)
	}
	wctx, wcancel := context.WithTimeout(context.WithoutCancel(ctx), 30*time.Second)
	defer wcancel()
	state := "failed"
	defer func() {
		if perr := r.endAttempt(wctx, j.app, attempt{Ref: j.ref, Commit: j.commit, State: state, At: time.Now().UTC()}); perr != nil {
			r.d.log.Error("record attempt", "app", j.app, "err", perr)
		}
	}()
	switch kind := m3o.KindOf(err); {
	case err == nil && r.held(wctx, rel):
		state = "held"
		j.report(wctx, forge.Success, fmt.Sprintf("%s is built; %s is locked, so it waits to be published", rel.Name(), j.app), "")
		return webhook.Result{State: webhook.Done, Note: fmt.Sprintf("%s built %s of %s, which is locked", shortCommit(j.commit), rel.Name(), j.app)}, nil
	case err == nil:
		state = "live"
		j.report(wctx, forge.Success, fmt.Sprintf("%s is live, in %s", rel.Name(), seconds(time.Since(began))), "")
		return webhook.Result{State: webhook.Done, Note: fmt.Sprintf("%s released %s of %s", shortCommit(j.commit), rel.Name(), j.app)}, nil
	case errors.Is(err, errSuperseded) || errors.Is(context.Cause(ctx), errSuperseded):
		state = "superseded"
		j.report(wctx, forge.Failure, "Superseded by a newer push", "")
		return webhook.Result{State: webhook.Done, Note: shortCommit(j.commit) + " was superseded by a newer push"}, nil
	case ctx.Err() != nil:
		state = "stopped"
		return webhook.Result{}, err // the daemon stops; the delivery is worked on at its next start
	case kind == m3o.Unavailable || kind == m3o.Internal:
		state = "stopped"
		j.report(wctx, forge.Failure, firstLine(userMessage(err)), "")
		return webhook.Result{}, err
	}
	j.report(wctx, forge.Failure, firstLine(userMessage(err)), m3o.HintOf(err))
	return webhook.Result{State: webhook.Done, Note: shortCommit(j.commit) + " failed: " + firstLine(userMessage(err))}, nil
}

// report tells the forge, by and by, how the deploy goes.
func (j *job) report(ctx context.Context, s forge.State, text, hint string) {
	name := "m3o/" + j.c.App
	if !j.production {
		name += " preview"
	}
	log := j.r.logURL(j.app, j.commit)
	j.r.reports.status(ctx, &j.c, j.commit, forge.Status{Context: name, State: s, Description: text, URL: log})
	j.r.reports.deployment(ctx, &j.c, forge.Deployment{Environment: j.env, Commit: j.commit, Ref: strings.TrimPrefix(j.ref, "refs/heads/"), State: s,
		URL: j.r.d.url(j.app), LogURL: log, Production: j.production})
	if !j.production {
		j.r.note(ctx, j.app, s, text)
	}
	if j.pull != nil {
		j.r.comment(ctx, &j.c, j.pull.Number, j.app, j.commit, s, text, hint)
	}
}
