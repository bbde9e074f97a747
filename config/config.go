// Package config keeps the settings of each app: environment variables, in
// immutable numbered revisions. Every value is sealed at rest with a key that
// is not in the store; those marked secret are given to nothing but the
// process (Env).
//
// It does not know how they reach a process.
package config

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"hash/fnv"
	"log/slog"
	"maps"
	"regexp"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/m3o/m3o"
	"github.com/m3o/m3o/store"
)

// Limits of one app's config.
const (
	MaxVars  = 1000
	MaxValue = 64 << 10 // bytes of one value
)

// A Var is one environment variable.
type Var struct {
	Name   string
	Value  m3o.Secret // "" in a Revision when Secret
	Secret bool       // shown to nobody, once set
}

// A Revision is an app's whole config at one time. It never changes. Number 0
// is the empty config an app begins with.
type Revision struct {
	App     string
	Number  int
	Vars    []Var // by name; values of secret ones are left out
	User    string
	Created time.Time // UTC
}

// Config is the settings of all apps. It is safe for concurrent use.
type Config struct {
	log   *slog.Logger
	seal  sealer
	heads *store.Bucket[head]   // by app
	revs  *store.Bucket[record] // by app/number
	vals  *store.Bucket[sealed] // by app/number/name

	locks [64]sync.Mutex // see lock
}

// head is the number of an app's current revision.
type head struct{ Number int }

// record is a revision as stored. A value stays where it was first sealed: a
// change of one variable writes one value.
type record struct {
	App     string
	Number  int
	Vars    []ref
	User    string
	Created time.Time
}

// ref says which revision sealed the value of a variable.
type ref struct {
	Name   string
	Secret bool
	Sealed int
}

// Open opens the config kept in st. key seals the values; it must be the same
// for ever, and be kept apart from the store.
func Open(ctx context.Context, st *store.Store, key [32]byte, log *slog.Logger) (*Config, error) {
	if log == nil {
		log = slog.New(slog.DiscardHandler)
	}
	c := &Config{log: log}
	var err error
	if c.seal, err = newSealer(key); err != nil {
		return nil, fmt.Errorf("open config: %w", err)
	}
	if c.heads, err = store.NewBucket[head](ctx, st, "config"); err != nil {
		return nil, fmt.Errorf("open config: %w", err)
	}
	if c.revs, err = store.NewBucket[record](ctx, st, "config-revisions"); err != nil {
		return nil, fmt.Errorf("open config: %w", err)
	}
	if c.vals, err = store.NewBucket[sealed](ctx, st, "config-values"); err != nil {
		return nil, fmt.Errorf("open config: %w", err)
	}
	if err := c.checkKey(ctx); err != nil {
		return nil, fmt.Errorf("open config: %w", err)
	}
	return c, nil
}

// checkKey opens a value sealed when the store was new, so that a wrong key
// is found at the start and not in the middle of a deploy.
func (c *Config) checkKey(ctx context.Context) error {
	const key, text = "key-check", "m3o"
	where := place("", 0, key, true)
	for {
		box, _, err := c.vals.Get(ctx, key)
		if err == nil {
			_, err = c.seal.open(box, where)
			return err
		}
		if m3o.KindOf(err) != m3o.NotFound {
			return err
		}
		if _, err := c.vals.Create(ctx, key, c.seal.seal(text, where)); err != nil && m3o.KindOf(err) != m3o.Conflict {
			return err
		}
	}
}

// lock is the lock of an app's name, shared with a few others. Change and
// RemoveApp hold it across store calls, so that neither works behind the
// other's back.
func (c *Config) lock(app string) *sync.Mutex {
	h := fnv.New32a()
	_, _ = h.Write([]byte(app))
	return &c.locks[h.Sum32()%uint32(len(c.locks))]
}

func revKey(app string, n int) string { return fmt.Sprintf("%s/%010d", app, n) }

func valKey(app string, n int, name string) string { return revKey(app, n) + "/" + name }

// Current is the newest revision of app, revision 0 when nothing was ever set.
func (c *Config) Current(ctx context.Context, app string) (Revision, error) {
	r, _, err := c.current(ctx, app)
	if err != nil {
		return Revision{}, err
	}
	return c.open(ctx, r)
}

func (c *Config) current(ctx context.Context, app string) (record, store.Rev, error) {
	if err := m3o.CheckName(app); err != nil {
		return record{}, 0, err
	}
	h, rev, err := c.heads.Get(ctx, app)
	if m3o.KindOf(err) == m3o.NotFound {
		return record{App: app}, 0, nil
	}
	if err != nil {
		return record{}, 0, fmt.Errorf("read config of %s: %w", app, err)
	}
	r, err := c.at(ctx, app, h.Number)
	return r, rev, err
}

// At is revision n of app, or NotFound.
func (c *Config) At(ctx context.Context, app string, n int) (Revision, error) {
	r, err := c.at(ctx, app, n)
	if err != nil {
		return Revision{}, err
	}
	return c.open(ctx, r)
}

func (c *Config) at(ctx context.Context, app string, n int) (record, error) {
	if err := m3o.CheckName(app); err != nil {
		return record{}, err
	}
	if n == 0 {
		return record{App: app}, nil
	}
	r, _, err := c.revs.Get(ctx, revKey(app, n))
	if m3o.KindOf(err) == m3o.NotFound {
		return record{}, &m3o.Error{Kind: m3o.NotFound, Msg: fmt.Sprintf("%s has no config revision %d", app, n), Err: err}
	}
	if err != nil {
		return record{}, fmt.Errorf("read config revision %d of %s: %w", n, app, err)
	}
	return r, nil
}

// open makes the Revision that may be shown.
func (c *Config) open(ctx context.Context, r record) (Revision, error) {
	rev := Revision{App: r.App, Number: r.Number, User: r.User, Created: r.Created}
	for _, v := range r.Vars {
		shown := Var{Name: v.Name, Secret: v.Secret}
		if !v.Secret {
			value, err := c.value(ctx, r.App, v)
			if err != nil {
				return Revision{}, err
			}
			shown.Value = value
		}
		rev.Vars = append(rev.Vars, shown)
	}
	return rev, nil
}

func (c *Config) value(ctx context.Context, app string, v ref) (m3o.Secret, error) {
	box, _, err := c.vals.Get(ctx, valKey(app, v.Sealed, v.Name))
	if err != nil {
		return "", fmt.Errorf("read config value %s of %s: %w", v.Name, app, err)
	}
	s, err := c.seal.open(box, place(app, v.Sealed, v.Name, v.Secret))
	if err != nil {
		return "", fmt.Errorf("open config value %s of %s: %w", v.Name, app, err)
	}
	return s, nil
}

// Env is what a process of app with config revision n has in its environment,
// as "NAME=value", by name. It is the one place that gives secret values.
func (c *Config) Env(ctx context.Context, app string, n int) ([]string, error) {
	r, err := c.at(ctx, app, n)
	if err != nil {
		return nil, err
	}
	env := make([]string, 0, len(r.Vars))
	for _, v := range r.Vars {
		value, err := c.value(ctx, app, v)
		if err != nil {
			return nil, err
		}
		env = append(env, v.Name+"="+value.Reveal())
	}
	return env, nil
}

// Change sets and unsets variables and returns the new revision, or the
// current one when nothing would change. Numbers grow, and a change that failed
// may leave one out. A variable that is secret stays so
// when it is set again. Unsetting what is not set is no error. Conflict when
// another process changed the config meanwhile.
func (c *Config) Change(ctx context.Context, app, user string, set []Var, unset []string) (Revision, error) {
	if err := check(set, unset); err != nil {
		return Revision{}, err
	}
	lock := c.lock(app)
	lock.Lock()
	defer lock.Unlock()
	was, rev, err := c.current(ctx, app)
	if err != nil {
		return Revision{}, err
	}
	next, fresh, err := c.plan(ctx, was, set, unset)
	if err != nil {
		return Revision{}, err
	}
	if next.Number == was.Number {
		return c.open(ctx, was)
	}
	if len(next.Vars) > MaxVars {
		return Revision{}, &m3o.Error{Kind: m3o.Invalid, Msg: fmt.Sprintf("%s would have %d config variables; %d are allowed", app, len(next.Vars), MaxVars),
			Hint: "unset some first"}
	}
	next.User, next.Created = user, time.Now().UTC()
	// The number is taken first, for ever, and the head moves last: until then
	// nothing refers to what is written here. What a crash leaves stays unused.
	if next, err = c.reserve(ctx, next); err != nil {
		return Revision{}, err
	}
	for _, v := range fresh {
		box := c.seal.seal(v.Value, place(app, next.Number, v.Name, v.Secret))
		if _, err := c.vals.Put(ctx, valKey(app, next.Number, v.Name), box); err != nil {
			return Revision{}, fmt.Errorf("write config of %s: %w", app, err)
		}
	}
	if err := c.move(ctx, app, next.Number, rev); err != nil {
		return Revision{}, err
	}
	c.log.Info("config changed", "app", app, "revision", next.Number, "user", user)
	return c.open(ctx, next)
}

// reserve writes r under the first free number from its own on.
func (c *Config) reserve(ctx context.Context, r record) (record, error) {
	for {
		_, err := c.revs.Create(ctx, revKey(r.App, r.Number), r)
		if err == nil {
			return r, nil
		}
		if m3o.KindOf(err) != m3o.Conflict {
			return record{}, fmt.Errorf("write config of %s: %w", r.App, err)
		}
		for i := range r.Vars {
			if r.Vars[i].Sealed == r.Number {
				r.Vars[i].Sealed++
			}
		}
		r.Number++
	}
}

func (c *Config) move(ctx context.Context, app string, to int, rev store.Rev) error {
	var err error
	if rev == 0 {
		_, err = c.heads.Create(ctx, app, head{to})
	} else {
		_, err = c.heads.Update(ctx, app, head{to}, rev)
	}
	if m3o.KindOf(err) == m3o.Conflict {
		return &m3o.Error{Kind: m3o.Conflict, Msg: "the config of " + app + " has changed meanwhile", Hint: "try again", Err: err}
	}
	if err != nil {
		return fmt.Errorf("write config of %s: %w", app, err)
	}
	return nil
}

// plan is what the next revision refers to, and the values it must seal. It
// has the number of was when nothing changes.
func (c *Config) plan(ctx context.Context, was record, set []Var, unset []string) (record, []Var, error) {
	vars := map[string]ref{}
	for _, v := range was.Vars {
		vars[v.Name] = v
	}
	next := record{App: was.App, Number: was.Number + 1}
	changed := false
	for _, name := range unset {
		if _, ok := vars[name]; ok {
			delete(vars, name)
			changed = true
		}
	}
	var fresh []Var
	for _, v := range set {
		old, ok := vars[v.Name]
		secret := v.Secret || ok && old.Secret
		if ok && old.Secret == secret {
			value, err := c.value(ctx, was.App, old)
			if err != nil {
				return record{}, nil, err
			}
			if value == v.Value {
				continue
			}
		}
		vars[v.Name] = ref{Name: v.Name, Secret: secret, Sealed: next.Number}
		fresh = append(fresh, Var{Name: v.Name, Value: v.Value, Secret: secret})
		changed = true
	}
	if !changed {
		return was, nil, nil
	}
	next.Vars = slices.SortedFunc(maps.Values(vars), func(x, y ref) int { return cmp.Compare(x.Name, y.Name) })
	return next, fresh, nil
}

// RemoveApp removes all revisions of app.
func (c *Config) RemoveApp(ctx context.Context, app string) error {
	lock := c.lock(app)
	lock.Lock()
	defer lock.Unlock()
	// The head first: what no head refers to is not there.
	if err := c.heads.Delete(ctx, app, 0); err != nil {
		return fmt.Errorf("remove config of %s: %w", app, err)
	}
	if err := errors.Join(removeAll(ctx, c.revs, app), removeAll(ctx, c.vals, app)); err != nil {
		return fmt.Errorf("remove config of %s: %w", app, err)
	}
	return nil
}

func removeAll[T any](ctx context.Context, b *store.Bucket[T], app string) error {
	entries, err := b.List(ctx, app+"/")
	if err != nil {
		return err
	}
	for _, e := range entries {
		if err := b.Delete(ctx, e.Key, 0); err != nil {
			return err
		}
	}
	return nil
}

var varName = regexp.MustCompile(`^[A-Za-z_][A-Za-z0-9_]{0,254}$`)

// check reports every fault of a change at once. It never says a value.
func check(set []Var, unset []string) error {
	var errs []error
	seen := map[string]bool{}
	for _, v := range set {
		if err := checkName(v.Name); err != nil {
			errs = append(errs, err)
		}
		if seen[v.Name] {
			errs = append(errs, fmt.Errorf("%s is set twice", v.Name))
		}
		seen[v.Name] = true
		if len(v.Value) > MaxValue {
			errs = append(errs, fmt.Errorf("the value of %s has %d bytes; %d are allowed", v.Name, len(v.Value), MaxValue))
		}
		if strings.ContainsRune(v.Value.Reveal(), 0) {
			errs = append(errs, fmt.Errorf("the value of %s has a NUL byte, which an environment cannot hold", v.Name))
		}
	}
	for _, name := range unset {
		if seen[name] {
			errs = append(errs, fmt.Errorf("%s is both set and unset", name))
		}
	}
	if len(set) > MaxVars {
		errs = append(errs, fmt.Errorf("%d variables are set at once; %d are allowed", len(set), MaxVars))
	}
	if err := errors.Join(errs...); err != nil {
		return &m3o.Error{Kind: m3o.Invalid, Msg: err.Error(), Err: err,
			Hint: "names are letters, digits and _, not beginning with a digit or M3O_, and not PORT"}
	}
	return nil
}

func checkName(name string) error {
	switch {
	case !varName.MatchString(name):
		return fmt.Errorf("%.40q is not a name for a variable", name)
	case name == "PORT" || strings.HasPrefix(name, "M3O_"):
		return fmt.Errorf("%s is reserved: the platform sets it", name)
	}
	return nil
}
