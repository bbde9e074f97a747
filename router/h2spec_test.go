package router

import (
	"fmt"
	"net"
	"net/http"
	"os"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/summerwind/h2spec/config"
	"github.com/summerwind/h2spec/generic"
	"github.com/summerwind/h2spec/hpack"
	"github.com/summerwind/h2spec/http2"
	"github.com/summerwind/h2spec/spec"
)

// h2specFails are the cases net/http's server fails by choice: it answers what
// it could refuse with a stream error.
const h2specFails = 4

func TestH2spec(t *testing.T) {
	addr, _ := backend(t, http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		_, _ = w.Write([]byte(strings.Repeat("x", 2000)))
	}))
	f := start(t)
	f.put(t, Host{Name: "127.0.0.1", App: "one", Release: 1, Endpoints: []string{addr}})
	host, port, err := net.SplitHostPort(f.https)
	if err != nil {
		t.Fatal(err)
	}
	c := &config.Config{Host: host, Path: "/", Timeout: 2 * time.Second, MaxHeaderLen: 4000, TLS: true, Insecure: true}
	if c.Port, err = strconv.Atoi(port); err != nil {
		t.Fatal(err)
	}
	out := os.Stdout // where the suite prints its own report
	if os.Stdout, err = os.Open(os.DevNull); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.Stdout.Close(); os.Stdout = out })
	total, failed := 0, []string(nil)
	var collect func(g *spec.TestGroup)
	collect = func(g *spec.TestGroup) {
		for _, tc := range g.Tests {
			if total++; tc.Result != nil && tc.Result.Failed {
				failed = append(failed, fmt.Sprintf("%s: %s", g.ID(), tc.Desc))
			}
		}
		for _, sub := range g.Groups {
			collect(sub)
		}
	}
	for _, g := range []*spec.TestGroup{generic.Spec(), http2.Spec(), hpack.Spec()} {
		g.Test(c)
		collect(g)
	}
	t.Logf("%d of %d cases pass", total-len(failed), total)
	if total < 145 || len(failed) > h2specFails {
		t.Errorf("%d of %d cases fail, at most %d may:\n%s", len(failed), total, h2specFails, strings.Join(failed, "\n"))
	}
}
