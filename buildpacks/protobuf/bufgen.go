package protobuf

import (
	"path"
	"slices"
	"strings"

	"gopkg.in/yaml.v3"
)

// A bufRun is one run that buf.gen.yaml asks for of a plugin that is run here.
type bufRun struct {
	dir     string // of buf.gen.yaml
	plugin  string // genGo, genGRPC or genConnect
	out     string // folder of the tree
	opts    []string
	managed *managed
}

// managed is what buf's managed mode does to go_package.
type managed struct {
	prefixes []goPackageRule // the last that matches wins
	disabled []goPackageRule
}

// A goPackageRule applies to files at or below path, "" for all. One that is
// for another module's files never applies to the app's own.
type goPackageRule struct {
	path   string
	value  string
	whole  bool // value is the go_package, not its prefix
	module string
}

type bufGenYAML struct {
	Version string `yaml:"version"`
	Managed struct {
		Enabled  bool      `yaml:"enabled"`
		Prefix   yaml.Node `yaml:"go_package_prefix"` // v1
		Override yaml.Node `yaml:"override"`          // v2: a list; v1: a mapping of options
		Disable  []struct {
			Option string `yaml:"file_option"`
			Path   string `yaml:"path"`
			Module string `yaml:"module"`
		} `yaml:"disable"`
	} `yaml:"managed"`
	Plugins []struct {
		Plugin  string    `yaml:"plugin"` // v1
		Name    string    `yaml:"name"`   // v1, older
		Remote  string    `yaml:"remote"`
		Local   yaml.Node `yaml:"local"` // v2: a name or argv
		Builtin string    `yaml:"protoc_builtin"`
		Out     string    `yaml:"out"`
		Opt     yaml.Node `yaml:"opt"` // a string or a list
	} `yaml:"plugins"`
}

// remotePlugins are the hosted names of the plugins that are run here. They
// are compared without host and version.
var remotePlugins = map[string]string{
	"protocolbuffers/go":      genGo,
	"library/plugins/go":      genGo,
	"grpc/go":                 genGRPC,
	"library/plugins/go-grpc": genGRPC,
	"connectrpc/go":           genConnect,
	"connectrpc/gosimple":     genConnect,
	"bufbuild/connect-go":     genConnect,
}

// readGen reads the buf.gen.yaml files of the folders that were searched, and
// of the workspace's modules, into l.runs.
func (l *layout) readGen() error {
	dirs := slices.Clone(l.res.Sources.units)
	for _, m := range l.res.Sources.modules {
		dirs = append(dirs, m.dir)
	}
	for _, dir := range sortedSet(dirs) {
		name := path.Join(dir, bufGenName)
		b, ok, err := readBuf(l.res.Sources.Tree, name)
		if err != nil {
			return err
		}
		if !ok {
			continue
		}
		runs, notes, err := parseBufGen(name, dir, b)
		if err != nil {
			return err
		}
		l.genDirs = append(l.genDirs, dir)
		l.runs = append(l.runs, runs...)
		l.notes = append(l.notes, notes...)
	}
	return nil
}

// genDir is the folder of the buf.gen.yaml that counts for a file: the nearest
// one in the folder that was searched for it. "" for none.
func (l *layout) genDir(f *goFile) string {
	unit := innermost(l.res.Sources.units, f.path)
	dir := innermost(l.genDirs, f.path)
	if _, ok := below(unit, dir); !ok && dir != unit {
		return ""
	}
	return dir
}

// innermost is the folder that a path is below, the nearest of several, "" for none.
func innermost(dirs []string, p string) string {
	best := ""
	for _, d := range dirs {
		if _, ok := below(d, p); ok && (best == "" || best == "." || len(d) > len(best) && d != ".") {
			best = d
		}
	}
	return best
}

// filesOf are the files that a run is for.
func (l *layout) filesOf(r bufRun) []*goFile {
	return slices.DeleteFunc(slices.Clone(l.files), func(f *goFile) bool { return l.genDir(f) != r.dir })
}

// bufParameter is what the plugin of a run gets: what its buf.gen.yaml says of
// its files, and where the files of others are that they may import.
func (l *layout) bufParameter(r bufRun) string {
	opts := []string{r.parameter(l.filesOf(r))}
	if opts[0] == "" {
		opts = nil
	}
	for _, f := range l.files {
		if f.imp != "" && l.genDir(f) != r.dir {
			opts = append(opts, "M"+f.name+"="+f.imp+";"+f.pkg)
		}
	}
	return strings.Join(opts, ",")
}

func parseBufGen(name, dir string, b []byte) (runs []bufRun, notes []string, err error) {
	var y bufGenYAML
	if err := decodeYAML(name, b, &y); err != nil {
		return nil, nil, err
	}
	man, err := y.managedMode(name)
	if err != nil {
		return nil, nil, err
	}
	for _, p := range y.Plugins {
		local, err := words(name, "local", p.Local)
		if err != nil {
			return nil, nil, err
		}
		opts, err := words(name, "opt", p.Opt)
		if err != nil {
			return nil, nil, err
		}
		var split []string
		for _, o := range opts {
			for o := range strings.SplitSeq(o, ",") {
				if o = strings.TrimSpace(o); o != "" {
					split = append(split, o)
				}
			}
		}
		called := firstOf(p.Remote, p.Plugin, p.Name, p.Builtin)
		if len(local) > 0 {
			called = local[len(local)-1] // also: go run PACKAGE, go tool NAME
		}
		plugin, remote := pluginOf(called)
		if plugin == "" {
			if called != "" {
				notes = append(notes, name+": "+short(called)+" is not run here: commit what it makes")
			}
			continue
		}
		if remote {
			notes = append(notes, name+": "+short(called)+" is run as "+plugin+" of the version in go.mod")
		}
		if p.Out == "" {
			return nil, nil, invalid("write out: and a folder", "%s: plugin %s has no out", name, short(called))
		}
		out, err := inside(name, dir, p.Out)
		if err != nil {
			return nil, nil, err
		}
		if plugin == genConnect && strings.Contains(called, "/gosimple") {
			split = append(split, "simple")
		}
		runs = append(runs, bufRun{dir: dir, plugin: plugin, out: out, opts: split, managed: man})
	}
	return runs, notes, nil
}

func firstOf(list ...string) string {
	i := slices.IndexFunc(list, func(s string) bool { return s != "" })
	if i < 0 {
		return ""
	}
	return list[i]
}

// pluginOf knows a plugin by the name of its program, with or without
// protoc-gen-, by its package, or by its hosted name.
func pluginOf(called string) (plugin string, remote bool) {
	name, _, _ := strings.Cut(called, "@")
	if strings.Contains(name, "/") {
		hosted, _, _ := strings.Cut(name, ":")
		_, rest, _ := strings.Cut(hosted, "/")
		if p := remotePlugins[rest]; p != "" {
			return p, true
		}
	}
	name = strings.TrimSuffix(path.Base(name), ".exe")
	for _, p := range []string{genGo, genGRPC, genConnect} {
		if name == p || "protoc-gen-"+name == p {
			return p, false
		}
	}
	return "", false
}

// words reads a string or a list of strings.
func words(file, key string, n yaml.Node) ([]string, error) {
	var list []string
	switch n.Kind {
	case 0:
		return nil, nil
	case yaml.ScalarNode:
		if n.Tag == "!!null" {
			return nil, nil
		}
		return []string{n.Value}, nil
	}
	if err := n.Decode(&list); err != nil {
		return nil, invalid("write a string or a list of strings", "%s:%d: %s is neither a string nor a list of strings", file, n.Line, key)
	}
	return list, nil
}

func (y *bufGenYAML) managedMode(file string) (*managed, error) {
	if !y.Managed.Enabled {
		return nil, nil
	}
	m := &managed{}
	if y.Managed.Prefix.Kind == yaml.MappingNode { // v1
		var p struct {
			Default string `yaml:"default"`
		}
		if err := y.Managed.Prefix.Decode(&p); err != nil {
			return nil, invalid("", "%s:%d: go_package_prefix is not a mapping with a default", file, y.Managed.Prefix.Line)
		}
		if p.Default != "" {
			m.prefixes = append(m.prefixes, goPackageRule{value: p.Default})
		}
	}
	switch y.Managed.Override.Kind {
	case yaml.SequenceNode: // v2
		var rules []struct {
			Option string    `yaml:"file_option"`
			Value  yaml.Node `yaml:"value"`
			Path   string    `yaml:"path"`
			Module string    `yaml:"module"`
		}
		if err := y.Managed.Override.Decode(&rules); err != nil {
			return nil, invalid("", "%s:%d: managed.override is not a list of rules", file, y.Managed.Override.Line)
		}
		for _, r := range rules {
			if r.Option == "go_package" || r.Option == "go_package_prefix" {
				m.prefixes = append(m.prefixes, goPackageRule{path: r.Path, value: r.Value.Value, whole: r.Option == "go_package", module: r.Module})
			}
		}
	case yaml.MappingNode: // v1: option → file → value
		var rules map[string]yaml.Node
		if err := y.Managed.Override.Decode(&rules); err != nil {
			return nil, invalid("", "%s:%d: managed.override is not a mapping", file, y.Managed.Override.Line)
		}
		if n, ok := rules["GO_PACKAGE"]; ok {
			var files map[string]string
			if err := n.Decode(&files); err != nil {
				return nil, invalid("", "%s:%d: GO_PACKAGE is not a mapping of files to packages", file, n.Line)
			}
			for f, v := range files {
				m.prefixes = append(m.prefixes, goPackageRule{path: f, value: v, whole: true})
			}
		}
	}
	for _, d := range y.Managed.Disable {
		if d.Option == "" || d.Option == "go_package" || d.Option == "go_package_prefix" {
			m.disabled = append(m.disabled, goPackageRule{path: d.Path, module: d.Module})
		}
	}
	return m, nil
}

func (r goPackageRule) matches(f *goFile) bool {
	if r.module != "" {
		return false
	}
	return r.path == "" || anyAbove([]string{path.Clean(r.path)}, f.name) || anyAbove([]string{path.Clean(r.path)}, f.path)
}

// goPackage is what managed mode makes go_package of a file; "" leaves it.
func (m *managed) goPackage(f *goFile) string {
	if m == nil {
		return ""
	}
	for _, d := range m.disabled {
		if d.matches(f) {
			return ""
		}
	}
	pkg := ""
	for _, r := range m.prefixes {
		switch {
		case !r.matches(f) || r.value == "":
		case r.whole:
			pkg = r.value
		default:
			pkg = path.Join(r.value, path.Dir(f.name)) + ";" + managedName(f)
		}
	}
	return pkg
}

// managedName is buf's Go package name: shopv1 for shop.v1, else the last
// element of the package or of the folder.
func managedName(f *goFile) string {
	parts := strings.Split(f.desc.GetPackage(), ".")
	last := parts[len(parts)-1]
	switch {
	case last == "":
		return goIdent(path.Base(path.Dir(f.name)))
	case len(parts) > 1 && versioned(last):
		return parts[len(parts)-2] + last
	}
	return last
}

// versioned says whether a part of a package is a version: v1, v1beta2, v1alpha.
func versioned(s string) bool {
	if len(s) < 2 || s[0] != 'v' || s[1] < '1' || s[1] > '9' {
		return false
	}
	rest := strings.TrimLeft(s[1:], "0123456789")
	for _, word := range []string{"alpha", "beta", "test"} {
		if r, ok := strings.CutPrefix(rest, word); ok {
			return strings.TrimLeft(r, "0123456789") == "" || word == "test"
		}
	}
	return rest == "" || strings.HasPrefix(rest, "p")
}

// parameter is what the plugin gets: the options, and managed mode's packages.
func (r bufRun) parameter(files []*goFile) string {
	opts := slices.Clone(r.opts)
	for _, f := range files {
		if pkg := r.managed.goPackage(f); pkg != "" && !slices.ContainsFunc(r.opts, func(o string) bool { return strings.HasPrefix(o, "M"+f.name+"=") }) {
			opts = append(opts, "M"+f.name+"="+pkg)
		}
	}
	return strings.Join(opts, ",")
}
