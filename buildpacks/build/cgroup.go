package build

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// A cgroup is the control group of BuildKit and of the steps it runs, below
// the apps in weight and bounded in memory and processes. Its two children are "daemon",
// where buildkitd is, and "steps", below which BuildKit puts each step: cgroup
// v2 allows processes only in leaves.
type cgroup struct {
	name  string   // path below each root, "m3o-build-1a2b3c"
	roots []string // v2: the one root; v1: one per controller
	v2    bool
}

const cgroupRoot = "/sys/fs/cgroup"

// weights put builds below anything that has the default weight. The kernel
// may lack a file (I/O weights need the BFQ scheduler); builds are then
// bounded by the others.
var weights = map[string]string{
	// cgroup v1: cpu.shares 1024 is the default, blkio weight 500 and 100.
	"cpu.shares": "512", "blkio.weight": "100", "blkio.bfq.weight": "25",
	// cgroup v2: the default of both is 100.
	"cpu.weight": "50", "io.weight": "default 25", "io.bfq.weight": "default 25",
}

// findCgroup names the group; it touches nothing.
func findCgroup(name string) (*cgroup, error) {
	var st unix.Statfs_t
	if err := unix.Statfs(cgroupRoot, &st); err != nil {
		return nil, fmt.Errorf("no cgroups: %w", err)
	}
	if st.Type == unix.CGROUP2_SUPER_MAGIC {
		return &cgroup{name: name, roots: []string{cgroupRoot}, v2: true}, nil
	}
	c := &cgroup{name: name}
	for _, ctl := range []string{"pids", "memory", "cpu", "blkio", "freezer", "devices", "cpuset", "cpuacct", "perf_event", "net_cls", "hugetlb", "systemd", "unified"} {
		root := filepath.Join(cgroupRoot, ctl)
		if fi, err := os.Stat(root); err == nil && fi.IsDir() {
			c.roots = append(c.roots, root)
		}
	}
	if len(c.roots) == 0 {
		return nil, errors.New("no cgroup hierarchy is mounted")
	}
	return c, nil
}

// limited are the v1 controllers this group sets something in. The others
// are only looked through when it is removed: runc makes groups there too.
var limited = []string{"pids", "memory", "cpu", "blkio"}

// daemonMemory is what buildkitd may have beside its steps. The steps' limit is
// of their own group: a step that reaches it must not cost buildkitd its life.
const daemonMemory = 512 << 20

func (c *cgroup) create(memory int64, pids int) error {
	if c.v2 {
		return c.create2(memory, pids)
	}
	for _, root := range c.roots {
		if !slices.Contains(limited, filepath.Base(root)) {
			continue
		}
		top := filepath.Join(root, c.name)
		if err := os.MkdirAll(top, 0o755); err != nil {
			return fmt.Errorf("make cgroup: %w", err)
		}
		if filepath.Base(root) == "memory" {
			// Refused as busy where an older kernel has children already; harmless then.
			_ = set(top, "memory.use_hierarchy", "1")
		}
		for _, child := range []string{"daemon", "steps"} {
			if err := os.MkdirAll(filepath.Join(top, child), 0o755); err != nil {
				return fmt.Errorf("make cgroup: %w", err)
			}
		}
		c.weigh(top)
		steps := filepath.Join(top, "steps")
		switch filepath.Base(root) {
		case "memory":
			err := set(top, "memory.limit_in_bytes", strconv.FormatInt(memory+daemonMemory, 10))
			if err == nil {
				err = limitSteps(steps, memory)
			}
			if err != nil {
				return fmt.Errorf("limit memory of builds: %w", err)
			}
		case "pids":
			if err := set(steps, "pids.max", strconv.Itoa(pids)); err != nil {
				return fmt.Errorf("limit processes of builds: %w", err)
			}
		}
	}
	return nil
}

// limitSteps sets the memory of steps where there is a hierarchy of its own
// for it. Swap counts as memory: builds that swap slow down everybody.
func limitSteps(dir string, memory int64) error {
	n := strconv.FormatInt(memory, 10)
	// The limit with swap must never be below the one without.
	_ = set(dir, "memory.memsw.limit_in_bytes", n)
	if err := set(dir, "memory.limit_in_bytes", n); err != nil {
		return err
	}
	_ = set(dir, "memory.memsw.limit_in_bytes", n) // a kernel may not account for swap
	return nil
}

func (c *cgroup) create2(memory int64, pids int) error {
	top := filepath.Join(c.roots[0], c.name)
	const controllers = "+cpu +memory +io +pids"
	for _, ctl := range strings.Fields(controllers) {
		_ = set(c.roots[0], "cgroup.subtree_control", ctl) // each by itself: one the kernel lacks must not stop the others
	}
	if err := os.MkdirAll(filepath.Join(top, "daemon"), 0o755); err != nil {
		return fmt.Errorf("make cgroup: %w", err)
	}
	c.weigh(top)
	for _, ctl := range strings.Fields(controllers) {
		_ = set(top, "cgroup.subtree_control", ctl)
	}
	steps := filepath.Join(top, "steps")
	if err := os.MkdirAll(steps, 0o755); err != nil {
		return fmt.Errorf("make cgroup: %w", err)
	}
	err := set(top, "memory.max", strconv.FormatInt(memory+daemonMemory, 10))
	if err == nil {
		err = set(steps, "memory.max", strconv.FormatInt(memory, 10))
	}
	if err != nil {
		return fmt.Errorf("limit memory of builds: %w", err)
	}
	_ = set(steps, "memory.swap.max", "0") // builds that swap slow down everybody
	if err := set(steps, "pids.max", strconv.Itoa(pids)); err != nil {
		return fmt.Errorf("limit processes of builds: %w", err)
	}
	return nil
}

func (c *cgroup) weigh(dir string) {
	for file, v := range weights {
		if _, err := os.Stat(filepath.Join(dir, file)); err == nil {
			_ = set(dir, file, v)
		}
	}
}

// add moves a process, with all its threads, into the daemon's group.
func (c *cgroup) add(pid int) error {
	for _, root := range c.roots {
		dir := filepath.Join(root, c.name, "daemon")
		if _, err := os.Stat(dir); err != nil {
			continue
		}
		if err := set(dir, "cgroup.procs", strconv.Itoa(pid)); err != nil {
			return fmt.Errorf("move buildkitd into its cgroup: %w", err)
		}
	}
	return nil
}

// steps is the parent group BuildKit is told.
func (c *cgroup) steps() string { return "/" + c.name + "/steps" }

// pids lists the processes in the group and below.
func (c *cgroup) pids() []int {
	seen := map[int]bool{}
	for _, root := range c.roots {
		_ = filepath.WalkDir(filepath.Join(root, c.name), func(p string, de fs.DirEntry, err error) error {
			if err != nil || !de.IsDir() {
				return nil //nolint:nilerr // groups vanish while they are listed
			}
			for _, pid := range procs(p) {
				seen[pid] = true
			}
			return nil
		})
	}
	out := make([]int, 0, len(seen))
	for pid := range seen {
		out = append(out, pid)
	}
	return out
}

// kill ends every process in the group and waits until none is left.
func (c *cgroup) kill(ctx context.Context) error {
	if c.v2 {
		_ = set(filepath.Join(c.roots[0], c.name), "cgroup.kill", "1") // Linux 5.14; the loop does it otherwise
	}
	for {
		pids := c.pids()
		if len(pids) == 0 {
			return nil
		}
		for _, pid := range pids {
			_ = unix.Kill(pid, unix.SIGKILL)
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("%d processes of builds do not end: %w", len(pids), ctx.Err())
		case <-time.After(5 * time.Millisecond):
		}
	}
}

// remove deletes the group, deepest first. Nothing may run in it.
func (c *cgroup) remove() error {
	var errs []error
	for _, root := range c.roots {
		var dirs []string
		_ = filepath.WalkDir(filepath.Join(root, c.name), func(p string, de fs.DirEntry, err error) error {
			if err == nil && de.IsDir() {
				dirs = append(dirs, p)
			}
			return nil
		})
		for _, d := range slices.Backward(dirs) {
			if err := os.Remove(d); err != nil && !errors.Is(err, fs.ErrNotExist) {
				errs = append(errs, err)
			}
		}
	}
	if len(errs) > 0 {
		return fmt.Errorf("remove cgroup: %w", errs[0])
	}
	return nil
}

func set(dir, file, value string) error {
	return os.WriteFile(filepath.Join(dir, file), []byte(value), 0)
}
