package gateway

import (
	"bytes"
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"mime"
	"mime/multipart"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"unicode/utf8"

	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/types/dynamicpb"
)

const (
	maxPairs = 1000 // of a query or form
	maxDepth = 32   // of a form's a[b][c]
)

// input is the request message of r on the wire, behind room for its prefix: the
// query, then the body on top of it.
func (g *Gateway) input(w http.ResponseWriter, r *http.Request, m *method) ([]byte, error) {
	body, err := g.body(w, r)
	if err != nil {
		return nil, err
	}
	form, boundary := false, ""
	switch ct := mediaType(r.Header); {
	case ct == "application/json" || strings.HasSuffix(ct, "+json") && !strings.HasPrefix(ct, "application/connect"):
	case len(body) == 0 || looksLikeJSON(body) && (ct == "" || ct == "text/plain" || ct == "application/octet-stream" || ct == "application/x-www-form-urlencoded"):
		// curl -d '{…}' says form and means JSON.
	case ct == "application/x-www-form-urlencoded":
		form = true
	case ct == "multipart/form-data":
		_, params, _ := mime.ParseMediaType(r.Header.Get("Content-Type")) // mediaType has read it
		if boundary = params["boundary"]; boundary == "" {
			return nil, invalid("multipart/form-data has no boundary")
		}
	default:
		if ct == "" {
			ct = "a body that is not JSON"
		}
		return nil, &problem{http: http.StatusUnsupportedMediaType, grpc: codes.InvalidArgument,
			detail: fmt.Sprintf("%.80s is not understood here: send application/json, application/x-www-form-urlencoded or gRPC", ct)}
	}
	if len(body) == 0 {
		body = []byte("{}")
	}
	if r.URL.RawQuery == "" && !form && boundary == "" {
		return g.bounded(m.in.toWire(make([]byte, prefixLen, prefixLen+len(body)+16), body))
	}
	c := &generic{desc: m.desc.Input(), types: m.types, strict: m.strict}
	msg := dynamicpb.NewMessage(c.desc)
	if err := fill(msg, r.URL.RawQuery, m.types, m.strict); err != nil {
		return nil, err
	}
	if boundary != "" {
		if err := fillParts(msg, multipart.NewReader(bytes.NewReader(body), boundary), m.types, m.strict); err != nil {
			return nil, err
		}
	} else if form {
		if err := fill(msg, string(body), m.types, m.strict); err != nil {
			return nil, err
		}
	} else {
		over, err := c.parse(body)
		if err != nil {
			return nil, err
		}
		proto.Merge(msg, over)
	}
	return g.bounded(c.marshal(make([]byte, prefixLen), msg))
}

func (g *Gateway) bounded(b []byte, err error) ([]byte, error) {
	if err == nil && len(b)-prefixLen > g.max {
		return nil, tooLarge(g.max)
	}
	return b, err
}

func tooLarge(most int) error {
	return &problem{http: http.StatusRequestEntityTooLarge, grpc: codes.ResourceExhausted, detail: fmt.Sprintf("the message is larger than %d bytes", most)}
}

// body reads the body, counting its bytes also after decompression.
func (g *Gateway) body(w http.ResponseWriter, r *http.Request) ([]byte, error) {
	b, err := readBody(w, r, g.max)
	if err != nil {
		return nil, err
	}
	switch enc := encodingOf(r.Header.Get("Content-Encoding")); enc {
	case "":
	case "gzip":
		if b, err = gunzip(b, g.max); err != nil {
			return nil, unzipError(err, g.max)
		}
	default:
		return nil, &problem{http: http.StatusUnsupportedMediaType, grpc: codes.InvalidArgument, detail: fmt.Sprintf("content-encoding %.40q is not understood: use gzip or none", enc)}
	}
	return b, nil
}

func bodyReadError(err error, most int) error {
	if _, ok := errors.AsType[*http.MaxBytesError](err); ok {
		return tooLarge(most)
	}
	return invalid("the body broke off")
}

// fill sets the fields that a query or form names: a=1, a.b=1 and a[b]=1, maps
// as m[key]=1, lists by repeating the name or as a[]=1. Names that the message
// lacks are ignored, as unknown JSON fields are, unless strict.
func fill(msg protoreflect.Message, query string, types *dynamicpb.Types, strict bool) error {
	values, err := url.ParseQuery(query)
	if err != nil {
		return invalid("the query or form is malformed")
	}
	if len(values) > maxPairs {
		return invalid("the query or form has more than %d names", maxPairs)
	}
	for name, vs := range values {
		path := splitName(name)
		if len(path) > maxDepth {
			return invalid("%.80q is nested deeper than %d", name, maxDepth)
		}
		for _, v := range vs {
			if err := set1(msg, path, v, types, strict); err != nil {
				return invalid("field %.80q: %s", name, err)
			}
		}
	}
	return nil
}

// fillParts sets the fields that the parts of a multipart form name, as fill
// does. A part for a field of bytes, a file, is taken as it is.
func fillParts(msg protoreflect.Message, parts *multipart.Reader, types *dynamicpb.Types, strict bool) error {
	for n := 0; ; n++ {
		part, err := parts.NextRawPart()
		if err == io.EOF { //nolint:errorlint // a form that breaks off wraps it
			return nil
		}
		if err != nil || n >= maxPairs {
			return invalid("the multipart form is malformed")
		}
		value, err := io.ReadAll(part)
		if err != nil {
			return invalid("the multipart form is malformed")
		}
		path := splitName(part.FormName())
		if len(path) > maxDepth {
			return invalid("%.80q is nested deeper than %d", part.FormName(), maxDepth)
		}
		text := string(value)
		if raw := bytesField(msg.Descriptor(), path); raw {
			text = base64.StdEncoding.EncodeToString(value)
		}
		if err := set1(msg, path, text, types, strict); err != nil {
			return invalid("field %.80q: %s", part.FormName(), err)
		}
	}
}

// bytesField says that path leads to a field of bytes.
func bytesField(md protoreflect.MessageDescriptor, path []string) bool {
	for i, name := range path {
		if md == nil {
			return false
		}
		fd := md.Fields().ByJSONName(name)
		if fd == nil {
			fd = md.Fields().ByTextName(name)
		}
		switch {
		case fd == nil || fd.IsMap():
			return false
		case i == len(path)-1:
			return fd.Kind() == protoreflect.BytesKind
		}
		md = fd.Message()
	}
	return false
}

// splitName takes a[b][c] and a.b.c apart; a[] is a.
func splitName(name string) []string {
	name = strings.TrimSuffix(name, "[]")
	var path []string
	for len(name) > 0 {
		i := strings.IndexAny(name, ".[")
		if i < 0 {
			return append(path, name)
		}
		if i > 0 {
			path = append(path, name[:i])
		}
		if name[i] == '[' {
			if end := strings.IndexByte(name[i:], ']'); end > 0 {
				path = append(path, name[i+1:i+end])
				name = name[i+end+1:]
				continue
			}
		}
		name = name[i+1:]
	}
	return path
}

func set1(msg protoreflect.Message, path []string, v string, types *dynamicpb.Types, strict bool) error {
	for i, name := range path {
		fields := msg.Descriptor().Fields()
		fd := fields.ByJSONName(name)
		if fd == nil {
			if fd = fields.ByTextName(name); fd == nil {
				if strict {
					return errors.New("there is no such field")
				}
				return nil
			}
		}
		rest := path[i+1:]
		switch {
		case fd.IsMap():
			if len(rest) != 1 {
				return fmt.Errorf("a map is written %s[key]", name)
			}
			key, err := scalar(fd.MapKey(), rest[0])
			if err != nil {
				return err
			}
			val, err := value(fd.MapValue(), msg.NewField(fd).Map().NewValue, v, types, strict)
			if err != nil {
				return err
			}
			msg.Mutable(fd).Map().Set(key.MapKey(), val)
			return nil
		case fd.IsList():
			if len(rest) != 0 {
				return errors.New("a list of messages is sent as JSON")
			}
			val, err := value(fd, msg.NewField(fd).List().NewElement, v, types, strict)
			if err != nil {
				return err
			}
			msg.Mutable(fd).List().Append(val)
			return nil
		case len(rest) == 0:
			val, err := value(fd, func() protoreflect.Value { return msg.NewField(fd) }, v, types, strict)
			if err != nil {
				return err
			}
			msg.Set(fd, val)
			return nil
		case fd.Message() == nil:
			return fmt.Errorf("%s is no message", name)
		}
		msg = msg.Mutable(fd).Message()
	}
	return nil
}

// value parses v as one value of fd. A message is its JSON form, for which the
// text itself may stand: a timestamp, a duration, a wrapper.
func value(fd protoreflect.FieldDescriptor, fresh func() protoreflect.Value, v string, types *dynamicpb.Types, strict bool) (protoreflect.Value, error) {
	if fd.Message() == nil {
		return scalar(fd, v)
	}
	opts := protojson.UnmarshalOptions{DiscardUnknown: !strict, Resolver: types, RecursionLimit: maxNesting}
	var first error
	for _, text := range []string{v, strconv.Quote(v)} {
		val := fresh()
		err := opts.Unmarshal([]byte(text), val.Message().Interface())
		if err == nil {
			return val, nil
		}
		if first == nil {
			first = err
		}
	}
	return protoreflect.Value{}, fmt.Errorf("%.80q is no %s: %s", v, fd.Message().FullName(), jsonError(first))
}

func scalar(fd protoreflect.FieldDescriptor, v string) (protoreflect.Value, error) {
	var out protoreflect.Value
	var err error
	switch k := fd.Kind(); k {
	case protoreflect.StringKind:
		if !utf8.ValidString(v) {
			return out, errors.New("not UTF-8")
		}
		return protoreflect.ValueOfString(v), nil
	case protoreflect.BytesKind:
		b, err := base64Any(v)
		if err != nil {
			return out, errors.New("not base64")
		}
		return protoreflect.ValueOfBytes(b), nil
	case protoreflect.BoolKind:
		var b bool
		b, err = strconv.ParseBool(v)
		out = protoreflect.ValueOfBool(b)
	case protoreflect.EnumKind:
		if ev := fd.Enum().Values().ByName(protoreflect.Name(v)); ev != nil {
			return protoreflect.ValueOfEnum(ev.Number()), nil
		}
		var n int64
		n, err = strconv.ParseInt(v, 10, 32)
		out = protoreflect.ValueOfEnum(protoreflect.EnumNumber(n))
	case protoreflect.FloatKind:
		var f float64
		f, err = strconv.ParseFloat(v, 32)
		out = protoreflect.ValueOfFloat32(float32(f))
	case protoreflect.DoubleKind:
		var f float64
		f, err = strconv.ParseFloat(v, 64)
		out = protoreflect.ValueOfFloat64(f)
	case protoreflect.Int32Kind, protoreflect.Sint32Kind, protoreflect.Sfixed32Kind:
		var n int64
		n, err = strconv.ParseInt(v, 10, 32)
		out = protoreflect.ValueOfInt32(int32(n))
	case protoreflect.Int64Kind, protoreflect.Sint64Kind, protoreflect.Sfixed64Kind:
		var n int64
		n, err = strconv.ParseInt(v, 10, 64)
		out = protoreflect.ValueOfInt64(n)
	case protoreflect.Uint32Kind, protoreflect.Fixed32Kind:
		var n uint64
		n, err = strconv.ParseUint(v, 10, 32)
		out = protoreflect.ValueOfUint32(uint32(n))
	case protoreflect.Uint64Kind, protoreflect.Fixed64Kind:
		var n uint64
		n, err = strconv.ParseUint(v, 10, 64)
		out = protoreflect.ValueOfUint64(n)
	default:
		return out, fmt.Errorf("a %s is sent as JSON", k)
	}
	if err != nil {
		return out, fmt.Errorf("%.80q is no %s", v, fd.Kind())
	}
	return out, nil
}

// base64Any takes the standard and the URL alphabet, padded or not.
func base64Any(v string) ([]byte, error) {
	enc := base64.RawStdEncoding
	if strings.ContainsAny(v, "-_") {
		enc = base64.RawURLEncoding
	}
	return enc.DecodeString(strings.TrimRight(v, "="))
}
