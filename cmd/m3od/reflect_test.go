package main

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/base64"
	"encoding/binary"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	reflectpb "google.golang.org/grpc/reflection/grpc_reflection_v1"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/descriptorpb"
)

// A pushed service that registers no reflection has it all the same, and pages
// of the sites that its m3o.yaml names, and of no others, may call it.
func TestServiceWithoutReflectionIsReflectedAndCalledFromNamedSites(t *testing.T) {
	b := theBox(t)
	p := b.user(t, "rita")
	dir := p.clone(t, "hello-grpc", "mute")
	put(t, dir, "m3o.yaml", "http:\n  cors:\n    - https://shop.example\n    - https://*.partner.example\n")
	p.edit(t, dir, "main.go", "\treflection.Register(s)\n", "")
	p.edit(t, dir, "main.go", "\t\"google.golang.org/grpc/reflection\"\n", "")
	p.mustPush(t, dir, []string{"Released v1"})
	t.Run("reflection", func(t *testing.T) { checkReflection(t, b, "mute") })
	t.Run("sites", func(t *testing.T) { checkSites(t, b, "mute") })
	p.must(t, dir, "m3o", "destroy", "--confirm", "mute")
}

// checkReflection lists an app's services and describes a method as grpcurl does.
func checkReflection(t *testing.T, b *box, app string) {
	pem, err := os.ReadFile(filepath.Join(b.data, "ca", "ca.crt"))
	if err != nil {
		t.Fatal(err)
	}
	roots := x509.NewCertPool()
	roots.AppendCertsFromPEM(pem)
	host := app + ".localhost"
	conn, err := grpc.NewClient("passthrough:///"+b.https, grpc.WithAuthority(host),
		grpc.WithTransportCredentials(credentials.NewTLS(&tls.Config{RootCAs: roots, ServerName: host})))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close() //nolint:errcheck // the answers have been read
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	s, err := reflectpb.NewServerReflectionClient(conn).ServerReflectionInfo(ctx)
	if err != nil {
		t.Fatal(err)
	}
	ask := func(req *reflectpb.ServerReflectionRequest) *reflectpb.ServerReflectionResponse {
		t.Helper()
		if err := s.Send(req); err != nil {
			t.Fatal(err)
		}
		res, err := s.Recv()
		if err != nil {
			t.Fatal(err)
		}
		return res
	}
	var names []string
	for _, x := range ask(&reflectpb.ServerReflectionRequest{MessageRequest: &reflectpb.ServerReflectionRequest_ListServices{}}).GetListServicesResponse().GetService() {
		names = append(names, x.GetName())
	}
	if !slices.Contains(names, "helloworld.Greeter") || !slices.Contains(names, "helloworld.Helloworld") {
		t.Errorf("services %v", names)
	}
	res := ask(&reflectpb.ServerReflectionRequest{MessageRequest: &reflectpb.ServerReflectionRequest_FileContainingSymbol{FileContainingSymbol: "helloworld.Greeter.Watch"}})
	found := false
	for _, raw := range res.GetFileDescriptorResponse().GetFileDescriptorProto() {
		var f descriptorpb.FileDescriptorProto
		if err := proto.Unmarshal(raw, &f); err != nil {
			t.Fatal(err)
		}
		for _, svc := range f.GetService() {
			for _, m := range svc.GetMethod() {
				found = found || svc.GetName() == "Greeter" && m.GetName() == "Watch" && m.GetInputType() == ".helloworld.WatchRequest" && m.GetServerStreaming()
			}
		}
	}
	if !found {
		t.Errorf("helloworld.Greeter.Watch is not described: %v", res)
	}
	res = ask(&reflectpb.ServerReflectionRequest{MessageRequest: &reflectpb.ServerReflectionRequest_FileContainingSymbol{FileContainingSymbol: "helloworld.None"}})
	if res.GetErrorResponse().GetErrorCode() != 5 {
		t.Errorf("a symbol that is not there: %v, want NOT_FOUND", res)
	}
	if err := s.CloseSend(); err != nil {
		t.Fatal(err)
	}
}

// checkSites calls an app as pages of several sites do.
func checkSites(t *testing.T, b *box, app string) {
	c := b.client(t)
	send := func(method, origin string, body []byte, head ...string) (*http.Response, string) {
		t.Helper()
		req, err := http.NewRequestWithContext(t.Context(), method, b.url(app, "/helloworld.Greeter/Hello"), bytes.NewReader(body))
		if err != nil {
			t.Fatal(err)
		}
		req.Header.Set("Origin", origin)
		for i := 0; i < len(head); i += 2 {
			req.Header.Set(head[i], head[i+1])
		}
		res, err := c.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		defer res.Body.Close()
		got, err := io.ReadAll(res.Body)
		if err != nil {
			t.Fatal(err)
		}
		return res, string(got)
	}
	msg := []byte("\x0a\x03Ada")
	frame := append(binary.BigEndian.AppendUint32([]byte{0}, uint32(len(msg))), msg...)
	calls := []struct {
		name    string
		body    []byte
		head    []string
		exposes string
	}{
		{"JSON", []byte(`{"name":"Ada"}`), []string{"Content-Type", "application/json"}, "Content-Type"},
		{"Connect", msg, []string{"Content-Type", "application/proto", "Connect-Protocol-Version", "1"}, "Content-Type"},
		{"gRPC-Web", frame, []string{"Content-Type", "application/grpc-web+proto", "X-Grpc-Web", "1"}, "Content-Type"},
		{"gRPC-Web text", []byte(base64.StdEncoding.EncodeToString(frame)), []string{"Content-Type", "application/grpc-web-text+proto", "X-Grpc-Web", "1"}, "Content-Type"},
	}
	for _, origin := range []string{"https://shop.example", "https://eu.partner.example", "https://evil.example", "http://shop.example", "https://partner.example", "https://shop.example.evil.example", "null"} {
		named := origin == "https://shop.example" || origin == "https://eu.partner.example"
		res, body := send("OPTIONS", origin, nil, "Access-Control-Request-Method", "POST", "Access-Control-Request-Headers", "content-type,x-grpc-web")
		allow := res.Header.Get("Access-Control-Allow-Origin")
		switch {
		case named && (res.StatusCode != http.StatusNoContent || allow != origin || !strings.Contains(res.Header.Get("Access-Control-Allow-Methods"), "POST") ||
			res.Header.Get("Access-Control-Allow-Headers") != "content-type,x-grpc-web"):
			t.Errorf("preflight of %s: %d %v", origin, res.StatusCode, res.Header)
		case !named && (res.StatusCode != http.StatusForbidden || allow != "" || !strings.Contains(body, "http.cors")):
			t.Errorf("preflight of %s: %d %v %s", origin, res.StatusCode, res.Header, body)
		}
		for _, call := range calls {
			res, body := send("POST", origin, call.body, call.head...)
			if call.name == "gRPC-Web text" {
				first, _, _ := strings.Cut(body, "=") // each frame is padded by itself
				raw, err := base64.RawStdEncoding.DecodeString(first)
				if err != nil {
					t.Errorf("%s: %v: %q", call.name, err, body)
				}
				body = string(raw)
			}
			if res.StatusCode != http.StatusOK || !strings.Contains(body, "Hello Ada") {
				t.Errorf("%s from %s: %d %q", call.name, origin, res.StatusCode, body)
			}
			allow, exposed := res.Header.Get("Access-Control-Allow-Origin"), res.Header.Get("Access-Control-Expose-Headers")
			if named && (allow != origin || !slices.Contains(res.Header.Values("Vary"), "Origin") || !strings.Contains(exposed, call.exposes)) {
				t.Errorf("%s from %s: allowed %q, exposed %q, Vary %q", call.name, origin, allow, exposed, res.Header.Values("Vary"))
			}
			if !named && allow+exposed != "" {
				t.Errorf("%s from %s: allowed %q, exposed %q", call.name, origin, allow, exposed)
			}
		}
		// A failed call says why in headers alone: a page must be able to read them.
		res, body = send("POST", origin, []byte{0, 0, 0, 0, 9, 1}, "Content-Type", "application/grpc-web+proto")
		status, exposed := res.Header.Get("Grpc-Status"), res.Header.Get("Access-Control-Expose-Headers")
		if status == "" && !strings.Contains(body, "grpc-status: 3") || status != "" && named && (!strings.Contains(exposed, "Grpc-Status") || !strings.Contains(exposed, "Grpc-Message")) {
			t.Errorf("a failed call from %s: status %q, exposed %q, %q", origin, status, exposed, body)
		}
	}
}
