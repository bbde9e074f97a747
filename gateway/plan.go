package gateway

import (
	"errors"
	"strconv"

	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/types/dynamicpb"
)

// errSlow is what the table-driven codec says of input it leaves to the
// generic one, which defines what is right: what is rare, and all that is
// wrong. So the fast one need not explain errors, only never be wrong.
var errSlow = errors.New("for the generic codec")

// plan is a message type made ready for turning JSON into the wire format and
// back without a message object in between.
type plan struct {
	generic *generic
	slow    bool // always for the generic codec
	byName  map[string]*field
	order   []*field // as declared, which is the order most clients send them in
	byNum   map[protowire.Number]*field
	dense   []*field // byNum for small numbers
}

type field struct {
	slow     bool // a message that has it is for the generic codec
	num      protowire.Number
	kind     protoreflect.Kind
	tag      uint64 // of one value
	packed   uint64 // tag of a packed list, 0 when the list is not packed
	list     bool
	isMap    bool
	presence bool
	oneof    int // index of the oneof plus one
	index    int
	name     []byte // `"name":`
	json     string
	msg      *plan
	key, val *field // of a map
	names    map[string]int32
	values   map[int32]string
}

// fast is the codec of a message type: its plan, with the generic codec behind it.
type fast struct{ *plan }

func (c fast) toWire(dst, json []byte) ([]byte, error) {
	if !c.slow {
		d := reader{b: json}
		if out, err := c.object(&d, dst, 0); err == nil && d.end() {
			return out, nil
		}
	}
	return c.generic.toWire(dst, json)
}

func (c fast) toJSON(dst, wire []byte) ([]byte, error) {
	if !c.slow {
		if out, err := c.print(dst, wire, 0); err == nil {
			return out, nil
		}
	}
	return c.generic.toJSON(dst, wire)
}

// planner makes each plan once; types refer to each other and to themselves.
type planner struct {
	types  *dynamicpb.Types
	strict bool
	plans  map[protoreflect.FullName]*plan
}

const maxFast = 64 // fields of a message: one bit each

func (p *planner) plan(md protoreflect.MessageDescriptor) *plan {
	if pl := p.plans[md.FullName()]; pl != nil {
		return pl
	}
	pl := &plan{generic: &generic{desc: md, types: p.types, strict: p.strict}, byName: map[string]*field{}, byNum: map[protowire.Number]*field{}}
	p.plans[md.FullName()] = pl
	fields := md.Fields()
	if md.ParentFile().Syntax() != protoreflect.Proto3 || wellKnown(md) != "" || md.IsPlaceholder() || md.ExtensionRanges().Len() > 0 || fields.Len() > maxFast || md.Oneofs().Len() > maxFast {
		pl.slow = true
		return pl
	}
	for i := range fields.Len() {
		fd := fields.Get(i)
		f := p.field(fd)
		f.index = i
		pl.order = append(pl.order, f)
		pl.byName[fd.JSONName()], pl.byName[string(fd.Name())] = f, f
		pl.byNum[f.num] = f
		if f.num < 256 {
			for len(pl.dense) <= int(f.num) {
				pl.dense = append(pl.dense, nil)
			}
			pl.dense[f.num] = f
		}
	}
	return pl
}

func (p *planner) field(fd protoreflect.FieldDescriptor) *field {
	f := &field{num: fd.Number(), kind: fd.Kind(), list: fd.IsList(), isMap: fd.IsMap(), presence: fd.HasPresence(), json: fd.JSONName(), name: []byte(jsString(fd.JSONName()) + ":")}
	f.tag = protowire.EncodeTag(f.num, wireType(f.kind))
	if fd.IsPacked() {
		f.packed = protowire.EncodeTag(f.num, protowire.BytesType)
	}
	if o := fd.ContainingOneof(); o != nil {
		f.oneof = o.Index() + 1
	}
	if ed := fd.Enum(); ed != nil {
		if ed.IsPlaceholder() || ed.FullName() == "google.protobuf.NullValue" || ed.ParentFile().Syntax() != protoreflect.Proto3 {
			f.slow = true
			return f
		}
		f.names, f.values = map[string]int32{}, map[int32]string{}
		for i := range ed.Values().Len() {
			v := ed.Values().Get(i)
			f.names[string(v.Name())] = int32(v.Number())
			if _, ok := f.values[int32(v.Number())]; !ok {
				f.values[int32(v.Number())] = string(v.Name())
			}
		}
	}
	switch {
	case f.kind == protoreflect.GroupKind:
		f.slow = true
	case f.isMap:
		if f.slow = fd.MapKey().Kind() != protoreflect.StringKind; f.slow {
			return f
		}
		f.key, f.val = p.field(fd.MapKey()), p.field(fd.MapValue())
		f.slow = f.val.slow
	case fd.Message() != nil:
		if n := wellKnown(fd.Message()); n == "Value" || n == "ListValue" {
			f.slow = true // null is a value there
			return f
		}
		f.msg = p.plan(fd.Message())
	}
	return f
}

func wireType(k protoreflect.Kind) protowire.Type {
	switch k {
	case protoreflect.Fixed32Kind, protoreflect.Sfixed32Kind, protoreflect.FloatKind:
		return protowire.Fixed32Type
	case protoreflect.Fixed64Kind, protoreflect.Sfixed64Kind, protoreflect.DoubleKind:
		return protowire.Fixed64Type
	case protoreflect.StringKind, protoreflect.BytesKind, protoreflect.MessageKind:
		return protowire.BytesType
	}
	return protowire.VarintType
}

// keys remembers the keys of a map, to see one that comes twice.
type keys struct {
	few  [][]byte
	many map[string]struct{}
}

// again says that k was there before.
func (s *keys) again(k []byte) bool {
	if s.many == nil {
		for _, o := range s.few {
			if string(o) == string(k) {
				return true
			}
		}
		if len(s.few) < 16 {
			s.few = append(s.few, k)
			return false
		}
		s.many = map[string]struct{}{}
		for _, o := range s.few {
			s.many[string(o)] = struct{}{}
		}
	}
	if _, ok := s.many[string(k)]; ok {
		return true
	}
	s.many[string(k)] = struct{}{}
	return false
}

// decimal says that t is an integer as JSON writes it, and not -0.
func decimal(t []byte) bool {
	if len(t) > 1 && t[0] == '-' {
		if t = t[1:]; t[0] == '0' {
			return false
		}
	}
	if len(t) == 0 || len(t) > 1 && t[0] == '0' {
		return false
	}
	for _, c := range t {
		if c < '0' || c > '9' {
			return false
		}
	}
	return true
}

// number reads a floating point number as JSON writes it.
func number(t []byte, bits int) (float64, bool) {
	i := 0
	digits := func() bool {
		from := i
		for i < len(t) && t[i] >= '0' && t[i] <= '9' {
			i++
		}
		return i > from
	}
	if i < len(t) && t[i] == '-' {
		i++
	}
	from := i
	if !digits() || t[from] == '0' && i > from+1 {
		return 0, false
	}
	if i < len(t) && t[i] == '.' {
		if i++; !digits() {
			return 0, false
		}
	}
	if i < len(t) && (t[i] == 'e' || t[i] == 'E') {
		if i++; i < len(t) && (t[i] == '+' || t[i] == '-') {
			i++
		}
		if !digits() {
			return 0, false
		}
	}
	if i != len(t) {
		return 0, false
	}
	v, err := strconv.ParseFloat(string(t), bits)
	return v, err == nil && (v != 0 || t[0] != '-')
}
