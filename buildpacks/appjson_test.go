package buildpacks

import (
	"strings"
	"testing"
	"testing/fstest"
	"time"
	"unicode/utf8"

	"github.com/google/go-cmp/cmp"
	"github.com/m3o/m3o"
)

const heroku = `{
	"name": "Small Sharp Tool", "keywords": ["a"], "website": "https://example.com", "stack": "heroku-24",
	"env": {
		"LOG": "info",
		"KEY": {"description": "a \"secret\" \ud83d\ude00", "generator": "secret"},
		"WEB": {"value": "5", "required": false}
	},
	"formation": {"web": {"quantity": 2, "size": "standard-1x"}, "worker": {"quantity": 0}},
	"healthchecks": {"web": [{"type": "startup", "name": "up", "path": "/ready", "attempts": 3, "timeout": 5, "wait": 2}]},
	"scripts": {"postdeploy": "seed --all"},
	"cron": [{"command": "report 'a b'", "schedule": "@daily"}]
}
`

func TestParseAppJSON(t *testing.T) {
	got, err := ParseAppJSON([]byte(heroku))
	want := AppJSON{
		Env: map[string]EnvVar{"LOG": {Value: "info", Required: true, Line: 4}, "KEY": {Description: "a \"secret\" 😀", Required: true, Generate: true, Line: 5},
			"WEB": {Value: "5", Line: 6}},
		Formation:  map[string]Formation{"web": {3, "standard-1x"}, "worker": {1, ""}},
		Checks:     map[string][]AppCheck{"web": {{Type: "startup", Name: "up", Path: "/ready", Attempts: 3, Timeout: 5, Wait: 2}}},
		Postdeploy: []string{"seed", "--all"},
		Cron:       []CronJob{{Schedule: "@daily", Command: []string{"report", "a b"}, Line: 11}},
		Unused:     []string{"stack"},
	}
	if diff := cmp.Diff(want, got); err != nil || diff != "" {
		t.Errorf("%v %s", err, diff)
	}
}

func TestBadAppJSONNamesTheLineAndTheFix(t *testing.T) {
	for in, want := range map[string]string{
		"":                     `app.json:1: not JSON: it ends too early`,
		"{\n  \"env\": {\n":    `app.json:2: not JSON: it ends too early`,
		"{\n  \"env\": {},\n}": `app.json:3: not JSON: `,
		"{}\n{}":               `app.json:2: not JSON: something follows`,
		"[]":                   `app.json:1: the file is not a list`,
		"{\n \"evn\": {}}":     `app.json:2: unknown key "evn"`,
		"{\n \"env\": {\"A\": \"\", \"A\": \"\"}}":           `app.json:2: env.A is there twice`,
		`{"env": {"A B": ""}}`:                               `app.json:1: env: the name "A B" is not`,
		`{"env": {"A": {"valu": ""}}}`:                       `app.json:1: unknown key "env.A.valu"`,
		`{"env": {"A": {"generator": "uuid"}}}`:              `app.json:1: env.A.generator is "uuid"`,
		`{"formation": {"web": {"quantity": "x"}}}`:          `app.json:1: formation.web.quantity is "x"`,
		`{"formation": {"Web": {}}}`:                         `app.json:1: formation: the name "Web" is not`,
		`{"healthchecks": {"web": [{"path": "x"}]}}`:         `app.json:1: healthchecks.web[0].path "x" is not a path`,
		`{"healthchecks": {"web": {}}}`:                      `app.json:1: healthchecks.web is not a list`,
		`{"cron": [{"command": "a | b", "schedule": "@x"}]}`: `app.json:1: '|' needs a shell`,
		`{"cron": [{"command": "a"}]}`:                       `app.json:1: a cron entry needs`,
		`{"scripts": {"postdeploy": ""}}`:                    `app.json:1: a value is missing`,
		strings.Repeat("[", 100):                             `app.json:1: not JSON: it is nested too deep`,
		`{"a":"` + strings.Repeat("x", 70e3) + `"}`:          `app.json:1: the file is larger than 64 KB`,
	} {
		_, err := ParseAppJSON([]byte(in))
		if m3o.KindOf(err) != m3o.Invalid || !strings.HasPrefix(err.Error(), want) || m3o.HintOf(err) == "" {
			t.Errorf("ParseAppJSON(%.60q) = %v (hint %q), want %s… and a hint", in, err, m3o.HintOf(err), want)
		}
	}
}

func FuzzAppJSON(f *testing.F) {
	f.Add([]byte(heroku))
	f.Add([]byte(`{"env": {"A": {"value": null}}, "cron": [{}]}`))
	f.Fuzz(func(t *testing.T, b []byte) {
		if _, err := ParseAppJSON(b); err != nil && (m3o.KindOf(err) != m3o.Invalid || !strings.HasPrefix(err.Error(), "app.json:") || utf8.Valid(b) && !utf8.ValidString(err.Error())) {
			t.Errorf("error %q", err)
		}
	})
}

func TestApply(t *testing.T) {
	files, err := ReadFiles(fstest.MapFS{"app.json": {Data: []byte(heroku)}})
	if err != nil {
		t.Fatal(err)
	}
	plan := Plan{Processes: map[string]m3o.Process{"web": {Replicas: 1}, "worker": {Replicas: 1}}}
	if err := files.Apply(&plan); err != nil {
		t.Fatal(err)
	}
	want := Plan{Processes: map[string]m3o.Process{"web": {Replicas: 2}, "worker": {}}, Health: m3o.Health{Kind: "http", Path: "/ready", Timeout: 21 * time.Second},
		Env: map[string]string{"LOG": "info", "WEB": "5"}, Notes: []string{"app.json: cron is not taken over by itself; m3o schedules:add runs the commands",
			"app.json: scripts.postdeploy is not run by itself; a release line in the Procfile is", "app.json: stack has no effect here"}, Files: files}
	if diff := cmp.Diff(want, plan); diff != "" {
		t.Error(diff)
	}
	err = files.Apply(&Plan{Processes: map[string]m3o.Process{"web": {}}})
	if m3o.KindOf(err) != m3o.Invalid || !strings.Contains(err.Error(), "formation names worker") {
		t.Errorf("a formation of no process type: %v", err)
	}
}
