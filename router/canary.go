package router

import (
	"fmt"
	"hash/fnv"
	"math"
	"math/rand/v2"
	"net/http"
	"slices"
	"strings"
)

// A Canary is a release that takes a part of the requests of a host beside the
// one that is live.
type Canary struct {
	Release     int      `json:"release"`
	Endpoints   []string `json:"endpoints,omitempty"` // none: the live release takes all
	Protocol    string   `json:"protocol,omitempty"`
	Descriptors string   `json:"descriptors,omitempty"`
	Percent     float64  `json:"percent"` // of requests, or of clients when they stick
	// Sticky keeps a client with one release: "cookie", or "header:NAME" for
	// all requests with the same value of that header. "" chooses for each
	// request anew.
	Sticky string `json:"sticky,omitempty"`
}

// canaryCookie tells which release a browser was given. A release that is
// neither live nor the canary any more is chosen anew.
const canaryCookie = "m3o-release"

func (c *Canary) validate(h *Host, fault func(string, ...any)) {
	if c.Release < 1 || c.Release == h.Release {
		fault("host %q has v%d as the canary of v%d", h.Name, c.Release, h.Release)
	}
	if !slices.Contains([]string{"", HTTP1, H2C, GRPC, TCP}, c.Protocol) {
		fault("host %q: the canary has the unknown protocol %q", h.Name, c.Protocol)
	}
	if math.IsNaN(c.Percent) || c.Percent < 0 || c.Percent > 100 {
		fault("host %q: the canary takes %v percent", h.Name, c.Percent)
	}
	if name, ok := strings.CutPrefix(c.Sticky, "header:"); c.Sticky != "" && c.Sticky != "cookie" && (!ok || !ValidHeaderName(name)) {
		fault("host %q: the canary sticks by %q, which is neither cookie nor header:NAME", h.Name, c.Sticky)
	}
	validateEndpoints(h.Name, c.Endpoints, fault)
}

// ValidHeaderName says whether s can be the name of a header.
func ValidHeaderName(s string) bool {
	return s != "" && len(s) <= 100 && strings.Trim(strings.ToLower(s), "abcdefghijklmnopqrstuvwxyz0123456789-_") == ""
}

// divide leads the request to the canary when it is one of its share.
func (q *request) divide() {
	c := q.host.canary
	if c == nil || len(c.pool) == 0 {
		return
	}
	switch sticky := q.host.Canary.Sticky; {
	case sticky == "cookie":
		live, canary := fmt.Sprintf("v%d", q.host.Release), fmt.Sprintf("v%d", c.Release)
		if k, err := q.r.Cookie(canaryCookie); err == nil && (k.Value == live || k.Value == canary) {
			q.toCanary = k.Value == canary
			break
		}
		q.toCanary = rand.Float64()*100 < q.host.Canary.Percent
		k := http.Cookie{Name: canaryCookie, Value: live, Path: "/", MaxAge: 24 * 3600, HttpOnly: true, Secure: q.r.TLS != nil, SameSite: http.SameSiteLaxMode}
		if q.toCanary {
			k.Value = canary
		}
		q.rec.cookie = k.String()
	case sticky != "" && q.r.Header.Get(strings.TrimPrefix(sticky, "header:")) != "":
		h := fnv.New64a()
		_, _ = h.Write([]byte(q.r.Header.Get(strings.TrimPrefix(sticky, "header:"))))
		// The low digits of the sum are spread evenly, not its high bits.
		q.toCanary = float64(h.Sum64()%10_000)/100 < q.host.Canary.Percent
	default:
		q.toCanary = rand.Float64()*100 < q.host.Canary.Percent
	}
	if q.toCanary {
		q.host = c
	}
}
