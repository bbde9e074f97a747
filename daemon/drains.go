package daemon

import (
	"context"
	"crypto/rand"
	"crypto/x509"
	"fmt"
	"log/slog"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/m3o/m3o"
	"github.com/m3o/m3o/config"
	"github.com/m3o/m3o/internal/atomicfile"
	"github.com/m3o/m3o/runtime/drain"
	"github.com/m3o/m3o/store"
)

// A drainRecord is where else the lines of an app's log go. Its address may
// hold a password, so it is sealed.
type drainRecord struct {
	App, ID string
	Shown   string // the address without password and query
	URL     config.Sealed
	Created time.Time
}

func (r drainRecord) key() string { return r.App + "/" + r.ID }

// maxDrains bounds the drains of an app.
const maxDrains = 10

// drains sends the lines of apps' logs to their drains. One reader an app
// serves all of them, and none of them can make it wait.
type drains struct {
	d      *Daemon
	bucket *store.Bucket[drainRecord]
	dir    string // how far each drain has come
	log    *slog.Logger
	wake   chan struct{} // records have changed

	mu      sync.Mutex // guards running
	running map[string]*drainState
}

// A drainState is a drain that runs.
type drainState struct {
	drain *drain.Drain
	since time.Time // lines from before are not its
	stop  context.CancelFunc
	done  chan struct{}
}

func openDrains(ctx context.Context, d *Daemon) (*drains, error) {
	b, err := store.NewBucket[drainRecord](ctx, d.store, "drains")
	if err != nil {
		return nil, err
	}
	ds := &drains{d: d, bucket: b, dir: d.cfg.path("logs", ".drains"), log: d.log, wake: make(chan struct{}, 1), running: map[string]*drainState{}}
	if err := os.MkdirAll(ds.dir, 0o700); err != nil {
		return nil, fmt.Errorf("make drains' directory: %w", err)
	}
	return ds, nil
}

func (ds *drains) look() {
	select {
	case ds.wake <- struct{}{}:
	default:
	}
}

// add makes a drain of an app's log, from now on.
func (ds *drains) add(ctx context.Context, app string, url m3o.Secret) (drainRecord, error) {
	u, err := drain.Parse(url.Reveal())
	if err != nil {
		return drainRecord{}, err
	}
	all, err := ds.of(ctx, app)
	if err != nil {
		return drainRecord{}, err
	}
	if len(all) >= maxDrains {
		return drainRecord{}, &m3o.Error{Kind: m3o.Conflict, Msg: fmt.Sprintf("%s has %d drains already", app, maxDrains), Hint: "m3o drains:remove"}
	}
	r := drainRecord{App: app, ID: strings.ToLower(rand.Text()[:8]), Shown: drain.Redact(u), Created: time.Now().UTC()}
	r.URL = ds.d.config.Seal(url, "drain "+r.key())
	if _, err := ds.bucket.Create(ctx, r.key(), r); err != nil {
		return r, fmt.Errorf("record drain: %w", err)
	}
	ds.look()
	return r, nil
}

// of lists the drains of an app, "" for all.
func (ds *drains) of(ctx context.Context, app string) ([]drainRecord, error) {
	prefix := ""
	if app != "" {
		prefix = app + "/"
	}
	entries, err := ds.bucket.List(ctx, prefix)
	if err != nil {
		return nil, fmt.Errorf("list drains: %w", err)
	}
	var all []drainRecord
	for _, e := range entries {
		all = append(all, e.Value)
	}
	slices.SortFunc(all, func(a, b drainRecord) int { return a.Created.Compare(b.Created) })
	return all, nil
}

func (ds *drains) remove(ctx context.Context, app, id string) error {
	all, err := ds.of(ctx, app)
	if err != nil {
		return err
	}
	if !slices.ContainsFunc(all, func(r drainRecord) bool { return r.ID == id }) {
		return &m3o.Error{Kind: m3o.NotFound, Msg: fmt.Sprintf("%s has no drain %q", app, id), Hint: "m3o drains -a " + app}
	}
	if err := ds.bucket.Delete(ctx, app+"/"+id, 0); err != nil {
		return fmt.Errorf("remove drain: %w", err)
	}
	ds.look()
	return nil
}

// removeApp removes all drains of an app.
func (ds *drains) removeApp(ctx context.Context, app string) error {
	all, err := ds.of(ctx, app)
	if err != nil {
		return err
	}
	for _, r := range all {
		if err := ds.remove(ctx, app, r.ID); err != nil {
			return err
		}
	}
	return nil
}

func (ds *drains) state(app, id string) *drainState {
	ds.mu.Lock()
	defer ds.mu.Unlock()
	return ds.running[app+"/"+id]
}

// all are the drains that run, by "app/id".
func (ds *drains) all() map[string]*drainState {
	ds.mu.Lock()
	defer ds.mu.Unlock()
	return maps.Clone(ds.running)
}

// run keeps a drain running for each record until ctx ends.
func (ds *drains) run(ctx context.Context) error {
	readers := map[string]func(){} // by app: ends it and waits
	defer func() {
		for _, end := range readers {
			end()
		}
		ds.mu.Lock()
		all := ds.running
		ds.running = map[string]*drainState{}
		ds.mu.Unlock()
		for _, s := range all {
			s.end()
		}
	}()
	tick := time.NewTicker(10 * time.Second)
	defer tick.Stop()
	for {
		recs, err := ds.of(ctx, "")
		if err != nil {
			if ctx.Err() != nil {
				return nil
			}
			ds.log.Error("read drains", "err", err)
		} else {
			ds.match(ctx, recs, readers)
		}
		ds.remember()
		select {
		case <-ctx.Done():
			return nil
		case <-ds.wake:
		case <-tick.C:
		}
	}
}

func (s *drainState) end() {
	s.stop()
	<-s.done
}

// match starts what recs have and does not run, and ends what they lack.
func (ds *drains) match(ctx context.Context, recs []drainRecord, readers map[string]func()) {
	want, apps := map[string]bool{}, map[string]bool{}
	for _, r := range recs {
		want[r.key()], apps[r.App] = true, true
		if ds.state(r.App, r.ID) == nil {
			ds.start(ctx, r)
		}
	}
	ds.mu.Lock()
	var gone []*drainState
	for key, s := range ds.running {
		if !want[key] {
			gone = append(gone, s)
			delete(ds.running, key)
			_ = os.Remove(ds.file(key))
		}
	}
	ds.mu.Unlock()
	for _, s := range gone {
		s.end()
	}
	for app, end := range readers {
		if !apps[app] {
			end()
			delete(readers, app)
		}
	}
	for app := range apps {
		if readers[app] == nil {
			rctx, cancel := context.WithCancel(ctx)
			done := make(chan struct{})
			go func() {
				defer close(done)
				ds.read(rctx, app)
			}()
			readers[app] = func() { cancel(); <-done }
		}
	}
}

func (ds *drains) start(ctx context.Context, r drainRecord) {
	url, err := ds.d.config.Unseal(r.URL, "drain "+r.key())
	if err != nil {
		ds.log.Error("open a drain's address", "app", r.App, "drain", r.ID, "err", err)
		return
	}
	dr, err := drain.New(url.Reveal(), drain.Options{Log: ds.log, Roots: ds.roots()})
	if err != nil {
		ds.log.Error("start drain", "app", r.App, "drain", r.ID, "err", err)
		return
	}
	dctx, cancel := context.WithCancel(ctx)
	s := &drainState{drain: dr, since: r.Created, stop: cancel, done: make(chan struct{})}
	if b, err := os.ReadFile(ds.file(r.key())); err == nil {
		if at, err := time.Parse(time.RFC3339Nano, string(b)); err == nil && at.After(s.since) {
			s.since = at.Add(1) // it has come this far before the daemon ended
		}
	}
	go func() {
		defer close(s.done)
		_ = dr.Run(dctx) // it ends with dctx alone
	}()
	ds.mu.Lock()
	defer ds.mu.Unlock()
	ds.running[r.key()] = s
}

// roots are the CAs whose servers a drain believes: the system's and, for a
// collector that runs on m3o itself, ours.
func (ds *drains) roots() *x509.CertPool {
	pool, err := x509.SystemCertPool()
	if err != nil {
		pool = x509.NewCertPool()
	}
	pool.AppendCertsFromPEM(ds.d.caPEM)
	return pool
}

func (ds *drains) file(key string) string {
	return filepath.Join(ds.dir, strings.ReplaceAll(key, "/", "."))
}

// remember writes down how far each drain has come, so that the next daemon
// goes on there: a line may then be sent twice, but none is left out.
func (ds *drains) remember() {
	ds.mu.Lock()
	defer ds.mu.Unlock()
	for key, s := range ds.running {
		if at := s.drain.Stats().Acked; at.After(s.since) {
			if err := atomicfile.Write(ds.file(key), []byte(at.UTC().Format(time.RFC3339Nano)), 0o600); err != nil {
				ds.log.Warn("cannot note how far a drain has come", "err", err)
			}
		}
	}
}

// read hands an app's lines to its drains until ctx ends.
func (ds *drains) read(ctx context.Context, app string) {
	since := time.Now()
	prefix := app + "/"
	ds.mu.Lock()
	for key, s := range ds.running {
		if strings.HasPrefix(key, prefix) && s.since.Before(since) {
			since = s.since
		}
	}
	ds.mu.Unlock()
	for ctx.Err() == nil {
		for l, err := range ds.d.appLog(ctx, logQuery{app: app, since: since, follow: true}) {
			if err != nil {
				ds.log.Warn("cannot read an app's log for its drains", "app", app, "err", err)
				break
			}
			line := drain.Line{Time: l.Time, App: app, Source: l.source, Process: l.Process, Instance: l.Instance, Release: l.Release, Stream: l.Stream, Text: l.Text}
			ds.mu.Lock()
			for key, s := range ds.running {
				if strings.HasPrefix(key, prefix) && !l.Time.Before(s.since) {
					s.drain.Add(line)
				}
			}
			ds.mu.Unlock()
			since = l.Time.Add(1)
		}
		select {
		case <-ctx.Done():
		case <-time.After(time.Second):
		}
	}
}
