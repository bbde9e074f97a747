package gitserver

import (
	"errors"
	"fmt"
	"slices"
	"strings"

	gossh "golang.org/x/crypto/ssh"
)

// maxRefused bounds how many refused keys are named to their owner.
const maxRefused = 4

var errRefused = errors.New("no key that was offered is known")

// refused notes that the client offered a key nobody has registered.
func (c *conn) refused(wire []byte) {
	key, err := gossh.ParsePublicKey(wire)
	if err != nil {
		return
	}
	c.refusals = append(c.refusals, key.Type()+" "+gossh.FingerprintSHA256(key))
}

// explain is the method keyboard-interactive, which never lets anybody in. An
// OpenSSH client tries it once it has run out of keys, and only then: a banner
// is the one way to say why, and one for each key that failed would be shown to
// those whose next key is known as well.
func (c *conn) explain(gossh.ConnMetadata, gossh.KeyboardInteractiveChallenge) (*gossh.Permissions, error) {
	if c.explained {
		return nil, errRefused
	}
	c.explained = true
	return nil, &gossh.BannerError{Err: errRefused, Message: refusal(c.refusals)}
}

// refusal says which keys were refused and how one is registered. All of it is
// what the client has sent: it learns nothing of who exists.
func refusal(keys []string) string {
	var b strings.Builder
	// A key is asked about and then used to sign: named once.
	slices.Sort(keys)
	keys = slices.Compact(keys)
	switch {
	case len(keys) == 0:
		b.WriteString("m3o: your SSH client offered no key.\n" +
			"m3o: hint: ssh-keygen -t ed25519 makes one\n")
	case len(keys) > maxRefused:
		fmt.Fprintf(&b, "m3o: none of the %d keys your SSH client offered is registered here.\n", len(keys))
	default:
		b.WriteString("m3o: no key your SSH client offered is registered here:\n")
		for _, k := range keys {
			fmt.Fprintf(&b, "m3o:   %s\n", k)
		}
	}
	b.WriteString("m3o: hint: on a computer that is logged in: m3o keys:add FILE.pub; new here: ask an admin for m3o users:create\n")
	return strings.ReplaceAll(b.String(), "\n", "\r\n")
}
