package gitserver

import (
	"context"
	"errors"
	"fmt"
	"net"
	"runtime/debug"
	"strings"
	"sync"
	"time"

	"github.com/gliderlabs/ssh"
	gossh "golang.org/x/crypto/ssh"

	"github.com/m3o/m3o"
)

const (
	// keyExtension carries the authenticated key in the Permissions of the
	// connection. Nothing else may say who a client is: gliderlabs' context
	// keeps its values, and the first user name, across failed attempts, so an
	// offered key that its client does not have could be taken for its own.
	keyExtension = "m3o-key"

	maxAuthTries = 6
	maxChannels  = 16 // open sessions of one connection, also those that run nothing

	keepAliveEvery = 30 * time.Second
	keepAliveReply = 60 * time.Second
)

var errGone = errors.New("the client went away")

// A conn is one TCP connection. One ssh.Server a connection lets its callbacks
// know it without passing through the library's context.
type conn struct {
	net.Conn
	s         *Server
	host      string
	timer     *time.Timer // closes the connection: first for Login, then for Idle
	keepAlive sync.Once

	authenticated bool // guarded by Server.mu

	refusals  []string // keys nobody has; like explained, of the handshake's goroutine alone
	explained bool

	mu       sync.Mutex // guards all below
	ended    bool
	open     int            // channels
	channels sync.WaitGroup // Add only under mu while !ended
	pinger   sync.WaitGroup
}

func (s *Server) serveConn(nc net.Conn) {
	defer nc.Close() //nolint:errcheck // nothing is left to do about it
	host, _, err := net.SplitHostPort(nc.RemoteAddr().String())
	if err != nil {
		host = nc.RemoteAddr().String()
	}
	c := &conn{Conn: nc, s: s, host: host}
	if !s.admit(c) {
		s.log.Debug("ssh connection refused: too many", "host", host)
		return
	}
	defer s.dismiss(c)
	// A deadline on the connection would be cleared by the library, so a timer
	// closes it.
	c.timer = time.AfterFunc(s.lim.Login, func() { _ = nc.Close() })
	defer c.timer.Stop()
	defer s.recovered("ssh connection", nil)

	srv := &ssh.Server{
		Version:     "m3o",
		HostSigners: []ssh.Signer{s.signer},
		// Without any handler the library would let everybody in.
		PublicKeyHandler:       c.offer,
		ServerConfigCallback:   c.config,
		Handler:                c.handle,
		SessionRequestCallback: c.start,
		PtyCallback:            func(ssh.Context, ssh.Pty) bool { return false },
		ChannelHandlers:        map[string]ssh.ChannelHandler{"session": c.session},
	}
	srv.HandleConn(nc)
	_ = nc.Close()
	c.mu.Lock()
	c.ended = true
	c.mu.Unlock()
	c.channels.Wait()
	c.pinger.Wait()
}

// admit counts c in, unless there are too many.
func (s *Server) admit(c *conn) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	all, fromHost := 0, 0
	for o := range s.conns {
		if !o.authenticated {
			all++
			if o.host == c.host {
				fromHost++
			}
		}
	}
	if s.stopping || len(s.conns) >= s.lim.Connections || all >= s.lim.Unauthenticated || fromHost >= s.lim.UnauthenticatedPerHost {
		return false
	}
	s.conns[c] = struct{}{}
	return true
}

func (s *Server) dismiss(c *conn) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.conns, c)
}

// recovered, deferred, keeps a panic from ending the daemon, logs it and then
// calls then, if any.
func (s *Server) recovered(where string, then func()) {
	if r := recover(); r != nil {
		s.log.Error("panic in "+where, "err", fmt.Sprint(r), "stack", string(debug.Stack()))
		if then != nil {
			then()
		}
	}
}

func (c *conn) config(ssh.Context) *gossh.ServerConfig {
	return &gossh.ServerConfig{
		Config: gossh.Config{
			KeyExchanges: []string{gossh.KeyExchangeMLKEM768X25519, gossh.KeyExchangeCurve25519},
			// AES-GCM alone: half the processor time of ChaCha20 on a full push,
			// and OpenSSH would choose AES-CTR over it if that were offered too.
			Ciphers: []string{gossh.CipherAES128GCM, gossh.CipherAES256GCM},
			MACs:    []string{gossh.HMACSHA256ETM, gossh.HMACSHA512ETM},
		},
		MaxAuthTries:                maxAuthTries,
		KeyboardInteractiveCallback: c.explain,
		PublicKeyAuthAlgorithms: []string{
			gossh.KeyAlgoED25519, gossh.KeyAlgoSKED25519, gossh.KeyAlgoECDSA256, gossh.KeyAlgoSKECDSA256,
			gossh.KeyAlgoECDSA384, gossh.KeyAlgoECDSA521, gossh.KeyAlgoRSASHA256, gossh.KeyAlgoRSASHA512,
		},
		AuthLogCallback: func(_ gossh.ConnMetadata, method string, err error) {
			if err != nil {
				c.s.log.Debug("ssh authentication", "host", c.host, "method", method, "err", err)
				return
			}
			c.s.mu.Lock()
			c.authenticated = true
			c.s.mu.Unlock()
			c.timer.Reset(c.s.lim.Idle)
		},
	}
}

// offer answers whether a key may be used. It is called for keys the client
// may turn out not to have, so it records nothing but in the Permissions,
// which the library keeps only for the key that then proves itself.
func (c *conn) offer(ctx ssh.Context, key ssh.PublicKey) bool {
	wire := key.Marshal()
	ctx.Permissions().Permissions = &gossh.Permissions{Extensions: map[string]string{keyExtension: string(wire)}}
	_, _, err := c.s.cfg.Users.UserByKey(ctx, wire)
	if err != nil {
		ctx.Permissions().Permissions = nil
		c.refused(wire)
		if m3o.KindOf(err) != m3o.NotFound && ctx.Err() == nil {
			c.s.log.Error("look up ssh key", "err", err)
		}
		return false
	}
	return true
}

// session serves one channel. It returns when the channel is closed and all
// that was started for it has ended.
func (c *conn) session(srv *ssh.Server, sc *gossh.ServerConn, nc gossh.NewChannel, ctx ssh.Context) {
	if !c.enter() {
		_ = nc.Reject(gossh.ResourceShortage, fmt.Sprintf("%d sessions are open on this connection, which is the limit", maxChannels))
		return
	}
	defer c.leave()
	defer c.s.recovered("ssh channel", func() { _ = c.Close() })
	c.keepAlive.Do(func() { c.pinger.Go(func() { c.ping(ctx, sc) }) })

	cctx, cancel := context.WithCancelCause(ctx)
	defer cancel(errGone)
	stop := context.AfterFunc(c.s.base, func() { cancel(context.Cause(c.s.base)) })
	defer stop()
	ch := &channel{NewChannel: nc, conn: c, cancel: cancel}
	ssh.DefaultSessionHandler(srv, sc, ch, &channelContext{Context: ctx, ctx: cctx, ch: ch})
	cancel(errGone)
	ch.work.Wait()
}

func (c *conn) enter() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.ended || c.open >= maxChannels {
		return false
	}
	c.open++
	c.channels.Add(1)
	c.timer.Stop()
	return true
}

func (c *conn) leave() {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.open--; c.open == 0 && !c.ended {
		c.timer.Reset(c.s.lim.Idle)
	}
	c.channels.Done()
}

// ping closes the connection of a client that no longer answers (a closed
// laptop), so that its build ends and its deploy lock is freed.
func (c *conn) ping(ctx context.Context, sc *gossh.ServerConn) {
	defer c.s.recovered("ssh keepalive", nil)
	tick := time.NewTicker(keepAliveEvery)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		dead := time.AfterFunc(keepAliveReply, func() { _ = c.Close() })
		_, _, err := sc.SendRequest("keepalive@openssh.com", true, nil)
		dead.Stop()
		if err != nil {
			return
		}
	}
}

// A channel is one session's channel while it is accepted: it gives the
// session a context of its own. The library's is the connection's, and with
// ssh's ControlMaster a Ctrl-C closes only the channel.
type channel struct {
	gossh.NewChannel
	conn   *conn
	cancel context.CancelCauseFunc
	work   sync.WaitGroup // all that the session started
	term   *Terminal      // nil for none; set before the command is known, never after
	raw    gossh.Channel  // what the library's session writes to, once accepted
}

// Accept lets through only the requests that a session here may make.
func (ch *channel) Accept() (gossh.Channel, <-chan *gossh.Request, error) {
	accepted, reqs, err := ch.NewChannel.Accept()
	if err != nil {
		return nil, nil, err
	}
	out := make(chan *gossh.Request)
	ch.raw = accepted
	ch.work.Go(func() {
		defer close(out)
		defer ch.cancel(errGone)
		protocol, begun := false, false
		var sizes chan [2]uint16
		for r := range reqs {
			switch r.Type {
			case "exec", "shell":
				begun = true
				out <- r
				continue
			case "pty-req":
				// The library would change the line ends of what is written.
				var pty struct {
					Term          string
					Columns, Rows uint32
					Width, Height uint32
					Modes         string
				}
				if !begun && sizes == nil && gossh.Unmarshal(r.Payload, &pty) == nil && len(pty.Term) <= 64 {
					sizes = make(chan [2]uint16, 8)
					sizes <- terminalSize(pty.Columns, pty.Rows)
					ch.term = &Terminal{Name: pty.Term, Sizes: sizes}
					_ = r.Reply(true, nil)
					continue
				}
			case "window-change":
				var win struct{ Columns, Rows, Width, Height uint32 }
				if sizes != nil && gossh.Unmarshal(r.Payload, &win) == nil {
					select {
					case sizes <- terminalSize(win.Columns, win.Rows):
					default: // nobody reads them
					}
				}
			case "env":
				// The library keeps every variable: let one through, once.
				var kv struct{ Key, Value string }
				if !protocol && gossh.Unmarshal(r.Payload, &kv) == nil && kv.Key == "GIT_PROTOCOL" && validProtocol(kv.Value) {
					protocol = true
					out <- r
					continue
				}
			case "eow@openssh.com": // the client reads no more
				ch.cancel(errGone)
			case "signal":
				ch.cancel(errGone)
			}
			_ = r.Reply(false, nil) // auth-agent-req, subsystem, x11-req …
		}
	})
	return accepted, out, nil
}

func terminalSize(columns, rows uint32) [2]uint16 {
	return [2]uint16{uint16(min(columns, 9999)), uint16(min(rows, 9999))}
}

func validProtocol(v string) bool { return v == "version=1" || v == "version=2" }

// A channelContext is the connection's context cut down to one channel.
type channelContext struct {
	ssh.Context
	ctx context.Context // derived from Context
	ch  *channel
}

func (c *channelContext) Done() <-chan struct{} { return c.ctx.Done() }
func (c *channelContext) Err() error            { return c.ctx.Err() }

// Value goes through ctx, so that contexts derived from this one find its
// cancellation and its cause.
func (c *channelContext) Value(key any) any { return c.ctx.Value(key) }

// start is called before the library starts handle, in the goroutine that
// session waits for: the only place to count the handler in without a race.
func (c *conn) start(sess ssh.Session, _ string) bool {
	cc, ok := sess.Context().(*channelContext)
	if !ok {
		return false
	}
	c.s.mu.Lock()
	defer c.s.mu.Unlock()
	if c.s.stopping {
		return false
	}
	c.s.sessions.Add(1)
	cc.ch.work.Add(1)
	return true
}

// handle runs one session.
func (c *conn) handle(sess ssh.Session) {
	cc := sess.Context().(*channelContext) // start has checked it
	defer c.s.sessions.Done()
	defer cc.ch.work.Done()
	x := &session{s: c.s, conn: c, ch: cc.ch, sess: sess, stderr: &syncWriter{w: sess.Stderr()}}
	if cc.ch.term != nil {
		x.stderr.w = newlines{sess.Stderr()}
	}
	code := 1
	defer func() { _ = sess.Exit(code) }()
	defer c.s.recovered("ssh session", func() { tell(x.stderr, errInternal) })
	code = x.run(cc)
}

// authenticated is the user of the session's connection and the key's
// fingerprint, from the connection's own Permissions and nothing else.
func (x *session) authenticated(ctx context.Context) (user, fingerprint string, err error) {
	sc, ok := ctx.Value(ssh.ContextKeyConn).(*gossh.ServerConn)
	if !ok || sc.Permissions == nil || sc.Permissions.Extensions[keyExtension] == "" {
		return "", "", errors.New("the connection carries no key")
	}
	user, fingerprint, err = x.s.cfg.Users.UserByKey(ctx, []byte(sc.Permissions.Extensions[keyExtension]))
	if err == nil && strings.TrimSpace(user) == "" {
		err = errors.New("the key belongs to a user without a name")
	}
	return user, fingerprint, err
}
