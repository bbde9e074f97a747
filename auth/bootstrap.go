package auth

import (
	"context"
	"crypto/rand"
	"crypto/subtle"
	"fmt"
	"time"

	"github.com/m3o/m3o"
)

// bootstrap is what is kept of the one-time code that makes the first admin.
type bootstrap struct {
	Hash    string
	Expires time.Time
	Tries   int
}

const (
	bootstrapKey   = "code"
	bootstrapTTL   = 24 * time.Hour
	bootstrapTries = 10
)

// BootstrapCode makes a code with which Bootstrap can be called once within 24
// hours, in place of any made before. Conflict once an admin has a key: from
// then on admins make admins.
func (a *Auth) BootstrapCode(ctx context.Context) (m3o.Secret, error) {
	a.write.Lock()
	defer a.write.Unlock()
	if a.adminsWithKey("") {
		return "", &m3o.Error{Kind: m3o.Conflict, Msg: "there is an admin already", Hint: "log in with the admin's SSH key"}
	}
	code := m3o.Secret(rand.Text()) // 128 bits
	b := bootstrap{Hash: hash(code), Expires: a.now().Add(bootstrapTTL)}
	if _, err := a.codes.Put(ctx, bootstrapKey, b); err != nil {
		return "", fmt.Errorf("store bootstrap code: %w", err)
	}
	return code, nil
}

// Bootstrap makes user an admin with this key, for who has the code. The code
// dies with its use, with its tenth wrong guess, after 24 hours, and when an
// admin has a key.
func (a *Auth) Bootstrap(ctx context.Context, code m3o.Secret, user, authorizedKeysLine string) (User, error) {
	// A mistake in these should not cost a try.
	if err := checkUserName(user); err != nil {
		return User{}, err
	}
	k, err := parseKey(authorizedKeysLine)
	if err != nil {
		return User{}, err
	}
	a.write.Lock()
	defer a.write.Unlock()
	if err := a.tryCode(ctx, code); err != nil {
		return User{}, err
	}
	if old, _, ok := a.keys.get(k.Fingerprint); ok && old.User != user {
		return User{}, &m3o.Error{Kind: m3o.Conflict, Msg: "this key is registered already", Hint: "use another key"}
	}
	u, _, ok := a.users.get(user)
	if ok && !u.Admin {
		return User{}, &m3o.Error{Kind: m3o.Conflict, Msg: fmt.Sprintf("there is a user called %s already", user), Hint: "choose another name"}
	}
	if !ok {
		if u, err = a.createUser(ctx, user, true); err != nil {
			return User{}, err
		}
	}
	// With the key written there is an admin with a key, and the code is dead
	// whether or not the last line is reached.
	if _, err := a.addKey(ctx, user, k); err != nil {
		return User{}, err
	}
	if err := a.codes.Delete(ctx, bootstrapKey, 0); err != nil {
		a.log.Warn("remove used bootstrap code", "err", err)
	}
	return u, nil
}

func (a *Auth) tryCode(ctx context.Context, code m3o.Secret) error {
	denied := &m3o.Error{Kind: m3o.Denied, Msg: "the bootstrap code is not valid", Hint: "start m3od again: it prints a new one while there is no admin"}
	if a.adminsWithKey("") {
		return denied
	}
	b, rev, err := a.codes.Get(ctx, bootstrapKey)
	if m3o.KindOf(err) == m3o.NotFound {
		return denied
	}
	if err != nil {
		return fmt.Errorf("read bootstrap code: %w", err)
	}
	if b.Tries >= bootstrapTries || !a.now().Before(b.Expires) {
		return denied
	}
	right := subtle.ConstantTimeCompare([]byte(b.Hash), []byte(hash(code))) == 1
	if right {
		return nil
	}
	// Counted before it is told, so that a crash gives no free guesses.
	b.Tries++
	if _, err := a.codes.Update(ctx, bootstrapKey, b, rev); err != nil {
		return fmt.Errorf("count bootstrap try: %w", err)
	}
	a.log.Warn("wrong bootstrap code", "tries", b.Tries)
	return denied
}
