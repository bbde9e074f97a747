package daemon

import (
	"context"
	"fmt"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// minKernel and minGit are the first that m3o is tested with.
var minKernel, minGit = [2]int{5, 10}, [2]int{2, 38}

func older(version string, least [2]int) bool {
	var v [2]int
	n, _ := fmt.Sscanf(version, "%d.%d", &v[0], &v[1])
	return n == 2 && slices.Compare(v[:], least[:]) < 0
}

func (e exam) kernel(_ context.Context, f *findings) {
	if e.uid != 0 {
		f.add(CheckFail, "root", "sudo m3od doctor", "this runs without root: m3od needs it, and most checks too")
	}
	rel := e.release()
	if older(rel, minKernel) {
		f.add(CheckFail, "kernel", "install a newer kernel and boot it", "Linux %s is older than %d.%d: apps cannot be kept apart and limited as they should", rel, minKernel[0], minKernel[1])
	} else {
		f.add(CheckOK, "kernel", "", "Linux %s", rel)
	}
	// What is not loaded yet is loaded by the first mount, if it is there.
	if b, err := e.read("/proc/filesystems"); err != nil {
		f.add(CheckWarn, "kernel", "mount -t proc proc /proc", "the file systems that the kernel knows cannot be read: %v", err)
	} else if dep, _ := e.read("/lib/modules/" + rel + "/modules.dep"); !strings.Contains(string(b), "\toverlay\n") && !strings.Contains(string(dep), "/overlay.ko") {
		f.add(CheckFail, "kernel", "modprobe overlay, or boot a kernel with CONFIG_OVERLAY_FS", "the kernel knows no overlay file system: no image can be mounted, so no app starts")
	}
	if _, err := e.read("/proc/sys/kernel/seccomp/actions_avail"); err != nil {
		f.add(CheckFail, "kernel", "boot a kernel with CONFIG_SECCOMP_FILTER", "the kernel has no seccomp filters: no app starts")
	}
}

func (e exam) programs(ctx context.Context, f *findings) {
	bad := len(*f)
	if out, err := e.run(ctx, "git", "version"); err != nil {
		f.add(CheckFail, "programs", "apt install git", "git does not run, so pushes cannot be taken: %v", err)
	} else if v := strings.TrimPrefix(strings.TrimSpace(out), "git version "); older(v, minGit) {
		f.add(CheckFail, "programs", fmt.Sprintf("install git %d.%d or newer", minGit[0], minGit[1]), "git %s is too old: m3od does not start with it", v)
	}
	need := []string{"m3o"}
	if e.cfg.BuildkitAddr == "" {
		need = append(need, "buildkitd")
	}
	for _, name := range need {
		if err := unix.Access(filepath.Join(e.cfg.Bin, name), unix.X_OK); err != nil {
			what := map[string]string{"m3o": "commands over SSH cannot be served", "buildkitd": "nothing can be built"}[name]
			f.add(CheckFail, "programs", "install m3o again, or say where its programs are with --bin", "%s cannot be run from %s, so %s: %v", name, e.cfg.Bin, what, err)
		}
	}
	if len(*f) == bad {
		f.add(CheckOK, "programs", "", "m3o's programs are in %s, and git is there", e.cfg.Bin)
	}
}

// Memory below which builds or apps are likely to be ended by the kernel.
const (
	lowMemory  = 1 << 30
	someMemory = 2 << 30
)

func (e exam) memory(_ context.Context, f *findings) {
	b, err := e.read("/proc/meminfo")
	if err != nil {
		f.add(CheckWarn, "memory", "mount -t proc proc /proc", "the memory cannot be asked for: %v", err)
		return
	}
	kb := map[string]int64{}
	for l := range strings.Lines(string(b)) {
		if w := strings.Fields(l); len(w) >= 2 {
			kb[w[0]], _ = strconv.ParseInt(w[1], 10, 64)
		}
	}
	total, left, swap := kb["MemTotal:"]<<10, kb["MemAvailable:"]<<10, kb["SwapTotal:"]<<10
	// A kernel keeps some of a machine's 1 or 2 GB for itself.
	switch {
	case total < lowMemory*9/10:
		f.add(CheckFail, "memory", "give the server 2 GB or more, or swap", "the server has %d MB of memory: m3o and one build do not fit", total>>20)
	case total < someMemory*9/10:
		f.add(CheckWarn, "memory", "give the server 4 GB, or swap and a lower --build-memory", "the server has %d MB of memory: a large build or a few apps use that up", total>>20)
	case left < 256<<20 && swap == 0:
		f.add(CheckWarn, "memory", "give the server more memory or swap; m3o ps -a APP shows what instances use, m3o ps:limits bounds it", "%d MB of memory are left and there is no swap: the kernel will end apps", left>>20)
	case int64(e.cfg.BuildMemory) > total:
		f.add(CheckWarn, "memory", fmt.Sprintf("--build-memory %dMB", total>>21), "builds may use %v of memory and the server has %d MB: a build can take what the apps need", e.cfg.BuildMemory, total>>20)
	default:
		f.add(CheckOK, "memory", "", "%d MB of memory, %d MB left", total>>20, left>>20)
	}
	if b, err := e.read("/proc/sys/vm/overcommit_memory"); err == nil && strings.TrimSpace(string(b)) == "2" {
		f.add(CheckWarn, "memory", "sysctl -w vm.overcommit_memory=0", "the kernel gives out no memory that it does not have (vm.overcommit_memory is 2): Go programs ask for more than they use and end")
	}
}

// sysctls are the kernel's bounds that a server with many apps meets first.
var sysctls = []struct {
	name   string
	least  int64
	breaks string
}{
	{"kernel.pid_max", 32768, "no process or thread can be started once so many run"},
	{"kernel.threads-max", 8192, "no process or thread can be started once so many run"},
	{"fs.file-max", 100_000, "connections and files are refused once so many are open"},
	{"fs.inotify.max_user_instances", 128, "apps that watch files fail"},
	{"net.netfilter.nf_conntrack_max", 16384, "new connections are dropped once there are so many"},
	{"net.core.somaxconn", 128, "connections are refused when many come at once"},
}

// leastFiles is how many open files carry a thousand connections and apps.
const leastFiles = 8192

func (e exam) limits(_ context.Context, f *findings) {
	bad := len(*f)
	for _, s := range sysctls {
		b, err := e.read("/proc/sys/" + strings.ReplaceAll(s.name, ".", "/"))
		if err != nil {
			continue // a module that is loaded later, as nf_conntrack
		}
		if v, err := strconv.ParseInt(strings.TrimSpace(string(b)), 10, 64); err == nil && v < s.least {
			f.add(CheckWarn, "limits", fmt.Sprintf("sysctl -w %s=%d, and the same in /etc/sysctl.d/m3o.conf", s.name, 4*s.least), "%s is %d: %s", s.name, v, s.breaks)
		}
	}
	who, path := "this shell", "/proc/self/limits"
	for _, p := range e.installations() {
		if p.data == e.cfg.Data {
			who, path = p.name(), fmt.Sprintf("/proc/%d/limits", p.pid)
		}
	}
	b, err := e.read(path)
	if err != nil {
		f.add(CheckWarn, "limits", "run this as root", "the limits of %s cannot be read: %v", who, err)
		return
	}
	for l := range strings.Lines(string(b)) {
		rest, ok := strings.CutPrefix(l, "Max open files")
		if w := strings.Fields(rest); ok && len(w) > 1 {
			// Go raises the soft limit to the hard one.
			if n, err := strconv.ParseInt(w[1], 10, 64); err == nil && n < leastFiles {
				f.add(CheckWarn, "limits", "LimitNOFILE=1048576 in the systemd unit, or ulimit -n 1048576 before m3od", "%s may open %d files: each connection takes two, and more are refused", who, n)
			}
		}
	}
	if len(*f) == bad {
		f.add(CheckOK, "limits", "", "the kernel's limits leave room")
	}
}

// service looks at the unit, where m3od is one of systemd's.
func (e exam) service(ctx context.Context, f *findings) {
	const unit = "m3od.service"
	out, err := e.run(ctx, "systemctl", "show", unit, "--property=LoadState,Delegate,KillMode,LimitNOFILE,TasksMax")
	if err != nil {
		return // no systemd, or not in here
	}
	is := map[string]string{}
	for l := range strings.Lines(out) {
		k, v, _ := strings.Cut(strings.TrimSpace(l), "=")
		is[k] = v
	}
	if is["LoadState"] != "loaded" {
		return
	}
	bad := len(*f)
	hint := func(line string) string {
		return "install tools/systemd/m3od.service anew, or: systemctl edit " + unit + ", [Service] " + line
	}
	if is["KillMode"] != "process" {
		f.add(CheckFail, "service", hint("KillMode=process"), "systemctl stop m3od ends the router and every app too (KillMode=%s): each restart is an outage", is["KillMode"])
	}
	if is["Delegate"] != "yes" {
		f.add(CheckWarn, "service", hint("Delegate=yes"), "the unit does not have cgroups of its own (Delegate=%s): systemd may turn off what limits apps and builds", is["Delegate"])
	}
	for key, least := range map[string]int64{"LimitNOFILE": leastFiles, "TasksMax": 4096} {
		if n, err := strconv.ParseInt(is[key], 10, 64); err == nil && n < least {
			f.add(CheckWarn, "service", hint(key+map[string]string{"LimitNOFILE": "=1048576", "TasksMax": "=infinity"}[key]), "the unit bounds m3od and the router by %s=%d: they refuse work once that is reached", key, n)
		}
	}
	if len(*f) == bad {
		f.add(CheckOK, "service", "", "%s is set up as it should", unit)
	}
}

// clocks asks the kernel whether somebody keeps its clock right: certificates,
// tokens and schedules depend on it.
func (e exam) clocks(_ context.Context, f *findings) {
	const unsynchronised = 0x40 // STA_UNSYNC of adjtimex(2)
	// No m3o is older than this.
	if now := e.now(); now.Year() < 2026 {
		f.add(CheckFail, "clock", "date -s sets it; apt install systemd-timesyncd keeps it", "the clock says %s: certificates are not valid yet, and nobody can connect", now.UTC().Format(time.DateOnly))
		return
	}
	status, err := e.clock()
	switch {
	case err != nil:
		f.add(CheckWarn, "clock", "timedatectl says more", "whether the clock is kept right cannot be asked: %v", err)
	case status&unsynchronised != 0:
		f.add(CheckWarn, "clock", "apt install systemd-timesyncd (or chrony)", "nothing keeps the clock right: certificates, tokens and schedules go by it")
	default:
		f.add(CheckOK, "clock", "", "the clock is kept right")
	}
}
