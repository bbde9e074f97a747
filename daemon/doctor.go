package daemon

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"time"

	"golang.org/x/sys/unix"
)

// A Finding is what one check of the host or the installation found.
type Finding struct {
	Check string `json:"check"`          // kernel, ports, disk …
	State string `json:"state"`          // ok, warn or fail
	Msg   string `json:"msg"`            // what is wrong, and what that breaks
	Hint  string `json:"hint,omitempty"` // how to mend it; "" when ok
}

// The states of a finding. Warn: m3o works, but not as it should.
const (
	CheckOK   = "ok"
	CheckWarn = "warn"
	CheckFail = "fail"
)

// findings collects them.
type findings []Finding

func (f *findings) add(state, check, hint, format string, args ...any) {
	if state == CheckOK {
		hint = ""
	}
	*f = append(*f, Finding{check, state, fmt.Sprintf(format, args...), hint})
}

// A host is where the doctor looks: this machine or, for what no kernel can be
// made to say, what a test puts in its place.
type host struct {
	read    func(path string) ([]byte, error) // of /proc and /sys
	uid     int
	release func() string
	clock   func() (status int32, err error) // as adjtimex(2) has it
	now     func() time.Time
	run     func(ctx context.Context, name string, args ...string) (string, error)
}

func thisHost() host {
	return host{read: os.ReadFile, uid: os.Geteuid(), now: time.Now, run: runBriefly,
		release: func() string {
			var u unix.Utsname
			_ = unix.Uname(&u) // fails for a bad pointer alone
			return unix.ByteSliceToString(u.Release[:])
		},
		clock: func() (int32, error) {
			var t unix.Timex
			_, err := unix.Adjtimex(&t)
			return t.Status, err
		}}
}

// runBriefly is what a program prints, which has three seconds for it.
func runBriefly(ctx context.Context, name string, args ...string) (string, error) {
	ctx, cancel := context.WithTimeout(ctx, 3*time.Second)
	defer cancel()
	cmd := exec.CommandContext(ctx, name, args...)
	cmd.WaitDelay = 100 * time.Millisecond // something it left may hold the pipe
	out, err := cmd.Output()
	if ctx.Err() != nil {
		err = fmt.Errorf("%s does not answer: %w", name, ctx.Err())
	}
	return string(out), err
}

// An exam is one look of the doctor at a host.
type exam struct {
	host
	cfg Config
}

// Doctor examines the host that cfg's daemon runs on, or would. It changes
// nothing and needs no daemon, but root for most of what it asks.
func Doctor(ctx context.Context, cfg Config) []Finding { return exam{thisHost(), cfg}.all(ctx) }

// A check is one part of an exam.
type check struct {
	name string
	run  func(context.Context, *findings)
}

func (e exam) all(ctx context.Context) []Finding {
	return examine(ctx, 10*time.Second, []check{{"kernel", e.kernel}, {"programs", e.programs}, {"memory", e.memory}, {"limits", e.limits}, {"isolation", e.isolation},
		{"ports", e.ports}, {"disk", e.disk}, {"state", e.state}, {"service", e.service}, {"dns", e.names}, {"https", e.https}, {"clock", e.clocks}})
}

// examine runs checks at once and returns what they found in their order. One
// that has not ended after limit is a finding itself, and is left behind: a
// disk on a network that has gone holds who asks for it, and nothing frees him.
func examine(ctx context.Context, limit time.Duration, checks []check) []Finding {
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	found := make([]chan findings, len(checks))
	for i, c := range checks {
		found[i] = make(chan findings, 1)
		go func() {
			var f findings
			c.run(ctx, &f)
			found[i] <- f
		}()
	}
	late := time.NewTimer(limit + limit/5) // who heeds ctx tells more than we can
	defer late.Stop()
	gone := false
	var all []Finding
	for i, c := range checks {
		if !gone {
			select {
			case f := <-found[i]:
				all = append(all, f...)
				continue
			case <-late.C:
				gone = true
			}
		}
		select {
		case f := <-found[i]:
			all = append(all, f...)
		default:
			all = append(all, Finding{c.name, CheckFail, fmt.Sprintf("this could not be looked at within %v: something that it asks does not answer", limit),
				"a network file system that is away does this (df hangs then, too); run m3od doctor again when the server is less busy"})
		}
	}
	return all
}
