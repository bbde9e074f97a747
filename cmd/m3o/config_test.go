package main

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// value is what the server holds for a variable of hello.
func value(t *testing.T, p *platform, name string) (string, bool) {
	t.Helper()
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, v := range p.apps[0].vars {
		if v.GetName() == name {
			return v.GetValue(), v.GetSecret()
		}
	}
	return "", false
}

func TestConfigSet(t *testing.T) {
	p := newPlatform(t)
	p.hello()
	l := newLaptop(t).ci(p)
	l.vars["M3O_APP"] = "hello"
	l.do("config:set", "A=1", "B=x=y", "C=").want(t, 0, []string{"set A, B, C: config 2, released v3\n"}, []string{"m3o: undo: m3o rollback -a hello\n"})
	for name, want := range map[string]string{"A": "1", "B": "x=y", "C": ""} {
		if got, _ := value(t, p, name); got != want {
			t.Errorf("%s = %q, want %q", name, got, want)
		}
	}
	l.do("config", "set", "D=-V").want(t, 0, []string{"set D"}, nil)
	if got, _ := value(t, p, "D"); got != "-V" {
		t.Errorf("D = %q", got)
	}
}

func TestSecretFromStdinStaysOutOfSight(t *testing.T) {
	p := newPlatform(t)
	p.hello()
	l := newLaptop(t).ci(p)
	l.vars["M3O_APP"] = "hello"
	l.in = "line one\nline two\n"
	o := l.do("config:set", "PEM=-", "--secret")
	if got, secret := value(t, p, "PEM"); got != "line one\nline two" || !secret {
		t.Errorf("PEM = %q, secret %v", got, secret)
	}
	if strings.Contains(o.out+o.err, "line one") {
		t.Errorf("the value is shown: %s%s", o.out, o.err)
	}
	l.m3o("config:get", "PEM").want(t, 1, nil, []string{"PEM is secret: its value is never shown again"})
	if o := l.do("config"); strings.Contains(o.out, "line one") || !strings.Contains(o.out, "PEM       (secret)") {
		t.Errorf("config: %s", o.out)
	}
	// On a terminal it is asked for, without echo.
	l.typing, l.in = true, "typed\n"
	l.do("config:set", "TYPED=-", "-s").want(t, 0, nil, []string{"Value of TYPED: "})
	if got, _ := value(t, p, "TYPED"); got != "typed" {
		t.Errorf("TYPED = %q", got)
	}
	l.typing, l.in = false, strings.Repeat("x", maxInput+1)
	l.m3o("config:set", "BIG=-").want(t, 1, nil, []string{"stdin holds more than 1 MB"})
}

func TestConfigMisuse(t *testing.T) {
	p := newPlatform(t)
	p.hello()
	l := newLaptop(t).ci(p)
	l.vars["M3O_APP"] = "hello"
	for _, tc := range []struct{ args, stderr string }{
		{"config:set A", `"A" is not NAME=VALUE`},
		{"config:set =x", `"=x" is not NAME=VALUE`},
		{"config:set A=1 A=2", "A is set twice"},
		{"config:set A=- B=-", "only one value can come from stdin"},
		{"config:set --secrte A=1", "did you mean --secret"},
		{"config:unset", "usage: m3o config:unset NAME…"},
	} {
		l.m3o(strings.Fields(tc.args)...).want(t, 2, nil, []string{tc.stderr})
	}
	if p.apps[0].revision != 1 {
		t.Errorf("misuse changed the config to revision %d", p.apps[0].revision)
	}
}

func TestConfigGetAndUnset(t *testing.T) {
	p := newPlatform(t)
	p.hello()
	l := newLaptop(t).ci(p)
	l.vars["M3O_APP"] = "hello"
	if got := l.do("config:get", "GREETING").out; got != "Hello\n" {
		t.Errorf("get: %q", got)
	}
	l.m3o("config:get", "NOPE").want(t, 1, nil, []string{`hello has no variable called "NOPE"`})
	l.do("config:unset", "GREETING").want(t, 0, []string{"unset GREETING: config 2, released v3"}, []string{"m3o: undo: m3o rollback -a hello"})
}

// A change that makes no release cannot be undone by a rollback.
func TestNoRestartHasItsOwnUndo(t *testing.T) {
	p := newPlatform(t)
	p.hello()
	l := newLaptop(t).ci(p)
	l.vars["M3O_APP"] = "hello"
	l.do("config:set", "GREETING=Hi there", "NEW=1", "API_KEY=x", "--no-restart").want(t, 0, []string{"config 2, for the next release\n"},
		[]string{"m3o: undo: m3o config:set GREETING=Hello --no-restart -a hello\n", "m3o: undo: m3o config:unset NEW --no-restart -a hello\n", "what API_KEY held is gone"})
	l.do("config:unset", "GREETING", "--no-restart").want(t, 0, nil, []string{"m3o: undo: m3o config:set 'GREETING=Hi there' --no-restart -a hello\n"})
	if n := len(p.apps[0].releases); n != 2 {
		t.Errorf("%d releases, want 2", n)
	}
}

func TestOpenSettingsFileIsWarnedAbout(t *testing.T) {
	l := newLaptop(t)
	dir := filepath.Join(l.vars["XDG_CONFIG_HOME"], "m3o")
	if err := os.MkdirAll(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(dir, "config.json")
	for _, tc := range []struct {
		content string
		mode    os.FileMode
		exit    int
		stderr  string
	}{
		{`{}`, 0o644, 0, "warning: others on this computer can read "},
		{`{`, 0o600, 1, "repair it, or remove it and log in again"},
		{`{"servers":{"https://a":{"tokn":"x"}}}`, 0o600, 1, `unknown field "tokn"`},
		{`{"servers":{"https://a/b":{}}}`, 0o600, 1, "is no server URL"},
		{`{"current":"https://a"}`, 0o600, 1, "is not among the servers"},
		{`{"servers":{"https://a":null}}`, 0o600, 1, "is null"},
		{`{} {}`, 0o600, 1, "something follows its end"},
		{strings.Repeat(" ", maxSettings+1), 0o600, 1, "too large"},
	} {
		if err := os.WriteFile(path, []byte(tc.content), tc.mode); err != nil {
			t.Fatal(err)
		}
		if err := os.Chmod(path, tc.mode); err != nil {
			t.Fatal(err)
		}
		l.m3o("env").want(t, tc.exit, nil, []string{tc.stderr})
	}
}

func TestParseServerURL(t *testing.T) {
	for in, want := range map[string]string{
		"api.example.com": "https://api.example.com", "HTTPS://API.Example.COM/": "https://api.example.com", "https://api.example.com:443": "https://api.example.com",
		"api.localhost:8443": "https://api.localhost:8443", "http://api.localhost:80": "http://api.localhost", "http://127.0.0.1:8080": "http://127.0.0.1:8080",
		"https://[::1]:8443": "https://[::1]:8443", "http://[::1]": "http://[::1]", "https://api.example.com.": "https://api.example.com",
		"http://10.0.0.1": "", "http://localhost.example.com": "", "https://a b": "", "https://": "", "": "", "file:///x": "", "https://x?y": "", "https://x#y": "", "https://u:p@x": "",
	} {
		u, err := parseServerURL(in)
		if got := ""; err == nil {
			if got = u.String(); got != want {
				t.Errorf("%q is %q, want %q", in, got, want)
			}
		} else if want != "" {
			t.Errorf("%q: %v, want %q", in, err, want)
		}
	}
}

func TestParseRemote(t *testing.T) {
	for in, want := range map[string]remote{
		"ssh://m3o@git.example.com:2222/hello": {"git.example.com:2222", "hello"},
		"ssh://m3o@git.example.com/hello":      {"git.example.com:22", "hello"},
		"ssh://git.example.com/hello.git/":     {"git.example.com:22", "hello"},
		"ssh://git.example.com/hello.git":      {"git.example.com:22", "hello"},
		"ssh://m3o@[::1]:2222/hello":           {"[::1]:2222", "hello"},
		"m3o@git.example.com:hello":            {"git.example.com", "hello"},
		"m3o@git.example.com:/hello":           {"git.example.com", "hello"},
		"alias:hello":                          {"alias", "hello"},
		"m3o@[::1]:hello":                      {"::1", "hello"},
		"":                                     {}, "hello": {}, "/srv/git/hello": {}, "./a:b": {}, `C:\hello`: {}, "c:/hello": {},
		"https://example.com/hello": {}, "git://example.com/hello": {}, "ssh://m3o@h/a/b": {}, "ssh://m3o@h/": {}, "ssh://m3o@h": {},
		"m3o@h:": {}, "m3o@h:Hello": {}, "m3o@h:../x": {}, "m3o@h:-x": {}, "ssh://-oProxyCommand=x/hello": {}, "-oProxyCommand=x:hello": {},
		"m3o@-h:hello": {}, "ssh://m3o@h:x/hello": {}, "ssh://h/hello?x": {}, "ssh://h/hello#x": {}, "m3o@[::1:hello": {}, "ssh:///hello": {}, "m3o@h:he\nllo": {},
	} {
		got, err := parseRemote(in)
		if (err == nil) != (want.app != "") || err == nil && got != want {
			t.Errorf("%q is %+v, %v; want %+v", in, got, err, want)
		}
	}
}

func FuzzParseRemote(f *testing.F) {
	for _, s := range []string{"ssh://m3o@git.example.com:2222/hello", "m3o@git.example.com:hello", "m3o@[::1]:hello", "ssh://m3o@[::1]:2222/hello.git/", "C:\\x", "-o:x", "ssh://%41/x"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, raw string) {
		r, err := parseRemote(raw)
		if err != nil {
			if strings.ContainsAny(err.Error(), "\x1b\n") {
				t.Errorf("%q: the error moves the cursor: %q", raw, err)
			}
			return
		}
		if !appLike(r.app) || r.host == "" || r.host[0] == '-' || strings.ContainsAny(r.host, " \n\x00@/") {
			t.Errorf("%q is %+v", raw, r)
		}
		// What it names can be written again in git's long form.
		if host := r.host; strings.Contains(raw, "://") {
			if again, err := parseRemote("ssh://m3o@" + host + "/" + r.app); err != nil || again != r {
				t.Errorf("%q is %+v, and again %+v, %v", raw, r, again, err)
			}
		}
	})
}

func FuzzParseSettings(f *testing.F) {
	for _, s := range []string{"", "{}", `{"current":"https://a","servers":{"https://a":{"user":"u","token":"t","expires":"2026-01-02T03:04:05Z","ca":"x","git_host":"g:1"}}}`,
		`{"servers":{"https://a":null}}`, `{"servers":null}`, `[]`, `{"current":1}`, `{}{}`} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		st, err := parseSettings(data)
		if err != nil {
			return
		}
		dir := t.TempDir()
		l := &system{env: func(k string) string { return map[string]string{"XDG_CONFIG_HOME": dir}[k] }}
		if err := l.saveSettings(st); err != nil {
			// Only a year that JSON cannot write may fail.
			if !strings.Contains(err.Error(), "year outside of range") && !strings.Contains(err.Error(), "Time.MarshalJSON") {
				t.Fatal(err)
			}
			return
		}
		again, err := l.loadSettings()
		if err != nil {
			t.Fatalf("%q is accepted, but not once written: %v", data, err)
		}
		if again.Current != st.Current || len(again.Servers) != len(st.Servers) {
			t.Errorf("%q is %+v, and again %+v", data, st, again)
		}
		for u, s := range st.Servers {
			if g := again.Servers[u]; g == nil || g.Token != s.Token || g.CA != s.CA || !g.Expires.Equal(s.Expires) {
				t.Errorf("%q: server %s is %+v, and again %+v", data, u, s, g)
			}
		}
	})
}

func FuzzScrub(f *testing.F) {
	for _, s := range []string{"plain", "\x1b[31mred\x1b[0m", "\x1b[2J", "\x1b]0;x\x07", "a\tb\nc", "\x9b31m", "\u202eabc", "\x1b[", "\xff\x1b[1;31m"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		if got := plain(s); strings.ContainsFunc(got, func(r rune) bool { return r < ' ' || r == 0x7f || r >= 0x80 && r < 0xa0 }) {
			t.Errorf("plain(%q) = %q", s, got)
		}
		rest := scrub(s, true)
		for i := strings.IndexByte(rest, 0x1b); i >= 0; i = strings.IndexByte(rest, 0x1b) {
			n := sgr(rest[i:])
			if n == 0 {
				t.Fatalf("scrub(%q) lets %q through", s, rest[i:])
			}
			rest = rest[i+n:]
		}
	})
}
