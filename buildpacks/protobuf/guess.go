package protobuf

import (
	"cmp"
	"fmt"
	"maps"
	"path"
	"regexp"
	"slices"
	"strings"
)

// guess chooses the files and names them without buf files.
func (f *finder) guess() error {
	base := f.Dir
	proto := path.Join(f.Dir, "proto")
	var mine []string
	for _, p := range f.protos {
		if _, ok := below(proto, p); ok && !isCopy(p) {
			base, mine = proto, append(mine, p)
		}
	}
	if base != proto {
		mine = slices.DeleteFunc(slices.Clone(f.protos), isCopy)
	}
	if len(mine) == 0 {
		return nil
	}
	g := guesser{
		base: base, src: f.Sources,
		byBase: map[string][]string{}, names: map[string]string{}, paths: map[string]string{},
		from: map[string]string{}, via: map[string]string{}, uses: map[string]int{},
	}
	for _, p := range f.protos {
		if !isCopy(p) {
			g.byBase[path.Base(p)] = append(g.byBase[path.Base(p)], p)
		}
	}
	for _, p := range mine {
		s, err := f.scan(p)
		if err != nil {
			return err
		}
		for _, imp := range s.imports {
			if !linked(imp.name) {
				if err := g.imported(p, imp); err != nil {
					return err
				}
			}
		}
	}
	for _, name := range f.sourceHints() {
		g.hint(mine, name)
	}
	// What is imported from beside the folder proto is compiled as a
	// dependency; only what lies in it is the app's.
	f.Files = g.files(mine)
	f.Roots = append(f.Roots, base)
	for _, r := range slices.SortedFunc(maps.Keys(g.uses), func(a, b string) int {
		return cmp.Or(cmp.Compare(g.uses[b], g.uses[a]), cmp.Compare(a, b))
	}) {
		if r != moduleRoot && !slices.Contains(f.Roots, r) {
			f.Roots = append(f.Roots, r)
		}
	}
	if !slices.Contains(f.Roots, f.Dir) {
		f.Roots = append(f.Roots, f.Dir)
	}
	return nil
}

// guesser finds import roots from the imports themselves: if a/b/x.proto is
// imported as "b/x.proto", then a is a root.
type guesser struct {
	base   string
	src    Sources
	byBase map[string][]string // last element → paths
	names  map[string]string   // path → name
	paths  map[string]string   // name → path
	from   map[string]string   // path → who imported it first, as file:line:col
	via    map[string]string   // importing path → root that its first import used
	uses   map[string]int      // root → imports that it resolves
}

// imported notes that the file p imports a name.
func (g *guesser) imported(p string, imp importLine) error {
	var best, bestRoot string
	for _, q := range g.byBase[path.Base(imp.name)] {
		root, ok := g.rootOf(q, imp.name)
		if ok && (best == "" || g.nearer(p, root, bestRoot)) {
			best, bestRoot = q, root
		}
	}
	if best == "" || best == p {
		return nil // vendored, or missing: resolve finds out; importing itself: Compile says so
	}
	at := fmt.Sprintf("%s:%d:%d", p, imp.line, imp.col)
	if n, ok := g.names[best]; ok && n != imp.name {
		return invalid("import it by one name everywhere, relative to one folder",
			"%s: %s is imported as %q here and as %q at %s", at, best, imp.name, n, g.from[best])
	}
	if q, ok := g.paths[imp.name]; ok && q != best {
		return invalid("write a buf.yaml that names the modules, or set build.dir in m3o.yaml to one of the services",
			"%s: %q is %s here, but %s at %s", at, imp.name, best, q, g.from[q])
	}
	if _, ok := g.names[best]; !ok {
		g.names[best], g.paths[imp.name], g.from[best] = imp.name, best, at
	}
	if g.via[p] == "" {
		g.via[p] = bestRoot
	}
	g.uses[bestRoot]++
	return nil
}

// rootOf is the folder that a file of that path is called name from.
func rootOf(p, name string) (string, bool) {
	if p == name {
		return ".", true
	}
	root, ok := strings.CutSuffix(p, "/"+name)
	return root, ok && root != ""
}

// moduleRoot stands for the folder that would hold the Go module in GOPATH/src:
// imports begin with the module's path.
const moduleRoot = "\x00module"

func (g *guesser) rootOf(p, name string) (string, bool) {
	if root, ok := rootOf(p, name); ok {
		return root, true
	}
	q, ok := g.src.ofModule(name)
	return moduleRoot, ok && p == q
}

// nameFrom is what a file is called from a root.
func (g *guesser) nameFrom(root, p string) (string, bool) {
	if root != moduleRoot {
		return below(root, p)
	}
	m, ok := moduleOf(g.src.modules, p)
	return m.importPath(p), ok
}

// nearer prefers the base, then a root around the importing file, the closest
// first, then the shortest.
func (g *guesser) nearer(p, a, b string) bool {
	if a == b {
		return false
	}
	if a == g.base || b == g.base {
		return a == g.base
	}
	_, ina := below(a, p)
	_, inb := below(b, p)
	if ina != inb {
		return ina
	}
	if ina {
		return len(a) > len(b)
	}
	return len(a) < len(b)
}

// hint uses a name that generated code says its source has.
func (g *guesser) hint(mine []string, name string) {
	var hits []string
	for _, p := range mine {
		if _, ok := g.rootOf(p, name); ok {
			hits = append(hits, p)
		}
	}
	if len(hits) == 1 && g.names[hits[0]] == "" {
		root, _ := g.rootOf(hits[0], name)
		g.names[hits[0]] = name
		g.uses[root]++
	}
}

func (g *guesser) files(mine []string) []File {
	count := map[string]int{}
	var files []File
	for _, p := range mine {
		name := g.names[p]
		if name == "" {
			name, _ = g.nameFrom(g.rootFor(p), p)
		}
		count[name]++
		files = append(files, File{Name: name, Path: p})
	}
	for i, file := range files {
		// Two services of a monorepo may each have an api.proto at their own
		// root. Nobody imports them, so a longer name hurts nobody.
		if count[file.Name] > 1 && g.names[file.Path] == "" {
			files[i].Name, _ = below(g.src.Dir, file.Path)
		}
	}
	return files
}

// rootFor chooses the root of a file that nobody imports: the one its own
// imports use, else the one most imports use, else the base.
func (g *guesser) rootFor(p string) string {
	if r := g.via[p]; r != "" {
		if _, ok := g.nameFrom(r, p); ok {
			return r
		}
	}
	best := ""
	for r, n := range g.uses {
		if _, ok := g.nameFrom(r, p); !ok {
			continue
		}
		if best == "" || n > g.uses[best] || n == g.uses[best] && (len(r) > len(best) || len(r) == len(best) && r < best) {
			best = r
		}
	}
	if best != "" {
		return best
	}
	return g.base
}

var sourceLine = regexp.MustCompile(`(?m)^// (?:@generated from file |source: |Source: )(\S+\.proto)\b`)

// sourceHints are the names that the headers of generated files give.
func (f *finder) sourceHints() []string {
	var names []string
	for _, p := range f.Generated[:min(len(f.Generated), maxFiles)] {
		if n := sourceOf(head(f.Tree, p)); n != "" {
			names = append(names, n)
		}
	}
	return sortedSet(names)
}

func sourceOf(head []byte) string {
	if m := sourceLine.FindSubmatch(head); m != nil {
		return string(m[1])
	}
	return ""
}
