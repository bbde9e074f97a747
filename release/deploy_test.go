package release

import (
	"bufio"
	"context"
	"fmt"
	"os"
	"os/exec"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/m3o/m3o"
	"github.com/m3o/m3o/store"
)

// paths lead a deploy into each status.
var paths = map[Status][]Event{
	Queued:    {},
	Building:  {Build},
	Releasing: {Build, Command},
	Starting:  {Build, Command, Start},
	Switching: {Build, Command, Start, Switch},
	Live:      {Build, Command, Start, Switch, Confirm},
	Failed:    {Build, Fail},
}

func TestEveryIllegalEventIsRefused(t *testing.T) {
	// Written out again, not read from the table under test.
	legal := []string{
		"queued build", "queued command", "queued start", "queued fail",
		"building command", "building start", "building fail",
		"releasing start", "releasing fail",
		"starting switch", "starting fail",
		"switching confirm", "switching fail",
	}
	l := ledger(t)
	ctx := t.Context()
	tried := 0
	for from, path := range paths {
		for _, e := range []Event{Build, Command, Start, Switch, Confirm, Fail, "", "nonsense"} {
			d := begin(t, l, "hello")
			for _, p := range path {
				if _, err := l.Advance(ctx, d.ID, p, func(d *Deploy) { d.Release = 1 }); err != nil {
					t.Fatal(err)
				}
			}
			before, err := l.Deploy(ctx, d.ID)
			if err != nil || before.Status != from {
				t.Fatalf("deploy is %s, %v, want %s", before.Status, err, from)
			}
			after, err := l.Advance(ctx, d.ID, e, func(d *Deploy) { d.Error = "changed"; d.Release = 1 })
			tried++
			if slices.Contains(legal, fmt.Sprint(from, " ", e)) {
				if err != nil || len(after.Steps) != len(before.Steps)+1 {
					t.Errorf("%s %s: %v, steps %v", from, e, err, after.Steps)
				}
				continue
			}
			wantKind(t, err, m3o.Conflict)
			if now, err := l.Deploy(ctx, d.ID); err != nil || now.Status != from || now.Error == "changed" {
				t.Errorf("%s %q was refused but wrote %+v, %v", from, e, now, err)
			}
		}
	}
	if tried != 7*8 {
		t.Errorf("%d pairs tried", tried)
	}
	checkIndex(t, l)
}

func TestDeployRecord(t *testing.T) {
	l := ledger(t)
	ctx := t.Context()
	deploy(t, l, "hello")
	src := m3o.Source{App: "hello", Ref: "refs/heads/main", Commit: strings.Repeat("a", 40), Options: []string{"force-rebuild"}}
	d, err := l.BeginDeploy(ctx, Deploy{App: "hello", Source: src, Reason: "git push", User: "ada", Status: Live, Error: "x"})
	if err != nil || d.ID != "hello.2" || d.Status != Queued || d.Error != "" || d.Previous != 1 {
		t.Fatalf("BeginDeploy = %+v, %v", d, err)
	}
	_, err = l.Advance(ctx, d.ID, Build, func(d *Deploy) { d.Build = 7; d.ID, d.App, d.User, d.Status = "x", "y", "eve", Live })
	if err != nil {
		t.Fatal(err)
	}
	got, err := l.Advance(ctx, d.ID, Fail, func(d *Deploy) { d.Error = "does not compile" })
	if err != nil {
		t.Fatal(err)
	}
	if got.ID != "hello.2" || got.App != "hello" || got.User != "ada" || got.Build != 7 || got.Source.Commit != src.Commit ||
		got.Error != "does not compile" || got.Ended.IsZero() || !got.Started.Equal(d.Started) {
		t.Errorf("deploy is %+v", got)
	}
	var steps []Status
	for i, s := range got.Steps {
		steps = append(steps, s.Status)
		if s.At.IsZero() || i > 0 && s.At.Before(got.Steps[i-1].At) {
			t.Errorf("step times are %v", got.Steps)
		}
	}
	if want := []Status{Queued, Building, Failed}; !slices.Equal(steps, want) {
		t.Errorf("steps are %v, want %v", steps, want)
	}
	list, err := l.Deploys(ctx, "hello", 1)
	if err != nil || len(list) != 1 || list[0].ID != "hello.2" {
		t.Errorf("Deploys = %v, %v", list, err)
	}
	// Nothing goes live without a release.
	e := begin(t, l, "hello")
	advance(t, l, e.ID, Start, Switch)
	if _, err := l.Advance(ctx, e.ID, Confirm, nil); err == nil {
		t.Error("a deploy without a release went live")
	}
	open, err := l.UnfinishedDeploys(ctx)
	if err != nil || len(open) != 1 || open[0].ID != e.ID {
		t.Errorf("UnfinishedDeploys = %v, %v, want %s", open, err, e.ID)
	}
}

func TestRecordOfANewerVersionOpens(t *testing.T) {
	st := openStore(t, t.TempDir())
	l := openLedger(t, st)
	createApp(t, l, "hello")
	newer, err := store.NewBucket[map[string]any](t.Context(), st, "deploys")
	if err != nil {
		t.Fatal(err)
	}
	rec := map[string]any{"ID": "hello.1", "App": "hello", "Status": "live", "Release": 1, "Canary": map[string]int{"percent": 5}}
	if _, err := newer.Put(t.Context(), "hello/0000000001", rec); err != nil {
		t.Fatal(err)
	}
	releases, err := store.NewBucket[map[string]any](t.Context(), st, "releases")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := releases.Put(t.Context(), "hello/0000000001", map[string]any{"App": "hello", "Version": 1, "Routes": []string{"x"}}); err != nil {
		t.Fatal(err)
	}
	l = openLedger(t, st)
	if r, err := l.Live(t.Context(), "hello"); err != nil || r.Version != 1 {
		t.Errorf("Live = %+v, %v", r, err)
	}
}

// crashDir makes this test binary a process that deploys and is killed.
const crashDir = "M3O_RELEASE_CRASH_DIR"

func TestMain(m *testing.M) {
	if dir := os.Getenv(crashDir); dir != "" {
		if err := deployAndSay(dir); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
	}
	os.Exit(m.Run())
}

// deployAndSay takes a deploy through its life, prints each status once it is
// acknowledged, and goes on when told.
func deployAndSay(dir string) error {
	ctx := context.Background()
	st, err := store.Open(ctx, store.Config{Dir: dir})
	if err != nil {
		return err
	}
	l, err := Open(ctx, st, nil)
	if err != nil {
		return err
	}
	in := bufio.NewScanner(os.Stdin)
	d, err := l.BeginDeploy(ctx, Deploy{App: "hello"})
	if err != nil {
		return err
	}
	fmt.Println(d.Status)
	for _, e := range []Event{Build, Command, Start, Switch, Confirm} {
		if !in.Scan() {
			return in.Err()
		}
		release := 0
		if e == Command {
			r, err := l.AppendRelease(ctx, m3o.Release{App: "hello"})
			if err != nil {
				return err
			}
			release = r.Version
		}
		d, err := l.Advance(ctx, d.ID, e, func(d *Deploy) { d.Release = max(d.Release, release) })
		if err != nil {
			return err
		}
		fmt.Println(d.Status)
	}
	select {} // until killed
}

func TestKill9AfterEachStep(t *testing.T) {
	for i, last := range []Status{Queued, Building, Releasing, Starting, Switching, Live} {
		t.Run(string(last), func(t *testing.T) {
			t.Parallel()
			dir := t.TempDir()
			st, err := store.Open(t.Context(), store.Config{Dir: dir})
			if err != nil {
				t.Fatal(err)
			}
			l := openLedger(t, st)
			createApp(t, l, "hello")
			deploy(t, l, "hello")
			if err := st.Close(); err != nil {
				t.Fatal(err)
			}
			killAfter(t, dir, i)

			l = openLedger(t, openStore(t, dir))
			checkIndex(t, l)
			d, err := l.Deploy(t.Context(), "hello.2")
			if err != nil || d.Status != last || len(d.Steps) != i+1 {
				t.Fatalf("deploy is %+v, %v, want %s", d, err, last)
			}
			open, err := l.UnfinishedDeploys(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			want := 1
			if last == Live {
				want = 2
			} else if len(open) != 1 || open[0].ID != d.ID {
				t.Errorf("unfinished deploys are %+v", open)
			}
			if r, err := l.Live(t.Context(), "hello"); err != nil || r.Version != want {
				t.Errorf("live is v%d, %v, want v%d", r.Version, err, want)
			}
			// It can be brought to an end, and the next one works.
			if !d.Status.Ended() {
				advance(t, l, d.ID, Fail)
			}
			r := deploy(t, l, "hello")
			if live, err := l.Live(t.Context(), "hello"); err != nil || live.Version != r.Version {
				t.Errorf("afterwards live is v%d, %v, want v%d", live.Version, err, r.Version)
			}
		})
	}
}

// killAfter kills a deploying process once it has said the status after steps.
func killAfter(t *testing.T, dir string, steps int) {
	t.Helper()
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), crashDir+"="+dir)
	cmd.Stderr = os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	limit := time.AfterFunc(3*time.Minute, func() { _ = cmd.Process.Kill() })
	defer limit.Stop()
	sc := bufio.NewScanner(out)
	for range steps {
		if !sc.Scan() {
			t.Fatal("the process ended by itself")
		}
		if _, err := fmt.Fprintln(in); err != nil {
			t.Fatal(err)
		}
	}
	if !sc.Scan() {
		t.Fatal("the process ended by itself")
	}
	if err := cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	_ = cmd.Wait() // "signal: killed"
}
