package gateway

import (
	"bufio"
	"context"
	"crypto/sha1" //nolint:gosec // what RFC 6455 has the key hashed with
	"encoding/base64"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"slices"
	"strings"
	"sync"
	"time"
	"unicode/utf8"

	"google.golang.org/grpc/codes"
)

// A WebSocket carries a call as JSON: each text frame is one message, either
// way. An empty text frame says that the client has sent all; closing the
// socket cancels the call. The end of the call is the closing code: 1000 for
// OK, 4000 and the gRPC code otherwise, with the message as its reason.
const (
	wsText  = 1
	wsClose = 8
	wsPing  = 9
	wsPong  = 10

	wsOK         = 1000
	wsGoingAway  = 1001
	wsProtocol   = 1002
	wsNotText    = 1003
	wsNotUTF8    = 1007
	wsTooBig     = 1009
	wsGRPC       = 4000
	wsReasonSize = 123

	// wsSubprotocol may be asked for; a token may come beside it, as browsers
	// cannot set headers here: wsBearer and base64url of the token.
	wsSubprotocol = "m3o.json"
	wsBearer      = "m3o.bearer."

	wsPingEvery = 30 * time.Second
	wsWriteTime = time.Minute
)

// isWebSocket says that r wants to open a WebSocket.
func isWebSocket(r *http.Request) bool {
	return r.ProtoMajor == 1 && strings.EqualFold(r.Header.Get("Upgrade"), "websocket")
}

// serveWebSocket answers r with a WebSocket that is a call of m. An error it
// returns was not yet told to the client.
func (g *Gateway) serveWebSocket(w http.ResponseWriter, r *http.Request, t *target, up http.RoundTripper) error {
	if r.Method != http.MethodGet || r.Header.Get("Sec-Websocket-Version") != "13" {
		w.Header().Set("Sec-Websocket-Version", "13")
		return invalid("a WebSocket is opened by GET and version 13")
	}
	key := r.Header.Get("Sec-Websocket-Key")
	if b, err := base64.StdEncoding.DecodeString(key); err != nil || len(b) != 16 {
		return invalid("sec-websocket-key is not 16 bytes in base64")
	}
	// No preflight protects a WebSocket: any page could open it with the
	// visitor's cookies.
	if o := r.Header.Get("Origin"); o != "" && !slices.ContainsFunc(t.api.Origins, func(a string) bool { return a == "*" || originMatches(a, o) }) {
		if _, host, ok := strings.Cut(o, "://"); !ok || !strings.EqualFold(host, r.Host) {
			return &problem{http: http.StatusForbidden, grpc: codes.PermissionDenied, detail: "pages of this site may not call app " + t.api.App + ": its origin is not in http.cors of m3o.yaml"}
		}
	}
	m, err := g.method(t)
	if err != nil {
		return err
	}
	chosen, header := "", r.Header.Clone()
	for p := range strings.SplitSeq(strings.Join(r.Header["Sec-Websocket-Protocol"], ","), ",") {
		p = strings.TrimSpace(p)
		if p == wsSubprotocol {
			chosen = p
		}
		if v, ok := strings.CutPrefix(p, wsBearer); ok {
			token, err := base64.RawURLEncoding.DecodeString(v)
			if err != nil || !plainToken(token) {
				return invalid("the token in sec-websocket-protocol is not base64url")
			}
			header.Set("Authorization", "Bearer "+string(token))
		}
	}
	for k := range header {
		if strings.HasPrefix(k, "Sec-Websocket-") {
			delete(header, k)
		}
	}
	md, err := metadata(header)
	if err != nil {
		return err
	}
	conn, brw, err := http.NewResponseController(w).Hijack()
	if err != nil {
		return fmt.Errorf("take over the connection: %w", err)
	}
	if c, ok := conn.(interface{ Upgraded() }); ok {
		c.Upgraded() // what follows is not HTTP
	}
	_ = conn.SetDeadline(time.Time{})
	s := &socket{conn: conn, br: brw.Reader, most: g.max}
	defer conn.Close() //nolint:errcheck // both ends are done with it
	h := w.Header()
	hash := sha1.Sum([]byte(key + "258EAFA5-E914-47DA-95CA-C5AB0DC85B11")) //nolint:gosec // see the import
	h.Set("Sec-Websocket-Accept", base64.StdEncoding.EncodeToString(hash[:]))
	h.Set("Upgrade", "websocket")
	h.Set("Connection", "Upgrade")
	if chosen != "" {
		h.Set("Sec-Websocket-Protocol", chosen)
	}
	_, _ = brw.WriteString("HTTP/1.1 101 Switching Protocols\r\n") // Flush reports it
	_ = h.Write(brw)
	_, _ = brw.WriteString("\r\n")
	if brw.Flush() == nil {
		s.call(context.WithoutCancel(r.Context()), g, m, outgoing{path: m.path, host: r.Host, md: md, length: -1}, up)
	}
	return nil
}

func plainToken(b []byte) bool {
	for _, c := range b {
		if c <= ' ' || c > '~' {
			return false
		}
	}
	return true
}

// socket is an open WebSocket.
type socket struct {
	conn net.Conn
	br   *bufio.Reader
	most int

	mu     sync.Mutex // guards writes and closed
	closed bool
}

// call carries the call o over the socket and closes it.
func (s *socket) call(ctx context.Context, g *Gateway, m *method, o outgoing, up http.RoundTripper) {
	ctx, cancel := context.WithCancel(ctx)
	pr, pw := io.Pipe()
	o.body = &requestBody{src: pr, most: g.max + prefixLen}
	read := make(chan struct{})
	go func() {
		defer close(read)
		defer cancel() // whoever closes the socket ends the call
		err := s.receive(m, pw)
		_ = pw.CloseWithError(or(err, io.ErrUnexpectedEOF))
	}()
	pings := make(chan struct{})
	go func() {
		defer close(pings)
		s.ping(ctx)
	}()
	err := s.answers(ctx, m, o, up, g.maxAnswer)
	code, reason := wsOK, ""
	if err != nil {
		p := problemOf(err)
		code, reason = wsGRPC+int(p.code()), p.detail
		if p.grpc == codes.Unavailable && !p.own {
			code = wsGoingAway
		}
	}
	s.close(code, reason)
	cancel()
	_ = pr.Close()
	// The client has a moment to say good-bye; then the connection ends.
	_ = s.conn.SetReadDeadline(time.Now().Add(time.Second))
	<-read
	<-pings
}

// answers sends the app's messages to the client.
func (s *socket) answers(ctx context.Context, m *method, o outgoing, up http.RoundTripper, most int) error {
	st, err := open(ctx, up, o, most)
	if err != nil {
		return or(o.body.fault(), err)
	}
	defer st.close()
	if err := st.begin(); err != nil {
		return err
	}
	for {
		msg, err := st.next()
		if errors.Is(err, io.EOF) {
			return or(o.body.fault(), st.end())
		}
		if err != nil {
			return or(o.body.fault(), err)
		}
		out, err := m.out.toJSON(nil, msg)
		if err != nil {
			return err
		}
		if s.send(wsText, out) != nil {
			return nil // the client is gone
		}
	}
}

// receive turns what the client sends into frames for the app, up to the end
// of the connection.
func (s *socket) receive(m *method, to *io.PipeWriter) error {
	for {
		op, msg, err := s.message()
		if err != nil {
			if code, ok := errors.AsType[wsFault](err); ok {
				s.close(code.code, code.reason)
			}
			return err
		}
		switch op {
		case wsPing:
			_ = s.send(wsPong, msg) // a dead connection is seen by the next read
		case wsClose:
			s.close(wsOK, "")
			return io.ErrUnexpectedEOF
		case wsText:
			if len(msg) == 0 {
				_ = to.Close()
				continue
			}
			out, err := m.in.toWire(make([]byte, prefixLen, prefixLen+len(msg)), msg)
			if err != nil {
				_ = to.CloseWithError(err)
				continue
			}
			appendFrame(out[:0], 0, out[prefixLen:])
			if _, err := to.Write(out); err != nil {
				continue // the call has ended; the client will read of it
			}
			if !m.desc.IsStreamingClient() {
				_ = to.Close()
			}
		}
	}
}

// wsFault is a client that breaks the protocol, and the code it is told so by.
type wsFault struct {
	code   int
	reason string
}

func (f wsFault) Error() string { return f.reason }

// message is the next message or control frame; fragments are put together.
func (s *socket) message() (op byte, msg []byte, err error) {
	for {
		fin, o, part, err := s.frame(s.most - len(msg))
		switch {
		case err != nil:
			return 0, nil, err
		case o >= wsClose:
			if op == 0 {
				return o, part, nil
			}
			// A control frame between fragments.
			if o == wsClose {
				return o, part, nil
			}
			if o == wsPing {
				_ = s.send(wsPong, part) // as above
			}
			continue
		case o == 0 && op == 0 || o != 0 && op != 0:
			return 0, nil, wsFault{wsProtocol, "a fragment out of order"}
		case o != 0 && o != wsText:
			return 0, nil, wsFault{wsNotText, "messages are JSON in text frames"}
		}
		if o != 0 {
			op = o
		}
		msg = append(msg, part...)
		if fin {
			if !utf8.Valid(msg) {
				return 0, nil, wsFault{wsNotUTF8, "a text frame is not UTF-8"}
			}
			return op, msg, nil
		}
	}
}

func (s *socket) frame(most int) (fin bool, op byte, data []byte, err error) {
	var h [2]byte
	if _, err := io.ReadFull(s.br, h[:]); err != nil {
		return false, 0, nil, err
	}
	fin, op = h[0]&0x80 != 0, h[0]&0x0f
	n := uint64(h[1] & 0x7f)
	switch {
	case h[0]&0x70 != 0 || op > wsPong || op > 2 && op < wsClose:
		return false, 0, nil, wsFault{wsProtocol, "an unknown kind of frame"}
	case h[1]&0x80 == 0:
		return false, 0, nil, wsFault{wsProtocol, "a frame without a mask"}
	case op >= wsClose && (!fin || n > 125):
		return false, 0, nil, wsFault{wsProtocol, "a control frame that is too long or in parts"}
	case n == 126:
		var b [2]byte
		if _, err := io.ReadFull(s.br, b[:]); err != nil {
			return false, 0, nil, err
		}
		n = uint64(binary.BigEndian.Uint16(b[:]))
	case n == 127:
		var b [8]byte
		if _, err := io.ReadFull(s.br, b[:]); err != nil {
			return false, 0, nil, err
		}
		n = binary.BigEndian.Uint64(b[:])
	}
	if op < wsClose && n > uint64(max(most, 0)) {
		return false, 0, nil, wsFault{wsTooBig, "the message is too large"}
	}
	var mask [4]byte
	if _, err := io.ReadFull(s.br, mask[:]); err != nil {
		return false, 0, nil, err
	}
	// What the head says is only believed as the bytes come.
	data, err = io.ReadAll(io.LimitReader(s.br, int64(n)))
	if err == nil && uint64(len(data)) < n {
		err = io.ErrUnexpectedEOF
	}
	for i := range data {
		data[i] ^= mask[i&3]
	}
	return fin, op, data, err
}

// send writes one frame.
func (s *socket) send(op byte, data []byte) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.sendLocked(op, data)
}

func (s *socket) sendLocked(op byte, data []byte) error {
	if s.closed {
		return net.ErrClosed
	}
	b := make([]byte, 0, len(data)+10)
	b = append(b, 0x80|op)
	switch n := len(data); {
	case n < 126:
		b = append(b, byte(n))
	case n < 1<<16:
		b = binary.BigEndian.AppendUint16(append(b, 126), uint16(n))
	default:
		b = binary.BigEndian.AppendUint64(append(b, 127), uint64(n))
	}
	_ = s.conn.SetWriteDeadline(time.Now().Add(wsWriteTime))
	_, err := s.conn.Write(append(b, data...))
	return err
}

// close says good-bye, once.
func (s *socket) close(code int, reason string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	reason = strings.ToValidUTF8(reason, "\uFFFD")
	for len(reason) > wsReasonSize {
		_, n := utf8.DecodeLastRuneInString(reason)
		reason = reason[:len(reason)-n]
	}
	_ = s.sendLocked(wsClose, append(binary.BigEndian.AppendUint16(nil, uint16(code)), reason...)) // gone is closed too
	s.closed = true
}

// ping keeps what is between from taking a quiet connection for a dead one.
func (s *socket) ping(ctx context.Context) {
	tick := time.NewTicker(wsPingEvery)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
			if s.send(wsPing, nil) != nil {
				return
			}
		}
	}
}
