package build

import (
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"github.com/m3o/m3o"
)

// eaters are tests of an app that take all there is of one thing.
var eaters = map[string]struct {
	imports, body string
	kind          m3o.Kind
	msg, hint     string
}{
	"memory": {``, `var all [][]byte
	for {
		b := make([]byte, 16<<20)
		for i := 0; i < len(b); i += 4096 {
			b[i] = 1
		}
		all = append(all, b)
	}`, m3o.Unavailable, "the build was killed: builds may use 768 MB of memory together, and it wanted more", "--build-memory"},
	"processes": {`"os/exec"`, `for {
		_ = exec.Command("/proc/self/exe", "-test.run=TestEat").Start()
	}`, m3o.Invalid, "the build was ended: builds may have 300 processes and threads together, and it wanted more", "--build-pids"},
	"disk": {`"os"`, `f, err := os.Create("big")
	for b := make([]byte, 1<<20); err == nil; {
		_, err = f.Write(b)
	}
	t.Fatal(err)`, m3o.Invalid, "the build was ended: it wrote more than 400 MB, all a step of a build may", "--build-disk"},
}

// limit gives b lower limits until the test ends.
func limit(t *testing.T, b *Builder, memory int64, pids int, disk int64) {
	t.Helper()
	lower := func(memory int64, pids int, disk int64) {
		t.Helper()
		steps := filepath.Join(b.cgroup.rootOf("memory"), b.cgroup.steps())
		var err error
		if b.cgroup.v2 {
			err = set(steps, "memory.max", strconv.FormatInt(memory, 10))
		} else {
			_ = set(steps, "memory.memsw.limit_in_bytes", "-1")
			err = limitSteps(steps, memory)
		}
		if err == nil {
			err = set(filepath.Join(b.cgroup.rootOf("pids"), b.cgroup.steps()), "pids.max", strconv.Itoa(pids))
		}
		if err != nil {
			t.Fatal(err)
		}
		b.cfg.Memory, b.cfg.Pids, b.cfg.Disk = memory, pids, disk
		b.guard.mu.Lock()
		defer b.guard.mu.Unlock()
		b.guard.pids, b.guard.disk = pids, disk
	}
	was := b.cfg
	lower(memory, pids, disk)
	t.Cleanup(func() { lower(was.Memory, was.Pids, was.Disk) })
}

func TestGreedyBuildIsEndedWithTheReason(t *testing.T) {
	b := builder(t)
	limit(t, b, 768<<20, 300, 400<<20)
	gen, err := b.await(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	for name, c := range eaters {
		t.Run(name, func(t *testing.T) {
			_, out, err := push(t.Context(), t, b, repo(t, map[string]string{
				"go.mod": hello["go.mod"], "main.go": "package main\n\nfunc main() {}\n", "m3o.yaml": "build:\n  test: true\n",
				"main_test.go": "package main\n\nimport (\n\t\"testing\"\n\t" + c.imports + "\n)\n\nfunc TestEat(t *testing.T) {\n\t" + c.body + "\n}\n",
			}))
			if m3o.KindOf(err) != c.kind || err.Error() != c.msg || !strings.Contains(m3o.HintOf(err), c.hint) {
				t.Errorf("Build = %v (hint %q), want %s\n%s", err, m3o.HintOf(err), c.msg, out)
			}
			eventually(t, "end of the step", func() bool { return len(b.cgroup.running()) == 0 })
		})
	}
	if b.diedSince(gen) {
		t.Error("a greedy build took buildkitd with it")
	}
	_, out, err := push(t.Context(), t, b, repo(t, hello))
	ok(t, out, err)
}

func TestMountsThatCanBeWritten(t *testing.T) {
	const info = `22 1 0:20 / / rw,relatime - overlay overlay rw,lowerdir=a,upperdir=b
23 22 0:21 / /proc rw,nosuid - proc proc rw
24 22 0:22 / /tmp rw - tmpfs tmpfs rw
25 22 254:0 /x /var/cache/go\040build rw,relatime shared:1 - ext4 /dev/vda rw
26 22 254:0 /y /src ro,relatime - ext4 /dev/vda rw
broken
27 22 254:0 /z /short - `
	if got := strings.Join(writable(info), "|"); got != "/|/var/cache/go build" {
		t.Errorf("writable = %q", got)
	}
}

func FuzzWritable(f *testing.F) {
	f.Add("25 22 254:0 /x /var/cache/go\\040build rw,relatime shared:1 - ext4 /dev/vda rw\n")
	f.Add("1 2 3:4 / \\777\\9 rw - x")
	f.Fuzz(func(t *testing.T, s string) {
		if n := len(writable(s)); n > strings.Count(s, "\n")+1 {
			t.Errorf("%d mounts of %q", n, s)
		}
	})
}
