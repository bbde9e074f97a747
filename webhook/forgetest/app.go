package forgetest

import (
	"crypto"
	"crypto/rsa"
	"crypto/sha256"
	"encoding/base64"
	"encoding/json"
	"net/http"
	"strings"
	"time"
)

// App has the stand-in know a GitHub App by its public key, installed in every
// repository: what it signs gets it a token of an hour.
func (f *Forge) App(key *rsa.PublicKey) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.app = key
}

func (f *Forge) installations(mux *http.ServeMux) {
	claimed := func(code int, answer func() any) http.HandlerFunc {
		return func(w http.ResponseWriter, r *http.Request) {
			f.mu.Lock()
			defer f.mu.Unlock()
			claim, sig, _ := cutLast(strings.TrimPrefix(r.Header.Get("Authorization"), "Bearer "), ".")
			raw, err := base64.RawURLEncoding.DecodeString(sig)
			sum := sha256.Sum256([]byte(claim))
			if err != nil || f.app == nil || rsa.VerifyPKCS1v15(f.app, crypto.SHA256, sum[:], raw) != nil {
				http.Error(w, `{"message":"A JSON web token could not be decoded"}`, http.StatusUnauthorized)
				return
			}
			w.Header().Set("Content-Type", "application/json")
			w.WriteHeader(code)
			_ = json.NewEncoder(w).Encode(answer())
		}
	}
	mux.HandleFunc("GET /api/v3/repos/{owner}/{name}/installation", claimed(200, func() any { return object{"id": 5} }))
	mux.HandleFunc("POST /api/v3/app/installations/5/access_tokens", claimed(201, func() any {
		return object{"token": f.token, "expires_at": time.Now().Add(time.Hour)}
	}))
}

func cutLast(s, sep string) (before, after string, ok bool) {
	i := strings.LastIndex(s, sep)
	if i < 0 {
		return s, "", false
	}
	return s[:i], s[i+len(sep):], true
}
