package main

import (
	"context"
	"fmt"
	"slices"
	"strconv"
	"strings"
)

// A command is one row of the table that parsing, help, completion and
// docs/cli.md are made from.
type command struct {
	name    string   // "config:set" or one word
	aliases []string // other spellings; "a:b" is always also "a b"
	group   string
	args    string // for the usage line
	min     int    // positional arguments needed
	max     int    // positional arguments taken, -1 for any number
	app     bool   // works on an app: takes -a and -r
	appArg  bool   // the first argument may name the app too
	flags   []flag
	short   string // one line, no full stop
	long    string // paragraphs
	example string // lines, each a command
	hidden  bool   // not in the overview
	rest    bool   // from the first argument on all is another program's, flags too
	// completes says what an argument is: "app", "server", "key", "var",
	// "release", "build", "schedule", "notifier", "command", "shell", "file" or "".
	completes string
	run       func(ctx context.Context, c *call) error
}

// A flag takes a value when value names one, and is on or off otherwise.
type flag struct {
	name, short, value, help string
}

var (
	helpFlag   = flag{"help", "h", "", "show help for this command"}
	jsonFlag   = flag{"json", "", "", "print the result as JSON"}
	appFlag    = flag{"app", "a", "APP", "the app; without it the one of the git remote, then M3O_APP"}
	remoteFlag = flag{"remote", "r", "REMOTE", "the git remote that names the app (default m3o)"}
)

// globals may stand anywhere in the arguments.
func globals() []flag { return []flag{appFlag, remoteFlag, jsonFlag, helpFlag} }

// all are the flags of the command with those that every command takes.
func (cmd *command) all() []flag {
	fs := slices.Clone(cmd.flags)
	if cmd.app {
		fs = append(fs, appFlag, remoteFlag)
	}
	return append(fs, jsonFlag, helpFlag)
}

// A call is one use of a command.
type call struct {
	*system
	cmd  *command
	args []string
	set  map[string]string   // flags given; "" for those without a value
	many map[string][]string // every value of a flag that was given more than once
	// dashed is whether "--" stood before the arguments.
	dashed bool
}

func (c *call) has(flag string) bool     { _, ok := c.set[flag]; return ok }
func (c *call) value(flag string) string { return c.set[flag] }

// number is the value of a flag between low and high, or absent.
func (c *call) number(flag string, absent, low, high int) (int, error) {
	if !c.has(flag) {
		return absent, nil
	}
	n, err := strconv.Atoi(c.value(flag))
	if err != nil || n < low || n > high {
		return 0, misuse(fmt.Sprintf("--%s takes a number from %d to %d, not %q", flag, low, high, c.value(flag)), "")
	}
	return n, nil
}

// find is the command of that name or alias, nil when there is none.
func find(name string) *command {
	for _, cmd := range commands() {
		if cmd.name == name || slices.Contains(cmd.aliases, name) {
			return cmd
		}
	}
	return nil
}

// parse finds the command and its flags. Errors are usageErrors.
func parse(args []string, sys *system) (*call, error) {
	cmd, rest, err := resolve(args)
	if err != nil {
		return nil, err
	}
	c := &call{system: sys, cmd: cmd, set: map[string]string{}}
	if cmd.name == "__complete" { // its arguments are another command's, unfinished
		c.args = rest
		return c, nil
	}
	if err := c.parseFlags(rest); err != nil {
		return nil, err
	}
	if c.has("help") {
		return &call{system: sys, cmd: find("help"), args: []string{cmd.name}, set: map[string]string{}}, nil
	}
	if cmd.max == 0 && len(c.args) > 0 && isNoun(cmd.name) {
		return nil, unknownCommand(cmd.name + ":" + c.args[0])
	}
	if n := len(c.args); n < cmd.min || cmd.max >= 0 && n > cmd.max {
		return nil, misuse("usage: "+cmd.usage(), "m3o help "+cmd.name)
	}
	return c, nil
}

// resolve finds the command's one or two words among the global flags and
// returns the arguments without them.
func resolve(args []string) (*command, []string, error) {
	var words []int // places of the first two words
	for i := 0; i < len(args) && len(words) < 2; i++ {
		a := args[i]
		switch {
		case a == "--" || a == "-":
			i = len(args)
		case strings.HasPrefix(a, "-"):
			f, inline, ok := global(a)
			switch {
			case !ok && len(words) == 0:
				if a == "--version" || a == "-v" {
					return find("version"), nil, nil
				}
				return nil, nil, unknownFlag(a, globals(), "m3o help")
			case !ok:
				i = len(args) // a flag of the command: no second word
			case f.value != "" && !inline:
				i++
			}
		default:
			words = append(words, i)
		}
	}
	if len(words) == 0 {
		return find("help"), nil, nil
	}
	one := args[words[0]]
	without := func(is ...int) []string {
		var out []string
		for i, a := range args {
			if !slices.Contains(is, i) {
				out = append(out, a)
			}
		}
		return out
	}
	if len(words) == 2 && !strings.Contains(one, ":") {
		if cmd := find(one + ":" + args[words[1]]); cmd != nil {
			return cmd, without(words...), nil
		}
	}
	if cmd := find(one); cmd != nil {
		return cmd, without(words[0]), nil
	}
	if len(words) == 2 && isNoun(one) {
		return nil, nil, unknownCommand(one + ":" + args[words[1]])
	}
	return nil, nil, unknownCommand(one)
}

// global says which global flag an argument is, and whether it carries its value.
func global(a string) (f flag, inline, ok bool) {
	name, _, eq := strings.Cut(a, "=")
	for _, f := range globals() {
		switch {
		case name == "--"+f.name:
			return f, eq, true
		case f.short != "" && strings.HasPrefix(a, "-"+f.short) && !strings.HasPrefix(a, "--"):
			return f, len(a) > 2, f.value != "" || len(a) == 2
		}
	}
	return flag{}, false, false
}

// isNoun says whether some command is noun:verb.
func isNoun(noun string) bool {
	for _, cmd := range commands() {
		for _, n := range append([]string{cmd.name}, cmd.aliases...) {
			if strings.HasPrefix(n, noun+":") {
				return true
			}
		}
	}
	return false
}

func (c *call) parseFlags(args []string) error {
	flags := c.cmd.all()
	for len(args) > 0 {
		a := args[0]
		args = args[1:]
		switch {
		case a == "--":
			c.dashed = len(c.args) == 0
			c.args = append(c.args, args...)
			return nil
		case strings.HasPrefix(a, "--"):
			name, value, eq := strings.Cut(a[2:], "=")
			i := slices.IndexFunc(flags, func(f flag) bool { return f.name == name })
			if i < 0 {
				return unknownFlag("--"+name, flags, "m3o help "+c.cmd.name)
			}
			switch f := flags[i]; {
			case f.value == "" && eq:
				return misuse("--"+name+" takes no value", "")
			case f.value != "" && !eq && len(args) == 0:
				return misuse("--"+name+" needs a value", "m3o help "+c.cmd.name)
			case f.value != "" && !eq:
				value, args = args[0], args[1:]
				fallthrough
			default:
				c.put(name, value)
			}
		case strings.HasPrefix(a, "-") && a != "-":
			for letters := a[1:]; letters != ""; {
				i := slices.IndexFunc(flags, func(f flag) bool { return f.short != "" && strings.HasPrefix(letters, f.short) })
				if i < 0 {
					return unknownFlag("-"+letters[:1], flags, "m3o help "+c.cmd.name)
				}
				f := flags[i]
				letters = letters[1:]
				if f.value == "" {
					c.set[f.name] = ""
					continue
				}
				switch {
				case letters != "":
					c.put(f.name, strings.TrimPrefix(letters, "="))
				case len(args) > 0:
					c.put(f.name, args[0])
					args = args[1:]
				default:
					return misuse("-"+f.short+" needs a value", "m3o help "+c.cmd.name)
				}
				letters = ""
			}
		case c.cmd.rest:
			c.args = append([]string{a}, args...)
			return nil
		default:
			c.args = append(c.args, a)
		}
	}
	return nil
}

func (c *call) put(flag, value string) {
	c.set[flag] = value
	if c.many == nil {
		c.many = map[string][]string{}
	}
	c.many[flag] = append(c.many[flag], value)
}

func unknownCommand(name string) error {
	var names []string
	for _, cmd := range commands() {
		if !cmd.hidden {
			names = append(append(names, cmd.name), cmd.aliases...)
		}
	}
	if near := nearest(name, names); near != "" {
		return misuse(fmt.Sprintf("no command called %s", quoted(name)), "did you mean m3o "+near)
	}
	hint := "m3o help"
	if noun, _, ok := strings.Cut(name, ":"); ok || isNoun(noun) {
		var verbs []string
		for _, n := range names {
			if strings.HasPrefix(n, noun+":") {
				verbs = append(verbs, n)
			}
		}
		if len(verbs) > 0 {
			hint = "there are " + strings.Join(verbs, ", ")
		}
	}
	return misuse(fmt.Sprintf("no command called %s", quoted(name)), hint)
}

func unknownFlag(name string, flags []flag, help string) error {
	var names []string
	for _, f := range flags {
		names = append(names, "--"+f.name)
	}
	if near := nearest(name, names); near != "" {
		return misuse("no flag called "+quoted(name), "did you mean "+near)
	}
	return misuse("no flag called "+quoted(name), help)
}

func quoted(s string) string { return strconv.Quote(s) }

// nearest is the word of the list that is closest to what was typed, "" when
// none is close.
func nearest(typed string, words []string) string {
	best, at := "", max(2, len(typed)/3)+1
	for _, w := range words {
		d := distance(typed, w)
		if d < at {
			best, at = w, d
		}
	}
	// One that shares nothing but its length is no help.
	if at >= len([]rune(typed)) {
		return ""
	}
	return best
}

// distance is how many letters must be added, taken, changed or swapped with
// their neighbour to turn a into b.
func distance(a, b string) int {
	x, y := []rune(a), []rune(b)
	rows := [3][]int{make([]int, len(y)+1), make([]int, len(y)+1), make([]int, len(y)+1)}
	for j := range rows[0] {
		rows[0][j] = j
	}
	for i := 1; i <= len(x); i++ {
		now, last, before := rows[i%3], rows[(i+2)%3], rows[(i+1)%3]
		now[0] = i
		for j := 1; j <= len(y); j++ {
			cost := 1
			if x[i-1] == y[j-1] {
				cost = 0
			}
			now[j] = min(last[j]+1, now[j-1]+1, last[j-1]+cost)
			if i > 1 && j > 1 && x[i-1] == y[j-2] && x[i-2] == y[j-1] {
				now[j] = min(now[j], before[j-2]+1)
			}
		}
	}
	return rows[len(x)%3][len(y)]
}
