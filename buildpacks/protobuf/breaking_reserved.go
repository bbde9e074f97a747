package protobuf

import (
	"fmt"
	"slices"
	"strconv"

	"google.golang.org/protobuf/types/descriptorpb"
)

// A span is a range of numbers with both ends in it.
type span struct{ from, to int64 }

func (s span) String() string {
	if s.from == s.to {
		return strconv.FormatInt(s.from, 10)
	}
	return fmt.Sprintf("%d to %d", s.from, s.to)
}

func messageRanges(m *descriptorpb.DescriptorProto) []span {
	var out []span
	for _, r := range m.GetReservedRange() { // its end is exclusive
		out = append(out, span{int64(r.GetStart()), int64(r.GetEnd()) - 1})
	}
	return out
}

func enumRanges(e *descriptorpb.EnumDescriptorProto) []span {
	var out []span
	for _, r := range e.GetReservedRange() { // its end is inclusive
		out = append(out, span{int64(r.GetStart()), int64(r.GetEnd())})
	}
	return out
}

func inRanges(list []span, n int64) bool {
	return slices.ContainsFunc(list, func(s span) bool { return s.from <= n && n <= s.to })
}

// without is the part of s that no range of list has.
func without(s span, list []span) []span {
	left := []span{s}
	for _, c := range list {
		var next []span
		for _, l := range left {
			if c.to < l.from || c.from > l.to || c.from > c.to {
				next = append(next, l)
				continue
			}
			if l.from < c.from {
				next = append(next, span{l.from, c.from - 1})
			}
			if l.to > c.to {
				next = append(next, span{c.to + 1, l.to})
			}
		}
		left = next
	}
	return left
}

func (b *breaking) reserved(rule string, at place, subject string, calls []string, was, is []span, wasNames, isNames []string) {
	for _, s := range was {
		if s.from > s.to {
			continue
		}
		for _, lost := range without(s, is) {
			b.report(rule, at, false, subject, calls, "%s is no longer reserved: old data may have it with another meaning", lost)
		}
	}
	for _, n := range sortedSet(wasNames) {
		if !slices.Contains(isNames, n) {
			b.report(rule, at, false, subject, calls, "the name %q is no longer reserved: old data may have it with another meaning", n)
		}
	}
}
