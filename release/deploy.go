package release

import (
	"context"
	"fmt"
	"slices"
	"time"

	"github.com/m3o/m3o"
	"github.com/m3o/m3o/store"
)

// Status says how far a deploy has come.
type Status string

// The statuses of a deploy. Live, Failed and Held are its ends.
const (
	Queued    Status = "queued"    // waits for its turn
	Building  Status = "building"  // BuildKit makes the image
	Releasing Status = "releasing" // the release command runs
	Starting  Status = "starting"  // new instances start beside the old ones
	Switching Status = "switching" // the router is being, or has been, switched; the git ref has not moved yet
	Live      Status = "live"      // the ref has moved: the release serves
	Failed    Status = "failed"    // the old release serves
	Held      Status = "held"      // built while the app was locked: the old release serves, and this one can be published
)

// Ended reports whether nothing can happen to the deploy any more.
func (s Status) Ended() bool { return s == Live || s == Failed || s == Held }

// An Event moves a deploy on.
type Event string

// The events of a deploy.
const (
	Build   Event = "build"   // begin to build
	Command Event = "command" // begin to run the release command
	Start   Event = "start"   // begin to start instances
	Switch  Event = "switch"  // begin to switch the router
	Confirm Event = "confirm" // the ref has moved
	Fail    Event = "fail"    // give up; the switch, if begun, has been rolled back
	Hold    Event = "hold"    // keep what was built, and start nothing
)

// The life of a deploy. A rollback and a config change have an image already
// and skip building; an app without a release command skips releasing.
//
//	          ┌─────────────────────────┐
//	          │                         ▼
//	queued ─┬─┴─→ building ─┬─→ releasing ─→ starting ─→ switching ─→ live
//	        │               │                   ▲
//	        └───────────────┴───────────────────┘
//
// and from everything but live to failed. Of a locked app building ends held.
// What is not listed cannot happen.
var next = map[Status]map[Event]Status{
	Queued:    {Build: Building, Command: Releasing, Start: Starting, Fail: Failed},
	Building:  {Command: Releasing, Start: Starting, Fail: Failed, Hold: Held},
	Releasing: {Start: Starting, Fail: Failed},
	Starting:  {Switch: Switching, Fail: Failed},
	Switching: {Confirm: Live, Fail: Failed},
}

// A Step is one status a deploy has had.
type Step struct {
	Status Status
	At     time.Time // when it was entered, UTC
}

// A Deploy is one attempt to make a release of an app live.
type Deploy struct {
	ID       string // hello.12
	App      string
	Status   Status
	Source   m3o.Source
	Reason   string // "git push", "rollback to v3", "config set FOO"
	User     string
	Build    int // number of the build, 0 when there is none (yet)
	Release  int // version, 0 when there is none yet
	Previous int // version that was live when it began, 0 for none
	Publish  int // the held version whose image it makes live, 0 for none
	Error    string
	Steps    []Step
	Started  time.Time
	Ended    time.Time // zero until live or failed
}

// BeginDeploy records a deploy as queued and gives it its ID. Reason, User and
// Source are the caller's; Previous becomes the live release unless set.
func (l *Ledger) BeginDeploy(ctx context.Context, d Deploy) (Deploy, error) {
	at := now()
	d.Status, d.Started, d.Ended, d.Error = Queued, at, time.Time{}, ""
	d.Steps = []Step{{Queued, at}}
	err := l.add(ctx, d.App, func(x *derived) *int { return &x.deploys }, func(n int) error {
		d.ID = deployID(d.App, n)
		if d.Previous == 0 {
			x, err := l.derived(ctx, d.App)
			if err != nil {
				return err
			}
			d.Previous = x.live
		}
		rev, err := l.deploys.Create(ctx, key(d.App, n), d)
		if err == nil {
			l.change(d.App, func(x *derived) { x.see(d, rev) })
		}
		return err
	})
	if err != nil {
		return Deploy{}, fmt.Errorf("begin deploy of %s: %w", d.App, err)
	}
	return d, nil
}

// Advance moves a deploy on by one event and writes that down, with what
// change (which may be nil) sets: Build, Release, Previous, Reason and Error.
// Call it before doing the step. An event that cannot happen now is a Conflict,
// and nothing is written. change may be called more than once.
func (l *Ledger) Advance(ctx context.Context, id string, e Event, change func(*Deploy)) (Deploy, error) {
	app, n, ok := parseDeployID(id)
	if !ok {
		return Deploy{}, noDeploy(id, nil)
	}
	lock := l.lock(app)
	lock.Lock()
	defer lock.Unlock()
	for {
		was, rev, err := l.deploy(ctx, id)
		if err != nil {
			return Deploy{}, err
		}
		to, ok := next[was.Status][e]
		if !ok {
			return Deploy{}, &m3o.Error{Kind: m3o.Conflict, Msg: fmt.Sprintf("deploy %s is %s: it cannot %s", id, was.Status, e)}
		}
		d := was
		if change != nil {
			change(&d)
		}
		d.ID, d.App, d.Source, d.User, d.Started, d.Publish = was.ID, was.App, was.Source, was.User, was.Started, was.Publish
		if (to == Live || to == Held) && d.Release == 0 {
			return Deploy{}, fmt.Errorf("deploy %s has no release to make %s", id, to)
		}
		d.Status = to
		at := now()
		d.Steps = append(slices.Clip(was.Steps), Step{to, at})
		if to.Ended() {
			d.Ended = at
		}
		rev, err = l.deploys.Update(ctx, key(app, n), d, rev)
		if m3o.KindOf(err) == m3o.Conflict {
			continue // another process moved it: look again whether this is still legal
		}
		if err != nil {
			l.forget(app) // it may be written all the same
			return Deploy{}, fmt.Errorf("advance deploy %s to %s: %w", id, to, err)
		}
		l.change(app, func(x *derived) { x.see(d, rev) })
		return d, nil
	}
}

// Deploy is the deploy with that ID, or NotFound.
func (l *Ledger) Deploy(ctx context.Context, id string) (Deploy, error) {
	d, _, err := l.deploy(ctx, id)
	return d, err
}

func (l *Ledger) deploy(ctx context.Context, id string) (Deploy, store.Rev, error) {
	app, n, ok := parseDeployID(id)
	if !ok {
		return Deploy{}, 0, noDeploy(id, nil)
	}
	d, rev, err := l.deploys.Get(ctx, key(app, n))
	if m3o.KindOf(err) == m3o.NotFound {
		err = noDeploy(id, err)
	}
	return d, rev, err
}

func noDeploy(id string, err error) error {
	return &m3o.Error{Kind: m3o.NotFound, Msg: fmt.Sprintf("no deploy %q", id), Err: err}
}

// Deploys is the newest deploys of app, newest first, all when limit is 0 or less.
func (l *Ledger) Deploys(ctx context.Context, app string, limit int) ([]Deploy, error) {
	x, err := l.derived(ctx, app)
	if err != nil {
		return nil, err
	}
	return newest(ctx, l.deploys, app, x.deploys, limit)
}

// UnfinishedDeploys is the deploys of all apps that are neither live nor
// failed, oldest first for each app: after a start of the daemon, those that a
// crash cut off, to be finished or failed.
func (l *Ledger) UnfinishedDeploys(ctx context.Context) ([]Deploy, error) {
	entries, err := l.deploys.List(ctx, "")
	if err != nil {
		return nil, fmt.Errorf("list deploys: %w", err)
	}
	var open []Deploy
	for _, e := range entries {
		if !e.Value.Status.Ended() {
			open = append(open, e.Value)
		}
	}
	return open, nil
}
