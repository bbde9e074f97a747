package gitserver

import (
	"context"
	"errors"
	"fmt"
	"strings"

	"github.com/m3o/m3o"
)

// peek is the header once git has ended; an empty one when the client sent none.
func (p *push) peek() headerResult {
	if p.known == nil {
		select {
		case h := <-p.header:
			p.known = &h
		default:
			return headerResult{header: header{empty: true}}
		}
	}
	return *p.known
}

// checkBypass looks whether git moved the deploy branch without asking the
// hook, which nothing should make it do.
func (p *push) checkBypass() {
	u, ok := p.deploy(p.peek().header)
	if !ok || u.old == u.new {
		return
	}
	if tip, err := Tip(p.s.base, p.dir, u.ref); err == nil && tip == u.new && p.git.exitCode() == 0 {
		p.s.log.Error("git moved the branch without calling the pre-receive hook", "app", p.app, "user", p.user)
	}
}

// explain adds, on the pusher's terminal, to what git said when it never came
// to the hook: git says what is wrong, not what to do about it.
func (p *push) explain() {
	out := &lineWriter{w: p.stderr, prefix: "remote: "}
	defer out.Close() //nolint:errcheck // the pusher may be gone
	h := p.peek()
	if p.state.Load() == aborted {
		why := context.Cause(p.ctx)
		switch {
		case errors.Is(why, errGone) && h.empty:
			// ssh may have outlived a git that gave up: it shows what follows.
		case errors.Is(why, errGone), errors.Is(why, errStuck):
			return
		default:
			tell(out, why)
			return
		}
	}
	said := p.tap.String()
	var why *m3o.Error
	switch {
	case h.empty:
		// What git clients do that cannot read our list of refs.
		why = &m3o.Error{Kind: m3o.Invalid, Msg: "your git hung up before it pushed anything", Hint: "if its repository uses SHA-256: " + errSHA256.Hint}
	case h.err != nil && m3o.KindOf(h.err) == m3o.Invalid:
		why, _ = errors.AsType[*m3o.Error](h.err)
	case strings.Contains(said, "exceeds maximum allowed size"):
		why = &m3o.Error{Kind: m3o.Invalid, Msg: fmt.Sprintf("the push is larger than %d MB", p.lim.Pack>>20),
			Hint: "keep build results and data out of git, or push only the newest commit: git push m3o $(git commit-tree -m snapshot HEAD^{tree}):refs/heads/" + p.branch}
	case strings.Contains(said, "fsck error"), strings.Contains(said, "error in object"), strings.Contains(said, "invalid object"):
		why = &m3o.Error{Kind: m3o.Invalid, Msg: "git refused an object, named above, that is malformed or unsafe",
			Hint: "if it is old history, deploy without it: git push m3o $(git commit-tree -m snapshot HEAD^{tree}):refs/heads/" + p.branch}
	case strings.Contains(said, "died of signal 24"), strings.Contains(said, "died of signal 9"):
		why = &m3o.Error{Kind: m3o.Invalid, Msg: fmt.Sprintf("the push needs more than %v of processor time to unpack", p.lim.CPU),
			Hint: "push less at a time, and no huge files"}
	case strings.Contains(said, "ut of memory"):
		why = &m3o.Error{Kind: m3o.Invalid, Msg: fmt.Sprintf("the push needs more than %d MB of memory to unpack", p.lim.Memory>>20),
			Hint: "push no huge files"}
	default:
		return
	}
	tell(out, why)
}
