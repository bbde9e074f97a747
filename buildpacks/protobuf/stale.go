package protobuf

import (
	"cmp"
	"fmt"
	"io/fs"
	"slices"
	"strings"

	"github.com/bufbuild/protocompile/options"
	"github.com/m3o/m3o"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protodesc"
	"google.golang.org/protobuf/types/descriptorpb"
	"google.golang.org/protobuf/types/dynamicpb"
)

// A Stale names a generated Go file that has to be made again, or for the
// first time.
type Stale struct {
	Path    string // of the Go file in the tree
	Proto   string // path of the .proto it is made of
	Plugin  string // protoc-gen-go, protoc-gen-go-grpc or protoc-gen-connect-go
	Missing bool
	Gone    bool   // the .proto has no services any more: to be deleted
	Why     string // for the pusher: "message Order changed"
}

// String is the line for the pusher.
func (s Stale) String() string {
	switch {
	case s.Missing:
		return fmt.Sprintf("%s is missing: made from %s", s.Path, s.Proto)
	case s.Gone:
		return fmt.Sprintf("%s is left over: %s has no services", s.Path, s.Proto)
	}
	return fmt.Sprintf("%s is older than %s: %s", s.Path, s.Proto, s.Why)
}

// readGo fills Stale. That is empty without a go.mod, and with one that does
// not parse: the Go builder reports that. Of a part of a workspace it drops the
// files that are not the part's.
func (r *Result) readGo() error {
	mods, err := r.Sources.goMods()
	if m3o.KindOf(err) == m3o.Invalid || err == nil && len(mods) == 0 {
		return nil
	}
	if err != nil {
		return err
	}
	l, err := newLayout(r, mods)
	if err != nil {
		return err
	}
	if r.Sources.part {
		l.leaveOthers()
	}
	if err := l.check(); err != nil {
		return err
	}
	r.Stale = l.stale
	return nil
}

// check fills l.stale.
func (l *layout) check() error {
	for _, f := range l.files {
		if err := l.checkMessages(f); err != nil {
			return err
		}
		for _, plugin := range []string{genGRPC, genConnect} {
			if err := l.checkServices(f, plugin); err != nil {
				return err
			}
		}
	}
	slices.SortFunc(l.stale, func(a, b Stale) int { return cmp.Compare(a.Path, b.Path) })
	return nil
}

func (l *layout) checkMessages(f *goFile) error {
	made := l.code.of(f.name, genGo)
	for _, g := range made {
		src, err := fs.ReadFile(l.res.Sources.Tree, g.path)
		if err != nil {
			return fmt.Errorf("read %s: %w", g.path, err)
		}
		f.combined = f.combined || withServices(src)
		old, err := rawDescriptor(src)
		if err != nil {
			l.note("%s: cannot tell whether it is up to date: it holds no descriptor that can be read", g.path)
			continue
		}
		if why := l.differs(old, f.desc); why != "" {
			l.stale = append(l.stale, Stale{Path: g.path, Proto: f.path, Plugin: genGo, Why: why})
		}
	}
	if len(made) > 0 {
		return nil
	}
	if by := l.otherGenerator(f); by != "" {
		if f.needed {
			l.note("%s: %s made its Go code, which is not run here: commit what it makes", f.path, by)
		}
		return nil
	}
	if f.needed {
		l.missing(f, genGo)
	}
	return nil
}

// otherGenerator is the program that made Go messages of a file in place of
// protoc-gen-go.
func (l *layout) otherGenerator(f *goFile) string {
	for _, g := range l.code.gen {
		if strings.HasPrefix(g.plugin, "protoc-gen-go") && g.plugin != genGRPC && sameName(g.source, f.name) && strings.HasSuffix(g.path, ".pb.go") && g.plugin != genGo {
			return g.plugin
		}
	}
	return ""
}

func (l *layout) checkServices(f *goFile, plugin string) error {
	made := l.code.of(f.name, plugin)
	want := l.rpcs(f)
	for _, g := range made {
		if len(f.desc.GetService()) == 0 {
			l.stale = append(l.stale, Stale{Path: g.path, Proto: f.path, Plugin: plugin, Gone: true, Why: "no services"})
			continue
		}
		src, err := fs.ReadFile(l.res.Sources.Tree, g.path)
		if err != nil {
			return fmt.Errorf("read %s: %w", g.path, err)
		}
		have, err := rpcsOf(src, plugin)
		if err != nil {
			have = nil // what does not parse is made again
		}
		if why := compareRPCs(have, want); why != "" {
			l.stale = append(l.stale, Stale{Path: g.path, Proto: f.path, Plugin: plugin, Why: why})
		}
	}
	if len(made) > 0 || len(f.desc.GetService()) == 0 || !f.needed {
		return nil
	}
	switch plugin {
	case genGRPC:
		if uses, err := l.usesGRPC(f); err != nil || f.combined || !uses {
			return err
		}
		l.missing(f, plugin)
	case genConnect:
		if l.code.imports[f.connectPath()] {
			l.missing(f, plugin)
		}
	}
	return nil
}

func (l *layout) missing(f *goFile, plugin string) {
	l.stale = append(l.stale, Stale{Path: l.expected(f, plugin), Proto: f.path, Plugin: plugin, Missing: true, Why: "missing"})
}

// rpcs is the form that generated code of a file's services should have.
func (l *layout) rpcs(f *goFile) map[string]rpc {
	m := map[string]rpc{}
	for _, s := range f.desc.GetService() {
		full := join(f.desc.GetPackage(), s.GetName())
		for _, md := range s.GetMethod() {
			m["/"+full+"/"+md.GetName()] = rpc{
				client: md.GetClientStreaming(), server: md.GetServerStreaming(),
				in: l.goNames[md.GetInputType()], out: l.goNames[md.GetOutputType()],
			}
		}
	}
	return m
}

// differs says what a descriptor embedded in Go code lacks of the compiled
// one, "" when they mean the same. Comments, other languages' options and the
// root that names are relative to do not count.
func (l *layout) differs(old, now *descriptorpb.FileDescriptorProto) string {
	if l.types == nil {
		l.types = &dynamicpb.Types{}
		if files, err := protodesc.NewFiles(l.res.Set); err == nil {
			l.types = dynamicpb.NewTypes(files)
		}
	}
	a, errA := normal(old, l.types)
	b, errB := normal(now, l.types)
	if errA != nil || errB != nil {
		return "its descriptor does not decode"
	}
	if sameName(a.GetName(), b.GetName()) {
		a.Name = b.Name
	}
	if len(a.Dependency) == len(b.Dependency) {
		for i, d := range b.Dependency {
			if sameName(a.Dependency[i], d) {
				a.Dependency[i] = d
			}
		}
	}
	if proto.Equal(a, b) {
		return ""
	}
	return difference(a, b)
}

// normal is a descriptor without what may differ between compilers and
// settings that have no part in Go code.
func normal(fd *descriptorpb.FileDescriptorProto, types *dynamicpb.Types) (*descriptorpb.FileDescriptorProto, error) {
	fd = proto.Clone(fd).(*descriptorpb.FileDescriptorProto)
	fd.SourceCodeInfo = nil
	if fd.GetSyntax() == "proto2" {
		fd.Syntax = nil // protoc leaves it out even where it is written
	}
	if stripped, err := options.StripSourceRetentionOptionsFromFile(fd); err == nil {
		fd = proto.Clone(stripped).(*descriptorpb.FileDescriptorProto)
	}
	if o := fd.Options; o != nil {
		// Set by buf's managed mode in what plugins get.
		o.GoPackage, o.JavaPackage, o.JavaOuterClassname, o.JavaMultipleFiles, o.JavaStringCheckUtf8 = nil, nil, nil, nil, nil
		o.ObjcClassPrefix, o.CsharpNamespace, o.SwiftPrefix, o.RubyPackage = nil, nil, nil, nil
		o.PhpClassPrefix, o.PhpNamespace, o.PhpMetadataNamespace = nil, nil, nil
		o.OptimizeFor, o.CcEnableArenas = nil, nil
	}
	var fields func(m *descriptorpb.DescriptorProto)
	each := func(list []*descriptorpb.FieldDescriptorProto) {
		for _, f := range list {
			if f.JsonName == nil {
				f.JsonName = proto.String(jsonName(f.GetName()))
			}
		}
	}
	fields = func(m *descriptorpb.DescriptorProto) {
		each(m.Field)
		each(m.Extension)
		for _, n := range m.NestedType {
			fields(n)
		}
	}
	each(fd.Extension)
	for _, m := range fd.MessageType {
		fields(m)
	}
	// Decode custom options by the compiled types: bytes may be ordered
	// differently.
	b, err := proto.MarshalOptions{AllowPartial: true, Deterministic: true}.Marshal(fd)
	if err != nil {
		return nil, err
	}
	out := &descriptorpb.FileDescriptorProto{}
	if err := (proto.UnmarshalOptions{AllowPartial: true, Resolver: types}).Unmarshal(b, out); err != nil {
		return nil, err
	}
	if out.Options != nil && proto.Size(out.Options) == 0 {
		out.Options = nil
	}
	return out, nil
}

// jsonName is protobuf's rule for a field without a json_name.
func jsonName(name string) string {
	var b strings.Builder
	up := false
	for i := range len(name) {
		c := name[i]
		switch {
		case c == '_':
			up = true
			continue
		case up && 'a' <= c && c <= 'z':
			c -= 'a' - 'A'
		}
		up = false
		b.WriteByte(c)
	}
	return b.String()
}

// difference names the declarations that differ.
func difference(a, b *descriptorpb.FileDescriptorProto) string {
	var why []string
	compare := func(kind string, a, b map[string]proto.Message) {
		for n, m := range b {
			old, ok := a[n]
			switch {
			case !ok:
				why = append(why, kind+" "+n+" is new")
			case !proto.Equal(old, m):
				why = append(why, kind+" "+n+" changed")
			}
		}
		for n := range a {
			if _, ok := b[n]; !ok {
				why = append(why, kind+" "+n+" is gone")
			}
		}
	}
	compare("message", named(a.MessageType), named(b.MessageType))
	compare("enum", named(a.EnumType), named(b.EnumType))
	compare("service", named(a.Service), named(b.Service))
	compare("extension", named(a.Extension), named(b.Extension))
	if a.GetPackage() != b.GetPackage() {
		why = append(why, "its package changed")
	}
	if !slices.Equal(a.Dependency, b.Dependency) {
		why = append(why, "its imports changed")
	}
	if len(why) == 0 {
		return "its options or order changed"
	}
	return list(why)
}

func named[M interface {
	proto.Message
	GetName() string
}](list []M) map[string]proto.Message {
	m := make(map[string]proto.Message, len(list))
	for _, x := range list {
		m[x.GetName()] = x
	}
	return m
}
