package release

import (
	"context"
	"fmt"
	"maps"
	"time"

	"github.com/m3o/m3o"
	"github.com/m3o/m3o/store"
)

// A Formation is how an operator wants an app to run whichever release is
// live: how many instances, within which limits, when it sleeps. It lies over
// what the release itself says and outlives it; changing it makes no release,
// and a rollback does not change it.
type Formation struct {
	App       string
	Processes map[string]Scale
	Sleep     *time.Duration // idle time until it sleeps; 0 never; nil: as the release says
	Asleep    bool           // it is stopped for want of requests
	Volumes   map[string]Volume
	User      string // who changed it last
	Reason    string // "scale web=3"
	Changed   time.Time
}

// A Scale is a Formation's part about one process type.
type Scale struct {
	Replicas *int         // nil: as the release says
	Limits   m3o.Limits   // zero fields: as the release says
	Scaling  *m3o.Scaling // nil: as the release says
	Stopped  bool         // none runs, whatever Replicas says
	// Revision grows whenever the instances have to be replaced: by a restart,
	// other limits, another volume.
	Revision int
}

// A Volume is a directory that outlives the instances it is mounted in.
type Volume struct {
	Process string // process type it is mounted in, "" for none
	Path    string // where
	Created time.Time
}

// Over is rel as it runs under this formation. awake leaves out that the app
// is asleep.
func (f Formation) Over(rel m3o.Release, awake bool) m3o.Release {
	procs := maps.Clone(rel.Processes)
	for name, p := range procs {
		s := f.Processes[name]
		if s.Replicas != nil {
			p.Replicas = *s.Replicas
		}
		override(&p.Limits.MemoryBytes, s.Limits.MemoryBytes)
		override(&p.Limits.CPUMillis, s.Limits.CPUMillis)
		override(&p.Limits.Pids, s.Limits.Pids)
		override(&p.Limits.Files, s.Limits.Files)
		override(&p.Limits.Grace, s.Limits.Grace)
		if s.Scaling != nil {
			p.Scaling = *s.Scaling
		}
		if len(f.Mounts(name)) > 0 { // two instances must not write to the same files
			p.Replicas, p.Scaling = min(p.Replicas, 1), m3o.Scaling{}
		}
		if p.Scaling.On() {
			p.Replicas = min(max(p.Replicas, p.Scaling.Min), p.Scaling.Max)
		}
		if s.Stopped || f.Asleep && !awake {
			p.Replicas = 0
		}
		procs[name] = p
	}
	rel.Processes = procs
	if f.Sleep != nil {
		rel.Sleep = *f.Sleep
	}
	return rel
}

func override[T comparable](field *T, v T) {
	var zero T
	if v != zero {
		*field = v
	}
}

// Mounts are the volumes that a process type has, by name.
func (f Formation) Mounts(process string) map[string]Volume {
	out := map[string]Volume{}
	for name, v := range f.Volumes {
		if v.Process == process {
			out[name] = v
		}
	}
	return out
}

// Formation is the app's, the zero one but for its name until it is changed.
func (l *Ledger) Formation(ctx context.Context, app string) (Formation, error) {
	f, _, err := l.formation(ctx, app)
	return f, err
}

func (l *Ledger) formation(ctx context.Context, app string) (Formation, store.Rev, error) {
	if m3o.CheckName(app) != nil {
		return Formation{}, 0, noApp(app, nil)
	}
	f, rev, err := l.formations.Get(ctx, app)
	if m3o.KindOf(err) == m3o.NotFound {
		return Formation{App: app}, 0, nil
	}
	return f, rev, err
}

// Reform changes an app's formation: change gets it as it is and may be called
// more than once. What it returns as an error is returned, and nothing written.
func (l *Ledger) Reform(ctx context.Context, app, user, reason string, change func(*Formation) error) (Formation, error) {
	lock := l.lock(app)
	lock.Lock()
	defer lock.Unlock()
	if _, err := l.App(ctx, app); err != nil {
		return Formation{}, err
	}
	for {
		f, rev, err := l.formation(ctx, app)
		if err != nil {
			return Formation{}, fmt.Errorf("read formation of %s: %w", app, err)
		}
		f.Processes, f.Volumes = maps.Clone(f.Processes), maps.Clone(f.Volumes)
		if f.Processes == nil {
			f.Processes = map[string]Scale{}
		}
		if f.Volumes == nil {
			f.Volumes = map[string]Volume{}
		}
		if err := change(&f); err != nil {
			return Formation{}, err
		}
		f.App, f.User, f.Reason, f.Changed = app, user, reason, now()
		if rev == 0 {
			_, err = l.formations.Create(ctx, app, f)
		} else {
			_, err = l.formations.Update(ctx, app, f, rev)
		}
		if m3o.KindOf(err) == m3o.Conflict {
			continue
		}
		if err != nil {
			return Formation{}, fmt.Errorf("write formation of %s: %w", app, err)
		}
		return f, nil
	}
}
