package gitserver

import (
	"fmt"
	"slices"
	"strings"
	"unicode/utf8"

	"github.com/m3o/m3o"
)

// Push options.
const (
	optNoDeploy      = "no-deploy"
	optForceRebuild  = "force-rebuild"
	optAllowBreaking = "allow-breaking"
	optPreview       = "preview"
)

// A policy says which pushes an app takes.
type policy struct {
	app    string
	branch string // that deploys
	lim    Limits
}

func (p policy) deployRef() string { return "refs/heads/" + p.branch }

// deploy is the update that deploys, and whether there is one.
func (p policy) deploy(h header) (update, bool) {
	if slices.Contains(h.options, optNoDeploy) {
		return update{}, false
	}
	i := slices.IndexFunc(h.updates, func(u update) bool { return u.ref == p.deployRef() && u.new != "" })
	if slices.Contains(h.options, optPreview) {
		i = slices.IndexFunc(h.updates, func(u update) bool { return strings.HasPrefix(u.ref, "refs/heads/") && u.new != "" })
	}
	if i < 0 {
		return update{}, false
	}
	return h.updates[i], true
}

// check reports why the push is refused whatever its objects are.
func (p policy) check(h header) error {
	if n := len(h.updates); n > p.lim.Refs {
		return &m3o.Error{Kind: m3o.Invalid, Msg: fmt.Sprintf("the push changes %d refs; the limit is %d", n, p.lim.Refs),
			Hint: "push fewer branches and tags at a time"}
	}
	if n := len(h.options); n > p.lim.PushOptions {
		return m3o.Errorf(m3o.Invalid, "the push has %d options; the limit is %d", n, p.lim.PushOptions)
	}
	for _, o := range h.options {
		switch o {
		case optNoDeploy, optForceRebuild, optAllowBreaking:
		case optPreview:
			if slices.ContainsFunc(h.updates, func(u update) bool { return u.ref == p.deployRef() }) {
				return &m3o.Error{Kind: m3o.Invalid, Msg: p.branch + " is the branch that deploys; a preview is of another", Hint: "git push m3o HEAD:some-branch -o preview"}
			}
		default:
			return &m3o.Error{Kind: m3o.Invalid, Msg: fmt.Sprintf("there is no push option %q", o),
				Hint: "the options are " + optNoDeploy + ", " + optForceRebuild + ", " + optAllowBreaking + " and " + optPreview}
		}
	}
	seen := map[string]bool{}
	for _, u := range h.updates {
		if err := checkRefName(u.ref); err != nil {
			return err
		}
		if !strings.HasPrefix(u.ref, "refs/heads/") && !strings.HasPrefix(u.ref, "refs/tags/") {
			return &m3o.Error{Kind: m3o.Invalid, Msg: fmt.Sprintf("%s is neither a branch nor a tag", u.ref), Hint: "git push m3o " + p.branch}
		}
		if u.ref == p.deployRef() && u.new == "" {
			return &m3o.Error{Kind: m3o.Denied, Msg: fmt.Sprintf("%s is the branch that deploys; it cannot be deleted", p.branch),
				Hint: "to delete the app with all it has: m3o destroy -a " + p.app}
		}
		if seen[u.ref] {
			return m3o.Errorf(m3o.Invalid, "the push changes %s twice", u.ref)
		}
		seen[u.ref] = true
	}
	for _, u := range h.updates {
		for other := range parents(u.ref) {
			if seen[other] {
				return m3o.Errorf(m3o.Invalid, "%s and %s cannot both exist", other, u.ref)
			}
		}
	}
	return nil
}

// parents yields the names under which ref would be a directory.
func parents(ref string) func(func(string) bool) {
	return func(yield func(string) bool) {
		for i := len(ref) - 1; i > 0; i-- {
			if ref[i] == '/' && !yield(ref[:i]) {
				return
			}
		}
	}
}

// checkRefName holds name to git-check-ref-format(1), which git itself does
// only after the hook, and to what a file system can hold. A branch may not
// look like an option, nor be called HEAD.
func checkRefName(name string) error {
	bad := func(why string) error {
		return &m3o.Error{Kind: m3o.Invalid, Msg: fmt.Sprintf("ref name %q %s", name, why), Hint: "see git help check-ref-format"}
	}
	switch {
	case len(name) > 1000:
		return m3o.Errorf(m3o.Invalid, "a ref name is longer than 1000 bytes")
	case !utf8.ValidString(name):
		return bad("is not UTF-8")
	case !strings.Contains(name, "/"):
		return bad("has no slash")
	case strings.Contains(name, ".."):
		return bad("has two dots in a row")
	case strings.Contains(name, "@{"):
		return bad("has @{ in it")
	case strings.HasSuffix(name, "."):
		return bad("ends with a dot")
	}
	for i := 0; i < len(name); i++ {
		if b := name[i]; b <= 0x20 || b == 0x7f || strings.IndexByte(`~^:?*[\`, b) >= 0 {
			return bad(fmt.Sprintf("has the character %q", rune(b)))
		}
	}
	for part := range strings.SplitSeq(name, "/") {
		switch {
		case part == "":
			return bad("has an empty part")
		case part[0] == '.':
			return bad("has a part that begins with a dot")
		case strings.HasSuffix(part, ".lock"):
			return bad("has a part that ends with .lock")
		case len(part) > 250: // git adds .lock; file names end at 255
			return bad("has a part longer than 250 bytes")
		}
	}
	for _, space := range []string{"refs/heads/", "refs/tags/"} {
		if short, ok := strings.CutPrefix(name, space); ok && (short[0] == '-' || short == "HEAD") {
			return bad("could be taken for something else")
		}
	}
	return nil
}
