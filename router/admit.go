package router

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/netip"
	"net/url"
	"path"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/m3o/m3o"
)

// VerifyPath is where the daemon says, at its API socket, whom a bearer token
// stands for. The router relays no request from outside to it.
const VerifyPath = "/router/verify"

// A VerifyRequest asks whether the holder of a token may use a private app.
type VerifyRequest struct {
	App   string `json:"app"`
	Token string `json:"token"` // no m3o.Secret, which would encode as dots
}

// A Verdict is the answer: the user's name, "" for nobody who may.
type Verdict struct {
	User string `json:"user"`
}

// verdictFor is how long a verdict is believed: a revoked token is felt within
// it, and a busy caller costs the daemon one question in that time.
const (
	verdictFor  = time.Second
	maxVerdicts = 20_000
	verifyTime  = 5 * time.Second
)

// verdicts remembers what the daemon said of tokens.
type verdicts struct {
	mu sync.Mutex // guards m
	m  map[verdictKey]verdict
}

type verdictKey struct {
	app   string
	token [32]byte
}

type verdict struct {
	user  string
	until time.Time
}

func (v *verdicts) get(k verdictKey, now time.Time) (verdict, bool) {
	v.mu.Lock()
	defer v.mu.Unlock()
	x, ok := v.m[k]
	return x, ok && now.Before(x.until)
}

func (v *verdicts) put(k verdictKey, x verdict, now time.Time) {
	v.mu.Lock()
	defer v.mu.Unlock()
	if len(v.m) >= maxVerdicts {
		for k, old := range v.m {
			if !now.Before(old.until) || len(v.m) >= maxVerdicts {
				delete(v.m, k)
			}
		}
	}
	if v.m == nil {
		v.m = map[verdictKey]verdict{}
	}
	v.m[k] = x
}

// A methodFinder is a Gateway that can say beforehand which method a request
// is for, "" for none, so that rules about methods hold however it is called.
type methodFinder interface {
	FindMethod(r *http.Request, api *m3o.API, path string, byPath bool) string
}

// admit asks the app's policy whether the request may pass, and answers it
// when not. What the platform knows of the caller goes on with the request;
// what was shown to the platform does not.
func (q *request) admit(rest string) bool {
	p := q.host.policy
	if p == nil {
		return true
	}
	err := q.judgeAccess(p, q.aim(rest))
	if err == nil {
		return true
	}
	q.why = "not allowed"
	var e *refusal
	if !errors.As(err, &e) {
		problemOf(err, q.host.App).write(q.w, q.r)
		return false
	}
	pr := problem{code: e.code, grpc: e.grpc, app: q.host.App, msg: e.msg, hint: e.hint}
	switch e.code {
	case http.StatusUnauthorized:
		pr.header = http.Header{"Www-Authenticate": {`Bearer realm="` + q.host.App + `"`}}
	case http.StatusTooManyRequests:
		secs := (max(time.Second, e.wait) + time.Second - 1) / time.Second
		pr.header = http.Header{"Retry-After": {strconv.FormatInt(int64(secs), 10)}}
	}
	pr.write(q.w, q.r)
	return false
}

// refusal is why a policy refuses a request.
type refusal struct {
	code, grpc int
	msg, hint  string
	wait       time.Duration
}

func (r *refusal) Error() string { return r.msg }

// aim is what the policy is asked about.
func (q *request) aim(rest string) aim {
	r := q.r
	p := r.URL.Path
	if q.byApp {
		p = "/" + rest
	}
	t := aim{path: cleanPath(p)}
	if gw, ok := q.rt.cfg.Gateway.(methodFinder); ok && q.host.grpc && !isGRPC(r) {
		if !q.byApp {
			rest = p
		}
		t.method = gw.FindMethod(r, q.host.api, rest, q.byApp)
	}
	return t
}

// cleanPath is p without the detours that could lead round a rule. An app may
// read //admin or /x/../admin as /admin.
func cleanPath(p string) string {
	if !strings.Contains(p, "//") && !strings.Contains(p, "/.") && strings.HasPrefix(p, "/") {
		return p
	}
	c := path.Clean("/" + p)
	if strings.HasSuffix(p, "/") && c != "/" {
		c += "/"
	}
	return c
}

func (q *request) judgeAccess(p *compiled, t aim) error {
	access := p.access(t)
	if access == AllowNobody {
		return &refusal{code: http.StatusForbidden, grpc: grpcDenied, msg: "app " + q.host.App + " does not allow this to anybody", hint: "m3o access -a " + q.host.App}
	}
	var key *APIKey
	if q.inside {
		return q.limit(p, nil, t)
	}
	if isPreflight(q.r) && q.host.grpc {
		return nil // it carries no credentials, and the gateway answers it itself
	}
	if secret := bearer(q.r.Header); secret != "" && (access == AllowPrivate || len(p.keys) > 0) {
		sum := sha256.Sum256([]byte(secret))
		if k := p.keys[sum]; k != nil {
			if k.Expires != 0 && time.Now().Unix() >= k.Expires {
				return unauthenticated(q.host.App, "the API key "+k.ID+" has expired")
			}
			if !k.covers(t) {
				return &refusal{code: http.StatusForbidden, grpc: grpcDenied, msg: "the API key " + k.ID + " is not for this method or path", hint: "m3o apikeys -a " + q.host.App + " shows what it is for"}
			}
			key, q.caller = k, "key:"+k.ID
		} else if access == AllowPrivate {
			user, err := q.verify(sum, secret)
			if err != nil {
				return err
			}
			if user != "" {
				q.caller = "user:" + user
			}
		}
		if q.caller != "" {
			q.origin.caller = q.caller
			// It was for us: an app must not get what speaks for a user elsewhere.
			delete(q.r.Header, "Authorization")
			delete(q.r.Header, apiKeyHeader)
		}
	}
	if access == AllowPrivate && q.caller == "" {
		if bearer(q.r.Header) != "" {
			return unauthenticated(q.host.App, "the token or API key is not valid for app "+q.host.App)
		}
		return unauthenticated(q.host.App, "app "+q.host.App+" is private")
	}
	return q.limit(p, key, t)
}

const apiKeyHeader = "X-Api-Key"

func unauthenticated(app, msg string) error {
	return &refusal{code: http.StatusUnauthorized, grpc: grpcUnauthenticated, msg: msg,
		hint: "send Authorization: Bearer with an API key (m3o apikeys:create -a " + app + ") or your token"}
}

// bearer is what the caller shows, "" for nothing.
func bearer(h http.Header) string {
	if v := h["Authorization"]; len(v) == 1 {
		if scheme, token, ok := strings.Cut(v[0], " "); ok && strings.EqualFold(scheme, "Bearer") {
			return strings.TrimSpace(token)
		}
	}
	if v := h[apiKeyHeader]; len(v) == 1 {
		return v[0]
	}
	return ""
}

func isPreflight(r *http.Request) bool {
	return r.Method == http.MethodOptions && r.Header.Get("Origin") != "" && r.Header.Get("Access-Control-Request-Method") != ""
}

func (k *APIKey) covers(t aim) bool {
	if len(k.Scopes) == 0 {
		return true
	}
	for _, s := range k.Scopes {
		if t.matches(s) {
			return true
		}
	}
	return false
}

// verify asks the daemon whom a token stands for. Without an answer nobody is
// let in.
func (q *request) verify(sum [32]byte, secret string) (string, error) {
	k := verdictKey{q.host.App, sum}
	now := time.Now()
	if v, ok := q.rt.verdicts.get(k, now); ok {
		return v.user, nil
	}
	ctx, cancel := context.WithTimeout(q.r.Context(), verifyTime)
	defer cancel()
	v, err := q.rt.askDaemon(ctx, q.host.App, secret)
	if err != nil {
		q.rt.log.Warn("a token cannot be checked", "app", q.host.App, "err", err)
		return "", &m3o.Error{Kind: m3o.Unavailable, Msg: "your token cannot be checked just now; API keys work", Hint: "try again in a moment"}
	}
	q.rt.verdicts.put(k, verdict{v.User, now.Add(verdictFor)}, now)
	return v.User, nil
}

// askDaemon puts the question to the API's socket.
func (rt *Router) askDaemon(ctx context.Context, app, secret string) (Verdict, error) {
	var v Verdict
	e := rt.apiEndpoint()
	if e == nil {
		return v, errors.New("no API in the table")
	}
	b, err := json.Marshal(VerifyRequest{app, secret})
	if err != nil {
		return v, fmt.Errorf("encode question: %w", err)
	}
	req := (&http.Request{Method: http.MethodPost, URL: &url.URL{Scheme: "http", Host: e.urlHost(), Path: VerifyPath}, Host: "m3o",
		Header: http.Header{"Content-Type": {"application/json"}}, ContentLength: int64(len(b)), Body: io.NopCloser(bytes.NewReader(b)),
		Proto: "HTTP/2.0", ProtoMajor: 2}).WithContext(ctx)
	res, err := e.h2.RoundTrip(req)
	if err != nil {
		return v, fmt.Errorf("ask the daemon: %w", err)
	}
	defer res.Body.Close() //nolint:errcheck // read to the end or given up
	if res.StatusCode != http.StatusOK {
		return v, fmt.Errorf("ask the daemon: %s", res.Status)
	}
	if err := json.NewDecoder(io.LimitReader(res.Body, 4<<10)).Decode(&v); err != nil {
		return v, fmt.Errorf("ask the daemon: %w", err)
	}
	return v, nil
}

// subject is who a limit counts a request for.
func (q *request) subject(l *RateLimit, key *APIKey) string {
	switch l.Per {
	case PerAddress:
		return network(q.origin.ip)
	case PerAccount:
		if key != nil && key.Account != "" {
			return "account:" + key.Account
		}
	case PerKey:
	default:
		return ""
	}
	if q.caller != "" {
		return q.caller
	}
	return network(q.origin.ip) // nobody in particular: by address
}

// network is what addresses are counted as: an IPv6 host has a /64 to itself.
func network(ip string) string {
	a, err := netip.ParseAddr(ip)
	if err != nil || !a.Is6() || a.Is4In6() {
		return ip
	}
	p, err := a.WithZone("").Prefix(64)
	if err != nil {
		return ip
	}
	return p.String()
}

// limit counts the request against every limit that is about it.
func (q *request) limit(p *compiled, key *APIKey, t aim) error {
	now := time.Now()
	check := func(scope string, ls []RateLimit) error {
		for i := range ls {
			l := &ls[i]
			if l.Path != "" && !t.matches(l.Path) {
				continue
			}
			id := limitID{app: q.host.App, scope: scope, limit: *l, subject: q.subject(l, key)}
			if wait, ok := q.rt.limiter.take(id, now); !ok {
				what := "requests"
				if l.Quota {
					what = "requests of the quota"
				}
				return &refusal{code: http.StatusTooManyRequests, grpc: grpcExhausted, wait: wait,
					msg:  fmt.Sprintf("the %d %s per %s in %s are used up", l.Requests, what, l.Per, time.Duration(l.Seconds)*time.Second),
					hint: "try again in " + max(wait, time.Second).Round(time.Second).String()}
			}
		}
		return nil
	}
	if err := check("", p.Limits); err != nil {
		return err
	}
	if key != nil {
		return check(key.ID, key.Limits)
	}
	return nil
}
