package main

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"fmt"
	"io"
	"log"
	"math/big"
	"net"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"connectrpc.com/connect"
	"golang.org/x/crypto/ssh"
	"google.golang.org/protobuf/types/known/timestamppb"

	m3ov1 "github.com/m3o/m3o/api/m3o/v1"
	"github.com/m3o/m3o/api/m3o/v1/m3ov1connect"
)

// A platform is a server that keeps the promises of m3o.proto in memory: it
// checks signatures, tokens, names and rights as the daemon does.
type platform struct {
	url string
	ca  authority

	// mu guards what follows.
	mu     sync.Mutex
	code   string
	nonces map[string]string // nonce to fingerprint
	tokens map[string]string // token to user
	users  map[string]bool   // user to admin
	keys   []*m3ov1.Key
	apps   []*hosted
	// reached tells a test that a followed stream is open.
	reached chan struct{}
}

type hosted struct {
	*m3ov1.App
	vars     []*m3ov1.Var
	revision int32
	releases []*m3ov1.Release // oldest first
	builds   []*m3ov1.Build
}

var now = time.Date(2026, 5, 4, 12, 0, 0, 0, time.UTC)

func stamp(ago time.Duration) *timestamppb.Timestamp { return timestamppb.New(now.Add(-ago)) }

func wrong(code connect.Code, hint, format string, args ...any) error {
	err := connect.NewError(code, fmt.Errorf(format, args...))
	if hint != "" {
		d, derr := connect.NewErrorDetail(&m3ov1.Hint{Text: hint})
		if derr != nil {
			panic(derr)
		}
		err.AddDetail(d)
	}
	return err
}

// user is who the call's token belongs to.
func (p *platform) user(h http.Header) (string, error) {
	u, ok := p.tokens[strings.TrimPrefix(h.Get("Authorization"), "Bearer ")]
	if !ok {
		return "", wrong(connect.CodeUnauthenticated, "", "the token is not known")
	}
	return u, nil
}

func (p *platform) app(h http.Header, name string) (*hosted, error) {
	if _, err := p.user(h); err != nil {
		return nil, err
	}
	i := slices.IndexFunc(p.apps, func(a *hosted) bool { return a.Name == name })
	if i < 0 {
		return nil, wrong(connect.CodeNotFound, "m3o apps", "no app called %s", name)
	}
	return p.apps[i], nil
}

// handle runs one unary call under the lock.
func handle[Req, Res any](p *platform, req *connect.Request[Req], f func(*Req) (*Res, error)) (*connect.Response[Res], error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	res, err := f(req.Msg)
	if err != nil {
		return nil, err
	}
	return connect.NewResponse(res), nil
}

type authService struct{ *platform }

func (s authService) Challenge(_ context.Context, req *connect.Request[m3ov1.ChallengeRequest]) (*connect.Response[m3ov1.ChallengeResponse], error) {
	return handle(s.platform, req, func(m *m3ov1.ChallengeRequest) (*m3ov1.ChallengeResponse, error) {
		nonce := make([]byte, 32)
		_, _ = rand.Read(nonce)
		s.nonces[string(nonce)] = m.GetFingerprint()
		return &m3ov1.ChallengeResponse{Nonce: nonce}, nil
	})
}

func (s authService) Login(_ context.Context, req *connect.Request[m3ov1.LoginRequest]) (*connect.Response[m3ov1.LoginResponse], error) {
	return handle(s.platform, req, func(m *m3ov1.LoginRequest) (*m3ov1.LoginResponse, error) {
		denied := wrong(connect.CodeUnauthenticated, "", "this key is not known")
		print, ok := s.nonces[string(m.GetNonce())]
		delete(s.nonces, string(m.GetNonce()))
		pub, err := ssh.ParsePublicKey(m.GetPublicKey())
		if !ok || err != nil || ssh.FingerprintSHA256(pub) != print {
			return nil, denied
		}
		data := "m3o-login-v1\x00api.localhost\x00" + string(m.GetNonce())
		if err := pub.Verify([]byte(data), &ssh.Signature{Format: m.GetSignatureFormat(), Blob: m.GetSignature()}); err != nil {
			return nil, denied
		}
		if pub.Type() == ssh.KeyAlgoRSA && m.GetSignatureFormat() != ssh.KeyAlgoRSASHA512 {
			return nil, denied
		}
		i := slices.IndexFunc(s.keys, func(k *m3ov1.Key) bool { return k.GetFingerprint() == print })
		if i < 0 {
			return nil, denied
		}
		token := fmt.Sprintf("token-%d", len(s.tokens)+1)
		s.tokens[token] = s.keys[i].GetUser()
		return &m3ov1.LoginResponse{Token: token, User: s.keys[i].GetUser(), Expires: timestamppb.New(now.Add(30 * 24 * time.Hour))}, nil
	})
}

func (s authService) Bootstrap(_ context.Context, req *connect.Request[m3ov1.BootstrapRequest]) (*connect.Response[m3ov1.BootstrapResponse], error) {
	return handle(s.platform, req, func(m *m3ov1.BootstrapRequest) (*m3ov1.BootstrapResponse, error) {
		if s.code == "" || m.GetCode() != s.code {
			return nil, wrong(connect.CodePermissionDenied, "the code is in the log of m3od's first start", "The code is wrong or used up.")
		}
		user := m.GetUser()
		if user == "" {
			user = "admin"
		}
		if _, err := s.addKey(m.GetPublicKey(), user); err != nil {
			return nil, err
		}
		s.code, s.users[user] = "", true
		return &m3ov1.BootstrapResponse{User: user}, nil
	})
}

func (s authService) Whoami(_ context.Context, req *connect.Request[m3ov1.WhoamiRequest]) (*connect.Response[m3ov1.WhoamiResponse], error) {
	return handle(s.platform, req, func(*m3ov1.WhoamiRequest) (*m3ov1.WhoamiResponse, error) {
		u, err := s.user(req.Header())
		return &m3ov1.WhoamiResponse{User: u, Admin: s.users[u]}, err
	})
}

func (s authService) Logout(_ context.Context, req *connect.Request[m3ov1.LogoutRequest]) (*connect.Response[m3ov1.LogoutResponse], error) {
	return handle(s.platform, req, func(*m3ov1.LogoutRequest) (*m3ov1.LogoutResponse, error) {
		_, err := s.user(req.Header())
		delete(s.tokens, strings.TrimPrefix(req.Header().Get("Authorization"), "Bearer "))
		return &m3ov1.LogoutResponse{}, err
	})
}

type keysService struct{ *platform }

func (p *platform) addKey(line, user string) (*m3ov1.Key, error) {
	pub, comment, _, _, err := ssh.ParseAuthorizedKey([]byte(line))
	if err != nil {
		return nil, wrong(connect.CodeInvalidArgument, "", "that is no public key")
	}
	k := &m3ov1.Key{Fingerprint: ssh.FingerprintSHA256(pub), Name: comment, Type: pub.Type(), User: user, Created: stamp(time.Hour)}
	p.keys = append(p.keys, k)
	return k, nil
}

func (s keysService) Add(_ context.Context, req *connect.Request[m3ov1.AddKeyRequest]) (*connect.Response[m3ov1.AddKeyResponse], error) {
	return handle(s.platform, req, func(m *m3ov1.AddKeyRequest) (*m3ov1.AddKeyResponse, error) {
		u, err := s.user(req.Header())
		if err != nil {
			return nil, err
		}
		if m.GetUser() != "" {
			u = m.GetUser()
		}
		k, err := s.addKey(m.GetPublicKey(), u)
		return &m3ov1.AddKeyResponse{Key: k}, err
	})
}

func (s keysService) List(_ context.Context, req *connect.Request[m3ov1.ListKeysRequest]) (*connect.Response[m3ov1.ListKeysResponse], error) {
	return handle(s.platform, req, func(*m3ov1.ListKeysRequest) (*m3ov1.ListKeysResponse, error) {
		_, err := s.user(req.Header())
		return &m3ov1.ListKeysResponse{Keys: s.keys}, err
	})
}

func (s keysService) Remove(_ context.Context, req *connect.Request[m3ov1.RemoveKeyRequest]) (*connect.Response[m3ov1.RemoveKeyResponse], error) {
	return handle(s.platform, req, func(m *m3ov1.RemoveKeyRequest) (*m3ov1.RemoveKeyResponse, error) {
		if _, err := s.user(req.Header()); err != nil {
			return nil, err
		}
		n := len(s.keys)
		s.keys = slices.DeleteFunc(s.keys, func(k *m3ov1.Key) bool { return k.GetFingerprint() == m.GetFingerprint() })
		if len(s.keys) == n {
			return nil, wrong(connect.CodeNotFound, "", "no such key")
		}
		return &m3ov1.RemoveKeyResponse{}, nil
	})
}

func (s keysService) CreateUser(_ context.Context, req *connect.Request[m3ov1.CreateUserRequest]) (*connect.Response[m3ov1.CreateUserResponse], error) {
	return handle(s.platform, req, func(m *m3ov1.CreateUserRequest) (*m3ov1.CreateUserResponse, error) {
		if _, err := s.user(req.Header()); err != nil {
			return nil, err
		}
		s.users[m.GetUser()] = m.GetAdmin()
		return &m3ov1.CreateUserResponse{}, nil
	})
}

type appsService struct{ *platform }

func (s appsService) Create(_ context.Context, req *connect.Request[m3ov1.CreateAppRequest]) (*connect.Response[m3ov1.CreateAppResponse], error) {
	return handle(s.platform, req, func(m *m3ov1.CreateAppRequest) (*m3ov1.CreateAppResponse, error) {
		u, err := s.user(req.Header())
		if err != nil {
			return nil, err
		}
		name := m.GetName()
		switch {
		case name == "":
			name = "calm-river"
		case strings.ContainsAny(name, "_ ."):
			return nil, wrong(connect.CodeInvalidArgument, "Use a-z, 0-9 and single hyphens.", "App name %q has the character '_'", name)
		}
		if _, err := s.app(req.Header(), name); err == nil {
			return nil, wrong(connect.CodeAlreadyExists, "m3o git:remote -a "+name, "there is an app called %s already", name)
		}
		return &m3ov1.CreateAppResponse{App: s.host(name, u, m.GetBranch()).App}, nil
	})
}

// host adds an app without a release.
func (p *platform) host(name, owner, branch string) *hosted {
	if branch == "" {
		branch = "main"
	}
	a := &hosted{App: &m3ov1.App{Name: name, Owner: owner, Branch: branch, Url: "https://" + name + ".localhost",
		GitUrl: "ssh://m3o@git.localhost:2222/" + name, Status: "no release", Created: stamp(48 * time.Hour)}}
	p.apps = append(p.apps, a)
	return a
}

func (s appsService) List(_ context.Context, req *connect.Request[m3ov1.ListAppsRequest]) (*connect.Response[m3ov1.ListAppsResponse], error) {
	return handle(s.platform, req, func(*m3ov1.ListAppsRequest) (*m3ov1.ListAppsResponse, error) {
		_, err := s.user(req.Header())
		res := &m3ov1.ListAppsResponse{}
		for _, a := range s.apps {
			res.Apps = append(res.Apps, a.App)
		}
		return res, err
	})
}

func (s appsService) Get(_ context.Context, req *connect.Request[m3ov1.GetAppRequest]) (*connect.Response[m3ov1.GetAppResponse], error) {
	return handle(s.platform, req, func(m *m3ov1.GetAppRequest) (*m3ov1.GetAppResponse, error) {
		a, err := s.app(req.Header(), m.GetApp())
		if err != nil {
			return nil, err
		}
		return &m3ov1.GetAppResponse{App: a.App}, nil
	})
}

func (s appsService) Destroy(_ context.Context, req *connect.Request[m3ov1.DestroyAppRequest]) (*connect.Response[m3ov1.DestroyAppResponse], error) {
	return handle(s.platform, req, func(m *m3ov1.DestroyAppRequest) (*m3ov1.DestroyAppResponse, error) {
		if _, err := s.app(req.Header(), m.GetApp()); err != nil {
			return nil, err
		}
		if m.GetConfirm() != m.GetApp() {
			return nil, wrong(connect.CodeInvalidArgument, "", "confirm must repeat the name")
		}
		s.apps = slices.DeleteFunc(s.apps, func(a *hosted) bool { return a.Name == m.GetApp() })
		return &m3ov1.DestroyAppResponse{}, nil
	})
}

type releasesService struct{ *platform }

// release makes a release live.
func (a *hosted) release(reason, commit, message string) *m3ov1.Release {
	for _, r := range a.releases {
		r.Status = "kept"
	}
	r := &m3ov1.Release{Version: int32(len(a.releases) + 1), Status: "live", Commit: commit, Message: message, Reason: reason,
		User: "ada", Created: stamp(2 * time.Minute), Config: a.revision}
	a.releases = append(a.releases, r)
	a.Status, a.Release, a.Instances, a.Commit, a.Released = "running", fmt.Sprintf("v%d", r.Version), 2, commit, r.Created
	return r
}

func (s releasesService) List(_ context.Context, req *connect.Request[m3ov1.ListReleasesRequest]) (*connect.Response[m3ov1.ListReleasesResponse], error) {
	return handle(s.platform, req, func(m *m3ov1.ListReleasesRequest) (*m3ov1.ListReleasesResponse, error) {
		a, err := s.app(req.Header(), m.GetApp())
		if err != nil {
			return nil, err
		}
		rs := slices.Clone(a.releases)
		slices.Reverse(rs)
		if n := int(m.GetLimit()); n > 0 && n < len(rs) {
			rs = rs[:n]
		}
		return &m3ov1.ListReleasesResponse{Releases: rs}, nil
	})
}

func (s releasesService) Rollback(_ context.Context, req *connect.Request[m3ov1.RollbackRequest]) (*connect.Response[m3ov1.RollbackResponse], error) {
	return handle(s.platform, req, func(m *m3ov1.RollbackRequest) (*m3ov1.RollbackResponse, error) {
		a, err := s.app(req.Header(), m.GetApp())
		if err != nil {
			return nil, err
		}
		live, v := len(a.releases), int(m.GetVersion())
		if v == 0 {
			v = live - 1
		}
		if v < 1 || v > live {
			return nil, wrong(connect.CodeNotFound, "m3o releases -a "+a.Name, "%s has no release v%d", a.Name, v)
		}
		old := a.releases[v-1]
		r := a.release(fmt.Sprintf("rollback to v%d", v), old.GetCommit(), old.GetMessage())
		return &m3ov1.RollbackResponse{Release: r, From: int32(live), Millis: 240}, nil
	})
}

type buildsService struct{ *platform }

func (s buildsService) List(_ context.Context, req *connect.Request[m3ov1.ListBuildsRequest]) (*connect.Response[m3ov1.ListBuildsResponse], error) {
	return handle(s.platform, req, func(m *m3ov1.ListBuildsRequest) (*m3ov1.ListBuildsResponse, error) {
		a, err := s.app(req.Header(), m.GetApp())
		if err != nil {
			return nil, err
		}
		return &m3ov1.ListBuildsResponse{Builds: a.builds}, nil
	})
}

func (s buildsService) Output(ctx context.Context, req *connect.Request[m3ov1.BuildOutputRequest], stream *connect.ServerStream[m3ov1.BuildOutputResponse]) error {
	s.mu.Lock()
	_, err := s.app(req.Header(), req.Msg.GetApp())
	s.mu.Unlock()
	if err != nil {
		return err
	}
	if req.Msg.GetNumber() > 2 {
		return wrong(connect.CodeNotFound, "m3o builds", "no build %d", req.Msg.GetNumber())
	}
	for _, part := range []string{"-----> Bui", "lding\n       go build\x1b]0;title\x07\n", "done"} {
		if err := stream.Send(&m3ov1.BuildOutputResponse{Data: []byte(part)}); err != nil {
			return err
		}
	}
	if req.Msg.GetFollow() && req.Msg.GetNumber() == 0 {
		s.reached <- struct{}{}
		<-ctx.Done()
	}
	return nil
}

type configService struct{ *platform }

func (s configService) List(_ context.Context, req *connect.Request[m3ov1.ListConfigRequest]) (*connect.Response[m3ov1.ListConfigResponse], error) {
	return handle(s.platform, req, func(m *m3ov1.ListConfigRequest) (*m3ov1.ListConfigResponse, error) {
		a, err := s.app(req.Header(), m.GetApp())
		if err != nil {
			return nil, err
		}
		res := &m3ov1.ListConfigResponse{Revision: a.revision}
		for _, v := range a.vars {
			shown := &m3ov1.Var{Name: v.GetName(), Value: v.GetValue(), Secret: v.GetSecret()}
			if v.GetSecret() {
				shown.Value = ""
			}
			res.Vars = append(res.Vars, shown)
		}
		return res, nil
	})
}

func (a *hosted) changed(reason string, noRestart bool) (revision, release int32) {
	a.revision++
	if noRestart || len(a.releases) == 0 {
		return a.revision, 0
	}
	return a.revision, a.release(reason, a.Commit, "").GetVersion()
}

func (s configService) Set(_ context.Context, req *connect.Request[m3ov1.SetConfigRequest]) (*connect.Response[m3ov1.SetConfigResponse], error) {
	return handle(s.platform, req, func(m *m3ov1.SetConfigRequest) (*m3ov1.SetConfigResponse, error) {
		a, err := s.app(req.Header(), m.GetApp())
		if err != nil {
			return nil, err
		}
		for _, v := range m.GetVars() {
			a.vars = slices.DeleteFunc(a.vars, func(o *m3ov1.Var) bool { return o.GetName() == v.GetName() })
			a.vars = append(a.vars, v)
		}
		rev, rel := a.changed("config set", m.GetNoRestart())
		return &m3ov1.SetConfigResponse{Revision: rev, Release: rel}, nil
	})
}

func (s configService) Unset(_ context.Context, req *connect.Request[m3ov1.UnsetConfigRequest]) (*connect.Response[m3ov1.UnsetConfigResponse], error) {
	return handle(s.platform, req, func(m *m3ov1.UnsetConfigRequest) (*m3ov1.UnsetConfigResponse, error) {
		a, err := s.app(req.Header(), m.GetApp())
		if err != nil {
			return nil, err
		}
		a.vars = slices.DeleteFunc(a.vars, func(o *m3ov1.Var) bool { return slices.Contains(m.GetNames(), o.GetName()) })
		rev, rel := a.changed("config unset", m.GetNoRestart())
		return &m3ov1.UnsetConfigResponse{Revision: rev, Release: rel}, nil
	})
}

type processesService struct{ *platform }

func (s processesService) List(_ context.Context, req *connect.Request[m3ov1.ListInstancesRequest]) (*connect.Response[m3ov1.ListInstancesResponse], error) {
	return handle(s.platform, req, func(m *m3ov1.ListInstancesRequest) (*m3ov1.ListInstancesResponse, error) {
		a, err := s.app(req.Header(), m.GetApp())
		if err != nil || len(a.releases) == 0 {
			return &m3ov1.ListInstancesResponse{}, err
		}
		return &m3ov1.ListInstancesResponse{Instances: []*m3ov1.Instance{
			{Id: "hello-web-1", Process: "web", Release: a.Release, Phase: "ready", Since: stamp(2 * time.Minute), Cpu: 13, MemoryBytes: 40 << 20, MemoryLimit: 512 << 20, Address: "198.18.0.2:8080"},
			{Id: "hello-web-2", Process: "web", Release: a.Release, Phase: "crashing", Exit: 3, Restarts: 4, Since: stamp(3 * time.Hour),
				Why: "exited with code 3, 4 times in a row", LastLines: []string{"panic: no database"}},
		}}, nil
	})
}

func (s processesService) Logs(ctx context.Context, req *connect.Request[m3ov1.LogsRequest], stream *connect.ServerStream[m3ov1.LogsResponse]) error {
	s.mu.Lock()
	_, err := s.app(req.Header(), req.Msg.GetApp())
	s.mu.Unlock()
	if err != nil {
		return err
	}
	lines := []*m3ov1.LogsResponse{
		{Time: stamp(time.Minute), Source: "m3o", Text: "released v1"},
		{Time: stamp(30 * time.Second), Source: "app", Process: "web", Instance: "hello-web-1", Stream: "stdout", Text: "serving \x1b[31mred\x1b[0m"},
		{Time: stamp(20 * time.Second), Source: "app", Process: "worker", Instance: "hello-worker-1", Stream: "stderr", Text: "bad \x1b]0;owned\x07\x1b[2Jthing"},
	}
	if n := int(req.Msg.GetLines()); n > 0 && n < len(lines) {
		lines = lines[len(lines)-n:]
	}
	for _, l := range lines {
		if p := req.Msg.GetProcess(); p != "" && l.GetProcess() != p {
			continue
		}
		if err := stream.Send(l); err != nil {
			return err
		}
	}
	if req.Msg.GetFollow() {
		s.reached <- struct{}{}
		<-ctx.Done()
	}
	return nil
}

type serverService struct{ *platform }

func (s serverService) Info(context.Context, *connect.Request[m3ov1.InfoRequest]) (*connect.Response[m3ov1.InfoResponse], error) {
	return connect.NewResponse(&m3ov1.InfoResponse{Version: "v0.1.0", Domain: "localhost", GitHost: "git.localhost:2222", Ca: s.ca.pem()}), nil
}

// An authority is a CA as m3od makes it: for localhost only.
type authority struct {
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
}

func newAuthority(t testing.TB, limited bool) authority {
	t.Helper()
	k, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	tpl := &x509.Certificate{SerialNumber: big.NewInt(time.Now().UnixNano()), Subject: pkix.Name{CommonName: "m3o CA"}, IsCA: true, BasicConstraintsValid: true,
		KeyUsage: x509.KeyUsageCertSign, NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour)}
	if limited {
		tpl.PermittedDNSDomains, tpl.PermittedDNSDomainsCritical = []string{"localhost"}, true
	}
	der, err := x509.CreateCertificate(rand.Reader, tpl, tpl, &k.PublicKey, k)
	if err != nil {
		t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return authority{cert, k}
}

func (a authority) pem() string {
	if a.cert == nil {
		return ""
	}
	return string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: a.cert.Raw}))
}

func (a authority) leaf(t testing.TB, name string, notAfter time.Time) tls.Certificate {
	t.Helper()
	k, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	tpl := &x509.Certificate{SerialNumber: big.NewInt(2), DNSNames: []string{name}, NotBefore: time.Now().Add(-2 * time.Hour), NotAfter: notAfter,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}}
	der, err := x509.CreateCertificate(rand.Reader, tpl, a.cert, &k.PublicKey, a.key)
	if err != nil {
		t.Fatal(err)
	}
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: k}
}

// serveTLS serves h at https://api.localhost:port with a certificate of the
// authority and returns the URL.
func serveTLS(t testing.TB, h http.Handler, cert tls.Certificate) string {
	t.Helper()
	srv := httptest.NewUnstartedServer(h)
	srv.EnableHTTP2 = true
	srv.TLS = &tls.Config{Certificates: []tls.Certificate{cert}}
	srv.Config.ErrorLog = log.New(io.Discard, "", 0) // handshakes fail on purpose
	srv.StartTLS()
	t.Cleanup(srv.Close)
	_, port, err := net.SplitHostPort(srv.Listener.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	return "https://api.localhost:" + port
}

func (p *platform) handler() http.Handler {
	mux := http.NewServeMux()
	mux.Handle(m3ov1connect.NewAuthHandler(authService{p}))
	mux.Handle(m3ov1connect.NewKeysHandler(keysService{p}))
	mux.Handle(m3ov1connect.NewAppsHandler(appsService{p}))
	mux.Handle(m3ov1connect.NewReleasesHandler(releasesService{p}))
	mux.Handle(m3ov1connect.NewBuildsHandler(buildsService{p}))
	mux.Handle(m3ov1connect.NewConfigHandler(configService{p}))
	mux.Handle(m3ov1connect.NewProcessesHandler(processesService{p}))
	mux.Handle(m3ov1connect.NewServerHandler(serverService{p}))
	return mux
}

func newPlatform(t testing.TB) *platform {
	t.Helper()
	p := &platform{ca: newAuthority(t, true), code: "first-start", nonces: map[string]string{}, tokens: map[string]string{},
		users: map[string]bool{}, reached: make(chan struct{}, 1)}
	p.url = serveTLS(t, p.handler(), p.ca.leaf(t, "api.localhost", time.Now().Add(time.Hour)))
	return p
}

// hello adds an app with two releases and a build.
func (p *platform) hello() *hosted {
	p.mu.Lock()
	defer p.mu.Unlock()
	a := p.host("hello", "ada", "")
	a.vars, a.revision = []*m3ov1.Var{{Name: "GREETING", Value: "Hello"}, {Name: "API_KEY", Value: "s3cret", Secret: true}}, 1
	a.release("git push", "1111111111111111111111111111111111111111", "first")
	a.release("git push", "2222222222222222222222222222222222222222", "second\x1b[2J\nline")
	a.builds = []*m3ov1.Build{{Number: 2, Status: "succeeded", Commit: a.Commit, User: "ada", Message: "second", Started: stamp(3 * time.Minute), Finished: stamp(3*time.Minute - 2100*time.Millisecond)},
		{Number: 1, Status: "failed", Error: "main.go:7: undefined: greet", User: "ada", Started: stamp(5 * time.Minute), Finished: stamp(5*time.Minute - 300*time.Millisecond)}}
	return a
}
