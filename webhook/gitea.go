package webhook

import (
	"encoding/json"
	"net/http"
	"strings"

	"github.com/m3o/m3o"
)

// verifyGitea reads the header of either Gitea or Forgejo. Both send GitHub's
// as well, which is not read: one proof is enough, and these are older.
func verifyGitea(h http.Header, body []byte, secret m3o.Secret) error {
	sum := giteaHeader(h, "Signature")
	if sum == "" {
		return errUnproven
	}
	return checkMAC(sum, body, secret)
}

func giteaHeader(h http.Header, name string) string {
	for _, forge := range []string{"X-Forgejo-", "X-Gitea-"} {
		if v := h.Get(forge + name); v != "" {
			return v
		}
	}
	return ""
}

type giteaUser struct {
	Login    string `json:"login"`
	Username string `json:"username"`
}

func (u giteaUser) name() string {
	if u.Login != "" {
		return u.Login
	}
	return u.Username
}

type giteaRepo struct {
	FullName string `json:"full_name"`
}

type giteaSide struct {
	Ref  string     `json:"ref"`
	SHA  string     `json:"sha"`
	Repo *giteaRepo `json:"repo"` // null when the fork is gone
}

func parseGitea(h http.Header, body []byte) (Event, error) {
	e := Event{Name: giteaHeader(h, "Event"), Delivery: giteaHeader(h, "Delivery"), Kind: Other}
	switch e.Name {
	case "push", "pull_request", "pull_request_sync", "create", "delete":
	default:
		return e, nil
	}
	var x struct {
		Ref          string     `json:"ref"`
		RefType      string     `json:"ref_type"`
		Before       string     `json:"before"`
		After        string     `json:"after"`
		TotalCommits int        `json:"total_commits"`
		Repository   giteaRepo  `json:"repository"`
		Sender       *giteaUser `json:"sender"`
		Action       string     `json:"action"`
		Number       int        `json:"number"`
		HeadCommit   *struct {
			Message string `json:"message"`
		} `json:"head_commit"`
		Commits []struct {
			ID       string   `json:"id"`
			Message  string   `json:"message"`
			Added    []string `json:"added"`
			Removed  []string `json:"removed"`
			Modified []string `json:"modified"`
		} `json:"commits"`
		PullRequest *struct {
			Title   string    `json:"title"`
			HTMLURL string    `json:"html_url"`
			Merged  bool      `json:"merged"`
			Draft   bool      `json:"draft"`
			User    giteaUser `json:"user"`
			Head    giteaSide `json:"head"`
			Base    giteaSide `json:"base"`
		} `json:"pull_request"`
	}
	if err := json.Unmarshal(body, &x); err != nil {
		return e, err
	}
	e.Repo = x.Repository.FullName
	if x.Sender != nil {
		e.Sender = x.Sender.name()
	}
	switch e.Name {
	case "create": // the push that made the ref comes too
	case "delete":
		e.Kind, e.Changes = Push, []Change{{Ref: fullRef(x.RefType, x.Ref)}}
	case "push":
		e.Kind = Push
		c := Change{Ref: x.Ref, Before: x.Before, After: x.After, AllPaths: len(x.Commits) == 0 || x.TotalCommits > len(x.Commits)}
		for _, co := range x.Commits {
			if co.ID == x.After {
				c.Message = co.Message
			}
			// null lists are how it says that it did not look.
			c.AllPaths = c.AllPaths || co.Added == nil && co.Removed == nil && co.Modified == nil
			c.Paths = append(append(append(c.Paths, co.Added...), co.Modified...), co.Removed...)
		}
		if x.HeadCommit != nil {
			c.Message = x.HeadCommit.Message
		}
		e.Changes = []Change{c}
	default:
		p := x.PullRequest
		if p == nil {
			return e, m3o.Errorf(m3o.Invalid, "it says nothing of one")
		}
		e.Kind = Pull
		e.Name += " " + x.Action
		e.Pull = &PullRequest{Number: x.Number, Head: p.Head.SHA, HeadRef: p.Head.Ref, Base: p.Base.Ref, Merged: p.Merged, Draft: p.Draft,
			Title: p.Title, Author: p.User.name(), URL: p.HTMLURL}
		if p.Head.Repo != nil {
			e.Pull.HeadRepo = p.Head.Repo.FullName
		}
		e.Pull.Fork = p.Head.Repo == nil || p.Base.Repo == nil || !strings.EqualFold(p.Head.Repo.FullName, p.Base.Repo.FullName)
		switch x.Action {
		case "opened", "reopened":
			e.Pull.Action = Opened
		case "synchronized", "synchronize":
			e.Pull.Action = Updated
		case "closed":
			e.Pull.Action = Closed
		}
	}
	return e, nil
}
