// Package webhook receives what forges send. It proves that a delivery comes
// from whom it says, reads it into an Event that is the same for GitHub,
// GitLab, Bitbucket and Gitea, says what the event asks of an app (Decide),
// and keeps deliveries on disk until they have been worked on (Queue).
//
// It does not know what happens next: nothing of builds, releases or users.
package webhook

import (
	"crypto/hmac"
	"crypto/sha256"
	"crypto/subtle"
	"encoding/hex"
	"fmt"
	"net/http"
	"strings"
	"unicode/utf8"

	"github.com/m3o/m3o"
)

// A Provider is a kind of forge.
type Provider string

// The providers. Forgejo is Gitea here: it sends and answers the same.
const (
	GitHub       Provider = "github"
	GitLab       Provider = "gitlab"
	Bitbucket    Provider = "bitbucket"    // Bitbucket Cloud
	BitbucketDC  Provider = "bitbucket-dc" // Bitbucket Data Center and Server
	Gitea        Provider = "gitea"
	MaxBody               = 25 << 20 // GitHub sends no more
	maxPaths              = 300      // of one change; beyond it all paths count as changed
	maxPathBytes          = 8 << 10  // of one change together
	maxChanges            = 100      // of one push
	maxText               = 500      // bytes of a title or message that are kept
	maxEventName          = 64
)

// Known reports whether p is one of the providers.
func (p Provider) Known() bool {
	switch p {
	case GitHub, GitLab, Bitbucket, BitbucketDC, Gitea:
		return true
	}
	return false
}

// A Kind says what an event is about.
type Kind string

// The kinds of events.
const (
	Ping  Kind = "ping"  // the forge tries the hook
	Push  Kind = "push"  // branches or tags moved: Changes
	Pull  Kind = "pull"  // a pull or merge request: Event.Pull
	Other Kind = "other" // nothing that concerns a deploy
)

// An Event is one delivery, read.
type Event struct {
	Provider Provider
	Delivery string // the forge's id of it, the same when it is sent again
	Name     string // what the forge calls it, "pull_request synchronize"
	Kind     Kind
	Repo     string // "owner/name"
	Sender   string // who caused it, as the forge calls them
	Changes  []Change
	Pull     *PullRequest
}

// A Change is one branch or tag that moved.
type Change struct {
	Ref      string // full name, refs/heads/main
	Before   string // commit before, "" when the ref is new
	After    string // commit now, "" when the ref is gone
	Message  string // of the commit After, its beginning
	Forced   bool   // it does not follow Before
	Paths    []string
	AllPaths bool // Paths is not all that changed, so anything may have
}

// The acts of a pull request that matter.
const (
	Opened  = "opened"
	Updated = "updated"
	Closed  = "closed"
)

// A PullRequest is a pull request, or a merge request as GitLab says.
type PullRequest struct {
	Number   int
	Action   string // Opened, Updated, Closed, or "" for what changes no code
	Head     string // commit
	HeadRef  string // branch, short
	HeadRepo string // "owner/name", "" when it is gone
	Base     string // branch it is to go into, short
	Fork     bool   // its commits come from another repository
	Merged   bool
	Draft    bool
	Title    string
	Author   string
	URL      string
}

// errUnproven is all that a sender learns, whatever did not fit.
var errUnproven = &m3o.Error{Kind: m3o.Denied, Msg: "the delivery is not signed with this hook's secret",
	Hint: "m3o repo:connect again sets a new secret, at the forge too"}

// Verify proves by secret that the delivery with header h and this body was
// sent by the forge. An empty secret proves nothing.
func Verify(p Provider, h http.Header, body []byte, secret m3o.Secret) error {
	if secret == "" {
		return errUnproven
	}
	switch p {
	case GitHub:
		return verifyGitHub(h, body, secret)
	case GitLab:
		return verifyGitLab(h, body, secret)
	case Bitbucket, BitbucketDC:
		return verifyBitbucket(h, body, secret)
	case Gitea:
		return verifyGitea(h, body, secret)
	}
	return errUnproven
}

// Parse reads a delivery. It never fails for an event it does not know, which
// is Other; the error is Invalid for a body that is not what the header says.
func Parse(p Provider, h http.Header, body []byte) (Event, error) {
	var e Event
	var err error
	switch p {
	case GitHub:
		e, err = parseGitHub(h, body)
	case GitLab:
		e, err = parseGitLab(h, body)
	case Bitbucket:
		e, err = parseBitbucket(h, body)
	case BitbucketDC:
		e, err = parseBitbucketDC(h, body)
	case Gitea:
		e, err = parseGitea(h, body)
	default:
		return e, m3o.Errorf(m3o.Invalid, "no forge is called %q", p)
	}
	if err != nil {
		return Event{}, &m3o.Error{Kind: m3o.Invalid, Msg: fmt.Sprintf("the body is no %s event: %s", clip(e.Name, maxEventName), clip(err.Error(), 200)), Err: err}
	}
	e.Provider = p
	if e.Delivery == "" {
		sum := sha256.Sum256(body)
		e.Delivery = "sha256-" + hex.EncodeToString(sum[:])
	}
	return e, e.tidy()
}

// tidy holds what came from outside to what it must be, so that nobody after
// this has to.
func (e *Event) tidy() error {
	e.Delivery, e.Name, e.Repo, e.Sender = clip(e.Delivery, 128), clip(e.Name, maxEventName), clip(e.Repo, 300), clip(e.Sender, 100)
	if len(e.Changes) > maxChanges {
		return m3o.Errorf(m3o.Invalid, "the push moves %d refs; %d are read", len(e.Changes), maxChanges)
	}
	for i := range e.Changes {
		c := &e.Changes[i]
		c.Before, c.After, c.Message = none(c.Before), none(c.After), clip(c.Message, maxText)
		if !commitOrNone(c.Before) || !commitOrNone(c.After) {
			return m3o.Errorf(m3o.Invalid, "the push of %q names what is no commit", clip(c.Ref, 100))
		}
		if !strings.HasPrefix(c.Ref, "refs/") || len(c.Ref) > 1000 || strings.ContainsFunc(c.Ref, control) {
			return m3o.Errorf(m3o.Invalid, "the push names %q, which is no ref", clip(c.Ref, 100))
		}
		if len(c.Paths) > maxPaths {
			c.Paths, c.AllPaths = nil, true
		}
		bytes := 0
		for _, p := range c.Paths {
			if bytes += len(p); bytes > maxPathBytes {
				c.Paths, c.AllPaths = nil, true
				break
			}
		}
	}
	if p := e.Pull; p != nil {
		p.Title, p.Author, p.URL, p.HeadRepo = clip(p.Title, maxText), clip(p.Author, 100), clip(p.URL, maxText), clip(p.HeadRepo, 300)
		p.HeadRef, p.Base = clip(p.HeadRef, 1000), clip(p.Base, 1000)
		if p.Number <= 0 || p.Number > 1e9 {
			return m3o.Errorf(m3o.Invalid, "the pull request has the number %d", p.Number)
		}
		if p.Action != "" && p.Action != Closed && (p.Head == "" || !commitOrNone(p.Head)) {
			return m3o.Errorf(m3o.Invalid, "pull request %d names no commit", p.Number)
		}
		if !commitOrNone(p.Head) {
			p.Head = ""
		}
	}
	return nil
}

func control(r rune) bool { return r < ' ' || r == 0x7f }

// none turns git's null commit into "".
func none(hash string) string {
	if strings.Trim(hash, "0") == "" {
		return ""
	}
	return hash
}

// commitOrNone reports whether s is a full commit hash or "". Bitbucket Cloud
// shortens the hashes of pull requests to 12 digits, which is taken too: the
// tip is asked for before anything is built.
func commitOrNone(s string) bool {
	if s == "" {
		return true
	}
	if len(s) != 40 && len(s) != 12 {
		return false
	}
	return strings.Trim(s, "0123456789abcdef") == ""
}

// clip keeps the beginning of s, whole characters and no control ones.
func clip(s string, n int) string {
	s = strings.Map(func(r rune) rune {
		if control(r) || r == utf8.RuneError {
			return ' '
		}
		return r
	}, s)
	if len(s) <= n {
		return s
	}
	for n > 0 && !utf8.RuneStart(s[n]) {
		n--
	}
	return s[:n]
}

// checkMAC compares hex with the HMAC-SHA256 of body.
func checkMAC(hexSum string, body []byte, secret m3o.Secret) error {
	got, err := hex.DecodeString(hexSum)
	mac := hmac.New(sha256.New, []byte(secret.Reveal()))
	_, _ = mac.Write(body)
	if err != nil || !hmac.Equal(got, mac.Sum(nil)) {
		return errUnproven
	}
	return nil
}

func equal(a, b string) bool { return subtle.ConstantTimeCompare([]byte(a), []byte(b)) == 1 }
