package router

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httputil"
	"os"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"
)

const (
	copyBuffer = 32 << 10
	// readAhead is the body size up to which the whole body is read before the
	// request is sent: it then needs no goroutine and can be sent twice.
	readAhead = 8 << 10
	// expectWait is how long an app may take to answer Expect: 100-continue
	// before the body is sent all the same (RFC 9110 §10.1.1).
	expectWait = time.Second
	maxInterim = 8 // 1xx answers before the final one
)

var buffers = sync.Pool{New: func() any { b := make([]byte, copyBuffer); return &b }}

// h1relay is one request relayed over HTTP/1.1.
type h1relay struct {
	*request
	ahead    []byte // the whole body, when it is short
	streamed bool   // the body is sent by a goroutine while the answer is read
	expect   bool
	head     respHead
	spent    bool // the connection cannot be used again
	gotHead  atomic.Bool
	cont     chan struct{} // closed when the app wants the body
	bodyDone chan error    // the goroutine's end, nil before it starts
	stopBody chan struct{}
}

// relayH1 sends the request to the endpoint held and its answer back.
func (q *request) relayH1() {
	x := &h1relay{request: q}
	if !x.prepareBody() {
		return
	}
	conn, stop, err := x.exchange()
	if err != nil {
		q.failH1(err)
		return
	}
	keep := false
	// Also on the panic that tells net/http to cut the client off.
	defer func() {
		keep = x.endBody(conn) && keep && !x.spent
		if !stop() || !keep || conn.aborted.Load() {
			conn.close()
			return
		}
		q.call.ep.h1.put(conn, q.rt.limits)
	}()
	keep = x.deliver(conn)
}

// prepareBody decides how the body is sent; false when the client broke off.
func (x *h1relay) prepareBody() bool {
	r := x.r
	if r.ContentLength == 0 {
		return true
	}
	x.expect = strings.EqualFold(r.Header.Get("Expect"), "100-continue")
	if r.ContentLength > 0 && r.ContentLength <= readAhead && !x.expect {
		x.ahead = make([]byte, r.ContentLength)
		if _, err := io.ReadFull(r.Body, x.ahead); err != nil {
			panic(http.ErrAbortHandler) // the client did not send what it announced
		}
		return true
	}
	x.streamed = true
	x.duplex() // or net/http would read the body itself once the answer begins
	return true
}

func (x *h1relay) idempotent() bool {
	switch x.r.Method {
	case http.MethodGet, http.MethodHead, http.MethodOptions, http.MethodTrace, http.MethodPut, http.MethodDelete:
		return true
	}
	return x.r.Header["Idempotency-Key"] != nil
}

// errNoAnswer is a connection that ended before the first byte of an answer.
type errNoAnswer struct{ err error }

func (e *errNoAnswer) Error() string {
	if errors.Is(e.err, io.EOF) {
		return "it closed the connection without an answer"
	}
	return "no answer: " + e.err.Error()
}
func (e *errNoAnswer) Unwrap() error { return e.err }

// exchange sends the request and reads the head of the answer into the
// response's headers. It tries again, perhaps elsewhere, where that is safe:
// after a failed dial always; on a connection used before, when the app has
// answered nothing and either nothing was written or the request may be
// repeated; on a new one only when it may be repeated, once, elsewhere. The func returned with the connection unhooks it from the client's
// and the release's end, and is false when one of them came first.
func (x *h1relay) exchange() (*h1conn, func() bool, error) {
	ctx := x.r.Context()
	repeatable := x.idempotent() && !x.streamed
	fresh := false
	for {
		conn, err := x.call.ep.h1.get(ctx, x.rt.limits, !repeatable, fresh)
		if err != nil {
			if x.next(err) {
				continue
			}
			return nil, nil, err
		}
		abort := conn.abort
		unhook := context.AfterFunc(ctx, abort)
		x.call.onCut(abort)
		err = x.send(conn)
		if err == nil {
			err = x.receive(conn)
		} else if conn.wrote > 0 {
			// The app may have answered early and closed: the answer is there now or never.
			conn.readBy(time.Now().Add(time.Second))
			if x.receive(conn) == nil {
				err, x.spent = nil, true
			}
		}
		if err == nil {
			return conn, unhook, nil
		}
		x.endBody(conn)
		unhook()
		conn.close()
		if x.bodyDone != nil {
			// The body's fault is the cause of what came after.
			if cerr, ok := errors.AsType[*clientError](<-x.bodyDone); ok {
				return nil, nil, cerr
			}
		}
		_, silent := errors.AsType[*errNoAnswer](err)
		if silent && conn.reused && ctx.Err() == nil && !conn.aborted.Load() {
			x.call.ep.h1.closedAfter(conn.age)
		}
		if ctx.Err() != nil || conn.aborted.Load() ||
			conn.wrote > 0 && (!silent || !repeatable) || conn.wrote == 0 && x.bodyDone != nil {
			return nil, nil, err
		}
		// On a new connection the app has died of this request or while it had
		// it: one other instance may answer, but it must not cost them all.
		if !conn.reused && (!repeatable || len(x.tried) > 0 || !x.next(err)) {
			return nil, nil, err
		}
		clear(x.w.Header())
		fresh = true
	}
}

// send writes the head and a short body, and starts on a long one.
func (x *h1relay) send(conn *h1conn) error {
	conn.lazily(&conn.wset, conn.writeBy, x.rt.limits.BodyIdle)
	if x.streamed {
		conn.noReadLimit() // sendBody sets it once the body is out
	} else {
		conn.lazily(&conn.rset, conn.readBy, x.rt.limits.ResponseHead)
	}
	conn.writeHead(x.r, &x.origin, "", x.expect)
	if x.ahead != nil {
		_, _ = conn.bw.Write(x.ahead) // Flush reports it
	}
	if err := conn.bw.Flush(); err != nil {
		return &errNoAnswer{err}
	}
	if x.streamed {
		x.bodyDone, x.cont, x.stopBody = make(chan error, 1), make(chan struct{}), make(chan struct{})
		go func() { x.bodyDone <- x.sendBody(conn) }()
	}
	return nil
}

var errBodyNotSent = errors.New("the app answered before it wanted the body")

// sendBody relays the client's body, framed anew.
func (x *h1relay) sendBody(conn *h1conn) error {
	if x.expect {
		t := time.NewTimer(expectWait)
		defer t.Stop()
		select {
		case <-x.cont:
		case <-t.C:
		case <-x.stopBody:
			return errBodyNotSent
		}
	}
	chunked := x.r.ContentLength < 0
	buf := buffers.Get().(*[]byte)
	defer buffers.Put(buf)
	for {
		n, err := x.body.Read(*buf)
		if n > 0 {
			conn.writeBy(time.Now().Add(x.rt.limits.BodyIdle))
			if chunked {
				_, _ = conn.bw.WriteString(strconv.FormatInt(int64(n), 16)) // Flush reports it
				_, _ = conn.bw.WriteString("\r\n")
			}
			_, _ = conn.bw.Write((*buf)[:n])
			if chunked {
				_, _ = conn.bw.WriteString("\r\n")
			}
			if werr := conn.bw.Flush(); werr != nil {
				if errors.Is(werr, os.ErrDeadlineExceeded) {
					conn.abort()
				}
				return fmt.Errorf("send body: %w", werr)
			}
		}
		if err == nil {
			continue
		}
		if !errors.Is(err, io.EOF) {
			// Half a body must not look like a whole one.
			conn.abort()
			if x.body.stopped.Load() {
				return errBodyNotSent
			}
			return &clientError{err}
		}
		if chunked {
			_, _ = conn.bw.WriteString("0\r\n")
			for k, vs := range x.r.Trailer {
				for _, v := range vs {
					_, _ = conn.bw.WriteString(k + ": " + v + "\r\n")
				}
			}
			_, _ = conn.bw.WriteString("\r\n")
			if werr := conn.bw.Flush(); werr != nil {
				return fmt.Errorf("send body: %w", werr)
			}
		}
		if !x.gotHead.Load() {
			conn.readBy(time.Now().Add(x.rt.limits.ResponseHead))
			if x.gotHead.Load() {
				conn.readBy(time.Time{})
			}
		}
		return nil
	}
}

// clientError is the client's fault while its body was read.
type clientError struct{ err error }

func (e *clientError) Error() string { return "read the request's body: " + e.err.Error() }
func (e *clientError) Unwrap() error { return e.err }

// endBody waits for sendBody, making it stop when the answer is there first.
// It says whether the connection is still in step.
func (x *h1relay) endBody(conn *h1conn) bool {
	if x.bodyDone == nil {
		return true
	}
	var err error
	if x.body.allRead.Load() {
		conn.writeBy(time.Now().Add(time.Second)) // for what is left to write
		err = <-x.bodyDone
	} else {
		close(x.stopBody)
		conn.abort()
		x.body.interrupt() // the client may be slow with the rest of a body nobody wants
		err = <-x.bodyDone
	}
	x.bodyDone <- err // it may be asked again
	return err == nil
}

// receive reads heads until the final one, passing interim ones on.
func (x *h1relay) receive(conn *h1conn) error {
	if _, err := conn.br.Peek(1); err != nil {
		return &errNoAnswer{err}
	}
	h := x.w.Header()
	for range maxInterim {
		if err := readHead(conn.br, x.rt.limits.Header, h, &x.head); err != nil {
			clear(h)
			return err
		}
		switch s := x.head.status; {
		case s >= 200:
			x.gotHead.Store(true)
			if x.streamed {
				conn.readBy(time.Time{}) // the other goroutine may have set it
			} else if x.head.chunked || x.head.length < 0 || x.head.length > int64(conn.br.Buffered()) {
				conn.noReadLimit() // else all is here
			}
			return nil
		case s == http.StatusContinue:
			if x.cont != nil {
				select {
				case <-x.cont:
				default:
					close(x.cont) // the server sends its own 100 when the body is read
				}
			}
		case s == http.StatusSwitchingProtocols:
			clear(h)
			return errHead("an upgrade nobody asked for")
		default:
			if x.r.ProtoAtLeast(1, 1) {
				x.w.WriteHeader(s)
			}
		}
		clear(h)
	}
	return errHead("too many interim answers")
}

// deliver writes the answer to the client. It says whether the connection may
// be used again.
func (x *h1relay) deliver(conn *h1conn) bool {
	h, head := x.w.Header(), &x.head
	empty := x.r.Method == http.MethodHead || head.status == http.StatusNoContent || head.status == http.StatusNotModified
	if head.status == http.StatusNoContent {
		delete(h, "Content-Length")
	}
	if _, ok := h["Content-Type"]; !ok {
		h["Content-Type"] = nil // or net/http would guess one
	}
	if _, ok := h["Date"]; !ok {
		h["Date"] = nil
	}
	x.w.WriteHeader(head.status)
	if empty {
		return !head.close && conn.br.Buffered() == 0
	}
	flush := func() {}
	if f, ok := x.w.(http.Flusher); ok {
		flush = f.Flush
	}
	sse := strings.HasPrefix(h.Get("Content-Type"), "text/event-stream")
	var src io.Reader
	limited := &io.LimitedReader{R: conn.br, N: head.length}
	switch {
	case head.chunked:
		src = httputil.NewChunkedReader(conn.br)
	case head.length >= 0:
		src = limited
	default:
		src = conn.br
	}
	if sse || head.length < 0 && conn.br.Buffered() == 0 {
		flush() // the head must not wait for the first byte
	}
	buf := buffers.Get().(*[]byte)
	defer buffers.Put(buf)
	for {
		n, err := src.Read(*buf)
		if n > 0 {
			if _, werr := x.w.Write((*buf)[:n]); werr != nil {
				return false // the client is gone
			}
			// More in the buffer is more to send at once.
			if sse || conn.br.Buffered() == 0 && (head.length < 0 || limited.N > 0) {
				flush()
			}
		}
		if err == nil {
			continue
		}
		if errors.Is(err, io.EOF) && (head.length < 0 || head.chunked || limited.N == 0) {
			break
		}
		if sse && x.call.isCut() {
			return false // a stream that ends makes the browser come again
		}
		x.brokeOff(err)
	}
	if head.chunked {
		trailer, err := readTrailer(conn.br, x.rt.limits.Header)
		if err != nil {
			x.brokeOff(err)
		}
		for k, vs := range trailer {
			h[http.TrailerPrefix+k] = vs
		}
	}
	return !head.close && (head.chunked || head.length >= 0) && conn.br.Buffered() == 0
}

// brokeOff cuts the client off: its answer has begun and cannot be completed,
// and an end that looks like the end would be a lie.
func (q *request) brokeOff(err error) {
	if !q.clientGone() {
		q.failed("answer broke off", err)
	}
	panic(http.ErrAbortHandler)
}

// failH1 answers in the app's stead.
func (q *request) failH1(err error) {
	p := problem{code: http.StatusBadGateway, grpc: grpcUnavailable, app: q.host.App}
	var ne net.Error
	switch _, client := errors.AsType[*clientError](err); {
	case client:
		problem{code: http.StatusBadRequest, grpc: grpcInvalid, app: q.host.App, msg: "the request's body broke off or is malformed"}.write(q.w, q.r)
		return
	case q.clientGone():
		panic(http.ErrAbortHandler) // nobody listens
	case q.call.ep != nil && q.call.isCut():
		p.code, p.msg = http.StatusServiceUnavailable, "app "+q.host.App+" was replaced while it worked on this request"
		p.hint = "send it again"
	case isDial(err):
		q.deny(err)
		return
	case errors.As(err, &ne) && ne.Timeout():
		p.code, p.grpc = http.StatusGatewayTimeout, grpcDeadline
		p.msg = fmt.Sprintf("app %s did not answer within %v", q.host.App, q.rt.limits.ResponseHead)
	default:
		p.msg = "app " + q.host.App + " broke off: " + plainError(err)
		p.hint = "m3o logs -a " + q.host.App
	}
	q.failed("request failed", err)
	p.write(q.w, q.r)
}

func isDial(err error) bool { _, ok := errors.AsType[*dialError](err); return ok }

// plainError is err without addresses, which are nobody's business outside.
func plainError(err error) string {
	if na, ok := errors.AsType[*errNoAnswer](err); ok && !errors.Is(na.err, io.EOF) {
		return "it closed the connection without an answer"
	}
	if op, ok := errors.AsType[*net.OpError](err); ok {
		return op.Err.Error()
	}
	return string(bytes.ToValidUTF8([]byte(err.Error()), nil))
}
