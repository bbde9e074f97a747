package daemon

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/m3o/m3o"
	"github.com/m3o/m3o/buildpacks/build"
	"github.com/m3o/m3o/events/cron"
)

// A schedule's rebuild for what is outdated deploys when a newer patch of the
// toolchain, another base or a new advisory is out, each time once, and says
// why in the release; otherwise it leaves everything as it is.
func TestScheduledRebuildOnlyForWhatIsOutdated(t *testing.T) {
	s := newShop(t)
	db := t.TempDir()
	s.d.cfg.GoVulnDB = "file://" + db
	put := func(name, text string) {
		t.Helper()
		p := filepath.Join(db, name)
		if err := os.MkdirAll(filepath.Dir(p), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(p, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	advise := func(id string, published time.Time) {
		t.Helper()
		put("index/modules.json", fmt.Sprintf(`[{"path":"example.com/dep","vulns":[{"id":%q,"fixed":"1.4.0"}]}]`, id))
		put("ID/"+id+".json", fmt.Sprintf(`{"published":%q,"affected":[{"package":{"name":"example.com/dep","ecosystem":"Go"},"ranges":[{"type":"SEMVER","events":[{"introduced":"0"},{"fixed":"1.4.0"}]}]}]}`,
			published.UTC().Format(time.RFC3339Nano)))
	}
	s.b.now = build.Basis{Toolchain: "go1.26.1", Base: "sha256:one"}
	s.b.sbom = `{"components":[{"type":"library","name":"example.com/dep","version":"v1.3.0"},{"type":"library","name":"std","version":"go1.26.1"}]}`
	advise("GO-2020-0001", time.Date(2020, 1, 1, 0, 0, 0, 0, time.UTC))
	s.push("first", "refs/heads/main")
	s.connect(nil)
	if _, err := s.d.schedules.add(t.Context(), schedule{App: "app", Name: "nightly", Cron: "0 4 * * *", Action: doRebuild, IfOutdated: true, User: "ada"}); err != nil {
		t.Fatal(err)
	}
	// run does the schedule and returns what its history says of it.
	run := func() string {
		t.Helper()
		s.d.schedules.Do(t.Context(), cron.Run{Job: "app/nightly", At: time.Now()})
		h, err := s.d.schedules.history(t.Context(), "app", "nightly", 1)
		if err != nil || len(h) != 1 {
			t.Fatalf("history %v, %v", h, err)
		}
		return h[0].Status + " " + h[0].Detail
	}
	reason := func() string {
		t.Helper()
		rel, err := s.d.ledger.Live(t.Context(), "app")
		if err != nil {
			t.Fatal(err)
		}
		return rel.Name() + " " + rel.Reason
	}
	unchanged := func(when, want string) {
		t.Helper()
		before := reason()
		if got := run(); !strings.Contains(got, "nothing is outdated: not rebuilt") || !strings.Contains(got, want) {
			t.Errorf("%s: %q, want %q", when, got, want)
		}
		if reason() != before {
			t.Errorf("%s: there is a new release, %s", when, reason())
		}
	}
	deploys := func(when, want string) {
		t.Helper()
		if got := run(); !strings.HasSuffix(got, "is live") {
			t.Errorf("%s: %q, want a release", when, got)
		}
		if reason() != want {
			t.Errorf("%s: the release says %q, want %q", when, reason(), want)
		}
	}
	unchanged("nothing new", "known before it was built: GO-2020-0001 in example.com/dep v1.3.0, fixed in v1.4.0")
	s.b.now, s.b.next = build.Basis{Toolchain: "go1.26.2"}, "sha256:two" // listed, not here yet
	deploys("newer toolchain", "v2 schedule nightly: go1.26.2 instead of go1.26.1")
	if s.b.now.Base != "sha256:two" {
		t.Error("the newer toolchain was not fetched before the build")
	}
	unchanged("after the toolchain", "")
	s.b.now.Base = "sha256:three"
	deploys("other base", "v3 schedule nightly: the base image changed (CA roots or time zones)")
	unchanged("after the base", "")
	advise("GO-2026-4242", time.Now())
	deploys("new advisory", "v4 schedule nightly: GO-2026-4242 in example.com/dep v1.3.0, fixed in v1.4.0")
	unchanged("after the advisory", "GO-2026-4242")

	// Locked, it is built once and held, not every night.
	if _, err := s.d.ledger.ChangeApp(t.Context(), "app", func(a *m3o.App) error {
		a.Lock = m3o.Lock{User: "ada", Reason: "sale", At: time.Now()}
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	advise("GO-2026-4243", time.Now())
	if got := run(); !strings.Contains(got, "v5 was built and is held back") {
		t.Errorf("locked: %q", got)
	}
	unchanged("held back already", "GO-2026-4243")

	if err := os.RemoveAll(db); err != nil {
		t.Fatal(err)
	}
	if got := run(); !strings.HasPrefix(got, "failed ") || !strings.Contains(got, "advisories for Go modules cannot be read") || !strings.Contains(got, "--go-vuln-db") {
		t.Errorf("without a database: %q", got)
	}
	s.d.cfg.GoVulnDB = "off"
	unchanged("no database wanted", "")
	if got := s.b.commits(); len(got) != 5 {
		t.Errorf("%d builds, want 5", len(got))
	}
}
