package build

import "testing"

func TestNewerPatchOfTheSameGoIsFound(t *testing.T) {
	ts := newFakeProxy(t, "go1.26.3", "go1.26.9", "go1.26rc1", "go1.27.1").toolchains(t)
	for version, want := range map[string]string{"go1.26.3": "go1.26.9", "go1.26.9": "", "go1.27.1": "", "go1.25.4": ""} {
		if got := ts.newerPatch(t.Context(), version); got != want {
			t.Errorf("newer than %s is %q, want %q", version, got, want)
		}
	}
	ts.proxy = nil
	if got := ts.newerPatch(t.Context(), "go1.26.3"); got != "" {
		t.Errorf("without a proxy %q is newer", got)
	}
}
