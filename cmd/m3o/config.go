package main

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"strings"

	m3ov1 "github.com/m3o/m3o/api/m3o/v1"
)

func runConfig(ctx context.Context, c *call) error {
	app, cl, err := c.withApp(ctx)
	if err != nil {
		return err
	}
	res, err := ask(ctx, cl.config.List, &m3ov1.ListConfigRequest{App: app, Preview: c.has("preview")})
	if err != nil {
		return err
	}
	return c.result(res, func() {
		if len(res.GetVars()) == 0 {
			c.say("%s has no config yet", app)
			c.hint("m3o config:set NAME=VALUE -a %s", app)
			return
		}
		var rows [][]string
		for _, v := range res.GetVars() {
			value := plain(v.GetValue())
			if v.GetSecret() {
				value = "(secret)"
			}
			rows = append(rows, []string{plain(v.GetName()), value})
		}
		c.table([]string{"NAME", "VALUE"}, rows)
	})
}

func runConfigGet(ctx context.Context, c *call) error {
	app, cl, err := c.withApp(ctx)
	if err != nil {
		return err
	}
	res, err := ask(ctx, cl.config.List, &m3ov1.ListConfigRequest{App: app, Preview: c.has("preview")})
	if err != nil {
		return err
	}
	for _, v := range res.GetVars() {
		if v.GetName() != c.args[0] {
			continue
		}
		if v.GetSecret() && !c.has("json") {
			return fail(v.GetName()+" is secret: its value is never shown again", "m3o config:set "+v.GetName()+"=- --secret sets another")
		}
		// As it is, for $(m3o config:get NAME): a value may have many lines.
		return c.result(v, func() {
			if c.outTerminal {
				c.print("%s\n", c.text(v.GetValue()))
				return
			}
			c.print("%s\n", v.GetValue())
		})
	}
	return fail(fmt.Sprintf("%s has no variable called %s", app, quoted(c.args[0])), "m3o config -a "+app)
}

// parseVars reads NAME=VALUE words; NAME=- takes the value from stdin, where
// no list of processes shows it.
func (c *call) parseVars(ctx context.Context) ([]*m3ov1.Var, error) {
	var vars []*m3ov1.Var
	var input *m3ov1.Var
	for _, a := range c.args {
		name, value, ok := strings.Cut(a, "=")
		if !ok || name == "" {
			return nil, misuse(quoted(a)+" is not NAME=VALUE", "m3o config:set NAME=VALUE, or NAME=- to read the value from stdin")
		}
		if slices.ContainsFunc(vars, func(v *m3ov1.Var) bool { return v.GetName() == name }) {
			return nil, misuse(name+" is set twice", "")
		}
		v := &m3ov1.Var{Name: name, Value: value, Secret: c.has("secret")}
		if value == "-" {
			if input != nil {
				return nil, misuse("only one value can come from stdin", "set "+name+" by a second command")
			}
			input = v
		}
		vars = append(vars, v)
	}
	if input == nil {
		return vars, nil
	}
	if c.inTerminal {
		_, _ = fmt.Fprintf(c.err, "Value of %s: ", input.GetName())
		value, err := c.secret(ctx)
		c.say("")
		input.Value = value
		return vars, err
	}
	value, err := c.readInput()
	// What echo and editors put at the end is not part of the value.
	input.Value = strings.TrimSuffix(strings.TrimSuffix(value, "\n"), "\r")
	return vars, err
}

func runConfigSet(ctx context.Context, c *call) error {
	vars, err := c.parseVars(ctx)
	if err != nil {
		return err
	}
	app, cl, err := c.withApp(ctx)
	if err != nil {
		return err
	}
	// Only for the undo line: who may not read may still change.
	before, _ := ask(ctx, cl.config.List, &m3ov1.ListConfigRequest{App: app, Preview: c.has("preview")})
	res, err := ask(ctx, cl.config.Set, &m3ov1.SetConfigRequest{App: app, Vars: vars, NoRestart: c.has("no-restart"), Preview: c.has("preview")})
	if err != nil {
		return err
	}
	names := make([]string, len(vars))
	for i, v := range vars {
		names[i] = v.GetName()
	}
	return c.result(res, func() { c.configDone("set", app, names, before, res.GetRevision(), res.GetRelease()) })
}

func runConfigUnset(ctx context.Context, c *call) error {
	app, cl, err := c.withApp(ctx)
	if err != nil {
		return err
	}
	// Only for the undo line: who may not read may still change.
	before, _ := ask(ctx, cl.config.List, &m3ov1.ListConfigRequest{App: app, Preview: c.has("preview")})
	res, err := ask(ctx, cl.config.Unset, &m3ov1.UnsetConfigRequest{App: app, Names: c.args, NoRestart: c.has("no-restart"), Preview: c.has("preview")})
	if err != nil {
		return err
	}
	return c.result(res, func() { c.configDone("unset", app, c.args, before, res.GetRevision(), res.GetRelease()) })
}

// configDone tells what a change made and how to take it back: a release by a
// rollback, a change that waits for the next release by its opposite.
func (c *call) configDone(did, app string, names []string, before *m3ov1.ListConfigResponse, revision, release int32) {
	c.print("%s %s: config %d", did, plain(strings.Join(names, ", ")), revision)
	if release > 0 {
		c.print(", released v%d\n", release)
		c.undo("m3o rollback -a %s", app)
		return
	}
	c.print(", for the next release\n")
	var set, unset, lost []string
	for _, n := range names {
		i := slices.IndexFunc(before.GetVars(), func(v *m3ov1.Var) bool { return v.GetName() == n })
		switch {
		case i < 0:
			unset = append(unset, n)
		case before.GetVars()[i].GetSecret(), plain(before.GetVars()[i].GetValue()) != before.GetVars()[i].GetValue():
			lost = append(lost, n)
		default:
			set = append(set, quote(n+"="+before.GetVars()[i].GetValue()))
		}
	}
	if before == nil {
		return
	}
	if len(set) > 0 {
		c.undo("m3o config:set %s --no-restart -a %s", strings.Join(set, " "), app)
	}
	if len(unset) > 0 && did == "set" {
		c.undo("m3o config:unset %s --no-restart -a %s", plain(strings.Join(unset, " ")), app)
	}
	if len(lost) > 0 {
		c.say("m3o: warning: what %s held is gone and cannot be shown", plain(strings.Join(lost, ", ")))
	}
}

func sortedKeys[V any](m map[string]V) []string { return slices.Sorted(maps.Keys(m)) }
