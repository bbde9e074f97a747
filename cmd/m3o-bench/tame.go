//go:build linux

package main

import (
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"
)

// A tame is a cgroup with the CPU weight that m3o gives its builds. Builds
// stand back behind everything else on the machine; on a busy one a plain go
// build is therefore served first, and says nothing of what m3o adds. The same
// go build in such a group does.
type tame struct {
	dir  string
	file string // "cpu.shares" or "cpu.weight"
	cpu  string // its value
}

// newTame makes a group beside the one that buildkitd runs in.
func (b *bench) newTame() (*tame, error) {
	p, err := b.box.parts()
	if err != nil {
		return nil, err
	}
	if len(p.buildkit) == 0 {
		return nil, fmt.Errorf("no buildkitd runs")
	}
	groups, err := os.ReadFile(fmt.Sprintf("/proc/%d/cgroup", p.buildkit[0].pid))
	if err != nil {
		return nil, err
	}
	mounts, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return nil, err
	}
	root, group, file := cpuGroup(string(groups), string(mounts))
	if root == "" {
		return nil, fmt.Errorf("no cgroup of buildkitd with CPU weights")
	}
	for ; group != "/" && group != "."; group = filepath.Dir(group) {
		v, err := os.ReadFile(filepath.Join(root, group, file))
		if err != nil {
			return nil, err
		}
		value := strings.TrimSpace(string(v))
		if value == map[string]string{"cpu.shares": "1024", "cpu.weight": "100"}[file] {
			continue // as everybody has; the weight is set further up
		}
		t := &tame{dir: filepath.Join(root, filepath.Dir(group), "m3o-bench-"+strconv.Itoa(os.Getpid())), file: file, cpu: value}
		if err := os.Mkdir(t.dir, 0o755); err != nil {
			return nil, err
		}
		if err := os.WriteFile(filepath.Join(t.dir, file), []byte(value), 0); err != nil {
			t.remove()
			return nil, err
		}
		return t, nil
	}
	return nil, fmt.Errorf("buildkitd has the CPU weight of everybody else")
}

// remove takes the group away once its last process is gone.
func (t *tame) remove() {
	for range 100 {
		if os.Remove(t.dir) == nil {
			return
		}
		time.Sleep(10 * time.Millisecond)
	}
}

// argv is a command line that runs args inside the group.
func (t *tame) argv(args ...string) []string {
	return append([]string{"sh", "-c", `echo $$ >"$0" && exec "$@"`, filepath.Join(t.dir, "cgroup.procs")}, args...)
}

// cpuGroup finds where a process's CPU weight is set: the mount of the cgroup
// hierarchy, the group in it, and the name of the file. groups is
// /proc/PID/cgroup (cgroups(7)), mounts is /proc/self/mountinfo (proc(5)).
// root is "" when there is none.
func cpuGroup(groups, mounts string) (root, group, file string) {
	unified := ""
	for l := range strings.Lines(groups) {
		f := strings.SplitN(strings.TrimSpace(l), ":", 3)
		switch {
		case len(f) != 3:
		case f[0] == "0" && f[1] == "":
			unified = f[2]
		case has(f[1], "cpu"):
			if root := cgroupMount(mounts, "cgroup", "cpu"); root != "" {
				return root, f[2], "cpu.shares"
			}
		}
	}
	if root := cgroupMount(mounts, "cgroup2", ""); root != "" && unified != "" {
		return root, unified, "cpu.weight"
	}
	return "", "", ""
}

// cgroupMount is where a cgroup file system is mounted; option, if any, must
// be among its superblock's.
func cgroupMount(mounts, kind, option string) string {
	for l := range strings.Lines(mounts) {
		before, after, ok := strings.Cut(l, " - ")
		f, g := strings.Fields(before), strings.Fields(after)
		if ok && len(f) > 4 && len(g) > 2 && g[0] == kind && (option == "" || has(g[2], option)) {
			return f[4]
		}
	}
	return ""
}

// has says whether a list separated by commas has a word in it.
func has(list, word string) bool {
	for w := range strings.SplitSeq(list, ",") {
		if w == word {
			return true
		}
	}
	return false
}
