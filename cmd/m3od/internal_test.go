package main

import (
	"net/http"
	"regexp"
	"strings"
	"testing"
)

// callerApp asks another app at its internal name, by gRPC over one connection
// or by HTTP over a new one, and answers with what it was answered.
const callerApp = `package main

import (
	"context"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"os"
	"strings"
	"sync"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

	helloworld "example.com/hello-grpc/proto"
)

var conns sync.Map

func conn(app string) *grpc.ClientConn {
	if c, ok := conns.Load(app); ok {
		return c.(*grpc.ClientConn)
	}
	c, err := grpc.NewClient(app+".internal:80", grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		log.Fatal(err)
	}
	conns.Store(app, c)
	return c
}

func main() {
	fresh := &http.Client{Transport: &http.Transport{DisableKeepAlives: true}}
	http.HandleFunc("/ask", func(w http.ResponseWriter, r *http.Request) {
		ctx, cancel := context.WithTimeout(r.Context(), 10*time.Second)
		defer cancel()
		app := r.FormValue("app")
		switch r.FormValue("how") {
		case "grpc":
			res, err := helloworld.NewHelloworldClient(conn(app)).Call(ctx, &helloworld.Request{Name: "Ada"})
			if err != nil {
				http.Error(w, err.Error(), http.StatusBadGateway)
				return
			}
			fmt.Fprintln(w, res.GetMsg())
		case "http":
			req, _ := http.NewRequestWithContext(ctx, "POST", "http://"+app+".internal/helloworld.Helloworld/Call", strings.NewReader("{\"name\":\"Ada\"}"))
			req.Header.Set("Content-Type", "application/json")
			req.Header.Set("X-M3o-Caller", "app:somebody-else")
			res, err := fresh.Do(req)
			if err != nil {
				http.Error(w, err.Error(), http.StatusBadGateway)
				return
			}
			defer res.Body.Close()
			b, _ := io.ReadAll(res.Body)
			w.WriteHeader(res.StatusCode)
			w.Write(b)
		case "name":
			ips, err := (&net.Resolver{PreferGo: true}).LookupHost(ctx, app+".instances.internal")
			if err != nil {
				http.Error(w, err.Error(), http.StatusBadGateway)
				return
			}
			fmt.Fprintln(w, len(ips), "addresses")
		}
	})
	log.Fatal(http.ListenAndServe(":"+os.Getenv("PORT"), nil))
}
`

// One app calls another by its internal name: refused until there is a link,
// then balanced, woken, and never failed by a deploy or a crash of the daemon.
func TestAppsCallEachOtherInside(t *testing.T) {
	b := theBox(t)
	p := b.user(t, "ines")
	front, back := p.clone(t, "hello-grpc", "inner-front"), p.clone(t, "hello-grpc", "inner-back")
	put(t, front, "main.go", callerApp)
	p.commit(t, front, "call another app")
	p.edit(t, back, "main.go", `return &helloworld.Response{Msg: greet(r.GetName())}, nil`,
		`md, _ := metadata.FromIncomingContext(ctx)
	return &helloworld.Response{Msg: fmt.Sprint(greet(r.GetName()), " from ", os.Getenv("M3O_INSTANCE"), " for ", md.Get("x-m3o-caller"), md.Get("x-m3o-caller-instance"))}, nil`)
	p.edit(t, back, "main.go", `(caller) Call(_ context.Context`, `(caller) Call(ctx context.Context`)
	p.edit(t, back, "main.go", `"google.golang.org/grpc/health"`, `"google.golang.org/grpc/health"
	"google.golang.org/grpc/metadata"`)
	for _, dir := range []string{front, back} {
		if out, err := p.push(dir); err != nil {
			t.Fatalf("push: %v\n%s", err, out)
		}
	}
	ask := func(how string) (int, string) {
		t.Helper()
		return b.get(t, "inner-front", "/ask?app=inner-back&how="+how)
	}
	refused := func(when string) {
		t.Helper()
		const hint = "m3o links:add inner-front -a inner-back"
		if code, text := ask("http"); code != http.StatusForbidden || !strings.Contains(text, hint) {
			t.Errorf("%s, HTTP: %d %s", when, code, text)
		}
		if _, text := ask("grpc"); !strings.Contains(text, "PermissionDenied") || !strings.Contains(text, hint) {
			t.Errorf("%s, gRPC: %s", when, text)
		}
	}
	answer := regexp.MustCompile(`Hello Ada from (inner-back-web-\S+) for \[app:inner-front\] ?\[inner-front-web-\S+\]`)
	// allowed calls n times each way and returns which instances answered.
	allowed := func(when string, n int) map[string]bool {
		t.Helper()
		by := map[string]bool{}
		for range n {
			for _, how := range []string{"http", "grpc"} {
				code, text := ask(how)
				m := answer.FindStringSubmatch(text)
				if code != http.StatusOK || m == nil {
					t.Fatalf("%s, %s: %d %s", when, how, code, text)
				}
				by[how+" "+m[1]] = true
			}
		}
		return by
	}
	refused("without a link")
	p.must(t, back, "m3o", "links:add", "inner-front")
	allowed("with a link", 1)
	p.must(t, back, "m3o", "ps:scale", "web=2")
	eventually(t, "two instances", func() bool { return p.ready(t, back) == 2 })
	if by := allowed("two instances", 30); len(by) != 4 {
		t.Errorf("30 calls by each protocol reached %v, want both instances by both", by)
	}
	if _, text := ask("name"); text != "2 addresses\n" {
		t.Errorf("the instances' name: %s", text)
	}

	probes := []*probe{startProbe(t, b, "inner-front", "/ask?app=inner-back&how=grpc"), startProbe(t, b, "inner-front", "/ask?app=inner-back&how=http"),
		startProbe(t, b, "inner-front", "/ask?app=inner-back&how=name")}
	p.edit(t, back, "main.go", `greeting = "Hello"`, `greeting = "Hello" // again`)
	if out, err := p.push(back); err != nil {
		t.Fatalf("push: %v\n%s", err, out)
	}
	p.must(t, back, "m3o", "ps:restart")
	twoNames := func() bool { _, text := ask("name"); return text == "2 addresses\n" }
	eventually(t, "the old instances' names are gone", twoNames)
	b.kill()
	allowed("while the daemon is away", 10)
	if !twoNames() {
		t.Error("while the daemon is away the instances' name leads elsewhere")
	}
	if err := b.start(); err != nil {
		t.Fatal(err)
	}
	allowed("after a crash of the daemon", 10)
	if err := b.stop(); err != nil {
		t.Fatal(err)
	}
	if err := b.startAs(t); err != nil { // another version: its router takes over
		t.Fatal(err)
	}
	allowed("after an upgrade", 10)
	for i, pr := range probes {
		n, bad := pr.stop()
		t.Logf("%d of %d failed", bad, n)
		if bad > 0 || n < 100 {
			t.Errorf("probe %d: %d of %d calls failed: %s", i, bad, n, pr.first)
		}
	}

	p.must(t, back, "m3o", "ps:sleep", "--after", "1s")
	for _, how := range []string{"http", "grpc"} {
		eventually(t, "it sleeps", func() bool { return len(b.pids("m3o-shim", "-id inner-back-")) == 0 })
		if code, text := ask(how); code != http.StatusOK || !answer.MatchString(text) {
			t.Errorf("asleep, %s: %d %s", how, code, text)
		}
	}
	p.must(t, back, "m3o", "links:remove", "inner-front")
	refused("without the link again")
	if code, text := b.get(t, "inner-front", "/ask?app=inner-nobody&how=http"); code != http.StatusForbidden {
		t.Errorf("an app that is not there: %d %s", code, text)
	}
	if code, text := b.get(t, "inner-front", "/ask?app=inner-front&how=http"); code == http.StatusForbidden {
		t.Errorf("itself: %d %s", code, text)
	}
	p.must(t, front, "m3o", "destroy", "--confirm", "inner-front")
	p.must(t, back, "m3o", "destroy", "--confirm", "inner-back")
}
