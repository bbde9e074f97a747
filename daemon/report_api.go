package daemon

import (
	"context"
	"fmt"
	"strings"

	"google.golang.org/protobuf/types/descriptorpb"

	"github.com/m3o/m3o"
	"github.com/m3o/m3o/buildpacks/protobuf"
)

// maxListed is how many lines of each kind a comment has.
const maxListed = 20

// apiChanges words, for the comment on a pull request, how the API of its
// preview differs from that of the live app; "" when it does not.
func (r *repos) apiChanges(ctx context.Context, app, preview string) string {
	old, now := r.apiOf(ctx, app), r.apiOf(ctx, preview)
	if len(old.GetFile()) == 0 && len(now.GetFile()) == 0 {
		return ""
	}
	var b strings.Builder
	if a := protobuf.Added(old, now).String(); a != "" {
		fmt.Fprintf(&b, "\n**API:** %s\n", cell(a))
	}
	breaks := protobuf.Breaking(old, now, protobuf.WireJSON)
	if len(breaks) > 0 {
		fmt.Fprintf(&b, "\n**Breaking changes** (%d), which the push to the live app will be refused for:\n\n", len(breaks))
		for i, c := range breaks {
			if i == maxListed {
				fmt.Fprintf(&b, "- and %d more\n", len(breaks)-i)
				break
			}
			fmt.Fprintf(&b, "- %s\n", cell(c.String()))
		}
	}
	if b.Len() == 0 {
		return "\nThe API is the live app's.\n"
	}
	return b.String()
}

// apiOf is the API of an app's live release, empty where it has none.
func (r *repos) apiOf(ctx context.Context, app string) *descriptorpb.FileDescriptorSet {
	rel, err := r.d.ledger.Live(ctx, app)
	if err != nil || rel.Descriptors == "" {
		if err != nil && m3o.KindOf(err) != m3o.NotFound {
			r.d.log.Warn("read API for a comment", "app", app, "err", err)
		}
		return &descriptorpb.FileDescriptorSet{}
	}
	set, err := r.d.readDescriptors(rel.Descriptors)
	if err != nil {
		r.d.log.Warn("read API for a comment", "app", app, "err", err)
		return &descriptorpb.FileDescriptorSet{}
	}
	return set
}
