package main

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
	"strconv"
	"strings"

	"connectrpc.com/connect"

	m3ov1 "github.com/m3o/m3o/api/m3o/v1"
)

func deployCommands() []*command {
	return []*command{
		{name: "deploy", aliases: []string{"apps:deploy"}, group: "Deploys", args: "[DIR]", max: 1, app: true, run: runDeploy, completes: "file",
			short: "Deploy without a push: a folder as it is, a ref that was pushed, or an image",
			long: `With DIR, usually ".", the folder is deployed as it is, commits or not: in a git repository what git tracks or would track,
with what is changed; elsewhere all files but hidden ones. The server keeps it as a commit of its own; no branch moves.

--ref deploys a branch, tag or commit that is in the app's repository. --image deploys an OCI archive, as docker save and
buildx write it, if there is a file of that name, and else what a registry has by that name; its own command runs as web.
Without any of these the deploy branch is deployed again.`,
			example: "m3o deploy .\nm3o deploy --ref v1.2\nm3o deploy --image app.tar\nm3o deploy --image registry.example.com/team/app:1.2",
			flags: []flag{
				{"ref", "", "REF", "a branch, tag or commit that was pushed"},
				{"image", "i", "IMAGE", "an OCI archive, or the name of an image in a registry"},
				{"force-rebuild", "", "", "build again even if nothing changed"},
				{"allow-breaking", "", "", "deploy even if callers break"},
			}},
		{name: "builds:info", group: "Deploys", args: "[BUILD]", max: 1, app: true, run: runBuildsInfo, completes: "build",
			short: "Show one build, the newest without a number: where the time went, and what came of it"},
		{name: "builds:cancel", group: "Deploys", args: "[BUILD]", max: 1, app: true, run: runBuildsCancel, completes: "build",
			short: "Stop the build that runs; what is live stays"},
		{name: "sbom", aliases: []string{"builds:sbom"}, group: "Deploys", args: "[RELEASE]", max: 1, app: true, run: runSbom, completes: "release",
			short: "Print the bill of materials of a release's image, the live one's without a name",
			long:  "CycloneDX, from what the image's Go binaries say of themselves.",
			flags: []flag{{"provenance", "", "", "print instead how the image was made: an in-toto statement of SLSA provenance"}}},
		{name: "verify", aliases: []string{"releases:verify"}, group: "Deploys", args: "[RELEASE]", max: 1, app: true, run: runVerify, completes: "release",
			short: "Build a release again from its commit and compare the images bit by bit",
			long: `The toolchain is the one of then; the caches are not those that builds write to. Nothing of what runs changes. The exit
status is 1 when the images differ, and what differs is listed.`,
			example: "m3o verify\nm3o verify v12 -a hello"},
	}
}

func runDeploy(ctx context.Context, c *call) error {
	ways := 0
	for _, set := range []bool{len(c.args) > 0, c.has("ref"), c.has("image")} {
		if set {
			ways++
		}
	}
	if ways > 1 {
		return misuse("DIR, --ref and --image exclude each other", "m3o help deploy")
	}
	app, cl, err := c.withApp(ctx)
	if err != nil {
		return err
	}
	req := &m3ov1.StartDeployRequest{App: app, Ref: c.value("ref")}
	for _, o := range []string{"force-rebuild", "allow-breaking"} {
		if c.has(o) {
			req.Options = append(req.Options, o)
		}
	}
	switch {
	case len(c.args) > 0:
		up, err := c.uploadTree(ctx, cl, app, c.args[0])
		if err != nil {
			return err
		}
		req.Ref = up.GetCommit()
	case c.has("image"):
		req.Image = c.value("image")
		f, err := os.Open(c.path(req.Image))
		if errors.Is(err, fs.ErrNotExist) {
			break // the name of an image
		}
		if err != nil {
			return err
		}
		defer f.Close() //nolint:errcheck // read only
		if err := c.mayUpload(); err != nil {
			return err
		}
		up, err := c.upload(ctx, cl, &m3ov1.UploadRequest{App: app, Kind: m3ov1.UploadKind_UPLOAD_KIND_IMAGE}, f)
		if err != nil {
			return err
		}
		req.Image = up.GetImage()
	}
	stream, err := cl.deploys.Start(ctx, connect.NewRequest(req))
	var last *m3ov1.StartDeployResponse
	err = receive(ctx, cl, false, stream, err, func(m *m3ov1.StartDeployResponse) error {
		if m.GetRelease() != "" {
			last = m
		}
		c.sayLines(m.GetOutput())
		return nil
	})
	if err != nil {
		return err
	}
	if last == nil {
		return fail("the deploy ended without a word", "m3o builds:output -a "+app)
	}
	return c.result(last, func() {
		c.print("%s\n", plain(last.GetRelease()))
	})
}

// mayUpload refuses to read files where the command runs on the server, in
// the name of who has only ssh.
func (c *call) mayUpload() error {
	if c.env("M3O_NO_FILES") != "" {
		return misuse("there are no files of yours here", "m3o deploy --ref BRANCH, or run m3o on your own machine")
	}
	return nil
}

func (c *call) path(name string) string {
	if filepath.IsAbs(name) {
		return name
	}
	return filepath.Join(c.dir, name)
}

const pieceSize = 4 << 20

// upload sends a file in pieces. req says what it is.
func (c *call) upload(ctx context.Context, cl *client, req *m3ov1.UploadRequest, r io.Reader) (*m3ov1.UploadResponse, error) {
	buf := make([]byte, pieceSize)
	for {
		n, err := io.ReadFull(r, buf)
		end := errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF)
		if err != nil && !end {
			return nil, err
		}
		req.Data, req.Last = buf[:n], end
		res, err := ask(ctx, cl.deploys.Upload, req)
		if err != nil || end {
			return res, err
		}
		req.Id = res.GetId()
		req.Offset += int64(n)
	}
}

// uploadTree sends a folder as a tar.
func (c *call) uploadTree(ctx context.Context, cl *client, app, dir string) (*m3ov1.UploadResponse, error) {
	if err := c.mayUpload(); err != nil {
		return nil, err
	}
	root := c.path(dir)
	if fi, err := os.Stat(root); err != nil || !fi.IsDir() {
		return nil, misuse(quoted(dir)+" is no folder", "m3o deploy . deploys this one; --ref takes a branch")
	}
	files, what, err := listTree(ctx, root)
	if err != nil {
		return nil, err
	}
	c.say("Sending %d files", len(files))
	pr, pw := io.Pipe()
	go func() { pw.CloseWithError(writeTree(pw, root, files)) }() // ends when all is read, or pr is closed
	defer pr.Close()                                              //nolint:errcheck // ends the writer
	return c.upload(ctx, cl, &m3ov1.UploadRequest{App: app, Kind: m3ov1.UploadKind_UPLOAD_KIND_TREE, Message: what}, pr)
}

// listTree lists what git tracks or would track below root, or else all but
// hidden files, and says in one line what it is.
func listTree(ctx context.Context, root string) (files []string, what string, err error) {
	git := func(args ...string) (string, error) {
		cmd := exec.CommandContext(ctx, "git", args...)
		cmd.Dir = root
		out, err := cmd.Output()
		return string(out), err
	}
	what = "m3o deploy of a folder"
	out, err := git("ls-files", "-z", "--cached", "--others", "--exclude-standard", "--deduplicate")
	if err == nil {
		for f := range strings.SplitSeq(out, "\x00") {
			// What is deleted but not staged is still listed.
			if fi, err := os.Lstat(filepath.Join(root, f)); f != "" && err == nil && !fi.IsDir() {
				files = append(files, f)
			}
		}
		if head, err := git("rev-parse", "--short=12", "HEAD"); err == nil {
			what = "m3o deploy of " + strings.TrimSpace(head)
			if changed, err := git("status", "--porcelain", "--", "."); err == nil && changed != "" {
				what += fmt.Sprintf(" and %d changed files", strings.Count(changed, "\n"))
			}
		}
	} else {
		err = filepath.WalkDir(root, func(p string, e fs.DirEntry, err error) error {
			if err != nil || p == root {
				return err
			}
			if strings.HasPrefix(e.Name(), ".") {
				if e.IsDir() {
					return fs.SkipDir
				}
				return nil
			}
			rel, err := filepath.Rel(root, p)
			if err == nil && !e.IsDir() {
				files = append(files, filepath.ToSlash(rel))
			}
			return err
		})
		if err != nil {
			return nil, "", err
		}
	}
	if len(files) == 0 {
		return nil, "", fail("there is no file to deploy in "+root, "files that .gitignore names are left out")
	}
	return files, what, nil
}

func writeTree(w io.Writer, root string, files []string) error {
	tw := tar.NewWriter(w)
	for _, name := range files {
		if err := addFile(tw, filepath.Join(root, filepath.FromSlash(name)), path.Clean(name)); err != nil {
			return fmt.Errorf("send %s: %w", name, err)
		}
	}
	return tw.Close()
}

func addFile(tw *tar.Writer, from, name string) error {
	fi, err := os.Lstat(from)
	if err != nil {
		return err
	}
	h := &tar.Header{Name: name, Typeflag: tar.TypeReg, Mode: int64(0o644 | fi.Mode().Perm()&0o111), Size: fi.Size(), Format: tar.FormatPAX}
	if fi.Mode()&fs.ModeSymlink != 0 {
		link, err := os.Readlink(from)
		if err != nil {
			return err
		}
		h.Typeflag, h.Linkname, h.Size = tar.TypeSymlink, filepath.ToSlash(link), 0
		return tw.WriteHeader(h)
	}
	if !fi.Mode().IsRegular() {
		return errors.New("it is neither a file nor a symbolic link")
	}
	f, err := os.Open(from)
	if err != nil {
		return err
	}
	defer f.Close() //nolint:errcheck // read only
	if err := tw.WriteHeader(h); err != nil {
		return err
	}
	// One that shrinks or grows meanwhile is an error of the tar writer's.
	_, err = io.Copy(tw, f)
	return err
}

// buildNumber is the build that the first argument names, 0 without one.
func (c *call) buildNumber() (int32, error) {
	if len(c.args) == 0 {
		return 0, nil
	}
	n, err := strconv.ParseUint(c.args[0], 10, 31)
	if err != nil || n < 1 {
		return 0, misuse(quoted(c.args[0])+" is no build", "they are called 1, 2, 3 …; m3o builds lists them")
	}
	return int32(n), nil
}

func runBuildsInfo(ctx context.Context, c *call) error {
	n, err := c.buildNumber()
	if err != nil {
		return err
	}
	app, cl, err := c.withApp(ctx)
	if err != nil {
		return err
	}
	b, err := ask(ctx, cl.records.Get, &m3ov1.GetBuildRequest{App: app, Number: n})
	if err != nil {
		return err
	}
	return c.result(b, func() {
		length, size := "", ""
		if b.GetStarted().IsValid() && b.GetFinished().IsValid() {
			length = took(b.GetFinished().AsTime().Sub(b.GetStarted().AsTime()).Milliseconds())
		}
		if b.GetSize() > 0 {
			size = fmt.Sprintf("%.1f MB", float64(b.GetSize())/1e6)
		}
		c.fields("Build", fmt.Sprint(b.GetNumber()), "Status", c.status(plain(b.GetStatus())), "Release", plain(b.GetRelease()), "Error", plain(b.GetError()),
			"Commit", plain(b.GetCommit()), "Message", plain(b.GetMessage()), "By", plain(b.GetUser()), "Started", c.when(b.GetStarted()), "Took", length,
			"Builder", plain(b.GetBuilder()), "Toolchain", plain(b.GetToolchain()), "Image", plain(b.GetImage()), "Size", size)
		var rows [][]string
		for _, s := range b.GetSteps() {
			how := took(s.GetMillis())
			if s.GetCached() {
				how = "cached"
			}
			rows = append(rows, []string{plain(s.GetName()), how})
		}
		if len(rows) > 0 {
			c.print("\n")
			c.table([]string{"STEP", "TOOK"}, rows)
		}
	})
}

func runBuildsCancel(ctx context.Context, c *call) error {
	n, err := c.buildNumber()
	if err != nil {
		return err
	}
	app, cl, err := c.withApp(ctx)
	if err != nil {
		return err
	}
	res, err := ask(ctx, cl.records.Cancel, &m3ov1.CancelBuildRequest{App: app, Number: n})
	if err != nil {
		return err
	}
	return c.result(res, func() { c.say("Build %d of %s is cancelled; what is live stays", res.GetNumber(), app) })
}

func runSbom(ctx context.Context, c *call) error {
	app, cl, err := c.withApp(ctx)
	if err != nil {
		return err
	}
	req := &m3ov1.SbomRequest{App: app, Provenance: c.has("provenance")}
	if len(c.args) > 0 {
		req.Release = c.args[0]
	}
	res, err := ask(ctx, cl.records.Sbom, req)
	if err != nil {
		return err
	}
	_, err = c.out.Write(append(res.GetDocument(), '\n'))
	return err
}

func runVerify(ctx context.Context, c *call) error {
	app, cl, err := c.withApp(ctx)
	if err != nil {
		return err
	}
	req := &m3ov1.VerifyRequest{App: app}
	if len(c.args) > 0 {
		req.Release = c.args[0]
	}
	stream, err := cl.records.Verify(ctx, connect.NewRequest(req))
	var last *m3ov1.VerifyResponse
	err = receive(ctx, cl, false, stream, err, func(m *m3ov1.VerifyResponse) error {
		if m.GetRecorded() != "" {
			last = m
		}
		c.sayLines(m.GetOutput())
		return nil
	})
	if err != nil {
		return err
	}
	if last == nil {
		return fail("the server ended without an answer", "try again")
	}
	if err := c.result(last, func() {
		if last.GetIdentical() {
			c.print("bit-identical: %s\n", plain(last.GetRecorded()))
			return
		}
		c.print("differs: recorded %s, rebuilt %s\n", plain(last.GetRecorded()), plain(last.GetRebuilt()))
		for _, d := range last.GetDifferences() {
			c.print("  %s\n", plain(d))
		}
	}); err != nil {
		return err
	}
	if !last.GetIdentical() {
		return fail("the image is not what its source builds to", "m3o sbom --provenance shows what it was built with")
	}
	return nil
}

// sayLines passes a deploy's output on to who watches.
func (c *call) sayLines(b []byte) {
	for line := range strings.Lines(string(b)) {
		c.say("%s", c.text(strings.TrimSuffix(line, "\n")))
	}
}
