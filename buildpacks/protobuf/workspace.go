package protobuf

import (
	"errors"
	"io/fs"
	"maps"
	"path"
	"regexp"
	"slices"
	"strings"

	"golang.org/x/mod/modfile"
	"google.golang.org/protobuf/types/descriptorpb"
)

// A moduleDir is a Go module of the tree.
type moduleDir struct{ dir, path string }

// readModule reads the name of the module at dir, if there is one.
func readModule(tree fs.FS, dir string) (m moduleDir, ok bool, err error) {
	b, _, err := readBuf(tree, path.Join(dir, "go.mod"))
	m = moduleDir{dir, modfile.ModulePath(b)}
	return m, m.path != "", err
}

// importPath is that of a folder of the module; of a file it is the name that
// it would have below GOPATH/src.
func (m moduleDir) importPath(p string) string {
	if rel, ok := below(m.dir, p); ok && rel != "." && p != m.dir {
		return m.path + "/" + rel
	}
	return m.path
}

// moduleOf is the innermost of the modules that a path of the tree is in.
func moduleOf(modules []moduleDir, p string) (moduleDir, bool) {
	best, found := moduleDir{}, false
	for _, m := range modules {
		if _, ok := below(m.dir, p); (ok || p == m.dir) && (!found || best.dir == "." || len(m.dir) > len(best.dir) && m.dir != ".") {
			best, found = m, true
		}
	}
	return best, found
}

// inModules is the path of the tree for an import path of one of the modules.
func inModules(modules []moduleDir, imp string) (string, bool) {
	best, found := moduleDir{}, false
	for _, m := range modules {
		if (imp == m.path || strings.HasPrefix(imp, m.path+"/")) && (!found || len(m.path) > len(best.path)) {
			best, found = m, true
		}
	}
	return path.Join(best.dir, strings.TrimPrefix(imp[min(len(imp), len(best.path)):], "/")), found
}

// goMods are the go.mod files of the modules.
func (s Sources) goMods() ([]*modfile.File, error) {
	var all []*modfile.File
	for _, m := range s.modules {
		name := path.Join(m.dir, "go.mod")
		b, _, err := readBuf(s.Tree, name)
		if err != nil {
			return nil, err
		}
		f, err := modfile.ParseLax(name, b, nil)
		if err != nil {
			return nil, invalid("", "%s", short(err.Error()))
		}
		if f.Module == nil {
			return nil, invalid("run go mod init", "%s has no module line", name)
		}
		all = append(all, f)
	}
	return all, nil
}

// FindInWorkspace is Find for a build inside a go.work, with the folder of that
// and the folders of the modules it uses.
//
// Where dir is the workspace itself, all of it is searched. Where it is one of
// the modules, so are the others that its Go code imports, directly or not, and
// what lies in no module if one of their packages is made of it. Of what is
// outside dir, Compile keeps the files whose Go package that code imports, and
// what these import: others are the matter of other apps.
func FindInWorkspace(tree fs.FS, dir, work string, modules []string) (Sources, error) {
	dir, work = path.Clean(dir), path.Clean(work)
	if len(modules) == 0 || !fs.ValidPath(dir) {
		return Find(tree, dir)
	}
	w := workspace{tree: tree, dir: dir}
	for _, d := range modules {
		m, ok, err := readModule(tree, path.Clean(d))
		if err != nil {
			return Sources{}, err
		}
		if ok {
			w.modules = append(w.modules, m)
		}
	}
	main, err := w.find(dir, false)
	if err != nil && !errors.Is(err, ErrMissingImport) {
		return main, err
	}
	missing := err
	units, err := w.units(work, &main)
	if err != nil {
		return Sources{}, err
	}
	for _, d := range units {
		s, err := w.find(d, true)
		if errors.Is(err, ErrMissingImport) {
			missing = errors.Join(missing, err)
		} else if err != nil {
			return Sources{}, err
		}
		if err := main.join(s); err != nil {
			return Sources{}, err
		}
	}
	return main, missing
}

type workspace struct {
	tree    fs.FS
	dir     string // what is built
	modules []moduleDir
}

func (w workspace) find(dir string, apart bool) (Sources, error) {
	f := finder{Sources: Sources{Tree: w.tree, Dir: dir, units: []string{dir}, modules: w.modules}, apart: apart}
	err := f.find()
	return f.Sources, err
}

// units are the further folders to search. For a part of the workspace it says
// so in main, and which Go code counts.
func (w workspace) units(work string, main *Sources) ([]string, error) {
	var units []string
	if w.dir == work && !isFile(w.tree, path.Join(work, "go.mod")) {
		for _, m := range w.modules { // a use line may lead out of the folder of go.work
			if _, ok := below(w.dir, m.dir); !ok {
				units = append(units, m.dir)
			}
		}
		return units, nil
	}
	code, reached, err := w.reach()
	if err != nil {
		return nil, err
	}
	main.part, main.code = true, code
	for _, m := range reached {
		if _, ok := below(w.dir, m.dir); !ok && m.dir != w.dir {
			units = append(units, m.dir)
		}
	}
	if w.dir == work || isFile(w.tree, path.Join(work, "go.mod")) {
		return units, nil // there is nothing outside the modules
	}
	makes, err := w.makes(work, code)
	if makes {
		units = append(units, work)
	}
	return units, err
}

// reach follows the imports of the module that is built through the workspace:
// it returns the code of its packages, and the modules they are in.
func (w workspace) reach() (*goCode, []moduleDir, error) {
	all, read := newGoCode(), map[string]bool{}
	home, _ := moduleOf(w.modules, w.dir)
	if err := all.read(w.tree, home.dir); err != nil {
		return nil, nil, err
	}
	read[home.dir] = true
	packages := map[string]bool{}
	var queue []string
	follow := func(imp string) {
		if dir, ok := inModules(w.modules, imp); ok && !packages[dir] {
			packages[dir] = true
			queue = append(queue, dir)
		}
	}
	for imp := range all.imports {
		follow(imp)
	}
	for _, g := range all.gen {
		for _, imp := range g.imports {
			follow(imp)
		}
	}
	for len(queue) > 0 {
		dir := queue[0]
		queue = queue[1:]
		m, _ := moduleOf(w.modules, dir)
		if !read[m.dir] {
			read[m.dir] = true
			if err := all.read(w.tree, m.dir); err != nil {
				return nil, nil, err
			}
		}
		for _, h := range all.files {
			if path.Dir(h.path) == dir && !strings.HasSuffix(h.path, "_test.go") {
				for imp := range h.imports {
					follow(imp)
				}
			}
		}
		for _, g := range all.gen {
			if path.Dir(g.path) == dir {
				for _, imp := range g.imports {
					follow(imp)
				}
			}
		}
	}
	code := newGoCode()
	code.gen, code.pkg = all.gen, all.pkg
	for _, h := range all.files {
		at, test := path.Dir(h.path), strings.HasSuffix(h.path, "_test.go")
		if m, _ := moduleOf(w.modules, h.path); m.dir != home.dir && (test || !packages[at]) {
			continue
		}
		code.files = append(code.files, h)
		code.byHand[at] = code.byHand[at] || !test
		for imp := range h.imports {
			code.imports[imp] = true
		}
	}
	return code, slices.DeleteFunc(slices.Clone(w.modules), func(m moduleDir) bool { return !read[m.dir] }), nil
}

var goPackageLine = regexp.MustCompile(`(?m)^\s*option\s+go_package\s*=\s*"([^";]+)`)

// makes says whether what lies in the workspace and in no module is the source
// of packages that the code imports: by its go_package, or as a buf.gen.yaml
// beside it may say.
func (w workspace) makes(work string, code *goCode) (bool, error) {
	if isFile(w.tree, path.Join(work, bufGenName)) {
		return true, nil
	}
	f := finder{Sources: Sources{Tree: w.tree, Dir: work}, apart: true}
	if err := f.walk(); err != nil {
		return false, err
	}
	for _, p := range f.protos {
		m := goPackageLine.FindSubmatch(head(w.tree, p))
		if m != nil && (code.imports[string(m[1])] || code.imports[string(m[1])+"/"+path.Base(string(m[1]))+"connect"]) {
			return true, nil
		}
	}
	return false, nil
}

// join adds what was found in another folder. All names are in one space, as
// they are in a Go program.
func (s *Sources) join(o Sources) error {
	byName, byPath := map[string]string{}, map[string]bool{}
	for _, f := range s.Files {
		byName[f.Name], byPath[f.Path] = f.Path, true
	}
	for _, f := range o.Files {
		switch other, taken := byName[f.Name]; {
		case byPath[f.Path]:
			continue
		case taken:
			return invalid("move one into a folder that tells them apart, such as the one its package names",
				"%s and %s are both %q to those who import them", other, f.Path, f.Name)
		}
		s.Files = append(s.Files, f)
	}
	slices.SortFunc(s.Files, func(a, b File) int { return strings.Compare(a.Name, b.Name) })
	for _, r := range o.Roots {
		if !slices.Contains(s.Roots, r) {
			s.Roots = append(s.Roots, r)
		}
	}
	for name, p := range o.also {
		if _, ok := s.also[name]; !ok {
			s.also[name] = p
		}
	}
	s.Generated = sortedSet(append(s.Generated, o.Generated...))
	s.Notes = append(s.Notes, o.Notes...)
	s.units = append(s.units, o.units...)
	return nil
}

// leaveOthers drops the files outside Dir that its code does not need.
func (l *layout) leaveOthers() {
	res := l.res
	mine := func(f *goFile) bool {
		_, ok := below(res.Sources.Dir, f.path)
		return ok || f.needed
	}
	l.files = slices.DeleteFunc(l.files, func(f *goFile) bool { return !mine(f) })
	maps.DeleteFunc(l.byName, func(_ string, f *goFile) bool { return !mine(f) })
	res.Sources.Files = slices.DeleteFunc(slices.Clone(res.Sources.Files), func(f File) bool { return l.byName[f.Name] == nil })
	res.Set = &descriptorpb.FileDescriptorSet{File: closure(res.Set, namesOf(l.files))}
}
