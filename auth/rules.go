package auth

import (
	"cmp"
	"context"
	"encoding/json"
	"fmt"
	"maps"
	"slices"
	"time"

	"github.com/m3o/m3o"
)

// A Role is what a user is to an app. Each may all that the ones after it may.
type Role string

// The roles, from the strongest down.
const (
	Owner    Role = "owner"
	Deployer Role = "deployer"
	Viewer   Role = "viewer"
)

var rank = map[Role]int{Viewer: 1, Deployer: 2, Owner: 3}

// A Rule gives a user a role in an app.
type Rule struct {
	App     string
	User    string
	Role    Role
	Created time.Time // UTC
}

// Who asks: a user, and how they came, for the audit line.
type Who struct {
	User  string
	Admin bool
	Via   string // "git", "token", "web" …
}

// A Verb is something that can be done.
type Verb string

// The verbs. The comment says what they are done to.
const (
	AppsList       Verb = "apps.list"       // nothing; the list itself is filtered by AppsRead
	AppsCreate     Verb = "apps.create"     // app
	AppsRead       Verb = "apps.read"       // app: releases, builds, processes, routes
	AppsDestroy    Verb = "apps.destroy"    // app
	Push           Verb = "git.push"        // app
	Fetch          Verb = "git.fetch"       // app
	Rollback       Verb = "releases.write"  // app
	ProcessesWrite Verb = "processes.write" // app: scale, restart, run
	VolumesDestroy Verb = "volumes.destroy" // app: data that no rollback brings back
	ConfigRead     Verb = "config.read"     // app
	ConfigWrite    Verb = "config.write"    // app
	DomainsWrite   Verb = "domains.write"   // app
	LogsRead       Verb = "logs.read"       // app
	RepoRead       Verb = "repo.read"       // app
	RepoConnect    Verb = "repo.connect"    // app: tie it to a repository elsewhere, or not any more
	RepoDeploy     Verb = "repo.deploy"     // app: work on a delivery again, approve a fork's preview, remove one
	AccessRead     Verb = "access.read"     // app: who has which role
	AccessWrite    Verb = "access.write"    // app
	KeysRead       Verb = "keys.read"       // user
	KeysWrite      Verb = "keys.write"      // user
	TokensWrite    Verb = "tokens.write"    // user
	UsersRead      Verb = "users.read"      // nothing
	UsersWrite     Verb = "users.write"     // user
	AuditRead      Verb = "audit.read"      // nothing
	SchedulesWrite Verb = "schedules.write" // app
	NotifyWrite    Verb = "notify.write"    // app: where its notifications go
	DeployWrite    Verb = "deploy.write"    // app: branch, paths, lock, hooks, publishing
	ServerRead     Verb = "server.read"     // nothing: how the installation does
)

// A policy says who may a verb beside the admins.
type policy struct {
	changes bool // its decisions are audited
	anyone  bool // every user
	self    bool // the user it is done to
	role    Role // who has this role or a stronger one in the app
}

var policies = map[Verb]policy{
	AppsList:       {anyone: true},
	AppsCreate:     {anyone: true, changes: true},
	AppsRead:       {role: Viewer},
	AppsDestroy:    {role: Owner, changes: true},
	Push:           {role: Deployer, changes: true},
	Fetch:          {role: Viewer},
	Rollback:       {role: Deployer, changes: true},
	ProcessesWrite: {role: Deployer, changes: true},
	VolumesDestroy: {role: Owner, changes: true},
	ConfigRead:     {role: Deployer},
	ConfigWrite:    {role: Deployer, changes: true},
	DomainsWrite:   {role: Deployer, changes: true},
	LogsRead:       {role: Viewer},
	RepoRead:       {role: Viewer},
	RepoConnect:    {role: Owner, changes: true},
	RepoDeploy:     {role: Deployer, changes: true},
	AccessRead:     {role: Viewer},
	AccessWrite:    {role: Owner, changes: true},
	KeysRead:       {self: true},
	KeysWrite:      {self: true, changes: true},
	TokensWrite:    {self: true, changes: true},
	UsersRead:      {},
	UsersWrite:     {changes: true},
	AuditRead:      {},
	SchedulesWrite: {role: Deployer, changes: true},
	NotifyWrite:    {role: Deployer, changes: true},
	DeployWrite:    {role: Deployer, changes: true},
	ServerRead:     {},
}

// Allow says whether who may do v to what: an app or a user, as v says. A
// decision on a verb that changes something is in the audit log before Allow
// returns; when it cannot be written, the answer is no. The answer no is
// Denied, or NotFound about an app that who may not even see.
func (a *Auth) Allow(ctx context.Context, who Who, v Verb, what string) error {
	no := a.decide(who, v, what)
	if !policies[v].changes && no == nil {
		return nil
	}
	if policies[v].changes {
		line := AuditLine{User: who.User, Via: who.Via, Verb: v, What: what, Allowed: no == nil}
		if err := a.writeAudit(ctx, line); err != nil && no == nil {
			return fmt.Errorf("write audit line: %w", err)
		}
	}
	return no
}

func (a *Auth) decide(who Who, v Verb, what string) error {
	p, known := policies[v]
	// Who was read some time ago; the user may be gone or an admin no more.
	u, _, exists := a.users.get(who.User)
	denied := &m3o.Error{Kind: m3o.Denied, Msg: fmt.Sprintf("%s may not %s %s", who.User, v, what), Hint: "ask an owner or an admin"}
	switch {
	case !known || !exists:
		return denied
	case u.Admin && who.Admin:
		return nil
	case p.anyone:
		return nil
	case p.self && what != "" && what == who.User:
		return nil
	case p.role == "":
		return denied
	}
	// Who has a role in an app has it in the app's previews.
	r, _, ok := a.rules.get(ruleKey(m3o.ParentOf(what), who.User))
	if !ok {
		// Word for word what the ledger says of an app that is not there.
		return &m3o.Error{Kind: m3o.NotFound, Msg: "no app called " + what, Hint: "m3o apps"}
	}
	if rank[r.Role] < rank[p.role] {
		return denied
	}
	return nil
}

func ruleKey(app, user string) string { return app + "/" + user }

// Grant gives user the role in app, in place of any they had.
func (a *Auth) Grant(ctx context.Context, app, user string, role Role) error {
	if rank[role] == 0 {
		return &m3o.Error{Kind: m3o.Invalid, Msg: fmt.Sprintf("no role called %q", role), Hint: "use owner, deployer or viewer"}
	}
	if err := m3o.CheckAppName(app); err != nil {
		return err
	}
	a.write.Lock() // against RemoveUser
	defer a.write.Unlock()
	if _, _, ok := a.users.get(user); !ok {
		return noUser(user)
	}
	if err := a.rules.put(ctx, ruleKey(app, user), Rule{App: app, User: user, Role: role, Created: a.now()}); err != nil {
		return fmt.Errorf("grant %s of %s to %s: %w", role, app, user, err)
	}
	a.log.Info("role granted", "app", app, "user", user, "role", string(role))
	return nil
}

// SetOwner is Grant with Owner.
func (a *Auth) SetOwner(ctx context.Context, app, user string) error {
	return a.Grant(ctx, app, user, Owner)
}

// Revoke takes from user whatever role they have in app; NotFound when none.
func (a *Auth) Revoke(ctx context.Context, app, user string) error {
	if _, _, ok := a.rules.get(ruleKey(app, user)); !ok {
		return &m3o.Error{Kind: m3o.NotFound, Msg: fmt.Sprintf("%s has no role in %s", user, app)}
	}
	if err := a.rules.remove(ctx, ruleKey(app, user)); err != nil {
		return fmt.Errorf("revoke role of %s in %s: %w", user, app, err)
	}
	a.log.Info("role revoked", "app", app, "user", user)
	return nil
}

// Rules is the rules of app, by user.
func (a *Auth) Rules(_ context.Context, app string) ([]Rule, error) {
	all := a.rules.all(func(_ string, r Rule) bool { return r.App == app })
	return slices.SortedFunc(maps.Values(all), func(x, y Rule) int { return cmp.Compare(x.User, y.User) }), nil
}

// RemoveApp removes all rules of app, so that a later app of that name begins
// with none.
func (a *Auth) RemoveApp(ctx context.Context, app string) error {
	if err := a.rules.removeAll(ctx, func(_ string, r Rule) bool { return r.App == app }); err != nil {
		return fmt.Errorf("remove rules of %s: %w", app, err)
	}
	return nil
}

// An AuditLine is one decision of Allow.
type AuditLine struct {
	Time    time.Time // UTC
	User    string
	Via     string
	Verb    Verb
	What    string
	Allowed bool
}

const auditSubject = "decision"

func (a *Auth) writeAudit(ctx context.Context, l AuditLine) error {
	l.Time = a.now()
	// Names come from outside; a line must fit whatever they are.
	l.User, l.What = clip(l.User), clip(l.What)
	data, err := json.Marshal(l)
	if err != nil {
		return err
	}
	_, err = a.audit.Append(ctx, auditSubject, data)
	return err
}

func clip(s string) string {
	if len(s) > 200 {
		return s[:200] + "…"
	}
	return s
}

// Audit is the newest n lines of the audit log, newest first.
func (a *Auth) Audit(ctx context.Context, n int) ([]AuditLine, error) {
	var lines []AuditLine
	for r, err := range a.audit.Tail(ctx, auditSubject, n, false) {
		if err != nil {
			return nil, fmt.Errorf("read audit log: %w", err)
		}
		var l AuditLine
		if err := json.Unmarshal(r.Data, &l); err != nil {
			return nil, fmt.Errorf("read audit line %d: %w", r.Seq, err)
		}
		lines = append(lines, l)
	}
	slices.Reverse(lines)
	return lines[:min(n, len(lines))], nil
}
