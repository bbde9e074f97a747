package daemon

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"time"

	"github.com/m3o/m3o"
	"github.com/m3o/m3o/release"
	"github.com/m3o/m3o/runtime"
)

var volumeName = regexp.MustCompile(`^[a-z][a-z0-9-]{0,62}$`)

// volumeDir is where a volume's files are.
func (d *Daemon) volumeDir(app, name string) string { return d.cfg.path("volumes", app, name) }

// mounts are the directories a process type gets.
func (d *Daemon) mounts(f release.Formation, process string) []runtime.Mount {
	var out []runtime.Mount
	vs := f.Mounts(process)
	for _, name := range slices.Sorted(maps.Keys(vs)) {
		out = append(out, runtime.Mount{Source: d.volumeDir(f.App, name), Target: vs[name].Path})
	}
	return out
}

// makeWay stops those process types of the live release whose volumes the new
// one needs: two instances must not write to the same files. Requests wait in
// the router meanwhile.
func (d *Daemon) makeWay(ctx context.Context, rel m3o.Release, previous int, out output) error {
	if previous == 0 {
		return nil
	}
	f, err := d.ledger.Formation(ctx, rel.App)
	if err != nil {
		return err
	}
	for _, name := range slices.Sorted(maps.Keys(rel.Processes)) {
		if len(f.Mounts(name)) == 0 {
			continue
		}
		out.step("Stopping %s of v%d first: it has a volume", name, previous)
		if name == webProcess {
			if gen := d.routes.setRest(rel.App, rest{asleep: f.Asleep, hold: true}); gen > 0 {
				if err := d.routes.wait(ctx, gen); err != nil {
					return err
				}
			}
		}
		if err := d.driver.Stop(ctx, runtime.Ref{App: rel.App, Process: name, Release: previous}); err != nil {
			d.giveBack(ctx, rel.App, previous)
			return fmt.Errorf("stop %s: %w", name, err)
		}
	}
	return nil
}

// giveBack starts again what makeWay stopped.
func (d *Daemon) giveBack(ctx context.Context, app string, previous int) {
	if previous == 0 {
		return
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), time.Minute)
	defer cancel()
	f, err := d.ledger.Formation(ctx, app)
	if err == nil && len(f.Volumes) == 0 {
		return
	}
	err = func() error {
		if err != nil {
			return err
		}
		old, err := d.ledger.Release(ctx, app, previous)
		if err != nil {
			return err
		}
		for name := range old.Processes {
			if len(f.Mounts(name)) > 0 {
				if err := d.launchAll(ctx, old, f, []string{name}); err != nil {
					return err
				}
			}
		}
		return nil
	}()
	if err != nil {
		d.log.Error("start again what was stopped for a release", "app", app, "release", previous, "err", err)
	}
	d.background(func(ctx context.Context) {
		_, _ = runtime.WaitReady(ctx, d.driver, runtime.Ref{App: app, Process: webProcess, Release: previous}, 1, nil) // requests wait as long
		if err := d.reshape(ctx, app); err != nil && ctx.Err() == nil {
			d.log.Error("note what runs", "app", app, "err", err)
		}
	})
}

func (d *Daemon) createVolume(ctx context.Context, app, user, name string) error {
	if !volumeName.MatchString(name) {
		return &m3o.Error{Kind: m3o.Invalid, Msg: fmt.Sprintf("%q is no name of a volume", name), Hint: "use lower-case letters, digits and -, beginning with a letter"}
	}
	if d.cfg.Runtime == "process" {
		return &m3o.Error{Kind: m3o.Invalid, Msg: "unisolated processes get no volumes", Hint: "m3od --runtime oci mounts them"}
	}
	_, err := d.ledger.Reform(ctx, app, user, "storage:create "+name, func(f *release.Formation) error {
		if _, ok := f.Volumes[name]; ok {
			return &m3o.Error{Kind: m3o.Conflict, Msg: fmt.Sprintf("%s has a volume called %s already", app, name), Hint: "m3o storage -a " + app}
		}
		f.Volumes[name] = release.Volume{Created: time.Now().UTC()}
		return nil
	})
	if err != nil {
		return err
	}
	if err := os.MkdirAll(d.volumeDir(app, name), 0o700); err != nil {
		return fmt.Errorf("make volume: %w", err)
	}
	// Only what lies below is the app's; the way there must be passable for it.
	return errors.Join(os.Chmod(d.cfg.path("volumes"), 0o711), os.Chmod(d.cfg.path("volumes", app), 0o711))
}

// mountVolume mounts a volume in a process type, or with process "" nowhere.
func (d *Daemon) mountVolume(ctx context.Context, app, user, name, process, path string) error {
	reason := fmt.Sprintf("storage:mount %s %s -p %s", name, path, process)
	if process == "" {
		reason = "storage:unmount " + name
	} else if err := (runtime.Mount{Source: d.volumeDir(app, name), Target: path}).Validate(); err != nil {
		return err
	}
	change := func(f *release.Formation) ([]string, error) {
		v, ok := f.Volumes[name]
		if !ok {
			return nil, noVolume(app, name)
		}
		if process != "" && v.Process != "" {
			return nil, &m3o.Error{Kind: m3o.Conflict, Msg: fmt.Sprintf("volume %s is mounted at %s in %s", name, v.Path, v.Process), Hint: "m3o storage:unmount " + name + " -a " + app}
		}
		for other, o := range f.Mounts(process) {
			if process != "" && o.Path == path {
				return nil, &m3o.Error{Kind: m3o.Conflict, Msg: fmt.Sprintf("volume %s is mounted at %s already", other, path), Hint: "choose another path"}
			}
		}
		touched := process
		if touched == "" {
			touched = v.Process
		}
		v.Process, v.Path = process, path
		f.Volumes[name] = v
		s := f.Processes[touched]
		if process != "" {
			if s.Replicas != nil && *s.Replicas > 1 {
				return nil, tooMany(app, touched)
			}
			if s.Scaling != nil && s.Scaling.On() {
				return nil, tooMany(app, touched)
			}
		}
		s.Revision++
		f.Processes[touched] = s
		return []string{touched}, nil
	}
	if _, err := d.ledger.Live(ctx, app); m3o.KindOf(err) == m3o.NotFound {
		_, err := d.ledger.Reform(ctx, app, user, reason, func(f *release.Formation) error { _, err := change(f); return err })
		return err
	}
	_, err := d.reform(ctx, app, user, reason, func(live m3o.Release, f *release.Formation) ([]string, error) {
		if process != "" {
			if _, err := types(live, process); err != nil {
				return nil, err
			}
		}
		changed, err := change(f)
		if err == nil && process != "" && f.Over(live, true).Processes[process].Replicas > 1 {
			return nil, tooMany(app, process)
		}
		return slices.DeleteFunc(changed, func(s string) bool { return s == "" }), err
	})
	return err
}

func tooMany(app, process string) error {
	return &m3o.Error{Kind: m3o.Conflict, Msg: fmt.Sprintf("%s has a volume or is to get one, and two instances must not write to the same files", process),
		Hint: fmt.Sprintf("m3o ps:scale %s=1 -a %s", process, app)}
}

func noVolume(app, name string) error {
	return &m3o.Error{Kind: m3o.NotFound, Msg: fmt.Sprintf("%s has no volume called %s", app, name), Hint: "m3o storage -a " + app}
}

func (d *Daemon) destroyVolume(ctx context.Context, app, user, name string) error {
	_, err := d.ledger.Reform(ctx, app, user, "storage:destroy "+name, func(f *release.Formation) error {
		v, ok := f.Volumes[name]
		switch {
		case !ok:
			return noVolume(app, name)
		case v.Process != "":
			return &m3o.Error{Kind: m3o.Conflict, Msg: fmt.Sprintf("volume %s is mounted at %s in %s", name, v.Path, v.Process), Hint: "m3o storage:unmount " + name + " -a " + app}
		}
		delete(f.Volumes, name)
		return nil
	})
	if err != nil {
		return err
	}
	if err := os.RemoveAll(d.volumeDir(app, name)); err != nil {
		return fmt.Errorf("remove volume: %w", err)
	}
	return nil
}

// sizeOf is what the files below a directory take, as far as they can be read.
func sizeOf(dir string) int64 {
	var n int64
	_ = filepath.WalkDir(dir, func(_ string, e fs.DirEntry, err error) error {
		if err == nil && e.Type().IsRegular() {
			if fi, err := e.Info(); err == nil {
				n += fi.Size()
			}
		}
		return nil
	})
	return n
}
