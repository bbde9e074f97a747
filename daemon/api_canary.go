package daemon

import (
	"context"
	"fmt"
	"time"

	"connectrpc.com/connect"
	"google.golang.org/protobuf/types/known/durationpb"

	m3ov1 "github.com/m3o/m3o/api/m3o/v1"
	"github.com/m3o/m3o/router"
)

type canaryAPI struct{ d *Daemon }

func (a canaryAPI) Set(ctx context.Context, req *connect.Request[m3ov1.SetCanaryRequest]) (*connect.Response[m3ov1.SetCanaryResponse], error) {
	m := req.Msg
	err := a.d.setCanary(ctx, m.GetApp(), canary{Version: int(m.GetVersion()), Percent: m.GetPercent(), Sticky: m.GetSticky()})
	return connect.NewResponse(&m3ov1.SetCanaryResponse{}), err
}

// canaryWindow is what the two releases are compared over.
const canaryWindow = 15 * time.Minute

func (a canaryAPI) Get(ctx context.Context, req *connect.Request[m3ov1.GetCanaryRequest]) (*connect.Response[m3ov1.GetCanaryResponse], error) {
	app := req.Msg.GetApp()
	c := a.d.routes.canaryOf(app)
	if c.Version == 0 {
		return nil, noCanary(app)
	}
	live, err := a.d.ledger.Live(ctx, app)
	if err != nil {
		return nil, err
	}
	st, err := a.d.router.Requests(ctx, app, canaryWindow)
	if err != nil {
		return nil, err
	}
	return connect.NewResponse(&m3ov1.GetCanaryResponse{Percent: c.Percent, Sticky: c.Sticky, Window: durationpb.New(canaryWindow),
		Live: side(st, live.Version), Canary: side(st, c.Version)}), nil
}

func side(st router.Stats, release int) *m3ov1.Side {
	s := &m3ov1.Side{Release: fmt.Sprintf("v%d", release)}
	buckets := make([]int64, len(router.LatencyBounds())+1)
	for _, x := range st.Series {
		if x.Release != release {
			continue
		}
		s.Requests += x.Count
		s.Failed += x.Failed
		for i, n := range x.Buckets {
			buckets[i] += n
		}
	}
	s.P50, s.P99 = durationpb.New(router.Quantile(buckets, 0.5)), durationpb.New(router.Quantile(buckets, 0.99))
	return s
}

func (a canaryAPI) Promote(ctx context.Context, req *connect.Request[m3ov1.PromoteCanaryRequest]) (*connect.Response[m3ov1.PromoteCanaryResponse], error) {
	rel, from, err := a.d.promoteCanary(ctx, req.Msg.GetApp(), who(ctx).User)
	if err != nil {
		return nil, err
	}
	return connect.NewResponse(&m3ov1.PromoteCanaryResponse{Version: int32(rel.Version), From: int32(from)}), nil
}

func (a canaryAPI) Abort(ctx context.Context, req *connect.Request[m3ov1.AbortCanaryRequest]) (*connect.Response[m3ov1.AbortCanaryResponse], error) {
	v, err := a.d.abortCanary(ctx, req.Msg.GetApp())
	if err != nil {
		return nil, err
	}
	return connect.NewResponse(&m3ov1.AbortCanaryResponse{Version: int32(v)}), nil
}
