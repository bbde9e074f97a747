// Command docgen writes the parts of docs/ that follow from the code:
//
//	docs/cli.md        all of it, from "m3o help --markdown"
//	docs/api.md        all of it, from api/m3o/v1/m3o.proto and its comments
//	docs/m3o.schema.json  all of it, from the table of m3o.yaml's keys
//	docs/operating.md  the table of m3od's settings, between two marks
//
// Run it in the repository's root: go run ./tools/docgen. Its test fails when
// one of them is stale.
package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"

	"github.com/m3o/m3o/buildpacks"
	"github.com/m3o/m3o/internal/atomicfile"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	err := write(ctx, ".")
	stop()
	if err != nil {
		fmt.Fprintln(os.Stderr, "docgen: error:", err)
		os.Exit(1)
	}
}

// write brings the documents below root up to date.
func write(ctx context.Context, root string) error {
	for _, d := range documents {
		path := filepath.Join(root, d.file)
		old, err := os.ReadFile(path)
		if err != nil && !errors.Is(err, os.ErrNotExist) {
			return err
		}
		now, err := d.make(ctx, root, old)
		if err != nil {
			return fmt.Errorf("make %s: %w", d.file, err)
		}
		if bytes.Equal(old, now) {
			continue
		}
		if err := atomicfile.Write(path, now, 0o644); err != nil {
			return err
		}
		fmt.Println("wrote", d.file)
	}
	return nil
}

// A document is a file and how it is made from the code and what it holds.
type document struct {
	file string
	make func(ctx context.Context, root string, old []byte) ([]byte, error)
}

var documents = []document{
	{"docs/cli.md", cli},
	{"docs/api.md", api},
	{"docs/operating.md", settings},
	{"docs/m3o.schema.json", func(context.Context, string, []byte) ([]byte, error) { return buildpacks.Schema(), nil }},
}

// cli asks the command itself: its table of commands is its own.
func cli(ctx context.Context, root string, _ []byte) ([]byte, error) {
	cmd := exec.CommandContext(ctx, "go", "run", "./cmd/m3o", "help", "--markdown")
	cmd.Dir, cmd.Stderr = root, os.Stderr
	out, err := cmd.Output()
	if err != nil {
		return nil, fmt.Errorf("run m3o help: %w", err)
	}
	return out, nil
}
