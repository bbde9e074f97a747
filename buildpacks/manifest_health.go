package buildpacks

import (
	"fmt"
	"regexp"
	"strings"
	"time"

	"github.com/m3o/m3o"
	"gopkg.in/yaml.v3"
)

// healthKeys say when an instance may get requests.
func healthKeys() []key[Manifest] {
	return []key[Manifest]{
		group("health", "When a new instance may get requests. Without it the platform finds out: gRPC health where served, else that the port answers.",
			func(m *Manifest) *m3o.Health { return &m.Health }, []key[m3o.Health]{
				yes("grpc", "Ask `grpc.health.v1`."),
				{"http", "Ask this path; any answer below 400 is healthy.", schema{"type": "string", "pattern": "^/[^ #]*$"},
					func(f *fields, at string, n *yaml.Node, h *m3o.Health) {
						kind(f, n, "http", h)
						h.Path = f.text(n)
						if !strings.HasPrefix(h.Path, "/") || strings.ContainsAny(h.Path, " \r\n\t#") {
							f.fail(n, fmt.Sprintf("%s %q is not a path", at, short(h.Path)), "write for example: http: /healthz")
						}
					}},
				yes("tcp", "It is enough that the port accepts connections."),
				duration("timeout", "How long a start may take; 60s without it.", time.Second, time.Hour, func(h *m3o.Health) *time.Duration { return &h.Timeout }),
				text("service", "With `grpc`: the service whose health is asked, instead of the whole server's.", serviceName, func(h *m3o.Health) *string { return &h.Service }),
				duration("period", "How often a healthy instance is asked; 5s without it.", time.Second, time.Hour, func(h *m3o.Health) *time.Duration { return &h.Period }),
				duration("answer", "How long one answer may take; 3s without it.", 10*time.Millisecond, time.Minute, func(h *m3o.Health) *time.Duration { return &h.Answer }),
				integer("failures", "How many bad answers in a row take an instance out of routing; 3 without it.", 1, 100, func(h *m3o.Health) *int { return &h.Failures }),
				integer("successes", "How many good answers in a row bring it in; 2 without it.", 1, 100, func(h *m3o.Health) *int { return &h.Successes }),
				group("liveness", "When an instance is restarted; never without it.", func(h *m3o.Health) *m3o.Check { return &h.Liveness }, livenessKeys()),
			}),
	}
}

var serviceName = matching(regexp.MustCompile(`[A-Za-z_][A-Za-z0-9_.]*`), "is not the name of a gRPC service", "write for example: service: shop.v1.Orders")

// livenessKeys are those of a check that restarts.
func livenessKeys() []key[m3o.Check] {
	type C = m3o.Check
	asked := func(f *fields, n *yaml.Node, name string, c *C) {
		if c.Kind != "" {
			f.fail(n, "health.liveness has both "+c.Kind+" and "+name, "keep one of them")
		}
		c.Kind = name
	}
	yes := func(name, doc string) key[C] {
		return key[C]{name, doc, schema{"const": true}, func(f *fields, at string, n *yaml.Node, c *C) {
			asked(f, n, name, c)
			if n.Kind != yaml.ScalarNode || n.Value != "true" {
				f.fail(n, fmt.Sprintf("%s is %q", at, short(n.Value)), "write "+name+": true, or remove the key")
			}
		}}
	}
	return []key[C]{
		yes("grpc", "Ask `grpc.health.v1`."),
		{"http", "Ask this path; any answer below 400 is a sign of life.", schema{"type": "string", "pattern": "^/[^ #]*$"},
			func(f *fields, at string, n *yaml.Node, c *C) {
				asked(f, n, "http", c)
				c.Path = f.text(n)
				if !strings.HasPrefix(c.Path, "/") || strings.ContainsAny(c.Path, " \r\n\t#") {
					f.fail(n, fmt.Sprintf("%s %q is not a path", at, short(c.Path)), "write for example: http: /livez")
				}
			}},
		yes("tcp", "It is enough that the port accepts connections."),
		text("service", "With `grpc`: the service whose health is asked.", serviceName, func(c *C) *string { return &c.Service }),
		duration("period", "How often it is asked; 10s without it.", time.Second, time.Hour, func(c *C) *time.Duration { return &c.Period }),
		duration("answer", "How long one answer may take; 3s without it.", 10*time.Millisecond, time.Minute, func(c *C) *time.Duration { return &c.Answer }),
		integer("failures", "After how many bad answers in a row it is restarted; 3 without it.", 1, 100, func(c *C) *int { return &c.Failures }),
	}
}

// yes is a kind of check that is asked for by "true".
func yes(name, doc string) key[m3o.Health] {
	return key[m3o.Health]{name, doc, schema{"const": true}, func(f *fields, at string, n *yaml.Node, h *m3o.Health) {
		kind(f, n, name, h)
		if n.Kind != yaml.ScalarNode || n.Value != "true" {
			f.fail(n, fmt.Sprintf("%s is %q", at, short(n.Value)), "write "+name+": true, or remove the key")
		}
	}}
}

func kind(f *fields, n *yaml.Node, name string, h *m3o.Health) {
	if h.Kind != "" {
		f.fail(n, "health has both "+h.Kind+" and "+name, "keep one of them")
	}
	h.Kind = name
}
