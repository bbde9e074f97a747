package daemon

import (
	"context"
	"strings"

	"github.com/m3o/m3o/webhook"
)

// skipPush says why a push to a connected repository is not to be built: its
// newest commit asks for that. c may be nil for a pull request's.
func (d *Daemon) skipPush(_ context.Context, _ *connection, c *webhook.Change) string {
	if c == nil {
		return ""
	}
	low := strings.ToLower(c.Message)
	for _, mark := range []string{"[skip ci]", "[ci skip]", "[skip m3o]", "[m3o skip]"} {
		if strings.Contains(low, mark) {
			return "the commit says " + mark
		}
	}
	return ""
}
