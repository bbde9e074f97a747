//go:build linux

package main

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"
)

// A past is a made-up history, the same on every machine: a tree that grows
// file by file, each commit changing a few lines of files that lie together.
type past struct {
	rng   *rand.Rand
	files [][]string // lines of each file
	want  int        // files at the end
	words []string
	made  int // commits
}

const (
	historyCommits = 10_000
	historyFiles   = 7_500
)

func newPast(files int) *past {
	p := &past{rng: rand.New(rand.NewPCG(1, 2)), want: files}
	const letters = "etaoinshrdlucmfwypvbgkjqxz"
	for range 4000 {
		w := make([]byte, 2+p.rng.IntN(9))
		for i := range w {
			w[i] = letters[min(p.rng.IntN(len(letters)), p.rng.IntN(len(letters)))]
		}
		p.words = append(p.words, string(w))
	}
	return p
}

func (p *past) line() string {
	var b strings.Builder
	b.WriteString(strings.Repeat("\t", p.rng.IntN(4)))
	for i := range 1 + p.rng.IntN(9) {
		if i > 0 {
			b.WriteByte(' ')
		}
		// Some words are used far more than others, as in source code.
		b.WriteString(p.words[min(p.rng.IntN(len(p.words)), p.rng.IntN(len(p.words)), p.rng.IntN(len(p.words)))])
	}
	return b.String()
}

// path spreads the files over 50 folders of 10 folders of 15 files.
func path(file int) string {
	dir := file / 15
	return fmt.Sprintf("mod%02d/pkg%02d/file%d.txt", dir/10%50, dir%10, file)
}

// commits writes n further commits of branch main for git fast-import. parent
// is where the first one goes on, "" for a new history of commits in all.
func (p *past) commits(w io.Writer, parent string, n, all int) error {
	out := bufio.NewWriter(w)
	for range n {
		p.made++
		touched := map[int]bool{}
		var order []int
		touch := func(f int) {
			if !touched[f] {
				touched[f] = true
				order = append(order, f)
			}
		}
		for len(p.files) < p.want && len(p.files)*all < p.want*p.made {
			var lines []string
			for range 20 + p.rng.IntN(260) {
				lines = append(lines, p.line())
			}
			touch(len(p.files))
			p.files = append(p.files, lines)
		}
		at := p.rng.IntN(len(p.files))
		for range 1 + p.rng.IntN(4) {
			f := min(len(p.files)-1, at+p.rng.IntN(40))
			touch(f)
			lines := p.files[f]
			for range 1 + p.rng.IntN(8) {
				switch i := p.rng.IntN(len(lines)); p.rng.IntN(3) {
				case 0:
					lines = append(lines[:i], append([]string{p.line()}, lines[i:]...)...)
				default:
					lines[i] = p.line()
				}
			}
			p.files[f] = lines
		}
		msg := "Change " + strconv.Itoa(p.made) + ": " + p.line() + "\n"
		fmt.Fprintf(out, "commit refs/heads/main\ncommitter Bench <bench@localhost> %d +0000\ndata %d\n%s", 1_700_000_000+600*p.made, len(msg), msg)
		if parent != "" {
			fmt.Fprintf(out, "from %s\n", parent)
			parent = "" // the next one follows this one
		}
		for _, f := range order {
			text := strings.Join(p.files[f], "\n") + "\n"
			fmt.Fprintf(out, "M 100644 inline %s\ndata %d\n%s\n", path(f), len(text), text)
		}
		fmt.Fprintln(out)
	}
	return out.Flush()
}

// fastImport feeds commits to git in dir.
func (b *bench) fastImport(ctx context.Context, dir string, p *past, parent string, n, all int) error {
	cmd := b.box.command(ctx, dir, "git", "fast-import", "--quiet", "--force")
	in, err := cmd.StdinPipe()
	if err != nil {
		return err
	}
	var said strings.Builder
	cmd.Stdout, cmd.Stderr = &said, &said
	if err := cmd.Start(); err != nil {
		return err
	}
	werr := p.commits(in, parent, n, all)
	cerr := in.Close()
	if err := cmd.Wait(); err != nil {
		return fmt.Errorf("git fast-import: %w: %s", err, said.String())
	}
	if werr != nil {
		return werr
	}
	return cerr
}

// makeHistory makes the repository whose history is pushed, packed as a clone's is.
func (b *bench) makeHistory(ctx context.Context, p *past, commits int) (dir string, err error) {
	dir = filepath.Join(b.dir, "history.git")
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return "", err
	}
	if _, err := b.box.run(ctx, dir, "git", "init", "-q", "--bare", "-b", "main"); err != nil {
		return "", err
	}
	if err := b.fastImport(ctx, dir, p, "", commits, commits); err != nil {
		return "", err
	}
	// Packed anew: fast-import leaves few deltas, and a push would look for them each time.
	if _, err := b.box.run(ctx, dir, "git", "repack", "-q", "-a", "-d", "-f"); err != nil {
		return "", err
	}
	_, err = b.box.run(ctx, dir, "git", "config", "gc.auto", "0")
	return dir, err
}

// A gitServer is one of the two that are compared.
type gitServer struct {
	name      string
	opts      []string // of git push
	target    func(ctx context.Context, n int) (url string, err error)
	cpu       func(ctx context.Context) (time.Duration, error)
	url       string // of the newest target
	full, one durations
	fullCPU   durations
	oneCPU    durations
	shake     durations
	client    durations // CPU of git and ssh, full push
}

// push pushes main and notes time and the server's CPU.
func (g *gitServer) push(ctx context.Context, b *bench, dir string, wall, cpu, client *durations) error {
	before, err := g.cpu(ctx)
	if err != nil {
		return err
	}
	cmd := b.box.command(ctx, dir, "git", append(append([]string{"push", "-q"}, g.opts...), g.url, "main")...)
	began := time.Now()
	out, err := cmd.CombinedOutput()
	took := time.Since(began)
	if err != nil {
		return fmt.Errorf("push to %s: %w: %s", g.name, err, out)
	}
	after, err := g.cpu(ctx)
	if err != nil {
		return err
	}
	wall.add(took)
	cpu.add(after - before)
	client.add(cmd.ProcessState.UserTime() + cmd.ProcessState.SystemTime())
	return nil
}

// history measures what git itself costs, without a build, against OpenSSH
// and git receive-pack.
func (b *bench) history(ctx context.Context, sec *section) error {
	sshd, err := b.startSSHD(ctx)
	if err != nil {
		return err
	}
	defer sshd.stop()
	b.say("making a history of %d commits", historyCommits)
	p := newPast(historyFiles)
	dir, err := b.makeHistory(ctx, p, historyCommits)
	if err != nil {
		return err
	}
	size, err := b.describe(ctx, dir)
	if err != nil {
		return err
	}
	ours := &gitServer{name: "m3o", opts: []string{"-o", "no-deploy"}, cpu: func(context.Context) (time.Duration, error) { u, err := b.box.cpu(); return u.sum(), err },
		target: func(ctx context.Context, n int) (string, error) {
			app := fmt.Sprintf("bench-history-%d", n)
			_, err := b.box.run(ctx, b.dir, b.box.m3o(), "create", app, "--no-remote")
			return b.box.remote(app), err
		}}
	ref := &gitServer{name: "OpenSSH", cpu: sshd.cpu, target: func(ctx context.Context, n int) (string, error) {
		return sshd.repository(ctx, fmt.Sprintf("history-%d.git", n))
	}}
	var ratio, oneRatio durations
	apps := []string{}
	for round := range max(1, (b.rounds+1)/2) {
		turn := func(g *gitServer) func() error {
			return func() (err error) {
				if g.url, err = g.target(ctx, round); err != nil {
					return err
				}
				return g.push(ctx, b, dir, &g.full, &g.fullCPU, &g.client)
			}
		}
		apps = append(apps, fmt.Sprintf("bench-history-%d", round))
		if err := inTurns(round, turn(ours), turn(ref)); err != nil {
			return err
		}
		ratio.add(quotient(ours.full.last(), ref.full.last()))
		b.say("full history: m3o %s, OpenSSH %s", secs(ours.full.last()), secs(ref.full.last()))
	}
	parent := "refs/heads/main^0"
	for round := range 2 * b.rounds {
		if err := b.fastImport(ctx, dir, p, parent, 1, historyCommits); err != nil {
			return err
		}
		turn := func(g *gitServer) func() error {
			return func() error {
				var ignored durations
				if err := g.push(ctx, b, dir, &g.one, &g.oneCPU, &ignored); err != nil {
					return err
				}
				h, err := b.handshake(ctx, g.url)
				g.shake.add(h)
				return err
			}
		}
		if err := inTurns(round, turn(ours), turn(ref)); err != nil {
			return err
		}
		oneRatio.add(quotient(ours.one.last(), ref.one.last()))
	}
	b.say("one commit: m3o %s, OpenSSH %s", secs(ours.one.median()), secs(ref.one.median()))
	sec.add(row{What: fmt.Sprintf("push of %d commits", historyCommits), Budget: "≤ 1.0×", Measured: ours.full.text(), Reference: "OpenSSH + git " + ref.full.text(),
		Ratio: times(ratio.median()), Met: verdict(ratio.median() <= time.Second)})
	sec.add(row{What: "push of one commit into it", Budget: "≤ 1.0×", Measured: ours.one.text(), Reference: "OpenSSH + git " + ref.one.text(),
		Ratio: times(oneRatio.median()), Met: verdict(oneRatio.median() <= time.Second)})
	t := table{title: "In detail, medians", head: []string{"what", "m3o", "OpenSSH + git"}}
	t.add("full push, clock", secs(ours.full.median()), secs(ref.full.median()))
	t.add("full push, server's CPU", secs(ours.fullCPU.median()), secs(ref.fullCPU.median()))
	t.add("full push, CPU of git and ssh", secs(ours.client.median()), secs(ref.client.median()))
	t.add("one commit, clock", secs(ours.one.median()), secs(ref.one.median()))
	t.add("one commit, server's CPU", secs(ours.oneCPU.median()), secs(ref.oneCPU.median()))
	t.add("`git ls-remote`: connection, handshake, refs", secs(ours.shake.median()), secs(ref.shake.median()))
	sec.tables = append(sec.tables, t)
	sec.note(size + " The history is made up and the same everywhere. Each full push goes to a new repository, with `-o no-deploy` for m3o, " +
		"so that neither builds. OpenSSH is this machine's sshd with `git receive-pack`, on loopback; it checks objects too (receive.fsckObjects). " +
		"Both connections use curve25519 and AES-128-GCM: left alone, OpenSSH's own choice of key exchange is slower.")
	return b.destroy(ctx, apps...)
}

// describe says what a repository holds.
func (b *bench) describe(ctx context.Context, dir string) (string, error) {
	out, err := b.box.run(ctx, dir, "git", "count-objects", "-v")
	if err != nil {
		return "", err
	}
	var objects, kib int
	for l := range strings.Lines(out) {
		k, v, _ := strings.Cut(strings.TrimSpace(l), ": ")
		n, _ := strconv.Atoi(v)
		switch k {
		case "in-pack":
			objects = n
		case "size-pack":
			kib = n
		}
	}
	cmd := b.box.command(ctx, dir, "git", "ls-tree", "-r", "--name-only", "main")
	tree, err := cmd.Output()
	if err != nil {
		return "", fmt.Errorf("git ls-tree: %w", err)
	}
	return fmt.Sprintf("%d commits, %d objects, %d files, a pack of %d MB.", historyCommits, objects, strings.Count(string(tree), "\n"), kib>>10), nil
}
