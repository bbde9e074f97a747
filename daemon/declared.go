package daemon

import (
	"context"
	"errors"
	"fmt"
	"path"
	"reflect"
	"strings"
	"time"

	"github.com/m3o/m3o"
	"github.com/m3o/m3o/buildpacks"
	"github.com/m3o/m3o/events/cron"
)

// declaredSchedules is the schedules that a tree's own files ask for: those of
// m3o.yaml by name, then app.json's cron entries.
func declaredSchedules(files buildpacks.Files) ([]m3o.Schedule, error) {
	var out []m3o.Schedule
	check := func(where string, s m3o.Schedule) error {
		rec, err := checkSchedule(scheduleOf("", s))
		if e, ok := errors.AsType[*m3o.Error](err); ok {
			return &m3o.Error{Kind: e.Kind, Msg: where + ": " + e.Msg, Hint: e.Hint, Err: err}
		}
		s.Cron, s.Zone = rec.Cron, rec.Zone
		out = append(out, s)
		return err
	}
	for _, s := range files.Manifest.Schedules {
		if err := check(buildpacks.ManifestName+": schedules."+s.Name, s); err != nil {
			return nil, err
		}
	}
	taken := map[string]bool{}
	for _, s := range out {
		taken[s.Name] = true
	}
	for _, c := range files.App.Cron {
		s := m3o.Schedule{Name: nameFrom(c.Command[0]), Cron: c.Schedule, Action: doRun, Args: c.Command}
		for base, n := s.Name, 2; taken[s.Name]; n++ {
			s.Name = fmt.Sprintf("%s-%d", base, n)
		}
		taken[s.Name] = true
		if err := check(fmt.Sprintf("%s:%d", buildpacks.AppJSONName, c.Line), s); err != nil {
			return nil, err
		}
	}
	if len(out) > maxSchedules {
		return nil, m3o.Errorf(m3o.Invalid, "the files ask for %d schedules; the limit is %d", len(out), maxSchedules)
	}
	return out, nil
}

// inImage names the programs of a Go build as they are in its image: cleanup,
// ./cleanup and bin/cleanup are /app/cleanup, as in a Procfile.
func inImage(plan *buildpacks.Plan, all []m3o.Schedule) {
	for _, s := range all {
		if s.Action != doRun || plan.Builder != "go" {
			continue
		}
		name := strings.TrimPrefix(strings.TrimPrefix(s.Args[0], "./"), "bin/")
		if !strings.Contains(name, "/") {
			s.Args[0] = path.Join(buildpacks.AppDir, name)
		}
	}
}

func scheduleOf(app string, s m3o.Schedule) schedule {
	return schedule{App: app, Name: s.Name, Cron: s.Cron, Zone: s.Zone, Action: s.Action, Args: s.Args, IfOutdated: s.IfOutdated,
		Overlap: cron.Overlap(s.Overlap), Missed: cron.Missed(s.Missed), Jitter: s.Jitter, Declared: true}
}

// follow makes the declared schedules of an app those of the release that went
// live, also by a rollback. One that stays as it is keeps its times, whether it
// is paused and its history. One that somebody added under the same name stays
// theirs.
func (s *schedules) follow(ctx context.Context, rel m3o.Release) error {
	have, err := s.list(ctx, rel.App)
	if err != nil {
		return err
	}
	old := map[string]schedule{}
	for _, rec := range have {
		old[rec.Name] = rec
	}
	want := map[string]bool{}
	var errs []error
	for _, decl := range rel.Schedules {
		want[decl.Name] = true
		rec, err := checkSchedule(scheduleOf(rel.App, decl))
		if err != nil {
			errs = append(errs, err) // it was checked at the push: another version of m3o reads otherwise
			continue
		}
		rec.User, rec.Created = rel.User, time.Now().UTC()
		rec.Decided = rec.Created
		switch was, ok := old[rec.Name]; {
		case !ok:
			if _, err := s.table.Create(ctx, rec.key(), rec); err != nil && m3o.KindOf(err) != m3o.Conflict {
				errs = append(errs, err)
			}
		case !was.Declared:
			s.d.log.Info("declared schedule left out: somebody added one of that name", "app", rel.App)
		default:
			_, err := s.change(ctx, rel.App, rec.Name, func(now *schedule) error {
				rec.Paused, rec.Created, rec.Runs, rec.User = now.Paused, now.Created, now.Runs, now.User
				if rec.Cron == now.Cron && rec.Zone == now.Zone {
					rec.Decided = now.Decided
				}
				if reflect.DeepEqual(*now, rec) {
					return errSame
				}
				*now = rec
				return nil
			})
			if err != nil && !errors.Is(err, errSame) {
				errs = append(errs, err)
			}
		}
	}
	for _, rec := range have {
		if rec.Declared && !want[rec.Name] {
			errs = append(errs, s.remove(ctx, rel.App, rec.Name))
		}
	}
	s.runner.Wake()
	return errors.Join(errs...)
}

var errSame = errors.New("nothing to change")

// declaredOnly refuses to remove or replace by hand what a file declares.
func declaredOnly(rec schedule) error {
	if !rec.Declared {
		return nil
	}
	return &m3o.Error{Kind: m3o.Conflict, Msg: rec.Name + " is declared by the app's own files, and would be back with the next release",
		Hint: strings.Join([]string{"take it out of", buildpacks.ManifestName, "or", buildpacks.AppJSONName + ", or m3o schedule:pause", rec.Name}, " ")}
}
