package main

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/m3o/m3o/daemon"
	"github.com/m3o/m3o/internal/need"
)

// Documents that follow from the code are those that the code makes now.
func TestDocumentsAreFresh(t *testing.T) {
	root := need.RepoRoot(t)
	for _, d := range documents {
		t.Run(filepath.Base(d.file), func(t *testing.T) {
			t.Parallel()
			have, err := os.ReadFile(filepath.Join(root, d.file))
			if err != nil {
				t.Fatal(err)
			}
			want, err := d.make(t.Context(), root, have)
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(strings.Split(string(have), "\n"), strings.Split(string(want), "\n")); diff != "" {
				t.Errorf("%s is stale; run: go run ./tools/docgen\n%s", d.file, diff)
			}
		})
	}
}

// The values in the table come from fields found by name; a field that is
// found wrongly would show another's default.
func TestSettingsTableFindsEachField(t *testing.T) {
	c := daemon.Config{HTTP: "a:1", HTTPS: "b:2", Nats: "nats://c", NatsCred: "/creds", BuildkitAddr: "tcp://d"}
	for name, want := range map[string]string{"http": "a:1", "https": "b:2", "nats": "nats://c", "nats-creds": "/creds", "buildkit-addr": "tcp://d"} {
		got, err := value(c, name)
		if err != nil || got != want {
			t.Errorf("value(%q) = %q, %v, want %q", name, got, err, want)
		}
	}
	if _, err := value(c, "unheard-of"); err == nil {
		t.Error("a flag without a field was given a value")
	}
}

func TestSettingsNeedTheirMarks(t *testing.T) {
	for _, old := range []string{"", settingsBegin, settingsEnd + settingsBegin} {
		if _, err := settings(t.Context(), "", []byte(old)); err == nil {
			t.Errorf("settings took %q, which has no place for the table", old)
		}
	}
	got, err := settings(t.Context(), "", []byte("before\n"+settingsBegin+"old table\n"+settingsEnd+"after\n"))
	if err != nil {
		t.Fatal(err)
	}
	s := string(got)
	if !strings.HasPrefix(s, "before\n"+settingsBegin) || !strings.HasSuffix(s, settingsEnd+"after\n") || strings.Contains(s, "old table") {
		t.Errorf("the table is not between the marks:\n%s", s)
	}
	if !strings.Contains(s, "| `--build-timeout` | `M3O_BUILD_TIMEOUT` | `build-timeout` | `15m0s` |") {
		t.Errorf("the table lacks --build-timeout with its default:\n%s", s)
	}
}
