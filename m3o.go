// Package m3o holds the words every other package shares: what an app, a
// source, a build, a release, an instance and a route are, how a name is
// checked, and how a failure is told. It does no I/O and imports nothing of
// the project, so that any package may import it.
package m3o

import (
	"fmt"
	"time"
)

// An App is one deployable service: a git repository, its releases and its
// host name <Name>.<domain>.
type App struct {
	Name    string    // unique, see CheckAppName
	Owner   string    // user name of who created it
	Branch  string    // the branch whose pushes deploy; "main" when empty
	Created time.Time // UTC
	// Sleep is the idle time after which the app is stopped until a request
	// comes, where neither m3o ps:sleep nor m3o.yaml says; 0: never.
	Sleep time.Duration

	// Paths says which changed files make a push deploy, see release.Touches;
	// none: all.
	Paths []string
	// Lock, while its At is set, keeps what is built from being published.
	Lock Lock

	// Parent is the app this one is a preview of, "" for an app of its own. Who
	// has a role in the parent has it here.
	Parent string
}

// A Lock says who stopped publishing, when and why.
type Lock struct {
	User   string
	Reason string
	At     time.Time // UTC; zero: not locked
}

// DeployBranch is the branch whose pushes deploy the app.
func (a App) DeployBranch() string {
	if a.Branch == "" {
		return "main"
	}
	return a.Branch
}

// A Source names one tree to build and where its objects are. The objects of
// a push sit in a quarantine until git accepts the push.
type Source struct {
	App        string
	Repo       string   // absolute path of the bare repository
	Quarantine string   // absolute object directory to read before Repo's own; "" when none
	Ref        string   // full ref name that the deploy moves, refs/heads/main; "" for none
	Old        string   // commit the ref had before, "" for a new ref
	Commit     string   // 40 hex digits
	Tree       string   // the tree to build in place of the commit's own, "" for that
	User       string   // who caused it
	Via        string   // "git push", "rollback", "webhook" …
	Options    []string // git push options, as sent
	Image      string   // an image to release instead of a build of Commit: "sha256:…" in the image store, or a registry's reference
}

// BuildStatus says how far a build has come.
type BuildStatus string

// The statuses of a build, in order. A build ends Succeeded, Failed or Cancelled.
const (
	BuildRunning   BuildStatus = "running"
	BuildSucceeded BuildStatus = "succeeded"
	BuildFailed    BuildStatus = "failed"
	BuildCancelled BuildStatus = "cancelled"
)

// A Build records one run of BuildKit for an app.
type Build struct {
	App     string
	Number  int // 1, 2, 3 … per app
	Status  BuildStatus
	Commit  string
	Message string // subject line of the commit
	User    string
	Image   string // digest, "sha256:…"; empty unless Succeeded
	// Toolchain and Base are what the image was made with, "go1.26.8" and a
	// layer's digest; empty unless Succeeded.
	Toolchain, Base string
	Error           string // the one line the pusher saw last; empty unless Failed
	Started         time.Time
	Finished        time.Time // zero while running

	Builder string // "go", "dockerfile" or "image"
	Size    int64  // of the image's layers, bytes
	Steps   []BuildStep
}

// A BuildStep is one part of a build, for the record of where the time went.
type BuildStep struct {
	Name   string
	Took   time.Duration
	Cached bool
}

// A Process is one process type of a release: what it runs and how many.
type Process struct {
	Command  []string // argv; never through a shell
	Replicas int
	Port     int // the port it listens on, injected as PORT; 0 for a worker
	Limits   Limits
	Scaling  Scaling
}

// Limits bound what one instance may take. The zero value of a field means
// the platform's default.
type Limits struct {
	MemoryBytes int64         // 512 MB
	CPUMillis   int64         // thousandths of a core; no limit
	Pids        int64         // processes and threads; 1024
	Files       int64         // open files; 65,536
	Grace       time.Duration // from SIGTERM to SIGKILL; 30 s
}

// Scaling says between which bounds the number of instances follows the load.
// The zero Scaling leaves it as it was set.
type Scaling struct {
	Min, Max    int
	Concurrency int // requests in flight an instance should have; 0: not looked at
	CPU         int // percent of its CPU limit, or of one core, it should use; 0: not looked at
}

// On reports whether the number of instances follows the load.
func (s Scaling) On() bool { return s.Max > 0 && (s.Concurrency > 0 || s.CPU > 0) }

// A Check is one question to an instance and how its answers count. Zero
// fields mean the defaults of what it is used for.
type Check struct {
	Kind     string        // "grpc", "http", "tcp" or ""
	Path     string        // HTTP only
	Service  string        // gRPC only: whose health is asked; "" for the whole server's
	Period   time.Duration // between two questions
	Answer   time.Duration // how long one answer may take
	Failures int           // bad answers in a row that count
}

// A Health check decides when an instance may get requests, and when it has to
// be restarted.
type Health struct {
	Kind    string        // "grpc", "http", "tcp", or "" to detect: gRPC health where served, else TCP
	Path    string        // HTTP only
	Timeout time.Duration // how long an instance may take to become healthy; 0 means 60 s

	Service   string        // gRPC only: whose health is asked; "" for the whole server's
	Period    time.Duration // between two questions to a healthy instance; 0 means 5 s
	Answer    time.Duration // how long one answer may take; 0 means 3 s
	Failures  int           // bad answers in a row that take it out of routing; 0 means 3
	Successes int           // good answers in a row that bring it in; 0 means 2
	// Liveness restarts an instance after Failures (3) bad answers, a Period
	// (10 s) apart. Its Kind "" means that there is no such check.
	Liveness Check
}

// A Release is the whole of what runs: immutable once written. Rolling back
// writes a new release that repeats an old one's Image, Processes, Config and
// Descriptors.
type Release struct {
	App         string
	Version     int    // 1, 2, 3 … per app, printed as v1
	Image       string // manifest digest, "sha256:…", in the daemon's content store
	Config      int    // revision of the app's config
	Processes   map[string]Process
	Command     []string // the release command, nil when none
	Health      Health
	HTTP        HTTP
	Sleep       time.Duration // idle time after which it is stopped until a request comes; 0: never
	AutoRevert  bool          // rolled back by itself when it starts crashing soon after going live
	Schedules   []Schedule    // what its own files ask to do at set times
	Descriptors string        // digest of the FileDescriptorSet, "sha256:…"; "" when the app has none
	Commit      string
	Message     string // subject line of the commit
	Reason      string // "git push", "rollback to v3", "config set FOO"
	User        string
	Build       int // number of the build that made Image
	Created     time.Time

	BreakingPolicy string   // what its API was held to against the release before: WIRE_JSON, WIRE or off; "" when it has no .proto files
	Breaking       []string // what of the API before it broke all the same, as allowed; a line each
}

// A Schedule is something a release asks to do at set times.
type Schedule struct {
	Name       string
	Cron, Zone string   // a cron line, and whose clock; UTC when empty
	Action     string   // "rebuild", "run" or "call"
	Args       []string // the command, or the method and its message
	IfOutdated bool     // rebuild only what would come out otherwise
	Overlap    string   // "skip", "queue", "replace" or ""
	Missed     string   // "once", "skip" or ""
	Jitter     time.Duration
}

// Name is the release as people write it: v12.
func (r Release) Name() string { return fmt.Sprintf("v%d", r.Version) }

// Phase says how an instance is.
type Phase string

// The phases of an instance. Only Ready instances get requests.
const (
	Starting  Phase = "starting"
	Ready     Phase = "ready"
	Unhealthy Phase = "unhealthy"
	Draining  Phase = "draining"
	Exited    Phase = "exited"
)

// An Instance is one running copy of a process type of a release.
type Instance struct {
	App      string
	Process  string // process type: web, worker …
	Release  int
	ID       string // unique on this installation, a valid host name label
	Addr     string // "ip:port" for the router; "" for a worker
	Phase    Phase
	Exit     int // exit code, valid once Exited; 128+n for signal n
	OOM      bool
	Restarts int
	Revision int       // of the workload it runs, see runtime.Workload
	At       time.Time // when Phase was entered
}

// A Route sends the requests of one host to the ready instances of one release.
type Route struct {
	Host      string // lower case, no port
	App       string
	Release   int
	Endpoints []string // "ip:port"
}

// HTTP is what an app's m3o.yaml says of how the platform answers for it.
type HTTP struct {
	Origins []string // sites whose pages may call it, see API
	Strict  bool     // JSON with unknown fields is refused
}

// An API is what the gateway knows of the release it answers for.
type API struct {
	App     string
	Release int
	Schema  string   // file of its FileDescriptorSet, "" when it has none
	Origins []string // sites whose pages may call it from a browser: "https://app.example.com", "*" for all
	Strict  bool     // JSON with fields that a message lacks is refused
}
