package h2client

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"runtime"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"
)

const (
	frameHead    = 9
	maxFrame     = 16 << 10 // what we take, and send until told otherwise
	streamWindow = 512 << 10
	connWindow   = 1 << 30
	// ownStreams is how many calls share a connection even when the other side
	// would take more: one goroutine reads for them all.
	ownStreams = 200
	// assumed is the other side's limit until its settings are there.
	assumed = 100
	// maxPending is what may wait for the connection to take it: more data
	// waits with its sender, and more control frames are an attack.
	maxPending = 256 << 10
	maxStream  = 1<<31 - 1
	// pingTimeout is how long an answer to a ping may take.
	pingTimeout = 15 * time.Second
)

// conn is one connection. run reads it; whoever has something to write appends
// to pend and flushes.
type conn struct {
	cl *Client
	c  net.Conn

	// Only run's goroutine knows these.
	in       []byte // what was read
	from, to int    // of in: what was not looked at yet
	dec      *hpack.Decoder
	head     block
	wake     []*stream // have news, and are told once in is used up

	frames atomic.Int64 // that came: a sign of life

	mu       sync.Mutex // guards what follows
	streams  map[uint32]*stream
	next     uint32
	reserved int // calls that have a place and are not in streams yet
	limit    int // of the other side's
	err      error
	leaving  bool // takes no more calls
	acked    bool // its settings have come
	pend     []byte
	spare    []byte
	writing  bool
	armed    time.Time
	window   int64 // to send
	initial  int64 // of a stream, to send
	most     int   // bytes of a frame, to send
	got      int64 // bytes of data that were not credited yet
	enc      *hpack.Encoder
	encBuf   headerBuf
	seen     int64     // frames when the timer last looked
	heard    time.Time // when it saw that they had grown
	pinged   bool
	idle     time.Time // since when there has been no call
	timer    *time.Timer
}

func newConn(cl *Client, nc net.Conn) *conn {
	c := &conn{cl: cl, c: nc, in: make([]byte, 2*(maxFrame+frameHead)), streams: map[uint32]*stream{}, next: 1, limit: assumed,
		window: 65535, initial: 65535, most: maxFrame, idle: time.Now(), heard: time.Now()}
	c.enc = hpack.NewEncoder(&c.encBuf)
	c.dec = hpack.NewDecoder(4096, c.head.field)
	c.dec.SetMaxStringLength(4 * cl.cfg.MaxHeader) // longer ends the connection, not the call alone
	c.head.max = cl.cfg.MaxHeader
	b := append([]byte(nil), http2.ClientPreface...)
	b = appendHead(b, 18, http2.FrameSettings, 0, 0)
	b = appendSetting(b, http2.SettingEnablePush, 0)
	b = appendSetting(b, http2.SettingInitialWindowSize, streamWindow)
	b = appendSetting(b, http2.SettingMaxHeaderListSize, uint32(cl.cfg.MaxHeader))
	c.pend = appendUint32(appendHead(b, 4, http2.FrameWindowUpdate, 0, 0), connWindow-65535)
	c.timer = time.AfterFunc(min(cl.cfg.PingAfter, cl.cfg.IdleTimeout), c.look)
	return c
}

// reserve keeps a place for a call, which start or release gives back.
func (c *conn) reserve() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.leaving || c.err != nil || len(c.streams)+c.reserved >= min(c.limit, ownStreams) {
		return false
	}
	c.reserved++
	return true
}

// broken is why the connection has ended, nil while it has not.
func (c *conn) broken() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.err
}

// look is the timer: it closes what is idle and asks what is silent.
func (c *conn) look() {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.err != nil {
		return
	}
	cfg, now := &c.cl.cfg, time.Now()
	if n := c.frames.Load(); n != c.seen {
		c.seen, c.heard, c.pinged = n, now, false
	}
	if len(c.streams)+c.reserved == 0 {
		left := cfg.IdleTimeout - now.Sub(c.idle)
		if left <= 0 {
			c.fail(errUnprocessed)
			return
		}
		c.timer.Reset(left)
		return
	}
	left := cfg.PingAfter - now.Sub(c.heard)
	switch {
	case c.pinged:
		c.fail(errors.New("the app does not answer pings"))
	case left <= 0:
		c.pinged = true
		c.pend = append(appendHead(c.pend, 8, http2.FramePing, 0, 0), "m3o live"...)
		c.timer.Reset(pingTimeout)
		c.flush()
	default:
		c.timer.Reset(min(left, cfg.IdleTimeout))
	}
}

func (c *conn) closeIdle() {
	c.mu.Lock()
	defer c.mu.Unlock()
	if len(c.streams)+c.reserved == 0 {
		c.fail(errUnprocessed)
	} else {
		c.leaving = true // and closes with the last call
		go c.cl.forget(c)
	}
}

// fail ends the connection and every call on it. c.mu is held.
func (c *conn) fail(err error) {
	if c.err != nil {
		return
	}
	c.err = err
	c.timer.Stop()
	_ = c.c.Close() // ends run, which forgets c
	for id, s := range c.streams {
		delete(c.streams, id)
		s.finish(err)
		s.signal()
	}
}

// drop takes a call off that is over. c.mu is held.
func (c *conn) drop(s *stream) {
	if c.streams[s.id] != s {
		return
	}
	delete(c.streams, s.id)
	if len(c.streams)+c.reserved == 0 {
		c.idle = time.Now()
		if c.leaving {
			c.fail(errUnprocessed)
		}
	}
}

// flush writes what is pending unless another goroutine does. c.mu is held, and
// let go while it writes.
func (c *conn) flush() {
	if c.writing {
		return
	}
	c.writing = true
	if len(c.streams) > 1 {
		// Others who are about to write go along: one system call for them all.
		c.mu.Unlock()
		runtime.Gosched()
		c.mu.Lock()
	}
	for len(c.pend) > 0 && c.err == nil {
		b := c.pend
		c.pend, c.spare = c.spare[:0], nil
		full := len(b) > maxPending
		if now := time.Now(); now.Sub(c.armed) > c.cl.cfg.WriteTimeout/4 {
			c.armed = now
			_ = c.c.SetWriteDeadline(now.Add(c.cl.cfg.WriteTimeout))
		}
		c.mu.Unlock()
		_, err := c.c.Write(b)
		c.mu.Lock()
		if cap(b) <= maxPending {
			c.spare = b
		}
		if err != nil {
			c.fail(fmt.Errorf("write: %w", err))
		}
		if full {
			c.wakeSenders()
		}
	}
	c.writing = false
}

// wakeSenders lets those go on who wait for the connection. c.mu is held.
func (c *conn) wakeSenders() {
	for _, s := range c.streams {
		if s.blocked {
			s.blocked = false
			s.maySend()
		}
	}
}

// connError is a fault of the other side that ends the connection.
type connError struct {
	code http2.ErrCode
	why  string
}

func (e connError) Error() string { return "the app speaks HTTP/2 wrongly: " + e.why }

// run reads until the connection ends, and ends what is on it.
func (c *conn) run() {
	err := c.readAll()
	c.tell()
	if errors.Is(err, io.EOF) {
		err = io.ErrUnexpectedEOF // that of an answer is a good end
	}
	c.mu.Lock()
	if ce, ok := errors.AsType[connError](err); ok && c.err == nil {
		c.pend = appendUint32(appendUint32(appendHead(c.pend, 8, http2.FrameGoAway, 0, 0), 0), uint32(ce.code))
		c.flush()
	}
	c.fail(err)
	c.mu.Unlock()
	c.cl.forget(c)
}

// fill reads until there are n bytes to look at.
func (c *conn) fill(n int) error {
	for c.to-c.from < n {
		if c.from > 0 && c.from+n > len(c.in) {
			c.to = copy(c.in, c.in[c.from:c.to])
			c.from = 0
		}
		if c.from == c.to {
			c.from, c.to = 0, 0
		}
		c.tell()
		m, err := c.c.Read(c.in[c.to:])
		c.to += m
		if err != nil && c.to-c.from < n {
			return err
		}
	}
	return nil
}

// tell wakes those who have news.
func (c *conn) tell() {
	if len(c.wake) == 0 {
		return
	}
	for i, s := range c.wake {
		s.queued = false
		s.signal()
		c.wake[i] = nil
	}
	c.wake = c.wake[:0]
}

func (c *conn) readAll() error {
	for {
		if err := c.fill(frameHead); err != nil {
			return err
		}
		h := c.in[c.from:]
		n := int(h[0])<<16 | int(h[1])<<8 | int(h[2])
		t, flags, id := http2.FrameType(h[3]), http2.Flags(h[4]), binary.BigEndian.Uint32(h[5:])&maxStream
		if n > maxFrame {
			return connError{http2.ErrCodeFrameSize, "a frame larger than allowed"}
		}
		if err := c.fill(frameHead + n); err != nil {
			if errors.Is(err, io.EOF) {
				err = io.ErrUnexpectedEOF
			}
			return err
		}
		p := c.in[c.from+frameHead : c.from+frameHead+n]
		c.from += frameHead + n
		c.frames.Add(1)
		if c.head.open != (t == http2.FrameContinuation) || c.head.open && id != c.head.id {
			return connError{http2.ErrCodeProtocol, "a header block that is interrupted, or goes on from nothing"}
		}
		if err := c.frame(t, flags, id, p); err != nil {
			return err
		}
	}
}

func (c *conn) frame(t http2.FrameType, flags http2.Flags, id uint32, p []byte) error {
	size := func(ok bool) error {
		if !ok {
			return connError{http2.ErrCodeFrameSize, "a " + t.String() + " frame of a wrong size"}
		}
		return nil
	}
	switch t {
	case http2.FrameData, http2.FrameHeaders, http2.FrameRSTStream, http2.FrameContinuation:
		if id == 0 || id%2 == 0 {
			return connError{http2.ErrCodeProtocol, "a " + t.String() + " frame of a stream that cannot be"}
		}
	case http2.FrameSettings, http2.FramePing, http2.FrameGoAway:
		if id != 0 {
			return connError{http2.ErrCodeProtocol, "a " + t.String() + " frame of a stream"}
		}
	}
	switch t {
	case http2.FrameData:
		whole := len(p)
		p, ok := unpad(p, flags.Has(http2.FlagDataPadded))
		if !ok {
			return connError{http2.ErrCodeProtocol, "padding longer than its frame"}
		}
		return c.data(id, p, whole, flags.Has(http2.FlagDataEndStream))
	case http2.FrameHeaders:
		p, ok := unpad(p, flags.Has(http2.FlagHeadersPadded))
		if ok && flags.Has(http2.FlagHeadersPriority) {
			if ok = len(p) >= 5; ok {
				p = p[5:]
			}
		}
		if !ok {
			return connError{http2.ErrCodeProtocol, "padding longer than its frame"}
		}
		c.head.begin(id, flags.Has(http2.FlagHeadersEndStream))
		c.dec.SetEmitEnabled(true)
		return c.headers(p, flags.Has(http2.FlagHeadersEndHeaders))
	case http2.FrameContinuation:
		return c.headers(p, flags.Has(http2.FlagContinuationEndHeaders))
	case http2.FramePushPromise:
		return connError{http2.ErrCodeProtocol, "a push, which was forbidden"}
	case http2.FrameRSTStream:
		if err := size(len(p) == 4); err != nil {
			return err
		}
		c.mu.Lock()
		defer c.mu.Unlock()
		if s := c.streams[id]; s != nil {
			s.finish(http2.StreamError{StreamID: id, Code: http2.ErrCode(binary.BigEndian.Uint32(p))})
			c.drop(s)
			s.signal()
		}
		return nil
	case http2.FrameSettings:
		if flags.Has(http2.FlagSettingsAck) {
			return size(len(p) == 0)
		}
		if err := size(len(p)%6 == 0); err != nil {
			return err
		}
		return c.settings(p)
	case http2.FramePing:
		if err := size(len(p) == 8); err != nil || flags.Has(http2.FlagPingAck) {
			return err
		}
		c.mu.Lock()
		defer c.mu.Unlock()
		return c.control(append(appendHead(c.pend, 8, http2.FramePing, http2.FlagPingAck, 0), p...))
	case http2.FrameGoAway:
		if err := size(len(p) >= 8); err != nil {
			return err
		}
		c.goAway(binary.BigEndian.Uint32(p) & maxStream)
		return nil
	case http2.FrameWindowUpdate:
		if err := size(len(p) == 4); err != nil {
			return err
		}
		return c.credit(id, int64(binary.BigEndian.Uint32(p)&maxStream))
	}
	return nil // unknown, or a priority
}

func unpad(p []byte, padded bool) ([]byte, bool) {
	if !padded {
		return p, true
	}
	if len(p) == 0 || int(p[0]) >= len(p) {
		return nil, false
	}
	return p[1 : len(p)-int(p[0])], true
}

// control makes b, pend with a frame more, what is pending. c.mu is held.
func (c *conn) control(b []byte) error {
	c.pend = b
	if len(b) > 2*maxPending {
		return connError{http2.ErrCodeEnhanceYourCalm, "more questions than it takes answers"}
	}
	c.flush()
	return nil
}

func (c *conn) settings(p []byte) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if !c.acked {
		c.acked = true
		c.limit = 1 << 30 // without a word there is none
	}
	for ; len(p) > 0; p = p[6:] {
		v := binary.BigEndian.Uint32(p[2:])
		switch http2.SettingID(binary.BigEndian.Uint16(p)) {
		case http2.SettingMaxConcurrentStreams:
			c.limit = int(min(v, 1<<30))
		case http2.SettingInitialWindowSize:
			if v > maxStream {
				return connError{http2.ErrCodeFlowControl, "a window larger than there can be"}
			}
			grow := int64(v) - c.initial
			c.initial = int64(v)
			for _, s := range c.streams {
				if s.window += grow; s.window > maxStream {
					return connError{http2.ErrCodeFlowControl, "a window larger than there can be"}
				}
			}
			c.wakeSenders()
		case http2.SettingMaxFrameSize:
			if v < maxFrame || v >= 1<<24 {
				return connError{http2.ErrCodeProtocol, "a frame size that cannot be"}
			}
			c.most = int(min(v, 64<<10))
		case http2.SettingHeaderTableSize:
			c.enc.SetMaxDynamicTableSizeLimit(min(v, 4096))
		}
	}
	return c.control(appendHead(c.pend, 0, http2.FrameSettings, http2.FlagSettingsAck, 0))
}

// goAway ends the calls the other side has not begun, and lets the others end.
func (c *conn) goAway(last uint32) {
	c.cl.forget(c)
	c.mu.Lock()
	defer c.mu.Unlock()
	c.leaving = true
	for id, s := range c.streams {
		if id > last {
			delete(c.streams, id)
			s.finish(errUnprocessed)
			s.signal()
		}
	}
	if len(c.streams)+c.reserved == 0 {
		c.fail(errUnprocessed)
	}
}

func (c *conn) credit(id uint32, n int64) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if id == 0 {
		if c.window += n; n == 0 || c.window > maxStream {
			return connError{http2.ErrCodeFlowControl, "a window of a wrong size"}
		}
		c.wakeSenders()
		return nil
	}
	s := c.streams[id]
	if s == nil {
		return nil
	}
	if s.window += n; n == 0 || s.window > maxStream {
		s.reset(http2.ErrCodeFlowControl, errFault("a window of a wrong size"))
		return nil
	}
	if s.blocked {
		s.blocked = false
		s.maySend()
	}
	return nil
}

// data is a DATA frame that took whole bytes of the windows.
func (c *conn) data(id uint32, p []byte, whole int, end bool) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	var err error
	if c.got += int64(whole); c.got > connWindow/4 {
		err = c.control(appendUint32(appendHead(c.pend, 4, http2.FrameWindowUpdate, 0, 0), uint32(c.got)))
		c.got = 0
	}
	s := c.streams[id]
	if s == nil {
		if id >= c.next {
			return connError{http2.ErrCodeProtocol, "data of a stream that was not opened"}
		}
		return err // one we gave up
	}
	switch {
	case s.res == nil || s.done:
		s.reset(http2.ErrCodeProtocol, errFault("data before its header or after its end"))
		return err
	case s.unread()+s.owed+whole > streamWindow:
		s.reset(http2.ErrCodeFlowControl, errFault("more data than was asked for"))
		return err
	case s.left >= 0 && int64(len(p)) > s.left:
		s.reset(http2.ErrCodeProtocol, errFault("a body longer than announced"))
		return err
	}
	if s.left >= 0 {
		s.left -= int64(len(p))
	}
	if !s.closed {
		s.buf = append(s.buf, p...)
	}
	s.owed += whole - len(p)
	if end {
		s.end(nil)
	}
	c.news(s)
	return err
}

// news notes that s is to be woken. Only run's goroutine calls it.
func (c *conn) news(s *stream) {
	if !s.queued {
		s.queued = true
		c.wake = append(c.wake, s)
	}
}

// headers is a part of a header block.
func (c *conn) headers(p []byte, last bool) error {
	b := &c.head
	if b.size += len(p); b.size > 4*b.max+maxFrame {
		return connError{http2.ErrCodeEnhanceYourCalm, "an endless header"}
	}
	if _, err := c.dec.Write(p); err != nil {
		return connError{http2.ErrCodeCompression, "a header that cannot be decoded"}
	}
	if b.over {
		c.dec.SetEmitEnabled(false) // the table must go on, the rest need not
	}
	if b.open = !last; b.open {
		return nil
	}
	if err := c.dec.Close(); err != nil {
		return connError{http2.ErrCodeCompression, "a header that cannot be decoded"}
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	s := c.streams[b.id]
	if s == nil {
		if b.id >= c.next {
			return connError{http2.ErrCodeProtocol, "a header of a stream that was not opened"}
		}
		return nil
	}
	if fault := s.header(b); fault != "" {
		s.reset(http2.ErrCodeProtocol, errFault(fault))
		return nil
	}
	c.news(s)
	return nil
}

// start sends the header of req, and its body when that is at hand. The place
// that was reserved is used up.
func (c *conn) start(ctx context.Context, req *http.Request) (*stream, error) {
	s := &stream{c: c, ctx: ctx, ready: make(chan struct{}, 1), left: -1, isHead: req.Method == http.MethodHead}
	if k, ok := ctx.(cuttable); ok {
		s.cut = k.Cut()
	}
	var whole []byte
	none := req.Body == nil || req.Body == http.NoBody || req.ContentLength == 0
	ahead := none
	if b, ok := req.Body.(buffered); ok && !none {
		whole, ahead = b.Bytes(), true
	}
	c.mu.Lock()
	c.reserved--
	if c.err != nil || c.next >= maxStream-1 {
		c.fail(errUnprocessed)
		c.mu.Unlock()
		return nil, errUnprocessed
	}
	s.id, s.window = c.next, c.initial
	c.next += 2
	if c.next >= maxStream-1 {
		c.leaving = true
	}
	c.streams[s.id] = s
	c.writeHeader(req)
	c.appendHeaders(s.id, none || ahead && len(whole) == 0)
	s.sent = none || ahead && len(whole) == 0
	if n := int64(len(whole)); n > 0 && n <= min(s.window, c.window) && len(whole) <= c.most {
		c.pend = append(appendHead(c.pend, len(whole), http2.FrameData, http2.FlagDataEndStream, s.id), whole...)
		s.window -= n
		c.window -= n
		s.sent = true
	}
	c.flush()
	if !s.sent {
		s.may = make(chan struct{}, 1)
		s.over = make(chan struct{})
		if s.err != nil || s.done {
			close(s.over)
		}
		c.mu.Unlock()
		if ahead {
			if err := s.write(whole, true); err != nil && !errors.Is(err, errOver) {
				s.cancel(err)
			}
			return s, nil
		}
		s.streamed = true
		go s.sendBody(req)
		return s, nil
	}
	c.mu.Unlock()
	return s, nil
}
