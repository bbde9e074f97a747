package daemon

import (
	"cmp"
	"context"
	"crypto/rand"
	"fmt"
	"slices"
	"strings"
	"sync"

	"github.com/m3o/m3o"
	"github.com/m3o/m3o/runtime"
)

// A detached run is an instance of a process type of its own that runs once:
// run-x7k2q9. So the driver keeps it over restarts of the daemon, its output
// is in the app's log and m3o ps lists it.
const runPrefix = "run-"

func isRun(process string) bool { return strings.HasPrefix(process, runPrefix) }

// maxRuns bounds the one-off commands of an app at once; each may take as much
// memory as an instance.
const maxRuns = 20

// runs counts the attached one-off commands.
type runs struct {
	mu     sync.Mutex // guards what follows
	byApp  map[string]int
	images map[string]int // they run in, which must not be pruned
	calls  map[string]int // by app: scheduled calls under way, which the router does not see
}

// call counts a scheduled call in, during which its app stays awake; the
// function it returns counts it out.
func (r *runs) call(app string) (end func()) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.calls == nil {
		r.calls = map[string]int{}
	}
	r.calls[app]++
	return func() {
		r.mu.Lock()
		defer r.mu.Unlock()
		if r.calls[app]--; r.calls[app] == 0 {
			delete(r.calls, app)
		}
	}
}

// called reports whether a scheduled call of app is under way.
func (r *runs) called(app string) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.calls[app] > 0
}

// begin counts one in; the function it returns counts it out.
func (r *runs) begin(app, image string, detached int) (end func(), err error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.byApp[app]+detached >= maxRuns {
		return nil, &m3o.Error{Kind: m3o.Conflict, Msg: fmt.Sprintf("%d one-off commands of %s run already", maxRuns, app),
			Hint: "m3o run:list -a " + app + " shows the detached ones; m3o run:stop ends one"}
	}
	if r.byApp == nil {
		r.byApp, r.images = map[string]int{}, map[string]int{}
	}
	r.byApp[app]++
	r.images[image]++
	return func() {
		r.mu.Lock()
		defer r.mu.Unlock()
		if r.byApp[app]--; r.byApp[app] == 0 {
			delete(r.byApp, app)
		}
		if r.images[image]--; r.images[image] == 0 {
			delete(r.images, image)
		}
	}, nil
}

// inUse lists the images that one-off commands run in.
func (r *runs) inUse() []string {
	r.mu.Lock()
	defer r.mu.Unlock()
	var all []string
	for image := range r.images {
		all = append(all, image)
	}
	return all
}

// oneOff is the workload of a one-off command in the live release of app. A
// process type, if given, lends its command, which args follow, and its limits.
func (d *Daemon) oneOff(ctx context.Context, app, process string, args []string, env map[string]string) (runtime.Workload, error) {
	rel, err := d.ledger.Live(ctx, app)
	if m3o.KindOf(err) == m3o.NotFound {
		return runtime.Workload{}, &m3o.Error{Kind: m3o.NotFound, Msg: app + " has no release to run a command in", Hint: "git push m3o main makes one", Err: err}
	} else if err != nil {
		return runtime.Workload{}, err
	}
	if process != "" {
		p, ok := rel.Processes[process]
		if !ok {
			return runtime.Workload{}, noProcess(rel, process)
		}
		args = append(slices.Clone(p.Command), args...)
	} else if len(args) == 0 {
		return runtime.Workload{}, &m3o.Error{Kind: m3o.Invalid, Msg: "there is no command to run", Hint: "m3o run -- COMMAND, or m3o run -p TYPE"}
	}
	w, err := d.workload(ctx, rel, cmp.Or(process, "run"))
	if err != nil {
		return w, err
	}
	for _, kv := range slices.Sorted(func(yield func(string) bool) {
		for k, v := range env {
			if !yield(k + "=" + v) {
				return
			}
		}
	}) {
		if k, _, _ := strings.Cut(kv, "="); k == "" || strings.ContainsRune(kv, 0) {
			return w, m3o.Errorf(m3o.Invalid, "%q is no variable", kv)
		}
		w.Env = append(w.Env, kv)
	}
	w.Args, w.Port, w.Health, w.Process = args, 0, m3o.Health{}, "run"
	return w, nil
}

func noProcess(rel m3o.Release, process string) error {
	var names []string
	for n := range rel.Processes {
		names = append(names, n)
	}
	slices.Sort(names)
	return &m3o.Error{Kind: m3o.NotFound, Msg: fmt.Sprintf("%s of %s has no process type %s", rel.Name(), rel.App, process), Hint: "it has " + strings.Join(names, ", ")}
}

// detach starts w, a one-off command, as an instance nobody waits for.
func (d *Daemon) detach(ctx context.Context, w runtime.Workload) (runtime.Workload, error) {
	end, err := d.runs.begin(w.App, w.Image, len(d.detached(w.App)))
	if err != nil {
		return w, err
	}
	defer end() // from now on the driver counts it
	w.Process, w.Once = runPrefix+strings.ToLower(rand.Text()[:6]), true
	return w, d.driver.Start(ctx, w, 1)
}

// detached lists the detached runs of an app.
func (d *Daemon) detached(app string) []m3o.Instance {
	return slices.DeleteFunc(d.routes.list(app), func(in m3o.Instance) bool { return !isRun(in.Process) })
}
