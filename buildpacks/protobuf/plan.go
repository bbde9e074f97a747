package protobuf

import (
	"cmp"
	"fmt"
	"path"
	"slices"
	"strings"

	"github.com/bufbuild/protocompile/options"
	"golang.org/x/mod/semver"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/descriptorpb"
	"google.golang.org/protobuf/types/pluginpb"
)

// Generate is what brings the generated Go code of a tree up to date. The zero
// Generate: nothing to do.
type Generate struct {
	Runs   []Run    // in order; each Plugin is to be built once
	Remove []string // generated files of the tree that have no source any more
	Stale  []Stale  // why
	Notes  []string // lines for the pusher
}

// A Run is one call of a plugin.
type Run struct {
	Plugin    Plugin
	Out       string   // folder of the tree that the names in the response are relative to
	Parameter string   // what protoc calls --x_opt
	Files     []string // names of the .proto files to generate for
}

// A Plugin is a program to build from a Go module, as "go install
// PACKAGE@VERSION" would.
type Plugin struct {
	Name    string // protoc-gen-go
	Package string // google.golang.org/protobuf/cmd/protoc-gen-go
	Version string // v1.36.12
}

// grpcPlugin is the module of protoc-gen-go-grpc. It has versions of its own,
// apart from grpc-go's.
const grpcPlugin = "google.golang.org/grpc/cmd/protoc-gen-go-grpc"

// grpcPlugins gives the plugin's version for the oldest grpc-go that its code
// compiles with, newest first.
var grpcPlugins = []struct{ grpc, plugin string }{
	{"v1.64.0", "v1.6.2"}, // SupportPackageIsVersion9
	{"v1.32.0", "v1.3.0"}, // SupportPackageIsVersion7
}

// GoPlan says what has to be generated for the Go module, or the modules of the
// workspace, and by which plugins:
//
//   - what exists and is out of date;
//   - what is missing and the modules' own code imports, directly or through
//     other generated code. Service code is made by protoc-gen-go-grpc when that
//     code names a client or server of the service, and by protoc-gen-connect-go
//     when it imports the package that plugin makes.
//
// Where buf.gen.yaml names one of the three plugins, locally or hosted, its out
// and opt count, managed mode included. Else a file goes where code for it lies
// already, where go_package says if that is in one of the modules, or beside the
// .proto.
//
// The versions are those go.mod requires of google.golang.org/protobuf and
// connectrpc.com/connect; in a workspace, where the go command takes the newest
// that any module requires, so does this. protoc-gen-go-grpc has versions of its own: the one
// go.mod names as a tool, else the newest whose code the required grpc-go
// compiles. A module that is not required is an error of kind Invalid with the
// command to add it.
func GoPlan(r *Result) (Generate, error) {
	mods, err := r.Sources.goMods()
	if err != nil {
		return Generate{}, err
	}
	if len(mods) == 0 {
		return Generate{}, invalid("run go mod init", "there is no go.mod in %s", r.Sources.Dir)
	}
	if len(r.Sources.Files) == 0 {
		return Generate{}, nil
	}
	l, err := newLayout(r, mods)
	if err != nil {
		return Generate{}, err
	}
	if err := l.check(); err != nil {
		return Generate{}, err
	}
	g := Generate{Stale: l.stale}
	runs := map[string]*Run{}
	for _, s := range l.stale {
		if s.Gone {
			g.Remove = append(g.Remove, s.Path)
			continue
		}
		run, err := l.run(s)
		if err != nil {
			return Generate{}, err
		}
		name := l.nameOf(s.Proto)
		key := run.Plugin.Name + "\x00" + run.Out + "\x00" + run.Parameter
		if have := runs[key]; have != nil {
			have.Files = append(have.Files, name)
			continue
		}
		run.Files = []string{name}
		runs[key] = &run
	}
	for _, run := range runs {
		run.Files = sortedSet(run.Files)
		g.Runs = append(g.Runs, *run)
	}
	order := []string{genGo, genGRPC, genConnect}
	slices.SortFunc(g.Runs, func(a, b Run) int {
		return cmp.Or(cmp.Compare(slices.Index(order, a.Plugin.Name), slices.Index(order, b.Plugin.Name)), cmp.Compare(a.Out, b.Out), cmp.Compare(a.Parameter, b.Parameter))
	})
	g.Notes = l.notes
	return g, nil
}

func (l *layout) nameOf(p string) string {
	for _, f := range l.files {
		if f.path == p {
			return f.name
		}
	}
	return p
}

// run is the call that writes one file.
func (l *layout) run(s Stale) (Run, error) {
	p, err := l.plugin(s)
	if err != nil {
		return Run{}, err
	}
	f := l.byName[l.nameOf(s.Proto)]
	if strings.ContainsAny(f.name, ",=;") { // they separate the parts of a parameter
		return Run{}, invalid("rename the file", "Go code of %s: its name has a comma, semicolon or equals sign", f.path)
	}
	for _, r := range l.runs {
		if r.plugin == s.Plugin && r.dir == l.genDir(f) && f.out[s.Plugin] == s.Path {
			return Run{Plugin: p, Out: r.out, Parameter: l.bufParameter(r)}, nil
		}
	}
	// A second copy, outside the folder that imports of the first go by, gets
	// its own place.
	dir := path.Dir(s.Path)
	if s.Plugin == genConnect {
		dir = path.Dir(dir)
	}
	if dir != f.dir {
		return Run{}, invalid("delete it, or name its folder in "+bufGenName,
			"%s cannot be made again: Go code of %s belongs into %s", s.Path, s.Proto, firstOf(f.dir, "another module"))
	}
	m, ok := moduleOf(l.res.Sources.modules, f.dir)
	if !ok {
		return Run{}, fmt.Errorf("generate %s: %q is in no module", s.Path, f.dir)
	}
	run := Run{Plugin: p, Out: m.dir, Parameter: l.defaultParameter(m)}
	// What the plugins will say themselves is better said before they are built.
	_, err = l.protogen(run.Parameter, []string{f.name})
	return run, err
}

// plugin finds the version of a file's plugin in go.mod.
func (l *layout) plugin(s Stale) (Plugin, error) {
	name := s.Plugin
	switch name {
	case genGo:
		const module = "google.golang.org/protobuf"
		v := l.requires(module)
		if v == "" {
			return Plugin{}, l.notRequired(module, s)
		}
		return Plugin{name, module + "/cmd/" + name, v}, nil
	case genConnect:
		const module = "connectrpc.com/connect"
		v := l.requires(module)
		if v == "" {
			return Plugin{}, l.notRequired(module, s)
		}
		return Plugin{name, module + "/cmd/" + name, v}, nil
	}
	if v := l.requires(grpcPlugin); v != "" {
		return Plugin{name, grpcPlugin, v}, nil
	}
	const module = "google.golang.org/grpc"
	v := l.requires(module)
	if v == "" {
		return Plugin{}, l.notRequired(module, s)
	}
	for _, p := range grpcPlugins {
		if semver.Compare(v, p.grpc) >= 0 {
			return Plugin{name, grpcPlugin, p.plugin}, nil
		}
	}
	oldest := grpcPlugins[len(grpcPlugins)-1].grpc
	return Plugin{}, invalid("go get "+module+"@latest", "go.mod requires %s %s, and %s makes code for %s and later", module, v, name, oldest)
}

func (l *layout) notRequired(module string, s Stale) error {
	hint, gomod := "go get "+module, "go.mod"
	if m, ok := moduleOf(l.res.Sources.modules, s.Path); ok && len(l.mods) > 1 {
		hint, gomod = "cd "+m.dir+" && "+hint, path.Join(m.dir, gomod)
	}
	return invalid(hint, "%s has to be made by %s, but %s does not require %s", s.Path, s.Plugin, gomod, module)
}

// Request is what the plugin of a run reads on its standard input.
func Request(r *Result, run Run) *pluginpb.CodeGeneratorRequest {
	return request(r.Set, run.Parameter, run.Files)
}

// request holds the files, what they import in order, and no more: protoc
// does the same, and the plugin's time goes by it.
func request(set *descriptorpb.FileDescriptorSet, parameter string, names []string) *pluginpb.CodeGeneratorRequest {
	req := &pluginpb.CodeGeneratorRequest{FileToGenerate: sortedSet(names)}
	if parameter != "" {
		req.Parameter = proto.String(parameter)
	}
	for _, f := range closure(set, req.FileToGenerate) {
		// Options that are for the source only go into the second list.
		if _, ok := slices.BinarySearch(req.FileToGenerate, f.GetName()); ok {
			req.SourceFileDescriptors = append(req.SourceFileDescriptors, f)
		}
		if s, err := options.StripSourceRetentionOptionsFromFile(f); err == nil {
			f = s
		}
		req.ProtoFile = append(req.ProtoFile, f)
	}
	return req
}

// closure are files of a set and what they import, in the set's order.
func closure(set *descriptorpb.FileDescriptorSet, names []string) []*descriptorpb.FileDescriptorProto {
	byName := map[string]*descriptorpb.FileDescriptorProto{}
	for _, f := range set.GetFile() {
		byName[f.GetName()] = f
	}
	want := map[string]bool{}
	queue := slices.Clone(names)
	for len(queue) > 0 {
		n := queue[len(queue)-1]
		queue = queue[:len(queue)-1]
		if want[n] || byName[n] == nil {
			continue
		}
		want[n] = true
		queue = append(queue, byName[n].GetDependency()...)
	}
	var files []*descriptorpb.FileDescriptorProto
	for _, f := range set.GetFile() { // the set is in order already
		if want[f.GetName()] {
			files = append(files, f)
		}
	}
	return files
}
