package build

import (
	"archive/zip"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	goversion "go/version"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	goruntime "runtime"
	"slices"
	"strings"
	"sync"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/plugins/content/local"
	"github.com/m3o/m3o"
	"github.com/m3o/m3o/internal/atomicfile"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/mod/sumdb/dirhash"
)

// The module that holds Go toolchains, and where one goes in a layer.
const (
	toolchainModule = "golang.org/toolchain"
	goRoot          = "usr/local/go"
	maxToolchainZip = 1 << 30
	maxToolchain    = 4 << 30 // unpacked
)

// A toolchain is one Go release as an OCI layer in the toolchain store.
type toolchain struct {
	Version  string        // "go1.26.8"
	Layer    v1.Descriptor // usr/local/go
	ZoneInfo v1.Descriptor // lib/time/zoneinfo.zip, for the images
}

// toolchains makes and keeps them under dir. Each is made once.
type toolchains struct {
	dir     string
	store   content.Store
	proxy   *goProxy // nil: only what the host has
	sums    func() (*sumDB, error)
	hostGo  string // GOROOT of the host's go, "" when none
	hostVer string // its version

	mu     sync.Mutex               // guards making
	making map[string]chan struct{} // by version; closed when that is made or given up
}

func openToolchains(ctx context.Context, dir string, cfg Config) (*toolchains, error) {
	if err := os.MkdirAll(filepath.Join(dir, "made"), 0o755); err != nil {
		return nil, fmt.Errorf("open toolchains: %w", err)
	}
	cs, err := local.NewStore(dir)
	if err != nil {
		return nil, fmt.Errorf("open toolchains: %w", err)
	}
	t := &toolchains{dir: dir, store: cs}
	t.hostGo, t.hostVer = hostGo(ctx)
	if gp := goEnv(cfg.GoProxy, "GOPROXY"); gp != "" {
		if t.proxy, err = parseGoProxy(gp); err != nil {
			return nil, err
		}
	}
	t.sums = func() (*sumDB, error) {
		private := strings.Trim(goEnv(cfg.GoPrivate, "GOPRIVATE")+","+os.Getenv("GONOSUMDB"), ",")
		return newSumDB(goEnv(cfg.GoSumDB, "GOSUMDB"), private, filepath.Join(dir, "sumdb"), t.proxy, toolchainModule)
	}
	return t, nil
}

// hostGo finds a Go release on the machine that is laid out as the official
// ones are; a distribution's, spread over the file system, is not used.
func hostGo(ctx context.Context) (root, version string) {
	bin, err := exec.LookPath("go")
	if err != nil {
		return "", ""
	}
	cmd := exec.CommandContext(ctx, bin, "env", "GOROOT")
	cmd.Env = append(os.Environ(), "GOTOOLCHAIN=local", "GOWORK=off")
	cmd.Dir = "/"
	out, err := cmd.Output()
	if err != nil {
		return "", ""
	}
	root = strings.TrimSpace(string(out))
	b, err := os.ReadFile(filepath.Join(root, "VERSION"))
	if err != nil {
		return "", ""
	}
	version, _, _ = strings.Cut(string(b), "\n")
	version = strings.TrimSpace(version)
	if !goversion.IsValid(version) || strings.ContainsAny(version, " -") {
		return "", "" // a development or a vendor's version has no exact twin
	}
	for _, p := range []string{"bin/go", "pkg/tool", "src/runtime", "lib/time/zoneinfo.zip"} {
		if fi, err := os.Lstat(filepath.Join(root, p)); err != nil || fi.Mode()&fs.ModeSymlink != 0 {
			return "", ""
		}
	}
	return root, version
}

// get returns a toolchain that is want or newer, making it if need be.
//
// The rule is the go command's own with GOTOOLCHAIN=auto, with "local" read as
// "known here": the newest release known on this machine (made before, or the
// host's own) is used if it is at least want. Otherwise the module proxy's
// list decides: the newest patch of want's own Go 1.N, else the newest release
// at all that is at least want. Release candidates count only if want is one.
func (t *toolchains) get(ctx context.Context, want string, say func(format string, args ...any)) (toolchain, error) {
	made := t.made()
	known := made
	if t.hostVer != "" {
		known = append(slices.Clone(made), t.hostVer)
	}
	version := newest(known, want)
	if version == "" {
		list, err := t.listed(ctx)
		if err != nil {
			return toolchain{}, &m3o.Error{Kind: m3o.Unavailable, Msg: fmt.Sprintf("no Go toolchain %s or newer here, and the module proxy's list cannot be read", want),
				Hint: "set GOPROXY for the daemon, or install that Go release on the host", Err: err}
		}
		sameMinor := slices.DeleteFunc(slices.Clone(list), func(v string) bool { return goversion.Lang(v) != goversion.Lang(want) })
		if version = cmp.Or(newest(sameMinor, want), newest(list, want)); version == "" {
			return toolchain{}, &m3o.Error{Kind: m3o.Invalid, Msg: fmt.Sprintf("go.mod asks for %s, and the newest Go release is %s", want, newest(list, "go1.1")),
				Hint: "lower the go line in go.mod"}
		}
	}
	return t.exactly(ctx, version, say)
}

// exactly returns that very toolchain, making it if need be. One that is being
// made already is waited for; those that are here never wait for another.
func (t *toolchains) exactly(ctx context.Context, version string, say func(format string, args ...any)) (toolchain, error) {
	done, err := t.enter(ctx, version)
	if err != nil {
		return toolchain{}, err
	}
	defer done()
	if slices.Contains(t.made(), version) {
		if tc, err := t.load(ctx, version); err == nil {
			return tc, nil
		}
	}
	if version == t.hostVer {
		tc, err := t.fromGoRoot(ctx)
		if err == nil || t.proxy == nil {
			return tc, err
		}
	}
	if t.proxy == nil {
		return toolchain{}, &m3o.Error{Kind: m3o.Unavailable, Msg: fmt.Sprintf("%s is not here any more and GOPROXY is not set", version), Hint: "set GOPROXY for the daemon"}
	}
	say("Fetching %s", version)
	return t.fetch(ctx, version)
}

// enter waits until nobody else makes a version. To fetch and pack one takes
// minutes, which builds that need another must not be made to wait for.
func (t *toolchains) enter(ctx context.Context, version string) (done func(), err error) {
	for {
		t.mu.Lock()
		other := t.making[version]
		if other == nil {
			if t.making == nil {
				t.making = map[string]chan struct{}{}
			}
			mine := make(chan struct{})
			t.making[version] = mine
			t.mu.Unlock()
			return func() {
				t.mu.Lock()
				defer t.mu.Unlock()
				delete(t.making, version)
				close(mine)
			}, nil
		}
		t.mu.Unlock()
		select {
		case <-other:
		case <-ctx.Done():
			return nil, context.Cause(ctx)
		}
	}
}

// newest is the newest of versions that is at least want, "" when none is.
func newest(versions []string, want string) string {
	best := ""
	for _, v := range versions {
		if goversion.Compare(v, want) < 0 || prerelease(v) && !prerelease(want) {
			continue
		}
		if best == "" || goversion.Compare(v, best) > 0 {
			best = v
		}
	}
	return best
}

func prerelease(v string) bool { return strings.Contains(v, "rc") || strings.Contains(v, "beta") }

func (t *toolchains) record(version string) string {
	return filepath.Join(t.dir, "made", version+"."+goruntime.GOARCH+".json")
}

func (t *toolchains) made() []string {
	des, _ := os.ReadDir(filepath.Join(t.dir, "made"))
	var out []string
	for _, de := range des {
		if v, ok := strings.CutSuffix(de.Name(), "."+goruntime.GOARCH+".json"); ok && goversion.IsValid(v) {
			out = append(out, v)
		}
	}
	return out
}

// load reads a record and checks that what it names is there.
func (t *toolchains) load(ctx context.Context, version string) (toolchain, error) {
	var tc toolchain
	b, err := os.ReadFile(t.record(version))
	if err == nil {
		err = json.Unmarshal(b, &tc)
	}
	if err != nil {
		return tc, fmt.Errorf("read toolchain record: %w", err)
	}
	for _, d := range []v1.Descriptor{tc.Layer, tc.ZoneInfo} {
		if _, err := t.store.Info(ctx, d.Digest); err != nil {
			return tc, fmt.Errorf("read toolchain %s: %w", version, err)
		}
	}
	return tc, nil
}

func (t *toolchains) listed(ctx context.Context) ([]string, error) {
	if t.proxy == nil {
		return nil, errors.New("GOPROXY is not set")
	}
	b, err := t.proxy.read(ctx, toolchainModule+"/@v/list", 1<<20)
	if err != nil {
		return nil, err
	}
	return parseToolchainList(b, goruntime.GOARCH), nil
}

// parseToolchainList picks the Go versions for an architecture from lines
// like v0.0.1-go1.26.8.linux-amd64.
func parseToolchainList(b []byte, arch string) []string {
	var out []string
	for line := range strings.Lines(string(b)) {
		v, ok := strings.CutPrefix(strings.TrimSpace(line), "v0.0.1-")
		if !ok {
			continue
		}
		if v, ok = strings.CutSuffix(v, ".linux-"+arch); ok && goversion.IsValid(v) && !strings.Contains(v, "-") {
			out = append(out, v)
		}
	}
	return out
}

// fetch downloads the toolchain module, checks it and makes it a layer.
func (t *toolchains) fetch(ctx context.Context, version string) (toolchain, error) {
	fail := func(err error) (toolchain, error) {
		if _, ok := errors.AsType[*m3o.Error](err); ok {
			return toolchain{}, err
		}
		return toolchain{}, &m3o.Error{Kind: m3o.Unavailable, Msg: fmt.Sprintf("cannot fetch %s: %v", version, err), Hint: "push again", Err: err}
	}
	mv := "v0.0.1-" + version + ".linux-" + goruntime.GOARCH
	r, err := t.proxy.open(ctx, toolchainModule+"/@v/"+mv+".zip")
	if err != nil {
		return fail(err)
	}
	defer r.Close() //nolint:errcheck // read only
	f, err := os.CreateTemp(t.dir, "fetch-*.zip")
	if err != nil {
		return fail(err)
	}
	defer os.Remove(f.Name()) //nolint:errcheck // swept at the next Open otherwise
	defer f.Close()           //nolint:errcheck // written and read back already
	n, err := io.Copy(f, io.LimitReader(r, maxToolchainZip+1))
	if err == nil && n > maxToolchainZip {
		err = errors.New("it is larger than 1 GB")
	}
	if err != nil {
		return fail(err)
	}
	sums, err := t.sums()
	if err != nil {
		return fail(err)
	}
	if sums != nil {
		h, err := dirhash.HashZip(f.Name(), dirhash.Hash1)
		if err != nil {
			return fail(fmt.Errorf("hash: %w", err))
		}
		if err := sums.verify(ctx, toolchainModule, mv, h); err != nil {
			return fail(err)
		}
	}
	zr, err := zip.NewReader(f, n)
	if err != nil {
		return fail(err)
	}
	files, err := zipFiles(zr, toolchainModule+"@"+mv+"/")
	if err != nil {
		return fail(err)
	}
	tc, err := t.pack(ctx, version, files)
	if err != nil {
		return fail(err)
	}
	return tc, nil
}

// A packFile is a file of a toolchain, by its path below GOROOT.
type packFile struct {
	name string
	exec bool
	size int64
	open func() (io.ReadCloser, error)
}

// zipFiles lists a toolchain module as the go command would unpack it: the
// zip has no modes, so commands and tools are made executable, and go.mod
// files go by the name _go.mod because a module cannot hold another.
func zipFiles(zr *zip.Reader, prefix string) ([]packFile, error) {
	var out []packFile
	var total uint64
	for _, zf := range zr.File {
		name, ok := strings.CutPrefix(zf.Name, prefix)
		if !ok || !fs.ValidPath(name) || name == "." || strings.ContainsAny(name, "\\\x00") || zf.Mode()&fs.ModeType != 0 {
			return nil, fmt.Errorf("the toolchain module holds %q", zf.Name)
		}
		if total += zf.UncompressedSize64; total > maxToolchain || zf.UncompressedSize64 > maxToolchain {
			return nil, errors.New("the toolchain module unpacks to more than 4 GB")
		}
		if path.Base(name) == "_go.mod" {
			name = path.Join(path.Dir(name), "go.mod")
		} else if name == "go.mod" {
			continue // the module's own, not part of the toolchain
		}
		dir, base := path.Split(name)
		ex, _ := path.Match("go_?*_?*_exec", base)
		ex = strings.HasPrefix(dir, "bin/") || strings.HasPrefix(dir, "pkg/tool/") || ex && strings.HasPrefix(dir, "lib/")
		out = append(out, packFile{name: name, exec: ex, size: int64(zf.UncompressedSize64), open: zf.Open})
	}
	return out, nil
}

// fromGoRoot packs the host's own Go release.
func (t *toolchains) fromGoRoot(ctx context.Context) (toolchain, error) {
	root, err := os.OpenRoot(t.hostGo)
	if err != nil {
		return toolchain{}, fmt.Errorf("read GOROOT: %w", err)
	}
	defer root.Close() //nolint:errcheck // read only
	var files []packFile
	for _, top := range []string{"VERSION", "go.env", "bin", "lib", "pkg/include", "pkg/tool", "src"} {
		err := fs.WalkDir(root.FS(), top, func(p string, de fs.DirEntry, err error) error {
			switch {
			case errors.Is(err, fs.ErrNotExist) && p == top:
				return nil
			case err != nil:
				return err
			case de.IsDir() && de.Name() == "testdata":
				return fs.SkipDir
			case !de.Type().IsRegular():
				return nil
			}
			fi, err := de.Info()
			if err != nil {
				return err
			}
			files = append(files, packFile{name: p, exec: fi.Mode()&0o111 != 0, size: fi.Size(), open: func() (io.ReadCloser, error) { return root.Open(p) }})
			return nil
		})
		if err != nil {
			return toolchain{}, fmt.Errorf("read GOROOT: %w", err)
		}
	}
	return t.pack(ctx, t.hostVer, files)
}

// pack writes the layer and then the record, which makes it known.
func (t *toolchains) pack(ctx context.Context, version string, files []packFile) (toolchain, error) {
	slices.SortFunc(files, func(a, b packFile) int { return cmp.Compare(a.name, b.name) })
	tc := toolchain{Version: version}
	l, err := newLayer(ctx, t.store, "toolchain-"+version)
	if err != nil {
		return tc, err
	}
	defer l.close()
	for _, f := range files {
		if err := ctx.Err(); err != nil {
			return tc, err
		}
		if err := t.packOne(ctx, l, f, &tc); err != nil {
			return tc, fmt.Errorf("pack %s: %w", f.name, err)
		}
	}
	if tc.ZoneInfo.Digest == "" {
		return tc, fmt.Errorf("the toolchain %s has no lib/time/zoneinfo.zip", version)
	}
	if tc.Layer, err = l.commit(ctx); err != nil {
		return tc, err
	}
	b, err := json.Marshal(tc)
	if err != nil {
		return tc, err
	}
	return tc, atomicfile.Write(t.record(version), b, 0o644)
}

func (t *toolchains) packOne(ctx context.Context, l *layer, f packFile, tc *toolchain) error {
	name := path.Join(goRoot, f.name)
	dir := ""
	for part := range strings.SplitSeq(path.Dir(name), "/") {
		dir = path.Join(dir, part)
		if err := l.dir(dir, 0o755); err != nil {
			return err
		}
	}
	r, err := f.open()
	if err != nil {
		return err
	}
	defer r.Close() //nolint:errcheck // read only
	if f.name == "lib/time/zoneinfo.zip" {
		b, err := readLimited(r, 16<<20)
		if err != nil {
			return err
		}
		if tc.ZoneInfo, err = putBlob(ctx, t.store, "application/zip", b); err != nil {
			return err
		}
		return l.file(name, 0o644, int64(len(b)), strings.NewReader(string(b)))
	}
	mode := int64(0o644)
	if f.exec {
		mode = 0o755
	}
	return l.file(name, mode, f.size, r)
}
