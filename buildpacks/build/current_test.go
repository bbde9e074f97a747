package build

import (
	"context"
	"errors"
	"net/http"
	"strings"
	"testing"
)

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

// While a toolchain is fetched, builds that need one that is here go on, and
// who waits for the same one can be stopped.
func TestFetchOfAToolchainHoldsNobodyElseUp(t *testing.T) {
	p := newFakeProxy(t, "go1.98.1", "go1.98.2")
	ts := p.toolchains(t)
	said := func(string, ...any) {}
	if _, err := ts.exactly(t.Context(), "go1.98.1", said); err != nil {
		t.Fatal(err)
	}
	asked, answer := make(chan struct{}), make(chan struct{})
	serve := p.Config.Handler
	p.Config.Handler = http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if strings.HasSuffix(r.URL.Path, ".zip") {
			close(asked)
			<-answer
		}
		serve.ServeHTTP(w, r)
	})
	b := &Builder{toolchains: ts}
	fetched := make(chan error, 1)
	go func() { fetched <- b.Fetch(t.Context(), "go1.98.2", said) }()
	<-asked
	if tc, err := ts.get(t.Context(), "go1.98", said); err != nil || tc.Version != "go1.98.1" {
		t.Errorf("meanwhile a build gets %s, %v", tc.Version, err)
	}
	if now, err := b.Current(t.Context(), "go1.98"); err != nil || now != (Basis{Toolchain: "go1.98.2"}) {
		t.Errorf("meanwhile the newest is %+v, %v", now, err)
	}
	ctx, cancel := context.WithCancelCause(t.Context())
	cancel(errors.New("stopped"))
	if err := b.Fetch(ctx, "go1.98.2", said); err == nil || err.Error() != "stopped" {
		t.Errorf("who waits and is stopped gets %v", err)
	}
	close(answer)
	if err := <-fetched; err != nil {
		t.Fatal(err)
	}
	if tc, err := ts.get(t.Context(), "go1.98", said); err != nil || tc.Version != "go1.98.2" {
		t.Errorf("afterwards a build gets %s, %v", tc.Version, err)
	}
}
