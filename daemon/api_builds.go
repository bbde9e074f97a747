package daemon

import (
	"context"
	"net/http"
	"strconv"

	"connectrpc.com/connect"

	"github.com/m3o/m3o"
	m3ov1 "github.com/m3o/m3o/api/m3o/v1"
	"github.com/m3o/m3o/api/m3o/v1/m3ov1connect"
	"github.com/m3o/m3o/buildpacks"
)

// schemaPath is where editors find the JSON Schema of m3o.yaml, of the very
// version that will read the file. Nobody has to sign in for it.
const schemaPath = "/-/m3o.schema.json"

func serveSchema(w http.ResponseWriter, _ *http.Request) {
	w.Header().Set("Content-Type", "application/schema+json")
	w.Header().Set("Access-Control-Allow-Origin", "*") // editors in browsers
	w.Header().Set("Cache-Control", "public, max-age=300")
	_, _ = w.Write(buildpacks.Schema())
}

type buildRecordsAPI struct{ d *Daemon }

var _ m3ov1connect.BuildRecordsHandler = buildRecordsAPI{}

// newestBuild is the number of an app's newest build.
func (d *Daemon) newestBuild(ctx context.Context, app string) (int, error) {
	bs, err := d.ledger.Builds(ctx, app, 1)
	if err != nil {
		return 0, err
	}
	if len(bs) == 0 {
		return 0, &m3o.Error{Kind: m3o.NotFound, Msg: app + " has no build yet", Hint: "git push m3o main makes one"}
	}
	return bs[0].Number, nil
}

func (a buildRecordsAPI) Get(ctx context.Context, req *connect.Request[m3ov1.GetBuildRequest]) (*connect.Response[m3ov1.BuildRecord], error) {
	n := int(req.Msg.Number)
	if n == 0 {
		var err error
		if n, err = a.d.newestBuild(ctx, req.Msg.App); err != nil {
			return nil, err
		}
	}
	b, err := a.d.ledger.Build(ctx, req.Msg.App, n)
	if err != nil {
		return nil, err
	}
	res := &m3ov1.BuildRecord{Number: int32(b.Number), Status: string(b.Status), Commit: b.Commit, Message: b.Message, User: b.User, Error: b.Error,
		Started: stamp(b.Started), Finished: stamp(b.Finished), Image: b.Image, Builder: b.Builder, Toolchain: b.Toolchain, Size: b.Size}
	for _, s := range b.Steps {
		res.Steps = append(res.Steps, &m3ov1.BuildStep{Name: s.Name, Millis: s.Took.Milliseconds(), Cached: s.Cached})
	}
	rels, err := a.d.ledger.Releases(ctx, req.Msg.App, 0)
	if err != nil {
		return nil, err
	}
	for _, r := range rels { // newest first: the last to match is what the build made
		if r.Build == n {
			res.Release = r.Name()
		}
	}
	return connect.NewResponse(res), nil
}

func (a buildRecordsAPI) Cancel(ctx context.Context, req *connect.Request[m3ov1.CancelBuildRequest]) (*connect.Response[m3ov1.CancelBuildResponse], error) {
	n, err := a.d.newestBuild(ctx, req.Msg.App)
	if err != nil {
		return nil, err
	}
	if req.Msg.Number != 0 {
		n = int(req.Msg.Number)
	}
	b, err := a.d.ledger.Build(ctx, req.Msg.App, n)
	if err != nil {
		return nil, err
	}
	if b.Status != m3o.BuildRunning {
		return nil, &m3o.Error{Kind: m3o.Conflict, Msg: "build " + strconv.Itoa(n) + " has ended: " + string(b.Status), Hint: "m3o builds -a " + req.Msg.App}
	}
	err = a.d.lanes.lane(req.Msg.App).cancel(&m3o.Error{Kind: m3o.Conflict, Msg: "cancelled by " + who(ctx).User + "; nothing was changed", Hint: "push again to deploy"})
	if err != nil {
		return nil, err
	}
	return connect.NewResponse(&m3ov1.CancelBuildResponse{Number: int32(n)}), nil
}
