package auth

import (
	"cmp"
	"context"
	"fmt"
	"maps"
	"regexp"
	"slices"
	"time"

	"github.com/m3o/m3o"
)

// A User is a person or a machine that has keys and tokens. Admins may
// everything.
type User struct {
	Name    string
	Admin   bool
	Created time.Time // UTC
}

var userName = regexp.MustCompile(`^[a-z][a-z0-9-]{0,31}$`)

// CreateUser adds a user: 1 to 32 of a-z, 0-9 and hyphens, beginning with a
// letter. Conflict when the name is taken.
func (a *Auth) CreateUser(ctx context.Context, name string, admin bool) (User, error) {
	a.write.Lock()
	defer a.write.Unlock()
	return a.createUser(ctx, name, admin)
}

func (a *Auth) createUser(ctx context.Context, name string, admin bool) (User, error) {
	if err := checkUserName(name); err != nil {
		return User{}, err
	}
	u := User{Name: name, Admin: admin, Created: a.now()}
	err := a.users.create(ctx, name, u)
	if m3o.KindOf(err) == m3o.Conflict {
		return User{}, &m3o.Error{Kind: m3o.Conflict, Msg: fmt.Sprintf("there is a user called %s already", name), Err: err}
	}
	if err != nil {
		return User{}, fmt.Errorf("create user %s: %w", name, err)
	}
	a.log.Info("user created", "user", name, "admin", admin)
	return u, nil
}

func checkUserName(name string) error {
	if !userName.MatchString(name) {
		return &m3o.Error{Kind: m3o.Invalid, Msg: fmt.Sprintf("%q cannot be a user's name", name),
			Hint: "use 1 to 32 of a-z, 0-9 and hyphens, beginning with a letter"}
	}
	return nil
}

// User is the user called name, or NotFound.
func (a *Auth) User(_ context.Context, name string) (User, error) {
	u, _, ok := a.users.get(name)
	if !ok {
		return User{}, noUser(name)
	}
	return u, nil
}

func noUser(name string) error {
	return &m3o.Error{Kind: m3o.NotFound, Msg: fmt.Sprintf("no user called %q", name)}
}

// Users is all users in the order of their names.
func (a *Auth) Users(context.Context) ([]User, error) {
	all := a.users.all(func(string, User) bool { return true })
	return slices.SortedFunc(maps.Values(all), func(x, y User) int { return cmp.Compare(x.Name, y.Name) }), nil
}

// RemoveUser removes a user with all keys, tokens and rules. The last admin
// stays: Conflict.
func (a *Auth) RemoveUser(ctx context.Context, name string) error {
	a.write.Lock()
	defer a.write.Unlock()
	u, _, ok := a.users.get(name)
	if !ok {
		return noUser(name)
	}
	if u.Admin && len(a.otherAdmins(name)) == 0 {
		return &m3o.Error{Kind: m3o.Conflict, Msg: name + " is the last admin", Hint: "make another admin first"}
	}
	// The user goes last, so that a removal that was cut off can be repeated.
	if err := a.tokens.removeAll(ctx, func(_ string, t token) bool { return t.User == name }); err != nil {
		return fmt.Errorf("remove tokens of %s: %w", name, err)
	}
	if err := a.keys.removeAll(ctx, func(_ string, k Key) bool { return k.User == name }); err != nil {
		return fmt.Errorf("remove keys of %s: %w", name, err)
	}
	if err := a.rules.removeAll(ctx, func(_ string, r Rule) bool { return r.User == name }); err != nil {
		return fmt.Errorf("remove rules of %s: %w", name, err)
	}
	if err := a.users.remove(ctx, name); err != nil {
		return fmt.Errorf("remove user %s: %w", name, err)
	}
	a.log.Info("user removed", "user", name)
	return nil
}

func (a *Auth) otherAdmins(name string) map[string]User {
	return a.users.all(func(n string, u User) bool { return u.Admin && n != name })
}

// adminsWithKey reports whether an admin other than except has a key.
func (a *Auth) adminsWithKey(except string) bool {
	admins := a.otherAdmins(except)
	return len(a.keys.all(func(_ string, k Key) bool { _, ok := admins[k.User]; return ok })) > 0
}
