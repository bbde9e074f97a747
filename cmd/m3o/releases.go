package main

import (
	"context"
	"fmt"
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
			rows = append(rows, []string{fmt.Sprintf("v%d", r.GetVersion()), c.status(plain(r.GetStatus())), short(plain(r.GetCommit())),
				plain(r.GetUser()), c.when(r.GetCreated()), plain(what)})
		}
		c.table([]string{"RELEASE", "STATUS", "COMMIT", "BY", "WHEN", "WHAT"}, rows)
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
