package build

import (
	"context"
	"encoding/base64"
	"encoding/json"
	"strings"

	"github.com/m3o/m3o"
	"github.com/moby/buildkit/session/auth"
	"google.golang.org/grpc"
)

// A registryAuth hands BuildKit the passwords of registries, of one build and
// for as long as that runs.
type registryAuth struct {
	auth.UnimplementedAuthServer
	logins map[string]login // by host
}

type login struct{ user, password string }

// Register makes registryAuth a session.Attachable.
func (r *registryAuth) Register(s *grpc.Server) { auth.RegisterAuthServer(s, r) }

// Credentials answers with nothing for a registry nobody named: it may be public.
func (r *registryAuth) Credentials(_ context.Context, req *auth.CredentialsRequest) (*auth.CredentialsResponse, error) {
	l := r.logins[registryHost(req.Host)]
	return &auth.CredentialsResponse{Username: l.user, Secret: l.password}, nil
}

// registryHost is one name for a registry: the keys of Docker's file may be
// URLs, and Docker Hub has three.
func registryHost(s string) string {
	_, rest, ok := strings.Cut(s, "://")
	if ok {
		s = rest
	}
	s, _, _ = strings.Cut(s, "/")
	switch s {
	case "index.docker.io", "registry-1.docker.io":
		return "docker.io"
	}
	return s
}

// parseRegistries reads Docker's config.json, as docker login writes it.
func parseRegistries(s m3o.Secret) (*registryAuth, error) {
	r := &registryAuth{logins: map[string]login{}}
	if s.Reveal() == "" {
		return r, nil
	}
	bad := func(what string) error {
		return &m3o.Error{Kind: m3o.Invalid, Msg: "config var " + RegistryVar + " is not Docker's config.json: " + what,
			Hint: `set it to {"auths": {"registry.example.com": {"username": "…", "password": "…"}}}`}
	}
	var file struct {
		Auths map[string]struct{ Auth, Username, Password string }
	}
	if json.Unmarshal([]byte(s.Reveal()), &file) != nil { // its error quotes the text
		return nil, bad("it is not JSON of that form")
	}
	for host, a := range file.Auths {
		l := login{a.Username, a.Password}
		if a.Auth != "" {
			b, err := base64.StdEncoding.DecodeString(a.Auth)
			user, password, ok := strings.Cut(string(b), ":")
			if err != nil || !ok {
				return nil, bad("auth of " + plain(host) + " is not USER:PASSWORD in base64")
			}
			l = login{user, password}
		}
		if l.user == "" || l.password == "" {
			return nil, bad(plain(host) + " has no user and password; those of a credential helper are not in the file")
		}
		r.logins[registryHost(host)] = l
	}
	return r, nil
}

// RegistryVar is the config var with the passwords of registries.
const RegistryVar = "DOCKER_AUTH_CONFIG"
