package build

import (
	"os"
	"regexp"
	"strconv"
	"testing"
)

// TestBuildkitdKeepsTheBuffersOfBuilds: minutes after builds it held twelve
// megabytes of buffers and as much again that nobody used.
func TestBuildkitdKeepsTheBuffersOfBuilds(t *testing.T) {
	b := builder(t)
	_, out, err := push(t.Context(), t, b, repo(t, hello))
	ok(t, out, err)
	collections := func() int {
		t.Helper()
		p, err := b.askDebug(t.Context(), "/debug/pprof/heap?debug=1")
		if err != nil {
			t.Fatal(err)
		}
		m := regexp.MustCompile(`(?m)^# NumGC = (\d+)$`).FindSubmatch(p)
		if m == nil {
			t.Fatalf("no NumGC in %.200s", p)
		}
		n, err := strconv.Atoi(string(m[1]))
		if err != nil {
			t.Fatal(err)
		}
		return n
	}
	before := collections()
	if err := b.rest(t.Context()); err != nil {
		t.Fatal(err)
	}
	if n := collections() - before; n < 2 {
		t.Errorf("buildkitd collected %d times, want 2: pools outlive the first", n)
	}
	if fi, err := os.Stat(b.debugSocket()); err != nil || fi.Mode().Perm()&0o007 != 0 {
		t.Errorf("others reach the debug server: %v, %v", fi, err)
	}
}

func TestEndOfTheLastBuildIsTold(t *testing.T) {
	q := &queue{free: 2, idle: make(chan struct{}, 1)}
	enter := func() func() {
		done, err := q.enter(t.Context(), "ada", nil)
		if err != nil {
			t.Fatal(err)
		}
		return done
	}
	one, two := enter(), enter()
	one()
	if len(q.idle) != 0 {
		t.Error("told while a build runs")
	}
	two()
	enter()() // nobody has read the first: it is told once
	if len(q.idle) != 1 || q.busy() {
		t.Errorf("told %d times, busy: %t", len(q.idle), q.busy())
	}
}
