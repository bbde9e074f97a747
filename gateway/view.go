package gateway

import (
	"slices"
	"strings"

	"google.golang.org/protobuf/reflect/protoreflect"

	"github.com/m3o/m3o"
)

// view is an app's interface as people and generators read it: its services
// and all that their methods use.
type view struct {
	api      *m3o.API
	base     string // URL of the app
	host     string // its host, without a port
	services []service
	messages []protoreflect.MessageDescriptor // by full name; no well-known types, no map entries
	enums    []protoreflect.EnumDescriptor
	short    map[protoreflect.FullName]string // unique identifiers
}

type service struct {
	desc    protoreflect.ServiceDescriptor
	methods []*method
}

func newView(s *set, api *m3o.API, base, host string) *view {
	v := &view{api: api, base: base, host: host, short: map[protoreflect.FullName]string{}}
	seen := map[protoreflect.FullName]bool{}
	var message func(md protoreflect.MessageDescriptor)
	message = func(md protoreflect.MessageDescriptor) {
		if seen[md.FullName()] || wellKnown(md) != "" {
			return
		}
		seen[md.FullName()] = true
		if !md.IsMapEntry() {
			v.messages = append(v.messages, md)
		}
		for i := range md.Fields().Len() {
			fd := md.Fields().Get(i)
			if fd.Message() != nil {
				message(fd.Message())
			}
			if ed := fd.Enum(); ed != nil && !seen[ed.FullName()] && ed.FullName() != "google.protobuf.NullValue" {
				seen[ed.FullName()] = true
				v.enums = append(v.enums, ed)
			}
		}
	}
	for _, m := range s.list {
		sd := m.desc.Parent().(protoreflect.ServiceDescriptor)
		if n := len(v.services); n == 0 || v.services[n-1].desc.FullName() != sd.FullName() {
			v.services = append(v.services, service{desc: sd})
		}
		last := &v.services[len(v.services)-1]
		last.methods = append(last.methods, m)
		message(m.desc.Input())
		message(m.desc.Output())
	}
	// In the order of the .proto, which is how their author wants them read.
	for i := range v.services {
		slices.SortStableFunc(v.services[i].methods, func(a, b *method) int { return a.desc.Index() - b.desc.Index() })
	}
	slices.SortFunc(v.messages, func(a, b protoreflect.MessageDescriptor) int {
		return strings.Compare(string(a.FullName()), string(b.FullName()))
	})
	slices.SortFunc(v.enums, func(a, b protoreflect.EnumDescriptor) int {
		return strings.Compare(string(a.FullName()), string(b.FullName()))
	})
	v.name()
	return v
}

// name gives every service, message and enum an identifier: its name within
// its package, with the package before it where two would be the same.
func (v *view) name() {
	type item struct {
		full protoreflect.FullName
		pkg  protoreflect.FullName
	}
	var all []item
	for _, s := range v.services {
		all = append(all, item{s.desc.FullName(), s.desc.ParentFile().Package()})
	}
	for _, m := range v.messages {
		all = append(all, item{m.FullName(), m.ParentFile().Package()})
	}
	for _, e := range v.enums {
		all = append(all, item{e.FullName(), e.ParentFile().Package()})
	}
	within := func(i item) string {
		name := strings.TrimPrefix(string(i.full), string(i.pkg)+".")
		if i.pkg == "" {
			name = string(i.full)
		}
		return identifier(name)
	}
	count := map[string]int{}
	for _, i := range all {
		count[within(i)]++
	}
	for _, i := range all {
		n := within(i)
		if count[n] > 1 || reservedName[n] {
			n = identifier(string(i.full))
		}
		v.short[i.full] = n
	}
}

// reservedName are names the generated clients use themselves.
var reservedName = map[string]bool{"Client": true, "Options": true, "CallError": true, "Error": true, "Call": true, "JSON": true, "Promise": true, "Array": true, "Record": true, "AsyncIterable": true, "Stream": true, "New": true}

// identifier is name as an exported identifier: Outer_Inner for Outer.Inner.
func identifier(name string) string {
	parts := strings.Split(name, ".")
	for i, p := range parts {
		if p != "" {
			parts[i] = strings.ToUpper(p[:1]) + p[1:]
		}
	}
	return strings.Join(parts, "_")
}

// wellKnown names the protobuf project's own types whose JSON is special, "" for
// all others.
func wellKnown(md protoreflect.MessageDescriptor) string {
	name, ok := strings.CutPrefix(string(md.FullName()), "google.protobuf.")
	if !ok {
		return ""
	}
	switch name {
	case "Timestamp", "Duration", "FieldMask", "Struct", "Value", "ListValue", "Any", "Empty",
		"BoolValue", "StringValue", "BytesValue", "Int32Value", "UInt32Value", "Int64Value", "UInt64Value", "FloatValue", "DoubleValue":
		return name
	}
	return ""
}

// comment is what the .proto says of d, "" when the schema has no comments.
func comment(d protoreflect.Descriptor) string {
	loc := d.ParentFile().SourceLocations().ByDescriptor(d)
	text := loc.LeadingComments
	if text == "" {
		text = loc.TrailingComments
	}
	lines := strings.Split(strings.TrimSpace(text), "\n")
	for i, l := range lines {
		lines[i] = strings.TrimPrefix(strings.TrimRight(l, " \t\r"), " ")
	}
	return strings.Join(lines, "\n")
}

// summary is the first sentence of a comment.
func summary(text string) string {
	text, _, _ = strings.Cut(text, "\n\n")
	text = strings.ReplaceAll(text, "\n", " ")
	if i := strings.Index(text, ". "); i >= 0 {
		text = text[:i+1]
	}
	if r := []rune(text); len(r) > 120 {
		text = string(r[:119]) + "…"
	}
	return text
}

// kindOf says in words what kind of call m is.
func kindOf(m *method) string {
	switch {
	case m.desc.IsStreamingClient() && m.desc.IsStreamingServer():
		return "stream both ways"
	case m.desc.IsStreamingClient():
		return "client stream"
	case m.desc.IsStreamingServer():
		return "server stream"
	}
	return "unary"
}

// example is a message as JSON with a value for each field that is easy to
// give one.
func example(md protoreflect.MessageDescriptor, depth int) map[string]any {
	out := map[string]any{}
	for i := range md.Fields().Len() {
		fd := md.Fields().Get(i)
		if o := fd.ContainingOneof(); o != nil && !o.IsSynthetic() && o.Fields().Get(0) != fd {
			continue
		}
		val := exampleValue(fd, depth)
		if val == nil {
			continue
		}
		switch {
		case fd.IsMap():
			out[fd.JSONName()] = map[string]any{}
		case fd.IsList():
			out[fd.JSONName()] = []any{val}
		default:
			out[fd.JSONName()] = val
		}
	}
	return out
}

func exampleValue(fd protoreflect.FieldDescriptor, depth int) any {
	switch fd.Kind() {
	case protoreflect.StringKind:
		return ""
	case protoreflect.BoolKind:
		return false
	case protoreflect.BytesKind:
		return ""
	case protoreflect.EnumKind:
		if fd.Enum().Values().Len() == 0 {
			return nil
		}
		return string(fd.Enum().Values().Get(0).Name())
	case protoreflect.Int64Kind, protoreflect.Uint64Kind, protoreflect.Sint64Kind, protoreflect.Fixed64Kind, protoreflect.Sfixed64Kind:
		return "0"
	case protoreflect.MessageKind:
		switch wellKnown(fd.Message()) {
		case "Timestamp":
			return "2026-01-02T15:04:05Z"
		case "Duration":
			return "1.5s"
		case "FieldMask", "StringValue", "BytesValue":
			return ""
		case "Struct", "Empty":
			return map[string]any{}
		case "":
			if depth > 0 {
				return example(fd.Message(), depth-1)
			}
		}
		return nil
	case protoreflect.GroupKind:
		return nil
	}
	return 0
}
