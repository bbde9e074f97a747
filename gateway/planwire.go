package gateway

import (
	"encoding/base64"
	"math"
	"strconv"
	"unicode/utf8"

	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/reflect/protoreflect"
)

// fastDepth is how deep the table-driven codec follows messages in messages.
const fastDepth = 64

// reader walks JSON. Whatever it does not like is errSlow.
type reader struct {
	b   []byte
	i   int
	tmp []byte // of strings with escapes
}

func (d *reader) space() {
	for d.i < len(d.b) {
		switch d.b[d.i] {
		case ' ', '\n', '\t', '\r':
			d.i++
		default:
			return
		}
	}
}

// peek is the next character that is no space, 0 at the end. A NUL in the
// input looks like the end and is nowhere allowed.
func (d *reader) peek() byte {
	d.space()
	if d.i < len(d.b) {
		return d.b[d.i]
	}
	return 0
}

func (d *reader) end() bool {
	d.space()
	return d.i == len(d.b)
}

func (d *reader) take(c byte) bool {
	if d.peek() != c {
		return false
	}
	d.i++
	return true
}

// text is the next string; it is valid until the next one is read.
func (d *reader) text() ([]byte, error) {
	if !d.take('"') {
		return nil, errSlow
	}
	from := d.i
	for j := from; j < len(d.b); j++ {
		switch c := d.b[j]; {
		case c == '"':
			d.i = j + 1
			return d.b[from:j], nil
		case c == '\\':
			return d.escaped(from, j)
		case c < ' ':
			return nil, errSlow
		}
	}
	return nil, errSlow
}

// escaped reads a string whose first escape is at j.
func (d *reader) escaped(from, j int) ([]byte, error) {
	out := append(d.tmp[:0], d.b[from:j]...)
	for j < len(d.b) {
		c := d.b[j]
		switch {
		case c == '"':
			d.i, d.tmp = j+1, out
			return out, nil
		case c < ' ':
			return nil, errSlow
		case c != '\\':
			out = append(out, c)
			j++
			continue
		}
		if j++; j >= len(d.b) {
			return nil, errSlow
		}
		switch c := d.b[j]; c {
		case '"', '\\', '/':
			out = append(out, c)
		case 'b':
			out = append(out, '\b')
		case 'f':
			out = append(out, '\f')
		case 'n':
			out = append(out, '\n')
		case 'r':
			out = append(out, '\r')
		case 't':
			out = append(out, '\t')
		case 'u':
			r, ok := hex4(d.b, j+1)
			if !ok || r >= 0xd800 && r < 0xe000 {
				return nil, errSlow // halves of characters are rare
			}
			out = utf8.AppendRune(out, r)
			j += 4
		default:
			return nil, errSlow
		}
		j++
	}
	return nil, errSlow
}

func hex4(b []byte, i int) (r rune, ok bool) {
	if i+4 > len(b) {
		return 0, false
	}
	for _, c := range b[i : i+4] {
		switch {
		case c >= '0' && c <= '9':
			c -= '0'
		case c >= 'a' && c <= 'f':
			c -= 'a' - 10
		case c >= 'A' && c <= 'F':
			c -= 'A' - 10
		default:
			return 0, false
		}
		r = r<<4 | rune(c)
	}
	return r, true
}

// literal is what stands up to the next delimiter.
func (d *reader) literal() []byte {
	d.space()
	from := d.i
	for d.i < len(d.b) {
		switch d.b[d.i] {
		case ',', '}', ']', ' ', '\n', '\t', '\r':
			return d.b[from:d.i]
		}
		d.i++
	}
	return d.b[from:]
}

// value is the text of the next value, of whatever kind; it is only valid JSON
// if whoever gets it says so.
func (d *reader) value() ([]byte, error) {
	d.space()
	from, depth := d.i, 0
	for d.i < len(d.b) {
		switch c := d.b[d.i]; c {
		case '"':
			if _, err := d.text(); err != nil {
				return nil, err
			}
		case '{', '[':
			depth++
			d.i++
		case '}', ']':
			depth--
			d.i++
		case ',', ':', ' ', '\n', '\t', '\r':
			d.i++
		default:
			d.literal()
			if d.i < len(d.b) && d.i == from {
				return nil, errSlow
			}
		}
		if depth == 0 {
			return d.b[from:d.i], nil
		}
		if depth < 0 {
			return nil, errSlow
		}
	}
	return nil, errSlow
}

// sized puts the length before what was written behind at, where one byte is
// kept for it.
func sized(dst []byte, at int) []byte {
	n := len(dst) - at - 1
	size := protowire.SizeVarint(uint64(n))
	for range size - 1 {
		dst = append(dst, 0)
	}
	if size > 1 {
		copy(dst[at+size:], dst[at+1:at+1+n])
	}
	protowire.AppendVarint(dst[:at], uint64(n))
	return dst
}

// object turns a JSON object.
func (p *plan) object(d *reader, dst []byte, depth int) ([]byte, error) {
	if p.slow {
		// A well-known type, or a message with something rare in it.
		raw, err := d.value()
		if err != nil {
			return nil, err
		}
		g := *p.generic
		g.nesting = maxNesting - depth
		return g.toWire(dst, raw)
	}
	if depth > fastDepth || !d.take('{') {
		return nil, errSlow
	}
	if d.take('}') {
		return dst, nil
	}
	var seen, oneofs uint64
	for guess := 0; ; guess++ {
		name, err := d.text()
		if err != nil {
			return nil, err
		}
		var f *field
		if guess < len(p.order) && string(name) == p.order[guess].json {
			f = p.order[guess]
		} else if f = p.byName[string(name)]; f != nil {
			guess = f.index
		}
		if f == nil || f.slow || seen&(1<<f.index) != 0 || !d.take(':') {
			return nil, errSlow
		}
		seen |= 1 << f.index
		if d.peek() == 'n' {
			if string(d.literal()) != "null" {
				return nil, errSlow
			}
		} else {
			if f.oneof > 0 {
				if oneofs&(1<<(f.oneof-1)) != 0 {
					return nil, errSlow
				}
				oneofs |= 1 << (f.oneof - 1)
			}
			if dst, err = f.read(d, dst, depth); err != nil {
				return nil, err
			}
		}
		if d.take(',') {
			continue
		}
		if d.take('}') {
			return dst, nil
		}
		return nil, errSlow
	}
}

// read turns the value of a field.
func (f *field) read(d *reader, dst []byte, depth int) ([]byte, error) {
	switch {
	case f.isMap:
		return f.readMap(d, dst, depth)
	case !f.list:
		return f.one(d, dst, true, depth)
	}
	if !d.take('[') {
		return nil, errSlow
	}
	if d.take(']') {
		return dst, nil
	}
	at := 0
	if f.packed != 0 {
		dst = protowire.AppendVarint(dst, f.packed)
		at = len(dst)
		dst = append(dst, 0)
	}
	for {
		var err error
		if dst, err = f.one(d, dst, f.packed == 0, depth); err != nil {
			return nil, err
		}
		if d.take(',') {
			continue
		}
		if !d.take(']') {
			return nil, errSlow
		}
		if f.packed != 0 {
			dst = sized(dst, at)
		}
		return dst, nil
	}
}

func (f *field) readMap(d *reader, dst []byte, depth int) ([]byte, error) {
	if !d.take('{') {
		return nil, errSlow
	}
	if d.take('}') {
		return dst, nil
	}
	var seen keys
	for {
		dst = protowire.AppendVarint(dst, f.tag)
		at := len(dst)
		dst = append(dst, 0)
		k, err := d.text()
		if err != nil {
			return nil, err
		}
		if !utf8.Valid(k) || seen.again(append([]byte(nil), k...)) || !d.take(':') {
			return nil, errSlow
		}
		dst = protowire.AppendBytes(protowire.AppendVarint(dst, f.key.tag), k)
		if dst, err = f.val.one(d, dst, true, depth); err != nil {
			return nil, err
		}
		dst = sized(dst, at)
		if d.take(',') {
			continue
		}
		if d.take('}') {
			return dst, nil
		}
		return nil, errSlow
	}
}

// one turns one value, with its tag before it or not.
func (f *field) one(d *reader, dst []byte, tag bool, depth int) ([]byte, error) {
	if tag {
		dst = protowire.AppendVarint(dst, f.tag)
	}
	switch f.kind {
	case protoreflect.StringKind:
		s, err := d.text()
		if err != nil || !utf8.Valid(s) {
			return nil, errSlow
		}
		return protowire.AppendBytes(dst, s), nil
	case protoreflect.BytesKind:
		s, err := d.text()
		if err != nil {
			return nil, errSlow
		}
		enc := base64.StdEncoding
		for _, c := range s {
			if c == '-' || c == '_' {
				enc = base64.URLEncoding
				break
			}
		}
		if len(s)%4 != 0 {
			enc = enc.WithPadding(base64.NoPadding)
		}
		at := len(dst)
		if dst, err = enc.AppendDecode(append(dst, 0), s); err != nil {
			return nil, errSlow
		}
		return sized(dst, at), nil
	case protoreflect.MessageKind:
		if d.peek() == 'n' {
			return nil, errSlow // null in a list or a map
		}
		at := len(dst)
		dst, err := f.msg.object(d, append(dst, 0), depth+1)
		if err != nil {
			return nil, err
		}
		return sized(dst, at), nil
	case protoreflect.BoolKind:
		switch string(d.literal()) {
		case "true":
			return append(dst, 1), nil
		case "false":
			return append(dst, 0), nil
		}
		return nil, errSlow
	case protoreflect.EnumKind:
		if d.peek() == '"' {
			s, err := d.text()
			if err != nil {
				return nil, err
			}
			v, ok := f.names[string(s)]
			if !ok {
				return nil, errSlow
			}
			return protowire.AppendVarint(dst, uint64(int64(v))), nil
		}
	}
	var t []byte
	if d.peek() == '"' && f.kind != protoreflect.EnumKind {
		s, err := d.text()
		if err != nil {
			return nil, err
		}
		t = s
	} else {
		t = d.literal()
	}
	return f.number(dst, t)
}

// number appends the number t as a value of f.
func (f *field) number(dst, t []byte) ([]byte, error) {
	switch f.kind {
	case protoreflect.FloatKind:
		v, ok := number(t, 32)
		if !ok {
			return nil, errSlow
		}
		return protowire.AppendFixed32(dst, math.Float32bits(float32(v))), nil
	case protoreflect.DoubleKind:
		v, ok := number(t, 64)
		if !ok {
			return nil, errSlow
		}
		return protowire.AppendFixed64(dst, math.Float64bits(v)), nil
	}
	if !decimal(t) {
		return nil, errSlow
	}
	switch f.kind {
	case protoreflect.Uint32Kind, protoreflect.Fixed32Kind, protoreflect.Uint64Kind, protoreflect.Fixed64Kind:
		bits := 64
		if f.kind == protoreflect.Uint32Kind || f.kind == protoreflect.Fixed32Kind {
			bits = 32
		}
		v, err := strconv.ParseUint(string(t), 10, bits)
		if err != nil {
			return nil, errSlow
		}
		switch f.kind {
		case protoreflect.Fixed32Kind:
			return protowire.AppendFixed32(dst, uint32(v)), nil
		case protoreflect.Fixed64Kind:
			return protowire.AppendFixed64(dst, v), nil
		}
		return protowire.AppendVarint(dst, v), nil
	}
	bits := 32
	switch f.kind {
	case protoreflect.Int64Kind, protoreflect.Sint64Kind, protoreflect.Sfixed64Kind:
		bits = 64
	}
	v, err := strconv.ParseInt(string(t), 10, bits)
	if err != nil {
		return nil, errSlow
	}
	switch f.kind {
	case protoreflect.Sint32Kind, protoreflect.Sint64Kind:
		return protowire.AppendVarint(dst, protowire.EncodeZigZag(v)), nil
	case protoreflect.Sfixed32Kind:
		return protowire.AppendFixed32(dst, uint32(v)), nil
	case protoreflect.Sfixed64Kind:
		return protowire.AppendFixed64(dst, uint64(v)), nil
	case protoreflect.Int32Kind, protoreflect.Int64Kind, protoreflect.EnumKind:
		return protowire.AppendVarint(dst, uint64(v)), nil
	}
	return nil, errSlow
}
