package build

import (
	"context"
	goversion "go/version"
	"slices"

	v1 "github.com/opencontainers/image-spec/specs-go/v1"
)

// A Basis is what a Go build takes from outside its tree and modules.
type Basis struct {
	Toolchain string // "go1.26.8"
	Base      string // digest of the layer with CA roots and time zones
}

// Current says what a build that asks for the toolchain want would use now.
// Unlike a build it looks for a newer patch of the Go 1.N in use, and fetches
// it, so that builds from then on use it. A module proxy that is away is no
// error: what is here counts then.
func (b *Builder) Current(ctx context.Context, want string) (Basis, error) {
	said := func(string, ...any) {}
	tc, err := b.toolchains.get(ctx, want, said)
	if err != nil {
		return Basis{}, disk(err)
	}
	if patch := b.toolchains.newerPatch(ctx, tc.Version); patch != "" {
		if tc, err = b.toolchains.get(ctx, patch, said); err != nil {
			return Basis{}, disk(err)
		}
	}
	base, err := b.pin(func() (v1.Descriptor, error) { return b.runtimeLayer(ctx, b.images, tc) })
	if err != nil {
		return Basis{}, disk(err)
	}
	b.unpin(base)
	return Basis{Toolchain: tc.Version, Base: base.Digest.String()}, nil
}

// newerPatch is the newest release of version's own Go 1.N that the proxy
// lists, "" when there is none newer or no list.
func (t *toolchains) newerPatch(ctx context.Context, version string) string {
	list, err := t.listed(ctx)
	if err != nil {
		return ""
	}
	same := slices.DeleteFunc(list, func(v string) bool { return goversion.Lang(v) != goversion.Lang(version) })
	if v := newest(same, version); v != "" && goversion.Compare(v, version) > 0 {
		return v
	}
	return ""
}
