//go:build linux

package main

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"time"
)

// protoSample has .proto files and no generated code.
var protoSample = sample{"proto-only", regexp.MustCompile(`(?m)^(const prefix = ").*(")$`), "/notes.v1.Notes/Add", `{"text":"x"}`}

const (
	protoFile = "proto/notes/v1/notes.proto"

	// What m3o takes for the grpc-go and protobuf of the sample.
	protoPlugin = "google.golang.org/protobuf/cmd/protoc-gen-go@v1.36.12"
	grpcPlugin  = "google.golang.org/grpc/cmd/protoc-gen-go-grpc@v1.6.2"
)

// protobuf measures pushes of an app whose Go code is generated in the build,
// against protoc and go build by hand.
func (b *bench) protobuf(ctx context.Context, sec *section) error {
	plugins := filepath.Join(b.dir, "plugins")
	for _, p := range []string{protoPlugin, grpcPlugin} {
		cmd := exec.CommandContext(ctx, "go", "install", p)
		cmd.Env = append(os.Environ(), "GOBIN="+plugins, "GOFLAGS=", "CGO_ENABLED=0")
		if out, err := cmd.CombinedOutput(); err != nil {
			return fmt.Errorf("go install %s: %w: %s", p, err, out)
		}
	}
	c, err := b.newCheckout(ctx, protoSample, "bench-proto")
	if err != nil {
		return err
	}
	// A field more in each round: its name is what changes.
	nextProto := func() error {
		c.n++
		for _, dir := range []string{c.repo, c.host} {
			file := filepath.Join(dir, protoFile)
			src, err := os.ReadFile(file)
			if err != nil {
				return err
			}
			next := regexp.MustCompile(`message ListRequest \{`).ReplaceAll(src, fmt.Appendf(nil, "message More%d {\n  string text = 1;\n}\n\nmessage ListRequest {", c.n))
			if err := os.WriteFile(file, next, 0o644); err != nil {
				return err
			}
		}
		return c.commit(ctx)
	}
	byHand := func(generate bool) (time.Duration, error) {
		began := time.Now()
		if generate {
			cmd := exec.CommandContext(ctx, "protoc", "-I", "proto", "--go_out=.", "--go_opt=module=example.com/proto-only",
				"--go-grpc_out=.", "--go-grpc_opt=module=example.com/proto-only", "notes/v1/notes.proto")
			cmd.Dir, cmd.Env = c.host, append(os.Environ(), "PATH="+plugins+":"+os.Getenv("PATH"))
			if out, err := cmd.CombinedOutput(); err != nil {
				return 0, fmt.Errorf("protoc: %w: %s", err, out)
			}
		}
		_, _, err := c.hostBuild(ctx, nil)
		return time.Since(began), err
	}
	for range 2 { // all caches warm
		if _, err := byHand(true); err != nil {
			return err
		}
		if _, err := c.measurePush(ctx, c.want); err != nil {
			return err
		}
		if err := c.nextVersion(ctx); err != nil {
			return err
		}
	}
	kinds := []struct {
		what, reference string
		next            func() error
		generate, ask   bool
		budget          string
	}{
		{"change of the .proto only, push ends", "protoc and go build", nextProto, true, false, "–"},
		{"one-line change of Go code, push → answers", "go build", func() error { return c.nextVersion(ctx) }, false, true, "≤ 1.5× + 0.5 s"},
		{"push of an empty commit", "go build, nothing changed,", func() error { return c.commit(ctx) }, false, false, "≤ 1 s"},
	}
	took, ref, ratio := make([]durations, len(kinds)), make([]durations, len(kinds)), make([]durations, len(kinds))
	parts := make([]breakdown, len(kinds))
	for round := range b.rounds {
		for i, k := range kinds {
			if err := k.next(); err != nil {
				return err
			}
			hand := func() error {
				d, err := byHand(k.generate)
				ref[i].add(d)
				return err
			}
			push := func() error {
				if err := b.settle(ctx, 1); err != nil {
					return err
				}
				want := ""
				if k.ask {
					want = c.want
				}
				p, err := c.measurePush(ctx, want)
				if took[i].add(p.wall); k.ask {
					took[i][len(took[i])-1] = p.answer
				}
				parts[i].add(spans(p.lines, p.wall))
				return err
			}
			if err := inTurns(round, hand, push); err != nil {
				return err
			}
			ratio[i].add(quotient(took[i].last(), ref[i].last()))
			b.say("%s: %s, by hand %s", k.what, secs(took[i].last()), secs(ref[i].last()))
		}
	}
	for i, k := range kinds {
		met := "–"
		switch i {
		case 1:
			met = verdict(took[i].median() <= ref[i].median()*3/2+500*time.Millisecond)
		case 2:
			met = verdict(took[i].median() <= time.Second)
		}
		sec.add(row{What: "proto-only: " + k.what, Budget: k.budget, Measured: took[i].text(), Reference: k.reference + " " + ref[i].text(),
			Ratio: times(ratio[i].median()), Met: met})
		sec.tables = append(sec.tables, parts[i].table(k.what+": where the time goes"))
	}
	sec.note("The app has .proto files and handlers, and no generated code: m3o compiles the .proto files on every push and runs the plugins when they " +
		"changed. By hand, protoc runs the same plugins, built before, and `go build` follows.")
	return b.destroy(ctx, c.app)
}
