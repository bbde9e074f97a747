package daemon

import (
	"context"
	"io"
	"time"

	"github.com/m3o/m3o"
	"github.com/m3o/m3o/gitserver"
)

// deployCommit builds a commit that is in the app's repository already and
// makes it live, as a push of it would: the same lane, steps and output. With
// a src.Ref that branch moves from src.Old to src.Commit once the release is
// switched to, and if it cannot, the release is taken back. Without one (an
// upload, a rebuild) nothing moves. Whoever calls has asked auth, and
// notWanted where nobody asked for this very deploy. The release of a locked app
// is held, not live: ReleaseStatus says so. When ctx
// ends before the switch, the deploy is cancelled.
func (d *Daemon) deployCommit(ctx context.Context, src m3o.Source, w io.Writer) (m3o.Release, error) {
	live, err := d.deploy(ctx, src, w)
	if err != nil {
		return m3o.Release{}, err
	}
	// Switched: from here on it is finished or taken back, whoever went away.
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), time.Minute)
	defer cancel()
	var moveErr error
	if src.Ref != "" && src.Commit != src.Old {
		moveErr = gitserver.Move(ctx, src.Repo, src.Ref, src.Old, src.Commit)
	}
	if err := live.Done(ctx, moveErr == nil, w); err != nil {
		return m3o.Release{}, err
	}
	return live.rel, moveErr
}
