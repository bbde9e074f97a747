package auth

import (
	"context"
	"crypto/rand"
	"crypto/sha256"
	"encoding/base64"
	"encoding/hex"
	"fmt"
	"time"

	"github.com/m3o/m3o"
)

// token is what is kept of a token, under its hash. The hash needs no salt: a
// token has 256 random bits.
type token struct {
	User    string
	Note    string
	Created time.Time
	Expires time.Time
}

const (
	tokenPrefix = "m3o_" // so that scanners for leaked secrets know it
	maxTTL      = 366 * 24 * time.Hour
)

func hash(s m3o.Secret) string {
	sum := sha256.Sum256([]byte(s.Reveal()))
	return hex.EncodeToString(sum[:])
}

// IssueToken makes a token that stands for user until ttl, at most a year, is
// over. The token is not kept: this is the only time it is seen.
func (a *Auth) IssueToken(ctx context.Context, user string, ttl time.Duration, note string) (m3o.Secret, error) {
	if ttl <= 0 || ttl > maxTTL {
		return "", &m3o.Error{Kind: m3o.Invalid, Msg: fmt.Sprintf("a token can last up to %d days", maxTTL/(24*time.Hour))}
	}
	a.write.Lock() // against RemoveUser
	defer a.write.Unlock()
	if _, _, ok := a.users.get(user); !ok {
		return "", noUser(user)
	}
	now := a.now()
	// This is also where expired ones are swept out: their number grows only here.
	if err := a.tokens.removeAll(ctx, func(_ string, t token) bool { return !now.Before(t.Expires) }); err != nil {
		return "", fmt.Errorf("remove expired tokens: %w", err)
	}
	raw := make([]byte, 32)
	if _, err := rand.Read(raw); err != nil {
		return "", fmt.Errorf("make token: %w", err)
	}
	secret := m3o.Secret(tokenPrefix + base64.RawURLEncoding.EncodeToString(raw))
	err := a.tokens.create(ctx, hash(secret), token{User: user, Note: clip(note), Created: now, Expires: now.Add(ttl)})
	if err != nil {
		return "", fmt.Errorf("issue token for %s: %w", user, err)
	}
	return secret, nil
}

// Verify says for whom a token stands; Denied when it is unknown or expired.
// The look-up is by the token's hash, so the time it takes says nothing about
// a token that is nearly right.
func (a *Auth) Verify(_ context.Context, secret m3o.Secret) (Who, error) {
	denied := func(msg string) (Who, error) {
		return Who{}, &m3o.Error{Kind: m3o.Denied, Msg: msg, Hint: "m3o login"}
	}
	if secret == "" {
		return denied("not logged in")
	}
	t, _, ok := a.tokens.get(hash(secret))
	if !ok {
		return denied("the token is not valid")
	}
	if !a.now().Before(t.Expires) {
		return denied("the token has expired")
	}
	u, _, ok := a.users.get(t.User)
	if !ok {
		return denied("the token is not valid")
	}
	return Who{User: u.Name, Admin: u.Admin, Via: "token"}, nil
}

// RevokeToken ends a token at once. One that is not known is no error.
func (a *Auth) RevokeToken(ctx context.Context, secret m3o.Secret) error {
	h := hash(secret)
	if _, _, ok := a.tokens.get(h); !ok {
		return nil
	}
	if err := a.tokens.remove(ctx, h); err != nil {
		return fmt.Errorf("revoke token: %w", err)
	}
	return nil
}

// RevokeAll ends all tokens of user at once.
func (a *Auth) RevokeAll(ctx context.Context, user string) error {
	if err := a.tokens.removeAll(ctx, func(_ string, t token) bool { return t.User == user }); err != nil {
		return fmt.Errorf("revoke tokens of %s: %w", user, err)
	}
	return nil
}
