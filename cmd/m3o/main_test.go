package main

import (
	"context"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/m3o/m3o/internal/need"
)

// asCLI makes the test binary behave as m3o, so that tests can start the real
// program without building it.
const asCLI = "M3O_TEST_AS_CLI"

func TestMain(m *testing.M) {
	if os.Getenv(asCLI) != "" {
		os.Exit(start(time.Minute)) // nobody waits at a prompt
	}
	os.Exit(m.Run())
}

// program is the real m3o with the laptop's environment.
func (l *laptop) program(ctx context.Context, name string, args ...string) *exec.Cmd {
	l.t.Helper()
	self, err := os.Executable()
	if err != nil {
		l.t.Fatal(err)
	}
	bin := l.t.TempDir()
	if err := os.Symlink(self, filepath.Join(bin, "m3o")); err != nil {
		l.t.Fatal(err)
	}
	if name == "m3o" {
		name = self
	}
	cmd := exec.CommandContext(ctx, name, args...)
	cmd.Dir = l.dir
	cmd.WaitDelay = 10 * time.Second
	cmd.Env = []string{asCLI + "=1", "PATH=" + bin + ":" + os.Getenv("PATH")}
	for k, v := range l.vars {
		cmd.Env = append(cmd.Env, k+"="+v)
	}
	return cmd
}

func TestProgramExitStatus(t *testing.T) {
	p := newPlatform(t)
	p.hello()
	l := newLaptop(t).ci(p)
	for _, tc := range []struct {
		args   string
		exit   int
		stdout string
		stderr string
	}{
		{"config:get GREETING -a hello", 0, "Hello\n", ""},
		{"info nope", 1, "", "m3o: error: no app called nope\nm3o: hint: m3o apps\n"},
		{"info --nope", 2, "", "m3o: error: no flag called \"--nope\"\nm3o: hint: m3o help info\n"},
	} {
		cmd := l.program(t.Context(), "m3o", strings.Fields(tc.args)...)
		var errw strings.Builder
		cmd.Stderr = &errw
		out, _ := cmd.Output() // the status is looked at below
		if got := cmd.ProcessState.ExitCode(); got != tc.exit || string(out) != tc.stdout || errw.String() != tc.stderr {
			t.Errorf("m3o %s: exit %d, %q, %q; want %d, %q, %q", tc.args, got, out, errw.String(), tc.exit, tc.stdout, tc.stderr)
		}
	}
}

func TestInterruptEndsTheProgramWell(t *testing.T) {
	p := newPlatform(t)
	p.hello()
	l := newLaptop(t).ci(p)
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	defer cancel()
	cmd := l.program(ctx, "m3o", "logs", "-f", "hello")
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	select {
	case <-p.reached:
	case <-ctx.Done():
		t.Error("the stream was never opened")
	}
	if err := cmd.Process.Signal(os.Interrupt); err != nil {
		t.Error(err)
	}
	if err := cmd.Wait(); err != nil {
		t.Errorf("after Ctrl-C: %v", err)
	}
}

// The real bash, the real script, the real program.
func TestBashCompletes(t *testing.T) {
	bash := need.Program(t, "bash")
	p := newPlatform(t)
	p.hello()
	l := newLaptop(t).ci(p)
	script := l.do("completion", "bash").out + `
while IFS= read -r COMP_LINE; do
  COMP_POINT=${#COMP_LINE} COMPREPLY=()
  _m3o 2>/dev/null
  echo "${COMPREPLY[*]}"
done`
	for line, want := range map[string]string{
		"m3o config":                    "config config:list config:set config:add config:get config:unset config:remove config:del",
		"m3o config:s":                  "set",
		"m3o logs --fo":                 "--follow",
		"m3o logs h":                    "hello",
		"m3o config set -a hello GREET": "GREETING=",
	} {
		cmd := l.program(t.Context(), bash, "--norc", "-c", script)
		cmd.Stdin = strings.NewReader(line + "\n")
		out, err := cmd.Output()
		if got := strings.TrimSuffix(string(out), "\n"); err != nil || got != want {
			t.Errorf("%q completes to %q, %v; want %q", line, got, err, want)
		}
	}
}
