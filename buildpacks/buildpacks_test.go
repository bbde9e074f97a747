package buildpacks

import (
	"slices"
	"strings"
	"testing"
	"time"
	"unicode/utf8"

	"github.com/google/go-cmp/cmp"
	"github.com/m3o/m3o"
)

func TestParseProcfile(t *testing.T) {
	for in, want := range map[string][]ProcessLine{
		"":                          nil,
		"# nothing\n\n   \n":        nil,
		"web: ./server":             {{"web", []string{"./server"}, 1}},
		"web: bin/web\r\nworker: w": {{"web", []string{"bin/web"}, 1}, {"worker", []string{"w"}, 2}},
		"\ufeffweb:server -port $PORT -x=${PORT}y '$PORT' \"$PORT\" \\$PORT": {{"web", []string{"server", "-port", "8080", "-x=8080y", "$PORT", "8080", "$PORT"}, 1}},
		`a: x "a b" 'c "d"' e\ f "" g"h"i "\"\\\n"`:                          {{"a", []string{"x", "a b", `c "d"`, "e f", "", "ghi", `"\\n`}, 1}},
		"web: exec ./server # comment":                                       {{"web", []string{"./server"}, 1}},
		"web: s a#b $ 100$":                                                  {{"web", []string{"s", "a#b", "$", "100$"}, 1}},
		"release: m up\nweb: s":                                              {{"release", []string{"m", "up"}, 1}, {"web", []string{"s"}, 2}},
	} {
		got, err := ParseProcfile([]byte(in))
		if err != nil || !cmp.Equal(got, want) {
			t.Errorf("ParseProcfile(%q) = %v, %v, want %v", in, got, err, want)
		}
	}
}

func TestBadProcfileNamesTheLineAndTheFix(t *testing.T) {
	for in, want := range map[string]string{
		"web: a\n<<<<<<< HEAD\nweb: b\n=======": `Procfile:2: a merge conflict is not resolved`,
		"=======":                               `Procfile:1: a merge conflict is not resolved`,
		"web: a\n\nweb: b":                      `Procfile:3: "web" is there already, in line 1`,
		"web":                                   `Procfile:1: "web" is not "type: command"`,
		"Web: a":                                `Procfile:1: "Web" is not a process type`,
		"my_worker: a":                          `Procfile:1: "my_worker" is not a process type`,
		": a":                                   `Procfile:1: "" is not a process type`,
		"run-batch: a":                          `Procfile:1: "run-batch" is the name of a one-off command`,
		"web:":                                  `Procfile:1: web has no command`,
		"web:  # later":                         `Procfile:1: web has no command`,
		"web: a 'b":                             `Procfile:1: a single quote is not closed`,
		"web: a \"b":                            `Procfile:1: a double quote is not closed`,
		"web: a \\":                             `Procfile:1: the command ends with a backslash`,
		"web: a -db $DATABASE_URL":              `Procfile:1: $DATABASE_URL is not replaced`,
		"web: a \"${HOME}/x\"":                  `Procfile:1: $HOME is not replaced`,
		"web: a ${PORT:-80}":                    `Procfile:1: ${ needs a shell`,
		"web: a $(date)":                        `Procfile:1: $( needs a shell`,
		"web: migrate && serve":                 `Procfile:1: '&' needs a shell`,
		"web: a | b":                            `Procfile:1: '|' needs a shell`,
		"web: a > log":                          `Procfile:1: '>' needs a shell`,
		"web: a `b`":                            "Procfile:1: '`' needs a shell",
		"web: PORT=1 a":                         `Procfile:1: PORT= before the command needs a shell`,
		"web: a\x00b":                           `Procfile:1: the line has an unprintable character`,
		"web: \xff":                             `Procfile:1: the line has an unprintable character`,
		strings.Repeat("#\n", 40e3):             `Procfile:1: the file is larger than 64 KB`,
	} {
		_, err := ParseProcfile([]byte(in))
		if m3o.KindOf(err) != m3o.Invalid || !strings.HasPrefix(err.Error(), want) || m3o.HintOf(err) == "" {
			t.Errorf("ParseProcfile(%.60q) = %v (hint %q), want %s… and a hint", in, err, m3o.HintOf(err), want)
		}
	}
}

func FuzzProcfile(f *testing.F) {
	for _, s := range []string{"web: ./server -p $PORT 'a b' \"c\"", "<<<<<<<", "a:\\", "a: ${", "a: \"\\", "\xef\xbb\xbfweb: x # y"} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		ls, err := ParseProcfile(b)
		if err != nil {
			if m3o.KindOf(err) != m3o.Invalid || !strings.HasPrefix(err.Error(), "Procfile:") || !utf8.ValidString(err.Error()) {
				t.Errorf("error %q", err)
			}
			return
		}
		var names []string
		for _, l := range ls {
			if len(l.Command) == 0 || l.Line < 1 || slices.Contains(names, l.Name) {
				t.Errorf("line %+v", l)
			}
			names = append(names, l.Name)
		}
	})
}

func TestParseManifest(t *testing.T) {
	for in, want := range map[string]Manifest{
		"":            {},
		"# nothing\n": {},
		"---\n":       {},
		"build:\n  dir: ./services/api/\n  main: cmd/server\n": {Build: BuildKeys{Dir: "services/api", Main: "./cmd/server"}},
		"build: {dir: ., main: .}":                             {Build: BuildKeys{Main: "."}},
		"health:\n  http: /healthz\n  timeout: 1m30s\n":        {Health: m3o.Health{Kind: "http", Path: "/healthz", Timeout: 90 * time.Second}},
		"health: {grpc: true}":                                 {Health: m3o.Health{Kind: "grpc"}},
		"health: {tcp: true}":                                  {Health: m3o.Health{Kind: "tcp"}},
	} {
		got, err := ParseManifest("m3o.yaml", []byte(in))
		if err != nil || !cmp.Equal(got, want) {
			t.Errorf("ParseManifest(%q) = %+v, %v, want %+v", in, got, err, want)
		}
	}
}

func TestBadManifestNamesTheLineAndTheNearestKey(t *testing.T) {
	for in, want := range map[string][2]string{
		"bild:\n  dir: x":                         {`m3o.yaml:1: unknown key "bild"`, "did you mean build?"},
		"build:\n  dir: x\n  mian: y":             {`m3o.yaml:3: unknown key "build.mian"`, "did you mean build.main?"},
		"health:\n  timout: 3s":                   {`m3o.yaml:2: unknown key "health.timout"`, "did you mean health.timeout?"},
		"build: x":                                {`m3o.yaml:1: build is not a list`, ""},
		"- a":                                     {`m3o.yaml:1: the file is not a list`, ""},
		"build:\n  dir: ../x":                     {`m3o.yaml:2: build.dir "../x" leads out`, ""},
		"build:\n  dir: /x":                       {`m3o.yaml:2: build.dir "/x" leads out`, ""},
		"build:\n  dir:\n":                        {`m3o.yaml:2: a value is missing`, ""},
		"build:\n  dir: a\n  dir: b":              {`m3o.yaml:3: build.dir is there twice`, ""},
		"health:\n  grpc: true\n  http: /x":       {`m3o.yaml:3: health has both grpc and http`, ""},
		"health:\n  grpc: maybe":                  {`m3o.yaml:2: health.grpc is "maybe"`, ""},
		"health:\n  http: healthz":                {`m3o.yaml:2: health.http "healthz" is not a path`, ""},
		"health:\n  timeout: soon":                {`m3o.yaml:2: health.timeout is "soon"`, ""},
		"health:\n  timeout: 1ms":                 {`m3o.yaml:2: health.timeout is "1ms"`, ""},
		"a: b: c":                                 {`m3o.yaml:1: not YAML`, ""},
		"<<<<<<< HEAD\nbuild: {}\n=======\n":      {`m3o.yaml:`, ""},
		"build: {}\n---\nbuild: {}":               {`m3o.yaml:1: the file has more than one document`, ""},
		"x: &x [a]\nbuild: *x":                    {`m3o.yaml:1: unknown key "x"`, ""},
		"build: &x\n  dir: a\nhealth:\n  tcp: *x": {`m3o.yaml:4: health.tcp is "x"`, ""},
	} {
		_, err := ParseManifest("m3o.yaml", []byte(in))
		if m3o.KindOf(err) != m3o.Invalid || !strings.HasPrefix(err.Error(), want[0]) || !strings.Contains(m3o.HintOf(err), want[1]) || m3o.HintOf(err) == "" {
			t.Errorf("ParseManifest(%q) = %v (hint %q), want %s… and hint %q", in, err, m3o.HintOf(err), want[0], want[1])
		}
	}
}

func FuzzManifest(f *testing.F) {
	for _, s := range []string{"build:\n  dir: a\n  main: b\nhealth:\n  http: /x\n  timeout: 3s", "a: &a [*a]", "? x", "!!binary x", "build: *x", "{"} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		m, err := ParseManifest("m3o.yaml", b)
		if err != nil {
			if m3o.KindOf(err) != m3o.Invalid || !strings.HasPrefix(err.Error(), "m3o.yaml:") {
				t.Errorf("error %q", err)
			}
			return
		}
		if strings.HasPrefix(m.Build.Dir, "/") || strings.HasPrefix(m.Build.Dir, "..") || strings.HasPrefix(m.Build.Main, "/") || strings.HasPrefix(m.Build.Main, "-") {
			t.Errorf("%+v", m)
		}
	})
}

func TestParseBuildKeys(t *testing.T) {
	in := "build:\n  tags: [netgo, x]\n  ldflags: -X main.v=$VERSION\n  flags:\n    - -race=false\n  files: [static, \"migrations/*.sql\"]\n  test: true\n  args: {A: 1, B: \"\"}\n  binaries: [cmd/migrate]\n"
	got, err := ParseManifest("m3o.yaml", []byte(in))
	want := BuildKeys{Tags: []string{"netgo", "x"}, LDFlags: "-X main.v=$VERSION", Flags: []string{"-race=false"}, Files: []string{"static", "migrations/*.sql"},
		Test: true, Args: map[string]string{"A": "1", "B": ""}, Binaries: []string{"./cmd/migrate"}}
	if diff := cmp.Diff(want, got.Build); err != nil || diff != "" {
		t.Errorf("%v %s", err, diff)
	}
	for in, want := range map[string]string{
		"build: {flags: [-toolexec=x]}":  `m3o.yaml:1: build.flags[0] "-toolexec=x" is not possible`,
		"build: {flags: x}":              `m3o.yaml:1: build.flags is not a list`,
		"build:\n  files:\n  - ../x":     `m3o.yaml:3: build.files[0] "../x" leads out`,
		"build:\n  files:\n  - .git":     `m3o.yaml:3: build.files[0] ".git" leads out`,
		"build: {files: [\"[\"]}":        `m3o.yaml:1: build.files[0] "[" is not a pattern`,
		"build: {args: {a-b: 1}}":        `m3o.yaml:1: build.args: the name "a-b" is not the name of an ARG`,
		"build: {args: {A: [1]}}":        `m3o.yaml:1: build.args.A has no text`,
		"build: {test: yes}":             `m3o.yaml:1: build.test is "yes"`,
		"build: {builder: make}":         `m3o.yaml:1: build.builder is "make"`,
		"build: {tags: [\"a b\"]}":       `m3o.yaml:1: build.tags[0] "a b" is not a build tag`,
		"build:\n  ldflags: \"a\\nb\"\n": `m3o.yaml:2: build.ldflags "a\nb" is more than one line`,
	} {
		_, err := ParseManifest("m3o.yaml", []byte(in))
		if m3o.KindOf(err) != m3o.Invalid || !strings.HasPrefix(err.Error(), want) || m3o.HintOf(err) == "" {
			t.Errorf("ParseManifest(%q) = %v (hint %q), want %s…", in, err, m3o.HintOf(err), want)
		}
	}
}
