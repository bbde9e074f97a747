package main

import (
	"context"
	"fmt"
	"regexp"
	"strconv"
	"strings"
	"time"

	"google.golang.org/protobuf/types/known/durationpb"

	m3ov1 "github.com/m3o/m3o/api/m3o/v1"
)

// psCommands are about the instances of an app and how many there are.
func psCommands() []*command {
	return []*command{
		{name: "ps", aliases: []string{"ps:list"}, group: "Running", args: "[APP]", max: 1, app: true, appArg: true, run: runPs, completes: "app",
			short: "List the instances of an app: how they are, what they use",
			long: `CPU is in percent of one core, over the last seconds. An instance that exited again and again is "crashing"; why, when it is
started again and the last lines it logged stand below the list.`},
		{name: "ps:scale", aliases: []string{"scale"}, group: "Running", args: "[TYPE=N[:MEMORY]…]", max: -1, app: true, run: runScale,
			short: "Set how many instances each process type has, or show it",
			long: `The numbers belong to the app, not to a release: a push, a config change and a rollback keep them. Instances that go get no new
requests and end when theirs are answered. A number for which a volume or autoscaling leaves no room is refused.`,
			example: "m3o ps:scale\nm3o ps:scale web=3 worker=1\nm3o scale web=2:512MB"},
		{name: "ps:limits", group: "Running", args: "TYPE", min: 1, max: 1, app: true, run: runLimits,
			short:   "Set what an instance of a process type may use",
			long:    "The instances are replaced, a few at a time; if the new ones do not become healthy, the old limits stay. GOMEMLIMIT and GOMAXPROCS follow the limits unless the app's config sets them.",
			example: "m3o ps:limits web --memory 512MB --cpu 0.5",
			flags: []flag{
				{"memory", "", "SIZE", "memory, such as 512MB or 2GB"}, {"cpu", "", "CORES", "CPU in cores, such as 0.5"},
				{"pids", "", "N", "processes and threads"}, {"files", "", "N", "open files"},
				{"grace", "", "TIME", "from SIGTERM to SIGKILL, such as 30s"},
			}},
		{name: "ps:restart", aliases: []string{"restart"}, group: "Running", args: "[TYPE]", max: 1, app: true, run: runRestart,
			short: "Replace the instances, a few at a time, without losing a request",
			long:  "A new instance is ready before an old one goes. If the new ones do not become healthy, the old ones stay and the command fails."},
		{name: "ps:stop", group: "Running", args: "[TYPE]", max: 1, app: true, run: runStop,
			short: "Stop the instances of a process type, or all, until ps:start", long: "How many there were is remembered. Without web instances the app's URL answers 503."},
		{name: "ps:start", group: "Running", args: "[TYPE]", max: 1, app: true, run: runStart, short: "Start again what ps:stop stopped"},
		{name: "ps:autoscale", group: "Running", args: "[TYPE]", max: 1, app: true, run: runAutoscale,
			short: "Let the number of instances follow the load",
			long: `TYPE is web unless it is named. With --concurrency there are as many instances as it takes for each to have so many requests in
flight, with --cpu as many as it takes for each to use so many percent of its CPU limit (of one core without one); with both, the
larger number. It goes up within seconds, and down after three quiet minutes.`,
			example: "m3o ps:autoscale web --min 1 --max 5 --concurrency 50\nm3o ps:autoscale worker --max 3 --cpu 70\nm3o ps:autoscale web --off",
			flags: []flag{{"min", "", "N", "the fewest (default 1)"}, {"max", "", "N", "the most"}, {"concurrency", "", "N", "requests in flight an instance"},
				{"cpu", "", "PERCENT", "CPU an instance"}, {"off", "", "", "keep the number there is now"}}},
		{name: "ps:sleep", group: "Running", app: true, run: runSleep,
			short: "Stop the app while nobody uses it; the next request starts it",
			long: `After so long without a request all process types of the app are stopped, workers too. The first request then waits until the app
has started, as do those that come meanwhile. m3o.yaml can say the same: sleep: {after: 10m}.`,
			example: "m3o ps:sleep --after 10m\nm3o ps:sleep --never",
			flags:   []flag{{"after", "", "TIME", "the idle time, such as 10m"}, {"never", "", "", "never stop it, whatever m3o.yaml says"}}},
	}
}

func runPs(ctx context.Context, c *call) error {
	app, cl, err := c.withApp(ctx)
	if err != nil {
		return err
	}
	res, err := ask(ctx, cl.processes.List, &m3ov1.ListInstancesRequest{App: app})
	if err != nil {
		return err
	}
	return c.result(res, func() {
		if len(res.GetInstances()) == 0 {
			if res.GetAsleep() {
				c.say("%s is asleep; the next request wakes it", app)
				return
			}
			c.say("%s has no instances", app)
			c.hint("m3o info -a %s", app)
			return
		}
		var rows [][]string
		for _, i := range res.GetInstances() {
			phase := c.status(plain(i.GetPhase()))
			switch {
			case i.GetOom():
				phase += " (out of memory)"
			case i.GetPhase() == "exited":
				phase += " (" + strconv.Itoa(int(i.GetExit())) + ")"
			}
			cpu, mem := "", ""
			if i.GetMemoryBytes() > 0 {
				cpu = fmt.Sprintf("%.0f%%", i.GetCpu())
				mem = fmt.Sprintf("%s/%s", size(i.GetMemoryBytes()), size(i.GetMemoryLimit()))
			}
			rows = append(rows, []string{plain(i.GetProcess()), plain(i.GetId()), plain(i.GetRelease()), phase, cpu, mem,
				strconv.Itoa(int(i.GetRestarts())), c.when(i.GetSince())})
		}
		c.table([]string{"PROCESS", "INSTANCE", "RELEASE", "PHASE", "CPU", "MEMORY", "RESTARTS", "SINCE"}, rows)
		for _, i := range res.GetInstances() {
			if i.GetWhy() == "" {
				continue
			}
			c.print("\n%s: %s\n", plain(i.GetId()), plain(i.GetWhy()))
			for _, l := range i.GetLastLines() {
				c.print("  %s\n", plain(l))
			}
		}
	})
}

// size is a number of bytes as people read it.
func size(n int64) string {
	switch {
	case n >= 10<<30:
		return fmt.Sprintf("%d GB", n>>30)
	case n >= 1<<30:
		return strings.TrimSuffix(fmt.Sprintf("%.1f", float64(n)/(1<<30)), ".0") + " GB"
	case n >= 10<<20:
		return fmt.Sprintf("%d MB", n>>20)
	}
	return strings.TrimSuffix(fmt.Sprintf("%.1f", float64(n)/(1<<20)), ".0") + " MB"
}

var sizeForm = regexp.MustCompile(`^([0-9]{1,6})(MB|GB|M|G)$`)

// parseSize reads 512MB or 2GB.
func parseSize(s string) (int64, error) {
	m := sizeForm.FindStringSubmatch(strings.ToUpper(s))
	if m == nil {
		return 0, misuse(quoted(s)+" is no size", "such as 512MB or 2GB")
	}
	n, _ := strconv.ParseInt(m[1], 10, 64)
	if m[2][0] == 'G' {
		n <<= 10
	}
	return n << 20, nil
}

// parseScale reads web=3 or web=3:512MB.
func parseScale(arg string) (*m3ov1.ScaleChange, error) {
	bad := misuse(quoted(arg)+" is not TYPE=NUMBER", "m3o ps:scale web=3 worker=1")
	name, rest, ok := strings.Cut(arg, "=")
	if !ok || name == "" {
		return nil, bad
	}
	count, mem, limited := strings.Cut(rest, ":")
	n, err := strconv.ParseUint(count, 10, 16)
	if err != nil {
		return nil, bad
	}
	replicas := int32(n)
	ch := &m3ov1.ScaleChange{Process: name, Replicas: &replicas}
	if limited {
		b, err := parseSize(mem)
		if err != nil {
			return nil, err
		}
		ch.Limits = &m3ov1.Limits{MemoryBytes: b}
	}
	return ch, nil
}

func runScale(ctx context.Context, c *call) error {
	var changes []*m3ov1.ScaleChange
	for _, a := range c.args {
		ch, err := parseScale(a)
		if err != nil {
			return err
		}
		changes = append(changes, ch)
	}
	app, cl, err := c.withApp(ctx)
	if err != nil {
		return err
	}
	before, err := ask(ctx, cl.scale.Get, &m3ov1.GetScaleRequest{App: app})
	if err != nil {
		return err
	}
	if len(changes) == 0 {
		return c.result(before, func() { c.showScale(before.GetScale()) })
	}
	res, err := ask(ctx, cl.scale.Set, &m3ov1.SetScaleRequest{App: app, Changes: changes})
	if err != nil {
		return err
	}
	if err := c.scaled(res); err != nil {
		return err
	}
	var undo []string
	for _, ch := range changes {
		for _, p := range before.GetScale().GetProcesses() {
			if p.GetProcess() == ch.GetProcess() && p.GetReplicas() != ch.GetReplicas() {
				undo = append(undo, fmt.Sprintf("%s=%d", p.GetProcess(), p.GetReplicas()))
			}
		}
	}
	if len(undo) > 0 {
		c.undo("m3o ps:scale %s -a %s", strings.Join(undo, " "), app)
	}
	return nil
}

func (c *call) showScale(s *m3ov1.AppScale) {
	if len(s.GetProcesses()) == 0 {
		c.say("%s has no release yet", s.GetApp())
		c.hint("git push m3o main")
		return
	}
	var rows [][]string
	for _, p := range s.GetProcesses() {
		l := p.GetLimits()
		cpu := "no limit"
		if l.GetCpuMillis() > 0 {
			cpu = strconv.FormatFloat(float64(l.GetCpuMillis())/1000, 'g', -1, 64)
		}
		count := fmt.Sprintf("%d/%d", p.GetReady(), p.GetReplicas())
		if p.GetStopped() {
			count = "stopped"
		}
		auto := "off"
		if a := p.GetAutoscaling(); a != nil {
			auto = fmt.Sprintf("%d to %d", a.GetMin(), a.GetMax())
			if a.GetConcurrency() > 0 {
				auto += fmt.Sprintf(", %d in flight", a.GetConcurrency())
			}
			if a.GetCpu() > 0 {
				auto += fmt.Sprintf(", %d%% CPU", a.GetCpu())
			}
		}
		rows = append(rows, []string{plain(p.GetProcess()), count, size(l.GetMemoryBytes()), cpu, auto, plain(strings.Join(p.GetCommand(), " "))})
	}
	c.table([]string{"PROCESS", "READY", "MEMORY", "CPU", "AUTOSCALE", "COMMAND"}, rows)
	switch {
	case s.GetAsleep():
		c.print("asleep; the next request wakes it\n")
	case s.GetSleep() != nil:
		c.print("sleeps after %v without a request\n", s.GetSleep().AsDuration())
	}
}

func runLimits(ctx context.Context, c *call) error {
	l := &m3ov1.Limits{}
	var err error
	if c.has("memory") {
		if l.MemoryBytes, err = parseSize(c.value("memory")); err != nil {
			return err
		}
	}
	if c.has("cpu") {
		cores, err := strconv.ParseFloat(c.value("cpu"), 64)
		if err != nil || !(cores >= 0.01 && cores <= 1024) {
			return misuse("--cpu takes a number of cores from 0.01 to 1024, not "+quoted(c.value("cpu")), "")
		}
		l.CpuMillis = int64(cores*1000 + 0.5)
	}
	for name, field := range map[string]*int64{"pids": &l.Pids, "files": &l.Files} {
		n, err := c.number(name, 0, 16, 1<<20)
		if err != nil {
			return err
		}
		*field = int64(n)
	}
	if c.has("grace") {
		d, err := c.duration("grace", time.Second)
		if err != nil {
			return err
		}
		l.Grace = durationpb.New(d)
	}
	if len(c.set) == 0 || l.MemoryBytes == 0 && l.CpuMillis == 0 && l.Pids == 0 && l.Files == 0 && l.Grace == nil {
		return misuse("which limit", "m3o ps:limits web --memory 512MB --cpu 0.5")
	}
	app, cl, err := c.withApp(ctx)
	if err != nil {
		return err
	}
	res, err := ask(ctx, cl.scale.Set, &m3ov1.SetScaleRequest{App: app, Changes: []*m3ov1.ScaleChange{{Process: c.args[0], Limits: l}}})
	if err != nil {
		return err
	}
	return c.scaled(res)
}

// scaled shows what a change came to, and what of it may be a slip.
func (c *call) scaled(res *m3ov1.SetScaleResponse) error {
	for _, w := range res.GetWarnings() {
		c.say("m3o: warning: %s", plain(w))
	}
	return c.result(res, func() { c.showScale(res.GetScale()) })
}

// duration is the value of a flag, at least low.
func (c *call) duration(flag string, low time.Duration) (time.Duration, error) {
	d, err := time.ParseDuration(c.value(flag))
	if err != nil || d < low {
		return 0, misuse(fmt.Sprintf("--%s takes a time of at least %v, such as 30s or 10m, not %q", flag, low, c.value(flag)), "")
	}
	return d, nil
}

func (c *call) processArg() string {
	if len(c.args) == 0 {
		return ""
	}
	return c.args[0]
}

func runRestart(ctx context.Context, c *call) error {
	app, cl, err := c.withApp(ctx)
	if err != nil {
		return err
	}
	res, err := ask(ctx, cl.scale.Restart, &m3ov1.RestartRequest{App: app, Process: c.processArg()})
	if err != nil {
		return err
	}
	return c.result(res, func() { c.print("restarted %s of %s\n", plain(strings.Join(res.GetProcesses(), ", ")), app) })
}

func runStop(ctx context.Context, c *call) error {
	app, cl, err := c.withApp(ctx)
	if err != nil {
		return err
	}
	res, err := ask(ctx, cl.scale.Stop, &m3ov1.StopRequest{App: app, Process: c.processArg()})
	if err != nil {
		return err
	}
	if err := c.result(res, func() { c.print("stopped %s of %s\n", plain(strings.Join(res.GetProcesses(), ", ")), app) }); err != nil {
		return err
	}
	c.undo("%s", strings.TrimSpace("m3o ps:start "+c.processArg())+" -a "+app)
	return nil
}

func runStart(ctx context.Context, c *call) error {
	app, cl, err := c.withApp(ctx)
	if err != nil {
		return err
	}
	res, err := ask(ctx, cl.scale.Start, &m3ov1.StartRequest{App: app, Process: c.processArg()})
	if err != nil {
		return err
	}
	return c.result(res, func() { c.print("started %s of %s\n", plain(strings.Join(res.GetProcesses(), ", ")), app) })
}

func runAutoscale(ctx context.Context, c *call) error {
	req := &m3ov1.AutoscaleRequest{Process: c.processArg()}
	if !c.has("off") {
		a := &m3ov1.Autoscaling{}
		for name, f := range map[string]struct {
			field *int32
			high  int
		}{"min": {&a.Min, 1000}, "max": {&a.Max, 1000}, "concurrency": {&a.Concurrency, 1 << 20}, "cpu": {&a.Cpu, 100}} {
			n, err := c.number(name, 0, 1, f.high)
			if err != nil {
				return err
			}
			*f.field = int32(n)
		}
		if a.Max == 0 || a.Concurrency == 0 && a.Cpu == 0 {
			return misuse("autoscaling needs --max, and --concurrency or --cpu", "m3o help ps:autoscale")
		}
		req.Autoscaling = a
	}
	app, cl, err := c.withApp(ctx)
	if err != nil {
		return err
	}
	req.App = app
	res, err := ask(ctx, cl.scale.Autoscale, req)
	if err != nil {
		return err
	}
	return c.result(res, func() { c.showScale(res.GetScale()) })
}

func runSleep(ctx context.Context, c *call) error {
	req := &m3ov1.SleepRequest{}
	switch {
	case c.has("after") == c.has("never"):
		return misuse("after how long, or never", "m3o ps:sleep --after 10m")
	case c.has("after"):
		d, err := c.duration("after", time.Second)
		if err != nil {
			return err
		}
		req.After = durationpb.New(d)
	}
	app, cl, err := c.withApp(ctx)
	if err != nil {
		return err
	}
	req.App = app
	res, err := ask(ctx, cl.scale.Sleep, req)
	if err != nil {
		return err
	}
	return c.result(res, func() {
		if req.After == nil {
			c.print("%s never sleeps\n", app)
			return
		}
		c.print("%s sleeps after %v without a request\n", app, req.After.AsDuration())
	})
}
