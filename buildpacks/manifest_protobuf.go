package buildpacks

// ProtobufKeys are what m3o.yaml says below "protobuf".
type ProtobufKeys struct {
	Breaking string // the policy for breaking changes: "WIRE_JSON", "WIRE", "off"; "" for the default
}

// protobufKeys say how the .proto files of the tree are treated.
func protobufKeys() []key[Manifest] {
	type P = ProtobufKeys
	return []key[Manifest]{
		group("protobuf", "How the `.proto` files of the tree are treated.", func(m *Manifest) *P { return &m.Protobuf }, []key[P]{
			choice("breaking", "Which changes to the API of the live release refuse a push: `WIRE_JSON` (the default) what breaks callers with JSON or binary messages, `WIRE` what breaks those with binary ones, `off` none.",
				[]string{"WIRE_JSON", "WIRE", "off"}, func(p *P) *string { return &p.Breaking }),
		}),
	}
}
