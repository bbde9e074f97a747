package protobuf

import (
	"fmt"
	"slices"
	"strings"

	"google.golang.org/protobuf/types/descriptorpb"
)

// An index finds declarations of a set by full name. It is made from the
// descriptor messages and not from linked descriptors, so that a set that does
// not link, as an older version of ours may have stored, can be compared as far
// as it goes. Of two declarations of one name the first counts.
type index struct {
	files      map[string]*fileIndex
	messages   map[string]*messageIndex
	enums      map[string]*enumIndex
	services   map[string]*serviceIndex
	extensions map[string]*extensionIndex // by extendee and number
}

type fileIndex struct {
	fd             *descriptorpb.FileDescriptorProto
	definesOptions bool // it extends the options of descriptors
	spans          map[string][]int32
}

func (f *fileIndex) name() string { return f.fd.GetName() }

type decl struct {
	file *fileIndex
	path []int32 // as in SourceCodeInfo
	full string
}

// place is where the declaration is, or a part of it.
func (d decl) place(tags ...int32) place { return place{d.file, slices.Concat(d.path, tags)} }

type messageIndex struct {
	decl
	desc     *descriptorpb.DescriptorProto
	features features
}

type enumIndex struct {
	decl
	desc     *descriptorpb.EnumDescriptorProto
	features features
}

type serviceIndex struct {
	decl
	desc *descriptorpb.ServiceDescriptorProto
}

type extensionIndex struct {
	decl
	desc     *descriptorpb.FieldDescriptorProto
	features features
}

// requiredFields are the indexes of required fields by number.
func (m *messageIndex) requiredFields() map[int32]int {
	req := map[int32]int{}
	for i, f := range m.desc.GetField() {
		if _, twice := req[f.GetNumber()]; !twice && isRequired(f, m.features.field(f)) {
			req[f.GetNumber()] = i
		}
	}
	return req
}

// features are the settings of an edition that matter on the wire and in JSON.
// proto2 and proto3 are editions with fixed ones.
type features struct {
	presence  descriptorpb.FeatureSet_FieldPresence
	delimited bool
	json      descriptorpb.FeatureSet_JsonFormat
}

func fileFeatures(fd *descriptorpb.FileDescriptorProto) features {
	f := features{presence: descriptorpb.FeatureSet_EXPLICIT, json: descriptorpb.FeatureSet_ALLOW}
	switch fd.GetSyntax() {
	case "proto3":
		f.presence = descriptorpb.FeatureSet_IMPLICIT
	case "editions":
	default:
		f.json = descriptorpb.FeatureSet_LEGACY_BEST_EFFORT
	}
	return f.with(fd.GetOptions().GetFeatures())
}

// with are the features of something inside, which may set its own.
func (f features) with(s *descriptorpb.FeatureSet) features {
	if s == nil {
		return f
	}
	if s.FieldPresence != nil {
		f.presence = s.GetFieldPresence()
	}
	if s.MessageEncoding != nil {
		f.delimited = s.GetMessageEncoding() == descriptorpb.FeatureSet_DELIMITED
	}
	if s.JsonFormat != nil {
		f.json = s.GetJsonFormat()
	}
	return f
}

func (f features) field(fd *descriptorpb.FieldDescriptorProto) features {
	return f.with(fd.GetOptions().GetFeatures())
}

// A place is a path of SourceCodeInfo in a file.
type place struct {
	file *fileIndex
	path []int32
}

func (p place) sub(tag int32) place { return place{p.file, append(slices.Clone(p.path), tag)} }

// position is where the path begins, or the nearest one around it that is
// known; 0, 0 when none is.
func (p place) position() (line, col int) {
	if p.file.spans == nil {
		p.file.spans = map[string][]int32{}
		for _, l := range p.file.fd.GetSourceCodeInfo().GetLocation() {
			k := pathKey(l.GetPath())
			if _, twice := p.file.spans[k]; !twice && len(l.GetSpan()) >= 3 {
				p.file.spans[k] = l.GetSpan()
			}
		}
	}
	for n := len(p.path); n > 0; n-- {
		if s, ok := p.file.spans[pathKey(p.path[:n])]; ok {
			return int(s[0]) + 1, int(s[1]) + 1
		}
	}
	return 0, 0
}

func pathKey(path []int32) string { return fmt.Sprint(path) }

const maxNested = 100 // deeper messages of a broken set are passed over

func newIndex(set *descriptorpb.FileDescriptorSet) *index {
	ix := &index{
		files: map[string]*fileIndex{}, messages: map[string]*messageIndex{}, enums: map[string]*enumIndex{},
		services: map[string]*serviceIndex{}, extensions: map[string]*extensionIndex{},
	}
	for _, fd := range set.GetFile() {
		if fd == nil || ix.files[fd.GetName()] != nil {
			continue
		}
		f := &fileIndex{fd: fd}
		ix.files[fd.GetName()] = f
		feat := fileFeatures(fd)
		pkg := fd.GetPackage()
		for i, m := range fd.GetMessageType() {
			ix.addMessage(f, []int32{4, int32(i)}, pkg, m, feat, 0)
		}
		for i, e := range fd.GetEnumType() {
			ix.addEnum(f, []int32{5, int32(i)}, pkg, e, feat)
		}
		for i, s := range fd.GetService() {
			full := join(pkg, s.GetName())
			if ix.services[full] == nil {
				ix.services[full] = &serviceIndex{decl{f, []int32{6, int32(i)}, full}, s}
			}
		}
		for i, e := range fd.GetExtension() {
			ix.addExtension(f, []int32{7, int32(i)}, pkg, e, feat)
		}
	}
	return ix
}

func (ix *index) addMessage(f *fileIndex, path []int32, scope string, m *descriptorpb.DescriptorProto, feat features, depth int) {
	if m == nil || depth > maxNested {
		return
	}
	full := join(scope, m.GetName())
	feat = feat.with(m.GetOptions().GetFeatures())
	if ix.messages[full] == nil {
		ix.messages[full] = &messageIndex{decl{f, path, full}, m, feat}
	}
	for i, n := range m.GetNestedType() {
		ix.addMessage(f, slices.Concat(path, []int32{3, int32(i)}), full, n, feat, depth+1)
	}
	for i, e := range m.GetEnumType() {
		ix.addEnum(f, slices.Concat(path, []int32{4, int32(i)}), full, e, feat)
	}
	for i, e := range m.GetExtension() {
		ix.addExtension(f, slices.Concat(path, []int32{6, int32(i)}), full, e, feat)
	}
}

func (ix *index) addEnum(f *fileIndex, path []int32, scope string, e *descriptorpb.EnumDescriptorProto, feat features) {
	full := join(scope, e.GetName())
	if e != nil && ix.enums[full] == nil {
		ix.enums[full] = &enumIndex{decl{f, path, full}, e, feat.with(e.GetOptions().GetFeatures())}
	}
}

func (ix *index) addExtension(f *fileIndex, path []int32, scope string, e *descriptorpb.FieldDescriptorProto, feat features) {
	if e == nil {
		return
	}
	extendee := bare(e.GetExtendee())
	if strings.HasPrefix(extendee, "google.protobuf.") && strings.HasSuffix(extendee, "Options") {
		f.definesOptions = true
	}
	key := fmt.Sprintf("%s %d", extendee, e.GetNumber())
	if ix.extensions[key] == nil {
		ix.extensions[key] = &extensionIndex{decl{f, path, join(scope, e.GetName())}, e, feat}
	}
}

// carriers are, for every type, the methods whose requests or responses can
// hold it.
func (ix *index) carriers() map[string][]string {
	all := map[string][]string{}
	uses := map[string][]string{} // extendee → types of its extensions
	for _, e := range ix.extensions {
		if n := bare(e.desc.GetTypeName()); n != "" {
			x := bare(e.desc.GetExtendee())
			uses[x] = append(uses[x], n)
		}
	}
	for _, name := range sortedKeys(ix.services) {
		s := ix.services[name]
		if googles(s.file.name()) {
			continue
		}
		for _, m := range s.desc.GetMethod() {
			call := "/" + name + "/" + m.GetName()
			seen := map[string]bool{}
			stack := []string{bare(m.GetInputType()), bare(m.GetOutputType())}
			for len(stack) > 0 {
				t := stack[len(stack)-1]
				stack = stack[:len(stack)-1]
				if seen[t] {
					continue
				}
				seen[t] = true
				all[t] = append(all[t], call)
				if msg := ix.messages[t]; msg != nil {
					for _, f := range msg.desc.GetField() {
						if n := bare(f.GetTypeName()); n != "" {
							stack = append(stack, n)
						}
					}
					stack = append(stack, uses[t]...)
				}
			}
		}
	}
	for t := range all {
		slices.Sort(all[t])
		all[t] = slices.Compact(all[t])
	}
	return all
}
