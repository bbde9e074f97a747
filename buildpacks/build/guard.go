package build

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/m3o/m3o"
	"golang.org/x/sys/unix"
)

// A guard ends steps of builds that take more of the machine than they may and
// that the kernel does not end by itself: a step that fills the disk, and one
// that stands at the limit of processes and would keep others from starting
// any. It looks twice a second, and only while builds run.
//
// No quota of a file system is relied on: few hosts have one. The room of the
// file system is asked instead, which is one system call; only when it shrinks,
// each step's own files are counted.
type guard struct {
	cgroup *cgroup
	dir    string // on the file system that builds write to
	wrote  func(pids []int, since time.Time) int64

	mu     sync.Mutex // guards the rest
	disk   int64      // what one step may write
	pids   int        // of all steps together
	floor  int64      // bytes in use when steps were last counted
	since  map[string]time.Time
	ended  *m3o.Error // why a step was killed last
	killed time.Time
}

const (
	guardPause = 500 * time.Millisecond
	// reasonLife is how long after a kill its build may take to fail.
	reasonLife = 30 * time.Second
	// reserve is what builds must leave of a file system, less on a small one.
	reserve = 1 << 30
	// bigWriter is what a step must have written to be ended for a full disk
	// that others may have filled.
	bigWriter = 64 << 20
)

// run watches until ctx ends. busy tells whether builds run.
func (g *guard) run(ctx context.Context, busy func() bool) {
	tick := time.NewTicker(guardPause)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case now := <-tick.C:
			if !busy() {
				g.rest()
				continue
			}
			g.look(ctx, now)
		}
	}
}

// rest forgets the steps there were.
func (g *guard) rest() {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.since, g.floor = nil, 0
}

// reason is why a step was killed just now, nil if this guard killed none. It is told once.
func (g *guard) reason() *m3o.Error {
	if g == nil {
		return nil
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	e := g.ended
	g.ended = nil
	if time.Since(g.killed) > reasonLife {
		return nil
	}
	return e
}

// look ends what takes too much.
func (g *guard) look(ctx context.Context, now time.Time) {
	g.mu.Lock()
	defer g.mu.Unlock()
	steps := g.cgroup.running()
	since := map[string]time.Time{}
	for s := range steps {
		since[s] = now.Add(-2 * guardPause)
		if t, ok := g.since[s]; ok {
			since[s] = t
		}
	}
	g.since = since
	if g.pids > 0 && g.cgroup.count() >= g.pids {
		g.end(ctx, mostPids(steps), pidsError(g.pids))
		return
	}
	var st unix.Statfs_t
	if err := unix.Statfs(g.dir, &st); err != nil {
		return
	}
	unit := int64(st.Bsize)
	used, free := int64(st.Blocks-st.Bfree)*unit, int64(st.Bavail)*unit
	scarce := free < min(reserve, int64(st.Blocks)*unit/20)
	if g.floor == 0 || used < g.floor {
		g.floor = used
	}
	if !scarce && used-g.floor < g.disk/8 {
		return
	}
	g.floor = used
	most, wrote := "", int64(0)
	for s, pids := range steps {
		if n := g.wrote(pids, since[s]); n > wrote {
			most, wrote = s, n
		}
	}
	switch {
	case wrote > g.disk:
		g.end(ctx, most, &m3o.Error{Kind: m3o.Invalid, Msg: fmt.Sprintf("the build was ended: it wrote more than %s, all a step of a build may", size(g.disk)),
			Hint: "write less, or raise m3od --build-disk"})
	case scarce && wrote > bigWriter:
		g.end(ctx, most, &m3o.Error{Kind: m3o.Unavailable, Msg: fmt.Sprintf("the build was ended: the disk of the build machine is nearly full, and it had written %s", size(wrote)),
			Hint: "free space there, or write less, then push again"})
	}
}

// end kills a step. Called with mu held.
func (g *guard) end(ctx context.Context, step string, why *m3o.Error) {
	ctx, cancel := context.WithTimeout(ctx, killGrace)
	defer cancel()
	g.ended, g.killed = why, time.Now() // first: the build fails as soon as the step is gone
	if step == "" || g.cgroup.killStep(ctx, step) != nil {
		g.ended = nil
	}
}

func mostPids(steps map[string][]int) string {
	most := ""
	for s, pids := range steps {
		if most == "" || len(pids) > len(steps[most]) || len(pids) == len(steps[most]) && s < most {
			most = s
		}
	}
	return most
}

func pidsError(limit int) *m3o.Error {
	return &m3o.Error{Kind: m3o.Invalid, Msg: fmt.Sprintf("the build was ended: builds may have %d processes and threads together, and it wanted more", limit),
		Hint: "start fewer at once, or raise m3od --build-pids"}
}

// noMorePids is what programs say whom the limit keeps from starting one.
var noMorePids = regexp.MustCompile(`(?i)(?:fork|clone|exec|thread|posix_spawn|runtime).*resource temporarily unavailable|failed to create new OS thread|can't fork|cannot fork`)

// overLimit explains the end of a step by a limit of builds, nil if it was none.
func (b *Builder) overLimit(code uint32, said []string, err error) error {
	all := strings.Join(said, "\n")
	killed := code == 137 || strings.Contains(all, "signal: killed")
	var e *m3o.Error
	switch why := b.guard.reason(); {
	case killed && why != nil:
		e = why
	case noMorePids.MatchString(all):
		e = pidsError(b.cfg.Pids)
	case killed:
		e = &m3o.Error{Kind: m3o.Unavailable, Msg: fmt.Sprintf("the build was killed: builds may use %s of memory together, and it wanted more", size(b.cfg.Memory)),
			Hint: "push again if others were building; else make it need less, or raise m3od --build-memory"}
	default:
		return nil
	}
	return &m3o.Error{Kind: e.Kind, Msg: e.Msg, Hint: e.Hint, Err: err}
}

// size is an amount as people read it.
func size(n int64) string {
	if n >= 10<<30 || n >= 1<<30 && n%(1<<30) == 0 {
		return fmt.Sprintf("%d GB", n>>30)
	}
	if n >= 1<<30 {
		return fmt.Sprintf("%.1f GB", float64(n)/(1<<30))
	}
	return fmt.Sprintf("%d MB", n>>20)
}

// written is how much a step's processes have put into files they can see
// since a time, or at least how much the kernel counts as theirs: a file that
// was unlinked and is still open cannot be seen.
func written(pids []int, since time.Time) int64 {
	var io int64
	for _, pid := range pids {
		io += wroteBytes(pid)
	}
	for _, pid := range pids {
		if n, err := changedFiles(pid, since); err == nil {
			return max(n, io)
		}
	}
	return io
}

// wroteBytes reads write_bytes of /proc/PID/io, 0 if it cannot be read.
func wroteBytes(pid int) int64 {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/io", pid))
	if err != nil {
		return 0
	}
	for l := range strings.Lines(string(b)) {
		if v, ok := strings.CutPrefix(l, "write_bytes: "); ok {
			n, _ := strconv.ParseInt(strings.TrimSpace(v), 10, 64)
			return n
		}
	}
	return 0
}

// changedFiles adds up the files that changed since a time on all that a
// process can write to.
func changedFiles(pid int, since time.Time) (int64, error) {
	mounts, err := os.ReadFile(fmt.Sprintf("/proc/%d/mountinfo", pid))
	if err != nil {
		return 0, err
	}
	var sum int64
	seen := map[[2]uint64]bool{} // hard links, and mounts within mounts
	for _, m := range writable(string(mounts)) {
		top := fmt.Sprintf("/proc/%d/root%s", pid, strings.TrimSuffix(m, "/"))
		var dev uint64
		err := filepath.WalkDir(top+"/.", func(_ string, de fs.DirEntry, err error) error {
			if err != nil {
				return nil //nolint:nilerr // files vanish while they are listed
			}
			fi, err := de.Info()
			if err != nil {
				return nil //nolint:nilerr // as above
			}
			st, ok := fi.Sys().(*syscall.Stat_t)
			if !ok {
				return nil
			}
			if de.IsDir() {
				if dev == 0 {
					dev = st.Dev
				}
				if st.Dev != dev {
					return fs.SkipDir // another mount, counted by itself
				}
				return nil
			}
			id := [2]uint64{st.Dev, st.Ino}
			if fi.Mode().IsRegular() && !seen[id] && !time.Unix(st.Ctim.Sec, st.Ctim.Nsec).Before(since) {
				seen[id] = true
				sum += st.Blocks * 512
			}
			return nil
		})
		if err != nil {
			return 0, err
		}
	}
	return sum, nil
}

// writable are the mount points in a mountinfo (see proc(5)) at which files on
// a disk can be written.
func writable(mountinfo string) []string {
	var out []string
	sc := bufio.NewScanner(strings.NewReader(mountinfo))
	sc.Buffer(nil, 1<<20)
	for sc.Scan() {
		before, after, ok := strings.Cut(sc.Text(), " - ")
		f, g := strings.Fields(before), strings.Fields(after)
		if !ok || len(f) < 6 || len(g) < 1 {
			continue
		}
		if slices.Contains(strings.Split(f[5], ","), "rw") && !slices.Contains([]string{"proc", "sysfs", "tmpfs", "devpts", "mqueue", "cgroup", "cgroup2"}, g[0]) {
			out = append(out, unescape(f[4]))
		}
	}
	return out
}

// unescape undoes the octal escapes of a path in mountinfo.
var octal = regexp.MustCompile(`\\[0-7]{3}`)

func unescape(s string) string {
	return octal.ReplaceAllStringFunc(s, func(e string) string {
		n, _ := strconv.ParseUint(e[1:], 8, 8) // three octal digits; more than a byte has is 0
		return string([]byte{byte(n)})
	})
}

// running lists the groups of steps that have processes, with these.
func (c *cgroup) running() map[string][]int {
	out := map[string][]int{}
	root := c.rootOf("pids")
	_ = filepath.WalkDir(filepath.Join(root, c.steps()), func(p string, de fs.DirEntry, err error) error {
		if err == nil && de.IsDir() {
			if pids := procs(p); len(pids) > 0 {
				rel, _ := filepath.Rel(root, p) // below root it is
				out[rel] = pids
			}
		}
		return nil
	})
	return out
}

// count is how many processes and threads all steps have.
func (c *cgroup) count() int {
	b, err := os.ReadFile(filepath.Join(c.rootOf("pids"), c.steps(), "pids.current"))
	if err != nil {
		return 0
	}
	n, _ := strconv.Atoi(strings.TrimSpace(string(b)))
	return n
}

// rootOf is where the hierarchy with a controller is.
func (c *cgroup) rootOf(controller string) string {
	for _, r := range c.roots {
		if c.v2 || filepath.Base(r) == controller {
			return r
		}
	}
	return c.roots[0]
}

// killStep ends all processes of one step.
func (c *cgroup) killStep(ctx context.Context, step string) error {
	dir := filepath.Join(c.rootOf("pids"), step)
	_ = set(dir, "pids.max", "0") // what is killed must not be faster at starting new ones
	for {
		pids := procs(dir)
		if len(pids) == 0 {
			return nil
		}
		for _, pid := range pids {
			if err := unix.Kill(pid, unix.SIGKILL); err != nil && !errors.Is(err, unix.ESRCH) {
				return err
			}
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(5 * time.Millisecond):
		}
	}
}

// procs are the processes of one group.
func procs(dir string) []int {
	b, _ := os.ReadFile(filepath.Join(dir, "cgroup.procs"))
	var out []int
	for f := range strings.FieldsSeq(string(b)) {
		if pid, err := strconv.Atoi(f); err == nil {
			out = append(out, pid)
		}
	}
	return out
}
