package daemon

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/m3o/m3o/gitserver"
	"github.com/m3o/m3o/internal/need"
)

// lines are findings as a line each: state check: message | hint.
func lines(f []Finding) string {
	var b strings.Builder
	for _, x := range f {
		fmt.Fprintf(&b, "%s %s: %s | %s\n", x.State, x.Check, x.Msg, x.Hint)
	}
	return b.String()
}

// examOf is an exam of this machine in which some files say something else;
// one with the text "-" is not there.
func examOf(t *testing.T, files map[string]string) exam {
	t.Helper()
	e := exam{thisHost(), Config{Data: t.TempDir(), Bin: t.TempDir(), BuildkitAddr: "unix:///nowhere"}}
	if err := e.cfg.Validate(); err != nil {
		t.Fatal(err)
	}
	e.read = func(path string) ([]byte, error) {
		switch text, ok := files[path]; {
		case text == "-":
			return nil, &fs.PathError{Op: "open", Path: path, Err: fs.ErrNotExist}
		case ok:
			return []byte(text), nil
		}
		return os.ReadFile(path)
	}
	return e
}

// expect wants of a check exactly the findings that begin with state and check
// as want's lines do, and have its parts.
func expect(t *testing.T, what string, found []Finding, want ...string) {
	t.Helper()
	got := lines(found)
	for _, w := range want {
		ok := slices.ContainsFunc(strings.Split(got, "\n"), func(l string) bool {
			for part := range strings.SplitSeq(w, " … ") {
				_, after, ok := strings.Cut(l, part)
				if !ok {
					return false
				}
				l = after
			}
			return true
		})
		if !ok {
			t.Errorf("%s:\n%swant %s", what, got, w)
		}
	}
	if len(want) == 0 && (strings.Contains(got, "fail ") || strings.Contains(got, "warn ")) {
		t.Errorf("%s:\n%swant nothing wrong", what, got)
	}
	for _, f := range found {
		if f.State != CheckOK && f.Hint == "" || f.State == CheckOK && f.Hint != "" {
			t.Errorf("%s: %+v: a hint belongs to what is wrong", what, f)
		}
	}
}

func TestDoctorOfTheMachine(t *testing.T) {
	const gb = 1 << 20 // kB
	mem := func(total, left, swap int) map[string]string {
		return map[string]string{"/proc/meminfo": fmt.Sprintf("MemTotal: %d kB\nMemAvailable: %d kB\nSwapTotal: %d kB\n", total, left, swap), "/proc/sys/vm/overcommit_memory": "0\n"}
	}
	limits := func(name, value string) map[string]string {
		m := map[string]string{"/proc/self/limits": "Limit  Soft Limit  Hard Limit  Units\nMax open files            1024                 524288               files\n"}
		for _, s := range sysctls {
			m["/proc/sys/"+strings.ReplaceAll(s.name, ".", "/")] = fmt.Sprint(s.least)
		}
		m[name] = value
		return m
	}
	says := func(out string, err error) func(context.Context, string, ...string) (string, error) {
		return func(context.Context, string, ...string) (string, error) { return out, err }
	}
	unit := func(text string) func(*exam) {
		return func(e *exam) { e.run = says(text, nil) }
	}
	kernel := map[string]string{"/proc/filesystems": "nodev\tproc\nnodev\toverlay\n", "/proc/sys/kernel/seccomp/actions_avail": "kill\n"}
	with := func(m map[string]string, path, text string) map[string]string {
		m2 := map[string]string{path: text}
		for k, v := range m {
			if k != path {
				m2[k] = v
			}
		}
		return m2
	}
	for _, c := range []struct {
		what   string
		files  map[string]string
		change func(*exam)
		check  func(exam, context.Context, *findings)
		want   []string // state check: message … hint; none: nothing is wrong
	}{
		{"a good kernel", kernel, func(e *exam) { e.uid, e.release = 0, func() string { return "6.1.0-9-amd64" } }, exam.kernel, nil},
		{"no root", kernel, func(e *exam) { e.uid = 1000 }, exam.kernel, []string{"fail root: this runs without root … sudo m3od doctor"}},
		{"an old kernel", kernel, func(e *exam) { e.release = func() string { return "4.19.0-6-amd64" } }, exam.kernel, []string{"fail kernel: Linux 4.19.0-6-amd64 is older than 5.10: apps cannot be kept apart … install a newer kernel"}},
		{"no overlay", with(kernel, "/proc/filesystems", "nodev\tproc\n"), nil, exam.kernel, []string{"fail kernel: the kernel knows no overlay file system: no image can be mounted … modprobe overlay"}},
		{"overlay that is loaded when it is used", with(with(kernel, "/proc/filesystems", "nodev\tproc\n"), "/lib/modules/6.1.0/modules.dep", "kernel/fs/overlayfs/overlay.ko:\n"),
			func(e *exam) { e.uid, e.release = 0, func() string { return "6.1.0" } }, exam.kernel, nil},
		{"no /proc", with(kernel, "/proc/filesystems", "-"), nil, exam.kernel, []string{"warn kernel: the file systems that the kernel knows cannot be read … mount -t proc"}},
		{"no seccomp", with(kernel, "/proc/sys/kernel/seccomp/actions_avail", "-"), nil, exam.kernel, []string{"fail kernel: the kernel has no seccomp filters: no app starts … CONFIG_SECCOMP_FILTER"}},

		{"no git", nil, func(e *exam) { e.run = says("", exec.ErrNotFound) }, exam.programs, []string{"fail programs: git does not run, so pushes cannot be taken: executable file not found … apt install git"}},
		{"an old git", nil, func(e *exam) { e.run = says("git version 2.30.2\n", nil) }, exam.programs, []string{"fail programs: git 2.30.2 is too old: m3od does not start with it … install git 2.38"}},
		{"no m3o", nil, nil, exam.programs, []string{"fail programs: m3o cannot be run from … so commands over SSH cannot be served: no such file … --bin"}},
		{"no buildkitd", nil, func(e *exam) { e.cfg.BuildkitAddr = "" }, exam.programs, []string{"fail programs: buildkitd cannot be run from … so nothing can be built … --bin"}},

		{"enough memory", mem(8*gb, 6*gb, 0), nil, exam.memory, nil},
		{"half a GB", mem(gb/2, gb/4, 0), nil, exam.memory, []string{"fail memory: the server has 512 MB of memory: m3o and one build do not fit … 2 GB or more"}},
		{"one GB", mem(gb, gb/2, 0), nil, exam.memory, []string{"warn memory: the server has 1024 MB of memory: a large build or a few apps use that up … --build-memory"}},
		{"little left and no swap", mem(8*gb, gb/10, 0), nil, exam.memory, []string{"warn memory: 102 MB of memory are left and there is no swap: the kernel will end apps … m3o ps:limits"}},
		{"little left and swap", mem(8*gb, gb/10, 4*gb), nil, exam.memory, nil},
		{"builds that may take it all", mem(3*gb, 2*gb, 0), nil, exam.memory, []string{"warn memory: builds may use 4GB of memory and the server has 3072 MB … --build-memory 1536MB"}},
		{"memory that is not overcommitted", with(mem(8*gb, 6*gb, 0), "/proc/sys/vm/overcommit_memory", "2\n"), nil, exam.memory, []string{"warn memory: the kernel gives out no memory that it does not have … sysctl -w vm.overcommit_memory=0"}},
		{"no meminfo", map[string]string{"/proc/meminfo": "-"}, nil, exam.memory, []string{"warn memory: the memory cannot be asked for … mount -t proc"}},

		{"wide limits", limits("", ""), nil, exam.limits, nil},
		{"few processes", limits("/proc/sys/kernel/pid_max", "4096\n"), nil, exam.limits, []string{"warn limits: kernel.pid_max is 4096: no process or thread can be started … sysctl -w kernel.pid_max=131072, and the same in /etc/sysctl.d"}},
		{"few threads", limits("/proc/sys/kernel/threads-max", "1000"), nil, exam.limits, []string{"warn limits: kernel.threads-max is 1000 … sysctl"}},
		{"few files", limits("/proc/sys/fs/file-max", "5000"), nil, exam.limits, []string{"warn limits: fs.file-max is 5000: connections and files are refused … sysctl"}},
		{"few watches", limits("/proc/sys/fs/inotify/max_user_instances", "8"), nil, exam.limits, []string{"warn limits: fs.inotify.max_user_instances is 8: apps that watch files fail … sysctl"}},
		{"few tracked connections", limits("/proc/sys/net/netfilter/nf_conntrack_max", "1000"), nil, exam.limits, []string{"warn limits: net.netfilter.nf_conntrack_max is 1000: new connections are dropped … sysctl"}},
		{"a low ulimit", limits("/proc/self/limits", "Max open files            1024                 4096                 files\n"), nil, exam.limits,
			[]string{"warn limits: this shell may open 4096 files: each connection takes two … LimitNOFILE=1048576"}},
		{"limits that cannot be read", limits("/proc/self/limits", "-"), nil, exam.limits, []string{"warn limits: the limits of this shell cannot be read … as root"}},

		{"no systemd", nil, func(e *exam) { e.run = says("", exec.ErrNotFound) }, exam.service, nil},
		{"no unit", nil, unit("LoadState=not-found\nDelegate=no\n"), exam.service, nil},
		{"our unit", nil, unit("LoadState=loaded\nDelegate=yes\nKillMode=process\nLimitNOFILE=1048576\nTasksMax=infinity\n"), exam.service, nil},
		{"a unit that kills all", nil, unit("LoadState=loaded\nDelegate=yes\nKillMode=control-group\nLimitNOFILE=1048576\nTasksMax=infinity\n"), exam.service,
			[]string{"fail service: systemctl stop m3od ends the router and every app too (KillMode=control-group) … KillMode=process"}},
		{"a unit without delegation", nil, unit("LoadState=loaded\nDelegate=no\nKillMode=process\nLimitNOFILE=1024\nTasksMax=500\n"), exam.service,
			[]string{"warn service: the unit does not have cgroups of its own (Delegate=no) … Delegate=yes", "warn service: … LimitNOFILE=1024 … LimitNOFILE=1048576", "warn service: … TasksMax=500 … TasksMax=infinity"}},

		{"a clock that is kept", nil, func(e *exam) { e.clock = func() (int32, error) { return 0x2001, nil } }, exam.clocks, nil},
		{"a clock that is not", nil, func(e *exam) { e.clock = func() (int32, error) { return 0x40, nil } }, exam.clocks, []string{"warn clock: nothing keeps the clock right … systemd-timesyncd"}},
		{"a clock that cannot be asked", nil, func(e *exam) { e.clock = func() (int32, error) { return 0, errors.New("not permitted") } }, exam.clocks, []string{"warn clock: whether the clock is kept right cannot be asked: not permitted … timedatectl"}},
		{"a clock that was reset", nil, func(e *exam) { e.now = func() time.Time { return time.Unix(100, 0) } }, exam.clocks, []string{"fail clock: the clock says 1970-01-01: certificates are not valid yet … date -s"}},

		{"no forwarding", map[string]string{"/proc/sys/net/ipv4/ip_forward": "0\n"}, nil, exam.isolation, []string{"warn isolation: IP forwarding is off: apps reach nothing outside … sysctl -w net.ipv4.ip_forward=1"}},
		{"no containers", nil, func(e *exam) { e.cfg.Runtime = "process" }, exam.isolation, []string{"warn isolation: apps run as plain processes, without limits or isolation … --runtime oci"}},
		{"no runc and no shim", nil, nil, exam.isolation, []string{"fail isolation: runc cannot be run from … --bin", "fail isolation: m3o-shim cannot be run from … --bin"}},
	} {
		e := examOf(t, c.files)
		if c.change != nil {
			c.change(&e)
		}
		var f findings
		c.check(e, t.Context(), &f)
		expect(t, c.what, f, c.want...)
	}
}

func TestDoctorOfAClosedDirectory(t *testing.T) {
	e := examOf(t, nil)
	closed := t.TempDir()
	if err := os.Chmod(closed, 0o700); err != nil {
		t.Fatal(err)
	}
	e.cfg.Data = filepath.Join(closed, "below", "data")
	var f findings
	e.isolation(t.Context(), &f)
	expect(t, "a directory above that is closed", f, "warn isolation: apps have no user namespace: "+closed+" is closed to others (chmod o+x)")
}

func TestDoctorOfTheKeys(t *testing.T) {
	e := examOf(t, nil)
	look := func() []Finding {
		var f findings
		e.state(t.Context(), &f)
		return f
	}
	expect(t, "before the first start", look())
	if f := look(); len(f) != 0 {
		t.Errorf("before the first start: %v", f)
	}
	write := func(name string, b []byte) {
		t.Helper()
		p := e.cfg.path("keys", name)
		if err := errors.Join(os.MkdirAll(filepath.Dir(p), 0o700), os.WriteFile(p, b, 0o600)); err != nil {
			t.Fatal(err)
		}
	}
	key, err := gitserver.GenerateHostKey()
	if err != nil {
		t.Fatal(err)
	}
	write("config.key", make([]byte, 32))
	expect(t, "no host key", look(), "fail state: "+e.cfg.path("keys", "ssh_host_ed25519")+" is missing: SSH clients will refuse the server … backup")
	write("ssh_host_ed25519", key)
	expect(t, "as it should be", look())
	write("ssh_host_ed25519", []byte("-----BEGIN"))
	expect(t, "a damaged host key", look(), "fail state: the git server's host key … is damaged: m3od does not start … backup")
	write("ssh_host_ed25519", key)
	if err := os.Chmod(e.cfg.path("keys", "config.key"), 0o644); err != nil {
		t.Fatal(err)
	}
	expect(t, "a key for everybody", look(), "fail state: … config.key can be read by other users … chmod 600")
	if err := os.Remove(e.cfg.path("keys", "config.key")); err != nil {
		t.Fatal(err)
	}
	expect(t, "no config key", look(), "fail state: … config.key is missing: the config of apps cannot be opened … backup")
}

// What never answers, as a network disk that is away, is told and left.
func TestDoctorIsNotHeldUp(t *testing.T) {
	never := make(chan struct{})
	defer close(never)
	found := examine(t.Context(), time.Second, []check{
		{"first", func(_ context.Context, f *findings) { f.add(CheckOK, "first", "", "fine") }},
		{"disk", func(context.Context, *findings) { <-never }},
		{"last", func(_ context.Context, f *findings) { f.add(CheckOK, "last", "", "fine") }},
	})
	expect(t, "one that hangs", found, "ok first", "fail disk: this could not be looked at within 1s … df hangs", "ok last")
	if len(found) != 3 {
		t.Errorf("%d findings, want 3", len(found))
	}
	sleeps := need.Program(t, "sleep")
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
	defer cancel()
	if _, err := runBriefly(ctx, sleeps, "1000"); err == nil || !strings.Contains(err.Error(), "does not answer") {
		t.Errorf("a program that hangs: %v", err)
	}
}

// The unit that docs/operating.md installs is one that the doctor likes and
// that systemd understands.
func TestSystemdUnit(t *testing.T) {
	file := filepath.Join(need.RepoRoot(t), "tools", "systemd", "m3od.service")
	b, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	e := examOf(t, nil)
	e.run = func(context.Context, string, ...string) (string, error) { return "LoadState=loaded\n" + string(b), nil }
	var f findings
	e.service(t.Context(), &f)
	expect(t, "the unit", f, "ok service")
	for _, want := range []string{"Type=notify", "Delegate=yes", "KillMode=process", "Restart=on-failure", "WantedBy=multi-user.target", "ExecStart=/usr/local/lib/m3o/m3od"} {
		if !slices.Contains(strings.Split(string(b), "\n"), want) {
			t.Errorf("%s has no line %s", file, want)
		}
	}
	analyze, err := exec.LookPath("systemd-analyze")
	if err != nil {
		t.Log("systemd-analyze is not there: the unit is only read")
		return
	}
	// The program is not installed where tests run.
	copied := filepath.Join(t.TempDir(), "m3od.service")
	if err := os.WriteFile(copied, []byte(strings.Replace(string(b), "ExecStart=/usr/local/lib/m3o/m3od", "ExecStart="+need.Program(t, "true"), 1)), 0o644); err != nil {
		t.Fatal(err)
	}
	if out, err := exec.Command(analyze, "verify", copied).CombinedOutput(); err != nil || strings.Contains(string(out), copied) {
		t.Errorf("systemd-analyze verify: %v: %s", err, out)
	}
}
