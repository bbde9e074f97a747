package protobuf

import (
	"fmt"
	"strings"

	"google.golang.org/protobuf/types/descriptorpb"
)

// Additions are what a new version of an API has beyond an old one: full names,
// sorted. What is part of something new is not listed again.
type Additions struct {
	Services, Methods, Messages, Fields, Enums, Values []string
}

// Added lists what now has and old has not, Google's files left out. Both are
// closed sets such as Compile makes; like Breaking it never fails.
func Added(old, now *descriptorpb.FileDescriptorSet) Additions {
	var a Additions
	was, is := newIndex(old), newIndex(now)
	for _, name := range sortedKeys(is.services) {
		n, o := is.services[name], was.services[name]
		switch {
		case googles(n.file.name()):
		case o == nil:
			a.Services = append(a.Services, name)
		default:
			a.Methods = append(a.Methods, beyond(name, o.desc.GetMethod(), n.desc.GetMethod())...)
		}
	}
	for _, name := range sortedKeys(is.messages) {
		n, o := is.messages[name], was.messages[name]
		switch {
		case googles(n.file.name()), n.desc.GetOptions().GetMapEntry():
		case o == nil:
			a.Messages = append(a.Messages, name)
		default:
			a.Fields = append(a.Fields, beyond(name, o.desc.GetField(), n.desc.GetField())...)
		}
	}
	for _, name := range sortedKeys(is.enums) {
		n, o := is.enums[name], was.enums[name]
		switch {
		case googles(n.file.name()):
		case o == nil:
			a.Enums = append(a.Enums, name)
		default:
			a.Values = append(a.Values, beyond(name, o.desc.GetValue(), n.desc.GetValue())...)
		}
	}
	return a
}

// beyond are the names that only the second list has, below scope.
func beyond[D interface{ GetName() string }](scope string, old, now []D) []string {
	had := map[string]bool{}
	for _, d := range old {
		had[d.GetName()] = true
	}
	var names []string
	for _, d := range now {
		if !had[d.GetName()] {
			names = append(names, join(scope, d.GetName()))
			had[d.GetName()] = true
		}
	}
	return sortedOrNil(names)
}

// String is one line, "" for no additions: "+1 method shop.v1.Orders.Cancel, +2 fields".
func (a Additions) String() string {
	var parts []string
	for _, p := range []struct {
		names     []string
		one, many string
	}{
		{a.Services, "service", "services"}, {a.Methods, "method", "methods"}, {a.Messages, "message", "messages"},
		{a.Fields, "field", "fields"}, {a.Enums, "enum", "enums"}, {a.Values, "enum value", "enum values"},
	} {
		switch len(p.names) {
		case 0:
		case 1:
			parts = append(parts, "+1 "+p.one+" "+p.names[0])
		default:
			parts = append(parts, fmt.Sprintf("+%d %s", len(p.names), p.many))
		}
	}
	return strings.Join(parts, ", ")
}
