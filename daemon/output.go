package daemon

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"strings"
	"sync"
	"time"

	"github.com/m3o/m3o"
)

// An output writes what a pusher reads, in Heroku's grammar: a step begins
// with an arrow, its lines are indented, what goes wrong begins with " !". A
// pusher who is gone does not end a deploy, so write errors are dropped.
type output struct{ w io.Writer }

func (o output) step(format string, args ...any) {
	fmt.Fprintf(o.w, "-----> "+format+"\n", args...)
}

func (o output) line(format string, args ...any) {
	fmt.Fprintf(o.w, "       "+format+"\n", args...)
}

func (o output) warn(format string, args ...any) {
	fmt.Fprintf(o.w, " !     "+format+"\n", args...)
}

// fail tells a failure as the last lines: what is wrong, then what helps.
func (o output) fail(err error) {
	for l := range strings.SplitSeq(strings.TrimRight(userMessage(err), "\n"), "\n") {
		o.warn("%s", l)
	}
	if h := m3o.HintOf(err); h != "" {
		o.warn("%s", h)
	}
}

// userMessage is what of err a user may read: an internal fault's cause stays in the log.
func userMessage(err error) string {
	if m3o.KindOf(err) == m3o.Internal {
		return "something went wrong inside m3o; the daemon's log has the cause"
	}
	return err.Error()
}

// seconds prints a duration as people compare them: 0.2s, 3.4s, 2m10s.
func seconds(d time.Duration) string {
	if d < time.Minute {
		return fmt.Sprintf("%.1fs", d.Seconds())
	}
	return d.Round(time.Second).String()
}

// tee copies a deploy's output to the pusher and to the build's log. A pusher
// who has gone must not stop the log, nor a full disk the pusher.
type tee struct {
	mu     sync.Mutex // guards what follows
	pusher io.Writer  // nil once it failed
	log    io.Writer  // nil once it failed
}

func (t *tee) Write(p []byte) (int, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.pusher != nil {
		if _, err := t.pusher.Write(p); err != nil {
			t.pusher = nil
		}
	}
	if t.log != nil {
		if _, err := t.log.Write(p); err != nil {
			t.log = nil
		}
	}
	return len(p), nil
}

// logged is where what only the log gets is written.
func (t *tee) logged() io.Writer {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.log == nil {
		return io.Discard
	}
	return t.log
}

// Limits of what is kept of an app's builds.
const (
	keepBuilds  = 100      // records and outputs, beside those of releases that a rollback offers
	maxBuildLog = 16 << 20 // bytes of one build's output
)

// A cappedLog is a build's output on disk. When it is full, what tools print is
// left out; m3o's own lines, which say how the build goes on and ends, are few
// and still kept.
type cappedLog struct {
	file *os.File // not embedded: its other ways to write would go round the limit
	left int
	full bool
}

func (c *cappedLog) Close() error { return c.file.Close() }

func (c *cappedLog) Write(p []byte) (int, error) {
	if !c.full && len(p) <= c.left {
		c.left -= len(p)
		return c.file.Write(p)
	}
	if !c.full {
		c.full = true
		if _, err := fmt.Fprintf(c.file, " !     The output is longer than %d MB: from here on only the steps are kept\n", maxBuildLog>>20); err != nil {
			return 0, err
		}
	}
	if s := string(p); strings.HasPrefix(s, "----->") || strings.HasPrefix(s, " !  ") || strings.HasPrefix(s, "       Released ") {
		return c.file.Write(p)
	}
	return len(p), nil
}

// forgetBuilds removes the records and outputs of an app's old builds.
func (d *Daemon) forgetBuilds(ctx context.Context, app string) {
	kept, err := d.ledger.Kept(ctx, app)
	if err != nil {
		d.log.Error("forget old builds", "app", app, "err", err)
		return
	}
	var needed []int
	for _, rel := range kept {
		needed = append(needed, rel.Build)
	}
	gone, err := d.ledger.ForgetBuilds(ctx, app, keepBuilds, needed)
	if err != nil {
		d.log.Error("forget old builds", "app", app, "err", err)
	}
	for _, n := range gone {
		if err := os.Remove(d.buildLog(app, n)); err != nil && !errors.Is(err, fs.ErrNotExist) {
			d.log.Error("forget old builds", "app", app, "build", n, "err", err)
		}
	}
}

// openBuildLog opens the file of a build's output for appending.
func (d *Daemon) openBuildLog(app string, number int) (*cappedLog, error) {
	if err := os.MkdirAll(d.cfg.path("builds", app), 0o700); err != nil {
		return nil, fmt.Errorf("make build log directory: %w", err)
	}
	f, err := os.OpenFile(d.buildLog(app, number), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		return nil, fmt.Errorf("open build log: %w", err)
	}
	return &cappedLog{file: f, left: maxBuildLog}, nil
}

func (d *Daemon) buildLog(app string, number int) string {
	return d.cfg.path("builds", app, fmt.Sprintf("%d.log", number))
}
