package daemon

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"strings"
	"time"

	"google.golang.org/protobuf/proto"

	"github.com/m3o/m3o"
	"github.com/m3o/m3o/gateway"
	"github.com/m3o/m3o/internal/atomicfile"
	"github.com/m3o/m3o/runtime"
)

// examine asks a healthy instance how it is spoken to: its protocol and, for
// a gRPC service, its schema by reflection. A schema belongs to the image, so
// it is asked once per image and kept in a file.
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
		if t.Descriptors, err = d.reflect(ctx, rel, in); err != nil {
			d.log.Info("no schema by reflection", "app", rel.App, "release", rel.Version, "err", err)
		}
	}
	b, err := json.Marshal(t)
	if err != nil {
		return traits{}, fmt.Errorf("encode traits: %w", err)
	}
	if err := atomicfile.Write(d.traitsFile(rel, ".json"), b, 0o600); err != nil {
		return traits{}, fmt.Errorf("keep traits: %w", err)
	}
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
	return t, true
}

// traitsFile names a file for what is known of rel's image under rel's config,
// which may switch a protocol or reflection on and off.
func (d *Daemon) traitsFile(rel m3o.Release, ext string) string {
	return d.cfg.path("traits", fmt.Sprintf("%s-%s-c%d%s", rel.App, strings.TrimPrefix(rel.Image, "sha256:"), rel.Config, ext))
}

func (d *Daemon) reflect(ctx context.Context, rel m3o.Release, in m3o.Instance) (string, error) {
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	set, err := gateway.Reflect(ctx, in.Addr)
	if err != nil {
		return "", err
	}
	b, err := proto.MarshalOptions{Deterministic: true}.Marshal(set)
	if err != nil {
		return "", fmt.Errorf("encode descriptors: %w", err)
	}
	sum := sha256.Sum256(b)
	file := d.cfg.path("descriptors", hex.EncodeToString(sum[:])+".binpb")
	if err := atomicfile.Write(file, b, 0o600); err != nil {
		return "", err
	}
	return file, nil
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
