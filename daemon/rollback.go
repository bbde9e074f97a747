package daemon

import (
	"bytes"
	"cmp"
	"context"
	"fmt"
	"io"
	"strings"
	"time"

	"github.com/m3o/m3o"
	"github.com/m3o/m3o/release"
)

// rollback makes a new release of an earlier one's image, config and
// processes, and returns once it is live. version 0 means the release that
// was live before the one that is.
func (d *Daemon) rollback(ctx context.Context, app, user string, version int) (rel m3o.Release, from int, err error) {
	return d.rollbackFrom(ctx, app, user, 0, version, "")
}

// rollbackFrom is rollback for who does it because of the live release, which
// is a Conflict when another is live by now; 0 means whichever it is. reason
// is what the ledger says of it, "" the usual.
func (d *Daemon) rollbackFrom(ctx context.Context, app, user string, expected, version int, reason string) (rel m3o.Release, from int, err error) {
	unlock, err := d.lanes.lock(ctx, app)
	if err != nil {
		return rel, 0, err
	}
	defer unlock()
	live, err := d.ledger.Live(ctx, app)
	if err != nil {
		return rel, 0, err
	}
	if expected != 0 && live.Version != expected {
		return rel, 0, m3o.Errorf(m3o.Conflict, "v%d of %s is not live any more", expected, app)
	}
	kept, err := d.ledger.Kept(ctx, app)
	if err != nil {
		return rel, 0, err
	}
	var target m3o.Release
	for _, k := range kept { // newest first
		if k.Version == version || (version == 0 && k.Version < live.Version) {
			target = k
			break
		}
	}
	switch {
	case version == live.Version:
		return rel, 0, &m3o.Error{Kind: m3o.Invalid, Msg: fmt.Sprintf("v%d is live already", version), Hint: "m3o releases -a " + app}
	case target.Version == 0 && version == 0:
		return rel, 0, &m3o.Error{Kind: m3o.Invalid, Msg: "there is no release before " + live.Name() + " to roll back to", Hint: "m3o releases -a " + app}
	case target.Version == 0:
		return rel, 0, &m3o.Error{Kind: m3o.NotFound, Msg: fmt.Sprintf("v%d of %s never went live or is no longer kept", version, app), Hint: "m3o releases -a " + app}
	}
	target.Reason, target.User = cmp.Or(reason, "rollback to "+target.Name()), user
	rel, err = d.redeploy(ctx, target)
	return rel, live.Version, err
}

// configure releases the live release again with the config's new revision.
// It returns a zero Release when the app has none yet.
func (d *Daemon) configure(ctx context.Context, app, user string, revision int, reason string) (m3o.Release, error) {
	unlock, err := d.lanes.lock(ctx, app)
	if err != nil {
		return m3o.Release{}, err
	}
	defer unlock()
	rel, err := d.ledger.Live(ctx, app)
	if m3o.KindOf(err) == m3o.NotFound {
		return m3o.Release{}, nil
	} else if err != nil {
		return rel, err
	}
	rel.Config, rel.Reason, rel.User = revision, reason, user
	return d.redeploy(ctx, rel)
}

// redeploy makes a new release like rel, which needs no build, live. The caller holds the app's release lock.
func (d *Daemon) redeploy(ctx context.Context, rel m3o.Release) (m3o.Release, error) {
	return d.republish(ctx, rel, 0)
}

// republish is redeploy that makes the held version live, 0 for none.
func (d *Daemon) republish(ctx context.Context, rel m3o.Release, held int) (m3o.Release, error) {
	// Once begun it ends by itself: a client that hangs up leaves no half-done switch.
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), 5*time.Minute)
	defer cancel()
	rel.Breaking = nil // that was a step of its push
	dep, err := d.begin(ctx, release.Deploy{App: rel.App, Reason: rel.Reason, User: rel.User, Publish: held})
	if err != nil {
		return rel, err
	}
	live, err := d.release(ctx, dep, rel, func(context.Context) error { return nil }, output{io.Discard})
	if err != nil {
		return rel, d.failDeploy(ctx, dep.ID, err)
	}
	return live.rel, live.Done(ctx, true, io.Discard)
}

// setReason words a config change without its values.
func setReason(set, unset []string) string {
	var b bytes.Buffer
	if len(set) > 0 {
		b.WriteString("config set " + strings.Join(set, " "))
	}
	if len(unset) > 0 {
		b.WriteString("config unset " + strings.Join(unset, " "))
	}
	return b.String()
}
