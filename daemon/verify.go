package daemon

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"strings"
	"time"

	"connectrpc.com/connect"

	"github.com/m3o/m3o"
	m3ov1 "github.com/m3o/m3o/api/m3o/v1"
	"github.com/m3o/m3o/buildpacks"
	"github.com/m3o/m3o/buildpacks/build"
	"github.com/m3o/m3o/buildpacks/source"
)

// buildType names how m3o's provenance is to be read: docs/builds.md says it.
const buildType = "https://github.com/m3o/m3o/docs/builds.md#provenance"

// A statement is an in-toto statement of SLSA provenance. See
// https://slsa.dev/spec/v1.0/provenance.
type statement struct {
	Type          string     `json:"_type"`
	Subject       []resource `json:"subject"`
	PredicateType string     `json:"predicateType"`
	Predicate     predicate  `json:"predicate"`
}

type resource struct {
	Name   string            `json:"name,omitempty"`
	URI    string            `json:"uri,omitempty"`
	Digest map[string]string `json:"digest,omitempty"`
}

type predicate struct {
	Definition definition `json:"buildDefinition"`
	Run        runDetails `json:"runDetails"`
}

type definition struct {
	Type         string         `json:"buildType"`
	External     map[string]any `json:"externalParameters"`
	Dependencies []resource     `json:"resolvedDependencies"`
}

type runDetails struct {
	Builder  resourceID        `json:"builder"`
	Metadata map[string]string `json:"metadata"`
}

type resourceID struct {
	ID      string            `json:"id"`
	Version map[string]string `json:"version,omitempty"`
}

// document attaches the bill of materials and the provenance to a new image.
func (d *Daemon) document(ctx context.Context, src m3o.Source, number int, began time.Time, plan *buildpacks.Plan, res build.Result) error {
	sbom, err := d.builder.SBOM(ctx, res.Image)
	if err != nil {
		return fmt.Errorf("make bill of materials: %w", err)
	}
	if err := d.builder.Attach(ctx, res.Image, build.Attachment{Type: build.SBOMType, MediaType: build.SBOMType, Data: sbom}); err != nil {
		return err
	}
	external := map[string]any{"app": src.App, "builder": plan.Builder, "options": src.Options}
	var deps []resource
	if src.Commit != "" {
		external["commit"], external["ref"] = src.Commit, src.Ref
		deps = append(deps, resource{URI: "git+" + d.gitURL(src.App) + "@" + src.Ref, Digest: map[string]string{"gitCommit": src.Commit}})
	} else {
		external["image"] = src.Image
	}
	if plan.Builder == "go" {
		external["targets"], external["go"] = plan.Targets, plan.Go
		deps = append(deps, resource{URI: "pkg:golang/golang.org/toolchain@v0.0.1-" + res.Toolchain, Name: res.Toolchain},
			resource{Name: "base layer", Digest: map[string]string{"sha256": strings.TrimPrefix(res.Base, "sha256:")}})
	}
	j, err := json.MarshalIndent(statement{
		Type: "https://in-toto.io/Statement/v1", PredicateType: "https://slsa.dev/provenance/v1",
		Subject: []resource{{Name: src.App, Digest: map[string]string{"sha256": strings.TrimPrefix(res.Image, "sha256:")}}},
		Predicate: predicate{
			Definition: definition{buildType, external, deps},
			Run: runDetails{resourceID{d.apiURL(), map[string]string{"m3o": d.version}}, map[string]string{
				"invocationId": fmt.Sprintf("%s/builds/%d", src.App, number), "startedOn": began.UTC().Format(time.RFC3339), "finishedOn": time.Now().UTC().Format(time.RFC3339)}},
		}}, "", "  ")
	if err != nil {
		return fmt.Errorf("encode provenance: %w", err)
	}
	return d.builder.Attach(ctx, res.Image, build.Attachment{Type: build.ProvenanceType, MediaType: build.ProvenanceType, Data: j})
}

// releaseCalled is a release by its name "v12", the live one for "".
func (d *Daemon) releaseCalled(ctx context.Context, app, name string) (m3o.Release, error) {
	if name == "" {
		return d.ledger.Live(ctx, app)
	}
	var n int
	if _, err := fmt.Sscanf(name, "v%d", &n); err != nil || fmt.Sprintf("v%d", n) != name {
		return m3o.Release{}, &m3o.Error{Kind: m3o.Invalid, Msg: fmt.Sprintf("%.40q is no release", name), Hint: "they are called v1, v2 …; m3o releases -a " + app}
	}
	return d.ledger.Release(ctx, app, n)
}

func (a buildRecordsAPI) Sbom(ctx context.Context, req *connect.Request[m3ov1.SbomRequest]) (*connect.Response[m3ov1.SbomResponse], error) {
	rel, err := a.d.releaseCalled(ctx, req.Msg.App, req.Msg.Release)
	if err != nil {
		return nil, err
	}
	typ := build.SBOMType
	if req.Msg.Provenance {
		typ = build.ProvenanceType
	}
	doc, err := a.d.builder.Attached(ctx, rel.Image, typ)
	if m3o.KindOf(err) == m3o.NotFound {
		err = &m3o.Error{Kind: m3o.NotFound, Msg: "the image of " + rel.Name() + " has no such document: it is gone, or older than they are", Hint: "m3o deploy --ref BRANCH makes a new one", Err: err}
	}
	if err != nil {
		return nil, err
	}
	return connect.NewResponse(&m3ov1.SbomResponse{MediaType: typ, Document: doc, Release: rel.Name(), Image: rel.Image}), nil
}

func (a buildRecordsAPI) Verify(ctx context.Context, req *connect.Request[m3ov1.VerifyRequest], out *connect.ServerStream[m3ov1.VerifyResponse]) error {
	rel, err := a.d.releaseCalled(ctx, req.Msg.App, req.Msg.Release)
	if err != nil {
		return err
	}
	w := outputStream{func(p []byte) error { return out.Send(&m3ov1.VerifyResponse{Output: p}) }}
	rebuilt, differences, err := a.d.rebuild(ctx, rel, who(ctx).User, w)
	if err != nil {
		return err
	}
	return out.Send(&m3ov1.VerifyResponse{Identical: rebuilt == rel.Image, Recorded: rel.Image, Rebuilt: rebuilt, Differences: differences})
}

// rebuild builds a release again from its commit, with the toolchain of then
// and none of the caches that builds write to, and compares the images.
func (d *Daemon) rebuild(ctx context.Context, rel m3o.Release, user string, w io.Writer) (rebuilt string, differences []string, err error) {
	if rel.Commit == "" {
		return "", nil, &m3o.Error{Kind: m3o.Invalid, Msg: rel.Name() + " is of an image that came from elsewhere: there is no source to build it from", Hint: "m3o sbom --provenance shows where it came from"}
	}
	bld, err := d.ledger.Build(ctx, rel.App, rel.Build)
	if err != nil {
		return "", nil, err
	}
	repo, err := d.repo(ctx, rel.App)
	if err != nil {
		return "", nil, err
	}
	src := m3o.Source{App: rel.App, Repo: repo, Commit: rel.Commit, User: user, Via: "m3o verify", Options: []string{"allow-breaking"}}
	tree, err := source.Open(ctx, src, &d.trees)
	if err != nil {
		return "", nil, err
	}
	defer tree.Close() //nolint:errcheck // only read
	d.imagesMu.RLock()
	defer d.imagesMu.RUnlock()
	plan, err := d.plan(ctx, tree)
	if err != nil {
		return "", nil, err
	}
	api, err := d.compile(ctx, src, tree, plan, output{io.Discard})
	if err != nil {
		return "", nil, err
	}
	secrets, err := d.buildSecrets(ctx, rel.App, plan)
	if err != nil {
		return "", nil, err
	}
	logins, err := d.registries(ctx, rel.App)
	if err != nil {
		return "", nil, err
	}
	res, err := d.builder.Build(ctx, build.Request{App: rel.App, User: user, Plan: plan, Tree: tree, Out: w, Commit: rel.Commit, Time: tree.Time(), Secrets: secrets, Registries: logins,
		Generate: api.generate, NoCache: true, Verify: true, Toolchain: bld.Toolchain})
	if err != nil {
		return "", nil, err
	}
	differences, err = d.builder.Compare(ctx, rel.Image, res.Image)
	return res.Image, differences, err
}
