package router

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/m3o/m3o"
)

func sorted(t Table) Table {
	slices.SortFunc(t.Hosts, func(a, b Host) int { return strings.Compare(a.Name, b.Name) })
	return t
}

func newRouter(t testing.TB, state string) *Router {
	t.Helper()
	rt, err := New(Config{State: state})
	if err != nil {
		t.Fatal(err)
	}
	return rt
}

func TestChangesLeadToTheTableThatAWholeOneWould(t *testing.T) {
	state := filepath.Join(t.TempDir(), "table.json")
	rt := newRouter(t, state)
	base := table(appHost("one", 1, HTTP1, "127.0.0.1:1"), appHost("two", 1, HTTP1, "127.0.0.1:2"))
	hash, err := rt.Put(base)
	if err != nil || hash != TableHash(base) {
		t.Fatalf("Put = %q, %v, want %q", hash, err, TableHash(base))
	}
	kept := rt.live.Load().find("two.localhost").pool[0]
	if hash, err = rt.Apply(Change{Base: hash, Set: []Host{appHost("one", 2, H2C, "127.0.0.1:3"), appHost("three", 1, HTTP1),
		{Name: "www.one.example", App: "one", Release: 2, Protocol: H2C, Endpoints: []string{"127.0.0.1:3"}}}}); err != nil {
		t.Fatal(err)
	}
	if hash, err = rt.Apply(Change{Base: hash, Remove: []string{"three.localhost", "never.there"}}); err != nil {
		t.Fatal(err)
	}
	want := sorted(table(appHost("one", 2, H2C, "127.0.0.1:3"), appHost("two", 1, HTTP1, "127.0.0.1:2"),
		Host{Name: "www.one.example", App: "one", Release: 2, Protocol: H2C, Endpoints: []string{"127.0.0.1:3"}}))
	if diff := cmp.Diff(want, sorted(rt.live.Load().tableOf())); diff != "" || hash != TableHash(want) {
		t.Errorf("hash %q, want %q; %s", hash, TableHash(want), diff)
	}
	l := rt.live.Load()
	if l.find("two.localhost").pool[0] != kept || kept.retired.Load() {
		t.Error("an endpoint that no change touched was made anew")
	}
	if got := l.apps.get("one").Name; got != "one.localhost" {
		t.Errorf("the app is known by %q", got)
	}
	if l.apps.get("three") != nil || len(rt.endpoints) != 2 || len(rt.apps) != 2 {
		t.Errorf("%d endpoints and %d apps are left, want 2 and 2", len(rt.endpoints), len(rt.apps))
	}
	// One that missed a change must be told so.
	if _, err := rt.Apply(Change{Base: TableHash(base), Remove: []string{"two.localhost"}}); m3o.KindOf(err) != m3o.Conflict {
		t.Errorf("a change of another table: %v", err)
	}
	// A restart replays the journal, less its torn end.
	f, err := os.OpenFile(journalPath(state), os.O_APPEND|os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := f.WriteString(`{"seq":3,"base":"","remove":["two.loc`); err != nil {
		t.Fatal(err)
	}
	_ = f.Close()
	again := newRouter(t, state)
	if diff := cmp.Diff(want, sorted(again.live.Load().tableOf())); diff != "" {
		t.Errorf("after a restart: %s", diff)
	}
	// Written anew, the file alone is enough.
	again.journal.size = compactAt
	again.compact()
	if _, err := os.Stat(journalPath(state)); !os.IsNotExist(err) {
		t.Errorf("the journal is still there: %v", err)
	}
	if diff := cmp.Diff(want, sorted(newRouter(t, state).live.Load().tableOf())); diff != "" {
		t.Errorf("after writing it anew: %s", diff)
	}
}

func TestWholeTableForgetsTheJournalBeforeIt(t *testing.T) {
	state := filepath.Join(t.TempDir(), "table.json")
	rt := newRouter(t, state)
	hash, err := rt.Put(table(appHost("one", 1, HTTP1)))
	if err == nil {
		_, err = rt.Apply(Change{Base: hash, Set: []Host{appHost("two", 1, HTTP1)}})
	}
	if err == nil {
		_, err = rt.Put(table(appHost("three", 1, HTTP1)))
	}
	if err != nil {
		t.Fatal(err)
	}
	want := table(appHost("three", 1, HTTP1))
	if diff := cmp.Diff(want, newRouter(t, state).live.Load().tableOf()); diff != "" {
		t.Error(diff)
	}
}

func TestOtherHostsOfAnApp(t *testing.T) {
	addr, _ := backend(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { _, _ = io.WriteString(w, r.Host) }))
	f := start(t)
	alias := func(name string) Host {
		return Host{Name: name, App: "one", Release: 2, Protocol: HTTP1, Endpoints: []string{addr}}
	}
	release := func(n int, eps ...string) Host {
		return Host{Name: fmt.Sprintf("v%d--one.localhost", n), Kind: KindRelease, App: "one", Release: n, Protocol: HTTP1, Endpoints: eps}
	}
	f.put(t, appHost("one", 2, HTTP1, addr), alias("one.example"), alias("*.one.example"), release(2, addr), release(1),
		Host{Name: "www.one.example", App: "one", Redirect: "one.example"})
	c := f.web(t, false)
	_, httpPort, _ := strings.Cut(f.http, ":")
	for url, want := range map[string]string{
		"http://one.example/":        "200 one.example",
		"http://deep.one.example/":   "200 deep.one.example",
		"http://a.b.one.example/":    `404 nothing is served at "a.b.one.example"`,
		"http://v2--one.localhost/":  "200 v2--one.localhost",
		"http://v1--one.localhost/":  "503 v1 of one is kept but does not run",
		"http://v9--one.localhost/":  `404 nothing is served at "v9--one.localhost"`,
		"http://www.one.example/a?b": "308 to http://one.example:" + httpPort + "/a?b",
	} {
		res, body := do(t, c, request1(t, "GET", url, nil))
		got, _, _ := strings.Cut(body, "\n")
		if loc := res.Header.Get("Location"); loc != "" {
			got = "to " + loc
		}
		if got = fmt.Sprint(res.StatusCode, " ", got); got != want {
			t.Errorf("%s = %q, want %q", url, got, want)
		}
	}
}

func TestMaintenanceAnswersInTheAppsStead(t *testing.T) {
	addr, _ := backend(t, http.HandlerFunc(func(http.ResponseWriter, *http.Request) { t.Error("the app was asked") }))
	f := start(t)
	h := appHost("one", 1, HTTP1, addr)
	h.Maintenance = true
	f.put(t, h)
	f.ways(t, func(t *testing.T, c *http.Client, scheme string) {
		res, body := do(t, c, request1(t, "GET", scheme+"://one.localhost/", nil))
		if res.StatusCode != 503 || res.Header.Get("Retry-After") == "" || !strings.Contains(body, "maintenance") {
			t.Errorf("%s %v %q", res.Status, res.Header, body)
		}
	})
}

func TestPausedAppsRequestsWaitForItsNextRelease(t *testing.T) {
	addr, _ := backend(t, http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { _, _ = io.WriteString(w, "after") }))
	f := start(t, func(c *Config) { c.Limits.Held = 3 })
	h := appHost("one", 1, HTTP1, "127.0.0.1:1")
	h.Paused = true
	f.put(t, h)
	c := f.web(t, false)
	got := make(chan string, 3)
	for range 3 {
		go func() {
			res, err := c.Post("http://one.localhost/", "text/plain", strings.NewReader("x"))
			if err != nil {
				got <- err.Error()
				return
			}
			defer res.Body.Close() //nolint:errcheck // a test
			b, _ := io.ReadAll(res.Body)
			got <- fmt.Sprint(res.StatusCode, " ", string(b))
		}()
	}
	a := f.rt.live.Load().find("one.localhost").app
	wait(t, "three requests held", func() bool { return a.held.Load() == 3 })
	if res, body := do(t, f.web(t, false), request1(t, "GET", "http://one.localhost/", nil)); res.StatusCode != 503 || !strings.Contains(body, "too many") {
		t.Errorf("one more than is held: %s %q", res.Status, body)
	}
	f.put(t, appHost("one", 2, HTTP1, addr))
	for range 3 {
		if g := <-got; g != "200 after" {
			t.Errorf("a held request got %q", g)
		}
	}
}

func FuzzTable(f *testing.F) {
	good, err := encodeTable(table(appHost("one", 1, HTTP1, "127.0.0.1:80", "unix:/x"), Host{Name: "api.localhost", Kind: KindAPI}), 1)
	if err != nil {
		f.Fatal(err)
	}
	change, err := json.Marshal(Change{Base: "x", Set: []Host{appHost("one", 1, HTTP1, "127.0.0.1:80")}, Remove: []string{"x"}})
	if err != nil {
		f.Fatal(err)
	}
	for _, s := range []string{string(good), string(change), "{}", `{"version":1}`, `{"version":1,"domain":"localhost","hosts":null}`, `{"Version":1,"DOMAIN":"a"}`} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		if c, err := decodeChange(b); err == nil {
			rt := newRouter(t, filepath.Join(t.TempDir(), "table"))
			if _, err := rt.Put(table()); err != nil {
				t.Fatal(err)
			}
			c.Base = TableHash(table())
			if h, err := rt.Apply(c); err != nil || h != TableHash(rt.live.Load().tableOf()) {
				t.Errorf("Apply = %q, %v", h, err)
			}
		} else if m3o.KindOf(err) != m3o.Invalid {
			t.Errorf("%v is %v", err, m3o.KindOf(err))
		}
		tab, seq, err := decodeTable(b)
		if err != nil {
			if m3o.KindOf(err) != m3o.Invalid {
				t.Errorf("%v is %v", err, m3o.KindOf(err))
			}
			return
		}
		again, err := encodeTable(tab, seq)
		if err != nil {
			t.Fatal(err)
		}
		if back, _, err := decodeTable(again); err != nil || len(back.Hosts) != len(tab.Hosts) || back.Domain != tab.Domain {
			t.Errorf("%q does not survive: %v", b, err)
		}
		rt := newRouter(t, filepath.Join(t.TempDir(), "table"))
		if _, err := rt.Put(tab); err != nil {
			t.Fatal(err)
		}
		for h := range rt.live.Load().hosts.all() {
			for _, e := range h.pool {
				if e.network == "" {
					t.Errorf("endpoint %q was let through", e.addr)
				}
			}
		}
	})
}

// bigTable has n apps, one host and one endpoint each.
func bigTable(n int) Table {
	t := table()
	for i := range n {
		t.Hosts = append(t.Hosts, appHost(fmt.Sprint("app-", i), 1, HTTP1, fmt.Sprintf("198.18.%d.%d:8080", i>>8&0xff, i&0xff)))
	}
	return t
}

// BenchmarkChange is a deploy of one app: from the daemon's call to the live table.
func BenchmarkChange(b *testing.B) {
	for _, n := range []int{10, 100_000} {
		b.Run(fmt.Sprint(n, " hosts"), func(b *testing.B) {
			f := start(b)
			hash, err := f.client.Put(context.Background(), bigTable(n))
			if err != nil {
				b.Fatal(err)
			}
			i := 0
			for b.Loop() {
				i++
				h := appHost("app-5", 1+i, HTTP1, fmt.Sprintf("198.19.0.1:%d", 1000+i%50_000))
				if hash, err = f.client.Apply(context.Background(), Change{Base: hash, Set: []Host{h}}); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}

func BenchmarkFind(b *testing.B) {
	for _, n := range []int{10, 100_000} {
		b.Run(fmt.Sprint(n, " hosts"), func(b *testing.B) {
			rt := newRouter(b, filepath.Join(b.TempDir(), "table"))
			if _, err := rt.Put(bigTable(n)); err != nil {
				b.Fatal(err)
			}
			l := rt.live.Load()
			i := 0
			names := make([]string, 64)
			for j := range names {
				names[j] = fmt.Sprintf("app-%d.localhost", j*n/64)
			}
			for b.Loop() {
				i++
				if l.find(names[i%64]) == nil {
					b.Fatal(names[i%64])
				}
			}
		})
	}
}
