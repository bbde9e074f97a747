package protobuf

import (
	"testing"
	"testing/fstest"

	"google.golang.org/protobuf/types/descriptorpb"
)

func TestAdded(t *testing.T) {
	set := func(src string) *descriptorpb.FileDescriptorSet {
		t.Helper()
		s, err := Find(fstest.MapFS{"a.proto": {Data: []byte("syntax = \"proto3\";\npackage a.v1;\nimport \"google/protobuf/timestamp.proto\";\n" + src)}}, ".")
		if err != nil {
			t.Fatal(err)
		}
		r, err := Compile(t.Context(), s)
		if err != nil {
			t.Fatal(err)
		}
		return r.Set
	}
	const base = `message M { string s = 1; google.protobuf.Timestamp at = 2; }
enum E { E_UNSPECIFIED = 0; }
service S { rpc Get(M) returns (M); }
`
	old := set(base)
	for want, src := range map[string]string{
		"": base,
		"+1 method a.v1.S.List, +1 field a.v1.M.n, +1 enum value a.v1.E.E_ONE": `message M { string s = 1; google.protobuf.Timestamp at = 2; int32 n = 3; }
enum E { E_UNSPECIFIED = 0; E_ONE = 1; }
service S { rpc Get(M) returns (M); rpc List(M) returns (stream M); }
`,
		"+1 service a.v1.T, +2 messages, +1 field a.v1.M.x": `message M { string s = 1; google.protobuf.Timestamp at = 2; map<string, int32> x = 3; }
message N { string s = 1; message In { string s = 1; } }
enum E { E_UNSPECIFIED = 0; }
service S { rpc Get(M) returns (M); }
service T { rpc Get(M) returns (M); rpc Put(M) returns (M); }
`,
		"+1 enum a.v1.F": base + "enum F { F_UNSPECIFIED = 0; F_ONE = 1; }\n",
	} {
		if got := Added(old, set(src)).String(); got != want {
			t.Errorf("Added = %q, want %q", got, want)
		}
	}
	if got := Added(set(base), &descriptorpb.FileDescriptorSet{}).String(); got != "" {
		t.Errorf("of nothing: %q", got)
	}
}
