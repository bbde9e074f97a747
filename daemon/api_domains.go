package daemon

import (
	"context"
	"fmt"
	"slices"

	"connectrpc.com/connect"

	"github.com/m3o/m3o"
	m3ov1 "github.com/m3o/m3o/api/m3o/v1"
)

type domainsAPI struct{ d *Daemon }

// wire is x as the API shows it. want are the addresses it should have; nil
// leaves DNS alone.
func (a domainsAPI) wire(ctx context.Context, x domain, own []ownCert, want []string) *m3ov1.Domain {
	out := &m3ov1.Domain{Name: x.Name, Redirect: x.Redirect, User: x.User, Created: stamp(x.Created), Wanted: want, Certificate: "none"}
	out.Dns, out.Found = a.d.lookup(ctx, x.Name, want)
	if a.d.certs != nil {
		if s, ok := a.d.certs.State(a.d.certName(x.Name)); ok {
			out.Certificate, out.Error = "pending", s.Err
			if !s.Issued.IsZero() {
				out.Certificate, out.Expires = "issued", stamp(s.Expires)
			}
		}
	}
	for _, c := range own {
		if slices.Contains(c.Names, x.Name) {
			out.Certificate, out.Expires, out.Error = "own", stamp(c.Expires), ""
		}
	}
	return out
}

func (a domainsAPI) List(ctx context.Context, req *connect.Request[m3ov1.ListDomainsRequest]) (*connect.Response[m3ov1.ListDomainsResponse], error) {
	mine, err := a.d.domainsOf(ctx, req.Msg.App)
	if err != nil {
		return nil, err
	}
	own, err := a.d.certsOf(ctx, req.Msg.App)
	if err != nil {
		return nil, err
	}
	out := &m3ov1.ListDomainsResponse{Host: req.Msg.App + "." + a.d.cfg.Domain, Addresses: a.d.addresses(ctx)}
	for _, x := range mine {
		out.Domains = append(out.Domains, a.wire(ctx, x, own, nil))
	}
	return connect.NewResponse(out), nil
}

func (a domainsAPI) Add(ctx context.Context, req *connect.Request[m3ov1.AddDomainRequest]) (*connect.Response[m3ov1.AddDomainResponse], error) {
	m := req.Msg
	app, err := a.d.ledger.App(ctx, m.App)
	if err != nil {
		return nil, err
	}
	name, err := checkDomain(m.Name, a.d.cfg.Domain)
	if err != nil {
		return nil, err
	}
	want := []domain{{Name: name}}
	if m.Redirect != "" {
		if want[0].Redirect, err = checkDomain(m.Redirect, a.d.cfg.Domain); err != nil {
			return nil, err
		}
	}
	if m.Www {
		if name[0] == '*' || m.Redirect != "" {
			return nil, &m3o.Error{Kind: m3o.Invalid, Msg: "www goes with a plain domain that serves the app", Hint: "add the two one by one"}
		}
		want = append(want, domain{Name: "www." + name, Redirect: name})
	}
	w := who(ctx)
	if err := a.d.addDomains(ctx, app, w.User, w.Admin, want); err != nil {
		return nil, err
	}
	out := &m3ov1.AddDomainResponse{Host: app.Name + "." + a.d.cfg.Domain, Addresses: a.d.addresses(ctx)}
	for _, x := range want {
		out.Domains = append(out.Domains, a.wire(ctx, x, nil, out.Addresses))
	}
	return connect.NewResponse(out), nil
}

func (a domainsAPI) Remove(ctx context.Context, req *connect.Request[m3ov1.RemoveDomainRequest]) (*connect.Response[m3ov1.RemoveDomainResponse], error) {
	name, err := checkDomain(req.Msg.Name, a.d.cfg.Domain)
	if err != nil {
		return nil, err
	}
	x, err := a.d.removeDomain(ctx, req.Msg.App, name)
	if err != nil {
		return nil, err
	}
	return connect.NewResponse(&m3ov1.RemoveDomainResponse{Domain: a.wire(ctx, x, nil, nil)}), nil
}

func (a domainsAPI) Check(ctx context.Context, req *connect.Request[m3ov1.CheckDomainRequest]) (*connect.Response[m3ov1.CheckDomainResponse], error) {
	mine, err := a.d.domainsOf(ctx, req.Msg.App)
	if err != nil {
		return nil, err
	}
	i := slices.IndexFunc(mine, func(x domain) bool { return x.Name == req.Msg.Name })
	if i < 0 {
		return nil, &m3o.Error{Kind: m3o.NotFound, Msg: fmt.Sprintf("%s is not served at %q", req.Msg.App, req.Msg.Name), Hint: "m3o domains:add " + req.Msg.Name}
	}
	own, err := a.d.certsOf(ctx, req.Msg.App)
	if err != nil {
		return nil, err
	}
	return connect.NewResponse(&m3ov1.CheckDomainResponse{Domain: a.wire(ctx, mine[i], own, a.d.addresses(ctx))}), nil
}

type certsAPI struct{ d *Daemon }

func ownWire(c ownCert) *m3ov1.Certificate {
	return &m3ov1.Certificate{Id: c.ID, Names: c.Names, Issuer: c.Issuer, Expires: stamp(c.Expires), Own: true}
}

func (a certsAPI) List(ctx context.Context, req *connect.Request[m3ov1.ListCertificatesRequest]) (*connect.Response[m3ov1.ListCertificatesResponse], error) {
	own, err := a.d.certsOf(ctx, req.Msg.App)
	if err != nil {
		return nil, err
	}
	out := &m3ov1.ListCertificatesResponse{}
	for _, c := range own {
		out.Certificates = append(out.Certificates, ownWire(c))
	}
	if a.d.certs == nil {
		return connect.NewResponse(out), nil
	}
	mine, err := a.d.domainsOf(ctx, req.Msg.App)
	if err != nil {
		return nil, err
	}
	names := []string{a.d.certName(req.Msg.App + "." + a.d.cfg.Domain)}
	for _, x := range mine {
		names = append(names, a.d.certName(x.Name))
	}
	for _, n := range slices.Compact(names) {
		if s, ok := a.d.certs.State(n); ok {
			out.Certificates = append(out.Certificates, &m3ov1.Certificate{Names: []string{n}, Issuer: s.Issuer, Expires: stamp(s.Expires), Error: s.Err})
		}
	}
	return connect.NewResponse(out), nil
}

func (a certsAPI) Add(ctx context.Context, req *connect.Request[m3ov1.AddCertificateRequest]) (*connect.Response[m3ov1.AddCertificateResponse], error) {
	w := who(ctx)
	c, err := a.d.addCert(ctx, req.Msg.App, w.User, w.Admin, req.Msg.Chain, m3o.Secret(req.Msg.Key))
	if err != nil {
		return nil, err
	}
	return connect.NewResponse(&m3ov1.AddCertificateResponse{Certificate: ownWire(c)}), nil
}

func (a certsAPI) Remove(ctx context.Context, req *connect.Request[m3ov1.RemoveCertificateRequest]) (*connect.Response[m3ov1.RemoveCertificateResponse], error) {
	c, err := a.d.removeCert(ctx, req.Msg.App, req.Msg.Id)
	if err != nil {
		return nil, err
	}
	return connect.NewResponse(&m3ov1.RemoveCertificateResponse{Certificate: ownWire(c)}), nil
}

type trafficAPI struct{ d *Daemon }

func (a trafficAPI) Get(ctx context.Context, req *connect.Request[m3ov1.GetTrafficRequest]) (*connect.Response[m3ov1.GetTrafficResponse], error) {
	m, _, err := a.d.hosting.modes.Get(ctx, req.Msg.App)
	if err != nil && m3o.KindOf(err) != m3o.NotFound {
		return nil, fmt.Errorf("read mode: %w", err)
	}
	return connect.NewResponse(&m3ov1.GetTrafficResponse{Maintenance: m.Maintenance, Paused: m.Paused}), nil
}

func (a trafficAPI) Set(ctx context.Context, req *connect.Request[m3ov1.SetTrafficRequest]) (*connect.Response[m3ov1.SetTrafficResponse], error) {
	app := req.Msg.App
	for {
		m, rev, err := a.d.hosting.modes.Get(ctx, app)
		if err != nil && m3o.KindOf(err) != m3o.NotFound {
			return nil, fmt.Errorf("read mode: %w", err)
		}
		missing := err != nil
		if req.Msg.Maintenance != nil {
			m.Maintenance = *req.Msg.Maintenance
		}
		if req.Msg.Paused != nil {
			m.Paused = *req.Msg.Paused
		}
		if missing {
			_, err = a.d.hosting.modes.Create(ctx, app, m)
		} else {
			_, err = a.d.hosting.modes.Update(ctx, app, m, rev)
		}
		if m3o.KindOf(err) == m3o.Conflict {
			continue // somebody else was quicker
		}
		if err != nil {
			return nil, fmt.Errorf("keep mode: %w", err)
		}
		if err := a.d.routes.setMode(ctx, app, mode{m.Maintenance, m.Paused}); err != nil {
			return nil, err
		}
		return connect.NewResponse(&m3ov1.SetTrafficResponse{Maintenance: m.Maintenance, Paused: m.Paused}), nil
	}
}
