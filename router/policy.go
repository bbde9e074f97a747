package router

import (
	"encoding/hex"
	"fmt"
	"slices"
	"strings"

	"github.com/m3o/m3o"
)

// A Policy is what an app asks of its requests before they reach it. Every
// protocol meets the same one, before it is told apart. What a policy does not
// allow is refused; the zero Policy allows everybody everything.
type Policy struct {
	// Private lets in only callers: users who may see the app, by their bearer
	// token, and holders of one of Keys.
	Private bool         `json:"private,omitempty"`
	Rules   []AccessRule `json:"rules,omitempty"` // the first that matches decides, before Private
	Keys    []APIKey     `json:"keys,omitempty"`
	Limits  []RateLimit  `json:"limits,omitempty"` // all that match count, the first that is spent refuses
}

// The verdicts of an AccessRule.
const (
	AllowPublic  = "public"  // anybody
	AllowPrivate = "private" // callers, as Policy.Private
	AllowNobody  = "deny"
)

// An AccessRule says who may use some of an app.
type AccessRule struct {
	// Path is "/package.Service/Method" of a call, in whatever protocol or by
	// whatever path it is made, else the path of the request. A last "*" stands
	// for anything: "/shop.v1.Admin/*", "/internal/*", "*".
	Path   string `json:"path"`
	Access string `json:"access"`
}

// An APIKey lets programs in. Only the hash of what they show is kept.
type APIKey struct {
	Hash    string      `json:"hash"`              // SHA-256 of the key, hex
	ID      string      `json:"id"`                // names it in records and to the app
	Account string      `json:"account,omitempty"` // whose it is; limits may count by it
	Expires int64       `json:"expires,omitempty"` // unix seconds, 0 for never
	Scopes  []string    `json:"scopes,omitempty"`  // paths as in AccessRule; none means all
	Limits  []RateLimit `json:"limits,omitempty"`  // of this key alone
}

// What a RateLimit counts apart.
const (
	PerApp     = "app"     // nothing: all requests together
	PerAddress = "address" // addresses of clients, an IPv6 /64 as one
	PerKey     = "key"     // callers: API keys, users
	PerAccount = "account" // accounts of API keys; a key without one is its own
)

// A RateLimit bounds requests. A rate refills evenly and allows Requests at
// once; a quota is counted anew in every window of the calendar, in UTC.
type RateLimit struct {
	Per      string `json:"per"`
	Path     string `json:"path,omitempty"` // as in AccessRule; "" for all
	Requests int64  `json:"requests"`
	Seconds  int64  `json:"seconds"`         // of the window
	Quota    bool   `json:"quota,omitempty"` // survives a restart of the router
}

const (
	maxRules  = 1_000
	maxKeys   = 1_000
	maxLimits = 100
)

// Validate reports every fault of the policy at once, as one Invalid error.
func (p *Policy) Validate() error {
	var faults []string
	p.validate(func(format string, args ...any) {
		if len(faults) < 20 {
			faults = append(faults, fmt.Sprintf(format, args...))
		}
	})
	if faults == nil {
		return nil
	}
	return &m3o.Error{Kind: m3o.Invalid, Msg: strings.Join(faults, "; ")}
}

func (p *Policy) validate(fault func(string, ...any)) {
	if len(p.Rules) > maxRules || len(p.Keys) > maxKeys || len(p.Limits) > maxLimits {
		fault("a policy has %d rules, %d keys and %d limits, more than %d, %d or %d", len(p.Rules), len(p.Keys), len(p.Limits), maxRules, maxKeys, maxLimits)
		return
	}
	for _, r := range p.Rules {
		if !ValidPattern(r.Path) {
			fault("rule for %q: want a path such as /package.Service/* or /admin/*", r.Path)
		}
		if !slices.Contains([]string{AllowPublic, AllowPrivate, AllowNobody}, r.Access) {
			fault("rule for %q has the unknown access %q", r.Path, r.Access)
		}
	}
	for _, l := range p.Limits {
		l.validate(fault)
	}
	for _, k := range p.Keys {
		if b, err := hex.DecodeString(k.Hash); err != nil || len(b) != 32 || k.ID == "" {
			fault("key %q has no hash or no id", k.ID)
		}
		for _, s := range k.Scopes {
			if !ValidPattern(s) {
				fault("key %q has the scope %q, which is not a path", k.ID, s)
			}
		}
		for _, l := range k.Limits {
			l.validate(fault)
		}
	}
}

func (l RateLimit) validate(fault func(string, ...any)) {
	const year = 366 * 24 * 3600
	if !slices.Contains([]string{PerApp, PerAddress, PerKey, PerAccount}, l.Per) {
		fault("a limit counts by %q, which is none of app, address, key, account", l.Per)
	}
	if l.Requests < 1 || l.Requests > 1e12 || l.Seconds < 1 || l.Seconds > year {
		fault("a limit of %d requests in %d seconds is not one", l.Requests, l.Seconds)
	}
	if l.Path != "" && !ValidPattern(l.Path) {
		fault("a limit for %q: want a path such as /package.Service/*", l.Path)
	}
}

// ValidPattern says whether s can be an AccessRule's path.
func ValidPattern(s string) bool {
	if len(s) > 512 || s == "" || s[0] != '/' && s != "*" {
		return false
	}
	if i := strings.IndexByte(s, '*'); i >= 0 && i != len(s)-1 {
		return false
	}
	return !strings.ContainsAny(s, " \t\r\n?#\x00")
}

func matches(pattern, path string) bool {
	if prefix, ok := strings.CutSuffix(pattern, "*"); ok {
		// "/a/*" is about /a as well: who closes a folder means its index.
		return strings.HasPrefix(path, prefix) || len(prefix) > 1 && path == strings.TrimSuffix(prefix, "/")
	}
	return pattern == path
}

// An aim is what rules are asked about: the method of a call, "" for none,
// and the path it was made by.
type aim struct{ method, path string }

func (t aim) matches(pattern string) bool {
	return t.method != "" && matches(pattern, t.method) || matches(pattern, t.path)
}

// access says what p asks of a request: the word of the first rule about its
// method, else about its path, else that of the whole app. A rule about the
// path of a call that has a method can only make it stricter, so that neither
// kind of rule is got round by the other.
func (p *Policy) access(t aim) string {
	byPath := p.rule(t.path)
	if t.method == "" || t.method == t.path {
		return p.orWhole(byPath)
	}
	access := p.orWhole(p.rule(t.method))
	if strictness[byPath] > strictness[access] {
		return byPath
	}
	return access
}

var strictness = map[string]int{AllowPublic: 1, AllowPrivate: 2, AllowNobody: 3}

func (p *Policy) rule(path string) string {
	for _, r := range p.Rules {
		if matches(r.Path, path) {
			return r.Access
		}
	}
	return ""
}

func (p *Policy) orWhole(access string) string {
	switch {
	case access != "":
		return access
	case p.Private:
		return AllowPrivate
	}
	return AllowPublic
}

// compiled is a Policy with its keys found by hash.
type compiled struct {
	*Policy
	keys map[[32]byte]*APIKey
}

func compilePolicy(p *Policy) *compiled {
	if p == nil {
		return nil
	}
	c := &compiled{p, make(map[[32]byte]*APIKey, len(p.Keys))}
	for i := range p.Keys {
		var h [32]byte
		b, _ := hex.DecodeString(p.Keys[i].Hash) // the table was validated
		copy(h[:], b)
		c.keys[h] = &p.Keys[i]
	}
	return c
}
