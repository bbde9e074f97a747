package daemon

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"time"

	"connectrpc.com/connect"

	"github.com/m3o/m3o"
	m3ov1 "github.com/m3o/m3o/api/m3o/v1"
	"github.com/m3o/m3o/gitserver"
	"github.com/m3o/m3o/release"
)

type controlAPI struct{ d *Daemon }

func wireLock(l m3o.Lock) *m3ov1.Lock {
	if l.At.IsZero() {
		return nil
	}
	return &m3ov1.Lock{User: l.User, Reason: l.Reason, Since: stamp(l.At)}
}

func (a controlAPI) Get(ctx context.Context, req *connect.Request[m3ov1.GetControlRequest]) (*connect.Response[m3ov1.GetControlResponse], error) {
	app, err := a.d.ledger.App(ctx, req.Msg.App)
	if err != nil {
		return nil, err
	}
	held, err := a.d.ledger.Held(ctx, app.Name)
	if err != nil {
		return nil, err
	}
	res := &m3ov1.GetControlResponse{Branch: app.DeployBranch(), Paths: app.Paths, Lock: wireLock(app.Lock)}
	for _, r := range held {
		res.Held = append(res.Held, wireRelease(r, string(release.ReleaseHeld)))
	}
	return connect.NewResponse(res), nil
}

func (a controlAPI) SetBranch(ctx context.Context, req *connect.Request[m3ov1.SetBranchRequest]) (*connect.Response[m3ov1.SetBranchResponse], error) {
	branch := strings.TrimPrefix(req.Msg.Branch, "refs/heads/")
	if err := gitserver.CheckBranch(branch); err != nil {
		return nil, err
	}
	res := &m3ov1.SetBranchResponse{}
	app, err := a.d.ledger.ChangeApp(ctx, req.Msg.App, func(app *m3o.App) error {
		res.Was, app.Branch = app.DeployBranch(), branch
		return nil
	})
	if err != nil {
		return nil, err
	}
	if dir, ok := a.d.repoDir(app.Name); ok {
		if res.Tip, err = gitserver.Tip(ctx, dir, "refs/heads/"+branch); err != nil {
			return nil, err
		}
	}
	return connect.NewResponse(res), nil
}

func (a controlAPI) SetPaths(ctx context.Context, req *connect.Request[m3ov1.SetPathsRequest]) (*connect.Response[m3ov1.SetPathsResponse], error) {
	if err := release.CheckPaths(req.Msg.Paths); err != nil {
		return nil, err
	}
	res := &m3ov1.SetPathsResponse{}
	_, err := a.d.ledger.ChangeApp(ctx, req.Msg.App, func(app *m3o.App) error {
		res.Was, app.Paths = app.Paths, req.Msg.Paths
		return nil
	})
	if err != nil {
		return nil, err
	}
	return connect.NewResponse(res), nil
}

func (a controlAPI) Lock(ctx context.Context, req *connect.Request[m3ov1.LockRequest]) (*connect.Response[m3ov1.LockResponse], error) {
	if len(req.Msg.Reason) > 500 || strings.ContainsAny(req.Msg.Reason, "\r\n\x00") {
		return nil, m3o.Errorf(m3o.Invalid, "a reason is one line of at most 500 bytes")
	}
	app, err := a.d.ledger.ChangeApp(ctx, req.Msg.App, func(app *m3o.App) error {
		if !app.Lock.At.IsZero() {
			return &m3o.Error{Kind: m3o.Conflict, Msg: lockWords(app.Name, app.Lock), Hint: "m3o unlock -a " + app.Name}
		}
		app.Lock = m3o.Lock{User: who(ctx).User, Reason: req.Msg.Reason, At: time.Now().UTC()}
		return nil
	})
	if err != nil {
		return nil, err
	}
	return connect.NewResponse(&m3ov1.LockResponse{Lock: wireLock(app.Lock)}), nil
}

func (a controlAPI) Unlock(ctx context.Context, req *connect.Request[m3ov1.UnlockRequest]) (*connect.Response[m3ov1.UnlockResponse], error) {
	var since time.Time
	app, err := a.d.ledger.ChangeApp(ctx, req.Msg.App, func(app *m3o.App) error {
		if app.Lock.At.IsZero() {
			return &m3o.Error{Kind: m3o.Conflict, Msg: app.Name + " is not locked", Hint: "a push goes live"}
		}
		since, app.Lock = app.Lock.At, m3o.Lock{}
		return nil
	})
	if err != nil {
		return nil, err
	}
	res := &m3ov1.UnlockResponse{}
	held, err := a.d.ledger.Held(ctx, app.Name)
	if err != nil {
		return nil, err
	}
	if i := slices.IndexFunc(held, func(r m3o.Release) bool { return !r.Created.Before(since) }); i >= 0 {
		res.Held = wireRelease(held[i], string(release.ReleaseHeld))
	}
	return connect.NewResponse(res), nil
}

func (a controlAPI) Publish(ctx context.Context, req *connect.Request[m3ov1.PublishRequest]) (*connect.Response[m3ov1.PublishResponse], error) {
	began := time.Now()
	rel, from, err := a.d.publish(ctx, req.Msg.App, who(ctx).User, int(req.Msg.Version))
	if err != nil {
		return nil, err
	}
	return connect.NewResponse(&m3ov1.PublishResponse{Release: wireRelease(rel, "live"), From: int32(from), Millis: time.Since(began).Milliseconds()}), nil
}

func (a controlAPI) AddHook(ctx context.Context, req *connect.Request[m3ov1.AddHookRequest]) (*connect.Response[m3ov1.AddHookResponse], error) {
	if req.Msg.Branch != "" {
		if err := gitserver.CheckBranch(req.Msg.Branch); err != nil {
			return nil, err
		}
	}
	if req.Msg.Name != "" && !nameLike(req.Msg.Name) {
		return nil, &m3o.Error{Kind: m3o.Invalid, Msg: fmt.Sprintf("hook name %q is none", req.Msg.Name), Hint: "use 1 to 40 of a-z, 0-9 and single hyphens"}
	}
	h, secret, err := a.d.hooks.add(ctx, deployHook{App: req.Msg.App, Name: req.Msg.Name, Branch: req.Msg.Branch, User: who(ctx).User})
	if err != nil {
		return nil, err
	}
	return connect.NewResponse(&m3ov1.AddHookResponse{Hook: wireHook(h), Url: a.d.apiURL() + hookPath + secret.Reveal()}), nil
}

func wireHook(h deployHook) *m3ov1.DeployHook {
	return &m3ov1.DeployHook{Id: h.ID, Name: h.Name, Branch: h.Branch, User: h.User, Created: stamp(h.Created), Used: stamp(h.Used), Uses: int32(h.Uses)}
}

func (a controlAPI) ListHooks(ctx context.Context, req *connect.Request[m3ov1.ListHooksRequest]) (*connect.Response[m3ov1.ListHooksResponse], error) {
	all, err := a.d.hooks.list(ctx, req.Msg.App)
	if err != nil {
		return nil, err
	}
	res := &m3ov1.ListHooksResponse{}
	for _, h := range all {
		res.Hooks = append(res.Hooks, wireHook(h))
	}
	return connect.NewResponse(res), nil
}

func (a controlAPI) RemoveHook(ctx context.Context, req *connect.Request[m3ov1.RemoveHookRequest]) (*connect.Response[m3ov1.RemoveHookResponse], error) {
	if err := a.d.hooks.remove(ctx, req.Msg.App, req.Msg.Id); err != nil {
		return nil, err
	}
	return connect.NewResponse(&m3ov1.RemoveHookResponse{}), nil
}
