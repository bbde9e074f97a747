package protobuf

import (
	"cmp"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"path"
	"slices"
	"strings"
)

// Find lists the .proto files below dir and the roots their imports are
// relative to. In this order it takes
//
//   - the modules of buf.work.yaml or buf.yaml (v1beta1, v1, v2) in dir;
//   - the modules of every buf.yaml in a folder below;
//   - the folder proto;
//   - every .proto anywhere below dir.
//
// Without buf files the roots are guessed: those that make the files' imports
// resolve, or the ones that generated Go code beside them was made with. The
// folders third_party, vendor (Go's), node_modules, testdata and hidden ones
// are left out; the first two are searched, in the whole tree, for what is
// imported and found nowhere else.
//
// No .proto at all is no error: Files is empty. A dependency named in buf.yaml
// or buf.lock that something imports and the tree does not have is an error of
// kind Invalid with the command that vendors it, for a build fetches nothing;
// it matches ErrMissingImport, and the Sources come with it. Google's common
// files need no vendoring.
func Find(tree fs.FS, dir string) (Sources, error) {
	dir = path.Clean(dir)
	f := finder{Sources: Sources{Tree: tree, Dir: dir, units: []string{dir}}}
	if !fs.ValidPath(dir) {
		return f.Sources, invalid("", "the build folder %q leads out of the repository", short(dir))
	}
	m, ok, err := readModule(tree, dir)
	if err != nil {
		return Sources{}, err
	}
	if ok {
		f.modules = []moduleDir{m}
	}
	err = f.find()
	if err != nil && !errors.Is(err, ErrMissingImport) {
		return Sources{}, err
	}
	return f.Sources, err
}

type finder struct {
	Sources
	protos  []string // every candidate below Dir, sorted
	configs []string // folders below Dir with a buf.yaml
	deps    []string
	apart   bool // folders below with a go.mod of their own are left out

	everything map[string][]string // base name → paths in the whole tree, made when needed
	scans      map[string]scanned
	total      int
}

func (f *finder) find() error {
	if err := f.walk(); err != nil {
		return err
	}
	conf, err := loadBuf(f.Tree, f.Dir)
	if err != nil {
		return err
	}
	if conf == nil && len(f.configs) > 0 {
		conf = &bufConfig{}
		for _, d := range f.configs {
			c, err := loadBuf(f.Tree, d)
			if err != nil {
				return err
			}
			if c != nil {
				conf.modules = append(conf.modules, c.modules...)
				conf.deps = append(conf.deps, c.deps...)
			}
		}
		conf.deps = sortedSet(conf.deps)
	}
	if conf != nil {
		f.deps = conf.deps
		err = f.byModules(conf.modules)
	} else {
		err = f.guess()
	}
	if err != nil {
		return err
	}
	slices.SortFunc(f.Files, func(a, b File) int { return cmp.Compare(a.Name, b.Name) })
	for i := 1; i < len(f.Files); i++ {
		if a, b := f.Files[i-1], f.Files[i]; a.Name == b.Name {
			return invalid("rename one, or name the modules in buf.yaml",
				"%s and %s are both %q to those who import them", a.Path, b.Path, a.Name)
		}
	}
	return f.resolve()
}

// walk lists what lies below Dir.
func (f *finder) walk() error {
	n := 0
	err := fs.WalkDir(f.Tree, f.Dir, func(p string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if n++; n > maxWalk {
			return invalid("set build.dir in m3o.yaml", "more than %d files to search for .proto", maxWalk)
		}
		base := path.Base(p)
		switch {
		case d.IsDir():
			if p != f.Dir && (f.leftOut(p, base) || f.apart && isFile(f.Tree, p+"/go.mod")) {
				return fs.SkipDir
			}
		case !d.Type().IsRegular():
		case strings.HasSuffix(base, ".proto"):
			f.protos = append(f.protos, p)
			if len(f.protos) > maxFiles {
				return invalid("name the folders that count in buf.yaml", "more than %d .proto files", maxFiles)
			}
		case strings.HasSuffix(base, ".pb.go"):
			f.Generated = append(f.Generated, p)
		case base == bufName && path.Dir(p) != f.Dir:
			f.configs = append(f.configs, path.Dir(p))
		}
		return nil
	})
	if errors.Is(err, fs.ErrNotExist) {
		return invalid("set build.dir in m3o.yaml to a folder of the repository", "there is no folder %s", f.Dir)
	}
	if err != nil {
		return fmt.Errorf("search for .proto files: %w", err)
	}
	slices.Sort(f.protos)
	return nil
}

// leftOut is for the folders that hold other people's files. A package of the
// app may well be called vendor: only Go's own folder is left out.
func (f *finder) leftOut(p, base string) bool {
	switch base {
	case "third_party", "node_modules", "testdata":
		return true
	case "vendor":
		if path.Dir(p) == f.Dir {
			return true
		}
		_, err := fs.Stat(f.Tree, p+"/modules.txt")
		return err == nil
	}
	return strings.HasPrefix(base, ".") || strings.HasPrefix(base, "_")
}

// isCopy is for files that the compiler brings along: they are imported from
// the tree when they are there, but they are not the app's.
func isCopy(p string) bool {
	i := strings.LastIndex("/"+p, "/google/")
	return i >= 0 && linked(p[i:])
}

func (f *finder) byModules(mods []bufModule) error {
	taken := map[string]bool{}
	// The innermost module owns a file that two would have.
	byDepth := slices.Clone(mods)
	slices.SortStableFunc(byDepth, func(a, b bufModule) int { return cmp.Compare(len(b.root), len(a.root)) })
	for _, m := range byDepth {
		if st, err := fs.Stat(f.Tree, m.root); err != nil || !st.IsDir() {
			return invalid("correct buf.yaml or buf.work.yaml, or commit the folder", "buf's module folder %s is not in the repository", m.root)
		}
		for _, p := range f.protos {
			rel, ok := below(m.root, p)
			if !ok || taken[p] || isCopy(p) || m.includes != nil && !anyAbove(m.includes, p) || anyAbove(m.excludes, p) {
				continue
			}
			taken[p] = true
			f.Files = append(f.Files, File{Name: rel, Path: p})
		}
	}
	for _, m := range mods {
		if !slices.Contains(f.Roots, m.root) {
			f.Roots = append(f.Roots, m.root)
		}
	}
	return nil
}

// below is p relative to root, when it lies below it.
func below(root, p string) (string, bool) {
	if root == "." {
		return p, true
	}
	return strings.CutPrefix(p, root+"/")
}

func anyAbove(dirs []string, p string) bool {
	return slices.ContainsFunc(dirs, func(d string) bool {
		_, ok := below(d, p)
		return ok || d == p
	})
}

// headSize is enough for a header and most imports.
const headSize = 4 << 10

// head is the beginning of a file, where its header is; nil when it cannot be read.
func head(tree fs.FS, p string) []byte {
	f, err := tree.Open(p)
	if err != nil {
		return nil
	}
	defer f.Close() //nolint:errcheck // only read
	b, err := io.ReadAll(io.LimitReader(f, headSize))
	if err != nil {
		return nil
	}
	return b
}

// read is one .proto file, within the limits.
func (f *finder) read(p string) ([]byte, error) {
	return readProto(f.Tree, p, &f.total)
}

func readProto(tree fs.FS, p string, total *int) ([]byte, error) {
	file, err := tree.Open(p)
	if err != nil {
		return nil, fmt.Errorf("open %s: %w", p, err)
	}
	defer file.Close() //nolint:errcheck // only read
	b, err := io.ReadAll(io.LimitReader(file, maxFile+1))
	if err != nil {
		return nil, fmt.Errorf("read %s: %w", p, err)
	}
	if len(b) > maxFile {
		return nil, invalid("split it", "%s is larger than %d MB", p, maxFile>>20)
	}
	if *total += len(b); *total > maxTotal {
		return nil, invalid("name the folders that count in buf.yaml", "the .proto files are larger than %d MB together", maxTotal>>20)
	}
	return b, nil
}

func (f *finder) scan(p string) (scanned, error) {
	if s, ok := f.scans[p]; ok {
		return s, nil
	}
	b, err := f.read(p)
	if err != nil {
		return scanned{}, err
	}
	s := scan(p, b)
	if f.scans == nil {
		f.scans = map[string]scanned{}
	}
	f.scans[p] = s
	return s, nil
}

// resolve looks for every import, directly or not, that the roots do not have,
// and refuses dependencies of buf that the tree lacks.
func (f *finder) resolve() error {
	f.also = map[string]string{}
	queue := make([]string, 0, len(f.Files))
	for _, file := range f.Files {
		queue = append(queue, file.Path)
	}
	seen := map[string]bool{}
	var missing []missingImport
	for len(queue) > 0 {
		p := queue[0]
		queue = queue[1:]
		if seen[p] {
			continue
		}
		seen[p] = true
		if len(seen) > maxFiles {
			return invalid("name the folders that count in buf.yaml", "more than %d .proto files with their imports", maxFiles)
		}
		s, err := f.scan(p)
		if err != nil {
			return err
		}
		for _, imp := range s.imports {
			if wellKnown()[imp.name] != nil {
				continue
			}
			q, ok := f.lookup(imp.name)
			if !ok && !linked(imp.name) {
				if q, ok, err = f.vendored(p, imp.name); err != nil {
					return err
				}
				if !ok {
					missing = append(missing, missingImport{p, imp})
				}
			}
			if ok {
				queue = append(queue, q)
			}
		}
	}
	if len(missing) == 0 || len(f.deps) == 0 {
		return nil // without dependencies, Compile reports each import at its place
	}
	return f.notVendored(missing)
}

type missingImport struct {
	path string
	imp  importLine
}

// vendored searches the whole tree for a file that p imports by name.
func (f *finder) vendored(p, name string) (string, bool, error) {
	if f.everything == nil {
		f.everything = map[string][]string{}
		n := 0
		err := fs.WalkDir(f.Tree, ".", func(q string, d fs.DirEntry, err error) error {
			if err != nil {
				return err
			}
			base := path.Base(q)
			if d.IsDir() && q != "." && (base == "node_modules" || base == "testdata" || strings.HasPrefix(base, ".")) {
				return fs.SkipDir
			}
			if n++; n > maxWalk {
				return fs.SkipAll
			}
			if d.Type().IsRegular() && strings.HasSuffix(base, ".proto") {
				f.everything[base] = append(f.everything[base], q)
			}
			return nil
		})
		if err != nil {
			return "", false, fmt.Errorf("search for imported files: %w", err)
		}
	}
	var best, bestRoot string
	for _, q := range f.everything[path.Base(name)] {
		root, ok := rootOf(q, name)
		if ok && q != p && (best == "" || closer(p, root, bestRoot)) {
			best, bestRoot = q, root
		}
	}
	if best == "" {
		return "", false, nil
	}
	f.also[name] = best
	if !slices.Contains(f.Roots, bestRoot) {
		f.Roots = append(f.Roots, bestRoot)
	}
	return best, true, nil
}

// closer prefers the root that shares more folders with p, then the shorter one.
func closer(p, a, b string) bool {
	ca, cb := common(p, a), common(p, b)
	return cmp.Or(cmp.Compare(cb, ca), cmp.Compare(len(a), len(b)), cmp.Compare(a, b)) < 0
}

func common(a, b string) int {
	as, bs := strings.Split(a, "/"), strings.Split(b, "/")
	n := 0
	for n < len(as) && n < len(bs) && as[n] == bs[n] {
		n++
	}
	return n
}

// origins say which module publishes the files of a folder that is imported often.
var origins = []struct{ prefix, module string }{
	{"buf/validate/", "bufbuild/protovalidate"},
	{"validate/", "envoyproxy/protoc-gen-validate"},
	{"protoc-gen-openapiv2/", "grpc-ecosystem/grpc-gateway"},
	{"gogoproto/", "gogo/protobuf"},
	{"envoy/", "envoyproxy/envoy"},
	{"opentelemetry/", "opentelemetry/opentelemetry"},
	{"google/", "googleapis/googleapis"},
}

func originOf(name string) string {
	for _, o := range origins {
		if strings.HasPrefix(name, o.prefix) {
			return o.module
		}
	}
	return ""
}

func (f *finder) notVendored(missing []missingImport) error {
	m := missing[0]
	var from []string
	for _, d := range f.deps {
		if o := originOf(m.imp.name); o != "" && strings.HasSuffix(d, "/"+o) {
			from = []string{d}
			break
		}
		if !strings.HasSuffix(d, "/googleapis/googleapis") {
			from = append(from, d)
		}
	}
	if len(from) == 0 {
		return nil // only Google's common files: Compile says which one is not there
	}
	words := "the dependency " + from[0]
	if len(from) > 1 {
		words = "one of the dependencies " + strings.Join(from, ", ")
	}
	e := invalid("buf export "+from[0]+" -o "+path.Join(f.Dir, "third_party/proto")+", and commit the folder",
		"%s:%d:%d: %q is not in the repository: it belongs to %s, and a build fetches no protobuf modules",
		m.path, m.imp.line, m.imp.col, m.imp.name, words)
	e.Err = ErrMissingImport
	return e
}
