package gitserver

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"github.com/go-git/go-billy/v5/osfs"
	"github.com/go-git/go-git/v5/plumbing"
	"github.com/go-git/go-git/v5/plumbing/cache"
	"github.com/go-git/go-git/v5/plumbing/storer"
	"github.com/go-git/go-git/v5/storage/filesystem"

	"github.com/m3o/m3o"
	"github.com/m3o/m3o/internal/atomicfile"
)

// A repo is what goes on in one app's repository. Pushes share it; upkeep,
// sweeping and deletion have it alone. Guarded by Server.mu.
type repo struct {
	pushes  map[*push]struct{}
	alone   bool
	dirty   bool               // a push ended badly and may have left objects behind
	yield   context.CancelFunc // ends a running Maintain; nil when there is none
	changed chan struct{}      // closed, and replaced, when a holder leaves
}

func (s *Server) repoDir(app string) string { return filepath.Join(s.cfg.Repos, app+".git") }

// repoOf is called with mu held.
func (s *Server) repoOf(app string) *repo {
	r := s.repos[app]
	if r == nil {
		r = &repo{pushes: map[*push]struct{}{}, changed: make(chan struct{})}
		s.repos[app] = r
	}
	return r
}

// left is called with mu held, after a holder left.
func (s *Server) left(app string, r *repo) {
	close(r.changed)
	r.changed = make(chan struct{})
	if len(r.pushes) == 0 && !r.alone && !r.dirty {
		delete(s.repos, app)
	}
}

// share lets p use its repository, ending upkeep that has it alone.
func (s *Server) share(ctx context.Context, p *push) error {
	for {
		s.mu.Lock()
		r := s.repoOf(p.app)
		if !r.alone {
			r.pushes[p] = struct{}{}
			s.mu.Unlock()
			return nil
		}
		if r.yield != nil {
			r.yield()
		}
		changed := r.changed
		s.mu.Unlock()
		select {
		case <-changed:
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
}

// unshare ends p's use. After a push that ended badly, the last one out sweeps:
// only then is every quarantine a stale one.
func (s *Server) unshare(p *push, clean bool) {
	s.mu.Lock()
	r := s.repoOf(p.app)
	delete(r.pushes, p)
	r.dirty = r.dirty || !clean
	sweep := r.dirty && len(r.pushes) == 0
	if sweep {
		r.alone, r.dirty = true, false
	} else {
		s.left(p.app, r)
	}
	s.mu.Unlock()
	if !sweep {
		return
	}
	if err := sweepRepo(s.repoDir(p.app)); err != nil {
		s.log.Error("sweep repository", "app", p.app, "err", err)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	r.alone = false
	s.left(p.app, r)
}

// exclude waits until nothing else uses the repository and keeps all out until
// release is called. yield, if any, is called when a push waits.
func (s *Server) exclude(ctx context.Context, app string, yield context.CancelFunc) (release func(), err error) {
	for {
		s.mu.Lock()
		r := s.repoOf(app)
		if !r.alone && len(r.pushes) == 0 {
			r.alone, r.yield = true, yield
			s.mu.Unlock()
			return func() {
				s.mu.Lock()
				defer s.mu.Unlock()
				r.alone, r.yield = false, nil
				s.left(app, r)
			}, nil
		}
		changed := r.changed
		s.mu.Unlock()
		select {
		case <-changed:
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
}

var errRemoved = m3o.Errorf(m3o.NotFound, "the app was deleted while you pushed")

// Remove deletes the repository of app. Pushes that are running are cancelled
// and waited for. It is no error if there is none.
func (s *Server) Remove(ctx context.Context, app string) error {
	if err := m3o.CheckName(app); err != nil {
		return err
	}
	s.mu.Lock()
	for p := range s.repoOf(app).pushes {
		p.cancel(errRemoved)
	}
	s.mu.Unlock()
	release, err := s.exclude(ctx, app, nil)
	if err != nil {
		return fmt.Errorf("wait for pushes to %s to end: %w", app, err)
	}
	defer release()
	// Gone at once under its name, so that a crash leaves no half repository.
	away := filepath.Join(s.cfg.Repos, ".removed-"+app+".git")
	if err := os.RemoveAll(away); err != nil {
		return fmt.Errorf("remove repository: %w", err)
	}
	if err := os.Rename(s.repoDir(app), away); err != nil {
		if errors.Is(err, fs.ErrNotExist) {
			return nil
		}
		return fmt.Errorf("remove repository: %w", err)
	}
	if err := os.RemoveAll(away); err != nil {
		return fmt.Errorf("remove repository: %w", err)
	}
	return nil
}

// Maintain packs the repository of app if it has become worth it, as git gc
// --auto would after a push, and drops objects that were unreachable for two
// weeks. It waits for running pushes; a push that comes meanwhile ends it,
// which is m3o.Unavailable: call it again later. The caller holds whatever
// keeps others from reading the repository, since packs are replaced.
func (s *Server) Maintain(ctx context.Context, app string) error {
	if err := m3o.CheckName(app); err != nil {
		return err
	}
	gctx, cancel := context.WithCancel(ctx)
	defer cancel()
	release, err := s.exclude(ctx, app, cancel)
	if err != nil {
		return fmt.Errorf("wait for pushes to %s to end: %w", app, err)
	}
	defer release()
	dir := s.repoDir(app)
	if _, err := os.Stat(dir); errors.Is(err, fs.ErrNotExist) {
		return m3o.Errorf(m3o.NotFound, "app %s has no repository", app)
	}
	_, err = runGit(gctx, dir, nil, "",
		"-c", "gc.auto=1000", "-c", "gc.autoPackLimit=20", "-c", "gc.autoDetach=false", "-c", "gc.pruneExpire=2.weeks.ago",
		"gc", "--auto", "--quiet")
	switch {
	case ctx.Err() != nil:
		err = ctx.Err()
	case gctx.Err() != nil:
		err = &m3o.Error{Kind: m3o.Unavailable, Msg: "a push to " + app + " came first", Err: err}
	}
	if err != nil {
		// git removes its temporary packs when it is told to end, not when killed.
		return errors.Join(err, sweepRepo(dir))
	}
	return nil
}

func isAbsGit(repo string) bool { return filepath.IsAbs(repo) && strings.HasSuffix(repo, ".git") }

// ensureRepo makes the app's repository if it is absent and points its HEAD at
// the deploy branch, which is what a clone checks out.
func (s *Server) ensureRepo(ctx context.Context, app, branch string) (string, error) {
	dir := s.repoDir(app)
	if err := checkRefName("refs/heads/" + branch); err != nil {
		return "", fmt.Errorf("deploy branch of %s: %w", app, err)
	}
	if err := InitRepo(ctx, dir); err != nil {
		return "", err
	}
	head, want := filepath.Join(dir, "HEAD"), "ref: refs/heads/"+branch+"\n"
	have, err := os.ReadFile(head)
	if err != nil {
		return "", fmt.Errorf("read HEAD: %w", err)
	}
	if string(have) != want {
		if err := atomicfile.Write(head, []byte(want), 0o644); err != nil {
			return "", fmt.Errorf("set HEAD: %w", err)
		}
	}
	return dir, nil
}

func initRepo(ctx context.Context, dir string) (err error) {
	tmp, err := os.MkdirTemp(filepath.Dir(dir), ".init-")
	if err != nil {
		return fmt.Errorf("make repository: %w", err)
	}
	defer func() {
		if err != nil {
			_ = os.RemoveAll(tmp)
		}
	}()
	// No template: a repository here needs no sample hooks.
	if _, err := runGit(ctx, tmp, nil, "", "init", "-q", "--bare", "--template=", "--initial-branch=main", "--object-format=sha1"); err != nil {
		return fmt.Errorf("make repository: %w", err)
	}
	if err := os.Rename(tmp, dir); err != nil {
		if _, serr := os.Stat(dir); serr == nil {
			return os.RemoveAll(tmp) // two first pushes at once
		}
		return fmt.Errorf("make repository: %w", err)
	}
	d, err := os.Open(filepath.Dir(dir))
	if err != nil {
		return fmt.Errorf("make repository: %w", err)
	}
	defer d.Close() //nolint:errcheck // opened to be synced only
	if err := d.Sync(); err != nil {
		return fmt.Errorf("make repository: %w", err)
	}
	return nil
}

func openRefs(repo string) *filesystem.Storage {
	return filesystem.NewStorage(osfs.New(repo, osfs.WithBoundOS()), cache.NewObjectLRU(0))
}

// Tip is the commit (or, for a tag, the object) that ref names in the bare
// repository repo now, "" when the ref or the repository does not exist.
// Symbolic refs are followed.
func Tip(_ context.Context, repo, ref string) (string, error) {
	if ref != "HEAD" {
		if err := checkRefName(ref); err != nil {
			return "", err
		}
	}
	r, err := storer.ResolveReference(openRefs(repo), plumbing.ReferenceName(ref))
	if errors.Is(err, plumbing.ErrReferenceNotFound) {
		return "", nil
	}
	if err != nil {
		return "", fmt.Errorf("read %s of %s: %w", ref, filepath.Base(repo), err)
	}
	return r.Hash().String(), nil
}

// inTheWay is a ref that keeps ref from being created, because one would be a
// directory and a file at once; "" when there is none. It asks git: go-git
// takes the lock file of another push for a ref.
func inTheWay(ctx context.Context, repo, ref string) (string, error) {
	args := []string{"for-each-ref", "--count=1", "--format=%(refname)", ref + "/"}
	for p := range parents(ref) {
		if strings.Count(p, "/") > 1 {
			args = append(args, p)
		}
	}
	out, err := runGit(ctx, repo, nil, "", args...)
	return strings.TrimSpace(out), err
}

// sweepAll removes what a crash left under the directory of repositories.
func sweepAll(dir string) error {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return fmt.Errorf("sweep repositories: %w", err)
	}
	var errs []error
	for _, e := range entries {
		path := filepath.Join(dir, e.Name())
		switch {
		case strings.HasPrefix(e.Name(), ".init-"), strings.HasPrefix(e.Name(), ".removed-"):
			errs = append(errs, os.RemoveAll(path))
		case e.IsDir() && strings.HasSuffix(e.Name(), ".git"):
			errs = append(errs, sweepRepo(path))
		}
	}
	if err := errors.Join(errs...); err != nil {
		return fmt.Errorf("sweep repositories: %w", err)
	}
	return nil
}

// sweepRepo removes quarantines, temporary packs and locks from a repository
// that no git of ours is changing.
func sweepRepo(repo string) error {
	var errs []error
	remove := func(patterns ...string) {
		for _, p := range patterns {
			found, err := filepath.Glob(filepath.Join(globQuote(repo), p))
			if err != nil {
				errs = append(errs, err)
			}
			for _, f := range found {
				errs = append(errs, os.RemoveAll(f))
			}
		}
	}
	remove("objects/tmp_objdir-*", "objects/incoming-*", "objects/pack/tmp_*", "objects/pack/.tmp-*", "objects/info/*.lock",
		"objects/info/commit-graphs/*.lock", "objects/*.lock", "*.lock", "packed-refs.new", "shallow_??????", "gc.pid")
	// A pack keeps this file while it is being received; with it, gc would
	// never touch the pack again.
	keeps, err := filepath.Glob(filepath.Join(globQuote(repo), "objects/pack/*.keep"))
	errs = append(errs, err)
	for _, f := range keeps {
		if b, err := os.ReadFile(f); err == nil && strings.HasPrefix(string(b), "receive-pack ") {
			errs = append(errs, os.Remove(f))
		}
	}
	errs = append(errs, filepath.WalkDir(filepath.Join(repo, "refs"), func(path string, d fs.DirEntry, err error) error {
		if err == nil && !d.IsDir() && strings.HasSuffix(path, ".lock") {
			err = os.Remove(path)
		}
		if errors.Is(err, fs.ErrNotExist) {
			err = nil
		}
		return err
	}))
	if err := errors.Join(errs...); err != nil {
		return fmt.Errorf("sweep %s: %w", filepath.Base(repo), err)
	}
	return nil
}

// globQuote makes a path literal inside a glob pattern.
func globQuote(p string) string {
	return strings.NewReplacer(`\`, `\\`, `*`, `\*`, `?`, `\?`, `[`, `\[`).Replace(p)
}

// Repo is the directory of app's repository, made with branch as its HEAD if
// there is none yet, for who puts commits there without a push.
func (s *Server) Repo(ctx context.Context, app, branch string) (string, error) {
	return s.ensureRepo(ctx, app, branch)
}

// Move makes ref point to commit if it points to old ("" for a ref that is
// not there), as a push would; Conflict when it does not.
func Move(ctx context.Context, repo, ref, old, commit string) error {
	if err := checkRefName(ref); err != nil {
		return err
	}
	from := cmp.Or(old, plumbing.ZeroHash.String())
	if _, err := runGit(ctx, repo, nil, "", "update-ref", "--", ref, commit, from); err != nil {
		if tip, terr := Tip(ctx, repo, ref); terr == nil && tip != old {
			return &m3o.Error{Kind: m3o.Conflict, Msg: "the branch moved meanwhile", Hint: "fetch it and try again", Err: err}
		}
		return err
	}
	return nil
}

// Changed lists the files that differ between src.Old and src.Commit, by their
// slash paths; a renamed one is there under both names.
func Changed(ctx context.Context, src m3o.Source) ([]string, error) {
	var env []string
	if src.Quarantine != "" {
		env = append(env, "GIT_OBJECT_DIRECTORY="+src.Quarantine, "GIT_ALTERNATE_OBJECT_DIRECTORIES="+src.Repo+"/objects")
	}
	out, err := runGit(ctx, src.Repo, env, "", "diff-tree", "-r", "-z", "--name-only", "--no-renames", "--no-ext-diff", src.Old, src.Commit, "--")
	if err != nil {
		return nil, err
	}
	return strings.Split(strings.TrimSuffix(out, "\x00"), "\x00"), nil
}

// CheckBranch says what is wrong with the name of a branch, as git would.
func CheckBranch(name string) error {
	if name == "" {
		return &m3o.Error{Kind: m3o.Invalid, Msg: "the name of the branch is empty", Hint: "it is main, for example"}
	}
	if err := checkRefName("refs/heads/" + name); err != nil {
		return &m3o.Error{Kind: m3o.Invalid, Msg: strings.Replace(err.Error(), "refs/heads/", "", 1), Hint: "see git help check-ref-format", Err: err}
	}
	return nil
}
