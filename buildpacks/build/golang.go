package build

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"maps"
	"path"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/m3o/m3o/buildpacks"
	"github.com/moby/buildkit/client"
	"github.com/moby/buildkit/client/llb"
	"github.com/moby/buildkit/session"
	"github.com/moby/buildkit/session/secrets/secretsprovider"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/tonistiigi/fsutil"
)

// buildGo compiles a Go plan's targets and makes an image of them.
func (b *Builder) buildGo(ctx context.Context, req Request, out *output) (Result, error) {
	var res Result
	out.step("Go app detected")
	mark := time.Now()
	find, want := b.toolchains.get, req.Plan.Toolchain
	if req.Toolchain != "" {
		find, want = b.toolchains.exactly, req.Toolchain
	}
	tc, err := find(ctx, want, out.step)
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
	gen, err := b.awaitStart(ctx)
	if err != nil {
		return res, err
	}
	res.Steps = append(res.Steps, Step{Name: "prepare", Took: time.Since(mark)})

	def, err := b.goGraph(req, root).Marshal(ctx, llb.Platform(platform()))
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
	watch := newWatch(out)
	_, err = b.solve(ctx, req, def, client.SolveOpt{
		LocalMounts: map[string]fsutil.FS{jobName: job},
		OCIStores:   map[string]content.Store{toolchainStore: b.toolchains.store},
		Session:     []session.Attachable{secretsprovider.FromMap(b.secrets(req))},
		Exports:     []client.ExportEntry{{Type: client.ExporterTar, Output: app.open(ctx)}},
	}, watch)
	layer, lerr := app.wait()
	if lerr == nil && layer.Digest != "" {
		defer b.unpin(layer)
	}
	res.Steps = append(res.Steps, watch.steps()...)
	if err != nil || lerr != nil {
		return res, b.explain(ctx, gen, err, lerr, watch)
	}
	if layer.Digest == "" {
		return res, errors.New("build: BuildKit sent no result")
	}
	mark = time.Now()
	layers := []v1.Descriptor{base, layer}
	if len(req.Plan.Copy) > 0 {
		files, err := b.filesLayer(ctx, req)
		if err != nil {
			return res, disk(err)
		}
		defer b.unpin(files)
		// Below the binaries: a folder named as one of them must not hide it.
		layers = []v1.Descriptor{base, files, layer}
	}
	m, err := b.finish(ctx, req, layers...)
	if err != nil {
		return res, disk(fmt.Errorf("write image: %w", err))
	}
	res.Steps = append(res.Steps, Step{Name: "image", Took: time.Since(mark)})
	res.Image = m.Digest.String()
	res.Basis = Basis{Toolchain: tc.Version, Base: base.Digest.String()}
	for _, l := range layers {
		res.Size += l.Size
	}
	return res, nil
}

// toolchainStore is the session's store that the root of Go steps comes from.
const toolchainStore = "toolchains"

// goGraph is the build: one step that compiles and links all targets and,
// where they are asked for, one each that vets and tests, all at once.
//
// There is no step of its own for downloading modules. The module cache is a
// cache mount, so a change of code downloads nothing anyway, go build fetches
// only what it needs where go mod download fetches all there is, and a step
// BuildKit remembers as done would be wrong once the cache is pruned.
//
// All apps share both caches as long as nothing but the Go tools writes there:
// with CGO_ENABLED=0 and no go generate, compiler and linker run no code of
// the app, the module cache is checked against go.sum and the checksum
// database, and entries of the build cache are named by a hash of everything
// that went into them. An app has caches of its own where that does not hold:
// with private modules, which must not be had by naming them; with flags of
// its own, which can name files to write; and for its tests, which run its code.
func (b *Builder) goGraph(req Request, root v1.Descriptor) llb.State {
	g := &req.Plan.Go
	own := b.goPrivate() != "" || len(req.Secrets) > 0 || len(req.Plan.Private) > 0 || len(g.Flags) > 0 || !onlySymbols(g.LDFlags)
	src := llb.Local(sourceName, llb.SharedKeyHint("app-"+req.App), llb.WithCustomName(stepSource))
	base := llb.OCILayout("m3o.local/toolchain@"+root.Digest.String(), llb.OCIStore("", toolchainStore), llb.WithCustomName(stepRoot))
	generated, overlay := b.generate(req, base)
	flags := slices.Concat(goFlags(g), overlay)
	step := func(name, caches string, args []string, opts ...llb.RunOption) llb.State {
		opts = slices.Concat(generated, b.goTool(args, caches, b.secrets(req)), b.goEnv(req),
			[]llb.RunOption{llb.Dir(path.Join("/src", req.Plan.Dir)), llb.WithCustomName(name)}, opts)
		return base.Run(opts...).AddMount("/out", llb.Scratch())
	}
	shared, apart := "", "-"+req.App
	if own {
		shared = apart
	}
	if req.Verify {
		shared, apart = "-verify"+shared, "-verify"+apart
	}
	readonly := llb.AddMount("/src", src, llb.Readonly)
	if own {
		// BuildKit remembers results by all that went into them but secrets and
		// caches: an app with the same tree must not get what it could not build.
		base = base.AddEnv("M3O_CACHE_OF", req.App)
	}
	args := append([]string{"build"}, flags...)
	args = append(args, "-ldflags="+strings.TrimSpace("-s -w "+stamped(g.LDFlags, req)), "-o", "/out/")
	for _, t := range req.Plan.Targets {
		args = append(args, t.Package)
	}
	parts := []llb.State{step(stepBuild, shared, args, slices.Concat([]llb.RunOption{readonly}, b.compilerMemory())...)}
	if g.Vet {
		parts = append(parts, step(stepVet, shared, append(append([]string{"vet"}, flags...), "./..."), readonly))
	}
	if g.Test {
		// Its own copy of the tree: tests write beside their testdata.
		parts = append(parts, step(stepTest, apart+"-test", append(append([]string{"test"}, flags...), "./..."), llb.AddMount("/src", src), llb.AddEnv("XDG_CONFIG_HOME", "/tmp/.config")))
	}
	if len(parts) == 1 {
		return parts[0]
	}
	return llb.Merge(parts) // the gates leave nothing, but have to pass
}

// compilerMemory lets compilers and linker collect less garbage: they live for
// seconds, and do the same in a tenth less CPU. From a share of what builds may
// use on, they collect as ever.
func (b *Builder) compilerMemory() []llb.RunOption {
	return []llb.RunOption{llb.AddEnv("GOGC", "400"), llb.AddEnv("GOMEMLIMIT", strconv.FormatInt(b.cfg.Memory/4, 10))}
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
	opts = append(opts, sorted(map[string]string{
		"PATH": "/" + goRoot + "/bin", "HOME": "/tmp",
		"CGO_ENABLED": "0", "GOTOOLCHAIN": "local", "GOWORK": "off", "GOENV": "off",
		"GOCACHE": "/var/cache/go-build", "GOMODCACHE": "/var/cache/go-mod", "XDG_CONFIG_HOME": "/" + configHome,
		"SSL_CERT_FILE": "/" + caFile, "GOPRIVATE": b.goPrivate(),
	})...)
	for _, id := range slices.Sorted(maps.Keys(secrets)) {
		if strings.EqualFold(id, netrc) {
			opts = append(opts, llb.AddEnv("NETRC", "/run/secrets/netrc"), llb.AddSecret("/run/secrets/netrc", llb.SecretID(id)))
			continue
		}
		opts = append(opts, llb.AddSecret(id, llb.SecretID(id), llb.SecretAsEnv(true)))
	}
	return opts
}

// goEnv are the variables by which a request's Go steps differ from others'.
func (b *Builder) goEnv(req Request) []llb.RunOption {
	g, env := &req.Plan.Go, map[string]string{}
	if g.Work != "" {
		env["GOWORK"] = path.Join("/src", g.Work)
	}
	if len(g.Flags) > 0 {
		env["GOFLAGS"] = strings.Join(g.Flags, " ")
	}
	if len(g.Experiment) > 0 {
		env["GOEXPERIMENT"] = strings.Join(g.Experiment, ",")
	}
	if len(req.Plan.Private) > 0 {
		private := strings.Join(slices.Concat(split(b.goPrivate()), req.Plan.Private), ",")
		// With a proxy of the app's own its private modules come from there;
		// without one they are fetched from where they are.
		if _, proxied := req.Secrets["GOPROXY"]; proxied {
			env["GONOSUMDB"] = private
		} else {
			env["GOPRIVATE"] = private
		}
	}
	if req.NoCache {
		// Not llb.IgnoreCache: that empties the cache mounts too, of all apps.
		env["M3O_REBUILD"] = rand.Text()
	}
	return sorted(env)
}

func split(s string) []string {
	if s == "" {
		return nil
	}
	return strings.Split(s, ",")
}

func sorted(env map[string]string) []llb.RunOption {
	var opts []llb.RunOption
	for _, k := range slices.Sorted(maps.Keys(env)) {
		opts = append(opts, llb.AddEnv(k, env[k]))
	}
	return opts
}

const netrc = "netrc"

// goFlags are those of every go command of a plan.
func goFlags(g *buildpacks.Go) []string {
	out := []string{"-trimpath", "-buildvcs=false"}
	if len(g.Tags) > 0 {
		out = append(out, "-tags="+strings.Join(g.Tags, ","))
	}
	return out
}

// stamped puts the commit into the linker's flags.
func stamped(flags string, req Request) string {
	short := req.Commit
	if len(short) > 12 {
		short = short[:12]
	}
	return strings.NewReplacer("$VERSION", short, "$COMMIT", req.Commit, "$TIME", req.Time.UTC().Format(time.RFC3339)).Replace(flags)
}

// onlySymbols reports whether linker flags only set texts and leave symbols
// out. Any other could name a program to run or a file to write.
func onlySymbols(flags string) bool {
	value := false
	for _, f := range strings.Fields(flags) {
		switch {
		case value:
			value = false
		case f == "-X" || f == "--X":
			value = true
		case f != "-s" && f != "-w" && !strings.HasPrefix(f, "-X="):
			return false
		}
	}
	return true
}

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
