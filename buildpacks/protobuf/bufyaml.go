package protobuf

import (
	"errors"
	"fmt"
	"io/fs"
	"path"
	"regexp"
	"slices"
	"strconv"
	"strings"

	"gopkg.in/yaml.v3"
)

// The files of the buf tool that are read. Unknown keys are passed over: the
// files are not ours, and buf adds keys.
const (
	bufName     = "buf.yaml"
	bufWorkName = "buf.work.yaml"
	bufLockName = "buf.lock"
	bufGenName  = "buf.gen.yaml"
)

// A bufModule is one import root that buf files name. All paths are paths of
// the tree.
type bufModule struct {
	root     string
	includes []string // nil: everything
	excludes []string
}

// A bufConfig is what buf.yaml, buf.work.yaml and buf.lock say together.
type bufConfig struct {
	modules []bufModule
	deps    []string // sorted full names without versions: host/owner/name
}

type bufYAML struct {
	Version string   `yaml:"version"`
	Deps    []string `yaml:"deps"`
	Build   struct {
		Roots    []string `yaml:"roots"`
		Excludes []string `yaml:"excludes"`
	} `yaml:"build"`
	Modules []struct {
		Path     string   `yaml:"path"`
		Includes []string `yaml:"includes"`
		Excludes []string `yaml:"excludes"`
	} `yaml:"modules"`
}

// parseBufYAML reads a buf.yaml that lies in dir.
func parseBufYAML(name, dir string, b []byte) (bufConfig, error) {
	var y bufYAML
	var c bufConfig
	if err := decodeYAML(name, b, &y); err != nil {
		return c, err
	}
	for _, d := range y.Deps {
		d, _, _ = strings.Cut(d, ":") // a version may follow
		c.deps = append(c.deps, d)
	}
	within := func(list []string, base string) (out []string, err error) {
		for _, p := range list {
			q, err := inside(name, base, p)
			if err != nil {
				return nil, err
			}
			out = append(out, q)
		}
		return out, nil
	}
	switch y.Version {
	case "v2":
		if len(y.Modules) == 0 {
			c.modules = []bufModule{{root: dir}}
		}
		for _, m := range y.Modules {
			root, err := inside(name, dir, m.Path)
			if err != nil {
				return c, err
			}
			mod := bufModule{root: root}
			// Relative to buf.yaml, not to the module.
			if mod.includes, err = within(m.Includes, dir); err != nil {
				return c, err
			}
			if mod.excludes, err = within(m.Excludes, dir); err != nil {
				return c, err
			}
			c.modules = append(c.modules, mod)
		}
	case "v1", "":
		ex, err := within(y.Build.Excludes, dir)
		if err != nil {
			return c, err
		}
		c.modules = []bufModule{{root: dir, excludes: ex}}
	case "v1beta1":
		roots, err := within(y.Build.Roots, dir)
		if err != nil {
			return c, err
		}
		ex, err := within(y.Build.Excludes, dir)
		if err != nil {
			return c, err
		}
		if len(roots) == 0 {
			roots = []string{dir}
		}
		for _, r := range roots {
			c.modules = append(c.modules, bufModule{root: r, excludes: ex})
		}
	default:
		return c, invalid("write version: v2, or v1", "%s: version %q is not known", name, short(y.Version))
	}
	return c, nil
}

// parseBufWork reads the directories of a buf.work.yaml that lies in dir.
func parseBufWork(name, dir string, b []byte) ([]string, error) {
	var y struct {
		Directories []string `yaml:"directories"`
	}
	if err := decodeYAML(name, b, &y); err != nil {
		return nil, err
	}
	var dirs []string
	for _, d := range y.Directories {
		p, err := inside(name, dir, d)
		if err != nil {
			return nil, err
		}
		dirs = append(dirs, p)
	}
	if len(dirs) == 0 {
		return nil, invalid("list the folders of the modules under directories:", "%s: directories is empty", name)
	}
	return dirs, nil
}

// parseBufLock reads the names of the dependencies of a buf.lock.
func parseBufLock(name string, b []byte) ([]string, error) {
	var y struct {
		Deps []struct {
			Name       string `yaml:"name"` // v2
			Remote     string `yaml:"remote"`
			Owner      string `yaml:"owner"`
			Repository string `yaml:"repository"`
		} `yaml:"deps"`
	}
	if err := decodeYAML(name, b, &y); err != nil {
		return nil, err
	}
	var deps []string
	for _, d := range y.Deps {
		if n := d.Name; n != "" {
			deps = append(deps, n)
		} else if d.Repository != "" {
			deps = append(deps, path.Join(d.Remote, d.Owner, d.Repository))
		}
	}
	return deps, nil
}

// inside joins a path of a buf file to the folder it is relative to.
func inside(name, dir, p string) (string, error) {
	q := path.Join(dir, p)
	if path.IsAbs(p) || !fs.ValidPath(q) {
		return "", invalid("write a path relative to "+name, "%s: %q leads out of the repository", name, short(p))
	}
	return q, nil
}

var yamlLine = regexp.MustCompile(`(?s)^(?:yaml: )?(?:line (\d+): )?(.*)`)

// wrongKind is yaml.v3's message for a value of another kind, with a Go type in it.
var wrongKind = regexp.MustCompile(`^cannot unmarshal !!\w+ ?(.*?) into .*`)

// decodeYAML reads one document into v. An empty document leaves v as it is.
func decodeYAML(name string, b []byte, v any) error {
	if len(b) > maxConfig {
		return invalid("", "%s: the file is larger than %d KB", name, maxConfig>>10)
	}
	err := yaml.Unmarshal(b, v)
	if err == nil {
		return nil
	}
	what := err.Error()
	if te, ok := errors.AsType[*yaml.TypeError](err); ok && len(te.Errors) > 0 {
		what = te.Errors[0]
	}
	at := name
	if m := yamlLine.FindStringSubmatch(what); m != nil {
		if n, err := strconv.Atoi(m[1]); err == nil {
			at = fmt.Sprintf("%s:%d", name, n)
		}
		what = m[2]
	}
	if m := wrongKind.FindStringSubmatch(what); m != nil {
		what = strings.TrimSpace(m[1] + " does not belong here")
	}
	return invalid("see the documentation of buf for what the file may hold", "%s: %s", at, short(what))
}

// readBuf reads a configuration file; ok says whether it exists.
func readBuf(tree fs.FS, name string) (b []byte, ok bool, err error) {
	b, err = fs.ReadFile(tree, name)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, false, nil
	}
	if err != nil {
		return nil, false, fmt.Errorf("read %s: %w", name, err)
	}
	return b, true, nil
}

// loadBuf reads what buf files in dir say; nil when there are none.
func loadBuf(tree fs.FS, dir string) (*bufConfig, error) {
	var c bufConfig
	work := path.Join(dir, bufWorkName)
	b, ok, err := readBuf(tree, work)
	if err != nil {
		return nil, err
	}
	dirs := []string{dir}
	if ok {
		if dirs, err = parseBufWork(work, dir, b); err != nil {
			return nil, err
		}
	}
	found := ok
	for _, d := range dirs {
		name := path.Join(d, bufName)
		b, has, err := readBuf(tree, name)
		switch {
		case err != nil:
			return nil, err
		case has:
			m, err := parseBufYAML(name, d, b)
			if err != nil {
				return nil, err
			}
			c.modules = append(c.modules, m.modules...)
			c.deps = append(c.deps, m.deps...)
			found = true
		case ok:
			c.modules = append(c.modules, bufModule{root: d})
		}
		name = path.Join(d, bufLockName)
		if b, has, err = readBuf(tree, name); err != nil {
			return nil, err
		} else if has {
			deps, err := parseBufLock(name, b)
			if err != nil {
				return nil, err
			}
			c.deps = append(c.deps, deps...)
		}
	}
	if !found {
		return nil, nil
	}
	c.deps = sortedSet(c.deps)
	return &c, nil
}

func sortedSet(list []string) []string {
	list = slices.Clone(list)
	slices.Sort(list)
	return slices.Compact(list)
}

// short keeps words of outside files from filling the pusher's screen.
func short(s string) string {
	s = strings.Map(func(r rune) rune {
		if r < ' ' || r == 0x7f {
			return ' '
		}
		return r
	}, s)
	if len(s) > 200 {
		return strings.ToValidUTF8(s[:200], "") + "…"
	}
	return s
}
