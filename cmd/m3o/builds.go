package main

import (
	"bytes"
	"context"
	"strconv"

	"connectrpc.com/connect"

	m3ov1 "github.com/m3o/m3o/api/m3o/v1"
)

func runBuilds(ctx context.Context, c *call) error {
	limit, err := c.number("number", 0, 1, 1000)
	if err != nil {
		return err
	}
	app, cl, err := c.withApp(ctx)
	if err != nil {
		return err
	}
	res, err := ask(ctx, cl.builds.List, &m3ov1.ListBuildsRequest{App: app, Limit: int32(limit)})
	if err != nil {
		return err
	}
	return c.result(res, func() {
		if len(res.GetBuilds()) == 0 {
			c.say("%s has no builds yet", app)
			c.hint("git push m3o main")
			return
		}
		var rows [][]string
		for _, b := range res.GetBuilds() {
			what := b.GetError()
			if what == "" {
				what = b.GetMessage()
			}
			length := ""
			if b.GetStarted().IsValid() && b.GetFinished().IsValid() {
				length = took(b.GetFinished().AsTime().Sub(b.GetStarted().AsTime()).Milliseconds())
			}
			rows = append(rows, []string{strconv.Itoa(int(b.GetNumber())), c.status(plain(b.GetStatus())), short(plain(b.GetCommit())),
				plain(b.GetUser()), c.when(b.GetStarted()), length, plain(what)})
		}
		c.table([]string{"BUILD", "STATUS", "COMMIT", "BY", "WHEN", "TOOK", "WHAT"}, rows)
	})
}

func runBuildsOutput(ctx context.Context, c *call) error {
	n, err := c.buildNumber()
	if err != nil {
		return err
	}
	req := &m3ov1.BuildOutputRequest{Follow: c.has("follow"), Number: n}
	app, cl, err := c.withApp(ctx)
	if err != nil {
		return err
	}
	req.App = app
	stream, err := cl.builds.Output(ctx, connect.NewRequest(req))
	lines := &lineWriter{system: c.system}
	err = receive(ctx, cl, req.GetFollow(), stream, err, func(m *m3ov1.BuildOutputResponse) error {
		if c.has("json") {
			return c.jsonLine(m)
		}
		_, err := lines.Write(m.GetData())
		return err
	})
	lines.flush()
	return err
}

// A lineWriter passes a stream of bytes on to stdout, line by line where a
// person watches so that text can clean each.
type lineWriter struct {
	*system
	rest []byte
}

// maxLine is where a line without an end is broken.
const maxLine = 64 << 10

func (w *lineWriter) Write(p []byte) (int, error) {
	if !w.outTerminal {
		return w.out.Write(p)
	}
	w.rest = append(w.rest, p...)
	for {
		line, rest, ok := bytes.Cut(w.rest, []byte("\n"))
		if !ok && len(w.rest) < maxLine {
			return len(p), nil
		}
		if _, err := w.out.Write([]byte(w.text(string(line)) + "\n")); err != nil {
			return 0, err
		}
		w.rest = rest
	}
}

// flush writes the last line when it has no end.
func (w *lineWriter) flush() {
	if len(w.rest) > 0 {
		_, _ = w.out.Write([]byte(w.text(string(w.rest)) + "\n"))
		w.rest = nil
	}
}
