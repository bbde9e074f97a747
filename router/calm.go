package router

import (
	"encoding/binary"
	"errors"
	"io"
	"net"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/net/http2"
)

// What a client sends on an HTTP/2 connection that is of no use to anybody has
// to stay in proportion to what it is for. Each such frame takes one of what is
// spare; frames of answers and the passing of time give some back. Who has none
// left is sent GOAWAY with ENHANCE_YOUR_CALM. So floods of every kind end after
// a number of frames, which net/http bounds for some of them only, and by the
// memory they cost: a client that reads what they are answered by could go on.
const (
	calmSpare     = 1000   // at first
	calmMost      = 10_000 // at any time
	calmPerAnswer = 10     // for each frame of an answer: WINDOW_UPDATEs, gRPC's pings that measure
	calmPerSecond = 10
	// calmDrain and calmTime bound what is read off after the GOAWAY, for
	// without that a reset would take it away from the client.
	calmDrain = 1 << 20
	calmTime  = time.Second
)

var errFlood = errors.New("the client floods its HTTP/2 connection")

const frameHead = 9

// h2frames follows the frames in one direction of an HTTP/2 connection.
type h2frames struct {
	head  [frameHead]byte
	have  int  // of head
	left  int  // of the payload
	first byte // of the payload
}

// next goes over b up to where a frame ends, n bytes, and says whether one does.
func (f *h2frames) next(b []byte) (n int, ends bool) {
	if f.have < frameHead {
		n = copy(f.head[f.have:], b)
		if f.have += n; f.have < frameHead {
			return n, false
		}
		f.left = f.size()
	}
	m := min(f.left, len(b)-n)
	if m > 0 && f.left == f.size() {
		f.first = b[n]
	}
	n += m
	if f.left -= m; f.left > 0 {
		return n, false
	}
	f.have = 0
	return n, true
}

func (f *h2frames) size() int { return int(f.head[0])<<16 | int(f.head[1])<<8 | int(f.head[2]) }

func (f *h2frames) kind() http2.FrameType { return http2.FrameType(f.head[3]) }

func (f *h2frames) has(flag http2.Flags) bool { return http2.Flags(f.head[4])&flag != 0 }

func (f *h2frames) stream() uint32 { return binary.BigEndian.Uint32(f.head[5:]) &^ (1 << 31) }

// calm watches one HTTP/2 connection.
type calm struct {
	limit int // bytes of a header block
	spare atomic.Int64
	last  atomic.Uint32 // the newest stream

	// The goroutine that reads owns these.
	in    h2frames
	skip  int // bytes of the preface to come
	block int // bytes of the header block that is coming
	since time.Time

	over atomic.Bool   // no more
	told chan struct{} // closed when the client has been told
	mu   sync.Mutex    // guards what follows, and writing
	out  h2frames
	done bool // told is closed
}

func newCalm(limit int) *calm {
	c := &calm{limit: limit, skip: len(http2.ClientPreface), since: time.Now(), told: make(chan struct{})}
	c.spare.Store(calmSpare)
	return c
}

// read takes in what the client sent; false when it is too much.
func (c *calm) read(b []byte) bool {
	n := min(c.skip, len(b))
	c.skip -= n
	for b = b[n:]; len(b) > 0; b = b[n:] {
		var ends bool
		if n, ends = c.in.next(b); ends && !c.count() {
			return false
		}
	}
	return true
}

// count takes the frame in that has just ended.
func (c *calm) count() bool {
	f := &c.in
	switch f.kind() {
	case http2.FrameHeaders:
		if s := f.stream(); s > c.last.Load() {
			c.last.Store(s)
		}
		c.block = f.size()
		if f.has(http2.FlagHeadersEndHeaders) {
			c.block = 0
		}
		return true // a request; too many at once are refused by RST_STREAM, which write counts
	case http2.FrameContinuation:
		if c.block += f.size(); c.block > c.limit {
			return false
		}
		if f.has(http2.FlagContinuationEndHeaders) {
			c.block = 0
		}
	case http2.FrameData:
		empty := f.size() == 0 || f.has(http2.FlagDataPadded) && f.size() == 1+int(f.first)
		if !empty || f.has(http2.FlagDataEndStream) {
			return true // flow control bounds it
		}
	}
	return c.take()
}

// take takes one of what is spare.
func (c *calm) take() bool {
	if c.spare.Add(-1) >= 0 {
		return true
	}
	now := time.Now()
	more := min(int64(now.Sub(c.since).Seconds()*calmPerSecond), calmSpare)
	if more == 0 {
		return false
	}
	c.since = now
	return c.spare.Add(more) >= 0
}

// write sends p to the client, and after the frame that is on its way the
// good-bye, if it is time for that. What comes later is dropped without an
// error, upon which the server would close the connection while end reads.
func (c *calm) write(conn net.Conn, p []byte) (int, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	sent := 0
	for c.over.Load() && !c.done && c.out.have > 0 && sent < len(p) {
		n, _ := c.out.next(p[sent:])
		m, err := conn.Write(p[sent : sent+n])
		if sent += m; err != nil {
			return sent, err
		}
	}
	if c.over.Load() {
		c.goodbye(conn)
		return len(p), nil
	}
	n, err := conn.Write(p)
	for rest := p[:n]; len(rest) > 0; {
		m, ends := c.out.next(rest)
		rest = rest[m:]
		if !ends {
			break
		}
		switch c.out.kind() {
		case http2.FrameHeaders, http2.FrameData:
			if c.spare.Add(calmPerAnswer) > calmMost {
				c.spare.Store(calmMost)
			}
		case http2.FrameRSTStream: // an answer that had begun has paid for it
			c.spare.Add(-1)
		}
	}
	if c.over.Load() {
		c.goodbye(conn)
	}
	return n, err
}

// goodbye writes the GOAWAY where a frame may begin. c.mu is held.
func (c *calm) goodbye(conn net.Conn) {
	if c.done || c.out.have > 0 {
		return
	}
	c.done = true
	fr := http2.NewFramer(conn, nil)
	_ = fr.WriteGoAway(c.last.Load(), http2.ErrCodeEnhanceYourCalm, []byte("flood")) // it may be gone
	close(c.told)
}

// end ends the connection of a client that has to be told to calm down. The
// goroutine that reads calls it, and reads no more.
func (c *calm) end(conn net.Conn) {
	c.over.Store(true)
	limit := time.Now().Add(calmTime)
	_ = conn.SetDeadline(limit) // or a client that does not read would hold a write
	c.mu.Lock()
	c.goodbye(conn)
	c.mu.Unlock()
	late := time.NewTimer(calmTime)
	defer late.Stop()
	select {
	case <-c.told:
	case <-late.C:
	}
	if cw, ok := conn.(interface{ CloseWrite() error }); ok {
		_ = cw.CloseWrite()
	}
	_, _ = io.CopyN(io.Discard, conn, calmDrain)
}
