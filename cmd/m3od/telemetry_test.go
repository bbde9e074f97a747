package main

import (
	"slices"
	"strings"
	"testing"

	"github.com/m3o/m3o/telemetry/collector"
)

// Deploys and requests are traced from the daemon and the router to the
// instance, and the collector gets the metrics that Prometheus would.
func TestTracesAndMetricsReachACollector(t *testing.T) {
	b := theBox(t)
	p := b.user(t, "otto")
	dir := p.clone(t, "hello-grpc", "traced")
	c := collector.New(t)
	if err := b.stop(); err != nil {
		t.Fatal(err)
	}
	if err := b.start("M3O_OTLP_ENDPOINT="+c.URL, "M3O_OTLP_SAMPLE=1", "M3O_OTLP_INTERVAL=300ms", "OTEL_EXPORTER_OTLP_HEADERS=x-team=blue"); err != nil {
		t.Fatal(err)
	}
	if out, err := p.push(dir); err != nil {
		t.Fatalf("push: %v\n%s", err, out)
	}
	const secret = "hunter2-never-to-be-seen"
	p.must(t, dir, "m3o", "config:set", "TOKEN="+secret, "--secret")
	p.post(t, "traced", "/helloworld.Helloworld/Call?token="+secret, `{"name":"`+secret+`"}`)
	p.call(t, "traced", "/helloworld.Helloworld/Call", "Ada")

	find := func(name, service string) (all []collector.Span) {
		for _, s := range c.Spans("") {
			if s.Name == name && s.Service == service && s.Attrs["m3o.app"] == "traced" {
				all = append(all, s)
			}
		}
		return all
	}
	eventually(t, "the deploys' spans", func() bool { return len(find("deploy", "m3od")) == 2 })
	for i, want := range [][]string{{"receive", "build", "start", "healthy", "publish"}, {"receive", "start", "healthy", "publish"}} { // the push, and the change of config
		root := find("deploy", "m3od")[i]
		var steps []string
		for _, s := range c.Spans(root.Trace) {
			if s.Parent == root.ID {
				steps = append(steps, s.Name)
			}
		}
		if !slices.Equal(steps, want) || root.Failed || root.Attrs["m3o.user"] != "otto" {
			t.Errorf("deploy %d has the steps %v, want %v: %+v", i, steps, want, root)
		}
	}
	const call = "helloworld.Helloworld/Call"
	eventually(t, "the calls' spans", func() bool { return len(find(call, "m3o-router")) == 4 }) // two each
	for _, s := range find(call, "m3o-router") {
		if s.Parent != "" {
			continue
		}
		names := map[string]string{"json": call + " gateway " + call, "grpc": call + " " + call}
		var got []string
		for _, x := range c.Spans(s.Trace) {
			got = append(got, x.Name)
		}
		if want := names[s.Attrs["m3o.protocol"]]; strings.Join(got, " ") != want {
			t.Errorf("a call by %s has the spans %v, want %s", s.Attrs["m3o.protocol"], got, want)
		}
	}
	eventually(t, "the metrics", func() bool {
		return c.Metric("m3o_router_requests_total") != nil && c.Metric("m3o_instance_memory_bytes") != nil && c.Metric("m3o_router_request_duration_seconds").GetHistogram() != nil
	})
	for _, h := range c.Headers() {
		if h.Get("X-Team") != "blue" {
			t.Errorf("a header that was asked for is missing: %v", h)
			break
		}
	}
	if c.Holds(secret) {
		t.Error("a secret was sent")
	}
	// A broken push says where it broke, and not why.
	p.edit(t, dir, "main.go", "func main() {", "func main() {\n\tpanic(\""+secret+"\")")
	if _, err := p.push(dir); err == nil {
		t.Error("a program that panics was released")
	}
	eventually(t, "the failed deploy's spans", func() bool {
		all := find("deploy", "m3od")
		return len(all) == 3 && all[2].Failed && all[2].Raw.Status.Message == "healthy failed"
	})
	if c.Holds(secret) {
		t.Error("a secret was sent with the failure")
	}
	if err := b.stop(); err != nil {
		t.Fatal(err)
	}
	if err := b.start(); err != nil {
		t.Fatal(err)
	}
	p.must(t, dir, "m3o", "destroy", "--confirm", "traced")
}
