package main

import (
	"context"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"

	m3ov1 "github.com/m3o/m3o/api/m3o/v1"
)

func accessCommands() []*command {
	const paths = `PATH is "/package.Service/Method" of a gRPC method, which then holds in every protocol and on every path that leads to it, or
the path of a request. A * at the end stands for anything: /shop.v1.Admin/*, /internal/*. The most exact rule decides; a rule
for the path of a call can make the rule for its method only stricter.`
	return []*command{
		{name: "access", aliases: []string{"access:info"}, group: "Access", app: true, run: runAccess, short: "Show who may use the URL of an app"},
		{name: "access:private", group: "Access", app: true, run: runAccessPrivate,
			short: "Close the URL of an app to all but callers",
			long: `Callers are holders of an API key of the app (m3o apikeys:create) and users who may see the app, by the token they logged in
with. Both send Authorization: Bearer. The app is told who it was by the header X-M3o-Caller and does not get what was shown.`},
		{name: "access:public", group: "Access", app: true, run: runAccessPublic, short: "Open the URL of an app to everybody"},
		{name: "access:rule", group: "Access", args: "PATH public|private|deny", min: 2, max: 2, app: true, run: runAccessRule,
			short: "Say who may use some of an app", long: paths,
			example: "m3o access:rule '/shop.v1.Admin/*' private\nm3o access:rule /healthz public\nm3o access:rule '/internal/*' deny"},
		{name: "access:unrule", group: "Access", args: "PATH", min: 1, max: 1, app: true, run: runAccessUnrule, short: "Remove a rule"},
		{name: "access:limit", group: "Access", args: "app|address|key|account N/TIME", min: 2, max: 2, app: true, run: runAccessLimit,
			short: "Bound how often an app is used",
			long: `A limit of 100/1m lets 100 requests through at once and refills evenly. With --quota the count starts anew in every window of
the calendar, in UTC, and outlives restarts. What it counts: all requests together, those of one address (an IPv6 /64 is
one), of one caller, or of one account of API keys. Who is refused is told when to come again: 429, or RESOURCE_EXHAUSTED.`,
			example: "m3o access:limit address 100/1m\nm3o access:limit key 10000/1d --quota\nm3o access:limit app 50/1s --path '/shop.v1.Search/*'",
			flags:   []flag{{"path", "", "PATH", "only requests for this, as in access:rule"}, {"quota", "", "", "count per window of the calendar"}}},
		{name: "access:unlimit", group: "Access", args: "app|address|key|account", min: 1, max: 1, app: true, run: runAccessUnlimit,
			short: "Remove a limit", flags: []flag{{"path", "", "PATH", "the one for this path"}}},
		{name: "apikeys", aliases: []string{"apikeys:list"}, group: "Access", app: true, run: runAPIKeys, short: "List the API keys of an app"},
		{name: "apikeys:create", aliases: []string{"apikeys:add"}, group: "Access", args: "NAME", min: 1, max: 1, app: true, run: runAPIKeysCreate,
			short: "Make an API key, which is printed once",
			long:  "The key is on stdout and everything else on stderr, so that it can go straight into a file.",
			example: "m3o apikeys:create billing > billing.key\nm3o apikeys:create partner --account acme --scope '/shop.v1.Catalog/*' " +
				"--limit 1000/1h --expires 90d",
			flags: []flag{{"account", "", "NAME", "whose it is; keys of one account share the limits per account"},
				{"scope", "", "PATHS", "only for these paths, with commas between them"},
				{"limit", "", "N/TIME", "bound how often this key is used"},
				{"expires", "", "TIME", "such as 90d; without it the key lasts until it is revoked"}}},
		{name: "apikeys:revoke", aliases: []string{"apikeys:remove"}, group: "Access", args: "KEY", min: 1, max: 1, app: true, run: runAPIKeysRevoke,
			short: "End an API key, by its name or id"},
	}
}

// parseRate reads 100/1m.
func parseRate(s string) (requests, seconds int64, err error) {
	n, window, ok := strings.Cut(s, "/")
	requests, err = strconv.ParseInt(n, 10, 64)
	d, derr := parseDays(window)
	if !ok || err != nil || derr != nil || requests < 1 || d < time.Second {
		return 0, 0, misuse(fmt.Sprintf("%q is not a rate such as 100/1m or 10000/1d", s), "")
	}
	return requests, int64(d / time.Second), nil
}

// parseDays is time.ParseDuration that also knows days: 90d, and "m" for 1m.
func parseDays(s string) (time.Duration, error) {
	if s != "" && strings.Trim(s, "0123456789") == s {
		s = "1" + s // per "m" is per minute
	}
	if days, ok := strings.CutSuffix(s, "d"); ok {
		n, err := strconv.ParseUint(days, 10, 16)
		if err != nil {
			return 0, fmt.Errorf("%q is not a time such as 30m, 12h or 90d", s)
		}
		return time.Duration(n) * 24 * time.Hour, nil
	}
	d, err := time.ParseDuration(s)
	if err != nil || d <= 0 {
		return 0, fmt.Errorf("%q is not a time such as 30m, 12h or 90d", s)
	}
	return d, nil
}

// window is how people write so many seconds.
func window(seconds int64) string {
	for _, u := range []struct {
		n    int64
		name string
	}{{24 * 3600, "d"}, {3600, "h"}, {60, "m"}} {
		if seconds%u.n == 0 {
			return fmt.Sprintf("%d%s", seconds/u.n, u.name)
		}
	}
	return fmt.Sprintf("%ds", seconds)
}

func rate(l *m3ov1.Limit) string {
	s := fmt.Sprintf("%d/%s", l.GetRequests(), window(l.GetSeconds()))
	if l.GetQuota() {
		s += " (quota)"
	}
	return s
}

func runAccess(ctx context.Context, c *call) error {
	app, cl, err := c.withApp(ctx)
	if err != nil {
		return err
	}
	res, err := ask(ctx, cl.access.Get, &m3ov1.GetAccessRequest{App: app})
	if err != nil {
		return err
	}
	return c.result(res, func() {
		who := "public: everybody may use it"
		if res.GetPrivate() {
			who = "private: API keys and users who may see the app"
		}
		if res.GetInherited() {
			who += " (the server's default)"
		}
		c.fields("Access", who, "API keys", strconv.Itoa(len(res.GetKeys())))
		var rows [][]string
		for _, r := range res.GetRules() {
			rows = append(rows, []string{plain(r.GetPath()), plain(r.GetAccess())})
		}
		if rows != nil {
			c.print("\n")
			c.table([]string{"PATH", "ACCESS"}, rows)
		}
		rows = nil
		for _, l := range res.GetLimits() {
			rows = append(rows, []string{plain(l.GetPer()), rate(l), plain(l.GetPath())})
		}
		if rows != nil {
			c.print("\n")
			c.table([]string{"PER", "LIMIT", "PATH"}, rows)
		}
	})
}

func runAccessPrivate(ctx context.Context, c *call) error { return c.setPrivate(ctx, true) }
func runAccessPublic(ctx context.Context, c *call) error  { return c.setPrivate(ctx, false) }

func (c *call) setPrivate(ctx context.Context, private bool) error {
	app, cl, err := c.withApp(ctx)
	if err != nil {
		return err
	}
	before, err := ask(ctx, cl.access.Get, &m3ov1.GetAccessRequest{App: app})
	if err != nil {
		return err
	}
	res, err := ask(ctx, cl.access.SetPrivate, &m3ov1.SetPrivateRequest{App: app, Private: private})
	if err != nil {
		return err
	}
	return c.result(res, func() {
		now, back := "public", "private"
		if private {
			now, back = "private", "public"
		}
		c.print("%s is %s\n", app, now)
		if before.GetPrivate() != private {
			c.undo("m3o access:%s -a %s", back, app)
		}
		if private && len(before.GetKeys()) == 0 {
			c.hint("m3o apikeys:create NAME -a %s lets a program in", app)
		}
	})
}

func runAccessRule(ctx context.Context, c *call) error {
	if !slices.Contains([]string{"public", "private", "deny"}, c.args[1]) {
		return misuse(quoted(c.args[1])+" is none of public, private and deny", "m3o help access:rule")
	}
	app, cl, err := c.withApp(ctx)
	if err != nil {
		return err
	}
	res, err := ask(ctx, cl.access.SetRule, &m3ov1.SetAccessRuleRequest{App: app, Rule: &m3ov1.AccessRule{Path: c.args[0], Access: c.args[1]}})
	if err != nil {
		return err
	}
	return c.result(res, func() {
		c.print("%s of %s: %s\n", plain(c.args[0]), app, c.args[1])
		c.undo("m3o access:unrule %s -a %s", quote(c.args[0]), app)
	})
}

func runAccessUnrule(ctx context.Context, c *call) error {
	app, cl, err := c.withApp(ctx)
	if err != nil {
		return err
	}
	res, err := ask(ctx, cl.access.RemoveRule, &m3ov1.RemoveAccessRuleRequest{App: app, Path: c.args[0]})
	if err != nil {
		return err
	}
	return c.result(res, func() { c.print("removed the rule for %s of %s\n", plain(c.args[0]), app) })
}

func runAccessLimit(ctx context.Context, c *call) error {
	n, seconds, err := parseRate(c.args[1])
	if err != nil {
		return err
	}
	app, cl, err := c.withApp(ctx)
	if err != nil {
		return err
	}
	l := &m3ov1.Limit{Per: c.args[0], Path: c.value("path"), Requests: n, Seconds: seconds, Quota: c.has("quota")}
	res, err := ask(ctx, cl.access.SetLimit, &m3ov1.SetLimitRequest{App: app, Limit: l})
	if err != nil {
		return err
	}
	return c.result(res, func() {
		c.print("%s: at most %s per %s\n", app, rate(l), plain(l.GetPer()))
		undo := "m3o access:unlimit " + plain(l.GetPer())
		if l.GetPath() != "" {
			undo += " --path " + quote(l.GetPath())
		}
		c.undo("%s -a %s", undo, app)
	})
}

func runAccessUnlimit(ctx context.Context, c *call) error {
	app, cl, err := c.withApp(ctx)
	if err != nil {
		return err
	}
	res, err := ask(ctx, cl.access.RemoveLimit, &m3ov1.RemoveLimitRequest{App: app, Per: c.args[0], Path: c.value("path")})
	if err != nil {
		return err
	}
	return c.result(res, func() { c.print("removed the limit per %s of %s\n", plain(c.args[0]), app) })
}

func runAPIKeys(ctx context.Context, c *call) error {
	app, cl, err := c.withApp(ctx)
	if err != nil {
		return err
	}
	res, err := ask(ctx, cl.access.Get, &m3ov1.GetAccessRequest{App: app})
	if err != nil {
		return err
	}
	return c.result(res, func() {
		if len(res.GetKeys()) == 0 {
			c.say("%s has no API keys", app)
			c.hint("m3o apikeys:create NAME -a %s", app)
			return
		}
		var rows [][]string
		for _, k := range res.GetKeys() {
			expires := "never"
			if k.GetExpires() != nil {
				expires = k.GetExpires().AsTime().Local().Format("2006-01-02 15:04")
			}
			var limits []string
			for _, l := range k.GetLimits() {
				limits = append(limits, rate(l))
			}
			rows = append(rows, []string{plain(k.GetId()), plain(k.GetName()), plain(k.GetAccount()), plain(strings.Join(k.GetScopes(), " ")),
				strings.Join(limits, " "), plain(k.GetUser()), c.when(k.GetCreated()), expires})
		}
		c.table([]string{"ID", "NAME", "ACCOUNT", "SCOPES", "LIMIT", "BY", "MADE", "EXPIRES"}, rows)
	})
}

func runAPIKeysCreate(ctx context.Context, c *call) error {
	req := &m3ov1.CreateAPIKeyRequest{Name: c.args[0], Account: c.value("account")}
	if c.has("scope") {
		req.Scopes = strings.Split(c.value("scope"), ",")
	}
	if c.has("limit") {
		n, seconds, err := parseRate(c.value("limit"))
		if err != nil {
			return err
		}
		req.Limits = []*m3ov1.Limit{{Per: "key", Requests: n, Seconds: seconds}}
	}
	if c.has("expires") {
		d, err := parseDays(c.value("expires"))
		if err != nil {
			return misuse("--expires: "+err.Error(), "")
		}
		req.TtlSeconds = int64(d / time.Second)
	}
	app, cl, err := c.withApp(ctx)
	if err != nil {
		return err
	}
	req.App = app
	res, err := ask(ctx, cl.access.CreateKey, req)
	if err != nil {
		return err
	}
	if err := c.result(res, func() { c.print("%s\n", plain(res.GetSecret())) }); err != nil {
		return err
	}
	c.say("This is key %s of %s. It is not shown again; send it as Authorization: Bearer.", plain(res.GetKey().GetId()), app)
	c.undo("m3o apikeys:revoke %s -a %s", plain(res.GetKey().GetId()), app)
	return nil
}

func runAPIKeysRevoke(ctx context.Context, c *call) error {
	app, cl, err := c.withApp(ctx)
	if err != nil {
		return err
	}
	res, err := ask(ctx, cl.access.RevokeKey, &m3ov1.RevokeAPIKeyRequest{App: app, Id: c.args[0]})
	if err != nil {
		return err
	}
	return c.result(res, func() { c.print("revoked %s\n", plain(c.args[0])) })
}
