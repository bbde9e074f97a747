package auth

import (
	"bytes"
	"cmp"
	"context"
	"crypto/rsa"
	"crypto/sha256"
	"encoding/base64"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"
	"unicode"

	"golang.org/x/crypto/ssh"

	"github.com/m3o/m3o"
)

// A Key is an SSH public key that opens its user's account.
type Key struct {
	Fingerprint string // SHA256:… as ssh-keygen -l prints it
	Name        string // comment of the authorized_keys line
	Type        string // ssh-ed25519 …
	User        string
	Created     time.Time // UTC
	LastUsed    time.Time // UTC, to the minute; zero when never
	Wire        []byte    // public key in SSH wire format
}

const (
	maxKeyLine = 16 << 10
	minRSABits = 2048
	maxRSABits = 8192 // larger ones make each verification a denial of service
)

// keyTypes are those we take. DSA is broken; certificates have a lifetime and
// principals, which a plain key record would ignore.
var keyTypes = []string{
	ssh.KeyAlgoED25519, ssh.KeyAlgoECDSA256, ssh.KeyAlgoECDSA384, ssh.KeyAlgoECDSA521,
	ssh.KeyAlgoSKED25519, ssh.KeyAlgoSKECDSA256, ssh.KeyAlgoRSA,
}

// parseKey reads one line of an authorized_keys file.
func parseKey(line string) (Key, error) {
	invalid := func(msg, hint string) (Key, error) {
		return Key{}, &m3o.Error{Kind: m3o.Invalid, Msg: msg, Hint: hint}
	}
	line = strings.TrimSpace(line)
	if strings.Contains(line, "PRIVATE KEY") || strings.HasPrefix(line, "PuTTY-User-Key-File") {
		return invalid("that is a private key, which now has left your machine: stop using it",
			"make a new key pair with ssh-keygen, remove the old one wherever it is accepted, and add the .pub file")
	}
	const hint = "paste the one line of the .pub file, such as ~/.ssh/id_ed25519.pub"
	switch {
	case line == "":
		return invalid("no key was given", hint)
	case len(line) > maxKeyLine:
		return invalid("that is too long to be a public key", hint)
	case strings.ContainsAny(line, "\r\n"):
		return invalid("that is more than one line; add one key at a time", hint)
	}
	typ, _, _ := strings.Cut(line, " ")
	if typ == "ssh-dss" {
		return invalid("DSA keys are not secure any more", "make a new key with ssh-keygen -t ed25519")
	}
	pub, comment, options, _, err := ssh.ParseAuthorizedKey([]byte(line))
	if err != nil {
		return invalid("that is not an SSH public key", hint)
	}
	if len(options) > 0 {
		return invalid("options before the key are not supported", "paste only the key type, the key and the comment")
	}
	if err := checkKeyType(pub); err != nil {
		return Key{}, err
	}
	name := strings.Map(func(r rune) rune {
		if unicode.IsPrint(r) && r != unicode.ReplacementChar {
			return r
		}
		return -1
	}, comment)
	if r := []rune(name); len(r) > 100 {
		name = string(r[:100])
	}
	wire := pub.Marshal()
	return Key{Fingerprint: fingerprint(wire), Name: cmp.Or(name, pub.Type()), Type: pub.Type(), Wire: wire}, nil
}

func checkKeyType(pub ssh.PublicKey) error {
	if !slices.Contains(keyTypes, pub.Type()) {
		return &m3o.Error{Kind: m3o.Invalid, Msg: fmt.Sprintf("keys of type %s are not accepted", pub.Type()),
			Hint: "make a key with ssh-keygen -t ed25519"}
	}
	if pub.Type() != ssh.KeyAlgoRSA {
		return nil
	}
	var bits int
	if c, ok := pub.(ssh.CryptoPublicKey); ok {
		if r, ok := c.CryptoPublicKey().(*rsa.PublicKey); ok {
			bits = r.N.BitLen()
		}
	}
	if bits < minRSABits || bits > maxRSABits {
		return &m3o.Error{Kind: m3o.Invalid, Msg: fmt.Sprintf("RSA keys must have %d to %d bits; this has %d", minRSABits, maxRSABits, bits),
			Hint: "make a key with ssh-keygen -t ed25519"}
	}
	return nil
}

func fingerprint(wire []byte) string {
	sum := sha256.Sum256(wire)
	return "SHA256:" + base64.RawStdEncoding.EncodeToString(sum[:])
}

// AddKey registers the public key of one authorized_keys line for user.
// Conflict when anybody has it already; whose it is stays untold.
func (a *Auth) AddKey(ctx context.Context, user, authorizedKeysLine string) (Key, error) {
	k, err := parseKey(authorizedKeysLine)
	if err != nil {
		return Key{}, err
	}
	a.write.Lock()
	defer a.write.Unlock()
	return a.addKey(ctx, user, k)
}

func (a *Auth) addKey(ctx context.Context, user string, k Key) (Key, error) {
	if _, _, ok := a.users.get(user); !ok {
		return Key{}, noUser(user)
	}
	k.User, k.Created = user, a.now()
	err := a.keys.create(ctx, k.Fingerprint, k)
	if m3o.KindOf(err) == m3o.Conflict {
		return Key{}, &m3o.Error{Kind: m3o.Conflict, Msg: "this key is registered already",
			Hint: "m3o keys shows your own; a key can belong to one user only", Err: err}
	}
	if err != nil {
		return Key{}, fmt.Errorf("add key: %w", err)
	}
	a.log.Info("key added", "user", user, "key", k.Fingerprint)
	return k, nil
}

// Keys is the keys of user, oldest first.
func (a *Auth) Keys(_ context.Context, user string) ([]Key, error) {
	if _, _, ok := a.users.get(user); !ok {
		return nil, noUser(user)
	}
	all := a.keys.all(func(_ string, k Key) bool { return k.User == user })
	return slices.SortedFunc(maps.Values(all), func(x, y Key) int {
		return cmp.Or(x.Created.Compare(y.Created), cmp.Compare(x.Fingerprint, y.Fingerprint))
	}), nil
}

// Key is the key with that fingerprint, or NotFound.
func (a *Auth) Key(_ context.Context, fingerprint string) (Key, error) {
	k, _, ok := a.keys.get(fingerprint)
	if !ok {
		return Key{}, noKey(fingerprint)
	}
	return k, nil
}

func noKey(fingerprint string) error {
	return &m3o.Error{Kind: m3o.NotFound, Msg: fmt.Sprintf("no key with fingerprint %q", fingerprint), Hint: "m3o keys"}
}

// RemoveKey removes a key. The last key of the last admin who has one stays,
// or nobody could get in any more: Conflict.
func (a *Auth) RemoveKey(ctx context.Context, fingerprint string) error {
	a.write.Lock()
	defer a.write.Unlock()
	k, _, ok := a.keys.get(fingerprint)
	if !ok {
		return noKey(fingerprint)
	}
	if u, _, _ := a.users.get(k.User); u.Admin && !a.adminsWithKey(k.User) {
		if own, err := a.Keys(ctx, k.User); err != nil || len(own) < 2 {
			return &m3o.Error{Kind: m3o.Conflict, Msg: "this is the last key of the last admin", Hint: "add another key first"}
		}
	}
	if err := a.keys.remove(ctx, fingerprint); err != nil {
		return fmt.Errorf("remove key: %w", err)
	}
	a.log.Info("key removed", "user", k.User, "key", fingerprint)
	return nil
}

// UserByKey says whose public key, in SSH wire format, this is, or NotFound.
// That the other side has the private key is for the caller to prove. It is
// answered from memory, and at most once a minute writes down that the key was
// used.
func (a *Auth) UserByKey(ctx context.Context, wire []byte) (user, fp string, err error) {
	fp = fingerprint(wire)
	k, rev, ok := a.keys.get(fp)
	if !ok || !bytes.Equal(k.Wire, wire) {
		return "", "", &m3o.Error{Kind: m3o.NotFound, Msg: "this SSH key is not known here",
			Hint: "add its .pub file with m3o keys:add, or ask an admin"}
	}
	if at := a.now().Truncate(time.Minute); k.LastUsed.Before(at) {
		k.LastUsed = at
		// Being written down matters less than getting in: a full disk or a
		// store that is away must not lock people out.
		tctx, cancel := context.WithTimeout(ctx, time.Second)
		defer cancel()
		if err := a.keys.update(tctx, fp, k, rev); err != nil && m3o.KindOf(err) != m3o.Conflict {
			a.log.Debug("note use of key", "user", k.User, "err", err)
		}
	}
	return k.User, fp, nil
}
