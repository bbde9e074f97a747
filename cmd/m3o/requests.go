package main

import (
	"context"
	"fmt"
	"strconv"
	"time"

	"connectrpc.com/connect"
	"google.golang.org/protobuf/types/known/durationpb"

	m3ov1 "github.com/m3o/m3o/api/m3o/v1"
)

func requestCommands() []*command {
	return []*command{
		{name: "requests", group: "Running", args: "[APP]", max: 1, app: true, appArg: true, run: runRequests, completes: "app",
			short: "Show what an app was asked, how often and how it answered",
			long: `Counts the requests of the last minutes by method, status and release as the router saw them, with the newest that failed or
took over a second. With -f requests are shown as they end instead. Headers, bodies and queries are never recorded.`,
			example: "m3o requests\nm3o requests -f --failed\nm3o requests --window 15m --json",
			flags: []flag{{"follow", "f", "", "show requests as they end, until Ctrl-C"}, {"failed", "", "", "only those that failed"},
				{"window", "w", "TIME", "count so far back, at most 15m (default 5m)"}}},
		{name: "releases:canary", aliases: []string{"canary"}, group: "Deploys", args: "[RELEASE]", max: 1, app: true, run: runCanary, completes: "release",
			short: "Give a kept release a part of the requests, or show how it does",
			long: `The release runs beside the live one until it is promoted, aborted or another release goes live; only its web process is
started. Without a release both are shown side by side. --sticky cookie keeps a browser with the release it was given;
--sticky header:NAME keeps all requests with the same value of a header together.`,
			example: "m3o releases:canary v13 --percent 5\nm3o releases:canary\nm3o releases:promote",
			flags: []flag{{"percent", "p", "N", "the share it takes, 0 to 100 (default 5)"},
				{"sticky", "", "HOW", "cookie, or header:NAME (default: each request anew)"}}},
		{name: "releases:promote", aliases: []string{"canary:promote"}, group: "Deploys", app: true, run: runPromote, short: "Make the canary live, as a new release"},
		{name: "releases:abort", aliases: []string{"canary:abort"}, group: "Deploys", app: true, run: runAbort, short: "End the canary; the live release takes all requests"},
	}
}

// brief is a duration in the precision that matters.
func brief(d *durationpb.Duration) string {
	v := d.AsDuration()
	switch {
	case v < 10*time.Millisecond:
		return fmt.Sprintf("%.1fms", float64(v)/1e6)
	case v < time.Second:
		return fmt.Sprintf("%dms", v.Milliseconds())
	}
	return fmt.Sprintf("%.1fs", v.Seconds())
}

// answerOf is the gRPC status of a call beside the HTTP one.
func answerOf(protocol string, status, code int32) string {
	switch protocol {
	case "grpc", "grpc-web", "connect", "json":
		if code == 0 && status == 200 {
			return "OK"
		}
		if code != 0 {
			return connect.Code(code).String()
		}
	}
	return strconv.Itoa(int(status))
}

func name(method, rpc string) string {
	if rpc != "" {
		return rpc
	}
	return method
}

func runRequests(ctx context.Context, c *call) error {
	req := &m3ov1.RequestsSummaryRequest{}
	if c.has("window") {
		d, err := time.ParseDuration(c.value("window"))
		if err != nil || d <= 0 {
			return misuse(fmt.Sprintf("--window takes a time such as 5m, not %q", c.value("window")), "")
		}
		req.Window = durationpb.New(d)
	}
	app, cl, err := c.withApp(ctx)
	if err != nil {
		return err
	}
	if c.has("follow") {
		return c.followRequests(ctx, app, cl)
	}
	req.App = app
	res, err := ask(ctx, cl.requests.Summary, req)
	if err != nil {
		return err
	}
	return c.result(res, func() {
		if len(res.GetGroups()) == 0 {
			c.say("%s was asked nothing in the last %s", app, res.GetWindow().AsDuration())
			return
		}
		var rows [][]string
		for _, g := range res.GetGroups() {
			if c.has("failed") && g.GetFailed() == 0 {
				continue
			}
			rate := float64(g.GetCount()) / res.GetWindow().AsDuration().Seconds()
			rows = append(rows, []string{plain(name(g.GetMethod(), g.GetRpc())), plain(g.GetProtocol()), plain(answerOf(g.GetProtocol(), g.GetStatus(), g.GetCode())),
				plain(g.GetRelease()), plain(g.GetCaller()), strconv.FormatInt(g.GetCount(), 10), fmt.Sprintf("%.2f/s", rate), brief(g.GetP50()), brief(g.GetP99())})
		}
		c.table([]string{"METHOD", "PROTOCOL", "ANSWER", "RELEASE", "CALLER", "COUNT", "RATE", "P50", "P99"}, rows)
		for _, l := range []struct {
			title string
			list  []*m3ov1.Request
		}{{"Failed", res.GetFailed()}, {"Slow", res.GetSlow()}} {
			if len(l.list) == 0 {
				continue
			}
			c.print("\n%s\n", c.paint(bold, l.title))
			for _, r := range l.list[:min(len(l.list), 10)] {
				c.print("%s\n", c.requestLine(r))
			}
		}
	})
}

func (c *call) followRequests(ctx context.Context, app string, cl *client) error {
	stream, err := cl.requests.Follow(ctx, connect.NewRequest(&m3ov1.FollowRequestsRequest{App: app, Failed: c.has("failed")}))
	missed := int64(0)
	return receive(ctx, cl, true, stream, err, func(m *m3ov1.FollowRequestsResponse) error {
		if m.GetMissed() > missed {
			c.say("m3o: warning: requests were missed, %d so far: they come faster than they can be shown", m.GetMissed())
			missed = m.GetMissed()
		}
		if c.has("json") {
			return c.jsonLine(m)
		}
		c.print("%s\n", c.requestLine(m.GetRequest()))
		return nil
	})
}

func (c *call) requestLine(r *m3ov1.Request) string {
	form, at := time.RFC3339Nano, r.GetTime().AsTime().UTC()
	if c.outTerminal {
		form, at = "15:04:05.000", at.Local()
	}
	colour := green
	answer := plain(answerOf(r.GetProtocol(), r.GetStatus(), r.GetCode()))
	if r.GetStatus() >= 500 || r.GetBroken() {
		colour = red
	}
	if r.GetBroken() {
		answer += " broken off"
	}
	line := fmt.Sprintf("%s %s %s %s%s %s %s %s %s", at.Format(form), c.paint(colour, answer), plain(r.GetMethod()), plain(r.GetHost()), plain(r.GetPath()),
		brief(r.GetTook()), plain(r.GetRelease()), plain(r.GetRemote()), plain(r.GetId()))
	if r.GetCaller() != "" {
		line += " " + plain(r.GetCaller())
	}
	if r.GetError() != "" {
		line += " (" + plain(r.GetError()) + ")"
	}
	return line
}

func runCanary(ctx context.Context, c *call) error {
	if len(c.args) == 0 {
		return c.showCanary(ctx)
	}
	v, err := parseVersion(c.args[0])
	if err != nil {
		return err
	}
	percent := 5.0
	if c.has("percent") {
		if percent, err = strconv.ParseFloat(c.value("percent"), 64); err != nil {
			return misuse(fmt.Sprintf("--percent takes a number from 0 to 100, not %q", c.value("percent")), "")
		}
	}
	app, cl, err := c.withApp(ctx)
	if err != nil {
		return err
	}
	res, err := ask(ctx, cl.canary.Set, &m3ov1.SetCanaryRequest{App: app, Version: v, Percent: percent, Sticky: c.value("sticky")})
	if err != nil {
		return err
	}
	return c.result(res, func() {
		c.print("v%d of %s takes %v%% of the requests\n", v, app, percent)
		c.undo("m3o releases:abort -a %s", app)
		c.hint("m3o releases:canary -a %s shows how it does; m3o releases:promote makes it live", app)
	})
}

func (c *call) showCanary(ctx context.Context) error {
	app, cl, err := c.withApp(ctx)
	if err != nil {
		return err
	}
	res, err := ask(ctx, cl.canary.Get, &m3ov1.GetCanaryRequest{App: app})
	if err != nil {
		return err
	}
	return c.result(res, func() {
		row := func(what string, s *m3ov1.Side) []string {
			share := "-"
			if s.GetRequests() > 0 {
				share = fmt.Sprintf("%.2f%%", 100*float64(s.GetFailed())/float64(s.GetRequests()))
			}
			return []string{plain(s.GetRelease()), what, strconv.FormatInt(s.GetRequests(), 10), strconv.FormatInt(s.GetFailed(), 10), share, brief(s.GetP50()), brief(s.GetP99())}
		}
		what := fmt.Sprintf("canary, %v%%", res.GetPercent())
		if res.GetSticky() != "" {
			what += ", by " + plain(res.GetSticky())
		}
		c.table([]string{"RELEASE", "", "REQUESTS", "FAILED", "SHARE", "P50", "P99"}, [][]string{row("live", res.GetLive()), row(what, res.GetCanary())})
	})
}

func runPromote(ctx context.Context, c *call) error {
	app, cl, err := c.withApp(ctx)
	if err != nil {
		return err
	}
	res, err := ask(ctx, cl.canary.Promote, &m3ov1.PromoteCanaryRequest{App: app})
	if err != nil {
		return err
	}
	return c.result(res, func() {
		c.print("released v%d\n", res.GetVersion())
		c.undo("m3o rollback v%d -a %s", res.GetFrom(), app)
	})
}

func runAbort(ctx context.Context, c *call) error {
	app, cl, err := c.withApp(ctx)
	if err != nil {
		return err
	}
	res, err := ask(ctx, cl.canary.Abort, &m3ov1.AbortCanaryRequest{App: app})
	if err != nil {
		return err
	}
	return c.result(res, func() { c.print("v%d of %s takes no requests any more\n", res.GetVersion(), app) })
}
