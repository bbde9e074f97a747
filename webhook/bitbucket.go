package webhook

import (
	"encoding/json"
	"net/http"
	"strings"

	"github.com/m3o/m3o"
)

// verifyBitbucket is for both: Cloud signs only where the hook has a secret,
// so what is not signed is not believed.
func verifyBitbucket(h http.Header, body []byte, secret m3o.Secret) error {
	sum, ok := strings.CutPrefix(h.Get("X-Hub-Signature"), "sha256=")
	if !ok {
		return errUnproven
	}
	return checkMAC(sum, body, secret)
}

type cloudRepo struct {
	FullName string `json:"full_name"`
}

type cloudSide struct {
	Branch struct {
		Name string `json:"name"`
	} `json:"branch"`
	Commit struct {
		Hash string `json:"hash"`
	} `json:"commit"`
	Repository *cloudRepo `json:"repository"` // null when the fork is gone
}

type cloudRef struct {
	Type   string `json:"type"` // branch, named_branch, bookmark, tag, annotated_tag
	Name   string `json:"name"`
	Target struct {
		Hash    string `json:"hash"`
		Message string `json:"message"`
	} `json:"target"`
}

type cloudUser struct {
	Nickname    string `json:"nickname"`
	Username    string `json:"username"`
	DisplayName string `json:"display_name"`
}

func (u cloudUser) name() string {
	for _, n := range []string{u.Nickname, u.Username, u.DisplayName} {
		if n != "" {
			return n
		}
	}
	return ""
}

func parseBitbucket(h http.Header, body []byte) (Event, error) {
	e := Event{Name: h.Get("X-Event-Key"), Delivery: h.Get("X-Request-UUID"), Kind: Other}
	pull := map[string]string{"pullrequest:created": Opened, "pullrequest:updated": Updated, "pullrequest:fulfilled": Closed, "pullrequest:rejected": Closed}
	if e.Name != "repo:push" && pull[e.Name] == "" {
		return e, nil
	}
	var x struct {
		Actor      cloudUser `json:"actor"`
		Repository cloudRepo `json:"repository"`
		Push       *struct {
			Changes []struct {
				Old    *cloudRef `json:"old"`
				New    *cloudRef `json:"new"`
				Forced bool      `json:"forced"`
			} `json:"changes"`
		} `json:"push"`
		PullRequest *struct {
			ID          int       `json:"id"`
			Title       string    `json:"title"`
			State       string    `json:"state"`
			Draft       bool      `json:"draft"`
			Author      cloudUser `json:"author"`
			Source      cloudSide `json:"source"`
			Destination cloudSide `json:"destination"`
			Links       struct {
				HTML struct {
					Href string `json:"href"`
				} `json:"html"`
			} `json:"links"`
		} `json:"pullrequest"`
	}
	if err := json.Unmarshal(body, &x); err != nil {
		return e, err
	}
	e.Repo, e.Sender = x.Repository.FullName, x.Actor.name()
	switch {
	case e.Name == "repo:push" && x.Push == nil, e.Name != "repo:push" && x.PullRequest == nil:
		return e, m3o.Errorf(m3o.Invalid, "it says nothing of one")
	case x.Push != nil && e.Name == "repo:push":
		e.Kind = Push
		for _, ch := range x.Push.Changes {
			c := Change{Forced: ch.Forced, AllPaths: true} // no list of files is sent
			if ch.Old != nil {
				c.Ref, c.Before = cloudRefName(*ch.Old), ch.Old.Target.Hash
			}
			if ch.New != nil {
				c.Ref, c.After, c.Message = cloudRefName(*ch.New), ch.New.Target.Hash, ch.New.Target.Message
			}
			if c.Ref != "" {
				e.Changes = append(e.Changes, c)
			}
		}
	default:
		p := x.PullRequest
		e.Kind = Pull
		e.Pull = &PullRequest{Number: p.ID, Action: pull[e.Name], Head: p.Source.Commit.Hash, HeadRef: p.Source.Branch.Name,
			Base: p.Destination.Branch.Name, Merged: p.State == "MERGED", Draft: p.Draft, Title: p.Title, Author: p.Author.name(), URL: p.Links.HTML.Href}
		if p.Source.Repository != nil {
			e.Pull.HeadRepo = p.Source.Repository.FullName
		}
		e.Pull.Fork = p.Source.Repository == nil || p.Destination.Repository == nil || e.Pull.HeadRepo != p.Destination.Repository.FullName
	}
	return e, nil
}

func cloudRefName(r cloudRef) string {
	if strings.HasSuffix(r.Type, "tag") {
		return fullRef("tag", r.Name)
	}
	return fullRef("branch", r.Name)
}

type dcRepo struct {
	ID      int    `json:"id"`
	Slug    string `json:"slug"`
	Project struct {
		Key string `json:"key"`
	} `json:"project"`
}

func (r dcRepo) name() string { return r.Project.Key + "/" + r.Slug }

type dcSide struct {
	ID           string `json:"id"` // refs/heads/x
	DisplayID    string `json:"displayId"`
	LatestCommit string `json:"latestCommit"`
	Repository   dcRepo `json:"repository"`
}

func parseBitbucketDC(h http.Header, body []byte) (Event, error) {
	e := Event{Name: h.Get("X-Event-Key"), Delivery: h.Get("X-Request-Id"), Kind: Other}
	pull := map[string]string{"pr:opened": Opened, "pr:from_ref_updated": Updated, "pr:merged": Closed, "pr:declined": Closed, "pr:deleted": Closed, "pr:modified": ""}
	action, isPull := pull[e.Name]
	switch {
	case e.Name == "diagnostics:ping":
		e.Kind = Ping
		return e, nil
	case e.Name != "repo:refs_changed" && !isPull:
		return e, nil
	}
	var x struct {
		Actor struct {
			Name string `json:"name"`
		} `json:"actor"`
		Repository dcRepo `json:"repository"`
		Changes    []struct {
			RefID    string `json:"refId"`
			FromHash string `json:"fromHash"`
			ToHash   string `json:"toHash"`
			Type     string `json:"type"`
		} `json:"changes"`
		PullRequest *struct {
			ID     int    `json:"id"`
			Title  string `json:"title"`
			State  string `json:"state"`
			Draft  bool   `json:"draft"`
			From   dcSide `json:"fromRef"`
			To     dcSide `json:"toRef"`
			Author struct {
				User struct {
					Name string `json:"name"`
				} `json:"user"`
			} `json:"author"`
		} `json:"pullRequest"`
	}
	if err := json.Unmarshal(body, &x); err != nil {
		return e, err
	}
	e.Sender = x.Actor.Name
	if !isPull {
		e.Kind, e.Repo = Push, x.Repository.name()
		for _, ch := range x.Changes {
			c := Change{Ref: ch.RefID, Before: ch.FromHash, After: ch.ToHash, AllPaths: true}
			if ch.Type == "DELETE" {
				c.After = ""
			}
			e.Changes = append(e.Changes, c)
		}
		return e, nil
	}
	p := x.PullRequest
	if p == nil {
		return e, m3o.Errorf(m3o.Invalid, "it says nothing of one")
	}
	e.Kind, e.Repo = Pull, p.To.Repository.name()
	e.Pull = &PullRequest{Number: p.ID, Action: action, Head: p.From.LatestCommit, HeadRef: strings.TrimPrefix(p.From.ID, "refs/heads/"),
		HeadRepo: p.From.Repository.name(), Base: strings.TrimPrefix(p.To.ID, "refs/heads/"), Fork: p.From.Repository.name() != p.To.Repository.name(),
		Merged: p.State == "MERGED", Draft: p.Draft, Title: p.Title, Author: p.Author.User.Name}
	return e, nil
}
