package main

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"
	"time"

	m3ov1 "github.com/m3o/m3o/api/m3o/v1"
)

func runReleases(ctx context.Context, c *call) error {
	limit, err := c.number("number", 0, 1, 1000)
	if err != nil {
		return err
	}
	app, cl, err := c.withApp(ctx)
	if err != nil {
		return err
	}
	res, err := ask(ctx, cl.releases.List, &m3ov1.ListReleasesRequest{App: app, Limit: int32(limit)})
	if err != nil {
		return err
	}
	return c.result(res, func() {
		if len(res.GetReleases()) == 0 {
			c.say("%s has no releases yet", app)
			c.hint("git push m3o main")
			return
		}
		var rows [][]string
		for _, r := range res.GetReleases() {
			what := r.GetReason()
			if r.GetMessage() != "" {
				what = strings.TrimPrefix(what+": ", ": ") + r.GetMessage()
			}
			if n := len(r.GetBreaking()); n > 0 {
				what += fmt.Sprintf(" (breaks its callers: %d allowed)", n)
			}
			rows = append(rows, []string{fmt.Sprintf("v%d", r.GetVersion()), c.status(plain(r.GetStatus())), short(plain(r.GetCommit())),
				plain(r.GetUser()), c.when(r.GetCreated()), plain(what)})
		}
		c.table([]string{"RELEASE", "STATUS", "COMMIT", "BY", "WHEN", "WHAT"}, rows)
	})
}

func runReleasesInfo(ctx context.Context, c *call) error {
	var version int32
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
	res, err := ask(ctx, cl.releases.List, &m3ov1.ListReleasesRequest{App: app, Limit: 1000})
	if err != nil {
		return err
	}
	i := slices.IndexFunc(res.GetReleases(), func(r *m3ov1.Release) bool {
		return r.GetVersion() == version || version == 0 && r.GetStatus() == "live"
	})
	switch {
	case i < 0 && version == 0:
		return fail(app+" has no live release", "git push m3o main")
	case i < 0:
		return fail(fmt.Sprintf("%s has no release v%d", app, version), "m3o releases -a "+app)
	}
	r := res.GetReleases()[i]
	return c.result(r, func() {
		api := ""
		if r.GetDescriptors() != "" {
			api = fmt.Sprintf("%s (held to %s)", plain(r.GetDescriptors()), plain(r.GetBreakingPolicy()))
		}
		c.fields("Release", fmt.Sprintf("v%d", r.GetVersion()), "Status", c.status(plain(r.GetStatus())), "Reason", plain(r.GetReason()),
			"Commit", plain(r.GetCommit()), "Message", plain(r.GetMessage()), "By", plain(r.GetUser()), "Created", c.when(r.GetCreated()),
			"Image", plain(r.GetImage()), "Build", fmt.Sprint(r.GetBuild()), "Config", fmt.Sprintf("revision %d", r.GetConfig()), "API", api)
		for _, name := range slices.Sorted(maps.Keys(r.GetProcesses())) {
			p := r.GetProcesses()[name]
			c.print("%s (%d): %s\n", plain(name), p.GetReplicas(), plain(strings.Join(p.GetCommand(), " ")))
		}
		for _, b := range r.GetBreaking() {
			c.print("breaks: %s\n", plain(b))
		}
	})
}

// parseVersion reads v12 or 12.
func parseVersion(s string) (int32, error) {
	n, err := strconv.ParseUint(strings.TrimPrefix(s, "v"), 10, 31)
	if err != nil || n < 1 {
		return 0, misuse(quoted(s)+" is no release", "they are called v1, v2 …; m3o releases lists them")
	}
	return int32(n), nil
}

func runRollback(ctx context.Context, c *call) error {
	req := &m3ov1.RollbackRequest{}
	to := "the release before"
	if len(c.args) > 0 {
		v, err := parseVersion(c.args[0])
		if err != nil {
			return err
		}
		req.Version, to = v, fmt.Sprintf("v%d", v)
	}
	app, cl, err := c.withApp(ctx)
	if err != nil {
		return err
	}
	req.App = app
	c.say("rolling %s back to %s …", app, to)
	res, err := ask(ctx, cl.releases.Rollback, req)
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

// took is a duration as deploys print it.
func took(millis int64) string {
	if millis < 1000 {
		return fmt.Sprintf("%d ms", millis)
	}
	return fmt.Sprintf("%.1fs", (time.Duration(millis) * time.Millisecond).Seconds())
}
