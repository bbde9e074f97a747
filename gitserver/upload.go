package gitserver

import (
	"archive/tar"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/m3o/m3o"
)

const maxUpload = 1 << 30 // sum of the file sizes of an uploaded tree

// UploadRefs is where the commits that CommitTar makes are kept.
const UploadRefs = "refs/m3o/uploads/"

// CommitTar makes a commit without parents of a tar of a source tree, under
// ref, and returns it. Files, executable bits and symbolic links are kept;
// whatever else the tar holds, and a name that is no path of a git tree, is
// an error of kind Invalid, after which ref is not there.
func CommitTar(ctx context.Context, repo, ref, author, message string, r io.Reader) (string, error) {
	if err := checkRefName(ref); err != nil {
		return "", err
	}
	cmd := exec.CommandContext(ctx, "git", gitArgs(os.DevNull, "fast-import", "--quiet", "--done", "--max-pack-size=2g")...)
	cmd.Dir, cmd.Env = repo, append(gitEnv(), "GIT_DIR=.")
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	cmd.Cancel = func() error { return syscall.Kill(-cmd.Process.Pid, syscall.SIGTERM) }
	cmd.WaitDelay = 2 * time.Second
	var said strings.Builder
	cmd.Stderr = &said
	in, err := cmd.StdinPipe()
	if err != nil {
		return "", fmt.Errorf("start git: %w", err)
	}
	if err := cmd.Start(); err != nil {
		return "", fmt.Errorf("start git: %w", err)
	}
	werr := fastImport(in, ref, author, message, time.Now(), r)
	_ = in.Close() // without its "done" git makes nothing
	err = cmd.Wait()
	if crashes, gerr := filepath.Glob(filepath.Join(globQuote(repo), "fast_import_crash_*")); gerr == nil {
		for _, f := range crashes {
			_ = os.Remove(f) // git leaves one for every stream without its end
		}
	}
	if werr != nil && m3o.KindOf(werr) != m3o.Internal {
		return "", werr
	}
	if err = errors.Join(err, werr); err != nil {
		return "", fmt.Errorf("make commit: %w: %s", err, strings.TrimSpace(said.String()))
	}
	return Tip(ctx, repo, ref)
}

// fastImport writes the stream that git fast-import reads. See
// https://git-scm.com/docs/git-fast-import#_input_format.
func fastImport(w io.Writer, ref, author, message string, at time.Time, r io.Reader) error {
	author = strings.Map(func(r rune) rune {
		if r < ' ' || r == '<' || r == '>' {
			return -1
		}
		return r
	}, author)
	if _, err := fmt.Fprintf(w, "commit %s\ncommitter %s <> %d +0000\ndata %d\n%s\n", ref, author, at.Unix(), len(message), message); err != nil {
		return err
	}
	left := int64(maxUpload)
	files := 0
	for tr := tar.NewReader(r); ; {
		h, err := tr.Next()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return &m3o.Error{Kind: m3o.Invalid, Msg: fmt.Sprintf("the uploaded tree is not a tar archive: %v", err), Hint: "try again; if it fails again, push with git instead", Err: err}
		}
		name := path.Clean(h.Name)
		if h.Typeflag == tar.TypeDir || h.Typeflag == tar.TypeXGlobalHeader {
			continue
		}
		if err := checkTarName(name); err != nil {
			return err
		}
		if left -= h.Size; left < 0 {
			return &m3o.Error{Kind: m3o.Invalid, Msg: "the uploaded tree is larger than 1 GB", Hint: "list what a build does not need in .gitignore"}
		}
		mode, body, size := "100644", io.Reader(tr), h.Size
		switch {
		case h.Typeflag == tar.TypeSymlink:
			mode, body, size = "120000", strings.NewReader(h.Linkname), int64(len(h.Linkname))
		case h.Typeflag != tar.TypeReg:
			return &m3o.Error{Kind: m3o.Invalid, Msg: fmt.Sprintf("%q is neither a file, a folder nor a symbolic link", name), Hint: "list it in .gitignore"}
		case h.FileInfo().Mode().Perm()&0o111 != 0:
			mode = "100755"
		}
		if _, err := fmt.Fprintf(w, "M %s inline %s\ndata %d\n", mode, quotePath(name), size); err != nil {
			return err
		}
		if n, err := io.Copy(w, body); errors.Is(err, syscall.EPIPE) {
			return err // git has ended, and says why
		} else if err != nil || n != size {
			return &m3o.Error{Kind: m3o.Invalid, Msg: "the uploaded tree ends too early", Hint: "try again"}
		}
		if _, err := io.WriteString(w, "\n"); err != nil {
			return err
		}
		files++
	}
	if files == 0 {
		return &m3o.Error{Kind: m3o.Invalid, Msg: "the uploaded tree has no files", Hint: "run m3o deploy in the folder of the app"}
	}
	_, err := io.WriteString(w, "done\n")
	return err
}

func checkTarName(name string) error {
	if !fs.ValidPath(name) || name == "." || strings.ContainsAny(name, "\x00\\") {
		return m3o.Errorf(m3o.Invalid, "the uploaded tree has a file called %.100q", name)
	}
	for part := range strings.SplitSeq(name, "/") {
		if strings.EqualFold(part, ".git") {
			return m3o.Errorf(m3o.Invalid, "the uploaded tree has %.100q, which belongs to git", name)
		}
	}
	return nil
}

// quotePath is a path as fast-import reads it.
func quotePath(name string) string {
	if !strings.ContainsAny(name, "\"\n") && !strings.HasPrefix(name, " ") {
		return name
	}
	return `"` + strings.NewReplacer(`"`, `\"`, "\n", `\n`).Replace(name) + `"`
}

// Resolve finds the commit that a branch, tag or commit hash names in repo.
func Resolve(ctx context.Context, repo, name string) (string, error) {
	notThere := &m3o.Error{Kind: m3o.NotFound, Msg: fmt.Sprintf("there is no %.100q in the app's repository", name), Hint: "push it first, or name a branch, tag or commit that was pushed"}
	if name == "" || strings.HasPrefix(name, "-") || strings.ContainsAny(name, " \x00\n:^~?*[\\@{") {
		return "", notThere
	}
	for _, full := range []string{"refs/heads/" + name, "refs/tags/" + name, name} {
		out, err := runGit(ctx, repo, nil, "", "rev-parse", "--verify", "--quiet", "--end-of-options", full+"^{commit}")
		if err == nil {
			return strings.TrimSpace(out), nil
		}
		if ctx.Err() != nil {
			return "", ctx.Err()
		}
	}
	return "", notThere
}

// KeepUploads removes the refs of all uploaded commits but those in keep and
// the newest few, by number.
func KeepUploads(ctx context.Context, repo string, keep map[string]bool) error {
	const newest = 5
	out, err := runGit(ctx, repo, nil, "", "for-each-ref", "--sort=-committerdate", "--format=%(refname) %(objectname)", UploadRefs)
	if err != nil {
		return err
	}
	var gone strings.Builder
	i := 0
	for line := range strings.Lines(out) {
		ref, commit, _ := strings.Cut(strings.TrimSpace(line), " ")
		if i++; i > newest && !keep[commit] {
			fmt.Fprintf(&gone, "delete %s %s\n", ref, commit)
		}
	}
	if gone.Len() == 0 {
		return nil
	}
	_, err = runGit(ctx, repo, nil, gone.String(), "update-ref", "--stdin")
	return err
}
