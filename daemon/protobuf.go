package daemon

import (
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/descriptorpb"

	"github.com/m3o/m3o"
	"github.com/m3o/m3o/buildpacks"
	"github.com/m3o/m3o/buildpacks/build"
	"github.com/m3o/m3o/buildpacks/protobuf"
	"github.com/m3o/m3o/buildpacks/source"
	"github.com/m3o/m3o/internal/atomicfile"
	"github.com/m3o/m3o/router"
)

// allowBreaking is the push option that lets a breaking change through once.
const allowBreaking = "allow-breaking"

// maxDescriptors is what the gateway reads of one app.
const maxDescriptors = 16 << 20

// An interfaces is what the .proto files of a push come to. The zero value is
// that of a tree without any.
type interfaces struct {
	set         []byte // FileDescriptorSet, with comments
	descriptors string // its digest, once it is kept
	policy      string // what the change was held to
	breaks      []string
	generate    build.Generation
}

// compile reads the .proto files of a push: it compiles them, refuses what
// breaks callers of the live release, and finds out which Go code is to be
// generated. All of it before anything is built.
func (d *Daemon) compile(ctx context.Context, src m3o.Source, tree *source.Tree, plan *buildpacks.Plan, out output) (interfaces, error) {
	sources, err := protobuf.FindInWorkspace(tree, plan.Dir, path.Dir(plan.Go.Work), plan.Go.Modules)
	if err == nil && len(sources.Files) == 0 {
		// An API that is gone altogether breaks callers, too.
		var in interfaces
		in.policy, in.breaks, err = d.gate(ctx, src, plan, &protobuf.Result{Set: &descriptorpb.FileDescriptorSet{}}, out)
		return in, err
	}
	var res *protobuf.Result
	if err == nil {
		res, err = protobuf.Compile(ctx, sources)
	}
	if errors.Is(err, protobuf.ErrMissingImport) && (len(sources.Generated) > 0 || plan.Builder != "go") {
		// What was generated elsewhere needs no .proto here.
		out.step("Protobuf")
		out.warn("The .proto files do not compile, so the API is read from the running app and not held to the live one's:")
		for l := range strings.Lines(err.Error()) {
			out.line("%s", strings.TrimSpace(l))
		}
		if h := m3o.HintOf(err); h != "" {
			out.line("%s", h)
		}
		return interfaces{}, nil
	}
	if err != nil {
		return interfaces{}, oneLine(err, out)
	}
	out.step("Protobuf: %s", summary(res))
	for _, n := range firstOf(res.Notes, 10) {
		out.line("%s", n)
	}
	var in interfaces
	if in.set, err = res.Marshal(); err != nil {
		return in, fmt.Errorf("encode descriptors: %w", err)
	}
	if len(in.set) > maxDescriptors {
		out.line("The descriptors are too large to be kept with their comments")
		for _, f := range res.Set.GetFile() {
			f.SourceCodeInfo = nil
		}
		if in.set, err = res.Marshal(); err != nil {
			return in, fmt.Errorf("encode descriptors: %w", err)
		}
	}
	if in.policy, in.breaks, err = d.gate(ctx, src, plan, res, out); err != nil {
		return in, err
	}
	if plan.Builder == "go" {
		if in.generate, err = goCode(res, out); err != nil {
			return in, err
		}
	}
	in.descriptors, err = d.keepDescriptors(in.set)
	return in, err
}

// oneLine shows the faults of an error that has several and leaves one line to
// end the push with.
func oneLine(err error, out output) error {
	faults := strings.Split(err.Error(), "\n")
	if m3o.KindOf(err) != m3o.Invalid || len(faults) == 1 {
		return err
	}
	for _, f := range faults {
		out.warn("%s", f)
	}
	return &m3o.Error{Kind: m3o.Invalid, Msg: "the .proto files do not compile: " + faults[0], Hint: m3o.HintOf(err), Err: err}
}

func summary(res *protobuf.Result) string {
	methods := 0
	for _, s := range res.Services {
		methods += len(s.Methods)
	}
	return fmt.Sprintf("%s, %s, %s", count(len(res.Sources.Files), "file"), count(len(res.Services), "service"), count(methods, "method"))
}

func count(n int, what string) string {
	if n == 1 {
		return "1 " + what
	}
	return fmt.Sprintf("%d %ss", n, what)
}

// firstOf is list, or its first n and a line that says how many more.
func firstOf(list []string, n int) []string {
	if len(list) <= n {
		return list
	}
	return append(slices.Clone(list[:n]), fmt.Sprintf("and %d more", len(list)-n))
}

// gate compares the push's API with the live release's and refuses what breaks
// callers, unless policy or pusher allow it. A live release without
// descriptors, because it was built of no .proto files, is not compared.
func (d *Daemon) gate(ctx context.Context, src m3o.Source, plan *buildpacks.Plan, res *protobuf.Result, out output) (policy string, breaks []string, err error) {
	p, err := protobuf.PolicyOf(plan.Files.Manifest.Protobuf.Breaking)
	if err != nil {
		return "", nil, err
	}
	live, err := d.ledger.Live(ctx, src.App)
	switch {
	case m3o.KindOf(err) == m3o.NotFound:
		return string(p), nil, nil
	case err != nil:
		return "", nil, err
	case live.Descriptors == "":
		return string(p), nil, nil
	}
	old, err := d.readDescriptors(live.Descriptors)
	if err != nil {
		// Better no gate than an app that cannot be deployed any more.
		d.log.Error("read descriptors of the live release", "app", src.App, "release", live.Version, "err", err)
		return string(p), nil, nil
	}
	if added := protobuf.Added(old, res.Set).String(); added != "" {
		out.line("API: %s", added)
	}
	changes := protobuf.Breaking(old, res.Set, p)
	if len(changes) == 0 {
		return string(p), nil, nil
	}
	used := d.calls(ctx, src.App)
	var told []string
	last := ""
	for _, c := range changes {
		if at := res.Sources.Path(c.File); !c.Old || exists(res.Sources.Tree, at) {
			c.File = at
		}
		breaks = append(breaks, c.String())
		told = append(told, c.String())
		if u := usage(used, c.Methods); u != "" && u != last {
			told, last = append(told, "  "+u), u
		}
	}
	what := count(len(changes), "breaking change") + " of the API of " + live.Name()
	if !slices.Contains(src.Options, allowBreaking) {
		for _, l := range firstOf(told, 40) {
			out.warn("%s", l)
		}
		return "", nil, &m3o.Error{Kind: m3o.Invalid, Msg: what + "; nothing was built",
			Hint: "keep what callers use and add beside it, or push with -o " + allowBreaking}
	}
	out.warn("%s, allowed by -o %s:", what, allowBreaking)
	for _, l := range firstOf(told, 40) {
		out.line("%s", l)
	}
	return string(p), firstOf(breaks, 100), nil
}

// requests counts an app's requests; the router does.
type requests interface {
	Requests(ctx context.Context, app string, window time.Duration) (router.Stats, error)
}

var _ requests = router.Client{}

// calls are the app's calls since the router started. They only explain, so a
// router that does not answer is no fault.
func (d *Daemon) calls(ctx context.Context, app string) []router.Series {
	ctx, cancel := context.WithTimeout(ctx, 2*time.Second)
	defer cancel()
	st, err := requests(d.router).Requests(ctx, app, 0)
	if err != nil {
		d.log.Debug("ask who called", "app", app, "err", err)
	}
	return st.Series
}

// usage says who made the calls of methods, "" when nobody did.
func usage(calls []router.Series, methods []string) string {
	by := map[string]int64{}
	var total int64
	for _, c := range calls {
		if slices.Contains(methods, c.RPC) {
			by[cmp.Or(c.Caller, "unknown callers")] += c.Count
			total += c.Count
		}
	}
	if total == 0 {
		return ""
	}
	names := slices.SortedFunc(maps.Keys(by), func(a, b string) int { return cmp.Or(cmp.Compare(by[b], by[a]), cmp.Compare(a, b)) })
	var who []string
	for _, n := range names {
		who = append(who, fmt.Sprintf("%s %d", n, by[n]))
	}
	return fmt.Sprintf("used lately by %s: %s", count(int(total), "call"), strings.Join(firstOf(who, 5), ", "))
}

func exists(tree fs.FS, name string) bool {
	if tree == nil {
		return false
	}
	_, err := fs.Stat(tree, name)
	return err == nil
}

// goCode is the Go code to generate.
func goCode(res *protobuf.Result, out output) (build.Generation, error) {
	g, err := protobuf.GoPlan(res)
	if err != nil {
		return build.Generation{}, err
	}
	for _, n := range firstOf(g.Notes, 10) {
		out.line("%s", n)
	}
	var stale []string
	for _, s := range g.Stale {
		stale = append(stale, s.String())
	}
	for _, s := range firstOf(stale, 20) {
		out.line("%s", s)
	}
	made := build.Generation{Remove: g.Remove}
	for _, run := range g.Runs {
		b, err := proto.MarshalOptions{Deterministic: true}.Marshal(protobuf.Request(res, run))
		if err != nil {
			return made, fmt.Errorf("encode request of %s: %w", run.Plugin.Name, err)
		}
		made.Runs = append(made.Runs, build.PluginRun{Plugin: build.Plugin(run.Plugin), Out: run.Out, Request: b})
	}
	return made, nil
}

// describe puts what a release has of its API into rel.
func (in interfaces) describe(rel *m3o.Release) {
	rel.Descriptors, rel.BreakingPolicy, rel.Breaking = in.descriptors, in.policy, in.breaks
}

// descriptorsType is the artifact type and media type of a FileDescriptorSet
// that refers to an image.
const descriptorsType = "application/vnd.m3o.descriptors.v1+protobuf"

// attach makes the descriptors refer to the image, so that they go where it goes.
func (d *Daemon) attach(ctx context.Context, image string, in interfaces) error {
	if in.descriptors == "" {
		return nil
	}
	return d.builder.Attach(ctx, image, build.Attachment{Type: descriptorsType, MediaType: descriptorsType, Data: in.set})
}

// keepDescriptors writes a FileDescriptorSet under its digest.
func (d *Daemon) keepDescriptors(b []byte) (digest string, err error) {
	sum := sha256.Sum256(b)
	digest = "sha256:" + hex.EncodeToString(sum[:])
	file := d.descriptorsFile(digest)
	now := time.Now() // young again: see pruneDescriptors
	if os.Chtimes(file, now, now) == nil {
		return digest, nil
	}
	if err := atomicfile.Write(file, b, 0o600); err != nil {
		return "", fmt.Errorf("keep descriptors: %w", err)
	}
	return digest, nil
}

func (d *Daemon) descriptorsFile(digest string) string {
	return d.cfg.path("descriptors", strings.TrimPrefix(digest, "sha256:")+".binpb")
}

func (d *Daemon) readDescriptors(digest string) (*descriptorpb.FileDescriptorSet, error) {
	b, err := os.ReadFile(d.descriptorsFile(digest))
	if err != nil {
		return nil, err
	}
	set := &descriptorpb.FileDescriptorSet{}
	if err := proto.Unmarshal(b, set); err != nil {
		return nil, fmt.Errorf("decode %s: %w", digest, err)
	}
	return set, nil
}

// descriptorsGrace spares what was written lately: the release that it is for
// may not be live yet.
const descriptorsGrace = time.Hour

// pruneDescriptors removes what is known of APIs that neither a kept release
// has nor the router is led by: a canary has not been live yet.
func (d *Daemon) pruneDescriptors(kept []m3o.Release, routed []string) error {
	traits, used := map[string]bool{}, map[string]bool{}
	for _, file := range routed {
		used[file] = true
	}
	for _, rel := range kept {
		file := d.traitsFile(rel, ".json")
		traits[file] = true
		if rel.Descriptors != "" {
			used[d.descriptorsFile(rel.Descriptors)] = true
		}
		if t, ok := d.knownTraits(rel); ok {
			used[t.Descriptors] = true
		}
	}
	before := time.Now().Add(-descriptorsGrace)
	return errors.Join(removeOthers(d.cfg.path("traits"), traits, before), removeOthers(d.cfg.path("descriptors"), used, before))
}

// removeOthers removes the files of a directory that keep does not name and
// that were written before a time.
func removeOthers(dir string, keep map[string]bool, before time.Time) error {
	des, err := os.ReadDir(dir)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	for _, de := range des {
		p := filepath.Join(dir, de.Name())
		fi, err := de.Info()
		if err != nil || keep[p] || !fi.Mode().IsRegular() || fi.ModTime().After(before) {
			continue // an error: it is gone already
		}
		if err := os.Remove(p); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
	}
	return nil
}
