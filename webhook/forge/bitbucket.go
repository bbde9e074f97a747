package forge

import (
	"context"
	"fmt"
	"net/url"
	"strconv"

	"github.com/m3o/m3o"
)

// bitbucket is Bitbucket Cloud.
type bitbucket struct {
	rest
	repo string // "repositories/workspace/name"
}

var _ Client = (*bitbucket)(nil)

var buildStates = map[State]string{Pending: "INPROGRESS", Success: "SUCCESSFUL", Failure: "FAILED"}

func (f *bitbucket) Repo(ctx context.Context) (Repo, error) {
	var x struct {
		FullName   string `json:"full_name"`
		IsPrivate  bool   `json:"is_private"`
		Mainbranch struct {
			Name string `json:"name"`
		} `json:"mainbranch"`
	}
	err := f.call(ctx, "GET", f.repo, nil, &x)
	return Repo{x.FullName, x.Mainbranch.Name, x.IsPrivate}, err
}

func (f *bitbucket) Status(ctx context.Context, commit string, s Status) error {
	return f.call(ctx, "POST", f.repo+"/commit/"+commit+"/statuses/build", map[string]string{"state": buildStates[s.State],
		"key": short(s.Context, 40), "name": s.Context, "url": s.URL, "description": clip(s.Description, 255)}, nil)
}

// Deployment does nothing: Cloud has deployments of its own pipelines only.
func (f *bitbucket) Deployment(context.Context, string, Deployment) (string, error) { return "", nil }

func (f *bitbucket) Comment(ctx context.Context, pull int, id, text string) (string, error) {
	path := fmt.Sprintf("%s/pullrequests/%d/comments", f.repo, pull)
	body := map[string]any{"content": map[string]string{"raw": text}}
	if id != "" {
		if err := f.call(ctx, "PUT", path+"/"+id, body, nil); !gone(err) {
			return id, err
		}
	}
	var x struct {
		ID int64 `json:"id"`
	}
	err := f.call(ctx, "POST", path, body, &x)
	return strconv.FormatInt(x.ID, 10), err
}

func (f *bitbucket) CreateHook(ctx context.Context, to string, secret m3o.Secret) (string, error) {
	var x struct {
		UUID string `json:"uuid"`
	}
	err := f.call(ctx, "POST", f.repo+"/hooks", map[string]any{"description": "m3o", "url": to, "active": true, "secret": secret.Reveal(),
		"events": []string{"repo:push", "pullrequest:created", "pullrequest:updated", "pullrequest:fulfilled", "pullrequest:rejected"}}, &x)
	return x.UUID, err
}

func (f *bitbucket) DeleteHook(ctx context.Context, id string) error {
	return f.call(ctx, "DELETE", f.repo+"/hooks/"+url.PathEscape(id), nil, nil)
}

func (f *bitbucket) CreateKey(ctx context.Context, title, publicKey string) (string, error) {
	var x struct {
		ID int64 `json:"id"`
	}
	err := f.call(ctx, "POST", f.repo+"/deploy-keys", map[string]string{"key": publicKey, "label": title}, &x)
	return strconv.FormatInt(x.ID, 10), err
}

func (f *bitbucket) DeleteKey(ctx context.Context, id string) error {
	return f.call(ctx, "DELETE", f.repo+"/deploy-keys/"+url.PathEscape(id), nil, nil)
}

// bitbucketDC is Bitbucket Data Center and Server.
type bitbucketDC struct {
	rest
	owner, name string
}

var _ Client = (*bitbucketDC)(nil)

func (f *bitbucketDC) path(api, rest string) string {
	return api + "/projects/" + url.PathEscape(f.owner) + "/repos/" + url.PathEscape(f.name) + rest
}

func (f *bitbucketDC) Repo(ctx context.Context) (Repo, error) {
	var x struct {
		Slug    string `json:"slug"`
		Public  bool   `json:"public"`
		Project struct {
			Key string `json:"key"`
		} `json:"project"`
	}
	if err := f.call(ctx, "GET", f.path("api/1.0", ""), nil, &x); err != nil {
		return Repo{}, err
	}
	var b struct {
		DisplayID string `json:"displayId"`
	}
	// An empty repository has no main branch, which is told by 404.
	if err := f.call(ctx, "GET", f.path("api/1.0", "/default-branch"), nil, &b); err != nil && !gone(err) {
		return Repo{}, err
	}
	return Repo{x.Project.Key + "/" + x.Slug, b.DisplayID, !x.Public}, nil
}

func (f *bitbucketDC) Status(ctx context.Context, commit string, s Status) error {
	return f.call(ctx, "POST", f.path("api/1.0", "/commits/"+commit+"/builds"), map[string]string{"state": buildStates[s.State],
		"key": short(s.Context, 255), "name": s.Context, "url": s.URL, "description": clip(s.Description, 255)}, nil)
}

// Deployment does nothing: the build status says it all.
func (f *bitbucketDC) Deployment(context.Context, string, Deployment) (string, error) { return "", nil }

func (f *bitbucketDC) Comment(ctx context.Context, pull int, id, text string) (string, error) {
	path := f.path("api/1.0", fmt.Sprintf("/pull-requests/%d/comments", pull))
	type comment struct {
		ID      int64  `json:"id,omitempty"`
		Version int    `json:"version"`
		Text    string `json:"text"`
	}
	if id != "" {
		var old comment // an edit must say which version it edits
		err := f.call(ctx, "GET", path+"/"+id, nil, &old)
		if err == nil {
			err = f.call(ctx, "PUT", path+"/"+id, comment{Version: old.Version, Text: text}, nil)
		}
		if !gone(err) {
			return id, err
		}
	}
	var x comment
	err := f.call(ctx, "POST", path, map[string]string{"text": text}, &x)
	return strconv.FormatInt(x.ID, 10), err
}

func (f *bitbucketDC) CreateHook(ctx context.Context, to string, secret m3o.Secret) (string, error) {
	var x struct {
		ID int64 `json:"id"`
	}
	err := f.call(ctx, "POST", f.path("api/1.0", "/webhooks"), map[string]any{"name": "m3o", "url": to, "active": true,
		"configuration": map[string]string{"secret": secret.Reveal()},
		"events":        []string{"repo:refs_changed", "pr:opened", "pr:from_ref_updated", "pr:merged", "pr:declined", "pr:deleted"}}, &x)
	return strconv.FormatInt(x.ID, 10), err
}

func (f *bitbucketDC) DeleteHook(ctx context.Context, id string) error {
	return f.call(ctx, "DELETE", f.path("api/1.0", "/webhooks/"+url.PathEscape(id)), nil, nil)
}

func (f *bitbucketDC) CreateKey(ctx context.Context, title, publicKey string) (string, error) {
	var x struct {
		Key struct {
			ID int64 `json:"id"`
		} `json:"key"`
	}
	err := f.call(ctx, "POST", f.path("keys/1.0", "/ssh"), map[string]any{"key": map[string]string{"text": publicKey, "label": title}, "permission": "REPO_READ"}, &x)
	return strconv.FormatInt(x.Key.ID, 10), err
}

func (f *bitbucketDC) DeleteKey(ctx context.Context, id string) error {
	return f.call(ctx, "DELETE", f.path("keys/1.0", "/ssh/"+url.PathEscape(id)), nil, nil)
}
