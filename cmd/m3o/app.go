package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/url"
	"os/exec"
	"strings"
)

// A remote is what a git remote of m3o names: an app on a host.
type remote struct {
	host string // "host:port", or "host" in the short form, whose port ssh's own settings give
	app  string
}

// maxRemote bounds a remote's URL; host names end at 253.
const maxRemote = 400

// parseRemote reads ssh://m3o@host:port/app and m3o@host:app. The user may be
// left out or be another one, since ssh's settings can rename it.
func parseRemote(raw string) (remote, error) {
	bad := func(why string) (remote, error) {
		return remote{}, fmt.Errorf("%s is no git remote of an app: %s", quoted(raw), why)
	}
	if len(raw) > maxRemote {
		return bad("it is too long")
	}
	var r remote
	if strings.Contains(raw, "://") {
		u, err := url.Parse(raw)
		switch {
		case err != nil:
			return bad("it does not parse")
		case u.Scheme != "ssh":
			return bad("it does not begin with ssh://")
		case u.RawQuery != "" || u.ForceQuery || u.Fragment != "":
			return bad("it has more than a host and an app")
		}
		port := u.Port()
		if port == "" {
			port = "22"
		}
		r.host = net.JoinHostPort(u.Hostname(), port)
		r.app = strings.TrimPrefix(u.Path, "/")
		if !hostLike(u.Hostname()) {
			return bad("its host is odd")
		}
	} else {
		// As git and scp do: the colon before any slash divides host and path.
		i := strings.Index(raw, ":")
		if rest, ok := strings.CutPrefix(raw[strings.Index(raw, "@")+1:], "["); ok {
			end := strings.Index(rest, "]:")
			if end < 0 {
				return bad("its bracket is not closed")
			}
			r.host, r.app = rest[:end], rest[end+2:]
		} else if i < 0 || strings.Contains(raw[:i], "/") {
			return bad("it is a path")
		} else {
			_, host, ok := strings.Cut(raw[:i], "@")
			if !ok {
				host = raw[:i]
			}
			if len(host) < 2 {
				return bad("it is a path")
			}
			r.host, r.app = host, strings.TrimPrefix(raw[i+1:], "/")
		}
		if !hostLike(r.host) {
			return bad("its host is odd")
		}
	}
	r.app = strings.TrimSuffix(strings.TrimSuffix(r.app, "/"), ".git")
	if !appLike(r.app) {
		return bad("it does not end in the name of an app")
	}
	return r, nil
}

func hostLike(h string) bool {
	return h != "" && h[0] != '-' && !strings.ContainsFunc(h, func(c rune) bool {
		return (c < 'a' || c > 'z') && (c < 'A' || c > 'Z') && (c < '0' || c > '9') && !strings.ContainsRune(".-_:", c)
	})
}

// appLike is for words that could be an app's name; the server has the rule.
func appLike(s string) bool {
	return s != "" && len(s) <= 63 && s[0] != '-' && !strings.ContainsFunc(s, func(c rune) bool {
		return (c < 'a' || c > 'z') && (c < '0' || c > '9') && c != '-'
	})
}

// app is the name of the app that a command works on and the git host it was
// read from, "" when it came from elsewhere.
func (c *call) app(ctx context.Context) (name, gitHost string, err error) {
	name = c.value("app")
	if c.cmd.appArg && len(c.args) > 0 {
		if c.has("app") && c.args[0] != name {
			return "", "", misuse(fmt.Sprintf("two apps are named: %s and %s", c.args[0], name), "leave one out")
		}
		name = c.args[0]
	}
	if name != "" || c.has("app") {
		if !appLike(name) {
			return "", "", misuse(quoted(name)+" is no name of an app", "names are a-z, 0-9 and single hyphens")
		}
		return name, "", nil
	}
	which := "m3o"
	if c.has("remote") {
		which = c.value("remote")
		if !hostLike(which) {
			return "", "", misuse(quoted(which)+" is no name of a git remote", "git remote -v")
		}
	}
	raw, err := c.git(ctx, "remote", "get-url", which)
	if err == nil {
		r, err := parseRemote(raw)
		if err == nil {
			return r.app, r.host, nil
		}
		if c.has("remote") {
			return "", "", misuse(err.Error(), "m3o git:remote -a APP -r "+which)
		}
	} else if c.has("remote") {
		return "", "", misuse("no git remote called "+which+" here", "git remote -v")
	}
	if name := c.env("M3O_APP"); name != "" {
		if !appLike(name) {
			return "", "", misuse("M3O_APP is no name of an app: "+quoted(name), "")
		}
		return name, "", nil
	}
	return "", "", misuse("which app", "name it by -a APP, by a git remote called m3o (m3o git:remote -a APP), or by M3O_APP")
}

// withApp is what most commands begin with: the app and the server it is on.
func (c *call) withApp(ctx context.Context) (string, *client, error) {
	app, host, err := c.app(ctx)
	if err != nil {
		return "", nil, err
	}
	t, err := c.target(host)
	if err != nil {
		return "", nil, err
	}
	cl, err := newClient(t)
	return app, cl, err
}

// git runs git in the working directory and returns the first line it prints.
func (s *system) git(ctx context.Context, args ...string) (string, error) {
	cmd := exec.CommandContext(ctx, "git", args...)
	cmd.Dir = s.dir
	out, err := cmd.Output()
	if err != nil {
		if ee, ok := errors.AsType[*exec.ExitError](err); ok {
			return "", fmt.Errorf("git %s: %s", args[0], plain(strings.TrimSpace(string(ee.Stderr))))
		}
		return "", err
	}
	line, _, _ := strings.Cut(string(out), "\n")
	return strings.TrimSpace(line), nil
}
