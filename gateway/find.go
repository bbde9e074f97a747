package gateway

import (
	"net/http"
	"strings"

	"github.com/m3o/m3o"
)

// FindMethod says which method ServeApp, or with byPath ServePath, would call
// for r: "/package.Service/Method", or "" for none. Rules about methods then
// hold on every path that leads to one. path is what ServePath is given, and
// the path of the request otherwise.
func (g *Gateway) FindMethod(r *http.Request, api *m3o.API, path string, byPath bool) string {
	s, err := g.schema(api)
	if err != nil {
		return ""
	}
	if byPath {
		m, err := s.resolve(api.App, path)
		if err != nil {
			return ""
		}
		return m.path
	}
	if m := s.methods[path]; m != nil {
		return m.path
	}
	_, framed := dialectOf(r.Header.Get("Content-Type"))
	if !framed && !isConnectUnary(r) && !strings.HasPrefix(path, ownPrefix) {
		if b, _, err := s.route(r.Method, r.URL.EscapedPath()); err == nil && b != nil {
			return b.m.path
		}
	}
	m, err := s.byPath(api.App, path)
	if err != nil {
		return ""
	}
	return m.path
}
