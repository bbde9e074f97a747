package daemon

import (
	"context"
	"time"

	"connectrpc.com/connect"

	m3ov1 "github.com/m3o/m3o/api/m3o/v1"
	"github.com/m3o/m3o/router"
)

type accessAPI struct{ d *Daemon }

func limitFrom(l *m3ov1.Limit) router.RateLimit {
	return router.RateLimit{Per: l.GetPer(), Path: l.GetPath(), Requests: l.GetRequests(), Seconds: l.GetSeconds(), Quota: l.GetQuota()}
}

func limitsFrom(ls []*m3ov1.Limit) []router.RateLimit {
	var out []router.RateLimit
	for _, l := range ls {
		out = append(out, limitFrom(l))
	}
	return out
}

func limitsTo(ls []router.RateLimit) []*m3ov1.Limit {
	var out []*m3ov1.Limit
	for _, l := range ls {
		out = append(out, &m3ov1.Limit{Per: l.Per, Path: l.Path, Requests: l.Requests, Seconds: l.Seconds, Quota: l.Quota})
	}
	return out
}

func keyTo(k apiKey) *m3ov1.APIKey {
	out := &m3ov1.APIKey{Id: k.ID, Name: k.Name, Account: k.Account, Scopes: k.Scopes, Limits: limitsTo(k.Limits), User: k.User, Created: stamp(k.Created)}
	if k.Expires != 0 {
		out.Expires = stamp(time.Unix(k.Expires, 0))
	}
	return out
}

func (a accessAPI) Get(_ context.Context, req *connect.Request[m3ov1.GetAccessRequest]) (*connect.Response[m3ov1.GetAccessResponse], error) {
	app := req.Msg.GetApp()
	x := a.d.access.get(app)
	res := &m3ov1.GetAccessResponse{Private: a.d.access.isPrivate(app), Inherited: x.Private == nil, Limits: limitsTo(x.Limits)}
	for _, r := range x.Rules {
		res.Rules = append(res.Rules, &m3ov1.AccessRule{Path: r.Path, Access: r.Access})
	}
	for _, k := range x.Keys {
		res.Keys = append(res.Keys, keyTo(k))
	}
	return connect.NewResponse(res), nil
}

func (a accessAPI) SetPrivate(ctx context.Context, req *connect.Request[m3ov1.SetPrivateRequest]) (*connect.Response[m3ov1.SetPrivateResponse], error) {
	return connect.NewResponse(&m3ov1.SetPrivateResponse{}), a.d.access.setPrivate(ctx, req.Msg.GetApp(), req.Msg.GetPrivate())
}

func (a accessAPI) SetRule(ctx context.Context, req *connect.Request[m3ov1.SetAccessRuleRequest]) (*connect.Response[m3ov1.SetAccessRuleResponse], error) {
	r := router.AccessRule{Path: req.Msg.GetRule().GetPath(), Access: req.Msg.GetRule().GetAccess()}
	return connect.NewResponse(&m3ov1.SetAccessRuleResponse{}), a.d.access.setRule(ctx, req.Msg.GetApp(), r)
}

func (a accessAPI) RemoveRule(ctx context.Context, req *connect.Request[m3ov1.RemoveAccessRuleRequest]) (*connect.Response[m3ov1.RemoveAccessRuleResponse], error) {
	return connect.NewResponse(&m3ov1.RemoveAccessRuleResponse{}), a.d.access.removeRule(ctx, req.Msg.GetApp(), req.Msg.GetPath())
}

func (a accessAPI) SetLimit(ctx context.Context, req *connect.Request[m3ov1.SetLimitRequest]) (*connect.Response[m3ov1.SetLimitResponse], error) {
	return connect.NewResponse(&m3ov1.SetLimitResponse{}), a.d.access.setLimit(ctx, req.Msg.GetApp(), limitFrom(req.Msg.GetLimit()))
}

func (a accessAPI) RemoveLimit(ctx context.Context, req *connect.Request[m3ov1.RemoveLimitRequest]) (*connect.Response[m3ov1.RemoveLimitResponse], error) {
	return connect.NewResponse(&m3ov1.RemoveLimitResponse{}), a.d.access.removeLimit(ctx, req.Msg.GetApp(), req.Msg.GetPer(), req.Msg.GetPath())
}

func (a accessAPI) CreateKey(ctx context.Context, req *connect.Request[m3ov1.CreateAPIKeyRequest]) (*connect.Response[m3ov1.CreateAPIKeyResponse], error) {
	m := req.Msg
	k := apiKey{Name: m.GetName(), User: who(ctx).User, APIKey: router.APIKey{Account: m.GetAccount(), Scopes: m.GetScopes(), Limits: limitsFrom(m.GetLimits())}}
	k, secret, err := a.d.access.createKey(ctx, m.GetApp(), k, time.Duration(m.GetTtlSeconds())*time.Second)
	if err != nil {
		return nil, err
	}
	return connect.NewResponse(&m3ov1.CreateAPIKeyResponse{Key: keyTo(k), Secret: secret.Reveal()}), nil
}

func (a accessAPI) RevokeKey(ctx context.Context, req *connect.Request[m3ov1.RevokeAPIKeyRequest]) (*connect.Response[m3ov1.RevokeAPIKeyResponse], error) {
	return connect.NewResponse(&m3ov1.RevokeAPIKeyResponse{}), a.d.access.revokeKey(ctx, req.Msg.GetApp(), req.Msg.GetId())
}
