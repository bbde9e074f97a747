package forge

import (
	"context"
	"crypto"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"encoding/base64"
	"encoding/pem"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"strconv"
	"sync"
	"time"

	"github.com/google/go-github/v57/github"

	"github.com/m3o/m3o"
)

// An App is a GitHub App that was installed on the repository's owner. It is
// used in place of a token: GitHub gives tokens of one hour for it.
type App struct {
	ID  int64
	Key m3o.Secret // private key, PEM
}

// A Tokener gives the token that git uses over https, where that is not one
// that never changes.
type Tokener interface {
	Token(ctx context.Context) (m3o.Secret, error)
}

type githubForge struct {
	c           *github.Client
	owner, name string
	app         *appAuth
}

var (
	_ Client  = (*githubForge)(nil)
	_ Tokener = (*githubForge)(nil)
)

func newGitHub(c Config, base *url.URL, hc *http.Client, owner, name string) (Client, error) {
	f := &githubForge{owner: owner, name: name}
	auth := func(r *http.Request) error { return nil }
	if c.Token != "" {
		auth = func(r *http.Request) error {
			r.Header.Set("Authorization", "Bearer "+c.Token.Reveal())
			return nil
		}
	}
	if c.App != nil {
		key, err := parseKey(c.App.Key)
		if err != nil {
			return nil, err
		}
		f.app = &appAuth{id: c.App.ID, key: key, owner: owner, name: name}
		f.app.c = client(base, hc, func(r *http.Request) error {
			jwt, err := f.app.jwt(time.Now())
			r.Header.Set("Authorization", "Bearer "+jwt)
			return err
		})
		auth = func(r *http.Request) error {
			t, err := f.app.token(r.Context())
			r.Header.Set("Authorization", "Bearer "+t.Reveal())
			return err
		}
	}
	f.c = client(base, hc, auth)
	return f, nil
}

func client(base *url.URL, hc *http.Client, auth func(*http.Request) error) *github.Client {
	signed := *hc
	signed.Transport = signer{hc.Transport, auth}
	c := github.NewClient(&signed)
	c.BaseURL, c.UserAgent = base, "m3o"
	return c
}

// signer adds the credential to each request.
type signer struct {
	next http.RoundTripper
	auth func(*http.Request) error
}

func (s signer) RoundTrip(r *http.Request) (*http.Response, error) {
	r = r.Clone(r.Context())
	if err := s.auth(r); err != nil {
		return nil, err
	}
	return s.next.RoundTrip(r)
}

func githubErr(res *github.Response, err error) error {
	if err == nil {
		return nil
	}
	if e, ok := errors.AsType[*m3o.Error](err); ok {
		return e // of the App's token
	}
	if l, ok := errors.AsType[*github.RateLimitError](err); ok {
		return &m3o.Error{Kind: m3o.Unavailable, Msg: "GitHub's limit of calls is used up", Hint: "it is tried again", Err: &RateLimited{l.Rate.Reset.Time}}
	}
	if l, ok := errors.AsType[*github.AbuseRateLimitError](err); ok {
		wait := time.Minute
		if l.RetryAfter != nil {
			wait = *l.RetryAfter
		}
		return &m3o.Error{Kind: m3o.Unavailable, Msg: "GitHub asks for fewer calls", Hint: "it is tried again", Err: &RateLimited{time.Now().Add(wait)}}
	}
	said := ""
	if e, ok := errors.AsType[*github.ErrorResponse](err); ok {
		said = e.Message
		for _, x := range e.Errors {
			said += " " + x.Message
		}
	}
	if res == nil {
		return explain(nil, said, err)
	}
	return explain(res.Response, said, err)
}

func (f *githubForge) Token(ctx context.Context) (m3o.Secret, error) {
	if f.app == nil {
		return "", nil
	}
	return f.app.token(ctx)
}

func (f *githubForge) Repo(ctx context.Context) (Repo, error) {
	r, res, err := f.c.Repositories.Get(ctx, f.owner, f.name)
	if err != nil {
		return Repo{}, githubErr(res, err)
	}
	return Repo{Name: r.GetFullName(), Branch: r.GetDefaultBranch(), Private: r.GetPrivate()}, nil
}

func (f *githubForge) Status(ctx context.Context, commit string, s Status) error {
	_, res, err := f.c.Repositories.CreateStatus(ctx, f.owner, f.name, commit, &github.RepoStatus{
		State: github.String(string(s.State)), TargetURL: optional(s.URL), Description: github.String(clip(s.Description, 140)), Context: &s.Context})
	return githubErr(res, err)
}

func optional(s string) *string {
	if s == "" {
		return nil
	}
	return &s
}

func (f *githubForge) Deployment(ctx context.Context, id string, d Deployment) (string, error) {
	n, _ := strconv.ParseInt(id, 10, 64)
	if n == 0 {
		none := []string{} // our own status is pending: it must not be waited for
		dep, res, err := f.c.Repositories.CreateDeployment(ctx, f.owner, f.name, &github.DeploymentRequest{Ref: &d.Commit, Environment: &d.Environment,
			AutoMerge: github.Bool(false), RequiredContexts: &none, Description: github.String("by m3o"), TransientEnvironment: github.Bool(!d.Production),
			ProductionEnvironment: github.Bool(d.Production)})
		if err != nil {
			return "", githubErr(res, err)
		}
		n = dep.GetID()
	}
	state := map[State]string{Pending: "in_progress", Success: "success", Failure: "failure", Inactive: "inactive"}[d.State]
	_, res, err := f.c.Repositories.CreateDeploymentStatus(ctx, f.owner, f.name, n, &github.DeploymentStatusRequest{State: &state,
		LogURL: optional(d.LogURL), EnvironmentURL: optional(d.URL), AutoInactive: github.Bool(true)})
	return strconv.FormatInt(n, 10), githubErr(res, err)
}

func (f *githubForge) Comment(ctx context.Context, pull int, id, text string) (string, error) {
	if n, err := strconv.ParseInt(id, 10, 64); err == nil {
		_, res, err := f.c.Issues.EditComment(ctx, f.owner, f.name, n, &github.IssueComment{Body: &text})
		if err = githubErr(res, err); !gone(err) {
			return id, err
		}
	}
	c, res, err := f.c.Issues.CreateComment(ctx, f.owner, f.name, pull, &github.IssueComment{Body: &text})
	if err != nil {
		return "", githubErr(res, err)
	}
	return strconv.FormatInt(c.GetID(), 10), nil
}

func (f *githubForge) CreateHook(ctx context.Context, to string, secret m3o.Secret) (string, error) {
	h, res, err := f.c.Repositories.CreateHook(ctx, f.owner, f.name, &github.Hook{Active: github.Bool(true), Events: []string{"push", "pull_request", "delete"},
		Config: map[string]any{"url": to, "content_type": "json", "secret": secret.Reveal(), "insecure_ssl": "0"}})
	if err != nil {
		return "", githubErr(res, err)
	}
	return strconv.FormatInt(h.GetID(), 10), nil
}

func (f *githubForge) DeleteHook(ctx context.Context, id string) error {
	n, err := strconv.ParseInt(id, 10, 64)
	if err != nil {
		return nil
	}
	res, err := f.c.Repositories.DeleteHook(ctx, f.owner, f.name, n)
	return githubErr(res, err)
}

func (f *githubForge) CreateKey(ctx context.Context, title, publicKey string) (string, error) {
	k, res, err := f.c.Repositories.CreateKey(ctx, f.owner, f.name, &github.Key{Title: &title, Key: &publicKey, ReadOnly: github.Bool(true)})
	if err != nil {
		return "", githubErr(res, err)
	}
	return strconv.FormatInt(k.GetID(), 10), nil
}

func (f *githubForge) DeleteKey(ctx context.Context, id string) error {
	n, err := strconv.ParseInt(id, 10, 64)
	if err != nil {
		return nil
	}
	res, err := f.c.Repositories.DeleteKey(ctx, f.owner, f.name, n)
	return githubErr(res, err)
}

// appAuth gets and keeps the installation's token.
type appAuth struct {
	id          int64
	key         *rsa.PrivateKey
	owner, name string
	c           *github.Client

	mu      sync.Mutex // held while a token is asked for, so that one call does
	current m3o.Secret
	until   time.Time
}

func parseKey(text m3o.Secret) (*rsa.PrivateKey, error) {
	bad := &m3o.Error{Kind: m3o.Invalid, Msg: "the GitHub App's key is no RSA private key in PEM", Hint: "download one on the App's settings page"}
	block, _ := pem.Decode([]byte(text.Reveal()))
	if block == nil {
		return nil, bad
	}
	if k, err := x509.ParsePKCS1PrivateKey(block.Bytes); err == nil {
		return k, nil
	}
	if k, err := x509.ParsePKCS8PrivateKey(block.Bytes); err == nil {
		if r, ok := k.(*rsa.PrivateKey); ok {
			return r, nil
		}
	}
	return nil, bad
}

// jwt is what a GitHub App proves itself with, for some minutes.
func (a *appAuth) jwt(now time.Time) (string, error) {
	enc := base64.RawURLEncoding
	claims := fmt.Sprintf(`{"iat":%d,"exp":%d,"iss":"%d"}`, now.Add(-time.Minute).Unix(), now.Add(8*time.Minute).Unix(), a.id)
	head := enc.EncodeToString([]byte(`{"alg":"RS256","typ":"JWT"}`)) + "." + enc.EncodeToString([]byte(claims))
	sum := sha256.Sum256([]byte(head))
	sig, err := rsa.SignPKCS1v15(rand.Reader, a.key, crypto.SHA256, sum[:])
	if err != nil {
		return "", fmt.Errorf("sign for the GitHub App: %w", err)
	}
	return head + "." + enc.EncodeToString(sig), nil
}

func (a *appAuth) token(ctx context.Context) (m3o.Secret, error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if time.Until(a.until) > 5*time.Minute {
		return a.current, nil
	}
	in, res, err := a.c.Apps.FindRepositoryInstallation(ctx, a.owner, a.name)
	if err != nil {
		return "", githubErr(res, err)
	}
	t, res, err := a.c.Apps.CreateInstallationToken(ctx, in.GetID(), &github.InstallationTokenOptions{Repositories: []string{a.name}})
	if err != nil {
		return "", githubErr(res, err)
	}
	a.current, a.until = m3o.Secret(t.GetToken()), t.GetExpiresAt().Time
	return a.current, nil
}
