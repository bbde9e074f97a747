package router

import (
	"io"
	"net/http"
	"strings"
	"testing"

	testpb "google.golang.org/grpc/interop/grpc_testing"

	"github.com/m3o/m3o/gateway"
)

// endless is a body that never ends.
type endless struct{}

func (endless) Read(p []byte) (int, error) {
	for i := range p {
		p[i] = ' '
	}
	return len(p), nil
}

// What is wrong with a call is told in its own protocol, by the right status
// and the right gRPC code, on every way in.
func TestBadInputHasItsStatusAndCodeInEveryProtocol(t *testing.T) {
	rpc, _ := grpcBackend(t, "v1")
	f := start(t, func(c *Config) { c.Gateway = gateway.New(gateway.Config{MaxMessage: 64 << 10}) })
	host := appHost("rpc", 1, GRPC, rpc)
	host.Descriptors = testSchema(t)
	strict := host
	strict.Name, strict.App, strict.StrictJSON = "strict.localhost", "strict", true
	f.put(t, host, strict)
	const unary, stream = "UnaryCall", "StreamingOutputCall"
	frame := func(s string) string { return "\x00\x00\x00\x00" + string(rune(len(s))) + s }
	huge := "\x00\x40\x00\x00\x00" + "x" // announces a gigabyte
	large := `{"payload":{"body":"` + strings.Repeat("A", 100_000) + `"}}`
	proto := string(message(t, &testpb.SimpleRequest{}))
	for _, tc := range []struct {
		name, method, contentType, body string
		header                          map[string]string
		code                            int
		want                            string
	}{
		{"JSON: broken", unary, "application/json", `{"responseSize":`, nil, 400, `"code":400`},
		{"JSON: wrong type", unary, "application/json", `{"responseSize":"many"}`, nil, 400, "responseSize"},
		{"JSON: bad UTF-8", unary, "application/json", "{\"responseStatus\":{\"message\":\"\xff\"}}", nil, 400, "UTF-8"},
		{"JSON: unknown field", unary, "application/json", `{"nope":1}`, nil, 200, "v1"},
		{"JSON: unknown method", "UnaryCal", "application/json", `{}`, nil, 404, "UnaryCall"},
		{"JSON: unknown service", "../nope.Service/Call", "application/json", `{}`, nil, 404, ""},
		{"JSON: content type", unary, "text/xml", `<a/>`, nil, 415, "text/xml"},
		{"JSON: too large", unary, "application/json", large, nil, 413, "65536"},
		{"JSON: endless", unary, "application/json", "endless", nil, 413, "65536"},
		{"Connect: broken", unary, "application/json", `{"responseSize":`, map[string]string{"Connect-Protocol-Version": "1"}, 400, `"code":"invalid_argument"`},
		{"Connect: wrong type", unary, "application/json", `{"responseSize":"many"}`, map[string]string{"Connect-Protocol-Version": "1"}, 400, `"code":"invalid_argument"`},
		{"Connect: unknown method", "UnaryCal", "application/json", `{}`, map[string]string{"Connect-Protocol-Version": "1"}, 501, `"code":"unimplemented"`},
		{"Connect: codec", unary, "application/xml", `{}`, map[string]string{"Connect-Protocol-Version": "1"}, 415, ""},
		{"Connect: too large", unary, "application/json", large, map[string]string{"Connect-Protocol-Version": "1"}, 429, `"code":"resource_exhausted"`},
		{"Connect: version", unary, "application/json", `{}`, map[string]string{"Connect-Protocol-Version": "9"}, 400, `"code":"invalid_argument"`},
		{"Connect stream: broken", stream, "application/connect+json", frame(`{"responseParameters":`), nil, 200, `"code":"invalid_argument"`},
		{"Connect stream: cut off", stream, "application/connect+json", frame(`{}`)[:6], nil, 200, `"code":"invalid_argument"`},
		{"Connect stream: huge", stream, "application/connect+json", huge, nil, 200, `"code":"resource_exhausted"`},
		{"Connect stream: flags", stream, "application/connect+proto", "\x40\x00\x00\x00\x00", nil, 200, `"code":"invalid_argument"`},
		{"Connect stream: not compressed", stream, "application/connect+json", "\x01\x00\x00\x00\x02{}", nil, 200, `"code":"internal"`},
		{"gRPC-Web: cut off", unary, "application/grpc-web+proto", proto[:3], nil, 200, "grpc-status: 3"},
		{"gRPC-Web: huge", unary, "application/grpc-web+proto", huge, nil, 200, "grpc-status: 8"},
		{"gRPC-Web: no base64", unary, "application/grpc-web-text", "!!!!", nil, 200, "ncnBjLXN0YXR1czogMw"},
		{"gRPC-Web: unknown method", "UnaryCal", "application/grpc-web+proto", proto, nil, 200, "grpc-status: 12"},
		{"strict JSON: unknown field", unary, "application/json", `{"nope":1}`, nil, 400, "nope"},
		{"strict JSON: unknown field within a field", unary, "application/json", `{"payload":{"nope":1}}`, nil, 400, "nope"},
		{"strict JSON: unknown field in a query's message", unary + "?payload=%7B%22nope%22:1%7D", "application/json", `{}`, nil, 400, "nope"},
		{"Connect: unknown field", unary, "application/json", `{"nope":1}`, map[string]string{"Connect-Protocol-Version": "1"}, 200, "v1"},
		{"Connect stream: unknown field", stream, "application/connect+json", frame(`{"nope":1}`), nil, 200, "\x02\x00\x00\x00\x02{}"},
		{"strict Connect: unknown field", unary, "application/json", `{"nope":1}`, map[string]string{"Connect-Protocol-Version": "1"}, 400, `"code":"invalid_argument"`},
		{"strict Connect stream: unknown field", stream, "application/connect+json", frame(`{"nope":1}`), nil, 200, `"code":"invalid_argument"`},
		{"strict gRPC-Web: unknown field", unary, "application/grpc-web+json", frame(`{"nope":1}`), nil, 200, "grpc-status: 3"},
		{"strict Connect: unknown field of the wire", unary, "application/proto", "\xf8\x7f\x01", nil, 200, "v1"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			f.ways(t, func(t *testing.T, c *http.Client, scheme string) {
				app := "rpc"
				if strings.HasPrefix(tc.name, "strict") {
					app = "strict"
				}
				var body io.Reader = strings.NewReader(tc.body)
				if tc.body == "endless" {
					body = endless{}
				}
				req := request1(t, "POST", scheme+"://"+app+".localhost"+testService+tc.method, body)
				req.Header.Set("Content-Type", tc.contentType)
				for k, v := range tc.header {
					req.Header.Set(k, v)
				}
				res, got := do(t, c, req)
				if got = strings.ReplaceAll(got, `": `, `":`); res.StatusCode != tc.code || !strings.Contains(got, tc.want) {
					if got == "" {
						got = res.Trailer.Get("Grpc-Status")
					}
					t.Errorf("%s %.300q, want %d with %q", res.Status, got, tc.code, tc.want)
				}
			})
		})
	}
	wait(t, "nothing in flight", func() bool { return inFlight(t, f, "rpc") == 0 && inFlight(t, f, "strict") == 0 })
}
