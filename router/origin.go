package router

import (
	"encoding/hex"
	"math/rand/v2"
	"net/http"
	"net/netip"
	"strings"
)

// originOf is where r came from. What the client says of that itself counts
// only when it is a trusted proxy.
func (rt *Router) originOf(r *http.Request) origin {
	ip := r.RemoteAddr
	if i := strings.LastIndexByte(ip, ':'); i >= 0 {
		ip = strings.Trim(ip[:i], "[]")
	}
	o := origin{ip: ip, proto: "http", host: r.Host}
	if r.TLS != nil {
		o.proto = "https"
	}
	if len(rt.cfg.TrustedProxies) > 0 && rt.trusts(ip) {
		o.ip = rt.forwardedFor(r.Header["X-Forwarded-For"], ip)
		if p := r.Header["X-Forwarded-Proto"]; len(p) == 1 && (p[0] == "http" || p[0] == "https") {
			o.proto = p[0]
		}
	}
	var b [24]byte
	// Ids tell requests apart; nothing is guarded by their being secret.
	for i := range 3 {
		v := rand.Uint64()
		for j := range 8 {
			b[i*8+j] = byte(v >> (8 * j))
		}
	}
	var h [48]byte
	hex.Encode(h[:], b[:])
	if id := r.Header["X-Request-Id"]; len(id) == 1 && validID(id[0]) {
		o.id = id[0]
	} else {
		o.id = string(h[:32])
	}
	if tp := r.Header["Traceparent"]; len(tp) == 1 && validTrace(tp[0]) {
		o.trace = tp[0]
	} else {
		o.trace, o.newTrace = "00-"+string(h[:32])+"-"+string(h[32:])+"-00", true
	}
	return o
}

func (rt *Router) trusts(ip string) bool {
	a, err := netip.ParseAddr(ip)
	if err != nil {
		return false
	}
	for _, p := range rt.cfg.TrustedProxies {
		if p.Contains(a.Unmap()) {
			return true
		}
	}
	return false
}

// forwardedFor is the last address in the header that no trusted proxy has:
// all before it could be the client's invention.
func (rt *Router) forwardedFor(vs []string, peer string) string {
	list := strings.Split(strings.Join(vs, ","), ",")
	from := peer
	for i := len(list) - 1; i >= 0; i-- {
		ip := strings.TrimSpace(list[i])
		a, err := netip.ParseAddr(ip)
		if err != nil {
			break
		}
		if from = a.Unmap().String(); !rt.trusts(from) {
			break
		}
	}
	return from
}

// validTrace checks a W3C traceparent, https://www.w3.org/TR/trace-context/:
// version, trace id, parent id and flags. Later versions may be longer.
func validTrace(s string) bool {
	if len(s) < 55 || len(s) > 128 || s[2] != '-' || s[35] != '-' || s[52] != '-' || s[:2] == "ff" || s[:2] == "00" && len(s) != 55 || len(s) > 55 && s[55] != '-' {
		return false
	}
	zero := [2]bool{true, true}
	for i := range 55 {
		switch i {
		case 2, 35, 52:
			continue
		}
		c := s[i]
		if (c < '0' || c > '9') && (c < 'a' || c > 'f') {
			return false
		}
		if c != '0' && i > 2 && i < 35 {
			zero[0] = false
		}
		if c != '0' && i > 35 && i < 52 {
			zero[1] = false
		}
	}
	for i := 55; i < len(s); i++ {
		if s[i] <= ' ' || s[i] > '~' {
			return false
		}
	}
	return !zero[0] && !zero[1]
}

func validID(s string) bool {
	if s == "" || len(s) > 128 {
		return false
	}
	for i := range len(s) {
		if c := s[i]; c <= ' ' || c > '~' {
			return false
		}
	}
	return true
}
