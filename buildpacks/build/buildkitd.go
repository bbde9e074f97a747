package build

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/m3o/m3o/internal/atomicfile"
	"golang.org/x/sys/unix"
)

// Times of the supervisor. A crash is followed by a pause that doubles from
// the first to the second, and begins anew after a long life.
const (
	firstPause = 100 * time.Millisecond
	lastPause  = 30 * time.Second
	longLife   = time.Minute
	stopGrace  = 10 * time.Second // from SIGTERM to SIGKILL
	killGrace  = 10 * time.Second // for killed processes to be gone
)

// Run supervises buildkitd until ctx ends: it starts it, restarts it after a
// crash, and at the end stops it and removes its processes, mounts, network
// and cgroup. With Addr set it waits only. It is called once.
func (b *Builder) Run(ctx context.Context) (err error) {
	defer b.lock.Close()   //nolint:errcheck // ends the lock
	defer b.client.Close() //nolint:errcheck // nothing to be done
	if b.cfg.Addr != "" {
		return b.watchExternal(ctx)
	}
	defer func() {
		cctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), killGrace)
		defer cancel()
		err = errors.Join(err, b.clean(cctx))
	}()
	if b.network != nil {
		if err := b.network.up(); err != nil {
			return err
		}
		if b.network.dns.relayTo.IsValid() {
			stop := b.relayDNS(ctx)
			defer stop()
		}
	}
	if b.guard != nil {
		var watching sync.WaitGroup
		watching.Go(func() { b.guard.run(ctx, b.builds.busy) })
		defer watching.Wait()
	}
	var resting sync.WaitGroup
	resting.Go(func() { b.giveBack(ctx) })
	defer resting.Wait()
	pause := firstPause
	for ctx.Err() == nil {
		began := time.Now()
		err := b.once(ctx)
		b.state(false, err)
		if ctx.Err() != nil {
			break
		}
		if time.Since(began) > longLife {
			pause = firstPause
		}
		b.log.Error("buildkitd ended; starting it again", "err", err, "pause", pause)
		select {
		case <-ctx.Done():
		case <-time.After(pause):
		}
		pause = min(2*pause, lastPause)
	}
	return nil
}

// clean removes all that Run made. Mounts are in buildkitd's own mount
// namespace, its end of the veth in its own network namespace: both end with
// the last process.
func (b *Builder) clean(ctx context.Context) error {
	var errs []error
	if b.cgroup != nil {
		err := b.cgroup.kill(ctx)
		if err == nil {
			err = retry(ctx, b.cgroup.remove)
		}
		errs = append(errs, err)
	}
	if b.network != nil {
		errs = append(errs, b.network.down())
	}
	for _, f := range []string{b.pidfile(), b.socket(), b.debugSocket()} {
		if err := os.Remove(f); err != nil && !errors.Is(err, os.ErrNotExist) {
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}

// retry repeats f until it succeeds: a cgroup stays busy for a moment after its last process.
func retry(ctx context.Context, f func() error) error {
	for {
		err := f()
		if err == nil {
			return nil
		}
		select {
		case <-ctx.Done():
			return err
		case <-time.After(5 * time.Millisecond):
		}
	}
}

// watchExternal only finds out whether an external BuildKit answers.
func (b *Builder) watchExternal(ctx context.Context) error {
	for ctx.Err() == nil {
		err := b.ping(ctx, 5*time.Second)
		b.mu.Lock()
		was := b.ready
		b.mu.Unlock()
		if was != (err == nil) || err != nil {
			b.state(err == nil, err)
		}
		select {
		case <-ctx.Done():
		case <-time.After(2 * time.Second):
		}
	}
	return nil
}

func (b *Builder) ping(ctx context.Context, limit time.Duration) error {
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	_, err := b.client.Info(ctx)
	return err
}

// once runs one buildkitd from start to end and returns why it ended.
func (b *Builder) once(ctx context.Context) error {
	if b.cgroup != nil {
		// Steps of the one before: they hold its caches and would go on building.
		kctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), killGrace)
		defer cancel()
		if err := b.cgroup.kill(kctx); err != nil {
			return err
		}
		if err := b.cgroup.create(b.cfg.Memory, b.cfg.Pids); err != nil {
			return err
		}
	}
	if err := b.writeConfig(); err != nil {
		return err
	}
	// A socket left behind would be dialled in vain.
	if err := os.Remove(b.socket()); err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	cmd := exec.Command(b.cfg.Buildkitd, "--config", b.dir("buildkit/buildkitd.toml"))
	cmd.Env = b.env()
	cmd.Dir = "/"
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Setpgid: true, // Ctrl-C in a terminal is for the daemon, which then stops it in order
		// A mount namespace whose mounts the host does not see, and which takes them along when it ends.
		Unshareflags: syscall.CLONE_NEWNS,
	}
	if b.network != nil {
		cmd.SysProcAttr.Cloneflags = syscall.CLONE_NEWNET
	}
	if b.cgroup != nil && b.cgroup.v2 {
		dir, err := os.Open(filepath.Join(b.cgroup.roots[0], b.cgroup.name, "daemon"))
		if err != nil {
			return fmt.Errorf("open cgroup: %w", err)
		}
		defer dir.Close() //nolint:errcheck // a descriptor
		cmd.SysProcAttr.UseCgroupFD, cmd.SysProcAttr.CgroupFD = true, int(dir.Fd())
	}
	var out logs
	pr, pw := io.Pipe()
	cmd.Stdout, cmd.Stderr = pw, pw
	var reading sync.WaitGroup
	reading.Go(func() { out.read(pr, b) })
	defer reading.Wait()
	defer pw.Close() //nolint:errcheck // a pipe in memory
	if err := cmd.Start(); err != nil {
		return fmt.Errorf("start buildkitd: %w", err)
	}
	ended := make(chan error, 1)
	go func() { ended <- cmd.Wait() }()
	stop := func() error { return stopProcess(cmd.Process, ended) }
	if err := b.settle(cmd.Process.Pid); err != nil {
		_ = stop()
		return err
	}
	answers := make(chan error, 1)
	actx, acancel := context.WithCancel(ctx)
	defer acancel()
	go func() { answers <- b.untilAnswers(actx) }()
	select {
	case err := <-ended:
		acancel()
		<-answers
		return fmt.Errorf("buildkitd ended before it answered (%w): %s", orSilent(err), out.last())
	case err := <-answers:
		if err != nil {
			_ = stop()
			return err
		}
	}
	b.log.Info("buildkitd answers", "pid", cmd.Process.Pid)
	b.state(true, nil)
	select {
	case err := <-ended:
		return fmt.Errorf("buildkitd ended (%w): %s", orSilent(err), out.last())
	case <-ctx.Done():
		return stop()
	}
}

func orSilent(err error) error {
	if err == nil {
		return errors.New("exit status 0")
	}
	return err
}

// settle puts a process just started where it belongs.
func (b *Builder) settle(pid int) error {
	if err := b.writePidfile(pid); err != nil {
		return err
	}
	// The kernel's choice under memory pressure is a build, not an app.
	_ = os.WriteFile(fmt.Sprintf("/proc/%d/oom_score_adj", pid), []byte("500"), 0)
	if b.cgroup != nil && !b.cgroup.v2 {
		if err := b.cgroup.add(pid); err != nil {
			return err
		}
	}
	if b.network != nil {
		return b.network.join(pid)
	}
	return nil
}

// untilAnswers returns when BuildKit answers, or why it does not.
func (b *Builder) untilAnswers(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	for {
		// Wait for the socket first: a failed dial makes gRPC wait a second.
		if _, err := os.Stat(b.socket()); err == nil {
			if err := b.ping(ctx, 5*time.Second); err == nil {
				return nil
			}
		}
		select {
		case <-ctx.Done():
			return errors.New("buildkitd does not answer")
		case <-time.After(10 * time.Millisecond):
		}
	}
}

func stopProcess(p *os.Process, ended <-chan error) error {
	_ = p.Signal(syscall.SIGTERM)
	t := time.NewTimer(stopGrace)
	defer t.Stop()
	select {
	case <-ended:
		return nil
	case <-t.C:
	}
	_ = p.Kill()
	<-ended
	return errors.New("buildkitd did not stop in time and was killed")
}

// env is what buildkitd gets of the daemon's environment: how to reach the
// world, and nothing that may hold a secret of the platform.
func (b *Builder) env() []string {
	env := []string{"PATH=" + orElse(os.Getenv("PATH"), "/usr/sbin:/usr/bin:/sbin:/bin"), "HOME=" + b.dir("buildkit"), "TMPDIR=" + b.dir("buildkit")}
	for _, k := range []string{"HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "http_proxy", "https_proxy", "no_proxy", "SSL_CERT_FILE", "SSL_CERT_DIR"} {
		if v, ok := os.LookupEnv(k); ok {
			env = append(env, k+"="+v)
		}
	}
	return env
}

// writeConfig writes buildkitd.toml. Strings are quoted as JSON, which TOML reads the same.
func (b *Builder) writeConfig() error {
	var w bytes.Buffer
	q := func(s string) string { j, _ := json.Marshal(s); return string(j) } // a string always marshals
	line := func(format string, args ...any) { fmt.Fprintf(&w, format+"\n", args...) }
	line("root = %s", q(b.dir("buildkit/root")))
	line("[grpc]\naddress = [%s]\ndebugAddress = %s\nuid = %d\ngid = %d", q("unix://"+b.socket()), q("unix://"+b.debugSocket()), os.Getuid(), os.Getgid())
	line("[otel]\nsocketPath = %s", q(b.dir("buildkit/otel.sock")))
	line("[cdi]\ndisabled = true")
	line("[history]\nmaxAge = 86400\nmaxEntries = 50")
	line("[worker.containerd]\nenabled = false")
	line("[worker.oci]\nenabled = true\nbinary = %s", q(b.cfg.Runc))
	// "host" is buildkitd's own namespace, so every step is where buildkitd is.
	line("networkMode = \"host\"")
	if b.cgroup != nil {
		line("defaultCgroupParent = %s", q(b.cgroup.steps()))
	}
	// BuildKit's own defaults drop Go's caches after two days without a build.
	line("gc = true\n[[worker.oci.gcpolicy]]\nall = true\nreservedSpace = %d\nmaxUsedSpace = %d\nminFreeSpace = %d", b.cfg.Cache/4, b.cfg.Cache, int64(2<<30))
	if b.network != nil {
		var ns []string
		for _, a := range b.network.servers() {
			ns = append(ns, q(a.String()))
		}
		line("[dns]\nnameservers = [%s]", strings.Join(ns, ", "))
	}
	return atomicfile.Write(b.dir("buildkit/buildkitd.toml"), w.Bytes(), 0o600)
}

// logs passes buildkitd's own output to the log and keeps the last line.
type logs struct {
	mu   sync.Mutex // guards line
	line string
}

func (l *logs) read(r io.Reader, b *Builder) {
	sc := bufio.NewScanner(r)
	sc.Buffer(make([]byte, 0, 4<<10), 1<<20)
	for sc.Scan() {
		b.log.Debug("buildkitd", "line", sc.Text())
		l.mu.Lock()
		l.line = sc.Text()
		l.mu.Unlock()
	}
	_, _ = io.Copy(io.Discard, r) // after a line beyond the buffer: never block the child
}

func (l *logs) last() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.line
}

// A pidRecord names one process for good: process ids are used again, a start
// time within one boot is not.
type pidRecord struct {
	Pid   int
	Start uint64 // clock ticks after boot
	Boot  string
}

func (b *Builder) pidfile() string { return b.dir("buildkit/buildkitd.pid") }

func (b *Builder) writePidfile(pid int) error {
	start, err := startTime(pid)
	if err != nil {
		return fmt.Errorf("write pid file: %w", err)
	}
	j, err := json.Marshal(pidRecord{Pid: pid, Start: start, Boot: bootID()})
	if err != nil {
		return err
	}
	return atomicfile.Write(b.pidfile(), j, 0o600)
}

// endOrphan kills the buildkitd of a daemon that was killed, and its steps.
func (b *Builder) endOrphan(ctx context.Context, cg *cgroup) error {
	ctx, cancel := context.WithTimeout(ctx, killGrace)
	defer cancel()
	var rec pidRecord
	if j, err := os.ReadFile(b.pidfile()); err == nil && json.Unmarshal(j, &rec) == nil && rec.Pid > 1 && rec.Boot == bootID() {
		if start, err := startTime(rec.Pid); err == nil && start == rec.Start {
			b.log.Warn("ending the buildkitd of an earlier run", "pid", rec.Pid)
			_ = unix.Kill(rec.Pid, unix.SIGKILL)
			gone := func() error {
				if s, err := startTime(rec.Pid); err == nil && s == rec.Start {
					return errors.New("the buildkitd of an earlier run does not end")
				}
				return nil
			}
			if err := retry(ctx, gone); err != nil {
				return err
			}
		}
	}
	if cg == nil {
		return nil
	}
	return cg.kill(ctx)
}

func bootID() string {
	b, _ := os.ReadFile("/proc/sys/kernel/random/boot_id")
	return strings.TrimSpace(string(b))
}

// startTime reads field 22 of /proc/PID/stat; a zombie counts as gone. The
// name in field 2 may hold spaces and parentheses.
func startTime(pid int) (uint64, error) {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return 0, err
	}
	i := bytes.LastIndexByte(b, ')')
	if i < 0 {
		return 0, errors.New("malformed /proc stat")
	}
	f := strings.Fields(string(b[i+1:]))
	if len(f) < 20 {
		return 0, errors.New("malformed /proc stat")
	}
	if f[0] == "Z" || f[0] == "X" {
		return 0, os.ErrNotExist
	}
	return strconv.ParseUint(f[19], 10, 64)
}
