// Command m3od is the m3o daemon: git server, builds, releases, API. As
// "m3od router" it is the data plane, which the daemon starts and which
// outlives it.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/signal"
	"slices"
	"syscall"

	"github.com/m3o/m3o"
	"github.com/m3o/m3o/daemon"
)

// version is set by the linker.
var version = "dev"

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	code := run(ctx, os.Args[1:], os.Getenv, os.Stdout, os.Stderr)
	stop()
	os.Exit(code)
}

// run is main with its surroundings handed in. It returns the exit code: 0
// stopped as asked, 1 failed, 2 misused. Each of before sees the daemon before
// it runs.
func run(ctx context.Context, args []string, getenv func(string) string, stdout, stderr io.Writer, before ...func(*daemon.Daemon)) int {
	router, doctor, asJSON := false, false, false
	if len(args) > 0 {
		switch args[0] {
		case "router":
			router, args = true, args[1:]
		case "doctor":
			doctor, args = true, args[1:]
			if i := slices.Index(args, "--json"); i >= 0 {
				asJSON, args = true, slices.Delete(slices.Clone(args), i, i+1)
			}
		case "version", "--version":
			fmt.Fprintln(stdout, "m3od", version)
			return 0
		}
	}
	cfg, err := daemon.ParseConfig(args, getenv, func(f *flag.FlagSet) { usage(stdout, f) })
	if errors.Is(err, flag.ErrHelp) {
		return 0
	}
	if err != nil {
		return fail(stderr, err, 2)
	}
	if doctor {
		return report(stdout, daemon.Doctor(ctx, cfg), asJSON)
	}
	var level slog.Level
	_ = level.UnmarshalText([]byte(cfg.LogLevel)) // ParseConfig has checked it
	log := slog.New(slog.NewTextHandler(stderr, &slog.HandlerOptions{Level: level}))
	if router {
		if err := daemon.RunRouter(ctx, cfg, version, log); err != nil {
			return fail(stderr, err, 1)
		}
		return 0
	}
	d, err := daemon.New(ctx, cfg, version, log)
	if err != nil {
		return fail(stderr, err, 1)
	}
	for _, f := range before {
		f(d)
	}
	if err := d.Run(ctx, func(r daemon.Ready) { announce(stdout, log, r) }); err != nil {
		return fail(stderr, err, 1)
	}
	return 0
}

// announce prints what somebody needs who has just started a daemon, and the
// line "ready …" last: scripts and service managers wait for it.
func announce(w io.Writer, log *slog.Logger, r daemon.Ready) {
	if r.Code != "" {
		fmt.Fprintf(w, "First start: sign in as admin with your SSH key. The code works once, within a day:\n  m3o login %s --code %s --ca-fingerprint %s\n", r.API, r.Code.Reveal(), r.CAFingerprint)
	}
	fmt.Fprintf(w, "ready api=%s git=%s apps=%d\n", r.API, r.Git, r.Apps)
	if err := notifySystemd("READY=1"); err != nil {
		log.Warn("notify systemd", "err", err)
	}
}

func fail(w io.Writer, err error, code int) int {
	fmt.Fprintf(w, "m3od: error: %v\n", err)
	if h := m3o.HintOf(err); h != "" {
		fmt.Fprintf(w, "m3od: hint: %s\n", h)
	}
	return code
}

func usage(w io.Writer, f *flag.FlagSet) {
	fmt.Fprint(w, `m3od is the m3o daemon.

Usage: m3od [flags]
       m3od doctor [--json] [flags]   examine this host, and say how to mend what is wrong;
                                      exit status 0: nothing to mend, 1: something is, 2: wrong settings

Every flag is also a variable M3O_<FLAG> (M3O_HTTPS for --https, M3O_BUILD_TIMEOUT
for --build-timeout) and a key of the configuration file.

`)
	f.SetOutput(w)
	f.PrintDefaults()
}
