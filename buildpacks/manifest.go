package buildpacks

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"regexp"
	"slices"
	"strconv"

	"github.com/m3o/m3o"
	"gopkg.in/yaml.v3"
)

// A Manifest is what m3o.yaml says. The zero Manifest is that of a tree
// without the file. Each area of it has a file here, manifest_AREA.go, with
// its part of the table of keys: parser, JSON Schema (Schema) and reference
// (Reference) are made from that table.
type Manifest struct {
	Build    BuildKeys
	Health   m3o.Health
	HTTP     m3o.HTTP
	Protobuf ProtobufKeys
	Run      RunKeys

	Schedules []m3o.Schedule
	Paths     []string // of files whose change makes a push deploy; none: all
}

// manifestKeys is the table of all keys of m3o.yaml.
func manifestKeys() []key[Manifest] {
	return slices.Concat(
		buildKeys(),
		healthKeys(),
		httpKeys(),
		deployKeys(),
		protobufKeys(),
		runKeys(),
	)
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
	root, err := yamlRoot(name, b)
	if err != nil || root == nil {
		return m, err
	}
	f := fields{file: name, example: "build:\n  dir: services/api"}
	readKeys(&f, root, "", manifestKeys(), &m)
	return m, f.err
}

// yamlRoot returns the root of a file of one YAML document, nil if it is empty.
func yamlRoot(name string, b []byte) (*yaml.Node, error) {
	var doc yaml.Node
	dec := yaml.NewDecoder(bytes.NewReader(b))
	switch err := dec.Decode(&doc); {
	case errors.Is(err, io.EOF):
		return nil, nil
	case err != nil:
		return nil, yamlError(name, err)
	}
	if err := dec.Decode(new(yaml.Node)); !errors.Is(err, io.EOF) {
		return nil, bad(name, doc.Line, "the file has more than one document", "remove everything from the second --- on")
	}
	if len(doc.Content) == 0 || doc.Content[0].Tag == "!!null" {
		return nil, nil
	}
	return doc.Content[0], nil
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
	file    string
	example string // of the whole file
	err     error
}

func (f *fields) fail(n *yaml.Node, what, fix string) {
	if f.err == nil {
		f.err = bad(f.file, n.Line, what, fix)
	}
}

// pairs calls do for each key of a mapping and refuses a key that is there twice.
func (f *fields) pairs(n *yaml.Node, at string, do func(k, v *yaml.Node)) {
	if n.Kind != yaml.MappingNode {
		what, fix := at, "write its keys below it, each indented by two spaces"
		if at == "" {
			what, fix = "the file", "write for example:\n"+f.example
		}
		f.fail(n, what+" is not a list of \"key: value\" lines", fix)
		return
	}
	seen := map[string]bool{}
	for i := 0; i+1 < len(n.Content); i += 2 {
		k, v := n.Content[i], n.Content[i+1]
		if seen[k.Value] {
			f.fail(k, short(join(at, k.Value))+" is there twice", "keep one of them")
			return
		}
		seen[k.Value] = true
		do(k, v)
	}
}

func join(at, name string) string {
	if at == "" {
		return name
	}
	return at + "." + name
}

// readKeys reads a mapping by a table of keys.
func readKeys[T any](f *fields, n *yaml.Node, at string, keys []key[T], into *T) {
	f.pairs(n, at, func(k, v *yaml.Node) {
		i := slices.IndexFunc(keys, func(o key[T]) bool { return k.Kind == yaml.ScalarNode && o.name == k.Value })
		if i < 0 {
			names := make([]string, len(keys))
			for i, o := range keys {
				names[i] = o.name
			}
			f.fail(k, fmt.Sprintf("unknown key %q", short(join(at, k.Value))), "did you mean "+join(at, nearest(k.Value, names))+"?")
			return
		}
		keys[i].read(f, join(at, k.Value), v, into)
	})
}

// text is a scalar's text.
func (f *fields) text(n *yaml.Node) string {
	if n.Kind != yaml.ScalarNode || n.Tag == "!!null" || n.Value == "" {
		f.fail(n, "a value is missing", "write it after the colon, or remove the key")
		return ""
	}
	return n.Value
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
