package gitserver

import (
	"bytes"
	"compress/flate"
	"context"
	"crypto/sha1"
	"encoding/binary"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	gossh "golang.org/x/crypto/ssh"

	"github.com/m3o/m3o"
)

// dial connects as the owner of a key file of the site.
func (s *site) dial(key string) *gossh.Client {
	s.t.Helper()
	pem, err := os.ReadFile(filepath.Join(s.dir, key))
	if err != nil {
		s.t.Fatal(err)
	}
	signer, err := gossh.ParsePrivateKey(pem)
	if err != nil {
		s.t.Fatal(err)
	}
	c, err := gossh.Dial("tcp", s.addr, &gossh.ClientConfig{
		User: "m3o", Auth: []gossh.AuthMethod{gossh.PublicKeys(signer)}, HostKeyCallback: gossh.FixedHostKey(s.s.signer.PublicKey()),
		Timeout: 30 * time.Second,
	})
	if err != nil {
		s.t.Fatal(err)
	}
	s.t.Cleanup(func() { _ = c.Close() })
	return c
}

// A wire is a receive-pack session spoken by hand.
type wire struct {
	s    *site
	sess *gossh.Session
	in   io.WriteCloser
	out  io.Reader
	err  *bytes.Buffer
}

func (s *site) wire(app string) *wire {
	s.t.Helper()
	w := s.open(app)
	for { // the advertisement
		_, flush, _, err := readPacket(w.out)
		if err != nil {
			s.t.Fatalf("read advertisement: %v %s", err, w.err)
		}
		if flush {
			return w
		}
	}
}

// open begins a session and reads nothing of it.
func (s *site) open(app string) *wire {
	s.t.Helper()
	sess, err := s.dial("ada").NewSession()
	if err != nil {
		s.t.Fatal(err)
	}
	w := &wire{s: s, sess: sess, err: &bytes.Buffer{}}
	w.in, _ = sess.StdinPipe()
	w.out, _ = sess.StdoutPipe()
	sess.Stderr = w.err
	if err := sess.Start("git-receive-pack '" + app + "'"); err != nil {
		s.t.Fatal(err)
	}
	return w
}

func pkt(line string) string { return fmt.Sprintf("%04x%s", len(line)+4, line) }

const wireCaps = "\x00report-status side-band-64k agent=test"

// ask sends a header of one command a line.
func (w *wire) ask(caps string, lines ...string) {
	var b strings.Builder
	for i, l := range lines {
		if i == 0 {
			l += caps
		}
		b.WriteString(pkt(l))
	}
	b.WriteString("0000")
	_, _ = io.WriteString(w.in, b.String())
}

// answer ends what is sent and returns all that comes back.
func (w *wire) answer() string {
	w.s.t.Helper()
	_ = w.in.Close()
	out, _ := io.ReadAll(w.out)
	_ = w.sess.Wait()
	return string(out) + w.err.String()
}

// pack makes a pack of the objects named.
func (c *clone) pack(ids ...string) []byte {
	c.s.t.Helper()
	cmd := c.cmd("pack-objects", "--stdout", "-q")
	cmd.Stdin = strings.NewReader(strings.Join(ids, "\n") + "\n")
	out, err := cmd.Output()
	if err != nil {
		c.s.t.Fatal(err)
	}
	return out
}

// all lists the objects of a commit.
func (c *clone) all(commit string) []string {
	var ids []string
	for line := range strings.Lines(c.must("rev-list", "--objects", commit)) {
		id, _, _ := strings.Cut(strings.TrimSpace(line), " ")
		ids = append(ids, id)
	}
	return ids
}

func TestBadRefNamesOnTheWireNeverBuild(t *testing.T) {
	t.Parallel()
	s := newSite(t, siteConfig{})
	c := s.work("hello")
	tip := c.commit("a", "1")
	pack := c.pack(c.all(tip)...)
	for name, want := range map[string]string{
		"refs/heads/../../config": "two dots",
		"refs/heads/a.lock":       "ends with .lock",
		"refs/heads/-x":           "taken for something else",
		"refs/heads/HEAD":         "taken for something else",
		"refs/heads/x\nend":       "has the character",
		"refs/heads/x\n" + zeroID + " " + tip + " refs/heads/main": "has the character",
		"refs/heads/x\ty":                        "has the character",
		"refs/heads/x y":                         "has the character",
		"refs/heads/\xff\xfe":                    "not UTF-8",
		"refs/heads/\x1b[31mred":                 "has the character",
		"refs/heads/" + strings.Repeat("x", 300): "longer than 250",
		"refs/m3o/x":                             "neither a branch nor a tag",
		"refs/heads":                             "neither a branch nor a tag",
		"config":                                 "has no slash",
		"HEAD":                                   "has no slash",
		"refs/heads//main":                       "empty part",
	} {
		w := s.wire("hello")
		w.ask(wireCaps, zeroID+" "+tip+" "+name)
		_, _ = w.in.Write(pack)
		out := w.answer()
		if !strings.Contains(out, want) || strings.Contains(out, "ok "+name) {
			t.Errorf("%q: answer lacks %q: %q", name, want, out)
		}
	}
	wantEvents(t, s, "")
	if s.tip("hello", "refs/heads/main") != "" {
		t.Error("main was made")
	}
	w := s.wire("hello")
	w.ask(wireCaps, zeroID+" "+tip+" refs/heads/main", zeroID+" "+tip+" refs/heads/main")
	_, _ = w.in.Write(pack)
	wants(t, w.answer(), "the push changes refs/heads/main twice")
	w = s.wire("hello")
	w.ask(wireCaps, zeroID+" "+tip+" refs/heads/main", zeroID+" "+tip+" refs/heads/main/sub")
	_, _ = w.in.Write(pack)
	wants(t, w.answer(), "cannot both exist")
	wantEvents(t, s, "")
}

func TestMissingObjectsNeverBuild(t *testing.T) {
	t.Parallel()
	s := newSite(t, siteConfig{})
	c := s.work("hello")
	one := c.commit("a", "1", "d/b", "2")
	tree, blob := c.must("rev-parse", one+"^{tree}"), c.must("rev-parse", one+":a")
	two := c.commit("a", "3")
	absent := strings.Repeat("ab", 20)
	without := func(ids []string, gone ...string) []string {
		var left []string
		for _, id := range ids {
			if !strings.Contains(strings.Join(gone, " "), id) {
				left = append(left, id)
			}
		}
		return left
	}
	for name, push := range map[string]struct {
		tip string
		ids []string
		pre []string
	}{
		"tip":            {tip: absent, ids: c.all(one)},
		"tree":           {tip: one, ids: without(c.all(one), tree)},
		"blob":           {tip: one, ids: without(c.all(one), blob)},
		"parent":         {tip: two, ids: without(c.all(two), one)},
		"shallow tree":   {tip: two, ids: without(c.all(two), one, c.must("rev-parse", two+"^{tree}")), pre: []string{"shallow " + two}},
		"shallow parent": {tip: two, ids: without(c.all(two), one), pre: []string{"shallow " + absent}},
	} {
		w := s.wire("hello")
		w.ask(wireCaps, append(push.pre, zeroID+" "+push.tip+" refs/heads/main")...)
		if len(push.pre) > 0 { // the capabilities belong to the command, not to the shallow line
			_ = w.sess.Close()
			w = s.wire("hello")
			w.ask("", push.pre[0], zeroID+" "+push.tip+" refs/heads/main"+wireCaps)
		}
		_, _ = w.in.Write(c.pack(push.ids...))
		if out := w.answer(); !strings.Contains(out, "ng refs/heads/main") {
			t.Errorf("%s: not refused: %q", name, out)
		}
	}
	wantEvents(t, s, "")
	if n := countObjects(t, s, "hello"); n != 0 {
		t.Errorf("%d objects were kept", n)
	}
}

// An object that is there but incomplete passes git's strict unpacking, which
// looks one link deep; its own walk fails without keeping the hook from running.
func TestAnIncompleteHistoryOnTheServerNeverBuilds(t *testing.T) {
	t.Parallel()
	s := newSite(t, siteConfig{})
	c := s.work("hello")
	one := c.commit("a", "1")
	two := c.commit("a", "2")
	s.wire("hello").answer() // makes the repository
	repo := s.s.repoDir("hello")
	// Commit one without its blob, unreachable, as a crash could leave it.
	put := c.pack(one, c.must("rev-parse", one+"^{tree}"))
	if _, err := runGit(t.Context(), repo, nil, string(put), "unpack-objects", "-q"); err != nil {
		t.Fatal(err)
	}
	w := s.wire("hello")
	w.ask(wireCaps, zeroID+" "+two+" refs/heads/main")
	_, _ = w.in.Write(c.pack(two, c.must("rev-parse", two+"^{tree}"), c.must("rev-parse", two+":a")))
	wants(t, w.answer(), "the pack does not hold all objects", "ng refs/heads/main")
	wantEvents(t, s, "")
	// The whole of it is welcome.
	c.must("push", "m3o", "main")
	wantEvents(t, s, "deploy true")
}

func TestAStaleOldValueIsSeenBeforeTheBuild(t *testing.T) {
	t.Parallel()
	s := newSite(t, siteConfig{})
	c := s.work("hello")
	one := c.commit("a", "1")
	c.must("push", "m3o", "main")
	two := c.commit("a", "2")
	w := s.wire("hello")
	w.ask(wireCaps, zeroID+" "+two+" refs/heads/main")
	_, _ = w.in.Write(c.pack(c.all(two)...))
	wants(t, w.answer(), "refs/heads/main moved while you pushed", "ng refs/heads/main")
	w = s.wire("hello")
	w.ask(wireCaps+" atomic", one+" "+two+" refs/heads/main", two+" "+one+" refs/heads/other")
	_, _ = w.in.Write(c.pack(c.all(two)...))
	wants(t, w.answer(), "refs/heads/other moved while you pushed", "ng refs/heads/main")
	wantEvents(t, s, "deploy true")
}

func TestMalformedRequestsAreRefused(t *testing.T) {
	t.Parallel()
	s := newSite(t, siteConfig{})
	id := strings.Repeat("ab", 20)
	for name, req := range map[string]string{
		"garbage":      "GET / HTTP/1.1\r\n\r\n",
		"short id":     pkt("00 11 refs/heads/main") + "0000",
		"upper case":   pkt(zeroID+" "+strings.ToUpper(id)+" refs/heads/main") + "0000",
		"no name":      pkt(zeroID+" "+id+" ") + "0000",
		"delimiter":    pkt(zeroID+" "+id+" refs/heads/main"+wireCaps) + "0001",
		"certificate":  pkt("push-cert\x00report-status") + pkt("certificate version 0.1\n") + "0000",
		"sha256":       pkt(zeroID+" "+id+" refs/heads/main\x00report-status object-format=sha256") + "0000",
		"half a line":  "00ff" + zeroID,
		"bad shallow":  pkt("shallow nothing") + "0000",
		"empty packet": "0004",
	} {
		w := s.wire("hello")
		_, _ = io.WriteString(w.in, req)
		out := w.answer()
		switch name {
		case "certificate":
			wants(t, out, "signed pushes are not supported", "--no-signed")
		case "sha256":
			wants(t, out, "SHA-256")
		case "half a line":
		default:
			wants(t, out, "the push request is malformed")
		}
	}
	wantEvents(t, s, "")
}

func TestCorruptAndTruncatedPacksLeaveNothing(t *testing.T) {
	t.Parallel()
	s := newSite(t, siteConfig{})
	c := s.work("hello")
	var files []string
	for i := range 120 {
		files = append(files, fmt.Sprintf("f%d", i), strings.Repeat(fmt.Sprint(i), 200))
	}
	small, large := c.commit("a", "1"), c.commit(files...)
	for _, tip := range []string{small, large} {
		good := c.pack(c.all(tip)...)
		flipped := bytes.Clone(good)
		flipped[len(flipped)/2] ^= 0x55
		count := bytes.Clone(good)
		binary.BigEndian.PutUint32(count[8:], 2_000_000_000)
		for name, pack := range map[string][]byte{
			"flipped": flipped, "truncated": good[:len(good)/2], "no pack": nil, "header only": good[:12], "two billion objects": count, "text": []byte("hello"),
		} {
			w := s.wire("hello")
			w.ask(wireCaps, zeroID+" "+tip+" refs/heads/main")
			_, _ = w.in.Write(pack)
			if out := w.answer(); strings.Contains(out, "unpack ok") {
				t.Errorf("%s was accepted: %q", name, out)
			}
		}
	}
	wantEvents(t, s, "")
	if n := countObjects(t, s, "hello"); n != 0 {
		t.Errorf("%d objects were kept", n)
	}
}

func TestAPackOverTheLimitIsRefusedWithTheLimit(t *testing.T) {
	t.Parallel()
	s := newSite(t, siteConfig{limits: Limits{Pack: 1 << 20}})
	c := s.work("hello")
	c.commit("noise", randomText(1, 3<<20))
	wants(t, c.mustNot("push", "m3o", "main"), "pack exceeds maximum allowed size", "the push is larger than 1 MB", "git commit-tree")
	wantEvents(t, s, "")
}

// randomText does not compress below three quarters.
func randomText(seed uint64, n int) string {
	const letters = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"
	b := make([]byte, n)
	x := 88172645463325252 ^ seed<<20
	for i := range b {
		x ^= x << 13
		x ^= x >> 7
		x ^= x << 17
		b[i] = letters[x>>32&63]
	}
	return string(b)
}

// zeros makes a pack of one blob of n zero bytes, whole megabytes.
func zeros(n int64) []byte {
	var b bytes.Buffer
	b.WriteString("PACK\x00\x00\x00\x02\x00\x00\x00\x01")
	size := uint64(n)
	head := byte(3<<4) | byte(size&15)
	for size >>= 4; size > 0; size >>= 7 {
		b.WriteByte(head | 0x80)
		head = byte(size & 127)
	}
	b.WriteByte(head)
	// One compressed megabyte is made and repeated: each only refers back to
	// zeros, and packing a gigabyte would take the test longer than git.
	const mega = 1 << 20
	var deflated bytes.Buffer
	f, _ := flate.NewWriter(&deflated, flate.BestSpeed)
	chunk := func() []byte {
		deflated.Reset()
		_, _ = f.Write(make([]byte, mega))
		_ = f.Flush()
		return bytes.Clone(deflated.Bytes())
	}
	b.WriteString("\x78\x01")
	b.Write(chunk())
	again := chunk()
	for range n/mega - 1 {
		b.Write(again)
	}
	b.WriteString("\x03\x00") // an empty last block
	_ = binary.Write(&b, binary.BigEndian, uint32(n%65521)<<16|1)
	sum := sha1.Sum(b.Bytes())
	b.Write(sum[:])
	return b.Bytes()
}

func TestAZipBombEndsAtTheProcessorLimit(t *testing.T) {
	t.Parallel()
	s := newSite(t, siteConfig{limits: Limits{CPU: time.Second}})
	w := s.wire("hello")
	w.ask(wireCaps, zeroID+" "+strings.Repeat("ab", 20)+" refs/heads/main")
	_, _ = w.in.Write(zeros(1 << 30))
	wants(t, w.answer(), "needs more than 1s of processor time")
	wantEvents(t, s, "")
}

func TestABlobThatNeedsTooMuchMemoryIsRefused(t *testing.T) {
	t.Parallel()
	s := newSite(t, siteConfig{limits: Limits{Memory: 16 << 20}})
	w := s.wire("hello")
	w.ask(wireCaps, zeroID+" "+strings.Repeat("ab", 20)+" refs/heads/main")
	_, _ = w.in.Write(zeros(30 << 20))
	wants(t, w.answer(), "needs more than 16 MB of memory")
	wantEvents(t, s, "")
}

func TestAPushThatNeverArrivesEnds(t *testing.T) {
	t.Parallel()
	s := newSite(t, siteConfig{limits: Limits{Receive: 200 * time.Millisecond}})
	w := s.open("hello") // the limit may come before the advertisement does
	w.ask(wireCaps, zeroID+" "+strings.Repeat("ab", 20)+" refs/heads/main")
	_, _ = io.WriteString(w.in, "PACK\x00\x00\x00\x02\x00\x00\x00\x01")
	out, _ := io.ReadAll(w.out) // we neither send more nor hang up
	_ = w.sess.Wait()
	wants(t, string(out)+w.err.String(), "the push took too long to arrive")
	wantEvents(t, s, "")
}

func TestAPusherThatStopsReadingLosesItsBuild(t *testing.T) {
	t.Parallel()
	stopped := make(chan error, 1)
	s := newSite(t, siteConfig{limits: Limits{Stalled: 200 * time.Millisecond}, deploy: func(ctx context.Context, _ m3o.Source, out io.Writer) error {
		line := []byte(strings.Repeat("x", 1000) + "\n")
		for ctx.Err() == nil {
			if _, err := out.Write(line); err != nil {
				break
			}
		}
		<-ctx.Done()
		stopped <- context.Cause(ctx)
		return ctx.Err()
	}})
	c := s.work("hello")
	tip := c.commit("a", "1")
	w := s.wire("hello")
	w.ask(wireCaps, zeroID+" "+tip+" refs/heads/main")
	_, _ = w.in.Write(c.pack(c.all(tip)...))
	if err := <-stopped; err != errStuck {
		t.Errorf("build ended with %v, want %v", err, errStuck)
	}
	// Its connection is closed, or it would hold its session for ever.
	_ = w.sess.Wait()
	wantEvents(t, s, "deploy")
}

func TestAnIdleConnectionIsClosedUnlessItAuthenticates(t *testing.T) {
	t.Parallel()
	s := newSite(t, siteConfig{limits: Limits{Login: 100 * time.Millisecond}})
	for _, say := range []string{"", "SSH-2.0-slow\r\n"} {
		nc, err := net.Dial("tcp", s.addr)
		if err != nil {
			t.Fatal(err)
		}
		_, _ = io.WriteString(nc, say)
		_, _ = io.Copy(io.Discard, nc) // returns when the server hangs up
		_ = nc.Close()
	}
}

func TestManyUnauthenticatedConnectionsAreTurnedAway(t *testing.T) {
	t.Parallel()
	s := newSite(t, siteConfig{limits: Limits{UnauthenticatedPerHost: 3}})
	var open []net.Conn
	for range 3 {
		nc, err := net.Dial("tcp", s.addr)
		if err != nil {
			t.Fatal(err)
		}
		defer nc.Close() //nolint:errcheck // only read
		if _, err := io.ReadFull(nc, make([]byte, 4)); err != nil {
			t.Fatalf("no greeting: %v", err)
		}
		open = append(open, nc)
	}
	nc, err := net.Dial("tcp", s.addr)
	if err != nil {
		t.Fatal(err)
	}
	if b, _ := io.ReadAll(nc); len(b) != 0 {
		t.Errorf("the fourth connection was greeted: %q", b)
	}
	_ = open[0].Close()
	eventually(t, "a freed place", func() bool {
		nc, err := net.Dial("tcp", s.addr)
		if err != nil {
			t.Fatal(err)
		}
		defer nc.Close() //nolint:errcheck // only read
		n, _ := nc.Read(make([]byte, 4))
		return n > 0
	})
}
