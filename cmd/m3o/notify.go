package main

import (
	"context"
	"fmt"
	"io"
	"strconv"
	"strings"

	m3ov1 "github.com/m3o/m3o/api/m3o/v1"
)

func notifyCommands() []*command {
	return []*command{
		{name: "notify", aliases: []string{"notify:list", "notifications"}, group: "Notifications", app: true, run: runNotify, short: "List where an app's notifications go"},
		{name: "notify:add", group: "Notifications", args: "URL", min: 1, max: 1, app: true, run: runNotifyAdd,
			short: "Tell a URL what happens to an app; - reads it from stdin",
			long: `A webhook gets signed JSON (standardwebhooks.com); its signing secret is printed once. The URLs of Slack and Discord are known by
their host and get a message. Events are started, live, failed, recovered and crashed; without --events all but started.
What cannot be delivered is tried again for 17 hours.`,
			example: "m3o notify:add https://ops.example.com/m3o --events live,failed\nm3o notify:add - < slack-url.txt",
			flags: []flag{{"format", "", "FORMAT", "webhook, slack or discord (default by the URL)"},
				{"events", "", "LIST", "which events, with commas between"}}},
		{name: "notify:remove", group: "Notifications", args: "ID", min: 1, max: 1, app: true, run: runNotifyRemove, completes: "notifier", short: "Stop telling a URL"},
		{name: "notify:test", group: "Notifications", args: "ID", min: 1, max: 1, app: true, run: runNotifyTest, completes: "notifier", short: "Send a test notification now and show how it went"},
		{name: "notify:history", group: "Notifications", args: "[ID]", max: 1, app: true, run: runNotifyHistory, completes: "notifier",
			short: "Show what was sent, newest first, and what waits to be tried again", flags: []flag{{"number", "n", "N", "how many"}}},
	}
}

func runNotify(ctx context.Context, c *call) error {
	app, cl, err := c.withApp(ctx)
	if err != nil {
		return err
	}
	res, err := ask(ctx, cl.notify.List, &m3ov1.ListNotifiersRequest{App: app})
	if err != nil {
		return err
	}
	return c.result(res, func() {
		if len(res.GetNotifiers()) == 0 {
			c.say("nobody is told what happens to %s", app)
			c.hint("m3o notify:add https://… -a %s", app)
			return
		}
		var rows [][]string
		for _, n := range res.GetNotifiers() {
			state := "on"
			if n.GetDisabled() != "" {
				state = c.status("failed") + ": " + plain(n.GetDisabled())
			}
			rows = append(rows, []string{plain(n.GetId()), plain(n.GetFormat()), plain(strings.Join(n.GetEvents(), ",")), state, plain(n.GetUrl())})
		}
		c.table([]string{"ID", "FORMAT", "EVENTS", "STATE", "URL"}, rows)
	})
}

func runNotifyAdd(ctx context.Context, c *call) error {
	req := &m3ov1.AddNotifierRequest{Url: c.args[0], Format: c.value("format")}
	if req.Url == "-" {
		b, err := io.ReadAll(io.LimitReader(c.in, 4096))
		if err != nil {
			return fail("cannot read the URL from stdin: "+err.Error(), "")
		}
		req.Url = strings.TrimSpace(string(b))
	}
	if c.has("events") {
		for e := range strings.SplitSeq(c.value("events"), ",") {
			if e = strings.TrimSpace(e); e != "" {
				req.Events = append(req.Events, e)
			}
		}
		if len(req.Events) == 0 {
			return misuse("--events names none", "started, live, failed, recovered, crashed")
		}
	}
	app, cl, err := c.withApp(ctx)
	if err != nil {
		return err
	}
	req.App = app
	res, err := ask(ctx, cl.notify.Add, req)
	if err != nil {
		return err
	}
	n := res.GetNotifier()
	if err := c.result(res, func() {
		c.print("%s\n", plain(n.GetId()))
		if s := res.GetSecret(); s != "" {
			c.print("%s\n", plain(s))
			c.say("the second line is the secret that its webhooks are signed with; it is not shown again")
		}
		c.say("%s hears of %s", plain(n.GetUrl()), plain(strings.Join(n.GetEvents(), ", ")))
		c.hint("m3o notify:test %s -a %s", plain(n.GetId()), app)
	}); err != nil {
		return err
	}
	c.undo("m3o notify:remove %s -a %s", plain(n.GetId()), app)
	return nil
}

func runNotifyRemove(ctx context.Context, c *call) error {
	app, cl, err := c.withApp(ctx)
	if err != nil {
		return err
	}
	res, err := ask(ctx, cl.notify.Remove, &m3ov1.RemoveNotifierRequest{App: app, Id: c.args[0]})
	if err != nil {
		return err
	}
	return c.result(res, func() { c.say("removed %s", c.args[0]) })
}

func runNotifyTest(ctx context.Context, c *call) error {
	app, cl, err := c.withApp(ctx)
	if err != nil {
		return err
	}
	res, err := ask(ctx, cl.notify.Test, &m3ov1.TestNotifierRequest{App: app, Id: c.args[0]})
	if err != nil {
		return err
	}
	d := res.GetDelivery()
	if err := c.result(res, func() { c.print("%s: %s\n", c.status(plain(d.GetStatus())), plain(d.GetDetail())) }); err != nil {
		return err
	}
	if d.GetStatus() != "delivered" {
		return fail("the test was not delivered: "+plain(d.GetDetail()), "check the URL and whether its server takes POST from here")
	}
	return nil
}

func runNotifyHistory(ctx context.Context, c *call) error {
	limit, err := c.number("number", 0, 1, 1000)
	if err != nil {
		return err
	}
	app, cl, err := c.withApp(ctx)
	if err != nil {
		return err
	}
	req := &m3ov1.NotificationHistoryRequest{App: app, Limit: int32(limit)}
	if len(c.args) > 0 {
		req.Id = c.args[0]
	}
	res, err := ask(ctx, cl.notify.History, req)
	if err != nil {
		return err
	}
	return c.result(res, func() {
		if len(res.GetDeliveries()) == 0 {
			c.say("nothing was sent yet")
			return
		}
		var rows [][]string
		for _, d := range res.GetDeliveries() {
			how := plain(d.GetDetail())
			if d.GetStatus() == "pending" && d.GetNext().IsValid() && d.GetAttempts() > 0 {
				how += fmt.Sprintf("; again %s", c.when(d.GetNext()))
			}
			rows = append(rows, []string{plain(d.GetNotifier()), c.status(plain(d.GetStatus())), strconv.Itoa(int(d.GetAttempts())), c.when(d.GetCreated()), plain(d.GetEvent()), how, plain(d.GetSummary())})
		}
		c.table([]string{"TO", "STATUS", "TRIES", "WHEN", "EVENT", "HOW", "WHAT"}, rows)
	})
}
