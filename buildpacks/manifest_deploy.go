package buildpacks

import (
	"maps"
	"regexp"
	"slices"
	"strings"
	"time"

	"gopkg.in/yaml.v3"

	"github.com/m3o/m3o"
)

// deployKeys say when the app is deployed.
func deployKeys() []key[Manifest] {
	return []key[Manifest]{
		texts("paths", "Which changed files make a push deploy, from the root of the repository: `svc/api/**`, `go.mod`, `!**/*.md`. Without it, and without `m3o apps:paths`, every push does.", pathPattern,
			func(m *Manifest) *[]string { return &m.Paths }),
		schedulesKey(),
	}
}

// scheduleKeys are what m3o.yaml says of one schedule. What it does is told by
// which of rebuild, run and call is there.
type scheduleKeys struct {
	s       m3o.Schedule
	does    int // how many of the three
	message string
}

func schedulesKey() key[Manifest] {
	type S = scheduleKeys
	does := func(k *S, action string, args ...string) { k.s.Action, k.s.Args, k.does = action, args, k.does+1 }
	keys := []key[S]{
		text("cron", "When: five cron fields, or `@daily`, `@hourly`, `@every 90m`.", nil, func(k *S) *string { return &k.s.Cron }),
		text("timezone", "Whose clock: a name of the IANA database, such as `Europe/Berlin`. Default: UTC.", nil, func(k *S) *string { return &k.s.Zone }),
		{"rebuild", "Deploy the branch again: `always`, or `if-outdated` when the toolchain or base has changed.", schema{"enum": []string{"always", "if-outdated"}},
			func(f *fields, at string, n *yaml.Node, k *S) {
				switch f.text(n) {
				case "always":
				case "if-outdated":
					k.s.IfOutdated = true
				default:
					f.fail(n, at+" is neither always nor if-outdated", "write one of them")
				}
				does(k, "rebuild")
			}},
		{"run", "Run this command in the live release.", schema{"type": "string"}, func(f *fields, _ string, n *yaml.Node, k *S) { does(k, "run", f.command(n)...) }},
		{"call", "Call this gRPC method of the live release: `Service/Method`.", schema{"type": "string"}, func(f *fields, _ string, n *yaml.Node, k *S) { does(k, "call", f.text(n)) }},
		text("message", "With `call`: the message, as JSON.", nil, func(k *S) *string { return &k.message }),
		choice("overlap", "When the run before it goes on: `skip` (the default), `queue` or `replace`.", []string{"skip", "queue", "replace"}, func(k *S) *string { return &k.s.Overlap }),
		choice("missed", "After a downtime: `once` (the default) or `skip`.", []string{"once", "skip"}, func(k *S) *string { return &k.s.Missed }),
		duration("jitter", "Start up to this much later, always by the same.", 0, time.Hour, func(k *S) *time.Duration { return &k.s.Jitter }),
	}
	var read map[string]S
	inner := each("schedules", "What to do at set times, by name. It follows the live release.", matching(regexp.MustCompile(`[a-z0-9]+(-[a-z0-9]+)*`), "is no name of a schedule", "use a-z, 0-9 and single hyphens"),
		func(*Manifest) *map[string]S { return &read }, keys)
	return key[Manifest]{inner.name, inner.doc, inner.schema, func(f *fields, at string, n *yaml.Node, m *Manifest) {
		read = nil
		inner.read(f, at, n, m)
		for _, name := range slices.Sorted(maps.Keys(read)) {
			k := read[name]
			if k.does != 1 {
				f.fail(n, join(at, name)+" does not say what to do", "write one of rebuild, run and call")
				return
			}
			if k.message != "" {
				k.s.Args = append(k.s.Args, k.message)
			}
			k.s.Name = name
			m.Schedules = append(m.Schedules, k.s)
		}
	}}
}

func pathPattern(v string) (what, fix string) {
	glob := strings.TrimPrefix(v, "!")
	switch {
	case strings.Trim(glob, "/") == "":
		return "is an empty pattern", "write for example svc/api/** or !docs/**"
	case strings.HasPrefix(glob, "/"), strings.HasPrefix(glob, "./"), strings.Contains("/"+glob+"/", "/../"):
		return "does not begin at the root of the repository", "write for example svc/api/**"
	}
	return "", ""
}
