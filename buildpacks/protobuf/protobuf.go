// Package protobuf makes descriptors of the .proto files of a pushed tree: it
// finds them, compiles them without protoc, says which generated Go code is
// missing or out of date and what would generate it, and tells which changes
// between two versions break callers.
//
// Everything here is a pure function over an fs.FS and descriptors. Nothing is
// executed, written or fetched; package build runs the plugins that Generate
// names. It knows nothing of apps, releases or users.
package protobuf

import (
	"cmp"
	"errors"
	"io/fs"
	"path"
	"slices"
	"strings"

	"github.com/m3o/m3o"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/descriptorpb"
)

// The limits of what Find and Compile accept. They keep a hostile tree from
// taking the daemon down; real repositories are far below them.
const (
	maxFile   = 1 << 20  // bytes in one .proto: its syntax tree takes a hundred times that
	maxTotal  = 16 << 20 // bytes in all .proto files together
	maxFiles  = 5000     // .proto files, dependencies included
	maxConfig = 256 << 10
	maxDepth  = 100   // nested brackets: the parser recurses, and a deep stack cannot be recovered
	maxWalk   = 60000 // directory entries looked at
	maxErrors = 20    // messages in one error
)

// Sources are the .proto files of a tree and where their imports are looked
// up. The zero Sources has no files.
type Sources struct {
	Tree  fs.FS
	Dir   string   // build root inside Tree, "." for all of it
	Roots []string // import roots as paths of Tree, the first that has a file wins
	Files []File   // what is compiled, by Name; dependencies are not listed
	Notes []string // lines for the pusher

	// Generated are the *.pb.go files below Dir, whoever made them. A tree that
	// has them builds although its .proto files do not compile, say because
	// they import files of Go modules.
	Generated []string

	also    map[string]string // names of dependencies that were searched for, to their paths
	modules []moduleDir       // Go modules that code is generated for: the one at Dir, or the workspace's
	units   []string          // folders that were searched, each with buf files of its own; Dir first
	part    bool              // of a workspace: beyond Dir only what its Go code needs counts
	code    *goCode           // what of the Go code is built, nil for all of modules
}

// A File is one .proto file.
type File struct {
	Name string // as imports and descriptors call it: shop/v1/order.proto
	Path string // in the tree: proto/shop/v1/order.proto
}

// Path is where in the tree the file that descriptors call name lies, and name
// itself when it is not one of the tree's.
func (s Sources) Path(name string) string {
	if p, ok := s.lookup(name); ok {
		return p
	}
	return name
}

// lookup finds the path of an import name: a file that is compiled, one that
// was searched for, else the first root that has it.
func (s Sources) lookup(name string) (string, bool) {
	if i, ok := slices.BinarySearchFunc(s.Files, name, func(f File, n string) int { return cmp.Compare(f.Name, n) }); ok {
		return s.Files[i].Path, true
	}
	if p, ok := s.also[name]; ok {
		return p, true
	}
	if s.Tree == nil || !fs.ValidPath(name) {
		return "", false
	}
	for _, r := range s.Roots {
		if p := path.Join(r, name); isFile(s.Tree, p) {
			return p, true
		}
	}
	// As if the module lay below GOPATH/src, which many import from still.
	if p, ok := s.ofModule(name); ok && isFile(s.Tree, p) {
		return p, true
	}
	return "", false
}

func isFile(tree fs.FS, p string) bool {
	st, err := fs.Stat(tree, p)
	return err == nil && st.Mode().IsRegular()
}

// ofModule is the path of a name that begins with a Go module's path.
func (s Sources) ofModule(name string) (string, bool) {
	return inModules(s.modules, name)
}

// A Result is what compiling gives.
type Result struct {
	Sources Sources

	// Set holds every file with its comments, each after the files it imports
	// and otherwise by name: the same sources give the same bytes.
	Set *descriptorpb.FileDescriptorSet

	Services []Service // of the app's own files, by name
	Stale    []Stale   // generated Go files to be made again; empty without a go.mod
	Notes    []string  // warnings as "file:line:col: message", and Sources.Notes
}

// Marshal is the Set as bytes, the same for the same sources.
func (r *Result) Marshal() ([]byte, error) {
	return proto.MarshalOptions{Deterministic: true}.Marshal(r.Set)
}

// A Service is one service of the app.
type Service struct {
	Name    string // shop.v1.Orders
	Path    string // of its file in the tree
	Methods []Method
}

// A Method is one rpc of a service.
type Method struct {
	Name                         string // Get
	Input, Output                string // shop.v1.GetRequest
	ClientStreams, ServerStreams bool
}

func services(s Sources, set *descriptorpb.FileDescriptorSet) []Service {
	own := map[string]string{}
	for _, f := range s.Files {
		own[f.Name] = f.Path
	}
	var all []Service
	for _, f := range set.GetFile() {
		p, ok := own[f.GetName()]
		if !ok {
			continue
		}
		for _, sd := range f.GetService() {
			svc := Service{Name: join(f.GetPackage(), sd.GetName()), Path: p}
			for _, m := range sd.GetMethod() {
				svc.Methods = append(svc.Methods, Method{
					Name:          m.GetName(),
					Input:         strings.TrimPrefix(m.GetInputType(), "."),
					Output:        strings.TrimPrefix(m.GetOutputType(), "."),
					ClientStreams: m.GetClientStreaming(),
					ServerStreams: m.GetServerStreaming(),
				})
			}
			all = append(all, svc)
		}
	}
	slices.SortFunc(all, func(a, b Service) int { return cmp.Compare(a.Name, b.Name) })
	return all
}

// join is a full name of a scope, which may be "", and a name.
func join(scope, name string) string {
	if scope == "" {
		return name
	}
	return scope + "." + name
}

// ErrMissingImport is for .proto files that import what the tree does not have.
// A tree whose generated code is complete builds all the same.
var ErrMissingImport = errors.New("an imported file is not in the repository")

func invalid(hint, format string, args ...any) *m3o.Error {
	e := m3o.Errorf(m3o.Invalid, format, args...)
	e.Hint = hint
	return e
}
