package gateway

import (
	"fmt"
	"io"
	"net/http"
	"os"
	"slices"
	"strings"
	"sync"

	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protodesc"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/reflect/protoregistry"
	"google.golang.org/protobuf/types/descriptorpb"
	"google.golang.org/protobuf/types/dynamicpb"
)

const (
	maxSchema   = 16 << 20 // bytes of a FileDescriptorSet
	maxSchemas  = 512      // kept compiled
	suggestions = 5
)

// set is one app's schema, compiled.
type set struct {
	methods map[string]*method // by "/package.Service/Method"
	list    []*method          // in order, without the gRPC project's own services
	routes  []*binding         // of google.api.http, what says most first
	raw     []byte             // the FileDescriptorSet
	files   *protoregistry.Files
	types   *dynamicpb.Types
}

// method is one gRPC method and how its messages are turned.
type method struct {
	path    string
	desc    protoreflect.MethodDescriptor
	in, out codec
	safe    bool // declared to have no side effects
	strict  bool // fields that its messages lack are refused, not ignored
	service string
	types   *dynamicpb.Types
}

// compile makes a set of what a FileDescriptorSet describes. Files it refers
// to but lacks are tolerated: only what needs them cannot be turned. strict is
// whether input with fields that a message lacks is refused, in whatever protocol
// it comes.
func compile(fds *descriptorpb.FileDescriptorSet, strict bool) (s *set, err error) {
	files, err := protodesc.FileOptions{AllowUnresolvable: true}.NewFiles(fds)
	if err != nil {
		return nil, fmt.Errorf("compile schema: %w", err)
	}
	types := dynamicpb.NewTypes(files)
	plans := &planner{types: types, strict: strict, plans: map[protoreflect.FullName]*plan{}}
	s = &set{methods: map[string]*method{}, files: files, types: types}
	files.RangeFiles(func(fd protoreflect.FileDescriptor) bool {
		for i := range fd.Services().Len() {
			sd := fd.Services().Get(i)
			for j := range sd.Methods().Len() {
				md := sd.Methods().Get(j)
				m := &method{
					path: "/" + string(sd.FullName()) + "/" + string(md.Name()), desc: md, service: string(sd.FullName()), types: types, strict: strict,
					in: fast{plans.plan(md.Input())}, out: fast{plans.plan(md.Output())},
				}
				if o, ok := md.Options().(*descriptorpb.MethodOptions); ok {
					m.safe = o.GetIdempotencyLevel() == descriptorpb.MethodOptions_NO_SIDE_EFFECTS
				}
				s.methods[m.path] = m
				if !strings.HasPrefix(m.service, "grpc.health.") && !strings.HasPrefix(m.service, "grpc.reflection.") {
					s.list = append(s.list, m)
					s.routes = append(s.routes, bindingsOf(m)...)
				}
			}
		}
		return true
	})
	slices.SortFunc(s.list, func(a, b *method) int { return strings.Compare(a.path, b.path) })
	sortBindings(s.routes)
	return s, nil
}

// schemas keeps compiled sets.
type schemas struct {
	mu    sync.Mutex // guards byKey
	byKey map[schemaKey]*entry
}

type schemaKey struct {
	file   string
	strict bool
}

type entry struct {
	once sync.Once
	set  *set
	err  error
}

func (c *schemas) load(file string, strict bool) (*set, error) {
	key := schemaKey{file, strict}
	c.mu.Lock()
	e := c.byKey[key]
	if e == nil {
		if c.byKey == nil {
			c.byKey = map[schemaKey]*entry{}
		}
		for k := range c.byKey { // any: they are quickly made again
			if len(c.byKey) < maxSchemas {
				break
			}
			delete(c.byKey, k)
		}
		e = &entry{}
		c.byKey[key] = e
	}
	c.mu.Unlock()
	e.once.Do(func() { e.set, e.err = readSet(key) })
	if e.err != nil {
		c.mu.Lock()
		if c.byKey[key] == e {
			delete(c.byKey, key) // it may be there next time
		}
		c.mu.Unlock()
	}
	return e.set, e.err
}

func readSet(key schemaKey) (*set, error) {
	f, err := os.Open(key.file)
	if err != nil {
		return nil, fmt.Errorf("read schema: %w", err)
	}
	defer f.Close() //nolint:errcheck // only read
	b, err := io.ReadAll(io.LimitReader(f, maxSchema+1))
	if err != nil {
		return nil, fmt.Errorf("read schema: %w", err)
	}
	if len(b) > maxSchema {
		return nil, fmt.Errorf("read schema: %s is larger than %d bytes", key.file, maxSchema)
	}
	var fds descriptorpb.FileDescriptorSet
	if err := proto.Unmarshal(b, &fds); err != nil {
		return nil, fmt.Errorf("read schema: %w", err)
	}
	s, err := compile(&fds, key.strict)
	if err != nil {
		return nil, err
	}
	if s.raw, err = proto.Marshal(inOrder(&fds)); err != nil {
		return nil, fmt.Errorf("order schema: %w", err)
	}
	return s, nil
}

// inOrder puts every file behind those it imports, as protoc does and some
// readers insist on.
func inOrder(fds *descriptorpb.FileDescriptorSet) *descriptorpb.FileDescriptorSet {
	byName := map[string]*descriptorpb.FileDescriptorProto{}
	for _, f := range fds.File {
		byName[f.GetName()] = f
	}
	out, done := &descriptorpb.FileDescriptorSet{}, map[string]bool{}
	var add func(f *descriptorpb.FileDescriptorProto)
	add = func(f *descriptorpb.FileDescriptorProto) {
		if f == nil || done[f.GetName()] {
			return
		}
		done[f.GetName()] = true
		for _, d := range f.GetDependency() {
			add(byName[d])
		}
		out.File = append(out.File, f)
	}
	for _, f := range fds.File {
		add(f)
	}
	return out
}

// byPath finds /package.Service/Method, or the same by short or
// differently written names where they mean one method only.
func (s *set) byPath(app, path string) (*method, error) {
	if m := s.methods[path]; m != nil {
		return m, nil
	}
	if parts := strings.Split(strings.Trim(path, "/"), "/"); len(parts) == 2 {
		return s.resolve(app, path)
	}
	return nil, s.unknown(path, nil)
}

// plain is a name without what people write differently: case, - and _.
func plain(s string) string {
	return strings.Map(func(r rune) rune {
		if r == '-' || r == '_' {
			return -1
		}
		return r
	}, strings.ToLower(s))
}

// resolve finds the method that path means for app, as M3O did:
//
//	/helloworld              Helloworld.Call
//	/helloworld/greet        Helloworld.Greet, or Greet.Call
//	/foo/bar/baz-xyz         Bar.BazXyz
//	/foo/v1/bar/baz          v1.Bar.Baz, with v1 the end of a package
//
// An app with one service need not have named it after itself.
func (s *set) resolve(app, path string) (*method, error) {
	path = strings.Trim(path, "/")
	if m := s.methods["/"+path]; m != nil {
		return m, nil
	}
	var parts []string
	if path != "" {
		parts = strings.Split(path, "/")
	}
	if len(parts) > 16 {
		return nil, s.unknown(path, nil)
	}
	own := plain(app)
	try := func(service, name string) []*method {
		var found []*method
		for _, m := range s.list {
			if plain(string(m.desc.Name())) == plain(name) && endsIn(plain(m.service), plain(service)) {
				found = append(found, m)
			}
		}
		return found
	}
	sole := func(name string) []*method {
		var found []*method
		for _, m := range s.list {
			if m.service != s.list[0].service {
				return nil
			}
			if plain(string(m.desc.Name())) == plain(name) {
				found = append(found, m)
			}
		}
		return found
	}
	var found []*method
	switch n := len(parts); n {
	case 0:
		if found = try(own, "call"); found == nil {
			found = sole("call")
		}
	case 1:
		if found = try(own, parts[0]); found == nil {
			if found = sole(parts[0]); found == nil {
				found = try(parts[0], "call")
			}
		}
	default:
		found = try(strings.Join(parts[:n-1], "."), parts[n-1])
	}
	if len(found) == 1 {
		return found[0], nil
	}
	return nil, s.unknown(path, found)
}

// endsIn says that service is name, or name preceded by a package.
func endsIn(service, name string) bool {
	return name != "" && (service == name || strings.HasSuffix(service, "."+name))
}

// unknown says that path means no method, or several, and names the nearest.
func (s *set) unknown(path string, several []*method) error {
	if len(path) > 200 {
		path = path[:200]
	}
	p := &problem{http: http.StatusNotFound, grpc: codes.Unimplemented}
	var names []string
	if several != nil {
		p.detail = fmt.Sprintf("%q means more than one method", path)
		for _, m := range several {
			names = append(names, m.path)
		}
	} else {
		p.detail = fmt.Sprintf("no method %q", "/"+strings.TrimPrefix(path, "/"))
		near := slices.Clone(s.list)
		want := plain(path)
		slices.SortStableFunc(near, func(a, b *method) int { return distance(plain(a.path), want) - distance(plain(b.path), want) })
		for _, m := range near {
			names = append(names, m.path)
		}
	}
	if len(names) > suggestions {
		names = names[:suggestions]
	}
	if len(names) > 0 {
		p.detail += ": there is " + strings.Join(names, ", ")
	}
	return p
}

// distance is Levenshtein's, of the first hundred bytes.
func distance(a, b string) int {
	const most = 100
	a, b = a[:min(len(a), most)], b[:min(len(b), most)]
	var row [most + 1]int
	for j := range len(b) + 1 {
		row[j] = j
	}
	for i := range len(a) {
		prev := row[0]
		row[0] = i + 1
		for j := range len(b) {
			cost := 1
			if a[i] == b[j] {
				cost = 0
			}
			prev, row[j+1] = row[j+1], min(row[j+1]+1, row[j]+1, prev+cost)
		}
	}
	return row[len(b)]
}
