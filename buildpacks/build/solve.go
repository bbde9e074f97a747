package build

import (
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"path"
	"strings"
	"time"

	"github.com/m3o/m3o"
	"github.com/m3o/m3o/buildpacks"
	"github.com/moby/buildkit/client"
	"github.com/moby/buildkit/client/llb"
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
	User    string // whose turn in the queue it takes
	Plan    *buildpacks.Plan
	Tree    Tree
	Out     io.Writer // what the pusher sees, live; nil for nobody
	NoCache bool      // run the build again even if nothing changed; Go's own caches are still used
	// Secrets are environment variables of the build. "netrc", in whatever case,
	// is a file that NETRC names, for private modules. A Dockerfile mounts them.
	// They reach no layer, log or cache key.
	Secrets map[string]m3o.Secret
	// Registries has the passwords of registries that FROM lines name, as Docker's
	// config.json. No step sees it.
	Registries m3o.Secret
	// Verify builds with Go caches of its own, which other builds do not write to.
	Verify bool
	// Toolchain is the very one to use, "go1.26.3"; "" leaves it to the plan.
	Toolchain string
	// Generate is Go code to make first; the zero Generation for none.
	Generate Generation
	Labels   map[string]string // annotations of the image
	Commit   string            // org.opencontainers.image.revision, "" for none
	Time     time.Time         // of the commit
}

// A Result is an image that is in the content store.
type Result struct {
	Image string // digest of the manifest, "sha256:…"
	Size  int64  // of all layers, bytes
	Port  int    // the one TCP port a Dockerfile or an image exposes, 0 for none
	Steps []Step
	Took  time.Duration
	Basis // what it was built with
}

// A Step is one part of a build, for the record of where the time went.
type Step = m3o.BuildStep

// startWait is how long a build waits for a BuildKit that is just starting.
const startWait = time.Minute

// Build runs the plan and writes the image. The same tree, plan and toolchain
// give the same layers and image config, and with the same Commit and Labels
// the same digest.
//
// The error is Invalid if the source is at fault, with the compiler's own last
// line as its message; Unavailable if it is not and another try may do:
// BuildKit stopped, the disk is full, a module could not be fetched. If ctx
// ends, the step is stopped at once and the error wraps ctx's. With an error the
// result has the steps there were, and nothing else.
func (b *Builder) Build(ctx context.Context, req Request) (Result, error) {
	began := time.Now()
	if err := checkRequest(req); err != nil {
		return Result{}, err
	}
	out := &output{w: req.Out}
	done, err := b.builds.enter(ctx, req.User, func(ahead int) { out.step("Waiting for other builds to end: %d before this one", ahead) })
	if err != nil {
		return Result{}, fmt.Errorf("wait for other builds: %w", err)
	}
	defer done()
	tctx, cancel := context.WithTimeoutCause(ctx, b.cfg.Timeout, &m3o.Error{Kind: m3o.Invalid,
		Msg: fmt.Sprintf("the build was ended: it took longer than %s", b.cfg.Timeout), Hint: "make it shorter, or raise m3od --build-timeout"})
	defer cancel()
	res, err := b.build(tctx, req, out)
	if err != nil {
		if ctx.Err() == nil && tctx.Err() != nil {
			err = context.Cause(tctx)
		}
		return Result{Steps: res.Steps}, err
	}
	res.Took = time.Since(began)
	return res, nil
}

func checkRequest(req Request) error {
	switch {
	case req.Plan == nil || req.Tree == nil:
		return errors.New("build: no plan or no tree")
	case req.Plan.Builder == "dockerfile":
		return nil
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
	if subs := req.Tree.Submodules(); len(subs) > 0 {
		out.put(" !     Submodules are not part of a push: " + strings.Join(subs, ", ") + " will be empty")
	}
	if req.Plan.Builder == "dockerfile" {
		return b.buildDockerfile(ctx, req, out)
	}
	return b.buildGo(ctx, req, out)
}

// awaitStart waits for a BuildKit that is just starting.
func (b *Builder) awaitStart(ctx context.Context) (gen int, err error) {
	ctx, cancel := context.WithTimeout(ctx, startWait)
	defer cancel()
	return b.await(ctx)
}

// solve runs one graph to its end, with the request's tree as sourceName.
func (b *Builder) solve(ctx context.Context, req Request, def *llb.Definition, opt client.SolveOpt, w *watch) (*client.SolveResponse, error) {
	// A file that cannot be read must end the solve from here: fsutil's two
	// ends would wait for each other.
	ctx, stop := context.WithCancelCause(ctx)
	defer stop(nil)
	if opt.LocalMounts == nil {
		opt.LocalMounts = map[string]fsutil.FS{}
	}
	for name, tree := range opt.LocalMounts {
		opt.LocalMounts[name] = readFS{tree, stop}
	}
	opt.LocalMounts[sourceName] = readFS{req.Tree.FS(), stop}
	status := make(chan *client.SolveStatus)
	watched := make(chan struct{})
	go func() { defer close(watched); w.run(status) }()
	res, err := b.client.Solve(ctx, def, opt, status)
	<-watched
	w.out.flush()
	if err != nil && context.Cause(ctx) != nil {
		err = context.Cause(ctx)
	}
	return res, err
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

// sourceName ties the graph to the tree that the session offers.
const sourceName = "source"

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
