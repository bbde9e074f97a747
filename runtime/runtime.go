// Package runtime runs workloads: it keeps as many instances of each process
// type of a release running as is wanted, says how each is, and gives their
// logs. Drivers do it on one Linux host with containers (runtime/oci), as
// plain unisolated processes (runtime/process) or inside the test process
// (runtime/memory). What they share is here too: the [Reconciler] that starts,
// watches, restarts and stops, the health [Probe], the log files and the
// reading of an image.
//
// It must not know of git, builds, hosts, users or the release ledger.
package runtime

import (
	"cmp"
	"context"
	"fmt"
	"io"
	"iter"
	"path"
	"regexp"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/m3o/m3o"
)

// A Ref names one process type of one release of an app.
type Ref struct {
	App     string
	Process string
	Release int
}

// String is the ref as people write it: hello/web v3.
func (r Ref) String() string { return fmt.Sprintf("%s/%s v%d", r.App, r.Process, r.Release) }

// file is the ref as a file name; Validate keeps it unambiguous.
func (r Ref) file() string { return fmt.Sprintf("%s.%s.v%d", r.App, r.Process, r.Release) }

var word = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9_-]{0,62}$`)

// Validate reports, as an *m3o.Error of kind Invalid, why a ref cannot be run:
// its names become file names and host name labels.
func (r Ref) Validate() error {
	switch {
	case !word.MatchString(r.App):
		return m3o.Errorf(m3o.Invalid, "app name %q cannot be run", r.App)
	case !word.MatchString(r.Process):
		return m3o.Errorf(m3o.Invalid, "process type %q is not 1 to 63 letters, digits, - and _", r.Process)
	case r.Release < 0:
		return m3o.Errorf(m3o.Invalid, "release %d is negative", r.Release)
	}
	return nil
}

func (r Ref) compare(o Ref) int {
	return cmp.Or(cmp.Compare(r.App, o.App), cmp.Compare(r.Release, o.Release), cmp.Compare(r.Process, o.Process))
}

// The defaults of a Workload's limits.
const (
	DefaultMemoryBytes = 512 << 20
	DefaultPids        = 1024
	DefaultFiles       = 65_536
	DefaultGrace       = 30 * time.Second
	DefaultReady       = 60 * time.Second // how long an instance may take to become ready
)

// A Workload is everything needed to run an instance. The workload of a Ref
// does not change; should a second Start bring another one, instances started
// from then on use it.
type Workload struct {
	Ref
	Image       string   // manifest digest, "sha256:…", in the driver's image store
	Args        []string // argv, never through a shell; nil: the image's own
	Env         []string // K=V, complete but for M3O_INSTANCE and PORT, which the driver sets
	Port        int      // the port it listens on; 0: a worker, which has none
	Health      m3o.Health
	MemoryBytes int64         // 0: DefaultMemoryBytes
	CPUMillis   int64         // thousandths of a core; 0: no limit
	Pids        int64         // processes and threads; 0: DefaultPids
	Files       int64         // open files; 0: DefaultFiles, or what this machine allows if that is less
	Grace       time.Duration // SIGTERM to SIGKILL; 0: DefaultGrace
	// Once makes its instance run at most once: when it ends by itself it is
	// not started again but goes, and its Ref is wanted no more. So it does
	// when the driver finds on opening that it was lost.
	Once bool
	// Revision tells workloads of one Ref apart: instances of another one than
	// that of the last Start are replaced a few at a time, each going only
	// when one of the new ones is ready.
	Revision int
	// Mounts are directories of the host that its instances may write to. As
	// two instances must not, old ones then go before new ones come.
	Mounts []Mount
}

// A Mount is a directory that outlives the instances it is mounted in.
type Mount struct {
	Source string // absolute path on the host
	Target string // absolute path in the instance
}

// reserved are the places of an instance that no mount may cover.
var reserved = []string{"/", "/proc", "/sys", "/dev", "/etc", "/tmp", "/bin", "/usr", "/lib", "/app"}

// Validate reports why a mount cannot be, as an *m3o.Error of kind Invalid.
func (m Mount) Validate() error {
	for _, p := range []string{m.Source, m.Target} {
		if !path.IsAbs(p) || path.Clean(p) != p || strings.ContainsAny(p, ":,\\\n\x00") {
			return m3o.Errorf(m3o.Invalid, "%q is not a clean absolute path", p)
		}
	}
	for _, r := range reserved {
		if m.Target == r || r != "/" && strings.HasPrefix(m.Target, r+"/") {
			return &m3o.Error{Kind: m3o.Invalid, Msg: fmt.Sprintf("a volume cannot be mounted at %s, which is the platform's", m.Target), Hint: "choose a directory such as /data"}
		}
	}
	return nil
}

// Validate reports why a workload cannot be run, as an *m3o.Error of kind Invalid.
func (w Workload) Validate() error {
	if err := w.Ref.Validate(); err != nil {
		return err
	}
	switch {
	case w.Port < 0 || w.Port > 65535:
		return m3o.Errorf(m3o.Invalid, "port %d is not between 0 and 65535", w.Port)
	case w.MemoryBytes < 0 || w.CPUMillis < 0 || w.Pids < 0 || w.Files < 0 || w.Grace < 0:
		return m3o.Errorf(m3o.Invalid, "a limit of %s is negative", w.Ref)
	case w.MemoryBytes > 0 && w.MemoryBytes < 8<<20:
		return m3o.Errorf(m3o.Invalid, "%d bytes of memory are too little to start in: 8 MB is the least", w.MemoryBytes)
	}
	for _, kind := range []string{w.Health.Kind, w.Health.Liveness.Kind} {
		if !slices.Contains([]string{"", "grpc", "http", "tcp"}, kind) {
			return m3o.Errorf(m3o.Invalid, "health check kind %q is not grpc, http, tcp or empty", kind)
		}
	}
	for _, m := range w.Mounts {
		if err := m.Validate(); err != nil {
			return err
		}
	}
	return nil
}

func (w Workload) grace() time.Duration { return cmp.Or(w.Grace, DefaultGrace) }

// A Line is one line an instance wrote.
type Line struct {
	Time time.Time
	Ref
	Instance string
	Stream   string // "stdout" or "stderr"
	Text     string // without its line end
}

// A Cmd is a command for Exec or Run and what it is connected to. Nil In reads
// as empty, nil Out and Err discard. A non-nil Resize asks for a terminal: it
// gives {columns, rows}, the first at once, and everything is written to Out.
// What Signals gives is sent to the command; as the first process of its
// container it sees only those it has a handler for, as every Go program has.
type Cmd struct {
	Args, Env []string
	In        io.Reader
	Out, Err  io.Writer
	Resize    <-chan [2]uint16
	Signals   <-chan syscall.Signal
}

// An Exit is how a process ended.
type Exit struct {
	Code   int // 128+Signal when a signal ended it
	Signal int
	OOM    bool // the kernel killed a process of it because its memory limit was reached
	At     time.Time
}

// A Driver runs workloads somewhere.
//
// All methods may be called at any time, from any number of goroutines, and
// may be repeated. What should run and what runs is the driver's own state: it
// survives the daemon, which after a restart just asks (Events) and repeats
// what it wants (Start, Stop). Who opens a driver runs it and ends it; the
// methods here take effect while it runs, and wait for it otherwise. Errors a
// caller can act on are *m3o.Error; where the machine lacks what a driver
// needs, opening it says so.
type Driver interface {
	// Start makes replicas of w the number of its instances: it records that,
	// launches or stops as needed and returns without waiting for health. An
	// instance that exits is started again, with a growing pause. Instances of
	// another Revision are replaced. It is
	// Invalid or NotFound, and nothing is recorded, when w cannot run at all.
	Start(ctx context.Context, w Workload, replicas int) error

	// Stop ends every instance of r: SIGTERM, the grace period, SIGKILL, and
	// everything it had is removed, save its log. It returns when all are
	// gone; when there is nothing to stop, at once with nil. If ctx ends
	// first, stopping goes on.
	Stop(ctx context.Context, r Ref) error

	// Events yields every instance once, then an instance whose ID is "" as a
	// marker, then an instance for every change, in order. An instance that
	// was told to go, or of a Workload that runs Once and ended, is Draining,
	// then Exited, and never seen again; any other
	// that is Exited will be started again. It ends when ctx does; a caller
	// too slow for the changes gets one Unavailable error and asks again.
	Events(ctx context.Context) iter.Seq2[m3o.Instance, error]

	// Logs yields the last lines of r's instances, oldest first, then, if
	// follow, every line as it is written until ctx ends. Release 0 means
	// every release, Process "" every process type. The logs of instances
	// that are gone are kept for a while, within a bound.
	Logs(ctx context.Context, r Ref, lines int, follow bool) iter.Seq2[Line, error]

	// Exec runs a command inside a running instance and returns its exit code.
	Exec(ctx context.Context, instance string, c Cmd) (exit int, err error)

	// Run runs a command (c.Args, else w.Args) once in a fresh instance of w,
	// which no event shows, and removes it. When ctx ends, the command does.
	Run(ctx context.Context, w Workload, c Cmd) (exit int, err error)
}
