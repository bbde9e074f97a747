package buildpacks

import (
	"encoding/json"
	"fmt"
	"maps"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	"gopkg.in/yaml.v3"
)

// A key is one key of a mapping that fills a T: its name, what it is for, what
// JSON Schema says of its value, and how the value is read. The functions
// below make the usual kinds; a key with rules of its own is written out.
type key[T any] struct {
	name   string
	doc    string // one or two sentences, Markdown
	schema schema
	read   func(f *fields, at string, n *yaml.Node, into *T)
}

// A schema is one JSON Schema.
type schema map[string]any

// A check says what is wrong with a text and what to write; "" is fine.
type check func(v string) (what, fix string)

// text is a key whose value is one text.
func text[T any](name, doc string, ok check, field func(*T) *string) key[T] {
	return key[T]{name, doc, schema{"type": "string", "minLength": 1}, func(f *fields, at string, n *yaml.Node, into *T) {
		*field(into) = f.checked(at, n, ok)
	}}
}

func (f *fields) checked(at string, n *yaml.Node, ok check) string {
	v := f.text(n)
	if f.err == nil && ok != nil {
		if what, fix := ok(v); what != "" {
			f.fail(n, fmt.Sprintf("%s %q %s", at, short(v), what), fix)
			return ""
		}
	}
	return v
}

// matching accepts what re matches as a whole.
func matching(re *regexp.Regexp, what, fix string) check {
	return func(v string) (string, string) {
		if re.FindString(v) != v {
			return what, fix
		}
		return "", ""
	}
}

// choice is a key whose value is one of a few words.
func choice[T any](name, doc string, words []string, field func(*T) *string) key[T] {
	return key[T]{name, doc, schema{"enum": words}, func(f *fields, at string, n *yaml.Node, into *T) {
		v := f.text(n)
		for _, w := range words {
			if v == w {
				*field(into) = v
				return
			}
		}
		f.fail(n, fmt.Sprintf("%s is %q", at, short(v)), "write one of: "+strings.Join(words, ", "))
	}}
}

// flag is a key that is true or false.
func flag[T any](name, doc string, field func(*T) *bool) key[T] {
	return key[T]{name, doc, schema{"type": "boolean"}, func(f *fields, at string, n *yaml.Node, into *T) {
		v := n.Value
		if n.Kind != yaml.ScalarNode || v != "true" && v != "false" {
			f.fail(n, fmt.Sprintf("%s is %q", at, short(v)), "write true or false")
			return
		}
		*field(into) = v == "true"
	}}
}

// integer is a key whose value is a whole number in a range.
func integer[T any](name, doc string, low, high int, field func(*T) *int) key[T] {
	return key[T]{name, doc, schema{"type": "integer", "minimum": low, "maximum": high}, func(f *fields, at string, n *yaml.Node, into *T) {
		i, err := strconv.Atoi(f.text(n))
		if err != nil || i < low || i > high {
			f.fail(n, fmt.Sprintf("%s is %q", at, short(n.Value)), fmt.Sprintf("write a whole number from %d to %d", low, high))
			return
		}
		*field(into) = i
	}}
}

// duration is a key whose value is a time such as 30s.
func duration[T any](name, doc string, low, high time.Duration, field func(*T) *time.Duration) key[T] {
	return key[T]{name, doc, schema{"type": "string", "pattern": `^([0-9]+(\.[0-9]+)?(ns|us|µs|ms|s|m|h))+$`}, func(f *fields, at string, n *yaml.Node, into *T) {
		d, err := time.ParseDuration(f.text(n))
		if err != nil || d < low || d > high {
			f.fail(n, fmt.Sprintf("%s is %q", at, short(n.Value)), fmt.Sprintf("write a time from %s to %s, such as 30s", brief(low), brief(high)))
			return
		}
		*field(into) = d
	}}
}

// brief is 1h for what time prints as 1h0m0s.
func brief(d time.Duration) string {
	s := d.String()
	if strings.HasSuffix(s, "m0s") {
		s = strings.TrimSuffix(s, "0s")
	}
	if strings.HasSuffix(s, "h0m") {
		s = strings.TrimSuffix(s, "0m")
	}
	return s
}

// texts is a key whose value is a list of texts.
func texts[T any](name, doc string, ok check, field func(*T) *[]string) key[T] {
	return key[T]{name, doc, schema{"type": "array", "items": schema{"type": "string", "minLength": 1}}, func(f *fields, at string, n *yaml.Node, into *T) {
		f.items(at, n, func(at string, n *yaml.Node) {
			*field(into) = append(*field(into), f.checked(at, n, ok))
		})
	}}
}

// items calls do for each item of a list.
func (f *fields) items(at string, n *yaml.Node, do func(at string, n *yaml.Node)) {
	if n.Kind != yaml.SequenceNode {
		f.fail(n, at+" is not a list", "write each item on a line of its own that begins with \"- \"")
		return
	}
	for i, c := range n.Content {
		do(fmt.Sprintf("%s[%d]", at, i), c)
	}
}

// table is a key whose value maps names to texts.
func table[T any](name, doc string, names check, field func(*T) *map[string]string) key[T] {
	s := schema{"type": "object", "additionalProperties": schema{"type": []string{"string", "number", "boolean"}}}
	return key[T]{name, doc, s, func(f *fields, at string, n *yaml.Node, into *T) {
		out := map[string]string{}
		f.pairs(n, at, func(k, v *yaml.Node) {
			name := f.checked(at+": the name", k, names)
			if v.Kind != yaml.ScalarNode || v.Tag == "!!null" {
				f.fail(v, join(at, short(k.Value))+" has no text", "write it after the colon, or \"\" for none")
			}
			out[name] = v.Value
		})
		*field(into) = out
	}}
}

// group is a key whose value is a mapping with keys of its own.
func group[T, U any](name, doc string, field func(*T) *U, keys []key[U]) key[T] {
	return key[T]{name, doc, objectSchema(keys), func(f *fields, at string, n *yaml.Node, into *T) {
		readKeys(f, n, at, keys, field(into))
	}}
}

// each is a key whose value maps names of the user's choice to mappings with
// the same keys.
func each[T, U any](name, doc string, names check, field func(*T) *map[string]U, keys []key[U]) key[T] {
	s := schema{"type": "object", "additionalProperties": objectSchema(keys)}
	return key[T]{name, doc, s, func(f *fields, at string, n *yaml.Node, into *T) {
		out := map[string]U{}
		f.pairs(n, at, func(k, v *yaml.Node) {
			var u U
			name := f.checked(at+": the name", k, names)
			readKeys(f, v, join(at, name), keys, &u)
			out[name] = u
		})
		*field(into) = out
	}}
}

// list is a key whose value is a list of mappings with the same keys.
func list[T, U any](name, doc string, field func(*T) *[]U, keys []key[U]) key[T] {
	s := schema{"type": "array", "items": objectSchema(keys)}
	return key[T]{name, doc, s, func(f *fields, at string, n *yaml.Node, into *T) {
		f.items(at, n, func(at string, n *yaml.Node) {
			var u U
			readKeys(f, n, at, keys, &u)
			*field(into) = append(*field(into), u)
		})
	}}
}

func objectSchema[T any](keys []key[T]) schema {
	props := schema{}
	for _, k := range keys {
		p := schema{"description": k.doc}
		for name, v := range k.schema {
			p[name] = v
		}
		props[k.name] = p
	}
	return schema{"type": "object", "properties": props, "additionalProperties": false}
}

// Schema is the JSON Schema of m3o.yaml, for editors.
func Schema() []byte {
	s := objectSchema(manifestKeys())
	s["$schema"] = "https://json-schema.org/draft/2020-12/schema"
	s["title"] = "m3o.yaml"
	s["description"] = "How m3o builds and runs the repository this file is in the root of."
	return encodeSchema(s)
}

func encodeSchema(s schema) []byte {
	b, err := json.MarshalIndent(s, "", "  ")
	if err != nil {
		panic(err) // maps, lists and texts only
	}
	return append(b, '\n')
}

// Reference is the list of all keys of m3o.yaml as a Markdown table, in the
// order of the table of keys.
func Reference() string {
	var b strings.Builder
	b.WriteString("| key | value | meaning |\n| --- | --- | --- |\n")
	reference(&b, "", objectSchema(manifestKeys()))
	return b.String()
}

func reference(b *strings.Builder, at string, s schema) {
	props, _ := s["properties"].(schema)
	for _, name := range slices.Sorted(maps.Keys(props)) {
		p := props[name].(schema)
		fmt.Fprintf(b, "| `%s` | %s | %s |\n", join(at, name), valueOf(p), strings.ReplaceAll(p["description"].(string), "|", "\\|"))
		reference(b, join(at, name), p)
		if each, ok := p["additionalProperties"].(schema); ok {
			reference(b, join(at, name)+".NAME", each)
		}
		if items, ok := p["items"].(schema); ok {
			reference(b, join(at, name)+"[]", items)
		}
	}
}

// valueOf says in a word or two what a value is.
func valueOf(s schema) string {
	if words, ok := s["enum"].([]string); ok {
		return "`" + strings.Join(words, "`, `") + "`"
	}
	if c, ok := s["const"]; ok {
		return fmt.Sprintf("`%v`", c)
	}
	switch s["type"] {
	case "boolean":
		return "`true`, `false`"
	case "integer":
		return fmt.Sprintf("%v to %v", s["minimum"], s["maximum"])
	case "array":
		return "list"
	case "object":
		if _, ok := s["properties"]; ok {
			return "keys"
		}
		return "names and values"
	case "string":
		if p, _ := s["pattern"].(string); strings.Contains(p, "(ns|") {
			return "time, such as `30s`"
		}
		return "text"
	}
	return "text"
}
