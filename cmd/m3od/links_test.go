package main

import (
	"bytes"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
)

const dialer = `package main

import (
	"fmt"
	"net"
	"net/http"
	"os"
	"time"
)

func main() {
	ips, err := net.LookupHost(os.Args[1] + ".instances.internal")
	if err != nil {
		fmt.Println("no such host")
		return
	}
	c := &http.Client{Timeout: 5 * time.Second}
	res, err := c.Get("http://" + ips[0] + ":8080/healthz")
	if err != nil {
		fmt.Println(err)
		return
	}
	fmt.Println(res.Status)
}
`

// Two apps of one owner, a link between them, and the numbers of it all.
func TestLinksAndMetrics(t *testing.T) {
	b := theBox(t)
	p := b.user(t, "lena")
	front := p.clone(t, "hello-http", "front")
	if err := os.MkdirAll(filepath.Join(front, "cmd", "ask"), 0o755); err != nil {
		t.Fatal(err)
	}
	// As the release command it is in the image without being a process type.
	for name, text := range map[string]string{"cmd/ask/main.go": dialer, "Procfile": "web: hello-http\nrelease: ask front\n"} {
		if err := os.WriteFile(filepath.Join(front, name), []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	p.commit(t, front, "ask")
	back := p.clone(t, "hello-http", "back")
	for _, dir := range []string{front, back} {
		if out, err := p.push(dir); err != nil {
			t.Fatalf("push: %v\n%s", err, out)
		}
	}
	ask := func() string {
		t.Helper()
		return strings.TrimSpace(p.must(t, front, "m3o", "run", "--", "ask", "back"))
	}
	if got := ask(); got != "no such host" {
		t.Errorf("without a link: %s", got)
	}
	p.must(t, back, "m3o", "links:add", "front")
	if got := ask(); got != "200 OK" {
		t.Errorf("with a link: %s", got)
	}
	if got := p.must(t, front, "m3o", "links"); !regexp.MustCompile(`front\s+back\s+lena`).MatchString(got) {
		t.Errorf("links of front:\n%s", got)
	}
	if out, err := b.user(t, "outsider").try("", "m3o", "links:add", "front", "-a", "back"); err == nil || !strings.Contains(out, "no app called back") {
		t.Errorf("an outsider: %v %s", err, out)
	}
	b.kill()
	if err := b.start(); err != nil {
		t.Fatal(err)
	}
	if got := ask(); got != "200 OK" {
		t.Errorf("after a crash of the daemon: %s", got)
	}
	p.must(t, back, "m3o", "links:remove", "front")
	if got := ask(); got != "no such host" {
		t.Errorf("without the link again: %s", got)
	}

	b.get(t, "back", "/healthz")
	var body []byte
	eventually(t, "the request is counted", func() bool { // it is when it is over for the router, a moment after the answer
		res, err := http.Get("http://" + b.metrics + "/metrics")
		if err != nil {
			t.Fatal(err)
		}
		defer res.Body.Close()
		if body, err = io.ReadAll(res.Body); err != nil {
			t.Fatal(err)
		}
		return bytes.Contains(body, []byte(`m3o_router_requests_total{app="back"`))
	})
	for _, want := range []string{`m3o_build_info\{version="[^"]+"\} 1\n`, `m3o_instance_up\{app="back",process="web",release="v1",instance="back-web-v1-\w+"\} 1\n`,
		`m3o_instance_memory_bytes\{app="back",[^}]*\} \d`, `m3o_instance_cpu_seconds_total\{app="back",[^}]*\} \d+\.\d`, `m3o_instance_restarts_total\{app="back",[^}]*\} 0\n`,
		`m3o_router_requests_total\{app="back",protocol="http",status="200"\} \d`, `m3o_router_request_duration_seconds_bucket\{app="back",le="\+Inf"\} \d`, `m3o_router_up 1\n`} {
		if !regexp.MustCompile(want).Match(body) {
			t.Errorf("the metrics lack %s:\n%s", want, body)
		}
	}
	for line := range strings.Lines(string(body)) {
		if !regexp.MustCompile(`^(# (HELP|TYPE) \S+ .*|[a-z_0-9]+(\{([a-z]+="([^"\\]|\\.)*",?)+\})? [-+0-9.eInfNa]+)\n$`).MatchString(line) {
			t.Errorf("no line of the format: %q", line)
		}
	}
	p.must(t, front, "m3o", "destroy", "--confirm", "front")
	p.must(t, back, "m3o", "destroy", "--confirm", "back")
}
