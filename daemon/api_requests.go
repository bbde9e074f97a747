package daemon

import (
	"cmp"
	"context"
	"fmt"
	"slices"
	"time"

	"connectrpc.com/connect"
	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/m3o/m3o"
	m3ov1 "github.com/m3o/m3o/api/m3o/v1"
	"github.com/m3o/m3o/router"
)

type requestsAPI struct{ d *Daemon }

// summaryWindow is what is counted when nobody says.
const summaryWindow = 5 * time.Minute

func (a requestsAPI) Summary(ctx context.Context, req *connect.Request[m3ov1.RequestsSummaryRequest]) (*connect.Response[m3ov1.RequestsSummaryResponse], error) {
	window := summaryWindow
	if w := req.Msg.GetWindow(); w != nil {
		window = w.AsDuration()
	}
	if window < time.Second || window > 15*time.Minute {
		return nil, &m3o.Error{Kind: m3o.Invalid, Msg: fmt.Sprintf("%s is not between a second and 15 minutes", window), Hint: "--window 5m"}
	}
	st, err := a.d.router.Requests(ctx, req.Msg.GetApp(), window)
	if err != nil {
		return nil, err
	}
	res := &m3ov1.RequestsSummaryResponse{Window: durationpb.New(window)}
	for _, s := range st.Series {
		res.Groups = append(res.Groups, &m3ov1.RequestGroup{Release: fmt.Sprintf("v%d", s.Release), Rpc: s.RPC, Method: s.Method, Protocol: s.Protocol,
			Status: int32(s.Status), Code: int32(s.Code), Caller: s.Caller, Count: s.Count, Failed: s.Failed,
			P50: durationpb.New(router.Quantile(s.Buckets, 0.5)), P99: durationpb.New(router.Quantile(s.Buckets, 0.99)),
			Mean: durationpb.New(s.Sum / time.Duration(max(1, s.Count)))})
	}
	slices.SortFunc(res.Groups, func(x, y *m3ov1.RequestGroup) int { return cmp.Compare(y.Count, x.Count) })
	ids := a.ids(req.Msg.GetApp())
	for _, r := range st.Failed {
		res.Failed = append(res.Failed, requestTo(r, ids))
	}
	for _, r := range st.Slow {
		res.Slow = append(res.Slow, requestTo(r, ids))
	}
	return connect.NewResponse(res), nil
}

func (a requestsAPI) Follow(ctx context.Context, req *connect.Request[m3ov1.FollowRequestsRequest], out *connect.ServerStream[m3ov1.FollowRequestsResponse]) error {
	// The head goes out at once, so that who follows knows it is heard.
	if err := out.Send(nil); err != nil {
		return err
	}
	for f, err := range a.d.router.Follow(ctx, req.Msg.GetApp()) {
		if err != nil {
			return err
		}
		if req.Msg.GetFailed() && !f.Failed() {
			continue
		}
		if err := out.Send(&m3ov1.FollowRequestsResponse{Request: requestTo(f.Record, a.ids(req.Msg.GetApp())), Missed: f.Dropped}); err != nil {
			return err
		}
	}
	return nil
}

// ids names the instances of an app by their addresses.
func (a requestsAPI) ids(app string) map[string]string {
	ids := map[string]string{}
	for _, in := range a.d.routes.list(app) {
		if in.Addr != "" {
			ids[in.Addr] = in.ID
		}
	}
	return ids
}

func requestTo(r router.Record, ids map[string]string) *m3ov1.Request {
	out := &m3ov1.Request{Time: stamp(r.Time), Took: durationpb.New(r.Took), Instance: cmp.Or(ids[r.Endpoint], r.Endpoint), Host: r.Host, Method: r.Method,
		Path: r.Path, Protocol: r.Protocol, Rpc: r.RPC, Status: int32(r.Status), Code: int32(r.Code), Bytes: r.Out, Remote: r.Remote, Caller: r.Caller,
		Id: r.ID, Broken: r.Broken, Error: r.Err}
	if r.Release > 0 {
		out.Release = fmt.Sprintf("v%d", r.Release)
	}
	return out
}
