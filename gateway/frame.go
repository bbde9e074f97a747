package gateway

import (
	"bytes"
	"compress/gzip"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net/http"
	"sync"
	"sync/atomic"

	"google.golang.org/grpc/codes"
)

// The flags of a message's five-byte prefix. gRPC knows the first only.
const (
	flagCompressed = 1
	flagEndStream  = 1 << 1 // Connect's last message, which holds the status
	flagTrailers   = 1 << 7 // gRPC-Web's
	prefixLen      = 5
)

func appendFrame(dst []byte, flags byte, msg []byte) []byte {
	dst = append(dst, flags)
	dst = binary.BigEndian.AppendUint32(dst, uint32(len(msg)))
	return append(dst, msg...)
}

// errTooLarge is a message whose prefix announces more than is allowed.
var errTooLarge = errors.New("the message is too large")

// readFrame reads one message of at most most bytes; io.EOF when there is
// none, io.ErrUnexpectedEOF when it is cut off.
func readFrame(r io.Reader, most int) (flags byte, msg []byte, err error) {
	var head [prefixLen]byte
	if _, err := io.ReadFull(r, head[:]); err != nil {
		return 0, nil, err
	}
	n := binary.BigEndian.Uint32(head[1:])
	if uint64(n) > uint64(most) {
		return head[0], nil, fmt.Errorf("%w: %d bytes", errTooLarge, n)
	}
	if n <= 16<<10 {
		msg = make([]byte, n)
		if _, err := io.ReadFull(r, msg); err != nil {
			if errors.Is(err, io.EOF) {
				err = io.ErrUnexpectedEOF
			}
			return head[0], nil, err
		}
		return head[0], msg, nil
	}
	// What the prefix says is only believed as the bytes come.
	var buf bytes.Buffer
	buf.Grow(int(min(n, 64<<10)))
	if _, err := io.CopyN(&buf, r, int64(n)); err != nil {
		if errors.Is(err, io.EOF) {
			err = io.ErrUnexpectedEOF
		}
		return head[0], nil, err
	}
	return head[0], buf.Bytes(), nil
}

// tracker follows the frames in bytes that pass through, and knows at any
// moment whether a message is half sent.
type tracker struct {
	head [prefixLen]byte
	have int    // of head
	left uint32 // of the message after it
}

func (t *tracker) whole() bool { return t.have == 0 && t.left == 0 }

// pass takes b in; check, when not nil, judges each prefix.
func (t *tracker) pass(b []byte, check func(flags byte, n uint32) error) error {
	for len(b) > 0 {
		if t.left > 0 {
			n := min(uint32(min(len(b), 1<<30)), t.left)
			t.left -= n
			b = b[n:]
			continue
		}
		n := copy(t.head[t.have:], b)
		t.have += n
		b = b[n:]
		if t.have < prefixLen {
			return nil
		}
		t.have = 0
		t.left = binary.BigEndian.Uint32(t.head[1:])
		if check != nil {
			if err := check(t.head[0], t.left); err != nil {
				return err
			}
		}
	}
	return nil
}

var (
	zippers   = sync.Pool{New: func() any { return gzip.NewWriter(io.Discard) }}
	unzippers = sync.Pool{New: func() any { return new(gzip.Reader) }}
)

func gz(msg []byte) []byte {
	var buf bytes.Buffer
	z := zippers.Get().(*gzip.Writer)
	defer zippers.Put(z)
	z.Reset(&buf)
	_, _ = z.Write(msg) // a Buffer takes everything
	_ = z.Close()
	return buf.Bytes()
}

// gunzip fails with errTooLarge when more than most bytes come out.
func gunzip(msg []byte, most int) ([]byte, error) {
	if len(msg) == 0 {
		return nil, nil // as gRPC and Connect allow
	}
	z := unzippers.Get().(*gzip.Reader)
	defer unzippers.Put(z)
	if err := z.Reset(bytes.NewReader(msg)); err != nil {
		return nil, fmt.Errorf("gzip: %w", err)
	}
	out, err := io.ReadAll(io.LimitReader(z, int64(most)+1))
	if err != nil {
		return nil, fmt.Errorf("gzip: %w", err)
	}
	if len(out) > most {
		return nil, errTooLarge
	}
	return out, nil
}

// requestBody is what the app gets to read of a client's frames: as they are,
// or turned one by one. It remembers what was wrong with them, which says more
// than the reset stream the app sees.
type requestBody struct {
	of    *http.Request // nil for none
	src   io.Reader
	most  int
	turn  func(flags byte, msg []byte) ([]byte, error) // nil passes the bytes on
	zip   string                                       // the encoding of compressed frames, "" for none
	track tracker
	buf   []byte      // turned, not yet read
	read  bool        // reading has begun
	ended atomic.Bool // the client has sent all

	mu  sync.Mutex // guards err
	err error
}

// fault is what was wrong with the client's frames, nil when nothing was.
func (b *requestBody) fault() error {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.err
}

func (b *requestBody) fail(err error) error {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.err = err
	return err
}

// spill reads on after a message that was refused for its size.
func (b *requestBody) spill(err error) {
	if p, ok := errors.AsType[*problem](err); ok && p.http == http.StatusRequestEntityTooLarge && b.of != nil {
		spill(b.of, b.src)
	}
}

func (b *requestBody) Close() error { return nil } // the server closes the client's body

func (b *requestBody) Read(p []byte) (int, error) {
	b.read = true
	if b.turn != nil {
		return b.readTurned(p)
	}
	n, err := b.src.Read(p)
	if n > 0 {
		if err := b.track.pass(p[:n], b.check); err != nil {
			b.spill(err)
			return 0, b.fail(err)
		}
	}
	switch {
	case errors.Is(err, io.EOF):
		b.ended.Store(true)
		if !b.track.whole() {
			return n, b.fail(invalid("the request ends within a message"))
		}
	case err != nil:
		return n, b.fail(bodyError(err))
	}
	return n, err
}

func bodyError(err error) error {
	if p, ok := errors.AsType[*problem](err); ok {
		return p
	}
	return &problem{http: http.StatusBadRequest, grpc: codes.InvalidArgument, detail: "the body broke off", err: err}
}

func (b *requestBody) check(flags byte, n uint32) error {
	if flags&^flagCompressed != 0 {
		return invalid("a message has the unknown flags %d", flags)
	}
	if flags != 0 && b.zip == "" {
		return &problem{http: http.StatusBadRequest, grpc: codes.Internal, detail: "a message is compressed, but no encoding was named"}
	}
	if uint64(n) > uint64(b.most) {
		return tooLarge(b.most)
	}
	return nil
}

func (b *requestBody) readTurned(p []byte) (int, error) {
	if len(b.buf) == 0 {
		flags, msg, err := readFrame(b.src, b.most)
		switch {
		case errors.Is(err, io.EOF):
			b.ended.Store(true)
			return 0, io.EOF
		case errors.Is(err, io.ErrUnexpectedEOF):
			return 0, b.fail(invalid("the request ends within a message"))
		case errors.Is(err, errTooLarge):
			err = tooLarge(b.most)
			b.spill(err)
			return 0, b.fail(err)
		case err != nil:
			return 0, b.fail(bodyError(err))
		}
		if err := b.check(flags, 0); err != nil {
			return 0, b.fail(err)
		}
		if b.buf, err = b.turn(flags, msg); err != nil {
			return 0, b.fail(err)
		}
	}
	n := copy(p, b.buf)
	b.buf = b.buf[n:]
	return n, nil
}
