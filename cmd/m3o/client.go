package main

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"net"
	"net/http"
	"net/url"
	"os"
	"strings"
	"time"

	"connectrpc.com/connect"

	"github.com/m3o/m3o/api/m3o/v1/m3ov1connect"
)

// A target is one server and how to speak to it.
type target struct {
	url     *url.URL
	token   string
	expired string // when the stored token ended, in words; "" when it did not
	ca      string // PEM of the only CA to believe; "" for the computer's own
}

const (
	dialTime = 10 * time.Second
	// callTime bounds a call that only reads or writes a record.
	callTime = 30 * time.Second
	// deployTime bounds a call that returns once a release is live: a release
	// command may take an hour.
	deployTime = 65 * time.Minute
	// maxAnswer bounds one message from the server.
	maxAnswer = 16 << 20
)

// target finds the server that the environment or login names.
func (s *system) target(gitHost string) (target, error) {
	token, err := s.envToken()
	if err != nil {
		return target{}, err
	}
	ca := ""
	if path := s.env("M3O_CA_FILE"); path != "" {
		if ca, err = readCA(path); err != nil {
			return target{}, err
		}
	}
	raw := s.env("M3O_URL")
	if raw != "" && token != "" && ca != "" { // nothing stored is needed
		u, err := parseServerURL(raw)
		return target{url: u, token: token, ca: ca}, err
	}
	st, err := s.loadSettings()
	if err != nil && (raw == "" || token == "") {
		return target{}, err
	}
	name := st.serverFor(gitHost)
	if raw != "" {
		u, err := parseServerURL(raw)
		if err != nil {
			return target{}, err
		}
		name = u.String()
	}
	if name == "" {
		return target{}, misuse("not logged in to any server", "m3o login https://api.<domain>, or set M3O_URL and M3O_TOKEN")
	}
	u, err := parseServerURL(name)
	if err != nil {
		return target{}, err
	}
	t := target{url: u, token: token, ca: ca}
	srv := st.Servers[name]
	if srv == nil {
		return t, nil
	}
	if t.ca == "" {
		t.ca = srv.CA
	}
	if t.token == "" {
		t.token = srv.Token
		if !srv.Expires.IsZero() && s.now().After(srv.Expires) {
			t.expired = ago(srv.Expires, s.now())
		}
	}
	return t, nil
}

// serverFor is the server whose git remote the app was read from, so that a
// command in a checkout of one installation never reaches another; else the
// current one.
func (st settings) serverFor(gitHost string) string {
	if gitHost == "" {
		return st.Current
	}
	if cur := st.Servers[st.Current]; cur != nil && sameGitHost(cur.GitHost, gitHost) {
		return st.Current
	}
	for name, srv := range st.Servers {
		if sameGitHost(srv.GitHost, gitHost) {
			return name
		}
	}
	return st.Current
}

// sameGitHost compares host:port with what a remote says, which may have no port.
func sameGitHost(stored, remote string) bool {
	if _, _, err := net.SplitHostPort(remote); err == nil {
		return stored == remote
	}
	host, _, err := net.SplitHostPort(stored)
	return err == nil && host == remote
}

func (s *system) envToken() (string, error) {
	if t := s.env("M3O_TOKEN"); t != "" {
		return strings.TrimSpace(t), nil
	}
	path := s.env("M3O_TOKEN_FILE")
	if path == "" {
		return "", nil
	}
	b, err := os.ReadFile(path)
	if err != nil {
		return "", fail("cannot read M3O_TOKEN_FILE: "+err.Error(), "")
	}
	t := strings.TrimSpace(string(b))
	if t == "" {
		return "", fail("M3O_TOKEN_FILE is empty: "+path, "")
	}
	return t, nil
}

// A client calls one server.
type client struct {
	target
	http      *http.Client
	auth      m3ov1connect.AuthClient
	keys      m3ov1connect.KeysClient
	apps      m3ov1connect.AppsClient
	releases  m3ov1connect.ReleasesClient
	builds    m3ov1connect.BuildsClient
	records   m3ov1connect.BuildRecordsClient
	deploys   m3ov1connect.DeploysClient
	config    m3ov1connect.ConfigClient
	processes m3ov1connect.ProcessesClient
	runs      m3ov1connect.RunsClient
	drains    m3ov1connect.DrainsClient
	doctor    m3ov1connect.DoctorClient
	scale     m3ov1connect.ScaleClient
	volumes   m3ov1connect.VolumesClient
	links     m3ov1connect.LinksClient
	server    m3ov1connect.ServerClient
	schedules m3ov1connect.SchedulesClient
	domains   m3ov1connect.DomainsClient
	certs     m3ov1connect.CertificatesClient
	traffic   m3ov1connect.TrafficClient
	access    m3ov1connect.AccessClient
	requests  m3ov1connect.RequestsClient
	canary    m3ov1connect.CanaryClient
	control   m3ov1connect.ControlClient
	notify    m3ov1connect.NotificationsClient
	repos     m3ov1connect.ReposClient
}

// connect is a client of the server that the environment or login names.
func (s *system) connect() (*client, error) {
	t, err := s.target("")
	if err != nil {
		return nil, err
	}
	return newClient(t)
}

func newClient(t target) (*client, error) {
	conf := &tls.Config{MinVersion: tls.VersionTLS12}
	if t.ca != "" {
		pool := x509.NewCertPool()
		if !pool.AppendCertsFromPEM([]byte(t.ca)) {
			return nil, fail("the stored CA of "+t.url.Host+" is no certificate", "m3o login "+t.url.String())
		}
		conf.RootCAs = pool
	}
	return clientWith(t, conf), nil
}

func clientWith(t target, conf *tls.Config) *client {
	h := &http.Client{
		Transport: &http.Transport{
			TLSClientConfig:     conf,
			TLSHandshakeTimeout: dialTime,
			ForceAttemptHTTP2:   true,
			DialContext:         dial,
			Proxy: func(r *http.Request) (*url.URL, error) {
				if loopback(r.URL.Hostname()) {
					return nil, nil // a proxy elsewhere has another localhost
				}
				return http.ProxyFromEnvironment(r)
			},
			// A followed log must notice that its server is gone.
			HTTP2: &http.HTTP2Config{SendPingTimeout: 15 * time.Second, PingTimeout: 15 * time.Second},
		},
		// The API never redirects, and a token must not travel on.
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}
	opts := []connect.ClientOption{connect.WithInterceptors(caller{t}), connect.WithReadMaxBytes(maxAnswer)}
	base := t.url.String()
	return &client{
		target: t, http: h,
		auth:      m3ov1connect.NewAuthClient(h, base, opts...),
		keys:      m3ov1connect.NewKeysClient(h, base, opts...),
		apps:      m3ov1connect.NewAppsClient(h, base, opts...),
		releases:  m3ov1connect.NewReleasesClient(h, base, opts...),
		builds:    m3ov1connect.NewBuildsClient(h, base, opts...),
		records:   m3ov1connect.NewBuildRecordsClient(h, base, opts...),
		deploys:   m3ov1connect.NewDeploysClient(h, base, opts...),
		config:    m3ov1connect.NewConfigClient(h, base, opts...),
		processes: m3ov1connect.NewProcessesClient(h, base, opts...),
		links:     m3ov1connect.NewLinksClient(h, base, opts...),
		doctor:    m3ov1connect.NewDoctorClient(h, base, opts...),
		drains:    m3ov1connect.NewDrainsClient(h, base, opts...),
		runs:      m3ov1connect.NewRunsClient(h, base, opts...),
		scale:     m3ov1connect.NewScaleClient(h, base, opts...),
		volumes:   m3ov1connect.NewVolumesClient(h, base, opts...),
		server:    m3ov1connect.NewServerClient(h, base, opts...),
		schedules: m3ov1connect.NewSchedulesClient(h, base, opts...),
		domains:   m3ov1connect.NewDomainsClient(h, base, opts...),
		certs:     m3ov1connect.NewCertificatesClient(h, base, opts...),
		traffic:   m3ov1connect.NewTrafficClient(h, base, opts...),
		access:    m3ov1connect.NewAccessClient(h, base, opts...),
		requests:  m3ov1connect.NewRequestsClient(h, base, opts...),
		canary:    m3ov1connect.NewCanaryClient(h, base, opts...),
		control:   m3ov1connect.NewControlClient(h, base, opts...),
		notify:    m3ov1connect.NewNotificationsClient(h, base, opts...),
		repos:     m3ov1connect.NewReposClient(h, base, opts...),
	}
}

// dial connects, and finds *.localhost itself: neither Go's resolver nor
// glibc's knows that those names are this computer.
func dial(ctx context.Context, network, addr string) (net.Conn, error) {
	d := &net.Dialer{Timeout: dialTime}
	host, port, err := net.SplitHostPort(addr)
	if err != nil {
		return nil, err
	}
	if !isLocalhost(strings.ToLower(host)) {
		return d.DialContext(ctx, network, addr)
	}
	conn, err := d.DialContext(ctx, network, net.JoinHostPort("127.0.0.1", port))
	if err != nil {
		if six, err6 := d.DialContext(ctx, network, net.JoinHostPort("::1", port)); err6 == nil {
			return six, nil
		}
	}
	return conn, err
}

// A caller is the interceptor that says who calls, bounds every unary call and
// explains why a server could not be reached.
type caller struct{ t target }

var _ connect.Interceptor = caller{}

func (c caller) sign(h http.Header) {
	h.Set("User-Agent", "m3o/"+version())
	if c.t.token != "" {
		h.Set("Authorization", "Bearer "+c.t.token)
	}
}

func (c caller) WrapUnary(next connect.UnaryFunc) connect.UnaryFunc {
	return func(ctx context.Context, req connect.AnyRequest) (connect.AnyResponse, error) {
		limit := callTime
		switch req.Spec().Procedure {
		case m3ov1connect.ReleasesRollbackProcedure, m3ov1connect.ConfigSetProcedure,
			m3ov1connect.ConfigUnsetProcedure, m3ov1connect.AppsDestroyProcedure,
			m3ov1connect.CanarySetProcedure, m3ov1connect.CanaryPromoteProcedure,
			m3ov1connect.ScaleSetProcedure, m3ov1connect.ScaleRestartProcedure, m3ov1connect.ScaleStartProcedure,
			m3ov1connect.ScaleStopProcedure, m3ov1connect.ScaleAutoscaleProcedure, m3ov1connect.ScaleSleepProcedure,
			m3ov1connect.VolumesMountProcedure, m3ov1connect.VolumesUnmountProcedure,
			m3ov1connect.ControlPublishProcedure,
			m3ov1connect.ReposConnectProcedure, m3ov1connect.ReposDisconnectProcedure, m3ov1connect.ReposDestroyPreviewProcedure:
			limit = deployTime
		}
		ctx, cancel := context.WithTimeout(ctx, limit)
		defer cancel()
		c.sign(req.Header())
		res, err := next(ctx, req)
		return res, reach(err, c.t)
	}
}

func (c caller) WrapStreamingClient(next connect.StreamingClientFunc) connect.StreamingClientFunc {
	return func(ctx context.Context, spec connect.Spec) connect.StreamingClientConn {
		conn := next(ctx, spec)
		c.sign(conn.RequestHeader())
		return conn
	}
}

func (c caller) WrapStreamingHandler(next connect.StreamingHandlerFunc) connect.StreamingHandlerFunc {
	return next
}

// receive hands every message of a stream to each. A stream that is followed
// has ended well when the user ends it by Ctrl-C.
func receive[T any](ctx context.Context, cl *client, follow bool, stream *connect.ServerStreamForClient[T], err error, each func(*T) error) error {
	if err == nil {
		for stream.Receive() {
			if err := each(stream.Msg()); err != nil {
				return errors.Join(err, stream.Close())
			}
		}
		err = stream.Err()
		_ = stream.Close() // all that was wanted is read
	}
	if err != nil && follow && ctx.Err() != nil {
		return nil
	}
	return reach(err, cl.target)
}

// ask is a unary call without the envelopes.
func ask[Req, Res any](ctx context.Context, method func(context.Context, *connect.Request[Req]) (*connect.Response[Res], error), req *Req) (*Res, error) {
	res, err := method(ctx, connect.NewRequest(req))
	if err != nil {
		return nil, err
	}
	return res.Msg, nil
}
