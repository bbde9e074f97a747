package main

import (
	"bytes"
	"context"
	"errors"
	"net"
	"net/http"
	"os"
	goruntime "runtime"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/m3o/m3o/internal/need"
)

func TestCommandTableIsSound(t *testing.T) {
	seen := map[string]bool{}
	for _, cmd := range commands() {
		for _, n := range append([]string{cmd.name}, cmd.aliases...) {
			if seen[n] {
				t.Errorf("%s stands twice in the table", n)
			}
			seen[n] = true
		}
		names := map[string]bool{}
		for _, f := range cmd.all() {
			for _, n := range []string{"--" + f.name, "-" + f.short} {
				if n != "-" && names[n] {
					t.Errorf("%s: %s stands twice", cmd.name, n)
				}
				names[n] = true
			}
		}
		if !cmd.hidden && (cmd.short == "" || cmd.group == "" || strings.HasSuffix(cmd.short, ".")) {
			t.Errorf("%s: no group, no line of help, or one with a full stop", cmd.name)
		}
		if cmd.appArg && !cmd.app {
			t.Errorf("%s takes an app as argument but not by flag", cmd.name)
		}
	}
}

func TestBothSpellingsReachTheSameCommand(t *testing.T) {
	sys := newLaptop(t).system(&bytes.Buffer{}, &bytes.Buffer{})
	for _, tc := range []struct {
		line, name, args string
	}{
		{"config:set A=b", "config:set", "A=b"},
		{"config set A=b", "config:set", "A=b"},
		{"config add A=b", "config:set", "A=b"},
		{"-a x config set A=b", "config:set", "A=b"},
		{"config -a x set A=b", "config:set", "A=b"},
		{"config --json set A=b", "config:set", "A=b"},
		{"config set -a x A=b", "config:set", "A=b"},
		{"config", "config", ""},
		{"config list", "config", ""},
		{"apps create x", "create", "x"},
		{"apps:create x", "create", "x"},
		{"create x", "create", "x"},
		{"apps destroy x", "destroy", "x"},
		{"kill x", "destroy", "x"},
		{"apps info x", "info", "x"},
		{"apps", "apps", ""},
		{"releases rollback v3", "rollback", "v3"},
		{"rollback v3", "rollback", "v3"},
		{"releases", "releases", ""},
		{"builds output 3", "builds:output", "3"},
		{"builds:output -f 3", "builds:output", "3"},
		{"builds output -f -- 3", "builds:output", "3"},
		{"keys add -", "keys:add", "-"},
		{"git remote -a x", "git:remote", ""},
		{"users create ada", "users:create", "ada"},
		{"logs -fn 5 -pweb x", "logs", "x"},
		{"logs create", "logs", "create"},
		{"ps x", "ps", "x"},
		{"--version", "version", ""},
		{"-h", "help", ""},
		{"", "help", ""},
		{"config set --help", "help", "config:set"},
	} {
		c, err := parse(strings.Fields(tc.line), sys)
		if err != nil {
			t.Errorf("%q: %v", tc.line, err)
			continue
		}
		if c.cmd.name != tc.name || strings.Join(c.args, " ") != tc.args {
			t.Errorf("%q is %s %v, want %s %s", tc.line, c.cmd.name, c.args, tc.name, tc.args)
		}
	}
	c, err := parse(strings.Fields("logs -fn 5 -pweb --remote=prod x"), sys)
	if err != nil || !c.has("follow") || c.value("number") != "5" || c.value("process") != "web" || c.value("remote") != "prod" {
		t.Errorf("flags %v, %v", c.set, err)
	}
}

func TestMisuseExits2AndNamesTheNearest(t *testing.T) {
	l := newLaptop(t)
	for _, tc := range []struct{ line, err, hint string }{
		{"confgi", `no command called "confgi"`, "did you mean m3o config"},
		{"config:sett A=b", `no command called "config:sett"`, "did you mean m3o config:set"},
		{"config sett A=b", `no command called "config:sett"`, "did you mean m3o config:set"},
		{"releses", `no command called "releses"`, "did you mean m3o releases"},
		{"users", `no command called "users"`, "there are users:create"},
		{"users xyzzyplugh", `no command called "users:xyzzyplugh"`, "there are users:create"},
		{"xyzzyplugh", `no command called "xyzzyplugh"`, "m3o help"},
		{"logs --folow", `no flag called "--folow"`, "did you mean --follow"},
		{"logs -z", `no flag called "-z"`, "m3o help logs"},
		{"logs --follow=yes", "--follow takes no value", ""},
		{"logs -n", "-n needs a value", ""},
		{"logs --number", "--number needs a value", ""},
		{"logs -n x -a a", `--number takes a number from 1 to 100000, not "x"`, ""},
		{"logs -n 0 -a a", "--number takes a number from 1", ""},
		{"--jsno apps", `no flag called "--jsno"`, "did you mean --json"},
		{"config:get -a a", "usage: m3o config:get NAME", ""},
		{"config:get A B -a a", "usage: m3o config:get NAME", ""},
		{"config:set -a a", "usage: m3o config:set NAME=VALUE…", ""},
		{"rollback x -a a", `"x" is no release`, "they are called v1"},
		{"rollback v0 -a a", `"v0" is no release`, ""},
		{"rollback v+1 -a a", `"v+1" is no release`, ""},
		{"builds:output x -a a", `"x" is no build`, ""},
		{"info -a Bad_Name", `"Bad_Name" is no name of an app`, ""},
		{"info a -a b", "two apps are named: a and b", "leave one out"},
		{"info -a=", `"" is no name of an app`, ""},
		{"completion tcsh", "no completion for", "bash, zsh and fish"},
		{"update .", "there is no update", "git push m3o main"},
		{"help xyzzyplugh", "no command called", ""},
	} {
		o := l.m3o(strings.Fields(tc.line)...)
		o.want(t, 2, nil, []string{"m3o: error: " + tc.err, tc.hint})
		if o.out != "" {
			t.Errorf("%q wrote to stdout: %s", tc.line, o.out)
		}
		if t.Failed() {
			t.Fatalf("at %q", tc.line)
		}
	}
}

func TestWhichAppSaysTheThreeWays(t *testing.T) {
	l := newLaptop(t)
	l.m3o("ps").want(t, 2, nil, []string{"m3o: error: which app", "-a APP", "git remote", "M3O_APP"})
}

func TestHelpIsMadeForEveryCommand(t *testing.T) {
	l := newLaptop(t)
	overview, reference := l.do("help").out, l.do("help", "--markdown").out
	for _, cmd := range commands() {
		if cmd.hidden {
			if strings.Contains(reference, "m3o "+cmd.name+"\n") {
				t.Errorf("%s is in the reference", cmd.name)
			}
			continue
		}
		if !strings.Contains(overview, "  "+cmd.name+" ") {
			t.Errorf("%s is not in the overview", cmd.name)
		}
		if !strings.Contains(reference, "### m3o "+cmd.name+"\n") {
			t.Errorf("%s is not in the reference", cmd.name)
		}
		for _, args := range [][]string{{"help", cmd.name}, {cmd.name, "--help"}, {cmd.name, "-h"}, append([]string{"help"}, strings.Split(cmd.name, ":")...)} {
			o := l.do(args...)
			o.want(t, 0, []string{cmd.short, "Usage: m3o " + cmd.name}, nil)
			for _, f := range cmd.flags {
				if !strings.Contains(o.out, "--"+f.name) {
					t.Errorf("help %s lacks --%s", cmd.name, f.name)
				}
			}
		}
	}
	l.do("version").want(t, 0, []string{"m3o "}, nil)
	l.do("version", "--json").want(t, 0, []string{`"version"`, `"go"`}, nil)
}

func TestUnreachableServersHaveReadableErrors(t *testing.T) {
	p := newPlatform(t)
	addr := need.Nobody(t)
	port := addr[strings.LastIndex(addr, ":"):]
	other := newAuthority(t, true)
	plainHTTP := http.Server{Handler: http.NotFoundHandler()}
	pl, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan error, 1)
	go func() { done <- plainHTTP.Serve(pl) }()
	t.Cleanup(func() { _ = plainHTTP.Close(); <-done })
	for _, tc := range []struct{ name, url, err, hint string }{
		{"connection refused", "https://api.localhost" + port, "nothing listens at api.localhost" + port, "is m3od running"},
		{"unknown CA", serveTLS(t, p.handler(), other.leaf(t, "api.localhost", time.Now().Add(time.Hour))), "is signed by a CA that this computer does not know", "m3o login https://api.localhost:"},
		{"wrong name", serveTLS(t, p.handler(), p.ca.leaf(t, "www.localhost", time.Now().Add(time.Hour))), "the certificate of the server is not for api.localhost", "check the URL"},
		{"expired certificate", serveTLS(t, p.handler(), p.ca.leaf(t, "api.localhost", time.Now().Add(-time.Hour))), "has expired or is not valid yet", "clock"},
		{"not m3o", serveTLS(t, http.NotFoundHandler(), p.ca.leaf(t, "api.localhost", time.Now().Add(time.Hour))), "does not answer as an m3o server", "https://api.<domain>"},
		{"no TLS", "https://" + pl.Addr().String(), "does not speak TLS", "check the port"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			l := newLaptop(t).ci(p)
			l.vars["M3O_URL"] = tc.url
			o := l.m3o("apps")
			o.want(t, 1, nil, []string{"m3o: error: ", tc.err, "m3o: hint: ", tc.hint})
			if strings.Contains(o.err, "\nm3o: error") || strings.Contains(o.err, ".\n") {
				t.Errorf("not in the house style: %s", o.err)
			}
		})
	}
}

func TestRedirectsAreNotFollowedWithTheToken(t *testing.T) {
	p := newPlatform(t)
	reached := make(chan string, 1)
	elsewhere := serveTLS(t, http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
		reached <- r.Header.Get("Authorization")
	}), p.ca.leaf(t, "api.localhost", time.Now().Add(time.Hour)))
	l := newLaptop(t).ci(p)
	l.vars["M3O_URL"] = serveTLS(t, http.RedirectHandler(elsewhere, http.StatusTemporaryRedirect), p.ca.leaf(t, "api.localhost", time.Now().Add(time.Hour)))
	l.m3o("apps").want(t, 1, nil, nil)
	select {
	case got := <-reached:
		t.Errorf("the redirect was followed, with %q", got)
	default:
	}
}

// A full disk behind stdout must not look like success.
func TestFailedWriteIsAFailure(t *testing.T) {
	l := newLaptop(t)
	if goruntime.GOOS != "linux" {
		t.Skip("only Linux has /dev/full")
	}
	full, err := os.OpenFile("/dev/full", os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer full.Close() //nolint:errcheck // nothing is written
	var errw bytes.Buffer
	if got := run(t.Context(), []string{"help"}, l.system(full, &errw)); got != 1 || !strings.Contains(errw.String(), "write output") {
		t.Errorf("exit %d, %s", got, errw.String())
	}
	w := &checkedWriter{w: full}
	if _, err := w.Write([]byte("x")); !errors.Is(err, syscall.ENOSPC) {
		t.Errorf("err %v, want ENOSPC", err)
	}
}

func TestInterruptedCommandSaysSo(t *testing.T) {
	p := newPlatform(t)
	l := newLaptop(t).ci(p)
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	var out, errw bytes.Buffer
	if got := run(ctx, []string{"apps"}, l.system(&out, &errw)); got != 1 || errw.String() != "m3o: error: interrupted\n" {
		t.Errorf("exit %d, %q", got, errw.String())
	}
}

func TestNearest(t *testing.T) {
	for _, tc := range []struct{ typed, want string }{
		{"lgos", "logs"}, {"logz", "logs"}, {"logs", "logs"}, {"destory", "destroy"}, {"xyz", ""}, {"", ""}, {"qqqqqqqqqqqqqqqqqqqqq", ""},
	} {
		if got := nearest(tc.typed, []string{"ps", "logs", "destroy", "config:set"}); got != tc.want {
			t.Errorf("nearest(%q) = %q, want %q", tc.typed, got, tc.want)
		}
	}
}

func TestCompletion(t *testing.T) {
	p := newPlatform(t)
	p.hello()
	l := newLaptop(t).ci(p)
	for _, tc := range []struct {
		line      string // the last word is the one at the cursor
		want, not []string
	}{
		{"|", []string{"apps", "config:set", "logs"}, []string{"update", "__complete"}},
		{"conf|", []string{"config", "config:set", "config:get"}, []string{"apps"}},
		{"config|", []string{"config", "config:set"}, nil},
		{"config |", []string{"set", "get", "unset"}, []string{"config"}},
		{"config s|", []string{"set"}, []string{"get"}},
		{"logs |", []string{"hello"}, nil},
		{"logs -|", []string{"--follow", "--process", "--app", "--json"}, []string{"--secret"}},
		{"logs -a |", []string{"hello"}, []string{"--follow"}},
		{"-a |", []string{"hello"}, nil},
		{"rollback -a hello |", []string{"v1", "v2"}, nil},
		{"builds output -a hello |", []string{"1", "2"}, nil},
		{"config:get -a hello |", []string{"GREETING", "API_KEY"}, nil},
		{"config set -a hello G|", []string{"GREETING="}, []string{"API_KEY="}},
		{"help re|", []string{"releases"}, []string{"logs"}},
		{"completion |", []string{"bash", "zsh", "fish"}, nil},
		{"nonsense |", nil, []string{"apps"}},
		{"info hello |", nil, []string{"hello"}},
	} {
		line := strings.TrimSuffix(tc.line, "|")
		words := append(strings.Fields(line), "")
		if line != "" && !strings.HasSuffix(line, " ") {
			words = strings.Fields(line)
		}
		o := l.do(append([]string{"__complete"}, words...)...)
		var got []string
		for row := range strings.Lines(o.out) {
			w, _, _ := strings.Cut(strings.TrimSuffix(row, "\n"), "\t")
			got = append(got, w)
		}
		for _, w := range tc.want {
			if !slices.Contains(got, w) {
				t.Errorf("%q: %v lacks %s", tc.line, got, w)
			}
		}
		for _, w := range tc.not {
			if slices.Contains(got, w) {
				t.Errorf("%q: %v has %s", tc.line, got, w)
			}
		}
		if o.err != "" {
			t.Errorf("%q wrote to stderr: %s", tc.line, o.err)
		}
	}
	// A server that is away must not break the Tab.
	l.vars["M3O_URL"] = "https://api.localhost:1"
	if o := l.do("__complete", "logs", ""); o.out != "" || o.err != "" {
		t.Errorf("without a server: %q %q", o.out, o.err)
	}
}
