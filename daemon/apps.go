package daemon

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"math/big"
	"os"
	"time"

	"github.com/m3o/m3o"
	"github.com/m3o/m3o/auth"
)

// Access answers the git server: may user push to or fetch app, and which
// branch deploys. A first push creates the app, if the user may.
func (p pushes) Access(ctx context.Context, user, app string, write bool) (string, error) {
	d := p.d
	u, err := d.auth.User(ctx, user)
	if err != nil {
		return "", err
	}
	w := auth.Who{User: u.Name, Admin: u.Admin, Via: "git"}
	a, err := d.ledger.App(ctx, app)
	if m3o.KindOf(err) == m3o.NotFound && write {
		if err := d.auth.Allow(ctx, w, auth.AppsCreate, app); err != nil {
			return "", err
		}
		if a, err = d.createApp(ctx, m3o.App{Name: app, Owner: user}); err == nil {
			return a.DeployBranch(), nil
		}
	}
	if err != nil {
		return "", err
	}
	verb := auth.Fetch
	if write {
		verb = auth.Push
	}
	if err := d.auth.Allow(ctx, w, verb, app); err != nil {
		return "", err
	}
	return a.DeployBranch(), nil
}

// createApp writes the app and makes its creator the owner.
func (d *Daemon) createApp(ctx context.Context, app m3o.App) (m3o.App, error) {
	app.Created = time.Now().UTC()
	app, err := d.ledger.CreateApp(ctx, app)
	if err != nil {
		return app, err
	}
	if err := d.auth.Grant(ctx, app.Name, app.Owner, auth.Owner); err != nil {
		// Without its owner's rule the app could be reached by admins only.
		return app, errors.Join(err, d.ledger.DestroyApp(context.WithoutCancel(ctx), app.Name))
	}
	d.log.Info("app created", "app", app.Name, "user", app.Owner)
	return app, nil
}

// destroyApp stops and removes all there is of an app. The record goes last,
// so that a destroy that was cut short can be said again.
func (d *Daemon) destroyApp(ctx context.Context, app string) error {
	// A destroy goes through even if who asked for it hangs up.
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), 2*time.Minute)
	defer cancel()
	// First, or one of them would start what is being removed.
	if err := errors.Join(d.schedules.removeApp(ctx, app), d.hooks.removeApp(ctx, app), d.notify.removeApp(ctx, app)); err != nil {
		return err
	}
	if err := d.repos.removeApp(ctx, app); err != nil {
		return err
	}
	_, turn, err := d.lanes.lane(app).enter(ctx, nil) // cancels a push that runs
	if err != nil {
		return err
	}
	defer turn.leave()
	unlock, err := d.lanes.lock(ctx, app)
	if err != nil {
		return err
	}
	defer unlock()
	if err := d.routes.point(ctx, app, 0, nil); err != nil {
		return err
	}
	for _, in := range d.routes.list(app) {
		if err := d.driver.Stop(ctx, refOf(in)); err != nil {
			return fmt.Errorf("stop %s: %w", in.ID, err)
		}
		d.routes.forget(app, in.Release)
	}
	if err := d.git.Remove(ctx, app); err != nil {
		return err
	}
	if err := d.config.RemoveApp(ctx, app); err != nil {
		return err
	}
	if err := os.RemoveAll(d.cfg.path("builds", app)); err != nil {
		return fmt.Errorf("remove build logs: %w", err)
	}
	if err := errors.Join(d.drains.removeApp(ctx, app), d.unlinkApp(ctx, app)); err != nil {
		return err
	}
	// A later app of this name must not show this one's lines.
	if err := errors.Join(d.logs.remove(app), os.RemoveAll(d.cfg.path("runtime", "logs", app))); err != nil {
		return fmt.Errorf("remove logs: %w", err)
	}
	d.shapes.drop(app)
	if err := os.RemoveAll(d.cfg.path("volumes", app)); err != nil {
		return fmt.Errorf("remove volumes: %w", err)
	}
	if err := d.auth.RemoveApp(ctx, app); err != nil {
		return err
	}
	if err := errors.Join(d.dropCerts(ctx, app), d.dropHosting(ctx, app)); err != nil {
		return err
	}
	if err := d.canaries.Delete(ctx, app, 0); err != nil && m3o.KindOf(err) != m3o.NotFound {
		return fmt.Errorf("forget canary: %w", err)
	}
	if err := d.access.forget(ctx, app); err != nil {
		return err
	}
	if err := d.ledger.DestroyApp(ctx, app); err != nil {
		return err
	}
	d.routes.destroy(app)
	d.log.Info("app destroyed", "app", app)
	d.background(d.prune)
	return nil
}

var (
	adjectives = []string{"amber", "brave", "calm", "clever", "crisp", "eager", "early", "fair", "fleet", "gentle", "grand", "happy", "keen", "lively", "lucid", "mellow", "nimble", "noble", "proud", "quick", "quiet", "rapid", "sharp", "silent", "smooth", "solid", "steady", "sunny", "swift", "tidy", "vivid", "warm"}
	nouns      = []string{"acorn", "badger", "birch", "bridge", "canyon", "cedar", "comet", "coral", "delta", "falcon", "fjord", "gopher", "harbor", "heron", "island", "lagoon", "lantern", "maple", "meadow", "ocean", "otter", "pebble", "pine", "prairie", "quartz", "raven", "reef", "river", "summit", "thistle", "valley", "willow"}
)

// randomName is a readable app name such as swift-otter-4821.
func randomName() (string, error) {
	pick := func(n int) (int, error) {
		i, err := rand.Int(rand.Reader, big.NewInt(int64(n)))
		if err != nil {
			return 0, fmt.Errorf("choose a name: %w", err)
		}
		return int(i.Int64()), nil
	}
	a, err := pick(len(adjectives))
	if err != nil {
		return "", err
	}
	n, err := pick(len(nouns))
	if err != nil {
		return "", err
	}
	k, err := pick(9000)
	if err != nil {
		return "", err
	}
	return fmt.Sprintf("%s-%s-%d", adjectives[a], nouns[n], 1000+k), nil
}
