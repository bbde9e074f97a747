package daemon

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"slices"
	"strings"
	"time"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protodesc"
	"google.golang.org/protobuf/types/descriptorpb"

	"github.com/m3o/m3o"
	"github.com/m3o/m3o/gateway"
	"github.com/m3o/m3o/internal/atomicfile"
	"github.com/m3o/m3o/runtime"
)

// examine asks a healthy instance how it is spoken to: its protocol and, for
// a gRPC service, its schema: the descriptors of the release, and what
// reflection knows beyond them. A schema belongs to the image, so it is asked
// once per image and kept in a file.
func (d *Daemon) examine(ctx context.Context, rel m3o.Release, in m3o.Instance) (traits, error) {
	if t, ok := d.knownTraits(rel); ok {
		return t, nil
	}
	proto, err := runtime.Probe(ctx, in.Addr, rel.Health)
	if err != nil {
		return traits{}, fmt.Errorf("probe %s: %w", in.ID, err)
	}
	t := traits{Protocol: string(proto)}
	if proto == runtime.GRPC {
		t.Descriptors = d.schema(ctx, rel, in)
	}
	b, err := json.Marshal(t)
	if err != nil {
		return traits{}, fmt.Errorf("encode traits: %w", err)
	}
	if err := atomicfile.Write(d.traitsFile(rel, ".json"), b, 0o600); err != nil {
		return traits{}, fmt.Errorf("keep traits: %w", err)
	}
	t.HTTP = rel.HTTP
	return t, nil
}

// knownTraits reads what an earlier instance of the same image showed.
func (d *Daemon) knownTraits(rel m3o.Release) (traits, bool) {
	var t traits
	b, err := os.ReadFile(d.traitsFile(rel, ".json"))
	if err != nil || json.Unmarshal(b, &t) != nil {
		return traits{}, false
	}
	if t.Descriptors != "" {
		if _, err := os.Stat(t.Descriptors); errors.Is(err, fs.ErrNotExist) {
			return traits{}, false
		}
	}
	t.HTTP = rel.HTTP
	return t, true
}

// traitsFile names a file for what is known of rel's image under rel's config,
// which may switch a protocol or reflection on and off, and its descriptors,
// which may change with a comment.
func (d *Daemon) traitsFile(rel m3o.Release, ext string) string {
	name := fmt.Sprintf("%s-%s-c%d", rel.App, strings.TrimPrefix(rel.Image, "sha256:"), rel.Config)
	if rel.Descriptors != "" {
		name += "-d" + strings.TrimPrefix(rel.Descriptors, "sha256:")[:16]
	}
	return d.cfg.path("traits", name+ext)
}

// schema is the file with what is known of a gRPC service's API, "" for nothing.
func (d *Daemon) schema(ctx context.Context, rel m3o.Release, in m3o.Instance) string {
	known := &descriptorpb.FileDescriptorSet{}
	if rel.Descriptors != "" {
		var err error
		if known, err = d.readDescriptors(rel.Descriptors); err != nil {
			d.log.Error("read descriptors", "app", rel.App, "release", rel.Version, "err", err)
			known = &descriptorpb.FileDescriptorSet{}
		}
	}
	rctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	said, err := gateway.Reflect(rctx, in.Addr)
	if err != nil {
		d.log.Info("no schema by reflection", "app", rel.App, "release", rel.Version, "err", err)
	}
	set := union(known, said)
	if len(set.GetFile()) == 0 {
		return ""
	}
	b, err := proto.MarshalOptions{Deterministic: true}.Marshal(set)
	if err != nil {
		d.log.Error("encode descriptors", "app", rel.App, "release", rel.Version, "err", err)
		return ""
	}
	digest, err := d.keepDescriptors(b)
	if err != nil {
		d.log.Error("keep descriptors", "app", rel.App, "release", rel.Version, "err", err)
		return ""
	}
	return d.descriptorsFile(digest)
}

// union is a with those files of b that declare nothing a has: a has comments,
// and b names of files that may differ.
func union(a, b *descriptorpb.FileDescriptorSet) *descriptorpb.FileDescriptorSet {
	if len(a.GetFile()) == 0 {
		return b
	}
	names, symbols := map[string]bool{}, map[string]bool{}
	for _, f := range a.GetFile() {
		names[f.GetName()] = true
		for _, s := range declared(f) {
			symbols[s] = true
		}
	}
	out := &descriptorpb.FileDescriptorSet{File: slices.Clone(a.GetFile())}
	for _, f := range b.GetFile() {
		if !names[f.GetName()] && !slices.ContainsFunc(declared(f), func(s string) bool { return symbols[s] }) {
			out.File = append(out.File, f)
		}
	}
	if _, err := (protodesc.FileOptions{AllowUnresolvable: true}).NewFiles(out); err != nil {
		return a
	}
	return out
}

// declared are the full names of a file's top-level declarations.
func declared(f *descriptorpb.FileDescriptorProto) []string {
	var names []string
	add := func(name string) { names = append(names, strings.TrimPrefix(f.GetPackage()+"."+name, ".")) }
	for _, m := range f.GetMessageType() {
		add(m.GetName())
	}
	for _, e := range f.GetEnumType() {
		add(e.GetName())
	}
	for _, s := range f.GetService() {
		add(s.GetName())
	}
	for _, e := range f.GetExtension() {
		add(e.GetName())
	}
	return names
}

// remember restores the traits of a live release after a restart, from the
// file or else from its first ready instance.
func (d *Daemon) remember(ctx context.Context, rel m3o.Release) {
	if t, ok := d.knownTraits(rel); ok {
		d.routes.setTraits(rel.App, rel.Version, t)
		return
	}
	p, ok := rel.Processes[webProcess]
	if !ok || replicas(p) == 0 {
		return
	}
	ins, err := runtime.WaitReady(ctx, d.driver, ref(rel, webProcess), 1, nil)
	if err != nil {
		d.log.Error("wait for app", "app", rel.App, "release", rel.Version, "err", err)
		return
	}
	t, err := d.examine(ctx, rel, ins[0])
	if err != nil {
		d.log.Error("examine app", "app", rel.App, "release", rel.Version, "err", err)
		return
	}
	d.routes.setTraits(rel.App, rel.Version, t)
}
