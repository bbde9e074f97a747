//go:build linux

package oci

import (
	"cmp"
	"encoding/json"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/moby/profiles/seccomp"
	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/m3o/m3o/runtime"
)

// bundle is what the spec of one launch is made of.
type bundle struct {
	dir, id  string
	w        runtime.Workload
	image    runtime.Image
	args     []string
	env      []string // beyond the workload's
	uid      int
	root     int // the host's user that root is in its user namespace; 0: it has none
	addr     netip.Addr
	gateway  netip.Addr
	cgroup   string
	swap     bool // the machine can limit swap
	terminal bool
	size     [2]uint16 // of the terminal
}

// The sizes of the writable places of an instance; they count as its memory.
const (
	tmpSize = "256m"
	shmSize = "64m"
)

// write makes the bundle directory's files.
func (b bundle) write() error {
	files := map[string]string{
		"resolv.conf": fmt.Sprintf("nameserver %s\nsearch internal\noptions ndots:0\n", b.gateway),
		"hosts":       fmt.Sprintf("127.0.0.1 localhost\n%s %s\n", b.addr, b.id),
		"hostname":    b.id + "\n",
	}
	spec, err := b.spec()
	if err != nil {
		return err
	}
	raw, err := json.Marshal(spec)
	if err != nil {
		return fmt.Errorf("encode spec: %w", err)
	}
	for name, text := range files {
		if err := os.WriteFile(filepath.Join(b.dir, name), []byte(text), 0o644); err != nil {
			return fmt.Errorf("write bundle: %w", err)
		}
	}
	// It holds the app's environment.
	if err := os.WriteFile(filepath.Join(b.dir, "config.json"), raw, 0o600); err != nil {
		return fmt.Errorf("write bundle: %w", err)
	}
	return nil
}

func (b bundle) spec() (*specs.Spec, error) {
	files := uint64(cmp.Or(b.w.Files, runtime.DefaultFiles))
	var lim unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &lim); err == nil {
		files = min(files, lim.Max) // raising it takes CAP_SYS_RESOURCE, which root may lack
	}
	s := &specs.Spec{
		Version:  specs.Version,
		Hostname: b.id,
		Root:     &specs.Root{Path: "rootfs", Readonly: true},
		Process:  b.process(b.args, b.env),
		Mounts: []specs.Mount{
			{Destination: "/proc", Type: "proc", Source: "proc", Options: []string{"nosuid", "noexec", "nodev"}},
			{Destination: "/dev", Type: "tmpfs", Source: "tmpfs", Options: []string{"nosuid", "strictatime", "mode=755", "size=64k"}},
			{Destination: "/dev/pts", Type: "devpts", Source: "devpts", Options: []string{"nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620"}},
			{Destination: "/dev/shm", Type: "tmpfs", Source: "shm", Options: []string{"nosuid", "noexec", "nodev", "mode=1777", "size=" + shmSize}},
			{Destination: "/sys", Type: "sysfs", Source: "sysfs", Options: []string{"nosuid", "noexec", "nodev", "ro"}},
			// Go reads its CPU limit here.
			{Destination: "/sys/fs/cgroup", Type: "cgroup", Source: "cgroup", Options: []string{"nosuid", "noexec", "nodev", "ro"}},
			{Destination: "/tmp", Type: "tmpfs", Source: "tmpfs", Options: []string{"nosuid", "nodev", "mode=1777", "size=" + tmpSize}},
		},
		Linux: &specs.Linux{
			CgroupsPath: b.cgroup,
			Resources:   b.resources(),
			Namespaces: []specs.LinuxNamespace{{Type: specs.PIDNamespace}, {Type: specs.MountNamespace}, {Type: specs.IPCNamespace},
				{Type: specs.UTSNamespace}, {Type: specs.NetworkNamespace}, {Type: specs.CgroupNamespace}},
			// An app may listen on port 80 if it likes; we say then that it should not.
			Sysctl: map[string]string{"net.ipv4.ip_unprivileged_port_start": "0"},
			MaskedPaths: []string{"/proc/acpi", "/proc/asound", "/proc/interrupts", "/proc/kcore", "/proc/keys", "/proc/latency_stats",
				"/proc/timer_list", "/proc/timer_stats", "/proc/sched_debug", "/proc/scsi", "/sys/firmware",
				"/sys/devices/virtual/powercap", "/sys/fs/selinux"},
			ReadonlyPaths: []string{"/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"},
		},
	}
	if b.root != 0 {
		userNamespace(s, b.root, b.uid)
	}
	s.Process.Rlimits = []specs.POSIXRlimit{{Type: "RLIMIT_NOFILE", Hard: files, Soft: files}, {Type: "RLIMIT_CORE"}}
	if b.terminal {
		s.Process.Terminal, s.Process.ConsoleSize = true, consoleSize(b.size)
	}
	for _, name := range []string{"resolv.conf", "hosts", "hostname"} {
		s.Mounts = append(s.Mounts, specs.Mount{Destination: "/etc/" + name, Type: "bind", Source: filepath.Join(b.dir, name),
			Options: []string{"bind", "ro", "nosuid", "nodev", "noexec"}})
	}
	for _, m := range b.w.Mounts {
		s.Mounts = append(s.Mounts, specs.Mount{Destination: m.Target, Type: "bind", Source: m.Source,
			Options: []string{"bind", "rw", "nosuid", "nodev"}})
	}
	// No negative oomScoreAdj: it takes CAP_SYS_RESOURCE.
	var err error
	if s.Linux.Seccomp, err = seccomp.GetDefaultProfile(s); err != nil {
		return nil, fmt.Errorf("make seccomp profile: %w", err)
	}
	// This machine's own system calls alone, and not the 32-bit ones it has
	// beside them: they are the less tested half of the kernel, and leaving
	// them out halves the time in which runc compiles the filter, a third of
	// a start. A 32-bit program is ended by SIGSYS.
	s.Linux.Seccomp.Architectures = s.Linux.Seccomp.Architectures[:min(1, len(s.Linux.Seccomp.Architectures))]
	return s, nil
}

// process is a process of the instance: its first, or one that joins it.
func (b bundle) process(args, env []string) *specs.Process {
	return &specs.Process{
		User:            specs.User{UID: uint32(b.uid), GID: uint32(b.uid)},
		Args:            args,
		Env:             b.environ(env),
		Cwd:             cmp.Or(b.image.WorkDir, "/"),
		NoNewPrivileges: true,
		Capabilities:    &specs.LinuxCapabilities{},
	}
}

func (b bundle) resources() *specs.LinuxResources {
	memory := cmp.Or(b.w.MemoryBytes, runtime.DefaultMemoryBytes)
	pids := cmp.Or(b.w.Pids, runtime.DefaultPids)
	r := &specs.LinuxResources{
		Memory:  &specs.LinuxMemory{Limit: &memory},
		Pids:    &specs.LinuxPids{Limit: &pids},
		Devices: []specs.LinuxDeviceCgroup{{Allow: false, Access: "rwm"}},
	}
	if b.swap {
		r.Memory.Swap = &memory // memory and swap together: no swap
	}
	if b.w.CPUMillis > 0 {
		period := uint64(100_000) // µs
		quota := max(b.w.CPUMillis*100, 1000)
		r.CPU = &specs.LinuxCPU{Quota: &quota, Period: &period}
	}
	return r
}

// environ is the whole environment: the image's, then the workload's, then
// ours; of two values of a name the last counts. What tunes Go's runtime to
// the limits is only set where nobody else did.
func (b bundle) environ(extra []string) []string {
	env := []string{"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "HOME=/tmp"}
	env = append(env, fmt.Sprintf("GOMEMLIMIT=%d", cmp.Or(b.w.MemoryBytes, runtime.DefaultMemoryBytes)/10*9))
	if b.w.CPUMillis > 0 {
		env = append(env, fmt.Sprintf("GOMAXPROCS=%d", (b.w.CPUMillis+999)/1000))
	}
	env = append(env, b.image.Env...)
	env = append(env, b.w.Env...)
	env = append(env, extra...)
	env = append(env, "M3O_INSTANCE="+b.id)
	if b.w.Port != 0 {
		env = append(env, "PORT="+strconv.Itoa(b.w.Port))
	}
	return lastOfEach(env)
}

func lastOfEach(env []string) []string {
	at := map[string]int{}
	var out []string
	for _, kv := range env {
		k, _, ok := strings.Cut(kv, "=")
		if !ok || k == "" {
			continue
		}
		if i, dup := at[k]; dup {
			out[i] = kv
			continue
		}
		at[k] = len(out)
		out = append(out, kv)
	}
	return out
}
