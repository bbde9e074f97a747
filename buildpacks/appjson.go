package buildpacks

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"regexp"
	"strings"

	"gopkg.in/yaml.v3"
)

// An AppJSON is what app.json says, as Heroku and Dokku define the file. What
// means nothing here is read all the same and listed in Unused.
type AppJSON struct {
	Env        map[string]EnvVar
	Formation  map[string]Formation
	Checks     map[string][]AppCheck // by process type
	Postdeploy []string              // argv
	Cron       []CronJob
	Unused     []string // keys without an effect here, in the file's order
}

// An EnvVar is a config var app.json asks for.
type EnvVar struct {
	Description string
	Value       string // used while the app's config does not set it
	Required    bool   // without a value the app must not be deployed before its config has one
	Generate    bool   // a secret is made at the first deploy
	Line        int
}

// A Formation is how many instances of a process type app.json starts with.
type Formation struct {
	Quantity int // one more than the file says; 0 when it does not say
	Size     string
}

// An AppCheck is one health check of app.json.
type AppCheck struct {
	Type, Name, Description     string
	Path                        string // ask this path by HTTP
	Listening                   bool   // it is enough that the port accepts connections
	Attempts                    int
	Timeout, Wait, InitialDelay int // seconds
}

// A CronJob is a command that runs on a schedule.
type CronJob struct {
	Schedule string
	Command  []string // argv, never empty
	Line     int
}

var varName = matching(regexp.MustCompile(`[A-Za-z_][A-Za-z0-9_]*`), "is not the name of a variable", "use letters, digits and _")

var typeName = matching(processName, "is not a process type", "use lower-case letters, digits and -, such as web")

func appKeys() []key[AppJSON] {
	type A = AppJSON
	var keys []key[A]
	for _, name := range []string{"name", "description", "keywords", "website", "repository", "logo", "success_url", "$schema"} {
		keys = append(keys, key[A]{name, "About the app, for readers.", schema{}, func(*fields, string, *yaml.Node, *A) {}})
	}
	for _, name := range []string{"addons", "buildpacks", "environments", "image", "stack"} {
		keys = append(keys, key[A]{name, "Heroku's; without an effect here.", schema{}, func(_ *fields, at string, _ *yaml.Node, a *A) { a.Unused = append(a.Unused, at) }})
	}
	return append(keys,
		key[A]{"env", "Config vars the app asks for.", schema{"type": "object"}, readEnv},
		each("formation", "How many instances each process type starts with.", typeName, func(a *A) *map[string]Formation { return &a.Formation }, []key[Formation]{
			{"quantity", "How many.", schema{"type": "integer"}, func(f *fields, at string, n *yaml.Node, o *Formation) {
				integer("", "", 0, 100, func(o *Formation) *int { return &o.Quantity }).read(f, at, n, o)
				o.Quantity++
			}},
			text("size", "Heroku's dyno size.", nil, func(o *Formation) *string { return &o.Size }),
		}),
		key[A]{"healthchecks", "Dokku's checks of each process type.", schema{"type": "object"}, readChecks},
		group("scripts", "Commands at points of an app's life.", func(a *A) *A { return a }, []key[A]{
			{"postdeploy", "Runs once, after the app's first release.", schema{"type": "string"}, func(f *fields, _ string, n *yaml.Node, a *A) { a.Postdeploy = f.command(n) }},
			{"test", "Heroku CI's; without an effect here.", schema{}, func(_ *fields, at string, _ *yaml.Node, a *A) { a.Unused = append(a.Unused, at) }},
			{"test-setup", "Heroku CI's; without an effect here.", schema{}, func(_ *fields, at string, _ *yaml.Node, a *A) { a.Unused = append(a.Unused, at) }},
			{"pr-predestroy", "Heroku's; without an effect here.", schema{}, func(_ *fields, at string, _ *yaml.Node, a *A) { a.Unused = append(a.Unused, at) }},
		}),
		list("cron", "Commands that run on a schedule.", func(a *A) *[]CronJob { return &a.Cron }, []key[CronJob]{
			{"command", "What to run.", schema{"type": "string"}, func(f *fields, _ string, n *yaml.Node, c *CronJob) { c.Command, c.Line = f.command(n), n.Line }},
			text("schedule", "When: five cron fields in UTC, or `@daily`.", nil, func(c *CronJob) *string { return &c.Schedule }),
		}),
	)
}

// command splits a command as a Procfile line.
func (f *fields) command(n *yaml.Node) []string {
	v := f.text(n)
	if f.err != nil {
		return nil
	}
	argv, err := splitCommand(v, n.Line)
	if err == nil && len(argv) == 0 {
		f.fail(n, "the command is empty", "write for example: \"./server migrate\"")
	}
	if err != nil {
		f.err = inFile(err, f.file)
	}
	return argv
}

func readEnv(f *fields, at string, n *yaml.Node, a *AppJSON) {
	a.Env = map[string]EnvVar{}
	f.pairs(n, at, func(k, v *yaml.Node) {
		name := f.checked(at+": the name", k, varName)
		e := EnvVar{Required: true, Line: k.Line}
		if v.Kind == yaml.ScalarNode && v.Tag != "!!null" {
			e.Value = v.Value
		} else {
			readKeys(f, v, join(at, name), []key[EnvVar]{
				text("description", "", nil, func(e *EnvVar) *string { return &e.Description }),
				{"value", "", schema{}, func(f *fields, at string, n *yaml.Node, e *EnvVar) {
					if n.Kind != yaml.ScalarNode || n.Tag == "!!null" {
						f.fail(n, at+" is not a text", "write it in quotes")
					}
					e.Value = n.Value
				}},
				flag("required", "", func(e *EnvVar) *bool { return &e.Required }),
				{"generator", "", schema{}, func(f *fields, at string, n *yaml.Node, e *EnvVar) {
					if f.text(n) != "secret" {
						f.fail(n, fmt.Sprintf("%s is %q", at, short(n.Value)), `the only generator is "secret"`)
					}
					e.Generate = true
				}},
			}, &e)
		}
		a.Env[name] = e
	})
}

func readChecks(f *fields, at string, n *yaml.Node, a *AppJSON) {
	a.Checks = map[string][]AppCheck{}
	f.pairs(n, at, func(k, v *yaml.Node) {
		name := f.checked(at+": the name", k, typeName)
		type C = AppCheck
		keys := []key[C]{
			choice("type", "", []string{"startup", "readiness", "liveness"}, func(c *C) *string { return &c.Type }),
			text("name", "", nil, func(c *C) *string { return &c.Name }),
			text("description", "", nil, func(c *C) *string { return &c.Description }),
			text("path", "", func(v string) (string, string) {
				if !strings.HasPrefix(v, "/") || strings.ContainsAny(v, " \r\n\t#") {
					return "is not a path", `write for example: "/healthz"`
				}
				return "", ""
			}, func(c *C) *string { return &c.Path }),
			flag("listening", "", func(c *C) *bool { return &c.Listening }),
			integer("attempts", "", 1, 1000, func(c *C) *int { return &c.Attempts }),
			integer("timeout", "", 1, 3600, func(c *C) *int { return &c.Timeout }),
			integer("wait", "", 0, 3600, func(c *C) *int { return &c.Wait }),
			integer("initialDelay", "", 0, 3600, func(c *C) *int { return &c.InitialDelay }),
		}
		f.items(join(at, name), v, func(at string, n *yaml.Node) {
			var c C
			readKeys(f, n, at, keys, &c)
			a.Checks[name] = append(a.Checks[name], c)
		})
	})
}

// ParseAppJSON reads app.json as strictly as ParseManifest reads m3o.yaml.
func ParseAppJSON(b []byte) (AppJSON, error) {
	var a AppJSON
	if len(b) > maxManifest {
		return a, bad(AppJSONName, 1, "the file is larger than 64 KB", "keep only what describes the app in it")
	}
	root, err := jsonRoot(AppJSONName, bytes.TrimPrefix(b, []byte("\xef\xbb\xbf")))
	if err != nil {
		return a, err
	}
	f := fields{file: AppJSONName, example: `{"env": {"LOG_LEVEL": "info"}}`}
	readKeys(&f, root, "", appKeys(), &a)
	if f.err == nil {
		for _, c := range a.Cron {
			if c.Schedule == "" || len(c.Command) == 0 {
				f.err = bad(AppJSONName, max(c.Line, 1), "a cron entry needs a command and a schedule", `write for example: {"command": "report", "schedule": "@daily"}`)
			}
		}
	}
	return a, f.err
}

// jsonRoot reads one JSON value into YAML's nodes, which know their lines, so
// that the readers of m3o.yaml serve for JSON too. YAML's own parser takes
// most of JSON, but not all: a tab in the wrong place ends it.
func jsonRoot(name string, b []byte) (*yaml.Node, error) {
	dec := json.NewDecoder(bytes.NewReader(b))
	dec.UseNumber()
	line := func(at int64) int { return 1 + bytes.Count(b[:min(int(at), len(b))], []byte("\n")) }
	var value func(t json.Token, depth int) (*yaml.Node, error)
	next := func(depth int) (*yaml.Node, error) {
		t, err := dec.Token()
		if err != nil {
			return nil, err
		}
		return value(t, depth)
	}
	value = func(t json.Token, depth int) (*yaml.Node, error) {
		n := &yaml.Node{Kind: yaml.ScalarNode, Line: line(dec.InputOffset())}
		switch t := t.(type) {
		case json.Delim:
			if depth == 0 {
				return nil, errors.New("it is nested too deep")
			}
			n.Kind = yaml.MappingNode
			if t == '[' {
				n.Kind = yaml.SequenceNode
			}
			for dec.More() {
				c, err := next(depth - 1)
				if err != nil {
					return nil, err
				}
				n.Content = append(n.Content, c)
			}
			_, err := dec.Token()
			return n, err
		case string:
			n.Tag, n.Value = "!!str", t
		case json.Number:
			n.Tag, n.Value = "!!int", t.String()
		case bool:
			n.Tag, n.Value = "!!bool", fmt.Sprint(t)
		case nil:
			n.Tag = "!!null"
		}
		return n, nil
	}
	n, err := next(64)
	if err == nil {
		if _, end := dec.Token(); !errors.Is(end, io.EOF) {
			err = errors.New("something follows the end of the object")
		}
	}
	if err != nil {
		at := dec.InputOffset()
		if s, ok := errors.AsType[*json.SyntaxError](err); ok {
			at = s.Offset
		}
		what := err.Error()
		if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
			what, at = "it ends too early", int64(len(bytes.TrimRight(b, " \r\n\t")))
		}
		return nil, bad(name, line(at), "not JSON: "+what, "check the commas, quotes and brackets; JSON has no comments")
	}
	return n, nil
}
