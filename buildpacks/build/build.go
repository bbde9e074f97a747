// Package build runs a buildpacks.Plan with BuildKit and leaves the result as
// an OCI image in a content store on disk. It owns everything about BuildKit:
// the supervised buildkitd, its network and cgroup, the Go toolchains it
// builds with, the caches and the images. It must not know what an app's
// releases or users are: App in a Request is a name to keep caches apart by.
package build

import (
	"context"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/plugins/content/local"
	containerdlog "github.com/containerd/log"
	"github.com/m3o/m3o"
	"github.com/moby/buildkit/client"
	"github.com/opencontainers/go-digest"
	"golang.org/x/sys/unix"
)

// Config says how to build. Only Dir is needed.
type Config struct {
	Dir       string // state: buildkitd's root, toolchains, images; of this Builder alone
	Buildkitd string // path of buildkitd; "" looks on PATH
	Runc      string // path of runc; "" looks on PATH
	Addr      string // a BuildKit somewhere else, "unix://…" or "tcp://…": nothing is supervised then

	// As the go command's variables of the same names; "" takes the daemon's
	// own environment. GoProxy is also where toolchains come from, and may hold
	// a password: steps get it as a secret.
	GoProxy, GoSumDB, GoPrivate string

	CACerts string // PEM bundle put into builds and images; "" takes the host's

	Subnet  netip.Prefix   // of the builds' network, a /30 or larger; default one of 198.19.0.0/16 chosen by Dir
	Blocked []netip.Prefix // what builds must not reach beside the host itself; default 198.18.0.0/15, the apps

	// NoNetns runs builds in the host's network: they reach everything the
	// host reaches. Only where the other way is not to be had; it is logged loudly.
	NoNetns bool

	Concurrency int           // builds at once; default 2
	Timeout     time.Duration // of one build, from its turn in the queue on; default 15 min
	Memory      int64         // of the steps of all builds together, bytes; default 4 GB
	Pids        int           // processes and threads of all builds together; default 4096
	Disk        int64         // what one step of a build may write, bytes; default 10 GB
	Cache       int64         // disk for layers and caches, bytes; default 20 GB
	Log         *slog.Logger  // nil discards
}

func (c Config) withDefaults() (Config, error) {
	var faults []string
	if !filepath.IsAbs(c.Dir) {
		faults = append(faults, "Dir is not an absolute path")
	}
	if c.Log == nil {
		c.Log = slog.New(slog.DiscardHandler)
	}
	if c.Concurrency == 0 {
		c.Concurrency = 2
	}
	if c.Timeout == 0 {
		c.Timeout = 15 * time.Minute
	}
	if c.Memory == 0 {
		c.Memory = 4 << 30
	}
	if c.Pids == 0 {
		c.Pids = 4096
	}
	if c.Disk == 0 {
		c.Disk = 10 << 30
	}
	if c.Cache == 0 {
		c.Cache = 20 << 30
	}
	if c.Blocked == nil {
		c.Blocked = []netip.Prefix{netip.MustParsePrefix("198.18.0.0/15")}
	}
	if !c.Subnet.IsValid() {
		c.Subnet = defaultSubnet(c.Dir)
	}
	if !c.Subnet.Addr().Is4() || c.Subnet.Bits() > 30 {
		faults = append(faults, "Subnet is not an IPv4 network of at least four addresses")
	}
	for _, b := range c.Blocked {
		if !b.Addr().Is4() {
			faults = append(faults, fmt.Sprintf("Blocked has %s, which is not IPv4", b))
		}
	}
	if c.Concurrency < 0 || c.Timeout < 0 || c.Memory < 0 || c.Pids < 0 || c.Disk < 0 || c.Cache < 0 {
		faults = append(faults, "a limit is negative")
	}
	if c.Addr == "" {
		for name, p := range map[string]*string{"buildkitd": &c.Buildkitd, "runc": &c.Runc} {
			full, err := exec.LookPath(orElse(*p, name))
			if err == nil {
				full, err = filepath.Abs(full)
			}
			if err != nil {
				faults = append(faults, fmt.Sprintf("no %s: %v", name, err))
			}
			*p = full
		}
	}
	if c.CACerts == "" {
		c.CACerts = hostCACerts()
	}
	if len(faults) > 0 {
		return c, m3o.Errorf(m3o.Invalid, "builder: %s", strings.Join(faults, "; "))
	}
	return c, nil
}

func orElse(a, b string) string {
	if a != "" {
		return a
	}
	return b
}

// hostCACerts is where the host keeps the certificates it trusts.
func hostCACerts() string {
	for _, p := range []string{os.Getenv("SSL_CERT_FILE"), "/etc/ssl/certs/ca-certificates.crt", "/etc/pki/tls/certs/ca-bundle.crt",
		"/etc/ssl/ca-bundle.pem", "/etc/pki/ca-trust/extracted/pem/tls-ca-bundle.pem", "/etc/ssl/cert.pem"} {
		if fi, err := os.Stat(p); p != "" && err == nil && fi.Mode().IsRegular() {
			return p
		}
	}
	return ""
}

// id tells the network, cgroup and firewall of one state directory from another's.
func id(dir string) [32]byte { return sha256.Sum256([]byte(filepath.Clean(dir))) }

func shortID(dir string) string { h := id(dir); return hex.EncodeToString(h[:3]) }

func defaultSubnet(dir string) netip.Prefix {
	h := id(dir)
	n := binary.BigEndian.Uint16(h[:2]) &^ 3
	return netip.PrefixFrom(netip.AddrFrom4([4]byte{198, 19, byte(n >> 8), byte(n)}), 30)
}

// A Builder builds images. It is safe for concurrent use.
type Builder struct {
	cfg        Config
	log        *slog.Logger
	lock       *os.File // flock on Dir: one Builder a directory
	toolchains *toolchains
	images     content.Store
	builds     *queue
	cgroup     *cgroup  // nil: none to be had
	guard      *guard   // nil without a cgroup
	network    *network // nil: NoNetns or external
	client     *client.Client
	base       baseLayers

	// store guards index.json, pins, and the step from "the blob is there" to
	// "it is pinned or in the index": Prune holds it while it removes.
	store sync.Mutex
	pins  map[digest.Digest]int // blobs of images being written

	mu      sync.Mutex    // guards the rest
	gen     int           // counts the buildkitds that have answered and those that ended
	ready   bool          // one answers
	changed chan struct{} // closed and replaced when gen or ready change
	failed  error         // why the last one ended or does not start
}

// Open prepares the state directory and ends whatever a killed daemon left
// running there. It fails if the machine cannot keep builds in a network of
// their own, unless NoNetns is set. Run must be called next.
func Open(ctx context.Context, cfg Config) (*Builder, error) {
	cfg, err := cfg.withDefaults()
	if err != nil {
		return nil, err
	}
	// The content store warns on standard error of file systems without
	// fsverity, which nothing here relies on.
	if err := containerdlog.SetLevel("error"); err != nil {
		return nil, fmt.Errorf("quieten the content store: %w", err)
	}
	b := &Builder{cfg: cfg, log: cfg.Log, builds: &queue{free: cfg.Concurrency, idle: make(chan struct{}, 1)}, changed: make(chan struct{}), pins: map[digest.Digest]int{}}
	for _, d := range []string{b.dir("buildkit"), b.dir("toolchains"), b.Images()} {
		if err := os.MkdirAll(d, 0o755); err != nil {
			return nil, fmt.Errorf("open builder: %w", err)
		}
	}
	if err := b.takeLock(); err != nil {
		return nil, err
	}
	if err := b.open(ctx); err != nil {
		_ = b.lock.Close()
		return nil, fmt.Errorf("open builder: %w", err)
	}
	return b, nil
}

func (b *Builder) open(ctx context.Context) (err error) {
	if b.toolchains, err = openToolchains(ctx, b.dir("toolchains"), b.cfg); err != nil {
		return err
	}
	if b.images, err = local.NewStore(b.Images()); err != nil {
		return err
	}
	if err := b.initLayout(); err != nil {
		return err
	}
	if err := b.sweep(); err != nil {
		return err
	}
	addr := b.cfg.Addr
	if addr == "" {
		if err := b.openSupervised(ctx); err != nil {
			return err
		}
		addr = "unix://" + b.socket()
	}
	b.client, err = client.New(ctx, addr)
	return err
}

func (b *Builder) openSupervised(ctx context.Context) error {
	const maxSocket = 107 // sun_path
	if len(b.socket()) > maxSocket {
		return m3o.Errorf(m3o.Invalid, "the path %s is too long for a socket", b.socket())
	}
	name := "m3o-build-" + shortID(b.cfg.Dir)
	cg, err := findCgroup(name)
	if err := b.endOrphan(ctx, cg); err != nil {
		return err
	}
	if err == nil {
		// Tried now: a machine that has no right to make groups says so here.
		err = cg.create(b.cfg.Memory, b.cfg.Pids)
	}
	if err != nil {
		b.log.Warn("builds are not limited: no cgroup can be made", "err", err)
	} else {
		b.cgroup = cg
		b.guard = &guard{cgroup: cg, dir: b.cfg.Dir, wrote: written, disk: b.cfg.Disk, pids: b.cfg.Pids}
	}
	if b.cfg.NoNetns {
		b.log.Warn("builds share the host's network and can reach everything it can", "setting", "NoNetns")
		return nil
	}
	n := &network{link: "m3ob" + shortID(b.cfg.Dir), table: "m3o_build_" + shortID(b.cfg.Dir), subnet: b.cfg.Subnet, blocked: b.cfg.Blocked,
		dns: findResolvers("/etc/resolv.conf", "/run/systemd/resolve/resolv.conf")}
	if err := n.check(); err != nil {
		return &m3o.Error{Kind: m3o.Unavailable, Msg: fmt.Sprintf("builds cannot be kept apart from the network: %v", err),
			Hint: "run as root on Linux with nftables, or set NoNetns to accept builds in the host's network", Err: err}
	}
	b.network = n
	return nil
}

func (b *Builder) dir(name string) string { return filepath.Join(b.cfg.Dir, name) }

func (b *Builder) socket() string { return b.dir("buildkit/buildkitd.sock") }

func (b *Builder) debugSocket() string { return b.dir("buildkit/debug.sock") }

// Images is the OCI image layout that Build writes into: oci-layout,
// index.json and blobs/sha256. Images are read from it by digest.
func (b *Builder) Images() string { return b.dir("images") }

// takeLock keeps a second Builder out of the directory. The lock ends with the process.
func (b *Builder) takeLock() error {
	f, err := os.OpenFile(b.dir("lock"), os.O_CREATE|os.O_RDWR|unix.O_CLOEXEC, 0o600)
	if err != nil {
		return fmt.Errorf("open builder: %w", err)
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		_ = f.Close()
		return &m3o.Error{Kind: m3o.Conflict, Msg: fmt.Sprintf("another daemon uses %s", b.cfg.Dir), Hint: "stop it first, or give this one another directory", Err: err}
	}
	b.lock = f
	return nil
}

// sweep removes what a killed daemon was in the middle of writing.
func (b *Builder) sweep() error {
	for _, pattern := range []string{"toolchains/fetch-*.zip", "toolchains/ingest/*", "images/ingest/*"} {
		names, err := filepath.Glob(b.dir(pattern))
		if err != nil {
			return err
		}
		for _, n := range names {
			if err := os.RemoveAll(n); err != nil && !errors.Is(err, fs.ErrNotExist) {
				return fmt.Errorf("remove what was left: %w", err)
			}
		}
	}
	return nil
}

// Ready waits until BuildKit answers. While it does not, the error after ctx
// ends is Unavailable and says why.
func (b *Builder) Ready(ctx context.Context) error {
	_, err := b.await(ctx)
	return err
}

func (b *Builder) await(ctx context.Context) (gen int, err error) {
	for {
		b.mu.Lock()
		ready, gen, changed, failed := b.ready, b.gen, b.changed, b.failed
		b.mu.Unlock()
		if ready {
			return gen, nil
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return 0, &m3o.Error{Kind: m3o.Unavailable, Msg: "the builder is not running", Hint: "push again in a moment",
				Err: errors.Join(ctx.Err(), failed)}
		}
	}
}

// state records that BuildKit answers or has ended.
func (b *Builder) state(ready bool, failed error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.ready, b.failed = ready, failed
	b.gen++
	close(b.changed)
	b.changed = make(chan struct{})
}

// diedSince reports whether the BuildKit of that generation has ended.
func (b *Builder) diedSince(gen int) bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.gen != gen
}
