package gitserver

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/url"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"time"

	"golang.org/x/crypto/ssh"
	"golang.org/x/sys/unix"

	"github.com/m3o/m3o"
)

// A Remote is a repository elsewhere and the credential for it. The
// credential goes to git by a file that has no name: it is in no argument, no
// variable, no URL and not on the disk.
type Remote struct {
	URL        string     // https://host/owner/name or ssh://git@host/owner/name, with nothing secret in it
	User       string     // with Password, for https; any name will do for most forges
	Password   m3o.Secret // a token
	Key        m3o.Secret // private SSH key, PEM
	KnownHosts string     // lines as ssh's known_hosts has them; no other key of the host is believed
	CAFile     string     // further certificates to believe for https; "" for the system's alone
}

// FetchLimits bound what one fetch may cost. Zero fields have the defaults.
type FetchLimits struct {
	Pack int64         // bytes of one pack; 512 MB
	Time time.Duration // 5 min
}

// CheckRemote reports why git may not be sent to rawURL.
func CheckRemote(rawURL string) (*url.URL, error) {
	bad := func(why string) (*url.URL, error) {
		return nil, &m3o.Error{Kind: m3o.Invalid, Msg: "the repository's address " + why, Hint: "use https://host/owner/name or ssh://git@host/owner/name"}
	}
	u, err := url.Parse(rawURL)
	if err != nil || len(rawURL) > 1000 || strings.ContainsFunc(rawURL, func(r rune) bool { return r <= ' ' || r == 0x7f }) {
		return bad("is no URL")
	}
	switch {
	case u.Scheme != "https" && u.Scheme != "ssh":
		return bad("begins with neither https:// nor ssh://")
	case u.Hostname() == "" || strings.HasPrefix(u.Hostname(), "-"):
		return bad("has no host")
	case strings.Trim(u.Path, "/") == "" || u.RawQuery != "" || u.Fragment != "":
		return bad("has no path, or more than one")
	case u.Scheme == "https" && u.User != nil:
		return bad("has a user in it; give the token apart from it")
	}
	if _, secret := u.User.Password(); secret {
		return bad("has a password in it")
	}
	if strings.HasPrefix(u.User.Username(), "-") {
		return bad("has no user of a name")
	}
	return u, nil
}

// RemoteTips is what refs of the remote point to now, those that it has.
func RemoteTips(ctx context.Context, r Remote, refs ...string) (map[string]string, error) {
	for _, ref := range refs {
		if ref == "HEAD" {
			continue
		}
		if err := checkRefName(ref); err != nil {
			return nil, err
		}
	}
	out, err := r.git(ctx, os.TempDir(), FetchLimits{Time: time.Minute}, append([]string{"ls-remote", "--quiet", "--", r.URL}, refs...)...)
	if err != nil {
		return nil, err
	}
	tips := map[string]string{}
	for l := range strings.Lines(out) {
		hash, name, ok := strings.Cut(strings.TrimSpace(l), "\t")
		// A pattern fits the ends of other names too.
		for _, ref := range refs {
			if ok && name == ref && isHash(hash) {
				tips[name] = hash
			}
		}
	}
	return tips, nil
}

func isHash(s string) bool {
	return len(s) == 40 && strings.Trim(s, "0123456789abcdef") == ""
}

// Fetch brings exactly commit, without its history, into app's repository,
// where earlier commits save it from being sent whole. ref, "" for none, is
// where the commit can be found if the remote does not give commits by name.
func (s *Server) Fetch(ctx context.Context, app, branch string, r Remote, commit, ref string, lim FetchLimits) (repo string, err error) {
	if !isHash(commit) {
		return "", m3o.Errorf(m3o.Invalid, "%.60q is not a commit hash", commit)
	}
	if _, err := CheckRemote(r.URL); err != nil {
		return "", err
	}
	ctx, release, err := s.use(ctx, app)
	if err != nil {
		return "", err
	}
	clean := false
	defer func() { release(clean) }()
	if repo, err = s.ensureRepo(ctx, app, branch); err != nil {
		return "", err
	}
	if has(ctx, repo, commit) {
		clean = true
		return repo, nil
	}
	args := []string{"fetch", "--quiet", "--depth=1", "--no-tags", "--no-write-fetch-head", "--no-auto-maintenance", "--no-recurse-submodules", "--", r.URL}
	_, err = r.git(ctx, repo, lim, append(args, commit)...)
	if err != nil && ref != "" && checkRefName(ref) == nil && strings.Contains(fmt.Sprint(errors.Unwrap(err)), "unadvertised object") {
		_, err = r.git(ctx, repo, lim, append(args, ref)...)
	}
	if cause := context.Cause(ctx); err != nil && cause != nil {
		err = cause
	}
	if err != nil {
		return "", err
	}
	if !has(ctx, repo, commit) {
		return "", &m3o.Error{Kind: m3o.NotFound, Msg: "the remote has no commit " + commit[:12] + " any more", Hint: "it was probably replaced by a forced push"}
	}
	clean = true
	return repo, nil
}

// has reports whether the repository has the commit and its whole tree, which
// is so for every commit that a fetch or push completed.
func has(ctx context.Context, repo, commit string) bool {
	_, err := runGit(ctx, repo, nil, "", "cat-file", "-e", commit+"^{commit}")
	return err == nil
}

// CheckRef reports why name is no full name of a ref.
func CheckRef(name string) error { return checkRefName(name) }

// use keeps upkeep and deletion away from app's repository, as a push does.
// The context ends when the app is removed.
func (s *Server) use(ctx context.Context, app string) (context.Context, func(clean bool), error) {
	p := &push{policy: policy{app: app}}
	p.ctx, p.cancel = context.WithCancelCause(ctx)
	if err := s.share(p.ctx, p); err != nil {
		p.cancel(nil)
		return nil, nil, err
	}
	return p.ctx, func(clean bool) {
		s.unshare(p, clean)
		p.cancel(nil)
	}, nil
}

// DropRef removes a ref of a repository; it is no error if it is not there.
func DropRef(ctx context.Context, repo, ref string) error {
	if err := checkRefName(ref); err != nil {
		return err
	}
	if _, err := os.Stat(repo); err != nil {
		return nil
	}
	_, err := runGit(ctx, repo, nil, "", "update-ref", "-d", "--", ref)
	return err
}

// secretFile is a file in memory with that content, for children alone.
func secretFile(content string) (*os.File, error) {
	fd, err := unix.MemfdCreate("m3o", unix.MFD_CLOEXEC)
	if err != nil {
		return nil, fmt.Errorf("make file in memory: %w", err)
	}
	f := os.NewFile(uintptr(fd), "secret")
	// ssh refuses a key that others could read.
	if err := errors.Join(f.Chmod(0o600), func() error { _, err := io.WriteString(f, content); return err }()); err != nil {
		return nil, errors.Join(err, f.Close())
	}
	return f, nil
}

// limited starts git with limits that its children inherit: for the size of a
// file, since git has none for what it fetches, and for CPU time, which is
// what stops a pack that unfolds without end.
const limited = `ulimit -f "$1" && ulimit -t "$2" && shift 2 && exec git "$@"`

// git runs one git command that speaks with the remote.
func (r Remote) git(ctx context.Context, dir string, lim FetchLimits, args ...string) (string, error) {
	u, err := CheckRemote(r.URL)
	if err != nil {
		return "", err
	}
	lim.Pack, lim.Time = cmp.Or(lim.Pack, 512<<20), cmp.Or(lim.Time, 5*time.Minute)
	ctx, cancel := context.WithTimeoutCause(ctx, lim.Time, &m3o.Error{Kind: m3o.Unavailable,
		Msg: fmt.Sprintf("%s took longer than %s", u.Hostname(), lim.Time), Hint: "it is tried again"})
	defer cancel()
	conf := []string{"protocol." + u.Scheme + ".allow=always", "protocol.version=2", "fetch.fsckObjects=true", "fetch.unpackLimit=1",
		"fetch.fsck.badTimezone=ignore", "fetch.fsck.missingSpaceBeforeDate=ignore", "fetch.fsck.zeroPaddedFilemode=ignore",
		"credential.helper=", "http.followRedirects=initial", "http.lowSpeedLimit=1000", "http.lowSpeedTime=30", "core.askPass=true", "submodule.recurse=false"}
	var env []string
	var files []*os.File
	defer func() {
		for _, f := range files {
			_ = f.Close()
		}
	}()
	secret := func(content string) (*os.File, error) {
		f, err := secretFile(content)
		if err == nil {
			files = append(files, f)
		}
		return f, err
	}
	switch u.Scheme {
	case "https":
		if r.CAFile != "" {
			conf = append(conf, "http.sslCAInfo="+r.CAFile)
		}
		if r.Password != "" {
			if strings.ContainsAny(r.User+r.Password.Reveal(), "\n\x00") {
				return "", m3o.Errorf(m3o.Invalid, "the token has a line break in it")
			}
			if _, err := secret("username=" + cmp.Or(r.User, "m3o") + "\npassword=" + r.Password.Reveal() + "\n"); err != nil {
				return "", err
			}
			// For this host alone: where the remote sends us on to, no credential goes.
			conf = append(conf, "credential.https://"+u.Host+`.helper=!f() { test "$1" = get && cat /proc/self/fd/3; }; f`)
		}
	case "ssh":
		hosts, err := secret(r.KnownHosts)
		if err != nil {
			return "", err
		}
		key, err := secret(r.Key.Reveal())
		if err != nil {
			return "", err
		}
		// ssh closes what it inherits, so it opens the files by our name for them.
		path := func(f *os.File) string { return fmt.Sprintf("/proc/%d/fd/%d", os.Getpid(), f.Fd()) }
		env = append(env, "GIT_SSH_VARIANT=ssh", "GIT_SSH_COMMAND=ssh -F /dev/null -i "+path(key)+" -o IdentitiesOnly=yes -o IdentityAgent=none"+
			" -o UserKnownHostsFile="+path(hosts)+" -o GlobalKnownHostsFile=/dev/null -o StrictHostKeyChecking=yes -o UpdateHostKeys=no"+
			" -o BatchMode=yes -o ConnectTimeout=20 -o ForwardAgent=no -o ProxyCommand=none -o ClearAllForwardings=yes")
	}
	var all []string
	for _, c := range conf {
		all = append(all, "-c", c)
	}
	all = append(append([]string{"-c", limited, "git", fmt.Sprint(lim.Pack / 512), "600"}, gitArgs(os.DevNull, all...)...), args...)
	cmd := exec.CommandContext(ctx, "/bin/sh", all...)
	cmd.Dir, cmd.Env, cmd.ExtraFiles = dir, gitEnv(env...), files
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	cmd.Cancel = func() error { return syscall.Kill(-cmd.Process.Pid, syscall.SIGTERM) }
	cmd.WaitDelay = 2 * time.Second
	var out bytes.Buffer
	said := &tail{}
	cmd.Stdout, cmd.Stderr = &out, said
	if err := cmd.Run(); err != nil {
		if cause := context.Cause(ctx); cause != nil {
			return "", cause
		}
		return "", explainFetch(u, r, lim, said.String(), err)
	}
	return out.String(), nil
}

// tail keeps the last kilobytes of what a git says.
type tail struct{ b []byte }

func (t *tail) Write(p []byte) (int, error) {
	t.b = append(t.b, p...)
	if n := len(t.b) - 8<<10; n > 0 {
		t.b = t.b[n:]
	}
	return len(p), nil
}

func (t *tail) String() string { return string(t.b) }

// explainFetch says what a failed fetch means to whoever connected the repository.
func explainFetch(u *url.URL, r Remote, lim FetchLimits, said string, err error) error {
	low := strings.ToLower(said)
	any := func(words ...string) bool {
		for _, w := range words {
			if strings.Contains(low, w) {
				return true
			}
		}
		return false
	}
	e := &m3o.Error{Err: fmt.Errorf("git: %w: %s", err, strings.TrimSpace(said))}
	name := u.Host + "/" + strings.TrimSuffix(strings.Trim(u.Path, "/"), ".git")
	switch {
	case any("host key verification failed", "no matching host key", "remote host identification has changed"):
		e.Kind, e.Msg, e.Hint = m3o.Denied, u.Host+" shows another host key than the pinned one", "if its key was changed on purpose, m3o repo:connect again pins the new one"
	case any("permission denied", "authentication failed", "invalid credentials", "could not read username", "could not read password", "returned error: 401", "returned error: 403", "access denied"):
		e.Kind, e.Msg, e.Hint = m3o.Denied, name+" refuses the credential", "it was revoked or may not read the repository: m3o repo:connect with a new one"
		if r.Password == "" && r.Key == "" {
			e.Msg, e.Hint = name+" is private or does not exist", "m3o repo:connect with --token-stdin or --deploy-key"
		}
	case any("repository not found", "not found", "does not exist", "does not appear to be a git repository", "returned error: 404"):
		e.Kind, e.Msg, e.Hint = m3o.NotFound, name+" is not there, or not for this credential", "it was renamed, deleted or made private: m3o repo:connect with the new name or a credential"
	case any("file too large", "signal 25", "invalid index-pack output"): // a limit ended index-pack
		e.Kind, e.Msg, e.Hint = m3o.Invalid, fmt.Sprintf("the commit is larger than %d MB", lim.Pack>>20), "keep large files out of the repository"
	case any("not our ref", "unadvertised object", "no such remote ref", "couldn't find remote ref"):
		e.Kind, e.Msg, e.Hint = m3o.NotFound, name+" does not have the commit any more", "it was probably replaced by a forced push"
	case any("certificate", "ssl"):
		e.Kind, e.Msg, e.Hint = m3o.Unavailable, u.Host+" has a certificate that is not believed", "m3od --forge-ca names a file with the CA of your forge"
	case any("fsck", "bad object", "corrupt"):
		e.Kind, e.Msg, e.Hint = m3o.Invalid, name+" sent objects that git refuses", "run git fsck in the repository"
	default:
		e.Kind, e.Msg, e.Hint = m3o.Unavailable, u.Host+" cannot be reached or does not answer as a git server", "it is tried again"
	}
	return e
}

// HostKeys asks host (host or host:port) for its SSH keys and returns them as
// lines of known_hosts, for a first connection that pins them.
func HostKeys(ctx context.Context, hostport string) (lines string, fingerprint string, err error) {
	addr := hostport
	if _, _, err := net.SplitHostPort(addr); err != nil {
		addr = net.JoinHostPort(strings.Trim(hostport, "[]"), "22")
	}
	ctx, cancel := context.WithTimeout(ctx, 15*time.Second)
	defer cancel()
	conn, err := (&net.Dialer{}).DialContext(ctx, "tcp", addr)
	if err != nil {
		return "", "", &m3o.Error{Kind: m3o.Unavailable, Msg: addr + " cannot be reached", Hint: "check the host and port of the repository's address", Err: err}
	}
	defer conn.Close() //nolint:errcheck // only asked
	if d, ok := ctx.Deadline(); ok {
		_ = conn.SetDeadline(d)
	}
	var seen ssh.PublicKey
	errSeen := errors.New("seen")
	_, _, _, err = ssh.NewClientConn(conn, addr, &ssh.ClientConfig{User: "git", HostKeyAlgorithms: []string{ssh.KeyAlgoED25519, ssh.KeyAlgoECDSA256, ssh.KeyAlgoRSASHA512, ssh.KeyAlgoRSASHA256},
		HostKeyCallback: func(_ string, _ net.Addr, k ssh.PublicKey) error { seen = k; return errSeen }})
	if seen == nil {
		return "", "", &m3o.Error{Kind: m3o.Unavailable, Msg: addr + " does not speak SSH", Hint: "check the host and port of the repository's address", Err: err}
	}
	return knownHost(addr) + " " + strings.TrimSpace(string(ssh.MarshalAuthorizedKey(seen))) + "\n", ssh.FingerprintSHA256(seen), nil
}

// knownHost is how known_hosts names an address.
func knownHost(addr string) string {
	host, port, err := net.SplitHostPort(addr)
	if err != nil || port == "22" {
		return cmp.Or(host, addr)
	}
	return "[" + host + "]:" + port
}
