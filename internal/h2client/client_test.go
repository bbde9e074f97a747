package h2client

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"
)

// ready is a body that is all there.
type ready struct{ *bytes.Reader }

func (r ready) Bytes() []byte { return []byte("all there") }
func (r ready) Close() error  { return nil }

func request(ctx context.Context, method, path string, body io.Reader, length int64) *http.Request {
	r, err := http.NewRequestWithContext(ctx, method, "http://app.localhost"+path, body)
	if err != nil {
		panic(err)
	}
	r.ContentLength = length
	return r
}

// Go's own server takes all that a client may send: small and large bodies,
// trailers, many calls at once, each way longer than a window.
func TestAgainstGosServer(t *testing.T) {
	mux := http.NewServeMux()
	mux.HandleFunc("/echo", func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Trailer", "X-Sum")
		w.Header().Set("X-Length", fmt.Sprint(r.ContentLength))
		n, err := io.Copy(w, r.Body)
		if err != nil {
			t.Errorf("server: %v", err)
		}
		w.Header().Set("X-Sum", fmt.Sprint(n))
		w.Header().Set(http.TrailerPrefix+"X-Theirs", r.Trailer.Get("X-Mine"))
	})
	mux.HandleFunc("/early", func(w http.ResponseWriter, _ *http.Request) { // reads no body
		w.Header().Add("Set-Cookie", "a=1")
		w.Header().Add("Set-Cookie", "b=2")
		w.WriteHeader(http.StatusEarlyHints)
		w.WriteHeader(http.StatusTeapot)
	})
	srv := &http.Server{Handler: mux, Protocols: new(http.Protocols), ReadHeaderTimeout: time.Minute}
	srv.Protocols.SetUnencryptedHTTP2(true)
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	served := make(chan error, 1)
	go func() { served <- srv.Serve(ln) }()
	cl := New(Config{Dial: func(ctx context.Context) (net.Conn, error) {
		return (&net.Dialer{}).DialContext(ctx, "tcp", ln.Addr().String())
	}})
	defer func() {
		cl.CloseIdleConnections()
		_ = srv.Close()
		<-served
	}()
	var wg sync.WaitGroup
	for i := range 64 {
		wg.Go(func() {
			size := []int{1, 100, 5 << 10, 70 << 10, 2 << 20}[i%5]
			body := bytes.Repeat([]byte("x"), size)
			length := int64(size)
			if i%2 == 0 {
				length = -1
			}
			req := request(t.Context(), "POST", "/echo?q=a%20b", io.NopCloser(bytes.NewReader(body)), length)
			if i%4 == 0 {
				req.Trailer = http.Header{"X-Mine": {"here"}}
			}
			res, err := cl.RoundTrip(req)
			if err != nil {
				t.Error(err)
				return
			}
			got, err := io.ReadAll(res.Body)
			_ = res.Body.Close()
			if err != nil || !bytes.Equal(got, body) {
				t.Errorf("%d bytes came back of %d, %v", len(got), size, err)
			}
			if h := res.Header.Get("X-Length"); h != fmt.Sprint(length) {
				t.Errorf("the server saw the length %s, want %d", h, length)
			}
			if res.Trailer.Get("X-Sum") != fmt.Sprint(size) || res.Trailer.Get("X-Theirs") != req.Trailer.Get("X-Mine") {
				t.Errorf("trailer %v", res.Trailer)
			}
		})
	}
	wg.Wait()
	for _, body := range []io.ReadCloser{nil, http.NoBody, ready{}} {
		length := int64(0)
		if _, ok := body.(ready); ok {
			length = 9
		}
		req := request(t.Context(), "POST", "/echo", body, length)
		res, err := cl.RoundTrip(req)
		if err != nil {
			t.Fatal(err)
		}
		if got, err := io.ReadAll(res.Body); err != nil || int64(len(got)) != length {
			t.Errorf("%q, %v of a body of %d bytes", got, err, length)
		}
	}
	for _, method := range []string{"HEAD", "GET", "POST"} {
		res, err := cl.RoundTrip(request(t.Context(), method, "/early", io.NopCloser(strings.NewReader(strings.Repeat("x", 1<<20))), 1<<20))
		if err != nil {
			t.Fatal(err)
		}
		b, err := io.ReadAll(res.Body)
		_ = res.Body.Close()
		if err != nil || res.StatusCode != http.StatusTeapot || len(b) > 0 || len(res.Header["Set-Cookie"]) != 2 {
			t.Errorf("%s: %d %v %q, %v", method, res.StatusCode, res.Header, b, err)
		}
	}
}

// peer is the other end of a connection, which a test plays.
type peer struct {
	t      *testing.T
	c      net.Conn
	fr     *http2.Framer
	frames chan seen
	buf    bytes.Buffer
	enc    *hpack.Encoder
}

// seen is what came of a frame.
type seen struct {
	t    http2.FrameType
	id   uint32
	code http2.ErrCode
}

// play makes a client and gives each connection it dials to the script. A pipe
// holds nothing, so all that the client sends is read all the time.
func play(t *testing.T, cfg Config, script func(*peer)) *Client {
	cfg.Dial = func(context.Context) (net.Conn, error) {
		ours, theirs := net.Pipe()
		p := &peer{t: t, c: theirs, fr: http2.NewFramer(theirs, theirs), frames: make(chan seen, 10_000)}
		p.enc = hpack.NewEncoder(&p.buf)
		go func() {
			defer close(p.frames)
			if _, err := io.ReadFull(theirs, make([]byte, len(http2.ClientPreface))); err != nil {
				return
			}
			for {
				f, err := p.fr.ReadFrame()
				if err != nil {
					return
				}
				s := seen{t: f.Header().Type, id: f.Header().StreamID}
				if r, ok := f.(*http2.RSTStreamFrame); ok {
					s.code = r.ErrCode
				}
				p.frames <- s
			}
		}()
		go func() {
			defer theirs.Close()
			_ = p.fr.WriteSettings()
			script(p)
			for range p.frames { // until the client ends it
			}
		}()
		return ours, nil
	}
	return New(cfg)
}

// next is the stream of the next request; 0 when the connection has ended.
func (p *peer) next() uint32 {
	for f := range p.frames {
		if f.t == http2.FrameHeaders {
			return f.id
		}
	}
	return 0
}

func (p *peer) head(id uint32, end bool, kv ...string) {
	p.buf.Reset()
	for i := 0; i < len(kv); i += 2 {
		_ = p.enc.WriteField(hpack.HeaderField{Name: kv[i], Value: kv[i+1]})
	}
	_ = p.fr.WriteHeaders(http2.HeadersFrameParam{StreamID: id, BlockFragment: p.buf.Bytes(), EndHeaders: true, EndStream: end})
}

// What a lying app sends ends its own call, or the connection, and never more.
func TestAnswersThatAreWrong(t *testing.T) {
	for name, tc := range map[string]struct {
		script func(*peer, uint32)
		want   string
	}{
		"no status":    {func(p *peer, id uint32) { p.head(id, true, "x", "y") }, "no status"},
		"two statuses": {func(p *peer, id uint32) { p.head(id, true, ":status", "200", ":status", "200") }, "misplaced"},
		"late status":  {func(p *peer, id uint32) { p.head(id, true, "x", "y", ":status", "200") }, "misplaced"},
		"other pseudo": {func(p *peer, id uint32) { p.head(id, true, ":status", "200", ":path", "/") }, "misplaced"},
		"bad status":   {func(p *peer, id uint32) { p.head(id, true, ":status", "20") }, "misplaced"},
		"capital":      {func(p *peer, id uint32) { p.head(id, true, ":status", "200", "X-Y", "z") }, "bad header"},
		"line feed":    {func(p *peer, id uint32) { p.head(id, true, ":status", "200", "x", "y\r\nz: 1") }, "bad header"},
		"two lengths": {func(p *peer, id uint32) {
			p.head(id, true, ":status", "200", "content-length", "1", "content-length", "2")
		}, "content-length"},
		"large header": {func(p *peer, id uint32) { p.head(id, true, ":status", "200", "x", strings.Repeat("y", 5000)) }, "larger than the limit"},
		"interim end":  {func(p *peer, id uint32) { p.head(id, true, ":status", "103") }, "interim"},
		"data first":   {func(p *peer, id uint32) { _ = p.fr.WriteData(id, true, []byte("x")) }, "before its header"},
		"reset":        {func(p *peer, id uint32) { _ = p.fr.WriteRSTStream(id, http2.ErrCodeInternal) }, "INTERNAL_ERROR"},
		"push": {func(p *peer, id uint32) {
			_ = p.fr.WritePushPromise(http2.PushPromiseParam{StreamID: id, PromiseID: 2})
		}, "forbidden"},
		"unopened": {func(p *peer, id uint32) { p.head(id+2, true, ":status", "200") }, "not opened"},
		"even":     {func(p *peer, _ uint32) { p.head(2, true, ":status", "200") }, "cannot be"},
		"window":   {func(p *peer, _ uint32) { _ = p.fr.WriteWindowUpdate(0, 1<<31-1) }, "window"},
		"garbage":  {func(p *peer, _ uint32) { _, _ = p.c.Write(bytes.Repeat([]byte("HTTP/1.1 400 \r\n"), 9)) }, "larger than allowed"},
		"interrupted head": {func(p *peer, id uint32) {
			_ = p.fr.WriteHeaders(http2.HeadersFrameParam{StreamID: id})
			_ = p.fr.WritePing(false, [8]byte{})
		}, "interrupted"},
		"gone": {func(p *peer, _ uint32) { _ = p.c.Close() }, "EOF"},
		"compression": {func(p *peer, id uint32) {
			_ = p.fr.WriteHeaders(http2.HeadersFrameParam{StreamID: id, BlockFragment: []byte{0xff, 0xff, 0xff}, EndHeaders: true})
		}, "decoded"},
		"settings": {func(p *peer, _ uint32) {
			_ = p.fr.WriteSettings(http2.Setting{ID: http2.SettingInitialWindowSize, Val: 1 << 31})
		}, "window"},
		"flood": {func(p *peer, id uint32) {
			_ = p.fr.WriteHeaders(http2.HeadersFrameParam{StreamID: id})
			for range 100 {
				_ = p.fr.WriteContinuation(id, false, bytes.Repeat([]byte{0x82}, 16<<10))
			}
		}, "endless"},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				cl := play(t, Config{MaxHeader: 4096}, func(p *peer) {
					if id := p.next(); id != 0 {
						tc.script(p, id)
					}
				})
				_, err := cl.RoundTrip(request(t.Context(), "GET", "/", nil, 0))
				if err == nil || !strings.Contains(err.Error(), tc.want) {
					t.Errorf("got %v, want %q", err, tc.want)
				}
				cl.CloseIdleConnections()
			})
		})
	}
}

func TestBodiesThatAreWrong(t *testing.T) {
	for name, tc := range map[string]struct {
		script func(*peer, uint32)
		want   string
	}{
		"too long": {func(p *peer, id uint32) {
			p.head(id, false, ":status", "200", "content-length", "1")
			_ = p.fr.WriteData(id, true, []byte("xy"))
		}, "longer than announced"},
		"too short": {func(p *peer, id uint32) {
			p.head(id, false, ":status", "200", "content-length", "9")
			_ = p.fr.WriteData(id, true, []byte("xy"))
		}, "unexpected EOF"},
		"broken": {func(p *peer, id uint32) { p.head(id, false, ":status", "200"); _ = p.c.Close() }, ""},
		"reset": {func(p *peer, id uint32) {
			p.head(id, false, ":status", "200")
			_ = p.fr.WriteRSTStream(id, http2.ErrCodeCancel)
		}, "CANCEL"},
		"second head": {func(p *peer, id uint32) { p.head(id, false, ":status", "200"); p.head(id, false, "x", "y") }, "second header"},
		"too much": {func(p *peer, id uint32) {
			p.head(id, false, ":status", "200")
			for range streamWindow/(16<<10) + 1 {
				_ = p.fr.WriteData(id, false, make([]byte, 16<<10))
			}
		}, "more data"},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				cl := play(t, Config{}, func(p *peer) {
					id := p.next()
					tc.script(p, id)
				})
				res, err := cl.RoundTrip(request(t.Context(), "GET", "/", nil, 0))
				if err != nil && name == "broken" {
					return // the end was faster
				}
				if err != nil {
					t.Fatal(err)
				}
				synctest.Wait()
				_, err = io.ReadAll(res.Body)
				if err == nil || !strings.Contains(err.Error(), tc.want) {
					t.Errorf("got %v, want an error with %q", err, tc.want)
				}
				_ = res.Body.Close()
				cl.CloseIdleConnections()
			})
		})
	}
}

// A call that the other side says it has not begun is sent again, on another
// connection; the others are let end.
func TestGoAwayLosesNothing(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		conns := 0
		cl := play(t, Config{}, func(p *peer) {
			conns++
			first := conns == 1
			id := p.next()
			if !first {
				p.head(id, true, ":status", "204")
				return
			}
			second := p.next()
			_ = p.fr.WriteGoAway(id, http2.ErrCodeNo, nil)
			if second != id+2 {
				p.t.Errorf("streams %d and %d", id, second)
			}
			p.head(id, true, ":status", "200")
		})
		codes := make(chan int, 2)
		for range 2 {
			go func() {
				res, err := cl.RoundTrip(request(t.Context(), "POST", "/", ready{}, 9))
				if err != nil {
					t.Error(err)
					codes <- 0
					return
				}
				codes <- res.StatusCode
			}()
			synctest.Wait()
		}
		if sum := <-codes + <-codes; sum != 404 || conns != 2 {
			t.Errorf("statuses add up to %d over %d connections", sum, conns)
		}
		cl.CloseIdleConnections()
	})
}

func TestRefusedStreamIsSentAgain(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		cl := play(t, Config{}, func(p *peer) {
			_ = p.fr.WriteRSTStream(p.next(), http2.ErrCodeRefusedStream)
			p.head(p.next(), true, ":status", "200")
			for id := p.next(); id != 0; id = p.next() {
				_ = p.fr.WriteRSTStream(id, http2.ErrCodeRefusedStream)
			}
		})
		if _, err := cl.RoundTrip(request(t.Context(), "GET", "/", nil, 0)); err != nil {
			t.Error(err)
		}
		if _, err := cl.RoundTrip(request(t.Context(), "GET", "/", nil, 0)); err == nil || !strings.Contains(err.Error(), "REFUSED_STREAM") {
			t.Errorf("got %v, want the refusal in the end", err)
		}
		cl.CloseIdleConnections()
	})
}

// A connection takes as many calls as the other side says, and more get another.
func TestStreamLimitOpensAnotherConnection(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		conns := 0
		cl := play(t, Config{}, func(p *peer) {
			conns++
			_ = p.fr.WriteSettings(http2.Setting{ID: http2.SettingMaxConcurrentStreams, Val: 1})
			for id := p.next(); id != 0; id = p.next() {
				p.head(id, false, ":status", "200")
			}
		})
		for range 3 {
			if _, err := cl.RoundTrip(request(t.Context(), "GET", "/", nil, 0)); err != nil {
				t.Fatal(err)
			}
			synctest.Wait()
		}
		if conns != 3 {
			t.Errorf("%d connections for 3 calls, one each", conns)
		}
		for _, c := range slices.Clone(cl.conns) {
			c.mu.Lock()
			c.fail(errClosed)
			c.mu.Unlock()
		}
	})
}

// A caller that gives up is not kept, wherever it waits, and the app is told.
func TestCancelledCallIsReset(t *testing.T) {
	for _, at := range []string{"dial", "head", "body", "window"} {
		t.Run(at, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				reset := false
				cl := play(t, Config{}, func(p *peer) {
					id := p.next()
					if at == "body" {
						p.head(id, false, ":status", "200")
					}
					for f := range p.frames {
						reset = reset || f.t == http2.FrameRSTStream && f.code == http2.ErrCodeCancel
					}
				})
				dial := cl.cfg.Dial
				cl.cfg.Dial = func(ctx context.Context) (net.Conn, error) {
					if at == "dial" {
						<-ctx.Done()
						return nil, ctx.Err()
					}
					return dial(ctx)
				}
				ctx, cancel := context.WithCancel(t.Context())
				go func() {
					synctest.Wait()
					cancel()
				}()
				req := request(ctx, "POST", "/", nil, 0)
				if at == "window" {
					req = request(ctx, "POST", "/", io.NopCloser(bytes.NewReader(make([]byte, 1<<20))), 1<<20)
				}
				res, err := cl.RoundTrip(req)
				if err == nil {
					_, err = res.Body.Read(make([]byte, 1))
				}
				if !errors.Is(err, context.Canceled) {
					t.Errorf("got %v", err)
				}
				synctest.Wait()
				if at != "dial" && !reset {
					t.Error("the app was not told")
				}
				cl.CloseIdleConnections()
			})
		})
	}
}

// An app that says nothing is asked whether it lives, and given up.
func TestSilentAppIsGivenUp(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		cl := play(t, Config{PingAfter: time.Second}, func(p *peer) { p.next() })
		began := time.Now()
		_, err := cl.RoundTrip(request(t.Context(), "GET", "/", nil, 0))
		if err == nil || !strings.Contains(err.Error(), "pings") || time.Since(began) > 20*time.Second {
			t.Errorf("got %v after %v", err, time.Since(began))
		}
	})
}

// Servers of gRPC end the connection of who asks more often than every five
// minutes: a call on which nothing happens for an hour must live.
func TestSilentCallIsNotTakenForAnAttack(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var pings []time.Time
		cl := play(t, Config{}, func(p *peer) {
			id := p.next()
			p.head(id, false, ":status", "200")
			end := time.After(time.Hour)
			for {
				select {
				case f, ok := <-p.frames:
					if !ok {
						return
					}
					if f.t == http2.FramePing {
						pings = append(pings, time.Now())
						_ = p.fr.WritePing(true, [8]byte{})
					}
				case <-end:
					_ = p.fr.WriteData(id, true, []byte("at last"))
					return
				}
			}
		})
		res, err := cl.RoundTrip(request(t.Context(), "GET", "/", nil, 0))
		if err != nil {
			t.Fatal(err)
		}
		if b, err := io.ReadAll(res.Body); err != nil || string(b) != "at last" {
			t.Errorf("got %q, %v", b, err)
		}
		if len(pings) < 10 {
			t.Errorf("%d pings in an hour", len(pings))
		}
		for i := 1; i < len(pings); i++ {
			if d := pings[i].Sub(pings[i-1]); d <= 5*time.Minute {
				t.Errorf("two pings within %v", d)
			}
		}
		cl.CloseIdleConnections()
	})
}

func TestIdleConnectionIsClosed(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ended := make(chan struct{})
		cl := play(t, Config{IdleTimeout: time.Minute}, func(p *peer) {
			p.head(p.next(), true, ":status", "200")
			p.next()
			close(ended)
		})
		if _, err := cl.RoundTrip(request(t.Context(), "GET", "/", nil, 0)); err != nil {
			t.Fatal(err)
		}
		<-ended
	})
}

// Whatever an app sends, a call ends, and nothing is left when it has.
func FuzzServer(f *testing.F) {
	f.Add([]byte{})
	f.Add([]byte("HTTP/1.1 400 Bad Request\r\n\r\n"))
	var ok bytes.Buffer
	fr := http2.NewFramer(&ok, nil)
	_ = fr.WriteSettings(http2.Setting{ID: http2.SettingMaxConcurrentStreams, Val: 9})
	_ = fr.WriteHeaders(http2.HeadersFrameParam{StreamID: 1, BlockFragment: []byte{0x88}, EndHeaders: true})
	_ = fr.WriteData(1, false, []byte("hello"))
	_ = fr.WriteWindowUpdate(1, 9)
	_ = fr.WritePing(false, [8]byte{})
	_ = fr.WriteHeaders(http2.HeadersFrameParam{StreamID: 1, BlockFragment: []byte{0x40, 1, 'x', 1, 'y'}, EndHeaders: true, EndStream: true})
	_ = fr.WriteGoAway(1, 0, nil)
	f.Add(ok.Bytes())
	f.Add(binary.BigEndian.AppendUint32([]byte{0, 0, 4, 3, 0, 0, 0, 0, 1}, 7))
	f.Fuzz(func(t *testing.T, in []byte) {
		synctest.Test(t, func(t *testing.T) {
			cl := New(Config{MaxHeader: 1 << 10, PingAfter: time.Second, Dial: func(context.Context) (net.Conn, error) {
				ours, theirs := net.Pipe()
				go func() { _, _ = io.Copy(io.Discard, theirs) }()
				go func() {
					_, _ = theirs.Write(in)
					_ = theirs.Close()
				}()
				return ours, nil
			}})
			res, err := cl.RoundTrip(request(t.Context(), "POST", "/", io.NopCloser(strings.NewReader("body")), -1))
			if err == nil {
				_, _ = io.Copy(io.Discard, io.LimitReader(res.Body, 1<<20))
				_ = res.Body.Close()
			}
			cl.CloseIdleConnections()
		})
	})
}

func TestReadyTellsWhetherAReadWouldWait(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		more := make(chan struct{})
		cl := play(t, Config{}, func(p *peer) {
			id := p.next()
			p.head(id, false, ":status", "200")
			<-more
			_ = p.fr.WriteData(id, false, []byte("x"))
			<-more
			_ = p.fr.WriteData(id, true, nil)
		})
		res, err := cl.RoundTrip(request(t.Context(), "GET", "/", nil, 0))
		if err != nil {
			t.Fatal(err)
		}
		ready := res.Body.(interface{ Ready() bool }).Ready
		for _, want := range []bool{false, true, false} {
			if synctest.Wait(); ready() != want {
				t.Errorf("ready %v, want %v", !want, want)
			}
			if want {
				_, _ = res.Body.Read(make([]byte, 9))
				continue
			}
			more <- struct{}{}
		}
		if synctest.Wait(); !ready() {
			t.Error("the end is not ready")
		}
		_ = res.Body.Close()
		cl.CloseIdleConnections()
	})
}

// A call that comes while a dial that everybody has given up is about to end
// must not get that dial's end for an answer.
func TestCallAfterADialThatWasGivenUpDialsItself(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		dials, end := 0, make(chan struct{})
		second := errors.New("the second dial")
		cl := New(Config{Dial: func(ctx context.Context) (net.Conn, error) {
			if dials++; dials > 1 {
				return nil, second
			}
			<-ctx.Done()
			<-end
			return nil, ctx.Err()
		}})
		ctx, cancel := context.WithCancel(t.Context())
		first := make(chan error, 1)
		go func() {
			_, err := cl.RoundTrip(request(ctx, "GET", "/", nil, 0)) //nolint:bodyclose // there is none
			first <- err
		}()
		synctest.Wait()
		cancel()
		if err := <-first; !errors.Is(err, context.Canceled) {
			t.Errorf("the call that was given up: %v", err)
		}
		if _, err := cl.RoundTrip(request(t.Context(), "GET", "/", nil, 0)); !errors.Is(err, second) { //nolint:bodyclose // there is none
			t.Errorf("the call after it: %v, want %v", err, second)
		}
		close(end)
	})
}
