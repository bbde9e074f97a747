package daemon

import (
	"os"
	"path/filepath"
	"testing"
	"time"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/descriptorpb"

	"github.com/m3o/m3o"
	"github.com/m3o/m3o/router"
)

func TestDescriptorsGoWithTheLastReleaseThatUsesThem(t *testing.T) {
	d := &Daemon{cfg: Config{Data: t.TempDir()}}
	for _, dir := range []string{"traits", "descriptors"} {
		if err := os.Mkdir(d.cfg.path(dir), 0o700); err != nil {
			t.Fatal(err)
		}
	}
	keep := func(name string) string {
		t.Helper()
		digest, err := d.keepDescriptors([]byte(name))
		if err != nil {
			t.Fatal(err)
		}
		return digest
	}
	release := func(image, descriptors, reflected string) m3o.Release {
		t.Helper()
		rel := m3o.Release{App: "a", Image: "sha256:" + image, Config: 1, Descriptors: descriptors}
		if err := os.WriteFile(d.traitsFile(rel, ".json"), []byte(`{"Protocol":"grpc","Descriptors":"`+d.descriptorsFile(reflected)+`"}`), 0o600); err != nil {
			t.Fatal(err)
		}
		return rel
	}
	own, both, reflected, old, oldReflected, canary := keep("own"), keep("both"), keep("reflected"), keep("old"), keep("old reflected"), keep("canary")
	kept := []m3o.Release{release("1", own, both), release("2", "", reflected)}
	gone := release("3", old, oldReflected)
	hourAgo := time.Now().Add(-2 * time.Hour)
	for _, dir := range []string{"traits", "descriptors"} {
		files, err := filepath.Glob(d.cfg.path(dir, "*"))
		if err != nil || len(files) == 0 {
			t.Fatalf("%v: %v", files, err)
		}
		for _, f := range files {
			if err := os.Chtimes(f, hourAgo, hourAgo); err != nil {
				t.Fatal(err)
			}
		}
	}
	young := keep("young")
	if err := d.pruneDescriptors(kept, []string{d.descriptorsFile(canary)}); err != nil {
		t.Fatal(err)
	}
	for digest, want := range map[string]bool{own: true, both: true, reflected: true, young: true, canary: true, old: false, oldReflected: false} {
		if _, err := os.Stat(d.descriptorsFile(digest)); (err == nil) != want {
			t.Errorf("descriptors %s: %v, want there %t", digest, err, want)
		}
	}
	for i, rel := range append(kept, gone) {
		if _, err := os.Stat(d.traitsFile(rel, ".json")); (err == nil) != (i < len(kept)) {
			t.Errorf("traits of release %d: %v", i, err)
		}
	}
	// What was there and old is young again once it is used.
	keep("own")
	if err := d.pruneDescriptors(nil, nil); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(d.descriptorsFile(own)); err != nil {
		t.Errorf("descriptors that a push has just used are gone: %v", err)
	}
}

func TestUnionOfDescriptors(t *testing.T) {
	file := func(name, pkg, message string) *descriptorpb.FileDescriptorProto {
		return &descriptorpb.FileDescriptorProto{Name: proto.String(name), Package: proto.String(pkg), Syntax: proto.String("proto3"),
			MessageType: []*descriptorpb.DescriptorProto{{Name: proto.String(message)}}}
	}
	set := func(files ...*descriptorpb.FileDescriptorProto) *descriptorpb.FileDescriptorSet {
		return &descriptorpb.FileDescriptorSet{File: files}
	}
	for name, c := range map[string]struct {
		a, b *descriptorpb.FileDescriptorSet
		want []string
	}{
		"no reflection":      {set(file("a.proto", "a", "M")), nil, []string{"a.proto"}},
		"no .proto":          {set(), set(file("a.proto", "a", "M")), []string{"a.proto"}},
		"the same":           {set(file("a.proto", "a", "M")), set(file("a.proto", "a", "M")), []string{"a.proto"}},
		"another name":       {set(file("a.proto", "a", "M")), set(file("proto/a.proto", "a", "M")), []string{"a.proto"}},
		"more by reflection": {set(file("a.proto", "a", "M")), set(file("b.proto", "b", "M")), []string{"a.proto", "b.proto"}},
		"package is a name":  {set(file("a.proto", "a", "M")), set(file("b.proto", "a.M", "N")), []string{"a.proto"}},
	} {
		var got []string
		for _, f := range union(c.a, c.b).GetFile() {
			got = append(got, f.GetName())
		}
		if len(got) != len(c.want) || got[0] != c.want[0] || got[len(got)-1] != c.want[len(c.want)-1] {
			t.Errorf("%s: %v, want %v", name, got, c.want)
		}
	}
}

func TestUsageOfMethods(t *testing.T) {
	call := func(rpc, caller string, n int64) router.Series {
		return router.Series{SeriesKey: router.SeriesKey{RPC: rpc, Caller: caller}, Count: n}
	}
	calls := []router.Series{call("/a.S/Get", "ada", 3), call("/a.S/Get", "", 2), call("/a.S/Put", "ada", 4), call("/a.S/Put", "joe", 1), call("", "joe", 9)}
	for _, c := range []struct {
		methods []string
		want    string
	}{
		{nil, ""},
		{[]string{"/a.S/List"}, ""},
		{[]string{"/a.S/Get"}, "used lately by 5 calls: ada 3, unknown callers 2"},
		{[]string{"/a.S/Get", "/a.S/Put"}, "used lately by 10 calls: ada 7, unknown callers 2, joe 1"},
	} {
		if got := usage(calls, c.methods); got != c.want {
			t.Errorf("usage of %v = %q, want %q", c.methods, got, c.want)
		}
	}
}
