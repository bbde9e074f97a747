package daemon

import (
	"bytes"
	"context"
	"fmt"
	"net"
	"net/http"
	goruntime "runtime"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/m3o/m3o"
	"github.com/m3o/m3o/router"
	"github.com/m3o/m3o/runtime"
	"github.com/m3o/m3o/telemetry"
)

// exposition collects metrics in Prometheus's text format, version 0.0.4:
// https://prometheus.io/docs/instrumenting/exposition_formats/. Everything is
// read when it is asked for, so nothing is counted twice.
type exposition struct{ families []telemetry.Family }

// family begins a metric; its samples follow.
func (e *exposition) family(name, kind, help string) {
	e.families = append(e.families, telemetry.Family{Name: name, Kind: kind, Help: help})
}

// sample adds one value; labels are names and values in turn.
func (e *exposition) sample(name string, value float64, labels ...string) {
	f := &e.families[len(e.families)-1]
	f.Samples = append(f.Samples, telemetry.Sample{Name: name, Value: value, Labels: labels})
}

var labelValue = strings.NewReplacer(`\`, `\\`, "\n", `\n`, `"`, `\"`)

// text is the exposition as Prometheus reads it.
func (e *exposition) text() []byte {
	var b bytes.Buffer
	for _, f := range e.families {
		fmt.Fprintf(&b, "# HELP %s %s\n# TYPE %s %s\n", f.Name, f.Help, f.Name, f.Kind)
		for _, s := range f.Samples {
			b.WriteString(s.Name)
			for i := 0; i < len(s.Labels); i += 2 {
				sep := byte(',')
				if i == 0 {
					sep = '{'
				}
				b.WriteByte(sep)
				fmt.Fprintf(&b, `%s="%s"`, s.Labels[i], labelValue.Replace(s.Labels[i+1]))
			}
			if len(s.Labels) > 0 {
				b.WriteByte('}')
			}
			b.WriteByte(' ')
			b.WriteString(strconv.FormatFloat(s.Value, 'g', -1, 64))
			b.WriteByte('\n')
		}
	}
	return b.Bytes()
}

// serveMetrics serves GET /metrics on an address of its own, without
// authentication, while one is configured.
func (d *Daemon) serveMetrics(ctx context.Context) error {
	if d.metrics == nil {
		<-ctx.Done()
		return nil
	}
	mux := http.NewServeMux()
	mux.HandleFunc("GET /metrics", func(w http.ResponseWriter, r *http.Request) {
		rctx, cancel := context.WithTimeout(r.Context(), 8*time.Second)
		defer cancel()
		var e exposition
		d.expose(rctx, &e)
		w.Header().Set("Content-Type", "text/plain; version=0.0.4; charset=utf-8")
		_, _ = w.Write(e.text())
	})
	srv := &http.Server{Handler: mux, ReadHeaderTimeout: 10 * time.Second, WriteTimeout: time.Minute}
	stop := context.AfterFunc(ctx, func() { _ = srv.Close() })
	defer stop()
	if err := srv.Serve(d.metrics); err != nil && ctx.Err() == nil {
		return fmt.Errorf("serve metrics: %w", err)
	}
	return nil
}

func (d *Daemon) listenMetrics(ctx context.Context) error {
	if d.cfg.Metrics == "" {
		return nil
	}
	ln, err := (&net.ListenConfig{}).Listen(ctx, "tcp", d.cfg.Metrics)
	if err != nil {
		return portError("metrics", d.cfg.Metrics, err)
	}
	d.metrics = ln
	return nil
}

func (d *Daemon) expose(ctx context.Context, e *exposition) {
	e.family("m3o_build_info", "gauge", "The version of the daemon.")
	e.sample("m3o_build_info", 1, "version", d.version)
	d.exposeInstances(e)
	d.exposeRouter(ctx, e)
	e.family("m3o_drain_lines_total", "counter", "Log lines for drains since the daemon started, by what became of them.")
	for key, s := range d.drains.all() {
		app, id, _ := strings.Cut(key, "/")
		st := s.drain.Stats()
		e.sample("m3o_drain_lines_total", float64(st.Sent), "app", app, "drain", id, "result", "sent")
		e.sample("m3o_drain_lines_total", float64(st.Dropped), "app", app, "drain", id, "result", "dropped")
	}
	var mem goruntime.MemStats
	goruntime.ReadMemStats(&mem)
	e.family("go_goroutines", "gauge", "Goroutines of the daemon.")
	e.sample("go_goroutines", float64(goruntime.NumGoroutine()))
	e.family("go_memstats_heap_inuse_bytes", "gauge", "Heap of the daemon in use.")
	e.sample("go_memstats_heap_inuse_bytes", float64(mem.HeapInuse))
}

func (d *Daemon) exposeInstances(e *exposition) {
	all := d.routes.list("")
	e.family("m3o_instance_up", "gauge", "1 for an instance that is ready, 0 for any other.")
	labels := func(in m3o.Instance) []string {
		return []string{"app", in.App, "process", in.Process, "release", m3o.Release{Version: in.Release}.Name(), "instance", in.ID}
	}
	for _, in := range all {
		up := 0.0
		if in.Phase == m3o.Ready {
			up = 1
		}
		e.sample("m3o_instance_up", up, labels(in)...)
	}
	e.family("m3o_instance_restarts_total", "counter", "How often an instance was started again after it ended by itself.")
	for _, in := range all {
		e.sample("m3o_instance_restarts_total", float64(in.Restarts), labels(in)...)
	}
	meter, ok := d.driver.(runtime.Meter)
	if !ok {
		return
	}
	used := map[string]runtime.Usage{}
	for _, in := range all {
		if u, err := meter.Usage(in.ID); err == nil {
			used[in.ID] = u
		}
	}
	for _, m := range []struct {
		name, kind, help string
		value            func(runtime.Usage) float64
	}{
		{"m3o_instance_cpu_seconds_total", "counter", "Processor time of this launch of an instance.", func(u runtime.Usage) float64 { return u.CPU.Seconds() }},
		{"m3o_instance_memory_bytes", "gauge", "Memory of an instance, without what the kernel can drop at once.", func(u runtime.Usage) float64 { return float64(u.MemoryBytes) }},
		{"m3o_instance_memory_limit_bytes", "gauge", "Memory an instance may use; 0 is no limit.", func(u runtime.Usage) float64 { return float64(u.MemoryLimit) }},
		{"m3o_instance_processes", "gauge", "Processes and threads of an instance.", func(u runtime.Usage) float64 { return float64(u.Pids) }},
		{"m3o_instance_oom_kills_total", "counter", "Processes of this launch that were killed because the memory limit was reached.", func(u runtime.Usage) float64 { return float64(u.OOMKills) }},
	} {
		e.family(m.name, m.kind, m.help)
		for _, in := range all {
			if u, ok := used[in.ID]; ok {
				e.sample(m.name, m.value(u), labels(in)...)
			}
		}
	}
}

// exposeRouter tells of the requests of each app since the router started.
func (d *Daemon) exposeRouter(ctx context.Context, e *exposition) {
	e.family("m3o_router_up", "gauge", "1 while the router answers.")
	st, err := d.router.Status(ctx)
	if err != nil {
		e.sample("m3o_router_up", 0)
		return
	}
	e.sample("m3o_router_up", 1)
	apps := make([]string, 0, len(st.Apps))
	for app := range st.Apps {
		apps = append(apps, app)
	}
	slices.Sort(apps)
	e.family("m3o_router_requests_in_flight", "gauge", "Requests of an app that are being answered.")
	for _, app := range apps {
		e.sample("m3o_router_requests_in_flight", float64(st.Apps[app].InFlight), "app", app)
	}
	type sum struct {
		app, protocol, status string
	}
	counts, failed := map[sum]int64{}, map[sum]int64{}
	type latency struct {
		buckets []int64
		sum     time.Duration
		count   int64
	}
	took := map[string]*latency{}
	for _, app := range apps {
		rs, err := d.router.Requests(ctx, app, 0)
		if err != nil {
			continue
		}
		l := &latency{}
		took[app] = l
		for _, s := range rs.Series {
			k := sum{app, s.Protocol, strconv.Itoa(s.Status)}
			counts[k] += s.Count
			failed[k] += s.Failed
			l.sum += s.Sum
			l.count += s.Count
			if l.buckets == nil {
				l.buckets = make([]int64, len(s.Buckets))
			}
			for i := range min(len(l.buckets), len(s.Buckets)) {
				l.buckets[i] += s.Buckets[i]
			}
		}
	}
	e.family("m3o_router_requests_total", "counter", "Requests of an app since the router started.")
	for k, n := range counts {
		e.sample("m3o_router_requests_total", float64(n), "app", k.app, "protocol", k.protocol, "status", k.status)
	}
	e.family("m3o_router_requests_failed_total", "counter", "Those that went wrong on the serving side.")
	for k, n := range failed {
		if n > 0 {
			e.sample("m3o_router_requests_failed_total", float64(n), "app", k.app, "protocol", k.protocol, "status", k.status)
		}
	}
	e.family("m3o_router_request_duration_seconds", "histogram", "From a request's first byte to the last of its answer.")
	bounds := router.LatencyBounds()
	for _, app := range apps {
		l := took[app]
		if l == nil || l.count == 0 {
			continue
		}
		below := int64(0)
		for i, n := range l.buckets {
			below += n
			le := "+Inf"
			if i < len(bounds) {
				le = strconv.FormatFloat(bounds[i].Seconds(), 'g', -1, 64)
			}
			e.sample("m3o_router_request_duration_seconds_bucket", float64(below), "app", app, "le", le)
		}
		e.sample("m3o_router_request_duration_seconds_sum", l.sum.Seconds(), "app", app)
		e.sample("m3o_router_request_duration_seconds_count", float64(l.count), "app", app)
	}
}
