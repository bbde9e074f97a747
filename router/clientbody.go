package router

import (
	"errors"
	"io"
	"net/http"
	"strings"
	"sync"
	"sync/atomic"
)

// clientBody is the body of a request that another goroutine than the
// handler's may read. Two servers stand behind it, each with a trap:
//
// Over HTTP/1.1 net/http allows it (EnableFullDuplex), but does not stand a
// reader that outlives the handler: the reader's end of the body and the
// server's wait for the next request would meet on the connection, and net/http
// panics, in whichever goroutine comes second. Nor does it see that the next
// request begins only after a body that nobody read.
//
// Over HTTP/2 a read that was interrupted resets the stream at the client's
// next byte, which takes the answer from it. So it is never interrupted there.
type clientBody struct {
	r    io.Reader
	gone func() error // not nil when the client is
	rc   *http.ResponseController
	old  bool // HTTP/1.1

	allRead atomic.Bool // to its end
	stopped atomic.Bool // by us: a failed read is not the client's fault

	mu    sync.Mutex // held while r is read; guards ended
	ended bool
}

// duplex makes the request's body readable beside the answer. The answer is
// the connection's last if it begins before the body was read.
func (q *request) duplex() *clientBody {
	b := q.shareBody()
	if b.old {
		_ = b.rc.EnableFullDuplex() // its own ResponseWriter has it
		q.rec.body = b
	}
	return b
}

// shareBody is the request's body for who may read it in another goroutine.
func (q *request) shareBody() *clientBody {
	q.body = &clientBody{r: q.r.Body, gone: q.r.Context().Err, rc: http.NewResponseController(q.w), old: q.r.ProtoMajor == 1}
	return q.body
}

// Read implements io.Reader.
func (b *clientBody) Read(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.ended {
		return 0, http.ErrBodyReadAfterClose
	}
	n, err := b.r.Read(p)
	if errors.Is(err, io.EOF) {
		b.allRead.Store(true)
	}
	return n, err
}

// Close leaves closing to the server.
func (b *clientBody) Close() error { return nil }

// interrupt ends a Read that waits for the client, and all to come.
func (b *clientBody) interrupt() {
	if !b.allRead.Load() {
		b.stopped.CompareAndSwap(false, b.gone() == nil)
		_ = b.rc.SetReadDeadline(longAgo)
	}
}

// end is called when the handler of an HTTP/1.1 request is: it returns when
// nobody reads the body any more. The HTTP/2 server ends its readers itself.
func (b *clientBody) end() {
	b.interrupt()
	b.mu.Lock()
	b.ended = true
	b.mu.Unlock()
}

// clientGone says that nobody waits for the answer. net/http takes a read that
// was interrupted for that too.
func (q *request) clientGone() bool {
	return q.r.Context().Err() != nil && (q.body == nil || !q.body.stopped.Load())
}

// lastAnswer has the server close the connection after the answer, but not
// under the hands of a client that is still sending: a reset would take the
// answer from it. net/http has no other word for that than a body over its limit.
func lastAnswer(w http.ResponseWriter) {
	w.Header()["Connection"] = []string{"close"}
	_, _ = http.MaxBytesReader(w, io.NopCloser(strings.NewReader("x")), 0).Read(make([]byte, 1)) // it tells w
}
