package store

import (
	"context"
	"fmt"
	"net"
	"strconv"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/m3o/m3o/internal/need"
)

// watching runs a watch and gives its changes as text.
func watching(t *testing.T, b *Bucket[rec], prefix string) <-chan string {
	t.Helper()
	out := make(chan string, 1000)
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() {
		defer close(done)
		for c, err := range b.Watch(ctx, prefix) {
			switch {
			case err != nil:
				out <- "error: " + err.Error()
			case c.Synced:
				out <- "synced"
			case c.Deleted:
				out <- "-" + c.Key
			default:
				out <- fmt.Sprintf("%s=%d", c.Key, c.Value.N)
			}
		}
	}()
	t.Cleanup(func() { cancel(); <-done })
	return out
}

func expect(t *testing.T, ch <-chan string, want ...string) {
	t.Helper()
	for i, w := range want {
		select {
		case got := <-ch:
			if got != w {
				t.Fatalf("change %d is %q, want %q", i, got, w)
			}
		case <-time.After(time.Minute):
			t.Fatalf("change %d, %q, does not come", i, w)
		}
	}
}

func put(t *testing.T, b *Bucket[rec], key string, n int) {
	t.Helper()
	if _, err := b.Put(t.Context(), key, rec{N: n}); err != nil {
		t.Fatal(err)
	}
}

func TestWatch(t *testing.T) {
	both(t, func(t *testing.T, s *Store) {
		b := bucket(t, s)
		expect(t, watching(t, b, ""), "synced")
		put(t, b, "a/1", 1)
		put(t, b, "a/2", 2)
		put(t, b, "b/1", 3)
		put(t, b, "a/1", 4)
		put(t, b, "a/old", 5)
		if err := b.Delete(t.Context(), "a/old", 0); err != nil {
			t.Fatal(err)
		}
		w, all, none := watching(t, b, "a/"), watching(t, b, ""), watching(t, b, "none/")
		expect(t, w, "a/2=2", "a/1=4", "synced")
		expect(t, all, "a/2=2", "b/1=3", "a/1=4", "synced")
		expect(t, none, "synced")
		put(t, b, "b/1", 6)
		put(t, b, "a/3", 7)
		if err := b.Delete(t.Context(), "a/2", 0); err != nil {
			t.Fatal(err)
		}
		expect(t, w, "a/3=7", "-a/2")
		expect(t, all, "b/1=6", "a/3=7", "-a/2")
	})
}

func TestWatchAcrossReconnectMissesNothing(t *testing.T) {
	dir := t.TempDir()
	addrs, err := need.Addrs(1)
	if err != nil {
		t.Fatal(err)
	}
	_, given, _ := net.SplitHostPort(addrs[0])
	port, err := strconv.Atoi(given)
	if err != nil {
		t.Fatal(err)
	}
	addr, srv := external(t, dir, port) // and again, so that nobody else may have the port in between
	s := open(t, Config{URL: addr})
	b := bucket(t, s)
	w := watching(t, b, "")
	expect(t, w, "synced")
	put(t, b, "a", 1)
	expect(t, w, "a=1")
	stop(srv)
	_, srv = external(t, dir, port)
	t.Cleanup(func() { stop(srv) })
	// Another client writes before our watch can be back.
	other := bucket(t, open(t, Config{URL: addr}))
	put(t, other, "b", 2)
	if err := other.Delete(t.Context(), "a", 0); err != nil {
		t.Fatal(err)
	}
	expect(t, w, "b=2", "-a")
	put(t, other, "c", 3)
	expect(t, w, "c=3")
}

func TestWatchAcrossEngineRestartMissesNothing(t *testing.T) {
	s := open(t, Config{})
	b := bucket(t, s)
	w := watching(t, b, "")
	expect(t, w, "synced")
	put(t, b, "a", 1)
	expect(t, w, "a=1")
	if err := s.engine.restart(); err != nil {
		t.Fatal(err)
	}
	eventually(t, "write again", func() bool {
		_, err := b.Put(t.Context(), "b", rec{N: 2})
		return err == nil
	})
	expect(t, w, "b=2")
}

// eventually polls until cond holds.
func eventually(t *testing.T, what string, cond func() bool) {
	t.Helper()
	tick := time.NewTicker(10 * time.Millisecond)
	defer tick.Stop()
	end := time.After(time.Minute)
	for !cond() {
		select {
		case <-tick.C:
		case <-end:
			t.Fatal("does not come about: " + what)
		}
	}
}

func logOf(t *testing.T, s *Store, o LogOptions) *Log {
	t.Helper()
	l, err := s.Log(t.Context(), "lines", o)
	if err != nil {
		t.Fatal(err)
	}
	return l
}

func lines(t *testing.T, seq func(func(Record, error) bool)) []string {
	t.Helper()
	var got []string
	last := uint64(0)
	for r, err := range seq {
		if err != nil {
			t.Fatal(err)
		}
		if r.Seq <= last || time.Since(r.Time) > time.Hour {
			t.Errorf("record %+v after number %d", r, last)
		}
		last = r.Seq
		got = append(got, r.Subject+":"+string(r.Data))
	}
	return got
}

func TestLog(t *testing.T) {
	both(t, func(t *testing.T, s *Store) {
		ctx, l := t.Context(), logOf(t, s, LogOptions{})
		var seqs []uint64
		for i := range 6 {
			n, err := l.Append(ctx, fmt.Sprintf("hello/web.%d", i%2), fmt.Append(nil, i))
			if err != nil {
				t.Fatal(err)
			}
			seqs = append(seqs, n)
		}
		if _, err := l.Append(ctx, "other", []byte("x")); err != nil {
			t.Fatal(err)
		}
		for _, c := range []struct {
			name string
			seq  func(func(Record, error) bool)
			want []string
		}{
			{"one subject", l.Read(ctx, "hello/web.0", 0, false), []string{"hello/web.0:0", "hello/web.0:2", "hello/web.0:4"}},
			{"from", l.Read(ctx, "hello/web.0", seqs[2], false), []string{"hello/web.0:2", "hello/web.0:4"}},
			{"below", l.Read(ctx, "hello/", seqs[4], false), []string{"hello/web.0:4", "hello/web.1:5"}},
			{"all", l.Read(ctx, "", seqs[5], false), []string{"hello/web.1:5", "other:x"}},
			{"nothing", l.Read(ctx, "nobody", 0, false), nil},
			{"tail 2", l.Tail(ctx, "hello/web.1", 2, false), []string{"hello/web.1:3", "hello/web.1:5"}},
			{"tail 0", l.Tail(ctx, "hello/web.1", 0, false), nil},
			{"tail 99", l.Tail(ctx, "hello/web.1", 99, false), []string{"hello/web.1:1", "hello/web.1:3", "hello/web.1:5"}},
			{"tail of nothing", l.Tail(ctx, "nobody", 3, false), nil},
			{"tail of all", l.Tail(ctx, "", 2, false), []string{"hello/web.1:5", "other:x"}},
		} {
			if d := cmp.Diff(c.want, lines(t, c.seq)); d != "" {
				t.Errorf("%s (-want +got):\n%s", c.name, d)
			}
		}
		if err := l.Purge(ctx, "hello/"); err != nil {
			t.Fatal(err)
		}
		if d := cmp.Diff([]string{"other:x"}, lines(t, l.Read(ctx, "", 0, false))); d != "" {
			t.Errorf("after Purge (-want +got):\n%s", d)
		}
	})
}

func TestLogFollows(t *testing.T) {
	both(t, func(t *testing.T, s *Store) {
		l := logOf(t, s, LogOptions{Relaxed: true})
		add := func(text string) {
			t.Helper()
			if _, err := l.Append(t.Context(), "hello", []byte(text)); err != nil {
				t.Fatal(err)
			}
		}
		add("1")
		add("2")
		ctx, cancel := context.WithCancel(t.Context())
		defer cancel()
		var got []string
		for r, err := range l.Tail(ctx, "hello", 1, true) {
			if err != nil {
				t.Fatal(err)
			}
			got = append(got, string(r.Data))
			switch string(r.Data) {
			case "2":
				add("3")
			case "3":
				cancel() // must end the loop by itself
			}
		}
		if d := cmp.Diff([]string{"2", "3"}, got); d != "" {
			t.Errorf("(-want +got):\n%s", d)
		}
	})
}

func TestLogKeepsTheNewest(t *testing.T) {
	s := open(t, Config{})
	l := logOf(t, s, LogOptions{MaxPerSubject: 2})
	for i := range 5 {
		if _, err := l.Append(t.Context(), "a", fmt.Append(nil, i)); err != nil {
			t.Fatal(err)
		}
	}
	if d := cmp.Diff([]string{"a:3", "a:4"}, lines(t, l.Read(t.Context(), "", 0, false))); d != "" {
		t.Errorf("(-want +got):\n%s", d)
	}
	// The bounds are those of the last opener.
	l = logOf(t, s, LogOptions{MaxPerSubject: 1})
	if d := cmp.Diff([]string{"a:4"}, lines(t, l.Read(t.Context(), "", 0, false))); d != "" {
		t.Errorf("after narrowing (-want +got):\n%s", d)
	}
}

func TestWatchesLeaveNoConsumerBehind(t *testing.T) {
	s := open(t, Config{})
	b := bucket(t, s)
	for range 3 {
		for c, err := range b.Watch(t.Context(), "") {
			if err != nil {
				t.Fatal(err)
			}
			if c.Synced {
				break
			}
		}
		if _, err := b.List(t.Context(), ""); err != nil {
			t.Fatal(err)
		}
	}
	st, err := s.js.Stream(t.Context(), b.stream)
	if err != nil {
		t.Fatal(err)
	}
	if n := st.CachedInfo().State.Consumers; n != 0 {
		t.Errorf("%d consumers are left behind", n)
	}
}
