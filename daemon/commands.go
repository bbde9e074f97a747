package daemon

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"syscall"
	"time"

	"github.com/m3o/m3o/gitserver"
)

// sshCommands runs the CLI's verbs for who has only ssh: the m3o binary beside
// m3od, signed in as that user for as long as the command takes.
type sshCommands struct{ d *Daemon }

// localVerbs make sense only on one's own machine.
var localVerbs = []string{"login", "logout", "trust", "open", "env", "completion", "git:remote", "git"}

func (d *Daemon) commands() gitserver.Commands { return sshCommands{d} }

// Run is one command line of user, already split. The exit code is the CLI's.
func (c sshCommands) Run(ctx context.Context, user string, args []string, in io.Reader, out, errOut io.Writer) int {
	if len(args) > 0 && slices.Contains(localVerbs, args[0]) {
		fmt.Fprintf(errOut, "m3o: error: %s works only with m3o installed on your own machine\n", args[0])
		return 2
	}
	code, err := c.run(ctx, user, args, in, out, errOut)
	if err != nil {
		c.d.log.Error("command over ssh", "user", user, "err", err)
		fmt.Fprintln(errOut, "m3o: error: the command could not be run; the daemon's log has the cause")
		return 1
	}
	return code
}

func (c sshCommands) run(ctx context.Context, user string, args []string, in io.Reader, out, errOut io.Writer) (int, error) {
	token, err := c.d.auth.IssueToken(ctx, user, time.Hour, "ssh command")
	if err != nil {
		return 0, err
	}
	defer func() {
		rctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), 5*time.Second)
		defer cancel()
		if err := c.d.auth.RevokeToken(rctx, token); err != nil {
			c.d.log.Error("revoke token of ssh command", "user", user, "err", err)
		}
	}()
	home, err := os.MkdirTemp("", "m3o-ssh-")
	if err != nil {
		return 0, fmt.Errorf("make home for command: %w", err)
	}
	defer os.RemoveAll(home) //nolint:errcheck // nothing but the token's file is in it
	file := filepath.Join(home, "token")
	if err := os.WriteFile(file, []byte(token.Reveal()), 0o600); err != nil {
		return 0, fmt.Errorf("write token: %w", err)
	}
	cmd := exec.CommandContext(ctx, filepath.Join(c.d.cfg.Bin, "m3o"), args...)
	cmd.Env = []string{"PATH=/usr/bin:/bin", "HOME=" + home, "XDG_CONFIG_HOME=" + home, "M3O_URL=" + c.d.apiURL(), "M3O_TOKEN_FILE=" + file, "M3O_CA_FILE=" + c.d.caFile(), "NO_COLOR=1"}
	cmd.Dir, cmd.Stdin, cmd.Stdout, cmd.Stderr = home, in, out, errOut
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	cmd.Cancel = func() error { return syscall.Kill(-cmd.Process.Pid, syscall.SIGTERM) }
	cmd.WaitDelay = 2 * time.Second
	err = cmd.Run()
	if exit, ok := errors.AsType[*exec.ExitError](err); ok {
		return exit.ExitCode(), nil
	}
	if err != nil && !errors.Is(err, exec.ErrWaitDelay) {
		return 0, fmt.Errorf("run m3o: %w", err)
	}
	return 0, nil
}
