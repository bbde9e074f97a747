package router

import (
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"

	"github.com/m3o/m3o"
)

// A CLI that asks while the daemon is away must read why, in its own protocol.
func TestConnectClientReadsWhyTheRouterRefuses(t *testing.T) {
	p := problemOf(&m3o.Error{Kind: m3o.Unavailable, Msg: "the daemon is not running", Hint: "apps go on"}, "")
	for _, c := range []struct{ contentType, want string }{
		{"application/proto", `{"code":"unavailable","message":"the daemon is not running (apps go on)"}`},
		{"application/connect+proto", `{"error":{"code":"unavailable","message":"the daemon is not running (apps go on)"}}`},
	} {
		r := httptest.NewRequest(http.MethodPost, "/m3o.v1.Apps/List", strings.NewReader("x"))
		r.Header.Set("Content-Type", c.contentType)
		r.Header.Set("Connect-Protocol-Version", "1")
		w := httptest.NewRecorder()
		p.write(w, r)
		body := w.Body.String()
		wantCode := http.StatusServiceUnavailable
		if strings.HasPrefix(c.contentType, "application/connect+") {
			wantCode = http.StatusOK
			if len(body) < 5 || body[0] != 2 || int(body[4]) != len(body)-5 {
				t.Fatalf("%s: no end-of-stream envelope: %q", c.contentType, body)
			}
			body = body[5:]
		}
		if w.Code != wantCode || body != c.want {
			t.Errorf("%s: %d %q, want %d %q", c.contentType, w.Code, body, wantCode, c.want)
		}
	}
}
