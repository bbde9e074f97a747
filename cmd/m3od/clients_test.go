package main

import (
	"bufio"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/m3o/m3o/internal/need"
)

// Everything that calls a service calls the same deployed one: grpcurl, curl,
// a page in Chromium with Connect's clients of npm, the page of its docs, the
// TypeScript client that the app hands out and the Go client.
func TestEveryClientCallsADeployedService(t *testing.T) {
	b := theBox(t)
	node := need.Program(t, "node")
	need.Program(t, "chromium")
	clients := filepath.Join(need.RepoRoot(t), "testdata", "clients")
	if _, err := os.Stat(filepath.Join(clients, "node_modules")); err != nil {
		need.Program(t, "testdata/clients (make deps)")
	}
	eve := b.user(t, "clara")
	dir := eve.clone(t, "hello-grpc", "clients")
	eve.must(t, dir, "m3o", "create", "clients")
	if out, err := eve.push(dir); err != nil {
		t.Fatalf("push: %v\n%s\n%s", err, out, b.log.tail(3000))
	}
	ca := filepath.Join(b.data, "ca", "ca.crt")
	base := b.url("clients", "")
	proxy := dialProxy(t, b.https)
	env, err := exec.CommandContext(t.Context(), "go", "env", "GOCACHE").Output()
	if err != nil {
		t.Fatal(err)
	}
	cache := strings.TrimSpace(string(env))
	run := func(t *testing.T, in string, argv ...string) string {
		t.Helper()
		cmd := eve.command(in, argv[0], argv[1:]...)
		cmd.Env = append(cmd.Env, "GOCACHE="+cache, "NODE_EXTRA_CA_CERTS="+ca, "SSL_CERT_FILE="+ca, "HTTPS_PROXY="+proxy)
		out, err := cmd.CombinedOutput()
		if err != nil {
			t.Fatalf("%s: %v\n%s", strings.Join(argv, " "), err, out)
		}
		return string(out)
	}
	t.Run("grpcurl", func(t *testing.T) {
		bin := filepath.Join(need.RepoRoot(t), "bin", "tools", "grpcurl")
		build := exec.CommandContext(t.Context(), "go", "build", "-o", bin, "github.com/fullstorydev/grpcurl/cmd/grpcurl")
		build.Dir = filepath.Join(need.RepoRoot(t), "tools", "conformance")
		build.Env = append(os.Environ(), "CGO_ENABLED=0", "GOFLAGS=")
		if out, err := build.CombinedOutput(); err != nil {
			t.Fatalf("build grpcurl: %v\n%s", err, out)
		}
		got := run(t, dir, bin, "-cacert", ca, "-servername", "clients.localhost", "-authority", "clients.localhost", "-d", `{"name":"Ada","count":2}`, b.https, "helloworld.Greeter/Watch")
		if strings.Count(got, "Hello Ada") != 2 {
			t.Errorf("grpcurl: %s", got)
		}
	})
	t.Run("curl", func(t *testing.T) {
		got := run(t, dir, "curl", "-sS", "--noproxy", "*", "--cacert", ca, "-H", "Content-Type: application/json", "-H", "Connect-Protocol-Version: 1", "-d", `{"name":"Ada"}`, base+"/helloworld.Greeter/Hello")
		if !strings.Contains(got, "Hello Ada") {
			t.Errorf("curl: %s", got)
		}
	})
	t.Run("Chromium", func(t *testing.T) {
		got := run(t, clients, node, "browser.mjs", base)
		const each = " Hello Ada 1 2 3 3\n"
		want := "connect binary" + each + "connect JSON" + each + "grpc-web binary" + each + "grpc-web JSON" + each + `docs {"msg":"Hello docs"}` + "\ndocs 2 messages\n"
		if got != want {
			t.Errorf("got %s\nwant %s", got, want)
		}
	})
	t.Run("TypeScript", func(t *testing.T) {
		dir := t.TempDir()
		src := eve.must(t, dir, "curl", "-sS", "--fail", base+"/-/client.ts")
		for name, text := range map[string]string{
			"client.ts":     src,
			"package.json":  `{"type":"module"}`,
			"tsconfig.json": `{"compilerOptions":{"strict":true,"noUnusedLocals":true,"target":"ES2022","module":"nodenext","moduleResolution":"nodenext","lib":["ES2022","DOM","DOM.AsyncIterable","DOM.Iterable"]}}`,
			// Node.js does not know that *.localhost is this machine.
			"local.mjs": `import dns from "node:dns"; dns.lookup = (h, o, f) => (f ?? o)(null, (o.all ? [{ address: "127.0.0.1", family: 4 }] : "127.0.0.1"), 4);`,
			"main.ts": `import { Greeter } from "./client.js";
const g = new Greeter();
console.log((await g.hello({ name: "Ada" })).msg);
for await (const m of g.watch({ name: "Ada", count: 2 })) console.log(m.number);
`,
		} {
			if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o644); err != nil {
				t.Fatal(err)
			}
		}
		run(t, dir, node, filepath.Join(clients, "node_modules", "typescript", "bin", "tsc"), "-p", ".")
		if got := run(t, dir, node, "--import", "./local.mjs", "main.js"); got != "Hello Ada\n1\n2\n" {
			t.Errorf("TypeScript: %q", got)
		}
	})
	t.Run("Go", func(t *testing.T) {
		dir := t.TempDir()
		main := `package main

import (
	"context"
	"fmt"

	"clients.localhost/client"
)

func main() {
	r, err := (&client.Client{}).Greeter().Hello(context.Background(), &client.Request{Name: "Ada"})
	fmt.Println(r.Msg, err)
}
`
		for name, text := range map[string]string{"go.mod": "module try\n\ngo 1.26\n", "main.go": main} {
			if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o644); err != nil {
				t.Fatal(err)
			}
		}
		env := []string{"env", "GOPROXY=" + base + "/-/go", "GONOSUMDB=clients.localhost", "GOFLAGS=-modcacherw", "GOMODCACHE=" + filepath.Join(dir, "mod"), "GOWORK=off"}
		run(t, dir, append(env, "go", "get", "clients.localhost/client@latest")...)
		if got := run(t, dir, append(env, "go", "run", ".")...); got != "Hello Ada <nil>\n" {
			t.Errorf("Go: %q", got)
		}
	})
}

// dialProxy is an HTTP proxy that takes every CONNECT to addr: the names below
// localhost, which not every program finds.
func dialProxy(t *testing.T, addr string) string {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	wg.Go(func() {
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			wg.Go(func() {
				defer c.Close()
				br := bufio.NewReader(c)
				if _, err := http.ReadRequest(br); err != nil {
					return
				}
				up, err := net.Dial("tcp", addr)
				if err != nil {
					return
				}
				defer up.Close()
				_, _ = io.WriteString(c, "HTTP/1.1 200 OK\r\n\r\n")
				wg.Go(func() { _, _ = io.Copy(up, br); _ = up.(*net.TCPConn).CloseWrite() })
				_, _ = io.Copy(c, up)
			})
		}
	})
	t.Cleanup(func() { _ = ln.Close(); wg.Wait() })
	return "http://" + ln.Addr().String()
}
