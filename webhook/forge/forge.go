// Package forge speaks to GitHub, GitLab, Bitbucket and Gitea about one
// repository: it makes hooks and deploy keys, and tells how a commit's deploy
// goes by statuses, deployments and one comment a pull request.
//
// It does not know what a deploy is, nor when to tell of one; errors say
// whether trying again helps (m3o.Unavailable, RetryAfter).
package forge

import (
	"bytes"
	"cmp"
	"context"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"os"
	"strconv"
	"strings"
	"time"

	"github.com/m3o/m3o"
	"github.com/m3o/m3o/webhook"
)

// A State is how far a commit's deploy has come.
type State string

// The states that are told.
const (
	Pending  State = "pending"
	Success  State = "success"
	Failure  State = "failure"
	Inactive State = "inactive" // of a deployment that was taken away
)

// A Status is what stands beside a commit.
type Status struct {
	Context     string // which app tells it
	State       State
	Description string
	URL         string // of the log
}

// A Deployment is one commit going to one environment.
type Deployment struct {
	Environment string
	Commit      string
	Ref         string // branch, short
	Production  bool   // not a preview
	State       State
	URL         string // where the app answers
	LogURL      string
}

// A Repo is what a forge says of a repository.
type Repo struct {
	Name    string // "owner/name" as it is called now
	Branch  string // its main branch
	Private bool
}

// A Forge tells how deploys go. Implementations are safe for concurrent use.
type Forge interface {
	// Repo finds the repository by the name it was connected under.
	Repo(ctx context.Context) (Repo, error)
	// Status sets the status of a commit.
	Status(ctx context.Context, commit string, s Status) error
	// Deployment makes a deployment, or changes the one called id, and
	// returns its id; "" where the forge has none.
	Deployment(ctx context.Context, id string, d Deployment) (string, error)
	// Comment writes on a pull request, in place of the comment called id if
	// that is still there, and returns the comment's id.
	Comment(ctx context.Context, pull int, id, text string) (string, error)
}

// Admin makes and removes what a connection needs at the forge.
type Admin interface {
	// CreateHook has the forge send deliveries to url, signed with secret.
	CreateHook(ctx context.Context, url string, secret m3o.Secret) (id string, err error)
	DeleteHook(ctx context.Context, id string) error
	// CreateKey lets the SSH key read the repository.
	CreateKey(ctx context.Context, title, publicKey string) (id string, err error)
	DeleteKey(ctx context.Context, id string) error
}

// A Client is one repository at one forge.
type Client interface {
	Forge
	Admin
}

// Config says which repository, and by which right.
type Config struct {
	Provider webhook.Provider
	Host     string     // of the repository's address, for what API is empty
	API      string     // base URL of the API; "" for the forge's usual one
	Name     string     // "owner/name"
	Token    m3o.Secret // "" for none: then only public things can be asked
	App      *App       // a GitHub App, in place of a token
	CAFile   string     // further certificates to believe
}

// New makes a client. It asks nothing yet.
func New(c Config) (Client, error) {
	base, err := c.base()
	if err != nil {
		return nil, err
	}
	hc, err := httpClient(c.CAFile)
	if err != nil {
		return nil, err
	}
	owner, name, ok := strings.Cut(c.Name, "/")
	if !ok || owner == "" || name == "" {
		return nil, m3o.Errorf(m3o.Invalid, "%q is not owner/name", c.Name)
	}
	switch c.Provider {
	case webhook.GitHub:
		return newGitHub(c, base, hc, owner, name)
	case webhook.GitLab:
		return newGitLab(c, base, hc)
	}
	r := rest{base: base, hc: hc, header: http.Header{}}
	if c.Token != "" {
		r.header.Set("Authorization", "Bearer "+c.Token.Reveal())
	}
	switch c.Provider {
	case webhook.Bitbucket:
		return &bitbucket{rest: r, repo: "repositories/" + url.PathEscape(owner) + "/" + url.PathEscape(name)}, nil
	case webhook.BitbucketDC:
		return &bitbucketDC{rest: r, owner: owner, name: name}, nil
	case webhook.Gitea:
		if c.Token != "" {
			r.header.Set("Authorization", "token "+c.Token.Reveal())
		}
		return &gitea{rest: r, repo: "repos/" + url.PathEscape(owner) + "/" + url.PathEscape(name)}, nil
	}
	return nil, m3o.Errorf(m3o.Invalid, "no forge is called %q", c.Provider)
}

// base is the URL of the API, with a slash at its end.
func (c Config) base() (*url.URL, error) {
	raw := c.API
	if raw == "" {
		switch c.Provider {
		case webhook.GitHub:
			raw = "https://" + c.Host + "/api/v3/"
			if c.Host == "github.com" {
				raw = "https://api.github.com/"
			}
		case webhook.GitLab:
			raw = "https://" + c.Host + "/api/v4/"
		case webhook.Bitbucket:
			raw = "https://api.bitbucket.org/2.0/"
		case webhook.BitbucketDC:
			raw = "https://" + c.Host + "/rest/"
		case webhook.Gitea:
			raw = "https://" + c.Host + "/api/v1/"
		}
	}
	u, err := url.Parse(raw)
	if err != nil || u.Scheme != "https" || u.Host == "" || u.User != nil || u.RawQuery != "" {
		return nil, &m3o.Error{Kind: m3o.Invalid, Msg: "the address of the forge's API is no https URL", Hint: "such as --api-url https://git.example.com/api/v4"}
	}
	u.Path = strings.TrimSuffix(u.Path, "/") + "/"
	return u, nil
}

// callTime bounds one request; forges answer in a second or are down.
const callTime = 30 * time.Second

func httpClient(caFile string) (*http.Client, error) {
	conf := &tls.Config{MinVersion: tls.VersionTLS12}
	if caFile != "" {
		pem, err := os.ReadFile(caFile)
		if err != nil {
			return nil, fmt.Errorf("read CA of the forge: %w", err)
		}
		pool, err := x509.SystemCertPool()
		if err != nil {
			pool = x509.NewCertPool()
		}
		if !pool.AppendCertsFromPEM(pem) {
			return nil, m3o.Errorf(m3o.Invalid, "%s has no certificate in it", caFile)
		}
		conf.RootCAs = pool
	}
	return &http.Client{Timeout: callTime, Transport: &http.Transport{Proxy: http.ProxyFromEnvironment, TLSClientConfig: conf,
		ForceAttemptHTTP2: true, MaxIdleConnsPerHost: 2, IdleConnTimeout: 30 * time.Second},
		// A token goes to nobody but the forge.
		CheckRedirect: func(r *http.Request, via []*http.Request) error {
			if len(via) > 3 || r.URL.Host != via[0].URL.Host || r.URL.Scheme != "https" {
				return http.ErrUseLastResponse
			}
			return nil
		}}, nil
}

// A RateLimited error says when the forge will answer again.
type RateLimited struct{ Until time.Time }

func (r *RateLimited) Error() string {
	return "the forge asks to wait until " + r.Until.UTC().Format(time.RFC3339)
}

// RetryAfter is how long err asks to wait, 0 when it does not say.
func RetryAfter(err error, now time.Time) time.Duration {
	if r, ok := errors.AsType[*RateLimited](err); ok {
		return max(r.Until.Sub(now), time.Second)
	}
	return 0
}

// limitOf reads from an answer that the forge wants to be left alone.
func limitOf(res *http.Response, now time.Time) *RateLimited {
	if res == nil || (res.StatusCode != http.StatusTooManyRequests && res.StatusCode != http.StatusForbidden && res.StatusCode != http.StatusServiceUnavailable) {
		return nil
	}
	if s, err := strconv.Atoi(res.Header.Get("Retry-After")); err == nil && s >= 0 {
		return &RateLimited{now.Add(min(time.Duration(s)*time.Second, 2*time.Hour))}
	}
	remaining := cmp.Or(res.Header.Get("X-RateLimit-Remaining"), res.Header.Get("RateLimit-Remaining"))
	reset := cmp.Or(res.Header.Get("X-RateLimit-Reset"), res.Header.Get("RateLimit-Reset"))
	if at, err := strconv.ParseInt(reset, 10, 64); err == nil && remaining == "0" {
		until := time.Unix(at, 0)
		if until.After(now.Add(2 * time.Hour)) {
			until = now.Add(2 * time.Hour)
		}
		return &RateLimited{until}
	}
	if res.StatusCode == http.StatusTooManyRequests {
		return &RateLimited{now.Add(time.Minute)}
	}
	return nil
}

// explain words what went wrong with a call. said is the forge's own message.
func explain(res *http.Response, said string, err error) error {
	e := &m3o.Error{Kind: m3o.Unavailable, Msg: "the forge cannot be reached", Hint: "it is tried again", Err: err}
	if limit := limitOf(res, time.Now()); limit != nil {
		e.Msg, e.Err = limit.Error(), errors.Join(limit, err)
		return e
	}
	if res == nil {
		return e
	}
	said = strings.Map(func(r rune) rune {
		if r < ' ' {
			return ' '
		}
		return r
	}, said)
	if len(said) > 200 {
		said = said[:200]
	}
	e.Err = fmt.Errorf("%s %s: %d %s: %w", res.Request.Method, res.Request.URL.Redacted(), res.StatusCode, said, err)
	switch code := res.StatusCode; {
	case code == http.StatusUnauthorized:
		e.Kind, e.Msg, e.Hint = m3o.Denied, "the forge refuses the token", "it was revoked or has ended: m3o repo:connect with a new one"
	case code == http.StatusForbidden:
		e.Kind, e.Msg, e.Hint = m3o.Denied, "the token may not do that: "+said, "give it the right to hooks, statuses and comments, or do by hand what m3o repo:info says"
	case code == http.StatusNotFound, code == http.StatusGone:
		e.Kind, e.Msg, e.Hint = m3o.NotFound, "the forge has no such repository, or not for this token", "it was renamed, deleted or made private: m3o repo:connect again"
	case code >= 300 && code < 400:
		e.Kind, e.Msg, e.Hint = m3o.NotFound, "the repository has moved", "m3o repo:connect with its new name"
	case code == http.StatusConflict:
		e.Kind, e.Msg, e.Hint = m3o.Conflict, "the forge says: "+said, ""
	case code >= 400 && code < 500:
		e.Kind, e.Msg, e.Hint = m3o.Invalid, "the forge says: "+said, ""
	default:
		e.Msg = fmt.Sprintf("the forge answers with %d", code)
	}
	return e
}

// rest speaks JSON with the forges that have no client library here.
type rest struct {
	base   *url.URL
	hc     *http.Client
	header http.Header
}

// call sends in, if not nil, and reads the answer into out, if not nil.
func (r rest) call(ctx context.Context, method, path string, in, out any) error {
	var body io.Reader
	if in != nil {
		b, err := json.Marshal(in)
		if err != nil {
			return fmt.Errorf("encode call: %w", err)
		}
		body = bytes.NewReader(b)
	}
	req, err := http.NewRequestWithContext(ctx, method, r.base.String()+path, body)
	if err != nil {
		return fmt.Errorf("make call: %w", err)
	}
	req.Header = r.header.Clone()
	req.Header.Set("Accept", "application/json")
	req.Header.Set("User-Agent", "m3o")
	if in != nil {
		req.Header.Set("Content-Type", "application/json")
	}
	res, err := r.hc.Do(req)
	if err != nil {
		return explain(nil, "", err)
	}
	defer res.Body.Close() //nolint:errcheck // only read
	data, err := io.ReadAll(io.LimitReader(res.Body, 1<<20))
	if err != nil {
		return explain(nil, "", err)
	}
	if res.StatusCode >= 300 {
		return explain(res, string(data), errors.New(res.Status))
	}
	if out == nil {
		return nil
	}
	if err := json.Unmarshal(data, out); err != nil {
		return &m3o.Error{Kind: m3o.Unavailable, Msg: "the forge's answer is not what its API promises", Hint: "check --api-url", Err: err}
	}
	return nil
}

// short is s when it has at most n bytes, else its beginning and a hash.
func short(s string, n int) string {
	if len(s) <= n {
		return s
	}
	sum := sha256.Sum256([]byte(s))
	return s[:n-9] + "-" + hex.EncodeToString(sum[:4])
}

// clip keeps the first n bytes of a description, in whole characters.
func clip(s string, n int) string {
	return strings.ToValidUTF8(s[:min(len(s), n)], "")
}

// gone reports whether what err is about is not there any more.
func gone(err error) bool { return m3o.KindOf(err) == m3o.NotFound }
