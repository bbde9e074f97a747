package main

import (
	"encoding/json"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
)

// edit replaces a text in a file of a repository and commits.
func (p *person) edit(t *testing.T, dir, name, old, now string) {
	t.Helper()
	file := filepath.Join(dir, name)
	b, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	if !strings.Contains(string(b), old) {
		t.Fatalf("%s does not have %q", name, old)
	}
	if err := os.WriteFile(file, []byte(strings.Replace(string(b), old, now, 1)), 0o644); err != nil {
		t.Fatal(err)
	}
	p.commit(t, dir, "change "+name)
}

// put writes a file of a repository.
func put(t *testing.T, dir, name, text string) {
	t.Helper()
	file := filepath.Join(dir, name)
	if err := os.MkdirAll(filepath.Dir(file), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(file, []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
}

// post asks an app in JSON; curl, as a person would.
func (p *person) post(t *testing.T, app, path, body string) string {
	t.Helper()
	return p.must(t, "", "curl", "-sS", "--fail-with-body", "-H", "Content-Type: application/json", "-d", body, p.b.url(app, path))
}

// call makes a native gRPC call with a text as the request's first field.
func (p *person) call(t *testing.T, app, method, text string) string {
	t.Helper()
	return p.must(t, "", filepath.Join(p.b.bin, "tools", "askgrpc"), "-ca", filepath.Join(p.b.data, "ca", "ca.crt"), "-addr", p.b.https,
		"-host", app+".localhost", "-method", method, "-name", text)
}

// mustPush pushes and checks what the pusher reads.
func (p *person) mustPush(t *testing.T, dir string, want []string, opts ...string) string {
	t.Helper()
	out, err := p.push(dir, opts...)
	if err != nil {
		t.Fatalf("push: %v\n%s\n%s", err, out, p.b.log.tail(3000))
	}
	for _, w := range want {
		if !regexp.MustCompile(w).MatchString(out) {
			t.Errorf("the push does not say %s:\n%s", w, out)
		}
	}
	return out
}

func TestProtobufSamplesAnswer(t *testing.T) {
	b := theBox(t)
	p := b.user(t, "petra")
	t.Run("no generated code", func(t *testing.T) {
		dir := p.clone(t, "proto-only", "notes")
		p.mustPush(t, dir, []string{`-----> Protobuf: 1 file, 1 service, 2 methods`, `gen/notes/v1/notes\.pb\.go is missing: made from proto/notes/v1/notes\.proto`,
			`gen/notes/v1/notes_grpc\.pb\.go is missing`, `Released v1`})
		if got := p.post(t, "notes", "/notes.v1.Notes/Add", `{"text":"milk"}`); !strings.Contains(got, `"text":"milk"`) || !strings.Contains(got, `"count":1`) {
			t.Errorf("JSON answer %s", got)
		}
		if got := p.call(t, "notes", "/notes.v1.Notes/Add", "bread"); got != "bread\n" {
			t.Errorf("gRPC answer %q", got)
		}
		if got := p.post(t, "notes", "/notes.v1.Notes/List", `{}`); !regexp.MustCompile(`"text":"bread", ?"added":"20\d\d-`).MatchString(got) {
			t.Errorf("list %s", got)
		}
		// A change of Go code generates nothing again.
		p.edit(t, dir, "main.go", `const prefix = ""`, `const prefix = "buy "`)
		if out := p.mustPush(t, dir, []string{"Released v2"}); strings.Contains(out, "once for all apps") {
			t.Errorf("the plugins were built again:\n%s", out)
		}
		if got := p.post(t, "notes", "/notes.v1.Notes/Add", `{"text":"milk"}`); !strings.Contains(got, `"buy milk"`) {
			t.Errorf("JSON answer after the change %s", got)
		}
		var rel struct{ Descriptors string }
		if err := json.Unmarshal([]byte(p.must(t, dir, "m3o", "releases:info", "--json")), &rel); err != nil || !strings.HasPrefix(rel.Descriptors, "sha256:") {
			t.Errorf("releases:info says descriptors %q, %v", rel.Descriptors, err)
		}
		p.must(t, dir, "m3o", "destroy", "--confirm", "notes")
	})
	for _, c := range []struct {
		sample    string
		says      []string
		path      string
		ask, want string // JSON
		method    string // gRPC with "ada", answered by
		answer    string
	}{
		{"connect-notes", []string{`gen/pad/v1/padv1connect/pad\.connect\.go is missing`},
			"/pad.v1.Pad/Write", `{"text":"hello"}`, `"text":"HELLO"`, "/pad.v1.Pad/Write", "ADA"},
		{"buf-module", []string{`buf\.gen\.yaml: buf\.build/grpc/go is run as protoc-gen-go-grpc`, `internal/gen/greet/v1/language\.pb\.go is missing`},
			"/greet.v1.GreetService/Greet", `{"name":"Ada","language":"LANGUAGE_FRENCH"}`, `"greeting":"Bonjour Ada"`, "/greet.v1.GreetService/Greet", "Hello ada"},
		{"stale-code", []string{`echo\.pb\.go is older than proto/echo/v1/echo\.proto: message SayRequest changed`, `/echo\.v1\.Echo/Shout is new`},
			"/echo.v1.Echo/Shout", `{"text":"hey","times":2}`, `"text":"HEY HEY"`, "/echo.v1.Echo/Shout", "ADA"},
		{"demo-shop", []string{`Protobuf: 4 files, 3 services, 5 methods`, `money\.pb\.go is missing`},
			"/shop.v1.Catalog/GetProduct", `{"id":"lamp"}`, `"units":"35"`, "/shop.v1.Cart/GetCart", "ada"},
		{"proto-workspace", []string{`Protobuf: 3 files, 2 services, 2 methods`, `contracts/gen/rates/v1/rates_grpc\.pb\.go is missing`, `stock/gen/stock/v1/stock\.pb\.go is missing`},
			"/stock.v1.Stock/Worth", `{"item":"lamp","count":2}`, `"cents":"8"`, "/rates.v1.Rates/Get", "ada"},
	} {
		t.Run(c.sample, func(t *testing.T) {
			dir := p.clone(t, c.sample, c.sample)
			p.mustPush(t, dir, append(c.says, "Released v1"))
			if got := p.post(t, c.sample, c.path, c.ask); !strings.Contains(got, c.want) {
				t.Errorf("JSON answer %s, want %s", got, c.want)
			}
			if got := p.call(t, c.sample, c.method, "ada"); !strings.HasPrefix(got, c.answer+"\n") {
				t.Errorf("gRPC answer %q, want %q", got, c.answer)
			}
			p.must(t, dir, "m3o", "destroy", "--confirm", c.sample)
		})
	}
}

func TestBreakingChangeIsRefused(t *testing.T) {
	b := theBox(t)
	p := b.user(t, "wilma")
	dir := p.clone(t, "proto-only", "contract")
	const proto = "proto/notes/v1/notes.proto"
	p.mustPush(t, dir, []string{"Released v1"})
	p.call(t, "contract", "/notes.v1.Notes/Add", "a")
	refs := p.must(t, dir, "git", "ls-remote", "m3o")

	p.edit(t, dir, proto, "int32 count = 2;", "int32 count = 7;")
	brokenPush(t, p, dir, `proto/notes/v1/notes\.proto:24:17: notes\.v1\.AddResponse\.count: the field was renumbered from 2 to 7 \(FIELD_NO_DELETE_UNLESS_NUMBER_RESERVED\)\s+`+
		`remote:  !       used lately by 1 call: unknown callers 1\s+`+
		`remote:  !     1 breaking change of the API of v1; nothing was built\s+remote:  !     .*-o allow-breaking`, refs)
	if out, _ := p.push(dir); strings.Contains(out, "-----> Building") || !strings.Contains(out, "-o allow-breaking") {
		t.Errorf("the refused push built, or does not say how to go on:\n%s", out)
	}
	if got := p.post(t, "contract", "/notes.v1.Notes/Add", `{"text":"a"}`); !strings.Contains(got, `"count":2`) {
		t.Errorf("after a refused push the app answers %s", got)
	}
	p.mustPush(t, dir, []string{`1 breaking change of the API of v1, allowed by -o allow-breaking`, `notes\.v1\.AddResponse`, "Released v2"}, "-o", "allow-breaking")
	if got := p.must(t, dir, "m3o", "releases"); !regexp.MustCompile(`v2 .*breaks its callers: \d allowed`).MatchString(got) {
		t.Errorf("releases does not say that v2 breaks callers:\n%s", got)
	}
	if got := p.must(t, dir, "m3o", "releases:info", "v2"); !strings.Contains(got, "held to WIRE_JSON") || !strings.Contains(got, "breaks: "+proto+":") {
		t.Errorf("releases:info says:\n%s", got)
	}

	// A name matters to JSON only: WIRE lets it through.
	p.edit(t, dir, proto, "int32 count = 7;", "int32 total = 7;")
	p.edit(t, dir, "main.go", "Count: int32", "Total: int32")
	refs = p.must(t, dir, "git", "ls-remote", "m3o")
	brokenPush(t, p, dir, `FIELD_SAME_NAME|FIELD_SAME_JSON_NAME`, refs)
	put(t, dir, "m3o.yaml", "protobuf:\n  breaking: WIRE\n")
	p.edit(t, dir, proto, "// A Note is one text.", "// A Note is one text.\nmessage Draft {\n  string text = 1;\n}\n\n// A Note.")
	p.mustPush(t, dir, []string{`API: \+1 message notes\.v1\.Draft`, "Released v3"})
	if got := p.must(t, dir, "m3o", "releases:info"); !strings.Contains(got, "held to WIRE)") || strings.Contains(got, "breaks:") {
		t.Errorf("releases:info says:\n%s", got)
	}

	// A rollback is never held up, and brings the old descriptors back; they outlive the daemon.
	p.must(t, dir, "m3o", "rollback", "v1")
	count := func(when string) {
		t.Helper()
		if got := p.post(t, "contract", "/notes.v1.Notes/Add", `{"text":"a"}`); !strings.Contains(got, `"count":`) {
			t.Errorf("%s the app answers %s", when, got)
		}
	}
	count("after the rollback")
	b.kill()
	if err := b.start(); err != nil {
		t.Fatal(err)
	}
	count("after a restart of the daemon")
	refs = p.must(t, dir, "git", "ls-remote", "m3o")
	put(t, dir, "m3o.yaml", "protobuf:\n  breaking: WIRE_JSON\n")
	p.commit(t, dir, "held to JSON again")
	brokenPush(t, p, dir, `(?s)notes\.v1\.AddResponse\.count.*2 breaking changes of the API of v4`, refs)
	p.must(t, dir, "m3o", "destroy", "--confirm", "contract")
}

func TestBadProtobufIsRefused(t *testing.T) {
	b := theBox(t)
	p := b.user(t, "bruno")
	dir := p.clone(t, "proto-only", "muddle")
	const head = "syntax = \"proto3\";\npackage muddle.v1;\noption go_package = \"example.com/proto-only/gen/muddle/v1;muddlev1\";\n"
	for _, c := range []struct {
		name  string
		files map[string]string
		want  string
	}{
		{"malformed", map[string]string{"proto/a.proto": head + "message A {\n  string text = ;\n}\n"}, `proto/a\.proto:5:17: syntax error`},
		{"missing import", map[string]string{"proto/a.proto": head + "import \"muddle/none.proto\";\n"}, `proto/a\.proto:4:\d+: imported file "muddle/none\.proto" is not in the repository`},
		{"cyclic imports", map[string]string{"proto/a.proto": head + "import \"b.proto\";\n", "proto/b.proto": head + "import \"a.proto\";\n"},
			`proto/b\.proto:4:\d+: the imports go round in a circle: a\.proto → b\.proto → a\.proto`},
		{"one symbol twice", map[string]string{"proto/a.proto": head + "message A {}\n", "proto/b.proto": head + "message A {}\n"},
			`proto/[ab]\.proto:4:\d+: .*muddle\.v1\.A.* already defined at proto/[ab]\.proto:4:\d+`},
		{"dependency of buf not vendored", map[string]string{
			"buf.yaml": "version: v2\nmodules:\n  - path: proto\ndeps:\n  - buf.build/bufbuild/protovalidate\n", "proto/a.proto": head + "import \"buf/validate/validate.proto\";\n"},
			`proto/a\.proto:4:\d+: "buf/validate/validate\.proto" is not in the repository(.|\n)*buf export buf\.build/bufbuild/protovalidate -o third_party/proto`},
		{"option of a plugin that is none", map[string]string{"buf.gen.yaml": "version: v2\nplugins:\n  - local: protoc-gen-go\n    out: gen\n    opt: nonsense=yes\n"},
			`nonsense`},
		{"module not required", map[string]string{"go.mod": "module example.com/proto-only\n\ngo 1.26\n"}, `go\.mod does not require google\.golang\.org/protobuf(.|\n)*go get google\.golang\.org/protobuf`},
		{"policy that is none", map[string]string{"m3o.yaml": "protobuf:\n  breaking: sometimes\n"}, `m3o\.yaml:2: protobuf\.breaking is "sometimes"(.|\n)*WIRE_JSON`},
	} {
		t.Run(c.name, func(t *testing.T) {
			for name, text := range c.files {
				put(t, dir, name, text)
			}
			p.commit(t, dir, c.name)
			brokenPush(t, p, dir, c.want, "")
			p.must(t, dir, "git", "reset", "-q", "--hard", "HEAD~1")
		})
	}
}
