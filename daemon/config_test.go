package daemon

import (
	"errors"
	"flag"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/m3o/m3o"
)

func parse(t *testing.T, file string, env map[string]string, args ...string) (Config, error) {
	t.Helper()
	p := filepath.Join(t.TempDir(), "m3od.yaml")
	if err := os.WriteFile(p, []byte(file), 0o600); err != nil {
		t.Fatal(err)
	}
	return ParseConfig(append([]string{"--config", p}, args...), func(k string) string { return env[k] }, nil)
}

func TestFlagBeatsVariableBeatsFile(t *testing.T) {
	c, err := parse(t, "domain: file.example\ndata: /srv/file\nbuild-timeout: 5m\n", map[string]string{"M3O_DOMAIN": "env.example", "M3O_DATA": "/srv/env"}, "--domain", "flag.example")
	if err != nil {
		t.Fatal(err)
	}
	if c.Domain != "flag.example" || c.Data != "/srv/env" || c.BuildTimeout != 5*time.Minute {
		t.Errorf("domain %q data %q build-timeout %v, want flag.example, /srv/env, 5m", c.Domain, c.Data, c.BuildTimeout)
	}
	if c.HTTPS != ":443" || c.SSH != ":2222" || c.Drain != 30*time.Second {
		t.Errorf("defaults: https %q ssh %q drain %v", c.HTTPS, c.SSH, c.Drain)
	}
}

func TestLocalDomainListensOnLoopbackOnly(t *testing.T) {
	c, err := parse(t, "", nil)
	if err != nil {
		t.Fatal(err)
	}
	for _, a := range []string{c.HTTP, c.HTTPS, c.SSH} {
		if !strings.HasPrefix(a, "127.0.0.1:") {
			t.Errorf("listens on %s", a)
		}
	}
}

func TestBadConfigIsNamed(t *testing.T) {
	for _, c := range []struct {
		file string
		env  map[string]string
		args []string
		want string
	}{
		{file: "domian: x\n", want: `m3od.yaml:1: unknown key "domian"`},
		{file: "data: /x\nhttp: [1]\n", want: "m3od.yaml:2: http takes a single value"},
		{file: "- a\n", want: "m3od.yaml:1: want lines of the form key: value"},
		{file: "build-timeout: soon\n", want: `"soon" is not a duration`},
		{env: map[string]string{"M3O_DRAIN": "-1s"}, want: "variable M3O_DRAIN"},
		{args: []string{"--no-such"}, want: "no-such"},
		{args: []string{"extra"}, want: `unexpected argument "extra"`},
		{args: []string{"--http", "nonsense", "--subnet", "10.0.0.0/28", "--runtime", "vm", "--domain", "UPPER"}, want: `domain: "UPPER"`},
		{args: []string{"--http", "127.0.0.1:1", "--https", "127.0.0.1:1"}, want: "is the address of http too"},
		{args: []string{"--data", "/" + strings.Repeat("x", 90)}, want: "longer than 80"},
		{args: []string{"--name", "not-a-name"}, want: "name:"},
	} {
		_, err := parse(t, c.file, c.env, c.args...)
		if m3o.KindOf(err) != m3o.Invalid || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%q %v %v: %v (%v), want invalid and %q", c.file, c.env, c.args, err, m3o.KindOf(err), c.want)
		}
	}
}

func TestEveryFaultOfTheConfigIsToldAtOnce(t *testing.T) {
	_, err := parse(t, "", nil, "--http", "nonsense", "--subnet", "10.0.0.0/28", "--runtime", "vm")
	for _, want := range []string{"http:", "subnet:", "runtime:"} {
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%v does not mention %s", err, want)
		}
	}
}

func TestHelpIsNoError(t *testing.T) {
	asked := false
	_, err := ParseConfig([]string{"--help"}, func(string) string { return "" }, func(*flag.FlagSet) { asked = true })
	if !errors.Is(err, flag.ErrHelp) || !asked {
		t.Errorf("err %v, usage printed %v", err, asked)
	}
}

func FuzzConfigFile(f *testing.F) {
	for _, s := range []string{"domain: a.example\n", "a: b\n", "- x", "{", "data: [", "&a: *a", "http: \"\\x00\""} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		p := filepath.Join(t.TempDir(), "m3od.yaml")
		if err := os.WriteFile(p, b, 0o600); err != nil {
			t.Fatal(err)
		}
		_, err := ParseConfig([]string{"--config", p}, func(string) string { return "" }, nil)
		if err != nil && m3o.KindOf(err) != m3o.Invalid {
			t.Errorf("%q: %v is not invalid", b, err)
		}
	})
}
