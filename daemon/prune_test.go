package daemon

import (
	"context"
	"errors"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/m3o/m3o"
	"github.com/m3o/m3o/router"
)

// Images of a destroyed app went only with the next deploy of another one.
func TestDestroyedAppsImagesAreLetGo(t *testing.T) {
	s := newShop(t)
	kept := make(chan []string, 100)
	s.b.prune = func(keep []string) error { kept <- keep; return nil }
	s.push("one", "refs/heads/main")
	s.connect(nil)
	rel, err := s.d.ledger.Live(t.Context(), "app")
	if err != nil {
		t.Fatal(err)
	}
	s.d.prune(t.Context())
	if keep := <-kept; !slices.Contains(keep, rel.Image) {
		t.Errorf("kept %v, want the live release's %s", keep, rel.Image)
	}
	// An image that is being made is in no release yet: nothing is removed then.
	s.d.imagesMu.RLock()
	s.d.prune(t.Context())
	s.d.imagesMu.RUnlock()
	if len(kept) != 0 {
		t.Errorf("while a push is on its way: kept %v", <-kept)
	}
	if err := s.d.destroyApp(t.Context(), "app"); err != nil {
		t.Fatal(err)
	}
	if keep := <-kept; slices.Contains(keep, rel.Image) {
		t.Errorf("the destroyed app's %s is kept", rel.Image)
	}
}

func TestDoctorOfWhatRuns(t *testing.T) {
	s := newShop(t)
	look := func(c func(context.Context, *findings)) []Finding {
		t.Helper()
		var f findings
		c(t.Context(), &f)
		return f
	}
	s.push("one", "refs/heads/main")
	s.connect(nil)
	expect(t, "one app", look(s.d.checkApps), "ok apps: 1 app, none down", "ok builds: the last build that succeeded ended at ")
	expect(t, "a router", look(s.d.checkRouter), "ok router: the router serves ")
	nobody := &Daemon{cfg: s.d.cfg, router: router.Client{Socket: filepath.Join(t.TempDir(), "none")}}
	expect(t, "no router", look(nobody.checkRouter), "fail router: the router does not answer, so no app can be reached … router.log")
	expect(t, "a builder", look(s.d.checkBuilder), "ok builder")
	expect(t, "nothing was removed yet", look(s.d.checkUpkeep))

	s.b.prune = func([]string) error { return errors.New("the disk is sick") }
	s.d.prune(t.Context())
	expect(t, "upkeep that fails", look(s.d.checkUpkeep), "warn upkeep: images and layers that nobody needs stay on the disk: the disk is sick … every hour")
	s.b.prune = nil
	s.d.prune(t.Context())
	expect(t, "upkeep", look(s.d.checkUpkeep), "ok upkeep: images and layers that nobody needs were removed at ")

	for _, name := range []string{"b", "c", "d"} {
		if _, err := s.d.createApp(t.Context(), m3o.App{Name: name, Owner: "ada"}); err != nil {
			t.Fatal(err)
		}
		b, err := s.d.ledger.StartBuild(t.Context(), m3o.Build{App: name, Started: time.Now()})
		if err != nil {
			t.Fatal(err)
		}
		if err := s.d.endBuild(t.Context(), b, errors.New("no space left on device")); err == nil {
			t.Fatal("it did not fail")
		}
	}
	expect(t, "builds that fail everywhere", look(s.d.checkApps), "ok apps: 4 apps, none down", "warn builds: the newest builds of 3 apps failed, the last that did not ended at … m3o builds:output")

	s.d.routes.merge(m3o.Instance{App: "b", Process: "web", Release: 1, ID: "b-web-v1-x", Phase: m3o.Exited})
	expect(t, "an app that is down", look(s.d.checkApps), "warn apps: no instance of b is ready: it answers nobody … m3o ps -a b and m3o logs -a b")
	own := ownCert{ID: "x", App: "app", Names: []string{"shop.example"}, Expires: time.Now().Add(3 * 24 * time.Hour)}
	if _, err := s.d.ownCerts.Put(t.Context(), "x", own); err != nil {
		t.Fatal(err)
	}
	expect(t, "a brought certificate that ends", look(s.d.checkCerts), "warn certs: the certificate that was brought for shop.example ends on … m3o certs:add")
	if got := lines(look(s.d.checkDrains)); strings.Contains(got, "warn") {
		t.Error(got)
	}
}
