package router

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/url"
	"os"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/m3o/m3o"
)

// A router is upgraded by a second one on the same listening sockets: the
// daemon takes copies of them (Listeners), starts the new router with them and,
// once that serves, retires the old one (Retire). In between both accept; a
// connection that waits in the kernel's queue belongs to the socket and so to
// whoever is left.

// errRetired ends a router whose successor has taken over.
var errRetired = errors.New("another router has taken over")

// retirement is how a router goes while another has taken over.
type retirement struct {
	idle time.Duration // how long connections without a request are left open
	wait time.Duration // how long what is in flight may go on
}

// Retire has the router take no more connections, answer its HTTP/1.1
// connections one last time each, and end when nothing is in flight or wait
// has passed; what is left then ends as by Run's end. It returns at once.
func (rt *Router) Retire(wait time.Duration) {
	rt.retireOnce.Do(func() {
		rt.retiring.Store(true)
		rt.retire <- retirement{min(rt.limits.Idle, wait), wait}
	})
}

// linger is what Run does when it is retired: it waits for clients to finish
// with the connections they have. One that is idle is left alone until its
// limit: closing it under a client's hands would fail a request.
func (rt *Router) linger(ctx context.Context, r retirement, srv servers, conns func() int) {
	deadline := time.Now().Add(r.wait)
	idle := time.NewTimer(r.idle)
	defer idle.Stop()
	tick := time.NewTicker(50 * time.Millisecond)
	defer tick.Stop()
	for conns() > 0 {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
			continue
		case <-idle.C:
		}
		break
	}
	// HTTP/2 connections learn it now, by GOAWAY, and end with their last stream.
	rest, cancel := context.WithDeadline(ctx, deadline)
	defer cancel()
	if srv.Shutdown(rest) != nil {
		return // the deadline: the rest is cut by shutdown
	}
	for conns() > 0 && rest.Err() == nil { // upgrades are not the server's any more
		select {
		case <-tick.C:
		case <-rest.Done():
		}
	}
}

// serveListeners passes copies of the listening sockets to the daemon: the
// answer's head and, beside it, the descriptors.
func (rt *Router) serveListeners(w http.ResponseWriter, _ *http.Request) {
	conn, _, err := http.NewResponseController(w).Hijack()
	if err != nil {
		rt.log.Warn("hand over listeners", "err", err)
		return
	}
	defer conn.Close() //nolint:errcheck // the one thing it was for is done
	uc, ok := conn.(*net.UnixConn)
	if !ok {
		return
	}
	_ = uc.SetDeadline(time.Now().Add(5 * time.Second))
	names, socks := "", []any{}
	add := func(name string, s any) { names, socks = names+name+",", append(socks, s) }
	if rt.cfg.HTTP != nil {
		add("http", rt.cfg.HTTP)
	}
	if rt.cfg.HTTPS != nil {
		add("https", rt.cfg.HTTPS)
	}
	if rt.cfg.HTTP3 != nil {
		add("http3", rt.cfg.HTTP3)
	}
	if in := rt.cfg.Inside; in != nil {
		add("internal", in.HTTP)
		add("names", in.Names.TCP)
		add("names-udp", in.Names.UDP)
	}
	if err := withDescriptors(socks, nil, func(fds []int) error {
		_, _, err := uc.WriteMsgUnix([]byte("HTTP/1.1 200 OK\r\nX-Listeners: "+names+"\r\nConnection: close\r\n\r\n"), unix.UnixRights(fds...), nil)
		return err
	}); err != nil {
		rt.log.Warn("hand over listeners", "err", err)
	}
}

// withDescriptors calls f with the sockets' own descriptors. Copies by File
// would make the sockets blocking, for both processes.
func withDescriptors(socks []any, fds []int, f func([]int) error) error {
	if len(socks) == 0 {
		return f(fds)
	}
	sc, ok := socks[0].(syscall.Conn)
	if !ok {
		return errors.New("a listener is no socket")
	}
	rc, err := sc.SyscallConn()
	if err != nil {
		return err
	}
	var inner error
	err = rc.Control(func(fd uintptr) { inner = withDescriptors(socks[1:], append(fds, int(fd)), f) })
	return errors.Join(err, inner)
}

// Listeners are copies of the router's listening sockets by name: http, https
// http3 when it has it, and, with Inside, internal, names and names-udp. The caller closes them.
func (c Client) Listeners(ctx context.Context) (map[string]*os.File, error) {
	fail := func(err error) error {
		return &m3o.Error{Kind: m3o.Unavailable, Msg: "the router does not hand over its sockets", Hint: "stop it, then start m3od again", Err: err}
	}
	conn, err := (&net.Dialer{}).DialContext(ctx, "unix", c.Socket)
	if err != nil {
		return nil, fail(err)
	}
	defer conn.Close() //nolint:errcheck // read to its end
	_ = conn.SetDeadline(time.Now().Add(5 * time.Second))
	if _, err := conn.Write([]byte("GET /listeners HTTP/1.1\r\nHost: router\r\n\r\n")); err != nil {
		return nil, fail(err)
	}
	// Reading any other way would lose the descriptors.
	buf, oob := make([]byte, 4096), make([]byte, unix.CmsgSpace(8*4))
	n, oobn, _, _, err := conn.(*net.UnixConn).ReadMsgUnix(buf, oob)
	if err != nil {
		return nil, fail(err)
	}
	return parseListeners(buf[:n], oob[:oobn], fail)
}

func parseListeners(head, oob []byte, fail func(error) error) (map[string]*os.File, error) {
	var files []*os.File
	msgs, err := unix.ParseSocketControlMessage(oob)
	if err != nil {
		return nil, fail(err)
	}
	for _, m := range msgs {
		fds, err := unix.ParseUnixRights(&m)
		if err != nil {
			continue // something else
		}
		for _, fd := range fds {
			syscall.CloseOnExec(fd)
			files = append(files, os.NewFile(uintptr(fd), "listener"))
		}
	}
	_, rest, ok := bytes.Cut(head, []byte("X-Listeners: "))
	names, _, _ := bytes.Cut(rest, []byte("\r\n"))
	out := map[string]*os.File{}
	for i, name := range bytes.Split(bytes.TrimSuffix(names, []byte(",")), []byte(",")) {
		if i < len(files) {
			out[string(name)] = files[i]
		}
	}
	if !ok || len(files) == 0 || len(out) != len(files) {
		for _, f := range files {
			_ = f.Close()
		}
		return nil, fail(errors.New("no sockets came"))
	}
	return out, nil
}

// Retire ends the router politely, see Router.Retire.
func (c Client) Retire(ctx context.Context, wait time.Duration) error {
	return c.do(ctx, http.MethodPost, fmt.Sprintf("/retire?wait=%s", url.QueryEscape(wait.String())), nil, nil)
}
