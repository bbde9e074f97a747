package daemon

import (
	"context"
	"time"

	"connectrpc.com/connect"

	"github.com/m3o/m3o"
	m3ov1 "github.com/m3o/m3o/api/m3o/v1"
	"github.com/m3o/m3o/events/cron"
)

type schedulesAPI struct{ d *Daemon }

func (a schedulesAPI) wire(ctx context.Context, rec schedule) (*m3ov1.Schedule, error) {
	out := &m3ov1.Schedule{Name: rec.Name, Cron: rec.Cron, Timezone: rec.Zone, Action: rec.Action, Args: rec.Args, IfOutdated: rec.IfOutdated,
		Overlap: string(rec.Overlap), Missed: string(rec.Missed), JitterSeconds: int32(rec.Jitter / time.Second), Paused: rec.Paused,
		User: rec.User, Created: stamp(rec.Created)}
	j, err := rec.job()
	if err != nil {
		return nil, err
	}
	if !rec.Paused {
		_, next := cron.Plan(j, time.Now().UTC())
		out.Next = stamp(next)
	}
	last, err := a.d.schedules.history(ctx, rec.App, rec.Name, 1)
	if err != nil {
		return nil, err
	}
	if len(last) > 0 {
		out.Last = wireRun(last[0])
	}
	return out, nil
}

func wireRun(r scheduleRun) *m3ov1.ScheduleRun {
	out := &m3ov1.ScheduleRun{Number: int32(r.Number), At: stamp(r.At), Started: stamp(r.Started), Ended: stamp(r.Ended), Status: r.Status,
		Detail: r.Detail, Output: r.Output, Late: r.Late, Missed: int32(r.Missed), By: r.By}
	if r.Release > 0 {
		out.Release = m3o.Release{Version: r.Release}.Name()
	}
	return out
}

func (a schedulesAPI) Add(ctx context.Context, req *connect.Request[m3ov1.AddScheduleRequest]) (*connect.Response[m3ov1.AddScheduleResponse], error) {
	s := req.Msg.Schedule
	if s == nil {
		return nil, m3o.Errorf(m3o.Invalid, "there is no schedule in the request")
	}
	rec, err := a.d.schedules.add(ctx, schedule{App: req.Msg.App, Name: s.Name, Cron: s.Cron, Zone: s.Timezone, Action: s.Action, Args: s.Args,
		IfOutdated: s.IfOutdated, Overlap: cron.Overlap(s.Overlap), Missed: cron.Missed(s.Missed), Jitter: time.Duration(s.JitterSeconds) * time.Second,
		Paused: s.Paused, User: who(ctx).User})
	if err != nil {
		return nil, err
	}
	w, err := a.wire(ctx, rec)
	if err != nil {
		return nil, err
	}
	return connect.NewResponse(&m3ov1.AddScheduleResponse{Schedule: w}), nil
}

func (a schedulesAPI) List(ctx context.Context, req *connect.Request[m3ov1.ListSchedulesRequest]) (*connect.Response[m3ov1.ListSchedulesResponse], error) {
	all, err := a.d.schedules.list(ctx, req.Msg.App)
	if err != nil {
		return nil, err
	}
	res := &m3ov1.ListSchedulesResponse{}
	for _, rec := range all {
		w, err := a.wire(ctx, rec)
		if err != nil {
			return nil, err
		}
		res.Schedules = append(res.Schedules, w)
	}
	return connect.NewResponse(res), nil
}

func (a schedulesAPI) Run(ctx context.Context, req *connect.Request[m3ov1.RunScheduleRequest]) (*connect.Response[m3ov1.RunScheduleResponse], error) {
	if err := a.d.schedules.trigger(ctx, req.Msg.App, req.Msg.Schedule, who(ctx).User); err != nil {
		return nil, err
	}
	return connect.NewResponse(&m3ov1.RunScheduleResponse{}), nil
}

func (a schedulesAPI) Pause(ctx context.Context, req *connect.Request[m3ov1.PauseScheduleRequest]) (*connect.Response[m3ov1.PauseScheduleResponse], error) {
	_, err := a.d.schedules.change(ctx, req.Msg.App, req.Msg.Schedule, func(rec *schedule) error {
		rec.Paused = true
		return nil
	})
	if err != nil {
		return nil, err
	}
	return connect.NewResponse(&m3ov1.PauseScheduleResponse{}), nil
}

func (a schedulesAPI) Resume(ctx context.Context, req *connect.Request[m3ov1.ResumeScheduleRequest]) (*connect.Response[m3ov1.ResumeScheduleResponse], error) {
	rec, err := a.d.schedules.change(ctx, req.Msg.App, req.Msg.Schedule, func(rec *schedule) error {
		if rec.Paused {
			rec.Paused, rec.Decided = false, time.Now().UTC() // what fell into the pause is not missed
		}
		return nil
	})
	if err != nil {
		return nil, err
	}
	w, err := a.wire(ctx, rec)
	if err != nil {
		return nil, err
	}
	return connect.NewResponse(&m3ov1.ResumeScheduleResponse{Schedule: w}), nil
}

func (a schedulesAPI) Remove(ctx context.Context, req *connect.Request[m3ov1.RemoveScheduleRequest]) (*connect.Response[m3ov1.RemoveScheduleResponse], error) {
	rec, _, err := a.d.schedules.get(ctx, req.Msg.App, req.Msg.Schedule)
	if err == nil {
		err = declaredOnly(rec)
	}
	if err != nil {
		return nil, err
	}
	if err := a.d.schedules.remove(ctx, req.Msg.App, req.Msg.Schedule); err != nil {
		return nil, err
	}
	return connect.NewResponse(&m3ov1.RemoveScheduleResponse{}), nil
}

func (a schedulesAPI) History(ctx context.Context, req *connect.Request[m3ov1.ScheduleHistoryRequest]) (*connect.Response[m3ov1.ScheduleHistoryResponse], error) {
	runs, err := a.d.schedules.history(ctx, req.Msg.App, req.Msg.Schedule, limit(req.Msg.Limit))
	if err != nil {
		return nil, err
	}
	res := &m3ov1.ScheduleHistoryResponse{}
	for _, r := range runs {
		res.Entries = append(res.Entries, &m3ov1.ScheduleHistoryResponse_Entry{Schedule: r.Schedule, Run: wireRun(r)})
	}
	return connect.NewResponse(res), nil
}
