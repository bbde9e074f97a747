package main

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"time"

	m3ov1 "github.com/m3o/m3o/api/m3o/v1"
)

// completeTime is how long a person who pressed Tab is kept waiting for the server.
const completeTime = time.Second

// The scripts call m3o __complete with the words of the line up to the
// cursor and print back "word<TAB>what it is" lines. Bash breaks words at ":"
// and "=", so its script takes the line apart itself and gives back only what
// follows the last break.
const (
	bashScript = `_m3o() {
  local line=${COMP_LINE:0:COMP_POINT} cur word kept
  local -a words
  read -ra words <<<"$line"
  [[ $line == *' ' ]] && words+=('')
  cur=${words[${#words[@]}-1]}
  kept=${cur%"${cur##*[:=]}"}
  COMPREPLY=()
  while IFS=$'\t' read -r word _; do
    [[ $COMP_WORDBREAKS == *:* ]] && word=${word#"$kept"}
    COMPREPLY+=("$word")
  done < <(m3o __complete "${words[@]:1}" 2>/dev/null)
  if [[ ${#COMPREPLY[@]} -eq 1 && ${COMPREPLY[0]} == *= ]]; then compopt -o nospace; fi
}
complete -o default -F _m3o m3o
`
	zshScript = `#compdef m3o
_m3o() {
  local -a found shown
  local word what
  while IFS=$'\t' read -r word what; do
    found+=("$word")
    shown+=("${word}${what:+  -- $what}")
  done < <(m3o __complete "${(@)words[2,CURRENT]}" 2>/dev/null)
  if (( ${#found} )); then compadd -l -d shown -a found; else _files; fi
}
if [[ $funcstack[1] == _m3o ]]; then _m3o "$@"; else compdef _m3o m3o; fi
`
	fishScript = `function __m3o_complete
  set -l words (commandline -opc)[2..-1]
  m3o __complete $words (commandline -ct) 2>/dev/null
end
complete -c m3o -f -a '(__m3o_complete)'
complete -c m3o -n '__fish_seen_subcommand_from login keys:add users:create' -F
`
)

func runCompletion(_ context.Context, c *call) error {
	scripts := map[string]string{"bash": bashScript, "zsh": zshScript, "fish": fishScript}
	s, ok := scripts[c.args[0]]
	if !ok {
		return misuse("no completion for "+quoted(c.args[0]), "there are bash, zsh and fish")
	}
	c.print("%s", s)
	return nil
}

// A candidate is one word that could stand at the cursor.
type candidate struct{ word, what string }

// runComplete prints the candidates for the last of its arguments. It never
// fails aloud: a Tab is no place for an error.
func runComplete(ctx context.Context, c *call) error {
	words := c.args
	if len(words) == 0 {
		words = []string{""}
	}
	quiet := *c.system
	quiet.err = discard{}
	last := words[len(words)-1]
	for _, k := range candidates(ctx, &quiet, words[:len(words)-1], last) {
		if strings.HasPrefix(k.word, last) {
			c.print("%s\t%s\n", plain(k.word), plain(k.what))
		}
	}
	return nil
}

type discard struct{}

func (discard) Write(p []byte) (int, error) { return len(p), nil }

func candidates(ctx context.Context, sys *system, before []string, last string) []candidate {
	cmd, rest, err := resolve(before)
	if n := len(before); n > 0 && (before[n-1] == "-a" || before[n-1] == "--app") {
		return (&call{system: sys}).values(ctx, "app")
	}
	typed := slices.ContainsFunc(before, func(w string) bool { return !strings.HasPrefix(w, "-") })
	if err != nil && !typed {
		return nil
	}
	if !typed {
		return commandNames("")
	}
	var verbs []candidate // of "m3o config <Tab>"
	if noun := before[len(before)-1]; isNoun(noun) && len(rest) == 0 {
		verbs = commandNames(noun + ":")
	}
	if err != nil {
		return verbs
	}
	// A flag that waits for its value.
	if len(before) > 0 {
		for _, f := range cmd.all() {
			if prev := before[len(before)-1]; f.value != "" && (prev == "--"+f.name || f.short != "" && prev == "-"+f.short) {
				return nil
			}
		}
	}
	if strings.HasPrefix(last, "-") {
		var out []candidate
		for _, f := range cmd.all() {
			out = append(out, candidate{"--" + f.name, f.help})
		}
		return out
	}
	c := &call{system: sys, cmd: cmd, set: map[string]string{}}
	if err := c.parseFlags(rest); err != nil || cmd.max >= 0 && len(c.args) >= cmd.max {
		return verbs
	}
	return append(verbs, c.values(ctx, cmd.completes)...)
}

// commandNames lists commands, or the verbs of a noun without the noun.
func commandNames(noun string) []candidate {
	var out []candidate
	for _, cmd := range commands() {
		for _, n := range append([]string{cmd.name}, cmd.aliases...) {
			verb, ok := strings.CutPrefix(n, noun)
			if ok && !cmd.hidden {
				out = append(out, candidate{verb, cmd.short})
			}
		}
	}
	return out
}

// values are the candidates for an argument of that kind.
func (c *call) values(ctx context.Context, kind string) []candidate {
	var out []candidate
	switch kind {
	case "command":
		return commandNames("")
	case "shell":
		return []candidate{{"bash", ""}, {"zsh", ""}, {"fish", ""}}
	case "server":
		st, err := c.loadSettings()
		if err != nil {
			return nil
		}
		for _, u := range sortedKeys(st.Servers) {
			out = append(out, candidate{u, st.Servers[u].User})
		}
		return out
	case "", "file":
		return nil
	}
	ctx, cancel := context.WithTimeout(ctx, c.tab)
	defer cancel()
	switch kind {
	case "app":
		cl, err := c.connect()
		if err != nil {
			return nil
		}
		res, err := ask(ctx, cl.apps.List, &m3ov1.ListAppsRequest{})
		if err != nil {
			return nil
		}
		for _, a := range res.GetApps() {
			out = append(out, candidate{a.GetName(), a.GetStatus()})
		}
		return out
	case "key":
		cl, err := c.connect()
		if err != nil {
			return nil
		}
		res, err := ask(ctx, cl.keys.List, &m3ov1.ListKeysRequest{})
		if err != nil {
			return nil
		}
		for _, k := range res.GetKeys() {
			out = append(out, candidate{k.GetFingerprint(), k.GetName()})
		}
		return out
	}
	app, cl, err := c.withApp(ctx)
	if err != nil {
		return nil
	}
	switch kind {
	case "release":
		res, err := ask(ctx, cl.releases.List, &m3ov1.ListReleasesRequest{App: app})
		if err != nil {
			return nil
		}
		for _, r := range res.GetReleases() {
			out = append(out, candidate{fmt.Sprintf("v%d", r.GetVersion()), r.GetStatus() + " " + r.GetMessage()})
		}
	case "build":
		res, err := ask(ctx, cl.builds.List, &m3ov1.ListBuildsRequest{App: app})
		if err != nil {
			return nil
		}
		for _, b := range res.GetBuilds() {
			out = append(out, candidate{fmt.Sprint(b.GetNumber()), b.GetStatus() + " " + b.GetMessage()})
		}
	case "notifier":
		res, err := ask(ctx, cl.notify.List, &m3ov1.ListNotifiersRequest{App: app})
		if err != nil {
			return nil
		}
		for _, n := range res.GetNotifiers() {
			out = append(out, candidate{n.GetId(), n.GetFormat() + " " + n.GetUrl()})
		}
	case "schedule":
		res, err := ask(ctx, cl.schedules.List, &m3ov1.ListSchedulesRequest{App: app})
		if err != nil {
			return nil
		}
		for _, s := range res.GetSchedules() {
			out = append(out, candidate{s.GetName(), s.GetCron() + " " + scheduleDoes(s)})
		}
	case "var":
		res, err := ask(ctx, cl.config.List, &m3ov1.ListConfigRequest{App: app})
		if err != nil {
			return nil
		}
		end := ""
		if c.cmd.name == "config:set" {
			end = "="
		}
		for _, v := range res.GetVars() {
			out = append(out, candidate{v.GetName() + end, ""})
		}
	}
	return out
}
