package daemon

import (
	"context"
	"fmt"
	"os"
	"strings"
	"time"

	"github.com/m3o/m3o"
	"github.com/m3o/m3o/buildpacks/advisory"
	"github.com/m3o/m3o/buildpacks/source"
)

// advisoryTime bounds how long a push waits for the vulnerability database.
const advisoryTime = 20 * time.Second

// maxTold is how many advisories a reason names.
const maxTold = 3

// A staleness is what a build now would do otherwise than the one before.
type staleness struct {
	Why       string // "" when nothing: the reason for a rebuild
	Known     string // advisories that the release has had since it was built, "" for none
	Toolchain string // to be fetched before the build, "" when it is here
}

// outdated says how a build of src now would differ from the newest release
// although its source is the same, or what has become known of its modules
// since it was built.
func (d *Daemon) outdated(ctx context.Context, src m3o.Source) (staleness, error) {
	rel, err := d.newestRelease(ctx, src.App)
	if m3o.KindOf(err) == m3o.NotFound {
		return staleness{Why: "it was never deployed"}, nil
	} else if err != nil {
		return staleness{}, err
	}
	if rel.Commit != src.Commit {
		return staleness{Why: "the branch has a newer commit"}, nil
	}
	bld, err := d.ledger.Build(ctx, src.App, rel.Build)
	if err != nil {
		return staleness{}, err
	}
	tree, err := source.Open(ctx, src, &d.trees)
	if err != nil {
		return staleness{}, err
	}
	defer tree.Close() //nolint:errcheck // only read
	plan, err := d.plan(ctx, tree)
	if err != nil {
		return staleness{}, err
	}
	var s staleness
	var why []string
	if plan.Builder == "go" { // the base images of a Dockerfile have tags that only their registry can follow
		now, err := d.builder.Current(ctx, plan.Toolchain)
		if err != nil {
			return staleness{}, err
		}
		switch {
		case bld.Toolchain == "":
			why = append(why, "it was built before toolchains were recorded")
		case bld.Toolchain != now.Toolchain:
			why = append(why, fmt.Sprintf("%s instead of %s", now.Toolchain, bld.Toolchain))
		case bld.Base != now.Base:
			why = append(why, "the base image changed (CA roots or time zones)")
		}
		if now.Base == "" {
			s.Toolchain = now.Toolchain
		}
	}
	fresh, known, err := d.advisories(ctx, rel, bld)
	if err != nil && len(why) == 0 {
		return staleness{}, err
	}
	if err != nil {
		d.log.Warn("advisories are not known", "app", src.App, "err", err)
	}
	if len(fresh) > 0 {
		why = append(why, told(fresh))
	}
	s.Why, s.Known = strings.Join(why, "; "), told(known)
	return s, nil
}

// newestRelease is the live release, or a newer one that is held back: of a
// locked app the same is not built every night.
func (d *Daemon) newestRelease(ctx context.Context, app string) (m3o.Release, error) {
	rel, err := d.ledger.Live(ctx, app)
	if err != nil {
		return rel, err
	}
	held, err := d.ledger.Held(ctx, app)
	for _, h := range held {
		if h.Version > rel.Version {
			rel = h
		}
	}
	return rel, err
}

// advisories is what the vulnerability database has on the modules of a
// release: what was published since it was built, and what was known then.
func (d *Daemon) advisories(ctx context.Context, rel m3o.Release, bld m3o.Build) (fresh, known []advisory.Advisory, err error) {
	all, _, err := d.affecting(ctx, rel.Image)
	for _, a := range all {
		if a.Published.After(bld.Started) {
			fresh = append(fresh, a)
		} else {
			known = append(known, a)
		}
	}
	return fresh, known, err
}

// affecting is what the vulnerability database has on the modules of an image,
// and how many modules there are.
func (d *Daemon) affecting(ctx context.Context, image string) ([]advisory.Advisory, int, error) {
	address := d.cfg.vulnDB()
	if address == "off" {
		return nil, 0, nil
	}
	db, err := advisory.Open(address)
	if err != nil {
		return nil, 0, err
	}
	sbom, err := d.builder.SBOM(ctx, image)
	if err != nil {
		return nil, 0, err
	}
	modules, err := advisory.Modules(sbom)
	if err != nil {
		return nil, 0, err
	}
	all, err := db.Affecting(ctx, modules)
	return all, len(modules), err
}

// reportAdvisories tells a pusher which known faults the modules of an image
// have. It ends no deploy: what is known today says nothing of what is live.
func (d *Daemon) reportAdvisories(ctx context.Context, image string, out output) {
	ctx, cancel := context.WithTimeout(ctx, advisoryTime)
	defer cancel()
	all, modules, err := d.affecting(ctx, image)
	switch {
	case err != nil:
		out.warn("%s", userMessage(err))
		if h := m3o.HintOf(err); h != "" {
			out.warn("%s", h)
		}
	case d.cfg.vulnDB() == "off":
		out.warn("build.advisories: this server asks no vulnerability database (m3od --go-vuln-db)")
	case len(all) == 0:
		out.line("No known faults in modules (%d looked at)", modules)
	default:
		out.step("Known faults in modules")
		for _, a := range all {
			out.line("%s: %s", a, a.Summary)
		}
	}
}

// told names advisories for a release's reason.
func told(all []advisory.Advisory) string {
	var out []string
	for i, a := range all {
		if i == maxTold {
			out = append(out, fmt.Sprintf("%d more", len(all)-i))
			break
		}
		out = append(out, a.String())
	}
	return strings.Join(out, "; ")
}

// vulnDB is the address of the Go vulnerability database, or "off".
func (c *Config) vulnDB() string {
	for _, v := range []string{c.GoVulnDB, os.Getenv("GOVULNDB")} {
		if v != "" {
			return v
		}
	}
	return advisory.Default
}
