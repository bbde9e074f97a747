package webhook

import (
	"testing"
)

// Whatever a sender writes is an event held to its limits, or an error.
func fuzzParse(f *testing.F, p Provider, events ...string) {
	for i := range events {
		f.Add(i, []byte(`{"ref":"refs/heads/main","before":"0000000000000000000000000000000000000000","after":"aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa"}`))
		f.Add(i, []byte(`{"number":7,"action":"opened","pull_request":{"head":{"sha":"aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa"}}}`))
		f.Add(i, []byte(`{"push":{"changes":[{"old":null,"new":{"type":"branch","name":"x"}}]},"pullrequest":{},"pullRequest":{},"changes":[{}],"object_attributes":{"iid":1}}`))
		f.Add(i, []byte(`null`))
	}
	f.Fuzz(func(t *testing.T, i int, body []byte) {
		h := sign(p, events[uint(i)%uint(len(events))], body, secret)
		e, err := Parse(p, h, body)
		if err != nil {
			return
		}
		if len(e.Name) > maxEventName || len(e.Delivery) > 128 || e.Delivery == "" || len(e.Changes) > maxChanges {
			t.Errorf("beyond the limits: %+v", e)
		}
		for _, c := range e.Changes {
			if !commitOrNone(c.After) || !commitOrNone(c.Before) || len(c.Paths) > maxPaths {
				t.Errorf("bad change: %+v", c)
			}
		}
		if len(Decide(e, Rules{Branch: "main", Previews: true, Branches: true})) == 0 {
			t.Errorf("%+v: nothing was decided", e)
		}
	})
}

func FuzzGitHub(f *testing.F) {
	fuzzParse(f, GitHub, "push", "pull_request", "delete", "create", "ping", "x")
}

func FuzzGitLab(f *testing.F) {
	fuzzParse(f, GitLab, "Push Hook", "Tag Push Hook", "Merge Request Hook", "x")
}

func FuzzBitbucket(f *testing.F) {
	fuzzParse(f, Bitbucket, "repo:push", "pullrequest:created", "pullrequest:rejected", "x")
}

func FuzzBitbucketDC(f *testing.F) {
	fuzzParse(f, BitbucketDC, "repo:refs_changed", "pr:opened", "pr:merged", "diagnostics:ping")
}

func FuzzGitea(f *testing.F) {
	fuzzParse(f, Gitea, "push", "pull_request", "pull_request_sync", "delete", "create")
}

func FuzzVerify(f *testing.F) {
	f.Add("sha256=00", "1", "a", "v1,x", []byte("{}"))
	f.Fuzz(func(t *testing.T, sig, stamp, id, standard string, body []byte) {
		for _, p := range []Provider{GitHub, GitLab, Bitbucket, BitbucketDC, Gitea} {
			h := sign(p, "push", body, "another secret")
			h.Set("X-Hub-Signature", sig)
			h.Set("X-Hub-Signature-256", sig)
			h.Set("X-Gitea-Signature", sig)
			h.Set("Webhook-Timestamp", stamp)
			h.Set("Webhook-Id", id)
			h.Set("Webhook-Signature", standard)
			if Verify(p, h, body, secret) == nil {
				t.Errorf("%s: %q %q was believed", p, sig, standard)
			}
		}
	})
}
