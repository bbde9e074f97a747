package build

import (
	"bytes"
	"context"
	"crypto/sha256"
	_ "embed"
	"encoding/binary"
	"encoding/json"
	"fmt"
	"io"
	"io/fs"
	"path"
	"regexp"
	"slices"
	"strings"
	"time"

	"github.com/m3o/m3o"
	"github.com/moby/buildkit/client/llb"
	"github.com/tonistiigi/fsutil"
	"github.com/tonistiigi/fsutil/types"
)

// A Generation is Go code to make of .proto files before the go command runs.
// It lies over the source while that compiles; the source stays as it is.
type Generation struct {
	Runs   []PluginRun // independent of each other
	Remove []string    // files of the tree that are to be gone
}

// A PluginRun is one call of a protobuf plugin.
type PluginRun struct {
	Plugin  Plugin
	Out     string // folder of the tree that the names of its answer are relative to
	Request []byte // a CodeGeneratorRequest
}

// A Plugin is a Go program by its package and version. It is built once for
// all apps: from the module proxy, checked against the checksum database, with
// no regard to what an app replaces or vendors.
type Plugin struct {
	Name    string // protoc-gen-go
	Package string // google.golang.org/protobuf/cmd/protoc-gen-go
	Version string // v1.36.12
}

func (p Plugin) dir() string { return p.Name + "@" + p.Version }

// runner is compiled inside the build: see its comment.
//
//go:embed runplugins/main.go
var runner []byte

// The job that runner reads.
type (
	runnerJob struct {
		Source, Result string
		Runs           []runnerRun
		Remove         []string
	}
	runnerRun struct{ Name, Version, Program, Request, Out string }
)

// Where a step's mounts are. The root is read-only and has no folders of its
// own for them, so they are made in what lies over it.
const (
	jobDir       = "/src"
	pluginDir    = "/tmp/plugins"
	runnerDir    = "/tmp/runner"
	generatedDir = "/tmp/generated" // what a step that compiles finds
	jobName      = "protobuf"       // of the session's mount
	stepGenerate = "generate"
	stepRunner   = "compile runner"
	stepPlugin   = "plugin " // and its folder
)

var (
	pluginName    = regexp.MustCompile(`^protoc-gen-[a-z0-9-]+$`)
	pluginPackage = regexp.MustCompile(`^[A-Za-z0-9][\w.~-]*(/[\w.~-]+)+$`)
	pluginVersion = regexp.MustCompile(`^v\d+\.\d+\.\d+[\w.+-]*$`)
)

func (g Generation) check() error {
	for _, r := range g.Runs {
		if !pluginName.MatchString(r.Plugin.Name) || !pluginPackage.MatchString(r.Plugin.Package) || !pluginVersion.MatchString(r.Plugin.Version) || path.Base(r.Plugin.Package) != r.Plugin.Name {
			return m3o.Errorf(m3o.Invalid, "%.100q %.100q is not a plugin to build", r.Plugin.Package, r.Plugin.Version)
		}
		if !fs.ValidPath(r.Out) {
			return fmt.Errorf("build: %q is no folder of the tree", r.Out)
		}
	}
	for _, f := range g.Remove {
		if !fs.ValidPath(f) {
			return fmt.Errorf("build: %q is no file of the tree", f)
		}
	}
	return nil
}

func (g Generation) empty() bool { return len(g.Runs) == 0 && len(g.Remove) == 0 }

// generate adds the steps that make req.Generate. The go command of the step
// that gets opts finds the result if it is called with flags; both are empty
// when there is nothing to generate.
//
// What BuildKit goes by is the plugins' versions and the requests, so a change
// of Go code runs nothing here. The plugins are built side by side. They run
// without network and see nothing but their request.
func (b *Builder) generate(req Request, root llb.State) (opts []llb.RunOption, flags []string) {
	if req.Generate.empty() {
		return nil, nil
	}
	steps := []llb.RunOption{
		llb.Args([]string{runnerDir + "/runplugins", jobDir, pluginDir, "/out"}),
		llb.ReadonlyRootFS(),
		llb.Network(llb.NetModeNone),
		llb.AddMount("/tmp", llb.Scratch(), llb.Tmpfs()),
		llb.AddMount(jobDir, llb.Local(jobName, llb.SharedKeyHint("protobuf-"+req.App), llb.WithCustomName("requests")), llb.Readonly),
		llb.AddMount(runnerDir, b.runner(root), llb.Readonly),
		llb.WithCustomName(stepGenerate),
	}
	done := map[Plugin]bool{}
	for _, r := range req.Generate.Runs {
		if !done[r.Plugin] {
			done[r.Plugin] = true
			steps = append(steps, llb.AddMount(path.Join(pluginDir, r.Plugin.dir()), b.plugin(root, r.Plugin), llb.Readonly))
		}
	}
	made := root.Run(steps...).AddMount("/out", llb.Scratch())
	return []llb.RunOption{llb.AddMount(generatedDir, made, llb.Readonly)}, []string{"-overlay=" + generatedDir + "/overlay.json"}
}

// plugin is a folder with the plugin's program.
func (b *Builder) plugin(root llb.State, p Plugin) llb.State {
	args := []string{"install", "-trimpath", "-ldflags=-s -w", p.Package + "@" + p.Version}
	opts := append(b.goTool(args, "", b.proxySecrets()), llb.Dir("/tmp"), llb.AddEnv("GOBIN", "/out"), llb.WithCustomName(stepPlugin+p.dir()))
	return root.Run(opts...).AddMount("/out", llb.Scratch())
}

func (b *Builder) runner(root llb.State) llb.State {
	src := llb.Scratch().File(llb.Mkfile("/main.go", 0o644, runner), llb.WithCustomName("source of the runner"))
	args := []string{"build", "-trimpath", "-ldflags=-s -w", "-o", "/out/runplugins", jobDir + "/main.go"}
	opts := append(b.goTool(args, "", nil), llb.Dir("/tmp"), llb.AddMount(jobDir, src, llb.Readonly), llb.WithCustomName(stepRunner))
	return root.Run(opts...).AddMount("/out", llb.Scratch())
}

// job is what runner reads, as BuildKit fetches it.
func (g Generation) job() (fsutil.FS, error) {
	j := runnerJob{Source: "/src", Result: generatedDir, Remove: g.Remove}
	files := memFS{}
	for i, r := range g.Runs {
		name := fmt.Sprintf("%d.binpb", i)
		files[name] = r.Request
		j.Runs = append(j.Runs, runnerRun{Name: r.Plugin.Name, Version: r.Plugin.Version, Request: name, Out: r.Out,
			Program: path.Join(r.Plugin.dir(), r.Plugin.Name)})
	}
	b, err := json.Marshal(j)
	if err != nil {
		return nil, fmt.Errorf("encode plugin job: %w", err)
	}
	files["job.json"] = b
	return files, nil
}

// A memFS is a folder of files that are in memory. BuildKit takes a file for
// unchanged when size and time are, so the time is made of the content.
type memFS map[string][]byte

// Walk implements fsutil.FS.
func (m memFS) Walk(_ context.Context, target string, fn fs.WalkDirFunc) error {
	target = strings.Trim(path.Clean("/"+target), "/")
	names := make([]string, 0, len(m))
	for n := range m {
		// A file may be asked for by name, such as one that need not be there.
		if _, below := relative(target, n); below || n == target {
			names = append(names, n)
		}
	}
	slices.Sort(names)
	for _, n := range names {
		st := &types.Stat{Path: n, Mode: 0o644, Size: int64(len(m[n])), ModTime: contentTime(m[n])}
		if err := fn(n, memFile{st}, nil); err != nil {
			return err
		}
	}
	return nil
}

func contentTime(b []byte) int64 {
	sum := sha256.Sum256(b)
	return int64(binary.BigEndian.Uint64(sum[:]) % uint64(epoch.UnixNano()))
}

// Open implements fsutil.FS.
func (m memFS) Open(name string) (io.ReadCloser, error) {
	b, ok := m[strings.Trim(path.Clean("/"+name), "/")]
	if !ok {
		return nil, &fs.PathError{Op: "open", Path: name, Err: fs.ErrNotExist}
	}
	return io.NopCloser(bytes.NewReader(b)), nil
}

type memFile struct{ st *types.Stat }

func (f memFile) Name() string               { return f.st.Path }
func (f memFile) Size() int64                { return f.st.Size }
func (f memFile) Mode() fs.FileMode          { return fs.FileMode(f.st.Mode) }
func (f memFile) Type() fs.FileMode          { return 0 }
func (f memFile) ModTime() time.Time         { return time.Unix(0, f.st.ModTime) }
func (f memFile) IsDir() bool                { return false }
func (f memFile) Info() (fs.FileInfo, error) { return f, nil }
func (f memFile) Sys() any                   { return f.st }
