package daemon

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"time"

	"github.com/m3o/m3o"
	"github.com/m3o/m3o/gateway"
	"github.com/m3o/m3o/gitserver"
	"github.com/m3o/m3o/release"
	"github.com/m3o/m3o/runtime"
)

// tipSource is the newest commit of a branch of app as a source whose deploy
// moves nothing.
func (d *Daemon) tipSource(ctx context.Context, app m3o.App, branch, user, via string) (m3o.Source, error) {
	src := m3o.Source{App: app.Name, User: user, Via: via}
	dir, ok := d.repoDir(app.Name)
	if ok {
		tip, err := gitserver.Tip(ctx, dir, "refs/heads/"+branch)
		if err != nil {
			return src, err
		}
		src.Repo, src.Commit = dir, tip
	}
	if src.Commit == "" {
		return src, &m3o.Error{Kind: m3o.NotFound, Msg: fmt.Sprintf("%s has no branch %s here", app.Name, branch), Hint: "git push m3o " + branch}
	}
	return src, nil
}

// scheduledRebuild deploys the tip of the deploy branch again.
func (d *Daemon) scheduledRebuild(ctx context.Context, rec schedule, out io.Writer) (detail string, version int, err error) {
	app, err := d.ledger.App(ctx, rec.App)
	if err != nil {
		return "", 0, err
	}
	src, err := d.tipSource(ctx, app, app.DeployBranch(), rec.User, "schedule "+rec.Name)
	if err != nil {
		return "", 0, err
	}
	if rec.IfOutdated {
		s, err := d.outdated(ctx, src)
		if err != nil {
			return "", 0, err
		}
		if s.Why == "" && s.Known != "" {
			return "nothing is outdated: not rebuilt; known before it was built: " + s.Known, 0, nil
		} else if s.Why == "" {
			return "nothing is outdated: not rebuilt", 0, nil
		}
		src.Via += ": " + s.Why
		if err := d.fetchToolchain(ctx, s.Toolchain, out); err != nil {
			return "", 0, err
		}
	}
	rel, err := d.deployCommit(ctx, src, out)
	if err != nil {
		return "", 0, err
	}
	return d.deployed(ctx, rel), rel.Version, nil
}

// fetchToolchain has a toolchain here before the build that is to use it: that
// takes minutes, in which the app's lane is free for pushes.
func (d *Daemon) fetchToolchain(ctx context.Context, version string, out io.Writer) error {
	if version == "" {
		return nil
	}
	ctx, cancel := context.WithTimeoutCause(ctx, d.cfg.BuildTimeout, &m3o.Error{Kind: m3o.Unavailable,
		Msg: fmt.Sprintf("%s did not come within %s", version, d.cfg.BuildTimeout), Hint: "the module proxy is slow; m3od --build-timeout changes the limit"})
	defer cancel()
	err := d.builder.Fetch(ctx, version, output{out}.step)
	if cause := context.Cause(ctx); err != nil && cause != nil {
		return cause
	}
	return err
}

// deployed words what came of a deploy that went well.
func (d *Daemon) deployed(ctx context.Context, rel m3o.Release) string {
	if s, err := d.ledger.ReleaseStatus(ctx, rel.App, rel.Version); err == nil && s == release.ReleaseHeld {
		return rel.Name() + " was built and is held back: the app is locked"
	}
	return rel.Name() + " is live"
}

// scheduledCommand runs a command in the live release. Its output is in the
// app's log, and the end of it is kept with the run.
func (d *Daemon) scheduledCommand(ctx context.Context, rec schedule, out io.Writer) (detail string, err error) {
	w, err := d.oneOff(ctx, rec.App, "", rec.Args, map[string]string{"M3O_SCHEDULE": rec.Name})
	if err != nil {
		return "", err
	}
	done, err := d.runs.begin(rec.App, w.Image, len(d.detached(rec.App)))
	if err != nil {
		return "", err
	}
	defer done()
	out = &tee{pusher: out, log: d.logs.lines(rec.App, sourceApp)}
	ctx, cancel := context.WithTimeoutCause(ctx, runLimit, &m3o.Error{Kind: m3o.Invalid, Msg: fmt.Sprintf("it ran longer than %s and was stopped", runLimit)})
	defer cancel()
	code, err := d.driver.Run(ctx, w, runtime.Cmd{Args: rec.Args, Out: out, Err: out})
	if cause := context.Cause(ctx); cause != nil {
		return "", cause
	}
	if err != nil {
		return "", fmt.Errorf("run command: %w", err)
	}
	if code != 0 {
		return "", &m3o.Error{Kind: m3o.Invalid, Msg: fmt.Sprintf("exited with %d", code)}
	}
	return "exited with 0", nil
}

// callParts checks the method and message of a call.
func callParts(args []string) (path, body string, err error) {
	const example = "m3o schedule:add --cron \"0 4 * * *\" call Service/Method '{\"name\":\"Ada\"}'"
	service, method, ok := strings.Cut(strings.TrimPrefix(args[0], "/"), "/")
	if !ok || service == "" || method == "" || strings.ContainsAny(service+method, "/?# \t\r\n%") {
		return "", "", &m3o.Error{Kind: m3o.Invalid, Msg: fmt.Sprintf("%q is not of the form Service/Method", args[0]), Hint: example}
	}
	body = "{}"
	if len(args) > 1 {
		body = args[1]
	}
	var fields map[string]any
	if err := json.Unmarshal([]byte(body), &fields); err != nil {
		return "", "", &m3o.Error{Kind: m3o.Invalid, Msg: "the message is not a JSON object: " + err.Error(), Hint: example}
	}
	return service + "/" + method, body, nil
}

// scheduledCall calls a method of the live release as JSON, straight at a ready
// instance: the platform needs no rule to call what it runs.
func (d *Daemon) scheduledCall(ctx context.Context, rec schedule, out io.Writer) (detail string, err error) {
	path, body, err := callParts(rec.Args)
	if err != nil {
		return "", err
	}
	rel, err := d.ledger.Live(ctx, rec.App)
	if err != nil {
		return "", err
	}
	ctx, cancel := context.WithTimeoutCause(ctx, callLimit, &m3o.Error{Kind: m3o.Unavailable, Msg: fmt.Sprintf("no answer within %s", callLimit)})
	defer cancel()
	defer d.runs.call(rec.App)() // from before it is woken on: or it could be put to sleep at once
	if f, err := d.ledger.Formation(ctx, rec.App); err != nil {
		return "", err
	} else if f.Asleep {
		if err := d.wakeUp(ctx, rec.App); err != nil {
			return "", fmt.Errorf("wake it: %w", err)
		}
	}
	addr, tr, err := d.reachable(ctx, rel)
	if err != nil {
		return "", err
	}
	if tr.Protocol != string(runtime.GRPC) {
		return "", &m3o.Error{Kind: m3o.Invalid, Msg: rec.App + " does not speak gRPC, so no method of it can be called", Hint: "m3o schedule:add --cron … run COMMAND"}
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, d.url(rec.App)+"/"+path, strings.NewReader(body))
	if err != nil {
		return "", fmt.Errorf("make call: %w", err)
	}
	req.Header.Set("Content-Type", "application/json")
	req.Header.Set("X-M3o-Schedule", rec.Name)
	up := &http.Transport{Protocols: new(http.Protocols), DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return (&net.Dialer{Timeout: 10 * time.Second}).DialContext(ctx, "tcp", addr)
	}}
	up.Protocols.SetUnencryptedHTTP2(true)
	defer up.CloseIdleConnections()
	ans := &answer{header: http.Header{}, max: 1 << 20}
	gateway.New(gateway.Config{Log: d.log}).ServePath(ans, req, &m3o.API{App: rec.App, Release: rel.Version, Schema: tr.Descriptors}, path, toEndpoint{up, addr})
	_, _ = out.Write(ans.body.Bytes())
	if cause := context.Cause(ctx); cause != nil {
		return "", cause
	}
	if ans.code = cmp.Or(ans.code, http.StatusOK); ans.code >= 300 {
		return "", &m3o.Error{Kind: m3o.Invalid, Msg: fmt.Sprintf("answered %d: %s", ans.code, ans.problem())}
	}
	return fmt.Sprintf("answered %d", ans.code), nil
}

// reachable is the address of a ready instance of rel's web process and how it
// is spoken to.
func (d *Daemon) reachable(ctx context.Context, rel m3o.Release) (addr string, t traits, err error) {
	if p, ok := rel.Processes[webProcess]; !ok || replicas(p) == 0 {
		return "", t, &m3o.Error{Kind: m3o.Invalid, Msg: rel.App + " has no web process to call"}
	}
	wctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	ins, err := runtime.WaitReady(wctx, d.driver, ref(rel, webProcess), 1, nil)
	if err != nil {
		return "", t, err
	}
	t, err = d.examine(ctx, rel, ins[0])
	return ins[0].Addr, t, err
}

// toEndpoint sends a call to one endpoint whatever its host.
type toEndpoint struct {
	t    *http.Transport
	addr string
}

func (e toEndpoint) RoundTrip(r *http.Request) (*http.Response, error) {
	r = r.Clone(r.Context())
	r.URL.Scheme, r.URL.Host = "http", e.addr
	return e.t.RoundTrip(r)
}

// An answer keeps what a handler writes, up to a bound.
type answer struct {
	header http.Header
	code   int
	body   bytes.Buffer
	max    int
}

func (a *answer) Header() http.Header { return a.header }
func (a *answer) WriteHeader(code int) {
	if a.code == 0 {
		a.code = code
	}
}
func (a *answer) Write(p []byte) (int, error) {
	a.WriteHeader(http.StatusOK)
	a.body.Write(p[:min(len(p), a.max-a.body.Len())])
	return len(p), nil
}

// problem is the detail of an error as the gateway writes it.
func (a *answer) problem() string {
	var p struct{ Detail, Message string }
	if json.Unmarshal(a.body.Bytes(), &p) == nil && p.Detail+p.Message != "" {
		return cmp.Or(p.Detail, p.Message)
	}
	return clip(strings.TrimSpace(a.body.String()), 200)
}
