package gitserver

import (
	"context"
	"fmt"
	"strings"

	"golang.org/x/sync/errgroup"

	"github.com/m3o/m3o"
)

// foresee finds what git would refuse only after the hook, so that such a push
// is not built first: a branch that moved or cannot be created, a tip that is
// no commit, objects that are missing. git's own check of the objects has
// failed silently by now if it did, and for a shallow push is still to come.
func (p *push) foresee(ctx context.Context, h header, deploy update, call hookCall) error {
	for _, u := range h.updates {
		if u != deploy && !h.atomic {
			continue // stands or falls alone
		}
		tip, err := Tip(ctx, p.dir, u.ref)
		if err != nil {
			return err
		}
		if tip != u.old {
			return &m3o.Error{Kind: m3o.Conflict, Msg: fmt.Sprintf("%s moved while you pushed", u.ref), Hint: "git fetch m3o, then push again"}
		}
		if u.old == "" {
			other, err := inTheWay(ctx, p.dir, u.ref)
			if err != nil {
				return err
			}
			if other != "" {
				return &m3o.Error{Kind: m3o.Conflict, Msg: fmt.Sprintf("%s cannot be created: %s exists", u.ref, other),
					Hint: "git push m3o --delete " + other}
			}
		}
	}
	var env []string
	if call.quarantine != "" {
		env = append(env, "GIT_OBJECT_DIRECTORY="+p.objects(call.quarantine), "GIT_ALTERNATE_OBJECT_DIRECTORIES="+p.dir+"/objects")
	}
	if call.shallow != "" {
		env = append(env, "GIT_SHALLOW_FILE="+p.dir+"/"+call.shallow)
	}
	var branches []update
	var tips strings.Builder
	for _, u := range h.updates {
		if u.new == "" {
			continue
		}
		if strings.HasPrefix(u.ref, "refs/heads/") {
			branches = append(branches, u)
		}
		tips.WriteString(u.new + "\n")
	}
	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() error { return p.checkTypes(ctx, env, branches) })
	g.Go(func() error {
		_, err := runGit(ctx, p.dir, env, tips.String(), "rev-list", "--objects", "--stdin", "--not", "--all", "--quiet")
		if err != nil && ctx.Err() == nil {
			return &m3o.Error{Kind: m3o.Invalid, Msg: "the pack does not hold all objects of what was pushed",
				Hint: "run git fsck in your repository, then push again", Err: err}
		}
		return err
	})
	return g.Wait()
}

// checkTypes makes sure that branches point at commits.
func (p *push) checkTypes(ctx context.Context, env []string, branches []update) error {
	var in strings.Builder
	for _, u := range branches {
		in.WriteString(u.new + "\n")
	}
	out, err := runGit(ctx, p.dir, env, in.String(), "cat-file", "--batch-check=%(objectname) %(objecttype)")
	if err != nil {
		return err
	}
	lines := strings.Split(strings.TrimSuffix(out, "\n"), "\n")
	if len(lines) != len(branches) {
		return fmt.Errorf("git cat-file answered %d lines for %d objects", len(lines), len(branches))
	}
	for i, u := range branches {
		if lines[i] != u.new+" commit" {
			_, what, _ := strings.Cut(lines[i], " ")
			return &m3o.Error{Kind: m3o.Invalid, Msg: fmt.Sprintf("%s cannot point at %.12s: it is %s, not a commit", u.ref, u.new, what),
				Hint: "to deploy what a tag names: git push m3o <tag>^{}:" + u.ref}
		}
	}
	return nil
}
