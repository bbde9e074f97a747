package daemon

import (
	"context"
	"crypto/hmac"
	"crypto/sha256"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/m3o/m3o"
	"github.com/m3o/m3o/events"
)

// The forms a notification can have.
const (
	formatWebhook = "webhook"
	formatSlack   = "slack"
	formatDiscord = "discord"
)

// eventNames are what a notifier can ask for.
var eventNames = []string{"started", "live", "failed", "recovered", "crashed"}

// The types of events. What the names of a notifier stand for is in wants.
const (
	deployStarted   = "deploy.started"
	deployLive      = "deploy.live"
	deployRecovered = "deploy.recovered" // live, after one that failed
	deployFailed    = "deploy.failed"
	deployHeld      = "deploy.held" // built while locked
	appCrashed      = "app.crashed"
	appRecovered    = "app.recovered" // runs again after a crash
)

// wants reports whether a notifier of these names is told of e. Who asks for
// live hears of a recovery as well, since the app went live.
func wants(names []string, e events.Event) bool {
	has := func(n string) bool { return slices.Contains(names, n) }
	switch e.Type {
	case deployStarted:
		return has("started")
	case deployLive, deployHeld:
		return has("live")
	case deployRecovered:
		return has("recovered") || has("live")
	case deployFailed:
		return has("failed")
	case appCrashed:
		return has("crashed")
	case appRecovered:
		return has("recovered")
	}
	return false
}

// An appEvent is the data of every event. Fields are left out where they do
// not apply.
type appEvent struct {
	App      string `json:"app"`
	URL      string `json:"url,omitempty"`
	Release  string `json:"release,omitempty"`
	Build    int    `json:"build,omitempty"`
	Commit   string `json:"commit,omitempty"`
	Message  string `json:"message,omitempty"` // subject line of the commit
	Branch   string `json:"branch,omitempty"`
	Reason   string `json:"reason,omitempty"`
	User     string `json:"user,omitempty"`
	Error    string `json:"error,omitempty"`
	Process  string `json:"process,omitempty"`
	Instance string `json:"instance,omitempty"`
	Exit     int    `json:"exit,omitempty"`
	OOM      bool   `json:"oom,omitempty"`
}

// eventSummary is an event in one line of words.
func eventSummary(e events.Event) string {
	var a appEvent
	_ = json.Unmarshal(e.Data, &a) // what is missing is left out
	what := ""
	switch {
	case a.Commit != "" && a.Message != "":
		what = fmt.Sprintf(": %s (%.7s)", a.Message, a.Commit)
	case a.Commit != "":
		what = fmt.Sprintf(": %.7s", a.Commit)
	case a.Reason != "":
		what = ": " + a.Reason
	}
	by := ""
	if a.User != "" {
		by = ", by " + a.User
	}
	switch e.Type {
	case "test":
		return fmt.Sprintf("%s: this is a test of its notifications%s", e.App, by)
	case deployStarted:
		return fmt.Sprintf("%s is being deployed%s%s", e.App, what, by)
	case deployLive:
		return fmt.Sprintf("%s %s is live%s%s", e.App, a.Release, what, by)
	case deployRecovered:
		return fmt.Sprintf("%s deploys again, %s is live%s%s", e.App, a.Release, what, by)
	case deployHeld:
		return fmt.Sprintf("%s %s was built and is held back%s%s", e.App, a.Release, what, by)
	case deployFailed:
		return fmt.Sprintf("%s failed to deploy%s%s: %s", e.App, what, by, a.Error)
	case appCrashed:
		if a.OOM {
			return fmt.Sprintf("%s %s crashed: %s was out of memory", e.App, a.Release, a.Process)
		}
		return fmt.Sprintf("%s %s crashed: %s exited with %d", e.App, a.Release, a.Process, a.Exit)
	case appRecovered:
		return fmt.Sprintf("%s %s runs again", e.App, a.Release)
	}
	return e.App + ": " + e.Type
}

// payload is the body of a notification.
func payload(format string, e events.Event) ([]byte, error) {
	text := clip(eventSummary(e), 1500)
	var a appEvent
	_ = json.Unmarshal(e.Data, &a)
	var v any
	switch format {
	case formatSlack:
		// Slack's own three characters; < would begin a mention of everybody.
		esc := strings.NewReplacer("&", "&amp;", "<", "&lt;", ">", "&gt;")
		s := esc.Replace(text)
		if a.URL != "" {
			s += " <" + a.URL + ">"
		}
		v = map[string]any{"text": icon(e.Type) + " " + s}
	case formatDiscord:
		// A commit's message must not call everybody.
		v = map[string]any{"content": icon(e.Type) + " " + text + suffix(a.URL), "allowed_mentions": map[string]any{"parse": []string{}}}
	default:
		data := e.Data
		if len(data) == 0 {
			data = json.RawMessage("{}")
		}
		v = struct {
			Type      string          `json:"type"`
			Timestamp string          `json:"timestamp"`
			Summary   string          `json:"summary"`
			Data      json.RawMessage `json:"data"`
		}{e.Type, e.Time.UTC().Format(time.RFC3339Nano), text, data}
	}
	b, err := json.Marshal(v)
	if err != nil {
		return nil, fmt.Errorf("encode notification: %w", err)
	}
	return b, nil
}

func suffix(u string) string {
	if u == "" {
		return ""
	}
	return " <" + u + ">" // Discord shows no preview of a URL in angle brackets
}

func icon(kind string) string {
	switch kind {
	case deployFailed, appCrashed:
		return "❌"
	case deployStarted, deployHeld:
		return "⏳"
	case deployLive, deployRecovered, appRecovered:
		return "✅"
	}
	return "🔔"
}

func guessFormat(u *url.URL) string {
	switch host := u.Hostname(); {
	case host == "hooks.slack.com":
		return formatSlack
	case (host == "discord.com" || strings.HasSuffix(host, ".discord.com") || host == "discordapp.com") && strings.HasPrefix(u.Path, "/api/webhooks/"):
		return formatDiscord
	}
	return formatWebhook
}

const secretPrefix = "whsec_"

// sign sets the three headers of
// https://github.com/standard-webhooks/standard-webhooks/blob/main/spec/standard-webhooks.md.
func sign(h http.Header, secret m3o.Secret, id string, at time.Time, body []byte) error {
	key, err := base64.StdEncoding.DecodeString(strings.TrimPrefix(secret.Reveal(), secretPrefix))
	if err != nil {
		return errors.New("the signing secret is damaged")
	}
	ts := strconv.FormatInt(at.Unix(), 10)
	mac := hmac.New(sha256.New, key)
	fmt.Fprintf(mac, "%s.%s.%s", id, ts, body)
	h.Set("Webhook-Id", id)
	h.Set("Webhook-Timestamp", ts)
	h.Set("Webhook-Signature", "v1,"+base64.StdEncoding.EncodeToString(mac.Sum(nil)))
	return nil
}

// errInside refuses an address that a stranger must not reach through us.
var errInside = &m3o.Error{Kind: m3o.Denied, Msg: "the URL leads to an address inside, which notifications may not go to",
	Hint: "an admin may allow it: m3od --notify-private"}

// inside lists networks that no method of netip.Addr names.
var inside = []netip.Prefix{
	netip.MustParsePrefix("0.0.0.0/8"),
	netip.MustParsePrefix("100.64.0.0/10"), // carriers' NAT, and many clouds' metadata
	netip.MustParsePrefix("192.0.0.0/24"),
	netip.MustParsePrefix("198.18.0.0/15"), // instances and builds
	netip.MustParsePrefix("240.0.0.0/4"),
	netip.MustParsePrefix("64:ff9b::/96"), // these four carry an IPv4 address
	netip.MustParsePrefix("64:ff9b:1::/48"),
	netip.MustParsePrefix("2002::/16"),
	netip.MustParsePrefix("2001::/32"),
	netip.MustParsePrefix("fec0::/10"),
}

func isInside(a netip.Addr) bool {
	a = a.Unmap().WithZone("")
	if !a.IsGlobalUnicast() || a.IsPrivate() || a.IsLoopback() || a.IsLinkLocalUnicast() {
		return true
	}
	if a.Is6() && !a.Is4In6() && strings.HasPrefix(a.StringExpanded(), "0000:0000:0000:0000:0000:0000:") {
		return true // ::a.b.c.d, an old way to write IPv4
	}
	return slices.ContainsFunc(inside, func(p netip.Prefix) bool { return p.Contains(a) })
}

// outsideClient reaches only the outside unless private is set: the address is
// checked when it is dialled, since a name may have changed its mind since it
// was looked up. It follows no redirect.
func outsideClient(private bool) *http.Client {
	dialer := &net.Dialer{Timeout: 10 * time.Second}
	if !private {
		dialer.Control = func(_, addr string, _ syscall.RawConn) error {
			ap, err := netip.ParseAddrPort(addr)
			if err != nil || isInside(ap.Addr()) {
				return errInside
			}
			return nil
		}
	}
	return &http.Client{
		Transport: &http.Transport{DialContext: dialer.DialContext, TLSHandshakeTimeout: 10 * time.Second, ResponseHeaderTimeout: attemptTime,
			ForceAttemptHTTP2: true, MaxIdleConns: 20, IdleConnTimeout: time.Minute, MaxResponseHeaderBytes: 64 << 10},
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}
}

// outsideError words why a request failed, without the URL, which may be a secret.
func outsideError(err error) error {
	if e, ok := errors.AsType[*m3o.Error](err); ok {
		return e
	}
	if e, ok := errors.AsType[*url.Error](err); ok {
		err = e.Err
	}
	switch {
	case errors.Is(err, context.DeadlineExceeded):
		return fmt.Errorf("no answer within %s", attemptTime)
	case errors.Is(err, syscall.ECONNREFUSED):
		return errors.New("connection refused")
	}
	if e, ok := errors.AsType[*net.DNSError](err); ok {
		if e.IsNotFound {
			return fmt.Errorf("there is no host %s", e.Name)
		}
		return fmt.Errorf("cannot look up %s", e.Name)
	}
	return err
}

// allowed says early what the dial would say too. A name that cannot be looked
// up now may be later.
func (n *notifications) allowed(ctx context.Context, u *url.URL) error {
	if n.d.cfg.NotifyPrivate {
		return nil
	}
	ctx, cancel := context.WithTimeout(ctx, 3*time.Second)
	defer cancel()
	host := u.Hostname()
	if a, err := netip.ParseAddr(host); err == nil {
		if isInside(a) {
			return errInside
		}
		return nil
	}
	if host == "localhost" || strings.HasSuffix(host, ".localhost") || strings.HasSuffix(host, ".internal") || !strings.Contains(host, ".") {
		return errInside
	}
	addrs, err := net.DefaultResolver.LookupNetIP(ctx, "ip", host)
	if err != nil {
		return nil
	}
	if slices.ContainsFunc(addrs, isInside) {
		return errInside
	}
	return nil
}
