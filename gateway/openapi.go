package gateway

import (
	"encoding/json"
	"fmt"
	"strings"

	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/types/descriptorpb"
)

type object = map[string]any

// openAPI is the app's interface as OpenAPI 3.1.
func (v *view) openAPI() []byte {
	schemas := object{"m3o.Error": object{
		"type": "object", "description": "What every answer other than 2xx holds.",
		"properties": object{
			"id":     object{"type": "string", "description": "The app, or m3o."},
			"code":   object{"type": "integer", "description": "The HTTP status."},
			"detail": object{"type": "string", "description": "What is wrong."},
			"status": object{"type": "string", "description": "The name of the code."},
			"details": object{"type": "array", "items": object{"type": "object"},
				"description": "The error details the app sent, if any."},
		},
		"required": []string{"id", "code", "detail", "status"},
	}}
	for _, md := range v.messages {
		schemas[string(md.FullName())] = messageSchema(md)
	}
	for _, ed := range v.enums {
		var names, lines []string
		for i := range ed.Values().Len() {
			val := ed.Values().Get(i)
			names = append(names, string(val.Name()))
			if c := comment(val); c != "" {
				lines = append(lines, "- `"+string(val.Name())+"`: "+c)
			}
		}
		s := object{"type": "string", "enum": names}
		describe(s, ed, lines...)
		schemas[string(ed.FullName())] = s
	}
	paths := object{}
	var tags []object
	for _, s := range v.services {
		tag := object{"name": string(s.desc.FullName())}
		describe(tag, s.desc)
		tags = append(tags, tag)
		for _, m := range s.methods {
			item := object{"post": operation(m, m.path, "post", nil)}
			if m.safe && !m.desc.IsStreamingClient() {
				item["get"] = operation(m, m.path, "get", nil)
			}
			paths[m.path] = item
		}
	}
	doc := struct {
		OpenAPI    string   `json:"openapi"`
		Info       object   `json:"info"`
		Servers    []object `json:"servers"`
		Tags       []object `json:"tags"`
		Security   []object `json:"security"`
		Paths      object   `json:"paths"`
		Components object   `json:"components"`
	}{
		OpenAPI: "3.1.0",
		Info: object{"title": v.api.App, "version": fmt.Sprintf("v%d", v.api.Release),
			"description": "Also served as gRPC, gRPC-Web and Connect at the same address. Messages are protobuf's JSON."},
		Servers: []object{{"url": v.base}},
		Tags:    tags,
		// No token is an answer too: who may call what, the app's access rules say.
		Security: []object{{}, {"bearer": []string{}}},
		Paths:    paths,
		Components: object{"schemas": schemas, "securitySchemes": object{"bearer": object{
			"type": "http", "scheme": "bearer", "description": "A token or API key; the app gets it as it was sent."}}},
	}
	for _, b := range v.bindings() {
		item, _ := paths[b.openPath()].(object)
		if item == nil {
			item = object{}
			paths[b.openPath()] = item
		}
		if verb := strings.ToLower(b.verb); openVerbs[verb] {
			item[verb] = operation(b.m, b.openPath(), verb, b)
		}
	}
	out, _ := json.MarshalIndent(doc, "", "  ") // strings, lists and maps of them
	return append(out, '\n')
}

var openVerbs = map[string]bool{"get": true, "put": true, "post": true, "delete": true, "patch": true, "head": true, "options": true, "trace": true}

func describe(to object, d protoreflect.Descriptor, more ...string) {
	text := strings.TrimSpace(strings.Join(append([]string{comment(d)}, more...), "\n"))
	if text != "" {
		to["description"] = text
	}
	if deprecated(d) {
		to["deprecated"] = true
	}
}

func deprecated(d protoreflect.Descriptor) bool {
	switch o := d.Options().(type) {
	case *descriptorpb.FieldOptions:
		return o.GetDeprecated()
	case *descriptorpb.MethodOptions:
		return o.GetDeprecated()
	case *descriptorpb.MessageOptions:
		return o.GetDeprecated()
	}
	return false
}

func ref(md protoreflect.Descriptor) object {
	return object{"$ref": "#/components/schemas/" + string(md.FullName())}
}

// operation describes m at path. b is the route that leads there, nil for the
// method's own path.
func operation(m *method, path, verb string, b *binding) object {
	op := object{
		"operationId": strings.Trim(strings.NewReplacer("/", "_", ".", "_", "{", "", "}", "", ":", "_", "*", "").Replace(verb+path), "_"),
		"tags":        []string{m.service},
	}
	describe(op, m.desc)
	if s := summary(comment(m.desc)); s != "" {
		op["summary"] = s
	}
	in, out := m.desc.Input(), m.desc.Output()
	var params []object
	body := typeSchema(in)
	switch {
	case b != nil:
		params, body = b.openParams()
	case verb == "get":
		params, body = queryParams(in, nil), nil
	}
	if m.desc.IsStreamingClient() {
		op["description"] = strings.TrimSpace(fmt.Sprint(op["description"], "\n\nTakes a stream of messages: open a WebSocket here and send each as a text frame, or use gRPC or Connect over HTTP/2."))
		if strings.HasPrefix(op["description"].(string), "<nil>") {
			op["description"] = strings.TrimSpace(strings.TrimPrefix(op["description"].(string), "<nil>"))
		}
	}
	if params != nil {
		op["parameters"] = params
	}
	if body != nil {
		op["requestBody"] = object{"required": true, "content": object{"application/json": object{"schema": body}}}
	}
	ok := object{"description": "The answer."}
	answer := typeSchema(out)
	if b != nil {
		answer = b.openAnswer()
	}
	if m.desc.IsStreamingServer() {
		ok["description"] = "A JSON object a line, each as soon as it is there; or server-sent events for who accepts those."
		ok["content"] = object{
			"application/x-ndjson": object{"schema": object{"type": "object", "properties": object{"result": answer, "error": object{"$ref": "#/components/schemas/m3o.Error"}}}},
			"text/event-stream":    object{"schema": object{"type": "string"}},
		}
	} else {
		ok["content"] = object{"application/json": object{"schema": answer}}
	}
	op["responses"] = object{
		"200":     ok,
		"default": object{"description": "An error.", "content": object{"application/json": object{"schema": object{"$ref": "#/components/schemas/m3o.Error"}}}},
	}
	return op
}

// queryParams are the fields of md that a query can name: all but messages.
func queryParams(md protoreflect.MessageDescriptor, without map[string]bool) []object {
	var out []object
	for i := range md.Fields().Len() {
		fd := md.Fields().Get(i)
		if without[string(fd.Name())] || fd.IsMap() || fd.Message() != nil && wellKnown(fd.Message()) == "" {
			continue
		}
		p := object{"name": fd.JSONName(), "in": "query", "schema": fieldSchema(fd)}
		describe(p, fd)
		out = append(out, p)
	}
	return out
}

func messageSchema(md protoreflect.MessageDescriptor) object {
	props := object{}
	var notes []string
	for i := range md.Fields().Len() {
		fd := md.Fields().Get(i)
		p := fieldSchema(fd)
		describe(p, fd)
		props[fd.JSONName()] = p
	}
	for i := range md.Oneofs().Len() {
		od := md.Oneofs().Get(i)
		if od.IsSynthetic() {
			continue
		}
		var names []string
		for j := range od.Fields().Len() {
			names = append(names, "`"+od.Fields().Get(j).JSONName()+"`")
		}
		notes = append(notes, "At most one of "+strings.Join(names, ", ")+".")
	}
	s := object{"type": "object", "properties": props}
	describe(s, md, notes...)
	return s
}

func fieldSchema(fd protoreflect.FieldDescriptor) object {
	switch {
	case fd.IsMap():
		return object{"type": "object", "additionalProperties": valueSchema(fd.MapValue())}
	case fd.IsList():
		return object{"type": "array", "items": valueSchema(fd)}
	}
	return valueSchema(fd)
}

func valueSchema(fd protoreflect.FieldDescriptor) object {
	switch fd.Kind() {
	case protoreflect.BoolKind:
		return object{"type": "boolean"}
	case protoreflect.StringKind:
		return object{"type": "string"}
	case protoreflect.BytesKind:
		return object{"type": "string", "contentEncoding": "base64"}
	case protoreflect.Int32Kind, protoreflect.Sint32Kind, protoreflect.Sfixed32Kind:
		return object{"type": "integer", "format": "int32"}
	case protoreflect.Uint32Kind, protoreflect.Fixed32Kind:
		return object{"type": "integer", "minimum": 0, "maximum": uint32(1<<32 - 1)}
	case protoreflect.Int64Kind, protoreflect.Sint64Kind, protoreflect.Sfixed64Kind:
		return object{"type": "string", "format": "int64"}
	case protoreflect.Uint64Kind, protoreflect.Fixed64Kind:
		return object{"type": "string", "format": "uint64"}
	case protoreflect.FloatKind:
		return object{"type": "number", "format": "float"}
	case protoreflect.DoubleKind:
		return object{"type": "number", "format": "double"}
	case protoreflect.EnumKind:
		if fd.Enum().FullName() == "google.protobuf.NullValue" {
			return object{"type": "null"}
		}
		return ref(fd.Enum())
	}
	return typeSchema(fd.Message())
}

// typeSchema is how a message is written as JSON.
func typeSchema(md protoreflect.MessageDescriptor) object {
	switch wellKnown(md) {
	case "":
		return ref(md)
	case "Timestamp":
		return object{"type": "string", "format": "date-time"}
	case "Duration":
		return object{"type": "string", "pattern": `^-?[0-9]+(\.[0-9]{1,9})?s$`, "examples": []string{"1.5s"}}
	case "FieldMask":
		return object{"type": "string", "examples": []string{"name,address.street"}}
	case "Struct", "Empty":
		return object{"type": "object"}
	case "ListValue":
		return object{"type": "array", "items": object{}}
	case "Any":
		return object{"type": "object", "properties": object{"@type": object{"type": "string"}}, "required": []string{"@type"}}
	case "BoolValue":
		return object{"type": []string{"boolean", "null"}}
	case "StringValue":
		return object{"type": []string{"string", "null"}}
	case "BytesValue":
		return object{"type": []string{"string", "null"}, "contentEncoding": "base64"}
	case "Int32Value", "UInt32Value":
		return object{"type": []string{"integer", "null"}}
	case "Int64Value", "UInt64Value":
		return object{"type": []string{"string", "null"}, "format": "int64"}
	case "FloatValue", "DoubleValue":
		return object{"type": []string{"number", "null"}}
	}
	return object{} // Value: anything
}
