package forge

//lint:file-ignore SA1019 this client is the one the project chose; its successor has the same API

import (
	"context"
	"net/http"
	"net/url"
	"strconv"

	"github.com/xanzy/go-gitlab"

	"github.com/m3o/m3o"
)

type gitlabForge struct {
	c    *gitlab.Client
	name string
}

var _ Client = (*gitlabForge)(nil)

// unlimited keeps go-gitlab from asking the server for its limits first: what
// the server says when there were too many calls is enough.
type unlimited struct{}

func (unlimited) Wait(ctx context.Context) error { return ctx.Err() }

func newGitLab(c Config, base *url.URL, hc *http.Client) (Client, error) {
	// Repeating is the caller's: it knows what else waits.
	gl, err := gitlab.NewClient(c.Token.Reveal(), gitlab.WithBaseURL(base.String()), gitlab.WithHTTPClient(hc), gitlab.WithCustomRetryMax(0), gitlab.WithCustomLimiter(unlimited{}))
	if err != nil {
		return nil, m3o.Errorf(m3o.Invalid, "use GitLab at %s: %w", base, err)
	}
	gl.UserAgent = "m3o"
	return &gitlabForge{gl, c.Name}, nil
}

func gitlabErr(res *gitlab.Response, err error) error {
	if err == nil {
		return nil
	}
	if res == nil {
		return explain(nil, "", err)
	}
	said := err.Error()
	if e, ok := err.(*gitlab.ErrorResponse); ok { //nolint:errorlint // it comes as it is
		said = e.Message
	}
	return explain(res.Response, said, err)
}

func (f *gitlabForge) Repo(ctx context.Context) (Repo, error) {
	p, res, err := f.c.Projects.GetProject(f.name, nil, gitlab.WithContext(ctx))
	if err != nil {
		return Repo{}, gitlabErr(res, err)
	}
	return Repo{Name: p.PathWithNamespace, Branch: p.DefaultBranch, Private: p.Visibility != gitlab.PublicVisibility}, nil
}

func (f *gitlabForge) Status(ctx context.Context, commit string, s Status) error {
	state := map[State]gitlab.BuildStateValue{Pending: gitlab.Running, Success: gitlab.Success, Failure: gitlab.Failed}[s.State]
	_, res, err := f.c.Commits.SetCommitStatus(f.name, commit, &gitlab.SetCommitStatusOptions{State: state, Name: &s.Context, Context: &s.Context,
		TargetURL: optional(s.URL), Description: gitlab.Ptr(clip(s.Description, 255))}, gitlab.WithContext(ctx))
	err = gitlabErr(res, err)
	if k := m3o.KindOf(err); err != nil && k == m3o.Invalid && s.State == Pending {
		return nil // "cannot transition from running": it is told already
	}
	return err
}

func (f *gitlabForge) Deployment(ctx context.Context, id string, d Deployment) (string, error) {
	state := map[State]gitlab.DeploymentStatusValue{Pending: gitlab.DeploymentStatusRunning, Success: gitlab.DeploymentStatusSuccess,
		Failure: gitlab.DeploymentStatusFailed, Inactive: gitlab.DeploymentStatusCanceled}[d.State]
	if n, err := strconv.Atoi(id); err == nil {
		if d.State == Inactive {
			return id, nil // one that ended well cannot be cancelled; its environment is stopped by hand
		}
		_, res, err := f.c.Deployments.UpdateProjectDeployment(f.name, n, &gitlab.UpdateProjectDeploymentOptions{Status: &state}, gitlab.WithContext(ctx))
		if err = gitlabErr(res, err); !gone(err) {
			return id, err
		}
	}
	dep, res, err := f.c.Deployments.CreateProjectDeployment(f.name, &gitlab.CreateProjectDeploymentOptions{Environment: &d.Environment, Ref: &d.Ref, SHA: &d.Commit,
		Tag: gitlab.Ptr(false), Status: &state}, gitlab.WithContext(ctx))
	if err != nil {
		return "", gitlabErr(res, err)
	}
	return strconv.Itoa(dep.ID), nil
}

func (f *gitlabForge) Comment(ctx context.Context, pull int, id, text string) (string, error) {
	if n, err := strconv.Atoi(id); err == nil {
		_, res, err := f.c.Notes.UpdateMergeRequestNote(f.name, pull, n, &gitlab.UpdateMergeRequestNoteOptions{Body: &text}, gitlab.WithContext(ctx))
		if err = gitlabErr(res, err); !gone(err) {
			return id, err
		}
	}
	n, res, err := f.c.Notes.CreateMergeRequestNote(f.name, pull, &gitlab.CreateMergeRequestNoteOptions{Body: &text}, gitlab.WithContext(ctx))
	if err != nil {
		return "", gitlabErr(res, err)
	}
	return strconv.Itoa(n.ID), nil
}

func (f *gitlabForge) CreateHook(ctx context.Context, to string, secret m3o.Secret) (string, error) {
	yes := gitlab.Ptr(true)
	h, res, err := f.c.Projects.AddProjectHook(f.name, &gitlab.AddProjectHookOptions{URL: &to, Token: gitlab.Ptr(secret.Reveal()), PushEvents: yes, TagPushEvents: yes,
		MergeRequestsEvents: yes, EnableSSLVerification: yes}, gitlab.WithContext(ctx))
	if err != nil {
		return "", gitlabErr(res, err)
	}
	return strconv.Itoa(h.ID), nil
}

func (f *gitlabForge) DeleteHook(ctx context.Context, id string) error {
	n, err := strconv.Atoi(id)
	if err != nil {
		return nil
	}
	res, err := f.c.Projects.DeleteProjectHook(f.name, n, gitlab.WithContext(ctx))
	return gitlabErr(res, err)
}

func (f *gitlabForge) CreateKey(ctx context.Context, title, publicKey string) (string, error) {
	k, res, err := f.c.DeployKeys.AddDeployKey(f.name, &gitlab.AddDeployKeyOptions{Title: &title, Key: &publicKey, CanPush: gitlab.Ptr(false)}, gitlab.WithContext(ctx))
	if err != nil {
		return "", gitlabErr(res, err)
	}
	return strconv.Itoa(k.ID), nil
}

func (f *gitlabForge) DeleteKey(ctx context.Context, id string) error {
	n, err := strconv.Atoi(id)
	if err != nil {
		return nil
	}
	res, err := f.c.DeployKeys.DeleteDeployKey(f.name, n, gitlab.WithContext(ctx))
	return gitlabErr(res, err)
}
