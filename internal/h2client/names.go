package h2client

import (
	"net/http"
	"strings"
	"sync"

	"golang.org/x/net/http/httpguts"
)

var buffers = sync.Pool{New: func() any { b := make([]byte, 32<<10); return &b }}

// A name is one that needs no work to be written the other way.
type name struct {
	lower string
	again bool // its values come again: they are worth a place in the table that both sides keep
}

// known are names by their canonical form, names the other way round.
var known, names = nameTables()

func nameTables() (known map[string]name, names map[string]string) {
	known, names = map[string]name{}, map[string]string{}
	add := func(again bool, list string) {
		for _, n := range strings.Fields(list) {
			l := strings.ToLower(n)
			known[n], names[l] = name{l, again}, n
		}
	}
	add(true, `Accept Accept-Encoding Accept-Language Access-Control-Allow-Origin Cache-Control Content-Encoding Content-Type
		Grpc-Accept-Encoding Grpc-Encoding Grpc-Status Te User-Agent X-Forwarded-Proto X-Forwarded-Host Server Vary Connect-Protocol-Version X-M3o-Caller`)
	add(false, `Age Authorization Content-Length Cookie Date Etag Expires Grpc-Message Grpc-Status-Details-Bin Grpc-Timeout If-Modified-Since
		If-None-Match Last-Modified Location Origin Range Referer Set-Cookie Traceparent Tracestate Trailer X-Api-Key X-Forwarded-For X-Request-Id Idempotency-Key`)
	return known, names
}

// lower is a canonical name as HTTP/2 has it.
func lower(k string) (name string, again bool) {
	if n, ok := known[k]; ok {
		return n.lower, n.again
	}
	return strings.ToLower(k), false
}

// canonical is a name of HTTP/2 as net/http has it; false when it may not be.
func canonical(k string) (string, bool) {
	if n, ok := names[k]; ok {
		return n, true
	}
	for i := range len(k) {
		if c := k[i]; c >= 'A' && c <= 'Z' || !httpguts.IsTokenRune(rune(c)) {
			return "", false
		}
	}
	return http.CanonicalHeaderKey(k), k != ""
}
