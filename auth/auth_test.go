package auth

import (
	"bytes"
	"context"
	"crypto/ed25519"
	"crypto/rand"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/crypto/ssh"

	"github.com/m3o/m3o"
	"github.com/m3o/m3o/store"
)

// clock is a time that only tests move.
type clock struct {
	mu sync.Mutex // guards at
	at time.Time
}

func (c *clock) now() time.Time {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.at
}

func (c *clock) pass(d time.Duration) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.at = c.at.Add(d)
}

type fixture struct {
	*Auth
	clock *clock
	st    *store.Store
	dir   string
}

func open(t testing.TB) fixture {
	t.Helper()
	dir := t.TempDir()
	st, err := store.Open(context.Background(), store.Config{Dir: dir})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := st.Close(); err != nil {
			t.Error(err)
		}
	})
	return openOn(t, st, dir)
}

func openOn(t testing.TB, st *store.Store, dir string) fixture {
	t.Helper()
	a, err := Open(context.Background(), st, nil)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := a.Close(); err != nil {
			t.Error(err)
		}
	})
	c := &clock{at: time.Date(2026, 11, 23, 12, 0, 30, 0, time.UTC)}
	a.now = c.now
	return fixture{a, c, st, dir}
}

func (f fixture) user(t testing.TB, name string, admin bool) Who {
	t.Helper()
	if _, err := f.CreateUser(t.Context(), name, admin); err != nil {
		t.Fatal(err)
	}
	return Who{User: name, Admin: admin, Via: "test"}
}

func signer(t testing.TB) ssh.Signer {
	t.Helper()
	_, priv, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	s, err := ssh.NewSignerFromKey(priv)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func line(s ssh.Signer) string { return string(ssh.MarshalAuthorizedKey(s.PublicKey())) }

func (f fixture) key(t testing.TB, user string, s ssh.Signer) Key {
	t.Helper()
	k, err := f.AddKey(t.Context(), user, line(s))
	if err != nil {
		t.Fatal(err)
	}
	return k
}

func wantKind(t testing.TB, err error, want m3o.Kind) {
	t.Helper()
	if err == nil || m3o.KindOf(err) != want {
		t.Errorf("error is %v (%v), want kind %v", err, m3o.KindOf(err), want)
	}
}

func TestUsers(t *testing.T) {
	f := open(t)
	ctx := t.Context()
	f.user(t, "root", true)
	f.user(t, "ada", false)
	_, err := f.CreateUser(ctx, "ada", true)
	wantKind(t, err, m3o.Conflict)
	for _, bad := range []string{"", "Ada", "1a", "a/b", "a b", "ä", strings.Repeat("a", 33)} {
		_, err := f.CreateUser(ctx, bad, false)
		wantKind(t, err, m3o.Invalid)
	}
	u, err := f.User(ctx, "ada")
	if err != nil || u.Admin || !u.Created.Equal(f.clock.now()) {
		t.Errorf("User = %+v, %v", u, err)
	}
	list, err := f.Users(ctx)
	if err != nil || len(list) != 2 || list[0].Name != "ada" || list[1].Name != "root" {
		t.Errorf("Users = %v, %v", list, err)
	}
	wantKind(t, f.RemoveUser(ctx, "root"), m3o.Conflict)
	wantKind(t, f.RemoveUser(ctx, "nobody"), m3o.NotFound)

	s := signer(t)
	f.key(t, "ada", s)
	token, err := f.IssueToken(ctx, "ada", time.Hour, "")
	if err != nil {
		t.Fatal(err)
	}
	if err := f.Grant(ctx, "hello", "ada", Owner); err != nil {
		t.Fatal(err)
	}
	if err := f.RemoveUser(ctx, "ada"); err != nil {
		t.Fatal(err)
	}
	_, err = f.User(ctx, "ada")
	wantKind(t, err, m3o.NotFound)
	_, _, err = f.UserByKey(ctx, s.PublicKey().Marshal())
	wantKind(t, err, m3o.NotFound)
	_, err = f.Verify(ctx, token)
	wantKind(t, err, m3o.Denied)
	// Somebody who gets the name later inherits nothing.
	who := f.user(t, "ada", false)
	wantKind(t, f.Allow(ctx, who, AppsRead, "hello"), m3o.NotFound)
	_, err = f.Verify(ctx, token)
	wantKind(t, err, m3o.Denied)
}

func TestKeys(t *testing.T) {
	f := open(t)
	ctx := t.Context()
	f.user(t, "ada", false)
	f.user(t, "bob", false)
	s := signer(t)
	k, err := f.AddKey(ctx, "ada", strings.TrimSpace(line(s))+" ada@laptop\x07\n")
	if err != nil || k.Fingerprint != ssh.FingerprintSHA256(s.PublicKey()) || k.Name != "ada@laptop" || k.Type != "ssh-ed25519" {
		t.Fatalf("AddKey = %+v, %v", k, err)
	}
	for _, user := range []string{"ada", "bob"} {
		_, err := f.AddKey(ctx, user, line(s))
		wantKind(t, err, m3o.Conflict)
		if err != nil && strings.Contains(err.Error()+m3o.HintOf(err), "ada") {
			t.Errorf("%v names the owner", err)
		}
	}
	_, err = f.AddKey(ctx, "nobody", line(signer(t)))
	wantKind(t, err, m3o.NotFound)
	f.clock.pass(time.Second)
	second := f.key(t, "ada", signer(t))
	list, err := f.Keys(ctx, "ada")
	if err != nil || len(list) != 2 || list[0].Fingerprint != k.Fingerprint || list[1].Fingerprint != second.Fingerprint {
		t.Errorf("Keys = %v, %v", list, err)
	}
	if got, err := f.Key(ctx, k.Fingerprint); err != nil || got.User != "ada" || !bytes.Equal(got.Wire, s.PublicKey().Marshal()) {
		t.Errorf("Key = %+v, %v", got, err)
	}
	if err := f.RemoveKey(ctx, k.Fingerprint); err != nil {
		t.Fatal(err)
	}
	wantKind(t, f.RemoveKey(ctx, k.Fingerprint), m3o.NotFound)
	_, err = f.Key(ctx, k.Fingerprint)
	wantKind(t, err, m3o.NotFound)
	f.key(t, "bob", s) // free again
}

func TestUserByKey(t *testing.T) {
	f := open(t)
	ctx := t.Context()
	f.user(t, "ada", false)
	s := signer(t)
	wire := s.PublicKey().Marshal()
	_, _, err := f.UserByKey(ctx, wire)
	wantKind(t, err, m3o.NotFound)
	_, _, err = f.UserByKey(ctx, nil)
	wantKind(t, err, m3o.NotFound)
	k := f.key(t, "ada", s)
	used := func() time.Time {
		t.Helper()
		user, fp, err := f.UserByKey(ctx, wire)
		if err != nil || user != "ada" || fp != k.Fingerprint {
			t.Fatalf("UserByKey = %q, %q, %v", user, fp, err)
		}
		k, err := f.Key(ctx, fp)
		if err != nil {
			t.Fatal(err)
		}
		return k.LastUsed
	}
	first := used()
	if want := f.clock.now().Truncate(time.Minute); !first.Equal(want) {
		t.Errorf("LastUsed = %v, want %v", first, want)
	}
	f.clock.pass(20 * time.Second)
	if !used().Equal(first) {
		t.Error("LastUsed was written twice in a minute")
	}
	f.clock.pass(time.Minute)
	if !used().After(first) {
		t.Error("LastUsed was not written after a minute")
	}
}

func TestLastKeyOfTheLastAdminStays(t *testing.T) {
	f := open(t)
	ctx := t.Context()
	f.user(t, "root", true)
	f.user(t, "other", true) // an admin without a key cannot get in either
	k1 := f.key(t, "root", signer(t))
	wantKind(t, f.RemoveKey(ctx, k1.Fingerprint), m3o.Conflict)
	k2 := f.key(t, "root", signer(t))
	// Two at once must not both find the other one still there.
	var wg sync.WaitGroup
	errs := make([]error, 2)
	for i, k := range []Key{k1, k2} {
		wg.Go(func() { errs[i] = f.RemoveKey(ctx, k.Fingerprint) })
	}
	wg.Wait()
	if (errs[0] == nil) == (errs[1] == nil) {
		t.Errorf("removing both keys at once: %v, %v, want one to fail", errs[0], errs[1])
	}
	left, err := f.Keys(ctx, "root")
	if err != nil || len(left) != 1 {
		t.Fatalf("keys left: %v, %v", left, err)
	}
	f.key(t, "other", signer(t))
	if err := f.RemoveKey(ctx, left[0].Fingerprint); err != nil {
		t.Errorf("with another admin able to get in: %v", err)
	}
}

func TestStateSurvivesReopen(t *testing.T) {
	f := open(t)
	ctx := t.Context()
	f.user(t, "ada", false)
	s := signer(t)
	f.key(t, "ada", s)
	token, err := f.IssueToken(ctx, "ada", time.Hour, "")
	if err != nil {
		t.Fatal(err)
	}
	if err := f.SetOwner(ctx, "hello", "ada"); err != nil {
		t.Fatal(err)
	}
	g := openOn(t, f.st, f.dir)
	if user, _, err := g.UserByKey(ctx, s.PublicKey().Marshal()); err != nil || user != "ada" {
		t.Errorf("UserByKey = %q, %v", user, err)
	}
	if who, err := g.Verify(ctx, token); err != nil || who.User != "ada" {
		t.Errorf("Verify = %+v, %v", who, err)
	}
	if err := g.Allow(ctx, Who{User: "ada"}, AppsDestroy, "hello"); err != nil {
		t.Error(err)
	}
	// What one does, the other learns: an external store may have two.
	if err := g.RevokeAll(ctx, "ada"); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the other one refuses the token", func() bool { _, err := f.Verify(ctx, token); return err != nil })
	g.user(t, "bob", false)
	eventually(t, "the other one knows the user", func() bool { _, err := f.User(ctx, "bob"); return err == nil })
}

func eventually(t *testing.T, what string, cond func() bool) {
	t.Helper()
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	end := time.After(time.Minute)
	for !cond() {
		select {
		case <-tick.C:
		case <-end:
			t.Fatal("does not come about: " + what)
		}
	}
}

func TestTokens(t *testing.T) {
	f := open(t)
	ctx := t.Context()
	f.user(t, "ada", true)
	for _, ttl := range []time.Duration{0, -1, maxTTL + 1} {
		_, err := f.IssueToken(ctx, "ada", ttl, "")
		wantKind(t, err, m3o.Invalid)
	}
	_, err := f.IssueToken(ctx, "nobody", time.Hour, "")
	wantKind(t, err, m3o.NotFound)
	tok, err := f.IssueToken(ctx, "ada", time.Hour, "ci")
	if err != nil || !strings.HasPrefix(tok.Reveal(), "m3o_") || len(tok.Reveal()) != 4+43 {
		t.Fatalf("token of %d characters, %v", len(tok.Reveal()), err)
	}
	if who, err := f.Verify(ctx, tok); err != nil || who != (Who{User: "ada", Admin: true, Via: "token"}) {
		t.Errorf("Verify = %+v, %v", who, err)
	}
	for _, bad := range []m3o.Secret{"", "m3o_", tok + "x", tok[:len(tok)-1], m3o.Secret(hash(tok))} {
		_, err := f.Verify(ctx, bad)
		wantKind(t, err, m3o.Denied)
		if m3o.HintOf(err) != "m3o login" {
			t.Errorf("hint is %q", m3o.HintOf(err))
		}
	}
	f.clock.pass(time.Hour)
	_, err = f.Verify(ctx, tok)
	wantKind(t, err, m3o.Denied)
	second, err := f.IssueToken(ctx, "ada", time.Hour, "")
	if err != nil {
		t.Fatal(err)
	}
	if n := len(f.tokens.all(func(string, token) bool { return true })); n != 1 {
		t.Errorf("%d tokens are kept, want the one that is good", n)
	}
	if err := f.RevokeToken(ctx, second); err != nil {
		t.Fatal(err)
	}
	if err := f.RevokeToken(ctx, second); err != nil {
		t.Errorf("revoking twice: %v", err)
	}
	_, err = f.Verify(ctx, second)
	wantKind(t, err, m3o.Denied)
}

func TestNoSecretIsStoredInTheClear(t *testing.T) {
	f := open(t)
	f.user(t, "ada", false)
	code, err := f.BootstrapCode(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	token, err := f.IssueToken(t.Context(), "ada", time.Hour, "findable note")
	if err != nil {
		t.Fatal(err)
	}
	foundNote := false
	err = filepath.WalkDir(f.dir, func(path string, d os.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		data, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		foundNote = foundNote || bytes.Contains(data, []byte("findable note"))
		for what, s := range map[string]m3o.Secret{"token": token, "code": code} {
			if bytes.Contains(data, []byte(strings.TrimPrefix(s.Reveal(), tokenPrefix))) {
				t.Errorf("the %s is in %s", what, path)
			}
		}
		return nil
	})
	if err != nil || !foundNote {
		t.Errorf("search of the store's files: %v, note found: %v", err, foundNote)
	}
}

func TestBootstrap(t *testing.T) {
	f := open(t)
	ctx := t.Context()
	s := signer(t)
	_, err := f.Bootstrap(ctx, "", "root", line(s))
	wantKind(t, err, m3o.Denied)
	old, err := f.BootstrapCode(ctx)
	if err != nil {
		t.Fatal(err)
	}
	code, err := f.BootstrapCode(ctx)
	if err != nil {
		t.Fatal(err)
	}
	_, err = f.Bootstrap(ctx, old, "root", line(s))
	wantKind(t, err, m3o.Denied)
	// A mistake in name or key costs no try.
	for range bootstrapTries + 1 {
		_, err = f.Bootstrap(ctx, code, "Root!", line(s))
		wantKind(t, err, m3o.Invalid)
		_, err = f.Bootstrap(ctx, code, "root", "nonsense")
		wantKind(t, err, m3o.Invalid)
	}
	u, err := f.Bootstrap(ctx, code, "root", line(s))
	if err != nil || !u.Admin || u.Name != "root" {
		t.Fatalf("Bootstrap = %+v, %v", u, err)
	}
	if user, _, err := f.UserByKey(ctx, s.PublicKey().Marshal()); err != nil || user != "root" {
		t.Errorf("UserByKey = %q, %v", user, err)
	}
	_, err = f.Bootstrap(ctx, code, "eve", line(signer(t)))
	wantKind(t, err, m3o.Denied)
	_, err = f.BootstrapCode(ctx)
	wantKind(t, err, m3o.Conflict)
}

func TestBootstrapCodeDies(t *testing.T) {
	f := open(t)
	ctx := t.Context()
	code, err := f.BootstrapCode(ctx)
	if err != nil {
		t.Fatal(err)
	}
	f.clock.pass(bootstrapTTL)
	_, err = f.Bootstrap(ctx, code, "root", line(signer(t)))
	wantKind(t, err, m3o.Denied)

	if code, err = f.BootstrapCode(ctx); err != nil {
		t.Fatal(err)
	}
	for i := range bootstrapTries {
		_, err := f.Bootstrap(ctx, m3o.Secret(fmt.Sprint("guess", i)), "root", line(signer(t)))
		wantKind(t, err, m3o.Denied)
	}
	_, err = f.Bootstrap(ctx, code, "root", line(signer(t)))
	wantKind(t, err, m3o.Denied)

	// An admin who got a key another way ends it too.
	if code, err = f.BootstrapCode(ctx); err != nil {
		t.Fatal(err)
	}
	f.user(t, "root", true)
	f.key(t, "root", signer(t))
	_, err = f.Bootstrap(ctx, code, "eve", line(signer(t)))
	wantKind(t, err, m3o.Denied)
}

func TestRolesAndVerbs(t *testing.T) {
	f := open(t)
	ctx := t.Context()
	root := f.user(t, "root", true)
	for name, role := range map[string]Role{"own": Owner, "dep": Deployer, "view": Viewer} {
		f.user(t, name, false)
		if err := f.Grant(ctx, "hello", name, role); err != nil {
			t.Fatal(err)
		}
	}
	f.user(t, "none", false)
	// What is not in the list of a user is refused; written out, not derived.
	may := map[string][]Verb{
		"own":  {AppsRead, Fetch, LogsRead, AccessRead, Push, Rollback, ProcessesWrite, ConfigRead, ConfigWrite, AppsDestroy, AccessWrite},
		"dep":  {AppsRead, Fetch, LogsRead, AccessRead, Push, Rollback, ProcessesWrite, ConfigRead, ConfigWrite},
		"view": {AppsRead, Fetch, LogsRead, AccessRead},
		"none": {},
	}
	appVerbs := may["own"]
	for user, verbs := range may {
		who := Who{User: user, Via: "test"}
		for _, v := range appVerbs {
			err := f.Allow(ctx, who, v, "hello")
			switch {
			case slices.Contains(verbs, v):
				if err != nil {
					t.Errorf("%s %s: %v", user, v, err)
				}
			case user == "none":
				wantKind(t, err, m3o.NotFound)
			default:
				wantKind(t, err, m3o.Denied)
			}
			// An app one has no role in is as one that is not there.
			other := f.Allow(ctx, who, v, "other")
			wantKind(t, other, m3o.NotFound)
			if other != nil && other.Error() != "no app called other" {
				t.Errorf("%q differs from what the ledger says", other)
			}
		}
		for _, v := range []Verb{UsersRead, UsersWrite, AuditRead, "nonsense", ""} {
			wantKind(t, f.Allow(ctx, who, v, "hello"), m3o.Denied)
		}
		for _, v := range []Verb{KeysRead, KeysWrite, TokensWrite} {
			if err := f.Allow(ctx, who, v, user); err != nil {
				t.Errorf("%s %s of their own: %v", user, v, err)
			}
			wantKind(t, f.Allow(ctx, who, v, "root"), m3o.Denied)
			wantKind(t, f.Allow(ctx, who, v, ""), m3o.Denied)
		}
		for _, v := range []Verb{AppsList, AppsCreate} {
			if err := f.Allow(ctx, who, v, "new"); err != nil {
				t.Errorf("%s %s: %v", user, v, err)
			}
		}
	}
	for v := range policies {
		if err := f.Allow(ctx, root, v, "hello"); err != nil {
			t.Errorf("admin %s: %v", v, err)
		}
		for _, who := range []Who{{}, {User: "nobody"}, {User: "nobody", Admin: true}} {
			wantKind(t, f.Allow(ctx, who, v, "hello"), m3o.Denied)
		}
	}
	// Nobody is an admin by saying so.
	wantKind(t, f.Allow(ctx, Who{User: "view", Admin: true}, AppsDestroy, "hello"), m3o.Denied)

	wantKind(t, f.Grant(ctx, "hello", "nobody", Viewer), m3o.NotFound)
	wantKind(t, f.Grant(ctx, "hello", "view", "king"), m3o.Invalid)
	if err := f.Revoke(ctx, "hello", "view"); err != nil {
		t.Fatal(err)
	}
	wantKind(t, f.Revoke(ctx, "hello", "view"), m3o.NotFound)
	wantKind(t, f.Allow(ctx, Who{User: "view"}, AppsRead, "hello"), m3o.NotFound)
	rules, err := f.Rules(ctx, "hello")
	if err != nil || len(rules) != 2 || rules[0].User != "dep" || rules[1].Role != Owner {
		t.Errorf("Rules = %v, %v", rules, err)
	}
	if err := f.RemoveApp(ctx, "hello"); err != nil {
		t.Fatal(err)
	}
	wantKind(t, f.Allow(ctx, Who{User: "own"}, AppsRead, "hello"), m3o.NotFound)
}

func TestAudit(t *testing.T) {
	f := open(t)
	ctx := t.Context()
	ada := f.user(t, "ada", false)
	if err := f.Grant(ctx, "hello", "ada", Viewer); err != nil {
		t.Fatal(err)
	}
	if err := f.Allow(ctx, ada, AppsRead, "hello"); err != nil { // changes nothing: no line
		t.Fatal(err)
	}
	wantKind(t, f.Allow(ctx, ada, Push, "hello"), m3o.Denied)
	if err := f.Allow(ctx, ada, AppsCreate, "new"); err != nil {
		t.Fatal(err)
	}
	wantKind(t, f.Allow(ctx, ada, Push, strings.Repeat("x", 1<<20)), m3o.NotFound)
	lines, err := f.Audit(ctx, 2)
	if err != nil || len(lines) != 2 || len(lines[0].What) > 300 {
		t.Fatalf("Audit(2) = %d lines, %v", len(lines), err)
	}
	lines, err = f.Audit(ctx, 10)
	if err != nil || len(lines) != 3 {
		t.Fatalf("Audit = %v, %v", lines, err)
	}
	at := f.clock.now()
	if want := (AuditLine{Time: at, User: "ada", Via: "test", Verb: AppsCreate, What: "new", Allowed: true}); lines[1] != want {
		t.Errorf("line is %+v, want %+v", lines[1], want)
	}
	if want := (AuditLine{Time: at, User: "ada", Via: "test", Verb: Push, What: "hello", Allowed: false}); lines[2] != want {
		t.Errorf("line is %+v, want %+v", lines[2], want)
	}
}

func TestWithoutAnAuditLineNothingIsAllowed(t *testing.T) {
	f := open(t)
	root := f.user(t, "root", true)
	if err := f.st.Close(); err != nil {
		t.Fatal(err)
	}
	wantKind(t, f.Allow(t.Context(), root, AppsDestroy, "hello"), m3o.Unavailable)
	if err := f.Allow(t.Context(), root, AppsRead, "hello"); err != nil {
		t.Errorf("reading needs no line: %v", err)
	}
}

func BenchmarkUserByKey(b *testing.B) {
	f := open(b)
	f.user(b, "ada", false)
	s := signer(b)
	f.key(b, "ada", s)
	wire := s.PublicKey().Marshal()
	for b.Loop() {
		if _, _, err := f.UserByKey(b.Context(), wire); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkVerify(b *testing.B) {
	f := open(b)
	f.user(b, "ada", false)
	token, err := f.IssueToken(b.Context(), "ada", time.Hour, "")
	if err != nil {
		b.Fatal(err)
	}
	for b.Loop() {
		if _, err := f.Verify(b.Context(), token); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkAllowAudited(b *testing.B) {
	f := open(b)
	root := f.user(b, "root", true)
	for b.Loop() {
		if err := f.Allow(b.Context(), root, Push, "hello"); err != nil {
			b.Fatal(err)
		}
	}
}
