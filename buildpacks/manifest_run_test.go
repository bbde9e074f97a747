package buildpacks

import (
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/m3o/m3o"
)

func TestRunKeysOfTheManifest(t *testing.T) {
	m, err := ParseManifest("m3o.yaml", []byte(`
processes:
  web:
    instances: 2
    memory: 256MB
    cpu: 0.5
    files: 1000
    grace: 10s
    autoscale: {min: 2, max: 5, concurrency: 50}
  worker: {instances: 0, memory: 2GB}
sleep: {after: 10m}
rollback: auto
health:
  grpc: true
  service: shop.v1.Orders
  period: 10s
  failures: 2
  successes: 1
  liveness: {http: /livez, period: 30s, failures: 5}
`))
	if err != nil {
		t.Fatal(err)
	}
	want := RunKeys{Rollback: "auto", Sleep: SleepKeys{10 * time.Minute}, Processes: map[string]ProcessKeys{
		"web": {Instances: 3, Limits: m3o.Limits{MemoryBytes: 256 << 20, CPUMillis: 500, Files: 1000, Grace: 10 * time.Second},
			Scaling: m3o.Scaling{Min: 2, Max: 5, Concurrency: 50}},
		"worker": {Instances: 1, Limits: m3o.Limits{MemoryBytes: 2 << 30}},
	}}
	if d := cmp.Diff(want, m.Run); d != "" {
		t.Errorf("run keys (-want +got):\n%s", d)
	}
	health := m3o.Health{Kind: "grpc", Service: "shop.v1.Orders", Period: 10 * time.Second, Failures: 2, Successes: 1,
		Liveness: m3o.Check{Kind: "http", Path: "/livez", Period: 30 * time.Second, Failures: 5}}
	if d := cmp.Diff(health, m.Health); d != "" {
		t.Errorf("health (-want +got):\n%s", d)
	}
	plan := Plan{Processes: map[string]m3o.Process{"web": {Replicas: 1}, "worker": {Replicas: 1}}}
	if err := (Files{Manifest: m}).Apply(&plan); err != nil {
		t.Fatal(err)
	}
	if w := plan.Processes["web"]; w.Replicas != 2 || w.Scaling.Max != 5 || plan.Processes["worker"].Replicas != 0 {
		t.Errorf("processes %+v", plan.Processes)
	}
}

func TestRunKeysThatCannotBeAreRefused(t *testing.T) {
	for text, want := range map[string]string{
		"processes: {web: {memory: lots}}":                 "512MB",
		"processes: {web: {memory: 1MB}}":                  "from 8MB",
		"processes: {web: {cpu: none}}":                    "cores",
		"processes: {web: {cpu: 0}}":                       "cores",
		"processes: {web: {instances: 1000}}":              "instances",
		"processes: {web: {cpu: -1}}":                      "0.01 to 1024",
		"processes: {web: {cpu: 5000}}":                    "0.01 to 1024",
		"processes: {web: {memory: 2048GB}}":               "to 1024GB",
		"processes: {web: {pids: 1}}":                      "pids",
		"processes: {web: {pids: 15}}":                     "16",
		"processes: {web: {pids: 9999999}}":                "1048576",
		"processes: {web: {files: 3}}":                     "files",
		"processes: {web: {grace: 2h}}":                    "grace",
		"sleep: {after: 1ms}":                              "sleep.after",
		"rollback: sometimes":                              "auto",
		"health: {liveness: {http: livez}}":                "not a path",
		"health: {liveness: {http: /livez, tcp: true}}":    "both",
		"health: {service: a b}":                           "gRPC service",
		"processes: {clock: {instances: 1}}":               "no process type",
		"processes: {web: {autoscale: {max: 5}}}":          "autoscale",
		"processes: {web: {autoscale: {min: 5, cpu: 50}}}": "autoscale",
	} {
		m, err := ParseManifest("m3o.yaml", []byte(text))
		if err == nil {
			plan := Plan{Processes: map[string]m3o.Process{"web": {Replicas: 1}}}
			err = (Files{Manifest: m}).Apply(&plan)
		}
		if m3o.KindOf(err) != m3o.Invalid || !strings.Contains(err.Error()+m3o.HintOf(err), want) {
			t.Errorf("%s: %v (%s), want Invalid with %q", text, err, m3o.HintOf(err), want)
		}
	}
}
