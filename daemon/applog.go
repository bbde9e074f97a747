package daemon

import (
	"bytes"
	"cmp"
	"context"
	"fmt"
	"iter"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/m3o/m3o"
	"github.com/m3o/m3o/release"
	"github.com/m3o/m3o/router"
	"github.com/m3o/m3o/runtime"
)

// The sources of the lines of an app's log. What its instances print is the
// driver's to keep; the others are kept here, in the same form.
const (
	sourceApp      = "app"
	sourceBuild    = "build"
	sourceRouter   = "router"
	sourcePlatform = "m3o"
)

var ourSources = []string{sourceBuild, sourceRouter, sourcePlatform}

// appLogs keeps what builds, the router and the platform say of each app.
type appLogs struct {
	files runtime.Logs
	log   *slog.Logger

	mu   sync.Mutex // guards open
	open map[string]*runtime.LogWriter
}

// maxOpenLogs bounds the files held open; the next line opens one again.
const maxOpenLogs = 200

func newAppLogs(dir string, log *slog.Logger) *appLogs {
	return &appLogs{files: runtime.Logs{Dir: dir}, log: log, open: map[string]*runtime.LogWriter{}}
}

// print adds a line. One that cannot be written is lost.
func (l *appLogs) print(app, source string, stream byte, text string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	key := app + "/" + source
	w := l.open[key]
	if w == nil {
		if len(l.open) >= maxOpenLogs {
			l.closeAll()
		}
		path, err := l.files.Path(runtime.Ref{App: app, Process: source}, source)
		if err == nil {
			w, err = runtime.NewLogWriter(path)
		}
		if err != nil {
			l.log.Warn("cannot write an app's log", "app", app, "err", err)
			return
		}
		l.open[key] = w
	}
	w.Print(stream, text)
}

// closeAll closes the files. The caller holds mu.
func (l *appLogs) closeAll() {
	for _, w := range l.open {
		_ = w.Close()
	}
	clear(l.open)
}

// remove removes all there is of an app.
func (l *appLogs) remove(app string) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	for key, w := range l.open {
		if strings.HasPrefix(key, app+"/") {
			_ = w.Close()
			delete(l.open, key)
		}
	}
	return os.RemoveAll(filepath.Join(l.files.Dir, app))
}

// lines is a writer of whole and half lines into an app's log.
func (l *appLogs) lines(app, source string) *lineLog { return &lineLog{l: l, app: app, source: source} }

type lineLog struct {
	l           *appLogs
	app, source string

	mu   sync.Mutex // guards rest
	rest []byte
}

func (w *lineLog) Write(p []byte) (int, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.rest = append(w.rest, p...)
	for {
		line, rest, ok := bytes.Cut(w.rest, []byte("\n"))
		if !ok {
			if len(w.rest) < runtime.MaxLine {
				return len(p), nil
			}
			line, rest = w.rest, nil
		}
		if text := strings.TrimRight(string(line), "\r "); text != "" {
			w.l.print(w.app, w.source, 'o', text)
		}
		w.rest = append(w.rest[:0], rest...)
		if !ok {
			return len(p), nil
		}
	}
}

// tell adds a line of the platform to an app's log.
func (d *Daemon) tell(app, format string, args ...any) {
	d.logs.print(app, sourcePlatform, 'o', fmt.Sprintf(format, args...))
}

// warn is tell for what went wrong.
func (d *Daemon) warn(app, format string, args ...any) {
	d.logs.print(app, sourcePlatform, 'e', fmt.Sprintf(format, args...))
}

// tellDeploy tells of a deploy's beginning and end.
func (d *Daemon) tellDeploy(dep release.Deploy) {
	why := dep.Reason
	if dep.User != "" {
		why += " by " + dep.User
	}
	name := m3o.Release{Version: dep.Release}.Name()
	switch {
	case dep.Status == release.Building:
		d.tell(dep.App, "build %d of %.7s begins: %s", dep.Build, dep.Source.Commit, why)
	case dep.Status == release.Live && dep.Previous != 0:
		d.tell(dep.App, "%s is live in place of v%d: %s", name, dep.Previous, why)
	case dep.Status == release.Live:
		d.tell(dep.App, "%s is live: %s", name, why)
	case dep.Status == release.Failed && dep.Release != 0:
		d.warn(dep.App, "%s was not released (%s): %s", name, why, dep.Error)
	case dep.Status == release.Failed:
		d.warn(dep.App, "deploy failed (%s): %s", why, dep.Error)
	}
}

// tellInstance tells of what an instance has become.
func (d *Daemon) tellInstance(old, in m3o.Instance) {
	name := in.Process + "." + in.ID
	if isRun(in.Process) {
		name = in.Process
	}
	switch {
	case in.Phase == old.Phase:
	case in.Phase == m3o.Starting && in.Restarts > 0:
		d.tell(in.App, "%s starts again (restart %d)", name, in.Restarts)
	case in.Phase == m3o.Starting:
		d.tell(in.App, "%s of v%d starts", name, in.Release)
	case in.Phase == m3o.Ready:
		d.tell(in.App, "%s is ready", name)
	case in.Phase == m3o.Unhealthy:
		d.warn(in.App, "%s is unhealthy and gets no requests", name)
	case in.Phase == m3o.Draining && !isRun(in.Process):
		d.tell(in.App, "%s is told to end", name)
	case in.Phase == m3o.Exited && isRun(in.Process) && in.Exit == -1:
		d.warn(in.App, "%s was lost: nobody knows how it ended", name)
	case in.Phase == m3o.Exited && old.Phase == m3o.Draining:
		d.tell(in.App, "%s has ended with code %d", name, in.Exit)
	case in.Phase == m3o.Exited && in.OOM:
		d.warn(in.App, "%s crashed: it ran out of memory", name)
	case in.Phase == m3o.Exited:
		d.warn(in.App, "%s crashed with code %d", name, in.Exit)
	}
}

// accessLog writes a line for each request, as many as the router sends: it
// drops those beyond the configured rate, and what we are too slow for.
func (d *Daemon) accessLog(ctx context.Context) error {
	if d.cfg.AccessLog < 0 {
		<-ctx.Done()
		return nil
	}
	for ctx.Err() == nil {
		dropped := int64(0)
		for r, err := range d.router.FollowAtMost(ctx, "", d.cfg.AccessLog) {
			if err != nil {
				d.log.Debug("the router's records broke off", "err", err)
				break
			}
			if r.App == "" || r.App == apiApp {
				continue
			}
			if r.Dropped > dropped {
				d.logs.print(r.App, sourceRouter, 'e', fmt.Sprintf("%s, of all apps, got no line here: there were too many at once", count(int(r.Dropped-dropped), "request")))
				dropped = r.Dropped
			}
			d.logs.print(r.App, sourceRouter, 'o', accessLine(r.Record, d.routes.instanceAt(r.App, r.Endpoint)))
		}
		select {
		case <-ctx.Done():
		case <-time.After(time.Second): // another router is on its way
		}
	}
	return nil
}

// apiApp is whose requests the platform's own API are.
const apiApp = "api"

// accessLine is one request in the form of logfmt.
func accessLine(r router.Record, instance string) string {
	var b strings.Builder
	add := func(key, value string) {
		if value == "" {
			return
		}
		if b.Len() > 0 {
			b.WriteByte(' ')
		}
		if strings.ContainsAny(value, " \"=\\\n\t") || !strconv.CanBackquote(value) {
			value = strconv.Quote(value)
		}
		b.WriteString(key + "=" + value)
	}
	add("method", r.Method)
	add("path", r.Path)
	add("host", r.Host)
	add("status", strconv.Itoa(r.Status))
	if r.RPC != "" {
		add("rpc", r.RPC)
		add("code", strconv.Itoa(r.Code))
	}
	add("took", r.Took.Round(time.Microsecond).String())
	add("bytes", strconv.FormatInt(r.Out, 10))
	add("protocol", r.Protocol)
	add("release", m3o.Release{Version: r.Release}.Name())
	add("instance", instance)
	add("remote", r.Remote)
	add("caller", r.Caller)
	add("id", r.ID)
	if r.Broken {
		add("broken", "true")
	}
	add("err", r.Err)
	return b.String()
}

// instanceAt is the ID of an app's instance by its address, "" when it is not known.
func (r *routes) instanceAt(app, endpoint string) string {
	r.mu.Lock()
	defer r.mu.Unlock()
	for id := range r.byApp[app] {
		if r.instances[id].Addr == endpoint && endpoint != "" {
			return id
		}
	}
	return ""
}

func (d *Daemon) keepLogs() runtime.Retention {
	return runtime.Retention{Age: d.cfg.LogAge, Bytes: int64(d.cfg.LogSize) << 20}
}

// upkeep removes what is kept no longer, and rotates the router's own log.
func (d *Daemon) upkeep(ctx context.Context) error {
	t := time.NewTicker(time.Minute)
	defer t.Stop()
	for n := 0; ; n++ {
		if n%60 == 59 { // what was built and never released is young until then
			d.prune(ctx)
		}
		if err := d.logs.files.Trim(d.keepLogs(), func(string) bool { return true }); err != nil {
			d.log.Warn("cannot remove old logs", "err", err)
		}
		if err := trimBuildLogs(d.cfg.path("builds"), d.cfg.LogAge); err != nil {
			d.log.Warn("cannot remove old build logs", "err", err)
		}
		if err := rotateOpen(d.cfg.path("router", "router.log"), runtime.LogBytes); err != nil {
			d.log.Warn("cannot rotate the router's log", "err", err)
		}
		select {
		case <-ctx.Done():
			return nil
		case <-t.C:
		}
	}
}

// keptBuildLogs is how many logs of an app's builds stay whatever their age.
const keptBuildLogs = 20

func trimBuildLogs(dir string, age time.Duration) error {
	apps, err := filepath.Glob(filepath.Join(dir, "*"))
	if err != nil {
		return err
	}
	for _, app := range apps {
		logs, err := filepath.Glob(filepath.Join(app, "*.log"))
		if err != nil {
			return err
		}
		type file struct {
			path string
			at   time.Time
		}
		var all []file
		for _, p := range logs {
			if fi, err := os.Stat(p); err == nil {
				all = append(all, file{p, fi.ModTime()})
			}
		}
		slices.SortFunc(all, func(a, b file) int { return b.at.Compare(a.at) })
		for _, f := range all[min(keptBuildLogs, len(all)):] {
			if time.Since(f.at) > age {
				if err := os.Remove(f.path); err != nil && !os.IsNotExist(err) {
					return fmt.Errorf("remove build log: %w", err)
				}
			}
		}
	}
	return nil
}

// rotateOpen copies a log that another process has open for appending, and
// empties it. A line written in between is lost, which a rename would not do;
// but that process would go on writing to the renamed file.
func rotateOpen(path string, limit int64) error {
	fi, err := os.Stat(path)
	if err != nil || fi.Size() < limit {
		return nil //nolint:nilerr // there is none yet
	}
	b, err := os.ReadFile(path)
	if err != nil {
		return fmt.Errorf("rotate: %w", err)
	}
	if err := os.WriteFile(path+".1", b, 0o600); err != nil {
		return fmt.Errorf("rotate: %w", err)
	}
	return os.Truncate(path, 0)
}

// A logQuery selects lines of an app's log.
type logQuery struct {
	app, source, process, instance string
	lines                          int
	since, until                   time.Time
	follow                         bool
}

// A logLine is a line of any source.
type logLine struct {
	runtime.Line
	source string
}

func (q logQuery) match(l logLine) bool {
	return (q.instance == "" || q.instance == l.Instance) && !l.Time.Before(q.since) && (q.until.IsZero() || l.Time.Before(q.until))
}

// sources are where the lines that q selects can be.
func (q logQuery) sources() []string {
	switch {
	case q.source != "":
		return []string{q.source}
	case q.process != "" || q.instance != "":
		return []string{sourceApp}
	}
	return append([]string{sourceApp}, ourSources...)
}

// read yields the lines of one source.
func (d *Daemon) readLog(ctx context.Context, q logQuery, source string, lines int, follow bool) iter.Seq2[logLine, error] {
	from := d.logs.files.Read
	ref := runtime.Ref{App: q.app, Process: source}
	if source == sourceApp {
		from, ref.Process = d.driver.Logs, q.process
	}
	return func(yield func(logLine, error) bool) {
		for l, err := range from(ctx, ref, lines, follow) {
			ll := logLine{l, source}
			if source != sourceApp {
				ll.Process, ll.Instance = "", "" // they are where it is kept, not whose it is
			}
			if err == nil && !q.match(ll) {
				continue
			}
			if !yield(ll, err) {
				return
			}
		}
	}
}

// maxLogLines bounds an answer.
const maxLogLines = 100_000

// settleLines is how long lines of different sources are gathered, so that
// they come in the order of their times.
const settleLines = 100 * time.Millisecond

// appLog yields the lines that q selects, oldest first, and with follow those
// to come until ctx ends.
func (d *Daemon) appLog(ctx context.Context, q logQuery) iter.Seq2[logLine, error] {
	n := cmp.Or(q.lines, 100)
	scan := n
	if !q.since.IsZero() || !q.until.IsZero() || q.instance != "" {
		scan = maxLogLines // what is left out is not known before it is read
		if q.lines == 0 && !q.since.IsZero() {
			n = maxLogLines
		}
	}
	return func(yield func(logLine, error) bool) {
		if !q.follow {
			var all []logLine
			for _, source := range q.sources() {
				for l, err := range d.readLog(ctx, q, source, scan, false) {
					if err != nil {
						yield(l, err)
						return
					}
					all = append(all, l)
				}
			}
			flushLines(all, n, yield)
			return
		}
		d.followLog(ctx, q, n, scan, yield)
	}
}

// flushLines yields the last n lines in order.
func flushLines(all []logLine, n int, yield func(logLine, error) bool) bool {
	slices.SortStableFunc(all, func(a, b logLine) int { return a.Time.Compare(b.Time) })
	for _, l := range all[max(0, len(all)-n):] {
		if !yield(l, nil) {
			return false
		}
	}
	return true
}

func (d *Daemon) followLog(ctx context.Context, q logQuery, n, scan int, yield func(logLine, error) bool) {
	ctx, cancel := context.WithCancel(ctx)
	var readers sync.WaitGroup
	defer readers.Wait()
	defer cancel()
	type result struct {
		line logLine
		err  error
	}
	c := make(chan result, 256)
	for _, source := range q.sources() {
		readers.Go(func() {
			for l, err := range d.readLog(ctx, q, source, scan, true) {
				select {
				case c <- result{l, err}:
				case <-ctx.Done():
					return
				}
			}
		})
	}
	began := time.Now()
	first := true
	var gathered []logLine
	var flush <-chan time.Time
	for {
		select {
		case <-ctx.Done():
			return
		case r := <-c:
			if r.err != nil {
				yield(r.line, r.err)
				return
			}
			if gathered = append(gathered, r.line); flush == nil {
				flush = time.After(settleLines)
			}
			if len(gathered) < maxLogLines {
				continue
			}
		case <-flush:
		}
		keep := len(gathered)
		if first { // of what was there before each source gave its last n
			old := 0
			for _, l := range gathered {
				if l.Time.Before(began) {
					old++
				}
			}
			keep -= max(0, old-n)
		}
		if !flushLines(gathered, keep, yield) {
			return
		}
		gathered, flush, first = gathered[:0], nil, false
	}
}
