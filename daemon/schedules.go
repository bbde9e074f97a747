package daemon

import (
	"bytes"
	"cmp"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/m3o/m3o"
	"github.com/m3o/m3o/events/cron"
	"github.com/m3o/m3o/store"
)

// What a schedule does.
const (
	doRebuild = "rebuild"
	doRun     = "run"
	doCall    = "call"
)

// A schedule is one row of an app's timetable, as stored.
type schedule struct {
	App, Name  string
	Cron, Zone string
	Action     string
	Args       []string
	IfOutdated bool
	Overlap    cron.Overlap
	Missed     cron.Missed
	Jitter     time.Duration
	Paused     bool
	User       string    // who added it
	Declared   bool      // by the app's own files: it follows the release
	Created    time.Time // UTC
	Decided    time.Time // firings up to here have been dealt with
	Runs       int       // the number of the newest run
}

func (s schedule) key() string { return s.App + "/" + s.Name }

// The statuses of a run of a schedule.
const (
	runRunning  = "running"
	runOK       = "ok"
	runFailed   = "failed"
	runSkipped  = "skipped"
	runMissed   = "missed"
	runReplaced = "replaced"
	runLost     = "lost" // the daemon ended meanwhile
)

// A scheduleRun is what came of one firing, as stored.
type scheduleRun struct {
	App, Schedule string
	Number        int
	At            time.Time
	Started       time.Time
	Ended         time.Time // zero while it runs
	Status        string
	Detail        string
	Output        string
	Late          bool
	Missed        int
	By            string
	Release       int
}

const (
	maxSchedules = 100     // of an app
	keepRuns     = 50      // of a schedule
	keepOutput   = 8 << 10 // of a run: the end of it
	maxJitter    = time.Hour
	// A rebuild costs far more than a command, and nobody can tell two of them
	// in ten minutes apart.
	shortestRebuild = 10 * time.Minute
	runLimit        = time.Hour        // of a scheduled command
	callLimit       = 10 * time.Minute // of a scheduled call
)

// schedules is the timetable of all apps: the table and the work of the
// runner that starts what is due.
type schedules struct {
	d      *Daemon
	table  *store.Bucket[schedule]    // by app/name
	runs   *store.Bucket[scheduleRun] // by app/name/number
	runner *cron.Runner

	mu sync.Mutex        // guards by
	by map[string]string // who asked for the manual run of a schedule that begins next
}

var (
	_ cron.Table = (*schedules)(nil)
	_ cron.Work  = (*schedules)(nil)
)

func openSchedules(ctx context.Context, d *Daemon) (*schedules, error) {
	s := &schedules{d: d, by: map[string]string{}}
	var err error
	if s.table, err = store.NewBucket[schedule](ctx, d.store, "schedules"); err != nil {
		return nil, err
	}
	if s.runs, err = store.NewBucket[scheduleRun](ctx, d.store, "schedule-runs"); err != nil {
		return nil, err
	}
	s.runner = cron.New(s, s, d.log)
	return s, nil
}

// run starts what is due until ctx ends. What a crash cut off is marked first.
func (s *schedules) run(ctx context.Context) error {
	if err := s.settle(ctx); err != nil {
		return fmt.Errorf("settle schedules: %w", err)
	}
	return s.runner.Run(ctx)
}

// settle marks runs that were going on when the daemon ended. They are not
// repeated: nobody knows how far they came.
func (s *schedules) settle(ctx context.Context) error {
	all, err := s.runs.List(ctx, "")
	if err != nil {
		return err
	}
	for _, e := range all {
		if e.Value.Status != runRunning {
			continue
		}
		r := e.Value
		r.Status, r.Detail, r.Ended = runLost, "m3o stopped while it ran", time.Now().UTC()
		if _, err := s.runs.Update(ctx, e.Key, r, e.Rev); err != nil && m3o.KindOf(err) != m3o.Conflict {
			return err
		}
	}
	return nil
}

// Jobs is the table as the runner reads it.
func (s *schedules) Jobs(ctx context.Context) ([]cron.Job, error) {
	all, err := s.table.List(ctx, "")
	if err != nil {
		return nil, err
	}
	jobs := make([]cron.Job, 0, len(all))
	for _, e := range all {
		j, err := e.Value.job()
		if err != nil {
			s.d.log.Error("schedule cannot be read", "app", e.Value.App, "err", err)
			continue
		}
		jobs = append(jobs, j)
	}
	return jobs, nil
}

func (s schedule) job() (cron.Job, error) {
	spec, err := cron.Parse(s.Cron, s.Zone)
	if err != nil {
		return cron.Job{}, err
	}
	return cron.Job{ID: s.key(), Spec: spec, Jitter: s.Jitter, Overlap: s.Overlap, Missed: s.Missed, Paused: s.Paused, Decided: s.Decided}, nil
}

// Claim writes that firings have been dealt with, if nobody did before.
func (s *schedules) Claim(ctx context.Context, j cron.Job, due cron.Due) (bool, error) {
	rec, rev, err := s.table.Get(ctx, j.ID)
	if m3o.KindOf(err) == m3o.NotFound {
		return false, nil
	} else if err != nil {
		return false, err
	}
	if rec.Paused || !rec.Decided.Equal(j.Decided) {
		return false, nil
	}
	rec.Decided = due.Upto.UTC()
	if _, err := s.table.Update(ctx, j.ID, rec, rev); m3o.KindOf(err) == m3o.Conflict {
		return false, nil
	} else if err != nil {
		return false, err
	}
	return true, nil
}

// change edits one schedule; f may be called more than once.
func (s *schedules) change(ctx context.Context, app, name string, f func(*schedule) error) (schedule, error) {
	for {
		rec, rev, err := s.get(ctx, app, name)
		if err != nil {
			return rec, err
		}
		if err := f(&rec); err != nil {
			return rec, err
		}
		_, err = s.table.Update(ctx, rec.key(), rec, rev)
		if m3o.KindOf(err) == m3o.Conflict {
			continue
		}
		s.runner.Wake()
		return rec, err
	}
}

func (s *schedules) get(ctx context.Context, app, name string) (schedule, store.Rev, error) {
	rec, rev, err := s.table.Get(ctx, app+"/"+name)
	if m3o.KindOf(err) == m3o.NotFound || name == "" {
		err = &m3o.Error{Kind: m3o.NotFound, Msg: fmt.Sprintf("%s has no schedule %q", app, name), Hint: "m3o schedules -a " + app, Err: err}
	}
	return rec, rev, err
}

// list is the schedules of app by name.
func (s *schedules) list(ctx context.Context, app string) ([]schedule, error) {
	all, err := s.table.List(ctx, app+"/")
	if err != nil {
		return nil, err
	}
	out := make([]schedule, len(all))
	for i, e := range all {
		out[i] = e.Value
	}
	return out, nil
}

// checkSchedule completes a schedule with defaults and says what is wrong with it.
func checkSchedule(rec schedule) (schedule, error) {
	bad := func(hint, format string, args ...any) (schedule, error) {
		return rec, &m3o.Error{Kind: m3o.Invalid, Msg: fmt.Sprintf(format, args...), Hint: hint}
	}
	spec, err := cron.Parse(rec.Cron, rec.Zone)
	if err != nil {
		return rec, err
	}
	rec.Cron, rec.Zone = spec.Line, spec.Zone
	rec.Overlap, rec.Missed = cmp.Or(rec.Overlap, cron.Skip), cmp.Or(rec.Missed, cron.Once)
	shortest := spec.Shortest()
	const usage = "m3o schedule:add --cron \"0 4 * * *\" rebuild | run COMMAND | call Service/Method"
	switch {
	case !nameLike(rec.Name):
		return bad("use 1 to 40 of a-z, 0-9 and single hyphens", "schedule name %q is none", rec.Name)
	case !slices.Contains([]cron.Overlap{cron.Skip, cron.Queue, cron.Replace}, rec.Overlap):
		return bad("it is skip, queue or replace", "overlap policy %q is none", rec.Overlap)
	case !slices.Contains([]cron.Missed{cron.Once, cron.Never}, rec.Missed):
		return bad("it is once or skip", "policy for missed runs %q is none", rec.Missed)
	case rec.Jitter < 0 || rec.Jitter > maxJitter:
		return bad("--jitter 5m", "a jitter is up to %s", maxJitter)
	case rec.Jitter > shortest:
		return bad("choose a jitter below "+shortest.String(), "the jitter %s is longer than the shortest pause between two runs, %s", rec.Jitter, shortest)
	case rec.IfOutdated && rec.Action != doRebuild:
		return bad(usage, "only a rebuild can be for what is outdated")
	}
	size := 0
	for _, a := range rec.Args {
		size += len(a)
		if strings.ContainsRune(a, 0) {
			return bad(usage, "an argument has a NUL in it")
		}
	}
	if size > 64<<10 {
		return bad("", "the arguments are %d bytes; the limit is 64 KB", size)
	}
	switch rec.Action {
	case doRebuild:
		switch {
		case len(rec.Args) > 0:
			return bad(usage, "rebuild takes no argument, not %q", rec.Args[0])
		case shortest < shortestRebuild:
			return bad("m3o schedule:add --cron \"0 4 * * *\" rebuild", "a rebuild every %s is more than the %s there must be between two", shortest, shortestRebuild)
		}
	case doRun:
		if len(rec.Args) == 0 || rec.Args[0] == "" {
			return bad(usage, "there is no command to run")
		}
	case doCall:
		switch {
		case len(rec.Args) == 0:
			return bad(usage, "there is no method to call")
		case len(rec.Args) > 2:
			return bad("m3o schedule:add --cron \"0 4 * * *\" call Service/Method '{\"name\":\"Ada\"}'", "call takes a method and one JSON message, not %d arguments", len(rec.Args))
		}
		if _, _, err := callParts(rec.Args); err != nil {
			return rec, err
		}
	default:
		return bad(usage, "%q is nothing a schedule does", rec.Action)
	}
	return rec, nil
}

// nameLike is for names of schedules and the like, which are words of commands.
func nameLike(s string) bool {
	return s != "" && len(s) <= 40 && s[0] != '-' && !strings.HasSuffix(s, "-") && !strings.Contains(s, "--") &&
		strings.Trim(s, "abcdefghijklmnopqrstuvwxyz0123456789-") == ""
}

// add makes a schedule. Its name is made from what it does unless it has one.
func (s *schedules) add(ctx context.Context, rec schedule) (schedule, error) {
	named := rec.Name != ""
	if !named {
		rec.Name = rec.Action
		if rec.Action != doRebuild && len(rec.Args) > 0 {
			rec.Name = nameFrom(rec.Args[0])
		}
	}
	rec, err := checkSchedule(rec)
	if err != nil {
		return rec, err
	}
	have, err := s.list(ctx, rec.App)
	if err != nil {
		return rec, err
	}
	if len(have) >= maxSchedules {
		return rec, &m3o.Error{Kind: m3o.Conflict, Msg: fmt.Sprintf("%s has %d schedules already, which is the limit", rec.App, len(have)),
			Hint: "m3o schedule:remove NAME -a " + rec.App}
	}
	rec.Created = time.Now().UTC()
	rec.Decided = rec.Created
	base := rec.Name
	for n := 2; ; n++ {
		_, err := s.table.Create(ctx, rec.key(), rec)
		if m3o.KindOf(err) != m3o.Conflict {
			s.runner.Wake()
			return rec, err
		}
		if named {
			return rec, &m3o.Error{Kind: m3o.Conflict, Msg: fmt.Sprintf("%s has a schedule called %s already", rec.App, rec.Name),
				Hint: "choose another name, or m3o schedule:remove " + rec.Name, Err: err}
		}
		rec.Name = fmt.Sprintf("%s-%d", base, n)
	}
}

// nameFrom makes a name from a command or a method.
func nameFrom(s string) string {
	s = s[strings.LastIndexByte(s, '/')+1:]
	var b strings.Builder
	for _, c := range strings.ToLower(s) {
		switch {
		case b.Len() >= 30:
		case c >= 'a' && c <= 'z' || c >= '0' && c <= '9':
			b.WriteRune(c)
		case b.Len() > 0 && !strings.HasSuffix(b.String(), "-"):
			b.WriteByte('-')
		}
	}
	if name := strings.Trim(b.String(), "-"); name != "" {
		return name
	}
	return "run"
}

// remove takes a schedule with its history away and stops a run that goes on.
func (s *schedules) remove(ctx context.Context, app, name string) error {
	rec, _, err := s.get(ctx, app, name)
	if err != nil {
		return err
	}
	if err := s.table.Delete(ctx, rec.key(), 0); err != nil {
		return err
	}
	s.runner.Cancel(rec.key())
	old, err := s.runs.List(ctx, rec.key()+"/")
	for _, e := range old {
		err = errors.Join(err, s.runs.Delete(ctx, e.Key, 0))
	}
	return err
}

// removeApp removes all schedules of an app that is destroyed.
func (s *schedules) removeApp(ctx context.Context, app string) error {
	have, err := s.list(ctx, app)
	for _, rec := range have {
		err = errors.Join(err, s.remove(ctx, app, rec.Name))
	}
	return err
}

// trigger runs a schedule now.
func (s *schedules) trigger(ctx context.Context, app, name, user string) error {
	rec, _, err := s.get(ctx, app, name)
	if err != nil {
		return err
	}
	j, err := rec.job()
	if err != nil {
		return err
	}
	s.mu.Lock()
	s.by[rec.key()] = user
	s.mu.Unlock()
	if !s.runner.Trigger(j) {
		return &m3o.Error{Kind: m3o.Unavailable, Msg: "schedules do not run at the moment", Hint: "try again in a few seconds"}
	}
	return nil
}

// open records the beginning of a run.
func (s *schedules) open(ctx context.Context, r cron.Run) (schedule, scheduleRun, error) {
	app, name, _ := strings.Cut(r.Job, "/")
	rec, err := s.change(ctx, app, name, func(rec *schedule) error { rec.Runs++; return nil })
	if err != nil {
		return rec, scheduleRun{}, err
	}
	run := scheduleRun{App: app, Schedule: name, Number: rec.Runs, At: r.At.UTC(), Started: time.Now().UTC(), Status: runRunning, Late: r.Late, Missed: r.Missed}
	if r.Manual {
		s.mu.Lock()
		run.By = s.by[r.Job]
		s.mu.Unlock()
	}
	_, err = s.runs.Put(ctx, run.key(), run)
	return rec, run, err
}

func (r scheduleRun) key() string { return fmt.Sprintf("%s/%s/%010d", r.App, r.Schedule, r.Number) }

// close records the end of a run and forgets the oldest ones.
func (s *schedules) close(ctx context.Context, run scheduleRun) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), 10*time.Second)
	defer cancel()
	run.Ended = time.Now().UTC()
	run.Detail, run.Output = clip(strings.ToValidUTF8(run.Detail, "?"), 500), strings.ToValidUTF8(run.Output, "?")
	if _, _, err := s.table.Get(ctx, run.App+"/"+run.Schedule); m3o.KindOf(err) == m3o.NotFound {
		return // removed meanwhile, and its history with it
	}
	if _, err := s.runs.Put(ctx, run.key(), run); err != nil {
		s.d.log.Error("record the end of a scheduled run", "app", run.App, "err", err)
		return
	}
	if run.Number > keepRuns {
		old := run
		old.Number -= keepRuns
		if err := s.runs.Delete(ctx, old.key(), 0); err != nil {
			s.d.log.Error("forget an old scheduled run", "app", run.App, "err", err)
		}
	}
}

func clip(s string, n int) string {
	if len(s) > n {
		return strings.ToValidUTF8(s[:n], "") + "…"
	}
	return s
}

// Skip records a run that is left out.
func (s *schedules) Skip(ctx context.Context, r cron.Run, why string) {
	_, run, err := s.open(ctx, r)
	if err != nil {
		s.d.log.Error("record a scheduled run that is left out", "err", err)
		return
	}
	run.Status, run.Detail = runSkipped, why
	if why == cron.WhyMissed {
		run.Status = runMissed
	}
	s.close(ctx, run)
}

// Do does one run.
func (s *schedules) Do(ctx context.Context, r cron.Run) {
	rec, run, err := s.open(ctx, r)
	if err != nil {
		if m3o.KindOf(err) != m3o.NotFound { // removed meanwhile
			s.d.log.Error("record a scheduled run", "err", err)
		}
		return
	}
	out := &lastBytes{max: keepOutput}
	run.Status = runOK
	switch rec.Action {
	case doRebuild:
		run.Detail, run.Release, err = s.d.scheduledRebuild(ctx, rec, out)
	case doRun:
		run.Detail, err = s.d.scheduledCommand(ctx, rec, out)
	case doCall:
		run.Detail, err = s.d.scheduledCall(ctx, rec, out)
	}
	run.Output = out.String()
	if err != nil {
		run.Status, run.Detail = runFailed, userMessage(err)
		if h := m3o.HintOf(err); h != "" {
			run.Detail += " (" + h + ")"
		}
		switch cause := context.Cause(ctx); {
		case errors.Is(cause, cron.ErrReplaced):
			run.Status, run.Detail = runReplaced, "a newer run took its place"
		case cause != nil:
			run.Status, run.Detail = runLost, "m3o stopped while it ran"
		default:
			s.d.log.Info("scheduled run failed", "app", rec.App, "err", err)
		}
	}
	s.close(ctx, run)
}

// history is the newest runs of one schedule or of all of an app, newest first.
func (s *schedules) history(ctx context.Context, app, name string, limit int) ([]scheduleRun, error) {
	prefix := app + "/"
	if name != "" {
		if _, _, err := s.get(ctx, app, name); err != nil {
			return nil, err
		}
		prefix += name + "/"
	}
	all, err := s.runs.List(ctx, prefix)
	if err != nil {
		return nil, err
	}
	out := make([]scheduleRun, len(all))
	for i, e := range all {
		out[i] = e.Value
	}
	slices.SortFunc(out, func(a, b scheduleRun) int {
		return cmp.Or(b.Started.Compare(a.Started), cmp.Compare(a.Schedule, b.Schedule), cmp.Compare(b.Number, a.Number))
	})
	return out[:min(limit, len(out))], nil
}

// lastBytes keeps the end of what is written to it. It is safe for concurrent use.
type lastBytes struct {
	max int
	mu  sync.Mutex // guards what follows
	buf []byte
	cut bool
}

func (l *lastBytes) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.buf = append(l.buf, p...)
	if over := len(l.buf) - l.max; over > 0 {
		l.buf = append(l.buf[:0], l.buf[over:]...)
		l.cut = true
	}
	return len(p), nil
}

func (l *lastBytes) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	b := l.buf
	if l.cut { // from the first whole line on
		if i := bytes.IndexByte(b, '\n'); i >= 0 {
			b = b[i+1:]
		}
		return "…\n" + string(b)
	}
	return string(b)
}

// randomID is a short name that is not guessed at: 8 of a-z and 2-7.
func randomID() string { return strings.ToLower(rand.Text()[:8]) }

// repoDir is where an app's repository is, if it has one.
func (d *Daemon) repoDir(app string) (string, bool) {
	dir := d.cfg.path("repos", app+".git")
	st, err := os.Stat(dir)
	return dir, err == nil && st.IsDir()
}
