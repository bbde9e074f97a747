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
	"sync"
	"syscall"
	"time"

	"github.com/m3o/m3o/gitserver"
	"github.com/m3o/m3o/internal/pty"
)

// sshCommands runs the CLI's verbs for who has only ssh: the m3o binary beside
// m3od, signed in as that user for as long as the command takes.
type sshCommands struct{ d *Daemon }

// localVerbs make sense only on one's own machine.
var localVerbs = []string{"login", "logout", "trust", "open", "env", "completion", "git:remote", "git"}

func (d *Daemon) commands() gitserver.Commands { return sshCommands{d} }

// Run is one command line of user, already split. The exit code is the CLI's.
func (c sshCommands) Run(ctx context.Context, user string, args []string, term *gitserver.Terminal, in io.Reader, out, errOut io.Writer) int {
	if len(args) > 0 && slices.Contains(localVerbs, args[0]) {
		fmt.Fprintf(errOut, "m3o: error: %s works only with m3o installed on your own machine\n", args[0])
		return 2
	}
	code, err := c.run(ctx, user, args, term, in, out, errOut)
	if err != nil {
		c.d.log.Error("command over ssh", "user", user, "err", err)
		fmt.Fprintln(errOut, "m3o: error: the command could not be run; the daemon's log has the cause")
		return 1
	}
	return code
}

func (c sshCommands) run(ctx context.Context, user string, args []string, term *gitserver.Terminal, in io.Reader, out, errOut io.Writer) (int, error) {
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
	cmd.Env = []string{"PATH=/usr/bin:/bin", "HOME=" + home, "XDG_CONFIG_HOME=" + home, "M3O_URL=" + c.d.apiURL(), "M3O_TOKEN_FILE=" + file, "M3O_CA_FILE=" + c.d.caFile()}
	cmd.Dir = home
	finish := func() {}
	if term != nil {
		cmd.Env = append(cmd.Env, "TERM="+term.Name)
		if finish, err = inTerminal(ctx, cmd, term, in, out); err != nil {
			return 0, err
		}
	} else {
		cmd.Env = append(cmd.Env, "NO_COLOR=1")
		cmd.Stdin, cmd.Stdout, cmd.Stderr = in, out, errOut
		cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	}
	cmd.Cancel = func() error { return syscall.Kill(-cmd.Process.Pid, syscall.SIGTERM) }
	cmd.WaitDelay = 2 * time.Second
	err = cmd.Run()
	finish()
	if exit, ok := errors.AsType[*exec.ExitError](err); ok {
		return exit.ExitCode(), nil
	}
	if err != nil && !errors.Is(err, exec.ErrWaitDelay) {
		return 0, fmt.Errorf("run m3o: %w", err)
	}
	return 0, nil
}

// inTerminal gives cmd a terminal that the client's end of is joined to.
// finish, called when cmd has ended, waits for the last output.
func inTerminal(ctx context.Context, cmd *exec.Cmd, term *gitserver.Terminal, in io.Reader, out io.Writer) (finish func(), err error) {
	master, slave, err := pty.Open()
	if err != nil {
		return nil, err
	}
	select {
	case s := <-term.Sizes: // before the program can ask
		pty.Resize(master, s[0], s[1])
	default:
	}
	cmd.Stdin, cmd.Stdout, cmd.Stderr = slave, slave, slave
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true, Setctty: true}
	var all sync.WaitGroup
	end, written := make(chan struct{}), make(chan struct{})
	all.Go(func() {
		for {
			select {
			case s := <-term.Sizes:
				pty.Resize(master, s[0], s[1])
			case <-end:
				return
			}
		}
	})
	all.Go(func() {
		defer close(written)
		_, _ = io.Copy(out, master) // EIO is how a terminal says the end
	})
	// A read of the client's keys ends with the session, not before.
	go func() { _, _ = io.Copy(master, in) }()
	return func() {
		close(end)
		_ = slave.Close()
		select {
		case <-written:
		case <-ctx.Done(): // the client reads no more
		case <-time.After(2 * time.Second): // a process it left holds the terminal
		}
		_ = master.Close()
		all.Wait()
	}, nil
}
