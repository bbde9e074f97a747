package daemon

import (
	"context"
	"fmt"
	"io"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"github.com/m3o/m3o"
	"github.com/m3o/m3o/buildpacks/build"
	"github.com/m3o/m3o/runtime"
	"github.com/m3o/m3o/runtime/oci"
	"github.com/m3o/m3o/runtime/process"
)

// driver is a runtime driver with its own life: the daemon serves it while it
// runs, and shuts it down when the apps should end too.
type driver interface {
	runtime.Driver
	runtime.Explainer
	runtime.Meter
	OnDrain(func(context.Context, m3o.Instance)) // see runtime.Reconciler
	Serve(ctx context.Context) error
	Shutdown(ctx context.Context) error
	Prune(ctx context.Context, keep []string) error
	Images() []string // of all that runs or should
}

// builder makes images; *build.Builder is the real one.
type builder interface {
	Build(ctx context.Context, r build.Request) (build.Result, error)
	Attach(ctx context.Context, image string, a build.Attachment) error
	Current(ctx context.Context, toolchain string) (build.Basis, error)
	Fetch(ctx context.Context, toolchain string, say func(format string, args ...any)) error
	Attached(ctx context.Context, image, typ string) ([]byte, error)
	SBOM(ctx context.Context, image string) ([]byte, error)
	Compare(ctx context.Context, one, other string) ([]string, error)
	Import(ctx context.Context, app string, archive io.Reader) (build.Result, error)
	Run(ctx context.Context) error
	Ready(ctx context.Context) error
	Prune(ctx context.Context, keep []string) error
	Images() string
}

// builds holds the networks that builders choose theirs from.
var builds = netip.MustParsePrefix("198.19.0.0/16")

// openEngines opens the builder and the runtime driver that the configuration
// names. This switch is the only place that knows which there are.
func (d *Daemon) openEngines(ctx context.Context) error {
	if os.Geteuid() != 0 && d.cfg.BuildkitAddr == "" {
		return &m3o.Error{Kind: m3o.Denied, Msg: "building takes root", Hint: "run m3od as root, or give it a BuildKit with --buildkit-addr and run apps with --runtime process"}
	}
	bin := func(name string) string { return filepath.Join(d.cfg.Bin, name) }
	b, err := build.Open(ctx, build.Config{Dir: d.cfg.path("build"), Buildkitd: bin("buildkitd"), Runc: bin("runc"), Addr: d.cfg.BuildkitAddr,
		Timeout: d.cfg.BuildTimeout, Concurrency: d.cfg.BuildConcurrency, Memory: int64(d.cfg.BuildMemory), Pids: d.cfg.BuildPids, Disk: int64(d.cfg.BuildDisk), Cache: int64(d.cfg.BuildCache), GoProxy: d.goProxy(ctx), Blocked: []netip.Prefix{d.subnet(), netip.MustParsePrefix(defaultSubnet)}, Log: d.log})
	if err != nil {
		return fmt.Errorf("open builder: %w", err)
	}
	d.builder = b
	switch d.cfg.Runtime {
	case "oci":
		d.driver, err = oci.Open(ctx, oci.Config{Name: d.cfg.Name, Dir: d.cfg.path("runtime"), Run: filepath.Join("/run", d.cfg.Name), Images: b.Images(),
			Runc: bin("runc"), Shim: bin("m3o-shim"), Subnet: d.subnet(), Deny: []netip.Prefix{builds},
			KeepLogs: d.keepLogs(), Log: d.log})
	case "process":
		d.driver, err = process.Open(process.Config{Dir: d.cfg.path("runtime"), Images: b.Images(), Log: d.log})
	default:
		err = m3o.Errorf(m3o.Invalid, "no runtime driver called %q", d.cfg.Runtime)
	}
	if err != nil {
		return fmt.Errorf("open runtime: %w", err)
	}
	d.driver.OnDrain(d.drainInstance)
	d.peers.connect(d.driver)
	return nil
}

// goProxy is the module proxy builds use: the configured one, else the one the
// go command of this host would use, if there is one.
func (d *Daemon) goProxy(ctx context.Context) string {
	if d.cfg.GoProxy != "" {
		return d.cfg.GoProxy
	}
	if v := os.Getenv("GOPROXY"); v != "" {
		return v
	}
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	cmd := exec.CommandContext(ctx, "go", "env", "GOPROXY")
	cmd.Dir = "/" // no go.mod of whoever started us
	out, err := cmd.Output()
	if err != nil {
		d.log.Info("no module proxy is configured and there is no go command to ask: a toolchain that is not here cannot be fetched", "hint", "--goproxy")
		return ""
	}
	return strings.TrimSpace(string(out))
}
