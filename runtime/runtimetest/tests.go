package runtimetest

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/m3o/m3o"
	"github.com/m3o/m3o/runtime"
)

func startAnswers(f *fixture) {
	in := f.ready(f.workload("serve"), 1)[0]
	var about struct { // see program.About
		Instance string
		Env      map[string]string
	}
	if err := json.Unmarshal([]byte(f.get(in, "/")), &about); err != nil {
		f.Fatal(err)
	}
	if about.Instance != in.ID || !strings.HasSuffix(in.Addr, ":"+about.Env["PORT"]) {
		f.Errorf("instance %s at %s has M3O_INSTANCE=%s PORT=%s", in.ID, in.Addr, about.Instance, about.Env["PORT"])
	}
	if in.App != web.App || in.Process != web.Process || in.Release != web.Release || in.Restarts != 0 {
		f.Errorf("instance %+v is not of %s", in, web)
	}
	if got, err := runtime.Probe(f.ctx, in.Addr, m3o.Health{}); got != runtime.HTTP1 || err != nil {
		f.Errorf("Probe = %q, %v, want http1", got, err)
	}
}

func scaling(f *fixture) {
	w := f.workload("serve")
	first := f.ready(w, 1)
	f.start(w, 1)
	if again := f.ready(w, 1); again[0].ID != first[0].ID || len(f.list()) != 1 {
		f.Errorf("after three Starts of 1 there are %v, want %s alone", f.list(), first[0].ID)
	}
	three := f.ready(w, 3)
	for _, in := range three {
		f.get(in, "/")
	}
	if !slices.ContainsFunc(three, func(in m3o.Instance) bool { return in.ID == first[0].ID }) {
		f.Errorf("scaling up replaced %s: %v", first[0].ID, three)
	}
	f.start(w, 1)
	for n := range 2 {
		f.until(fmt.Sprintf("exit %d", n), func(in m3o.Instance) bool { return len(f.list()) <= 2-n })
	}
	if left := f.list(); len(left) != 1 || left[0].Phase != m3o.Ready {
		f.Errorf("after scaling down there are %v, want one ready", left)
	}
	f.start(w, 0)
	f.stop(w.Ref)
	if left := f.list(); len(left) != 0 {
		f.Errorf("after scaling to 0 there are %v", left)
	}
}

func stopRepeats(f *fixture) {
	f.stop(web)
	in := f.ready(f.workload("serve"), 2)[0]
	both := make(chan error, 2)
	for range 2 {
		go func() { both <- f.Driver.Stop(f.ctx, web) }()
	}
	for range 2 {
		if err := <-both; err != nil {
			f.Errorf("Stop = %v", err)
		}
	}
	f.stop(web)
	if left := f.list(); len(left) != 0 {
		f.Errorf("Stop left %v", left)
	}
	if p, err := runtime.Probe(f.ctx, in.Addr, m3o.Health{Kind: "tcp"}); err == nil {
		f.Errorf("%s still answers at %s: %s", in.ID, in.Addr, p)
	}
}

func refused(f *fixture) {
	for name, change := range map[string]func(*runtime.Workload){
		"no image":     func(w *runtime.Workload) { w.Image = "" },
		"process type": func(w *runtime.Workload) { w.Process = "../web" },
		"app":          func(w *runtime.Workload) { w.App = "" },
		"port":         func(w *runtime.Workload) { w.Port = 70000 },
		"health":       func(w *runtime.Workload) { w.Health.Kind = "icmp" },
		"memory":       func(w *runtime.Workload) { w.MemoryBytes = 1 },
	} {
		w := f.workload("serve")
		change(&w)
		if err := f.Driver.Start(f.ctx, w, 1); m3o.KindOf(err) != m3o.Invalid && m3o.KindOf(err) != m3o.NotFound {
			f.Errorf("%s: Start = %v, want Invalid or NotFound", name, err)
		}
	}
	if err := f.Driver.Start(f.ctx, f.workload("serve"), -1); m3o.KindOf(err) != m3o.Invalid {
		f.Errorf("Start of -1 = %v, want Invalid", err)
	}
	if left := f.list(); len(left) != 0 {
		f.Errorf("refused workloads made %v", left)
	}
}

func crashRestarts(f *fixture) {
	in := f.ready(f.workload("serve"), 1)[0]
	exited := make(chan m3o.Instance, 1)
	watching := make(chan struct{})
	go func() {
		defer close(exited)
		for e, err := range f.Driver.Events(f.ctx) {
			if err != nil {
				return
			}
			if e.ID == "" {
				close(watching)
			}
			if e.Phase == m3o.Exited {
				exited <- e
				return
			}
		}
	}()
	<-watching
	f.get(in, "/exit?code=7")
	if e := <-exited; e.ID != in.ID || e.Exit != 7 || e.OOM {
		f.Errorf("exited %+v, want %s with code 7", e, in.ID)
	}
	back := f.until("ready again", func(e m3o.Instance) bool { return e.Phase == m3o.Ready && e.Restarts > 0 })
	if back.ID != in.ID || back.Restarts != 1 {
		f.Errorf("came back as %+v, want %s after 1 restart", back, in.ID)
	}
	f.get(back, "/")
}

func exitAtStart(f *fixture) {
	e := f.failure(f.workload("exit", "3"))
	f.contains(e, "web exited with code 3", "\n  about to exit with 3")
}

func exitZero(f *fixture) {
	f.contains(f.failure(f.workload("exit", "0")), "with code 0", "must keep running")
}

func outOfMemory(f *fixture) {
	if !f.Limits {
		f.Log("the driver has no limits, so there is nothing to tell")
		return
	}
	w := f.workload("oom")
	w.MemoryBytes = 32 << 20
	f.contains(f.failure(w), "web ran out of memory: it may use 32 MB", "taking memory")
}

func neverHealthy(f *fixture) {
	w := f.workload("sick")
	w.Health = m3o.Health{Kind: "http", Path: "/health", Timeout: 2 * time.Second}
	f.contains(f.failure(w), "web listens on port", "GET /health answered 503", "\n  listening on")
}

func neverListens(f *fixture) {
	w := f.workload("mute")
	w.Health.Timeout = 2 * time.Second
	f.contains(f.failure(w), "web never listened on port", "\n  not listening")
}

func wrongPort(f *fixture) {
	// A free one: drivers without networks of their own share the host's ports
	// with other tests.
	ln, err := net.Listen("tcp", ":0")
	if err != nil {
		f.Fatal(err)
	}
	_, port, _ := net.SplitHostPort(ln.Addr().String())
	_ = ln.Close()
	w := f.workload("port", port)
	w.Health.Timeout = 2 * time.Second
	e := f.failure(w)
	f.contains(e, "web never listened on port", "it listens on port "+port)
	if !strings.Contains(e.Hint, "PORT") {
		f.Errorf("hint %q does not mention PORT", e.Hint)
	}
}

func loopbackOnly(f *fixture) {
	if !f.OwnNet {
		f.Log("every instance is on loopback, so there is nothing to tell")
		return
	}
	w := f.workload("loopback")
	w.Health.Timeout = 2 * time.Second
	f.contains(f.failure(w), "web listens on port 8080 of the loopback address only")
}

func grpcReady(f *fixture) {
	w := f.workload("grpc")
	w.Health.Kind = "grpc"
	in := f.ready(w, 1)[0]
	if got, err := runtime.Probe(f.ctx, in.Addr, m3o.Health{}); got != runtime.GRPC || err != nil {
		f.Errorf("Probe = %q, %v, want grpc", got, err)
	}
}

func worker(f *fixture) {
	w := f.workload("mute")
	w.Process, w.Port = "worker", 0
	if in := f.ready(w, 1)[0]; in.Addr != "" {
		f.Errorf("a worker has the address %s", in.Addr)
	}
}

func stubborn(f *fixture) {
	w := f.workload("stubborn")
	w.Grace = 300 * time.Millisecond
	f.ready(w, 1)
	gone := make(chan m3o.Instance, 1)
	watching := make(chan struct{})
	go func() {
		defer close(gone)
		for e, err := range f.Driver.Events(f.ctx) {
			if err != nil {
				return
			}
			if e.ID == "" {
				close(watching)
			}
			if e.Phase == m3o.Exited {
				gone <- e
				return
			}
		}
	}()
	<-watching
	f.stop(w.Ref)
	if e := <-gone; e.Exit != 137 {
		f.Errorf("exit code %d, want 137 for SIGKILL", e.Exit)
	}
}

func logs(f *fixture) {
	const n = 500
	w := f.workload("serve")
	in := f.ready(w, 1)[0]
	f.get(in, fmt.Sprintf("/print?n=%d", n))
	ctx, cancel := context.WithTimeout(f.ctx, patience)
	defer cancel()
	var want []string
	for i := range n {
		want = append(want, fmt.Sprintf("line %d", i))
	}
	want = append(want, "line 0", "line 1", "line 2")
	next := 0
	for ln, err := range f.Driver.Logs(ctx, web, 1000, true) {
		if err != nil {
			f.Fatal(err)
		}
		if ln.Text != want[next] {
			continue // what it says at start
		}
		if ln.Instance != in.ID || ln.Ref != web || ln.Stream != "stdout" || time.Since(ln.Time) > time.Minute {
			f.Fatalf("line %+v", ln)
		}
		if next++; next == n {
			f.get(in, "/print?n=3") // while being followed
		}
		if next == len(want) {
			break
		}
	}
	if next < len(want) {
		f.Fatalf("got %d of %d lines, the next being %q", next, len(want), want[next])
	}
	f.stop(web)
	var got []string
	for ln, err := range f.Driver.Logs(f.ctx, runtime.Ref{App: web.App}, 5, false) {
		if err != nil {
			f.Fatal(err)
		}
		got = append(got, ln.Text)
	}
	if want := append(want[n-1:], "asked to end"); !slices.Equal(got, want) {
		f.Errorf("last lines of what is gone: %q, want %q", got, want)
	}
	for range f.Driver.Logs(f.ctx, runtime.Ref{App: web.App, Release: 99}, 5, false) { //nolint:errcheck // nothing may come, not even an error
		f.Error("a release that never was has a log")
	}
}

func execs(f *fixture) {
	in := f.ready(f.workload("serve"), 1)[0]
	var out, errs bytes.Buffer
	code, err := f.Driver.Exec(f.ctx, in.ID, runtime.Cmd{Args: []string{"/server", "cat"}, In: strings.NewReader("through and through"), Out: &out, Err: &errs})
	if code != 0 || err != nil || out.String() != "through and through" {
		f.Errorf("cat = %d, %v, %q %q", code, err, out.String(), errs.String())
	}
	code, err = f.Driver.Exec(f.ctx, in.ID, runtime.Cmd{Args: []string{"/server", "exit", "5"}, Out: &out, Err: &errs})
	if code != 5 || err != nil || !strings.Contains(errs.String(), "about to exit with 5") {
		f.Errorf("exit 5 = %d, %v, %q", code, err, errs.String())
	}
	out.Reset()
	code, err = f.Driver.Exec(f.ctx, in.ID, runtime.Cmd{Args: []string{"/server", "env", "M3O_INSTANCE", "GREETING", "EXTRA"}, Env: []string{"EXTRA=1"}, Out: &out})
	if want := "M3O_INSTANCE=" + in.ID + "\nGREETING=hi there\nEXTRA=1\n"; code != 0 || err != nil || out.String() != want {
		f.Errorf("env = %d, %v, %q, want %q", code, err, out.String(), want)
	}
	if _, err := f.Driver.Exec(f.ctx, "hello-web-v3-nobody", runtime.Cmd{Args: []string{"/server"}}); m3o.KindOf(err) != m3o.NotFound {
		f.Errorf("Exec in an unknown instance = %v, want NotFound", err)
	}
	if _, err := f.Driver.Exec(f.ctx, in.ID, runtime.Cmd{}); m3o.KindOf(err) != m3o.Invalid {
		f.Errorf("Exec of nothing = %v, want Invalid", err)
	}
}

func runs(f *fixture) {
	w := f.workload("serve")
	w.Process = "release"
	var out, errs bytes.Buffer
	code, err := f.Driver.Run(f.ctx, w, runtime.Cmd{Args: []string{"/server", "cat"}, In: strings.NewReader("migrate"), Out: &out, Err: &errs})
	if code != 0 || err != nil || out.String() != "migrate" {
		f.Errorf("cat = %d, %v, %q %q", code, err, out.String(), errs.String())
	}
	w.Args = []string{"/server", "exit", "9"}
	code, err = f.Driver.Run(f.ctx, w, runtime.Cmd{Err: &errs})
	if code != 9 || err != nil || !strings.Contains(errs.String(), "about to exit with 9") {
		f.Errorf("exit 9 = %d, %v, %q", code, err, errs.String())
	}
	ctx, cancel := context.WithCancel(f.ctx)
	w.Args = []string{"/server", "mute"}
	started := make(chan struct{})
	done := make(chan error, 1)
	go func() {
		_, err := f.Driver.Run(ctx, w, runtime.Cmd{Out: signalWriter(started)})
		done <- err
	}()
	select {
	case <-started:
	case err := <-done:
		f.Fatalf("Run = %v before anything was printed", err)
	}
	cancel()
	if err := <-done; !errors.Is(err, context.Canceled) {
		f.Errorf("a cancelled Run = %v, want context.Canceled", err)
	}
	if left := f.list(); len(left) != 0 {
		f.Errorf("one-off commands are listed: %v", left)
	}
	f.clean()
}

func signals(f *fixture) {
	in := f.ready(f.workload("serve"), 1)[0]
	w := f.workload("mute")
	w.Process, w.Port = "run", 0
	for name, run := range map[string]func(runtime.Cmd) (int, error){
		"Run":  func(c runtime.Cmd) (int, error) { return f.Driver.Run(f.ctx, w, c) },
		"Exec": func(c runtime.Cmd) (int, error) { return f.Driver.Exec(f.ctx, in.ID, c) },
	} {
		sig, started := make(chan syscall.Signal, 1), make(chan struct{})
		go func() {
			<-started
			sig <- syscall.SIGTERM
		}()
		code, err := run(runtime.Cmd{Args: []string{"/server", "mute"}, Out: signalWriter(started), Signals: sig})
		if code != 0 || err != nil {
			f.Errorf("%s after SIGTERM = %d, %v, want 0: the program ends well then", name, code, err)
		}
	}
}

func onceGoes(f *fixture) {
	w := f.workload("exit", "7")
	w.Process, w.Port, w.Once = "run-1", 0, true
	gone := make(chan m3o.Instance, 1)
	watching := make(chan struct{})
	go func() {
		defer close(gone)
		seen := m3o.Phase("")
		for e, err := range f.Driver.Events(f.ctx) {
			if err != nil {
				return
			}
			if e.ID == "" {
				close(watching)
				continue
			}
			if e.Phase == m3o.Exited && seen == m3o.Draining {
				gone <- e
				return
			}
			seen = e.Phase
		}
	}()
	<-watching
	f.start(w, 1)
	if e := <-gone; e.Exit != 7 || e.Restarts != 0 {
		f.Errorf("it went as %+v, want exit 7 and no restart", e)
	}
	if left := f.list(); len(left) != 0 {
		f.Errorf("what ran once is still listed: %v", left)
	}
	f.Driver = f.Reopen(f.T)
	if left := f.list(); len(left) != 0 {
		f.Errorf("after reopening it came back: %v", left)
	}
	// While it runs it is like any other.
	w.Args, w.Process = []string{"/server", "mute"}, "run-2"
	f.ready(w, 1)
	f.stop(w.Ref)
	f.clean()
}

type onFirstWrite struct{ c chan struct{} }

func signalWriter(c chan struct{}) io.Writer { return &onFirstWrite{c} }

func (w *onFirstWrite) Write(b []byte) (int, error) {
	if w.c != nil {
		close(w.c)
		w.c = nil
	}
	return len(b), nil
}

func (f *fixture) clean() {
	f.Helper()
	if f.Leftovers == nil {
		return
	}
	if left := f.Leftovers(f.T); len(left) > 0 {
		f.Errorf("left on the machine:\n%s", strings.Join(left, "\n"))
	}
}

func events(f *fixture) {
	const watchers = 3
	ctx, cancel := context.WithCancel(f.ctx)
	defer cancel()
	type result struct {
		phases []m3o.Phase
		err    error
	}
	results := make(chan result, watchers)
	listed := make(chan struct{}, watchers)
	for range watchers {
		go func() {
			var r result
			for in, err := range f.Driver.Events(ctx) {
				if err != nil {
					r.err = err
					break
				}
				if in.ID == "" {
					listed <- struct{}{}
					continue
				}
				if n := len(r.phases); n == 0 || r.phases[n-1] != in.Phase {
					r.phases = append(r.phases, in.Phase)
				}
				if in.Phase == m3o.Exited {
					break
				}
			}
			results <- r
		}()
	}
	for range watchers {
		<-listed
	}
	f.ready(f.workload("serve"), 1)
	f.stop(web)
	want := []m3o.Phase{m3o.Starting, m3o.Ready, m3o.Draining, m3o.Exited}
	for range watchers {
		if r := <-results; r.err != nil || !slices.Equal(r.phases, want) {
			f.Errorf("a watcher saw %v, %v, want %v", r.phases, r.err, want)
		}
	}
}

func reopen(f *fixture) {
	w := f.workload("serve")
	before := f.ready(w, 2)
	f.Driver = f.Reopen(f.T)
	after, err := runtime.WaitReady(f.ctx, f.Driver, w.Ref, 2, nil)
	if err != nil {
		f.Fatal(err)
	}
	for i := range after {
		if after[i].ID != before[i].ID {
			f.Errorf("instance %s came back as %s", before[i].ID, after[i].ID)
		}
		f.get(after[i], "/")
	}
	f.stop(w.Ref)
	if left := f.list(); len(left) != 0 {
		f.Errorf("Stop after reopening left %v", left)
	}
	f.clean()
}

func twenty(f *fixture) {
	w := f.workload("serve")
	for _, in := range f.ready(w, 20) {
		f.get(in, "/")
	}
	f.stop(w.Ref)
	if left := f.list(); len(left) != 0 {
		f.Errorf("left: %v", left)
	}
	f.clean()
}
