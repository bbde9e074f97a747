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

// h2specFails are the cases net/http's server fails by choice, and why.
var h2specFails = map[string]string{
	`Sends a large size HEADERS frame that exceeds the SETTINGS_MAX_FRAME_SIZE`:                    "the suite sends 20 KB, but the server allows frames of 1 MB",
	`Sends multiple values of SETTINGS_INITIAL_WINDOW_SIZE`:                                        "the server ends connections that set one setting twice in one frame",
	`Sends a HEADERS frame that contains the connection-specific header field`:                     "the server answers 400 instead of resetting the stream",
	`Sends a HEADERS frame that contains the TE header field with any value other than "trailers"`: "as above",
}

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
	total, left, failed := 0, 0, []string(nil)
	var collect func(g *spec.TestGroup)
	collect = func(g *spec.TestGroup) {
		for _, tc := range g.Tests {
			if total++; tc.Result != nil && tc.Result.Failed {
				if _, known := h2specFails[tc.Desc]; known {
					left++
				} else {
					failed = append(failed, fmt.Sprintf("%s: %s: %v", g.ID(), tc.Desc, tc.Result.Error))
				}
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
	t.Logf("%d of %d cases pass, %d are left out by name", total-left-len(failed), total, left)
	if total < 145 || len(failed) > 0 {
		t.Errorf("of %d cases fail:\n%s", total, strings.Join(failed, "\n"))
	}
}
