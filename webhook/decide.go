package webhook

import (
	"fmt"
	"strings"
)

// What an Action asks for.
const (
	Deploy  = "deploy"  // build the tip of Ref and make it the app's release
	Preview = "preview" // build Commit and serve it beside the app
	Remove  = "remove"  // take the preview away
	Nothing = "nothing"
)

// An Action is what one event asks of one app.
type Action struct {
	Do     string
	Ref    string // Deploy and previews of branches: the full ref that moved
	Commit string // the event's commit; it may have been overtaken since
	Before string
	Pull   *PullRequest // previews of pull requests
	Change *Change      // of a push
	Why    string       // for Nothing: one line for whoever asks
}

// Rules are what an app wants to hear of.
type Rules struct {
	Repo     string // "owner/name" the app is connected to; other repositories' events are not for it
	Branch   string // that deploys
	Previews bool   // pull requests get a preview
	Branches bool   // other branches get one too
}

// Decide says what e asks of an app with these rules, one Action for each ref
// that moved. It asks nobody: whether the commit is still the newest must be
// asked of the forge before anything is built.
func Decide(e Event, r Rules) []Action {
	nothing := func(why string, args ...any) []Action { return []Action{{Do: Nothing, Why: fmt.Sprintf(why, args...)}} }
	if e.Kind == Ping {
		return nothing("the hook works")
	}
	if e.Kind == Other {
		return nothing("%s changes no code", e.Name)
	}
	// A renamed repository keeps its hooks: the name in the event is then the
	// new one, which the daemon looks at before it asks us.
	if r.Repo != "" && !strings.EqualFold(e.Repo, r.Repo) {
		return nothing("it is about %s, not %s", e.Repo, r.Repo)
	}
	if e.Kind == Pull {
		return []Action{decidePull(e, r)}
	}
	var out []Action
	for i := range e.Changes {
		out = append(out, decideChange(&e.Changes[i], r))
	}
	if len(out) == 0 {
		return nothing("no branch moved")
	}
	return out
}

func decideChange(c *Change, r Rules) Action {
	a := Action{Do: Nothing, Ref: c.Ref, Commit: c.After, Before: c.Before, Change: c}
	branch, isBranch := strings.CutPrefix(c.Ref, "refs/heads/")
	switch {
	case !isBranch:
		a.Why = strings.TrimPrefix(c.Ref, "refs/tags/") + " is a tag; branches deploy"
	case branch == r.Branch && c.After == "":
		a.Why = branch + " was deleted at the forge; the last release stays live"
	case branch == r.Branch:
		a.Do = Deploy
	case !r.Branches:
		a.Why = fmt.Sprintf("%s does not deploy, %s does", branch, r.Branch)
	case c.After == "":
		a.Do = Remove
	default:
		a.Do = Preview
	}
	return a
}

func decidePull(e Event, r Rules) Action {
	a := Action{Do: Nothing, Pull: e.Pull, Commit: e.Pull.Head}
	switch {
	case e.Pull.Action == Closed:
		a.Do = Remove // whatever the rules are now: there may be one of earlier
	case e.Pull.Action == "":
		a.Why = fmt.Sprintf("%s changes no code", e.Name)
	case !r.Previews:
		a.Why = "pull requests get no previews here"
	default:
		a.Do = Preview
	}
	return a
}
