package daemon

import (
	"context"
	"errors"
	"io"
	"strings"

	"connectrpc.com/connect"

	"github.com/m3o/m3o"
	m3ov1 "github.com/m3o/m3o/api/m3o/v1"
	"github.com/m3o/m3o/gitserver"
)

type deploysAPI struct{ d *Daemon }

func (a deploysAPI) Upload(ctx context.Context, req *connect.Request[m3ov1.UploadRequest]) (*connect.Response[m3ov1.UploadResponse], error) {
	res, err := a.d.takePiece(ctx, who(ctx).User, req.Msg)
	if err != nil {
		return nil, err
	}
	return connect.NewResponse(res), nil
}

// An outputStream passes a deploy's output on as messages. Once one cannot be sent,
// the caller has gone and what follows is dropped.
type outputStream struct{ send func([]byte) error }

func (s outputStream) Write(p []byte) (int, error) {
	if err := s.send(p); err != nil {
		return 0, io.ErrClosedPipe
	}
	return len(p), nil
}

func (a deploysAPI) Start(ctx context.Context, req *connect.Request[m3ov1.StartDeployRequest], out *connect.ServerStream[m3ov1.StartDeployResponse]) error {
	m := req.Msg
	if m.Ref != "" && m.Image != "" {
		return m3o.Errorf(m3o.Invalid, "a deploy is of a ref or of an image, not of both")
	}
	repo, err := a.d.repo(ctx, m.App)
	if err != nil {
		return err
	}
	src := m3o.Source{App: m.App, Repo: repo, User: who(ctx).User, Via: "m3o deploy", Options: m.Options, Image: m.Image}
	if m.Image == "" {
		if src.Commit, err = a.resolve(ctx, m.App, repo, m.Ref); err != nil {
			return err
		}
	}
	w := outputStream{func(p []byte) error { return out.Send(&m3ov1.StartDeployResponse{Output: p}) }}
	rel, err := a.d.deployCommit(ctx, src, w)
	a.d.background(func(ctx context.Context) { a.d.keepUploads(ctx, m.App, repo) })
	if err != nil {
		return err
	}
	last := &m3ov1.StartDeployResponse{Release: rel.Name()}
	if _, ok := rel.Processes[webProcess]; ok {
		last.Url = a.d.url(rel.App)
	}
	return out.Send(last)
}

func (a deploysAPI) resolve(ctx context.Context, app, repo, name string) (string, error) {
	if name != "" {
		return gitserver.Resolve(ctx, repo, name)
	}
	rec, err := a.d.ledger.App(ctx, app)
	if err != nil {
		return "", err
	}
	commit, err := gitserver.Resolve(ctx, repo, rec.DeployBranch())
	if m3o.KindOf(err) == m3o.NotFound {
		err = &m3o.Error{Kind: m3o.NotFound, Msg: app + " has no branch " + rec.DeployBranch() + " yet", Hint: "git push m3o " + rec.DeployBranch() + ", or m3o deploy . of this folder", Err: err}
	}
	return commit, err
}

// keepUploads removes the uploaded commits that no kept release is of.
func (d *Daemon) keepUploads(ctx context.Context, app, repo string) {
	kept, err := d.ledger.Kept(ctx, app)
	if err == nil {
		keep := map[string]bool{}
		for _, rel := range kept {
			keep[rel.Commit] = true
		}
		err = gitserver.KeepUploads(ctx, repo, keep)
	}
	if err != nil && !errors.Is(err, context.Canceled) {
		d.log.Error("remove old uploads", "app", app, "err", err)
	}
}

// imageSubject is what stands for a commit's subject in a release of an image.
func imageSubject(image string) string {
	if strings.HasPrefix(image, "sha256:") {
		return "uploaded image"
	}
	return "image " + image
}
