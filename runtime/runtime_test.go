package runtime

import (
	"bytes"
	"encoding/json"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/m3o/m3o"
)

func TestNewIDIsAHostNameLabel(t *testing.T) {
	label := regexp.MustCompile(`^[a-z0-9]([a-z0-9-]*[a-z0-9])?$`)
	seen := map[string]bool{}
	for _, r := range []Ref{{"hello", "web", 1}, {"Hello_World", "Worker_2", 0},
		{strings.Repeat("a", 40), strings.Repeat("b", 60), 123456}, {strings.Repeat("a", 55), "-x", 1}, {strings.Repeat("a", 50) + "-v", "b", 7}} {
		for range 50 {
			id := NewID(r)
			if len(id) > 63 || !label.MatchString(id) {
				t.Errorf("NewID(%v) = %q, not a label", r, id)
			}
			if seen[id] {
				t.Errorf("%q came twice", id)
			}
			seen[id] = true
		}
	}
}

func TestPauseDoublesWithinBounds(t *testing.T) {
	for n := -1; n < 100; n++ {
		want := min(200*time.Millisecond<<min(max(n, 0), 20), time.Minute)
		for range 20 {
			if got := pause(n); got < want*8/10 || got > want*12/10 {
				t.Fatalf("pause(%d) = %v, want %v give or take a fifth", n, got, want)
			}
		}
	}
}

func instances(r Ref, phases ...m3o.Phase) map[string]*instance {
	have := map[string]*instance{}
	for i, p := range phases {
		in := newInstance(record{ID: fmt.Sprintf("%s-%d", r.file(), i), Workload: Workload{Ref: r}})
		in.Phase, in.At = p, time.Unix(int64(i), 0)
		have[in.ID] = in
	}
	return have
}

func TestPlan(t *testing.T) {
	a, b := Ref{"a", "web", 1}, Ref{"b", "web", 1}
	wants := func(n int) map[Ref]want { return map[Ref]want{a: {Workload{Ref: a}, n}} }
	for _, tc := range []struct {
		name  string
		wants map[Ref]want
		have  map[string]*instance
		stop  []string
		start int
	}{
		{"nothing", nil, nil, nil, 0},
		{"all missing", wants(3), nil, nil, 3},
		{"enough", wants(2), instances(a, m3o.Ready, m3o.Exited), nil, 0},
		{"one too many, the worst goes", wants(2), instances(a, m3o.Ready, m3o.Exited, m3o.Ready), []string{"a.web.v1-1"}, 0},
		{"all well, the newest goes", wants(2), instances(a, m3o.Ready, m3o.Ready, m3o.Ready), []string{"a.web.v1-2"}, 0},
		{"unwanted", wants(1), instances(b, m3o.Ready, m3o.Unhealthy), []string{"b.web.v1-0", "b.web.v1-1"}, 1},
		{"none wanted", wants(0), instances(a, m3o.Ready), []string{"a.web.v1-0"}, 0},
	} {
		t.Run(tc.name, func(t *testing.T) {
			stop, start := plan(tc.wants, tc.have)
			slices.Sort(stop)
			if !slices.Equal(stop, tc.stop) || len(start) != tc.start {
				t.Errorf("plan = stop %v, start %d, want %v, %d", stop, len(start), tc.stop, tc.start)
			}
			for _, id := range stop {
				tc.have[id].stopped = true
			}
			// What was told to go is not told again, and not replaced by itself.
			if again, more := plan(tc.wants, tc.have); len(again) != 0 || len(more) != tc.start {
				t.Errorf("plan again = stop %v, start %d", again, len(more))
			}
		})
	}
}

func TestWatcherFarBehindIsCutOff(t *testing.T) {
	var h hub
	w := h.subscribe()
	for i := range backlog + 1 {
		h.publish(m3o.Instance{ID: fmt.Sprint(i)})
	}
	n := 0
	var last error
	w.each(t.Context(), nil, func(_ m3o.Instance, err error) bool {
		n, last = n+1, err
		return err == nil
	})
	if m3o.KindOf(last) != m3o.Unavailable || n > backlog+2 {
		t.Errorf("after %d changes: %v, want Unavailable", n, last)
	}
	if len(h.watchers) != 0 {
		t.Error("it is still watching")
	}
}

func TestReadListeners(t *testing.T) {
	const head = "  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode\n"
	got, err := ReadListeners(strings.NewReader(head+
		"   0: 0100007F:1F90 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 11 1 0 100 0 0 10 0\n"+
		"   1: 00000000:0BB8 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 12 1 0 100 0 0 10 0\n"+
		"   2: 0100007F:1F91 00000000:0000 01 00000000:00000000 00:00000000 00000000     0        0 13 1 0 100 0 0 10 0\n"+
		"   0: 00000000000000000000000000000000:1F92 00000000000000000000000000000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 14 1 0 100 0 0 10 0\n"+
		"   0: 0000000000000000FFFF00000100007F:1F93 00000000000000000000000000000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 15 1 0 100 0 0 10 0\n"),
		map[string]bool{"11": true, "12": true, "14": true, "15": true})
	want := []netip.AddrPort{netip.MustParseAddrPort("127.0.0.1:8080"), netip.MustParseAddrPort("0.0.0.0:3000"),
		netip.MustParseAddrPort("[::]:8082"), netip.MustParseAddrPort("127.0.0.1:8083")}
	if err != nil || !slices.Equal(got, want) {
		t.Errorf("ReadListeners = %v, %v, want %v", got, err, want)
	}
}

func FuzzReadListeners(f *testing.F) {
	f.Add("   0: 0100007F:1F90 00000000:0000 0A 0 0 0 0 0 11\n")
	f.Add("   0: 01:1F90 00000000:0000 0A 0 0 0 0 0 11\n")
	f.Add("   0: 0100007F 00000000:0000 0A 0 0 0 0 0 11\n")
	f.Fuzz(func(t *testing.T, s string) {
		got, err := ReadListeners(strings.NewReader(s), nil)
		for _, a := range got {
			if !a.IsValid() && err == nil {
				t.Errorf("ReadListeners(%q) has an invalid address", s)
			}
		}
	})
}

func TestReadImageRefusesWhatIsNotOne(t *testing.T) {
	dir := t.TempDir()
	blobs := filepath.Join(dir, "blobs", "sha256")
	if err := os.MkdirAll(blobs, 0o755); err != nil {
		t.Fatal(err)
	}
	absent := "sha256:" + strings.Repeat("ab", 32)
	if err := os.WriteFile(filepath.Join(blobs, strings.Repeat("cd", 32)), []byte("{}"), 0o600); err != nil {
		t.Fatal(err)
	}
	for digest, want := range map[string]m3o.Kind{
		"": m3o.Invalid, "latest": m3o.Invalid, "sha256:../../etc/passwd": m3o.Invalid, "sha256:" + strings.Repeat("AB", 32): m3o.Invalid,
		absent: m3o.NotFound, "sha256:" + strings.Repeat("cd", 32): m3o.Invalid, // the content has another digest
	} {
		if _, err := ReadImage(dir, digest); m3o.KindOf(err) != want || err == nil {
			t.Errorf("ReadImage(%q) = %v, want %v", digest, err, want)
		}
	}
}

func FuzzImageDocuments(f *testing.F) {
	d := "sha256:" + strings.Repeat("ab", 32)
	f.Add([]byte(`{"config":{"digest":"`+d+`"},"layers":[{"digest":"`+d+`","size":3}]}`), []byte(`{"config":{"Entrypoint":["/a"],"WorkingDir":"w"},"rootfs":{"diff_ids":["`+d+`"]}}`))
	f.Add([]byte(`{"manifests":[{"digest":"x","platform":{"os":"linux","architecture":"amd64"}}]}`), []byte(`{}`))
	f.Add([]byte(`[]`), []byte(`null`))
	f.Fuzz(func(t *testing.T, man, conf []byte) {
		m, err := parseManifest(man)
		if err != nil {
			return
		}
		im, err := parseConfig(conf, m.layers)
		if err != nil {
			if m3o.KindOf(err) != m3o.Invalid {
				t.Errorf("%v is not Invalid", err)
			}
			return
		}
		for _, l := range im.Layers {
			if !digestForm.MatchString(l.Digest) || !digestForm.MatchString(l.DiffID) {
				t.Errorf("layer %+v passed", l)
			}
		}
		if !filepath.IsAbs(im.WorkDir) {
			t.Errorf("working directory %q is not absolute", im.WorkDir)
		}
	})
}

func FuzzLogLine(f *testing.F) {
	f.Add([]byte("2026-01-02T03:04:05.000000006Z o hello\n"))
	f.Add([]byte("2026-01-02T03:04:05.000000006Z e \r\n"))
	f.Add([]byte("o hello"))
	f.Add([]byte("2026-01-02T03:04:05Z x y"))
	f.Fuzz(func(t *testing.T, b []byte) {
		if ln, ok := parseLine(b); ok && (ln.Stream != "stdout" && ln.Stream != "stderr" || ln.Time.IsZero() && !bytes.HasPrefix(b, []byte("0001"))) {
			t.Errorf("parseLine(%q) = %+v", b, ln)
		}
	})
}

func TestLogTailsAndFollowsAcrossRotation(t *testing.T) {
	logs := Logs{Dir: t.TempDir()}
	r := Ref{"hello", "web", 1}
	path, err := logs.Path(r, "hello-web-v1-x")
	if err != nil {
		t.Fatal(err)
	}
	w, err := NewLogWriter(path)
	if err != nil {
		t.Fatal(err)
	}
	defer w.Close() //nolint:errcheck // a test
	w.limit = 4096
	write := func(from, to int) {
		for i := from; i < to; i++ {
			w.line('o', fmt.Appendf(nil, "line %d", i))
		}
	}
	write(0, 150) // three files hold some 270
	read := func(n int) (got []string) {
		for ln, err := range logs.Read(t.Context(), Ref{App: "hello"}, n, false) {
			if err != nil {
				t.Fatal(err)
			}
			got = append(got, ln.Text)
		}
		return got
	}
	for _, n := range []int{0, 1, 10, 100, 150, 1000} {
		got := read(n)
		if len(got) != min(n, 150) || n > 0 && (got[len(got)-1] != "line 149" || got[0] != fmt.Sprintf("line %d", 150-min(n, 150))) {
			t.Errorf("the last %d lines are %d: %q", n, len(got), got)
		}
	}
	next := 149
	for ln, err := range logs.Read(t.Context(), r, 1, true) {
		if err != nil {
			t.Fatal(err)
		}
		if ln.Text != fmt.Sprintf("line %d", next) {
			t.Fatalf("got %q, want line %d", ln.Text, next)
		}
		if next++; next == 400 {
			break
		}
		if next%50 == 0 {
			write(next, next+50) // rotates now and then
		}
	}
	if _, err := os.Stat(path + ".3"); err == nil {
		t.Error("a fourth file is kept")
	}
}

func TestTrimKeepsTheLiveAndTheLatest(t *testing.T) {
	logs := Logs{Dir: t.TempDir()}
	for i := range keptLogs + 5 {
		p, err := logs.Path(Ref{"hello", "web", i + 1}, fmt.Sprintf("i%d", i))
		if err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(p, nil, 0o600); err != nil {
			t.Fatal(err)
		}
		at := time.Unix(int64(i), 0)
		if err := os.Chtimes(p, at, at); err != nil {
			t.Fatal(err)
		}
	}
	if err := logs.Trim(Retention{}, func(id string) bool { return id == "i0" }); err != nil {
		t.Fatal(err)
	}
	left, err := logs.files(Ref{})
	if err != nil {
		t.Fatal(err)
	}
	var got []string
	for _, f := range left {
		got = append(got, f.instance)
	}
	if len(got) != keptLogs+1 || !slices.Contains(got, "i0") || slices.Contains(got, "i4") || !slices.Contains(got, "i5") {
		t.Errorf("kept %v", got)
	}
}

func TestDamagedRecords(t *testing.T) {
	dir := t.TempDir()
	r := records{dir}
	if _, _, err := r.open(); err != nil {
		t.Fatal(err)
	}
	w := Workload{Ref: Ref{"a", "web", 1}, Image: "x"}
	if err := r.putWant(want{w, 2}); err != nil {
		t.Fatal(err)
	}
	if err := r.putInstance(record{ID: "one", Workload: w, Restarts: 3}); err != nil {
		t.Fatal(err)
	}
	for name, text := range map[string]string{"instances/two.json": "", "instances/.three": "{", "want/.four": "x"} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	wants, have, err := r.open()
	if err != nil || len(wants) != 1 || wants[w.Ref].Replicas != 2 || len(have) != 1 || have["one"].Restarts != 3 {
		t.Errorf("open = %v, %v, %v", wants, have, err)
	}
	if err := os.WriteFile(filepath.Join(dir, "want", "b.json"), []byte("{"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, _, err := r.open(); err == nil || !strings.Contains(err.Error(), "b.json is damaged") {
		t.Errorf("open with a damaged want = %v", err)
	}
}

func FuzzRecords(f *testing.F) {
	b, err := json.Marshal(record{ID: "x", Workload: Workload{Ref: Ref{"a", "web", 1}}})
	if err != nil {
		f.Fatal(err)
	}
	f.Add(b)
	f.Add([]byte("{}"))
	f.Fuzz(func(t *testing.T, b []byte) {
		dir := t.TempDir()
		r := records{dir}
		if _, _, err := r.open(); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(dir, "instances", "x.json"), b, 0o600); err != nil {
			t.Fatal(err)
		}
		_, have, err := r.open()
		if err != nil {
			t.Errorf("open = %v", err)
		}
		for id, rec := range have {
			if id != "x" || rec.Workload.Validate() != nil {
				t.Errorf("took the record %+v", rec)
			}
		}
	})
}
