package router

import (
	"bytes"
	"crypto/tls"
	"io"
	"net"
	"net/http"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"
)

// floods are what a client may send without end; each write is the nth.
var floods = map[string]struct {
	opens string // path of a request that is begun first
	write func(fr *http2.Framer, head []byte, n uint32) error
	most  int // of them are taken
}{
	"PING":     {"", func(fr *http2.Framer, _ []byte, _ uint32) error { return fr.WritePing(false, [8]byte{}) }, calmSpare},
	"SETTINGS": {"", func(fr *http2.Framer, _ []byte, _ uint32) error { return fr.WriteSettings() }, calmSpare},
	"PRIORITY": {"", func(fr *http2.Framer, _ []byte, n uint32) error {
		return fr.WritePriority(2*n+1, http2.PriorityParam{})
	}, calmSpare},
	"WINDOW_UPDATE": {"", func(fr *http2.Framer, _ []byte, _ uint32) error { return fr.WriteWindowUpdate(0, 1) }, calmSpare},
	"unknown":       {"", func(fr *http2.Framer, _ []byte, _ uint32) error { return fr.WriteRawFrame(0x42, 0, 0, nil) }, calmSpare},
	"empty DATA":    {"/sum", func(fr *http2.Framer, _ []byte, _ uint32) error { return fr.WriteData(1, false, nil) }, calmSpare},
	"padding": {"/sum", func(fr *http2.Framer, _ []byte, _ uint32) error {
		return fr.WriteDataPadded(1, false, nil, make([]byte, 9))
	}, calmSpare},
	"RST_STREAM": {"", func(fr *http2.Framer, head []byte, n uint32) error {
		if err := fr.WriteHeaders(http2.HeadersFrameParam{StreamID: 2*n + 1, BlockFragment: head, EndStream: true, EndHeaders: true}); err != nil {
			return err
		}
		return fr.WriteRSTStream(2*n+1, http2.ErrCodeCancel)
	}, calmSpare},
	"streams that the router has to reset": {"", func(fr *http2.Framer, head []byte, n uint32) error { // CVE-2025-8671
		if err := fr.WriteHeaders(http2.HeadersFrameParam{StreamID: 2*n + 1, BlockFragment: head, EndStream: true, EndHeaders: true}); err != nil {
			return err
		}
		return fr.WriteRawFrame(http2.FrameWindowUpdate, 0, 2*n+1, []byte{0, 0, 0, 0})
	}, calmSpare},
	"CONTINUATION without fields": {"", func(fr *http2.Framer, head []byte, n uint32) error { // CVE-2023-45288
		if n == 0 {
			return fr.WriteHeaders(http2.HeadersFrameParam{StreamID: 1, BlockFragment: head})
		}
		return fr.WriteContinuation(1, false, nil)
	}, calmSpare + 1},
	"CONTINUATION": {"", func(fr *http2.Framer, head []byte, n uint32) error {
		if n == 0 {
			return fr.WriteHeaders(http2.HeadersFrameParam{StreamID: 1, BlockFragment: head})
		}
		var b bytes.Buffer
		_ = hpack.NewEncoder(&b).WriteField(hpack.HeaderField{Name: "x-flood", Value: strings.Repeat("!", 3000)}) // a Buffer takes it
		return fr.WriteContinuation(1, false, b.Bytes())
	}, 64<<10/3000 + 1},
}

// A flood ends after a number of frames, whatever the client reads and however
// fast it is.
func TestFloodsAreTakenUpToANumberOfFrames(t *testing.T) {
	for name, tc := range floods {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) { // no time passes that would give some back
				c := newCalm(64 << 10)
				var b bytes.Buffer
				fr := http2.NewFramer(&b, nil)
				b.WriteString(http2.ClientPreface)
				taken := 0
				for c.read(b.Bytes()) && taken <= 2*tc.most {
					b.Reset()
					if err := tc.write(fr, []byte{0x82}, uint32(taken)); err != nil {
						t.Fatal(err)
					}
					taken++
				}
				if taken = taken - 1; taken > tc.most || taken < 10 {
					t.Errorf("%d were taken, want %d", taken, tc.most)
				}
				time.Sleep(10 * time.Second)
				if c.limit > c.block && !c.take() {
					t.Error("time gives nothing back")
				}
			})
		})
	}
}

// What belongs to an answer is no flood: updates of windows, and the pings by
// which gRPC measures, however many they become.
func TestFramesForAnAnswerAreNoFlood(t *testing.T) {
	c := newCalm(64 << 10)
	c.skip = 0
	local, remote := net.Pipe()
	t.Cleanup(func() { _ = local.Close() })
	go func() { _, _ = io.Copy(io.Discard, remote) }()
	var in, out bytes.Buffer
	fi, fo := http2.NewFramer(&in, nil), http2.NewFramer(&out, nil)
	for range 20_000 {
		in.Reset()
		out.Reset()
		_ = fo.WriteData(1, false, []byte("some")) // Buffers take it
		p := out.Bytes()
		for _, part := range [][]byte{p[:5], p[5:10], p[10:]} { // as net/http cuts them
			if _, err := c.write(local, part); err != nil {
				t.Fatal(err)
			}
		}
		_ = fi.WriteWindowUpdate(0, 4)
		_ = fi.WriteWindowUpdate(1, 4)
		_ = fi.WritePing(false, [8]byte{})
		for _, part := range [][]byte{in.Bytes()[:11], in.Bytes()[11:]} {
			if !c.read(part) {
				t.Fatal("it is taken for a flood")
			}
		}
	}
	if n := c.spare.Load(); n > calmMost+calmPerAnswer {
		t.Errorf("%d are spare, at most %d may be", n, calmMost)
	}
}

// Who floods is told so, by GOAWAY and the code for it, over TLS and without;
// nobody else notices.
func TestFloodEndsWithEnhanceYourCalm(t *testing.T) {
	web, _ := backend(t, http.HandlerFunc(echo))
	f := start(t)
	f.put(t, appHost("one", 1, HTTP1, web))
	for name, tc := range floods {
		for _, secure := range []bool{false, true} {
			way := map[bool]string{false: "h2c", true: "TLS"}[secure]
			t.Run(name+"/"+way, func(t *testing.T) {
				c, _ := raw(t, map[bool]string{false: f.http, true: f.https}[secure])
				scheme := "http"
				if secure {
					scheme = "https"
					c = tls.Client(c, &tls.Config{RootCAs: f.roots, ServerName: "one.localhost", NextProtos: []string{"h2"}})
				}
				if _, err := io.WriteString(c, http2.ClientPreface); err != nil {
					t.Fatal(err)
				}
				fr := http2.NewFramer(c, c)
				if err := fr.WriteSettings(); err != nil {
					t.Fatal(err)
				}
				told := make(chan http2.ErrCode, 1)
				go func() {
					defer close(told)
					for {
						f, err := fr.ReadFrame()
						if err != nil {
							return
						}
						if g, ok := f.(*http2.GoAwayFrame); ok {
							told <- g.ErrCode
							return
						}
					}
				}()
				var head bytes.Buffer
				enc := hpack.NewEncoder(&head)
				for _, h := range [][2]string{{":method", "POST"}, {":scheme", scheme}, {":path", "/" + strings.TrimPrefix(tc.opens, "/")}, {":authority", "one.localhost"}} {
					_ = enc.WriteField(hpack.HeaderField{Name: h[0], Value: h[1]}) // a Buffer takes it
				}
				if tc.opens != "" {
					if err := fr.WriteHeaders(http2.HeadersFrameParam{StreamID: 1, BlockFragment: head.Bytes(), EndHeaders: true}); err != nil {
						t.Fatal(err)
					}
				}
				// No more than the router reads off afterwards: a reset takes the GOAWAY
				// away from who goes on and does not read.
				for n := range uint32(2 * tc.most) {
					if tc.write(fr, head.Bytes(), n) != nil {
						break
					}
				}
				if code, ok := <-told; code != http2.ErrCodeEnhanceYourCalm {
					t.Errorf("told: %v, %v, want ENHANCE_YOUR_CALM", ok, code)
				}
				wait(t, "nothing in flight", func() bool { return inFlight(t, f, "one") == 0 })
				if res, b := do(t, f.web(t, true), request1(t, "GET", scheme+"://one.localhost/", nil)); res.StatusCode != 200 {
					t.Errorf("another client got %s %s", res.Status, b)
				}
			})
		}
	}
}
