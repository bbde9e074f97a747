package daemon

import (
	"context"
	"errors"
	"io"
	"io/fs"
	"os"
	"slices"
	"time"

	"connectrpc.com/connect"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/m3o/m3o"
	m3ov1 "github.com/m3o/m3o/api/m3o/v1"
	"github.com/m3o/m3o/auth"
	"github.com/m3o/m3o/config"
	"github.com/m3o/m3o/release"
	"github.com/m3o/m3o/runtime"
)

func stamp(t time.Time) *timestamppb.Timestamp {
	if t.IsZero() {
		return nil
	}
	return timestamppb.New(t)
}

type appsAPI struct{ d *Daemon }

func (a appsAPI) wire(ctx context.Context, app m3o.App) (*m3ov1.App, error) {
	out := &m3ov1.App{Name: app.Name, Owner: app.Owner, Branch: app.DeployBranch(), Url: a.d.url(app.Name), GitUrl: a.d.gitURL(app.Name),
		Created: stamp(app.Created), Status: "no release", LockedBy: app.Lock.User, LockReason: app.Lock.Reason, LockedSince: stamp(app.Lock.At)}
	rel, err := a.d.ledger.Live(ctx, app.Name)
	if m3o.KindOf(err) == m3o.NotFound {
		return out, nil
	} else if err != nil {
		return nil, err
	}
	out.Release, out.Released, out.Commit, out.Status = rel.Name(), stamp(rel.Created), rel.Commit, "down"
	for _, in := range a.d.routes.list(app.Name) {
		if in.Release != rel.Version {
			continue
		}
		if in.Phase == m3o.Ready {
			out.Instances++
			out.Status = "running"
		} else if rep, err := a.d.driver.Explain(in.ID); err == nil && rep.Crashes >= loops && out.Status == "down" {
			out.Status = "crashing"
		}
	}
	if sh, ok := a.d.shapes.get(app.Name); ok && out.Instances == 0 {
		switch {
		case sh.asleep:
			out.Status = "asleep"
		case replicas(sh.rel.Processes[webProcess]) == 0 && out.Status == "down":
			out.Status = "stopped"
		}
	}
	return out, nil
}

func (a appsAPI) Create(ctx context.Context, req *connect.Request[m3ov1.CreateAppRequest]) (*connect.Response[m3ov1.CreateAppResponse], error) {
	name := req.Msg.Name
	if name == "" {
		var err error
		if name, err = randomName(); err != nil {
			return nil, err
		}
	}
	app, err := a.d.createApp(ctx, m3o.App{Name: name, Owner: who(ctx).User, Branch: req.Msg.Branch})
	if err != nil {
		return nil, err
	}
	w, err := a.wire(ctx, app)
	if err != nil {
		return nil, err
	}
	return connect.NewResponse(&m3ov1.CreateAppResponse{App: w}), nil
}

func (a appsAPI) List(ctx context.Context, _ *connect.Request[m3ov1.ListAppsRequest]) (*connect.Response[m3ov1.ListAppsResponse], error) {
	apps, err := a.d.ledger.Apps(ctx)
	if err != nil {
		return nil, err
	}
	res := &m3ov1.ListAppsResponse{}
	for _, app := range apps {
		if a.d.auth.Allow(ctx, who(ctx), auth.AppsRead, app.Name) != nil {
			continue // not theirs to know of
		}
		w, err := a.wire(ctx, app)
		if err != nil {
			return nil, err
		}
		res.Apps = append(res.Apps, w)
	}
	return connect.NewResponse(res), nil
}

func (a appsAPI) Get(ctx context.Context, req *connect.Request[m3ov1.GetAppRequest]) (*connect.Response[m3ov1.GetAppResponse], error) {
	app, err := a.d.ledger.App(ctx, req.Msg.App)
	if err != nil {
		return nil, err
	}
	w, err := a.wire(ctx, app)
	if err != nil {
		return nil, err
	}
	return connect.NewResponse(&m3ov1.GetAppResponse{App: w}), nil
}

func (a appsAPI) Destroy(ctx context.Context, req *connect.Request[m3ov1.DestroyAppRequest]) (*connect.Response[m3ov1.DestroyAppResponse], error) {
	if req.Msg.Confirm != req.Msg.App {
		return nil, &m3o.Error{Kind: m3o.Invalid, Msg: "the confirmation does not match the app's name", Hint: "m3o destroy --confirm " + req.Msg.App}
	}
	if err := a.d.destroyApp(ctx, req.Msg.App); err != nil {
		return nil, err
	}
	return connect.NewResponse(&m3ov1.DestroyAppResponse{}), nil
}

type releasesAPI struct{ d *Daemon }

func wireRelease(r m3o.Release, status string) *m3ov1.Release {
	out := &m3ov1.Release{Version: int32(r.Version), Status: status, Commit: r.Commit, Message: r.Message, Reason: r.Reason, User: r.User,
		Created: stamp(r.Created), Image: r.Image, Config: int32(r.Config), Build: int32(r.Build), Descriptors: r.Descriptors, BreakingPolicy: r.BreakingPolicy, Breaking: r.Breaking,
		Processes: map[string]*m3ov1.Process{}}
	for name, p := range r.Processes {
		out.Processes[name] = &m3ov1.Process{Command: p.Command, Replicas: int32(p.Replicas), Port: int32(p.Port)}
	}
	return out
}

func (a releasesAPI) List(ctx context.Context, req *connect.Request[m3ov1.ListReleasesRequest]) (*connect.Response[m3ov1.ListReleasesResponse], error) {
	rels, err := a.d.ledger.Releases(ctx, req.Msg.App, limit(req.Msg.Limit))
	if err != nil {
		return nil, err
	}
	res := &m3ov1.ListReleasesResponse{}
	open, err := a.d.ledger.UnfinishedDeploys(ctx)
	if err != nil {
		return nil, err
	}
	underWay := slices.ContainsFunc(open, func(dep release.Deploy) bool { return dep.App == req.Msg.App })
	for _, r := range rels {
		status, err := a.d.ledger.ReleaseStatus(ctx, r.App, r.Version)
		if err != nil {
			return nil, err
		}
		// A crash right after a release was numbered leaves one that no deploy knows.
		if status == release.ReleasePending && !underWay {
			status = release.ReleaseFailed
		}
		res.Releases = append(res.Releases, wireRelease(r, string(status)))
	}
	return connect.NewResponse(res), nil
}

// limit is how many records a list returns: 15 unless asked, 1,000 at most.
func limit(n int32) int {
	if n <= 0 {
		return 15
	}
	return int(min(n, 1000))
}

func (a releasesAPI) Rollback(ctx context.Context, req *connect.Request[m3ov1.RollbackRequest]) (*connect.Response[m3ov1.RollbackResponse], error) {
	began := time.Now()
	rel, from, err := a.d.rollback(ctx, req.Msg.App, who(ctx).User, int(req.Msg.Version))
	if err != nil {
		return nil, err
	}
	return connect.NewResponse(&m3ov1.RollbackResponse{Release: wireRelease(rel, "live"), From: int32(from), Millis: time.Since(began).Milliseconds()}), nil
}

type buildsAPI struct{ d *Daemon }

func (a buildsAPI) List(ctx context.Context, req *connect.Request[m3ov1.ListBuildsRequest]) (*connect.Response[m3ov1.ListBuildsResponse], error) {
	bs, err := a.d.ledger.Builds(ctx, req.Msg.App, limit(req.Msg.Limit))
	if err != nil {
		return nil, err
	}
	res := &m3ov1.ListBuildsResponse{}
	for _, b := range bs {
		res.Builds = append(res.Builds, &m3ov1.Build{Number: int32(b.Number), Status: string(b.Status), Commit: b.Commit, Message: b.Message,
			User: b.User, Error: b.Error, Started: stamp(b.Started), Finished: stamp(b.Finished), Image: b.Image})
	}
	return connect.NewResponse(res), nil
}

func (a buildsAPI) Output(ctx context.Context, req *connect.Request[m3ov1.BuildOutputRequest], out *connect.ServerStream[m3ov1.BuildOutputResponse]) error {
	app, n := req.Msg.App, int(req.Msg.Number)
	if n == 0 {
		bs, err := a.d.ledger.Builds(ctx, app, 1)
		if err != nil {
			return err
		}
		if len(bs) == 0 {
			return &m3o.Error{Kind: m3o.NotFound, Msg: app + " has no build yet", Hint: "git push m3o main makes one"}
		}
		n = bs[0].Number
	}
	if _, err := a.d.ledger.Build(ctx, app, n); err != nil {
		return err
	}
	f, err := os.Open(a.d.buildLog(app, n))
	if errors.Is(err, fs.ErrNotExist) {
		return nil // it ended before its first line
	} else if err != nil {
		return err
	}
	defer f.Close() //nolint:errcheck // only read
	buf := make([]byte, 32<<10)
	for {
		k, err := f.Read(buf)
		if k > 0 {
			if err := out.Send(&m3ov1.BuildOutputResponse{Data: buf[:k]}); err != nil {
				return err
			}
		}
		if err == nil {
			continue
		}
		if !errors.Is(err, io.EOF) {
			return err
		}
		if !req.Msg.Follow {
			return nil
		}
		// The end is read once more after the build has ended, or lines would be lost.
		b, err := a.d.ledger.Build(ctx, app, n)
		if err != nil {
			return err
		}
		if b.Status != m3o.BuildRunning {
			req.Msg.Follow = false
			continue
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(100 * time.Millisecond):
		}
	}
}

type configAPI struct{ d *Daemon }

func (a configAPI) List(ctx context.Context, req *connect.Request[m3ov1.ListConfigRequest]) (*connect.Response[m3ov1.ListConfigResponse], error) {
	app := req.Msg.App
	if req.Msg.Preview {
		app = overlayOf(app)
	}
	rev, err := a.d.config.Current(ctx, app)
	if err != nil {
		return nil, err
	}
	res := &m3ov1.ListConfigResponse{Revision: int32(rev.Number)}
	for _, v := range rev.Vars {
		w := &m3ov1.Var{Name: v.Name, Secret: v.Secret}
		if !v.Secret {
			w.Value = v.Value.Reveal()
		}
		res.Vars = append(res.Vars, w)
	}
	return connect.NewResponse(res), nil
}

func (a configAPI) Set(ctx context.Context, req *connect.Request[m3ov1.SetConfigRequest]) (*connect.Response[m3ov1.SetConfigResponse], error) {
	var set []config.Var
	var names []string
	for _, v := range req.Msg.Vars {
		set = append(set, config.Var{Name: v.Name, Value: m3o.Secret(v.Value), Secret: v.Secret})
		names = append(names, v.Name)
	}
	rev, rel, err := a.change(ctx, req.Msg.App, req.Msg.Preview, set, nil, setReason(names, nil), req.Msg.NoRestart)
	if err != nil {
		return nil, err
	}
	return connect.NewResponse(&m3ov1.SetConfigResponse{Revision: rev, Release: rel}), nil
}

func (a configAPI) Unset(ctx context.Context, req *connect.Request[m3ov1.UnsetConfigRequest]) (*connect.Response[m3ov1.UnsetConfigResponse], error) {
	rev, rel, err := a.change(ctx, req.Msg.App, req.Msg.Preview, nil, req.Msg.Names, setReason(nil, req.Msg.Names), req.Msg.NoRestart)
	if err != nil {
		return nil, err
	}
	return connect.NewResponse(&m3ov1.UnsetConfigResponse{Revision: rev, Release: rel}), nil
}

// change changes an app's config, or what its previews get in place of it,
// which their next deploy takes up.
func (a configAPI) change(ctx context.Context, app string, preview bool, set []config.Var, unset []string, reason string, keep bool) (revision, version int32, err error) {
	if preview {
		app, keep = overlayOf(app), true
	}
	before, err := a.d.config.Current(ctx, app)
	if err != nil {
		return 0, 0, err
	}
	rev, err := a.d.config.Change(ctx, app, who(ctx).User, set, unset)
	if err != nil {
		return 0, 0, err
	}
	if keep || rev.Number == before.Number {
		return int32(rev.Number), 0, nil
	}
	rel, err := a.d.configure(ctx, app, who(ctx).User, rev.Number, reason)
	if err != nil {
		return 0, 0, &m3o.Error{Kind: m3o.KindOf(err), Msg: "the change is saved, but not live: " + userMessage(err),
			Hint: "the release before it still runs, without the change; correct it with m3o config:set or config:unset", Err: err}
	}
	return int32(rev.Number), int32(rel.Version), nil
}

type processesAPI struct{ d *Daemon }

func (a processesAPI) List(ctx context.Context, req *connect.Request[m3ov1.ListInstancesRequest]) (*connect.Response[m3ov1.ListInstancesResponse], error) {
	res := &m3ov1.ListInstancesResponse{}
	if sh, ok := a.d.shapes.get(req.Msg.App); ok {
		res.Asleep = sh.asleep
	}
	for _, in := range a.d.routes.list(req.Msg.App) {
		if in.Phase == m3o.Exited && in.Exit == 0 && in.Restarts == 0 {
			continue // stopped on purpose
		}
		res.Instances = append(res.Instances, a.d.instance(ctx, in))
	}
	return connect.NewResponse(res), nil
}

func refOf(in m3o.Instance) runtime.Ref {
	return runtime.Ref{App: in.App, Process: in.Process, Release: in.Release}
}
