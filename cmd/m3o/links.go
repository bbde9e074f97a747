package main

import (
	"context"

	m3ov1 "github.com/m3o/m3o/api/m3o/v1"
)

func linkCommands() []*command {
	return []*command{
		{name: "links", aliases: []string{"links:list"}, group: "Running", args: "[APP]", max: 1, app: true, appArg: true, run: runLinks, completes: "app",
			short: "List which apps may reach an app's instances, and which it may reach"},
		{name: "links:add", group: "Running", args: "FROM", min: 1, max: 1, app: true, run: runLinksAdd, completes: "app",
			short: "Let the instances of another app reach those of this one",
			long: `Apps cannot reach each other unless a link says so. FROM, and its previews, then call this app at http://<app>.internal, and find
the addresses of its ready instances under the name <app>.instances.internal. A link has one direction, and its app's owner adds it.`,
			example: "m3o links:add web -a orders"},
		{name: "links:remove", group: "Running", args: "FROM", min: 1, max: 1, app: true, run: runLinksRemove, completes: "app",
			short: "Take such a link away; open connections stay"},
	}
}

func runLinks(ctx context.Context, c *call) error {
	app, cl, err := c.withApp(ctx)
	if err != nil {
		return err
	}
	res, err := ask(ctx, cl.links.List, &m3ov1.ListLinksRequest{App: app})
	if err != nil {
		return err
	}
	return c.result(res, func() {
		if len(res.GetLinks()) == 0 {
			c.say("no other app reaches %s, and it reaches none", app)
			c.hint("m3o links:add OTHER -a %s", app)
			return
		}
		var rows [][]string
		for _, l := range res.GetLinks() {
			rows = append(rows, []string{plain(l.GetFrom()), plain(l.GetTo()), plain(l.GetUser()), c.when(l.GetCreated())})
		}
		c.table([]string{"FROM", "TO", "BY", "SINCE"}, rows)
	})
}

func runLinksAdd(ctx context.Context, c *call) error {
	app, cl, err := c.withApp(ctx)
	if err != nil {
		return err
	}
	res, err := ask(ctx, cl.links.Add, &m3ov1.AddLinkRequest{App: app, From: c.args[0]})
	if err != nil {
		return err
	}
	return c.result(res, func() {
		c.say("%s may call %s at http://%s.internal, and reach its instances at %s.instances.internal", c.args[0], app, app, app)
		c.undo("m3o links:remove %s -a %s", c.args[0], app)
	})
}

func runLinksRemove(ctx context.Context, c *call) error {
	app, cl, err := c.withApp(ctx)
	if err != nil {
		return err
	}
	res, err := ask(ctx, cl.links.Remove, &m3ov1.RemoveLinkRequest{App: app, From: c.args[0]})
	if err != nil {
		return err
	}
	return c.result(res, func() {
		c.say("%s opens no more connections to %s", c.args[0], app)
		c.undo("m3o links:add %s -a %s", c.args[0], app)
	})
}
