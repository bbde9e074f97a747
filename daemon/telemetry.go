package daemon

import (
	"cmp"
	"context"
	"log/slog"
	"os"
	"strconv"
	"sync"
	"time"

	"github.com/m3o/m3o/release"
	"github.com/m3o/m3o/telemetry"
)

// otelFrom completes settings that OpenTelemetry has variables of its own for,
// which every SDK reads.
func (c *Config) otelFrom(getenv func(string) string) {
	c.OTLPEndpoint = cmp.Or(c.OTLPEndpoint, getenv("OTEL_EXPORTER_OTLP_ENDPOINT"))
	c.OTLPSample = cmp.Or(c.OTLPSample, getenv("OTEL_TRACES_SAMPLER_ARG"))
	if ms, err := strconv.Atoi(getenv("OTEL_METRIC_EXPORT_INTERVAL")); c.OTLPInterval == 0 && err == nil && ms > 0 {
		c.OTLPInterval = time.Duration(ms) * time.Millisecond
	}
}

// otlp is how spans and metrics are sent, as what service.
func (c *Config) otlp(service, version string, log *slog.Logger) telemetry.Config {
	sample, err := strconv.ParseFloat(c.OTLPSample, 64)
	if err != nil {
		sample = -1 // which Validate refuses
	}
	return telemetry.Config{Endpoint: c.OTLPEndpoint, Sample: sample, Service: service, Version: version, Log: log,
		Headers: telemetry.ParseHeaders(os.Getenv("OTEL_EXPORTER_OTLP_HEADERS"))}
}

// openTelemetry is nil where nothing is sent.
func openTelemetry(cfg Config, service, version string, log *slog.Logger) (*telemetry.Sender, error) {
	if cfg.OTLPEndpoint == "" {
		return nil, nil //nolint:nilnil // off is no error
	}
	return telemetry.New(cfg.otlp(service, version, log))
}

// runTelemetry sends deploys' spans as they end, and the metrics of /metrics
// again and again.
func (d *Daemon) runTelemetry(ctx context.Context) error {
	if d.telemetry == nil {
		<-ctx.Done()
		return nil
	}
	var all sync.WaitGroup
	all.Go(func() {
		t := time.NewTicker(d.cfg.OTLPInterval)
		defer t.Stop()
		for {
			select {
			case <-ctx.Done():
				return
			case now := <-t.C:
				var e exposition
				ectx, cancel := context.WithTimeout(ctx, 8*time.Second)
				d.expose(ectx, &e)
				cancel()
				if err := d.telemetry.Metrics(ctx, now, e.families); err != nil && ctx.Err() == nil {
					d.log.Warn("metrics are not taken", "err", err)
				}
			}
		}
	})
	err := d.telemetry.Run(ctx)
	all.Wait()
	return err
}

// deployTraces makes a trace of each deploy from its record, when it has ended.
type deployTraces struct {
	to *telemetry.Sender // nil: none are made

	mu      sync.Mutex               // guards what the record does not hold
	came    map[string]time.Time     // when a deploy's source began to come, by its id
	started map[appVersion]time.Time // when all instances of a release were started
}

// maxTraced bounds what is remembered of deploys that never end.
const maxTraced = 1000

// receive notes since when a deploy is under way.
func (t *deployTraces) receive(id string, since time.Time) { note(t, &t.came, id, since) }

// start notes that all instances of a release were started and are waited for.
func (t *deployTraces) start(app string, version int) {
	note(t, &t.started, appVersion{app, version}, time.Now())
}

func note[K comparable](t *deployTraces, in *map[K]time.Time, key K, at time.Time) {
	if t.to == nil {
		return
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	if *in == nil || len(*in) >= maxTraced {
		*in = map[K]time.Time{}
	}
	(*in)[key] = at
}

// end sends the trace of a deploy that has ended.
func (t *deployTraces) end(dep release.Deploy) {
	if t.to == nil || !dep.Status.Ended() || len(dep.Steps) < 2 {
		return
	}
	t.mu.Lock()
	v := appVersion{dep.App, dep.Release}
	came, started := t.came[dep.ID], t.started[v]
	delete(t.came, dep.ID)
	delete(t.started, v)
	t.mu.Unlock()
	t.to.Add(deploySpans(dep, came, started)...)
}

// deployStepNames are what a trace calls the steps of a deploy.
var deployStepNames = map[release.Status]string{release.Queued: "receive", release.Building: "build", release.Releasing: "release", release.Starting: "start", release.Switching: "publish"}

// deploySpans are those of a whole deploy, the first above all others. What it
// failed of is in its record: it may quote what the app printed.
func deploySpans(dep release.Deploy, came, started time.Time) []telemetry.Span {
	last := len(dep.Steps) - 1
	end, failed := dep.Steps[last].At, dep.Status == release.Failed
	if came.IsZero() {
		came = dep.Steps[0].At
	}
	attrs := []telemetry.Attr{telemetry.String("m3o.app", dep.App), telemetry.Int("m3o.release", dep.Release), telemetry.String("m3o.deploy", dep.ID)}
	root := telemetry.Span{Trace: telemetry.NewTraceID(), ID: telemetry.NewSpanID(), Name: "deploy", Kind: telemetry.Server, Begin: came, End: end, Failed: failed,
		Attrs: append([]telemetry.Attr{telemetry.String("m3o.user", dep.User), telemetry.String("m3o.reason", dep.Reason), telemetry.Int("m3o.build", dep.Build),
			telemetry.String("vcs.ref.head.revision", dep.Source.Commit)}, attrs...)}
	all := []telemetry.Span{root}
	add := func(name string, begin, until time.Time, failed bool) {
		all = append(all, telemetry.Span{Trace: root.Trace, ID: telemetry.NewSpanID(), Parent: root.ID, Name: name, Kind: telemetry.Internal, Begin: begin, End: until, Attrs: attrs, Failed: failed})
	}
	for i, s := range dep.Steps[:last] {
		begin, until, bad := s.At, dep.Steps[i+1].At, failed && i == last-1
		switch {
		case i == 0:
			begin = came
		case s.Status == release.Starting && !started.IsZero():
			add("start", begin, started, false)
			add("healthy", started, until, bad)
			continue
		}
		add(deployStepNames[s.Status], begin, until, bad)
	}
	if failed {
		all[0].Why = all[len(all)-1].Name + " failed"
	}
	return all
}
