package gateway

import (
	"net/http"
	"slices"
	"strings"

	"github.com/m3o/m3o"
)

// allowOrigin lets pages of the sites that the app names call it (CORS). By
// default there are none: a page of the app's own host needs no permission. It
// returns the writer to answer with, nil when r was a preflight that it
// answered. What other sites send without a preflight is served, but their
// pages do not get to read the answer.
func allowOrigin(w http.ResponseWriter, r *http.Request, api *m3o.API) http.ResponseWriter {
	origin := r.Header.Get("Origin")
	preflight := r.Method == http.MethodOptions && r.Header.Get("Access-Control-Request-Method") != ""
	if origin == "" {
		return w
	}
	any := slices.Contains(api.Origins, "*")
	if !any && !slices.ContainsFunc(api.Origins, func(o string) bool { return originMatches(o, origin) }) {
		if !preflight {
			return w
		}
		(&problem{http: http.StatusForbidden, detail: "pages of this site may not call app " + api.App + ": its origin is not in http.cors of m3o.yaml", text: true}).write(w, r, api.App)
		return nil
	}
	c := &corsWriter{ResponseWriter: w, origin: origin, any: any}
	if !preflight {
		return c
	}
	c.allow()
	h := w.Header()
	h.Set("Access-Control-Allow-Methods", "GET, POST, PUT, PATCH, DELETE")
	if v := r.Header.Get("Access-Control-Request-Headers"); v != "" {
		h.Set("Access-Control-Allow-Headers", v)
	}
	h.Set("Access-Control-Max-Age", "7200")
	h.Set("Content-Length", "0")
	w.WriteHeader(http.StatusNoContent)
	return nil
}

// originMatches compares an origin with one of the allow list, which may begin
// its host with "*." for all below it.
func originMatches(allowed, origin string) bool {
	if strings.EqualFold(allowed, origin) {
		return true
	}
	scheme, host, ok := strings.Cut(strings.ToLower(allowed), "://")
	if !ok || !strings.HasPrefix(host, "*.") {
		return false
	}
	gotScheme, gotHost, ok := strings.Cut(strings.ToLower(origin), "://")
	return ok && scheme == gotScheme && strings.HasSuffix(gotHost, host[1:]) && len(gotHost) > len(host)-1
}

// corsWriter adds the permission to whatever head is written in the end.
type corsWriter struct {
	http.ResponseWriter
	origin string
	any    bool
	wrote  bool
}

func (c *corsWriter) allow() {
	h := c.Header()
	if c.any {
		// No credentials: any site could spend its visitors' cookies.
		h.Set("Access-Control-Allow-Origin", "*")
	} else {
		h.Set("Access-Control-Allow-Origin", c.origin)
		h.Set("Access-Control-Allow-Credentials", "true")
	}
	h.Add("Vary", "Origin")
}

// WriteHeader implements http.ResponseWriter.
func (c *corsWriter) WriteHeader(code int) {
	if !c.wrote && code >= http.StatusOK {
		c.wrote = true
		c.allow()
		var names []string
		for k := range c.Header() {
			if !strings.HasPrefix(k, http.TrailerPrefix) && !strings.HasPrefix(k, "Access-Control-") {
				names = append(names, k)
			}
		}
		slices.Sort(names)
		c.Header().Set("Access-Control-Expose-Headers", strings.Join(names, ", "))
	}
	c.ResponseWriter.WriteHeader(code)
}

// Write implements http.ResponseWriter.
func (c *corsWriter) Write(b []byte) (int, error) {
	if !c.wrote {
		c.WriteHeader(http.StatusOK)
	}
	return c.ResponseWriter.Write(b)
}

// Unwrap lets http.ResponseController through.
func (c *corsWriter) Unwrap() http.ResponseWriter { return c.ResponseWriter }
