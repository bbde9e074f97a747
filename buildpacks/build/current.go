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
	Base      string // digest of the layer with CA roots and time zones; "" where the toolchain is not here yet
}

// Current says what a build that asks for the toolchain want would use, were
// the newest patch of its Go 1.N fetched before: Fetch does that, this only
// looks. A module proxy that is away is no error: what is here counts then.
func (b *Builder) Current(ctx context.Context, want string) (Basis, error) {
	tc, err := b.toolchains.get(ctx, want, func(string, ...any) {})
	if err != nil {
		return Basis{}, disk(err)
	}
	if patch := b.toolchains.newerPatch(ctx, tc.Version); patch != "" {
		return Basis{Toolchain: patch}, nil
	}
	base, err := b.pin(func() (v1.Descriptor, error) { return b.runtimeLayer(ctx, b.images, tc) })
	if err != nil {
		return Basis{}, disk(err)
	}
	b.unpin(base)
	return Basis{Toolchain: tc.Version, Base: base.Digest.String()}, nil
}

// Fetch has a toolchain here, so that builds from now on use it unless they
// ask for a newer one. It takes minutes where it was not here before.
func (b *Builder) Fetch(ctx context.Context, toolchain string, say func(format string, args ...any)) error {
	_, err := b.toolchains.exactly(ctx, toolchain, say)
	return disk(err)
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
