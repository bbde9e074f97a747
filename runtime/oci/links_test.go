//go:build linux

package oci_test

import (
	"net/netip"
	"strings"
	"testing"

	"github.com/m3o/m3o/runtime"
)

func TestLinkOpensOneDirectionAndNothingElse(t *testing.T) {
	r := newRig(t)
	d := up(t, r)
	hello := ready(t, d, r.workload("serve"), 1)[0]
	w := r.workload("serve")
	w.App = "other"
	other := ready(t, d, w, 1)[0]
	exec := func(instance string, args ...string) string {
		t.Helper()
		var out strings.Builder
		if code, err := d.Exec(t.Context(), instance, runtime.Cmd{Args: append([]string{"/server"}, args...), Out: &out}); code != 0 || err != nil {
			t.Fatalf("Exec %v = %d, %v", args, code, err)
		}
		return strings.TrimSpace(out.String())
	}
	refresh := resolve(t, d)
	ip := func(addr string) string { return netip.MustParseAddrPort(addr).Addr().String() }
	check := func(when, forth, back, name string) {
		t.Helper()
		refresh()
		if got := exec(other.ID, "dial", hello.Addr); got != hello.Addr+" "+forth {
			t.Errorf("%s, from other to hello: %s, want %s", when, got, forth)
		}
		if got := exec(hello.ID, "dial", other.Addr); got != other.Addr+" "+back {
			t.Errorf("%s, from hello to other: %s, want %s", when, got, back)
		}
		if got := exec(other.ID, "lookup", "hello.instances.internal"); got != "hello.instances.internal "+name {
			t.Errorf("%s, the name: %s, want %s", when, got, name)
		}
	}
	check("without a link", "timeout", "timeout", "no such host")
	if err := d.SetLinks(map[string][]string{"other": {"hello"}}); err != nil {
		t.Fatal(err)
	}
	check("with a link", "open", "timeout", ip(hello.Addr))
	// An instance that comes later, and a one-off, have it too.
	if got := runOnce(t, d, w, "dial", hello.Addr); got != hello.Addr+" open\n" {
		t.Errorf("from a one-off: %s", got)
	}
	preview := w
	preview.App = "pr-7--other" // it may what its app may
	if got := runOnce(t, d, preview, "dial", hello.Addr); got != hello.Addr+" open\n" {
		t.Errorf("from a preview: %s", got)
	}
	third := w
	third.App = "third"
	if got := runOnce(t, d, third, "dial", hello.Addr); got != hello.Addr+" timeout\n" {
		t.Errorf("from a third app: %s", got)
	}
	if err := d.SetLinks(nil); err != nil {
		t.Fatal(err)
	}
	check("without it again", "timeout", "timeout", "no such host")
}
