package daemon

import (
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"time"

	"github.com/m3o/m3o"
	"github.com/m3o/m3o/config"
	"github.com/m3o/m3o/gitserver"
	"github.com/m3o/m3o/webhook"
	"github.com/m3o/m3o/webhook/forge"
)

const (
	// previewTTL is how long a preview is kept after its last push, should
	// nobody ever tell that its pull request was closed.
	previewTTL = 14 * 24 * time.Hour
	// previewSleep is the idle time after which a preview is stopped until the
	// next request.
	previewSleep = 15 * time.Minute
	maxPreviews  = 50 // of one app
)

// The states of a preview.
const (
	previewWaits    = "waits for approval"
	previewBuilding = "building"
	previewLive     = "live"
	previewFailed   = "failed"
)

// A preview is a pull request or a branch that runs beside its app, as an app
// of its own that is named by m3o.PreviewName.
type preview struct {
	Name     string
	Parent   string
	Label    string // "pr-7", or the branch
	Pull     *webhook.PullRequest
	Commit   string // newest
	Approved string // commit of a fork that a member let in, "" for none
	State    string
	Note     string
	Updated  time.Time
	Expires  time.Time
}

// previewRef is where a preview's commit is kept in its app's repository.
func previewRef(name string) string { return "refs/m3o/" + name }

// overlayOf names the config that previews of app get besides the app's own
// variables. No branch can be called that: it is no preview's name.
func overlayOf(app string) string { return "overlay-of-previews--" + app }

// labelOf is the first part of the preview's name for a branch: not what a
// pull request's or a release's host begins with.
func labelOf(branch string) string {
	for _, taken := range []string{"pr-", "v", "overlay-of-previews"} {
		if rest, ok := strings.CutPrefix(branch, taken); ok && strings.Trim(rest, "0123456789") == "" {
			return "branch-" + branch
		}
	}
	return branch
}

func pullLabel(n int) string { return fmt.Sprintf("pr-%d", n) }

// preview is for a push to a pull request or to a branch that does not deploy.
func (r *repos) preview(ctx context.Context, c *connection, d webhook.Delivery, a webhook.Action) (webhook.Result, longWork, error) {
	p := preview{Parent: c.App, Pull: a.Pull}
	ref := a.Ref
	if a.Pull != nil {
		p.Label, ref = pullLabel(a.Pull.Number), tipRef(c, a.Pull)
		if ref == "" {
			return nothing("pull requests of forks get no previews: %s keeps their commits from us", c.Host)
		}
	} else {
		p.Label = labelOf(strings.TrimPrefix(a.Ref, "refs/heads/"))
	}
	p.Name = m3o.PreviewName(p.Label, c.App)
	old, _, err := r.previews.Get(ctx, p.Name)
	if err != nil && m3o.KindOf(err) != m3o.NotFound {
		return webhook.Result{}, nil, err
	}
	before := a.Before
	if before == "" {
		before = old.Commit
	}
	rem, tip, note, err := r.tip(ctx, c, d, ref, a.Commit, before)
	if err != nil {
		return webhook.Result{}, nil, err
	}
	if note != "" {
		return nothing("%s", note)
	}
	p.Approved, p.Commit, p.Updated = old.Approved, tip, time.Now().UTC()
	p.Expires, p.State = p.Updated.Add(previewTTL), previewBuilding
	j := &job{r: r, c: *c, app: p.Name, ref: ref, commit: tip, env: c.App + " " + p.Label, pull: a.Pull}
	if a.Pull != nil && a.Pull.Fork && p.Approved != tip {
		p.State = previewWaits
		p.Note = fmt.Sprintf("a member can let %s in: m3o repo:approve %s -a %s", shortCommit(tip), p.Label, c.App)
		if _, err := r.previews.Put(ctx, p.Name, p); err != nil {
			return webhook.Result{}, nil, err
		}
		j.report(ctx, forge.Pending, "Waits for a member's approval", p.Note)
		return webhook.Result{State: webhook.Ignored, Note: p.Label + " is of a fork; " + p.Note}, nil, nil
	}
	if why, err := r.tried(ctx, p.Name, ref, tip, d); why != "" || err != nil {
		return webhook.Result{State: webhook.Ignored, Note: why}, nil, err
	}
	app, err := r.d.ledger.App(ctx, c.App)
	if err != nil {
		return webhook.Result{}, nil, err
	}
	repo, err := r.d.git.Fetch(ctx, c.App, app.DeployBranch(), rem, tip, ref, gitserver.FetchLimits{})
	if err != nil {
		return webhook.Result{}, nil, err
	}
	r.problem(ctx, c.App, "")
	// What has a preview keeps it up to date; a pull request that changes
	// nothing of this app gets none, and others' previews call the live one.
	if old.Name == "" {
		if why, err := r.unwanted(ctx, c, p.Name, "refs/heads/"+app.DeployBranch(), repo, tip, attempt{Ref: ref, Commit: tip}); why != "" || err != nil {
			return webhook.Result{State: webhook.Ignored, Note: why}, nil, err
		}
	}
	if err := r.ensurePreview(ctx, c.App, p); err != nil {
		return webhook.Result{}, nil, err
	}
	via := "branch " + p.Label
	if a.Pull != nil {
		via = fmt.Sprintf("pull request #%d of %s", a.Pull.Number, c.repository())
	}
	j.turn = r.turn(p.Name)
	j.report(ctx, forge.Pending, "Building", "")
	return webhook.Result{}, func(ctx context.Context) (webhook.Result, error) {
		return j.run(ctx, func(ctx context.Context) (m3o.Release, error) {
			return r.deployPreview(ctx, c, p.Name, repo, tip, via)
		})
	}, nil
}

func (r *repos) deployPreview(ctx context.Context, c *connection, name, repo, commit, via string) (m3o.Release, error) {
	if err := r.configure(ctx, c.App, name, c.Secrets, c.User); err != nil {
		return m3o.Release{}, err
	}
	ref := previewRef(name)
	old, err := gitserver.Tip(ctx, repo, ref)
	if err != nil {
		return m3o.Release{}, err
	}
	return r.d.deployCommit(ctx, m3o.Source{App: name, Repo: repo, Ref: ref, Old: old, Commit: commit, User: c.User, Via: via,
		Options: []string{allowBreaking}}, io.Discard) // the comment says what the live app's callers would miss
}

// ensurePreview makes the preview's record and the app it runs as.
func (r *repos) ensurePreview(ctx context.Context, app string, p preview) error {
	all, err := r.list(ctx, app)
	if err != nil {
		return err
	}
	known := false
	for _, x := range all {
		known = known || x.Name == p.Name
	}
	if !known && len(all) >= maxPreviews {
		return &m3o.Error{Kind: m3o.Invalid, Msg: fmt.Sprintf("%s has %d previews, which is the limit", app, len(all)), Hint: "m3o previews:destroy removes one"}
	}
	parent, err := r.d.ledger.App(ctx, app)
	if err != nil {
		return err
	}
	_, err = r.d.ledger.CreateApp(ctx, m3o.App{Name: p.Name, Owner: parent.Owner, Parent: app, Sleep: previewSleep, Created: time.Now().UTC()})
	if err != nil && m3o.KindOf(err) != m3o.Conflict {
		return err
	}
	_, err = r.previews.Put(ctx, p.Name, p)
	return err
}

// configure gives a preview the variables of its app that are no secrets (all
// of them where that was allowed), then those set for previews.
func (r *repos) configure(ctx context.Context, app, name string, secrets bool, user string) error {
	set := map[string]config.Var{}
	add := func(from string, secrets bool) error {
		rev, err := r.d.config.Current(ctx, from)
		if err != nil || rev.Number == 0 {
			return err
		}
		env, err := r.d.config.Env(ctx, from, rev.Number)
		if err != nil {
			return err
		}
		values := map[string]m3o.Secret{}
		for _, kv := range env {
			k, v, _ := strings.Cut(kv, "=")
			values[k] = m3o.Secret(v)
		}
		for _, v := range rev.Vars {
			if !v.Secret || secrets {
				set[v.Name] = config.Var{Name: v.Name, Value: values[v.Name], Secret: v.Secret}
			}
		}
		return nil
	}
	if err := errors.Join(add(app, secrets), add(overlayOf(app), true)); err != nil {
		return err
	}
	now, err := r.d.config.Current(ctx, name)
	if err != nil {
		return err
	}
	var vars []config.Var
	var unset []string
	for _, v := range set {
		vars = append(vars, v)
	}
	for _, v := range now.Vars {
		if _, ok := set[v.Name]; !ok {
			unset = append(unset, v.Name)
		}
	}
	_, err = r.d.config.Change(ctx, name, user, vars, unset)
	return err
}

// note keeps how the newest deploy of a preview went.
func (r *repos) note(ctx context.Context, name string, s forge.State, text string) {
	if m3o.ParentOf(name) == name {
		return
	}
	p, rev, err := r.previews.Get(ctx, name)
	if err != nil {
		return
	}
	if p.State == previewWaits && s == forge.Pending {
		return
	}
	p.State = map[forge.State]string{forge.Pending: previewBuilding, forge.Success: previewLive, forge.Failure: previewFailed}[s]
	p.Note = text
	if _, err := r.previews.Update(ctx, name, p, rev); err != nil {
		r.d.log.Warn("note state of a preview", "app", name, "err", err)
	}
}

// noteLive and noteFailed keep how a deploy of a preview ended, whoever caused
// it; of other apps they keep nothing.
func (r *repos) noteLive(ctx context.Context, rel m3o.Release) {
	r.note(ctx, rel.App, forge.Success, rel.Name()+" is live")
}

func (r *repos) noteFailed(ctx context.Context, app string, err error) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), 10*time.Second)
	defer cancel()
	r.note(ctx, app, forge.Failure, firstLine(userMessage(err)))
}

// list is the previews of an app by name.
func (r *repos) list(ctx context.Context, app string) ([]preview, error) {
	all, err := r.previews.List(ctx, "")
	if err != nil {
		return nil, fmt.Errorf("list previews: %w", err)
	}
	var out []preview
	for _, e := range all {
		if e.Value.Parent == app {
			out = append(out, e.Value)
		}
	}
	return out, nil
}

// find is the preview that a person means by pr-7, 7, a branch or the whole name.
func (r *repos) find(ctx context.Context, app, what string) (preview, error) {
	all, err := r.list(ctx, app)
	if err != nil {
		return preview{}, err
	}
	for _, p := range all {
		if what == p.Name || what == p.Label || labelOf(what) == p.Label || p.Pull != nil && strings.TrimPrefix(what, "#") == fmt.Sprint(p.Pull.Number) {
			return p, nil
		}
	}
	return preview{}, &m3o.Error{Kind: m3o.NotFound, Msg: fmt.Sprintf("%s has no preview %q", app, what), Hint: "m3o previews -a " + app}
}

// remove is for a closed pull request or a deleted branch.
func (r *repos) remove(c *connection, a webhook.Action) (webhook.Result, longWork, error) {
	label := ""
	if a.Pull != nil {
		label = pullLabel(a.Pull.Number)
	} else {
		label = labelOf(strings.TrimPrefix(a.Ref, "refs/heads/"))
	}
	name := m3o.PreviewName(label, c.App)
	t := r.turn(name) // ends a build under way
	conn := *c
	return webhook.Result{}, func(ctx context.Context) (webhook.Result, error) {
		defer r.endTurn(name, t)
		if t.before != nil {
			<-t.before.done
			t.before = nil
		}
		p, _, err := r.previews.Get(ctx, name)
		if m3o.KindOf(err) == m3o.NotFound {
			return webhook.Result{State: webhook.Ignored, Note: label + " has no preview"}, nil
		} else if err != nil {
			return webhook.Result{}, err
		}
		if err := r.destroy(ctx, &conn, p, "it was closed"); err != nil {
			return webhook.Result{}, err
		}
		return webhook.Result{State: webhook.Done, Note: "the preview " + name + " was removed"}, nil
	}, nil
}

// destroy removes a preview with all it has. c is nil when the app is no more
// connected.
func (r *repos) destroy(ctx context.Context, c *connection, p preview, why string) error {
	if err := r.d.destroyApp(ctx, p.Name); err != nil && m3o.KindOf(err) != m3o.NotFound {
		return err
	}
	parent, err := r.d.ledger.App(ctx, p.Parent)
	if err != nil && m3o.KindOf(err) != m3o.NotFound {
		return err
	}
	if err == nil {
		repo, err := r.d.git.Repo(ctx, p.Parent, parent.DeployBranch())
		if err != nil {
			return err
		}
		if err := gitserver.DropRef(ctx, repo, previewRef(p.Name)); err != nil {
			return err
		}
	}
	keys := []string{attemptKey(p.Name, previewRef(p.Name))}
	if c != nil && p.Pull != nil {
		keys = append(keys, attemptKey(p.Name, tipRef(c, p.Pull)))
		r.reports.deployment(ctx, c, forge.Deployment{Environment: c.App + " " + p.Label, Commit: p.Commit, State: forge.Inactive, LogURL: r.logURL(p.Name, p.Commit)})
		r.reports.comment(ctx, c, p.Pull.Number, fmt.Sprintf("**m3o**: the preview of `%s` was removed: %s.\n", c.App, why))
	} else if c != nil {
		keys = append(keys, attemptKey(p.Name, "refs/heads/"+p.Label))
	}
	for _, k := range keys {
		if err := r.refs.Delete(ctx, k, 0); err != nil {
			return err
		}
	}
	return r.previews.Delete(ctx, p.Name, 0)
}

func (r *repos) removePreviews(ctx context.Context, app string) error {
	all, err := r.list(ctx, app)
	if err != nil {
		return err
	}
	var c *connection
	if conn, err := r.of(ctx, app); err == nil {
		c = &conn
	}
	for _, p := range all {
		if err := r.destroy(ctx, c, p, "the app is gone"); err != nil {
			return err
		}
	}
	return nil
}

// expire removes previews that nobody pushed to for long.
func (r *repos) expire(ctx context.Context) {
	tick := time.NewTicker(time.Hour)
	defer tick.Stop()
	for {
		if err := r.expireAt(ctx, time.Now()); err != nil && ctx.Err() == nil {
			r.d.log.Error("remove old previews", "err", err)
		}
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
	}
}

func (r *repos) expireAt(ctx context.Context, now time.Time) error {
	all, err := r.previews.List(ctx, "")
	if err != nil {
		return err
	}
	for _, e := range all {
		if p := e.Value; now.After(p.Expires) {
			var c *connection
			if conn, err := r.of(ctx, p.Parent); err == nil {
				c = &conn
			}
			if err := r.destroy(ctx, c, p, "nobody pushed to it for two weeks"); err != nil {
				return err
			}
			r.d.log.Info("preview expired", "app", p.Name)
		}
	}
	return nil
}

// approve lets exactly the commit that the fork's pull request has now have a
// preview, and builds it.
func (r *repos) approve(ctx context.Context, app, what, commit string) (string, error) {
	c, err := r.of(ctx, app)
	if err != nil {
		return "", err
	}
	p, err := r.find(ctx, app, what)
	if err != nil {
		return "", err
	}
	switch {
	case p.Pull == nil || !p.Pull.Fork:
		return "", &m3o.Error{Kind: m3o.Invalid, Msg: p.Label + " is of no fork, so it needs no approval", Hint: "m3o previews -a " + app}
	case commit != "" && !strings.HasPrefix(p.Commit, commit):
		return "", &m3o.Error{Kind: m3o.Conflict, Msg: fmt.Sprintf("%s is at %s now, not %s", p.Label, shortCommit(p.Commit), shortCommit(commit)), Hint: "read the new commits, then approve those"}
	}
	saved, rev, err := r.previews.Get(ctx, p.Name)
	if err != nil {
		return "", err
	}
	if saved.Commit != p.Commit {
		return "", &m3o.Error{Kind: m3o.Conflict, Msg: p.Label + " has just got another commit", Hint: "read it, then approve it"}
	}
	saved.Approved = p.Commit
	if _, err := r.previews.Update(ctx, p.Name, saved, rev); err != nil {
		return "", err
	}
	pull := *p.Pull
	pull.Action, pull.Head = webhook.Updated, p.Commit
	err = r.queue.Add(ctx, c.Hook, webhook.Event{Provider: c.Provider, Delivery: "approve-" + p.Label + "-" + randomHex(4), Name: "approved", Kind: webhook.Pull,
		Repo: c.Name, Sender: "m3o", Pull: &pull})
	return p.Commit, err
}

// pushPreview turns a push with -o preview of a branch that does not deploy
// into one to the branch's preview.
func (r *repos) pushPreview(ctx context.Context, src m3o.Source) (m3o.Source, error) {
	branch := strings.TrimPrefix(src.Ref, "refs/heads/")
	p := preview{Parent: src.App, Label: labelOf(branch), Commit: src.Commit, State: previewBuilding, Updated: time.Now().UTC()}
	p.Name, p.Expires = m3o.PreviewName(p.Label, src.App), p.Updated.Add(previewTTL)
	if err := r.ensurePreview(ctx, src.App, p); err != nil {
		return src, err
	}
	secrets := false
	if c, err := r.of(ctx, src.App); err == nil {
		secrets = c.Secrets
	}
	if err := r.configure(ctx, src.App, p.Name, secrets, src.User); err != nil {
		return src, err
	}
	src.App, src.Options = p.Name, append(slices.Clone(src.Options), allowBreaking)
	return src, nil
}
