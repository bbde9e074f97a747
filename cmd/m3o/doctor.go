package main

import (
	"context"
	"strings"

	m3ov1 "github.com/m3o/m3o/api/m3o/v1"
)

func doctorCommands() []*command {
	return []*command{{name: "doctor", group: "Help", run: runDoctor,
		short: "Examine the server and say how to mend what is wrong (admins)",
		long: `The exit status is 0 when nothing has to be mended (there may be warnings), 1 when something has to be, or the server could not be
asked. On the server itself, m3od doctor does the same without a daemon.`}}
}

func runDoctor(ctx context.Context, c *call) error {
	cl, err := c.connect()
	if err != nil {
		return err
	}
	res, err := ask(ctx, cl.doctor.Check, &m3ov1.CheckRequest{})
	if err != nil {
		return err
	}
	failed := false
	for _, f := range res.GetFindings() {
		failed = failed || f.GetState() == "fail"
	}
	if err := c.result(res, func() {
		for _, f := range res.GetFindings() {
			colour := map[string]string{"ok": green, "warn": yellow, "fail": red}[f.GetState()]
			state, check := plain(f.GetState()), plain(f.GetCheck())
			c.print("%s%s  %s%s  %s\n", c.paint(colour, state), strings.Repeat(" ", max(0, 4-len(state))), check, strings.Repeat(" ", max(0, 9-len(check))), plain(f.GetMessage()))
			if f.GetHint() != "" {
				c.print("%s%s\n", strings.Repeat(" ", 17), plain(f.GetHint()))
			}
		}
	}); err != nil {
		return err
	}
	if failed {
		return exitStatus(1)
	}
	return nil
}
