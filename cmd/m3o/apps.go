package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/url"
	"os/exec"
	goruntime "runtime"
	"strconv"
	"strings"

	m3ov1 "github.com/m3o/m3o/api/m3o/v1"
)

func runCreate(ctx context.Context, c *call) error {
	name := c.value("app")
	if len(c.args) > 0 {
		name = c.args[0]
	}
	cl, err := c.connect()
	if err != nil {
		return err
	}
	res, err := ask(ctx, cl.apps.Create, &m3ov1.CreateAppRequest{Name: name, Branch: c.value("branch")})
	if err != nil {
		return err
	}
	app := res.GetApp()
	if err := c.result(res, func() {
		c.print("%s\n", plain(app.GetName()))
		c.fields("URL", plain(app.GetUrl()), "Git", plain(app.GetGitUrl()))
	}); err != nil {
		return err
	}
	if c.has("no-remote") {
		return nil
	}
	return c.addRemote(ctx, app, false)
}

// addRemote makes the git remote of an app in the repository around the
// working directory and says how to push. Without replace it leaves a remote
// that names something else alone.
func (c *call) addRemote(ctx context.Context, app *m3ov1.App, replace bool) error {
	which := "m3o"
	if c.has("remote") {
		which = c.value("remote")
	}
	if !hostLike(which) || strings.Contains(which, ":") {
		return misuse(quoted(which)+" is no name of a git remote", "")
	}
	if _, err := parseRemote(app.GetGitUrl()); err != nil {
		return fail("the server answered with a git URL that is none: "+err.Error(), "")
	}
	push := fmt.Sprintf("git push %s %s", which, c.pushRef(ctx, app))
	if _, err := c.git(ctx, "rev-parse", "--git-dir"); err != nil {
		if replace {
			return fail("this is not a git repository", "git init; then m3o git:remote -a "+app.GetName())
		}
		c.hint("in your repository: m3o git:remote -a %s; then %s", app.GetName(), push)
		return nil
	}
	old, err := c.git(ctx, "remote", "get-url", which)
	switch {
	case err == nil && old == app.GetGitUrl():
		c.say("the git remote %s is there already", which)
	case err == nil && !replace:
		c.say("the git remote %s stays at %s", which, plain(old))
		c.hint("m3o git:remote -a %s points it at the new app", app.GetName())
		return nil
	case err == nil:
		if _, err := c.git(ctx, "remote", "set-url", which, app.GetGitUrl()); err != nil {
			return err
		}
		c.say("set the git remote %s", which)
		c.undo("git remote set-url %s %s", which, quote(old))
	default:
		if _, err := c.git(ctx, "remote", "add", which, app.GetGitUrl()); err != nil {
			return err
		}
		c.say("added the git remote %s", which)
	}
	c.hint("%s", push)
	return nil
}

// pushRef is what to push so that the current branch lands on the one that deploys.
func (c *call) pushRef(ctx context.Context, app *m3ov1.App) string {
	deploys := app.GetBranch()
	if deploys == "" {
		deploys = "main"
	}
	if now, err := c.git(ctx, "symbolic-ref", "--short", "HEAD"); err == nil && now != deploys {
		return "HEAD:" + deploys
	}
	return deploys
}

func runGitRemote(ctx context.Context, c *call) error {
	if !c.has("app") && len(c.args) == 0 && c.env("M3O_APP") == "" {
		return misuse("which app", "m3o git:remote -a APP; m3o apps lists them")
	}
	name := c.value("app")
	switch {
	case len(c.args) > 0:
		name = c.args[0]
	case name == "":
		name = c.env("M3O_APP")
	}
	cl, err := c.connect()
	if err != nil {
		return err
	}
	res, err := ask(ctx, cl.apps.Get, &m3ov1.GetAppRequest{App: name})
	if err != nil {
		return err
	}
	if err := c.addRemote(ctx, res.GetApp(), true); err != nil {
		return err
	}
	return c.result(res, func() { c.print("%s\n", plain(res.GetApp().GetGitUrl())) })
}

func runApps(ctx context.Context, c *call) error {
	cl, err := c.connect()
	if err != nil {
		return err
	}
	res, err := ask(ctx, cl.apps.List, &m3ov1.ListAppsRequest{})
	if err != nil {
		return err
	}
	return c.result(res, func() {
		if len(res.GetApps()) == 0 {
			c.say("no apps yet")
			c.hint("m3o create")
			return
		}
		var rows [][]string
		for _, a := range res.GetApps() {
			rows = append(rows, []string{plain(a.GetName()), c.status(plain(a.GetStatus())), plain(a.GetRelease()),
				strconv.Itoa(int(a.GetInstances())), c.when(a.GetReleased()), plain(a.GetUrl())})
		}
		c.table([]string{"APP", "STATUS", "RELEASE", "INSTANCES", "RELEASED", "URL"}, rows)
	})
}

func runInfo(ctx context.Context, c *call) error {
	app, cl, err := c.withApp(ctx)
	if err != nil {
		return err
	}
	res, err := ask(ctx, cl.apps.Get, &m3ov1.GetAppRequest{App: app})
	if err != nil {
		return err
	}
	return c.result(res, func() {
		a := res.GetApp()
		instances := ""
		if a.GetRelease() != "" {
			instances = strconv.Itoa(int(a.GetInstances())) + " ready"
		}
		c.fields("App", plain(a.GetName()), "URL", plain(a.GetUrl()), "Git", plain(a.GetGitUrl()),
			"Status", c.status(plain(a.GetStatus())), "Release", plain(a.GetRelease()), "Commit", short(plain(a.GetCommit())),
			"Instances", instances, "Branch", plain(a.GetBranch()), "Owner", plain(a.GetOwner()),
			"Created", c.when(a.GetCreated()), "Released", c.when(a.GetReleased()), "Locked", c.lockWords(a))
		if a.GetLockedSince() != nil {
			c.hint("m3o unlock -a %s", plain(a.GetName()))
		}
	})
}

// lockWords says who locked an app, since when and why; "" when it is not locked.
func (c *call) lockWords(a *m3ov1.App) string {
	if a.GetLockedSince() == nil {
		return ""
	}
	s := fmt.Sprintf("by %s since %s", plain(a.GetLockedBy()), c.when(a.GetLockedSince()))
	if a.GetLockReason() != "" {
		s += ": " + plain(a.GetLockReason())
	}
	return s
}

func runDestroy(ctx context.Context, c *call) error {
	app, cl, err := c.withApp(ctx)
	if err != nil {
		return err
	}
	if c.has("confirm") {
		if c.value("confirm") != app {
			return misuse(fmt.Sprintf("--confirm says %s, but the app is %s: nothing was destroyed", c.value("confirm"), app), "")
		}
	} else {
		if !c.inTerminal {
			return misuse("destroying an app needs a confirmation, and there is no terminal to ask on", "m3o destroy -a "+app+" --confirm "+app)
		}
		c.say("This removes %s on %s: its releases, repository, config and instances. It cannot be undone.", app, cl.url.Host)
		typed, err := c.system.ask(ctx, "Type the name of the app to go on:")
		if err != nil && err != io.EOF {
			return err
		}
		if typed != app {
			return fail("not confirmed: nothing was destroyed", "")
		}
	}
	res, err := ask(ctx, cl.apps.Destroy, &m3ov1.DestroyAppRequest{App: app, Confirm: app})
	if err != nil {
		return err
	}
	if raw, err := c.git(ctx, "remote", "get-url", "m3o"); err == nil {
		if r, err := parseRemote(raw); err == nil && r.app == app {
			c.hint("git remote remove m3o")
		}
	}
	return c.result(res, func() { c.print("destroyed %s\n", app) })
}

func runOpen(ctx context.Context, c *call) error {
	app, cl, err := c.withApp(ctx)
	if err != nil {
		return err
	}
	res, err := ask(ctx, cl.apps.Get, &m3ov1.GetAppRequest{App: app})
	if err != nil {
		return err
	}
	u, err := url.Parse(res.GetApp().GetUrl())
	if err != nil || u.Scheme != "https" && u.Scheme != "http" || u.Host == "" {
		return fail(fmt.Sprintf("%s has no URL to open", app), "m3o info -a "+app)
	}
	if c.has("json") {
		return c.json(map[string]string{"url": u.String()})
	}
	c.print("%s\n", u)
	if c.has("print") || !c.outTerminal {
		return nil
	}
	if err := browse(ctx, u.String()); err != nil {
		c.hint("open it yourself: %v", err)
	}
	return nil
}

// browse opens a URL as the desktop does. The URL is the server's word, so it
// is http or https and never goes through a shell.
func browse(ctx context.Context, u string) error {
	name, args := "xdg-open", []string{u}
	switch goruntime.GOOS {
	case "darwin":
		name = "open"
	case "windows":
		name, args = "rundll32", []string{"url.dll,FileProtocolHandler", u}
	}
	err := exec.CommandContext(ctx, name, args...).Run()
	if errors.Is(err, exec.ErrNotFound) {
		return fmt.Errorf("there is no %s here", name)
	}
	return err
}

// runStatus is Micro's word: one app's instances where an app is named, else
// all apps.
func runStatus(ctx context.Context, c *call) error {
	_, _, err := c.app(ctx)
	if err == nil {
		return runPs(ctx, c)
	}
	if len(c.args) > 0 || c.has("app") || c.has("remote") {
		return err
	}
	return runApps(ctx, c)
}
