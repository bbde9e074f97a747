package auth

import (
	"crypto/ed25519"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"encoding/base64"
	"slices"
	"strings"
	"testing"
	"time"
	"unicode"

	"golang.org/x/crypto/ssh"

	"github.com/m3o/m3o"
)

const host = "api.example.test"

// attempt is one login, each part of which a test may spoil.
type attempt struct {
	host, format     string
	nonce, wire, sig []byte
}

func (f fixture) attempt(t testing.TB, s ssh.Signer, signedHost string) attempt {
	t.Helper()
	nonce, err := f.Challenge(t.Context(), ssh.FingerprintSHA256(s.PublicKey()))
	if err != nil {
		t.Fatal(err)
	}
	algo := s.PublicKey().Type()
	if algo == ssh.KeyAlgoRSA {
		algo = ssh.KeyAlgoRSASHA512
	}
	sig, err := s.(ssh.AlgorithmSigner).SignWithAlgorithm(rand.Reader, LoginPayload(signedHost, nonce), algo)
	if err != nil {
		t.Fatal(err)
	}
	return attempt{host, sig.Format, nonce, s.PublicKey().Marshal(), sig.Blob}
}

func (f fixture) try(t testing.TB, a attempt) (m3o.Secret, error) {
	t.Helper()
	token, user, expires, err := f.Login(t.Context(), a.host, a.nonce, a.wire, a.format, a.sig)
	if err != nil {
		if token != "" || user != "" || m3o.KindOf(err) != m3o.Denied || err.Error() != "login refused" {
			t.Errorf("refusal is %q, %q, %v (%v), want always the same", token.Reveal(), user, err, m3o.KindOf(err))
		}
		return "", err
	}
	if who, err := f.Verify(t.Context(), token); err != nil || who.User != user || !expires.Equal(f.clock.now().Add(loginTTL)) {
		t.Errorf("token of %s until %v: %+v, %v", user, expires, who, err)
	}
	return token, nil
}

func TestLogin(t *testing.T) {
	f := open(t)
	f.user(t, "ada", false)
	s := signer(t)
	f.key(t, "ada", s)
	if _, err := f.try(t, f.attempt(t, s, host)); err != nil {
		t.Fatal(err)
	}
	priv, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	rs, err := ssh.NewSignerFromKey(priv)
	if err != nil {
		t.Fatal(err)
	}
	f.key(t, "ada", rs)
	if _, err := f.try(t, f.attempt(t, rs, host)); err != nil {
		t.Errorf("RSA: %v", err)
	}
	// SHA-1 signatures are refused though the library would verify them.
	a := f.attempt(t, rs, host)
	sha1, err := rs.(ssh.AlgorithmSigner).SignWithAlgorithm(rand.Reader, LoginPayload(host, a.nonce), ssh.KeyAlgoRSA)
	if err != nil {
		t.Fatal(err)
	}
	a.format, a.sig = sha1.Format, sha1.Blob
	if _, err := f.try(t, a); err == nil {
		t.Error("an RSA signature over SHA-1 logs in")
	}
}

func TestLoginWithSecurityKey(t *testing.T) {
	f := open(t)
	f.user(t, "ada", false)
	pub, priv, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	// As PROTOCOL.u2f of OpenSSH has it.
	wire := ssh.Marshal(struct {
		Type string
		Key  []byte
		App  string
	}{ssh.KeyAlgoSKED25519, pub, "ssh:"})
	k, err := f.AddKey(t.Context(), "ada", ssh.KeyAlgoSKED25519+" "+base64.StdEncoding.EncodeToString(wire))
	if err != nil {
		t.Fatal(err)
	}
	nonce, err := f.Challenge(t.Context(), k.Fingerprint)
	if err != nil {
		t.Fatal(err)
	}
	app, data := sha256.Sum256([]byte("ssh:")), sha256.Sum256(LoginPayload(host, nonce))
	rest := []byte{1, 0, 0, 0, 7} // user present; counter
	sig := ed25519.Sign(priv, slices.Concat(app[:], rest, data[:]))
	if _, err := f.try(t, attempt{host, ssh.KeyAlgoSKED25519, nonce, wire, append(sig, rest...)}); err != nil {
		t.Errorf("%v: %v", err, err.(*m3o.Error).Err)
	}
}

func TestLoginIsRefused(t *testing.T) {
	f := open(t)
	f.user(t, "ada", false)
	s, other, stranger := signer(t), signer(t), signer(t)
	f.key(t, "ada", s)
	f.key(t, "ada", other)
	for name, spoil := range map[string]func(*testing.T) attempt{
		"wrong host": func(t *testing.T) attempt { return f.attempt(t, s, "api.evil.test") },
		"wrong host asked": func(t *testing.T) attempt {
			a := f.attempt(t, s, host)
			a.host = "api.evil.test"
			return a
		},
		"unknown key": func(t *testing.T) attempt { return f.attempt(t, stranger, host) },
		"nonce of another key": func(t *testing.T) attempt {
			a, b := f.attempt(t, s, host), f.attempt(t, other, host)
			a.nonce = b.nonce
			return a
		},
		"key of another nonce": func(t *testing.T) attempt {
			a := f.attempt(t, s, host)
			a.wire = other.PublicKey().Marshal()
			return a
		},
		"changed nonce": func(t *testing.T) attempt {
			a := f.attempt(t, s, host)
			a.nonce[23]++ // its expiry
			return a
		},
		"changed signature": func(t *testing.T) attempt {
			a := f.attempt(t, s, host)
			a.sig[0]++
			return a
		},
		"wrong format": func(t *testing.T) attempt {
			a := f.attempt(t, s, host)
			a.format = ssh.KeyAlgoRSASHA256
			return a
		},
		"expired nonce": func(t *testing.T) attempt {
			a := f.attempt(t, s, host)
			f.clock.pass(nonceTTL)
			return a
		},
		"nonce of another server": func(t *testing.T) attempt {
			g := open(t)
			g.clock.at = f.clock.now()
			return g.attempt(t, s, host)
		},
		"replayed nonce": func(t *testing.T) attempt {
			a := f.attempt(t, s, host)
			if _, err := f.try(t, a); err != nil {
				t.Fatal(err)
			}
			return a
		},
		"removed key": func(t *testing.T) attempt {
			gone := signer(t)
			k := f.key(t, "ada", gone)
			a := f.attempt(t, gone, host)
			if err := f.RemoveKey(t.Context(), k.Fingerprint); err != nil {
				t.Fatal(err)
			}
			return a
		},
		"nothing": func(*testing.T) attempt { return attempt{} },
	} {
		t.Run(name, func(t *testing.T) {
			if _, err := f.try(t, spoil(t)); err == nil {
				t.Error("logs in")
			}
		})
	}
}

func TestOneNonceOneLogin(t *testing.T) {
	f := open(t)
	f.user(t, "ada", false)
	s := signer(t)
	f.key(t, "ada", s)
	a := f.attempt(t, s, host)
	won := make(chan bool, 8)
	for range cap(won) {
		go func() {
			_, _, _, err := f.Login(t.Context(), a.host, a.nonce, a.wire, a.format, a.sig)
			won <- err == nil
		}()
	}
	n := 0
	for range cap(won) {
		if <-won {
			n++
		}
	}
	if n != 1 {
		t.Errorf("%d logins with one nonce", n)
	}
	// What is remembered of it ends with it.
	f.clock.pass(nonceTTL)
	if _, err := f.try(t, f.attempt(t, s, host)); err != nil {
		t.Fatal(err)
	}
	if len(f.spent) != 1 {
		t.Errorf("%d spent nonces are remembered, want 1", len(f.spent))
	}
}

func TestBadKeyLines(t *testing.T) {
	small, err := rsa.GenerateKey(rand.Reader, 1024)
	if err != nil {
		t.Fatal(err)
	}
	ss, err := ssh.NewSignerFromKey(small)
	if err != nil {
		t.Fatal(err)
	}
	good := strings.TrimSpace(line(signer(t)))
	_, blob, _ := strings.Cut(good, " ")
	for l, says := range map[string]string{
		"":                          "no key",
		"  \n ":                     "no key",
		"hello":                     "not an SSH public key",
		"ssh-ed25519":               "not an SSH public key",
		"ssh-ed25519 AAAA":          "not an SSH public key",
		"ssh-rsa " + blob:           "not an SSH public key",
		"# " + good:                 "not an SSH public key",
		good + "\n" + good:          "more than one line",
		"restrict " + good:          "options",
		`command="rm" ` + good:      "options",
		line(ss):                    "2048",
		"ssh-dss AAAAB3NzaC1kc3M=":  "DSA",
		strings.Repeat("a", 1<<20):  "too long",
		"PuTTY-User-Key-File-3: x":  "private key",
		"-----BEGIN PRIVATE KEY---": "private key",
		"-----BEGIN OPENSSH PRIVATE KEY-----\nb3BlbnNzaC1rZXk=\n-----END OPENSSH PRIVATE KEY-----\n": "private key",
	} {
		_, err := parseKey(l)
		wantKind(t, err, m3o.Invalid)
		if err == nil || !strings.Contains(err.Error(), says) || m3o.HintOf(err) == "" {
			t.Errorf("%.60q: %v, hint %q, want it to say %q", l, err, m3o.HintOf(err), says)
		}
	}
}

func FuzzAddKey(f *testing.F) {
	good := strings.TrimSpace(line(signer(f)))
	for _, s := range []string{good, good + " a comment", "restrict " + good, "ssh-rsa AAAA", "", "-----BEGIN PRIVATE KEY-----",
		"ssh-ed25519-cert-v01@openssh.com AAAAIHNzaC1lZDI1NTE5LWNlcnQtdjAxQG9wZW5zc2guY29t x", "\x00 \xff", good + "\n" + good} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, l string) {
		k, err := parseKey(l)
		if err != nil {
			wantKind(t, err, m3o.Invalid)
			return
		}
		if !slices.Contains(keyTypes, k.Type) || k.Name == "" || strings.IndexFunc(k.Name, func(r rune) bool { return !unicode.IsPrint(r) }) >= 0 {
			t.Errorf("%q gives %+v", l, k)
		}
		again, err := parseKey(k.Type + " " + base64.StdEncoding.EncodeToString(k.Wire))
		if err != nil || again.Fingerprint != k.Fingerprint {
			t.Errorf("%q gives a key that does not parse again: %+v, %v", l, again, err)
		}
	})
}

func FuzzLogin(f *testing.F) {
	a := open(f)
	a.user(f, "ada", true)
	s := signer(f)
	a.key(f, "ada", s)
	right := a.attempt(f, s, host)
	// The right one, but for another host.
	f.Add("api.evil.test", right.nonce, right.wire, right.format, right.sig)
	f.Add(host, right.nonce, right.wire, "sk-ssh-ed25519@openssh.com", right.sig)
	f.Add(host, right.nonce[:24], right.wire, right.format, []byte{})
	f.Add("", []byte{}, []byte{}, "", []byte{})
	f.Add(host, right.nonce, []byte("\x00\x00\x00\x07ssh-rsa"), "rsa-sha2-256", []byte{1})
	rightHost := host
	f.Fuzz(func(t *testing.T, host string, nonce, wire []byte, format string, sig []byte) {
		if host == rightHost && string(nonce) == string(right.nonce) && string(sig) == string(right.sig) {
			return // the fuzzer put the true one together
		}
		token, user, expires, err := a.Login(t.Context(), host, nonce, wire, format, sig)
		if err == nil || token != "" || user != "" || expires != (time.Time{}) {
			t.Errorf("forged login as %q: %v", user, err)
		}
	})
}
