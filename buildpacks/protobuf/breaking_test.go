package protobuf

import (
	"fmt"
	"math/rand/v2"
	"os"
	"regexp"
	"slices"
	"strings"
	"testing"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/types/descriptorpb"
)

// in wraps message bodies into a file with a service that carries M.
func in(decls string) string {
	return "syntax = \"proto3\";\npackage p;\nservice S { rpc Do(M) returns (M); }\n" + decls
}

func in2(decls string) string {
	return "syntax = \"proto2\";\npackage p;\nservice S { rpc Do(M) returns (M); }\n" + decls
}

func inEd(decls string) string {
	return "edition = \"2023\";\npackage p;\nservice S { rpc Do(M) returns (M); }\n" + decls
}

// breakingRules has, for each rule, a change that breaks it and one near it that
// does not. wire and json are the rules that each policy reports, in order.
var breakingRules = []struct {
	name, old, now string
	wire, json     string
}{
	{"field removed", in("message M { string a = 1; string b = 2; }"), in("message M { string a = 1; }"),
		"FIELD_NO_DELETE_UNLESS_NUMBER_RESERVED", "FIELD_NO_DELETE_UNLESS_NAME_RESERVED FIELD_NO_DELETE_UNLESS_NUMBER_RESERVED"},
	{"field removed, number reserved", in("message M { string a = 1; string b = 2; }"), in("message M { string a = 1; reserved 2; }"),
		"", "FIELD_NO_DELETE_UNLESS_NAME_RESERVED"},
	{"field removed, name reserved", in("message M { string a = 1; string b = 2; }"), in("message M { string a = 1; reserved \"b\"; }"),
		"FIELD_NO_DELETE_UNLESS_NUMBER_RESERVED", "FIELD_NO_DELETE_UNLESS_NUMBER_RESERVED"},
	{"field removed, both reserved", in("message M { string a = 1; string b = 2; }"), in("message M { string a = 1; reserved 2 to 5; reserved \"b\"; }"), "", ""},
	{"field renumbered", in("message M { string a = 1; }"), in("message M { string a = 2; }"),
		"FIELD_NO_DELETE_UNLESS_NUMBER_RESERVED", "FIELD_NO_DELETE_UNLESS_NUMBER_RESERVED"},
	{"field renumbered, number reserved", in("message M { string a = 1; }"), in("message M { reserved 1; string a = 2; }"),
		"", "FIELD_NO_DELETE_UNLESS_NAME_RESERVED"},
	{"field added", in("message M { string a = 1; }"), in("message M { string a = 1; int32 b = 2; }"), "", ""},
	{"fields in another order", in("message M { string a = 1; int32 b = 2; }"), in("message M { int32 b = 2; string a = 1; }"), "", ""},
	{"field renamed", in("message M { string a = 1; }"), in("message M { string b = 1; }"), "", "FIELD_SAME_JSON_NAME FIELD_SAME_NAME"},
	{"field renamed, same name in JSON", in("message M { string a = 1; }"), in("message M { string b = 1 [json_name = \"a\"]; }"), "", "FIELD_SAME_NAME"},
	{"name in JSON", in("message M { string a = 1; }"), in("message M { string a = 1 [json_name = \"x\"]; }"), "", "FIELD_SAME_JSON_NAME"},
	{"name in JSON written out", in("message M { string a_b = 1; }"), in("message M { string a_b = 1 [json_name = \"aB\"]; }"), "", ""},

	{"int32 to int64", in("message M { int32 a = 1; }"), in("message M { int64 a = 1; }"), "", "FIELD_WIRE_JSON_COMPATIBLE_TYPE"},
	{"int32 to uint32", in("message M { int32 a = 1; }"), in("message M { uint32 a = 1; }"), "", ""},
	{"bool to uint64", in("message M { bool a = 1; }"), in("message M { uint64 a = 1; }"), "", "FIELD_WIRE_JSON_COMPATIBLE_TYPE"},
	{"int32 to sint32", in("message M { int32 a = 1; }"), in("message M { sint32 a = 1; }"), "FIELD_WIRE_COMPATIBLE_TYPE", "FIELD_WIRE_JSON_COMPATIBLE_TYPE"},
	{"sint32 to sint64", in("message M { sint32 a = 1; }"), in("message M { sint64 a = 1; }"), "", "FIELD_WIRE_JSON_COMPATIBLE_TYPE"},
	{"fixed32 to sfixed32", in("message M { fixed32 a = 1; }"), in("message M { sfixed32 a = 1; }"), "", ""},
	{"fixed64 to sfixed64", in("message M { fixed64 a = 1; }"), in("message M { sfixed64 a = 1; }"), "", ""},
	{"fixed32 to fixed64", in("message M { fixed32 a = 1; }"), in("message M { fixed64 a = 1; }"), "FIELD_WIRE_COMPATIBLE_TYPE", "FIELD_WIRE_JSON_COMPATIBLE_TYPE"},
	{"string to bytes", in("message M { string a = 1; }"), in("message M { bytes a = 1; }"), "", "FIELD_WIRE_JSON_COMPATIBLE_TYPE"},
	{"bytes to string", in("message M { bytes a = 1; }"), in("message M { string a = 1; }"), "FIELD_WIRE_COMPATIBLE_TYPE", "FIELD_WIRE_JSON_COMPATIBLE_TYPE"},
	{"float to double", in("message M { float a = 1; }"), in("message M { double a = 1; }"), "FIELD_WIRE_COMPATIBLE_TYPE", "FIELD_WIRE_JSON_COMPATIBLE_TYPE"},
	{"enum to int32", in("enum E { Z = 0; } message M { E a = 1; }"), in("enum E { Z = 0; } message M { int32 a = 1; }"), "FIELD_WIRE_COMPATIBLE_TYPE", "FIELD_WIRE_JSON_COMPATIBLE_TYPE"},
	{"another message", in("message A {} message B {} message M { A a = 1; }"), in("message A {} message B {} message M { B a = 1; }"), "FIELD_WIRE_COMPATIBLE_TYPE", "FIELD_WIRE_JSON_COMPATIBLE_TYPE"},
	{"another enum", in("enum A { AZ = 0; } enum B { BZ = 0; } message M { A a = 1; }"), in("enum A { AZ = 0; } enum B { BZ = 0; } message M { B a = 1; }"), "FIELD_WIRE_COMPATIBLE_TYPE", "FIELD_WIRE_JSON_COMPATIBLE_TYPE"},
	{"enum moved, with a value more", in("message M { enum E { Z = 0; } E a = 1; }"), in("enum E { Z = 0; ONE = 1; } message M { E a = 1; }"), "", ""},
	{"enum moved, with a value less", in("message M { enum E { Z = 0; ONE = 1; } E a = 1; }"), in("enum E { Z = 0; } message M { E a = 1; }"), "FIELD_WIRE_COMPATIBLE_TYPE", "FIELD_WIRE_JSON_COMPATIBLE_TYPE"},
	{"message to delimited", inEd("message A {} message M { A a = 1; }"), inEd("message A {} message M { A a = 1 [features.message_encoding = DELIMITED]; }"), "FIELD_WIRE_COMPATIBLE_TYPE", "FIELD_WIRE_JSON_COMPATIBLE_TYPE"},
	{"group to a message", in2("message M { optional group G = 1 {} }"), in2("message M { optional G g = 1; message G {} }"), "FIELD_WIRE_COMPATIBLE_TYPE", "FIELD_WIRE_JSON_COMPATIBLE_TYPE"},
	{"value of a map", in("message M { map<string, int32> a = 1; }"), in("message M { map<string, string> a = 1; }"), "FIELD_WIRE_COMPATIBLE_TYPE", "FIELD_WIRE_JSON_COMPATIBLE_TYPE"},
	{"key of a map", in("message M { map<string, int32> a = 1; }"), in("message M { map<int32, int32> a = 1; }"), "FIELD_WIRE_COMPATIBLE_TYPE", "FIELD_WIRE_JSON_COMPATIBLE_TYPE"},
	{"map renamed", in("message M { map<string, int32> a = 1; }"), in("message M { map<string, int32> b = 1; }"), "", "FIELD_SAME_JSON_NAME FIELD_SAME_NAME"},

	{"single to repeated", in("message M { int32 a = 1; }"), in("message M { repeated int32 a = 1; }"), "FIELD_WIRE_COMPATIBLE_CARDINALITY", "FIELD_WIRE_JSON_COMPATIBLE_CARDINALITY"},
	{"plain to optional", in("message M { int32 a = 1; }"), in("message M { optional int32 a = 1; }"), "", ""},
	{"optional to plain", in("message M { optional int32 a = 1; }"), in("message M { int32 a = 1; }"), "", ""},
	{"map to entries", in("message M { map<string, int32> a = 1; }"), in("message M { repeated AEntry a = 1; message AEntry { string key = 1; int32 value = 2; } }"), "", "FIELD_WIRE_JSON_COMPATIBLE_CARDINALITY"},
	{"optional to required", in2("message M { optional int32 a = 1; }"), in2("message M { required int32 a = 1; }"),
		"FIELD_WIRE_COMPATIBLE_CARDINALITY MESSAGE_SAME_REQUIRED_FIELDS", "FIELD_WIRE_JSON_COMPATIBLE_CARDINALITY MESSAGE_SAME_REQUIRED_FIELDS"},
	{"required by an edition", inEd("message M { int32 a = 1; }"), inEd("message M { int32 a = 1 [features.field_presence = LEGACY_REQUIRED]; }"),
		"FIELD_WIRE_COMPATIBLE_CARDINALITY MESSAGE_SAME_REQUIRED_FIELDS", "FIELD_WIRE_JSON_COMPATIBLE_CARDINALITY MESSAGE_SAME_REQUIRED_FIELDS"},
	{"required field added", in2("message M { optional int32 a = 1; }"), in2("message M { optional int32 a = 1; required int32 b = 2; }"), "MESSAGE_SAME_REQUIRED_FIELDS", "MESSAGE_SAME_REQUIRED_FIELDS"},
	{"required field removed", in2("message M { required int32 a = 1; }"), in2("message M { reserved 1; reserved \"a\"; }"), "MESSAGE_SAME_REQUIRED_FIELDS", "MESSAGE_SAME_REQUIRED_FIELDS"},

	{"into a oneof", in("message M { int32 a = 1; int32 b = 2; }"), in("message M { oneof x { int32 a = 1; } int32 b = 2; }"), "FIELD_SAME_ONEOF", "FIELD_SAME_ONEOF"},
	{"out of a oneof", in("message M { oneof x { int32 a = 1; int32 b = 2; } }"), in("message M { oneof x { int32 a = 1; } int32 b = 2; }"), "FIELD_SAME_ONEOF", "FIELD_SAME_ONEOF"},
	{"oneof renamed", in("message M { oneof x { int32 a = 1; } }"), in("message M { oneof y { int32 a = 1; } }"), "FIELD_SAME_ONEOF", "FIELD_SAME_ONEOF"},
	{"oneof with a field more", in("message M { oneof x { int32 a = 1; } }"), in("message M { oneof x { int32 a = 1; int32 b = 2; } }"), "", ""},

	{"default", in2("message M { optional int32 a = 1 [default = 5]; }"), in2("message M { optional int32 a = 1 [default = 6]; }"), "FIELD_SAME_DEFAULT", "FIELD_SAME_DEFAULT"},
	{"default removed", in2("message M { optional string a = 1 [default = \"x\"]; }"), in2("message M { optional string a = 1; }"), "FIELD_SAME_DEFAULT", "FIELD_SAME_DEFAULT"},
	{"default that is the zero", in2("message M { optional bool a = 1 [default = false]; optional double b = 2 [default = 0]; optional bytes c = 3 [default = \"\"]; }"), in2("message M { optional bool a = 1; optional double b = 2; optional bytes c = 3; }"), "", ""},
	{"default of an enum by its first value", in2("enum E { A = 1; B = 2; } message M { optional E a = 1; }"), in2("enum E { B = 2; A = 1; } message M { optional E a = 1; }"), "FIELD_SAME_DEFAULT", "FIELD_SAME_DEFAULT"},
	{"default written otherwise", in2("message M { optional double a = 1 [default = 1000000]; }"), in2("message M { optional double a = 1 [default = 1e6]; }"), "", ""},

	{"enum value removed", in("enum E { Z = 0; A = 1; } message M { E e = 1; }"), in("enum E { Z = 0; } message M { E e = 1; }"),
		"ENUM_VALUE_NO_DELETE_UNLESS_NUMBER_RESERVED", "ENUM_VALUE_NO_DELETE_UNLESS_NAME_RESERVED ENUM_VALUE_NO_DELETE_UNLESS_NUMBER_RESERVED"},
	{"enum value removed and reserved", in("enum E { Z = 0; A = 1; } message M { E e = 1; }"), in("enum E { Z = 0; reserved 1; reserved \"A\"; } message M { E e = 1; }"), "", ""},
	{"enum value removed, alias not reserved", in("enum E { option allow_alias = true; Z = 0; A = 1; B = 1; } message M { E e = 1; }"), in("enum E { Z = 0; reserved 1; reserved \"A\"; } message M { E e = 1; }"), "", "ENUM_VALUE_NO_DELETE_UNLESS_NAME_RESERVED"},
	{"enum value renamed", in("enum E { Z = 0; A = 1; } message M { E e = 1; }"), in("enum E { Z = 0; B = 1; } message M { E e = 1; }"), "", "ENUM_VALUE_SAME_NAME"},
	{"enum value with an alias more", in("enum E { Z = 0; A = 1; } message M { E e = 1; }"), in("enum E { option allow_alias = true; Z = 0; A = 1; B = 1; } message M { E e = 1; }"), "", ""},
	{"enum value with an alias less", in("enum E { option allow_alias = true; Z = 0; A = 1; B = 1; } message M { E e = 1; }"), in("enum E { Z = 0; A = 1; } message M { E e = 1; }"), "", "ENUM_VALUE_SAME_NAME"},
	{"enum value added", in("enum E { Z = 0; } message M { E e = 1; }"), in("enum E { Z = 0; A = 1; } message M { E e = 1; }"), "", ""},
	{"enum's JSON", inEd("enum E { Z = 0; } message M { E e = 1; }"), inEd("enum E { option features.json_format = LEGACY_BEST_EFFORT; Z = 0; } message M { E e = 1; }"), "", "ENUM_SAME_JSON_FORMAT"},
	{"message's JSON", inEd("message M {}"), inEd("message M { option features.json_format = LEGACY_BEST_EFFORT; }"), "", "MESSAGE_SAME_JSON_FORMAT"},
	{"message's JSON allowed", inEd("message M { option features.json_format = LEGACY_BEST_EFFORT; }"), inEd("message M {}"), "", ""},

	{"reserved number of a message", in("message M { reserved 2 to 5, 9; }"), in("message M { reserved 2 to 3, 5, 9; }"), "RESERVED_MESSAGE_NO_DELETE", "RESERVED_MESSAGE_NO_DELETE"},
	{"reserved name of a message", in("message M { reserved \"a\", \"b\"; }"), in("message M { reserved \"a\"; }"), "RESERVED_MESSAGE_NO_DELETE", "RESERVED_MESSAGE_NO_DELETE"},
	{"reserved numbers joined", in("message M { reserved 2, 3; }"), in("message M { reserved 1 to max; }"), "", ""},
	{"reserved number of an enum", in("enum E { Z = 0; reserved -5 to -1; } message M { E e = 1; }"), in("enum E { Z = 0; reserved -5 to -2; } message M { E e = 1; }"), "RESERVED_ENUM_NO_DELETE", "RESERVED_ENUM_NO_DELETE"},
	{"reserved name of an enum", in("enum E { Z = 0; reserved \"A\"; } message M { E e = 1; }"), in("enum E { Z = 0; } message M { E e = 1; }"), "RESERVED_ENUM_NO_DELETE", "RESERVED_ENUM_NO_DELETE"},

	{"method removed", in("message M {} service T { rpc A(M) returns (M); rpc B(M) returns (M); }"), in("message M {} service T { rpc A(M) returns (M); }"), "RPC_NO_DELETE", "RPC_NO_DELETE"},
	{"method added", in("message M {} service T { rpc A(M) returns (M); }"), in("message M {} service T { rpc A(M) returns (M); rpc B(M) returns (M); }"), "", ""},
	{"service removed", in("message M {} service T { rpc A(M) returns (M); }"), in("message M {}"), "PACKAGE_SERVICE_NO_DELETE", "PACKAGE_SERVICE_NO_DELETE"},
	{"service moved to another file", "-- a.proto --\n" + in("message M {}"), "-- b.proto --\n" + in("message M {}"), "", ""},
	{"package removed", "-- a.proto --\n" + in("message M {}") + "\n-- b.proto --\nsyntax = \"proto3\";\npackage q;\nmessage N {}\nservice T { rpc A(N) returns (N); }\nservice U { rpc A(N) returns (N); }\n",
		"-- a.proto --\n" + in("message M {}"), "PACKAGE_NO_DELETE", "PACKAGE_NO_DELETE"},
	{"package renamed", "syntax = \"proto3\";\npackage p;\nmessage M {}\nservice S { rpc A(M) returns (M); }\n", "syntax = \"proto3\";\npackage q;\nmessage M {}\nservice S { rpc A(M) returns (M); }\n", "FILE_SAME_PACKAGE", "FILE_SAME_PACKAGE"},
	{"request streams", "syntax = \"proto3\"; message M {} service S { rpc A(M) returns (M); }", "syntax = \"proto3\"; message M {} service S { rpc A(stream M) returns (M); }", "RPC_SAME_CLIENT_STREAMING", "RPC_SAME_CLIENT_STREAMING"},
	{"response streams no more", "syntax = \"proto3\"; message M {} service S { rpc A(M) returns (stream M); }", "syntax = \"proto3\"; message M {} service S { rpc A(M) returns (M); }", "RPC_SAME_SERVER_STREAMING", "RPC_SAME_SERVER_STREAMING"},
	{"request of another type", "syntax = \"proto3\"; message M {} message N {} service S { rpc A(M) returns (M); }", "syntax = \"proto3\"; message M {} message N {} service S { rpc A(N) returns (M); }", "RPC_SAME_REQUEST_TYPE", "RPC_SAME_REQUEST_TYPE"},
	{"response of another type", "syntax = \"proto3\"; message M {} message N {} service S { rpc A(M) returns (M); }", "syntax = \"proto3\"; message M {} message N {} service S { rpc A(M) returns (N); }", "RPC_SAME_RESPONSE_TYPE", "RPC_SAME_RESPONSE_TYPE"},
	{"idempotency", "syntax = \"proto3\"; message M {} service S { rpc A(M) returns (M) { option idempotency_level = NO_SIDE_EFFECTS; } }", "syntax = \"proto3\"; message M {} service S { rpc A(M) returns (M); }", "RPC_SAME_IDEMPOTENCY_LEVEL", "RPC_SAME_IDEMPOTENCY_LEVEL"},

	{"extension's type", in2("message M { extensions 10 to 20; } extend M { optional int32 x = 10; }"), in2("message M { extensions 10 to 20; } extend M { optional string x = 10; }"), "FIELD_WIRE_COMPATIBLE_TYPE", "FIELD_WIRE_JSON_COMPATIBLE_TYPE"},
	{"extension renamed", in2("message M { extensions 10 to 20; } extend M { optional int32 x = 10; }"), in2("message M { extensions 10 to 20; } extend M { optional int32 y = 10; }"), "", "FIELD_SAME_NAME"},
	{"message that no service carries", "syntax = \"proto3\"; message Event { int32 a = 1; }", "syntax = \"proto3\"; message Event { string a = 1; }", "FIELD_WIRE_COMPATIBLE_TYPE", "FIELD_WIRE_JSON_COMPATIBLE_TYPE"},
	{"file that defines options", "syntax = \"proto3\"; import \"google/protobuf/descriptor.proto\"; message Rules { int32 a = 1; } extend google.protobuf.FieldOptions { Rules rules = 50000; }",
		"syntax = \"proto3\"; import \"google/protobuf/descriptor.proto\"; message Rules { string a = 1; } extend google.protobuf.FieldOptions { string rules = 50000; }", "", ""},
	{"comments, options and imports", in("message M { string a = 1; }"), in("import \"google/protobuf/any.proto\";\noption go_package = \"x/y\";\n// new\nmessage M { string a = 1 [deprecated = true]; }"), "", ""},
}

func rulesOf(cs []Change) string {
	var rules []string
	for _, c := range cs {
		rules = append(rules, c.Rule)
	}
	slices.Sort(rules)
	return strings.Join(rules, " ")
}

func TestBreakingRules(t *testing.T) {
	for _, tt := range breakingRules {
		t.Run(tt.name, func(t *testing.T) {
			old, now := setOf(t, tt.old), setOf(t, tt.now)
			for policy, want := range map[Policy]string{Off: "", Wire: tt.wire, WireJSON: tt.json, "": tt.json} {
				if got := rulesOf(Breaking(old, now, policy)); got != want {
					t.Errorf("%q:\n got %s\nwant %s\n%v", policy, got, want, Breaking(old, now, policy))
				}
			}
			for _, set := range []*descriptorpb.FileDescriptorSet{old, now} {
				if c := Breaking(set, set, WireJSON); len(c) != 0 {
					t.Errorf("against itself: %v", c)
				}
			}
		})
	}
}

// The document, the code and the table above name the same rules.
func TestEveryRuleIsDocumentedAndTested(t *testing.T) {
	doc, err := os.ReadFile("../../docs/breaking-changes.md")
	if err != nil {
		t.Fatal(err)
	}
	inCode := map[string]bool{}
	for _, f := range []string{"breaking.go", "breaking_types.go", "breaking_reserved.go"} {
		src, err := os.ReadFile(f)
		if err != nil {
			t.Fatal(err)
		}
		for _, m := range regexp.MustCompile(`"([A-Z]+_[A-Z_]+)"`).FindAllStringSubmatch(string(src), -1) {
			if m[1] != string(WireJSON) {
				inCode[m[1]] = true
			}
		}
	}
	tested := map[string]bool{}
	for _, tt := range breakingRules {
		for _, r := range strings.Fields(tt.wire + " " + tt.json) {
			tested[r] = true
		}
	}
	for r := range inCode {
		if !tested[r] {
			t.Errorf("%s has no case in TestBreakingRules", r)
		}
		if !strings.Contains(string(doc), "`"+r+"`") {
			t.Errorf("%s is not in docs/breaking-changes.md", r)
		}
	}
	if len(inCode) < 25 {
		t.Errorf("only %d rules found in the code", len(inCode))
	}
}

func TestBreakingPlacesAndCallers(t *testing.T) {
	old := setOf(t, `-- shop.proto --
syntax = "proto3";
package shop.v1;

service Orders {
  rpc Get(GetRequest) returns (Order);
  rpc List(ListRequest) returns (ListResponse);
  rpc Ping(Empty) returns (Empty);
}
message Empty {}
message GetRequest { string id = 1; }
message ListRequest {}
message ListResponse { repeated Order orders = 1; }
message Order {
  string id = 1;
  int64 total = 2;
  string note = 3;
}
`)
	now := setOf(t, `-- shop.proto --
syntax = "proto3";
package shop.v1;

service Orders {
  rpc Get(GetRequest) returns (Order);
  rpc List(ListRequest) returns (ListResponse);
}
message Empty {}
message GetRequest { string id = 1; }
message ListRequest {}
message ListResponse { repeated Order orders = 1; }
message Order {
  string id = 1;

  string total = 2;
}
`)
	var got []string
	for _, c := range Breaking(old, now, Wire) {
		got = append(got, fmt.Sprintf("%s %v", c, c.Methods))
	}
	want := []string{
		"shop.proto:7:3 (before): shop.v1.Orders.Ping: the method was removed (RPC_NO_DELETE) [/shop.v1.Orders/Ping]",
		"shop.proto:15:3: shop.v1.Order.total: the type changed from int64 to string (FIELD_WIRE_COMPATIBLE_TYPE) [/shop.v1.Orders/Get /shop.v1.Orders/List]",
		"shop.proto:16:3 (before): shop.v1.Order.note: field 3 was removed and its number is not reserved (FIELD_NO_DELETE_UNLESS_NUMBER_RESERVED) [/shop.v1.Orders/Get /shop.v1.Orders/List]",
	}
	if !slices.Equal(got, want) {
		t.Errorf("got\n%s\nwant\n%s", strings.Join(got, "\n"), strings.Join(want, "\n"))
	}
}

func TestBreakingWithoutSourceInfo(t *testing.T) {
	old, now := setOf(t, in("message M { int32 a = 1; }")), setOf(t, in("message M { string a = 1; }"))
	for _, f := range now.File {
		f.SourceCodeInfo = nil
	}
	c := Breaking(old, now, Wire)
	if len(c) != 1 || c[0].Line != 0 || !strings.HasPrefix(c[0].String(), "a.proto: p.M.a:") {
		t.Errorf("%v", c)
	}
}

func TestPolicyOf(t *testing.T) {
	for in, want := range map[string]Policy{"": WireJSON, "off": Off, "OFF": Off, "wire": Wire, "WIRE": Wire, "wire-json": WireJSON, " WIRE_JSON ": WireJSON} {
		if got, err := PolicyOf(in); err != nil || got != want {
			t.Errorf("PolicyOf(%q) = %q, %v, want %q", in, got, err, want)
		}
	}
	_, err := PolicyOf("FILE")
	wantInvalid(t, err, `"FILE"`, "WIRE_JSON, WIRE or off")
}

// mutate changes random parts of a set: values, list lengths, presence.
func mutate(r *rand.Rand, m protoreflect.Message, depth int) {
	fields := m.Descriptor().Fields()
	for range 1 + r.IntN(3) {
		fd := fields.Get(r.IntN(fields.Len()))
		switch {
		case fd.IsMap():
		case fd.IsList():
			list := m.Mutable(fd).List()
			switch n := list.Len(); {
			case n > 0 && r.IntN(4) == 0:
				list.Truncate(r.IntN(n))
			case n > 0 && fd.Message() != nil && depth < 12:
				mutate(r, list.Get(r.IntN(n)).Message(), depth+1)
			case fd.Message() != nil:
				list.AppendMutable()
			default:
				list.Append(scalar(r, fd))
			}
		case fd.Message() != nil:
			if depth < 12 {
				mutate(r, m.Mutable(fd).Message(), depth+1)
			}
		case r.IntN(3) == 0:
			m.Clear(fd)
		default:
			m.Set(fd, scalar(r, fd))
		}
	}
}

func scalar(r *rand.Rand, fd protoreflect.FieldDescriptor) protoreflect.Value {
	words := []string{"", "p", "M", ".p.M", ".p.M.AEntry", "a", "proto3", "proto2", "editions", "\xff", ".", "-1e400", "nan"}
	switch fd.Kind() {
	case protoreflect.StringKind:
		return protoreflect.ValueOfString(words[r.IntN(len(words))])
	case protoreflect.BytesKind:
		return protoreflect.ValueOfBytes([]byte(words[r.IntN(len(words))]))
	case protoreflect.BoolKind:
		return protoreflect.ValueOfBool(r.IntN(2) == 0)
	case protoreflect.EnumKind:
		return protoreflect.ValueOfEnum(protoreflect.EnumNumber(r.IntN(20) - 1))
	case protoreflect.Int32Kind:
		return protoreflect.ValueOfInt32([]int32{0, 1, 2, -1, 1 << 30, -1 << 31, 1<<31 - 1}[r.IntN(7)])
	case protoreflect.Int64Kind:
		return protoreflect.ValueOfInt64(r.Int64())
	case protoreflect.Uint64Kind:
		return protoreflect.ValueOfUint64(r.Uint64())
	case protoreflect.DoubleKind:
		return protoreflect.ValueOfFloat64(r.Float64())
	}
	return fd.Default()
}

func FuzzBreaking(f *testing.F) {
	base := setOf(f, in2(`message M {
  required int32 r = 1; optional string s = 2 [default = "x"]; map<string, E> a = 3; oneof x { int32 i = 4; M m = 5; }
  reserved 8 to 9; reserved "gone"; extensions 100 to 200; optional group G = 6 { optional double d = 1 [default = 1e3]; }
} enum E { Z = 0; reserved -3 to -1; } extend M { repeated M y = 100; }`))
	f.Add(uint64(1), uint64(2))
	f.Add(uint64(3), uint64(3))
	for i := range 200 {
		f.Add(uint64(i*7), uint64(i*13+1))
	}
	f.Fuzz(func(t *testing.T, a, b uint64) {
		made := func(seed uint64) *descriptorpb.FileDescriptorSet {
			s := proto.Clone(base).(*descriptorpb.FileDescriptorSet)
			r := rand.New(rand.NewPCG(seed, 1))
			for range r.IntN(30) {
				mutate(r, s.ProtoReflect(), 0)
			}
			return s
		}
		x, y := made(a), made(b)
		for _, p := range []Policy{Wire, WireJSON} {
			if c := Breaking(x, x, p); len(c) != 0 {
				t.Errorf("a set against itself: %v", c)
			}
			one, two := Breaking(x, y, p), Breaking(x, y, p)
			if fmt.Sprint(one) != fmt.Sprint(two) {
				t.Error("two comparisons differ")
			}
			Breaking(base, y, p)
			Breaking(x, base, p)
		}
		Breaking(nil, x, WireJSON)
		Breaking(x, nil, WireJSON)
		Breaking(&descriptorpb.FileDescriptorSet{File: []*descriptorpb.FileDescriptorProto{nil, {MessageType: []*descriptorpb.DescriptorProto{nil, {Field: []*descriptorpb.FieldDescriptorProto{nil}}}}}}, x, WireJSON)
	})
}
