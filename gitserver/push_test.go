package gitserver

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"unicode"

	"github.com/m3o/m3o"
)

func TestFirstPushDeploysAndThenMovesTheBranch(t *testing.T) {
	t.Parallel()
	s := newSite(t, siteConfig{})
	c := s.work("hello")
	tip := c.commit("main.go", "package main")
	out := c.must("push", "m3o", "main")
	wants(t, out, "remote: -----> Building "+tip[:7], "remote:        Released v", "[new branch]")
	if got := s.tip("hello", "refs/heads/main"); got != tip {
		t.Errorf("main = %q, want %q", got, tip)
	}
	wantEvents(t, s, "deploy true")
	src := s.apps.srcs[0]
	if src.Old != "" || src.Commit != tip || src.User != "ada" || src.Via != "git push" || src.Ref != "refs/heads/main" || src.App != "hello" {
		t.Errorf("source = %+v", src)
	}
	if !strings.HasPrefix(src.Quarantine, src.Repo+"/objects/tmp_objdir-incoming-") {
		t.Errorf("quarantine = %q", src.Quarantine)
	}
}

func TestIncrementalAndForcePush(t *testing.T) {
	t.Parallel()
	s := newSite(t, siteConfig{})
	c := s.work("hello")
	one := c.commit("a", "1")
	c.must("push", "m3o", "main")
	two := c.commit("a", "2")
	c.must("push", "m3o", "main")
	if src := s.apps.srcs[1]; src.Old != one || src.Commit != two {
		t.Errorf("second source = %+v, want %s..%s", src, one, two)
	}
	wants(t, c.must("push", "m3o", "main"), "up-to-date")
	c.must("commit", "-q", "--amend", "-m", "other")
	c.mustNot("push", "m3o", "main")
	c.must("push", "-f", "m3o", "main")
	// A force push back needs no objects: git sends an empty pack.
	c.must("push", "-f", "m3o", one+":main")
	if got := s.tip("hello", "refs/heads/main"); got != one {
		t.Errorf("main = %s, want %s", got, one)
	}
	wantEvents(t, s, "deploy true deploy true deploy true deploy true")
}

func TestOtherBranchesAndTagsSayWhichBranchDeploys(t *testing.T) {
	t.Parallel()
	s := newSite(t, siteConfig{})
	c := s.work("hello")
	c.commit("a", "1")
	c.must("tag", "v1")
	c.must("tag", "-a", "-m", "two", "v2")
	out := c.must("push", "m3o", "main:feature/x", "v1", "v2")
	wants(t, out, "-----> Pushed feature/x; only main deploys. To deploy it: git push m3o feature/x:main",
		"-----> Pushed tag v1; only main deploys. To deploy it: git push m3o v1^{}:refs/heads/main")
	wantEvents(t, s, "")
	out = c.must("push", "m3o", "v2^{}:refs/heads/main", "main:other")
	wants(t, out, "Released", "Pushed other; only main deploys")
	wantEvents(t, s, "deploy true")
	out = c.must("push", "m3o", ":other", ":refs/tags/v1", "main:third")
	wants(t, out, "[deleted]         other", "[new branch]      main -> third")
	if s.tip("hello", "refs/heads/other") != "" {
		t.Error("branch other was not deleted")
	}
}

func TestPushOfAnAnnotatedTagToTheDeployBranchIsRefusedBeforeTheBuild(t *testing.T) {
	t.Parallel()
	s := newSite(t, siteConfig{})
	c := s.work("hello")
	c.commit("a", "1")
	c.must("tag", "-a", "-m", "two", "v2")
	wants(t, c.mustNot("push", "m3o", "v2:refs/heads/main"), "it is tag, not a commit", "^{}")
	wantEvents(t, s, "")
}

func TestDeletingTheDeployBranchIsRefused(t *testing.T) {
	t.Parallel()
	s := newSite(t, siteConfig{})
	c := s.work("hello")
	c.commit("a", "1")
	c.must("push", "m3o", "main")
	wants(t, c.mustNot("push", "m3o", ":main"), "main is the branch that deploys", "m3o destroy -a hello", "remote rejected")
	if s.tip("hello", "refs/heads/main") == "" {
		t.Error("main is gone")
	}
}

func TestAFailedBuildRefusesThePush(t *testing.T) {
	t.Parallel()
	fail := error(&m3o.Error{Kind: m3o.Invalid, Msg: "the build failed: main.go:3: undefined: x", Hint: "m3o builds:log 3"})
	s := newSite(t, siteConfig{deploy: func(_ context.Context, _ m3o.Source, out io.Writer) error {
		_, _ = io.WriteString(out, "compiling without an end of line")
		return fail
	}})
	c := s.work("hello")
	c.commit("a", "1")
	out := c.mustNot("push", "m3o", "main")
	wants(t, out, "remote: compiling without an end of line", "remote:  !     the build failed: main.go:3: undefined: x",
		"remote:  !     m3o builds:log 3", "[remote rejected] main -> main (pre-receive hook declined)")
	if got := s.tip("hello", "refs/heads/main"); got != "" {
		t.Errorf("main = %s, want none", got)
	}
	if n := countObjects(t, s, "hello"); n != 0 {
		t.Errorf("%d objects of a refused push were kept", n)
	}
	wantEvents(t, s, "deploy")
}

func countObjects(t *testing.T, s *site, app string) int {
	t.Helper()
	out, err := runGit(t.Context(), s.s.repoDir(app), nil, "", "cat-file", "--batch-all-objects", "--batch-check")
	if err != nil {
		t.Fatal(err)
	}
	return strings.Count(out, "\n")
}

func TestInternalErrorsAndPanicsStayInTheLog(t *testing.T) {
	t.Parallel()
	n := 0
	s := newSite(t, siteConfig{deploy: func(context.Context, m3o.Source, io.Writer) error {
		if n++; n == 1 {
			return fmt.Errorf("dial secret-host: %w", io.ErrUnexpectedEOF)
		}
		panic("secret panic")
	}})
	s.apps.locks["hello"] = make(chan struct{}, 3) // the panic does not give it back
	c := s.work("hello")
	c.commit("a", "1")
	for range 2 {
		out := c.mustNot("push", "m3o", "main")
		wants(t, out, " !     internal error; see the daemon's log")
		if strings.Contains(out, "secret") {
			t.Errorf("the cause reached the pusher:\n%s", out)
		}
	}
	wantEvents(t, s, "deploy deploy")
	wants(t, s.work("broken").mustNot("push", "m3o", "HEAD:main"), "") // unborn HEAD: fails at the client
}

func TestOutputIsLive(t *testing.T) {
	t.Parallel()
	step := make(chan struct{})
	s := newSite(t, siteConfig{deploy: func(ctx context.Context, _ m3o.Source, out io.Writer) error {
		for i := range 3 {
			_, _ = fmt.Fprintf(out, "line %d\n", i)
			select {
			case <-step:
			case <-ctx.Done():
				return ctx.Err()
			}
		}
		return nil
	}})
	c := s.work("hello")
	c.commit("a", "1")
	cmd := c.cmd("push", "m3o", "main")
	r, err := cmd.StderrPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	// The build goes on only when the pusher has seen its line.
	sc := bufio.NewScanner(r)
	for i := 0; i < 3; {
		if !sc.Scan() {
			t.Fatalf("the push ended before line %d", i)
		}
		if strings.HasPrefix(sc.Text(), fmt.Sprintf("remote: line %d", i)) {
			i++
			step <- struct{}{}
		}
	}
	_, _ = io.Copy(io.Discard, r)
	if err := cmd.Wait(); err != nil {
		t.Error(err)
	}
}

func TestABuildLogCannotDriveTheTerminal(t *testing.T) {
	t.Parallel()
	s := newSite(t, siteConfig{deploy: func(_ context.Context, _ m3o.Source, out io.Writer) error {
		_, _ = io.WriteString(out, "\x1b]0;owned\x07red \x1b[31mtext\x1b[0m\tgrüße\x9b2J\rover\r\nnext\x08\n")
		return nil
	}})
	c := s.work("hello")
	c.commit("a", "1")
	out := c.must("push", "m3o", "main")
	wants(t, out, "remote: red text\tgrüße", "remote: over", "remote: next")
	// git itself ends remote lines with its own erase sequence on terminals only.
	if i := strings.IndexFunc(out, func(r rune) bool { return unicode.IsControl(r) && r != '\t' && r != '\n' }); i >= 0 {
		t.Errorf("control character %q at %d in %q", out[i], i, out)
	}
}

func TestPushOptions(t *testing.T) {
	t.Parallel()
	s := newSite(t, siteConfig{})
	c := s.work("hello")
	c.commit("a", "1")
	wants(t, c.mustNot("push", "-o", "no-depoly", "m3o", "main"), `there is no push option "no-depoly"`, "the options are no-deploy, force-rebuild, allow-breaking and preview")
	wants(t, c.mustNot("push", "-o", "preview", "m3o", "main"), "main is the branch that deploys; a preview is of another", "git push m3o HEAD:some-branch -o preview")
	wants(t, c.mustNot("push", "-o", "no-deploy\nend", "m3o", "main"), "push options must not have new line")
	wantEvents(t, s, "")
	wants(t, c.must("push", "-o", "no-deploy", "m3o", "main"), "-----> Pushed main without a deploy, as -o no-deploy asks")
	wantEvents(t, s, "")
	c.commit("a", "2")
	c.must("push", "-o", "force-rebuild", "m3o", "main")
	wantEvents(t, s, "deploy true")
	if got := s.apps.srcs[0].Options; len(got) != 1 || got[0] != "force-rebuild" {
		t.Errorf("options = %q", got)
	}
	c.must("push", "-o", "preview", "m3o", "main:refs/heads/topic")
	if got := s.apps.srcs[1]; got.Ref != "refs/heads/topic" || len(got.Options) != 1 || got.Options[0] != "preview" {
		t.Errorf("a preview of %s with options %q", got.Ref, got.Options)
	}
}

func TestTooManyRefsOrOptionsAreRefused(t *testing.T) {
	t.Parallel()
	s := newSite(t, siteConfig{limits: Limits{Refs: 3, PushOptions: 2}})
	c := s.work("hello")
	c.commit("a", "1")
	wants(t, c.mustNot("push", "m3o", "main", "main:a", "main:b", "main:c"), "the push changes 4 refs; the limit is 3")
	wants(t, c.mustNot("push", "-o", "no-deploy", "-o", "no-deploy", "-o", "no-deploy", "m3o", "main"), "the push has 3 options; the limit is 2")
	wantEvents(t, s, "")
}

func TestAtomicPushThatGitWillRefuseDoesNotBuild(t *testing.T) {
	t.Parallel()
	s := newSite(t, siteConfig{})
	c := s.work("hello")
	c.commit("a", "1")
	c.must("push", "--atomic", "m3o", "main", "main:other")
	wantEvents(t, s, "deploy true")
	// The client believes an old value that is not the server's any more.
	c.commit("a", "2")
	lease := c.must("rev-parse", "HEAD~1")
	s.moveBehindTheBack(t, "hello", "refs/heads/other")
	out := c.mustNot("push", "--atomic", "--force-with-lease=other:"+lease, "m3o", "main", "main:other")
	wants(t, out, "stale info") // the client's own check
	wantEvents(t, s, "deploy true")
}

// moveBehindTheBack points a ref of the server at a new commit.
func (s *site) moveBehindTheBack(t *testing.T, app, ref string) {
	t.Helper()
	dir := s.s.repoDir(app)
	env := []string{"GIT_AUTHOR_NAME=x", "GIT_AUTHOR_EMAIL=x@x", "GIT_COMMITTER_NAME=x", "GIT_COMMITTER_EMAIL=x@x"}
	id, err := runGit(t.Context(), dir, env, "", "commit-tree", "-m", "elsewhere", "HEAD^{tree}")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := runGit(t.Context(), dir, nil, "", "update-ref", ref, strings.TrimSpace(id)); err != nil {
		t.Fatal(err)
	}
}

func TestThinPackOfMoreThanAHundredObjects(t *testing.T) {
	t.Parallel()
	s := newSite(t, siteConfig{})
	c := s.work("hello")
	var files []string
	for i := range 150 {
		files = append(files, fmt.Sprintf("d%d/f%d", i%10, i), strings.Repeat(fmt.Sprintf("line of file %d\n", i), 40))
	}
	c.commit(files...)
	c.must("push", "m3o", "main")
	for i := 1; i < len(files); i += 2 {
		files[i] += "one more\n"
	}
	c.commit(files...)
	c.must("push", "m3o", "main")
	wantEvents(t, s, "deploy true deploy true")
	if packs, _ := filepath.Glob(s.s.repoDir("hello") + "/objects/pack/*.pack"); len(packs) != 2 {
		t.Errorf("%d packs, want 2: the pushes were not large enough", len(packs))
	}
	if keeps, _ := filepath.Glob(s.s.repoDir("hello") + "/objects/pack/*.keep"); len(keeps) != 0 {
		t.Errorf("keep files left: %v", keeps)
	}
}

func TestPushFromADepthOneClone(t *testing.T) {
	t.Parallel()
	s := newSite(t, siteConfig{})
	full := s.work("upstream")
	for i := range 4 {
		full.commit("a", fmt.Sprint(i))
	}
	full.must("push", "-o", "no-deploy", "m3o", "main")
	dir := filepath.Join(s.dir, "shallow")
	full.must("clone", "-q", "--depth=1", s.url("upstream"), dir)
	c := &clone{s: s, dir: dir, key: "ada"}
	c.must("remote", "add", "m3o", s.url("hello"))
	c.must("push", "m3o", "main")
	c.commit("b", "1")
	c.must("push", "m3o", "main")
	wantEvents(t, s, "deploy true deploy true")
	// The whole history over the shallow one.
	full.commit("a", "last")
	full.must("push", "-f", s.url("hello"), "main")
	wantEvents(t, s, "deploy true deploy true deploy true")
}

func TestAnEmptyRepositoryHasNothingToPush(t *testing.T) {
	t.Parallel()
	s := newSite(t, siteConfig{})
	c := s.work("hello")
	wants(t, c.mustNot("push", "m3o", "main"), "src refspec main does not match any")
	wants(t, c.must("ls-remote", "m3o"), "")
}

func TestCloneAndFetch(t *testing.T) {
	t.Parallel()
	s := newSite(t, siteConfig{})
	c := s.work("hello")
	tip := c.commit("a", "1", "big/b", strings.Repeat("x", 10000))
	c.must("push", "m3o", "main", "main:feature")
	for name, args := range map[string][]string{
		"v0": {"-c", "protocol.version=0"}, "v1": {"-c", "protocol.version=1"}, "v2": {"-c", "protocol.version=2"},
	} {
		dir := filepath.Join(s.dir, "clone-"+name)
		c.must(append(args, "clone", "-q", s.url("hello.git"), dir)...)
		got := &clone{s: s, dir: dir, key: "ada"}
		if head := got.must("rev-parse", "HEAD"); head != tip {
			t.Errorf("%s: HEAD = %s, want %s", name, head, tip)
		}
		if b := got.must("branch", "--show-current"); b != "main" {
			t.Errorf("%s: clone is on %q", name, b)
		}
		got.must(append(args, "fetch", "-q")...)
		got.commit(name, "1")
		got.must(append(args, "push", "origin", "HEAD:from-"+name)...)
	}
	c.must("clone", "-q", "--depth=1", s.url("/hello"), filepath.Join(s.dir, "one"))
	c.must("clone", "-q", "--filter=blob:none", "--no-checkout", "ssh://"+"m3o@"+s.addr+"/hello.git/", filepath.Join(s.dir, "partial"))
	wants(t, c.must("ls-remote", "m3o"), tip+"\tHEAD")
}

func TestTwoPushesToTheSameBranchAtOnce(t *testing.T) {
	t.Parallel()
	building := make(chan struct{}, 2)
	goOn := make(chan struct{})
	s := newSite(t, siteConfig{deploy: func(ctx context.Context, _ m3o.Source, _ io.Writer) error {
		building <- struct{}{}
		select {
		case <-goOn:
			return nil
		case <-ctx.Done():
			return ctx.Err()
		}
	}})
	a, b := s.work("hello"), s.work("hello")
	a.commit("a", "1")
	b.commit("b", "1")
	var wg sync.WaitGroup
	outs := make([]string, 2)
	oks := make([]bool, 2)
	for i, c := range []*clone{a, b} {
		wg.Go(func() { outs[i], oks[i] = c.git("push", "m3o", "main") })
	}
	<-building
	// The other push is at the door of the same lock, or will be.
	eventually(t, "both pushes in the server", func() bool {
		s.s.mu.Lock()
		defer s.s.mu.Unlock()
		return s.s.repos["hello"] != nil && len(s.s.repos["hello"].pushes) == 2
	})
	close(goOn)
	wg.Wait()
	if oks[0] == oks[1] {
		t.Fatalf("pushes succeeded: %v, want one\n%s\n%s", oks, outs[0], outs[1])
	}
	loser := outs[0]
	if oks[0] {
		loser = outs[1]
	}
	if !strings.Contains(loser, "moved while you") {
		t.Errorf("the loser was not told why:\n%s", loser)
	}
	wantEvents(t, s, "deploy true")
}

func TestTwoPushesToDifferentBranchesAtOnce(t *testing.T) {
	t.Parallel()
	s := newSite(t, siteConfig{})
	var wg sync.WaitGroup
	for i := range 4 {
		c := s.work("hello")
		c.commit("a", fmt.Sprint(i))
		wg.Go(func() {
			if out, ok := c.git("push", "m3o", fmt.Sprintf("main:b%d", i)); !ok {
				t.Error(out)
			}
		})
	}
	wg.Wait()
	for i := range 4 {
		if s.tip("hello", fmt.Sprintf("refs/heads/b%d", i)) == "" {
			t.Errorf("branch b%d is missing", i)
		}
	}
}

func TestARefThatCannotBeUpdatedUndoesTheDeploy(t *testing.T) {
	t.Parallel()
	s := newSite(t, siteConfig{deploy: func(_ context.Context, src m3o.Source, _ io.Writer) error {
		return os.WriteFile(filepath.Join(src.Repo, "refs/heads/main.lock"), nil, 0o600)
	}})
	c := s.work("hello")
	c.commit("a", "1")
	out := c.mustNot("push", "m3o", "main")
	wants(t, out, "failed to update ref", "Rolled back: git did not move the branch")
	wantEvents(t, s, "deploy false")
	// A part of the push that can be done is, and the rest is told apart.
	c.commit("a", "2")
	out = c.mustNot("push", "m3o", "main", "main:other")
	wants(t, out, "[new branch]      main -> other", "failed to update ref", "Rolled back", "Pushed other; only main deploys")
	wantEvents(t, s, "deploy false deploy false")
	_ = os.Remove(filepath.Join(s.s.repoDir("hello"), "refs/heads/main.lock"))
}

func TestABranchInTheWayIsSeenBeforeTheBuild(t *testing.T) {
	t.Parallel()
	s := newSite(t, siteConfig{})
	c := s.work("hello")
	c.commit("a", "1")
	c.must("push", "m3o", "main:main/sub")
	wants(t, c.mustNot("push", "m3o", "main"), "refs/heads/main cannot be created: refs/heads/main/sub exists")
	wantEvents(t, s, "")
}

func TestUnsafeTreesAreRefusedWithAReasonAndAWayOut(t *testing.T) {
	t.Parallel()
	s := newSite(t, siteConfig{})
	c := s.work("hello")
	c.commit("a", "1")
	blob := c.must("rev-parse", "HEAD:a")
	cmd := c.cmd("mktree")
	cmd.Stdin = strings.NewReader("100644 blob " + blob + "\t.git\n")
	tree, err := cmd.Output()
	if err != nil {
		t.Fatal(err)
	}
	evil := c.must("commit-tree", "-m", "evil", strings.TrimSpace(string(tree)))
	out := c.mustNot("push", "m3o", evil+":refs/heads/main")
	wants(t, out, "hasDotgit", "malformed or unsafe", "git commit-tree")
	wantEvents(t, s, "")
}
