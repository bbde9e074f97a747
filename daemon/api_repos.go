package daemon

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"path"
	"strings"
	"time"

	"connectrpc.com/connect"

	"github.com/m3o/m3o"
	m3ov1 "github.com/m3o/m3o/api/m3o/v1"
	"github.com/m3o/m3o/config"
	"github.com/m3o/m3o/gitserver"
	"github.com/m3o/m3o/webhook"
)

type reposAPI struct{ r *repos }

func (a reposAPI) wire(c *connection) *m3ov1.Repo {
	return &m3ov1.Repo{App: c.App, Repository: c.repository(), Forge: string(c.Provider), Branch: c.Branch, Dir: c.Dir, Url: c.URL, Credential: c.credential(),
		HookUrl: a.r.hookURL(c), HookMade: c.HookAt != "", Previews: c.Previews, Branches: c.Branches, PreviewSecrets: c.Secrets, HostKey: c.HostKey,
		Problem: c.Problem, User: c.User, Created: stamp(c.Created), ApiUrl: c.API}
}

func (a reposAPI) Connect(ctx context.Context, req *connect.Request[m3ov1.ConnectRepoRequest]) (*connect.Response[m3ov1.ConnectRepoResponse], error) {
	c, secrets, err := a.plan(ctx, req.Msg)
	if err != nil {
		return nil, err
	}
	res, err := a.r.connect(ctx, c, secrets)
	if m3o.KindOf(err) == m3o.Unavailable {
		// Nothing is tried again for somebody who waits for the answer.
		return nil, &m3o.Error{Kind: m3o.Unavailable, Msg: fmt.Sprintf("%s (%s)", userMessage(err), cmp.Or(c.API, c.Host)),
			Hint: "check the address and --api-url, and that the forge is up; then run m3o repo:connect again", Err: err}
	}
	if err != nil {
		return nil, err
	}
	res.Repo = a.wire(c)
	return connect.NewResponse(res), nil
}

// secrets are what a connection is made with, before they are sealed.
type secrets struct {
	hook, token, appKey, key m3o.Secret
	public                   string
}

// plan reads what is to be connected, without asking anybody.
func (a reposAPI) plan(ctx context.Context, m *m3ov1.ConnectRepoRequest) (*connection, *secrets, error) {
	host, name, address, err := parseRepository(m.Repository)
	if err != nil {
		return nil, nil, err
	}
	p := webhook.Provider(m.Forge)
	switch {
	case m.Forge == "":
		if p = providerOf(host); p == "" {
			return nil, nil, &m3o.Error{Kind: m3o.Invalid, Msg: "which kind of forge is " + host + "?", Hint: "add --forge github, gitlab, bitbucket-dc or gitea"}
		}
	case m.Forge == "forgejo":
		p = webhook.Gitea
	case !p.Known():
		return nil, nil, &m3o.Error{Kind: m3o.Invalid, Msg: fmt.Sprintf("no forge is called %q", m.Forge), Hint: "use github, gitlab, bitbucket, bitbucket-dc or gitea"}
	}
	if p != webhook.GitLab && strings.Count(name, "/") != 1 {
		return nil, nil, &m3o.Error{Kind: m3o.Invalid, Msg: fmt.Sprintf("%q is not owner/name", name), Hint: "give the folder of the app by --dir"}
	}
	dir := path.Clean("/" + m.Dir)[1:]
	if m.Dir != "" && (strings.Contains(m.Dir, "..") || strings.HasPrefix(m.Dir, "/")) {
		return nil, nil, &m3o.Error{Kind: m3o.Invalid, Msg: fmt.Sprintf("%q is no folder of the repository", m.Dir), Hint: "such as --dir services/api"}
	}
	if m.Token != "" && m.AppKey != "" {
		return nil, nil, &m3o.Error{Kind: m3o.Invalid, Msg: "a token and a GitHub App were given", Hint: "choose one"}
	}
	if m.AppId != 0 && strings.TrimSpace(m.AppKey) == "" {
		return nil, nil, &m3o.Error{Kind: m3o.Invalid, Msg: "the private key of the GitHub App is empty", Hint: "download one on the App's settings page; m3o repo:connect … --github-app ID --app-key FILE"}
	}
	if m.AppKey != "" && (p != webhook.GitHub || m.AppId == 0) {
		return nil, nil, &m3o.Error{Kind: m3o.Invalid, Msg: "a GitHub App is for GitHub and needs its id", Hint: "m3o repo:connect … --github-app ID --app-key FILE"}
	}
	c := &connection{App: m.App, Hook: randomHex(16), Provider: p, Host: host, Name: name, API: m.ApiUrl, Branch: strings.TrimPrefix(m.Branch, "refs/heads/"), Dir: dir,
		Previews: !m.NoPreviews, Branches: m.Branches, Secrets: m.PreviewSecrets, AppID: m.AppId, User: who(ctx).User, Created: time.Now().UTC()}
	s := &secrets{hook: newHookSecret(), token: m3o.Secret(strings.TrimSpace(m.Token)), appKey: m3o.Secret(m.AppKey)}
	overSSH := m.DeployKey || strings.HasPrefix(address, "ssh://")
	switch {
	case strings.HasPrefix(address, "ssh://") == overSSH && address != "":
		c.URL = address
	default:
		c.URL = gitURL(p, host, name, overSSH)
	}
	if overSSH {
		if s.key, s.public, err = newDeployKey("m3o " + m.App); err != nil {
			return nil, nil, err
		}
	}
	return c, s, nil
}

// connect makes a connection: it asks the forge, makes the webhook and the key
// there where it may, tries to read the branch, and saves it all.
func (r *repos) connect(ctx context.Context, c *connection, s *secrets) (*m3ov1.ConnectRepoResponse, error) {
	res := &m3ov1.ConnectRepoResponse{}
	seal := func(what string, v m3o.Secret) *config.Sealed {
		if v == "" {
			return nil
		}
		sealed := r.d.config.Seal(v, sealedAt(c.App, what))
		return &sealed
	}
	c.HookSecret, c.Token, c.AppKey, c.Key = *seal("hook", s.hook), seal("token", s.token), seal("app key", s.appKey), seal("key", s.key)
	if s.key != "" {
		if err := r.pin(ctx, c); err != nil {
			return nil, err
		}
	}
	f, err := r.forge(c)
	if err != nil {
		return nil, err
	}
	may := s.token != "" || s.appKey != ""
	if info, err := f.Repo(ctx); err == nil {
		if c.Branch == "" {
			c.Branch = info.Branch
		}
		c.Name = info.Name
	} else if may {
		return nil, err
	}
	app, err := r.d.ledger.App(ctx, c.App)
	if err != nil {
		return nil, err
	}
	if c.Branch == "" {
		c.Branch = app.DeployBranch()
	}
	if err := gitserver.CheckRef("refs/heads/" + c.Branch); err != nil {
		return nil, err
	}
	if old, err := r.of(ctx, c.App); err == nil {
		if _, err := r.disconnect(ctx, &old); err != nil {
			return nil, err
		}
	}
	if may {
		if c.HookAt, err = f.CreateHook(ctx, r.hookURL(c), s.hook); err != nil {
			res.Why = userMessage(err)
		}
		if s.key != "" {
			if c.KeyAt, err = f.CreateKey(ctx, "m3o "+c.App, s.public); err != nil {
				res.Why = userMessage(err)
			}
		}
	} else {
		res.Why = "no token was given"
	}
	if c.HookAt == "" {
		res.HookSecret = s.hook.Reveal()
	}
	if s.key != "" && c.KeyAt == "" {
		res.PublicKey = s.public
	}
	tip := ""
	if res.PublicKey == "" {
		rem, err := r.remote(ctx, c)
		if err == nil {
			var tips map[string]string
			tips, err = gitserver.RemoteTips(ctx, rem, "refs/heads/"+c.Branch)
			tip = tips["refs/heads/"+c.Branch]
		}
		if err != nil {
			// What was made at the forge is of no use without it.
			if c.HookAt != "" {
				err = errors.Join(err, ignoreGone(f.DeleteHook(ctx, c.HookAt)))
			}
			if c.KeyAt != "" {
				err = errors.Join(err, ignoreGone(f.DeleteKey(ctx, c.KeyAt)))
			}
			return nil, err
		}
	}
	if _, err := r.conns.Put(ctx, c.App, *c); err != nil {
		return nil, err
	}
	r.mu.Lock()
	r.hooks[c.Hook] = c.App
	r.mu.Unlock()
	r.d.log.Info("repository connected", "app", c.App, "user", c.User)
	if tip == "" {
		return res, nil
	}
	// The first deploy is of what is there.
	return res, r.queue.Add(ctx, c.Hook, webhook.Event{Provider: c.Provider, Delivery: "connect-" + randomHex(4), Name: connectEvent, Kind: webhook.Push, Repo: c.Name, Sender: c.User,
		Changes: []webhook.Change{{Ref: "refs/heads/" + c.Branch, After: tip, AllPaths: true}}})
}

func ignoreGone(err error) error {
	if m3o.KindOf(err) == m3o.NotFound {
		return nil
	}
	return err
}

func (a reposAPI) Get(ctx context.Context, req *connect.Request[m3ov1.GetRepoRequest]) (*connect.Response[m3ov1.GetRepoResponse], error) {
	c, err := a.r.of(ctx, req.Msg.App)
	if err != nil {
		return nil, err
	}
	return connect.NewResponse(&m3ov1.GetRepoResponse{Repo: a.wire(&c)}), nil
}

func (a reposAPI) Disconnect(ctx context.Context, req *connect.Request[m3ov1.DisconnectRepoRequest]) (*connect.Response[m3ov1.DisconnectRepoResponse], error) {
	c, err := a.r.of(ctx, req.Msg.App)
	if err != nil {
		return nil, err
	}
	if err := a.r.removePreviews(ctx, c.App); err != nil {
		return nil, err
	}
	left, err := a.r.disconnect(ctx, &c)
	if err != nil {
		return nil, err
	}
	a.r.d.log.Info("repository disconnected", "app", c.App, "user", who(ctx).User)
	return connect.NewResponse(&m3ov1.DisconnectRepoResponse{Left: left}), nil
}

func (a reposAPI) Deliveries(ctx context.Context, req *connect.Request[m3ov1.ListRepoDeliveriesRequest]) (*connect.Response[m3ov1.ListRepoDeliveriesResponse], error) {
	c, err := a.r.of(ctx, req.Msg.App)
	if err != nil {
		return nil, err
	}
	res := &m3ov1.ListRepoDeliveriesResponse{}
	for _, d := range a.r.queue.List(c.Hook, limit(req.Msg.Limit)) {
		res.Deliveries = append(res.Deliveries, &m3ov1.RepoDelivery{Id: d.ID, Event: d.Event.Name, Received: stamp(d.Received), State: string(d.State), Note: d.Note,
			Tries: int32(d.Tries), Sender: d.Event.Sender})
	}
	return connect.NewResponse(res), nil
}

func (a reposAPI) Replay(ctx context.Context, req *connect.Request[m3ov1.ReplayRepoDeliveryRequest]) (*connect.Response[m3ov1.ReplayRepoDeliveryResponse], error) {
	c, err := a.r.of(ctx, req.Msg.App)
	if err != nil {
		return nil, err
	}
	if err := a.r.queue.Replay(ctx, c.Hook, req.Msg.Id); err != nil {
		return nil, err
	}
	return connect.NewResponse(&m3ov1.ReplayRepoDeliveryResponse{}), nil
}

func (a reposAPI) Approve(ctx context.Context, req *connect.Request[m3ov1.ApprovePreviewRequest]) (*connect.Response[m3ov1.ApprovePreviewResponse], error) {
	commit, err := a.r.approve(ctx, req.Msg.App, req.Msg.Preview, req.Msg.Commit)
	if err != nil {
		return nil, err
	}
	return connect.NewResponse(&m3ov1.ApprovePreviewResponse{Commit: commit}), nil
}

func (a reposAPI) Previews(ctx context.Context, req *connect.Request[m3ov1.ListPreviewsRequest]) (*connect.Response[m3ov1.ListPreviewsResponse], error) {
	all, err := a.r.list(ctx, req.Msg.App)
	if err != nil {
		return nil, err
	}
	res := &m3ov1.ListPreviewsResponse{}
	for _, p := range all {
		w := &m3ov1.Preview{Name: p.Name, Url: a.r.d.url(p.Name), Branch: p.Label, Commit: p.Commit, State: p.State, Note: p.Note, Updated: stamp(p.Updated), Expires: stamp(p.Expires)}
		if p.Pull != nil {
			w.Pull, w.Branch, w.Title, w.Author, w.Fork = int32(p.Pull.Number), p.Pull.HeadRef, p.Pull.Title, p.Pull.Author, p.Pull.Fork
		}
		res.Previews = append(res.Previews, w)
	}
	return connect.NewResponse(res), nil
}

func (a reposAPI) DestroyPreview(ctx context.Context, req *connect.Request[m3ov1.DestroyPreviewRequest]) (*connect.Response[m3ov1.DestroyPreviewResponse], error) {
	p, err := a.r.find(ctx, req.Msg.App, req.Msg.Preview)
	if err != nil {
		return nil, err
	}
	var c *connection
	if conn, err := a.r.of(ctx, req.Msg.App); err == nil {
		c = &conn
	}
	if err := a.r.destroy(ctx, c, p, who(ctx).User+" removed it"); err != nil {
		return nil, err
	}
	return connect.NewResponse(&m3ov1.DestroyPreviewResponse{}), nil
}

// A streamWriter sends what is written to a stream.
type streamWriter func([]byte) error

func (w streamWriter) Write(p []byte) (int, error) {
	if err := w(p); err != nil {
		return 0, err
	}
	return len(p), nil
}

// Run deploys a public repository as an app of the caller.
func (a reposAPI) Run(ctx context.Context, req *connect.Request[m3ov1.RunRepoRequest], out *connect.ServerStream[m3ov1.RunRepoResponse]) error {
	r := a.r
	c, ref, err := parseRun(req.Msg.Source)
	if err != nil {
		return err
	}
	base := c.Name
	if c.Dir != "" {
		base = c.Dir
	}
	name := req.Msg.Name
	if name == "" {
		name = strings.Trim(strings.NewReplacer("_", "-", ".", "-").Replace(strings.ToLower(path.Base(base))), "-")
	}
	user := who(ctx).User
	// The same questions as for a push: it makes the app, or deploys one.
	branch, err := pushes{r.d}.Access(ctx, user, name, true)
	if err != nil {
		return err
	}
	if err := out.Send(&m3ov1.RunRepoResponse{App: name}); err != nil {
		return err
	}
	w := streamWriter(func(p []byte) error { return out.Send(&m3ov1.RunRepoResponse{Output: p}) })
	output{w}.step("Fetching %s", req.Msg.Source)
	c.App = name
	rem := gitserver.Remote{URL: c.URL, CAFile: r.d.cfg.ForgeCA}
	commit, at, err := resolveRun(ctx, rem, ref)
	if k := m3o.KindOf(err); k == m3o.NotFound || k == m3o.Denied || k == m3o.Unavailable {
		if strings.Contains(userMessage(err), "branch or tag") {
			return err
		}
		return &m3o.Error{Kind: k, Msg: userMessage(err), Hint: "check the address; a private repository is deployed by m3o repo:connect with a credential", Err: err}
	}
	if err != nil {
		return err
	}
	repo, err := r.d.git.Fetch(ctx, name, branch, rem, commit, at, gitserver.FetchLimits{})
	if err != nil {
		return err
	}
	tree, err := r.d.git.Tree(ctx, name, repo, "", commit, gitserver.Graft{Dir: c.Dir, Remote: &rem})
	if err != nil {
		return err
	}
	target := "refs/heads/" + branch
	old, err := gitserver.Tip(ctx, repo, target)
	if err != nil {
		return err
	}
	rel, err := r.d.deployCommit(ctx, m3o.Source{App: name, Repo: repo, Ref: target, Old: old, Commit: commit, Tree: tree, User: user, Via: "run " + req.Msg.Source}, w)
	if err != nil {
		return err
	}
	return out.Send(&m3ov1.RunRepoResponse{Url: r.d.url(name), Release: rel.Name()})
}

// parseRun reads host/owner/name/folder@branch, as Micro users write it.
func parseRun(source string) (c *connection, ref string, err error) {
	where, ref, _ := strings.Cut(source, "@")
	where = strings.TrimSuffix(strings.TrimPrefix(where, "https://"), "/")
	parts := strings.Split(where, "/")
	if len(parts) < 3 || strings.Contains(where, "..") || strings.Contains(where, "//") {
		return nil, "", &m3o.Error{Kind: m3o.Invalid, Msg: fmt.Sprintf("%q is not host/owner/name", source), Hint: "m3o run github.com/org/repo/folder@branch"}
	}
	name := parts[1] + "/" + strings.TrimSuffix(parts[2], ".git")
	c = &connection{Host: parts[0], Name: name, Dir: strings.Join(parts[3:], "/")}
	c.URL = gitURL(providerOf(c.Host), c.Host, name, false)
	_, err = gitserver.CheckRemote(c.URL)
	return c, ref, err
}

// resolveRun finds the commit of a branch, a tag or a whole hash; "" is the main branch.
func resolveRun(ctx context.Context, rem gitserver.Remote, ref string) (commit, at string, err error) {
	if ref == "" {
		ref = "HEAD"
	}
	if len(ref) == 40 && strings.Trim(ref, "0123456789abcdef") == "" {
		return ref, "", nil
	}
	asks := []string{"HEAD"}
	if ref != "HEAD" {
		asks = []string{"refs/heads/" + ref, "refs/tags/" + ref}
	}
	tips, err := gitserver.RemoteTips(ctx, rem, asks...)
	if err != nil {
		return "", "", err
	}
	for _, a := range asks {
		if tips[a] != "" {
			return tips[a], a, nil
		}
	}
	return "", "", &m3o.Error{Kind: m3o.NotFound, Msg: "the repository has no branch or tag " + ref, Hint: "check what follows the @"}
}

var _ io.Writer = streamWriter(nil)
