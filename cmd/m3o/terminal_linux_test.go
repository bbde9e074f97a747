package main

import (
	"context"
	"fmt"
	"os"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// openTerminal is a pseudo-terminal: the person's end and the program's.
func openTerminal(t *testing.T) (person, program *os.File) {
	t.Helper()
	person, err := os.OpenFile("/dev/ptmx", os.O_RDWR|syscall.O_NOCTTY, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = person.Close() })
	if err := unix.IoctlSetPointerInt(int(person.Fd()), unix.TIOCSPTLCK, 0); err != nil {
		t.Fatal(err)
	}
	n, err := unix.IoctlGetInt(int(person.Fd()), unix.TIOCGPTN)
	if err != nil {
		t.Fatal(err)
	}
	program, err = os.OpenFile(fmt.Sprintf("/dev/pts/%d", n), os.O_RDWR|syscall.O_NOCTTY, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = program.Close() })
	return person, program
}

// waitNoEcho waits until what is typed is not shown: a question comes just
// before that.
func waitNoEcho(ctx context.Context, t *testing.T, program *os.File) {
	t.Helper()
	for {
		now, err := unix.IoctlGetTermios(int(program.Fd()), unix.TCGETS)
		if err != nil || ctx.Err() != nil {
			t.Fatal(err, ctx.Err())
		}
		if now.Lflag&unix.ECHO == 0 {
			return
		}
	}
}

// The whole program on a real terminal: it asks, and shows neither the
// passphrase nor the secret that is typed.
func TestTypedSecretsAreNotShown(t *testing.T) {
	p, l := newPlatform(t), newLaptop(t)
	p.hello()
	l.keyFile("id_ed25519", "open sesame")
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	defer cancel()
	person, program := openTerminal(t)

	talk := func(args []string, answers map[string]string) string {
		t.Helper()
		cmd := l.program(ctx, "m3o", args...)
		cmd.Stdin, cmd.Stdout, cmd.Stderr = program, program, program
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		done := make(chan error, 1)
		go func() {
			err := cmd.Wait()
			_, _ = program.WriteString("\r\nEND\r\n")
			done <- err
		}()
		var seen strings.Builder
		buf := make([]byte, 4096)
		for !strings.Contains(seen.String(), "\nEND\r") {
			n, err := person.Read(buf)
			if err != nil {
				t.Fatalf("%v after %s", err, seen.String())
			}
			seen.Write(buf[:n])
			for question, answer := range answers {
				if strings.Contains(seen.String(), question) {
					delete(answers, question)
					if !strings.Contains(question, "y/N") {
						waitNoEcho(ctx, t, program)
					}
					if _, err := person.WriteString(answer + "\n"); err != nil {
						t.Fatal(err)
					}
				}
			}
		}
		if err := <-done; err != nil {
			t.Errorf("m3o %v: %v\n%s", args, err, seen.String())
		}
		return seen.String()
	}
	out := talk([]string{"login", p.url, "--code", "first-start"}, map[string]string{"[y/N]": "y", "Passphrase for ": "open sesame"})
	if strings.Contains(out, "sesame") || !strings.Contains(out, "logged in") {
		t.Errorf("login on a terminal: %s", out)
	}
	out = talk([]string{"config:set", "KEY=-", "-s", "-a", "hello"}, map[string]string{"Value of KEY: ": "hunter2"})
	if v, _ := value(t, p, "KEY"); strings.Contains(out, "hunter2") || v != "hunter2" {
		t.Errorf("config:set on a terminal: %s, value %q", out, v)
	}
	// Ctrl-C while a passphrase is asked for gives the terminal its echo back.
	before, err := unix.IoctlGetTermios(int(program.Fd()), unix.TCGETS)
	if err != nil {
		t.Fatal(err)
	}
	cmd := l.program(ctx, "m3o", "login")
	cmd.Stdin, cmd.Stderr = program, program
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	var seen strings.Builder
	buf := make([]byte, 4096)
	for !strings.Contains(seen.String(), "Passphrase for ") {
		n, err := person.Read(buf)
		if err != nil {
			t.Fatal(err)
		}
		seen.Write(buf[:n])
	}
	waitNoEcho(ctx, t, program)
	if err := cmd.Process.Signal(os.Interrupt); err != nil {
		t.Fatal(err)
	}
	if err := cmd.Wait(); err == nil || cmd.ProcessState.ExitCode() != 1 {
		t.Errorf("interrupted login: %v", err)
	}
	after, err := unix.IoctlGetTermios(int(program.Fd()), unix.TCGETS)
	if err != nil || after.Lflag != before.Lflag {
		t.Errorf("terminal flags %x, before %x, %v", after.Lflag, before.Lflag, err)
	}
}
