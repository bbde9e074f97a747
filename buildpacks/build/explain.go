package build

import (
	"context"
	"errors"
	"fmt"
	"io"
	"regexp"
	"strings"
	"syscall"

	"github.com/m3o/m3o"
	gatewaypb "github.com/moby/buildkit/frontend/gateway/pb"
	"github.com/moby/buildkit/util/grpcerrors"
)

const noSpace = "no space left on device"

// disk says a full disk in those words; other errors go through.
func disk(err error) error {
	if err != nil && (errors.Is(err, syscall.ENOSPC) || errors.Is(err, syscall.EDQUOT) || strings.Contains(err.Error(), noSpace)) {
		return diskFull(err)
	}
	return err
}

func diskFull(err error) error {
	return &m3o.Error{Kind: m3o.Unavailable, Msg: "the disk of the build machine is full", Hint: "free space at m3o's data directory there (m3o doctor tells how much is left), then push again", Err: err}
}

// explain turns a failed solve into what the pusher can act on. layer is why
// the result could not be written, if that is it.
func (b *Builder) explain(ctx context.Context, gen int, err, layer error, w *watch) error {
	if ctx.Err() != nil {
		return fmt.Errorf("build: %w", context.Cause(ctx))
	}
	if err == nil {
		err = layer
	}
	if x, ok := errors.AsType[*gatewaypb.ExitError](err); ok && !b.diedSince(gen) {
		tool := w.failed(err)
		said := w.out.said(tool)
		if e := b.overLimit(x.ExitCode, said, err); e != nil {
			return e
		}
		return explainExit(tool, x.ExitCode, said, err)
	}
	if layer != nil && !errors.Is(layer, io.ErrClosedPipe) {
		if d := disk(layer); d != layer {
			return d
		}
	}
	switch {
	case strings.Contains(err.Error(), noSpace):
		return diskFull(err)
	case b.diedSince(gen), grpcerrors.Code(err).String() == "Unavailable":
		return &m3o.Error{Kind: m3o.Unavailable, Msg: "the builder stopped; push again", Err: err}
	}
	return fmt.Errorf("build: %w", errors.Join(err, layer))
}

// The forms in which the Go tools say what is wrong.
var (
	compileError = regexp.MustCompile(`^(?:vet: )?\S+\.(?:go|s|mod|sum|work):\d+(?::\d+)?: `)
	tooMany      = regexp.MustCompile(`: too many errors$|^too many errors$`)
	goSays       = regexp.MustCompile(`^go: `)
	downloading  = regexp.MustCompile(`^go: (?:downloading|finding|extracting) `)
	fetching     = regexp.MustCompile(`(?:reading|Get|Post) "?https?://.*(?:dial tcp|timeout|refused|no such host|TLS handshake|: 5[0-9][0-9] |EOF|server misbehaving|reset by peer)`)
	notServed    = regexp.MustCompile(`(?:reading|Get) "?https?://.*: 4[0-9][0-9] `)
	unauthorized = regexp.MustCompile(`(?:reading|Get) "?https?://.*: 401 `)
	forbidden    = regexp.MustCompile(`(?:reading|Get) "?https?://.*: 403 `) // some proxies say so of what they do not have
	// moduleVersion is a module as the go command names it in an error.
	moduleVersion = regexp.MustCompile(`[^\s:"]+@v[^\s:"]+`)
	noFiles       = regexp.MustCompile(`build constraints exclude all Go files in (\S+)`)
	sumMissing    = regexp.MustCompile(`missing go\.sum entry|updates to go\.(?:mod|sum) needed|inconsistent vendoring`)
	noGit         = regexp.MustCompile(`exec: "git": executable file not found`)
	failedTest    = regexp.MustCompile(`^\s*--- FAIL: `)
	notRequired   = regexp.MustCompile(`no required module provides package|cannot find module providing package|is not in std`)
	pluginFailed  = regexp.MustCompile(`^protoc-gen-[a-z0-9-]+ v\S+ failed: `)
	newerGo       = regexp.MustCompile(`requires go >= \S+ \(running go`)
	wrongSum      = regexp.MustCompile(`checksum mismatch|SECURITY ERROR`)
)

// explainExit finds the one line of what the tools said that names the fault.
func explainExit(tool string, code uint32, said []string, err error) error {
	all := strings.Join(said, "\n")
	if strings.Contains(all, noSpace) {
		return diskFull(err)
	}
	if !isTool(tool) {
		return explainRun(tool, code, said, err)
	}
	line := ""
	for _, s := range said {
		s = strings.TrimSpace(s)
		if s == "" || strings.HasPrefix(s, "#") || tooMany.MatchString(s) || downloading.MatchString(s) {
			continue
		}
		// The last one that names a place; else the last go itself says; else the last.
		if rank(s) >= rank(line) {
			line = s
		}
	}
	if line == "" {
		return &m3o.Error{Kind: m3o.Invalid, Msg: fmt.Sprintf("%s ended with exit code %d and said nothing", tool, code), Err: err}
	}
	e := &m3o.Error{Kind: m3o.Invalid, Msg: line, Hint: "fix it, commit and push again", Err: err}
	switch {
	case pluginFailed.MatchString(line):
		e.Hint = "its output is above; commit the generated code to build without the plugin"
	case newerGo.MatchString(line):
		e.Hint = "raise the go line in go.mod, or require an older version"
	case wrongSum.MatchString(all):
		e.Hint = "a module is not what go.sum says: run go mod verify, then go mod tidy, and commit"
	case fetching.MatchString(line):
		what := "a module"
		if m := moduleVersion.FindString(line); m != "" {
			what = m
		}
		e.Kind, e.Hint = m3o.Unavailable, what+" is not in the cache and could not be fetched: push again when its server answers, or check m3od --goproxy"
	case unauthorized.MatchString(line):
		e.Hint = "the module's server wants a password: set config var NETRC, and name it in build.secrets of m3o.yaml"
	case forbidden.MatchString(line):
		e.Hint = "the module proxy does not have that version, or not for everybody: run go get for one it has, and commit go.mod and go.sum; or set config var NETRC, and name it in build.secrets of m3o.yaml"
	case notServed.MatchString(line):
		e.Hint = "the module proxy does not have that version: run go get for one it has, and commit go.mod and go.sum"
	case sumMissing.MatchString(all):
		e.Hint = "run go mod tidy and commit go.mod and go.sum"
	case notRequired.MatchString(all):
		e.Hint = "run go mod tidy and commit go.mod and go.sum; a package of your own must be committed too"
	case noFiles.MatchString(all):
		e.Hint = "a package that needs cgo cannot be built: there is no C compiler. Use one written in Go, or build with a Dockerfile that has one: build.dockerfile in m3o.yaml"
	case noGit.MatchString(all):
		e.Hint = "private modules come through a module proxy here: set config vars GOPROXY and NETRC for it, and name both in build.secrets of m3o.yaml"
	case tool == stepTest:
		e.Hint = "go test ./... has to pass because of build.test in m3o.yaml"
	case tool == stepVet:
		e.Hint = "go vet ./... has to pass because of build.vet in m3o.yaml"
	}
	return e
}

func rank(s string) int {
	switch {
	case s == "":
		return 0
	case pluginFailed.MatchString(s):
		return 4
	case compileError.MatchString(s):
		return 3
	case goSays.MatchString(s), failedTest.MatchString(s):
		return 2
	}
	return 1
}

// explainRun is explainExit for a step of a Dockerfile.
func explainRun(step string, code uint32, said []string, err error) error {
	last := ""
	for _, s := range said {
		if s = strings.TrimSpace(s); s != "" {
			last = s
		}
	}
	msg := fmt.Sprintf("%s ended with exit code %d", step, code)
	if last != "" {
		msg += ": " + last
	}
	return &m3o.Error{Kind: m3o.Invalid, Msg: msg, Hint: "fix the Dockerfile or what it runs, commit and push again", Err: err}
}
