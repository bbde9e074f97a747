package daemon

import (
	"context"
	"crypto/ed25519"
	"crypto/hkdf"
	"crypto/rand"
	"crypto/sha256"
	"encoding/base64"
	"encoding/hex"
	"encoding/pem"
	"fmt"
	"net"
	"net/url"
	"path"
	"strings"
	"sync"
	"time"

	"golang.org/x/crypto/ssh"

	"github.com/m3o/m3o"
	"github.com/m3o/m3o/config"
	"github.com/m3o/m3o/gitserver"
	"github.com/m3o/m3o/store"
	"github.com/m3o/m3o/webhook"
	"github.com/m3o/m3o/webhook/forge"
)

// A connection ties an app to a repository elsewhere.
type connection struct {
	App        string
	Hook       string // id of the address the forge sends to
	Provider   webhook.Provider
	Host       string // github.com
	Name       string // owner/name
	URL        string // what git fetches from
	API        string // base URL of the forge's API, "" for the usual one
	Branch     string // whose pushes deploy
	Dir        string // folder of the app, "" for all
	Previews   bool   // pull requests get one
	Branches   bool   // other branches get one
	Secrets    bool   // previews get the app's secret config
	KnownHosts string // pinned SSH host keys
	HostKey    string // fingerprint of the pinned key, for people
	AppID      int64  // of a GitHub App
	HookAt     string // id of the webhook at the forge, "" when it was not made by us
	KeyAt      string // id of the deploy key at the forge
	HookSecret config.Sealed
	Token      *config.Sealed
	Key        *config.Sealed // private SSH key
	AppKey     *config.Sealed
	User       string // who connected it
	Created    time.Time
	Problem    string // what keeps it from working, "" for nothing
}

func (c *connection) repository() string { return c.Host + "/" + c.Name }

func (c *connection) credential() string {
	switch {
	case c.AppKey != nil:
		return "GitHub App"
	case c.Key != nil:
		return "deploy key"
	case c.Token != nil:
		return "token"
	}
	return "none"
}

// sealedAt is where a secret of an app's connection belongs.
func sealedAt(app, what string) string { return "repository " + app + "/" + what }

// repos is all connections, their deliveries, previews and reports.
type repos struct {
	d        *Daemon
	conns    *store.Bucket[connection] // by app
	refs     *store.Bucket[attempt]    // by app and ref
	previews *store.Bucket[preview]    // by name
	queue    *webhook.Queue
	recv     *webhook.Receiver
	reports  *reporter
	logKey   []byte // signs links to build logs
	started  chan struct{}

	mu       sync.Mutex // guards what follows
	hooks    map[string]string
	asked    map[string]asked
	turns    map[string]*hookTurn
	patience time.Duration // how long a forge may take to say what a branch is
}

func openRepos(ctx context.Context, d *Daemon) (*repos, error) {
	r := &repos{d: d, started: make(chan struct{}), patience: 30 * time.Second, hooks: map[string]string{}, asked: map[string]asked{}, turns: map[string]*hookTurn{}}
	var err error
	if r.logKey, err = hkdf.Key(sha256.New, d.configKey[:], nil, "m3o links to build logs v1", 32); err != nil {
		return nil, fmt.Errorf("derive key: %w", err)
	}
	if r.conns, err = store.NewBucket[connection](ctx, d.store, "repositories"); err != nil {
		return nil, err
	}
	if r.refs, err = store.NewBucket[attempt](ctx, d.store, "repository-refs"); err != nil {
		return nil, err
	}
	if r.previews, err = store.NewBucket[preview](ctx, d.store, "previews"); err != nil {
		return nil, err
	}
	if r.reports, err = openReporter(ctx, r); err != nil {
		return nil, err
	}
	all, err := r.conns.List(ctx, "")
	if err != nil {
		return nil, err
	}
	for _, e := range all {
		r.hooks[e.Value.Hook] = e.Value.App
	}
	if r.queue, err = webhook.OpenQueue(ctx, d.store, r.work, d.log); err != nil {
		return nil, err
	}
	r.recv = webhook.NewReceiver(r.hook, r.queue, d.log)
	return r, nil
}

// run works on deliveries, tells the forges and removes old previews, from
// the moment start is called until ctx ends.
func (r *repos) run(ctx context.Context) error {
	select {
	case <-ctx.Done():
		return nil
	case <-r.started:
	}
	var wg sync.WaitGroup
	wg.Go(func() { r.reports.run(ctx) })
	wg.Go(func() { r.expire(ctx) })
	err := r.queue.Run(ctx)
	wg.Wait()
	return err
}

// start lets run begin: what a crash left must be settled before.
func (r *repos) start() { close(r.started) }

// hook finds the secret of a hook, for the receiver.
func (r *repos) hook(ctx context.Context, id string) (webhook.Hook, bool) {
	c, err := r.byHook(ctx, id)
	if err != nil {
		return webhook.Hook{}, false
	}
	secret, err := r.d.config.Unseal(c.HookSecret, sealedAt(c.App, "hook"))
	if err != nil {
		r.d.log.Error("open secret of a hook", "app", c.App, "err", err)
		return webhook.Hook{}, false
	}
	return webhook.Hook{ID: id, Provider: c.Provider, Secret: secret}, true
}

func (r *repos) byHook(ctx context.Context, id string) (connection, error) {
	r.mu.Lock()
	app, ok := r.hooks[id]
	r.mu.Unlock()
	if !ok {
		return connection{}, m3o.Errorf(m3o.NotFound, "no such hook")
	}
	return r.of(ctx, app)
}

// of is the connection of an app, NotFound when it has none.
func (r *repos) of(ctx context.Context, app string) (connection, error) {
	c, _, err := r.conns.Get(ctx, app)
	if m3o.KindOf(err) == m3o.NotFound {
		return c, &m3o.Error{Kind: m3o.NotFound, Msg: app + " is connected to no repository", Hint: "m3o repo:connect github.com/org/repo -a " + app, Err: err}
	}
	return c, err
}

func (r *repos) hookURL(c *connection) string {
	return r.d.apiURL() + "/hooks/" + string(c.Provider) + "/" + c.Hook
}

// unseal opens a secret of a connection, "" for one that it does not have.
func (r *repos) unseal(app, what string, s *config.Sealed) (m3o.Secret, error) {
	if s == nil {
		return "", nil
	}
	return r.d.config.Unseal(*s, sealedAt(app, what))
}

// forge is the client for a connection's repository.
func (r *repos) forge(c *connection) (forge.Client, error) {
	conf := forge.Config{Provider: c.Provider, Host: c.Host, API: c.API, Name: c.Name, CAFile: r.d.cfg.ForgeCA}
	var err error
	if conf.Token, err = r.unseal(c.App, "token", c.Token); err != nil {
		return nil, err
	}
	if c.AppKey != nil {
		key, err := r.unseal(c.App, "app key", c.AppKey)
		if err != nil {
			return nil, err
		}
		conf.App = &forge.App{ID: c.AppID, Key: key}
	}
	return forge.New(conf)
}

// remote is where and by which right git fetches.
func (r *repos) remote(ctx context.Context, c *connection) (gitserver.Remote, error) {
	rem := gitserver.Remote{URL: c.URL, KnownHosts: c.KnownHosts, CAFile: r.d.cfg.ForgeCA}
	var err error
	if c.Key != nil {
		rem.Key, err = r.unseal(c.App, "key", c.Key)
		return rem, err
	}
	rem.User = map[webhook.Provider]string{webhook.GitHub: "x-access-token", webhook.GitLab: "oauth2", webhook.Bitbucket: "x-token-auth", webhook.BitbucketDC: "x-token-auth"}[c.Provider]
	if rem.Password, err = r.unseal(c.App, "token", c.Token); err != nil || c.AppKey == nil {
		return rem, err
	}
	f, err := r.forge(c)
	if err != nil {
		return rem, err
	}
	if t, ok := f.(forge.Tokener); ok {
		rem.Password, err = t.Token(ctx)
	}
	return rem, err
}

// problem notes what keeps a connection from working, "" for nothing any more.
func (r *repos) problem(ctx context.Context, app, text string) {
	c, rev, err := r.conns.Get(ctx, app)
	if err != nil || c.Problem == text {
		return
	}
	c.Problem = text
	if _, err := r.conns.Update(ctx, app, c, rev); err != nil {
		r.d.log.Warn("note problem of a repository", "app", app, "err", err)
	}
	if text != "" {
		r.d.log.Warn("repository does not work", "app", app, "err", text)
	}
}

// pinned are the host keys that the large forges publish, so that not even
// the first connection has to be believed.
var pinned = map[string]string{
	"github.com":    "github.com ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIOMqqnkVzrm0SdG6UOoqKLsabgH5C9okWi0dh2l9GKJl\n",
	"gitlab.com":    "gitlab.com ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIAfuCHKVTjquxvt6CM6tdG4SLp1Btn/nOeHHE5UOzRdf\n",
	"bitbucket.org": "bitbucket.org ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIIazEu89wgQZ4bqs3d63QSMzYVa0MuJ2e2gKTKqu+UUO\n",
}

// pin finds the SSH host keys of a connection's host.
func (r *repos) pin(ctx context.Context, c *connection) error {
	u, err := gitserver.CheckRemote(c.URL)
	if err != nil {
		return err
	}
	lines := pinned[u.Host]
	if lines == "" {
		if lines, c.HostKey, err = gitserver.HostKeys(ctx, u.Host); err != nil {
			return err
		}
	} else if _, _, key, _, _, err := ssh.ParseKnownHosts([]byte(lines)); err == nil {
		c.HostKey = ssh.FingerprintSHA256(key)
	}
	c.KnownHosts = lines
	return nil
}

// parseRepository reads github.com/org/repo, an https or ssh address, or
// git@host:org/repo into the host (with its port, for https) and the path.
func parseRepository(s string) (host, name, address string, err error) {
	raw := s
	switch {
	case strings.HasPrefix(s, "http://"):
		return "", "", "", &m3o.Error{Kind: m3o.Invalid, Msg: "http:// is not fetched from", Hint: "use https://"}
	case strings.Contains(s, "://"):
	case strings.Contains(s, "@") && strings.Contains(s, ":"):
		h, p, _ := strings.Cut(s, ":")
		raw = "ssh://" + h + "/" + p
	default:
		raw = "https://" + s
	}
	u, err := gitserver.CheckRemote(raw)
	if err != nil {
		return "", "", "", err
	}
	name = strings.TrimSuffix(strings.Trim(path.Clean(u.Path), "/"), ".git")
	name = strings.TrimPrefix(name, "scm/") // Bitbucket Data Center, by https
	if strings.Count(name, "/") < 1 || strings.Contains(name, "..") {
		return "", "", "", &m3o.Error{Kind: m3o.Invalid, Msg: fmt.Sprintf("%q names no repository", s), Hint: "such as github.com/org/repo"}
	}
	host = strings.ToLower(u.Host)
	if u.Scheme == "ssh" {
		host = strings.ToLower(u.Hostname())
	}
	if !strings.Contains(s, "://") && !strings.Contains(s, "@") {
		raw = ""
	}
	return host, name, raw, nil
}

// providerOf guesses the forge by its host.
func providerOf(host string) webhook.Provider {
	h, _, err := net.SplitHostPort(host)
	if err != nil {
		h = host
	}
	for _, g := range []struct {
		part string
		p    webhook.Provider
	}{{"bitbucket.org", webhook.Bitbucket}, {"github", webhook.GitHub}, {"gitlab", webhook.GitLab}, {"bitbucket", webhook.BitbucketDC},
		{"stash", webhook.BitbucketDC}, {"gitea", webhook.Gitea}, {"forgejo", webhook.Gitea}, {"codeberg.org", webhook.Gitea}} {
		if strings.Contains(h, g.part) {
			return g.p
		}
	}
	return ""
}

// gitURL is what git fetches a repository from, where the address was not given.
func gitURL(p webhook.Provider, host, name string, overSSH bool) string {
	if overSSH {
		return (&url.URL{Scheme: "ssh", User: url.User("git"), Host: host, Path: "/" + name + ".git"}).String()
	}
	if p == webhook.BitbucketDC {
		name = "scm/" + name
	}
	return (&url.URL{Scheme: "https", Host: host, Path: "/" + name + ".git"}).String()
}

// newDeployKey makes an SSH key for one connection.
func newDeployKey(comment string) (private m3o.Secret, public string, err error) {
	pub, priv, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		return "", "", fmt.Errorf("make deploy key: %w", err)
	}
	block, err := ssh.MarshalPrivateKey(priv, comment)
	if err != nil {
		return "", "", fmt.Errorf("make deploy key: %w", err)
	}
	sshPub, err := ssh.NewPublicKey(pub)
	if err != nil {
		return "", "", fmt.Errorf("make deploy key: %w", err)
	}
	return m3o.Secret(pem.EncodeToMemory(block)), strings.TrimSpace(string(ssh.MarshalAuthorizedKey(sshPub))) + " " + comment, nil
}

// randomHex is n random bytes in hex, for names that cannot be guessed.
func randomHex(n int) string {
	b := make([]byte, n)
	_, _ = rand.Read(b) // never fails
	return hex.EncodeToString(b)
}

// newHookSecret is a secret that serves as plain token and as signing key.
func newHookSecret() m3o.Secret {
	b := make([]byte, 32)
	_, _ = rand.Read(b) // never fails
	return m3o.Secret("whsec_" + base64.StdEncoding.EncodeToString(b))
}

// tipRef is the ref of a connection's repository that holds a pull request.
func tipRef(c *connection, p *webhook.PullRequest) string {
	switch c.Provider {
	case webhook.GitLab:
		return fmt.Sprintf("refs/merge-requests/%d/head", p.Number)
	case webhook.BitbucketDC:
		return fmt.Sprintf("refs/pull-requests/%d/from", p.Number)
	case webhook.Bitbucket:
		if p.Fork {
			return "" // Cloud keeps the commits of forks to the fork
		}
		return "refs/heads/" + p.HeadRef
	}
	return fmt.Sprintf("refs/pull/%d/head", p.Number)
}

// prepare gives a source the tree that its app is built from, where that is
// not the commit's own: the folder of a repository of many, submodules.
func (r *repos) prepare(ctx context.Context, src m3o.Source, told func(format string, args ...any)) (m3o.Source, error) {
	c, err := r.of(ctx, m3o.ParentOf(src.App))
	if m3o.KindOf(err) == m3o.NotFound {
		return src, nil
	}
	if err != nil {
		return src, err
	}
	g := gitserver.Graft{Dir: c.Dir, OnSubmodule: func(path, _ string) { told("Fetching submodule %s", path) }}
	if c.URL != "" {
		rem, err := r.remote(ctx, &c)
		if err != nil {
			return src, err
		}
		g.Remote = &rem
	}
	src.Tree, err = r.d.git.Tree(ctx, m3o.ParentOf(src.App), src.Repo, src.Quarantine, src.Commit, g)
	return src, err
}

// removeApp forgets what repos knows of an app that is destroyed.
func (r *repos) removeApp(ctx context.Context, app string) error {
	if m3o.ParentOf(app) != app {
		return r.previews.Delete(ctx, app, 0)
	}
	if err := r.removePreviews(ctx, app); err != nil {
		return err
	}
	if c, err := r.of(ctx, app); err == nil {
		if _, err := r.disconnect(ctx, &c); err != nil {
			return err
		}
	}
	return r.d.config.RemoveApp(ctx, overlayOf(app))
}

// disconnect removes the connection, and at the forge what was made there.
// What could not be removed there is said in left.
func (r *repos) disconnect(ctx context.Context, c *connection) (left string, err error) {
	if f, ferr := r.forge(c); ferr == nil {
		fctx, cancel := context.WithTimeout(ctx, 30*time.Second)
		defer cancel()
		if c.HookAt != "" {
			if err := f.DeleteHook(fctx, c.HookAt); err != nil && m3o.KindOf(err) != m3o.NotFound {
				left = "the webhook " + r.hookURL(c)
			}
		}
		if c.KeyAt != "" {
			if err := f.DeleteKey(fctx, c.KeyAt); err != nil && m3o.KindOf(err) != m3o.NotFound {
				left = strings.TrimPrefix(left+" and the deploy key", " and ")
			}
		}
	}
	r.mu.Lock()
	delete(r.hooks, c.Hook)
	r.mu.Unlock()
	if err := r.conns.Delete(ctx, c.App, 0); err != nil {
		return left, err
	}
	refs, err := r.refs.List(ctx, c.App+"/")
	if err != nil {
		return left, err
	}
	for _, e := range refs {
		if err := r.refs.Delete(ctx, e.Key, 0); err != nil {
			return left, err
		}
	}
	return left, r.reports.forget(ctx, c.App)
}

func shortCommit(c string) string { return c[:min(len(c), 7)] }
