package webhook

import (
	"net/http"
	"strings"

	"github.com/google/go-github/v57/github"

	"github.com/m3o/m3o"
)

// verifyGitHub wants the 256-bit signature. go-github's ValidatePayload is not
// used: it takes the SHA-1 one where this is missing, accepts anything where
// the secret is empty, and reads bodies of any size.
func verifyGitHub(h http.Header, body []byte, secret m3o.Secret) error {
	sig := h.Get(github.SHA256SignatureHeader)
	if !strings.HasPrefix(sig, "sha256=") {
		return errUnproven
	}
	if err := github.ValidateSignature(sig, body, []byte(secret.Reveal())); err != nil {
		return errUnproven
	}
	return nil
}

func parseGitHub(h http.Header, body []byte) (Event, error) {
	e := Event{Name: h.Get(github.EventTypeHeader), Delivery: h.Get(github.DeliveryIDHeader), Kind: Other}
	switch e.Name {
	case "ping", "push", "pull_request", "create", "delete":
	default:
		return e, nil
	}
	raw, err := github.ParseWebHook(e.Name, body)
	if err != nil {
		return e, err
	}
	switch x := raw.(type) {
	case *github.PingEvent:
		e.Kind, e.Repo, e.Sender = Ping, x.GetRepo().GetFullName(), x.GetSender().GetLogin()
	case *github.PushEvent:
		e.Kind, e.Repo, e.Sender = Push, x.GetRepo().GetFullName(), x.GetSender().GetLogin()
		c := Change{Ref: x.GetRef(), Before: x.GetBefore(), After: x.GetAfter(), Message: x.GetHeadCommit().GetMessage(), Forced: x.GetForced()}
		// GitHub lists at most 2,048 commits, and none for some pushes.
		c.AllPaths = len(x.Commits) == 0 || len(x.Commits) >= 2048 || c.Forced
		for _, co := range x.Commits {
			c.Paths = append(append(append(c.Paths, co.Added...), co.Modified...), co.Removed...)
			if len(c.Paths) > maxPaths {
				break
			}
		}
		e.Changes = []Change{c}
	case *github.DeleteEvent:
		// The push that deletes says the same; whichever comes first counts.
		e.Repo, e.Sender = x.GetRepo().GetFullName(), x.GetSender().GetLogin()
		e.Kind, e.Changes = Push, []Change{{Ref: fullRef(x.GetRefType(), x.GetRef())}}
	case *github.CreateEvent:
		// The push that made the ref comes too, and knows the commit.
		e.Repo, e.Sender = x.GetRepo().GetFullName(), x.GetSender().GetLogin()
	case *github.PullRequestEvent:
		pr := x.GetPullRequest()
		e.Kind, e.Repo, e.Sender = Pull, x.GetRepo().GetFullName(), x.GetSender().GetLogin()
		e.Name += " " + x.GetAction()
		e.Pull = &PullRequest{Number: x.GetNumber(), Head: pr.GetHead().GetSHA(), HeadRef: pr.GetHead().GetRef(),
			HeadRepo: pr.GetHead().GetRepo().GetFullName(), Base: pr.GetBase().GetRef(), Merged: pr.GetMerged(), Draft: pr.GetDraft(),
			Title: pr.GetTitle(), Author: pr.GetUser().GetLogin(), URL: pr.GetHTMLURL()}
		// A fork that was deleted has no repository any more; it is one all the same.
		e.Pull.Fork = !strings.EqualFold(e.Pull.HeadRepo, pr.GetBase().GetRepo().GetFullName()) || e.Pull.HeadRepo == ""
		switch x.GetAction() {
		case "opened", "reopened", "ready_for_review":
			e.Pull.Action = Opened
		case "synchronize":
			e.Pull.Action = Updated
		case "closed":
			e.Pull.Action = Closed
		}
	}
	return e, nil
}

// fullRef is refs/heads/x or refs/tags/x.
func fullRef(kind, name string) string {
	if strings.EqualFold(kind, "tag") {
		return "refs/tags/" + name
	}
	return "refs/heads/" + name
}
