//go:build linux

// Package oci runs instances as OCI containers on this Linux host, without a
// container daemon: each has a tiny shim of its own (cmd/m3o-shim), which has
// runc make the container, keeps its log and exit status and outlives us. An
// instance has a read-only root of shared layers, a tmpfs /tmp, its own PID,
// mount, network, IPC, UTS and cgroup namespace, no capabilities, a seccomp
// profile, a user id of its app alone, and limits. Its network is a routed
// veth pair behind one nftables table: out to the internet, in from this host,
// and to whoever listens on the gateway's address for names and for calls.
//
// It needs root, Linux 5.10 or newer, overlayfs, nf_tables and cgroup v1 or
// v2. It must not know of git, builds or releases.
//
// # Directories
//
//	Dir/lock               held by the one driver that is open
//	Dir/want, instances    the reconciler's records
//	Dir/bundles/<id>       one launch: config.json, lock, pid, exit.json (see cmd/m3o-shim)
//	Dir/layers             unpacked layers, shared
//	Dir/logs               see runtime.Logs
//	Dir/users.json         user id of each app
//	Run/<id>               runc's state
//
// The record of an instance is written before anything of it exists and
// removed after everything of it is gone; opening the driver removes whatever
// has no record. Killed at any moment, it therefore leaks nothing.
//
// A shim joins cgroups below /<Name>, away from those of the daemon, so that
// killing the daemon's cgroup (systemd's default on stop) leaves it alone.
package oci

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"iter"
	"log/slog"
	"net/netip"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/m3o/m3o"
	"github.com/m3o/m3o/internal/run"
	"github.com/m3o/m3o/runtime"
)

// DefaultName is the name of a host's only driver.
const DefaultName = "m3o"

// Config says where a Driver keeps things and what it uses.
type Config struct {
	// Name tells drivers on one host apart: it names the nftables table, the
	// devices and the cgroups, and decides the gateway's address. 1 to 7 of
	// a-z and 0-9, beginning with a letter; "" is DefaultName. Two drivers
	// need different Subnets too.
	Name   string
	Dir    string       // state that survives a reboot
	Run    string       // runc's state, on a file system that does not, such as /run/m3o
	Images string       // an OCI image layout directory, read only
	Runc   string       // path of runc
	Shim   string       // path of m3o-shim
	Subnet netip.Prefix // of the instances, IPv4; zero: 198.18.0.0/16 (RFC 2544: never on the internet)
	// Uplink is the only device instances may reach the world by. "" lets the
	// host's routes decide: a default route may move, and instances behind a
	// VPN or a second uplink would be cut off by our guess.
	Uplink   string
	Deny     []netip.Prefix // IPv4 networks instances neither reach nor are reached from, such as the builds'
	UserBase int            // first user id given to an app; 0: 100000
	KeepLogs runtime.Retention
	Log      *slog.Logger // nil discards
}

var nameForm = regexp.MustCompile(`^[a-z][a-z0-9]{0,6}$`)

// Validate fills in defaults and reports every fault at once.
func (c *Config) Validate() error {
	c.Name = cmp.Or(c.Name, DefaultName)
	c.UserBase = cmp.Or(c.UserBase, 100_000)
	if !c.Subnet.IsValid() {
		c.Subnet = netip.MustParsePrefix("198.18.0.0/16")
	}
	if c.Log == nil {
		c.Log = slog.New(slog.DiscardHandler)
	}
	var errs []error
	bad := func(format string, args ...any) { errs = append(errs, m3o.Errorf(m3o.Invalid, format, args...)) }
	if !nameForm.MatchString(c.Name) {
		bad("driver name %q is not 1 to 7 of a-z and 0-9, beginning with a letter", c.Name)
	}
	for what, p := range map[string]string{"state directory": c.Dir, "run directory": c.Run, "image directory": c.Images, "runc": c.Runc, "m3o-shim": c.Shim} {
		switch {
		case !filepath.IsAbs(p):
			bad("path of the %s %q is not absolute", what, p)
		case strings.ContainsAny(p, ":,\\\n"):
			bad("path of the %s %q has one of : , \\, which overlay mounts cannot have", what, p)
		}
	}
	if !c.Subnet.Addr().Is4() || c.Subnet.Bits() < 8 || c.Subnet.Bits() > 28 {
		bad("subnet %s is not an IPv4 network between /8 and /28", c.Subnet)
	}
	if c.Subnet.Overlaps(linkLocal) {
		bad("subnet %s overlaps %s", c.Subnet, linkLocal)
	}
	if len(c.Uplink) >= unix.IFNAMSIZ {
		bad("uplink %q is not a device name", c.Uplink)
	}
	for _, p := range c.Deny {
		if !p.Addr().Is4() {
			bad("denied network %s is not IPv4", p)
		}
	}
	return errors.Join(errs...)
}

// A Driver is a runtime.Driver. Open it, Serve it; Shutdown also ends what runs.
type Driver struct {
	*runtime.Reconciler // Start, Stop, Events, Explain

	cfg       Config
	log       *slog.Logger
	cgroups   cgroups
	swap      bool
	net       *network
	addresses *addresses
	users     *users
	layers    *layers
	logs      runtime.Logs
	links     *links
	joined    func(context.Context) // see OnJoin
	root      int                   // see bundle
	lock      *os.File              // on Dir
	nameLock  *os.File              // on Name
}

var (
	_ runtime.Driver    = (*Driver)(nil)
	_ runtime.Explainer = (*Driver)(nil)
)

// lockWait is how long Open waits for a driver that is ending.
const lockWait = 5 * time.Second

// Open takes over what an earlier driver left: it sets up the shared network
// and removes whatever belongs to no recorded instance. It is a Conflict while another driver has the same Dir or Name. The
// instances are attached to by Serve, which must follow, or Shutdown.
func Open(ctx context.Context, cfg Config) (_ *Driver, err error) {
	if err := cfg.Validate(); err != nil {
		return nil, err
	}
	if os.Geteuid() != 0 {
		return nil, &m3o.Error{Kind: m3o.Denied, Msg: "running containers takes root", Hint: "run it as root, or use --runtime process to develop"}
	}
	d := &Driver{cfg: cfg, log: cfg.Log, joined: func(context.Context) {}, logs: runtime.Logs{Dir: filepath.Join(cfg.Dir, "logs")}}
	for _, dir := range []string{cfg.Dir, cfg.Run, filepath.Join(cfg.Dir, "bundles"), d.logs.Dir} {
		if err := os.MkdirAll(dir, 0o711); err != nil {
			return nil, fmt.Errorf("make directory: %w", err)
		}
	}
	if d.lock, err = lockDir(ctx, cfg.Dir); err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			d.unlock()
		}
	}()
	if d.cgroups, err = findCgroups(cfg.Name, "/proc/self/mountinfo"); err != nil {
		return nil, err
	}
	if d.nameLock, err = d.lockName(ctx); err != nil {
		return nil, err
	}
	if err := d.cgroups.setup(); err != nil {
		return nil, err
	}
	if why := NoUserNamespace(filepath.Join(cfg.Dir, "bundles")); why != "" {
		d.log.Warn("apps have no user namespace", "err", why)
	} else {
		d.root = cfg.UserBase + maxUsers
	}
	d.swap = d.cgroups.unified() || exists(filepath.Join(filepath.Dir(filepath.Dir(d.cgroups.memory("x"))), "memory.memsw.limit_in_bytes"))
	boot, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return nil, fmt.Errorf("read boot id: %w", err)
	}
	if d.layers, err = openLayers(filepath.Join(cfg.Dir, "layers"), cfg.Images, string(boot)); err != nil {
		return nil, err
	}
	if d.addresses, err = newAddresses(cfg.Subnet, cfg.Dir); err != nil {
		return nil, err
	}
	if d.users, err = newUsers(cfg.UserBase, cfg.Dir); err != nil {
		return nil, err
	}
	if d.Reconciler, err = runtime.NewReconciler(cfg.Dir, (*containers)(d), cfg.Log); err != nil {
		return nil, err
	}
	d.net = &network{prefix: cfg.Name + "-", subnet: cfg.Subnet, gateway: GatewayOf(cfg.Name), uplink: cfg.Uplink, deny: cfg.Deny, table: cfg.Name}
	if d.links, err = openLinks(filepath.Join(cfg.Dir, "links.json"), d.net.putPairs); err != nil {
		return nil, err
	}
	for _, in := range d.Instances() {
		if ip, err := d.address(in.ID); err == nil {
			d.links.members[in.ID] = member{in.App, ip}
		}
	}
	d.net.pairs = d.links.pairs()
	d.links.sent = d.net.pairs
	turnedOn, err := d.net.setup()
	if err != nil {
		return nil, err
	}
	if turnedOn {
		d.log.Info("turned on IP forwarding for the whole host", "file", forwarding)
	}
	if err := d.sweep(ctx); err != nil {
		return nil, err
	}
	return d, nil
}

func exists(path string) bool {
	_, err := os.Stat(path)
	return err == nil
}

// lockDir makes this the only driver with this directory.
func lockDir(ctx context.Context, dir string) (*os.File, error) {
	f, err := os.OpenFile(filepath.Join(dir, "lock"), os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return nil, fmt.Errorf("open lock: %w", err)
	}
	return lock(ctx, f, dir+" is in use by another m3od", "stop that one, or give this one a directory of its own with --data")
}

// lockName makes this the only driver with this name, whatever its directory:
// to another one of the same name its instances would belong to nothing.
func (d *Driver) lockName(ctx context.Context) (*os.File, error) {
	dir := d.cgroups.dirs("")[0]
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return nil, fmt.Errorf("make cgroup: %w", err)
	}
	f, err := os.Open(dir)
	if err != nil {
		return nil, fmt.Errorf("open cgroup: %w", err)
	}
	return lock(ctx, f, fmt.Sprintf("another m3od on this host is called %s, too", d.cfg.Name),
		"stop that one, or give this one another --name")
}

func lock(ctx context.Context, f *os.File, taken, hint string) (*os.File, error) {
	ctx, cancel := context.WithTimeout(ctx, lockWait)
	defer cancel()
	for {
		err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		if err == nil {
			return f, nil
		}
		select {
		case <-ctx.Done():
			return nil, errors.Join(&m3o.Error{Kind: m3o.Conflict, Msg: taken, Hint: hint, Err: err}, f.Close())
		case <-time.After(50 * time.Millisecond):
		}
	}
}

// sweep removes everything of ours that no record knows.
func (d *Driver) sweep(ctx context.Context) error {
	known, devices := map[string]bool{}, map[string]bool{}
	for _, in := range d.Instances() {
		known[in.ID], devices[d.net.device(in.ID)] = true, true
		if ip, err := d.address(in.ID); err == nil {
			d.addresses.claim(ip)
		}
	}
	ids := d.cgroups.list()
	for _, dir := range []string{d.bundle(""), d.cfg.Run} {
		es, err := os.ReadDir(dir)
		if err != nil {
			return fmt.Errorf("sweep: %w", err)
		}
		for _, e := range es {
			if strings.HasPrefix(e.Name(), ".") { // a terminal's socket
				if err := os.RemoveAll(filepath.Join(dir, e.Name())); err != nil {
					return fmt.Errorf("sweep: %w", err)
				}
				continue
			}
			ids = append(ids, e.Name())
		}
	}
	for _, id := range ids {
		if known[id] {
			continue
		}
		known[id] = true // look at each once
		d.log.Info("removing what belongs to nothing", "instance", id)
		if err := d.clear(ctx, id); err != nil {
			return fmt.Errorf("sweep: %w", err)
		}
	}
	all, err := d.net.devices()
	if err != nil {
		return err
	}
	for _, name := range all {
		if !devices[name] {
			if err := d.net.removeDevice(name); err != nil {
				return fmt.Errorf("sweep: %w", err)
			}
		}
	}
	return nil
}

// Serve attaches to what runs and keeps it as wanted, until ctx ends. The
// instances keep running then; the next Serve attaches to them. (Run, by the Driver interface, is a one-off command.)
func (d *Driver) Serve(ctx context.Context) error {
	defer d.release()
	var s run.Stack
	s.Add("log trimmer", d.trimLogs)
	s.Add("instances", d.Reconciler.Run)
	return s.Run(ctx)
}

// release lets another driver open Dir.
func (d *Driver) release() {
	d.layers.syncing.Wait()
	d.unlock()
}

func (d *Driver) unlock() {
	for _, f := range []*os.File{d.lock, d.nameLock} {
		if f != nil {
			_ = f.Close() // at the latest the end of the process does it
		}
	}
}

func (d *Driver) trimLogs(ctx context.Context) error {
	t := time.NewTicker(time.Minute)
	defer t.Stop()
	for {
		live := map[string]bool{}
		for _, in := range d.Instances() {
			live[in.ID] = true
		}
		if err := d.logs.Trim(d.cfg.KeepLogs, func(id string) bool { return live[id] }); err != nil {
			d.log.Warn("cannot remove old logs", "err", err)
		}
		select {
		case <-ctx.Done():
			return nil
		case <-t.C:
		}
	}
}

// Shutdown stops every instance and removes the network, the firewall and the
// cgroups. What is wanted stays recorded: the next driver starts it again. It
// must not be called while Serve runs.
func (d *Driver) Shutdown(ctx context.Context) error {
	d.release()
	defer d.release()
	var err error
	if d.lock, err = lockDir(ctx, d.cfg.Dir); err != nil {
		return err
	}
	if d.nameLock, err = d.lockName(ctx); err != nil {
		return err
	}
	if err := d.StopAll(ctx); err != nil {
		return err
	}
	return errors.Join(d.net.teardown(), d.cgroups.removeAll())
}

// Gateway is this host's address as instances reach it: for name service, and
// at port 80 for calls to other apps, which come in at InternalPort.
func (d *Driver) Gateway() netip.Addr { return d.net.gateway }

// Prune removes the unpacked layers of every image but those of keep (manifest
// digests), those in use and those that should be.
func (d *Driver) Prune(_ context.Context, keep []string) error {
	names := map[string]bool{}
	for _, digest := range append(d.Images(), keep...) {
		im, err := runtime.ReadImage(d.cfg.Images, digest)
		if m3o.KindOf(err) == m3o.NotFound {
			continue // a running instance needs its layers mounted, not listed
		} else if err != nil {
			return fmt.Errorf("prune layers: %w", err)
		}
		for _, l := range im.Layers {
			names[layerName(l.DiffID)] = true
		}
	}
	return d.layers.prune(names)
}

// Logs is runtime.Driver's.
func (d *Driver) Logs(ctx context.Context, r runtime.Ref, lines int, follow bool) iter.Seq2[runtime.Line, error] {
	return d.logs.Read(ctx, r, lines, follow)
}
