package build

import (
	"strings"
	"time"

	"github.com/moby/buildkit/client"
	"github.com/opencontainers/go-digest"
)

// Names of the graph's vertices, as they appear in Result.Steps.
const (
	stepRoot   = "toolchain"
	stepSource = "source"
	stepBuild  = "go build"
)

// A watch follows a solve: it passes the tools' output on and takes the times.
type watch struct {
	out   *output
	order []digest.Digest
	seen  map[digest.Digest]*client.Vertex
	tools map[digest.Digest]bool
	told  map[digest.Digest]bool // that a plugin is being built
}

func newWatch(out *output) *watch {
	return &watch{out: out, seen: map[digest.Digest]*client.Vertex{}, tools: map[digest.Digest]bool{}, told: map[digest.Digest]bool{}}
}

func (w *watch) run(status <-chan *client.SolveStatus) {
	for s := range status {
		for _, v := range s.Vertexes {
			if w.seen[v.Digest] == nil {
				w.order = append(w.order, v.Digest)
			}
			w.seen[v.Digest] = v
			w.tools[v.Digest] = v.Name == stepBuild || v.Name == stepGenerate || strings.HasPrefix(v.Name, stepPlugin)
			if p, ok := strings.CutPrefix(v.Name, stepPlugin); ok && v.Started != nil && !v.Cached && !w.told[v.Digest] {
				w.told[v.Digest] = true
				w.out.more("Building %s, once for all apps", strings.Replace(p, "@", " ", 1))
			}
			if v.Name == stepBuild && v.Cached {
				w.out.more("Nothing changed since an earlier build")
			}
		}
		for _, l := range s.Logs {
			if w.tools[l.Vertex] {
				w.out.tool(l.Data)
			}
		}
	}
}

// steps are the vertices in the order they came up. A vertex that was not run has no time.
func (w *watch) steps() []Step {
	var out []Step
	for _, d := range w.order {
		v := w.seen[d]
		s := Step{Name: v.Name, Cached: v.Cached}
		if v.Started != nil && v.Completed != nil {
			s.Took = v.Completed.Sub(*v.Started).Round(time.Millisecond)
		}
		out = append(out, s)
	}
	return out
}
