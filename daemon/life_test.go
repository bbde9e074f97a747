package daemon

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/m3o/m3o"
	"github.com/m3o/m3o/runtime"
	"github.com/m3o/m3o/runtime/memory"
	"github.com/m3o/m3o/runtime/runtimetest"
)

// The old release serves until the new one does, and goes after that.
func TestDeploySwitchesBeforeTheOldReleaseGoes(t *testing.T) {
	t.Parallel()
	w := newWorks(t, nil)
	w.deploy(nil)
	w.answers("v1")
	defer w.load()()
	mayStop := make(chan struct{})
	w.faulty.Order("Stop", runtimetest.Fault{Hang: mayStop})
	w.deploy(nil)
	w.answers("v2")
	w.until("stop of v1", func() bool { return slices.Contains(w.faulty.Calls(), "Stop app/web v1") })
	if all := w.mem.Instances(); len(all) != 2 || all[0].Phase != m3o.Ready || all[1].Phase != m3o.Ready {
		t.Errorf("while v1 drains there are %v", all)
	}
	close(mayStop)
	w.only("web v2")
	if got, want := w.faulty.Calls(), []string{"Start app/web v1 1", "Start app/web v2 1", "Stop app/web v1"}; !slices.Equal(got, want) {
		t.Errorf("the driver was told %q, want %q", got, want)
	}
	w.answers("v2")
}

func TestReleaseThatFailsLeavesTheOldOneServing(t *testing.T) {
	t.Parallel()
	full := &m3o.Error{Kind: m3o.Unavailable, Msg: "the disk is full"}
	release := map[string]string{"Procfile": "web: hello-http\nrelease: hello-http migrate\n"}
	sick := func(ctx context.Context, p memory.Process) int {
		ln, err := p.Listen("tcp", "127.0.0.1:0") // elsewhere
		if err != nil {
			return 1
		}
		defer ln.Close() //nolint:errcheck // a test
		<-ctx.Done()
		return 0
	}
	for _, c := range []struct {
		name    string
		files   map[string]string
		faults  map[string]runtimetest.Fault
		program memory.Program
		want    string
	}{
		{"the driver refuses it", nil, map[string]runtimetest.Fault{"Start": {Err: full}}, serveApp, "the disk is full"},
		{"the driver starts it but says it did not", nil, map[string]runtimetest.Fault{"Start": {Err: full, Done: true}}, serveApp, "the disk is full"},
		{"it crashes", nil, nil, crashApp, "web exited with code 4\n  cannot read the config"},
		{"it listens elsewhere", map[string]string{"m3o.yaml": "health:\n  timeout: 1s\n"}, nil, sick, "web never listened on port"},
		{"its release command fails", release, nil, crashApp, "the release command exited with 4"},
		{"its release command cannot be run", release, map[string]runtimetest.Fault{"Run": {Err: full}}, serveApp, "run release command: the disk is full"},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			w := newWorks(t, nil)
			w.deploy(nil)
			stop := w.load()
			for method, f := range c.faults {
				w.faulty.Order(method, f)
			}
			w.run(c.program)
			if _, out, err := w.try(c.files); err == nil || !strings.Contains(err.Error(), c.want) {
				t.Errorf("deploy = %v, want %s; it printed\n%s", err, c.want, out)
			}
			w.only("web v1")
			w.answers("v1")
			if rel := w.liveRelease(); rel.Version != 1 {
				t.Errorf("%s is live by the ledger", rel.Name())
			}
			w.run(serveApp)
			next := w.deploy(nil)
			w.only("web " + next.Name())
			w.answers(next.Name())
			stop()
		})
	}
}

// Events that break off or are late must cost neither the deploy nor a request.
func TestDeployWhileEventsBreakOff(t *testing.T) {
	t.Parallel()
	w := newWorks(t, nil)
	w.deploy(nil)
	stop := w.load()
	// Whenever an instance starts, and again when it serves.
	w.run(func(ctx context.Context, p memory.Process) int {
		w.faulty.Break()
		return serveApp(ctx, p)
	})
	for range 3 {
		rel := w.deploy(nil)
		w.answers(rel.Name())
		w.faulty.Break()
		w.only("web " + rel.Name())
	}
	w.run(serveApp)
	// The router's table is made from news that comes late.
	release := w.faulty.Late()
	defer release()
	rel := w.deploy(nil)
	w.answers(rel.Name())
	release()
	w.only("web " + rel.Name())
	w.answers(rel.Name())
	stop()
	w.until("agreement on what runs", func() bool {
		all := w.d.routes.list("app")
		return len(all) == 1 && all[0].ID == w.mem.Instances()[0].ID && all[0].Phase == m3o.Ready
	})
}

// What could not be stopped ran on until the next start of the daemon.
func TestStopThatFailsIsToldAndTriedAgain(t *testing.T) {
	t.Parallel()
	full := runtimetest.Fault{Err: &m3o.Error{Kind: m3o.Unavailable, Msg: "the disk is full"}}
	w := newWorks(t, nil)
	w.deploy(nil)
	w.faulty.Order("Stop", full, full)
	w.deploy(nil)
	w.only("web v2")
	w.until("word of it", func() bool {
		s := w.told()
		return strings.Contains(s, "web of v1 cannot be stopped, which is tried again: the disk is full") && strings.Contains(s, "web of v1 is stopped after all")
	})
	// So it is with what a failed deploy has started.
	w.faulty.Order("Stop", full)
	w.run(crashApp)
	if _, _, err := w.try(nil); err == nil {
		t.Error("a release that crashes went live")
	}
	w.only("web v2")
	w.answers("v2")
}

func TestScaleDownThatFailsIsToldAndCanBeSaidAgain(t *testing.T) {
	t.Parallel()
	w := newWorks(t, nil)
	w.deploy(nil)
	if err := w.scale(3); err != nil {
		t.Fatal(err)
	}
	w.only("web v1", "web v1", "web v1")
	stop := w.load()
	w.faulty.Order("Start", runtimetest.Fault{Err: &m3o.Error{Kind: m3o.Unavailable, Msg: "the disk is full"}})
	if err := w.scale(1); err == nil || !strings.Contains(err.Error(), "the disk is full") {
		t.Errorf("scale = %v", err)
	}
	if err := w.scale(1); err != nil {
		t.Errorf("scale, again = %v", err)
	}
	w.only("web v1")
	w.answers("v1")
	stop()
}

func TestRollbackMakesTheOldImageANewRelease(t *testing.T) {
	t.Parallel()
	w := newWorks(t, nil)
	first := w.deploy(nil)
	w.deploy(nil)
	w.only("web v2")
	stop := w.load()
	rel, from, err := w.d.rollback(t.Context(), "app", "ada", 0)
	if err != nil || from != 2 || rel.Name() != "v3" || rel.Image != first.Image || rel.Reason != "rollback to v1" {
		t.Fatalf("rollback = %+v from v%d, %v", rel, from, err)
	}
	w.answers("v3")
	w.only("web v3")
	w.run(crashApp)
	if rel, _, err := w.d.rollback(t.Context(), "app", "ada", 2); err == nil {
		t.Errorf("a rollback to what crashes went live as %s", rel.Name())
	}
	w.only("web v3")
	w.answers("v3")
	stop()
}

// rest puts the app to sleep as if it had been idle.
func (w *works) rest() {
	w.t.Helper()
	w.until("sleep", func() bool {
		st, err := w.d.router.Status(w.t.Context())
		if err == nil {
			err = w.d.sleep(w.t.Context(), "app", time.Minute, st.Apps["app"].Requests)
		}
		if err != nil {
			w.t.Fatal(err)
		}
		sh, _ := w.d.shapes.get("app")
		return sh.asleep
	})
	w.only()
}

func TestSleepingAppIsWokenByItsFirstRequest(t *testing.T) {
	t.Parallel()
	w := newWorks(t, nil)
	w.deploy(nil)
	w.rest()
	var wg sync.WaitGroup
	for range 20 { // all of which wait for the same instance
		wg.Go(func() {
			if status, body, err := w.get("/"); status != 200 || body != "v1" || err != nil {
				t.Errorf("woken: %d %q, %v", status, body, err)
			}
		})
	}
	wg.Wait()
	w.only("web v1")

	w.rest()
	w.run(crashApp)
	if status, body, err := w.get("/"); status != 503 || !strings.Contains(body, "web exited with code 4") || err != nil {
		t.Errorf("a wake that fails: %d %q, %v", status, body, err)
	}
	w.only()
	w.faulty.Order("Start", runtimetest.Fault{Err: &m3o.Error{Kind: m3o.Unavailable, Msg: "the disk is full"}})
	w.run(serveApp)
	if status, body, err := w.get("/"); status != 503 || !strings.Contains(body, "the disk is full") || err != nil {
		t.Errorf("a wake that the driver refuses: %d %q, %v", status, body, err)
	}
	w.answers("v1")
	w.rest()
	rel := w.deploy(nil) // which wakes it, too
	w.answers(rel.Name())
}

func TestCrashLoopIsExplained(t *testing.T) {
	t.Parallel()
	w := newWorks(t, nil)
	w.deploy(nil)
	w.run(crashApp)
	_, _, _ = w.get("/crash")
	w.until("crash loop", func() bool {
		all := w.mem.Instances()
		return len(all) == 1 && w.d.instance(t.Context(), all[0]).Phase == "crashing"
	})
	in := w.d.instance(t.Context(), w.mem.Instances()[0])
	if !strings.HasPrefix(in.Why, "exited with code 4, ") || !strings.Contains(in.Why, "times in a row") || !slices.Contains(in.LastLines, "cannot read the config") {
		t.Errorf("ps says %q, with %q", in.Why, in.LastLines)
	}
	w.until("word of it", func() bool {
		return strings.Contains(w.told(), "crashed with code 3") && strings.Contains(w.told(), "crashed with code 4")
	})
	w.run(serveApp)
	w.until("recovery", func() bool { status, _, _ := w.get("/"); return status == 200 })
}

// A release that crashes soon after it went live is rolled back if that is
// wanted, once, though the news of it breaks off.
func TestReleaseThatCrashesSoonIsRolledBack(t *testing.T) {
	t.Parallel()
	auto := map[string]string{"m3o.yaml": "rollback: auto\n"}
	w := newWorks(t, nil)
	w.deploy(auto)
	w.run(func(ctx context.Context, p memory.Process) int {
		code := serveApp(ctx, p)
		w.faulty.Break()
		return code
	})
	w.deploy(auto)
	w.answers("v2")
	w.until("rollback", func() bool {
		_, _, _ = w.get("/crash?v2")
		return w.liveRelease().Version == 3
	})
	w.only("web v3")
	w.answers("v3")
	if rel := w.liveRelease(); !strings.HasPrefix(rel.Reason, "automatic rollback to v1: web of v2 exited with code 3") {
		t.Errorf("its reason is %q", rel.Reason)
	}
	if s := w.told(); !strings.Contains(s, "automatic rollback to v1") || strings.Contains(s, "failed") {
		t.Errorf("the log says\n%s", s)
	}
}

// A daemon that starts anew finds what runs, and stops what should not.
func TestNewDaemonTakesOverWhatRuns(t *testing.T) {
	t.Parallel()
	w := newWorks(t, nil)
	w.deploy(map[string]string{"Procfile": "web: hello-http\nworker: hello-http work\n"})
	if err := w.scale(2); err != nil {
		t.Fatal(err)
	}
	before := w.mem.Instances()
	stop := w.load()
	stray := runtime.Workload{Ref: runtime.Ref{App: "app", Process: webProcess, Release: 9}, Image: "x", Port: 8080}
	if err := w.mem.Start(t.Context(), stray, 1); err != nil {
		t.Fatal(err)
	}
	w.only("web v1", "web v1", "web v9", "worker v1")
	w.end()
	w.faulty.Order("Stop", runtimetest.Fault{Err: &m3o.Error{Kind: m3o.Unavailable, Msg: "the disk is full"}})
	w.open()
	w.only("web v1", "web v1", "worker v1")
	for i, in := range w.mem.Instances() {
		if in.ID != before[i].ID || in.Restarts != 0 {
			t.Errorf("%s is now %s after %d restarts", before[i].ID, in.ID, in.Restarts)
		}
	}
	w.answers("v1")
	rel := w.deploy(nil)
	w.answers(rel.Name())
	stop()
	w.only(fmt.Sprintf("web %s", rel.Name()), fmt.Sprintf("web %s", rel.Name()))
}
