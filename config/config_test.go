package config

import (
	"bytes"
	"context"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/m3o/m3o"
	"github.com/m3o/m3o/store"
)

var key = [32]byte{1, 2, 3}

func openStore(t testing.TB) (*store.Store, string) {
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
	return st, dir
}

func openOn(t testing.TB, st *store.Store) *Config {
	t.Helper()
	c, err := Open(t.Context(), st, key, nil)
	if err != nil {
		t.Fatal(err)
	}
	return c
}

func open(t testing.TB) *Config {
	t.Helper()
	st, _ := openStore(t)
	return openOn(t, st)
}

func plain(pairs ...string) []Var {
	var vars []Var
	for i := 0; i < len(pairs); i += 2 {
		vars = append(vars, Var{Name: pairs[i], Value: m3o.Secret(pairs[i+1])})
	}
	return vars
}

func change(t testing.TB, c *Config, set []Var, unset ...string) Revision {
	t.Helper()
	r, err := c.Change(t.Context(), "hello", "ada", set, unset)
	if err != nil {
		t.Fatal(err)
	}
	return r
}

func wantKind(t testing.TB, err error, want m3o.Kind) {
	t.Helper()
	if err == nil || m3o.KindOf(err) != want {
		t.Errorf("error is %v (%v), want kind %v", err, m3o.KindOf(err), want)
	}
}

func wantEnv(t testing.TB, c *Config, n int, want ...string) {
	t.Helper()
	got, err := c.Env(t.Context(), "hello", n)
	if err != nil || !slices.Equal(got, want) {
		t.Errorf("Env of revision %d = %q, %v, want %q", n, got, err, want)
	}
}

func TestRevisions(t *testing.T) {
	c := open(t)
	ctx := t.Context()
	r, err := c.Current(ctx, "hello")
	if err != nil || r.Number != 0 || r.App != "hello" || len(r.Vars) != 0 {
		t.Errorf("Current of an app without config = %+v, %v", r, err)
	}
	wantEnv(t, c, 0)
	r = change(t, c, plain("B", "2", "A", "x=y"))
	if r.Number != 1 || r.User != "ada" || r.Created.IsZero() || len(r.Vars) != 2 || r.Vars[0].Name != "A" || r.Vars[0].Value.Reveal() != "x=y" {
		t.Errorf("revision 1 is %+v", r)
	}
	// Nothing changes, no revision.
	if r := change(t, c, plain("A", "x=y"), "NOT_THERE"); r.Number != 1 {
		t.Errorf("setting what is set made revision %d", r.Number)
	}
	if r := change(t, c, plain("A", "3"), "B"); r.Number != 2 {
		t.Errorf("revision is %d, want 2", r.Number)
	}
	change(t, c, plain("EMPTY", ""))
	wantEnv(t, c, 1, "A=x=y", "B=2")
	wantEnv(t, c, 2, "A=3")
	wantEnv(t, c, 3, "A=3", "EMPTY=")
	if old, err := c.At(ctx, "hello", 1); err != nil || len(old.Vars) != 2 || old.Number != 1 {
		t.Errorf("At(1) = %+v, %v", old, err)
	}
	for _, n := range []int{4, -1} {
		_, err = c.At(ctx, "hello", n)
		wantKind(t, err, m3o.NotFound)
		_, err = c.Env(ctx, "hello", n)
		wantKind(t, err, m3o.NotFound)
	}
	_, err = c.Current(ctx, "no/app")
	wantKind(t, err, m3o.Invalid)
}

func TestSecretsAreGivenToTheProcessOnly(t *testing.T) {
	c := open(t)
	const secret = "correct horse battery"
	r := change(t, c, []Var{{Name: "PASS", Value: secret, Secret: true}, {Name: "MODE", Value: "fast"}})
	current, err := c.Current(t.Context(), "hello")
	if err != nil {
		t.Fatal(err)
	}
	at, err := c.At(t.Context(), "hello", 1)
	if err != nil {
		t.Fatal(err)
	}
	for _, r := range []Revision{r, current, at} {
		if v := r.Vars[1]; v.Name != "PASS" || !v.Secret || v.Value != "" || r.Vars[0].Value.Reveal() != "fast" {
			t.Errorf("revision shows %q as %q", v.Name, v.Value.Reveal())
		}
	}
	wantEnv(t, c, 1, "MODE=fast", "PASS="+secret)
	// Once secret, always secret, also when set by who does not say so.
	if r := change(t, c, plain("PASS", secret)); r.Number != 1 {
		t.Errorf("the same secret made revision %d", r.Number)
	}
	if r := change(t, c, plain("PASS", "new")); !r.Vars[1].Secret || r.Vars[1].Value != "" {
		t.Errorf("a secret set again is shown: %+v", r.Vars[1])
	}
	// What was plain becomes secret without a new value.
	if r := change(t, c, []Var{{Name: "MODE", Value: "fast", Secret: true}}); r.Number != 3 || !r.Vars[0].Secret || r.Vars[0].Value != "" {
		t.Errorf("made secret: %+v", r)
	}
	wantEnv(t, c, 3, "MODE=fast", "PASS=new")
}

func TestLimitsAndNames(t *testing.T) {
	c := open(t)
	var many []Var
	for i := range MaxVars + 1 {
		many = append(many, Var{Name: fmt.Sprintf("V%d", i)})
	}
	const secret = "must-not-be-shown"
	for name, set := range map[string][]Var{
		"reserved: the platform":  plain("PORT", secret),
		"M3O_APP is reserved":     plain("M3O_APP", secret),
		"not a name":              plain("1A", secret),
		`"" is not a name`:        plain("", secret),
		`"A B" is not a name`:     plain("A B", secret),
		`"A=B" is not a name`:     plain("A=B", secret),
		`"Ä" is not a name`:       plain("Ä", secret),
		"A is set twice":          plain("A", secret, "A", "2"),
		"NUL":                     plain("A", secret+"\x00"),
		"65536 are allowed":       plain("A", strings.Repeat(secret, 5000)),
		"1000 are allowed":        many,
		"A is both set and unset": plain("A", secret),
	} {
		unset := []string{"A"}
		if name != "A is both set and unset" {
			unset = nil
		}
		_, err := c.Change(t.Context(), "hello", "ada", set, unset)
		wantKind(t, err, m3o.Invalid)
		if err == nil || !strings.Contains(err.Error(), name) || strings.Contains(err.Error(), secret) {
			t.Errorf("error is %.200q, want it to say %q and no value", err, name)
		}
	}
	_, err := c.Change(t.Context(), "hello", "ada", plain("1A", "", "PORT", ""), nil)
	if err == nil || !strings.Contains(err.Error(), "1A") || !strings.Contains(err.Error(), "PORT") {
		t.Errorf("%v does not report both faults", err)
	}
	change(t, c, plain("_", strings.Repeat("x", MaxValue), "a1_", "port", "port", "lower case is fine"))
	if r, err := c.Current(t.Context(), "hello"); err != nil || r.Number != 1 {
		t.Errorf("refused changes left revision %d, %v", r.Number, err)
	}
}

func TestTooManyInAll(t *testing.T) {
	c := open(t)
	// The limit counts what there would be, so write the record itself.
	r := record{App: "hello", Number: 1}
	for i := range MaxVars {
		r.Vars = append(r.Vars, ref{Name: fmt.Sprintf("V%04d", i), Sealed: 1, Secret: true})
	}
	if _, err := c.reserve(t.Context(), r); err != nil {
		t.Fatal(err)
	}
	if err := c.move(t.Context(), "hello", 1, 0); err != nil {
		t.Fatal(err)
	}
	_, err := c.Change(t.Context(), "hello", "ada", plain("ONE_MORE", ""), nil)
	wantKind(t, err, m3o.Invalid)
	if r := change(t, c, plain("ONE_MORE", ""), "V0000"); len(r.Vars) != MaxVars {
		t.Errorf("%d variables", len(r.Vars))
	}
}

func TestConcurrentChangesAllHappen(t *testing.T) {
	st, _ := openStore(t)
	// Two of them: also across processes no change is lost without a Conflict.
	both := []*Config{openOn(t, st), openOn(t, st)}
	const n = 12
	var wg sync.WaitGroup
	for i := range n {
		wg.Go(func() {
			for {
				_, err := both[i%2].Change(t.Context(), "hello", "ada", plain(fmt.Sprintf("V%02d", i), fmt.Sprint(i)), nil)
				if m3o.KindOf(err) == m3o.Conflict {
					continue
				}
				if err != nil {
					t.Error(err)
				}
				return
			}
		})
	}
	wg.Wait()
	r, err := both[0].Current(t.Context(), "hello")
	if err != nil || len(r.Vars) != n {
		t.Fatalf("Current has %d variables, %v, want %d", len(r.Vars), err, n)
	}
	for i, v := range r.Vars {
		if v.Value.Reveal() != fmt.Sprint(i) {
			t.Errorf("%s is %s", v.Name, v.Value.Reveal())
		}
	}
}

// What a change left that was cut off before its last step is never seen, and
// does not stand in the way.
func TestChangeCutOffLeavesNothingToSee(t *testing.T) {
	c := open(t)
	change(t, c, plain("A", "1"))
	left := record{App: "hello", Number: 2, Vars: []ref{{Name: "A", Sealed: 2}}}
	if _, err := c.reserve(t.Context(), left); err != nil {
		t.Fatal(err)
	}
	if r, err := c.Current(t.Context(), "hello"); err != nil || r.Number != 1 {
		t.Errorf("Current = %+v, %v", r, err)
	}
	r := change(t, c, plain("A", "2"))
	if r.Number != 3 {
		t.Errorf("revision is %d, want 3", r.Number)
	}
	wantEnv(t, c, 3, "A=2")
}

func TestRemoveApp(t *testing.T) {
	c := open(t)
	ctx := t.Context()
	change(t, c, plain("A", "1"))
	if _, err := c.Change(ctx, "hello-2", "ada", plain("A", "other"), nil); err != nil {
		t.Fatal(err)
	}
	for range 2 { // again is no error
		if err := c.RemoveApp(ctx, "hello"); err != nil {
			t.Fatal(err)
		}
	}
	if r, err := c.Current(ctx, "hello"); err != nil || r.Number != 0 {
		t.Errorf("Current = %+v, %v", r, err)
	}
	_, err := c.Env(ctx, "hello", 1)
	wantKind(t, err, m3o.NotFound)
	if env, err := c.Env(ctx, "hello-2", 1); err != nil || !slices.Equal(env, []string{"A=other"}) {
		t.Errorf("the other app has %v, %v", env, err)
	}
	if r := change(t, c, plain("B", "1")); r.Number != 1 || len(r.Vars) != 1 {
		t.Errorf("the new app begins with %+v", r)
	}
}

func TestMovedRecordsDoNotOpen(t *testing.T) {
	c := open(t)
	ctx := t.Context()
	change(t, c, []Var{{Name: "A", Value: "a", Secret: true}, {Name: "B", Value: "b"}})
	change(t, c, []Var{{Name: "A", Value: "a2", Secret: true}})
	if _, err := c.Change(ctx, "other", "eve", []Var{{Name: "A", Value: "e", Secret: true}}, nil); err != nil {
		t.Fatal(err)
	}
	get := func(key string) sealed {
		t.Helper()
		box, _, err := c.vals.Get(ctx, key)
		if err != nil {
			t.Fatal(err)
		}
		return box
	}
	home := valKey("hello", 1, "A")
	right := get(home)
	cut := sealed{1, right.Box[:5]}
	for name, box := range map[string]sealed{
		"other app": get(valKey("other", 1, "A")), "other revision": get(valKey("hello", 2, "A")), "other name": get(valKey("hello", 1, "B")),
		"cut": cut, "empty": {}, "other format": {2, right.Box},
	} {
		if _, err := c.vals.Put(ctx, home, box); err != nil {
			t.Fatal(err)
		}
		if env, err := c.Env(ctx, "hello", 1); err == nil {
			t.Errorf("a value of %s opens: %q", name, env)
		}
	}
	if _, err := c.vals.Put(ctx, home, right); err != nil {
		t.Fatal(err)
	}
	wantEnv(t, c, 1, "A=a", "B=b")
	// A secret does not become readable by calling it none.
	r, rev, err := c.revs.Get(ctx, revKey("hello", 1))
	if err != nil {
		t.Fatal(err)
	}
	r.Vars[0].Secret = false
	if _, err := c.revs.Update(ctx, revKey("hello", 1), r, rev); err != nil {
		t.Fatal(err)
	}
	if r, err := c.At(ctx, "hello", 1); err == nil {
		t.Errorf("shows %q", r.Vars[0].Value.Reveal())
	}
}

func TestWrongKeyIsFoundAtTheStart(t *testing.T) {
	st, _ := openStore(t)
	openOn(t, st)
	for _, k := range [][32]byte{{9}, {}} {
		if _, err := Open(t.Context(), st, k, nil); err == nil {
			t.Errorf("opens with key %v", k)
		}
	}
	openOn(t, st)
}

func TestNoValueIsInTheStoreInTheClear(t *testing.T) {
	st, dir := openStore(t)
	var logged bytes.Buffer
	c, err := Open(t.Context(), st, key, slog.New(slog.NewTextHandler(&logged, &slog.HandlerOptions{Level: slog.LevelDebug})))
	if err != nil {
		t.Fatal(err)
	}
	const secret, open = "s3cr3t-needle-1", "plain-needle-2"
	change(t, c, []Var{{Name: "FINDABLE_NAME", Value: secret, Secret: true}, {Name: "OTHER", Value: open}})
	change(t, c, plain("THIRD", secret+open))
	wantEnv(t, c, 2, "FINDABLE_NAME="+secret, "OTHER="+open, "THIRD="+secret+open)
	found := false
	err = filepath.WalkDir(dir, func(path string, d os.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		data, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		found = found || bytes.Contains(data, []byte("FINDABLE_NAME"))
		for _, enc := range needles(secret, open) {
			if bytes.Contains(data, enc) {
				t.Errorf("%q is in %s", enc, path)
			}
		}
		return nil
	})
	// The search works: it finds what is not sealed.
	if err != nil || !found {
		t.Errorf("search: %v, name found: %v", err, found)
	}
	if s := logged.String(); strings.Contains(s, "needle") || !strings.Contains(s, "config changed") {
		t.Errorf("log is %q", s)
	}
}

// needles is the values as they might stand in JSON: as text, and in base64 at
// each of the three offsets a text can have in it.
func needles(values ...string) [][]byte {
	var all [][]byte
	for _, v := range values {
		all = append(all, []byte(v))
		for shift := range 3 {
			whole := v[shift : shift+(len(v)-shift)/3*3]
			all = append(all, []byte(base64.StdEncoding.EncodeToString([]byte(whole))))
		}
	}
	return all
}

func TestRecordOfANewerVersionOpens(t *testing.T) {
	st, _ := openStore(t)
	c := openOn(t, st)
	change(t, c, plain("A", "1"))
	newer, err := store.NewBucket[map[string]any](t.Context(), st, "config-revisions")
	if err != nil {
		t.Fatal(err)
	}
	r, rev, err := newer.Get(t.Context(), revKey("hello", 1))
	if err != nil {
		t.Fatal(err)
	}
	r["Comment"] = "added later"
	if _, err := newer.Update(t.Context(), revKey("hello", 1), r, rev); err != nil {
		t.Fatal(err)
	}
	got, err := c.Current(t.Context(), "hello")
	if d := cmp.Diff("1", got.Vars[0].Value.Reveal()); err != nil || d != "" {
		t.Errorf("%v %s", err, d)
	}
}

func FuzzChange(f *testing.F) {
	c := open(f)
	f.Add("NAME", "value", false)
	f.Add("PORT", "", true)
	f.Add("A\x00", "\x00", false)
	f.Add("M3O_X", "ü\xff", true)
	f.Fuzz(func(t *testing.T, name, value string, secret bool) {
		r, err := c.Change(t.Context(), "hello", "ada", []Var{{name, m3o.Secret(value), secret}}, nil)
		if err != nil {
			wantKind(t, err, m3o.Invalid)
			return
		}
		env, err := c.Env(t.Context(), "hello", r.Number)
		if err != nil || !slices.Contains(env, name+"="+value) {
			t.Errorf("%q=%q is not in the environment: %v", name, value, err)
		}
		if _, err := c.Change(t.Context(), "hello", "ada", nil, []string{name}); err != nil {
			t.Error(err)
		}
	})
}

func BenchmarkChange(b *testing.B) {
	c := open(b)
	i := 0
	for b.Loop() {
		i++
		change(b, c, plain("A", fmt.Sprint(i)))
	}
}

func BenchmarkEnv20(b *testing.B) {
	c := open(b)
	var vars []Var
	for i := range 20 {
		vars = append(vars, Var{Name: fmt.Sprint("V", i), Value: "value"})
	}
	change(b, c, vars)
	for b.Loop() {
		if _, err := c.Env(b.Context(), "hello", 1); err != nil {
			b.Fatal(err)
		}
	}
}

func TestSealedOpensOnlyWhereItBelongs(t *testing.T) {
	c := open(t)
	data, err := json.Marshal(c.Seal("whsec_x", "notifier hello/1"))
	if err != nil || strings.Contains(string(data), "whsec") {
		t.Fatalf("sealed is %s, %v", data, err)
	}
	var box Sealed
	if err := json.Unmarshal(data, &box); err != nil {
		t.Fatal(err)
	}
	if got, err := c.Unseal(box, "notifier hello/1"); err != nil || got.Reveal() != "whsec_x" {
		t.Errorf("Unseal = %q, %v", got.Reveal(), err)
	}
	if _, err := c.Unseal(box, "notifier hello/2"); err == nil {
		t.Error("a moved box opens")
	}
}
