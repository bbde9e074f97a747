package router

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"iter"
	"net"
	"net/http"
	"net/url"
	"os"
	"strconv"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/m3o/m3o"
)

// drainTime is how long a drain waits when nobody says.
const drainTime = 5 * time.Minute

// maxFailure bounds one.
const maxFailure = 64 << 10

// failure is how an error crosses the control socket.
type failure struct {
	Kind m3o.Kind `json:"kind"`
	Msg  string   `json:"msg"`
	Hint string   `json:"hint,omitempty"`
}

// hash is the answer to a new table.
type hash struct {
	Hash string `json:"hash"`
}

// controlServer serves the daemon until ctx ends.
func (rt *Router) controlServer(ctx context.Context) *http.Server {
	mux := http.NewServeMux()
	handle := func(pattern string, f func(r *http.Request) (any, error)) {
		mux.HandleFunc(pattern, func(w http.ResponseWriter, r *http.Request) {
			v, err := f(r)
			w.Header().Set("Content-Type", "application/json")
			if err != nil {
				rt.log.Warn("control call", "path", r.URL.Path, "err", err)
				w.WriteHeader(http.StatusInternalServerError)
				v = failure{m3o.KindOf(err), err.Error(), m3o.HintOf(err)}
			}
			_ = json.NewEncoder(w).Encode(v) // the daemon is gone: it asks again
		})
	}
	handle("PUT /table", func(r *http.Request) (any, error) {
		b, err := io.ReadAll(io.LimitReader(r.Body, maxTableBytes+1))
		if err != nil {
			return nil, fmt.Errorf("read table: %w", err)
		}
		t, _, err := decodeTable(b)
		if err != nil {
			return nil, err
		}
		h, err := rt.Put(t)
		return hash{h}, err
	})
	handle("PATCH /table", func(r *http.Request) (any, error) {
		b, err := io.ReadAll(io.LimitReader(r.Body, maxTableBytes+1))
		if err != nil {
			return nil, fmt.Errorf("read change: %w", err)
		}
		c, err := decodeChange(b)
		if err != nil {
			return nil, err
		}
		h, err := rt.Apply(c)
		return hash{h}, err
	})
	handle("POST /drain", func(r *http.Request) (any, error) {
		q := r.URL.Query()
		release, err := strconv.Atoi(q.Get("release"))
		if err != nil {
			return nil, m3o.Errorf(m3o.Invalid, "release %q is not a number", q.Get("release"))
		}
		wait := drainTime
		if s := q.Get("wait"); s != "" {
			if wait, err = time.ParseDuration(s); err != nil {
				return nil, m3o.Errorf(m3o.Invalid, "wait %q is not a duration", s)
			}
		}
		ctx, cancel := context.WithTimeout(r.Context(), wait)
		defer cancel()
		return rt.Drain(ctx, q.Get("app"), release)
	})
	handle("GET /requests", func(r *http.Request) (any, error) {
		window, err := time.ParseDuration(r.URL.Query().Get("window"))
		if err != nil {
			return nil, m3o.Errorf(m3o.Invalid, "window %q is not a duration", r.URL.Query().Get("window"))
		}
		return rt.Requests(r.URL.Query().Get("app"), window), nil
	})
	mux.HandleFunc("GET /follow", rt.serveFollow)
	mux.HandleFunc("GET /asks", rt.serveAsks)
	handle("POST /wake", func(r *http.Request) (any, error) {
		var f failure
		if err := json.NewDecoder(io.LimitReader(r.Body, maxFailure)).Decode(&f); err != nil {
			return nil, m3o.Errorf(m3o.Invalid, "decode failure: %w", err)
		}
		rt.FailWake(r.URL.Query().Get("app"), &m3o.Error{Kind: m3o.Unavailable, Msg: f.Msg, Hint: f.Hint})
		return struct{}{}, nil
	})
	handle("PUT /peers", rt.controlPeers)
	rt.certControl(handle)
	mux.HandleFunc("GET /listeners", rt.serveListeners)
	handle("POST /retire", func(r *http.Request) (any, error) {
		wait, err := time.ParseDuration(r.URL.Query().Get("wait"))
		if err != nil {
			return nil, m3o.Errorf(m3o.Invalid, "wait %q is not a duration", r.URL.Query().Get("wait"))
		}
		rt.Retire(wait)
		return struct{}{}, nil
	})
	handle("GET /status", func(*http.Request) (any, error) { return rt.Status(), nil })
	return &http.Server{
		Handler:           onlySelf(mux),
		ReadHeaderTimeout: rt.limits.HeaderRead,
		IdleTimeout:       rt.limits.Idle,
		BaseContext:       func(net.Listener) context.Context { return ctx },
		ConnContext:       peerContext,
	}
}

type peerKey struct{}

// peerContext notes who is at the other end of a unix socket.
func peerContext(ctx context.Context, c net.Conn) context.Context {
	sc, ok := c.(syscall.Conn)
	if !ok || c.LocalAddr().Network() != "unix" {
		return ctx
	}
	rc, err := sc.SyscallConn()
	if err != nil {
		return ctx
	}
	uid := -1
	_ = rc.Control(func(fd uintptr) {
		if cred, err := unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED); err == nil {
			uid = int(cred.Uid)
		}
	})
	return context.WithValue(ctx, peerKey{}, uid)
}

// onlySelf refuses everybody but root and the router's own user: the socket's
// mode says the same, but is set a moment after the socket is there.
func onlySelf(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if uid, ok := r.Context().Value(peerKey{}).(int); ok && uid != 0 && uid != os.Geteuid() {
			http.Error(w, "not yours", http.StatusForbidden)
			return
		}
		next.ServeHTTP(w, r)
	})
}

// A Client is the daemon's side of the control socket. Its errors are
// *m3o.Error: of kind Unavailable when no router answers there.
type Client struct {
	Socket string // path of the router's control socket
}

// Put makes t the router's table, see Router.Put.
func (c Client) Put(ctx context.Context, t Table) (string, error) {
	b, err := encodeTable(t, 0)
	if err != nil {
		return "", err
	}
	var h hash
	err = c.do(ctx, http.MethodPut, "/table", b, &h)
	return h.Hash, err
}

// Apply changes the router's table, see Router.Apply.
func (c Client) Apply(ctx context.Context, ch Change) (string, error) {
	b, err := json.Marshal(ch)
	if err != nil {
		return "", fmt.Errorf("encode change: %w", err)
	}
	var h hash
	err = c.do(ctx, http.MethodPatch, "/table", b, &h)
	return h.Hash, err
}

// Drain waits until the requests of an old release have ended, and at ctx's
// deadline ends them, see Router.Drain. Without a deadline it waits five
// minutes. Cancelling ctx cuts nothing.
func (c Client) Drain(ctx context.Context, app string, release int) (Drained, error) {
	wait := drainTime
	if dl, ok := ctx.Deadline(); ok {
		wait = max(0, time.Until(dl))
	}
	// The answer comes after the deadline: what is cut gets time to leave.
	call, cancel := context.WithTimeout(context.WithoutCancel(ctx), wait+2*leaveTime)
	defer cancel()
	defer context.AfterFunc(ctx, func() {
		if errors.Is(ctx.Err(), context.Canceled) {
			cancel()
		}
	})()
	q := url.Values{"app": {app}, "release": {strconv.Itoa(release)}, "wait": {wait.String()}}
	var d Drained
	err := c.do(call, http.MethodPost, "/drain?"+q.Encode(), nil, &d)
	return d, err
}

// Status asks the router what it is doing.
func (c Client) Status(ctx context.Context) (Status, error) {
	var s Status
	err := c.do(ctx, http.MethodGet, "/status", nil, &s)
	return s, err
}

// Requests asks for an app's requests, see Router.Requests.
func (c Client) Requests(ctx context.Context, app string, window time.Duration) (Stats, error) {
	var s Stats
	err := c.do(ctx, http.MethodGet, "/requests?"+url.Values{"app": {app}, "window": {window.String()}}.Encode(), nil, &s)
	return s, err
}

// Follow yields the requests of app ("" for all) as they end, until ctx does.
// When the caller is too slow for them it misses some, and dropped says how
// many so far. An error is the last thing it yields.
func (c Client) Follow(ctx context.Context, app string) iter.Seq2[Followed, error] {
	return c.FollowAtMost(ctx, app, 0)
}

// FollowAtMost is Follow of at most rate requests a second, 0 for all; those
// beyond are missed too. Telling of a request costs about as much as relaying it.
func (c Client) FollowAtMost(ctx context.Context, app string, rate int) iter.Seq2[Followed, error] {
	return func(yield func(Followed, error) bool) {
		res, err := c.ask(ctx, http.MethodGet, "/follow?"+url.Values{"app": {app}, "rate": {strconv.Itoa(rate)}}.Encode(), nil)
		if err != nil {
			yield(Followed{}, err)
			return
		}
		defer res.Body.Close() //nolint:errcheck // read to the end or given up
		dec := json.NewDecoder(res.Body)
		for {
			var f Followed
			if err := dec.Decode(&f); err != nil {
				if ctx.Err() == nil {
					yield(f, m3o.Errorf(m3o.Unavailable, "the router ended: %w", err))
				}
				return
			}
			if !yield(f, nil) {
				return
			}
		}
	}
}

// Followed is one request that Follow tells of.
type Followed struct {
	Record
	Dropped int64 `json:"dropped,omitempty"` // missed so far
}

// serveFollow writes a line of JSON for each request.
func (rt *Router) serveFollow(w http.ResponseWriter, r *http.Request) {
	rate, _ := strconv.Atoi(r.URL.Query().Get("rate")) // 0 when absent
	s, stop := rt.tails.follow(r.URL.Query().Get("app"), rate)
	defer stop()
	w.Header().Set("Content-Type", "application/x-ndjson")
	rc := http.NewResponseController(w)
	if rc.Flush() != nil {
		return
	}
	enc := json.NewEncoder(w)
	for {
		select {
		case <-r.Context().Done():
			return
		case rec := <-s.c:
			if enc.Encode(Followed{rec, s.dropped.Load()}) != nil {
				return
			}
			if len(s.c) == 0 && rc.Flush() != nil {
				return
			}
		}
	}
}

func (c Client) do(ctx context.Context, method, path string, body []byte, out any) error {
	res, err := c.ask(ctx, method, path, body)
	if err != nil {
		return err
	}
	defer res.Body.Close() //nolint:errcheck // read to the end or given up
	if out == nil {
		return nil
	}
	if err := json.NewDecoder(io.LimitReader(res.Body, maxTableBytes)).Decode(out); err != nil {
		return m3o.Errorf(m3o.Unavailable, "read the router's answer: %w", err)
	}
	return nil
}

// ask sends one call and returns its answer, whose body the caller closes.
func (c Client) ask(ctx context.Context, method, path string, body []byte) (*http.Response, error) {
	// Calls are rare and the router may be another one next time: no pooling.
	t := &http.Transport{DisableKeepAlives: true, DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		var d net.Dialer
		return d.DialContext(ctx, "unix", c.Socket)
	}}
	req, err := http.NewRequestWithContext(ctx, method, "http://router"+path, bytes.NewReader(body))
	if err != nil {
		return nil, fmt.Errorf("ask router: %w", err)
	}
	res, err := t.RoundTrip(req)
	if err != nil {
		return nil, &m3o.Error{Kind: m3o.Unavailable, Msg: "the router does not answer", Hint: "it serves from its last table; m3od starts it again", Err: err}
	}
	if res.StatusCode == http.StatusOK {
		return res, nil
	}
	defer res.Body.Close() //nolint:errcheck // read to the end or given up
	var f failure
	if err := json.NewDecoder(io.LimitReader(res.Body, maxTableBytes)).Decode(&f); err != nil || f.Msg == "" {
		return nil, m3o.Errorf(m3o.Internal, "the router answered %s", res.Status)
	}
	return nil, &m3o.Error{Kind: f.Kind, Msg: f.Msg, Hint: f.Hint}
}
