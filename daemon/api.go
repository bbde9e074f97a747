package daemon

import (
	"context"
	"errors"
	"net/http"
	"strings"

	"connectrpc.com/connect"

	"github.com/m3o/m3o"
	m3ov1 "github.com/m3o/m3o/api/m3o/v1"
	"github.com/m3o/m3o/api/m3o/v1/m3ov1connect"
	"github.com/m3o/m3o/auth"
	"github.com/m3o/m3o/router"
)

// open are the procedures that need no token: they are how one gets it.
var open = map[string]bool{
	m3ov1connect.AuthChallengeProcedure: true,
	m3ov1connect.AuthLoginProcedure:     true,
	m3ov1connect.AuthBootstrapProcedure: true,
	m3ov1connect.ServerInfoProcedure:    true,
}

// permissions is what every other procedure asks of auth. A procedure that is
// in neither table is refused, so a new one cannot be open by oversight. The
// verb "" means: any signed-in user, who is shown only their own things.
var permissions = map[string]auth.Verb{
	m3ov1connect.AuthWhoamiProcedure:          "",
	m3ov1connect.AuthLogoutProcedure:          "",
	m3ov1connect.KeysAddProcedure:             auth.KeysWrite,
	m3ov1connect.KeysListProcedure:            auth.KeysRead,
	m3ov1connect.KeysRemoveProcedure:          "", // keys.go asks: what it is about is the key's owner
	m3ov1connect.KeysCreateUserProcedure:      auth.UsersWrite,
	m3ov1connect.AppsCreateProcedure:          auth.AppsCreate,
	m3ov1connect.AppsListProcedure:            "",
	m3ov1connect.AppsGetProcedure:             auth.AppsRead,
	m3ov1connect.AppsDestroyProcedure:         auth.AppsDestroy,
	m3ov1connect.ReleasesListProcedure:        auth.AppsRead,
	m3ov1connect.ReleasesRollbackProcedure:    auth.Rollback,
	m3ov1connect.BuildsListProcedure:          auth.AppsRead,
	m3ov1connect.BuildsOutputProcedure:        auth.LogsRead,
	m3ov1connect.ConfigListProcedure:          auth.ConfigRead,
	m3ov1connect.ConfigSetProcedure:           auth.ConfigWrite,
	m3ov1connect.ConfigUnsetProcedure:         auth.ConfigWrite,
	m3ov1connect.ProcessesListProcedure:       auth.AppsRead,
	m3ov1connect.ProcessesLogsProcedure:       auth.LogsRead,
	m3ov1connect.AccessGetProcedure:           auth.AccessRead,
	m3ov1connect.AccessSetPrivateProcedure:    auth.AccessWrite,
	m3ov1connect.AccessSetRuleProcedure:       auth.AccessWrite,
	m3ov1connect.AccessRemoveRuleProcedure:    auth.AccessWrite,
	m3ov1connect.AccessSetLimitProcedure:      auth.AccessWrite,
	m3ov1connect.AccessRemoveLimitProcedure:   auth.AccessWrite,
	m3ov1connect.AccessCreateKeyProcedure:     auth.AccessWrite,
	m3ov1connect.AccessRevokeKeyProcedure:     auth.AccessWrite,
	m3ov1connect.RequestsSummaryProcedure:     auth.LogsRead,
	m3ov1connect.RequestsFollowProcedure:      auth.LogsRead,
	m3ov1connect.CanarySetProcedure:           auth.Rollback,
	m3ov1connect.CanaryGetProcedure:           auth.AppsRead,
	m3ov1connect.CanaryPromoteProcedure:       auth.Rollback,
	m3ov1connect.CanaryAbortProcedure:         auth.Rollback,
	m3ov1connect.ReposConnectProcedure:        auth.RepoConnect,
	m3ov1connect.ReposGetProcedure:            auth.RepoRead,
	m3ov1connect.ReposDisconnectProcedure:     auth.RepoConnect,
	m3ov1connect.ReposDeliveriesProcedure:     auth.RepoRead,
	m3ov1connect.ReposReplayProcedure:         auth.RepoDeploy,
	m3ov1connect.ReposApproveProcedure:        auth.RepoDeploy,
	m3ov1connect.ReposPreviewsProcedure:       auth.RepoRead,
	m3ov1connect.ReposDestroyPreviewProcedure: auth.RepoDeploy,
	m3ov1connect.ReposRunProcedure:            "", // api_repos.go asks what a push is asked

	m3ov1connect.SchedulesAddProcedure:     auth.SchedulesWrite,
	m3ov1connect.SchedulesListProcedure:    auth.AppsRead,
	m3ov1connect.SchedulesRunProcedure:     auth.SchedulesWrite,
	m3ov1connect.SchedulesPauseProcedure:   auth.SchedulesWrite,
	m3ov1connect.SchedulesResumeProcedure:  auth.SchedulesWrite,
	m3ov1connect.SchedulesRemoveProcedure:  auth.SchedulesWrite,
	m3ov1connect.SchedulesHistoryProcedure: auth.LogsRead,

	m3ov1connect.DomainsListProcedure:        auth.AppsRead,
	m3ov1connect.DomainsAddProcedure:         auth.DomainsWrite,
	m3ov1connect.DomainsRemoveProcedure:      auth.DomainsWrite,
	m3ov1connect.DomainsCheckProcedure:       auth.AppsRead,
	m3ov1connect.CertificatesListProcedure:   auth.AppsRead,
	m3ov1connect.CertificatesAddProcedure:    auth.DomainsWrite,
	m3ov1connect.CertificatesRemoveProcedure: auth.DomainsWrite,
	m3ov1connect.TrafficGetProcedure:         auth.AppsRead,
	m3ov1connect.TrafficSetProcedure:         auth.ProcessesWrite,
	m3ov1connect.LinksAddProcedure:           auth.AccessWrite,
	m3ov1connect.LinksListProcedure:          auth.AppsRead,
	m3ov1connect.LinksRemoveProcedure:        auth.AccessWrite,
	m3ov1connect.DoctorCheckProcedure:        auth.ServerRead,
	m3ov1connect.DrainsAddProcedure:          auth.ConfigWrite,
	m3ov1connect.DrainsListProcedure:         auth.ConfigRead,
	m3ov1connect.DrainsRemoveProcedure:       auth.ConfigWrite,
	m3ov1connect.RunsRunProcedure:            auth.ProcessesWrite,
	m3ov1connect.RunsDetachProcedure:         auth.ProcessesWrite,
	m3ov1connect.RunsListProcedure:           auth.AppsRead,
	m3ov1connect.RunsStopProcedure:           auth.ProcessesWrite,

	m3ov1connect.DeploysStartProcedure:       auth.Push,
	m3ov1connect.DeploysUploadProcedure:      auth.Push,
	m3ov1connect.BuildRecordsGetProcedure:    auth.AppsRead,
	m3ov1connect.BuildRecordsCancelProcedure: auth.Push,
	m3ov1connect.BuildRecordsSbomProcedure:   auth.AppsRead,
	m3ov1connect.BuildRecordsVerifyProcedure: auth.Push,
	m3ov1connect.ScaleGetProcedure:           auth.AppsRead,
	m3ov1connect.ScaleSetProcedure:           auth.ProcessesWrite,
	m3ov1connect.ScaleRestartProcedure:       auth.ProcessesWrite,
	m3ov1connect.ScaleStopProcedure:          auth.ProcessesWrite,
	m3ov1connect.ScaleStartProcedure:         auth.ProcessesWrite,
	m3ov1connect.ScaleAutoscaleProcedure:     auth.ProcessesWrite,
	m3ov1connect.ScaleSleepProcedure:         auth.ProcessesWrite,
	m3ov1connect.VolumesListProcedure:        auth.AppsRead,
	m3ov1connect.VolumesCreateProcedure:      auth.ProcessesWrite,
	m3ov1connect.VolumesMountProcedure:       auth.ProcessesWrite,
	m3ov1connect.VolumesUnmountProcedure:     auth.ProcessesWrite,
	m3ov1connect.VolumesDestroyProcedure:     auth.VolumesDestroy,
	m3ov1connect.ControlGetProcedure:         auth.AppsRead,
	m3ov1connect.ControlSetBranchProcedure:   auth.DeployWrite,
	m3ov1connect.ControlSetPathsProcedure:    auth.DeployWrite,
	m3ov1connect.ControlLockProcedure:        auth.DeployWrite,
	m3ov1connect.ControlUnlockProcedure:      auth.DeployWrite,
	m3ov1connect.ControlPublishProcedure:     auth.DeployWrite,
	m3ov1connect.ControlAddHookProcedure:     auth.DeployWrite,
	m3ov1connect.ControlListHooksProcedure:   auth.AppsRead,
	m3ov1connect.ControlRemoveHookProcedure:  auth.DeployWrite,

	m3ov1connect.NotificationsAddProcedure:     auth.NotifyWrite,
	m3ov1connect.NotificationsListProcedure:    auth.AppsRead,
	m3ov1connect.NotificationsRemoveProcedure:  auth.NotifyWrite,
	m3ov1connect.NotificationsTestProcedure:    auth.NotifyWrite,
	m3ov1connect.NotificationsHistoryProcedure: auth.AppsRead,
}

// apiHandler serves the control plane's procedures, each behind its permission.
func (d *Daemon) apiHandler() http.Handler {
	mux := http.NewServeMux()
	opts := []connect.HandlerOption{connect.WithInterceptors(&guard{d}), connect.WithReadMaxBytes(16 << 20)}
	mux.Handle(m3ov1connect.NewAuthHandler(authAPI{d}, opts...))
	mux.Handle(m3ov1connect.NewKeysHandler(keysAPI{d}, opts...))
	mux.Handle(m3ov1connect.NewAppsHandler(appsAPI{d}, opts...))
	mux.Handle(m3ov1connect.NewReleasesHandler(releasesAPI{d}, opts...))
	mux.Handle(m3ov1connect.NewDeploysHandler(deploysAPI{d}, opts...))
	mux.Handle(m3ov1connect.NewBuildRecordsHandler(buildRecordsAPI{d}, opts...))
	mux.Handle(m3ov1connect.NewBuildsHandler(buildsAPI{d}, opts...))
	mux.Handle(m3ov1connect.NewConfigHandler(configAPI{d}, opts...))
	mux.Handle(m3ov1connect.NewProcessesHandler(processesAPI{d}, opts...))
	mux.Handle(m3ov1connect.NewDomainsHandler(domainsAPI{d}, opts...))
	mux.Handle(m3ov1connect.NewCertificatesHandler(certsAPI{d}, opts...))
	mux.Handle(m3ov1connect.NewTrafficHandler(trafficAPI{d}, opts...))
	mux.Handle(m3ov1connect.NewDoctorHandler(doctorAPI{d}, opts...))
	mux.Handle(m3ov1connect.NewLinksHandler(linksAPI{d}, opts...))
	mux.Handle(m3ov1connect.NewDrainsHandler(drainsAPI{d}, opts...))
	mux.Handle(m3ov1connect.NewRunsHandler(runsAPI{d}, opts...))
	mux.Handle(m3ov1connect.NewScaleHandler(scaleAPI{d}, opts...))
	mux.Handle(m3ov1connect.NewVolumesHandler(volumesAPI{d}, opts...))
	mux.Handle(m3ov1connect.NewServerHandler(serverAPI{d}, opts...))
	mux.Handle(m3ov1connect.NewAccessHandler(accessAPI{d}, opts...))
	mux.Handle(m3ov1connect.NewRequestsHandler(requestsAPI{d}, opts...))
	mux.Handle(m3ov1connect.NewCanaryHandler(canaryAPI{d}, opts...))
	mux.HandleFunc("POST "+router.VerifyPath, d.verify)
	mux.Handle(m3ov1connect.NewSchedulesHandler(schedulesAPI{d}, opts...))
	mux.Handle(m3ov1connect.NewControlHandler(controlAPI{d}, opts...))
	mux.Handle(m3ov1connect.NewNotificationsHandler(notificationsAPI{d}, opts...))
	mux.Handle(hookPath, d.hooks)
	mux.Handle(m3ov1connect.NewReposHandler(reposAPI{d.repos}, opts...))
	mux.Handle("/hooks/", d.repos.recv)
	mux.HandleFunc("GET /hooks/log/{app}/{commit}/{mac}", d.repos.serveLog)
	mux.HandleFunc("GET "+schemaPath, serveSchema)
	mux.HandleFunc("GET /-/health", func(w http.ResponseWriter, _ *http.Request) { _, _ = w.Write([]byte("ok\n")) })
	return mux
}

type whoKey struct{}
type tokenKey struct{}

// who is the caller, put in the context by guard alone.
func who(ctx context.Context) auth.Who {
	w, _ := ctx.Value(whoKey{}).(auth.Who)
	return w
}

// guard checks the bearer token and the permission of every call, and turns
// errors into Connect codes with their hint.
type guard struct{ d *Daemon }

var _ connect.Interceptor = (*guard)(nil)

func (g *guard) WrapUnary(next connect.UnaryFunc) connect.UnaryFunc {
	return func(ctx context.Context, req connect.AnyRequest) (connect.AnyResponse, error) {
		ctx, err := g.admit(ctx, req.Spec().Procedure, req.Header())
		if err == nil {
			err = g.allow(ctx, req.Spec().Procedure, req.Any())
		}
		if err != nil {
			return nil, g.wire(req.Spec().Procedure, err)
		}
		res, err := next(ctx, req)
		if err != nil {
			return nil, g.wire(req.Spec().Procedure, err)
		}
		return res, nil
	}
}

func (g *guard) WrapStreamingClient(next connect.StreamingClientFunc) connect.StreamingClientFunc {
	return next
}

func (g *guard) WrapStreamingHandler(next connect.StreamingHandlerFunc) connect.StreamingHandlerFunc {
	return func(ctx context.Context, conn connect.StreamingHandlerConn) error {
		proc := conn.Spec().Procedure
		ctx, err := g.admit(ctx, proc, conn.RequestHeader())
		if err != nil {
			return g.wire(proc, err)
		}
		if err := next(ctx, &guarded{StreamingHandlerConn: conn, g: g, ctx: ctx}); err != nil {
			return g.wire(proc, err)
		}
		return nil
	}
}

// guarded asks for the permission once the request message is known. Where a
// client sends more than one, the first is what the call is about.
type guarded struct {
	connect.StreamingHandlerConn
	g     *guard
	ctx   context.Context //nolint:containedctx // belongs to this one call
	asked bool
}

func (c *guarded) Receive(msg any) error {
	if err := c.StreamingHandlerConn.Receive(msg); err != nil {
		return err
	}
	if c.asked {
		return nil
	}
	if err := c.g.allow(c.ctx, c.Spec().Procedure, msg); err != nil {
		return c.g.wire(c.Spec().Procedure, err)
	}
	c.asked = true
	return nil
}

// admit finds out who calls.
func (g *guard) admit(ctx context.Context, procedure string, h http.Header) (context.Context, error) {
	if open[procedure] {
		return ctx, nil
	}
	if _, known := permissions[procedure]; !known {
		return ctx, &m3o.Error{Kind: m3o.Denied, Msg: "no rule allows " + procedure}
	}
	scheme, token, _ := strings.Cut(h.Get("Authorization"), " ")
	if !strings.EqualFold(scheme, "Bearer") || token == "" {
		return ctx, errSignIn
	}
	w, err := g.d.auth.Verify(ctx, m3o.Secret(token))
	if err != nil {
		return ctx, connect.NewError(connect.CodeUnauthenticated, err)
	}
	w.Via = "api"
	ctx = context.WithValue(ctx, tokenKey{}, m3o.Secret(token))
	return context.WithValue(ctx, whoKey{}, w), nil
}

var errSignIn = connect.NewError(connect.CodeUnauthenticated, &m3o.Error{Kind: m3o.Denied, Msg: "not signed in"}) // the CLI knows the command with this server's URL

// allow asks auth whether the caller may do this to the app or user the
// message names.
func (g *guard) allow(ctx context.Context, procedure string, msg any) error {
	verb := permissions[procedure]
	if verb == "" {
		return nil
	}
	what := ""
	switch m := msg.(type) {
	case interface{ GetApp() string }:
		if what = m.GetApp(); what == "" {
			return &m3o.Error{Kind: m3o.Invalid, Msg: "which app?", Hint: "name it with --app"}
		}
		// Whether a name exists is told only to those who may see it: Allow first.
	case interface{ GetUser() string }:
		what = m.GetUser()
		if what == "" {
			what = who(ctx).User
		}
	case interface{ GetName() string }:
		what = m.GetName()
	}
	if err := g.d.auth.Allow(ctx, who(ctx), verb, what); err != nil {
		return err
	}
	if _, ok := msg.(interface{ GetApp() string }); ok {
		if _, err := g.d.ledger.App(ctx, what); err != nil {
			return err
		}
	}
	return nil
}

// wire turns an error into what crosses the wire: a code, the message a user
// may read and the hint. What stays inside goes to the log.
func (g *guard) wire(procedure string, err error) error {
	e, ours := errors.AsType[*m3o.Error](err)
	ce, coded := errors.AsType[*connect.Error](err)
	if coded && !ours {
		return ce // Connect's own: a malformed request, a limit
	}
	code := codes[m3o.KindOf(err)]
	switch {
	case coded:
		code = ce.Code()
	case errors.Is(err, context.Canceled):
		code = connect.CodeCanceled
	}
	msg := err.Error()
	if ours {
		msg = e.Msg
	}
	if code == connect.CodeInternal {
		g.d.log.Error("api call", "err", err, "procedure", procedure)
		msg = userMessage(err)
	}
	out := connect.NewError(code, errors.New(msg))
	if h := m3o.HintOf(err); h != "" {
		if detail, derr := connect.NewErrorDetail(&m3ov1.Hint{Text: h}); derr == nil {
			out.AddDetail(detail)
		}
	}
	return out
}

var codes = map[m3o.Kind]connect.Code{
	m3o.Internal:    connect.CodeInternal,
	m3o.Invalid:     connect.CodeInvalidArgument,
	m3o.NotFound:    connect.CodeNotFound,
	m3o.Conflict:    connect.CodeFailedPrecondition,
	m3o.Denied:      connect.CodePermissionDenied,
	m3o.Unavailable: connect.CodeUnavailable,
}
