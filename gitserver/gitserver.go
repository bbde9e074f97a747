// Package gitserver is the SSH door of the platform: it authenticates a key,
// lets git push to and fetch from an app's bare repository, and shows the
// pusher live what becomes of the push. It runs the real git (receive-pack,
// upload-pack) as children and is joined to their hooks by inherited pipes, so
// no hook re-executes the daemon and no socket is needed.
//
// It must not know what a build or a release is: who may push, what a push
// sets off and what a verb over ssh does are asked of Users, Apps and Commands.
package gitserver

import (
	"context"
	"crypto/ed25519"
	"crypto/rand"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"time"

	gossh "golang.org/x/crypto/ssh"

	"github.com/m3o/m3o"
)

// Users says whose an SSH key is.
type Users interface {
	// UserByKey finds the owner of a public key in SSH wire format. A key that
	// belongs to nobody is m3o.NotFound. It is called when the key is offered
	// and again for each session, so that a revoked key loses an open
	// connection too. It must be safe for concurrent use.
	UserByKey(ctx context.Context, wire []byte) (user, fingerprint string, err error)
}

// Apps decides about apps and deploys them. It must be safe for concurrent use.
type Apps interface {
	// Access reports whether user may push to (write) or fetch app, creating
	// the app on a first push if the user may, and names its deploy branch.
	Access(ctx context.Context, user, app string, write bool) (branch string, err error)

	// Deploy builds, releases and switches src, writing what the pusher should
	// read to out (without "remote: "; control characters are removed). A
	// non-nil error refuses the push. ctx ends when the pusher goes away, and
	// Deploy must return soon after. It is called only for the deploy branch,
	// at most once per push, and after the objects were found complete; that
	// src.Old is still the branch's commit (Tip) is for Deploy to check under
	// its own lock, which it holds until Done.
	Deploy(ctx context.Context, src m3o.Source, out io.Writer) (Deployment, error)
}

// A Deployment is live but not yet final: git has still to move the branch.
type Deployment interface {
	// Done follows every successful Deploy exactly once, also after a lost
	// client or a git that fails. moved says whether the branch is now
	// src.Commit; when it is not, the switch must be undone. What is written to
	// out reaches the pusher if there still is one. ctx does not end with the
	// pusher, only after Limits.Finish.
	Done(ctx context.Context, moved bool, out io.Writer) error
}

// Commands are the verbs that work over ssh, as in `ssh m3o@host apps`.
type Commands interface {
	// Run runs one verb and returns its exit code (0 to 255). ctx ends when
	// the client goes away. term is nil when the client has no terminal; where
	// it has, errOut is not used.
	Run(ctx context.Context, user string, args []string, term *Terminal, in io.Reader, out, errOut io.Writer) (exit int)
}

// A Terminal is the client's: all it sends are keys, and all it gets is shown
// as it is.
type Terminal struct {
	Name  string           // the client's TERM
	Sizes <-chan [2]uint16 // {columns, rows}: the first is there at once, then every change
}

// Limits bound what one client can cost. Zero fields take the defaults named.
type Limits struct {
	Pack        int64 // bytes of one pack as sent; 512 MB
	Refs        int   // refs changed by one push; 100
	PushOptions int   // options of one push; 20

	CPU     time.Duration // processor time of each git process, which is what stops a zip bomb; 5 min
	Memory  int64         // bytes of private memory of each git process; 2 GB
	Receive time.Duration // from the start of a push until all its objects are here and checked; 30 min
	Finish  time.Duration // for git to move the refs after a deploy, and for Deployment.Done; 1 min
	Stalled time.Duration // how long a pusher may leave its output unread; 1 min

	Login                  time.Duration // to authenticate; 20 s
	Idle                   time.Duration // a connection without a session; 30 min
	Connections            int           // connections in all; 512
	Unauthenticated        int           // connections that have not authenticated, in all; 100
	UnauthenticatedPerHost int           // and from one address; 20
	Sessions               int           // sessions of one key at once; 8
}

func (l Limits) withDefaults() Limits {
	or := func(p *int, v int) {
		if *p == 0 {
			*p = v
		}
	}
	orBytes := func(p *int64, v int64) {
		if *p == 0 {
			*p = v
		}
	}
	orTime := func(p *time.Duration, v time.Duration) {
		if *p == 0 {
			*p = v
		}
	}
	orBytes(&l.Pack, 512<<20)
	or(&l.Refs, 100)
	or(&l.PushOptions, 20)
	orTime(&l.CPU, 5*time.Minute)
	orBytes(&l.Memory, 2<<30)
	orTime(&l.Receive, 30*time.Minute)
	orTime(&l.Finish, time.Minute)
	orTime(&l.Stalled, time.Minute)
	orTime(&l.Login, 20*time.Second)
	orTime(&l.Idle, 30*time.Minute)
	or(&l.Connections, 512)
	or(&l.Unauthenticated, 100)
	or(&l.UnauthenticatedPerHost, 20)
	or(&l.Sessions, 8)
	return l
}

// Config is what a Server needs.
type Config struct {
	Listener net.Listener // bound by the caller, so that a taken port fails early; the Server closes it
	HostKey  []byte       // PEM of an ed25519 private key; GenerateHostKey makes one
	Repos    string       // absolute directory of the <app>.git bare repositories, made if absent
	Users    Users
	Apps     Apps
	Commands Commands     // nil: no verbs over ssh
	Limits   Limits       // zero fields: the defaults
	Log      *slog.Logger // nil: nothing is logged
}

// Validate reports every fault of c at once.
func (c Config) Validate() error {
	var errs []error
	fault := func(format string, args ...any) { errs = append(errs, fmt.Errorf(format, args...)) }
	if c.Listener == nil {
		fault("git server: no listener")
	}
	if _, err := hostSigner(c.HostKey); err != nil {
		fault("git server: host key: %w", err)
	}
	switch {
	case !filepath.IsAbs(c.Repos):
		fault("git server: repository directory %q is not an absolute path", c.Repos)
	case strings.ContainsAny(c.Repos, ":\"\n"):
		// git separates object directories by colons.
		fault("git server: repository directory %q has a colon, a quote or a newline", c.Repos)
	}
	if c.Users == nil {
		fault("git server: no users")
	}
	if c.Apps == nil {
		fault("git server: no apps")
	}
	l := c.Limits
	for _, n := range []int64{l.Pack, int64(l.Refs), int64(l.PushOptions), int64(l.CPU), l.Memory, int64(l.Receive), int64(l.Finish),
		int64(l.Stalled), int64(l.Login), int64(l.Idle), int64(l.Connections), int64(l.Unauthenticated), int64(l.UnauthenticatedPerHost), int64(l.Sessions)} {
		if n < 0 {
			fault("git server: a limit is negative: %+v", l)
			break
		}
	}
	return errors.Join(errs...)
}

// A Server serves git over SSH. Its methods are safe for concurrent use.
type Server struct {
	cfg    Config
	lim    Limits
	log    *slog.Logger
	signer gossh.Signer
	git    string // path of the git binary
	hooks  string // directory of our hook scripts

	base context.Context // of every session; ends when Run ends
	end  context.CancelCauseFunc

	mu       sync.Mutex // guards all below
	stopping bool
	conns    map[*conn]struct{}
	perKey   map[string]int // sessions, by key fingerprint
	repos    map[string]*repo
	sessions sync.WaitGroup // Add only under mu while !stopping
}

var errStopping = m3o.Errorf(m3o.Unavailable, "m3o is stopping; push again in a moment")

// New checks c, makes the repository directory and the hook scripts, and
// removes what a crash may have left in the repositories (quarantined objects,
// lock files). No other process may serve the same directory.
func New(c Config) (*Server, error) {
	if err := c.Validate(); err != nil {
		return nil, err
	}
	s := &Server{
		cfg: c, lim: c.Limits.withDefaults(), log: c.Log,
		conns: map[*conn]struct{}{}, perKey: map[string]int{}, repos: map[string]*repo{},
	}
	if s.log == nil {
		s.log = slog.New(slog.DiscardHandler)
	}
	s.signer, _ = hostSigner(c.HostKey) // checked by Validate
	s.base, s.end = context.WithCancelCause(context.Background())
	var err error
	if s.git, err = findGit(); err != nil {
		return nil, err
	}
	if err := os.MkdirAll(c.Repos, 0o700); err != nil {
		return nil, fmt.Errorf("make repository directory: %w", err)
	}
	// git names the quarantine by its real path.
	if s.cfg.Repos, err = filepath.EvalSymlinks(c.Repos); err != nil {
		return nil, fmt.Errorf("resolve repository directory: %w", err)
	}
	if s.hooks, err = writeHooks(filepath.Join(s.cfg.Repos, ".hooks")); err != nil {
		return nil, err
	}
	if err := sweepAll(s.cfg.Repos); err != nil {
		return nil, err
	}
	return s, nil
}

// Fingerprint is the host key's, as ssh prints it: SHA256:….
func (s *Server) Fingerprint() string { return gossh.FingerprintSHA256(s.signer.PublicKey()) }

// HostKey is the public host key as a line for known_hosts, without the host.
func (s *Server) HostKey() string {
	return strings.TrimSpace(string(gossh.MarshalAuthorizedKey(s.signer.PublicKey())))
}

// GenerateHostKey makes a new ed25519 host key, PEM in OpenSSH's format. Keep
// it mode 0600: who has it can pose as this server.
func GenerateHostKey() ([]byte, error) {
	_, key, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		return nil, fmt.Errorf("generate host key: %w", err)
	}
	block, err := gossh.MarshalPrivateKey(key, "m3o host key")
	if err != nil {
		return nil, fmt.Errorf("encode host key: %w", err)
	}
	return pem.EncodeToMemory(block), nil
}

func hostSigner(pemBytes []byte) (gossh.Signer, error) {
	signer, err := gossh.ParsePrivateKey(pemBytes)
	if err != nil {
		return nil, fmt.Errorf("parse: %w", err)
	}
	if t := signer.PublicKey().Type(); t != gossh.KeyAlgoED25519 {
		return nil, fmt.Errorf("its type is %s, not %s", t, gossh.KeyAlgoED25519)
	}
	return signer, nil
}

// Run serves until ctx ends or the listener fails. Then it takes no new
// session, cancels the running ones (a push in its build is refused and its
// objects dropped), waits for all and closes the connections. It is called once.
func (s *Server) Run(ctx context.Context) error {
	var conns sync.WaitGroup
	stop := context.AfterFunc(ctx, func() { _ = s.cfg.Listener.Close() })
	defer stop()
	err := s.accept(ctx, &conns)

	_ = s.cfg.Listener.Close()
	s.mu.Lock()
	s.stopping = true
	s.mu.Unlock()
	s.end(errStopping)
	s.sessions.Wait()
	s.mu.Lock()
	for c := range s.conns {
		_ = c.Close()
	}
	s.mu.Unlock()
	conns.Wait()
	return err
}

func (s *Server) accept(ctx context.Context, conns *sync.WaitGroup) error {
	var delay time.Duration
	for {
		nc, err := s.cfg.Listener.Accept()
		switch {
		case ctx.Err() != nil:
			if err == nil {
				_ = nc.Close()
			}
			return nil
		case errors.Is(err, net.ErrClosed):
			return fmt.Errorf("accept ssh connection: %w", err)
		case err != nil:
			// Out of file descriptors, most often: it passes when sessions end.
			delay = min(max(2*delay, 5*time.Millisecond), time.Second)
			s.log.Warn("accept ssh connection", "err", err)
			select {
			case <-time.After(delay):
			case <-ctx.Done():
			}
		default:
			delay = 0
			conns.Go(func() { s.serveConn(nc) })
		}
	}
}

// begin counts a session of the key in, and returns why it may not start.
func (s *Server) begin(key string) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	switch {
	case s.stopping:
		return errStopping
	case s.perKey[key] >= s.lim.Sessions:
		return &m3o.Error{Kind: m3o.Unavailable, Msg: fmt.Sprintf("this key has %d sessions open, which is the limit", s.lim.Sessions),
			Hint: "wait for a push to end, or stop one with Ctrl-C"}
	}
	s.perKey[key]++
	return nil
}

func (s *Server) finish(key string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.perKey[key]--; s.perKey[key] <= 0 {
		delete(s.perKey, key)
	}
}

// findGit finds a git that is new enough: 2.38 streams large blobs into loose
// objects, which the memory limit relies on.
func findGit() (string, error) {
	path, err := exec.LookPath("git")
	if err != nil {
		return "", &m3o.Error{Kind: m3o.Unavailable, Msg: "git is not installed", Hint: "install git 2.38 or newer", Err: err}
	}
	out, err := exec.Command(path, "version").Output()
	if err != nil {
		return "", fmt.Errorf("ask git for its version: %w", err)
	}
	var major, minor int
	if _, err := fmt.Sscanf(string(out), "git version %d.%d", &major, &minor); err != nil {
		return "", fmt.Errorf("read git's version %q: %w", out, err)
	}
	if major < 2 || major == 2 && minor < 38 {
		return "", &m3o.Error{Kind: m3o.Unavailable, Msg: fmt.Sprintf("git %d.%d is too old", major, minor), Hint: "install git 2.38 or newer"}
	}
	return path, nil
}
