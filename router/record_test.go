package router

import (
	"context"
	"io"
	"net/http"
	"slices"
	"strings"
	"testing"
	"time"

	testpb "google.golang.org/grpc/interop/grpc_testing"
	"google.golang.org/grpc/status"
)

// failing answers as its path asks.
func failing(w http.ResponseWriter, r *http.Request) {
	switch r.URL.Path {
	case "/500":
		w.WriteHeader(http.StatusInternalServerError)
	case "/broken":
		w.Header().Set("Content-Length", "100")
		_, _ = io.WriteString(w, "half")
		_ = http.NewResponseController(w).Flush()
		panic(http.ErrAbortHandler)
	default:
		_, _ = io.WriteString(w, "hello")
	}
}

func get(t testing.TB, c *http.Client, url string) (*http.Response, string, error) {
	t.Helper()
	res, err := c.Get(url)
	if err != nil {
		return nil, "", err
	}
	defer res.Body.Close()
	b, err := io.ReadAll(res.Body)
	return res, string(b), err
}

func sum(ss []Series, want func(Series) bool) (n int64) {
	for _, s := range ss {
		if want(s) {
			n += s.Count
		}
	}
	return n
}

func TestRequestsAreCountedByReleaseStatusAndMethod(t *testing.T) {
	f := start(t)
	up, _ := backend(t, http.HandlerFunc(failing))
	f.put(t, appHost("hello", 3, HTTP1, up))
	c := f.web(t, false)
	for _, p := range []string{"/", "/a?token=secret", "/500", "/500"} {
		if _, _, err := get(t, c, "https://hello.localhost"+p); err != nil {
			t.Fatal(err)
		}
	}
	if _, _, err := get(t, c, "https://hello.localhost/broken"); err == nil {
		t.Fatal("a broken answer looked whole")
	}
	var st Stats
	wait(t, "five requests", func() bool {
		var err error
		if st, err = f.client.Requests(t.Context(), "hello", time.Minute); err != nil {
			t.Fatal(err)
		}
		return sum(st.Series, func(Series) bool { return true }) == 5
	})
	if n := sum(st.Series, func(s Series) bool {
		return s.Status == 200 && s.Release == 3 && s.Method == "GET" && s.Protocol == "http"
	}); n != 3 {
		t.Errorf("%d requests with 200, want 3: %+v", n, st.Series)
	}
	if n := sum(st.Series, func(s Series) bool { return s.Status == 500 && s.Failed == 2 }); n != 2 {
		t.Errorf("%d requests with 500, want 2: %+v", n, st.Series)
	}
	if len(st.Failed) != 3 {
		t.Errorf("%d failed samples, want 3: %+v", len(st.Failed), st.Failed)
	}
	if !slices.ContainsFunc(st.Failed, func(r Record) bool { return r.Path == "/broken" && r.Broken && r.Endpoint == up }) {
		t.Errorf("no sample of the answer that broke off: %+v", st.Failed)
	}
	for _, r := range st.Failed {
		if strings.Contains(r.Path, "secret") || r.ID == "" || r.Remote != "127.0.0.1" {
			t.Errorf("sample %+v", r)
		}
	}
	total, err := f.client.Requests(t.Context(), "hello", 0)
	if err != nil || sum(total.Series, func(Series) bool { return true }) != 5 {
		t.Errorf("since the start: %+v, %v", total.Series, err)
	}
	if other, err := f.client.Requests(t.Context(), "nobody", 0); err != nil || len(other.Series) != 0 {
		t.Errorf("another app's requests: %+v, %v", other, err)
	}
}

func TestGRPCCallsAreCountedByMethodAndCode(t *testing.T) {
	f := start(t)
	up, _ := grpcBackend(t, "one")
	f.put(t, appHost("greeter", 1, GRPC, up))
	c := f.dial(t, "greeter.localhost")
	if _, err := c.UnaryCall(t.Context(), &testpb.SimpleRequest{}); err != nil {
		t.Fatal(err)
	}
	if _, err := c.UnaryCall(t.Context(), &testpb.SimpleRequest{ResponseStatus: &testpb.EchoStatus{Code: 5}}); status.Code(err) != 5 {
		t.Fatalf("UnaryCall = %v, want not found", err)
	}
	wait(t, "both calls", func() bool {
		st := f.rt.Requests("greeter", time.Minute)
		count := func(code int) int64 {
			return sum(st.Series, func(s Series) bool {
				return s.RPC == "/grpc.testing.TestService/UnaryCall" && s.Code == code && s.Protocol == "grpc" && s.Failed == 0
			})
		}
		return count(0) == 1 && count(5) == 1
	})
}

func TestMadeUpMethodsDoNotGrowTheCounts(t *testing.T) {
	var s stats
	for i := range 3 * maxSeries {
		s.add(&Record{Time: time.Now(), Protocol: "http", Method: "GET", Status: 200, Caller: strings.Repeat("x", i%7) + time.Duration(i).String()})
	}
	if n := len(s.series); n > maxSeries+1 {
		t.Errorf("%d series, more than %d", n, maxSeries+1)
	}
	if n := sum(s.read(0, time.Now()), func(Series) bool { return true }); n != 3*maxSeries {
		t.Errorf("%d requests counted, want %d", n, 3*maxSeries)
	}
}

func TestWindowForgetsWhatIsOlder(t *testing.T) {
	var s stats
	at := time.Date(2026, 11, 25, 12, 0, 0, 0, time.UTC)
	for i := range 30 {
		s.add(&Record{Time: at.Add(time.Duration(i) * time.Minute), Took: time.Millisecond, Status: 200})
	}
	end := at.Add(29 * time.Minute)
	for _, tc := range []struct {
		window time.Duration
		want   int64
	}{{0, 30}, {time.Minute, 1}, {5 * time.Minute, 5}, {time.Hour, windowMinutes}} {
		if n := sum(s.read(tc.window, end), func(Series) bool { return true }); n != tc.want {
			t.Errorf("window %v counts %d, want %d", tc.window, n, tc.want)
		}
	}
}

func TestQuantile(t *testing.T) {
	b := make([]int64, latencyBuckets)
	if q := Quantile(b, 0.5); q != 0 {
		t.Errorf("of nothing: %v", q)
	}
	b[bucketOf(700*time.Microsecond)] = 99
	b[bucketOf(time.Minute)] = 1
	if q := Quantile(b, 0.5); q <= 500*time.Microsecond || q > time.Millisecond {
		t.Errorf("median %v, want between 0.5 and 1 ms", q)
	}
	if q := Quantile(b, 0.999); q != 30*time.Second {
		t.Errorf("p99.9 %v, want the last bound", q)
	}
}

func TestFollowTellsOfRequestsAsTheyEnd(t *testing.T) {
	f := start(t)
	up, _ := backend(t, http.HandlerFunc(failing))
	f.put(t, appHost("hello", 1, HTTP1, up), appHost("other", 1, HTTP1, up))
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	got := make(chan Followed, 8)
	done := make(chan struct{})
	go func() {
		defer close(done)
		for r, err := range f.client.Follow(ctx, "hello") {
			if err != nil {
				t.Errorf("follow: %v", err)
				return
			}
			got <- r
		}
	}()
	wait(t, "the follower", func() bool { return f.rt.tails.n.Load() == 1 })
	c := f.web(t, false)
	for _, u := range []string{"https://other.localhost/", "https://hello.localhost/one?x=y"} {
		if _, _, err := get(t, c, u); err != nil {
			t.Fatal(err)
		}
	}
	if r := <-got; r.App != "hello" || r.Path != "/one" || r.Status != 200 || r.Out != 5 || r.Host != "hello.localhost" {
		t.Errorf("got %+v", r)
	}
	cancel()
	<-done
	wait(t, "no follower", func() bool { return f.rt.tails.n.Load() == 0 })
}
