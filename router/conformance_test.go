package router_test

import (
	"bufio"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/bufbuild/protocompile"
	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protodesc"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/types/descriptorpb"

	"github.com/m3o/m3o/gateway"
	"github.com/m3o/m3o/internal/need"
	"github.com/m3o/m3o/router"
)

// serverEnv makes this test binary the server under test: the suite starts it
// once for each configuration, says on stdin what it wants and reads on stdout
// where the router is.
const serverEnv = "M3O_TEST_CONFORMANCE_SERVER"

func TestMain(m *testing.M) {
	if dir := os.Getenv(serverEnv); dir != "" {
		if err := conformanceServer(dir); err != nil {
			fmt.Fprintln(os.Stderr, "conformance server:", err)
			os.Exit(1)
		}
		return
	}
	os.Exit(m.Run())
}

// The Connect project's own suite, its clients in front of the router and its
// server behind it: https://github.com/connectrpc/conformance. It covers gRPC,
// gRPC-Web and Connect, protobuf and JSON, over HTTP/1.1 and HTTP/2, plain and
// with TLS.
//
// Left out are HTTP/3, which the suite's server speaks and the router does not
// by default, and client certificates, which the router does not ask for.
func TestConformance(t *testing.T) {
	dir := conformanceTools(t)
	const features = `features:
  versions: [HTTP_VERSION_1, HTTP_VERSION_2]
  protocols: [PROTOCOL_CONNECT, PROTOCOL_GRPC, PROTOCOL_GRPC_WEB]
  codecs: [CODEC_PROTO, CODEC_JSON]
  compressions: [COMPRESSION_IDENTITY, COMPRESSION_GZIP]
  supportsHalfDuplexBidiOverHttp1: true
`
	for _, tc := range []struct {
		name, config string
		args         []string
		want         string
	}{
		{"plain", features + "  supportsTls: false\n", nil, "1990 passed, 0 failed"},
		{"tls", features + "  supportsH2c: false\n", []string{"--run", "**/TLS:true/**"}, "1810 passed, 0 failed"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			ctx, cancel := context.WithTimeout(t.Context(), 4*time.Minute)
			defer cancel()
			config := filepath.Join(t.TempDir(), "config.yaml")
			if err := os.WriteFile(config, []byte(tc.config), 0o600); err != nil {
				t.Fatal(err)
			}
			suite := func(args ...string) (string, error) {
				args = append([]string{"--mode", "server", "--conf", config, "--max-servers", "2", "--parallel", "4"}, args...)
				cmd := exec.CommandContext(ctx, filepath.Join(dir, "connectconformance"), append(args, "--", os.Args[0])...)
				cmd.Env = append(os.Environ(), serverEnv+"="+dir)
				cmd.WaitDelay = 10 * time.Second
				out, err := cmd.CombinedOutput()
				return string(out), err
			}
			out, err := suite(tc.args...)
			if strings.Contains(out, tc.want) {
				return
			}
			// In the cases about deadlines the client's own ends while the answer
			// that tells of the server's is on its way. On a busy machine it may
			// have read half of it: those cases alone may have another try.
			for _, l := range strings.Split(out, "\n") {
				if c, failed := strings.CutPrefix(strings.TrimSpace(l), "FAILED: "); failed && !strings.HasPrefix(c, "Timeouts/") {
					t.Fatalf("%v, want %s\n%s", err, tc.want, tail(out))
				}
			}
			again := "Timeouts/**"
			if tc.args != nil {
				again = "Timeouts/**/TLS:true/**"
			}
			for range 3 {
				if out, err = suite("--run", again); strings.Contains(out, " passed, 0 failed") {
					t.Logf("the deadlines passed at another try")
					return
				}
			}
			t.Errorf("%v, want %s\n%s", err, tc.want, tail(out))
		})
	}
}

func tail(s string) string { return s[max(0, len(s)-8000):] }

// conformanceTools builds the suite, which has a module of its own, and writes
// its schema.
func conformanceTools(t *testing.T) string {
	t.Helper()
	need.Program(t, "go")
	dir, err := filepath.Abs("../bin/tools")
	if err != nil {
		t.Fatal(err)
	}
	const tools = "../tools/conformance"
	build := exec.CommandContext(t.Context(), "go", "build", "-o", dir+"/", "connectrpc.com/conformance/cmd/connectconformance", "connectrpc.com/conformance/cmd/referenceserver")
	build.Dir = tools
	build.Env = append(os.Environ(), "CGO_ENABLED=0", "GOFLAGS=")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("build the conformance suite: %v\n%s", err, out)
	}
	list := exec.CommandContext(t.Context(), "go", "list", "-m", "-f", "{{.Dir}}", "connectrpc.com/conformance")
	list.Dir = tools
	out, err := list.Output()
	if err != nil {
		t.Fatal(err)
	}
	c := protocompile.Compiler{Resolver: protocompile.WithStandardImports(&protocompile.SourceResolver{ImportPaths: []string{filepath.Join(strings.TrimSpace(string(out)), "proto")}})}
	files, err := c.Compile(t.Context(), "connectrpc/conformance/v1/service.proto")
	if err != nil {
		t.Fatal(err)
	}
	writeSchema(t, filepath.Join(dir, "conformance.binpb"), files[0])
	return dir
}

func writeSchema(t *testing.T, file string, fd protoreflect.FileDescriptor) {
	t.Helper()
	fds := &descriptorpb.FileDescriptorSet{}
	seen := map[string]bool{}
	var add func(fd protoreflect.FileDescriptor)
	add = func(fd protoreflect.FileDescriptor) {
		if seen[fd.Path()] {
			return
		}
		seen[fd.Path()] = true
		for i := range fd.Imports().Len() {
			add(fd.Imports().Get(i).FileDescriptor)
		}
		fds.File = append(fds.File, protodesc.ToFileDescriptorProto(fd))
	}
	add(fd)
	b, err := proto.Marshal(fds)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(file, b, 0o600); err != nil {
		t.Fatal(err)
	}
}

// conformanceServer starts the suite's gRPC server and a router before it, and
// runs until it is told to end.
func conformanceServer(dir string) (err error) {
	ctx, cancel := signal.NotifyContext(context.Background(), syscall.SIGTERM, syscall.SIGINT)
	defer cancel()
	in := bufio.NewReader(os.Stdin)
	want, err := readSized(in)
	if err != nil {
		return err
	}
	_, useTLS := fieldOf(want, 4)
	limit, _ := fieldOf(want, 6)
	n, _ := protowire.ConsumeVarint(limit)
	if n == 0 {
		n = 4 << 20
	}
	addr, stop, err := referenceServer(ctx, dir, n)
	if err != nil {
		return err
	}
	defer stop()

	tmp, err := os.MkdirTemp("", "conformance")
	if err != nil {
		return err
	}
	defer os.RemoveAll(tmp) //nolint:errcheck // a test
	front, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return err
	}
	cfg := router.Config{State: filepath.Join(tmp, "table"), Plain: router.PlainServe, Gateway: gateway.New(gateway.Config{MaxMessage: int(n), MaxAnswer: 16 << 20})}
	var pem []byte
	// Looking a name up can take seconds, which gRPC's own client does not wait.
	host := "127.0.0.1"
	if useTLS {
		host = "localhost" // what the CA may sign for
		cfg.HTTPS, cfg.CA = front, filepath.Join(tmp, "ca")
		if err := router.NewCA(cfg.CA, "localhost"); err != nil {
			return err
		}
		if pem, err = os.ReadFile(filepath.Join(cfg.CA, "ca.crt")); err != nil {
			return err
		}
	} else {
		cfg.HTTP = front
	}
	rt, err := router.New(cfg)
	if err != nil {
		return err
	}
	_, err = rt.Put(router.Table{Domain: "test", Hosts: []router.Host{{
		Name: "localhost", App: "conformance", Release: 1, Protocol: router.GRPC, Endpoints: []string{addr}, Descriptors: filepath.Join(dir, "conformance.binpb"),
	}}})
	if err != nil {
		return err
	}
	rt.Alias("127.0.0.1", "localhost")
	done := make(chan error, 1)
	go func() { done <- rt.Run(ctx) }()
	_, port, _ := net.SplitHostPort(front.Addr().String())
	p, _ := strconv.ParseUint(port, 10, 16)
	var answer []byte
	answer = protowire.AppendString(protowire.AppendTag(answer, 1, protowire.BytesType), host)
	answer = protowire.AppendVarint(protowire.AppendTag(answer, 2, protowire.VarintType), p)
	if pem != nil {
		answer = protowire.AppendBytes(protowire.AppendTag(answer, 3, protowire.BytesType), pem)
	}
	if err := writeSized(os.Stdout, answer); err != nil {
		return err
	}
	return <-done
}

// referenceServer is the suite's own server, for gRPC without TLS.
func referenceServer(ctx context.Context, dir string, limit uint64) (addr string, stop func(), err error) {
	cmd := exec.CommandContext(ctx, filepath.Join(dir, "referenceserver"))
	cmd.Cancel = func() error { return cmd.Process.Signal(syscall.SIGTERM) }
	cmd.WaitDelay = 5 * time.Second
	cmd.Stderr = os.Stderr
	in, err := cmd.StdinPipe()
	if err != nil {
		return "", nil, err
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		return "", nil, err
	}
	if err := cmd.Start(); err != nil {
		return "", nil, err
	}
	const grpc, http2 = 2, 2
	var ask []byte
	ask = protowire.AppendVarint(protowire.AppendTag(ask, 1, protowire.VarintType), grpc)
	ask = protowire.AppendVarint(protowire.AppendTag(ask, 2, protowire.VarintType), http2)
	ask = protowire.AppendVarint(protowire.AppendTag(ask, 6, protowire.VarintType), limit)
	if err := writeSized(in, ask); err != nil {
		return "", nil, err
	}
	answer, err := readSized(out)
	if err != nil {
		return "", nil, err
	}
	host, _ := fieldOf(answer, 1)
	port, _ := fieldOf(answer, 2)
	n, _ := protowire.ConsumeVarint(port)
	if len(host) == 0 {
		host = []byte("127.0.0.1")
	}
	return net.JoinHostPort(string(host), strconv.FormatUint(n, 10)), func() { _ = in.Close(); _ = cmd.Cancel(); _ = cmd.Wait() }, nil
}

// fieldOf is a field's bytes in a message, for strings their content.
func fieldOf(msg []byte, want protowire.Number) ([]byte, bool) {
	for len(msg) > 0 {
		num, typ, n := protowire.ConsumeTag(msg)
		if n < 0 {
			return nil, false
		}
		msg = msg[n:]
		n = protowire.ConsumeFieldValue(num, typ, msg)
		if n < 0 {
			return nil, false
		}
		if num == want {
			if typ == protowire.BytesType {
				b, _ := protowire.ConsumeBytes(msg)
				return b, true
			}
			return msg[:n], true
		}
		msg = msg[n:]
	}
	return nil, false
}

func readSized(r io.Reader) ([]byte, error) {
	var n uint32
	if err := binary.Read(r, binary.BigEndian, &n); err != nil {
		return nil, err
	}
	if n > 1<<20 {
		return nil, errors.New("the suite sends too much")
	}
	b := make([]byte, n)
	_, err := io.ReadFull(r, b)
	return b, err
}

func writeSized(w io.Writer, b []byte) error {
	_, err := w.Write(append(binary.BigEndian.AppendUint32(nil, uint32(len(b))), b...))
	return err
}
