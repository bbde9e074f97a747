package router

import (
	"bytes"
	"encoding/binary"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"google.golang.org/grpc/codes"
	testpb "google.golang.org/grpc/interop/grpc_testing"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protodesc"
	"google.golang.org/protobuf/types/descriptorpb"

	"github.com/m3o/m3o/gateway"
)

const testService = "/grpc.testing.TestService/"

func withGateway(c *Config) { c.Gateway = gateway.New(gateway.Config{}) }

// testSchema is a file with the schema of the interop test service.
func testSchema(t testing.TB) string {
	t.Helper()
	var set descriptorpb.FileDescriptorSet
	fd := testpb.File_grpc_testing_test_proto
	for i := range fd.Imports().Len() {
		set.File = append(set.File, protodesc.ToFileDescriptorProto(fd.Imports().Get(i).FileDescriptor))
	}
	set.File = append(set.File, protodesc.ToFileDescriptorProto(fd))
	b, err := proto.Marshal(&set)
	if err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(t.TempDir(), "schema.binpb")
	if err := os.WriteFile(file, b, 0o600); err != nil {
		t.Fatal(err)
	}
	return file
}

// message is one frame of gRPC, gRPC-Web or Connect.
func message(t testing.TB, m proto.Message) []byte {
	t.Helper()
	b, err := proto.Marshal(m)
	if err != nil {
		t.Fatal(err)
	}
	return append(binary.BigEndian.AppendUint32([]byte{0}, uint32(len(b))), b...)
}

// An app that gives up while the client says nothing used to be noticed only
// when the client sent something.
func TestAppThatResetsAQuietStreamEndsItAtOnce(t *testing.T) {
	addr, _ := backend(t, http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
		_, _ = io.ReadFull(r.Body, make([]byte, 1))
		panic(http.ErrAbortHandler)
	}))
	f := start(t, withGateway)
	host := appHost("rpc", 1, GRPC, addr)
	host.Descriptors = testSchema(t)
	f.put(t, host)
	in := &testpb.StreamingOutputCallRequest{Payload: payload(1)}
	t.Run("gRPC", func(t *testing.T) {
		s, err := f.dial(t, "rpc.localhost").FullDuplexCall(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		if err := s.Send(in); err != nil {
			t.Fatal(err)
		}
		if _, err := s.Recv(); status.Code(err) != codes.Internal {
			t.Errorf("the stream ended with %v", err)
		}
	})
	for _, ct := range []string{"application/grpc-web+proto", "application/connect+proto"} {
		t.Run(ct, func(t *testing.T) {
			f.ways(t, func(t *testing.T, c *http.Client, scheme string) {
				pr, pw := io.Pipe()
				t.Cleanup(func() { _ = pw.Close() })
				go func() { _, _ = pw.Write(message(t, in)) }()
				req := request1(t, "POST", scheme+"://rpc.localhost"+testService+"FullDuplexCall", pr)
				req.Header.Set("Content-Type", ct)
				res, b := do(t, c, req)
				if res.StatusCode != 200 || !strings.Contains(b, "reset the stream") || !bytes.ContainsAny([]byte(b[:1]), "\x02\x80") {
					t.Errorf("%s %q", res.Status, b)
				}
			})
		})
	}
}
