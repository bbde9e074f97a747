package daemon

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func TestPushTellsKnownFaultsOfModulesIfAsked(t *testing.T) {
	s := newShop(t)
	db := t.TempDir()
	s.d.cfg.GoVulnDB = "file://" + db
	write := func(name, text string) {
		t.Helper()
		if err := os.MkdirAll(filepath.Dir(name), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(name, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	write(filepath.Join(db, "index/modules.json"), `[{"path":"example.com/dep","vulns":[{"id":"GO-2020-0001","fixed":"1.4.0"}]}]`)
	write(filepath.Join(db, "ID/GO-2020-0001.json"), `{"summary":"It stumbles","published":"2020-01-01T00:00:00Z","affected":[{"package":{"name":"example.com/dep","ecosystem":"Go"},`+
		`"ranges":[{"type":"SEMVER","events":[{"introduced":"0"},{"fixed":"1.4.0"}]}]}]}`)
	sbom := func(version string) {
		s.b.mu.Lock()
		defer s.b.mu.Unlock()
		s.b.sbom = `{"components":[{"type":"library","name":"example.com/dep","version":"` + version + `"}]}`
	}
	sbom("v1.3.0")
	s.push("first", "refs/heads/main")
	s.connect(nil)
	builds := 1
	said := func() string {
		t.Helper()
		b, err := os.ReadFile(s.d.buildLog("app", builds))
		if err != nil {
			t.Fatal(err)
		}
		return string(b)
	}
	if out := said(); strings.Contains(out, "GO-2020") {
		t.Errorf("told without being asked:\n%s", out)
	}
	for _, c := range []struct{ version, db, want string }{
		{"v1.3.0", "file://" + db, "GO-2020-0001 in example.com/dep v1.3.0, fixed in v1.4.0: It stumbles"},
		{"v1.4.0", "file://" + db, "No known faults in modules (1 looked at)"},
		{"v1.4.1", "file://" + db + "/none", "cannot be read"},
		{"v1.4.2", "off", "m3od --go-vuln-db"},
	} {
		s.d.cfg.GoVulnDB = c.db
		sbom(c.version)
		write(filepath.Join(s.dir, "m3o.yaml"), "build:\n  advisories: true\n")
		after, e := s.main(c.version)
		s.tell(e)
		s.idle()
		builds++
		if out := said(); !strings.Contains(out, c.want) || !strings.Contains(out, "Released") {
			t.Errorf("%s (%s): want %q in\n%s", c.version, after, c.want, out)
		}
	}
}
