package daemon

import (
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	goruntime "runtime"
	"slices"
	"strings"
	"time"

	"github.com/m3o/m3o"
	"github.com/m3o/m3o/buildpacks"
	"github.com/m3o/m3o/buildpacks/build"
	"github.com/m3o/m3o/buildpacks/source"
	"github.com/m3o/m3o/gitserver"
	"github.com/m3o/m3o/release"
	"github.com/m3o/m3o/runtime"
)

// webProcess is the one process type that gets requests.
const webProcess = "web"

// pushes answers the git server: it is the life of a push from the moment the
// objects are in quarantine until git has moved the ref.
type pushes struct{ d *Daemon }

var _ gitserver.Apps = pushes{}

// Deploy builds src and makes it live, unless the push asks for no deploy.
func (p pushes) Deploy(ctx context.Context, src m3o.Source, w io.Writer) (gitserver.Deployment, error) {
	why, err := p.d.notWanted(ctx, src)
	if err != nil {
		return nil, err
	}
	if why != "" {
		return skipped{why}, nil
	}
	live, err := p.d.deploy(ctx, src, w)
	if err != nil {
		return nil, err // not a nil *deployment in an interface
	}
	return live, nil
}

// deploy builds src and makes it live. What it returns is live already and
// holds the app's lane: Done keeps it or takes it back.
func (d *Daemon) deploy(ctx context.Context, src m3o.Source, w io.Writer) (*deployment, error) {
	began := time.Now()
	out := output{w}
	if slices.Contains(src.Options, "preview") {
		var err error
		if src, err = d.repos.pushPreview(ctx, src); err != nil {
			return nil, err
		}
	}
	ctx, turn, err := d.lanes.lane(src.App).enter(ctx, func() {
		out.step("Waiting for the push before this one to end")
	})
	if err != nil {
		return nil, cancelled(err)
	}
	live, err := d.push(ctx, turn, src, w, began)
	if err != nil {
		if cause := context.Cause(ctx); cause != nil {
			err = cancelled(cause)
		}
		turn.leave()
		d.repos.noteFailed(ctx, src.App, err)
		return nil, err
	}
	return live, nil
}

// cancelled turns the end of a push's context into what the pusher reads.
func cancelled(cause error) error {
	if errors.Is(cause, context.Canceled) {
		return &m3o.Error{Kind: m3o.Conflict, Msg: "cancelled; nothing was changed", Err: cause}
	}
	if errors.Is(cause, context.DeadlineExceeded) {
		return &m3o.Error{Kind: m3o.Unavailable, Msg: "timed out; nothing was changed", Err: cause}
	}
	return cause
}

// push runs the deploy of one push up to the switch.
func (d *Daemon) push(ctx context.Context, turn *turn, src m3o.Source, w io.Writer, began time.Time) (*deployment, error) {
	// The lane was waited for: the branch may have moved since git looked.
	if err := checkTip(ctx, src); err != nil {
		return nil, err
	}
	var tree *source.Tree // nil for an image
	subject := imageSubject(src.Image)
	if src.Image == "" {
		var err error
		if src.Tree == "" {
			if src, err = d.repos.prepare(ctx, src, output{w}.step); err != nil {
				return nil, err
			}
		}
		if tree, err = source.Open(ctx, src, &d.trees); err != nil {
			return nil, err
		}
		defer tree.Close() //nolint:errcheck // only read
		subject = tree.Subject()
	}
	bld, err := d.ledger.StartBuild(ctx, m3o.Build{App: src.App, Status: m3o.BuildRunning, Commit: src.Commit,
		Message: subject, User: src.User, Started: time.Now().UTC()})
	if err != nil {
		return nil, err
	}
	dep, err := d.begin(ctx, release.Deploy{App: src.App, Source: src, Reason: src.Via, User: src.User, Build: bld.Number})
	if err != nil {
		return nil, d.endBuild(ctx, bld, err)
	}
	d.forgetBuilds(ctx, src.App)
	logFile, err := d.openBuildLog(src.App, bld.Number)
	if err != nil {
		return nil, d.failDeploy(ctx, dep.ID, d.endBuild(ctx, bld, err))
	}
	d.traces.receive(dep.ID, began)
	d.deployHappened(ctx, deployStarted, dep, m3o.Release{})
	both := &tee{pusher: w, log: io.MultiWriter(logFile, d.logs.lines(src.App, sourceBuild))}
	fail := func(err error) (*deployment, error) {
		if cause := context.Cause(ctx); cause != nil {
			err = cancelled(cause)
		}
		output{both.logged()}.fail(err) // the pusher gets it from the git server, as its last line
		_ = logFile.Close()
		return nil, d.failDeploy(ctx, dep.ID, err)
	}
	if dep, err = d.advance(ctx, dep.ID, release.Build, nil); err != nil {
		return fail(d.endBuild(ctx, bld, err))
	}
	// Until the ledger names it, nothing but this lock keeps the image.
	d.imagesMu.RLock()
	defer d.imagesMu.RUnlock()
	plan, api, res, err := d.build(ctx, src, tree, both)
	bld.Image, bld.Toolchain, bld.Base, bld.Size, bld.Steps = res.Image, res.Toolchain, res.Base, res.Size, res.Steps
	if plan != nil {
		bld.Builder = plan.Builder
	}
	if err != nil {
		return fail(d.endBuild(ctx, bld, err))
	}
	if err := d.document(ctx, src, bld.Number, bld.Started, plan, res); err != nil {
		return fail(d.endBuild(ctx, bld, err))
	}
	if plan.Files.Manifest.Build.Advisories {
		d.reportAdvisories(ctx, res.Image, output{both})
	}
	if err := d.endBuild(ctx, bld, nil); err != nil {
		return fail(err)
	}
	unlock, err := d.lanes.lock(ctx, src.App)
	if err != nil {
		return fail(err)
	}
	rev, err := d.config.Current(ctx, src.App)
	if err != nil {
		unlock()
		return fail(err)
	}
	rel := m3o.Release{App: src.App, Image: res.Image, Config: rev.Number, Processes: plan.Processes, Command: plan.Release, Health: plan.Health, HTTP: plan.Files.Manifest.HTTP,
		Sleep: plan.Files.Manifest.Run.Sleep.After, AutoRevert: plan.Files.Manifest.Run.Rollback == "auto",
		Commit: src.Commit, Message: subject, Reason: src.Via, User: src.User, Build: bld.Number}
	if rel.Schedules, err = declaredSchedules(plan.Files); err != nil {
		unlock()
		return fail(err)
	}
	inImage(plan, rel.Schedules)
	api.describe(&rel)
	end := func() {
		_ = logFile.Close()
		unlock()
		turn.leave()
	}
	app, err := d.ledger.App(ctx, src.App)
	if err == nil && !app.Lock.At.IsZero() {
		if err = turn.commit(ctx); err == nil {
			return &deployment{d: d, dep: dep, rel: rel, began: began, built: res.Took, log: both.logged(), end: end, lock: app.Lock}, nil
		}
	}
	if err != nil {
		unlock()
		return fail(err)
	}
	live, err := d.release(ctx, dep, rel, turn.commit, output{both})
	if err != nil {
		unlock()
		return fail(err)
	}
	live.built, live.began, live.end, live.log = res.Took, began, end, both.logged()
	return live, nil
}

// checkTip refuses a source whose branch is not what it was when it came.
func checkTip(ctx context.Context, src m3o.Source) error {
	if src.Ref == "" {
		return nil
	}
	tip, err := gitserver.Tip(ctx, src.Repo, src.Ref)
	if err != nil {
		return fmt.Errorf("read %s: %w", src.Ref, err)
	}
	if tip != src.Old {
		return &m3o.Error{Kind: m3o.Conflict, Msg: "the branch moved while this push waited", Hint: "run git fetch m3o, then push again"}
	}
	return nil
}

// build plans from the tree and builds the image. With an error it returns how
// far it came.
func (d *Daemon) build(ctx context.Context, src m3o.Source, tree *source.Tree, w io.Writer) (*buildpacks.Plan, interfaces, build.Result, error) {
	if src.Image != "" {
		plan, res, err := d.takeImage(ctx, src, w)
		return plan, interfaces{}, res, err
	}
	// The builder's own limit begins with its turn: waiting for one is no fault of the build.
	pctx, cancel := context.WithTimeoutCause(ctx, d.cfg.BuildTimeout, &m3o.Error{Kind: m3o.Invalid,
		Msg: fmt.Sprintf("the build was ended: reading the source took longer than %s", d.cfg.BuildTimeout), Hint: "make it smaller, or raise m3od --build-timeout"})
	defer cancel()
	plan, err := d.plan(pctx, tree)
	var api interfaces
	if err == nil {
		api, err = d.compile(pctx, src, tree, plan, output{w})
	}
	if err != nil {
		if cause := context.Cause(pctx); cause != nil {
			err = cause
		}
		return plan, api, build.Result{}, err
	}
	if err := d.askedEnv(ctx, src.App, src.User, plan); err != nil {
		return plan, api, build.Result{}, err
	}
	secrets, err := d.buildSecrets(ctx, src.App, plan)
	if err != nil {
		return plan, api, build.Result{}, err
	}
	logins, err := d.registries(ctx, src.App)
	if err != nil {
		return plan, api, build.Result{}, err
	}
	res, err := d.builder.Build(ctx, build.Request{App: src.App, User: src.User, Plan: plan, Tree: tree, Out: w, Commit: src.Commit, Time: tree.Time(), Secrets: secrets, Registries: logins,
		Generate: api.generate, NoCache: slices.Contains(src.Options, "force-rebuild")})
	if err == nil {
		err = d.attach(ctx, res.Image, api)
	}
	if err != nil {
		if cause := context.Cause(ctx); cause != nil {
			err = cause
		}
		return plan, api, res, err
	}
	exposed(plan, res.Port)
	return plan, api, res, nil
}

// exposed gives the web process the port its image says it listens on.
func exposed(plan *buildpacks.Plan, port int) {
	if web, ok := plan.Processes[webProcess]; ok && port != 0 {
		web.Port = port
		plan.Processes[webProcess] = web
	}
}

// takeImage is build for a source that is an image: one that was uploaded, or
// one of a registry.
func (d *Daemon) takeImage(ctx context.Context, src m3o.Source, w io.Writer) (*buildpacks.Plan, build.Result, error) {
	if strings.HasPrefix(src.Image, "sha256:") {
		d.uploads.mu.Lock()
		up, ok := d.uploads.images[src.App+" "+src.Image]
		d.uploads.mu.Unlock()
		if !ok {
			return nil, build.Result{}, &m3o.Error{Kind: m3o.NotFound, Msg: "the uploaded image is not here any more", Hint: "run m3o deploy --image FILE again"}
		}
		output{w}.step("Image %s", src.Image)
		plan := &buildpacks.Plan{Builder: "image", Processes: build.ImageProcesses()}
		exposed(plan, up.res.Port)
		return plan, up.res, nil
	}
	tree, plan, err := build.FromImage(src.Image)
	if err != nil {
		return nil, build.Result{}, err
	}
	logins, err := d.registries(ctx, src.App)
	if err != nil {
		return nil, build.Result{}, err
	}
	res, err := d.builder.Build(ctx, build.Request{App: src.App, User: src.User, Plan: plan, Tree: tree, Out: w, NoCache: true, Registries: logins})
	if err != nil {
		return nil, res, err
	}
	exposed(plan, res.Port)
	plan.Builder = "image"
	return plan, res, nil
}

// A deployment is a release that the router already leads to, whose deploy is
// not final: the ref has not moved yet. That of a locked app is only built.
type deployment struct {
	d        *Daemon
	dep      release.Deploy
	rel      m3o.Release
	previous int // the release that was live before, 0 for none
	began    time.Time
	built    time.Duration
	started  time.Duration
	log      io.Writer
	end      func()   // gives back locks and files
	lock     m3o.Lock // of the app; the zero Lock where it is not locked
}

// Done ends the deploy: moved, the release stays and the one before it
// drains; not moved, the switch is taken back, so that the branch and the
// live release never disagree.
func (l *deployment) Done(ctx context.Context, moved bool, w io.Writer) error {
	defer l.end()
	// The pusher may be gone; what is half-done is finished all the same.
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), time.Minute)
	defer cancel()
	if moved && !l.lock.At.IsZero() {
		return l.hold(ctx, w)
	}
	if !moved {
		err := &m3o.Error{Kind: m3o.Conflict, Msg: "git did not move the branch, so the release was taken back"}
		if l.lock.At.IsZero() {
			l.d.takeBack(ctx, l.rel, l.previous)
		}
		output{&tee{pusher: w, log: l.log}}.fail(err)
		return l.d.failDeploy(ctx, l.dep.ID, err)
	}
	dep, err := l.d.advance(ctx, l.dep.ID, release.Confirm, nil)
	if err != nil {
		return err
	}
	l.d.log.Info("released", "app", l.rel.App, "release", l.rel.Version, "user", l.rel.User, "took", time.Since(l.began).Round(time.Millisecond))
	out := output{&tee{pusher: w, log: l.log}}
	took := fmt.Sprintf("start %s", seconds(l.started))
	if l.built > 0 {
		took = fmt.Sprintf("build %s, %s", seconds(l.built), took)
	}
	out.line("Released %s in %s (%s)", l.rel.Name(), seconds(time.Since(l.began)), took)
	if _, ok := l.rel.Processes[webProcess]; ok {
		out.line("%s", l.d.url(l.rel.App))
		out.line("%s", l.d.accessLine(l.rel.App))
	}
	l.d.repos.noteLive(ctx, l.rel)
	if err := l.d.dropCanary(ctx, l.rel.App); err != nil {
		l.d.log.Error("end canary", "app", l.rel.App, "err", err)
	}
	l.d.deployHappened(ctx, l.d.liveKind(ctx, dep), dep, l.rel)
	if err := l.d.schedules.follow(ctx, l.rel); err != nil {
		l.d.log.Error("follow the release's schedules", "app", l.rel.App, "err", err)
	}
	l.d.tellKept(ctx, l.rel.App)
	l.d.settled(ctx, l.rel, l.previous)
	l.d.retire(l.rel.App, l.previous)
	return nil
}

// tellKept gives the releases that a rollback offers hosts of their own.
func (d *Daemon) tellKept(ctx context.Context, app string) {
	kept, err := d.ledger.Kept(ctx, app)
	if err != nil {
		d.log.Error("list kept releases", "app", app, "err", err)
		return
	}
	versions := make([]int, len(kept))
	for i, rel := range kept {
		versions[i] = rel.Version
		if t, ok := d.knownTraits(rel); ok {
			d.routes.setTraits(app, rel.Version, t)
		}
	}
	d.routes.setKept(app, versions)
}

// begin persists a new deploy as queued.
func (d *Daemon) begin(ctx context.Context, dep release.Deploy) (release.Deploy, error) {
	dep, err := d.ledger.BeginDeploy(ctx, dep)
	if err == nil && d.onStep != nil {
		d.onStep(dep.App, dep.Status)
	}
	return dep, err
}

// advance persists a deploy's next step before that step is done.
func (d *Daemon) advance(ctx context.Context, id string, e release.Event, change func(*release.Deploy)) (release.Deploy, error) {
	dep, err := d.ledger.Advance(ctx, id, e, change)
	if err == nil && d.onStep != nil {
		d.onStep(dep.App, dep.Status)
	}
	if err == nil {
		d.traces.end(dep)
		d.tellDeploy(dep)
	}
	return dep, err
}

// release appends rel to the ledger, starts it beside the live one, waits
// until it is healthy and switches the router to it. The caller holds the
// app's release lock. final is asked right before the switch whether the
// deploy may still go on. On an error nothing of rel runs any more.
func (d *Daemon) release(ctx context.Context, dep release.Deploy, rel m3o.Release, final func(context.Context) error, out output) (*deployment, error) {
	previous := 0
	if old, err := d.ledger.Live(ctx, rel.App); err == nil {
		previous = old.Version
	} else if m3o.KindOf(err) != m3o.NotFound {
		return nil, err
	}
	rel.Created = time.Now().UTC()
	rel, err := d.ledger.AppendRelease(ctx, rel)
	if err != nil {
		return nil, err
	}
	out.step("Releasing %s", rel.Name())
	numbered := func(p *release.Deploy) { p.Release, p.Previous = rel.Version, previous }
	if len(rel.Command) > 0 {
		if dep, err = d.advance(ctx, dep.ID, release.Command, numbered); err != nil {
			return nil, err
		}
		if err := d.releaseCommand(ctx, rel, out); err != nil {
			return nil, err
		}
	}
	if dep, err = d.advance(ctx, dep.ID, release.Start, numbered); err != nil {
		return nil, err
	}
	began := time.Now()
	if err := d.makeWay(ctx, rel, previous, out); err != nil {
		return nil, err
	}
	ready, err := d.start(ctx, rel, out)
	if err != nil {
		d.discard(ctx, rel)
		d.giveBack(ctx, rel.App, previous)
		return nil, err
	}
	started := time.Since(began)
	if err := final(ctx); err != nil {
		d.discard(ctx, rel)
		d.giveBack(ctx, rel.App, previous)
		return nil, err
	}
	// From here on nobody interrupts: a switch is finished or taken back.
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), 30*time.Second)
	defer cancel()
	if dep, err = d.advance(ctx, dep.ID, release.Switch, nil); err != nil {
		d.discard(ctx, rel)
		d.giveBack(ctx, rel.App, previous)
		return nil, err
	}
	if err := d.routes.point(ctx, rel.App, rel.Version, ready); err != nil {
		d.takeBack(ctx, rel, previous)
		return nil, err
	}
	return &deployment{d: d, dep: dep, rel: rel, previous: previous, began: began, started: started, end: func() {}}, nil
}

// start launches every process type of rel and waits until all are ready.
func (d *Daemon) start(ctx context.Context, rel m3o.Release, out output) ([]m3o.Instance, error) {
	rel, err := d.formed(ctx, rel, true)
	if err != nil {
		return nil, err
	}
	names := slices.Sorted(maps.Keys(rel.Processes))
	for _, name := range names {
		if err := d.launch(ctx, rel, name); err != nil {
			return nil, fmt.Errorf("start %s: %w", name, err)
		}
	}
	d.traces.start(rel.App, rel.Version)
	var ready []m3o.Instance
	for _, name := range names {
		n := replicas(rel.Processes[name])
		if n == 0 {
			continue
		}
		began := time.Now()
		out.step("Starting %s (%d)", name, n)
		for _, doubt := range rel.Processes[name].Limits.Doubts(machineMemory(), goruntime.NumCPU()) {
			out.warn("%s: %s", name, doubt)
		}
		ins, err := runtime.WaitReady(ctx, d.driver, ref(rel, name), n, nil)
		if err != nil {
			return nil, err
		}
		ready = append(ready, ins...)
		how := "running"
		if name == webProcess {
			t, err := d.examine(ctx, rel, ins[0])
			if err != nil {
				return nil, err
			}
			d.routes.setTraits(rel.App, rel.Version, t)
			how = "healthy (" + checkWords(rel.Health, t) + ")"
		}
		out.line("%s %s in %s", name, how, seconds(time.Since(began)))
	}
	return ready, nil
}

func replicas(p m3o.Process) int { return max(p.Replicas, 0) }

func ref(rel m3o.Release, process string) runtime.Ref {
	return runtime.Ref{App: rel.App, Process: process, Release: rel.Version}
}

// launch tells the driver to run one process type of rel.
func (d *Daemon) launch(ctx context.Context, rel m3o.Release, process string) error {
	w, err := d.workload(ctx, rel, process)
	if err != nil {
		return err
	}
	return d.driver.Start(ctx, w, replicas(rel.Processes[process]))
}

// formed is rel as it runs under the app's formation. awake leaves out that
// the app may be asleep.
func (d *Daemon) formed(ctx context.Context, rel m3o.Release, awake bool) (m3o.Release, error) {
	f, err := d.ledger.Formation(ctx, rel.App)
	if err != nil {
		return rel, err
	}
	return f.Over(rel, awake), nil
}

// workload is what the driver needs to run one process type of rel.
func (d *Daemon) workload(ctx context.Context, rel m3o.Release, process string) (runtime.Workload, error) {
	env, err := d.config.Env(ctx, rel.App, rel.Config)
	if err != nil {
		return runtime.Workload{}, err
	}
	f, err := d.ledger.Formation(ctx, rel.App)
	if err != nil {
		return runtime.Workload{}, err
	}
	p := f.Over(rel, true).Processes[process]
	env = append(env, "M3O_APP="+rel.App, "M3O_RELEASE="+rel.Name(), "M3O_URL="+d.url(rel.App), "M3O_API="+d.apiURL())
	h := rel.Health
	if process != webProcess {
		h = m3o.Health{}
	}
	return runtime.Workload{Ref: ref(rel, process), Image: rel.Image, Args: p.Command, Env: env, Port: p.Port, Health: h,
		MemoryBytes: p.Limits.MemoryBytes, CPUMillis: p.Limits.CPUMillis, Pids: p.Limits.Pids, Files: p.Limits.Files, Grace: p.Limits.Grace,
		Revision: f.Processes[process].Revision, Mounts: d.mounts(f, process)}, nil
}

// releaseCommand runs the release command in the new image. Its output is the pusher's.
func (d *Daemon) releaseCommand(ctx context.Context, rel m3o.Release, out output) error {
	out.step("Running release command")
	w, err := d.workload(ctx, rel, "release")
	if err != nil {
		return err
	}
	w.Args, w.Port = rel.Command, 0
	ctx, cancel := context.WithTimeout(ctx, time.Hour)
	defer cancel()
	lines := &indent{w: out.w}
	code, err := d.driver.Run(ctx, w, runtime.Cmd{Args: rel.Command, Out: lines, Err: lines})
	if err != nil {
		return fmt.Errorf("run release command: %w", err)
	}
	if code != 0 {
		return &m3o.Error{Kind: m3o.Invalid, Msg: fmt.Sprintf("the release command exited with %d; %s was not released", code, rel.Name()),
			Hint: "its output is above; the release before it is still live"}
	}
	return nil
}

// endBuild records how a build ended and returns err, or the error of recording.
func (d *Daemon) endBuild(ctx context.Context, b m3o.Build, err error) error {
	b.Finished = time.Now().UTC()
	b.Status = m3o.BuildSucceeded
	if err != nil {
		b.Status, b.Error = m3o.BuildFailed, firstLine(userMessage(err))
		if context.Cause(ctx) != nil {
			b.Status = m3o.BuildCancelled
		}
	}
	wctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), 10*time.Second)
	defer cancel()
	if werr := d.ledger.EndBuild(wctx, b); werr != nil {
		d.log.Error("record end of build", "app", b.App, "build", b.Number, "err", werr)
		if err == nil {
			return werr
		}
	}
	return err
}

// failDeploy records that a deploy failed because of err, and returns err.
func (d *Daemon) failDeploy(ctx context.Context, id string, err error) error {
	wctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), 10*time.Second)
	defer cancel()
	dep, werr := d.advance(wctx, id, release.Fail, func(p *release.Deploy) { p.Error = firstLine(userMessage(err)) })
	if werr != nil {
		d.log.Error("record failed deploy", "err", werr)
		return err
	}
	if failedWorthTelling(err) {
		d.deployHappened(ctx, deployFailed, dep, m3o.Release{})
	}
	d.log.Info("deploy failed", "app", dep.App, "build", dep.Build, "user", dep.User, "err", errors.Join(err, errors.Unwrap(err)))
	return err
}

func firstLine(s string) string {
	l, _, _ := strings.Cut(s, "\n")
	return l
}

// indent sets every line seven spaces in, as a step's own lines are.
type indent struct {
	w   io.Writer
	mid bool // inside a line
}

func (i *indent) Write(p []byte) (int, error) {
	for l := range strings.Lines(string(p)) {
		if !i.mid {
			l = "       " + l
		}
		i.mid = !strings.HasSuffix(l, "\n")
		if _, err := io.WriteString(i.w, l); err != nil {
			return 0, err
		}
	}
	return len(p), nil
}
