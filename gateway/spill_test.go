package gateway

import (
	"bufio"
	"encoding/binary"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"testing"
)

// A client that only reads once it has sent everything used to meet a
// connection that had been reset, and no answer.
func TestTooLargeOverHTTP1IsAnsweredWithoutAReset(t *testing.T) {
	base := front(t, Config{MaxMessage: 1000})
	const size = 900_000
	frame := string(binary.BigEndian.AppendUint32([]byte{0}, size-prefixLen)) + strings.Repeat("x", size-prefixLen)
	for name, c := range map[string]struct {
		path, kind, body string
		chunked          bool
		want             int
	}{
		"JSON":               {"/app/shop.v1.Helloworld/Call", "application/json", strings.Repeat("x", size), false, 413},
		"JSON in chunks":     {"/app/shop.v1.Helloworld/Call", "application/json", strings.Repeat("x", size), true, 413},
		"gRPC-Web":           {"/app/shop.v1.Helloworld/Call", "application/grpc-web+proto", frame, false, 200},
		"gRPC-Web in chunks": {"/app/shop.v1.Helloworld/Chat", "application/grpc-web+proto", frame, true, 200},
		"Connect in chunks":  {"/app/shop.v1.Helloworld/Chat", "application/connect+proto", frame, true, 200},
		"Connect and JSON":   {"/app/shop.v1.Helloworld/Chat", "application/connect+json", frame, true, 200},
	} {
		t.Run(name, func(t *testing.T) {
			nc, err := net.Dial("tcp", strings.TrimPrefix(base, "http://"))
			if err != nil {
				t.Fatal(err)
			}
			defer nc.Close() //nolint:errcheck // a test's
			length, body := fmt.Sprintf("Content-Length: %d", len(c.body)), c.body
			if c.chunked {
				length, body = "Transfer-Encoding: chunked", fmt.Sprintf("%x\r\n%s\r\n0\r\n\r\n", len(c.body), c.body)
			}
			if _, err := fmt.Fprintf(nc, "POST %s HTTP/1.1\r\nHost: helloworld\r\nConnection: close\r\nContent-Type: %s\r\n%s\r\n\r\n%s", c.path, c.kind, length, body); err != nil {
				t.Fatalf("the body was not taken: %v", err)
			}
			br := bufio.NewReader(nc)
			res, err := http.ReadResponse(br, nil)
			if err != nil {
				t.Fatal(err)
			}
			b, err := io.ReadAll(res.Body)
			if err != nil || res.StatusCode != c.want || !strings.Contains(string(b)+fmt.Sprint(res.Trailer), "larger than") {
				t.Errorf("%s %q, %v; want %d", res.Status, b, err, c.want)
			}
			if rest, err := io.ReadAll(br); err != nil || len(rest) > 0 {
				t.Errorf("after the answer: %q, %v; want the connection's end", rest, err)
			}
		})
	}
}
