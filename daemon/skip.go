package daemon

import (
	"context"
	"strings"
	"time"

	"github.com/m3o/m3o"
	"github.com/m3o/m3o/gitserver"
)

// connectEvent names the delivery that a new connection begins with.
const connectEvent = "connect"

// unwanted says why a commit of a connected repository is not to be built for
// app, the connection's own or a preview of it: the same rules as for a git
// push decide. What changed is told by the trees, from the commit at base, which
// is deployed, to this one. A payload knows only of its own push, and the one
// before it may have failed. The attempt is recorded as skipped.
func (r *repos) unwanted(ctx context.Context, c *connection, app, base, repo, commit string, a attempt) (string, error) {
	old, err := gitserver.Tip(ctx, repo, base)
	if err != nil {
		return "", err
	}
	why, err := r.d.notWanted(ctx, m3o.Source{App: c.App, Repo: repo, Ref: base, Old: old, Commit: commit})
	if why == "" || err != nil {
		return "", err
	}
	a.State, a.At, a.Note = "skipped", time.Now().UTC(), why
	return why, r.endAttempt(ctx, app, a)
}

// filesOf is the source with the tree that app's own files are in: of a
// repository of many, the folder of this one.
func (d *Daemon) filesOf(ctx context.Context, src m3o.Source) m3o.Source {
	c, err := d.repos.of(ctx, m3o.ParentOf(src.App))
	if err != nil || strings.Trim(c.Dir, "/") == "" || src.Tree != "" {
		return src
	}
	tree, err := d.git.Tree(ctx, c.App, src.Repo, src.Quarantine, src.Commit, gitserver.Graft{Dir: c.Dir})
	if err == nil { // a fault is for the build to tell
		src.Tree = tree
	}
	return src
}
