package gateway

import (
	"bytes"
	"compress/gzip"
	"fmt"
	"net"
	"net/http"
	"strconv"
	"strings"
	"time"

	"google.golang.org/grpc/codes"

	"github.com/m3o/m3o"
)

// ownPrefix is where an app's host hands out the app's interface. Only apps
// with gRPC have it: a plain HTTP app keeps the path to itself.
const ownPrefix = "/-/"

// serveOwn answers below ownPrefix.
func (g *Gateway) serveOwn(w http.ResponseWriter, r *http.Request, api *m3o.API) {
	if err := g.own(w, r, api); err != nil {
		problemOf(err).write(w, r, api.App)
	}
}

func (g *Gateway) own(w http.ResponseWriter, r *http.Request, api *m3o.API) error {
	if r.Method != http.MethodGet && r.Method != http.MethodHead {
		return &problem{http: http.StatusMethodNotAllowed, grpc: codes.Unimplemented, detail: r.Method + " does nothing here: use GET"}
	}
	s, err := g.schema(api)
	if err != nil {
		return err
	}
	scheme := r.Header.Get("X-Forwarded-Proto")
	if scheme != "https" {
		scheme = "http"
	}
	host := r.Host
	if h, _, err := net.SplitHostPort(host); err == nil {
		host = h
	}
	v := newView(s, api, scheme+"://"+r.Host, strings.ToLower(host))
	name := strings.TrimPrefix(r.URL.Path, ownPrefix)
	switch name {
	case "", "docs/":
		http.Redirect(w, r, ownPrefix+"docs", http.StatusFound)
	case "docs":
		page, csp := v.docs()
		w.Header().Set("Content-Security-Policy", csp)
		give(w, r, "text/html; charset=utf-8", page)
	case "openapi.json":
		give(w, r, "application/json", v.openAPI())
	case "descriptor.binpb":
		give(w, r, "application/x-protobuf", s.raw)
	case "client.ts":
		give(w, r, "application/typescript; charset=utf-8", v.typeScript())
	case "client.tgz":
		give(w, r, "application/gzip", v.npmPackage())
	default:
		if rest, ok := strings.CutPrefix(name, "go/"); ok {
			return v.goProxy(w, r, rest)
		}
		return &problem{http: http.StatusNotFound, grpc: codes.Unimplemented,
			detail: fmt.Sprintf("%.100q is not here: there is docs, openapi.json, descriptor.binpb, client.ts, client.tgz and go/", r.URL.Path)}
	}
	return nil
}

// give answers with a file, compressed when that pays.
func give(w http.ResponseWriter, r *http.Request, contentType string, body []byte) {
	h := w.Header()
	h.Set("Content-Type", contentType)
	h.Set("X-Content-Type-Options", "nosniff")
	h.Set("Cache-Control", "no-cache") // the next release may differ
	h.Set("Vary", "Accept-Encoding")
	if len(body) >= zipFrom && acceptsGzip(r.Header.Get("Accept-Encoding")) && !strings.HasPrefix(contentType, "application/gzip") && contentType != "application/zip" {
		var buf bytes.Buffer
		z := gzip.NewWriter(&buf)
		_, _ = z.Write(body) // a Buffer takes everything
		_ = z.Close()
		body = buf.Bytes()
		h.Set("Content-Encoding", "gzip")
	}
	h.Set("Content-Length", strconv.Itoa(len(body)))
	if r.Method != http.MethodHead {
		_, _ = w.Write(body) // the client is gone: nobody left to tell
	}
}

// epoch is the time of all that is generated: the same schema makes the same
// bytes.
var epoch = time.Date(2000, 1, 1, 0, 0, 0, 0, time.UTC)
