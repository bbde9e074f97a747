package daemon

import (
	"cmp"
	"context"
	"crypto/rand"
	"crypto/sha256"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/m3o/m3o"
	"github.com/m3o/m3o/auth"
	"github.com/m3o/m3o/router"
	"github.com/m3o/m3o/store"
)

// appAccess is what was set about who may use an app's URL.
type appAccess struct {
	Private *bool               `json:"private,omitempty"` // nil: the installation's default
	Rules   []router.AccessRule `json:"rules,omitempty"`
	Limits  []router.RateLimit  `json:"limits,omitempty"`
	Keys    []apiKey            `json:"keys,omitempty"`
}

// apiKey is an API key of an app. Its secret is kept only as a hash, in the
// part that the router gets.
type apiKey struct {
	router.APIKey
	Name    string    `json:"name"`
	User    string    `json:"user"` // who made it
	Created time.Time `json:"created"`
}

// access keeps what was set of every app, in the store and in memory, and
// gives the router its policies.
type access struct {
	bucket  *store.Bucket[appAccess]
	private bool // the default
	routes  *routes
	now     func() time.Time

	mu   sync.Mutex // guards apps; held across store calls, which makes changes one of reading and writing
	apps map[string]appAccess
}

func openAccess(ctx context.Context, st *store.Store, private bool, r *routes) (*access, error) {
	b, err := store.NewBucket[appAccess](ctx, st, "access")
	if err != nil {
		return nil, fmt.Errorf("open access rules: %w", err)
	}
	entries, err := b.List(ctx, "")
	if err != nil {
		return nil, fmt.Errorf("read access rules: %w", err)
	}
	a := &access{bucket: b, private: private, routes: r, now: time.Now, apps: map[string]appAccess{}}
	for _, e := range entries {
		a.apps[e.Key] = e.Value
	}
	r.policy = a.policy
	return a, nil
}

// get is what was set of app. A preview without settings has its parent's.
func (a *access) get(app string) appAccess {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.apps[app].clone()
}

func (x appAccess) clone() appAccess {
	x.Rules, x.Limits, x.Keys = slices.Clone(x.Rules), slices.Clone(x.Limits), slices.Clone(x.Keys)
	return x
}

// isPrivate says whether only callers may use app.
func (a *access) isPrivate(app string) bool {
	if p := a.get(app).Private; p != nil {
		return *p
	}
	return a.private
}

// policy is what the router is to ask of app's requests; nil for nothing.
func (a *access) policy(app string) *router.Policy {
	x := a.get(app)
	p := &router.Policy{Private: a.isPrivate(app), Rules: x.Rules, Limits: x.Limits}
	for _, k := range x.Keys {
		p.Keys = append(p.Keys, k.APIKey)
	}
	if !p.Private && p.Rules == nil && p.Keys == nil && p.Limits == nil {
		return nil
	}
	return p
}

// change edits what is set of app, keeps it and has the router follow.
func (a *access) change(ctx context.Context, app string, edit func(*appAccess) error) error {
	if err := a.edit(ctx, app, edit); err != nil {
		return err
	}
	wctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	return a.routes.repolicy(wctx, app)
}

func (a *access) edit(ctx context.Context, app string, edit func(*appAccess) error) error {
	a.mu.Lock()
	defer a.mu.Unlock()
	x := a.apps[app].clone()
	if err := edit(&x); err != nil {
		return err
	}
	if err := (&router.Policy{Rules: x.Rules, Limits: x.Limits, Keys: routerKeys(x.Keys)}).Validate(); err != nil {
		return err
	}
	if _, err := a.bucket.Put(ctx, app, x); err != nil {
		return fmt.Errorf("keep access rules of %s: %w", app, err)
	}
	a.apps[app] = x
	return nil
}

func routerKeys(keys []apiKey) []router.APIKey {
	var out []router.APIKey
	for _, k := range keys {
		out = append(out, k.APIKey)
	}
	return out
}

// forget removes what was set of an app that is destroyed.
func (a *access) forget(ctx context.Context, app string) error {
	a.mu.Lock()
	defer a.mu.Unlock()
	if err := a.bucket.Delete(ctx, app, 0); err != nil && m3o.KindOf(err) != m3o.NotFound {
		return fmt.Errorf("remove access rules of %s: %w", app, err)
	}
	delete(a.apps, app)
	return nil
}

func (a *access) setPrivate(ctx context.Context, app string, private bool) error {
	return a.change(ctx, app, func(x *appAccess) error { x.Private = &private; return nil })
}

// setRule changes the rule of a path, or adds it. More exact paths are asked
// first, so that the order in which rules are set does not matter.
func (a *access) setRule(ctx context.Context, app string, r router.AccessRule) error {
	return a.change(ctx, app, func(x *appAccess) error {
		x.Rules = slices.DeleteFunc(x.Rules, func(o router.AccessRule) bool { return o.Path == r.Path })
		x.Rules = append(x.Rules, r)
		slices.SortFunc(x.Rules, func(a, b router.AccessRule) int {
			return cmp.Or(cmp.Compare(exactness(b.Path), exactness(a.Path)), cmp.Compare(a.Path, b.Path))
		})
		return nil
	})
}

// exactness orders patterns: a whole path before any prefix, a long prefix
// before a short one.
func exactness(p string) int {
	if strings.HasSuffix(p, "*") {
		return len(p)
	}
	return 1 << 20
}

func (a *access) removeRule(ctx context.Context, app, path string) error {
	return a.change(ctx, app, func(x *appAccess) error {
		n := len(x.Rules)
		if x.Rules = slices.DeleteFunc(x.Rules, func(o router.AccessRule) bool { return o.Path == path }); len(x.Rules) == n {
			return &m3o.Error{Kind: m3o.NotFound, Msg: fmt.Sprintf("%s has no rule for %q", app, path), Hint: "m3o access -a " + app}
		}
		return nil
	})
}

func sameCount(a, b router.RateLimit) bool {
	return a.Per == b.Per && a.Path == b.Path && a.Quota == b.Quota
}

func (a *access) setLimit(ctx context.Context, app string, l router.RateLimit) error {
	return a.change(ctx, app, func(x *appAccess) error {
		x.Limits = slices.DeleteFunc(x.Limits, func(o router.RateLimit) bool { return sameCount(o, l) })
		x.Limits = append(x.Limits, l)
		return nil
	})
}

func (a *access) removeLimit(ctx context.Context, app, per, path string) error {
	return a.change(ctx, app, func(x *appAccess) error {
		n := len(x.Limits)
		x.Limits = slices.DeleteFunc(x.Limits, func(o router.RateLimit) bool { return o.Per == per && o.Path == path })
		if len(x.Limits) == n {
			return &m3o.Error{Kind: m3o.NotFound, Msg: fmt.Sprintf("%s has no limit per %s%s", app, per, forPath(path)), Hint: "m3o access -a " + app}
		}
		return nil
	})
}

func forPath(p string) string {
	if p == "" {
		return ""
	}
	return " for " + p
}

// apiKeyPrefix lets scanners for leaked secrets know a key.
const apiKeyPrefix = "m3ok_"

// maxAPIKeyTTL is longer than any key should live that has an end at all.
const maxAPIKeyTTL = 10 * 366 * 24 * time.Hour

// createKey makes an API key; the secret is not kept.
func (a *access) createKey(ctx context.Context, app string, k apiKey, ttl time.Duration) (apiKey, m3o.Secret, error) {
	if k.Name == "" || len(k.Name) > 64 || strings.ContainsFunc(k.Name, func(r rune) bool { return r < ' ' || r == 0x7f }) {
		return k, "", &m3o.Error{Kind: m3o.Invalid, Msg: "a key needs a name of at most 64 characters", Hint: "m3o apikeys:create billing -a " + app}
	}
	if ttl < 0 || ttl > maxAPIKeyTTL {
		return k, "", &m3o.Error{Kind: m3o.Invalid, Msg: "a key lasts at most ten years, or for ever", Hint: "--expires 90d"}
	}
	raw := make([]byte, 32)
	if _, err := rand.Read(raw); err != nil {
		return k, "", fmt.Errorf("make API key: %w", err)
	}
	secret := m3o.Secret(apiKeyPrefix + base64.RawURLEncoding.EncodeToString(raw))
	sum := sha256.Sum256([]byte(secret.Reveal()))
	k.Hash, k.ID, k.Created = hex.EncodeToString(sum[:]), "k"+hex.EncodeToString(sum[:4]), a.now().UTC()
	if ttl > 0 {
		k.Expires = k.Created.Add(ttl).Unix()
	}
	err := a.change(ctx, app, func(x *appAccess) error {
		for _, o := range x.Keys {
			if o.Name == k.Name {
				return &m3o.Error{Kind: m3o.Conflict, Msg: fmt.Sprintf("%s has an API key called %q", app, k.Name), Hint: "m3o apikeys:revoke " + o.ID + " ends it, or choose another name"}
			}
		}
		x.Keys = append(x.Keys, k)
		return nil
	})
	return k, secret, err
}

func (a *access) revokeKey(ctx context.Context, app, id string) error {
	return a.change(ctx, app, func(x *appAccess) error {
		n := len(x.Keys)
		if x.Keys = slices.DeleteFunc(x.Keys, func(k apiKey) bool { return k.ID == id || k.Name == id }); len(x.Keys) == n {
			return &m3o.Error{Kind: m3o.NotFound, Msg: fmt.Sprintf("%s has no API key %q", app, id), Hint: "m3o apikeys -a " + app}
		}
		return nil
	})
}

// accessLine tells a pusher who may use the app's URL, and how to change it.
func (d *Daemon) accessLine(app string) string {
	if d.access.isPrivate(app) {
		return "Access: private (m3o access:public -a " + app + " opens it)"
	}
	return "Access: public (m3o access:private -a " + app + " closes it)"
}

// verify answers the router whether a bearer token is that of a user who may
// see a private app. It is served on the API's socket only, at a path that the
// router relays nothing to.
func (d *Daemon) verify(w http.ResponseWriter, r *http.Request) {
	var req router.VerifyRequest
	if err := json.NewDecoder(io.LimitReader(r.Body, 16<<10)).Decode(&req); err != nil {
		http.Error(w, "not a question", http.StatusBadRequest)
		return
	}
	var v router.Verdict
	who, err := d.auth.Verify(r.Context(), m3o.Secret(req.Token))
	if err == nil {
		who.Via = "router"
		if err = d.auth.Allow(r.Context(), who, auth.AppsRead, req.App); err == nil {
			v.User = who.User
		}
	}
	if err != nil && m3o.KindOf(err) != m3o.Denied && m3o.KindOf(err) != m3o.NotFound {
		d.log.Error("check a token for the router", "app", req.App, "err", err)
		http.Error(w, "cannot be checked", http.StatusInternalServerError)
		return
	}
	w.Header().Set("Content-Type", "application/json")
	_ = json.NewEncoder(w).Encode(v) // the router is gone: it asks again
}
