// Command m3o is the CLI of m3o, for a laptop or CI on Linux, macOS and
// Windows. It speaks only the API of package api to the daemon and knows
// nothing of how the daemon works; it links no store, builder or runtime.
//
// Results go to stdout; progress, questions, errors and hints to stderr. The
// exit status is 0 when done, 1 when it failed and 2 for misuse.
package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"syscall"
	"time"

	"golang.org/x/term"
)

func main() { os.Exit(start(completeTime)) }

// start is main with a result, so that deferred calls run before the exit.
func start(tab time.Duration) int {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	// A second Ctrl-C ends the program at once, whatever it waits for.
	context.AfterFunc(ctx, stop)
	dir, err := os.Getwd()
	if err != nil {
		dir = "."
	}
	return run(ctx, os.Args[1:], &system{
		in: bufio.NewReader(os.Stdin), out: os.Stdout, err: os.Stderr,
		env: os.Getenv, dir: dir, uid: os.Geteuid(), now: time.Now,
		inTerminal:  term.IsTerminal(int(os.Stdin.Fd())),
		outTerminal: term.IsTerminal(int(os.Stdout.Fd())),
		secret:      readSecret,
		screen:      stdScreen{},
		tab:         tab,
	})
}

// A system is what a command may touch of the machine, so that a test can
// hand in its own. Programs (git, a browser) are found on the real PATH.
type system struct {
	in       *bufio.Reader
	out, err io.Writer
	env      func(string) string
	dir      string // working directory
	root     string // before system paths of trust; "" outside tests
	uid      int    // effective user id, -1 on Windows
	now      func() time.Time
	// Whether a person is at the other end: questions are asked only with
	// inTerminal, colour and human times need outTerminal.
	inTerminal, outTerminal bool
	// secret reads a line from the terminal without showing it.
	secret func(ctx context.Context) (string, error)
	screen screen        // the terminal, for a program that gets all of it
	tab    time.Duration // how long a Tab may wait for the server
}

// readSecret reads from the terminal without echo, and restores the echo also
// when the context ends.
func readSecret(ctx context.Context) (string, error) {
	fd := int(os.Stdin.Fd())
	old, err := term.GetState(fd)
	if err != nil {
		return "", err
	}
	return await(ctx, func() (string, error) {
		b, err := term.ReadPassword(fd)
		return string(b), err
	}, func() { _ = term.Restore(fd, old) })
}

// await runs a blocking read until it or the context ends. A read from a
// terminal cannot be called off: the program ends right after, and it with it.
func await(ctx context.Context, read func() (string, error), abandoned func()) (string, error) {
	type result struct {
		text string
		err  error
	}
	done := make(chan result, 1)
	go func() {
		s, err := read()
		done <- result{s, err}
	}()
	select {
	case r := <-done:
		return r.text, r.err
	case <-ctx.Done():
		abandoned()
		return "", ctx.Err()
	}
}

// run is the whole program: it takes the arguments without the program's name
// and returns the exit status.
func run(ctx context.Context, args []string, sys *system) int {
	out := &checkedWriter{w: sys.out}
	s := *sys
	s.out = out
	c, err := parse(args, &s)
	if err == nil {
		err = c.cmd.run(ctx, c)
	}
	if err == nil && out.err != nil {
		err = fmt.Errorf("write output: %w", out.err)
	}
	if err == nil {
		return 0
	}
	if status, ok := errors.AsType[exitStatus](err); ok {
		return int(status)
	}
	msg, hint, exit := explain(ctx, err)
	s.say("m3o: error: %s", msg)
	if hint != "" {
		s.say("m3o: hint: %s", hint)
	}
	return exit
}

// A checkedWriter remembers the first error, so that a full disk behind
// stdout is an exit status and not a silent loss.
type checkedWriter struct {
	w   io.Writer
	err error
}

func (w *checkedWriter) Write(p []byte) (int, error) {
	if w.err != nil {
		return 0, w.err
	}
	n, err := w.w.Write(p)
	w.err = err
	return n, err
}
