package buildpacks

import (
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/m3o/m3o"
)

func TestSchedulesOfTheManifest(t *testing.T) {
	m, err := ParseManifest(ManifestName, []byte(`paths: [svc/api, "!**/*.md"]
schedules:
  nightly:
    cron: "0 4 * * *"
    timezone: Europe/Berlin
    rebuild: if-outdated
  report:
    cron: "@daily"
    call: Reports/Send
    message: '{"to":"ada"}'
    missed: skip
    jitter: 5m
  cleanup:
    cron: "*/15 * * * *"
    run: ./cleanup --days 30
    overlap: replace
`))
	if err != nil {
		t.Fatal(err)
	}
	want := []m3o.Schedule{
		{Name: "cleanup", Cron: "*/15 * * * *", Action: "run", Args: []string{"./cleanup", "--days", "30"}, Overlap: "replace"},
		{Name: "nightly", Cron: "0 4 * * *", Zone: "Europe/Berlin", Action: "rebuild", IfOutdated: true},
		{Name: "report", Cron: "@daily", Action: "call", Args: []string{"Reports/Send", `{"to":"ada"}`}, Missed: "skip", Jitter: 5 * time.Minute},
	}
	if d := cmp.Diff(want, m.Schedules); d != "" {
		t.Error(d)
	}
	if d := cmp.Diff([]string{"svc/api", "!**/*.md"}, m.Paths); d != "" {
		t.Error(d)
	}
	for doc, want := range map[string]string{
		"schedules:\n  x:\n    cron: \"@daily\"\n":                                  "does not say what to do",
		"schedules:\n  x:\n    cron: \"@daily\"\n    run: a\n    rebuild: always\n": "does not say what to do",
		"schedules:\n  x:\n    rebuild: sometimes\n":                                "neither always nor if-outdated",
		"schedules:\n  X y:\n    rebuild: always\n":                                 "is no name of a schedule",
		"schedules:\n  x:\n    every: 5m\n":                                         "unknown key",
		"schedules:\n  x:\n    rebuild: always\n    overlap: maybe\n":               "overlap",
		"paths: [/etc]\n":  "root of the repository",
		"paths: [\"!\"]\n": "empty pattern",
		"paths: svc\n":     "is not a list",
	} {
		_, err := ParseManifest(ManifestName, []byte(doc))
		if m3o.KindOf(err) != m3o.Invalid || !strings.Contains(err.Error(), want) || !strings.HasPrefix(err.Error(), ManifestName+":") {
			t.Errorf("%q: %v, want a line number and %q", doc, err, want)
		}
	}
}
