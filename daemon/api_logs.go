package daemon

import (
	"context"
	"slices"

	"connectrpc.com/connect"

	"github.com/m3o/m3o"
	m3ov1 "github.com/m3o/m3o/api/m3o/v1"
)

// Logs is in m3o.proto.
func (a processesAPI) Logs(ctx context.Context, req *connect.Request[m3ov1.LogsRequest], out *connect.ServerStream[m3ov1.LogsResponse]) error {
	m := req.Msg
	q := logQuery{app: m.App, source: m.Source, process: m.Process, instance: m.Instance, lines: min(int(m.Lines), maxLogLines), follow: m.Follow}
	if m.Since.IsValid() {
		q.since = m.Since.AsTime()
	}
	if m.Until.IsValid() {
		q.until = m.Until.AsTime()
	}
	switch {
	case q.source != "" && q.source != sourceApp && !slices.Contains(ourSources, q.source):
		return &m3o.Error{Kind: m3o.Invalid, Msg: "no lines come from " + q.source, Hint: "the sources are app, build, router and m3o"}
	case q.source != "" && q.source != sourceApp && (q.process != "" || q.instance != ""):
		return m3o.Errorf(m3o.Invalid, "only lines of the app have a process and an instance")
	case q.lines < 0:
		return m3o.Errorf(m3o.Invalid, "%d lines are less than none", q.lines)
	case q.follow && !q.until.IsZero():
		return m3o.Errorf(m3o.Invalid, "lines to come have no end to stop at")
	}
	for l, err := range a.d.appLog(ctx, q) {
		if err != nil {
			return err
		}
		w := &m3ov1.LogsResponse{Time: stamp(l.Time), Source: l.source, Process: l.Process, Instance: l.Instance, Stream: l.Stream, Text: l.Text}
		if l.Release != 0 {
			w.Release = m3o.Release{Version: l.Release}.Name()
		}
		if err := out.Send(w); err != nil {
			return err
		}
	}
	return nil
}

type drainsAPI struct{ d *Daemon }

func wireDrain(r drainRecord, s *drainState) *m3ov1.Drain {
	w := &m3ov1.Drain{Id: r.ID, Url: r.Shown, Created: stamp(r.Created)}
	if s != nil {
		st := s.drain.Stats()
		w.Sent, w.Dropped, w.Waiting, w.Error = st.Sent, st.Dropped, int32(st.Waiting), st.Err
	}
	return w
}

// Add is in drains.proto.
func (a drainsAPI) Add(ctx context.Context, req *connect.Request[m3ov1.AddDrainRequest]) (*connect.Response[m3ov1.AddDrainResponse], error) {
	r, err := a.d.drains.add(ctx, req.Msg.App, m3o.Secret(req.Msg.Url))
	if err != nil {
		return nil, err
	}
	a.d.log.Info("drain added", "app", req.Msg.App, "drain", r.ID, "user", who(ctx).User)
	return connect.NewResponse(&m3ov1.AddDrainResponse{Drain: wireDrain(r, nil)}), nil
}

// List is in drains.proto.
func (a drainsAPI) List(ctx context.Context, req *connect.Request[m3ov1.ListDrainsRequest]) (*connect.Response[m3ov1.ListDrainsResponse], error) {
	all, err := a.d.drains.of(ctx, req.Msg.App)
	if err != nil {
		return nil, err
	}
	res := &m3ov1.ListDrainsResponse{}
	for _, r := range all {
		res.Drains = append(res.Drains, wireDrain(r, a.d.drains.state(r.App, r.ID)))
	}
	return connect.NewResponse(res), nil
}

// Remove is in drains.proto.
func (a drainsAPI) Remove(ctx context.Context, req *connect.Request[m3ov1.RemoveDrainRequest]) (*connect.Response[m3ov1.RemoveDrainResponse], error) {
	if err := a.d.drains.remove(ctx, req.Msg.App, req.Msg.Id); err != nil {
		return nil, err
	}
	a.d.log.Info("drain removed", "app", req.Msg.App, "drain", req.Msg.Id, "user", who(ctx).User)
	return connect.NewResponse(&m3ov1.RemoveDrainResponse{}), nil
}
