//go:build linux

package main

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/m3o/m3o/internal/need"
)

func TestMedian(t *testing.T) {
	for _, c := range []struct {
		in   durations
		want time.Duration
	}{{nil, 0}, {durations{3}, 3}, {durations{9, 1, 5}, 5}, {durations{4, 1, 2, 100}, 3}} {
		if got := c.in.median(); got != c.want {
			t.Errorf("median of %v = %v, want %v", c.in, got, c.want)
		}
	}
}

// What git prints arrives in pieces; the spans are those of the steps, and
// together they are the whole push.
func TestTimelineOfAPush(t *testing.T) {
	var seen []string
	tl := &timeline{began: time.Now(), seen: func(s string) { seen = append(seen, s) }}
	for _, p := range []string{"Enumerating objects: 5\rEnumerating objects: 5, done.\n", "remote: ----", "-> Building        \nremote:        main.go        \n",
		"remote: \nremote: -----> Releasing v12\n", "remote: -----> Starting web (1)\nremote:        Released v12 in 3.4s (build 2.1s, start 0.2s)\n", "To ssh://x\n"} {
		if _, err := io.WriteString(tl, p); err != nil {
			t.Fatal(err)
		}
	}
	want := []string{"Enumerating objects: 5", "Enumerating objects: 5, done.", "remote: -----> Building", "remote:        main.go", "remote:",
		"remote: -----> Releasing v12", "remote: -----> Starting web (1)", "remote:        Released v12 in 3.4s (build 2.1s, start 0.2s)", "To ssh://x"}
	if d := cmp.Diff(want, seen); d != "" {
		t.Error(d)
	}
	end := time.Since(tl.began)
	var sum time.Duration
	var names []string
	for _, s := range spans(tl.lines, end) {
		sum += s.took
		names = append(names, s.what)
	}
	if sum != end {
		t.Errorf("the spans add up to %s, want %s", sum, end)
	}
	want = []string{"until the first line: ssh, pack, hook, tree", "step: Building", "step: Releasing vN", "step: Starting web (N)", "after “Released”: until git push has ended"}
	if d := cmp.Diff(want, names); d != "" {
		t.Error(d)
	}
}

func TestParseStat(t *testing.T) {
	line := "4711 (a b) (c) S 12 4711 4711 0 -1 4194560 1 2 3 4 10 20 300 4000 20 0 1 0 99 1 1 1\n"
	p, err := parseStat([]byte(line))
	if err != nil || p.pid != 4711 || p.parent != 12 || p.cpu != 4330*tick {
		t.Errorf("parseStat(%q) = %+v, %v", line, p, err)
	}
	for _, bad := range []string{"", "1 (x", "(x) S 1", "1 (x) S 1 2", "1 (x) S y" + strings.Repeat(" 1", 20), "1 (x) S 1" + strings.Repeat(" z", 20)} {
		if p, err := parseStat([]byte(bad)); err == nil {
			t.Errorf("parseStat(%q) = %+v, want an error", bad, p)
		}
	}
}

func TestOwnProcessIsFoundAndMeasured(t *testing.T) {
	ps, err := processes()
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range ps {
		if p.pid != os.Getpid() {
			continue
		}
		if p.parent != os.Getppid() || !p.names(filepath.Dir(os.Args[0])) {
			t.Errorf("found %+v", p)
		}
		m, err := memoryOf(p)
		if err != nil || m.rss < 1<<20 || m.pss > m.rss || m.anon > m.pss {
			t.Errorf("memory %+v, %v", m, err)
		}
		return
	}
	t.Error("the test's own process is not in the list")
}

func TestPartsOfABox(t *testing.T) {
	ps := []process{
		{pid: 10, parent: 1, args: []string{"/b/m3od"}},
		{pid: 11, parent: 1, args: []string{"/b/m3od", "router", "--data", "/t/x/data"}},
		{pid: 12, parent: 10, args: []string{"/b/buildkitd", "--config", "/t/x/data/build/buildkitd.toml"}},
		{pid: 13, parent: 1, args: []string{"/b/m3o-shim", "-bundle", "/t/x/data/runtime/a"}},
		{pid: 14, parent: 13, args: []string{"/app/web"}},
		{pid: 15, parent: 13, args: []string{"runc", "delete"}},
		{pid: 16, parent: 13}, // a zombie
		{pid: 20, parent: 1, args: []string{"/b/m3od", "router", "--data", "/t/x/data2"}}, // somebody else's
		{pid: 21, parent: 1, args: []string{"/b/m3o-shim", "-bundle", "/t/y/data/a"}},
		{pid: 22, parent: 21, args: []string{"/app/web"}},
	}
	got := partsOf(ps, "/t/x/data", 10)
	for _, c := range []struct {
		what string
		got  []process
		want int
	}{{"daemon", got.daemon, 10}, {"router", got.router, 11}, {"buildkitd", got.buildkit, 12}, {"shim", got.shims, 13}, {"app", got.apps, 14}} {
		if len(c.got) != 1 || c.got[0].pid != c.want {
			t.Errorf("%s: %+v, want pid %d", c.what, c.got, c.want)
		}
	}
}

func TestCPUGroup(t *testing.T) {
	const v1 = "30 25 0:26 / /sys/fs/cgroup/unified rw,nosuid - cgroup2 cgroup2 rw\n" +
		"33 25 0:29 / /sys/fs/cgroup/cpu,cpuacct rw,nosuid shared:9 - cgroup cgroup rw,cpu,cpuacct\n" +
		"34 25 0:30 / /sys/fs/cgroup/cpuset rw,nosuid - cgroup cgroup rw,cpuset\n"
	const v2 = "30 25 0:26 / /sys/fs/cgroup rw,nosuid shared:4 - cgroup2 cgroup2 rw\n"
	for _, c := range []struct{ groups, mounts, root, group, file string }{
		{"5:cpuset:/a\n3:cpu,cpuacct:/m3o/daemon\n0::/x\n", v1, "/sys/fs/cgroup/cpu,cpuacct", "/m3o/daemon", "cpu.shares"},
		{"0::/m3o/daemon\n", v2, "/sys/fs/cgroup", "/m3o/daemon", "cpu.weight"},
		{"0::/m3o/daemon\n", "", "", "", ""},
		{"rubbish\n:::\n", v2, "", "", ""},
	} {
		root, group, file := cpuGroup(c.groups, c.mounts)
		if root != c.root || group != c.group || file != c.file {
			t.Errorf("cpuGroup(%q, %q) = %q, %q, %q, want %q, %q, %q", c.groups, c.mounts, root, group, file, c.root, c.group, c.file)
		}
	}
}

func TestRollbackMillis(t *testing.T) {
	if d, err := rollbackMillis([]byte(`{"release":{"version":3},"from":2,"millis":"123"}`)); err != nil || d != 123*time.Millisecond {
		t.Errorf("got %s, %v", d, err)
	}
	if _, err := rollbackMillis([]byte(`{"millis":`)); err == nil {
		t.Error("broken JSON is no error")
	}
}

// The samples' lines that a round changes are there, one each.
func TestSamplesHaveAVersion(t *testing.T) {
	for _, s := range samples {
		src, err := os.ReadFile(filepath.Join(need.RepoRoot(t), "testdata", "apps", s.name, "main.go"))
		if err != nil {
			t.Fatal(err)
		}
		if n := len(s.version.FindAll(src, -1)); n != 1 {
			t.Errorf("%s has %d lines like %s, want 1", s.name, n, s.version)
		}
	}
}

// The history is the same on every run, or two machines' figures would not compare.
func TestHistoryIsDeterministic(t *testing.T) {
	var sums []string
	for range 2 {
		h := sha256.New()
		p := newPast(150)
		if err := p.commits(h, "", 200, 200); err != nil {
			t.Fatal(err)
		}
		if err := p.commits(h, "refs/heads/main^0", 1, 200); err != nil {
			t.Fatal(err)
		}
		sums = append(sums, hex.EncodeToString(h.Sum(nil)))
	}
	if sums[0] != sums[1] {
		t.Errorf("two histories of one seed differ: %v", sums)
	}
}

func TestHistoryIsWhatGitTakes(t *testing.T) {
	git := need.Program(t, "git")
	dir := t.TempDir()
	cmd := func(in io.Reader, args ...string) string {
		t.Helper()
		c := exec.Command(git, append([]string{"-C", dir}, args...)...)
		c.Stdin = in
		out, err := c.CombinedOutput()
		if err != nil {
			t.Fatalf("git %v: %v: %s", args, err, out)
		}
		return strings.TrimSpace(string(out))
	}
	cmd(nil, "init", "-q", "--bare", "-b", "main")
	p := newPast(150)
	for _, part := range []struct {
		parent string
		n      int
	}{{"", 200}, {"refs/heads/main^0", 1}} {
		var buf bytes.Buffer
		if err := p.commits(&buf, part.parent, part.n, 200); err != nil {
			t.Fatal(err)
		}
		cmd(&buf, "fast-import", "--quiet")
	}
	if got := cmd(nil, "rev-list", "--count", "main"); got != "201" {
		t.Errorf("%s commits, want 201", got)
	}
	if got := strings.Count(cmd(nil, "ls-tree", "-r", "--name-only", "main"), "\n") + 1; got != 150 {
		t.Errorf("%d files, want 150", got)
	}
	cmd(nil, "fsck", "--strict")
}

// The reference takes a push as a real sshd does, and its CPU is counted.
func TestOpenSSHIsAReference(t *testing.T) {
	need.Program(t, "git")
	need.Program(t, "ssh")
	need.Program(t, "sshd")
	dir := t.TempDir()
	b := &bench{dir: dir, box: &box{dir: dir, home: filepath.Join(dir, "home")}}
	if err := b.box.makeKey(t.Context()); err != nil {
		t.Fatal(err)
	}
	s, err := b.startSSHD(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	defer s.stop()
	repo, err := b.makeHistory(t.Context(), newPast(300), 300)
	if err != nil {
		t.Fatal(err)
	}
	g := &gitServer{name: "OpenSSH", cpu: s.cpu}
	if g.url, err = s.repository(t.Context(), "here.git"); err != nil {
		t.Fatal(err)
	}
	if err := g.push(t.Context(), b, repo, &g.full, &g.fullCPU, &g.client); err != nil {
		t.Fatal(err)
	}
	if g.full.last() <= 0 || g.fullCPU.last() <= 0 || g.client.last() <= 0 {
		t.Errorf("clock %v, server's CPU %v, client's %v", g.full, g.fullCPU, g.client)
	}
	head := func(dir string) string {
		t.Helper()
		out, err := b.box.run(t.Context(), dir, "git", "rev-parse", "main")
		if err != nil {
			t.Fatal(err)
		}
		return out
	}
	if got, want := head(filepath.Join(s.repos, "here.git")), head(repo); got != want {
		t.Errorf("the server has %s, want %s", got, want)
	}
}

func TestReport(t *testing.T) {
	r := &report{machine: []string{"a CPU"}, rounds: 3, sections: []*section{{title: "One", rows: []row{{"a", "≤ 1 s", "0.5 s", "go build", "2×", verdict(true)}},
		tables: []table{{title: "Detail", head: []string{"part", "median"}, cells: [][]string{{"first", "1 s"}, {"second"}}}}, notes: []string{"A note."}}}}
	got := r.String()
	for _, want := range []string{"| what | budget | m3o   | reference | ratio |        |\n", "| a    | ≤ 1 s  | 0.5 s | go build  | 2×    | within |\n", "\n## One\n\nA note.\n\nDetail\n\n",
		"| part   | median |\n| ------ | ------ |\n| first  | 1 s    |\n| second |        |\n"} {
		if !strings.Contains(got, want) {
			t.Errorf("the report does not contain %q:\n%s", want, got)
		}
	}
}

func TestMisuse(t *testing.T) {
	for _, args := range [][]string{{"-rounds", "0"}, {"-only", "nothing"}, {"-only", "memory,"}, {"stray"}, {"-bogus"}} {
		var errOut strings.Builder
		if code := run(t.Context(), args, io.Discard, &errOut); code != 2 || errOut.Len() == 0 {
			t.Errorf("%v: exit %d, %q; want 2 and a reason", args, code, errOut.String())
		}
	}
}

func FuzzParseProc(f *testing.F) {
	f.Add([]byte("4711 (a b) (c) S 12 4711 4711 0 -1 4194560 1 2 3 4 10 20 300 4000 20 0\n"))
	f.Add([]byte("00400000-7fff ---p 00000000 00:00 0 [rollup]\nRss:  1828 kB\nPss: 300 kB\nPss_Anon: 9 kB\n"))
	f.Add([]byte("1 ()"))
	f.Add([]byte("Rss: x kB\n"))
	f.Fuzz(func(t *testing.T, b []byte) {
		if p, err := parseStat(b); err == nil && !bytes.Contains(b, fmt.Append(nil, p.parent)) {
			t.Errorf("%q has no parent %d", b, p.parent)
		}
		if m, err := parseRollup(b); err == nil && !bytes.Contains(b, []byte("Pss_Anon:")) {
			t.Errorf("%q gave %+v", b, m)
		}
	})
}

// Whatever is printed, the spans of a push are its whole time.
func FuzzSpans(f *testing.F) {
	f.Add("remote: -----> A\nremote:        Released v1 in 1s\n")
	f.Add("remote:\r\n-----> \n")
	f.Fuzz(func(t *testing.T, said string) {
		tl := &timeline{began: time.Now(), seen: func(string) {}}
		if n, err := io.WriteString(tl, said); n != len(said) || err != nil {
			t.Fatalf("wrote %d, %v", n, err)
		}
		var sum time.Duration
		for _, s := range spans(tl.lines, time.Hour) {
			sum += s.took
		}
		if sum != time.Hour {
			t.Errorf("the spans of %q add up to %s", said, sum)
		}
	})
}

// A sample belongs to the innermost function that a group knows.
func TestSharesOfAProfile(t *testing.T) {
	const sep = "-----------+-------------------------------------------------------\n"
	got := shares("File: x\nType: cpu\n" + sep +
		"      30ms   runtime.mallocgc\n             github.com/m3o/m3o/gateway.open\n             net/http.(*conn).serve\n" + sep +
		"      10ms   github.com/m3o/m3o/gateway.(*plan).print (inline)\n             net/http.(*conn).serve\n" + sep +
		"      50ms   internal/runtime/syscall/linux.Syscall6\n             syscall.write\n             net/http.(*conn).serve\n" + sep +
		"      10ms   main.main\n" + sep)
	want := [][]string{{"kernel: read, write, poll", "50 %"}, {"garbage collection and allocation", "30 %"},
		{"gateway: messages and metadata", "10 %"}, {"other", "10 %"}}
	if d := cmp.Diff(want, got); d != "" {
		t.Error(d)
	}
}

func TestOrderIsAboutAKilobyte(t *testing.T) {
	if n := len(order); n < 900 || n > 1200 {
		t.Errorf("%d bytes", n)
	}
}
