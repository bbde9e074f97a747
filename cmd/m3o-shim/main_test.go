//go:build linux

package main

import (
	"os"
	"path/filepath"
	"testing"
)

func TestOutOfMemoryIsReadOfBothCgroupVersions(t *testing.T) {
	for _, c := range []struct {
		file, text string
		want       bool
	}{
		{"memory.events", "low 0\nhigh 0\nmax 31\noom 1\noom_kill 1\noom_group_kill 0\n", true},
		{"memory.events", "low 0\nhigh 0\nmax 31\noom 0\noom_kill 0\noom_group_kill 0\n", false},
		{"memory.oom_control", "oom_kill_disable 0\nunder_oom 0\noom_kill 3\n", true},
		{"memory.oom_control", "oom_kill_disable 0\nunder_oom 0\noom_kill 0\n", false},
		{"memory.other", "oom_kill 3\n", false},
	} {
		dir := t.TempDir()
		if err := os.WriteFile(filepath.Join(dir, c.file), []byte(c.text), 0o600); err != nil {
			t.Fatal(err)
		}
		if got := oomKilled(dir); got != c.want {
			t.Errorf("%s %q: killed = %t", c.file, c.text, got)
		}
	}
}

func FuzzOOMKills(f *testing.F) {
	f.Add([]byte("oom_kill 1\n"))
	f.Fuzz(func(_ *testing.T, b []byte) { oomKills(b) })
}
