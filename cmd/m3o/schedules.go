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

func scheduleCommands() []*command {
	return []*command{
		{name: "schedules", aliases: []string{"schedule", "schedule:list", "schedules:list"}, group: "Schedules", app: true, run: runSchedules,
			short: "List what an app does at set times"},
		{name: "schedule:add", aliases: []string{"schedules:add"}, group: "Schedules", args: "rebuild | run -- COMMAND… | call METHOD [JSON]", min: 1, max: -1, app: true, run: runScheduleAdd,
			short: "Rebuild an app, run a command in it or call one of its methods at set times",
			long: `The cron line has five fields: minute, hour, day of the month, month, weekday; or is @hourly, @daily, @weekly, @monthly or
@every 90m. Where clocks are put forward, a time that is skipped fires once right after; where they are put back, a time that
comes twice fires once.

rebuild deploys the newest commit of the deploy branch again, without a new commit; with --if-outdated only when the Go toolchain or
the base image has changed. run starts a command in the live release, with its config. call sends a JSON message to a gRPC
method of the live release.`,
			example: "m3o schedule:add --cron \"0 4 * * *\" --timezone Europe/Berlin rebuild --if-outdated\n" +
				"m3o schedule:add --cron \"*/15 * * * *\" --name cleanup run -- /app/cleanup --days 30\n" +
				"m3o schedule:add --cron @hourly call Reports/Send '{\"to\":\"ada\"}'",
			flags: []flag{
				{"cron", "c", "LINE", "when: five fields, or @daily and the like"},
				{"timezone", "z", "ZONE", "whose clock, such as Europe/Berlin (default UTC)"},
				{"name", "", "NAME", "what to call it (default made from what it does)"},
				{"if-outdated", "", "", "rebuild: only when the toolchain or the base has changed"},
				{"overlap", "", "POLICY", "when the run before goes on: skip (default), queue or replace"},
				{"missed", "", "POLICY", "after a downtime: once (default) or skip"},
				{"jitter", "", "TIME", "start up to this much later, always by the same: 5m"},
			}},
		{name: "schedule:run", aliases: []string{"schedules:run"}, group: "Schedules", args: "SCHEDULE", min: 1, max: 1, app: true, run: runScheduleRun, completes: "schedule",
			short: "Start a schedule now and wait for it", flags: []flag{{"detach", "d", "", "do not wait"}}},
		{name: "schedule:pause", aliases: []string{"schedules:pause"}, group: "Schedules", args: "SCHEDULE", min: 1, max: 1, app: true, run: runSchedulePause, completes: "schedule",
			short: "Keep a schedule from starting", long: "What falls into the pause is not made up for."},
		{name: "schedule:resume", aliases: []string{"schedules:resume"}, group: "Schedules", args: "SCHEDULE", min: 1, max: 1, app: true, run: runScheduleResume, completes: "schedule",
			short: "Let a paused schedule start again"},
		{name: "schedule:remove", aliases: []string{"schedules:remove", "schedule:delete"}, group: "Schedules", args: "SCHEDULE", min: 1, max: 1, app: true, run: runScheduleRemove, completes: "schedule",
			short: "Remove a schedule with its history", long: "A run that goes on is stopped."},
		{name: "schedule:history", aliases: []string{"schedules:history"}, group: "Schedules", args: "[SCHEDULE]", max: 1, app: true, run: runScheduleHistory, completes: "schedule",
			short: "Show what has run, was left out or failed, newest first",
			flags: []flag{{"number", "n", "N", "how many"}, {"output", "o", "", "with the end of what each run printed"}}},
	}
}

// what a schedule does, as it was typed.
func scheduleDoes(s *m3ov1.Schedule) string {
	words := []string{s.GetAction()}
	for _, a := range s.GetArgs() {
		words = append(words, quote(plain(a)))
	}
	if s.GetIfOutdated() {
		words = append(words, "--if-outdated")
	}
	return strings.Join(words, " ")
}

func runSchedules(ctx context.Context, c *call) error {
	app, cl, err := c.withApp(ctx)
	if err != nil {
		return err
	}
	res, err := ask(ctx, cl.schedules.List, &m3ov1.ListSchedulesRequest{App: app})
	if err != nil {
		return err
	}
	return c.result(res, func() {
		if len(res.GetSchedules()) == 0 {
			c.say("%s has no schedules", app)
			c.hint("m3o schedule:add --cron \"0 4 * * *\" rebuild --if-outdated -a %s", app)
			return
		}
		var rows [][]string
		for _, s := range res.GetSchedules() {
			next := c.when(s.GetNext())
			if s.GetPaused() {
				next = c.status("paused")
			}
			last := "never"
			if l := s.GetLast(); l != nil {
				last = c.status(plain(l.GetStatus())) + " " + c.when(l.GetStarted())
			}
			rows = append(rows, []string{plain(s.GetName()), plain(s.GetCron()), plain(s.GetTimezone()), next, last, scheduleDoes(s)})
		}
		c.table([]string{"SCHEDULE", "CRON", "ZONE", "NEXT", "LAST", "DOES"}, rows)
	})
}

func runScheduleAdd(ctx context.Context, c *call) error {
	s := &m3ov1.Schedule{Name: c.value("name"), Cron: c.value("cron"), Timezone: c.value("timezone"), Action: c.args[0], Args: c.args[1:],
		IfOutdated: c.has("if-outdated"), Overlap: c.value("overlap"), Missed: c.value("missed")}
	if !slices.Contains([]string{"rebuild", "run", "call"}, s.Action) {
		return misuse(quoted(s.Action)+" is nothing a schedule does", "it is rebuild, run or call; m3o help schedule:add")
	}
	if s.Cron == "" {
		return misuse("when? --cron is missing", "m3o schedule:add --cron \"0 4 * * *\" "+strings.Join(c.args, " "))
	}
	if c.has("jitter") {
		d, err := time.ParseDuration(c.value("jitter"))
		if err != nil || d < 0 || d > 24*time.Hour {
			return misuse("--jitter takes a time such as 90s or 5m, not "+quoted(c.value("jitter")), "")
		}
		s.JitterSeconds = int32(d / time.Second)
	}
	app, cl, err := c.withApp(ctx)
	if err != nil {
		return err
	}
	res, err := ask(ctx, cl.schedules.Add, &m3ov1.AddScheduleRequest{App: app, Schedule: s})
	if err != nil {
		return err
	}
	added := res.GetSchedule()
	if err := c.result(res, func() {
		c.print("%s\n", plain(added.GetName()))
		c.say("runs next %s (%s): %s", c.when(added.GetNext()), plain(added.GetTimezone()), scheduleDoes(added))
	}); err != nil {
		return err
	}
	c.undo("m3o schedule:remove %s -a %s", plain(added.GetName()), app)
	return nil
}

func runScheduleRun(ctx context.Context, c *call) error {
	app, cl, err := c.withApp(ctx)
	if err != nil {
		return err
	}
	name := c.args[0]
	newest := func() (*m3ov1.ScheduleRun, error) {
		res, err := ask(ctx, cl.schedules.History, &m3ov1.ScheduleHistoryRequest{App: app, Schedule: name, Limit: 1})
		if err != nil || len(res.GetEntries()) == 0 {
			return nil, err
		}
		return res.GetEntries()[0].GetRun(), nil
	}
	before, err := newest()
	if err != nil {
		return err
	}
	started, err := ask(ctx, cl.schedules.Run, &m3ov1.RunScheduleRequest{App: app, Schedule: name})
	if err != nil {
		return err
	}
	if c.has("detach") {
		return c.result(started, func() { c.say("started %s; m3o schedule:history %s -a %s shows what comes of it", name, name, app) })
	}
	c.say("running %s …", name)
	for {
		r, err := newest()
		if err != nil {
			return err
		}
		if r.GetNumber() > before.GetNumber() && r.GetStatus() != "running" {
			return c.scheduleEnded(r)
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(300 * time.Millisecond):
		}
	}
}

// scheduleEnded shows how a run that was waited for went.
func (c *call) scheduleEnded(r *m3ov1.ScheduleRun) error {
	if err := c.result(r, func() {
		for l := range strings.Lines(r.GetOutput()) {
			c.print("%s\n", c.text(strings.TrimRight(l, "\n")))
		}
	}); err != nil {
		return err
	}
	if r.GetStatus() != "ok" {
		return fail(fmt.Sprintf("%s: %s", plain(r.GetStatus()), plain(r.GetDetail())), "")
	}
	c.say("%s", plain(r.GetDetail()))
	return nil
}

func runSchedulePause(ctx context.Context, c *call) error {
	app, cl, err := c.withApp(ctx)
	if err != nil {
		return err
	}
	res, err := ask(ctx, cl.schedules.Pause, &m3ov1.PauseScheduleRequest{App: app, Schedule: c.args[0]})
	if err != nil {
		return err
	}
	if err := c.result(res, func() { c.say("paused %s", c.args[0]) }); err != nil {
		return err
	}
	c.undo("m3o schedule:resume %s -a %s", c.args[0], app)
	return nil
}

func runScheduleResume(ctx context.Context, c *call) error {
	app, cl, err := c.withApp(ctx)
	if err != nil {
		return err
	}
	res, err := ask(ctx, cl.schedules.Resume, &m3ov1.ResumeScheduleRequest{App: app, Schedule: c.args[0]})
	if err != nil {
		return err
	}
	return c.result(res, func() { c.say("%s runs next %s", c.args[0], c.when(res.GetSchedule().GetNext())) })
}

func runScheduleRemove(ctx context.Context, c *call) error {
	app, cl, err := c.withApp(ctx)
	if err != nil {
		return err
	}
	res, err := ask(ctx, cl.schedules.Remove, &m3ov1.RemoveScheduleRequest{App: app, Schedule: c.args[0]})
	if err != nil {
		return err
	}
	return c.result(res, func() { c.say("removed %s", c.args[0]) })
}

func runScheduleHistory(ctx context.Context, c *call) error {
	limit, err := c.number("number", 0, 1, 1000)
	if err != nil {
		return err
	}
	app, cl, err := c.withApp(ctx)
	if err != nil {
		return err
	}
	req := &m3ov1.ScheduleHistoryRequest{App: app, Limit: int32(limit)}
	if len(c.args) > 0 {
		req.Schedule = c.args[0]
	}
	res, err := ask(ctx, cl.schedules.History, req)
	if err != nil {
		return err
	}
	return c.result(res, func() {
		if len(res.GetEntries()) == 0 {
			c.say("nothing has run yet")
			c.hint("m3o schedules -a %s lists when it will", app)
			return
		}
		var rows [][]string
		for _, e := range res.GetEntries() {
			r := e.GetRun()
			what := plain(r.GetDetail())
			switch {
			case r.GetBy() != "":
				what = strings.TrimPrefix(what+"; by "+plain(r.GetBy()), "; ")
			case r.GetLate():
				what = strings.TrimPrefix(what+"; made up for a downtime", "; ")
			}
			if n := r.GetMissed(); n > 0 {
				what += fmt.Sprintf("; %d missed before", n)
			}
			took := ""
			if r.GetEnded().IsValid() {
				took = r.GetEnded().AsTime().Sub(r.GetStarted().AsTime()).Round(100 * time.Millisecond).String()
			}
			if c.has("output") {
				c.print("%s\n", c.paint(bold, fmt.Sprintf("%s #%d %s %s %s", plain(e.GetSchedule()), r.GetNumber(), plain(r.GetStatus()), c.when(r.GetStarted()), what)))
				for l := range strings.Lines(r.GetOutput()) {
					c.print("  %s\n", c.text(strings.TrimRight(l, "\n")))
				}
				continue
			}
			rows = append(rows, []string{plain(e.GetSchedule()), strconv.Itoa(int(r.GetNumber())), c.status(plain(r.GetStatus())), c.when(r.GetStarted()), took, what})
		}
		if rows != nil {
			c.table([]string{"SCHEDULE", "RUN", "STATUS", "WHEN", "TOOK", "WHAT"}, rows)
		}
	})
}
