package build

import (
	"crypto/rand"
	"crypto/tls"
	"encoding/json"
	"io"
	"log"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/m3o/m3o"
	"github.com/m3o/m3o/buildpacks"
	"github.com/opencontainers/go-digest"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"
)

// A registry serves one image to who knows the password, by the read half of
// the OCI distribution protocol.
type registry struct {
	scheme   string // how it asks for the password
	password string
	manifest digest.Digest
	blobs    map[digest.Digest][]byte

	mu     sync.Mutex // guards tokens
	tokens []string
}

// How registries ask: by themselves, or by a token service that takes the
// password as Docker Hub's does, or as OAuth 2 has it.
const (
	basic  = "Basic"
	bearer = "Bearer"
	oauth  = "Bearer by OAuth"
)

func (r *registry) put(b []byte) (digest.Digest, int64) {
	d := digest.FromBytes(b)
	r.blobs[d] = b
	return d, int64(len(b))
}

func newRegistry(t *testing.T, scheme, password string, layer []byte) *registry {
	t.Helper()
	r := &registry{scheme: scheme, password: password, blobs: map[digest.Digest][]byte{}}
	must := func(v any) []byte {
		t.Helper()
		b, err := json.Marshal(v)
		if err != nil {
			t.Fatal(err)
		}
		return b
	}
	l, lsize := r.put(layer)
	c, csize := r.put(must(v1.Image{Platform: platform(), Config: v1.ImageConfig{Cmd: []string{"/server"}, ExposedPorts: map[string]struct{}{"9090/tcp": {}}},
		RootFS: v1.RootFS{Type: "layers", DiffIDs: []digest.Digest{l}}}))
	m := v1.Manifest{MediaType: v1.MediaTypeImageManifest, Config: v1.Descriptor{MediaType: v1.MediaTypeImageConfig, Digest: c, Size: csize},
		Layers: []v1.Descriptor{{MediaType: v1.MediaTypeImageLayer, Digest: l, Size: lsize}}}
	m.SchemaVersion = 2
	r.manifest, _ = r.put(must(m))
	return r
}

// refuses answers a request that may not read.
func (r *registry) refuses(w http.ResponseWriter, req *http.Request) bool {
	challenge := `Basic realm="registry"`
	if r.scheme == basic {
		if _, p, _ := req.BasicAuth(); p == r.password {
			return false
		}
	} else {
		challenge = `Bearer realm="https://` + req.Host + `/token",service="registry of the test",scope="repository:team/app:pull"`
		r.mu.Lock()
		known := slices.Contains(r.tokens, strings.TrimPrefix(req.Header.Get("Authorization"), "Bearer "))
		r.mu.Unlock()
		if known {
			return false
		}
	}
	w.Header().Set("WWW-Authenticate", challenge)
	http.Error(w, `{"errors":[{"code":"UNAUTHORIZED"}]}`, http.StatusUnauthorized)
	return true
}

// token is the token service: it gives a token for the repository alone.
func (r *registry) token(w http.ResponseWriter, req *http.Request) {
	user, password, _ := req.BasicAuth()
	if r.scheme == oauth {
		if req.Method != http.MethodPost && password != "" {
			http.Error(w, "", http.StatusMethodNotAllowed)
			return
		}
		user, password = req.FormValue("username"), req.FormValue("password")
	}
	if user != "ci" || password != r.password || req.FormValue("service") != "registry of the test" || req.FormValue("scope") != "repository:team/app:pull" {
		http.Error(w, `{"errors":[{"code":"UNAUTHORIZED"}]}`, http.StatusUnauthorized)
		return
	}
	t := rand.Text()
	r.mu.Lock()
	r.tokens = append(r.tokens, t)
	r.mu.Unlock()
	_ = json.NewEncoder(w).Encode(map[string]any{"token": t, "access_token": t, "expires_in": 300})
}

func (r *registry) ServeHTTP(w http.ResponseWriter, req *http.Request) {
	if req.URL.Path == "/token" {
		r.token(w, req)
		return
	}
	if r.refuses(w, req) {
		return
	}
	_, ref, ok := strings.Cut(req.URL.Path, "/v2/team/app/")
	kind, id, _ := strings.Cut(ref, "/")
	if kind == "manifests" && id == "1.2" {
		id = r.manifest.String()
	}
	b, there := r.blobs[digest.Digest(id)]
	switch {
	case req.URL.Path == "/v2/":
	case !ok || !there:
		http.NotFound(w, req)
	default:
		if kind == "manifests" {
			w.Header().Set("Content-Type", v1.MediaTypeImageManifest)
		}
		w.Header().Set("Docker-Content-Digest", id)
		_, _ = w.Write(b)
	}
}

// A builder that trusts the registry's certificate, as a host does that has it.
func TestImageOfAPrivateRegistry(t *testing.T) {
	for _, scheme := range []string{basic, bearer, oauth} {
		t.Run(scheme, func(t *testing.T) { imageOfAPrivateRegistry(t, scheme) })
	}
}

func imageOfAPrivateRegistry(t *testing.T, scheme string) {
	const password = "p4ssw0rd-of-the-registry"
	cert, ca := serverCert(t)
	certs := t.TempDir()
	if err := os.WriteFile(filepath.Join(certs, "ca.pem"), []byte(ca), 0o600); err != nil {
		t.Fatal(err)
	}
	t.Setenv("SSL_CERT_DIR", certs)
	dir, err := os.MkdirTemp("", "m3o-registry-")
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(dir)
	b, stop, err := start(t.Context(), testConfig(t, dir))
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := stop(); err != nil {
			t.Error(err)
		}
	}()
	file := filepath.Join(t.TempDir(), "layer.tar")
	if out, err := exec.Command("tar", "-cf", file, "-C", certs, "ca.pem").CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	layer, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	l := newWorld(t, worldAddr)
	_, port, _ := net.SplitHostPort(l.Addr().String())
	host := net.JoinHostPort(worldAddr, port)
	images := newRegistry(t, scheme, password, layer)
	srv := &http.Server{Handler: images, ErrorLog: log.New(io.Discard, "", 0)}
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		_ = srv.Serve(tls.NewListener(l, &tls.Config{Certificates: []tls.Certificate{cert}}))
	}()
	defer func() { _ = srv.Close(); <-ended }()

	take := func(config string) (Result, string, error) {
		tree, plan, err := FromImage(host + "/team/app:1.2")
		if err != nil {
			t.Fatal(err)
		}
		var out strings.Builder
		res, err := b.Build(t.Context(), Request{App: "app", Plan: plan, Tree: tree, Out: &out, NoCache: true, Registries: m3o.Secret(config)})
		return res, out.String(), err
	}
	for _, config := range []string{"", `{"auths":{"` + host + `":{"username":"ci","password":"wrong"}}}`} {
		if _, out, err := take(config); err == nil || !strings.Contains(m3o.HintOf(err), RegistryVar) {
			t.Errorf("with %q: %v (hint %q)\n%s", config, err, m3o.HintOf(err), out)
		}
	}
	res, out, err := take(`{"auths":{"https://` + host + `/v1/":{"auth":"Y2k6cDRzc3cwcmQtb2YtdGhlLXJlZ2lzdHJ5"}}}`)
	ok(t, out, err)
	into := t.TempDir()
	untar(t, b, res.Image, into)
	if got, err := os.ReadFile(filepath.Join(into, "ca.pem")); err != nil || string(got) != ca || res.Port != 9090 {
		t.Errorf("port %d, %d bytes of the image's file, %v", res.Port, len(got), err)
	}
	// The same image below a FROM line.
	based := repo(t, map[string]string{"Dockerfile": "FROM " + host + "/team/app:1.2\nCOPY more /more\n", "more": "more"})
	res, out, err = build(t.Context(), t, b, based, func(r *Request) {
		r.Plan = &buildpacks.Plan{Builder: "dockerfile", Dir: ".", Docker: buildpacks.Docker{File: "Dockerfile"}}
		r.NoCache, r.Registries = true, m3o.Secret(`{"auths":{"`+host+`":{"username":"ci","password":"`+password+`"}}}`)
	})
	ok(t, out, err)
	into = t.TempDir()
	untar(t, b, res.Image, into)
	if got, err := os.ReadFile(filepath.Join(into, "more")); err != nil || string(got) != "more" {
		t.Errorf("the file of the Dockerfile: %q, %v", got, err)
	}
	images.mu.Lock()
	defer images.mu.Unlock()
	if (len(images.tokens) > 0) != (scheme != basic) {
		t.Errorf("%d tokens were given", len(images.tokens))
	}
	for _, where := range []string{b.dir("buildkit"), b.Images()} {
		for _, secret := range append([]string{password, "Y2k6cDRzc3cwcmQtb2YtdGhlLXJlZ2lzdHJ5"}, images.tokens...) {
			if found, err := exec.Command("grep", "-rlF", "--binary-files=text", secret, where).Output(); err == nil {
				t.Errorf("the password is in %s", found)
			}
		}
	}
}

func TestRegistriesOfDockersFile(t *testing.T) {
	r, err := parseRegistries(`{"auths":{"https://index.docker.io/v1/":{"auth":"dTpwOnE="},"r.example.com:5000":{"username":"a","password":"b"}},"credsStore":"x"}`)
	if err != nil || r.logins["docker.io"] != (login{"u", "p:q"}) || r.logins["r.example.com:5000"] != (login{"a", "b"}) || registryHost("registry-1.docker.io") != "docker.io" {
		t.Errorf("%+v, %v", r, err)
	}
	for _, bad := range []m3o.Secret{"s3cret", `{"auths":"s3cret"}`, `{"auths":{"x":{"auth":"s3cret"}}}`, `{"auths":{"x":{}}}`} {
		if _, err := parseRegistries(bad); m3o.KindOf(err) != m3o.Invalid || strings.Contains(err.Error(), "s3cret") {
			t.Errorf("%s: %v", bad.Reveal(), err)
		}
	}
}

func FuzzRegistries(f *testing.F) {
	f.Add(`{"auths":{"https://index.docker.io/v1/":{"auth":"dTpwOnE="}}}`)
	f.Add(`{"auths":{"":{"username":"a","password":"b"}}}`)
	f.Fuzz(func(t *testing.T, s string) {
		r, err := parseRegistries(m3o.Secret(s))
		if (r == nil) != (err != nil) {
			t.Errorf("%q: %v, %v", s, r, err)
		}
	})
}
