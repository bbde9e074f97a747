package daemon

import (
	"context"
	"strings"
	"time"

	"github.com/m3o/m3o"
)

// doctor is Doctor, and what only the daemon that runs can tell.
func (d *Daemon) doctor(ctx context.Context) []Finding {
	return append(exam{thisHost(), d.cfg}.all(ctx), examine(ctx, 5*time.Second, []check{{"router", d.checkRouter}, {"builder", d.checkBuilder}, {"apps", d.checkApps}, {"certs", d.checkCerts},
		{"drains", d.checkDrains}, {"upkeep", d.checkUpkeep}})...)
}

func (d *Daemon) checkRouter(ctx context.Context, f *findings) {
	if st, err := d.router.Status(ctx); err != nil {
		f.add(CheckFail, "router", "the daemon starts it again; "+d.cfg.path("router", "router.log")+" says why it ended", "the router does not answer, so no app can be reached: %v", err)
	} else {
		f.add(CheckOK, "router", "", "the router serves %s since %s", count(st.Hosts, "host"), st.Started.UTC().Format(time.DateTime))
	}
}

func (d *Daemon) checkBuilder(ctx context.Context, f *findings) {
	if err := d.builder.Ready(ctx); err != nil {
		f.add(CheckFail, "builder", "the daemon's log has the cause (journalctl -u m3od)", "builds cannot be made: %v", err)
	} else {
		f.add(CheckOK, "builder", "", "the builder takes builds")
	}
}

// manyFailed is how many apps' newest builds must have failed, and no other
// succeeded since, for it to be the builder's fault rather than theirs.
const manyFailed = 3

func (d *Daemon) checkApps(ctx context.Context, f *findings) {
	apps, err := d.ledger.Apps(ctx)
	if err != nil {
		f.add(CheckFail, "store", "the daemon's log has the cause (journalctl -u m3od)", "the records cannot be read: %v", err)
		return
	}
	down, failed := 0, 0
	var worked time.Time // when a build last came out well
	for _, app := range apps {
		ready, crashed := false, false
		for _, in := range d.routes.list(app.Name) {
			ready = ready || in.Phase == m3o.Ready
			crashed = crashed || in.Phase == m3o.Exited || in.Phase == m3o.Unhealthy
		}
		if crashed && !ready {
			down++
			f.add(CheckWarn, "apps", "m3o ps -a "+app.Name+" and m3o logs -a "+app.Name, "no instance of %s is ready: it answers nobody", app.Name)
		}
		builds, err := d.ledger.Builds(ctx, app.Name, 10)
		if err != nil {
			f.add(CheckFail, "store", "the daemon's log has the cause (journalctl -u m3od)", "the builds of %s cannot be read: %v", app.Name, err)
			continue
		}
		if len(builds) > 0 && builds[0].Status == m3o.BuildFailed {
			failed++
		}
		for _, b := range builds {
			if b.Status == m3o.BuildSucceeded && b.Finished.After(worked) {
				worked = b.Finished
			}
		}
	}
	if down == 0 {
		f.add(CheckOK, "apps", "", "%s, none down", count(len(apps), "app"))
	}
	switch {
	case failed >= manyFailed && failed*2 > len(apps):
		f.add(CheckWarn, "builds", "m3o builds -a APP and m3o builds:output N -a APP say why; is it the same for all?", "the newest builds of %s failed, the last that did not ended %s", count(failed, "app"), ago(worked))
	case !worked.IsZero():
		f.add(CheckOK, "builds", "", "the last build that succeeded ended %s", ago(worked))
	}
}

func ago(t time.Time) string {
	if t.IsZero() {
		return "never"
	}
	return "at " + t.UTC().Format(time.DateTime) + " UTC"
}

func (d *Daemon) checkCerts(ctx context.Context, f *findings) {
	bad := len(*f)
	if d.certs != nil {
		for _, name := range d.certs.Names() {
			st, _ := d.certs.State(name)
			switch {
			case st.Issued.IsZero() && st.Err != "":
				f.add(CheckFail, "certs", "m3o certs -a APP shows it; the CA must reach port 80 or 443 of this server by that name", "there is no certificate for %s: %s", name, st.Err)
			case !st.Issued.IsZero() && time.Until(st.Expires) < soon:
				f.add(CheckWarn, "certs", "m3o certs -a APP shows it", "the certificate of %s ends on %s and has not been renewed%s", name, st.Expires.UTC().Format(time.DateOnly), why(st.Err))
			}
		}
	}
	own, err := d.ownCerts.List(ctx, "")
	if err != nil {
		f.add(CheckFail, "store", "the daemon's log has the cause (journalctl -u m3od)", "the certificates cannot be read: %v", err)
		return
	}
	for _, e := range own {
		if c := e.Value; time.Until(c.Expires) < 14*24*time.Hour { // nobody but its owner renews it
			f.add(CheckWarn, "certs", "m3o certs:add with a newer one -a "+c.App, "the certificate that was brought for %s ends on %s", strings.Join(c.Names, ", "), c.Expires.UTC().Format(time.DateOnly))
		}
	}
	if len(*f) == bad && (d.certs != nil || len(own) > 0) {
		f.add(CheckOK, "certs", "", "no certificate ends soon")
	}
}

func why(err string) string {
	if err == "" {
		return ""
	}
	return ": " + err
}

func (d *Daemon) checkDrains(_ context.Context, f *findings) {
	for key, s := range d.drains.all() {
		if st := s.drain.Stats(); st.Err != "" {
			f.add(CheckWarn, "drains", "m3o drains -a "+strings.Split(key, "/")[0], "drain %s does not take lines: %s", key, st.Err)
		}
	}
}

// checkUpkeep says when images and layers that nobody needs were last removed.
func (d *Daemon) checkUpkeep(_ context.Context, f *findings) {
	at, err := d.pruned.last()
	switch {
	case err != nil:
		f.add(CheckWarn, "upkeep", "the daemon's log has the cause (journalctl -u m3od); it is tried again every hour", "images and layers that nobody needs stay on the disk: %v", err)
	case !at.IsZero():
		f.add(CheckOK, "upkeep", "", "images and layers that nobody needs were removed %s", ago(at))
	}
}
