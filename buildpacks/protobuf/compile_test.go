package protobuf

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"testing/fstest"

	"github.com/m3o/m3o"
	"google.golang.org/protobuf/reflect/protodesc"
	"google.golang.org/protobuf/types/descriptorpb"
)

func TestCompile(t *testing.T) {
	r := mustCompile(t, tree(`
-- proto/shop/v1/shop.proto --
syntax = "proto3";
package shop.v1;
import "google/api/annotations.proto";
import "google/api/field_behavior.proto";
import "google/type/money.proto";
import "google/rpc/status.proto";
import "google/protobuf/timestamp.proto";
import "shop/v1/item.proto";

// Orders takes orders.
service Orders {
  // Get finds one.
  rpc Get(GetRequest) returns (Order) { option (google.api.http) = { get: "/v1/orders/{id}" }; }
  rpc Watch(GetRequest) returns (stream Order);
}
message GetRequest { string id = 1 [(google.api.field_behavior) = REQUIRED]; }
message Order {
  string id = 1;
  google.type.Money total = 2;
  google.protobuf.Timestamp at = 3;
  google.rpc.Status status = 4;
  Item item = 5;
}
-- proto/shop/v1/item.proto --
syntax = "proto3";
package shop.v1;
message Item { string name = 1; }
`), ".")

	var order []string
	for _, f := range r.Set.File {
		for _, d := range f.Dependency {
			if !slices.Contains(order, d) {
				t.Errorf("%s comes before %s, which it imports", f.GetName(), d)
			}
		}
		order = append(order, f.GetName())
	}
	if _, err := protodesc.NewFiles(r.Set); err != nil {
		t.Errorf("the set is not closed: %v", err)
	}
	if len(r.Services) != 1 || r.Services[0].Name != "shop.v1.Orders" || r.Services[0].Path != "proto/shop/v1/shop.proto" ||
		len(r.Services[0].Methods) != 2 || !r.Services[0].Methods[1].ServerStreams || r.Services[0].Methods[0].Output != "shop.v1.Order" {
		t.Errorf("services: %+v", r.Services)
	}
	main := r.Set.File[len(r.Set.File)-1]
	comment := ""
	for _, l := range main.GetSourceCodeInfo().GetLocation() {
		if slices.Equal(l.Path, []int32{6, 0, 2, 0}) {
			comment = l.GetLeadingComments()
		}
	}
	if comment != " Get finds one.\n" {
		t.Errorf("the comment of Get is %q", comment)
	}
	if len(r.Notes) != 0 {
		t.Errorf("notes %q", r.Notes)
	}
	if len(r.Stale) != 0 {
		t.Errorf("stale without a go.mod: %v", r.Stale)
	}
}

func TestCompileGivesTheSameBytes(t *testing.T) {
	fsys := manyFiles(8)
	var first []byte
	for range 3 {
		b, err := mustCompile(t, fsys, ".").Marshal()
		if err != nil {
			t.Fatal(err)
		}
		if first == nil {
			first = b
		} else if !bytes.Equal(first, b) {
			t.Fatal("two compilations of the same sources differ")
		}
	}
}

func TestNothingToCompile(t *testing.T) {
	r := mustCompile(t, tree("-- main.go --\npackage main\n"), ".")
	if len(r.Set.GetFile()) != 0 || len(r.Services) != 0 {
		t.Errorf("%+v", r)
	}
}

// manyFiles are n files of a shop-like size, each importing some before it.
func manyFiles(n int) fstest.MapFS {
	t := fstest.MapFS{}
	for i := range n {
		var b strings.Builder
		fmt.Fprintf(&b, "syntax = \"proto3\";\npackage shop.p%d;\n", i)
		b.WriteString("import \"google/protobuf/timestamp.proto\";\nimport \"google/api/annotations.proto\";\n")
		for j := max(0, i-3); j < i; j++ {
			fmt.Fprintf(&b, "import \"shop/p%d/x.proto\";\n", j)
		}
		fmt.Fprintf(&b, "// Service%d does things.\nservice Service%d {\n", i, i)
		for m := range 8 {
			fmt.Fprintf(&b, "  // M%d is a method.\n  rpc M%d(Req%d) returns (Res%d) { option (google.api.http) = { post: \"/p%d/m%d\" body: \"*\" }; }\n", m, m, m, m, i, m)
		}
		b.WriteString("}\n")
		for m := range 8 {
			fmt.Fprintf(&b, "// Req%d is asked.\nmessage Req%d {\n", m, m)
			for f := 1; f <= 10; f++ {
				fmt.Fprintf(&b, "  string field_%d = %d; // field %d\n", f, f, f)
			}
			fmt.Fprintf(&b, "}\nmessage Res%d {\n  google.protobuf.Timestamp at = 1;\n  map<string, Req%d> all = 2;\n", m, m)
			for k, j := 3, max(0, i-3); j < i; k, j = k+1, j+1 {
				fmt.Fprintf(&b, "  shop.p%d.Req0 dep%d = %d;\n", j, j, k)
			}
			b.WriteString("}\n")
		}
		t[fmt.Sprintf("proto/shop/p%d/x.proto", i)] = &fstest.MapFile{Data: []byte(b.String())}
	}
	return t
}

func BenchmarkCompile100(b *testing.B) {
	fsys := manyFiles(100)
	for b.Loop() {
		mustCompile(b, fsys, ".")
	}
}

func TestMalformedProto(t *testing.T) {
	deep := "syntax = \"proto3\";\n" + strings.Repeat("message M {\n", 5000) + strings.Repeat("}", 5000)
	chain := fstest.MapFS{}
	for i := range 1000 {
		chain[fmt.Sprintf("c%d.proto", i)] = &fstest.MapFile{Data: fmt.Appendf(nil, "syntax = \"proto3\";\nimport \"c%d.proto\";\n", (i+1)%1000)}
	}
	var wrong strings.Builder
	wrong.WriteString("syntax = \"proto3\";\nmessage M {\n")
	for i := range 50 {
		fmt.Fprintf(&wrong, "  Nope%d f%d = %d;\n", i, i, i+1)
	}
	wrong.WriteString("}\n")
	for _, tt := range []struct {
		name  string
		tree  fstest.MapFS
		words []string
	}{
		{"syntax error", tree("-- proto/x.proto --\nsyntax = \"proto3\";\nmessage M {\n  string a = ;\n}\n"), []string{"proto/x.proto:3:14: syntax error"}},
		{"unknown type", tree("-- proto/x.proto --\nsyntax = \"proto3\";\nmessage M {\n  Nope a = 1;\n}\n"), []string{"proto/x.proto:3:3:", "Nope"}},
		{"every file's errors", tree("-- a.proto --\nsyntax = \"proto3\";\nmessage A { X x = 1; }\n-- b.proto --\nsyntax = \"proto3\";\nmessage B { Y y = 1; }\n"), []string{"a.proto:2:13:", "b.proto:2:13:"}},
		{"twenty of fifty", fstest.MapFS{"x.proto": {Data: []byte(wrong.String())}}, []string{"x.proto:3:3:", "x.proto:22:3:", "and 30 more"}},
		{"missing import", tree("-- proto/x.proto --\nsyntax = \"proto3\";\nimport \"a/b.proto\";\nimport \"buf/validate/validate.proto\";\n"),
			[]string{`proto/x.proto:2:8: imported file "a/b.proto" is not in the repository`, "proto/x.proto:3:8:", "bufbuild/protovalidate", "third_party/proto"}},
		{"missing import of an import", tree("-- proto/x.proto --\nsyntax = \"proto3\";\nimport \"d.proto\";\n-- third_party/d.proto --\nsyntax = \"proto3\";\nimport \"gone.proto\";\n"), []string{"third_party/d.proto:2:8"}},
		{"imports in a circle", tree("-- a.proto --\nsyntax = \"proto3\";\nimport \"b.proto\";\n-- b.proto --\nsyntax = \"proto3\";\nimport \"c.proto\";\n-- c.proto --\nsyntax = \"proto3\";\nimport \"a.proto\";\n"),
			[]string{"c.proto:2:8: the imports go round in a circle: a.proto → b.proto → c.proto → a.proto"}},
		{"file that imports itself", tree("-- proto/a.proto --\nsyntax = \"proto3\";\nimport \"a.proto\";\n"), []string{"proto/a.proto:2:8: the imports go round in a circle: a.proto → a.proto"}},
		{"long circle", chain, []string{"in a circle", "…"}},
		{"one symbol in two files", tree("-- proto/a.proto --\nsyntax = \"proto3\";\npackage p;\nmessage M {}\n-- proto/b.proto --\nsyntax = \"proto3\";\npackage p;\nmessage M {}\n"),
			[]string{`.proto:3:9:`, `"p.M" already defined at proto/`}},
		{"not UTF-8", fstest.MapFS{"proto/x.proto": {Data: []byte("syntax = \"proto3\";\n// ä \xff\n")}}, []string{"proto/x.proto:2:6: the file is not UTF-8"}},
		{"UTF-16", fstest.MapFS{"x.proto": {Data: []byte("\xff\xfes\x00y\x00")}}, []string{"x.proto:1:1: the file is not UTF-8"}},
		{"zero bytes", fstest.MapFS{"x.proto": {Data: make([]byte, 1000)}}, []string{"x.proto:1:1"}},
		{"nested deeply", fstest.MapFS{"x.proto": {Data: []byte(deep)}}, []string{"x.proto:102:11: more than 100 brackets"}},
		{"nested deeply in an option", fstest.MapFS{"x.proto": {Data: []byte("syntax = \"proto3\";\noption (x) = " + strings.Repeat("{a", 100000))}}, []string{"brackets are open here"}},
		{"field number twice", tree("-- x.proto --\nsyntax = \"proto3\";\nmessage M { string a = 1; string b = 1; }\n"), []string{"x.proto:2:"}},
		{"unknown syntax", tree("-- x.proto --\nsyntax = \"proto9\";\n"), []string{"x.proto:1:10"}},
		{"conflict marks", tree("-- x.proto --\nsyntax = \"proto3\";\n<<<<<<< HEAD\nmessage A {}\n=======\nmessage B {}\n>>>>>>> main\n"), []string{"x.proto:2:1"}},
		{"path out of the tree", tree("-- x.proto --\nsyntax = \"proto3\";\nimport \"../../etc/passwd\";\n"), []string{"x.proto:2:8"}},
		{"one file, two names", tree("-- buf.yaml --\nversion: v1\n-- a.proto --\nsyntax = \"proto3\";\nimport \"b/c.proto\";\nimport \"c.proto\";\n-- b/c.proto --\nsyntax = \"proto3\";\n"), []string{`b/c.proto: the file is imported as`}},
		{"too much together", func() fstest.MapFS {
			m := fstest.MapFS{}
			for i := range maxTotal/maxFile + 1 {
				m[fmt.Sprintf("f%d.proto", i)] = &fstest.MapFile{Data: bytes.Repeat([]byte("\n"), maxFile)}
			}
			return m
		}(), []string{"larger than 16 MB together"}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			_, err := compileTree(t, tt.tree, ".")
			wantInvalid(t, err, tt.words...)
			if n := strings.Count(err.Error(), "\n"); n > maxErrors {
				t.Errorf("%d lines", n+1)
			}
		})
	}
}

func TestWarningsBecomeNotes(t *testing.T) {
	r := mustCompile(t, tree("-- proto/x.proto --\nsyntax = \"proto3\";\nimport \"google/protobuf/any.proto\";\nmessage M {}\n-- proto/old.proto --\nmessage Old { optional int32 a = 1; }\n"), ".")
	if len(r.Notes) != 1 || !strings.HasPrefix(r.Notes[0], `proto/x.proto:2:1: import "google/protobuf/any.proto" not used`) {
		t.Errorf("notes %q", r.Notes)
	}
}

func TestVendoredCopiesComeFirst(t *testing.T) {
	r := mustCompile(t, tree(`
-- proto/x.proto --
syntax = "proto3";
import "google/api/annotations.proto";
message X {}
service S { rpc M(X) returns (X) { option (google.api.http) = { get: "/x" }; } }
-- third_party/google/api/http.proto --
syntax = "proto3";
package google.api;
message HttpRule { string get = 2; string mine = 99; }
`), ".")
	// The tree's http.proto is not a root of its own: nothing in the tree
	// imports it by a name that only third_party has.
	for _, f := range r.Set.File {
		if f.GetName() == "google/api/http.proto" && len(f.MessageType) < 2 {
			t.Error("a stray copy replaced Google's file")
		}
	}

	r = mustCompile(t, tree(`
-- buf.yaml --
version: v2
modules: [{path: proto}, {path: third_party}]
-- proto/x.proto --
syntax = "proto3";
import "google/api/annotations.proto";
message X {}
service S { rpc M(X) returns (X) { option (google.api.http) = { mine: "/x" }; } }
-- third_party/google/api/http.proto --
syntax = "proto3";
package google.api;
message HttpRule { string mine = 99; }
`), ".")
	found := false
	for _, f := range r.Set.File {
		if f.GetName() == "google/api/http.proto" {
			found = f.MessageType[0].Field[0].GetName() == "mine"
		}
	}
	if !found {
		t.Error("the module's own http.proto was passed over")
	}
}

func TestCancelledCompile(t *testing.T) {
	s, err := Find(manyFiles(20), ".")
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := Compile(ctx, s); !errors.Is(err, context.Canceled) {
		t.Errorf("got %v", err)
	}
}

func FuzzCompile(f *testing.F) {
	f.Add("syntax = \"proto3\";\nimport \"google/protobuf/any.proto\";\nmessage M { google.protobuf.Any a = 1; }\n", "")
	f.Add("syntax = \"proto2\";\nmessage M { optional group G = 1 { required int32 a = 2 [default = 3]; } extensions 4 to max; }\n", "import public \"a.proto\";")
	f.Add("edition = \"2023\";\nimport 'b' '.proto';\nmessage M { int32 a = 1 [features.field_presence = IMPLICIT]; }\n", "edition = \"2023\"; message B {}")
	f.Add("syntax = \"proto3\"; option (google.api.http) = { a: [ { } ] };", "/* \x00 */ import \"b.proto\";")
	f.Add("import \"\\x41.proto\"; enum E { A = 0; reserved 1 to max; }", "\"")
	f.Add("syntax=\"proto3\";service S{rpc M(stream S.X)returns(.a.b){}}", "<[({")
	f.Fuzz(func(t *testing.T, a, b string) {
		fsys := fstest.MapFS{"a.proto": {Data: []byte(a)}, "b.proto": {Data: []byte(b)}}
		r, err := compileTree(t, fsys, ".")
		if err != nil {
			if m3o.KindOf(err) != m3o.Invalid {
				t.Errorf("kind %v: %v", m3o.KindOf(err), err)
			}
			return
		}
		if _, err := r.Marshal(); err != nil {
			t.Error(err)
		}
		if c := Breaking(r.Set, r.Set, WireJSON); len(c) != 0 {
			t.Errorf("a set against itself: %v", c)
		}
		var set descriptorpb.FileDescriptorSet
		set.File = r.Set.File
		if len(set.File) == 0 {
			t.Error("two files, and none in the set")
		}
	})
}
