package gitserver

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"regexp"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/m3o/m3o"
	"github.com/m3o/m3o/internal/atomicfile"
)

// The hooks are git's; they only carry words between it and the daemon, over
// descriptors that receive-pack passes on to them. "end" is needed because
// receive-pack itself keeps 3 and 6 open.
var hookScripts = map[string]string{
	"pre-receive": `#!/bin/sh
# Written by m3od at each start. 3: what git is about to do; 4: text for the
# pusher; 5: 0 to let git go on. Without an answer git refuses the push.
{ echo "quarantine $GIT_QUARANTINE_PATH"; echo "shallow $GIT_SHALLOW_FILE"; cat; echo end; } >&3
exec 3>&-
cat <&4 >&2
read -r code <&5 || exit 1
exit "$code"
`,
	"post-receive": `#!/bin/sh
# Written by m3od at each start. 6: the refs that moved; 7: text for the pusher.
{ cat; echo end; } >&6
exec 6>&-
cat <&7 >&2
`,
}

// writeHooks writes the hook scripts to dir and makes sure that git will run
// them: git takes a hook it may not execute for none, and would accept every
// push without a deploy.
func writeHooks(dir string) (string, error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return "", fmt.Errorf("make hooks directory: %w", err)
	}
	for name, script := range hookScripts {
		path := filepath.Join(dir, name)
		if err := atomicfile.Write(path, []byte(script), 0o755); err != nil {
			return "", fmt.Errorf("write git hook: %w", err)
		}
		if err := unix.Access(path, unix.X_OK); err != nil {
			return "", &m3o.Error{Kind: m3o.Unavailable, Msg: fmt.Sprintf("git hook %s cannot be executed", path),
				Hint: "mount the data directory without noexec", Err: err}
		}
	}
	return dir, nil
}

// What the hooks say.
type hookCall struct {
	quarantine string // name of the directory in objects/, "" when there is none
	shallow    string // name of the shallow file in the repository, "" when there is none
	updates    []update
}

var (
	errHook        = errors.New("malformed hook call")
	quarantineName = regexp.MustCompile(`^tmp_objdir-incoming-[A-Za-z0-9]{6}$`)
	shallowName    = regexp.MustCompile(`^shallow_[A-Za-z0-9]{6}$`)
)

// maxHookCall bounds what a hook may say: as much as a header can hold.
const maxHookCall = maxHeader + 64<<10

// readPreReceive reads the call of the pre-receive hook. io.EOF means that git
// ended without calling it.
func readPreReceive(r io.Reader) (hookCall, error) {
	br := bufio.NewReader(io.LimitReader(r, maxHookCall))
	var c hookCall
	for _, want := range []struct {
		key  string
		name *regexp.Regexp
		to   *string
	}{{"quarantine ", quarantineName, &c.quarantine}, {"shallow ", shallowName, &c.shallow}} {
		line, err := readLine(br)
		if err != nil {
			return hookCall{}, err
		}
		path, ok := strings.CutPrefix(line, want.key)
		if !ok {
			return hookCall{}, errHook
		}
		if path == "" {
			continue
		}
		// Only the last element is believed; the rest is known.
		if *want.to = filepath.Base(path); !want.name.MatchString(*want.to) {
			return hookCall{}, errHook
		}
	}
	var err error
	c.updates, err = readUpdates(br)
	if err != nil {
		return hookCall{}, err
	}
	return c, nil
}

// readPostReceive reads the refs that moved. io.EOF means that none did, or
// that git ended first.
func readPostReceive(r io.Reader) ([]update, error) {
	return readUpdates(bufio.NewReader(io.LimitReader(r, maxHookCall)))
}

func readUpdates(br *bufio.Reader) ([]update, error) {
	var us []update
	for {
		line, err := readLine(br)
		if err != nil {
			return nil, err
		}
		if line == "end" {
			return us, nil
		}
		f := strings.SplitN(line, " ", 3)
		if len(f) != 3 || !isID(f[0]) || !isID(f[1]) || f[2] == "" {
			return nil, errHook
		}
		u := update{old: f[0], new: f[1], ref: f[2]}
		if u.old == zeroID {
			u.old = ""
		}
		if u.new == zeroID {
			u.new = ""
		}
		us = append(us, u)
	}
}

func readLine(br *bufio.Reader) (string, error) {
	line, err := br.ReadString('\n')
	if err != nil {
		if errors.Is(err, io.EOF) && line != "" {
			err = io.ErrUnexpectedEOF
		}
		return "", err
	}
	return strings.TrimSuffix(line, "\n"), nil
}
