//go:build linux

// Command m3o-bench measures what the design promises and writes it to
// docs/benchmarks.md. It starts an installation of its own from bin/, on
// loopback with its state in a temporary directory, and uses it as a person
// does: git over SSH, the CLI, HTTPS. Each figure stands beside a reference
// that was measured in the same run, in turns with it.
//
// A figure over its budget is told, and is no failure: machines differ. The
// exit status is 1 only when something could not be measured, 2 for misuse.
package main

import (
	"cmp"
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"syscall"
	"time"
)

// limit bounds the whole run.
const limit = 60 * time.Minute

// A bench is what one run measures with.
type bench struct {
	box    *box
	root   string // of the repository
	dir    string // temporary
	rounds int
	match  *regexp.Regexp                   // of the router's kinds of requests
	say    func(format string, args ...any) // progress, to stderr
}

// A measurement fills one section of the report.
type measurement struct {
	name    string
	title   string
	measure func(*bench, context.Context, *section) error
	alone   bool // it needs no daemon
}

var measurements = []measurement{
	{"memory", "Memory", (*bench).memory, false}, // first: a fresh daemon, and then one with apps
	{"cold", "A cold build", (*bench).cold, false},
	{"change", "A one-line change, warm", (*bench).change, false},
	{"unchanged", "A push that changes nothing", (*bench).unchanged, false},
	{"protobuf", "Generated code", (*bench).protobuf, false},
	{"heavy", "Apps beside a heavy build", (*bench).heavy, false},
	{"rollback", "Rollback", (*bench).rollback, false},
	{"router", "The router, against nginx, Caddy and grpc-gateway", (*bench).proxies, true},
	{"wake", "Scale from zero", (*bench).wake, false},
	{"runtime", "Instances", (*bench).oneInstance, true},
	{"neighbours", "Neighbours of a hog", (*bench).neighbours, true},
	{"history", "Full history and one commit, against OpenSSH", (*bench).history, false},
}

func names() []string {
	var ns []string
	for _, m := range measurements {
		ns = append(ns, m.name)
	}
	return ns
}

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	code := 0
	if !actAs(ctx) {
		code = run(ctx, os.Args[1:], os.Stdout, os.Stderr)
	}
	stop()
	os.Exit(code)
}

type settings struct {
	rounds   int
	only     []string
	match    *regexp.Regexp
	out, bin string
	keep     bool
}

func (s settings) wants(m measurement) bool {
	return len(s.only) == 0 || slices.Contains(s.only, m.name)
}

// parse reads the flags. The report is written by default only when all of it
// was measured.
func parse(args []string, stderr io.Writer) (settings, error) {
	var s settings
	f := flag.NewFlagSet("m3o-bench", flag.ContinueOnError)
	f.SetOutput(stderr)
	f.IntVar(&s.rounds, "rounds", 7, "how often each figure is measured")
	only := f.String("only", "", "measure only these, separated by commas: "+strings.Join(names(), ", "))
	match := f.String("match", "", "measure only those kinds of the router's requests that this expression matches")
	f.StringVar(&s.out, "out", "", "where to write the report (default docs/benchmarks.md when everything is measured)")
	f.StringVar(&s.bin, "bin", "", "directory of the binaries (default bin of the repository)")
	f.BoolVar(&s.keep, "keep", false, "keep the temporary directory, with the daemon's log")
	if err := f.Parse(args); err != nil {
		return s, err
	}
	bad := func(format string, args ...any) (settings, error) {
		err := fmt.Errorf(format, args...)
		fmt.Fprintln(stderr, "m3o-bench: error:", err)
		return s, err
	}
	if f.NArg() > 0 {
		return bad("unexpected argument %q", f.Arg(0))
	}
	if s.rounds < 1 || s.rounds > 100 {
		return bad("-rounds takes a number from 1 to 100, not %d", s.rounds)
	}
	var err error
	if s.match, err = regexp.Compile(*match); err != nil {
		return bad("-match: %w", err)
	}
	if *only != "" {
		s.only = strings.Split(*only, ",")
		for _, n := range s.only {
			if !slices.Contains(names(), n) {
				return bad("-only %s: there are %s", n, strings.Join(names(), ", "))
			}
		}
	}
	return s, nil
}

func run(ctx context.Context, args []string, stdout, stderr io.Writer) int {
	s, err := parse(args, stderr)
	if errors.Is(err, flag.ErrHelp) {
		return 0
	}
	if err != nil {
		return 2
	}
	ctx, cancel := context.WithTimeoutCause(ctx, limit, fmt.Errorf("not done within %s", limit))
	defer cancel()
	if err := measureAll(ctx, s, stdout, stderr); err != nil {
		fmt.Fprintln(stderr, "m3o-bench: error:", err)
		return 1
	}
	return 0
}

func measureAll(ctx context.Context, s settings, stdout, stderr io.Writer) (err error) {
	mod, err := exec.CommandContext(ctx, "go", "env", "GOMOD").Output()
	if err != nil {
		return fmt.Errorf("find the repository: %w", err)
	}
	root := filepath.Dir(strings.TrimSpace(string(mod)))
	if _, err := os.Stat(filepath.Join(root, "testdata", "apps")); err != nil {
		return fmt.Errorf("run this inside the repository: %w", err)
	}
	dir, err := os.MkdirTemp("", "m3o-bench-")
	if err != nil {
		return err
	}
	b := &bench{root: root, dir: dir, rounds: s.rounds, match: s.match}
	began := time.Now()
	b.say = func(format string, args ...any) {
		fmt.Fprintf(stderr, "%5.0fs  %s\n", time.Since(began).Seconds(), fmt.Sprintf(format, args...))
	}
	rep, err := newReport(ctx, s.rounds)
	if err != nil {
		return errors.Join(err, os.RemoveAll(dir))
	}
	alone := !slices.ContainsFunc(measurements, func(m measurement) bool { return !m.alone && s.wants(m) })
	if !alone {
		b.say("starting m3o in %s", dir)
		bin := cmp.Or(s.bin, filepath.Join(root, "bin"))
		if b.box, err = openBox(ctx, bin, dir); err != nil {
			return errors.Join(err, os.RemoveAll(dir))
		}
	}
	defer func() {
		b.say("stopping")
		var cerr error
		if !alone {
			cerr = b.box.close(context.WithoutCancel(ctx))
		}
		if cerr == nil && !s.keep {
			cerr = os.RemoveAll(dir)
		}
		if cerr != nil || s.keep {
			b.say("left %s", dir)
		}
		err = errors.Join(err, cerr)
	}()
	if !alone {
		if err := b.box.signIn(ctx); err != nil {
			return err
		}
	}
	var missing []error
	for _, m := range measurements {
		if !s.wants(m) {
			continue
		}
		b.say("%s", m.title)
		sec := &section{title: m.title}
		if err := m.measure(b, ctx, sec); err != nil {
			if ctx.Err() != nil {
				return context.Cause(ctx)
			}
			// The others may still work; what is missing decides the exit status.
			err = fmt.Errorf("%s: %w", m.name, err)
			b.say("could not be measured: %v", err)
			if !m.alone {
				err = fmt.Errorf("%w; the daemon's log ends:\n%s", err, tail(b.box.logFile(), 3000))
			}
			missing = append(missing, err)
			continue
		}
		rep.sections = append(rep.sections, sec)
	}
	rep.finish()
	fmt.Fprintln(stdout, rep)
	if len(missing) > 0 {
		return errors.Join(missing...)
	}
	out := s.out
	if out == "" && len(s.only) == 0 && s.match.String() == "" {
		out = filepath.Join(root, "docs", "benchmarks.md")
	}
	if out == "" {
		return nil
	}
	if err := os.MkdirAll(filepath.Dir(out), 0o755); err != nil {
		return err
	}
	if err := os.WriteFile(out, []byte(rep.String()), 0o644); err != nil {
		return fmt.Errorf("write report: %w", err)
	}
	b.say("wrote %s", out)
	return nil
}
