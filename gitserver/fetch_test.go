package gitserver

import (
	"crypto/ed25519"
	"crypto/rand"
	"encoding/pem"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/crypto/ssh"

	"github.com/m3o/m3o"
	"github.com/m3o/m3o/internal/need"
	"github.com/m3o/m3o/webhook/forgetest"
)

// A member has a clone of a repository at the forge.
type member struct {
	t   *testing.T
	f   *forgetest.Forge
	dir string
}

func newMember(t *testing.T, f *forgetest.Forge) member {
	m := member{t, f, t.TempDir()}
	m.git("init", "-q", "-b", "main")
	return m
}

func (m member) git(args ...string) string {
	m.t.Helper()
	cmd := exec.Command("git", args...)
	cmd.Dir = m.dir
	cmd.Env = append(os.Environ(), "GIT_CONFIG_NOSYSTEM=1", "GIT_CONFIG_GLOBAL=/dev/null", "GIT_AUTHOR_NAME=a", "GIT_AUTHOR_EMAIL=a@localhost", "GIT_COMMITTER_NAME=a", "GIT_COMMITTER_EMAIL=a@localhost")
	out, err := cmd.CombinedOutput()
	if err != nil {
		m.t.Fatalf("git %s: %v\n%s", strings.Join(args, " "), err, out)
	}
	return strings.TrimSpace(string(out))
}

func (m member) commit(files map[string]string) string {
	m.t.Helper()
	for name, text := range files {
		p := filepath.Join(m.dir, name)
		if err := os.MkdirAll(filepath.Dir(p), 0o755); err != nil {
			m.t.Fatal(err)
		}
		if err := os.WriteFile(p, []byte(text), 0o644); err != nil {
			m.t.Fatal(err)
		}
	}
	m.git("add", "-A")
	m.git("commit", "-q", "--allow-empty", "-m", "change")
	return m.git("rev-parse", "HEAD")
}

func deployKey(t *testing.T) (private m3o.Secret, public string) {
	t.Helper()
	pub, key, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	block, err := ssh.MarshalPrivateKey(key, "")
	if err != nil {
		t.Fatal(err)
	}
	sp, err := ssh.NewPublicKey(pub)
	if err != nil {
		t.Fatal(err)
	}
	return m3o.Secret(pem.EncodeToMemory(block)), string(ssh.MarshalAuthorizedKey(sp))
}

// A commit comes over https with a token and over ssh with a deploy key; all
// that can be wrong is told as what it is, and nothing secret with it.
func TestFetchFromElsewhere(t *testing.T) {
	t.Parallel()
	f := forgetest.New(t)
	f.Repo(t, "org/app", true)
	s := newSite(t, siteConfig{}).s
	m := newMember(t, f)
	first := m.commit(map[string]string{"a": "1"})
	f.Push(t, m.dir, "org/app", "refs/heads/main")
	second := m.commit(map[string]string{"a": "2"})
	f.Push(t, m.dir, "org/app", "refs/heads/main")
	key, public := deployKey(t)
	f.AddKey(public)
	lines, print, err := HostKeys(t.Context(), f.SSH)
	if err != nil || !strings.HasPrefix(print, "SHA256:") {
		t.Fatalf("host keys %q %q: %v", lines, print, err)
	}
	https := Remote{URL: "https://" + f.Host + "/org/app.git", User: "x", Password: forgetest.Token, CAFile: f.CAFile}
	overSSH := Remote{URL: "ssh://git@" + f.SSH + "/org/app.git", Key: key, KnownHosts: lines}
	for app, r := range map[string]Remote{"web": https, "shell": overSSH} {
		tips, err := RemoteTips(t.Context(), r, "HEAD", "refs/heads/main", "refs/heads/gone")
		if err != nil || tips["refs/heads/main"] != second || tips["HEAD"] != second || len(tips) != 2 {
			t.Errorf("%s: tips %v, %v", app, tips, err)
		}
		for _, commit := range []string{first, second, second} {
			repo, err := s.Fetch(t.Context(), app, "main", r, commit, "", FetchLimits{})
			if err != nil {
				t.Fatalf("%s: fetch %s: %v (%v)", app, commit, err, m3o.HintOf(err))
			}
			if !has(t.Context(), repo, commit) {
				t.Errorf("%s: %s is not there", app, commit)
			}
		}
	}
	with := func(r Remote, change func(*Remote)) Remote { change(&r); return r }
	otherKey, _ := deployKey(t)
	otherHost := strings.Fields(lines)[0] + " " + public
	nobody := need.Nobody(t)
	for _, c := range []struct {
		name string
		r    Remote
		kind m3o.Kind
		msg  string
	}{
		{"revoked token", with(https, func(r *Remote) { r.Password = "revoked-token" }), m3o.Denied, "refuses the credential"},
		{"no token", with(https, func(r *Remote) { r.Password = "" }), m3o.Denied, "private or does not exist"},
		{"renamed", with(https, func(r *Remote) { r.URL = "https://" + f.Host + "/org/gone.git" }), m3o.NotFound, "is not there"},
		{"unknown CA", with(https, func(r *Remote) { r.CAFile = "" }), m3o.Unavailable, "certificate"},
		{"nobody listens", with(https, func(r *Remote) { r.URL = "https://" + nobody + "/org/app.git" }), m3o.Unavailable, "cannot be reached"},
		{"another deploy key", with(overSSH, func(r *Remote) { r.Key = otherKey }), m3o.Denied, "refuses the credential"},
		{"another host key", with(overSSH, func(r *Remote) { r.KnownHosts = otherHost }), m3o.Denied, "another host key"},
		{"no host key pinned", with(overSSH, func(r *Remote) { r.KnownHosts = "" }), m3o.Denied, "another host key"},
		{"a program as address", Remote{URL: "ext::sh -c touch% x"}, m3o.Invalid, ""},
		{"a file", Remote{URL: "file:///etc"}, m3o.Invalid, "neither"},
		{"plain http", Remote{URL: "http://" + f.Host + "/org/app.git"}, m3o.Invalid, "neither"},
		{"token in the address", Remote{URL: "https://x:secret@" + f.Host + "/org/app.git"}, m3o.Invalid, "apart"},
		{"an option as user", Remote{URL: "ssh://-oProxyCommand=x@" + f.Host + "/a/b"}, m3o.Invalid, ""},
	} {
		_, err := RemoteTips(t.Context(), c.r, "refs/heads/main")
		if m3o.KindOf(err) != c.kind || err == nil || !strings.Contains(err.Error(), c.msg) {
			t.Errorf("%s: %v %v, want %v with %q", c.name, m3o.KindOf(err), err, c.kind, c.msg)
		}
		if err != nil && (strings.Contains(err.Error(), "revoked-token") || strings.Contains(err.Error(), "secret")) {
			t.Errorf("%s: the error says the secret: %v", c.name, err)
		}
	}
	if _, err := s.Fetch(t.Context(), "web", "main", https, strings.Repeat("a", 40), "refs/heads/main", FetchLimits{}); m3o.KindOf(err) != m3o.NotFound {
		t.Errorf("a commit that a forced push removed: %v, want not found", err)
	}
	m.commit(map[string]string{"big": string(random(t, 3<<20))})
	_, large := f.Push(t, m.dir, "org/app", "refs/heads/main")
	if _, err := s.Fetch(t.Context(), "web", "main", https, large, "", FetchLimits{Pack: 1 << 20}); m3o.KindOf(err) != m3o.Invalid || !strings.Contains(err.Error(), "larger than 1 MB") {
		t.Errorf("a commit over the limit: %v (%v), want invalid", err, errors.Unwrap(err))
	}
	if _, err := s.Fetch(t.Context(), "web", "main", https, large, "", FetchLimits{Pack: 8 << 20}); err != nil {
		t.Errorf("the same within the limit: %v", err)
	}
	if _, err := s.Fetch(t.Context(), "web", "main", https, strings.Repeat("b", 40), "", FetchLimits{Time: time.Nanosecond}); m3o.KindOf(err) != m3o.Unavailable {
		t.Errorf("a fetch that takes too long: %v, want unavailable", err)
	}
}

func random(t *testing.T, n int) []byte {
	t.Helper()
	b := make([]byte, n)
	if _, err := rand.Read(b); err != nil {
		t.Fatal(err)
	}
	return b
}

// A token goes to the host it is for, not to where that host sends us on to.
func TestCredentialStaysWithItsHost(t *testing.T) {
	t.Parallel()
	f := forgetest.New(t)
	f.Repo(t, "org/app", true)
	f.RedirectTo("org/moved", "https://localhost:"+strings.Split(f.Host, ":")[1]+"/org/app.git")
	_, err := RemoteTips(t.Context(), Remote{URL: "https://" + f.Host + "/org/moved.git", Password: forgetest.Token, CAFile: f.CAFile}, "HEAD")
	if err == nil {
		t.Error("the repository was read at another host with the first one's token")
	}
	for _, h := range f.Seen("/org/app.git") {
		if h.Get("Authorization") != "" {
			t.Error("the token went to another host")
		}
	}
}

func TestTreesOfFoldersAndSubmodules(t *testing.T) {
	t.Parallel()
	f := forgetest.New(t)
	for _, name := range []string{"org/mono", "org/lib"} {
		f.Repo(t, name, true)
	}
	lib := newMember(t, f)
	libCommit := lib.commit(map[string]string{"lib.go": "package lib\n"})
	f.Push(t, lib.dir, "org/lib", "refs/heads/main")
	m := newMember(t, f)
	m.commit(map[string]string{"go.mod": "module mono\n", "svc/a/main.go": "package main\n", "svc/a/Procfile": "web: a\n", "svc/b/go.mod": "module b\n", "svc/b/main.go": "package main\n",
		"m3o.yaml": "health:\n  http: /ok\n", ".gitmodules": "[submodule \"lib\"]\n\tpath = third/lib\n\turl = ../lib.git\n"})
	m.git("update-index", "--add", "--cacheinfo", "160000,"+libCommit+",third/lib")
	m.git("commit", "-q", "-m", "submodule")
	_, commit := f.Push(t, m.dir, "org/mono", "refs/heads/main")
	s := newSite(t, siteConfig{}).s
	r := Remote{URL: "https://" + f.Host + "/org/mono.git", Password: forgetest.Token, CAFile: f.CAFile}
	repo, err := s.Fetch(t.Context(), "mono", "main", r, commit, "", FetchLimits{})
	if err != nil {
		t.Fatal(err)
	}
	show := func(tree, name string) string {
		out, err := runGit(t.Context(), repo, nil, "", "cat-file", "blob", tree+":"+name)
		if err != nil {
			return ""
		}
		return out
	}
	for _, c := range []struct {
		name string
		g    Graft
		want map[string]string // "" for what must not be there
	}{
		{"all of it", Graft{Remote: &r}, map[string]string{"third/lib/lib.go": "package lib\n", "svc/a/main.go": "package main\n"}},
		{"a module of its own", Graft{Dir: "svc/b", Remote: &r}, map[string]string{"main.go": "package main\n", "go.mod": "module b\n", "svc/a/main.go": ""}},
		{"a package of the module", Graft{Dir: "svc/a", Remote: &r}, map[string]string{"go.mod": "module mono\n", "Procfile": "web: a\n", "third/lib/lib.go": "package lib\n",
			"m3o.yaml": "build:\n    main: ./svc/a\nhealth:\n    http: /ok\n"}},
		{"no submodules", Graft{Dir: "svc/a"}, map[string]string{"svc/a/main.go": "package main\n", "third/lib/lib.go": ""}},
	} {
		tree, err := s.Tree(t.Context(), "mono", repo, "", commit, c.g)
		if err != nil {
			t.Errorf("%s: %v (%v)", c.name, err, m3o.HintOf(err))
			continue
		}
		for name, want := range c.want {
			if got := show(tree, name); got != want {
				t.Errorf("%s: %s is %q, want %q", c.name, name, got, want)
			}
		}
	}
	if _, err := s.Tree(t.Context(), "mono", repo, "", commit, Graft{Dir: "svc/none"}); m3o.KindOf(err) != m3o.NotFound {
		t.Errorf("a folder that is not there: %v", err)
	}
	for _, bad := range []string{"ext::sh -c x", "/etc/passwd", "file:///etc", "-u./x", "http://" + f.Host + "/org/lib.git"} {
		m.commit(map[string]string{".gitmodules": "[submodule \"lib\"]\n\tpath = third/lib\n\turl = " + bad + "\n"})
		m.git("update-index", "--add", "--cacheinfo", "160000,"+libCommit+",third/lib")
		m.git("commit", "-q", "--allow-empty", "-m", "submodule")
		_, commit := f.Push(t, m.dir, "org/mono", "refs/heads/main")
		if _, err := s.Fetch(t.Context(), "mono", "main", r, commit, "", FetchLimits{}); m3o.KindOf(err) == m3o.Invalid {
			continue // git's own check of .gitmodules
		} else if err != nil {
			t.Fatal(err)
		}
		if _, err := s.Tree(t.Context(), "mono", repo, "", commit, Graft{Remote: &r}); m3o.KindOf(err) != m3o.Invalid {
			t.Errorf("a submodule at %q: %v, want invalid", bad, err)
		}
	}
}

func FuzzCheckRemote(f *testing.F) {
	for _, s := range []string{"https://a/b/c", "ssh://git@h:22/x", "ext::x", "https://u:p@h/x", "ssh://-x@h/y", "https://[::1]/x", "https://h/x?y", "\x00"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		u, err := CheckRemote(s)
		if err != nil {
			return
		}
		if _, secret := u.User.Password(); secret || strings.HasPrefix(s, "-") || strings.HasPrefix(u.Hostname(), "-") || strings.HasPrefix(u.User.Username(), "-") || u.Scheme != "https" && u.Scheme != "ssh" {
			t.Errorf("%q was taken", s)
		}
	})
}
