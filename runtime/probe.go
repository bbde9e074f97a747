package runtime

import (
	"bytes"
	"cmp"
	"context"
	"crypto/tls"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"time"

	"github.com/m3o/m3o"
)

// A Protocol is what a server was found to speak on its port.
type Protocol string

// The protocols. GRPC is HTTP/2 without TLS from a server that answered a gRPC
// call as such; H2C the same from one that did not; an HTTP/1.1 answer is
// HTTP1; a port that only accepts connections is TCP.
const (
	GRPC  Protocol = "grpc"
	HTTP1 Protocol = "http1"
	H2C   Protocol = "h2c"
	TCP   Protocol = "tcp"
)

// errNotServing marks the answer of a server that says itself it is not well.
var errNotServing = errors.New("not serving")

// errNoHealth marks the answer of a gRPC server that told nothing of its health.
var errNoHealth = errors.New("no health told")

// Probe asks the server at addr ("ip:port") once whether it is well, and tells
// what it speaks. Kind "grpc" calls grpc.health.v1.Health/Check for the whole
// server or h.Service, "http" wants 2xx or 3xx for GET Path, "tcp" an accepted connection. Kind "" detects: the
// gRPC health service where served (a gRPC server without it, or that lets
// nobody ask, is well: it answered), else an HTTP answer of any status (to
// OPTIONS *, which the common servers answer without calling the app), else an
// accepted connection. The error says in words what was wrong.
func Probe(ctx context.Context, addr string, h m3o.Health) (Protocol, error) {
	within := cmp.Or(h.Answer, probeTimeout)
	ctx, cancel := context.WithTimeout(ctx, within)
	defer cancel()
	switch h.Kind {
	case "tcp":
		return TCP, accepts(ctx, addr)
	case "http":
		return HTTP1, healthyPath(ctx, addr, cmp.Or(h.Path, "/"))
	case "grpc":
		if err := accepts(ctx, addr); err != nil {
			return "", err
		}
		p, err := grpcHealth(ctx, addr, h.Service)
		switch {
		case err == nil && p != GRPC:
			err = errors.New("the port speaks HTTP/2 but did not answer the gRPC health check")
		case p == "" && ctx.Err() == nil:
			// How exactly another protocol fails is chance.
			err = errors.New("the port does not speak gRPC")
		}
		return p, err
	case "":
		return detect(ctx, addr, within)
	}
	return "", m3o.Errorf(m3o.Invalid, "health check kind %q is not grpc, http, tcp or empty", h.Kind)
}

// detect gives each of its steps a third of the time: a server that answers
// none of them must not look slower than it is.
func detect(ctx context.Context, addr string, within time.Duration) (Protocol, error) {
	// Most failures are a port nobody listens on yet: learn that first, cheaply.
	if err := accepts(ctx, addr); err != nil {
		return "", err
	}
	p, err := step(ctx, within/3, func(ctx context.Context) (Protocol, error) { return grpcHealth(ctx, addr, "") })
	switch {
	case errors.Is(err, errNoHealth):
		return p, nil
	case err == nil || errors.Is(err, errNotServing):
		return p, err
	}
	p, err = step(ctx, within/3, func(ctx context.Context) (Protocol, error) { return HTTP1, anyAnswer(ctx, addr) })
	if err == nil {
		return p, nil
	}
	return TCP, accepts(ctx, addr)
}

func step(ctx context.Context, within time.Duration, ask func(context.Context) (Protocol, error)) (Protocol, error) {
	ctx, cancel := context.WithTimeout(ctx, within)
	defer cancel()
	return ask(ctx)
}

// dial connects to an instance, which may be a moment old.
func dial(ctx context.Context, network, addr string) (net.Conn, error) {
	var d net.Dialer
	return redial(ctx, func(ctx context.Context) (net.Conn, error) { return d.DialContext(ctx, network, addr) })
}

// The first packet to a network device that has just come up can be lost, and
// TCP sends it again only after a second.
const (
	firstDial = 30 * time.Millisecond
	lastDial  = time.Second
)

// redial dials, and dials again, with ever more patience, while nothing comes
// back at all.
func redial(ctx context.Context, dial func(context.Context) (net.Conn, error)) (net.Conn, error) {
	for wait := firstDial; wait < lastDial; wait *= 2 {
		dctx, cancel := context.WithTimeout(ctx, wait)
		c, err := dial(dctx)
		late := dctx.Err() != nil
		cancel()
		if err == nil || !late || ctx.Err() != nil {
			return c, err
		}
	}
	return dial(ctx)
}

func accepts(ctx context.Context, addr string) error {
	c, err := dial(ctx, "tcp", addr)
	if err != nil {
		return describe(err)
	}
	return c.Close()
}

// describe makes a network error readable: no addresses, no Go words.
func describe(err error) error {
	var op *net.OpError
	switch {
	case errors.Is(err, context.DeadlineExceeded), isTimeout(err):
		return errors.New("no answer in time")
	case errors.As(err, &op) && op.Err != nil:
		return errors.New(strings.TrimPrefix(op.Err.Error(), "connect: "))
	}
	return err
}

func isTimeout(err error) bool {
	var t interface{ Timeout() bool }
	return errors.As(err, &t) && t.Timeout()
}

// client returns a client for one answer; finish must be called after it.
func client(h2 bool) (c *http.Client, finish func()) {
	t := &http.Transport{
		DialContext:            dial,
		Protocols:              new(http.Protocols),
		DisableKeepAlives:      !h2, // HTTP/2 needs the connection beyond the request
		MaxResponseHeaderBytes: 64 << 10,
		TLSClientConfig:        &tls.Config{MinVersion: tls.VersionTLS12},
	}
	t.Protocols.SetUnencryptedHTTP2(h2)
	t.Protocols.SetHTTP1(!h2)
	return &http.Client{
		Transport:     t,
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}, t.CloseIdleConnections
}

const userAgent = "m3o-health"

func healthyPath(ctx context.Context, addr, path string) error {
	c, finish := client(false)
	defer finish()
	req, err := http.NewRequestWithContext(ctx, "GET", "http://"+addr, nil)
	if err != nil {
		return err
	}
	if req.URL, err = req.URL.Parse(path); err != nil || req.URL.Host != addr {
		return fmt.Errorf("%q is not a path", path)
	}
	req.Header.Set("User-Agent", userAgent)
	resp, err := c.Do(req)
	if err != nil {
		return fmt.Errorf("GET %s: %w", path, describe(unwrapURL(err)))
	}
	defer resp.Body.Close() //nolint:errcheck // the answer is the status
	if resp.StatusCode < 200 || resp.StatusCode > 399 {
		return fmt.Errorf("GET %s answered %d", path, resp.StatusCode)
	}
	return nil
}

// anyAnswer is by hand: net/http writes to the standard logger when a server
// that speaks something else says it first.
func anyAnswer(ctx context.Context, addr string) error {
	c, err := dial(ctx, "tcp", addr)
	if err != nil {
		return describe(err)
	}
	defer c.Close() //nolint:errcheck // the answer is all that is wanted
	defer context.AfterFunc(ctx, func() { _ = c.SetDeadline(time.Unix(1, 0)) })()
	if _, err := fmt.Fprintf(c, "OPTIONS * HTTP/1.1\r\nHost: %s\r\nUser-Agent: %s\r\nConnection: close\r\n\r\n", addr, userAgent); err != nil {
		return describe(err)
	}
	b := make([]byte, len("HTTP/1."))
	if _, err := io.ReadFull(c, b); err != nil {
		return describe(err)
	}
	if string(b) != "HTTP/1." {
		return errors.New("the answer is not HTTP/1.1")
	}
	return nil
}

func unwrapURL(err error) error {
	if u, ok := errors.AsType[*url.Error](err); ok {
		return u.Err
	}
	return err
}

// healthCall begins a call of grpc.health.v1.Health, by hand: a client library
// would hide whether it was HTTP/2 or gRPC that failed. See
// https://github.com/grpc/grpc/blob/master/doc/PROTOCOL-HTTP2.md.
func healthCall(ctx context.Context, c *http.Client, addr, method, service string) (*http.Response, error) {
	msg := []byte{0, 0, 0, 0, 0}
	if service != "" { // HealthCheckRequest{service = 1}
		msg = append(msg, 1<<3|2)
		msg = binary.AppendUvarint(msg, uint64(len(service)))
		msg = append(msg, service...)
		binary.BigEndian.PutUint32(msg[1:], uint32(len(msg)-5))
	}
	req, err := http.NewRequestWithContext(ctx, "POST", "http://"+addr+"/grpc.health.v1.Health/"+method, bytes.NewReader(msg))
	if err != nil {
		return nil, err
	}
	req.Header.Set("Content-Type", "application/grpc")
	req.Header.Set("TE", "trailers")
	req.Header.Set("User-Agent", userAgent)
	resp, err := c.Do(req)
	if err != nil {
		return nil, describe(unwrapURL(err))
	}
	return resp, nil
}

// grpcHealth asks for the health of a service, "" for the whole server. The
// protocol is valid whenever it is not "".
func grpcHealth(ctx context.Context, addr, service string) (Protocol, error) {
	c, finish := client(true)
	defer finish()
	resp, err := healthCall(ctx, c, addr, "Check", service)
	if err != nil {
		return "", err
	}
	defer resp.Body.Close() //nolint:errcheck // read below
	if !strings.HasPrefix(resp.Header.Get("Content-Type"), "application/grpc") {
		return H2C, nil
	}
	body, err := io.ReadAll(io.LimitReader(resp.Body, 4<<10))
	if err != nil {
		return "", describe(err)
	}
	code, err := grpcStatus(resp)
	switch {
	case err != nil:
		return GRPC, errors.New("gRPC health check answered no status")
	case code == unimplemented && service == "":
		return GRPC, fmt.Errorf("the gRPC server does not serve grpc.health.v1.Health: %w", errNoHealth)
	case code == unimplemented:
		return GRPC, errors.New("the gRPC server does not serve grpc.health.v1.Health")
	case code == notFound:
		return GRPC, fmt.Errorf("the gRPC server tells nothing of the health of %q", service)
	case code == 7 || code == 16: // PERMISSION_DENIED, UNAUTHENTICATED: an interceptor guards every method
		return GRPC, fmt.Errorf("the gRPC server lets nobody call its health check: %w", errNoHealth)
	case code != 0:
		return GRPC, fmt.Errorf("gRPC health check answered status %d: %w", code, errNotServing)
	}
	n, err := servingStatus(body)
	switch {
	case err != nil:
		return GRPC, fmt.Errorf("gRPC health check: %w", err)
	case n != 1:
		return GRPC, fmt.Errorf("gRPC health check answered %s: %w", statusName(n), errNotServing)
	}
	return GRPC, nil
}

// Two of gRPC's status codes.
const (
	notFound      = 5
	unimplemented = 12
)

// grpcStatus is the status of a call whose body has been read.
func grpcStatus(resp *http.Response) (int, error) {
	return strconv.Atoi(cmp.Or(resp.Trailer.Get("Grpc-Status"), resp.Header.Get("Grpc-Status")))
}

func statusName(n uint64) string {
	if names := []string{"UNKNOWN", "SERVING", "NOT_SERVING", "SERVICE_UNKNOWN"}; n < uint64(len(names)) {
		return names[n]
	}
	return strconv.FormatUint(n, 10)
}

// servingStatus reads HealthCheckResponse{status = 1} from one gRPC message.
func servingStatus(b []byte) (uint64, error) {
	if len(b) < 5 || b[0] != 0 || uint64(binary.BigEndian.Uint32(b[1:5])) != uint64(len(b)-5) {
		return 0, errors.New("the answer is not one uncompressed message")
	}
	b = b[5:]
	var status uint64 // proto3: absent means 0
	for len(b) > 0 {
		tag, n := binary.Uvarint(b)
		if n <= 0 {
			return 0, errors.New("the answer is malformed")
		}
		b = b[n:]
		v, n := binary.Uvarint(b)
		if n <= 0 {
			return 0, errors.New("the answer is malformed")
		}
		b = b[n:]
		switch {
		case tag == 1<<3: // field 1, varint
			status = v
		case tag&7 == 0: // another varint
		case tag&7 == 2 && v <= uint64(len(b)):
			b = b[v:]
		default:
			return 0, errors.New("the answer is malformed")
		}
	}
	return status, nil
}
