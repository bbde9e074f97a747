package main

import (
	"bytes"
	"crypto/tls"
	"encoding/json"
	"io"
	"net"
	"net/http"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"testing"

	"github.com/m3o/m3o/router"
)

func TestLogIsOneStreamOfEverySource(t *testing.T) {
	b := theBox(t)
	p := b.user(t, "lara")
	dir := p.clone(t, "hello-http", "logbook")
	if out, err := p.push(dir); err != nil {
		t.Fatalf("push: %v\n%s", err, out)
	}
	read := func(args ...string) string {
		t.Helper()
		return p.must(t, dir, "m3o", append([]string{"logs"}, args...)...)
	}
	b.get(t, "logbook", "/healthz?secret=1")
	eventually(t, "the request's line", func() bool { return strings.Contains(read("-s", "router"), "path=/healthz ") })
	for _, tc := range []struct{ args, want string }{
		{"-s router", `router: method=GET path=/healthz host=logbook\.localhost status=200 took=\S+ bytes=3 protocol=http release=v1 instance=logbook-web-v1-\w+ remote=127\.0\.0\.1 id=\w+\n`},
		{"-s build", `build: -----> Go app detected\n(.*\n)*.*build: .*Released v1 in `},
		{"-s m3o", `m3o: build 1 of \w{7} begins: git push by lara\n(.*\n)*.*m3o: web\.logbook-web-v1-\w+ is ready\n(.*\n)*.*m3o: v1 is live: git push by lara\n`},
		{"-p web", `^\S+ app\[web\.logbook-web-v1-\w+\]: `},
		{"", `(?s)m3o: build 1.*build: -----> Releasing v1.*app\[web.*router: method=GET`},
		{"--since 1h -s m3o", `m3o: v1 is live`},
	} {
		if got := read(strings.Fields(tc.args)...); !regexp.MustCompile(tc.want).MatchString(got) {
			t.Errorf("m3o logs %s lacks %s:\n%s", tc.args, tc.want, got)
		}
	}
	if got := read("-s", "router"); strings.Contains(got, "secret") {
		t.Errorf("a query is in the log:\n%s", got)
	}
	if got := read("--since", "2020-01-01", "--until", "2020-01-02"); got != "" {
		t.Errorf("lines of a day when there were none: %q", got)
	}
	var line struct{ Source, Instance, Release, Text string }
	if err := json.Unmarshal([]byte(read("-n", "1", "-p", "web", "--json")), &line); err != nil || line.Source != "app" || line.Release != "v1" || line.Instance == "" {
		t.Errorf("JSON: %+v, %v", line, err)
	}
	if got := read("-i", line.Instance); !strings.Contains(got, line.Instance) {
		t.Errorf("lines of %s: %q", line.Instance, got)
	}
	if got := read("-n", "2"); strings.Count(got, "\n") != 2 {
		t.Errorf("two lines are %q", got)
	}

	t.Run("follow", func(t *testing.T) {
		cmd := p.command(dir, "m3o", "logs", "-f", "-n", "1")
		out := &lockedBuffer{}
		cmd.Stdout, cmd.Stderr = out, out
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		eventually(t, "the line that was there", func() bool { return strings.Contains(out.String(), "\n") })
		if n := strings.Count(out.String(), "\n"); n != 1 {
			t.Errorf("asked for one line, got %d:\n%s", n, out)
		}
		b.get(t, "logbook", "/followed")
		eventually(t, "the request and what the app logged of it", func() bool {
			return strings.Contains(out.String(), "path=/followed") && strings.Contains(out.String(), "app[web")
		})
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
	})
	t.Run("crash", func(t *testing.T) {
		_, _ = b.client(t).Get(b.url("logbook", "/crash"))
		eventually(t, "the crash is told", func() bool {
			return regexp.MustCompile(`web\.logbook-web-v1-\w+ crashed with code 3\n(.*\n)*.*starts again \(restart 1\)\n(.*\n)*.*is ready`).MatchString(read("-s", "m3o"))
		})
	})
	t.Run("drains", func(t *testing.T) {
		ca, err := router.LoadCA(filepath.Join(b.data, "ca"))
		if err != nil {
			t.Fatal(err)
		}
		leaf, err := ca.Leaf("localhost")
		if err != nil {
			t.Fatal(err)
		}
		conf := &tls.Config{Certificates: []tls.Certificate{*leaf}}
		posts, syslog := &lockedBuffer{}, &lockedBuffer{}
		web, err := tls.Listen("tcp", "127.0.0.1:0", conf)
		if err != nil {
			t.Fatal(err)
		}
		srv := &http.Server{Handler: http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
			body, _ := io.ReadAll(r.Body)
			_, _ = posts.Write([]byte(r.URL.Path + " " + r.Header.Get("Authorization") + " "))
			_, _ = posts.Write(append(body, '\n'))
		})}
		go func() { _ = srv.Serve(web) }()
		t.Cleanup(func() { _ = srv.Close() })
		sys, err := tls.Listen("tcp", "127.0.0.1:0", conf)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = sys.Close() })
		var conns sync.WaitGroup
		t.Cleanup(conns.Wait)
		go func() {
			for {
				c, err := sys.Accept()
				if err != nil {
					return
				}
				conns.Go(func() {
					_, _ = io.Copy(syslog, c)
					_ = c.Close()
				})
			}
		}()
		port := func(l net.Listener) string { _, p, _ := net.SplitHostPort(l.Addr().String()); return p }
		var ids []string
		for _, url := range []string{"https://ada:open@localhost:" + port(web) + "/json", "otlp+https://localhost:" + port(web) + "?token=sesame", "syslog+tls://localhost:" + port(sys)} {
			cmd := p.command(dir, "m3o", "drains:add", "-")
			cmd.Stdin = strings.NewReader(url + "\n")
			var out bytes.Buffer
			cmd.Stdout = &out
			if err := cmd.Run(); err != nil {
				t.Fatalf("drains:add: %v", err)
			}
			ids = append(ids, strings.TrimSpace(out.String()))
		}
		b.get(t, "logbook", "/drained")
		eventually(t, "the line at all three", func() bool {
			return regexp.MustCompile(`/json Basic \S+ .*"text":"method=GET path=/drained `).MatchString(posts.String()) &&
				regexp.MustCompile(`/v1/logs Bearer sesame \{"resourceLogs".*method=GET path=/drained `).MatchString(posts.String()) &&
				regexp.MustCompile(`<14>1 \S+ logbook router router - - method=GET path=/drained `).MatchString(syslog.String())
		})
		list := p.must(t, dir, "m3o", "drains")
		if strings.Contains(list, "open") || strings.Contains(list, "sesame") || strings.Count(list, "\n") != 4 {
			t.Errorf("drains:\n%s", list)
		}
		_ = srv.Close() // one is away: its lines wait, the app goes on
		b.get(t, "logbook", "/while-away")
		eventually(t, "what went wrong is told", func() bool { return regexp.MustCompile(`json.*refused`).MatchString(p.must(t, dir, "m3o", "drains")) })
		for _, id := range ids {
			p.must(t, dir, "m3o", "drains:remove", id)
		}
		if out, err := p.try(dir, "m3o", "drains:add", "http://logs.example.com"); err == nil || !strings.Contains(out, "without TLS") {
			t.Errorf("a drain without TLS: %v %s", err, out)
		}
	})
	p.must(t, dir, "m3o", "destroy", "--confirm", "logbook")
}
