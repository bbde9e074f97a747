package protobuf

import (
	"fmt"
	"math"
	"slices"
	"strconv"
	"strings"

	"google.golang.org/protobuf/types/descriptorpb"
)

type kind = descriptorpb.FieldDescriptorProto_Type

// wireGroups are the scalar types whose bytes mean the same. Types of one group
// may replace each other; a type in none only itself.
var wireGroups = [][]kind{
	{descriptorpb.FieldDescriptorProto_TYPE_INT32, descriptorpb.FieldDescriptorProto_TYPE_INT64,
		descriptorpb.FieldDescriptorProto_TYPE_UINT32, descriptorpb.FieldDescriptorProto_TYPE_UINT64,
		descriptorpb.FieldDescriptorProto_TYPE_BOOL},
	{descriptorpb.FieldDescriptorProto_TYPE_SINT32, descriptorpb.FieldDescriptorProto_TYPE_SINT64},
	{descriptorpb.FieldDescriptorProto_TYPE_FIXED32, descriptorpb.FieldDescriptorProto_TYPE_SFIXED32},
	{descriptorpb.FieldDescriptorProto_TYPE_FIXED64, descriptorpb.FieldDescriptorProto_TYPE_SFIXED64},
}

// jsonGroups are those whose JSON means the same as well: 64-bit numbers are
// strings there, and a bool is no number.
var jsonGroups = [][]kind{
	{descriptorpb.FieldDescriptorProto_TYPE_INT32, descriptorpb.FieldDescriptorProto_TYPE_UINT32},
	{descriptorpb.FieldDescriptorProto_TYPE_INT64, descriptorpb.FieldDescriptorProto_TYPE_UINT64},
	{descriptorpb.FieldDescriptorProto_TYPE_FIXED32, descriptorpb.FieldDescriptorProto_TYPE_SFIXED32},
	{descriptorpb.FieldDescriptorProto_TYPE_FIXED64, descriptorpb.FieldDescriptorProto_TYPE_SFIXED64},
}

func compatible(groups [][]kind, a, b kind) bool {
	if a == b {
		return true
	}
	for _, g := range groups {
		if slices.Contains(g, a) && slices.Contains(g, b) {
			return true
		}
	}
	return false
}

// rule picks the name of a rule that the categories have each their own of.
func (b *breaking) rule(wire, json string) string {
	if b.json {
		return json
	}
	return wire
}

func (b *breaking) message(o, n *messageIndex) {
	calls := b.carried[o.full]
	if b.json && o.features.json == descriptorpb.FeatureSet_ALLOW && n.features.json != descriptorpb.FeatureSet_ALLOW {
		b.report("MESSAGE_SAME_JSON_FORMAT", n.place(), false, o.full, calls, "JSON is no longer fully supported: json_format is %s", n.features.json)
	}
	now := map[int32]int{}
	for i, f := range n.desc.GetField() {
		if _, twice := now[f.GetNumber()]; !twice && f != nil {
			now[f.GetNumber()] = i
		}
	}
	seen := map[int32]bool{}
	for i, of := range o.desc.GetField() {
		if of == nil || seen[of.GetNumber()] {
			continue
		}
		seen[of.GetNumber()] = true
		subject := o.full + "." + of.GetName()
		j, ok := now[of.GetNumber()]
		if !ok {
			b.fieldGone(o, n, of, o.place(2, int32(i)), subject, calls)
			continue
		}
		b.field(fieldPair{
			of: of, nf: n.desc.GetField()[j], om: o, nm: n,
			ofeat: o.features.field(of), nfeat: n.features.field(n.desc.GetField()[j]),
			at: n.place(2, int32(j)), subject: subject, calls: calls,
		})
	}
	b.required(o, n, calls)
	b.reserved("RESERVED_MESSAGE_NO_DELETE", n.place(), o.full, calls, messageRanges(o.desc), messageRanges(n.desc), o.desc.GetReservedName(), n.desc.GetReservedName())
}

func (b *breaking) fieldGone(o, n *messageIndex, of *descriptorpb.FieldDescriptorProto, at place, subject string, calls []string) {
	kept := inRanges(messageRanges(n.desc), int64(of.GetNumber()))
	if i := slices.IndexFunc(n.desc.GetField(), func(f *descriptorpb.FieldDescriptorProto) bool { return f.GetName() == of.GetName() }); i >= 0 && (b.json || !kept) {
		rule := "FIELD_NO_DELETE_UNLESS_NUMBER_RESERVED"
		if kept {
			rule = "FIELD_NO_DELETE_UNLESS_NAME_RESERVED"
		}
		b.report(rule, n.place(2, int32(i), 3), false, subject, calls, "the field was renumbered from %d to %d", of.GetNumber(), n.desc.GetField()[i].GetNumber())
		return
	}
	if !kept {
		b.report("FIELD_NO_DELETE_UNLESS_NUMBER_RESERVED", at, true, subject, calls,
			"field %d was removed and its number is not reserved", of.GetNumber())
	}
	if b.json && !slices.Contains(n.desc.GetReservedName(), of.GetName()) {
		b.report("FIELD_NO_DELETE_UNLESS_NAME_RESERVED", at, true, subject, calls,
			"field %d was removed and its name is not reserved", of.GetNumber())
	}
}

// A fieldPair is one field number of a message, or one extension, before and after.
type fieldPair struct {
	of, nf       *descriptorpb.FieldDescriptorProto
	om, nm       *messageIndex // nil for an extension
	ofeat, nfeat features
	at           place
	subject      string
	calls        []string
}

func (p fieldPair) tag(t int32) place { return p.at.sub(t) }

func (b *breaking) field(p fieldPair) {
	of, nf := p.of, p.nf
	extension := p.om == nil
	if b.json && !extension {
		if of.GetName() != nf.GetName() {
			b.report("FIELD_SAME_NAME", p.tag(1), false, p.subject, p.calls, "field %d was renamed to %s", of.GetNumber(), nf.GetName())
		}
		if was, is := jsonOf(of), jsonOf(nf); was != is {
			b.report("FIELD_SAME_JSON_NAME", p.tag(1), false, p.subject, p.calls, "the name in JSON changed from %q to %q", was, is)
		}
	}
	if !extension {
		b.oneof(p)
	}
	was, is := p.cardinality(b.old, of, p.ofeat), p.cardinality(b.now, nf, p.nfeat)
	if !was.fits(is, b.json) {
		b.report(b.rule("FIELD_WIRE_COMPATIBLE_CARDINALITY", "FIELD_WIRE_JSON_COMPATIBLE_CARDINALITY"), p.tag(4), false, p.subject, p.calls,
			"it changed from %s to %s", was, is)
	}
	if was == mapped && is == mapped {
		b.mapEntry(p)
	} else if why := b.typeChange(of, nf, p.ofeat, p.nfeat); why != "" {
		b.report(b.rule("FIELD_WIRE_COMPATIBLE_TYPE", "FIELD_WIRE_JSON_COMPATIBLE_TYPE"), p.typePlace(), false, p.subject, p.calls, "%s", why)
	}
	if was != repeated && was != mapped && is != repeated && is != mapped {
		b.defaults(p)
	}
}

// typePlace is where the type is written: a name, or a keyword.
func (p fieldPair) typePlace() place {
	if p.nf.GetTypeName() != "" {
		return p.tag(6)
	}
	return p.tag(5)
}

func jsonOf(f *descriptorpb.FieldDescriptorProto) string {
	if f.JsonName != nil {
		return f.GetJsonName()
	}
	return jsonName(f.GetName())
}

// kindOf is the type on the wire: an edition's message with delimited encoding
// is a group.
func kindOf(f *descriptorpb.FieldDescriptorProto, feat features) kind {
	if f.GetType() == descriptorpb.FieldDescriptorProto_TYPE_MESSAGE && feat.delimited {
		return descriptorpb.FieldDescriptorProto_TYPE_GROUP
	}
	return f.GetType()
}

func kindWord(k kind) string {
	return strings.ToLower(strings.TrimPrefix(k.String(), "TYPE_"))
}

// typeChange says what is wrong with a changed type, "" when data of the old
// one reads the same.
func (b *breaking) typeChange(of, nf *descriptorpb.FieldDescriptorProto, ofeat, nfeat features) string {
	was, is := kindOf(of, ofeat), kindOf(nf, nfeat)
	groups := wireGroups
	if b.json {
		groups = jsonGroups
	}
	// A string is valid bytes, on the wire; bytes need not be a valid string.
	widened := !b.json && was == descriptorpb.FieldDescriptorProto_TYPE_STRING && is == descriptorpb.FieldDescriptorProto_TYPE_BYTES
	if !compatible(groups, was, is) && !widened {
		return fmt.Sprintf("the type changed from %s to %s", typeWord(of, was), typeWord(nf, is))
	}
	if of.GetTypeName() == nf.GetTypeName() || widened {
		return ""
	}
	switch is {
	case descriptorpb.FieldDescriptorProto_TYPE_ENUM:
		if b.sameEnum(bare(of.GetTypeName()), bare(nf.GetTypeName())) {
			return ""
		}
	case descriptorpb.FieldDescriptorProto_TYPE_MESSAGE, descriptorpb.FieldDescriptorProto_TYPE_GROUP:
	default:
		return ""
	}
	return fmt.Sprintf("the type changed from %s to %s", bare(of.GetTypeName()), bare(nf.GetTypeName()))
}

func typeWord(f *descriptorpb.FieldDescriptorProto, k kind) string {
	if n := bare(f.GetTypeName()); n != "" {
		return kindWord(k) + " " + n
	}
	return kindWord(k)
}

// sameEnum says whether an enum moved: it has the same short name, and every
// old value by name and number.
func (b *breaking) sameEnum(was, is string) bool {
	o, ok1 := b.old.enums[was]
	n, ok2 := b.now.enums[is]
	if !ok1 || !ok2 || o.desc.GetName() != n.desc.GetName() {
		return false
	}
	have := map[string]int32{}
	for _, v := range n.desc.GetValue() {
		have[v.GetName()] = v.GetNumber()
	}
	for _, v := range o.desc.GetValue() {
		if num, ok := have[v.GetName()]; !ok || num != v.GetNumber() {
			return false
		}
	}
	return true
}

// mapEntry compares keys and values of two maps. The entry messages are
// synthetic: their name follows the field's and means nothing.
func (b *breaking) mapEntry(p fieldPair) {
	o, n := b.old.messages[bare(p.of.GetTypeName())], b.now.messages[bare(p.nf.GetTypeName())]
	for num, side := range map[int32]string{1: "key", 2: "value"} {
		of, nf := fieldByNumber(o.desc, num), fieldByNumber(n.desc, num)
		if of == nil || nf == nil {
			continue
		}
		if why := b.typeChange(of, nf, o.features, n.features); why != "" {
			b.report(b.rule("FIELD_WIRE_COMPATIBLE_TYPE", "FIELD_WIRE_JSON_COMPATIBLE_TYPE"), p.typePlace(), false, p.subject, p.calls, "of the map's %s, %s", side, why)
		}
	}
}

func fieldByNumber(m *descriptorpb.DescriptorProto, num int32) *descriptorpb.FieldDescriptorProto {
	for _, f := range m.GetField() {
		if f != nil && f.GetNumber() == num {
			return f
		}
	}
	return nil
}

func (b *breaking) oneof(p fieldPair) {
	was, is := oneofOf(p.om.desc, p.of), oneofOf(p.nm.desc, p.nf)
	switch {
	case was == is:
	case was == "":
		b.report("FIELD_SAME_ONEOF", p.at, false, p.subject, p.calls, "it moved into the oneof %s: setting another field of it clears this one", is)
	case is == "":
		b.report("FIELD_SAME_ONEOF", p.at, false, p.subject, p.calls, "it moved out of the oneof %s", was)
	default:
		b.report("FIELD_SAME_ONEOF", p.at, false, p.subject, p.calls, "it moved from the oneof %s to %s", was, is)
	}
}

// oneofOf is the oneof that a person wrote around a field. The one that proto3
// makes for "optional" is a detail of descriptors.
func oneofOf(m *descriptorpb.DescriptorProto, f *descriptorpb.FieldDescriptorProto) string {
	if f.OneofIndex == nil || f.GetProto3Optional() {
		return ""
	}
	if i := int(f.GetOneofIndex()); i >= 0 && i < len(m.GetOneofDecl()) {
		return m.GetOneofDecl()[i].GetName()
	}
	return ""
}

type cardinality string

const (
	single   cardinality = "a single value"
	required cardinality = "required"
	repeated cardinality = "repeated"
	mapped   cardinality = "a map"
)

// cardinality leaves out whether absence can be told: it changes neither bytes
// nor JSON that a caller sends.
func (p fieldPair) cardinality(ix *index, f *descriptorpb.FieldDescriptorProto, feat features) cardinality {
	switch {
	case f.GetLabel() == descriptorpb.FieldDescriptorProto_LABEL_REPEATED:
		if m := ix.messages[bare(f.GetTypeName())]; m != nil && m.desc.GetOptions().GetMapEntry() && f.GetType() == descriptorpb.FieldDescriptorProto_TYPE_MESSAGE {
			return mapped
		}
		return repeated
	case isRequired(f, feat):
		return required
	}
	return single
}

func isRequired(f *descriptorpb.FieldDescriptorProto, feat features) bool {
	return f.GetLabel() == descriptorpb.FieldDescriptorProto_LABEL_REQUIRED || feat.presence == descriptorpb.FeatureSet_LEGACY_REQUIRED
}

// fits says whether one may become the other. On the wire a map is a list of
// entries.
func (c cardinality) fits(d cardinality, json bool) bool {
	return c == d || !json && (c == repeated && d == mapped || c == mapped && d == repeated)
}

func (b *breaking) required(o, n *messageIndex, calls []string) {
	of, nf := o.requiredFields(), n.requiredFields()
	for _, num := range sortedNumbers(of) {
		if _, ok := nf[num]; !ok {
			f := o.desc.GetField()[of[num]]
			b.report("MESSAGE_SAME_REQUIRED_FIELDS", o.place(2, int32(of[num])), true, o.full+"."+f.GetName(), calls,
				"field %d is no longer required: old readers refuse messages without it", num)
		}
	}
	for _, num := range sortedNumbers(nf) {
		if _, ok := of[num]; !ok {
			f := n.desc.GetField()[nf[num]]
			b.report("MESSAGE_SAME_REQUIRED_FIELDS", n.place(2, int32(nf[num])), false, n.full+"."+f.GetName(), calls,
				"field %d is required now: messages of old callers are refused", num)
		}
	}
}

func sortedNumbers[V any](m map[int32]V) []int32 {
	nums := make([]int32, 0, len(m))
	for n := range m {
		nums = append(nums, n)
	}
	slices.Sort(nums)
	return nums
}

func (b *breaking) enum(o, n *enumIndex) {
	calls := b.carried[o.full]
	if b.json && o.features.json == descriptorpb.FeatureSet_ALLOW && n.features.json != descriptorpb.FeatureSet_ALLOW {
		b.report("ENUM_SAME_JSON_FORMAT", n.place(), false, o.full, calls, "JSON is no longer fully supported: json_format is %s", n.features.json)
	}
	now, was := byNumber(n.desc), byNumber(o.desc)
	for _, num := range sortedNumbers(was) {
		names := was[num]
		first := o.desc.GetValue()[names[0]]
		subject := o.full + "." + first.GetName()
		have, ok := now[num]
		if !ok {
			b.valueGone(o, n, num, names, subject, calls)
			continue
		}
		if !b.json {
			continue
		}
		for _, i := range names {
			name := o.desc.GetValue()[i].GetName()
			if !slices.ContainsFunc(have, func(j int) bool { return n.desc.GetValue()[j].GetName() == name }) {
				b.report("ENUM_VALUE_SAME_NAME", n.place(2, int32(have[0])), false, o.full+"."+name, calls,
					"value %d was renamed to %s", num, n.desc.GetValue()[have[0]].GetName())
			}
		}
	}
	b.reserved("RESERVED_ENUM_NO_DELETE", n.place(), o.full, calls, enumRanges(o.desc), enumRanges(n.desc), o.desc.GetReservedName(), n.desc.GetReservedName())
}

func byNumber(e *descriptorpb.EnumDescriptorProto) map[int32][]int {
	m := map[int32][]int{}
	for i, v := range e.GetValue() {
		m[v.GetNumber()] = append(m[v.GetNumber()], i)
	}
	return m
}

func (b *breaking) valueGone(o, n *enumIndex, num int32, names []int, subject string, calls []string) {
	at := o.place(2, int32(names[0]))
	if !inRanges(enumRanges(n.desc), int64(num)) {
		b.report("ENUM_VALUE_NO_DELETE_UNLESS_NUMBER_RESERVED", at, true, subject, calls, "value %d was removed or renumbered; to remove it, reserve its number", num)
	}
	if !b.json {
		return
	}
	for _, i := range names {
		if name := o.desc.GetValue()[i].GetName(); !slices.Contains(n.desc.GetReservedName(), name) {
			b.report("ENUM_VALUE_NO_DELETE_UNLESS_NAME_RESERVED", o.place(2, int32(i)), true, o.full+"."+name, calls,
				"value %d was removed or renumbered; to remove it, reserve its name", num)
		}
	}
}

// extensions compares those of messages that count, by number.
func (b *breaking) extensions() {
	for _, key := range sortedKeys(b.old.extensions) {
		o := b.old.extensions[key]
		n, ok := b.now.extensions[key]
		extendee := bare(o.desc.GetExtendee())
		m := b.old.messages[extendee]
		if !ok || m == nil || !b.counts(extendee, m.file) || strings.HasPrefix(extendee, "google.protobuf.") {
			continue // an unknown extension is kept and passed on, as buf has it
		}
		p := fieldPair{
			of: o.desc, nf: n.desc, ofeat: o.features.field(o.desc), nfeat: n.features.field(n.desc),
			at: n.place(), subject: o.full, calls: b.carried[extendee],
		}
		if b.json && o.full != n.full { // JSON calls an extension by its full name
			b.report("FIELD_SAME_NAME", p.tag(1), false, o.full, p.calls, "extension %d of %s was renamed to %s", o.desc.GetNumber(), extendee, n.full)
		}
		b.field(p)
	}
}

// defaults compares what an absent field means.
func (b *breaking) defaults(p fieldPair) {
	was, ok1 := b.old.defaultOf(p.of)
	is, ok2 := b.now.defaultOf(p.nf)
	if !ok1 || !ok2 || was == is || isString(p.of) != isString(p.nf) {
		return
	}
	x, err1 := strconv.ParseFloat(was, 64)
	y, err2 := strconv.ParseFloat(is, 64)
	if !isString(p.of) && err1 == nil && err2 == nil {
		if x == y && (x != math.Trunc(x) || math.Abs(x) < 1<<53) || math.IsNaN(x) && math.IsNaN(y) ||
			p.of.GetType() != p.nf.GetType() && float32(x) == float32(y) {
			return
		}
	}
	b.report("FIELD_SAME_DEFAULT", p.tag(7), false, p.subject, p.calls, "the default changed from %s to %s", short(strconv.Quote(was)), short(strconv.Quote(is)))
}

func isString(f *descriptorpb.FieldDescriptorProto) bool {
	return f.GetType() == descriptorpb.FieldDescriptorProto_TYPE_STRING || f.GetType() == descriptorpb.FieldDescriptorProto_TYPE_BYTES
}

// defaultOf is the value of an absent field as text, numbers in digits; !ok
// for types that have none.
func (ix *index) defaultOf(f *descriptorpb.FieldDescriptorProto) (string, bool) {
	switch f.GetType() {
	case descriptorpb.FieldDescriptorProto_TYPE_MESSAGE, descriptorpb.FieldDescriptorProto_TYPE_GROUP:
		return "", false
	case descriptorpb.FieldDescriptorProto_TYPE_ENUM:
		e := ix.enums[bare(f.GetTypeName())]
		if e == nil || len(e.desc.GetValue()) == 0 {
			return "", false
		}
		num := e.desc.GetValue()[0].GetNumber()
		for _, v := range e.desc.GetValue() {
			if f.DefaultValue != nil && v.GetName() == f.GetDefaultValue() {
				num = v.GetNumber()
			}
		}
		return strconv.Itoa(int(num)), true
	case descriptorpb.FieldDescriptorProto_TYPE_BOOL:
		if f.GetDefaultValue() == "true" {
			return "1", true
		}
		return "0", true
	case descriptorpb.FieldDescriptorProto_TYPE_STRING, descriptorpb.FieldDescriptorProto_TYPE_BYTES:
		return f.GetDefaultValue(), true
	}
	if f.DefaultValue == nil {
		return "0", true
	}
	return f.GetDefaultValue(), true
}
