package main

import (
	"context"
	"os"
	"strconv"
	"strings"

	"connectrpc.com/connect"

	m3ov1 "github.com/m3o/m3o/api/m3o/v1"
)

func repoCommands() []*command {
	return []*command{
		{name: "repo:connect", aliases: []string{"repos:connect"}, group: "Repositories", args: "REPOSITORY", min: 1, max: 1, app: true, run: runRepoConnect,
			short: "Deploy an app from a repository at GitHub, GitLab, Bitbucket or Gitea",
			long: `Pushes to the branch deploy, pull requests get a preview at https://pr-7--<app>.<domain>, and the forge shows how it went. The
branch is deployed at once. Where the credential may, the webhook and the deploy key are made at the forge; else what to paste is
printed. Connecting again replaces credential and secret.

Credentials, all kept sealed: a token (--token-stdin) that may read the repository, manage its webhooks, and write statuses and
comments; with --deploy-key a key made for this app alone fetches by SSH, whose host key is pinned; a GitHub App (--github-app,
--app-key). A public repository needs none.

A forge of your own is found by its host; what it is is guessed by the host's name or said by --forge.`,
			example: "m3o repo:connect github.com/org/repo --token-stdin < token\n" +
				"m3o repo:connect gitlab.example.com/group/repo --deploy-key --branch production\n" +
				"m3o repo:connect github.com/org/monorepo --dir services/api -a api",
			flags: []flag{
				{"branch", "b", "BRANCH", "whose pushes deploy (default the repository's main branch)"},
				{"dir", "", "FOLDER", "the folder of the app in a repository of many"},
				{"token-stdin", "", "", "read a token from stdin or, on a terminal, ask for it"},
				{"deploy-key", "", "", "fetch by SSH with a key of its own"},
				{"github-app", "", "ID", "use a GitHub App that is installed there"},
				{"app-key", "", "FILE", "its private key"},
				{"forge", "", "KIND", "github, gitlab, bitbucket, bitbucket-dc, gitea or forgejo"},
				{"api-url", "", "URL", "of the forge's API, where it is not the usual one"},
				{"no-previews", "", "", "pull requests get no preview"},
				{"branches", "", "", "every other branch gets one too, at https://<branch>--<app>.<domain>"},
				{"preview-secrets", "", "", "previews get the app's secret config; forks' only once approved"},
			}},
		{name: "repo:info", aliases: []string{"repo", "repos"}, group: "Repositories", app: true, run: runRepoInfo, short: "Show which repository deploys an app"},
		{name: "repo:disconnect", aliases: []string{"repos:disconnect"}, group: "Repositories", app: true, run: runRepoDisconnect,
			short: "Let a repository deploy an app no more", long: "The webhook and the deploy key are removed at the forge where the credential may. Previews go too, the app stays."},
		{name: "repo:deliveries", aliases: []string{"repos:deliveries"}, group: "Repositories", app: true, run: runRepoDeliveries,
			short: "List what the forge sent and what came of it", example: "m3o repo:deliveries\nm3o repo:deliveries --replay 72d3162e-cc78-11e3-81ab-4c9367dc0958",
			flags: []flag{{"number", "n", "N", "how many"}, {"replay", "", "ID", "work on that one once more"}}},
		{name: "repo:approve", aliases: []string{"previews:approve"}, group: "Repositories", args: "PREVIEW [COMMIT]", min: 1, max: 2, app: true, run: runRepoApprove,
			short:   "Let the pull request of a fork have a preview",
			long:    "It is for exactly the commit there is now, or the one that is named: what is pushed later waits for approval again.",
			example: "m3o repo:approve pr-7"},
		{name: "previews", aliases: []string{"previews:list"}, group: "Repositories", app: true, run: runPreviews,
			short: "List the previews of an app",
			long:  "Each is an app of its own to all commands: m3o logs -a pr-7--hello. m3o config:set --preview sets what only previews get."},
		{name: "previews:destroy", group: "Repositories", args: "PREVIEW", min: 1, max: 1, app: true, run: runPreviewsDestroy,
			short: "Remove a preview", long: "The next push to its pull request or branch makes it again.", example: "m3o previews:destroy pr-7"},
	}
}

func runRepoConnect(ctx context.Context, c *call) error {
	req := &m3ov1.ConnectRepoRequest{Repository: c.args[0], Branch: c.value("branch"), Dir: c.value("dir"), Forge: c.value("forge"), ApiUrl: c.value("api-url"),
		DeployKey: c.has("deploy-key"), NoPreviews: c.has("no-previews"), Branches: c.has("branches"), PreviewSecrets: c.has("preview-secrets")}
	if c.has("github-app") != c.has("app-key") {
		return misuse("a GitHub App is given by --github-app and --app-key together", "m3o help repo:connect")
	}
	if c.has("github-app") {
		id, err := strconv.ParseInt(c.value("github-app"), 10, 64)
		if err != nil || id < 1 {
			return misuse("--github-app takes the number of the App", "it is on the App's settings page")
		}
		key, err := os.ReadFile(c.value("app-key"))
		if err != nil {
			return fail("cannot read the App's key: "+err.Error(), "")
		}
		req.AppId, req.AppKey = id, string(key)
	}
	app, cl, err := c.withApp(ctx)
	if err != nil {
		return err
	}
	req.App = app
	if c.has("token-stdin") {
		if req.Token, err = c.token(ctx); err != nil {
			return err
		}
	}
	res, err := ask(ctx, cl.repos.Connect, req)
	if err != nil {
		return err
	}
	return c.result(res, func() {
		r := res.GetRepo()
		c.print("%s deploys %s\n", plain(r.GetRepository()), plain(app))
		c.repoFields(r)
		if res.GetWhy() != "" {
			c.say("m3o: to do at the forge by hand, since %s:", plain(res.GetWhy()))
		}
		if s := res.GetHookSecret(); s != "" {
			c.print("\nWebhook: pushes and pull or merge requests, as JSON\n")
			c.fields("URL", plain(r.GetHookUrl()), "Secret", plain(s))
		}
		if k := res.GetPublicKey(); k != "" {
			c.print("\nDeploy key, which may only read\n%s\n", plain(k))
		}
		c.hint("m3o repo:deliveries -a %s shows what the forge sends", app)
		c.undo("m3o repo:disconnect -a %s", app)
	})
}

// token reads a token where no list of processes and no history has it.
func (c *call) token(ctx context.Context) (string, error) {
	if c.inTerminal {
		c.print("")
		_, _ = c.err.Write([]byte("Token: "))
		t, err := c.secret(ctx)
		c.say("")
		return strings.TrimSpace(t), err
	}
	t, err := c.readInput()
	if err == nil && strings.TrimSpace(t) == "" {
		return "", misuse("stdin has no token", "m3o repo:connect … --token-stdin < token")
	}
	return strings.TrimSpace(t), err
}

func (c *call) repoFields(r *m3ov1.Repo) {
	previews := "pull requests"
	switch {
	case !r.GetPreviews() && r.GetBranches():
		previews = "branches"
	case !r.GetPreviews():
		previews = "none"
	case r.GetBranches():
		previews = "pull requests and branches"
	}
	c.fields("Forge", plain(r.GetForge()), "Branch", plain(r.GetBranch()), "Folder", plain(r.GetDir()), "Fetches", plain(r.GetUrl()), "Credential", plain(r.GetCredential()),
		"Host key", plain(r.GetHostKey()), "Previews", previews, "Webhook", plain(r.GetHookUrl()), "Problem", plain(r.GetProblem()))
}

func runRepoInfo(ctx context.Context, c *call) error {
	app, cl, err := c.withApp(ctx)
	if err != nil {
		return err
	}
	res, err := ask(ctx, cl.repos.Get, &m3ov1.GetRepoRequest{App: app})
	if err != nil {
		return err
	}
	return c.result(res.GetRepo(), func() {
		c.print("%s\n", plain(res.GetRepo().GetRepository()))
		c.repoFields(res.GetRepo())
	})
}

func runRepoDisconnect(ctx context.Context, c *call) error {
	app, cl, err := c.withApp(ctx)
	if err != nil {
		return err
	}
	res, err := ask(ctx, cl.repos.Disconnect, &m3ov1.DisconnectRepoRequest{App: app})
	if err != nil {
		return err
	}
	return c.result(res, func() {
		c.print("disconnected %s\n", app)
		if res.GetLeft() != "" {
			c.say("m3o: warning: still at the forge: %s", plain(res.GetLeft()))
		}
	})
}

func runRepoDeliveries(ctx context.Context, c *call) error {
	limit, err := c.number("number", 0, 1, 1000)
	if err != nil {
		return err
	}
	app, cl, err := c.withApp(ctx)
	if err != nil {
		return err
	}
	if c.has("replay") {
		res, err := ask(ctx, cl.repos.Replay, &m3ov1.ReplayRepoDeliveryRequest{App: app, Id: c.value("replay")})
		if err != nil {
			return err
		}
		return c.result(res, func() { c.print("replaying %s\n", plain(c.value("replay"))) })
	}
	res, err := ask(ctx, cl.repos.Deliveries, &m3ov1.ListRepoDeliveriesRequest{App: app, Limit: int32(limit)})
	if err != nil {
		return err
	}
	return c.result(res, func() {
		if len(res.GetDeliveries()) == 0 {
			c.say("the forge has sent nothing yet")
			return
		}
		var rows [][]string
		for _, d := range res.GetDeliveries() {
			rows = append(rows, []string{plain(d.GetId()), plain(d.GetEvent()), c.status(plain(d.GetState())), c.when(d.GetReceived()), plain(d.GetNote())})
		}
		c.table([]string{"DELIVERY", "EVENT", "STATE", "WHEN", "WHAT"}, rows)
	})
}

func runRepoApprove(ctx context.Context, c *call) error {
	req := &m3ov1.ApprovePreviewRequest{Preview: c.args[0]}
	if len(c.args) > 1 {
		req.Commit = c.args[1]
	}
	app, cl, err := c.withApp(ctx)
	if err != nil {
		return err
	}
	req.App = app
	res, err := ask(ctx, cl.repos.Approve, req)
	if err != nil {
		return err
	}
	return c.result(res, func() {
		c.print("approved %s at %s; it is being built\n", plain(c.args[0]), short(plain(res.GetCommit())))
	})
}

func runPreviews(ctx context.Context, c *call) error {
	app, cl, err := c.withApp(ctx)
	if err != nil {
		return err
	}
	res, err := ask(ctx, cl.repos.Previews, &m3ov1.ListPreviewsRequest{App: app})
	if err != nil {
		return err
	}
	return c.result(res, func() {
		if len(res.GetPreviews()) == 0 {
			c.say("%s has no previews", app)
			c.hint("a pull request makes one once the app is connected: m3o repo:connect; git push m3o BRANCH -o preview makes one too")
			return
		}
		var rows [][]string
		for _, p := range res.GetPreviews() {
			name, _, _ := strings.Cut(plain(p.GetName()), "--")
			rows = append(rows, []string{name, c.status(plain(p.GetState())), short(plain(p.GetCommit())), plain(p.GetBranch()), plain(p.GetAuthor()), c.when(p.GetUpdated()), plain(p.GetUrl()), plain(p.GetNote())})
		}
		c.table([]string{"PREVIEW", "STATE", "COMMIT", "BRANCH", "BY", "PUSHED", "URL", "WHAT"}, rows)
	})
}

func runPreviewsDestroy(ctx context.Context, c *call) error {
	app, cl, err := c.withApp(ctx)
	if err != nil {
		return err
	}
	res, err := ask(ctx, cl.repos.DestroyPreview, &m3ov1.DestroyPreviewRequest{App: app, Preview: c.args[0]})
	if err != nil {
		return err
	}
	return c.result(res, func() { c.print("removed the preview %s\n", plain(c.args[0])) })
}

// remoteSource says whether the first argument of m3o run is a repository,
// host/owner/name, rather than a command: no program's path begins with a
// host name.
func remoteSource(arg string) bool {
	host, rest, ok := strings.Cut(strings.TrimPrefix(arg, "https://"), "/")
	return ok && strings.Contains(rest, "/") && strings.Contains(host, ".") && !strings.HasPrefix(host, ".") && hostLike(host)
}

// runRemote is m3o run github.com/org/repo/folder@branch.
func runRemote(ctx context.Context, c *call) error {
	cl, err := c.connect()
	if err != nil {
		return err
	}
	stream, err := cl.repos.Run(ctx, connect.NewRequest(&m3ov1.RunRepoRequest{Source: c.args[0], Name: c.value("app")}))
	lines := &lineWriter{system: c.system}
	err = receive(ctx, cl, false, stream, err, func(m *m3ov1.RunRepoResponse) error {
		if c.has("json") {
			return c.jsonLine(m)
		}
		_, err := lines.Write(m.GetOutput())
		return err
	})
	lines.flush()
	return err
}
