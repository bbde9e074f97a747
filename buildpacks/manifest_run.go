package buildpacks

import (
	"fmt"
	"regexp"
	"strconv"
	"strings"
	"time"

	"github.com/m3o/m3o"
	"gopkg.in/yaml.v3"
)

// RunKeys are the keys of m3o.yaml that say how the app runs.
type RunKeys struct {
	Processes map[string]ProcessKeys
	Sleep     SleepKeys
	Rollback  string // "auto" or ""
}

// ProcessKeys are what m3o.yaml says of one process type.
type ProcessKeys struct {
	Instances int // one more than the file says; 0 when it does not say
	Limits    m3o.Limits
	Scaling   m3o.Scaling
}

// SleepKeys say when the app sleeps.
type SleepKeys struct{ After time.Duration }

// runKeys say how the app runs.
func runKeys() []key[Manifest] {
	type P = ProcessKeys
	return []key[Manifest]{
		each("processes", "How each process type runs. `m3o ps:scale` and `m3o ps:autoscale` go before it.", typeName,
			func(m *Manifest) *map[string]P { return &m.Run.Processes }, []key[P]{
				{"instances", "How many; 1 without it, 0 for none.", schema{"type": "integer", "minimum": 0, "maximum": 100},
					func(f *fields, at string, n *yaml.Node, p *P) {
						integer("", "", 0, 100, func(p *P) *int { return &p.Instances }).read(f, at, n, p)
						p.Instances++
					}},
				{"memory", "The most memory an instance may use; 512MB without it.", schema{"type": "string", "pattern": "^[0-9]+(MB|GB)$"},
					func(f *fields, at string, n *yaml.Node, p *P) {
						b, err := ParseBytes(f.text(n))
						if err != nil && f.err == nil {
							f.fail(n, fmt.Sprintf("%s is %q", at, short(n.Value)), "write a size from 8MB to 1024GB, such as 512MB")
						}
						p.Limits.MemoryBytes = b
					}},
				{"cpu", "The most CPU an instance may use, in cores; no limit without it.", schema{"type": "number", "minimum": 0.01, "maximum": 1024},
					func(f *fields, at string, n *yaml.Node, p *P) {
						c, err := ParseCores(f.text(n))
						if err != nil && f.err == nil {
							f.fail(n, fmt.Sprintf("%s is %q", at, short(n.Value)), "write a number of cores from 0.01 to 1024, such as 0.5")
						}
						p.Limits.CPUMillis = c
					}},
				number("pids", "The most processes and threads; 1024 without it.", m3o.MinPids, m3o.MaxPids, func(p *P) *int64 { return &p.Limits.Pids }),
				number("files", "The most open files; 65536 without it.", m3o.MinFiles, m3o.MaxFiles, func(p *P) *int64 { return &p.Limits.Files }),
				duration("grace", "From SIGTERM to SIGKILL; 30s without it.", m3o.MinGrace, m3o.MaxGrace, func(p *P) *time.Duration { return &p.Limits.Grace }),
				group("autoscale", "Lets the number of instances follow the load.", func(p *P) *m3o.Scaling { return &p.Scaling }, []key[m3o.Scaling]{
					integer("min", "The fewest instances; 1 without it.", 1, 1000, func(s *m3o.Scaling) *int { return &s.Min }),
					integer("max", "The most instances.", 1, 1000, func(s *m3o.Scaling) *int { return &s.Max }),
					integer("concurrency", "How many requests in flight an instance should have.", 1, 100_000, func(s *m3o.Scaling) *int { return &s.Concurrency }),
					integer("cpu", "How many percent of its CPU limit, or of one core, an instance should use.", 1, 100, func(s *m3o.Scaling) *int { return &s.CPU }),
				}),
			}),
		group("sleep", "Stops the app while nobody uses it; the next request starts it.", func(m *Manifest) *SleepKeys { return &m.Run.Sleep }, []key[SleepKeys]{
			duration("after", "How long without a request.", time.Second, 30*24*time.Hour, func(s *SleepKeys) *time.Duration { return &s.After }),
		}),
		choice("rollback", "With `auto`, a release that starts crashing within five minutes of going live is rolled back.", []string{"auto", "manual"},
			func(m *Manifest) *string { return &m.Run.Rollback }),
	}
}

func number[T any](name, doc string, low, high int, field func(*T) *int64) key[T] {
	k := integer(name, doc, low, high, func(*T) *int { return new(int) })
	read := k.read
	k.read = func(f *fields, at string, n *yaml.Node, into *T) {
		read(f, at, n, into)
		*field(into), _ = strconv.ParseInt(n.Value, 10, 64)
	}
	return k
}

var sizeForm = regexp.MustCompile(`^([0-9]{1,6})(MB|GB|M|G)$`)

// ParseBytes reads a size such as 512MB or 2GB (1024-fold), between 8 MB and 1 TB.
func ParseBytes(s string) (int64, error) {
	m := sizeForm.FindStringSubmatch(strings.ToUpper(s))
	if m == nil {
		return 0, m3o.Errorf(m3o.Invalid, "%q is no size such as 512MB or 2GB", short(s))
	}
	n, _ := strconv.ParseInt(m[1], 10, 64)
	n <<= 20
	if m[2][0] == 'G' {
		n <<= 10
	}
	if n < m3o.MinMemory || n > m3o.MaxMemory {
		return 0, m3o.Errorf(m3o.Invalid, "%s is not between 8MB and 1024GB", short(s))
	}
	return n, nil
}

// ParseCores reads a number of cores such as 0.5 as thousandths.
func ParseCores(s string) (int64, error) {
	c, err := strconv.ParseFloat(s, 64)
	if err != nil || !(c >= 0.01 && c <= 1024) {
		return 0, m3o.Errorf(m3o.Invalid, "%q is no number of cores from 0.01 to 1024", short(s))
	}
	return int64(c*1000 + 0.5), nil
}

// apply puts into a plan what m3o.yaml says of its process types.
func (r RunKeys) apply(p *Plan, unknown func(name string) error) error {
	for name, k := range r.Processes {
		proc, ok := p.Processes[name]
		if !ok {
			return unknown(name)
		}
		if k.Instances > 0 {
			proc.Replicas = k.Instances - 1
		}
		proc.Limits, proc.Scaling = k.Limits, k.Scaling
		if s := &proc.Scaling; *s != (m3o.Scaling{}) {
			s.Min = max(s.Min, 1)
			if s.Max < s.Min || !s.On() {
				return &m3o.Error{Kind: m3o.Invalid, Msg: fmt.Sprintf("%s: processes.%s.autoscale needs a max of at least its min, and concurrency or cpu", ManifestName, name),
					Hint: "write for example:\n  autoscale:\n    min: 1\n    max: 5\n    concurrency: 50"}
			}
		}
		p.Processes[name] = proc
	}
	return nil
}
