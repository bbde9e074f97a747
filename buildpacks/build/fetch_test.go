package build

import (
	"errors"
	"fmt"
	"testing"

	"github.com/m3o/m3o/internal/need"
)

// The real thing: a release from the module proxy, checked against the
// checksum database, on a machine without Go.
func TestRealToolchainComesThroughTheProxy(t *testing.T) {
	need.Registry(t)
	ts, err := openToolchains(t.Context(), t.TempDir(), testConfig(t, ""))
	if err != nil {
		t.Fatal(err)
	}
	ts.hostGo, ts.hostVer = "", ""
	var said []string
	tc, err := ts.get(t.Context(), "go1.26", func(f string, a ...any) { said = append(said, fmt.Sprintf(f, a...)) })
	if err != nil {
		t.Fatalf("%v (%v)", err, errors.Unwrap(err))
	}
	if tc.Layer.Size < 100e6 || len(said) != 1 {
		t.Errorf("toolchain %+v, said %q", tc, said)
	}
}
