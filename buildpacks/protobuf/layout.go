package protobuf

import (
	"fmt"
	"io/fs"
	"path"
	"regexp"
	"strings"

	"golang.org/x/mod/modfile"
	"golang.org/x/mod/semver"
	"google.golang.org/protobuf/compiler/protogen"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/descriptorpb"
	"google.golang.org/protobuf/types/dynamicpb"
	"google.golang.org/protobuf/types/pluginpb"
)

// layout says which Go file belongs to which .proto: by the runs that
// buf.gen.yaml names, by the generated code that is there, else by go_package.
type layout struct {
	res     *Result
	mods    []*modfile.File // as res.Sources.modules
	code    *goCode
	files   []*goFile // the app's own, by name
	byName  map[string]*goFile
	goNames map[string]string // ".pkg.Message" → its Go type's name
	runs    []bufRun          // of buf.gen.yaml, for the plugins that are run
	genDirs []string          // folders with a buf.gen.yaml
	types   *dynamicpb.Types

	stale []Stale
	notes []string
}

// A goFile is one .proto as Go code sees it.
type goFile struct {
	name, path string
	desc       *descriptorpb.FileDescriptorProto
	imp        string            // Go import path
	pkg        string            // Go package name
	dir        string            // folder of the tree for imp, "" when it is not of the modules
	needed     bool              // the modules' code imports it, directly or not
	combined   bool              // its .pb.go has gRPC code in it, too
	out        map[string]string // plugin → path that buf.gen.yaml makes it have
}

func (f *goFile) connectPath() string { return f.imp + "/" + f.pkg + "connect" }

func (l *layout) note(format string, args ...any) {
	l.notes = append(l.notes, fmt.Sprintf(format, args...))
}

func newLayout(r *Result, mods []*modfile.File) (*layout, error) {
	code := r.Sources.code
	if code == nil {
		code = newGoCode()
		for _, m := range r.Sources.modules {
			if err := code.read(r.Sources.Tree, m.dir); err != nil {
				return nil, err
			}
		}
	}
	l := &layout{res: r, mods: mods, code: code, byName: map[string]*goFile{}}
	descs := map[string]*descriptorpb.FileDescriptorProto{}
	for _, fd := range r.Set.GetFile() {
		descs[fd.GetName()] = fd
	}
	for _, f := range r.Sources.Files {
		if fd := descs[f.Name]; fd != nil {
			g := &goFile{name: f.Name, path: f.Path, desc: fd, out: map[string]string{}}
			l.files = append(l.files, g)
			l.byName[f.Name] = g
		}
	}
	if err := l.readGen(); err != nil {
		return nil, err
	}
	for _, f := range l.files {
		l.place(f)
	}
	l.agree()
	if err := l.placeByRuns(); err != nil {
		return nil, err
	}
	l.findNeeded()
	l.nameTypes()
	return l, nil
}

// place finds the Go package of a file without buf.gen.yaml.
func (l *layout) place(f *goFile) {
	opt := f.desc.GetOptions().GetGoPackage()
	imp, pkg, _ := strings.Cut(opt, ";")
	f.pkg = pkg
	// Where the code is already, it stays: the folder decides the import path.
	made := l.code.of(f.name, genGo)
	if len(made) > 0 {
		at := made[0]
		for _, g := range made {
			if l.importPath(path.Dir(g.path)) == imp {
				at = g
			}
		}
		f.dir = path.Dir(at.path)
		f.imp, f.pkg = l.importPath(f.dir), l.code.pkg[f.dir]
		return
	}
	if dir, ok := l.inModule(imp); ok && imp != "" {
		f.imp, f.dir = imp, dir
	} else if first, _, _ := strings.Cut(imp, "/"); imp == "" || !strings.Contains(strings.Trim(first, "."), ".") {
		// Nothing, or a folder such as ./pb or gen/pb and not an import path.
		dir := l.res.Sources.Dir
		if m, ok := moduleOf(l.res.Sources.modules, f.path); ok {
			dir = m.dir
		}
		dir = path.Join(dir, imp)
		if imp == "" {
			dir = path.Dir(f.path)
		}
		if _, ok := moduleOf(l.res.Sources.modules, dir); !ok {
			return
		}
		f.dir, f.imp = dir, l.importPath(dir)
	} else {
		f.imp = imp // another module's
	}
	if f.dir != "" && l.code.pkg[f.dir] != "" {
		f.pkg = l.code.pkg[f.dir]
	}
	if f.pkg == "" {
		f.pkg = goIdent(path.Base(f.imp))
	}
}

// agree gives files of one folder one package name.
func (l *layout) agree() {
	pkg := map[string]string{}
	for _, f := range l.files {
		if have := pkg[f.imp]; have != "" {
			f.pkg = have
		}
		pkg[f.imp] = f.pkg
	}
}

// goIdent makes a package name of the last element of an import path.
func goIdent(s string) string {
	s = strings.Map(func(r rune) rune {
		if r == '_' || '0' <= r && r <= '9' || 'a' <= r && r <= 'z' || 'A' <= r && r <= 'Z' {
			return r
		}
		return '_'
	}, s)
	if s == "" || '0' <= s[0] && s[0] <= '9' {
		return "_" + s
	}
	return s
}

func (l *layout) importPath(dir string) string {
	m, ok := moduleOf(l.res.Sources.modules, dir)
	if !ok {
		return ""
	}
	return m.importPath(dir)
}

// inModule is the folder of an import path of one of the modules.
func (l *layout) inModule(imp string) (string, bool) {
	return inModules(l.res.Sources.modules, imp)
}

// findNeeded marks the files whose Go package the module's code imports, or
// lies in the folder of, and what those import.
func (l *layout) findNeeded() {
	var mark func(f *goFile)
	mark = func(f *goFile) {
		if f.needed || f.dir == "" && len(f.out) == 0 {
			return
		}
		f.needed = true
		for _, d := range f.desc.GetDependency() {
			if g := l.byName[d]; g != nil {
				mark(g)
			}
		}
	}
	for _, f := range l.files {
		if l.code.imports[f.imp] || l.code.imports[f.connectPath()] || f.dir != "" && l.code.byHand[f.dir] && f.desc.GetOptions().GetGoPackage() != "" {
			mark(f)
		}
	}
}

// request is what a plugin gets for some files.
func (l *layout) request(parameter string, names []string) *pluginpb.CodeGeneratorRequest {
	return request(l.res.Set, parameter, names)
}

// defaultParameter places every file of a module where its import path says,
// and tells where those of the others are.
func (l *layout) defaultParameter(m moduleDir) string {
	opts := []string{"module=" + m.path}
	for _, f := range l.files {
		if f.imp != "" && f.dir != "" {
			opts = append(opts, "M"+f.name+"="+f.imp+";"+f.pkg)
		}
	}
	return strings.Join(opts, ",")
}

// placeByRuns lets the plugins' own library say where the runs of buf.gen.yaml
// put their files.
func (l *layout) placeByRuns() error {
	for _, r := range l.runs {
		files := l.filesOf(r)
		if len(files) == 0 {
			continue
		}
		gen, err := l.protogen(l.bufParameter(r), namesOf(files))
		if err != nil {
			return err
		}
		var module string
		for _, o := range r.opts {
			if m, ok := strings.CutPrefix(o, "module="); ok {
				module = m
			}
		}
		for _, f := range files {
			pf := gen.FilesByPath[f.name]
			if pf == nil {
				continue
			}
			name := fileName(pf, r.plugin, r.opts)
			if module != "" {
				if name, _ = strings.CutPrefix(name, module+"/"); name == "" {
					continue
				}
			}
			out := path.Join(r.out, name)
			f.out[r.plugin] = out
			if r.plugin != genGo || len(l.code.of(f.name, genGo)) > 0 {
				continue
			}
			f.imp, f.pkg = string(pf.GoImportPath), string(pf.GoPackageName)
			f.dir = ""
			// The folder is what imports go by, whatever go_package says.
			dir := path.Dir(out)
			if _, ok := moduleOf(l.res.Sources.modules, dir); ok {
				f.dir = dir
				if l.code.imports[l.importPath(dir)] {
					f.imp = l.importPath(dir)
				}
			}
		}
	}
	return nil
}

func namesOf(files []*goFile) []string {
	names := make([]string, len(files))
	for i, f := range files {
		names[i] = f.name
	}
	return names
}

// protogen runs the library that all Go plugins share, short of generating.
func (l *layout) protogen(parameter string, names []string) (*protogen.Plugin, error) {
	req := proto.Clone(l.request(parameter, names)).(*pluginpb.CodeGeneratorRequest)
	gen, err := protogen.Options{ParamFunc: func(string, string) error { return nil }}.New(req)
	if err != nil {
		msg, _, _ := strings.Cut(err.Error(), "\n")
		return nil, invalid(`give each file an option go_package, such as "`+l.res.Sources.modules[0].path+`/gen/shop/v1;shopv1"`, "Go code of the .proto files: %s", msg)
	}
	return gen, nil
}

// fileName is the name that a plugin gives the code of a file.
func fileName(pf *protogen.File, plugin string, opts []string) string {
	prefix := pf.GeneratedFilenamePrefix
	switch plugin {
	case genGRPC:
		return prefix + "_grpc.pb.go"
	case genConnect:
		suffix := "connect"
		for _, o := range opts {
			if s, ok := strings.CutPrefix(o, "package_suffix"); ok {
				suffix = strings.TrimPrefix(s, "=")
			}
		}
		if suffix == "" {
			return prefix + ".connect.go"
		}
		return path.Join(path.Dir(prefix), string(pf.GoPackageName)+suffix, path.Base(prefix)+".connect.go")
	}
	return prefix + ".pb.go"
}

// expected is the path of the file that generating would write.
func (l *layout) expected(f *goFile, plugin string) string {
	if p := f.out[plugin]; p != "" {
		return p
	}
	base := strings.TrimSuffix(path.Base(f.name), ".proto")
	switch plugin {
	case genGRPC:
		return path.Join(f.dir, base+"_grpc.pb.go")
	case genConnect:
		return path.Join(f.dir, f.pkg+"connect", base+".connect.go")
	}
	return path.Join(f.dir, base+".pb.go")
}

// nameTypes finds the Go names of messages as protoc-gen-go makes them.
func (l *layout) nameTypes() {
	l.goNames = map[string]string{}
	var add func(scope, goScope string, ms []*descriptorpb.DescriptorProto)
	add = func(scope, goScope string, ms []*descriptorpb.DescriptorProto) {
		for _, m := range ms {
			full, name := scope+"."+m.GetName(), goCamel(m.GetName())
			if goScope != "" {
				if name != "" && name[0] != m.GetName()[0] { // it began with a small letter
					name = goScope + name
				} else {
					name = goScope + "_" + name
				}
			}
			l.goNames[full] = name
			add(full, name, m.GetNestedType())
		}
	}
	for _, fd := range l.res.Set.GetFile() {
		scope := ""
		if p := fd.GetPackage(); p != "" {
			scope = "." + p
		}
		add(scope, "", fd.GetMessageType())
	}
}

// goCamel is protoc-gen-go's rule for Go names of protobuf names.
func goCamel(s string) string {
	lower := func(c byte) bool { return 'a' <= c && c <= 'z' }
	var b []byte
	for i := 0; i < len(s); i++ {
		c := s[i]
		switch {
		case c == '_' && i == 0:
			b = append(b, 'X')
		case c == '_' && i+1 < len(s) && lower(s[i+1]):
		case '0' <= c && c <= '9':
			b = append(b, c)
		default:
			if lower(c) {
				c -= 'a' - 'A'
			}
			b = append(b, c)
			for ; i+1 < len(s) && lower(s[i+1]); i++ {
				b = append(b, s[i+1])
			}
		}
	}
	return string(b)
}

// requires is the version of a module that go.mod names, the newest in a
// workspace, "" when none does.
func (l *layout) requires(module string) string {
	v := ""
	for _, mod := range l.mods {
		for _, r := range mod.Require {
			if r.Mod.Path == module && (v == "" || semver.Compare(r.Mod.Version, v) > 0) {
				v = r.Mod.Version
			}
		}
	}
	return v
}

// usesGRPC says whether people's code uses what protoc-gen-go-grpc makes of the
// file's services. That the package is imported, and grpc-go required, does not
// say it: a module may call others by gRPC and serve by Connect.
func (l *layout) usesGRPC(f *goFile) (bool, error) {
	var names []string
	for _, s := range f.desc.GetService() {
		n := regexp.QuoteMeta(goCamel(s.GetName()))
		names = append(names, "Register"+n+"Server", "New"+n+"Client", "Unimplemented"+n+"Server", n+"Server", n+"Client", n+`_\w+`)
	}
	if len(names) == 0 {
		return false, nil
	}
	word := `(?:` + strings.Join(names, "|") + `)\b`
	for _, h := range l.code.files {
		alias, ok := h.imports[f.imp]
		prefix := `\b`
		switch {
		case ok && alias == "":
			prefix = `\b` + regexp.QuoteMeta(f.pkg) + `\.`
		case ok && alias == "_":
			continue
		case ok && alias != ".":
			prefix = `\b` + regexp.QuoteMeta(alias) + `\.`
		case !ok && path.Dir(h.path) != f.dir: // not of the same package either
			continue
		}
		re, err := regexp.Compile(prefix + word)
		if err != nil {
			return false, fmt.Errorf("search for gRPC code: %w", err)
		}
		src, err := fs.ReadFile(l.res.Sources.Tree, h.path)
		if err != nil {
			return false, fmt.Errorf("read %s: %w", h.path, err)
		}
		if re.Match(src) {
			return true, nil
		}
	}
	return false, nil
}
