package main

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/rogpeppe/go-internal/testscript"

	"github.com/m3o/m3o/internal/need"
)

// TestScripts runs the scenarios of testdata/script: each is a person with an
// SSH key who is signed in, in an empty directory. The command app copies a
// sample of testdata/apps into a new git repository; everything else is the
// real m3o, git, ssh and curl.
func TestScripts(t *testing.T) {
	b := theBox(t)
	samples := filepath.Join(need.RepoRoot(t), "testdata", "apps")
	testscript.Run(t, testscript.Params{
		Dir:                 filepath.Join(need.RepoRoot(t), "testdata", "script"),
		RequireExplicitExec: true,
		RequireUniqueNames:  true,
		Setup: func(e *testscript.Env) error {
			p := b.user(t, "s-"+strings.TrimPrefix(filepath.Base(e.WorkDir), "script-"))
			e.Vars = append(p.env(), "WORK="+e.WorkDir, "API="+b.api, "HTTPS_PORT="+portOf(b.https), "SSH_PORT="+portOf(b.ssh), "USER="+p.name,
				"TMPDIR="+e.WorkDir)
			return nil
		},
		Cmds: map[string]func(*testscript.TestScript, bool, []string){
			"app": func(ts *testscript.TestScript, neg bool, args []string) {
				if neg || len(args) != 2 {
					ts.Fatalf("usage: app SAMPLE DIRECTORY")
				}
				dir := ts.MkAbs(args[1])
				ts.Check(os.CopyFS(dir, os.DirFS(filepath.Join(samples, args[0]))))
				ts.Check(ts.Exec("git", "-C", dir, "init", "-q", "-b", "main"))
				ts.Check(ts.Exec("git", "-C", dir, "add", "-A"))
				ts.Check(ts.Exec("git", "-C", dir, "commit", "-q", "-m", "first"))
			},
		},
	})
}
