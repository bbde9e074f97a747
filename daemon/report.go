package daemon

import (
	"context"
	"crypto/hmac"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"strings"
	"sync"
	"time"

	"github.com/m3o/m3o"
	"github.com/m3o/m3o/store"
	"github.com/m3o/m3o/webhook/forge"
)

// A report is one thing to tell a forge. Of several about the same thing only
// the newest is told: a forge that was away need not hear of the past.
type report struct {
	App        string // whose connection
	Status     *forge.Status
	Deployment *forge.Deployment
	Commit     string
	Pull       int
	Text       string // of the comment
	Tries      int
	Made       time.Time
}

// maxReportAge is how long a report is tried: a day later nobody waits for it.
const maxReportAge = 24 * time.Hour

// A reporter tells the forges, one thing at a time for each app. What is to
// be told is on disk, so that a deploy never waits for a forge.
type reporter struct {
	r    *repos
	todo *store.Bucket[report] // by app and what it is about
	ids  *store.Bucket[string] // what the forge calls it

	mu    sync.Mutex // guards what follows
	wake  map[string]chan struct{}
	spawn chan string
}

func openReporter(ctx context.Context, r *repos) (*reporter, error) {
	p := &reporter{r: r, wake: map[string]chan struct{}{}, spawn: make(chan string, 1000)}
	var err error
	if p.todo, err = store.NewBucket[report](ctx, r.d.store, "forge-reports"); err != nil {
		return nil, err
	}
	if p.ids, err = store.NewBucket[string](ctx, r.d.store, "forge-ids"); err != nil {
		return nil, err
	}
	return p, nil
}

func reportKey(app, kind, about string) string {
	sum := sha256.Sum256([]byte(about))
	return app + "/" + kind + "/" + hex.EncodeToString(sum[:12])
}

func (p *reporter) put(ctx context.Context, app, key string, rep report) {
	rep.App, rep.Made = app, time.Now().UTC()
	if _, err := p.todo.Put(ctx, key, rep); err != nil {
		p.r.d.log.Error("keep report to the forge", "app", app, "err", err)
		return
	}
	p.poke(app)
}

func (p *reporter) status(ctx context.Context, c *connection, commit string, s forge.Status) {
	if c.credential() == "none" || c.Token == nil && c.AppKey == nil {
		return // nobody may write there
	}
	p.put(ctx, c.App, reportKey(c.App, "1-status", commit+s.Context), report{Commit: commit, Status: &s})
}

func (p *reporter) deployment(ctx context.Context, c *connection, d forge.Deployment) {
	if c.Token == nil && c.AppKey == nil {
		return
	}
	p.put(ctx, c.App, reportKey(c.App, "2-deployment", d.Commit+d.Environment), report{Deployment: &d})
}

func (p *reporter) comment(ctx context.Context, c *connection, pull int, text string) {
	if c.Token == nil && c.AppKey == nil {
		return
	}
	p.put(ctx, c.App, reportKey(c.App, "3-comment", fmt.Sprint(pull)), report{Pull: pull, Text: text})
}

// poke wakes the worker of an app, and has one started where there is none.
func (p *reporter) poke(app string) {
	p.mu.Lock()
	w, ok := p.wake[app]
	if !ok {
		w = make(chan struct{}, 1)
		p.wake[app] = w
	}
	p.mu.Unlock()
	if !ok {
		p.spawn <- app
	}
	select {
	case w <- struct{}{}:
	default:
	}
}

func (p *reporter) run(ctx context.Context) {
	if left, err := p.todo.List(ctx, ""); err == nil {
		for _, e := range left {
			p.poke(e.Value.App)
		}
	}
	var wg sync.WaitGroup
	defer wg.Wait()
	for {
		select {
		case <-ctx.Done():
			return
		case app := <-p.spawn:
			wg.Go(func() { p.serve(ctx, app) })
		}
	}
}

// serve tells the forge of one app whatever there is, until ctx ends.
func (p *reporter) serve(ctx context.Context, app string) {
	p.mu.Lock()
	wake := p.wake[app]
	p.mu.Unlock()
	var again <-chan time.Time
	for {
		select {
		case <-ctx.Done():
			return
		case <-wake:
		case <-again:
		}
		again = nil
		if wait := p.tellAll(ctx, app); wait > 0 {
			again = time.After(wait)
		}
	}
}

// tellAll returns when to try again, 0 when all is told.
func (p *reporter) tellAll(ctx context.Context, app string) time.Duration {
	list, err := p.todo.List(ctx, app+"/")
	if err != nil {
		return time.Minute
	}
	var wait time.Duration
	for _, e := range list {
		err := p.tell(ctx, e.Key, e.Value)
		if ctx.Err() != nil {
			return 0
		}
		kind := m3o.KindOf(err)
		passing := err != nil && (kind == m3o.Unavailable || kind == m3o.Internal)
		if passing && time.Since(e.Value.Made) < maxReportAge {
			rep := e.Value
			rep.Tries++
			if _, uerr := p.todo.Update(ctx, e.Key, rep, e.Rev); uerr != nil && m3o.KindOf(uerr) != m3o.Conflict {
				p.r.d.log.Error("keep report to the forge", "app", app, "err", uerr)
			}
			p.r.d.log.Debug("report to the forge is tried again", "app", app, "err", errors.Join(err, errors.Unwrap(err)))
			pause := max(forge.RetryAfter(err, time.Now()), min(time.Second<<min(rep.Tries, 9), 5*time.Minute))
			if wait = max(wait, pause); forge.RetryAfter(err, time.Now()) > 0 {
				return wait // nothing else is welcome either
			}
			continue
		}
		if err != nil {
			p.r.d.log.Warn("the forge was not told", "app", app, "err", errors.Join(err, errors.Unwrap(err)))
			if kind == m3o.Denied {
				p.r.problem(ctx, app, "the forge is not told how deploys go: "+problemWords(err))
			}
		}
		// A newer report of the same thing stays.
		if derr := p.todo.Delete(ctx, e.Key, e.Rev); derr != nil && m3o.KindOf(derr) != m3o.Conflict {
			p.r.d.log.Error("forget report to the forge", "app", app, "err", derr)
		}
	}
	return wait
}

func (p *reporter) tell(ctx context.Context, key string, rep report) error {
	c, err := p.r.of(ctx, rep.App)
	if err != nil {
		return err
	}
	f, err := p.r.forge(&c)
	if err != nil {
		return err
	}
	if rep.Status != nil {
		return f.Status(ctx, rep.Commit, *rep.Status)
	}
	id, _, err := p.ids.Get(ctx, key)
	if err != nil && m3o.KindOf(err) != m3o.NotFound {
		return err
	}
	was := id
	if rep.Deployment != nil {
		id, err = f.Deployment(ctx, id, *rep.Deployment)
	} else {
		id, err = f.Comment(ctx, rep.Pull, id, rep.Text)
	}
	if id != "" && id != was {
		if _, perr := p.ids.Put(ctx, key, id); perr != nil {
			return errors.Join(err, perr)
		}
	}
	return err
}

// forget drops all reports of an app.
func (p *reporter) forget(ctx context.Context, app string) error {
	list, err := p.todo.List(ctx, app+"/")
	if err != nil {
		return err
	}
	for _, e := range list {
		if err := p.todo.Delete(ctx, e.Key, 0); err != nil {
			return err
		}
	}
	ids, err := p.ids.List(ctx, app+"/")
	if err != nil {
		return err
	}
	for _, e := range ids {
		if err := p.ids.Delete(ctx, e.Key, 0); err != nil {
			return err
		}
	}
	return nil
}

// comment writes the one comment of a pull request anew.
func (r *repos) comment(ctx context.Context, c *connection, pull int, app, commit string, s forge.State, text, hint string) {
	var b strings.Builder
	icon := map[forge.State]string{forge.Pending: "⏳", forge.Success: "✅", forge.Failure: "❌"}[s]
	fmt.Fprintf(&b, "**m3o** preview of `%s`\n\n| | |\n| --- | --- |\n| State | %s %s |\n| Commit | %s |\n", c.App, icon, cell(text), commit)
	if s == forge.Success {
		fmt.Fprintf(&b, "| Preview | %s |\n", r.d.url(app))
	}
	fmt.Fprintf(&b, "| Build | [log](%s) |\n", r.logURL(app, commit))
	if hint != "" {
		fmt.Fprintf(&b, "\n%s\n", cell(hint))
	}
	if s == forge.Success {
		b.WriteString(r.apiChanges(ctx, c.App, app))
	}
	r.reports.comment(ctx, c, pull, b.String())
}

// cell makes text safe for a table and free of mentions.
func cell(s string) string {
	return strings.NewReplacer("|", "\\|", "\n", " ", "@", "@\u200b", "<", "&lt;").Replace(s)
}

// logURL is where the log of a commit's build can be read by who has the
// link, such as whoever sees the commit's status.
func (r *repos) logURL(app, commit string) string {
	return fmt.Sprintf("%s/hooks/log/%s/%s/%s", r.d.apiURL(), app, commit, r.logMAC(app, commit))
}

func (r *repos) logMAC(app, commit string) string {
	mac := hmac.New(sha256.New, r.logKey)
	_, _ = mac.Write([]byte(app + "\x00" + commit))
	return hex.EncodeToString(mac.Sum(nil)[:16])
}

// serveLog shows the log of the newest build of a commit.
func (r *repos) serveLog(w http.ResponseWriter, req *http.Request) {
	app, commit := req.PathValue("app"), req.PathValue("commit")
	w.Header().Set("Content-Type", "text/plain; charset=utf-8")
	w.Header().Set("X-Content-Type-Options", "nosniff")
	w.Header().Set("Referrer-Policy", "no-referrer")
	w.Header().Set("Cache-Control", "no-store")
	if !hmac.Equal([]byte(req.PathValue("mac")), []byte(r.logMAC(app, commit))) {
		http.Error(w, "there is no such log", http.StatusNotFound)
		return
	}
	builds, err := r.d.ledger.Builds(req.Context(), app, 200)
	if err != nil {
		http.Error(w, "the log cannot be read now", http.StatusServiceUnavailable)
		return
	}
	for _, b := range builds {
		if b.Commit != commit {
			continue
		}
		f, err := os.Open(r.d.buildLog(app, b.Number))
		if err != nil {
			break
		}
		defer f.Close() //nolint:errcheck // only read
		_, _ = io.Copy(w, f)
		if b.Status == m3o.BuildRunning {
			_, _ = io.WriteString(w, "\n… the build goes on; load this page again\n")
		}
		return
	}
	_, _ = io.WriteString(w, "No build of "+shortCommit(commit)+" is kept: it waits, was removed, or failed before the build.\n")
}
