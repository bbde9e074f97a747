package webhook

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	goruntime "runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/m3o/m3o"
	"github.com/m3o/m3o/store"
)

func openStore(t *testing.T, dir string) *store.Store {
	t.Helper()
	st, err := store.Open(t.Context(), store.Config{Dir: dir})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := st.Close(); err != nil {
			t.Error(err)
		}
	})
	return st
}

// run opens a queue and runs it until the test ends or stop is called.
func runQueue(t *testing.T, st *store.Store, work Work) (q *Queue, stop func()) {
	t.Helper()
	q, err := OpenQueue(t.Context(), st, work, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	q.backoff = func(int) time.Duration { return time.Millisecond }
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- q.Run(ctx) }()
	stop = sync.OnceFunc(func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
	t.Cleanup(stop)
	return q, stop
}

func event(id string) Event {
	return Event{Provider: GitHub, Delivery: id, Name: "push", Kind: Push, Repo: "a/b", Changes: []Change{{Ref: "refs/heads/main", After: fmt.Sprintf("%040s", id)}}}
}

// A thousand deliveries at once, each sent twice: all are answered, each is
// worked on once, those of a hook in their order, and little memory is held.
func TestBurst(t *testing.T) {
	const n, hooks = 1000, 5
	var mu sync.Mutex
	worked := map[string][]int{}
	q, _ := runQueue(t, openStore(t, t.TempDir()), func(_ context.Context, d Delivery) (Result, func(context.Context) (Result, error), error) {
		mu.Lock()
		defer mu.Unlock()
		i, err := strconv.Atoi(strings.TrimLeft(d.Event.Changes[0].After, "0"))
		worked[d.Hook] = append(worked[d.Hook], i)
		return Result{Done, "built"}, nil, err
	})
	rc := NewReceiver(func(_ context.Context, id string) (Hook, bool) { return Hook{id, GitHub, secret}, true }, q, slog.New(slog.DiscardHandler))
	srv := httptest.NewServer(rc)
	defer srv.Close()
	client := &http.Client{Transport: &http.Transport{MaxIdleConnsPerHost: n}}
	defer client.CloseIdleConnections()
	pad := strings.Repeat("x", 8000) // as large as a real push
	send := func(i int) (time.Duration, int, error) {
		body := fmt.Appendf(nil, `{"ref":"refs/heads/main","before":"%040d","after":"%040d","repository":{"full_name":"a/b"},"pad":%q}`, i-1, i, pad)
		req, err := http.NewRequestWithContext(t.Context(), http.MethodPost, fmt.Sprintf("%s/hooks/github/h%d", srv.URL, i%hooks), bytes.NewReader(body))
		if err != nil {
			return 0, 0, err
		}
		req.Header = sign(GitHub, "push", body, secret)
		req.Header.Set("X-GitHub-Delivery", strconv.Itoa(i))
		began := time.Now()
		res, err := client.Do(req)
		if err != nil {
			return 0, 0, err
		}
		defer res.Body.Close()
		_, err = io.Copy(io.Discard, res.Body)
		return time.Since(began), res.StatusCode, err
	}
	var before, after goruntime.MemStats
	goruntime.GC()
	goruntime.ReadMemStats(&before)
	var wg sync.WaitGroup
	took := make([]time.Duration, 2*n)
	// One sender a hook, so that the order is known; all hooks and the copies at once.
	for h := range hooks {
		for again := range 2 {
			wg.Go(func() {
				for i := h + hooks; i <= n; i += hooks {
					d, code, err := send(i)
					took[again*n+i-1] = d
					if err != nil || code != http.StatusAccepted {
						t.Errorf("delivery %d: %d %v, want 202", i, code, err)
					}
				}
			})
		}
	}
	wg.Wait()
	if err := q.Idle(t.Context()); err != nil {
		t.Fatal(err)
	}
	goruntime.GC()
	goruntime.ReadMemStats(&after)
	total := 0
	for h, is := range worked {
		if !slices.IsSorted(is) || len(slices.Compact(slices.Clone(is))) != len(is) {
			t.Errorf("%s: worked on %v, want each once and in order", h, is)
		}
		total += len(is)
	}
	if want := n - hooks + 1; total != want {
		t.Errorf("%d deliveries were worked on, want %d", total, want)
	}
	slices.Sort(took)
	t.Logf("%d deliveries: answered in p50 %v, p99 %v, at most %v; heap grew by %d KB", 2*total, took[n], took[2*n-2*n/100], took[2*n-1], (int64(after.HeapAlloc)-int64(before.HeapAlloc))>>10)
}

// All at once, nobody waiting for an answer before the next is sent.
func TestThousandDeliveriesAtOnceAreAnswered(t *testing.T) {
	q, _ := runQueue(t, openStore(t, t.TempDir()), func(context.Context, Delivery) (Result, func(context.Context) (Result, error), error) {
		return Result{Done, ""}, nil, nil
	})
	const n = 1000
	var wg sync.WaitGroup
	took := make([]time.Duration, n)
	start := make(chan struct{})
	for i := range n {
		wg.Go(func() {
			<-start
			began := time.Now()
			if err := q.Add(t.Context(), "h", event(strconv.Itoa(i))); err != nil {
				t.Errorf("delivery %d: %v", i, err)
			}
			took[i] = time.Since(began)
		})
	}
	close(start)
	wg.Wait()
	if err := q.Idle(t.Context()); err != nil {
		t.Fatal(err)
	}
	slices.Sort(took)
	t.Logf("on disk after p50 %v, p99 %v, at most %v", took[n/2], took[n-n/100], took[n-1])
}

func TestWorkIsTriedAgainWhereThatHelps(t *testing.T) {
	var mu sync.Mutex
	tries := map[string]int{}
	q, _ := runQueue(t, openStore(t, t.TempDir()), func(_ context.Context, d Delivery) (Result, func(context.Context) (Result, error), error) {
		mu.Lock()
		defer mu.Unlock()
		tries[d.ID]++
		switch {
		case d.ID == "away" && tries[d.ID] < 4:
			return Result{}, nil, m3o.Errorf(m3o.Unavailable, "the forge is away")
		case d.ID == "never":
			return Result{}, nil, m3o.Errorf(m3o.Unavailable, "the forge is away")
		case d.ID == "revoked":
			return Result{}, nil, m3o.Errorf(m3o.Denied, "the token was revoked")
		case d.ID == "late" && tries[d.ID] < 3:
			return Result{}, func(context.Context) (Result, error) { return Result{}, m3o.Errorf(m3o.Unavailable, "no builder") }, nil
		}
		return Result{}, func(context.Context) (Result, error) { return Result{Done, "live"}, nil }, nil
	})
	for _, id := range []string{"away", "never", "revoked", "late", "last"} {
		if err := q.Add(t.Context(), "h", event(id)); err != nil {
			t.Fatal(err)
		}
	}
	if err := q.Idle(t.Context()); err != nil {
		t.Fatal(err)
	}
	want := map[string]struct {
		state State
		note  string
		tries int
	}{"away": {Done, "live", 4}, "never": {Failed, "the forge is away", maxTries}, "revoked": {Failed, "the token was revoked", 1},
		"late": {Done, "live", 3}, "last": {Done, "live", 1}}
	for _, d := range q.List("h", 10) {
		w := want[d.ID]
		if d.State != w.state || d.Note != w.note || tries[d.ID] != w.tries {
			t.Errorf("%s: %s %q after %d tries, want %s %q after %d", d.ID, d.State, d.Note, tries[d.ID], w.state, w.note, w.tries)
		}
	}
	// A failed one that the forge sends again is tried again, a done one is not.
	if err := q.Add(t.Context(), "h", event("revoked")); err != nil {
		t.Errorf("a failed delivery, sent again: %v", err)
	}
	if err := q.Add(t.Context(), "h", event("away")); !errors.Is(err, ErrDuplicate) {
		t.Errorf("a delivery that was done, sent again: %v, want a duplicate", err)
	}
	if err := q.Replay(t.Context(), "h", "away"); err != nil {
		t.Errorf("replay: %v", err)
	}
	if err := q.Replay(t.Context(), "h", "unheard of"); m3o.KindOf(err) != m3o.NotFound {
		t.Errorf("replay of what never came: %v", err)
	}
	if err := q.Idle(t.Context()); err != nil {
		t.Fatal(err)
	}
	if tries["revoked"] != 2 || tries["away"] != 5 {
		t.Errorf("tries %v, want revoked twice and away five times", tries)
	}
}

// What was answered 202 is worked on, also when the process ended in between.
func TestRestartForgetsNothing(t *testing.T) {
	dir := t.TempDir()
	hold := make(chan struct{})
	st := openStore(t, dir)
	q, stop := runQueue(t, st, func(ctx context.Context, d Delivery) (Result, func(context.Context) (Result, error), error) {
		if d.ID == "first" {
			return Result{Done, "before"}, nil, nil
		}
		close(hold)
		<-ctx.Done()
		return Result{}, nil, ctx.Err()
	})
	for _, id := range []string{"first", "second", "third"} {
		if err := q.Add(t.Context(), "h", event(id)); err != nil {
			t.Fatal(err)
		}
	}
	<-hold
	stop()
	var got []string
	q, _ = runQueue(t, st, func(_ context.Context, d Delivery) (Result, func(context.Context) (Result, error), error) {
		got = append(got, d.ID+" "+strings.TrimLeft(d.Event.Changes[0].After, "0"))
		return Result{Done, "after"}, nil, nil
	})
	if err := q.Idle(t.Context()); err != nil {
		t.Fatal(err)
	}
	if want := []string{"second second", "third third"}; !slices.Equal(got, want) {
		t.Errorf("after the restart %q was worked on, want %q", got, want)
	}
	if err := q.Add(t.Context(), "h", event("first")); !errors.Is(err, ErrDuplicate) {
		t.Errorf("after a restart a known delivery is %v, want a duplicate", err)
	}
}

func TestReceiverAnswers(t *testing.T) {
	q, _ := runQueue(t, openStore(t, t.TempDir()), func(context.Context, Delivery) (Result, func(context.Context) (Result, error), error) {
		return Result{Ignored, ""}, nil, nil
	})
	rc := NewReceiver(func(_ context.Context, id string) (Hook, bool) {
		return Hook{id, GitHub, map[string]m3o.Secret{"good": secret}[id]}, id != "unknown"
	}, q, slog.New(slog.DiscardHandler))
	push := []byte(`{"ref":"refs/heads/main","after":"` + strings.Repeat("a", 40) + `"}`)
	ask := func(method, path string, h http.Header, body []byte) *httptest.ResponseRecorder {
		r := httptest.NewRequest(method, path, bytes.NewReader(body))
		r.Header = h
		w := httptest.NewRecorder()
		rc.ServeHTTP(w, r)
		return w
	}
	for _, c := range []struct {
		name, method, path string
		h                  http.Header
		body               []byte
		code               int
	}{
		{"right", "POST", "/hooks/github/good", sign(GitHub, "push", push, secret), push, 202},
		{"the same again", "POST", "/hooks/github/good", sign(GitHub, "push", push, secret), push, 202},
		{"unknown event", "POST", "/hooks/github/good", sign(GitHub, "fork", []byte("{}"), secret), []byte("{}"), 202},
		{"broken body", "POST", "/hooks/github/good", sign(GitHub, "push", push[:20], secret), push[:20], 400},
		{"unsigned", "POST", "/hooks/github/good", http.Header{"X-Github-Event": {"push"}}, push, 401},
		{"another forge's", "POST", "/hooks/gitea/good", sign(Gitea, "push", push, secret), push, 401},
		{"no secret", "POST", "/hooks/github/bare", sign(GitHub, "push", push, ""), push, 401},
		{"no such hook", "POST", "/hooks/github/unknown", sign(GitHub, "push", push, secret), push, 401},
		{"by the decoy's secret", "POST", "/hooks/github/unknown", sign(GitHub, "push", push, decoy), push, 401},
		{"no such forge", "POST", "/hooks/sourceforge/good", sign(GitHub, "push", push, secret), push, 404},
		{"looking", "GET", "/hooks/github/good", http.Header{}, nil, 405},
	} {
		if w := ask(c.method, c.path, c.h, c.body); w.Code != c.code {
			t.Errorf("%s: %d %q, want %d", c.name, w.Code, w.Body, c.code)
		}
	}
	bad := ask("POST", "/hooks/github/good", sign(GitHub, "push", push, "wrong"), push)
	none := ask("POST", "/hooks/github/unknown", sign(GitHub, "push", push, "wrong"), push)
	if bad.Code != none.Code || bad.Body.String() != none.Body.String() || len(bad.Header()) != len(none.Header()) {
		t.Errorf("a wrong signature is answered %d %q, no hook %d %q; they must not differ", bad.Code, bad.Body, none.Code, none.Body)
	}
	large := httptest.NewRequest("POST", "/hooks/github/good", io.LimitReader(zeros{}, MaxBody+1))
	large.ContentLength = -1
	w := httptest.NewRecorder()
	rc.ServeHTTP(w, large)
	if w.Code != http.StatusRequestEntityTooLarge {
		t.Errorf("a body over the limit: %d, want 413", w.Code)
	}
	short := httptest.NewRequest("POST", "/hooks/github/good", strings.NewReader("abc"))
	short.ContentLength = 10
	w = httptest.NewRecorder()
	rc.ServeHTTP(w, short)
	if w.Code != http.StatusBadRequest {
		t.Errorf("a body that ends early: %d, want 400", w.Code)
	}
}

type zeros struct{}

func (zeros) Read(p []byte) (int, error) { clear(p); return len(p), nil }
