package main

import (
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/m3o/m3o/internal/need"
)

// The guides' commands are run as they stand, so that they cannot go stale.
func TestGuidesWork(t *testing.T) {
	b := theBox(t)
	for _, doc := range []string{"first-app.md"} {
		t.Run(doc, func(t *testing.T) {
			text, err := os.ReadFile(filepath.Join(need.RepoRoot(t), "docs", doc))
			if err != nil {
				t.Fatal(err)
			}
			blocks := regexp.MustCompile("(?ms)^```sh\n(.*?)^```$").FindAllStringSubmatch(string(text), -1)
			if len(blocks) == 0 {
				t.Fatal("no commands in " + doc)
			}
			var script strings.Builder
			for _, m := range blocks {
				script.WriteString(m[1])
			}
			p := b.user(t, "reader")
			work := t.TempDir()
			out := p.must(t, work, "bash", "-eu", "-o", "pipefail", "-c", script.String())
			t.Log(out)
			for _, want := range []string{"Released v1", "rollback to v1"} {
				if !strings.Contains(out, want) {
					t.Errorf("the guide's commands did not print %q:\n%s", want, out)
				}
			}
		})
	}
}
