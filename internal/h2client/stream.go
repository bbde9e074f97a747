package h2client

import (
	"context"
	"errors"
	"io"
	"net/http"
	"strconv"
	"strings"

	"golang.org/x/net/http/httpguts"
	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"
)

// stream is one call. What is not said otherwise is guarded by c.mu.
type stream struct {
	c      *conn
	ctx    context.Context
	id     uint32          // never changes
	ready  chan struct{}   // there are news
	isHead bool            // never changes
	cut    <-chan struct{} // never changes; nil for never

	queued bool // in conn.wake; only run's goroutine knows

	res     *http.Response // once the header is there
	trailer http.Header
	buf     []byte // came and was not read yet, from off on
	off     int
	owed    int   // bytes that were read and not credited yet
	left    int64 // of the announced length, -1 for none
	done    bool  // the answer has ended
	err     error // why reading fails once buf is empty; io.EOF for a good end
	closed  bool  // nobody reads any more

	sent     bool          // the request is out
	may      chan struct{} // the sender may go on; nil when nothing is left to send
	over     chan struct{} // closed when sending makes no sense any more; as may
	blocked  bool          // the sender waits
	window   int64
	streamed bool // the body is read by a goroutine; of who called start
}

// errFault is an answer that is not right.
type errFault string

func (e errFault) Error() string { return "the app answered wrongly: " + string(e) }

// errOver ends the sending of a request whose answer has ended.
var errOver = errors.New("the call is over")

// signal wakes the reader.
func (s *stream) signal() {
	select {
	case s.ready <- struct{}{}:
	default:
	}
}

func (s *stream) maySend() {
	select {
	case s.may <- struct{}{}:
	default:
	}
}

func (s *stream) unread() int { return len(s.buf) - s.off }

// finish notes that no more comes. c.mu is held.
func (s *stream) finish(err error) {
	if s.done {
		return // the answer was whole; what came after it is no matter
	}
	s.done, s.err = true, err
	s.stopSending()
}

func (s *stream) stopSending() {
	if s.over != nil && !s.sent {
		select {
		case <-s.over:
		default:
			close(s.over)
		}
	}
}

// end is the good end of the answer. c.mu is held.
func (s *stream) end(trailer http.Header) {
	err := io.EOF
	if s.left > 0 && !s.isHead {
		err = io.ErrUnexpectedEOF
	}
	s.trailer = trailer
	s.finish(err)
	if s.sent {
		s.c.drop(s)
	}
}

// reset gives the call up. c.mu is held.
func (s *stream) reset(code http2.ErrCode, err error) {
	c := s.c
	if c.streams[s.id] == s && c.err == nil {
		c.pend = appendUint32(appendHead(c.pend, 4, http2.FrameRSTStream, 0, s.id), uint32(code))
		c.flush()
	}
	s.finish(err)
	s.stopSending()
	c.drop(s)
	s.signal()
}

// cancel ends the call if it goes on.
func (s *stream) cancel(err error) {
	s.c.mu.Lock()
	defer s.c.mu.Unlock()
	s.closed = true
	s.buf, s.off = nil, 0
	if s.done && s.sent {
		return
	}
	s.reset(http2.ErrCodeCancel, err)
}

// header takes in a header block; it says what is wrong with it. c.mu is held.
func (s *stream) header(b *block) (fault string) {
	switch {
	case b.over:
		return "its header is larger than the limit"
	case b.fault != "":
		return b.fault
	case s.done:
		return "a header after the end"
	case s.res != nil && (b.status != 0 || !b.end):
		return "a second header"
	case s.res != nil:
		s.end(b.h)
		return ""
	case b.status == 0:
		return "no status"
	case b.status < 200:
		if b.end {
			return "it ends with an interim answer"
		}
		return ""
	}
	s.left = b.length
	s.res = &http.Response{StatusCode: b.status, Proto: "HTTP/2.0", ProtoMajor: 2, Header: b.h, ContentLength: b.length, Trailer: b.trailer}
	if b.end {
		if b.length < 0 && !s.isHead {
			s.res.ContentLength = 0
		}
		s.end(nil)
	}
	return ""
}

// response waits for the header of the answer.
func (s *stream) response(req *http.Request) (*http.Response, error) {
	for {
		s.c.mu.Lock()
		res, err, done := s.res, s.err, s.done
		s.c.mu.Unlock()
		switch {
		case res != nil:
			res.Request, res.Body = req, body{s}
			if res.Header == nil {
				res.Header = http.Header{}
			}
			return res, nil
		case done:
			if errors.Is(err, io.EOF) {
				err = io.ErrUnexpectedEOF
			}
			return nil, err
		}
		select {
		case <-s.ready:
		case <-s.ctx.Done():
			s.cancel(s.ctx.Err())
			return nil, s.ctx.Err()
		case <-s.cut:
			s.cancel(ErrCut)
			return nil, ErrCut
		}
	}
}

// read is the body's Read. Only one goroutine reads at a time.
func (s *stream) read(p []byte) (int, error) {
	c := s.c
	for {
		c.mu.Lock()
		if s.closed {
			err := s.err
			c.mu.Unlock()
			if err == nil || errors.Is(err, io.EOF) {
				err = errClosed
			}
			return 0, err
		}
		if n := copy(p, s.buf[s.off:]); n > 0 {
			if s.off += n; s.off == len(s.buf) {
				s.buf, s.off = s.buf[:0], 0
				if cap(s.buf) > 64<<10 {
					s.buf = nil
				}
			}
			s.owed += n
			if s.owed > streamWindow/4 && !s.done {
				c.pend = appendUint32(appendHead(c.pend, 4, http2.FrameWindowUpdate, 0, s.id), uint32(s.owed))
				s.owed = 0
				c.flush()
			}
			var err error
			if s.off == len(s.buf) && s.done && errors.Is(s.err, io.EOF) {
				err = s.err
				s.res.Trailer = mergeTrailer(s.res.Trailer, s.trailer)
			}
			c.mu.Unlock()
			return n, err
		}
		if s.done {
			err := s.err
			if errors.Is(err, io.EOF) {
				s.res.Trailer = mergeTrailer(s.res.Trailer, s.trailer)
			}
			c.mu.Unlock()
			return 0, err
		}
		c.mu.Unlock()
		if len(p) == 0 {
			return 0, nil
		}
		select {
		case <-s.ready:
		case <-s.ctx.Done():
			s.cancel(s.ctx.Err())
			return 0, s.ctx.Err()
		case <-s.cut:
			s.cancel(ErrCut)
			return 0, ErrCut
		}
	}
}

func mergeTrailer(announced, came http.Header) http.Header {
	if len(announced) == 0 {
		return came
	}
	for k, v := range came {
		announced[k] = v
	}
	return announced
}

// write sends p as the windows allow, and the end of the request after it.
func (s *stream) write(p []byte, end bool) error {
	c := s.c
	c.mu.Lock()
	defer c.mu.Unlock()
	for {
		if s.done {
			if s.err != nil && !errors.Is(s.err, io.EOF) {
				return s.err
			}
			return errOver
		}
		n := int(min(int64(len(p)), int64(c.most), s.window, c.window))
		if len(p) == 0 && !end {
			return nil
		}
		if len(c.pend) > maxPending || n <= 0 && len(p) > 0 {
			s.blocked = true
			c.mu.Unlock()
			err := error(nil)
			select {
			case <-s.may:
			case <-s.over:
			case <-s.ctx.Done():
				err = s.ctx.Err()
			case <-s.cut:
				err = ErrCut
			}
			c.mu.Lock()
			s.blocked = false
			if err != nil {
				return err
			}
			continue
		}
		last := end && n == len(p)
		flags := http2.Flags(0)
		if last {
			flags = http2.FlagDataEndStream
		}
		c.pend = append(appendHead(c.pend, n, http2.FrameData, flags, s.id), p[:n]...)
		s.window -= int64(n)
		c.window -= int64(n)
		p = p[n:]
		if last {
			s.sent = true
		}
		c.flush()
		if last {
			return nil
		}
	}
}

// sendBody sends the body of req. Its goroutine ends when the body's Read does,
// which is the caller's to bring about.
func (s *stream) sendBody(req *http.Request) {
	buf := buffers.Get().(*[]byte)
	defer buffers.Put(buf)
	left := req.ContentLength
	for {
		select {
		case <-s.over:
			return
		default:
		}
		n, err := req.Body.Read(*buf)
		if left >= 0 {
			if left -= int64(n); left < 0 {
				s.cancel(errors.New("the request's body is longer than announced"))
				return
			}
		}
		last := err == io.EOF && len(req.Trailer) == 0
		if n > 0 || last {
			if werr := s.write((*buf)[:n], last); werr != nil {
				if !errors.Is(werr, errOver) {
					s.cancel(werr)
				}
				return
			}
		}
		switch {
		case last:
			return
		case err == io.EOF:
			s.sendTrailer(req.Trailer)
			return
		case err != nil:
			s.cancel(err)
			return
		}
	}
}

// sendTrailer ends the request with h.
func (s *stream) sendTrailer(h http.Header) {
	c := s.c
	c.mu.Lock()
	defer c.mu.Unlock()
	if s.done || c.streams[s.id] != s {
		return
	}
	c.encBuf = c.encBuf[:0]
	for k, vs := range h {
		name, _ := lower(k)
		for _, v := range vs {
			c.literal(name, v)
		}
	}
	if len(c.encBuf) == 0 {
		c.pend = appendHead(c.pend, 0, http2.FrameData, http2.FlagDataEndStream, s.id)
	} else {
		c.appendHeaders(s.id, true)
	}
	s.sent = true
	c.flush()
}

// block is a header block while it comes.
type block struct {
	max     int // bytes of its fields
	open    bool
	id      uint32
	end     bool // of the stream
	size    int  // compressed
	list    int  // not compressed
	over    bool
	fault   string
	status  int
	length  int64 // -1 for none
	h       http.Header
	trailer http.Header // announced
	values  []string    // room for values
}

func (b *block) begin(id uint32, end bool) {
	*b = block{max: b.max, open: true, id: id, end: end, length: -1}
}

// field takes one field; only the first fault is told.
func (b *block) field(f hpack.HeaderField) {
	if b.list += int(f.Size()); b.list > b.max {
		b.over = true
	}
	if b.over || b.fault != "" {
		return
	}
	if strings.HasPrefix(f.Name, ":") {
		n, err := strconv.Atoi(f.Value)
		if f.Name != ":status" || b.status != 0 || b.h != nil || err != nil || len(f.Value) != 3 || n < 100 {
			b.fault = "a bad or misplaced " + strconv.Quote(f.Name)
			return
		}
		b.status = n
		return
	}
	k, ok := canonical(f.Name)
	if !ok || !httpguts.ValidHeaderFieldValue(f.Value) {
		b.fault = "a bad header " + strconv.Quote(f.Name)
		return
	}
	if b.h == nil {
		b.h = make(http.Header, 6)
		b.values = make([]string, 6)
	}
	switch k {
	case "Content-Length":
		n, err := strconv.ParseUint(f.Value, 10, 62)
		if err != nil || b.length >= 0 && b.length != int64(n) {
			b.fault = "a bad content-length"
			return
		}
		if b.length >= 0 {
			return
		}
		b.length = int64(n)
	case "Trailer":
		for t := range strings.SplitSeq(f.Value, ",") {
			if t = http.CanonicalHeaderKey(strings.TrimSpace(t)); httpguts.ValidTrailerHeader(t) {
				if b.trailer == nil {
					b.trailer = http.Header{}
				}
				b.trailer[t] = nil
			}
		}
		return
	}
	if old, ok := b.h[k]; ok {
		b.h[k] = append(old, f.Value)
		return
	}
	if len(b.values) == 0 {
		b.values = make([]string, 6)
	}
	b.values[0] = f.Value
	b.h[k], b.values = b.values[:1:1], b.values[1:]
}
