package forgetest

import (
	"bytes"
	"crypto/hmac"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"io"
	"net/http"
	"strings"
	"testing"
)

// An Event is what happened at a forge, to be told as one of them tells it.
type Event struct {
	Repo          string // owner/name
	Ref           string // of a push
	Before, After string // commits of a push, 40 zeros for none
	Message       string
	Paths         []string // that the push changed; main.go when nil

	Pull     int    // number of a pull request, 0 for a push
	Act      string // "opened", "updated", "closed"
	Head     string // its newest commit
	HeadRef  string // its branch; "feature" when empty
	HeadRepo string // whose branch; Repo when empty
}

type object = map[string]any

// Tell makes the delivery of an event as provider ("github", "gitlab",
// "bitbucket", "bitbucket-dc" or "gitea") sends it: the name of the event as
// its header has it, and the body.
func Tell(provider string, e Event) (name string, body any) {
	if e.HeadRef == "" {
		e.HeadRef = "feature"
	}
	if e.HeadRepo == "" {
		e.HeadRepo = e.Repo
	}
	if e.Paths == nil {
		e.Paths = []string{"main.go"}
	}
	switch provider {
	case "gitlab":
		return tellGitLab(e)
	case "bitbucket":
		return tellCloud(e)
	case "bitbucket-dc":
		return tellDC(e)
	case "gitea":
		name, b := tellGitHub(e)
		if e.Act == "updated" {
			b["action"] = "synchronized"
		}
		return name, b
	}
	return tellGitHub(e)
}

func tellGitHub(e Event) (string, object) {
	if e.Pull != 0 {
		act := e.Act
		if act == "updated" {
			act = "synchronize"
		}
		return "pull_request", PullEvent(e.Repo, act, e.Pull, e.Head, e.HeadRepo)
	}
	b := PushEvent(e.Repo, e.Ref, e.Before, e.After, e.Message)
	b["commits"] = []any{object{"id": e.After, "message": e.Message, "added": []string{}, "removed": []string{}, "modified": e.Paths}}
	if strings.Trim(e.After, "0") == "" {
		b["commits"], b["head_commit"], b["deleted"] = []any{}, nil, true
	}
	return "push", b
}

func tellGitLab(e Event) (string, object) {
	project := func(name string) object { return object{"id": len(name), "path_with_namespace": name} }
	if e.Pull != 0 {
		attrs := object{"iid": e.Pull, "title": "A change", "url": "https://forge/mr", "source_branch": e.HeadRef, "target_branch": "main", "state": "opened",
			"source_project_id": len(e.HeadRepo), "target_project_id": len(e.Repo), "source": project(e.HeadRepo), "target": project(e.Repo),
			"last_commit": object{"id": e.Head}, "action": map[string]string{"opened": "open", "updated": "update", "closed": "close"}[e.Act]}
		if e.Act == "updated" {
			attrs["oldrev"] = strings.Repeat("1", 40)
		}
		return "Merge Request Hook", object{"object_kind": "merge_request", "user": object{"username": "ada"}, "project": project(e.Repo), "object_attributes": attrs}
	}
	commits := []any{object{"id": e.After, "message": e.Message, "added": []string{}, "removed": []string{}, "modified": e.Paths}}
	if strings.Trim(e.After, "0") == "" {
		commits = []any{}
	}
	return "Push Hook", object{"object_kind": "push", "ref": e.Ref, "before": e.Before, "after": e.After, "user_username": "ada", "project": project(e.Repo),
		"commits": commits, "total_commits_count": len(commits)}
}

func tellCloud(e Event) (string, object) {
	side := func(branch, commit, repo string) object {
		return object{"branch": object{"name": branch}, "commit": object{"hash": commit}, "repository": object{"full_name": repo}}
	}
	b := object{"actor": object{"nickname": "ada"}, "repository": object{"full_name": e.Repo}}
	if e.Pull != 0 {
		// It gives commits by their first 12 digits.
		b["pullrequest"] = object{"id": e.Pull, "title": "A change", "state": "OPEN", "author": object{"nickname": "ada"},
			"source": side(e.HeadRef, e.Head[:12], e.HeadRepo), "destination": side("main", strings.Repeat("1", 12), e.Repo)}
		return map[string]string{"opened": "pullrequest:created", "updated": "pullrequest:updated", "closed": "pullrequest:rejected"}[e.Act], b
	}
	at := func(commit string) any {
		if strings.Trim(commit, "0") == "" {
			return nil
		}
		return object{"type": "branch", "name": strings.TrimPrefix(e.Ref, "refs/heads/"), "target": object{"hash": commit, "message": e.Message}}
	}
	b["push"] = object{"changes": []any{object{"old": at(e.Before), "new": at(e.After)}}}
	return "repo:push", b
}

func tellDC(e Event) (string, object) {
	repo := func(name string) object {
		key, slug, _ := strings.Cut(name, "/")
		return object{"slug": slug, "project": object{"key": key}}
	}
	b := object{"actor": object{"name": "ada"}, "repository": repo(e.Repo)}
	if e.Pull != 0 {
		b["pullRequest"] = object{"id": e.Pull, "title": "A change", "state": "OPEN",
			"fromRef": object{"id": "refs/heads/" + e.HeadRef, "latestCommit": e.Head, "repository": repo(e.HeadRepo)},
			"toRef":   object{"id": "refs/heads/main", "repository": repo(e.Repo)}}
		return map[string]string{"opened": "pr:opened", "updated": "pr:from_ref_updated", "closed": "pr:declined"}[e.Act], b
	}
	kind := "UPDATE"
	if strings.Trim(e.After, "0") == "" {
		kind = "DELETE"
	}
	b["changes"] = []any{object{"refId": e.Ref, "fromHash": e.Before, "toHash": e.After, "type": kind}}
	return "repo:refs_changed", b
}

// SendAs sends an event as provider does and returns the answer.
func SendAs(t testing.TB, client *http.Client, h Hook, provider, id string, e Event) (int, string) {
	t.Helper()
	name, body := Tell(provider, e)
	b, err := json.Marshal(body)
	if err != nil {
		t.Fatal(err)
	}
	code, text, err := DeliverAs(client, h, provider, name, id, b)
	if err != nil {
		t.Fatal(err)
	}
	return code, text
}

// DeliverAs sends a body with the headers of provider.
func DeliverAs(client *http.Client, h Hook, provider, name, id string, body []byte) (int, string, error) {
	req, err := http.NewRequest(http.MethodPost, h.URL, bytes.NewReader(body))
	if err != nil {
		return 0, "", err
	}
	mac := hmac.New(sha256.New, []byte(h.Secret))
	_, _ = mac.Write(body)
	sum := hex.EncodeToString(mac.Sum(nil))
	headers := map[string]map[string]string{
		"github":       {"X-GitHub-Event": name, "X-GitHub-Delivery": id, "X-Hub-Signature-256": "sha256=" + sum},
		"gitlab":       {"X-Gitlab-Event": name, "X-Gitlab-Token": h.Secret, "Idempotency-Key": id},
		"bitbucket":    {"X-Event-Key": name, "X-Request-UUID": id, "X-Hub-Signature": "sha256=" + sum},
		"bitbucket-dc": {"X-Event-Key": name, "X-Request-Id": id, "X-Hub-Signature": "sha256=" + sum},
		"gitea":        {"X-Gitea-Event": name, "X-Gitea-Delivery": id, "X-Gitea-Signature": sum},
	}
	req.Header.Set("Content-Type", "application/json")
	for k, v := range headers[provider] {
		req.Header.Set(k, v)
	}
	res, err := client.Do(req)
	if err != nil {
		return 0, "", err
	}
	defer res.Body.Close()
	text, err := io.ReadAll(res.Body)
	return res.StatusCode, string(text), err
}

// API is where the stand-in serves the API of a provider.
func (f *Forge) API(provider string) string {
	return "https://" + f.Host + map[string]string{"github": "/api/v3/", "gitlab": "/api/v4/", "gitea": "/api/v1", "bitbucket": "/api/2.0/", "bitbucket-dc": "/rest/"}[provider]
}

// PullRef is where the stand-in, as provider does, keeps the commits of a pull
// request whose branch is feature.
func PullRef(provider string, n int) string {
	ref := map[string]string{"gitlab": "refs/merge-requests/%/head", "bitbucket": "refs/heads/feature", "bitbucket-dc": "refs/pull-requests/%/from"}[provider]
	if ref == "" {
		ref = "refs/pull/%/head"
	}
	return strings.Replace(ref, "%", itoa(n), 1)
}

// Word is what a provider calls the state of a commit's status.
func Word(provider, state string) string {
	switch provider {
	case "gitlab":
		return map[string]string{"pending": "running", "success": "success", "failure": "failed"}[state]
	case "bitbucket", "bitbucket-dc":
		return map[string]string{"pending": "INPROGRESS", "success": "SUCCESSFUL", "failure": "FAILED"}[state]
	}
	return state
}
