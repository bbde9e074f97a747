package main

import (
	"context"
	"fmt"
	"path/filepath"
	"strings"

	"golang.org/x/crypto/ssh"

	m3ov1 "github.com/m3o/m3o/api/m3o/v1"
)

func runKeys(ctx context.Context, c *call) error {
	cl, err := c.connect()
	if err != nil {
		return err
	}
	res, err := ask(ctx, cl.keys.List, &m3ov1.ListKeysRequest{User: c.value("user")})
	if err != nil {
		return err
	}
	return c.result(res, func() {
		if len(res.GetKeys()) == 0 {
			c.say("no keys")
			c.hint("m3o keys:add")
			return
		}
		var rows [][]string
		for _, k := range res.GetKeys() {
			used := c.when(k.GetLastUsed())
			if used == "" {
				used = "never"
			}
			rows = append(rows, []string{plain(k.GetFingerprint()), plain(k.GetType()), plain(k.GetName()), c.when(k.GetCreated()), used})
		}
		c.table([]string{"FINGERPRINT", "TYPE", "NAME", "ADDED", "LAST USED"}, rows)
	})
}

func runKeysAdd(ctx context.Context, c *call) error {
	line, err := c.publicKey()
	if err != nil {
		return err
	}
	cl, err := c.connect()
	if err != nil {
		return err
	}
	res, err := ask(ctx, cl.keys.Add, &m3ov1.AddKeyRequest{PublicKey: line, User: c.value("user")})
	if err != nil {
		return err
	}
	return c.result(res, func() {
		c.print("added %s for %s\n", plain(res.GetKey().GetFingerprint()), plain(res.GetKey().GetUser()))
		c.undo("m3o keys:remove %s", plain(res.GetKey().GetFingerprint()))
	})
}

// publicKey is the authorized_keys line that keys:add sends: of a file, of
// stdin for "-", the argument itself if it is a line, or else of the first default key. A private key is refused
// before anything is sent.
func (c *call) publicKey() (string, error) {
	var data, from string
	switch {
	case len(c.args) > 0 && c.args[0] == "-":
		text, err := c.readInput()
		if err != nil {
			return "", err
		}
		data, from = text, "stdin"
	case len(c.args) > 0 && strings.Contains(c.args[0], " "):
		data, from = c.args[0], "the argument" // the key itself, as somebody sent it
	case len(c.args) > 0:
		b, err := readSmall(c.args[0])
		if err != nil {
			return "", err
		}
		data, from = string(b), c.args[0]
	default:
		home, err := c.home()
		if err != nil {
			return "", err
		}
		for _, name := range defaultKeys {
			path := filepath.Join(home, ".ssh", name+".pub")
			if b, err := readSmall(path); err == nil {
				data, from = string(b), path
				break
			}
		}
		if from == "" {
			return "", misuse("no public key in ~/.ssh", "m3o keys:add FILE, or ssh-keygen -t ed25519")
		}
		c.say("adding %s", from)
	}
	return authorizedLine(data, from)
}

func authorizedLine(data, from string) (string, error) {
	if strings.Contains(data, "PRIVATE KEY-----") {
		return "", misuse(from+" is a private key: it stays on this computer", "the public one ends in .pub")
	}
	pub, comment, _, rest, err := ssh.ParseAuthorizedKey([]byte(data))
	if err != nil {
		return "", misuse(from+" holds no public SSH key", "it is one line that begins with ssh-ed25519, ecdsa-… or ssh-rsa")
	}
	if strings.TrimSpace(string(rest)) != "" {
		return "", misuse(from+" holds more than one key", "add them one by one")
	}
	return (&key{public: pub, comment: comment}).line(), nil
}

func runKeysRemove(ctx context.Context, c *call) error {
	cl, err := c.connect()
	if err != nil {
		return err
	}
	which := c.args[0]
	if !strings.HasPrefix(which, "SHA256:") {
		res, err := ask(ctx, cl.keys.List, &m3ov1.ListKeysRequest{User: c.value("user")})
		if err != nil {
			return err
		}
		var hits []string
		for _, k := range res.GetKeys() {
			if k.GetName() == which {
				hits = append(hits, k.GetFingerprint())
			}
		}
		switch len(hits) {
		case 0:
			return fail("no key called "+quoted(which), "m3o keys lists them")
		case 1:
			which = hits[0]
		default:
			return misuse(fmt.Sprintf("%d keys are called %s", len(hits), quoted(which)), "name one by its fingerprint: "+strings.Join(hits, " or "))
		}
	}
	res, err := ask(ctx, cl.keys.Remove, &m3ov1.RemoveKeyRequest{Fingerprint: which})
	if err != nil {
		return err
	}
	return c.result(res, func() {
		c.print("removed %s\n", plain(which))
		c.undo("m3o keys:add FILE, with the public key")
	})
}

func runUsersCreate(ctx context.Context, c *call) error {
	line := ""
	if c.has("key") {
		b, err := readSmall(c.value("key"))
		if err != nil {
			return err
		}
		if line, err = authorizedLine(string(b), c.value("key")); err != nil {
			return err
		}
	}
	cl, err := c.connect()
	if err != nil {
		return err
	}
	name := c.args[0]
	res, err := ask(ctx, cl.keys.CreateUser, &m3ov1.CreateUserRequest{User: name, Admin: c.has("admin")})
	if err != nil {
		return err
	}
	if line != "" {
		if _, err := ask(ctx, cl.keys.Add, &m3ov1.AddKeyRequest{PublicKey: line, User: name}); err != nil {
			c.say("made %s, but the key was not added", name)
			return err
		}
	}
	return c.result(res, func() {
		c.print("made %s\n", name)
		if line == "" {
			c.hint("m3o keys:add FILE --user %s, so that they can log in", name)
		}
	})
}
