package build

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"maps"
	"path"
	"slices"
	"strings"
	"time"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/m3o/m3o"
	"github.com/m3o/m3o/buildpacks"
	"github.com/moby/buildkit/client"
	"github.com/moby/buildkit/client/llb"
	"github.com/moby/buildkit/session"
	"github.com/moby/buildkit/session/secrets/secretsprovider"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/tonistiigi/fsutil"
)

// A Tree is the source to build; *source.Tree is one.
type Tree interface {
	FS() fsutil.FS
	Submodules() []string
}

// A Request is one build.
type Request struct {
	App     string // keeps what was sent for one app apart from another's
	Plan    *buildpacks.Plan
	Tree    Tree
	Out     io.Writer // what the pusher sees, live; nil for nobody
	NoCache bool      // run the build again even if nothing changed; Go's own caches are still used
	// Secrets are environment variables of the build. "netrc" is a file that
	// NETRC names, for private modules. They reach no layer, log or cache key.
	Secrets map[string]m3o.Secret
	// Generate is Go code to make first; the zero Generation for none.
	Generate Generation
	Labels   map[string]string // annotations of the image
	Commit   string            // org.opencontainers.image.revision, "" for none
}

// A Result is an image that is in the content store.
type Result struct {
	Image string // digest of the manifest, "sha256:…"
	Size  int64  // of all layers, bytes
	Steps []Step
	Took  time.Duration
	Basis // what it was built with
}

// A Step is one part of a build, for the record of where the time went.
type Step struct {
	Name   string
	Took   time.Duration
	Cached bool
}

// startWait is how long a build waits for a BuildKit that is just starting.
const startWait = time.Minute

// Build runs the plan and writes the image. The same tree, plan and toolchain
// give the same layers and image config, and with the same Commit and Labels
// the same digest.
//
// The error is Invalid if the source is at fault, with the compiler's own last
// line as its message; Unavailable if it is not and another try may do:
// BuildKit stopped, the disk is full, a module could not be fetched. If ctx
// ends, the step is stopped at once and the error wraps ctx's.
func (b *Builder) Build(ctx context.Context, req Request) (Result, error) {
	began := time.Now()
	if err := checkRequest(req); err != nil {
		return Result{}, err
	}
	out := &output{w: req.Out}
	if !b.builds.TryAcquire(1) {
		out.step("Waiting for other builds to end")
		if err := b.builds.Acquire(ctx, 1); err != nil {
			return Result{}, fmt.Errorf("wait for other builds: %w", err)
		}
	}
	defer b.builds.Release(1)
	tctx, cancel := context.WithTimeoutCause(ctx, b.cfg.Timeout, &m3o.Error{Kind: m3o.Invalid,
		Msg: fmt.Sprintf("the build took longer than %s", b.cfg.Timeout), Hint: "make the build smaller, or raise the daemon's build timeout"})
	defer cancel()
	res, err := b.build(tctx, req, out)
	if err != nil {
		if ctx.Err() == nil && tctx.Err() != nil {
			err = context.Cause(tctx)
		}
		return Result{}, err
	}
	res.Took = time.Since(began)
	return res, nil
}

func checkRequest(req Request) error {
	switch {
	case req.Plan == nil || req.Tree == nil:
		return errors.New("build: no plan or no tree")
	case req.Plan.Builder != "go":
		return m3o.Errorf(m3o.Invalid, "no builder called %q", req.Plan.Builder)
	case len(req.Plan.Targets) == 0:
		return m3o.Errorf(m3o.Invalid, "the plan builds nothing")
	}
	for _, t := range req.Plan.Targets {
		if t.Name == "" || strings.ContainsAny(t.Name, "/\x00") || t.Path != path.Join(buildpacks.AppDir, t.Name) || strings.HasPrefix(t.Package, "-") {
			return fmt.Errorf("build: target %+v is not one", t)
		}
	}
	return req.Generate.check()
}

func (b *Builder) build(ctx context.Context, req Request, out *output) (Result, error) {
	var res Result
	out.step("Go app detected")
	if subs := req.Tree.Submodules(); len(subs) > 0 {
		out.put(" !     Submodules are not part of a push: " + strings.Join(subs, ", ") + " will be empty")
	}
	mark := time.Now()
	tc, err := b.toolchains.get(ctx, req.Plan.Toolchain, out.step)
	if err != nil {
		return res, disk(err)
	}
	root, err := b.stepRoot(ctx, tc)
	if err != nil {
		return res, disk(err)
	}
	out.step("Using %s", tc.Version)
	for _, n := range req.Plan.Notes {
		out.more("%s", n)
	}
	wctx, cancel := context.WithTimeout(ctx, startWait)
	gen, err := b.await(wctx)
	cancel()
	if err != nil {
		return res, err
	}
	res.Steps = append(res.Steps, Step{Name: "prepare", Took: time.Since(mark)})

	def, err := b.graph(req, root).Marshal(ctx, llb.Platform(platform()))
	if err != nil {
		return res, fmt.Errorf("make build graph: %w", err)
	}
	base, err := b.pin(func() (v1.Descriptor, error) { return b.runtimeLayer(ctx, b.images, tc) })
	if err != nil {
		return res, disk(err)
	}
	defer b.unpin(base)
	job, err := req.Generate.job()
	if err != nil {
		return res, err
	}
	app := &appLayer{builder: b, req: req}
	var pkgs []string
	for _, t := range req.Plan.Targets {
		pkgs = append(pkgs, t.Package)
	}
	out.step("Building %s", strings.Join(pkgs, " "))
	// A file that cannot be read must end the solve from here: fsutil's two
	// ends would wait for each other.
	ctx, stop := context.WithCancelCause(ctx)
	defer stop(nil)
	watch := newWatch(out)
	status := make(chan *client.SolveStatus)
	watched := make(chan struct{})
	go func() { defer close(watched); watch.run(status) }()
	_, err = b.client.Solve(ctx, def, client.SolveOpt{
		LocalMounts: map[string]fsutil.FS{sourceName: readFS{req.Tree.FS(), stop}, jobName: job},
		OCIStores:   map[string]content.Store{toolchainStore: b.toolchains.store},
		Session:     []session.Attachable{secretsprovider.FromMap(b.secrets(req))},
		Exports:     []client.ExportEntry{{Type: client.ExporterTar, Output: app.open(ctx)}},
	}, status)
	<-watched
	out.flush()
	layer, lerr := app.wait()
	if lerr == nil && layer.Digest != "" {
		defer b.unpin(layer)
	}
	if err != nil || lerr != nil {
		return res, b.explain(ctx, gen, err, lerr, out)
	}
	if layer.Digest == "" {
		return res, errors.New("build: BuildKit sent no result")
	}
	res.Steps = append(res.Steps, watch.steps()...)
	mark = time.Now()
	m, err := b.finish(ctx, req, base, layer)
	if err != nil {
		return res, disk(fmt.Errorf("write image: %w", err))
	}
	res.Steps = append(res.Steps, Step{Name: "image", Took: time.Since(mark)})
	res.Image, res.Size = m.Digest.String(), base.Size+layer.Size
	res.Basis = Basis{Toolchain: tc.Version, Base: base.Digest.String()}
	return res, nil
}

// A readFS tells of the first file that cannot be read.
type readFS struct {
	fsutil.FS
	fail context.CancelCauseFunc
}

func (r readFS) Open(name string) (io.ReadCloser, error) {
	f, err := r.FS.Open(name)
	if err != nil {
		r.fail(fmt.Errorf("read source: %w", err))
		return nil, err
	}
	return &readFile{f, r.fail}, nil
}

type readFile struct {
	io.ReadCloser
	fail context.CancelCauseFunc
}

func (r *readFile) Read(p []byte) (int, error) {
	n, err := r.ReadCloser.Read(p)
	if err != nil && !errors.Is(err, io.EOF) {
		r.fail(fmt.Errorf("read source: %w", err))
	}
	return n, err
}

// Names that tie the graph to what the session offers.
const (
	sourceName     = "source"
	toolchainStore = "toolchains"
)

// graph is the build: one step that compiles and links all targets.
//
// There is no step of its own for downloading modules. The module cache is a
// cache mount, so a change of code downloads nothing anyway, go build fetches
// only what it needs where go mod download fetches all there is, and a step
// BuildKit remembers as done would be wrong once the cache is pruned.
//
// All apps share both caches unless private modules are in play. With
// CGO_ENABLED=0 and no go generate, a build runs no code of the app: compiler
// and linker are all that ever writes there, the module cache is checked
// against go.sum and the checksum database, and entries of the build cache are
// named by a hash of everything that went into them. Private modules must not
// be had by naming them, so an app with GOPRIVATE or secrets has caches of its own.
func (b *Builder) graph(req Request, root v1.Descriptor) llb.State {
	caches := ""
	if b.goPrivate() != "" || len(req.Secrets) > 0 {
		caches = "-" + req.App
	}
	state := llb.OCILayout("m3o.local/toolchain@"+root.Digest.String(), llb.OCIStore("", toolchainStore), llb.WithCustomName(stepRoot))
	opts, flags := b.generate(req, state)
	args := append([]string{"build", "-trimpath", "-buildvcs=false", "-ldflags=-s -w", "-o", "/out/"}, flags...)
	for _, t := range req.Plan.Targets {
		args = append(args, t.Package)
	}
	opts = append(opts, b.goTool(args, caches, b.secrets(req))...)
	opts = append(opts,
		llb.Dir(path.Join("/src", req.Plan.Dir)),
		llb.AddMount("/src", llb.Local(sourceName, llb.SharedKeyHint("app-"+req.App), llb.WithCustomName(stepSource)), llb.Readonly),
		llb.WithCustomName(stepBuild),
	)
	if req.NoCache {
		// Not llb.IgnoreCache: that empties the cache mounts too, of all apps.
		opts = append(opts, llb.AddEnv("M3O_REBUILD", rand.Text()))
	}
	return state.Run(opts...).AddMount("/out", llb.Scratch())
}

// goTool is one call of the go command with the caches of that name.
func (b *Builder) goTool(args []string, caches string, secrets map[string][]byte) []llb.RunOption {
	cache := func(dir, name string) llb.RunOption {
		return llb.AddMount(dir, llb.Scratch(), llb.AsPersistentCacheDir(name+caches, llb.CacheMountShared))
	}
	opts := []llb.RunOption{
		llb.Args(append([]string{"/" + goRoot + "/bin/go"}, args...)),
		llb.ReadonlyRootFS(),
		llb.AddMount("/tmp", llb.Scratch(), llb.Tmpfs()),
		cache("/var/cache/go-build", "go-build"),
		cache("/var/cache/go-mod", "go-mod"),
	}
	env := map[string]string{
		"PATH": "/" + goRoot + "/bin", "HOME": "/tmp",
		"CGO_ENABLED": "0", "GOTOOLCHAIN": "local", "GOWORK": "off", "GOENV": "off",
		"GOCACHE": "/var/cache/go-build", "GOMODCACHE": "/var/cache/go-mod",
		"SSL_CERT_FILE": "/" + caFile, "GOPRIVATE": b.goPrivate(),
	}
	for _, k := range slices.Sorted(maps.Keys(env)) {
		opts = append(opts, llb.AddEnv(k, env[k]))
	}
	for _, id := range slices.Sorted(maps.Keys(secrets)) {
		if id == netrc {
			opts = append(opts, llb.AddEnv("NETRC", "/run/secrets/netrc"), llb.AddSecret("/run/secrets/netrc", llb.SecretID(netrc)))
			continue
		}
		opts = append(opts, llb.AddSecret(id, llb.SecretID(id), llb.SecretAsEnv(true)))
	}
	return opts
}

const netrc = "netrc"

func (b *Builder) goPrivate() string { return goEnv(b.cfg.GoPrivate, "GOPRIVATE") }

// secrets are those of the request and the Go settings that may hold a
// password. Both stay out of BuildKit's records that way.
func (b *Builder) secrets(req Request) map[string][]byte {
	out := b.proxySecrets()
	for k, s := range req.Secrets {
		out[k] = []byte(s.Reveal())
	}
	return out
}

func (b *Builder) proxySecrets() map[string][]byte {
	out := map[string][]byte{}
	for name, set := range map[string]string{"GOPROXY": b.cfg.GoProxy, "GOSUMDB": b.cfg.GoSumDB} {
		if v := goEnv(set, name); v != "" {
			out[name] = []byte(v)
		}
	}
	return out
}

func imageConfig(req Request) v1.ImageConfig {
	env := map[string]string{"PATH": buildpacks.AppDir, "SSL_CERT_FILE": "/" + caFile, "ZONEINFO": "/" + zoneFile}
	maps.Copy(env, req.Plan.Env)
	c := v1.ImageConfig{User: nonroot + ":" + nonroot, WorkingDir: buildpacks.AppDir, StopSignal: "SIGTERM"}
	for _, k := range slices.Sorted(maps.Keys(env)) {
		c.Env = append(c.Env, k+"="+env[k])
	}
	if web, ok := req.Plan.Processes["web"]; ok {
		c.Cmd = web.Command
		if web.Port != 0 {
			c.ExposedPorts = map[string]struct{}{fmt.Sprintf("%d/tcp", web.Port): {}}
		}
	}
	return c
}

func annotations(req Request) map[string]string {
	out := maps.Clone(req.Labels)
	if out == nil {
		out = map[string]string{}
	}
	if req.Commit != "" {
		out[v1.AnnotationRevision] = req.Commit
	}
	return out
}
