package main

import (
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/crypto/ssh"
)

func stored(t *testing.T, l *laptop) settings {
	t.Helper()
	data, err := os.ReadFile(filepath.Join(l.vars["XDG_CONFIG_HOME"], "m3o", "config.json"))
	if err != nil {
		t.Fatal(err)
	}
	st, err := parseSettings(data)
	if err != nil {
		t.Fatal(err)
	}
	return st
}

func TestFirstAdminLogsInByCodeAndKeyFile(t *testing.T) {
	p, l := newPlatform(t), newLaptop(t)
	l.keyFile("id_ed25519", "")
	o := l.do("login", p.url, "--code", "first-start", "--user", "ada", "--ca-fingerprint", fingerprint(p.ca.cert))
	o.want(t, 0, []string{"logged in to " + p.url + " as ada, for 1 month"}, []string{"registering SHA256:", "made the admin ada", "m3o: hint: m3o create"})
	l.do("whoami").want(t, 0, []string{"ada\n"}, []string{"admin on "})
	if strings.Contains(o.out+o.err, "token-") {
		t.Errorf("login shows the token: %s%s", o.out, o.err)
	}

	path := filepath.Join(l.vars["XDG_CONFIG_HOME"], "m3o", "config.json")
	if fi, err := os.Stat(path); err != nil || fi.Mode().Perm() != 0o600 {
		t.Errorf("config.json: %v %v, want 0600", fi.Mode(), err)
	}
	st := stored(t, l)
	if srv := st.Servers[p.url]; st.Current != p.url || srv.Token == "" || srv.CA != p.ca.pem() || srv.GitHost != "git.localhost:2222" {
		t.Errorf("stored %+v", st)
	}
	// The code is used up: a second use fails and the login stays.
	l.m3o("login", p.url, "--code", "first-start").want(t, 1, nil, []string{"m3o: error: the code is wrong or used up\n", "m3o: hint: the code is in the log"})
	l.do("whoami")
	// Without a code the key is enough.
	l.do("login").want(t, 0, []string{"as ada"}, nil)
}

func TestLoginCodeFromStdin(t *testing.T) {
	p, l := newPlatform(t), newLaptop(t)
	l.keyFile("id_ed25519", "")
	l.in = "first-start\n"
	o := l.do("login", p.url, "--code-stdin", "--ca-fingerprint", fingerprint(p.ca.cert), "--json")
	var row envRow
	if err := json.Unmarshal([]byte(o.out), &row); err != nil || row.User != "admin" || !row.LoggedIn || row.URL != p.url {
		t.Errorf("JSON %s: %+v %v", o.out, row, err)
	}
}

func TestLoginByAgentNeedsNoPrivateKey(t *testing.T) {
	ed, err1 := must2(ed25519.GenerateKey(rand.Reader))
	ec, err2 := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	rs, err3 := rsa.GenerateKey(rand.Reader, 2048)
	if err1 != nil || err2 != nil || err3 != nil {
		t.Fatal(err1, err2, err3)
	}
	for name, k := range map[string]any{"ed25519": &ed, "ecdsa": ec, "rsa": rs} {
		t.Run(name, func(t *testing.T) {
			p, l := newPlatform(t), newLaptop(t)
			l.agent(k)
			l.do("login", p.url, "--code", "first-start", "--ca-fingerprint", fingerprint(p.ca.cert))
			if got := p.keys[0].GetName(); got != "from the agent" {
				t.Errorf("registered key is called %q", got)
			}
			l.do("login", p.url)
		})
	}
}

func must2(_ ed25519.PublicKey, k ed25519.PrivateKey, err error) (ed25519.PrivateKey, error) {
	return k, err
}

func TestLoginTriesEveryKeyUntilOneIsKnown(t *testing.T) {
	p, l := newPlatform(t), newLaptop(t)
	_, unknown, _ := ed25519.GenerateKey(rand.Reader)
	l.agent(&unknown)
	known := l.keyFile("id_ed25519", "")
	l.m3o("login", p.url, "--ca-fingerprint", fingerprint(p.ca.cert)).want(t, 1, nil,
		[]string{"knows none of these keys: SHA256:", "(agent)", "id_ed25519)", "m3o: hint: --key FILE names another"})
	p.mu.Lock()
	_, err := p.addKey(string(ssh.MarshalAuthorizedKey(known)), "grace")
	p.mu.Unlock()
	if err != nil {
		t.Fatal(err)
	}
	l.do("login", p.url, "--ca-fingerprint", fingerprint(p.ca.cert)).want(t, 0, []string{"as grace"}, nil)
}

func TestLoginByPublicKeyFileUsesTheAgent(t *testing.T) {
	p, l := newPlatform(t), newLaptop(t)
	l.keyFile("work", "")
	pub := filepath.Join(l.vars["HOME"], ".ssh", "work.pub")
	args := []string{"login", p.url, "--code", "first-start", "--key", pub, "--ca-fingerprint", fingerprint(p.ca.cert)}
	l.m3o(args...).want(t, 1, nil, []string{"is a public key, and the agent does not hold its private one"})
	raw, err := os.ReadFile(strings.TrimSuffix(pub, ".pub"))
	if err != nil {
		t.Fatal(err)
	}
	k, err := ssh.ParseRawPrivateKey(raw)
	if err != nil {
		t.Fatal(err)
	}
	l.agent(k)
	// The first try did not spend the code.
	l.do(args...)
}

func TestLoginPassphrase(t *testing.T) {
	p, l := newPlatform(t), newLaptop(t)
	l.keyFile("id_ed25519", "open sesame")
	fp := fingerprint(p.ca.cert)
	l.m3o("login", p.url, "--code", "first-start", "--ca-fingerprint", fp).want(t, 1, nil,
		[]string{"has a passphrase, and there is no terminal to ask on", "m3o: hint: ssh-add "})
	l.typing, l.in = true, "wrong\nopen sesame\n"
	// The first try did not spend the code.
	o := l.do("login", p.url, "--code", "first-start", "--ca-fingerprint", fp)
	o.want(t, 0, []string{"as admin"}, []string{"Passphrase for ", "that is not it"})
	l.in = "\n"
	l.m3o("login", p.url).want(t, 1, nil, []string{"knows none of these keys"})
}

func TestLoginAsksBeforeItTrustsACA(t *testing.T) {
	p := newPlatform(t)
	fp := fingerprint(p.ca.cert)
	for _, tc := range []struct {
		name   string
		typing bool
		in     string
		args   []string
		exit   int
		stderr string
	}{
		{"no terminal", false, "", nil, 2, "add --ca-fingerprint " + fp},
		{"no", true, "n\n", nil, 1, "the CA is not trusted"},
		{"nothing", true, "\n", nil, 1, "the CA is not trusted"},
		{"end of input", true, "", nil, 1, "the CA is not trusted"},
		{"yes", true, "y\n", nil, 0, "Fingerprint of the CA: " + fp},
		{"right fingerprint, other form", false, "", []string{"--ca-fingerprint", strings.ToLower(strings.TrimPrefix(fp, "SHA256:"))}, 0, ""},
		{"wrong fingerprint", false, "", []string{"--ca-fingerprint", strings.Repeat("AB", 32)}, 1, "somebody is in between"},
		{"no fingerprint at all", false, "", []string{"--ca-fingerprint", "AB:CD"}, 2, "is no SHA-256 fingerprint"},
		{"two answers", false, "", []string{"--ca-fingerprint", fp, "--ca", "x"}, 2, "both given"},
		{"CA file that is none", false, "", []string{"--ca", "/dev/null"}, 1, "is no CA certificate"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			l := newLaptop(t)
			k := l.keyFile("id_ed25519", "")
			p.mu.Lock()
			_, err := p.addKey(string(ssh.MarshalAuthorizedKey(k)), "ada")
			p.mu.Unlock()
			if err != nil {
				t.Fatal(err)
			}
			l.typing, l.in = tc.typing, tc.in
			o := l.m3o(append([]string{"login", p.url}, tc.args...)...)
			o.want(t, tc.exit, nil, []string{tc.stderr})
			if _, err := os.Stat(filepath.Join(l.vars["XDG_CONFIG_HOME"], "m3o")); (err == nil) != (tc.exit == 0) {
				t.Errorf("something was stored, or nothing: %v", err)
			}
		})
	}
}

func TestLoginByCAFile(t *testing.T) {
	p, l := newPlatform(t), newLaptop(t)
	l.keyFile("id_ed25519", "")
	path := filepath.Join(t.TempDir(), "ca.pem")
	if err := os.WriteFile(path, []byte(p.ca.pem()), 0o600); err != nil {
		t.Fatal(err)
	}
	l.do("login", p.url, "--code", "first-start", "--ca", path)
}

func TestServerThatNamesACAItIsNotSignedByIsRefused(t *testing.T) {
	p, l := newPlatform(t), newLaptop(t)
	l.keyFile("id_ed25519", "")
	other := newAuthority(t, true)
	url := serveTLS(t, p.handler(), other.leaf(t, "api.localhost", time.Now().Add(time.Hour)))
	l.typing, l.in = true, "y\n"
	l.m3o("login", url).want(t, 1, nil, []string{"is not signed by the CA that the server names", "somebody may be in between"})
}

func TestChangedCAIsToldLoudly(t *testing.T) {
	p, l := newPlatform(t), newLaptop(t)
	l.keyFile("id_ed25519", "")
	l.do("login", p.url, "--code", "first-start", "--ca-fingerprint", fingerprint(p.ca.cert))
	st := stored(t, l)
	st.Servers[p.url].CA = newAuthority(t, true).pem()
	if err := l.system(nil, nil).saveSettings(st); err != nil {
		t.Fatal(err)
	}
	l.m3o("whoami").want(t, 1, nil, []string{"is signed by a CA that this computer does not know", "m3o: hint: m3o login " + p.url})
	l.m3o("login").want(t, 2, nil, []string{"WARNING: ", "somebody is in between", "--ca-fingerprint"})
	l.typing, l.in = true, "yes\n"
	l.do("login")
	l.do("whoami")
}

func TestLoginWithoutAnyKey(t *testing.T) {
	p, l := newPlatform(t), newLaptop(t)
	l.m3o("login", p.url, "--ca-fingerprint", fingerprint(p.ca.cert)).want(t, 1, nil,
		[]string{"no SSH key found", "m3o: hint: ssh-keygen -t ed25519 makes one"})
	// A dead agent is a warning, not the end.
	l.vars["SSH_AUTH_SOCK"] = filepath.Join(t.TempDir(), "gone")
	l.keyFile("id_ed25519", "")
	l.do("login", p.url, "--code", "first-start", "--ca-fingerprint", fingerprint(p.ca.cert)).
		want(t, 0, nil, []string{"warning: the SSH agent does not answer"})
}

func TestLoginMisuse(t *testing.T) {
	l := newLaptop(t)
	for _, tc := range []struct {
		args   []string
		stderr string
	}{
		{[]string{"login"}, "which server"},
		{[]string{"login", "http://example.com"}, "is not encrypted"},
		{[]string{"login", "ftp://example.com"}, "neither https:// nor http://"},
		{[]string{"login", "https://ada@example.com"}, "carries a user name"},
		{[]string{"login", "https://example.com/api"}, "more than a host and a port"},
		{[]string{"login", "https://"}, "has no host"},
		{[]string{"login", "https://a", "https://b"}, "usage: m3o login [URL]"},
		{[]string{"login", "https://a", "--code", ""}, "--code is empty"},
		{[]string{"login", "https://a", "--code"}, "--code needs a value"},
		{[]string{"login", "https://a", "--code-stdin"}, "no code came from stdin"},
		{[]string{"login", "https://a", "--code", "x", "--code-stdin"}, "both given"},
		{[]string{"login", "https://a", "--user", "x"}, "--user names the admin that --code makes"},
		{[]string{"login", "--kee", "x"}, "did you mean --key"},
	} {
		l.m3o(tc.args...).want(t, 2, nil, []string{tc.stderr})
	}
}

// By another name of the same host every signature would be refused.
func TestLoginByAnotherNameOfTheHostSaysTheRightOne(t *testing.T) {
	p, l := newPlatform(t), newLaptop(t)
	l.keyFile("id_ed25519", "")
	url := strings.Replace(serveTLS(t, p.handler(), p.ca.leaf(t, "www.localhost", time.Now().Add(time.Hour))), "api.", "www.", 1)
	l.m3o("login", url, "--code", "first-start", "--ca-fingerprint", fingerprint(p.ca.cert)).want(t, 1, nil,
		[]string{"the API of this server is at api.localhost, not www.localhost", "m3o: hint: m3o login " + strings.Replace(url, "www.", "api.", 1)})
	if p.code == "" {
		t.Error("the code was spent")
	}
}

func TestLogoutRevokesTheToken(t *testing.T) {
	p, l := newPlatform(t), newLaptop(t)
	l.keyFile("id_ed25519", "")
	l.do("login", p.url, "--code", "first-start", "--ca-fingerprint", fingerprint(p.ca.cert))
	l.do("logout").want(t, 0, []string{"logged out of " + p.url}, []string{"m3o: undo: m3o login " + p.url})
	if len(p.tokens) != 0 {
		t.Errorf("%d tokens left", len(p.tokens))
	}
	l.m3o("whoami").want(t, 1, nil, []string{"m3o: error: not logged in to api.localhost", "m3o: hint: m3o login " + p.url})
	l.m3o("logout").want(t, 1, nil, []string{"not logged in"})
	// The CA was kept, so the next login asks nothing.
	l.do("login")
}

func TestExpiredLoginSaysSo(t *testing.T) {
	p, l := newPlatform(t), newLaptop(t)
	l.keyFile("id_ed25519", "")
	l.do("login", p.url, "--code", "first-start", "--ca-fingerprint", fingerprint(p.ca.cert))
	st := stored(t, l)
	st.Servers[p.url].Expires = now.Add(-50 * time.Hour)
	if err := l.system(nil, nil).saveSettings(st); err != nil {
		t.Fatal(err)
	}
	clear(p.tokens)
	l.m3o("apps").want(t, 1, nil, []string{"the login to api.localhost", "expired 2 days ago", "m3o: hint: m3o login " + p.url})
	l.do("logout")
}

func TestServersAreListedAndChosen(t *testing.T) {
	p, q, l := newPlatform(t), newPlatform(t), newLaptop(t)
	l.do("env").want(t, 0, nil, []string{"no servers yet"})
	l.m3o("apps").want(t, 2, nil, []string{"not logged in to any server"})
	l.keyFile("id_ed25519", "")
	for _, s := range []*platform{p, q} {
		l.do("login", s.url, "--code", "first-start", "--ca-fingerprint", fingerprint(s.ca.cert))
	}
	l.do("env").want(t, 0, []string{"*  " + q.url, "   " + p.url, "2026-06-03T12:00:00Z"}, nil)
	l.do("env:use", strings.TrimPrefix(p.url, "https://")).want(t, 0, []string{"now using " + p.url}, []string{"m3o: undo: m3o env:use " + q.url})
	if got := stored(t, l).Current; got != p.url {
		t.Errorf("current %s, want %s", got, p.url)
	}
	l.m3o("env", "use", "api.localhost").want(t, 2, nil, []string{"matches " + min(p.url, q.url) + " and "})
	l.m3o("env", "use", "elsewhere").want(t, 1, nil, []string{"no stored server matches"})
	var rows []envRow
	if err := json.Unmarshal([]byte(l.do("env", "--json").out), &rows); err != nil || len(rows) != 2 {
		t.Errorf("JSON: %+v %v", rows, err)
	}
}

func TestTokenOfTheEnvironment(t *testing.T) {
	p, l := newPlatform(t), newLaptop(t)
	l.ci(p)
	l.do("whoami").want(t, 0, []string{"ada"}, nil)
	l.m3o("logout").want(t, 2, nil, []string{"which logout cannot unset"})
	file := filepath.Join(t.TempDir(), "token")
	l.vars["M3O_TOKEN"], l.vars["M3O_TOKEN_FILE"] = "", file
	l.m3o("whoami").want(t, 1, nil, []string{"cannot read M3O_TOKEN_FILE"})
	if err := os.WriteFile(file, []byte("ci\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	l.do("whoami")
	l.vars["M3O_TOKEN"] = "old"
	l.m3o("whoami").want(t, 1, nil, []string{"refuses this login: the token is not known"})
	l.vars["M3O_URL"] = "http://example.com"
	l.m3o("whoami").want(t, 2, nil, []string{"is not encrypted"})
}
