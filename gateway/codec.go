package gateway

import (
	"cmp"
	"fmt"
	"strings"

	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/types/dynamicpb"
)

// codec turns one message type between JSON and the wire. Both append to dst.
// toWire's errors say what is wrong with the JSON and name the field.
type codec interface {
	toWire(dst, json []byte) ([]byte, error)
	toJSON(dst, wire []byte) ([]byte, error)
}

// maxNesting is how deep messages may lie in each other, as in other protobuf
// implementations.
const maxNesting = 100

// generic turns any message, by way of a message object: protojson defines
// what is right.
type generic struct {
	desc   protoreflect.MessageDescriptor
	types  *dynamicpb.Types
	strict bool // unknown fields are errors
	// nesting is how deep messages may lie in this one; maxNesting when 0.
	nesting int
}

func (c *generic) toWire(dst, json []byte) ([]byte, error) {
	m, err := c.parse(json)
	if err != nil {
		return nil, err
	}
	return c.marshal(dst, m)
}

func (c *generic) marshal(dst []byte, m proto.Message) ([]byte, error) {
	out, err := proto.MarshalOptions{}.MarshalAppend(dst, m)
	if err != nil {
		return nil, fmt.Errorf("encode %s: %w", c.desc.FullName(), err)
	}
	return out, nil
}

func (c *generic) parse(json []byte) (*dynamicpb.Message, error) {
	m := dynamicpb.NewMessage(c.desc)
	// Unknown fields are ignored unless the app wants otherwise: an old app must
	// not refuse a new client.
	err := protojson.UnmarshalOptions{DiscardUnknown: !c.strict, Resolver: c.types, RecursionLimit: cmp.Or(c.nesting, maxNesting)}.Unmarshal(json, m)
	if err != nil {
		return nil, invalid("%s: %s", c.desc.FullName(), jsonError(err))
	}
	return m, nil
}

// jsonError is what protojson says, without its prefix, whose space varies on
// purpose.
func jsonError(err error) string {
	s := strings.ReplaceAll(err.Error(), "\u00a0", " ")
	return strings.ToValidUTF8(strings.TrimPrefix(s, "proto: "), "\uFFFD")
}

func (c *generic) toJSON(dst, wire []byte) ([]byte, error) {
	m := dynamicpb.NewMessage(c.desc)
	if err := (proto.UnmarshalOptions{Resolver: c.types}).Unmarshal(wire, m); err != nil {
		return nil, fmt.Errorf("decode %s: %w", c.desc.FullName(), err)
	}
	out, err := protojson.MarshalOptions{Resolver: c.types}.MarshalAppend(dst, m)
	if err != nil {
		return nil, fmt.Errorf("print %s: %w", c.desc.FullName(), err)
	}
	return out, nil
}
