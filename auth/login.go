package auth

import (
	"context"
	"crypto/hmac"
	"crypto/rand"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"strings"
	"time"

	"golang.org/x/crypto/ssh"

	"github.com/m3o/m3o"
)

const (
	nonceTTL = time.Minute
	loginTTL = 30 * 24 * time.Hour
	// A nonce is 16 random bytes, 8 of expiry and 32 of MAC over both and the
	// fingerprint. So a challenge costs no memory, and asking for a million
	// of them is no attack; only those that led to a login are remembered, until
	// they expire.
	nonceSize = 16 + 8 + sha256.Size
)

// LoginPayload is what a client signs to log in at host (the API's host name)
// with a nonce from Challenge. The host keeps a false server from using the
// signature at the true one.
func LoginPayload(host string, nonce []byte) []byte {
	return fmt.Appendf(nil, "m3o-login-v1\x00%s\x00%s", host, nonce)
}

// Challenge makes a nonce for a login with the key of that fingerprint. It is
// good for one login within a minute. Fingerprints that are not known get one
// too, so nobody learns which are.
func (a *Auth) Challenge(_ context.Context, fingerprint string) ([]byte, error) {
	nonce := make([]byte, 24, nonceSize)
	if _, err := rand.Read(nonce[:16]); err != nil {
		return nil, fmt.Errorf("make nonce: %w", err)
	}
	binary.BigEndian.PutUint64(nonce[16:], uint64(a.now().Add(nonceTTL).UnixNano()))
	return append(nonce, a.nonceMAC(nonce, fingerprint)...), nil
}

func (a *Auth) nonceMAC(head []byte, fingerprint string) []byte {
	mac := hmac.New(sha256.New, a.nonceKey[:])
	mac.Write(head)
	mac.Write([]byte(fingerprint))
	return mac.Sum(nil)
}

// Login exchanges the signature of LoginPayload(host, nonce) for a token of 30
// days. The key is in SSH wire format. sigFormat and sig are those of an SSH
// signature; for a security key (sk-…) its five bytes of flags and counter
// follow in sig. RSA must sign with SHA-2. Every refusal is the same Denied,
// and Err says why, for the log.
func (a *Auth) Login(ctx context.Context, host string, nonce, publicKeyWire []byte, sigFormat string, sig []byte) (secret m3o.Secret, user string, expires time.Time, err error) {
	user, err = a.checkLogin(ctx, host, nonce, publicKeyWire, sigFormat, sig)
	if err != nil {
		return "", "", time.Time{}, &m3o.Error{Kind: m3o.Denied, Msg: "login refused",
			Hint: "use an SSH key that an admin has added for you; m3o login --key FILE chooses one", Err: err}
	}
	expires = a.now().Add(loginTTL)
	secret, err = a.IssueToken(ctx, user, loginTTL, "login")
	if err != nil {
		return "", "", time.Time{}, err
	}
	a.log.Info("login", "user", user, "key", fingerprint(publicKeyWire))
	return secret, user, expires, nil
}

func (a *Auth) checkLogin(ctx context.Context, host string, nonce, wire []byte, format string, blob []byte) (string, error) {
	if len(nonce) != nonceSize {
		return "", errors.New("nonce has the wrong size")
	}
	head, mac := nonce[:24], nonce[24:]
	if !hmac.Equal(mac, a.nonceMAC(head, fingerprint(wire))) {
		return "", errors.New("nonce was not made here for this key")
	}
	until := time.Unix(0, int64(binary.BigEndian.Uint64(head[16:])))
	if !a.now().Before(until) {
		return "", errors.New("nonce has expired")
	}
	pub, err := ssh.ParsePublicKey(wire)
	if err != nil {
		return "", fmt.Errorf("parse public key: %w", err)
	}
	if err := checkKeyType(pub); err != nil {
		return "", err
	}
	// x/crypto would take ssh-rsa too, which is SHA-1.
	if pub.Type() == ssh.KeyAlgoRSA {
		if format != ssh.KeyAlgoRSASHA256 && format != ssh.KeyAlgoRSASHA512 {
			return "", fmt.Errorf("signature format %q for an RSA key", format)
		}
	} else if format != pub.Type() {
		return "", fmt.Errorf("signature format %q for a %s key", format, pub.Type())
	}
	s := &ssh.Signature{Format: format, Blob: blob}
	if strings.HasPrefix(format, "sk-") && len(blob) >= 5 {
		s.Blob, s.Rest = blob[:len(blob)-5], blob[len(blob)-5:]
	}
	if err := pub.Verify(LoginPayload(host, nonce), s); err != nil {
		return "", fmt.Errorf("verify signature: %w", err)
	}
	user, _, err := a.UserByKey(ctx, wire)
	if err != nil {
		return "", err
	}
	// Only now, with the signature proven, is the nonce used up: nobody else
	// can spend it, and what is remembered is bounded by true logins.
	if !a.spend(string(nonce), until) {
		return "", errors.New("nonce has been used")
	}
	return user, nil
}

// spend uses up a nonce; false when it was before.
func (a *Auth) spend(nonce string, until time.Time) bool {
	a.mu.Lock()
	defer a.mu.Unlock()
	now := a.now()
	for n, t := range a.spent {
		if !now.Before(t) {
			delete(a.spent, n)
		}
	}
	if _, used := a.spent[nonce]; used {
		return false
	}
	a.spent[nonce] = until
	return true
}
