package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/url"
	"strings"
	"time"

	"connectrpc.com/connect"
	"golang.org/x/crypto/ssh"

	m3ov1 "github.com/m3o/m3o/api/m3o/v1"
)

// maxInput bounds what is read from stdin: values, codes and keys.
const maxInput = 1 << 20

func runLogin(ctx context.Context, c *call) error {
	st, err := c.loadSettings()
	if err != nil {
		return err
	}
	raw := c.env("M3O_URL")
	switch {
	case len(c.args) > 0:
		raw = c.args[0]
	case raw == "":
		raw = st.Current
	}
	if raw == "" {
		return misuse("which server", "m3o login https://api.<domain>")
	}
	u, err := parseServerURL(raw)
	if err != nil {
		return err
	}
	code, err := c.code()
	if err != nil {
		return err
	}
	if code == "" && c.has("user") {
		return misuse("--user names the admin that --code makes", "without --code the SSH key says who you are")
	}
	old := st.Servers[u.String()]
	if old == nil {
		old = &server{}
	}
	cl, info, err := c.believe(ctx, u, old.CA)
	if err != nil {
		return err
	}
	if want := "api." + info.GetDomain(); info.GetDomain() != "" && u.Hostname() != want {
		// The signature names the host, so by another name it would be refused.
		at := url.URL{Scheme: u.Scheme, Host: want}
		if u.Port() != "" {
			at.Host += ":" + u.Port()
		}
		return fail("the API of this server is at "+want+", not "+u.Hostname(), "m3o login "+at.String())
	}
	ring, err := c.openKeys(ctx, c.value("key"))
	if err != nil {
		return err
	}
	defer ring.close()

	if code != "" {
		k := ring.keys[0]
		// The code works once: be sure to be able to sign before it is spent.
		signer, err := k.signer(ctx)
		if err != nil {
			return err
		}
		k.signer = func(context.Context) (ssh.Signer, error) { return signer, nil }
		c.say("registering %s (%s)", k.fingerprint(), k.from)
		res, err := ask(ctx, cl.auth.Bootstrap, &m3ov1.BootstrapRequest{Code: code, User: c.value("user"), PublicKey: k.line()})
		if err != nil {
			return err
		}
		c.say("made the admin %s", plain(res.GetUser()))
		ring.keys = ring.keys[:1]
	}
	res, err := ring.login(ctx, cl)
	if err != nil {
		return err
	}
	if res.GetToken() == "" {
		return fail("the server accepted the key and gave no token", "")
	}
	next := &server{User: res.GetUser(), Token: res.GetToken(), CA: cl.ca, GitHost: info.GetGitHost()}
	if res.GetExpires().IsValid() {
		next.Expires = res.GetExpires().AsTime()
	}
	// Read again: a passphrase may have taken minutes to type.
	if st, err = c.loadSettings(); err != nil {
		return err
	}
	st.Servers[u.String()], st.Current = next, u.String()
	if err := c.saveSettings(st); err != nil {
		return fmt.Errorf("store the login: %w", err)
	}
	if c.has("json") {
		return c.json(serverRow(u.String(), next, true))
	}
	until := ""
	if !next.Expires.IsZero() {
		until = ", for " + rough(next.Expires.Sub(c.now()).Round(time.Minute))
	}
	c.print("logged in to %s as %s%s\n", u, plain(next.User), until)
	if code != "" {
		c.hint("m3o create")
	}
	return nil
}

// code is the one-time code of the first start, "" when none was given.
func (c *call) code() (string, error) {
	if !c.has("code-stdin") {
		if c.has("code") && c.value("code") == "" {
			return "", misuse("--code is empty", "m3od prints the code at its first start")
		}
		return c.value("code"), nil
	}
	if c.has("code") {
		return "", misuse("--code and --code-stdin are both given", "leave one out")
	}
	code, err := c.readInput()
	if err == nil && strings.TrimSpace(code) == "" {
		return "", misuse("no code came from stdin", "m3od prints the code at its first start")
	}
	return strings.TrimSpace(code), err
}

// readInput reads all of stdin.
func (s *system) readInput() (string, error) {
	b, err := io.ReadAll(io.LimitReader(s.in, maxInput+1))
	if err != nil {
		return "", fmt.Errorf("read stdin: %w", err)
	}
	if len(b) > maxInput {
		return "", fail("stdin holds more than 1 MB", "")
	}
	return string(b), nil
}

// believe decides which CA speaks for a server and returns a client that
// believes only that one: a given one, the computer's own, the one stored at
// an earlier login, or, after the user compared its fingerprint, the one that
// the server shows.
func (c *call) believe(ctx context.Context, u *url.URL, stored string) (*client, *m3ov1.InfoResponse, error) {
	try := func(ca string) (*client, *m3ov1.InfoResponse, error) {
		cl, err := newClient(target{url: u, ca: ca})
		if err != nil {
			return nil, nil, err
		}
		info, err := ask(ctx, cl.server.Info, &m3ov1.InfoRequest{})
		return cl, info, err
	}
	if c.has("ca") && c.has("ca-fingerprint") {
		return nil, nil, misuse("--ca and --ca-fingerprint are both given", "leave one out")
	}
	if c.has("ca") {
		ca, err := readCA(c.value("ca"))
		if err != nil {
			return nil, nil, err
		}
		return try(ca)
	}
	if u.Scheme == "http" {
		return try("")
	}
	var want string
	if c.has("ca-fingerprint") {
		var err error
		if want, err = parseFingerprint(c.value("ca-fingerprint")); err != nil {
			return nil, nil, err
		}
	} else {
		if stored != "" {
			cl, info, err := try(stored)
			if err == nil || !unknownCA(err) {
				return cl, info, err
			}
		}
		cl, info, err := try("")
		if err == nil && info.GetCa() != "" {
			// The CA is trusted by the whole computer, by m3o trust perhaps.
			// Storing it keeps the login working when that is taken back.
			if cl, info, err := try(info.GetCa()); err == nil {
				return cl, info, nil
			}
		}
		if err == nil || !unknownCA(err) {
			return cl, info, err
		}
	}
	ca, err := shownCA(ctx, u)
	if err != nil {
		return nil, nil, err
	}
	print := fingerprint(ca)
	switch {
	case want != "" && print != want:
		return nil, nil, fail(fmt.Sprintf("the CA of %s has the fingerprint %s, not the one given", u.Host, print),
			"compare with what m3od printed at its first start; if it differs, somebody is in between")
	case want == "":
		if stored != "" {
			c.say("WARNING: %s no longer shows the CA that was trusted at the last login (%s).", u.Host, storedPrint(stored))
			c.say("Either it was installed anew, or somebody is in between.")
		} else {
			c.say("The certificate of %s is signed by a CA of its own.", u.Host)
		}
		c.say("Fingerprint of the CA: %s", print)
		if !c.inTerminal {
			return nil, nil, misuse(fmt.Sprintf("the CA of %s is not known, and there is no terminal to ask on", u.Host),
				"compare the fingerprint above with the one m3od printed at its first start, then add --ca-fingerprint "+print)
		}
		c.say("m3od printed it at its first start: compare them.")
		yes, err := c.confirm(ctx, "Trust this CA for m3o on this computer?")
		if err != nil {
			return nil, nil, err
		}
		if !yes {
			return nil, nil, fail("the CA is not trusted: not logged in", "")
		}
	}
	return try(toPEM(ca))
}

// login proves to own one of the keys and returns the token. The server does
// not say which keys it knows, so they are tried in turn.
func (r *keyring) login(ctx context.Context, cl *client) (*m3ov1.LoginResponse, error) {
	var refused error
	var tried []string
	for _, k := range r.keys {
		res, err := k.login(ctx, cl)
		if err == nil {
			return res, nil
		}
		code := connect.CodeOf(err)
		if code != connect.CodeUnauthenticated && code != connect.CodePermissionDenied && !errors.Is(err, errNoPassphrase) {
			return nil, err
		}
		tried = append(tried, fmt.Sprintf("%s (%s)", k.fingerprint(), k.from))
		refused = errors.Join(refused, err)
	}
	return nil, &failure{exit: 1, err: refused,
		msg:  fmt.Sprintf("%s knows none of these keys: %s", cl.url.Host, strings.Join(tried, ", ")),
		hint: "--key FILE names another; whoever is logged in adds one by m3o keys:add; the first admin logs in with --code"}
}

func (k *key) login(ctx context.Context, cl *client) (*m3ov1.LoginResponse, error) {
	ch, err := ask(ctx, cl.auth.Challenge, &m3ov1.ChallengeRequest{Fingerprint: k.fingerprint()})
	if err != nil {
		return nil, err
	}
	if n := len(ch.GetNonce()); n < 16 || n > 256 {
		return nil, fail(fmt.Sprintf("the server's challenge has %d bytes, not 16 to 256", n), "")
	}
	// The prefix and the host keep a signature from being of use elsewhere:
	// for another server, or as anything else that SSH keys sign.
	sig, err := k.sign(ctx, []byte("m3o-login-v1\x00"+cl.url.Hostname()+"\x00"+string(ch.GetNonce())))
	if err != nil {
		return nil, err
	}
	return ask(ctx, cl.auth.Login, &m3ov1.LoginRequest{Nonce: ch.GetNonce(), PublicKey: k.public.Marshal(),
		SignatureFormat: sig.Format, Signature: sig.Blob})
}

func runLogout(ctx context.Context, c *call) error {
	if c.env("M3O_TOKEN") != "" || c.env("M3O_TOKEN_FILE") != "" {
		return misuse("the token comes from M3O_TOKEN or M3O_TOKEN_FILE, which logout cannot unset", "unset it")
	}
	t, err := c.target("")
	if err != nil {
		return err
	}
	st, err := c.loadSettings()
	if err != nil {
		return err
	}
	name := t.url.String()
	srv := st.Servers[name]
	if srv == nil || srv.Token == "" {
		return fail("not logged in to "+t.url.Host, "m3o env lists the servers")
	}
	cl, err := newClient(t)
	if err != nil {
		return err
	}
	_, revoke := ask(ctx, cl.auth.Logout, &m3ov1.LogoutRequest{})
	if revoke != nil && ctx.Err() != nil {
		return revoke
	}
	// The CA stays, so that the next login need not ask again.
	srv.Token, srv.Expires = "", time.Time{}
	if err := c.saveSettings(st); err != nil {
		return fmt.Errorf("forget the login: %w", err)
	}
	if revoke != nil && connect.CodeOf(revoke) != connect.CodeUnauthenticated {
		msg, _, _ := explain(ctx, revoke)
		return fail("the token is forgotten here, but the server could not revoke it: "+msg, "it ends by itself; an admin can revoke it before")
	}
	if c.has("json") {
		return c.json(serverRow(name, srv, st.Current == name))
	}
	c.print("logged out of %s\n", name)
	c.undo("m3o login %s", name)
	return nil
}

func runWhoami(ctx context.Context, c *call) error {
	cl, err := c.connect()
	if err != nil {
		return err
	}
	res, err := ask(ctx, cl.auth.Whoami, &m3ov1.WhoamiRequest{})
	if err != nil {
		return err
	}
	return c.result(res, func() {
		c.print("%s\n", plain(res.GetUser()))
		if res.GetAdmin() {
			c.say("admin on %s", cl.url.Host)
		}
	})
}

// A row of m3o env, and the JSON of login and logout: never the token.
type envRow struct {
	URL      string     `json:"url"`
	User     string     `json:"user"`
	LoggedIn bool       `json:"logged_in"`
	Expires  *time.Time `json:"expires"`
	Current  bool       `json:"current"`
}

func serverRow(name string, s *server, current bool) envRow {
	row := envRow{URL: name, User: s.User, LoggedIn: s.Token != "", Current: current}
	if !s.Expires.IsZero() {
		row.Expires = &s.Expires
	}
	return row
}

func runEnv(_ context.Context, c *call) error {
	st, err := c.loadSettings()
	if err != nil {
		return err
	}
	rows := []envRow{}
	for _, name := range sortedKeys(st.Servers) {
		rows = append(rows, serverRow(name, st.Servers[name], name == st.Current))
	}
	if c.has("json") {
		return c.json(rows)
	}
	if c.env("M3O_URL") != "" {
		c.say("M3O_URL overrides the current server: %s", plain(c.env("M3O_URL")))
	}
	if len(rows) == 0 {
		c.say("no servers yet")
		c.hint("m3o login https://api.<domain>")
		return nil
	}
	var cells [][]string
	for _, r := range rows {
		mark, until := "", "logged out"
		if r.Current {
			mark = "*"
		}
		if r.LoggedIn {
			until = "no end"
			if r.Expires != nil {
				until = r.Expires.UTC().Format(time.RFC3339)
				if c.outTerminal {
					until = ago(*r.Expires, c.now())
				}
			}
		}
		cells = append(cells, []string{mark, r.URL, plain(r.User), until})
	}
	c.table([]string{"", "SERVER", "USER", "LOGIN ENDS"}, cells)
	return nil
}

func runEnvUse(_ context.Context, c *call) error {
	st, err := c.loadSettings()
	if err != nil {
		return err
	}
	name, err := st.pick(c.args[0])
	if err != nil {
		return err
	}
	before := st.Current
	st.Current = name
	if err := c.saveSettings(st); err != nil {
		return err
	}
	if c.has("json") {
		return c.json(serverRow(name, st.Servers[name], true))
	}
	c.print("now using %s\n", name)
	if before != "" && before != name {
		c.undo("m3o env:use %s", before)
	}
	return nil
}
