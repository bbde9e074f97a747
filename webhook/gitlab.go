package webhook

import (
	"crypto/hmac"
	"crypto/sha256"
	"encoding/base64"
	"net/http"
	"strconv"
	"strings"
	"time"

	"github.com/xanzy/go-gitlab"

	"github.com/m3o/m3o"
)

// maxSkew is how old a signed delivery may be: GitLab's retries sign anew.
const maxSkew = 5 * time.Minute

// verifyGitLab takes the signature of newer versions, which must then be
// right, or the plain token. Either proves that the sender knows the secret.
func verifyGitLab(h http.Header, body []byte, secret m3o.Secret) error {
	if sigs := h.Get("Webhook-Signature"); sigs != "" {
		return verifyStandard(h, sigs, body, secret, time.Now())
	}
	if !equal(h.Get("X-Gitlab-Token"), secret.Reveal()) {
		return errUnproven
	}
	return nil
}

// verifyStandard checks a signature of the Standard Webhooks specification:
// any of the space-separated ones may fit, so that a secret can be changed.
func verifyStandard(h http.Header, sigs string, body []byte, secret m3o.Secret, now time.Time) error {
	id, stamp := h.Get("Webhook-Id"), h.Get("Webhook-Timestamp")
	sec, err := strconv.ParseInt(stamp, 10, 64)
	if err != nil || id == "" || now.Sub(time.Unix(sec, 0)).Abs() > maxSkew {
		return errUnproven
	}
	encoded, ok := strings.CutPrefix(secret.Reveal(), "whsec_")
	if !ok {
		return errUnproven
	}
	key, err := base64.StdEncoding.DecodeString(encoded)
	if err != nil || len(key) == 0 {
		return errUnproven
	}
	mac := hmac.New(sha256.New, key)
	_, _ = mac.Write([]byte(id + "." + stamp + "."))
	_, _ = mac.Write(body)
	want := base64.StdEncoding.EncodeToString(mac.Sum(nil))
	for s := range strings.SplitSeq(sigs, " ") {
		if v, ok := strings.CutPrefix(s, "v1,"); ok && equal(v, want) {
			return nil
		}
	}
	return errUnproven
}

func parseGitLab(h http.Header, body []byte) (Event, error) {
	e := Event{Name: h.Get("X-Gitlab-Event"), Kind: Other}
	for _, k := range []string{"Webhook-Id", "Idempotency-Key", "X-Gitlab-Event-UUID"} {
		if e.Delivery = h.Get(k); e.Delivery != "" {
			break
		}
	}
	switch gitlab.EventType(e.Name) {
	case gitlab.EventTypePush, gitlab.EventTypeTagPush, gitlab.EventTypeMergeRequest:
	default:
		return e, nil
	}
	raw, err := gitlab.ParseWebhook(gitlab.EventType(e.Name), body)
	if err != nil {
		return e, err
	}
	switch x := raw.(type) {
	case *gitlab.PushEvent:
		e.Kind, e.Repo, e.Sender = Push, x.Project.PathWithNamespace, x.UserUsername
		c := Change{Ref: x.Ref, Before: x.Before, After: x.After}
		// GitLab lists the newest 20 commits only.
		c.AllPaths = len(x.Commits) == 0 || x.TotalCommitsCount > len(x.Commits)
		for _, co := range x.Commits {
			if co.ID == x.After {
				c.Message = co.Message
			}
			c.Paths = append(append(append(c.Paths, co.Added...), co.Modified...), co.Removed...)
		}
		e.Changes = []Change{c}
	case *gitlab.TagEvent:
		e.Kind, e.Repo, e.Sender = Push, x.Project.PathWithNamespace, x.UserUsername
		e.Changes = []Change{{Ref: x.Ref, Before: x.Before, After: x.After, Message: x.Message, AllPaths: true}}
		if none(x.After) != "" && x.CheckoutSHA != "" {
			e.Changes[0].After = x.CheckoutSHA // After is the tag object of an annotated tag
		}
	case *gitlab.MergeEvent:
		a := x.ObjectAttributes
		e.Kind, e.Repo = Pull, x.Project.PathWithNamespace
		e.Name += " " + a.Action
		p := &PullRequest{Number: a.IID, Head: a.LastCommit.ID, HeadRef: a.SourceBranch, Base: a.TargetBranch,
			Fork: a.SourceProjectID != a.TargetProjectID, Merged: a.State == "merged", Draft: a.WorkInProgress, Title: a.Title, URL: a.URL}
		if x.User != nil {
			e.Sender, p.Author = x.User.Username, x.User.Username
		}
		if a.Source != nil {
			p.HeadRepo = a.Source.PathWithNamespace
		}
		switch a.Action {
		case "open", "reopen":
			p.Action = Opened
		case "update":
			// Without oldrev only words were changed.
			if a.OldRev != "" {
				p.Action = Updated
			}
		case "close", "merge":
			p.Action = Closed
		}
		e.Pull = p
	}
	return e, nil
}
