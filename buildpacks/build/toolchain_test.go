package build

import (
	"archive/tar"
	"archive/zip"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"os"
	"path/filepath"
	goruntime "runtime"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/plugins/content/local"
	"github.com/google/go-cmp/cmp"
	"github.com/m3o/m3o"
	"github.com/m3o/m3o/internal/need"
	"golang.org/x/mod/sumdb"
	"golang.org/x/mod/sumdb/dirhash"
	"golang.org/x/mod/sumdb/note"
)

// A fakeProxy serves toolchain modules made here and a checksum database
// over the protocol both have.
type fakeProxy struct {
	*httptest.Server
	key  string // of the database
	zips map[string][]byte
	sums map[string]string // what the database says, by version

	mu   sync.Mutex // guards hits: the database is asked for several things at once
	hits []string
}

func newFakeProxy(t *testing.T, versions ...string) *fakeProxy {
	t.Helper()
	p := &fakeProxy{zips: map[string][]byte{}, sums: map[string]string{}}
	list := ""
	for _, v := range versions {
		mv := "v0.0.1-" + v + ".linux-" + goruntime.GOARCH
		list += mv + "\nv0.0.1-" + v + ".plan9-mips\n"
		p.zips[mv], p.sums[mv] = toolchainZip(t, mv)
	}
	skey, vkey, err := note.GenerateKey(nil, "sums.example.com")
	if err != nil {
		t.Fatal(err)
	}
	p.key = vkey
	db := http.StripPrefix("/sumdb/sums.example.com", sumdb.NewServer(sumdb.NewTestServer(skey, func(path, vers string) ([]byte, error) {
		return fmt.Appendf(nil, "%s %s %s\n%s %s/go.mod h1:x=\n", path, vers, p.sums[vers], path, vers), nil
	})))
	p.Server = httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		p.mu.Lock()
		p.hits = append(p.hits, r.URL.Path)
		p.mu.Unlock()
		file, ok := strings.CutPrefix(r.URL.Path, "/"+toolchainModule+"/@v/")
		switch {
		case r.URL.Path == "/sumdb/sums.example.com/supported":
		case strings.HasPrefix(r.URL.Path, "/sumdb/"):
			db.ServeHTTP(w, r)
		case file == "list":
			_, _ = io.WriteString(w, list)
		case ok && p.zips[strings.TrimSuffix(file, ".zip")] != nil:
			_, _ = w.Write(p.zips[strings.TrimSuffix(file, ".zip")])
		default:
			http.NotFound(w, r)
		}
	}))
	t.Cleanup(p.Close)
	return p
}

func toolchainZip(t *testing.T, mv string) ([]byte, string) {
	t.Helper()
	var buf bytes.Buffer
	zw := zip.NewWriter(&buf)
	for _, name := range []string{"VERSION", "bin/go", "go.mod", "lib/time/zoneinfo.zip", "lib/wasm/go_js_wasm_exec", "pkg/tool/linux_amd64/link", "src/_go.mod", "src/fmt/print.go"} {
		w, err := zw.Create(toolchainModule + "@" + mv + "/" + name)
		if err == nil {
			_, err = io.WriteString(w, name+" of "+mv)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	if err := zw.Close(); err != nil {
		t.Fatal(err)
	}
	f := filepath.Join(t.TempDir(), "z.zip")
	if err := os.WriteFile(f, buf.Bytes(), 0o600); err != nil {
		t.Fatal(err)
	}
	h, err := dirhash.HashZip(f, dirhash.Hash1)
	if err != nil {
		t.Fatal(err)
	}
	return buf.Bytes(), h
}

func (p *fakeProxy) toolchains(t *testing.T) *toolchains {
	t.Helper()
	tc, err := openToolchains(t.Context(), t.TempDir(), Config{GoProxy: p.URL + ",off", GoSumDB: p.key, GoPrivate: "none.example.com"})
	if err != nil {
		t.Fatal(err)
	}
	tc.hostGo, tc.hostVer = "", ""
	return tc
}

func TestToolchainIsFetchedCheckedAndMadeOnce(t *testing.T) {
	p := newFakeProxy(t, "go1.98", "go1.98.1", "go1.98.3", "go1.99rc1", "go1.97.9")
	ts := p.toolchains(t)
	var said []string
	say := func(f string, a ...any) { said = append(said, fmt.Sprintf(f, a...)) }
	tc, err := ts.get(t.Context(), "go1.98", say)
	if err != nil {
		t.Fatalf("%v: %v", err, errors.Unwrap(err))
	}
	if tc.Version != "go1.98.3" || !slices.Equal(said, []string{"Fetching go1.98.3"}) {
		t.Errorf("got %s, said %q", tc.Version, said)
	}
	ra, err := ts.store.ReaderAt(t.Context(), tc.Layer)
	if err != nil {
		t.Fatal(err)
	}
	defer ra.Close()
	got := map[string]string{}
	for tr := tar.NewReader(content.NewReader(ra)); ; {
		h, err := tr.Next()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		if h.Typeflag == tar.TypeReg {
			b, _ := io.ReadAll(tr)
			got[h.Name] = fmt.Sprintf("%o %s", h.Mode, strings.TrimSuffix(string(b), " of v0.0.1-go1.98.3.linux-"+goruntime.GOARCH))
		}
	}
	want := map[string]string{
		"usr/local/go/VERSION":                   "644 VERSION",
		"usr/local/go/bin/go":                    "755 bin/go",
		"usr/local/go/lib/time/zoneinfo.zip":     "644 lib/time/zoneinfo.zip",
		"usr/local/go/lib/wasm/go_js_wasm_exec":  "755 lib/wasm/go_js_wasm_exec",
		"usr/local/go/pkg/tool/linux_amd64/link": "755 pkg/tool/linux_amd64/link",
		"usr/local/go/src/go.mod":                "644 src/_go.mod",
		"usr/local/go/src/fmt/print.go":          "644 src/fmt/print.go",
	}
	if d := cmp.Diff(want, got); d != "" {
		t.Errorf("-want +got\n%s", d)
	}
	p.hits = nil
	if again, err := ts.get(t.Context(), "go1.97", say); err != nil || again.Layer.Digest != tc.Layer.Digest || len(p.hits) > 0 {
		t.Errorf("second get = %v, %v, asked for %q", again, err, p.hits)
	}
	// A layer that got lost is made again.
	if err := ts.store.Delete(t.Context(), tc.Layer.Digest); err != nil {
		t.Fatal(err)
	}
	if again, err := ts.get(t.Context(), "go1.98", say); err != nil || again.Layer.Digest != tc.Layer.Digest || len(p.hits) == 0 {
		t.Errorf("get after a loss = %v, %v, asked for %q", again, err, p.hits)
	}
	if left, _ := filepath.Glob(filepath.Join(ts.dir, "fetch-*")); len(left) > 0 {
		t.Errorf("left %q", left)
	}
}

func TestTamperedToolchainIsRefused(t *testing.T) {
	p := newFakeProxy(t, "go1.98.1")
	p.sums["v0.0.1-go1.98.1.linux-"+goruntime.GOARCH] = "h1:AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA="
	ts := p.toolchains(t)
	_, err := ts.get(t.Context(), "go1.98", func(string, ...any) {})
	if err == nil || !strings.Contains(err.Error(), "does not have the checksum") || len(ts.made()) > 0 {
		t.Errorf("get = %v, made %q", err, ts.made())
	}
}

func TestForgedDatabaseIsRefused(t *testing.T) {
	p, other := newFakeProxy(t, "go1.98.1"), newFakeProxy(t)
	p.key = other.key // signed by somebody else
	if tc, err := p.toolchains(t).get(t.Context(), "go1.98", func(string, ...any) {}); err == nil {
		t.Errorf("get = %v", tc)
	}
}

func TestToolchainChoice(t *testing.T) {
	known := []string{"go1.25.9", "go1.26.2", "go1.26.8", "go1.27rc1", "go1.9"}
	for want, is := range map[string]string{"go1.26": "go1.26.8", "go1.16": "go1.26.8", "go1.26.8": "go1.26.8", "go1.26.9": "", "go1.27rc1": "go1.27rc1", "go1.27": ""} {
		if got := newest(known, want); got != is {
			t.Errorf("newest at least %s = %q, want %q", want, got, is)
		}
	}
}

func TestNoToolchainToBeHad(t *testing.T) {
	p := newFakeProxy(t, "go1.98.1")
	ts := p.toolchains(t)
	if _, err := ts.get(t.Context(), "go1.99", nil); m3o.KindOf(err) != m3o.Invalid || err.Error() != "go.mod asks for go1.99, and the newest Go release is go1.98.1" {
		t.Errorf("too new: %v", err)
	}
	p.Close()
	if _, err := ts.get(t.Context(), "go1.98", nil); m3o.KindOf(err) != m3o.Unavailable || m3o.HintOf(err) == "" {
		t.Errorf("proxy down: %v", err)
	}
}

func TestGoProxyList(t *testing.T) {
	serve := func(code int) string {
		s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			w.WriteHeader(code)
			_, _ = fmt.Fprint(w, code)
		}))
		t.Cleanup(s.Close)
		return s.URL
	}
	ok, gone, bad := serve(200), serve(410), serve(500)
	for list, want := range map[string]bool{
		ok: true, gone + "," + ok: true, bad + "," + ok: false, bad + "|" + ok: true, gone + "|" + ok: true,
		"off": false, "direct," + ok: false, gone + ",off": false, gone + ",direct": false, " " + ok + " , direct": true,
	} {
		p, err := parseGoProxy(list)
		if err != nil {
			t.Errorf("%s: %v", list, err)
			continue
		}
		if b, err := p.read(t.Context(), "x/@v/list", 100); (err == nil) != want || want && string(b) != "200" {
			t.Errorf("%s: %q, %v, want success %v", list, b, err, want)
		}
	}
	for _, list := range []string{"", ",", "ftp://x", "https://", "nonsense", "https://u:secret@[bad"} {
		if _, err := parseGoProxy(list); m3o.KindOf(err) != m3o.Invalid || strings.Contains(fmt.Sprint(err), "secret") {
			t.Errorf("%q: %v", list, err)
		}
	}
	u := strings.Replace(bad, "http://", "http://user:secret@", 1)
	p, err := parseGoProxy(u)
	if err != nil {
		t.Fatal(err)
	}
	if _, err = p.read(t.Context(), "x", 10); err == nil || strings.Contains(err.Error(), "secret") {
		t.Errorf("error %v", err)
	}
}

func TestNoChecksumDatabase(t *testing.T) {
	p := newFakeProxy(t)
	gp, err := parseGoProxy(p.URL)
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		sumdb, private string
		none, bad      bool
	}{
		{"off", "", true, false}, {"", "golang.org/*", true, false}, {"", "", false, false},
		{p.key, "", false, false}, {p.key + " " + p.URL, "", false, false}, {"unknown.example.com", "", false, true}, {"a b c", "", false, true},
	} {
		s, err := newSumDB(c.sumdb, c.private, t.TempDir(), gp, toolchainModule)
		if (err != nil) != c.bad || !c.bad && (s == nil) != c.none {
			t.Errorf("%+v: %v, %v", c, s, err)
		}
	}
}

func FuzzToolchainZip(f *testing.F) {
	z := func(names ...string) []byte {
		var buf bytes.Buffer
		zw := zip.NewWriter(&buf)
		for _, n := range names {
			w, err := zw.Create(n)
			if err != nil {
				f.Fatal(err)
			}
			if _, err := w.Write([]byte("x")); err != nil {
				f.Fatal(err)
			}
		}
		_ = zw.Close()
		return buf.Bytes()
	}
	f.Add(z("p/bin/go", "p/src/_go.mod", "p/lib/time/zoneinfo.zip"))
	f.Add(z("p/../../etc/passwd"))
	f.Add(z("p//x", "q"))
	cs, err := local.NewStore(f.TempDir())
	if err != nil {
		f.Fatal(err)
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		zr, err := zip.NewReader(bytes.NewReader(b), int64(len(b)))
		if err != nil {
			return
		}
		files, err := zipFiles(zr, "p/")
		if err != nil {
			return
		}
		for _, p := range files {
			if !filepath.IsLocal(p.name) || strings.Contains(p.name, "\\") {
				t.Errorf("file %q", p.name)
			}
		}
		if slices.ContainsFunc(files, func(p packFile) bool { return p.size > 1<<20 }) {
			return // a declared size is checked while it is read; not worth a gigabyte here
		}
		ts := &toolchains{dir: t.TempDir(), store: cs}
		if err := os.Mkdir(filepath.Join(ts.dir, "made"), 0o755); err != nil {
			t.Fatal(err)
		}
		_, _ = ts.pack(context.Background(), "go1.98", files)
	})
}

func FuzzToolchainList(f *testing.F) {
	f.Add([]byte("v0.0.1-go1.26.8.linux-amd64\nv0.0.1-go1.9rc1.linux-amd64\n"))
	f.Fuzz(func(t *testing.T, b []byte) {
		for _, v := range parseToolchainList(b, "amd64") {
			if strings.ContainsAny(v, "/-\n ") || !strings.HasPrefix(v, "go1") {
				t.Errorf("version %q", v)
			}
		}
	})
}

func TestResolvers(t *testing.T) {
	write := func(text string) string {
		f := filepath.Join(t.TempDir(), "resolv.conf")
		if err := os.WriteFile(f, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		return f
	}
	stub := write("# systemd\nnameserver 127.0.0.53\noptions edns0\n")
	up := write("nameserver 10.0.0.2\nnameserver fe80::1%eth0\nnameserver 192.0.2.1\nsearch x\n")
	a := netip.MustParseAddr
	for _, c := range []struct {
		files []string
		want  resolvers
	}{
		{[]string{up}, resolvers{servers: []netip.Addr{a("10.0.0.2"), a("192.0.2.1")}}},
		{[]string{stub, up}, resolvers{servers: []netip.Addr{a("10.0.0.2"), a("192.0.2.1")}}},
		{[]string{stub, "/does/not/exist"}, resolvers{relayTo: a("127.0.0.53")}},
		{[]string{write("")}, resolvers{}},
	} {
		got := findResolvers(c.files...)
		if !slices.Equal(got.servers, c.want.servers) || got.relayTo != c.want.relayTo {
			t.Errorf("%v: %+v, want %+v", c.files, got, c.want)
		}
	}
}

func TestDNSRelayPassesMessages(t *testing.T) {
	var udp net.PacketConn
	var tcp net.Listener
	eventually(t, "port free for both", func() bool {
		var err error
		if tcp, err = net.Listen("tcp4", "127.0.0.1:0"); err != nil {
			t.Fatal(err)
		}
		if udp, err = net.ListenPacket("udp4", tcp.Addr().String()); err != nil {
			_ = tcp.Close()
		}
		return err == nil
	})
	defer tcp.Close()
	defer udp.Close()
	up := tcp.Addr().(*net.TCPAddr).AddrPort()
	go func() { // ends with the listener
		buf := make([]byte, 512)
		for {
			n, from, err := udp.ReadFrom(buf)
			if err != nil {
				return
			}
			_, _ = udp.WriteTo(append([]byte("answer to "), buf[:n]...), from)
		}
	}()
	go func() {
		for {
			c, err := tcp.Accept()
			if err != nil {
				return
			}
			_, _ = io.Copy(c, io.LimitReader(c, 1))
			_ = c.Close()
		}
	}()
	ctx, cancel := context.WithCancel(t.Context())
	addrs, err := need.Addrs(1)
	if err != nil {
		t.Fatal(err)
	}
	here := netip.MustParseAddrPort(addrs[0])
	done := make(chan error, 2)
	go func() { done <- relayUDP(ctx, here, up) }()
	go func() { done <- relayTCP(ctx, here, up) }()
	var d net.Dialer
	eventually(t, "answer over UDP", func() bool {
		b, err := askUDP(ctx, here, []byte("q"))
		return err == nil && string(b) == "answer to q"
	})
	eventually(t, "answer over TCP", func() bool {
		c, err := d.DialContext(ctx, "tcp", here.String())
		if err != nil {
			return false
		}
		defer c.Close()
		_, _ = c.Write([]byte("q"))
		b, err := io.ReadAll(c)
		return err == nil && string(b) == "q"
	})
	cancel()
	<-done
	<-done
}

func TestConfigReportsEveryFault(t *testing.T) {
	_, err := Open(t.Context(), Config{Dir: "relative", Buildkitd: "/no/such", Runc: "/no/such", Timeout: -1, Subnet: netip.MustParsePrefix("10.0.0.0/31")})
	for _, want := range []string{"Dir is not", "no buildkitd", "no runc", "negative", "Subnet"} {
		if m3o.KindOf(err) != m3o.Invalid || !strings.Contains(err.Error(), want) {
			t.Errorf("Open = %v, lacks %q", err, want)
		}
	}
}
