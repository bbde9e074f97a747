package daemon

import (
	"context"
	"encoding/json"
	"errors"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"net/url"
	"strings"
	"sync"
	"testing"
	"time"

	standardwebhooks "github.com/standard-webhooks/standard-webhooks/libraries/go"

	"github.com/m3o/m3o"
	"github.com/m3o/m3o/config"
	"github.com/m3o/m3o/events"
	"github.com/m3o/m3o/store"
)

func event(t *testing.T, kind string, a appEvent) events.Event {
	t.Helper()
	data, err := json.Marshal(a)
	if err != nil {
		t.Fatal(err)
	}
	return events.Event{ID: "evt_1", Type: kind, App: a.App, Time: time.Date(2026, 5, 4, 12, 0, 0, 0, time.UTC), Data: data}
}

func TestChatsCannotBeMadeToCallEverybody(t *testing.T) {
	e := event(t, deployLive, appEvent{App: "hello", Release: "v2", Commit: "0123456789", Message: "<!channel> @everyone & co", URL: "https://hello.example.com"})
	slack, err := payload(formatSlack, e)
	if err != nil {
		t.Fatal(err)
	}
	var s struct{ Text string }
	if err := json.Unmarshal(slack, &s); err != nil {
		t.Fatal(err)
	}
	if want := "✅ hello v2 is live: &lt;!channel&gt; @everyone &amp; co (0123456) <https://hello.example.com>"; s.Text != want {
		t.Errorf("slack says %q, want %q", s.Text, want)
	}
	discord, err := payload(formatDiscord, e)
	if err != nil {
		t.Fatal(err)
	}
	if !strings.Contains(string(discord), `"allowed_mentions":{"parse":[]}`) || !strings.Contains(string(discord), "hello v2 is live") {
		t.Errorf("discord gets %s", discord)
	}
}

func TestNamesOfEvents(t *testing.T) {
	for _, c := range []struct {
		names, kind string
		want        bool
	}{
		{"live", deployLive, true}, {"live", deployRecovered, true}, {"recovered", deployRecovered, true}, {"recovered", deployLive, false},
		{"failed", deployFailed, true}, {"failed", appCrashed, false}, {"crashed", appCrashed, true}, {"recovered", appRecovered, true},
		{"started,live,failed,recovered,crashed", "test", false}, {"started", deployStarted, true}, {"live", deployHeld, true},
	} {
		if got := wants(strings.Split(c.names, ","), events.Event{Type: c.kind}); got != c.want {
			t.Errorf("wants(%s, %s) = %t", c.names, c.kind, got)
		}
	}
}

func TestAddressesInside(t *testing.T) {
	for _, a := range []string{"127.0.0.1", "127.9.9.9", "0.0.0.0", "10.1.2.3", "172.16.0.1", "192.168.1.1", "169.254.169.254", "100.64.0.1", "198.18.3.4",
		"224.0.0.1", "255.255.255.255", "240.1.1.1", "::1", "::", "fe80::1", "fc00::1", "ff02::1", "::ffff:127.0.0.1", "::ffff:10.0.0.1",
		"64:ff9b::7f00:1", "2002:7f00:1::", "::7f00:1", "fec0::1", "fe80::1%eth0"} {
		if !isInside(netip.MustParseAddr(a)) {
			t.Errorf("%s is taken for outside", a)
		}
	}
	for _, a := range []string{"1.1.1.1", "203.0.114.9", "100.128.0.1", "2606:4700::1111", "2001:4860:4860::8888"} {
		if isInside(netip.MustParseAddr(a)) {
			t.Errorf("%s is taken for inside", a)
		}
	}
}

// A name may be looked up as an outside address first and as ours at the dial.
func TestAddressIsCheckedAtTheDial(t *testing.T) {
	reached := false
	srv := httptest.NewServer(http.HandlerFunc(func(http.ResponseWriter, *http.Request) { reached = true }))
	defer srv.Close()
	for _, u := range []string{srv.URL, strings.Replace(srv.URL, "127.0.0.1", "localhost", 1)} {
		_, err := outsideClient(false).Get(u)
		if e, ok := errors.AsType[*m3o.Error](err); !ok || e.Kind != m3o.Denied || reached {
			t.Errorf("GET %s: %v, reached %t", u, err, reached)
		}
	}
}

func TestRedirectIsNotFollowed(t *testing.T) {
	srv := httptest.NewServer(http.RedirectHandler("http://169.254.169.254/", http.StatusFound))
	defer srv.Close()
	res, err := outsideClient(true).Get(srv.URL)
	if err != nil {
		t.Fatal(err)
	}
	defer res.Body.Close()
	if res.StatusCode != http.StatusFound {
		t.Errorf("status %d", res.StatusCode)
	}
}

func TestShownURLHidesThePassword(t *testing.T) {
	for in, want := range map[string]string{
		"https://hooks.slack.com/services/T00/B00/abcdef": "https://hooks.slack.com/services/…",
		"https://discord.com/api/webhooks/12/secret":      "https://discord.com/api/…",
		"https://example.com/secret":                      "https://example.com/…",
		"https://example.com/?token=x":                    "https://example.com/…",
		"https://example.com":                             "https://example.com",
	} {
		u, err := url.Parse(in)
		if err != nil {
			t.Fatal(err)
		}
		if got := shownURL(u); got != want {
			t.Errorf("shownURL(%s) = %s, want %s", in, got, want)
		}
	}
}

func TestDeliveryIsTriedAgainForAWhile(t *testing.T) {
	at := time.Date(2026, 5, 4, 12, 0, 0, 0, time.UTC)
	x, total := delivery{Status: toDeliver}, time.Duration(0)
	for n := 0; x.Status == toDeliver; n++ {
		if n > 20 {
			t.Fatal("it is tried for ever")
		}
		x = x.after(http.StatusInternalServerError, nil, at)
		if x.Status == toDeliver {
			total += x.Next.Sub(at)
		}
	}
	if x.Status != undelivered || x.Attempts != 8 || total < 12*time.Hour {
		t.Errorf("after %s and %d attempts it is %s: %s", total, x.Attempts, x.Status, x.Detail)
	}
	for code, want := range map[int]string{200: delivered, 204: delivered, 302: toDeliver, 404: toDeliver, 410: undelivered, 429: toDeliver} {
		if got := (delivery{Status: toDeliver}).after(code, nil, at); got.Status != want {
			t.Errorf("answered %d: %s, want %s", code, got.Status, want)
		}
	}
	if got := (delivery{Status: toDeliver}).after(0, errInside, at); got.Status != undelivered {
		t.Errorf("an address inside: %s", got.Status)
	}
}

func TestCrashIsToldOnceUntilTheAppIsWell(t *testing.T) {
	c, at := newCrashes(), time.Date(2026, 5, 4, 12, 0, 0, 0, time.UTC)
	told := func(phase m3o.Phase, after time.Duration) bool {
		return c.see(m3o.Instance{App: "hello", Process: "web", ID: "i1", Phase: phase, Exit: 2}, true, at.Add(after))
	}
	// It gets ready before its release is live, and that is all there is until it crashes.
	if c.see(m3o.Instance{App: "new", Process: "web", ID: "i2", Phase: m3o.Ready}, false, at) ||
		!c.see(m3o.Instance{App: "new", Process: "web", ID: "i2", Phase: m3o.Exited, Exit: 2}, true, at) {
		t.Fatal("the crash of an instance that was ready before its release was live is not told")
	}
	if c.see(m3o.Instance{App: "new", Process: "web", ID: "i3", Phase: m3o.Starting}, false, at) ||
		c.see(m3o.Instance{App: "new", Process: "web", ID: "i3", Phase: m3o.Exited, Exit: 2}, false, at) {
		t.Fatal("an instance of a deploy that fails is told as a crash")
	}
	if told(m3o.Ready, 0) || !told(m3o.Exited, time.Second) {
		t.Fatal("the first crash is not told")
	}
	told(m3o.Starting, 2*time.Second)
	told(m3o.Ready, 3*time.Second)
	if told(m3o.Exited, 4*time.Second) {
		t.Error("a crash in a row is told again")
	}
	told(m3o.Starting, 5*time.Second)
	told(m3o.Ready, 6*time.Second)
	if got := c.well(at.Add(20 * time.Second)); len(got) != 0 {
		t.Errorf("well too early: %v", got)
	}
	if got := c.well(at.Add(36 * time.Second)); len(got) != 1 || got[0].App != "hello" {
		t.Errorf("not well: %v", got)
	}
	if !told(m3o.Exited, time.Minute) {
		t.Error("the next crash is not told")
	}
	told(m3o.Ready, 61*time.Second)
	told(m3o.Draining, 62*time.Second)
	if told(m3o.Exited, 63*time.Second) {
		t.Error("a stop is told as a crash")
	}
}

// notifying is a daemon with just what notifications need.
func notifying(t *testing.T, st *store.Store) *Daemon {
	t.Helper()
	d := &Daemon{cfg: Config{Domain: "example.com", HTTPS: ":443", NotifyPrivate: true}, version: "test", store: st, log: slog.New(slog.DiscardHandler)}
	var err error
	if d.config, err = config.Open(t.Context(), st, [32]byte{1}, nil); err != nil {
		t.Fatal(err)
	}
	if d.bus, err = openBus(t.Context(), d); err != nil {
		t.Fatal(err)
	}
	if d.notify, err = openNotifications(t.Context(), d); err != nil {
		t.Fatal(err)
	}
	return d
}

// receiver is somebody's server; it verifies by the library of standardwebhooks.com.
type receiver struct {
	*httptest.Server
	mu     sync.Mutex
	secret string
	fail   bool
	got    chan string // types of verified events
	failed chan string
}

func newReceiver(t *testing.T) *receiver {
	r := &receiver{got: make(chan string, 10), failed: make(chan string, 10)}
	r.Server = httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
		r.mu.Lock()
		secret, fail := r.secret, r.fail
		r.mu.Unlock()
		body, _ := io.ReadAll(req.Body)
		wh, err := standardwebhooks.NewWebhook(secret)
		if err != nil {
			t.Error(err)
			return
		}
		if err := wh.Verify(body, req.Header); err != nil {
			t.Errorf("verify: %v", err)
		}
		if err := wh.Verify(append(body, ' '), req.Header); err == nil {
			t.Error("a changed body verifies")
		}
		var e struct{ Type string }
		if err := json.Unmarshal(body, &e); err != nil {
			t.Error(err)
		}
		if fail {
			w.WriteHeader(http.StatusBadGateway)
			r.failed <- e.Type
			return
		}
		r.got <- e.Type
	}))
	t.Cleanup(r.Close)
	return r
}

func TestNotificationsOutliveTheDaemon(t *testing.T) {
	st, err := store.Open(t.Context(), store.Config{Dir: t.TempDir()})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = st.Close() })
	srv := newReceiver(t)
	d := notifying(t, st)
	rec, secret, err := d.notify.add(t.Context(), notifier{App: "hello", Events: []string{"live", "failed"}}, m3o.Secret(srv.URL+"/hook"))
	if err != nil {
		t.Fatal(err)
	}
	srv.secret = secret.Reveal()
	run := func(d *Daemon) (stop func()) {
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan struct{})
		go func() { defer close(done); _ = d.notify.run(ctx) }()
		return func() { cancel(); <-done }
	}
	stop := run(d)
	// The consumer begins with what happens from now on: let it be there first.
	pos, err := store.NewBucket[position](t.Context(), st, "event-positions")
	if err != nil {
		t.Fatal(err)
	}
	for c, err := range pos.Watch(t.Context(), "notifications") {
		if err != nil {
			t.Fatal(err)
		}
		if !c.Synced {
			break
		}
	}
	d.happened(t.Context(), deployStarted, appEvent{App: "hello"})
	d.happened(t.Context(), deployLive, appEvent{App: "other"})
	d.happened(t.Context(), deployLive, appEvent{App: "hello", Release: "v1"})
	if got := <-srv.got; got != deployLive {
		t.Errorf("got %s", got)
	}
	// The receiver fails; then the daemon stops, and something happens meanwhile.
	srv.mu.Lock()
	srv.fail = true
	srv.mu.Unlock()
	d.happened(t.Context(), deployFailed, appEvent{App: "hello", Error: "no"})
	<-srv.failed
	stop()
	srv.mu.Lock()
	srv.fail = false
	srv.mu.Unlock()
	d.happened(t.Context(), deployRecovered, appEvent{App: "hello", Release: "v2"})

	d = notifying(t, st)
	all, err := d.notify.history(t.Context(), "hello", rec.ID, 10)
	if err != nil || len(all) != 2 || all[0].Status != toDeliver || all[1].Status != delivered {
		t.Fatalf("history = %+v, %v", all, err)
	}
	x := all[0]
	x.Next = time.Now() // its pause is over
	if _, err := d.notify.deliveries.Put(t.Context(), x.key(), x); err != nil {
		t.Fatal(err)
	}
	stop = run(d)
	if a, b := <-srv.got, <-srv.got; a != deployFailed && b != deployFailed || a != deployRecovered && b != deployRecovered {
		t.Errorf("got %s and %s", a, b)
	}
	stop()
	if err := d.notify.removeApp(t.Context(), "hello"); err != nil {
		t.Fatal(err)
	}
	if all, err := d.notify.history(t.Context(), "hello", "", 10); err != nil || len(all) != 0 {
		t.Errorf("after removal the history is %+v, %v", all, err)
	}
}

func TestNotifierThatIsRefused(t *testing.T) {
	st, err := store.Open(t.Context(), store.Config{Dir: t.TempDir()})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = st.Close() })
	d := notifying(t, st)
	d.cfg.NotifyPrivate = false
	for u, want := range map[string]string{
		"http://example.com/x":                       "not https",
		"https://127.0.0.1/x":                        "inside",
		"https://[::1]/x":                            "inside",
		"https://localhost/x":                        "inside",
		"https://hello.localhost/x":                  "inside",
		"https://metadata.internal/x":                "inside",
		"https://printer/x":                          "inside",
		"https://169.254.169.254/latest":             "inside",
		"https://user:pw@example.com/x":              "user name",
		"https://example.com/x#y":                    "fragment",
		"example.com/x":                              "no URL",
		"https://":                                   "no URL",
		"file:///etc/passwd":                         "no URL",
		"https://e.com/" + strings.Repeat("x", 2000): "longer",
	} {
		_, _, err := d.notify.add(t.Context(), notifier{App: "hello"}, m3o.Secret(u))
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("add %.60s: %v, want %q", u, err, want)
		}
	}
}
