package daemon

import (
	"context"
	"strings"

	"github.com/m3o/m3o/release"
	"github.com/m3o/m3o/webhook"
)

// skipPush says why a push to a connected repository is not to be built: its
// newest commit asks for that, or it touches nothing the app is made of. c is
// nil for a pull request.
func (d *Daemon) skipPush(ctx context.Context, conn *connection, c *webhook.Change) string {
	if c == nil {
		return ""
	}
	if mark := release.SkipMark(c.Message); mark != "" {
		return "the commit says " + mark
	}
	app, err := d.ledger.App(ctx, conn.App)
	if err != nil || len(app.Paths) == 0 || c.AllPaths {
		return ""
	}
	if _, ok := release.Touches(app.Paths, c.Paths); !ok {
		return "it changes nothing in " + strings.Join(app.Paths, ", ")
	}
	return ""
}
