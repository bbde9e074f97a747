package daemon

import (
	"cmp"
	"context"
	"fmt"
	"maps"
	goruntime "runtime"
	"slices"
	"strings"
	"time"

	"connectrpc.com/connect"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/m3o/m3o"
	m3ov1 "github.com/m3o/m3o/api/m3o/v1"
	"github.com/m3o/m3o/release"
	"github.com/m3o/m3o/runtime"
)

type scaleAPI struct{ d *Daemon }

// mostInstances bounds what one process type may be scaled to.
const mostInstances = 1000

func (a scaleAPI) wire(ctx context.Context, app string) (*m3ov1.AppScale, error) {
	f, err := a.d.ledger.Formation(ctx, app)
	if err != nil {
		return nil, err
	}
	out := &m3ov1.AppScale{App: app, Asleep: f.Asleep, User: f.User, Reason: f.Reason, Changed: stamp(f.Changed)}
	sh, ok := a.d.shapes.get(app)
	if !ok {
		return out, nil
	}
	if sh.rel.Sleep > 0 {
		out.Sleep = durationpb.New(sh.rel.Sleep)
	}
	ready := map[string]int32{}
	for _, in := range a.d.routes.list(app) {
		if in.Release == sh.rel.Version && in.Phase == m3o.Ready {
			ready[in.Process]++
		}
	}
	for _, name := range slices.Sorted(maps.Keys(sh.rel.Processes)) {
		p := sh.rel.Processes[name]
		w := &m3ov1.ProcessScale{Process: name, Command: p.Command, Replicas: int32(p.Replicas), Ready: ready[name], Stopped: f.Processes[name].Stopped,
			Limits: &m3ov1.Limits{MemoryBytes: p.Limits.MemoryBytes, CpuMillis: p.Limits.CPUMillis, Pids: p.Limits.Pids, Files: p.Limits.Files}}
		w.Limits.MemoryBytes = cmp.Or(w.Limits.MemoryBytes, runtime.DefaultMemoryBytes)
		w.Limits.Pids = cmp.Or(w.Limits.Pids, runtime.DefaultPids)
		w.Limits.Files = cmp.Or(w.Limits.Files, runtime.DefaultFiles)
		w.Limits.Grace = durationpb.New(cmp.Or(p.Limits.Grace, runtime.DefaultGrace))
		if s := p.Scaling; s.On() {
			w.Autoscaling = &m3ov1.Autoscaling{Min: int32(s.Min), Max: int32(s.Max), Concurrency: int32(s.Concurrency), Cpu: int32(s.CPU)}
		}
		out.Processes = append(out.Processes, w)
	}
	return out, nil
}

func (a scaleAPI) Get(ctx context.Context, req *connect.Request[m3ov1.GetScaleRequest]) (*connect.Response[m3ov1.GetScaleResponse], error) {
	w, err := a.wire(ctx, req.Msg.App)
	if err != nil {
		return nil, err
	}
	return connect.NewResponse(&m3ov1.GetScaleResponse{Scale: w}), nil
}

func (a scaleAPI) Set(ctx context.Context, req *connect.Request[m3ov1.SetScaleRequest]) (*connect.Response[m3ov1.SetScaleResponse], error) {
	var words []string
	for _, c := range req.Msg.Changes {
		if c.Replicas != nil {
			if *c.Replicas < 0 || *c.Replicas > mostInstances {
				return nil, m3o.Errorf(m3o.Invalid, "%d instances of %s are not between 0 and %d", *c.Replicas, c.Process, mostInstances)
			}
			words = append(words, fmt.Sprintf("%s=%d", c.Process, *c.Replicas))
		}
		l := limitsOf(c.Limits)
		if err := l.Check(); err != nil {
			return nil, &m3o.Error{Kind: m3o.Invalid, Msg: c.Process + ": " + err.Error(), Hint: m3o.HintOf(err), Err: err}
		}
		if l != (m3o.Limits{}) {
			words = append(words, "limits of "+c.Process)
		}
	}
	if len(words) == 0 {
		return nil, &m3o.Error{Kind: m3o.Invalid, Msg: "nothing is to be changed", Hint: "m3o ps:scale web=2"}
	}
	_, err := a.d.reform(ctx, req.Msg.App, who(ctx).User, "scale "+strings.Join(words, " "), func(live m3o.Release, f *release.Formation) (changed []string, err error) {
		for _, c := range req.Msg.Changes {
			if _, err := types(live, c.Process); err != nil {
				return nil, err
			}
			s := f.Processes[c.Process]
			if c.Replicas != nil {
				n := int(*c.Replicas)
				if n > 1 && len(f.Mounts(c.Process)) > 0 {
					return nil, tooMany(live.App, c.Process)
				}
				if p := f.Over(live, true).Processes[c.Process]; p.Scaling.On() && (n < p.Scaling.Min || n > p.Scaling.Max) {
					return nil, &m3o.Error{Kind: m3o.Conflict, Msg: fmt.Sprintf("%s scales by itself between %d and %d", c.Process, p.Scaling.Min, p.Scaling.Max),
						Hint: "m3o ps:autoscale " + c.Process + " --off -a " + live.App}
				}
				s.Replicas, s.Stopped = &n, false
			}
			l := limitsOf(c.Limits)
			before := s.Limits
			for field, v := range map[*int64]int64{&s.Limits.MemoryBytes: l.MemoryBytes, &s.Limits.CPUMillis: l.CPUMillis, &s.Limits.Pids: l.Pids, &s.Limits.Files: l.Files} {
				if v != 0 {
					*field = v
				}
			}
			s.Limits.Grace = cmp.Or(l.Grace, s.Limits.Grace)
			if s.Limits != before {
				s.Revision++
			}
			f.Processes[c.Process] = s
			changed = append(changed, c.Process)
		}
		return changed, nil
	})
	if err != nil {
		return nil, err
	}
	w, err := a.wire(ctx, req.Msg.App)
	if err != nil {
		return nil, err
	}
	res := &m3ov1.SetScaleResponse{Scale: w}
	for _, c := range req.Msg.Changes {
		for _, doubt := range limitsOf(c.Limits).Doubts(machineMemory(), goruntime.NumCPU()) {
			res.Warnings = append(res.Warnings, c.Process+": "+doubt)
		}
	}
	return connect.NewResponse(res), nil
}

// machineMemory is what this machine has in all, 0 when it cannot be asked.
func machineMemory() int64 {
	var s unix.Sysinfo_t
	if unix.Sysinfo(&s) != nil {
		return 0
	}
	return int64(s.Totalram) * int64(s.Unit)
}

func limitsOf(l *m3ov1.Limits) m3o.Limits {
	if l == nil {
		return m3o.Limits{}
	}
	return m3o.Limits{MemoryBytes: l.MemoryBytes, CPUMillis: l.CpuMillis, Pids: l.Pids, Files: l.Files, Grace: l.Grace.AsDuration()}
}

// each changes the formation of one process type, or of all for "".
func (a scaleAPI) each(ctx context.Context, app, process, reason string, change func(*release.Scale)) ([]string, error) {
	var names []string
	_, err := a.d.reform(ctx, app, who(ctx).User, strings.TrimSpace(reason+" "+process), func(live m3o.Release, f *release.Formation) ([]string, error) {
		var err error
		if names, err = types(live, process); err != nil {
			return nil, err
		}
		for _, name := range names {
			s := f.Processes[name]
			change(&s)
			f.Processes[name] = s
		}
		return names, nil
	})
	return names, err
}

func (a scaleAPI) Restart(ctx context.Context, req *connect.Request[m3ov1.RestartRequest]) (*connect.Response[m3ov1.RestartResponse], error) {
	names, err := a.each(ctx, req.Msg.App, req.Msg.Process, "restart", func(s *release.Scale) { s.Revision++ })
	if err != nil {
		return nil, err
	}
	return connect.NewResponse(&m3ov1.RestartResponse{Processes: names}), nil
}

func (a scaleAPI) Stop(ctx context.Context, req *connect.Request[m3ov1.StopRequest]) (*connect.Response[m3ov1.StopResponse], error) {
	names, err := a.each(ctx, req.Msg.App, req.Msg.Process, "stop", func(s *release.Scale) { s.Stopped = true })
	if err != nil {
		return nil, err
	}
	return connect.NewResponse(&m3ov1.StopResponse{Processes: names}), nil
}

func (a scaleAPI) Start(ctx context.Context, req *connect.Request[m3ov1.StartRequest]) (*connect.Response[m3ov1.StartResponse], error) {
	names, err := a.each(ctx, req.Msg.App, req.Msg.Process, "start", func(s *release.Scale) { s.Stopped = false })
	if err != nil {
		return nil, err
	}
	return connect.NewResponse(&m3ov1.StartResponse{Processes: names}), nil
}

func (a scaleAPI) Autoscale(ctx context.Context, req *connect.Request[m3ov1.AutoscaleRequest]) (*connect.Response[m3ov1.AutoscaleResponse], error) {
	process := cmp.Or(req.Msg.Process, webProcess)
	var rule m3o.Scaling
	reason := "autoscale " + process + " off"
	if s := req.Msg.Autoscaling; s != nil {
		rule = m3o.Scaling{Min: max(int(s.Min), 1), Max: int(s.Max), Concurrency: int(s.Concurrency), CPU: int(s.Cpu)}
		if rule.Max < rule.Min || rule.Max > mostInstances || !rule.On() || rule.CPU < 0 || rule.CPU > 100 || rule.Concurrency < 0 {
			return nil, &m3o.Error{Kind: m3o.Invalid, Msg: "scaling needs bounds and what to scale on", Hint: "m3o ps:autoscale web --min 1 --max 5 --concurrency 50, or --cpu 70"}
		}
		if process != webProcess && rule.Concurrency > 0 {
			return nil, &m3o.Error{Kind: m3o.Invalid, Msg: "only web has requests in flight", Hint: "m3o ps:autoscale " + process + " --max 5 --cpu 70"}
		}
		reason = fmt.Sprintf("autoscale %s %d to %d", process, rule.Min, rule.Max)
	}
	_, err := a.d.reform(ctx, req.Msg.App, who(ctx).User, reason, func(live m3o.Release, f *release.Formation) ([]string, error) {
		if _, err := types(live, process); err != nil {
			return nil, err
		}
		if rule.On() && len(f.Mounts(process)) > 0 {
			return nil, tooMany(live.App, process)
		}
		s := f.Processes[process]
		s.Scaling = &rule
		f.Processes[process] = s
		return []string{process}, nil
	})
	if err != nil {
		return nil, err
	}
	w, err := a.wire(ctx, req.Msg.App)
	if err != nil {
		return nil, err
	}
	return connect.NewResponse(&m3ov1.AutoscaleResponse{Scale: w}), nil
}

// leastSleep is the shortest idle time: less would stop an app between two
// requests of one visitor.
const leastSleep = time.Second

func (a scaleAPI) Sleep(ctx context.Context, req *connect.Request[m3ov1.SleepRequest]) (*connect.Response[m3ov1.SleepResponse], error) {
	after := req.Msg.After.AsDuration()
	if req.Msg.After != nil && after < leastSleep {
		return nil, &m3o.Error{Kind: m3o.Invalid, Msg: fmt.Sprintf("%v is too short a time to call an app idle", after), Hint: "m3o ps:sleep --after 10m"}
	}
	reason := "sleep after " + after.String()
	if after == 0 {
		reason = "never sleep"
	}
	wake := false
	set := func(f *release.Formation) {
		wake = f.Asleep && after == 0
		f.Sleep = &after
	}
	_, err := a.d.reform(ctx, req.Msg.App, who(ctx).User, reason, func(live m3o.Release, f *release.Formation) ([]string, error) {
		set(f)
		if !wake {
			return nil, nil
		}
		f.Asleep = false
		return types(live, "")
	})
	if m3o.KindOf(err) == m3o.NotFound { // no release yet: it holds from the first one on
		_, err = a.d.ledger.Reform(ctx, req.Msg.App, who(ctx).User, reason, func(f *release.Formation) error { set(f); return nil })
	}
	if err != nil {
		return nil, err
	}
	w, err := a.wire(ctx, req.Msg.App)
	if err != nil {
		return nil, err
	}
	return connect.NewResponse(&m3ov1.SleepResponse{Scale: w}), nil
}

type volumesAPI struct{ d *Daemon }

func (a volumesAPI) List(ctx context.Context, req *connect.Request[m3ov1.ListVolumesRequest]) (*connect.Response[m3ov1.ListVolumesResponse], error) {
	f, err := a.d.ledger.Formation(ctx, req.Msg.App)
	if err != nil {
		return nil, err
	}
	res := &m3ov1.ListVolumesResponse{}
	for _, name := range slices.Sorted(maps.Keys(f.Volumes)) {
		v, dir := f.Volumes[name], a.d.volumeDir(req.Msg.App, name)
		w := &m3ov1.Volume{Name: name, Process: v.Process, Path: v.Path, Bytes: sizeOf(dir), Created: stamp(v.Created)}
		if who(ctx).Admin {
			w.Directory = dir
		}
		res.Volumes = append(res.Volumes, w)
	}
	return connect.NewResponse(res), nil
}

func (a volumesAPI) Create(ctx context.Context, req *connect.Request[m3ov1.CreateVolumeRequest]) (*connect.Response[m3ov1.CreateVolumeResponse], error) {
	if err := a.d.createVolume(ctx, req.Msg.App, who(ctx).User, req.Msg.Volume); err != nil {
		return nil, err
	}
	return connect.NewResponse(&m3ov1.CreateVolumeResponse{}), nil
}

func (a volumesAPI) Mount(ctx context.Context, req *connect.Request[m3ov1.MountVolumeRequest]) (*connect.Response[m3ov1.MountVolumeResponse], error) {
	if err := a.d.mountVolume(ctx, req.Msg.App, who(ctx).User, req.Msg.Volume, cmp.Or(req.Msg.Process, webProcess), req.Msg.Path); err != nil {
		return nil, err
	}
	return connect.NewResponse(&m3ov1.MountVolumeResponse{}), nil
}

func (a volumesAPI) Unmount(ctx context.Context, req *connect.Request[m3ov1.UnmountVolumeRequest]) (*connect.Response[m3ov1.UnmountVolumeResponse], error) {
	if err := a.d.mountVolume(ctx, req.Msg.App, who(ctx).User, req.Msg.Volume, "", ""); err != nil {
		return nil, err
	}
	return connect.NewResponse(&m3ov1.UnmountVolumeResponse{}), nil
}

func (a volumesAPI) Destroy(ctx context.Context, req *connect.Request[m3ov1.DestroyVolumeRequest]) (*connect.Response[m3ov1.DestroyVolumeResponse], error) {
	if req.Msg.Confirm != req.Msg.Volume {
		return nil, &m3o.Error{Kind: m3o.Invalid, Msg: "the confirmation does not match the volume's name", Hint: "m3o storage:destroy " + req.Msg.Volume + " --confirm " + req.Msg.Volume}
	}
	if err := a.d.destroyVolume(ctx, req.Msg.App, who(ctx).User, req.Msg.Volume); err != nil {
		return nil, err
	}
	return connect.NewResponse(&m3ov1.DestroyVolumeResponse{}), nil
}
