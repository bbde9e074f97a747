package store

import (
	"strings"
	"testing"
)

func TestEncodeKey(t *testing.T) {
	for key, want := range map[string]string{
		"hello":     "hello",
		"hello/3":   "hello.3",
		"a/":        "a.=",
		"/":         "=.=",
		"a.b*>":     "a=2Eb=2A=3E",
		"=":         "=3D",
		"ü":         "=C3=BC",
		"a b":       "a=20b",
		"x\x00":     "x=00",
		"//Ab_-9//": "=.=.Ab_-9.=.=",
	} {
		got, err := encodeKey(key)
		if err != nil || got != want {
			t.Errorf("encodeKey(%q) = %q, %v, want %q", key, got, err, want)
		}
	}
}

func TestDecodeKeyRefusesWhatWeDidNotWrite(t *testing.T) {
	for _, s := range []string{"", ".", "a..b", "a.", "=4", "=4g", "=41", "=ff", "=FF", "a=2f"} {
		if key, err := decodeKey(s); err == nil {
			t.Errorf("decodeKey(%q) = %q, want an error", s, key)
		}
	}
}

func FuzzKey(f *testing.F) {
	for _, s := range []string{"hello/1", "a.=", "=2E", "", "/", "ü", "\xff", "=.=", "a/b/*/>"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		if enc, err := encodeKey(s); err == nil {
			if strings.ContainsAny(enc, " */>\t\r\n") || strings.HasPrefix(enc, ".") || strings.HasSuffix(enc, ".") || strings.Contains(enc, "..") {
				t.Errorf("encodeKey(%q) = %q, which NATS does not take", s, enc)
			}
			if back, err := decodeKey(enc); err != nil || back != s {
				t.Errorf("%q came back as %q, %v", s, back, err)
			}
		}
		if key, err := decodeKey(s); err == nil {
			if enc, err := encodeKey(key); len(s) <= maxKey && (err != nil || enc != s) {
				t.Errorf("decodeKey(%q) = %q, which encodes as %q, %v", s, key, enc, err)
			}
		}
	})
}
