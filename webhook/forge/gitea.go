package forge

import (
	"context"
	"fmt"
	"net/url"
	"strconv"

	"github.com/m3o/m3o"
)

// gitea is Gitea and Forgejo.
type gitea struct {
	rest
	repo string // "repos/owner/name"
}

var _ Client = (*gitea)(nil)

type giteaID struct {
	ID int64 `json:"id"`
}

func (g giteaID) String() string { return strconv.FormatInt(g.ID, 10) }

func (f *gitea) Repo(ctx context.Context) (Repo, error) {
	var x struct {
		FullName      string `json:"full_name"`
		DefaultBranch string `json:"default_branch"`
		Private       bool   `json:"private"`
	}
	err := f.call(ctx, "GET", f.repo, nil, &x)
	return Repo{x.FullName, x.DefaultBranch, x.Private}, err
}

func (f *gitea) Status(ctx context.Context, commit string, s Status) error {
	return f.call(ctx, "POST", f.repo+"/statuses/"+commit, map[string]string{"state": string(s.State), "context": s.Context,
		"target_url": s.URL, "description": clip(s.Description, 255)}, nil)
}

// Deployment does nothing: Gitea has none.
func (f *gitea) Deployment(context.Context, string, Deployment) (string, error) { return "", nil }

func (f *gitea) Comment(ctx context.Context, pull int, id, text string) (string, error) {
	body := map[string]string{"body": text}
	if id != "" {
		if err := f.call(ctx, "PATCH", f.repo+"/issues/comments/"+url.PathEscape(id), body, nil); !gone(err) {
			return id, err
		}
	}
	var x giteaID
	err := f.call(ctx, "POST", fmt.Sprintf("%s/issues/%d/comments", f.repo, pull), body, &x)
	return x.String(), err
}

func (f *gitea) CreateHook(ctx context.Context, to string, secret m3o.Secret) (string, error) {
	var x giteaID
	err := f.call(ctx, "POST", f.repo+"/hooks", map[string]any{"type": "gitea", "active": true,
		"events": []string{"push", "delete", "pull_request", "pull_request_sync"},
		"config": map[string]string{"url": to, "content_type": "json", "secret": secret.Reveal()}}, &x)
	return x.String(), err
}

func (f *gitea) DeleteHook(ctx context.Context, id string) error {
	return f.call(ctx, "DELETE", f.repo+"/hooks/"+url.PathEscape(id), nil, nil)
}

func (f *gitea) CreateKey(ctx context.Context, title, publicKey string) (string, error) {
	var x giteaID
	err := f.call(ctx, "POST", f.repo+"/keys", map[string]any{"title": title, "key": publicKey, "read_only": true}, &x)
	return x.String(), err
}

func (f *gitea) DeleteKey(ctx context.Context, id string) error {
	return f.call(ctx, "DELETE", f.repo+"/keys/"+url.PathEscape(id), nil, nil)
}
