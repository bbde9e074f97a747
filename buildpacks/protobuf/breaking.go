package protobuf

import (
	"cmp"
	"fmt"
	"slices"
	"strings"

	"github.com/m3o/m3o"
	"google.golang.org/protobuf/types/descriptorpb"
)

// A Policy says which changes between two releases count as breaking. The
// zero Policy is WireJSON, since every app is called with JSON, too.
type Policy string

// The policies, from lenient to strict. docs/breaking-changes.md has the rules
// of each, beside buf's.
const (
	Off      Policy = "off"
	Wire     Policy = "WIRE"      // binary messages and calls of old clients go on working
	WireJSON Policy = "WIRE_JSON" // and those in JSON
)

// PolicyOf reads a policy as people write it, in any case and with - or _;
// "" is WireJSON. Anything else is an error of kind Invalid.
func PolicyOf(s string) (Policy, error) {
	switch strings.ReplaceAll(strings.ToUpper(strings.TrimSpace(s)), "-", "_") {
	case "OFF":
		return Off, nil
	case "WIRE":
		return Wire, nil
	case "WIRE_JSON", "":
		return WireJSON, nil
	}
	return "", &m3o.Error{Kind: m3o.Invalid, Msg: fmt.Sprintf("%q is not a policy for breaking changes", short(s)), Hint: "write WIRE_JSON, WIRE or off"}
}

// A Change is one thing that breaks callers of the old version.
type Change struct {
	Rule string // FIELD_SAME_NAME: buf's name of the rule

	// Where it is in the new version. Of what is removed: where it was in the
	// old one, and Old is set. Line and Col count from 1 and are 0 when the set
	// has no source info. File is the descriptors' name of it: Sources.Path
	// gives the path in the tree.
	File      string
	Line, Col int
	Old       bool

	Subject string   // full name: shop.v1.Order.total, shop.v1.Orders.Get
	Methods []string // "/shop.v1.Orders/Get": the old calls that carry it, sorted; nil when none does
	Msg     string   // "field 3 was removed and its number is not reserved"
}

// String is the line for the pusher.
func (c Change) String() string {
	at := c.File
	if c.Line > 0 {
		at = fmt.Sprintf("%s:%d:%d", c.File, c.Line, c.Col)
	}
	if c.Old {
		at += " (before)"
	}
	return fmt.Sprintf("%s: %s: %s (%s)", at, c.Subject, c.Msg, c.Rule)
}

// Breaking lists what in now breaks callers of old, in order of place. Both are
// closed sets such as Compile makes; whatever else they hold is passed over:
// it never fails. Two equal sets have no changes.
//
// What counts is every declaration that a service of the old version carries,
// and of the others those of files that are not there to define options and
// are not Google's: messages of events and stored data have readers, too.
func Breaking(old, now *descriptorpb.FileDescriptorSet, policy Policy) []Change {
	if policy == Off {
		return nil
	}
	b := &breaking{old: newIndex(old), now: newIndex(now), json: policy != Wire}
	b.compare()
	slices.SortFunc(b.changes, func(x, y Change) int {
		return cmp.Or(cmp.Compare(x.File, y.File), cmp.Compare(x.Line, y.Line), cmp.Compare(x.Col, y.Col),
			cmp.Compare(x.Subject, y.Subject), cmp.Compare(x.Rule, y.Rule), cmp.Compare(x.Msg, y.Msg))
	})
	return b.changes
}

type breaking struct {
	old, now *index
	json     bool
	carried  map[string][]string // full name of a type → old methods that carry it
	changes  []Change
}

// report adds a change at a place of the new version, or of the old one.
func (b *breaking) report(rule string, at place, old bool, subject string, carriers []string, format string, args ...any) {
	line, col := at.position()
	b.changes = append(b.changes, Change{
		Rule: rule, File: at.file.name(), Line: line, Col: col, Old: old,
		Subject: subject, Methods: carriers, Msg: fmt.Sprintf(format, args...),
	})
}

func (b *breaking) compare() {
	b.carried = b.old.carriers()
	moved := b.packages()
	b.services(moved)
	for _, name := range sortedKeys(b.old.messages) {
		o := b.old.messages[name]
		n, ok := b.now.messages[name]
		if !ok || !b.counts(name, o.file) || o.desc.GetOptions().GetMapEntry() {
			continue // the fields and methods that used it say that it is gone
		}
		b.message(o, n)
	}
	for _, name := range sortedKeys(b.old.enums) {
		o := b.old.enums[name]
		if n, ok := b.now.enums[name]; ok && b.counts(name, o.file) {
			b.enum(o, n)
		}
	}
	b.extensions()
}

// counts says whether anybody can have data of a type.
func (b *breaking) counts(name string, f *fileIndex) bool {
	return len(b.carried[name]) > 0 || !f.definesOptions && !googles(f.name())
}

func googles(file string) bool {
	for _, p := range []string{"google/protobuf/", "google/api/", "google/rpc/", "google/type/"} {
		if strings.HasPrefix(file, p) {
			return true
		}
	}
	return false
}

// packages reports files that changed their package, and returns the old
// services of those: they are not reported again one by one.
func (b *breaking) packages() map[string]bool {
	moved := map[string]bool{}
	for _, name := range sortedKeys(b.old.files) {
		o, n := b.old.files[name], b.now.files[name]
		if n == nil || o.fd.GetPackage() == n.fd.GetPackage() || o.definesOptions || googles(name) {
			continue
		}
		var carriers []string
		for _, s := range o.fd.GetService() {
			full := join(o.fd.GetPackage(), s.GetName())
			moved[full] = true
			for _, m := range s.GetMethod() {
				carriers = append(carriers, "/"+full+"/"+m.GetName())
			}
		}
		b.report("FILE_SAME_PACKAGE", place{n, []int32{2}}, false, name, sortedOrNil(carriers),
			"the package changed from %q to %q: every call and type of it has another name", o.fd.GetPackage(), n.fd.GetPackage())
	}
	return moved
}

func sortedOrNil(list []string) []string {
	if len(list) == 0 {
		return nil
	}
	return sortedSet(list)
}

func (b *breaking) services(moved map[string]bool) {
	// A package none of whose services is left is one change, not many.
	left := map[string]bool{}
	for _, s := range b.now.services {
		left[s.file.fd.GetPackage()] = true
	}
	gone := map[string][]string{}
	where := map[string]place{}
	for _, name := range sortedKeys(b.old.services) {
		o := b.old.services[name]
		n, ok := b.now.services[name]
		if ok {
			b.service(o, n)
			continue
		}
		var calls []string
		for _, m := range o.desc.GetMethod() {
			calls = append(calls, "/"+name+"/"+m.GetName())
		}
		pkg := o.file.fd.GetPackage()
		switch {
		case moved[name]:
		case googles(o.file.name()):
		case !left[pkg] && pkg != "":
			gone[pkg] = append(gone[pkg], calls...)
			if _, ok := where[pkg]; !ok {
				where[pkg] = place{o.file, []int32{2}}
			}
		default:
			b.report("PACKAGE_SERVICE_NO_DELETE", o.place(), true, name, sortedOrNil(calls), "the service was removed")
		}
	}
	for _, pkg := range sortedKeys(gone) {
		b.report("PACKAGE_NO_DELETE", where[pkg], true, pkg, sortedOrNil(gone[pkg]), "the package was removed with all its services")
	}
}

func (b *breaking) service(o, n *serviceIndex) {
	now := map[string]int{}
	for i, m := range n.desc.GetMethod() {
		if _, twice := now[m.GetName()]; !twice {
			now[m.GetName()] = i
		}
	}
	seen := map[string]bool{}
	for i, om := range o.desc.GetMethod() {
		if seen[om.GetName()] {
			continue
		}
		seen[om.GetName()] = true
		subject := o.full + "." + om.GetName()
		calls := []string{"/" + o.full + "/" + om.GetName()}
		j, ok := now[om.GetName()]
		if !ok {
			b.report("RPC_NO_DELETE", o.place(2, int32(i)), true, subject, calls, "the method was removed")
			continue
		}
		nm := n.desc.GetMethod()[j]
		at := func(tag int32) place { return n.place(2, int32(j), tag) }
		streams := func(rule, side string, tag int32, was, is bool) {
			if was != is {
				b.report(rule, at(tag), false, subject, calls, "the %s changed from %s to %s", side, streamWord(was), streamWord(is))
			}
		}
		streams("RPC_SAME_CLIENT_STREAMING", "request", 5, om.GetClientStreaming(), nm.GetClientStreaming())
		streams("RPC_SAME_SERVER_STREAMING", "response", 6, om.GetServerStreaming(), nm.GetServerStreaming())
		if om.GetInputType() != nm.GetInputType() {
			b.report("RPC_SAME_REQUEST_TYPE", at(2), false, subject, calls, "the request changed from %s to %s", bare(om.GetInputType()), bare(nm.GetInputType()))
		}
		if om.GetOutputType() != nm.GetOutputType() {
			b.report("RPC_SAME_RESPONSE_TYPE", at(3), false, subject, calls, "the response changed from %s to %s", bare(om.GetOutputType()), bare(nm.GetOutputType()))
		}
		if was, is := om.GetOptions().GetIdempotencyLevel(), nm.GetOptions().GetIdempotencyLevel(); was != is {
			b.report("RPC_SAME_IDEMPOTENCY_LEVEL", n.place(2, int32(j), 4, 34), false, subject, calls, "idempotency_level changed from %s to %s", was, is)
		}
	}
}

func streamWord(s bool) string {
	if s {
		return "a stream"
	}
	return "one message"
}

func bare(typeName string) string { return strings.TrimPrefix(typeName, ".") }

func sortedKeys[V any](m map[string]V) []string {
	keys := make([]string, 0, len(m))
	for k := range m {
		keys = append(keys, k)
	}
	slices.Sort(keys)
	return keys
}
