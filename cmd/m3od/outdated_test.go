package main

import (
	"fmt"
	"net/http"
	"net/http/httptest"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"
)

// A scheduled rebuild for what is outdated deploys once after an advisory for
// one of the release's modules came out, and says so in the release. A call
// wakes the app when it sleeps.
func TestScheduledRebuildForAnAdvisoryAndCallOfASleepingApp(t *testing.T) {
	b := theBox(t)
	p := b.user(t, "vera")
	dir := p.clone(t, "hello-grpc", "advised")
	out, err := p.push(dir)
	if err != nil {
		t.Fatalf("push: %v\n%s", err, out)
	}
	defer p.must(t, dir, "m3o", "destroy", "--confirm", "advised")

	// The module proxy of this part has no newer toolchain than the one that was used, and
	// nothing else: builds have the modules already.
	used := regexp.MustCompile(`Using (go1\.\S+)`).FindStringSubmatch(out)
	if used == nil {
		t.Fatalf("the push says no toolchain:\n%s", out)
	}
	proxy := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path != "/golang.org/toolchain/@v/list" {
			http.NotFound(w, r)
			return
		}
		_, _ = fmt.Fprintf(w, "v0.0.1-%s.linux-amd64\nv0.0.1-%s.linux-arm64\n", used[1], used[1])
	}))
	defer proxy.Close()
	restart := func(extra ...string) {
		t.Helper()
		if err := b.stop(); err != nil {
			t.Fatal(err)
		}
		if err := b.start(extra...); err != nil {
			t.Fatal(err)
		}
	}
	restart("M3O_GOPROXY=" + proxy.URL)
	defer restart()
	db := filepath.Join(b.dir, "vulndb")
	put(t, db, "index/modules.json", `[]`)

	p.must(t, dir, "m3o", "schedule:add", "--cron", "0 4 * * *", "--name", "nightly", "rebuild", "--if-outdated")
	run := func() string { return p.must(t, dir, "m3o", "schedule:run", "nightly") }
	if out := run(); !strings.Contains(out, "nothing is outdated: not rebuilt") {
		t.Errorf("nothing new:\n%s", out)
	}
	put(t, db, "index/modules.json", `[{"path":"google.golang.org/grpc","vulns":[{"id":"GO-2026-4242","modified":"2026-06-04T19:14:00Z","fixed":"1.999.0"}]}]`)
	put(t, db, "ID/GO-2026-4242.json", fmt.Sprintf(`{"id":"GO-2026-4242","published":%q,"summary":"streams never end","affected":[{"package":{"name":"google.golang.org/grpc","ecosystem":"Go"},
"ranges":[{"type":"SEMVER","events":[{"introduced":"0"},{"fixed":"1.999.0"}]}]}]}`, time.Now().UTC().Format(time.RFC3339Nano)))
	if out := run(); !strings.Contains(out, "v2 is live") {
		t.Errorf("a new advisory:\n%s", out)
	}
	if out := p.must(t, dir, "m3o", "releases"); !regexp.MustCompile(`v2 +live .*schedule nightly: GO-2026-4242 in google\.golang\.org/grpc v1\.\S+, fixed in v1\.999\.0`).MatchString(out) {
		t.Errorf("releases:\n%s", out)
	}
	if out := run(); !strings.Contains(out, "nothing is outdated: not rebuilt; known before it was built: GO-2026-4242") {
		t.Errorf("the same advisory again:\n%s", out)
	}

	p.must(t, dir, "m3o", "ps:sleep", "--after", "1s")
	p.must(t, dir, "m3o", "schedule:add", "--cron", "@daily", "--name", "greet", "call", "Greeter/Hello", `{"name":"Ada"}`)
	eventually(t, "it sleeps", func() bool { return strings.Contains(p.must(t, dir, "m3o", "info"), "asleep") })
	if out := p.must(t, dir, "m3o", "schedule:run", "greet"); !strings.Contains(out, "Hello Ada") {
		t.Errorf("a call of a sleeping app:\n%s", out)
	}
	p.must(t, dir, "m3o", "lock", "audit")
	if out := p.must(t, dir, "m3o", "info"); !regexp.MustCompile(`Locked +by vera since 20\S+: audit`).MatchString(out) {
		t.Errorf("m3o info of a locked app:\n%s", out)
	}
}
