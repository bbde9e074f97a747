package gateway

import (
	"encoding/base64"
	"math"
	"strconv"
	"unicode/utf8"

	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/reflect/protoreflect"
)

// print turns a message on the wire into JSON. Fields come in the order of the
// wire, which is that of their numbers.
func (p *plan) print(dst, wire []byte, depth int) ([]byte, error) {
	if p.slow {
		return p.generic.toJSON(dst, wire)
	}
	if depth > fastDepth {
		return nil, errSlow
	}
	dst = append(dst, '{')
	var seen, oneofs uint64
	var open *field // the list or map being written
	var ks keys
	first := true
	for len(wire) > 0 {
		num, typ, n := protowire.ConsumeTag(wire)
		if n < 0 {
			return nil, errSlow
		}
		wire = wire[n:]
		var f *field
		if int(num) < len(p.dense) {
			f = p.dense[num]
		} else {
			f = p.byNum[num]
		}
		if f == nil {
			if n = protowire.ConsumeFieldValue(num, typ, wire); n < 0 {
				return nil, errSlow
			}
			wire = wire[n:]
			continue
		}
		if f.slow {
			return nil, errSlow
		}
		if open != nil && open != f {
			dst = append(dst, open.close())
			open = nil
		}
		if open == f {
			dst = append(dst, ',')
		} else {
			if seen&(1<<f.index) != 0 || f.oneof > 0 && oneofs&(1<<(f.oneof-1)) != 0 {
				return nil, errSlow // the last of several counts
			}
			seen |= 1 << f.index
			if f.oneof > 0 {
				oneofs |= 1 << (f.oneof - 1)
			}
			before := len(dst)
			if !first {
				dst = append(dst, ',')
			}
			dst = append(dst, f.name...)
			switch {
			case f.isMap:
				dst, open, ks = append(dst, '{'), f, keys{}
			case f.list:
				dst, open = append(dst, '['), f
			case !f.presence:
				var zero bool
				var err error
				if dst, wire, zero, err = f.printOne(dst, wire, typ, depth); err != nil {
					return nil, err
				}
				if zero {
					dst = dst[:before]
				} else {
					first = false
				}
				continue
			}
			first = false
		}
		var err error
		switch {
		case f.isMap:
			dst, wire, err = f.printEntry(dst, wire, typ, &ks, depth)
		case f.list && typ == protowire.BytesType && wireType(f.kind) != protowire.BytesType:
			b, n := protowire.ConsumeBytes(wire)
			if n < 0 || len(b) == 0 {
				return nil, errSlow // a list of nothing is no list
			}
			wire = wire[n:]
			for i := 0; len(b) > 0; i++ {
				if i > 0 {
					dst = append(dst, ',')
				}
				if dst, b, _, err = f.printOne(dst, b, wireType(f.kind), depth); err != nil {
					return nil, err
				}
			}
		default:
			dst, wire, _, err = f.printOne(dst, wire, typ, depth)
		}
		if err != nil {
			return nil, err
		}
	}
	if open != nil {
		dst = append(dst, open.close())
	}
	return append(dst, '}'), nil
}

func (f *field) close() byte {
	if f.isMap {
		return '}'
	}
	return ']'
}

// printEntry prints one entry of a map, written as everybody writes them: key,
// then value.
func (f *field) printEntry(dst, wire []byte, typ protowire.Type, ks *keys, depth int) (out, rest []byte, err error) {
	if typ != protowire.BytesType {
		return nil, nil, errSlow
	}
	b, n := protowire.ConsumeBytes(wire)
	if n < 0 {
		return nil, nil, errSlow
	}
	wire = wire[n:]
	tag, n := protowire.ConsumeVarint(b)
	if n < 0 || tag != f.key.tag {
		return nil, nil, errSlow
	}
	k, m := protowire.ConsumeBytes(b[n:])
	if m < 0 || ks.again(k) {
		return nil, nil, errSlow
	}
	b = b[n+m:]
	if dst, err = quote(dst, k); err != nil {
		return nil, nil, err
	}
	dst = append(dst, ':')
	tag, n = protowire.ConsumeVarint(b)
	if n < 0 || tag != f.val.tag {
		return nil, nil, errSlow
	}
	dst, b, _, err = f.val.printOne(dst, b[n:], wireType(f.val.kind), depth)
	if err == nil && len(b) > 0 {
		err = errSlow
	}
	return dst, wire, err
}

// printOne prints one value, and says whether it is the zero of its type.
func (f *field) printOne(dst, wire []byte, typ protowire.Type, depth int) (out, rest []byte, zero bool, err error) {
	if typ != wireType(f.kind) {
		return nil, nil, false, errSlow
	}
	switch typ {
	case protowire.BytesType:
		b, n := protowire.ConsumeBytes(wire)
		if n < 0 {
			return nil, nil, false, errSlow
		}
		switch f.kind {
		case protoreflect.StringKind:
			dst, err = quote(dst, b)
		case protoreflect.BytesKind:
			dst = append(base64.StdEncoding.AppendEncode(append(dst, '"'), b), '"')
		default:
			dst, err = f.msg.print(dst, b, depth+1)
		}
		return dst, wire[n:], len(b) == 0, err
	case protowire.Fixed64Type:
		v, n := protowire.ConsumeFixed64(wire)
		if n < 0 {
			return nil, nil, false, errSlow
		}
		switch f.kind {
		case protoreflect.DoubleKind:
			dst, err = float(dst, math.Float64frombits(v), 64)
		case protoreflect.Fixed64Kind:
			dst = append(strconv.AppendUint(append(dst, '"'), v, 10), '"')
		default:
			dst = append(strconv.AppendInt(append(dst, '"'), int64(v), 10), '"')
		}
		return dst, wire[n:], v == 0, err
	case protowire.Fixed32Type:
		v, n := protowire.ConsumeFixed32(wire)
		if n < 0 {
			return nil, nil, false, errSlow
		}
		switch f.kind {
		case protoreflect.FloatKind:
			dst, err = float(dst, float64(math.Float32frombits(v)), 32)
		case protoreflect.Fixed32Kind:
			dst = strconv.AppendUint(dst, uint64(v), 10)
		default:
			dst = strconv.AppendInt(dst, int64(int32(v)), 10)
		}
		return dst, wire[n:], v == 0, err
	}
	v, n := protowire.ConsumeVarint(wire)
	if n < 0 {
		return nil, nil, false, errSlow
	}
	zero = v == 0
	switch f.kind {
	case protoreflect.BoolKind:
		dst = strconv.AppendBool(dst, v != 0)
	case protoreflect.EnumKind:
		zero = int32(v) == 0
		if s, ok := f.values[int32(v)]; ok {
			dst = append(append(append(dst, '"'), s...), '"')
		} else {
			dst = strconv.AppendInt(dst, int64(int32(v)), 10)
		}
	case protoreflect.Int32Kind:
		zero = int32(v) == 0
		dst = strconv.AppendInt(dst, int64(int32(v)), 10)
	case protoreflect.Uint32Kind:
		zero = uint32(v) == 0
		dst = strconv.AppendUint(dst, uint64(uint32(v)), 10)
	case protoreflect.Sint32Kind:
		x := int32(protowire.DecodeZigZag(v & math.MaxUint32))
		zero = x == 0
		dst = strconv.AppendInt(dst, int64(x), 10)
	case protoreflect.Int64Kind:
		dst = append(strconv.AppendInt(append(dst, '"'), int64(v), 10), '"')
	case protoreflect.Uint64Kind:
		dst = append(strconv.AppendUint(append(dst, '"'), v, 10), '"')
	case protoreflect.Sint64Kind:
		dst = append(strconv.AppendInt(append(dst, '"'), protowire.DecodeZigZag(v), 10), '"')
	default:
		return nil, nil, false, errSlow
	}
	return dst, wire[n:], zero, nil
}

// quote appends s as a JSON string; errSlow when it is not UTF-8.
func quote(dst, s []byte) ([]byte, error) {
	const hex = "0123456789abcdef"
	dst = append(dst, '"')
	from, ascii := 0, true
	for i, c := range s {
		if c >= utf8.RuneSelf {
			ascii = false
			continue
		}
		if c >= ' ' && c != '"' && c != '\\' {
			continue
		}
		dst = append(dst, s[from:i]...)
		switch c {
		case '"', '\\':
			dst = append(dst, '\\', c)
		case '\n':
			dst = append(dst, '\\', 'n')
		case '\r':
			dst = append(dst, '\\', 'r')
		case '\t':
			dst = append(dst, '\\', 't')
		default:
			dst = append(dst, '\\', 'u', '0', '0', hex[c>>4], hex[c&15])
		}
		from = i + 1
	}
	if !ascii && !utf8.Valid(s) {
		return nil, errSlow
	}
	return append(append(dst, s[from:]...), '"'), nil
}

// float appends x as JavaScript would write it.
func float(dst []byte, x float64, bits int) ([]byte, error) {
	if math.IsNaN(x) || math.IsInf(x, 0) || x == 0 && math.Signbit(x) {
		return nil, errSlow
	}
	abs, format := math.Abs(x), byte('f')
	if abs != 0 && (bits == 64 && (abs < 1e-6 || abs >= 1e21) || bits == 32 && (float32(abs) < 1e-6 || float32(abs) >= 1e21)) {
		format = 'e'
	}
	return strconv.AppendFloat(dst, x, format, -1, bits), nil
}
