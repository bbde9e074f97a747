package main

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
)

// callGRPC makes one native gRPC call of hello-grpc and returns the status and
// its message; a name that the answer does not have is an error.
func callGRPC(c *http.Client, url, name string) (status, message string, err error) {
	msg := append([]byte{1<<3 | 2, byte(len(name))}, name...)
	frame := append(binary.BigEndian.AppendUint32([]byte{0}, uint32(len(msg))), msg...)
	req, err := http.NewRequest(http.MethodPost, url+"/helloworld.Greeter/Hello", bytes.NewReader(frame))
	if err != nil {
		return "", "", err
	}
	req.Header.Set("Content-Type", "application/grpc")
	req.Header.Set("Te", "trailers")
	res, err := c.Do(req)
	if err != nil {
		return "", "", err
	}
	defer res.Body.Close()
	body, err := io.ReadAll(res.Body)
	if err != nil {
		return "", "", err
	}
	h := res.Trailer
	if res.Header.Get("Grpc-Status") != "" { // there was nothing but a status
		h = res.Header
	}
	if h.Get("Grpc-Status") == "0" && !bytes.Contains(body, []byte(name)) {
		err = fmt.Errorf("the answer is %q", body)
	}
	return h.Get("Grpc-Status"), h.Get("Grpc-Message"), err
}

// Calls by gRPC wake an app as requests by HTTP do: those that come first wait
// for the one instance that is started. When it does not start they are told why.
func TestGRPCCallsWakeAnAppOrAreToldWhyNot(t *testing.T) {
	b := theBox(t)
	p := b.user(t, "greta")
	dir := p.clone(t, "hello-grpc", "snorer")
	file := filepath.Join(dir, "main.go")
	src, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	moody := strings.Replace(string(src), "func main() {", "func main() {\n\tif _, err := os.Stat(\"/data/mood\"); err == nil {\n\t\tos.Exit(7)\n\t}", 1)
	if err := os.WriteFile(file, []byte(moody), 0o600); err != nil {
		t.Fatal(err)
	}
	p.commit(t, dir, "moody")
	if out, err := p.push(dir); err != nil {
		t.Fatalf("push: %v\n%s", err, out)
	}
	p.must(t, dir, "m3o", "storage:create", "data")
	p.must(t, dir, "m3o", "storage:mount", "data", "/data")
	p.must(t, dir, "m3o", "ps:sleep", "--after", "1s")
	sleeps := func() bool {
		return strings.Contains(p.must(t, dir, "m3o", "status"), "asleep") && len(b.pids("m3o-shim", "-id snorer-")) == 0
	}
	eventually(t, "it sleeps", sleeps)
	c := b.client(t)
	var all sync.WaitGroup
	for range 10 {
		all.Go(func() {
			if status, message, err := callGRPC(c, b.url("snorer", ""), "Ada"); err != nil || status != "0" {
				t.Errorf("a first call: status %s %q, %v", status, message, err)
			}
		})
	}
	all.Wait()
	if n := len(b.pids("m3o-shim", "-id snorer-")); n != 1 {
		t.Errorf("%d instances were started for 10 calls", n)
	}
	eventually(t, "it sleeps again", sleeps)
	mood := filepath.Join(b.data, "volumes", "snorer", "data", "mood")
	if err := os.WriteFile(mood, nil, 0o644); err != nil {
		t.Fatal(err)
	}
	status, message, err := callGRPC(c, b.url("snorer", ""), "Ada")
	if err != nil || status != "14" || !strings.Contains(message, "web exited with code 7") {
		t.Errorf("the call that cannot wake it: status %s %q, %v, want UNAVAILABLE and why", status, message, err)
	}
	if code, body := b.get(t, "snorer", "/helloworld.Greeter/Hello"); code != http.StatusServiceUnavailable || !strings.Contains(body, "web exited with code 7") {
		t.Errorf("the request that cannot wake it: %d %s, want 503 and why", code, body)
	}
	if err := os.Remove(mood); err != nil {
		t.Fatal(err)
	}
	if status, message, err := callGRPC(c, b.url("snorer", ""), "Ada"); err != nil || status != "0" {
		t.Errorf("once it can: status %s %q, %v", status, message, err)
	}
	p.must(t, dir, "m3o", "destroy", "--confirm", "snorer")
}

// Load brings instances up to the bound and takes them away again, and nobody
// notices.
func TestAutoscaleFollowsRealRequests(t *testing.T) {
	b := theBox(t)
	p := b.user(t, "otto")
	dir := p.clone(t, "hello-http", "springy")
	if out, err := p.push(dir); err != nil {
		t.Fatalf("push: %v\n%s", err, out)
	}
	if out, err := p.try(dir, "m3o", "ps:autoscale", "web", "--min", "3", "--max", "1", "--concurrency", "2"); err == nil {
		t.Errorf("a lower bound above the upper one:\n%s", out)
	}
	p.must(t, dir, "m3o", "ps:autoscale", "web", "--min", "1", "--max", "3", "--concurrency", "2")
	var slow []*probe
	for range 12 { // six times what one instance should have
		slow = append(slow, startProbe(t, b, "springy", "/slow?ms=700"))
	}
	eventually(t, "there are three instances", func() bool { return p.ready(t, dir) == 3 })
	var errs []error
	for _, s := range slow {
		if n, bad := s.stop(); bad > 0 {
			errs = append(errs, fmt.Errorf("%d of %d requests failed: %s", bad, n, s.first))
		}
	}
	steady := startProbe(t, b, "springy", "/")
	eventually(t, "one is left", func() bool { return p.ready(t, dir) == 1 })
	if n, bad := steady.stop(); bad > 0 {
		errs = append(errs, fmt.Errorf("on the way down %d of %d requests failed: %s", bad, n, steady.first))
	}
	if err := errors.Join(errs...); err != nil {
		t.Error(err)
	}
	if out := p.must(t, dir, "m3o", "logs", "-n", "200", "-s", "m3o"); !strings.Contains(out, "autoscale web=") {
		t.Errorf("the log does not tell of it:\n%s", out)
	}
	p.must(t, dir, "m3o", "destroy", "--confirm", "springy")
}

// What an operator does and a new daemon cost no gRPC call either: those are
// POST requests, which the router repeats only when no app has seen them.
func TestScaleRestartAndNewDaemonLoseNoGRPCCall(t *testing.T) {
	b := theBox(t)
	p := b.user(t, "petra")
	dir := p.clone(t, "hello-grpc", "callee")
	if out, err := p.push(dir); err != nil {
		t.Fatalf("push: %v\n%s", err, out)
	}
	c := b.client(t)
	calls := startAsking(t, func() error {
		status, message, err := callGRPC(c, b.url("callee", ""), "Ada")
		if err == nil && status != "0" {
			err = fmt.Errorf("status %s: %s", status, message)
		}
		return err
	})
	for _, step := range []struct {
		what string
		do   func() error
		want int // instances
	}{
		{"scale up", func() error { p.must(t, dir, "m3o", "ps:scale", "web=2"); return nil }, 2},
		{"restart", func() error { p.must(t, dir, "m3o", "ps:restart"); return nil }, 2},
		{"config change", func() error { p.must(t, dir, "m3o", "config:set", "COLOR=blue"); return nil }, 2},
		{"daemon killed and started", func() error { b.kill(); return b.start() }, 2},
		{"scale down", func() error { p.must(t, dir, "m3o", "ps:scale", "web=1"); return nil }, 1},
	} {
		before, _ := calls.failed()
		if err := step.do(); err != nil {
			t.Fatalf("%s: %v", step.what, err)
		}
		eventually(t, step.what+" is done", func() bool { return p.ready(t, dir) == step.want })
		if bad, first := calls.failed(); bad > before {
			t.Errorf("%s: %d calls failed: %s", step.what, bad-before, first)
		}
	}
	n, bad := calls.stop()
	t.Logf("%d of %d calls failed", bad, n)
	p.must(t, dir, "m3o", "destroy", "--confirm", "callee")
}
