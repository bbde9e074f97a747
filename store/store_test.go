package store

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/nats-io/nats-server/v2/server"

	"github.com/m3o/m3o"
	"github.com/m3o/m3o/internal/need"
)

type rec struct {
	Name string
	N    int
}

func open(t testing.TB, cfg Config) *Store {
	t.Helper()
	if cfg.Dir == "" && cfg.URL == "" {
		cfg.Dir = t.TempDir()
	}
	s, err := Open(context.Background(), cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := s.Close(); err != nil {
			t.Errorf("Close: %v", err)
		}
	})
	return s
}

func bucket(t testing.TB, s *Store) *Bucket[rec] {
	t.Helper()
	b, err := NewBucket[rec](t.Context(), s, "things")
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// external starts a NATS server of its own on port, 0 for any, as an operator
// would run it.
func external(t testing.TB, dir string, port int) (url string, srv *server.Server) {
	t.Helper()
	if port == 0 {
		port = server.RANDOM_PORT
	}
	srv, err := server.NewServer(&server.Options{Host: "127.0.0.1", Port: port, JetStream: true, StoreDir: dir, NoSigs: true, NoLog: true})
	if err != nil {
		t.Fatal(err)
	}
	srv.Start()
	if !srv.ReadyForConnections(time.Minute) {
		t.Fatal("external server does not start")
	}
	return srv.ClientURL(), srv
}

func stop(srv *server.Server) {
	srv.Shutdown()
	srv.WaitForShutdown()
}

// both runs a test with the embedded and with an external server.
func both(t *testing.T, test func(*testing.T, *Store)) {
	t.Run("embedded", func(t *testing.T) {
		t.Parallel()
		test(t, open(t, Config{}))
	})
	t.Run("external", func(t *testing.T) {
		t.Parallel()
		url, srv := external(t, t.TempDir(), 0)
		t.Cleanup(func() { stop(srv) })
		test(t, open(t, Config{URL: url}))
	})
}

func wantKind(t testing.TB, err error, want m3o.Kind) {
	t.Helper()
	if err == nil || m3o.KindOf(err) != want {
		t.Errorf("error is %v (%v), want kind %v", err, m3o.KindOf(err), want)
	}
}

func TestBucket(t *testing.T) {
	both(t, func(t *testing.T, s *Store) {
		ctx, b := t.Context(), bucket(t, s)
		if _, _, err := b.Get(ctx, "a"); m3o.KindOf(err) != m3o.NotFound {
			t.Errorf("Get of nothing = %v, want NotFound", err)
		}
		r1, err := b.Create(ctx, "a", rec{"one", 1})
		if err != nil {
			t.Fatal(err)
		}
		_, err = b.Create(ctx, "a", rec{"other", 1})
		wantKind(t, err, m3o.Conflict)
		r2, err := b.Update(ctx, "a", rec{"two", 2}, r1)
		if err != nil || r2 <= r1 {
			t.Fatalf("Update = %d, %v after %d", r2, err, r1)
		}
		_, err = b.Update(ctx, "a", rec{"late", 3}, r1)
		wantKind(t, err, m3o.Conflict)
		got, rev, err := b.Get(ctx, "a")
		if err != nil || rev != r2 || got != (rec{"two", 2}) {
			t.Errorf("Get = %v, %d, %v, want the second value at %d", got, rev, err, r2)
		}
		wantKind(t, b.Delete(ctx, "a", r1), m3o.Conflict)
		if err := b.Delete(ctx, "a", r2); err != nil {
			t.Fatal(err)
		}
		_, _, err = b.Get(ctx, "a")
		wantKind(t, err, m3o.NotFound)
		_, err = b.Update(ctx, "a", rec{}, r2)
		wantKind(t, err, m3o.Conflict)
		r3, err := b.Create(ctx, "a", rec{"again", 1})
		if err != nil || r3 <= r2 {
			t.Errorf("Create after Delete = %d, %v, want more than %d", r3, err, r2)
		}
		if err := b.Delete(ctx, "a", 0); err != nil {
			t.Errorf("Delete at any revision: %v", err)
		}
		if err := b.Delete(ctx, "never", 0); err != nil {
			t.Errorf("Delete of nothing: %v", err)
		}
		if _, err := b.Put(ctx, "a", rec{"put", 1}); err != nil {
			t.Error(err)
		}
	})
}

func TestListIsInKeyOrderAndByPrefix(t *testing.T) {
	both(t, func(t *testing.T, s *Store) {
		ctx, b := t.Context(), bucket(t, s)
		keys := []string{"b", "a/2", "a/10", "a/1/x", "ab", "a", "ü/ß", "a b/*", "a//>", "a.b", "end/", "=41"}
		for i, k := range keys {
			if _, err := b.Put(ctx, k, rec{k, i}); err != nil {
				t.Fatalf("Put %q: %v", k, err)
			}
		}
		if _, err := b.Put(ctx, "a/gone", rec{}); err != nil {
			t.Fatal(err)
		}
		if err := b.Delete(ctx, "a/gone", 0); err != nil {
			t.Fatal(err)
		}
		slices.Sort(keys)
		for _, prefix := range []string{"", "a", "a/", "a/1", "a/1/", "a//", "ü/", "nothing/", "end/"} {
			var want []string
			for _, k := range keys {
				if strings.HasPrefix(k, prefix) {
					want = append(want, k)
				}
			}
			list, err := b.List(ctx, prefix)
			if err != nil {
				t.Fatalf("List %q: %v", prefix, err)
			}
			var got []string
			for _, e := range list {
				if e.Value.Name != e.Key || e.Rev == 0 {
					t.Errorf("entry %q is %+v", e.Key, e)
				}
				got = append(got, e.Key)
			}
			if d := cmp.Diff(want, got); d != "" {
				t.Errorf("List %q (-want +got):\n%s", prefix, d)
			}
		}
	})
}

func TestListLongerThanABatch(t *testing.T) {
	url, srv := external(t, t.TempDir(), 0) // it does not sync, so this is quick
	t.Cleanup(func() { stop(srv) })
	s := open(t, Config{URL: url})
	ctx, b := t.Context(), bucket(t, s)
	const n = 2*batchMessages + 17
	for i := range n {
		if _, err := b.Put(ctx, fmt.Sprintf("k/%05d", i), rec{N: i}); err != nil {
			t.Fatal(err)
		}
	}
	list, err := b.List(ctx, "k/")
	if err != nil || len(list) != n || list[n-1].Value.N != n-1 {
		t.Errorf("List gives %d records, %v, want %d", len(list), err, n)
	}
}

func TestUpdateRace(t *testing.T) {
	both(t, func(t *testing.T, s *Store) {
		ctx, b := t.Context(), bucket(t, s)
		if _, err := b.Create(ctx, "count", rec{}); err != nil {
			t.Fatal(err)
		}
		const writers, each = 8, 10
		var wg sync.WaitGroup
		for range writers {
			wg.Go(func() {
				for done := 0; done < each; {
					v, rev, err := b.Get(ctx, "count")
					if err != nil {
						t.Error(err)
						return
					}
					v.N++
					switch _, err = b.Update(ctx, "count", v, rev); {
					case err == nil:
						done++
					case m3o.KindOf(err) != m3o.Conflict:
						t.Error(err)
						return
					}
				}
			})
		}
		wg.Wait()
		if v, _, err := b.Get(ctx, "count"); err != nil || v.N != writers*each {
			t.Errorf("count is %d, %v, want %d: an update was lost", v.N, err, writers*each)
		}
	})
}

func TestCreateRaceHasOneWinner(t *testing.T) {
	s := open(t, Config{})
	ctx, b := t.Context(), bucket(t, s)
	for round := range 5 {
		key := fmt.Sprint("k", round)
		var wg sync.WaitGroup
		won := make(chan int, 8)
		for i := range 8 {
			wg.Go(func() {
				switch _, err := b.Create(ctx, key, rec{N: i}); {
				case err == nil:
					won <- i
				case m3o.KindOf(err) != m3o.Conflict:
					t.Error(err)
				}
			})
		}
		wg.Wait()
		if len(won) != 1 {
			t.Fatalf("%d writers created %s", len(won), key)
		}
		if v, _, err := b.Get(ctx, key); err != nil || v.N != <-won {
			t.Errorf("%s is %v, %v, not the winner's", key, v, err)
		}
	}
}

func TestLimits(t *testing.T) {
	s := open(t, Config{})
	ctx, b := t.Context(), bucket(t, s)
	fits := strings.Repeat("x", MaxValue-len(`{"Name":"","N":0}`))
	if _, err := b.Put(ctx, "big", rec{Name: fits}); err != nil {
		t.Errorf("a value of exactly MaxValue: %v", err)
	}
	_, err := b.Put(ctx, "big", rec{Name: fits + "x"})
	wantKind(t, err, m3o.Invalid)
	for _, key := range []string{"", "\xff", strings.Repeat("k", maxKey+1)} {
		_, err := b.Put(ctx, key, rec{})
		wantKind(t, err, m3o.Invalid)
		_, _, err = b.Get(ctx, key)
		wantKind(t, err, m3o.Invalid)
	}
	l, err := s.Log(ctx, "lines", LogOptions{})
	if err != nil {
		t.Fatal(err)
	}
	_, err = l.Append(ctx, "a", make([]byte, MaxValue+1))
	wantKind(t, err, m3o.Invalid)
	if _, err := NewBucket[rec](ctx, s, "Bad Name"); err == nil {
		t.Error("a bad bucket name was taken")
	}
}

func TestRecordOfANewerVersionOpens(t *testing.T) {
	s := open(t, Config{})
	ctx := t.Context()
	newer, err := NewBucket[map[string]any](ctx, s, "things")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := newer.Put(ctx, "a", map[string]any{"Name": "n", "N": 1, "Added": []int{1}}); err != nil {
		t.Fatal(err)
	}
	if v, _, err := bucket(t, s).Get(ctx, "a"); err != nil || v != (rec{"n", 1}) {
		t.Errorf("Get = %v, %v", v, err)
	}
	if _, err := newer.Put(ctx, "b", map[string]any{"Name": 5}); err != nil {
		t.Fatal(err)
	}
	if _, _, err := bucket(t, s).Get(ctx, "b"); err == nil || !strings.Contains(err.Error(), "things/b") {
		t.Errorf("a record of another shape gives %v, want an error that names it", err)
	}
}

func TestStateSurvivesReopen(t *testing.T) {
	dir := t.TempDir()
	s, err := Open(t.Context(), Config{Dir: dir})
	if err != nil {
		t.Fatal(err)
	}
	rev, err := bucket(t, s).Create(t.Context(), "a", rec{"one", 1})
	if err != nil {
		t.Fatal(err)
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	if _, err := bucketErr(s); m3o.KindOf(err) != m3o.Unavailable {
		t.Errorf("a closed store gives %v, want Unavailable", err)
	}
	s = open(t, Config{Dir: dir})
	if v, r, err := bucket(t, s).Get(t.Context(), "a"); err != nil || r != rev || v.N != 1 {
		t.Errorf("after reopening Get = %v, %d, %v", v, r, err)
	}
	if fi, err := os.Stat(dir); err != nil || fi.Mode().Perm() != 0o700 {
		t.Errorf("directory has mode %v, %v, want 0700", fi.Mode(), err)
	}
}

func bucketErr(s *Store) (*Bucket[rec], error) {
	return NewBucket[rec](context.Background(), s, "things")
}

func TestRunEndsWithItsContext(t *testing.T) {
	s := open(t, Config{})
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error)
	go func() { done <- s.Run(ctx) }()
	b := bucket(t, s)
	ended := make(chan error, 1)
	synced := make(chan bool)
	go func() {
		for c, err := range b.Watch(context.Background(), "") {
			if c.Synced {
				close(synced)
			}
			if err != nil {
				ended <- err
			}
		}
	}()
	<-synced
	cancel()
	if err := <-done; err != nil {
		t.Errorf("Run = %v", err)
	}
	wantKind(t, <-ended, m3o.Unavailable)
}

// What Close refuses was not written, and what it let finish was.
func TestCloseBetweenWrites(t *testing.T) {
	dir := t.TempDir()
	s := open(t, Config{Dir: dir})
	b := bucket(t, s)
	var mu sync.Mutex // guards acked and refused
	var acked, refused []string
	var wg sync.WaitGroup
	warm := make(chan bool, 1000)
	for w := range 6 {
		wg.Go(func() {
			for i := 0; ; i++ {
				key := fmt.Sprintf("%d/%d", w, i)
				_, err := b.Put(context.Background(), key, rec{N: i})
				mu.Lock()
				if err != nil {
					wantKind(t, err, m3o.Unavailable)
					refused = append(refused, key)
					mu.Unlock()
					return
				}
				acked = append(acked, key)
				mu.Unlock()
				select {
				case warm <- true:
				default:
				}
			}
		})
	}
	for range 20 {
		<-warm
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	wg.Wait()
	b = bucket(t, open(t, Config{Dir: dir}))
	for _, key := range acked {
		if _, _, err := b.Get(t.Context(), key); err != nil {
			t.Errorf("%s was acknowledged: %v", key, err)
		}
	}
	for _, key := range refused {
		if _, _, err := b.Get(t.Context(), key); m3o.KindOf(err) != m3o.NotFound {
			t.Errorf("%s was refused: %v", key, err)
		}
	}
}

func TestSecondOpenerIsRefused(t *testing.T) {
	dir := t.TempDir()
	s := open(t, Config{Dir: dir})
	_, err := Open(t.Context(), Config{Dir: dir})
	wantKind(t, err, m3o.Unavailable)
	for _, word := range []string{dir, strconv.Itoa(os.Getpid())} {
		if err == nil || !strings.Contains(err.Error(), word) {
			t.Errorf("error %v does not name %s", err, word)
		}
	}
	if _, err := bucket(t, s).Put(t.Context(), "a", rec{}); err != nil {
		t.Errorf("the first opener suffers: %v", err)
	}
}

func TestNoPortIsOpened(t *testing.T) {
	before := listening(t)
	open(t, Config{})
	for _, l := range listening(t) {
		if !slices.Contains(before, l) {
			t.Errorf("the store listens: %s", l)
		}
	}
}

// listening gives the inodes of the listening TCP sockets of this process.
func listening(t *testing.T) []string {
	t.Helper()
	own := map[string]bool{}
	fds, err := filepath.Glob("/proc/self/fd/*")
	if err != nil || len(fds) == 0 {
		t.Skip("need proc: no /proc/self/fd")
	}
	for _, fd := range fds {
		if to, err := os.Readlink(fd); err == nil {
			own[to] = true
		}
	}
	var all []string
	for _, f := range []string{"/proc/self/net/tcp", "/proc/self/net/tcp6"} {
		data, err := os.ReadFile(f)
		if err != nil && !errors.Is(err, os.ErrNotExist) {
			t.Fatal(err)
		}
		for line := range strings.Lines(string(data)) {
			w := strings.Fields(line)
			if len(w) > 9 && w[3] == "0A" && own["socket:["+w[9]+"]"] {
				all = append(all, w[1])
			}
		}
	}
	return all
}

func TestExternalServerIsAway(t *testing.T) {
	_, err := Open(t.Context(), Config{URL: "nats://" + need.Nobody(t)})
	wantKind(t, err, m3o.Unavailable)

	url, srv := external(t, t.TempDir(), 0)
	s := open(t, Config{URL: url})
	b := bucket(t, s)
	stop(srv)
	_, err = b.Put(t.Context(), "a", rec{})
	wantKind(t, err, m3o.Unavailable)
	_, err = b.List(t.Context(), "")
	wantKind(t, err, m3o.Unavailable)
}

func TestExternalServerWithoutJetStream(t *testing.T) {
	srv, err := server.NewServer(&server.Options{Host: "127.0.0.1", Port: server.RANDOM_PORT, NoSigs: true, NoLog: true})
	if err != nil {
		t.Fatal(err)
	}
	srv.Start()
	t.Cleanup(func() { stop(srv) })
	if !srv.ReadyForConnections(time.Minute) {
		t.Fatal("server does not start")
	}
	_, err = Open(t.Context(), Config{URL: srv.ClientURL()})
	wantKind(t, err, m3o.Unavailable)
}

func TestConfigValidateReportsEveryFault(t *testing.T) {
	err := Config{Creds: "x", Replicas: 9, Reserve: -1}.Validate()
	wantKind(t, err, m3o.Invalid)
	for _, word := range []string{"directory", "credentials", "replicas", "reserve"} {
		if !strings.Contains(err.Error(), word) {
			t.Errorf("%q does not speak of %s", err, word)
		}
	}
}

func TestCancelledContext(t *testing.T) {
	s := open(t, Config{})
	b := bucket(t, s)
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := b.Put(ctx, "a", rec{}); !errors.Is(err, context.Canceled) {
		t.Errorf("Put = %v, want context canceled", err)
	}
	if _, err := b.List(ctx, ""); !errors.Is(err, context.Canceled) {
		t.Errorf("List = %v, want context canceled", err)
	}
}

func BenchmarkOpen(b *testing.B) {
	dir := b.TempDir()
	for b.Loop() {
		s, err := Open(b.Context(), Config{Dir: dir})
		if err != nil {
			b.Fatal(err)
		}
		if err := s.Close(); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkPut(b *testing.B) {
	bu := bucket(b, open(b, Config{}))
	for b.Loop() {
		if _, err := bu.Put(b.Context(), "a", rec{"x", 1}); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkGet(b *testing.B) {
	bu := bucket(b, open(b, Config{}))
	if _, err := bu.Put(b.Context(), "a", rec{"x", 1}); err != nil {
		b.Fatal(err)
	}
	for b.Loop() {
		if _, _, err := bu.Get(b.Context(), "a"); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkList100(b *testing.B) {
	bu := bucket(b, open(b, Config{}))
	for i := range 100 {
		if _, err := bu.Put(b.Context(), fmt.Sprintf("a/%d", i), rec{"x", 1}); err != nil {
			b.Fatal(err)
		}
	}
	for b.Loop() {
		if _, err := bu.List(b.Context(), "a/"); err != nil {
			b.Fatal(err)
		}
	}
}
