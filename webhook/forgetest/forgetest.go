// Package forgetest is a forge for tests: it serves real git over https and
// ssh, keeps in memory what is told to the REST APIs of GitHub, GitLab, Gitea
// and Bitbucket, and sends signed deliveries. Only tests import it.
package forgetest

import (
	"bytes"
	"context"
	"crypto/hmac"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/cgi"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"

	"golang.org/x/crypto/ssh"
)

// Token is what may do everything at the forge.
const Token = "forge-token-0123456789abcdef"

// A Status is one that was set on a commit.
type Status struct{ Commit, Context, State, URL, Description string }

// A Comment is one on a pull request. Edits counts how often it was changed.
type Comment struct {
	Pull  int
	Text  string
	Edits int
}

// A Hook is a webhook that was made.
type Hook struct{ URL, Secret string }

// A Forge is one server.
type Forge struct {
	Dir    string // the repositories, owner/name.git
	CAFile string // its certificate
	Host   string // host:port of https
	SSH    string // host:port of ssh
	srv    *httptest.Server
	ca     []byte

	mu          sync.Mutex // guards what follows
	private     map[string]bool
	statuses    []Status
	deployments map[int]string // state by id
	comments    map[int]*Comment
	hooks       map[int]Hook
	keys        map[int]string
	last        int
	app         *rsa.PublicKey // of a GitHub App
	down        int            // how many calls are answered by 503
	gitDown     int            // how many of git's requests are
	hang        chan struct{}  // while it is open, git gets no answer; nil: it does
	moved       map[string]string
	renamed     map[string]string        // as the API answers it
	token       string                   // what may do everything now
	seen        map[string][]http.Header // of git's requests, by repository path
}

// New starts a forge that ends with the test.
func New(t testing.TB) *Forge {
	t.Helper()
	f := &Forge{Dir: t.TempDir(), private: map[string]bool{}, deployments: map[int]string{}, comments: map[int]*Comment{}, hooks: map[int]Hook{}, keys: map[int]string{},
		token: Token, renamed: map[string]string{}, moved: map[string]string{}, seen: map[string][]http.Header{}}
	mux := http.NewServeMux()
	f.rest(mux)
	f.installations(mux)
	mux.HandleFunc("/", f.git)
	f.srv = httptest.NewTLSServer(f.counted(mux))
	t.Cleanup(f.srv.Close)
	f.Host = f.srv.Listener.Addr().String()
	f.ca = pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: f.srv.Certificate().Raw})
	f.CAFile = filepath.Join(t.TempDir(), "ca.crt")
	if err := os.WriteFile(f.CAFile, f.ca, 0o600); err != nil {
		t.Fatal(err)
	}
	f.serveSSH(t)
	return f
}

// CA is the certificate to believe.
func (f *Forge) CA() []byte { return f.ca }

// Down has the next n API calls fail.
func (f *Forge) Down(n int) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.down = n
}

// GitDown has the next n requests of git fail.
func (f *Forge) GitDown(n int) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.gitDown = n
}

// Hang has git wait for an answer until end is called.
func (f *Forge) Hang() (end func()) {
	wait := make(chan struct{})
	f.mu.Lock()
	defer f.mu.Unlock()
	f.hang = wait
	return sync.OnceFunc(func() {
		f.mu.Lock()
		defer f.mu.Unlock()
		f.hang = nil
		close(wait)
	})
}

// Private makes a repository private, or public.
func (f *Forge) Private(name string, yes bool) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.private[name] = yes
}

func (f *Forge) counted(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		api := strings.HasPrefix(r.URL.Path, "/api/") || strings.HasPrefix(r.URL.Path, "/rest/")
		f.mu.Lock()
		fails := api && f.down > 0
		if fails {
			f.down--
		}
		f.mu.Unlock()
		if fails {
			http.Error(w, `{"message":"down for maintenance"}`, http.StatusServiceUnavailable)
			return
		}
		next.ServeHTTP(w, r)
	})
}

// Repo makes an empty repository and returns its address without a scheme.
func (f *Forge) Repo(t testing.TB, name string, private bool) string {
	t.Helper()
	dir := f.path(name)
	run(t, "", "git", "init", "-q", "--bare", "--initial-branch=main", dir)
	run(t, dir, "git", "config", "uploadpack.allowAnySHA1InWant", "true")
	run(t, dir, "git", "config", "http.receivepack", "false")
	f.mu.Lock()
	defer f.mu.Unlock()
	f.private[name] = private
	return f.Host + "/" + name
}

func (f *Forge) path(name string) string { return filepath.Join(f.Dir, name+".git") }

// Rename moves a repository.
func (f *Forge) Rename(t testing.TB, from, to string) {
	t.Helper()
	if err := os.Rename(f.path(from), f.path(to)); err != nil {
		t.Fatal(err)
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	f.private[to] = f.private[from]
}

// Push puts the commit of the work tree dir at a ref of a repository, as a
// member's push would, and returns what was there before.
func (f *Forge) Push(t testing.TB, dir, name, ref string) (before, after string) {
	t.Helper()
	out, _ := exec.Command("git", "-C", f.path(name), "rev-parse", "--verify", "-q", ref).Output()
	if before = strings.TrimSpace(string(out)); before == "" {
		before = strings.Repeat("0", 40)
	}
	run(t, dir, "git", "push", "-q", "--force", f.path(name), "HEAD:"+ref)
	return before, run(t, dir, "git", "rev-parse", "HEAD")
}

// Delete removes a ref of a repository.
func (f *Forge) Delete(t testing.TB, name, ref string) {
	t.Helper()
	run(t, f.path(name), "git", "update-ref", "-d", ref)
}

func run(t testing.TB, dir, name string, args ...string) string {
	t.Helper()
	cmd := exec.Command(name, args...)
	cmd.Dir = dir
	cmd.Env = append(os.Environ(), "GIT_CONFIG_NOSYSTEM=1", "GIT_CONFIG_GLOBAL=/dev/null", "GIT_AUTHOR_NAME=a", "GIT_AUTHOR_EMAIL=a@localhost", "GIT_COMMITTER_NAME=a", "GIT_COMMITTER_EMAIL=a@localhost")
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("%s %s: %v\n%s", name, strings.Join(args, " "), err, out)
	}
	return strings.TrimSpace(string(out))
}

// git is git http-backend behind a check of the token.
func (f *Forge) git(w http.ResponseWriter, r *http.Request) {
	if rest, ok := strings.CutPrefix(r.URL.Path, "/scm/"); ok { // Bitbucket Data Center's way
		r = r.Clone(r.Context())
		r.URL.Path = "/" + rest
	}
	name, _, ok := strings.Cut(strings.TrimPrefix(r.URL.Path, "/"), ".git/")
	f.mu.Lock()
	private, known := f.private[name]
	to, moved := f.moved[name]
	token, hang := f.token, f.hang
	down := f.gitDown > 0
	if down {
		f.gitDown--
	}
	f.seen["/"+name+".git"] = append(f.seen["/"+name+".git"], r.Header.Clone())
	f.mu.Unlock()
	if hang != nil {
		select {
		case <-hang:
		case <-r.Context().Done():
			return
		}
	}
	if down {
		http.Error(w, "down for maintenance", http.StatusServiceUnavailable)
		return
	}
	if moved {
		_, rest, _ := strings.Cut(r.URL.RequestURI(), ".git")
		http.Redirect(w, r, to+rest, http.StatusMovedPermanently)
		return
	}
	_, password, _ := r.BasicAuth()
	if private && password != token {
		w.Header().Set("WWW-Authenticate", `Basic realm="forge"`)
		http.Error(w, "no", http.StatusUnauthorized)
		return
	}
	if !ok || !known {
		http.Error(w, "Repository not found.", http.StatusNotFound)
		return
	}
	backend, err := exec.Command("git", "--exec-path").Output()
	if err != nil {
		http.Error(w, err.Error(), http.StatusInternalServerError)
		return
	}
	h := cgi.Handler{Path: filepath.Join(strings.TrimSpace(string(backend)), "git-http-backend"), Root: "/",
		Env: []string{"GIT_PROJECT_ROOT=" + f.Dir, "GIT_HTTP_EXPORT_ALL=1", "GIT_CONFIG_NOSYSTEM=1", "GIT_CONFIG_GLOBAL=/dev/null", "GIT_PROTOCOL=" + r.Header.Get("Git-Protocol"),
			"GIT_CONFIG_COUNT=1", "GIT_CONFIG_KEY_0=safe.directory", "GIT_CONFIG_VALUE_0=*"}}
	h.ServeHTTP(w, r)
}

// serveSSH serves git-upload-pack to the deploy keys.
func (f *Forge) serveSSH(t testing.TB) {
	t.Helper()
	key, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	signer, err := ssh.NewSignerFromKey(key)
	if err != nil {
		t.Fatal(err)
	}
	conf := &ssh.ServerConfig{PublicKeyCallback: func(_ ssh.ConnMetadata, k ssh.PublicKey) (*ssh.Permissions, error) {
		f.mu.Lock()
		defer f.mu.Unlock()
		for _, text := range f.keys {
			if pub, _, _, _, err := ssh.ParseAuthorizedKey([]byte(text)); err == nil && bytes.Equal(pub.Marshal(), k.Marshal()) {
				return nil, nil
			}
		}
		return nil, fmt.Errorf("unknown key")
	}}
	conf.AddHostKey(signer)
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	f.SSH = ln.Addr().String()
	ctx, cancel := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	t.Cleanup(func() {
		cancel()
		_ = ln.Close()
		wg.Wait()
	})
	wg.Go(func() {
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			wg.Go(func() {
				defer context.AfterFunc(ctx, func() { _ = c.Close() })()
				defer c.Close()
				_, chans, reqs, err := ssh.NewServerConn(c, conf)
				if err != nil {
					return
				}
				go ssh.DiscardRequests(reqs)
				for nc := range chans {
					ch, creqs, err := nc.Accept()
					if err != nil {
						return
					}
					f.session(ctx, ch, creqs)
				}
			})
		}
	})
}

func (f *Forge) session(ctx context.Context, ch ssh.Channel, reqs <-chan *ssh.Request) {
	defer ch.Close() //nolint:errcheck // a test
	var env []string
	for r := range reqs {
		switch r.Type {
		case "env":
			var kv struct{ K, V string }
			if ssh.Unmarshal(r.Payload, &kv) == nil && kv.K == "GIT_PROTOCOL" {
				env = append(env, "GIT_PROTOCOL="+kv.V)
			}
			_ = r.Reply(true, nil)
		case "exec":
			var x struct{ Command string }
			err := ssh.Unmarshal(r.Payload, &x)
			name, ok := strings.CutPrefix(x.Command, "git-upload-pack '/")
			_ = r.Reply(err == nil && ok, nil)
			if err != nil || !ok {
				return
			}
			cmd := exec.CommandContext(ctx, "git", "-c", "safe.directory=*", "upload-pack", filepath.Join(f.Dir, strings.TrimSuffix(name, "'")))
			cmd.Env = append(os.Environ(), env...)
			cmd.Stdin, cmd.Stdout, cmd.Stderr = ch, ch, ch.Stderr()
			code := 0
			if err := cmd.Run(); err != nil {
				code = 1
			}
			_, _ = ch.SendRequest("exit-status", false, ssh.Marshal(struct{ C uint32 }{uint32(code)}))
			return
		default:
			_ = r.Reply(false, nil)
		}
	}
}

// Send sends one delivery of GitHub's kind to a hook and returns the answer.
func (f *Forge) Send(t testing.TB, client *http.Client, h Hook, event, id string, body any) (int, string) {
	t.Helper()
	b, err := json.Marshal(body)
	if err != nil {
		t.Fatal(err)
	}
	code, text, err := Deliver(client, h, event, id, b)
	if err != nil {
		t.Fatal(err)
	}
	return code, text
}

// Deliver is Send for other goroutines.
func Deliver(client *http.Client, h Hook, event, id string, body []byte) (int, string, error) {
	req, err := http.NewRequest(http.MethodPost, h.URL, bytes.NewReader(body))
	if err != nil {
		return 0, "", err
	}
	mac := hmac.New(sha256.New, []byte(h.Secret))
	_, _ = mac.Write(body)
	req.Header.Set("Content-Type", "application/json")
	req.Header.Set("X-GitHub-Event", event)
	req.Header.Set("X-GitHub-Delivery", id)
	req.Header.Set("X-Hub-Signature-256", "sha256="+hex.EncodeToString(mac.Sum(nil)))
	req.Header.Set("X-Gitlab-Event", event)
	req.Header.Set("X-Gitlab-Token", h.Secret)
	req.Header.Set("Idempotency-Key", id)
	res, err := client.Do(req)
	if err != nil {
		return 0, "", err
	}
	defer res.Body.Close()
	text, err := io.ReadAll(res.Body)
	return res.StatusCode, string(text), err
}

// PushEvent is the body of a push as GitHub sends it.
func PushEvent(repo, ref, before, after, message string) map[string]any {
	return map[string]any{"ref": ref, "before": before, "after": after, "repository": map[string]any{"full_name": repo}, "sender": map[string]any{"login": "ada"},
		"head_commit": map[string]any{"id": after, "message": message}, "commits": []any{map[string]any{"id": after, "message": message, "modified": []string{"main.go"}}}}
}

// PullEvent is the body of a pull request's event as GitHub sends it.
func PullEvent(repo, action string, number int, head, headRepo string) map[string]any {
	return map[string]any{"action": action, "number": number, "repository": map[string]any{"full_name": repo}, "sender": map[string]any{"login": "ada"},
		"pull_request": map[string]any{"number": number, "title": "A change", "html_url": "https://forge/pull", "user": map[string]any{"login": "ada"},
			"head": map[string]any{"sha": head, "ref": "feature", "repo": map[string]any{"full_name": headRepo}},
			"base": map[string]any{"ref": "main", "repo": map[string]any{"full_name": repo}}}}
}

// Statuses are those of a commit, oldest first.
func (f *Forge) Statuses(commit string) []Status {
	f.mu.Lock()
	defer f.mu.Unlock()
	var out []Status
	for _, s := range f.statuses {
		if s.Commit == commit {
			out = append(out, s)
		}
	}
	return out
}

// Comments are those of a pull request.
func (f *Forge) Comments(pull int) []Comment {
	f.mu.Lock()
	defer f.mu.Unlock()
	var out []Comment
	for _, c := range f.comments {
		if c.Pull == pull {
			out = append(out, *c)
		}
	}
	return out
}

// Deployments counts the deployments by state.
func (f *Forge) Deployments() map[string]int {
	f.mu.Lock()
	defer f.mu.Unlock()
	out := map[string]int{}
	for _, s := range f.deployments {
		out[s]++
	}
	return out
}

// Hooks are the webhooks there are.
func (f *Forge) Hooks() []Hook {
	f.mu.Lock()
	defer f.mu.Unlock()
	var out []Hook
	for _, h := range f.hooks {
		out = append(out, h)
	}
	return out
}

// Keys counts the deploy keys.
func (f *Forge) Keys() int {
	f.mu.Lock()
	defer f.mu.Unlock()
	return len(f.keys)
}

// AddKey registers a deploy key.
func (f *Forge) AddKey(public string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.last++
	f.keys[f.last] = public
}

// Moved has the API know a repository by its old name too, as forges do.
func (f *Forge) Moved(from, to string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.renamed[from] = to
}

// Revoke makes Token one of the past.
func (f *Forge) Revoke() {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.token = "another"
}

// RedirectTo sends requests for a repository on to another address.
func (f *Forge) RedirectTo(name, address string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.moved[name] = address
}

// Seen are the headers of git's requests for a path, /org/app.git.
func (f *Forge) Seen(path string) []http.Header {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.seen[path]
}

// Client is an HTTP client that believes the forge.
func (f *Forge) Client() *http.Client { return f.srv.Client() }

func itoa(n int) string { return strconv.Itoa(n) }

func number(s string) int { n, _ := strconv.Atoi(s); return n }
