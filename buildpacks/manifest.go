package buildpacks

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"path"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/m3o/m3o"
	"gopkg.in/yaml.v3"
)

// A Manifest is what m3o.yaml says. The zero Manifest is that of a tree
// without the file.
//
//	build:
//	  dir: services/api      # where go.mod is; default the root
//	  main: ./cmd/server     # the package that becomes the web process
//	health:
//	  grpc: true             # or http: /healthz, or tcp: true; default: found out
//	  timeout: 30s           # how long a start may take
type Manifest struct {
	Dir    string // clean slash path inside the tree, "" for the root
	Main   string // "." or "./cmd/server", "" to find out
	Health m3o.Health
}

const maxManifest = 64 << 10

// ParseManifest reads m3o.yaml; name is what errors call it. It is strict:
// whatever it does not know or cannot honour is an error of kind Invalid that
// begins with "NAME:LINE" and says what to write.
func ParseManifest(name string, b []byte) (Manifest, error) {
	var m Manifest
	if len(b) > maxManifest {
		return m, bad(name, 1, "the file is larger than 64 KB", "see the documentation of m3o.yaml for what it may hold")
	}
	var doc yaml.Node
	dec := yaml.NewDecoder(bytes.NewReader(b))
	switch err := dec.Decode(&doc); {
	case errors.Is(err, io.EOF):
		return m, nil
	case err != nil:
		return m, yamlError(name, err)
	}
	if err := dec.Decode(new(yaml.Node)); !errors.Is(err, io.EOF) {
		return m, bad(name, doc.Line, "the file has more than one document", "remove everything from the second --- on")
	}
	if len(doc.Content) == 0 || doc.Content[0].Tag == "!!null" {
		return m, nil
	}
	f := fields{file: name}
	f.read(doc.Content[0], "", map[string]func(*yaml.Node){
		"build": func(n *yaml.Node) {
			f.read(n, "build.", map[string]func(*yaml.Node){
				"dir":  func(n *yaml.Node) { m.Dir = f.dir(n) },
				"main": func(n *yaml.Node) { m.Main = f.pkg(n) },
			})
		},
		"health": func(n *yaml.Node) { f.health(n, &m.Health) },
	})
	return m, f.err
}

var yamlLine = regexp.MustCompile(`^yaml: (?:line (\d+): )?(.*)`)

func yamlError(name string, err error) error {
	line, what := 1, err.Error()
	if m := yamlLine.FindStringSubmatch(what); m != nil {
		what = m[2]
		if n, err := strconv.Atoi(m[1]); err == nil {
			line = n
		}
	}
	return bad(name, line, "not YAML: "+what, "check the indentation and the colons")
}

// fields reads a YAML tree and keeps the first fault.
type fields struct {
	file string
	err  error
}

func (f *fields) fail(n *yaml.Node, what, fix string) {
	if f.err == nil {
		f.err = bad(f.file, n.Line, what, fix)
	}
}

// read calls the function of each key of a mapping.
func (f *fields) read(n *yaml.Node, prefix string, known map[string]func(*yaml.Node)) {
	if n.Kind != yaml.MappingNode {
		what := strings.TrimSuffix(prefix, ".")
		if what == "" {
			what = "the file"
		}
		f.fail(n, what+" is not a list of \"key: value\" lines", "write for example:\nbuild:\n  dir: services/api")
		return
	}
	seen := map[string]bool{}
	for i := 0; i+1 < len(n.Content); i += 2 {
		k, v := n.Content[i], n.Content[i+1]
		set, ok := known[k.Value]
		switch {
		case k.Kind != yaml.ScalarNode || !ok:
			keys := make([]string, 0, len(known))
			for k := range known {
				keys = append(keys, k)
			}
			f.fail(k, fmt.Sprintf("unknown key %q", short(prefix+k.Value)), "did you mean "+prefix+nearest(k.Value, keys)+"?")
		case seen[k.Value]:
			f.fail(k, prefix+k.Value+" is there twice", "keep one of them")
		default:
			seen[k.Value] = true
			set(v)
		}
	}
}

func (f *fields) text(n *yaml.Node) string {
	if n.Kind != yaml.ScalarNode || n.Tag == "!!null" || n.Value == "" {
		f.fail(n, "a value is missing", "write it after the colon, or remove the key")
		return ""
	}
	return n.Value
}

func (f *fields) dir(n *yaml.Node) string {
	v := f.text(n)
	p := path.Clean(v)
	if path.IsAbs(p) || p == ".." || strings.HasPrefix(p, "../") {
		f.fail(n, fmt.Sprintf("build.dir %q leads out of the tree", short(v)), "write a path relative to the root of the repository")
		return ""
	}
	if p == "." {
		return ""
	}
	return p
}

func (f *fields) pkg(n *yaml.Node) string {
	v := f.text(n)
	p := path.Clean(v)
	if path.IsAbs(p) || p == ".." || strings.HasPrefix(p, "../") {
		f.fail(n, fmt.Sprintf("build.main %q leads out of the module", short(v)), "write a folder of the module, such as ./cmd/server")
		return ""
	}
	if p == "." {
		return p
	}
	return "./" + p
}

func (f *fields) health(n *yaml.Node, h *m3o.Health) {
	kind := func(n *yaml.Node, k string) {
		if h.Kind != "" {
			f.fail(n, "health has both "+h.Kind+" and "+k, "keep one of them")
		}
		h.Kind = k
	}
	yes := func(n *yaml.Node, k string) {
		if n.Kind != yaml.ScalarNode || n.Value != "true" {
			f.fail(n, fmt.Sprintf("health.%s is %q", k, short(n.Value)), "write "+k+": true, or remove the key")
		}
	}
	f.read(n, "health.", map[string]func(*yaml.Node){
		"grpc": func(n *yaml.Node) { kind(n, "grpc"); yes(n, "grpc") },
		"tcp":  func(n *yaml.Node) { kind(n, "tcp"); yes(n, "tcp") },
		"http": func(n *yaml.Node) {
			kind(n, "http")
			h.Path = f.text(n)
			if !strings.HasPrefix(h.Path, "/") || strings.ContainsAny(h.Path, " \r\n\t#") {
				f.fail(n, fmt.Sprintf("health.http %q is not a path", short(h.Path)), "write for example: http: /healthz")
			}
		},
		"timeout": func(n *yaml.Node) {
			d, err := time.ParseDuration(f.text(n))
			if err != nil || d < time.Second || d > time.Hour {
				f.fail(n, fmt.Sprintf("health.timeout is %q", short(n.Value)), "write a time from 1s to 1h, such as 30s")
				return
			}
			h.Timeout = d
		},
	})
}

// nearest is the known word with the least edit distance.
func nearest(word string, known []string) string {
	slices.Sort(known)
	return slices.MinFunc(known, func(a, b string) int { return distance(word, a) - distance(word, b) })
}

func distance(a, b string) int {
	if len(a) > 64 {
		a = a[:64]
	}
	row := make([]int, len(b)+1)
	for j := range row {
		row[j] = j
	}
	for i := range len(a) {
		diag := row[0]
		row[0] = i + 1
		for j := range len(b) {
			cost := diag
			if a[i] != b[j] {
				cost++
			}
			diag = row[j+1]
			row[j+1] = min(cost, row[j]+1, diag+1)
		}
	}
	return row[len(b)]
}
