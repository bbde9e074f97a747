package build

import (
	"archive/tar"
	"context"
	"errors"
	"fmt"
	"io"
	"path"
	"strings"
	"sync/atomic"

	"github.com/m3o/m3o/buildpacks"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"
)

// An appLayer receives the files a build made as the tar BuildKit streams and
// writes them, under their paths in the image and with fixed times and owner,
// as a layer into the content store. BuildKit's image exporter would write the
// layer into its own store first and copy it from there: the binaries cross
// the disk once here.
type appLayer struct {
	builder *Builder
	req     Request
	done    chan struct{} // nil until the stream begins
	layer   v1.Descriptor
	err     error
}

var layerNumber atomic.Int64 // names unfinished layers apart

// open returns what BuildKit's client calls when the stream begins.
func (a *appLayer) open(ctx context.Context) func(map[string]string) (io.WriteCloser, error) {
	return func(map[string]string) (io.WriteCloser, error) {
		if a.done != nil {
			return nil, errors.New("a second result was sent")
		}
		pr, pw := io.Pipe()
		a.done = make(chan struct{})
		go func() {
			defer close(a.done)
			a.layer, a.err = a.read(ctx, pr)
			_ = pr.CloseWithError(a.err) // the sender learns that nobody reads
		}()
		return &stream{PipeWriter: pw, done: a.done, err: &a.err}, nil
	}
}

// A stream is closed when all is written: then the layer is in the store.
type stream struct {
	*io.PipeWriter
	done <-chan struct{}
	err  *error
}

func (s *stream) Close() error {
	_ = s.PipeWriter.Close()
	<-s.done
	return *s.err
}

// wait returns the layer. The solve has ended: so has the stream, or it never began.
func (a *appLayer) wait() (v1.Descriptor, error) {
	if a.done == nil {
		return v1.Descriptor{}, nil
	}
	<-a.done
	return a.layer, a.err
}

func (a *appLayer) read(ctx context.Context, r io.Reader) (v1.Descriptor, error) {
	l, err := newLayer(ctx, a.builder.images, fmt.Sprintf("app-layer-%d", layerNumber.Add(1)))
	if err != nil {
		return v1.Descriptor{}, err
	}
	defer l.close()
	dir := strings.TrimPrefix(buildpacks.AppDir, "/")
	if err := l.dir(dir, 0o755); err != nil {
		return v1.Descriptor{}, err
	}
	missing := map[string]bool{}
	for _, t := range a.req.Plan.Targets {
		missing[t.Name] = true
	}
	tr := tar.NewReader(r)
	for {
		h, err := tr.Next()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return v1.Descriptor{}, fmt.Errorf("read result: %w", err)
		}
		name := path.Clean(h.Name)
		if h.Typeflag == tar.TypeDir && name == "." {
			continue
		}
		if h.Typeflag != tar.TypeReg || !missing[name] {
			return v1.Descriptor{}, fmt.Errorf("the build made %q, which no target names", h.Name)
		}
		delete(missing, name)
		if err := l.file(path.Join(dir, name), 0o755, h.Size, tr); err != nil {
			return v1.Descriptor{}, fmt.Errorf("write layer: %w", err)
		}
	}
	for name := range missing {
		return v1.Descriptor{}, fmt.Errorf("the build did not make %q", name)
	}
	// The rest of the stream is padding; the sender wants it read.
	if _, err := io.Copy(io.Discard, r); err != nil {
		return v1.Descriptor{}, fmt.Errorf("read result: %w", err)
	}
	return a.builder.pin(func() (v1.Descriptor, error) { return l.commit(ctx) })
}
