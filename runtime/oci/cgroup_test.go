//go:build linux

package oci

import (
	"context"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/opencontainers/runtime-spec/specs-go"

	"github.com/m3o/m3o/runtime"
)

// tree makes directories and files below a new directory, as the kernel shows
// a hierarchy: a machine has either cgroup version, the tests want both.
func tree(t *testing.T, files map[string]string) string {
	t.Helper()
	root := t.TempDir()
	for name, text := range files {
		path := filepath.Join(root, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	return root
}

func content(t *testing.T, path string) string {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

func TestUnifiedHierarchyHandsControllersDown(t *testing.T) {
	root := tree(t, map[string]string{"cgroup.controllers": "cpuset cpu io memory pids\n", "cgroup.subtree_control": ""})
	c := cgroups{"m3o", []hierarchy{{dir: root, v2: true}}}
	if err := c.setup(); err != nil {
		t.Fatal(err)
	}
	for _, dir := range []string{root, filepath.Join(root, "m3o")} {
		if got := content(t, filepath.Join(dir, "cgroup.subtree_control")); got != "+cpu +memory +pids" {
			t.Errorf("%s hands down %q", dir, got)
		}
	}
	if !c.has("memory") || !c.has("pids") || c.has("hugetlb") {
		t.Error("has does not read cgroup.controllers")
	}
}

func TestShimIsBornInTheUnifiedHierarchyAndJoinsTheOthers(t *testing.T) {
	root := t.TempDir()
	v2 := cgroups{"m3o", []hierarchy{{dir: root, v2: true}}}
	born, others, err := v2.shim("i")
	if err != nil || born != filepath.Join(root, "m3o/i.shim") || len(others) > 0 {
		t.Errorf("v2: born in %q, joins %q, %v", born, others, err)
	}
	hybrid := cgroups{"m3o", []hierarchy{{dir: root + "/pids", controllers: []string{"pids"}}, {dir: root + "/memory", controllers: []string{"memory"}},
		{dir: root + "/cpu", controllers: []string{"cpu", "cpuacct"}}, {dir: root + "/unified", v2: true}, {dir: root + "/systemd", controllers: []string{"name=systemd"}}}}
	born, others, err = hybrid.shim("i")
	want := []string{root + "/memory/m3o/i.shim", root + "/cpu/m3o/i.shim", root + "/systemd/m3o/i.shim"}
	if err != nil || born != root+"/unified/m3o/i.shim" || !slices.Equal(others, want) {
		t.Errorf("hybrid: born in %q, joins %q, %v; want %q", born, others, err, want)
	}
	for _, dir := range append(others, born) {
		if _, err := os.Stat(dir); err != nil {
			t.Error(err)
		}
	}
	if got := hybrid.list(); !slices.Equal(got, []string{"i"}) {
		t.Errorf("the list is %q", got)
	}
	if err := errors.Join(hybrid.kill(t.Context(), "i"), hybrid.remove("i"), hybrid.remove("i")); err != nil {
		t.Error(err)
	}
	if got := hybrid.list(); len(got) > 0 {
		t.Errorf("after the removal there is %q", got)
	}
}

func TestUsageOfBothCgroupVersions(t *testing.T) {
	v2 := tree(t, map[string]string{
		"m3o/i/memory.current": "41943040\n", "m3o/i/memory.max": "268435456\n", "m3o/i/memory.stat": "anon 1\ninactive_file 10485760\n",
		"m3o/i/memory.events": "low 0\nhigh 0\nmax 7\noom 2\noom_kill 2\noom_group_kill 0\n",
		"m3o/i/cpu.stat":      "usage_usec 1500000\nuser_usec 1000000\nsystem_usec 500000\n", "m3o/i/pids.current": "9\n",
		"m3o/bare/memory.current": "1\n", "m3o/bare/memory.max": "max\n",
	})
	v1 := tree(t, map[string]string{
		"memory/m3o/i/memory.usage_in_bytes": "41943040\n", "memory/m3o/i/memory.limit_in_bytes": "268435456\n",
		"memory/m3o/i/memory.stat": "inactive_file 5\ntotal_inactive_file 10485760\n", "memory/m3o/i/memory.oom_control": "oom_kill_disable 0\nunder_oom 0\noom_kill 2\n",
		"cpuacct/m3o/i/cpuacct.usage": "1500000000\n", "pids/m3o/i/pids.current": "9\n",
	})
	want := runtime.Usage{CPU: 1500 * time.Millisecond, MemoryBytes: 30 << 20, MemoryLimit: 256 << 20, Pids: 9, OOMKills: 2}
	two := cgroups{"m3o", []hierarchy{{dir: v2, v2: true}}}
	one := cgroups{"m3o", []hierarchy{{dir: v1 + "/memory", controllers: []string{"memory"}}, {dir: v1 + "/cpuacct", controllers: []string{"cpuacct"}},
		{dir: v1 + "/pids", controllers: []string{"pids"}}, {dir: v2 + "/unused", v2: true}}}
	for name, c := range map[string]cgroups{"v2": two, "v1": one} {
		got, err := c.usage("i")
		if d := cmp.Diff(want, got); d != "" || err != nil {
			t.Errorf("%s: %v\n%s", name, err, d)
		}
		if _, err := c.usage("gone"); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("%s: usage of what is gone = %v", name, err)
		}
	}
	if u, err := two.usage("bare"); err != nil || u.MemoryLimit != runtime.DefaultMemoryBytes || u.CPU != 0 || u.Pids != 0 {
		t.Errorf("usage without limits and counters = %+v, %v", u, err)
	}
}

func TestLimitsReachTheSpec(t *testing.T) {
	w := runtime.Workload{MemoryBytes: 64 << 20, CPUMillis: 500, Pids: 32, Files: 100}
	s, err := bundle{id: "i", w: w, swap: true, cgroup: "/m3o/i"}.spec()
	if err != nil {
		t.Fatal(err)
	}
	r := s.Linux.Resources
	if *r.Memory.Limit != 64<<20 || *r.Memory.Swap != 64<<20 || *r.Pids.Limit != 32 || *r.CPU.Quota != 50_000 || *r.CPU.Period != 100_000 {
		t.Errorf("resources: %+v", r)
	}
	if s.Linux.CgroupsPath != "/m3o/i" || s.Process.Rlimits[0] != (specs.POSIXRlimit{Type: "RLIMIT_NOFILE", Hard: 100, Soft: 100}) {
		t.Errorf("cgroup %s, rlimits %v", s.Linux.CgroupsPath, s.Process.Rlimits)
	}
	if n := len(s.Linux.Seccomp.Architectures); n != 1 {
		t.Errorf("the filter is for %d architectures", n)
	}
}

// A signal that came between a command's first words and runc's note of its
// process id was lost.
func TestSignalBeforeThePidIsKnownIsNotLost(t *testing.T) {
	path := filepath.Join(t.TempDir(), "pid")
	got := make(chan int, 1)
	go func() {
		pid, err := awaitPid(t.Context(), path)
		if err != nil {
			pid = -1
		}
		got <- pid
	}()
	if err := os.WriteFile(path+".new", []byte("77"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(path+".new", path); err != nil {
		t.Fatal(err)
	}
	if pid := <-got; pid != 77 {
		t.Errorf("the signal goes to %d", pid)
	}
	ended, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := awaitPid(ended, path+".never"); err == nil {
		t.Error("a command that ended without a pid has one")
	}
}

func FuzzCgroupFiles(f *testing.F) {
	f.Add([]byte("30 23 0:26 / /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw\n"))
	f.Add([]byte("31 30 0:27 / /sys/fs/cgroup/memory rw shared:5 - cgroup cgroup rw,memory"))
	f.Add([]byte("oom_kill 2\nusage_usec -1\n x 99999999999999999999\n"))
	f.Fuzz(func(t *testing.T, b []byte) {
		for _, h := range parseHierarchies(b) {
			if h.dir == "" || strings.ContainsAny(h.dir, " \n") {
				t.Errorf("%q has a hierarchy at %q", b, h.dir)
			}
		}
		for k := range parseFields(b) {
			if strings.ContainsAny(k, " \n") {
				t.Errorf("%q has a field %q", b, k)
			}
		}
	})
}
