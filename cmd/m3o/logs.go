package main

import (
	"context"
	"io"
	"strconv"
	"strings"
	"time"

	"connectrpc.com/connect"
	"google.golang.org/protobuf/types/known/timestamppb"

	m3ov1 "github.com/m3o/m3o/api/m3o/v1"
)

func logCommands() []*command {
	return []*command{
		{name: "logs", group: "Running", args: "[APP]", max: 1, app: true, appArg: true, run: runLogs, completes: "app",
			short: "Show an app's log, the newest lines last",
			long: `One stream of what its instances print (app), its builds (build), the requests it got (router) and what the platform did
with it (m3o). With --json every line is one JSON object.

--since and --until take a length of time before now (90s, 10m, 2h, 3d) or a time (2026-05-04, 2026-05-04T11:59:00Z).`,
			example: "m3o logs -f\nm3o logs -n 1000 -p worker\nm3o logs -s router --since 10m\nm3o logs --since 2h --until 1h --json",
			flags: []flag{{"follow", "f", "", "go on until Ctrl-C"}, {"number", "n", "N", "how many lines (default 100; with --since all, up to 100,000)"},
				{"process", "p", "TYPE", "only this process type's"}, {"source", "s", "SOURCE", "only lines of app, build, router or m3o"},
				{"instance", "i", "ID", "only this instance's"}, {"since", "", "TIME", "only lines from then on"}, {"until", "", "TIME", "only lines before then"}}},
		{name: "drains", aliases: []string{"drains:list"}, group: "Running", args: "[APP]", max: 1, app: true, appArg: true, run: runDrains, completes: "app",
			short: "List where else an app's log goes, and what got lost on the way"},
		{name: "drains:add", group: "Running", args: "URL", min: 1, max: 1, app: true, run: runDrainsAdd,
			short: "Send an app's log somewhere else, too",
			long: `URL is syslog+tls://host:port (RFC 5424), https://user:password@host/path (JSON, an array of lines in each POST) or
otlp+https://host/path?token=TOKEN (OpenTelemetry; the path is /v1/logs unless given). - reads it from stdin. It is stored
sealed, and shown without password and token.

A drain that is away makes no app wait: its lines are kept for a while (10,000, at most 8 MB), then the oldest are dropped and
counted.`,
			example: "m3o drains:add syslog+tls://logs.example.com:6514\nm3o drains:add - < url.txt"},
		{name: "drains:remove", group: "Running", args: "ID", min: 1, max: 1, app: true, run: runDrainsRemove, short: "Stop sending an app's log there"},
	}
}

// moment reads a time: a length of time before now, a day or RFC 3339.
func (c *call) moment(flag string) (*timestamppb.Timestamp, error) {
	if !c.has(flag) {
		return nil, nil
	}
	v := c.value(flag)
	if days, ok := strings.CutSuffix(v, "d"); ok {
		if d, err := time.ParseDuration(days + "h"); err == nil && d >= 0 {
			return timestamppb.New(c.now().Add(-24 * d)), nil
		}
	}
	if d, err := time.ParseDuration(v); err == nil && d >= 0 {
		return timestamppb.New(c.now().Add(-d)), nil
	}
	for _, form := range []string{time.RFC3339Nano, "2006-01-02T15:04:05", "2006-01-02 15:04:05", "2006-01-02"} {
		if t, err := time.ParseInLocation(form, v, time.Local); err == nil {
			return timestamppb.New(t), nil
		}
	}
	return nil, misuse("--"+flag+" takes a length of time such as 10m, or a time, not "+quoted(v), "m3o help logs")
}

func runLogs(ctx context.Context, c *call) error {
	n, err := c.number("number", 0, 1, 100_000)
	if err != nil {
		return err
	}
	req := &m3ov1.LogsRequest{Process: c.value("process"), Source: c.value("source"), Instance: c.value("instance"), Lines: int32(n), Follow: c.has("follow")}
	if req.Since, err = c.moment("since"); err != nil {
		return err
	}
	if req.Until, err = c.moment("until"); err != nil {
		return err
	}
	app, cl, err := c.withApp(ctx)
	if err != nil {
		return err
	}
	req.App = app
	stream, err := cl.processes.Logs(ctx, connect.NewRequest(req))
	return receive(ctx, cl, c.has("follow"), stream, err, func(m *m3ov1.LogsResponse) error {
		if c.has("json") {
			return c.jsonLine(m)
		}
		c.print("%s\n", c.logLine(m))
		return nil
	})
}

// logLine is Heroku's form of a log line: time source[process.instance]: text.
func (s *system) logLine(m *m3ov1.LogsResponse) string {
	form := time.RFC3339Nano
	at := m.GetTime().AsTime().UTC()
	if s.outTerminal {
		form, at = "15:04:05.000", at.Local()
	}
	who := m.GetSource()
	switch {
	case m.GetInstance() != "" && m.GetProcess() != "":
		who += "[" + m.GetProcess() + "." + m.GetInstance() + "]"
	case m.GetProcess() != "":
		who += "[" + m.GetProcess() + "]"
	}
	colour := green
	if m.GetStream() == "stderr" {
		colour = yellow
	}
	return at.Format(form) + " " + s.paint(colour, plain(who)+":") + " " + s.text(m.GetText())
}

func runDrains(ctx context.Context, c *call) error {
	app, cl, err := c.withApp(ctx)
	if err != nil {
		return err
	}
	res, err := ask(ctx, cl.drains.List, &m3ov1.ListDrainsRequest{App: app})
	if err != nil {
		return err
	}
	return c.result(res, func() {
		if len(res.GetDrains()) == 0 {
			c.say("the log of %s goes nowhere else", app)
			c.hint("m3o drains:add syslog+tls://host:port -a %s", app)
			return
		}
		var rows [][]string
		for _, d := range res.GetDrains() {
			rows = append(rows, []string{plain(d.GetId()), plain(d.GetUrl()), strconv.FormatInt(d.GetSent(), 10), strconv.FormatInt(d.GetDropped(), 10),
				strconv.Itoa(int(d.GetWaiting())), plain(d.GetError())})
		}
		c.table([]string{"ID", "URL", "SENT", "DROPPED", "WAITING", "LAST ERROR"}, rows)
	})
}

func runDrainsAdd(ctx context.Context, c *call) error {
	url := c.args[0]
	if url == "-" {
		line, err := await(ctx, func() (string, error) { return c.in.ReadString('\n') }, func() {})
		if line = strings.TrimSpace(line); line == "" {
			return misuse("there is no URL on stdin", "")
		} else if err != nil && err != io.EOF {
			return err
		}
		url = line
	}
	app, cl, err := c.withApp(ctx)
	if err != nil {
		return err
	}
	res, err := ask(ctx, cl.drains.Add, &m3ov1.AddDrainRequest{App: app, Url: url})
	if err != nil {
		return err
	}
	return c.result(res, func() {
		c.print("%s\n", plain(res.GetDrain().GetId()))
		c.say("the log of %s goes to %s, too", app, plain(res.GetDrain().GetUrl()))
		c.undo("m3o drains:remove %s -a %s", plain(res.GetDrain().GetId()), app)
	})
}

func runDrainsRemove(ctx context.Context, c *call) error {
	app, cl, err := c.withApp(ctx)
	if err != nil {
		return err
	}
	res, err := ask(ctx, cl.drains.Remove, &m3ov1.RemoveDrainRequest{App: app, Id: c.args[0]})
	if err != nil {
		return err
	}
	return c.result(res, func() { c.say("removed drain %s of %s", c.args[0], app) })
}
