package build

import (
	"errors"
	"strings"
	"time"

	"github.com/moby/buildkit/client"
	"github.com/moby/buildkit/solver/errdefs"
	"github.com/opencontainers/go-digest"
)

// Names of the graph's vertices, as they appear in Result.Steps.
const (
	stepRoot   = "toolchain"
	stepSource = "source"
	stepBuild  = "go build"
	stepVet    = "go vet"
	stepTest   = "go test"
)

// A watch follows a solve: it passes the tools' output on and takes the times.
type watch struct {
	out   *output
	order []digest.Digest
	seen  map[digest.Digest]*client.Vertex
	all   bool // every vertex has output to pass on and is announced, as a Dockerfile's have
}

func newWatch(out *output) *watch {
	return &watch{out: out, seen: map[digest.Digest]*client.Vertex{}}
}

func (w *watch) run(status <-chan *client.SolveStatus) {
	for s := range status {
		for _, v := range s.Vertexes {
			old := w.seen[v.Digest]
			if old == nil {
				w.order = append(w.order, v.Digest)
			}
			w.seen[v.Digest] = v
			plugin, isPlugin := strings.CutPrefix(v.Name, stepPlugin)
			begins := v.Started != nil && (old == nil || old.Started == nil)
			switch {
			case isPlugin && begins && !v.Cached:
				w.out.more("Building %s, once for all apps", strings.Replace(plugin, "@", " ", 1))
			case v.Name == stepBuild && v.Cached && (old == nil || !old.Cached):
				w.out.more("Nothing changed since an earlier build")
			case w.all && begins && strings.HasPrefix(v.Name, "["):
				w.out.more("%s%s", v.Name, map[bool]string{true: " (cached)"}[v.Cached])
			}
		}
		for _, l := range s.Logs {
			if v := w.seen[l.Vertex]; v != nil && (w.all || isTool(v.Name)) {
				w.out.tool(v.Name, l.Data)
			}
		}
	}
}

func isTool(name string) bool {
	return name == stepBuild || name == stepVet || name == stepTest || name == stepGenerate || strings.HasPrefix(name, stepPlugin)
}

// failed is the name of the vertex that ended a solve, "" if none did.
func (w *watch) failed(err error) string {
	if v, ok := errors.AsType[*errdefs.VertexError](err); ok {
		if v := w.seen[digest.Digest(v.Digest)]; v != nil {
			return v.Name
		}
	}
	return ""
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
