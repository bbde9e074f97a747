package router

import (
	"context"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/m3o/m3o/internal/need"
)

// interopCases are the test cases of grpc-go's published interop client, as
// https://github.com/grpc/grpc/blob/master/doc/interop-test-descriptions.md
// describes them. Left out are those that need Google's own servers or keys
// and test nothing between client and server:
//
//   - compute_engine_creds, compute_engine_channel_credentials and
//     google_default_credentials run only on Google Compute Engine;
//   - service_account_creds, jwt_token_creds, oauth2_auth_token and
//     per_rpc_creds fetch or check tokens of Google's with a key of a service
//     account of theirs;
//   - pick_first_unary asks which server it was, which the Go server never says.
var interopCases = []string{
	"empty_unary", "large_unary", "client_streaming", "server_streaming", "ping_pong", "empty_stream",
	"timeout_on_sleeping_server", "cancel_after_begin", "cancel_after_first_response", "status_code_and_message",
	"special_status_message", "custom_metadata", "unimplemented_method", "unimplemented_service",
	"rpc_soak", "channel_soak", "orca_per_rpc", "orca_oob",
}

// TestInterop runs gRPC's own interop client against its own server, the
// router between them: with TLS, and without.
func TestInterop(t *testing.T) {
	need.Program(t, "go")
	bin, err := filepath.Abs("../bin/tools")
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range []string{"client", "server"} {
		build := exec.CommandContext(t.Context(), "go", "build", "-o", filepath.Join(bin, "grpc-interop-"+p), "google.golang.org/grpc/interop/"+p)
		build.Dir = "../tools/interop"
		build.Env = append(os.Environ(), "CGO_ENABLED=0", "GOFLAGS=")
		if out, err := build.CombinedOutput(); err != nil {
			t.Fatalf("build the interop %s: %v\n%s", p, err, out)
		}
	}
	free := listen(t)
	addr := free.Addr().String()
	_ = free.Close()
	_, port, _ := net.SplitHostPort(addr)
	ctx, cancel := context.WithCancel(context.Background())
	server := exec.CommandContext(ctx, filepath.Join(bin, "grpc-interop-server"), "-port", port)
	if err := server.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { cancel(); _ = server.Wait() })
	wait(t, "the interop server", func() bool {
		c, err := net.Dial("tcp", addr)
		if err == nil {
			_ = c.Close()
		}
		return err == nil
	})
	f := start(t)
	byAddress := appHost("rpc", 1, GRPC, addr)
	byAddress.Name = "127.0.0.1" // without TLS the client has no other name for it
	f.put(t, appHost("rpc", 1, GRPC, addr), byAddress)
	ca := filepath.Join(filepath.Dir(f.state), "ca", "ca.crt")
	for _, way := range []struct {
		name, addr string
		args       []string
	}{
		{"TLS", f.https, []string{"-use_tls", "-use_test_ca", "-ca_file", ca, "-server_host_override", "rpc.localhost"}},
		{"plain", f.http, nil},
	} {
		host, port, err := net.SplitHostPort(way.addr)
		if err != nil {
			t.Fatal(err)
		}
		for _, tc := range interopCases {
			t.Run(way.name+"/"+tc, func(t *testing.T) {
				t.Parallel()
				ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
				defer cancel()
				args := append([]string{"-test_case", tc, "-server_host", host, "-server_port", port,
					"-soak_iterations", "50", "-soak_max_failures", "0", "-soak_min_time_ms_between_rpcs", "1"}, way.args...)
				if strings.HasPrefix(tc, "orca") { // as the description of these cases asks
					args = append(args, "-service_config_json", `{"loadBalancingConfig":[{"test_backend_metrics_load_balancer":{}}]}`)
				}
				out, err := exec.CommandContext(ctx, filepath.Join(bin, "grpc-interop-client"), args...).CombinedOutput()
				if err != nil {
					t.Errorf("%v\n%.1000s", err, out)
				}
			})
		}
	}
}
