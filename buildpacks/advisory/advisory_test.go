package advisory

import (
	"fmt"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/m3o/m3o"
)

// database writes one as the Go project lays it out.
func database(t *testing.T) string {
	t.Helper()
	dir := t.TempDir()
	for name, text := range map[string]string{
		"index/modules.json": `[
{"path":"golang.org/x/net","vulns":[{"id":"GO-2023-1988","modified":"2024-05-20T16:03:47Z","fixed":"0.13.0"},{"id":"GO-2024-2687","modified":"2024-06-04T19:14:00Z","fixed":"0.23.0"},{"id":"GO-2024-9999","modified":"2024-06-04T19:14:00Z"}]},
{"path":"stdlib","vulns":[{"id":"GO-2026-0001","modified":"2026-06-04T19:14:00Z","fixed":"1.26.9"}]},
{"path":"example.com/elsewhere","vulns":[{"id":"GO-2020-0001","modified":"2024-06-04T19:14:00Z"}]}]`,
		"ID/GO-2024-2687.json": entryOf("golang.org/x/net", `{"introduced":"0"},{"fixed":"0.23.0"}`, ""),
		"ID/GO-2024-9999.json": entryOf("golang.org/x/net", `{"introduced":"0"}`, `"withdrawn":"2024-07-01T00:00:00Z",`),
		"ID/GO-2026-0001.json": entryOf("stdlib", `{"introduced":"0"},{"fixed":"1.25.7"},{"introduced":"1.26.0-0"},{"fixed":"1.26.9"}`, ""),
	} {
		p := filepath.Join(dir, name)
		if err := os.MkdirAll(filepath.Dir(p), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(p, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return dir
}

func entryOf(module, events, more string) string {
	return fmt.Sprintf(`{"schema_version":"1.3.1","id":"x","published":"2024-04-03T21:12:01Z",%s"summary":"it hangs\nand more","affected":[
{"package":{"name":"toolchain","ecosystem":"Go"},"ranges":[{"type":"SEMVER","events":[{"introduced":"0"}]}]},
{"package":{"name":%q,"ecosystem":"Go"},"ranges":[{"type":"SEMVER","events":[%s]}],"ecosystem_specific":{"imports":[{"path":"x","symbols":["F"]}]}}]}`, more, module, events)
}

func TestAdvisoriesOfModules(t *testing.T) {
	dir := database(t)
	srv := httptest.NewServer(http.FileServer(http.Dir(dir)))
	defer srv.Close()
	for _, address := range []string{"file://" + dir, srv.URL, srv.URL + "/"} {
		db, err := Open(address)
		if err != nil {
			t.Fatal(err)
		}
		got, err := db.Affecting(t.Context(), []Module{{"example.com/app", ""}, {"example.com/app", "(devel)"}, {"golang.org/x/net", "v0.20.0"}, {"std", "go1.26.8"}, {"golang.org/x/text", "v0.3.0"}})
		if err != nil {
			t.Fatalf("%s: %v", address, err)
		}
		want := []Advisory{
			{"GO-2024-2687", Module{"golang.org/x/net", "v0.20.0"}, "v0.23.0", "it hangs", time.Date(2024, 4, 3, 21, 12, 1, 0, time.UTC)},
			{"GO-2026-0001", Module{"std", "go1.26.8"}, "go1.26.9", "it hangs", time.Date(2024, 4, 3, 21, 12, 1, 0, time.UTC)},
		}
		if !slices.Equal(got, want) {
			t.Errorf("%s: %+v, want %+v", address, got, want)
		}
		if s := got[0].String(); s != "GO-2024-2687 in golang.org/x/net v0.20.0, fixed in v0.23.0" {
			t.Errorf("it is told as %q", s)
		}
	}
}

func TestVersionsOfTheStandardLibrary(t *testing.T) {
	e, err := parseEntry([]byte(entryOf("stdlib", `{"introduced":"1.26.0-0"},{"fixed":"1.26.9"},{"introduced":"0"},{"fixed":"1.25.7"}`, "")))
	if err != nil {
		t.Fatal(err)
	}
	for version, want := range map[string]string{"go1.25": "v1.25.7", "go1.25.6": "v1.25.7", "go1.25.7": "", "go1.26rc1": "v1.26.9", "go1.26": "v1.26.9", "go1.26.8": "v1.26.9", "go1.26.9": "", "go1.27.1": ""} {
		fixed, yes := e.affects("stdlib", canonical(Module{"std", version}))
		if fixed != want || yes != (want != "") {
			t.Errorf("%s: %v, fixed in %q, want %q", version, yes, fixed, want)
		}
	}
	for _, v := range []string{"devel go1.27", "", "1", "go1.26-custom"} {
		if c := canonical(Module{"std", v}); c != "" {
			t.Errorf("%q is taken for %s", v, c)
		}
	}
}

func TestDatabaseThatCannotBeRead(t *testing.T) {
	mods := []Module{{"golang.org/x/net", "v0.1.0"}}
	down := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { http.Error(w, "no", http.StatusBadGateway) }))
	defer down.Close()
	half := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { _, _ = w.Write([]byte(`[{"path":"golang`)) }))
	defer half.Close()
	climbs := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		_, _ = w.Write([]byte(`[{"path":"golang.org/x/net","vulns":[{"id":"../../etc/passwd"}]}]`))
	}))
	defer climbs.Close()
	for address, want := range map[string]string{down.URL: "502", half.URL: "index/modules.json", climbs.URL: "no id of an advisory", "file:///nonexistent": "no such file"} {
		db, err := Open(address)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := db.Affecting(t.Context(), mods); m3o.KindOf(err) != m3o.Unavailable || !strings.Contains(err.Error(), want) || m3o.HintOf(err) == "" {
			t.Errorf("%s: %v, want unavailable with %q", address, err, want)
		}
	}
	for _, address := range []string{"", "vuln.go.dev", "ftp://x", "file:relative", "https://", "::"} {
		if _, err := Open(address); m3o.KindOf(err) != m3o.Invalid {
			t.Errorf("%q: %v, want invalid", address, err)
		}
	}
}

func TestModulesOfABillOfMaterials(t *testing.T) {
	got, err := Modules([]byte(`{"components":[{"type":"application","name":"/app/x"},{"type":"library","name":"std","version":"go1.26.8"},{"type":"library","name":"a/b","version":"v1.0.0"}]}`))
	if err != nil || !slices.Equal(got, []Module{{"std", "go1.26.8"}, {"a/b", "v1.0.0"}}) {
		t.Errorf("%v, %v", got, err)
	}
	if _, err := Modules([]byte("{")); err == nil {
		t.Error("half a document was read")
	}
}

// Whatever a database says, it is read or refused: nothing of it becomes a
// path outside, and what is mended lies above the version it is mended for.
func FuzzDatabase(f *testing.F) {
	f.Add([]byte(`[{"path":"a/b","vulns":[{"id":"GO-2024-2687","fixed":"0.23.0"}]}]`), []byte(entryOf("a/b", `{"introduced":"0"},{"fixed":"0.23.0"}`, "")), "v0.20.0")
	f.Add([]byte(`[]`), []byte(entryOf("stdlib", `{"introduced":"1.26.0-0"},{"fixed":"1.26.9"}`, "")), "go1.26rc1")
	f.Add([]byte(`[{"path":"a/b","vulns":[{"id":"../x"}]}]`), []byte(`{"affected":null}`), "")
	f.Fuzz(func(t *testing.T, index, text []byte, version string) {
		if idx, err := parseIndex(index); err == nil {
			for _, vs := range idx {
				for _, id := range vs.mayAffect("v1.0.0") {
					if strings.ContainsAny(id, "/\\.\x00") {
						t.Fatalf("the id %q climbs", id)
					}
				}
			}
		}
		e, err := parseEntry(text)
		if err != nil {
			return
		}
		for _, m := range []Module{{"a/b", version}, {"std", version}} {
			v := canonical(m)
			if v == "" {
				continue
			}
			if fixed, yes := e.affects(nameIn(m), v); !yes && fixed != "" {
				t.Fatalf("%s is mended in %s of what it does not have", v, fixed)
			}
		}
	})
}
