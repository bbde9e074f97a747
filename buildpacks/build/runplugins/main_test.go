package main

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/pluginpb"
)

// asPlugin makes the test binary a plugin that behaves as the variable says.
const asPlugin = "RUNPLUGINS_TEST_AS"

func TestMain(m *testing.M) {
	switch os.Getenv(asPlugin) {
	case "":
		os.Exit(m.Run())
	case "panic":
		panic("out of luck")
	case "silent":
		os.Exit(3)
	case "chatty": // and yet it works
		for range 20_000 {
			fmt.Fprintln(os.Stderr, "a warning")
		}
	case "garbage":
		fmt.Print("\xff\xff\xff")
	}
	os.Exit(0)
}

func TestPluginThatEndsBadlyIsNamedWithWhatItSaid(t *testing.T) {
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	for as, want := range map[string]string{
		"panic":   "protoc-gen-x v1.2.3 failed: panic: out of luck (exit status 2)",
		"silent":  "protoc-gen-x v1.2.3 failed: it said nothing (exit status 3)",
		"garbage": "protoc-gen-x v1.2.3 failed: its answer is not a CodeGeneratorResponse",
		"chatty":  "",
	} {
		t.Setenv(asPlugin, as)
		job, out := t.TempDir(), t.TempDir()
		b, err := json.Marshal(Job{Source: "/src", Result: "/gen", Remove: []string{"old.pb.go"}, Runs: []Run{{Name: "protoc-gen-x", Version: "v1.2.3", Program: filepath.Base(self), Request: "0.binpb"}}})
		if err != nil {
			t.Fatal(err)
		}
		for name, text := range map[string]string{"job.json": string(b), "0.binpb": ""} {
			if err := os.WriteFile(filepath.Join(job, name), []byte(text), 0o600); err != nil {
				t.Fatal(err)
			}
		}
		err = run(job, filepath.Dir(self), out)
		if want == "" {
			overlay, rerr := os.ReadFile(filepath.Join(out, "overlay.json"))
			if err != nil || rerr != nil || string(overlay) != "{\n \"Replace\": {\n  \"/src/old.pb.go\": \"\"\n }\n}" {
				t.Errorf("%s: %v, overlay %s, %v", as, err, overlay, rerr)
			}
			continue
		}
		if err == nil || err.Error() != want {
			t.Errorf("%s: %v, want %s", as, err, want)
		}
	}
}

func answer(t testing.TB, r *pluginpb.CodeGeneratorResponse) []byte {
	t.Helper()
	b, err := proto.Marshal(r)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func made(name, content string) *pluginpb.CodeGeneratorResponse_File {
	f := &pluginpb.CodeGeneratorResponse_File{Content: proto.String(content)}
	if name != "" {
		f.Name = proto.String(name)
	}
	return f
}

func TestDecode(t *testing.T) {
	files, err := decode(answer(t, &pluginpb.CodeGeneratorResponse{SupportedFeatures: proto.Uint64(3), MinimumEdition: proto.Int32(998),
		File: []*pluginpb.CodeGeneratorResponse_File{made("a/b.go", "1"), made("", "2"), made("c.go", "")}}))
	if err != nil || len(files) != 2 || string(files["a/b.go"]) != "12" || len(files["c.go"]) != 0 {
		t.Errorf("decode = %q, %v", files, err)
	}
	insert := made("a.go", "1")
	insert.InsertionPoint = proto.String("imports")
	for want, r := range map[string]*pluginpb.CodeGeneratorResponse{
		"a.proto: no go_package": {Error: proto.String("a.proto: no go_package\nmore")},
		`it writes to "../a.go"`: {File: []*pluginpb.CodeGeneratorResponse_File{made("../a.go", "")}},
		`it writes to "/a.go"`:   {File: []*pluginpb.CodeGeneratorResponse_File{made("/a.go", "")}},
		`it writes "a.go" twice`: {File: []*pluginpb.CodeGeneratorResponse_File{made("a.go", ""), made("a.go", "")}},
		"no name":                {File: []*pluginpb.CodeGeneratorResponse_File{made("", "")}},
		"inserts into":           {File: []*pluginpb.CodeGeneratorResponse_File{insert}},
	} {
		if _, err := decode(answer(t, r)); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("decode = %v, want %s", err, want)
		}
	}
}

// decode agrees with the protobuf module on every answer that both accept.
func FuzzDecode(f *testing.F) {
	f.Add(answer(f, &pluginpb.CodeGeneratorResponse{File: []*pluginpb.CodeGeneratorResponse_File{made("a.go", "x"), made("", "y")}}))
	f.Add(answer(f, &pluginpb.CodeGeneratorResponse{Error: proto.String("no")}))
	f.Add([]byte("\x7a\x05\x0a\x01a\x7a\x00"))
	f.Fuzz(func(t *testing.T, b []byte) {
		files, err := decode(b)
		if err != nil {
			return
		}
		var r pluginpb.CodeGeneratorResponse
		if proto.Unmarshal(b, &r) != nil {
			return
		}
		if r.Error != nil {
			t.Fatalf("an error %q was not seen", r.GetError())
		}
		want := map[string]string{}
		last := ""
		for _, f := range r.GetFile() {
			if f.GetName() != "" {
				last = f.GetName()
			}
			want[last] += f.GetContent()
		}
		for n, c := range want {
			if string(files[n]) != c {
				t.Errorf("file %q is %q, want %q", n, files[n], c)
			}
		}
		if len(files) != len(want) {
			t.Errorf("%d files, want %d", len(files), len(want))
		}
	})
}
