package webhook

import (
	"crypto/hmac"
	"crypto/sha256"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	_ "github.com/go-playground/webhooks/v6/docker" // keeps its module, whose testdata is read, in go.mod; its parsers are not used

	"github.com/m3o/m3o"
	"github.com/m3o/m3o/internal/need"
)

const secret m3o.Secret = "whsec_MDEyMzQ1Njc4OWFiY2RlZjAxMjM0NTY3ODlhYmNkZWY="

// A payload is a body that somebody else wrote, and the event header it goes with.
type payload struct {
	set, name string
	provider  Provider
	event     string
	body      []byte
}

func (p payload) String() string { return p.set + " " + p.name }

// sign is what the forge does when it sends the payload.
func sign(p Provider, event string, body []byte, secret m3o.Secret) http.Header {
	mac := hmac.New(sha256.New, []byte(secret.Reveal()))
	mac.Write(body)
	sum := hex.EncodeToString(mac.Sum(nil))
	h := http.Header{}
	h.Set("Content-Type", "application/json")
	switch p {
	case GitHub:
		h.Set("X-GitHub-Event", event)
		h.Set("X-GitHub-Delivery", "72d3162e-cc78-11e3-81ab-4c9367dc0958")
		h.Set("X-Hub-Signature-256", "sha256="+sum)
	case GitLab:
		h.Set("X-Gitlab-Event", event)
		h.Set("X-Gitlab-Event-UUID", "13792a34-cac6-4fda-95a8-c58e00a3954e")
		h.Set("X-Gitlab-Token", secret.Reveal())
	case Gitea:
		h.Set("X-Gitea-Event", event)
		h.Set("X-Gitea-Delivery", "f6266f16-1bf3-46a5-9ea4-602e06ead473")
		h.Set("X-Gitea-Signature", sum)
	default:
		h.Set("X-Event-Key", event)
		h.Set("X-Request-UUID", "5a0f4c3e-6e1c-4a8e-8f0e-5b7a1f6f2f3d")
		h.Set("X-Request-Id", "5a0f4c3e-6e1c-4a8e-8f0e-5b7a1f6f2f3d")
		h.Set("X-Hub-Signature", "sha256="+sum)
	}
	return h
}

func moduleDir(t testing.TB, module string) string {
	t.Helper()
	out, err := exec.Command("go", "list", "-m", "-f", "{{.Dir}}", module).Output()
	if dir := strings.TrimSpace(string(out)); err == nil && dir != "" {
		return dir
	}
	t.Fatalf("where is %s: %v", module, err)
	return ""
}

// thirdParty is all payloads of the three sets, of every event.
func thirdParty(t testing.TB) []payload {
	t.Helper()
	var all []payload
	read := func(set, file string, p Provider, event string) {
		body, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		all = append(all, payload{set, filepath.Base(file), p, event, body})
	}
	all = append(all, octokit(t)...)
	dir := filepath.Join(moduleDir(t, "github.com/xanzy/go-gitlab"), "testdata", "webhooks")
	for _, f := range glob(t, dir, "*.json") {
		read("go-gitlab", f, GitLab, gitlabEvent(t, f))
	}
	dir = filepath.Join(moduleDir(t, "github.com/go-playground/webhooks/v6"), "testdata")
	for _, f := range glob(t, filepath.Join(dir, "github"), "*.json") {
		read("go-playground github", f, GitHub, strings.ReplaceAll(strings.TrimSuffix(filepath.Base(f), ".json"), "-", "_"))
	}
	for _, f := range glob(t, filepath.Join(dir, "gitlab"), "*.json") {
		read("go-playground gitlab", f, GitLab, gitlabEvent(t, f))
	}
	cloud := map[string]string{"pull-request-created": "pullrequest:created", "pull-request-updated": "pullrequest:updated",
		"pull-request-merged": "pullrequest:fulfilled", "pull-request-declined": "pullrequest:rejected"}
	for _, f := range glob(t, filepath.Join(dir, "bitbucket"), "*.json") {
		base := strings.TrimSuffix(filepath.Base(f), ".json")
		event := cloud[base]
		if event == "" {
			event = strings.Replace(strings.Replace(base, "pull-request", "pullrequest", 1), "-", ":", 1)
		}
		read("go-playground bitbucket", f, Bitbucket, event)
	}
	for _, f := range glob(t, filepath.Join(dir, "bitbucket-server"), "*.json") {
		var x struct{ EventKey string }
		body, err := os.ReadFile(f)
		if err != nil || json.Unmarshal(body, &x) != nil {
			t.Fatalf("%s: %v", f, err)
		}
		all = append(all, payload{"go-playground bitbucket-server", filepath.Base(f), BitbucketDC, x.EventKey, body})
	}
	for _, f := range glob(t, filepath.Join(dir, "gitea"), "*.json") {
		read("go-playground gitea", f, Gitea, strings.ReplaceAll(strings.TrimSuffix(strings.TrimSuffix(filepath.Base(f), ".json"), "-event"), "-", "_"))
	}
	return all
}

func octokit(t testing.TB) []payload {
	t.Helper()
	var all []payload
	dir := filepath.Join(need.RepoRoot(t), "testdata", "webhooks", "node_modules", "@octokit", "webhooks-examples")
	need.Dir(t, "npm", dir, "make deps installs the payloads")
	for _, f := range glob(t, dir, "*/index.json") {
		raw, err := os.ReadFile(f)
		if err != nil {
			t.Fatal(err)
		}
		var events []struct {
			Name     string
			Examples []json.RawMessage
		}
		if err := json.Unmarshal(raw, &events); err != nil {
			t.Fatal(err)
		}
		for _, ev := range events {
			for i, ex := range ev.Examples {
				all = append(all, payload{"octokit " + filepath.Base(filepath.Dir(f)), fmt.Sprintf("%s %d", ev.Name, i), GitHub, ev.Name, ex})
			}
		}
	}
	return all
}

func glob(t testing.TB, dir, pattern string) []string {
	t.Helper()
	files, err := filepath.Glob(filepath.Join(dir, pattern))
	if err != nil || len(files) == 0 {
		t.Fatalf("no %s in %s: %v", pattern, dir, err)
	}
	return files
}

// gitlabEvent is the header GitLab sends for a body of that kind.
func gitlabEvent(t testing.TB, file string) string {
	t.Helper()
	body, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	var x struct {
		ObjectKind string `json:"object_kind"`
		EventName  string `json:"event_name"`
	}
	if err := json.Unmarshal(body, &x); err != nil {
		t.Fatal(err)
	}
	if strings.Contains(filepath.Base(file), "system-") || strings.HasPrefix(filepath.Base(file), "service_") || x.ObjectKind == "" {
		return "System Hook"
	}
	return map[string]string{"push": "Push Hook", "tag_push": "Tag Push Hook", "merge_request": "Merge Request Hook", "issue": "Issue Hook",
		"note": "Note Hook", "pipeline": "Pipeline Hook", "build": "Job Hook", "deployment": "Deployment Hook", "wiki_page": "Wiki Page Hook",
		"release": "Release Hook", "feature_flag": "Feature Flag Hook"}[x.ObjectKind]
}

// at reads a path of a decoded body; "" when it is not there.
func at(v any, path ...string) string {
	for _, k := range path {
		m, ok := v.(map[string]any)
		if !ok {
			return ""
		}
		v = m[k]
	}
	switch x := v.(type) {
	case nil:
		return ""
	case float64:
		return strconv.Itoa(int(x))
	}
	return fmt.Sprint(v)
}

// want is what a payload asks of an app connected to its repository, whose
// main branch deploys and whose branches and pull requests get previews. It
// reads the body's own fields, not with the code that is tested.
func want(p payload) (do []string, commit string, ok bool) {
	var x any
	if err := json.Unmarshal(p.body, &x); err != nil {
		return nil, "", false
	}
	branch := func(ref, after string) ([]string, string, bool) {
		gone := strings.Trim(after, "0") == ""
		switch {
		case !strings.HasPrefix(ref, "refs/heads/"):
			return []string{Nothing}, "", true
		case ref == "refs/heads/main" && gone:
			return []string{Nothing}, "", true
		case gone:
			return []string{Remove}, "", true
		case ref == "refs/heads/main":
			return []string{Deploy}, after, true
		}
		return []string{Preview}, after, true
	}
	pull := func(action, head string, acts map[string]string) ([]string, string, bool) {
		if do := acts[action]; do == Preview {
			return []string{do}, head, true
		} else if do != "" {
			return []string{do}, "", true
		}
		return []string{Nothing}, "", true
	}
	switch p.provider {
	case GitHub, Gitea:
		switch p.event {
		case "push":
			return branch(at(x, "ref"), at(x, "after"))
		case "create", "ping":
			return []string{Nothing}, "", true
		case "delete":
			return branch(fullRef(at(x, "ref_type"), at(x, "ref")), "")
		case "pull_request", "pull_request_sync":
			return pull(at(x, "action"), at(x, "pull_request", "head", "sha"), map[string]string{"opened": Preview, "reopened": Preview,
				"ready_for_review": Preview, "synchronize": Preview, "synchronized": Preview, "closed": Remove})
		}
	case GitLab:
		switch p.event {
		case "Push Hook":
			return branch(at(x, "ref"), at(x, "after"))
		case "Tag Push Hook":
			return []string{Nothing}, "", true
		case "Merge Request Hook":
			action := at(x, "object_attributes", "action")
			if action == "update" && at(x, "object_attributes", "oldrev") == "" {
				action = "words"
			}
			return pull(action, at(x, "object_attributes", "last_commit", "id"), map[string]string{"open": Preview, "reopen": Preview, "update": Preview, "close": Remove, "merge": Remove})
		}
	case Bitbucket:
		if p.event == "repo:push" {
			return pushCloud(x)
		}
		if cloudPull[p.event] != "" {
			return pull(p.event, at(x, "pullrequest", "source", "commit", "hash"), cloudPull)
		}
	case BitbucketDC:
		if p.event == "repo:refs_changed" {
			ch := x.(map[string]any)["changes"].([]any)[0]
			return branch(at(ch, "refId"), at(ch, "toHash"))
		}
		if strings.HasPrefix(p.event, "pr:") && strings.Count(p.event, ":") == 1 {
			return pull(p.event, at(x, "pullRequest", "fromRef", "latestCommit"), map[string]string{"pr:opened": Preview, "pr:from_ref_updated": Preview,
				"pr:merged": Remove, "pr:declined": Remove, "pr:deleted": Remove})
		}
	}
	return nil, "", false
}

var cloudPull = map[string]string{"pullrequest:created": Preview, "pullrequest:updated": Preview,
	"pullrequest:fulfilled": Remove, "pullrequest:rejected": Remove}

func pushCloud(x any) (do []string, commit string, ok bool) {
	changes, _ := x.(map[string]any)["push"].(map[string]any)["changes"].([]any)
	for _, ch := range changes {
		now := ch.(map[string]any)["new"]
		switch {
		case now == nil:
			do = append(do, Remove)
		case at(now, "type") == "tag":
			do = append(do, Nothing)
		case at(now, "name") == "main":
			do, commit = append(do, Deploy), at(now, "target", "hash")
		default:
			do, commit = append(do, Preview), at(now, "target", "hash")
		}
	}
	if len(do) == 0 {
		do = []string{Nothing}
	}
	return do, commit, true
}

// Every payload that third parties wrote is believed with its signature and
// not without, read, and decided; those about branches, tags and pull
// requests as their own fields say.
func TestThirdPartyPayloads(t *testing.T) {
	counts := map[string]int{}
	var order []string
	count := func(k string) {
		if counts[k] == 0 {
			order = append(order, k)
		}
		counts[k]++
	}
	for _, p := range thirdParty(t) {
		h := sign(p.provider, p.event, p.body, secret)
		if err := Verify(p.provider, h, p.body, secret); err != nil {
			t.Errorf("%s: signed right, refused: %v", p, err)
		}
		if Verify(p.provider, h, p.body, "another") == nil || Verify(p.provider, http.Header{}, p.body, secret) == nil || Verify(p.provider, h, p.body, "") == nil {
			t.Errorf("%s: believed with another secret, no signature or no secret", p)
		}
		if p.provider != GitLab && Verify(p.provider, h, append([]byte(" "), p.body...), secret) == nil {
			t.Errorf("%s: believed though the body was changed", p)
		}
		e, err := Parse(p.provider, h, p.body)
		if p.name == "group_merge_request.json" {
			// Its author put a space at the end of every key: no forge sends that.
			count(p.set + ": refused, not what a forge sends")
			if err == nil {
				t.Errorf("%s: %+v was read from keys that end with a space", p, e.Pull)
			}
			continue
		}
		if err != nil {
			t.Errorf("%s: %v", p, err)
			continue
		}
		actions := Decide(e, Rules{Repo: e.Repo, Branch: "main", Previews: true, Branches: true})
		do, commit, concerns := want(p)
		if !concerns {
			count(p.set + ": no concern")
			if len(actions) != 1 || actions[0].Do != Nothing || actions[0].Why == "" {
				t.Errorf("%s: decided %+v, want nothing and why", p, actions)
			}
			continue
		}
		count(p.set + ": " + strings.Fields(p.event)[0] + " " + strings.Join(do, "+"))
		var got []string
		for _, a := range actions {
			got = append(got, a.Do)
			if (a.Do == Deploy || a.Do == Preview) && a.Commit != commit {
				t.Errorf("%s: commit %s, want %s", p, a.Commit, commit)
			}
		}
		if strings.Join(got, " ") != strings.Join(do, " ") {
			t.Errorf("%s (%s): decided %v, want %v", p, e.Name, got, do)
		}
		if other := Decide(e, Rules{Repo: "somebody/else", Branch: "main", Previews: true, Branches: true}); other[0].Do != Nothing {
			t.Errorf("%s: decided %v for an app of another repository", p, other[0].Do)
		}
	}
	total := 0
	for _, k := range order {
		t.Logf("%4d  %s", counts[k], k)
		total += counts[k]
	}
	t.Logf("%4d  payloads in all", total)
}

// GitLab's newer signature covers time and id, so what is old is refused.
func TestGitLabSignature(t *testing.T) {
	body := []byte(`{"object_kind":"push"}`)
	now := time.Unix(1_800_000_000, 0)
	signed := func(id string, at time.Time, key m3o.Secret) http.Header {
		raw, err := base64.StdEncoding.DecodeString(strings.TrimPrefix(key.Reveal(), "whsec_"))
		if err != nil {
			t.Fatal(err)
		}
		stamp := strconv.FormatInt(at.Unix(), 10)
		mac := hmac.New(sha256.New, raw)
		mac.Write([]byte(id + "." + stamp + "." + string(body)))
		h := http.Header{}
		h.Set("Webhook-Id", id)
		h.Set("Webhook-Timestamp", stamp)
		h.Set("Webhook-Signature", "v1,AAAA v1,"+base64.StdEncoding.EncodeToString(mac.Sum(nil)))
		return h
	}
	other := m3o.Secret("whsec_" + base64.StdEncoding.EncodeToString([]byte("another")))
	changed := signed("a", now, secret)
	changed.Set("Webhook-Id", "b")
	both := signed("a", now, other)
	both.Set("X-Gitlab-Token", secret.Reveal())
	for _, c := range []struct {
		name string
		h    http.Header
		ok   bool
	}{
		{"right", signed("a", now, secret), true},
		{"four minutes late", signed("a", now.Add(-4*time.Minute), secret), true},
		{"six minutes late", signed("a", now.Add(-6*time.Minute), secret), false},
		{"of the future", signed("a", now.Add(6*time.Minute), secret), false},
		{"another key", signed("a", now, other), false},
		{"another id", changed, false},
		{"no id", signed("", now, secret), false},
	} {
		if err := verifyStandard(c.h, c.h.Get("Webhook-Signature"), body, secret, now); (err == nil) != c.ok {
			t.Errorf("%s: %v", c.name, err)
		}
	}
	if Verify(GitLab, both, body, secret) == nil {
		t.Error("a wrong signature was believed because of the plain token beside it")
	}
}

func TestForgedAndBrokenDeliveries(t *testing.T) {
	body := []byte(`{"ref":"refs/heads/main","after":"x"}`)
	h := sign(GitHub, "push", body, secret)
	h.Del("X-Hub-Signature-256")
	h.Set("X-Hub-Signature", "sha1=0000000000000000000000000000000000000000")
	if Verify(GitHub, h, body, secret) == nil {
		t.Error("the SHA-1 signature was taken")
	}
	for _, sig := range []string{"", "s", "sha256", "sha256=", "sha256=zz", "sha512=00"} {
		for _, p := range []Provider{Bitbucket, BitbucketDC, GitHub, Gitea} {
			h := http.Header{"X-Hub-Signature": {sig}, "X-Hub-Signature-256": {sig}, "X-Gitea-Signature": {sig}}
			if Verify(p, h, body, secret) == nil {
				t.Errorf("%s: signature %q was taken", p, sig)
			}
		}
	}
	hash := strings.Repeat("a", 40)
	for _, c := range []struct {
		name     string
		provider Provider
		event    string
		body     string
		ok       bool
	}{
		{"truncated", GitHub, "push", `{"ref":"refs/heads/ma`, false},
		{"no commit", GitHub, "push", `{"ref":"refs/heads/main","after":"HEAD"}`, false},
		{"an option", GitHub, "push", `{"ref":"refs/heads/main","after":"--upload-pack=touch x"}`, false},
		{"no ref", GitHub, "push", `{"ref":"-x","after":"` + hash + `"}`, false},
		{"line break in the ref", GitHub, "push", `{"ref":"refs/heads/a\nb","after":"` + hash + `"}`, false},
		{"number where text belongs", GitHub, "push", `{"ref":7}`, false},
		{"a list", GitLab, "Push Hook", `[]`, false},
		{"pull request without a number", GitHub, "pull_request", `{"action":"opened","pull_request":{"head":{"sha":"` + hash + `"}}}`, false},
		{"no pull request", Gitea, "pull_request", `{"action":"opened","number":7}`, false},
		{"no pull request", Bitbucket, "pullrequest:created", `{}`, false},
		{"no push", Bitbucket, "repo:push", `{}`, false},
		{"no pull request", BitbucketDC, "pr:opened", `{}`, false},
		{"unknown event", GitHub, "sponsorship", `not even JSON`, true},
		{"no event", GitLab, "", `{}`, true},
	} {
		e, err := Parse(c.provider, sign(c.provider, c.event, []byte(c.body), secret), []byte(c.body))
		if (err == nil) != c.ok {
			t.Errorf("%s %s: %v", c.provider, c.name, err)
		}
		if err != nil && m3o.KindOf(err) != m3o.Invalid {
			t.Errorf("%s %s: kind %v, want invalid", c.provider, c.name, m3o.KindOf(err))
		}
		if err == nil && e.Kind != Other {
			t.Errorf("%s %s: %+v, want an event of no concern", c.provider, c.name, e)
		}
	}
}

// A push of ten thousand files does not make an event of ten thousand paths.
func TestHugePushKeepsLittle(t *testing.T) {
	var files []string
	for i := range 10_000 {
		files = append(files, fmt.Sprintf("dir/%d/file.go", i))
	}
	body, err := json.Marshal(map[string]any{"ref": "refs/heads/main", "before": strings.Repeat("a", 40), "after": strings.Repeat("b", 40),
		"repository": map[string]any{"full_name": "a/b"}, "commits": []any{map[string]any{"id": strings.Repeat("b", 40), "added": files}}})
	if err != nil {
		t.Fatal(err)
	}
	e, err := Parse(GitHub, sign(GitHub, "push", body, secret), body)
	if err != nil {
		t.Fatal(err)
	}
	if c := e.Changes[0]; len(c.Paths) != 0 || !c.AllPaths {
		t.Errorf("%d paths are kept, all=%v; want none, and that anything may have changed", len(c.Paths), c.AllPaths)
	}
}

// The same pull request is a fork's or is not, whichever forge tells of it.
func TestForksAreTold(t *testing.T) {
	for _, c := range []struct {
		provider Provider
		event    string
		body     string
		fork     bool
	}{
		{GitHub, "pull_request", `{"number":1,"pull_request":{"head":{"repo":{"full_name":"a/b"}},"base":{"repo":{"full_name":"a/b"}}}}`, false},
		{GitHub, "pull_request", `{"number":1,"pull_request":{"head":{"repo":{"full_name":"eve/b"}},"base":{"repo":{"full_name":"a/b"}}}}`, true},
		{GitHub, "pull_request", `{"number":1,"pull_request":{"head":{"repo":null},"base":{"repo":{"full_name":"a/b"}}}}`, true},
		{GitHub, "pull_request", `{"number":1,"pull_request":{"head":{"repo":null},"base":{"repo":null}}}`, true},
		{GitLab, "Merge Request Hook", `{"object_attributes":{"iid":1,"source_project_id":3,"target_project_id":3}}`, false},
		{GitLab, "Merge Request Hook", `{"object_attributes":{"iid":1,"source_project_id":4,"target_project_id":3}}`, true},
		{Bitbucket, "pullrequest:rejected", `{"pullrequest":{"id":1,"source":{"repository":null},"destination":{"repository":{"full_name":"a/b"}}}}`, true},
		{BitbucketDC, "pr:deleted", `{"pullRequest":{"id":1,"fromRef":{"repository":{"slug":"b","project":{"key":"~eve"}}},"toRef":{"repository":{"slug":"b","project":{"key":"A"}}}}}`, true},
		{Gitea, "pull_request", `{"number":1,"pull_request":{"head":{"repo":{"full_name":"eve/b"}},"base":{"repo":{"full_name":"a/b"}}}}`, true},
	} {
		e, err := Parse(c.provider, sign(c.provider, c.event, []byte(c.body), secret), []byte(c.body))
		if err != nil {
			t.Errorf("%s %s: %v", c.provider, c.body, err)
			continue
		}
		if e.Pull.Fork != c.fork {
			t.Errorf("%s %s: fork=%v, want %v", c.provider, c.body, e.Pull.Fork, c.fork)
		}
	}
}
