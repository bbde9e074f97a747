package build

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"path"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/m3o/m3o"
	"github.com/moby/buildkit/client"
	gatewaypb "github.com/moby/buildkit/frontend/gateway/pb"
	"github.com/moby/buildkit/session"
	"github.com/moby/buildkit/session/secrets/secretsprovider"
	"github.com/moby/buildkit/solver/errdefs"
	"github.com/opencontainers/go-digest"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/tonistiigi/fsutil"
	"github.com/tonistiigi/fsutil/types"
)

// buildDockerfile builds by the Dockerfile frontend that is linked into
// buildkitd: no frontend image is fetched, whatever a "# syntax=" line asks
// for. Images that FROM lines name come from their registries, or from the OCI
// layouts of the tree that the plan names for them.
func (b *Builder) buildDockerfile(ctx context.Context, req Request, out *output) (Result, error) {
	var res Result
	d := &req.Plan.Docker
	out.step("Dockerfile detected")
	for _, n := range req.Plan.Notes {
		out.more("%s", n)
	}
	mark := time.Now()
	gen, err := b.awaitStart(ctx)
	if err != nil {
		return res, err
	}
	dir := req.Plan.Dir
	attrs := map[string]string{
		"filename": strings.TrimPrefix(d.File, strings.TrimSuffix(dir, "/")+"/"),
		"target":   d.Target,
		// Says that a frontend was chosen already: a "# syntax=" line fetches none.
		"cmdline":                        "m3o.local/dockerfile",
		"build-arg:SOURCE_DATE_EPOCH":    strconv.FormatInt(epoch.Unix(), 10),
		"label:" + v1.AnnotationRevision: req.Commit,
	}
	for k, v := range d.Args {
		attrs["build-arg:"+k] = v
	}
	if req.NoCache {
		attrs["no-cache"] = ""
	}
	stores := map[string]content.Store{}
	for i, name := range slices.Sorted(maps.Keys(d.Images)) {
		id := fmt.Sprintf("m3o.local/layout-%d", i)
		m, cs, err := b.layoutInTree(ctx, req, d.Images[name])
		if err != nil {
			return res, err
		}
		stores[id] = cs
		attrs["context:"+familiar(name)] = "oci-layout://" + id + "@" + m.String()
	}
	res.Steps = append(res.Steps, Step{Name: "prepare", Took: time.Since(mark)})
	secrets := map[string][]byte{}
	for k, s := range req.Secrets {
		secrets[k] = []byte(s.Reveal())
	}
	logins, err := parseRegistries(req.Registries)
	if err != nil {
		return res, err
	}
	tree := subFS{req.Tree.FS(), dir}
	w := newWatch(out)
	w.all = true
	out.step("Building %s", d.File)
	var made *client.SolveResponse
	opt := client.SolveOpt{
		Frontend: "dockerfile.v0", FrontendAttrs: attrs,
		LocalMounts: map[string]fsutil.FS{"context": tree, "dockerfile": tree},
		SharedKey:   "app-" + req.App,
		OCIStores:   stores,
		Session:     []session.Attachable{secretsprovider.FromMap(secrets), logins},
		Exports: []client.ExportEntry{{Type: client.ExporterOCI, OutputStore: b.images, Attrs: map[string]string{
			"tar": "false", "oci-mediatypes": "true", "compression": "uncompressed", "force-compression": "true", "rewrite-timestamp": "true"}}},
	}
	made, err = b.solve(ctx, req, nil, opt, w)
	res.Steps = append(res.Steps, w.steps()...)
	if err != nil {
		return res, b.explainDockerfile(ctx, gen, err, w, d.File)
	}
	mark = time.Now()
	if err := b.adopt(ctx, req, made.ExporterResponse["containerimage.digest"], &res); err != nil {
		return res, disk(fmt.Errorf("write image: %w", err))
	}
	res.Steps = append(res.Steps, Step{Name: "image", Took: time.Since(mark)})
	return res, nil
}

// adopt makes an image of ours out of one whose blobs are in the store: the
// same layers, and a config that has what the plan puts into the environment.
func (b *Builder) adopt(ctx context.Context, req Request, id string, res *Result) error {
	m, img, err := b.readImage(ctx, digest.Digest(id))
	if err != nil {
		return err
	}
	// Prune does not run while an image is made; see its caller.
	b.store.Lock()
	defer b.store.Unlock()
	for _, k := range slices.Sorted(maps.Keys(req.Plan.Env)) {
		if !slices.ContainsFunc(img.Config.Env, func(e string) bool { return strings.HasPrefix(e, k+"=") }) {
			img.Config.Env = append(img.Config.Env, k+"="+req.Plan.Env[k])
		}
	}
	c, err := putJSON(ctx, b.images, v1.MediaTypeImageConfig, img)
	if err != nil {
		return err
	}
	m.MediaType, m.Config, m.Annotations = v1.MediaTypeImageManifest, c, annotations(req)
	for i := range m.Layers {
		m.Layers[i].Annotations = nil
		res.Size += m.Layers[i].Size
	}
	desc, err := putJSON(ctx, b.images, v1.MediaTypeImageManifest, m)
	if err != nil {
		return err
	}
	res.Image = desc.Digest.String()
	if res.Port, err = onlyPort(img.Config); err != nil {
		return err
	}
	return b.enlist(desc, req.App)
}

// onlyPort is the one TCP port an image says it listens on, 0 if it says none.
func onlyPort(c v1.ImageConfig) (int, error) {
	var ports []int
	for p := range c.ExposedPorts {
		num, proto, _ := strings.Cut(p, "/")
		if n, err := strconv.Atoi(num); err == nil && n > 0 && n < 1<<16 && (proto == "" || proto == "tcp") {
			ports = append(ports, n)
		}
	}
	if len(ports) != 1 {
		return 0, nil
	}
	return ports[0], nil
}

// refusedPull is how a registry, or the token service before it, says no, or
// that it knows nobody of that name.
var refusedPull = regexp.MustCompile(`401 Unauthorized|403 Forbidden|authorization failed|pull access denied|insufficient_scope|failed to fetch (?:oauth|anonymous) token: (?:unauthorized|denied|forbidden)`)

var dockerfileLine = regexp.MustCompile(`(?:dockerfile|Dockerfile) parse error on line ([0-9]+): (.*)`)

// explainDockerfile is explain for a Dockerfile: what is wrong with it is
// said with its line.
func (b *Builder) explainDockerfile(ctx context.Context, gen int, err error, w *watch, file string) error {
	if _, exited := errors.AsType[*gatewaypb.ExitError](err); exited || ctx.Err() != nil || b.diedSince(gen) {
		e := b.explain(ctx, gen, err, nil, w)
		if m, ok := errors.AsType[*m3o.Error](e); ok && m.Kind == m3o.Invalid {
			m.Msg = at(file, err) + m.Msg
		}
		return e
	}
	msg := err.Error()
	hint := "fix it, commit and push again"
	switch {
	case strings.Contains(msg, noSpace):
		return diskFull(err)
	case dockerfileLine.MatchString(msg):
		p := dockerfileLine.FindStringSubmatch(msg)
		return &m3o.Error{Kind: m3o.Invalid, Msg: file + ":" + p[1] + ": " + p[2], Hint: hint, Err: err}
	case refusedPull.MatchString(msg):
		return &m3o.Error{Kind: m3o.Invalid, Msg: at(file, err) + "the registry does not let an image of a FROM line be read: " + lastPart(msg),
			Hint: "set its password: m3o config:set " + RegistryVar + "=- --secret, with what docker login writes to config.json", Err: err}
	case strings.Contains(msg, "failed to resolve source metadata"), strings.Contains(msg, "dial tcp"), strings.Contains(msg, "i/o timeout"):
		return &m3o.Error{Kind: m3o.Unavailable, Msg: at(file, err) + "an image of a FROM line could not be fetched: " + lastPart(msg),
			Hint: "check its name and that this machine reaches its registry, use FROM scratch, or put it into the repository as an OCI layout: build.images in m3o.yaml", Err: err}
	}
	if i := strings.Index(msg, "failed to solve: "); i >= 0 {
		msg = msg[i+len("failed to solve: "):]
	}
	if strings.HasPrefix(msg, "failed to compute cache key: ") {
		msg = lastPart(msg) // before it stand BuildKit's own names
		if i := strings.Index(msg, `"`); i > 0 {
			msg = msg[i:]
		}
	}
	return &m3o.Error{Kind: m3o.Invalid, Msg: at(file, err) + plain(msg), Hint: hint, Err: err}
}

func lastPart(msg string) string {
	parts := strings.Split(msg, ": ")
	return plain(strings.Join(parts[max(0, len(parts)-2):], ": "))
}

// at is "Dockerfile:3: " if the error tells its place.
func at(file string, err error) string {
	for _, s := range errdefs.Sources(err) {
		if len(s.Ranges) > 0 {
			return fmt.Sprintf("%s:%d: ", file, s.Ranges[0].Start.Line)
		}
	}
	return file + ": "
}

// familiar is the name of an image as the frontend looks it up.
func familiar(name string) string {
	if first, _, ok := strings.Cut(name, "/"); !ok || !strings.ContainsAny(first, ".:") && first != "localhost" {
		if !ok {
			name = "library/" + name
		}
		name = "docker.io/" + name
	}
	if !strings.Contains(path.Base(name), ":") && !strings.Contains(name, "@") {
		name += ":latest"
	}
	return name
}

// subFS is a folder of a tree as a tree.
type subFS struct {
	fsutil.FS
	dir string
}

func (s subFS) Walk(ctx context.Context, target string, fn fs.WalkDirFunc) error {
	if s.dir == "." || s.dir == "" {
		return s.FS.Walk(ctx, target, fn)
	}
	return s.FS.Walk(ctx, path.Join(s.dir, target), func(p string, e fs.DirEntry, err error) error {
		rel, below := relative(s.dir, p)
		if !below {
			return nil // the folder itself
		}
		if err != nil {
			return fn(rel, e, err)
		}
		return fn(rel, subEntry{e, rel}, nil)
	})
}

func (s subFS) Open(name string) (io.ReadCloser, error) { return s.FS.Open(path.Join(s.dir, name)) }

type subEntry struct {
	fs.DirEntry
	rel string
}

func (e subEntry) Info() (fs.FileInfo, error) {
	fi, err := e.DirEntry.Info()
	if err != nil {
		return nil, err
	}
	st, ok := fi.Sys().(*types.Stat)
	if !ok {
		return fi, nil
	}
	moved := st.CloneVT()
	moved.Path = e.rel
	return subInfo{fi, moved}, nil
}

type subInfo struct {
	fs.FileInfo
	stat *types.Stat
}

func (i subInfo) Sys() any { return i.stat }
