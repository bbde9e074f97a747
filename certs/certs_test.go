package certs

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"errors"
	"io/fs"
	"log/slog"
	"math/big"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/libdns/libdns"

	"github.com/m3o/m3o"
	"github.com/m3o/m3o/store"
)

func testConfig(t *testing.T) Config {
	t.Helper()
	st, err := store.Open(t.Context(), store.Config{Dir: t.TempDir(), Log: slog.New(slog.DiscardHandler)})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := st.Close(); err != nil {
			t.Error(err)
		}
	})
	return Config{Store: st, Log: slog.New(slog.DiscardHandler),
		Seal: func(v m3o.Secret, where string) ([]byte, error) {
			return []byte("box:" + where + ":" + v.Reveal()), nil
		},
		Unseal: func(box []byte, where string) (m3o.Secret, error) {
			return m3o.Secret(strings.TrimPrefix(string(box), "box:"+where+":")), nil
		}}
}

func TestStorage(t *testing.T) {
	ctx := t.Context()
	s, err := openStorage(ctx, testConfig(t))
	if err != nil {
		t.Fatal(err)
	}
	for _, k := range []string{"acme/ca/sites/a.test/a.test.crt", "acme/ca/sites/a.test/a.test.key", "acme/ca/sites/wildcard_.a.test/x.crt", "acme/other"} {
		if err := s.Store(ctx, k, []byte("value of "+k)); err != nil {
			t.Fatal(err)
		}
	}
	if b, err := s.Load(ctx, "acme/other"); err != nil || string(b) != "value of acme/other" {
		t.Errorf("Load = %q, %v", b, err)
	}
	if raw, _, err := s.blobs.Get(ctx, "acme/other"); err != nil || !strings.HasPrefix(string(raw.Box), "box:certificate acme/other:") {
		t.Errorf("at rest it is %q, %v, not sealed for its key", raw.Box, err)
	}
	if _, err := s.Load(ctx, "nothing"); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("Load of nothing: %v", err)
	}
	for dir, want := range map[string][]string{"acme": {"acme/ca", "acme/other"}, "acme/ca/sites": {"acme/ca/sites/a.test", "acme/ca/sites/wildcard_.a.test"}} {
		if got, err := s.List(ctx, dir, false); err != nil || !slices.Equal(got, want) {
			t.Errorf("List(%s) = %v, %v, want %v", dir, got, err, want)
		}
	}
	if got, err := s.List(ctx, "acme/ca", true); err != nil || len(got) != 3 {
		t.Errorf("recursive List = %v, %v", got, err)
	}
	if i, err := s.Stat(ctx, "acme/ca"); err != nil || i.IsTerminal || !s.Exists(ctx, "acme/ca") {
		t.Errorf("Stat of a directory = %+v, %v", i, err)
	}
	if i, err := s.Stat(ctx, "acme/other"); err != nil || !i.IsTerminal || i.Size != int64(len("value of acme/other")) {
		t.Errorf("Stat = %+v, %v", i, err)
	}
	if err := s.Delete(ctx, "acme/ca/sites/a.test"); err != nil || s.Exists(ctx, "acme/ca/sites/a.test/a.test.key") || !s.Exists(ctx, "acme/other") {
		t.Errorf("Delete of a directory: %v", err)
	}
	if err := s.Delete(ctx, "never"); err != nil {
		t.Errorf("Delete of nothing: %v", err)
	}
}

func TestTwoDaemonsTakeTurns(t *testing.T) {
	ctx := t.Context()
	cfg := testConfig(t)
	one, err := openStorage(ctx, cfg)
	if err != nil {
		t.Fatal(err)
	}
	two, err := openStorage(ctx, cfg)
	if err != nil {
		t.Fatal(err)
	}
	if err := one.Lock(ctx, "issue a.test"); err != nil {
		t.Fatal(err)
	}
	if _, err := two.take(ctx, "issue a.test"); m3o.KindOf(err) != m3o.Conflict {
		t.Errorf("the second took a lock that is held: %v", err)
	}
	late, cancel := context.WithCancel(ctx)
	cancel()
	if err := two.Lock(late, "issue a.test"); !errors.Is(err, context.Canceled) {
		t.Errorf("waiting for a lock outlives its context: %v", err)
	}
	if err := one.Unlock(ctx, "issue a.test"); err != nil {
		t.Fatal(err)
	}
	if err := two.Lock(ctx, "issue a.test"); err != nil {
		t.Fatal(err)
	}
	// A daemon that died holds it no longer than it said.
	if _, err := two.locks.Put(ctx, "dead", lock{Owner: "dead", Expires: time.Now().Add(-time.Second)}); err != nil {
		t.Fatal(err)
	}
	if _, err := one.take(ctx, "dead"); err != nil {
		t.Errorf("the lock of a daemon that died: %v", err)
	}
	if err := two.Unlock(ctx, "issue a.test"); err != nil {
		t.Fatal(err)
	}
}

func pair(t *testing.T, end time.Time, names ...string) (chain []byte, key m3o.Secret) {
	t.Helper()
	k, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	tmpl := &x509.Certificate{SerialNumber: big.NewInt(1), DNSNames: names, NotBefore: end.Add(-48 * time.Hour), NotAfter: end}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, tmpl, k.Public(), k)
	if err != nil {
		t.Fatal(err)
	}
	kb, err := x509.MarshalPKCS8PrivateKey(k)
	if err != nil {
		t.Fatal(err)
	}
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}), m3o.Secret(pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: kb}))
}

func TestPair(t *testing.T) {
	future := time.Now().Add(24 * time.Hour)
	chain, key := pair(t, future, "a.test", "*.a.test")
	_, other := pair(t, future, "a.test")
	old, oldKey := pair(t, time.Now().Add(-time.Hour), "a.test")
	nameless, namelessKey := pair(t, future)
	if leaf, err := Pair(chain, key); err != nil || !slices.Equal(leaf.DNSNames, []string{"a.test", "*.a.test"}) {
		t.Errorf("Pair = %v, %v", leaf, err)
	}
	for what, tc := range map[string]struct {
		chain []byte
		key   m3o.Secret
	}{
		"another key": {chain, other}, "ended": {old, oldKey}, "no names": {nameless, namelessKey}, "nothing": {nil, key}, "no key": {chain, ""},
		"swapped": {[]byte(key.Reveal()), m3o.Secret(chain)}, "garbage": {[]byte("-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"), key},
	} {
		_, err := Pair(tc.chain, tc.key)
		if m3o.KindOf(err) != m3o.Invalid {
			t.Errorf("%s: %v", what, err)
		}
		if err != nil && strings.Contains(err.Error(), "BEGIN") {
			t.Errorf("%s: the error quotes its input: %v", what, err)
		}
	}
}

func FuzzPair(f *testing.F) {
	f.Add([]byte("-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"), "-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n")
	f.Fuzz(func(t *testing.T, chain []byte, key string) {
		if _, err := Pair(chain, m3o.Secret(key)); err != nil && m3o.KindOf(err) != m3o.Invalid {
			t.Errorf("%v is %v", err, m3o.KindOf(err))
		}
	})
}

func TestCloudflare(t *testing.T) {
	records := map[string]cfRecord{}
	srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		reply := func(v any) { _ = json.NewEncoder(w).Encode(map[string]any{"success": true, "result": v}) }
		switch id := strings.TrimPrefix(r.URL.Path, "/zones/z1/dns_records"); {
		case r.Header.Get("Authorization") != "Bearer tok":
			w.WriteHeader(http.StatusForbidden)
			_, _ = w.Write([]byte(`{"success":false,"errors":[{"code":10000,"message":"Authentication error"}]}`))
		case r.URL.Path == "/zones":
			if r.URL.Query().Get("name") != "a.test" {
				reply([]any{})
				return
			}
			reply([]any{map[string]string{"id": "z1"}})
		case r.Method == http.MethodPost:
			var rec cfRecord
			_ = json.NewDecoder(r.Body).Decode(&rec)
			rec.ID = rec.Content
			records[rec.ID] = rec
			reply(rec)
		case r.Method == http.MethodDelete:
			delete(records, strings.TrimPrefix(id, "/"))
			reply(nil)
		default:
			var out []cfRecord
			for _, rec := range records {
				if rec.Name == r.URL.Query().Get("name") {
					out = append(out, rec)
				}
			}
			reply(out)
		}
	}))
	t.Cleanup(srv.Close)
	file := filepath.Join(t.TempDir(), "dns.yaml")
	if err := os.WriteFile(file, []byte("provider: cloudflare\ntoken: tok\napi: "+srv.URL+"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	p, err := OpenDNS(file)
	if err != nil {
		t.Fatal(err)
	}
	txt := func(v string) []libdns.Record {
		return []libdns.Record{libdns.TXT{Name: "_acme-challenge.x", Text: v}}
	}
	if _, err := p.AppendRecords(t.Context(), "a.test.", append(txt("one"), txt("two")...)); err != nil {
		t.Fatal(err)
	}
	if r := records["one"]; len(records) != 2 || r.Name != "_acme-challenge.x.a.test" || r.Type != "TXT" {
		t.Errorf("records %+v", records)
	}
	if _, err := p.DeleteRecords(t.Context(), "a.test.", txt("one")); err != nil || len(records) != 1 {
		t.Errorf("after deleting one: %+v, %v", records, err)
	}
	if _, err := p.AppendRecords(t.Context(), "b.test.", txt("x")); m3o.HintOf(err) == "" {
		t.Errorf("a zone the token does not see: %v", err)
	}
	bad := cloudflare{srv.URL, "secret-token"}
	if _, err := bad.AppendRecords(t.Context(), "a.test.", txt("x")); err == nil || !strings.Contains(err.Error(), "Authentication error") || strings.Contains(err.Error(), "secret-token") {
		t.Errorf("a bad token: %v", err)
	}
}

func TestDNSProgram(t *testing.T) {
	dir := t.TempDir()
	out := filepath.Join(dir, "out")
	hook := filepath.Join(dir, "hook")
	if err := os.WriteFile(hook, []byte("#!/bin/sh\n[ \"$3\" != bad ] || { echo refused; exit 1; }\necho \"$@\" >> "+out+"\n"), 0o700); err != nil {
		t.Fatal(err)
	}
	p := program{hook}
	rec := []libdns.Record{libdns.TXT{Name: "_acme-challenge", Text: "v"}}
	if _, err := p.AppendRecords(t.Context(), "a.test.", rec); err != nil {
		t.Fatal(err)
	}
	if _, err := p.DeleteRecords(t.Context(), "a.test.", rec); err != nil {
		t.Fatal(err)
	}
	if b, err := os.ReadFile(out); err != nil || string(b) != "set _acme-challenge.a.test v\ndelete _acme-challenge.a.test v\n" {
		t.Errorf("the program was called with %q, %v", b, err)
	}
	if _, err := p.AppendRecords(t.Context(), "a.test.", []libdns.Record{libdns.TXT{Name: "x", Text: "bad"}}); err == nil || !strings.Contains(err.Error(), "refused") {
		t.Errorf("a program that fails: %v", err)
	}
}

func TestOpenDNSRefusesWhatItDoesNotKnow(t *testing.T) {
	for _, c := range []string{"", "provider: nobody", "provider: cloudflare", "provider: rfc2136", "provider: rfc2136\nserver: a:53\nkey: k", "provider: exec",
		"provider: cloudflare\ntoken: s3cret\nx: y", "token: [s3cret"} {
		f := filepath.Join(t.TempDir(), "dns.yaml")
		if err := os.WriteFile(f, []byte(c), 0o600); err != nil {
			t.Fatal(err)
		}
		_, err := OpenDNS(f)
		if m3o.KindOf(err) != m3o.Invalid || strings.Contains(err.Error(), "s3cret") {
			t.Errorf("%q: %v", c, err)
		}
	}
}
