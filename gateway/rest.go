package gateway

import (
	"bytes"
	"encoding/json"
	"fmt"
	"net/http"
	"net/url"
	"slices"
	"strings"

	"google.golang.org/genproto/googleapis/api/annotations"
	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/types/descriptorpb"
	"google.golang.org/protobuf/types/dynamicpb"
)

// binding is one route of google.api.http: a verb and a path template that
// lead to a method.
type binding struct {
	m        *method
	verb     string // "" for any
	template string
	segments []segment
	suffix   string // of ":suffix", without the colon
	vars     []variable
	body     string // field that is the body, "*" for the message, "" for none
	answer   string // field that is the answer, "" for the message
}

// segment is one part of a path: a literal, "*" for one, "**" for the rest.
type segment struct {
	literal string
	wild    int // 0, 1 or 2 stars
}

// variable is a field whose value is a run of segments.
type variable struct {
	field    []string
	from, to int // segments; to is -1 up to the end
}

// bindingsOf are the routes that a method declares. Those that make no sense
// are left out: a schema comes from an app, and its other routes still work.
func bindingsOf(m *method) []*binding {
	o, ok := m.desc.Options().(*descriptorpb.MethodOptions)
	if !ok || !proto.HasExtension(o, annotations.E_Http) {
		return nil
	}
	rule, ok := proto.GetExtension(o, annotations.E_Http).(*annotations.HttpRule)
	if !ok || rule == nil {
		return nil
	}
	var out []*binding
	for _, r := range append([]*annotations.HttpRule{rule}, rule.GetAdditionalBindings()...) {
		if b := newBinding(m, r); b != nil {
			out = append(out, b)
		}
	}
	return out
}

func newBinding(m *method, r *annotations.HttpRule) *binding {
	b := &binding{m: m, body: r.GetBody(), answer: r.GetResponseBody()}
	switch p := r.GetPattern().(type) {
	case *annotations.HttpRule_Get:
		b.verb, b.template = http.MethodGet, p.Get
	case *annotations.HttpRule_Put:
		b.verb, b.template = http.MethodPut, p.Put
	case *annotations.HttpRule_Post:
		b.verb, b.template = http.MethodPost, p.Post
	case *annotations.HttpRule_Delete:
		b.verb, b.template = http.MethodDelete, p.Delete
	case *annotations.HttpRule_Patch:
		b.verb, b.template = http.MethodPatch, p.Patch
	case *annotations.HttpRule_Custom:
		if b.verb, b.template = p.Custom.GetKind(), p.Custom.GetPath(); b.verb == "*" {
			b.verb = ""
		}
	default:
		return nil
	}
	if !b.parse() || !b.fits() {
		return nil
	}
	return b
}

// parse reads the template, as google/api/http.proto defines it:
//
//	Template = "/" Segments [ ":" LITERAL ]
//	Segment  = "*" | "**" | LITERAL | "{" FieldPath [ "=" Segments ] "}"
func (b *binding) parse() bool {
	t, ok := strings.CutPrefix(b.template, "/")
	if !ok {
		return false
	}
	if i := strings.LastIndexByte(t, ':'); i > strings.LastIndexAny(t, "/}") {
		t, b.suffix = t[:i], t[i+1:]
	}
	plain := func(part string) bool {
		switch {
		case part == "*":
			b.segments = append(b.segments, segment{wild: 1})
		case part == "**":
			b.segments = append(b.segments, segment{wild: 2})
		case part == "" || strings.ContainsAny(part, "{}*="):
			return false
		default:
			b.segments = append(b.segments, segment{literal: part})
		}
		return true
	}
	for len(t) > 0 {
		if t[0] != '{' {
			part, rest, more := strings.Cut(t, "/")
			if !plain(part) || more && rest == "" {
				return false
			}
			t = rest
			continue
		}
		end := strings.IndexByte(t, '}')
		if end < 0 {
			return false
		}
		name, sub, has := strings.Cut(t[1:end], "=")
		if !has {
			sub = "*"
		}
		v := variable{field: strings.Split(name, "."), from: len(b.segments)}
		for part := range strings.SplitSeq(sub, "/") {
			if !plain(part) {
				return false
			}
		}
		v.to = len(b.segments)
		b.vars = append(b.vars, v)
		if t = t[end+1:]; t != "" {
			if t[0] != '/' || len(t) == 1 {
				return false
			}
			t = t[1:]
		}
	}
	for i, s := range b.segments {
		if s.wild == 2 && i != len(b.segments)-1 {
			return false
		}
	}
	for i := range b.vars {
		if v := &b.vars[i]; v.to == len(b.segments) && b.segments[v.to-1].wild == 2 {
			v.to = -1
		}
	}
	return true
}

// fits says that the fields the route names are there.
func (b *binding) fits() bool {
	in := b.m.desc.Input()
	for _, v := range b.vars {
		md := in
		for i, name := range v.field {
			if md == nil {
				return false
			}
			fd := md.Fields().ByName(protoreflect.Name(name))
			if fd == nil || fd.IsMap() || fd.IsList() || i == len(v.field)-1 && fd.Message() != nil && wellKnown(fd.Message()) == "" {
				return false
			}
			md = fd.Message()
		}
	}
	if b.body != "" && b.body != "*" && in.Fields().ByName(protoreflect.Name(b.body)) == nil {
		return false
	}
	return b.answer == "" || b.m.desc.Output().Fields().ByName(protoreflect.Name(b.answer)) != nil
}

// weight orders routes: those that say more come first.
func (b *binding) weight() int {
	w := 0
	for _, s := range b.segments {
		w += 2 - s.wild
		if s.literal != "" {
			w += 8
		}
	}
	if b.suffix != "" {
		w += 4
	}
	return w
}

func sortBindings(bs []*binding) {
	slices.SortStableFunc(bs, func(a, b *binding) int { return b.weight() - a.weight() })
}

// match finds what the variables of b are in path, the escaped path of a
// request split at slashes.
func (b *binding) match(parts []string) ([]string, bool) {
	n := len(b.segments)
	deep := n > 0 && b.segments[n-1].wild == 2
	if deep && len(parts) < n-1 || !deep && len(parts) != n {
		return nil, false
	}
	last := len(parts) - 1
	if b.suffix != "" {
		if last < 0 {
			return nil, false
		}
		head, ok := strings.CutSuffix(parts[last], ":"+b.suffix)
		if !ok {
			return nil, false
		}
		parts = append(slices.Clone(parts[:last]), head)
	}
	for i, s := range b.segments {
		if s.wild == 2 {
			break
		}
		if s.literal != "" && s.literal != parts[i] || s.wild == 1 && parts[i] == "" {
			return nil, false
		}
	}
	vals := make([]string, len(b.vars))
	for i, v := range b.vars {
		to := v.to
		if to < 0 {
			to = len(parts)
		}
		if v.from > to {
			return nil, false
		}
		run := slices.Clone(parts[v.from:to])
		for j := range run {
			dec, err := url.PathUnescape(run[j])
			if err != nil {
				return nil, false
			}
			run[j] = dec
		}
		vals[i] = strings.Join(run, "/")
	}
	return vals, true
}

// route finds the route a request means; nil when there is none. The error
// says that there is one for other verbs only.
func (s *set) route(verb, escaped string) (*binding, []string, error) {
	if len(s.routes) == 0 {
		return nil, nil, nil
	}
	parts := strings.Split(strings.TrimPrefix(escaped, "/"), "/")
	var verbs []string
	for _, b := range s.routes {
		vals, ok := b.match(parts)
		if !ok {
			continue
		}
		if b.verb == "" || b.verb == verb || verb == http.MethodHead && b.verb == http.MethodGet {
			return b, vals, nil
		}
		verbs = append(verbs, b.verb)
	}
	if verbs == nil {
		return nil, nil, nil
	}
	slices.Sort(verbs)
	verbs = slices.Compact(verbs)
	return nil, nil, &problem{http: http.StatusMethodNotAllowed, grpc: codes.Unimplemented, allow: strings.Join(verbs, ", "),
		detail: fmt.Sprintf("%s is not served at this path: use %s", verb, strings.Join(verbs, " or "))}
}

// input is the request message of r behind room for its prefix, by the route b.
func (b *binding) input(g *Gateway, w http.ResponseWriter, r *http.Request, vals []string) ([]byte, error) {
	m := b.m
	body, err := g.body(w, r)
	if err != nil {
		return nil, err
	}
	c := &generic{desc: m.desc.Input(), types: m.types, strict: m.strict}
	msg := dynamicpb.NewMessage(m.desc.Input())
	raw := rawBody(m.desc.Input(), b.body)
	switch {
	case b.body == "" && len(bytes.TrimSpace(body)) > 0:
		return nil, invalid("this route takes no body: put the fields into the query")
	case b.body == "":
	case raw != nil:
		if b.body == "*" {
			setHTTPBody(msg, r.Header.Get("Content-Type"), body)
		} else {
			setHTTPBody(msg.Mutable(raw).Message(), r.Header.Get("Content-Type"), body)
		}
	default:
		if ct := mediaType(r.Header); len(body) > 0 && ct != "" && ct != "application/json" && !strings.HasSuffix(ct, "+json") && !looksLikeJSON(body) {
			return nil, &problem{http: http.StatusUnsupportedMediaType, grpc: codes.InvalidArgument, detail: fmt.Sprintf("%.80s is not understood here: send application/json", ct)}
		}
		if len(bytes.TrimSpace(body)) == 0 {
			body = []byte("{}")
			if b.body != "*" {
				body = []byte("null")
			}
		}
		if b.body != "*" {
			name, _ := json.Marshal(string(m.desc.Input().Fields().ByName(protoreflect.Name(b.body)).Name()))
			body = slices.Concat([]byte("{"), name, []byte(":"), body, []byte("}"))
		}
		if msg, err = c.parse(body); err != nil {
			return nil, err
		}
	}
	if b.body != "*" {
		if err := fill(msg, r.URL.RawQuery, m.types, m.strict); err != nil {
			return nil, err
		}
	}
	for i, v := range b.vars {
		if err := set1(msg, v.field, vals[i], m.types, true); err != nil {
			return nil, invalid("%.80q in the path: %s", vals[i], err)
		}
	}
	return g.bounded(c.marshal(make([]byte, prefixLen), msg))
}

// isHTTPBody says that a message is google.api.HttpBody: any bytes with a type.
func isHTTPBody(md protoreflect.MessageDescriptor) bool {
	return md != nil && md.FullName() == "google.api.HttpBody"
}

// rawBody is the field that takes the body as it is; any field of the message
// when the message itself does.
func rawBody(in protoreflect.MessageDescriptor, body string) protoreflect.FieldDescriptor {
	if body == "*" && isHTTPBody(in) {
		return in.Fields().ByName("data")
	}
	if fd := in.Fields().ByName(protoreflect.Name(body)); fd != nil && !fd.IsList() && isHTTPBody(fd.Message()) {
		return fd
	}
	return nil
}

func setHTTPBody(m protoreflect.Message, contentType string, body []byte) {
	fields := m.Descriptor().Fields()
	if fd := fields.ByName("content_type"); fd != nil && fd.Kind() == protoreflect.StringKind {
		m.Set(fd, protoreflect.ValueOfString(strings.ToValidUTF8(contentType, "")))
	}
	if fd := fields.ByName("data"); fd != nil && fd.Kind() == protoreflect.BytesKind {
		m.Set(fd, protoreflect.ValueOfBytes(body))
	}
}

// part takes the field that is the answer out of the JSON of a message.
func (b *binding) part(whole []byte) ([]byte, error) {
	if b == nil || b.answer == "" {
		return whole, nil
	}
	fd := b.m.desc.Output().Fields().ByName(protoreflect.Name(b.answer))
	var fields map[string]json.RawMessage
	if err := json.Unmarshal(whole, &fields); err != nil {
		return nil, fmt.Errorf("take %s: %w", b.answer, err)
	}
	if raw, ok := fields[fd.JSONName()]; ok {
		return raw, nil
	}
	switch {
	case fd.IsList():
		return []byte("[]"), nil
	case fd.IsMap():
		return []byte("{}"), nil
	}
	switch fd.Kind() {
	case protoreflect.StringKind, protoreflect.BytesKind:
		return []byte(`""`), nil
	case protoreflect.BoolKind:
		return []byte("false"), nil
	case protoreflect.MessageKind, protoreflect.EnumKind:
		return []byte("null"), nil
	}
	return []byte("0"), nil
}

// bindings are all routes, in order of the methods.
func (v *view) bindings() []*binding {
	var out []*binding
	for _, s := range v.services {
		for _, m := range s.methods {
			out = append(out, bindingsOf(m)...)
		}
	}
	return out
}

// openPath is the template as OpenAPI writes it: no patterns in variables.
func (b *binding) openPath() string {
	var out strings.Builder
	for i := 0; i < len(b.segments); i++ {
		out.WriteByte('/')
		v := slices.IndexFunc(b.vars, func(v variable) bool { return v.from == i })
		switch {
		case v >= 0:
			out.WriteString("{" + strings.Join(b.vars[v].field, ".") + "}")
			if b.vars[v].to < 0 {
				i = len(b.segments)
			} else {
				i = b.vars[v].to - 1
			}
		case b.segments[i].wild > 0:
			out.WriteString(strings.Repeat("*", b.segments[i].wild))
		default:
			out.WriteString(b.segments[i].literal)
		}
	}
	if b.suffix != "" {
		out.WriteString(":" + b.suffix)
	}
	if out.Len() == 0 {
		return "/"
	}
	return out.String()
}

func (b *binding) openParams() (params []object, body object) {
	in := b.m.desc.Input()
	bound := map[string]bool{b.body: true}
	for _, v := range b.vars {
		md, schema := in, object{"type": "string"}
		for _, name := range v.field {
			fd := md.Fields().ByName(protoreflect.Name(name))
			schema, md = valueSchema(fd), fd.Message()
		}
		bound[v.field[0]] = true
		params = append(params, object{"name": strings.Join(v.field, "."), "in": "path", "required": true, "schema": schema})
	}
	if b.body != "*" {
		params = append(params, queryParams(in, bound)...)
	}
	switch b.body {
	case "":
		return params, nil
	case "*":
		return params, typeSchema(in)
	}
	return params, fieldSchema(in.Fields().ByName(protoreflect.Name(b.body)))
}

func (b *binding) openAnswer() object {
	if b.answer == "" {
		return typeSchema(b.m.desc.Output())
	}
	return fieldSchema(b.m.desc.Output().Fields().ByName(protoreflect.Name(b.answer)))
}
