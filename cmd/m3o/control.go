package main

import (
	"context"
	"fmt"
	"strconv"
	"strings"

	m3ov1 "github.com/m3o/m3o/api/m3o/v1"
)

func controlCommands() []*command {
	return []*command{
		{name: "apps:branch", aliases: []string{"branch"}, group: "Deploys", args: "[BRANCH]", max: 1, app: true, run: runBranch,
			short: "Show or change the branch whose pushes deploy", long: "A change deploys nothing by itself.", example: "m3o apps:branch release"},
		{name: "apps:paths", aliases: []string{"paths"}, group: "Deploys", args: "[PATTERN…]", max: -1, app: true, run: runPaths,
			short: "Show or set which changed files make a push deploy",
			long: `For repositories that hold more than one app. A push that changes no file of the patterns is taken and deploys nothing. ** stands for any
folders, a folder for all in it, and ! takes away. m3o.yaml's paths count where none are set here.`,
			example: "m3o apps:paths 'svc/api/**' go.mod '!**/*.md'\nm3o apps:paths --clear",
			flags:   []flag{{"clear", "", "", "let every push deploy again"}}},
		{name: "lock", aliases: []string{"deploys:lock"}, group: "Deploys", args: "[REASON]", max: 1, app: true, run: runLock,
			short: "Stop publishing: pushes are built, and held back", example: "m3o lock 'until the sale is over'"},
		{name: "unlock", aliases: []string{"deploys:unlock"}, group: "Deploys", app: true, run: runUnlock,
			short: "Let pushes go live again", long: "What was built meanwhile stays held back; m3o publish makes it live.",
			flags: []flag{{"publish", "", "", "publish the newest release that was held back"}}},
		{name: "publish", aliases: []string{"releases:publish"}, group: "Deploys", args: "[RELEASE]", max: 1, app: true, run: runPublish, completes: "release",
			short: "Make a release that was held back live, the newest without a name", long: "It needs no build, and works while the app is locked. The config is that of now.",
			example: "m3o publish v12"},
		{name: "deploy-hooks", aliases: []string{"deploy-hooks:list"}, group: "Deploys", app: true, run: runDeployHooks, short: "List the secret URLs that deploy an app"},
		{name: "deploy-hooks:add", group: "Deploys", args: "[NAME]", max: 1, app: true, run: runDeployHookAdd,
			short: "Make a secret URL that deploys the newest commit of a branch when it is called by POST",
			long: `The URL is printed once. Without --branch the caller may name a branch with ?branch=NAME, and else gets the branch that deploys.
A call while that commit is being built changes nothing.`,
			example: "m3o deploy-hooks:add cms\ncurl -X POST https://api.example.com/hooks/deploy/…",
			flags:   []flag{{"branch", "b", "BRANCH", "deploy this branch and no other"}}},
		{name: "deploy-hooks:remove", group: "Deploys", args: "HOOK", min: 1, max: 1, app: true, run: runDeployHookRemove, short: "Remove a deploy hook by its id or name"},
	}
}

func runBranch(ctx context.Context, c *call) error {
	app, cl, err := c.withApp(ctx)
	if err != nil {
		return err
	}
	if len(c.args) == 0 {
		res, err := ask(ctx, cl.control.Get, &m3ov1.GetControlRequest{App: app})
		if err != nil {
			return err
		}
		return c.result(res, func() { c.print("%s\n", plain(res.GetBranch())) })
	}
	res, err := ask(ctx, cl.control.SetBranch, &m3ov1.SetBranchRequest{App: app, Branch: c.args[0]})
	if err != nil {
		return err
	}
	if err := c.result(res, func() {
		c.say("pushes to %s deploy %s", c.args[0], app)
		if res.GetTip() == "" {
			c.hint("there is no such branch here yet: git push m3o %s", c.args[0])
		} else {
			c.hint("m3o rebuild -a %s deploys its newest commit, %s", app, short(plain(res.GetTip())))
		}
	}); err != nil {
		return err
	}
	if was := plain(res.GetWas()); was != c.args[0] {
		c.undo("m3o apps:branch %s -a %s", quote(was), app)
	}
	return nil
}

func runPaths(ctx context.Context, c *call) error {
	app, cl, err := c.withApp(ctx)
	if err != nil {
		return err
	}
	if c.has("clear") && len(c.args) > 0 {
		return misuse("patterns and --clear", "leave one out")
	}
	if !c.has("clear") && len(c.args) == 0 {
		res, err := ask(ctx, cl.control.Get, &m3ov1.GetControlRequest{App: app})
		if err != nil {
			return err
		}
		return c.result(res, func() {
			if len(res.GetPaths()) == 0 {
				c.say("every push to %s deploys, unless paths of its m3o.yaml say otherwise", plain(res.GetBranch()))
			}
			for _, p := range res.GetPaths() {
				c.print("%s\n", plain(p))
			}
		})
	}
	res, err := ask(ctx, cl.control.SetPaths, &m3ov1.SetPathsRequest{App: app, Paths: c.args})
	if err != nil {
		return err
	}
	if err := c.result(res, func() {
		if len(c.args) == 0 {
			c.say("every push deploys %s", app)
		} else {
			c.say("pushes that change %s deploy %s", strings.Join(c.args, " "), app)
		}
	}); err != nil {
		return err
	}
	words := []string{"--clear"}
	if len(res.GetWas()) > 0 {
		words = nil
		for _, p := range res.GetWas() {
			words = append(words, quote(plain(p)))
		}
	}
	c.undo("m3o apps:paths %s -a %s", strings.Join(words, " "), app)
	return nil
}

func runLock(ctx context.Context, c *call) error {
	app, cl, err := c.withApp(ctx)
	if err != nil {
		return err
	}
	req := &m3ov1.LockRequest{App: app}
	if len(c.args) > 0 {
		req.Reason = c.args[0]
	}
	res, err := ask(ctx, cl.control.Lock, req)
	if err != nil {
		return err
	}
	if err := c.result(res, func() { c.say("%s is locked: pushes are built and held back until m3o publish or m3o unlock", app) }); err != nil {
		return err
	}
	c.undo("m3o unlock -a %s", app)
	return nil
}

func runUnlock(ctx context.Context, c *call) error {
	app, cl, err := c.withApp(ctx)
	if err != nil {
		return err
	}
	res, err := ask(ctx, cl.control.Unlock, &m3ov1.UnlockRequest{App: app})
	if err != nil {
		return err
	}
	held := res.GetHeld()
	if c.has("publish") && held != nil {
		c.say("%s is unlocked", app)
		return c.publish(ctx, cl, app, held.GetVersion())
	}
	return c.result(res, func() {
		c.say("%s is unlocked: the next push goes live", app)
		if held != nil {
			c.hint("v%d was held back meanwhile; m3o publish v%d -a %s makes it live", held.GetVersion(), held.GetVersion(), app)
		}
	})
}

func runPublish(ctx context.Context, c *call) error {
	version := int32(0)
	if len(c.args) > 0 {
		v, err := parseVersion(c.args[0])
		if err != nil {
			return err
		}
		version = v
	}
	app, cl, err := c.withApp(ctx)
	if err != nil {
		return err
	}
	return c.publish(ctx, cl, app, version)
}

func (c *call) publish(ctx context.Context, cl *client, app string, version int32) error {
	c.say("publishing …")
	res, err := ask(ctx, cl.control.Publish, &m3ov1.PublishRequest{App: app, Version: version})
	if err != nil {
		return err
	}
	if err := c.result(res, func() {
		c.print("released v%d in %s: %s\n", res.GetRelease().GetVersion(), took(res.GetMillis()), plain(res.GetRelease().GetReason()))
	}); err != nil {
		return err
	}
	if res.GetFrom() > 0 {
		c.undo("m3o rollback v%d -a %s", res.GetFrom(), app)
	}
	return nil
}

func runDeployHooks(ctx context.Context, c *call) error {
	app, cl, err := c.withApp(ctx)
	if err != nil {
		return err
	}
	res, err := ask(ctx, cl.control.ListHooks, &m3ov1.ListHooksRequest{App: app})
	if err != nil {
		return err
	}
	return c.result(res, func() {
		if len(res.GetHooks()) == 0 {
			c.say("%s has no deploy hooks", app)
			c.hint("m3o deploy-hooks:add NAME -a %s", app)
			return
		}
		var rows [][]string
		for _, h := range res.GetHooks() {
			branch := plain(h.GetBranch())
			if branch == "" {
				branch = "any"
			}
			used := "never"
			if h.GetUses() > 0 {
				used = fmt.Sprintf("%s (%s)", c.when(h.GetUsed()), times(int(h.GetUses())))
			}
			rows = append(rows, []string{plain(h.GetId()), plain(h.GetName()), branch, plain(h.GetUser()), c.when(h.GetCreated()), used})
		}
		c.table([]string{"ID", "NAME", "BRANCH", "BY", "MADE", "USED"}, rows)
	})
}

func times(n int) string {
	if n == 1 {
		return "once"
	}
	return strconv.Itoa(n) + " times"
}

func runDeployHookAdd(ctx context.Context, c *call) error {
	app, cl, err := c.withApp(ctx)
	if err != nil {
		return err
	}
	req := &m3ov1.AddHookRequest{App: app, Branch: c.value("branch")}
	if len(c.args) > 0 {
		req.Name = c.args[0]
	}
	res, err := ask(ctx, cl.control.AddHook, req)
	if err != nil {
		return err
	}
	if err := c.result(res, func() {
		c.print("%s\n", plain(res.GetUrl()))
		c.say("who has this URL can deploy %s; it is not shown again. Call it by POST", app)
	}); err != nil {
		return err
	}
	c.undo("m3o deploy-hooks:remove %s -a %s", plain(res.GetHook().GetId()), app)
	return nil
}

func runDeployHookRemove(ctx context.Context, c *call) error {
	app, cl, err := c.withApp(ctx)
	if err != nil {
		return err
	}
	res, err := ask(ctx, cl.control.RemoveHook, &m3ov1.RemoveHookRequest{App: app, Id: c.args[0]})
	if err != nil {
		return err
	}
	return c.result(res, func() { c.say("removed %s: its URL deploys nothing any more", c.args[0]) })
}
