package store

import (
	"bufio"
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/m3o/m3o"
	"github.com/m3o/m3o/internal/need"
)

// crashDir makes this test binary a process that writes until it is killed.
// Its keys begin with the tag.
const (
	crashDir = "M3O_STORE_CRASH_DIR"
	crashTag = "M3O_STORE_CRASH_TAG"
)

func TestMain(m *testing.M) {
	if dir := os.Getenv(crashDir); dir != "" {
		if err := writeForEver(dir, os.Getenv(crashTag)); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
	}
	os.Exit(m.Run())
}

// writeForEver prints each write once it is acknowledged, never before.
func writeForEver(dir, tag string) error {
	ctx := context.Background()
	s, err := Open(ctx, Config{Dir: dir})
	if err != nil {
		return err
	}
	b, err := NewBucket[rec](ctx, s, "things")
	if err != nil {
		return err
	}
	l, err := s.Log(ctx, "lines", LogOptions{})
	if err != nil {
		return err
	}
	var mu sync.Mutex // guards os.Stdout
	say := func(format string, args ...any) {
		mu.Lock()
		defer mu.Unlock()
		fmt.Printf(format+"\n", args...)
	}
	errs := make(chan error)
	for n := range 4 {
		go func() {
			w := fmt.Sprint(tag, n)
			for i := 1; ; i++ {
				// One key made, one changed in place, one made and deleted, one line.
				if _, err := b.Create(ctx, fmt.Sprintf("%s/%d", w, i), rec{N: i}); err != nil {
					errs <- err
					return
				}
				say("key %s/%d %d", w, i, i)
				if _, err := b.Put(ctx, fmt.Sprintf("count-%s", w), rec{N: i}); err != nil {
					errs <- err
					return
				}
				say("count count-%s %d", w, i)
				if err := b.Delete(ctx, fmt.Sprintf("%s/%d", w, i-3), 0); err != nil {
					errs <- err
					return
				}
				say("gone %s/%d 0", w, i-3)
				if _, err := l.Append(ctx, "log-"+w, fmt.Append(nil, i)); err != nil {
					errs <- err
					return
				}
				say("line log-%s %d", w, i)
			}
		}()
	}
	return <-errs
}

func TestEveryAcknowledgedWriteSurvivesKill9(t *testing.T) {
	dir := t.TempDir()
	// The same directory again: recovery must work on what recovery left.
	var acked []string
	for round := range 3 {
		acked = append(acked, crash(t, dir, fmt.Sprintf("r%dw", round), 150+137*round)...)
		checkAcked(t, dir, acked)
	}
}

// crash lets a process write, kills it after so many acknowledged writes, and
// returns all it said.
func crash(t *testing.T, dir, tag string, after int) []string {
	t.Helper()
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), crashDir+"="+dir, crashTag+"="+tag)
	cmd.Stderr = os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	limit := time.AfterFunc(3*time.Minute, func() { _ = cmd.Process.Kill() })
	defer limit.Stop()
	var acked []string
	sc := bufio.NewScanner(out)
	for sc.Scan() {
		acked = append(acked, sc.Text())
		if len(acked) == after {
			if err := cmd.Process.Kill(); err != nil {
				t.Fatal(err)
			}
		}
	}
	_ = cmd.Wait() // "signal: killed"
	if len(acked) < after {
		t.Fatalf("the process ended by itself after %d writes", len(acked))
	}
	return acked
}

func checkAcked(t *testing.T, dir string, acked []string) {
	t.Helper()
	s, err := Open(t.Context(), Config{Dir: dir})
	if err != nil {
		t.Fatalf("open after kill -9: %v", err)
	}
	defer func() {
		if err := s.Close(); err != nil {
			t.Error(err)
		}
	}()
	b := bucket(t, s)
	last := map[string]string{} // what was said last of each thing
	for _, line := range acked {
		w := strings.Fields(line)
		kind, name := w[0], w[1]
		if kind == "gone" {
			kind = "key" // the same record
		}
		last[kind+" "+name] = line
	}
	logged := map[string]int{}
	for r, err := range logOf(t, s, LogOptions{}).Read(t.Context(), "", 0, false) {
		if err != nil {
			t.Fatal(err)
		}
		logged[r.Subject]++
	}
	for _, line := range last {
		var kind, name string
		var n int
		if _, err := fmt.Sscan(line, &kind, &name, &n); err != nil {
			t.Fatal(err)
		}
		switch v, _, err := b.Get(t.Context(), name); kind {
		case "key":
			// Its deletion may have been written without being acknowledged.
			if m3o.KindOf(err) == m3o.NotFound && last["key "+next(name, 3)] != "" {
				continue
			}
			if err != nil || v.N != n {
				t.Errorf("acknowledged %q, found %v, %v", line, v, err)
			}
		case "count":
			if err != nil || v.N < n || v.N > n+1 {
				t.Errorf("acknowledged %q, found %v, %v", line, v, err)
			}
		case "gone":
			if m3o.KindOf(err) != m3o.NotFound {
				t.Errorf("acknowledged %q, found %v, %v", line, v, err)
			}
		case "line":
			if logged[name] < n || logged[name] > n+1 {
				t.Errorf("acknowledged %q, found %d lines", line, logged[name])
			}
		}
	}
	if _, err := b.Put(t.Context(), "after", rec{}); err != nil {
		t.Errorf("write after recovery: %v", err)
	}
}

// next is the key by steps after "w0/5".
func next(name string, by int) string {
	w, n, _ := strings.Cut(name, "/")
	var i int
	_, _ = fmt.Sscan(n, &i)
	return fmt.Sprintf("%s/%d", w, i+by)
}

// smallDisk mounts a file system of so many bytes.
func smallDisk(t *testing.T, size int64) string {
	t.Helper()
	need.Root(t)
	dir := t.TempDir()
	if err := syscall.Mount("tmpfs", dir, "tmpfs", 0, fmt.Sprintf("size=%d", size)); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := syscall.Unmount(dir, 0); err != nil {
			t.Errorf("unmount: %v", err)
		}
	})
	return dir
}

// fill leaves so many bytes free and returns the file that does it.
func fill(t *testing.T, dir string, leave int64) string {
	t.Helper()
	free, err := freeBytes(dir)
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(dir, "filler")
	if err := os.WriteFile(path, make([]byte, free-leave), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

func TestDiskFullIsSaidAndPasses(t *testing.T) {
	dir := smallDisk(t, 32<<20)
	s := open(t, Config{Dir: filepath.Join(dir, "store"), Reserve: 8 << 20})
	b, l := bucket(t, s), logOf(t, s, LogOptions{})
	put(t, b, "before", 1)
	filler := fill(t, dir, 4<<20)
	_, err := b.Put(t.Context(), "a", rec{})
	wantDiskFull(t, err)
	_, err = l.Append(t.Context(), "a", []byte("x"))
	wantDiskFull(t, err)
	if v, _, err := b.Get(t.Context(), "before"); err != nil || v.N != 1 {
		t.Errorf("reading while the disk is full: %v, %v", v, err)
	}
	if err := b.Delete(t.Context(), "before", 0); err != nil {
		t.Errorf("deleting while the disk is full: %v", err)
	}
	if err := os.Remove(filler); err != nil {
		t.Fatal(err)
	}
	put(t, b, "a", 2)
}

// Somebody else may take the reserve between our look and the write. The
// engine then refuses the stream for good; Run puts that right.
func TestDiskFullUnderTheEngineIsHealed(t *testing.T) {
	dir := smallDisk(t, 32<<20)
	s := open(t, Config{Dir: filepath.Join(dir, "store"), Reserve: 4 << 10})
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error)
	go func() { done <- s.Run(ctx) }()
	b := bucket(t, s)
	w := watching(t, b, "")
	expect(t, w, "synced")
	put(t, b, "before", 1)
	expect(t, w, "before=1")
	filler := fill(t, dir, 64<<10)
	big := rec{Name: strings.Repeat("x", 512<<10)}
	wctx, wcancel := context.WithTimeout(ctx, 2*time.Second)
	_, err := b.Put(wctx, "big", big)
	wcancel()
	wantDiskFull(t, err)
	if err := os.Remove(filler); err != nil {
		t.Fatal(err)
	}
	eventually(t, "write after there is room again", func() bool {
		wctx, wcancel := context.WithTimeout(ctx, time.Second)
		defer wcancel()
		_, err := b.Put(wctx, "after", rec{N: 2})
		return err == nil
	})
	if v, _, err := b.Get(ctx, "before"); err != nil || v.N != 1 {
		t.Errorf("what was acknowledged before: %v, %v", v, err)
	}
	eventually(t, "the watch goes on", func() bool { return <-w == "after=2" })
	cancel()
	if err := <-done; err != nil {
		t.Errorf("Run = %v", err)
	}
}

func wantDiskFull(t *testing.T, err error) {
	t.Helper()
	wantKind(t, err, m3o.Unavailable)
	if err == nil || !strings.Contains(err.Error(), "disk full") || m3o.HintOf(err) == "" {
		t.Errorf("error %v with hint %q does not say that the disk is full and what to do", err, m3o.HintOf(err))
	}
}
