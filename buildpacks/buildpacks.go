// Package buildpacks holds what every builder agrees on: the Plan a detector
// makes of a source tree, and the three files a pushed tree may carry, Procfile,
// app.json and m3o.yaml. It plans; package build below it runs the plan. It knows
// nothing of apps, releases or users.
package buildpacks

import (
	"github.com/m3o/m3o"
)

// Port is where every web process listens: each instance has a network
// namespace of its own, so there is nothing to choose. It is injected as PORT.
const Port = 8080

// AppDir is the directory of an image that holds its binaries. It is the
// working directory and on PATH.
const AppDir = "/app"

// The files of a pushed tree that this package reads.
const (
	ProcfileName = "Procfile"
	ManifestName = "m3o.yaml"
	AppJSONName  = "app.json"
)

// A Plan says how to build a tree and what to run from the image.
type Plan struct {
	Builder   string                 // "go" or "dockerfile"
	Toolchain string                 // the oldest one that will do, "go1.26.3" or "go1.26"; the builder picks
	Dir       string                 // build root inside the tree, "." or "services/api"
	Targets   []Target               // at least one, each with a Path of its own
	Processes map[string]m3o.Process // by type: web, worker …
	Release   []string               // argv of the release command, nil when none
	Health    m3o.Health
	Env       map[string]string // put into the image
	Vendor    bool              // dependencies come with the tree
	Go        Go                // how a "go" plan compiles
	Docker    Docker            // what a "dockerfile" plan builds
	Copy      []string          // files, folders and patterns below Dir that go into the image, below AppDir
	Private   []string          // module path patterns that no public proxy serves
	Secrets   []string          // names of the config vars the build reads
	Notes     []string          // lines for the pusher
	Files     Files             // what the tree's own files say; Files.Apply sets it
}

// A Target is one binary to build.
type Target struct {
	Name    string // file name of the binary
	Package string // relative to Plan.Dir: "." or "./cmd/web"
	Path    string // in the image: "/app/web"
}

// Go says how the go command is called.
type Go struct {
	Work       string   // the go.work to build in, in the tree; "" for none
	Modules    []string // folders of the modules that Work uses, in the tree
	Tags       []string // build tags
	LDFlags    string   // $VERSION, $COMMIT and $TIME stand for those of the commit
	Flags      []string // GOFLAGS
	Experiment []string // GOEXPERIMENT
	Test, Vet  bool     // gates
}

// Docker says which Dockerfile to build. Dir is the context.
type Docker struct {
	File   string            // in the tree
	Target string            // stage, "" for the last
	Args   map[string]string // values of ARG lines
	Images map[string]string // what FROM lines name, by the OCI layout in the tree that stands for it
}
