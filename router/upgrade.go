package router

import (
	"context"
	"encoding/binary"
	"errors"
	"io"
	"net"
	"net/http"
	"os"
	"strings"
	"sync/atomic"
	"time"
)

// upgradeTo is the protocol the client wants to switch to, "" for none.
func upgradeTo(r *http.Request) string {
	u := r.Header["Upgrade"]
	if len(u) != 1 || u[0] == "" || r.ProtoMajor != 1 || strings.EqualFold(u[0], "h2c") {
		return ""
	}
	for _, v := range r.Header["Connection"] {
		for t := range strings.SplitSeq(v, ",") {
			if strings.EqualFold(strings.TrimSpace(t), "upgrade") {
				return u[0]
			}
		}
	}
	return ""
}

// relayUpgrade asks the app to switch protocols and, when it does, joins the
// two connections. Any other answer is relayed as it is.
func (q *request) relayUpgrade(proto string) {
	x := &h1relay{request: q}
	if q.r.ContentLength != 0 {
		problem{code: http.StatusBadRequest, app: q.host.App, msg: "an upgrade has no body"}.write(q.w, q.r)
		return
	}
	ctx := q.r.Context()
	var conn *h1conn
	for {
		var err error
		if conn, err = q.call.ep.h1.get(ctx, q.rt.limits, true, true); err == nil {
			break
		}
		if !q.next(err) {
			q.failH1(err)
			return
		}
	}
	defer conn.close()
	unhook := context.AfterFunc(ctx, conn.abort)
	q.call.onCut(conn.abort)
	now := time.Now()
	conn.writeBy(now.Add(q.rt.limits.BodyIdle))
	conn.readBy(now.Add(q.rt.limits.ResponseHead))
	conn.writeHead(q.r, &q.origin, proto, false)
	err := conn.bw.Flush()
	h := q.w.Header()
	if err == nil {
		err = readHead(conn.br, q.rt.limits.Header, h, &x.head)
	}
	if err != nil {
		unhook()
		clear(h)
		q.failH1(err)
		return
	}
	if x.head.status != http.StatusSwitchingProtocols {
		defer unhook()
		if x.head.status < 200 {
			clear(h)
			q.failH1(errHead("an interim answer to an upgrade"))
			return
		}
		x.gotHead.Store(true)
		conn.readBy(time.Time{})
		x.deliver(conn)
		return
	}
	if !strings.EqualFold(x.head.upgrade, proto) {
		unhook()
		clear(h)
		q.failH1(errHead("a switch to another protocol than asked for"))
		return
	}
	if !unhook() {
		panic(http.ErrAbortHandler)
	}
	client, brw, err := http.NewResponseController(q.w).Hijack()
	if err != nil {
		q.failed("take over the connection", err)
		panic(http.ErrAbortHandler)
	}
	defer client.Close() //nolint:errcheck // both ends are done with it
	if g, ok := client.(interface{ Upgraded() }); ok {
		g.Upgraded() // what follows is not HTTP
	}
	_ = client.SetDeadline(time.Time{})
	_ = conn.c.SetDeadline(time.Time{})
	h["Connection"] = []string{"Upgrade"}
	h["Upgrade"] = []string{x.head.upgrade}
	delete(h, "Content-Length")
	_, _ = brw.WriteString("HTTP/1.1 101 Switching Protocols\r\n") // Flush reports it
	_ = h.Write(brw)
	_, _ = brw.WriteString("\r\n")
	if brw.Flush() != nil {
		return
	}
	t := &tunnel{client: client, up: conn, websocket: strings.EqualFold(proto, "websocket")}
	q.call.upgrade(t.cut)
	t.run(brw.Reader)
}

// goodbye is how long the ends of a cut WebSocket have to close it.
const goodbye = time.Second

// tunnel joins a client's connection and an app's after an upgrade.
type tunnel struct {
	client    net.Conn
	up        *h1conn
	websocket bool
	cutting   atomic.Bool
}

// cut ends the tunnel: run sees it at once.
func (t *tunnel) cut() {
	t.cutting.Store(true)
	t.up.abortRead()
}

// abortRead ends a pending Read, leaving writes alone.
func (c *h1conn) abortRead() { _ = c.c.SetReadDeadline(longAgo) }

func (t *tunnel) run(fromClient io.Reader) {
	up := make(chan struct{})
	go func() {
		defer close(up)
		_, _ = io.Copy(t.up.c, fromClient)
		// An app that half-closes is rare; one that must learn of the end is not.
		if hc, ok := t.up.c.(interface{ CloseWrite() error }); ok && !t.cutting.Load() {
			_ = hc.CloseWrite()
		}
		if t.websocket {
			_ = t.up.c.SetReadDeadline(time.Now().Add(goodbye)) // the close handshake's answer
		}
	}()
	t.down()
	if t.cutting.Load() && t.websocket {
		// The client answers our close frame, which tells the app too.
		_ = t.client.SetReadDeadline(time.Now().Add(goodbye))
	} else {
		_ = t.client.SetDeadline(longAgo)
	}
	<-up
}

// down copies from the app to the client, watching the frames so that a close
// frame of ours never lands inside one of theirs.
func (t *tunnel) down() {
	var f frames
	buf := buffers.Get().(*[]byte)
	defer buffers.Put(buf)
	finish := false
	for {
		n, err := t.up.br.Read(*buf)
		if n > 0 {
			b := (*buf)[:n]
			if finish {
				b = b[:f.untilBoundary(b)]
			} else if t.websocket {
				f.advance(b)
			}
			if _, werr := t.client.Write(b); werr != nil {
				return
			}
		}
		cut := t.cutting.Load() && t.websocket
		if cut && f.atBoundary() {
			_ = t.client.SetWriteDeadline(time.Now().Add(goodbye))
			_, _ = t.client.Write([]byte{0x88, 2, 1001 >> 8, 1001 & 0xff}) // close: going away
			return
		}
		if err == nil && !finish && !cut {
			continue
		}
		if cut && !finish && (err == nil || errors.Is(err, os.ErrDeadlineExceeded)) {
			finish = true // in the middle of a frame: let it end
			_ = t.up.c.SetReadDeadline(time.Now().Add(goodbye))
			continue
		}
		if err != nil {
			return
		}
	}
}

// frames follows WebSocket frames (RFC 6455 §5.2) in a stream of bytes.
type frames struct {
	head [14]byte
	have int    // bytes of head so far
	left uint64 // payload bytes still to come
}

func (f *frames) atBoundary() bool { return f.have == 0 && f.left == 0 }

func (f *frames) headLen() int {
	if f.have < 2 {
		return 2
	}
	n := 2
	switch f.head[1] & 0x7f {
	case 126:
		n += 2
	case 127:
		n += 8
	}
	if f.head[1]&0x80 != 0 {
		n += 4
	}
	return n
}

// step consumes part of b and returns how much; b is not empty.
func (f *frames) step(b []byte) int {
	if f.left > 0 {
		n := int(min(f.left, uint64(len(b))))
		f.left -= uint64(n)
		return n
	}
	n := copy(f.head[f.have:f.headLen()], b)
	if f.have += n; f.have < 2 || f.have < f.headLen() {
		return n
	}
	switch l := f.head[1] & 0x7f; l {
	case 126:
		f.left = uint64(binary.BigEndian.Uint16(f.head[2:]))
	case 127:
		f.left = binary.BigEndian.Uint64(f.head[2:])
	default:
		f.left = uint64(l)
	}
	f.have = 0
	return n
}

func (f *frames) advance(b []byte) {
	for len(b) > 0 {
		b = b[f.step(b):]
	}
}

// untilBoundary advances to the end of the current frame and says how much of
// b that took.
func (f *frames) untilBoundary(b []byte) int {
	n := 0
	for n < len(b) && !f.atBoundary() {
		n += f.step(b[n:])
	}
	return n
}
