package protobuf

import (
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/m3o/m3o/internal/need"
)

// What is planned for the sample repositories; cmd/m3od pushes them.
func TestPlanOfTheSamples(t *testing.T) {
	for app, want := range map[string][]string{
		"hello-grpc": nil,
		"proto-only": {"gen/notes/v1/notes.pb.go is missing: made from proto/notes/v1/notes.proto",
			"gen/notes/v1/notes_grpc.pb.go is missing: made from proto/notes/v1/notes.proto"},
		"connect-notes": {"gen/pad/v1/pad.pb.go is missing: made from proto/pad/v1/pad.proto",
			"gen/pad/v1/padv1connect/pad.connect.go is missing: made from proto/pad/v1/pad.proto"},
		"buf-module": {"internal/gen/greet/v1/greet.pb.go is missing: made from api/greet/v1/greet.proto",
			"internal/gen/greet/v1/greet_grpc.pb.go is missing: made from api/greet/v1/greet.proto",
			"internal/gen/greet/v1/language.pb.go is missing: made from api/greet/v1/language.proto"},
		"demo-shop": {"proto/shop/v1/cart.pb.go is missing: made from proto/shop/v1/cart.proto",
			"proto/shop/v1/cart_grpc.pb.go is missing: made from proto/shop/v1/cart.proto",
			"proto/shop/v1/catalog.pb.go is missing: made from proto/shop/v1/catalog.proto",
			"proto/shop/v1/catalog_grpc.pb.go is missing: made from proto/shop/v1/catalog.proto",
			"proto/shop/v1/checkout.pb.go is missing: made from proto/shop/v1/checkout.proto",
			"proto/shop/v1/checkout_grpc.pb.go is missing: made from proto/shop/v1/checkout.proto",
			"proto/shop/v1/money.pb.go is missing: made from proto/shop/v1/money.proto"},
		"stale-code": {"proto/echo/v1/echo.pb.go is older than proto/echo/v1/echo.proto: message SayRequest changed, service Echo changed",
			"proto/echo/v1/echo_grpc.pb.go is older than proto/echo/v1/echo.proto: /echo.v1.Echo/Shout is new"},
	} {
		t.Run(app, func(t *testing.T) {
			tree := os.DirFS(filepath.Join(need.RepoRoot(t), "testdata/apps", app))
			s, err := Find(tree, ".")
			if err != nil {
				t.Fatal(err)
			}
			r, err := Compile(t.Context(), s)
			if err != nil {
				t.Fatal(err)
			}
			g, err := GoPlan(r)
			if err != nil {
				t.Fatal(err)
			}
			var got []string
			for _, s := range g.Stale {
				got = append(got, s.String())
			}
			if d := cmp.Diff(want, got); d != "" {
				t.Errorf("the plan differs (-want +got):\n%s", d)
			}
			if slices.ContainsFunc(g.Runs, func(r Run) bool { return !strings.HasPrefix(r.Plugin.Version, "v") || len(r.Files) == 0 }) {
				t.Errorf("runs %+v", g.Runs)
			}
		})
	}
}
