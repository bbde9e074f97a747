package daemon

import (
	"context"

	"connectrpc.com/connect"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/m3o/m3o"
	m3ov1 "github.com/m3o/m3o/api/m3o/v1"
	"github.com/m3o/m3o/auth"
)

type authAPI struct{ d *Daemon }

func (a authAPI) Challenge(ctx context.Context, req *connect.Request[m3ov1.ChallengeRequest]) (*connect.Response[m3ov1.ChallengeResponse], error) {
	nonce, err := a.d.auth.Challenge(ctx, req.Msg.Fingerprint)
	if err != nil {
		return nil, err
	}
	return connect.NewResponse(&m3ov1.ChallengeResponse{Nonce: nonce}), nil
}

func (a authAPI) Login(ctx context.Context, req *connect.Request[m3ov1.LoginRequest]) (*connect.Response[m3ov1.LoginResponse], error) {
	m := req.Msg
	token, user, expires, err := a.d.auth.Login(ctx, "api."+a.d.cfg.Domain, m.Nonce, m.PublicKey, m.SignatureFormat, m.Signature)
	if err != nil {
		return nil, err
	}
	return connect.NewResponse(&m3ov1.LoginResponse{Token: token.Reveal(), User: user, Expires: timestamppb.New(expires)}), nil
}

func (a authAPI) Bootstrap(ctx context.Context, req *connect.Request[m3ov1.BootstrapRequest]) (*connect.Response[m3ov1.BootstrapResponse], error) {
	name := req.Msg.User
	if name == "" {
		name = "admin"
	}
	u, err := a.d.auth.Bootstrap(ctx, m3o.Secret(req.Msg.Code), name, req.Msg.PublicKey)
	if err != nil {
		return nil, err
	}
	return connect.NewResponse(&m3ov1.BootstrapResponse{User: u.Name}), nil
}

func (a authAPI) Whoami(ctx context.Context, _ *connect.Request[m3ov1.WhoamiRequest]) (*connect.Response[m3ov1.WhoamiResponse], error) {
	w := who(ctx)
	return connect.NewResponse(&m3ov1.WhoamiResponse{User: w.User, Admin: w.Admin}), nil
}

func (a authAPI) Logout(ctx context.Context, _ *connect.Request[m3ov1.LogoutRequest]) (*connect.Response[m3ov1.LogoutResponse], error) {
	token, _ := ctx.Value(tokenKey{}).(m3o.Secret)
	if err := a.d.auth.RevokeToken(ctx, token); err != nil {
		return nil, err
	}
	return connect.NewResponse(&m3ov1.LogoutResponse{}), nil
}

type keysAPI struct{ d *Daemon }

func wireKey(k auth.Key) *m3ov1.Key {
	out := &m3ov1.Key{Fingerprint: k.Fingerprint, Name: k.Name, Type: k.Type, User: k.User, Created: timestamppb.New(k.Created)}
	if !k.LastUsed.IsZero() {
		out.LastUsed = timestamppb.New(k.LastUsed)
	}
	return out
}

func (a keysAPI) Add(ctx context.Context, req *connect.Request[m3ov1.AddKeyRequest]) (*connect.Response[m3ov1.AddKeyResponse], error) {
	user := req.Msg.User
	if user == "" {
		user = who(ctx).User
	}
	k, err := a.d.auth.AddKey(ctx, user, req.Msg.PublicKey)
	if err != nil {
		return nil, err
	}
	return connect.NewResponse(&m3ov1.AddKeyResponse{Key: wireKey(k)}), nil
}

func (a keysAPI) List(ctx context.Context, req *connect.Request[m3ov1.ListKeysRequest]) (*connect.Response[m3ov1.ListKeysResponse], error) {
	user := req.Msg.User
	if user == "" {
		user = who(ctx).User
	}
	ks, err := a.d.auth.Keys(ctx, user)
	if err != nil {
		return nil, err
	}
	res := &m3ov1.ListKeysResponse{}
	for _, k := range ks {
		res.Keys = append(res.Keys, wireKey(k))
	}
	return connect.NewResponse(res), nil
}

// Remove asks for the permission itself: it is about the key's owner, whom
// the request does not name.
func (a keysAPI) Remove(ctx context.Context, req *connect.Request[m3ov1.RemoveKeyRequest]) (*connect.Response[m3ov1.RemoveKeyResponse], error) {
	k, err := a.d.auth.Key(ctx, req.Msg.Fingerprint)
	if err != nil {
		return nil, err
	}
	if err := a.d.auth.Allow(ctx, who(ctx), auth.KeysWrite, k.User); err != nil {
		return nil, err
	}
	if err := a.d.auth.RemoveKey(ctx, k.Fingerprint); err != nil {
		return nil, err
	}
	return connect.NewResponse(&m3ov1.RemoveKeyResponse{}), nil
}

func (a keysAPI) CreateUser(ctx context.Context, req *connect.Request[m3ov1.CreateUserRequest]) (*connect.Response[m3ov1.CreateUserResponse], error) {
	if _, err := a.d.auth.CreateUser(ctx, req.Msg.User, req.Msg.Admin); err != nil {
		return nil, err
	}
	return connect.NewResponse(&m3ov1.CreateUserResponse{}), nil
}

type serverAPI struct{ d *Daemon }

func (a serverAPI) Info(context.Context, *connect.Request[m3ov1.InfoRequest]) (*connect.Response[m3ov1.InfoResponse], error) {
	return connect.NewResponse(&m3ov1.InfoResponse{Version: a.d.version, Domain: a.d.cfg.Domain, GitHost: a.d.gitAddr(),
		HttpsPort: int32(a.d.httpsPortNumber()), Ca: string(a.d.caPEM)}), nil
}
