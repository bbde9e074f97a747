package main

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"net"
	"os"
	"strings"
	"testing"

	"github.com/m3o/m3o/daemon"
)

func TestDoctorNamesWhatToMend(t *testing.T) {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	var out bytes.Buffer
	args := []string{"doctor", "--json", "--http", ln.Addr().String(), "--https", "127.0.0.1:0", "--bin", t.TempDir(), "--data", t.TempDir(), "--name", boxName}
	if code := run(context.Background(), args, func(string) string { return "" }, &out, &out); code != 1 {
		t.Errorf("exit code %d, want 1", code)
	}
	var found []daemon.Finding
	if err := json.Unmarshal(out.Bytes(), &found); err != nil {
		t.Fatalf("%v: %s", err, &out)
	}
	states := map[string]string{}
	for _, f := range found {
		if f.State != daemon.CheckOK && f.State != daemon.CheckWarn && f.Hint == "" {
			t.Errorf("no hint for %+v", f)
		}
		states[f.Check] += f.State + " " + f.Msg + "\n"
	}
	for check, want := range map[string]string{
		"ports":    fmt.Sprintf("(process %d) listens on %s", os.Getpid(), ln.Addr()),
		"programs": "fail m3o cannot be run",
		"kernel":   "ok Linux ",
		"disk":     "free at",
		"dns":      "ok localhost",
		"clock":    "clock",
	} {
		if !strings.Contains(states[check], want) {
			t.Errorf("%s: %q, want %q", check, states[check], want)
		}
	}
	out.Reset()
	if run(context.Background(), append([]string{"doctor"}, args[2:]...), func(string) string { return "" }, &out, &out) != 1 || !strings.Contains(out.String(), "fail  ports") {
		t.Errorf("for people:\n%s", &out)
	}
}

func TestDoctorOfTheServer(t *testing.T) {
	b := theBox(t)
	admin, err := b.admin()
	if err != nil {
		t.Fatal(err)
	}
	out, _ := admin.try("", "m3o", "doctor") // this host may have something to mend
	for _, want := range []string{"ok    router     the router serves", "ok    builder", "m3o listens on " + b.https} {
		if !strings.Contains(out, want) {
			t.Errorf("it does not say %q:\n%s", want, out)
		}
	}
	if out, err := b.user(t, "nosy").try("", "m3o", "doctor"); err == nil || !strings.Contains(out, "may not server.read") {
		t.Errorf("who is no admin: %v %s", err, out)
	}
}
