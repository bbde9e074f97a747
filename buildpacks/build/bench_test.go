package build

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"github.com/m3o/m3o/internal/need"
)

// BenchmarkOneLineChange compares, in turns, the whole of a build of a tree
// in which one line changed with `go build` on the host, both with warm
// caches, and reports the medians. "noop" is a build of an unchanged tree.
func BenchmarkOneLineChange(b *testing.B) {
	need.Registry(b)
	bd := builder(b)
	for _, app := range []string{"hello-http", "hello-grpc"} {
		b.Run(app, func(b *testing.B) {
			dir := filepath.Join(need.RepoRoot(b), "testdata/apps", app)
			r := &testRepo{t: b, work: b.TempDir(), bare: filepath.Join(b.TempDir(), "app.git")}
			r.git("init", "-q", "-b", "main")
			if err := os.CopyFS(r.work, os.DirFS(dir)); err != nil {
				b.Fatal(err)
			}
			src := r.commit(nil)
			src.App = app
			cold := time.Now()
			if _, out, err := push(b.Context(), b, bd, src); err != nil {
				b.Fatalf("%v\n%s", err, out)
			}
			b.Logf("first build %v", time.Since(cold))
			if out, err := hostBuild(r.work); err != nil {
				b.Fatalf("%v\n%s", err, out)
			}
			var ours, host, noop []time.Duration
			last := map[string]time.Duration{}
			for n := 0; b.Loop(); n++ {
				src := r.commit(map[string]string{"change.go": fmt.Sprintf("package main\n\nvar change%d = %d\n\nfunc init() { println(change%[1]d) }\n", n%7, time.Now().UnixNano())})
				src.App = app
				t := time.Now()
				if out, err := hostBuild(r.work); err != nil {
					b.Fatalf("%v\n%s", err, out)
				}
				host = append(host, time.Since(t))
				t = time.Now()
				res, out, err := push(b.Context(), b, bd, src)
				if err != nil {
					b.Fatalf("%v\n%s", err, out)
				}
				ours = append(ours, time.Since(t))
				for _, s := range res.Steps {
					last[s.Name] = s.Took
				}
				t = time.Now()
				if _, out, err := push(b.Context(), b, bd, src); err != nil {
					b.Fatalf("%v\n%s", err, out)
				}
				noop = append(noop, time.Since(t))
			}
			b.ReportMetric(median(ours).Seconds(), "s/build")
			b.ReportMetric(median(host).Seconds(), "s/host")
			b.ReportMetric(median(noop).Seconds(), "s/noop")
			b.ReportMetric(median(ours).Seconds()/median(host).Seconds(), "ratio")
			b.Logf("builds %v\nhost %v\nnoop %v\nsteps of the last build: %v", ours, host, noop, last)
		})
	}
}

// hostBuild is what the same change costs without any of this.
func hostBuild(dir string) ([]byte, error) {
	cmd := exec.Command("go", "build", "-trimpath", "-buildvcs=false", "-ldflags=-s -w", "-o", filepath.Join(dir, "..", "host-binary"), ".")
	cmd.Dir = dir
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0", "GOWORK=off")
	return cmd.CombinedOutput()
}

func median(ds []time.Duration) time.Duration {
	s := slices.Sorted(slices.Values(ds))
	return s[len(s)/2]
}
