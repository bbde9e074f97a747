package daemon

import (
	"context"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/m3o/m3o"
	"github.com/m3o/m3o/router"
	"github.com/m3o/m3o/runtime"
)

func TestAccessLineIsOneLineOfLogfmt(t *testing.T) {
	r := router.Record{Method: "POST", Path: "/a b\"\n", Host: "hello.localhost", Status: 200, RPC: "/p.S/M", Code: 5, Took: 1234567 * time.Nanosecond,
		Out: 10, Protocol: "grpc", Release: 3, Remote: "::1", ID: "abc", Broken: true, Err: "it broke"}
	want := `method=POST path="/a b\"\n" host=hello.localhost status=200 rpc=/p.S/M code=5 took=1.235ms bytes=10 protocol=grpc release=v3 instance=hello-web-v3-x remote=::1 id=abc broken=true err="it broke"`
	if got := accessLine(r, "hello-web-v3-x"); got != want {
		t.Errorf("got  %s\nwant %s", got, want)
	}
}

func TestBuildOutputBecomesLines(t *testing.T) {
	l := newAppLogs(t.TempDir(), slog.New(slog.DiscardHandler))
	w := l.lines("hello", sourceBuild)
	for _, part := range []string{"-----> Bui", "lding\n       a\r\n\n", strings.Repeat("x", runtime.MaxLine+1), "\nend\n"} {
		if n, err := io.WriteString(w, part); n != len(part) || err != nil {
			t.Fatalf("Write = %d, %v", n, err)
		}
	}
	var got []string
	for ln, err := range l.files.Read(context.Background(), runtime.Ref{App: "hello", Process: sourceBuild}, 100, false) {
		if err != nil {
			t.Fatal(err)
		}
		got = append(got, ln.Text[:min(len(ln.Text), 20)])
	}
	if want := `["-----> Building" "       a" "xxxxxxxxxxxxxxxxxxxx" "end"]`; fmt.Sprintf("%q", got) != want {
		t.Errorf("got %q, want %s", got, want)
	}
	if err := l.remove("hello"); err != nil {
		t.Fatal(err)
	}
	if left, _ := filepath.Glob(filepath.Join(l.files.Dir, "*")); len(left) != 0 {
		t.Errorf("left: %v", left)
	}
}

func TestEndlessBuildOutputIsCutAndTheEndKept(t *testing.T) {
	d := &Daemon{cfg: Config{Data: t.TempDir()}}
	f, err := d.openBuildLog("hello", 1)
	if err != nil {
		t.Fatal(err)
	}
	line := "       " + strings.Repeat("x", 1<<20-8) + "\n"
	for range 20 {
		if n, err := io.WriteString(f, line); n != len(line) || err != nil {
			t.Fatalf("Write = %d, %v", n, err)
		}
	}
	output{f}.step("Building")
	output{f}.fail(&m3o.Error{Kind: m3o.Invalid, Msg: "it went wrong"})
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
	b, err := os.ReadFile(d.buildLog("hello", 1))
	const end = " !     The output is longer than 16 MB: from here on only the steps are kept\n-----> Building\n !     it went wrong\n"
	if err != nil || len(b) != 16<<20+len(end) || !strings.HasSuffix(string(b), end) {
		t.Errorf("%d bytes, %v; it ends %q", len(b), err, b[max(0, len(b)-200):])
	}
}

func TestInstancesAreToldOf(t *testing.T) {
	d := &Daemon{logs: newAppLogs(t.TempDir(), slog.New(slog.DiscardHandler))}
	at := func(p m3o.Phase, exit int) m3o.Instance {
		return m3o.Instance{App: "hello", Process: "web", ID: "i", Release: 3, Phase: p, Exit: exit}
	}
	oom := at(m3o.Exited, 137)
	oom.OOM = true
	lost := at(m3o.Exited, -1)
	lost.Process = "run-x7k2q9"
	for _, c := range [][2]m3o.Instance{{{}, at(m3o.Starting, 0)}, {at(m3o.Starting, 0), at(m3o.Ready, 0)}, {at(m3o.Ready, 0), at(m3o.Ready, 0)},
		{at(m3o.Ready, 0), at(m3o.Exited, 3)}, {at(m3o.Ready, 0), oom}, {at(m3o.Draining, 0), at(m3o.Exited, 0)}, {{}, lost}} {
		d.tellInstance(c[0], c[1])
	}
	var got []string
	for ln, err := range d.logs.files.Read(context.Background(), runtime.Ref{App: "hello"}, 100, false) {
		if err != nil {
			t.Fatal(err)
		}
		got = append(got, ln.Stream[3:4]+" "+ln.Text)
	}
	want := "o web.i of v3 starts|o web.i is ready|e web.i crashed with code 3|e web.i crashed: it ran out of memory|o web.i has ended with code 0|e run-x7k2q9 was lost: nobody knows how it ended"
	if g := strings.Join(got, "|"); g != want {
		t.Errorf("got  %s\nwant %s", g, want)
	}
}

func TestOldLogsGo(t *testing.T) {
	dir := t.TempDir()
	if err := os.MkdirAll(filepath.Join(dir, "hello"), 0o700); err != nil {
		t.Fatal(err)
	}
	old := time.Now().Add(-48 * time.Hour)
	for i := range keptBuildLogs + 5 {
		p := filepath.Join(dir, "hello", fmt.Sprintf("%d.log", i+1))
		if err := os.WriteFile(p, []byte("x"), 0o600); err != nil {
			t.Fatal(err)
		}
		if err := os.Chtimes(p, old, old.Add(time.Duration(i)*time.Minute)); err != nil {
			t.Fatal(err)
		}
	}
	if err := trimBuildLogs(dir, 24*time.Hour); err != nil {
		t.Fatal(err)
	}
	left, _ := filepath.Glob(filepath.Join(dir, "hello", "*.log"))
	if _, err := os.Stat(filepath.Join(dir, "hello", "6.log")); len(left) != keptBuildLogs || err != nil {
		t.Errorf("%d logs are left, want the newest %d: %v", len(left), keptBuildLogs, err)
	}
	// A log that another process writes to is emptied in place.
	p := filepath.Join(dir, "router.log")
	f, err := os.OpenFile(p, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	_, _ = f.WriteString("before\n")
	if err := rotateOpen(p, 5); err != nil {
		t.Fatal(err)
	}
	_, _ = f.WriteString("after\n")
	now, _ := os.ReadFile(p)
	then, _ := os.ReadFile(p + ".1")
	if string(now) != "after\n" || string(then) != "before\n" {
		t.Errorf("%q and before it %q", now, then)
	}
}

func TestExpositionEscapesLabels(t *testing.T) {
	var e exposition
	e.family("m3o_x_total", "counter", "Help.")
	e.sample("m3o_x_total", 1.5, "app", "a\"b\\c\nd", "status", "200")
	e.sample("m3o_x_total", 1e9)
	want := "# HELP m3o_x_total Help.\n# TYPE m3o_x_total counter\nm3o_x_total{app=\"a\\\"b\\\\c\\nd\",status=\"200\"} 1.5\nm3o_x_total 1e+09\n"
	if got := string(e.text()); got != want {
		t.Errorf("got %q, want %q", got, want)
	}
}
